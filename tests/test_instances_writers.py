"""utils/instances/writers.py: outlines against other painters, and each format read back by code that is not ours."""

import json
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage
from skimage.draw import polygon2mask
from test_instances_readers import data_keys, list_all, write_picture

from utils.dataset_check import check_items
from utils.images import list_pictures, read_image
from utils.instances import writers
from utils.instances.check import check_item, count
from utils.instances.codecs import mask_to_rle, rle_to_mask, rle_to_part
from utils.instances.readers import read_labelme, split_items
from utils.instances.writers import join_holes, ring_area, simplify_ring, trace_parts, trace_rings

DEFAULT_PX = 1.0  # outline_tolerance_px of infer_sam2.yaml


def random_masks(count: int) -> list[np.ndarray]:
    """Noise of all densities: holes, islands, pixels that touch by a corner, borders; and small and full ones."""
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 16, 2)) < rng.random() for _ in range(count)]
    diagonal = np.eye(5, dtype=bool)
    nested = np.pad(np.pad(np.ones((1, 1), bool), 1), 1, constant_values=True)  # an island in a hole
    return [*masks, np.ones((1, 1), bool), np.ones((4, 7), bool), diagonal, diagonal[::-1], ~diagonal, nested]


def paint(ring: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """What skimage takes to be inside; it counts from the centre of the first pixel."""
    return polygon2mask(shape, ring[:, ::-1] - 0.5)


def iou_of(mask: np.ndarray, other: np.ndarray) -> float:
    return (mask & other).sum() / (mask | other).sum()


def decode_polygons(polygons: list[list[float]], shape: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *shape))) > 0


# ---------------------------------------------------------------------------------------------------------------------
# outlines


def test_rings_are_the_mask_in_three_painters():
    for mask in random_masks(150):
        rings = trace_rings(mask)
        assert sum(map(ring_area, rings)) == mask.sum()
        crossed = np.zeros(mask.shape, bool)
        for ring in rings:
            crossed ^= paint(ring, mask.shape)
            steps = np.roll(ring, -1, 0) - ring
            assert ((steps != 0).sum(1) == 1).all()  # along x and y in turn
            assert ((steps[:, 0] != 0) == (np.arange(len(ring)) % 2 == 0)).all()
        np.testing.assert_array_equal(crossed, mask)
        large = np.zeros(np.array(mask.shape) * 8, np.uint8)  # a pixel is 8 x 8; the middle ones are clear of the line
        cv2.fillPoly(large, [(ring * 8).astype(np.int32) for ring in rings], 1)
        np.testing.assert_array_equal(large[4::8, 4::8] > 0, mask)
        outers = [ring for ring in rings if ring_area(ring) > 0]
        assert len(outers) == ndimage.label(mask)[1]  # connected by sides
        background = ndimage.label(np.pad(~mask, 1, constant_values=True), np.ones((3, 3)))[1]
        assert len(rings) - len(outers) == background - 1


def test_a_hole_is_joined_to_its_part_without_a_loss():
    for mask in random_masks(150):
        parts = trace_parts(mask)
        joined = [join_holes(part.outer.astype(float), [hole.astype(float) for hole in part.holes]) for part in parts]
        assert [ring_area(part.outer) for part in parts] == sorted(ring_area(part.outer) for part in parts)[::-1]
        together = np.zeros(mask.shape, bool)
        for ring in joined:
            together |= paint(ring, mask.shape)
        np.testing.assert_array_equal(together, mask)
        if parts:
            np.testing.assert_array_equal(decode_polygons([ring.ravel().tolist() for ring in joined], mask.shape), mask)


