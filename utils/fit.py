"""check=fit: does a training fit the device's memory, how fast would it be, and which setting would make it fit.

Found out by a few real steps of the script's own loop on the hardest item of the dataset, not by a formula.
"""

import contextlib
import copy
import ctypes
import functools
import gc
import io
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from utils.run import choose_device
from utils.settings import Rule, is_out_of_memory

Check = Annotated[bool | str, Rule(lambda setting: setting in (True, False, "fit"), "true, false or fit")]
STEPS = 2  # the first one is slower, and makes the optimizer's state
Change = dict[str, object]  # {a key such as "train.batch_size": its value}


@dataclass(frozen=True)
class Trial:
    """What the steps of one config took."""

    peak_bytes: int | None  # None: more than there is
    items_per_s: float | None
    batch_size: int
    obstacle: str = ""  # why there could be none


def check_fit(train: Callable, data: object, config: dict, changes: list[Change], items: str) -> float:
    """Try a config, print what it takes, and if that is too much, what each change takes; returns nan, as a check does.

    Args:
        train: the script's, called as train(config, run_dir, None, data): makes train.steps steps and returns the last
            row of its metrics.
        data: what the script listed; its training part is the hardest item alone.
        config: the whole resolved config.
        changes: what to try where it does not fit, the gentlest first; one of several keys is tried as a whole.
        items: "pictures" or "pairs".
    """
    device = choose_device(config["device"])
    free_bytes = read_free_memory(device)
    attempt = functools.partial(try_steps, train, data, config, device, free_bytes)
    trial = attempt({})
    print(f"fit: {STEPS} steps with a batch of {trial.batch_size} {items}: {describe(trial, free_bytes, items)}")
    if device.type == "cuda":
        print("later steps are several times as fast: CUDA's libraries choose their kernels at each new shape")
    trials = [trial]
    if fits(trial, free_bytes):
        trials.append(attempt({"train.batch_size": 1 if trial.batch_size > 1 else 2}))
    else:
        print("one change at a time, measured in the same way:")
        for change in changes:
            changed = attempt(change)
            print(f"  {show(change)}: {describe(changed, free_bytes, items)}")
            if "train.batch_size" in change:
                trials.append(changed)
        if trial.peak_bytes is None and len(trials) > 1 and fits(trials[1], free_bytes) and trial.batch_size > 2:
            trials.append(attempt({"train.batch_size": 2}))
    if limit := calculate_batch_size(trials, free_bytes):
        print(f"train.batch_size up to {limit} should fit (calculated from two batches that were measured)")
    return float("nan")


def try_steps(
    train: Callable, data: object, config: dict, device: torch.device, free_bytes: int, change: Change
) -> Trial:
    """Train a few steps with a changed config, and measure them.

    Raises:
        what `train` raises, but for a lack of memory, and a ValueError that a change leads to.
    """
    config = copy.deepcopy(config)
    config["train"] |= {"steps": STEPS, "log_every": 1}
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    config["train"]["accumulate"] = min(config["train"]["accumulate"], 2)  # more take no more memory
    batch_size = config["train"]["batch_size"]
    release_memory(device)
    reset_peak_memory(device)
    with tempfile.TemporaryDirectory() as folder, limit_memory(device, free_bytes):
        if "cache" in config and config["cache"] == "auto":
            config["cache"] = f"{folder}/cache"
        try:
            with contextlib.redirect_stdout(io.StringIO()) if change else contextlib.nullcontext():
                row = train(config, Path(folder) / "run", None, data)
        except Exception as error:
            if is_out_of_memory(error):
                return Trial(None, None, batch_size)
            if change and isinstance(error, ValueError):  # such as one picture a batch with batch norm
                return Trial(None, None, batch_size, str(error))
            raise
    items_per_s = next(value for name, value in row.items() if name.endswith("_per_s"))
    return Trial(read_peak_memory(device), items_per_s, batch_size)


def fits(trial: Trial, free_bytes: int) -> bool:
    """Tell whether a trial ran, and within the memory."""
    return trial.peak_bytes is not None and trial.peak_bytes <= free_bytes


def describe(trial: Trial, free_bytes: int, items: str) -> str:
    """Put what was measured into words."""
    if trial.obstacle:
        return f"cannot be: {trial.obstacle}"
    free = f"{free_bytes / 2**30:.2f} GiB free"
    if trial.peak_bytes is None:
        return f"out of memory, {free}: does not fit"
    verdict = "fits" if fits(trial, free_bytes) else "does not fit"
    return (
        f"peak {trial.peak_bytes / 2**30:.2f} GiB of {free}: {verdict}; {trial.batch_size / trial.items_per_s:.2f} s a "
        f"batch, {trial.items_per_s:.2f} {items}/s"
    )


def show(change: Change) -> str:
    """Write a change as on the command line; a model's keys are its name alone."""
    is_model = "model.name" in change
    shown = {key: value for key, value in change.items() if not is_model or key == "model.name"}
    return " ".join(f"{key.removesuffix('.name')}={'null' if value is None else value}" for key, value in shown.items())


def calculate_batch_size(trials: list[Trial], free_bytes: int) -> int | None:
    """Calculate the largest batch that fits, where memory grows by the same amount with each item; None: unknown."""
    measured = sorted({(t.batch_size, t.peak_bytes) for t in trials if t.peak_bytes is not None})
    if len(measured) < 2 or measured[-1][0] == measured[0][0]:
        return None
    (few, least), (many, most) = measured[0], measured[-1]
    of_each = (most - least) / (many - few)
    return max(0, int(few + (free_bytes - least) / of_each)) if of_each > 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# memory: the device's own on CUDA and mps, else what is resident of this process


def read_free_memory(device: torch.device) -> int:
    """Read how much of the device's memory this process can have, bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [2**63]
    with contextlib.suppress(OSError, StopIteration):  # Linux: what others use is not free
        limits.append(_read_kib("/proc/meminfo", "MemAvailable") + _read_kib("/proc/self/status", "VmRSS"))
    with contextlib.suppress(OSError, ValueError):  # a container's
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def _read_kib(path: str, name: str) -> int:
    """Read a line such as "VmHWM:  1024 kB" of a file of the system, in bytes."""
    return int(next(line for line in Path(path).read_text().splitlines() if line.startswith(name)).split()[1]) * 1024


@contextlib.contextmanager
def limit_memory(device: torch.device, num_bytes: int):
    """Let a CPU's allocations fail above so many bytes, instead of the system ending the process (Linux)."""
    if device.type != "cpu" or not Path("/proc/self/status").exists():
        yield
        return
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_DATA)
    # what is set aside but not resident counts against this limit, not against `num_bytes`
    idle_bytes = _read_kib("/proc/self/status", "VmData") - _read_kib("/proc/self/status", "RssAnon")
    resource.setrlimit(resource.RLIMIT_DATA, (max(0, idle_bytes) + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def release_memory(device: torch.device) -> None:
    """Give back what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of glibc
        ctypes.CDLL(None).malloc_trim(0)


def has_peak_memory(device: torch.device) -> bool:
    """Tell whether the peak of memory can be reset and read: on CUDA, and on Linux."""
    return device.type == "cuda" or Path("/proc/self/clear_refs").exists()


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak of memory be what is held now."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def read_peak_memory(device: torch.device) -> int:
    """Read the peak of memory since the last reset, bytes; on mps what is held now, elsewhere than on Linux since the
    start.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    with contextlib.suppress(OSError):
        return _read_kib("/proc/self/status", "VmHWM")
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
