"""Records of a run: run.json, metrics.csv, TensorBoard and curves."""

import contextlib
import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from utils import ranks
from utils.images import write_image
from utils.run import REPOSITORY, num_cores

RECORDED_PACKAGES = (
    "torch", "torchvision", "numpy", "opencv-python-headless", "opencv-python", "hydra-core", "omegaconf", "sam2",
    "onnx", "onnxruntime",
)  # fmt: skip


def start_run(run_dir: Path, config: dict, counts: dict) -> None:
    """Write run.json before training: command, git, versions, machine, data counts, start and config.

    Of several processes the first one writes it, with the device of each.

    Args:
        run_dir: the run's folder, made if absent.
        config: the whole resolved config, plain types.
        counts: what the data holds, such as {"train_images": 64, "val_images": 16}.
    Raises:
        FileExistsError: where the folder already holds a run, which would be mixed with this one.
    """
    if not ranks.is_first():
        return
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
        "processes": ranks.devices or [platform.node()],
        "data": counts,
        "start": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "config": config,
    }
    write_json(path, record, indent=2)


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
    write_json(path, record, indent=2)


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
        model_name = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = model_name.group(1) if model_name else cpu
    machine = {"host": platform.node(), "system": platform.platform(), "cpu": cpu, "cores": num_cores()}
    machine["torch_threads"] = torch.get_num_threads()
    machine["cuda_devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return machine


def write_json(path: Path, record: dict, indent: int | None = None) -> None:
    """Write plain types whole or not at all; nan and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(_without_non_finite(record), indent=indent, allow_nan=False))


def _without_non_finite(value):
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8", newline="")
    os.replace(partial, path)


class MetricsLog:
    """Write metrics to metrics.csv and tensorboard/ in the run's folder, one row per call of `log`.

    Of several processes the first one writes.

    `rows` is the whole log as plain types. A checkpoint stores it, and `MetricsLog(run_dir, rows=stored)` writes those
    rows again and adds to them, so the file of a resumed run reads as that of an uninterrupted one.
    """

    def __init__(self, run_dir: Path, rows: list[dict[str, int | float]] | None = None):
        self.run_dir = Path(run_dir)
        self.rows = [] if rows is None else rows
        self._columns = ["step"]
        self._writer = None  # made with the first row: importing TensorBoard takes seconds
        if self.rows and ranks.is_first():
            for row in self.rows:
                self._send(row)
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
        self.rows.append(row)
        if not ranks.is_first():
            return
        if self._send(row) or len(self.rows) == 1:
            self._rewrite()
        else:
            with (self.run_dir / "metrics.csv").open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    def close(self) -> None:
        """Write out what TensorBoard still holds; metrics.csv is complete after each `log`."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _send(self, row: dict[str, int | float]) -> bool:
        """Send a row to TensorBoard; say whether it brought a new column."""
        new_columns = [name for name in row if name not in self._columns]
        self._columns += new_columns
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
        write_text(self.run_dir / "metrics.csv", text.getvalue())


def write_pictures(samples_dir: Path | None, names: Sequence[str], pictures: Sequence[np.ndarray | None]) -> None:
    """Write what was drawn of samples, where anything was, as <samples_dir>/<name>.png.

    Of several processes the first one writes.
    """
    for name, picture in zip(names, pictures, strict=True):
        if picture is not None and ranks.is_first():
            path = samples_dir / f"{name.replace('/', '_')}.png"  # stems repeat across folders
            with drawing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_image(path, picture)


def values_of_step(rows: list[dict], step: int) -> dict[str, float]:
    """Collect the validation values that were logged at a step."""
    return {
        name: value
        for row in rows
        if row["step"] == step
        for name, value in row.items()
        if name.startswith(("val/", "general/"))
    }


@contextlib.contextmanager
def drawing(path: Path | str):
    """Go on with a printed line where a picture for the eye cannot be drawn or written: a training is worth more."""
    try:
        yield
    except Exception as error:  # whatever matplotlib, OpenCV or the disk says
        print(f"{path} could not be drawn ({type(error).__name__}: {error}); all else goes on")


def metric_lines(names: Sequence[str], columns: dict[str, dict[str, float]]) -> list[str]:
    """Put metrics into lines to print: a row for each name, a column for each measurement.

    Args:
        names: such as "mean_iou", or "val/mean_iou" where columns have it of several datasets.
        columns: {title: {"val/mean_iou": float, ...}}; empty ones are left out, and what one lacks is blank.
    """
    columns = {title: metrics for title, metrics in columns.items() if metrics}
    width = max(20, *(len(name) + 1 for name in names))
    lines = [f"{'metric':<{width}}" + "".join(f"{title:>10}" for title in columns)]
    for name in names:
        line = f"{name:<{width}}"
        for metrics in columns.values():
            values = [value for key, value in metrics.items() if f"/{key}".endswith(f"/{name}")]
            line += f"{values[0]:>10.3f}" if values else " " * 10
        lines.append(line.rstrip())
    return lines


def plot_curves(rows: list[dict[str, int | float]], path: Path) -> None:
    """Draw every metric against the step: one panel per name, so train/loss and val/loss share theirs.

    Of several processes the first one draws.

    Args:
        rows: as `MetricsLog.rows`; a name may be missing from most rows, and values that are not finite are left out.
        path: the picture to write, .png.
    """
    if ranks.is_first():
        with drawing(path):
            _plot_curves(rows, path)


def _plot_curves(rows: list[dict[str, int | float]], path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no screen and no global state

    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}  # {"loss": {"train/loss": [(step, value), ...]}}
    for row in rows:
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                name = name.replace("$", r"\$")  # which starts a formula, and names have it as they like
                panels.setdefault(name.split("/", 1)[-1], {}).setdefault(name, []).append((row["step"], value))

    num_columns = min(4, max(1, len(panels)))
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    width, height = 4.5 * num_columns, 3.0 * num_rows  # inches
    figure = Figure(figsize=(width, height))  # margins are given: to find them takes longer than to draw
    figure.subplots_adjust(0.75 / width, 0.5 / height, 1 - 0.2 / width, 1 - 0.35 / height, wspace=0.25, hspace=0.45)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for ax, (title, curves) in zip(axes, panels.items(), strict=False):
        for name, points in curves.items():
            steps, values = zip(*points, strict=True)
            ax.plot(steps, values, marker="." if len(points) < 30 else None, label=name)
        ax.set_title(title if len(curves) > 1 else name)
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        if len(curves) > 1:
            ax.legend()
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    partial = Path(path).with_name(Path(path).name + ".tmp")
    figure.savefig(partial, format="png", dpi=100)
    os.replace(partial, path)
