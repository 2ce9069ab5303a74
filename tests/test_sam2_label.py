"""mode=label and mode=audit: what rounds leave alone, what trains, pairs of masks, bad input."""

import csv
import json

import cv2
import numpy as np
import pytest
import tifffile
import tiny
import tiny_training
import torch
from options import read_option
from pycocotools import mask as coco_mask

import infer_sam2
from infer_sam2 import infer
from utils.checkpoint import save_checkpoint
from utils.images import write_image
from utils.instances import label_folder
from utils.instances.codecs import mask_to_rle
from utils.instances.readers import split_items
from utils.sam2 import label
from utils.sam2.label import LabelSettings, audit_labels, label_pictures
from utils.sam2.mask_generation import GeneratedMasks
from utils.sam2.model import build_sam2

NANO = read_option("sam2", "model", "sam2_nano") | {"checkpoint": "none", "image_size": 64}
NAMES = ["a", "b", "c d", "é", "x1"]


def annotate(mask, score=0.9, **more):
    box = [float(v) for v in coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask.view(np.uint8))))]
    record = {"segmentation": mask_to_rle(mask), "area": int(mask.sum()), "bbox": box, "predicted_iou": score}
    return record | {"stability_score": 0.9} | more


def square(x, y, side, hw=(40, 50)):
    mask = np.zeros(hw, bool)
    mask[y : y + side, x : x + side] = True
    return mask


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in NAMES:
        write_image(tmp_path / "photos" / f"{name}.png", np.zeros((40, 50, 3), np.uint8))
    return tmp_path / "photos"


def label_round(photos, labels, masks, made_by="one", val_fraction=0.2):
    asked = []

    def generate(image_rgb):
        asked.append(image_rgb.shape)
        return GeneratedMasks(masks, 1, 0.0, 0.0)

    pictures = infer_sam2.images.list_pictures(photos)
    with label_folder.open_folder(labels):
        counts, failures = label_pictures(generate, pictures, labels, made_by, 0.15, LabelSettings(val_fraction), 0)
    assert not failures
    return counts, len(asked)


def read_masks(labels, name):
    record = json.loads((labels / "masks" / f"{name}.json").read_text())
    return record, cv2.imread(str(labels / "maps" / f"{name}.png"), cv2.IMREAD_UNCHANGED)


def test_rounds_leave_people_and_validation_alone(photos, tmp_path):
    labels = tmp_path / "engine"
    masks = [annotate(square(5, 5, 10), 0.9), annotate(square(8, 8, 20), 0.7), annotate(square(5, 6, 10), 0.5)]
    counts, num_asked = label_round(photos, labels, masks)
    (validating,) = (labels / "val.txt").read_text().splitlines()
    assert (
        counts == {"labelled": 4, "done_before": 0, "finished": 0, "validating": 1, "masks": 8, "kept": 0}
        and num_asked == 4
    )
    assert not (labels / "masks" / f"{validating}.json").exists()
    name, other = [each for each in NAMES if each != validating][:2]
    record, label_map = read_masks(labels, name)
    assert [each["predicted_iou"] for each in record["annotations"]] == [0.7, 0.9]  # the best lies on top
    assert {each["origin"] for each in record["annotations"]} == {"automatic"}
    expected = np.zeros((40, 50), int)
    expected[square(8, 8, 20)], expected[square(5, 5, 10)] = 1, 2
    assert np.array_equal(label_map, expected) and label_map.dtype == np.uint16

    assert label_round(photos, labels, masks)[1] == 0  # all are done
    (labels / "masks" / f"{other}.json").unlink()  # as after a kill before the record
    assert label_round(photos, labels, masks)[1] == 1
    for hw in ((50, 40, 3), (40, 50, 3)):  # exported anew, at another size, and back
        write_image(photos / f"{other}.png", np.zeros(hw, np.uint8))
        assert label_round(photos, labels, [])[1] == 1

    by_hand = [annotate(square(6, 6, 9), 0.1, origin="person"), annotate(square(30, 20, 8), 0.1, origin="assisted")]
    record["annotations"] = [*record["annotations"], *by_hand]
    (labels / "masks" / f"{name}.json").write_text(json.dumps(record))
    write_image(photos / "new.png", np.zeros((40, 50, 3), np.uint8))  # pictures that come later train
    counts, num_asked = label_round(photos, labels, masks, "two")
    assert num_asked == 5 and counts["kept"] == 2 and counts["validating"] == 1
    record, label_map = read_masks(labels, name)
    origins = [each["origin"] for each in record["annotations"]]
    assert origins == ["automatic", "person", "assisted"]  # the other automatic mask overlaps the person's
    assert [each["segmentation"] for each in record["annotations"][1:]] == [each["segmentation"] for each in by_hand]
    assert np.array_equal(label_map == 2, square(6, 6, 9)) and np.array_equal(label_map == 3, square(30, 20, 8))


