"""Losses of class maps: values and gradients against torchvision, MONAI, naive loops, closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss, FocalLoss, TverskyLoss
from scipy.ndimage import distance_transform_edt

from utils.segmentation.losses import (
    balanced_class_weights,
    border_weight_map,
    cross_entropy_loss,
    dice_loss,
    focal_loss,
    log_iou_loss,
    soft_iou_loss,
    tversky_loss,
)

# losses of class maps. MONAI is the independent library; it knows no ignored pixels, so it gets the others alone.

CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0])
CLASS_LOSSES = {
    "cross_entropy": cross_entropy_loss,
    "soft_iou": soft_iou_loss,
    "log_iou": log_iou_loss,
    "dice": dice_loss,
    "tversky": tversky_loss,
    "tversky_0": lambda logits, target, **weight: tversky_loss(logits, target, alpha=0.0, **weight),
    "tversky_1": lambda logits, target, **weight: tversky_loss(logits, target, alpha=1.0, **weight),
    "focal": focal_loss,
    "focal_0.5": lambda logits, target, **weight: focal_loss(logits, target, gamma=0.5, **weight),
    "focal_0": lambda logits, target, **weight: focal_loss(logits, target, gamma=0.0, **weight),
}


def class_example(seed: int = 0, shape=(3, 4, 9, 11), ignored: float = 0.15) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw float64 logits (B, C, H, W) and a target (B, H, W) with all classes, some pixels ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return logits, target


def counted_pixels(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the pixels that are not ignored as one long image: (1, C, N) and (1, 1, N)."""
    valid = target != 255
    return logits.movedim(1, -1)[valid].T[None], target[valid][None, None]


MONAI = {"softmax": True, "to_onehot_y": True, "smooth_nr": 0, "smooth_dr": 0, "batch": True}


def monai_dice(logits: torch.Tensor, target: torch.Tensor, class_weight=None) -> torch.Tensor:
    """MONAI's Dice loss; it multiplies with the class weights without dividing by their sum."""
    loss = DiceLoss(**MONAI, weight=class_weight)
    rescale = 1 if class_weight is None else len(class_weight) / class_weight.sum()
    return loss(*counted_pixels(logits, target)) * rescale


def monai_tversky(logits: torch.Tensor, target: torch.Tensor, alpha: float) -> torch.Tensor:
    return TverskyLoss(**MONAI, alpha=alpha, beta=1 - alpha)(*counted_pixels(logits, target))


