"""Metrics of masks."""

import torch


def mask_iou(pred_masks: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Compute the intersection over union of binary masks.

    Args:
        pred_masks: bool (..., H, W).
        masks: bool (..., H, W), broadcast against `pred_masks`.
    Returns:
        (...) float32 in [0, 1]; two empty masks agree: 1.
    """
    intersection = (pred_masks & masks).sum((-2, -1)).float()
    union = (pred_masks | masks).sum((-2, -1)).float()
    return torch.where(union > 0, intersection / union.clamp(min=1), torch.ones_like(union))
