"""check=fit: real steps on the hardest item, what is said of them, and what is tried where they do not fit."""

import contextlib
import re
import sys

import numpy as np
import pytest
import tiny_training
import torch
from forked import run_python
from tiny import ROOT, compose_config, run_main

import train_sam2
from utils import fit
from utils.images import write_image
from utils.sam2 import model as models

CPU = torch.device("cpu")
GIB = 2**30


def stub_train(calls, fails_above=10**9):
    """A training that takes 1 GiB and a quarter for each item of a batch, as the stubbed peak says."""

    def train(config, run_dir, resume_path, data):
        calls.append(config)
        if config["train"]["batch_size"] > fails_above:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if config["precision"] == "fp16":
            raise ValueError("precision=fp16 cannot be computed on a CPU")
        return {"step": 2, "images_per_s": 8.0}

    return train


@pytest.fixture
def check(monkeypatch, capsys):
    """Call check_fit with a stubbed training on a device of so many GiB: (configs it was called with, output)."""

    def call(batch_size, free_gib, changes=(), fails_above=10**9):
        calls = []
        monkeypatch.setattr(fit, "read_free_memory", lambda device: int(free_gib * GIB))
        monkeypatch.setattr(fit, "limit_memory", lambda device, num_bytes: contextlib.nullcontext())
        monkeypatch.setattr(
            fit, "read_peak_memory", lambda device: int((1 + calls[-1]["train"]["batch_size"] / 4) * GIB)
        )
        config = {"device": "cpu", "precision": "fp32", "cache": "off"}
        config["train"] = {"batch_size": batch_size, "accumulate": 5, "steps": 100}
        fit.check_fit(stub_train(calls, fails_above), None, config, list(changes), "pictures")
        return calls, capsys.readouterr().out.splitlines()

    return call


def test_what_fits_is_said_with_the_largest_batch_that_would(check):
    calls, (line, limit) = check(4, free_gib=8)
    took = "peak 2.00 GiB of 8.00 GiB free: fits; 0.50 s a batch, 8.00 pictures/s"
    assert line == f"fit: 2 steps with a batch of 4 pictures: {took}"
    assert (
        limit == "train.batch_size up to 28 should fit (calculated from two batches that were measured)"
    )  # (8 - 1) * 4
    assert [call["train"]["batch_size"] for call in calls] == [4, 1] and calls[0]["train"]["steps"] == 2
    assert calls[0]["train"]["accumulate"] == 2  # more take no more memory
    assert [call["train"]["batch_size"] for call in check(1, free_gib=8)[0]] == [1, 2]


def test_what_does_not_fit_is_tried_with_each_change_alone(check):
    changes = [{"precision": "fp16"}, {"train.batch_size": 1, "train.accumulate": 40}, {"cache": "auto"}]
    calls, lines = check(8, free_gib=2.5, changes=changes)
    assert lines[0].startswith("fit: 2 steps with a batch of 8 pictures: peak 3.00 GiB of 2.50 GiB free: does not fit")
    assert lines[2] == "  precision=fp16: cannot be: precision=fp16 cannot be computed on a CPU"
    assert lines[3].startswith("  train.batch_size=1 train.accumulate=40: peak 1.25 GiB of 2.50 GiB free: fits; 0.12 s")
    assert lines[4].startswith("  cache=auto: peak 3.00 GiB of 2.50 GiB free: does not fit")
    assert lines[5].startswith("train.batch_size up to 6 should fit")
    assert [call["precision"] for call in calls] == ["fp32", "fp16", "fp32", "fp32"]
    assert calls[3]["cache"].endswith("/cache") and calls[1]["cache"] == "off"  # never among the user's entries


def test_memory_that_ends_in_the_steps_does_not_end_the_check(check):
    calls, lines = check(8, free_gib=2.5, changes=[{"train.batch_size": 1}], fails_above=4)
    assert lines[0].endswith("out of memory, 2.50 GiB free: does not fit")
    assert "train.batch_size=1: peak 1.25 GiB" in lines[2] and lines[3].startswith(
        "train.batch_size up to 6 should fit"
    )
    assert [call["train"]["batch_size"] for call in calls] == [8, 1, 2]


def test_other_errors_of_the_config_itself_are_errors():
    with pytest.raises(ValueError, match="precision=fp16"):
        fit.try_steps(
            stub_train([]), None, {"precision": "fp16", "train": {"batch_size": 1, "accumulate": 1}}, CPU, GIB, {}
        )


