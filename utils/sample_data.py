"""Generated datasets: small, deterministic, written to disk in the layouts of real datasets.

`draw_scene` draws what `sam2_nano` is pre-trained on: textured shapes that cover one another, parts on parts, crowds of
small blobs, thin strokes, regions that fill the frame. `draw_glassware` draws vessels with materials inside, for the
default run of train_sam2.py, `draw_pet` cats and dogs, for that of train_unet.py, and `draw_moving_shapes` videos, for
those of train_siamfc.py and track.py. Every picture is a function of its seed and index alone.
"""

import functools
import importlib.util
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.images import read_image, write_image, write_label_map
from utils.run import check_type

REPOSITORY = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------------------
# textures and shapes


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Draw smooth noise: float32 (size, size), about 0..1, with `cells` bumps along a side."""
    coarse = rng.random((cells, cells), np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _random_color(rng: np.random.Generator) -> np.ndarray:
    """Draw an RGB colour, float32 (3,) in 0..255; one in three is nearly grey."""
    color = rng.uniform(0, 255, 3)
    if rng.random() < 0.35:
        color = color.mean() + rng.uniform(-12, 12, 3)
    return color.astype(np.float32)


def _photograph_texture(
    rng: np.random.Generator, size: int, color: np.ndarray, photographs: list[np.ndarray]
) -> np.ndarray:
    """Cut a texture from a photograph, turned and moved towards a colour: float32 (size, size, 3) in about 0..255."""
    photograph = photographs[rng.integers(len(photographs))]
    side = int(min(photograph.shape[:2]) * np.exp(rng.uniform(np.log(0.08), np.log(0.6))))
    y, x = rng.integers(photograph.shape[0] - side + 1), rng.integers(photograph.shape[1] - side + 1)
    patch = np.rot90(photograph[y : y + side, x : x + side], rng.integers(4)).astype(np.float32)
    interpolation = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    patch = cv2.resize(patch, (size, size), interpolation=interpolation)
    if rng.random() < 0.7:
        patch = color + rng.uniform(0.3, 1.0) * (patch - patch.mean((0, 1)))
    return patch


def _texture(
    rng: np.random.Generator, size: int, color: np.ndarray, photographs: list[np.ndarray] | tuple = ()
) -> np.ndarray:
    """Draw a texture around a colour: float32 (size, size, 3) in about 0..255, now and then cut from a photograph."""
    if photographs and rng.random() < 0.35:
        return _photograph_texture(rng, size, color, photographs)
    other = np.clip(color + rng.normal(0, 1, 3) * rng.choice([10, 30, 70]), 0, 255).astype(np.float32)
    kind = rng.integers(6)
    if kind == 0:  # flat
        weight = np.zeros((size, size), np.float32)
    elif kind == 1:  # gradient
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        weight = np.cos(angle) * ramp[None] + np.sin(angle) * ramp[:, None] + 0.5
    elif kind == 2:  # clouds
        weight = 0.6 * _smooth_noise(rng, size, int(rng.integers(3, 8)))
        weight += 0.4 * _smooth_noise(rng, size, int(rng.integers(10, 40)))
    elif kind == 3:  # stripes, bent a little
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 40) * size / 256
        ramp = np.arange(size, dtype=np.float32)
        phase = np.cos(angle) * ramp[None] + np.sin(angle) * ramp[:, None]
        phase = phase + rng.choice([0, 15]) * _smooth_noise(rng, size, 5)
        weight = 0.5 + 0.5 * np.sin(phase * np.float32(2 * np.pi / period))
        if rng.random() < 0.5:
            weight = (weight > 0.5).astype(np.float32)
    elif kind == 4:  # spots
        weight = (_smooth_noise(rng, size, int(rng.integers(12, 60))) > rng.uniform(0.4, 0.75)).astype(np.float32)
    else:  # grain
        weight = rng.random((size, size), np.float32)
        if rng.random() < 0.5:
            weight = cv2.blur(weight, (3, 3))
    return color + weight[..., None] * (other - color)


def _outline(rng: np.random.Generator, center_xy: tuple[float, float], radius: float, kind: int) -> np.ndarray:
    """Draw the outline of one shape: float (K, 2) points (x, y) px. Kinds: ellipse, blob, polygon, rectangle, star."""
    aspect = rng.uniform(0.45, 1.0)
    turn = rng.uniform(0, 2 * np.pi)
    if kind == 3:
        points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float) * [1, aspect] * 0.85
    else:
        num = {0: 40, 1: 48, 2: int(rng.integers(3, 8)), 4: 2 * int(rng.integers(4, 9))}[kind]
        angles = np.linspace(0, 2 * np.pi, num, endpoint=False)
        radii = np.ones(num)
        if kind == 1:
            for harmonic in range(2, 6):
                radii += rng.normal(0, 0.28 / harmonic) * np.cos(harmonic * angles + rng.uniform(0, 2 * np.pi))
        elif kind == 2:
            angles = np.sort(angles + rng.uniform(-0.35, 0.35, num) * 2 * np.pi / num)
        elif kind == 4:
            radii[1::2] = rng.uniform(0.4, 0.75)
        points = np.stack([np.cos(angles) * radii, np.sin(angles) * radii * aspect], 1)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return points @ rotation.T * radius + np.asarray(center_xy)


def _fill(size: int, outline: np.ndarray) -> np.ndarray:
    """Fill an outline: bool (size, size)."""
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1)
    return mask.astype(bool)


def _random_shape(rng: np.random.Generator, size: int, radius: float) -> np.ndarray:
    """Draw one filled shape or thin stroke somewhere in the frame: bool (size, size)."""
    center = rng.uniform(0.02 * size, 0.98 * size, 2)
    kind = int(rng.choice(8, p=[0.2, 0.26, 0.12, 0.14, 0.06, 0.08, 0.08, 0.06]))
    if kind < 5:
        return _fill(size, _outline(rng, center, radius, kind))
    mask = np.zeros((size, size), np.uint8)
    thickness = max(2, int(round(radius * rng.uniform(0.08, 0.3))))
    if kind == 5:  # bent stroke
        steps = np.cumsum(rng.normal(0, 0.45, (12, 1)), 0) + rng.uniform(0, 2 * np.pi)
        path = np.cumsum(np.concatenate([np.cos(steps), np.sin(steps)], 1) * radius * 0.4, 0)
        path = path - path.mean(0) + center
        cv2.polylines(mask, [np.round(path).astype(np.int32)], False, 1, thickness)
    elif kind == 6:  # ring
        outline = np.round(_outline(rng, center, radius, int(rng.integers(2)))).astype(np.int32)
        cv2.polylines(mask, [outline], True, 1, thickness)
    else:  # two shapes grown together
        for _ in range(2):
            shifted = center + rng.normal(0, 0.6, 2) * radius
            mask |= _fill(size, _outline(rng, shifted, radius * 0.7, int(rng.integers(4)))).astype(np.uint8)
    return mask.astype(bool)


def _paint(
    rng: np.random.Generator,
    picture: np.ndarray,
    mask: np.ndarray,
    color: np.ndarray,
    edge: bool,
    photographs: list[np.ndarray] | tuple = (),
) -> None:
    """Paint a textured shape into a float picture, in place, shaded across its extent; `edge` adds an outline."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y, x, side = ys[0], xs[0], int(max(ys[-1] - ys[0], xs[-1] - xs[0]) + 1)
    window = (slice(y, ys[-1] + 1), slice(x, xs[-1] + 1))
    inside = mask[window]
    height, width = inside.shape
    texture = _texture(rng, side, color, photographs)[:height, :width]
    if rng.random() < 0.25:  # round: darker towards its rim
        depth = cv2.distanceTransform(np.pad(inside.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
        roundness = np.sqrt(np.clip(depth / (rng.uniform(0.5, 1.0) * depth.max()), 0, 1))
        texture = texture * (1 - rng.uniform(0.2, 0.7) * (1 - roundness))[..., None]
    ramp_xy = rng.normal(0, 0.25, 2)
    shade = 1 + ramp_xy[0] * np.linspace(-1, 1, width)[None] + ramp_xy[1] * np.linspace(-1, 1, height)[:, None]
    texture = texture * shade[..., None].astype(np.float32)
    picture[window][inside] = texture[inside]
    if edge:
        padded = np.pad(inside.astype(np.uint8), 1)
        rim = inside & ~cv2.erode(padded, np.ones((3, 3), np.uint8))[1:-1, 1:-1].astype(bool)
        picture[window][rim] = picture[window][rim] * rng.uniform(0.2, 1.6) + rng.uniform(-30, 60)


def _finish_picture(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Give a float picture a camera: blur, uneven light, grain, sometimes grey. Returns uint8 of the same shape."""
    size = picture.shape[0]
    if rng.random() < 0.7:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 1.4))
    if rng.random() < 0.4:
        light = 1 + rng.uniform(0.1, 0.6) * (_smooth_noise(rng, size, 3) - 0.5)
        picture = picture * light[..., None]
    if rng.random() < 0.2:
        picture = np.repeat(picture.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.6:
        picture = picture + rng.standard_normal((size, size, 1), np.float32) * np.float32(rng.uniform(1, 14))
    return np.clip(picture, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# scenes for pre-training


def draw_scene(rng: np.random.Generator, size: int, photographs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene: large objects with parts, a medium clutter, regions that fill the frame, or a crowd of blobs.

    Args:
        rng: the scene's own generator.
        size: side, pixels.
        photographs: uint8 (H, W, 3) each, whose patches are textures among others; may be empty.
    Returns:
        image_rgb uint8 (size, size, 3); ids int32 (size, size) of the visible instances, 0 is background.
    """
    kind = rng.choice(["objects", "clutter", "regions", "crowd"], p=[0.25, 0.2, 0.25, 0.3])
    if kind == "crowd":
        picture, ids = _draw_crowd(rng, size)
        return _finish_picture(rng, picture), ids
    if kind == "regions":
        picture, ids = _draw_regions(rng, size, photographs)
    else:
        picture, ids = _texture(rng, size, _random_color(rng), photographs), np.zeros((size, size), np.int32)
    next_id = int(ids.max()) + 1
    num_objects = int(rng.integers(*{"objects": (2, 9), "clutter": (8, 28), "regions": (0, 5)}[kind]))
    low, high = (0.025, 0.13) if kind == "clutter" else (0.08, 0.34)
    for _ in range(num_objects):
        radius = size * np.exp(rng.uniform(np.log(low), np.log(high)))
        mask = _random_shape(rng, size, radius)
        if not mask.any():
            continue
        color = _random_color(rng)
        if rng.random() < 0.3:
            _cast_shadow(rng, picture, mask, radius)
        _paint(rng, picture, mask, color, rng.random() < 0.3, photographs)
        ids[mask] = next_id
        next_id += 1
        if rng.random() < 0.25:  # a part: a smaller shape that lies on the object, an instance of its own
            y, x = np.argwhere(mask)[rng.integers(mask.sum())]
            part = _fill(size, _outline(rng, (x, y), radius * rng.uniform(0.25, 0.6), int(rng.integers(4)))) & mask
            if part.sum() > 12:
                _paint(rng, picture, part, _random_color(rng), rng.random() < 0.3, photographs)
                ids[part] = next_id
                next_id += 1
    return _finish_picture(rng, picture), ids


def _cast_shadow(rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray, radius: float) -> None:
    """Darken a float picture beside a shape, softly, in place."""
    shift = rng.normal(0, 0.2, 2) * radius
    moved = cv2.warpAffine(mask.astype(np.float32), np.float32([[1, 0, shift[0]], [0, 1, shift[1]]]), mask.shape[::-1])
    shadow = cv2.GaussianBlur(moved, (0, 0), max(1.0, radius * rng.uniform(0.03, 0.2)))
    picture *= 1 - rng.uniform(0.2, 0.7) * shadow[..., None]


def _draw_regions(rng: np.random.Generator, size: int, photographs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Divide the frame among regions with bent borders, each of its own texture: float picture, int32 ids from 1."""
    num_regions = int(np.exp(rng.uniform(np.log(2), np.log(26))))
    stretch_xy = np.exp(rng.normal(0, 0.5, 2))  # wide layers or tall ones
    bend = size * rng.uniform(0.0, 0.35)
    grid = np.arange(size, dtype=np.float32)
    xs = grid[None] + bend * (_smooth_noise(rng, size, int(rng.integers(3, 9))) - 0.5)
    ys = grid[:, None] + bend * (_smooth_noise(rng, size, int(rng.integers(3, 9))) - 0.5)
    seeds_xy = rng.uniform(0, size, (num_regions, 2))
    reach = rng.uniform(0, 0.25 * size, num_regions)  # some regions claim more of the frame than others
    distances = [
        np.hypot((xs - x) * stretch_xy[0], (ys - y) * stretch_xy[1]) - extra
        for (x, y), extra in zip(seeds_xy, reach, strict=True)
    ]
    region_ids = np.argmin(distances, 0) + 1
    picture, ids = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.int32)
    for region in np.unique(region_ids):
        _paint(rng, picture, region_ids == region, _random_color(rng), rng.random() < 0.15, photographs)
        # a region in pieces is as many instances
        num_pieces, pieces = cv2.connectedComponents((region_ids == region).astype(np.uint8), connectivity=4)
        ids[pieces > 0] = pieces[pieces > 0] + ids.max()
    return picture, ids


def _draw_crowd(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw many small blobs of one family on a dark, light or coloured ground: float picture, int32 ids."""
    ground_level = rng.choice([rng.uniform(0, 40), rng.uniform(190, 250), rng.uniform(40, 190)], p=[0.5, 0.25, 0.25])
    ground = np.clip(ground_level + rng.normal(0, rng.choice([2, 25]), 3), 0, 255).astype(np.float32)
    grey = rng.random() < 0.5
    if grey:
        ground[:] = ground.mean()
    picture = np.repeat(ground[None, None], size, 0).repeat(size, 1)
    picture += (rng.uniform(0, 25) * (_smooth_noise(rng, size, int(rng.integers(3, 12))) - 0.5))[..., None]
    ids = np.zeros((size, size), np.int32)
    radius = size * np.exp(rng.uniform(np.log(0.014), np.log(0.075)))  # of the family
    num_blobs = int(min(120, rng.uniform(0.08, 0.5) * size * size / (np.pi * radius * radius)))
    contrast = rng.uniform(18, 160) * (-1 if ground.mean() > 128 else 1)
    tint = np.ones(3) if grey else rng.uniform(0.5, 1.5, 3)
    spread = rng.choice([0.1, 0.45])  # how much the blobs differ in brightness
    overlap_allowed = rng.choice([0.05, 0.3])
    outlined = rng.random() < 0.15
    clusters = rng.uniform(0, size, (int(rng.integers(1, 6)), 2)) if rng.random() < 0.4 else None
    kinds = [0, 1] if rng.random() < 0.8 else [0, 1, 2, 3]
    texture_gain = rng.choice([0, 0.15, 0.4])
    for index in range(1, max(num_blobs, 3) + 1):
        center = rng.uniform(0, size, 2)
        if clusters is not None:
            center = clusters[rng.integers(len(clusters))] + rng.normal(0, size * 0.14, 2)
        own_radius = radius * np.exp(rng.normal(0, 0.22))
        mask = _fill(size, _outline(rng, center, own_radius, int(rng.choice(kinds))))
        area = mask.sum()
        if area < 8 or (mask & (ids > 0)).sum() > overlap_allowed * area:
            continue
        color = np.clip(ground + contrast * tint * np.exp(rng.normal(0, spread)), 0, 255)
        ys, xs = np.nonzero(mask)
        level = np.ones(len(ys), np.float32)
        if texture_gain > 0:
            level += texture_gain * (_smooth_noise(rng, 32, 6)[ys % 32, xs % 32] - 0.5)
        distance = np.hypot(xs - center[0], ys - center[1]) / (2 * own_radius)
        level -= rng.choice([0, 0.35]) * distance.astype(np.float32)  # some fade towards their rim
        picture[ys, xs] = ground + (color - ground) * level[:, None]
        if outlined:
            rim = mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
            picture[rim] *= 0.6
        ids[mask] = index
    return picture.astype(np.float32), ids


# ---------------------------------------------------------------------------------------------------------------------
# glassware: the default dataset of train_sam2.py


def draw_glassware(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw vessels of glass on a table, most with one or two materials inside.

    Args:
        rng: the picture's own generator.
    Returns:
        image_rgb uint8 (H, W, 3); vessel_ids and material_ids uint8 (H, W): 0 is none, ids start above 15. A vessel's
        ids cover its materials too, as in LabPics.
    """
    size = max(height, width)
    picture = _texture(rng, size, _random_color(rng))[:height, :width].copy()
    table_y = int(height * rng.uniform(0.6, 0.85))
    picture[table_y:] = _texture(rng, size, _random_color(rng))[: height - table_y, :width]
    vessel_ids, material_ids = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    ids = rng.permutation(np.arange(16, 256))  # no two objects of a picture share one
    num_vessels = int(rng.integers(1, 4))
    slots = rng.permutation(num_vessels)
    for index in range(num_vessels):
        tall = height * rng.uniform(0.4, 0.8)
        wide = min(tall * rng.uniform(0.45, 0.9), 0.9 * width / num_vessels)
        center_x = width * (slots[index] + rng.uniform(0.4, 0.6)) / num_vessels
        bottom_y = min(height - 3, table_y + rng.uniform(0.02, 0.15) * height)
        outline = _vessel_outline(rng, center_x, bottom_y, wide, tall)
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1)
        vessel = mask.astype(bool) & (vessel_ids == 0)
        if vessel.sum() < 100:
            continue
        vessel_ids[vessel] = ids[2 * index]
        inner = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=max(1, size // 128)).astype(bool) & vessel
        _draw_materials(rng, picture, material_ids, inner, bottom_y, tall, ids[20 + 3 * index : 23 + 3 * index])
        _draw_glass(rng, picture, vessel, outline)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.0))
    picture = picture + rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.uniform(1, 6))
    return np.clip(picture, 0, 255).astype(np.uint8), vessel_ids, material_ids


def _vessel_outline(rng: np.random.Generator, center_x: float, bottom_y: float, wide: float, tall: float) -> np.ndarray:
    """Draw half a vessel's profile and mirror it: float (K, 2) points (x, y) px. Beaker, flask, round flask or tube."""
    kind = rng.integers(4)
    heights = np.linspace(0, 1, 24)  # 0 bottom, 1 top
    if kind == 0:  # beaker, a little wider at the top
        radii = 0.46 + 0.04 * heights
    elif kind == 1:  # Erlenmeyer flask
        radii = np.where(heights < 0.7, 0.5 - 0.5 * heights, 0.15)
    elif kind == 2:  # round flask with a neck
        ball = np.sqrt(np.clip(0.25 - (heights * 1.6 - 0.5) ** 2, 0, None))
        radii = np.where(heights < 0.6, np.maximum(ball, 0.12), 0.12)
    else:  # tube
        radii = np.full(24, 0.2)
    radii = radii * np.clip(heights * 8 + 0.6, 0, 1)  # a rounded bottom
    ys = bottom_y - heights * tall
    right = np.stack([center_x + radii * wide, ys], 1)
    left = np.stack([center_x - radii * wide, ys], 1)
    return np.concatenate([right, left[::-1]])


def _draw_materials(
    rng: np.random.Generator,
    picture: np.ndarray,
    material_ids: np.ndarray,
    inner: np.ndarray,
    bottom_y: float,
    tall: float,
    ids: np.ndarray,
) -> None:
    """Fill the inside of a vessel with up to two layers of liquid or powder, in place."""
    rows = np.arange(inner.shape[0])[:, None]
    level = bottom_y
    for material_id in ids[: rng.choice(3, p=[0.1, 0.5, 0.4])]:
        top = level - tall * rng.uniform(0.15, 0.38)
        material = inner & (rows <= level) & (rows > top)
        if material.sum() < 40:
            return
        color = _random_color(rng)
        opacity = rng.uniform(0.55, 1.0)
        if rng.random() < 0.3:  # powder
            painted, opacity = _texture(rng, max(inner.shape), color)[: inner.shape[0], : inner.shape[1]], 1.0
        else:
            painted = np.broadcast_to(color, picture.shape)
        picture[material] = (1 - opacity) * picture[material] + opacity * painted[material]
        material_ids[material] = material_id
        level = top


def _draw_glass(rng: np.random.Generator, picture: np.ndarray, vessel: np.ndarray, outline: np.ndarray) -> None:
    """Lay glass over a vessel, in place: a faint tint, rims that catch light, a highlight along one side."""
    tint, strength = rng.uniform(170, 255), rng.uniform(0.06, 0.2)
    picture[vessel] = (1 - strength) * picture[vessel] + strength * tint
    rim = np.zeros(vessel.shape, np.uint8)
    cv2.polylines(rim, [np.round(outline).astype(np.int32)], True, 1, max(1, vessel.shape[0] // 120))
    on_rim = (rim > 0) & vessel
    picture[on_rim] = 0.4 * picture[on_rim] + 0.6 * rng.choice([30, 120, 245])
    highlight = np.zeros(vessel.shape, np.uint8)
    shifted = 0.72 * (outline[2:20] - outline.mean(0)) + outline.mean(0)
    cv2.polylines(highlight, [np.round(shifted).astype(np.int32)], False, 1, max(1, vessel.shape[0] // 90))
    picture[(highlight > 0) & vessel] = picture[(highlight > 0) & vessel] * 0.5 + 125


# ---------------------------------------------------------------------------------------------------------------------
# pets: the default dataset of train_unet.py

FUR_COLORS = np.float32(
    [[48, 44, 42], [226, 220, 212], [132, 132, 136], [200, 126, 62], [118, 78, 48], [222, 190, 150]]
)


def draw_pet(rng: np.random.Generator, is_cat: bool, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a cat or a dog, standing, sitting or close up, among objects that are none.

    Args:
        rng: the picture's own generator.
        is_cat: pointed ears and a thin tail, or hanging ears, a snout and a thick tail.
    Returns:
        image_rgb uint8 (H, W, 3); trimap uint8 (H, W): 1 pet, 2 background, 3 the border between them.
    """
    size = max(height, width)
    picture = _texture(rng, size, _random_hue(rng))[:height, :width].copy()
    floor_y = int(height * rng.uniform(0.5, 0.9))
    picture[floor_y:] = _texture(rng, size, _random_hue(rng))[: height - floor_y, :width]
    for _ in range(int(rng.integers(0, 5))):
        _draw_object(rng, picture, size)

    body, head = _pet_outlines(rng, is_cat, height, width)
    pet = np.zeros((height, width), bool)
    fur, shades = _fur(rng, size)[:height, :width], rng.uniform(0.75, 1.1, len(body) + len(head))
    for (points, thickness), shade in zip(body + head, shades, strict=True):
        part = np.zeros((height, width), np.uint8)
        if thickness == 0:
            cv2.fillPoly(part, [points], 1)
        else:
            cv2.polylines(part, [points], False, 1, thickness)
        pet |= part > 0
        picture[part > 0] = fur[part > 0] * shade
    _draw_face(rng, picture, head[0][0], is_cat)
    if rng.random() < 0.2:
        pet &= ~_draw_object(rng, picture, size)  # in front of the pet

    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 0.9))
    picture = picture + rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.uniform(1, 6))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    trimap = np.full((height, width), 2, np.uint8)
    trimap[cv2.dilate(pet.astype(np.uint8), disc) > 0] = 3
    trimap[cv2.erode(pet.astype(np.uint8), disc) > 0] = 1
    return np.clip(picture, 0, 255).astype(np.uint8), trimap


def _random_hue(rng: np.random.Generator) -> np.ndarray:
    """Draw a colour that no fur has, from green over blue to pink: float32 (3,) RGB."""
    hsv = np.float32([[[rng.uniform(90, 320), rng.uniform(0.25, 0.7), rng.uniform(0.35, 0.95)]]])
    return 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]


def _draw_object(rng: np.random.Generator, picture: np.ndarray, size: int) -> np.ndarray:
    """Draw a shape that is no pet, in place; return its mask, bool (H, W)."""
    height, width = picture.shape[:2]
    radius = size * rng.uniform(0.04, 0.16)
    mask = _fill(size, _outline(rng, rng.uniform(0, size, 2), radius, int(rng.integers(5))))[:height, :width]
    if mask.any():
        _paint(rng, picture, mask, _random_hue(rng), rng.random() < 0.4)
    return mask


def _fur(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw fur, plain, striped or in patches: float32 (size, size, 3)."""
    color, other = FUR_COLORS[rng.choice(len(FUR_COLORS), 2, replace=False)] + rng.normal(0, 8, (2, 3))
    kind = rng.integers(3)
    if kind == 0:
        weight = 0.15 * _smooth_noise(rng, size, 12)
    elif kind == 1:
        ramp = np.arange(size, dtype=np.float32)
        phase = ramp[None] + 0.4 * ramp[:, None] + 20 * _smooth_noise(rng, size, 8)
        weight = 0.35 * (np.sin(phase * np.float32(2 * np.pi / rng.uniform(6, 12))) > 0.3)
    else:
        weight = (_smooth_noise(rng, size, int(rng.integers(4, 8))) > 0.55).astype(np.float32)
    grain = 1 + 0.25 * (_smooth_noise(rng, size, size // 2) - 0.5)
    return ((color + weight[..., None] * (other - color)) * grain[..., None]).astype(np.float32)


def _pet_outlines(rng: np.random.Generator, is_cat: bool, height: int, width: int) -> tuple[list, list]:
    """Draw a pet's parts as (points int32 (K, 2) (x, y) px, thickness px, 0: filled): of the body, and of the head.

    In its own frame a pet looks to the right and is about 2 wide and 2 high, y down.
    """
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    pose = rng.choice(["standing", "sitting", "close up"], p=[0.4, 0.35, 0.25])
    tail, leg = (0.12, 0.17) if is_cat else (0.2, 0.2)
    bend = rng.uniform(-0.3, 0.3)
    if pose == "standing":
        head_xy, head_radius = np.array([0.72, -0.45]), 0.3
        body = [(np.array([[-0.6, -0.1], [-0.85, -0.35 + bend], [-0.9, -0.75 + bend]]), tail)]
        body += [(np.array([[x, 0.1], [x + 0.15 * bend, 0.85]]), leg) for x in (-0.5, -0.3, 0.3, 0.5)]
        body += [(circle * [0.68, 0.36], 0), (np.array([[0.4, -0.1], [0.66, -0.4]]), 0.36)]
    elif pose == "sitting":
        head_xy, head_radius = np.array([0.12, -0.6]), 0.36
        body = [(np.array([[-0.3, 0.7], [-0.7, 0.75], [-0.95, 0.5 + bend]]), tail)]
        body += [(circle * [0.45, 0.6] + [0, 0.25], 0), (circle * [0.36, 0.28] + [-0.15, 0.6], 0)]
        body += [(np.array([[x, 0.2], [x + 0.05, 0.85]]), leg) for x in (0.15, 0.35)]
    else:
        head_xy, head_radius = np.array([0.0, -0.1]), 0.72
        body = [(circle * [0.75, 0.8] + [-0.1, 1.05], 0)]
    head = [(circle * [1.0, 0.92], 0)]  # in units of its radius, about its centre
    if is_cat:
        head += [(np.array([[side * 0.9, -0.4], [side * 0.8, -1.4], [side * 0.2, -0.85]]), 0) for side in (-1, 1)]
    else:
        head += [(circle * [0.3, 0.65] + [side * 0.95, -0.05], 0) for side in (-1, 1)]
        head += [(circle * [0.5, 0.4] + [0.55, 0.35], 0)]
    head = [(points * head_radius + head_xy, thickness) for points, thickness in head]

    turn, unit_px = rng.normal(0, 0.12), min(height, width) * rng.uniform(0.36, 0.56)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    mirror = np.array([rng.choice([-1, 1]), 1])
    center_xy = np.array([width, height]) * rng.uniform(0.4, 0.6, 2)

    def place(parts: list) -> list:
        return [
            (
                np.round(points @ rotation.T * mirror * unit_px + center_xy).astype(np.int32),
                int(np.ceil(thickness * unit_px)),
            )
            for points, thickness in parts
        ]

    return place(body), place(head)


def _draw_face(rng: np.random.Generator, picture: np.ndarray, head: np.ndarray, is_cat: bool) -> None:
    """Draw eyes and a nose into a head's outline, in place."""
    center_xy, radius = head.mean(0), np.ptp(head[:, 0]) / 2
    eye_color = rng.choice([[90, 160, 60], [210, 170, 40], [70, 110, 180]] if is_cat else [[70, 45, 25]]).tolist()
    for side in (-1, 1):
        eye_xy = np.round(center_xy + radius * np.array([side * 0.4, -0.15])).astype(int).tolist()
        cv2.circle(picture, eye_xy, max(1, round(radius * 0.17)), eye_color, -1)
        cv2.circle(picture, eye_xy, max(1, round(radius * 0.08)), (15, 15, 15), -1)
    nose_xy = np.round(center_xy + radius * np.array([0, 0.3])).astype(int).tolist()
    cv2.circle(picture, nose_xy, max(1, round(radius * 0.12)), (190, 110, 115) if is_cat else (25, 20, 20), -1)


# ---------------------------------------------------------------------------------------------------------------------
# moving shapes

SPRITE_SIZE = 160  # px, of a shape's picture before it is scaled into a frame
SPRITE_RADIUS = 48.0
WAYPOINT_FRAMES = 12  # a shape reaches a new place every so many frames
WAYPOINT_REACH = 55.0  # px, at most: 7 px a frame where it is fastest


def draw_moving_shapes(
    rng: np.random.Generator, num_frames: int, height: int, width: int
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
    ground = _texture(rng, side + 2 * margin, _random_color(rng))
    for _ in range(int(rng.integers(5, 14))):
        radius = side * rng.uniform(0.03, 0.16)
        _paint(rng, ground, _random_shape(rng, len(ground), radius), _random_color(rng), rng.random() < 0.3)
    ground = cv2.GaussianBlur(ground.astype(np.float32), (0, 0), rng.uniform(0.4, 1.2))

    color, outline = _random_color(rng), _sprite_outline(rng)
    sprites = [_draw_sprite(rng, color, outline)]  # the target, then the others
    sprites.append(_draw_sprite(rng, color, _sprite_outline(rng)))
    sprites.append(_draw_sprite(rng, _random_color(rng), outline))
    sprites += [_draw_sprite(rng, _random_color(rng), _sprite_outline(rng)) for _ in range(int(rng.integers(0, 3)))]
    motions = [_draw_motion(rng, num_frames, alpha, height, width) for _, alpha in sprites]
    order = list(range(1, len(sprites)))  # from back to front
    order.insert(len(order) - int(rng.integers(2)), 0)  # the target in front, or behind one of the others

    pan_xy = margin + margin * np.stack([_wave(rng, num_frames, 60, 200), _wave(rng, num_frames, 60, 200)], 1)
    light = 1 + 0.12 * _wave(rng, num_frames, 30, 90)
    grain = np.float32(rng.uniform(1, 5))
    frames, boxes_xywh, cover = [], np.zeros((num_frames, 4)), np.zeros(num_frames, np.int64)
    for t in range(num_frames):
        shift = np.array([[1, 0, -pan_xy[t, 0]], [0, 1, -pan_xy[t, 1]]])
        frame = cv2.warpAffine(ground, shift, (width, height), borderMode=cv2.BORDER_REPLICATE)
        for index in order:
            colors, alpha = sprites[index]
            place = motions[index][t]  # (2, 3): sprite (x, y) -> frame (x, y)
            alpha = cv2.warpAffine(alpha, place, (width, height))[..., None]  # (H, W, 1)
            frame = frame + alpha * (cv2.warpAffine(colors, place, (width, height)) - frame)
            inside = alpha[..., 0] > 0.5
            if index == 0:
                target = seen = inside
            elif order.index(index) > order.index(0):
                seen = seen & ~inside
        xs, ys = np.flatnonzero(target.any(0)), np.flatnonzero(target.any(1))
        boxes_xywh[t] = xs[0], ys[0], xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1
        cover[t] = np.ceil(8 * seen.sum() / target.sum())
        frame = frame * light[t] + rng.standard_normal((height, width, 1), np.float32) * grain
        frames.append(np.clip(frame, 0, 255).astype(np.uint8))
    return frames, boxes_xywh, cover


def _wave(rng: np.random.Generator, num_frames: int, min_period: float, max_period: float) -> np.ndarray:
    """Draw a slow wave: float (T,) in -1..1."""
    period, phase = rng.uniform(min_period, max_period), rng.uniform(0, 2 * np.pi)
    return np.sin(2 * np.pi * np.arange(num_frames) / period + phase)


def _sprite_outline(rng: np.random.Generator) -> np.ndarray:
    """Draw an outline in the middle of a sprite, not too thin: float (K, 2) px."""
    while True:
        outline = _outline(rng, (SPRITE_SIZE / 2, SPRITE_SIZE / 2), SPRITE_RADIUS, int(rng.integers(5)))
        extent = np.ptp(outline, 0)
        if extent.min() > 0.65 * extent.max():
            return outline


def _draw_sprite(rng: np.random.Generator, color: np.ndarray, outline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw a shape with parts: colours float32 (S, S, 3), alpha float32 (S, S) in 0..1."""
    colors = _texture(rng, SPRITE_SIZE, color).astype(np.float32)
    mask = _fill(SPRITE_SIZE, outline)
    for _ in range(int(rng.integers(1, 4))):
        center = rng.normal(SPRITE_SIZE / 2, 0.35 * SPRITE_RADIUS, 2)
        part = _fill(SPRITE_SIZE, _outline(rng, center, SPRITE_RADIUS * rng.uniform(0.2, 0.5), int(rng.integers(5))))
        if (part & mask).any():
            _paint(rng, colors, part & mask, _random_color(rng), rng.random() < 0.3)
    rim = mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    colors[rim] *= rng.uniform(0.3, 1.0)
    return colors, cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.0)


def _draw_motion(
    rng: np.random.Generator, num_frames: int, alpha: np.ndarray, height: int, width: int
) -> list[np.ndarray]:
    """Draw how a sprite moves, so that it stays in the frame: for each frame float (2, 3), sprite to frame (x, y)."""
    middle = (SPRITE_SIZE - 1) / 2
    reach = np.hypot(*(np.argwhere(alpha > 0) - middle).T).max()  # px, in the sprite
    scales = rng.uniform(20, 32) / SPRITE_RADIUS * np.exp(rng.uniform(0, 0.25) * _wave(rng, num_frames, 80, 160))
    angles = rng.uniform(0, 0.3) * _wave(rng, num_frames, 40, 120)
    margin = min(reach * scales.max() + 1, min(height, width) / 2 - 1)
    low, high = np.full(2, margin), np.array([width, height]) - margin
    waypoints = [rng.uniform(low, high)]
    while len(waypoints) < num_frames // WAYPOINT_FRAMES + 2:
        waypoints.append(np.clip(waypoints[-1] + rng.uniform(-1, 1, 2) * WAYPOINT_REACH, low, high))
    places = []
    for t, (scale, angle) in enumerate(zip(scales, angles, strict=True)):
        leg, share = divmod(t / WAYPOINT_FRAMES, 1)
        share = 0.5 - 0.5 * np.cos(np.pi * share)  # slow at the waypoints
        center_xy = (1 - share) * waypoints[int(leg)] + share * waypoints[int(leg) + 1]
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        places.append(np.concatenate([turn, (center_xy - turn @ [middle, middle])[:, None]], 1))
    return places


# ---------------------------------------------------------------------------------------------------------------------
# on disk

SCENE_SIZE = 256  # px
NUM_SCENES = 16000
NUM_GLASSWARE = {"Train": 40, "Test": 16}
NUM_PETS = {"trainval": 160, "test": 40}
NUM_MOVING_SHAPES = {"train": 30, "val": 6}  # videos
NUM_MANY_MOVING_SHAPES = {"train": 400, "val": 6}  # the first of them are those above
MOVING_SHAPES_FRAMES, MOVING_SHAPES_HW = 30, (240, 320)


def write_samples(kind: str, root: str) -> Path:
    """Write a generated dataset to the repository, unless it is there already.

    Args:
        kind: "glassware" (LabPics V1 layout), "pets" (Oxford-IIIT Pet layout), "moving_shapes" (GOT-10k layout),
            "many_moving_shapes" (the same, more of them) or "scenes" (pictures and label maps).
        root: the dataset's folder below the repository.
    Returns:
        the folder's path.
    Raises:
        ValueError: for another kind, and a root that is no text.
    """
    writers = {
        "glassware": _write_glassware,
        "pets": _write_pets,
        "moving_shapes": functools.partial(_write_moving_shapes, num_videos=NUM_MOVING_SHAPES),
        "many_moving_shapes": functools.partial(_write_moving_shapes, num_videos=NUM_MANY_MOVING_SHAPES),
        "scenes": _write_scenes,
    }
    if kind not in writers:
        raise ValueError(f"data.generate is {kind!r}; must be one of {', '.join(writers)}")
    check_type(root, str, "data.root")
    folder = REPOSITORY / root
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".tmp")  # renamed when whole: a killed run leaves nothing half made
        shutil.rmtree(partial, ignore_errors=True)
        print(f"writing generated {kind} to {folder}")
        writers[kind](partial)
        partial.rename(folder)
    return folder


def _write_glassware(folder: Path) -> None:
    """Write the glassware sample: <folder>/Simple/{Train,Test}/{Image,Instance}/<name>, R vessels and B materials.

    The third training picture has no background, and the fourth no annotation.
    """
    for split, num_pictures in NUM_GLASSWARE.items():
        for part in ("Image", "Instance"):
            (folder / "Simple" / split / part).mkdir(parents=True)
        for index in range(num_pictures):
            rng = np.random.default_rng([1 if split == "Test" else 0, index])
            height, width = [(240, 320), (320, 240), (288, 288)][index % 3]
            image_rgb, vessel_ids, material_ids = draw_glassware(rng, height, width)
            if split == "Train" and index == 2:  # the glass fills the frame
                vessel_ids[vessel_ids == 0] = vessel_ids.max() if vessel_ids.max() > 0 else 16
            if split == "Train" and index == 3:
                vessel_ids[:], material_ids[:] = 0, 0
            ids_rgb = np.stack([vessel_ids, np.zeros_like(vessel_ids), material_ids], 2)
            write_image(folder / "Simple" / split / "Image" / f"Glass_{index:03d}.jpg", image_rgb)
            write_image(folder / "Simple" / split / "Instance" / f"Glass_{index:03d}.png", ids_rgb)


def _write_pets(folder: Path) -> None:
    """Write the pets: <folder>/images/<name>.jpg, annotations/trimaps/<name>.png, annotations/{list,trainval,test}.txt.

    A line of a list has the name, the number of the class, the species (1 cat, 2 dog) and the number of the breed.
    """
    annotations = folder / "annotations"
    (folder / "images").mkdir(parents=True)
    (annotations / "trimaps").mkdir(parents=True)
    lists = {"trainval": [], "test": []}
    for split, num_pictures in NUM_PETS.items():
        for index in range(num_pictures):
            is_cat = index % 2 == 0
            name = (
                f"{'Drawn_cat' if is_cat else 'drawn_dog'}_{index + (NUM_PETS['trainval'] if split == 'test' else 0)}"
            )
            height, width = [(128, 160), (160, 128), (144, 144)][index % 3]
            rng = np.random.default_rng([2 if split == "test" else 1, index])
            image_rgb, trimap = draw_pet(rng, is_cat, height, width)
            write_image(folder / "images" / f"{name}.jpg", image_rgb)
            write_image(annotations / "trimaps" / f"{name}.png", trimap)
            lists[split].append(f"{name} 1 1 1" if is_cat else f"{name} 2 2 1")
    header = ["#Image CLASS-ID SPECIES BREED ID", "#SPECIES: 1:Cat 2:Dog"]
    lists["list"] = header + sorted(lists["trainval"] + lists["test"])
    for list_name, lines in lists.items():
        (annotations / f"{list_name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_moving_shapes(folder: Path, num_videos: dict[str, int]) -> None:
    """Write the videos: <folder>/{train,val}/<name>/{00000001.jpg, ..., groundtruth.txt, *.label, meta_info.ini}."""
    with ProcessPoolExecutor() as executor:
        for split, number in num_videos.items():
            (folder / split).mkdir(parents=True)
            videos = executor.map(_write_moving_shape, [folder / split] * number, range(number))
            names = list(tqdm(videos, total=number, unit=f" {split} videos"))
            (folder / split / "list.txt").write_text("\n".join(names) + "\n", encoding="utf-8", newline="")


def _write_moving_shape(split_dir: Path, index: int) -> str:
    """Write one video and return its name.

    As in GOT-10k, boxes count from 1. In the third training video the shape is away for a while: no box, cover 0.
    """
    split, (height, width) = split_dir.name, MOVING_SHAPES_HW
    name = f"moving_shapes_{split}_{index + 1:06d}"
    rng = np.random.default_rng([4 if split == "val" else 3, index])
    frames, boxes_xywh, cover = draw_moving_shapes(rng, MOVING_SHAPES_FRAMES, height, width)
    boxes_xywh[:, :2] += 1
    is_cut = (boxes_xywh[:, :2] <= 1) | (boxes_xywh[:, :2] + boxes_xywh[:, 2:] > [width, height])
    absent = np.zeros(len(frames), bool)
    if split == "train" and index == 2:
        absent[12:18] = True
        frames[12:18] = [cv2.GaussianBlur(frame, (0, 0), 25) for frame in frames[12:18]]
        boxes_xywh[absent], cover[absent] = -1, 0
    labels = {"cover": cover, "absence": absent, "cut_by_image": is_cut.any(1)}
    texts = {f"{label}.label": "".join(f"{value:d}\n" for value in values) for label, values in labels.items()}
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


def _write_scenes(folder: Path) -> None:
    """Write the scenes: <folder>/images/<number>.jpg and <folder>/labels/<number>.png."""
    read_photographs()  # once, before the processes start, which take them over
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    with ProcessPoolExecutor() as executor:
        chunks = executor.map(_write_scene, [folder] * NUM_SCENES, range(NUM_SCENES), chunksize=50)
        for _ in tqdm(chunks, total=NUM_SCENES, unit=" scenes"):
            pass


PHOTOGRAPHS = (
    "astronaut.png brick.png camera.png chelsea.png coffee.png grass.png gravel.png ihc.png moon.png "
    "motorcycle_left.png retina.jpg rocket.jpg"
).split()


@functools.cache
def read_photographs() -> list[np.ndarray]:
    """Read the photographs that come with scikit-image, for textures: uint8 (H, W, 3) each.

    Raises:
        ValueError: where scikit-image is not installed.
    """
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise ValueError("generated scenes have textures from scikit-image's photographs: pip install scikit-image")
    return [read_image(Path(package.origin).parent / "data" / name) for name in PHOTOGRAPHS]


def _write_scene(folder: Path, index: int) -> None:
    image_rgb, ids = draw_scene(np.random.default_rng([0, index]), SCENE_SIZE, read_photographs())
    write_image(folder / "images" / f"{index:05d}.jpg", image_rgb)
    write_label_map(folder / "labels" / f"{index:05d}.png", ids)
