"""Losses of masks: values and gradients against torchvision, MONAI, naive loops, closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from utils.sam2.losses import cover_pixels, cross_entropy_loss, dice_loss, focal_loss, shrink_masks

LOSSES = {
    "focal": focal_loss,
    "dice": dice_loss,
    "cross_entropy": cross_entropy_loss,
    "balanced": lambda logits, mask: cross_entropy_loss(logits, mask, 1.0),
}


def example(seed: int = 0, shape=(2, 3, 5, 7), spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(shape, generator=generator)
    return logits, (torch.rand(shape, generator=generator) < 0.3).float()


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def naive(name: str, logits: torch.Tensor, mask: torch.Tensor) -> float:
    """Compute the loss of one mask pixel by pixel, in Python's double precision."""
    values = [(float(logit), float(truth)) for logit, truth in zip(logits.flatten(), mask.flatten(), strict=True)]
    entropies = [-math.log(sigmoid(logit)) if truth else -math.log(sigmoid(-logit)) for logit, truth in values]
    num_pixels, num_foreground = len(values), sum(truth for _, truth in values)
    if name == "focal":  # Lin et al. 2017, equation 5
        weights = [
            0.25 * (1 - sigmoid(logit)) ** 2 if truth else 0.75 * (1 - sigmoid(-logit)) ** 2 for logit, truth in values
        ]
        return sum(w * e for w, e in zip(weights, entropies, strict=True)) / num_pixels
    if name == "dice":
        overlap = sum(sigmoid(logit) * truth for logit, truth in values)
        return 1 - (2 * overlap + 1) / (sum(sigmoid(logit) for logit, _ in values) + num_foreground + 1)
    if name == "balanced":  # the mean over foreground and the mean over background, half each
        foreground = [e for e, (_, truth) in zip(entropies, values, strict=True) if truth]
        background = [e for e, (_, truth) in zip(entropies, values, strict=True) if not truth]
        return 0.5 * sum(foreground) / len(foreground) + 0.5 * sum(background) / len(background)
    return sum(entropies) / num_pixels


@pytest.mark.parametrize("name", LOSSES)
def test_values_are_those_of_a_naive_loop_for_each_mask(name):
    logits, mask = example()
    loss = LOSSES[name](logits, mask)
    assert loss.shape == (2, 3) and loss.dtype == torch.float32
    for i in range(2):
        for j in range(3):
            assert loss[i, j].item() == pytest.approx(naive(name, logits[i, j], mask[i, j]), rel=1e-5, abs=1e-6)


def test_focal_loss_is_torchvisions_with_its_gradient():
    logits, mask = example(1)
    for alpha, gamma in ((0.25, 2.0), (0.6, 0.0), (0.5, 1.5)):
        ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss = focal_loss(ours, mask, alpha, gamma)
        expected = sigmoid_focal_loss(theirs, mask.double(), alpha, gamma, "none").mean((-2, -1))
        torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
        loss.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(focal_loss(logits, mask), focal_loss(logits, mask, 0.25, 2.0))  # as SAM 2 trains


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    logits, mask = example(2, (1, 4, 4), spread=2.0)
    variable = logits.clone().requires_grad_()
    LOSSES[name](variable, mask).sum().backward()
    for index in np.ndindex(1, 4, 4):
        step = torch.zeros(1, 4, 4, dtype=torch.float64)
        step[index] = 1e-5
        above, below = (naive(name, logits.double() + sign * step, mask) for sign in (1, -1))
        assert variable.grad[index].item() == pytest.approx((above - below) / 2e-5, rel=1e-3, abs=1e-6)


def test_foreground_balance_runs_from_none_to_equal_shares():
    logits, mask = torch.zeros(8, 10), torch.zeros(8, 10)
    mask[:2, :3] = 1  # 6 of 80 pixels
    logits.requires_grad_()
    shares = {}
    for balance in (0.0, 0.5, 1.0):
        (gradient,) = torch.autograd.grad(cross_entropy_loss(logits, mask, balance), logits)
        foreground, background = gradient[mask > 0].abs().sum().item(), gradient[mask == 0].abs().sum().item()
        shares[balance] = foreground / (foreground + background)
    root_ratio = math.sqrt(6 / 74)  # weights (0.5 / s) ** 0.5 on shares s
    assert shares[0.0] == pytest.approx(6 / 80, rel=1e-4)
    assert shares[0.5] == pytest.approx(root_ratio / (1 + root_ratio), rel=1e-4)
    assert shares[1.0] == pytest.approx(0.5, rel=1e-4)
    for whole in (torch.zeros(8, 10), torch.ones(8, 10)):  # one side only: finite, and of the usual size
        loss = cross_entropy_loss(torch.zeros(8, 10), whole, 1.0).item()
        assert loss == pytest.approx(0.5 * math.log(2) * 80 / 79, rel=1e-3)


