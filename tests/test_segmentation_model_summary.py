"""Parameters, multiply-adds and memory against closed forms; latency of a model that takes a known time."""

import time

import pytest
import torch
from torch import nn

from utils.segmentation.model_summary import format_summary, measure_latency, summarize
from utils.segmentation.segmenters import FCN, SegNet, ViTSegmenter
from utils.segmentation.unet import UNet, UNetPaper

CPU = torch.device("cpu")


def test_the_papers_network_in_closed_form():
    """A value that a convolution puts out takes 9 * channels_in products; of an up-convolution, channels_in."""
    multiply_adds, channels, side = 0, 1, 572
    for width in (64, 128, 256, 512, 1024):
        multiply_adds += (side - 2) ** 2 * width * 9 * channels + (side - 4) ** 2 * width * 9 * width
        channels, side = width, (side - 4) // 2
    side *= 2
    for width in (512, 256, 128, 64):
        multiply_adds += (2 * side) ** 2 * width * 2 * width
        side *= 2
        multiply_adds += (side - 2) ** 2 * width * 9 * 2 * width + (side - 4) ** 2 * width * 9 * width
        side -= 4
    multiply_adds += side**2 * 2 * 64
    summary = summarize(UNetPaper(1, 2), (572, 572), 1)
    assert side == 388 and summary.multiply_adds == multiply_adds
    assert round(summary.multiply_adds / 1e9, 1) == 150.4
    assert summary.parameters == summary.trainable_parameters == 31_030_658
    assert summary.parameter_megabytes == 4 * 31_030_658 / 1e6
    assert summary.input_megabytes == 4 * 572 * 572 / 1e6
    assert summary.rows[-1].output_shape == (1, 2, 388, 388) and summary.rows[0].kernel == "3x3"


def test_layers_in_closed_form():
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 5), stride=2, padding=1, groups=2),  # 9 x 11 -> 5 x 5
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 3, 3, stride=2, bias=False),  # -> 11 x 11
        nn.Flatten(2),
        nn.Linear(121, 7),
        nn.Dropout(0.5),
    )
    model[5].weight.requires_grad_(False)
    summary = summarize(model, (9, 11), 4)
    rows = [(row.kind, row.kernel, row.output_shape, row.parameters, row.multiply_adds) for row in summary.rows]
    assert rows == [
        ("Conv2d", "3x5", (1, 6, 5, 5), 6 * 2 * 15 + 6, 25 * 6 * 2 * 15),
        ("BatchNorm2d", "", (1, 6, 5, 5), 12, 0),
        ("ReLU", "", (1, 6, 5, 5), 0, 0),
        ("ConvTranspose2d", "3x3", (1, 3, 11, 11), 6 * 3 * 9, 25 * 6 * 3 * 9),
        ("Flatten", "", (1, 3, 121), 0, 0),
        ("Linear", "", (1, 3, 7), 121 * 7 + 7, 3 * 121 * 7),
        ("Dropout", "", (1, 3, 7), 0, 0),
    ]
    assert [row.name for row in summary.rows] == list("0123456")
    assert summarize(model[0], (9, 11), 4).rows[0].name == "(model)"
    assert summary.multiply_adds == sum(row.multiply_adds for row in summary.rows)
    assert summary.parameters - summary.trainable_parameters == 121 * 7
    values = 150 + 150 + 363 + 363 + 21  # the ReLU works in place, and dropout does nothing here
    assert summary.activation_megabytes == 4 * values / 1e6


def test_attention_counts():
    dim, classes, patch, tokens = 24, 3, 8, 5 * 7
    model = ViTSegmenter(3, classes, 64, patch, dim=dim, num_blocks=2, num_heads=3, dropout=0.1)
    summary = summarize(model, (40, 56), 3)
    block = tokens * dim * (3 * dim + dim + 4 * dim + 4 * dim) + 2 * tokens**2 * dim
    assert summary.multiply_adds == tokens * dim * 3 * patch**2 + 2 * block + tokens * dim * classes * patch**2
    (attention, _) = [row for row in summary.rows if row.kind == "TransformerBlock"]
    assert attention.multiply_adds == 2 * tokens**2 * dim
    assert summary.rows[-1].parameters == model.positions.numel()


MODELS = [UNet(3, 2, 4, 3, "bilinear"), FCN(3, 2, 4, 8, 0.5), SegNet(3, 2, 4, True)]
MODELS.append(ViTSegmenter(3, 2, 32, 8, 16, 2, 2, 0.1))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_rows_add_up_and_the_model_stays_as_it_is(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    summary = summarize(model, (37, 50), 3)
    assert sum(row.parameters for row in summary.rows) == summary.parameters
    assert sum(row.multiply_adds for row in summary.rows) == summary.multiply_adds > 0
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.device.type == "cpu" and not value.is_meta for value in model.state_dict().values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    kinds = [row.kind for row in summary.rows]
    assert kinds.count("Unpool") == (4 if isinstance(model, SegNet) else 0)  # one layer, four calls, four rows


def test_format():
    summary = summarize(SegNet(3, 3, 64, True), (128, 128), 3)
    text = format_summary(summary)
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "kind", "kernel", "output", "shape", "parameters", "multiply-adds"]
    assert len(lines) == 1 + 1 + len(summary.rows) + 1 + 4
    assert "encoder.0.0" in text and "1 x 64 x 128 x 128" in text
    assert "parameters 1,749,671 (1,749,671 trainable)" in text and f"{summary.multiply_adds:,}" in text
    assert max(len(line) for line in lines) <= 120


class Sleeper(nn.Module):
    """Takes 5 ms, and each tenth time 40 ms; keeps the shape of its input and the dtype of a product."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.calls = []

    def forward(self, images):
        self.calls.append((tuple(images.shape), self.layer(images).dtype, torch.is_inference_mode_enabled()))
        time.sleep(0.04 if len(self.calls) % 10 == 0 else 0.005)
        return images


def test_latency():
    model = Sleeper()
    p50_ms, p95_ms = measure_latency(model, (8, 6), 3, CPU, "bf16", repeats=20)
    assert len(model.calls) == 23  # three to warm up
    assert set(model.calls) == {((1, 3, 8, 6), torch.bfloat16, True)}
    assert 5 <= p50_ms < 40 <= p95_ms
    measure_latency(model, (8, 6), 3, CPU, "fp32", repeats=1)
    assert model.calls[-1][1] == torch.float32


@pytest.mark.gpu
def test_latency_on_a_gpu_waits_for_the_work():
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(20))).cuda()
    small_ms, _ = measure_latency(model, (64, 64), 64, torch.device("cuda"), "fp32", repeats=20)
    large_ms, _ = measure_latency(model, (1024, 1024), 64, torch.device("cuda"), "fp32", repeats=20)
    assert large_ms > 4 * small_ms
