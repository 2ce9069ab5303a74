"""Generated videos of moving shapes, in the layout of GOT-10k: the default dataset of train_siamfc.py and track.py.

WILD ones, which train the bundled tracker, move fast, turn, blur and change in light and size among others that look
like the target.
"""

import functools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from utils.images import write_image
from utils.samples import drawing
from utils.samples.drawing import draw_texture, paint_shape, random_color
from utils.samples.scenes import read_photographs

SPRITE_SIZE = 160  # px, of a shape's picture before it is scaled into a frame
SPRITE_RADIUS = 48.0
WAYPOINT_FRAMES = 12  # a shape reaches a new place every so many frames

MOVING_SHAPES_FRAMES, MOVING_SHAPES_HW = 30, (240, 320)


class Motion(NamedTuple):
    """How hard a video is to track."""

    reach: float = 55.0  # px from one waypoint to the next, at most: 7 px a frame where it is fastest
    hurry: float = 1.0  # all slow waves are so many times as fast
    growth: float = 0.25  # sizes change by at most exp(this), either way
    turn: float = 0.3  # radians, either way
    squeeze: float = 0.0  # share of its width that a shape loses as if turned away, at most
    shutter: float = 0.0  # share of a frame's time in which it is exposed: moving things blur
    defocus: float = 0.0  # px, standard deviation of the blur of a whole frame, at most
    light: float = 0.12  # share by which the light changes
    lookalikes: int = 0  # others with both the target's colour and its outline
    has_photographs: bool = False  # some textures are cut from scikit-image's


GENTLE = Motion()
WILD = Motion(
    reach=150.0, hurry=2.0, growth=0.6, turn=2.0, squeeze=0.4, shutter=0.7, defocus=2.5, light=0.4, lookalikes=2,
    has_photographs=True,
)  # fmt: skip


