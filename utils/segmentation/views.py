"""Views of a picture and its class map for training: cut out, brought to the network's size, varied alike."""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from utils.images import IGNORE_INDEX
from utils.segmentation.unet import check_paper_sides
from utils.settings import FINITE, Rule, at_least, between, one_of

RANGE = Rule(lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf, "[lowest, highest], above 0, finite")


@dataclass(frozen=True)
class Framing:
    """How a picture is brought before the network, in training and prediction (in `data:`)."""

    image_size: int | list[int]  # px, S or [height, width]: the network's input in training
    # resize: the whole picture is brought to image_size; crop: it keeps its resolution
    fit: Annotated[str, one_of("resize", "crop")]

    @property
    def input_hw(self) -> tuple[int, int]:
        return side_hw(self.image_size)


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are varied, together with their class maps (in `data:`)."""

    scale: Annotated[list[float], RANGE]  # the window's side, as a share of the picture (resize) or image_size (crop)
    hflip: bool
    vflip: bool
    rotation: Annotated[float, between(0, 180)]  # degrees
    color_jitter: Annotated[float, between(0, 1)]
    elastic_px: Annotated[float, at_least(0), FINITE]
    rare_crops: Annotated[float, between(0, 1)] = 0.0


def side_hw(size: int | list[int]) -> tuple[int, int]:
    """Turn S or [height, width] into (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_size(name: str, size: int | list[int], margin: int) -> None:
    """Raise a ValueError for a size that no network, or not the unpadded one (margin above 0), can take."""
    if not isinstance(size, int) and len(size) != 2 or min(side_hw(size)) < 1:
        raise ValueError(f"{name} is {size}; must be a number of pixels, or [height, width]")
    if margin > 0:
        check_paper_sides(name, size, side_hw(size))


def mirrored_index(start: int, length: int, size: int) -> np.ndarray:
    """List the pixels at start, start + 1, ... of an axis of `size` pixels, mirrored at both ends: int64 (length,)."""
    period = max(1, 2 * (size - 1))  # 0 1 2 3 2 1 | 0 1 2 3 2 1: the outermost pixel is not repeated
    index = np.arange(start, start + length) % period
    return np.minimum(index, period - index) if size > 1 else index


def elastic_displacement(vectors_px: np.ndarray, hw: tuple[int, int]) -> torch.Tensor:
    """Interpolate displacement vectors on a coarse grid to every pixel, bicubically.

    Args:
        vectors_px: float (2, rows, columns): x and y displacements; the grid's corners are the image's.
    Returns:
        float32 (2, H, W), px.
    Source: Ronneberger et al. 2015, section 3.1: 3 x 3 vectors, standard deviation 10 px.
    """
    vectors = torch.from_numpy(vectors_px).float()[None]
    return torch.nn.functional.interpolate(vectors, size=hw, mode="bicubic", align_corners=True)[0]


def draw_pixel(class_map: np.ndarray, rng: np.random.Generator) -> tuple[int, int] | None:
    """Draw a pixel (y, x) of a class that is drawn from those in the picture, large or small; None if none counts."""
    classes = np.unique(class_map[class_map != IGNORE_INDEX])
    if not len(classes):
        return None
    pixels = np.flatnonzero(class_map == rng.choice(classes))
    y, x = np.unravel_index(int(rng.choice(pixels)), class_map.shape)
    return int(y), int(x)


def training_view(
    image: np.ndarray,
    class_map: np.ndarray,
    framing: Framing,
    augmentation: Augmentation,
    margin: int,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a window out of a picture and its class map, bring it to the network's size, and vary both alike.

    The window holds the pixels whose class is predicted. An unpadded network sees `margin` px more on each side; turned
    or deformed pictures need some more. What lies outside the picture is mirrored. Images are resized with
    antialiasing, class maps to the nearest pixel.

    Args:
        image: uint8 (H, W, channels).
        class_map: uint8 (H, W).
        margin: px of the network's input that its output lacks on each side; 0 for a padded network.
        rng: of this sample alone.
    Returns:
        image uint8 (channels, h, w), h and w of framing; target uint8 (h - 2 margin, w - 2 margin).
    """
    out_hw = [side - 2 * margin for side in framing.input_hw]
    scale = rng.uniform(*augmentation.scale)
    angle = math.radians(augmentation.rotation * rng.uniform(-1, 1))
    vectors_px = augmentation.elastic_px * rng.standard_normal((2, 3, 3))

    # how far beyond the input the turned and deformed picture reaches, px of the input; bicubic interpolation can
    # overshoot its nodes, by less than their size again
    height, width = framing.input_hw
    sin, cos = abs(math.sin(angle)), abs(math.cos(angle))
    reach = max(height * cos + width * sin - height, width * cos + height * sin - width, 0) / 2
    reach = math.ceil(reach + 2 * np.abs(vectors_px).max())

    inside = None  # a pixel that the window holds
    if augmentation.rare_crops > 0 and rng.random() < augmentation.rare_crops:
        inside = draw_pixel(class_map, rng)
    cuts, grown_hw = [], []  # for each axis: the picture's pixels, and how many pixels they become
    for axis in (0, 1):
        size = image.shape[axis]
        window = max(1, round(scale * (size if framing.fit == "resize" else out_hw[axis])))
        first, last = sorted((0, size - window))
        if inside is not None:
            first, last = max(first, inside[axis] - window + 1), min(last, inside[axis])
        start = int(rng.integers(first, last + 1))
        border = round((margin + reach) * window / out_hw[axis])
        cuts.append(mirrored_index(start - border, window + 2 * border, size))
        grown_hw.append(out_hw[axis] + 2 * (margin + reach))
    rows, columns = cuts[0][:, None], cuts[1][None]
    picture = tv_tensors.Image(torch.from_numpy(image[rows, columns]).permute(2, 0, 1))  # (channels, h', w')
    classes = torch.from_numpy(class_map[rows, columns])[None]  # (1, h', w')
    picture = transforms.resize(picture, grown_hw, antialias=True)
    classes = transforms.resize_image(classes, grown_hw, interpolation=InterpolationMode.NEAREST_EXACT)
    classes = tv_tensors.Mask(classes)  # from here on a transform knows not to mix classes

    if reach > 0:
        # one displacement for turning and deforming, so that the picture is interpolated once
        grown_h, grown_w = grown_hw
        y = torch.arange(grown_h).float()[:, None] - (grown_h - 1) / 2
        x = torch.arange(grown_w).float()[None] - (grown_w - 1) / 2
        displacement = elastic_displacement(vectors_px, (grown_h, grown_w))  # (2, h, w): x, y
        displacement[0] += math.cos(angle) * x - math.sin(angle) * y - x
        displacement[1] += math.sin(angle) * x + math.cos(angle) * y - y
        displacement = (displacement * 2 / torch.tensor([grown_w, grown_h])[:, None, None]).permute(1, 2, 0)[None]
        picture = transforms.elastic(picture, displacement)
        classes = transforms.elastic(classes, displacement, fill=IGNORE_INDEX)
        picture, classes = [view[..., reach : grown_h - reach, reach : grown_w - reach] for view in (picture, classes)]
    flips = (augmentation.hflip, transforms.horizontal_flip), (augmentation.vflip, transforms.vertical_flip)
    for is_used, flip in flips:
        if rng.random() < 0.5 and is_used:
            picture, classes = flip(picture), flip(classes)
    for adjust in (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation):
        factor = 1 + augmentation.color_jitter * rng.uniform(-1, 1)
        if augmentation.color_jitter > 0:
            picture = adjust(picture, factor)
    target = classes[0, margin : height - margin, margin : width - margin]
    return picture.as_subclass(torch.Tensor).contiguous(), target.as_subclass(torch.Tensor).contiguous()
