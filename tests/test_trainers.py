"""What the three trainers' loops do alike: accumulate, clip, skip, stop, and keep the best. Leaves: test_loop.py."""

import importlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_tracking
import torch
from tiny import differences, read_last


@pytest.fixture(autouse=True)
def quick(trainer, monkeypatch):
    """Validation says 0.5 each time."""
    trainer.tiny.make_runs_quick(monkeypatch)
    trainer.tiny.script_evaluation(monkeypatch)


def use_scaler(monkeypatch, init_scale):
    """Let GradScaler start at a scale at which every gradient overflows in fp16."""
    real_scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *args, **keys: real_scaler(*args, init_scale=init_scale, **keys)
    )


def with_infinite_slope(loss):
    """A finite loss can have a gradient that is not: sqrt at 0."""
    return loss + (loss - loss.detach()).sqrt()


def test_only_a_better_one_replaces_the_best_checkpoint(trainer, tmp_path, monkeypatch):
    trainer.tiny.script_evaluation(monkeypatch, [0.5, 0.7, 0.6, 0.7, 0.9])
    config = trainer.configure("train.steps=4", "train.eval_every=1", "train.early_stop_evals=2")
    if trainer.name == "train_unet":
        config["train"]["test_at_end"] = False
    last = trainer.tiny.train_in(tmp_path / "run", config)
    assert (last["step"], last["evaluated_step"]) == (3, 3)  # two evaluations without a rise: stopped before 0.9
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert (best["metrics"]["step"], best["metrics"][config["train"]["select_by"]]) == (1, 0.7)
    assert differences(best["model"], last["model"])  # the tutorial keeps the last alone
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [record["metrics"][part]["step"] for part in ("start", "best", "last")] == [0, 1, 3]


ACCUMULATED = {  # overrides, how many parameters, absolute tolerance of gradients
    "train_sam2": (["train.clip_norm=1e9", "train.objects_per_image=4"], 100, 1e-6),
    "train_unet": (
        ["model=unet_paper", "model.base_channels=2", "model.dropout=0.0", "data.image_size=204", "optim=sgd",
         "train.clip_norm=null", "optim.weight_decay=0.0", "loss=cross_entropy"], 46, 1e-6,
    ),
    "train_siamfc": (["optim.weight_decay=0"], 2, 1e-5),
}  # fmt: skip


def test_accumulation_equals_a_larger_batch(trainer, tmp_path, monkeypatch):
    """2 x B=2 against B=4, without batch norm: after one step SGD's momentum is the gradient, Adam's first moment a
    tenth of it.
    """
    tiny_tracking.use_backbone(monkeypatch, tiny_tracking.SmallBackbone)
    overrides, num_parameters, tolerance = ACCUMULATED[trainer.name]
    moments, rows = [], []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        config = trainer.configure(
            *overrides, f"train.batch_size={batch_size}", f"train.accumulate={accumulate}", "train.steps=1"
        )
        last = trainer.tiny.train_in(tmp_path / str(batch_size), config)
        name = "exp_avg" if trainer.name == "train_sam2" else "momentum_buffer"
        moments.append([state[name] for state in last["optimizer"]["state"].values()])
        rows.append(last["metrics"][1])
    assert len(moments[0]) >= num_parameters
    for large, small in zip(*moments, strict=True):
        atol = tolerance * max(1.0, 10 * large.abs().max().item()) if trainer.name == "train_sam2" else tolerance
        torch.testing.assert_close(large, small, atol=atol, rtol=0 if trainer.name == "train_sam2" else 1e-4)
    measured = [name for name in rows[0] if name.startswith("train/")]
    assert len(measured) == 3  # loss, gradient norm, and IoU, pixel accuracy or hit rate
    for name in measured:
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4, abs=1e-5), name


MEASURED = {  # column of metrics.csv: the place of its value in what the function returns, or where it is all of it
    "train_sam2": {"train/loss": ("prompted_losses", 0), "train/iou": ("prompted_losses", 1)},
    "train_unet": {"train/loss": ("weighted_loss", ...)},
    "train_siamfc": {"train/loss": ("balanced_loss", ...), "train/hit_rate": ("hit_rate", ...)},
}


