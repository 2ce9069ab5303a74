"""A pretended GPU: tensors that say they lie on cuda:0 or mps:0 while their data lie, and are computed on the CPU.

Scripts run on it as on a GPU: autocast casts as that device's does, operands on two devices raise, so does float64 on
mps, and it is counted, by place in the project, where the CPU would wait for the device and how many kernels start.
What it cannot show: speed, memory, how a GPU rounds.
"""

import functools
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch._dynamo  # which keeps torch.cuda's own functions: before they are replaced
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten
WAITING = {  # the size or the value of their result is read by the CPU
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount", "repeat_interleave",
    "unique2", "_unique2", "unique_dim",
}  # fmt: skip
VIEWS = {  # and memory that is only set aside: no kernel
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "new_empty", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
COPIES = {"copy_", "_to_copy", "copy", "_foreach_copy_"}
IN_TORCH = torch.device("cuda", 0)  # what torch's own code takes any pretended device for; without mps it has no other
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}


class PretendedTensor(torch.Tensor):
    """A tensor that says it lies on the pretended device; `data_on_cpu` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data_on_cpu: torch.Tensor):
        like = {name: getattr(data_on_cpu, name) for name in ("dtype", "layout")}
        like |= {"strides": data_on_cpu.stride(), "storage_offset": data_on_cpu.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, data_on_cpu.shape, device=IN_TORCH, **like)

    def __init__(self, data_on_cpu: torch.Tensor):
        self.data_on_cpu = data_on_cpu.detach()

    device = property(lambda self: PretendedDevice.current.device)
    is_cuda = property(lambda self: self.device.type == "cuda")
    is_mps = property(lambda self: self.device.type == "mps")

    def __repr__(self):
        return f"PretendedTensor({self.data_on_cpu!r})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = PretendedTensor(self.data_on_cpu.clone()).requires_grad_(self.requires_grad)
            memo[id(self)]._is_param = getattr(self, "_is_param", False)  # what makes it a Parameter
        return memo[id(self)]

    def __getitem__(self, index):  # torch would make a tensor of a list on the device, past the dispatcher
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def tolist(self):
        PretendedDevice.current.wait("tolist")
        return self.data_on_cpu.tolist()

    def new_tensor(self, data, dtype=None, device=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    @classmethod
    def __torch_dispatch__(cls, operator, kinds, args=(), kwargs=None):  # of other threads, which have no mode
        return PretendedDevice.current.run(operator, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """The device, for the time of a `with`, after which torch is as before.

    Args:
        kind: "cuda" or "mps", where autocast does nothing.
    Attributes:
        waits: {"item train_unet.py:12": how often the CPU waited there for the device}.
        kernels: {"train_unet.py:12": how many kernels started from there}.
    """

    current = None  # the one whose `with` is running

    def __init__(self, kind: str):
        super().__init__()
        self.device = torch.device(kind, 0)
        self.waits, self.kernels = Counter(), Counter()

    def __enter__(self):
        assert PretendedDevice.current is None
        torch._C._ensureCUDADeviceGuardSet()  # as torch's own FakeTensorMode does, for good
        PretendedDevice.current, self.patches = self, pytest.MonkeyPatch()
        self.replace_parts_of_torch(self.patches)
        # where torch sees a GPU of its own it would choose one of that GPU's kernels, which have no form for the CPU
        self.plain_attention = sdpa_kernel(SDPBackend.MATH)
        self.plain_attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.plain_attention.__exit__(*error)
        self.patches.undo()
        PretendedDevice.current = None

    def replace_parts_of_torch(self, patches: pytest.MonkeyPatch) -> None:
        """Replace what asks the driver or goes to the device past the dispatcher."""
        is_cuda = self.device.type == "cuda"
        for name, answer in {
            "is_available": is_cuda,
            "device_count": int(is_cuda),
            "current_device": 0,
            "is_bf16_supported": True,
            "get_device_name": "pretended GPU",
            "get_device_capability": (8, 0),
            "get_device_properties": types.SimpleNamespace(major=8, minor=0, name="", total_memory=24 * 2**30),
            "mem_get_info": (20 * 2**30, 24 * 2**30),
            "max_memory_allocated": 0,
            "reset_peak_memory_stats": None,
            "set_device": None,
            "manual_seed": None,
            "manual_seed_all": None,
            "_lazy_init": None,
        }.items():
            patches.setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
        patches.setattr(torch.cuda, "synchronize", lambda device=None: self.wait("synchronize"))
        patches.setattr(torch.mps, "synchronize", lambda: self.wait("synchronize"))
        patches.setattr(torch.mps, "manual_seed", lambda seed: None)
        has_mps = functools.wraps(torch.backends.mps.is_available)(lambda: not is_cuda)
        patches.setattr(torch.backends.mps, "is_available", has_mps)
        patches.setattr(torch.autograd, "backward", backward)
        for name in ("__enter__", "__exit__"):  # no subclass can wrap inference mode's tensors
            patches.setattr(torch.inference_mode, name, getattr(torch.no_grad, name))
        for name in ("tensor", "as_tensor"):
            patches.setattr(torch, name, self.make_on_cpu_first(getattr(torch, name)))
        real_to = torch.Tensor.to

        def move(tensor, *args, **kwargs):
            args, kwargs = tree_map(lambda value: IN_TORCH if self.is_here(value) else value, (args, kwargs))
            return real_to(tensor, *args, **kwargs)

        patches.setattr(torch.Tensor, "to", move)
        patches.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)

    def make_on_cpu_first(self, make):
        def make_tensor(data, *, dtype=None, device=None, **keys):
            made = make(data, dtype=dtype, **keys)
            return made if device is None else made.to(device)

        return make_tensor

    def __torch_dispatch__(self, operator, kinds, args=(), kwargs=None):
        return self.run(operator, args, kwargs or {})

    def is_here(self, value) -> bool:
        """Tell whether a value is a device, or its name, and this one."""
        return isinstance(value, (str, torch.device)) and torch.device(value).type in (self.device.type, IN_TORCH.type)

    def wait(self, why: str) -> None:
        """Count that the CPU waits for the device."""
        self.waits[f"{why} {find_place()}"] += 1

    def run(self, operator, args: tuple, kwargs: dict):
        """Run an operator as the device would: refuse what it refuses, count, and compute on the CPU."""
        name = operator._schema.name.removeprefix("aten::")
        here = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, PretendedTensor)]
        device = kwargs.get("device")
        is_result_here = bool(here) if device is None else self.is_here(device)
        if name == "_fused_sdp_choice":
            return 0  # the kernel made of plain operators
        if name == "_pin_memory":
            return args[0]  # what copies without waiting says non_blocking=True
        if not here and not is_result_here:
            return operator(*args, **kwargs)
        self.refuse(name, args, kwargs, is_result_here)
        self.count(name, args, kwargs, here, is_result_here)

        def to_cpu(value):
            if isinstance(value, PretendedTensor):
                return value.data_on_cpu
            return torch.device("cpu") if isinstance(value, torch.device) and self.is_here(value) else value

        def to_device(value):
            is_plain = isinstance(value, torch.Tensor) and not isinstance(value, PretendedTensor)
            return PretendedTensor(value) if is_plain and is_result_here and value.device.type != "meta" else value

        with _disable_current_modes():
            compute = ONLY_ON_CUDA.get(name, operator)
            results = compute(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        arguments, returns = operator._schema.arguments, operator._schema.returns
        if returns and all(value.alias_info is not None and value.alias_info.is_write for value in returns):
            written = [  # operators in place, and those with out=, return what they were given
                args[place] if place < len(args) else kwargs[argument.name]
                for place, argument in enumerate(arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            return written[0] if len(returns) == 1 else tuple(written)
        return tree_map(to_device, results)

    def refuse(self, name: str, args: tuple, kwargs: dict, is_result_here: bool) -> None:
        """Raise what the device would, for float64 on mps and for tensors of the CPU among the operands."""
        tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
        if self.device.type == "mps":
            is_float64 = is_result_here and kwargs.get("dtype") == torch.float64
            if is_float64 or any(tensor.dtype == torch.float64 for tensor in here):
                raise TypeError(f"mps has no float64: {name} at {find_place()}")
        if not here or name in COPIES:
            return
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor) and tensor.dim() > 0]
        if name in INDEXING and isinstance(args[0], PretendedTensor):  # indices may lie on the CPU
            on_cpu = [value for value in args[2:3] if not isinstance(value, PretendedTensor) and value.dim() > 0]
        if on_cpu:
            shapes = [tuple(tensor.shape) for tensor in on_cpu]
            raise RuntimeError(f"tensors on {self.device} and on cpu, {shapes}: {name} at {find_place()}")

    def count(self, name: str, args: tuple, kwargs: dict, here: list, is_result_here: bool) -> None:
        """Count where the CPU waits, and kernels."""
        if name in WAITING and here:
            self.wait(name.removeprefix("_").removesuffix("_scalar_dense").replace("local", "item"))
        if name in INDEXING and here:
            for index in args[1]:
                if isinstance(index, PretendedTensor) and index.dtype in (torch.bool, torch.uint8):
                    self.wait("index by bool")
                elif isinstance(index, torch.Tensor) and not isinstance(index, PretendedTensor):
                    self.wait("index from the CPU")
        if name == "_to_copy" and not kwargs.get("non_blocking"):
            if bool(here) != is_result_here:
                self.wait("copy to the device" if is_result_here else "copy to the CPU")
        if name == "copy_" and isinstance(args[0], PretendedTensor) != isinstance(args[1], PretendedTensor):
            if not (args[2:] or [kwargs.get("non_blocking")])[0]:
                self.wait("copy_")
        if name not in VIEWS:
            self.kernels[find_place()] += 1


def copy_to_cpu(nested):
    """Put the data of pretended tensors in their place, in nested dicts, lists and tuples; nothing is counted."""
    return tree_map(lambda value: value.data_on_cpu if isinstance(value, PretendedTensor) else value, nested)


def find_place() -> str:
    """Name the innermost line of the project that is being executed: "train_unet.py:12"."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and path != __file__ and "site-packages" not in path:
            return f"{Path(path).relative_to(ROOT).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the project"


