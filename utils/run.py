"""What every script needs around its own work: device, precision, seed, order of samples, learning rate."""

import contextlib
import functools
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from utils import ranks

MOST_THREADS = 8  # a mask at full size for each
REPOSITORY = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------------------------
# where and how to compute


def set_up_device(device_name: str, precision_name: str) -> tuple[torch.device, str]:
    """Choose the device and the precision of a run, and set the process up for them: what every script calls.

    The numbered CUDA device becomes the current one, for all that asks for no other. What is computed in fp32 is so
    throughout: not in TF32, which rounds factors to 11 bits, and is PyTorch's default in convolutions.

    Args, Raises: as those of `choose_device` and `choose_precision`.
    """
    device = choose_device(ranks.own_device(device_name))
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    precision = choose_precision(precision_name, device)
    if precision_name == "auto" and precision == "fp16":
        print(f"precision=auto is fp16 here: {torch.cuda.get_device_name(device)} does not compute in bf16")
    return device, precision


def choose_device(name: str) -> torch.device:
    """Turn the setting `device` into a device that this machine has.

    Args:
        name: "auto" (cuda, then mps, then cpu), "cpu", "mps", "cuda" or "cuda:<number>".
    Raises:
        ValueError: for another name, and for a device that is not there: only "auto" ever falls back.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(name)):
        raise ValueError(f"device is {name}; must be auto, cpu, mps, cuda or cuda:<number>")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name}; PyTorch finds no CUDA device here: use device=auto or device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name}; this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device is {name}; PyTorch finds no Apple GPU here: use device=auto or device=cpu")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Turn the setting `precision` into "fp32", "bf16" or "fp16".

    Args:
        name: one of those three, or "auto": bf16 on a CUDA device that computes in it, fp16 on others, fp32 elsewhere.
        device: of CUDA's, the current one.
    Raises:
        ValueError: for another name, and for bf16 on a CUDA device that only emulates it.
    """
    if name not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision is {name}; must be auto, fp32, bf16 or fp16")
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "fp32" if device.type != "cuda" else "bf16" if has_bf16 else "fp16"
    if name == "bf16" and not has_bf16:
        raise ValueError(f"precision is bf16; {torch.cuda.get_device_name(device)} lacks it: use fp16 or fp32")
    return name


def choose_channels_last(is_wanted: bool, device: torch.device) -> bool:
    """Turn the setting `train.channels_last` into whether tensors lie so in memory: never on mps.

    There, gradients of batch norm were wrong with it up to June 2026 (PyTorch's issue 175189).
    """
    if is_wanted and device.type == "mps":
        print(
            "train.channels_last=true is ignored on mps, where PyTorch's gradients of batch norm may be wrong with it"
        )
    return is_wanted and device.type != "mps"


def may_overlap(device: torch.device) -> bool:
    """Tell whether tensors may be on their way to a device while the program goes on (`non_blocking`): to CUDA's alone.

    On mps, a copy can read its source after that has been freed (PyTorch's issue 189690).
    """
    return device.type == "cuda"


