"""utils/instances/readers.py and check.py: every layout, splits, faults in files, the dataset check."""

import base64
import json
import re
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from options import read_option
from PIL import Image
from pycocotools import mask as coco_mask

from utils.dataset_check import check_items, keep_usable
from utils.images import read_image, write_image, write_label_map
from utils.instances import check
from utils.instances.check import check_item, count, measure_objects, plot_statistics, report_lines
from utils.instances.codecs import polygons_to_mask
from utils.instances.readers import class_name, object_ids, read_item, split_items
from utils.settings import check_keys


def data_keys(name: str, root: Path, **changes) -> dict:
    """The keys of configs/sam2/data/<name>.yaml, with a root and other changes, as a command line would give them."""
    keys = read_option("sam2", "data", name)
    assert not set(changes) - set(keys), changes
    return {**keys, "root": str(root), **changes}


def list_all(name: str, root: Path, **changes):
    train_items, val_items = split_items(**data_keys(name, root, **changes))
    return sorted(train_items + val_items, key=lambda item: item.name)


def write_picture(path: Path, height: int = 8, width: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    write_image(path, rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def write_label_maps(root: Path, num_images: int = 4, suffix: str = ".jpg") -> Path:
    """A label_map dataset of `num_images` pictures 8 x 10 with two objects each."""
    for index in range(num_images):
        write_picture(root / "images" / f"{index:03d}{suffix}")
        ids = np.zeros((8, 10), np.uint8)
        ids[:4, :5], ids[5:, 6:] = 1, 2
        write_png(root / "labels" / f"{index:03d}.png", ids)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# label maps


def test_label_map_reads_8_16_32_bit_and_palette(tmp_path):
    maps = {
        "eight": np.arange(80, dtype=np.uint8).reshape(8, 10),
        "sixteen": np.arange(80, dtype=np.int32).reshape(8, 10) * 800,
        "thirty_two": np.arange(80, dtype=np.int32).reshape(8, 10) * 100_000,
    }
    (tmp_path / "labels").mkdir()
    for stem, ids in maps.items():
        write_picture(tmp_path / "images" / f"{stem}.png")
        write_label_map(tmp_path / "labels" / f"{stem}.png", ids)
    write_picture(tmp_path / "images" / "palette.png")
    palette_map = Image.fromarray(maps["eight"]).convert("P")
    palette_map.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
    palette_map.save(tmp_path / "labels" / "palette.png")
    items = list_all("label_map", tmp_path)
    assert [item.name for item in items] == ["eight", "palette", "sixteen", "thirty_two"]
    for item in items:
        image_rgb, layers = read_item(item)
        assert image_rgb.shape == (8, 10, 3) and layers.dtype == np.int32
        assert np.array_equal(layers, maps[item.name.replace("palette", "eight")][None])


def test_a_map_without_background_keeps_its_smallest_id(tmp_path):
    """The tutorial's np.unique(map)[1:] loses object 3 here."""
    write_label_maps(tmp_path, 1)
    ids = np.full((8, 10), 3, np.uint8)
    ids[:, 5:] = 9
    write_png(tmp_path / "labels" / "000.png", ids)
    (item,) = list_all("label_map", tmp_path, val_fraction=0)
    assert object_ids(item.read().layers) == [(0, 3, 40), (0, 9, 40)]


@pytest.mark.parametrize("factor", [1, 50_000_000])  # the second: too large to count in a table
def test_object_ids_equal_a_plain_loop(factor):
    layers = np.random.default_rng(2).integers(0, 40, (3, 20, 30)).astype(np.int32) * factor
    expected = [
        (layer, int(value), int((layers[layer] == value).sum()))
        for layer in range(3)
        for value in sorted(set(layers[layer].ravel().tolist()) - {0})
    ]
    assert object_ids(layers) == expected
    assert object_ids(np.zeros((1, 4, 4), np.int32)) == []


def test_ids_to_ignore_become_background(tmp_path):
    write_label_maps(tmp_path, 1)
    (item,) = list_all("label_map", tmp_path, val_fraction=0, ignore_ids=[2])
    assert object_ids(item.read().layers) == [(0, 1, 20)]


def test_odd_suffixes_and_stray_files(tmp_path):
    """The tutorial's name[:-4] breaks .jpeg, and it opens whatever lies in the folder."""
    for name in ("a.jpeg", "b.JPG", "c.v2.PNG", "d.tif"):
        write_picture(tmp_path / "images" / name)
    for name in ("a.png", "b.png", "c.v2.tif", "d.PNG"):
        write_png(tmp_path / "labels" / name, np.ones((8, 10), np.uint8))
    for stray in ("images/.hidden.jpg", "images/Thumbs.db", "images/notes.txt", "labels/.DS_Store", "labels/x.json"):
        (tmp_path / stray).write_text("stray")
    (tmp_path / "images" / "older.jpg").mkdir()
    items = list_all("label_map", tmp_path)
    label_names = {item.name: item.annotation_path.name for item in items}
    assert label_names == {"a": "a.png", "b": "b.png", "c.v2": "c.v2.tif", "d": "d.PNG"}
    assert all(object_ids(read_item(item)[1]) == [(0, 1, 80)] for item in items)


def test_pictures_and_maps_in_one_folder(tmp_path):
    for stem in ("001", "002"):
        write_picture(tmp_path / f"{stem}.png")
        write_png(tmp_path / f"{stem}_masks.png", np.ones((8, 10), np.uint8))
    items = list_all("label_map", tmp_path, image_dir=".", label_dir=".", label_ending="_masks")
    label_names = {item.image_path.name: item.annotation_path.name for item in items}
    assert label_names == {"001.png": "001_masks.png", "002.png": "002_masks.png"}
    with pytest.raises(ValueError, match="set data.label_ending"):
        list_all("label_map", tmp_path, image_dir=".", label_dir=".")


# ---------------------------------------------------------------------------------------------------------------------
# labpics


def write_labpics(root: Path, vessels: np.ndarray, materials: np.ndarray, dtype=np.uint8, stem: str = "a") -> None:
    """Write one picture of Simple/Train with its instance file, R vessels, B materials, G something else."""
    write_picture(root / "Simple" / "Train" / "Image" / f"{stem}.jpg", *vessels.shape)
    path = root / "Simple" / "Train" / "Instance" / f"{stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if dtype == np.uint8:
        green = np.full(vessels.shape, 77)
        Image.fromarray(np.stack([vessels, green, materials], -1).astype(np.uint8)).save(path)
    else:
        import cv2  # Pillow writes no 16-bit colour

        cv2.imwrite(str(path), np.stack([materials, np.full(vessels.shape, 77), vessels], -1).astype(dtype))


LABPICS = {"subsets": ["Simple"], "val_folder": None, "val_fraction": 0}


@pytest.mark.parametrize(
    ("vessel_id", "material_id", "dtype"),
    [
        (16, 19, np.uint8),  # the tutorial's uint8 product 16 * (19 + 1) is 64
        (16, 15, np.uint8),  # ... is 256, so 0: the vessel is lost
        (3, 255, np.uint8),  # ... 255 + 1 is 0: all vessels are lost
        (255, 255, np.uint8),
        (400, 400, np.uint16),
    ],
)
def test_labpics_ids_never_alias(tmp_path, vessel_id, material_id, dtype):
    vessels, materials = np.zeros((8, 10), int), np.zeros((8, 10), int)
    vessels[:, :6] = vessel_id  # 48 px, 12 of them covered by the material
    materials[4:7, 1:5] = material_id
    write_labpics(tmp_path, vessels, materials, dtype)
    (item,) = list_all("labpics", tmp_path, **LABPICS)
    layers = read_item(item)[1]
    assert layers.dtype == np.int32
    assert object_ids(layers) == [(0, material_id, 12), (0, material_id + vessel_id, 36)]
    assert np.array_equal(layers[0] == material_id + vessel_id, (vessels > 0) & (materials == 0))


@pytest.mark.parametrize("vessel", ["visible", "full"])
def test_labpics_with_ids_1_to_400(tmp_path, vessel):
    """400 vessels and 400 materials: 800 objects, each with its own pixels and its own id."""
    vessels = np.kron(np.arange(1, 401).reshape(20, 20), np.ones((4, 4), int))
    materials = np.kron(np.arange(400, 0, -1).reshape(20, 20), np.array([[0, 0], [0, 1]]).repeat(2, 0).repeat(2, 1))
    write_labpics(tmp_path, vessels, materials, np.uint16)
    (item,) = list_all("labpics", tmp_path, **LABPICS, vessel=vessel)
    layers = read_item(item)[1]
    objects = object_ids(layers)
    assert len(objects) == len({object_id for _, object_id, _ in objects}) == 800
    assert sorted({area_px for *_, area_px in objects}) == ([4, 12] if vessel == "visible" else [4, 16])
    assert len(layers) == (1 if vessel == "visible" else 2)
    for material in (1, 255, 256, 400):
        assert np.array_equal(layers[0] == material, materials == material)
        of_vessel = (layers == material + 400).any(0)
        assert np.array_equal(of_vessel, (vessels == material) & ((materials == 0) | (vessel == "full")))


def test_labpics_with_no_background_and_with_no_objects(tmp_path):
    ones, nothing = np.ones((8, 10), int), np.zeros((8, 10), int)
    write_labpics(tmp_path, ones, nothing, stem="full")
    write_labpics(tmp_path, nothing, nothing, stem="none")
    full, none = list_all("labpics", tmp_path, **LABPICS)
    assert object_ids(full.read().layers) == [(0, 1, 80)]
    assert object_ids(none.read().layers) == [] and none.read().layers.shape == (1, 8, 10)


def test_labpics_splits_are_its_folders(tmp_path):
    write_labpics(tmp_path, np.ones((8, 10), int), np.zeros((8, 10), int))
    shutil.copytree(tmp_path / "Simple" / "Train", tmp_path / "Simple" / "Test")
    shutil.copytree(tmp_path / "Simple", tmp_path / "Complex")
    train_items, val_items = split_items(**data_keys("labpics", tmp_path))
    assert [item.name for item in train_items] == ["Complex/Train/a", "Simple/Train/a"]
    assert [item.name for item in val_items] == ["Complex/Test/a", "Simple/Test/a"]
    with pytest.raises(ValueError, match="data.vessel is 'ful'; must be visible .* or full"):
        list_all("labpics", tmp_path, vessel="ful")
    shutil.rmtree(tmp_path / "Complex")
    with pytest.raises(FileNotFoundError, match=r"no folder .*Complex/Train/Image"):
        list_all("labpics", tmp_path)


def test_labpics_refuses_a_grey_instance_file(tmp_path):
    write_picture(tmp_path / "Simple" / "Train" / "Image" / "a.jpg")
    write_png(tmp_path / "Simple" / "Train" / "Instance" / "a.png", np.ones((8, 10), np.uint8))
    (item,) = list_all("labpics", tmp_path, **LABPICS)
    with pytest.raises(ValueError, match=r"a\.png has one channel; must be RGB"):
        read_item(item)


# ---------------------------------------------------------------------------------------------------------------------
# masks that may overlap: one file each, COCO, SA-1B


def overlapping_masks(num_masks: int, height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    masks = []
    for _ in range(num_masks):
        mask = np.zeros((height, width), bool)
        y, x = rng.integers(0, height - 4), rng.integers(0, width - 4)
        mask[y : y + rng.integers(2, 9), x : x + rng.integers(2, 9)] = rng.random() < 0.95
        masks.append(mask)
    return masks


def assert_layers_hold(layers: np.ndarray, masks: list[np.ndarray]) -> None:
    """Each mask is whole in exactly one layer, under its number; nothing else is there."""
    assert layers.dtype == np.int32
    for index, mask in enumerate(masks):
        holders = [ids for ids in layers if (ids == index + 1).any()]
        assert len(holders) == mask.any()
        if len(holders):
            assert np.array_equal(holders[0] == index + 1, mask)
    assert set(np.unique(layers)) <= set(range(len(masks) + 1))


def rle_of(mask: np.ndarray, is_compressed: bool) -> dict:
    if is_compressed:
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    counts, value = [0], False
    for pixel in mask.ravel(order="F").tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def write_sa1b(path: Path, masks: list[np.ndarray]) -> None:
    """Write the annotations of a picture, with ids from 40 on."""
    height, width = masks[0].shape
    annotations = [{"id": 40 + index, "segmentation": rle_of(mask, True)} for index, mask in enumerate(masks)]
    path.write_text(json.dumps({"image": {"height": height, "width": width}, "annotations": annotations}))


def test_masks_per_file_keeps_overlapping_masks_whole(tmp_path):
    masks = overlapping_masks(30, 24, 32)
    write_picture(tmp_path / "x" / "images" / "picture.png", 24, 32)
    for index, mask in enumerate(masks):
        write_png(tmp_path / "x" / "masks" / f"{index:02d}.png", mask.astype(np.uint8) * (255 if index % 2 else 1))
    (item,) = list_all("masks_per_file", tmp_path, val_fraction=0)
    layers = read_item(item)[1]
    assert_layers_hold(layers, masks)
    assert 2 <= len(layers) <= 8


def test_masks_that_interlock_without_overlap_share_a_layer(tmp_path):
    write_picture(tmp_path / "x" / "images" / "x.png")
    ring = np.ones((8, 10), np.uint8)
    ring[2:6, 2:8] = 0
    for index, mask in enumerate([1 - ring, ring]):
        write_png(tmp_path / "x" / "masks" / f"{index}.png", mask)
    (item,) = list_all("masks_per_file", tmp_path, val_fraction=0)
    layers = item.read().layers
    assert len(layers) == 1
    assert_layers_hold(layers, [ring == 0, ring > 0])


def test_masks_per_file_without_masks_has_no_objects(tmp_path):
    write_picture(tmp_path / "x" / "images" / "x.png")
    (tmp_path / "x" / "masks").mkdir()
    (item,) = list_all("masks_per_file", tmp_path, val_fraction=0)
    layers = item.read().layers
    assert layers.shape == (1, 8, 10) and not layers.any()


def test_a_folder_of_two_pictures_is_a_fault_of_its_own(tmp_path):
    """It ended check=true and on_bad=skip."""
    for name in ("x/images/a.png", "x/images/b.png", "y/images/a.png"):
        write_picture(tmp_path / name)
        write_png(tmp_path / name[0] / "masks" / "1.png", np.ones((8, 10), np.uint8))
    report = check_items(list_all("masks_per_file", tmp_path), check_item)
    assert [item.name for item in report.usable] == ["y"] and "x/images holds 2 pictures" in report.bad[0].faults[0]


def test_masks_of_different_sizes_are_named(tmp_path):
    write_picture(tmp_path / "x" / "images" / "x.png")
    write_png(tmp_path / "x" / "masks" / "a.png", np.ones((8, 10), np.uint8))
    write_png(tmp_path / "x" / "masks" / "b.png", np.ones((8, 11), np.uint8))
    (item,) = list_all("masks_per_file", tmp_path, val_fraction=0)
    with pytest.raises(ValueError, match=r"b\.png is 8 x 11 px.*a\.png is 8 x 10"):
        item.read()


def write_coco(root: Path, masks: list[np.ndarray]) -> list[np.ndarray]:
    """One picture; the masks as run lengths of both kinds, two polygons, and a crowd. Returns the expected masks."""
    height, width = masks[0].shape
    write_picture(root / "pictures" / "one.jpg", height, width)
    polygons = [[2.5, 3, 20.2, 4, 11, 18], [22.0, 5, 30, 5, 30, 15, 22, 15]]
    segmentations = [rle_of(mask, index % 2 == 0) for index, mask in enumerate(masks)] + [polygons]
    annotations = [
        {"id": 100 + index, "image_id": 7, "iscrowd": 0, "segmentation": segmentation}
        for index, segmentation in enumerate(segmentations)
    ]
    annotations.insert(1, {"id": 99, "image_id": 7, "iscrowd": 1, "segmentation": rle_of(masks[0], False)})
    images = [{"id": 7, "file_name": "one.jpg", "height": height, "width": width}]
    (root / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)
    return [*masks, drawn]


COCO = {
    "train_images": "pictures",
    "train_annotations": "instances.json",
    "val_annotations": None,
    "val_fraction": 0,
}


def test_coco_reads_polygons_and_both_run_lengths_and_leaves_crowds_out(tmp_path):
    masks = write_coco(tmp_path, overlapping_masks(20, 24, 32))
    (item,) = list_all("coco", tmp_path, **COCO)
    assert item.read().num_crowd == 1
    assert_layers_hold(read_item(item)[1], masks)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (None, "annotation 5: has no segmentation"),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "annotation 5: a polygon is 1.0"),
        ({"size": [8, 10], "counts": [79]}, "annotation 5: run lengths add up to 79"),
        ({"size": [8, 10]}, "annotation 5: 'counts'"),
    ],
)
def test_coco_leaves_out_the_broken_annotation_and_names_it(tmp_path, segmentation, reason):
    write_picture(tmp_path / "pictures" / "one.jpg")
    annotations = [{"id": 5, "image_id": 1, "segmentation": segmentation}]
    images = [{"id": 1, "file_name": "one.jpg", "height": 8, "width": 10}]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (item,) = list_all("coco", tmp_path, **COCO)
    (which,) = item.read().broken
    assert re.search(rf"instances\.json, image one\.jpg, {reason}", which)
    annotations[0]["segmentation"] = {"size": [8, 9], "counts": [72]}  # of another picture: that is the picture's fault
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (item,) = list_all("coco", tmp_path, **COCO)
    with pytest.raises(ValueError, match=r"annotation 5: its mask is \[8, 9\] px, but the picture is \[8, 10\]"):
        item.read()