def whole_masks() -> list[np.ndarray]:
    """Masks of one part, at least 400 px, no holes: blobs smooth and ragged, snakes of 1 px, combs, stairs, discs."""
    rng = np.random.default_rng(1)
    masks = []
    for number in range(60):
        noise = cv2.GaussianBlur(rng.standard_normal((70, 90)).astype(np.float32), (0, 0), 1 + number % 6)
        labels, _ = ndimage.label(noise > np.quantile(noise, 0.5))
        masks.append(labels == np.bincount(labels[labels > 0]).argmax())
    snake = np.zeros((41, 41), bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    ys, xs = np.mgrid[:80, :80]
    discs = [np.hypot(xs - 40.3, ys - 39.6) < radius for radius in (11.5, 20, 39)]
    slopes = [(ys * 10 > xs * slope) & (ys * 10 < xs * slope + 200) for slope in (1, 3, 7, 10, 25)]
    combs = [np.pad(np.kron(np.arange(20) % 2 == 0, np.ones((30, width), bool)), ((0, 3), (0, 0)), constant_values=True)
             for width in (1, 2)]  # fmt: skip
    masks += [snake, snake.T, *discs, *slopes, *combs, np.ones((20, 20), bool)]
    masks = [ndimage.binary_fill_holes(mask, np.ones((3, 3))) for mask in masks]
    return [mask for mask in masks if mask.sum() >= 400 and len(trace_rings(mask)) == 1]


@pytest.mark.parametrize("tolerance_px", [0, 0.4, DEFAULT_PX, 5, 1e6])
def test_simplified_outlines_keep_an_iou_of_0_99(tolerance_px):
    masks = whole_masks()
    assert len(masks) > 50
    shares = []
    for mask in masks:
        (ring,) = trace_rings(mask)
        simple = simplify_ring(ring, tolerance_px)
        drawn = paint(simple, mask.shape), decode_polygons([simple.ravel().tolist()], mask.shape)
        assert min(iou_of(mask, other) for other in drawn) >= (0.99 if tolerance_px else 1)
        shares.append(len(simple) / len(ring))
        if tolerance_px <= DEFAULT_PX:  # no point of it is farther from the pixels' edges
            edges = np.pad(mask, 1)
            edges = np.argwhere(edges ^ ndimage.binary_erosion(edges))[:, ::-1] - 0.5  # centres of the outermost pixels
            away = [np.hypot(*(edges - point).T).min() for point in simple]
            assert max(away) <= np.hypot(0.5, 0.5) + tolerance_px
    assert np.mean(shares) == 1 if tolerance_px == 0 else np.mean(shares) < 0.75


def test_plain_shapes_have_few_points():
    mask = np.zeros((60, 80), bool)
    mask[10:40, 5:50] = True
    (ring,) = trace_rings(mask)
    assert sorted(simplify_ring(ring, DEFAULT_PX).tolist()) == [[5, 10], [5, 40], [50, 10], [50, 40]]
    ys, xs = np.mgrid[:400, :400]
    (ring,) = trace_rings(np.hypot(xs - 200, ys - 200) < 180)
    assert len(simplify_ring(ring, DEFAULT_PX)) < 60 < 600 < len(ring)


def test_a_mask_of_12_megapixels_is_traced_in_well_under_a_second():
    noise = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)
    mask = cv2.resize(cv2.GaussianBlur(noise, (0, 0), 4), (4000, 3000)) > 0
    start_s = time.process_time()
    rings = trace_rings(mask)
    assert time.process_time() - start_s < 0.7
    assert sum(map(ring_area, rings)) == mask.sum() and sum(map(len, rings)) > 50_000


def test_the_part_of_a_mask_in_its_box_equals_the_whole_decoded():
    for mask in [*random_masks(60), np.zeros((3, 4), bool)]:
        part, (x, y) = rle_to_part(mask_to_rle(mask))
        whole = np.zeros(mask.shape, bool)
        whole[y : y + part.shape[0], x : x + part.shape[1]] = part
        np.testing.assert_array_equal(whole, mask)
        assert part.shape == (0, 0) if not mask.any() else part[[0, -1]].any(1).all() and part[:, [0, -1]].any(0).all()


# ---------------------------------------------------------------------------------------------------------------------
# formats


def ring_and_island() -> np.ndarray:
    mask = np.zeros((24, 32), bool)
    mask[2:14, 3:20] = True
    mask[5:8, 6:10] = mask[10:12, 12:15] = False  # two holes
    mask[18:22, 25:32] = mask[16, 1] = True  # two islands
    return mask


def box_mask() -> np.ndarray:
    mask = np.zeros((24, 32), bool)
    mask[12:20, 0:9] = True  # overlaps the ring, touches the border
    return mask


def label_folder(tmp_path: Path, masks_of: dict[str, list[np.ndarray]], classes_of=None) -> list[writers.Labelled]:
    """Write pictures of these names, and label them with these masks, as infer_sam2.py does."""
    for name, masks in masks_of.items():
        write_picture(tmp_path / "my photos" / name, *masks[0].shape)
    labelled = []
    for index, picture in enumerate(list_pictures(tmp_path / "my photos")):
        masks = masks_of[picture.path.name]
        annotations = [
            {"id": number, "segmentation": mask_to_rle(mask), "predicted_iou": 0.5, "area": int(mask.sum())}
            for number, mask in enumerate(masks, 1)
        ]
        for annotation, name in zip(annotations, classes_of or [], strict=False):
            annotation |= {"class": name, "class_prob": 0.8}
        image_rgb = read_image(picture.path)
        labelled.append(writers.label_picture(tmp_path / "run", picture, index + 1, image_rgb, annotations))
    return labelled


