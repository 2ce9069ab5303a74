"""train_unet.py on tiny pictures: the real command, what is trained, samples, metrics, and bad input."""

import csv
import json
import math
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from options import read_option
from PIL import Image
from tiny_segmentation import (
    COLORS,
    NAMES,
    ROOT,
    SIZES,
    compose_config,
    draw_pair,
    make_dataset,
    make_runs_quick,
    run_main,
    script_evaluation,
    tiny_overrides,
    train_in,
    write_data_root,
    write_dataset,
)
from tiny_training import differences

import train_unet
from train_unet import LossSettings, OptimSettings
from utils.images import read_image, write_image
from utils.run import seed_everything
from utils.segmentation import losses, prediction, reports, views
from utils.segmentation.prediction import Predictor, TileSettings
from utils.segmentation.readers import read_item
from utils.segmentation.unet import UNet
from utils.segmentation.views import Framing

CPU = torch.device("cpu")
LOSS = LossSettings(**read_option("unet", "loss", "cross_entropy"))
PRESETS = sorted(
    path.stem
    for path in (ROOT / "configs" / "unet" / "experiment").glob("*.yaml")
    if "python train_unet.py" in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def quick(monkeypatch):
    make_runs_quick(monkeypatch)


def val_items(root):
    return list_items(compose_config(*tiny_overrides(root)), "val")


def list_items(config, split):
    settings = train_unet.read_settings(train_unet.Config, config)
    return train_unet.list_splits(settings.data.reader_keys)[split]


# ---------------------------------------------------------------------------------------------------------------------
# the real command


@pytest.fixture(scope="module")
def overfitted(root, tmp_path_factory):
    """The folder and the output of a run that sees five pictures over and over."""
    run_dir = tmp_path_factory.mktemp("overfitted") / "run"
    command = [
        sys.executable, str(ROOT / "train_unet.py"), *tiny_overrides(root), f"hydra.run.dir={run_dir}",
        "train.steps=80", "train.batch_size=5", "train.eval_every=40", "train.log_every=10", "optim.lr=0.01",
        "model.base_channels=8",
        "data.scale=[1.0,1.0]", "data.color_jitter=0.0", "data.image_size=[48,64]",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=run_dir.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir, done.stdout + done.stderr


def read_rows(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_command_writes_the_promised_files(overfitted):
    run_dir, output = overfitted
    for name in ("best.pt", "last.pt", "metrics.csv", "curves.png", "dataset.png", "run.json", ".hydra/config.yaml"):
        assert (run_dir / name).stat().st_size > 0, name
    assert list((run_dir / "tensorboard").glob("events*"))
    pictures = sorted(path.relative_to(run_dir / "samples").as_posix() for path in (run_dir / "samples").glob("*/*"))
    assert pictures == ["step_000000/005.png", "step_000040/005.png", "step_000080/005.png"]
    height, width, _ = read_image(run_dir / "samples" / "step_000080" / "005.png").shape
    assert (height, width) == (288 + 20, 3 * 384)
    assert [(run_dir / "splits" / f"{split}.txt").read_text().split() for split in ("train", "val", "test")] == [
        ["000", "001", "002", "003", "004"], ["005", "006", "007"], ["008", "009"],
    ]  # fmt: skip
    assert not list(run_dir.rglob("*.tmp"))
    assert "python train_unet.py mode=predict checkpoint=run/best.pt input=" in output  # from where the user stands


def test_tiny_data_is_overfitted_and_recorded(overfitted):
    run_dir, output = overfitted
    record, rows = json.loads((run_dir / "run.json").read_text()), read_rows(run_dir)
    measured = {row["step"]: row for row in rows if "val/mean_iou" in row}
    assert sorted(measured) == [0, 40, 80]
    metrics = record["metrics"]
    assert metrics["start"]["step"] == 0 and metrics["last"]["step"] == 80 and "end" in record
    assert metrics["best"]["step"] == max(measured, key=lambda step: measured[step]["val/mean_iou"])
    for part in ("start", "best", "last"):
        values = metrics[part]
        assert {"val/mean_iou", "val/pixel_accuracy", "val/dice", "val/loss", "val/iou_disc"} <= values.keys()
        assert all(values[name] == pytest.approx(measured[values["step"]][name]) for name in values if "/" in name)
    assert metrics["last"]["val/num_images"] == 3  # with batches of 5: milesial's drop_last would leave out all
    assert metrics["start"]["val/mean_iou"] < 0.5
    assert metrics["best"]["val/mean_iou"] > 0.9 and metrics["test"]["test/mean_iou"] > 0.9
    assert metrics["majority"]["val/mean_iou"] < 0.3
    logged = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in logged] == list(range(10, 81, 10))
    assert logged[-1]["train/loss"] < logged[0]["train/loss"]
    assert all({"images_per_s", "data_wait_share", "lr", "train/pixel_accuracy"} <= row.keys() for row in logged)
    assert {"train_images": 5, "val_images": 3, "test_images": 2}.items() <= record["data"].items()
    assert f"{metrics['test']['test/mean_iou']:.3f}" in output


def test_best_checkpoint_is_plain(overfitted):
    best = torch.load(overfitted[0] / "best.pt", map_location="cpu", weights_only=True)
    assert (
        best.keys() == {"format", "script", "model", "config", "class_weights", "git", "metrics"}
        and best["format"] == 1
    )
    plain = [best[key] for key in best if key != "model"]
    assert json.loads(json.dumps(plain)) == plain


# ---------------------------------------------------------------------------------------------------------------------
# a finished network


def test_evaluate_measures_what_training_recorded(overfitted, tmp_path, monkeypatch, capfd, quick):
    run_dir, _ = overfitted
    metrics = json.loads((run_dir / "run.json").read_text())["metrics"]
    arguments = ["mode=evaluate", f"checkpoint={run_dir / 'best.pt'}", "device=cpu"]
    for split, expected in (("test", metrics["test"]), ("val", metrics["best"])):
        status, output = run_main(monkeypatch, capfd, tmp_path / split, *arguments, f"split={split}")
        assert status == 0, output
        record = json.loads((tmp_path / split / "run.json").read_text())
        assert record["metrics"]["last"] == {name: expected[name] for name in expected if name != "step"}
        for name in NAMES:
            assert name in output
        matrix = np.loadtxt(tmp_path / split / "confusion.csv", delimiter=",", skiprows=1)
        numbers = {"val": range(5, 8), "test": range(8, 10)}[split]
        assert matrix.sum() == sum(math.prod(SIZES[number % len(SIZES)]) for number in numbers)
        assert np.trace(matrix) / matrix.sum() == pytest.approx(expected[f"{split}/pixel_accuracy"])
        assert list((tmp_path / split / "samples").iterdir())


def test_predict_needs_nothing_but_the_checkpoint(overfitted, root, tmp_path, monkeypatch, capfd):
    """A folder of grey, 16-bit, RGBA and tiny pictures, and one that cannot be read, which is named at the end."""
    run_dir, _ = overfitted
    photos = tmp_path / "photos"
    photos.mkdir()
    image_rgb, class_map = draw_pair(np.random.default_rng(9), 100, 130)
    write_image(photos / "a.png", image_rgb)
    Image.fromarray(image_rgb).convert("RGBA").save(photos / "alpha.png")
    Image.fromarray(image_rgb[..., 0]).save(photos / "grey.jpg", quality=95)
    Image.fromarray(image_rgb[..., 0].astype(np.uint16) * 257).save(photos / "deep.png")
    write_image(photos / "dot.png", image_rgb[:1, :3])
    (photos / "broken.png").write_bytes(b"no picture")
    arguments = ["mode=predict", f"checkpoint={run_dir / 'best.pt'}", "device=cpu", f"input={photos}"]
    status, output = run_main(monkeypatch, capfd, tmp_path / "out", *arguments, "probabilities=true")
    assert status == 1 and "Traceback" not in output
    assert output.rstrip().splitlines()[-2].startswith("1 pictures failed") and "broken.png" in output.splitlines()[-1]
    written = {path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".png", ".npy")}
    kinds = ("classes.png", "overlay.png", "probabilities.npy")
    assert written == {f"{name}_{kind}" for name in ("a", "alpha", "grey", "deep", "dot") for kind in kinds}
    classes = np.array(Image.open(tmp_path / "out" / "a_classes.png"))
    assert classes.dtype == np.uint8 and classes.shape == class_map.shape
    assert (classes == class_map).mean() > 0.9
    assert (np.array(Image.open(tmp_path / "out" / "alpha_classes.png")) == classes).all()
    assert np.array(Image.open(tmp_path / "out" / "dot_classes.png")).shape == (1, 3)
    probabilities = np.load(tmp_path / "out" / "a_probabilities.npy")
    assert probabilities.shape == (3, 100, 130) and probabilities.dtype == np.float16
    assert np.abs(probabilities.astype(np.float32).sum(0) - 1).max() < 2e-3
    assert (probabilities.argmax(0) == classes).mean() > 0.999  # ties in half precision
    overlay = read_image(tmp_path / "out" / "a_overlay.png")
    assert (overlay[classes == 0] == image_rgb[classes == 0]).all()  # background is left as it is
    assert (overlay[classes == 1] != image_rgb[classes == 1]).any()


def test_printed_command_predicts(overfitted, tmp_path, monkeypatch, capfd):
    run_dir, output = overfitted
    line = next(line for line in output.splitlines() if "mode=predict" in line)
    arguments = shlex.split(line)[2:]
    monkeypatch.chdir(run_dir.parent)
    status, output = run_main(monkeypatch, capfd, tmp_path / "out", *arguments)
    assert status == 0 and (tmp_path / "out" / "008_classes.png").exists()
    assert "1 pictures: 0 background" in output


@pytest.mark.slow
def test_unpadded_network_predicts_alike_with_any_tiles(root, tmp_path, monkeypatch, capfd, quick):
    """By the command, of a grey network: the same probabilities, to the precision of the file."""
    overrides = [one for one in tiny_overrides(root) if not one.startswith("model")]
    config = compose_config(
        *overrides, "model=unet_paper", "model.base_channels=2", "data.image_size=204", "data.fit=crop",
        "data.channels=1", "train.steps=1", "train.test_at_end=false", "tiles.size=220",
    )  # fmt: skip
    train_in(tmp_path / "run", config)
    image_rgb, _ = draw_pair(np.random.default_rng(2), 90, 150)
    write_image(tmp_path / "photo.png", image_rgb)  # in colour
    found = []
    arguments = ["mode=predict", f"checkpoint={tmp_path / 'run' / 'best.pt'}", f"input={tmp_path / 'photo.png'}"]
    for number, size in enumerate(("204", "[220,236]", "auto")):
        run_dir = tmp_path / f"out_{number}"
        status, _ = run_main(monkeypatch, capfd, run_dir, *arguments, f"tiles.size={size}", "probabilities=true")
        assert status == 0
        found.append(np.load(run_dir / "photo_probabilities.npy").astype(np.float32))
    assert found[0].shape == (3, 90, 150)
    assert max(np.abs(one - found[2]).max() for one in found) < 1e-3
    message = fails_with(monkeypatch, capfd, tmp_path / "bad", *arguments, "tiles.size=512")
    assert "tiles.size is 512" in message and "508 and 524" in message


def test_single_picture_that_cannot_be_read(overfitted, tmp_path, monkeypatch, capfd):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    arguments = ["mode=predict", f"checkpoint={overfitted[0] / 'best.pt'}", f"input={tmp_path / 'broken.png'}"]
    status, output = run_main(monkeypatch, capfd, tmp_path / "out", *arguments)
    assert status == 1 and output.splitlines()[-1].startswith(f"error: {tmp_path / 'broken.png'} cannot be decoded")


def test_summary_prints_layers_costs_and_latency(tmp_path, root, monkeypatch, capfd):
    monkeypatch.setattr(train_unet, "LATENCY_REPEATS", 2)
    status, output = run_main(monkeypatch, capfd, tmp_path / "out", *tiny_overrides(root), "mode=summary")
    assert status == 0
    num_parameters = sum(p.numel() for p in UNet(3, 3, 4, 2, "transposed").parameters())
    assert f"{num_parameters:,}" in output and "3x3" in output and "p50" in output and "p95" in output


# ---------------------------------------------------------------------------------------------------------------------
# what is trained, and when it counts as better


@pytest.mark.parametrize(
    "name, optim",
    [(name, "optim=adamw") for name in ("unet", "unet_paper", "fcn", "segnet", "segnet_dsc", "vit_small", "deeplabv3")]
    + [("unet", "optim.name=adam"), ("unet", "optim=sgd")],
)
def test_every_parameter_of_every_network_moves(name, optim, root, tmp_path, quick, monkeypatch):
    """Without weight decay, which would move a parameter that gets no gradient."""
    script_evaluation(monkeypatch)
    small = {
        "unet": ["model.base_channels=4", "model.depth=2"],
        "unet_paper": ["model.base_channels=4", "data.image_size=188"],
        "fcn": ["model.base_channels=4", "model.head_channels=16"],
        "segnet": ["model.base_channels=4"],
        "segnet_dsc": ["model.base_channels=4"],
        "vit_small": ["model.dim=24", "model.num_blocks=2", "model.num_heads=2"],
        "deeplabv3": ["model.backbone=mobilenet_v3_large"],
    }[name]
    overrides = [one for one in tiny_overrides(root) if not one.startswith("model")]
    config = compose_config(
        *overrides, f"model={name}", *small, optim, "optim.weight_decay=0.0", "optim.lr=0.01",
        "train.steps=3", "train.test_at_end=false",
    )  # fmt: skip
    trained = train_in(tmp_path / "run", config)["model"]
    seed_everything(config["seed"])  # the weights that the run started from
    before = dict(train_unet.build_network(config["model"], 3, 3).named_parameters())
    assert not [name for name, values in before.items() if torch.equal(values, trained[name])]


def test_parameter_groups_decay_weights_alone():
    vit = train_unet.build_network(compose_config("model=vit_small")["model"], 3, 3)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    found = {}
    for group in train_unet.parameter_groups(vit, 0.2):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["weight_decay"]
    assert found.keys() == set(names.values())
    assert found["patch_embedding.weight"] == found["blocks.0.query_key_value.weight"] == 0.2
    assert found["positions"] == found["input_norm.weight"] == found["blocks.0.query_key_value.bias"] == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# the learning rate


LOSSES = {  # the terms of the loss, with class weights and the knobs 0.8 and 1
    "cross_entropy": lambda *batch: losses.cross_entropy_loss(*batch, torch.tensor(WEIGHTS)),
    "focal": lambda *batch: losses.focal_loss(*batch, torch.tensor(WEIGHTS), gamma=1.0),
    "soft_iou": lambda *batch: losses.soft_iou_loss(*batch, torch.tensor(WEIGHTS)),
    "log_iou": lambda *batch: losses.log_iou_loss(*batch, torch.tensor(WEIGHTS)),
    "dice": lambda *batch: losses.dice_loss(*batch, torch.tensor(WEIGHTS)),
    "tversky": lambda *batch: losses.tversky_loss(*batch, torch.tensor(WEIGHTS), alpha=0.8),
}
WEIGHTS = [0.5, 2.0, 1.0]


def loss_settings(**terms):
    changes = {"terms": terms, "tversky_alpha": 0.8, "focal_gamma": 1.0}
    return LossSettings(**read_option("unet", "loss", "terms") | changes)


def random_batch():
    generator = torch.Generator().manual_seed(9)
    target = torch.randint(3, (2, 9, 11), generator=generator)
    target[0, 3:5] = 255
    return torch.randn(2, 3, 9, 11, generator=generator), target


def test_loss_is_the_weighted_sum_of_its_terms():
    batch = random_batch()
    expected = {name: loss(*batch) for name, loss in LOSSES.items()}
    weights = {name: 0.5 + index for index, name in enumerate(LOSSES)}
    assert LOSSES.keys() == train_unet.TERMS.keys()
    for name, weight in weights.items():
        value = train_unet.weighted_loss(*batch, loss_settings(**{name: weight}), WEIGHTS, None)
        torch.testing.assert_close(value, weight * expected[name])
    value = train_unet.weighted_loss(*batch, loss_settings(**weights), WEIGHTS, None)
    torch.testing.assert_close(value, sum(weight * expected[name] for name, weight in weights.items()))


def test_pixel_weights_take_the_place_of_class_weights_in_the_terms_of_pixels():
    logits, target = random_batch()
    pixel_weight = 10 * torch.rand(target.shape, generator=torch.Generator().manual_seed(0))
    expected = {
        "cross_entropy": losses.cross_entropy_loss(logits, target, pixel_weight=pixel_weight),
        "focal": losses.focal_loss(logits, target, pixel_weight=pixel_weight, gamma=1.0),
        "dice": losses.dice_loss(logits, target, torch.tensor(WEIGHTS)),
    }
    for name, loss in expected.items():
        value = train_unet.weighted_loss(logits, target, loss_settings(**{name: 1.0}), WEIGHTS, pixel_weight)
        torch.testing.assert_close(value, loss)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "unet" / "loss").glob("*.yaml")))
