"""SiamFC: the network, its labels, and the one crop geometry that training and tracking share.

A box's context square, resized to 127 px, is the exemplar; a square twice as wide (255 px) around the place where the
object was last is the instance. The same network turns both into features, and their cross-correlation is high where
the instance looks like the exemplar.

Boxes are (left, top, width, height) px, 0-based: a box of one pixel in the corner of a frame is (0, 0, 1, 1). The
centre of a box is that of its middle pixel, left + (width - 1) / 2.
Sources: Bertinetto et al., "Fully-Convolutional Siamese Networks for Object Tracking", ECCV workshops 2016,
arXiv:1606.09549; sizes, constants and rounding as in github.com/huanglianghua/siamfc-pytorch.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.checkpoint import check_script, find_weights, load_checkpoint

EXEMPLAR_SIZE = 127  # px
INSTANCE_SIZE = 255  # px, in tracking
TOTAL_STRIDE = 8  # instance pixels from one response cell to the next
RESPONSE_SCALE = 0.001  # brings the cross-correlation of 256 x 6 x 6 values to the range of logits
MAX_PATCH_SIDE = 8192  # px, 200 MB; wider patches are sampled straight from the frame


# ---------------------------------------------------------------------------------------------------------------------
# the network


class AlexNetV1(nn.Module):
    """Turn images float (B, 3, S, S) into features (B, 256, s, s), with stride 8 and without padding.

    S of 127, 239 and 255 px give s of 6, 20 and 22.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 96, 11, stride=2), *_norm_relu(96), nn.MaxPool2d(3, 2))
        self.conv2 = nn.Sequential(nn.Conv2d(96, 256, 5, groups=2), *_norm_relu(256), nn.MaxPool2d(3, 2))
        self.conv3 = nn.Sequential(nn.Conv2d(256, 384, 3), *_norm_relu(384))
        self.conv4 = nn.Sequential(nn.Conv2d(384, 384, 3, groups=2), *_norm_relu(384))
        self.conv5 = nn.Sequential(nn.Conv2d(384, 256, 3, groups=2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv1(images)  # (B, 96, 61, 61) for 255 px
        features = self.conv2(features)  # (B, 256, 28, 28)
        features = self.conv3(features)  # (B, 384, 26, 26)
        features = self.conv4(features)  # (B, 384, 24, 24)
        return self.conv5(features)  # (B, 256, 22, 22)


def _norm_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, eps=1e-6, momentum=0.05), nn.ReLU(inplace=True)]


class SiamFC(nn.Module):
    """The fully-convolutional siamese network: exemplars and instances to response logits, 2,336,320 parameters.

    Images are float RGB in 0..255, without normalisation. The names of the weights are those of the published
    `siamfc_alexnet_e*.pth`. New weights are drawn from torch's global generator (`seed_everything`).

    Args:
        score_bias: add a learned bias to the response, as in the paper's own code; the PyTorch code has none.
    """

    def __init__(self, score_bias: bool):
        super().__init__()
        self.backbone = AlexNetV1()
        self.score_bias = nn.Parameter(torch.zeros(1)) if score_bias else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Compute features: images (B, 3, S, S) -> (B, 256, s, s)."""
        return self.backbone(images)

    def respond(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compare features of exemplars and instances (see `cross_correlate`) and scale them to response logits."""
        response = cross_correlate(z, x) * RESPONSE_SCALE
        return response if self.score_bias is None else response + self.score_bias

    def forward(self, exemplars: torch.Tensor, instances: torch.Tensor) -> torch.Tensor:
        """Compute the response of each instance to its exemplar.

        Args:
            exemplars: float (B, 3, 127, 127), RGB 0..255.
            instances: float (B, 3, S, S); S is 239 px in training, 255 px in tracking.
        Returns:
            response (B, 1, r, r), logits, at least float32; r is 15 or 17.
        """
        return self.respond(self.features(exemplars), self.features(instances))


