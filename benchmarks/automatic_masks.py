"""Masks from a grid of points, against SAM 2's own SAM2AutomaticMaskGenerator: time, memory, and the same masks.

    python -m benchmarks.automatic_masks                             # the bundled sam2_nano: target 4 times as fast
    python -m benchmarks.automatic_masks --model sam2.1_hiera_tiny   # 1.5 times
    python -m benchmarks.automatic_masks --model sam2.1_hiera_tiny --fast-decoder   # ours with fast_decoder=true

Both ways take the same model, picture and settings, in turn, in one warm process; both give COCO run lengths. The
picture is cars.jpg of sam2's notebooks below DATA_ROOT, 2250 x 1500 px; without it, generated glassware of that size.

sam2_nano has its trained weights and its own thresholds. An official model has random weights here, as nothing is
downloaded. Its masks are noise all over the picture, which is the worst case for ours: no mask is small. Its thresholds
are quantiles of a first run of ours: 30 % of the masks pass by predicted IoU, half of those by stability, and no box is
a duplicate (random masks all have the same box, of which only one mask would be left).

Memory is the peak of resident memory above what was resident once the model was built, each way in a process of its
own; target: at most a quarter. The masks are compared a second time with thresholds that let many more pass. Prints one
JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask

from benchmarks.measure import (
    CPU,
    print_result,
    read_config,
    time_in_turn,
)
from utils.fit import has_peak_memory, read_peak_memory, reset_peak_memory
from utils.images import read_image
from utils.run import seed_everything
from utils.sam2.mask_generation import AutomaticSettings, find_candidates, generate_masks, make_point_grid
from utils.sam2.model import build_sam2, encode, preprocess
from utils.samples.glassware import draw_glassware

REPOSITORY = Path(__file__).resolve().parent.parent
TARGETS = {"sam2_nano": 4.0, "sam2.1_hiera_tiny": 1.5}
MEMORY_TARGET, LEAST_IOU = 0.25, 0.99
PICTURE_HW = (1500, 2250)
PASS_BY_IOU, PASS_BY_STABILITY = 0.3, 0.5  # shares, with random weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sam2_nano", help="a file of configs/sam2/model")
    parser.add_argument("--points-per-side", type=int, default=None, help="16 for sam2_nano, else 8")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--fast-decoder", action="store_true", help="ours with fast_decoder=true")
    parser.add_argument("--memory-of", choices=("ours", "plain"), help=argparse.SUPPRESS)  # in a child process
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    image_rgb = read_picture()
    model = build_model(arguments.model)
    if arguments.memory_of:
        model.fast_decoder = arguments.fast_decoder
        settings = AutomaticSettings(**arguments.settings)
        print(json.dumps(measure_memory(model, image_rgb, settings, arguments.memory_of)))
        return

    is_nano = arguments.model == "sam2_nano"
    points_per_side = arguments.points_per_side or (16 if is_nano else 8)
    settings = AutomaticSettings(**read_config("sam2/model", arguments.model).get("automatic", {}))
    settings = replace(settings, points_per_side=points_per_side)
    if not is_nano:
        settings = choose_thresholds(model, image_rgb, settings)
    model.fast_decoder = arguments.fast_decoder  # sam2's generator calls its own decoder
    generate = {way: make(model, settings) for way, make in WAYS.items()}
    masks = {}

    def run(way: str) -> None:
        masks[way] = generate[way](image_rgb)

    ours_s, plain_s = time_in_turn(lambda: run("ours"), lambda: run("plain"), arguments.repeats)
    checked = compare_masks(masks["ours"], masks["plain"])
    if is_nano:  # a few masks pass its own thresholds; with these some hundred
        many = replace(settings, crop_n_layers=0, pred_iou_thresh=0.3, stability_score_thresh=0.2, box_nms_thresh=0.95)
        ours, plain = (WAYS[way](model, many)(image_rgb) for way in ("ours", "plain"))
        checked += "; with lower thresholds: " + compare_masks(ours, plain)
    peaks = {way: run_memory_child(arguments, settings, way) for way in WAYS} if has_peak_memory(CPU) else None
    checked += f"; memory {peaks['ours'] / peaks['plain']:.3f} of theirs (aimed at: {MEMORY_TARGET})" if peaks else ""
    print_result(
        f"automatic masks, {arguments.model}, {points_per_side} x {points_per_side} points"
        f"{', fast_decoder' * arguments.fast_decoder}",
        TARGETS.get(arguments.model),
        ours_s,
        plain_s,
        checked,
        ours_peak_mib=peaks and peaks["ours"],
        plain_peak_mib=peaks and peaks["plain"],
        settings={key: value for key, value in asdict(settings).items() if value != getattr(AutomaticSettings(), key)},
    )


# ---------------------------------------------------------------------------------------------------------------------
# model, picture, thresholds


def read_picture() -> np.ndarray:
    """Read the photograph, or draw a picture of its size: uint8 (1500, 2250, 3)."""
    path = Path(os.environ.get("DATA_ROOT", REPOSITORY / "data")) / "SAM2_media" / "images" / "cars.jpg"
    image_rgb = read_image(path) if path.is_file() else draw_glassware(np.random.default_rng(0), *PICTURE_HW)[0]
    assert image_rgb.shape == (*PICTURE_HW, 3), image_rgb.shape
    return image_rgb


def build_model(name: str) -> torch.nn.Module:
    """Build the nano with its weights; any other model with random ones, the same in every process."""
    config = read_config("sam2/model", name)
    if name != "sam2_nano":
        config["checkpoint"] = "none"
    seed_everything(0)
    return build_sam2(**config, device=CPU)


@torch.inference_mode()
def choose_thresholds(model: torch.nn.Module, image_rgb: np.ndarray, settings: AutomaticSettings) -> AutomaticSettings:
    """Let random weights pass the shares PASS_BY_IOU and PASS_BY_STABILITY of their masks; no box is a duplicate.

    The stability's offset is a fifth of the logits' standard deviation: random logits are far smaller than trained
    ones.
    """
    orig_hw = image_rgb.shape[:2]
    embeddings = encode(model, preprocess(image_rgb, model.image_size)[None])
    grid = make_point_grid(settings.points_per_side, orig_hw)
    everything = replace(settings, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    masks = find_candidates(model, embeddings, grid, orig_hw, everything)
    offset = torch.stack(masks.low_res_masks).std().item() / 5
    pred_iou_thresh = masks.predicted_ious.quantile(1 - PASS_BY_IOU).item()
    passing = replace(everything, pred_iou_thresh=pred_iou_thresh, stability_score_offset=offset)
    stability_scores = find_candidates(model, embeddings, grid, orig_hw, passing).stability_scores
    stability_score_thresh = stability_scores.quantile(1 - PASS_BY_STABILITY).item()
    return replace(passing, stability_score_thresh=stability_score_thresh, box_nms_thresh=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# both ways, their memory, and what they found


def make_ours(model: torch.nn.Module, settings: AutomaticSettings) -> Callable[[np.ndarray], list[dict]]:
    """Make the function from a picture uint8 (H, W, 3) to annotations."""
    return lambda image_rgb: generate_masks(model, image_rgb, settings).annotations


def make_plain(model: torch.nn.Module, settings: AutomaticSettings) -> Callable[[np.ndarray], list[dict]]:
    """Make the same function of SAM 2's own generator."""
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    keywords = asdict(settings)
    assert keywords.pop("min_area") == 0 and keywords.pop("min_region_area") == 0  # ours alone, and not used here
    with warnings.catch_warnings():  # torch.jit.script is deprecated
        warnings.simplefilter("ignore")
        generator = SAM2AutomaticMaskGenerator(model, output_mode="coco_rle", **keywords)
    side = model.image_size
    generator.predictor._bb_feat_sizes = [(side // stride, side // stride) for stride in (4, 8, 16)]  # else 1024 px
    return generator.generate


WAYS = {"ours": make_ours, "plain": make_plain}


def measure_memory(model: torch.nn.Module, image_rgb: np.ndarray, settings: AutomaticSettings, way: str) -> int:
    """Measure the peak of resident memory of one way in this process, MiB above what is resident before it."""
    generate = WAYS[way](model, settings)
    reset_peak_memory(CPU)
    before = read_peak_memory(CPU) // 2**20
    generate(image_rgb)
    return read_peak_memory(CPU) // 2**20 - before


def run_memory_child(arguments: argparse.Namespace, settings: AutomaticSettings, way: str) -> int:
    """Measure memory in a process that has done nothing else, MiB."""
    command = [sys.executable, "-m", "benchmarks.automatic_masks", "--model", arguments.model, "--memory-of", way]
    command += ["--settings", json.dumps(asdict(settings)), *["--fast-decoder"] * arguments.fast_decoder]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def compare_masks(ours: list[dict], plain: list[dict]) -> str:
    """Match masks one to one, the highest IoU first, and check their mean IoU; one without a partner counts 0.

    Returns:
        what was found, in words.
    """
    assert ours and plain, (len(ours), len(plain))
    ious = coco_mask.iou(
        [mask["segmentation"] for mask in ours], [mask["segmentation"] for mask in plain], [0] * len(plain)
    )
    matched = []
    while len(matched) < min(ious.shape):
        row, column = np.unravel_index(ious.argmax(), ious.shape)
        if ious[row, column] <= 0:
            break
        matched.append(float(ious[row, column]))
        ious[row], ious[:, column] = -1, -1
    mean_iou = sum(matched) / max(len(ours), len(plain))
    assert mean_iou >= LEAST_IOU, f"mean IoU {mean_iou} of {len(ours)} and {len(plain)} masks"
    unmatched = len(ours) + len(plain) - 2 * len(matched)
    return f"{len(plain)} masks, mean IoU {mean_iou:.4f}, {unmatched} unmatched"


if __name__ == "__main__":
    main()
