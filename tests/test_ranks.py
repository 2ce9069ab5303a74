"""Several processes train what one trains, and end together: gloo on CPUs, forked so that importing is paid for once.

One process that has imported the scripts, and computes nothing, forks those of every run: the fixture `runner`.

`python -m benchmarks.ranks` shows the same at full length, under torchrun.
"""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import child_environment, run_python
from tiny import ROOT, run_differences, without_timing

from utils import ranks, settings
from utils.checkpoint import load_checkpoint
from utils.tracking.siamfc import SiamFC
from utils.tracking.tracker import fold_batch_norm

LIMIT_S = 60  # of a run, in which nothing may hang
ENDS_WITHIN_S = 30  # all processes after the first of them died
RUNNER = r"""
import contextlib, gc, importlib, json, os, pkgutil, signal, socket, sys, time, traceback
from pathlib import Path
import pytest, torch
import torch.utils.tensorboard

torch.set_num_threads(1)
from utils import loop, ranks, settings


def at_call(module, name, number, what, ending=""):
    module = pkgutil.resolve_name(module)
    real, calls = getattr(module, name), []

    def call(*args, **keywords):
        calls.extend([1] * str(args[-1]).endswith(ending))
        if len(calls) == number:
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "nan":
                return real(*args, **keywords) * float("nan")
            raise {"bug": ZeroDivisionError, "memory": torch.cuda.OutOfMemoryError}[what](f"out of {what}")
        return real(*args, **keywords)

    setattr(module, name, call)


def child(rank, case, port, run_dir, tiny_runs, script):
    tiny_runs.make_runs_quick(pytest.MonkeyPatch())
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["count"], "LOCAL_WORLD_SIZE": case["count"],
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()})
    out = os.open(run_dir.with_name(f"{run_dir.name}_{rank}.txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1), os.dup2(out, 2)
    trained, real_clip = [], loop.clip_gradients
    loop.clip_gradients = lambda parameters, *rest: real_clip(trained.append(list(parameters)) or trained[-1], *rest)
    if case["count"] > 1:
        ranks.prepare([])
    for rank_to_change, *change in case.get("changes", []):
        if rank_to_change == rank:
            at_call(*change)
    resume = case.get("resume")
    with settings.one_line_errors(script.__name__, "less"):
        ranks.join(case["config"])
        if "code" in case:
            exec(case["code"], {"rank": rank})
        else:
            script.train(case["config"], run_dir, resume and Path(resume))
    if trained:
        torch.save([parameter.detach() for parameter in trained[-1]], run_dir.with_name(f"{run_dir.name}_{rank}.pt"))


def run(case, run_dir, *modules):
    run_dir.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = {}
    for rank in range(case["count"]):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                child(rank, case, port, run_dir, *modules)
                status = 0
            except SystemExit as stop:
                print(stop.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.__stdout__.flush(), sys.__stderr__.flush()
                os._exit(status)
        pids[pid] = rank
    statuses, ended_s, limit = {}, {}, time.monotonic() + float(sys.argv[1])
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = pids.pop(pid)
            statuses[rank], ended_s[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        elif time.monotonic() > limit:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return {"statuses": [statuses[rank] for rank in range(case["count"])],
            "ended_s": max(ended_s.values()) - min(ended_s.values())}


for line in sys.stdin:
    names, folder, cases = json.loads(line)
    modules = [importlib.import_module(name) for name in names]
    gc.collect()
    gc.freeze()  # else each process would copy all memory in looking for garbage
    print(json.dumps({name: run(case, Path(folder, name), *modules) for name, case in cases.items()}), flush=True)
"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """The process that forks those of the runs, and the file with what it says itself."""
    said = tmp_path_factory.mktemp("runner") / "stderr.txt"
    # the first process is the store here, which torchrun has in its own
    environment = child_environment(TORCH_CPP_LOG_LEVEL="ERROR")
    command = [sys.executable, "-c", RUNNER, str(LIMIT_S)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with said.open("w") as file, subprocess.Popen(command, env=environment, stderr=file, **pipes) as process:
        yield process, said  # it ends where its input does


def run_cases(runner, trainer, folder, cases: dict[str, dict]) -> dict[str, dict]:
    """Run trainings, each in some forked processes.

    Args:
        folder: <case> comes here, with what each process printed beside it, <case>_<rank>.txt.
        cases: {case: {"count": of processes, "config": ..., "resume": a last.pt, "changes": [[rank, module, function,
            number of the call, what happens there: "die", "nan", "bug" or "memory", how its last argument ends]],
            "code": what each process does instead of training}}.
    Returns:
        {case: {"statuses": of each rank, "ended_s": from the first to the last end, "printed": by each rank}}.
    """
    folder.mkdir(exist_ok=True)
    process, said = runner
    print(json.dumps([[trainer.tiny.__name__, trainer.name], str(folder), cases]), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    assert answer, said.read_text()[-3000:]
    answers = json.loads(answer)
    for name, answer in answers.items():
        paths = [folder / f"{name}_{rank}.txt" for rank in range(cases[name]["count"])]
        answer["printed"] = [path.read_text() for path in paths]
    return answers


def relative_difference(weights: dict, others: dict) -> float:
    """Compare trained weights: the norm of the difference over the norm; running statistics do not count."""
    names = [name for name, value in weights.items() if value.is_floating_point() and "running" not in name]
    ours, theirs = (torch.cat([state[name].double().flatten() for name in names]) for state in (weights, others))
    return float((ours - theirs).norm() / ours.norm())


def rows_of_step(run_dir, step: int) -> list[dict]:
    rows = [row for row in load_checkpoint(run_dir / "last.pt")["loop"]["rows"] if row["step"] == step]
    return without_timing([{key: value for key, value in row.items() if key.startswith("val/")} for row in rows])


STEPS = ["train.steps=3", "train.eval_every=2", "train.save_every=1", "num_workers=0"]
SHAPES = {1: (1, 6), 2: (2, 3), 3: (3, 2)}  # processes: batch, accumulate
OWN = {  # what is drawn, and two samples to validate on: one of three processes has none
    "train_sam2": ["train.eval_images=2", "train.objects_per_image=1", "train.steps=2"],
    "train_unet": ["model=vit_small", "model.dim=24", "model.num_blocks=2", "model.num_heads=2", "model.dropout=0.3",
                   "optim=sgd", "train.eval_images=2", "train.test_at_end=false"],
    "train_siamfc": ["train.eval_frames=2", "pairs.blur=0.3", "train.eval_pairs=1", "train.steps=2"],
}  # fmt: skip


def shaped(trainer, count: int, *overrides: str) -> dict:
    batch_size, accumulate = SHAPES[count]
    sizes = [f"train.batch_size={batch_size}", f"train.accumulate={accumulate}"]
    return trainer.configure(*STEPS, *sizes, *OWN[trainer.name], *overrides)


@pytest.fixture(scope="module")
def runs(runner, trainer, tmp_path_factory):
    """Runs by one, two and three processes."""
    folder = tmp_path_factory.mktemp("runs")
    cases = {f"by_{count}": {"count": count, "config": shaped(trainer, count)} for count in SHAPES}
    return folder, run_cases(runner, trainer, folder, cases)


def test_two_and_three_processes_give_what_one_gives(trainer, runs):
    folder, answers = runs
    states = {count: load_checkpoint(folder / f"by_{count}" / "last.pt") for count in SHAPES}
    for count, state in states.items():
        answer = answers[f"by_{count}"]
        assert answer["statuses"] == [0] * count, answer["printed"]
        assert relative_difference(states[1]["model"], state["model"]) < 1e-6
        assert rows_of_step(folder / f"by_{count}", 0) == rows_of_step(folder / "by_1", 0) != []  # to the bit
        losses = [
            [row["train/loss"] for row in each["loop"]["rows"] if "train/loss" in row] for each in (states[1], state)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) >= 2
        assert state.keys() == states[1].keys() and state["loop"].keys() == states[1]["loop"].keys()
        weights = [torch.load(folder / f"by_{count}_{rank}.pt") for rank in range(count)]
        assert all(map(torch.equal, weights[0], weights[-1]))  # all processes have the same, to the bit


def test_one_process_writes_and_prints(trainer, runs):
    folder, answers = runs
    files = [sorted(str(path.relative_to(folder / name)) for path in (folder / name).rglob("*")
             if "tfevents" not in path.name) for name in ("by_1", "by_3")]  # fmt: skip
    assert files[0] == files[1] and "run.json" in files[0]
    records = [json.loads((folder / name / "run.json").read_text()) for name in ("by_1", "by_3")]
    assert [len(record["processes"]) for record in records] == [1, 3] and records[1]["processes"][0].endswith(" cpu")
    first, *others = answers["by_3"]["printed"]
    assert "3 processes: " in first and "Written to" in first and others == ["", ""], others


only_unet = pytest.mark.parametrize("trainer", ["train_unet"], indirect=True)  # the loops end alike


@only_unet
def test_a_process_that_dies_ends_the_others_and_the_run_resumes(runner, trainer, runs, tmp_path):
    """In a step, in the middle of saving, in an evaluation; by as many processes to the bit, by one to 1e-6."""
    two = {"count": 2, "config": shaped(trainer, 2)}
    deaths = {
        "in_step": [1, "utils.loop", "clip_gradients", 3, "die"],
        "in_save": [0, "utils.checkpoint:os", "replace", 2, "die", "last.pt"],
        "in_evaluation": [1, "train_unet", "evaluate", 2, "die"],
    }
    died = run_cases(runner, trainer, tmp_path, {name: two | {"changes": [change]} for name, change in deaths.items()})
    for name, answer in died.items():
        killed = deaths[name][0]
        assert answer["statuses"][killed] == -signal.SIGKILL and answer["statuses"][1 - killed] == 1, answer
        lines = re.findall("^error: .*$", "\n".join(answer["printed"]), re.M)
        assert answer["ended_s"] < ENDS_WITHIN_S and "Traceback" not in "".join(answer["printed"]), answer
        expected = [] if killed == 0 else ["error: another process of the run has ended"]  # the first is the store here
        assert [line.split(" (")[0] for line in lines] == expected, answer
    last = {name: str(tmp_path / name / "last.pt") for name in deaths}
    cases = {f"{name}_by_2": two | {"resume": last[name]} for name in ("in_save", "in_evaluation")}
    cases["in_step_by_1"] = {"count": 1, "config": shaped(trainer, 1), "resume": last["in_step"]}
    for name, answer in run_cases(runner, trainer, tmp_path, cases).items():
        assert set(answer["statuses"]) == {0}, answer
        if name.endswith("by_2"):
            assert not run_differences(runs[0] / "by_2", tmp_path / name), name
    states = [load_checkpoint(folder / "last.pt")["model"] for folder in (runs[0] / "by_2", tmp_path / "in_step_by_1")]
    assert relative_difference(*states) < 1e-6


def write_one_name(trainer, folder) -> Path:
    """A list of one training picture of the tiny dataset: fewer than processes."""
    (folder / "train.txt").write_text("000\n")
    return folder / "train.txt"


@only_unet
def test_errors_are_one_line_of_the_process_that_has_it(runner, trainer, tmp_path):
    good = shaped(trainer, 2)
    cases = {
        "batch": {"config": good | {"train": good["train"] | {"batch_size": 3}}},
        "nan": {"config": good, "changes": [[1, "train_unet", "weighted_loss", 2 + 1, "nan"]]},
        "memory": {"config": good, "changes": [[1, "utils.run", "seed_dropout", 2, "memory"]]},
        "few": {"config": good | {"data": good["data"] | {"train_list": str(write_one_name(trainer, tmp_path))}}},
        "bug": {"config": good, "changes": [[0, "utils.run", "seed_dropout", 2, "bug"]]},
    }
    expected = {
        "batch": "error: train.batch_size is 3, which 2 processes cannot share: give a multiple of 2",
        "nan": "error: loss is nan at step 0, ",
        "memory": "error: out of memory in train, step 0: out of memory; this machine has .*; try less",
        "bug": "ZeroDivisionError: out of bug",
    }
    answers = run_cases(runner, trainer, tmp_path, {name: case | {"count": 2} for name, case in cases.items()})
    few = answers.pop("few")
    assert few["statuses"] == [0, 0] and "images: train 1, val 3" in few["printed"][0], few  # it trains all the same
    for name, answer in answers.items():
        assert answer["statuses"] == [1, 1], (name, answer)
        lines = [
            line for text in answer["printed"] for line in text.splitlines() if re.match(r"error: |\w+Error: ", line)
        ]
        assert len(lines) == 1 and re.match(expected[name], lines[0]), (name, answer["printed"])
        assert answer["ended_s"] < ENDS_WITHIN_S
        assert ("Traceback" in "".join(answer["printed"])) == (name == "bug")


# ---------------------------------------------------------------------------------------------------------------------
# under torchrun itself, and what Hydra starts


def torchrun(script: str, *arguments: str, count: int = 2) -> subprocess.CompletedProcess:
    launch = "from torch.distributed.run import main; main()"  # as torchrun does; it starts the others with python
    options = ["--standalone", f"--nproc_per_node={count}", ROOT / f"{script}.py"]
    return run_python("-c", launch, *options, *arguments, cwd=Path.cwd(), limit_s=LIMIT_S)


@only_unet
def test_a_command_of_a_user_makes_one_folder(trainer, tmp_path):
    """Without hydra.run.dir each process would have made a folder of its own, named after its time."""
    sweep = f"hydra.run.dir={tmp_path}/${{now:%H-%M-%S-%f}}"
    overrides = trainer.tiny.tiny_overrides(trainer.root)
    done = torchrun("train_unet", *overrides, "train.steps=0", "train.test_at_end=false", sweep)
    assert done.returncode == 0, done.stderr[-2000:]
    (run_dir,) = tmp_path.iterdir()
    assert {".hydra", "last.pt", "best.pt", "run.json", "train_unet.log"} <= {path.name for path in run_dir.iterdir()}
    assert done.stdout.count("Written to") == 1 and "2 processes: " in done.stdout


@pytest.mark.parametrize(
    "script, argument, message",
    [
        ("train_unet", "--multirun", "error: --multirun is for one process; under torchrun start each run by itself"),
        ("train_unet", "hydra.mode=MULTIRUN", "error: --multirun is for one process"),
        ("infer_sam2", "input=a.jpg", "error: infer_sam2.py runs in one process: start it with python instead"),
        ("train_unet", "", None),
    ],
)
def test_what_several_processes_cannot_do(script, argument, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", argument] if argument else [f"{script}.py"])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    if message is None:
        settings.read_command_line("unet")
        assert ranks.launched_count() == ranks.local_count() == 2 and ranks.count() == 1  # not joined yet
        return
    with pytest.raises(SystemExit, match=re.escape(message)):
        settings.read_command_line("unet")


def test_the_other_processes_are_silent_whatever_the_order_of_their_arguments(monkeypatch):
    """Hydra takes key=value arguments in one row: silence stands behind the last of them."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(ranks.atexit, "register", lambda *args: None)
    arguments = ranks.prepare(["train.steps=1", "--config-name=y"])
    assert arguments == ["train.steps=1", *ranks.SILENT_RUN, "--config-name=y"]
    assert ranks.prepare(["--cfg", "job"]) == ["--cfg", "job", *ranks.SILENT_RUN]
    assert ranks.prepare([]) == ranks.SILENT_RUN and sys.stdout.name == os.devnull


