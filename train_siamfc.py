"""Train the SiamFC tracker on exemplar/instance pairs cut from video sequences, read straight from disk.

    python train_siamfc.py                                         # generated moving shapes, on a CPU
    python train_siamfc.py experiment=siamfc_got10k data.root=/my/GOT-10k
    python train_siamfc.py data=folder_sequences data.root=/my/videos
    python train_siamfc.py check=true data=got10k                  # look at a dataset and stop
    python train_siamfc.py check=fit data=got10k                   # does it fit the memory, how fast is it
    python train_siamfc.py train.steps=0 model.checkpoint=best.pt  # evaluate and stop
    python train_siamfc.py resume=outputs/train_siamfc/<run>       # continue a killed run, exactly
    python train_siamfc.py --cfg job                               # print every knob with its value

Reads   sequences with a box per frame: data=got10k|imagenet_vid|davis_sequences|otb|vot|folder_sequences. Pictures with
        masks train too, both patches from one: as parts beside sequences that validate (data=siamfc_bundled shows how).
Writes  outputs/train_siamfc/<time>/: best.pt (for track.py), last.pt (to resume), metrics.csv, curves.png, samples/
        (exemplar, instance, response), tensorboard/, run.json.
Metrics, of tracking whole validation sequences from their first box:
    val/ao           average overlap over all frames but the first, as GOT-10k
    val/sr_50        share of those frames with an overlap above 0.5
    val/success_auc  area under OTB's success curve, mean over sequences
                     (frames without object are misses, as in OTB's toolkit)
    val/still_...    the same of the first box kept still
    val/loss, val/hit_rate   the training loss on validation pairs, augmented alike, the same each time
    train/loss, train/hit_rate    running means over training steps (bias-corrected, 0.99); hit_rate: share of the pairs
                     whose response is highest at a cell labelled 1
Sources: Bertinetto et al. 2016, arXiv:1606.09549; values as in github.com/huanglianghua/siamfc-pytorch.
"""

import signal
import sys

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):  # before the imports below, which take seconds
        print(__doc__)
        sys.exit()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends at once, up to read_command_line

import functools
import itertools
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import cv2
import hydra
import numpy as np
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from utils import fit, ranks, run
from utils import loop as loops
from utils import settings as sections
from utils.checkpoint import config_to_resume
from utils.images import read_image, write_image
from utils.listing import first_few
from utils.log import MetricsLog, drawing, finish_run, metric_lines, plot_curves, start_run, values_of_step
from utils.settings import SAME_SECTION, CommonSettings, Rule, above, at_least, between, one_of, read_settings
from utils.tracking import siamfc
from utils.tracking.frames import FrameSource
from utils.tracking.metrics import got10k_scores, mean_one_pass_scores, score_boxes, still_boxes
from utils.tracking.sequences import Sequence, file_coordinates, split_dataset
from utils.tracking.siamfc import EXEMPLAR_SIZE, TOTAL_STRIDE, SiamFC
from utils.tracking.tracker import SiamFCTracker, TrackerSettings, track_frames

INSTANCE_SIZE, RESPONSE_SIZE = 239, 15  # px, cells along each side, in training
INTERPOLATIONS = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_LANCZOS4)
BLUR_SIGMA = (0.5, 2.5)  # px
RANDOM_BOX_SHARE = (0.08, 0.4)  # least and most, a share of the picture's shorter side
BELOW_1 = Rule(lambda value: 0 <= value < 1, "0 or more, and below 1")
REPORTED = ("ao", "sr_50", "success_auc")  # what best.pt can be chosen by
# what may differ in a resumed run
RESUMABLE = (
    "resume", "train.steps", "device", "num_workers", "data_root", "data.root", "data.index", "data.parts.*.root",
    "data.parts.*.index",
)  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """Knobs of the training loop (`train:` in configs/tracking/train_siamfc.yaml, which explains each)."""

    steps: Annotated[int, at_least(0)]
    batch_size: Annotated[int, at_least(1)]  # pairs per forward
    accumulate: Annotated[int, at_least(1)]  # forwards per step
    clip_norm: Annotated[float | None, above(0)]
    r_pos: float  # px of the instance
    channels_last: bool
    compile: bool
    log_every: Annotated[int, at_least(1)]  # steps
    eval_every: Annotated[int, at_least(1)]  # steps
    save_every: Annotated[int, at_least(1)]  # steps
    eval_sequences: Annotated[int | None, at_least(1)]
    eval_frames: Annotated[int | None, at_least(2)]
    eval_pairs: Annotated[int, at_least(0)]
    select_by: Annotated[str, one_of(*(f"val/{name}" for name in REPORTED))]
    early_stop_evals: Annotated[int | None, at_least(1)]
    picture_pairs: Annotated[int, at_least(0)]


