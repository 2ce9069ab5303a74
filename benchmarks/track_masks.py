"""SiamFC's box as a prompt of SAM 2: J and F of the masks beside simple masks from the same boxes, on DAVIS.

    python -m benchmarks.track_masks /my/DAVIS2016 /my/DAVIS2016_more --rows rows/
    python -m benchmarks.track_masks /my/DAVIS2016 --rows rows/ --report          # of what is there

Boxes are those of the bundled tracker, from the first true one on, or the true ones, so that errors of tracker and mask
part. Masks: the box itself; the ellipse in it; GrabCut from it (OpenCV, 5 iterations); SAM 2's (the bundled nano); SAM
2's that is also prompted with the logits of its mask in the frame before, moved and scaled with the box; and SAM 2's
with the tracker's scale corrected by each mask (`mask_feedback`). DAVIS 2017's measures over every STRIDE-th frame but
the first and the last, as GrabCut takes up to a second; mean over sequences. Sequences that trained or chose the
tracker are marked; the nano saw none.
"""

import argparse
import json
from pathlib import Path

import cv2
import hydra
import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from benchmarks.measure import CONFIGS, CPU
from utils.images import read_image, read_label_map
from utils.run import REPOSITORY
from utils.sam2 import evaluation
from utils.sam2 import model as models
from utils.sam2.mask_generation import upscale_part
from utils.settings import read_settings
from utils.tracking.frames import FrameSource
from utils.tracking.mask_metrics import contour_accuracy, region_similarity, score_masks
from utils.tracking.masks import Sam2Settings, Segmenter, cut_boxes, follow_mask, load_segmenter, segment_boxes
from utils.tracking.sequences import Sequence, list_sequences
from utils.tracking.siamfc import load_siamfc
from utils.tracking.tracker import SiamFCTracker, TrackerSettings, track_frames

STRIDE = 10
FEEDBACK_SHARES = (0.3,)


def list_davis(root: Path) -> list[Sequence]:
    with hydra.initialize_config_dir(str(CONFIGS / "tracking"), version_base="1.3"):
        overrides = ["data=davis_sequences", f"data.root={root}"]
        return list_sequences(**OmegaConf.to_container(hydra.compose("track", overrides), resolve=True)["data"])


def make_tracker() -> SiamFCTracker:
    with hydra.initialize_config_dir(str(CONFIGS / "tracking"), version_base="1.3"):
        tracker = OmegaConf.to_container(hydra.compose("track"), resolve=True)["tracker"]
    model = load_siamfc(REPOSITORY / "checkpoints" / "siamfc_alexnet.pt")
    return SiamFCTracker(model, read_settings(TrackerSettings, tracker, "tracker"))


def track_boxes(
    tracker: SiamFCTracker, sequence: Sequence, segmenter: Segmenter | None = None, share: float = 0.0
) -> np.ndarray:
    """Track a sequence, (T, 4) px; with a segmenter each mask corrects the tracker's scale."""
    boxes = []
    for tracked in track_frames(tracker, FrameSource(sequence.frame_paths), sequence.boxes_xywh[:1]):
        boxes.append(tracked.boxes_xywh[0])
        if segmenter is not None and tracked.index > 0:
            made = segment_boxes(segmenter, tracked.frame, tracked.boxes_xywh, ~tracked.is_lost)
            follow_mask(tracker.targets[0], made.boxes_xywh[0], share)
    return np.stack(boxes)