def test_names_with_blanks_and_marks_validate_and_are_finished(photos, tmp_path):
    odd = ["#1", " b", "c ", "d\u2028e"]
    for name, new in zip(NAMES, odd, strict=False):
        (photos / f"{name}.png").rename(photos / f"{new}.png")
    labels = tmp_path / "engine"
    assert label_round(photos, labels, [], val_fraction=1)[0]["validating"] == len(NAMES)
    label_folder.write_done(labels, set(odd))
    assert label_folder.read_done(labels) == set(odd)
    (labels / "masks" / "#1.json").write_text(json.dumps(make_record([]) | {"made_by": "a person"}))
    assert [item.name for item in split_items("labels", str(photos), "skip", 0, 0, labels=str(labels))[1]] == ["#1"]


def test_a_picture_whose_name_has_changed_keeps_its_masks(photos, tmp_path):
    labels = tmp_path / "engine"
    label_round(photos, labels, [annotate(square(5, 5, 10))])
    write_image(photos / "a.jpg", np.zeros((40, 50, 3), np.uint8))  # so that both have their suffix
    for _ in range(2):  # of a picture that trains, then of all that validate
        with pytest.raises(ValueError, match=r"a\.(png is a_png|jpg is a_jpg) now and was a in "):
            label_round(photos, labels, [annotate(square(5, 5, 10))])
        for path in (labels / "masks").glob("*.json"):
            path.unlink()
        (labels / "val.txt").write_text("".join(f"{name}\n" for name in NAMES))


def test_the_command_that_is_printed_after_labelling_can_run(checkpoint, photos, tmp_path, caplog):
    arguments = ["mode=label", f"checkpoint={checkpoint}", "automatic.points_per_side=1", f"labels={tmp_path}/engine"]
    with caplog.at_level("INFO"):
        run(tmp_path / "one", *arguments, f"input={photos}")
        assert "infer_sam2.py mode=annotate" in caplog.text and "train_sam2.py" not in caplog.text
        (name,) = (tmp_path / "engine" / "val.txt").read_text().splitlines()
        (tmp_path / "engine" / "masks" / f"{name}.json").write_text("{}")
        run(tmp_path / "two", *arguments, f"input={photos / NAMES[0]}.png")
    assert f"train_sam2.py experiment=data_engine data.root={photos} data.labels=" in caplog.text


def test_a_file_that_is_no_record_is_not_overwritten(photos, tmp_path):
    labels = tmp_path / "engine"
    (labels / "masks").mkdir(parents=True)
    head = '{"image": {"height": 40, "width": 50}, "annotations": '
    polygon, other_size = (
        '[{"segmentation": [[1, 2, 3, 4, 5, 6]]}]}',
        '[{"segmentation": {"size": [4, 5], "counts": ""}}]}',
    )
    broken = '[{"segmentation": {"size": [40, 50], "counts": "?!"}}]}'
    endless = '[{"segmentation": {"size": [40, 50], "counts": [Infinity]}}]}'
    sizeless = '{"image": {"height": null, "width": null}, "annotations": []}'
    broken_lists = [head + polygon, head + other_size, head + broken, head + endless, head + "7}", sizeless]
    for text in ("[1, 2]", "{}", "my notes", *broken_lists, head + '[], "rejected": null}'):
        for name in NAMES:
            (labels / "masks" / f"{name}.json").write_text(text)
        with pytest.raises(ValueError, match="json"):
            label_round(photos, labels, [])
        assert {(labels / "masks" / f"{name}.json").read_text() for name in NAMES} == {text}