@dataclass(frozen=True)
class PairSettings:
    """Which frames become pairs, and how patches are varied (`pairs:`)."""

    max_gap: Annotated[int, at_least(1)]  # frames
    stretch: Annotated[float, BELOW_1]
    exemplar_shift: Annotated[float, at_least(0)]  # px of the exemplar
    instance_shift: Annotated[float, at_least(0)]  # px of the instance
    grey: Annotated[float, between(0, 1)]
    color_jitter: Annotated[float, between(0, 1)]
    blur: Annotated[float, between(0, 1)]
    random_interpolation: bool
    random_boxes: Annotated[float, between(0, 1)]
    min_side: float  # px of the frame
    max_side: float  # px of the frame
    min_share: float
    max_share: float
    max_aspect: Annotated[float, at_least(1)]
    min_cover: float

    def __post_init__(self):
        for key in ("side", "share"):
            least, most = getattr(self, f"min_{key}"), getattr(self, f"max_{key}")
            if most < least:
                raise ValueError(f"pairs.max_{key} is {most}; must be at least pairs.min_{key}, {least}")


@dataclass(frozen=True)
class OptimSettings:
    """SGD and its schedule (`optim:`, configs/tracking/optim/sgd.yaml)."""

    lr: Annotated[float, above(0)]
    min_lr: Annotated[float, above(0)]
    hold_steps: Annotated[int, at_least(1)]
    momentum: Annotated[float, BELOW_1]
    weight_decay: Annotated[float, at_least(0)]
    decay_all: bool

    def __post_init__(self):
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr is {self.min_lr}; must be above 0 and at most optim.lr")


@dataclass(frozen=True)
class ModelSettings:
    """The network (`model:`, configs/tracking/model/siamfc.yaml)."""

    name: Annotated[str, Rule(lambda name: name == "siamfc", "siamfc")]
    score_bias: bool
    checkpoint: str | None


@dataclass(frozen=True)
class Config:
    """All keys of this script (configs/tracking/train_siamfc.yaml explains each)."""

    common: Annotated[CommonSettings, SAME_SECTION]
    check: fit.Check
    model: ModelSettings
    data: dict  # a file of configs/tracking/data; its reader checks the keys
    optim: OptimSettings
    tracker: TrackerSettings
    pairs: PairSettings
    train: TrainSettings


# ---------------------------------------------------------------------------------------------------------------------
# disk -> tensors


def usable_frames(sequence: Sequence, pair_settings: PairSettings) -> np.ndarray:
    """List the frames of a sequence whose box is fit for pairs: int64 (number of them,), in order.

    Source: the filter of siamfc-pytorch, whose box area of at least 20 px follows here from min_side.
    """
    if sequence.frame_wh is None:
        return np.zeros(0, np.int64)
    xy, wh = sequence.boxes_xywh[:, :2], sequence.boxes_xywh[:, 2:]  # (T, 2)
    share = wh / np.array(sequence.frame_wh)
    with np.errstate(divide="ignore", invalid="ignore"):  # frames without box are nan, and nan is not within bounds
        is_usable = sequence.visible & (wh >= pair_settings.min_side).all(1) & (wh <= pair_settings.max_side).all(1)
        is_usable &= (share >= pair_settings.min_share).all(1) & (share <= pair_settings.max_share).all(1)
        is_usable &= wh.max(1) <= pair_settings.max_aspect * wh.min(1)
        is_usable &= ((xy < sequence.frame_wh) & (xy + wh > 0)).all(1)  # not beside the frame, where all is grey
    if sequence.cover is not None:
        is_usable &= sequence.cover > max(1.0, pair_settings.min_cover * sequence.cover.max())
    return np.flatnonzero(is_usable)


