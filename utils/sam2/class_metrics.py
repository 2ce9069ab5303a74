"""How good classes of masks are: the average precision of automatic masks by class, and which are taken for which."""

import csv
from pathlib import Path

import numpy as np

from utils.instances.codecs import rle_to_mask
from utils.instances.readers import Instances
from utils.log import drawing
from utils.sam2 import detection_metrics as metrics
from utils.sam2 import protocols
from utils.sam2.class_head import NONE, UNKNOWN, class_targets
from utils.sam2.mask_generation import score_mask

MOST_MASKS = 100  # of a picture, as COCO counts
AREA_OF_OTHERS = 1e11  # px, beyond all ranges: objects without a class are neither found nor missed


def match_masks(
    annotations: list[dict], instances: Instances, names: list[str], min_area_px: int = 0
) -> list[metrics.Matches]:
    """Match the automatic masks of a picture with its objects, class by class, as COCO does.

    Neither right nor wrong are masks on objects without a class, or that are too small to be used, and on what the
    annotation leaves open, such as crowds.

    Args:
        annotations: of `generate_masks` with a ClassFilter: a mask's score is its predicted IoU times the probability
            of its class.
        min_area_px: smaller objects are not looked for.
    Returns:
        the matches of each name.
    """
    truth = protocols.read_truth(instances, {})
    objects = [(layer, object_id) for layer, object_id, _ in protocols.object_ids(instances.layers)]
    targets = np.array(class_targets(instances, objects, names), np.int64)
    scores = np.array([score_mask(annotation) for annotation in annotations], np.float64)
    given = np.array([names.index(annotation["class"]) for annotation in annotations], np.int64)
    pred_areas = np.array([annotation["area"] for annotation in annotations], np.float64)
    overlaps = [protocols.count_overlaps(rle_to_mask(annotation["segmentation"]), truth) for annotation in annotations]
    overlaps = np.array(overlaps, np.float64).reshape(len(annotations), len(targets))
    truth = truth._replace(is_crowd=np.zeros(len(targets), bool))  # crowds that are objects are like all others
    ious = protocols.measure_overlaps(overlaps, pred_areas, truth)
    areas, is_crowd = truth.given_areas, truth.is_crowd
    if instances.ignored is not None:  # one more, as a crowd of each class
        shares = [np.count_nonzero(rle_to_mask(each["segmentation"]) & instances.ignored) for each in annotations]
        shares = np.array(shares, np.float64).reshape(-1, 1) / np.maximum(pred_areas[:, None], 1)
        ious, targets = np.concatenate([ious, shares], 1), np.append(targets, UNKNOWN)
        areas, is_crowd = np.append(areas, AREA_OF_OTHERS), np.append(is_crowd, True)
    is_small = np.append(truth.areas, np.full(len(targets) - len(truth.areas), np.inf)) < min_area_px
    of_names = []
    for number in range(len(names)):
        is_given = given == number
        is_seen = (targets == 1 + number) | (targets == UNKNOWN)
        limited = np.where((targets == UNKNOWN) | is_small, AREA_OF_OTHERS, areas)[is_seen]
        of_names.append(
            metrics.match_predictions(
                ious[is_given][:, is_seen],
                scores[is_given],
                pred_areas[is_given],
                limited,
                is_crowd[is_seen],
                most=MOST_MASKS,
            )
        )
    return of_names


def precision_by_class(pictures: list[list[metrics.Matches]], names: list[str]) -> np.ndarray:
    """Compute the average precision of each class at IoUs of 0.5 to 0.95: (names, 10), nan for one without objects."""
    return np.array([metrics.average_precision([picture[n] for picture in pictures]) for n in range(len(names))])


def summarize_precision(by_class: np.ndarray) -> dict[str, float]:
    """Average over the classes with objects: {"mask_ap": all IoUs, "mask_ap_50": at 0.5}, or {} where none has any."""
    by_class = by_class[~np.isnan(by_class[:, 0])]
    if not len(by_class):
        return {}
    return {"mask_ap": float(by_class.mean()), "mask_ap_50": float(by_class[:, 0].mean())}


def count_answers(targets: list[int], logits: np.ndarray) -> np.ndarray:
    """Count a head's answers for O objects, those of UNKNOWN class left out.

    Args:
        targets: O, as `class_targets`.
        logits: float (O, 1 + names).
    Returns:
        int64 (2, 1 + names, 1 + names), rows are the truth, "none" is first: the likeliest answers, and the likeliest
        names, as `classify` gives them.
    """
    num_answers = logits.shape[1]
    known = np.array(targets) >= 0
    pairs = np.array(targets)[known] * num_answers
    answers = logits[known].argmax(1), 1 + logits[known, 1:].argmax(1)
    counted = [np.bincount(pairs + each, minlength=num_answers**2) for each in answers]
    return np.stack(counted).reshape(2, num_answers, num_answers)


def report_classes(
    answers: list[np.ndarray], matches: list[list[metrics.Matches]], names: list[str], folder: Path | None
) -> dict[str, float]:
    """Summarise what was measured of classes in each picture, and write confusion.png and classes.csv.

    Args:
        answers: of each picture, from `count_answers`.
        matches: of each picture, from `match_masks`; [] where automatic masks were not measured.
        folder: where the files go; None: there are none.
    Returns:
        class_accuracy_1_click, the share of objects whose likeliest name is right (of a single name: which is likelier
        than "none"); mask_ap and mask_ap_50: those that
        there is something to measure of.
    """
    with_none, of_names = np.sum(answers, 0)
    if len(names) == 1:  # any answer but "none" would be right
        of_names = with_none
    num_objects, num_right = of_names[1:].sum(1), of_names.diagonal()[1:]
    by_class = precision_by_class(matches, names)
    values = summarize_precision(by_class)
    if num_objects.any():
        values = {"class_accuracy_1_click": float(num_right.sum() / num_objects.sum())} | values
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "classes.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "objects", "named_right", "mask_ap", "mask_ap_50"])
            for name, count, right, precision in zip(names, num_objects, num_right, by_class, strict=True):
                measured = [f"{value:.4f}" if np.isfinite(value) else "" for value in (precision.mean(), precision[0])]
                writer.writerow([name, count, f"{right / count:.4f}" if count else "", *measured])
        with drawing(folder / "confusion.png"):
            draw_confusion(with_none, names, folder / "confusion.png")
    return values


def draw_confusion(matrix: np.ndarray, names: list[str], path: Path) -> None:
    """Draw which classes were taken for which: shares of each true class, and how many objects it has."""
    from matplotlib.figure import Figure

    all_names = [NONE, *names]
    rows = [number for number in range(len(all_names)) if matrix[number].any()] or [0]
    shares = matrix[rows] / matrix[rows].sum(1, keepdims=True).clip(1)
    side = min(0.6, 18 / len(all_names))  # inches of a class
    figure = Figure(figsize=(2.5 + side * len(all_names), 2 + side * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    if len(all_names) <= 30:
        for row, of_row in enumerate(shares):
            for column, share in enumerate(of_row):
                axes.text(
                    column, row, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black"
                )
    axes.set_xticks(range(len(all_names)), all_names, rotation=45, ha="right", parse_math=False)
    counted = [f"{all_names[number]} ({matrix[number].sum()})" for number in rows]
    axes.set_yticks(range(len(rows)), counted, parse_math=False)
    axes.set(xlabel="answer after one click", ylabel="class (objects)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
