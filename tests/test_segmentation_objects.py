"""utils/segmentation/objects.py, and data=instances of train_unet.py: annotated objects as class maps."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_segmentation
import yaml
from options import read_option
from PIL import Image, ImageDraw
from scipy import ndimage
from test_instances_readers import write_labelme, write_picture, write_png, write_sa1b
from tiny_segmentation import compose_config, run_main, tiny_overrides, train_in

from utils.dataset_check import check_items
from utils.images import IGNORE_INDEX
from utils.instances.readers import Instances, stack_masks
from utils.segmentation.check import check_item, remark_on_parts, report_lines
from utils.segmentation.objects import draw_classes
from utils.segmentation.readers import find_classes, read_item, split_objects

HEIGHT, WIDTH = 24, 32
BOXES = [  # class, x1, y1, x2, y2, in the order of the file: a dog on a larger cat, and two of one size
    ("dog", 6, 6, 10, 10), ("cat", 2, 2, 20, 16), ("cat", 22, 4, 28, 10), ("dog", 25, 7, 31, 13),
]  # fmt: skip


def paint(boxes, class_names, order: str) -> np.ndarray:
    """Ask each pixel which boxes hold it, and which of these lies on top."""
    class_map = np.zeros((HEIGHT, WIDTH), np.uint8)
    for y in range(HEIGHT):
        for x in range(WIDTH):
            top = None
            for number, (name, x1, y1, x2, y2) in enumerate(boxes):
                if x1 <= x < x2 and y1 <= y < y2:
                    area = (x2 - x1) * (y2 - y1)
                    if top is None or order == "file" or area <= top[0]:
                        top = area, number, name
            class_map[y, x] = 0 if top is None else class_names.index(top[2])
    return class_map


def corners(x1, y1, x2, y2):
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def write_labelme_boxes(root: Path, names: list[str], boxes=BOXES) -> dict:
    for name in names:
        write_picture(root / f"{name}.jpg", HEIGHT, WIDTH)
        shapes = [{"label": b[0], "points": np.reshape(corners(*b[1:]), (-1, 2)).tolist()} for b in boxes]
        write_labelme(root / f"{name}.json", shapes)
    return {"format": "labelme"}


def write_coco_boxes(root: Path, names: list[str], boxes=BOXES, categories=("bird", "dog", "cat")) -> dict:
    ids = {"cat": 9, "dog": 2, "bird": 1}  # the file lists them in another order
    content = {"categories": [{"id": ids[name], "name": name} for name in categories], "images": [], "annotations": []}
    for image_id, name in enumerate(names):
        write_picture(root / "pictures" / f"{name}.jpg", HEIGHT, WIDTH)
        content["images"].append({"id": image_id, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
        content["annotations"] += [
            {"image_id": image_id, "category_id": ids[b[0]], "segmentation": [corners(*b[1:5])], "iscrowd": len(b) - 5}
            for b in boxes
        ]
    (root / "a.json").write_text(json.dumps(content))
    return {"format": "coco", "train_images": "pictures", "train_annotations": "a.json"}


def write_yolo_boxes(root: Path, names: list[str]) -> dict:
    lines = []
    for label, *box in BOXES:
        shares = np.array(corners(*box)) / np.tile([WIDTH, HEIGHT], 4)
        lines.append(f"{['dog', 'bird', 'cat'].index(label)} {' '.join(map(str, shares))}")
    for name in names:
        write_picture(root / "images" / f"{name}.jpg", HEIGHT, WIDTH)
        (root / "labels").mkdir(exist_ok=True)
        (root / "labels" / f"{name}.txt").write_text("\n".join(lines))
    content = {"names": {2: "cat", 0: "dog", 1: "bird"}, "train": "images"}
    (root / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return {"format": "yolo"}


def write_cvat_boxes(root: Path, names: list[str], labels: str = "dog bird") -> dict:
    labels = "".join(f"<label><name>{name}</name></label>" for name in labels.split())
    boxes = "".join(f'<box label="{b[0]}" xtl="{b[1]}" ytl="{b[2]}" xbr="{b[3]}" ybr="{b[4]}"/>' for b in BOXES)
    images = "".join(f'<image name="{n}.jpg" width="{WIDTH}" height="{HEIGHT}">{boxes}</image>' for n in names)
    for name in names:
        write_picture(root / "images" / f"{name}.jpg", HEIGHT, WIDTH)
    meta = f"<meta><task><labels>{labels}</labels></task></meta>" if labels else ""
    (root / "annotations.xml").write_text(f"<annotations>{meta}{images}</annotations>")
    return {"format": "cvat"}


def write_voc_boxes(root: Path, names: list[str]) -> dict:
    classes = paint(BOXES, ["background", "bird", "cat", "dog"], "size")
    ids = classes.copy()
    ids[:, 22:][ids[:, 22:] > 0] += 2
    ids[0], classes[1] = 255, 255
    for name in names:
        write_picture(root / "JPEGImages" / f"{name}.jpg", HEIGHT, WIDTH)
        write_png(root / "SegmentationObject" / f"{name}.png", ids)
        write_png(root / "SegmentationClass" / f"{name}.png", classes)
    return {"format": "voc", "voc_class_names": ["bird", "cat", "dog"]}


def reader_keys(root: Path, **changes) -> dict:
    """The reader's keys of configs/unet/data/instances.yaml, with the classes that the dataset has."""
    keys = {**read_option("unet", "data", "instances"), "root": str(root), "val_fraction": 0.0, **changes}
    return keys | find_classes(keys)


