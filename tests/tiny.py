"""What tiny runs of all scripts share: composing configs, commands in this process, how two runs differ, kills."""

import copy
import csv
import functools
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from forked import child_environment, run_python
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

import utils.log
import utils.loop
from utils.checkpoint import load_checkpoint
from utils.settings import read_command_line

ROOT = Path(__file__).resolve().parent.parent
TIMED = ("images_per_s", "pairs_per_s", "data_wait_share", "val/tracked_per_s")  # what depends on the machine's load


def config_dir(script: str) -> Path:
    """The folder with the configs of a script, such as "train_unet"."""
    return next((ROOT / "configs").rglob(f"{script}.yaml")).parent


def compose_config(script: str, *overrides: str) -> dict:
    """Compose the config of a script, such as "train_unet", with overrides, as its main does."""
    return copy.deepcopy(_compose(script, overrides, os.environ.get("DATA_ROOT")))


@functools.cache  # composing takes a fifth of a second
def _compose(script: str, overrides: tuple[str, ...], data_root: str | None) -> dict:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir(script)), version_base="1.3"):
        cfg = compose(script, list(overrides))
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def changed_config(config: dict, change: str | dict) -> dict:
    """A config with a change that Hydra does not look at: {"train": {"steps": 3}}, or "train.steps=3"."""
    change = OmegaConf.from_dotlist([change]) if isinstance(change, str) else OmegaConf.create(change)
    return OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(config), change))


def run_script(script: ModuleType, run_dir: Path, *arguments: str) -> tuple[int, str]:
    """Run `python <script>.py arguments` in this process: exit status, and the message that it ended with."""
    name = script.__name__
    command = [f"{name}.py", "--config-path", str(config_dir(name)), *arguments, f"hydra.run.dir={run_dir}"]
    GlobalHydra.instance().clear()
    handlers = list(logging.getLogger().handlers)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", command)
        if not any("multirun" in argument.lower() for argument in arguments):  # Hydra would compose all to learn that
            monkeypatch.setattr(Hydra, "get_mode", lambda *args, **keywords: RunMode.RUN)
        try:
            read_command_line(config_dir(name).name)  # as the script does
            script.main()
        except SystemExit as stop:  # sys.exit("message") prints it and exits with 1
            return (1, stop.code) if isinstance(stop.code, str) else (stop.code, "")
        finally:
            logging.getLogger().handlers[:] = handlers  # Hydra's write to a stream that ends with the test
    return 0, ""


def run_main(script: ModuleType, monkeypatch, capfd, run_dir: Path, *arguments: str) -> tuple[int, str]:
    """Run `python <script>.py arguments` in this process: exit status, and all that was printed."""
    capfd.readouterr()
    status, message = run_script(script, run_dir, *arguments)
    return status, "".join(capfd.readouterr()) + message


DRAW_LOSS_ALONE = r"""
from utils import log

plot_curves = log._plot_curves
log._plot_curves = lambda rows, path: plot_curves([{key: row[key] for key in ("step", "train/loss") if key in row}
                                                   for row in rows], path)
"""
RUN_SCRIPT = r"""
import runpy, sys

del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def draw_the_loss_alone(monkeypatch) -> None:
    """Let curves.png have one panel: all take more than a second, at each evaluation. tests/test_run.py draws them."""
    monkeypatch.setattr(utils.log, "_plot_curves", utils.log._plot_curves)  # which is put back at the end
    exec(DRAW_LOSS_ALONE, {})


def run_command(script: ModuleType, run_dir: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the real command in a process of its own, beside its run folder, but draw the loss alone."""
    command = [ROOT / f"{script.__name__}.py", *arguments, f"hydra.run.dir={run_dir}"]
    code = DRAW_LOSS_ALONE + RUN_SCRIPT
    return run_python("-c", code, *command, cwd=run_dir.parent, environment=child_environment(ROOT))


def train_in(script: ModuleType, run_dir: Path, config: dict, resume_path: Path | None = None) -> dict:
    """Train into a new folder and return what its last.pt holds."""
    run_dir.mkdir(parents=True)
    script.train(config, run_dir, resume_path)
    return read_last(run_dir)


def read_last(run_dir: Path) -> dict:
    """What a run's last.pt holds, the fields of LoopState beside the rest, its rows as "metrics"."""
    state = torch.load(run_dir / "last.pt", weights_only=True)
    loop = state.pop("loop")
    return state | {"metrics": loop.pop("rows")} | loop


def make_runs_quick(script: ModuleType, monkeypatch) -> None:
    """Leave out pictures of curves and statistics and the call of git: most of the time of a tiny run."""
    monkeypatch.setattr(script, "plot_curves", lambda rows, path: None)
    for kind in ("instances", "segmentation"):
        monkeypatch.setattr(f"utils.{kind}.check.plot_statistics", lambda report, path: None)
    monkeypatch.setattr("utils.loop.git_state", lambda: {"commit": None, "dirty": None})


# ---------------------------------------------------------------------------------------------------------------------
# how two runs differ


def without_timing(values):
    """Rows of a metrics log, or a dict of metrics, without what depends on the machine's load."""
    if isinstance(values, list):
        return [without_timing(row) for row in values]
    return {name: value for name, value in values.items() if name not in TIMED}


