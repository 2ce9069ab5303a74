"""train_siamfc.py: resuming is exact, wherever the run was killed, and a run is a function of its config.

The published code stores neither the optimizer nor the step, and cannot resume.
"""

import json

import pytest
import torch
from tiny import crash_at_step, differences, kill_and_resume, read_last, run_differences, without_timing
from tiny_tracking import (
    compose_config,
    make_runs_quick,
    run_main,
    script_evaluation,
    tiny_overrides,
    train_in,
    write_got10k,
)

import train_siamfc
from utils.checkpoint import load_checkpoint
from utils.tracking.siamfc import SiamFC

STEPS = (
    "train.steps=4", "train.eval_every=3", "train.save_every=1", "train.eval_frames=2", "pairs.color_jitter=0.2",
    "pairs.blur=0.3", "pairs.grey=0.3",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_got10k(tmp_path_factory.mktemp("tiny") / "data", num_train=3, num_val=1, num_frames=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    make_runs_quick(monkeypatch)


def configure(root, *overrides):
    return compose_config(*tiny_overrides(root), *STEPS, *overrides)


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
    unequal = run_differences(whole, tmp_path / "resumed")
    assert unequal == ["last/config/num_workers: 0 and 1"]
    metrics = [json.loads((folder / "run.json").read_text())["metrics"] for folder in (tmp_path / "resumed", whole)]
    for part in ("start", "best", "last"):
        assert without_timing(metrics[0][part]) == without_timing(metrics[1][part])
    assert torch.load(whole / "last.pt", weights_only=True)["optimizer"][
        "state"
    ]  # momentum is stored, and was compared

    # a run that was complete: nothing is trained, and the new folder has all that the old one had
    status, _ = run_main(monkeypatch, capfd, tmp_path / "again", f"resume={tmp_path / 'resumed' / 'last.pt'}")
    assert status == 0 and run_differences(whole, tmp_path / "again") == unequal


def test_momentum_and_schedule_have_a_say(root, whole, tmp_path):
    """To start again from weights alone, as one has to with the published code, gives another run."""
    state = torch.load(whole / "last.pt", weights_only=True)
    momenta = [parameter_state["momentum_buffer"] for parameter_state in state["optimizer"]["state"].values()]
    assert any(momentum.abs().max() > 0 for momentum in momenta)
    rates = [row["lr"] for row in state["loop"]["rows"] if "lr" in row]
    assert len(rates) == len(set(rates)) == 4
    loop = {**state["loop"], "step": 2, "evaluated_step": 0}
    lost = {**state, "loop": loop, "config": {**state["config"], "resume": None}}
    lost["optimizer"] = {**state["optimizer"], "state": {}}
    (tmp_path / "lost").mkdir()
    torch.save(lost, tmp_path / "lost" / "last.pt")
    torch.save(torch.load(whole / "best.pt", weights_only=True), tmp_path / "lost" / "best.pt")
    kept = {**lost, "optimizer": state["optimizer"]}
    (tmp_path / "kept").mkdir()
    torch.save(kept, tmp_path / "kept" / "last.pt")
    torch.save(torch.load(whole / "best.pt", weights_only=True), tmp_path / "kept" / "best.pt")
    runs = [
        train_in(tmp_path / f"{name}_run", configure(root), tmp_path / name / "last.pt") for name in ("lost", "kept")
    ]
    assert differences(runs[0]["model"], runs[1]["model"])


def test_same_seed_is_the_same_run_with_any_workers_and_another_seed_is_not(root, whole, tmp_path):
    train_in(tmp_path / "workers", configure(root, "num_workers=2"))
    assert run_differences(whole, tmp_path / "workers") == ["last/config/num_workers: 0 and 2"]
    other = train_in(tmp_path / "other", configure(root, "seed=1"))
    state = read_last(whole)
    assert differences(state["model"], other["model"]) and differences(state["metrics"], other["metrics"])


def test_early_stop_holds_after_a_resume(root, tmp_path, monkeypatch):
    """Killed between the evaluation that ends the run and its end."""
    script_evaluation(monkeypatch, [0.5, 0.4, 0.9])
    config = configure(root, "train.steps=3", "train.eval_every=1", "train.early_stop_evals=1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_siamfc, "finish_run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        train_in(tmp_path / "stopped", config)
    resumed = train_in(tmp_path / "resumed", config, tmp_path / "stopped" / "last.pt")
    assert resumed["step"] == 1 and not run_differences(tmp_path / "stopped", tmp_path / "resumed")


def test_more_steps_go_on_with_the_samples_that_come_next(root, whole, tmp_path, monkeypatch, capfd):
    seen = []
    real = train_siamfc.SiamesePairs.__getitem__

    def record(self, sample_index):
        seen.append((self.seed, sample_index))
        return real(self, sample_index)

    monkeypatch.setattr(train_siamfc.SiamesePairs, "__getitem__", record)
    status, _ = run_main(monkeypatch, capfd, tmp_path / "run", f"resume={whole}", "train.steps=6", "train.eval_pairs=2")
    assert status == 0 and [index for seed, index in seen if seed == 0] == [8, 9, 10, 11]
    assert {index for seed, index in seen if seed == 1} == {0, 1}  # validation pairs, the same each time
    state = read_last(tmp_path / "run")
    assert state["step"] == 6 and [row["step"] for row in state["metrics"] if "lr" in row] == [1, 2, 3, 4, 5, 6]


def test_resume_needs_no_checkpoint_to_start_from(root, tmp_path, monkeypatch):
    """model.checkpoint's file is gone; a resumed run has its own weights."""
    start = tmp_path / "start.pt"
    start.touch()
    monkeypatch.setattr(train_siamfc, "load_siamfc", lambda path: train_siamfc.SiamFC(False))
    config = configure(root, f"model.checkpoint={start}")
    train_in(tmp_path / "whole", config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at_step(patch, 2)
        train_in(tmp_path / "crashed", config)
    monkeypatch.setattr(train_siamfc, "load_siamfc", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    train_in(tmp_path / "resumed", config, tmp_path / "crashed" / "last.pt")
    assert not run_differences(tmp_path / "whole", tmp_path / "resumed")
    with pytest.raises(FileNotFoundError):
        train_in(tmp_path / "anew", config)


def test_resume_needs_a_new_folder_and_a_last_checkpoint(root, whole, monkeypatch, capfd, tmp_path):
    before = (whole / "last.pt").read_bytes()
    status, output = run_main(monkeypatch, capfd, whole, f"resume={whole}", "train.steps=5")
    assert status == 1 and "a run needs a folder of its own" in output
    assert (whole / "last.pt").read_bytes() == before
    status, output = run_main(monkeypatch, capfd, tmp_path / "run", f"resume={whole / 'best.pt'}")
    assert status == 1 and "only last.pt can be resumed from" in output


@pytest.mark.parametrize(
    "override, listed",
    [
        ("train.batch_size=3", "train.batch_size: stored 2, now 3"),
        ("optim.lr=0.5", "optim.lr: stored 0.01, now 0.5"),
        ("pairs.max_gap=7", "pairs.max_gap: stored 100, now 7"),
        ("tracker.scale_lr=0.3", "tracker.scale_lr: stored 0.59, now 0.3"),
        ("model.score_bias=true", "model.score_bias: stored False, now True"),
        ("seed=3", "seed: stored 0, now 3"),
        ("precision=bf16", "precision: stored auto, now bf16"),
    ],
)
def test_resume_lists_what_may_not_change(override, listed, whole):
    stored = load_checkpoint(whole / "last.pt")["config"]
    arguments = [f"resume={whole}", override, "train.steps=9", "num_workers=3", "data.root=/moved"]
    with pytest.raises(ValueError, match="the config differs") as error:
        train_siamfc.resumed_config(stored, compose_config(*arguments), arguments, train_siamfc.RESUMABLE)
    assert listed in str(error.value) and len(str(error.value).splitlines()) == 3
    config = train_siamfc.resumed_config(
        stored, compose_config(*arguments), [arguments[0], *arguments[2:]], train_siamfc.RESUMABLE
    )
    assert (config["train"]["steps"], config["data"]["root"], config["data"]["format"]) == (9, "/moved", "got10k")


# ---------------------------------------------------------------------------------------------------------------------
# kill -9


@pytest.mark.slow
def test_killed_runs_resume_exactly(root, tmp_path):
    config = configure(root, "train.steps=5", "train.eval_every=2", "train.batch_size=1", "train.accumulate=2")
    cases = {
        # last.pt.tmp of step 3 is complete, last.pt is not yet replaced
        "mid_save": {"die": ["os", "replace", 4, "last.pt"]},
        # last.pt has the first evaluation, which is the best so far, and there is no best.pt yet
        "before_best": {"die": ["os", "replace", 1, "best.pt"]},
        # the tracking of the second evaluation is done, its pairs are not
        "mid_validation": {"die": ["train_siamfc", "evaluate_pairs", 2]},
        # between the third step's two forwards: the two evaluations before it call the loss twice each
        "mid_accumulation": {"die": ["train_siamfc", "balanced_loss", 2 + 2 * 2 + 2 + 2]},
        "mid_step": {"die": ["train_siamfc", "exponential_lr", 5]},
        # all is trained and stored, but run.json has no end
        "at_the_end": {"die": ["train_siamfc", "finish_run", 1]},
    }
    steps = kill_and_resume("tiny_tracking", config, tmp_path, cases)
    assert steps == {
        "mid_save": 2, "before_best": 0, "mid_validation": 1, "mid_accumulation": 2, "mid_step": 4, "at_the_end": 5,
    }  # fmt: skip


@pytest.mark.slow
def test_the_real_network_resumes_exactly(root, tmp_path, monkeypatch):
    """In bf16 on the CPU, with momentum and batch norm of AlexNet."""
    monkeypatch.setattr(train_siamfc, "SiamFC", SiamFC)
    config = configure(root, "train.steps=3", "precision=bf16")
    train_in(tmp_path / "whole", config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at_step(patch, 2)
        train_in(tmp_path / "first", config)
    train_in(tmp_path / "second", config, tmp_path / "first" / "last.pt")
    assert not run_differences(tmp_path / "whole", tmp_path / "second")