def draw_frames(usable: np.ndarray, max_gap: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the exemplar's frame, then the instance's: another one within max_gap where there is one, else the same.

    Args:
        usable: int (n,), at least one frame.
    """
    exemplar_frame = int(rng.choice(usable))
    near = usable[(np.abs(usable - exemplar_frame) <= max_gap) & (usable != exemplar_frame)]
    return exemplar_frame, int(rng.choice(near)) if len(near) else exemplar_frame


def draw_box(image_rgb: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a box somewhere in a picture: of four random ones that with the most contrast, as flat ground is no object.

    Args:
        image_rgb: uint8 (H, W, 3).
    Returns:
        float64 (4,) px, 0-based, inside the picture.
    """
    height, width = image_rgb.shape[:2]
    boxes, contrasts = [], []
    for _ in range(4):
        side = min(height, width) * np.exp(rng.uniform(*np.log(RANDOM_BOX_SHARE)))
        aspect = np.exp(rng.uniform(-0.5, 0.5))
        w, h = max(1, round(side * aspect)), max(1, round(side / aspect))
        x, y = int(rng.integers(max(1, width - w))), int(rng.integers(max(1, height - h)))
        boxes.append(np.array([x, y, w, h], np.float64))
        contrasts.append(image_rgb[y : y + h, x : x + w].std())
    return boxes[int(np.argmax(contrasts))]


def cut_patch(
    image_rgb: np.ndarray,
    box_xywh: np.ndarray,
    out_size: int,
    shift_px: float,
    pair_settings: PairSettings,
    rng: np.random.Generator,
) -> np.ndarray:
    """Cut a patch around a box, at the exemplar's scale, a little off and stretched: the geometry that the tracker has.

    Args:
        image_rgb: uint8 (H, W, 3).
        box_xywh: (4,) px of the image, 0-based.
        out_size: px of the patch; 127 shows the box's context square.
        shift_px: px of the patch, at most, along each axis.
    Returns:
        uint8 (out_size, out_size, 3).
    """
    stretch = 1 + pair_settings.stretch * rng.uniform(-1, 1)
    side = siamfc.context_side(box_xywh[2:]) * out_size / EXEMPLAR_SIZE * stretch
    shift_xy = rng.uniform(-shift_px, shift_px, 2) * side / out_size  # px of the image
    interpolation = INTERPOLATIONS[rng.integers(len(INTERPOLATIONS)) if pair_settings.random_interpolation else 0]
    center_xy = siamfc.box_center(box_xywh) + shift_xy
    return siamfc.crop_and_resize(image_rgb, center_xy, side, out_size, None, interpolation)


def vary_colors(
    patch: np.ndarray, is_grey: bool, pair_settings: PairSettings, rng: np.random.Generator
) -> torch.Tensor:
    """Blur a patch, change its colours, or take them away: uint8 (S, S, 3) -> uint8 (3, S, S)."""
    if rng.random() < pair_settings.blur:
        patch = cv2.GaussianBlur(patch, (0, 0), rng.uniform(*BLUR_SIGMA))
    picture = torch.from_numpy(patch).permute(2, 0, 1)
    for adjust in (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation):
        factor = 1 + pair_settings.color_jitter * rng.uniform(-1, 1)
        if pair_settings.color_jitter > 0:
            picture = adjust(picture, factor)
    if is_grey:
        picture = transforms.rgb_to_grayscale(picture, num_output_channels=3)
    return picture.contiguous()


class SiamesePairs(Dataset):
    """Training samples: an exemplar and an instance of one object. A sample is a function of (seed, sample_index).

    Args:
        sequences: those to draw from; one that is listed twice has two turns in each epoch.
        usable: each sequence's frames from `usable_frames`, at least one.
    """

    def __init__(self, sequences: list[Sequence], usable: list[np.ndarray], seed: int, pair_settings: PairSettings):
        self.sequences, self.usable = sequences, usable
        self.seed, self.pair_settings = seed, pair_settings

    def __getitem__(self, sample_index: int) -> dict:
        """Read two frames of a sequence, or one twice, and cut the patches.

        Returns:
            exemplar uint8 (3, 127, 127); instance uint8 (3, 239, 239), the object in its middle; name: both files.
        """
        number = run.shuffled_item(self.seed, sample_index, len(self.sequences))
        sequence, pair_settings = self.sequences[number], self.pair_settings
        rng = run.sample_rng(self.seed, sample_index)
        is_random = rng.random() < pair_settings.random_boxes
        frames = draw_frames(self.usable[number], pair_settings.max_gap, rng)
        paths = [sequence.frame_path(frame) for frame in (frames[:1] * 2 if is_random else frames)]
        exemplar_rgb = read_image(paths[0])
        instance_rgb = exemplar_rgb if paths[0] == paths[1] else read_image(paths[1])
        exemplar_box, instance_box = (sequence.boxes_xywh[frame] for frame in frames)
        if is_random:
            exemplar_box = instance_box = draw_box(exemplar_rgb, rng)
        exemplar = cut_patch(
            exemplar_rgb, exemplar_box, EXEMPLAR_SIZE, pair_settings.exemplar_shift, pair_settings, rng
        )
        instance = cut_patch(
            instance_rgb, instance_box, INSTANCE_SIZE, pair_settings.instance_shift, pair_settings, rng
        )
        is_grey = rng.random() < pair_settings.grey
        return {
            "exemplar": vary_colors(exemplar, is_grey, pair_settings, rng),
            "instance": vary_colors(instance, is_grey, pair_settings, rng),
            "name": f"{paths[0]} with {paths[1]}",
        }


def collate(samples: list[dict]) -> dict:
    """Join samples: exemplars uint8 (B, 3, 127, 127), instances uint8 (B, 3, 239, 239), names."""
    return {
        "exemplars": torch.stack([sample["exemplar"] for sample in samples]),
        "instances": torch.stack([sample["instance"] for sample in samples]),
        "names": [sample["name"] for sample in samples],
    }


# ---------------------------------------------------------------------------------------------------------------------
# the loss and the learning rate


def balanced_loss(response: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute the logistic loss in fp32, cells labelled 1 and 0 counting the same, the mean over pairs.

    Args:
        response: (B, 1, r, r), logits.
        labels: (r, r), 0 or 1, from `response_labels`.
        weights: (r, r), from `balanced_weights`.
    """
    logits = response[:, 0].float()  # (B, r, r)
    losses = F.binary_cross_entropy_with_logits(logits, labels.expand_as(logits), reduction="none")
    return (weights * losses).sum() / len(logits)


def hit_rate(response: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the share of responses (B, 1, r, r) that are highest at a cell labelled 1."""
    return labels.flatten()[response.flatten(1).argmax(1)].mean()


def exponential_lr(step: int, steps: int, optim_settings: OptimSettings) -> float:
    """Compute the learning rate of the update that follows `step` done ones: from lr to min_lr, both reached.

    Args:
        step: updates already done, 0..steps-1.
        steps: updates in the whole run.
    """
    last = max(1, math.ceil(steps / optim_settings.hold_steps) - 1)  # rates are 0..last
    progress = min(1.0, step // optim_settings.hold_steps / last)
    return optim_settings.lr * (optim_settings.min_lr / optim_settings.lr) ** progress


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate_tracking(
    model: SiamFC, sequences: list[Sequence], tracker_settings: TrackerSettings, precision: str, num_frames: int | None
) -> dict[str, float]:
    """Track sequences from the first frame with a visible box to the end, and compare with groundtruth.

    Where several processes train, each tracks its share.

    Args:
        num_frames: how many frames of each sequence are tracked, from its start; None: all.
    Returns:
        {"val/ao": float, ...}; val/still_ao, ...: of a box that stays where it is.
    Raises:
        ValueError: for a frame that cannot be read, or a first box that cannot be tracked, with the sequence.
    """
    tracker = SiamFCTracker(model, tracker_settings, precision)
    measured = []  # (score, score of the still box, seconds, frames) of each sequence
    for _, sequence in tqdm(ranks.share(sequences), desc="evaluate", leave=False, disable=None):
        first = int(sequence.visible.argmax())
        stop = len(sequence) if num_frames is None else min(len(sequence), first + num_frames)
        boxes, track_s = [], 0.0
        try:
            frames = FrameSource(sequence.frame_paths[first:stop])
            for tracked_frame in track_frames(tracker, frames, sequence.boxes_xywh[[first]]):
                if tracked_frame.error is not None:
                    raise tracked_frame.error
                boxes.append(tracked_frame.boxes_xywh[0])
                track_s += tracked_frame.time_s
        except (OSError, ValueError) as error:  # a frame that cannot be read, or a first box that is none
            raise ValueError(f"sequence {sequence.name}: {error}") from error
        stop = min(stop, sequence.num_annotated)
        scores = [
            score_boxes(file_coordinates(boxes_xywh, sequence.box_origin), sequence, first, stop, "got10k")
            for boxes_xywh in (np.stack(boxes), still_boxes(sequence)[first:])
        ]
        measured.append((*scores, track_s, len(boxes)))
    *rows, times_s, nums_tracked = zip(*ranks.gather(measured), strict=True)
    metrics = {}
    for prefix, sequence_rows in zip(("val/", "val/still_"), rows, strict=True):
        scores = got10k_scores([row["overlaps"] for row in sequence_rows]) | mean_one_pass_scores(sequence_rows)
        metrics |= {f"{prefix}{name}": scores[name] for name in REPORTED}
    return metrics | {"val/num_frames": scores["num_frames"], "val/tracked_per_s": sum(nums_tracked) / sum(times_s)}


@torch.no_grad()
def evaluate_pairs(
    model: SiamFC, dataset: SiamesePairs, settings: TrainSettings, precision: str, picture_path: Path
) -> dict[str, float]:
    """Compute the loss on the first `eval_pairs` validation pairs and draw `picture_pairs` of them.

    Returns:
        {"val/loss": float, "val/hit_rate": float}; empty where there are no pairs.
    """
    num_pairs = settings.eval_pairs if dataset.sequences else 0
    if num_pairs == 0:
        return {}
    model.eval()
    device = next(model.parameters()).device
    labels = siamfc.response_labels(RESPONSE_SIZE, settings.r_pos).to(device)  # (15, 15)
    weights = siamfc.balanced_weights(labels)
    measured, pictures = [], []  # (loss, hits) of each batch, its share of all; [pictures of the first pairs]
    for _, start in ranks.share(range(0, num_pairs, settings.batch_size)):
        batch = collate([dataset[index] for index in range(start, min(start + settings.batch_size, num_pairs))])
        exemplars, instances = (batch[key].to(device).float() for key in ("exemplars", "instances"))
        with run.autocast(device, precision):
            responses = model(exemplars, instances)  # (B, 1, 15, 15)
        share = len(responses) / num_pairs
        batch_loss, batch_hits = balanced_loss(responses, labels, weights), hit_rate(responses, labels)
        measured.append((share * batch_loss.item(), share * batch_hits.item()))
        pairs = zip(batch["exemplars"], batch["instances"], responses[:, 0].float().cpu(), strict=True)
        pictures.append([draw_pair(*pair) for pair in itertools.islice(pairs, max(0, settings.picture_pairs - start))])
    loss, hits = (sum(values) for values in zip(*ranks.gather(measured), strict=True))
    pictures = sum(ranks.gather(pictures), [])
    if pictures and ranks.is_first():
        with drawing(picture_path):
            picture_path.parent.mkdir(parents=True, exist_ok=True)
            write_image(picture_path, np.concatenate(pictures))
    return {"val/loss": loss, "val/hit_rate": hits}


def draw_pair(exemplar: torch.Tensor, instance: torch.Tensor, response: torch.Tensor) -> np.ndarray:
    """Draw exemplar, instance with the response's highest cell marked, and response side by side.

    Args:
        exemplar: uint8 (3, 127, 127).
        instance: uint8 (3, 239, 239).
        response: (15, 15), logits.
    Returns:
        uint8 (243, 635, 3); the response from blue, its lowest value, to red, its highest.
    """
    panels = []
    scaled = (response - response.min()) / (response.max() - response.min()).clamp(min=1e-12)
    heat = cv2.applyColorMap((255 * scaled.numpy()).astype(np.uint8), cv2.COLORMAP_JET)[..., ::-1]  # BGR to RGB
    heat = cv2.resize(heat, (INSTANCE_SIZE, INSTANCE_SIZE), interpolation=cv2.INTER_NEAREST)
    for patch in (exemplar.permute(1, 2, 0).numpy(), instance.permute(1, 2, 0).numpy(), heat):
        panel = np.full((INSTANCE_SIZE + 4, patch.shape[1] + 10, 3), 255, np.uint8)
        panel[2 : 2 + len(patch), 5 : 5 + patch.shape[1]] = patch
        panels.append(panel)
    row, column = np.unravel_index(int(response.argmax()), response.shape)
    middle_px, middle = (INSTANCE_SIZE - 1) // 2, RESPONSE_SIZE // 2
    x, y = 5 + middle_px + TOTAL_STRIDE * (column - middle), 2 + middle_px + TOTAL_STRIDE * (row - middle)
    cv2.drawMarker(panels[1], (int(x), int(y)), (255, 0, 0), cv2.MARKER_CROSS, 21, 2)
    return np.concatenate(panels, 1)


# ---------------------------------------------------------------------------------------------------------------------
# the run


def list_data(data: dict) -> tuple[list[Sequence], list[Sequence]]:
    """List a dataset's sequences, or those of several (`data.parts`): training and validation.

    With parts, `data.turns` says how many turns each sequence of a part has in an epoch of training.
    """
    if "parts" not in data:
        sections.check_keys(split_dataset, data, "data")
        return split_dataset(**data)
    sections.check_keys(lambda parts, turns: None, data, "data")
    for key in ("parts", "turns"):
        sections.check_value(data[key], dict, f"data.{key}")
    if sorted(data["parts"]) != sorted(data["turns"]):
        raise ValueError(f"data.turns names {', '.join(data['turns'])}; must name {', '.join(data['parts'])}")
    train_sequences, val_sequences = [], []
    for name, part in data["parts"].items():
        turns = data["turns"][name]
        sections.check_value(part, dict, f"data.parts.{name}")
        sections.check_value(turns, Annotated[int, at_least(0)], f"data.turns.{name}")
        try:
            train_part, val_part = (
                [replace(sequence, name=f"{name}/{sequence.name}") for sequence in sequences]
                for sequences in list_data(part)
            )
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"data.parts.{name}: {error}") from error
        train_sequences += train_part * turns
        val_sequences += val_part
    return train_sequences, val_sequences


def find_shared(train_sequences: list[Sequence], val_sequences: list[Sequence]) -> list[str]:
    """Name the validation sequences whose frames are those of a training sequence, too, whatever this is called."""
    folder = functools.cache(os.path.realpath)
    train_frames = {(folder(each.frame_dir), each.frame_names[0]) for each in train_sequences}
    return [each.name for each in val_sequences if (folder(each.frame_dir), each.frame_names[0]) in train_frames]


def keep_usable(
    sequences: list[Sequence], pair_settings: PairSettings, split: str
) -> tuple[list[Sequence], list[np.ndarray]]:
    """Leave out sequences without a frame that is fit for pairs, and say how many frames were left out.

    Returns:
        the other sequences, and the usable frames of each.
    """
    different = {id(sequence): sequence for sequence in sequences}  # one with several turns is looked at once
    usable = {key: usable_frames(sequence, pair_settings) for key, sequence in different.items()}
    useless = [sequence.name for key, sequence in different.items() if not len(usable[key])]
    num_frames, num_usable = sum(map(len, different.values())), sum(map(len, usable.values()))
    print(
        f"{split}: {len(different)} sequences, {num_frames} frames; pairs are cut from {num_usable} frames of "
        f"{len(different) - len(useless)} sequences"
    )
    if useless:
        listed = ", ".join(first_few(useless))
        print(f"  without a usable box (see pairs.*), or with a first frame that cannot be read: {listed}")
    sequences = [sequence for sequence in sequences if len(usable[id(sequence)])]
    return sequences, [usable[id(sequence)] for sequence in sequences]


def build_model(model_settings: ModelSettings, is_resumed: bool) -> SiamFC:
    """Build the network with random weights, or those of a checkpoint; a resumed run has its own."""
    model = SiamFC(model_settings.score_bias)
    if model_settings.checkpoint is not None and not is_resumed:
        loaded = siamfc.load_siamfc(model_settings.checkpoint)
        missing, unknown = model.load_state_dict(loaded.state_dict(), strict=False)
        if unknown:
            raise ValueError(
                f"model.score_bias is false; must be true: model.checkpoint {model_settings.checkpoint} has one"
            )
        if missing:
            print(f"{', '.join(missing)}: not in {model_settings.checkpoint}, starts from 0")
    return model


def build_optimizer(model: SiamFC, optim_settings: OptimSettings) -> torch.optim.SGD:
    """Build SGD; without `decay_all` biases and batch norm have no weight decay. The rate is set at each step."""
    groups = {optim_settings.weight_decay: [], 0.0: []}
    for parameter in model.parameters():
        groups[optim_settings.weight_decay if optim_settings.decay_all or parameter.ndim > 1 else 0.0].append(parameter)
    groups = [{"params": group, "weight_decay": decay} for decay, group in groups.items() if group]
    return torch.optim.SGD(groups, lr=optim_settings.lr, momentum=optim_settings.momentum)


def check_pairs(dataset: SiamesePairs, run_dir: Path, num_pairs: int) -> None:
    """Draw the first training pairs: exemplar and instance side by side."""
    if not dataset.sequences or num_pairs == 0:
        return
    middle = torch.zeros(RESPONSE_SIZE, RESPONSE_SIZE)
    middle[RESPONSE_SIZE // 2, RESPONSE_SIZE // 2] = 1  # where the object is, but for the shift
    samples = [dataset[index] for index in range(num_pairs)]
    pictures = [draw_pair(sample["exemplar"], sample["instance"], middle) for sample in samples]
    write_image(run_dir / "pairs.png", np.concatenate(pictures))
    print(f"the first {num_pairs} pairs are drawn in {os.path.relpath(run_dir / 'pairs.png')}")


def list_pairs(
    settings: Config, resume_path: Path | None
) -> tuple[dict[str, list[Sequence]], SiamesePairs, list[Sequence], SiamesePairs]:
    """List sequences, and leave out what cannot be used; check=fit leaves that of the largest frames to train on.

    Returns:
        {"train": sequences, "val": sequences}; the training pairs; the sequences to track; the pairs to validate on.
    Raises:
        FileNotFoundError, ValueError: as `list_data` and `keep_splits`; for a split that cannot be used.
    """
    train_settings, pair_settings, seed = settings.train, settings.pairs, settings.common.seed
    train_sequences, val_sequences = list_data(settings.data)
    if shared := find_shared(train_sequences, val_sequences):
        print(
            f"{len(shared)} validation sequences train, too, and say little of others: {', '.join(first_few(shared))}"
        )
    splits = {"train": train_sequences, "val": val_sequences}
    splits = loops.keep_splits(loops.stored_splits(resume_path), splits)
    train_sequences, val_sequences = splits.values()
    train_sequences, train_usable = keep_usable(train_sequences, pair_settings, "train")
    val_pair_sequences, val_usable = keep_usable(val_sequences[: train_settings.eval_sequences], pair_settings, "val")
    # a first box alone would count as a perfect sequence
    val_sequences = [sequence for sequence in val_sequences if sequence.is_scored][: train_settings.eval_sequences]
    trains = settings.check == "fit" or (not settings.check and train_settings.steps > 0)
    if trains and not train_sequences:
        raise ValueError("the dataset has no training sequence with a usable box: see data.* and pairs.*")
    if settings.check is not True and not val_sequences:
        raise ValueError(
            "the dataset has no validation sequence with a box: see data.val_fraction, data.val_sequences; of a first "
            "box alone nothing can be measured, and pictures alone cannot be tracked: add a part of sequences "
            "(data.parts), as data=siamfc_bundled does"
        )
    if settings.check == "fit":
        areas = [math.prod(sequence.frame_wh) for sequence in train_sequences]  # usable, so they were read
        largest = areas.index(max(areas))
        train_sequences, train_usable = [train_sequences[largest]], [train_usable[largest]]
        width, height = train_sequences[0].frame_wh
        print(f"the training sequence with the largest frames: {train_sequences[0].name}, {height} x {width} px")
    train_pairs = SiamesePairs(train_sequences, train_usable, seed, pair_settings)
    return splits, train_pairs, val_sequences, SiamesePairs(val_pair_sequences, val_usable, seed + 1, pair_settings)


def list_changes(settings: Config) -> list[fit.Change]:
    """List what needs less memory than a config, the gentlest first: changes for check=fit to try."""
    changes = [{"precision": "bf16"}] if settings.common.precision in ("auto", "fp32") else []
    size = settings.train.batch_size
    if size > 1:
        changes.append({"train.batch_size": 1, "train.accumulate": settings.train.accumulate * size})
    return changes


def train(config: dict, run_dir: Path, resume_path: Path | None, data: tuple | None = None) -> float | dict:
    """Train as configured and return the best value of `train.select_by`; with check=fit the last row of the metrics.

    Args:
        config: the whole resolved config; of a resumed run, the stored one.
        run_dir: a new folder.
        resume_path: the last.pt to continue from, or None.
        data: what `list_pairs` returned; None: list it.
    """
    settings = read_settings(Config, config)
    common, train_settings = settings.common, settings.train
    device, precision = run.set_up_device(common.device, common.precision)
    ranks.own_size("train.batch_size", train_settings.batch_size)  # raises before anything takes time
    tracker_precision = precision if settings.tracker.mode == "fast" else "fp32"
    labels = siamfc.response_labels(RESPONSE_SIZE, train_settings.r_pos).to(device)  # (15, 15)
    weights = siamfc.balanced_weights(labels)
    run.seed_everything(common.seed)
    model = build_model(settings.model, resume_path is not None)

    # data: list, leave out what cannot be used
    data = data or ranks.from_first(functools.partial(list_pairs, settings, resume_path))
    splits, train_dataset, val_sequences, val_pairs = data
    if settings.check is True:
        check_pairs(train_dataset, run_dir, train_settings.picture_pairs)
        return float("nan")
    train_sequences = train_dataset.sequences

    counts = {"train_sequences": len(set(map(id, train_sequences))), "val_sequences": len(val_sequences)}
    start_run(run_dir, config, counts)

    # model and optimizer
    model = ranks.synchronize_norms(model.to(device), device)
    is_channels_last = run.choose_channels_last(train_settings.channels_last, device)
    if is_channels_last:
        model = model.to(memory_format=torch.channels_last)
    print(f"siamfc: {sum(p.numel() for p in model.parameters()):,} parameters; {device}, {precision}")
    optimizer = build_optimizer(model, settings.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    forward = run.compile_forward(model, device) if train_settings.compile else model

    is_resumed = resume_path is not None
    loop = loops.resume_run(resume_path, run_dir, model, optimizer, scaler) if is_resumed else loops.LoopState()
    log = MetricsLog(run_dir, loop.rows)
    description = {"script": "train_siamfc", "config": config}
    names = loops.split_names(splits)
    save = functools.partial(loops.save_run, run_dir, loop, model, optimizer, scaler, description, names)
    if is_resumed:
        save(is_best=False)  # from now on this folder can be resumed too

    pairs_per_step = train_settings.batch_size * train_settings.accumulate
    batches = loops.load_batches(
        train_dataset,
        collate,
        loop.step * pairs_per_step,
        train_settings.steps * pairs_per_step,
        train_settings.batch_size,
        common.num_workers,
        device,
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
                metrics = evaluate_tracking(
                    model, val_sequences, settings.tracker, tracker_precision, train_settings.eval_frames
                )
                metrics |= evaluate_pairs(model, val_pairs, train_settings, precision, samples_dir / "pairs.png")
                tqdm.write(
                    f"step {loop.step}: " + "  ".join(f"{name} {metrics[f'val/{name}']:.3f}" for name in REPORTED)
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
        lr = exponential_lr(loop.step, train_settings.steps, settings.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr

        step_loss, step_hit_rate, step_names = 0.0, 0.0, []
        for micro_step in range(train_settings.accumulate):
            batch = window.next_batch(batches)
            step_names += batch["names"]
            batch = loops.to_device(batch, device)
            # (B, 3, 127, 127), (B, 3, 239, 239), 0..255
            exemplars, instances = batch["exemplars"].float(), batch["instances"].float()
            if is_channels_last:
                exemplars, instances = (
                    images.to(memory_format=torch.channels_last) for images in (exemplars, instances)
                )

            # 3. forward
            run.seed_dropout(common.seed, loop.step, micro_step)
            with run.autocast(device, precision):
                response = forward(exemplars, instances)  # (B, 1, 15, 15)
            micro_loss = balanced_loss(response, labels, weights) / train_settings.accumulate
            share_of_hits = hit_rate(response, labels)

            # 4. backward and clip
            scaler.scale(micro_loss).backward()
            micro_loss, share_of_hits = torch.stack([micro_loss.detach(), share_of_hits]).tolist()  # waits once
            step_loss += loops.check_finite(micro_loss, loop.step, f"pairs {', '.join(batch['names'])}")
            step_hit_rate += share_of_hits / train_settings.accumulate
        step_loss, step_hit_rate = ranks.mean(torch.tensor([step_loss, step_hit_rate], dtype=torch.float64)).tolist()
        ranks.average_gradients(model.parameters())
        samples = f"pairs {', '.join(step_names)}"
        grad_norm = loops.clip_gradients(model.parameters(), train_settings.clip_norm, optimizer, scaler, loop, samples)

        # 5. update (the scaler leaves out a step whose fp16 gradients overflowed)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loop.step += 1

        # 6. log
        means = loops.running_means(loop.running, {"train/loss": step_loss, "train/hit_rate": step_hit_rate})
        progress.update()
        if loop.step % train_settings.log_every == 0 or loop.step == train_settings.steps:
            steps_per_s, wait_share = window.read(loop.step)
            pairs_per_s = steps_per_s * pairs_per_step
            update = {"train/grad_norm": grad_norm, "lr": lr, "skipped_steps": loop.num_skipped}
            speed = {"pairs_per_s": pairs_per_s, "data_wait_share": wait_share}
            log.log(loop.step, means | update | speed)
            progress.set_postfix_str(
                f"loss {means['train/loss']:.3f}, {pairs_per_s:.1f} pairs/s, waits for data {wait_share:.0%}"
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
    finish_run(run_dir, {"start": loop.start_metrics, "best": loop.best, "last": last})
    still = {f"val/{name}": loop.best[f"val/still_{name}"] for name in REPORTED}  # the first box kept still
    columns = {"still box": still, "step 0": loop.start_metrics, "best": loop.best, "last": last}
    print("\n" + "\n".join(metric_lines(REPORTED, columns)))
    print(f"best checkpoint: step {loop.best['step']}, chosen on {loop.best['val/num_frames']} validation frames")
    shown_dir = os.path.relpath(run_dir)
    print(f"\nWritten to {shown_dir}. Next, track something with it:")
    print("  " + sections.show_command("track.py", checkpoint=f"{shown_dir}/best.pt"))
    return loop.best[train_settings.select_by]


@hydra.main(version_base="1.3", config_path="configs/tracking", config_name="train_siamfc")
def main(cfg) -> float:
    """Read the config, train, and end with one line on what went wrong and status 1, if anything did."""
    with sections.one_line_errors("train_siamfc", "a smaller train.batch_size, or precision=bf16"):
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        ranks.join(config)
        hydra_config = HydraConfig.get()
        config, resume_path = config_to_resume(
            Config, "train_siamfc", config, list(hydra_config.overrides.task), RESUMABLE
        )
        if config["check"] == "fit":
            settings = read_settings(Config, config)
            data, changes = list_pairs(settings, resume_path), list_changes(settings)
            return fit.check_fit(train, data, config, changes, "pairs")
        return train(config, Path(hydra_config.runtime.output_dir), resume_path)


if __name__ == "__main__":
    sections.read_command_line("tracking")
    main()
