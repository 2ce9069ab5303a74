"""FCN, SegNet and the vision transformer against other libraries and naive loops; what all networks have in common."""

import inspect

import cv2
import pytest
import torch
import torch.nn.functional as F
import torchvision
from options import CONFIGS, read_option
from torch import nn
from torchvision.models import get_model
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.functional import normalize

from train_unet import NETWORKS, build_network
from utils.segmentation.segmenters import FCN, DeepLabV3, SegNet, TransformerBlock, ViTSegmenter

SMALL = {  # the settings of a network that a test can afford
    "unet_paper": {"base_channels": 4, "dropout": 0.0},
    "unet": {"base_channels": 8},
    "fcn": {"base_channels": 4, "head_channels": 16, "dropout": 0.0},
    "segnet": {"base_channels": 4},
    "segnet_dsc": {"base_channels": 4},
    "vit": {"image_size": 64, "dim": 32, "num_blocks": 2, "dropout": 0.0},
    "vit_small": {"image_size": 64, "dim": 24, "num_blocks": 2, "dropout": 0.0},
}
PRESETS = list(SMALL)


def make(preset: str, in_channels: int, num_classes: int, **changes):
    settings = read_option("unet", "model", preset)
    network = NETWORKS[settings.pop("name")]
    return network(in_channels=in_channels, num_classes=num_classes, **(settings | changes))


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images_for(preset: str, in_channels: int) -> torch.Tensor:
    size = (188, 204) if preset == "unet_paper" else (70, 53)
    return torch.rand(2, in_channels, *size, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------------------
# all networks


@pytest.mark.parametrize(
    "preset, count",
    [
        ("unet_paper", 31_031_875),
        ("segnet", 15_274_892),
        ("segnet_dsc", 1_749_671),
        ("vit", 86_284_806),  # "86.28M"
    ],
)
def test_published_numbers_of_parameters(preset, count):
    with torch.device("meta"):
        assert num_parameters(make(preset, in_channels=3, num_classes=3)) == count


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONFIGS / "unet" / "model").glob("*.yaml")))
def test_yaml_holds_exactly_the_classs_arguments(preset):
    settings = read_option("unet", "model", preset)
    arguments = inspect.signature(NETWORKS[settings.pop("name")]).parameters
    assert list(arguments)[:2] == ["in_channels", "num_classes"]
    assert list(settings) == list(arguments)[2:]


@torch.no_grad()
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "unet_paper"] + ["deeplabv3"])
def test_pictures_of_any_size_down_to_one_pixel(preset):
    """SegNet's pooling left nothing of a side below 16 px."""
    small = SMALL.get(preset, {"backbone": "mobilenet_v3_large"})
    model = make(preset, 3, 2, **small).eval()
    for hw in ((1, 1), (4, 3), (15, 40), (17, 1)):
        logits = model(torch.rand(1, 3, *hw))
        assert logits.shape == (1, 2, *hw) and bool(logits.isfinite().all())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("in_channels, num_classes", [(1, 2), (4, 5)])