def write_all(tmp_path: Path, labelled: list, classes: list[str] = writers.NO_CLASSES, tolerance_px: float = 0.0):
    formats, lost = ["coco", "labelme", "yolo", "cutouts"], []
    for picture in labelled:
        lost.append(writers.write_formats(formats, tmp_path / "run", classes, tolerance_px, [picture], is_end=False))
    assert not writers.write_formats(formats, tmp_path / "run", classes, tolerance_px, labelled, is_end=True)
    return lost


CORNER = np.zeros((24, 32), bool)  # of one pixel
CORNER[0, 0] = True
MASKS = {"a.jpg": [ring_and_island(), box_mask()], "a.png": [box_mask(), CORNER], "été 1.png": [ring_and_island()]}
RESULTS = {"a.jpg": "a_jpg", "a.png": "a_png", "été 1.png": "été 1"}  # what the results of a picture are called


def test_coco_is_read_by_pycocotools(tmp_path):
    labelled = label_folder(tmp_path, MASKS, ["cat", "dog"])
    write_all(tmp_path, labelled, ["dog", "cat"])
    path = tmp_path / "run" / "coco" / "annotations.json"
    coco = COCO(str(path))
    assert [image["file_name"] for image in coco.dataset["images"]] == list(MASKS)
    assert sorted(coco.imgs) == [1, 2, 3] and sorted(coco.anns) == [1, 2, 3, 4, 5]
    assert [(each["id"], each["name"]) for each in coco.dataset["categories"]] == [(1, "dog"), (2, "cat")]
    for image_id, masks in enumerate(MASKS.values(), 1):
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        assert [annotation["segmentation"] for annotation in annotations] == [mask_to_rle(mask) for mask in masks]
        for annotation, mask, category_id in zip(annotations, masks, [2, 1], strict=False):
            np.testing.assert_array_equal(coco.annToMask(annotation) > 0, mask)
            assert annotation["area"] == mask.sum() and annotation["category_id"] == category_id
            assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
            assert annotation["score"] == pytest.approx(0.4) and annotation["iscrowd"] == 0