def monai_soft_iou(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """MONAI's Jaccard of each image, its pixels and classes as one long axis: M, the mean over images."""
    loss = DiceLoss(jaccard=True, smooth_nr=0, smooth_dr=0)
    values = []
    for one_logits, one_target in zip(logits, target, strict=True):
        pixels, classes = counted_pixels(one_logits[None], one_target[None])
        truth = F.one_hot(classes[0, 0], pixels.shape[1]).T.to(pixels)
        values.append(1 - loss(pixels.softmax(1).reshape(1, 1, -1), truth.reshape(1, 1, -1)))
    return torch.stack(values).mean()


def monai_focal(logits: torch.Tensor, target: torch.Tensor, gamma: float, class_weight=None) -> torch.Tensor:
    """MONAI's focal loss of each pixel and class, summed and divided by the weight of the pixels."""
    pixels, classes = counted_pixels(logits, target)
    loss = FocalLoss(use_softmax=True, to_onehot_y=True, gamma=gamma, weight=class_weight, reduction="none")
    total_weight = classes.numel() if class_weight is None else class_weight[classes].sum()
    return loss(pixels, classes).double().sum() / total_weight


def torch_cross_entropy(logits: torch.Tensor, target: torch.Tensor, class_weight=None) -> torch.Tensor:
    return F.cross_entropy(logits, target, class_weight, ignore_index=255)


ORACLES = {
    "cross_entropy": (cross_entropy_loss, torch_cross_entropy),
    "weighted cross_entropy": (
        lambda *pair: cross_entropy_loss(*pair, CLASS_WEIGHT),
        lambda *pair: torch_cross_entropy(*pair, CLASS_WEIGHT.double()),
    ),
    "soft_iou": (soft_iou_loss, lambda *pair: 1 - monai_soft_iou(*pair)),
    "log_iou": (log_iou_loss, lambda *pair: -monai_soft_iou(*pair).log()),
    "dice": (dice_loss, monai_dice),
    "weighted dice": (
        lambda *pair: dice_loss(*pair, CLASS_WEIGHT),
        lambda *pair: monai_dice(*pair, CLASS_WEIGHT.double()),
    ),
    "tversky 0.3": (tversky_loss, lambda *pair: monai_tversky(*pair, 0.3)),
    "tversky 0.8": (lambda *pair: tversky_loss(*pair, alpha=0.8), lambda *pair: monai_tversky(*pair, 0.8)),
    "focal 0": (lambda *pair: focal_loss(*pair, gamma=0.0), torch_cross_entropy),
    "focal": (focal_loss, lambda *pair: monai_focal(*pair, 2.0)),
    "weighted focal 1.5": (
        lambda *pair: focal_loss(*pair, CLASS_WEIGHT, gamma=1.5),
        lambda *pair: monai_focal(*pair, 1.5, CLASS_WEIGHT.double()),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_class_losses_and_their_gradients_are_the_library_s(name, ignored):
    ours, theirs = ORACLES[name]
    logits, target = class_example(1, ignored=ignored)
    variables = [logits.clone().requires_grad_() for _ in range(2)]
    values = [loss(variable, target) for loss, variable in zip((ours, theirs), variables, strict=True)]
    assert values[0].shape == () and values[0].dtype == torch.float64  # as gradcheck needs
    torch.testing.assert_close(values[0], values[1].reshape(()), rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(value, variable)[0] for value, variable in zip(values, variables, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)
    single = ours(logits.float(), target)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), values[0].detach(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["plain", "weighted"])
def test_class_losses_pass_gradcheck(name, class_weight):
    logits, target = class_example(2, (2, 4, 3, 4))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: CLASS_LOSSES[name](x, target, class_weight=class_weight), logits)


def naive_class_loss(name: str, logits, target, class_weight, pixel_weight) -> float:
    """Compute cross-entropy, focal loss or soft IoU loss with weights pixel by pixel, in Python."""
    num_classes = logits.shape[1]
    total, total_weight, image_ious = 0.0, 0.0, []
    for b in range(len(target)):
        overlap = union = 0.0
        for y, x in np.ndindex(*target.shape[1:]):
            true_class = int(target[b, y, x])
            if true_class == 255:
                continue
            powers = [math.exp(float(logit)) for logit in logits[b, :, y, x]]
            probs = [power / sum(powers) for power in powers]
            weight = float(class_weight[true_class] if pixel_weight is None else pixel_weight[b, y, x])
            focus = (1 - probs[true_class]) ** 2 if name == "focal" else 1
            total -= weight * focus * math.log(probs[true_class])
            total_weight += weight
            overlap += float(class_weight[true_class]) * probs[true_class]
            for c in range(num_classes):
                truth = c == true_class
                union += float(class_weight[c]) * (probs[c] + truth - probs[c] * truth)
        image_ious.append(overlap / union)
    return 1 - sum(image_ious) / len(image_ious) if name == "soft_iou" else total / total_weight


@pytest.mark.parametrize(
    "name, has_pixel_weight",
    [("cross_entropy", False), ("cross_entropy", True), ("focal", False), ("focal", True), ("soft_iou", False)],
)
def test_weighted_class_losses_are_those_of_a_naive_loop(name, has_pixel_weight):
    """Weights of pixels take the place of those of classes."""
    logits, target = class_example(3, (2, 4, 5, 6))
    weights = {"class_weight": CLASS_WEIGHT.double()}
    if has_pixel_weight:
        weights["pixel_weight"] = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)).double() ** 2
    expected = naive_class_loss(name, logits, target, weights["class_weight"], weights.get("pixel_weight"))
    assert CLASS_LOSSES[name](logits, target, **weights).item() == pytest.approx(expected, rel=1e-9)
    assert CLASS_LOSSES[name](logits, target).item() != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_ignored_pixels_have_no_effect_and_no_gradient(name):
    logits, target = class_example(4, (2, 4, 8, 6), ignored=0)
    inside = CLASS_LOSSES[name](logits[:, :, :5].contiguous(), target[:, :5].contiguous()).item()
    target[:, 5:] = 255
    for garbage in (0.0, 1e4, math.nan, math.inf, -math.inf):
        variable = logits.clone()
        variable[:, :, 5:] = garbage
        variable.requires_grad_()
        pixel_weight = torch.ones(target.shape)
        pixel_weight[:, 5:] = math.nan
        weight = {"pixel_weight": pixel_weight} if name.startswith(("cross", "focal")) else {}
        loss = CLASS_LOSSES[name](variable, target, **weight)
        assert loss.item() == pytest.approx(inside, rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, variable)
        assert (gradient[:, :, 5:] == 0).all()
        assert torch.isfinite(gradient).all() and (gradient[:, :, :5] != 0).any()
    assert CLASS_LOSSES[name](logits, target.to(torch.uint8)).item() == pytest.approx(inside, rel=1e-12)  # as stored


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_an_image_or_a_batch_that_is_ignored_altogether(name):
    logits, target = class_example(5, (2, 4, 5, 5), ignored=0)
    alone = CLASS_LOSSES[name](logits[:1], target[:1]).item()
    target[1] = 255
    assert CLASS_LOSSES[name](logits, target).item() == pytest.approx(alone, rel=1e-12)
    logits.requires_grad_()
    loss = CLASS_LOSSES[name](logits, torch.full_like(target, 255))
    assert loss.item() == 0
    loss.backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [65504.0, -65504.0, 100.0, -100.0, 20.0, 0.0])
