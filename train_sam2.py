"""Fine-tune SAM 2 on pictures with instance masks, read straight from disk.

    python train_sam2.py                                           # generated glassware, the bundled nano, on a CPU
    python train_sam2.py model=sam2.1_hiera_small data=label_map data.root=/my/dataset
    python train_sam2.py check=true data=coco data.root=/my/coco   # look at a dataset, write dataset.json, and stop
    python train_sam2.py check=fit model=sam2.1_hiera_large ...    # does it fit the memory, how fast is it
    python train_sam2.py cache=auto model=sam2.1_hiera_small ...   # encode each picture once, for all runs to come
    python train_sam2.py classes=auto data=coco data.root=/my/coco # masks with the dataset's classes
    python train_sam2.py experiment=data_engine data.root=photos/ data.labels=engine/   # labels of infer_sam2.py
    python train_sam2.py prompts=text text_encoder=ViT-B-32/openai data=coco ...   # masks from words (open_clip)
    python train_sam2.py fast_decoder=false                        # sam2's own decoder, slower on a CPU
    python train_sam2.py train.steps=0 model.checkpoint=best.pt    # evaluate and stop
    python train_sam2.py resume=outputs/train_sam2/<run>           # continue a killed run, exactly
    python train_sam2.py --cfg job                                 # print every knob with its value

Reads   pictures and instance masks: data=labpics|label_map|masks_per_file|coco|sa1b|davis|labelme|yolo|cvat|voc
        (data/README.md), or data=labels: a folder of labels of infer_sam2.py mode=label and mode=annotate.
Writes  outputs/train_sam2/<time>/: best.pt (loads in sam2.build_sam.build_sam2), last.pt (to resume), metrics.csv,
        curves.png, samples/ (clicks, prediction, truth), dataset.png, tensorboard/, run.json; with data=labels into its
        folder best.pt, rounds.csv, rounds.png.
Metrics, each a mean over all validation objects, at their picture's own size, of the mask of highest predicted IoU:
    val/iou_1_click          one click at the object's centre (val/iou_<n>_clicks: n clicks, each in the largest error)
    val/oracle_iou_1_click   best of the three masks after one click
    val/iou_box              the object's exact box
    val/class_accuracy_1_click  with classes: share of objects whose class is the likeliest name of their 1-click mask
    val/mask_ap              with classes: COCO's average precision of automatic masks, mean over the classes
    val/iou_crop             with prompts=text: the embedding of the object's own crop, no click
    val/iou_words            the same from its class name, over objects that are their class's only one in a picture
    general/iou_1_click ...  the same on general_data=<a file of data>, so that forgetting is seen
    train/loss, train/iou    running means over training steps (bias-corrected, 0.99)
Sources: Ravi et al. 2024 (SAM 2) for prompts and losses; Kirillov et al. 2023 (SAM), appendix A and D.
"""

import signal
import sys

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):  # before the imports below, which take seconds
        print(__doc__)
        sys.exit()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends at once, up to read_command_line

import copy
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import cv2
import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from utils import fit, ranks, run
from utils import loop as loops
from utils import settings as sections
from utils.checkpoint import config_to_resume, load_checkpoint, save_checkpoint
from utils.dataset_check import CheckReport
from utils.images import id_colors, read_image
from utils.instances.check import check_data
from utils.instances.readers import Instances, Item, check_same_size, class_name, list_items
from utils.listing import first_few
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
from utils.sam2 import class_head as class_heads
from utils.sam2 import class_metrics, embedding_cache, evaluation, losses, mask_generation, prompts, rounds, words
from utils.sam2 import model as models
from utils.sam2.class_head import ClassHead, ClassSettings
from utils.sam2.fast_decoder import DecoderSetting, fix_decoder
from utils.sam2.mask_generation import AutomaticSettings, ClassFilter
from utils.sam2.metrics import mask_iou
from utils.sam2.model import Embeddings, FrozenMaps
from utils.settings import SAME_SECTION, CommonSettings, above, at_least, check_keys, check_value, one_of, read_settings

TERMS = {  # losses of a mask's shape, summed in this order: logits and truth (O, M, s, s) -> (O, M)
    "focal": lambda logits, truth, knobs: losses.focal_loss(logits, truth),
    "dice": lambda logits, truth, knobs: losses.dice_loss(logits, truth),
    "cross_entropy": lambda logits, truth, knobs: losses.cross_entropy_loss(logits, truth, knobs.foreground_balance),
}
OF_OBJECTS = (  # what a batch has of each of its objects
    "masks", "point_coords", "point_labels", "num_points", "num_rounds", "is_click", "is_truth_click", "uniform",
    "image_index", "class_targets", "has_text", "text_embeddings",
)  # fmt: skip
READ_ON_CPU = (  # what a batch says of the work to do
    "image_index", "num_points", "num_rounds", "is_click", "background_index", "has_text",
)  # fmt: skip
HIERA_SIZES = ("tiny", "small", "base_plus", "large")
CONFIGS = run.REPOSITORY / "configs" / "sam2"
CLASS_ACCURACY = "val/class_accuracy_1_click"
CROP_IOU = "val/iou_crop"
SHARE = sections.between(0, 1)
BLEND_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the weights at the end


@dataclass(frozen=True)
class TrainSettings:
    """Knobs of the training loop (`train:` in configs/sam2/train_sam2.yaml, which explains each)."""

    steps: Annotated[int, at_least(0)]
    batch_size: Annotated[int, at_least(1)]  # images per forward
    accumulate: Annotated[int, at_least(1)]  # forwards per step
    objects_per_image: Annotated[int, at_least(1)]
    trainable: Annotated[list, sections.Rule(bool, "a list of parts")]  # names of parts, and {trunk_last_n: k}
    loss_size: Annotated[int | None, at_least(1)]  # px; None: image_size / 4
    clip_norm: Annotated[float, above(0)]
    channels_last: bool
    compile: bool
    log_every: Annotated[int, at_least(1)]  # steps
    eval_every: Annotated[int, at_least(1)]  # steps
    save_every: Annotated[int, at_least(1)]  # steps
    eval_images: Annotated[int | None, at_least(1)]
    eval_clicks: Annotated[
        list[int], sections.Rule(lambda counts: 1 in counts and min(counts) >= 1, "a list of counts with 1 in it")
    ]
    select_by: str  # a name of metric_names
    early_stop_evals: Annotated[int | None, at_least(1)]
    picture_images: Annotated[int, at_least(0)]
    objects_per_forward: Annotated[int | None, at_least(1)] = None  # decoded together; None: all of a batch
    max_forgetting: Annotated[float, above(0)] = 0.02  # mean IoU after one click on the general data
    blend: bool = False  # best.pt is the best mixture of the weights at the start and at the end
    # with classes: when automatic masks are measured
    eval_automatic: Annotated[str, one_of("ends", "never", "always")] = "ends"

    def __post_init__(self):
        names = [*metric_names(self.eval_clicks), CLASS_ACCURACY, CROP_IOU]
        check_value(self.select_by, Annotated[str, one_of(*names)], "train.select_by")


@dataclass(frozen=True)
class Augmentation:
    """How training pictures are varied (in `data:`)."""

    hflip: bool
    color_jitter: Annotated[float, SHARE]


@dataclass(frozen=True)
class DataSettings:
    """Which objects are used, how pictures are varied, and the keys of the dataset's reader (`data:`)."""

    min_area_px: Annotated[int, at_least(0)]  # in training and validation
    augmentation: Annotated[Augmentation, SAME_SECTION]
    reader_keys: Annotated[dict, sections.ALL_OTHERS]


@dataclass(frozen=True)
class PromptSettings:
    """How a user is simulated (`prompts:`, configs/sam2/prompts/*.yaml)."""

    box_share: Annotated[float, SHARE]  # share of the objects; the others start with one point
    repeat_objects: bool  # prompt objects again, anew, where a picture has fewer than objects_per_image
    min_corrections: int  # further clicks, drawn per object from this range
    max_corrections: int
    truth_click_share: Annotated[float, SHARE]  # of further clicks, drawn from the whole object and not from the error
    # rounds without a new click: one last, one at a random place before
    mask_only_rounds: Annotated[int, one_of(0, 1, 2)]
    detach: bool  # no gradient through the logits that are fed back
    text: words.TextSettings | None = None  # None: no object starts with words

    def __post_init__(self):
        fewest, most = self.min_corrections, self.max_corrections
        if not 0 <= fewest <= most:
            raise ValueError(f"prompts.max_corrections is {most}; must be at least prompts.min_corrections ({fewest})")