# ---------------------------------------------------------------------------------------------------------------------
# what torch cannot do without the device itself


def backward(tensors, grad_tensors=None, *args, **kwargs) -> None:
    """Add up gradients as torch's own engine does, which has no thread for a device that is not there."""
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    for tensor, gradient in zip(tensors, grad_tensors or [torch.ones_like(tensor) for tensor in tensors], strict=True):
        _send_back(tensor, gradient)


@torch.no_grad()
def _send_back(tensor: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add to the leaves what the gradient of one tensor gives them."""
    gradients = {tensor.grad_fn: {tensor.output_nr: gradient}}
    for node in reversed(list_nodes(tensor.grad_fn)):
        if node not in gradients:
            continue
        of_outputs = gradients.pop(node)
        if type(node).__name__ == "AccumulateGrad":
            leaf, gradient = node.variable, of_outputs[0]
            leaf.grad = gradient.clone() if leaf.grad is None else leaf.grad + gradient
            continue
        of_inputs = node(*(of_outputs.get(place) for place in range(len(node._input_metadata))))
        of_inputs = of_inputs if isinstance(of_inputs, (tuple, list)) else (of_inputs,)
        for (before, place), gradient in zip(node.next_functions, of_inputs, strict=False):
            if before is None or gradient is None:
                continue
            is_leaf = type(before).__name__ == "AccumulateGrad"
            like = before.variable if is_leaf else before._input_metadata[place]
            is_here = isinstance(gradient, PretendedTensor)
            assert is_here == (like.device.type != "cpu"), f"a gradient on {gradient.device} in {before}"
            gradient = gradient.sum_to_size(tuple(like.shape)).to(like.dtype)
            sums = gradients.setdefault(before, {})
            sums[place] = sums[place] + gradient if place in sums else gradient


def list_nodes(last) -> list:
    """List the nodes of autograd's graph up to the last one, each after those that it follows from."""
    ordered, seen, waiting = [], set(), [(last, False)]
    while waiting:
        node, is_done = waiting.pop()
        if is_done:
            ordered.append(node)
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(before, False) for before, _ in node.next_functions if before is not None]
    return ordered