def test_loss_files_list_every_term_and_switch_on_what_they_are_named_after(name):
    section = read_option("unet", "loss", name)
    assert section["terms"].keys() == train_unet.TERMS.keys()
    on = {term for term, weight in section["terms"].items() if weight}
    assert on == {"terms": set(), "cross_entropy_dice": {"cross_entropy", "dice"}}.get(name, {name})
    assert (section["class_weights"], section["border_weight"], section["border_sigma"]) == (None, 0.0, 5.0)


def test_terms_are_chosen_on_the_command_line():
    config = compose_config("loss=dice", "loss.terms.dice=0", "loss.terms.tversky=1.5")
    assert {name for name, weight in config["loss"]["terms"].items() if weight} == {"tversky"}


def schedule(**changes):
    return OptimSettings(**(compose_config()["optim"] | {"lr": 0.1, "warmup_steps": 0} | changes))


@pytest.mark.parametrize("name", ["constant", "cosine", "poly"])
def test_schedule_equals_torchs_own(name):
    """As torch.optim.lr_scheduler, which keeps a state, where ours is a function of the step."""
    optim = schedule(schedule=name, min_lr_factor=0.0, poly_power=0.9)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedulers = torch.optim.lr_scheduler
    expected = {
        "constant": lambda: schedulers.ConstantLR(optimizer, factor=1.0),
        "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, T_max=40),
        "poly": lambda: schedulers.PolynomialLR(optimizer, total_iters=40, power=0.9),
    }[name]()
    rates = []
    for step in range(40):
        rates.append(train_unet.scheduled_lr(step, 40, optim))
        assert rates[-1] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), step
        optimizer.step()
        expected.step()
    assert (rates[-1] < 0.02) == (name != "constant")


