"""Textures, outlines and shapes that the generated datasets are drawn with."""

from collections.abc import Callable

import cv2
import numpy as np


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Draw smooth noise: float32 (size, size), about 0..1, with `cells` bumps along a side."""
    coarse = rng.random((cells, cells), np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def random_color(rng: np.random.Generator) -> np.ndarray:
    """Draw an RGB colour, float32 (3,) in 0..255; one in three is nearly grey."""
    color = rng.uniform(0, 255, 3)
    if rng.random() < 0.35:
        color = color.mean() + rng.uniform(-12, 12, 3)
    return color.astype(np.float32)


def photograph_texture(
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


def draw_texture(
    rng: np.random.Generator, size: int, color: np.ndarray, photographs: list[np.ndarray] | tuple = ()
) -> np.ndarray:
    """Draw a texture around a colour: float32 (size, size, 3) in about 0..255, now and then cut from a photograph."""
    if photographs and rng.random() < 0.35:
        return photograph_texture(rng, size, color, photographs)
    other = np.clip(color + rng.normal(0, 1, 3) * rng.choice([10, 30, 70]), 0, 255).astype(np.float32)
    kind = rng.integers(6)
    if kind == 0:  # flat
        weight = np.zeros((size, size), np.float32)
    elif kind == 1:  # gradient
        angle = rng.uniform(0, 2 * np.pi)
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        weight = np.cos(angle) * ramp[None] + np.sin(angle) * ramp[:, None] + 0.5
    elif kind == 2:  # clouds
        weight = 0.6 * smooth_noise(rng, size, int(rng.integers(3, 8)))
        weight += 0.4 * smooth_noise(rng, size, int(rng.integers(10, 40)))
    elif kind == 3:  # stripes, bent a little
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 40) * size / 256
        ramp = np.arange(size, dtype=np.float32)
        phase = np.cos(angle) * ramp[None] + np.sin(angle) * ramp[:, None]
        phase = phase + rng.choice([0, 15]) * smooth_noise(rng, size, 5)
        weight = 0.5 + 0.5 * np.sin(phase * np.float32(2 * np.pi / period))
        if rng.random() < 0.5:
            weight = (weight > 0.5).astype(np.float32)
    elif kind == 4:  # spots
        weight = (smooth_noise(rng, size, int(rng.integers(12, 60))) > rng.uniform(0.4, 0.75)).astype(np.float32)
    else:  # grain
        weight = rng.random((size, size), np.float32)
        if rng.random() < 0.5:
            weight = cv2.blur(weight, (3, 3))
    return color + weight[..., None] * (other - color)


def random_outline(rng: np.random.Generator, center_xy: tuple[float, float], radius: float, kind: int) -> np.ndarray:
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


def draw_points(hw: tuple[int, int], points: np.ndarray, thickness: int = 0, closed: bool = True) -> np.ndarray:
    """Draw a line through points (K, 2) (x, y) px, or fill their outline, with thickness 0: bool (H, W)."""
    mask = np.zeros(hw, np.uint8)
    points = [np.round(points).astype(np.int32)]
    if thickness == 0:
        cv2.fillPoly(mask, points, 1)
    else:
        cv2.polylines(mask, points, closed, 1, thickness)
    return mask.astype(bool)


def fill_random_outline(
    rng: np.random.Generator, size: int, center_xy: tuple[float, float], radius: float, kind: int
) -> np.ndarray:
    """Draw one shape, filled: bool (size, size). Kinds: as `random_outline`."""
    return draw_points((size, size), random_outline(rng, center_xy, radius, kind))


def find_rim(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask, bool (H, W), beside one that is not in it; the frame's edge is no rim."""
    return mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)


