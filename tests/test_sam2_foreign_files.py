"""Pictures, prompts and checkpoints as others have them, through infer_sam2.py and train_sam2.py.

Inputs that nobody had reported, tried for faults of the same kinds: a prompts file with a byte-order mark, with points
that are a number, with a mask that is a number, with coordinates of 400 digits, with accented names in the other
Unicode form; one mask file that is a link to nothing in a folder's prompts; a file name with a comma and quotes in
summary.csv; an animated GIF; a foreign file that has a config of its own; a file of this toolkit without a model name.
"""

import csv
import json
import os
import unicodedata

import cv2
import numpy as np
import pytest
import tifffile
import tiny
import tiny_training
import torch
from PIL import Image
from test_infer_sam2 import (  # noqa: F401  (folder is a fixture)
    BOX,
    MANY_MASKS,
    NANO,
    POINTS,
    folder,
    masks_of,
    run,
    run_command,
)

import infer_sam2
from utils.checkpoint import save_checkpoint
from utils.images import read_image, write_image
from utils.instances.check import check_item
from utils.instances.readers import split_items

BOXES = f"boxes=[{BOX}]".replace(" ", "")


@pytest.fixture(scope="module")
def stack(folder, tmp_path_factory):  # noqa: F811
    """A TIFF of three pages: the picture, it mirrored, and it upside down."""
    path = tmp_path_factory.mktemp("stack") / "cells, day 1.tif"
    image_rgb = read_image(folder / "photo.png")
    tifffile.imwrite(path, np.stack([image_rgb, image_rgb[:, ::-1], image_rgb[::-1]]), photometric="rgb")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# pictures


