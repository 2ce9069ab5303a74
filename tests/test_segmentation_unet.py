"""U-Net: the paper's sizes and counts, its values against plain functions, sizes that fit or not, the padded form."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import center_crop

from utils.segmentation.unet import (
    PAPER_MARGIN,
    UNet,
    UNetPaper,
    check_paper_sides,
    nearest_paper_input_sizes,
    paper_input_size,
)


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def record_sides(modules) -> list[int]:
    """Return a list that each later forward pass of the modules adds its output's side to."""
    sides = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    return sides


# ---------------------------------------------------------------------------------------------------------------------
# the paper's network


def test_the_papers_sizes():
    with torch.device("meta"):  # no values: only shapes
        model = UNetPaper(1, 2)
        encoder, decoder = record_sides(model.encoder), record_sides(model.decoder)
        logits = model(torch.empty(1, 1, 572, 572))
    assert encoder == [568, 280, 136, 64, 28] and decoder == [52, 100, 196, 388]
    assert logits.shape == (1, 2, 388, 388)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Conv2d) + kinds.count(nn.ConvTranspose2d) == 23  # "in total the network has 23 layers"


def plain_unet(model, images, padding):
    """Compute a U-Net with plain functions, crops by torchvision; batch norm where the model has it, as in training."""

    def double_conv(features, layers):
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                features = F.conv2d(features, layer.weight, layer.bias, padding=padding)
            elif isinstance(layer, nn.BatchNorm2d):
                mean, var = features.mean((0, 2, 3), keepdim=True), features.var((0, 2, 3), correction=0, keepdim=True)
                features = (features - mean) / (var + 1e-5).sqrt()
                features = features * layer.weight[:, None, None] + layer.bias[:, None, None]
            else:
                features = features.clamp(min=0)
        return features

    features, skips = images, []
    for block in model.encoder[:-1]:
        skips.append(double_conv(features, block))
        features = skips[-1].unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    features = double_conv(features, model.encoder[-1])
    ups = model.up_convs if hasattr(model, "up_convs") else model.upsamples
    for skip, up, block in list(zip(skips, ups, model.decoder, strict=True))[::-1]:
        if isinstance(up, nn.ConvTranspose2d):  # windows side by side: each input value becomes a 2x2 square
            features = torch.einsum("bihw,ioyx->bohywx", features, up.weight).flatten(4, 5).flatten(2, 3)
            features = features + up.bias[:, None, None]
        else:
            features = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
        features = double_conv(torch.cat([center_crop(skip, features.shape[-2:]), features], 1), block)
    return F.conv2d(features, model.head.weight, model.head.bias)


def test_the_papers_values():
    torch.manual_seed(0)
    model = UNetPaper(2, 3, base_channels=4).double().eval()
    images = torch.rand(2, 2, 188, 220, dtype=torch.double)
    logits = model(images)
    assert logits.shape == (2, 3, 4, 36)
    torch.testing.assert_close(logits, plain_unet(model, images, padding=0))


def test_a_part_of_the_picture_gives_the_same_logits():
    """Tiles placed at multiples of 16 px are seamless: pooling falls on the same pixels."""
    torch.manual_seed(0)
    model = UNetPaper(1, 2, base_channels=4).eval()
    images = torch.rand(1, 1, 220, 236)
    whole = model(images)
    part = model(images[..., 16 : 16 + 188, 48 : 48 + 188])
    torch.testing.assert_close(part, whole[..., 16:20, 48:52], atol=1e-5, rtol=0)
    moved = model(images[..., 8 : 8 + 188, 48 : 48 + 188])
    assert (moved - whole[..., 8:12, 48:52]).abs().max() > 1e-3


def plain_output_side(side):
    """Follow one side through the network by hand; None where a pooling meets an odd size or nothing is left."""
    sides = []
    for level in range(5):
        side -= 4
        sides.append(side)
        if level < 4:
            if side % 2 or side <= 0:
                return None
            side //= 2
    for _ in range(4):
        side = 2 * side - 4
    return side if side > 0 and min(sides) > 0 else None


