"""How good classes of masks are: the average precision of automatic masks by class, and which are taken for which."""

from pathlib import Path

import numpy as np

from utils.instances.codecs import rle_to_mask
from utils.instances.readers import Instances
from utils.sam2 import detection_metrics as metrics
from utils.sam2 import protocols
from utils.sam2.class_head import NONE, class_targets
from utils.sam2.mask_generation import score_mask

MOST_MASKS = 100  # of a picture, as COCO counts
AREA_OF_OTHERS = 1e11  # px, beyond all ranges: objects without a class are neither found nor missed


def match_masks(annotations: list[dict], instances: Instances, names: list[str]) -> list[metrics.Matches]:
    """Match the automatic masks of a picture with its objects, class by class, as COCO does.

    Args:
        annotations: of `generate_masks` with a ClassFilter: a mask's score is its predicted IoU times the probability
            of its class.
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
    ious = protocols.measure_overlaps(overlaps, pred_areas, truth)
    of_names = []
    for number in range(len(names)):
        is_given, is_class = given == number, targets == 1 + number
        unknown = targets == -1
        is_seen = is_class | unknown
        areas = np.where(unknown, AREA_OF_OTHERS, truth.given_areas)[is_seen]
        of_names.append(
            metrics.match_predictions(
                ious[is_given][:, is_seen],
                scores[is_given],
                pred_areas[is_given],
                areas,
                truth.is_crowd[is_seen],
                most=MOST_MASKS,
            )
        )
    return of_names


def summarize_matches(pictures: list[list[metrics.Matches]], names: list[str]) -> dict[str, float]:
    """Compute {"mask_ap": mean over classes and over IoUs of 0.5 to 0.95, "mask_ap_50": at 0.5, "mask_ap/<name>": ...}.

    A class without an object has no precision and counts for nothing.
    """
    of_names = np.array([metrics.average_precision([picture[n] for picture in pictures]) for n in range(len(names))])
    is_there = ~np.isnan(of_names[:, 0])
    if not is_there.any():
        return {}
    means = {"mask_ap": float(of_names[is_there].mean()), "mask_ap_50": float(of_names[is_there, 0].mean())}
    shown = {name: of_names[n].mean() for n, name in enumerate(names) if is_there[n]}
    return means | {f"mask_ap/{name}": float(value) for name, value in shown.items()}


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


def summarize_answers(pictures: list[np.ndarray]) -> tuple[float | None, np.ndarray]:
    """Add up what `count_answers` counted in pictures.

    Returns:
        the share of objects whose likeliest name is right, None where no object has a class; and the matrix of the
        likeliest answers, int64 (1 + names, 1 + names).
    """
    with_none, of_names = np.sum(pictures, 0)
    num_named = of_names[1:].sum()
    return (float(of_names[1:, 1:].trace() / num_named) if num_named else None), with_none


def draw_confusion(matrix: np.ndarray, names: list[str], path: Path) -> None:
    """Draw which classes were taken for which: shares of each true class, and how many objects it has."""
    from matplotlib.figure import Figure

    all_names = [NONE, *names]
    rows = [number for number in range(len(all_names)) if matrix[number].any()] or [0]
    shares = matrix[rows] / matrix[rows].sum(1, keepdims=True).clip(1)
    figure = Figure(figsize=(2.5 + 0.6 * len(all_names), 2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    if len(all_names) <= 30:
        for row, of_row in enumerate(shares):
            for column, share in enumerate(of_row):
                axes.text(
                    column, row, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black"
                )
    axes.set_xticks(range(len(all_names)), all_names, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [f"{all_names[number]} ({matrix[number].sum()})" for number in rows])
    axes.set(xlabel="answer after one click", ylabel="class (objects)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
