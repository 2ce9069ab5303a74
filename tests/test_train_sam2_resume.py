"""train_sam2.py: resuming is exact, wherever the run was killed, and a run is a function of its config."""

import json
import shutil

import pytest
import torch
from tiny import crash_at_step, differences, kill_and_resume, run_differences
from tiny_training import (
    compose_config,
    make_runs_quick,
    run_main,
    script_evaluation,
    tiny_overrides,
    train_in,
    write_dataset,
)

import train_sam2
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.sam2 import model as sam2_model

STEPS = ("train.steps=3", "train.eval_every=2", "train.save_every=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    make_runs_quick(monkeypatch)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The folder of an uninterrupted run of 3 steps."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_runs_quick(monkeypatch)
        train_in(run_dir, compose_config(*tiny_overrides(root), *STEPS))
    return run_dir


@pytest.fixture(scope="module")
def crashed(root, tmp_path_factory):
    """The folder of the same run, ended in its second step."""
    run_dir = tmp_path_factory.mktemp("crashed") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        make_runs_quick(monkeypatch)
        crash_at_step(monkeypatch, 1)
        train_in(run_dir, compose_config(*tiny_overrides(root), *STEPS))
    assert load_checkpoint(run_dir / "last.pt")["loop"]["step"] == 1
    return run_dir


def test_resumed_run_equals_the_uninterrupted_one(whole, crashed, tmp_path, monkeypatch, capfd):
    """By the command, with other workers, from a checkpoint between two evaluations; then from the end."""
    arguments = [f"resume={crashed}", "num_workers=1"]
    status, output = run_main(monkeypatch, capfd, tmp_path / "resumed", *arguments)
    assert status == 0 and f"resumed from {crashed / 'last.pt'} at step 1" in output
    found = run_differences(whole, tmp_path / "resumed")
    assert found == ["last/config/num_workers: 0 and 1"]
    record = json.loads((tmp_path / "resumed" / "run.json").read_text())
    assert record["metrics"] == json.loads((whole / "run.json").read_text())["metrics"]

    # a run that was complete: nothing is trained, and the new folder has all that the old one had
    status, _ = run_main(monkeypatch, capfd, tmp_path / "again", f"resume={tmp_path / 'resumed' / 'last.pt'}")
    assert status == 0 and run_differences(whole, tmp_path / "again") == found


def test_kill_before_the_first_save_of_a_resumed_run_loses_nothing(root, whole, crashed, tmp_path, monkeypatch):
    config = compose_config(*tiny_overrides(root), *STEPS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at_step(patch, 0)
        train_in(tmp_path / "second", config, crashed / "last.pt")
    train_in(tmp_path / "third", config, tmp_path / "second" / "last.pt")
    assert not run_differences(whole, tmp_path / "third")


def test_weights_alone_would_continue_to_another_result(root, whole, crashed, tmp_path):
    """The tutorial's checkpoint has no optimizer state."""
    state = load_checkpoint(crashed / "last.pt")
    state["optimizer"]["state"] = {}
    (tmp_path / "bare").mkdir()
    save_checkpoint(tmp_path / "bare" / "last.pt", state)
    shutil.copy(crashed / "best.pt", tmp_path / "bare")
    train_in(tmp_path / "resumed", compose_config(*tiny_overrides(root), *STEPS), tmp_path / "bare" / "last.pt")
    found = run_differences(whole, tmp_path / "resumed")
    assert any(name.startswith("last/model/") for name in found)


@pytest.mark.parametrize(
    "weights",
    [{"checkpoint": "gone.pt"}, {"checkpoint": "auto", "url": "https://nowhere.invalid/never_downloaded.pt"}],
    ids=["deleted", "not_downloaded"],
)
def test_resume_needs_no_other_weights(weights, whole, tmp_path, monkeypatch, capfd):
    """The file that the run started from may be gone, and nothing is downloaded."""
    monkeypatch.setattr(sam2_model, "_download", lambda url, path: pytest.fail(f"{url} was asked for"))
    state = load_checkpoint(whole / "last.pt")
    state["config"]["model"] |= weights
    (tmp_path / "moved").mkdir()
    save_checkpoint(tmp_path / "moved" / "last.pt", state)
    shutil.copy(whole / "best.pt", tmp_path / "moved")
    status, output = run_main(monkeypatch, capfd, tmp_path / "run", f"resume={tmp_path / 'moved'}")
    assert status == 0, output
    assert "random weights" not in output
    resumed = load_checkpoint(tmp_path / "run" / "last.pt")
    assert not differences(resumed["model"], state["model"])
    assert resumed["config"]["model"] == state["config"]["model"]


@pytest.mark.parametrize("steps", [4, 1])
def test_kill_between_the_two_checkpoints_leaves_them_in_agreement(steps, root, tmp_path, monkeypatch):
    """Steps 0 and 2 write last.pt and best.pt, step 1 last.pt alone: the kill comes before the fifth file.

    Then the run goes on to its end, or to another last step, at which it would be evaluated.
    """
    overrides = ("train.eval_every=2", "train.save_every=1", "prompts=point")
    config = compose_config(*tiny_overrides(root), "train.steps=4", *overrides)
    saved = []
    real_save = save_checkpoint

    def die(path, state):
        saved.append(path.name)
        if len(saved) == 5:
            raise KeyboardInterrupt
        real_save(path, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        script_evaluation(patch, [0.5, 0.9])
        patch.setattr("utils.loop.save_checkpoint", die)
        train_in(tmp_path / "killed", config)
    assert len(saved) == 5
    script_evaluation(monkeypatch, [0.3])
    config["train"]["steps"] = steps
    last = train_in(tmp_path / "resumed", config, tmp_path / "killed" / "last.pt")
    best = load_checkpoint(tmp_path / "resumed" / "best.pt")
    assert best["metrics"] == last["best"] and (last["best"]["step"], last["best"]["val/iou_1_click"]) == (2, 0.9)
    assert not differences(best["model"], load_checkpoint(tmp_path / "killed" / "last.pt")["model"])
    if steps == 4:
        script_evaluation(monkeypatch, [0.5, 0.9, 0.3])
        train_in(tmp_path / "whole", config)
        assert not run_differences(tmp_path / "whole", tmp_path / "resumed")


def test_same_seed_is_the_same_run_with_any_workers(root, whole, tmp_path):
    train_in(tmp_path / "workers", compose_config(*tiny_overrides(root), *STEPS, "num_workers=2"))
    assert run_differences(whole, tmp_path / "workers") == ["last/config/num_workers: 0 and 2"]


def test_other_seed_is_another_run(root, whole, tmp_path, monkeypatch):
    """From the same weights: the seed also orders the pictures and draws the prompts."""
    weights = f"model.checkpoint={whole / 'best.pt'}"
    script_evaluation(monkeypatch)
    trained = []
    for seed in (0, 1):
        overrides = ("train.steps=1", f"seed={seed}", weights, "prompts=point")
        trained.append(train_in(tmp_path / str(seed), compose_config(*tiny_overrides(root), *overrides)))
    assert trained[0]["metrics"][1]["train/loss"] != trained[1]["metrics"][1]["train/loss"]
    assert differences(trained[0]["model"], trained[1]["model"])


def test_early_stop_holds_after_a_resume(root, tmp_path, monkeypatch):
    """Killed between the evaluation that ends the run and its end."""
    script_evaluation(monkeypatch, [0.5, 0.4, 0.9])
    overrides = ("train.steps=3", "train.eval_every=1", "train.early_stop_evals=1", "prompts=point")
    config = compose_config(*tiny_overrides(root), *overrides)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_sam2, "finish_run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        train_in(tmp_path / "stopped", config)
    resumed = train_in(tmp_path / "resumed", config, tmp_path / "stopped" / "last.pt")
    assert resumed["step"] == 1 and not run_differences(tmp_path / "stopped", tmp_path / "resumed")


def test_resume_needs_a_new_folder(root, whole, monkeypatch, capfd):
    before = (whole / "last.pt").read_bytes()
    status, output = run_main(monkeypatch, capfd, whole, f"resume={whole}", "train.steps=5")
    assert status == 1 and f"{whole / 'run.json'} exists; a run needs a folder of its own" in output
    assert (whole / "last.pt").read_bytes() == before


def test_resume_from_what_cannot_be_resumed(whole, tmp_path, monkeypatch, capfd):
    for path, message in (
        (tmp_path / "nothing", "which does not exist"),
        (tmp_path, "it has no last.pt"),
        (whole / "best.pt", "best.pt has no optimizer state"),
    ):
        status, output = run_main(monkeypatch, capfd, tmp_path / "run", f"resume={path}")
        assert status == 1 and f"resume is {path}" in output and message in output


@pytest.fixture(scope="module")
def stored(root):
    """The config of a run as its last.pt has it."""
    return compose_config(*tiny_overrides(root), *STEPS)


def resumed_config(stored, *overrides):
    arguments = ["resume=run", *overrides]
    return train_sam2.resumed_config(stored, compose_config(*arguments), arguments, train_sam2.RESUMABLE)


def test_resume_takes_the_stored_config_and_allows_what_may_change(stored):
    """The command line need not repeat anything: configs/sam2/train_sam2.yaml's defaults are not the stored values."""
    assert resumed_config(stored) == stored | {"resume": "run"}
    allowed = ("train.steps=9", "device=cpu", "num_workers=3", "data.root=/elsewhere")
    config = resumed_config(stored, *allowed)
    assert config["train"] == stored["train"] | {"steps": 9} and config["num_workers"] == 3
    assert config["data"] == stored["data"] | {"root": "/elsewhere"}
    assert config["model"] == stored["model"] and config["optim"] == stored["optim"]
    same = [f"train.batch_size={stored['train']['batch_size']}", "model.image_size=64", "train.eval_clicks=[1]"]
    assert resumed_config(stored, *same) == stored | {"resume": "run"}


@pytest.mark.parametrize(
    "override, listed",
    [
        ("train.batch_size=3", "train.batch_size: stored 2, now 3"),
        ("optim.lr=0.5", ", now 0.5"),
        ("seed=1", "seed: stored 0, now 1"),
        ("precision=bf16", "precision: stored auto, now bf16"),
        ("loss=tutorial", "loss.terms.focal: stored 20.0, now 0.0"),
        ("data=labpics", "data.format: stored label_map, now labpics"),
        ("data_root=/elsewhere", "data_root: stored "),
        ("train.trainable=[neck]", "train.trainable: stored ['prompt_encoder', 'mask_decoder'], now ['neck']"),
    ],
)
def test_resume_lists_what_may_not_change(override, listed, stored):
    with pytest.raises(ValueError, match="the config differs") as error:
        resumed_config(stored, override, "train.steps=9")
    assert listed in str(error.value)
    assert "train.steps: " not in str(error.value) and "train.steps" in str(error.value).splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# kill -9


@pytest.mark.slow
def test_killed_runs_resume_exactly(root, tmp_path):
    config = compose_config(
        *tiny_overrides(root), "train.steps=5", "train.eval_every=2", "train.save_every=1", "train.batch_size=1",
        "train.accumulate=2", "train.eval_clicks=[1,2]",
    )  # fmt: skip
    cases = {
        # last.pt.tmp of step 3 is complete, last.pt is not yet replaced
        "mid_save": {"die": ["os", "replace", 4, "last.pt"]},
        # last.pt of step 0 is there, and best.pt is not
        "between_saves": {"die": ["utils.loop", "save_checkpoint", 2]},
        # 13 objects, 2 clicks: within the second evaluation
        "mid_validation": {"die": ["train_sam2", "center_point", 13 * 2 + 9]},
        # between the third step's two forwards
        "mid_accumulation": {"die": ["train_sam2", "prompted_loss", 2 * 2 + 2]},
    }
    shares = [0.1, 0.25, 0.4, 0.55, 0.7]
    generator = torch.Generator().manual_seed(0)
    for number, share in enumerate(shares):
        jitter = 0.14 * (torch.rand(1, generator=generator).item() - 0.5)
        cases[f"random_{number}"] = {"share": share + jitter}
    steps = kill_and_resume("tiny_training", config, tmp_path, cases)
    assert (tmp_path / "mid_save_killed" / "last.pt.tmp").exists()
    assert (steps["mid_save"], steps["mid_validation"], steps["mid_accumulation"]) == (2, 1, 2)
    assert not (tmp_path / "between_saves_killed" / "best.pt").exists()
    assert len(set(steps.values())) >= 3  # the random moments are spread over the run