def test_processes_that_cannot_reach_each_other_say_so(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    def refuse(*args, **keywords):
        raise RuntimeError("Unable to find interface for: eth7\nmore")

    monkeypatch.setattr(ranks.dist, "init_process_group", refuse)
    message = "the 2 processes cannot reach each other (Unable to find interface for: eth7): see the machines' names"
    with pytest.raises(ValueError, match=re.escape(message)):
        ranks.join({"device": "auto", "check": False})


@pytest.mark.parametrize(
    "asked, message",
    [
        (
            {"device": "cuda:7"},
            "device is cuda:7; must be auto, cpu or cuda where 2 processes train: each takes its own",
        ),
        ({"check": True}, "check=true is for one process: start it with python instead of torchrun"),
        ({"check": "fit"}, "check=fit is for one process"),
        ({"mode": "predict"}, "mode=predict is for one process"),
    ],
)
def test_what_no_process_of_several_can_have(asked, message, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *args, **keywords: None)
    monkeypatch.setattr(ranks.dist, "set_timeout", lambda timeout: None, raising=False)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    config = {"device": "auto", "check": False, "mode": "train"} | asked
    with pytest.raises(ValueError, match=re.escape(message)):
        ranks.join(config, config["mode"])


def test_what_is_this_processes_own_is_not_blamed_on_others():
    for message in ("CUDA out of memory", "DataLoader worker (pid 7) is killed by signal: Killed."):
        with pytest.raises(RuntimeError, match=re.escape(message)), ranks._together():
            raise RuntimeError(message)
    with pytest.raises(ranks.OtherEndedError, match="another process of the run has ended"), ranks._together():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4242")
    with pytest.raises(ranks.OtherEndedError), ranks._together():
        raise RuntimeError  # which says nothing


def test_a_world_size_without_a_rank_is_none_of_torchruns(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some clusters set it for every job
    monkeypatch.delenv("RANK", raising=False)
    assert ranks.launched_count() == ranks.local_count() == ranks.count() == 1 and ranks.is_first()


@only_unet
def test_a_sweep_runs_by_submitit(trainer, tmp_path):
    """hydra/launcher=submitit_slurm, but for Slurm: its jobs are processes of this machine."""
    overrides = trainer.tiny.tiny_overrides(trainer.root)
    arguments = ["--multirun", "hydra/launcher=submitit_local", *overrides]
    arguments += ["train.steps=1", "train.test_at_end=false", "seed=1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = run_python(ROOT / "train_unet.py", *arguments, cwd=tmp_path, limit_s=2 * LIMIT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads((tmp_path / "sweep" / name / "run.json").read_text()) for name in ("0",)]
    assert [record["config"]["seed"] for record in records] == [1] and all("end" in record for record in records)


def test_batch_norm_is_synchronised_on_cuda_alone(monkeypatch, capsys):
    """Weights keep their names, and what is evaluated stays the same: on a CPU here, where it cannot train."""
    model = SiamFC(False).eval()
    monkeypatch.setattr(ranks, "count", lambda: 2)
    assert ranks.synchronize_norms(model, torch.device("cpu")) is model
    assert "each of the 2 processes normalises its own share" in capsys.readouterr().out
    exemplars, instances = torch.rand(1, 3, 127, 127) * 255, torch.rand(1, 3, 239, 239) * 255
    with torch.no_grad():
        expected = model(exemplars, instances)
        synchronized = ranks.synchronize_norms(copy.deepcopy(model), torch.device("cuda"))
        assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in synchronized.modules()) == 4
        assert synchronized.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(synchronized(exemplars, instances), expected)
        folded = [fold_batch_norm(each) for each in (model, synchronized)]
        assert torch.equal(*(each(exemplars, instances) for each in folded))
        assert not [module for module in folded[1].modules() if "Norm" in type(module).__name__]


AVERAGE = r"""
import os
import torch
from utils import ranks

both, one, none = weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5)
loss = (rank + 1) * both.sum() + (6 * one.sum() if rank == 1 else 0)
loss.backward()
ranks.average_gradients(weights)
gradients = [None if weight.grad is None else weight.grad.tolist() for weight in weights]
optimizer.step()
os.write(1, f"{gradients} {none.tolist()}\n".encode())  # the second process prints nothing
ranks.leave()
"""


@only_unet
def test_a_parameter_that_one_process_uses_gets_its_share_and_one_that_none_uses_no_update(runner, trainer, tmp_path):
    case = {"count": 2, "config": {"device": "cpu", "check": False}, "code": AVERAGE}
    answer = run_cases(runner, trainer, tmp_path, {"average": case})["average"]
    assert answer["statuses"] == [0, 0], answer
    expected = "[[1.5, 1.5, 1.5], [3.0, 3.0, 3.0], None] [1.0, 1.0, 1.0]"  # no weight decay either
    assert [text.splitlines()[-1] for text in answer["printed"]] == [expected, expected]
