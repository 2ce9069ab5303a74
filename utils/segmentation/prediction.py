"""Predict pictures of any size, whole or in tiles."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

from utils.run import autocast
from utils.segmentation.model_summary import summarize
from utils.segmentation.unet import nearest_paper_input_sizes, paper_input_size
from utils.segmentation.views import Framing, check_size, mirrored_index, side_hw
from utils.settings import at_least


@dataclass(frozen=True)
class TileSettings:
    """How pictures that do not fit in memory are predicted (`tiles:`)."""

    size: int | list[int] | str  # px, S, [height, width] or auto
    overlap: Annotated[int, at_least(0)]  # px


def check_tiles(tiles: TileSettings, margin: int) -> None:
    """Raise a ValueError for tiles that cannot cover a picture."""
    smallest = paper_input_size(20) if margin > 0 else tiles.overlap + 1
    if tiles.size == "auto":
        return
    if isinstance(tiles.size, str):
        raise ValueError(f"tiles.size is {tiles.size}; must be auto, a number of pixels, or [height, width]")
    check_size("tiles.size", tiles.size, margin)
    if min(side_hw(tiles.size)) < smallest:
        raise ValueError(f"tiles.size is {tiles.size}; must be at least {smallest}, so that tiles advance")


def plan_tiles(size: int, tile: int, margin: int, overlap: int) -> tuple[list[int], int, torch.Tensor]:
    """Divide an axis of a picture into tiles.

    Args:
        size: px of the picture along this axis.
        tile: most px of a network's input.
        margin: px of the input that the output lacks on each side; then only sizes 16 k + 60 will do.
        overlap: px that the outputs of neighbouring tiles share; a network without padding needs the least there is.
    Returns:
        where each tile's output starts, px of the picture (less than 0: in the mirrored border); px of a tile's input;
        weight of each pixel of a tile's output, float32.
    """
    if margin == 0:
        if size <= tile:
            return [0], size, torch.ones(size)
        step = tile - overlap
        edge = torch.arange(tile).float()
        ramp = torch.minimum(edge, edge.flip(0)) + 1  # px from the tile's edge
        return list(range(-(overlap // 2), size - overlap // 2, step)), tile, (ramp / (overlap + 1)).clamp(max=1)
    tile = min(tile, paper_input_size(size))
    output = tile - 2 * margin
    step = output // 16 * 16  # moved by a multiple of 16 (four poolings), an unpadded network gives the same logits
    return list(range(0, max(1, size - output + step), step)), tile, torch.ones(output)


def predict_tiled(
    model: torch.nn.Module, image: torch.Tensor, margin: int, tile_hw: tuple[int, int], overlap: int
) -> torch.Tensor:
    """Predict a picture of any size, in tiles where it is larger than one, with mirrored borders.

    The tiles of an unpadded network are seamless: each logit is that of the whole picture. A padded network sees zeros
    beyond a tile's edge, so the logits of neighbouring tiles are blended over `overlap` px; a picture that fits in one
    tile is predicted as it is.

    Args:
        image: float (channels, H, W), 0..1, on the model's device.
        margin: px of the network's input that its output lacks on each side; 0 for a padded network.
        tile_hw: largest input of the network, px.
        overlap: px; of no use where margin is above 0.
    Returns:
        float32 logits (num_classes, H, W).
    Source: Ronneberger et al. 2015, figure 2 (overlap-tile strategy).
    """
    height, width = image.shape[1:]
    tops, tile_h, weight_y = plan_tiles(height, tile_hw[0], margin, overlap)
    lefts, tile_w, weight_x = plan_tiles(width, tile_hw[1], margin, overlap)
    weight = (weight_y[:, None] * weight_x[None]).to(image.device)  # (h', w') of a tile's output
    logits_sum, weight_sum = None, torch.zeros((height, width), device=image.device)
    for top in tops:
        rows = torch.from_numpy(mirrored_index(top - margin, tile_h, height)).to(image.device)
        for left in lefts:
            columns = torch.from_numpy(mirrored_index(left - margin, tile_w, width)).to(image.device)
            tile_logits = model(image[:, rows[:, None], columns[None]][None])[0].float()  # (num_classes, h', w')
            if logits_sum is None:
                logits_sum = torch.zeros((len(tile_logits), height, width), device=image.device)
            y, x = slice(max(top, 0), top + weight.shape[0]), slice(max(left, 0), left + weight.shape[1])
            inside_y = slice(y.start - top, min(height, y.stop) - top)  # what of the tile lies in the picture
            inside_x = slice(x.start - left, min(width, x.stop) - left)
            logits_sum[:, y, x] += (tile_logits * weight)[:, inside_y, inside_x]
            weight_sum[y, x] += weight[inside_y, inside_x]
    return logits_sum / weight_sum


def choose_tile(
    tiles: TileSettings, model: torch.nn.Module, framing: Framing, margin: int, channels: int, device: torch.device
) -> tuple[int, int]:
    """Turn `tiles.size` into the largest input that the network is given at once, (height, width) px.

    "auto" takes a quarter of the memory that is free, and what one forward of framing.image_size keeps if nothing were
    freed, per pixel: rather too small a tile than one that does not fit.
    """
    if tiles.size != "auto":
        return side_hw(tiles.size)
    summary = summarize(model, framing.input_hw, channels)
    bytes_per_px = 1e6 * summary.activation_megabytes / math.prod(framing.input_hw)
    side = min(max(int((free_memory(device) / 4 / bytes_per_px) ** 0.5), 256), 4096)
    return (nearest_paper_input_sizes(side)[0],) * 2 if margin > 0 else (side, side)


def free_memory(device: torch.device) -> int:
    """Estimate how many bytes the device has free; 4 GB where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and Path("/proc/meminfo").exists():  # Linux
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return 4 * 2**30


@dataclass(frozen=True)
class Predictor:
    """A network, and how it predicts pictures of any size."""

    model: torch.nn.Module  # on the device
    framing: Framing
    margin: int  # px of the network's input that its output lacks on each side; 0 for a padded network
    tile_hw: tuple[int, int]  # largest input of the network, px
    overlap: int  # px of neighbouring tiles
    device: torch.device
    precision: str  # fp32, bf16, fp16

    @torch.no_grad()
    def predict(self, image: np.ndarray) -> torch.Tensor:
        """Predict the classes of a picture at its own size.

        Args:
            image: uint8 (H, W, channels).
        Returns:
            float32 logits (num_classes, H, W) on the device. With framing.fit "resize" the network sees the picture at
            framing.image_size, and its logits are brought back to H x W bilinearly.
        """
        picture = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)  # (channels, H, W)
        if self.framing.fit == "resize":
            input_hw = [side - 2 * self.margin for side in self.framing.input_hw]
            picture = transforms.resize(picture, input_hw, antialias=True)
        with autocast(self.device, self.precision):
            picture = picture.to(self.device).float() / 255
            logits = predict_tiled(self.model, picture, self.margin, self.tile_hw, self.overlap)
        if logits.shape[1:] != image.shape[:2]:
            hw = image.shape[:2]
            logits = torch.nn.functional.interpolate(logits[None], hw, mode="bilinear", align_corners=False)[0]
        return logits
