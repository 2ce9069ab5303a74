"""Metrics of masks."""

import math

import numpy as np
import torch


def mask_iou(pred_masks: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Compute the intersection over union of binary masks.

    Args:
        pred_masks: bool (..., H, W).
        masks: bool (..., H, W), broadcast against `pred_masks`.
    Returns:
        (...) float32 in [0, 1]; two empty masks agree: 1.
    """
    intersection = _count_pixels(pred_masks & masks)
    union = (_count_pixels(pred_masks) + _count_pixels(masks) - intersection).float()
    return torch.where(union > 0, intersection.float() / union.clamp(min=1), torch.ones_like(union))


def _count_pixels(masks: torch.Tensor) -> torch.Tensor:
    """Count the pixels of masks: bool (..., H, W) -> int64 (...)."""
    if masks.device.type != "cpu":
        return masks.sum((-2, -1))
    layers = masks.contiguous().numpy().reshape(math.prod(masks.shape[:-2]), *masks.shape[-2:])
    counts = [np.count_nonzero(layer) for layer in layers]  # torch would widen each pixel to 8 bytes first
    return torch.tensor(counts, dtype=torch.int64).reshape(masks.shape[:-2])