def test_each_trainer_takes_two_real_steps_and_keeps_nothing(trainer, tmp_path, monkeypatch, capfd):
    arguments = trainer.tiny.tiny_overrides(trainer.root)
    status, output = run_main(trainer.script, monkeypatch, capfd, tmp_path / "run", *arguments, "check=fit")
    items = "pairs" if trainer.name == "train_siamfc" else "pictures"
    size = trainer.configure()["train"]["batch_size"]
    assert status == 0, output
    assert re.search(
        rf"^fit: 2 steps with a batch of {size} {items}: peak \d+\.\d\d GiB of \d+\.\d\d GiB free: fits; "
        rf"\d+\.\d\d s a batch, \d+\.\d\d {items}/s$",
        output,
        re.M,
    )
    assert re.search("^the (largest )?training (picture|sequence) with|^the largest training picture", output, re.M)
    assert not {"best.pt", "last.pt", "metrics.csv", "samples"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_each_trainer_tries_its_changes(trainer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fit, "read_free_memory", lambda device: 2**20)
    monkeypatch.setattr(fit, "limit_memory", lambda device, num_bytes: contextlib.nullcontext())
    changes = {
        "train_sam2": ["train.objects_per_forward=2"],
        "train_unet": ["data.image_size=[32, 32]", "model.base_channels=2"],
        "train_siamfc": ["precision=bf16"],
    }[trainer.name]
    arguments = [*trainer.tiny.tiny_overrides(trainer.root), "check=fit", "train.batch_size=2"]
    arguments += ["data.image_size=[64,64]"] if trainer.name == "train_unet" else []
    status, output = run_main(trainer.script, monkeypatch, capfd, tmp_path / "run", *arguments)
    assert status == 0 and "GiB free: does not fit" in output
    for change in [*changes, "train.batch_size=1 train.accumulate=2"]:
        assert re.search(rf"^  {re.escape(change)}: peak \d\.\d\d GiB of 0\.00 GiB free: does not fit", output, re.M), (
            output
        )


def test_the_hardest_picture_has_the_most_objects_then_the_most_pixels(tmp_path, capsys):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name, (height, width), count in (
        ("a", (40, 40), 3),
        ("b", (60, 40), 3),
        ("c", (90, 90), 1),
        ("d", (40, 50), 5),
    ):
        ids = np.zeros((height, width), np.uint8)
        for number in range(count):
            ids[2:8, 7 * number + 1 : 7 * number + 6] = number + 1
        write_image(tmp_path / "images" / f"{name}.png", np.repeat(ids[..., None] * 40, 3, 2))
        write_image(tmp_path / "labels" / f"{name}.png", ids)
    (tmp_path / "val.txt").write_text("c\n")
    for most, name in ((16, "d"), (3, "b")):
        config = compose_config(
            "train_sam2", "check=fit", "data=label_map", f"data.root={tmp_path}", f"data.val_list={tmp_path}/val.txt",
            f"train.objects_per_image={most}",
        )  # fmt: skip
        settings = train_sam2.read_settings(train_sam2.Config, config)
        splits, _ = train_sam2.list_data(settings, tmp_path, None)
        assert [item.name for item in splits["train"]] == [name]


def test_official_models_are_tried_with_random_weights_and_nothing_is_downloaded(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(models, "_download", lambda url, path: pytest.fail(f"downloads {url}"))
    monkeypatch.setattr(models, "REPOSITORY", tmp_path)
    monkeypatch.setattr(fit, "read_free_memory", lambda device: 2**20)
    monkeypatch.setattr(fit, "limit_memory", lambda device, num_bytes: contextlib.nullcontext())
    root = tiny_training.write_dataset(tmp_path / "data")
    overrides = [item for item in tiny_training.tiny_overrides(root) if not item.startswith("model")]
    overrides += ["model=sam2.1_hiera_small", "model.image_size=64", "train.batch_size=1", "check=fit"]
    status, output = run_main(train_sam2, monkeypatch, capfd, tmp_path / "run", *overrides)
    assert status == 0 and re.search("^  model=sam2.1_hiera_tiny: peak", output, re.M), output
    assert "sam2.1_hiera_small: random weights" in output and not list(tmp_path.rglob("*.pt"))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA and /proc are Linux's")
def test_a_cpu_refuses_what_is_above_the_limit_and_the_peak_is_read():
    code = f"""
import torch
from utils import fit
from utils.settings import is_out_of_memory
cpu = torch.device("cpu")
fit.reset_peak_memory(cpu)
before = fit.read_peak_memory(cpu)
with fit.limit_memory(cpu, before + 400 * 2**20):
    torch.ones(200 * 2**20, dtype=torch.uint8)
    try:
        torch.ones({GIB}, dtype=torch.uint8)
    except Exception as error:
        print("refused", is_out_of_memory(error))
print("peak", round((fit.read_peak_memory(cpu) - before) / 2**20 / 100))
torch.ones({GIB}, dtype=torch.uint8)
fit.reset_peak_memory(cpu)
print("again", fit.read_peak_memory(cpu) - before < 2**28, fit.read_free_memory(cpu) > 2**30)
"""
    result = run_python("-c", code, cwd=ROOT)
    assert result.stdout.split("\n")[:3] == ["refused True", "peak 2", "again True True"], result.stdout + result.stderr


@pytest.mark.gpu
def test_a_gpu_says_what_pytorch_holds():
    device = torch.device("cuda")
    fit.release_memory(device)
    fit.reset_peak_memory(device)
    before = fit.read_peak_memory(device)
    torch.ones(GIB // 4, dtype=torch.uint8, device=device)
    assert abs(fit.read_peak_memory(device) - before - GIB // 4) < 2**22
    assert GIB // 4 < fit.read_free_memory(device) <= torch.cuda.get_device_properties(device).total_memory
