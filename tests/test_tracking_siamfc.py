"""SiamFC: published sizes, names and values, correlation against loops, crops against whole padded frames, labels."""

import collections

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from utils.tracking import siamfc
from utils.tracking.siamfc import (
    SiamFC,
    balanced_weights,
    box_center,
    context_side,
    crop_and_resize,
    cross_correlate,
    instance_side,
    load_siamfc,
    mean_color,
    response_labels,
)

INTERPOLATIONS = [cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_LANCZOS4]


def make_model(score_bias=False, seed=0):
    """Make a model in eval mode whose batch norms are not the identity."""
    torch.manual_seed(seed)
    model = SiamFC(score_bias)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-10, 10)
            module.running_var.uniform_(100, 2000)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# network


@pytest.mark.parametrize("size, response_size", [(239, 15), (255, 17)])
def test_sizes(size, response_size):
    model, exemplars, instances = make_model(), torch.zeros(1, 3, 127, 127), torch.zeros(1, 3, size, size)
    with torch.no_grad():
        assert model.features(exemplars).shape == (1, 256, 6, 6)
        assert model(exemplars, instances).shape == (1, 1, response_size, response_size)


def test_number_and_names_of_the_published_weights():
    """The published files hold, for each block, a convolution and (but in the last) a batch norm."""
    with torch.device("meta"):
        model = SiamFC(score_bias=False)
        assert sum(parameter.numel() for parameter in model.parameters()) == 2_336_320
        with_bias = SiamFC(score_bias=True)
    published = {}
    for block, (channels_out, channels_in, kernel) in enumerate(
        [(96, 3, 11), (256, 48, 5), (384, 256, 3), (384, 192, 3), (256, 192, 3)], start=1
    ):
        published[f"backbone.conv{block}.0.weight"] = (channels_out, channels_in, kernel, kernel)
        published[f"backbone.conv{block}.0.bias"] = (channels_out,)
        if block < 5:
            for name in ("weight", "bias", "running_mean", "running_var"):
                published[f"backbone.conv{block}.1.{name}"] = (channels_out,)
            published[f"backbone.conv{block}.1.num_batches_tracked"] = ()
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published
    assert with_bias.state_dict().keys() - published.keys() == {"score_bias"}