def test_extreme_logits_of_class_maps_give_finite_values_and_gradients(name, dtype, level):
    logits = torch.zeros(2, 3, 8, 8, dtype=dtype)
    logits[:, 0] = level  # everything is surely, or surely not, class 0
    logits[:, 1] = -level
    for classes in ([0], [1], [0, 1], [0, 1, 2, 255]):
        target = torch.tensor(classes).repeat(128 // len(classes)).view(2, 8, 8)
        variable = logits.clone().requires_grad_()
        loss = CLASS_LOSSES[name](variable, target)
        assert loss.dtype == torch.float32 and torch.isfinite(loss) and loss >= 0
        loss.backward()
        assert torch.isfinite(variable.grad).all()


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_class_losses_are_computed_in_fp32_also_under_autocast(name):
    logits, target = class_example(6, (1, 3, 300, 300))  # more pixels than fp16 can count
    for dtype in (torch.bfloat16, torch.float16):
        rounded = logits.to(dtype)
        expected = CLASS_LOSSES[name](rounded.float(), target)
        assert torch.equal(CLASS_LOSSES[name](rounded, target), expected)
        torch.testing.assert_close(expected.double(), CLASS_LOSSES[name](rounded.double(), target), rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = CLASS_LOSSES[name](logits.float(), target)
    torch.testing.assert_close(under_autocast, CLASS_LOSSES[name](logits.float(), target), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_perfect_and_surely_wrong_class_maps(name):
    _, target = class_example(7, (2, 4, 6, 6), ignored=0)
    sure = 200 * F.one_hot(target, 4).movedim(-1, 1).float()
    wrong = 200 * F.one_hot((target + 1) % 4, 4).movedim(-1, 1).float()
    assert CLASS_LOSSES[name](sure, target).item() == pytest.approx(0, abs=1e-6)
    worst = {"cross": 200, "focal": 200, "log_i": 30 * math.log(10)}.get(name[:5], 1)  # log M is cut at 1e-30
    assert CLASS_LOSSES[name](wrong, target).item() == pytest.approx(worst, rel=1e-5)


def test_log_iou_pulls_where_soft_iou_has_gone_flat():
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    slopes = {}
    for loss in (soft_iou_loss, log_iou_loss):
        logits = torch.zeros(1, 2, 4, 4)
        logits[:, 1] = 40  # all pixels surely wrong
        logits.requires_grad_()
        loss(logits, target).backward()
        slopes[loss] = logits.grad.abs().sum().item()
    assert slopes[soft_iou_loss] < 1e-15 and slopes[log_iou_loss] == pytest.approx(2, rel=1e-4)


def test_wrong_shapes_and_classes_are_errors():
    logits, target = class_example(12)
    for bad in (target[:, None], target[:, :-1], target[:1], F.one_hot(target.clamp(max=3), 4)):
        for loss in CLASS_LOSSES.values():
            with pytest.raises(ValueError, match=r"must be \(B, C, H, W\) and \(B, H, W\)"):
                loss(logits, bad)
    for value in (4, 254, -1, -100):  # a class that the model lacks; torch's own default of ignore_index
        bad = target.clone()
        bad[0, 0, 0] = value
        for loss in CLASS_LOSSES.values():
            with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
                loss(logits, bad)


def test_an_absent_class_does_not_make_dice_look_better():
    """An absent class that counts as Dice 1 hides how bad the others are; MONAI's counts as 0."""
    logits, target = class_example(13, (1, 4, 8, 8), ignored=0)
    target = target.clamp(max=1)  # classes 2 and 3 are absent
    probs, truth = logits.softmax(1), F.one_hot(target, 4).movedim(-1, 1)
    dice = 2 * (probs * truth).sum((0, 2, 3)) / (probs.sum((0, 2, 3)) + truth.sum((0, 2, 3)))
    assert dice_loss(logits, target).item() == pytest.approx(1 - dice[:2].mean().item(), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# weights of classes and of pixels


def test_balanced_class_weights():
    target = torch.tensor([0] * 70 + [1] * 25 + [3] * 5)
    weights = balanced_class_weights(np.bincount(target, minlength=5))
    assert weights.dtype == np.float32 and weights[[2, 4]].tolist() == [1, 1]  # without pixels
    totals = [weights[c] * (target == c).sum().item() for c in (0, 1, 3)]
    assert totals == pytest.approx([100 / 3] * 3, rel=1e-6)  # each class the same, the average pixel 1
    np.testing.assert_allclose(weights, balanced_class_weights([0.70, 0.25, 0, 0.05, 0]), rtol=1e-6)  # shares
    with pytest.raises(ValueError, match="no class has any"):
        balanced_class_weights([0, 0])


def naive_border_weight_map(instances: np.ndarray, w0: float, sigma: float) -> np.ndarray:
    """Compute the paper's equation 2 with the exact distance of every pixel to every cell."""
    cells = [cell_id for cell_id in np.unique(instances) if cell_id != 0]
    distances = [distance_transform_edt(instances != cell_id) for cell_id in cells]
    d1, d2 = np.sort(distances, axis=0)[:2]
    return (instances == 0) * w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))


def draw_cells(seed: int, height: int, width: int, num_cells: int) -> np.ndarray:
    """Draw cells as rotated ellipses, the later ones cut by the earlier ones; ids are not consecutive."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:height, :width]
    instances = np.zeros((height, width), np.int32)
    for i in range(num_cells):
        (y, x), (a, b), angle = rng.random(2) * (height, width), rng.uniform(2, 14, 2), rng.random() * np.pi
        along = (xs - x) * np.cos(angle) + (ys - y) * np.sin(angle)
        across = (ys - y) * np.cos(angle) - (xs - x) * np.sin(angle)
        instances[((along / a) ** 2 + (across / b) ** 2 < 1) & (instances == 0)] = 7 * i + 3
    return instances


@pytest.mark.parametrize("seed, size, num_cells", [(0, (90, 140), 25), (1, (128, 128), 12), (2, (200, 160), 40)])
@pytest.mark.parametrize("w0, sigma", [(10, 5), (50, 2), (3, 12)])
def test_border_weight_map_is_the_paper_s_equation(seed, size, num_cells, w0, sigma):
    instances = draw_cells(seed, *size, num_cells)
    weights = border_weight_map(instances, w0, sigma)
    assert weights.dtype == np.float32 and weights.shape == size
    expected = naive_border_weight_map(instances, w0, sigma)
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-6 * w0)
    assert expected.max() > 0.1 * w0  # there is something to compare
    assert {border_weight_map(instances, w0, sigma).tobytes() for _ in range(12)} == {weights.tobytes()}


def test_border_weights_without_two_cells_and_at_the_smallest_gap():
    touching = np.repeat([[1, 1, 2, 2]], 4, 0)
    for instances in (np.zeros((9, 9), int), np.eye(9, dtype=int), np.full((9, 9), 4), touching):
        assert (border_weight_map(instances) == 0).all()
    one_pixel_apart = np.repeat([[1, 1, 0, 2, 2]], 4, 0).astype(np.uint8)
    np.testing.assert_allclose(border_weight_map(one_pixel_apart)[:, 2], 10 * math.exp(-4 / 50), rtol=1e-6)
