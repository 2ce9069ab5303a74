"""A tiny dataset, configs, and runs of train_unet.py, for its tests."""

import functools
import itertools
from pathlib import Path

import cv2
import numpy as np
import tiny
from tiny import ROOT as ROOT

import train_unet
from utils.images import write_image
from utils.segmentation import reports

NAMES = ("background", "disc", "square")
COLORS = np.array([(40, 40, 40), (220, 60, 60), (70, 90, 240)], np.uint8)  # of the classes
SIZES = [(48, 64), (40, 56), (64, 48), (48, 64), (52, 52)]  # height, width


def draw_pair(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a disc and a square, flat but for some noise: image_rgb uint8 (H, W, 3), class_map uint8 (H, W)."""
    class_map = np.zeros((height, width), np.uint8)
    radius, side = int(rng.integers(7, 11)), int(rng.integers(12, 18))
    x, y = int(rng.integers(radius, width // 2)), int(rng.integers(radius, height - radius))
    cv2.circle(class_map, (x, y), radius, 1, -1)
    left, top = int(rng.integers(width // 2, width - side)), int(rng.integers(0, height - side))
    class_map[top : top + side, left : left + side] = 2
    noise = rng.integers(-15, 16, (height, width, 3))
    return np.clip(COLORS[class_map].astype(int) + noise, 0, 255).astype(np.uint8), class_map


def write_dataset(root: Path) -> Path:
    """Write five pictures to train on, three to validate and two to test on, as data=folders reads them."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    names = [f"{number:03d}" for number in range(10)]
    for number, name in enumerate(names):
        image_rgb, class_map = draw_pair(rng, *SIZES[number % len(SIZES)])
        write_image(root / "images" / f"{name}.png", image_rgb)
        write_image(root / "masks" / f"{name}.png", class_map)
    (root / "val.txt").write_text("\n".join(names[5:8]))
    (root / "test.txt").write_text("\n".join(names[8:]))
    return root


def write_data_root(data_root: Path) -> Path:
    """Write a few pictures as data=oxford_pet, isbi and camvid read them, each in a folder of its own."""
    rng = np.random.default_rng(1)
    pets, isbi, camvid = data_root / "oxford-iiit-pet", data_root / "ISBI2012" / "membrane", data_root / "CamVid"
    for folder in (pets / "images", pets / "annotations/trimaps", isbi / "train/image", isbi / "train/label"):
        folder.mkdir(parents=True)
    lists = {"trainval": [], "test": []}
    for number in range(6):
        image_rgb, class_map = draw_pair(rng, 48, 64)
        name = f"Drawn_{number}"
        write_image(pets / "images" / f"{name}.jpg", image_rgb)
        write_image(pets / "annotations" / "trimaps" / f"{name}.png", class_map + 1)
        lists["test" if number == 5 else "trainval"].append(f"{name} 1 1 1\n")
        write_image(isbi / "train" / "image" / f"{number}.png", image_rgb[..., 0])
        write_image(isbi / "train" / "label" / f"{number}.png", (class_map > 0).astype(np.uint8) * 255)
        split = ("train", "train", "train", "train", "val", "test")[number]
        for folder in (split, f"{split}annot"):
            (camvid / folder).mkdir(parents=True, exist_ok=True)
        write_image(camvid / split / f"{number}.png", image_rgb)
        write_image(camvid / f"{split}annot" / f"{number}.png", class_map * 5)
        with (camvid / f"{split}.txt").open("a") as file:
            file.write(f"/SegNet/CamVid/{split}/{number}.png /SegNet/CamVid/{split}annot/{number}.png\n")
    for name, lines in lists.items():
        (pets / "annotations" / f"{name}.txt").write_text("".join(lines))
    return data_root


def tiny_overrides(root: Path) -> list[str]:
    """The command-line settings that make a run tiny."""
    return [
        "device=cpu",
        "num_workers=0",
        "model=unet",
        "model.base_channels=4",
        "model.depth=2",
        "data=folders",
        f"data.root={root}",
        f"data.val_list={root / 'val.txt'}",
        f"data.test_list={root / 'test.txt'}",
        "data.num_classes=3",
        "data.class_names=[background,disc,square]",
        "data.image_size=[32,40]",
        "train.batch_size=2",
        "train.log_every=1",
        "train.picture_images=1",
        "optim.warmup_steps=0",
    ]


compose_config = functools.partial(tiny.compose_config, "train_unet")
train_in = functools.partial(tiny.train_in, train_unet)
run_main = functools.partial(tiny.run_main, train_unet)
make_runs_quick = functools.partial(tiny.make_runs_quick, train_unet)


def script_evaluation(monkeypatch, values: list[float] | None = None) -> None:
    """Let evaluate return these values, one after the other (None: always 0.5), without looking at the model."""
    values = itertools.repeat(0.5) if values is None else iter(values)

    def evaluate(predictor, items, split, *rest):
        measured = dict.fromkeys((f"{split}/{name}" for name in reports.REPORTED), next(values))
        return measured | {f"{split}/num_images": len(items)}, np.diag([5, 3, 2])

    monkeypatch.setattr(train_unet, "evaluate", evaluate)


def make_dataset(config: dict) -> train_unet.AugmentedPairs:
    """The training set of a config, as train makes it."""
    settings = train_unet.read_settings(train_unet.Config, config)
    items = train_unet.list_splits(settings.data.reader_keys)["train"]
    margin = train_unet.output_margin(config["model"])
    return train_unet.AugmentedPairs(items, config["seed"], settings.data, margin, settings.loss)