def test_shapes_gradients_and_seed(preset, in_channels, num_classes):
    torch.manual_seed(0)
    model = make(preset, in_channels, num_classes, **SMALL[preset])
    images = images_for(preset, in_channels)
    logits = model(images)
    height, width = images.shape[-2:]
    expected = (height - 184, width - 184) if preset == "unet_paper" else (height, width)
    assert logits.shape == (2, num_classes, *expected) and logits.dtype == torch.float32
    assert bool((logits < 0).any()) and bool((logits > 0).any())  # logits, not what a last ReLU lets through
    (logits.square() * torch.rand_like(logits)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        # A bias before batch norm could not be learned; there must be none. (The key's part of a bias shifts all
        # attention scores alike, so only the whole of query_key_value.bias is nonzero.)
        assert float(parameter.grad.abs().max()) > 1e-12, name
    torch.manual_seed(0)
    again = make(preset, in_channels, num_classes, **SMALL[preset]).state_dict()
    assert all(torch.equal(parameter, again[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_and_channels_last(preset):
    torch.manual_seed(0)
    model = make(preset, 3, 3, **SMALL[preset])
    images = images_for(preset, 3)
    model(images)  # gives batch norm some statistics
    model.eval()
    with torch.no_grad():
        expected = model(images)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            model.to(memory_format=memory_format)
            laid_out = images.contiguous(memory_format=memory_format)
            torch.testing.assert_close(model(laid_out), expected, rtol=1e-4, atol=1e-4)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(laid_out)
            assert logits.dtype == torch.bfloat16
            scale = float(expected.abs().max())
            torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.1 * scale)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images.contiguous(memory_format=torch.channels_last))
    logits.float().square().mean().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize(
    "preset, changes, num_resized",
    [("fcn", SMALL["fcn"], 1), ("unet", SMALL["unet"] | {"up": "bilinear"}, 4), ("vit", SMALL["vit"], 1),
     ("deeplabv3", {"backbone": "mobilenet_v3_large"}, 2)],
)  # fmt: skip
def test_maps_are_resized_in_fp32_also_under_autocast(preset, changes, num_resized, monkeypatch):
    """On a GPU the backward adds up gradients in the type that is resized in, by atomics: in bf16 3.5 % off."""
    dtypes, interpolate = [], torch.nn.functional.interpolate

    def resize(maps, *args, **keys):
        dtypes.append(maps.dtype)
        return interpolate(maps, *args, **keys)

    monkeypatch.setattr(torch.nn.functional, "interpolate", resize)
    model = make(preset, 3, 3, **changes).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.rand(2, 3, 48, 48))
    assert logits.dtype == torch.bfloat16 and dtypes == [torch.float32] * num_resized


@pytest.mark.parametrize("preset", ["fcn", "segnet", "segnet_dsc", "vit", "vit_small"])
def test_any_size(preset):
    model = make(preset, 3, 2, **SMALL[preset]).eval()
    for height, width in [(16, 16), (17, 95), (33, 64), (100, 21)]:
        assert model(torch.rand(1, 3, height, width)).shape == (1, 2, height, width)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu(preset, dtype):
    torch.manual_seed(0)
    model = make(preset, 3, 3, **SMALL[preset])
    images = images_for(preset, 3)
    model(images)
    expected = model.eval()(images).detach()
    model.cuda().to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=dtype):
        logits = model(images.cuda().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits.float().cpu(), expected, rtol=0, atol=0.1 * float(expected.abs().max()))
    logits.float().square().mean().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize(
    "preset, changes, words",
    [
        ("segnet", {"separable": 1}, "model.separable is 1; must be true or false"),
        ("segnet", {"base_channels": 0}, "model.base_channels is 0; must be 1 or more"),
        ("fcn", {"head_channels": 1.5}, "model.head_channels is 1.5; must be a whole number"),
        ("fcn", {"dropout": 1}, "model.dropout is 1; must be 0 or more and below 1"),
        ("vit", {"image_size": 100}, r"model.image_size is 100; must be a multiple of model.patch_size \(16\)"),
        ("vit", {"num_heads": 7}, r"model.dim is 768; must be a multiple of model.num_heads \(7\)"),
        ("vit", {"num_blocks": -1}, "model.num_blocks is -1; must be 1 or more"),
        ("unet", {"up": "nearest"}, "model.up is nearest; must be transposed or bilinear"),
        ("unet", {"depth": 0}, "model.depth is 0; must be 1 or more"),
        ("unet", {"base_channels": "8"}, "model.base_channels is '8'; must be a whole number"),
        ("unet_paper", {"base_channels": 0}, "model.base_channels is 0; must be 1 or more"),
        ("unet_paper", {"dropout": 1.0}, "model.dropout is 1.0; must be 0 or more and below 1"),
        ("deeplabv3", {"backbone": "vgg"}, "model.backbone is vgg; must be one of resnet50"),
    ],
)
def test_bad_settings_are_named(preset, changes, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        build_network(read_option("unet", "model", preset) | changes, 3, 2)


# ---------------------------------------------------------------------------------------------------------------------
# FCN


def test_fcn_has_the_trunk_of_vgg_16():
    torch.manual_seed(0)
    vgg = make_layers(cfgs["D"], batch_norm=True).eval()  # torchvision's, 64 to 512 channels
    model = FCN(3, 2, base_channels=64, head_channels=4, dropout=0.5).eval()
    pairs = list(zip([m for m in vgg if list(m.parameters())], [m for m in model.levels.modules()
                 if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))], strict=True))  # fmt: skip
    for theirs, ours in pairs:
        if isinstance(theirs, nn.Conv2d):
            nn.init.zeros_(theirs.bias)
            nn.init.normal_(theirs.weight, std=(2 / (9 * theirs.in_channels)) ** 0.5)
        ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if name in ours.state_dict()})
    with torch.no_grad():
        features = images = torch.rand(1, 3, 32, 64)
        for level in model.levels:
            features = level(features)
        torch.testing.assert_close(features, vgg(images))