def test_json_that_is_not_coco_is_named(tmp_path):
    write_picture(tmp_path / "pictures" / "one.jpg")
    texts = {'{"image": {}}': ": no 'annotations' in", '{"image": ': " is not valid json", "[1]": " holds a json list"}
    for text, reason in texts.items():
        (tmp_path / "instances.json").write_text(text)
        with pytest.raises(ValueError, match=rf"instances\.json{reason}"):
            list_all("coco", tmp_path, **COCO)


def test_a_picture_listed_twice_is_refused(tmp_path):
    write_picture(tmp_path / "pictures" / "one.jpg")
    images = [{"id": index, "file_name": "one.jpg", "height": 8, "width": 10} for index in range(2)]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": []}))
    with pytest.raises(ValueError, match=r"lists pictures/one\.jpg 2 times; names must be unique"):
        list_all("coco", tmp_path, **COCO)


@pytest.mark.parametrize("folders", [(".", "."), ("photos", "masks")])
def test_sa1b_reads_the_json_beside_the_picture(tmp_path, folders):
    masks = overlapping_masks(25, 24, 32)
    image_dir, annotation_dir = folders
    write_picture(tmp_path / image_dir / "sa_1.jpg", 24, 32)
    (tmp_path / annotation_dir).mkdir(exist_ok=True)
    write_sa1b(tmp_path / annotation_dir / "sa_1.json", masks)
    (item,) = list_all("sa1b", tmp_path, val_fraction=0, image_dir=image_dir, annotation_dir=annotation_dir)
    assert_layers_hold(read_item(item)[1], masks)


