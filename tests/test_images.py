"""utils/images.py: files of every kind, label maps, run lengths and polygons against pycocotools, colours."""

import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from utils.images import (
    _is_whole_jpeg,
    id_colors,
    mask_to_box,
    overlay_label_map,
    read_channels,
    read_image,
    read_image_unscaled,
    read_label_map,
    write_image,
    write_label_map,
)
from utils.instances.codecs import mask_to_rle, polygons_to_mask, rle_to_mask


@pytest.fixture
def picture() -> np.ndarray:
    """A small picture without any symmetry, uint8 (6, 9, 3) RGB."""
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# read pictures


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".PNG"])
def test_read_image_keeps_rgb(tmp_path, picture, suffix):
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(picture).save(path)
    assert np.array_equal(read_image(path), picture)


def test_read_image_repeats_grey_and_drops_alpha(tmp_path, picture):
    Image.fromarray(picture[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), picture[..., :1].repeat(3, 2))
    alpha = np.arange(54, dtype=np.uint8).reshape(6, 9, 1)  # nearly transparent: must not darken the colours
    Image.fromarray(np.concatenate([picture, alpha], 2)).save(tmp_path / "alpha.png")
    assert np.array_equal(read_image(tmp_path / "alpha.png"), picture)
    Image.fromarray(picture[..., 0]).convert("LA").save(tmp_path / "grey_alpha.png")
    assert np.array_equal(read_image(tmp_path / "grey_alpha.png"), picture[..., :1].repeat(3, 2))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_read_image_turns_a_palette_into_its_colours(tmp_path, picture, suffix):
    palette_picture = Image.fromarray(picture).quantize(16)
    palette_picture.save(tmp_path / f"palette{suffix}")
    assert np.array_equal(read_image(tmp_path / f"palette{suffix}"), np.array(palette_picture.convert("RGB")))


def test_read_image_scales_16_bit_by_its_type(tmp_path):
    pixels = np.array([[0, 128, 129, 4095, 32768, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / "grey.png"), pixels)
    expected = [round(int(value) * 255 / 65535) for value in pixels[0]]  # 4095 stays dark: 16
    assert read_image(tmp_path / "grey.png")[0, :, 0].tolist() == expected == [0, 0, 1, 16, 128, 255]
    assert read_image_unscaled(tmp_path / "grey.png")[0, :, 1].tolist() == pixels[0].tolist()
    rgb = np.array([[[65535, 0, 257]]], np.uint16)
    cv2.imwrite(str(tmp_path / "rgb.png"), rgb[..., ::-1])
    assert read_image(tmp_path / "rgb.png").tolist() == [[[255, 0, 1]]]


@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_read_image_applies_exif_rotation(tmp_path, orientation, quarter_turns, suffix):
    blocks = np.random.default_rng(1).integers(0, 2, (3, 4), dtype=np.uint8) * 255
    picture = np.kron(blocks, np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / f"turned{suffix}", exif=exif)
    turned = read_image(tmp_path / f"turned{suffix}")[..., 0]
    expected = np.rot90(picture, quarter_turns)
    assert turned.shape == expected.shape
    assert np.abs(turned.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("reader", [read_image, read_label_map, read_channels])
def test_files_that_cannot_be_read_are_named(tmp_path, picture, reader):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "absent.png"))):
        reader(tmp_path / "absent.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.png is empty"):
        reader(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be decoded"):
        reader(tmp_path / "text.png")
    Image.fromarray(np.kron(picture, np.ones((9, 9, 1), np.uint8))).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-600])
    with pytest.raises(ValueError, match=r"cut\.png"):
        reader(tmp_path / "cut.png")


