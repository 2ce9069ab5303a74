"""Rounds of the data engine: data=labels, what a training adds to its folder, and who validates."""

import csv
import json

import numpy as np
import pytest
import tiny_training as tiny
import torch

import train_sam2
from utils.checkpoint import load_checkpoint
from utils.images import Picture, write_image
from utils.instances import label_folder
from utils.instances.codecs import mask_to_rle
from utils.instances.readers import split_items
from utils.sam2 import rounds

KEYS = {"format": "labels", "on_bad": "skip", "val_fraction": 0, "split_seed": 0}


def annotate(mask, **more):
    return {"segmentation": mask_to_rle(mask), "origin": "automatic", "predicted_iou": 0.9} | more


@pytest.fixture
def engine(tmp_path):
    """Six pictures with true masks in a folder of labels; e validates and waits, f has no record."""
    rng, photos, labels_dir = np.random.default_rng(0), tmp_path / "photos", tmp_path / "engine"
    photos.mkdir()
    with label_folder.open_folder(labels_dir):
        (labels_dir / "val.txt").write_text("é\ne\n")
        for name in ("a", "b", "c", "é", "e", "f"):
            image_rgb, ids = tiny.draw_picture(rng, 48, 64)
            write_image(photos / f"{name}.png", image_rgb)
            masks = [ids == number for number in (1, 2, 3)]
            if name in ("a", "b"):
                annotations = [annotate(mask) for mask in masks]
            elif name == "c":
                made = {"origin": "assisted", "round": 1, "clicks": 2, "strokes": 0, "seconds": 3.0}
                drawn = {"origin": "person", "round": 1, "clicks": 8, "strokes": 3, "seconds": 20.0}
                annotations = [annotate(masks[0], checked=True), annotate(masks[1]) | made, annotate(masks[2]) | drawn]
            elif name == "é":
                made = {"origin": "assisted", "round": 1, "clicks": 1, "strokes": 0, "seconds": 1.0}
                annotations = [annotate(mask) | made for mask in masks]
            else:
                continue
            picture = Picture(photos / f"{name}.png", None, name)
            label_folder.write_labels(labels_dir, picture, (48, 64), {"annotations": annotations})
    return photos, labels_dir


def test_who_trains_and_who_validates(engine, tmp_path):
    photos, labels_dir = engine
    train_items, val_items = split_items(root=str(photos), labels=str(labels_dir), **KEYS)
    assert [item.name for item in train_items] == ["a", "b", "c"] and [item.name for item in val_items] == ["é"]
    assert val_items[0].image_path == photos / "é.png" and len(np.unique(val_items[0].read().layers)) == 4
    (labels_dir / "masks" / "é.json").unlink()
    with pytest.raises(ValueError, match="names 2 pictures that validate, and none of them is labelled"):
        split_items(root=str(photos), labels=str(labels_dir), **KEYS)
    with pytest.raises(FileNotFoundError, match="data.labels is .*, no folder of labels"):
        split_items(root=str(photos), labels=str(tmp_path / "none"), **KEYS)


def test_a_training_is_a_round(engine, tmp_path, monkeypatch):
    """Two real trainings, the second from the first one's weights; numbers by hand."""
    tiny.make_runs_quick(monkeypatch)
    photos, labels_dir = engine
    overrides = [
        "experiment=data_engine", f"data.root={photos}", f"data.labels={labels_dir}", "model.image_size=64",
        "model.checkpoint=none", "train.steps=1", "cache=off", "device=cpu", "num_workers=0", "train.eval_clicks=[1]",
        "train.picture_images=0",
    ]  # fmt: skip
    metrics = []
    for number, more in enumerate([[], [f"model.checkpoint={labels_dir / 'best.pt'}"]], 1):
        assert rounds.count_rounds(labels_dir) == number - 1
        run_dir = tmp_path / f"run{number}"
        run_dir.mkdir()
        train_sam2.train(tiny.compose_config(*overrides, *more), run_dir, None)
        metrics.append(json.loads((run_dir / "run.json").read_text())["metrics"])
        best, own = (load_checkpoint(folder / "best.pt") for folder in (labels_dir, run_dir))
        assert all(torch.equal(best["model"][name], own["model"][name]) for name in own["model"])
    with (labels_dir / "rounds.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    counts = {"pictures": "3", "person": "1", "assisted": "1", "automatic": "7", "checked": "1", "val_pictures": "1"}
    assert counts.items() <= first.items() and counts.items() <= second.items()
    assert (first["made"], second["made"]) == ("5", "0")
    assert float(first["clicks_per_mask"]) == pytest.approx((2 + 11 + 3) / 5)
    assert float(first["seconds_per_mask"]) == pytest.approx((3 + 20 + 3) / 5)
    assert second["clicks_per_mask"] == second["seconds_per_mask"] == ""
    for row, measured in zip((first, second), metrics, strict=True):
        assert float(row["iou_before"]) == pytest.approx(measured["start"]["val/iou_1_click"], abs=1e-6)
        assert float(row["iou_after"]) == pytest.approx(measured["best"]["val/iou_1_click"], abs=1e-6)
    assert first["iou_after"] == second["iou_before"] and second["checkpoint"] == str(labels_dir / "best.pt")
    assert (labels_dir / "rounds.png").read_bytes().startswith(b"\x89PNG")

    (tmp_path / "evaluated").mkdir()
    train_sam2.train(tiny.compose_config(*overrides, "train.steps=0"), tmp_path / "evaluated", None)
    assert rounds.count_rounds(labels_dir) == 2  # nothing was trained
    (tmp_path / "resumed").mkdir()
    config = tiny.compose_config(*overrides)
    train_sam2.train(config, tmp_path / "resumed", tmp_path / "run1" / "last.pt")
    assert rounds.count_rounds(labels_dir) == 2


def test_one_process_writes_at_a_time(tmp_path):
    with label_folder.open_folder(tmp_path / "engine"):
        with pytest.raises(ValueError, match="which another process labels now"):
            with label_folder.open_folder(tmp_path / "engine"):
                pass
    with label_folder.open_folder(tmp_path / "engine"):
        pass


def test_what_other_programs_wrote_ends_no_training(engine, tmp_path):
    """A torn record, numbers that are none, and a column that a person has added to rounds.csv."""
    photos, labels_dir = engine
    (labels_dir / "masks" / "f.json").write_text("torn")
    record = json.loads((labels_dir / "masks" / "c.json").read_text())
    record["annotations"][1] |= {"clicks": "two", "seconds": None, "checked": "no", "origin": ["x"]}
    (labels_dir / "masks" / "c.json").write_text(json.dumps(record))
    (tmp_path / "best.pt").write_bytes(b"weights")
    paths = [labels_dir / "masks" / f"{name}.json" for name in ("a", "c", "f")]
    rounds.add_round(labels_dir, paths, 1, (0.5, 0.6), "auto", tmp_path)
    head, row = (labels_dir / "rounds.csv").read_text().splitlines()
    (labels_dir / "rounds.csv").write_text(f"{head},notes\n{row},first try\n")
    rounds.add_round(labels_dir, paths, 1, (0.6, 0.7), "auto", tmp_path)
    with (labels_dir / "rounds.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["notes"], second["notes"], second["round"]) == ("first try", "", "2")
    assert (first["person"], first["assisted"], first["automatic"], first["checked"]) == ("1", "0", "4", "1")
    assert float(first["clicks_per_mask"]) == pytest.approx((0 + 11 + 3) / 5)
    assert float(first["seconds_per_mask"]) == pytest.approx((20 + 3) / 4)
