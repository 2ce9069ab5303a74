"""utils/mask_metrics.py: IoU against pycocotools and a naive count."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch

from utils.mask_metrics import mask_iou


def test_iou_is_pycocotools():
    rng = np.random.default_rng(0)
    masks = rng.random((6, 30, 41)) < rng.uniform(0.05, 0.9, (6, 1, 1))
    encoded = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    expected = coco_mask.iou(encoded, encoded, [False] * 6)  # every pair
    tensor = torch.from_numpy(masks)
    iou = mask_iou(tensor[:, None], tensor[None])
    assert iou.shape == (6, 6) and iou.dtype == torch.float32
    np.testing.assert_allclose(iou.numpy(), expected, atol=1e-6)


def test_three_masks_of_an_object_against_its_truth():
    truth = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    truth[:, :, :2] = True  # 8 pixels
    pred_masks = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    pred_masks[:, 0, :2] = True
    pred_masks[:, 1, 0] = True
    pred_masks[1, 2, 1:3] = True
    assert mask_iou(pred_masks, truth).tolist() == [[1, 0.5, 0], pytest.approx([1, 0.5, 1 / 3])]


def test_empty_masks():
    empty, full = torch.zeros(3, 5, 5, dtype=torch.bool), torch.ones(3, 5, 5, dtype=torch.bool)
    assert mask_iou(empty, empty).tolist() == [1, 1, 1]
    assert mask_iou(empty, full).tolist() == mask_iou(full, empty).tolist() == [0, 0, 0]
    assert mask_iou(empty[:0], full[:0]).shape == (0,)


def test_counts_of_large_masks_are_exact():
    masks = torch.ones(1, 3000, 3000, dtype=torch.bool)  # 9 million pixels
    pred_masks = masks.clone()
    pred_masks[0, 0, 0] = False
    assert mask_iou(masks, masks).item() == 1
    assert mask_iou(pred_masks, masks).item() == np.float32(1 - 1 / 9_000_000) < 1
