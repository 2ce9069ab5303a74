"""Metrics of masks against pycocotools, of class maps against naive loops and MONAI."""

from collections import Counter

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
import torch.nn.functional as F
from monai.metrics import compute_dice, compute_iou

from utils.sam2.metrics import mask_iou
from utils.segmentation.metrics import (
    RAND_THRESHOLDS,
    confusion_matrix,
    rand_score,
    rand_scores,
    segmentation_metrics,
    soft_iou,
)


def test_iou_is_pycocotools():
    rng = np.random.default_rng(0)
    masks = rng.random((6, 30, 41)) < rng.uniform(0.05, 0.9, (6, 1, 1))
    encoded = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    expected = coco_mask.iou(encoded, encoded, [False] * 6)  # every pair
    tensor = torch.from_numpy(masks)
    iou = mask_iou(tensor[:, None], tensor[None])
    assert iou.shape == (6, 6) and iou.dtype == torch.float32
    np.testing.assert_allclose(iou.numpy(), expected, atol=1e-6)


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


# ---------------------------------------------------------------------------------------------------------------------
# class maps

SCALARS = ("pixel_accuracy", "mean_iou", "weighted_iou", "dice")
PER_CLASS = ("class_iou", "class_dice", "class_precision", "class_recall")


class OnMps(torch.Tensor):
    """A tensor that says it is on mps, which has no float64."""

    device = property(lambda self: torch.device("mps"))

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def to(self, dtype):
        return self.double() if dtype == torch.float64 else super().to(dtype)


def class_maps(seed: int = 0, num_images: int = 24, num_classes: int = 5, ignored: float = 0.1):
    """Draw predictions (N, H, W) that are often right and targets; class 3 occurs in image 5 alone."""
    rng = np.random.default_rng(seed)
    target = rng.choice(num_classes, (num_images, 13, 9), p=[0.5, 0.3, 0.15, 0.0, 0.05])
    target[5, 2:4, 2:5] = 3
    pred_classes = np.where(rng.random(target.shape) < 0.7, target, rng.integers(0, num_classes, target.shape))
    target[rng.random(target.shape) < ignored] = 255
    return torch.from_numpy(pred_classes), torch.from_numpy(target)


def naive_metrics(pred_classes, target, num_classes: int) -> dict:
    """Compute everything from sets of pixels, class by class."""
    valid = target != 255
    pairs = list(zip(pred_classes[valid].tolist(), target[valid].tolist(), strict=True))
    result = {name: [] for name in PER_CLASS} | {"absent": []}
    class_share = []
    for c in range(num_classes):
        truth = {i for i, (_, true) in enumerate(pairs) if true == c}
        predicted = {i for i, (pred_class, _) in enumerate(pairs) if pred_class == c}
        both = len(truth & predicted)
        class_share.append(len(truth) / len(pairs))
        if not truth:
            result["absent"].append(c)
            for name in PER_CLASS:
                result[name].append(float("nan"))
            continue
        result["class_iou"].append(both / len(truth | predicted))
        result["class_dice"].append(2 * both / (len(truth) + len(predicted)))
        result["class_precision"].append(both / len(predicted) if predicted else 0.0)
        result["class_recall"].append(both / len(truth))
    present = [c for c in range(num_classes) if c not in result["absent"]]
    result["pixel_accuracy"] = sum(predicted == true for predicted, true in pairs) / len(pairs)
    result["mean_iou"] = sum(result["class_iou"][c] for c in present) / len(present)
    result["dice"] = sum(result["class_dice"][c] for c in present) / len(present)
    result["weighted_iou"] = sum(class_share[c] * result["class_iou"][c] for c in present)
    return result


@pytest.mark.parametrize("seed", [0, 1])
def test_confusion_matrix_and_its_metrics_are_those_of_naive_loops(seed):
    pred_classes, target = class_maps(seed)
    matrix = confusion_matrix(pred_classes, target, 5)
    counts = Counter(zip(target.flatten().tolist(), pred_classes.flatten().tolist(), strict=True))
    assert matrix.dtype == torch.int64 and matrix.sum() == (target != 255).sum()
    assert matrix.tolist() == [[counts[true, predicted] for predicted in range(5)] for true in range(5)]
    metrics, expected = segmentation_metrics(matrix), naive_metrics(pred_classes, target, 5)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-12, err_msg=name)
    assert all(type(metrics[name]) is float for name in SCALARS)
    assert segmentation_metrics(matrix.numpy())["mean_iou"] == metrics["mean_iou"]


def test_iou_and_dice_of_classes_are_monai_s():
    pred_classes, target = class_maps(2)
    valid = target != 255
    one_hot = [F.one_hot(classes[valid], 5).T[None, :, :, None] for classes in (pred_classes, target)]  # (1, C, N, 1)
    metrics = segmentation_metrics(confusion_matrix(pred_classes, target, 5))
    np.testing.assert_allclose(metrics["class_iou"], compute_iou(*one_hot)[0], rtol=1e-6)
    np.testing.assert_allclose(metrics["class_dice"], compute_dice(*one_hot)[0], rtol=1e-6)