def test_running_means_are_bias_corrected(trainer, tmp_path, monkeypatch):
    """SAM 2's step: the mean over pictures of the mean over their objects. The tutorial's mean starts at 0."""
    returned = {name: [] for name, _ in MEASURED[trainer.name].values()}

    def record(name, real):
        def call(*args):
            result = list(real(*args)) if name == "prompted_losses" else real(*args)
            returned[name].append((result, args))
            return result

        monkeypatch.setattr(trainer.script, name, call)

    for name in returned:
        record(name, getattr(trainer.script, name))
    overrides = ["train.steps=3", "train.batch_size=3"] + ["train.objects_per_image=4"] * (trainer.name == "train_sam2")
    rows = trainer.tiny.train_in(tmp_path / "run", trainer.configure(*overrides))["metrics"][1:]
    weights = 0.99 ** np.arange(3)[::-1]
    for column, (name, place) in MEASURED[trainer.name].items():
        steps = []
        for result, args in returned[name]:
            if trainer.name == "train_sam2":
                image_index, of_objects = args[2]["image_index"], torch.zeros(len(args[2]["masks"]))
                for chosen, *losses_and_ious in result:
                    of_objects[chosen] += losses_and_ious[place].detach()
                steps.append(np.mean([of_objects[image_index == image].mean().item() for image in range(3)]))
            else:
                steps.append(result.item())
        assert len(set(steps)) > 1 or column == "train/hit_rate"
        expected = [np.average(steps[: n + 1], weights=weights[2 - n :]) for n in range(3)]
        assert [row[column] for row in rows if column in row] == pytest.approx(expected, rel=1e-5), column


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision_has_its_loss_and_its_weights_in_fp32(precision, dtype, trainer, tmp_path, monkeypatch):
    dtypes, loss_dtypes, real_forward = [], [], torch.nn.Conv2d.forward

    def forward(self, images):
        features = real_forward(self, images)
        if torch.is_grad_enabled():  # in training
            dtypes.append(features.dtype)
        return features

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    trainer.replace_loss(monkeypatch, lambda loss, number: loss_dtypes.append(loss.dtype) or loss)
    channels_last = ["train.channels_last=true"] * (trainer.name == "train_unet")
    config = trainer.configure(f"precision={precision}", "train.steps=3", *channels_last)
    last = trainer.tiny.train_in(tmp_path / "run", config)
    assert set(dtypes) == {dtype} and loss_dtypes == [torch.float32] * 3
    assert all(weight.dtype in (torch.float32, torch.int64) for weight in last["model"].values())
    assert last["num_skipped"] < 3 and last["optimizer"]["state"]  # fp16's scale starts high
    assert ("scale" in last["scaler"]) == (precision == "fp16")


def test_pictures_that_cannot_be_written_stop_no_run(trainer, tmp_path, monkeypatch, capfd):
    """A full disk at a sample ended a training."""
    monkeypatch.undo()  # evaluations that draw
    tiny.draw_the_loss_alone(monkeypatch)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("a file where the pictures of an evaluation go")
    (tmp_path / "run" / "curves.png").mkdir()
    overrides = [*trainer.tiny.tiny_overrides(trainer.root), "train.steps=1"]
    assert tiny.run_script(trainer.script, tmp_path / "run", *overrides) == (0, "")
    printed = capfd.readouterr().out
    assert "samples" in printed and printed.count("could not be drawn") > 1 and "curves.png could not be" in printed
    assert (tmp_path / "run" / "best.pt").is_file()


def test_the_printed_command_runs_when_it_is_pasted(trainer, tmp_path, monkeypatch, capfd):
    """With folders such as people have: what train_sam2.py printed for IMG (2).jpg failed in Hydra's grammar."""
    root = shutil.copytree(trainer.root, tmp_path / "my data, été (2)")
    monkeypatch.chdir(tmp_path)
    overrides = [*trainer.tiny.tiny_overrides(root), "train.steps=0"]
    assert tiny.run_script(trainer.script, tmp_path / "it's run=1", *overrides) == (0, "")
    command = capfd.readouterr().out.strip().splitlines()[-1]
    name = re.match(r" *python (\w+)\.py", command)[1]
    pasted = command.replace(f"python {name}.py", f"{sys.executable} -c 'import sys; print(sys.argv[1:])'")
    arguments = eval(subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, check=True).stdout)
    script = importlib.import_module(name)
    if name == "track":  # the printed command leaves the video to say; the tiny run's network is a small one
        arguments += [f"input={root / 'val' / 'val_001'}", "overlay=false"]
        small_model = tiny_tracking.small_model()
        monkeypatch.setattr(script, "load_model", lambda path, seed: small_model if Path(path).is_file() else None)
    assert tiny.run_script(script, tmp_path / "next", "device=cpu", *arguments) == (0, "")
    assert (tmp_path / "next" / "run.json").is_file()