@pytest.mark.parametrize("name", ["constant", "cosine", "poly"])
def test_warmup_rises_and_the_floor_holds(name):
    optim = schedule(schedule=name, warmup_steps=4, min_lr_factor=0.2)
    rates = [train_unet.scheduled_lr(step, 50, optim) for step in range(50)]
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert train_unet.scheduled_lr(50, 50, optim) == pytest.approx(0.02 if name in ("cosine", "poly") else 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# samples


def test_sample_is_a_function_of_seed_and_index(root):
    overrides = [*tiny_overrides(root), "data.rotation=20", "data.elastic_px=2", "data.scale=[0.6,1.2]"]
    one, other = make_dataset(compose_config(*overrides)), make_dataset(compose_config(*overrides))
    torch.manual_seed(5)  # torch's own stream, and what was read before, have no say
    assert not differences(one[7], [other[index] for index in (9, 7)][1])
    other_seed = make_dataset(compose_config(*overrides, "seed=1"))
    assert [one[index]["name"] for index in range(10)] != [other_seed[index]["name"] for index in range(10)]
    state = torch.get_rng_state()
    one[3]
    assert torch.equal(torch.get_rng_state(), state)
    same_item = [index for index in range(10) if one[index]["name"] == one[0]["name"]]
    assert len(same_item) == 2 and differences(one[same_item[0]]["image"], one[same_item[1]]["image"])


def test_border_weights_are_high_between_objects_of_class_1():
    class_map = np.zeros((40, 60), np.uint8)
    class_map[10:30, 5:28] = 1
    class_map[10:30, 32:55] = 1  # a gap of 4 px
    class_map[0, :] = 255
    loss = LossSettings(**(LOSS.__dict__ | {"border_weight": 10.0}))
    weights = train_unet.border_weights(class_map, loss, [0.5, 2.0])
    assert weights[20, 10] == 2.0 and weights[38, 2] == pytest.approx(0.5, abs=1e-3)
    assert weights[20, 29] == pytest.approx(0.5 + 10 * math.exp(-((2 + 3) ** 2) / 50), rel=1e-4)


def test_border_weight_reaches_the_loss(root, tmp_path, quick, monkeypatch):
    seen = []
    real_loss = train_unet.weighted_loss
    monkeypatch.setattr(train_unet, "weighted_loss", lambda *args: seen.append(args[-1]) or real_loss(*args))
    config = compose_config(*tiny_overrides(root), "loss.border_weight=10", "loss.class_weights=auto", "train.steps=1")
    last = train_in(tmp_path / "run", config)
    assert len(last["class_weights"]) == 3 and last["class_weights"][0] < 1 < last["class_weights"][1]
    assert seen[3].shape == (2, 32, 40)  # of the training step; one disc a picture has no gap to another
    assert {round(weight, 4) for weight in seen[3].unique().tolist()} == {round(w, 4) for w in last["class_weights"]}
    assert [one.shape[0] for one in seen] == [1, 1, 1, 2, 1, 1, 1, 1, 1]  # validation, step, validation, test


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


class ColorReader(torch.nn.Module):
    """A network that knows the tiny pictures' colours, and is wrong in its upper left corner."""

    def forward(self, images):
        colors = torch.from_numpy(COLORS).float() / 255
        logits = -10 * (images[:, None] - colors[None, :, :, None, None]).abs().sum(2)  # (B, C, H, W)
        logits[:, 2, :10, :10] = 5
        return logits


def run_evaluate(items, model, split="val"):
    predictor = Predictor(model, Framing(64, "crop"), 0, (99, 99), 0, CPU, "fp32")
    return train_unet.evaluate(predictor, items, split, LOSS, None, None, 0)


def test_evaluation_equals_a_slow_loop(root):
    items = val_items(root)
    values, matrix = run_evaluate(items, ColorReader())
    pred, truth, losses = [], [], []
    for item in items:
        image, class_map = read_item(item)
        logits = ColorReader()(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(class_map).long()[None]).item())
        pred.append(logits[0].argmax(0).flatten().numpy())
        truth.append(class_map.flatten())
    pred, truth = np.concatenate(pred), np.concatenate(truth)
    ious = [((pred == c) & (truth == c)).sum() / ((pred == c) | (truth == c)).sum() for c in range(3)]
    dices = [2 * ((pred == c) & (truth == c)).sum() / ((pred == c).sum() + (truth == c).sum()) for c in range(3)]
    assert values["val/mean_iou"] == pytest.approx(np.mean(ious)) and 0.5 < np.mean(ious) < 1
    assert values["val/dice"] == pytest.approx(np.mean(dices))
    assert values["val/pixel_accuracy"] == pytest.approx((pred == truth).mean())
    assert values["val/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert [values[f"val/iou_{name}"] for name in NAMES] == pytest.approx(ious)
    assert values["val/num_images"] == 3 and matrix.dtype == np.int64 and matrix.sum() == len(truth)
    assert run_evaluate(items[::-1], ColorReader())[1].tolist() == matrix.tolist()
    majority = reports.majority_metrics(matrix.sum(1), "val")
    counts = np.bincount(truth)
    assert majority["val/pixel_accuracy"] == pytest.approx(counts.max() / counts.sum())
    assert majority["val/mean_iou"] == pytest.approx(counts.max() / counts.sum() / 3)


def test_validation_is_never_augmented_and_leaves_no_graph(root, monkeypatch):
    """Twice the same (the series augments its test set); really without gradient."""

    def refuse(*args):
        raise AssertionError("validation data was augmented")

    monkeypatch.setattr(views, "training_view", refuse)
    model, seen = UNet(3, 3, 4, 2, "bilinear"), []
    model.register_forward_hook(lambda module, inputs, outputs: seen.append((module.training, outputs.requires_grad)))
    model.train()
    first, second = (run_evaluate(val_items(root), model)[0] for _ in range(2))
    assert first == second and set(seen) == {(False, False)}


def test_ignored_pixels_and_absent_classes_are_left_out(root, tmp_path):
    image, class_map = draw_pair(np.random.default_rng(4), 48, 64)
    class_map[class_map == 1] = 0  # no disc
    class_map[:12] = 255  # the corner where the network is wrong
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    write_image(tmp_path / "images" / "a.png", COLORS[np.where(class_map == 255, 0, class_map)])
    write_image(tmp_path / "masks" / "a.png", class_map)
    overrides = ["data.val_list=null", "data.test_list=null", "data.val_fraction=1", "data.test_fraction=0"]
    config = compose_config(*tiny_overrides(root), *overrides, f"data.root={tmp_path}", "data.ignore_values=[255]")
    items = list_items(config, "val")
    values, matrix = run_evaluate(items, ColorReader())
    assert values["val/mean_iou"] == values["val/pixel_accuracy"] == 1.0 and matrix.sum() == 36 * 64
    assert "val/iou_disc" not in values and "val/iou_square" in values
    lines = reports.remarks_on_predictions(matrix, NAMES, "val")
    assert len(lines) == 1 and lines[0].startswith("no pixel of the val pictures is disc")


@pytest.mark.parametrize("share, is_warned", [(0.996, True), (0.994, False)])
def test_class_that_gets_nearly_all_predictions_is_named(share, is_warned):
    truth = np.array([6000, 4000])
    matrix = np.rint(np.stack([truth * share, truth * (1 - share)], 1)).astype(np.int64)
    lines = reports.remarks_on_predictions(matrix, ("sea", "sky"), "val")
    assert bool(lines) == is_warned
    if is_warned:
        assert "warning" in lines[0] and "sea" in lines[0] and "(in truth 60.00%)" in lines[0]


def test_run_warns_of_a_network_with_one_answer(root, tmp_path, quick, capfd):
    """milesial's all-black masks with a Dice of .91: here the class is named."""
    config = compose_config(*tiny_overrides(root), "train.steps=2", "optim.lr=1e-9", "loss.class_weights=[100,0.01,0]")
    real = train_unet.build_network

    def biased(*args):
        model = real(*args)
        torch.nn.init.constant_(model.head.weight, 0)
        model.head.bias.data = torch.tensor([0.0, 9.0, 0.0])
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_unet, "build_network", biased)
        train_in(tmp_path / "run", config)
    assert "100.00% of all val pixels are predicted to be disc" in "".join(capfd.readouterr())