def write_labelme(path: Path, shapes: list[dict], orig_hw: tuple[int, int] | None = (24, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": "5.4.1", "flags": {}, "imagePath": f"{path.stem}.jpg", "imageData": None, "shapes": shapes}
    path.write_text(json.dumps(content | dict(zip(("imageHeight", "imageWidth"), orig_hw or (), strict=False))))


def test_labelme_reads_every_shape_that_covers_pixels(tmp_path):
    polygon = [[2, 3], [12.5, 3], [12.5, 9], [2, 9]]
    part = np.zeros((4, 5), np.uint8)
    part[1:, 2:] = 1
    encoded = base64.b64encode(cv2.imencode(".png", part)[1].tobytes()).decode()
    shapes = [
        {"label": "cell", "shape_type": "polygon", "points": polygon, "group_id": None},
        {"label": "cell", "shape_type": "rectangle", "points": [[30, 20], [25, 12]], "group_id": 4},
        {"label": "cell", "shape_type": "circle", "points": [[18, 8], [18, 11]], "group_id": 4},  # with the rectangle
        {"label": "debris", "shape_type": "mask", "points": [[1, 15], [5, 18]], "mask": encoded},
        {"label": "debris", "shape_type": "line", "points": [[1, 1], [5, 5]], "group_id": None},
        {"label": "debris", "points": [[1, 1], [5, 5]]},
        {"label": "__ignore__", "shape_type": "polygon", "points": polygon},
    ]
    write_picture(tmp_path / "sub" / "a.jpg", 24, 32)
    write_labelme(tmp_path / "sub" / "a.json", shapes)
    write_picture(tmp_path / "b.jpg", 24, 32)
    write_labelme(tmp_path / "b.json", shapes[:1], None)
    first, second = list_all("labelme", tmp_path, val_fraction=0)
    instances = second.read()
    expected = [
        polygons_to_mask([np.ravel(polygon).tolist()], 24, 32),
        np.zeros((24, 32), bool),
        np.zeros((24, 32), bool),
    ]
    expected[1][12:20, 25:30] = True
    ys, xs = np.mgrid[:24, :32] + 0.5
    expected[1] |= (xs - 18) ** 2 + (ys - 8) ** 2 <= 9
    expected[2][15:19, 1:6] = part > 0
    assert (first.name, second.name) == ("b", "sub/a")
    assert_layers_hold(read_item(second)[1], expected)
    assert [annotation["category"] for annotation in instances.annotations] == ["cell", "cell", "debris"]
    assert (
        len(instances.broken) == 2
        and "shape 4 (debris): its shape_type is line, which covers no" in instances.broken[0]
    )
    assert_layers_hold(read_item(first)[1], expected[:1])  # the size is the picture's


@pytest.mark.parametrize(
    "shape, words",
    [
        ({"shape_type": "mask", "points": [[1, 1], [3, 3]], "mask": "AAAA"}, "its mask is no PNG"),
        ({"shape_type": "mask", "points": [[1, 1], [3, 3]], "mask": ""}, "its mask is no PNG"),
        ({"shape_type": "polygon"}, "it lacks 'points'"),
        ({"shape_type": "polygon", "points": None}, "its points are None"),
        ({"shape_type": "circle", "points": [[1, 1]]}, "it is a circle of 1 points; must be 2"),
    ],
)
def test_a_broken_shape_of_labelme_costs_itself(tmp_path, shape, words):
    write_picture(tmp_path / "a.jpg", 24, 32)
    box = {"label": "cell", "shape_type": "rectangle", "points": [[1, 1], [9, 9]]}
    write_labelme(tmp_path / "a.json", [shape | {"label": "bad"}, box])
    instances = list_all("labelme", tmp_path, val_fraction=0)[0].read()
    assert len(instances.annotations) == 1 and len(instances.broken) == 1
    assert words in instances.broken[0] and "shape 0 (bad)" in instances.broken[0]


def test_labels_and_groups_of_labelme_that_are_none(tmp_path):
    """Null was a class called None, and a list as a group ended in a traceback."""
    box = {"shape_type": "rectangle", "points": [[1, 1], [9, 9]]}
    shapes = [{"label": None, "group_id": ""} | box, {"label": "a", "group_id": ""} | box]
    turned = {"shape_type": "rotation", "points": [[5, 1], [9, 5], [5, 9], [1, 5]]}  # X-AnyLabeling's
    shapes[1] |= turned
    shapes += [{"label": "a", "group_id": group} | box for group in ([1], [1], 0, "0")]
    write_picture(tmp_path / "a.jpg", 24, 32)
    write_labelme(tmp_path / "a.json", shapes)
    (item,) = list_all("labelme", tmp_path, val_fraction=0)
    assert [class_name(annotation) for annotation in item.read().annotations] == ["", "a", "a", "a"]
    assert not item.read().broken


def test_a_mask_of_labelme_that_leaves_the_picture_is_cut_off(tmp_path):
    encoded = base64.b64encode(cv2.imencode(".png", np.ones((4, 5), np.uint8))[1].tobytes()).decode()
    write_picture(tmp_path / "a.jpg", 24, 32)
    shape = {"label": "cell", "shape_type": "mask", "points": [[-2, -1], [2, 2]], "mask": encoded}
    write_labelme(tmp_path / "a.json", [shape])
    expected = np.zeros((24, 32), bool)
    expected[:3, :3] = True
    assert_layers_hold(list_all("labelme", tmp_path, val_fraction=0)[0].read().layers, [expected])


@pytest.mark.parametrize("sides, words", [((0, 32), "must give both"), ((9**9, 9**9), "which are not those of")])
def test_a_size_that_cannot_be_is_said_before_a_mask_is_made(tmp_path, sides, words):
    write_picture(tmp_path / "a.jpg", 24, 32)
    write_labelme(tmp_path / "a.json", [{"label": "cell", "points": [[1, 1], [9, 9], [1, 9]]}], sides)
    with pytest.raises(ValueError, match=words):
        list_all("labelme", tmp_path, val_fraction=0)[0].read()


def test_labelme_gives_what_its_own_export_to_coco_gives(data_root):
    root = data_root / "COCO_labelme_voc3"
    ours = {Path(item.name).stem: item for item in list_all("labelme", root / "data_annotated", val_fraction=0)}
    keys = {"train_images": ".", "train_annotations": "annotations.json", "val_annotations": None, "val_fraction": 0}
    for item in list_all("coco", root / "data_dataset_coco", **keys):
        exported, instances = item.read(), ours[Path(item.name).stem].read()
        count = len(exported.annotations)
        assert len(instances.annotations) == count and not instances.broken
        theirs = [(exported.layers == i + 1).any(0) for i in range(count)]
        for number, annotation in enumerate(instances.annotations):
            mask = (instances.layers == number + 1).any(0)
            ious = [(mask & other).sum() / (mask | other).sum() for other in theirs]
            best = int(np.argmax(ious))
            assert ious[best] > 0.97 and exported.annotations[best]["category"] == annotation["category"]


def test_the_check_counts_classes_and_names_what_looks_like_a_slip(tmp_path):
    box = {"shape_type": "rectangle", "points": [[1, 1], [9, 9]]}
    for name, labels in (("a", ["cell", "cell", "Cell "]), ("b", ["cell", "debris", ""])):
        write_picture(tmp_path / f"{name}.jpg", 24, 32)
        write_labelme(tmp_path / f"{name}.json", [box | {"label": label} for label in labels])
    lines = report_lines(check_items(list_all("labelme", tmp_path), check_item))
    assert "classes, objects (pictures): cell 3 (2), Cell  1 (1), debris 1 (1)" in lines
    assert "1 objects have no class: b" in lines
    assert "'Cell ' and 'cell' differ in case or spaces alone: are they one class?" in lines
    assert not any("classes without objects" in line for line in lines)  # labelme lists none
    write_coco(tmp_path / "coco", [np.ones((24, 32), bool)])
    content = json.loads((tmp_path / "coco" / "instances.json").read_text())
    content["categories"] = [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}]
    content["annotations"][0]["category_id"] = 3
    (tmp_path / "coco" / "instances.json").write_text(json.dumps(content))
    lines = report_lines(check_items(list_all("coco", tmp_path / "coco", **COCO), check_item))
    assert "classes without objects: cat, cow" in lines and "1 objects have no class: pictures/one.jpg" in lines
    write_label_maps(tmp_path / "maps")
    lines = report_lines(check_items(list_all("label_map", tmp_path / "maps"), check_item))
    assert not any(line.startswith("classes") or "no class" in line for line in lines)


@pytest.mark.parametrize("layout", ["ultralytics", "roboflow", "moved"])
def test_yolo_reads_polygons_where_its_tools_put_them(tmp_path, layout):
    folders = {"train": "train/images", "val": "valid/images"} if layout == "roboflow" else {}
    folders = folders or {"train": "images/train", "val": "images/val"}
    content = {"names": {0: "cell", 1: "debris"} if layout == "moved" else ["cell", "debris"], "nc": 2}
    content |= {key: f"../{folder}" if layout == "roboflow" else folder for key, folder in folders.items()}
    content |= {"path": "/home/somebody/else"} if layout == "moved" else {}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    lines = "1 0.125 0.25 0.5 0.25 0.5 0.75 0.125 0.75\n\n0 0.5 0.5 0.2 0.2\n7 0 0 1 0 1 1\n"
    lines += "0 12 30 40 30 40 50\n0 0 0 1 1\n"
    for folder in folders.values():
        for name in ("a", "b"):
            write_picture(tmp_path / folder / f"{name}.jpg", 24, 32)
        path = tmp_path / folder.replace("images", "labels") / "a.txt"
        path.parent.mkdir(parents=True)
        path.write_text(lines)
    train_items, val_items = split_items(**data_keys("yolo", tmp_path))
    assert len(train_items) == len(val_items) == 2
    instances, empty = (item.read() for item in val_items)
    expected = np.zeros((24, 32), bool)
    expected[6:18, 4:16] = True
    assert_layers_hold(instances.layers, [expected])
    assert instances.annotations == ({"category_id": 1, "category": "debris"},)
    assert empty.layers.shape == (1, 24, 32) and not empty.layers.any() and not empty.broken
    reasons = ["a box alone is no mask", "class 7 is not among the names, 0 to 1", "50 is no share", "a box alone"]
    assert len(instances.broken) == 4
    assert all(reason in broken for reason, broken in zip(reasons, instances.broken, strict=True))


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no file .*data.yaml"),
        ({"train": "images"}, "must have names"),
        ({"names": ["a"]}, "must have names, a list or numbers with names, and train"),
        ({"names": ["a"], "train": None, "val": "x"}, "must have names, a list or numbers with names, and train"),
        ({"names": ["a"], "train": "elsewhere"}, "train is elsewhere, and no such folder is below"),
        ({"names": ["a"], "train": [3]}, "train is 3, and no such folder is below"),
        ({"names": ["a"], "train": "x", "path": 7}, "train is x, and no such folder is below"),
        ("names: [a", "is no valid YAML"),
        ("just words", "must have names"),
    ],
)
def test_a_data_yaml_that_leads_nowhere_is_one_line(tmp_path, content, words):
    if content is not None:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (tmp_path / "data.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        list_all("yolo", tmp_path)


def test_yolo_reads_list_files(tmp_path):
    """Paths from the list's folder, from the dataset's, and those of the disk that they came from."""
    for name in ("a", "b", "c", "été 1", "e"):
        write_picture(tmp_path / "sub" / "images" / f"{name}.jpg", 24, 32)
        path = tmp_path / "sub" / "labels" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("0 0.125 0.25 0.5 0.25 0.5 0.75 0.125 0.75\n")
    lines = ["./images/a.jpg", "sub/images/b.jpg", f"{tmp_path}/sub/images/c.jpg", "/home/me/sub/images/été 1.jpg"]
    (tmp_path / "sub" / "train.txt").write_text("\n".join([*lines, "sub\\images\\a.jpg", ""]))
    (tmp_path / "val.txt").write_text("sub/images/e.jpg\n")
    content = {"path": ".", "train": ["sub/train.txt"], "val": "./val.txt", "nc": 2}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    train_items, val_items = split_items(**data_keys("yolo", tmp_path))
    assert sorted({item.image_path.stem for item in train_items}) == ["a", "b", "c", "été 1"]
    assert [item.image_path.name for item in val_items] == ["e.jpg"]
    assert {item.read().annotations[0]["category"] for item in train_items} == {"class_0"}
    assert train_items[0].classes == ("class_0", "class_1")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content | {"names": {0: "cell", None: "x", "b": "y"}, "nc": 1}))
    assert split_items(**data_keys("yolo", tmp_path))[0][0].classes == ("cell",)
    (tmp_path / "val.txt").write_text("sub/images/gone.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"has no image .*images/gone\.jpg"):
        split_items(**data_keys("yolo", tmp_path))


def test_yolo_labels_beside_pictures_below_a_folder_images(tmp_path):
    """/data/images/cells/train/a.jpg has them there, too: all its pictures were taken to have no objects."""
    root = tmp_path / "images" / "cells"
    write_picture(root / "train" / "a.jpg")
    (root / "train" / "a.txt").write_text("0 0 0 1 0 1 1")
    (root / "data.yaml").write_text("{names: [cell], train: train}")
    (item,) = list_all("yolo", root, val_fraction=1)
    assert item.annotation_path == root / "train" / "a.txt" and len(item.read().annotations) == 1


@pytest.mark.parametrize("data_yaml", ["data.yaml", "sub/data.yaml"])
def test_yolo_whose_val_is_train_is_split_by_a_fraction_or_lists(tmp_path, data_yaml):
    for name in "abcd":
        write_picture(tmp_path / "sub" / "images" / f"{name}.jpg")
    place = "images" if data_yaml == "sub/data.yaml" else "sub\\images"
    (tmp_path / data_yaml).write_text(yaml.safe_dump({"names": ["cell"], "train": place, "val": place}))
    keys = data_keys("yolo", tmp_path, data_yaml=data_yaml, val_fraction=0.25)
    assert [len(items) for items in split_items(**keys)] == [3, 1]
    (tmp_path / "val.txt").write_text("a\nb.jpg\n")
    train_items, val_items = split_items(**keys | {"val_list": str(tmp_path / "val.txt")})
    assert [item.image_path.name for item in val_items] == ["a.jpg", "b.jpg"] and len(train_items) == 2


@pytest.mark.parametrize("layout", ["names alone", "names with folders", "of another disk"])
def test_one_coco_file_of_two_folders(tmp_path, layout):
    starts = {"names with folders": ("train/", "val\\"), "of another disk": ("/x/train/", "C:\\val\\")}
    start = starts.get(layout, ("", ""))
    for folder, names in (("train", "ab"), ("val", "c")):
        for name in names:
            write_picture(tmp_path / folder / f"{name}.jpg")
    images = [
        {"id": number, "file_name": f"{start[name == 'c']}{name}.jpg", "height": 8, "width": 10}
        for number, name in enumerate("abc")
    ]
    path = tmp_path / "all.json"
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 2, "name": "cell"}]}))
    keys = data_keys("coco", tmp_path, train_images="train", val_images="val", train_annotations="all.json")
    train_items, val_items = split_items(**keys | {"val_annotations": "./all.json"})
    assert [[item.image_path for item in items] for items in (train_items, val_items)] == [
        [tmp_path / "train" / "a.jpg", tmp_path / "train" / "b.jpg"], [tmp_path / "val" / "c.jpg"]
    ]  # fmt: skip
    assert val_items[0].classes == ("cell",)
    if layout == "names alone":
        shutil.copy(tmp_path / "val" / "c.jpg", tmp_path / "train" / "c.jpg")
        with pytest.raises(ValueError, match=r"c\.jpg lies in train and in val; put the folder before the file_name"):
            split_items(**keys | {"val_annotations": "all.json"})
        (tmp_path / "val" / "c.jpg").unlink()
        (tmp_path / "train" / "b.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no image .*train/b\.jpg"):
            split_items(**keys | {"val_annotations": "all.json"})