def test_dice_of_perfect_empty_and_wrong_masks():
    mask = torch.zeros(1, 20, 20)
    mask[:, 5:15, 5:15] = 1
    sure = 200 * (mask - 0.5)
    assert dice_loss(sure, mask).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(-sure, mask).item() == pytest.approx(1 - 1 / 401, abs=1e-5)
    assert dice_loss(torch.full((1, 20, 20), -100.0), torch.zeros(1, 20, 20)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_is_computed_in_fp32_also_under_autocast(name, dtype):
    # 512 * 512 = 262,144 pixels: their sum alone is more than fp16 holds (65,504)
    logits, mask = example(3, (1, 512, 512))
    logits, mask = logits.to(dtype), (mask + 1).clamp(max=1)
    mask[:, :9, :40] = 0
    expected = LOSSES[name](logits.float(), mask)
    assert torch.equal(LOSSES[name](logits, mask), expected)
    assert torch.equal(LOSSES[name](logits, mask.to(dtype)), expected)
    assert torch.equal(LOSSES[name](logits, mask.bool()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(LOSSES[name](logits, mask), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [100.0, -100.0, 30.0, -30.0, 0.0])
def test_extreme_logits_give_finite_values_and_gradients(name, dtype, level):
    logits = torch.full((2, 6, 6), level, dtype=dtype, requires_grad=True)
    mask = torch.zeros(2, 6, 6)
    mask[0, :3] = 1  # the other mask is empty
    loss = LOSSES[name](logits, mask)
    assert torch.isfinite(loss).all() and (loss >= 0).all()
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


def tutorial_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The popular tutorial's cross-entropy: on probabilities, with 1e-5 inside the logarithms."""
    probs = logits.sigmoid()
    return (-mask * torch.log(probs + 1e-5) - (1 - mask) * torch.log((1 - probs) + 1e-5)).mean((-2, -1))


@pytest.mark.parametrize("level", [20.0, 30.0, 100.0, -20.0, -30.0, -100.0])
def test_a_surely_wrong_pixel_still_gets_a_gradient(level):
    truth = float(level < 0)

    def gradient(loss) -> float:
        logits = torch.full((1, 1), level, requires_grad=True)
        loss(logits, torch.full((1, 1), truth)).backward()
        return logits.grad.item()

    wrong = level / abs(level)  # the way down
    assert gradient(cross_entropy_loss) == pytest.approx(wrong, rel=1e-4)
    assert gradient(focal_loss) * wrong > 0.2
    assert abs(gradient(tutorial_loss)) < 0.001  # what this guards against: the pixel is never mended


# ---------------------------------------------------------------------------------------------------------------------
# masks at the loss's size


def naive_shrink(mask: np.ndarray, size: int) -> np.ndarray:
    height, width = mask.shape
    coverage = np.zeros((size, size))
    for y in range(size):
        for x in range(size):
            rows = slice(y * height // size, -(-(y + 1) * height // size))
            columns = slice(x * width // size, -(-(x + 1) * width // size))
            coverage[y, x] = mask[rows, columns].mean()
    shrunk = coverage > 0.5
    if mask.any() and not shrunk.any():
        shrunk.flat[coverage.argmax()] = True
    return shrunk.astype(np.float32)


@pytest.mark.parametrize("height, width, size", [(32, 32, 8), (30, 30, 8), (16, 16, 16), (24, 40, 8), (8, 8, 16)])
def test_shrunk_masks_are_the_average_cut_at_a_half(height, width, size):
    rng = np.random.default_rng(0)
    masks = [rng.random((height, width)) < share for share in (0.5, 0.9, 0.02, 0.0)]
    block = np.zeros((height, width), bool)
    block[height // 4 : height // 2, width // 8 :] = True
    single = np.zeros((height, width), bool)
    single[-1, 0] = True
    masks = np.stack([*masks, block, single])
    shrunk = shrink_masks(torch.from_numpy(masks), size)
    assert shrunk.shape == (6, size, size) and shrunk.dtype == torch.float32
    for mask, ours in zip(masks, shrunk.numpy(), strict=True):
        np.testing.assert_array_equal(ours, naive_shrink(mask, size))
    assert shrunk[3].sum() == 0  # an empty mask stays empty
    assert shrunk[5].sum() >= 1  # a pixel does not vanish


def test_a_vanishing_object_keeps_its_strongest_pixel_alone():
    mask = torch.zeros(1, 16, 16)
    mask[0, 5, 4:7] = 1  # three pixels of the 4 x 4 block (1, 1)
    mask[0, 5, 8] = 1  # one of block (1, 2)
    shrunk = shrink_masks(mask, 4)
    assert shrunk.nonzero().tolist() == [[0, 1, 1]]
    exactly_half = torch.zeros(1, 16, 16)
    exactly_half[0, :2, :4] = 1
    exactly_half[0, 8:12, 8:12] = 1
    assert shrink_masks(exactly_half, 4).nonzero().tolist() == [[0, 2, 2]]
    assert shrink_masks(torch.zeros(0, 16, 16), 4).shape == (0, 4, 4)


def test_shrinking_is_not_taking_every_fourth_pixel():
    """Nearest-pixel shrinking loses thin objects; so would the average alone."""
    mask = torch.zeros(1, 64, 64)
    mask[0, 9] = 1  # a line of one pixel
    assert F.interpolate(mask[None], (16, 16), mode="nearest").sum() == 0
    assert (F.adaptive_avg_pool2d(mask, 16) > 0.5).sum() == 0
    assert shrink_masks(mask, 16).sum() == 1


def draw_ellipses(count, side):
    """Ellipses of 10 to 25 px in a square: bool (O, side, side)."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:side, :side]
    ellipses = []
    for _ in range(count):
        (center_x, center_y), (half_w, half_h) = rng.uniform(0.3, 0.7, 2) * side, rng.uniform(5, 12.5, 2)
        ellipses.append(((x - center_x) / half_w) ** 2 + ((y - center_y) / half_h) ** 2 < 1)
    return torch.from_numpy(np.stack(ellipses))


def test_covered_pixels_are_the_share_that_the_object_covers():
    masks = draw_ellipses(5, 64)
    expected = masks.double().view(5, 16, 4, 16, 4).mean((2, 4))
    assert torch.allclose(cover_pixels(masks, 16).double(), expected, atol=1e-6)
    assert torch.equal(cover_pixels(masks, 64), masks.float())
    assert cover_pixels(torch.zeros(2, 16, 16), 4).sum() == 0 and cover_pixels(torch.zeros(0, 16, 16), 4).shape[0] == 0


def test_an_object_that_covers_no_pixel_by_half_still_covers_one():
    line = torch.zeros(1, 64, 64)
    line[0, 9] = 1  # a quarter of each pixel of the row
    assert cover_pixels(line, 16)[0, 2].tolist() == [1] * 16 and cover_pixels(line, 16).sum() == 16
    dot = torch.zeros(1, 64, 64)
    dot[0, 9, 9:12] = 1
    assert cover_pixels(dot, 16).max() == 1 and (cover_pixels(dot, 16) > 0).sum() == 1


def test_the_border_of_small_objects_is_finer_than_a_pixel_of_the_loss():
    """0 and 1, learned perfectly and enlarged, are off by half a pixel of the loss, 2 px of the picture: a ceiling."""
    masks = draw_ellipses(40, 128)
    ious = []
    for shrink in (cover_pixels, shrink_masks):
        enlarged = F.interpolate(shrink(masks, 32)[:, None], (128, 128), mode="bilinear")[:, 0] > 0.5
        ious.append(((enlarged & masks).sum((1, 2)) / (enlarged | masks).sum((1, 2))).mean().item())
    assert ious[0] > 0.93 and ious[1] < 0.85, ious
