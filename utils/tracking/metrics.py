"""How well tracked boxes agree with groundtruth: overlap, centre distance, OTB's success and precision, GOT-10k's AO.

Boxes are float (T, 4): left, top, width, height px, a row for each frame. Two protocols look at where a box lies in the
frame (`pysot`, `pytracking`), and GOT-10k's scores cut boxes at the frame's border: to get the numbers that the
toolkits print, give boxes counted as in the files (`sequences.file_coordinates`, `read_result`).
"""

from pathlib import Path

import numpy as np

from utils.listing import read_text
from utils.tracking.sequences import Sequence, file_coordinates, find_result, read_result

PROTOCOLS = ("got10k", "pysot", "pytracking")
SUCCESS_THRESHOLDS = np.linspace(0, 1, 21)  # IoU; a frame succeeds where it is above
LATE_STARTS = {"Tiger1": 5}  # frames of OTB-100 that pysot's and pytracking's results leave out at the start
PRECISION_THRESHOLDS = np.arange(51)  # px; a frame is precise where its centre distance is at most this


# ---------------------------------------------------------------------------------------------------------------------
# frames


def box_iou(boxes: np.ndarray, truth: np.ndarray, bound_wh: tuple[int, int] | None = None) -> np.ndarray:
    """Compute the overlap of two boxes in each row: intersection over union.

    Args:
        boxes, truth: float (T, 4) each; they stay as they are.
        bound_wh: width and height, px, to cut both boxes to, from 0 on; None: no cut.
    Returns:
        float64 (T,) in 0..1; nan where a box is nan. A box without area has no overlap with any.
    Source: the GOT-10k toolkit's rect_iou.
    """
    boxes, truth = np.asarray(boxes, np.float64), np.asarray(truth, np.float64)
    assert boxes.shape == truth.shape and boxes.shape[1:] == (4,), (boxes.shape, truth.shape)
    if bound_wh is not None:
        boxes, truth = _cut(boxes, bound_wh), _cut(truth, bound_wh)
    top_left = np.maximum(boxes[:, :2], truth[:, :2])
    bottom_right = np.minimum(boxes[:, :2] + boxes[:, 2:], truth[:, :2] + truth[:, 2:])
    intersection = np.prod(np.maximum(bottom_right - top_left, 0), 1)
    union = np.prod(boxes[:, 2:], 1) + np.prod(truth[:, 2:], 1) - intersection
    return np.clip(intersection / (union + np.finfo(np.float64).eps), 0.0, 1.0)


def _cut(boxes: np.ndarray, bound_wh: tuple[int, int]) -> np.ndarray:
    """Cut boxes to a frame, as the GOT-10k toolkit does: a box that starts left of it is moved, not narrowed."""
    top_left = np.clip(boxes[:, :2], 0, bound_wh)
    return np.concatenate([top_left, np.clip(boxes[:, 2:], 0, bound_wh - top_left)], 1)