def list_all(root: Path, **changes):
    return sum(split_objects(**reader_keys(root, **changes)), [])


# ---------------------------------------------------------------------------------------------------------------------
# class maps


@pytest.mark.parametrize(
    "write, class_names",
    [
        (write_labelme_boxes, ["cat", "dog"]),
        (write_coco_boxes, ["bird", "dog", "cat"]),  # by id
        (write_yolo_boxes, ["dog", "bird", "cat"]),  # by number
        (write_cvat_boxes, ["dog", "bird", "cat"]),  # as declared, then those that are not
        (write_voc_boxes, ["bird", "cat", "dog"]),
    ],
)
@pytest.mark.parametrize("order", ["size", "file"])
def test_each_layout_gives_the_map_that_a_plain_loop_paints(tmp_path, write, class_names, order):
    keys = write(tmp_path, ["a"])
    (item,) = list_all(tmp_path, order=order, **keys)
    image, class_map = read_item(item)
    expected = paint(BOXES, ["background", *class_names], "size" if write is write_voc_boxes else order)
    if write is write_voc_boxes:
        expected[:2] = IGNORE_INDEX  # what either of its maps leaves open
    assert item.coding.class_names == ("background", *class_names) and image.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(class_map, expected)
    if write is not write_voc_boxes:  # the object on which another lies is whole again where that is left out
        (item,) = list_all(tmp_path, order=order, classes=["cat"], **keys)
        cats = [box for box in BOXES if box[0] == "cat"]
        assert np.array_equal(read_item(item)[1], paint(cats, ["background", "cat"], order))
        (item,) = list_all(tmp_path, order=order, classes=["cat", "dog"], **keys)
        assert np.array_equal(read_item(item)[1], paint(BOXES, ["background", "cat", "dog"], order))


@pytest.mark.parametrize("order", ["size", "file"])
def test_drawing_equals_a_slow_loop(order):
    """Of many overlapping objects: named, left out, without a class, ignored, crowds, background, without a pixel."""
    rng = np.random.default_rng(0)
    kinds = [
        {"category": "a"}, {"category": "b"}, {"category": "left out"}, {"category": ""}, {}, {"category": "skip"},
        {"category": "a", "iscrowd": 1}, {"category": "_background_"}, {"category": "left out", "iscrowd": 1},
    ]  # fmt: skip
    value_of = {"a": 1, "b": 2, "": 255, "skip": 255, "_background_": 0}
    for _ in range(20):
        masks = []
        for _ in range(12):
            (y, x), (h, w) = rng.integers(0, 14, 2), rng.integers(0, 9, 2)
            masks.append(np.zeros((16, 20), bool))
            masks[-1][y : y + h, x : x + w] = True
        said = [kinds[number] for number in rng.integers(0, len(kinds), len(masks))]
        instances = Instances(stack_masks(masks, (16, 20)), annotations=tuple(said))
        expected = np.zeros((16, 20), np.uint8)
        crowds = [i for i, each in enumerate(said) if each == kinds[6]]
        others = [i for i, each in enumerate(said) if each.get("category", "") in value_of and i not in crowds]
        if order == "size":
            others.sort(key=lambda i: -masks[i].sum())  # stable: of one size in the order of the file
        for i in crowds + others:
            expected[masks[i]] = 255 if i in crowds else value_of[said[i].get("category", "")]
        ours = draw_classes(instances, ("background", "a", "b"), order, "ignore", ("skip",))
        assert ours.dtype == np.uint8 and np.array_equal(ours, expected)