@pytest.mark.parametrize("mode", ["automatic", "prompts", "region"])
def test_each_page_of_a_stack_has_its_result(folder, stack, tmp_path, mode):  # noqa: F811
    arguments = {
        "automatic": MANY_MASKS,
        "prompts": ["mode=prompts", BOXES],
        "region": ["mode=region", f"region={folder / 'region.png'}", "num_points=2"],
    }[mode]
    records, labels, failures = run(folder, tmp_path / "run", f"input='{stack}'", *arguments)
    names = [f"cells, day 1_000{page}" for page in (1, 2, 3)]
    assert not failures and sorted(records) == sorted(labels) == names
    assert all((tmp_path / "run" / f"{name}_overlay.png").is_file() for name in names)
    with (tmp_path / "run" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names
    assert [int(row["masks"]) for row in rows] == [len(records[name]["annotations"]) for name in names]
    one_page = tmp_path / "page.png"
    write_image(one_page, read_image(stack, 1))
    alone = run(folder, tmp_path / "alone", f"input={one_page}", *arguments)[1]["page"]
    if mode != "region":  # whose points are drawn anew for each picture
        np.testing.assert_array_equal(labels[names[1]], alone)
    assert any((labels[names[1]] != labels[name]).any() for name in (names[0], names[2]))


def test_an_animated_gif_is_its_pages(folder, tmp_path):  # noqa: F811
    frames = [Image.fromarray(np.full((120, 160), 60 * k + np.arange(160) % 50, np.uint8)) for k in (1, 2)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    records, _, _ = run(folder, tmp_path / "run", f"input={tmp_path / 'film.gif'}", "mode=prompts", BOXES)
    assert sorted(records) == ["film_0001", "film_0002"]


def test_dark_pictures_are_remarked_on(folder, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Ten bits in sixteen: almost black to the model, which finds nothing."""
    (tmp_path / "photos").mkdir()
    pixels = read_image(folder / "photo.png").astype(np.uint16)
    cv2.imwrite(str(tmp_path / "photos" / "dark.png"), pixels * 4)
    cv2.imwrite(str(tmp_path / "photos" / "right.png"), pixels * 257)
    arguments = [
        "device=cpu",
        f"checkpoint={folder / 'best.pt'}",
        f"input={tmp_path / 'photos'}",
        "mode=prompts",
        BOXES,
    ]
    status, output = tiny.run_main(infer_sam2, monkeypatch, capfd, tmp_path / "run", *arguments)
    largest = int(pixels.max()) * 4
    assert status == 0
    assert "1 with unused intensity range: dark to the model: stretch the values to the whole range" in output
    assert f"dark.png: largest value {largest} of 65535" in output and "right.png:" not in output


def test_dead_links_and_refused_files_are_named_and_the_others_done(folder, tmp_path, monkeypatch):  # noqa: F811
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "c.png"):
        write_image(photos / name, read_image(folder / "photo.png"))
    (photos / "b.png").symlink_to(tmp_path / "gone")
    (photos / f"{'照' * 80}.png").symlink_to(folder / "photo.png")  # 244 bytes
    real = np.fromfile

    def fromfile(path, *rest):
        if str(path).endswith("c.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest)

    monkeypatch.setattr(np, "fromfile", fromfile)
    records, _, failures = run(folder, tmp_path / "run", f"input={photos}", "mode=prompts", BOXES)
    assert set(records) == {"a"} and len(failures) == 3 and "give the file a name of 239 bytes" in failures[2]
    assert "b.png is a link to" in failures[0] and "Permission denied" in failures[1] and "c.png" in failures[1]
    cache = f"cache={tmp_path / 'cache'}"  # of the others
    assert run(folder, tmp_path / "cached", f"input={photos}", "mode=prompts", BOXES, cache)[2] == failures
    assert len(list((tmp_path / "cache").glob("*/*.emb"))) == 1
    for key in ("region", "mask"):
        (tmp_path / f"{key}.png").symlink_to(tmp_path / "gone")
        mode = "region" if key == "region" else "prompts"
        arguments = [f"input={photos / 'a.png'}", f"mode={mode}", f"{key}={tmp_path / key}.png"]
        with pytest.raises(FileNotFoundError, match=rf"{key}\.png is a link to"):
            run(folder, tmp_path / f"run_{key}", *arguments)


def test_a_name_that_is_not_utf_8_is_segmented(folder, tmp_path):  # noqa: F811
    photos, run_dir = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    write_image(photos / "a.png", np.full((24, 32, 3), 90, np.uint8))  # of one value, which is remarked on
    (photos / "a.png").rename(photos / os.fsdecode(b"caf\xe9.png"))  # from an archive of Windows
    arguments = [f"checkpoint={folder / 'best.pt'}", "input=photos", "mode=prompts", "boxes=[[4,4,20,20]]"]
    done = run_command(*arguments, "write=[coco,yolo]", "hydra.run.dir=run", cwd=tmp_path)
    texts = [(run_dir / name).read_text(encoding="utf-8") for name in ("summary.csv", "infer_sam2.log")]
    assert done.returncode == 0 and "Error" not in done.stderr
    assert all("caf\\udce9.png" in text for text in (done.stdout, *texts))


def test_names_with_commas_and_quotes_come_back_from_the_summary(folder, tmp_path):  # noqa: F811
    name = 'a, "b"; c.png'
    write_image(tmp_path / name, read_image(folder / "photo.png"))
    config = tiny.compose_config("infer_sam2", "device=cpu", "input=x", f"checkpoint={folder / 'best.pt'}")
    config |= {"input": str(tmp_path / name), "mode": "prompts", "boxes": [BOX]}
    (tmp_path / "run").mkdir()
    infer_sam2.infer(config, tmp_path / "run")
    with (tmp_path / "run" / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["name"] == name and row["masks"] == "1" and None not in row


# ---------------------------------------------------------------------------------------------------------------------
# prompts


def write_prompts(tmp_path, prompts, encoding="utf-8"):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(prompts), encoding=encoding)
    return f"prompts_file={path}"


def test_each_mask_names_its_prompt_and_a_prompt_without_one_is_listed(folder, tmp_path, monkeypatch, capfd):  # noqa: F811
    objects = [{"points": POINTS[:1]}, {"box": [5, 6, 70, 80]}, {"box": BOX}]
    real = infer_sam2.mask_generation.annotate_mask
    empty_points = []

    def annotate(low_res_mask, predicted_iou, stability_score, point_coords, *rest):
        low_res_mask = low_res_mask - 1e4 if point_coords in empty_points else low_res_mask
        return real(low_res_mask, predicted_iou, stability_score, point_coords, *rest)

    monkeypatch.setattr(infer_sam2.mask_generation, "annotate_mask", annotate)
    arguments = [f"input={folder / 'photo.png'}", "mode=prompts", "max_overlap=1"]
    alone = []
    for number, prompt in enumerate(objects):
        run_dir = tmp_path / f"run{number}"
        alone += masks_of(run(folder, run_dir, *arguments, write_prompts(tmp_path, [prompt]))[0]["photo"])
    record = run(folder, tmp_path / "all", *arguments, write_prompts(tmp_path, objects))[0]["photo"]
    assert (
        sorted(annotation["prompt"] for annotation in record["annotations"]) == [0, 1, 2]
        and record["prompts_without_mask"] == []
    )
    for annotation, mask in zip(record["annotations"], masks_of(record), strict=True):
        assert (mask != alone[annotation["prompt"]]).mean() < 1e-3
    empty_points.append([POINTS[0][:2]])
    record = run(folder, tmp_path / "two", *arguments, write_prompts(tmp_path, objects))[0]["photo"]
    assert sorted(annotation["prompt"] for annotation in record["annotations"]) == [1, 2] and record[
        "prompts_without_mask"
    ] == [0]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_prompts_meet_names_in_either_form_and_files_with_a_mark(folder, tmp_path, form):  # noqa: F811
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / unicodedata.normalize(form, "café.png"), read_image(folder / "photo.png"))
    prompts = {unicodedata.normalize(other, "café.png"): [{"box": BOX}]}
    prompts_file = write_prompts(tmp_path, prompts, "utf-8-sig")
    records, _, failures = run(folder, tmp_path / "run", f"input={tmp_path / 'photos'}", "mode=prompts", prompts_file)
    assert not failures and len(records) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"points": 5}, "points must be a list of points"),
        ({"mask": 5}, "mask a file"),
        ({"box": [10**400, 1, 2, 3]}, "box is"),
        ({"points": [[10**400, 1, 1]]}, "point"),
        ({"points": [[1, 1, [1]]]}, "point is"),
    ],
)
def test_prompts_of_other_types_are_refused(folder, tmp_path, prompt, message):  # noqa: F811
    arguments = [f"input={folder / 'photo.png'}", "mode=prompts", write_prompts(tmp_path, [prompt])]
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "run", *arguments)


def test_results_come_back_as_a_dataset(folder, tmp_path):  # noqa: F811
    """The run's folder as it is, with pictures of one stem: data=sa1b, as data/README.md promises."""
    photos, run_dir = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for name in ("a.jpg", "a.png", "b.png", "run.png"):
        write_image(photos / name, read_image(folder / "photo.png"))
    run(folder, run_dir, f"input={photos}", "mode=prompts", BOXES)
    config = tiny.compose_config("train_sam2", "data=sa1b", f"data.root={tmp_path}", "data.image_dir=photos")
    keys = {key: value for key, value in config["data"].items() if key not in ("min_area_px", "hflip", "color_jitter")}
    splits = split_items(**keys | {"annotation_dir": "run"})
    items = sorted([*splits[0], *splits[1]], key=lambda item: item.name)
    assert [(item.name, item.image_path.name) for item in items] == [
        ("a_jpg", "a.jpg"), ("a_png", "a.png"), ("b", "b.png"), ("run_png", "run.png"),
    ]  # fmt: skip
    assert all(check_item(item).is_usable for item in items)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def wrap(weights: dict, kind: str) -> dict:
    return {
        "raw": lambda: weights,
        "module": lambda: {"model": {f"module.{name}": values for name, values in weights.items()}},
        "sam2_model": lambda: {f"sam2_model.{name}": values for name, values in weights.items()},
        "state_dict": lambda: {"state_dict": weights, "epoch": 3},
        "config": lambda: {"model": weights, "config": {"lr": 0.1}},
    }[kind]()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_training.write_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.mark.parametrize("kind", ["raw", "module", "sam2_model", "state_dict", "config"])
def test_wrapped_weights_are_loaded_by_both_scripts(folder, root, tmp_path, monkeypatch, kind):  # noqa: F811
    weights = torch.load(folder / "best.pt", weights_only=True)["model"]
    torch.save(wrap(dict(weights), kind), tmp_path / "other.pt")
    arguments = [f"input={folder / 'photo.png'}", "mode=prompts", BOXES]
    expected = run(folder, tmp_path / "own", *arguments)[0]
    assert run(folder, tmp_path / "other", *arguments, f"checkpoint={tmp_path / 'other.pt'}")[0] == expected
    tiny_training.leave_out_pictures(monkeypatch)
    tiny_training.script_evaluation(monkeypatch)
    config = tiny_training.configure(root, f"model.checkpoint={tmp_path / 'other.pt'}", "train.steps=0")
    assert not tiny.differences(tiny_training.train_in(tmp_path / "run", config)["model"], dict(weights))


def spoil(state: dict, kind: str) -> dict:
    """The file of a run with nan in a weight, or as another script's, or without what its model needs."""
    if kind == "nan":
        state["model"]["no_mem_embed"] = torch.full_like(state["model"]["no_mem_embed"], torch.nan)
    elif kind == "unet":
        state |= {"script": "train_unet"}
    else:
        del state["config"]["model"]["name"]
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"bad\.pt has nan or infinity in no_mem_embed: its training diverged"),
        ("unet", r"bad\.pt was not written by train_sam2\.py, but by train_unet\.py"),
    ],
)
def test_spoilt_weights_are_refused_by_both_scripts(folder, root, tmp_path, monkeypatch, capfd, kind, message):  # noqa: F811
    torch.save(spoil(torch.load(folder / "best.pt", weights_only=True), kind), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "run", f"input={folder / 'photo.png'}", f"checkpoint={tmp_path / 'bad.pt'}")
    overrides = [*tiny_training.tiny_overrides(root), f"model.checkpoint={tmp_path / 'bad.pt'}", "train.steps=0"]
    tiny_training.leave_out_pictures(monkeypatch)
    with pytest.raises(ValueError, match=message):
        tiny_training.train_in(tmp_path / "trained", tiny_training.compose_config(*overrides))
    if kind == "nan":
        status, output = tiny_training.run_main(monkeypatch, capfd, tmp_path / "command", *overrides)
        assert status == 1 and "Traceback" not in output


