"""Resuming is exact in all three trainers, wherever a run was killed, and a run is a function of its config.

What last.pt and best.pt hold and how they come back is tests/test_loop.py's.
"""

import json
import os
import re
import shutil

import pytest
import torch
from tiny import differences, kill_and_resume, read_last, run_differences, without_timing
from trainers import train_and_crash

import train_sam2
import train_siamfc
import train_unet
from utils.checkpoint import load_checkpoint, resumed_config, save_checkpoint
from utils.sam2 import model as sam2_model
from utils.tracking.siamfc import SiamFC

STEPS = ["train.steps=4", "train.eval_every=3", "train.save_every=1"]  # last.pt at each, evaluated at 0, 3 and 4
DRAWN = {  # what a resumed run must draw as the whole run did: augmentation, dropout
    "train_sam2": [],
    "train_unet": ["model=vit_small", "model.dim=24", "model.num_blocks=2", "model.num_heads=2", "model.dropout=0.3",
                   "data.rotation=20", "data.elastic_px=2"],
    "train_siamfc": ["train.eval_frames=2", "pairs.color_jitter=0.2", "pairs.blur=0.3", "pairs.grey=0.3"],
}  # fmt: skip


def configure(trainer, *overrides):
    return trainer.configure(*DRAWN[trainer.name], *STEPS, *overrides)


def only(*names):
    """Run a test for these trainers alone."""
    return pytest.mark.parametrize("trainer", names, indirect=True)


@pytest.fixture(autouse=True)
def quick(trainer, monkeypatch):
    trainer.tiny.make_runs_quick(monkeypatch)


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """The folder of an uninterrupted run of 4 steps."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        trainer.tiny.make_runs_quick(monkeypatch)
        trainer.tiny.train_in(run_dir, configure(trainer))
    return run_dir


@pytest.fixture(scope="module")
def crashed(trainer, tmp_path_factory):
    """The folder of the same run, ended in its third step."""
    run_dir = tmp_path_factory.mktemp("crashed") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        trainer.tiny.make_runs_quick(monkeypatch)
        train_and_crash(trainer, run_dir, configure(trainer), 2)
    assert read_last(run_dir)["step"] == 2
    return run_dir


def test_resumed_run_equals_the_uninterrupted_one(trainer, whole, crashed, tmp_path, monkeypatch, capfd):
    """By the command, with other workers, from a checkpoint between two evaluations; then from the end."""
    run_main = trainer.tiny.run_main
    status, output = run_main(monkeypatch, capfd, tmp_path / "resumed", f"resume={crashed}", "num_workers=1")
    assert status == 0 and f"resumed from {crashed / 'last.pt'} at step 2" in output
    unlike = run_differences(whole, tmp_path / "resumed")
    assert unlike == ["last/config/num_workers: 0 and 1"]
    metrics = [json.loads((folder / "run.json").read_text())["metrics"] for folder in (tmp_path / "resumed", whole)]
    assert metrics[0].keys() == metrics[1].keys()
    assert all(without_timing(metrics[0][part]) == without_timing(metrics[1][part]) for part in metrics[0])

    # a run that was complete: nothing is trained, and the new folder has all that the old one had
    status, _ = run_main(monkeypatch, capfd, tmp_path / "again", f"resume={tmp_path / 'resumed' / 'last.pt'}")
    assert status == 0 and run_differences(whole, tmp_path / "again") == unlike


def test_dropout_goes_on_though_no_stream_of_random_numbers_is_restored(trainer, whole, crashed, tmp_path, monkeypatch):
    """Only the CPU's was: on a GPU a resumed run repeated the dropout of its first steps."""
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    trainer.tiny.train_in(tmp_path / "resumed", configure(trainer), crashed / "last.pt")
    assert not run_differences(whole, tmp_path / "resumed")