def read_labelme_shapes(path: Path) -> dict[object, np.ndarray]:
    """Read as labelme's own labelme2coco.py does: shapes of one label and group_id are one object, its masks or-ed.

    labelme paints outlines, too, half a pixel more; skimage paints what is inside.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    shape = content["imageHeight"], content["imageWidth"]
    assert content["imageData"] is None and content["flags"] == {} and content["version"].startswith("5.")
    picture = Image.open(os.path.join(os.path.dirname(path), content["imagePath"]))
    assert picture.size == shape[::-1]
    masks = {}
    for number, each in enumerate(content["shapes"]):
        assert each["shape_type"] == "polygon" and len(each["points"]) >= 3
        group = each["label"], number if each["group_id"] is None else ("group", each["group_id"])
        mask = paint(np.array(each["points"]), shape)
        masks[group] = masks[group] | mask if group in masks else mask
    return masks


def test_labelme_holds_holes_and_islands(tmp_path):
    write_all(tmp_path, label_folder(tmp_path, MASKS, ["cat", "dog"]), ["dog", "cat"])
    for name, masks in MASKS.items():
        read = read_labelme_shapes(tmp_path / "run" / "labelme" / f"{RESULTS[name]}.json")
        assert [label for label, _ in read] == ["cat", "dog"][: len(masks)]
        np.testing.assert_array_equal(list(read.values()), masks)


def read_yolo_file(path: Path, size: tuple[int, int]) -> list[tuple[int, np.ndarray]]:
    """Read a line `class x1 y1 ...` for each object, as ultralytics does, and paint it."""
    objects = []
    for line in path.read_text().splitlines():
        class_id, *shares = line.split()
        shares = np.array(shares, np.float32).reshape(-1, 2)
        assert (shares >= 0).all() and (shares <= 1).all() and len(shares) >= 3
        objects.append((int(class_id), paint(shares * size[::-1], size)))
    return objects


def test_yolo_holds_the_largest_ring_and_counts_the_rest(tmp_path):
    lost = write_all(tmp_path, label_folder(tmp_path, MASKS, ["cat", "dog"]), ["dog", "cat"])
    root = tmp_path / "run" / "yolo"
    content = yaml.safe_load((root / "data.yaml").read_text())
    assert content == {"train": "images", "val": "images", "nc": 2, "names": {0: "dog", 1: "cat"}}
    ring = np.zeros((24, 32), bool)
    ring[2:14, 3:20] = True
    for name, masks in MASKS.items():
        objects = read_yolo_file(root / "labels" / f"{RESULTS[name]}.txt", (24, 32))
        assert [class_id for class_id, _ in objects] == [1, 0][: len(masks)]
        expected = [ring if mask.sum() > box_mask().sum() else mask for mask in masks]
        np.testing.assert_array_equal([mask for _, mask in objects], expected)
        link = root / "images" / f"{RESULTS[name]}{Path(name).suffix}"
        assert link.is_symlink() and os.path.samefile(link, tmp_path / "my photos" / name)
    assert lost == [{"holes": 2, "islands": 2, "objects": 1}, {}, {"holes": 2, "islands": 2, "objects": 1}]


def test_cutouts_are_the_objects_pixels(tmp_path):
    write_all(tmp_path, label_folder(tmp_path, MASKS))
    for name, masks in MASKS.items():
        image_rgb = np.array(Image.open(tmp_path / "my photos" / name).convert("RGB"))
        for number, mask in enumerate(masks, 1):
            rgba = Image.open(tmp_path / "run" / "cutouts" / f"{RESULTS[name]}_{number}.png")
            ys, xs = np.nonzero(mask)
            window = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
            assert rgba.mode == "RGBA"
            np.testing.assert_array_equal(np.array(rgba)[..., 3], 255 * mask[window])
            if name.endswith(".png"):
                np.testing.assert_array_equal(np.array(rgba)[..., :3], image_rgb[window] * mask[window][..., None])


def objects_of(item) -> list[tuple[str, np.ndarray]]:
    instances = item.read()
    assert not instances.broken and not instances.doubts
    masks = [(instances.layers == number).any(0) for number in range(1, len(instances.annotations) + 1)]
    return [(each["category"], mask) for each, mask in zip(instances.annotations, masks, strict=True)]


def test_our_own_readers_read_all_of_it(tmp_path):
    write_all(tmp_path, label_folder(tmp_path, MASKS, ["cat", "dog"]), ["dog", "cat"])
    coco = {"train_images": ".", "train_annotations": "../run/coco/annotations.json", "val_annotations": None}
    datasets = [
        list_all("coco", tmp_path / "my photos", **coco),
        list_all("labelme", tmp_path / "run" / "labelme"),
        list_all("yolo", tmp_path / "run" / "yolo"),
    ]
    for items in datasets:
        report = check_items(items, check_item)
        assert not report.bad and count(report)["num_objects"] == 5
        by_picture = {os.path.realpath(item.image_path): item for item in items}
        assert len(by_picture) == 3
        for name, masks in MASKS.items():
            read = objects_of(by_picture[str(tmp_path / "my photos" / name)])
            assert [category for category, _ in read] == ["cat", "dog"][: len(masks)]
            if items is not datasets[2]:
                np.testing.assert_array_equal([mask for _, mask in read], masks)


def test_real_masks_come_back(data_root, tmp_path):
    """labelme's own files of three photographs, written anew and read again, at both tolerances."""
    source = data_root / "COCO_labelme_voc3" / "data_annotated"
    for tolerance_px in (0.0, DEFAULT_PX):
        for picture in list_pictures(source):
            instances = read_labelme(picture.path.with_suffix(".json"), picture.path)
            masks = [(instances.layers == number).any(0) for number in range(1, len(instances.annotations) + 1)]
            objects = [{"id": k, "segmentation": mask_to_rle(mask), "predicted_iou": 1.0, "class": each["category"]}
                       for k, (mask, each) in enumerate(zip(masks, instances.annotations, strict=True), 1)]  # fmt: skip
            labelled = writers.label_picture(tmp_path, picture, 1, read_image(picture.path), objects)
            classes = sorted({each["class"] for each in objects})
            writers.write_formats(["labelme"], tmp_path, classes, tolerance_px, [labelled], is_end=False)
            path = tmp_path / "labelme" / f"{picture.name}.json"
            again, theirs = read_labelme(path, picture.path), [*read_labelme_shapes(path).values()]
            for number, (mask, painted) in enumerate(zip(masks, theirs, strict=True), 1):
                for drawn in ((again.layers == number).any(0), painted):
                    assert iou_of(mask, drawn) >= (0.99 if tolerance_px else 1)
            assert [each["category"] for each in again.annotations] == [each["class"] for each in objects]
            points = [len(shape["points"]) for shape in json.loads(path.read_text())["shapes"]]
            assert tolerance_px == 0 or max(points) < 150  # those drawn by hand have up to 41


