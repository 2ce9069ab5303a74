"""How well masks follow objects through a video: DAVIS's region similarity J and contour accuracy F.

Source: Perazzi et al. 2016 (DAVIS), as computed for DAVIS 2017 (Pont-Tuset et al. 2017): each object's first frame and
the video's last one do not count, later frames without the object do; mean over frames, then over objects; recall is
the share of frames above 0.5; decay is how much the mean of the first quarter of the frames is above that of the last.
"""

import math
from pathlib import Path

import cv2
import numpy as np

from utils.images import read_label_map
from utils.tracking.frames import list_frames, picture_names
from utils.tracking.sequences import Sequence

BOUND_SHARE = 0.008  # of the frame's diagonal: how far contours may lie apart
RECALL_LIMIT, NUM_BINS = 0.5, 4


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """Compute J, the IoU of two masks, bool (H, W); 1 where both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def contour_accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """Compute F, the harmonic mean of precision and recall of contour pixels, which may lie some px apart.

    Args:
        mask, truth: bool (H, W).
    Returns:
        0..1; 1 where both have no contour, 0 where one has none.
    """
    radius_px = math.ceil(BOUND_SHARE * math.hypot(*mask.shape))
    offsets = np.arange(-radius_px, radius_px + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius_px**2).astype(np.uint8)
    contours = [find_contour(each).view(np.uint8) for each in (mask, truth)]
    counts = [int(contour.sum()) for contour in contours]
    if not all(counts):
        return float(counts[0] == counts[1])
    near = [cv2.dilate(contour, disk, borderType=cv2.BORDER_CONSTANT, borderValue=0) for contour in contours]
    precision = np.count_nonzero(contours[0] & near[1]) / counts[0]
    recall = np.count_nonzero(contours[1] & near[0]) / counts[1]
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def find_contour(mask: np.ndarray) -> np.ndarray:
    """Find the pixels of a mask, bool (H, W), that differ from the one right, below, or right below: bool (H, W)."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def summarize_frames(values: np.ndarray) -> dict[str, float]:
    """Summarize J or F of one object, (T,), over its frames: mean, recall, decay.

    DAVIS parts the frames into four runs whose borders are 1 + (T - 1) k / 4, rounded, less 1, for k = 0 to 4; each run
    has the frames at both its borders.
    """
    values = np.asarray(values, np.float64)
    borders = np.round(np.linspace(1, len(values), NUM_BINS + 1) + 1e-10).astype(np.int64) - 1
    first, last = values[borders[0] : borders[1] + 1], values[borders[3] : borders[4] + 1]
    return {
        "mean": float(values.mean()),
        "recall": float((values > RECALL_LIMIT).mean()),
        "decay": float(first.mean() - last.mean()),
    }


def score_masks(j: np.ndarray, f: np.ndarray) -> dict[str, float]:
    """Summarize one object's J and F of the frames that count, (T,) each, as DAVIS's tables do."""
    of_j, of_f = summarize_frames(j), summarize_frames(f)
    scores = {"j_and_f": (of_j["mean"] + of_f["mean"]) / 2}
    scores |= {f"j_{name}": value for name, value in of_j.items()}
    return scores | {f"f_{name}": value for name, value in of_f.items()}


def find_masks(folder: Path, sequence: Sequence) -> tuple[dict[str, Path], int | None]:
    """Find a sequence's masks in a tracker's folder: {frame: <frame>.png}, and the object's id in them, None for all.

    They are in <sequence>/, or, as DAVIS's toolkits have the objects of a video, in <video>/; {} where there are none.
    """
    for name, mask_id in ((sequence.name, None), (sequence.video, sequence.mask_id)):
        names = picture_names(folder / name) if sequence.mask_dir and (folder / name).is_dir() else []
        paths = {Path(each).stem: folder / name / each for each in names if each.lower().endswith(".png")}
        if paths:
            return paths, mask_id
    return {}, None


def score_folder(folder: Path, sequence: Sequence) -> dict[str, float]:
    """Score the masks of a tracker's folder, where `find_masks` finds some, against a sequence's: `score_masks`.

    A frame without a file counts as an empty mask. Frames up to the object's first mask do not count, nor does the last
    frame that has a file of masks.
    """
    paths, mask_id = find_masks(folder, sequence)
    true_paths = {path.stem: path for path in list_frames(sequence.mask_dir)}
    stems = [Path(name).stem for name in sequence.frame_names[int(sequence.visible.argmax()) + 1 :]]
    j, f = [], []
    for stem in [stem for stem in stems if stem in true_paths][:-1]:  # YouTube-VOS has masks of every fifth frame
        true_ids = read_label_map(true_paths[stem])
        true_mask = true_ids > 0 if sequence.mask_id is None else true_ids == sequence.mask_id
        ids = read_label_map(paths[stem]) if stem in paths else np.zeros(true_ids.shape, np.int32)
        mask = ids > 0 if mask_id is None else ids == mask_id
        if mask.shape != true_mask.shape:
            (height, width), (true_height, true_width) = mask.shape, true_mask.shape
            raise ValueError(f"{paths[stem]} is {width} x {height} px, its frame {true_width} x {true_height}")
        j.append(region_similarity(mask, true_mask))
        f.append(contour_accuracy(mask, true_mask))
    if not j:
        raise ValueError(f"{sequence.name} has no annotated frame between its object's first and the video's last")
    return score_masks(np.array(j), np.array(f))