@pytest.mark.parametrize("layout", ["label_map", "masks_per_file", "sa1b"])
def test_objects_without_a_class_are_one(tmp_path, layout):
    masks = np.zeros((2, HEIGHT, WIDTH), bool)
    masks[0, 2:9, 3:20], masks[1, 4:20, 10:14] = True, True
    folder = {"label_map": "images", "masks_per_file": "x/images", "sa1b": "."}[layout]
    write_picture(tmp_path / folder / "a.jpg", HEIGHT, WIDTH)
    expected, changes = masks.any(0).astype(np.uint8), {}
    if layout == "label_map":
        ids = np.where(masks[1], 70000, masks[0]).astype(np.int32)
        ids[0] = 9
        (tmp_path / "labels").mkdir()
        Image.fromarray(ids).save(tmp_path / "labels" / "a.tif")
        expected[0], changes = IGNORE_INDEX, {"ignore_ids": [9]}
    elif layout == "masks_per_file":
        for index, mask in enumerate(masks):
            write_png(tmp_path / "x" / "masks" / f"{index}.png", mask.astype(np.uint8))
    else:
        write_sa1b(tmp_path / "a.json", list(masks))
    (item,) = list_all(tmp_path, format=layout, **changes)
    assert item.coding.class_names == ("background", "object") and np.array_equal(read_item(item)[1], expected)
    with pytest.raises(ValueError, match="data.classes names 'cell', which data.root .* lacks; it has object"):
        list_all(tmp_path, format=layout, classes=["cell"], **changes)


@pytest.mark.parametrize("crowd, value", [("ignore", IGNORE_INDEX), ("skip", 0), ("keep", 2)])
def test_crowds_of_coco(tmp_path, crowd, value):
    boxes = [("cat", 4, 4, 8, 8), ("dog", 2, 2, 12, 12, "crowd")]
    keys = write_coco_boxes(tmp_path, ["a"], boxes, ["dog", "cat"])
    (item,) = list_all(tmp_path, classes=["cat", "dog"], crowd=crowd, **keys)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[2:12, 2:12] = value
    expected[4:8, 4:8] = 1
    assert np.array_equal(read_item(item)[1], expected)


def test_real_files_give_the_class_maps_that_labelme_exports(data_root):
    """Those of its VOC files; of its json files but for the outlines, which labelme fills and COCO's rule halves."""
    root, num_outline = data_root / "COCO_labelme_voc3", 0
    names = (root / "data_dataset_voc" / "class_names.txt").read_text().splitlines()
    voc = {"image_dir": "../data_annotated", "voc_class_names": names[1:]}
    drawn = list_all(root / "data_annotated", format="labelme", order="file")
    for item in list_all(root / "data_dataset_voc", format="voc", **voc) + drawn:
        stem, class_map = item.image_path.stem, read_item(item)[1]
        exported = np.array(Image.open(root / "data_dataset_voc" / "SegmentationClass" / f"{stem}.png"))
        number = [0, *map(names.index, item.coding.class_names[1:])]
        class_map = np.array([*number, *[255] * (256 - len(number))], np.uint8)[class_map]
        outlines = Image.new("1", exported.shape[::-1])
        for shape in json.loads((root / "data_annotated" / f"{stem}.json").read_text())["shapes"]:
            ImageDraw.Draw(outlines).polygon([tuple(point) for point in shape["points"]], outline=1)
        differs, near = class_map != exported, ndimage.binary_dilation(np.array(outlines), np.ones((3, 3)))
        assert not (differs & ~near).any() and differs.mean() < 0.0065
        assert not differs.any() or item in drawn
        num_outline += differs.sum()
    assert len(drawn) == 3 and 2000 < num_outline < 3000  # it is no test of nothing