def test_a_config_without_the_models_name_is_one_line(folder, tmp_path):  # noqa: F811
    torch.save(spoil(torch.load(folder / "best.pt", weights_only=True), "name"), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"the config lacks model\.name"):
        run(folder, tmp_path / "run", f"input={folder / 'photo.png'}", f"checkpoint={tmp_path / 'bad.pt'}")


@pytest.mark.parametrize("kind", ["official", "unet", "best", "plain"])
def test_only_a_run_of_this_script_is_resumed(folder, root, tmp_path, monkeypatch, capfd, kind):  # noqa: F811
    state = torch.load(folder / "best.pt", weights_only=True)
    states = {
        "official": ({"model": state["model"]}, "was not written by train_sam2.py: it has no config"),
        "unet": (state | {"script": "train_unet"}, "was not written by train_sam2.py, but by train_unet.py"),
        "best": (
            state | {"script": "train_sam2"},
            "has no optimizer; give the last.pt of a run of train_sam2.py",
        ),
        "plain": ({"a": 1}, "was not written by train_sam2.py"),
    }
    content, message = states[kind]
    save_checkpoint(tmp_path / "last.pt", content)
    overrides = [*tiny_training.tiny_overrides(root), f"resume={tmp_path / 'last.pt'}"]
    status, output = tiny_training.run_main(monkeypatch, capfd, tmp_path / "run", *overrides)
    assert status == 1 and message in output and "Traceback" not in output
    arguments = ["device=cpu", f"input={folder / 'photo.png'}", f"resume={tmp_path / 'last.pt'}"]
    status, output = tiny.run_main(infer_sam2, monkeypatch, capfd, tmp_path / "infer", *arguments)
    assert status == 1 and "no run.json there: give the folder of a run" in output


def test_the_bundled_tracker_is_no_sam2(folder, root, tmp_path, monkeypatch):  # noqa: F811
    """The toolkit's own file of another task, given to both scripts."""
    (tracker,) = [path for path in (tiny.ROOT / "checkpoints").glob("*.pt") if "siamfc" in path.name]
    message = rf"{tracker.name} was not written by train_sam2\.py, but by train_siamfc\.py"
    tiny_training.leave_out_pictures(monkeypatch)
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "run", f"input={folder / 'photo.png'}", f"checkpoint={tracker}")
    config = tiny_training.configure(root, f"model.checkpoint={tracker}", "train.steps=0")
    with pytest.raises(ValueError, match=message):
        tiny_training.train_in(tmp_path / "trained", config)