@dataclass(frozen=True)
class LossSettings:
    """The loss (`loss:`, configs/sam2/loss/*.yaml)."""

    terms: dict  # losses of a mask's shape: {a name in TERMS: its weight}
    foreground_balance: float  # 0: every pixel counts the same; 1: foreground and background count the same
    iou: float  # L1 between predicted and actual IoU
    objectness: float
    click_similarity: float  # weight of an auxiliary loss for training from scratch, see click_similarity
    # best: the best of three trains, and all three predict their IoU; first: the first alone
    masks: Annotated[str, one_of("best", "first")]
    all_masks: Annotated[float, at_least(0)] = 0.0  # weight of the mean of all masks' losses beside that of the best
    full_size_iou: bool = False  # the IoU to be predicted is that of the enlarged mask; False: at the size of the loss
    soft_truth: bool = False  # a pixel of the loss is the share of it that the object covers; False: 0 or 1
    classes: Annotated[float, at_least(0), sections.FINITE] = 0.1  # cross-entropy of the class, in runs with classes

    def __post_init__(self):
        sections.check_terms(self.terms, TERMS)


@dataclass(frozen=True)
class OptimSettings:
    """AdamW and its schedule (`optim:`, configs/sam2/optim/*.yaml)."""

    lr: Annotated[float, at_least(0)]  # highest
    encoder_lr_factor: Annotated[float, at_least(0)]  # factor of the image encoder's parameters
    betas: Annotated[
        list[float],
        sections.of_length(2, "two numbers"),
        sections.Rule(lambda pair: 0 <= min(pair) <= max(pair) < 1, "0 or more, and below 1"),
    ]
    weight_decay: Annotated[float, at_least(0)]  # 0 for biases, norms and embeddings
    warmup_steps: Annotated[int, at_least(0)]
    min_lr_factor: Annotated[float, SHARE]  # the rate at the last step, as a share of lr


@dataclass(frozen=True)
class Config:
    """All keys of this script (configs/sam2/train_sam2.yaml explains each)."""

    common: Annotated[CommonSettings, SAME_SECTION]
    check: fit.Check
    model: dict  # what build_sam2 takes
    data: DataSettings
    prompts: PromptSettings
    loss: LossSettings
    optim: OptimSettings
    train: TrainSettings
    cache: embedding_cache.Setting = "off"  # YAML makes false of off
    cache_precision: embedding_cache.Precision = "fp16"
    fast_decoder: DecoderSetting = False
    general_data: dict | None = None  # the keys of a reader: what is not to be forgotten
    picture_attributes: str | None = None  # check=true: a csv for dataset.json
    classes: class_heads.Choice = None  # names, "auto": those of the training objects, or None: masks alone
    class_head: ClassSettings = field(default_factory=ClassSettings)
    text_encoder: str | None = None  # named_shapes, or a model of open_clip, with prompts=text

    def __post_init__(self):
        if self.train.blend and self.general_data is None:
            raise ValueError("train.blend weighs what was learned against what was forgotten: it needs general_data")
        if self.picture_attributes is not None and self.check is not True:
            raise ValueError(
                f"picture_attributes is {self.picture_attributes}, which check=true alone uses; leave it out"
            )
        if self.classes is None and self.train.select_by == CLASS_ACCURACY:
            raise ValueError(f"train.select_by is {CLASS_ACCURACY}, which a run without classes does not measure")
        if (self.text_encoder is None) != (self.prompts.text is None):
            given = "prompts=text" if self.text_encoder is None else f"text_encoder={self.text_encoder}"
            other = (
                "text_encoder=<a model of open_clip, or named_shapes>" if self.text_encoder is None else "prompts=text"
            )
            raise ValueError(f"{given} is given alone; masks from words need {other}, too")
        if self.text_encoder is None and self.train.select_by == CROP_IOU:
            raise ValueError(f"train.select_by is {CROP_IOU}, which a run without prompts=text does not measure")
        check_keys(functools.partial(models.build_sam2, device="cpu"), self.model, "model")


# ---------------------------------------------------------------------------------------------------------------------
# disk -> tensors


def read_picture(
    item: Item,
    annotation_hw: tuple[int, int],
    is_mirrored: bool,
    image_size: int,
    entries: dict[tuple[Path, bool], Path] | None,
    color_jitter: float = 0.0,
    rng: np.random.Generator | None = None,
) -> torch.Tensor | FrozenMaps:
    """Read a picture, or from the embedding cache what the image encoder made of it.

    Args:
        annotation_hw: size of its annotation, which must be the picture's.
        image_size: side S of the model's input, pixels.
        entries: of the embedding cache, by (picture's file, whether it is mirrored); None: read the picture.
        color_jitter, rng: if above 0, the colours of a picture that is read change by up to this share; see `jitter`.
    Returns:
        float (1, 3, S, S), or FrozenMaps of one picture: what `join_pictures` and `embed` take.
    """
    if entries is not None:
        return embedding_cache.read_entry(entries[item.image_path, is_mirrored])
    image_rgb = read_image(item.image_path)  # (H, W, 3)
    check_same_size(item, image_rgb.shape[:2], annotation_hw)  # the files may have changed since the dataset check
    image_rgb = image_rgb[:, ::-1] if is_mirrored else image_rgb
    return models.preprocess(jitter(image_rgb, color_jitter, rng) if color_jitter > 0 else image_rgb, image_size)[None]