def metrics_in_batches(pred_classes, target, batch_size: int) -> dict:
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    for i in range(0, len(target), batch_size):
        matrix += confusion_matrix(pred_classes[i : i + batch_size], target[i : i + batch_size], 5)
    return segmentation_metrics(matrix)


def test_metrics_are_the_same_for_every_batch_size_and_order():
    pred_classes, target = class_maps(3)
    whole = metrics_in_batches(pred_classes, target, 24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for batch_size in (1, 3, 8, 7):
        for maps in ((pred_classes, target), (pred_classes[order], target[order])):
            other = metrics_in_batches(*maps, batch_size)
            assert all(np.array_equal(other[name], whole[name], equal_nan=True) for name in whole)  # bit for bit


def test_absent_classes_are_named_and_left_out():
    target = torch.tensor([[0, 0, 0, 0, 2, 2, 255, 255]])
    pred_classes = torch.tensor([[0, 0, 0, 1, 2, 0, 4, 4]])  # class 1 is predicted but absent; 3 and 4 are nowhere
    metrics = segmentation_metrics(confusion_matrix(pred_classes, target, 5))
    assert metrics["absent"] == [1, 3, 4]
    np.testing.assert_allclose(metrics["class_iou"], [3 / 5, np.nan, 1 / 2, np.nan, np.nan])
    np.testing.assert_allclose(metrics["class_precision"], [3 / 4, np.nan, 1, np.nan, np.nan])
    np.testing.assert_allclose(metrics["class_recall"], [3 / 4, np.nan, 1 / 2, np.nan, np.nan])
    assert metrics["mean_iou"] == pytest.approx((3 / 5 + 1 / 2) / 2)
    assert metrics["dice"] == pytest.approx((6 / 8 + 2 / 3) / 2)
    assert metrics["weighted_iou"] == pytest.approx(4 / 6 * 3 / 5 + 2 / 6 * 1 / 2)
    assert metrics["pixel_accuracy"] == pytest.approx(4 / 6)
    # the wrong pixel of class 1 is not forgiven: it lowers the IoU of the class that it was taken from
    assert metrics["class_iou"][0] == pytest.approx(3 / (4 + 1))
    assert all(np.isfinite(metrics[name]) for name in SCALARS)


def test_a_class_that_is_never_predicted_has_precision_0():
    metrics = segmentation_metrics(np.array([[10, 0], [5, 0]]))
    assert metrics["class_precision"].tolist() == [10 / 15, 0] and metrics["class_iou"].tolist() == [10 / 15, 0]
    assert metrics["mean_iou"] == pytest.approx(1 / 3) and metrics["absent"] == []


def test_a_set_without_a_counted_pixel_is_an_error():
    nothing = torch.full((2, 4, 4), 255)
    matrix = confusion_matrix(torch.zeros_like(nothing), nothing, 3)
    assert matrix.tolist() == [[0] * 3] * 3
    with pytest.raises(ValueError, match="no pixel of the set counts"):
        segmentation_metrics(matrix)


def test_small_integer_types_and_large_counts():
    pred_classes, target = class_maps(5)
    expected = confusion_matrix(pred_classes, target, 200)
    assert not torch.equal((pred_classes.to(torch.uint8) * 200).long(), pred_classes * 200)  # what would overflow
    assert torch.equal(confusion_matrix(pred_classes.to(torch.uint8), target.to(torch.uint8), 200), expected)
    assert torch.equal(confusion_matrix(pred_classes.to(torch.int16), target.to(torch.int32), 200), expected)
    largest = np.array([[2**40, 1], [0, 3]])  # fp32 counts would lose the 1
    assert segmentation_metrics(largest)["class_recall"][0] == 2**40 / (2**40 + 1) < 1


def test_logits_wrong_shapes_and_unknown_classes_are_errors():
    pred_classes, target = class_maps(6)
    logits = torch.randn(24, 5, 13, 9)
    one_hot = F.one_hot(target.clamp(max=4), 5).movedim(-1, 1)
    for bad in (logits, pred_classes[:, None], pred_classes[:, :-1], one_hot):
        with pytest.raises(ValueError, match="must be equal: class indices, not logits"):
            confusion_matrix(bad, target, 5)
    for bad in (pred_classes.float(), pred_classes > 0):
        with pytest.raises(ValueError, match="dtype of the prediction"):
            confusion_matrix(bad, target, 5)
    with pytest.raises(ValueError, match="dtype of the target"):
        confusion_matrix(pred_classes, target.double(), 5)
    for value in (5, -1):
        with pytest.raises(ValueError, match="the prediction holds class"):
            confusion_matrix(torch.full_like(target, value), target, 5)
    for value in (5, 254, -100):
        with pytest.raises(ValueError, match="the target holds class"):
            confusion_matrix(pred_classes, torch.full_like(target, value), 5)


def series_soft_iou(probs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The soft IoU as the series defines it: one value for each image, smoothing 0.001."""
    truth = torch.stack([(target == c) for c in range(probs.shape[1])], 1)
    overlap = truth * probs
    union = truth + probs - overlap
    return (overlap.sum((1, 2, 3)) + 0.001) / (union.sum((1, 2, 3)) + 0.001)


def test_soft_iou_is_the_series_and_the_same_for_every_batch_size():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(24, 3, 16, 12, generator=generator).mul(2).softmax(1)
    target = torch.randint(3, (24, 16, 12), generator=generator)
    ious = soft_iou(probs, target)
    assert ious.shape == (24,) and ious.dtype == torch.float64
    torch.testing.assert_close(ious, series_soft_iou(probs.double(), target), rtol=1e-4, atol=0)  # but for smoothing
    for size in (1, 3, 8, 7):
        batches = [soft_iou(probs[i : i + size], target[i : i + size]) for i in range(0, 24, size)]
        torch.testing.assert_close(torch.cat(batches), ious, rtol=1e-13, atol=0)


def test_soft_iou_leaves_ignored_pixels_out():
    generator = torch.Generator().manual_seed(1)
    probs = torch.randn(3, 4, 8, 8, generator=generator).softmax(1)
    target = torch.randint(4, (3, 8, 8), generator=generator)
    inside = soft_iou(probs[:, :, :5], target[:, :5])
    target[:, 5:] = 255
    torch.testing.assert_close(soft_iou(probs, target), inside)
    torch.testing.assert_close(soft_iou(probs, target.to(torch.uint8)), inside)
    target[1] = 255
    assert soft_iou(probs, target).isnan().tolist() == [False, True, False]
    sure = F.one_hot(target.clamp(max=3), 4).movedim(-1, 1).float()
    assert soft_iou(sure, target).nan_to_num(9).tolist() == [1, 9, 1]


def test_soft_iou_on_mps_is_computed_in_fp32():
    """`.double()` there ended every run of train_unet.py at step 0."""
    torch.manual_seed(0)
    probs, target = torch.randn(2, 3, 40, 50).softmax(1), torch.randint(0, 3, (2, 40, 50))
    on_mps = soft_iou(probs.as_subclass(OnMps), target)
    assert on_mps.dtype == torch.float32
    torch.testing.assert_close(torch.tensor(on_mps.tolist()), soft_iou(probs, target).float(), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# V_rand after thinning


def test_rand_score_is_that_of_a_contingency_table_written_out():
    truth = np.array([[1, 1, 1, 1, 0, 2, 2, 2, 2, 2]])
    objects = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0]])
    # of the 9 pixels that count: object 1 has 3 in 1 and 1 in 2; object 2 has 2 in 2, 2 in 3, and one alone
    both = 3**2 + 1**2 + 2**2 + 2**2 + 1
    expected = 2 * both / ((4**2 + 5**2) + (3**2 + 3**2 + 2**2 + 1))
    assert rand_score(truth, objects) == expected
    assert rand_score(truth, truth) == 1
    assert np.isnan(rand_score(np.zeros_like(truth), objects))


@pytest.mark.parametrize("seed", range(3))
def test_rand_score_is_the_f_score_of_all_pairs_of_pixels(seed):
    rng = np.random.default_rng(seed)
    truth, objects = rng.integers(0, 5, (12, 20)), rng.integers(0, 7, (12, 20))
    counted, theirs = truth[truth > 0], objects[truth > 0].copy()
    theirs[theirs == 0] = -np.arange(1, (theirs == 0).sum() + 1)  # objects of one pixel
    in_truth, predicted = (numbers[:, None] == numbers[None] for numbers in (counted, theirs))
    precision = (in_truth & predicted).sum() / predicted.sum()
    recall = (in_truth & predicted).sum() / in_truth.sum()
    assert rand_score(truth, objects) == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-12)


def test_the_width_of_a_boundary_does_not_count_but_a_gap_in_it_does():
    class_map = np.ones((40, 61), np.uint8)
    class_map[:, 30] = 0  # the boundary: two cells of 30 x 40 px
    wide, open_ = np.full((2, 40, 61), 0.05)
    wide[:, 24:37] = 0.95
    open_[:, 24:37], open_[20, :] = 0.95, 0.05
    assert rand_scores(wide, class_map, 0).tolist() == [1] * len(RAND_THRESHOLDS)
    merged = 2 * (1200**2 + 1200**2) / (1200**2 + 1200**2 + 2400**2)  # one object, and no line is left
    assert rand_scores(open_, class_map, 0) == pytest.approx([merged] * len(RAND_THRESHOLDS))
    wide[20, 24:37] = 0.45  # closed where less than this is boundary
    assert rand_scores(wide, class_map, 0).round(3).tolist() == [1] * 4 + [round(merged, 3)] * 5
    class_map[:, :30] = 255  # ignored: one cell is left
    assert rand_scores(open_, class_map, 0).tolist() == [1] * len(RAND_THRESHOLDS)
    assert np.isnan(rand_scores(open_, np.zeros_like(class_map), 0)).all()


def test_a_picture_that_is_all_boundary_has_pixels_for_objects():
    class_map = np.ones((4, 5), np.uint8)
    scores = rand_scores(np.ones((4, 5)), class_map, 0)
    assert scores == pytest.approx([2 * 20 / (20**2 + 20)] * len(RAND_THRESHOLDS))