# ---------------------------------------------------------------------------------------------------------------------
# what makes no sense, and what the check says


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"classes": ["Cat"]}, "data.classes names 'Cat', which data.root .* lacks; it has cat, dog"),
        ({"classes": []}, r"data.classes is \[\]; must be null, or different names among cat, dog"),
        ({"classes": ["cat", "cat"]}, "must be null, or different names among cat, dog"),
        ({"classes": "cat"}, "data.classes is 'cat'; must be a list"),
        ({"order": "foo"}, "data.order is foo; must be size or file"),
        ({"crowd": "foo"}, "data.crowd is foo; must be one of ignore, skip, keep"),
        ({"num_classes": 5}, "data.num_classes is 5, but follows from the classes, and is 3; leave it null"),
        ({"class_names": ["a"]}, "data.class_names is .'a'., but follows from the classes"),
        ({"format": None}, "data.format is None; must be one of labpics, .*coco"),
        ({"data_yaml": "x.yaml"}, "unknown key data.data_yaml; must be among .*data.ignore_labels"),
        ({"channels": 2}, "data.channels is 2"),
    ],
)
def test_keys_that_make_no_sense_are_one_line(tmp_path, changes, words):
    write_labelme_boxes(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=words) as error:
        list_all(tmp_path, **{"format": "labelme", **changes})
    assert "\n" not in str(error.value)


def test_numbers_without_names_and_too_many_classes(tmp_path):
    keys = write_coco_boxes(tmp_path, ["a"])
    content = json.loads((tmp_path / "a.json").read_text())
    many = [{"id": number, "name": f"class {number}"} for number in range(254)]
    (tmp_path / "a.json").write_text(json.dumps(content | {"categories": many}))
    with pytest.raises(
        ValueError, match="has 254 classes, and a class map holds 253 .*; choose some with data.classes"
    ):
        list_all(tmp_path, **keys)
    assert list_all(tmp_path, classes=["class 9"], **keys)[0].coding.class_names == ("background", "class 9")
    unnamed = [{"id": 1, "name": "cat"}, {"id": 2, "name": " "}]
    (tmp_path / "a.json").write_text(json.dumps(content | {"categories": unnamed}))
    assert list_all(tmp_path, **keys)[0].coding.class_names == ("background", "cat")
    content["annotations"][0]["category_id"], content["annotations"][1]["category_id"] = [7], "9"
    (tmp_path / "a.json").write_text(json.dumps({key: content[key] for key in ("images", "annotations")}))
    with pytest.raises(ValueError, match=r"numbers 2, 9, \[7\], and the files name none.*data.classes=\[object\]"):
        list_all(tmp_path, **keys)
    (item,) = list_all(tmp_path, classes=["object"], **keys)
    assert np.array_equal(read_item(item)[1], paint(BOXES, ["background", "cat", "dog"], "size") > 0)


def test_the_check_says_what_it_says_of_objects_and_of_class_maps(tmp_path):
    write_labelme_boxes(tmp_path, ["a", "b"])
    write_labelme_boxes(tmp_path, ["c"], [("Cat", 2, 2, 9, 9), ("", 12, 12, 20, 20)])
    write_labelme_boxes(tmp_path, ["d"], [])
    write_labelme(tmp_path / "e.json", [{"label": "cat", "shape_type": "line", "points": [[1, 1], [9, 9]]}])
    write_picture(tmp_path / "e.jpg", HEIGHT, WIDTH)
    write_labelme_boxes(tmp_path, ["f"])
    (tmp_path / "f.json").write_text("{")
    write_labelme_boxes(tmp_path, ["g"])
    write_picture(tmp_path / "g.jpg", HEIGHT, WIDTH + 1)
    items = list_all(tmp_path, format="labelme")
    report = check_items(items, check_item)
    lines = report_lines(report, None)
    text = "\n".join(lines)
    assert (
        "classes, objects (pictures): cat 4 (2), dog 4 (2), Cat 1 (1)" in lines and "1 objects have no class" in lines
    )
    assert "'Cat' and 'cat' differ in case or spaces alone: are they one class?" in lines
    assert "checked 7 images: 5 usable, 2 bad, 0 with all pixels ignored" in lines
    assert "f.json is not valid json" in text and "g.jpg is 24 x 33 px (height x width), but its annotation" in text
    assert "shape 0 (cat): its shape_type is line, which covers no pixels" in text
    assert "2 with no objects: all of it is background, and trains as such" in text
    drawn = paint([("Cat", 2, 2, 9, 9)], ["", "Cat"], "size").astype(int)
    assert items[2].coding.class_names == ("background", "Cat", "cat", "dog")
    assert report.items[2].content.num_ignored == 64 and report.items[2].content.class_pixels[1] == drawn.sum()
    assert remark_on_parts(report, items[:2], items[:2]) == [
        "no pixel of the training pictures is Cat: that cannot be learned; divide the dataset otherwise "
        "(data.split_seed, or the lists and folders of its parts)",
        "no pixel of the validation pictures is Cat: not measured there",
    ]


