"""U-Net: the paper's unpadded network, and the padded form with batch norm that most people mean by the name.

Both take images float (B, in_channels, H, W) in 0..1, without further normalisation, and give logits. The unpadded one
loses PAPER_MARGIN pixels on every side; prediction by overlapping tiles uses the small functions at the top.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from utils.settings import Rule, at_least, one_of

# Annotations of settings: values of a config are checked against them.
Count = Annotated[int, at_least(1)]
DroppedShare = Annotated[float, Rule(lambda share: 0 <= share < 1, "0 or more and below 1")]
PAPER_SIZE = 572  # px, the side of the input in the paper's figure 1
PAPER_MARGIN = 92  # pixels of context that UNetPaper uses up on each side: 18 unpadded 3x3 convolutions at 5 scales


# ---------------------------------------------------------------------------------------------------------------------
# sizes of the unpadded network


def nearest_paper_input_sizes(input_size: int) -> list[int]:
    """Find the sides nearest to input_size that UNetPaper takes: itself, or one below and one above (from 188).

    It takes 16 k + 60 px with k >= 8, so 188, 204, 220, ... Other sides meet a 2x2 pooling of odd size, or nothing is
    left at the end.
    """
    below, above = 60 + (input_size - 60) // 16 * 16, 60 - (60 - input_size) // 16 * 16
    return sorted({max(188, below), max(188, above)})


def check_paper_sides(name: str, size: object, sides: tuple[int, int]) -> None:
    """Raise a ValueError, "<name> is <size>; ...", for sides, px, of which UNetPaper does not take both."""
    for side in sides:
        if side < 188 or (side - 60) % 16:
            nearest = " and ".join(map(str, nearest_paper_input_sizes(side)))
            raise ValueError(
                f"{name} is {size}; a side must be 16 k + 60 with k >= 8 for unet_paper: nearest are {nearest}"
            )


def paper_input_size(output_size: int) -> int:
    """Compute the smallest side that UNetPaper takes and whose output has output_size pixels or more.

    Args:
        output_size: pixels wanted, such as a tile's side; outputs are 4, 20, 36, ..., 388, ...
    """
    return nearest_paper_input_sizes(output_size + 2 * PAPER_MARGIN)[-1]


# ---------------------------------------------------------------------------------------------------------------------
# the paper's network


class UNetPaper(nn.Module):
    """The network of the paper's figure 1: unpadded 3x3 convolutions, 2x2 up-convolutions, copy and crop.

    Images (B, in_channels, H, W), H and W of 16k + 60 px, k >= 8, give logits (B, num_classes, H - 184, W - 184) for
    the middle of the picture. 31,030,658 parameters for 1 channel, 2 classes and 64 base channels.

    Args:
        base_channels: channels of the first level, doubled at each of the four others; 64 in the paper.
        dropout: share of values dropped at the end of the contracting path, on the two deepest levels as in the
            authors' released network; 0 for none.
    Source: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
        arXiv:1505.04597. The text says dropout but no share: 0.5 is the released network's.
    """

    def __init__(self, in_channels: int, num_classes: int, base_channels: Count = 64, dropout: DroppedShare = 0.5):
        super().__init__()
        widths = [base_channels * 2**level for level in range(5)]  # 64, 128, 256, 512, 1024
        self.encoder = nn.ModuleList(
            _double_conv_unpadded(channels_in, channels_out)
            for channels_in, channels_out in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.up_convs = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in widths[:4])
        self.decoder = nn.ModuleList(_double_conv_unpadded(2 * width, width) for width in widths[:4])
        self.head = nn.Conv2d(base_channels, num_classes, 1)
        self.apply(_init_as_in_paper)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        input_hw = tuple(images.shape[-2:])
        check_paper_sides("the input", input_hw, input_hw)
        skips = []
        features = images  # (B, in_channels, 572, 572), the paper's sizes
        for level in range(5):
            features = self.encoder[level](features)  # 568, 280, 136, 64, 28
            if level >= 3:
                features = self.dropout(features)
            if level < 4:
                skips.append(features)
                features = self.pool(features)  # 284, 140, 68, 32
        for level in (3, 2, 1, 0):
            features = self.up_convs[level](features)  # 56, 104, 200, 392
            skip = _crop_center(skips[level], features.shape[-2:])
            features = self.decoder[level](torch.cat([skip, features], dim=1))  # 52, 100, 196, 388
        return self.head(features)  # (B, num_classes, 388, 388)


def _double_conv_unpadded(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_out, channels_out, 3),
        nn.ReLU(inplace=True),
    )


def _crop_center(features: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    top, left = (features.shape[-2] - size_hw[0]) // 2, (features.shape[-1] - size_hw[1]) // 2
    return features[..., top : top + size_hw[0], left : left + size_hw[1]]


def _init_as_in_paper(module: nn.Module) -> None:
    """Draw weights from N(0, sqrt(2 / N)), N the number of incoming nodes of one output value; biases are 0."""
    if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return
    num_incoming = module.in_channels  # an up-convolution's windows do not overlap: one pixel feeds each output
    if isinstance(module, nn.Conv2d):
        num_incoming *= module.kernel_size[0] * module.kernel_size[1]
    nn.init.normal_(module.weight, std=math.sqrt(2 / num_incoming))
    nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------------------------
# the padded form


class UNet(nn.Module):
    """U-Net with padded convolutions and batch norm: logits of the images' own size, for any size.

    Images (B, in_channels, H, W) give logits (B, num_classes, H, W): the right and bottom edges are repeated up to the
    next multiple of 2**depth, and the logits are cropped back. For 3 channels, 2 classes, 64 base channels and depth 4:
    31,037,698 parameters with transposed, 17,263,042 with bilinear upsampling.

    Args:
        base_channels: channels of the first level, doubled at each deeper one.
        depth: how often the picture is halved.
        up: "transposed" (2x2 transposed convolutions, which halve the channels) or "bilinear" (no weights; the
            convolutions before it halve the channels).
    Source: Ronneberger et al., arXiv:1505.04597, with the padding and batch norm that came into use since.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        base_channels: Count,
        depth: Count,
        up: Annotated[str, one_of("transposed", "bilinear")],
    ):
        super().__init__()
        self.depth = depth
        widths = [base_channels * 2**level for level in range(depth + 1)]
        if up == "transposed":
            upsamples = [nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in widths[:-1]]
            widths_out = widths[:-1]
        else:  # what comes from below must already be as wide as the level it joins
            upsamples = [BilinearUpsample(2) for _ in widths[:-1]]
            widths[-1] //= 2
            widths_out = [base_channels, *widths[: depth - 1]]
        self.encoder = nn.ModuleList(
            _double_conv(channels_in, channels_out, channels_out)
            for channels_in, channels_out in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.upsamples = nn.ModuleList(upsamples)
        self.decoder = nn.ModuleList(
            _double_conv(2 * width, width, width_out) for width, width_out in zip(widths[:-1], widths_out, strict=True)
        )
        self.head = nn.Conv2d(base_channels, num_classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        multiple = 2**self.depth
        features = F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        features = self.encoder[0](features)
        skips = []
        for encoder in self.encoder[1:]:
            skips.append(features)
            features = encoder(self.pool(features))
        for level in reversed(range(self.depth)):
            features = torch.cat([skips[level], self.upsamples[level](features)], dim=1)
            features = self.decoder[level](features)
        return self.head(features)[..., :height, :width]


class BilinearUpsample(nn.Module):
    """Enlarge maps (B, C, H, W) bilinearly by a whole factor; see `resize_bilinear`."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        height, width = features.shape[-2:]
        return resize_bilinear(features, (self.factor * height, self.factor * width))


def resize_bilinear(features: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Bring maps (B, C, h, w) to (B, C, H, W) bilinearly, in fp32 at least, and give them back in their type.

    On a GPU, its backward adds up each pixel's gradients one by one in the type that it computes in: in bf16 they are
    3.5 % off on average.
    """
    computed = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.interpolate(computed, size_hw, mode="bilinear", align_corners=False).to(features.dtype)


def _double_conv(channels_in: int, channels_between: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_between, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_between),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_between, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )
