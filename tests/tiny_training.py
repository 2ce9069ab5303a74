"""A tiny dataset, configs, and runs of train_sam2.py, for its tests."""

import functools
import itertools
import warnings
from pathlib import Path

import cv2
import numpy as np
import tiny
import torch
from PIL import Image
from tiny import ROOT as ROOT
from tiny import differences as differences
from tiny import read_last as read_last
from tiny import without_timing as without_timing

import train_sam2
from utils.images import Picture, write_image, write_label_map
from utils.instances import label_folder
from utils.instances.codecs import mask_to_rle
from utils.instances.readers import Item, object_ids, split_items
from utils.sam2 import model as models
from utils.settings import read_settings

COLORS = np.array([(230, 60, 60), (60, 220, 60), (70, 90, 240), (120, 120, 120)], np.uint8)  # of ids 1, 2, 3, 4


def draw_picture(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw three flat objects, a rectangle or an ellipse in each third, on dark noise: image_rgb, ids 1 to 3."""
    image_rgb = rng.integers(0, 50, (height, width, 3)).astype(np.uint8)
    ids = np.zeros((height, width), np.int32)
    for number in range(3):
        left, third = number * width // 3, width // 3
        box_wh = rng.integers(7, third), rng.integers(7, height - 2)
        x, y = left + rng.integers(0, third - box_wh[0] + 1), rng.integers(0, height - box_wh[1] + 1)
        mask = np.zeros((height, width), np.uint8)
        if rng.random() < 0.5:
            mask[y : y + box_wh[1], x : x + box_wh[0]] = 1
        else:
            center = int(x + box_wh[0] // 2), int(y + box_wh[1] // 2)
            cv2.ellipse(mask, center, (int(box_wh[0] // 2), int(box_wh[1] // 2)), 0, 0, 360, 1, -1)
        ids[mask > 0] = number + 1
    image_rgb[ids > 0] = COLORS[ids[ids > 0] - 1]
    return image_rgb, ids


def write_dataset(root: Path) -> Path:
    """Write five training pictures and copies of four of them for validation, as data=label_map reads them.

    The first has no objects, the fourth is a .jpeg with an EXIF rotation, the fifth has no background (ids 1 to 4).
    """
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number, (height, width) in enumerate([(48, 64), (48, 64), (64, 48), (48, 66), (56, 56)]):
        image_rgb, ids = draw_picture(rng, height, width)
        if number == 0:
            ids[:] = 0
        if number == 4:
            ids[ids == 0] = 4
            image_rgb[ids == 4] = COLORS[3]
        for name in [f"{number:03d}"] + [f"{100 + number}"] * (number > 0):
            write_label_map(root / "labels" / f"{name}.png", ids)
            if number == 3:
                exif = Image.Exif()
                exif[0x0112] = 6  # shown turned clockwise
                turned = Image.fromarray(np.ascontiguousarray(np.rot90(image_rgb)))
                turned.save(root / "images" / f"{name}.jpeg", exif=exif.tobytes(), quality=95)
            else:
                write_image(root / "images" / f"{name}.png", image_rgb)
    (root / "val.txt").write_text("101\n102\n103\n104\n")
    return root


def write_data_root(data_root: Path) -> Path:
    """Write four pictures as data=labpics, dsb2018, label_map and labels read them, each in a folder of its own."""
    rng = np.random.default_rng(1)
    for number in range(4):
        image_rgb, ids = draw_picture(rng, 48, 64)
        labpics = data_root / "LabPicsV1" / "Simple" / ("Test" if number == 3 else "Train")
        nuclei = data_root / "DSB2018" / "stage1_train" / f"{number}"
        label_map = data_root / "label_map"
        folders = [labpics / "Image", labpics / "Instance", nuclei / "images", nuclei / "masks"]
        for folder in [*folders, label_map / "images", label_map / "labels"]:
            folder.mkdir(parents=True, exist_ok=True)
        write_image(labpics / "Image" / f"{number}.jpg", image_rgb)
        vessels, materials = np.where(ids == 1, 1, 0), np.where(ids > 1, ids, 0)
        write_image(labpics / "Instance" / f"{number}.png", np.stack([vessels, 0 * ids, materials], 2).astype(np.uint8))
        write_image(nuclei / "images" / f"{number}.png", image_rgb)
        for object_id in (1, 2, 3):
            mask = np.repeat(255 * (ids == object_id)[..., None], 3, 2)
            write_image(nuclei / "masks" / f"{object_id}.png", mask.astype(np.uint8))
        write_image(label_map / "images" / f"{number}.png", image_rgb)
        write_label_map(label_map / "labels" / f"{number}.png", ids)
        annotations = [
            {"segmentation": mask_to_rle(ids == object_id), "origin": "automatic"} for object_id in (1, 2, 3)
        ]
        with label_folder.open_folder(data_root / "engine"):
            picture = Picture(label_map / "images" / f"{number}.png", None, f"{number}")
            label_folder.write_labels(data_root / "engine", picture, ids.shape, {"annotations": annotations})
    (data_root / "engine" / "val.txt").write_text("3\n")
    return data_root


def tiny_overrides(root: Path) -> list[str]:
    """The command-line settings that make a run tiny."""
    return [
        "device=cpu",
        "num_workers=0",
        "model=sam2_nano",
        "model.checkpoint=none",
        "model.image_size=64",
        "data=label_map",
        f"data.root={root}",
        f"data.val_list={root / 'val.txt'}",
        "train.batch_size=2",
        "train.objects_per_image=3",
        "train.log_every=1",
        "train.eval_clicks=[1]",
        "train.picture_images=1",
        "optim.warmup_steps=0",
    ]


compose_config = functools.partial(tiny.compose_config, "train_sam2")
train_in = functools.partial(tiny.train_in, train_sam2)
run_main = functools.partial(tiny.run_main, train_sam2)
leave_out_pictures = functools.partial(tiny.make_runs_quick, train_sam2)


def make_runs_quick(monkeypatch) -> None:
    """Leave out pictures, and take a narrow encoder, which no weights of checkpoints/ fit: a quarter of a tiny run."""
    leave_out_pictures(monkeypatch)
    monkeypatch.setattr(models, "ConvTrunk", functools.partial(models.ConvTrunk, channels=(16, 16, 32, 32)))


def configure(root: Path, *overrides: str) -> dict:
    """Compose the config of a tiny run."""
    return compose_config(*tiny_overrides(root), *overrides)


def answer_to_prompts(model: torch.nn.Module) -> torch.nn.Module:
    """Let a model of random weights answer to its prompts, whose influence these drown otherwise."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ("transformer" in name and weight.dim() > 1) or "point_embeddings" in name:
                weight.mul_(4)
    return model


def make_predictor(model: torch.nn.Module):
    """sam2's own predictor with a model that `build_sam2` made, which has imported sam2."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    with warnings.catch_warnings():  # torch.jit.script is deprecated
        warnings.simplefilter("ignore")
        predictor = SAM2ImagePredictor(model)
    predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]  # it has those of 1024 px
    return predictor


def script_evaluation(monkeypatch, values: list[float] | None = None) -> None:
    """Let evaluate return these values, one after the other (None: always 0.5), without looking at the model."""
    values = itertools.repeat(0.5) if values is None else iter(values)

    def evaluate(model, items, **rest):
        names = ("val/iou_1_click", "val/oracle_iou_1_click", "val/iou_box")
        return dict.fromkeys(names, next(values)) | {"val/num_images": len(items), "val/num_objects": 1}

    monkeypatch.setattr(train_sam2, "evaluate", evaluate)


def list_training_items(config: dict) -> list[Item]:
    """The training pictures that have objects."""
    keys = {key: value for key, value in config["data"].items() if key not in ("min_area_px", "hflip", "color_jitter")}
    return [item for item in split_items(**keys)[0] if object_ids(item.read().layers)]


def make_dataset(config: dict, items: list[Item] | None = None) -> train_sam2.PromptedMasks:
    """The training set of a config, as train makes it."""
    return train_sam2.PromptedMasks(
        list_training_items(config) if items is None else items,
        config["seed"],
        config["model"]["image_size"],
        config["train"]["objects_per_image"],
        read_settings(train_sam2.DataSettings, config["data"], "data"),
        train_sam2.PromptSettings(**config["prompts"]),
    )
