"""Train U-Net and its relatives on pictures with one class per pixel, read straight from disk; evaluate and predict.

    python train_unet.py                                           # generated pets, a small U-Net, on a CPU
    python train_unet.py model=segnet data=oxford_pet data.root=/my/oxford-iiit-pet
    python train_unet.py check=true data=folders data.root=/my/dataset       # look at a dataset and stop
    python train_unet.py data=instances data.format=labelme data.root=/my/labels  # annotated objects as class maps
    python train_unet.py check=fit data=folders data.root=/my/dataset        # does it fit the memory, how fast is it
    python train_unet.py mode=evaluate checkpoint=best.pt split=test
    python train_unet.py mode=predict checkpoint=best.pt input=photos/       # a picture or a folder, of any size
    python train_unet.py mode=summary model=segnet_dsc             # layers, parameters, multiply-adds, latency
    python train_unet.py mode=export checkpoint=best.pt            # an ONNX file (pip install onnx onnxruntime)
    python train_unet.py resume=outputs/train_unet/<run>           # continue a killed run, exactly
    python train_unet.py --cfg job                                 # print every knob with its value

Reads   pictures and class maps: data=oxford_pet|isbi|camvid|folders, or pictures with annotated objects, of which the
        maps are drawn: data=instances data.format=coco|labelme|yolo|cvat|voc|... (data/README.md).
Writes  outputs/train_unet/<time>/: best.pt (rebuilds its own model), last.pt (to resume), metrics.csv, curves.png,
        samples/ (picture, prediction, truth), splits/, dataset.png, tensorboard/, run.json; mode=evaluate: such samples
        and confusion.csv; mode=predict: for each picture
        <name>_classes.png (class indices), <name>_overlay.png, on request <name>_probabilities.npy;
        mode=export: <model>.onnx, of dynamic batch, height and width, and README.md: input, output, tiles.
        A picture that cannot be read is named at the end, the others are done, and the exit status is 1.
Metrics, from one confusion matrix over all pixels of the validation set (test/...: of the test set), each picture at
its own size, classes that are not there left out:
    val/mean_iou         mean over classes of the intersection over union (val/weighted_iou: weighted by frequency)
    val/pixel_accuracy   share of the pixels whose class is right
    val/dice             mean over classes of the Dice coefficient
    val/soft_iou         mean over pictures of the soft IoU of probabilities, as in the series named below
    val/loss             the training loss on the whole pictures
    val/v_rand           V_rand after thinning, where a class separates objects (data.boundary_class): pairs of pixels
                         that are in one object in truth and prediction, the highest over nine thresholds
    train/loss, train/pixel_accuracy    running means over training steps (bias-corrected, 0.99)
Sources: Ronneberger et al. 2015 (U-Net); Matani and Naresh 2023, "Efficient Image Segmentation Using PyTorch".
"""

import signal
import sys

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):  # before the imports below, which take seconds
        print(__doc__)
        sys.exit()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends at once, up to read_command_line

import csv
import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import cv2
import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.utils.data import Dataset
from tqdm import tqdm

from utils import fit, onnx_files, ranks, run
from utils import loop as loops
from utils import settings as sections
from utils.checkpoint import (
    check_script,
    config_to_resume,
    find_resume,
    find_weights,
    load_checkpoint,
    load_run,
    stored_config,
)
from utils.dataset_check import CheckReport
from utils.images import IGNORE_INDEX, list_pictures, overlay_label_map, write_image
from utils.log import (
    MetricsLog,
    drawing,
    finish_run,
    metric_lines,
    plot_curves,
    start_run,
    values_of_step,
    write_pictures,
)
from utils.samples.write import write_samples
from utils.segmentation import export, losses, metrics, model_summary, prediction, reports, views
from utils.segmentation.check import check_data, count_class_pixels, remark_on_parts, stop_at_one_class
from utils.segmentation.objects import BACKGROUND
from utils.segmentation.readers import (
    Item,
    check_channels,
    find_classes,
    name_classes,
    read_item,
    read_picture,
    split_items,
    split_objects,
)
from utils.segmentation.segmenters import FCN, DeepLabV3, SegNet, ViTSegmenter
from utils.segmentation.unet import PAPER_MARGIN, PAPER_SIZE, UNet, UNetPaper
from utils.settings import (
    FINITE,
    SAME_SECTION,
    CommonSettings,
    Rule,
    above,
    at_least,
    between,
    check_keys,
    one_of,
    read_settings,
)

NETWORKS = {
    "unet_paper": UNetPaper,
    "unet": UNet,
    "fcn": FCN,
    "segnet": SegNet,
    "vit": ViTSegmenter,
    "deeplabv3": DeepLabV3,
}
TERMS = {  # summed in this order; inputs: logits (B, C, H, W), targets (B, H, W), the classes' weights (C,) or None
    "cross_entropy": lambda inputs, pixel_weight, knobs: losses.cross_entropy_loss(*inputs, pixel_weight),
    "focal": lambda inputs, pixel_weight, knobs: losses.focal_loss(*inputs, pixel_weight, knobs.focal_gamma),
    "soft_iou": lambda inputs, pixel_weight, knobs: losses.soft_iou_loss(*inputs),
    "log_iou": lambda inputs, pixel_weight, knobs: losses.log_iou_loss(*inputs),
    "dice": lambda inputs, pixel_weight, knobs: losses.dice_loss(*inputs),
    "tversky": lambda inputs, pixel_weight, knobs: losses.tversky_loss(*inputs, knobs.tversky_alpha),
}
WEIGHTS = Rule(
    lambda value: value == "auto" or isinstance(value, list) and min(value, default=0) >= 0 < sum(value) < float("inf"),
    "auto, or a list of finite numbers, 0 or more, not all 0",
)
BELOW_ONE = Rule(lambda number: 0 <= number < 1, "0 or more and below 1")
TWO_BELOW_ONE = Rule(lambda pair: len(pair) == 2 and all(map(BELOW_ONE.holds, pair)), "two numbers, each 0..1, below 1")
LATENCY_REPEATS = 30
MODES_OF_KEY = {
    "checkpoint": ("evaluate", "predict", "summary", "export"), "input": ("predict",), "resume": ("train",),
    "check": ("train",), "split": ("evaluate",), "probabilities": ("predict", "export"),
}  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """Knobs of the training loop (`train:` in configs/unet/train_unet.yaml, which explains each)."""

    steps: Annotated[int, at_least(0)]
    batch_size: Annotated[int, at_least(1)]  # images per forward
    accumulate: Annotated[int, at_least(1)]  # forwards per step
    clip_norm: Annotated[float | None, above(0)]
    channels_last: bool
    compile: bool
    log_every: Annotated[int, at_least(1)]  # steps
    eval_every: Annotated[int, at_least(1)]  # steps
    save_every: Annotated[int, at_least(1)]  # steps
    eval_images: Annotated[int | None, at_least(1)]
    select_by: Annotated[str, one_of(*(f"val/{name}" for name in reports.REPORTED))]
    early_stop_evals: Annotated[int | None, at_least(1)]
    test_at_end: bool
    picture_images: Annotated[int, at_least(0)]