def test_pages_of_a_stack_are_saved_for_other_programs(tmp_path):
    (tmp_path / "my photos").mkdir()
    pages = [Image.fromarray(np.full((24, 32), value, np.uint16)) for value in (1000, 65535)]
    pages[0].save(tmp_path / "my photos" / "stack.tif", save_all=True, append_images=pages[1:])
    labelled = []
    for index, picture in enumerate(list_pictures(tmp_path / "my photos")):
        objects = [{"id": 1, "segmentation": mask_to_rle(box_mask()), "predicted_iou": 1.0}]
        image_rgb = read_image(picture.path, picture.page)
        labelled.append(writers.label_picture(tmp_path / "run", picture, index + 1, image_rgb, objects))
    write_all(tmp_path, labelled)
    for name, value in (("stack_0001", 4), ("stack_0002", 255)):
        (mask,) = read_labelme_shapes(tmp_path / "run" / "labelme" / f"{name}.json").values()
        np.testing.assert_array_equal(mask, box_mask())
        assert (read_image(tmp_path / "run" / "yolo" / "images" / f"{name}.png") == value).all()
        assert (np.array(Image.open(tmp_path / "run" / "cutouts" / f"{name}_1.png")) == [value] * 3 + [255]).all()
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(tmp_path / "my photos" / "one.gif")  # YOLO's trainers read none
    (gif,) = [picture for picture in list_pictures(tmp_path / "my photos") if picture.name == "one"]
    one = writers.label_picture(tmp_path / "run", gif, 3, read_image(gif.path), [])
    assert one.image_path == tmp_path / "run" / "pages" / "one.png" and not read_image(one.image_path).any()
    images = json.loads((tmp_path / "run" / "coco" / "annotations.json").read_text())["images"]
    paths = [tmp_path / "my photos" / image["file_name"] for image in images]  # as seen from the folder of pictures
    assert [path.name for path in paths] == ["stack_0001.png", "stack_0002.png"] and all(map(Path.is_file, paths))


def test_copies_where_links_cannot_be_made_and_ways_through_linked_folders(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1314, "A required privilege is not held by the client")

    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "deep")  # ".." leaves the real folder
    labelled = label_folder(tmp_path, {"a.jpg": [box_mask()]})
    monkeypatch.setattr(Path, "symlink_to", refuse)
    write_all(tmp_path, labelled)
    copy = tmp_path / "run" / "yolo" / "images" / "a.jpg"
    assert not copy.is_symlink() and copy.read_bytes() == (tmp_path / "my photos" / "a.jpg").read_bytes()
    assert len(read_labelme_shapes(tmp_path / "run" / "labelme" / "a.json")) == 1


def test_pictures_without_objects_and_empty_masks(tmp_path):
    labelled = label_folder(tmp_path, {"a.jpg": [np.zeros((24, 32), bool)], "b.jpg": [np.zeros((24, 32), bool)]})
    labelled[1] = labelled[1]._replace(objects=[])
    write_all(tmp_path, labelled)
    assert (tmp_path / "run" / "yolo" / "labels" / "b.txt").read_text() == ""
    assert json.loads((tmp_path / "run" / "labelme" / "a.json").read_text())["shapes"] == []
    assert len(COCO(str(tmp_path / "run" / "coco" / "annotations.json")).imgs) == 2
    train_items, val_items = split_items(**data_keys("yolo", tmp_path / "run" / "yolo"))
    assert len(train_items) == len(val_items) == 1  # train and val of the data.yaml are one folder: a fraction


def test_run_lengths_that_are_no_mask_are_refused_in_both_decoders():
    for decode in (rle_to_mask, rle_to_part):
        with pytest.raises(ValueError, match="run lengths add up to 79 pixels"):
            decode({"size": [8, 10], "counts": [79]})