def plain_convolution(images, weight, bias, stride, groups):
    """Convolve (C, H, W) in numpy, without padding."""
    results = []
    for part, part_weight in zip(np.split(images, groups), np.split(weight, groups), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(part, weight.shape[2:], axis=(1, 2))[:, ::stride, ::stride]
        results.append(np.tensordot(part_weight, windows, axes=([1, 2, 3], [0, 3, 4])))
    return np.concatenate(results) + bias[:, None, None]


def plain_features(weights, image):
    """Compute AlexNet V1's features of (3, H, W) in float64 numpy, from the published description."""
    features = image
    for block, (stride, groups, is_normed, is_pooled) in enumerate(
        [(2, 1, True, True), (1, 2, True, True), (1, 1, True, False), (1, 2, True, False), (1, 2, False, False)], 1
    ):
        conv, norm = f"backbone.conv{block}.0.", f"backbone.conv{block}.1."
        features = plain_convolution(features, weights[conv + "weight"], weights[conv + "bias"], stride, groups)
        if is_normed:
            scale = weights[norm + "weight"] / np.sqrt(weights[norm + "running_var"] + 1e-6)
            shift = weights[norm + "bias"] - weights[norm + "running_mean"] * scale
            features = np.maximum(features * scale[:, None, None] + shift[:, None, None], 0)
        if is_pooled:
            windows = np.lib.stride_tricks.sliding_window_view(features, (3, 3), axis=(1, 2))[:, ::2, ::2]
            features = windows.max(axis=(3, 4))
    return features


def test_values_against_numpy():
    model = make_model(score_bias=True).double()
    torch.nn.init.constant_(model.score_bias, -3.0)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    exemplars = torch.randint(0, 256, (1, 3, 127, 127)).double()
    instances = torch.randint(0, 256, (1, 3, 143, 143)).double()  # 143 px: features 8, response 3
    with torch.no_grad():
        response = model(exemplars, instances)
    z, x = plain_features(weights, exemplars[0].numpy()), plain_features(weights, instances[0].numpy())
    expected = [[0.001 * (z * x[:, i : i + 6, j : j + 6]).sum() - 3.0 for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(response[0, 0].numpy(), expected, rtol=1e-9)


def test_batch_norm_moves_its_statistics_by_a_twentieth():
    model = make_model().train()
    before = model.backbone.conv1[1].running_mean.clone()
    images = torch.rand(2, 3, 127, 127) * 255
    with torch.no_grad():
        batch_mean = model.backbone.conv1[0](images).mean((0, 2, 3))
        model.features(images)
    torch.testing.assert_close(model.backbone.conv1[1].running_mean, 0.95 * before + 0.05 * batch_mean)


def test_a_shift_of_one_stride_moves_the_response_by_one_cell():
    model = make_model()
    picture = torch.randint(0, 256, (1, 3, 255, 255 + 8)).float()
    with torch.no_grad():
        z = model.features(picture[..., 64:191, 64:191])
        x, x_shifted = model.features(picture[..., :255]), model.features(picture[..., 8:])
        torch.testing.assert_close(z, x[..., 8:14, 8:14], rtol=1e-4, atol=1e-4)  # the middle of an instance
        torch.testing.assert_close(
            model.respond(z, x)[..., 1:], model.respond(z, x_shifted)[..., :-1], rtol=1e-4, atol=1e-4
        )


def test_new_weights_are_xavier_uniform_and_follow_the_seed():
    def new_weights(seed):
        torch.manual_seed(seed)
        return SiamFC(score_bias=False).state_dict()

    weights, again, other = new_weights(0), new_weights(0), new_weights(1)
    for name, weight in weights.items():
        assert torch.equal(weight, again[name])
        if weight.ndim == 4:
            limit = (6 / (weight[0].numel() + weight.shape[0] * weight[0, 0].numel())) ** 0.5
            assert weight.abs().max() <= limit and abs(weight.std().item() / (limit / 3**0.5) - 1) < 0.02
            assert not torch.equal(weight, other[name])
        elif name.endswith(".0.bias"):
            assert (weight == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# cross-correlation


@pytest.mark.parametrize("num_exemplars, num_instances", [(1, 1), (1, 3), (3, 3), (2, 6)])
def test_cross_correlation_against_loops(num_exemplars, num_instances):
    torch.manual_seed(0)
    z, x = torch.randn(num_exemplars, 4, 3, 3).double(), torch.randn(num_instances, 4, 5, 6).double()
    expected = torch.zeros(num_instances, 1, 3, 4).double()
    for item in range(num_instances):
        for i in range(3):
            for j in range(4):
                expected[item, 0, i, j] = (z[item % num_exemplars] * x[item, :, i : i + 3, j : j + 3]).sum()
    torch.testing.assert_close(cross_correlate(z, x), expected)


def test_cross_correlation_of_channels_last_batches():
    """The published `view` fails on channels_last features of several exemplars."""
    torch.manual_seed(0)
    z, x = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 5, 5)
    x_last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(cross_correlate(z.to(memory_format=torch.channels_last), x_last), cross_correlate(z, x))
    with pytest.raises(RuntimeError, match="view"):
        x_last.view(-1, 8, 5, 5)


def test_cross_correlation_is_float32_under_autocast():
    torch.manual_seed(0)
    z, x = torch.randn(1, 256, 6, 6), torch.randn(1, 256, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        response = cross_correlate(z, x)
        from_bf16 = cross_correlate(z.bfloat16(), x.bfloat16())
        rounded = F.conv2d(x, z)
    assert response.dtype == from_bf16.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert torch.equal(response, cross_correlate(z, x))
    torch.testing.assert_close(from_bf16, cross_correlate(z.bfloat16().float(), x.bfloat16().float()))


def test_gradients_of_cross_correlation():
    torch.manual_seed(0)
    z, x = torch.randn(2, 3, 2, 2).double().requires_grad_(), torch.randn(4, 3, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(cross_correlate, (z, x))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def test_loading_a_published_file(tmp_path):
    """A bare OrderedDict in the old, unzipped format; older ones lack num_batches_tracked."""
    weights = make_model().state_dict()
    bare = collections.OrderedDict((key, value) for key, value in weights.items() if "num_batches" not in key)
    torch.save(bare, tmp_path / "siamfc_alexnet_e50.pth", _use_new_zipfile_serialization=False)
    model = load_siamfc(tmp_path / "siamfc_alexnet_e50.pth")
    assert model.score_bias is None and not model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in bare.items())


def test_loading_our_files(tmp_path):
    weights = make_model(score_bias=True).state_dict()
    half = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    torch.save({"model": half, "config": {}, "format": 1}, tmp_path / "best.pt")
    model = load_siamfc(tmp_path / "best.pt")
    assert model.score_bias is not None and model.score_bias.dtype == torch.float32
    torch.testing.assert_close(model.state_dict(), weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_loading_other_weights_says_which(tmp_path, change):
    weights = dict(make_model().state_dict())
    if change == "missing":
        del weights["backbone.conv3.0.bias"]
    elif change == "extra":
        weights["backbone.conv6.0.bias"] = torch.zeros(3)
    else:
        weights["backbone.conv3.0.bias"] = torch.zeros(3)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth does not hold.*1 entries.*backbone\.conv[36]\.0\.bias"):
        load_siamfc(tmp_path / "other.pth")


# ---------------------------------------------------------------------------------------------------------------------
# geometry


def test_context_square():
    assert context_side(np.array([40, 40])) == 80  # p is 40: twice the box, so the box fills half of the exemplar
    assert context_side(np.array([30, 10])) == pytest.approx((50 * 30) ** 0.5)
    assert context_side(np.array([30, 10]), context_amount=0) == pytest.approx(300**0.5)
    assert instance_side(127.0) == 255 and instance_side(127.0, 239) == 239
    box_wh = np.array([33.3, 71.9], np.float32)  # the published numbers are float32 at each step
    published = np.sqrt(np.prod(box_wh + np.float32(0.5) * np.sum(box_wh)))
    assert published.dtype == np.float32 and context_side(box_wh) == published
    assert instance_side(context_side(box_wh)) == published * np.float32(255) / np.float32(127)


def test_center_of_a_box_is_that_of_its_middle_pixel():
    """Boxes are 0-based; taken as 1-based, crops lie one pixel too far left and up."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:21, 30:37] = 255  # an 11 x 7 object at (30, 10)
    center_xy = box_center(np.array([30, 10, 7, 11]))
    assert center_xy.dtype == np.float32 and center_xy.tolist() == [33, 15]
    patch = crop_and_resize(image, center_xy, 25, 25, np.zeros(3))
    assert np.array_equal(patch, patch[::-1]) and np.array_equal(patch, patch[:, ::-1]) and patch[12, 12, 0] == 255
    buggy = crop_and_resize(image, center_xy - 1, 25, 25, np.zeros(3))
    assert not np.array_equal(buggy, buggy[::-1]) and not np.array_equal(buggy, buggy[:, ::-1])


def whole_frame_crop(image, center_xy, side, out_size, border_rgb, interpolation):
    """Crop from a frame padded as a whole, as the published code does."""
    center_xy, side = np.asarray(center_xy, np.float32), round(side)
    left, top = np.round(center_xy - np.float32((side - 1) / 2)).astype(int)
    height, width = image.shape[:2]
    pad = max(0, -left, -top, left + side - width, top + side - height)
    padded = cv2.copyMakeBorder(image, *[int(pad)] * 4, cv2.BORDER_CONSTANT, value=border_rgb)
    patch = padded[top + pad : top + pad + side, left + pad : left + pad + side]
    return cv2.resize(patch, (out_size, out_size), interpolation=interpolation)


def test_crops_equal_those_of_a_padded_frame_to_the_byte():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    num_outside = num_inside = num_across = 0
    for case in range(200):
        center_xy = rng.uniform(-150, 270, 2) if case % 3 else rng.uniform(30, 90, 2)
        side = float(rng.choice([1, 2, 3.5, 20.5, 21.5, 64, 126.5, 127, 255, 300.2])) * rng.choice([1, 0.9639])
        out_size = int(rng.choice([127, 255]))
        border_rgb = rng.choice([mean_color(image), np.array([0.5, 1.5, 254.5]), np.array([0.0, 255.0, 2.5])])
        arguments = (image, center_xy, side, out_size, border_rgb, INTERPOLATIONS[case % 5])
        patch = crop_and_resize(*arguments)
        assert patch.dtype == np.uint8 and patch.shape == (out_size, out_size, 3)
        np.testing.assert_array_equal(patch, whole_frame_crop(*arguments), err_msg=str(arguments[1:]))
        is_plain = bool((patch == patch[0, 0]).all())
        num_outside += is_plain
        reach = abs(np.asarray(center_xy) - (59.5, 44.5)) + side / 2
        num_inside += bool((reach < (59, 44)).all())
        num_across += not is_plain and bool((reach > (61, 46)).any())
    assert min(num_outside, num_inside, num_across) > 20


def test_a_patch_has_at_least_one_pixel():
    """The published code fails in OpenCV where a side rounds to 0."""
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    arguments = (image, np.array([7.0, 5.0]), 0.4, 127, np.zeros(3), cv2.INTER_LINEAR)
    assert (crop_and_resize(*arguments) == image[5, 7]).all()
    with pytest.raises(cv2.error, match="empty"):
        whole_frame_crop(*arguments)


def test_very_wide_patches_take_no_more_memory(monkeypatch):
    """The published code pads a whole frame to them."""
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8), (0, 0), 6)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    border_rgb = mean_color(image)
    wide = crop_and_resize(image, np.array([1e5, 40]), 2.5e5, 255, border_rgb)  # 190 GB as a patch
    assert (wide == np.rint(border_rgb)).all(2).mean() > 0.99
    for center_xy, side in [((60, 45), 333), ((10, 80), 260), ((100.4, -20.3), 700), ((60.5, 45.5), 1200)]:
        exact = crop_and_resize(image, np.array(center_xy), side, 255, border_rgb)
        monkeypatch.setattr(siamfc, "MAX_PATCH_SIDE", 256)
        sampled = crop_and_resize(image, np.array(center_xy), side, 255, border_rgb)
        monkeypatch.undo()
        difference = np.abs(exact.astype(int) - sampled)
        assert (difference > 2).mean() < 0.001 and difference.max() < 64, (center_xy, side)
        assert (exact != np.rint(border_rgb)).any(2).mean() > 0.004


@pytest.mark.parametrize("height, width", [(1, 1), (37, 53), (480, 640), (1080, 1920)])
def test_mean_color_equals_that_of_numpy_exactly(height, width):
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mean = mean_color(image)
    assert mean.dtype == np.float64 and np.array_equal(mean, np.mean(image, axis=(0, 1)))
    view = image[::2, : width // 2 + 1]
    assert np.array_equal(mean_color(view), np.mean(view, axis=(0, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# labels


@pytest.mark.parametrize("size, r_pos, num_ones", [(15, 16, 13), (17, 16, 13), (15, 0, 1)])
def test_labels(size, r_pos, num_ones):
    labels = response_labels(size, r_pos)
    middle = size // 2
    for i in range(size):
        for j in range(size):
            assert labels[i, j] == (8 * (abs(i - middle) + abs(j - middle)) <= r_pos)
    assert labels.sum() == num_ones and labels.dtype == torch.float32


@pytest.mark.parametrize("size, r_pos", [(15, -1), (4, 0), (3, 16)])
def test_labels_of_one_kind_alone_are_an_error(size, r_pos):
    with pytest.raises(ValueError, match=f"train.r_pos is {r_pos}; gives all {size} x {size} cells"):
        response_labels(size, r_pos)


def test_weights_give_both_labels_one_half():
    labels = response_labels(15, 16)
    weights = balanced_weights(labels)
    assert weights[labels == 1].sum() == pytest.approx(0.5) and weights[labels == 0].sum() == pytest.approx(0.5)
    torch.manual_seed(0)
    logits = torch.randn(4, 1, 15, 15)
    batch_labels = labels.expand_as(logits)
    cells = F.binary_cross_entropy_with_logits(logits, batch_labels, reduction="none")
    loss = (balanced_weights(batch_labels) * cells).sum() / 4
    ones = batch_labels == 1  # the published loss balances over the whole batch: the same, as all labels are equal
    torch.testing.assert_close(loss, cells[ones].mean() / 2 + cells[~ones].mean() / 2)
