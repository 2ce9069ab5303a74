"""Generated scenes that `sam2_nano` is pre-trained on: textured shapes that cover one another, parts on parts, crowds
of small blobs, thin strokes, regions that fill the frame. Every picture is a function of its index alone.
"""

import functools
import importlib.util
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.images import read_image, write_image, write_label_map
from utils.samples import drawing
from utils.samples.drawing import paint_shape, random_color, smooth_noise

SCENE_SIZE = 256  # px

NUM_SCENES = 16000


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
        return drawing.finish_picture(rng, picture), ids
    if kind == "regions":
        picture, ids = _draw_regions(rng, size, photographs)
    else:
        picture, ids = drawing.draw_texture(rng, size, random_color(rng), photographs), np.zeros((size, size), np.int32)
    next_id = int(ids.max()) + 1
    num_objects = int(rng.integers(*{"objects": (2, 9), "clutter": (8, 28), "regions": (0, 5)}[kind]))
    low, high = (0.025, 0.13) if kind == "clutter" else (0.08, 0.34)
    for _ in range(num_objects):
        radius = size * np.exp(rng.uniform(np.log(low), np.log(high)))
        mask = drawing.random_shape(rng, size, radius)
        if not mask.any():
            continue
        color = random_color(rng)
        if rng.random() < 0.3:
            _cast_shadow(rng, picture, mask, radius)
        paint_shape(rng, picture, mask, color, rng.random() < 0.3, photographs)
        ids[mask] = next_id
        next_id += 1
        if rng.random() < 0.25:  # a part: a smaller shape that lies on the object, an instance of its own
            y, x = np.argwhere(mask)[rng.integers(mask.sum())]
            part_radius = radius * rng.uniform(0.25, 0.6)
            part = mask & drawing.fill_random_outline(rng, size, (x, y), part_radius, int(rng.integers(4)))
            if part.sum() > 12:
                paint_shape(rng, picture, part, random_color(rng), rng.random() < 0.3, photographs)
                ids[part] = next_id
                next_id += 1
    return drawing.finish_picture(rng, picture), ids


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
    xs = grid[None] + bend * (smooth_noise(rng, size, int(rng.integers(3, 9))) - 0.5)
    ys = grid[:, None] + bend * (smooth_noise(rng, size, int(rng.integers(3, 9))) - 0.5)
    seeds_xy = rng.uniform(0, size, (num_regions, 2))
    reach = rng.uniform(0, 0.25 * size, num_regions)  # some regions claim more of the frame than others
    distances = [
        np.hypot((xs - x) * stretch_xy[0], (ys - y) * stretch_xy[1]) - extra
        for (x, y), extra in zip(seeds_xy, reach, strict=True)
    ]
    region_ids = np.argmin(distances, 0) + 1
    picture, ids = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.int32)
    for region in np.unique(region_ids):
        paint_shape(rng, picture, region_ids == region, random_color(rng), rng.random() < 0.15, photographs)
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
    picture += (rng.uniform(0, 25) * (smooth_noise(rng, size, int(rng.integers(3, 12))) - 0.5))[..., None]
    ids = np.zeros((size, size), np.int32)
    radius = size * np.exp(rng.uniform(np.log(0.014), np.log(0.075)))  # the family's mean
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
        mask = drawing.fill_random_outline(rng, size, center, own_radius, int(rng.choice(kinds)))
        area = mask.sum()
        if area < 8 or (mask & (ids > 0)).sum() > overlap_allowed * area:
            continue
        color = np.clip(ground + contrast * tint * np.exp(rng.normal(0, spread)), 0, 255)
        ys, xs = np.nonzero(mask)
        level = np.ones(len(ys), np.float32)
        if texture_gain > 0:
            level += texture_gain * (smooth_noise(rng, 32, 6)[ys % 32, xs % 32] - 0.5)
        distance = np.hypot(xs - center[0], ys - center[1]) / (2 * own_radius)
        level -= rng.choice([0, 0.35]) * distance.astype(np.float32)  # some fade towards their rim
        picture[ys, xs] = ground + (color - ground) * level[:, None]
        if outlined:
            picture[drawing.find_rim(mask)] *= 0.6
        ids[mask] = index
    return picture.astype(np.float32), ids


def write_scenes(folder: Path) -> None:
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
        raise ValueError("some textures are cut from scikit-image's photographs: pip install scikit-image")
    return [read_image(Path(package.origin).parent / "data" / name) for name in PHOTOGRAPHS]


def _write_scene(folder: Path, index: int) -> None:
    image_rgb, ids = draw_scene(np.random.default_rng([0, index]), SCENE_SIZE, read_photographs())
    write_image(folder / "images" / f"{index:05d}.jpg", image_rgb)
    write_label_map(folder / "labels" / f"{index:05d}.png", ids)
