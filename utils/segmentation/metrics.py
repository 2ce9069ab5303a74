"""Numbers reported for masks and for class maps."""

import numpy as np
import torch

from utils.images import IGNORE_INDEX

BAND_PX = 2**20  # pixels of a picture at a time, where probabilities need double precision

# ---------------------------------------------------------------------------------------------------------------------
# class maps: one integer confusion matrix over the whole set, and everything that is reported from it


def confusion_matrix(pred_classes: torch.Tensor, target: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count how often each class is predicted as each; the sum over batches is the matrix of the whole set.

    Args:
        pred_classes: int (...), 0..C-1: class indices, not logits.
        target: int (...), the same shape, 0..C-1 or 255 = ignore.
        num_classes: C.
    Returns:
        int64 (C, C) on the device of `target`: rows are the truth, columns the prediction.
    Raises:
        ValueError: the shapes differ, a dtype is not integer, or a value is not a class.
    """
    if pred_classes.shape != target.shape:
        shapes = f"{tuple(pred_classes.shape)} and {tuple(target.shape)}"
        raise ValueError(f"shapes of prediction and target are {shapes}; must be equal: class indices, not logits")
    for name, values in (("prediction", pred_classes), ("target", target)):
        if values.dtype.is_floating_point or values.dtype in (torch.bool, torch.complex64):
            raise ValueError(f"dtype of the {name} is {values.dtype}; must be an integer type: class indices")
    are_classes = (0 <= target) & (target < num_classes) & (0 <= pred_classes) & (pred_classes < num_classes)
    wrong, ignored = num_classes**2, num_classes**2 + 1  # cells behind those of the matrix
    cells = torch.where(are_classes, target.long() * num_classes + pred_classes, wrong)
    cells = torch.where(target == IGNORE_INDEX, ignored, cells).flatten()
    counts = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=cells.device)
    counts.scatter_add_(0, cells, torch.ones_like(cells))  # bincount and indices by bool would wait for the device
    if counts[wrong].item():  # the only wait
        valid = target != IGNORE_INDEX
        for name, classes in (("prediction", pred_classes[valid]), ("target", target[valid])):
            lowest, highest = int(classes.min()), int(classes.max())
            if not 0 <= lowest <= highest < num_classes:
                raise ValueError(f"the {name} holds class {lowest} to {highest}; must be 0 to {num_classes - 1}")
    return counts[:wrong].view(num_classes, num_classes)


def segmentation_metrics(matrix: torch.Tensor | np.ndarray) -> dict:
    """Compute what is reported of a set from its confusion matrix.

    A class is absent if no counted pixel of the truth belongs to it: it is left out of every mean, and what is wrongly
    predicted as it counts as missing in the classes that it was taken from.

    Args:
        matrix: int (C, C), rows truth, columns prediction, summed over the whole set.
    Returns:
        pixel_accuracy: float, share of right pixels.
        mean_iou, dice: float, means over the classes present of IoU and Dice.
        weighted_iou: float, mean of IoU weighted by the classes' shares of the truth.
        class_iou, class_dice, class_precision, class_recall: float64 (C,), nan for absent classes; the precision of a
            class that is never predicted is 0.
        absent: list of the absent classes' indices.
    Raises:
        ValueError: the matrix is empty: no pixel of the set counts.
    """
    matrix = np.asarray(torch.as_tensor(matrix).cpu(), np.float64)  # exact up to 9e15 pixels
    if not matrix.sum() > 0:
        raise ValueError("no pixel of the set counts: every mask holds nothing but the ignored value")
    right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    present = true > 0

    def of_classes(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
        return np.where(present, numerator / np.maximum(denominator, 1), np.nan)

    class_iou = of_classes(right, true + predicted - right)
    class_dice = of_classes(2 * right, true + predicted)
    return {
        "pixel_accuracy": float(right.sum() / matrix.sum()),
        "mean_iou": float(class_iou[present].mean()),
        "weighted_iou": float((class_iou[present] * true[present]).sum() / matrix.sum()),
        "dice": float(class_dice[present].mean()),
        "class_iou": class_iou,
        "class_dice": class_dice,
        "class_precision": of_classes(right, predicted),
        "class_recall": of_classes(right, true),
        "absent": np.flatnonzero(~present).tolist(),
    }


def soft_iou(probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the soft IoU of each image: sum(p t) / sum(p + t - p t) over its pixels and classes together.

    Large classes dominate it, and it is never above what the probabilities are sure of: not comparable with mean_iou.

    Args:
        probs: (B, C, H, W), softmax probabilities.
        target: int (B, H, W), 0..C-1 or 255 = ignore.
    Returns:
        float64 (B,), on mps float32; nan for an image without a pixel that counts. The value of a set is the mean over
        its images.
    Source: Matani and Naresh 2023, "Efficient Image Segmentation Using PyTorch"; without their smoothing of 0.001.
    """
    overlap = total = 0
    dtype = torch.float32 if probs.device.type == "mps" else torch.float64
    for first in range(0, target.shape[1], rows := max(1, BAND_PX // target.shape[2])):
        band = slice(first, first + rows)
        valid = target[:, band] != IGNORE_INDEX  # (B, rows, W)
        band_probs = probs[:, :, band].to(dtype)  # (B, C, rows, W)
        true_class = target[:, band].masked_fill(~valid, 0).long()
        overlap = overlap + (band_probs.gather(1, true_class[:, None])[:, 0] * valid).sum((1, 2))
        total = total + (band_probs * valid[:, None]).sum((1, 2, 3)) + valid.sum((1, 2))
    return overlap / (total - overlap)
