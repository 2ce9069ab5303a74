"""Losses of class maps, on logits, always computed in fp32; weights of classes and gaps.

They take `logits` (B, C, H, W) and `target` int (B, H, W) and return one scalar.
"""

import math

import cv2
import numpy as np
import torch

from utils.images import IGNORE_INDEX

# ---------------------------------------------------------------------------------------------------------------------
# losses of class maps: softmax over C classes, one value per batch; pixels of IGNORE_INDEX count nowhere


def class_log_probs(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute what every loss of class maps starts from, in fp32 (fp64 for fp64 logits).

    Args:
        logits: (B, C, H, W), any float type.
        target: int (B, H, W), 0..C-1 or 255 = ignore.
    Returns:
        log_probs (B, C, H, W); true_class int64 (B, H, W), 0 at ignored pixels; valid bool (B, H, W), what counts.
    Raises:
        ValueError: the shapes do not fit together.
    """
    if logits.ndim != 4 or target.shape != (len(logits), *logits.shape[2:]):
        raise ValueError(
            f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must be (B, C, H, W) and (B, H, W)"
        )
    valid = target != IGNORE_INDEX
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(~valid[:, None], 0)  # so that even nan there has no effect and no gradient
    return logits.log_softmax(1), target.masked_fill(~valid, 0).long(), valid


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute sum(w v) / sum(w); 0, with gradient 0, where all weights are 0."""
    return (values * weights).sum() / weights.sum().clamp(min=1e-12)


def weigh_pixels(
    true_class: torch.Tensor,
    valid: torch.Tensor,
    class_weight: torch.Tensor | None,
    pixel_weight: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Give each pixel its own weight, or else its class's, or else 1: all (B, H, W); 0 at ignored pixels."""
    if pixel_weight is not None:  # with a border_weight_map it holds the class weights as its first summand
        weight = pixel_weight.to(true_class.device, dtype)
    elif class_weight is not None:
        weight = class_weight.to(true_class.device, dtype)[true_class]
    else:
        weight = valid.to(dtype)
    return weight.masked_fill(~valid, 0)


def cross_entropy_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    pixel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the softmax cross-entropy, the weighted mean over pixels: sum(w ce) / sum(w).

    Args:
        logits: (B, C, H, W), any float type.
        target: int (B, H, W), 0..C-1 or 255 = ignore.
        class_weight: (C,), or None: 1.
        pixel_weight: (B, H, W), or None. It takes the place of `class_weight`, which a border_weight_map holds already.
    Returns:
        () float32; 0 where no pixel counts.
    Source: Ronneberger et al. 2015, equations 1 and 2, divided by the sum of weights, so that a weight of 10 in the
        gaps does not make the steps longer.
    """
    log_probs, true_class, valid = class_log_probs(logits, target)
    log_prob_of_truth = log_probs.gather(1, true_class[:, None])[:, 0]  # (B, H, W)
    weight = weigh_pixels(true_class, valid, class_weight, pixel_weight, log_probs.dtype)
    return weighted_mean(-log_prob_of_truth, weight)


def focal_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    pixel_weight: torch.Tensor | None = None,
    gamma: float = 2.0,
) -> torch.Tensor:
    """Compute the softmax focal loss, weighted mean over pixels of -(1 - p)**gamma log p, p that of the true class.

    Args:
        logits: (B, C, H, W), any float type.
        target: int (B, H, W), 0..C-1 or 255 = ignore.
        class_weight: (C,), or None: 1.
        pixel_weight: (B, H, W), or None; as in cross_entropy_loss.
        gamma: how strongly easy pixels are played down; 0 is the cross-entropy.
    Returns:
        () float32; 0 where no pixel counts.
    Source: Lin et al. 2017, equation 4, for softmax.
    """
    log_probs, true_class, valid = class_log_probs(logits, target)
    log_prob_of_truth = log_probs.gather(1, true_class[:, None])[:, 0]  # (B, H, W)
    error = -torch.expm1(log_prob_of_truth)  # 1 - p, exact also for p near 1
    focus = error.clamp(min=1e-8) ** gamma  # where gamma is below 1, the slope at 0 is infinite
    weight = weigh_pixels(true_class, valid, class_weight, pixel_weight, log_probs.dtype)
    return weighted_mean(-focus * log_prob_of_truth, weight)


def mean_soft_iou(logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None = None) -> torch.Tensor:
    """Compute M, the soft IoU that soft_iou_loss and log_iou_loss are made of.

    Of each image, sum(p t) / sum(p + t - p t) over its pixels and classes together, t being 1 for the true class; then
    the mean over images that have a pixel that counts (1 where none has).

    Args:
        logits: (B, C, H, W), any float type.
        target: int (B, H, W), 0..C-1 or 255 = ignore.
        class_weight: (C,) of the summands, or None: 1.
    Returns:
        () float32 in [0, 1].
    Source: Matani and Naresh 2023, "Efficient Image Segmentation Using PyTorch"; without their smoothing of 0.001.
    """
    log_probs, true_class, valid = class_log_probs(logits, target)
    probs = log_probs.exp()
    del log_probs  # as in tversky_loss
    probs = probs * valid[:, None]
    prob_of_truth = probs.gather(1, true_class[:, None])[:, 0]
    weight = weigh_pixels(true_class, valid, class_weight, None, probs.dtype)  # (B, H, W)
    if class_weight is not None:
        probs = probs * class_weight.to(probs)[:, None, None]
    overlap = (prob_of_truth * weight).sum((1, 2))  # (B,)
    union = probs.sum((1, 2, 3)) + weight.sum((1, 2)) - overlap
    counted = valid.flatten(1).any(1)
    iou = overlap / union.clamp(min=1e-12)
    return torch.where(counted.any(), weighted_mean(iou, counted.to(iou)), 1)


def soft_iou_loss(logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None = None) -> torch.Tensor:
    """Compute 1 - M, M the soft IoU; arguments and source as mean_soft_iou. Returns () float32."""
    return 1 - mean_soft_iou(logits, target, class_weight)


def log_iou_loss(logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None = None) -> torch.Tensor:
    """Compute -log M, M the soft IoU; arguments and source as mean_soft_iou. Returns () float32."""
    return -mean_soft_iou(logits, target, class_weight).clamp(min=1e-30).log()


def tversky_loss(
    logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None = None, alpha: float = 0.3
) -> torch.Tensor:
    """Compute the Tversky loss: the mean over classes of 1 - TP / (TP + alpha FP + (1 - alpha) FN), soft counts.

    Counts are sums over all pixels of the batch. A class that no pixel of the batch belongs to is left out of the
    mean: what is wrongly given to it is a false negative of another class.

    Args:
        logits: (B, C, H, W), any float type.
        target: int (B, H, W), 0..C-1 or 255 = ignore.
        class_weight: (C,) of the mean over classes, or None: 1.
        alpha: price of a false positive; 1 - alpha is that of a false negative. 0.5 is the Dice loss.
    Returns:
        () float32 in [0, 1]; 0 where no pixel counts.
    Source: Salehi et al. 2017, where alpha is 0.3.
    """
    log_probs, true_class, valid = class_log_probs(logits, target)
    probs = log_probs.exp()
    del log_probs  # where no gradient needs it: of 12 megapixels and 21 classes it is 1 GB
    probs = probs * valid[:, None]
    truth = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, true_class[:, None], valid[:, None])  # (B, C, H, W)
    true_positive = torch.where(truth, probs, 0).sum((0, 2, 3))  # (C,)
    labelled = torch.zeros(probs.shape[1], dtype=torch.int64, device=probs.device)
    labelled = labelled.scatter_add_(0, true_class.flatten(), valid.flatten().long()).to(probs)  # (C,), exact
    predicted = probs.sum((0, 2, 3))
    errors = alpha * (predicted - true_positive) + (1 - alpha) * (labelled - true_positive)
    loss = 1 - true_positive / (true_positive + errors).clamp(min=1e-12)
    present = (labelled > 0).to(loss)
    return weighted_mean(loss, present if class_weight is None else present * class_weight.to(loss))


def dice_loss(logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the Dice loss: the mean over classes of 1 - 2 sum(p t) / (sum p + sum t), sums over the whole batch.

    Args:
        logits: (B, C, H, W), any float type.
        target: int (B, H, W), 0..C-1 or 255 = ignore.
        class_weight: (C,) of the mean over classes, or None: 1. A class absent from the batch is left out.
    Returns:
        () float32 in [0, 1]; 0 where no pixel counts.
    Source: Milletari et al. 2016 with plain sums, per class, without smoothing.
    """
    return tversky_loss(logits, target, class_weight, 0.5)  # 2 TP / (2 TP + FP + FN) is the same fraction


# ---------------------------------------------------------------------------------------------------------------------
# weights of classes and of pixels


def balanced_class_weights(class_pixels: np.ndarray) -> np.ndarray:
    """Compute class weights that give every class the same total weight, and the average pixel the weight 1.

    Args:
        class_pixels: (C,), the number of pixels of each class, or their shares.
    Returns:
        float32 (C,): all pixels / (number of classes present x pixels of the class); 1 for a class without pixels.
    Raises:
        ValueError: no class has a pixel.
    """
    class_pixels = np.asarray(class_pixels, np.float64)
    present = class_pixels > 0
    if not present.any():
        raise ValueError("class weights from the scan need labelled pixels, and no class has any")
    even_share = class_pixels.sum() / present.sum()
    return np.where(present, even_share / np.where(present, class_pixels, 1), 1).astype(np.float32)


def cell_boxes(instances: np.ndarray) -> list[tuple[int, int, int, int, int]]:
    """List the tight box of each id but 0: int (H, W) -> (left, top, right, bottom, id), px, inclusive."""
    ys, xs = np.nonzero(instances)
    ids, cells = np.unique(instances[ys, xs], return_inverse=True)
    first = np.full((2, len(ids)), max(instances.shape))
    last = np.zeros((2, len(ids)), int)
    for axis, places in enumerate((xs, ys)):
        np.minimum.at(first[axis], cells, places)
        np.maximum.at(last[axis], cells, places)
    return [(*map(int, (*first[:, i], *last[:, i])), int(ids[i])) for i in range(len(ids))]


def border_weight_map(instances: np.ndarray, w0: float = 10.0, sigma: float = 5.0) -> np.ndarray:
    """Compute what the U-Net paper adds to the classes' weights in the narrow gaps between cells.

    w0 exp(-(d1 + d2)^2 / (2 sigma^2)) on the background, d1 and d2 the distances to the nearest and to the second
    nearest cell; 0 inside cells. Cells that touch have no gap: leave a pixel of background between them.

    Args:
        instances: int (H, W), ids of the cells, 0 is background. For a binary mask, its connected components.
        w0: the greatest weight that is added.
        sigma: width of the gaps that count, pixels.
    Returns:
        float32 (H, W), within 1e-6 w0 of the formula.
    Source: Ronneberger et al. 2015, equation 2, with their w0 and sigma; nothing is added inside cells, as in the
        authors' own tools.
    """
    reach = math.ceil(sigma * math.sqrt(2 * math.log(1e7))) + 1  # px; farther away the weight is below 1e-7 w0
    nearest, second = np.full((2, *instances.shape), np.inf, np.float32)
    for left, top, right, bottom, cell_id in cell_boxes(instances):
        window = np.s_[max(top - reach, 0) : bottom + reach + 1, max(left - reach, 0) : right + reach + 1]
        outside = (instances[window] != cell_id).astype(np.uint8)
        distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        distance = np.sqrt(np.rint(np.square(distance)))  # OpenCV 5 rounds alike only where memory is aligned alike
        np.minimum(second[window], np.maximum(nearest[window], distance), out=second[window])
        np.minimum(nearest[window], distance, out=nearest[window])
    gap = np.square(nearest + second)  # inf with fewer than two cells near
    return np.where(instances == 0, w0 * np.exp(-gap / (2 * sigma**2)), 0).astype(np.float32)
