"""Annotations that other programs wrote, and datasets as people keep them: utils/instances/ and train_sam2.py.

Inputs that nobody had reported, tried for faults of the same kinds: file names in a json with Windows' backslashes; ids
that are 7, 7.0 and "7" in one file; iscrowd "0"; numbers of a polygon as text; a picture's entry of a thousand million
pixels; a polygon's corner at 1e300 px; run lengths whose sum wraps around 64 bits; a name with a null byte; a
json in UTF-16; coordinates of 400 digits; a squared and mirrored picture; a config without data.root.
"""

import json
import re
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiny_training as tiny
from PIL import Image
from pycocotools import mask as coco_mask
from test_instances_readers import (
    COCO,
    data_keys,
    list_all,
    overlapping_masks,
    rle_of,
    write_label_maps,
    write_picture,
    write_png,
    write_sa1b,
)

from train_sam2 import evaluate
from utils.dataset_check import check_items
from utils.images import write_image
from utils.instances.check import check_data, check_item, count, report_lines
from utils.instances.codecs import polygons_to_mask, rle_to_mask
from utils.instances.readers import object_ids, split_items
from utils.sam2.model import build_sam2

SQUARE = [[2.0, 2.0, 6.0, 2.0, 6.0, 6.0, 2.0, 6.0]]
ACCENTED = "café.jpg"


def write_json(root: Path, images: list, annotations: list) -> Path:
    path = root / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def picture(image_id, file_name: str = "one.jpg", **changes) -> dict:
    return {"id": image_id, "file_name": file_name, "height": 8, "width": 10, **changes}


def square(image_id, annotation_id: int = 5, **changes) -> dict:
    return {"id": annotation_id, "image_id": image_id, "segmentation": SQUARE, **changes}


def check(root: Path, **changes) -> tuple[dict, str]:
    """The counts and the lines of the dataset check of a COCO file."""
    report = check_items(list_all("coco", root, **COCO, **changes), check_item)
    return count(report), "\n".join(report_lines(report, None))


# ---------------------------------------------------------------------------------------------------------------------
# which annotation is of which picture


def test_pictures_that_share_an_id_are_refused_by_name(tmp_path):
    for name in ("one.jpg", "two.jpg", "three.jpg"):
        write_picture(tmp_path / "pictures" / name)
    images = [picture(1), picture(1, "two.jpg"), picture(2, "three.jpg")]
    write_json(tmp_path, images, [square(1), square(1, 6), square(2, 7)])
    counts, text = check(tmp_path)
    assert (counts["num_bad"], counts["num_objects"]) == (2, 1)
    assert "instances.json gives the id 1 to one.jpg, two.jpg; give each picture an id of its own" in text


def test_annotations_of_no_picture_are_counted_and_named(tmp_path, capfd):
    write_picture(tmp_path / "pictures" / "one.jpg")
    write_json(tmp_path, [picture(1)], [square(1), square(8), square(9), square(9), {"id": 3}, None])
    counts, _ = check(tmp_path)
    assert counts["num_objects"] == 1
    printed = capfd.readouterr().out
    assert "instances.json: 5 annotations are left out: their image_id is that of no picture: 8, 9, None" in printed


@pytest.mark.parametrize("image_id", [7, 7.0, "7"])
def test_ids_are_the_same_as_numbers_and_as_text(tmp_path, image_id):
    write_picture(tmp_path / "pictures" / "one.jpg")
    write_json(tmp_path, [picture(image_id)], [square(7), square("7"), square(7.0)])
    assert check(tmp_path)[0]["num_objects"] == 3


def test_pictures_without_objects_are_named_and_not_the_json(tmp_path):
    for name in ("one.jpg", "two.jpg"):
        write_picture(tmp_path / "pictures" / name)
    write_json(tmp_path, [picture(1), picture(2, "two.jpg")], [])
    text = check(tmp_path)[1]
    assert "2 with no objects" in text and "pictures/one.jpg (" in text and "pictures/two.jpg (" in text