# ---------------------------------------------------------------------------------------------------------------------
# settings


def test_size_that_the_unpadded_network_cannot_take_names_the_nearest():
    with pytest.raises(ValueError, match=r"^data.image_size is 256; .*16 k \+ 60.*nearest are 252 and 268"):
        views.check_size("data.image_size", 256, 92)
    with pytest.raises(ValueError, match=r"^tiles.size is 188; must be at least 204"):
        prediction.check_tiles(TileSettings(188, 0), 92)
    prediction.check_tiles(TileSettings([204, 572], 0), 92)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_composes_and_fixes_its_model(name):
    config = compose_config(f"experiment={name}", "data_root=/nowhere")
    train_unet.read_settings(train_unet.Config, config)  # checks sizes, too
    train_unet.build_network(config["model"], config["data"]["channels"], config["data"]["num_classes"])
    assert "override /model:" in (ROOT / "configs" / "unet" / "experiment" / f"{name}.yaml").read_text()


def test_there_are_presets():
    pets = {f"pets_{name}" for name in ("unet", "segnet", "segnet_dsc", "vit", "fcn")}
    assert set(PRESETS) >= {"unet_isbi_paper", "camvid_unet", *pets}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_two_steps(name, tmp_path, quick):
    """On a tiny dataset in the layout that the preset reads, with a narrower network."""
    data_root = write_data_root(tmp_path / "data")
    overrides = [f"experiment={name}", f"data_root={data_root}", "device=cpu", "num_workers=0"]
    overrides += ["train.steps=2", "train.batch_size=1", "tiles.size=auto"]
    overrides += ["model.dim=24", "model.num_blocks=2"] if name == "pets_vit" else ["model.base_channels=4"]
    overrides += ["data.image_size=204"] if name == "unet_isbi_paper" else ["data.image_size=64"]
    last = train_in(tmp_path / "run", compose_config(*overrides))
    assert last["step"] == 2
    assert [row["step"] for row in last["metrics"] if "val/mean_iou" in row] == [0, 2]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["metrics"]["last"]["val/num_images"] >= 1


