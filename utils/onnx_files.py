"""Write ONNX files, and hold them against PyTorch. The packages are an extra that only exporting needs."""

import importlib
import io
import math
import os
import warnings
from pathlib import Path

import torch
from torch import nn

from utils.run import now_s

PACKAGES = ("onnx", "onnxruntime")
OPSET = 17  # has LayerNormalization; onnxruntime 1.12 (2022) and newer read it
MOST_BYTES = 2 * 10**9  # protobuf's limit is 2 GiB
MOST_DIFFERENCE = 1e-3  # of an output's peak: a file that differs by more is wrong; rounding is a thousandth of that

Dims = list[int | str]  # of a tensor; what is named may be of any length


def check_packages() -> None:
    """Raise a ValueError that names the packages which mode=export lacks, if any."""
    missing, reasons = [], []
    for name in PACKAGES:
        try:
            package = importlib.import_module(name)
        except ImportError as error:
            missing.append(name)
            reasons.append(" ".join(str(error).split()))
            continue
        if package.__file__ is None:  # a folder of that name, which Python takes for a package
            missing.append(name)
    if missing:
        raise ValueError(
            f"mode=export needs packages that cannot be imported: pip install {' '.join(missing)}"
            + (f" ({'; '.join(reasons)})" if reasons else "")
        )


def write_onnx(
    path: Path,
    module: nn.Module,
    inputs: dict[str, tuple[torch.Tensor, Dims]],
    outputs: dict[str, Dims],
    properties: dict[str, str],
) -> None:
    """Write what a module computes, its weights included, as an ONNX file, whole or not at all.

    Args:
        module: on the CPU, in eval mode; takes the inputs by position and gives a tensor, or a tuple of them.
        inputs: {name: (an example, its dimensions)}, in order.
        outputs: {name: its dimensions}, in order.
        properties: what a reader of the file should know, {name: text}.
    Raises:
        ValueError: for more weights than a file can hold.
    """
    import onnx

    num_bytes = sum(values.numel() * values.element_size() for values in module.state_dict().values())
    if num_bytes > MOST_BYTES:
        raise ValueError(
            f"{path.name} needs {num_bytes / 1e9:.1f} GB; an ONNX file holds {MOST_BYTES / 1e9:.1f} GB: "
            "take a smaller model"
        )

    dims = {name: dims for name, (_, dims) in inputs.items()} | outputs
    named = {name: {axis: dim for axis, dim in enumerate(dims[name]) if isinstance(dim, str)} for name in dims}
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a branch that an assertion takes, and that a newer exporter is there
        torch.onnx.export(
            module,
            tuple(example for example, _ in inputs.values()),
            file,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: axes for name, axes in named.items() if axes},
            opset_version=OPSET,
            dynamo=False,  # by tracing: the other exporter cannot say that an output's length depends on a value
        )
    proto = onnx.load_from_string(file.getvalue())
    del proto.graph.value_info[
        :
    ]  # shapes in between, of which a reader finds its own; the exporter's are not all right
    for output in proto.graph.output:
        for dim, length in zip(output.type.tensor_type.shape.dim, dims[output.name], strict=True):
            if isinstance(length, int):
                dim.dim_value = length
            else:
                dim.dim_param = length
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto)
    partial = path.with_name(path.name + ".tmp")
    onnx.save(proto, str(partial))
    os.replace(partial, path)


def compare_with_torch(path: Path, module: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Run a file in onnxruntime and its module in PyTorch, on the CPU with as many threads.

    Args:
        inputs: {name: values}, in the order of the module's.
    Returns:
        difference: the largest of any output, as a share of that output's peak; onnxruntime_ms, torch_ms: of the second
        run.
    Raises:
        ValueError: for a difference that is not rounding.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    values, cpu = {name: tensor.numpy() for name, tensor in inputs.items()}, torch.device("cpu")
    with torch.no_grad():
        for _ in range(2):  # the first run plans its memory
            started = now_s(cpu)
            answers = [torch.from_numpy(answer) for answer in session.run(None, values)]
            between = now_s(cpu)
            expected = module(*inputs.values())
            ended = now_s(cpu)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    differences = [
        float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
        for ours, theirs in zip(answers, expected, strict=True)
    ]
    worst = math.nan if any(map(math.isnan, differences)) else max(differences)
    if not worst <= MOST_DIFFERENCE:
        raise ValueError(
            f"{path.name} gives values in onnxruntime that are off PyTorch's by {worst:.1e} of their peak; must be at "
            f"most {MOST_DIFFERENCE:g}: it is not usable, other versions of torch and onnxruntime may be"
        )
    return {"difference": worst, "onnxruntime_ms": 1e3 * (between - started), "torch_ms": 1e3 * (ended - between)}


def describe_comparison(path: Path, measured: dict[str, float]) -> str:
    """Say in a line how a file compares with PyTorch."""
    return (
        f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, off PyTorch by {measured['difference']:.0e} of the peak; "
        f"{measured['onnxruntime_ms']:.1f} ms in onnxruntime, {measured['torch_ms']:.1f} ms in PyTorch (CPU, threads: "
        f"{torch.get_num_threads()})"
    )
