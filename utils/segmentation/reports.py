"""What is drawn and printed of predictions of class maps."""

import cv2
import numpy as np

from utils.images import draw_legend, overlay_label_map
from utils.segmentation.metrics import segmentation_metrics

REPORTED = ("mean_iou", "pixel_accuracy", "dice", "weighted_iou")  # what best.pt can be chosen by
ONE_CLASS_SHARE = 0.995  # above this share of all pixels a network is taken to answer with one class whatever it sees


def names_shown(values: dict[str, float]) -> list[str]:
    """Name the metrics to print of {"val/mean_iou": float, ...}: those of every set, V_rand where it was measured."""
    return [*REPORTED, *(["v_rand"] if any(key.endswith("/v_rand") for key in values) else [])]


def class_ids(class_map: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Number classes for colouring, (H, W) from 1; 0, which is left uncoloured: "background", and what is ignored."""
    ids = np.zeros(256, np.int64)
    ids[: len(names)] = [0 if name == "background" else index + 1 for index, name in enumerate(names)]
    return ids[class_map]


def draw_sample(image: np.ndarray, pred: np.ndarray, class_map: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Draw picture, prediction and truth side by side, with the classes' colours below: uint8, 384 px a side each."""
    image_rgb = np.broadcast_to(image, (*image.shape[:2], 3))
    panels = [image_rgb] + [overlay_label_map(image_rgb, class_ids(classes, names)) for classes in (pred, class_map)]
    scale = 384 / max(image_rgb.shape[:2])
    size_wh = (max(1, round(image_rgb.shape[1] * scale)), max(1, round(image_rgb.shape[0] * scale)))
    panels = [cv2.resize(np.ascontiguousarray(panel), size_wh, interpolation=cv2.INTER_AREA) for panel in panels]
    picture = np.concatenate(panels, 1)
    return np.concatenate([picture, draw_legend(names, class_ids(np.arange(len(names)), names), picture.shape[1])])


def remarks_on_predictions(matrix: np.ndarray, names: tuple[str, ...], split: str) -> list[str]:
    """Say which classes are absent from the truth, and whether nearly all pixels are predicted to be of one class.

    Not where nearly all are of that class: what matters is what the pixels of the others are predicted to be.
    """
    lines = []
    truth, predicted = matrix.sum(1), matrix.sum(0)
    if absent := [name for name, count in zip(names, truth, strict=True) if count == 0]:
        lines.append(f"no pixel of the {split} pictures is {', '.join(absent)}: left out of the means")
    largest = int(predicted.argmax())
    missed, others = predicted[largest] - matrix[largest, largest], truth.sum() - truth[largest]
    if predicted[largest] > ONE_CLASS_SHARE * predicted.sum() and missed > ONE_CLASS_SHARE * others:
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


def class_lines(matrix: np.ndarray, names: tuple[str, ...], split: str) -> list[str]:
    """Put the metrics of each class into lines to print, and the remarks on all of them below."""
    metrics, truth = segmentation_metrics(matrix), matrix.sum(1)
    lines = [f"{'class':<24}{'share':>9}{'IoU':>9}{'Dice':>9}{'precision':>11}{'recall':>9}"]
    for index, name in enumerate(names):
        keys = ("class_iou", "class_dice", "class_precision", "class_recall")
        iou, dice, precision, recall = (metrics[key][index] for key in keys)
        share = truth[index] / max(1, truth.sum())
        lines.append(f"{name:<24}{share:>9.2%}{iou:>9.3f}{dice:>9.3f}{precision:>11.3f}{recall:>9.3f}")
    return [*lines, *remarks_on_predictions(matrix, names, split)]
