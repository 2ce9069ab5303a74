"""train_unet.py: resuming is exact, wherever the run was killed, and a run is a function of its config."""

import json

import pytest
from tiny import crash_at_step, differences, kill_and_resume, read_last, run_differences
from tiny_segmentation import (
    compose_config,
    make_runs_quick,
    run_main,
    script_evaluation,
    tiny_overrides,
    train_in,
    write_dataset,
)

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
        ("loss=tversky", "loss.terms.tversky: stored 0.0, now 1.0"),
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


@pytest.mark.slow
def test_killed_runs_resume_exactly(root, tmp_path):
    config = configure(root, "train.steps=5", "train.eval_every=2", "train.batch_size=1", "train.accumulate=2")
    cases = {
        # last.pt.tmp of step 3 is complete, last.pt is not yet replaced
        "mid_save": {"die": ["os", "replace", 4, "last.pt"]},
        # last.pt has the evaluation of step 2, best.pt not yet
        "before_best": {"die": ["os", "replace", 2, "best.pt"]},
        # three pictures each: the second picture of the second evaluation
        "mid_validation": {"die": ["utils.segmentation.prediction:Predictor", "predict", 3 + 2]},
        # between the third step's two forwards: the evaluations before it use the loss three times each
        "mid_accumulation": {"die": ["train_unet", "weighted_loss", 3 + 2 * 2 + 3 + 2]},
        "mid_step": {"die": ["train_unet", "scheduled_lr", 5]},
        # the checkpoint of step 5 is there, the test split was being measured
        "at_the_end": {"die": ["utils.segmentation.prediction:Predictor", "predict", 4 * 3 + 1]},
    }
    steps = kill_and_resume("tiny_segmentation", config, tmp_path, cases)
    assert steps == {
        "mid_save": 2, "before_best": steps["before_best"], "mid_validation": 1, "mid_accumulation": 2, "mid_step": 4,
        "at_the_end": 5,
    }  # fmt: skip
