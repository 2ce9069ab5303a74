"""utils/checkpoint.py: atomic save, safe load, resume."""

import collections
import math
import os
import pathlib
import random
import resource
import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from utils import checkpoint
from utils.checkpoint import check_same_config, find_resume, load_checkpoint, save_checkpoint, stored_config
from utils.loop import LoopState

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_what_a_run_stores_comes_back_the_same(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "tensors": [torch.ones(2, 3, dtype=dtype) for dtype in dtypes] + [torch.zeros(0), torch.tensor(1.5)],
        "rng": torch.get_rng_state(),
        "config": {"betas": (0.9, 0.999), "name": "s", "resume": None, "flag": True, "layers": [1, [2, {}]], 3: 4},
        "best": float("-inf"),  # no validation yet
        "step": 2**40,
        "format": 1,
    }
    save_checkpoint(tmp_path / "last.pt", state)
    assert_same(load_checkpoint(tmp_path / "last.pt"), state)
    assert_same(torch.load(tmp_path / "last.pt", weights_only=True), state)
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_that_is_not_finite_is_saved_and_the_tensor_is_named(tmp_path, value, dtype):
    save_checkpoint(tmp_path / "best.pt", {"step": 1})
    weights = torch.zeros(3, 4, dtype=dtype)
    weights[1, 2] = value
    with pytest.raises(ValueError, match=r"optimizer\.state\.0\[1\]\.exp_avg has nan or infinite"):
        save_checkpoint(tmp_path / "best.pt", {"optimizer": {"state": {0: [None, {"exp_avg": weights}]}}})
    assert load_checkpoint(tmp_path / "best.pt") == {"step": 1}
    assert os.listdir(tmp_path) == ["best.pt"]


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "value, name",
    [
        (np.float64(0.5), "numpy.float64"),  # a float to isinstance, an error to weights_only
        (np.zeros(2), "numpy.ndarray"),
        (pathlib.Path("x"), "Path"),
        ({1, 2}, "set"),
        (b"x", "bytes"),
        (Pair(1, 2), "Pair"),
        (collections.defaultdict(list), "defaultdict"),
        (OmegaConf.create([1]), "ListConfig"),
        (nn.Linear(1, 1), "Linear"),
        (torch.float32, "dtype"),
        (torch.Size([1]), "Size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_types_are_refused_and_their_place_is_named(tmp_path, value, name):
    with pytest.raises(TypeError, match=rf"entry config\.layers\[1\] is a .*{name}"):
        save_checkpoint(tmp_path / "last.pt", {"config": {"layers": [0, value]}})
    assert os.listdir(tmp_path) == []


def test_keys_are_plain_too(tmp_path):
    for key in (("a", "b"), np.int64(1), None, 1.5, True):
        with pytest.raises(TypeError, match="entry config has the key"):
            save_checkpoint(tmp_path / "last.pt", {"config": {key: 1}})


def test_a_save_that_fails_leaves_the_previous_file_and_nothing_else(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", {"step": 1})

    def full_disk(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "last.pt", {"step": 2})
    assert os.listdir(tmp_path) == ["last.pt"]
    assert load_checkpoint(tmp_path / "last.pt") == {"step": 1}


def test_a_full_disk_is_an_error_of_the_disk(tmp_path):
    """PyTorch itself ends in a RuntimeError of its zip writer; the largest size of a file stands for the disk's."""
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large.*last.pt.tmp"):
            save_checkpoint(tmp_path / "last.pt", {"model": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["last.pt"] and load_checkpoint(tmp_path / "last.pt") == {"step": 1}


def run_in_child(function) -> int:
    """Run a function in a forked process and return the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's threads are not forked: waiting for them would last for ever
        try:
            function()
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@needs_fork
@pytest.mark.parametrize("moment", ["half written", "written but not renamed"])
def test_a_run_killed_while_saving_leaves_the_previous_file(tmp_path, moment):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.full((1000,), 1.0)})

    def killed():
        def half(state, file):
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "half written":
            checkpoint.torch.save = half
        else:
            checkpoint.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        save_checkpoint(path, {"weights": torch.full((1000,), 2.0)})

    assert run_in_child(killed) == signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "last.pt.tmp"]
    assert load_checkpoint(path)["weights"].unique().tolist() == [1.0]
    save_checkpoint(path, {"weights": torch.full((10,), 3.0)})  # shorter than the stale last.pt.tmp, which it replaces
    assert load_checkpoint(path)["weights"].unique().tolist() == [3.0]
    assert os.listdir(tmp_path) == ["last.pt"]


@needs_fork
def test_kill_at_random_moments_always_leaves_a_whole_file(tmp_path):
    path = tmp_path / "last.pt"
    rng = random.Random(0)
    save_checkpoint(path, {"step": 0, "weights": [torch.full((300_000,), 0.0) for _ in range(4)]})
    for _ in range(10):
        before = path.stat().st_mtime_ns
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # as in run_in_child
            step = load_checkpoint(path)["step"]
            while True:
                step += 1
                weights = [torch.full((300_000,), float(step)) for _ in range(4)]
                save_checkpoint(path, {"step": step, "weights": weights})
        while path.stat().st_mtime_ns == before:  # on a busy machine the first save may take long
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = load_checkpoint(path)
        assert all(tensor.unique().tolist() == [state["step"]] for tensor in state["weights"])
    assert state["step"] >= 10


def test_the_bytes_are_on_disk_before_the_name_points_at_them(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", os.stat(a).st_size)), replace(a, b)))
    save_checkpoint(tmp_path / "last.pt", {"weights": torch.zeros(1000)})
    size = (tmp_path / "last.pt").stat().st_size
    assert calls == [("fsync", size), ("replace", size)]


# ---------------------------------------------------------------------------------------------------------------------
# load


def test_a_missing_checkpoint_is_an_error_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt does not exist"):
        load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match=r"is a folder; give the file in it"):
        load_checkpoint(tmp_path)


def test_a_damaged_or_foreign_file_is_one_clear_line(tmp_path):
    save_checkpoint(tmp_path / "good.pt", {"weights": torch.zeros(1000)})
    whole = (tmp_path / "good.pt").read_bytes()
    cut = [whole[: len(whole) // 2], whole[100:]]
    for content in [b"", b"hello\n", b"a,b\n1,2\n", b"\x80\x02}q\x00.", bytes(64), *cut]:
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.pt cannot be read") as caught:
            load_checkpoint(tmp_path / "bad.pt")
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list; must be a dict"):
        load_checkpoint(tmp_path / "list.pt")


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_loading_runs_no_code_from_the_file(tmp_path):
    torch.save({"model": Exploit(str(tmp_path / "made"))}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "made").exists()


# ---------------------------------------------------------------------------------------------------------------------
# files of earlier commits


@dataclass(frozen=True)
class Section:
    lr: float
    schedule: str = "constant"


@dataclass(frozen=True)
class Config:
    optim: Section
    cache: str = "off"


def older_config(**changes) -> dict:
    return {
        "optim": {"lr": 0.1, "schedule": "cosine", "nesterov": False, "step_every": 7, "step_factor": 0.5} | changes
    }


def test_keys_that_are_no_more_are_left_out_with_a_line_and_younger_ones_filled_in(capfd):
    state = {"config": older_config()}
    for is_resumed in (True, False):
        config = stored_config(Config, state, "run/last.pt", is_resumed)
        assert config == {"optim": {"lr": 0.1, "schedule": "cosine"}, "cache": "off"}
        line = "left out, as they are no more: optim.nesterov=False, optim.step_every=7, optim.step_factor=0.5"
        assert capfd.readouterr().out == f"run/last.pt is an earlier commit's; {line}\n"
    assert state == {"config": older_config()}
    assert stored_config(Config, {"config": config}, "run/last.pt", True) == config and capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"nesterov": True},
            "^optim.nesterov is True in run/last.pt, and no key any more; only a run where it is False",
        ),
        ({"schedule": "step"}, "^optim.schedule is step in run/last.pt, which is no schedule any more"),
    ],
)
def test_what_is_no_more_ends_a_resume_that_needs_it_and_no_prediction(change, message, capfd):
    state = {"config": older_config(**change)}
    with pytest.raises(ValueError, match=message):
        stored_config(Config, state, "run/last.pt", is_resumed=True)
    config = stored_config(Config, state, "run/best.pt", is_resumed=False)
    assert config["optim"].keys() == {"lr", "schedule"} and config["optim"]["schedule"] != "step"
    ((key, value),) = change.items()
    assert f"optim.{key}={value}" in capfd.readouterr().out


def test_a_pair_for_each_visit_is_what_is_done():
    pairs = {"pairs": {"per_visit": 4, "max_gap": 10}}
    with pytest.raises(ValueError, match="^pairs.per_visit is 4 in last.pt"):
        stored_config(Config, {"config": older_config() | pairs}, "last.pt", is_resumed=True)
    pairs["pairs"]["per_visit"] = 1
    config = stored_config(Config, {"config": older_config() | pairs}, "last.pt", is_resumed=True)
    assert config["pairs"] == {"max_gap": 10}


def test_flat_weights_of_a_loss_become_terms_and_loose_fields_a_loop(tmp_path):
    loss = {"cross_entropy": 0.5, "dice": 1.0, "focal": 0.0, "focal_gamma": 2.0, "class_weights": None}
    loop = {"step": 3, "evaluated_step": 2, "bad_evals": 1, "num_skipped": 0, "skipped_in_a_row": 0}
    loop |= {"start_metrics": {"step": 0, "val/ao": 0.1}, "best": {"step": 2, "val/ao": 0.2}}
    state = {"format": 1, "model": {"w": 1}, "optimizer": {}, "config": {"train": {}, "loss": loss}, "git": None}
    state |= loop | {"running": {"loss": 0.5, "iou": 0.25, "updates": 3}, "metrics": [{"step": 1, "lr": 0.1}]}
    save_checkpoint(tmp_path / "last.pt", state)
    loaded = load_checkpoint(tmp_path / "last.pt")
    terms = {"cross_entropy": 0.5, "dice": 1.0, "focal": 0.0}
    assert loaded["config"]["loss"] == {"terms": terms, "focal_gamma": 2.0, "class_weights": None}
    running = {"train/loss": 0.5, "train/iou": 0.25, "updates": 3}
    assert loaded["loop"] == loop | {"running": running, "rows": [{"step": 1, "lr": 0.1}]}
    assert LoopState(**loaded["loop"]).step == 3
    assert loaded["best_keys"] == ["format", "script", "config", "model", "git"] and loaded["script"] == "train_sam2"
    save_checkpoint(tmp_path / "again.pt", loaded)
    assert load_checkpoint(tmp_path / "again.pt") == loaded  # today's form stays as it is
    for other in ({"model": {"w": 1}}, {"config": {"loss": {"dice": 1}}}, {"w": torch.ones(1).item()}):
        save_checkpoint(tmp_path / "other.pt", other)
        assert load_checkpoint(tmp_path / "other.pt") == other


# ---------------------------------------------------------------------------------------------------------------------
# resume


def test_find_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no last.pt"):
        find_resume(tmp_path)
    for name in ("last.pt", "best.pt"):
        save_checkpoint(tmp_path / name, {"step": 1})
    for path in (tmp_path, str(tmp_path), tmp_path / "last.pt"):
        assert find_resume(path) == tmp_path / "last.pt"
    with pytest.raises(FileNotFoundError, match=r"nowhere, which does not exist"):
        find_resume(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="best.pt has no optimizer state"):
        find_resume(tmp_path / "best.pt")


def test_check_same_config_lists_each_difference_that_is_not_allowed():
    stored = {"seed": 0, "device": "auto", "data": {"root": "a"}, "n": 1}
    stored["train"] = {"lr": 0.1, "steps": 5, "old": 1}
    current = {"seed": 1, "device": "cpu", "data": {"root": "b"}, "n": True}
    current["train"] = {"lr": 0.2, "steps": 9, "new": {}}
    check_same_config(stored, stored)
    with pytest.raises(ValueError) as caught:
        check_same_config(stored, current, allowed=("device", "train.steps", "data", "train.l"))
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert lines == [
        "n: stored 1, now True",
        "seed: stored 0, now 1",
        "train.lr: stored 0.1, now 0.2",
        "train.new: stored (absent), now {}",
        "train.old: stored 1, now (absent)",
    ]
    with pytest.raises(ValueError, match="a: stored None, now 0"):  # None, 0 and absent are three things
        check_same_config({"a": None}, {"a": 0})
    with pytest.raises(ValueError, match=r"a: stored None, now \(absent\)"):
        check_same_config({"a": None}, {})


# ---------------------------------------------------------------------------------------------------------------------
# files of others


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "sam2_model.", "_orig_mod.module."])
def test_weights_are_found_in_what_others_wrap_round_them(wrapper, prefix, capsys):
    weights = {"conv.weight": torch.ones(2), "conv.bias": torch.zeros(1)}
    wrapped = {prefix + name: values for name, values in weights.items()}
    state = {"epoch": 3, wrapper: wrapped} if wrapper else wrapped
    read = checkpoint.find_weights(state, "x.pt")
    assert read.keys() == weights.keys() and all(read[name] is weights[name] for name in weights)
    says = capsys.readouterr().out
    assert ("the entry" in says, "the prefix" in says) == (wrapper not in (None, "model"), prefix != "")


def test_files_without_weights_or_with_spoilt_ones_are_named():
    with pytest.raises(ValueError, match="^checkpoint x.pt holds no weights; its entries are epoch, lr$"):
        checkpoint.find_weights({"epoch": 3, "lr": 0.1}, "x.pt")
    for value in (math.nan, math.inf):
        with pytest.raises(
            ValueError, match="^checkpoint x.pt has nan or infinity in conv.bias: its training diverged"
        ):
            checkpoint.find_weights({"conv.weight": torch.ones(2), "conv.bias": torch.tensor([1, value])}, "x.pt")


def test_a_run_is_resumed_from_its_own_scripts_last_checkpoint_alone(tmp_path):
    path = tmp_path / "last.pt"
    for state, words in (
        ({"conv.weight": torch.ones(2)}, "it has no config"),
        (
            {"config": {"model": {}}, "model": {}, "script": "train_unet"},
            "not written by train_sam2.py, but by train_unet",
        ),
        ({"config": {"model": {}}, "model": {}, "script": "train_sam2"}, "which has no optimizer; give the last.pt"),
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=words):
            checkpoint.load_run(path, "train_sam2")