def test_fcn_number_of_parameters_at_the_published_widths():
    classes = 21
    with torch.device("meta"):
        vgg = make_layers(cfgs["D"], batch_norm=True)
        biases = sum(module.bias.numel() for module in vgg if isinstance(module, nn.Conv2d))
        head = 512 * 4096 * 49 + 2 * 4096 + 4096 * 4096 + 2 * 4096
        scores = (4096 + 1 + 512 + 1 + 256 + 1) * classes + 2 * 16 * classes**2
        count = num_parameters(FCN(3, classes, base_channels=64, head_channels=4096, dropout=0.5))
    assert count == num_parameters(vgg) - biases + head + scores
    assert round(count / 1e6) == 134  # table 1 of the paper: FCN-VGG16, 134M


def test_fcn_starts_from_bilinear_interpolation():
    model = FCN(3, 3, base_channels=2, head_channels=4, dropout=0.0)
    scores = torch.rand(1, 3, 6, 5)
    expected = F.interpolate(scores, scale_factor=2, mode="bilinear", align_corners=False)
    for up in (model.up_32, model.up_16):  # at the border a transposed convolution adds nothing from outside
        torch.testing.assert_close(up(scores)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
        assert up.weight.requires_grad


def test_fcn_joins_scores_of_three_scales():
    torch.manual_seed(0)
    model = FCN(1, 2, base_channels=8, head_channels=16, dropout=0.0)  # batch norm as in training
    pooled = []
    for level in model.levels:
        level.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    with torch.no_grad():
        logits = model(torch.rand(2, 1, 64, 96))
        assert [tuple(features.shape[-2:]) for features in pooled] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
        scores_16 = model.up_32(model.score_32(model.head(pooled[4]))) + model.score_16(pooled[3])
        scores_8 = model.up_16(scores_16) + model.score_8(pooled[2])
    # the paper's fixed 8x layer: a 16x16 bilinear kernel of stride 8 for each class
    kernels = bilinear_kernel(16).expand(2, 1, 16, 16)
    plain = F.conv_transpose2d(scores_8, kernels, stride=8, padding=4, groups=2)
    torch.testing.assert_close(logits[..., 4:-4, 4:-4], plain[..., 4:-4, 4:-4])


def bilinear_kernel(size: int) -> torch.Tensor:
    """Make the tent of a transposed convolution that interpolates bilinearly, size/2 times."""
    places = torch.arange(size)
    tent = 1 - (places - (size - 1) / 2).abs() / (size / 2)
    return (tent[:, None] * tent)[None, None]


# ---------------------------------------------------------------------------------------------------------------------
# SegNet


@pytest.mark.parametrize("separable", [False, True])
def test_segnet_puts_values_back_where_pooling_found_them(separable):
    torch.manual_seed(0)
    model = SegNet(2, 3, base_channels=2, separable=separable)
    encoded, pooled, unpooled_from, unpooled = [], [], [], []
    for encoder in model.encoder:
        encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output.detach()))
    model.pool.register_forward_hook(lambda module, inputs, output: pooled.append(output[0].detach()))
    model.unpool.register_forward_hook(lambda module, inputs, output: unpooled_from.append(inputs[0].detach()))
    model.unpool.register_forward_hook(lambda module, inputs, output: unpooled.append(output.detach()))
    model(torch.rand(1, 2, 37, 50))
    assert [tuple(features.shape[-2:]) for features in encoded] == [(37, 50), (18, 25), (9, 12), (4, 6)]
    assert torch.equal(unpooled_from[0], pooled[3])
    for before, given, back in zip(encoded[::-1], unpooled_from, unpooled, strict=True):
        expected = torch.zeros_like(before)
        for channel in range(before.shape[1]):
            for y in range(given.shape[2]):
                for x in range(given.shape[3]):
                    window = before[0, channel, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                    place = int(window.argmax())  # the first one where values are equal
                    expected[0, channel, 2 * y + place // 2, 2 * x + place % 2] = given[0, channel, y, x]
        assert torch.equal(back, expected)


def test_segnet_separable_layer_saves_what_the_series_says():
    """Its example, 16 to 32 channels: 4608 weights become 656."""
    plain, separable = SegNet(3, 2, 16, False), SegNet(3, 2, 16, True)
    assert plain.encoder[1][0].weight.numel() == 4608
    within, across = separable.encoder[1][0], separable.encoder[1][1]
    assert within.weight.numel() + across.weight.numel() == 656
    features = torch.rand(1, 16, 5, 6)
    joined = torch.einsum("oi,iyx->oiyx", across.weight[:, :, 0, 0], within.weight[:, 0])  # one 3x3 convolution
    torch.testing.assert_close(across(within(features)), F.conv2d(features, joined, padding=1), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# vision transformer


def test_transformer_block_is_pytorchs():
    torch.manual_seed(0)
    block = TransformerBlock(dim=24, num_heads=3, dropout=0.3)
    theirs = nn.TransformerEncoderLayer(24, 3, 96, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    for norm in (block.attention_norm, block.perceptron[0]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    pairs = [
        (theirs.norm1, block.attention_norm), (theirs.norm2, block.perceptron[0]),
        (theirs.self_attn.out_proj, block.attention_out),
        (theirs.linear1, block.perceptron[1]), (theirs.linear2, block.perceptron[3]),
    ]  # fmt: skip
    for target, source in pairs:
        target.load_state_dict(source.state_dict())
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(block.query_key_value.weight)
        theirs.self_attn.in_proj_bias.copy_(block.query_key_value.bias)
        tokens = torch.randn(2, 7, 24)
        torch.testing.assert_close(block.eval()(tokens), theirs(tokens), rtol=1e-4, atol=1e-5)
        assert not torch.equal(block.train()(tokens), block(tokens))  # dropout


def quiet_vit(**changes) -> ViTSegmenter:
    """Make a small one whose blocks add nothing, so that each patch answers for itself."""
    torch.manual_seed(0)
    settings = {"image_size": 16, "patch_size": 4, "dim": 8, "num_blocks": 1, "num_heads": 2, "dropout": 0.0}
    model = ViTSegmenter(3, 2, **(settings | changes)).eval()
    for layer in (model.blocks[0].attention_out, model.blocks[0].perceptron[3]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def test_vit_cuts_and_joins_patches_as_unfold_and_fold_do():
    model = quiet_vit()
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        patches = F.unfold(images / (1 + 1e-5) ** 0.5, 4, stride=4)  # a fresh batch norm divides by sqrt(1 + eps)
        tokens = patches.transpose(1, 2) @ model.patch_embedding.weight.flatten(1).T + model.patch_embedding.bias
        tokens = tokens + model.positions.flatten(2).transpose(1, 2)
        scores = tokens @ model.head.weight.T + model.head.bias
        expected = F.fold(scores.transpose(1, 2), (16, 16), 4, stride=4)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_vit_positions():
    model = quiet_vit()
    nn.init.zeros_(model.patch_embedding.weight)
    nn.init.zeros_(model.patch_embedding.bias)
    assert 0.01 < float(model.positions.detach().std()) < 0.03
    with torch.no_grad():  # now nothing but the positions reaches the logits
        model.positions.copy_(torch.arange(4.0)[:, None].expand(1, 8, 4, 4))  # the number of the row of patches
        column = model(torch.rand(1, 3, 16, 16))[0, 0, ::4, 0]
        torch.testing.assert_close(column.diff(), column.diff()[:1].expand(3))
        wide = model(torch.rand(1, 3, 16, 30))  # 4 x 8 patches: only columns are interpolated, and they are equal
        torch.testing.assert_close(wide[0, 0, ::4, 0], column)
        model.positions.normal_()
        for rows, columns in [(8, 4), (6, 9), (3, 4)]:
            logits = model(torch.rand(1, 3, 4 * rows, 4 * columns))
            resized = cv2.resize(
                model.positions[0].permute(1, 2, 0).numpy(), (columns, rows), interpolation=cv2.INTER_CUBIC
            )
            scores = torch.from_numpy(resized) @ model.head.weight.T + model.head.bias  # (rows, columns, 2 * 16)
            expected = scores.view(rows, columns, 2, 4, 4).permute(2, 0, 3, 1, 4).reshape(1, 2, 4 * rows, 4 * columns)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# DeepLabV3


def test_deeplabv3_is_torchvisions_on_normalised_pictures(monkeypatch):
    """With random weights in the place of those that torchvision downloads."""
    torch.manual_seed(1)
    theirs = get_model("deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, aux_loss=True).eval()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda url, **_: theirs.state_dict())
    keys = {"name": "deeplabv3", "backbone": "mobilenet_v3_large", "pretrained": True}
    model = build_network(keys, 3, 21, True).eval()
    assert not [name for name in model.state_dict() if "aux" in name]
    theirs.classifier[-1] = model.network.classifier[-1]  # made anew for the classes
    images = torch.rand(2, 3, 70, 53)
    normalised = normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(normalised)["out"])
        grey = build_network(keys, 1, 21).eval()
        grey.load_state_dict(model.state_dict())
        torch.testing.assert_close(grey(images[:, :1]), model(images[:, :1].expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="^data.channels is 4; must be 1 or 3"):
        DeepLabV3(4, 2, "resnet50", False)