def test_more_steps_go_on_with_the_samples_that_come_next_and_fewer_end_at_once(trainer, whole, tmp_path, monkeypatch):
    """Two pictures or pairs a step."""
    indices = []
    dataset = {"train_sam2": "PromptedMasks", "train_unet": "AugmentedPairs", "train_siamfc": "SiamesePairs"}
    dataset = getattr(trainer.script, dataset[trainer.name])
    real = dataset.__getitem__

    def record(self, sample_index):
        indices.append((self.seed, sample_index))
        return real(self, sample_index)

    monkeypatch.setattr(dataset, "__getitem__", record)
    last = trainer.tiny.train_in(tmp_path / "run", configure(trainer, "train.steps=6"), whole / "last.pt")
    assert [index for seed, index in indices if seed == 0] == [8, 9, 10, 11]
    assert {index for seed, index in indices if seed == 1} <= {0, 1}  # SiamFC's validation pairs, the same each time
    assert last["step"] == 6 and [row["step"] for row in last["metrics"] if "lr" in row] == [1, 2, 3, 4, 5, 6]
    trainer.tiny.train_in(tmp_path / "short", configure(trainer, "train.steps=1"), whole / "last.pt")
    assert run_differences(whole, tmp_path / "short") == ["last/config/train/steps: 4 and 1"]


def test_kill_before_the_first_save_of_a_resumed_run_loses_nothing(trainer, whole, crashed, tmp_path):
    config = configure(trainer)
    second = train_and_crash(trainer, tmp_path / "second", config, 0, crashed / "last.pt")
    trainer.tiny.train_in(tmp_path / "third", config, second)
    assert not run_differences(whole, tmp_path / "third")


def test_weights_alone_would_continue_to_another_result(trainer, whole, crashed, tmp_path):
    """The tutorial's and the published SiamFC's checkpoints have no optimizer state."""
    state = load_checkpoint(crashed / "last.pt")
    state["optimizer"]["state"] = {}
    shutil.copytree(crashed, tmp_path / "bare")
    save_checkpoint(tmp_path / "bare" / "last.pt", state)
    trainer.tiny.train_in(tmp_path / "resumed", configure(trainer), tmp_path / "bare" / "last.pt")
    places = run_differences(whole, tmp_path / "resumed")
    assert any(place.startswith("last/model/") for place in places)


def test_same_seed_is_the_same_run_with_any_workers_and_another_seed_is_not(trainer, whole, tmp_path):
    """SAM 2 from the same weights: the seed also orders the pictures and draws the prompts."""
    trainer.tiny.train_in(tmp_path / "workers", configure(trainer, "num_workers=2"))
    assert run_differences(whole, tmp_path / "workers") == ["last/config/num_workers: 0 and 2"]
    weights = [f"model.checkpoint={whole / 'best.pt'}"] if trainer.script is train_sam2 else []
    runs = [
        trainer.tiny.train_in(tmp_path / str(seed), configure(trainer, "train.steps=1", f"seed={seed}", *weights))
        for seed in (0, 1)
    ]
    assert differences(runs[0]["model"], runs[1]["model"])
    losses = [next(row["train/loss"] for row in run["metrics"] if "lr" in row) for run in runs]
    assert losses[0] != losses[1]


def test_early_stop_holds_after_a_resume(trainer, tmp_path, monkeypatch):
    """Killed between the evaluation that ends the run and its end."""
    trainer.tiny.script_evaluation(monkeypatch, [0.5, 0.4, 0.9])
    config = configure(trainer, "train.eval_every=1", "train.early_stop_evals=1")
    if trainer.script is train_unet:
        config["train"]["test_at_end"] = False
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.script, "finish_run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        trainer.tiny.train_in(tmp_path / "stopped", config)
    resumed = trainer.tiny.train_in(tmp_path / "resumed", config, tmp_path / "stopped" / "last.pt")
    assert resumed["step"] == 1 and not run_differences(tmp_path / "stopped", tmp_path / "resumed")