def test_one_coco_file_of_one_folder_is_split_by_a_fraction_or_lists(tmp_path):
    images = []
    for number, name in enumerate(("a/1", "a/2", "b/1", "b/2")):
        write_picture(tmp_path / "pictures" / f"{name}.jpg")
        images.append({"id": number, "file_name": f"{name}.jpg", "height": 8, "width": 10})
    (tmp_path / "all.json").write_text(json.dumps({"images": images, "annotations": []}))
    keys = data_keys("coco", tmp_path, train_images="pictures", val_images="pictures", train_annotations="all.json")
    keys |= {"val_annotations": "all.json", "val_fraction": 0.5}
    assert [len(items) for items in split_items(**keys)] == [2, 2]
    (tmp_path / "val.txt").write_text("a/2.jpg\npictures/b/1.jpg\n")
    _, val_items = split_items(**keys | {"val_list": str(tmp_path / "val.txt")})
    assert [item.name for item in val_items] == ["pictures/a/2.jpg", "pictures/b/1.jpg"]


@pytest.mark.parametrize("format", ["yolo", "coco"])
def test_a_picture_that_trains_and_validates_under_two_names_is_refused(tmp_path, format):
    """A list of absolute paths, or a folder named in another way, let a run be validated on what it trains on."""
    record = {"images": [], "annotations": []}
    for number in range(2):
        write_picture(tmp_path / "images" / f"{number}.jpg")
        record["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 8, "width": 10})
    keys = data_keys(format, tmp_path)
    if format == "yolo":
        (tmp_path / "val.txt").write_text(f"{tmp_path}/images/1.jpg\n")
        (tmp_path / "data.yaml").write_text("{names: [cell], train: images, val: val.txt}")
    else:
        (tmp_path / "train.json").write_text(json.dumps(record))
        (tmp_path / "val.json").write_text(json.dumps(record | {"images": record["images"][1:]}))
        keys |= {"train_images": "images", "train_annotations": "train.json"}
        keys |= {"val_images": "../" + tmp_path.name + "/images", "val_annotations": "val.json"}
    with pytest.raises(ValueError, match=r"1\.jpg is a training picture, images/1.*, and a validation picture, .*/1"):
        split_items(**keys)


def test_labelme_files_name_their_pictures(tmp_path):
    box = {"label": "cell", "shape_type": "rectangle", "points": [[1, 1], [9, 9]]}
    for name in ("photos/one.jpg", "photos/two.jpg"):
        write_picture(tmp_path / name, 24, 32)
    for path, image_path in {"jsons/one.json": "../photos/one.jpg", "jsons/2.json": "..\\photos\\two.jpg"}.items():
        write_labelme(tmp_path / path, [box])
        content = json.loads((tmp_path / path).read_text()) | {"imagePath": image_path}
        (tmp_path / path).write_text(json.dumps(content))
    for image_dir in ("jsons", "photos"):  # none there; and one of another name
        items = list_all("labelme", tmp_path, image_dir=image_dir, annotation_dir="jsons")
        pictures = {item.annotation_path.name: item.image_path.name for item in items}
        assert pictures == {"one.json": "one.jpg", "2.json": "two.jpg"}
    (tmp_path / "photos" / "two.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation .*2\.json has no image .*2\.jpg"):
        list_all("labelme", tmp_path, image_dir="photos", annotation_dir="jsons")


def test_cvat_reads_every_shape_that_covers_pixels(tmp_path):
    polygon = [2, 3, 12.5, 3, 12.5, 9, 2, 9]
    points = ";".join(f"{x},{y}" for x, y in zip(polygon[::2], polygon[1::2], strict=True))
    (tmp_path / "annotations.xml").write_text(f"""<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><id>1</id></task></meta>
<image id="0" name="sub/a.jpg" width="32" height="24">
  <polygon label="cell" occluded="0" points="{points}" z_order="0"></polygon>
  <box label="cell" xtl="25" ytl="12" xbr="30" ybr="20" group_id="4"></box>
  <ellipse label="cell" cx="18" cy="8" rx="3" ry="2" group_id="4"></ellipse>
  <mask label="debris" rle="1,3,2,6" left="1" top="15" width="4" height="3"></mask>
  <mask label="debris" rle="1,3" left="1" top="15" width="4" height="3"></mask>
  <polyline label="debris" points="1,1;5,5"></polyline>
  <box label="turned" xtl="4" ytl="4" xbr="12" ybr="6" rotation="90"></box>
  <ellipse label="turned" cx="20" cy="16" rx="4" ry="1.5" rotation="90"></ellipse>
  <mask label="turned" rle="0,6" left="-1" top="-1" width="3" height="2"></mask>
  <polygon label="debris"></polygon>
</image>
<image id="1" name="b.jpg" width="32" height="24"></image>
</annotations>""")
    for name in ("sub/a.jpg", "b.jpg"):
        write_picture(tmp_path / "images" / name, 24, 32)
    empty, item = list_all("cvat", tmp_path, val_fraction=0)
    assert (empty.name, item.name) == ("b.jpg", "sub/a.jpg") and not empty.read().layers.any()
    instances = item.read()
    expected = [polygons_to_mask([polygon], 24, 32), *np.zeros((5, 24, 32), bool)]
    ys, xs = np.mgrid[:24, :32] + 0.5
    expected[3][1:9, 7:9] = True  # upright: its corners turned by a quarter about its centre, (8, 5)
    expected[4] = ((xs - 20) / 1.5) ** 2 + ((ys - 16) / 4) ** 2 <= 1
    expected[5][0, :2] = True  # the part of it that lies in the picture
    expected[1][12:20, 25:30] = True
    expected[1] |= ((xs - 18) / 3) ** 2 + ((ys - 8) / 2) ** 2 <= 1
    expected[2][15:18, 1:5] = np.array([0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1], bool).reshape(3, 4)
    assert_layers_hold(read_item(item)[1], expected)
    categories = [annotation["category"] for annotation in instances.annotations]
    assert categories == ["cell", "cell", "debris", "turned", "turned", "turned"]
    assert "shape 4 (debris): its runs are of 4 pixels, and its box of 4 x 3" in instances.broken[0]
    assert "shape 5 (debris): it is a polyline, which covers no pixels" in instances.broken[1]
    assert "shape 9 (debris): it lacks 'points'" in instances.broken[2] and len(instances.broken) == 3
    (tmp_path / "annotations.xml").write_text("<annotations><track id='0'/></annotations>")
    with pytest.raises(ValueError, match="has no <image>; export as CVAT for images"):
        list_all("cvat", tmp_path)
    (tmp_path / "annotations.xml").write_text("<annotations>")
    with pytest.raises(ValueError, match="is no valid xml"):
        list_all("cvat", tmp_path)


def test_voc_gives_the_objects_that_labelme_gives(data_root):
    """Both were made from the same polygons, VOC's by another painter."""
    root, num_objects = data_root / "COCO_labelme_voc3", 0
    names = (root / "data_dataset_voc" / "class_names.txt").read_text().splitlines()[1:]
    drawn = {item.name: item for item in list_all("labelme", root / "data_annotated", val_fraction=0)}
    changes = {"image_dir": "../data_annotated", "class_names": names}
    for item in list_all("voc", root / "data_dataset_voc", val_fraction=0, **changes):
        instances, others = item.read(), drawn[item.name].read()
        theirs = [(others.layers == i + 1).any(0) for i in range(len(others.annotations))]
        for number, annotation in enumerate(instances.annotations):
            mask = (instances.layers == number + 1).any(0)
            covered = [(mask & other).sum() / mask.sum() for other in theirs]  # where they overlap, one is on top
            best = int(np.argmax(covered))
            assert covered[best] > 0.9 and others.annotations[best]["category"] == annotation["category"]
            num_objects += 1
    assert num_objects == 12


def test_voc_outlines_are_no_objects(tmp_path):
    ids, classes = np.zeros((2, 12, 16), np.uint8)
    ids[2:8, 3:9], ids[2:8, 9], ids[9:11, 1:4] = 1, 255, 7
    classes[2:8, 3:9], classes[2:8, 9], classes[9:11, 1:4] = 15, 255, 40
    write_png(tmp_path / "SegmentationObject" / "a.png", ids)
    write_png(tmp_path / "SegmentationClass" / "a.PNG", classes)
    write_picture(tmp_path / "JPEGImages" / "a.jpg", 12, 16)
    write_picture(tmp_path / "JPEGImages" / "b.jpg", 12, 16)  # most of VOC's pictures have no maps
    (item,) = list_all("voc", tmp_path, val_fraction=0)
    instances = item.read()
    assert_layers_hold(instances.layers, [ids == 1, ids == 7])
    assert instances.annotations == ({"category_id": 15, "category": "person"}, {"category_id": 40})
    with pytest.raises(ValueError, match="class_names begins with '_background_', which is 0"):  # as labelme's list
        list_all("voc", tmp_path, class_names=["_background_", "cat"])


# ---------------------------------------------------------------------------------------------------------------------
# splits


def test_a_seeded_fraction_depends_on_seed_and_names_only(tmp_path):
    def val_names(root: Path, **changes) -> list[str]:
        train_items, val_items = split_items(**data_keys("label_map", root, **{"val_fraction": 0.25, **changes}))
        assert not {item.name for item in train_items} & {item.name for item in val_items}
        assert len(train_items) + len(val_items) == len(list((root / "images").iterdir()))
        return [item.name for item in val_items]

    first = write_label_maps(tmp_path / "first", 20)
    second = write_label_maps(tmp_path / "second", 20, suffix=".png")  # other folder, other suffix: the same names
    assert len(val_names(first)) == 5
    assert val_names(first) == val_names(first) == val_names(second) == sorted(val_names(first))
    assert val_names(first) != val_names(first, split_seed=1)


def test_list_files_make_the_split(tmp_path):
    root = write_label_maps(tmp_path, 5)
    (tmp_path / "train.txt").write_text("000\n\n# a comment\n001.jpg\nimages/002.jpg labels/002.png\n")
    (tmp_path / "val.txt").write_text("003\r\n")
    lists = {"train_list": str(tmp_path / "train.txt"), "val_list": str(tmp_path / "val.txt")}

    def names(**changes) -> list[list[str]]:
        return [[item.name for item in part] for part in split_items(**data_keys("label_map", root, **changes))]

    assert names(**lists) == [["000", "001", "002"], ["003"]]
    assert names(val_list=lists["val_list"]) == [["000", "001", "002", "004"], ["003"]]
    assert names(train_list=lists["train_list"]) == [["000", "001", "002"], ["003", "004"]]
    (tmp_path / "val.txt").write_text("001\n")
    with pytest.raises(ValueError, match=r"train\.txt and .*val\.txt both name 001"):
        names(**lists)
    (tmp_path / "val.txt").write_text("nine\n")
    with pytest.raises(ValueError, match=r"val\.txt names 'nine', which the dataset lacks; names look like '000'"):
        names(**lists)
    with pytest.raises(FileNotFoundError, match="no list file gone.txt"):
        names(val_list="gone.txt")


def test_davis_never_divides_a_sequence(tmp_path):
    for sequence in ("a", "b", "c", "d"):
        for frame in range(3):
            write_picture(tmp_path / "JPEGImages" / "480p" / sequence / f"{frame:05d}.jpg")
            ids = np.zeros((8, 10), np.uint8)
            ids[2:4], ids[5:] = 1, 38
            if frame != 1 or sequence != "b":  # a frame between annotated ones is no item
                write_png(tmp_path / "Annotations" / "480p" / sequence / f"{frame:05d}.png", ids)
    train_items, val_items = split_items(**data_keys("davis", tmp_path, val_fraction=0.5))
    assert len(train_items) + len(val_items) == 11
    sequences = [{item.name.split("/")[0] for item in part} for part in (train_items, val_items)]
    assert not sequences[0] & sequences[1] and len(sequences[0]) == len(sequences[1]) == 2
    assert object_ids(read_item(train_items[0])[1]) == [(0, 1, 20), (0, 38, 30)]
    (tmp_path / "train.txt").write_text("a\nc\n")  # DAVIS 2017
    (tmp_path / "val.txt").write_text("/JPEGImages/480p/b/00000.jpg /Annotations/480p/b/00000.png\n")  # DAVIS 2016
    lists = {"train_list": str(tmp_path / "train.txt"), "val_list": str(tmp_path / "val.txt")}
    train_items, val_items = split_items(**data_keys("davis", tmp_path, **lists))
    assert {item.group for item in train_items} == {"a", "c"}
    assert [item.name for item in val_items] == ["b/00000", "b/00002"]


# ---------------------------------------------------------------------------------------------------------------------
# faults


def test_keys_formats_and_roots_that_are_wrong(tmp_path):
    keys = data_keys("label_map", write_label_maps(tmp_path))
    for change, error, message in [
        ({"lable_dir": "labels"}, ValueError, "unknown key data.lable_dir; must be among data.image_dir"),
        ({"format": "cocoo"}, ValueError, "data.format is 'cocoo'; must be one of labpics, label_map"),
        ({"root": "nowhere"}, FileNotFoundError, "data.root nowhere is not a folder .*DATA_ROOT"),
        ({"on_bad": "ignore"}, ValueError, "data.on_bad is 'ignore'; must be stop or skip"),
    ]:
        with pytest.raises(error, match=message):
            split_items(**keys | change)
    with pytest.raises(ValueError, match="the config lacks data.split_seed"):
        check_keys(split_items, {key: value for key, value in keys.items() if key != "split_seed"}, "data")
    whole = split_items(**keys)  # a key of the format that is not given is that of the layout
    assert split_items(**{key: value for key, value in keys.items() if key != "label_dir"}) == whole
    for folder in ("images", "labels"):
        shutil.rmtree(tmp_path / folder)
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match="holds no pictures in the layout 'label_map'"):
        split_items(**keys)


