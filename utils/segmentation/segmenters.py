"""Other segmentation networks: FCN, SegNet (also depthwise separable), a vision transformer, torchvision's DeepLabV3.

All take images float (B, in_channels, H, W) in 0..1, of any size and without further normalisation, and give logits
(B, num_classes, H, W).
"""

import itertools
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model

from utils.segmentation.unet import Count, DroppedShare, resize_bilinear
from utils.settings import one_of

# ---------------------------------------------------------------------------------------------------------------------
# FCN


class FCN(nn.Module):
    """FCN-8s on a VGG-16 trunk, with batch norm so that it learns from scratch.

    Class scores at 1/32 of the picture are doubled twice by learned 4x4 transposed convolutions, which start as
    bilinear interpolation, each time joined by scores from the trunk (1/16, then 1/8), and the sum is enlarged 8 times
    by fixed bilinear interpolation. Unlike the published network, whose trunk comes from ImageNet: batch norm after
    each convolution, whose biases it makes superfluous, no zero start for the scores, and padding by half a kernel
    instead of 100 px. About 134 M parameters at the published widths of 64 and 4096.

    Args:
        base_channels: channels of the first level; 1, 2, 4, 8, 8 times as many at the five levels; 64 in VGG-16.
        head_channels: channels of the two wide layers before the scores, 7x7 and 1x1; 4096 in VGG-16.
        dropout: share of values dropped after each of the two wide layers; 0.5 in VGG-16.
    Source: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
        arXiv:1411.4038.
    """

    def __init__(
        self, in_channels: int, num_classes: int, base_channels: Count, head_channels: Count, dropout: DroppedShare
    ):
        super().__init__()
        self.levels, channels = nn.ModuleList(), in_channels
        for factor, num_convs in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            convs = _conv_chain(_conv, [channels] + num_convs * [factor * base_channels])
            self.levels.append(convs.append(nn.MaxPool2d(2)))
            channels = factor * base_channels
        self.head = nn.Sequential(
            *_conv(channels, head_channels, 7),
            nn.Dropout(dropout),
            *_conv(head_channels, head_channels, 1),
            nn.Dropout(dropout),
        )
        self.score_32 = nn.Conv2d(head_channels, num_classes, 1)
        self.score_16 = nn.Conv2d(8 * base_channels, num_classes, 1)
        self.score_8 = nn.Conv2d(4 * base_channels, num_classes, 1)
        self.up_32 = nn.ConvTranspose2d(num_classes, num_classes, 4, stride=2, padding=1, bias=False)
        self.up_16 = nn.ConvTranspose2d(num_classes, num_classes, 4, stride=2, padding=1, bias=False)
        for up in (self.up_32, self.up_16):
            _init_bilinear(up)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        features = F.pad(images, (0, -width % 32, 0, -height % 32), mode="replicate")
        pooled = []
        for level in self.levels:
            features = level(features)
            pooled.append(features)  # 1/2, 1/4, 1/8, 1/16, 1/32
        scores = self.score_32(self.head(pooled[4]))  # (B, num_classes, H/32, W/32)
        scores = self.up_32(scores) + self.score_16(pooled[3])  # H/16
        scores = self.up_16(scores) + self.score_8(pooled[2])  # H/8
        scores = resize_bilinear(scores, (8 * scores.shape[-2], 8 * scores.shape[-1]))  # H
        return scores[..., :height, :width]


@torch.no_grad()
def _init_bilinear(up: nn.ConvTranspose2d) -> None:
    """Make a 4x4 transposed convolution of stride 2 enlarge each channel by bilinear interpolation."""
    taps = torch.tensor([0.25, 0.75, 0.75, 0.25])
    up.weight.zero_()
    for channel in range(up.in_channels):
        up.weight[channel, channel] = taps[:, None] * taps


# ---------------------------------------------------------------------------------------------------------------------
# SegNet