def draw_moving_shapes(
    rng: np.random.Generator, num_frames: int, height: int, width: int, motion: Motion = GENTLE
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Draw a short video: a textured shape that moves, turns and changes size among others, on ground that moves too.

    Some of the others have its colours or its outline, and some pass in front of it.

    Args:
        rng: the video's own generator.
        num_frames: at least 1.
        height, width: px, at least 160.
    Returns:
        frames, uint8 (H, W, 3) each; boxes_xywh float64 (T, 4), 0-based px, tight around the shape's pixels, whether
        seen or covered; cover int64 (T,), 0 hidden .. 8 wholly visible.
    """
    side, margin = max(height, width), 24
    photographs = read_photographs() if motion.has_photographs else ()
    ground = draw_texture(rng, side + 2 * margin, random_color(rng), photographs)
    for _ in range(int(rng.integers(5, 14))):
        radius = side * rng.uniform(0.03, 0.16)
        paint_shape(rng, ground, drawing.random_shape(rng, len(ground), radius), random_color(rng), rng.random() < 0.3)
    ground = cv2.GaussianBlur(ground.astype(np.float32), (0, 0), rng.uniform(0.4, 1.2))

    color, outline = random_color(rng), _sprite_outline(rng)
    draw_sprite = functools.partial(_draw_sprite, rng, photographs)
    sprites = [draw_sprite(color, outline)]  # the target, then the others
    sprites.append(draw_sprite(color, _sprite_outline(rng)))
    sprites.append(draw_sprite(random_color(rng), outline))
    sprites += [draw_sprite(random_color(rng), _sprite_outline(rng)) for _ in range(int(rng.integers(0, 3)))]
    sprites += [draw_sprite(color, outline) for _ in range(motion.lookalikes)]
    places = [_draw_places(rng, num_frames, alpha, height, width, motion) for _, alpha in sprites]
    order = list(range(1, len(sprites)))  # from back to front
    order.insert(len(order) - int(rng.integers(2)), 0)  # the target in front, or behind one of the others

    pan_xy = margin + margin * np.stack([_wave(rng, num_frames, 60, 200), _wave(rng, num_frames, 60, 200)], 1)
    light = 1 + motion.light * _wave(rng, num_frames, 30 / motion.hurry, 90 / motion.hurry)
    grain = np.float32(rng.uniform(1, 5))
    blur_px = motion.defocus * _wave(rng, num_frames, 10, 40) if motion.defocus > 0 else np.zeros(num_frames)
    shutter = np.linspace(0, motion.shutter, 5) if motion.shutter > 0 else np.zeros(1)
    frames, boxes_xywh, cover = [], np.zeros((num_frames, 4)), np.zeros(num_frames, np.int64)
    for t in range(num_frames):
        shift = np.array([[1, 0, -pan_xy[t, 0]], [0, 1, -pan_xy[t, 1]]])
        frame = cv2.warpAffine(ground, shift, (width, height), borderMode=cv2.BORDER_REPLICATE)
        for index in order:
            colors, alpha = sprites[index]
            now, soon = places[index][t], places[index][min(t + 1, num_frames - 1)]  # (2, 3): sprite (x, y) -> frame
            exposures = [_paste(frame, colors, alpha, (1 - share) * now + share * soon) for share in shutter]
            frame = sum(exposed for exposed, _ in exposures) / len(exposures)
            inside = exposures[len(exposures) // 2][1]
            if index == 0:
                target = seen = inside
            elif order.index(index) > order.index(0):
                seen = seen & ~inside
        xs, ys = np.flatnonzero(target.any(0)), np.flatnonzero(target.any(1))
        boxes_xywh[t] = xs[0], ys[0], xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1
        cover[t] = np.ceil(8 * seen.sum() / target.sum())
        if blur_px[t] > 0.3:
            frame = cv2.GaussianBlur(frame, (0, 0), blur_px[t])
        frame = frame * light[t] + rng.standard_normal((height, width, 1), np.float32) * grain
        frames.append(np.clip(frame, 0, 255).astype(np.uint8))
    return frames, boxes_xywh, cover


def _paste(
    frame: np.ndarray, colors: np.ndarray, alpha: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Paint a sprite into a frame: the new frame, float32 (H, W, 3), and where the sprite covers it, bool (H, W)."""
    height, width = frame.shape[:2]
    alpha = cv2.warpAffine(alpha, place, (width, height))[..., None]  # (H, W, 1)
    return frame + alpha * (cv2.warpAffine(colors, place, (width, height)) - frame), alpha[..., 0] > 0.5


def _wave(rng: np.random.Generator, num_frames: int, min_period: float, max_period: float) -> np.ndarray:
    """Draw a slow wave: float (T,) in -1..1."""
    period, phase = rng.uniform(min_period, max_period), rng.uniform(0, 2 * np.pi)
    return np.sin(2 * np.pi * np.arange(num_frames) / period + phase)


def _sprite_outline(rng: np.random.Generator) -> np.ndarray:
    """Draw an outline in the middle of a sprite, not too thin: float (K, 2) px."""
    while True:
        outline = drawing.random_outline(rng, (SPRITE_SIZE / 2, SPRITE_SIZE / 2), SPRITE_RADIUS, int(rng.integers(5)))
        extent = np.ptp(outline, 0)
        if extent.min() > 0.65 * extent.max():
            return outline


def _draw_sprite(
    rng: np.random.Generator, photographs: list[np.ndarray] | tuple, color: np.ndarray, outline: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a shape with parts: colours float32 (S, S, 3), alpha float32 (S, S) in 0..1."""
    colors = draw_texture(rng, SPRITE_SIZE, color, photographs).astype(np.float32)
    mask = drawing.draw_points((SPRITE_SIZE, SPRITE_SIZE), outline)
    for _ in range(int(rng.integers(1, 4))):
        center = rng.normal(SPRITE_SIZE / 2, 0.35 * SPRITE_RADIUS, 2)
        radius = SPRITE_RADIUS * rng.uniform(0.2, 0.5)
        part = mask & drawing.fill_random_outline(rng, SPRITE_SIZE, center, radius, int(rng.integers(5)))
        if part.any():
            paint_shape(rng, colors, part, random_color(rng), rng.random() < 0.3)
    colors[drawing.find_rim(mask)] *= rng.uniform(0.3, 1.0)
    return colors, cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.0)


def _draw_places(
    rng: np.random.Generator, num_frames: int, alpha: np.ndarray, height: int, width: int, motion: Motion
) -> list[np.ndarray]:
    """Draw how a sprite moves, so that it stays in the frame: for each frame float (2, 3), sprite to frame (x, y)."""
    middle = (SPRITE_SIZE - 1) / 2
    reach = np.hypot(*(np.argwhere(alpha > 0) - middle).T).max()  # px, in the sprite
    wave = functools.partial(_wave, rng, num_frames)
    scales = rng.uniform(20, 32) / SPRITE_RADIUS
    scales = scales * np.exp(rng.uniform(0, motion.growth) * wave(80 / motion.hurry, 160 / motion.hurry))
    angles = rng.uniform(0, motion.turn) * wave(40 / motion.hurry, 120 / motion.hurry)
    margin = min(reach * scales.max() + 1, min(height, width) / 2 - 1)
    low, high = np.full(2, margin), np.array([width, height]) - margin
    waypoints = [rng.uniform(low, high)]
    while len(waypoints) < num_frames // WAYPOINT_FRAMES + 2:
        waypoints.append(np.clip(waypoints[-1] + rng.uniform(-1, 1, 2) * motion.reach, low, high))
    widths = np.ones(num_frames)
    if motion.squeeze > 0:
        widths -= rng.uniform(0, motion.squeeze) * (0.5 + 0.5 * wave(20, 60))
    places = []
    for t, (scale, angle) in enumerate(zip(scales, angles, strict=True)):
        leg, share = divmod(t / WAYPOINT_FRAMES, 1)
        share = 0.5 - 0.5 * np.cos(np.pi * share)  # slow at the waypoints
        center_xy = (1 - share) * waypoints[int(leg)] + share * waypoints[int(leg) + 1]
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turn = turn * [widths[t], 1]
        places.append(np.concatenate([turn, (center_xy - turn @ [middle, middle])[:, None]], 1))
    return places


def write_moving_shapes(folder: Path, num_videos: dict[str, int], motion: Motion = GENTLE) -> None:
    """Write the videos: <folder>/{train,val}/<name>/{00000001.jpg, ..., groundtruth.txt, *.label, meta_info.ini}."""
    with ProcessPoolExecutor() as executor:
        for split, number in num_videos.items():
            (folder / split).mkdir(parents=True)
            videos = executor.map(_write_moving_shape, [folder / split] * number, range(number), [motion] * number)
            names = list(tqdm(videos, total=number, unit=f" {split} videos"))
            (folder / split / "list.txt").write_text("\n".join(names) + "\n", encoding="utf-8", newline="")


def _write_moving_shape(split_dir: Path, index: int, motion: Motion) -> str:
    """Write one video and return its name.

    As in GOT-10k, boxes count from 1. In the third training video the shape is away for a while: no box, cover 0.
    """
    split, (height, width) = split_dir.name, MOVING_SHAPES_HW
    name = f"moving_shapes_{split}_{index + 1:06d}"
    rng = np.random.default_rng([4 if split == "val" else 3, index])
    frames, boxes_xywh, cover = draw_moving_shapes(rng, MOVING_SHAPES_FRAMES, height, width, motion)
    boxes_xywh[:, :2] += 1
    is_cut = (boxes_xywh[:, :2] <= 1) | (boxes_xywh[:, :2] + boxes_xywh[:, 2:] > [width, height])
    absent = np.zeros(len(frames), bool)
    if split == "train" and index == 2:
        absent[12:18] = True
        frames[12:18] = [cv2.GaussianBlur(frame, (0, 0), 25) for frame in frames[12:18]]
        boxes_xywh[absent], cover[absent] = -1, 0
    labels = {"cover": cover, "absence": absent, "cut_by_image": is_cut.any(1)}
    texts = {f"{label}.label": "".join(f"{number:d}\n" for number in numbers) for label, numbers in labels.items()}
    texts["groundtruth.txt"] = "".join(",".join(f"{value:.4f}" for value in box) + "\n" for box in boxes_xywh)
    texts["meta_info.ini"] = (
        f"[METAINFO]\nurl: generated\nbegin: 00:00:00\nend: 00:00:{len(frames) // 10:02d}\nanno_fps: 10Hz\n"
        "object_class: shape\nmotion_class: move\nmajor_class: shape\nroot_class: object\n"
        f"motion_adverb: smoothly\nresolution: ({width}, {height})\n"
    )
    video_dir = split_dir / name
    video_dir.mkdir()
    for t, frame in enumerate(frames):
        write_image(video_dir / f"{t + 1:08d}.jpg", frame)
    for file_name, text in texts.items():
        (video_dir / file_name).write_text(text, encoding="utf-8", newline="")
    return name