def test_a_jpeg_that_ends_early_is_refused_even_with_a_whole_thumbnail(tmp_path):
    large = np.random.default_rng(2).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(large[:8, :8]).save(tmp_path / "thumbnail.jpg")
    thumbnail = (tmp_path / "thumbnail.jpg").read_bytes()  # its end mark lies in the header of the large one
    Image.fromarray(large).save(tmp_path / "whole.jpg", exif=b"Exif\x00\x00" + thumbnail)
    whole = (tmp_path / "whole.jpg").read_bytes()
    assert thumbnail in whole and _is_whole_jpeg(whole) and _is_whole_jpeg(whole + b"trailer of a phone")
    assert not _is_whole_jpeg(whole[:-200])
    (tmp_path / "cut.jpg").write_bytes(whole[:-200])
    assert read_image(tmp_path / "whole.jpg").shape == (80, 80, 3)
    with pytest.raises(ValueError, match=r"cut\.jpg is a JPEG that ends in the middle"):
        read_image(tmp_path / "cut.jpg")


def test_read_image_refuses_floats(tmp_path):
    Image.fromarray(np.ones((4, 5), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif has dtype float32"):
        read_image(tmp_path / "float.tif")


# ---------------------------------------------------------------------------------------------------------------------
# label maps


def test_label_map_keeps_16_bit_ids(tmp_path):
    ids = np.array([[0, 1, 255, 256, 300, 65535]], np.int32)
    path = write_label_map(tmp_path / "ids.png", ids)
    assert path == tmp_path / "ids.png"
    assert np.array(Image.open(path)).tolist() == ids.tolist()  # what other programs see
    read = read_label_map(path)
    assert read.dtype == np.int32 and read.tolist() == ids.tolist()


def test_label_map_of_70000_objects_becomes_a_32_bit_tiff(tmp_path):
    ids = np.arange(70_001).reshape(1, -1)
    path = write_label_map(tmp_path / "ids.png", ids)
    assert path == tmp_path / "ids.tif"
    assert np.array_equal(np.array(Image.open(path)), ids)
    assert np.array_equal(read_label_map(path), ids)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ids.tif"]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_label_map_of_a_palette_file_is_its_index(tmp_path, suffix):
    ids = np.array([[0, 1, 2], [7, 200, 255]], np.uint8)
    palette_map = Image.fromarray(ids).convert("P")
    palette_map.putpalette(np.random.default_rng(3).integers(0, 256, 768).tolist())
    palette_map.save(tmp_path / f"ids{suffix}")
    assert read_label_map(tmp_path / f"ids{suffix}").tolist() == ids.tolist()


def test_label_map_of_equal_channels_is_one_channel(tmp_path):
    ids = np.array([[0, 9, 254]], np.uint8)
    Image.fromarray(np.stack([ids] * 3, -1)).save(tmp_path / "ids.png")
    assert read_label_map(tmp_path / "ids.png").tolist() == ids.tolist()
    Image.fromarray(np.stack([ids, ids, ids, 255 - ids], -1)).save(tmp_path / "alpha.png")
    assert read_label_map(tmp_path / "alpha.png").tolist() == ids.tolist()


def test_label_maps_of_the_wrong_kind_are_refused_with_a_remedy(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match=r"colours\.png has 3 different channels.*one id"):
        read_label_map(tmp_path / "colours.png")
    Image.fromarray(picture[..., 0]).save(tmp_path / "lossy.jpg")
    with pytest.raises(ValueError, match=r"lossy\.jpg is a JPEG.*PNG"):
        read_label_map(tmp_path / "lossy.jpg")
    Image.fromarray(np.ones((4, 5), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif has dtype float32"):
        read_label_map(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 5), -1, np.int32)).save(tmp_path / "negative.tif")
    with pytest.raises(ValueError, match=r"negative\.tif has ids from -1 to -1"):
        read_label_map(tmp_path / "negative.tif")
    pages = [Image.fromarray(picture[..., 0]), Image.fromarray(picture[..., 1])]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match=r"stack\.tif has 2 pages"):
        read_label_map(tmp_path / "stack.tif")


def test_read_channels_gives_rgb_order_unscaled(tmp_path):
    channels = np.array([[[1, 2, 300], [65535, 0, 7]]], np.uint16)
    cv2.imwrite(str(tmp_path / "channels.png"), channels[..., ::-1])
    assert read_channels(tmp_path / "channels.png").tolist() == channels.tolist()
    Image.fromarray(channels.astype(np.uint8)).save(tmp_path / "eight.png")
    assert read_channels(tmp_path / "eight.png").tolist() == channels.astype(np.uint8).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# write


def test_write_image_is_rgb_and_leaves_no_other_file(tmp_path, picture):
    write_image(tmp_path / "picture.png", picture)
    assert np.array_equal(np.array(Image.open(tmp_path / "picture.png")), picture)
    flat = np.full((16, 16, 3), (200, 30, 60), np.uint8)
    write_image(tmp_path / "flat.JPG", flat)
    assert np.abs(np.array(Image.open(tmp_path / "flat.JPG")).astype(int) - flat).max() < 8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["flat.JPG", "picture.png"]
    with pytest.raises(ValueError, match=r"suffix '\.gif'"):
        write_image(tmp_path / "picture.gif", picture)
    with pytest.raises(ValueError, match=r"ids\.jpg: its name must end in \.png"):
        write_label_map(tmp_path / "ids.jpg", picture[..., 0])


def test_a_write_that_fails_leaves_the_old_file(tmp_path, picture, monkeypatch):
    write_image(tmp_path / "picture.png", picture)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_image(tmp_path / "picture.png", 255 - picture)
    assert np.array_equal(read_image(tmp_path / "picture.png"), picture)


# ---------------------------------------------------------------------------------------------------------------------
# colours


def test_id_colors_are_distinct_bright_and_depend_on_the_id_only():
    colors = id_colors(np.arange(401))
    assert colors[0].tolist() == [0, 0, 0]
    assert len(np.unique(colors, axis=0)) == 401
    assert colors[1:].max(1).min() > 150  # never close to black
    assert np.array_equal(id_colors(np.array([7, 300, 7])), colors[[7, 300, 7]])
    steps = np.abs(np.diff(colors[1:].astype(int), axis=0)).sum(1)
    assert steps.min() > 60  # neighbours in number look different


@pytest.mark.parametrize("object_id", [5, 2_000_000_000])  # the second is too large for a table of colours
def test_overlay_is_half_picture_half_colour_with_a_thin_contour(picture, object_id):
    ids = np.zeros((6, 9), np.int64)
    ids[1:5, 2:7] = object_id
    overlay = overlay_label_map(picture, ids)
    color = id_colors(np.array([object_id]))[0]
    assert np.array_equal(overlay[ids == 0], picture[ids == 0])
    inner = picture[2:4, 3:6].astype(int) + color
    assert np.abs(overlay[2:4, 3:6] * 2.0 - inner).max() <= 1
    contour = (ids > 0) & ~np.pad(np.ones((2, 3), bool), ((2, 2), (3, 3)))
    assert (overlay[contour] == color).all()


def test_overlay_is_that_of_a_loop_over_pixels():
    """Anywhere in the picture, at its edges, too: only the part around the objects is drawn."""
    rng = np.random.default_rng(0)
    for number in range(60):
        ids = np.zeros(rng.integers(1, 9, 2), np.int64)
        place = rng.integers(0, ids.shape, (2, 2))
        part = ids[place[:, 0].min() : place[:, 0].max() + 1, place[:, 1].min() : place[:, 1].max() + 1]
        part[:] = rng.integers(0, 3, part.shape) * (1 if number % 2 else 10**9)
        image_rgb = rng.integers(0, 256, (*ids.shape, 3), dtype=np.uint8)
        expected, padded = image_rgb.copy(), np.pad(ids, 1, mode="edge")
        for y, x in np.argwhere(ids > 0):
            color = id_colors(ids[y, x][None])[0].astype(int)
            around = padded[y, x + 1], padded[y + 2, x + 1], padded[y + 1, x], padded[y + 1, x + 2]
            is_contour = any(each != ids[y, x] for each in around)
            expected[y, x] = color if is_contour else (image_rgb[y, x].astype(int) + color + 1) // 2
        assert np.array_equal(overlay_label_map(image_rgb, ids), expected)


# ---------------------------------------------------------------------------------------------------------------------
# masks


def _random_masks():
    rng = np.random.default_rng(4)
    for index in range(300):
        height, width = rng.integers(1, 70, 2)
        mask = rng.random((height, width)) < rng.choice([0.0, 0.02, 0.3, 0.5, 0.97, 1.0])
        if index % 5 == 0:  # long runs, whose lengths need several characters
            mask = np.zeros(rng.integers(300, 900, 2), bool)
            mask[mask.shape[0] // 3 :, mask.shape[1] // 4 : mask.shape[1] // 2] = True
            mask ^= rng.random(mask.shape) < 0.0005
        yield mask


def test_run_lengths_equal_pycocotools():
    for mask in _random_masks():
        rle = mask_to_rle(mask)
        official = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle["size"] == list(mask.shape) == official["size"]
        assert rle["counts"].encode() == official["counts"]
        assert np.array_equal(rle_to_mask(official), mask)  # bytes
        decoded = rle_to_mask(json.loads(json.dumps(rle)))  # str
        assert decoded.dtype == bool and np.array_equal(decoded, mask)


def test_uncompressed_run_lengths_equal_pycocotools():
    rng = np.random.default_rng(5)
    for _ in range(50):
        cuts = np.sort(rng.integers(0, 40 * 30 + 1, rng.integers(0, 20)))
        rle = {"size": [40, 30], "counts": np.diff([0, *cuts, 40 * 30]).tolist()}
        official = coco_mask.decode(coco_mask.frPyObjects(rle, 40, 30))
        assert np.array_equal(rle_to_mask(rle), official)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([3, 4], "add up to 7 pixels, but the mask is 2 x 5 = 10"),
        ([11, -1], "add up to 10"),
        ("", "add up to 0"),
        ("a", "not in COCO's compressed form"),
        ("\x7f\x01", "not in COCO's"),
        ("éé", "add up to|not in COCO's"),
    ],
)
def test_broken_run_lengths_are_refused(counts, reason):
    with pytest.raises(ValueError, match=reason):
        rle_to_mask({"size": [2, 5], "counts": counts})


