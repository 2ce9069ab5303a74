"""utils/segmentation/check.py: every fault that users report, with the file names and the YAML lines that mend it."""

import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from options import read_option
from PIL import Image
from test_segmentation_readers import bands, data_keys, write_mask, write_pairs, write_picture

from utils.dataset_check import check_items
from utils.images import read_image
from utils.segmentation.check import (
    check_item,
    count_class_pixels,
    keep_usable,
    plot_statistics,
    report_lines,
    stop_at_one_class,
)
from utils.segmentation.readers import read_item, split_items


def check(root: Path, **changes):
    """Split and check a folders dataset: (items, report, all lines of it)."""
    items = sum(split_items(**data_keys("folders", root, **changes)), [])
    report = check_items(items, check_item, num_threads=2)
    return items, report, "\n".join(report_lines(report, None))


def refused(root: Path, **changes) -> str:
    """The one error that a run stops with, before it trains."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        items, report, _ = check(root, **changes)
        keep_usable(items, report, "stop")
        stop_at_one_class(report)
    return str(error.value)


def yaml_lines(message: str) -> dict:
    """Find the YAML lines that a message proposes."""
    keys = read_option("unet", "data", "folders")
    pairs = re.findall(rf"\b({'|'.join(keys)}): (\{{[^}}]*\}}|\[[^\]]*\]|[\w-]+)", message)
    return {key: yaml.safe_load(value) for key, value in pairs}


def assert_usable(root: Path, num_items: int, **changes) -> None:
    items, report, lines = check(root, **changes)
    assert len(keep_usable(items, report, "stop")) == num_items, lines
    stop_at_one_class(report)


# ---------------------------------------------------------------------------------------------------------------------
# pairing


@pytest.mark.parametrize(
    "image_name, mask_name, expected",
    [
        ("{:03d}", "{:03d}_mask", {"mask_ending": "_mask"}),
        ("{}", "mask_{}", {"mask_start": "mask_"}),
        ("image_{:02d}", "label_{:02d}", {}),  # any rule that pairs all
        ("a_{:04d}_leftImg8bit", "a_{:04d}_gtFine_labelIds", {}),
    ],
)
def test_another_pairing_rule_is_found(tmp_path, image_name, mask_name, expected):
    for index in range(12):
        write_picture(tmp_path / "images" / f"{image_name.format(index)}.jpg")
        write_mask(tmp_path / "masks" / f"{mask_name.format(index)}.png", bands((0, 1)))
    message = refused(tmp_path)
    assert "24 of 24 pairs lack a file; image " in message and " has no mask " in message
    assert " has no image " in message
    proposed = yaml_lines(message)
    assert proposed and (not expected or proposed == expected)
    assert_usable(tmp_path, 12, **proposed)


def test_a_missing_mask_and_a_stray_picture_are_named(tmp_path):
    """One stray file shifts every pair where sorted listings are zipped (bigmb/Nest-of-Unets)."""
    write_pairs(tmp_path, 20)
    write_picture(tmp_path / "images" / "003_copy.jpg")
    (tmp_path / "masks" / "007.png").rename(tmp_path / "masks" / "07.png")
    message = refused(tmp_path)
    assert message.startswith("3 of 22 pairs lack a file;") and "images/003_copy.jpg has no mask" in message
    assert "masks/07.png has no image" in message and "on_bad=skip" in message and not yaml_lines(message)
    items, report, lines = check(tmp_path, on_bad="skip")
    usable = keep_usable(items, report, "skip")
    assert len(usable) == 19 and not {"003_copy", "007", "07"} & {item.name for item in usable}
    assert report.counts == {"num_checked": 22, "num_usable": 19, "num_bad": 3} and not report.empty
    for name in ("masks/003_copy.png", "masks/007.png", "images/07.jpg"):
        assert f"no file {tmp_path}/{name}" in lines


def test_a_few_odd_names_are_no_pairing_rule(tmp_path):
    write_pairs(tmp_path, 20)
    for name in ("005", "006"):
        (tmp_path / "masks" / f"{name}.png").rename(tmp_path / "masks" / f"{name}_old.png")
    message = refused(tmp_path)
    assert "4 of 22 pairs lack a file" in message and "complete or remove the pair" in message
    assert not yaml_lines(message)


def test_a_stray_folder_of_pictures_is_named(tmp_path):
    """A folder among the pictures was taken for one of them (milesial #202, #312)."""
    write_pairs(tmp_path, 6)
    write_picture(tmp_path / "images" / "old" / "000.jpg")
    pattern = r"1 of 7 pairs lack a file; image \S*images/old/000.jpg has no mask \S*masks/old/000.png"
    assert re.search(pattern, refused(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# mask values


@pytest.mark.parametrize(
    "values, keys, expected",
    [
        ((0, 255), {}, {"class_values": {0: 0, 255: 1}}),  # milesial #341
        ((0, 128), {}, {"class_values": {0: 0, 128: 1}}),
        ((0, 1, 2, 255), {"num_classes": 3}, {"ignore_values": [255]}),
        ((1, 2, 3), {"num_classes": 3}, {"class_values": {1: 0, 2: 1, 3: 2}}),  # a trimap
        ((0, 1, 2, 3), {"num_classes": 3}, {"num_classes": 4}),  # a class that the model lacks
        ((0, 50, 100, 255), {}, {"class_values": {0: 0, 50: 1, 100: 2, 255: 3}, "num_classes": 4}),
        ((0, 1, 9), {"class_values": {0: 0, 1: 1}, "ignore_values": [7]}, {"ignore_values": [7, 9]}),
    ],
)
def test_values_without_a_class_get_a_proposal_that_mends_it(tmp_path, values, keys, expected):
    write_pairs(tmp_path, 10, values)
    message = refused(tmp_path, **keys)
    assert message.startswith("10 of 10 images cannot be used")
    assert message.count(".png has values that are no class") == 5
    proposed = yaml_lines(message)
    assert expected.items() <= proposed.items(), message
    assert_usable(tmp_path, 10, **keys | proposed)


def test_values_that_differ_between_files_get_one_proposal(tmp_path):
    """Scanning one file is not enough."""
    write_pairs(tmp_path, 4, (0, 10))
    for index, values in enumerate([(0, 10), (0, 20), (20, 30), (0, 30)]):
        write_mask(tmp_path / "masks" / f"{index:03d}.png", bands(values))
    message = refused(tmp_path, val_fraction=0.25)
    proposed = yaml_lines(message)
    assert proposed["class_values"] == {0: 0, 10: 1, 20: 2, 30: 3} and proposed["num_classes"] == 4
    assert_usable(tmp_path, 4, **proposed)


@pytest.mark.parametrize("keys", [{}, {"ignore_values": [255]}, {"class_values": {0: 0, 1: 1}}])
def test_color_masks(tmp_path, keys):
    """milesial #149, #218, #113, #244, #168, #76."""
    write_pairs(tmp_path, 10, [(0, 0, 0), (128, 0, 0), (0, 0, 128)])
    message = refused(tmp_path, **keys)
    assert '.png has colours, where class_values expects one number per pixel, that are no class: "0,0,0"' in message
    proposed = yaml_lines(message)
    assert set(proposed["class_values"]) == {"0,0,0", "128,0,0", "0,0,128"} and proposed["num_classes"] == 3
    assert_usable(tmp_path, 10, **keys | proposed)


def test_a_color_that_the_mapping_lacks_and_grey_masks_for_colors(tmp_path):
    keys = {"class_values": {"0,0,0": 0, "128,0,0": 1}}
    write_pairs(tmp_path / "a", 10, [(0, 0, 0), (128, 0, 0), (1, 2, 3)])
    message = refused(tmp_path / "a", **keys)
    assert 'has colours that are no class: "1,2,3"' in message
    assert yaml_lines(message)["ignore_values"] == ["1,2,3"]
    assert_usable(tmp_path / "a", 10, **keys | yaml_lines(message))
    write_pairs(tmp_path / "b", 10, (0, 1))
    proposed = yaml_lines(refused(tmp_path / "b", **keys))
    assert set(proposed["class_values"]) == {0, 1}
    assert_usable(tmp_path / "b", 10, **keys | proposed)


def test_masks_of_0_and_255_with_255_ignored_are_nothing_to_learn(tmp_path):
    """Elsewhere 255 is left out silently, and every metric is 0 (mmseg #964, #1609)."""
    write_pairs(tmp_path, 10, (0, 255))
    message = refused(tmp_path, ignore_values=[255])
    assert "only class 0 (class 0) occurs in 10 masks, and 50.0% of their pixels are ignored" in message
    assert_usable(tmp_path, 10, **yaml_lines(message))


@pytest.mark.parametrize("smoothed", [False, True])
def test_jpeg_and_smoothed_masks(tmp_path, smoothed):
    write_pairs(tmp_path, 10)
    for path in sorted((tmp_path / "masks").iterdir()):
        rng = np.random.default_rng(7)
        values = Image.fromarray((rng.random((8, 10)) > 0.5).astype(np.uint8) * 255).resize((100, 80), Image.BICUBIC)
        path.unlink()
        values.save(path.with_suffix(".png" if smoothed else ".jpg"))
    keys = {"class_values": {0: 0, 255: 1}}
    for path in (tmp_path / "images").iterdir():
        write_picture(path, 80, 100)
    message = refused(tmp_path, **keys)
    kind = ".png has values that are no class" if smoothed else ".jpg is a JPEG, whose compression changes values"
    assert kind in message and yaml_lines(message) == {"nearest_value": True}
    assert_usable(tmp_path, 10, **keys, nearest_value=True)


def test_different_sizes(tmp_path):
    """milesial #285, #268, #483."""
    write_pairs(tmp_path, 10)
    write_mask(tmp_path / "masks" / "004.png", np.zeros((16, 20), np.uint8))
    write_mask(tmp_path / "masks" / "006.png", np.zeros((10, 8), np.uint8))
    message = refused(tmp_path)
    assert re.search(r"images/004.jpg is 8 x 10 px \(height x width\), but its mask \S*004.png is 16 x 20", message)
    assert "006.png is 10 x 8; if the picture carries an EXIF rotation" in message
    assert yaml_lines(message) == {"on_bad": "skip"}
    items, report, _ = check(tmp_path, on_bad="skip")
    assert len(keep_usable(items, report, "skip")) == 8
    (item,) = [item for item in items if item.name == "004"]
    with pytest.raises(ValueError, match="export both at one size"):
        read_item(item)


def test_files_that_cannot_be_read(tmp_path):
    write_pairs(tmp_path, 10)
    (tmp_path / "images" / "001.jpg").write_bytes(b"")
    (tmp_path / "masks" / "002.png").write_text("no picture")
    whole = (tmp_path / "images" / "003.jpg").read_bytes()
    (tmp_path / "images" / "003.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((8, 10), np.float32)).save(tmp_path / "masks" / "004.tif")
    (tmp_path / "masks" / "004.png").unlink()
    message = refused(tmp_path)
    assert message.startswith("4 of 10 images cannot be used")
    assert "001.jpg is empty" in message and "002.png cannot be decoded" in message
    assert "003.jpg is a JPEG that ends" in message and "004.tif has dtype float32" in message
    items, report, _ = check(tmp_path)
    assert len(keep_usable(items, report, "skip")) == 6


# ---------------------------------------------------------------------------------------------------------------------
# channels, empty classes, remarks


def test_channel_counts(tmp_path):
    """milesial #19, #57, #86, #194: both ways work, and the report says what happens and which key changes it."""
    write_pairs(tmp_path, 10)
    write_mask(tmp_path / "images" / "000.png", np.arange(80, dtype=np.uint8).reshape(8, 10) * 3)
    (tmp_path / "images" / "000.jpg").unlink()
    items, report, lines = check(tmp_path)
    assert "1 with grey for three channels" in lines and "images/000.png" in lines and "set channels: 1" in lines
    assert "1 grey, 9 colour" in lines and len(keep_usable(items, report, "stop")) == 10
    assert {read_item(item)[0].shape for item in items} == {(8, 10, 3)}
    items, report, lines = check(tmp_path, channels=1)
    assert "9 with colour for one channel" in lines and "set channels: 3" in lines
    assert {read_item(item)[0].shape for item in items} == {(8, 10, 1)}


def test_empty_classes_are_named(tmp_path):
    write_pairs(tmp_path, 10, (0, 2))
    _, _, lines = check(tmp_path, num_classes=4, class_names=["a", "b", "c", "d"])
    assert "classes without a pixel: 1 (b), 3 (d); if that is not meant, see class_values" in lines
    assert re.search(r"^ +2 c +50.000% +10$", lines, re.M) and re.search(r"^ +3 d +0.000% +0$", lines, re.M)


def test_masks_that_are_all_ignored_are_left_out_and_counted(tmp_path):
    write_pairs(tmp_path, 10)
    write_mask(tmp_path / "masks" / "005.png", np.full((8, 10), 255, np.uint8))
    write_mask(tmp_path / "masks" / "006.png", np.zeros((8, 10), np.uint8))
    items, report, lines = check(tmp_path, ignore_values=[255])
    usable = keep_usable(items, report, "stop")
    assert len(usable) == 9 and "005" not in {item.name for item in usable} and len(report.empty) == 1
    assert "masks/005.png" in lines and "1 with a single class" in lines and "masks/006.png: class 0" in lines
    assert "ignored: 10.000% of the pixels" in lines


def test_dark_and_blank_pictures_are_remarked_on(tmp_path):
    write_pairs(tmp_path, 10)
    for index, values in enumerate([np.zeros((8, 10), np.uint16), np.arange(80, dtype=np.uint16).reshape(8, 10)]):
        (tmp_path / "images" / f"{index:03d}.jpg").unlink()
        write_mask(tmp_path / "images" / f"{index:03d}.png", values)
    _, _, lines = check(tmp_path)
    assert "1 with one value all over" in lines and "000.png: 0" in lines and "2 of 16 bits" in lines
    assert "1 with unused intensity range" in lines and "001.png: largest value 79 of 65535" in lines


# ---------------------------------------------------------------------------------------------------------------------
# the report


def test_values_that_no_mask_has_are_proposed_anew(tmp_path):
    """To leave out every value that there is was proposed."""
    write_pairs(tmp_path, 3, (0, 255))
    proposed = yaml_lines(refused(tmp_path, class_values={7: 0, 8: 1}))
    assert proposed == {"class_values": {0: 0, 255: 1}}
    assert_usable(tmp_path, 3, **proposed)


def test_names_with_dollars_are_no_formulas(tmp_path):
    """Two of them around what is none ended the run."""
    write_pairs(tmp_path, 3)
    _, report, _ = check(tmp_path, class_names=["a $x^{$", "b"])
    plot_statistics(report, tmp_path / "dataset.png")


def test_maps_of_objects_are_not_said_to_be_blurred_alone(tmp_path):
    write_pairs(tmp_path, 3)
    for index in range(3):
        write_mask(tmp_path / "masks" / f"{index:03d}.png", np.arange(80, dtype=np.uint8).reshape(8, 10))
    assert "if each value is an object, data=instances data.format=label_map reads the mask" in refused(tmp_path)


def test_class_pixels_equal_a_plain_count(tmp_path):
    rng = np.random.default_rng(8)
    masks = rng.choice(np.uint8([0, 1, 2, 255]), (10, 8, 10), p=[0.6, 0.2, 0.1, 0.1])
    write_pairs(tmp_path, 10)
    for index, mask in enumerate(masks):
        write_mask(tmp_path / "masks" / f"{index:03d}.png", mask)
    items, report, _ = check(tmp_path, num_classes=3, ignore_values=[255])
    for chosen in (items[:4], items):
        counts = [sum(int((masks[int(item.name)] == label).sum()) for item in chosen) for label in range(3)]
        assert count_class_pixels(report, chosen).tolist() == counts


def test_the_report_is_the_same_for_any_number_of_threads_and_is_drawn(tmp_path):
    write_pairs(tmp_path, 12)
    items = sum(split_items(**data_keys("folders", tmp_path)), [])
    assert report_lines(check_items(items, check_item, 1)) == report_lines(check_items(items, check_item, 4))
    plot_statistics(check_items(items, check_item), tmp_path / "dataset.png")
    assert np.ptp(read_image(tmp_path / "dataset.png")) > 100
    assert len(re.findall("masks/0", "\n".join(report_lines(check(tmp_path, class_values={7: 0, 9: 1})[1], 5)))) == 5


def test_isbi_stacks_are_checked_page_by_page(tmp_path):
    pages = [Image.fromarray(np.uint8(bands((0, 255)) + index % 2)) for index in range(30)]  # 255 + 1 is 0
    pictures = [Image.fromarray(bands((0, 200)))] * 29
    Image.new("L", (10, 8)).save(tmp_path / "train-volume.tif", save_all=True, append_images=pictures)
    pages[0].save(tmp_path / "train-labels.tif", save_all=True, append_images=pages[1:])
    items = sum(split_items(**data_keys("isbi", tmp_path)), [])
    report = check_items(items, check_item)
    assert report.counts["num_bad"] == 15
    assert f"mask {tmp_path}/train-labels.tif, page 1, has values that are no class: 1" in report.bad[0].faults[0]


@pytest.mark.slow
def test_a_thousand_pictures_in_half_a_minute(tmp_path):
    """Pictures of 375 x 500 px, as Oxford-IIIT Pet has them, copied from one on disk."""
    rng = np.random.default_rng(9)
    noise = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
    (tmp_path / "images").mkdir()
    noise.save(tmp_path / "images" / "0.jpg", quality=90)
    small = Image.fromarray(rng.integers(0, 3, (5, 7), dtype=np.uint8))
    write_mask(tmp_path / "masks" / "0.png", np.asarray(small.resize((500, 375), Image.NEAREST)))
    for index in range(1, 1000):
        shutil.copy(tmp_path / "images" / "0.jpg", tmp_path / "images" / f"{index}.jpg")
        shutil.copy(tmp_path / "masks" / "0.png", tmp_path / "masks" / f"{index}.png")
    start, start_cpu = time.perf_counter(), time.process_time()
    _, report, _ = check(tmp_path, num_classes=3)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    assert report.counts["num_usable"] == 1000
    # of the processor's time where other work shares it: it is what the check takes on one core that is its own
    assert min(wall_s, cpu_s) < 30, (wall_s, cpu_s, os.getloadavg())


def test_real_data_has_no_faults(data_root):
    for name, folder in (("isbi", "ISBI2012/membrane"), ("camvid", "CamVid")):
        items = sum(split_items(**data_keys(name, data_root / folder)), [])[::5]
        report = check_items(items, check_item)
        assert not report.bad and len(keep_usable(items, report, "stop")) == len(items)


# ---------------------------------------------------------------------------------------------------------------------
# real files


def test_255_is_left_out_also_where_other_values_lack_a_class(tmp_path):
    """PASCAL VOC's masks: some of 0 to 20, and 255 along the outlines."""
    cases = {
        "voc": ((0, 1, 15, 255), {0: 0, 1: 1, 15: 2}, [255]),
        "person": ((0, 15, 255), {0: 0, 15: 1}, [255]),
        "one bad file": ((*range(21), 220, 255), {value: i for i, value in enumerate((*range(21), 220))}, [255]),
        "greys": ((0, 85, 170, 255), {0: 0, 85: 1, 170: 2, 255: 3}, []),
        "three greys": ((0, 128, 255), {0: 0, 128: 1, 255: 2}, []),
        "binary": ((0, 255), {0: 0, 255: 1}, []),
    }
    for name, (values, class_values, left_out) in cases.items():
        for index in range(10):
            write_mask(tmp_path / name / "masks" / f"{index:03d}.png", np.repeat(np.uint8([values]), 8, 0).repeat(2, 1))
            write_picture(tmp_path / name / "images" / f"{index:03d}.jpg", 8, 2 * len(values))
        message = refused(tmp_path / name)
        proposed = yaml_lines(message)
        assert proposed.get("class_values") == class_values and proposed.get("ignore_values", []) == left_out, message
        assert_usable(tmp_path / name, 10, **proposed)
    dense = ((*range(21), 255), {"num_classes": 21, "ignore_values": [255]})
    for index in range(10):
        write_picture(tmp_path / "all" / "images" / f"{index}.jpg", 8, 22)
        write_mask(tmp_path / "all" / "masks" / f"{index}.png", np.repeat(np.uint8([dense[0]]), 8, 0))
    assert yaml_lines(refused(tmp_path / "all")) == dense[1]


def test_many_classes_in_the_dataset_are_not_taken_for_blur(tmp_path):
    """COCO-Stuff and ADE20K: few values a mask, over a hundred in all, which were said to be compressed or smoothed."""
    for index in range(60):
        write_picture(tmp_path / "images" / f"{index}.jpg")
        write_mask(tmp_path / "masks" / f"{index}.png", bands((0, index, index + 1, 255)))
    proposed = yaml_lines(refused(tmp_path))
    assert proposed == {"num_classes": 61, "ignore_values": [255]}
    assert_usable(tmp_path, 60, **proposed)


def test_255_is_left_out_where_grey_masks_meet_colours(tmp_path):
    """The YAML has VOC's colours, the files its indices."""
    write_pairs(tmp_path, 10, (0, 1, 15, 255))
    keys = {"class_values": {"0,0,0": 0, "128,0,0": 1}, "ignore_values": ["224,224,192"]}
    proposed = yaml_lines(refused(tmp_path, **keys))
    assert proposed["class_values"] == {0: 0, 1: 1, 15: 2} and proposed["ignore_values"] == [255]
    assert_usable(tmp_path, 10, **keys | proposed)


def test_the_check_proposes_the_pairing_rule_that_a_run_proposes(tmp_path):
    for index in range(12):
        write_picture(tmp_path / "images" / f"{index:03d}.jpg")
        write_mask(tmp_path / "masks" / f"{index:03d}_mask.png", bands((0, 1)))
    assert yaml_lines(refused(tmp_path)) == {"mask_ending": "_mask"}
    _, _, lines = check(tmp_path, on_bad="skip")  # how check=true lists them
    assert yaml_lines(lines) == {"mask_ending": "_mask"} and "24 bad" in lines


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_a_mask_or_picture_of_a_suffix_that_is_not_read_is_named(tmp_path, on_bad):
    """It was asked for by the name that it has: "image 001.jpg has no mask masks/001.png"."""

    def message(root):
        return refused(root) if on_bad == "stop" else check(root, on_bad="skip")[2]

    for suffix, data in ((".npy", b"\x93NUMPY"), (".jp2", b"\0\0\0\x0cjP  ")):
        root = tmp_path / suffix[1:]
        write_pairs(root, 10)
        (root / "masks" / "003.png").unlink()
        (root / "masks" / f"003{suffix}").write_bytes(data)
        said = message(root)
        assert f"masks/003{suffix} is there, but files of {suffix} are not read" in said and ".gif" in said
        write_pairs(root / "b", 10)
        (root / "b" / "images" / "004.jpg").unlink()
        (root / "b" / "images" / f"004{suffix}").write_bytes(data)
        assert f"images/004{suffix} is there, but files of {suffix} are not read" in message(root / "b")


def test_pairs_that_lack_both_files_are_no_pairing_rule(tmp_path):
    """Listed pets whose pictures and trimaps are elsewhere: "set , which pairs 2"."""
    write_picture(tmp_path / "images" / "a.jpg")
    write_mask(tmp_path / "annotations" / "trimaps" / "a.png", bands((1, 2, 3)))
    for name, lines in (("trainval", "a 1 1 1\nb 1 1 1\nc 1 1 1\n"), ("test", "")):
        (tmp_path / "annotations" / f"{name}.txt").write_text(lines)
    with pytest.raises(FileNotFoundError, match="2 of 3 pairs lack a file; .* complete or remove the pair"):
        split_items(**data_keys("oxford_pet", tmp_path, val_fraction=0.0))


def test_a_dataset_of_suffixes_that_are_not_read_says_so(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for index in range(3):
            np.save(tmp_path / folder / f"{index}.npy", bands((0, 1)))
    with pytest.raises(ValueError, match=r"images has 3 files of \.npy, which are not read: save them as .*\.png"):
        check(tmp_path)


def test_masks_of_gif_are_read(tmp_path):
    """Carvana's and DRIVE's."""
    for index in range(10):
        write_picture(tmp_path / "images" / f"{index}.jpg")
        write_mask(tmp_path / "masks" / f"{index}_mask.gif", bands((0, 1)), palette=[0, 0, 0, 255, 255, 255])
    assert_usable(tmp_path, 10, mask_ending="_mask")
    items = split_items(**data_keys("folders", tmp_path, mask_ending="_mask"))[0]
    assert np.array_equal(read_item(items[0])[1], bands((0, 1)))


@pytest.mark.parametrize("bands_of_file", [2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_bands_marked_grey_are_colours_or_refused(tmp_path, bands_of_file, dtype, planar):
    """One band was taken for all, and the check advised `channels: 1`."""
    write_pairs(tmp_path, 10)
    rng = np.random.default_rng(bands_of_file)
    stored = rng.integers(0, 256, (8, 10, bands_of_file)).astype(dtype) * (257 if dtype == np.uint16 else 1)
    (tmp_path / "images" / "000.jpg").unlink()
    path, layout = tmp_path / "images" / "000.tif", stored if planar == "contig" else stored.transpose(2, 0, 1)
    tifffile.imwrite(path, layout, photometric="minisblack", planarconfig=planar)
    items, report, lines = check(tmp_path)
    assert "grey for three channels" not in lines and "set channels: 1" not in lines
    if bands_of_file == 2:
        assert f"image {path} has 2 bands" in lines and len(report.bad) == 1
    else:
        (item,) = [item for item in items if item.name == "000"]
        expected = (stored // (257 if dtype == np.uint16 else 1))[..., :3]
        assert not report.bad and np.array_equal(read_item(item)[0], expected)


def test_composites_and_stacks_are_refused_with_their_pages(tmp_path):
    write_pairs(tmp_path, 10)
    for number, axes in ((0, "CYX"), (1, "ZYX")):
        (tmp_path / "images" / f"{number:03d}.jpg").unlink()
        planes = np.zeros((3, 8, 10), np.uint8)
        tifffile.imwrite(tmp_path / "images" / f"{number:03d}.tif", planes, imagej=True, metadata={"axes": axes})
    message = refused(tmp_path)
    assert "000.tif has 3 pages" in message and "001.tif has 3 pages" in message and "channels: 1" not in message


@pytest.mark.parametrize("orientation, hw, is_told", [
    (1, (8, 10), False), (3, (8, 10), True), (2, (8, 10), True), (6, (9, 9), True), (6, (8, 10), False),
])  # fmt: skip
def test_a_turn_that_keeps_the_size_is_remarked_on(tmp_path, orientation, hw, is_told):
    """The picture is turned as its tag says; a mask drawn without it keeps its size, and lies elsewhere."""
    write_pairs(tmp_path, 10)
    pixels = np.random.default_rng(0).integers(0, 256, (*hw, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "images" / "000.jpg", exif=exif)
    shown_hw = hw[::-1] if orientation >= 5 else hw
    write_mask(tmp_path / "masks" / "000.png", np.resize(np.uint8([0, 1]), shown_hw))
    _, report, lines = check(tmp_path)
    assert not report.bad and ("1 with an orientation that the other of the pair lacks" in lines) == is_told
    if is_told:
        assert f"images/000.jpg: orientation {orientation}, {tmp_path}/masks/000.png: 1" in lines
        write_mask(tmp_path / "masks" / "000.png", np.resize(np.uint8([0, 1]), shown_hw), exif=exif)
        assert "an orientation that" not in check(tmp_path)[2]  # now the mask is turned, too


def test_dead_links_and_files_that_may_not_be_read_are_faults(tmp_path, monkeypatch):
    write_pairs(tmp_path, 10)
    for path in (tmp_path / "images" / "001.jpg", tmp_path / "masks" / "002.png"):
        path.unlink()
        path.symlink_to(tmp_path / "annex" / path.name)
    from_file, open_file = np.fromfile, Path.open

    def refuse(real, *args, **keywords):
        if str(args[0]).endswith(("images/003.jpg", "masks/004.png")):
            raise PermissionError(13, "Permission denied", str(args[0]))
        return real(*args, **keywords)

    monkeypatch.setattr(np, "fromfile", lambda *args, **keywords: refuse(from_file, *args, **keywords))
    monkeypatch.setattr(Path, "open", lambda *args, **keywords: refuse(open_file, *args, **keywords))
    message = refused(tmp_path)
    assert message.startswith("4 of 10 images cannot be used")
    for name in ("images/001.jpg is a link to", "masks/002.png is a link to"):
        assert name in message
    for name in ("images/003.jpg", "masks/004.png"):
        assert f"Permission denied: '{tmp_path}/{name}'" in message
    assert len(keep_usable(*check(tmp_path, on_bad="skip")[:2], "skip")) == 6


def test_a_dead_link_of_a_volume_is_not_passed_over_for_the_other_layout(tmp_path):
    for folder in ("image", "label"):
        write_mask(tmp_path / "train" / folder / "0.png", bands((0, 255)))
    (tmp_path / "train-volume.tif").symlink_to(tmp_path / "annex" / "volume")
    with pytest.raises(FileNotFoundError, match="train-volume.tif is a link to"):
        split_items(**data_keys("isbi", tmp_path))