class SegNet(nn.Module):
    """SegNet of four levels: the decoder puts each value back where the encoder's 2x2 pooling had found it.

    The network of the series "Efficient Image Segmentation Using PyTorch", batch norm on the images first: with 3
    channels, 3 classes and 64 base channels 15,274,892 parameters, 1,749,671 if separable. The series ends with a ReLU,
    left out here: scores below 0 must be possible, and a class whose scores are all below 0 would never learn.

    Args:
        base_channels: channels of the first level; 1, 2, 4, 8 times as many at the four levels.
        separable: each 3x3 convolution becomes a 3x3 one within each channel and a 1x1 one across channels.
    Source: Badrinarayanan, Kendall, Cipolla, "SegNet", arXiv:1511.00561; Matani and Naresh, parts 2 and 3 of the
        series, Towards Data Science 2023.
    """

    def __init__(self, in_channels: int, num_classes: int, base_channels: Count, separable: bool):
        super().__init__()
        conv = _separable_conv if separable else _conv
        widths = [in_channels, base_channels, 2 * base_channels, 4 * base_channels, 8 * base_channels]
        num_convs = [2, 2, 3, 3]
        encoder, decoder = [], []
        for level in range(4):
            shallow, deep = widths[level], widths[level + 1]
            channels = [shallow] + num_convs[level] * [deep]
            encoder.append(_conv_chain(conv, channels))
            decoder.append(_conv_chain(conv, channels[:0:-1] + [shallow if level > 0 else num_classes]))
        del decoder[0][-1]  # the last ReLU
        self.input_norm = nn.BatchNorm2d(in_channels)
        self.encoder = nn.ModuleList(encoder)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = Unpool()
        self.decoder = nn.ModuleList(decoder)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < 16 or torch.jit.is_tracing():  # four poolings leave nothing of it
            # products in place of max(), since a tracer follows sizes through arithmetic alone
            right, bottom = (16 - width) * (width < 16), (16 - height) * (height < 16)
            images = F.pad(images, (0, right, 0, bottom), mode="replicate")
        features = self.input_norm(images)
        sizes, indices = [], []
        for encoder in self.encoder:
            features = encoder(features)
            sizes.append(features.shape[-2:])  # pooling drops the last row or column of an odd size
            features, level_indices = self.pool(features)
            indices.append(level_indices)
        for level in (3, 2, 1, 0):
            features = self.unpool(features, indices[level], sizes[level])
            features = self.decoder[level](features)
        return features[..., :height, :width]