def test_polygons_equal_pycocotools():
    rng = np.random.default_rng(6)
    for index in range(600):
        height, width = (int(side) for side in rng.integers(1, 80, 2))
        polygons = []
        for _ in range(rng.integers(1, 4)):  # self-crossing, partly outside, with repeated points
            points = rng.uniform(-10, 90, (rng.integers(3, 12), 2))
            points = np.rint(points) if index % 2 else points
            points = np.repeat(points, 2, 0) if index % 5 == 0 else points
            points = np.rint(points * 5) / 5 if index % 7 == 0 else points
            polygons.append(points.ravel().tolist())
        official = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
        assert np.array_equal(polygons_to_mask(polygons, height, width), official), polygons


@pytest.mark.parametrize("polygon", [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, float("nan"), 5, 6], 4.5])
def test_broken_polygons_are_refused(polygon):
    with pytest.raises(ValueError, match="it must be numbers x1, y1"):
        polygons_to_mask([polygon], 10, 10)


@pytest.mark.parametrize(
    "annotation_file",
    [
        "COCO_panoptic_sample/panoptic_coco_detection_format.json",
        "COCO_labelme_voc3/data_dataset_coco/annotations.json",
    ],
)
def test_real_coco_masks_equal_pycocotools(data_root, annotation_file):
    content = json.loads((data_root / annotation_file).read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    assert len(content["annotations"]) in (50, 12)
    for annotation in content["annotations"]:
        segmentation, (height, width) = annotation["segmentation"], sizes[annotation["image_id"]]
        if isinstance(segmentation, dict):
            official = coco_mask.decode(segmentation)
            assert mask_to_rle(rle_to_mask(segmentation)) == segmentation
            assert np.array_equal(rle_to_mask(segmentation), official)
        else:
            official = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
            assert np.array_equal(polygons_to_mask(segmentation, height, width), official)


def test_mask_to_box_equals_pycocotools():
    for mask in _random_masks():
        x1, y1, x2, y2 = mask_to_box(mask)
        x, y, width, height = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))))
        expected = [x, y, x + width - 1, y + height - 1] if mask.any() else [0, 0, 0, 0]
        assert [x1, y1, x2, y2] == expected