def test_resume_needs_a_new_folder_and_a_last_checkpoint(trainer, whole, tmp_path, monkeypatch, capfd):
    """Nest-of-Unets removes earlier runs at its start."""
    before = (whole / "last.pt").read_bytes()
    status, output = trainer.tiny.run_main(monkeypatch, capfd, whole, f"resume={whole}", "train.steps=5")
    assert status == 1 and f"{whole / 'run.json'} exists; a run needs a folder of its own" in output
    assert (whole / "last.pt").read_bytes() == before
    status, output = trainer.tiny.run_main(monkeypatch, capfd, tmp_path / "run", f"resume={whole / 'best.pt'}")
    assert status == 1 and f"resume is {whole / 'best.pt'}; only last.pt can be resumed from" in output


# ---------------------------------------------------------------------------------------------------------------------
# weights that a run started from


@only("train_sam2")
@pytest.mark.parametrize(
    "weights",
    [{"checkpoint": "gone.pt"}, {"checkpoint": "auto", "url": "https://nowhere.invalid/never_downloaded.pt"}],
    ids=["deleted", "not_downloaded"],
)
def test_resume_needs_no_other_weights(weights, trainer, whole, tmp_path, monkeypatch, capfd):
    """The file that the run started from may be gone, and nothing is downloaded."""
    monkeypatch.setattr(sam2_model, "_download", lambda url, path: pytest.fail(f"{url} was asked for"))
    state = load_checkpoint(whole / "last.pt")
    state["config"]["model"] |= weights
    shutil.copytree(whole, tmp_path / "moved")
    save_checkpoint(tmp_path / "moved" / "last.pt", state)
    status, output = trainer.tiny.run_main(monkeypatch, capfd, tmp_path / "run", f"resume={tmp_path / 'moved'}")
    assert status == 0 and "random weights" not in output, output
    resumed = load_checkpoint(tmp_path / "run" / "last.pt")
    assert not differences(resumed["model"], state["model"])
    assert resumed["config"]["model"] == state["config"]["model"]