@dataclass(frozen=True)
class DataSettings:
    """How pictures are brought before the network and varied, and the keys of the dataset's reader (`data:`)."""

    framing: Annotated[views.Framing, SAME_SECTION]
    augmentation: Annotated[views.Augmentation, SAME_SECTION]
    reader_keys: Annotated[dict, sections.ALL_OTHERS]


@dataclass(frozen=True)
class LossSettings:
    """The loss (`loss:`, configs/unet/loss/*.yaml)."""

    terms: dict  # {a name in TERMS: its weight}
    tversky_alpha: Annotated[float, between(0, 1)]
    focal_gamma: Annotated[float, at_least(0), FINITE]
    # one a class; auto: from the frequencies in the training set, see `weigh_classes`
    class_weights: Annotated[list[float] | str | None, WEIGHTS]
    border_weight: Annotated[float, at_least(0), FINITE]  # w0 of the paper's weight map; 0: none
    border_sigma: Annotated[float, above(0), FINITE]  # px

    def __post_init__(self):
        sections.check_terms(self.terms, TERMS)


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer and schedule (`optim:`, configs/unet/optim/*.yaml)."""

    name: Annotated[str, one_of("adamw", "adam", "sgd")]
    lr: Annotated[float, above(0), FINITE]  # highest
    betas: Annotated[list[float], TWO_BELOW_ONE]  # adam, adamw
    momentum: Annotated[float, BELOW_ONE]  # sgd
    weight_decay: Annotated[float, at_least(0), FINITE]  # 0 for biases, norms and embeddings
    schedule: Annotated[str, one_of("constant", "cosine", "poly")]
    warmup_steps: Annotated[int, at_least(0)]
    min_lr_factor: Annotated[float, between(0, 1)]  # cosine, poly: the rate at the last step, as a share of lr
    poly_power: Annotated[float, above(0), FINITE]


@dataclass(frozen=True)
class Config:
    """All keys of this script (configs/unet/train_unet.yaml explains each)."""

    common: Annotated[CommonSettings, SAME_SECTION]
    mode: Annotated[str, one_of("train", "evaluate", "predict", "summary", "export")]
    check: fit.Check
    checkpoint: str | None
    split: str  # train, val or test
    input: str | None
    probabilities: bool
    model: dict  # name, and what that network takes
    data: DataSettings
    loss: LossSettings
    optim: OptimSettings
    train: TrainSettings
    tiles: prediction.TileSettings

    def __post_init__(self):
        margin = output_margin(self.model)
        views.check_size("data.image_size", self.data.framing.image_size, margin)
        prediction.check_tiles(self.tiles, margin)


# ---------------------------------------------------------------------------------------------------------------------
# disk -> tensors


def border_weights(class_map: np.ndarray, loss_settings: LossSettings) -> torch.Tensor | None:
    """Compute the weight of each pixel: its class's, and the paper's more in narrow gaps between objects of class 1.

    Args:
        class_map: uint8 (H, W); the connected parts of class 1 are the objects.
        loss_settings: from `weigh_classes`.
    Returns:
        float32 (H, W); None without border_weight.
    """
    if loss_settings.border_weight == 0:
        return None
    weight_of_class = np.ones(256, np.float32)
    if loss_settings.class_weights is not None:
        weight_of_class[: len(loss_settings.class_weights)] = loss_settings.class_weights
    _, instances = cv2.connectedComponents((class_map == 1).astype(np.uint8), connectivity=4)
    extra = losses.border_weight_map(instances, loss_settings.border_weight, loss_settings.border_sigma)
    return torch.from_numpy(weight_of_class[class_map] + extra)


@dataclass(frozen=True)
class AugmentedPairs(Dataset):
    """Training samples: a picture and its class map, varied alike. A sample is a function of (seed, sample_index)."""

    items: list[Item]
    seed: int
    data_settings: DataSettings
    margin: int  # px of the network's input that its output lacks on each side
    loss_settings: LossSettings  # from `weigh_classes`

    def __getitem__(self, sample_index: int) -> dict:
        """Read a pair and vary it.

        Returns:
            image uint8 (channels, h, w); target uint8 (h', w'), smaller for an unpadded network; pixel_weight float32
            (h', w'), or None without border_weight; name: the picture's file.
        """
        item_number = run.shuffled_item(self.seed, sample_index, len(self.items))
        item = self.items[item_number]
        rng = run.sample_rng(self.seed, sample_index)
        framing, augmentation = self.data_settings.framing, self.data_settings.augmentation
        image, target = views.training_view(*read_item(item), framing, augmentation, self.margin, rng)
        pixel_weight = border_weights(target.numpy(), self.loss_settings)
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
    loss_settings: LossSettings,
    pixel_weight: torch.Tensor | None,
) -> torch.Tensor:
    """Sum the terms of the loss, each times its weight, in fp32.

    Args:
        logits: (B, C, H, W), any float type.
        targets: (B, H, W) classes, 255 where nothing counts.
        loss_settings: from `weigh_classes`.
        pixel_weight: float32 (B, H, W), which holds the class weights too, or None.
    """
    class_weight = loss_settings.class_weights
    if class_weight is not None:
        class_weight = torch.tensor(class_weight, device=logits.device)
    total = torch.zeros((), device=logits.device)
    for name, term in TERMS.items():
        if weight := loss_settings.terms.get(name, 0):
            total = total + weight * term((logits, targets, class_weight), pixel_weight, loss_settings)
    return total


def scheduled_lr(step: int, steps: int, optim: OptimSettings) -> float:
    """Compute the learning rate of the update that follows `step` done ones: linear warm-up, then the schedule.

    Args:
        step: updates already done, 0..steps-1.
        steps: updates in the whole run.
    """
    if optim.schedule == "cosine" or step < optim.warmup_steps:
        return run.cosine_lr(step, steps, optim.lr, optim.warmup_steps, optim.min_lr_factor)
    if optim.schedule == "poly":
        since_warmup = step - optim.warmup_steps
        left = 1 - min(1.0, since_warmup / max(1, steps - optim.warmup_steps))  # 1..0
        return optim.lr * (optim.min_lr_factor + (1 - optim.min_lr_factor) * left**optim.poly_power)
    return optim.lr  # constant


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def to_floats(values: list[torch.Tensor]) -> list[float]:
    """Read values of one element each off the device, waiting for it once."""
    return torch.stack([value.flatten()[0] for value in values]).tolist() if values else []


@torch.no_grad()
def evaluate(
    predictor: prediction.Predictor,
    items: list[Item],
    split: str,
    loss_settings: LossSettings,
    samples_dir: Path | None,
    picture_images: int,
) -> tuple[dict[str, float], np.ndarray]:
    """Measure a model on every pixel of the items, one picture at a time, at its own size, unaugmented.

    Where several processes train, each measures its share of the pictures.

    Args:
        split: the metrics' prefix: val or test.
        loss_settings: from `weigh_classes`.
        samples_dir: where to put pictures (image, prediction, truth) of the first `picture_images` items, if any.
    Returns:
        {"val/mean_iou": float, ...}, val/iou_<class> for the classes that occur, val/v_rand where a class separates
        objects (data.boundary_class); the confusion matrix, int64 (C, C), rows are the truth.
    """
    predictor.model.eval()
    names, boundary = items[0].coding.class_names, items[0].coding.boundary
    matrix = torch.zeros(len(names), len(names), dtype=torch.int64, device=predictor.device)
    loss_values, soft_ious = [], []  # on the device up to the end, as the matrix: it alone waits for it at each picture
    rand_scores, drawn = [], []  # of each picture: V_rand (9,); what is drawn of it, or None
    for number, item in tqdm(ranks.share(items), desc="evaluate", leave=False, disable=None):
        image, class_map = read_item(item)
        logits = predictor.predict(image)  # (C, H, W)
        target = torch.from_numpy(class_map).to(predictor.device)  # (H, W)
        pixel_weight = border_weights(class_map, loss_settings)  # (H, W) or None
        pixel_weight = None if pixel_weight is None else pixel_weight[None]
        loss_values.append(weighted_loss(logits[None], target[None], loss_settings, pixel_weight))  # ()
        probs = logits.softmax(0)  # (C, H, W)
        soft_ious.append(metrics.soft_iou(probs[None], target[None].long()))  # (1,)
        if boundary is not None:
            rand_scores.append(metrics.rand_scores(probs[boundary].float().cpu().numpy(), class_map, boundary))  # (9,)
        pred = logits.argmax(0)  # (H, W)
        matrix = matrix + metrics.confusion_matrix(pred, target, len(names))
        drawn.append(None)
        if number < picture_images:
            with drawing(item.name):
                drawn[-1] = reports.draw_sample(image, pred.cpu().numpy(), class_map, names)
    write_pictures(samples_dir, [item.name for item in items], ranks.gather(drawn))
    loss_values, soft_ious, rand_scores = map(ranks.gather, (to_floats(loss_values), to_floats(soft_ious), rand_scores))
    matrix = ranks.add(matrix).cpu().numpy()
    measured = metrics.segmentation_metrics(matrix)
    values = {f"{split}/{name}": measured[name] for name in reports.REPORTED}
    values[f"{split}/soft_iou"] = float(np.mean(soft_ious))
    values[f"{split}/loss"] = float(np.mean(loss_values))
    if boundary is not None and not np.isnan(rand_scores).all():
        values[f"{split}/v_rand"] = float(np.nanmean(rand_scores, 0).max())  # at one threshold for all pictures
    for index, name in enumerate(names):
        if index not in measured["absent"]:
            values[f"{split}/iou_{name}"] = float(measured["class_iou"][index])
    return values | {f"{split}/num_images": len(items)}, matrix


# ---------------------------------------------------------------------------------------------------------------------
# the run


def build_network(
    model_config: dict, in_channels: int, num_classes: int, may_download: bool = False
) -> torch.nn.Module:
    """Build a network from the values of a file of configs/unet/model.

    Args:
        may_download: take published weights where `model.pretrained` asks for them; otherwise weights are random.
    Raises:
        ValueError: for an unknown name, an unknown or missing key, or a value that makes no sense.
    """
    check_channels(in_channels)
    name_classes(num_classes, None)  # raises for a number that cannot be
    keys = dict(model_config)
    name = keys.pop("name")
    if name not in [*NETWORKS]:  # a list, for one, cannot be looked up
        raise ValueError(f"model.name is {name}; must be one of {', '.join(NETWORKS)}")
    network = functools.partial(NETWORKS[name], in_channels, num_classes)
    check_keys(network, keys, "model")
    if "pretrained" in keys and not may_download:
        keys["pretrained"] = False
    return network(**keys)


def output_margin(model_config: dict) -> int:
    """Tell how many px of a network's input its output lacks on each side."""
    return PAPER_MARGIN if model_config["name"] == "unet_paper" else 0


def fix_classes(config: dict) -> dict:
    """Put in the place of null the classes that the files of data=instances have; all other data YAMLs say theirs."""
    if "classes" not in config["data"]:
        return config
    reader_keys = read_settings(Config, config).data.reader_keys
    return config | {"data": config["data"] | ranks.from_first(functools.partial(find_classes, reader_keys))}


def fix_tiles(config: dict) -> dict:
    """Put numbers in the place of tiles.size "auto": they follow from the network and data.image_size alone."""
    settings = read_settings(Config, config)
    model, channels = build_shapes(settings), settings.data.reader_keys["channels"]
    margin = output_margin(settings.model)
    tile_hw = prediction.choose_tile(settings.tiles, model, settings.data.framing, margin, channels)
    return config | {"tiles": config["tiles"] | {"size": list(tile_hw)}}


def keep_stored_classes(config: dict) -> dict:
    """Take the classes of the run that `resume` names for data=instances: a class that came since is none of its."""
    is_open = "classes" in config["data"] and config["data"]["classes"] is None
    if config["resume"] is None or not is_open:
        return config
    stored_data = load_run(find_resume(config["resume"]), "train_unet")["config"]["data"]
    if "classes" not in stored_data:  # of another kind of dataset
        return config
    kept = {key: stored_data[key] for key in ("classes", "num_classes", "class_names")}
    return config | {"data": config["data"] | kept}


def fix_values(config: dict) -> dict:
    """Put in place what follows from the dataset, the network and data.image_size: the values that a run keeps."""
    return fix_tiles(fix_classes(config))


def build_shapes(settings: Config) -> torch.nn.Module:
    """Build the network without values (device "meta"), to ask what sizes it has; draws no random number."""
    with torch.device("meta"):
        return build_network(
            settings.model, settings.data.reader_keys["channels"], settings.data.reader_keys["num_classes"]
        )


def check_batch(settings: Config, device: torch.device) -> None:
    """Raise a ValueError where a batch is too small for batch norm: a mean over one value is that value."""
    size, framing = settings.train.batch_size, settings.data.framing
    if device.type != "cuda":  # where several processes normalise all together
        size = ranks.own_size("train.batch_size", size)
    images = torch.empty(size, settings.data.reader_keys["channels"], *framing.input_hw, device="meta")
    try:
        with torch.no_grad():
            build_shapes(settings).train()(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        of_each = " in each process" if size < settings.train.batch_size else ""
        raise ValueError(
            f"train.batch_size is {size}{of_each} and data.image_size {framing.image_size}, of which "
            f"{settings.model['name']} leaves one value a channel, too few for its batch norm; one of them must be "
            "larger"
        ) from error


def list_splits(reader_keys: dict) -> dict[str, list[Item]]:
    """List the pictures of each split, {"train": items, "val": items, "test": items}; generate them if need be."""
    reader_keys = dict(reader_keys)
    generate = reader_keys.pop("generate", None)
    if generate is not None:
        reader_keys["root"] = str(write_samples(generate, reader_keys["root"]))
    split = split_objects if "classes" in reader_keys else split_items
    check_keys(split, reader_keys, "data")
    return dict(zip(("train", "val", "test"), split(**reader_keys), strict=True))


def write_splits(splits: dict[str, list[Item]], splits_dir: Path) -> None:
    """Write which pictures are in which split, one name a line: <split>.txt."""
    splits_dir.mkdir()
    for split, items in splits.items():
        (splits_dir / f"{split}.txt").write_text("".join(f"{item.name}\n" for item in items), encoding="utf-8")


def weigh_classes(loss_settings: LossSettings, items: list[Item], report: CheckReport) -> LossSettings:
    """Put one weight for each class in the place of class_weights "auto": every class the same total weight.

    Args:
        items: the training pictures.
    Returns:
        the settings with class_weights a list, one a class, or None: 1.
    Raises:
        ValueError: for a list that has not one weight for each class.
    """
    class_weights, num_classes = loss_settings.class_weights, len(items[0].coding.class_names)
    if class_weights == "auto":
        class_pixels = count_class_pixels(report, items)
        class_weights = losses.balanced_class_weights(class_pixels / class_pixels.sum()).tolist()
    if class_weights is not None and len(class_weights) != num_classes:
        raise ValueError(f"loss.class_weights is {class_weights}; must be {num_classes} numbers, one for each class")
    return replace(loss_settings, class_weights=class_weights)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Group parameters by weight decay: none for biases, norms and embeddings."""
    groups = {weight_decay: [], 0.0: []}
    no_decay = getattr(model, "no_decay", ())
    for name, parameter in model.named_parameters():
        groups[0.0 if parameter.ndim <= 1 or name in no_decay else weight_decay].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]


def build_optimizer(model: torch.nn.Module, optim: OptimSettings) -> torch.optim.Optimizer:
    """Build the optimizer that `optim.name` names; its learning rate is set at each step."""
    groups = parameter_groups(model, optim.weight_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    optimizer = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return optimizer(groups, lr=optim.lr, betas=tuple(optim.betas))


def build_predictor(
    settings: Config, model: torch.nn.Module, device: torch.device, precision: str
) -> prediction.Predictor:
    """Make what predicts pictures of any size with a network on the device; precision: fp32, bf16 or fp16."""
    framing, margin = settings.data.framing, output_margin(settings.model)
    channels = settings.data.reader_keys["channels"]
    tile_hw = prediction.choose_tile(settings.tiles, model, framing, margin, channels)
    at_once = prediction.count_tiles_at_once(model, framing, channels, tile_hw, device)
    return prediction.Predictor(model, framing, margin, tile_hw, settings.tiles.overlap, device, precision, at_once)


def list_data(
    settings: Config, run_dir: Path, resume_path: Path | None
) -> tuple[dict[str, list[Item]], dict[str, int], CheckReport]:
    """List the pictures of each split, check them, and leave out what cannot be used; check=fit leaves the largest.

    Returns:
        {"train": items, "val": items, "test": items}, counts for the run's record, and the check's report.
    Raises:
        FileNotFoundError, ValueError: as `list_splits`, `check_data`, `stop_at_one_class` and `keep_splits`, and for a
            split without a picture.
    """
    reader_keys, is_check = settings.data.reader_keys, settings.check is True
    # a check lists pairs that lack a file with all other faults
    splits = list_splits(reader_keys | ({"on_bad": "skip"} if is_check else {}))
    stored = loops.stored_splits(resume_path)
    splits = loops.keep_splits(stored, splits)
    splits, counts, report = check_data(splits, reader_keys["on_bad"], run_dir, list_all=is_check)
    stop_at_one_class(report)
    splits = loops.keep_splits(stored, splits)  # what the run had is usable still
    remarks = remark_on_parts(report, splits["train"], splits["val"][: settings.train.eval_images])
    print("".join(f"{line}\n" for line in remarks), end="")
    if is_check:
        return splits, counts, report
    if (settings.train.steps > 0 or settings.check == "fit") and not splits["train"]:
        raise ValueError(f"data.root {reader_keys['root']} has no training picture")
    if not splits["val"]:
        raise ValueError(f"data.root {reader_keys['root']} has no validation picture: see data.val_fraction")
    if settings.check == "fit":
        sizes = {item.name: item.orig_hw for item in report.usable}
        largest = max(splits["train"], key=lambda item: sizes[item.name][0] * sizes[item.name][1])
        (height, width), framing = sizes[largest.name], settings.data.framing
        print(f"the largest training picture: {largest.image_path}, {height} x {width} px; {framing.fit} to "
              f"{framing.input_hw[0]} x {framing.input_hw[1]} px")  # fmt: skip
        splits["train"] = [largest]
    return splits, counts, report


def list_changes(settings: Config) -> list[fit.Change]:
    """List what needs less memory than a config, the gentlest first: changes for check=fit to try."""
    train_settings, size = settings.train, settings.data.framing.image_size
    changes = []
    if train_settings.batch_size > 1:
        changes.append(
            {"train.batch_size": 1, "train.accumulate": train_settings.accumulate * train_settings.batch_size}
        )
    changes.append({"data.image_size": size // 2 if isinstance(size, int) else [side // 2 for side in size]})
    if channels := settings.model.get("base_channels"):
        changes.append({"model.base_channels": channels // 2})
    return changes


def train(config: dict, run_dir: Path, resume_path: Path | None, data: tuple | None = None) -> float | dict:
    """Train as configured and return the best value of `train.select_by`; with check=fit the last row of the metrics.

    Args:
        config: the whole resolved config; of a resumed run, the stored one.
        run_dir: a new folder.
        resume_path: the last.pt to continue from, or None.
        data: what `list_data` returned; None: list it.
    """
    config = fix_values(config)
    settings = read_settings(Config, config)
    common, train_settings, reader_keys = settings.common, settings.train, settings.data.reader_keys
    device, precision = run.set_up_device(common.device, common.precision)
    ranks.own_size("train.batch_size", train_settings.batch_size)  # raises before anything takes time
    run.seed_everything(common.seed)
    takes_border = settings.loss.terms.get("cross_entropy", 0) > 0 or settings.loss.terms.get("focal", 0) > 0
    if settings.loss.border_weight > 0 and not takes_border and resume_path is None:  # an older run may go on
        raise ValueError(
            f"loss.border_weight is {settings.loss.border_weight}, but cross_entropy and focal alone take it, and "
            "loss.terms has neither; add one, or set it to 0"
        )
    if train_settings.steps > 0 and settings.check is not True:
        check_batch(settings, device)
    is_new = resume_path is None and not settings.check  # other weights than a checkpoint's may be asked for
    channels, num_classes = reader_keys["channels"], reader_keys["num_classes"]
    model = ranks.after_first(functools.partial(build_network, settings.model, channels, num_classes, is_new))

    # data: list, check, leave out what cannot be used
    data = data or ranks.from_first(functools.partial(list_data, settings, run_dir, resume_path))
    splits, counts, report = data
    if settings.check is True:
        return float("nan")
    train_items, val_items, test_items = splits["train"], splits["val"][: train_settings.eval_images], splits["test"]
    class_names = val_items[0].coding.class_names
    loss_settings = weigh_classes(settings.loss, train_items or val_items, report)

    majority = reports.majority_metrics(count_class_pixels(report, val_items), "val")
    start_run(run_dir, config, counts)
    if ranks.is_first():
        write_splits(splits, run_dir / "splits")

    # model and optimizer
    model = ranks.synchronize_norms(model.to(device), device)
    is_channels_last = run.choose_channels_last(train_settings.channels_last, device)
    if is_channels_last:
        model = model.to(memory_format=torch.channels_last)
    predictor = build_predictor(settings, model, device, precision)
    print(
        f"{settings.model['name']}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(class_names)} classes; {device}, {precision}; loss: {sections.describe_terms(loss_settings.terms)}"
    )
    if ranks.count() > 1:
        print(
            "losses of a whole batch (dice, tversky, class weights, ignored pixels) are those of each process's share; "
            "the step's loss is their mean"
        )
    optimizer = build_optimizer(model, settings.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    forward = run.compile_forward(model, device) if train_settings.compile else model

    is_resumed = resume_path is not None
    loop = loops.resume_run(resume_path, run_dir, model, optimizer, scaler) if is_resumed else loops.LoopState()
    log = MetricsLog(run_dir, loop.rows)
    description = {"script": "train_unet", "config": config, "class_weights": loss_settings.class_weights}
    names = loops.split_names(splits)
    save = functools.partial(loops.save_run, run_dir, loop, model, optimizer, scaler, description, names)
    if is_resumed:
        save(is_best=False)  # from now on this folder can be resumed too

    dataset = AugmentedPairs(train_items, common.seed, settings.data, output_margin(settings.model), loss_settings)
    images_per_step = train_settings.batch_size * train_settings.accumulate
    first_sample, stop = loop.step * images_per_step, train_settings.steps * images_per_step
    batches = loops.load_batches(
        dataset, collate, first_sample, stop, train_settings.batch_size, common.num_workers, device
    )
    progress = tqdm(total=train_settings.steps, initial=loop.step, desc="train", disable=None)
    window = loops.SpeedWindow(loop.step)
    while True:
        # 1. evaluate and save
        is_last = loop.step >= train_settings.steps
        if settings.check == "fit":
            pass  # some steps, to see what they take
        elif (loop.step % train_settings.eval_every == 0 or is_last) and loop.step > loop.evaluated_step:
            samples_dir = run_dir / "samples" / f"step_{loop.step:06d}"
            with window.paused():  # speed is that of training alone
                ranks.send_buffers(model)
                values, matrix = evaluate(
                    predictor, val_items, "val", loss_settings, samples_dir, train_settings.picture_images
                )
                shown = "  ".join(f"{name} {values[f'val/{name}']:.3f}" for name in reports.names_shown(values))
                tqdm.write(f"step {loop.step}: {shown}")
                if loop.step > 0:  # random weights often know one class alone
                    for line in reports.remarks_on_predictions(matrix, class_names, "val"):
                        tqdm.write(line)
                log.log(loop.step, values)
                plot_curves(loop.rows, run_dir / "curves.png")
                save(is_best=loop.take(values, train_settings.select_by))
        elif loop.step % train_settings.save_every == 0:
            save(is_best=False)
        if train_settings.early_stop_evals is not None and loop.bad_evals >= train_settings.early_stop_evals:
            tqdm.write(f"early stop: {train_settings.select_by} has not risen in {loop.bad_evals} evaluations")
            break
        if is_last:
            break
        model.train()

        # 2. learning rate
        lr = scheduled_lr(loop.step, train_settings.steps, settings.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr

        step_loss, step_accuracy, step_names = 0.0, 0.0, []
        for micro_step in range(train_settings.accumulate):
            batch = window.next_batch(batches)
            step_names += batch["names"]
            batch = loops.to_device(batch, device)
            images, targets = batch["images"].float() / 255, batch["targets"]  # (B, channels, h, w), (B, h', w')
            if is_channels_last:
                images = images.to(memory_format=torch.channels_last)

            # 3. forward
            run.seed_dropout(common.seed, loop.step, micro_step)
            with run.autocast(device, precision):
                logits = forward(images)  # (B, C, h', w')
            micro_loss = weighted_loss(logits, targets, loss_settings, batch["pixel_weight"])
            micro_loss = micro_loss / train_settings.accumulate
            is_right, valid = logits.argmax(1) == targets, targets != IGNORE_INDEX  # (B, h', w')
            accuracy = is_right.sum() / valid.sum().clamp(min=1)

            # 4. backward and clip
            scaler.scale(micro_loss).backward()
            micro_loss, accuracy = torch.stack([micro_loss.detach(), accuracy]).tolist()  # waits for the device once
            step_loss += loops.check_finite(micro_loss, loop.step, f"pictures {', '.join(batch['names'])}")
            step_accuracy += accuracy / train_settings.accumulate
        step_loss, step_accuracy = ranks.mean(torch.tensor([step_loss, step_accuracy], dtype=torch.float64)).tolist()
        ranks.average_gradients(model.parameters())
        samples = f"pictures {', '.join(step_names)}"
        grad_norm = loops.clip_gradients(model.parameters(), train_settings.clip_norm, optimizer, scaler, loop, samples)

        # 5. update (the scaler leaves out a step whose fp16 gradients overflowed)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loop.step += 1

        # 6. log
        means = loops.running_means(loop.running, {"train/loss": step_loss, "train/pixel_accuracy": step_accuracy})
        progress.update()
        if loop.step % train_settings.log_every == 0 or loop.step == train_settings.steps:
            steps_per_s, wait_share = window.read(loop.step)
            images_per_s = steps_per_s * images_per_step
            values = {"train/grad_norm": grad_norm, "lr": lr, "skipped_steps": loop.num_skipped}
            speed = {"images_per_s": images_per_s, "data_wait_share": wait_share}
            log.log(loop.step, means | values | speed)
            progress.set_postfix_str(
                f"loss {means['train/loss']:.3f}, {images_per_s:.1f} images/s, waits for data {wait_share:.0%}"
            )

    progress.close()
    if settings.check == "fit":
        log.close()
        return loop.rows[-1]
    if not ranks.leave():
        return float("nan")  # the first process finishes
    last = {"step": loop.step, **values_of_step(loop.rows, loop.evaluated_step)}
    plot_curves(loop.rows, run_dir / "curves.png")
    log.close()
    test: dict[str, float] = {}
    if train_settings.test_at_end and test_items:
        model.load_state_dict(load_checkpoint(run_dir / "best.pt")["model"])
        test, matrix = evaluate(predictor, test_items, "test", loss_settings, None, 0)
        print("\n" + "\n".join(reports.class_lines(matrix, class_names, "test")))
    finish_run(
        run_dir, {"start": loop.start_metrics, "best": loop.best, "last": last, "test": test, "majority": majority}
    )
    columns = {"majority": majority, "step 0": loop.start_metrics, "best": loop.best, "last": last, "test": test}
    print("\n" + "\n".join(metric_lines(reports.names_shown(last), columns)))
    print(f"best checkpoint: step {loop.best['step']}, chosen on {loop.best['val/num_images']} validation images")
    shown_dir, example = os.path.relpath(run_dir), os.path.relpath((test_items or val_items)[0].image_path)
    print(f"\nWritten to {shown_dir}. Next, predict a picture with it:")
    command = sections.show_command("train_unet.py mode=predict", checkpoint=f"{shown_dir}/best.pt", input=example)
    print(f"  {command}")
    return loop.best[train_settings.select_by]


RESUMABLE = (
    "resume", "train.steps", "device", "num_workers", "data.root", "data.train_list", "data.val_list", "data.test_list",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# a finished network: evaluate, predict, export, summary


def load_network(config: dict, state: dict | None, device: torch.device) -> torch.nn.Module:
    """Rebuild the network of a checkpoint, in evaluation mode; without a checkpoint, its weights are random.

    Raises:
        ValueError: where the weights are not those of the model that the checkpoint's config names.
    """
    model = build_network(config["model"], config["data"]["channels"], config["data"]["num_classes"])
    try:
        if state is not None:
            model.load_state_dict(find_weights(state, config["checkpoint"]))
    except RuntimeError as error:  # names each weight that is missing or has another shape
        raise ValueError(
            f"checkpoint {config['checkpoint']} does not hold the weights of its model {config['model']['name']}: "
            + " ".join(str(error).split())[:300]
        ) from error
    # as it was trained: other layouts round differently
    if run.choose_channels_last(config["train"]["channels_last"], device):
        model = model.to(memory_format=torch.channels_last)
    return model.to(device).eval()


def given_keys(overrides: list[str]) -> set[str]:
    """List the keys that a command line sets: {"mode", "data.root"} for ["mode=evaluate", "+data.root=..."]."""
    return {override.split("=")[0].lstrip("+~").split("@")[0] for override in overrides}


def summary_config(config: dict, overrides: list[str]) -> dict:
    """Take the size that the model is made for where the command line gives none: 572 px for the paper's network."""
    own_size = PAPER_SIZE if config["model"]["name"] == "unet_paper" else config["model"].get("image_size")
    if own_size is None or {"data.image_size", "experiment"} & given_keys(overrides):
        return config
    return config | {"data": config["data"] | {"image_size": own_size}}


def checkpoint_config(state: dict, current: dict, overrides: list[str]) -> dict:
    """Take the config of a checkpoint, with what the command line may change of it.

    Model, classes and how pictures are brought before the network are the checkpoint's; device and what to do are the
    command line's. Dataset and tiles are the checkpoint's unless the command line names others.

    Args:
        state: a checkpoint.
        current: composed from this command line.
        overrides: the command line's own, such as ["mode=evaluate", "data.root=..."].
    Raises:
        ValueError: for a checkpoint of another script, a key that has no effect, another model or other classes.
    """
    name, mode = current["checkpoint"], current["mode"]
    if "script" not in state:  # its own files always say so
        raise ValueError(f"checkpoint {name} was not written by train_unet.py; give one of its files")
    check_script(state, name, "train_unet")
    stored = stored_config(Config, state, name, is_resumed=False)
    given = given_keys(overrides)
    for key in sorted(given):
        is_of_training = key.removeprefix("data.") in views.Augmentation.__dataclass_fields__
        if is_of_training or key.split(".")[0] in ("train", "optim", "loss", "resume", "check", "seed", "data_root"):
            instead = "; give data.root=<folder>" if key == "data_root" else ""
            raise ValueError(f"{key}= has no effect with mode={mode}; leave it out{instead}")
    of_model = {"model", "experiment"} & {key.split(".")[0] for key in given}
    if of_model and current["model"] != stored["model"]:
        raise ValueError(
            f"checkpoint {name} is of the model {stored['model']}, not {current['model']}; leave out "
            + " and ".join(f"{key}=" for key in sorted(of_model))
        )
    data = dict(current["data"] if {"data", "experiment"} & given else stored["data"])
    for key in sorted(given):
        if key.startswith("data."):
            data[key.split(".")[1]] = current["data"][key.split(".")[1]]
    fixed = ("channels", "num_classes", *views.Framing.__dataclass_fields__)
    for key in fixed:
        is_said = f"data.{key}" in given or key == "num_classes" and data[key] is not None
        if is_said and data[key] != stored["data"][key]:
            raise ValueError(f"data.{key} is {data[key]}; checkpoint {name} was trained with {stored['data'][key]}")
    data |= {key: stored["data"][key] for key in fixed}
    if "classes" in data:
        data |= keep_classes(stored["data"], data["classes"], name)
    tiles = dict(current["tiles"] if "experiment" in given else stored["tiles"])
    tiles |= {key: value for key, value in current["tiles"].items() if f"tiles.{key}" in given}
    keys = ("mode", "checkpoint", "split", "input", "probabilities", "device", "precision", "num_workers")
    return fix_tiles(stored | {key: current[key] for key in keys} | {"data": data, "tiles": tiles})


def keep_classes(stored_data: dict, classes: list[str] | None, name: str) -> dict:
    """Return the keys of data=instances that say the classes of a checkpoint, by whose names objects are looked up.

    Args:
        stored_data: its config's.
        classes: those that the config asks for, or None.
        name: the checkpoint's, for messages.
    Raises:
        ValueError: for a checkpoint without a background before its other classes, or other classes than its own.
    """
    class_names = name_classes(stored_data["num_classes"], stored_data["class_names"])
    if class_names[0] != BACKGROUND or classes not in (None, class_names[1:]):
        asked = "data=instances has the background first" if classes is None else f"data.classes is {classes}"
        raise ValueError(f"{asked}; checkpoint {name} was trained with the classes {', '.join(class_names)}")
    return {"classes": class_names[1:], "class_names": class_names}


def load_predictor(config: dict, state: dict) -> prediction.Predictor:
    """Rebuild the network of a checkpoint, and how it predicts pictures; arguments as those of `predict`."""
    settings = read_settings(Config, config)
    device, precision = run.set_up_device(settings.common.device, settings.common.precision)
    return build_predictor(settings, load_network(config, state, device), device, precision)


def evaluate_checkpoint(config: dict, state: dict, run_dir: Path) -> float:
    """Measure a checkpoint on a split of its dataset, or of the one that the command line names; return mean IoU.

    Args:
        config: from `checkpoint_config`.
        state: the checkpoint.
        run_dir: where samples/, confusion.csv (rows: truth) and run.json are written.
    """
    settings = read_settings(Config, config)
    predictor, split, reader_keys = load_predictor(config, state), settings.split, settings.data.reader_keys
    splits = list_splits(reader_keys)
    if split not in splits:
        raise ValueError(f"split is {split}; must be one of {', '.join(splits)}")
    if not splits[split]:
        others = " or ".join(f"split={name}" for name, items in splits.items() if items)
        raise ValueError(f"data.root {reader_keys['root']} has no picture in its {split} split; give {others}")
    splits, counts, _ = check_data({split: splits[split]}, reader_keys["on_bad"], run_dir, list_all=False)
    if not splits[split]:
        raise ValueError(f"data.root {reader_keys['root']} has no usable picture in its {split} split; mend the above")
    items, loss_settings = splits[split], replace(settings.loss, class_weights=state["class_weights"])
    start_run(run_dir, config, counts)
    write_splits(splits, run_dir / "splits")
    num_pictured = settings.train.picture_images
    values, matrix = evaluate(predictor, items, split, loss_settings, run_dir / "samples", num_pictured)
    class_names, majority = items[0].coding.class_names, reports.majority_metrics(matrix.sum(1), split)
    finish_run(run_dir, {"last": values, "majority": majority})
    with (run_dir / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([class_names, *matrix.tolist()])
    print("\n" + "\n".join(reports.class_lines(matrix, class_names, split)))
    print("\n" + "\n".join(metric_lines(reports.names_shown(values), {"majority": majority, "measured": values})))
    print(f"{len(items)} images; pictures and confusion.csv in {os.path.relpath(run_dir)}")
    return values[f"{split}/mean_iou"]


def predict(config: dict, state: dict, run_dir: Path) -> list[str]:
    """Predict all pictures of `input` and write class maps, overlays and, on request, probabilities.

    Args:
        config: from `checkpoint_config`.
        state: the checkpoint.
        run_dir: where everything is written.
    Returns:
        One line for each picture that cannot be read or predicted; always empty for a single picture, whose failure is
        raised.
    """
    settings = read_settings(Config, config)
    reader_keys = settings.data.reader_keys
    class_names = tuple(name_classes(reader_keys["num_classes"], reader_keys["class_names"]))
    pictures = list_pictures(Path(settings.input))
    predictor = load_predictor(config, state)
    start_run(run_dir, config, {"images": len(pictures)})

    failures, num_px = [], np.zeros(len(class_names), np.int64)
    for picture in tqdm(pictures, desc="predict", disable=len(pictures) == 1):
        name = picture.name
        try:
            image = read_picture(picture.path, reader_keys["channels"], picture.page)  # uint8 (H, W, channels)
            logits = predictor.predict(image)
            pred = logits.argmax(0).to(torch.uint8).cpu().numpy()  # (H, W)
            overlay = overlay_label_map(
                np.broadcast_to(image, (*image.shape[:2], 3)), reports.class_ids(pred, class_names)
            )
            write_image(run_dir / f"{name}_classes.png", pred)
            write_image(run_dir / f"{name}_overlay.png", overlay)
            if settings.probabilities:
                np.save(run_dir / f"{name}_probabilities.npy", logits.softmax(0).half().cpu().numpy())
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # a picture can be beyond all memory
            if len(pictures) == 1:
                raise
            failures.append(f"{picture}: {' '.join(str(error).split())[:300]}")
            continue
        num_px += np.bincount(pred.ravel(), minlength=len(class_names))
    num_done = len(pictures) - len(failures)
    finish_run(run_dir, {"last": {"num_images": num_done, "num_failed": len(failures)}})
    shares = ", ".join(
        f"{index} {name} {share:.1%}"
        for index, (name, share) in enumerate(zip(class_names, num_px / max(1, num_px.sum()), strict=True))
    )
    print(f"{num_done} pictures: {shares}")
    print(f"Written to {os.path.relpath(run_dir)}: *_classes.png (class indices), *_overlay.png")
    return failures


def export_onnx(config: dict, state: dict, run_dir: Path) -> None:
    """Write a checkpoint's network as an ONNX file, on the CPU in fp32, and how to feed it.

    Args:
        config: from `checkpoint_config`.
        state: the checkpoint.
        run_dir: where <model>.onnx and README.md are written.
    """
    onnx_files.check_packages()
    settings = read_settings(Config, config)
    reader_keys = settings.data.reader_keys
    class_names = tuple(name_classes(reader_keys["num_classes"], reader_keys["class_names"]))
    predictor = load_predictor(config | {"device": "cpu", "precision": "fp32"}, state)
    start_run(run_dir, config, {})
    name, has_softmax = settings.model["name"], settings.probabilities
    measured = export.export_network(predictor, name, reader_keys["channels"], class_names, has_softmax, run_dir)
    finish_run(run_dir, {"last": measured})
    print(f"Written to {os.path.relpath(run_dir)}: {name}.onnx, README.md (input, output, tiles)")


def print_summary(config: dict, state: dict | None) -> None:
    """Print what a network is made of and what it costs, for pictures of data.image_size.

    Args:
        config: composed, or from `checkpoint_config`.
        state: the checkpoint, or None for random weights.
    """
    settings = read_settings(Config, config)
    device, precision = run.set_up_device(settings.common.device, settings.common.precision)
    input_hw, channels = settings.data.framing.input_hw, settings.data.reader_keys["channels"]
    model = load_network(config, state, device)
    print(model_summary.format_summary(model_summary.summarize(model, input_hw, channels)))
    p50_ms, p95_ms = model_summary.measure_latency(model, input_hw, channels, device, precision, LATENCY_REPEATS)
    print(f"latency on {device}, {precision}: p50 {p50_ms:.1f} ms, p95 {p95_ms:.1f} ms")


def check_mode(settings: Config, overrides: list[str]) -> None:
    """Refuse a mode without its input, and input that the mode would not use; overrides: the command line's own."""
    keys = {"checkpoint": settings.checkpoint, "input": settings.input, "resume": settings.common.resume}
    keys |= {"check": settings.check or None, "probabilities": settings.probabilities or None}
    keys |= {"split": settings.split if "split" in given_keys(overrides) else None}
    sections.check_modes([key for key, value in keys.items() if value is not None], MODES_OF_KEY, settings.mode)
    for key, what in (("checkpoint", "best.pt"), ("input", "a picture or a folder")):
        if keys[key] is None and settings.mode in MODES_OF_KEY[key] and settings.mode != "summary":
            raise ValueError(f"mode={settings.mode} needs {key}=<{what}>")


@hydra.main(version_base="1.3", config_path="configs/unet", config_name="train_unet")
def main(cfg) -> float | None:
    """Read the config, do what `mode` says, and end with one line on what went wrong and status 1, if anything did."""
    less_memory = "a smaller train.batch_size or data.image_size"
    if cfg.mode != "train":
        less_memory = "a smaller tiles.size, or precision=bf16"
    with sections.one_line_errors("train_unet", less_memory):
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        ranks.join(config, config["mode"])
        hydra_config = HydraConfig.get()
        run_dir, overrides = Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task)
        if config["mode"] == "summary" and config["checkpoint"] is None:
            config = fix_classes(summary_config(config, overrides))
        check_mode(read_settings(Config, config), overrides)
        if config["mode"] == "train":
            config = keep_stored_classes(config)
            config, resume_path = config_to_resume(Config, "train_unet", config, overrides, RESUMABLE, fix_values)
            if config["check"] == "fit":
                config = fix_classes(config)
                settings = read_settings(Config, config)
                data = list_data(settings, run_dir, resume_path)
                return fit.check_fit(train, data, config, list_changes(settings), "pictures")
            return train(config, run_dir, resume_path)
        state = None
        if config["checkpoint"] is not None:
            state = load_checkpoint(Path(config["checkpoint"]))
            config = checkpoint_config(state, config, overrides)
        if config["mode"] == "evaluate":
            return evaluate_checkpoint(config, state, run_dir)
        if config["mode"] == "summary":
            return print_summary(config, state)
        if config["mode"] == "export":
            return export_onnx(config, state, run_dir)
        failures = predict(config, state, run_dir)
    if failures:
        sys.exit(f"{len(failures)} pictures failed:\n" + "\n".join(f"  {line}" for line in failures))


if __name__ == "__main__":
    sections.read_command_line("unet")
    main()