def test_root_is_relative_to_where_the_user_stands(tmp_path, monkeypatch):
    write_label_maps(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert len(list_all("label_map", Path("mine"))) == 4


PATHS = {  # of a picture and its annotation in each layout
    "label_map": ("images/{}.jpg", "labels/{}.png"),
    "labpics": ("Simple/Train/Image/{}.jpg", "Simple/Train/Instance/{}.png"),
    "masks_per_file": ("{0}/images/{0}.png", "{0}/masks/0.png"),
    "sa1b": ("{}.jpg", "{}.json"),
    "davis": ("JPEGImages/480p/{}/00000.jpg", "Annotations/480p/{}/00000.png"),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_picture_without_annotation_stops_or_is_left_out_and_counted(tmp_path, name):
    for stem in ("a", "b"):
        image_path, annotation_path = (tmp_path / path.format(stem) for path in PATHS[name])
        write_picture(image_path)
        if name == "sa1b":
            write_sa1b(annotation_path, [np.ones((8, 10), bool)])
        else:
            write_png(annotation_path, np.ones((8, 10, 3), np.uint8))
    gone = annotation_path.parent if name in ("masks_per_file", "davis") else annotation_path
    annotation_path.unlink()
    if gone.is_dir():
        gone.rmdir()
    changes = LABPICS if name == "labpics" else {}
    pattern = f"1 of 2 pairs lack a file; image {image_path} has no annotation {gone}"
    with pytest.raises(FileNotFoundError, match=re.escape(pattern)):
        list_all(name, tmp_path, **changes)
    items = list_all(name, tmp_path, **changes, on_bad="skip")
    report = check_items(items, check_item)
    assert count(report)["num_bad"] == 1 and count(report)["num_usable"] == 1
    assert [item.name for item in keep_usable(items, report, "skip")] == [items[0].name]


def test_an_annotation_without_picture_is_named(tmp_path):
    root = write_label_maps(tmp_path)
    (root / "images" / "002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation .*labels/002\.png has no image .*images/002"):
        list_all("label_map", root)
    write_coco(tmp_path, overlapping_masks(2, 24, 32))
    (tmp_path / "pictures" / "one.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation .*instances\.json has no image .*one\.jpg"):
        list_all("coco", tmp_path, **COCO)


def test_other_size_is_an_error_that_names_both_files(tmp_path):
    write_label_maps(tmp_path, 1)
    write_png(tmp_path / "labels" / "000.png", np.ones((8, 11), np.uint8))
    (item,) = list_all("label_map", tmp_path, val_fraction=0)
    with pytest.raises(ValueError, match=r"000\.jpg is 8 x 10 px .*000\.png is 8 x 11; export both at one size"):
        read_item(item)
    write_png(tmp_path / "labels" / "000.png", np.ones((10, 8), np.uint8))
    with pytest.raises(ValueError, match=r"000\.jpg is 8 x 10 px .*000\.png is 10 x 8; .*EXIF rotation"):
        read_item(item)


# ---------------------------------------------------------------------------------------------------------------------
# the dataset check


def write_faulty(root: Path) -> list[str]:
    """Twelve pictures with faults and oddities; returns the names of those that can be trained on."""
    write_label_maps(root, 12)
    images, labels = root / "images", root / "labels"
    (images / "000.jpg").write_bytes(b"")
    (images / "001.jpg").write_bytes((images / "001.jpg").read_bytes()[:-30])
    (labels / "002.png").write_text("no picture")
    write_png(labels / "003.png", np.ones((9, 10), np.uint8))
    write_png(labels / "004.png", np.zeros((8, 10), np.uint8))
    dark = (np.random.default_rng(0).integers(0, 4096, (8, 10))).astype(np.uint16)
    dark[0, 0] = 4095
    (images / "005.jpg").unlink()
    Image.fromarray(dark).save(images / "005.png")
    write_image(images / "006.jpg", np.full((8, 10, 3), 90, np.uint8))
    write_png(labels / "007.png", np.eye(8, 10, dtype=np.uint8) * 255)
    (images / "008.jpg").unlink()
    write_image(images / "008.png", np.random.default_rng(0).integers(0, 2, (8, 10, 3), dtype=np.uint8))
    write_png(labels / "009.png", np.dstack([np.eye(8, 10)] * 2 + [np.ones((8, 10))]).astype(np.uint8))
    return [f"{index:03d}" for index in (5, 6, 7, 8, 10, 11)]


def test_check_names_each_fault_and_its_remedy(tmp_path):
    usable = write_faulty(tmp_path)
    items = list_all("label_map", tmp_path)
    report = check_items(items, check_item)
    assert count(report) == {
        "num_checked": 12,
        "num_usable": 6,
        "num_bad": 5,
        "num_without_objects": 1,
        "num_objects": 11,
        "num_crowd": 0,
        "num_broken": 0,
    }
    text = "\n".join(report_lines(report, max_listed=None))
    for pattern in [
        r"checked 12 images: 6 usable, 5 bad, 1 without objects",
        r"pictures: 8 x 10 px \(height x width\); 9 of 8 bits, 1 of 16 bits",
        r"5 bad:",
        r"000\.jpg is empty \(0 bytes\); copy it again or remove it",
        r"001\.jpg is a JPEG that ends in the middle; copy it again",
        r"002\.png cannot be decoded as a picture",
        r"003\.jpg is 8 x 10 px \(height x width\), but its annotation .*003\.png is 9 x 10; export both",
        r"009\.png has 3 different channels.*turn each colour into one id",
        r"1 with no objects: left out of training.*\n  .*004\.png",
        r"2 with unused intensity range: .*\n  .*005\.png: largest value 4095 of 65535\n",
        r"008\.png: largest value 1 of 255",
        r"1 with one value all over: .*\n  .*006\.jpg: 90",
        r"1 with a single id 255: .*\n  .*007\.png",
        r"6 with objects below 16 px: (.|\n)*\n  .*007\.png \(007\): 255 \(8 px\)",
        r"masks per image: 1 to 2, mean 1\.8, median 2",
    ]:
        assert re.search(pattern, text), pattern
    with pytest.raises(ValueError, match=r"5 of 12 images cannot be used; .*data\.on_bad=skip(.|\n)*000\.jpg is empty"):
        keep_usable(items, report, "stop")
    assert [item.name for item in keep_usable(items, report, "skip")] == usable
    assert "... and 2 more" not in text
    assert any("... and 2 more" in line for line in report_lines(report, max_listed=3))


def test_a_clean_dataset_passes_and_loses_only_pictures_without_objects(tmp_path):
    write_label_maps(tmp_path, 4)
    write_png(tmp_path / "labels" / "002.png", np.zeros((8, 10), np.uint8))
    items = list_all("label_map", tmp_path)
    report = check_items(items, check_item)
    assert [item.name for item in keep_usable(items, report, "stop")] == ["000", "001", "003"]


@pytest.mark.parametrize("name", ["masks_per_file", "coco", "sa1b"])
def test_empty_masks_are_named(tmp_path, name):
    masks = [np.eye(24, 32) > 0, np.zeros((24, 32), bool), np.ones((24, 32), bool)]
    changes = {"val_fraction": 0}
    if name == "masks_per_file":
        write_picture(tmp_path / "x" / "images" / "x.png", 24, 32)
        for index, mask in enumerate(masks):
            write_png(tmp_path / "x" / "masks" / f"m{index}.png", mask.astype(np.uint8))
        expected = "m1.png"
    elif name == "coco":
        write_coco(tmp_path, masks)
        changes, expected = COCO, "annotation 101"
    else:
        write_picture(tmp_path / "x.jpg", 24, 32)
        write_sa1b(tmp_path / "x.json", masks)
        expected = "annotation 41"
    report = check_items(list_all(name, tmp_path, **changes), check_item)
    (what,) = [what for item in report.items for kind, what in item.remarks if kind == "empty masks"]
    assert what.endswith(f": {expected}")
    assert count(report)["num_usable"] == 1 and count(report)["num_crowd"] == (name == "coco")


@pytest.mark.parametrize("factor", [1, 20_000_000])  # the second: too large to count in a table
def test_centers_equal_a_plain_loop(tmp_path, factor):
    ids = np.random.default_rng(4).integers(1, 30, (8, 10)) * factor  # no background
    write_picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    write_label_map(tmp_path / "labels" / "a.png", ids)
    (item,) = check_items(list_all("label_map", tmp_path, val_fraction=0), check_item).items
    expected = [np.argwhere(ids == value).mean(0)[::-1] + 0.5 for value in np.unique(ids)]
    assert item.content.centers_xy == pytest.approx(np.array(expected) / [10, 8])
    assert item.content.areas_px.tolist() == [(ids == value).sum() for value in np.unique(ids)]


def test_statistics_equal_numbers_counted_by_hand(tmp_path):
    write_label_maps(tmp_path, 2)  # objects: 20 px around (2.5, 2), 12 px around (8, 6.5) of 10 x 8
    ids = np.ones((8, 10), np.uint8)
    write_png(tmp_path / "labels" / "001.png", ids)
    report = check_items(list_all("label_map", tmp_path), check_item)
    per_image, area_share, centers = measure_objects(report)
    assert per_image.tolist() == [2, 1] and area_share == pytest.approx([20 / 80, 12 / 80, 1])
    assert centers == pytest.approx(np.array([[0.25, 0.25], [0.8, 6.5 / 8], [0.5, 0.5]]))
    assert report_lines(report)[2:5] == [
        "masks per image: 1 to 2, mean 1.5, median 2",
        "mask area, share of the image: 16.000% / 25.000% / 92.500% (5th, 50th, 95th percentile)",
        "object centres: mean (0.52, 0.52), spread (0.22, 0.23) of (width, height); 33% in the middle ninth "
        "(11% if even)",
    ]
    plot_statistics(report, tmp_path / "statistics.png")
    assert read_image(tmp_path / "statistics.png").std() > 10


@pytest.mark.parametrize("most, bar", [(5, 1), (40, 1), (41, 2)])
def test_bars_of_masks_per_image_lie_over_the_numbers_that_they_count(tmp_path, monkeypatch, most, bar):
    write_label_maps(tmp_path, 2)
    report = check_items(list_all("label_map", tmp_path), check_item)
    numbers, (_, *others) = np.array([1, 2, 2, most]), measure_objects(report)
    monkeypatch.setattr(check, "measure_objects", lambda report: (numbers, *others))
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_statistics(report, tmp_path / "statistics.png")
    bars = figures[0].axes[0].patches
    assert [patch.get_width() for patch in bars] == [bar] * len(bars)
    for patch in bars:
        inside = (patch.get_x() < numbers) & (numbers < patch.get_x() + bar)
        assert patch.get_height() == inside.sum()
    assert sum(patch.get_height() for patch in bars) == len(numbers)


def test_statistics_of_nothing(tmp_path):
    write_label_maps(tmp_path, 1)
    (tmp_path / "images" / "000.jpg").write_bytes(b"")
    report = check_items(list_all("label_map", tmp_path, val_fraction=0), check_item)
    lines = report_lines(report)
    assert lines[0].startswith("checked 1 images: 0 usable, 1 bad") and "masks per image" not in "".join(lines)
    plot_statistics(report, tmp_path / "statistics.png")
    assert (tmp_path / "statistics.png").is_file()


@pytest.mark.slow
def test_check_of_1000_images_takes_less_than_30_seconds(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for index in range(1000):
        coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        write_image(tmp_path / "images" / f"{index}.jpg", coarse.repeat(16, 0).repeat(16, 1))
        ids = np.kron(np.arange(64).reshape(8, 8), np.ones((32, 32), int))
        write_label_map(tmp_path / "labels" / f"{index}.png", ids)
    start_s = time.process_time()  # of all threads: what one core of its own would need, whoever else is busy
    report = check_items(list_all("label_map", tmp_path), check_item)
    assert time.process_time() - start_s < 30
    assert count(report)["num_usable"] == 1000 and count(report)["num_objects"] == 63_000


# ---------------------------------------------------------------------------------------------------------------------
# real data


def test_real_dsb2018(data_root):
    keys = data_keys("dsb2018", data_root / "DSB2018" / "stage1_train")
    train_items, val_items = split_items(**keys)
    assert (len(train_items), len(val_items)) == (98, 24)
    report = check_items(train_items + val_items, check_item)
    assert count(report)["num_usable"] == 122 and count(report)["num_objects"] == 2582 and not report.bad
    layers = read_item(train_items[0])[1]
    for index, path in enumerate(sorted(train_items[0].annotation_path.glob("*.png"))):
        assert np.array_equal((layers == index + 1).any(0), np.array(Image.open(path)) > 0)


def test_real_coco(data_root):
    changes = {
        **COCO,
        "train_images": "input_images",
        "train_annotations": "panoptic_coco_detection_format.json",
    }
    root = data_root / "COCO_panoptic_sample"
    items = list_all("coco", root, **changes)
    report = check_items(items, check_item)
    assert (count(report)["num_objects"], count(report)["num_crowd"]) == (47, 3)  # 50 segments
    content = json.loads((root / "panoptic_coco_detection_format.json").read_text())
    for item in items:
        masks_left = [
            coco_mask.decode(annotation["segmentation"]).astype(bool)
            for annotation in content["annotations"]
            if annotation["image_id"] == int(item.image_path.stem) and not annotation["iscrowd"]
        ]
        assert_layers_hold(read_item(item)[1], masks_left)
    changes = {**COCO, "train_images": ".", "train_annotations": "annotations.json"}
    report = check_items(list_all("coco", data_root / "COCO_labelme_voc3" / "data_dataset_coco", **changes), check_item)
    assert count(report)["num_usable"] == 3 and count(report)["num_objects"] == 12


def test_real_palette_maps(data_root):
    changes = {"image_dir": "data_annotated", "label_dir": "data_dataset_voc/SegmentationObject"}
    report = check_items(list_all("label_map", data_root / "COCO_labelme_voc3", **changes), check_item)
    assert count(report)["num_usable"] == 3 and count(report)["num_objects"] == 12


def test_real_davis(data_root):
    root = data_root / "DAVIS2016"
    train_items, val_items = split_items(**data_keys("davis", root))
    assert len(train_items) + len(val_items) == 373
    assert len({item.group for item in train_items}) == 6 and len({item.group for item in val_items}) == 1
    assert all(item.image_path.is_file() and item.annotation_path.is_file() for item in train_items + val_items)
    image_rgb, layers = read_item(val_items[0])
    assert image_rgb.shape == (480, 854, 3)
    assert np.array_equal(layers[0] > 0, np.array(Image.open(val_items[0].annotation_path)) > 0)
    assert [object_id for _, object_id, _ in object_ids(layers)] == [255]
    official = str(root / "ImageSets" / "480p" / "sequences.txt")
    listed, rest = split_items(**data_keys("davis", root, val_list=official))
    assert (len(listed), len(rest)) == (0, 373)
