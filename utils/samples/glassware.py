"""Generated vessels with materials inside, in the layout of LabPics V1: the default dataset of train_sam2.py."""

from pathlib import Path

import cv2
import numpy as np

from utils.images import write_image
from utils.samples.drawing import draw_ground, draw_points, draw_texture, finish_soft, random_color

NUM_GLASSWARE = {"Train": 40, "Test": 16}


def draw_glassware(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw vessels of glass on a table, most with one or two materials inside.

    Args:
        rng: the picture's own generator.
    Returns:
        image_rgb uint8 (H, W, 3); vessel_ids and material_ids uint8 (H, W): 0 is none, ids start above 15. A vessel's
        ids cover its materials too, as in LabPics.
    """
    picture, table_y = draw_ground(rng, (height, width), random_color, (0.6, 0.85))
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
        mask = draw_points((height, width), outline)
        vessel = mask & (vessel_ids == 0)
        if vessel.sum() < 100:
            continue
        vessel_ids[vessel] = ids[2 * index]
        wall_px = max(1, max(height, width) // 128)
        inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=wall_px).astype(bool) & vessel
        _draw_materials(rng, picture, material_ids, inner, bottom_y, tall, ids[20 + 3 * index : 23 + 3 * index])
        _draw_glass(rng, picture, vessel, outline)
    return finish_soft(rng, picture, 1.0), vessel_ids, material_ids


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
        color = random_color(rng)
        opacity = rng.uniform(0.55, 1.0)
        if rng.random() < 0.3:  # powder
            painted, opacity = draw_texture(rng, max(inner.shape), color)[: inner.shape[0], : inner.shape[1]], 1.0
        else:
            painted = np.broadcast_to(color, picture.shape)
        picture[material] = (1 - opacity) * picture[material] + opacity * painted[material]
        material_ids[material] = material_id
        level = top


def _draw_glass(rng: np.random.Generator, picture: np.ndarray, vessel: np.ndarray, outline: np.ndarray) -> None:
    """Lay glass over a vessel, in place: a faint tint, rims that catch light, a highlight along one side."""
    tint, strength = rng.uniform(170, 255), rng.uniform(0.06, 0.2)
    picture[vessel] = (1 - strength) * picture[vessel] + strength * tint
    on_rim = draw_points(vessel.shape, outline, max(1, vessel.shape[0] // 120)) & vessel
    picture[on_rim] = 0.4 * picture[on_rim] + 0.6 * rng.choice([30, 120, 245])
    shifted = 0.72 * (outline[2:20] - outline.mean(0)) + outline.mean(0)
    highlight = draw_points(vessel.shape, shifted, max(1, vessel.shape[0] // 90), closed=False) & vessel
    picture[highlight] = picture[highlight] * 0.5 + 125


def write_glassware(folder: Path) -> None:
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