def differences(ours, other, name: str = "") -> list[str]:
    """Name the places where two nested structures of tensors and plain values differ, bit for bit."""
    if isinstance(ours, torch.Tensor):
        return [] if isinstance(other, torch.Tensor) and torch.equal(ours, other) else [name]
    if isinstance(ours, dict) and isinstance(other, dict):
        if ours.keys() != other.keys():
            return [f"{name}: keys {sorted(map(str, ours.keys() ^ other.keys()))}"]
        return [place for key in ours for place in differences(ours[key], other[key], f"{name}/{key}")]
    if isinstance(ours, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(ours) != len(other):
            return [f"{name}: {len(ours)} and {len(other)} entries"]
        pairs = enumerate(zip(ours, other, strict=True))
        return [place for index, (a, b) in pairs for place in differences(a, b, f"{name}[{index}]")]
    return [] if ours == other else [f"{name}: {ours} and {other}"]


def run_differences(run_dir: Path, other_dir: Path) -> list[str]:
    """Where two runs differ in last.pt, best.pt and metrics.csv, but for timing and the config's `resume`."""
    states, bests, tables = [], [], []
    for folder in (run_dir, other_dir):
        state = read_last(folder)
        state["config"].pop("resume")
        states.append(state | {name: without_timing(state[name]) for name in ("metrics", "best", "start_metrics")})
        best = torch.load(folder / "best.pt", weights_only=True)
        unlike = ("config", "git")  # best.pt may have been made from last.pt of the resumed run
        best = {name: value for name, value in best.items() if name not in unlike}
        bests.append(best | {"metrics": without_timing(best["metrics"])})
        with (folder / "metrics.csv").open(newline="") as file:
            tables.append(without_timing(list(csv.DictReader(file))))
    return differences(*states, "last") + differences(*bests, "best") + differences(*tables, "metrics.csv")


# ---------------------------------------------------------------------------------------------------------------------
# runs that end early


def crash_at_step(monkeypatch, step: int) -> None:
    """Let the update after `step` done ones raise, after its backward."""
    calls, real_clip = [], utils.loop.clip_gradients

    def crash(*args):
        calls.append(1)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        return real_clip(*args)

    monkeypatch.setattr("utils.loop.clip_gradients", crash)


# Every run is a child that is forked before anything is computed, so that importing is paid for once. A child with
# "die" kills itself at a call; the others are killed by the parent once they have used a share of the processor time
# that the whole run took from its first checkpoint to its end.
KILLER = r"""
import gc, importlib, json, os, pkgutil, shutil, signal, sys, time, traceback
from pathlib import Path
import pytest, torch
import torch.utils.tensorboard

torch.set_num_threads(1)
tiny_runs = importlib.import_module(sys.argv[1])
config, folder, cases = json.loads(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
tiny_runs.make_runs_quick(pytest.MonkeyPatch())
gc.collect()
gc.freeze()  # else each child would copy all memory in looking for garbage


def die_at_call(module, name, number, ending=None):
    module = pkgutil.resolve_name(module)
    real, calls = getattr(module, name), []

    def call(*args, **keywords):
        calls.extend([1] * (ending is None or str(args[-1]).endswith(ending)))
        if len(calls) >= number:  # threads may call it at the same time
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **keywords)

    setattr(module, name, call)


def cpu_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(run_dir, resume_path=None, die=None, share=None):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if die is not None:
                die_at_call(*die)
            tiny_runs.train_in(run_dir, config, resume_path)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    first_s = last_s = None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), first_s, last_s
        if (run_dir / "last.pt").exists():
            last_s = cpu_s(pid)
            first_s = last_s if first_s is None else first_s
            if share is not None and last_s >= first_s + share * span_s:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


status, first_s, last_s = run(folder / "whole")
span_s = last_s - first_s
answer = {"whole": [status, 0]}
for name, case in cases.items():
    killed = folder / f"{name}_killed"
    status, *_ = run(killed, **case)
    while status == 0 and "share" in case:  # it was faster than the whole run, and ended first
        case["share"] *= 0.6
        shutil.rmtree(killed)
        status, *_ = run(killed, **case)
    resumed_status, *_ = run(folder / name, killed / "last.pt")
    answer[name] = [status, resumed_status]
print(json.dumps(answer))
"""


def kill_and_resume(tiny_runs: str, config: dict, folder: Path, cases: dict[str, dict]) -> dict[str, int]:
    """Kill a run by SIGKILL in each of several ways, resume it, and hold that it becomes the run that was not killed.

    Args:
        tiny_runs: the module whose make_runs_quick and train_in run it.
        folder: <case>_killed and <case> come here, and whole, the run that was not killed.
        cases: {case: {"die": [module, or module:class, its function, number of the call, what the last argument ends
            with: all if left out]} or {"share": of the processor time between its first checkpoint and its end, 0..1}}.
    Returns:
        {case: the step of the last.pt that the killed run left}.
    """
    arguments = tiny_runs, json.dumps(config), folder, json.dumps(cases)
    done = run_python("-c", KILLER, *arguments, cwd=ROOT, environment=child_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert statuses.pop("whole") == [0, 0] and statuses.keys() == cases.keys()
    for name, (status, resumed_status) in statuses.items():
        assert resumed_status == 0, (name, done.stderr[-3000:])
        assert status == -signal.SIGKILL, name
        assert "end" not in json.loads((folder / f"{name}_killed" / "run.json").read_text())
        assert "end" in json.loads((folder / name / "run.json").read_text())
        assert not run_differences(folder / "whole", folder / name), name
    return {name: load_checkpoint(folder / f"{name}_killed" / "last.pt")["loop"]["step"] for name in cases}
