"""Generated cats and dogs, in the layout of Oxford-IIIT Pet: the default dataset of train_unet.py."""

from pathlib import Path

import cv2
import numpy as np

from utils.images import write_image
from utils.samples import drawing
from utils.samples.drawing import random_hue, smooth_noise

FUR_COLORS = np.float32(
    [[48, 44, 42], [226, 220, 212], [132, 132, 136], [200, 126, 62], [118, 78, 48], [222, 190, 150]]
)

NUM_PETS = {"trainval": 160, "test": 40}


def draw_pet(rng: np.random.Generator, is_cat: bool, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a cat or a dog, standing, sitting or close up, among objects that are none.

    Args:
        rng: the picture's own generator.
        is_cat: pointed ears and a thin tail, or hanging ears, a snout and a thick tail.
    Returns:
        image_rgb uint8 (H, W, 3); trimap uint8 (H, W): 1 pet, 2 background, 3 the border between them.
    """
    size = max(height, width)
    picture, _ = drawing.draw_ground(rng, (height, width), random_hue, (0.5, 0.9))
    for _ in range(int(rng.integers(0, 5))):
        _draw_object(rng, picture, size)

    body, head = _pet_outlines(rng, is_cat, height, width)
    pet = np.zeros((height, width), bool)
    fur, shades = _fur(rng, size)[:height, :width], rng.uniform(0.75, 1.1, len(body) + len(head))
    for (points, thickness), shade in zip(body + head, shades, strict=True):
        part = drawing.draw_points((height, width), points, thickness, closed=False)
        pet |= part
        picture[part] = fur[part] * shade
    _draw_face(rng, picture, head[0][0], is_cat)
    if rng.random() < 0.2:
        pet &= ~_draw_object(rng, picture, size)  # in front of the pet

    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    trimap = np.full((height, width), 2, np.uint8)
    trimap[cv2.dilate(pet.astype(np.uint8), disc) > 0] = 3
    trimap[cv2.erode(pet.astype(np.uint8), disc) > 0] = 1
    return drawing.finish_soft(rng, picture, 0.9), trimap


def _draw_object(rng: np.random.Generator, picture: np.ndarray, size: int) -> np.ndarray:
    """Draw a shape that is no pet, in place; return its mask, bool (H, W)."""
    height, width = picture.shape[:2]
    radius = size * rng.uniform(0.04, 0.16)
    mask = drawing.fill_random_outline(rng, size, rng.uniform(0, size, 2), radius, int(rng.integers(5)))
    mask = mask[:height, :width]
    if mask.any():
        drawing.paint_shape(rng, picture, mask, random_hue(rng), rng.random() < 0.4)
    return mask


def _fur(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw fur, plain, striped or in patches: float32 (size, size, 3)."""
    color, other = FUR_COLORS[rng.choice(len(FUR_COLORS), 2, replace=False)] + rng.normal(0, 8, (2, 3))
    kind = rng.integers(3)
    if kind == 0:
        weight = 0.15 * smooth_noise(rng, size, 12)
    elif kind == 1:
        ramp = np.arange(size, dtype=np.float32)
        phase = ramp[None] + 0.4 * ramp[:, None] + 20 * smooth_noise(rng, size, 8)
        weight = 0.35 * (np.sin(phase * np.float32(2 * np.pi / rng.uniform(6, 12))) > 0.3)
    else:
        weight = (smooth_noise(rng, size, int(rng.integers(4, 8))) > 0.55).astype(np.float32)
    grain = 1 + 0.25 * (smooth_noise(rng, size, size // 2) - 0.5)
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
        places = [np.round(points @ rotation.T * mirror * unit_px + center_xy).astype(np.int32) for points, _ in parts]
        return [(points, int(np.ceil(part[1] * unit_px))) for points, part in zip(places, parts, strict=True)]

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


def write_pets(folder: Path) -> None:
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
            number = index + (NUM_PETS["trainval"] if split == "test" else 0)
            name = f"{'Drawn_cat' if is_cat else 'drawn_dog'}_{number}"
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