def test_valid_input_sizes():
    for side in range(1, 700):
        if plain_output_side(side) is None:
            with pytest.raises(ValueError, match=rf"^size is {side}; a side must be 16 k \+ 60 .* nearest are \d+"):
                check_paper_sides("size", side, (572, side))
        else:
            check_paper_sides("size", side, (572, side))
            assert plain_output_side(side) == side - 2 * PAPER_MARGIN
    valid = [side for side in range(1, 1200) if plain_output_side(side)]
    assert valid[0] == 188 and 572 in valid
    for side in range(1, 700):
        below, above = [v for v in valid if v <= side], [v for v in valid if v >= side]
        assert nearest_paper_input_sizes(side) == sorted({below[-1] if below else 188, above[0]}), side
        assert paper_input_size(side) == next(v for v in valid if v - 184 >= side), side


@pytest.mark.parametrize("height, width, nearest", [(512, 572, "508 and 524"), (188, 100, "188")])
def test_a_wrong_size_names_the_nearest_valid_ones(height, width, nearest):
    model = UNetPaper(1, 2, base_channels=1)
    with pytest.raises(ValueError, match=rf"^the input is \({height}, {width}\); .* nearest are {nearest}$"):
        model(torch.zeros(1, 1, height, width))


def test_the_papers_initial_weights():
    torch.manual_seed(0)
    model = UNetPaper(8, 2, base_channels=16)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            values = torch.rand(1, module.in_channels, 8, 8, requires_grad=True)
            module(values)[0, 0, 3, 3].backward()  # which values one output value comes from
            num_incoming = int((values.grad != 0).sum())
            expected = math.sqrt(2 / num_incoming)
            tolerance = 5 * expected / math.sqrt(2 * module.weight.numel())  # five standard errors
            assert abs(float(module.weight.detach().std()) - expected) < tolerance, module
            assert not module.bias.any()


def test_dropout_at_the_end_of_the_contracting_path():
    torch.manual_seed(0)
    model = UNetPaper(1, 2, base_channels=8, dropout=0.5)
    images = torch.rand(1, 1, 188, 188)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
        dropped = []
        model.dropout.register_forward_hook(lambda module, inputs, output: dropped.append((inputs[0], output)))
        model(images)
        assert [before.shape[1] for before, _ in dropped] == [64, 128]  # the two deepest levels
        for before, after in dropped:
            assert 0.4 < float((after[before != 0] == 0).float().mean()) < 0.6
        model.eval()
        assert torch.equal(model(images), model(images))
        without = UNetPaper(1, 2, base_channels=8, dropout=0.0)
        without.load_state_dict(model.state_dict())
        assert torch.equal(without.train()(images), model(images))


# ---------------------------------------------------------------------------------------------------------------------
# the padded form


@pytest.mark.parametrize(
    "channels, classes, up, count",
    [
        (3, 2, "transposed", 31_037_698),
        (3, 1, "transposed", 31_037_633),
        (1, 2, "transposed", 31_036_546),
        (3, 2, "bilinear", 17_263_042),
        (3, 1, "bilinear", 17_262_977),
    ],
)
def test_number_of_parameters_of_the_padded_form(channels, classes, up, count):
    with torch.device("meta"):
        assert num_parameters(UNet(channels, classes, base_channels=64, depth=4, up=up)) == count


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
@pytest.mark.parametrize("depth", [1, 3])
def test_values_of_the_padded_form(up, depth):
    torch.manual_seed(0)
    model = UNet(2, 3, base_channels=4, depth=depth, up=up).double()
    images = torch.rand(2, 2, 40, 24, dtype=torch.double)
    torch.testing.assert_close(model(images), plain_unet(model, images, padding=1))


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
def test_the_padded_form_takes_any_size(up):
    torch.manual_seed(0)
    model = UNet(1, 2, base_channels=2, depth=3, up=up).eval()
    for height, width in [(1, 1), (7, 9), (37, 53), (64, 48), (130, 3)]:
        images = torch.rand(1, 1, height, width)
        bottom, right = math.ceil(height / 8) * 8 - height, math.ceil(width / 8) * 8 - width
        padded = np.pad(images.numpy(), ((0, 0), (0, 0), (0, bottom), (0, right)), mode="edge")
        logits = model(images)
        assert logits.shape == (1, 2, height, width)
        assert torch.equal(logits, model(torch.from_numpy(padded))[..., :height, :width])