# ---------------------------------------------------------------------------------------------------------------------
# what a user sees when something is wrong


def fails_with(monkeypatch, capfd, run_dir, *arguments):
    status, output = run_main(monkeypatch, capfd, run_dir, *arguments)
    assert status == 1 and "Traceback" not in output and "error: " in output, output
    return output[output.rindex("error: ") :]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mode=predict"], "mode=predict needs checkpoint="),
        (["mode=predict", "checkpoint={best}"], "mode=predict needs input="),
        (["mode=evaluate"], "mode=evaluate needs checkpoint="),
        (["mode=fly"], "mode is fly; must be one of train, evaluate, predict, summary"),
        (["checkpoint={best}"], "checkpoint= is given but mode is train"),
        (["input=x.png"], "input= is given but mode is train"),
        (["mode=evaluate", "checkpoint={best}", "resume=x"], "resume= is given but mode is evaluate"),
        (["mode=evaluate", "checkpoint={best}", "split=all"], "split is all; must be one of train, val, test"),
        (["mode=evaluate", "checkpoint={best}", "train.steps=4"], "train.steps= has no effect with mode=evaluate"),
        (["mode=evaluate", "checkpoint={best}", "data_root=/x"], "give data.root=<folder>"),
        (["mode=evaluate", "checkpoint={best}", "data.root=/x"], "data.root /x is not a folder"),
        (["mode=evaluate", "checkpoint={best}", "data.image_size=99"], "data.image_size is 99; checkpoint"),
        (["mode=evaluate", "checkpoint={best}", "data=camvid"], "data.num_classes is 11; checkpoint"),
        (["mode=predict", "checkpoint={best}", "input=x", "model=segnet"], "is of the model {'name': 'unet'"),
        (["mode=predict", "checkpoint={best}", "input=/nowhere.png"], "input /nowhere.png does not exist"),
        (["mode=predict", "checkpoint=/nowhere.pt", "input=x"], "checkpoint /nowhere.pt does not exist"),
    ],
)
def test_command_that_makes_no_sense(arguments, message, overfitted, tmp_path, monkeypatch, capfd):
    arguments = [argument.replace("{best}", str(overfitted[0] / "best.pt")) for argument in arguments]
    assert message in fails_with(monkeypatch, capfd, tmp_path / "run", *arguments)