def compile_forward(module: torch.nn.Module, device: torch.device) -> Callable:
    """Make a compiled form of a module's forward, for training: the module itself stays plain.

    Pictures have one size in training, and a compiled form of it is made once. In evaluation each size would need one.

    Raises:
        ValueError: where the system has no compiler, which PyTorch calls.
    """
    variable, names = ("CC", ["gcc", "clang", "cc"]) if device.type == "cuda" else ("CXX", ["g++"])
    names = [os.environ[variable]] if variable in os.environ else names
    if sys.platform != "win32" and not any(map(shutil.which, names)):
        raise ValueError(
            f"train.compile is true; must be false where there is no compiler ({' or '.join(names)}): install one, or "
            f"name yours in the environment variable {variable}"
        )
    return torch.compile(module.forward)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context for the forward pass; with "fp32" it does nothing.

    Args:
        precision: "fp32", "bf16" or "fp16", as `choose_precision` returns it.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def choose_num_workers(value: int | str) -> int:
    """Turn the setting `num_workers` into a number of data-loading processes.

    Args:
        value: 0 (load in the main process) or more, or "auto": one less than the cores this process may use
            (its share of them, where several train), at most 8.
    Raises:
        ValueError: for anything else.
    """
    if value == "auto":
        return max(0, min(8, num_cores() // ranks.local_count() - 1))
    if type(value) is not int or value < 0:
        raise ValueError(f"num_workers is {value}; must be auto, 0 or a positive whole number")
    return value


def now_s(device: torch.device) -> float:
    """Read the clock, in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def start_threads() -> ThreadPoolExecutor:
    """Start threads for work on masks at full size; OpenCV and numpy let several run at once."""
    return ThreadPoolExecutor(min(MOST_THREADS, torch.get_num_threads()))


def read_ahead(read: Callable, arguments: Iterable) -> Iterator[Future]:
    """Call a function on each argument in turn, in a thread that is one call ahead of what is asked for.

    Yields:
        the calls in their order; `result()` waits for one, and raises what it has raised.
    """
    with ThreadPoolExecutor(1) as thread:
        calls = (thread.submit(read, argument) for argument in arguments)
        current = next(calls, None)
        while current is not None:
            following = next(calls, None)
            yield current
            current = following


def num_cores() -> int:
    """Count the cores this process may use: in a container or under `taskset`, fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# randomness and schedules: functions of (seed, index) or of the step, so that resuming needs no stored state


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and random: weights made from scratch, not data and dropout (see below).

    Args:
        seed: 0 to 2**32 - 1.
    Raises:
        ValueError: outside that range.
    """
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; must be a whole number from 0 to 2**32 - 1")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def sample_rng(seed: int, sample_index: int) -> np.random.Generator:
    """Make the random generator of one training sample: all its choices follow from (seed, sample_index).

    Args:
        sample_index: position in the endless stream of samples, from 0.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, sample_index)))


def shuffled_item(seed: int, sample_index: int, num_items: int) -> int:
    """Find which item a training sample shows: each epoch is one pass over all items, in an order of its own.

    Args:
        sample_index: position in the endless stream of samples, from 0.
        num_items: items in the dataset, at least 1.
    Returns:
        the item's number, 0..num_items-1.
    """
    epoch, position = divmod(sample_index, num_items)
    return int(_epoch_order(seed, epoch, num_items)[position])


@functools.lru_cache(maxsize=4)  # samples come nearly in order, so this is drawn once an epoch in each worker
def _epoch_order(seed: int, epoch: int, num_items: int) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, epoch)))
    return rng.permutation(num_items)


def seed_dropout(seed: int, step: int, micro_step: int) -> None:
    """Seed torch on every device before a forward, so that its dropout follows from these three alone.

    Args:
        step: updates already done.
        micro_step: which of this process's forwards of the step, from 0.
    """
    forward = micro_step * ranks.count() + ranks.rank()  # of all forwards of the step, as if one process did them
    words = np.random.SeedSequence(seed, spawn_key=(2, step, forward)).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def cosine_lr(step: int, steps: int, lr: float, warmup_steps: int, min_lr_factor: float) -> float:
    """Compute the learning rate of the update that follows `step` done ones: linear warm-up, then half a cosine.

    Args:
        step: updates already done, 0..steps-1.
        steps: updates in the whole run.
        lr: the highest rate, reached first at step == warmup_steps.
        warmup_steps: length of the rise; its first update uses lr / (warmup_steps + 1), not 0. 0: no rise.
        min_lr_factor: the rate at step == steps is lr * min_lr_factor.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))  # 0..1 from the peak to the end
    return lr * (min_lr_factor + (1 - min_lr_factor) * 0.5 * (1 + math.cos(math.pi * progress)))
