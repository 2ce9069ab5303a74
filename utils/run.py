"""What every script needs around its own work: settings, device, precision, seed, learning rate, records of a run."""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Sampler

REPOSITORY = Path(__file__).resolve().parent.parent
RECORDED_PACKAGES = (
    "torch", "torchvision", "numpy", "opencv-python-headless", "opencv-python", "hydra-core", "omegaconf", "sam2",
)  # fmt: skip


TYPE_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", type(None): "null",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# settings: from YAML, whose values can be anything, to typed dataclasses


def read_settings(cls: type, section: dict, name: str):
    """Build a settings dataclass from a section of the config, with exactly its keys and values of its types.

    Args:
        cls: a dataclass; its annotations are int, float (whole numbers too), bool, str, list, list[X] and X | None.
        section: {key: value}, plain types.
        name: the section's name in messages, such as "train"; "" for keys at the top of the config.
    Returns:
        cls(**section).
    Raises:
        ValueError: for an unknown key, a missing one, or a value of another type, naming it as section.key.
    """
    prefix = f"{name}." if name else ""
    if not isinstance(section, dict):
        raise ValueError(f"{name} is {section!r}; must be a section of keys and values")
    kinds = {field.name: kind for field, kind in _annotated_fields(cls)}
    for key in section:
        if key not in kinds:
            raise ValueError(f"unknown key {prefix}{key}; must be among {', '.join(prefix + known for known in kinds)}")
    for field, kind in _annotated_fields(cls):
        if field.name in section:
            check_type(section[field.name], kind, prefix + field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"the config lacks {prefix}{field.name}; must be {_describe_type(kind)}")
    return cls(**section)


def check_keys(function, keys: dict, name: str) -> None:
    """Raise a ValueError for keyword arguments that a function does not take, or lacks, naming them as section.key.

    Args:
        function: a function or class; bind what is no key of the config with `functools.partial` before.
        keys: {key: value}, to be passed as function(**keys).
        name: the section's name in messages, such as "data".
    """
    parameters = inspect.signature(function).parameters.values()
    known = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    for key in keys:
        if key not in known and not takes_all:
            raise ValueError(f"unknown key {name}.{key}; must be among {', '.join(f'{name}.{one}' for one in known)}")
    for one in parameters:
        if one.default is one.empty and one.kind is not one.VAR_KEYWORD and one.name not in keys:
            raise ValueError(f"the config lacks {name}.{one.name}")


def check_type(value, kind: type, name: str) -> None:
    """Raise a ValueError, naming the key, its value and what it must be, for a value that is not of a type.

    Args:
        kind: an annotation, as those of `read_settings`. True and False are no whole numbers, though Python says so.
        name: the dotted key, such as "train.steps".
    """
    if not _is_of_type(value, kind):
        raise ValueError(f"{name} is {value!r}; must be {_describe_type(kind)}")


def _annotated_fields(cls: type) -> list[tuple[dataclasses.Field, type]]:
    kinds = typing.get_type_hints(cls)
    return [(field, kinds[field.name]) for field in dataclasses.fields(cls)]


def _is_of_type(value, kind: type) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is_of_type(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of_type(item, typing.get_args(kind)[0]) for item in value)
    return type(value) in (int, float) if kind is float else type(value) is kind


def _describe_type(kind: type) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_describe_type(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list, each {_describe_type(typing.get_args(kind)[0])}"
    return TYPE_WORDS[kind]


def dataset_folder(root: str | Path) -> Path:
    """Turn the setting `data.root` into a folder that is there.

    Raises:
        ValueError, FileNotFoundError: for what is no path, or no folder.
    """
    if not isinstance(root, (str, Path)):
        raise ValueError(f"data.root is {root!r}; must be a folder")
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"data.root {root} is not a folder (seen from {Path.cwd()}); set data.root to the dataset's folder, "
            "or data_root (environment variable DATA_ROOT) to the folder that holds your datasets"
        )
    return Path(root)


def first_few(lines: list[str], most: int | None) -> list[str]:
    """Keep the first lines of a list that may be long, and say how many more there are; None keeps all."""
    if most is None or len(lines) <= most:
        return lines
    return [*lines[:most], f"... and {len(lines) - most} more"]


def describe_error(error: Exception) -> str:
    """Turn an error into what a user reads; one from a data-loading process comes with its whole traceback."""
    message = str(error).strip()
    return message.splitlines()[-1] if message.startswith("Caught ") else message


