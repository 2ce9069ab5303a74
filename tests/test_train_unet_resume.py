"""train_unet.py: resuming is exact, wherever the run was killed, and a run is a function of its config."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from tiny_segmentation import (
    ROOT,
    compose_config,
    make_runs_quick,
    run_main,
    script_evaluation,
    tiny_overrides,
    train_in,
    write_dataset,
)
from tiny_training import differences, read_last, without_timing

import train_unet
from utils.checkpoint import load_checkpoint

STEPS = ("train.steps=4", "train.eval_every=3", "train.save_every=1", "data.rotation=20", "data.elastic_px=2")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    make_runs_quick(monkeypatch)


def configure(root, *overrides):
    """A network with dropout, whose masks a resumed run must draw as the whole run did, and one with batch norm."""
    network = ["model=vit_small", "model.dim=24", "model.num_blocks=2", "model.num_heads=2", "model.dropout=0.3"]
    kept = [one for one in tiny_overrides(root) if not one.startswith("model")]
    return compose_config(*kept, *network, *STEPS, *overrides)


def crash_at_step(monkeypatch, step):
    """Let the backward pass of the update after `step` done ones raise."""
    calls = []
    real_backward = torch.Tensor.backward

    def crash(*args):
        calls.append(1)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        return real_backward(*args)

    monkeypatch.setattr(torch.Tensor, "backward", crash)


def run_differences(run_dir, other_dir):
    """Where two runs differ in last.pt, best.pt and metrics.csv, but for timing and the config's `resume`."""
    states, bests, tables = [], [], []
    for folder in (run_dir, other_dir):
        state = read_last(folder)
        state["config"].pop("resume")
        states.append(state | {"metrics": without_timing(state["metrics"])})
        best = torch.load(folder / "best.pt", weights_only=True)
        bests.append({key: best[key] for key in ("model", "metrics", "class_weights")})
        with (folder / "metrics.csv").open(newline="") as file:
            tables.append(without_timing(list(csv.DictReader(file))))
    return differences(*states, "last") + differences(*bests, "best") + differences(*tables, "metrics.csv")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The folder of an uninterrupted run of 4 steps."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_runs_quick(monkeypatch)
        train_in(run_dir, configure(root))
    return run_dir


def test_resumed_run_equals_the_uninterrupted_one(root, whole, tmp_path, monkeypatch, capfd):
    """By the command, with other workers, from a checkpoint between two evaluations; then from the end."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at_step(patch, 2)
        train_in(tmp_path / "crashed", configure(root))
    assert load_checkpoint(tmp_path / "crashed" / "last.pt")["loop"]["step"] == 2
    arguments = [f"resume={tmp_path / 'crashed'}", "num_workers=1"]
    status, output = run_main(monkeypatch, capfd, tmp_path / "resumed", *arguments)
    assert status == 0 and f"resumed from {tmp_path / 'crashed' / 'last.pt'} at step 2" in output
    found = run_differences(whole, tmp_path / "resumed")
    assert found == ["last/config/num_workers: 0 and 1"]
    record = json.loads((tmp_path / "resumed" / "run.json").read_text())
    assert record["metrics"] == json.loads((whole / "run.json").read_text())["metrics"]

    # a run that was complete: nothing is trained, and the new folder has all that the old one had
    status, _ = run_main(monkeypatch, capfd, tmp_path / "again", f"resume={tmp_path / 'resumed' / 'last.pt'}")
    assert status == 0 and run_differences(whole, tmp_path / "again") == found


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["optim=sgd", "optim.name=adam"])
def test_other_optimizers_and_batch_norm_resume_exactly(optim, root, tmp_path, monkeypatch):
    config = compose_config(*tiny_overrides(root), *STEPS, optim)
    train_in(tmp_path / "whole", config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at_step(patch, 2)
        train_in(tmp_path / "first", config)
    train_in(tmp_path / "second", config, tmp_path / "first" / "last.pt")
    assert not run_differences(tmp_path / "whole", tmp_path / "second")


def test_same_seed_is_the_same_run_with_any_workers_and_another_seed_is_not(root, whole, tmp_path):
    train_in(tmp_path / "workers", configure(root, "num_workers=2"))
    assert run_differences(whole, tmp_path / "workers") == ["last/config/num_workers: 0 and 2"]
    other = train_in(tmp_path / "other", configure(root, "seed=1"))
    state = read_last(whole)
    assert differences(state["model"], other["model"]) and differences(state["metrics"], other["metrics"])


def test_early_stop_holds_after_a_resume(root, tmp_path, monkeypatch):
    """Killed between the evaluation that ends the run and its end."""
    script_evaluation(monkeypatch, [0.5, 0.4, 0.9])
    overrides = ("train.steps=3", "train.eval_every=1", "train.early_stop_evals=1", "train.test_at_end=false")
    config = configure(root, *overrides)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_unet, "finish_run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        train_in(tmp_path / "stopped", config)
    resumed = train_in(tmp_path / "resumed", config, tmp_path / "stopped" / "last.pt")
    assert resumed["step"] == 1 and not run_differences(tmp_path / "stopped", tmp_path / "resumed")


def test_resume_needs_a_new_folder(root, whole, monkeypatch, capfd):
    """Nest-of-Unets removes earlier runs at its start."""
    before = (whole / "last.pt").read_bytes()
    status, output = run_main(monkeypatch, capfd, whole, f"resume={whole}", "train.steps=5")
    assert status == 1 and "a run needs a folder of its own" in output
    assert (whole / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "override, listed",
    [
        ("train.batch_size=3", "train.batch_size: stored 2, now 3"),
        ("optim.lr=0.5", "optim.lr: stored 0.003, now 0.5"),
        ("data.rotation=5.0", "data.rotation: stored 20, now 5.0"),
        ("loss=tversky", "loss.tversky: stored 0.0, now 1.0"),
        ("model=segnet", "model.name: stored vit, now segnet"),
    ],
)
def test_resume_lists_what_may_not_change(override, listed, whole):
    stored = load_checkpoint(whole / "last.pt")["config"]
    arguments = [f"resume={whole}", override, "train.steps=9"]
    with pytest.raises(ValueError, match="the config differs") as error:
        train_unet.resumed_config(stored, compose_config(*arguments), arguments, train_unet.RESUMABLE)
    assert listed in str(error.value)
    assert "train.steps: " not in str(error.value) and "train.steps" in str(error.value).splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# kill -9

# Children that are forked before anything is computed; each kills itself at a given call.
KILLER = r"""
import json, os, signal, sys, traceback
from pathlib import Path
import torch
import torch.utils.tensorboard
import tiny_segmentation, train_unet
from utils import loop
from utils.segmentation.prediction import Predictor