def cross_correlate(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Slide each exemplar's features over those of its instances, in float32 also under autocast.

    Args:
        z: (B, C, h, w) features of B exemplars.
        x: (K * B, C, H, W) features of K instances of each: x[k * B + b] belongs to z[b].
    Returns:
        (K * B, 1, H - h + 1, W - w + 1) sums of products, in the order of x.
    """
    assert len(x) % len(z) == 0, (z.shape, x.shape)
    with torch.autocast(x.device.type, enabled=False):  # sums of 9,216 products: 8 or 11 bits are too few
        if x.dtype in (torch.bfloat16, torch.float16):
            z, x = z.float(), x.float()
        grouped = x.reshape(-1, len(z) * x.shape[1], *x.shape[2:])  # (K, B * C, H, W)
        response = F.conv2d(grouped, z, groups=len(z))  # (K, B, r, r)
    return response.reshape(len(x), 1, *response.shape[2:])


def load_siamfc(checkpoint_path: Path) -> SiamFC:
    """Build a SiamFC from a checkpoint: best.pt and last.pt of train_siamfc.py, a bundled or a published file.

    Returns:
        the model in eval mode, float32, on the CPU; with a score bias if the file has one.
    Raises:
        FileNotFoundError, ValueError: for a file that is missing, damaged, or holds another network.
    """
    state = load_checkpoint(checkpoint_path)
    if "config" in state:
        check_script(state, checkpoint_path, "train_siamfc")
    weights = find_weights(state, checkpoint_path)
    model = SiamFC(score_bias="score_bias" in weights)
    expected = model.state_dict()
    wrong = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    wrong += [str(key) for key in weights if key not in expected]
    wrong += [key for key in expected if key in weights and getattr(weights[key], "shape", 0) != expected[key].shape]
    if wrong:
        raise ValueError(
            f"checkpoint {checkpoint_path} does not hold the weights of SiamFC: {len(wrong)} entries are missing, too "
            f"many or of another shape, such as {wrong[0]}; give a checkpoint of train_siamfc.py or a published "
            "siamfc_alexnet_e*.pth"
        )
    model.load_state_dict(weights, strict=False)  # only num_batches_tracked may be missing: nothing here uses it
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# geometry: from a box to a patch. In float32, as the published code, so that crops are the same to the byte.


def box_center(box_xywh: np.ndarray) -> np.ndarray:
    """Find the centre of a box's middle pixel: (4,) px, 0-based -> float32 (2,), (x, y) px."""
    left, top, width, height = (float(value) for value in box_xywh)
    return np.array([left + (width - 1) / 2, top + (height - 1) / 2], np.float32)


def context_side(box_wh: np.ndarray, context_amount: float = 0.5) -> float:
    """Compute the side of a box's context square, which becomes the exemplar: sqrt((w + p) (h + p)).

    Args:
        box_wh: (2,) px.
        context_amount: p is this share of w + h.
    Returns:
        side in px of the frame, a float32 number.
    """
    width, height = np.asarray(box_wh, np.float32)
    context = np.float32(context_amount) * (width + height)
    return float(np.sqrt((width + context) * (height + context)))


def instance_side(exemplar_side: float, instance_size: int = INSTANCE_SIZE) -> float:
    """Compute the side of the square that becomes the instance, at the exemplar's scale.

    Args:
        exemplar_side: px of the frame, from `context_side`.
        instance_size: px of the instance, such as 255.
    Returns:
        side in px of the frame, a float32 number.
    """
    return float(np.float32(exemplar_side) * np.float32(instance_size) / np.float32(EXEMPLAR_SIZE))


def mean_color(image: np.ndarray) -> np.ndarray:
    """Compute the mean colour of a frame from exact integer sums: the numbers of np.mean, much faster.

    Args:
        image: uint8 (H, W, 3), RGB.
    Returns:
        float64 (3,), 0..255.
    """
    return np.array(cv2.sumElems(image)[:3]) / (image.shape[0] * image.shape[1])


def crop_and_resize(
    image: np.ndarray,
    center_xy: np.ndarray,
    side: float,
    out_size: int,
    border_rgb: np.ndarray | None,
    interpolation: int = cv2.INTER_LINEAR,
) -> np.ndarray:
    """Cut a square out of a frame and resize it; what lies outside the frame has the border's colour.

    The patch is the one of a frame padded as a whole, to the byte, but only the patch itself is padded. Memory is
    bounded: a patch wider than MAX_PATCH_SIDE px is sampled bilinearly straight from the frame, whatever the
    interpolation.

    Args:
        image: uint8 (H, W, 3), RGB.
        center_xy: (2,) px, 0-based, used as float32.
        side: px of the frame; rounded to a whole number, half to even, and at least 1.
        out_size: px of the patch.
        border_rgb: (3,) 0..255, from `mean_color`; None: this image's, which is computed where it is needed.
        interpolation: cv2.resize's, such as cv2.INTER_LINEAR.
    Returns:
        uint8 (out_size, out_size, 3).
    """
    height, width = image.shape[:2]
    side = max(1, round(side))
    first_xy = np.round(np.asarray(center_xy, np.float32) - np.float32((side - 1) / 2))
    left, top = int(first_xy[0]), int(first_xy[1])
    right, bottom = left + side, top + side  # not included
    pads = (max(0, -top), max(0, bottom - height), max(0, -left), max(0, right - width))
    if border_rgb is None:
        border_rgb = mean_color(image) if any(pads) else np.zeros(3)
    border = tuple(np.rint(np.asarray(border_rgb, np.float64)).tolist())  # half to even, as OpenCV
    if left >= width or top >= height or right <= 0 or bottom <= 0:  # nothing of the frame
        return np.full((out_size, out_size, 3), border, np.uint8)
    if side > MAX_PATCH_SIDE:
        step = side / out_size  # frame px from one patch px to the next
        to_frame = np.array([[step, 0, left + (step - 1) / 2], [0, step, top + (step - 1) / 2]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(image, to_frame, (out_size, out_size), flags=flags, borderValue=border)
    patch = image[max(0, top) : bottom, max(0, left) : right]
    if any(pads):
        patch = cv2.copyMakeBorder(patch, *pads, cv2.BORDER_CONSTANT, value=border)
    return cv2.resize(patch, (out_size, out_size), interpolation=interpolation)  # (out_size, out_size, 3)


# ---------------------------------------------------------------------------------------------------------------------
# what the response should be


def response_labels(size: int, r_pos: float) -> torch.Tensor:
    """Make the labels of a response whose object is in the middle: 1 near it, 0 elsewhere.

    Args:
        size: cells along each side of the response; 15 in training.
        r_pos: cells at most this far from the middle, in instance px, horizontally plus vertically, are 1.
    Returns:
        float32 (size, size), 0 or 1; 13 ones of 225 for 15 and 16.
    Raises:
        ValueError: where all cells would have the same label.
    """
    offset = (torch.arange(size) - (size - 1) / 2).abs()  # cells
    labels = (offset[:, None] + offset[None, :] <= r_pos / TOTAL_STRIDE).float()
    if labels.min() == labels.max():
        raise ValueError(
            f"train.r_pos is {r_pos}; gives all {size} x {size} cells of the response the label "
            f"{int(labels[0, 0])}; the published value is 16"
        )
    return labels


def balanced_weights(labels: torch.Tensor) -> torch.Tensor:
    """Weigh cells so that the ones of a response count as much as its zeros: each kind sums to 1/2.

    Args:
        labels: (..., r, r), 0 or 1, with both in each response, from `response_labels`.
    Returns:
        float32 of the labels' shape. The loss of B responses is the weighted sum of the cells' losses over B.
    """
    num_ones = labels.sum((-2, -1), keepdim=True)
    num_zeros = labels.shape[-2] * labels.shape[-1] - num_ones
    return torch.where(labels > 0.5, 0.5 / num_ones, 0.5 / num_zeros)