# ---------------------------------------------------------------------------------------------------------------------
# where and how to compute


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
        name: one of those three, or "auto": bf16 on a CUDA device that computes in it, else fp32.
    Raises:
        ValueError: for another name, and for bf16 on a CUDA device that only emulates it.
    """
    if name not in ("auto", "fp32", "bf16", "fp16"):
        raise ValueError(f"precision is {name}; must be auto, fp32, bf16 or fp16")
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bf16" if device.type == "cuda" and has_bf16 else "fp32"
    if name == "bf16" and not has_bf16:
        raise ValueError(f"precision is bf16; {torch.cuda.get_device_name(device)} lacks it: use fp16 or fp32")
    return name


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
        value: 0 (load in the main process) or more, or "auto": one less than the cores this process may use, at most 8.
    Raises:
        ValueError: for anything else.
    """
    if value == "auto":
        return min(8, num_cores() - 1)
    if type(value) is not int or value < 0:
        raise ValueError(f"num_workers is {value}; must be auto, 0 or a positive whole number")
    return value


def num_cores() -> int:
    """Count the cores this process may use: in a container or under `taskset`, fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# randomness and schedules: functions of (seed, index) or of the step, so that resuming needs no stored state


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and random: weights made from scratch and dropout, not data (`sample_rng`).

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


def shuffled_item(seed: int, sample_index: int, num_items: int) -> tuple[int, int]:
    """Find which item a training sample shows: each epoch is one pass over all items, in an order of its own.

    Args:
        sample_index: position in the endless stream of samples, from 0.
        num_items: items in the dataset, at least 1.
    Returns:
        (epoch, item): epoch from 0, item in 0..num_items-1.
    """
    epoch, position = divmod(sample_index, num_items)
    return epoch, int(_epoch_order(seed, epoch, num_items)[position])


def draw_validation(names: set[str], val_fraction: float, split_seed: int) -> set[str]:
    """Draw a fraction of names by a seeded order of them: a new name does not reshuffle the others.

    Raises:
        ValueError: for a fraction outside 0..1, and for a single name to divide.
    """
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"data.val_fraction is {val_fraction}; must be in 0..1")
    num_val = round(val_fraction * len(names))
    if 0 < val_fraction < 1 and names:
        if len(names) == 1:
            raise ValueError(
                f"data.val_fraction is {val_fraction}, but there is only {min(names)} to split; "
                "set data.val_fraction=0 to train on all, or 1 to only evaluate"
            )
        num_val = min(max(num_val, 1), len(names) - 1)
    in_seeded_order = sorted(names, key=lambda name: hashlib.sha256(f"{split_seed} {name}".encode()).digest())
    return set(in_seeded_order[:num_val])


@functools.lru_cache(maxsize=4)  # samples come nearly in order, so this is drawn once an epoch in each worker
def _epoch_order(seed: int, epoch: int, num_items: int) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, epoch)))
    return rng.permutation(num_items)


class SampleCounter(Sampler):
    """Yield sample_index = start, start + 1, ... up to stop (not included), or without end.

    The dataset derives item and random choices from the index, so a run resumes at start = the samples already used.
    """

    def __init__(self, start: int, stop: int | None = None):
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        sample_index = self.start
        while self.stop is None or sample_index < self.stop:
            yield sample_index
            sample_index += 1


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


# ---------------------------------------------------------------------------------------------------------------------
# run.json: what ran, on what, and how it ended


def start_run(run_dir: Path, config: dict, counts: dict) -> None:
    """Write run.json before training: command, git, versions, machine, data counts, start and config.

    Args:
        run_dir: the run's folder, made if absent.
        config: the whole resolved config, plain types.
        counts: what the data holds, such as {"train_images": 64, "val_images": 16}.
    Raises:
        FileExistsError: where the folder already holds a run, which would be mixed with this one.
    """
    path = Path(run_dir) / "run.json"
    if path.exists():
        raise FileExistsError(f"{path} exists; a run needs a folder of its own: leave out or change hydra.run.dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": shlex.join([sys.executable, *sys.argv]),
        "working_dir": os.getcwd(),
        "git": git_state(),
        "versions": _versions(),
        "machine": _machine(),
        "data": counts,
        "start": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "config": config,
    }
    _write_json(path, record)


def finish_run(run_dir: Path, metrics: dict[str, dict[str, float]]) -> None:
    """Complete run.json after training; a run.json without "end" is that of a run that crashed or is still going.

    Args:
        run_dir: a folder that `start_run` wrote to.
        metrics: "start" (step 0), "best" and "last", each {name as in metrics.csv: value}.
    """
    path = Path(run_dir) / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    end = datetime.now().astimezone()
    record["end"] = end.isoformat(timespec="milliseconds")
    record["duration_s"] = round((end - datetime.fromisoformat(record["start"])).total_seconds())
    record["metrics"] = metrics
    _write_json(path, record)


def git_state() -> dict[str, str | bool | None]:
    """Read this repository's commit and whether files differ from it ("dirty"); None for both outside git."""
    answers = []
    for command in ("git rev-parse HEAD", "git status --porcelain"):
        try:
            done = subprocess.run(command.split(), cwd=REPOSITORY, capture_output=True, text=True)
        except FileNotFoundError:  # git is not installed
            return {"commit": None, "dirty": None}
        if done.returncode != 0:  # a copy without .git, or no commit yet
            return {"commit": None, "dirty": None}
        answers.append(done.stdout.strip())
    return {"commit": answers[0], "dirty": answers[1] != ""}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _machine() -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = found.group(1) if found else cpu
    machine = {"host": platform.node(), "system": platform.platform(), "cpu": cpu, "cores": num_cores()}
    machine["torch_threads"] = torch.get_num_threads()
    machine["cuda_devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return machine


def _write_json(path: Path, record: dict) -> None:
    _write_text(path, json.dumps(_without_non_finite(record), indent=2, allow_nan=False) + "\n")


def _without_non_finite(value):
    """Replace nan and infinity, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8", newline="")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------------
# metrics.csv, TensorBoard and curves


class MetricsLog:
    """Write metrics to metrics.csv and tensorboard/ in the run's folder, one row per call of `log`.

    `rows` is the whole log as plain types: a checkpoint stores it, and `MetricsLog(run_dir, rows=stored)` writes those
    rows again, so the file of a resumed run reads as that of an uninterrupted one.
    """

    def __init__(self, run_dir: Path, rows: list[dict[str, int | float]] | None = None):
        self.run_dir = Path(run_dir)
        self.rows: list[dict[str, int | float]] = []
        self._columns = ["step"]
        self._writer = None  # made with the first row: importing TensorBoard takes seconds
        for row in rows or []:
            self._add(dict(row))
        if self.rows:
            self._rewrite()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one row.

        Args:
            step: updates done.
            values: {name: number}; a one-element tensor is read off. Rows may have different names; nan is allowed.
        """
        row = {"step": step}
        for name, value in values.items():
            row[name] = value if type(value) is int else float(value)
        if self._add(row) or len(self.rows) == 1:
            self._rewrite()
        else:
            with (self.run_dir / "metrics.csv").open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    def close(self) -> None:
        """Write out what TensorBoard still holds; metrics.csv is complete after each `log`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, row: dict[str, int | float]) -> bool:
        """Keep a row and send it to TensorBoard; say whether it brought a new column."""
        new_columns = [name for name in row if name not in self._columns]
        self._columns += new_columns
        self.rows.append(row)
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.run_dir / "tensorboard"))
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])
        return bool(new_columns)

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(self.rows)
        _write_text(self.run_dir / "metrics.csv", text.getvalue())


def values_of_step(rows: list[dict], step: int) -> dict[str, float]:
    """Collect the validation values that were logged at a step."""
    return {
        name: value for row in rows if row["step"] == step for name, value in row.items() if name.startswith("val/")
    }


def plot_curves(rows: list[dict[str, int | float]], path: Path) -> None:
    """Draw every metric against the step: one panel per name, so train/loss and val/loss share theirs.

    Args:
        rows: as `MetricsLog.rows`; a name may be missing from most rows, and values that are not finite are left out.
        path: the picture to write, .png.
    """
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no screen and no global state

    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}  # {"loss": {"train/loss": [(step, value), ...]}}
    for row in rows:
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                panels.setdefault(name.split("/", 1)[-1], {}).setdefault(name, []).append((row["step"], value))

    num_columns = min(4, max(1, len(panels)))
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    figure = Figure(figsize=(4.5 * num_columns, 3 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for ax, (title, curves) in zip(axes, panels.items(), strict=False):
        for name, points in curves.items():
            steps, values = zip(*points, strict=True)
            ax.plot(steps, values, marker="." if len(points) < 30 else None, label=name)
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        if len(curves) > 1:
            ax.legend()
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    partial = Path(path).with_name(Path(path).name + ".tmp")
    figure.savefig(partial, format="png", dpi=100)
    os.replace(partial, path)