def test_crowds_are_kept_on_request(tmp_path):
    """CVAT marks each mask iscrowd: 1."""
    write_picture(tmp_path / "pictures" / "one.jpg")
    mask = np.eye(8, 10) > 0
    crowd = square(1, 6, iscrowd=1, segmentation=rle_of(mask, False))
    write_json(tmp_path, [picture(1)], [crowd, square(1, 7, iscrowd=1)])
    counts, text = check(tmp_path)
    assert (counts["num_objects"], counts["num_crowd"]) == (0, 2)
    assert re.search(r"1 with crowd regions alone: .*CVAT.*data\.crowd=keep\n  .*one\.jpg", text)
    assert "crowd regions left out: 2; data.crowd=keep" in text
    counts, text = check(tmp_path, crowd="keep")
    assert (counts["num_objects"], counts["num_crowd"]) == (2, 0) and "crowd regions" not in text
    (item,) = list_all("coco", tmp_path, **COCO, crowd="keep")
    assert (item.read().layers == 1).any(0)[mask].all()
    with pytest.raises(ValueError, match="data.crowd is 'both'; must be skip or keep"):
        check(tmp_path, crowd="both")
    write_json(tmp_path, [picture(1)], [square(1, 7, iscrowd="0")])
    assert check(tmp_path)[0]["num_objects"] == 1
    with pytest.raises(ValueError, match="unknown key data.crowd"):
        split_items(**data_keys("label_map", tmp_path) | {"crowd": "keep"})


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accented_names_meet_in_either_form(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    write_picture(tmp_path / "pictures" / unicodedata.normalize(form, ACCENTED))
    write_json(tmp_path, [picture(1, unicodedata.normalize(other, ACCENTED))], [square(1)])
    assert check(tmp_path)[0]["num_objects"] == 1
    (tmp_path / "val.txt").write_text(unicodedata.normalize(form, f"pictures/{ACCENTED}"))
    keys = data_keys("coco", tmp_path, **COCO) | {"val_list": str(tmp_path / "val.txt")}
    assert [len(items) for items in split_items(**keys)] == [0, 1]


def test_names_with_backslashes_are_those_of_windows(tmp_path):
    write_picture(tmp_path / "pictures" / "a" / "one.jpg")
    write_json(tmp_path, [picture(1, "a\\one.jpg")], [square(1)])
    assert check(tmp_path)[0]["num_objects"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# types and broken values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "holds no pictures in the layout 'coco'"),
        ({"annotations": None}, None),
        ({"annotations": 5}, "instances.json: 'annotations' is 5; must be a list"),
        ({"images": {"1": {}}}, "instances.json: 'images' is .*; must be a list"),
        ({"categories": 5}, "instances.json: 'categories' is 5; must be a list"),
    ],
)
def test_lists_that_are_none(tmp_path, change, message):
    write_picture(tmp_path / "pictures" / "one.jpg")
    content = {"images": [picture(1)], "annotations": [square(1)]} | change
    (tmp_path / "instances.json").write_text(json.dumps(content))
    if message is None:
        assert check(tmp_path)[0]["num_without_objects"] == 1
    else:
        with pytest.raises(ValueError, match=message):
            check(tmp_path)


def test_entries_without_a_name_or_an_id(tmp_path, capfd):
    for name in ("one.jpg", "two.jpg"):
        write_picture(tmp_path / "pictures" / name)
    images = [picture(1), picture(2, None), picture(3, 17), None, picture(None, "two.jpg")]
    write_json(tmp_path, images, [square(1), square(None)])
    counts, text = check(tmp_path)
    assert (counts["num_objects"], counts["num_bad"]) == (1, 1)
    assert "3 entries of its images are left out: they have no file_name" in capfd.readouterr().out
    assert "gives the id None to two.jpg" in text
    write_json(tmp_path, [picture(1, "o\0ne.jpg")], [square(1)])
    with pytest.raises(FileNotFoundError, match="has no image"):
        check(tmp_path)


@pytest.mark.parametrize("sides", [(8, 10), (8.0, 10.0), ("8", "10")])
def test_sizes_are_numbers_or_text(tmp_path, sides):
    write_picture(tmp_path / "pictures" / "one.jpg")
    rle = rle_of(np.eye(8, 10) > 0, True) | {"size": list(sides)}
    image = picture(1, height=sides[0], width=sides[1])
    write_json(tmp_path, [image], [square(1), square(1, segmentation=rle)])
    assert check(tmp_path)[0]["num_objects"] == 2