def random_shape(rng: np.random.Generator, size: int, radius: float) -> np.ndarray:
    """Draw one filled shape or thin stroke somewhere in the frame: bool (size, size)."""
    center = rng.uniform(0.02 * size, 0.98 * size, 2)
    kind = int(rng.choice(8, p=[0.2, 0.26, 0.12, 0.14, 0.06, 0.08, 0.08, 0.06]))
    if kind < 5:
        return fill_random_outline(rng, size, center, radius, kind)
    thickness = max(2, int(round(radius * rng.uniform(0.08, 0.3))))
    if kind == 5:  # bent stroke
        steps = np.cumsum(rng.normal(0, 0.45, (12, 1)), 0) + rng.uniform(0, 2 * np.pi)
        path = np.cumsum(np.concatenate([np.cos(steps), np.sin(steps)], 1) * radius * 0.4, 0)
        return draw_points((size, size), path - path.mean(0) + center, thickness, closed=False)
    if kind == 6:  # ring
        return draw_points((size, size), random_outline(rng, center, radius, int(rng.integers(2))), thickness)
    mask = np.zeros((size, size), bool)
    for _ in range(2):  # two shapes grown together
        shifted = center + rng.normal(0, 0.6, 2) * radius
        mask |= fill_random_outline(rng, size, shifted, radius * 0.7, int(rng.integers(4)))
    return mask


def paint_shape(
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
    texture = draw_texture(rng, side, color, photographs)[:height, :width]
    if rng.random() < 0.25:  # round: darker towards its rim
        depth = cv2.distanceTransform(np.pad(inside.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
        roundness = np.sqrt(np.clip(depth / (rng.uniform(0.5, 1.0) * depth.max()), 0, 1))
        texture = texture * (1 - rng.uniform(0.2, 0.7) * (1 - roundness))[..., None]
    ramp_xy = rng.normal(0, 0.25, 2)
    shade = 1 + ramp_xy[0] * np.linspace(-1, 1, width)[None] + ramp_xy[1] * np.linspace(-1, 1, height)[:, None]
    texture = texture * shade[..., None].astype(np.float32)
    picture[window][inside] = texture[inside]
    if edge:
        rim = find_rim(np.pad(inside, 1))[1:-1, 1:-1]
        picture[window][rim] = picture[window][rim] * rng.uniform(0.2, 1.6) + rng.uniform(-30, 60)


def finish_picture(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Give a float picture a camera: blur, uneven light, grain, sometimes grey. Returns uint8 of the same shape."""
    size = picture.shape[0]
    if rng.random() < 0.7:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 1.4))
    if rng.random() < 0.4:
        light = 1 + rng.uniform(0.1, 0.6) * (smooth_noise(rng, size, 3) - 0.5)
        picture = picture * light[..., None]
    if rng.random() < 0.2:
        picture = np.repeat(picture.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.6:
        picture = picture + rng.standard_normal((size, size, 1), np.float32) * np.float32(rng.uniform(1, 14))
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_ground(
    rng: np.random.Generator, hw: tuple[int, int], choose_color: Callable, edge_range: tuple[float, float]
) -> tuple[np.ndarray, int]:
    """Draw a wall and, in front of it, a table or a floor, a texture each.

    Args:
        choose_color: rng -> colour float32 (3,) in 0..255.
        edge_range: where the edge between them may lie, as shares of the height.
    Returns:
        float32 (H, W, 3) in about 0..255; the first row below the edge.
    """
    height, width = hw
    picture = draw_texture(rng, max(hw), choose_color(rng))[:height, :width].copy()
    edge_y = int(height * rng.uniform(*edge_range))
    picture[edge_y:] = draw_texture(rng, max(hw), choose_color(rng))[: height - edge_y, :width]
    return picture, edge_y


def finish_soft(rng: np.random.Generator, picture: np.ndarray, most_blur: float) -> np.ndarray:
    """Give a float picture (H, W, 3) a good camera: slight blur and grain. Returns uint8 of the same shape."""
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, most_blur))
    picture = picture + rng.standard_normal((*picture.shape[:2], 1), np.float32) * np.float32(rng.uniform(1, 6))
    return np.clip(picture, 0, 255).astype(np.uint8)


def random_hue(rng: np.random.Generator) -> np.ndarray:
    """Draw a colour that no fur has, from green over blue to pink: float32 (3,) RGB."""
    hsv = np.float32([[[rng.uniform(90, 320), rng.uniform(0.25, 0.7), rng.uniform(0.35, 0.95)]]])
    return 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]
