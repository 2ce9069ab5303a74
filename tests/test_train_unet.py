"""train_unet.py on tiny pictures: the real command, what is trained, samples, metrics, and bad input.

Tried beside what was reported, to find faults of the same kinds (those marked * were some, and have a test): class
names with commas and quotes*, tiles.overlap above an automatic tile*, a network trained at a size beyond the tile*, a
picture beyond all memory among others*, a network that fails at one pixel*, checkpoint= and input= as links to nothing
and as folders, class names yes and no, class_values as a list and of floats. Masks and lists that were tried stand in
test_segmentation_readers.py.
"""

import csv
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
import tiny_segmentation
import torch
import torchvision
from forked import child_environment, run_python
from options import read_option
from PIL import Image
from tiny import changed_config, differences, read_last, run_command
from tiny_segmentation import NAMES, ROOT, compose_config, run_main, tiny_overrides, train_in, write_dataset
from torchvision.models import get_model

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
    tiny_segmentation.make_runs_quick(monkeypatch)


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
    arguments = [
        *tiny_overrides(root),
        "train.steps=80", "train.batch_size=5", "train.eval_every=40", "train.log_every=10", "optim.lr=0.01",
        "model.base_channels=8",
        "data.scale=[1.0,1.0]", "data.color_jitter=0.0", "data.image_size=[48,64]",
    ]  # fmt: skip
    done = run_command(train_unet, run_dir, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir, done.stdout + done.stderr


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
    # from where the user stands
    assert f"python {ROOT / 'train_unet.py'} mode=predict checkpoint=run/best.pt input=" in output


def test_tiny_data_is_overfitted_and_recorded(overfitted):
    run_dir, output = overfitted
    record = json.loads((run_dir / "run.json").read_text())
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
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
    assert best.keys() == {"format", "script", "model", "config", "class_weights", "git", "metrics"}
    assert best["format"] == 1
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
        sizes = tiny_segmentation.SIZES
        assert matrix.sum() == sum(math.prod(sizes[number % len(sizes)]) for number in numbers)
        assert np.trace(matrix) / matrix.sum() == pytest.approx(expected[f"{split}/pixel_accuracy"])
        assert list((tmp_path / split / "samples").iterdir())


def test_predict_needs_nothing_but_the_checkpoint(overfitted, root, tmp_path, monkeypatch, capfd):
    """A folder of grey, 16-bit, RGBA and tiny pictures, and one that cannot be read, which is named at the end."""
    run_dir, _ = overfitted
    photos = tmp_path / "photos"
    photos.mkdir()
    image_rgb, class_map = tiny_segmentation.draw_pair(np.random.default_rng(9), 100, 130)
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


def test_evaluation_of_pictures_of_one_class_and_of_none(overfitted, tmp_path, monkeypatch, capfd, quick):
    """What nothing can be learned from can be measured; what does not count at all cannot."""
    for folder, values in (("one", (0, 0)), ("none", (0, 255))):
        for kind in ("images", "masks"):
            (tmp_path / folder / kind).mkdir(parents=True)
        for name, value in zip(("a", "b"), values, strict=True):
            write_image(tmp_path / folder / "images" / f"{name}.png", np.full((9, 8, 3), 40, np.uint8))
            write_image(tmp_path / folder / "masks" / f"{name}.png", np.full((9, 8), value, np.uint8))
        (tmp_path / folder / "test.txt").write_text("b")
    arguments = ["mode=evaluate", f"checkpoint={overfitted[0] / 'best.pt'}", "device=cpu", "data=folders"]
    arguments += ["data.num_classes=3", "data.ignore_values=[255]", "data.val_fraction=0"]
    for folder, status, words in (("one", 0, "1 images; pictures"), ("none", 1, "no usable picture in its test split")):
        own = [f"data.root={tmp_path / folder}", f"data.test_list={tmp_path / folder / 'test.txt'}"]
        ended, output = run_main(monkeypatch, capfd, tmp_path / folder / "run", *arguments, *own)
        assert ended == status and words in output and "Traceback" not in output, output


@pytest.mark.slow
def test_unpadded_network_predicts_alike_with_any_tiles(root, tmp_path, monkeypatch, capfd, quick):
    """By the command, of a grey network: the same probabilities, to the precision of the file."""
    overrides = [override for override in tiny_overrides(root) if not override.startswith("model")]
    config = compose_config(
        *overrides, "model=unet_paper", "model.base_channels=2", "data.image_size=204", "data.fit=crop",
        "data.channels=1", "train.steps=1", "train.test_at_end=false", "tiles.size=220",
    )  # fmt: skip
    train_in(tmp_path / "run", config)
    image_rgb, _ = tiny_segmentation.draw_pair(np.random.default_rng(2), 90, 150)
    write_image(tmp_path / "photo.png", image_rgb)  # in colour
    probabilities = []
    arguments = ["mode=predict", f"checkpoint={tmp_path / 'run' / 'best.pt'}", f"input={tmp_path / 'photo.png'}"]
    for number, size in enumerate(("204", "[220,236]", "auto")):
        run_dir = tmp_path / f"out_{number}"
        status, _ = run_main(monkeypatch, capfd, run_dir, *arguments, f"tiles.size={size}", "probabilities=true")
        assert status == 0
        probabilities.append(np.load(run_dir / "photo_probabilities.npy").astype(np.float32))
    assert probabilities[0].shape == (3, 90, 150)
    assert np.ptp(probabilities, axis=0).max() < 1e-3
    message = fails_with(monkeypatch, capfd, tmp_path / "bad", *arguments, "tiles.size=512")
    assert "tiles.size is 512" in message and "508 and 524" in message


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
    tiny_segmentation.script_evaluation(monkeypatch)
    small = {
        "unet": ["model.base_channels=4", "model.depth=2"],
        "unet_paper": ["model.base_channels=4", "data.image_size=188"],
        "fcn": ["model.base_channels=4", "model.head_channels=16"],
        "segnet": ["model.base_channels=4"],
        "segnet_dsc": ["model.base_channels=4"],
        "vit_small": ["model.dim=24", "model.num_blocks=2", "model.num_heads=2"],
        "deeplabv3": ["model.backbone=mobilenet_v3_large"],
    }[name]
    overrides = [override for override in tiny_overrides(root) if not override.startswith("model")]
    config = compose_config(
        *overrides, f"model={name}", *small, optim, "optim.weight_decay=0.0", "optim.lr=0.01",
        "train.steps=3", "train.test_at_end=false",
    )  # fmt: skip
    trained = train_in(tmp_path / "run", config)["model"]
    seed_everything(config["seed"])  # the weights that the run started from
    before = dict(train_unet.build_network(config["model"], 3, 3).named_parameters())
    assert not [name for name, values in before.items() if torch.equal(values, trained[name])]


def test_published_weights_are_downloaded_by_a_new_run_alone(root, tmp_path, quick, monkeypatch, capfd):
    """Evaluation, prediction, a summary, a resumed run and a dataset check take none."""
    monkeypatch.setattr(train_unet, "LATENCY_REPEATS", 2)
    name, asked = "deeplabv3_mobilenet_v3_large", []
    published = get_model(name, weights=None, weights_backbone=None, aux_loss=True).state_dict()
    monkeypatch.setattr(
        torchvision.models._api, "load_state_dict_from_url", lambda url, **_: asked.append(url) or published
    )
    overrides = [override for override in tiny_overrides(root) if not override.startswith("model")]
    overrides += ["model=deeplabv3", "model.backbone=mobilenet_v3_large", "model.pretrained=true", "train.steps=1"]
    overrides += ["data.channels=1", "train.picture_images=0"]  # grey pictures
    run_dir = tmp_path / "run"

    def run(folder, *arguments):
        return run_main(monkeypatch, capfd, tmp_path / folder, "device=cpu", "num_workers=0", *arguments)

    assert run("check", *overrides, "check=true")[0] == 0 and not asked
    assert run("run", *overrides)[0] == 0 and len(asked) == 1 and name in asked[0]
    start = published["backbone.0.0.weight"]
    moved = (read_last(run_dir)["model"]["network.backbone.0.0.weight"] - start).abs().max()
    assert 0 < moved < 0.1 * start.abs().max()  # it began with them
    for folder, arguments in {
        "resumed": [f"resume={run_dir}", "train.steps=2"],
        "evaluate": ["mode=evaluate", f"checkpoint={run_dir / 'best.pt'}"],
        "predict": ["mode=predict", f"checkpoint={run_dir / 'best.pt'}", f"input={val_items(root)[0].image_path}"],
        "summary": ["mode=summary", f"checkpoint={run_dir / 'best.pt'}"],
    }.items():
        assert run(folder, *arguments)[0] == 0, folder
    assert len(asked) == 1
    status, message = run("alone", *overrides, "model.pretrained=false", "train.batch_size=1")
    assert status == 1 and "error: train.batch_size is 1; must be 2 or more for model=deeplabv3" in message


def test_parameter_groups_decay_weights_alone():
    vit = train_unet.build_network(compose_config("model=vit_small")["model"], 3, 3)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    groups = train_unet.parameter_groups(vit, 0.2)
    decays = [(names[id(parameter)], group["weight_decay"]) for group in groups for parameter in group["params"]]
    assert sorted(name for name, _ in decays) == sorted(names.values())  # each once
    decays = dict(decays)
    assert decays["patch_embedding.weight"] == decays["blocks.0.query_key_value.weight"] == 0.2
    assert decays["positions"] == decays["input_norm.weight"] == decays["blocks.0.query_key_value.bias"] == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# the learning rate


KNOBS = {"focal": {"gamma": 1.0}, "tversky": {"alpha": 0.8}}
WEIGHTS = [0.5, 2.0, 1.0]


def plain_loss(name, *batch, **weights):
    return getattr(losses, f"{name}_loss")(*batch, **weights, **KNOBS.get(name, {}))


def loss_settings(**terms):
    changes = {"terms": terms, "tversky_alpha": 0.8, "focal_gamma": 1.0, "class_weights": WEIGHTS}
    return LossSettings(**read_option("unet", "loss", "terms") | changes)


def random_batch():
    generator = torch.Generator().manual_seed(9)
    target = torch.randint(3, (2, 9, 11), generator=generator)
    target[0, 3:5] = 255
    return torch.randn(2, 3, 9, 11, generator=generator), target


def test_loss_is_the_weighted_sum_of_its_terms():
    """A term is the function of its name, with the classes' weights and its own knob."""
    batch, class_weight = random_batch(), torch.tensor(WEIGHTS)
    weights = {name: 0.5 + index for index, name in enumerate(train_unet.TERMS)}
    expected = {name: weight * plain_loss(name, *batch, class_weight=class_weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        value = train_unet.weighted_loss(*batch, loss_settings(**{name: weight}), None)
        torch.testing.assert_close(value, expected[name])
    value = train_unet.weighted_loss(*batch, loss_settings(**weights), None)
    torch.testing.assert_close(value, sum(expected.values()))


def test_pixel_weights_take_the_place_of_class_weights_in_the_terms_of_pixels():
    logits, target = random_batch()
    pixel_weight = 10 * torch.rand(target.shape, generator=torch.Generator().manual_seed(0))
    for name in train_unet.TERMS:
        is_of_pixels = name in ("cross_entropy", "focal")
        weight = {"pixel_weight": pixel_weight} if is_of_pixels else {"class_weight": torch.tensor(WEIGHTS)}
        value = train_unet.weighted_loss(logits, target, loss_settings(**{name: 1.0}), pixel_weight)
        torch.testing.assert_close(value, plain_loss(name, logits, target, **weight))


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
    dataset, again = (tiny_segmentation.make_dataset(compose_config(*overrides)) for _ in range(2))
    torch.manual_seed(5)  # torch's own stream, and what was read before, have no say
    assert not differences(dataset[7], [again[index] for index in (9, 7)][1])
    other_seed = tiny_segmentation.make_dataset(compose_config(*overrides, "seed=1"))
    assert [dataset[index]["name"] for index in range(10)] != [other_seed[index]["name"] for index in range(10)]
    state = torch.get_rng_state()
    dataset[3]
    assert torch.equal(torch.get_rng_state(), state)
    same_item = [index for index in range(10) if dataset[index]["name"] == dataset[0]["name"]]
    assert len(same_item) == 2 and differences(dataset[same_item[0]]["image"], dataset[same_item[1]]["image"])


def test_border_weights_are_high_between_objects_of_class_1():
    class_map = np.zeros((40, 60), np.uint8)
    class_map[10:30, 5:28] = 1
    class_map[10:30, 32:55] = 1  # a gap of 4 px
    class_map[0, :] = 255
    loss = LossSettings(**(LOSS.__dict__ | {"border_weight": 10.0, "class_weights": [0.5, 2.0]}))
    weights = train_unet.border_weights(class_map, loss)
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
    assert [len(weight) for weight in seen] == [1, 1, 1, 2, 1, 1, 1, 1, 1]  # validation, step, validation, test


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


class ColorReader(torch.nn.Module):
    """A network that knows the tiny pictures' colours, and is wrong in its upper left corner."""

    def forward(self, images):
        colors = torch.from_numpy(tiny_segmentation.COLORS).float() / 255
        logits = -10 * (images[:, None] - colors[None, :, :, None, None]).abs().sum(2)  # (B, C, H, W)
        logits[:, 2, :10, :10] = 5
        return logits


def run_evaluate(items, model, split="val"):
    predictor = Predictor(model, Framing(64, "crop"), 0, (99, 99), 0, CPU, "fp32")
    return train_unet.evaluate(predictor, items, split, LOSS, None, 0)


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
    image, class_map = tiny_segmentation.draw_pair(np.random.default_rng(4), 48, 64)
    class_map[class_map == 1] = 0  # no disc
    class_map[:12] = 255  # the corner where the network is wrong
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    write_image(tmp_path / "images" / "a.png", tiny_segmentation.COLORS[np.where(class_map == 255, 0, class_map)])
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


def test_run_warns_of_a_network_with_one_answer(root, tmp_path, quick, monkeypatch, capfd):
    """milesial's all-black masks with a Dice of .91: here the class is named."""
    config = compose_config(*tiny_overrides(root), "train.steps=2", "optim.lr=1e-9", "loss.class_weights=[100,0.01,0]")
    real = train_unet.build_network

    def biased(*args):
        model = real(*args)
        torch.nn.init.constant_(model.head.weight, 0)
        model.head.bias.data = torch.tensor([0.0, 9.0, 0.0])
        return model

    monkeypatch.setattr(train_unet, "build_network", biased)
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
    data_root = tiny_segmentation.write_data_root(tmp_path / "data")
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
        (["mode=evaluate", "checkpoint={best}", "data.hflip=false"], "data.hflip= has no effect with mode=evaluate"),
        (["mode=evaluate", "checkpoint={best}", "probabilities=true"], "probabilities= is given but mode is evaluate"),
        (["mode=predict", "checkpoint={best}", "input=x", "split=val"], "split= is given but mode is predict"),
        (["mode=summary", "check=true"], "check= is given but mode is summary"),
        (["mode=summary", "data.channels=null"], "data.channels is None; must be 1 (grey) or 3"),
        (["data.num_classes='3'"], "data.num_classes is '3'; must be 2 to 254"),
        (["model.name=[unet]"], "model.name is ['unet']; must be one of"),
        (["loss=dice", "loss.border_weight=10"], "loss.border_weight is 10, but cross_entropy and focal alone take it"),
        (["mode=evaluate", "checkpoint={best}", "data_root=/x"], "give data.root=<folder>"),
        (["mode=evaluate", "checkpoint={best}", "data.root=/x"], "data.root /x is not a folder"),
        (["mode=evaluate", "checkpoint={best}", "data.image_size=99"], "data.image_size is 99; checkpoint"),
        (["mode=evaluate", "checkpoint={best}", "data=camvid"], "data.num_classes is 11; checkpoint"),
        (["mode=predict", "checkpoint={best}", "input=x", "model=segnet"], "is of the model {'name': 'unet'"),
        (["mode=predict", "checkpoint={best}", "input=/nowhere.png"], "input /nowhere.png does not exist"),
        (["mode=predict", "checkpoint=/nowhere.pt", "input=x"], "checkpoint /nowhere.pt does not exist"),
        (["mode=predict", "checkpoint={best}", "input={broken}"], "broken.png cannot be decoded as a picture"),
    ],
)
def test_command_that_makes_no_sense(arguments, message, overfitted, tmp_path, monkeypatch, capfd):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = {"best": overfitted[0] / "best.pt", "broken": tmp_path / "broken.png"}
    arguments = [argument.format(**paths) for argument in arguments]
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
    arguments = [*tiny_overrides(grey), "train.steps=1", "data.channels=1"]
    assert run_main(monkeypatch, capfd, tmp_path / "one", *arguments)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# real files, and settings that no run can have


def test_printed_command_predicts_every_slice_of_a_volume(tmp_path, monkeypatch, capfd, quick):
    """ISBI's stacks: it predicted 1 slice of 30, and said "1 pictures"."""
    rng, root = np.random.default_rng(0), tmp_path / "isbi"
    root.mkdir()
    tifffile.imwrite(root / "train-volume.tif", rng.integers(0, 256, (6, 40, 48), dtype=np.uint8))
    tifffile.imwrite(root / "train-labels.tif", rng.integers(0, 2, (6, 40, 48)).astype(np.uint8) * 255)
    overrides = [each for each in tiny_overrides(root) if not each.startswith(("data", "model="))]
    overrides += ["model=unet", "data=isbi", f"data.root={root}", "data.image_size=32", "train.steps=1"]
    monkeypatch.chdir(tmp_path)
    status, output = run_main(monkeypatch, capfd, tmp_path / "run", *overrides)
    assert status == 0, output
    arguments = ["mode=evaluate", "split=val", f"checkpoint={tmp_path / 'run' / 'best.pt'}"]
    evaluated = run_main(monkeypatch, capfd, tmp_path / "evaluated", *arguments)[1]
    (_, best, _), (again,) = (re.search(r"^v_rand(.*)$", text, re.M)[1].split() for text in (output, evaluated))
    assert "  v_rand 0." in output and best == again and 0 < float(best) < 1  # nothing of the majority's
    arguments = shlex.split(next(line for line in output.splitlines() if "mode=predict" in line))[2:]
    status, output = run_main(monkeypatch, capfd, tmp_path / "out", *arguments)
    assert status == 0 and "6 pictures: 0 membrane" in output
    names = sorted(path.name for path in (tmp_path / "out").glob("*_classes.png"))
    assert names == [f"train-volume_{page:04d}_classes.png" for page in range(1, 7)]


def test_one_picture_does_not_end_the_prediction_of_a_folder(overfitted, tmp_path, monkeypatch, capfd):
    """A link to nothing, one that may not be read, a kind that is not read, a network that fails, a name too long for
    what is written; and sub-folders.
    """
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    image_rgb, _ = tiny_segmentation.draw_pair(np.random.default_rng(9), 60, 70)
    for name in ("a", "closed", "z", "more/b", "n" * 240):
        write_image(photos / f"{name}.png", image_rgb)
    write_image(photos / "large.png", np.tile(image_rgb, (1, 2, 1)))
    (photos / "gone.png").symlink_to(tmp_path / "annex" / "gone.png")
    (photos / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    from_file, predict = np.fromfile, Predictor.predict

    def refuse(path, *args, **keywords):
        if path.name == "closed.png":
            raise PermissionError(13, "Permission denied", str(path))
        return from_file(path, *args, **keywords)

    def fail_at_large(self, image):
        if image.shape[1] == 140:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory: you tried to\nallocate 9 bytes")
        return predict(self, image)

    monkeypatch.setattr(np, "fromfile", refuse)
    monkeypatch.setattr(Predictor, "predict", fail_at_large)
    arguments = ["mode=predict", f"checkpoint={overfitted[0] / 'best.pt'}", "device=cpu", f"input={photos}"]
    status, output = run_main(monkeypatch, capfd, tmp_path / "out", *arguments)
    lines = output.rstrip().splitlines()
    assert status == 1 and "Traceback" not in output and lines[-6] == "5 pictures failed:", output
    assert "closed.png" in lines[-5] and "Permission denied" in lines[-5]
    assert "gone.png is a link to" in lines[-4] and "large.png: " in lines[-3] and "allocate memory" in lines[-3]
    assert "nnn.png: [Errno 36] File name too long" in lines[-2]
    assert "phone.jpg is HEIC" in lines[-1]
    assert "its 1 folders are not entered" in output
    assert {path.name for path in (tmp_path / "out").glob("*_classes.png")} == {"a_classes.png", "z_classes.png"}
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["metrics"]["last"] == {"num_images": 2, "num_failed": 5}


def test_confusion_of_classes_with_a_comma_in_their_name_has_a_column_each(root, tmp_path, monkeypatch, capfd, quick):
    config = compose_config(*tiny_overrides(root), "train.steps=1", "data.class_names=['road, wet','a \"b\"',c]")
    train_in(tmp_path / "run", config)
    arguments = ["mode=evaluate", f"checkpoint={tmp_path / 'run' / 'best.pt'}", "device=cpu"]
    assert run_main(monkeypatch, capfd, tmp_path / "out", *arguments)[0] == 0
    with (tmp_path / "out" / "confusion.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["road, wet", 'a "b"', "c"] and [len(row) for row in rows] == [3] * 4


@pytest.mark.parametrize("has_saved", [False, True])
def test_ctrl_c_ends_in_one_line(has_saved, root, tmp_path, monkeypatch, capfd, quick):
    """In the check of the dataset, and in training; pasted, the printed command goes on."""

    def interrupt(*args, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((train_unet.loops, "clip_gradients") if has_saved else (train_unet, "check_data")), interrupt)
        status, output = run_main(patch, capfd, tmp_path / "run", *tiny_overrides(root), "train.steps=2")
    last_line = output.rstrip().splitlines()[-1]
    assert status == 130 and "Traceback" not in output and last_line.startswith("interrupted; ")
    if has_saved:
        assert "last.pt is saved" in last_line
        arguments = shlex.split(last_line.split("go on with: ")[1])[2:]
        assert run_main(monkeypatch, capfd, tmp_path / "resumed", *arguments)[0] == 0
        assert read_last(tmp_path / "resumed")["step"] == 2


@pytest.mark.parametrize("hw", [(1, 1), (15, 40)])
def test_segnet_predicts_a_side_below_16_px(hw, root, tmp_path, monkeypatch, capfd, quick):
    """It ended the prediction of a folder: "Output size is too small"."""
    overrides = [each for each in tiny_overrides(root) if not each.startswith("model")]
    overrides += ["model=segnet", "model.base_channels=2", "data.fit=crop", "train.steps=1"]
    train_in(tmp_path / "run", compose_config(*overrides))
    write_image(tmp_path / "dot.png", np.zeros((*hw, 3), np.uint8))
    arguments = ["mode=predict", f"checkpoint={tmp_path / 'run' / 'best.pt'}", f"input={tmp_path / 'dot.png'}"]
    assert run_main(monkeypatch, capfd, tmp_path / "out", *arguments, "device=cpu")[0] == 0
    assert np.array(Image.open(tmp_path / "out" / "dot_classes.png")).shape == hw


@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_unpadded_network_of_the_smallest_legal_size(fit, root, tmp_path, quick):
    """188 px in, 4 px out: "range() arg 3 must not be zero" at the first evaluation."""
    overrides = [each for each in tiny_overrides(root) if not each.startswith("model")]
    overrides += [
        "model=unet_paper",
        "model.base_channels=2",
        "data.image_size=188",
        f"data.fit={fit}",
        "train.steps=1",
    ]
    assert train_in(tmp_path / "run", compose_config(*overrides))["step"] == 1


def test_tiles_are_in_the_runs_config_and_come_with_the_checkpoint(root, tmp_path, monkeypatch, capfd, quick):
    """They were as large as free memory allowed, anew in each command, so that metrics depended on it."""
    evaluated = []
    real = train_unet.evaluate
    monkeypatch.setattr(train_unet, "evaluate", lambda *args: evaluated.append(args[0]) or real(*args))
    runs = {}
    for gigabytes in (0.5, 64):
        monkeypatch.setattr(prediction, "free_memory", lambda device, size=gigabytes: int(size * 1e9))
        config = compose_config(*tiny_overrides(root), "data.fit=crop", "train.steps=1")
        runs[gigabytes] = train_in(tmp_path / f"run_{gigabytes}", config)["config"]["tiles"]
    (height, width) = runs[64]["size"]
    assert runs[0.5] == runs[64] == {"size": [height, width], "overlap": 64} and height == width > 256
    assert {predictor.tile_hw for predictor in evaluated} == {(height, width)}
    assert evaluated[0].tiles_at_once < evaluated[-1].tiles_at_once
    config = compose_config(
        *tiny_overrides(root), "data.fit=crop", "train.steps=1", "tiles.size=[40,48]", "tiles.overlap=8"
    )
    train_in(tmp_path / "small", config)
    arguments = ["mode=evaluate", f"checkpoint={tmp_path / 'small' / 'best.pt'}", "device=cpu", "split=val"]
    assert run_main(monkeypatch, capfd, tmp_path / "evaluated", *arguments)[0] == 0
    assert (evaluated[-1].tile_hw, evaluated[-1].overlap) == ((40, 48), 8)
    assert run_main(monkeypatch, capfd, tmp_path / "again", *arguments, "tiles.size=[72,80]")[0] == 0
    assert (evaluated[-1].tile_hw, evaluated[-1].overlap) == ((72, 80), 8)
    metrics = [json.loads((tmp_path / name / "run.json").read_text())["metrics"] for name in ("small", "evaluated")]
    assert all(metrics[0]["best"][name] == value for name, value in metrics[1]["last"].items())
    # the same command line with a preset, which says auto, resumes it
    data_root = tiny_segmentation.write_data_root(tmp_path / "data")
    arguments = ["experiment=unet_isbi", f"data_root={data_root}", "device=cpu", "num_workers=0", "train.steps=1"]
    arguments += ["model.base_channels=4", "data.image_size=32"]
    assert run_main(monkeypatch, capfd, tmp_path / "preset", *arguments)[0] == 0
    status, output = run_main(monkeypatch, capfd, tmp_path / "resumed", *arguments, f"resume={tmp_path / 'preset'}")
    assert status == 0, output
    tiles = [read_last(tmp_path / name)["config"]["tiles"]["size"] for name in ("preset", "resumed")]
    assert tiles[0] == tiles[1] and isinstance(tiles[0], list)


def test_summary_of_the_papers_network_is_that_of_the_paper(tmp_path, monkeypatch, capfd):
    """It failed on data.image_size, 128, which nobody had given."""
    monkeypatch.setattr(train_unet.model_summary, "measure_latency", lambda *args: (1.0, 2.0))
    arguments = ["mode=summary", "model=unet_paper", "data=isbi", "device=cpu"]
    status, output = run_main(monkeypatch, capfd, tmp_path / "out", *arguments)
    assert status == 0 and "31,030,658" in output and "1 x 1 x 572 x 572" in output and "1 x 2 x 388 x 388" in output
    small = [*arguments, "model.base_channels=2"]
    status, output = run_main(monkeypatch, capfd, tmp_path / "given", *small, "data.image_size=204")
    assert status == 0 and "1 x 1 x 204 x 204" in output
    status, output = run_main(
        monkeypatch, capfd, tmp_path / "preset", "mode=summary", "experiment=unet_isbi_paper", "device=cpu"
    )
    assert status == 0 and "1 x 1 x 380 x 380" in output
    assert "data.image_size is 128" in fails_with(monkeypatch, capfd, tmp_path / "bad", *small, "data.image_size=128")
    vit = ["mode=summary", "model=vit_small", "model.image_size=96", "model.dim=24", "model.num_heads=2", "device=cpu"]
    status, output = run_main(monkeypatch, capfd, tmp_path / "vit", *vit)
    assert status == 0 and "1 x 3 x 96 x 96" in output


def test_a_network_that_finds_little_is_not_told_to_train_longer(capfd):
    """A perfect network on 0.3 % foreground: 99.7 % of all pixels are rightly one class."""
    warned = {
        "perfect": np.array([[99_700, 0], [0, 300]]),
        "half": np.array([[99_700, 0], [150, 150]]),
        "one class in truth": np.array([[100_000, 0], [0, 0]]),
    }
    for name, matrix in warned.items():
        lines = reports.remarks_on_predictions(matrix, ("ground", "cell"), "val")
        assert not [line for line in lines if line.startswith("warning")], name
    lines = reports.remarks_on_predictions(np.array([[99_700, 0], [300, 0]]), ("ground", "cell"), "val")
    assert len(lines) == 1 and "100.00% of all val pixels are predicted to be ground (in truth 99.70%)" in lines[0]


@pytest.mark.parametrize("arguments", [["check=true"], ["train.steps=1"]])
def test_classes_that_a_part_lacks_are_said_at_the_start(arguments, tmp_path, monkeypatch, capfd, quick):
    """With one class in validation the first perfect score was best.pt for ever; of training nothing was said."""
    root = write_dataset(tmp_path / "data")
    for number in range(8):
        path = root / "masks" / f"{number:03d}.png"
        mask = np.array(Image.open(path))
        write_image(path, np.where(mask == 2, 0, mask) if number < 5 else np.zeros_like(mask))
    status, output = run_main(monkeypatch, capfd, tmp_path / "run", *tiny_overrides(root), *arguments)
    assert status == 0, output
    start = output.split("step 0:")[0]
    assert (
        "no pixel of the training pictures is square" in start
        and "the validation pictures are background alone" in start
    )
    status, output = run_main(monkeypatch, capfd, tmp_path / "other", *tiny_overrides(root), "check=true")
    whole = write_dataset(tmp_path / "whole")
    status, output = run_main(monkeypatch, capfd, tmp_path / "third", *tiny_overrides(whole), *arguments)
    assert status == 0 and "no pixel of the training" not in output and "alone" not in output.split("step 0:")[0]
    # the pictures that validate are those of train.eval_images
    some = write_dataset(tmp_path / "some")
    write_image(some / "masks" / "005.png", np.zeros_like(np.array(Image.open(some / "masks" / "005.png"))))
    arguments = [*arguments, "train.eval_images=1"]
    _, output = run_main(monkeypatch, capfd, tmp_path / "fourth", *tiny_overrides(some), *arguments)
    assert "the validation pictures are background alone" in output.split("step 0:")[0]


def test_perfect_scores_are_told_apart_by_the_loss(root, tmp_path, monkeypatch, quick):
    """With one class in validation the first of them stayed best.pt: 0.893 on test, where the last had 0.937."""
    scores = iter([(0.4, 1.0), (1.0, 0.7), (1.0, 0.2), (1.0, 0.3), (1.0, 0.2)])

    def evaluate(predictor, items, split, *rest):
        score, loss = next(scores)
        measured = dict.fromkeys((f"{split}/{name}" for name in reports.REPORTED), score)
        return measured | {f"{split}/loss": loss, f"{split}/num_images": len(items)}, np.diag([10, 0, 0])

    monkeypatch.setattr(train_unet, "evaluate", evaluate)
    config = compose_config(*tiny_overrides(root), "train.steps=4", "train.eval_every=1", "train.test_at_end=false")
    train_in(tmp_path / "run", config)
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["metrics"]["step"] == 2


def test_batch_of_one_value_per_channel_names_the_settings(root, tmp_path, monkeypatch, capfd, quick):
    """It ended in batch norm's own words: Expected more than 1 value per channel when training, got input size ..."""
    arguments = [*tiny_overrides(root), "data.image_size=4", "train.batch_size=1", "train.steps=1"]
    message = fails_with(monkeypatch, capfd, tmp_path / "run", *arguments)
    assert "train.batch_size is 1 and data.image_size 4" in message and "must be " in message and len(message) < 300
    assert not (tmp_path / "run" / "run.json").exists()
    assert run_main(monkeypatch, capfd, tmp_path / "two", *arguments, "train.batch_size=2")[0] == 0


NO_NUMBERS = ["loss.class_weights=[]", "data.scale=[0.5,.inf]", "data.scale=[.nan,1]", "data.elastic_px=.inf",
    "data.elastic_px=.nan", "data.rotation=.nan", "data.color_jitter=.nan", "loss.terms.dice=.inf",
    "loss.terms.dice=.nan",
    "loss.tversky_alpha=-0.1", "loss.tversky_alpha=1.1", "loss.tversky_alpha=.nan", "loss.focal_gamma=-1",
    "loss.focal_gamma=.inf", "loss.focal_gamma=.nan", "loss.class_weights=[1,.nan,1]", "loss.class_weights=[1,.inf,1]",
    "loss.class_weights=[0,0,0]", "loss.class_weights=[1,-1,1]", "loss.border_weight=.inf", "loss.border_sigma=.inf",
    "loss.border_sigma=.nan", "optim.lr=.inf", "optim.lr=.nan", "optim.lr=-1", "optim.betas=[0.9,1.0]",
    "optim.betas=[.nan,0.9]", "optim.betas=[-0.1,0.9]", "optim.momentum=1.0", "optim.momentum=-0.1",
    "optim.momentum=.nan", "optim.weight_decay=-1", "optim.weight_decay=.inf", "optim.weight_decay=.nan",
    "optim.warmup_steps=-1", "optim.min_lr_factor=-0.1", "optim.min_lr_factor=1.5", "optim.min_lr_factor=.nan",
    "optim.poly_power=-1", "optim.poly_power=.inf", "optim.poly_power=0", "train.picture_images=-1",
    "train.clip_norm=.nan", "train.clip_norm=-1", "data.val_fraction=.nan", "data.val_fraction=-0.1",
    "tiles.size=0", "tiles.size=[300,-1]", "data.image_size=[32,0]"]  # fmt: skip


@pytest.mark.parametrize("override", NO_NUMBERS)
def test_number_that_makes_no_sense_is_named(override, root, tmp_path):
    """Most passed, or ended as "loss is nan at step 0, pictures ..."."""
    key = override.split("=")[0]
    config = changed_config(compose_config(*tiny_overrides(root), "train.steps=1"), override)
    if key == "data.val_fraction":
        config["data"]["val_list"] = None
    with pytest.raises(ValueError) as error:
        train_in(tmp_path / "run", config)
    message = str(error.value)
    assert message.startswith(f"{key} is ") and "; must be " in message, message


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory as Linux tells it")
def test_memory_of_evaluation_follows_the_logits(tmp_path):
    """12 MP of 21 classes took 7 GB, 6 times its logits: probabilities in double precision, and copies of the loss."""
    code = """
from pathlib import Path
import numpy as np, torch
import train_unet
from utils.segmentation.prediction import Predictor
from utils.segmentation.views import Framing
from options import read_option
torch.set_num_threads(1)
loss = train_unet.LossSettings(**read_option("unet", "loss", "cross_entropy_dice"))
class_map = np.random.default_rng(0).integers(0, 21, (1500, 2000), dtype=np.uint8)
train_unet.read_item = lambda item: (np.zeros((*class_map.shape, 3), np.uint8), class_map)
class Coding: class_names, boundary = tuple(map(str, range(21))), None
class Item: coding, name = Coding, "a"
predictor = Predictor(torch.nn.Conv2d(3, 21, 1), Framing(64, "resize"), 0, (64, 64), 0, torch.device("cpu"), "fp32")
def peak_bytes():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])
before = peak_bytes()
train_unet.evaluate(predictor, [Item], "val", loss, None, 0)
print((peak_bytes() - before) / (4 * 21 * class_map.size))
"""
    done = run_python("-c", code, cwd=tmp_path, environment=child_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert 1 < float(done.stdout.split()[-1]) < 4.5