torch.set_num_threads(1)
config, folder, cases = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
for name in ("plot_curves", "plot_statistics"):
    setattr(train_unet, name, lambda *args: None)
loop.git_state = lambda: None


def die_at_call(module, name, number, ending=None):
    real, calls = getattr(module, name), []

    def call(*args, **keywords):
        calls.extend([1] * (ending is None or str(args[-1]).endswith(ending)))
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **keywords)

    setattr(module, name, call)


def run(run_dir, resume_path=None, die=None):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if die is not None:
                module, *rest = die
                die_at_call({"os": os, "loop": loop, "Predictor": Predictor, "train_unet": train_unet}[module], *rest)
            tiny_segmentation.train_in(run_dir, config, resume_path)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


answer = {"whole": [run(folder / "whole"), 0]}
for name, die in cases.items():
    killed = folder / f"{name}_killed"
    answer[name] = [run(killed, die=die), run(folder / name, killed / "last.pt")]
print(json.dumps(answer))
"""


@pytest.mark.slow
def test_killed_runs_resume_exactly(root, tmp_path):
    config = configure(root, "train.steps=5", "train.eval_every=2", "train.batch_size=1", "train.accumulate=2")
    cases = {
        # last.pt.tmp of step 3 is complete, last.pt is not yet replaced
        "mid_save": ["os", "replace", 4, "last.pt"],
        # last.pt has the evaluation of step 2, best.pt not yet
        "before_best": ["os", "replace", 2, "best.pt"],
        # three pictures each: the second picture of the second evaluation
        "mid_validation": ["Predictor", "predict", 3 + 2],
        # between the third step's two forwards: the evaluations before it use the loss three times each
        "mid_accumulation": ["train_unet", "weighted_loss", 3 + 2 * 2 + 3 + 2],
        "mid_step": ["train_unet", "scheduled_lr", 5],
        # the checkpoint of step 5 is there, the test split was being measured
        "at_the_end": ["Predictor", "predict", 4 * 3 + 1],
    }
    command = [sys.executable, "-c", KILLER, json.dumps(config), str(tmp_path), json.dumps(cases)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert statuses.pop("whole") == [0, 0]
    for name, (status, resumed_status) in statuses.items():
        assert resumed_status == 0, (name, done.stderr[-3000:])
        assert status == -signal.SIGKILL, name
        assert "end" not in json.loads((tmp_path / f"{name}_killed" / "run.json").read_text())
        assert not run_differences(tmp_path / "whole", tmp_path / name), name
    steps = {name: load_checkpoint(tmp_path / f"{name}_killed" / "last.pt")["loop"]["step"] for name in statuses}
    assert steps == {
        "mid_save": 2, "before_best": steps["before_best"], "mid_validation": 1, "mid_accumulation": 2, "mid_step": 4,
        "at_the_end": 5,
    }  # fmt: skip
