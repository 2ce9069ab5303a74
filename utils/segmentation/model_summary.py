"""What a network costs: a table of its layers with parameters and multiply-adds, memory, and latency on a device.

Multiply-adds are those of convolutions, linear layers and attention, counted by PyTorch's own flop counter (two flops
each) from the operations really done; biases, norms, activations, pooling and resizing count as none.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from utils.run import autocast, now_s

MEGABYTE = 1_000_000  # bytes


@dataclass(frozen=True)
class LayerRow:
    """One layer as it ran on one picture."""

    name: str  # as in model.named_modules(), "(model)" for the model itself
    kind: str  # class name
    kernel: str  # such as "3x3", "" where there is none
    output_shape: tuple[int, ...]  # with a batch of 1
    parameters: int  # its own, without those of layers inside it
    multiply_adds: int  # likewise


@dataclass(frozen=True)
class ModelSummary:
    """The rows in the order they ran, and totals for one picture in fp32 (4 bytes a value)."""

    rows: list[LayerRow]
    input_shape: tuple[int, ...]
    parameters: int
    trainable_parameters: int
    multiply_adds: int
    input_megabytes: float
    activation_megabytes: float  # outputs of all rows, without in-place ones: about what training keeps for backward
    parameter_megabytes: float


def summarize(model: nn.Module, image_size_hw: tuple[int, int], in_channels: int) -> ModelSummary:
    """Count what one picture of a given size costs, layer by layer, without computing anything.

    Args:
        model: stays as it is: a copy without values runs (device "meta").
        image_size_hw: (H, W) of the picture, pixels.
    Raises:
        ValueError: for a size that the model does not take.
    """
    input_shape = (1, in_channels, *image_size_hw)
    rows, num_values = [], []
    counter = FlopCounterMode(display=False)
    own_flops = []  # one for each call of a module that has ended
    unassigned = []  # one for each call that runs: the flops before it that no ended call has

    def start(module, inputs):
        unassigned.append(counter.get_total_flops() - sum(own_flops))

    def finish(module, inputs, outputs):
        own_flops.append(counter.get_total_flops() - sum(own_flops) - unassigned.pop())
        own_parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        is_leaf = next(module.children(), None) is None
        if is_leaf or own_flops[-1] or own_parameters:  # attention, for one, is done by the block itself
            output = outputs[0] if isinstance(outputs, tuple) else outputs  # pooling may give indices too
            num_values.append(0 if output is inputs[0] else output.numel())  # in-place layers make nothing new
            name, kind, shape = names[module] or "(model)", type(module).__name__, tuple(output.shape)
            rows.append(LayerRow(name, kind, _kernel(module), shape, own_parameters, own_flops[-1] // 2))

    meta_model = copy.deepcopy(model).to("meta").eval()
    names = {module: name for name, module in meta_model.named_modules()}
    for module in meta_model.modules():
        module.register_forward_pre_hook(start)
        module.register_forward_hook(finish)
    # Attention by plain products, which the counter knows, whatever PyTorch would choose.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        meta_model(torch.empty(input_shape, device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelSummary(
        rows=rows,
        input_shape=input_shape,
        parameters=parameters,
        trainable_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        multiply_adds=counter.get_total_flops() // 2,
        input_megabytes=4 * torch.Size(input_shape).numel() / MEGABYTE,
        activation_megabytes=4 * sum(num_values) / MEGABYTE,
        parameter_megabytes=4 * parameters / MEGABYTE,
    )


def _kernel(module: nn.Module) -> str:
    size = getattr(module, "kernel_size", None)
    if size is None:
        return ""
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height}x{width}"


def format_summary(summary: ModelSummary) -> str:
    """Write a summary as a table: layer, kind, kernel, output shape, parameters, multiply-adds; then the totals."""
    header = ("layer", "kind", "kernel", "output shape", "parameters", "multiply-adds")
    table = [header]
    for row in summary.rows:
        counts = [f"{number:,}" if number else "-" for number in (row.parameters, row.multiply_adds)]
        table.append((row.name, row.kind, row.kernel, " x ".join(map(str, row.output_shape)), *counts))
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    lines = []
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line[:4], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(line[4:], widths[4:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(len(line) for line in lines)
    lines.insert(1, rule)
    totals = [
        f"input {' x '.join(map(str, summary.input_shape))}",
        f"parameters {summary.parameters:,} ({summary.trainable_parameters:,} trainable)",
        f"multiply-adds {summary.multiply_adds:,} ({summary.multiply_adds / 1e9:.3g} G)",
        f"fp32 megabytes: input {summary.input_megabytes:.2f}, activations {summary.activation_megabytes:.2f}, "
        f"parameters {summary.parameter_megabytes:.2f}",
    ]
    return "\n".join([*lines, rule, *totals])


def measure_latency(
    model: nn.Module,
    image_size_hw: tuple[int, int],
    in_channels: int,
    device: torch.device,
    precision: str,
    repeats: int,
) -> tuple[float, float]:
    """Measure how long one picture takes from tensor to logits, forward only, after warming up.

    Args:
        model: on the device, in evaluation mode.
        image_size_hw: (H, W) of the picture, pixels.
        precision: "fp32", "bf16" or "fp16", as `utils.run.choose_precision` returns it.
        repeats: timed passes, 1 or more; p95 means little below 20.
    Returns:
        p50 and p95, milliseconds.
    Raises:
        ValueError: for a size that the model does not take.
    """
    images = torch.rand(1, in_channels, *image_size_hw, generator=torch.Generator().manual_seed(0)).to(device)
    times_ms = []
    with torch.inference_mode(), autocast(device, precision):
        for attempt in range(max(3, repeats // 10) + repeats):
            start_s = now_s(device)
            model(images)
            elapsed_s = now_s(device) - start_s
            if attempt >= max(3, repeats // 10):  # the first passes choose algorithms and fill caches
                times_ms.append(1000 * elapsed_s)
    return tuple(np.percentile(times_ms, [50, 95]).tolist())