def test_training_and_validation_have_the_classes_of_both(tmp_path):
    keys = write_coco_boxes(tmp_path, ["a"], BOXES[:1], ["dog"])
    (tmp_path / "a.json").rename(tmp_path / "train.json")
    write_coco_boxes(tmp_path, ["b"], BOXES[1:3], ["cat"])
    keys |= {"train_annotations": "train.json", "val_images": "pictures", "val_annotations": "a.json"}
    train_items, val_items, test_items = split_objects(**reader_keys(tmp_path, **keys))
    assert [len(train_items), len(val_items), test_items] == [1, 1, []]
    for item, boxes in ((train_items[0], BOXES[:1]), (val_items[0], BOXES[1:3])):
        assert np.array_equal(read_item(item)[1], paint(boxes, ["background", "dog", "cat"], "size"))


# ---------------------------------------------------------------------------------------------------------------------
# the real command


def test_a_run_trains_resumes_evaluates_and_predicts_by_the_names_of_its_classes(tmp_path, monkeypatch, capfd):
    tiny_segmentation.make_runs_quick(monkeypatch)
    root = tmp_path / "labels"
    write_labelme_boxes(root, [f"{number} é" for number in range(4)])
    tiny = [each for each in tiny_overrides(root) if not each.startswith("data")]
    data = ["data=instances", "data.format=labelme", f"data.root={root}", "data.val_fraction=0.25"]
    size = ["data.image_size=32"]
    config = compose_config(*tiny, *data, *size, "train.steps=4", "train.eval_every=2")
    last = train_in(tmp_path / "run", config)
    assert last["config"]["data"]["classes"] == ["cat", "dog"] and last["config"]["data"]["num_classes"] == 3
    assert {"val/iou_background", "val/iou_cat", "val/iou_dog"} <= set(last["metrics"][-1])
    # a class that came to the dataset since is none of the run's
    write_labelme_boxes(root, ["new"], [("ant", 1, 1, 9, 9), *BOXES])
    resume, steps = f"resume={tmp_path / 'run'}", "train.steps=5"
    for name, arguments in (("resumed", ["device=cpu", "num_workers=0"]), ("again", [*tiny, *data, *size])):
        status, output = run_main(monkeypatch, capfd, tmp_path / name, resume, steps, "train.eval_every=2", *arguments)
        assert status == 0 and "3 classes" in output and "left out 1 others" in output, output
    # another dataset, whose own order is another; the class that the checkpoint lacks is background
    checkpoint = f"checkpoint={tmp_path / 'run' / 'best.pt'}"
    other = [f"data.{key}={value}" for key, value in write_yolo_boxes(tmp_path / "yolo", ["a", "b"]).items()]
    arguments = ["mode=evaluate", checkpoint, "data=instances", *other, f"data.root={tmp_path / 'yolo'}", *size]
    status, output = run_main(monkeypatch, capfd, tmp_path / "tested", *arguments)
    assert status == 1 and output.strip().endswith("has no picture in its test split; give split=train or split=val")
    status, output = run_main(monkeypatch, capfd, tmp_path / "evaluated", *arguments, "split=val")
    rows = (tmp_path / "evaluated" / "confusion.csv").read_text().splitlines()
    truth = np.bincount(paint(BOXES, ["", "cat", "dog"], "size").ravel())
    assert status == 0 and rows[0] == "background,cat,dog"
    assert [sum(map(int, row.split(","))) for row in rows[1:]] == truth.tolist()
    status, output = run_main(monkeypatch, capfd, tmp_path / "wrong", *arguments, "split=val", "data.classes=[dog,cat]")
    assert status == 1 and "data.classes is ['dog', 'cat']; checkpoint" in output and "background, cat, dog" in output
    picture = f"input={tmp_path / 'yolo' / 'images' / 'a.jpg'}"
    status, output = run_main(monkeypatch, capfd, tmp_path / "predicted", "mode=predict", checkpoint, picture)
    assert status == 0 and "0 background" in output and "1 cat" in output and "2 dog" in output
    status, output = run_main(monkeypatch, capfd, tmp_path / "fit", *tiny, *data, *size, "check=fit")
    assert status == 0 and "4 classes" in output, output