def test_checkpoint_of_another_script_or_model(overfitted, tmp_path, monkeypatch, capfd):
    arguments = ["mode=predict", "input=x.png", f"checkpoint={tmp_path / 'other.pt'}"]
    torch.save({"model": {}, "config": {"model": {"name": "sam2_nano"}}, "format": 1}, tmp_path / "other.pt")
    message = fails_with(monkeypatch, capfd, tmp_path / "run", *arguments)
    assert "was not written by train_unet.py" in message
    write_image(tmp_path / "x.png", np.zeros((9, 9, 3), np.uint8))
    state = torch.load(overfitted[0] / "best.pt", weights_only=True)
    state["config"]["model"]["base_channels"] = 4
    torch.save(state, tmp_path / "other.pt")
    arguments[1] = f"input={tmp_path / 'x.png'}"
    message = fails_with(monkeypatch, capfd, tmp_path / "again", *arguments)
    assert "does not hold the weights of its model unet" in message and "size mismatch" in message


def test_mask_with_a_class_that_the_model_lacks(overfitted, tmp_path, monkeypatch, capfd, quick):
    """In training and in evaluation of a checkpoint: the file is named, and the YAML line that mends it."""
    root = write_dataset(tmp_path / "data")
    mask = np.array(Image.open(root / "masks" / "008.png"))
    mask[0, :5] = 3
    write_image(root / "masks" / "008.png", mask)
    message = fails_with(monkeypatch, capfd, tmp_path / "run", *tiny_overrides(root))
    assert "008.png" in message and "num_classes: 4" in message
    assert not (tmp_path / "run" / "run.json").exists()
    arguments = ["mode=evaluate", f"checkpoint={overfitted[0] / 'best.pt'}", f"data.root={root}"]
    message = fails_with(monkeypatch, capfd, tmp_path / "again", *arguments)
    assert "008.png" in message
    status, output = run_main(monkeypatch, capfd, tmp_path / "skip", *arguments, "data.on_bad=skip")
    assert status == 0 and "1 images;" in output


