"""Train U-Net and its relatives on pictures with one class per pixel, read straight from disk; evaluate and predict.

    python train_unet.py                                           # generated pets, a small U-Net, on a CPU
    python train_unet.py model=segnet data=oxford_pet data.root=/my/oxford-iiit-pet
    python train_unet.py check=true data=folders data.root=/my/dataset       # look at a dataset and stop
    python train_unet.py mode=evaluate checkpoint=best.pt split=test
    python train_unet.py mode=predict checkpoint=best.pt input=photos/       # a picture or a folder, of any size
    python train_unet.py mode=summary model=segnet_dsc             # layers, parameters, multiply-adds, latency
    python train_unet.py resume=outputs/train_unet/<run>           # continue a killed run, exactly
    python train_unet.py --cfg job                                 # print every knob with its value

Reads   pictures and class maps: data=oxford_pet|isbi|camvid|folders (data/README.md).
Writes  outputs/train_unet/<time>/: best.pt (rebuilds its own model), last.pt (to resume), metrics.csv, curves.png,
        samples/, splits/, tensorboard/, run.json; mode=predict: for each picture
        <name>_classes.png (class indices), <name>_overlay.png, on request <name>_probabilities.npy.
        A picture that cannot be read is named at the end, the others are done, and the exit status is 1.
Metrics, from one confusion matrix over all pixels of the validation set (test/...: of the test set), each picture at
its own size, classes that are not there left out:
    val/mean_iou         mean over classes of the intersection over union (val/weighted_iou: weighted by frequency)
    val/pixel_accuracy   share of the pixels whose class is right
    val/dice             mean over classes of the Dice coefficient
    val/soft_iou         mean over pictures of the soft IoU of probabilities, as in the series named below
    val/loss             the training loss on the whole pictures
    train/loss, train/pixel_accuracy    running means over training steps (bias-corrected, 0.99)
Sources: Ronneberger et al. 2015 (U-Net); Matani and Naresh 2023, "Efficient Image Segmentation Using PyTorch".
"""

import sys

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):  # before the imports below, which take seconds
    print(__doc__)
    sys.exit()

import functools
import logging
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import cv2
import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from utils.checkpoint import find_resume, load_checkpoint, resumed_config
from utils.images import IGNORE_INDEX, id_colors, list_images, output_names, overlay_label_map, write_image
from utils.log import MetricsLog, finish_run, plot_curves, start_run, values_of_step
from utils.loop import (
    LoopState,
    SpeedWindow,
    check_finite,
    clip_gradients,
    load_batches,
    resume_run,
    running_means,
    save_run,
    to_device,
)
from utils.run import (
    autocast,
    choose_device,
    choose_precision,
    cosine_lr,
    sample_rng,
    seed_everything,
    shuffled_item,
)
from utils.samples.write import write_samples
from utils.segmentation.check import (
    MAX_LISTED,
    CheckReport,
    check_items,
    class_frequencies,
    count_class_pixels,
    keep_usable,
    plot_statistics,
    report_lines,
)
from utils.segmentation.losses import balanced_class_weights, border_weight_map, semantic_loss
from utils.segmentation.metrics import confusion_matrix, segmentation_metrics, soft_iou
from utils.segmentation.model_summary import format_summary, measure_latency, summarize
from utils.segmentation.readers import Item, name_classes, read_item, read_picture, split_items
from utils.segmentation.segmenters import FCN, SegNet, ViTSegmenter
from utils.segmentation.unet import (
    PAPER_MARGIN,
    UNet,
    UNetPaper,
    is_paper_input_size,
    nearest_paper_input_sizes,
    paper_input_size,
)
from utils.settings import check_keys, check_type, describe_error, read_settings