def jitter(image_rgb: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast and saturation by up to the share `amount`: uint8 (H, W, 3) in and out."""
    image = torch.from_numpy(image_rgb.copy()).permute(2, 0, 1)
    for adjust in (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation):
        image = adjust(image, 1 + amount * rng.uniform(-1, 1))
    return image.permute(1, 2, 0).numpy()


class PromptedMasks(Dataset):
    """Training samples: a picture, up to `objects_per_image` of its objects, and all that is random in their prompts.

    A sample is a function of (seed, sample_index) alone.
    """

    def __init__(
        self,
        items: list[Item],
        seed: int,
        image_size: int,
        objects_per_image: int,
        data_settings: DataSettings,
        prompt_settings: PromptSettings,
        entries: dict[tuple[Path, bool], Path] | None = None,  # see read_picture
        class_names: list[str] | None = None,  # None: masks alone
        background_clicks: int = 0,
        crop_side: int = 0,  # px, of the crops that words learn from
    ):
        self.crop_side = crop_side
        self.class_names, self.background_clicks = class_names, background_clicks
        self.items, self.seed, self.image_size, self.entries = items, seed, image_size, entries
        self.objects_per_image, self.min_area_px = objects_per_image, data_settings.min_area_px
        self.augmentation, self.prompt_settings = data_settings.augmentation, prompt_settings

    def __getitem__(self, sample_index: int) -> dict:
        """Read a picture and draw its prompts: N objects, S = image_size, R correction rounds, all in the S x S frame.

        Returns:
            picture: what `read_picture` returns; masks bool (N, S, S);
            point_coords float (N, 2, 2) and point_labels int32 (N, 2): the first prompt, a box or one point and
            padding; num_points int64 (N,): 2 or 1; num_rounds int64 (N,): 1 to R + 1; is_click bool (N, R),
            is_truth_click bool (N, R), uniform float (N, R) in [0, 1): the rounds' draws; name: the picture's file.
            With classes: class_targets int64 (N,), see `class_targets`, and background_coords float (K, 2), clicks on
            what is no object. With words: has_text bool (N,), objects that start without points, and their crops uint8
            (N, 3, s, s).
        """
        item_number = run.shuffled_item(self.seed, sample_index, len(self.items))
        item = self.items[item_number]
        rng = run.sample_rng(self.seed, sample_index)
        is_mirrored = self.augmentation.hflip and rng.random() < 0.5
        instances = item.read()
        layers = instances.layers  # (L, H, W), the picture's size, as the dataset check has seen
        if is_mirrored:
            layers = layers[:, :, ::-1]
        objects = evaluation.kept_objects(layers, self.min_area_px)
        chosen = rng.permutation(len(objects))[: self.objects_per_image]
        if self.prompt_settings.repeat_objects:
            chosen = np.resize(chosen, self.objects_per_image)
        num_boxes = int(len(chosen) * self.prompt_settings.box_share + rng.random())  # the share exactly, on average

        height, width = layers.shape[1:]
        side = self.image_size
        rows = ((np.arange(side) + 0.5) * height / side).astype(np.int64)  # nearest pixel of the original
        columns = ((np.arange(side) + 0.5) * width / side).astype(np.int64)
        small_layers = layers[:, rows[:, None], columns]  # (L, S, S)

        masks = np.zeros((len(chosen), side, side), bool)
        point_coords, point_labels = [], []
        for place, number in enumerate(chosen):
            layer, object_id = objects[number]
            mask = layers[layer] == object_id  # (H, W)
            point = prompts.random_point(mask, rng)
            np.equal(small_layers[layer], object_id, out=masks[place])
            if not masks[place].any():  # thinner than a pixel of the S x S frame: keep the one under the point
                masks[place, int(point[1] * side / height), int(point[0] * side / width)] = True
            if place < num_boxes:
                point_coords.append(prompts.noised_box(mask, rng).reshape(2, 2))
                point_labels.append([2, 3])
            else:
                point_coords.append([point, (0, 0)])
                point_labels.append([1, -1])

        fewest, most = self.prompt_settings.min_corrections, self.prompt_settings.max_corrections
        mask_only_rounds = self.prompt_settings.mask_only_rounds
        num_objects, num_rounds = len(masks), most + mask_only_rounds
        corrections = rng.integers(fewest, most + 1, num_objects)
        last_round = corrections + mask_only_rounds - 1  # (N,); -1: the object has none
        is_click = np.ones((num_objects, num_rounds), bool)
        if mask_only_rounds > 0:
            is_click[np.arange(num_objects), last_round] = False
        if mask_only_rounds > 1:
            is_click[np.arange(num_objects), rng.integers(0, last_round)] = False
        point_coords = torch.from_numpy(np.array(point_coords, np.float32).reshape(-1, 2, 2))  # px of the picture
        point_labels = np.array(point_labels, np.int32).reshape(-1, 2)
        truth_click_share = self.prompt_settings.truth_click_share
        sample = {
            "picture": read_picture(  # before the draws below: it makes some, too
                item, (height, width), is_mirrored, side, self.entries, self.augmentation.color_jitter, rng
            ),
            "masks": torch.from_numpy(masks),
            "point_coords": models.scale_points(point_coords, (height, width), side),
            "point_labels": torch.from_numpy(point_labels),
            "num_points": torch.from_numpy((point_labels != -1).sum(1)),
            "num_rounds": torch.from_numpy(1 + corrections + mask_only_rounds),
            "is_click": torch.from_numpy(is_click),
            "is_truth_click": torch.from_numpy(rng.random((num_objects, num_rounds)) < truth_click_share),
            "uniform": torch.from_numpy(rng.random((num_objects, num_rounds), np.float32)),
            "name": str(item.image_path),
        }
        if self.class_names is not None:  # last: all other draws are those of a run without classes
            targets = class_heads.class_targets(instances, [objects[number] for number in chosen], self.class_names)
            ignored = None if instances.ignored is None else instances.ignored[:, :: -1 if is_mirrored else 1]
            clicks = prompts.background_points(layers, ignored, self.background_clicks, rng)  # (K, 2)
            background = torch.from_numpy(clicks)
            sample["class_targets"] = torch.tensor(targets)
            sample["background_coords"] = models.scale_points(background, (height, width), side)
        if self.prompt_settings.text is not None:  # of the picture in its own colours, read again: a cache has none
            image_rgb = read_image(item.image_path)[:, :: -1 if is_mirrored else 1]
            own_masks = [layers[layer] == object_id for layer, object_id in (objects[number] for number in chosen)]
            has_text, crops = words.draw_crops(image_rgb, own_masks, self.prompt_settings.text, self.crop_side, rng)
            sample |= {"has_text": has_text, "crops": crops}
            sample["num_points"] = torch.where(has_text, 0, sample["num_points"])
        return sample


def collate(samples: list[dict]) -> dict:
    """Join samples: pictures in one axis B, objects of all pictures in one axis O with `image_index` (O,).

    Clicks on the background are in one axis K, with `background_index` (K,) and `background_weight` (K,).
    """
    of_objects = [key for key in samples[0] if key not in ("picture", "name")]
    batch = {key: torch.cat([sample[key] for sample in samples]) for key in of_objects}
    batch["pictures"] = embedding_cache.join_pictures([sample["picture"] for sample in samples])
    counts = torch.tensor([len(sample["masks"]) for sample in samples])
    batch["image_index"] = torch.arange(len(samples)).repeat_interleave(counts)  # (O,)
    batch["object_weight"] = (1 / counts.float())[batch["image_index"]] / len(samples)  # mean over images of means
    batch["names"] = [sample["name"] for sample in samples]
    if "background_coords" in batch:  # a picture's weigh together as much as its objects together
        counts = torch.tensor([len(sample["background_coords"]) for sample in samples])
        batch["background_index"] = torch.arange(len(samples)).repeat_interleave(counts)  # (K,)
        batch["background_weight"] = (1 / counts.float())[batch["background_index"]] / len(samples)
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# the loss of one decode, and of all rounds of prompting


def mask_shape_loss(logits: torch.Tensor, truth: torch.Tensor, loss_settings: LossSettings) -> torch.Tensor:
    """Sum the terms of each mask, each times its weight: logits and truth (O, M, s, s) -> (O, M)."""
    total = torch.zeros(logits.shape[:2], device=logits.device)
    for name, term in TERMS.items():
        if weight := loss_settings.terms.get(name, 0):
            total = total + weight * term(logits, truth, loss_settings)
    return total


def click_similarity(
    embeddings: Embeddings, image_index: torch.Tensor, point_coords: torch.Tensor, image_size: int
) -> torch.Tensor:
    """Compare the encoder's feature under a click with those everywhere: a mask without the decoder.

    A decoder with random weights learns little until the features below it tell objects apart. This gives the encoder a
    direct reason to; it has no parameters and is left out once the decoder works.

    Args:
        image_index: int64 (O,).
        point_coords: (O, 2), (x, y) pixels of the S x S frame, S = image_size.
    Returns:
        (O, 1, S/4, S/4) float32 logits: the scaled dot products of the three feature levels, added up, minus 1.
    """
    logits = -1.0
    for features in (embeddings.image_embeddings, *embeddings.high_res_features):
        stride = image_size // features.shape[-1]
        cell_x, cell_y = (point_coords / stride).long().clamp(0, features.shape[-1] - 1).T
        clicked = features[image_index, :, cell_y, cell_x].float()  # (O, C)
        everywhere = features.index_select(0, image_index).float()  # (O, C, h, w)
        similarity = torch.einsum("oc,ochw->ohw", clicked, everywhere) / clicked.shape[1] ** 0.5
        logits = logits + models.upscale_masks(similarity[:, None], (image_size // 4, image_size // 4))
    return logits


def mask_prediction_loss(
    low_res_masks: torch.Tensor,
    iou_predictions: torch.Tensor,
    object_score_logits: torch.Tensor,
    masks: torch.Tensor,
    loss_settings: LossSettings,
    full_size_masks: torch.Tensor | None = None,
    class_losses: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of one prediction of O objects with M masks each, in fp32.

    Args:
        low_res_masks: (O, M, h, w) logits.
        iou_predictions: (O, M).
        object_score_logits: (O, 1).
        masks: (O, s, s) truth, 0..1; logits are brought to s x s where that differs from h x w.
        full_size_masks: bool (O, S, S) truth, of which loss.full_size_iou measures the IoU.
        class_losses: (O, M), of the class that each mask got; it counts as the loss of the mask's shape does, but does
            not say which mask trains, and with loss.masks=first all masks learn their class.
    Returns:
        loss (O,); iou (O, M) of the thresholded masks, without gradient.
    Source: SAM 2's training: of three masks the one with the lowest mask loss trains, all three learn their IoU.
    """
    logits = low_res_masks.float()
    if logits.shape[-1] != masks.shape[-1]:
        logits = models.upscale_masks(logits, masks.shape[-2:])
    if loss_settings.masks == "first":
        logits, iou_predictions = logits[:, :1], iou_predictions[:, :1]
    truth = masks[:, None].float().expand_as(logits)  # (O, M, s, s)
    mask_loss = mask_shape_loss(logits, truth, loss_settings)  # (O, M)
    if loss_settings.full_size_iou:
        num_masks = 1 if loss_settings.masks == "first" else low_res_masks.shape[1]
        iou = evaluation.full_size_iou(low_res_masks[:, :num_masks].detach(), full_size_masks)  # (O, M)
    else:
        iou = mask_iou(logits.detach() > 0, truth > 0.5)  # (O, M)
    iou_loss = (iou_predictions.float() - iou).abs().mean(1)  # (O,)
    objectness_loss = torch.nn.functional.softplus(-object_score_logits.float()).squeeze(1)  # every object is there
    shape_loss = mask_loss.amin(1) + loss_settings.all_masks * mask_loss.mean(1)  # (O,)
    loss = shape_loss + loss_settings.iou * iou_loss + loss_settings.objectness * objectness_loss
    if class_losses is not None:
        of_all = class_losses.mean(1)  # (O,)
        of_best = class_losses.gather(1, mask_loss.argmin(1, keepdim=True)).squeeze(1)
        of_best = of_all if loss_settings.masks == "first" else of_best  # the others are chosen now and then, too
        loss = loss + loss_settings.classes * (of_best + loss_settings.all_masks * of_all)
    return loss, iou


def prompted_losses(
    model: torch.nn.Module,
    embeddings: Embeddings,
    batch: dict,
    prompt_settings: PromptSettings,
    loss_settings: LossSettings,
    loss_size: int,
    objects_per_forward: int | None = None,
    precision: str = "fp32",
    class_head: ClassHead | None = None,
    text_map: words.TextMap | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Prompt the objects of a batch, correct their masks round by round, and give the loss as it comes.

    Each part of the loss can be sent back before the next one is computed, so that the activations of one decode are
    held: with prompts.detach nothing but the embeddings is shared, without it a group's rounds are computed again when
    they are sent back.

    Args:
        embeddings: of the batch's pictures.
        batch: from `collate`, its tensors on the model's device, but those of READ_ON_CPU.
        loss_size: side of the square on which the loss is computed, pixels.
        objects_per_forward: objects that are decoded together, at most; None: all.
        class_head: learns the classes of batch["class_targets"]; None: masks alone.
        text_map: makes tokens of batch["text_embeddings"], for objects in batch["has_text"]; None: no words.
    Yields:
        chosen int64 (O',), loss (O',), iou (O',) of some objects in one round or in several: what they add to their
        object's means over its rounds; the IoU, without gradient, is that of the mask of highest predicted IoU.
    """
    num_objects = len(batch["masks"])
    group_size = objects_per_forward or num_objects
    of_objects = {name: tensor for name, tensor in batch.items() if name in OF_OBJECTS}
    for first in range(0, num_objects, group_size):
        group = {name: tensor[first : first + group_size] for name, tensor in of_objects.items()}
        parts = _prompt_group(
            model, embeddings, group, prompt_settings, loss_settings, loss_size, precision, class_head, text_map
        )
        if prompt_settings.detach:
            yield from ((first + chosen, *losses_and_ious) for chosen, *losses_and_ious in parts)
        else:  # the last round's gradient goes through all before
            chosen, object_loss, object_iou = map(torch.cat, zip(*parts, strict=True))
            yield first + chosen, object_loss, object_iou


def _prompt_group(
    model: torch.nn.Module,
    embeddings: Embeddings,
    group: dict,
    prompt_settings: PromptSettings,
    loss_settings: LossSettings,
    loss_size: int,
    precision: str,
    class_head: ClassHead | None,
    text_map: words.TextMap | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Prompt a group of objects: `prompted_losses`, where all objects are decoded together."""
    masks, image_index, num_rounds = group["masks"], group["image_index"], group["num_rounds"]  # (G, S, S), (G,), (G,)
    device, num_objects, num_corrections = masks.device, len(masks), group["is_click"].shape[1]
    truth = (losses.cover_pixels if loss_settings.soft_truth else losses.shrink_masks)(masks, loss_size)  # (G, s, s)
    point_coords = torch.nn.functional.pad(group["point_coords"], (0, 0, 0, num_corrections))  # (G, 2 + R, 2)
    point_labels = torch.nn.functional.pad(group["point_labels"], (0, num_corrections), value=-1)  # (G, 2 + R)
    num_points = group["num_points"].clone()  # (G,)
    has_text = torch.zeros_like(num_points) if text_map is None else group["has_text"].long()  # (G,)
    mask_inputs = masks.new_zeros((num_objects, 1, model.image_size // 4, model.image_size // 4), dtype=torch.float32)
    if loss_settings.click_similarity > 0:
        clicked = (num_points == 1).nonzero().squeeze(1)  # not the boxes
        on_device = clicked.to(device, non_blocking=run.may_overlap(device))
        with run.autocast(device, precision):
            logits = click_similarity(
                embeddings, image_index[clicked].to(device), point_coords[on_device, 0], model.image_size
            )
            similarity_loss = mask_shape_loss(
                models.upscale_masks(logits, truth.shape[-2:]), truth[on_device, None], loss_settings
            ).squeeze(1)
        yield on_device, loss_settings.click_similarity * similarity_loss, torch.zeros_like(similarity_loss)

    for round_number in range(int(num_rounds.max())):
        # objects with the same number of points, and words or not, go through the decoder together: padding would move
        # the logits
        kinds = 2 * num_points + has_text
        for kind in kinds[num_rounds > round_number].unique().tolist():
            count, is_worded = divmod(kind, 2)
            chosen = ((kinds == kind) & (num_rounds > round_number)).nonzero().squeeze(1)
            on_device = chosen.to(device, non_blocking=run.may_overlap(device))
            inputs = (
                *(model, embeddings, image_index[chosen], point_coords[on_device, :count]),
                *(point_labels[on_device, :count], mask_inputs[on_device] if round_number > 0 else None),
                *(truth[on_device], loss_settings, masks[on_device]),
                *(class_head, None if class_head is None else group["class_targets"][on_device]),
                *(text_map, group["text_embeddings"][on_device] if is_worded else None),
            )
            with run.autocast(device, precision):
                if prompt_settings.detach:
                    object_loss, object_iou, fed_back = _decode_round(*inputs)
                else:
                    object_loss, object_iou, fed_back = checkpoint(
                        _decode_round, *inputs, use_reentrant=False, preserve_rng_state=False
                    )
            fed_back = fed_back.detach() if prompt_settings.detach else fed_back
            mask_inputs = mask_inputs.index_copy(0, on_device, fed_back)
            rounds = num_rounds[chosen].to(device, non_blocking=run.may_overlap(device))
            yield on_device, object_loss / rounds, object_iou / rounds
        if round_number == num_corrections:
            break
        # the next click: uniform in the error, or now and then in the object
        clicking = (num_rounds > round_number + 1) & group["is_click"][:, round_number]
        chosen = clicking.nonzero().squeeze(1).to(device, non_blocking=run.may_overlap(device))
        if len(chosen) == 0:
            continue
        with torch.no_grad():
            pred_masks = models.upscale_masks(mask_inputs[chosen], masks.shape[-2:]).squeeze(1) > 0  # (G', S, S)
            pred_masks &= ~group["is_truth_click"][chosen, round_number, None, None]  # as if nothing had been found
            coords, labels = prompts.random_correction_points(
                masks[chosen], pred_masks, group["uniform"][chosen, round_number]
            )
            place = num_points[clicking].to(device, non_blocking=run.may_overlap(device))
            point_coords[chosen, place] = coords.squeeze(1)
            point_labels[chosen, place] = labels.squeeze(1)
        num_points[clicking] += 1


def _decode_round(
    model, embeddings, image_index, point_coords, point_labels, mask_inputs, truth, loss_settings, full_size_masks,
    class_head, class_targets, text_map, text_embeddings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Decode objects that have the same number of points: loss (O,), IoU (O,) of the chosen mask, and its logits."""
    text_tokens = None if text_embeddings is None else text_map(text_embeddings)  # (O, C)
    num_prompts = point_coords.shape[1] + (text_tokens is not None)
    low_res_masks, iou_predictions, object_score_logits, mask_tokens = models.decode(
        model, embeddings, image_index, point_coords, point_labels, mask_inputs, num_prompts == 1, text_tokens
    )
    class_losses = None if class_head is None else class_head.loss(mask_tokens, class_targets)  # (O, M)
    object_loss, iou = mask_prediction_loss(
        low_res_masks, iou_predictions, object_score_logits, truth, loss_settings, full_size_masks, class_losses
    )
    best = iou_predictions[:, : iou.shape[1]].argmax(1, keepdim=True)
    return object_loss, iou.gather(1, best).squeeze(1), evaluation.pick_mask(low_res_masks, iou_predictions)


def background_losses(
    model: torch.nn.Module,
    embeddings: Embeddings,
    batch: dict,
    class_head: ClassHead,
    loss_settings: LossSettings,
    clicks_per_forward: int | None,
    precision: str,
) -> Iterator[torch.Tensor]:
    """Compute the loss of clicks on what is no object: each of their masks is to be "none".

    Args:
        clicks_per_forward: clicks that are decoded together, at most; None: all.
    Yields:
        weighted sums over some of the batch's clicks, scalars.
    """
    num_clicks, factor = len(batch["background_coords"]), loss_settings.classes * (1 + loss_settings.all_masks)
    for first in range(0, num_clicks, clicks_per_forward or num_clicks or 1):
        chosen = slice(first, first + (clicks_per_forward or num_clicks))
        coords, index = batch["background_coords"][chosen], batch["background_index"][chosen]  # (k, 2), (k,)
        labels = torch.ones(len(coords), 1, dtype=torch.int32, device=coords.device)
        with run.autocast(coords.device, precision):
            *_, mask_tokens = models.decode(model, embeddings, index, coords[:, None], labels, None, True)
        targets = torch.zeros(len(coords), dtype=torch.long, device=coords.device)
        of_clicks = class_head.loss(mask_tokens, targets).mean(1)  # (k,), of three masks each
        yield factor * (of_clicks * batch["background_weight"][chosen]).sum()


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def metric_names(clicks: list[int]) -> list[str]:
    """Name what `evaluate` measures of each object: after these numbers of clicks, then the others."""
    names = [f"val/iou_{count}_click" + ("s" if count > 1 else "") for count in clicks]
    return [*names, "val/oracle_iou_1_click", "val/iou_box"]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    items: list[Item],
    min_area_px: int,
    clicks: list[int],
    precision: str,
    samples_dir: Path | None,
    picture_images: int,
    entries: dict[tuple[Path, bool], Path] | None = None,
    class_head: ClassHead | None = None,
    automatic: AutomaticSettings | None = None,
    text_map: words.TextMap | None = None,
    text_encoder: words.NamedShapes | words.OpenClip | None = None,
) -> dict[str, float]:
    """Measure a model on every object of the items, at each picture's own size.

    Where several processes train, each measures its share of the pictures.

    Args:
        min_area_px: smaller objects are left out.
        clicks: numbers of clicks to report, such as [1, 2, 3, 5, 9].
        samples_dir: where to put pictures (image with prompts, prediction, truth) of the first `picture_images` items.
        entries: as for `read_picture`.
        class_head: whose answers are measured, for confusion.png and classes.csv too; None: masks alone.
        automatic: the grid of the automatic masks whose precision is measured by class; None: it is not.
        text_map, text_encoder: what turns crops and class names into tokens; None: masks from words are not measured.
    Returns:
        {"val/iou_1_click": mean over objects, ...} for `metric_names`, and "val/num_images", "val/num_objects"; with
        classes also val/class_accuracy_1_click, val/mask_ap and val/mask_ap_50; with words val/iou_crop, and
        val/iou_words where objects have names.
    """

    def read(item: Item) -> tuple[Instances, torch.Tensor | FrozenMaps]:
        instances = item.read()
        return instances, read_picture(item, instances.layers.shape[1:], False, model.image_size, entries)

    model.eval()
    names = metric_names(clicks)
    measured, drawn = [], []  # of each picture: IoUs of its objects, (metrics, O); what is drawn of it, or None
    worded = []  # of each picture: IoUs of its objects from crops and from words, (2, O)
    answered, matched = [], []  # of each picture: the confusion matrices of its objects; the matches of its masks
    own = ranks.share(items)
    progress = tqdm(own, desc="evaluate", leave=False, disable=None)
    with run.start_threads() as threads:
        readings = run.read_ahead(read, [item for _, item in own])
        for (number, item), reading in zip(progress, readings, strict=True):
            instances, picture = reading.result()
            layers = instances.layers  # (L, H, W)
            objects = evaluation.kept_objects(layers, min_area_px)
            with run.autocast(model.device, precision):
                embeddings = embedding_cache.embed(model, picture)
            is_pictured = samples_dir is not None and number < picture_images
            of_groups, logits = [torch.zeros(len(names), 0)], []
            pictured = []  # (click, predicted mask, true mask) of this picture's objects, if it is drawn
            for masks in evaluation.group_masks(layers, objects, model.device):  # (O, H, W)
                clicked = evaluation.click_objects(model, embeddings, masks, max(clicks), precision, threads)
                after_clicks = [clicked.ious[:, count - 1] for count in clicks]
                of_groups.append(torch.stack([*after_clicks, clicked.first_ious.amax(1), clicked.box_iou]))
                if class_head is not None:
                    logits.append(class_head(clicked.first_tokens))
                if is_pictured:
                    pictured += zip(clicked.first_points, clicked.first_masks, masks, strict=True)
            measured.append(torch.cat(of_groups, 1))
            if text_map is not None:
                worded.append(
                    measure_words(
                        model, embeddings, item, instances, objects, precision, threads, text_map, text_encoder
                    )
                )
            if class_head is not None:
                targets = class_heads.class_targets(instances, objects, class_head.names)
                answered.append(class_metrics.count_answers(targets, torch.cat(logits).cpu().numpy()))
            if class_head is not None and automatic is not None:
                with run.autocast(model.device, precision):
                    generated = mask_generation.generate_masks(
                        model,
                        read_image(item.image_path),
                        automatic,
                        embeddings,
                        ClassFilter(class_head, nms_across_classes=False),
                    )
                matched.append(
                    class_metrics.match_masks(generated.annotations, instances, class_head.names, min_area_px)
                )
            drawn.append(None)
            if is_pictured:
                with drawing(item.name):
                    drawn[-1] = draw_sample(read_image(item.image_path), *zip(*pictured, strict=True))
    write_pictures(samples_dir, [item.name for item in items], ranks.gather(drawn))
    ious = torch.cat(ranks.gather(measured), 1)
    means = {name: of_objects.mean().item() for name, of_objects in zip(names, ious, strict=True)}
    if class_head is not None:
        folder = samples_dir if ranks.is_first() else None
        of_classes = ranks.gather(answered), ranks.gather(matched)
        reported = class_metrics.report_classes(*of_classes, class_head.names, folder)
        means |= {f"val/{name}": value for name, value in reported.items()}
    if text_map is not None:
        from_crops, from_words = torch.cat(ranks.gather(worded), 1)
        means[CROP_IOU] = from_crops.mean().item()
        if not from_words.isnan().all():
            means["val/iou_words"] = from_words.nanmean().item()
    return means | {"val/num_images": len(items), "val/num_objects": ious.shape[1]}


def measure_words(
    model, embeddings: Embeddings, item: Item, instances: Instances, objects, precision, threads, text_map, text_encoder
) -> torch.Tensor:
    """Measure masks of a picture's objects from crops and from class names: IoUs float32 (2, O).

    Those of the second row are nan where an object has no name, or one that another object of the picture has.
    """
    image_rgb, ious = read_image(item.image_path), [torch.zeros(2, 0)]
    said = instances.annotations
    names = [class_name(said[object_id - 1]) if said else "" for _, object_id in objects]
    counts = Counter(names)
    for masks in evaluation.group_masks(instances.layers, objects, model.device):  # (O, H, W)
        crops = [words.crop_object(image_rgb, m, words.VALIDATION_SCALE, False, text_encoder.crop_side) for m in masks]
        own_names, names = names[: len(masks)], names[len(masks) :]
        is_named = torch.tensor([name != "" and counts[name] == 1 for name in own_names])
        rows = [text_encoder.embed_crops(torch.from_numpy(np.stack(crops)).to(model.device))]
        if is_named.any():
            rows.append(
                text_encoder.embed_words([name or own_names[int(is_named.int().argmax())] for name in own_names])
            )
        of_rows = [
            evaluation.measure_tokens(model, embeddings, masks, text_map(row.to(model.device)), precision, threads)
            for row in rows
        ]
        of_rows[1:] = [torch.where(is_named, of_rows[-1], torch.nan)]
        ious.append(torch.stack(of_rows))
    return torch.cat(ious, 1)


def draw_sample(
    image_rgb: np.ndarray, points: Sequence[np.ndarray], pred_masks: Sequence[np.ndarray], masks: Sequence[np.ndarray]
) -> np.ndarray:
    """Draw clicks, predicted masks and true masks side by side, one colour per object: uint8, 384 px a side each."""
    panels = [image_rgb]
    colors = id_colors(np.arange(1, len(masks) + 1)).astype(np.float32)
    for shown in (pred_masks, masks):
        panel = image_rgb.astype(np.float32)
        for mask, color in zip(shown, colors, strict=True):
            panel[mask] = 0.4 * panel[mask] + 0.6 * color
        panels.append(panel)
    scale = 384 / max(image_rgb.shape[:2])
    size_wh = (max(1, round(image_rgb.shape[1] * scale)), max(1, round(image_rgb.shape[0] * scale)))
    panels = [cv2.resize(panel.astype(np.uint8), size_wh, interpolation=cv2.INTER_AREA) for panel in panels]
    for x, y in points:
        center = (round((x + 0.5) * scale), round((y + 0.5) * scale))
        cv2.circle(panels[0], center, 3, (0, 0, 0), -1)
        cv2.circle(panels[0], center, 2, (80, 255, 80), -1)
    return np.concatenate(panels, 1)


# ---------------------------------------------------------------------------------------------------------------------
# the run


def find_cache_obstacle(trainable: dict[str, torch.nn.Parameter], settings: Config) -> str | None:
    """Say why embeddings cannot be kept, or None."""
    if trained := [name for name in trainable if name.startswith("image_encoder.")]:
        return f"train.trainable has parts of the image encoder ({trained[0]}, ...), so embeddings change at every step"
    if settings.data.augmentation.color_jitter > 0:
        return f"data.color_jitter is {settings.data.augmentation.color_jitter}, so no picture is seen twice as it was"
    return None


def is_projected(trainable: dict[str, torch.nn.Parameter]) -> bool:
    """Tell whether the cache can hold the fine maps after conv_s0 and conv_s1, because these do not train."""
    return not any(name.startswith(embedding_cache.HIGH_RES_CONVS) for name in trainable)


def describe_cache(
    model: torch.nn.Module,
    trainable: dict[str, torch.nn.Parameter],
    settings: Config,
    num_train: int,
    num_val: int,
    encoder_share: float,
) -> str:
    """Say what a run without a cache could save with it: the encoder's share of a step, for so much disk."""
    num_bytes = embedding_cache.count_entry_bytes(model, is_projected(trainable), settings.cache_precision)
    num_bytes *= num_train * (1 + settings.data.augmentation.hflip) + num_val
    return (
        f"the frozen image encoder takes {encoder_share:.0%} of a step: cache=auto leaves it out, for "
        f"{num_bytes / 2**30:.2f} GiB on disk"
    )


def cache_embeddings(
    model: torch.nn.Module,
    trainable: dict[str, torch.nn.Parameter],
    precision: str,
    train_items: list[Item],
    val_items: list[Item],
    settings: Config,
) -> dict[tuple[Path, bool], Path] | None:
    """Let a frozen encoder see each picture of a run once, for this run and all later ones.

    Args:
        settings: cache, cache_precision, the augmentation and train.steps are used: without steps, no picture of
            train_items is.
    Returns:
        the entries that `read_picture` takes, or None: no cache.
    Raises:
        ValueError: where a cache is asked for and cannot be, and as `fill_cache`.
    """
    flips = (False, True)[: 1 + settings.data.augmentation.hflip]
    used_items = train_items if settings.train.steps > 0 else []
    pictures = [(item.image_path, is_mirrored) for item in used_items for is_mirrored in flips]
    pictures += [(item.image_path, False) for item in val_items]
    obstacle = find_cache_obstacle(trainable, settings)
    frozen = is_projected(trainable)
    keys = (settings.cache, settings.cache_precision, precision, frozen, pictures, obstacle)
    plan = ranks.from_first(functools.partial(embedding_cache.plan_cache, model, *keys))
    if plan is None:
        return None
    embedding_cache.fill_cache(model, plan)
    return plan.entries


def parameter_groups(trainable: dict[str, torch.nn.Parameter], optim: OptimSettings) -> list[dict]:
    """Group parameters by learning-rate factor (encoder or not) and weight decay (not of biases, norms, embeddings)."""
    groups = {}
    for name, parameter in trainable.items():
        lr_factor = optim.encoder_lr_factor if name.startswith("image_encoder.") else 1.0
        is_embedding = "embed" in name or "_token" in name
        weight_decay = 0.0 if parameter.ndim <= 1 or is_embedding else optim.weight_decay
        group = groups.setdefault(
            (lr_factor, weight_decay), {"params": [], "lr_factor": lr_factor, "weight_decay": weight_decay}
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_class_head(
    settings: Config, counts: dict, model: torch.nn.Module, resume_path: Path | None
) -> ClassHead | None:
    """Make the head that learns the classes of a run, or None for masks alone.

    A head with the same classes in model.checkpoint goes on from there.

    Args:
        counts: from `list_data`, with the objects of each class.
    Raises:
        ValueError: as `choose_classes` and `weigh_classes`; where nothing trains and the checkpoint has no such head.
    """
    earlier = None if resume_path else class_heads.load_class_head(settings.model["checkpoint"], torch.device("cpu"))
    if settings.classes is None:
        if earlier is not None:
            print(
                f"model.checkpoint knows the classes {', '.join(first_few(earlier.names, 20))}: classes=null drops them"
            )
        return None
    is_evaluated = settings.train.steps == 0 and resume_path is None
    if resume_path is not None:
        names = load_checkpoint(resume_path)["classes"]
    elif is_evaluated and earlier is not None and settings.classes in ("auto", earlier.names):
        names = earlier.names
    else:
        names = class_heads.choose_classes(settings.classes, counts["classes"])
    head = ClassHead(names, model.sam_mask_decoder.transformer_dim, settings.common.seed)
    if earlier is not None and earlier.names == names:
        head.load_state_dict(earlier.state_dict())
    elif is_evaluated or earlier is not None:
        there = "no classes" if earlier is None else f"the classes {', '.join(first_few(earlier.names, 20))}"
        line = f"model.checkpoint has {there}, but classes are {', '.join(first_few(names, 20))}"
        if is_evaluated:
            raise ValueError(f"{line}; with train.steps=0 nothing learns them: give a checkpoint with these classes")
        print(f"{line}: they are learned anew")
    head.class_weights = class_heads.weigh_classes(settings.class_head.class_weights, names, counts["classes"]["train"])
    return head.to(model.device)


def make_text_map(
    settings: Config,
    encoder: words.NamedShapes | words.OpenClip | None,
    model: torch.nn.Module,
    resume_path: Path | None,
) -> words.TextMap | None:
    """Make what turns embeddings of crops and words into prompt tokens, or None: see `words.make_text_map`."""
    if encoder is None:
        return None
    num_channels = model.sam_mask_decoder.transformer_dim
    earlier = settings.model["checkpoint"] if resume_path is None else str(resume_path)
    is_trained = settings.train.steps > 0
    text_map = words.make_text_map(encoder, num_channels, settings.common.seed, earlier, is_trained)
    return text_map.to(model.device)


def choose_automatic(settings: Config, is_end: bool) -> AutomaticSettings | None:
    """Choose the grid of automatic masks for an evaluation, SAM 2's own without thresholds; None: none at this one.

    Average precision ranks masks: none is left out for its score, and weights are not measured by what suits others.
    """
    when = settings.train.eval_automatic
    if settings.classes is None or when == "never" or (when == "ends" and not is_end):
        return None
    return AutomaticSettings(pred_iou_thresh=0.0, stability_score_thresh=0.0)


def list_data(settings: Config, run_dir: Path, resume_path: Path | None) -> tuple[dict[str, list[Item]], dict]:
    """List the pictures of each split, check them, and leave out what cannot be used.

    Returns:
        {"train": items, "val": items}, with general_data "general" too, and counts for the run's record.
    Raises:
        FileNotFoundError, ValueError: as `split_items`, `check_data` and `keep_splits`; for a split without a picture.
    """
    train_items, val_items = list_items(settings.data.reader_keys, "data", settings.check is True)
    root, on_bad = settings.data.reader_keys["root"], settings.data.reader_keys["on_bad"]
    splits = {"train": train_items, "val": val_items}
    if settings.general_data is not None:
        keys = settings.general_data | {"on_bad": on_bad}  # one check looks at both
        _, general_items = list_items(keys, "general_data", settings.check is True)
        splits["general"] = [replace(item, name=f"general/{item.name}") for item in general_items]  # no other's name
    stored = loops.stored_splits(resume_path)
    splits = loops.keep_splits(stored, splits)
    splits, counts, report = check_data(
        splits, settings.data.min_area_px, on_bad, run_dir, settings.check is True, settings.picture_attributes
    )
    if settings.check is True:
        return splits, counts
    splits = loops.keep_splits(stored, splits)  # what the run had is usable still
    if (settings.train.steps > 0 or settings.check == "fit") and not splits["train"]:
        raise ValueError(f"data.root {root} has no training picture with objects")
    if not splits["val"]:
        raise ValueError(f"data.root {root} has no validation picture with objects: see data.val_fraction")
    if settings.general_data is not None and not splits["general"]:
        place = settings.general_data["root"]
        raise ValueError(f"general_data.root {place} has no validation picture with objects: see its val_fraction")
    if settings.check == "fit":
        splits = {"train": [find_hardest(splits["train"], report, settings)], "val": splits["val"][:1]}
    return splits, counts


def find_hardest(items: list[Item], report: CheckReport, settings: Config) -> Item:
    """Find, print and return the item that takes the most memory: the most objects, in the largest picture."""
    of_name = {}
    for item in report.usable:
        num_objects = int((item.content.areas_px >= settings.data.min_area_px).sum())
        num_used = min(num_objects, settings.train.objects_per_image)
        of_name[item.name] = (num_used, item.orig_hw[0] * item.orig_hw[1], num_objects, item.orig_hw)
    hardest = max(items, key=lambda item: of_name[item.name])
    num_used, _, num_objects, (height, width) = of_name[hardest.name]
    print(
        f"the largest training picture with the most objects: {hardest.image_path}, {height} x {width} px, "
        f"{num_used} of {num_objects} objects (train.objects_per_image={settings.train.objects_per_image})"
    )
    return hardest


def list_changes(settings: Config) -> list[fit.Change]:
    """List what needs less memory than a config, the gentlest first: changes for check=fit to try."""
    train_settings = settings.train
    num_objects = train_settings.batch_size * train_settings.objects_per_image
    is_frozen = set(train_settings.trainable) <= {"prompt_encoder", "mask_decoder"}
    changes = []
    if settings.cache in ("off", False) and is_frozen and settings.data.augmentation.color_jitter == 0:
        changes.append({"cache": "auto"})
    changes += [
        {"train.objects_per_forward": count}
        for count in (8, 2)
        if count < min(num_objects, train_settings.objects_per_forward or num_objects)
    ]
    if train_settings.batch_size > 1:
        changes.append(
            {"train.batch_size": 1, "train.accumulate": train_settings.accumulate * train_settings.batch_size}
        )
    family, is_official, size = settings.model["name"].partition("_hiera_")
    for smaller in HIERA_SIZES[: HIERA_SIZES.index(size)] if is_official else []:
        model = OmegaConf.load(CONFIGS / "model" / f"{family}_hiera_{smaller}.yaml")
        changes.append({f"model.{key}": value for key, value in model.items() if key not in ("image_size", "lr")})
    return changes


def train(config: dict, run_dir: Path, resume_path: Path | None, data: tuple | None = None) -> float | dict:
    """Train as configured and return the best value of `train.select_by`; with check=fit the last row of the metrics.

    Args:
        config: the whole resolved config; of a resumed run, the stored one.
        run_dir: a new folder.
        resume_path: the last.pt to continue from, or None.
        data: what `list_data` returned; None: list it.
    """
    config = fix_decoder(config)
    settings = read_settings(Config, config)
    common, train_settings, optim_settings = settings.common, settings.train, settings.optim
    device, precision = run.set_up_device(common.device, common.precision)
    ranks.own_size("train.batch_size", train_settings.batch_size)  # raises before anything takes time
    run.seed_everything(common.seed)
    has_words = settings.text_encoder is not None and settings.check is not True
    build = functools.partial(words.build_encoder, settings.text_encoder, device)
    text_encoder = ranks.after_first(build) if has_words else None

    # data: list, check, leave out what cannot be used
    splits, counts = data or ranks.from_first(functools.partial(list_data, settings, run_dir, resume_path))
    if settings.check is True:
        return float("nan")
    train_items, val_items = splits["train"], splits["val"][: train_settings.eval_images]
    general_items = splits["general"][: train_settings.eval_images] if "general" in splits else []
    start_run(run_dir, config, counts)

    # model and optimizer
    weights = {} if resume_path is None else {"checkpoint": str(resume_path)}  # the file it started from may be gone
    if settings.check == "fit" and not models.has_checkpoint(settings.model):
        weights = {"checkpoint": "none"}  # of the same size as the model's own, which would be downloaded
    build = functools.partial(models.build_sam2, **settings.model | weights, fast_decoder=settings.fast_decoder)
    model = ranks.after_first(functools.partial(build, device=device))
    trainable = models.freeze_except(model, train_settings.trainable)
    if run.choose_channels_last(train_settings.channels_last, device):
        model = model.to(memory_format=torch.channels_last)
    num_trainable, num_all = sum(p.numel() for p in trainable.values()), sum(p.numel() for p in model.parameters())
    print(
        f"{settings.model['name']}: {num_trainable:,} parameters trained, {num_all - num_trainable:,} frozen; "
        f"{device}, {precision}; loss: {sections.describe_terms(settings.loss.terms)}"
    )
    class_head = make_class_head(settings, counts, model, resume_path)
    text_map = make_text_map(settings, text_encoder, model, resume_path)
    heads = {"class_head": class_head, "text_map": text_map}
    beside = {name: module for name, module in heads.items() if module is not None}
    groups = parameter_groups(trainable, optim_settings)
    head_parameters = {name: [*module.parameters()] for name, module in beside.items()}
    for name, parameters in head_parameters.items():
        own_lr = settings.class_head.lr if name == "class_head" else settings.prompts.text.lr
        groups.append({"params": parameters, "own_lr": own_lr, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=optim_settings.lr, betas=tuple(optim_settings.betas))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if train_settings.compile:
        plain, compiled = model.image_encoder.forward, run.compile_forward(model.image_encoder, device)
        model.image_encoder.forward = lambda images: (compiled if model.training else plain)(images)
    loss_size = train_settings.loss_size or model.image_size // 4

    # embeddings of a frozen encoder, from disk
    entries = cache_embeddings(model, trainable, precision, train_items, val_items + general_items, settings)
    measure = functools.partial(
        evaluate, model, min_area_px=settings.data.min_area_px, clicks=train_settings.eval_clicks, precision=precision,
        entries=entries,
    )  # fmt: skip
    measure_own = functools.partial(measure, class_head=class_head, text_map=text_map, text_encoder=text_encoder)

    is_resumed, state = resume_path is not None, (model, optimizer, scaler)
    loop = loops.resume_run(resume_path, run_dir, *state, beside) if is_resumed else loops.LoopState()
    first_step = loop.step
    log = MetricsLog(run_dir, loop.rows)
    description = {"script": "train_sam2", "config": config}
    if class_head is not None:
        description["classes"] = class_head.names
    if text_map is not None:
        description["text_encoder"] = text_map.encoder_name
    names = loops.split_names(splits)
    save = functools.partial(loops.save_run, run_dir, loop, *state, description, names, beside=beside)
    if train_settings.blend and not settings.check and ranks.is_first():
        keep_start(run_dir, resume_path, model)
    if is_resumed:
        save(is_best=False)  # from now on this folder can be resumed too

    objects_per_image, group_size = train_settings.objects_per_image, train_settings.objects_per_forward
    class_names = None if class_head is None else class_head.names
    dataset = PromptedMasks(
        train_items, common.seed, model.image_size, objects_per_image, settings.data, settings.prompts, entries,
        class_names, settings.class_head.background_clicks, 0 if text_encoder is None else text_encoder.crop_side,
    )  # fmt: skip
    images_per_step = train_settings.batch_size * train_settings.accumulate
    batches = loops.load_batches(
        dataset,
        collate,
        loop.step * images_per_step,
        train_settings.steps * images_per_step,
        train_settings.batch_size,
        common.num_workers,
        device,
    )
    hints_at_cache = settings.cache in ("off", False) and find_cache_obstacle(trainable, settings) is None
    hints_at_cache = hints_at_cache and not settings.check
    timed_step = loop.step + 1  # the first one is slower
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
                metrics = measure_own(
                    val_items, samples_dir=samples_dir, picture_images=train_settings.picture_images,
                    automatic=choose_automatic(settings, is_end=loop.step == 0 or is_last),
                )  # fmt: skip
                metrics |= measure_general(measure, general_items)
                shown = ("val/iou", CLASS_ACCURACY, "val/mask_ap")
                ious = [f"{name[4:]} {value:.3f}" for name, value in metrics.items() if name.startswith(shown)]
                tqdm.write(f"step {loop.step}: " + "  ".join(ious))
                if line := describe_forgetting(loop.start_metrics, metrics, train_settings.max_forgetting):
                    tqdm.write(line)
                if train_settings.select_by not in metrics:
                    raise ValueError(
                        f"train.select_by is {train_settings.select_by}, but no validation object that is measured has "
                        "one of the classes; see train.eval_images"
                    )
                log.log(loop.step, metrics)
                plot_curves(loop.rows, run_dir / "curves.png")
                save(is_best=loop.take(metrics, train_settings.select_by))
        elif loop.step % train_settings.save_every == 0:
            save(is_best=False)
        if train_settings.early_stop_evals is not None and loop.bad_evals >= train_settings.early_stop_evals:
            tqdm.write(f"early stop: {train_settings.select_by} has not risen in {loop.bad_evals} evaluations")
            break
        if is_last:
            break
        model.train()

        # 2. learning rate
        schedule = optim_settings.warmup_steps, optim_settings.min_lr_factor
        lr = run.cosine_lr(loop.step, train_settings.steps, optim_settings.lr, *schedule)
        for group in optimizer.param_groups:
            if "own_lr" in group:
                group["lr"] = run.cosine_lr(loop.step, train_settings.steps, group["own_lr"], *schedule)
            else:
                group["lr"] = lr * group["lr_factor"]

        loss_and_iou, step_names = torch.zeros(2, device=device), []
        for micro_step in range(train_settings.accumulate):
            batch = window.next_batch(batches)
            step_names += batch["names"]
            batch |= loops.to_device({key: batch[key] for key in batch if key not in READ_ON_CPU}, device)

            # 3. forward and backward, part by part
            run.seed_dropout(common.seed, loop.step, micro_step)
            is_timed = hints_at_cache and loop.step == timed_step
            start_s = run.now_s(device) if is_timed else 0.0
            with run.autocast(device, precision):
                embeddings = embedding_cache.embed(model, batch["pictures"])
            if text_encoder is not None:
                batch["text_embeddings"] = text_encoder.embed_crops(batch["crops"])  # (O, D)
            encoded_s = run.now_s(device) if is_timed else 0.0
            cut_embeddings, leaves = models.cut(embeddings)
            for chosen, object_loss, object_iou in prompted_losses(
                model, cut_embeddings, batch, settings.prompts, settings.loss, loss_size, group_size, precision,
                class_head, text_map,
            ):  # fmt: skip
                weight = batch["object_weight"][chosen] / train_settings.accumulate
                loss = (object_loss * weight).sum()
                scaler.scale(loss).backward()
                loss_and_iou += torch.stack([loss.detach(), (object_iou * weight).sum()])
            if class_head is not None:
                for loss in background_losses(
                    model, cut_embeddings, batch, class_head, settings.loss, group_size, precision
                ):
                    loss = loss / train_settings.accumulate
                    scaler.scale(loss).backward()
                    loss_and_iou[0] += loss.detach()
            models.send_back(embeddings, leaves)

        # 4. read and clip
        samples = f"pictures {', '.join(step_names)}"
        step_loss, step_iou = loss_and_iou.tolist()  # the first wait for the device
        loops.check_finite(step_loss, loop.step, samples)
        step_loss, step_iou = ranks.mean(torch.tensor([step_loss, step_iou])).tolist()
        ranks.average_gradients([*trainable.values(), *sum(head_parameters.values(), [])])
        grad_norm = loops.clip_gradients(trainable.values(), train_settings.clip_norm, optimizer, scaler, loop, samples)

        for parameters in head_parameters.values():  # each by itself: masks learn as without it
            torch.nn.utils.clip_grad_norm_(parameters, train_settings.clip_norm)

        # 5. update (the scaler leaves out a step whose fp16 gradients overflowed)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loop.step += 1

        # 6. log
        if is_timed:
            encoder_share = (encoded_s - start_s) / (run.now_s(device) - start_s)
            tqdm.write(describe_cache(model, trainable, settings, len(train_items), len(val_items), encoder_share))
        means = loops.running_means(loop.running, {"train/loss": step_loss, "train/iou": step_iou})
        progress.update()
        if loop.step % train_settings.log_every == 0 or loop.step == train_settings.steps:
            steps_per_s, wait_share = window.read(loop.step)
            images_per_s = steps_per_s * images_per_step
            update = {"train/grad_norm": grad_norm, "lr": lr, "skipped_steps": loop.num_skipped}
            speed = {"images_per_s": images_per_s, "data_wait_share": wait_share}
            log.log(loop.step, means | update | speed)
            progress.set_postfix_str(
                f"loss {means['train/loss']:.3f}, iou {means['train/iou']:.3f}, {images_per_s:.1f} images/s, "
                f"waits for data {wait_share:.0%}"
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
    if train_settings.blend:
        mixed = blend_weights(run_dir, model, measure_own, val_items, general_items, beside)
        loop.best = mixed | {"step": loop.step}
    finish_run(run_dir, {"start": loop.start_metrics, "best": loop.best, "last": last})
    if settings.data.reader_keys["format"] == "labels" and loop.step > first_step:
        ious = loop.start_metrics["val/iou_1_click"], loop.best["val/iou_1_click"]
        paths = [item.annotation_path for item in train_items]
        labels_dir = Path(settings.data.reader_keys["labels"])
        rounds.add_round(labels_dir, paths, len(val_items), ious, settings.model["checkpoint"], run_dir)
    best, shown = loop.best, ("iou", "class_accuracy", "mask_ap")
    names = [name for name in loop.start_metrics | last if any(word in name for word in shown)]
    if not general_items:
        names = [name.removeprefix("val/") for name in names]
    change = {name: best[name] - value for name, value in loop.start_metrics.items() if name in best}
    columns = {"step 0": loop.start_metrics, "best": best, "change": change, "last": last}
    print("\n" + "\n".join(metric_lines(names, columns)))
    print(f"best checkpoint: step {best['step']}; {best['val/num_objects']} objects in {best['val/num_images']} images")
    if class_head is not None and best["step"] == 0 and train_settings.steps > 0:
        print(f"best.pt is of step 0, so its classes have not been learned: see train.select_by={CLASS_ACCURACY}")
    if line := describe_forgetting(loop.start_metrics, best, train_settings.max_forgetting):
        print(line)
    shown_dir, example = os.path.relpath(run_dir), os.path.relpath(val_items[0].image_path)
    print(f"\nWritten to {shown_dir}. Next, segment a picture with it:")
    print("  " + sections.show_command("infer_sam2.py", checkpoint=f"{shown_dir}/best.pt", input=example))
    return loop.best[train_settings.select_by]


# ---------------------------------------------------------------------------------------------------------------------
# what is not to be forgotten


def measure_general(measure: Callable[..., dict[str, float]], items: list[Item]) -> dict[str, float]:
    """Measure the general data as `evaluate` does: {"general/iou_1_click": mean over objects, ...}; {} without."""
    metrics = measure(items, samples_dir=None, picture_images=0) if items else {}
    return {name.replace("val/", "general/"): value for name, value in metrics.items()}


def describe_forgetting(start: dict[str, float], now: dict[str, float], limit: float) -> str | None:
    """Say that more than `limit` of the general data's mean IoU after one click was lost since step 0, or nothing."""
    name = "general/iou_1_click"
    if name not in start or start[name] - now[name] <= limit:
        return None
    return (
        f"forgetting: {name} {start[name]:.3f} -> {now[name]:.3f}, a loss above train.max_forgetting={limit}; less is "
        "forgotten with a lower optim.lr, fewer parts in train.trainable, or train.blend=true"
    )


def keep_start(run_dir: Path, resume_path: Path | None, model: torch.nn.Module) -> None:
    """Write the weights before training to start.pt; a resumed run takes over that of the run it continues."""
    weights = model.state_dict() if resume_path is None else load_checkpoint(resume_path.parent / "start.pt")["model"]
    save_checkpoint(run_dir / "start.pt", {"format": 1, "model": weights})


def blend_weights(
    run_dir: Path,
    model: torch.nn.Module,
    measure: Callable[..., dict[str, float]],
    val_items: list[Item],
    general_items: list[Item],
    beside: dict[str, torch.nn.Module],
) -> dict[str, float]:
    """Mix the weights at the start and at the end, and make the mixture that knows most of both datasets best.pt.

    Args:
        model: with the weights at the end.
        measure: `evaluate`, which takes items, samples_dir and picture_images here.
        beside: what is not mixed, as for `save_run`: best.pt gets it as it is at the end.
    Returns:
        the metrics of that mixture, with "blend": the share of the weights at the end.
    Source: Wortsman et al. 2022 (WiSE-FT), mixtures in weight space.
    """
    start, end = load_checkpoint(run_dir / "start.pt")["model"], copy.deepcopy(model.state_dict())
    print(f"\n{'weights of the end':<20}{'own':>8}{'general':>8}{'mean':>8}   iou_1_click")
    best: dict[str, float] = {}
    for factor in BLEND_FACTORS:
        mixed = {
            name: torch.lerp(start[name].to(value), value, factor) if value.is_floating_point() else value
            for name, value in end.items()
        }
        model.load_state_dict(mixed)
        metrics = measure(val_items, samples_dir=None, picture_images=0) | measure_general(measure, general_items)
        own, general = metrics["val/iou_1_click"], metrics["general/iou_1_click"]
        print(f"{factor:<20}{own:>8.3f}{general:>8.3f}{(own + general) / 2:>8.3f}")
        if not best or own + general > best["val/iou_1_click"] + best["general/iou_1_click"]:
            best = metrics | {"blend": factor}
            chosen = mixed
    stored = load_checkpoint(run_dir / "best.pt")
    ends = {name: module.state_dict() for name, module in beside.items()}
    save_checkpoint(run_dir / "best.pt", stored | {"model": chosen, "metrics": best} | ends)
    print(f"best.pt is the mixture with {best['blend']} of the weights at the end")
    return best


RESUMABLE = (
    "resume", "train.steps", "device", "num_workers", "data.root", "data.train_list", "data.val_list", "cache",
    "general_data.root",
)  # fmt: skip


@hydra.main(version_base="1.3", config_path="configs/sam2", config_name="train_sam2")
def main(cfg) -> float:
    """Read the config, train, and end with one line on what went wrong and status 1, if anything did."""
    with sections.one_line_errors("train_sam2", "a smaller train.batch_size or train.objects_per_forward"):
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        ranks.join(config)
        hydra_config = HydraConfig.get()
        config, resume_path = config_to_resume(
            Config, "train_sam2", config, list(hydra_config.overrides.task), RESUMABLE, fix_decoder
        )
        run_dir = Path(hydra_config.runtime.output_dir)
        if config["check"] == "fit":
            settings = read_settings(Config, config)
            data = list_data(settings, run_dir, resume_path)
            return fit.check_fit(train, data, config, list_changes(settings), "pictures")
        return train(config, run_dir, resume_path)


if __name__ == "__main__":
    sections.read_command_line("sam2")
    main()
