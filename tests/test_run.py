"""What all scripts share: device, precision, seeds, sample stream, learning rate, records of a run."""

import csv
import itertools
import json
import math
import os
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import nn
from torch.utils.data import DataLoader, Dataset

from utils import run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.log import MetricsLog, finish_run, git_state, plot_curves, start_run

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# where and how to compute


def set_devices(monkeypatch, cuda: int, mps: bool, bf16: bool = True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an old GPU")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))


@pytest.mark.parametrize("cuda, mps, expected", [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_device_auto_prefers_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, expected):
    set_devices(monkeypatch, cuda, mps)
    assert run.choose_device("auto").type == expected


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_an_explicit_device_that_is_not_there_is_an_error_and_never_the_cpu(monkeypatch, name):
    set_devices(monkeypatch, cuda=0, mps=False)
    with pytest.raises(ValueError, match=f"device is {name}.*device=auto"):
        run.choose_device(name)


def test_device_number_and_unknown_names(monkeypatch):
    set_devices(monkeypatch, cuda=2, mps=False)
    assert run.choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="cuda:2.*2 CUDA device"):
        run.choose_device("cuda:2")
    for name in ("gpu", "CUDA", "cuda:", "", None, 0):
        with pytest.raises(ValueError, match="must be auto, cpu, mps"):
            run.choose_device(name)
    assert run.choose_device("cpu") == CPU


def test_precision(monkeypatch):
    set_devices(monkeypatch, cuda=1, mps=False, bf16=True)
    cuda = torch.device("cuda")
    assert run.choose_precision("auto", CPU) == "fp32"
    assert run.choose_precision("auto", cuda) == "bf16"
    assert [run.choose_precision(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    with pytest.raises(ValueError, match="precision is half"):
        run.choose_precision("half", CPU)
    set_devices(monkeypatch, cuda=1, mps=False, bf16=False)  # emulated only: correct, and slower than fp32
    assert run.choose_precision("auto", cuda) == "fp16"
    with pytest.raises(ValueError, match="an old GPU lacks it"):
        run.choose_precision("bf16", cuda)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_numbered_device_becomes_the_current_one_which_is_asked_for_bf16(has_bf16, monkeypatch, capsys):
    """GPU 0 was asked, and used by sam2 and by the thread that pins batches."""
    set_devices(monkeypatch, cuda=2, mps=False)
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **keys: calls.append("bf16") or has_bf16)
    device = torch.device("cuda", 1)
    assert run.set_up_device("cuda:1", "auto") == (device, "bf16" if has_bf16 else "fp16")
    assert calls == [device, "bf16"]
    line = "" if has_bf16 else "precision=auto is fp16 here: an old GPU does not compute in bf16\n"
    assert capsys.readouterr().out == line
    run.set_up_device("cuda:1", "fp16")
    assert capsys.readouterr().out == ""  # as it was asked for
    assert run.set_up_device("cpu", "auto") == (CPU, "fp32") and calls[2:] == [device, "bf16"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp32_is_never_tf32(precision):
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    torch.backends.cuda.matmul.allow_tf32 = True  # that of NVIDIA's containers
    run.set_up_device("cpu", precision)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.gpu
def test_fp32_products_and_convolutions_on_a_gpu_are_those_of_the_cpu():
    """TF32 is off by 1e-3 of the largest value, fp32 by 1e-6."""
    device, _ = run.set_up_device("cuda", "fp32")
    torch.manual_seed(0)
    conv, images, factors = nn.Conv2d(64, 64, 3), torch.randn(2, 64, 32, 32), torch.randn(256, 256)
    expected = [conv(images), factors @ factors]
    computed = [conv.to(device)(images.to(device)), factors.to(device) @ factors.to(device)]
    for ours, theirs in zip(computed, expected, strict=True):
        assert (ours.cpu() - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", ["train_sam2", "infer_sam2", "train_unet", "train_siamfc", "track"])
def test_every_script_sets_its_device_up(name):
    source = (run.REPOSITORY / f"{name}.py").read_text(encoding="utf-8")
    assert "set_up_device(" in source and "choose_device(" not in source


@pytest.mark.parametrize(
    "name, is_used, line", [("mps", False, "ignored on mps"), ("cpu", True, ""), ("cuda", True, "")]
)
def test_channels_last_is_ignored_on_mps(name, is_used, line, capsys):
    assert run.choose_channels_last(True, torch.device(name)) is is_used
    printed = capsys.readouterr().out
    assert line in printed and printed.count("\n") == bool(line)
    assert run.choose_channels_last(False, torch.device(name)) is False and not capsys.readouterr().out


@pytest.mark.parametrize("device, variable, needed", [("cuda", "CC", "gcc or clang or cc"), ("cpu", "CXX", "g\\+\\+")])
def test_compiling_without_a_compiler_is_refused(device, variable, needed, monkeypatch):
    monkeypatch.setattr(run.sys, "platform", "linux")
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(run.shutil, "which", lambda name: "/opt/cc" if name == "mine" else None)
    with pytest.raises(
        ValueError, match=rf"^train.compile is true; must be .* no compiler \({needed}\): .* {variable}$"
    ):
        run.compile_forward(nn.Identity(), torch.device(device))
    monkeypatch.setenv(variable, "mine")
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    module = nn.Identity()
    assert run.compile_forward(module, torch.device(device)) == module.forward


def test_autocast_computes_in_the_precision_asked_for():
    for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        with run.autocast(CPU, precision):
            assert nn.Linear(4, 4)(torch.zeros(1, 4)).dtype == dtype


def test_num_workers(monkeypatch):
    assert run.choose_num_workers(0) == 0 and run.choose_num_workers(3) == 3
    for cores, expected in ((1, 0), (2, 1), (6, 5), (64, 8)):
        monkeypatch.setattr(run, "num_cores", lambda cores=cores: cores)
        assert run.choose_num_workers("auto") == expected
    for value in (-1, 1.5, "4", None, True):
        with pytest.raises(ValueError, match="num_workers is"):
            run.choose_num_workers(value)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot restrict a process to one core")
def test_only_cores_that_the_process_may_use_are_counted():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert run.num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_reading_ahead_is_one_call_ahead_and_keeps_order_and_errors():
    started, was_read = [], threading.Event()

    def read(number):
        started.append(number)
        if number == 1:
            was_read.set()
        if number == 2:
            raise ValueError("broken")
        return 10 * number

    outcomes = []
    for number, reading in enumerate(run.read_ahead(read, range(5))):
        if number == 0:
            assert was_read.wait(10)  # while the first is worked on
        try:
            outcomes.append(reading.result())
        except ValueError as error:
            outcomes.append(str(error))
        assert max(started) <= number + 1
    assert outcomes == [0, 10, "broken", 30, 40] and started == [0, 1, 2, 3, 4]
    assert list(run.read_ahead(read, [])) == []


# ---------------------------------------------------------------------------------------------------------------------
# randomness and schedules


def test_seed_0_seeds_and_seed_1_differs():
    def draw(seed):
        run.seed_everything(seed)
        return torch.rand(3).tolist() + np.random.rand(3).tolist()

    assert draw(0) == draw(0) != draw(1)
    for seed in (-1, 2**32, 0.0, "0", None):
        with pytest.raises(ValueError, match="seed is"):
            run.seed_everything(seed)


def test_sample_rng_depends_on_seed_and_index_and_on_nothing_else():
    first = run.sample_rng(0, 7).random(4)
    np.random.seed(5)
    torch.manual_seed(5)
    run.sample_rng(0, 8).random(100)
    assert np.array_equal(run.sample_rng(0, 7).random(4), first)
    seeds, indices = (0, 1, 2, 2**32 - 1), (0, 1, 2, 2**31, 2**40)
    streams = {tuple(run.sample_rng(seed, i).random(2)) for seed in seeds for i in indices}
    assert len(streams) == 20  # no two share a stream, not even (0, 1) and (1, 0)


def test_dropout_depends_on_seed_step_and_forward_and_on_nothing_else():
    def dropped(*keys):
        run.seed_dropout(*keys)
        return tuple(nn.functional.dropout(torch.ones(64)).tolist())

    first = dropped(0, 7, 1)
    torch.rand(5)
    assert dropped(0, 7, 1) == first
    assert len({dropped(*keys) for keys in itertools.product((0, 1, 2**32 - 1), (0, 1, 2**40), (0, 1))}) == 18


def test_shuffled_item_passes_over_all_items_once_an_epoch_in_a_new_order():
    stream = [run.shuffled_item(0, i, 10) for i in range(30)]
    orders = [stream[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert [run.shuffled_item(0, i, 10) for i in reversed(range(30))] == stream[::-1]  # no state between calls
    assert [run.shuffled_item(1, i, 10) for i in range(30)] != stream
    assert run.shuffled_item(0, 12, 1) == 0


class Draws(Dataset):
    """Each sample is its index, its item and a random number: what a real dataset derives from sample_index."""

    def __getitem__(self, sample_index):
        item = run.shuffled_item(3, sample_index, 7)
        return torch.tensor([sample_index, item, run.sample_rng(3, sample_index).random()], dtype=torch.float64)


def test_the_sample_stream_is_the_same_for_any_workers_and_continues_where_it_stopped():
    def batches(start, stop, num_workers):
        sampler = range(start, stop)
        return torch.stack(list(DataLoader(Draws(), batch_size=4, sampler=sampler, num_workers=num_workers)))

    whole = batches(0, 32, 0)
    assert whole[:, :, 0].flatten().tolist() == list(range(32))
    assert torch.equal(batches(0, 32, 2), whole)
    assert torch.equal(torch.cat([batches(0, 12, 0), batches(12, 32, 2)]), whole)


@pytest.mark.parametrize("steps, warmup_steps, min_lr_factor", [(50, 10, 0.1), (50, 0, 0.0), (7, 6, 0.5)])
def test_cosine_lr_equals_the_schedulers_of_torch(steps, warmup_steps, min_lr_factor):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    lr_scheduler = torch.optim.lr_scheduler
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup_steps, eta_min=3e-4 * min_lr_factor)
    schedule = lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup_steps]) if warmup_steps else fall
    expected = []
    for _ in range(steps + 1):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [run.cosine_lr(step, steps, 3e-4, warmup_steps, min_lr_factor) for step in range(steps + 1)]
    assert ours == pytest.approx(expected, rel=1e-6)
    assert ours[warmup_steps] == max(ours) == 3e-4
    assert ours[0] > 0 and ours[steps] == pytest.approx(3e-4 * min_lr_factor)


def test_cosine_lr_of_runs_shorter_than_the_warm_up():
    assert run.cosine_lr(0, 2, 1.0, 100, 0.0) == pytest.approx(1 / 101)
    assert run.cosine_lr(0, 1, 1.0, 0, 0.0) == 1.0
    assert run.cosine_lr(1, 1, 1.0, 1, 0.1) == 1.0
    assert run.cosine_lr(9, 5, 1.0, 0, 0.1) == pytest.approx(0.1)  # past the end: stays at the lowest


# ---------------------------------------------------------------------------------------------------------------------
# run.json


def read_strict_json(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_run_json_is_written_before_training_and_completed_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "data.root=my folder", "seed=1"])
    config = {"seed": 1, "train": {"lr": 1e-4, "layers": [1, 2]}, "resume": None}
    start_run(tmp_path / "new", config, {"train_images": 3})
    record = read_strict_json(tmp_path / "new" / "run.json")
    assert record["command"].endswith("train.py 'data.root=my folder' seed=1")
    assert record["config"] == config and record["data"] == {"train_images": 3}
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["machine"]["cores"] >= 1 and set(record["git"]) == {"commit", "dirty"}
    assert "end" not in record and "metrics" not in record  # the mark of a crashed run

    metrics = {"start": {"val/mean_iou": 0.25}, "best": {"val/mean_iou": float("nan")}, "last": {"val/mean_iou": 0.5}}
    finish_run(tmp_path / "new", metrics)
    finished = read_strict_json(tmp_path / "new" / "run.json")
    assert finished["metrics"]["start"] == {"val/mean_iou": 0.25}
    assert finished["metrics"]["best"] == {"val/mean_iou": None}
    assert finished["end"] >= finished["start"] and 0 <= finished["duration_s"] < 60
    assert {key: finished[key] for key in record} == record
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


def test_a_run_never_shares_its_folder(tmp_path):
    start_run(tmp_path, {}, {})
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(FileExistsError, match="run.json exists.*hydra.run.dir"):
        start_run(tmp_path, {}, {})
    assert (tmp_path / "run.json").read_bytes() == before


def git(folder, *arguments):
    names = ["-c", "user.name=n", "-c", "user.email=e@x"]
    return subprocess.run(["git", *names, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_git_state(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))  # whatever holds the temporary folder
    monkeypatch.setattr("utils.log.REPOSITORY", tmp_path)
    nothing = {"commit": None, "dirty": None}
    assert git_state() == nothing  # not a repository
    git(tmp_path, "init", "-q")
    assert git_state() == nothing  # no commit yet
    (tmp_path / "a.py").write_text("a = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert git_state() == {"commit": commit, "dirty": False}
    (tmp_path / "a.py").write_text("a = 2\n")
    assert git_state() == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_state() == nothing  # git is not installed


# ---------------------------------------------------------------------------------------------------------------------
# metrics.csv, TensorBoard, curves


def log_some(log, steps):
    for step in steps:
        if step % 2 == 0:
            log.log(step, {"val/iou": torch.tensor(1 / (step + 3), dtype=torch.float64), "val/num_images": 4})
        if step == 3:
            log.log(step, {"train/loss": float("nan"), "late": 0.1 + 0.2})
        log.log(step, {"train/loss": math.pi * step})


def read_rows(path):
    with path.open(newline="") as file:
        return [{name: float(text) for name, text in row.items() if text != ""} for row in csv.DictReader(file)]


def test_metrics_csv_holds_each_value_exactly_though_columns_grow(tmp_path):
    log = MetricsLog(tmp_path)
    assert not (tmp_path / "tensorboard").exists()  # made with the first row
    for step in range(5):
        log_some(log, [step])
        written = read_rows(tmp_path / "metrics.csv")  # complete after each row, as a killed run leaves it
        assert str(written) == str([{name: float(value) for name, value in row.items()} for row in log.rows])
    log.close()
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == "step,val/iou,val/num_images,train/loss,late"
    assert log.rows[0] == {"step": 0, "val/iou": 1 / 3, "val/num_images": 4}
    assert log.rows[0]["val/num_images"].__class__ is int and log.rows[0]["val/iou"].__class__ is float
    assert sum(math.isnan(row.get("train/loss", 0)) for row in log.rows) == 1
    assert not (tmp_path / "metrics.csv.tmp").exists()


def test_a_resumed_log_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    for name in ("whole", "killed", "resumed"):
        (tmp_path / name).mkdir()
    whole = MetricsLog(tmp_path / "whole")
    log_some(whole, range(8))
    killed = MetricsLog(tmp_path / "killed")
    log_some(killed, range(4))
    save_checkpoint(tmp_path / "last.pt", {"metrics": killed.rows})
    log_some(killed, range(4, 6))  # lost with the kill: not in the checkpoint
    stored = load_checkpoint(tmp_path / "last.pt")["metrics"]
    resumed = MetricsLog(tmp_path / "resumed", rows=stored)
    log_some(resumed, range(4, 8))
    for log in (whole, killed, resumed):
        log.close()
    assert (tmp_path / "resumed" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    assert str(resumed.rows) == str(whole.rows)
    assert resumed.rows is stored  # the rows of LoopState: what is logged is what is saved
    assert read_scalars(tmp_path / "resumed") == read_scalars(tmp_path / "whole")


def read_scalars(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, str(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_the_same_numbers(tmp_path):
    log = MetricsLog(tmp_path)
    log.log(0, {"val/iou": 0.25})
    log.log(1, {"train/loss": 2.0})
    log.log(2, {"train/loss": 1.5, "val/iou": 0.5})
    log.close()
    assert read_scalars(tmp_path) == {
        "val/iou": [(0, "0.25"), (2, "0.5")],
        "train/loss": [(1, "2.0"), (2, "1.5")],
    }


def test_resuming_from_no_rows_writes_nothing(tmp_path):
    MetricsLog(tmp_path, rows=[]).close()
    assert list(tmp_path.iterdir()) == []


def test_curves_show_sparse_columns_and_survive_nan(tmp_path):
    rows = [{"step": step, "train/loss": 1 / (step + 1)} for step in range(100)]
    plot_curves(rows, tmp_path / "dense.png")
    val_losses = {0: 0.9, 50: float("nan"), 99: 0.2}
    sparse = rows + [{"step": step, "val/loss": value} for step, value in val_losses.items()]
    plot_curves(sparse, tmp_path / "sparse.png")
    dense_image, sparse_image = (cv2.imread(str(tmp_path / name)) for name in ("dense.png", "sparse.png"))
    assert dense_image.shape == sparse_image.shape  # train/loss and val/loss share one panel
    assert not np.array_equal(dense_image, sparse_image)
    for num_metrics, num_rows in ((4, 1), (5, 2)):  # four panels a row, and none for a metric without a finite value
        metrics = {f"val/$^{{$ {i}": float(i) for i in range(num_metrics)}  # no formulas
        plot_curves([{"step": 0, **metrics, "only_nan": float("nan")}], tmp_path / "many.png")
        height, width = dense_image.shape[:2]
        assert cv2.imread(str(tmp_path / "many.png")).shape == (num_rows * height, 4 * width, 3)
    plot_curves([], tmp_path / "none.png")
    assert cv2.imread(str(tmp_path / "none.png")) is not None
    assert not list(tmp_path.glob("*.tmp"))


def test_a_panel_of_one_curve_has_its_whole_name(tmp_path, monkeypatch):
    """Validation's iou_1_click stood beside training's iou, both without a word of whose they are."""
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title: titles.append(title))
    plot_curves([{"step": 0, "val/loss": 1.0, "train/loss": 1.0, "train/iou": 0.5, "lr": 1.0}], tmp_path / "a.png")
    assert titles == ["loss", "train/iou", "lr"]


def test_curves_that_cannot_be_drawn_stop_nothing(tmp_path, monkeypatch, capsys):
    plot_curves([{"step": 0, "train/loss": 1.0}], tmp_path / "no folder" / "curves.png")

    def fail(*args, **keywords):
        raise MemoryError("no room for the figure")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    plot_curves([{"step": 0, "train/loss": 1.0}], tmp_path / "curves.png")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("curves.png could not be drawn (" in line for line in lines)
    assert "MemoryError: no room" in lines[1] and not list(tmp_path.iterdir())