def center_error(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Compute the distance of two boxes' centres, left + (width - 1) / 2, in each row.

    Args:
        boxes, truth: float (T, 4) each.
    Returns:
        float64 (T,), px; nan where a box is nan.
    """
    return np.sqrt(((_centers(boxes) - _centers(truth)) ** 2).sum(1))


def _centers(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, :2] + (boxes[:, 2:] - 1) / 2


# ---------------------------------------------------------------------------------------------------------------------
# OTB: one-pass evaluation


def one_pass_scores(boxes: np.ndarray, truth: np.ndarray, protocol: str) -> dict:
    """Compute a sequence's success and precision: how many frames overlap enough, and are near enough.

    Args:
        boxes: tracked, float (T, 4); more rows than groundtruth are cut off.
        truth: groundtruth, float (T, 4); nan or no area: no object.
        protocol: which toolkit's rules (they differ for frames without object):
            got10k      the first frame counts as perfect; nan is a miss.
            pysot       frames without object are misses; those whose centre is not above 0 in x and y are precise.
            pytracking  the first frame counts as perfect; a box without area is replaced by the one before; a frame
                        whose groundtruth is not above 0 in all four numbers is a miss; missing rows are misses.
    Returns:
        success_curve float64 (21,) in 0..1: the share of frames whose overlap is above each of 0, 0.05, ... 1;
        precision_curve float64 (51,) in 0..1: the share whose centre distance is at most 0, 1, ... 50 px;
        success_auc: the mean of the success curve's points, for a perfect tracker 20/21, since no overlap is above 1;
        precision_20: at 20 px; success_50: IoU above 0.5.
    Raises:
        ValueError: for another protocol, or fewer boxes than groundtruth (not in pytracking), naming both numbers.
    Source: got10k 0.1.3 experiments/otb.py; pysot d04028f toolkit/utils/statistics.py; pytracking 7eb9e74
        analysis/extract_results.py (exclude_invalid_frames=False).
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; must be one of {', '.join(PROTOCOLS)}")
    boxes, truth = np.array(boxes, np.float64), np.asarray(truth, np.float64)  # boxes is a copy
    if protocol == "pytracking":
        for i in range(1, min(len(boxes), len(truth))):
            if (boxes[i, 2:] == 0).any() and not np.isnan(truth[i]).any():
                boxes[i] = boxes[i - 1]
        boxes = np.concatenate([boxes, np.zeros((max(0, len(truth) - len(boxes)), 4))])
    _check_length(boxes, truth)
    boxes = boxes[: len(truth)]
    if protocol != "pysot":
        boxes[0] = truth[0]
    iou, error_px = box_iou(boxes, truth), center_error(boxes, truth)  # nan counts as a miss
    if protocol == "pysot":
        iou[~(truth[:, 2:] > 0).all(1)] = -1
        error_px[~(_centers(truth) > 0).all(1)] = -1  # at most any threshold: counted as precise
    elif protocol == "pytracking":
        is_valid = (truth > 0).all(1)
        iou[~is_valid], error_px[~is_valid] = -1, np.inf
    success = (iou[:, None] > SUCCESS_THRESHOLDS).mean(0)
    return _scores_of_curves(success, (error_px[:, None] <= PRECISION_THRESHOLDS).mean(0))


def mean_one_pass_scores(scores: list[dict]) -> dict:
    """Average sequences, each counting the same, as OTB does: the scores of the mean curves.

    Args:
        scores: from `one_pass_scores`, at least one.
    """
    success, precision = (
        np.mean([score[name] for score in scores], 0) for name in ("success_curve", "precision_curve")
    )
    return _scores_of_curves(success, precision)


def _scores_of_curves(success: np.ndarray, precision: np.ndarray) -> dict:
    return {
        "success_curve": success,
        "precision_curve": precision,
        "success_auc": float(np.mean(success)),
        "precision_20": float(precision[20]),
        "success_50": float(success[10]),
    }


def _check_length(boxes: np.ndarray, truth: np.ndarray) -> None:
    if len(boxes) < len(truth):
        raise ValueError(f"there are {len(boxes)} boxes for {len(truth)} frames of groundtruth; track all frames")


# ---------------------------------------------------------------------------------------------------------------------
# GOT-10k


def got10k_overlaps(
    boxes: np.ndarray, truth: np.ndarray, frame_wh: tuple[int, int], cover: np.ndarray | None
) -> np.ndarray:
    """Compute the overlaps that GOT-10k counts: not the first frame's, only where the object is visible, in the frame.

    Args:
        boxes, truth: float (T, 4), counted as in the files.
        frame_wh: width, height of the frames, px.
        cover: int (T,), above 0 where the object is visible; None: frames whose groundtruth has an area.
    Returns:
        float64 (number of frames that count,); 0 where a tracked box is nan.
    Raises:
        ValueError: for fewer boxes than groundtruth, naming both numbers.
    """
    _check_length(boxes, truth)
    is_visible = (truth[:, 2:] > 0).all(1) if cover is None else np.asarray(cover)[: len(truth)] > 0
    iou = box_iou(boxes[1 : len(truth)], truth[1:], frame_wh)
    return np.nan_to_num(iou, nan=0.0)[is_visible[1:]]


def got10k_scores(overlaps: list[np.ndarray]) -> dict:
    """Compute average overlap and success rates over sequences, weighted in both usual ways.

    Args:
        overlaps: from `got10k_overlaps`, one array a sequence; those without a frame that counts are left out.
    Returns:
        ao, sr_50, sr_75: over all frames, as the GOT-10k toolkit does (SR: the share with IoU above 0.50, 0.75);
        ao_by_sequence, sr_50_by_sequence, sr_75_by_sequence: means of the sequences' own; num_frames.
    Raises:
        ValueError: where no frame counts.
    """
    overlaps = [iou for iou in overlaps if len(iou)]
    if not overlaps:
        raise ValueError("no sequence has a frame after the first with a visible object; nothing can be scored")
    frames = np.concatenate(overlaps)
    return {
        "ao": float(frames.mean()),
        "sr_50": _success_rate(frames, 0.5),
        "sr_75": _success_rate(frames, 0.75),
        "ao_by_sequence": float(np.mean([iou.mean() for iou in overlaps])),
        "sr_50_by_sequence": float(np.mean([_success_rate(iou, 0.5) for iou in overlaps])),
        "sr_75_by_sequence": float(np.mean([_success_rate(iou, 0.75) for iou in overlaps])),
        "num_frames": len(frames),
    }


def _success_rate(iou: np.ndarray, threshold: float) -> float:
    return float(np.mean(iou > threshold))


# ---------------------------------------------------------------------------------------------------------------------
# sequences


def still_boxes(sequence: Sequence) -> np.ndarray:
    """Make the boxes of a tracker that keeps the first visible box, float64 (T, 4) px, 0-based; nan before it."""
    start = int(sequence.visible.argmax())
    boxes_xywh = np.full((len(sequence), 4), np.nan)
    boxes_xywh[start:] = sequence.boxes_xywh[start]
    return boxes_xywh


def mean_visible_iou(boxes_xywh: np.ndarray, sequence: Sequence) -> float | None:
    """Compute the mean IoU over the frames after the first in which the object is visible; None if there are none.

    Args:
        boxes_xywh: tracked, (T, 4) px, 0-based; one that is nan has no overlap.
    """
    counts = sequence.visible.copy()
    counts[counts.argmax()] = False
    iou = box_iou(boxes_xywh[counts], sequence.boxes_xywh[counts])
    return float(np.nan_to_num(iou, nan=0.0).mean()) if counts.any() else None


def mean_scores(rows: list[dict]) -> dict:
    """Average a tracker's sequences, each counting the same.

    Args:
        rows: from `score_result`, at least one.
    Returns:
        the scores of `mean_one_pass_scores`; ao, sr_50, sr_75: means of the sequences' own, and over all frames
        ao_by_frame, ..., None where no frame counts (`got10k_scores`); num_frames; fps: frames over seconds, None where
        no time is known.
    """
    overlaps, times_s = [row["overlaps"] for row in rows], np.concatenate([row["times_s"] for row in rows])
    got10k = got10k_scores(overlaps) if any(map(len, overlaps)) else {}
    times_s = times_s[np.isfinite(times_s) & (times_s > 0)]
    means = mean_one_pass_scores(rows) | {"num_frames": sum(row["num_frames"] for row in rows)}
    for name in ("ao", "sr_50", "sr_75"):
        means |= {name: got10k.get(f"{name}_by_sequence"), f"{name}_by_frame": got10k.get(name)}
    return means | {"fps": len(times_s) / float(times_s.sum()) if len(times_s) else None}


# ---------------------------------------------------------------------------------------------------------------------
# result files


def score_result(folder: str | Path, sequence: Sequence, protocol: str) -> dict:
    """Score a tracker's result file of a sequence, on the annotated frames from the first with a visible object on.

    Args:
        folder: the tracker's, in any layout that `read_result` reads.
        sequence: with two or more such frames.
        protocol: as for `one_pass_scores`.
    Returns:
        the scores of `one_pass_scores`; overlaps, from `got10k_overlaps`; num_frames, that were scored; times_s, from
        `read_times`.
    Raises:
        FileNotFoundError, ValueError: for a file that is missing, faulty, or shorter than the groundtruth (in protocol
            pytracking the frames that it lacks are misses), naming it.
    """
    first, last = int(sequence.visible.argmax()), sequence.num_annotated
    truth = file_coordinates(sequence.boxes_xywh, sequence.box_origin)[first:last]
    boxes = read_result(folder, sequence.name)
    late = LATE_STARTS.get(sequence.name, 0)
    if late and len(boxes) == last - late:
        boxes, first = np.concatenate([np.full((late, 4), np.nan), boxes]), max(first, late)
        truth = file_coordinates(sequence.boxes_xywh, sequence.box_origin)[first:last]
    if len(boxes) < last and protocol != "pytracking":
        raise ValueError(
            f"{find_result(folder, sequence.name)} has {len(boxes)} boxes, but {sequence.name} groundtruth for {last} "
            "frames; track all of them"
        )
    boxes = boxes[first:last]
    if len(boxes) and np.isnan(boxes[0]).any():
        boxes[0] = truth[0]  # VOT's files have a mark where the tracker was started
    return score_boxes(boxes, sequence, first, last, protocol) | {"times_s": read_times(folder, sequence.name)}


def score_boxes(boxes: np.ndarray, sequence: Sequence, first: int, stop: int, protocol: str) -> dict:
    """Score tracked boxes of a sequence's frames first..stop-1.

    Args:
        boxes: float (T, 4), counted as in the dataset's files; boxes[0] is of frame `first`.
        protocol: as for `one_pass_scores`.
    Returns:
        the scores of `one_pass_scores`; overlaps, from `got10k_overlaps`; num_frames, that were scored.
    """
    truth = file_coordinates(sequence.boxes_xywh, sequence.box_origin)[first:stop]
    scores = one_pass_scores(boxes, truth, protocol)
    boxes = np.concatenate([boxes, np.full((max(0, len(truth) - len(boxes)), 4), np.nan)])
    cover = None if sequence.cover is None else sequence.cover[first:stop]
    overlaps = got10k_overlaps(boxes, truth, sequence.frame_wh, cover)
    return scores | {"overlaps": overlaps, "num_frames": len(truth)}


def read_times(folder: str | Path, name: str) -> np.ndarray:
    """Read the seconds that a tracker took for each frame, float64 (T,), from the file beside its result, if any.

    Raises:
        FileNotFoundError, ValueError: where there is no result file, or its times are no numbers, naming the file.
    """
    path = find_result(folder, name)
    stem = path.stem.removesuffix("_001")
    for time_path in (path.with_name(f"{stem}_time.txt"), path.parent / "times" / f"{stem}_time.txt"):
        if time_path.is_file():
            lines = read_text(time_path).replace(",", " ").splitlines()
            try:
                return np.array([float(line.split()[0]) for line in lines if line.strip()])
            except ValueError as error:
                raise ValueError(f"{time_path} must have seconds, a number a line: {error}") from error
    return np.zeros(0)