def test_check_lists_every_fault_and_stops(tmp_path, monkeypatch, capfd, quick):
    root = write_dataset(tmp_path / "data")
    for name in ("000", "001"):
        (root / "images" / f"{name}.png").write_bytes(b"no picture")
    (root / "masks" / "002.png").unlink()
    status, output = run_main(monkeypatch, capfd, tmp_path / "run", *tiny_overrides(root), "check=true")
    assert status == 1
    listed = output.split("cannot be used")[0]
    for name in ("000.png", "001.png", "002.png"):
        assert name in listed
    assert not (tmp_path / "run" / "last.pt").exists() and not (tmp_path / "run" / "run.json").exists()


def test_grey_pictures_for_a_colour_network_are_repeated_and_remarked_on(root, tmp_path, monkeypatch, capfd, quick):
    grey = write_dataset(tmp_path / "data")
    for path in (grey / "images").glob("*.png"):
        Image.fromarray(read_image(path)[..., 0]).save(path)
    status, output = run_main(monkeypatch, capfd, tmp_path / "run", *tiny_overrides(grey), "train.steps=1")
    assert status == 0 and "channels: 1" in output
    status, _ = run_main(
        monkeypatch, capfd, tmp_path / "one", *tiny_overrides(grey), "train.steps=1", "data.channels=1"
    )
    assert status == 0