@only("train_siamfc")
def test_resume_needs_no_checkpoint_to_start_from(trainer, tmp_path, monkeypatch):
    """model.checkpoint's file is gone; a resumed run has its own weights."""
    start = tmp_path / "start.pt"
    start.touch()
    monkeypatch.setattr(train_siamfc.siamfc, "load_siamfc", lambda path: train_siamfc.SiamFC(False))
    config = configure(trainer, f"model.checkpoint={start}")
    trainer.tiny.train_in(tmp_path / "whole", config)
    last_path = train_and_crash(trainer, tmp_path / "crashed", config, 2)
    monkeypatch.setattr(train_siamfc.siamfc, "load_siamfc", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    trainer.tiny.train_in(tmp_path / "resumed", config, last_path)
    assert not run_differences(tmp_path / "whole", tmp_path / "resumed")
    with pytest.raises(FileNotFoundError):
        trainer.tiny.train_in(tmp_path / "anew", config)


# ---------------------------------------------------------------------------------------------------------------------
# what the config of a resumed run may change


@only("train_sam2")
def test_resume_takes_the_stored_config_and_allows_what_may_change(trainer):
    """The command line need not repeat anything: configs/train_sam2.yaml's defaults are not the stored values."""

    def resume(*overrides):
        arguments = ["resume=run", *overrides]
        return resumed_config(stored, trainer.tiny.compose_config(*arguments), arguments, train_sam2.RESUMABLE)

    stored = configure(trainer)
    assert resume() == stored | {"resume": "run"}
    config = resume("train.steps=9", "device=cpu", "num_workers=3", "data.root=/elsewhere")
    assert config["train"] == stored["train"] | {"steps": 9} and config["num_workers"] == 3
    assert config["data"] == stored["data"] | {"root": "/elsewhere"}
    assert config["model"] == stored["model"] and config["optim"] == stored["optim"]
    same = [f"train.batch_size={stored['train']['batch_size']}", "model.image_size=64", "train.eval_clicks=[1]"]
    assert resume(*same) == stored | {"resume": "run"}


@pytest.mark.parametrize(
    "trainer, override, listed",
    [
        ("train_sam2", "train.batch_size=3", "train.batch_size: stored 2, now 3"),
        ("train_sam2", "optim.lr=0.5", ", now 0.5"),
        ("train_sam2", "seed=1", "seed: stored 0, now 1"),
        ("train_sam2", "precision=bf16", "precision: stored auto, now bf16"),
        ("train_sam2", "loss=tutorial", "loss.terms.cross_entropy: stored 5.0, now 1.0"),
        ("train_sam2", "data=labpics", "data.format: stored label_map, now labpics"),
        ("train_sam2", "data_root=/elsewhere", "data_root: stored "),
        ("train_sam2", "train.trainable=[neck]", "stored ['prompt_encoder', 'mask_decoder'], now ['neck']"),
        ("train_unet", "train.batch_size=3", "train.batch_size: stored 2, now 3"),
        ("train_unet", "optim.lr=0.5", "optim.lr: stored 0.003, now 0.5"),
        ("train_unet", "data.rotation=5.0", "data.rotation: stored 20, now 5.0"),
        ("train_unet", "loss=tversky", "loss.terms.tversky: stored 0.0, now 1.0"),
        ("train_unet", "model=segnet", "model.name: stored vit, now segnet"),
        ("train_siamfc", "train.batch_size=3", "train.batch_size: stored 2, now 3"),
        ("train_siamfc", "optim.lr=0.5", "optim.lr: stored 0.01, now 0.5"),
        ("train_siamfc", "pairs.max_gap=7", "pairs.max_gap: stored 100, now 7"),
        ("train_siamfc", "tracker.scale_lr=0.3", "tracker.scale_lr: stored 0.59, now 0.3"),
        ("train_siamfc", "model.score_bias=true", "model.score_bias: stored False, now True"),
        ("train_siamfc", "seed=3", "seed: stored 0, now 3"),
        ("train_siamfc", "precision=bf16", "precision: stored auto, now bf16"),
    ],
    indirect=["trainer"],
    scope="module",
)
def test_resume_lists_what_may_not_change(trainer, override, listed, whole, tmp_path, monkeypatch, capfd):
    """And allows what may: the number of steps, of workers, and a dataset that was moved."""
    allowed = ["train.steps=9", "num_workers=3", "data.root=/moved"]
    arguments = [f"resume={whole}", override, *allowed]
    status, output = trainer.tiny.run_main(monkeypatch, capfd, tmp_path / "run", *arguments)
    assert status == 1 and "the config differs" in output and listed in output
    assert not any(f"{name}: stored" in output for name in ("train.steps", "num_workers", "data.root"))
    assert "(may differ: " in output and "train.steps" in output.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# kill -9, and what takes longer

CASES = {
    "train_sam2": {
        # last.pt.tmp of step 3 is complete, last.pt is not yet replaced
        "mid_save": {"die": ["os", "replace", 4, "last.pt"]},
        # last.pt of step 0 is there, and best.pt is not
        "between_saves": {"die": ["utils.loop", "save_checkpoint", 2]},
        # 6 objects, 2 clicks: within the second evaluation
        "mid_validation": {"die": ["utils.sam2.prompts", "center_point", 6 * 2 + 9]},
        # between the third step's two forwards
        "mid_accumulation": {"die": ["train_sam2", "prompted_losses", 2 * 2 + 2]},
        # wherever a clock says
        **{f"random_{number}": {"share": share} for number, share in enumerate([0.2, 0.65])},
    },
    "train_unet": {
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
    },
    "train_siamfc": {
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
    },
}
# The step of the last.pt that each leaves, where it does not depend on the machine or the metrics
LEFT_AT = {
    "mid_save": 2,
    "between_saves": 0,
    "mid_validation": 1,
    "mid_accumulation": 2,
    "mid_step": 4,
    "at_the_end": 5,
}


@pytest.mark.slow
def test_killed_runs_resume_exactly(trainer, tmp_path):
    name = trainer.name
    overrides = ["train.steps=5", "train.eval_every=2", "train.batch_size=1", "train.accumulate=2"]
    if name == "train_sam2":
        overrides += ["train.eval_clicks=[1,2]", "train.eval_images=2", "train.objects_per_image=2"]
    steps = kill_and_resume(trainer.tiny.__name__, configure(trainer, *overrides), tmp_path, CASES[name])
    assert {case: step for case, step in steps.items() if case in LEFT_AT} == {
        case: step for case, step in LEFT_AT.items() if case in steps
    }
    assert (tmp_path / "mid_save_killed" / "last.pt.tmp").exists()
    if name == "train_sam2":
        assert not (tmp_path / "between_saves_killed" / "best.pt").exists()
        assert len(set(steps.values())) >= 3  # the random moments are spread over the run
    if name == "train_siamfc":
        assert steps["before_best"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer, override",
    [("train_unet", "optim=sgd"), ("train_unet", "optim.name=adam"), ("train_siamfc", "precision=bf16")],
    indirect=["trainer"],
    scope="module",
)
def test_other_optimizers_and_networks_resume_exactly(trainer, override, tmp_path, monkeypatch):
    """A U-Net, with batch norm, and the real SiamFC, with momentum and AlexNet's batch norm, in bf16 on the CPU."""
    monkeypatch.setattr(train_siamfc, "SiamFC", SiamFC)
    drawn = DRAWN["train_siamfc"] if trainer.script is train_siamfc else []
    config = trainer.configure(*drawn, *STEPS, override)
    trainer.tiny.train_in(tmp_path / "whole", config)
    last_path = train_and_crash(trainer, tmp_path / "first", config, 2)
    trainer.tiny.train_in(tmp_path / "second", config, last_path)
    assert not run_differences(tmp_path / "whole", tmp_path / "second")


# ---------------------------------------------------------------------------------------------------------------------
# a dataset that changed since

SAMPLE = {  # files or folders of a training sample
    "train_sam2": ["images/001.png", "labels/001.png"],
    "train_unet": ["images/001.png", "masks/001.png"],
    "train_siamfc": ["train/train_001"],
}


def test_a_resumed_run_has_the_samples_that_it_had(trainer, tmp_path, monkeypatch, capfd):
    """A picture more moved others from training to test; best and last were compared on different pictures."""
    root = shutil.copytree(trainer.root, tmp_path / "data")
    places = [override for override in trainer.tiny.tiny_overrides(root) if override.startswith("data.")]
    config = configure(trainer, *places)
    trainer.tiny.train_in(tmp_path / "whole", config)
    last_path = train_and_crash(trainer, tmp_path / "crashed", config, 2)

    for name in SAMPLE[trainer.name]:
        path = root / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, path.with_name(path.name.replace("001", "0015")))
    if trainer.name == "train_siamfc":
        with (root / "train" / "list.txt").open("a") as file:
            file.write("train_0015\n")
    capfd.readouterr()
    trainer.tiny.train_in(tmp_path / "grown", config, last_path)
    assert re.search(r"left out \d others, new or unusable then: .*0015\n", capfd.readouterr().out)
    assert not run_differences(tmp_path / "whole", tmp_path / "grown")

    for name in SAMPLE[trainer.name]:
        path = root / name
        (shutil.rmtree if path.is_dir() else os.remove)(path)
    if trainer.name == "train_siamfc":
        (root / "train" / "list.txt").write_text("train_0015\ntrain_002\ntrain_003\n")
    with pytest.raises(
        ValueError, match="^1 of the [0-9]+ samples of the run to resume are not in .*: train .*001; put them"
    ):
        trainer.tiny.train_in(tmp_path / "shrunk", config, last_path)