BROKEN = {  # segmentation: why it is left out
    "empty part": ([[]], "1 of 1 parts have fewer than 3 points"),
    "a line": ([[1.0, 2.0, 3.0, 4.0]], "1 of 1 parts have fewer than 3 points"),
    "nothing": ([], "has no segmentation"),
    "null": (None, "has no segmentation"),
    "a null number": ([[1, 2, None, 4, 5, 6]], "a polygon is"),
    "words": ([["a"] * 6], "could not convert string"),
    "a number": (7, "not iterable"),
    "text": ("1,2,3,4,5,6", "a polygon is|could not convert"),
    "objects": ([[{}] * 6], "float"),
    "lists in lists": ([[[[1, 2], [3, 4], [5, 6]]] * 6], "a polygon is"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "a polygon is"),
    "no counts": ({"size": [8, 10], "counts": None}, "int"),
    "counts of 30 digits": ({"size": [8, 10], "counts": [10**30]}, "int|large"),
    "a sum of 2**64 + 80": ({"size": [8, 10], "counts": [2**62] * 4 + [80]}, "run lengths add up"),
    "400 digits": ([[10**400, 0, 1, 1, 2, 2]], "int too large"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("format", ["coco", "sa1b"])
def test_a_broken_annotation_costs_its_own_object(tmp_path, format, name):
    segmentation, why = BROKEN[name]
    annotations = [square(1, 5, segmentation=segmentation), square(1, 6)]
    changes = {"val_fraction": 0}
    if format == "coco":
        write_picture(tmp_path / "pictures" / "one.jpg")
        write_json(tmp_path, [picture(1)], annotations)
        changes = COCO
    else:
        write_picture(tmp_path / "one.jpg")
        content = {"image": {"height": 8, "width": 10}, "annotations": annotations}
        (tmp_path / "one.json").write_text(json.dumps(content))
    report = check_items(list_all(format, tmp_path, **changes), check_item)
    assert (count(report)["num_objects"], count(report)["num_broken"], count(report)["num_bad"]) == (1, 1, 0)
    text = "\n".join(report_lines(report))
    assert re.search(rf"1 with broken annotations: .*\n  .*one\.js?o?n?p?g?.*, annotation 5: .*({why})", text), text


def test_a_part_that_covers_nothing_costs_itself(tmp_path):
    write_picture(tmp_path / "pictures" / "one.jpg")
    write_json(tmp_path, [picture(1)], [square(1, segmentation=[[], [1.0, 2.0, 3.0, 4.0], *SQUARE])])
    (item,) = list_all("coco", tmp_path, **COCO)
    instances = item.read()
    assert np.array_equal(instances.layers[0] > 0, polygons_to_mask(SQUARE, 8, 10))
    assert "2 of 3 parts have fewer than 3 points" in instances.broken[0]


def test_deep_nesting_a_mark_and_utf_16(tmp_path):
    write_picture(tmp_path / "pictures" / "one.jpg")
    path = write_json(tmp_path, [picture(1)], [square(1)])
    text = path.read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        assert check(tmp_path)[0]["num_objects"] == 1
    path.write_text('{"images": [], "annotations": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match=r"instances\.json is not valid json"):
        check(tmp_path)


@pytest.mark.parametrize("far", [1e7, 1e300])
def test_memory_follows_the_picture_and_not_the_numbers(tmp_path, far):
    tracemalloc.start()
    mask = polygons_to_mask([[2.5, 2.5, far, 2.5, 2.5, far]], 8, 10)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert mask[3:, 3:].all() and not mask[:2].any() and not mask[:, :2].any()

    write_picture(tmp_path / "pictures" / "one.jpg")
    image = picture(1, height=40_000, width=40_000)
    write_json(tmp_path, [image], [square(1, segmentation=[])])
    tracemalloc.start()
    text = check(tmp_path)[1]
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert "height and width are [40000, 40000], which are not those of" in text


def test_polygons_that_leave_the_picture_are_drawn_as_pycocotools_does(tmp_path):
    rng = np.random.default_rng(0)
    for reach in (30, 200):  # the second: cut off before it is drawn, where it is far outside
        different = 0
        for _ in range(50):
            polygon = rng.uniform(-reach, reach + 30, 8).tolist()
            expected = coco_mask.decode(coco_mask.frPyObjects([polygon], 24, 32))[..., 0] > 0
            different += (polygons_to_mask([polygon], 24, 32) != expected).sum()
        assert different <= (0 if reach == 30 else 50 * 24 * 32 * 1e-3)


def write_outline(format: str, root: Path, points: list[list[float]], wh: tuple[int, int] = (60, 40)) -> list:
    """Write a picture of 60 x 40 px whose file holds two objects, of which the second has these points; list it."""
    write_picture(root / "images" / "one.jpg", 40, 60)
    objects = [[[2, 3], [20, 3], [20, 18]], points]
    width, height = wh
    if format == "coco":
        annotations = [square(1, 5 + k, segmentation=[sum(each, [])]) for k, each in enumerate(objects)]
        write_json(root, [picture(1, width=width, height=height)], annotations)
        return list_all("coco", root, **COCO | {"train_images": "images"})
    if format == "labelme":
        shapes = [{"label": "cell", "points": each} for each in objects]
        content = {"shapes": shapes, "imageHeight": height, "imageWidth": width}
        (root / "images" / "one.json").write_text(json.dumps(content))
        return list_all("labelme", root / "images", val_fraction=0)
    if format == "cvat":
        texts = [";".join(f"{x},{y}" for x, y in each) for each in objects]
        shapes = "".join(f'<polygon label="cell" points="{text}"/>' for text in texts)
        image = f'<image name="one.jpg" width="{width}" height="{height}">{shapes}</image>'
        (root / "annotations.xml").write_text(f"<annotations>{image}</annotations>")
        return list_all("cvat", root, val_fraction=0)
    lines = [" ".join(["0", *(str(x) for point in each for x in np.array(point) / wh)]) for each in objects]
    (root / "images" / "one.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text("names: [cell]\ntrain: images\n")
    (root / "labels").mkdir()
    (root / "images" / "one.txt").rename(root / "labels" / "one.txt")
    return list_all("yolo", root, val_fraction=0)


OUTLINES = {  # points of an object in a picture of 60 x 40 px: how many objects are left, and what is said
    "two points": ([[1, 1], [9, 9]], 1, "fewer than 3 points|a polygon is|4 numbers|a box alone is no mask"),
    "shares": (
        [[0.1, 0.1], [0.9, 0.2], [0.5, 1.0]],
        1,
        r"0 to 1, such as \(0.1, 0.1\): shares of width and height",
    ),
    "beside it": ([[70, 5], [80, 5], [80, 30]], 1, r"reaches \(70, 5\), outside the picture of 60 x 40 px$"),
    "exchanged": ([[10, 44], [30, 44], [30, 58]], 1, r"\(10, 44\), outside .* px; with x and y exchanged it would fit"),
    "partly": ([[20, 10], [35, 10], [30, 55]], 2, r"\(30, 55\), outside .* px; with x and y exchanged it would fit"),
    "far": ([[20, 10], [75, 10], [30, 55]], 2, r"\(75, 10\), outside the picture of 60 x 40 px$"),
    "a rough hand": ([[20, 10], [61.5, 10], [30, -1.5]], 2, None),
    "two pixels": ([[5, 5], [7, 5], [7, 7]], 2, None),
}


@pytest.mark.parametrize(
    "format, name",
    [(format, name) for format in ("coco", "labelme", "cvat") for name in OUTLINES]
    + [("yolo", name) for name in OUTLINES if name != "shares"],  # whose coordinates are shares
)
def test_outlines_that_do_not_lie_in_their_picture_are_named(tmp_path, format, name):
    points, num_objects, words = OUTLINES[name]
    items = write_outline(format, tmp_path, points)
    report = check_items(items, check_item)
    kind = "outlines that leave the picture" if num_objects == 2 else "broken annotations"
    said = [what for item in report.items for remark, what in item.remarks if remark == kind]
    assert (count(report)["num_objects"], count(report)["num_bad"]) == (num_objects, 0)
    if words is None:
        assert said == []
    else:
        assert len(said) == 1 and re.search(words, said[0]), said
        assert re.search(r"one\.jpg|one\.json|one\.txt", said[0])
        assert f"1 with {kind}: " in "\n".join(report_lines(report))


@pytest.mark.parametrize("format", ["coco", "labelme", "cvat"])
def test_a_size_in_the_file_that_is_not_the_pictures_is_a_fault(tmp_path, format):
    report = check_items(write_outline(format, tmp_path, [[5, 5], [9, 5], [9, 9]], wh=(120, 80)), check_item)
    assert len(report.bad) == 1
    assert re.search(
        r"one\.jpg is 40 x 60 px .*but its annotation .* is 80 x 120; export both", report.bad[0].faults[0]
    )


def test_two_entries_of_one_picture_are_refused(tmp_path):
    write_picture(tmp_path / "pictures" / "one.jpg")
    write_json(tmp_path, [picture(1), picture(2, "/home/me/one.jpg")], [square(1), square(2)])
    counts, text = check(tmp_path)
    assert counts["num_bad"] == 2 and re.search(r"instances\.json: 2 of its images are .*one\.jpg; keep one", text)


def test_run_lengths_that_wrap_around_are_refused():
    with pytest.raises(ValueError, match="run lengths add up"):
        rle_to_mask({"size": [2, 2], "counts": [2**62] * 4 + [4]})


# ---------------------------------------------------------------------------------------------------------------------
# what infer_sam2.py writes, as data=sa1b


def test_results_of_pictures_of_one_stem_and_the_runs_record(tmp_path):
    """infer_sam2.py names them a_jpg.json and a_png.json, and writes run.json beside them."""
    for name in ("a.jpg", "a.png", "b.png"):
        write_picture(tmp_path / "photos" / name)
    (tmp_path / "results").mkdir()
    masks = {"a_jpg": ("a.jpg", 1), "a_png": ("a.png", 2), "b": ("b.png", 3)}
    for name, (file_name, num_masks) in masks.items():
        path = tmp_path / "results" / f"{name}.json"
        write_sa1b(path, [np.eye(8, 10) > 0] * num_masks)
        content = json.loads(path.read_text())
        content["image"]["file_name"] = file_name
        path.write_text(json.dumps(content))
    (tmp_path / "results" / "run.json").write_text('{"command": "python infer_sam2.py"}')
    keys = {"image_dir": "photos", "annotation_dir": "results"}
    items = list_all("sa1b", tmp_path, **keys)
    files = {item.name: (item.image_path.name, len(object_ids(item.read().layers))) for item in items}
    assert files == masks
    write_picture(tmp_path / "photos" / "c.png")
    (tmp_path / "results" / "stray.json").write_text("[1]")
    with pytest.raises(FileNotFoundError, match=r"2 of 5 pairs lack a file; .*c\.png has no .*c\.json and .*stray"):
        list_all("sa1b", tmp_path, **keys)


# ---------------------------------------------------------------------------------------------------------------------
# values of data.*, links, turns, and sizes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ignore_ids": 255}, "data.ignore_ids is 255; must be a list, each a whole number"),
        ({"ignore_ids": ["255"]}, "data.ignore_ids is .'255'.; must be a list, each a whole number"),
        ({"image_dir": 2024}, "data.image_dir is 2024; must be text"),
        ({"val_fraction": "0.1"}, "data.val_fraction is '0.1'; must be a number"),
        ({"split_seed": 0.5}, "data.split_seed is 0.5; must be a whole number"),
        ({"train_list": 2024}, "data.train_list is 2024; must be text or null"),
        ({"root": 2024}, "data.root is 2024; must be text"),
    ],
)
def test_values_of_other_types_are_refused(tmp_path, change, message):
    config = tiny.configure(tmp_path)
    config["data"] |= change
    with pytest.raises(ValueError, match=message):
        tiny.train_in(tmp_path / "run", config)


def test_lists_of_folders_are_lists_of_text_and_the_root_is_needed(tmp_path):
    with pytest.raises(ValueError, match="data.subsets is 'Simple'; must be a list, each text"):
        split_items(**data_keys("labpics", tmp_path, subsets="Simple"))
    config = tiny.configure(tmp_path)
    del config["data"]["root"]
    with pytest.raises(ValueError, match="the config lacks data.root"):
        tiny.train_in(tmp_path / "run", config)


def test_dead_links_are_named(tmp_path):
    """As git-annex and DVC leave them: a mask, all masks of a picture, a picture, a label map."""
    for name in ("a", "b", "c", "d"):
        write_picture(tmp_path / name / "images" / "x.png")
        write_png(tmp_path / name / "masks" / "0.png", np.eye(8, 10, dtype=np.uint8))
    (tmp_path / "a" / "masks" / "1.png").symlink_to(tmp_path / "gone")
    (tmp_path / "b" / "masks" / "0.png").unlink()
    (tmp_path / "b" / "masks").rmdir()
    (tmp_path / "b" / "masks").symlink_to(tmp_path / "gone")
    (tmp_path / "c" / "images" / "x.png").unlink()
    (tmp_path / "c" / "images" / "x.png").symlink_to(tmp_path / "gone")
    report = check_items(list_all("masks_per_file", tmp_path), check_item)
    faults = {item.name: item.faults for item in report.bad}
    assert faults.keys() == {"a", "b", "c"}
    assert re.search(r"a/masks/1\.png is a link to .*gone, which is not there", faults["a"][0])
    assert re.search(r"b/masks", faults["b"][0]) and "c/images/x.png is a link to" in faults["c"][0]
    (tmp_path / "d2").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="d2"):
        list_all("masks_per_file", tmp_path)


def test_files_that_may_not_be_read_are_named(tmp_path, monkeypatch):
    """chmod does not stop root, who runs many a test: numpy's reading of the file is refused instead."""
    root = write_label_maps(tmp_path, 3)
    real = np.fromfile

    def fromfile(path, *rest):
        if Path(path).name in ("000.jpg", "001.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest)

    monkeypatch.setattr(np, "fromfile", fromfile)
    report = check_items(list_all("label_map", root), check_item)
    faults = {item.name: item.faults for item in report.bad}
    assert faults.keys() == {"000", "001"}
    assert "000.jpg" in faults["000"][0] and "001.png" in faults["001"][0]


@pytest.mark.parametrize(
    ("orientation", "height", "remark"),
    [(3, 8, "turned by 180 degrees"), (2, 8, "mirrored"), (4, 8, "upside down"), (6, 10, "turned by 90 degrees"),
     (7, 10, "mirrored and turned"), (1, 8, None), (6, 8, None), (0, 8, None), (9, 8, None)],
)  # fmt: skip
def test_a_turn_that_keeps_the_size_is_remarked_on(tmp_path, orientation, height, remark):
    root = write_label_maps(tmp_path, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (height, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "images" / "000.jpg", exif=exif)
    shape = (10, 8) if orientation == 6 and height == 8 else (height, 10)  # turned, as its picture is shown
    write_png(root / "labels" / "000.png", np.ones(shape, np.uint8))
    report = check_items(list_all("label_map", root), check_item)
    remarks = [what for kind, what in report.items[0].remarks if "turn by EXIF" in kind]
    assert not report.bad and remarks == ([] if remark is None else [f"{root / 'images' / '000.jpg'}: {remark}"])


def test_statistics_that_cannot_be_drawn_stop_nothing(tmp_path, capfd):
    root = tiny.write_dataset(tmp_path / "data")
    (tmp_path / "run" / "dataset.png").mkdir(parents=True)
    items = tiny.list_training_items(tiny.configure(root))
    splits, _, _ = check_data({"train": items, "val": items[:1]}, 1, "stop", tmp_path / "run", False)
    assert len(splits["train"]) == len(items)
    assert "dataset.png could not be drawn (IsADirectoryError" in capfd.readouterr().out


@pytest.mark.parametrize("part", ["train", "evaluate"])
def test_an_annotation_of_another_size_stops_a_training(tmp_path, part):
    """The dataset check sees it first; this is one that came while the run went on."""
    root = tiny.write_dataset(tmp_path / "data")
    config = tiny.configure(root, "train.steps=1")
    items = tiny.list_training_items(config)
    ids = np.ones((40, 64), np.int32)
    Image.fromarray(ids.astype(np.uint8)).save(items[0].annotation_path)
    message = rf"{items[0].image_path.name} is 48 x 64 px .*{items[0].annotation_path.name} is 40 x 64"
    if part == "train":
        dataset = tiny.make_dataset(config, items[:1])
        with pytest.raises(ValueError, match=message):
            dataset[0]
    else:
        with pytest.raises(ValueError, match=message):
            evaluate(build_sam2(**config["model"], device="cpu"), items[:1], 1, [1], "fp32", None, 0)


def test_masks_of_other_programs_train(tmp_path):
    """The whole way: CVAT's crowds, a shared id, a broken annotation and an accented name, through train_sam2.py."""
    masks = overlapping_masks(3, 24, 32)
    images, annotations = [], []
    for number, name in enumerate([ACCENTED, "b.jpg", "c.jpg"]):
        path = tmp_path / "pictures" / unicodedata.normalize("NFD", name)
        path.parent.mkdir(exist_ok=True)
        write_image(path, np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8))
        images.append(picture(str(number), name, height=24, width=32))
        annotations += [square(number, iscrowd=1, segmentation=rle_of(mask, True)) for mask in masks]
    write_json(tmp_path, images, [*annotations, square(0, segmentation=[[]])])
    overrides = [override for override in tiny.tiny_overrides(tmp_path) if not override.startswith("data")]
    keys = ["train_images=pictures", "train_annotations=instances.json", "val_annotations=null", "crowd=keep"]
    overrides += ["data=coco", f"data.root={tmp_path}", *(f"data.{key}" for key in keys), "data.val_fraction=0.3"]
    last = tiny.train_in(tmp_path / "run", tiny.compose_config(*overrides, "train.steps=1", "data.min_area_px=1"))
    assert last["step"] == 1 and json.loads((tmp_path / "run" / "run.json").read_text())["data"]["num_objects"] == 9
