"""Losses of masks, on logits, always computed in fp32.

They take `logits` and `mask` of one shape (..., H, W), a mask's pixels 0 or 1 or the share of them that it covers, and
return (...): the mean over pixels of each mask. Reductions over masks, objects and images belong to the script.
"""

import torch
import torch.nn.functional as F


def focal_loss(logits: torch.Tensor, mask: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0) -> torch.Tensor:
    """Compute the sigmoid focal loss, mean over pixels.

    Args:
        logits: (..., H, W), any float type.
        mask: (..., H, W), 0 or 1.
        alpha: weight of the foreground; 1 - alpha is that of the background.
        gamma: how strongly easy pixels are played down.
    Returns:
        (...) float32.
    Source: Lin et al. 2017, equation 5; alpha and gamma as SAM 2 trains.
    """
    logits, mask = logits.float(), mask.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    probs = logits.sigmoid()
    prob_of_truth = probs * mask + (1 - probs) * (1 - mask)
    alpha_of_truth = alpha * mask + (1 - alpha) * (1 - mask)
    return (alpha_of_truth * (1 - prob_of_truth) ** gamma * cross_entropy).mean((-2, -1))


def dice_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Compute the soft Dice loss with smoothing 1: 1 - (2 sum(p m) + 1) / (sum p + sum m + 1).

    Args:
        logits: (..., H, W), any float type.
        mask: (..., H, W), 0 or 1.
    Returns:
        (...) float32.
    Source: Milletari et al. 2016 with the smoothing of SAM 2's training.
    """
    probs, mask = logits.float().sigmoid(), mask.float()
    overlap = (probs * mask).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (probs.sum((-2, -1)) + mask.sum((-2, -1)) + 1)


def cross_entropy_loss(logits: torch.Tensor, mask: torch.Tensor, foreground_balance: float = 0.0) -> torch.Tensor:
    """Compute the binary cross-entropy on logits, mean over pixels.

    Args:
        logits: (..., H, W), any float type.
        mask: (..., H, W), 0 or 1.
        foreground_balance: 0 weighs every pixel 1; 1 gives foreground and background the same total weight; between,
            pixels of a side that covers the share s weigh (0.5 / s) ** foreground_balance.
    Returns:
        (...) float32.
    """
    logits, mask = torch.broadcast_tensors(logits.float(), mask.float())
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    if foreground_balance > 0:
        num_pixels = mask.shape[-1] * mask.shape[-2]
        share = mask.mean((-2, -1), keepdim=True).clamp(1 / num_pixels, 1 - 1 / num_pixels)  # the foreground's
        cross_entropy = cross_entropy * (0.5 / torch.where(mask > 0.5, share, 1 - share)) ** foreground_balance
    return cross_entropy.mean((-2, -1))


def cover_pixels(masks: torch.Tensor, size: int) -> torch.Tensor:
    """Average masks down to size x size: the share of each pixel that the object covers.

    The zero of logits that learn it, enlarged, is the object's border, to less than one of these pixels. An object that
    covers no pixel by more than half is scaled until it covers one whole: it would be learned as nothing.

    Args:
        masks: (O, H, W), 0 or 1.
        size: side of the result, pixels.
    Returns:
        (O, size, size) float32, 0..1; empty only where the mask was.
    """
    coverage = F.adaptive_avg_pool2d(masks.float()[:, None], size).squeeze(1)
    most = coverage.amax((1, 2), keepdim=True)
    return torch.where((most > 0) & (most <= 0.5), coverage / most.clamp(min=1e-12), coverage)


def shrink_masks(masks: torch.Tensor, size: int) -> torch.Tensor:
    """Average masks down to size x size and cut at 0.5; a mask that would vanish keeps its strongest pixel.

    Args:
        masks: (O, H, W), 0 or 1.
        size: side of the result, pixels.
    Returns:
        (O, size, size) float32, 0 or 1; empty only where the mask was.
    """
    coverage = F.adaptive_avg_pool2d(masks.float()[:, None], size).flatten(1)  # (O, size*size), share of each pixel
    shrunk = (coverage > 0.5).float()
    strongest = F.one_hot(coverage.argmax(1), size * size).float() * (coverage.amax(1, keepdim=True) > 0)
    vanished = shrunk.sum(1, keepdim=True) == 0
    return torch.where(vanished, strongest, shrunk).view(-1, size, size)
