"""Numbers reported for masks and for class maps."""

import cv2
import numpy as np
import torch

from utils.images import IGNORE_INDEX

RAND_THRESHOLDS = tuple(number / 10 for number in range(1, 10))  # of the boundary's probability
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


# ---------------------------------------------------------------------------------------------------------------------
# objects that a thin class separates, such as cells that membranes do


def rand_scores(boundary_probs: np.ndarray, class_map: np.ndarray, boundary: int) -> np.ndarray:
    """Compute V_rand after thinning at each of RAND_THRESHOLDS: how well the objects between boundaries are told apart.

    Pixels as probable as a threshold, or more, are boundary; the rest falls into 4-connected objects, which then grow
    until only lines of one pixel are left between them, since the width of a boundary does not count. The score of a
    set is the highest over thresholds of the mean over its pictures.

    Args:
        boundary_probs: float (H, W).
        class_map: int (H, W), the truth; its objects are not thinned, and boundary and IGNORE_INDEX do not count.
        boundary: the class that separates objects.
    Returns:
        float64 (9,); nan where the truth has no object.
    Source: Arganda-Carreras et al. 2015, "Crowdsourcing the creation of image segmentation algorithms for
        connectomics", the ISBI 2012 challenge; thinning is a watershed here, a skeleton of the boundary there.
    """
    _, truth = cv2.connectedComponents(
        ((class_map != boundary) & (class_map != IGNORE_INDEX)).astype(np.uint8), None, 4
    )
    scores = []
    for threshold in RAND_THRESHOLDS:
        _, objects = cv2.connectedComponents((boundary_probs < threshold).astype(np.uint8), None, 4)
        objects = cv2.copyMakeBorder(objects, 1, 1, 1, 1, cv2.BORDER_REPLICATE)  # whose rim the watershed takes away
        grown = cv2.watershed(np.zeros((*objects.shape, 3), np.uint8), objects)[1:-1, 1:-1]
        scores.append(rand_score(truth, np.maximum(grown, 0)))
    return np.array(scores)


def rand_score(truth: np.ndarray, objects: np.ndarray) -> float:
    """Compute V_rand: 2 sum(p_ij^2) / (sum(s_i^2) + sum(t_j^2)), over pixels that are part of an object in the truth.

    It is the F-score of pairs of pixels that are in one object, not of the pixels. p_ij is the share of pixels in
    object i of the truth and in predicted object j; s and t are its sums over j and over i.

    Args:
        truth, objects: int (H, W), an object's number from 1, or 0: none. A predicted 0 is an object of its own.
    Returns:
        0..1; nan where the truth has no object.
    """
    counts = truth > 0
    pairs, num_px = np.unique(np.stack([truth[counts], objects[counts]]), axis=1, return_counts=True)  # (2, P), (P,)
    num_px, is_object = num_px.astype(np.float64), pairs[1] > 0
    if not len(num_px):
        return float("nan")
    alone = num_px[~is_object].sum()  # pixels that are objects of one pixel
    both = (num_px[is_object] ** 2).sum() + alone
    in_truth = (np.bincount(pairs[0], num_px) ** 2).sum()
    predicted = (np.bincount(pairs[1][is_object], num_px[is_object]) ** 2).sum() + alone
    return float(2 * both / (in_truth + predicted))
