"""Generated pictures of objects with names, such as "red circle", in COCO's layout: what masks from words learn from.

Each picture has several objects, of which two share a colour and two a shape, so that both words count. HELD_OUT
combinations are in the test pictures alone.
"""

import json
from pathlib import Path

import cv2
import numpy as np

from utils.images import write_image
from utils.instances.codecs import mask_to_rle
from utils.samples.drawing import draw_points, draw_texture, finish_soft

COLORS = {"red": 0, "yellow": 54, "green": 120, "blue": 225}  # hues, degrees
SHAPES = ("circle", "square", "triangle", "star")
ALL_NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
HELD_OUT = [f"{color} {shape}" for color, shape in zip(COLORS, SHAPES, strict=True)]  # each colour, each shape
NUM_PICTURES = {"train": 400, "val": 40, "test": 80}
PICTURE_SIDE = 512  # px
AREAS_PX = 10_500, 18_000  # above 100**2, the least of the Segment Anything paper's training with words
NUM_OBJECTS = 3, 4


def shape_outline(shape: str) -> np.ndarray:
    """Give the outline of a shape of area 1 around (0, 0): float (K, 2) points (x, y)."""
    num_corners = {"circle": 64, "square": 4, "triangle": 3, "star": 10}[shape]
    angles = np.arange(num_corners) * 2 * np.pi / num_corners
    points = np.stack([np.cos(angles), np.sin(angles)], 1)
    if shape == "star":
        points[1::2] *= 0.42
    area = 0.5 * abs(np.sum(points[:, 0] * np.roll(points[:, 1], -1) - points[:, 1] * np.roll(points[:, 0], -1)))
    return points / area**0.5


def choose_names(rng: np.random.Generator, split: str) -> list[str]:
    """Choose the names of a picture's objects, all different: the second shares the first's colour, the third its
    shape; in the test pictures the first is of HELD_OUT.
    """
    allowed = [name for name in ALL_NAMES if split == "test" or name not in HELD_OUT]
    first = str(rng.choice(HELD_OUT if split == "test" else allowed))
    color, shape = first.split()
    others = [str(name) for name in rng.permutation([name for name in allowed if name != first])]
    same_color = next(name for name in others if name.startswith(color))
    same_shape = next(name for name in others if name.endswith(shape))
    names = list(dict.fromkeys([first, same_color, same_shape, *others]))
    return names[: int(rng.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1))]


def draw_named_shapes(rng: np.random.Generator, names: list[str], side: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw an object of each name, apart from one another, on a greyish ground.

    Args:
        rng: the picture's own generator.
        side: of the picture, pixels; AREAS_PX are those of 512.
    Returns:
        image_rgb uint8 (side, side, 3); masks, bool (side, side) of each object.
    """
    ground = rng.uniform(60, 200) + rng.uniform(-12, 12, 3)
    picture = draw_texture(rng, side, ground.astype(np.float32))
    picture = picture.mean(2, keepdims=True) + 0.2 * (picture - picture.mean(2, keepdims=True))
    masks, taken = [], np.zeros((side, side), bool)
    for name in names:
        color, shape = name.split()
        mask = _place(rng, shape, taken)
        taken |= cv2.dilate(mask.view(np.uint8), np.ones((9, 9), np.uint8)).view(bool)
        hsv = np.float32([[[COLORS[color] + rng.uniform(-7, 7), rng.uniform(0.65, 1.0), rng.uniform(0.6, 1.0)]]])
        hsv[..., 0] %= 360
        paint = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]
        ramp_xy = rng.normal(0, 0.12, 2)
        grid = np.linspace(-1, 1, side)
        shade = np.clip(1 + ramp_xy[0] * grid[None] + ramp_xy[1] * grid[:, None], 0.6, 1.2)
        picture[mask] = (paint * shade[..., None])[mask]
        masks.append(mask)
    return finish_soft(rng, picture, 1.5), masks


def _place(rng: np.random.Generator, shape: str, taken: np.ndarray) -> np.ndarray:
    """Draw a shape, turned and somewhere free: bool, the size of `taken`. It shrinks where there is little room."""
    side = len(taken)
    area = rng.uniform(*AREAS_PX) * (side / 512) ** 2
    for attempt in range(10_000):
        angle = rng.uniform(0, 2 * np.pi)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = shape_outline(shape) @ rotation * (area * 0.97 ** (attempt // 100)) ** 0.5
        points = points - points.min(0)
        room = side - 1 - points.max(0)
        points = points + rng.uniform(0, 1, 2) * room
        mask = draw_points(taken.shape, points)
        if (room > 0).all() and not (mask & taken).any():
            return mask
    raise AssertionError(f"no room for a {shape}")


def write_named_shapes(folder: Path) -> None:
    """Write <folder>/{train,val,test}/<number>.jpg and annotations/instances_{train,val,test}.json."""
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": 1 + number, "name": name} for number, name in enumerate(ALL_NAMES)]
    for split_number, (split, num_pictures) in enumerate(NUM_PICTURES.items()):
        (folder / split).mkdir()
        images, annotations = [], []
        for index in range(num_pictures):
            rng = np.random.default_rng([split_number, index])
            names = choose_names(rng, split)
            image_rgb, masks = draw_named_shapes(rng, names, PICTURE_SIDE)
            write_image(folder / split / f"{index:04d}.jpg", image_rgb)
            images.append(
                {"id": index + 1, "file_name": f"{index:04d}.jpg", "height": PICTURE_SIDE, "width": PICTURE_SIDE}
            )
            for name, mask in zip(names, masks, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": index + 1, "iscrowd": 0, "area": int(mask.sum()),
                        "category_id": 1 + ALL_NAMES.index(name), "segmentation": mask_to_rle(mask),
                    }
                )  # fmt: skip
        record = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(record))