NETWORKS = {"unet_paper": UNetPaper, "unet": UNet, "fcn": FCN, "segnet": SegNet, "vit": ViTSegmenter}
ONE_CLASS_SHARE = 0.995  # of all predictions; above it a network is taken to answer with one class whatever it sees
REPORTED = ("mean_iou", "pixel_accuracy", "dice", "weighted_iou")  # what best.pt can be chosen by
LATENCY_REPEATS = 30
MODES = ("train", "evaluate", "predict", "summary")
TOP_LEVEL_KEYS = (
    "seed", "device", "precision", "num_workers", "resume", "data_root", "check", "mode", "checkpoint", "split",
    "input", "probabilities", "model", "data", "loss", "optim", "train", "tiles",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Knobs of the training loop (`train:` in configs/unet/train_unet.yaml, which explains each)."""

    steps: int
    batch_size: int  # images per forward
    accumulate: int  # forwards per step
    clip_norm: float | None
    channels_last: bool
    compile: bool
    log_every: int  # steps
    eval_every: int  # steps
    save_every: int  # steps
    eval_images: int | None
    select_by: str
    early_stop_evals: int | None
    test_at_end: bool
    picture_images: int


@dataclass(frozen=True)
class Framing:
    """How a picture is brought before the network, in training and prediction (in `data:`)."""

    image_size: int | list[int]  # px, S or [height, width]: the network's input in training
    fit: str  # resize: the whole picture is brought to image_size; crop: it keeps its resolution

    @property
    def input_hw(self) -> tuple[int, int]:
        return side_hw(self.image_size)


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are varied, together with their class maps (in `data:`)."""

    scale: list[float]  # range of the window's side, as a share of the picture (resize) or of image_size (crop)
    hflip: bool
    vflip: bool
    rotation: float  # degrees
    color_jitter: float
    elastic_px: float


@dataclass(frozen=True)
class LossSettings:
    """Weights of the loss (`loss:`, configs/unet/loss/*.yaml)."""

    cross_entropy: float
    soft_iou: float
    log_iou: float
    dice: float
    tversky: float
    tversky_alpha: float
    focal: float
    focal_gamma: float
    class_weights: list[float] | str | None  # one a class; auto: from the frequencies in the training set
    border_weight: float  # w0 of the paper's weight map; 0: none
    border_sigma: float  # px


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer and schedule (`optim:`, configs/unet/optim/*.yaml)."""

    name: str  # adamw, adam, sgd
    lr: float  # highest
    betas: list[float]  # adam, adamw
    momentum: float  # sgd
    nesterov: bool  # sgd
    weight_decay: float  # 0 for biases, norms and embeddings
    schedule: str  # constant, step, cosine, poly
    warmup_steps: int
    min_lr_factor: float  # cosine, poly: the rate at the last step, as a share of lr
    step_every: int  # step: the rate is multiplied by step_factor every so many steps
    step_factor: float
    poly_power: float


@dataclass(frozen=True)
class TileSettings:
    """How pictures that do not fit in memory are predicted (`tiles:`)."""

    size: int | list[int] | str  # px, S, [height, width] or auto
    overlap: int  # px


def side_hw(size: int | list[int]) -> tuple[int, int]:
    """Turn S or [height, width] into (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# ---------------------------------------------------------------------------------------------------------------------
# disk -> tensors


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

    cuts, grown_hw = [], []  # of each axis: the picture's pixels, and how many pixels they become
    for axis in (0, 1):
        size = image.shape[axis]
        window = max(1, round(scale * (size if framing.fit == "resize" else out_hw[axis])))
        first, last = sorted((0, size - window))
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
        picture, classes = [one[..., reach : grown_h - reach, reach : grown_w - reach] for one in (picture, classes)]
    for is_used, flip in (
        (augmentation.hflip, transforms.horizontal_flip),
        (augmentation.vflip, transforms.vertical_flip),
    ):
        if rng.random() < 0.5 and is_used:
            picture, classes = flip(picture), flip(classes)
    for adjust in (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation):
        factor = 1 + augmentation.color_jitter * rng.uniform(-1, 1)
        if augmentation.color_jitter > 0:
            picture = adjust(picture, factor)
    target = classes[0, margin : height - margin, margin : width - margin]
    return picture.as_subclass(torch.Tensor).contiguous(), target.as_subclass(torch.Tensor).contiguous()


def border_weights(class_map: np.ndarray, loss: LossSettings, class_weights: list[float] | None) -> np.ndarray:
    """Compute the weight of each pixel: its class's, and the paper's more in narrow gaps between objects of class 1.

    Args:
        class_map: uint8 (H, W); the connected parts of class 1 are the objects.
        class_weights: one a class; None: 1.
    Returns:
        float32 (H, W).
    """
    weight_of_class = np.ones(256, np.float32)
    if class_weights is not None:
        weight_of_class[: len(class_weights)] = class_weights
    _, instances = cv2.connectedComponents((class_map == 1).astype(np.uint8), connectivity=4)
    extra = border_weight_map(instances, loss.border_weight, loss.border_sigma, class_weights=(0.0, 0.0))
    return weight_of_class[class_map] + extra


class AugmentedPairs(Dataset):
    """Training samples: a picture and its class map, varied alike. A sample is a function of (seed, sample_index)."""

    def __init__(
        self,
        items: list[Item],
        seed: int,
        framing: Framing,
        augmentation: Augmentation,
        margin: int,
        loss: LossSettings,
        class_weights: list[float] | None,
    ):
        self.items, self.seed, self.framing, self.augmentation = items, seed, framing, augmentation
        self.margin, self.loss, self.class_weights = margin, loss, class_weights

    def __getitem__(self, sample_index: int) -> dict:
        """Read a pair and vary it.

        Returns:
            image uint8 (channels, h, w); target uint8 (h', w'), smaller for an unpadded network; pixel_weight float32
            (h', w'), or None without border_weight; name: the picture's file.
        """
        item_number = shuffled_item(self.seed, sample_index, len(self.items))
        item = self.items[item_number]
        rng = sample_rng(self.seed, sample_index)
        image, target = training_view(*read_item(item), self.framing, self.augmentation, self.margin, rng)
        pixel_weight = None
        if self.loss.border_weight > 0:
            pixel_weight = torch.from_numpy(border_weights(target.numpy(), self.loss, self.class_weights))
        return {"image": image, "target": target, "pixel_weight": pixel_weight, "name": str(item.image_path)}


def collate(samples: list[dict]) -> dict:
    """Join samples: images (B, channels, h, w), targets (B, h', w'), pixel_weight (B, h', w') or None, names."""
    batch = {"images": torch.stack([sample["image"] for sample in samples])}
    batch["targets"] = torch.stack([sample["target"] for sample in samples])
    has_weight = samples[0]["pixel_weight"] is not None
    batch["pixel_weight"] = torch.stack([sample["pixel_weight"] for sample in samples]) if has_weight else None
    batch["names"] = [sample["name"] for sample in samples]
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# the loss and the learning rate


def weighted_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    loss: LossSettings,
    class_weights: list[float] | None,
    pixel_weight: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the weighted sum of the losses, in fp32.

    Args:
        logits: (B, C, H, W), any float type.
        targets: (B, H, W) classes, 255 where nothing counts.
        class_weights: one a class, or None.
        pixel_weight: float32 (B, H, W), which holds the class weights too, or None.
    """
    return semantic_loss(
        logits,
        targets.long(),
        cross_entropy=loss.cross_entropy,
        soft_iou=loss.soft_iou,
        log_iou=loss.log_iou,
        dice=loss.dice,
        tversky=loss.tversky,
        tversky_alpha=loss.tversky_alpha,
        focal=loss.focal,
        focal_gamma=loss.focal_gamma,
        class_weight=None if class_weights is None else torch.tensor(class_weights, device=logits.device),
        pixel_weight=pixel_weight,
    )


def scheduled_lr(step: int, steps: int, optim: OptimSettings) -> float:
    """Compute the learning rate of the update that follows `step` done ones: linear warm-up, then the schedule.

    Args:
        step: updates already done, 0..steps-1.
        steps: updates in the whole run.
    """
    if optim.schedule == "cosine" or step < optim.warmup_steps:
        return cosine_lr(step, steps, optim.lr, optim.warmup_steps, optim.min_lr_factor)
    since_warmup = step - optim.warmup_steps
    if optim.schedule == "step":
        return optim.lr * optim.step_factor ** (since_warmup // optim.step_every)
    if optim.schedule == "poly":
        left = 1 - min(1.0, since_warmup / max(1, steps - optim.warmup_steps))  # 1..0
        return optim.lr * (optim.min_lr_factor + (1 - optim.min_lr_factor) * left**optim.poly_power)
    return optim.lr  # constant


# ---------------------------------------------------------------------------------------------------------------------
# prediction of pictures of any size


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
            inside_y = slice(y.start - top, min(height, y.stop) - top)  # of the tile's output: what lies in the picture
            inside_x = slice(x.start - left, min(width, x.stop) - left)
            logits_sum[:, y, x] += (tile_logits * weight)[:, inside_y, inside_x]
            weight_sum[y, x] += weight[inside_y, inside_x]
    return logits_sum / weight_sum


@torch.no_grad()
def predict_picture(
    model: torch.nn.Module,
    image: np.ndarray,
    framing: Framing,
    margin: int,
    tile_hw: tuple[int, int],
    overlap: int,
    device: torch.device,
    precision: str,
) -> torch.Tensor:
    """Predict the classes of a picture at its own size.

    Args:
        image: uint8 (H, W, channels).
    Returns:
        float32 logits (num_classes, H, W) on the device. With framing.fit "resize" the network sees the picture at
        framing.image_size, and its logits are brought back to H x W bilinearly.
    """
    picture = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)  # (channels, H, W)
    if framing.fit == "resize":
        picture = transforms.resize(picture, [side - 2 * margin for side in framing.input_hw], antialias=True)
    with autocast(device, precision):
        logits = predict_tiled(model, picture.to(device).float() / 255, margin, tile_hw, overlap)
    if logits.shape[1:] != image.shape[:2]:
        logits = torch.nn.functional.interpolate(logits[None], image.shape[:2], mode="bilinear", align_corners=False)[0]
    return logits


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


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    items: list[Item],
    split: str,
    framing: Framing,
    margin: int,
    tile_hw: tuple[int, int],
    overlap: int,
    loss: LossSettings,
    class_weights: list[float] | None,
    device: torch.device,
    precision: str,
    samples_dir: Path | None,
    picture_images: int,
) -> tuple[dict[str, float], np.ndarray]:
    """Measure a model on every pixel of the items, one picture at a time, at its own size, unaugmented.

    Args:
        split: the metrics' prefix: val or test.
        samples_dir: where to put pictures (image, prediction, truth) of the first `picture_images` items.
    Returns:
        {"val/mean_iou": float, ...}, val/iou_<class> for the classes that occur; the confusion matrix, int64 (C, C),
        rows are the truth.
    """
    model.eval()
    names = items[0].coding.class_names
    matrix, losses, soft_ious = np.zeros((len(names), len(names)), np.int64), [], []
    for number, item in enumerate(tqdm(items, desc="evaluate", leave=False, disable=None)):
        image, class_map = read_item(item)
        logits = predict_picture(model, image, framing, margin, tile_hw, overlap, device, precision)
        target = torch.from_numpy(class_map).to(device)  # (H, W)
        pixel_weight = None
        if loss.border_weight > 0:
            pixel_weight = torch.from_numpy(border_weights(class_map, loss, class_weights)).to(device)[None]
        losses.append(weighted_loss(logits[None], target[None], loss, class_weights, pixel_weight).item())
        soft_ious.append(soft_iou(logits.softmax(0)[None], target[None].long()).item())
        pred = logits.argmax(0)  # (H, W)
        matrix += confusion_matrix(pred, target, len(names)).cpu().numpy()
        if samples_dir is not None and number < picture_images:
            picture = draw_sample(image, pred.cpu().numpy(), class_map, names)
            write_image(samples_dir / f"{item.name.replace('/', '_')}.png", picture)  # stems repeat across folders
    metrics = segmentation_metrics(matrix)
    values = {f"{split}/{name}": metrics[name] for name in REPORTED}
    values |= {f"{split}/soft_iou": float(np.mean(soft_ious)), f"{split}/loss": float(np.mean(losses))}
    for index, name in enumerate(names):
        if index not in metrics["absent"]:
            values[f"{split}/iou_{name}"] = float(metrics["class_iou"][index])
    return values | {f"{split}/num_images": len(items)}, matrix


def class_ids(class_map: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Number classes for colouring, (H, W) from 1; 0, which is left uncoloured: "background", and what is ignored."""
    ids = np.zeros(256, np.int64)
    ids[: len(names)] = [0 if name == "background" else index + 1 for index, name in enumerate(names)]
    return ids[class_map]


def draw_sample(image: np.ndarray, pred: np.ndarray, class_map: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Draw picture, prediction and truth side by side, with the classes' colours below: uint8, 384 px a side each."""
    image_rgb = np.broadcast_to(image, (*image.shape[:2], 3))
    panels = [image_rgb] + [overlay_label_map(image_rgb, class_ids(one, names)) for one in (pred, class_map)]
    scale = 384 / max(image_rgb.shape[:2])
    size_wh = (max(1, round(image_rgb.shape[1] * scale)), max(1, round(image_rgb.shape[0] * scale)))
    panels = [cv2.resize(np.ascontiguousarray(panel), size_wh, interpolation=cv2.INTER_AREA) for panel in panels]
    picture = np.concatenate(panels, 1)
    legend = np.full((16 * math.ceil(len(names) / 6) + 4, picture.shape[1], 3), 255, np.uint8)
    for index, name in enumerate(names):
        color = id_colors(class_ids(np.array([[index]]), names)[0])[0].tolist()
        x, y = index % 6 * picture.shape[1] // 6, 16 * (index // 6)
        cv2.rectangle(legend, (x + 4, y + 4), (x + 14, y + 14), color, -1 if any(color) else 1)  # uncoloured: hollow
        cv2.putText(legend, name[:24], (x + 18, y + 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([picture, legend])


def remarks_on_predictions(matrix: np.ndarray, names: tuple[str, ...], split: str) -> list[str]:
    """Say which classes are absent from the truth, and whether nearly all pixels are predicted to be of one class."""
    lines = []
    truth, predicted = matrix.sum(1), matrix.sum(0)
    if absent := [name for name, count in zip(names, truth, strict=True) if count == 0]:
        lines.append(f"no pixel of the {split} pictures is {', '.join(absent)}: left out of the means")
    largest = int(predicted.argmax())
    if predicted[largest] > ONE_CLASS_SHARE * predicted.sum():
        lines.append(
            f"warning: {predicted[largest] / predicted.sum():.2%} of all {split} pixels are predicted to be "
            f"{names[largest]} (in truth {truth[largest] / truth.sum():.2%}): train longer, or try "
            "loss.class_weights=auto, another loss, another optim.lr; check=true shows what the masks hold"
        )
    return lines


def majority_metrics(truth: np.ndarray, split: str) -> dict[str, float]:
    """Compute the metrics of a prediction that knows nothing: the most frequent class, everywhere.

    Args:
        truth: int (num_classes,), pixels of each class.
    """
    knows_nothing = np.zeros((len(truth), len(truth)), truth.dtype)
    knows_nothing[:, truth.argmax()] = truth
    metrics = segmentation_metrics(knows_nothing)
    return {f"{split}/{name}": metrics[name] for name in REPORTED}


def class_lines(matrix: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """Put the metrics of each class into lines to print."""
    metrics, truth = segmentation_metrics(matrix), matrix.sum(1)
    lines = [f"{'class':<24}{'share':>9}{'IoU':>9}{'Dice':>9}{'precision':>11}{'recall':>9}"]
    for index, name in enumerate(names):
        keys = ("class_iou", "class_dice", "class_precision", "class_recall")
        iou, dice, precision, recall = (metrics[key][index] for key in keys)
        share = truth[index] / max(1, truth.sum())
        lines.append(f"{name:<24}{share:>9.2%}{iou:>9.3f}{dice:>9.3f}{precision:>11.3f}{recall:>9.3f}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# the run


def check_settings(
    settings: Settings,
    framing: Framing,
    augmentation: Augmentation,
    loss: LossSettings,
    optim: OptimSettings,
) -> None:
    """Raise a ValueError for values that make no sense, naming the key, the value and what it must be."""
    selectable = [f"val/{name}" for name in REPORTED]
    names, schedules = ("adamw", "adam", "sgd"), ("constant", "step", "cosine", "poly")
    weights = (loss.cross_entropy, loss.soft_iou, loss.log_iou, loss.dice, loss.tversky, loss.focal)
    scale, class_weights, clip_norm = augmentation.scale, loss.class_weights, settings.clip_norm
    rules = [
        ("data.fit", framing.fit, framing.fit in ("resize", "crop"), "resize or crop"),
        ("data.scale", scale, len(scale) == 2 and 0 < scale[0] <= scale[1], "[lowest, highest], above 0"),
        ("data.rotation", augmentation.rotation, 0 <= augmentation.rotation <= 180, "between 0 and 180"),
        ("data.color_jitter", augmentation.color_jitter, 0 <= augmentation.color_jitter <= 1, "between 0 and 1"),
        ("data.elastic_px", augmentation.elastic_px, augmentation.elastic_px >= 0, "0 or more"),
        ("loss", "0 in all its terms", max(weights) > 0, "above 0 in one of them"),
        ("loss.class_weights", class_weights, not isinstance(class_weights, str) or class_weights == "auto",
         "auto, null, or a list"),
        ("loss.border_weight", loss.border_weight, loss.border_weight >= 0, "0 or more"),
        ("loss.border_sigma", loss.border_sigma, loss.border_sigma > 0, "above 0"),
        ("optim.name", optim.name, optim.name in names, "one of " + ", ".join(names)),
        ("optim.lr", optim.lr, optim.lr > 0, "above 0"),
        ("optim.betas", optim.betas, len(optim.betas) == 2, "two numbers"),
        ("optim.schedule", optim.schedule, optim.schedule in schedules, "one of " + ", ".join(schedules)),
        ("optim.step_every", optim.step_every, optim.step_every >= 1, "1 or more"),
        ("train.steps", settings.steps, settings.steps >= 0, "0 or more"),
        ("train.clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "null, or above 0"),
        ("train.select_by", settings.select_by, settings.select_by in selectable, "one of " + ", ".join(selectable)),
    ]  # fmt: skip
    for key in ("batch_size", "accumulate", "log_every", "eval_every", "save_every"):
        rules.append((f"train.{key}", getattr(settings, key), getattr(settings, key) >= 1, "1 or more"))
    for key in ("eval_images", "early_stop_evals"):
        value = getattr(settings, key)
        rules.append((f"train.{key}", value, value is None or value >= 1, "null, or 1 or more"))
    for name, value, is_good, remedy in rules:
        if not is_good:
            raise ValueError(f"{name} is {value}; must be {remedy}")


def check_size(name: str, size: int | list[int], margin: int) -> None:
    """Raise a ValueError for a size that no network, or not the unpadded one (margin above 0), can take."""
    if not isinstance(size, int) and len(size) != 2 or min(side_hw(size)) < 1:
        raise ValueError(f"{name} is {size}; must be a number of pixels, or [height, width]")
    for side in side_hw(size):
        if margin > 0 and not is_paper_input_size(side):
            nearest = " and ".join(str(near) for near in nearest_paper_input_sizes(side))
            raise ValueError(
                f"{name} is {size}; a side must be 16 k + 60 with k >= 8 for unet_paper: nearest are {nearest}"
            )


def check_tiles(tiles: TileSettings, margin: int) -> None:
    """Raise a ValueError for tiles that cannot cover a picture."""
    smallest = paper_input_size(20) if margin > 0 else tiles.overlap + 1
    if tiles.overlap < 0:
        raise ValueError(f"tiles.overlap is {tiles.overlap}; must be 0 or more")
    if tiles.size == "auto":
        return
    if isinstance(tiles.size, str):
        raise ValueError(f"tiles.size is {tiles.size}; must be auto, a number of pixels, or [height, width]")
    check_size("tiles.size", tiles.size, margin)
    if min(side_hw(tiles.size)) < smallest:
        raise ValueError(f"tiles.size is {tiles.size}; must be at least {smallest}, so that tiles advance")


def build_network(model_config: dict, in_channels: int, num_classes: int) -> torch.nn.Module:
    """Build a network with random weights from the values of a file of configs/unet/model.

    Raises:
        ValueError: for an unknown name, an unknown or missing key, or a value that makes no sense.
    """
    keys = dict(model_config)
    name = keys.pop("name")
    if name not in NETWORKS:
        raise ValueError(f"model.name is {name}; must be one of {', '.join(NETWORKS)}")
    network = functools.partial(NETWORKS[name], in_channels, num_classes)
    check_keys(network, keys, "model")
    return network(**keys)


def output_margin(model_config: dict) -> int:
    """Tell how many px of a network's input its output lacks on each side."""
    return PAPER_MARGIN if model_config["name"] == "unet_paper" else 0


def read_data_settings(data: dict) -> tuple[Framing, Augmentation, dict]:
    """Divide the section `data:` into this script's settings and the keys of the dataset reader."""
    reader_keys = dict(data)
    sections = []
    for cls in (Framing, Augmentation):
        ours = {key: reader_keys.pop(key) for key in cls.__dataclass_fields__ if key in reader_keys}
        sections.append(read_settings(cls, ours, "data"))
    return *sections, reader_keys


def list_splits(reader_keys: dict) -> dict[str, list[Item]]:
    """List the pictures of each split, {"train": items, "val": items, "test": items}; generate them if need be."""
    reader_keys = dict(reader_keys)
    generate = reader_keys.pop("generate", None)
    if generate is not None:
        reader_keys["root"] = write_samples(generate, reader_keys["root"])
    check_keys(split_items, reader_keys, "data")
    return dict(zip(("train", "val", "test"), split_items(**reader_keys), strict=True))


def check_data(
    splits: dict[str, list[Item]], on_bad: str, run_dir: Path, max_listed: int | None
) -> tuple[dict[str, list[Item]], dict[str, int], CheckReport]:
    """Check a dataset, print what was found, draw its statistics, and leave out what cannot be used.

    Args:
        on_bad: "stop" or "skip", what to do about faulty files.
        max_listed: examples printed for each kind of finding; None: all.
    Returns:
        the usable items of each split; the counts for run.json; the report.
    Raises:
        ValueError: for faulty files where on_bad is "stop".
    """
    report = check_items([item for items in splits.values() for item in items])
    print("\n".join(report_lines(report, max_listed)))
    plot_statistics(report, run_dir / "dataset.png")
    kept = {split: keep_usable(items, report, on_bad) for split, items in splits.items()}
    counts = report.counts | {f"{split}_images": len(items) for split, items in kept.items()}
    num_images = ", ".join(f"{split} {len(items)}" for split, items in kept.items())
    print(f"images: {num_images}; statistics in {run_dir / 'dataset.png'}")
    return kept, counts, report


def write_splits(splits: dict[str, list[Item]], splits_dir: Path) -> None:
    """Write which pictures are in which split, one name a line: <split>.txt."""
    splits_dir.mkdir()
    for split, items in splits.items():
        (splits_dir / f"{split}.txt").write_text("".join(f"{item.name}\n" for item in items), encoding="utf-8")


def choose_class_weights(
    class_weights: list[float] | str | None, items: list[Item], report: CheckReport
) -> list[float] | None:
    """Turn `loss.class_weights` into one weight for each class.

    Args:
        class_weights: a list, None, or "auto": every class the same total weight in the training pictures.
        items: the training pictures.
    Raises:
        ValueError: for a list that has not one weight, 0 or more, for each class.
    """
    num_classes = len(report.coding.class_names)
    if class_weights == "auto":
        return balanced_class_weights(class_frequencies(report, items)).tolist()
    if class_weights is not None and (len(class_weights) != num_classes or min(class_weights) < 0):
        raise ValueError(
            f"loss.class_weights is {class_weights}; must be {num_classes} numbers, one for each class, 0 or more"
        )
    return class_weights


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Group parameters by weight decay: none for biases, norms and embeddings."""
    groups = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        groups[0.0 if parameter.ndim <= 1 or name == "positions" else weight_decay].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]


def build_optimizer(model: torch.nn.Module, optim: OptimSettings) -> torch.optim.Optimizer:
    """Build the optimizer that `optim.name` names; its learning rate is set at each step."""
    groups = parameter_groups(model, optim.weight_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov)
    optimizer = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return optimizer(groups, lr=optim.lr, betas=tuple(optim.betas))


def print_table(start: dict, best: dict, last: dict, test: dict, majority: dict) -> None:
    """Print one row per metric: the most frequent class everywhere, before training, best checkpoint, last, test."""
    columns = f"{'majority':>10}{'step 0':>9}{'best':>9}{'last':>9}" + (f"{'test':>9}" if test else "")
    print(f"\n{'metric':<20}{columns}")
    for name in REPORTED:
        values = [majority[f"val/{name}"], *(one[f"val/{name}"] for one in (start, best, last))]
        shown = f"{values[0]:>10.3f}" + "".join(f"{value:>9.3f}" for value in values[1:])
        print(f"{name:<20}{shown}" + (f"{test[f'test/{name}']:>9.3f}" if test else ""))
    print(f"best checkpoint: step {best['step']}, chosen on {best['val/num_images']} validation images")


def train(config: dict, run_dir: Path, resume_path: Path | None) -> float:
    """Train as configured and return the best value of `train.select_by`.

    Args:
        config: the whole resolved config; of a resumed run, the stored one.
        run_dir: a new folder.
        resume_path: the last.pt to continue from, or None.
    """
    settings = read_settings(Settings, config["train"], "train")
    loss = read_settings(LossSettings, config["loss"], "loss")
    optim = read_settings(OptimSettings, config["optim"], "optim")
    tiles = read_settings(TileSettings, config["tiles"], "tiles")
    framing, augmentation, reader_keys = read_data_settings(config["data"])
    check_type(config["check"], bool, "check")
    margin = output_margin(config["model"])
    check_settings(settings, framing, augmentation, loss, optim)
    check_size("data.image_size", framing.image_size, margin)
    check_tiles(tiles, margin)
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    seed_everything(config["seed"])
    model = build_network(config["model"], reader_keys["channels"], reader_keys["num_classes"])  # a bad key ends here

    # data: list, check, leave out what cannot be used
    on_bad = reader_keys["on_bad"]
    if config["check"]:
        reader_keys["on_bad"] = "skip"  # so that pairs that lack a file are listed with all other faults
    splits = list_splits(reader_keys)
    splits, counts, report = check_data(splits, on_bad, run_dir, None if config["check"] else MAX_LISTED)
    if config["check"]:
        return float("nan")
    train_items, val_items, test_items = splits["train"], splits["val"][: settings.eval_images], splits["test"]
    if settings.steps > 0 and not train_items:
        raise ValueError(f"data.root {reader_keys['root']} has no training picture")
    if not val_items:
        raise ValueError(f"data.root {reader_keys['root']} has no validation picture: see data.val_fraction")
    class_names = val_items[0].coding.class_names
    class_weights = choose_class_weights(loss.class_weights, train_items or val_items, report)

    majority = majority_metrics(count_class_pixels(report, val_items), "val")
    start_run(run_dir, config, counts)
    write_splits(splits, run_dir / "splits")

    # model and optimizer
    model = model.to(device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    tile_hw = choose_tile(tiles, model, framing, margin, reader_keys["channels"], device)
    print(
        f"{config['model']['name']}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(class_names)} classes; {device}, {precision}"
    )
    optimizer = build_optimizer(model, optim)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if settings.compile:
        model.forward = torch.compile(model.forward)
    evaluation = (framing, margin, tile_hw, tiles.overlap, loss, class_weights, device, precision)

    is_resumed = resume_path is not None
    loop = resume_run(resume_path, run_dir, model, optimizer, scaler) if is_resumed else LoopState()
    log = MetricsLog(run_dir, loop.rows)
    description = {"script": "train_unet", "config": config, "class_weights": class_weights}
    save = functools.partial(save_run, run_dir, loop, model, optimizer, scaler, description)
    if is_resumed:
        save(is_best=False)  # from now on this folder can be resumed too

    dataset = AugmentedPairs(train_items, config["seed"], framing, augmentation, margin, loss, class_weights)
    images_per_step = settings.batch_size * settings.accumulate
    batches = load_batches(
        dataset,
        collate,
        loop.step * images_per_step,
        settings.steps * images_per_step,
        settings.batch_size,
        config["num_workers"],
        device,
    )
    progress = tqdm(total=settings.steps, initial=loop.step, desc="train", disable=None)
    window = SpeedWindow(loop.step)
    while True:
        # 1. evaluate and save
        is_last = loop.step >= settings.steps
        if (loop.step % settings.eval_every == 0 or is_last) and loop.step > loop.evaluated_step:
            samples_dir = run_dir / "samples" / f"step_{loop.step:06d}"
            samples_dir.mkdir(parents=True, exist_ok=True)
            with window.paused():  # speed is that of training alone
                metrics, matrix = evaluate(model, val_items, "val", *evaluation, samples_dir, settings.picture_images)
                tqdm.write(
                    f"step {loop.step}: " + "  ".join(f"{name} {metrics[f'val/{name}']:.3f}" for name in REPORTED)
                )
                if loop.step > 0:  # random weights often know one class alone
                    for line in remarks_on_predictions(matrix, class_names, "val"):
                        tqdm.write(line)
                log.log(loop.step, metrics)
                plot_curves(loop.rows, run_dir / "curves.png")
                save(is_best=loop.take(metrics, settings.select_by))
        elif loop.step % settings.save_every == 0:
            save(is_best=False)
        if settings.early_stop_evals is not None and loop.bad_evals >= settings.early_stop_evals:
            tqdm.write(f"early stop: {settings.select_by} has not risen in {loop.bad_evals} evaluations")
            break
        if is_last:
            break
        model.train()

        # 2. learning rate
        lr = scheduled_lr(loop.step, settings.steps, optim)
        for group in optimizer.param_groups:
            group["lr"] = lr

        step_loss, step_accuracy, step_names = 0.0, 0.0, []
        for _ in range(settings.accumulate):
            batch = window.next_batch(batches)
            step_names += batch["names"]
            batch = to_device(batch, device)
            images, targets = batch["images"].float() / 255, batch["targets"]  # (B, channels, h, w), (B, h', w')
            if settings.channels_last:
                images = images.to(memory_format=torch.channels_last)

            # 3. forward
            with autocast(device, precision):
                logits = model(images)  # (B, C, h', w')
            micro_loss = (
                weighted_loss(logits, targets, loss, class_weights, batch["pixel_weight"]) / settings.accumulate
            )
            step_loss += check_finite(micro_loss.item(), loop.step, f"pictures {', '.join(batch['names'])}")
            is_right, valid = logits.argmax(1) == targets, targets != IGNORE_INDEX  # (B, h', w')
            step_accuracy += (is_right.sum() / valid.sum().clamp(min=1)).item() / settings.accumulate

            # 4. backward and clip
            scaler.scale(micro_loss).backward()
        samples = f"pictures {', '.join(step_names)}"
        grad_norm = clip_gradients(model.parameters(), settings.clip_norm, optimizer, scaler, loop, samples)

        # 5. update (the scaler leaves out a step whose fp16 gradients overflowed)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loop.step += 1

        # 6. log
        means = running_means(loop.running, {"train/loss": step_loss, "train/pixel_accuracy": step_accuracy})
        progress.update()
        if loop.step % settings.log_every == 0 or loop.step == settings.steps:
            steps_per_s, wait_share = window.read(loop.step)
            images_per_s = steps_per_s * images_per_step
            values = {"train/grad_norm": grad_norm, "lr": lr, "skipped_steps": loop.num_skipped}
            speed = {"images_per_s": images_per_s, "data_wait_share": wait_share}
            log.log(loop.step, means | values | speed)
            progress.set_postfix_str(
                f"loss {means['train/loss']:.3f}, {images_per_s:.1f} images/s, waits for data {wait_share:.0%}"
            )

    progress.close()
    last = {"step": loop.step, **values_of_step(loop.rows, loop.evaluated_step)}
    plot_curves(loop.rows, run_dir / "curves.png")
    log.close()
    test: dict[str, float] = {}
    if settings.test_at_end and test_items:
        model.load_state_dict(load_checkpoint(run_dir / "best.pt")["model"])
        test, matrix = evaluate(model, test_items, "test", *evaluation, None, 0)
        print(
            "\n" + "\n".join([*class_lines(matrix, class_names), *remarks_on_predictions(matrix, class_names, "test")])
        )
    finish_run(
        run_dir, {"start": loop.start_metrics, "best": loop.best, "last": last, "test": test, "majority": majority}
    )
    print_table(loop.start_metrics, loop.best, last, test, majority)
    shown_dir, example = os.path.relpath(run_dir), os.path.relpath((test_items or val_items)[0].image_path)
    print(f"\nWritten to {shown_dir}. Next, predict a picture with it:")
    checkpoint = shlex.quote(f"checkpoint={shown_dir}/best.pt")
    print(f"  python train_unet.py mode=predict {checkpoint} {shlex.quote(f'input={example}')}")
    return loop.best[settings.select_by]


RESUMABLE = (
    "resume", "train.steps", "device", "num_workers", "data.root", "data.train_list", "data.val_list", "data.test_list",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# a finished network: evaluate, predict, summary


def load_network(config: dict, state: dict, device: torch.device) -> torch.nn.Module:
    """Rebuild the network of a checkpoint, in evaluation mode.

    Raises:
        ValueError: where the weights are not those of the model that the checkpoint's config names.
    """
    model = build_network(config["model"], config["data"]["channels"], config["data"]["num_classes"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:  # names each weight that is missing or has another shape
        raise ValueError(
            f"checkpoint {config['checkpoint']} does not hold the weights of its model {config['model']['name']}: "
            + " ".join(str(error).split())[:300]
        ) from error
    if config["train"]["channels_last"]:  # as it was trained: other layouts round differently
        model = model.to(memory_format=torch.channels_last)
    return model.to(device).eval()


def checkpoint_config(state: dict, current: dict, overrides: list[str]) -> dict:
    """Take the config of a checkpoint, with what the command line may change of it.

    Model, classes and how pictures are brought before the network are the checkpoint's; dataset, device, tiles and what
    to do are the command line's.

    Args:
        state: a checkpoint.
        current: composed from this command line.
        overrides: the command line's own, such as ["mode=evaluate", "data.root=..."].
    Raises:
        ValueError: for a checkpoint of another script, a key that has no effect, another model or other classes.
    """
    name, mode, stored = current["checkpoint"], current["mode"], state.get("config")
    if state.get("script") != "train_unet":
        raise ValueError(f"checkpoint {name} was not written by train_unet.py; give one of its best.pt")
    given = {override.split("=")[0].lstrip("+~").split("@")[0] for override in overrides}
    for key in sorted(given):
        if key.split(".")[0] in ("train", "optim", "loss", "resume", "check", "seed", "data_root"):
            instead = "; give data.root=<folder>" if key == "data_root" else ""
            raise ValueError(f"{key}= has no effect with mode={mode}; leave it out{instead}")
    if {"model", "experiment"} & {key.split(".")[0] for key in given} and current["model"] != stored["model"]:
        raise ValueError(
            f"checkpoint {name} is of the model {stored['model']}, not {current['model']}; leave out model="
        )
    data = dict(current["data"] if {"data", "experiment"} & given else stored["data"])
    for key in sorted(given):
        if key.startswith("data."):
            data[key.split(".")[1]] = current["data"][key.split(".")[1]]
    fixed = ("channels", "num_classes", *Framing.__dataclass_fields__)
    for key in fixed:
        if (f"data.{key}" in given or key == "num_classes") and data[key] != stored["data"][key]:
            raise ValueError(f"data.{key} is {data[key]}; checkpoint {name} was trained with {stored['data'][key]}")
    data |= {key: stored["data"][key] for key in fixed}
    keys = ("mode", "checkpoint", "split", "input", "probabilities", "device", "precision", "num_workers", "tiles")
    return stored | {key: current[key] for key in keys} | {"data": data}


def evaluate_checkpoint(config: dict, state: dict, run_dir: Path) -> float:
    """Measure a checkpoint on a split of its dataset, or of the one that the command line names; return mean IoU.

    Args:
        config: from `checkpoint_config`.
        state: the checkpoint.
        run_dir: where samples/, confusion.csv (rows: truth) and run.json are written.
    """
    settings = read_settings(Settings, config["train"], "train")
    loss = read_settings(LossSettings, config["loss"], "loss")
    tiles = read_settings(TileSettings, config["tiles"], "tiles")
    framing, _, reader_keys = read_data_settings(config["data"])
    margin, split = output_margin(config["model"]), config["split"]
    check_tiles(tiles, margin)
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    splits = list_splits(reader_keys)
    if split not in splits:
        raise ValueError(f"split is {split}; must be one of {', '.join(splits)}")
    if not splits[split]:
        raise ValueError(f"data.root {reader_keys['root']} has no picture in its {split} split")
    splits, counts, _ = check_data({split: splits[split]}, reader_keys["on_bad"], run_dir, MAX_LISTED)
    items = splits[split]
    model = load_network(config, state, device)
    tile_hw = choose_tile(tiles, model, framing, margin, reader_keys["channels"], device)
    start_run(run_dir, config, counts)
    write_splits(splits, run_dir / "splits")
    samples_dir = run_dir / "samples"
    samples_dir.mkdir()
    values, matrix = evaluate(
        model, items, split, framing, margin, tile_hw, tiles.overlap, loss, state["class_weights"], device, precision,
        samples_dir, settings.picture_images,
    )  # fmt: skip
    class_names, majority = items[0].coding.class_names, majority_metrics(matrix.sum(1), split)
    finish_run(run_dir, {"last": values, "majority": majority})
    np.savetxt(run_dir / "confusion.csv", matrix, "%d", ",", header=",".join(class_names), comments="")
    print("\n" + "\n".join([*class_lines(matrix, class_names), *remarks_on_predictions(matrix, class_names, split)]))
    print(f"\n{'metric':<24}{'majority':>10}{'measured':>10}")
    for name in majority:
        print(f"{name:<24}{majority[name]:>10.3f}{values[name]:>10.3f}")
    print(f"{len(items)} images; pictures and confusion.csv in {os.path.relpath(run_dir)}")
    return values[f"{split}/mean_iou"]


def predict(config: dict, state: dict, run_dir: Path) -> list[str]:
    """Predict all pictures of `input` and write class maps, overlays and, on request, probabilities.

    Args:
        config: from `checkpoint_config`.
        state: the checkpoint.
        run_dir: where everything is written.
    Returns:
        One line for each picture that cannot be read; always empty for a single picture, whose failure is raised.
    """
    tiles = read_settings(TileSettings, config["tiles"], "tiles")
    framing, _, reader_keys = read_data_settings(config["data"])
    margin, channels = output_margin(config["model"]), reader_keys["channels"]
    check_tiles(tiles, margin)
    check_type(config["probabilities"], bool, "probabilities")
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    class_names = tuple(name_classes(reader_keys["num_classes"], reader_keys["class_names"]))
    image_paths, is_folder = list_images(Path(config["input"])), Path(config["input"]).is_dir()
    model = load_network(config, state, device)
    tile_hw = choose_tile(tiles, model, framing, margin, channels, device)
    start_run(run_dir, config, {"images": len(image_paths)})

    failures, num_px = [], np.zeros(len(class_names), np.int64)
    names = output_names(image_paths)
    for name, path in zip(names, tqdm(image_paths, desc="predict", disable=not is_folder), strict=True):
        try:
            image = read_picture(path, channels)  # uint8 (H, W, channels)
        except (ValueError, FileNotFoundError) as error:
            if not is_folder:
                raise
            failures.append(f"{path}: {error}")
            continue
        logits = predict_picture(model, image, framing, margin, tile_hw, tiles.overlap, device, precision)
        pred = logits.argmax(0).to(torch.uint8).cpu().numpy()  # (H, W)
        num_px += np.bincount(pred.ravel(), minlength=len(class_names))
        image_rgb = np.broadcast_to(image, (*image.shape[:2], 3))
        write_image(run_dir / f"{name}_classes.png", pred)
        write_image(run_dir / f"{name}_overlay.png", overlay_label_map(image_rgb, class_ids(pred, class_names)))
        if config["probabilities"]:
            np.save(run_dir / f"{name}_probabilities.npy", logits.softmax(0).half().cpu().numpy())
    num_done = len(image_paths) - len(failures)
    finish_run(run_dir, {"last": {"num_images": num_done, "num_failed": len(failures)}})
    shares = ", ".join(
        f"{index} {name} {share:.1%}"
        for index, (name, share) in enumerate(zip(class_names, num_px / max(1, num_px.sum()), strict=True))
    )
    print(f"{num_done} pictures: {shares}")
    print(f"Written to {os.path.relpath(run_dir)}: *_classes.png (class indices), *_overlay.png")
    return failures


def print_summary(config: dict, state: dict | None) -> None:
    """Print what a network is made of and what it costs, for pictures of data.image_size.

    Args:
        config: composed, or from `checkpoint_config`.
        state: the checkpoint, or None for random weights.
    """
    device = choose_device(config["device"])
    precision = choose_precision(config["precision"], device)
    framing, _, reader_keys = read_data_settings(config["data"])
    channels = reader_keys["channels"]
    if state is None:
        model = build_network(config["model"], channels, reader_keys["num_classes"]).to(device).eval()
    else:
        model = load_network(config, state, device)
    print(format_summary(summarize(model, framing.input_hw, channels)))
    latency = measure_latency(model, framing.input_hw, channels, device, precision, LATENCY_REPEATS)
    print(f"latency on {device}, {precision}: p50 {latency.p50_ms:.1f} ms, p95 {latency.p95_ms:.1f} ms")


def check_mode(config: dict) -> None:
    """Refuse an unknown mode, a mode without its input, and input that the mode would not use."""
    if unknown := sorted(config.keys() - set(TOP_LEVEL_KEYS)):  # a preset can add keys, Hydra does not mind
        raise ValueError(f"unknown key {', '.join(unknown)} in the config; must be among {', '.join(TOP_LEVEL_KEYS)}")
    mode = config["mode"]
    if mode not in MODES:
        raise ValueError(f"mode is {mode}; must be one of {', '.join(MODES)}")
    for key, modes in (("checkpoint", ("evaluate", "predict", "summary")), ("input", ("predict",))):
        if config[key] is not None and mode not in modes:
            raise ValueError(
                f"{key}= is given but mode is {mode}, which does not use it: add mode={' or '.join(modes)}"
            )
        if config[key] is None and mode in modes and mode != "summary":
            what = "best.pt" if key == "checkpoint" else "a picture or a folder"
            raise ValueError(f"mode={mode} needs {key}=<{what}>")
    if config["resume"] is not None and mode != "train":
        raise ValueError(f"resume= is given but mode is {mode}, which does not use it: leave one of them out")


@hydra.main(version_base="1.3", config_path="configs/unet", config_name="train_unet")
def main(cfg) -> float | None:
    """Read the config, do what `mode` says, and end with one line on what went wrong and status 1, if anything did."""
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        check_mode(config)
        hydra_config = HydraConfig.get()
        run_dir, overrides = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
        if config["mode"] == "train":
            resume_path = None
            if config["resume"] is not None:
                resume_path = find_resume(config["resume"])
                config = resumed_config(load_checkpoint(resume_path)["config"], config, overrides, RESUMABLE)
            return train(config, run_dir, resume_path)
        state = None
        if config["checkpoint"] is not None:
            state = load_checkpoint(Path(config["checkpoint"]))
            config = checkpoint_config(state, config, overrides)
        if config["mode"] == "evaluate":
            return evaluate_checkpoint(config, state, run_dir)
        if config["mode"] == "summary":
            return print_summary(config, state)
        failures = predict(config, state, run_dir)
    except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
        logging.getLogger("train_unet").debug("where it was raised", exc_info=True)  # shown by hydra.verbose=true
        sys.exit(f"error: {describe_error(error)}")
    if failures:
        sys.exit(f"{len(failures)} pictures failed:\n" + "\n".join(f"  {line}" for line in failures))


if __name__ == "__main__":
    main()