def test_compiled_code_trains_and_evaluation_stays_plain(trainer, tmp_path, monkeypatch):
    """What is compiled would be compiled anew for each size of a validation picture, and for each mode."""
    compiled, modes = [], []

    def count_calls(forward):
        compiled.append(forward)

        def call(*inputs):
            modes.append(forward.__self__.training)
            return forward(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", count_calls)
    trainer.tiny.make_runs_quick(monkeypatch)
    steps = ["train.steps=2", "train.accumulate=2", "train.eval_every=1"]
    states = [
        trainer.tiny.train_in(tmp_path / value, trainer.configure(*steps, f"train.compile={value}"))["model"]
        for value in ("true", "false")
    ]
    assert len(compiled) == 1 and modes == [True] * 4  # three evaluations call none
    assert not differences(*states)  # the names of the weights too


def test_compiling_without_a_compiler_is_one_line(trainer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("utils.run.shutil.which", lambda name: None)
    arguments = [*trainer.tiny.tiny_overrides(trainer.root), "train.steps=1", "train.compile=true"]
    status, output = trainer.tiny.run_main(monkeypatch, capfd, tmp_path / "run", *arguments)
    assert status == 1 and "error: train.compile is true; must be false where there is no compiler" in output
    assert "Traceback" not in output


def test_memory_that_ends_in_a_step_is_one_line(trainer, tmp_path, monkeypatch, capfd):
    trainer.replace_loss(monkeypatch, lambda loss, number: loss if number < 6 else torch.empty(10**15))
    arguments = [*trainer.tiny.tiny_overrides(trainer.root), "train.steps=20", "train.eval_images=1"]
    arguments = [argument for argument in arguments if trainer.name != "train_siamfc" or "eval_images" not in argument]
    status, output = trainer.tiny.run_main(monkeypatch, capfd, tmp_path / "run", *arguments)
    (line,) = [line for line in output.splitlines() if "out of memory" in line]
    assert status == 1 and "Traceback" not in output
    assert re.search(r"^error: out of memory in main > train( > \w+)*, step \d+: DefaultCPUAllocator: can't all", line)
    assert "you tried to allocate 4000000000000000 bytes" in line
    assert re.search(r"; this machine has [\d.]+ GiB; try a smaller train.batch_size(,)? or ", line)


# ---------------------------------------------------------------------------------------------------------------------
# numbers that are not finite


def test_fp16_overflow_is_a_skipped_step_that_is_counted(trainer, tmp_path, monkeypatch):
    use_scaler(monkeypatch, 1e36)
    last = trainer.tiny.train_in(tmp_path / "run", trainer.configure("precision=fp16", "train.steps=2"))
    assert (last["step"], last["num_skipped"], last["skipped_in_a_row"]) == (2, 2, 2)
    assert [row["skipped_steps"] for row in last["metrics"] if "skipped_steps" in row] == [1, 2]
    assert last["scaler"]["scale"] == pytest.approx(0.25e36) and last["optimizer"]["state"] == {}
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    parameters = [name for name in best["model"] if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(best["model"][name], last["model"][name]) for name in parameters)  # nothing moved


def test_fp16_overflow_at_every_step_stops_the_run_and_a_resumed_one(trainer, tmp_path, monkeypatch):
    """At the step at which an uninterrupted run stops: the count goes through last.pt."""
    use_scaler(monkeypatch, 1e36)
    monkeypatch.setattr("utils.loop.MAX_SKIPPED_IN_A_ROW", 3)
    config = trainer.configure("precision=fp16", "train.steps=9", "train.save_every=1")
    message = "overflowed at 3 steps in a row, the last is step 2: .*use precision=bf16 or precision=fp32"
    resume_path = None
    for name in ("run", "resumed"):
        with pytest.raises(FloatingPointError, match=message):
            trainer.tiny.train_in(tmp_path / name, config, resume_path)
        resume_path = tmp_path / name / "last.pt"
        last = read_last(tmp_path / name)
        assert (last["step"], last["num_skipped"], last["skipped_in_a_row"]) == (2, 2, 2)


def test_skipped_steps_that_are_not_in_a_row_go_on(trainer, tmp_path, monkeypatch):
    trainer.replace_loss(monkeypatch, lambda loss, number: loss if number == 3 else with_infinite_slope(loss))
    use_scaler(monkeypatch, 256.0)
    monkeypatch.setattr("utils.loop.MAX_SKIPPED_IN_A_ROW", 3)
    last = trainer.tiny.train_in(tmp_path / "run", trainer.configure("precision=fp16", "train.steps=5"))
    assert (last["step"], last["num_skipped"], last["skipped_in_a_row"]) == (5, 4, 2)
    assert last["optimizer"]["state"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_that_is_not_finite_stops_before_the_update(accumulate, trainer, tmp_path, monkeypatch):
    last_forward = 2 * accumulate
    names = trainer.replace_loss(monkeypatch, lambda loss, number: loss * (math.nan if number == last_forward else 1.0))
    config = trainer.configure("train.steps=3", "train.save_every=1", f"train.accumulate={accumulate}")
    with pytest.raises(FloatingPointError, match="loss is nan at step 1, (pictures|pairs) ") as error:
        trainer.tiny.train_in(tmp_path / "run", config)
    shown = str(error.value).split(" at step 1, ")[1].split(" ", 1)[1].split(", ")
    forwards = accumulate if trainer.name == "train_sam2" else 1  # whose samples are named, two each
    assert shown == names[-2 * forwards :] and str(trainer.root) in shown[0]
    last = read_last(tmp_path / "run")
    assert last["step"] == 1 and all(values.isfinite().all() for values in last["model"].values())
    assert "end" not in json.loads((tmp_path / "run" / "run.json").read_text())


def test_gradient_that_is_not_finite_stops_before_the_update(trainer, tmp_path, monkeypatch):
    names = trainer.replace_loss(monkeypatch, lambda loss, number: with_infinite_slope(loss))
    config = trainer.configure("train.steps=3", "train.accumulate=2")
    with pytest.raises(FloatingPointError, match="gradient norm is (nan|inf) at step 0, (pictures|pairs) ") as error:
        trainer.tiny.train_in(tmp_path / "run", config)
    assert len(names) == 4 and all(name in str(error.value) for name in names)  # of both forwards of the step