class Unpool(nn.Module):
    """Undo a max pooling: values (B, C, h, w) go where they were found in size_hw (H, W), 0 goes elsewhere.

    The same as nn.MaxUnpool2d, which some devices lack in half precision or altogether.
    """

    def forward(self, values: torch.Tensor, indices: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
        batch_size, channels = values.shape[:2]
        places = values.new_zeros(batch_size, channels, size_hw[0] * size_hw[1])
        places = places.scatter(2, indices.flatten(2), values.flatten(2))
        return places.reshape(batch_size, channels, *size_hw)  # not unflatten: an exporter would fix the batch's size


# ---------------------------------------------------------------------------------------------------------------------
# vision transformer


class ViTSegmenter(nn.Module):
    """A vision transformer whose last layer gives each patch the class scores of its pixels.

    The network of part 4 of the series "Efficient Image Segmentation Using PyTorch", batch norm on the images first:
    86,284,806 parameters for 3 channels, 3 classes, 128 px, patches of 16 px, dimension 768 and 12 blocks. Pictures of
    another size than image_size get interpolated positions; edges are repeated up to the next multiple of patch_size.

    Args:
        image_size: side of the square pictures it is trained on, pixels; one position is learned for each patch.
        patch_size: side of a patch, pixels.
        dim: length of the vector that stands for a patch.
        num_blocks: blocks of attention and a two-layer perceptron of 4 * dim.
        num_heads: attention heads; must divide dim.
        dropout: share of attention weights, and of the values that each perceptron adds, that is dropped.
    Source: Dosovitskiy et al., arXiv:2010.11929; Matani and Naresh, part 4 of the series, Towards Data Science 2023.
        Positions start as N(0, 0.02) as in the former, not N(0, 1).
    """

    no_decay = ("positions",)  # names of parameters without weight decay, beside biases and norms

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: Count,
        patch_size: Count,
        dim: Count,
        num_blocks: Count,
        num_heads: Count,
        dropout: DroppedShare,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"model.image_size is {image_size}; must be a multiple of model.patch_size ({patch_size})")
        if dim % num_heads:
            raise ValueError(f"model.dim is {dim}; must be a multiple of model.num_heads ({num_heads})")
        self.patch_size = patch_size
        self.input_norm = nn.BatchNorm2d(in_channels)
        self.patch_embedding = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        side = image_size // patch_size
        self.positions = nn.Parameter(0.02 * torch.randn(1, dim, side, side))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, num_heads, dropout) for _ in range(num_blocks)))
        self.head = nn.Linear(dim, num_classes * patch_size**2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        padding = (0, -width % self.patch_size, 0, -height % self.patch_size)
        features = self.patch_embedding(F.pad(self.input_norm(images), padding, mode="replicate"))  # (B, dim, h, w)
        num_rows, num_columns = features.shape[-2:]
        positions = self.positions
        if torch.jit.is_tracing() or positions.shape[-2:] != features.shape[-2:]:  # an exported file takes any size
            positions = F.interpolate(positions, size=(num_rows, num_columns), mode="bicubic", align_corners=False)
        tokens = (features + positions).flatten(2).transpose(1, 2)  # (B, h*w, dim)
        scores = self.head(self.blocks(tokens))  # (B, h*w, num_classes * patch_size**2)
        scores = scores.transpose(1, 2).unflatten(2, (num_rows, num_columns))
        return F.pixel_shuffle(scores, self.patch_size)[..., :height, :width]  # (B, num_classes, H, W)


class TransformerBlock(nn.Module):
    """Attention among the tokens, then a perceptron on each; both add to tokens (B, T, dim) and normalise first."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, dropout
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        joined = self.query_key_value(self.attention_norm(tokens))  # (B, T, 3 * dim)
        joined = joined.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = joined  # each (B, num_heads, T, dim / num_heads)
        share = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(queries, keys, values, dropout_p=share)
        tokens = tokens + self.attention_out(attended.transpose(1, 2).flatten(2))
        return tokens + self.perceptron(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# DeepLabV3


class DeepLabV3(nn.Module):
    """torchvision's DeepLabV3: dilated convolutions of several rates on a ResNet or MobileNet with large features.

    Pictures are normalised as the published weights expect it; a grey one is repeated to three channels. The last layer
    is made anew for the classes; the auxiliary head is left out. 39.6 M parameters with resnet50 and 2 classes.

    Args:
        in_channels: 1 or 3.
        backbone: resnet50, resnet101 or mobilenet_v3_large.
        pretrained: start from torchvision's weights (COCO, the classes of Pascal VOC), which are downloaded once.
    Source: Chen et al. 2017, "Rethinking Atrous Convolution for Semantic Image Segmentation", arXiv:1706.05587.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        backbone: Annotated[str, one_of("resnet50", "resnet101", "mobilenet_v3_large")],
        pretrained: bool,
    ):
        super().__init__()
        if in_channels not in (1, 3):
            raise ValueError(f"data.channels is {in_channels}; must be 1 or 3 for model=deeplabv3")
        weights = "DEFAULT" if pretrained else None
        self.network = get_model(f"deeplabv3_{backbone}", weights=weights, weights_backbone=None)
        self.network.aux_classifier = None
        atrous_convs = self.network.classifier[0].convs
        atrous_convs[-1] = PooledContext(*atrous_convs[-1])
        self.network.classifier[-1] = nn.Conv2d(self.network.classifier[-1].in_channels, num_classes, 1)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training and len(images) == 1:  # batch norm of one value a channel, the mean over the picture
            raise ValueError("train.batch_size is 1; must be 2 or more for model=deeplabv3")
        images = (images.expand(-1, 3, -1, -1) - self.mean) / self.std  # (B, 3, H, W)
        scores = self.network.classifier(self.network.backbone(images)["out"])  # (B, num_classes, H/8, W/8)
        return resize_bilinear(scores, images.shape[-2:])  # (B, num_classes, H, W)


class PooledContext(nn.Sequential):
    """torchvision's ASPPPooling: the picture's mean through a convolution, spread over (B, C, H, W); see
    `resize_bilinear`.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return resize_bilinear(super().forward(features), features.shape[-2:])


# ---------------------------------------------------------------------------------------------------------------------
# what they share


def _conv(channels_in: int, channels_out: int, kernel_size: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    ]


def _conv_chain(conv: Callable[[int, int, int], list[nn.Module]], channels: list[int]) -> nn.Sequential:
    """Chain 3x3 convolutions, each from one of the channels to the next."""
    return nn.Sequential(*(layer for pair in itertools.pairwise(channels) for layer in conv(*pair, 3)))


def _separable_conv(channels_in: int, channels_out: int, kernel_size: int) -> list[nn.Module]:
    within_channels = nn.Conv2d(
        channels_in, channels_in, kernel_size, padding=kernel_size // 2, groups=channels_in, bias=False
    )
    return [within_channels, *_conv(channels_in, channels_out, 1)]
