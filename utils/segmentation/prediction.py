"""Predict pictures of any size, whole or in tiles."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

from utils import ranks
from utils.fit import read_free_memory
from utils.run import autocast
from utils.segmentation.model_summary import summarize
from utils.segmentation.unet import nearest_paper_input_sizes, paper_input_size
from utils.segmentation.views import Framing, check_size, mirrored_index, side_hw
from utils.settings import at_least

TILE_BYTES = 2 * 10**9  # what a tile of size "auto" takes, if the network freed nothing


@dataclass(frozen=True)
class TileSettings:
    """How large pictures are predicted (`tiles:`)."""

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
    if size <= output:
        return [0], tile, torch.ones(output)
    step = output // 16 * 16  # moved by a multiple of 16 (four poolings), an unpadded network gives the same logits
    return list(range(0, size - output + step, step)), tile, torch.ones(output)


def predict_tiled(
    model: torch.nn.Module,
    image: torch.Tensor,
    margin: int,
    tile_hw: tuple[int, int],
    overlap: int,
    tiles_at_once: int = 1,
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
        tiles_at_once: in a forward; of no effect on the logits, but for rounding.
    Returns:
        float32 logits (num_classes, H, W).
    Source: Ronneberger et al. 2015, figure 2 (overlap-tile strategy).
    """
    height, width = image.shape[1:]
    tops, tile_h, weight_y = plan_tiles(height, tile_hw[0], margin, overlap)
    lefts, tile_w, weight_x = plan_tiles(width, tile_hw[1], margin, overlap)
    weight = (weight_y[:, None] * weight_x[None]).to(image.device)  # (h', w') of a tile's output
    logits_sum, weight_sum = None, torch.zeros((height, width), device=image.device)
    rows = {top: torch.from_numpy(mirrored_index(top - margin, tile_h, height)).to(image.device) for top in tops}
    columns = {left: torch.from_numpy(mirrored_index(left - margin, tile_w, width)).to(image.device) for left in lefts}
    corners = [(top, left) for top in tops for left in lefts]
    for start in range(0, len(corners), tiles_at_once):
        together = corners[start : start + tiles_at_once]
        tiles = torch.stack([image[:, rows[top][:, None], columns[left][None]] for top, left in together])
        batch_logits = model(tiles).float()  # (T, num_classes, h', w')
        if logits_sum is None:
            logits_sum = torch.zeros((batch_logits.shape[1], height, width), device=image.device)
        for (top, left), tile_logits in zip(together, batch_logits, strict=True):
            y, x = slice(max(top, 0), top + weight.shape[0]), slice(max(left, 0), left + weight.shape[1])
            inside_y = slice(y.start - top, min(height, y.stop) - top)  # what of the tile lies in the picture
            inside_x = slice(x.start - left, min(width, x.stop) - left)
            logits_sum[:, y, x] += (tile_logits * weight)[:, inside_y, inside_x]
            weight_sum[y, x] += weight[inside_y, inside_x]
        del batch_logits, tile_logits
    return logits_sum.div_(weight_sum)  # in place: of 12 megapixels and 21 classes it is 1 GB


def choose_tile(
    tiles: TileSettings, model: torch.nn.Module, framing: Framing, margin: int, channels: int
) -> tuple[int, int]:
    """Turn `tiles.size` into the largest input that the network is given, (height, width) px.

    "auto" follows from the network and framing.image_size alone, so that results do not depend on a machine: a tile
    takes TILE_BYTES, and is as large as image_size at least.
    """
    if tiles.size != "auto":
        return side_hw(tiles.size)
    side = int((TILE_BYTES / activation_bytes(model, framing, channels)) ** 0.5)
    side = max(min(max(side, 256), 4096), 2 * tiles.overlap)
    side = nearest_paper_input_sizes(side)[0] if margin > 0 else side
    height, width = framing.input_hw
    return max(side, height), max(side, width)


def count_tiles_at_once(
    model: torch.nn.Module, framing: Framing, channels: int, tile_hw: tuple[int, int], device: torch.device
) -> int:
    """Count the tiles that fit in a quarter of the memory that is free; at least 1."""
    tile_bytes = activation_bytes(model, framing, channels) * math.prod(tile_hw)
    return max(1, int(free_memory(device) / 4 / tile_bytes))


def activation_bytes(model: torch.nn.Module, framing: Framing, channels: int) -> float:
    """Compute the bytes per px that one forward of framing.image_size keeps if nothing is freed."""
    summary = summarize(model, framing.input_hw, channels)
    return 1e6 * summary.activation_megabytes / math.prod(framing.input_hw)


def free_memory(device: torch.device) -> int:
    """Estimate how many bytes the device has free for this process; 4 GB where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and Path("/proc/meminfo").exists():  # Linux
        resident_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return max(0, read_free_memory(device) - resident_bytes) // ranks.local_count()  # a container's limit counts
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
    tiles_at_once: int = 1

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
            logits = predict_tiled(self.model, picture, self.margin, self.tile_hw, self.overlap, self.tiles_at_once)
        if logits.shape[1:] != image.shape[:2]:
            hw = image.shape[:2]
            logits = torch.nn.functional.interpolate(logits[None], hw, mode="bilinear", align_corners=False)[0]
        return logits