def test_people_s_masks_of_another_size_and_pages_are_failures(photos, tmp_path):
    labels = tmp_path / "engine"
    label_round(photos, labels, [annotate(square(5, 5, 10))], val_fraction=0)
    path = labels / "masks" / "a.json"
    record = json.loads(path.read_text())
    record["annotations"][0]["origin"] = "person"
    path.write_text(json.dumps(record))
    write_image(photos / "a.png", np.zeros((50, 40, 3), np.uint8))  # turned since
    tifffile.imwrite(photos / "stack.tif", np.zeros((2, 40, 50), np.uint8))
    pictures, before = infer_sam2.images.list_pictures(photos), path.read_text()
    arguments = (pictures, labels, "two", 0.15, LabelSettings(0.0), 0)
    _, failures = label_pictures(lambda image_rgb: GeneratedMasks([], 1, 0.0, 0.0), *arguments)
    assert len(failures) == 3 and path.read_text() == before
    assert (
        sum("people's masks are of [40, 50] px (height, width), it is [50, 40] now" in line for line in failures) == 1
    )
    assert sum("a dataset has no pages" in line for line in failures) == 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("label") / "best.pt"
    torch.manual_seed(0)
    model = tiny_training.answer_to_prompts(build_sam2(**NANO, device="cpu"))
    save_checkpoint(path, {"model": model.state_dict(), "config": {"model": NANO}, "format": 1})
    return path


def run(run_dir, *arguments):
    run_dir.mkdir()
    return infer(tiny.compose_config("infer_sam2", "device=cpu", *arguments), run_dir)


def test_a_labelled_folder_is_a_dataset(checkpoint, photos, tmp_path):
    rng = np.random.default_rng(0)
    for name in NAMES:
        write_image(photos / f"{name}.png", tiny_training.draw_picture(rng, 40, 50)[0])
    (photos / "torn.png").write_bytes(b"\x89PNG\r\n")
    grid = ["points_per_side=3", "pred_iou_thresh=0", "stability_score_thresh=0", "crop_n_layers=0"]
    arguments = [f"checkpoint={checkpoint}", "mode=label", f"input={photos}", f"labels={tmp_path / 'engine'}"]
    arguments += [*(f"automatic.{key}" for key in grid), "label.val_fraction=0"]
    failures = run(tmp_path / "run", *arguments)
    assert len(failures) == 1 and "torn.png" in failures[0]
    metrics = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["last"]
    assert metrics["labelled"] == 5 and metrics["masks"] >= 5
    assert run(tmp_path / "again", *arguments) == failures
    assert json.loads((tmp_path / "again" / "run.json").read_text())["metrics"]["last"]["done_before"] == 5
    run(tmp_path / "other", *arguments, "automatic.points_per_side=2")
    assert json.loads((tmp_path / "other" / "run.json").read_text())["metrics"]["last"]["labelled"] == 5

    shared = {"root": str(photos), "on_bad": "skip", "val_fraction": 0.4, "split_seed": 0}
    for keys in ({"format": "sa1b", "annotation_dir": f"{tmp_path}/engine/masks"}, {"format": "label_map"}):
        if keys["format"] == "label_map":
            keys |= {"image_dir": ".", "label_dir": f"{tmp_path}/engine/maps"}
        items = [item for split in split_items(**shared, **keys) for item in split if item.name != "torn"]
        assert [item.name for item in sorted(items, key=lambda item: item.name)] == sorted(NAMES)
        assert all(item.read().layers.any() for item in items)


def test_audit_pairs_masks_by_what_they_share(tmp_path):
    before = [square(0, 0, 10), square(20, 0, 10), square(0, 20, 10), square(20, 20, 10)]
    after = [square(20, 1, 10), square(0, 0, 10), square(0, 24, 10), square(35, 30, 9)]
    for name, masks in (("before/masks", before), ("after", after)):
        (tmp_path / name).mkdir(parents=True)
        annotations = [annotate(mask) | {"id": number} for number, mask in enumerate(masks, 1)]
        record = {"image": {"height": 40, "width": 50, "file_name": "a.png"}, "annotations": annotations}
        (tmp_path / name / "a.json").write_text(json.dumps(record))
    (tmp_path / "after" / "run.json").write_text("{}")
    run(tmp_path / "run", "mode=audit", f"results=[{tmp_path / 'before'},{tmp_path / 'after'}]")
    found = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["last"]
    ious = [1, 90 / 110, 60 / 140]
    assert found["pairs"] == 3 and found["removed"] == found["added"] == 1 and found["pictures"] == 1
    assert found["mean_iou"] == pytest.approx(np.mean(ious))
    assert found["above_90"] == pytest.approx(1 / 3) and found["above_75"] == pytest.approx(2 / 3)
    with (tmp_path / "run" / "audit.csv").open(newline="") as file:
        rows = {(row["before"], row["after"]): row["iou"] for row in csv.DictReader(file)}
    assert rows.keys() == {("1", "2"), ("2", "1"), ("3", "3"), ("4", ""), ("", "4")}
    assert float(rows["2", "1"]) == pytest.approx(90 / 110, abs=1e-6) and rows["4", ""] == ""


def test_pairs_are_the_best_of_all_pairings():
    """Against all orders of few masks."""
    import itertools

    rng = np.random.default_rng(0)
    for _ in range(20):
        parts = [
            [square(*rng.integers(0, 25, 2), rng.integers(5, 15)) for _ in range(n)] for n in rng.integers(1, 5, 2)
        ]
        ious = np.array([[(a & b).sum() / (a | b).sum() for b in parts[1]] for a in parts[0]])
        few, many = sorted(ious.shape)
        table = ious if ious.shape[0] == few else ious.T
        best = max(sum(table[i, order[i]] for i in range(few)) for order in itertools.permutations(range(many), few))
        found = label.pair_masks(*(make_record(masks) for masks in parts))
        assert sum(iou for *_, iou in found if iou is not None) == pytest.approx(best)
        assert len(found) == sum(ious.shape) - sum(iou is not None for *_, iou in found)


def test_masks_are_paired_where_their_boxes_meet_alone():
    side, width = 20_000, 100  # 0.4 GB a mask, were it whole

    def make_bands(starts):
        runs = [{"size": [side, side], "counts": [x * side, width * side, (side - x - width) * side]} for x in starts]
        return {"annotations": [{"segmentation": each} for each in runs]}

    found = label.pair_masks(make_bands([0, 5000, 9000]), make_bands([5050, 0, 15000]))
    assert found == [(1, 2, 1.0), (2, 1, 50 / 150), (3, "", None), ("", 3, None)]


def make_record(masks):
    annotations = [annotate(mask) | {"id": number} for number, mask in enumerate(masks, 1)]
    return {"image": {"height": 40, "width": 50}, "annotations": annotations}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mode=label", "input=PHOTOS"], "mode=label needs labels="),
        (["mode=label", "labels=x"], "mode=label needs input="),
        (["mode=label", "input=PHOTOS", "labels=PHOTOS/a.png"], "labels is photos/a.png, a file; give a folder"),
        (["mode=label", "input=PHOTOS", "labels=x", "label.val_fraction=2"], "label.val_fraction is 2"),
        (["input=PHOTOS", "labels=x"], "labels= is given but mode is automatic"),
        (["mode=label", "input=PHOTOS", "labels=x", "write=[coco]"], "write= is given but mode is label"),
        (["mode=audit", "results=[PHOTOS]"], "mode=audit needs"),
        (["mode=audit", "results=[PHOTOS,PHOTOS]"], "have no json file of the same name"),
        (["mode=audit", "results=[PHOTOS,nowhere]"], "nowhere is no folder of labels"),
    ],
)
def test_bad_input_is_one_line(photos, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("PHOTOS", "photos") for argument in arguments]
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("[", r"\[")):
        run(tmp_path / "run", *arguments)


def test_records_of_two_sizes_are_no_pair(tmp_path):
    for name, hw in (("a", (40, 50)), ("b", (50, 40))):
        (tmp_path / name).mkdir()
        record = {"image": {"height": hw[0], "width": hw[1]}, "annotations": []}
        (tmp_path / name / "p.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="p.json"):
        audit_labels(tmp_path / "a", tmp_path / "b", tmp_path / "audit.csv")


def test_a_single_picture_is_labelled_and_validation_drawn_when_there_are_more(photos, tmp_path):
    for name in NAMES[1:]:
        (photos / f"{name}.png").rename(tmp_path / f"{name}.png")
    counts, _ = label_round(photos, tmp_path / "engine", [annotate(square(5, 5, 10))])
    assert counts["labelled"] == 1 and counts["validating"] == 0 and not (tmp_path / "engine" / "val.txt").exists()
    with pytest.raises(FileNotFoundError, match="val.txt, the pictures that validate, is not there"):
        split_items("labels", str(photos), "skip", 0, 0, labels=str(tmp_path / "engine"))
    for name in NAMES[1:]:
        (tmp_path / f"{name}.png").rename(photos / f"{name}.png")
    label_round(photos, tmp_path / "engine", [annotate(square(5, 5, 10))])
    assert len((tmp_path / "engine" / "val.txt").read_text().splitlines()) == 1