def fill_box(corners: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    x1, y1, x2, y2 = np.round(corners).astype(int)
    mask = np.zeros(hw, bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


def fill_ellipse(corners: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    x1, y1, x2, y2 = corners
    rows, columns = np.ogrid[: hw[0], : hw[1]]
    half_w, half_h = (x2 - x1 + 1) / 2, (y2 - y1 + 1) / 2
    return ((columns - (x1 + x2) / 2) / half_w) ** 2 + ((rows - (y1 + y2) / 2) / half_h) ** 2 <= 1


def grab_cut(frame: np.ndarray, corners: np.ndarray) -> np.ndarray:
    hw = frame.shape[:2]
    inside = fill_box(corners, hw)
    if inside.all():
        return inside
    states = np.where(inside, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    cv2.setRNGSeed(0)
    cv2.grabCut(
        cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), states, None, np.zeros((1, 65)), np.zeros((1, 65)), 5,
        cv2.GC_INIT_WITH_MASK,
    )  # fmt: skip
    return np.isin(states, (cv2.GC_FGD, cv2.GC_PR_FGD))


def move_logits(logits: np.ndarray, old: np.ndarray, new: np.ndarray, orig_hw: tuple[int, int]) -> np.ndarray:
    """Move logits (h, w) of a frame of orig_hw px with the box, corners (4,) px before and after; -10 comes in."""
    scale = np.array(logits.shape[::-1]) / np.array(orig_hw[::-1])  # px of the logits per px of the frame, (x, y)
    factor = (new[2:] - new[:2] + 1) / (old[2:] - old[:2] + 1)
    old_middle, new_middle = ((old[:2] + old[2:] + 1) / 2 * scale - 0.5, (new[:2] + new[2:] + 1) / 2 * scale - 0.5)
    matrix = np.array([[factor[0], 0, 0], [0, factor[1], 0]])
    matrix[:, 2] = new_middle - factor * old_middle
    size = logits.shape[::-1]
    return cv2.warpAffine(logits, matrix, size, borderMode=cv2.BORDER_CONSTANT, borderValue=-10.0)


@torch.inference_mode()
def segment_with_memory(
    segmenter: Segmenter, sequence: Sequence, all_boxes: dict[str, np.ndarray]
) -> dict[str, list[np.ndarray]]:
    """Make a mask for each frame from its box and the logits of the mask before: {boxes' name: T of bool (H, W)}."""
    made: dict[str, list[np.ndarray]] = {name: [] for name in all_boxes}
    before: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    model = segmenter.model
    for index in range(len(sequence)):
        frame = read_image(sequence.frame_path(index))
        hw = frame.shape[:2]
        embeddings = models.encode(model, models.preprocess(frame, model.image_size)[None])
        for name, boxes in all_boxes.items():
            corners, mask, inputs = cut_boxes(boxes[[index]], hw), np.zeros(hw, bool), None
            made[name].append(mask)
            last = before.pop(name, None)
            if not np.isfinite(corners).all():
                continue
            if last is not None:
                moved = torch.from_numpy(move_logits(*last, corners[0], hw).astype(np.float32))[None, None]
                inputs = moved.clamp(-evaluation.LOGIT_LIMIT, evaluation.LOGIT_LIMIT)
            low_res_masks, _, _ = evaluation.predict_from_boxes(model, embeddings, corners, inputs, hw, "fp32")
            logits = low_res_masks[0, 0].numpy()
            before[name] = logits, corners[0]
            part, (x, y) = upscale_part(logits, hw, 0.0)
            mask[y : y + part.shape[0], x : x + part.shape[1]] = part > 0
    return made


def measure_sequence(sequence: Sequence, root: Path, tracker: SiamFCTracker, segmenter: Segmenter) -> dict:
    """Score all masks of a sequence: {"<boxes>/<mask>": scores}."""
    tracked = {"true": sequence.boxes_xywh, "tracked": track_boxes(tracker, sequence)}
    corrected = {share: track_boxes(tracker, sequence, segmenter, share) for share in FEEDBACK_SHARES}
    remembered = segment_with_memory(segmenter, sequence, tracked)
    values: dict[str, list[tuple[float, float]]] = {}
    for index in range(STRIDE, len(sequence) - 1, STRIDE):
        frame = read_image(sequence.frame_path(index))
        path = root / "Annotations" / "480p" / sequence.video / f"{Path(sequence.frame_names[index]).stem}.png"
        truth, hw = read_label_map(path) > 0, frame.shape[:2]
        made = {}
        for name, boxes in tracked.items():
            corners = cut_boxes(boxes[[index]], hw)[0]
            if not np.isfinite(corners).all():  # the object is not in the frame, or the tracker has left it
                made |= {f"{name}/{kind}": np.zeros(hw, bool) for kind in ("box", "ellipse", "grabcut")}
            else:
                made[f"{name}/box"], made[f"{name}/ellipse"] = fill_box(corners, hw), fill_ellipse(corners, hw)
                made[f"{name}/grabcut"] = grab_cut(frame, corners)
            made[f"{name}/sam2"] = segment_boxes(segmenter, frame, boxes[[index]], np.ones(1, bool)).label_map > 0
            made[f"{name}/sam2, mask before"] = remembered[name][index]
        for share, boxes in corrected.items():
            corrected_mask = segment_boxes(segmenter, frame, boxes[[index]], np.ones(1, bool)).label_map > 0
            made[f"tracked/sam2, feedback {share}"] = corrected_mask
        for name, mask in made.items():
            values.setdefault(name, []).append((region_similarity(mask, truth), contour_accuracy(mask, truth)))
    return {name: score_masks(*np.array(of_frames).T) for name, of_frames in values.items()}


def report(rows: dict[str, dict]) -> None:
    """Print J&F of each sequence and, as a mean, all measures."""
    names = list(next(iter(rows.values())))
    print("| sequence | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for sequence, scores in rows.items():
        print(f"| {sequence} | " + " | ".join(f"{scores[name]['j_and_f']:.3f}" for name in names) + " |")
    for key in next(iter(next(iter(rows.values())).values())):
        means = [np.mean([scores[name][key] for scores in rows.values()]) for name in names]
        print(f"| mean {key} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="+", type=Path)
    parser.add_argument("--rows", type=Path, required=True, help="a folder for the scores of each sequence")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    arguments.rows.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        tracker, segmenter = make_tracker(), load_segmenter(Sam2Settings(), CPU, "fp32")
        for root in arguments.roots:
            for sequence in tqdm(list_davis(root), desc=root.name, disable=None):
                path = arguments.rows / f"{sequence.name}.json"
                if not path.exists():
                    path.write_text(json.dumps(measure_sequence(sequence, root, tracker, segmenter)))
    report({path.stem: json.loads(path.read_text()) for path in sorted(arguments.rows.glob("*.json"))})


if __name__ == "__main__":
    main()