def softmax_to_fp32(operator):
    return lambda x, dim, is_to_fp32: operator(x.float() if is_to_fp32 else x, dim, False)


def softmax_backward_from_fp32(operator):
    return lambda gradient, out, dim, dtype: operator(gradient, out, dim, out.dtype).to(dtype)


def cudnn_batch_norm(x, weight, bias, mean, variance, is_training, momentum, eps):
    results = aten.native_batch_norm.default(x, weight, bias, mean, variance, is_training, momentum, eps)
    return *results, x.new_empty(0, dtype=torch.uint8)


def cudnn_batch_norm_backward(x, gradient, weight, mean, variance, saved_mean, saved_variance, eps, reserve):
    saved = mean, variance, saved_mean, saved_variance
    return aten.native_batch_norm_backward.default(gradient, x, weight, *saved, True, eps, [True, True, True])


ONLY_ON_CUDA = {  # operators, or forms of them, that the CPU lacks
    "_softmax": softmax_to_fp32(aten._softmax.default),
    "_log_softmax": softmax_to_fp32(aten._log_softmax.default),
    "_softmax_backward_data": softmax_backward_from_fp32(aten._softmax_backward_data.default),
    "_log_softmax_backward_data": softmax_backward_from_fp32(aten._log_softmax_backward_data.default),
    "cudnn_batch_norm": cudnn_batch_norm,
    "cudnn_batch_norm_backward": cudnn_batch_norm_backward,
}
