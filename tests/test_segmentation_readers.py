"""utils/segmentation/readers.py: layouts, splits, how mask values become classes, real data, the README's recipes.

Tried beside what was reported, to find faults of the same kinds (those marked * were some, and have a test here or in
test_segmentation_check.py): masks of lossy WebP* and of TIFF of JPEG* with nearest_value, of 16-bit colours*, of grey
and alpha, of colours and alpha, of floats, of 64-bit integers, of -1 in 8 bits, with a page or a channel for each
class; a dataset of over a hundred classes, few in each mask*; pairs of a list that lack both files*; listed pets and
streets whose names have spaces and accents*; a volume that is a link to nothing*; a folder of .npy alone*.
"""

import re
import shutil
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torchvision
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from options import read_option
from PIL import Image

from utils.images import write_image
from utils.segmentation.readers import IGNORE_INDEX, name_classes, read_item, read_picture, split_items

ROOT = Path(__file__).parent.parent


def data_keys(name: str, root: Path, **changes) -> dict:
    """The keys of configs/unet/data/<name>.yaml, with a root and other changes, as a command line would give them."""
    keys = read_option("unet", "data", name)
    assert not set(changes) - set(keys), changes
    return {**keys, "root": str(root), **changes}


def list_all(root: Path, **changes):
    """The items of a folders dataset, which are all trained on, by name."""
    return split_items(**data_keys("folders", root, val_fraction=0.0, test_fraction=0.0, **changes))[0]


def write_picture(path: Path, height: int = 8, width: int = 10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_mask(path: Path, values: np.ndarray, palette: list[int] | None = None, **options) -> None:
    """Write a mask; with a palette [r, g, b, ...] values are its indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if palette is not None:
        picture.putpalette(palette)
    picture.save(path, **options)


def write_pairs(root: Path, num_images: int = 10, values=(0, 1)) -> Path:
    """A folders dataset of pictures 8 x 10, whose masks hold these values in vertical bands."""
    for index in range(num_images):
        write_picture(root / "images" / f"{index:03d}.jpg")
        write_mask(root / "masks" / f"{index:03d}.png", bands(values))
    return root


def bands(values, dtype=np.uint8) -> np.ndarray:
    """A mask 8 x 10 of these values, or colours, from left to right."""
    return np.repeat(np.array(values, dtype)[np.arange(10) * len(values) // 10][None], 8, 0)


def names(items) -> list[str]:
    return [item.name for item in items]


# ---------------------------------------------------------------------------------------------------------------------
# mask values and pictures


def test_values_become_classes_as_a_plain_loop_says(tmp_path):
    rng = np.random.default_rng(1)
    coding = {3: 0, 700: 1, 65535: 2, 41: 1}
    values = rng.choice([3, 700, 65535, 41, 9], (8, 10)).astype(np.uint16)
    write_picture(tmp_path / "images" / "a.jpg")
    write_mask(tmp_path / "masks" / "a.png", values)
    (item,) = list_all(tmp_path, num_classes=3, class_values=coding, ignore_values=[9])
    image, class_map = read_item(item)
    expected = [[coding[value] if value in coding else 255 for value in row] for row in values.tolist()]
    assert image.shape == (8, 10, 3) and image.dtype == class_map.dtype == np.uint8
    assert class_map.tolist() == expected


def test_values_of_32_bits_are_not_taken_for_the_largest_of_16(tmp_path):
    write_picture(tmp_path / "images" / "a.jpg")
    write_mask(tmp_path / "masks" / "a.tif", bands((0, 65535, 70000), np.int32))
    keys = {"class_values": {0: 0, 65535: 1}}
    (item,) = list_all(tmp_path, **keys)
    with pytest.raises(ValueError, match=r"a.tif has values that are no class: 70000 \(30.00% of its pixels\)"):
        read_item(item)
    (item,) = list_all(tmp_path, **keys, nearest_value=True)
    assert np.array_equal(read_item(item)[1], bands((0, 1, 1)))


COLORS = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (255, 255, 255)]
COLOR_CODING = {"0,0,0": 0, "128,0,0": 1, "0, 128, 0": 2}


@pytest.mark.parametrize("kind", ["rgb", "rgba", "palette", "tiff"])
def test_colors_become_classes(tmp_path, kind):
    index = np.random.default_rng(2).integers(0, 4, (8, 10))
    values, palette = np.uint8(COLORS)[index], None
    if kind == "palette":  # the colour counts, not the index: reversed here
        values, palette = (3 - index).astype(np.uint8), np.uint8(COLORS[::-1]).ravel().tolist()
    if kind == "rgba":
        values = np.dstack([values, np.full((8, 10), 255, np.uint8)])
    write_picture(tmp_path / "images" / "a.png")
    write_mask(tmp_path / "masks" / ("a.tif" if kind == "tiff" else "a.png"), values, palette)
    (item,) = list_all(tmp_path, num_classes=3, class_values=COLOR_CODING, ignore_values=["255,255,255"])
    assert np.array_equal(read_item(item)[1], np.uint8([0, 1, 2, 255])[index])


def test_the_index_of_a_palette_is_the_class(tmp_path):
    index = np.random.default_rng(3).integers(0, 3, (8, 10)).astype(np.uint8)
    write_picture(tmp_path / "images" / "a.png")
    write_mask(tmp_path / "masks" / "a.png", index, palette=[200, 10, 10, 0, 0, 0, 90, 90, 90])
    (item,) = list_all(tmp_path, num_classes=3)
    assert np.array_equal(read_item(item)[1], index)


@pytest.mark.parametrize("colored", [False, True])
def test_a_compressed_mask_is_taken_as_the_nearest_values(tmp_path, colored):
    truth = np.zeros((64, 64), np.uint8)
    cv2.circle(truth, (30, 34), 20, 1, -1)
    values = np.uint8([[0, 0, 0], [250, 40, 40]])[truth] if colored else truth * 255
    write_picture(tmp_path / "images" / "a.png", 64, 64)
    write_mask(tmp_path / "masks" / "a.jpg", values, quality=75)
    coding = {"0,0,0": 0, "250,40,40": 1} if colored else {0: 0, 255: 1}
    (item,) = list_all(tmp_path, class_values=coding, nearest_value=True)
    stored = np.asarray(Image.open(tmp_path / "masks" / "a.jpg")).astype(int).reshape(64, 64, -1)
    listed = np.array([[0, 0, 0], [250, 40, 40]] if colored else [[0], [255]])
    expected = [[int(np.argmin([((p - v) ** 2).sum() for v in listed])) for p in row] for row in stored]
    assert np.array_equal(read_item(item)[1], expected)
    assert (np.array(expected) == truth).mean() > (0.95 if colored else 0.99)
    (item,) = list_all(tmp_path, class_values=coding)
    with pytest.raises(ValueError, match=r"a\.jpg is a JPEG.*nearest_value: true"):
        read_item(item)


def test_pictures_of_every_depth_and_kind_in_one_and_three_channels(tmp_path):
    rng = np.random.default_rng(4)
    grey, rgb = rng.integers(0, 256, (6, 7), dtype=np.uint8), rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    luminance = np.asarray(Image.fromarray(rgb).convert("L"))
    files = {
        "grey.png": (grey, np.stack([grey] * 3, 2), grey),
        "grey16.png": (grey.astype(np.uint16) * 257, np.stack([grey] * 3, 2), grey),
        "rgb.png": (rgb[..., ::-1], rgb, luminance),
        "rgb16.tif": (rgb[..., ::-1].astype(np.uint16) * 257, rgb, luminance),
        "rgba.png": (np.dstack([rgb[..., ::-1], grey]), rgb, luminance),
    }
    for name, (stored, as_rgb, as_grey) in files.items():
        cv2.imwrite(str(tmp_path / name), stored)
        assert np.array_equal(read_picture(tmp_path / name, 3), as_rgb), name
        image = read_picture(tmp_path / name, 1)
        assert image.shape == (6, 7, 1) and np.abs(image[..., 0].astype(int) - as_grey).max() <= 1, name


def test_a_number_that_is_a_class_can_be_left_out(tmp_path):
    """Without class_values the values are the classes; it was "given twice, in class_values", where nothing was."""
    write_picture(tmp_path / "images" / "a.jpg")
    write_mask(tmp_path / "masks" / "a.png", bands((0, 1, 2)))
    (item,) = list_all(tmp_path, num_classes=3, ignore_values=[0, 255])
    assert np.array_equal(read_item(item)[1], bands((255, 1, 2))) and len(item.coding.class_names) == 3
    with pytest.raises(ValueError, match="0 is given twice, in data.class_values and data.ignore_values"):
        list_all(tmp_path, num_classes=3, class_values={0: 0, 1: 1, 2: 2}, ignore_values=[0])
    with pytest.raises(ValueError, match=r"data.ignore_values leaves out all but 1 of the 3 classes"):
        list_all(tmp_path, num_classes=3, ignore_values=[0, 1])


@pytest.mark.parametrize("lossy", ["a.webp", "a.tif", "a.jpg"])
def test_a_mask_of_any_lossy_compression_is_taken_as_the_nearest_values(tmp_path, lossy):
    truth = np.zeros((64, 64), np.uint8)
    cv2.circle(truth, (30, 34), 20, 1, -1)
    write_picture(tmp_path / "images" / "a.png", 64, 64)
    options = {"a.webp": {"quality": 80}, "a.tif": {"compression": "jpeg"}, "a.jpg": {}}[lossy]
    write_mask(tmp_path / "masks" / lossy, truth * 255, **options)
    keys = {"class_values": {0: 0, 255: 1}}
    (item,) = list_all(tmp_path, **keys)
    with pytest.raises(ValueError, match=rf"mask \S*{lossy} .*compression changes.*nearest_value: true"):
        read_item(item)
    (item,) = list_all(tmp_path, **keys, nearest_value=True)
    assert (read_item(item)[1] == truth).mean() > 0.98


def test_colours_of_16_bits_are_numbers_too(tmp_path):
    """Rendered for the eye, 0, 100 and 200 of 65535 became 0, 0 and 1: two classes were one."""
    write_picture(tmp_path / "images" / "a.png")
    values = np.zeros((8, 10, 3), np.uint16)
    values[..., 0] = bands((0, 100, 200), np.uint16)
    (tmp_path / "masks").mkdir()
    tifffile.imwrite(tmp_path / "masks" / "a.tif", values, photometric="rgb")
    keys = {"class_values": {"0,0,0": 0, "1,0,0": 1}}
    for changes in (keys, {}):
        with pytest.raises(ValueError, match=r"a\.tif has colours of 16 bits; save it with 8 bits a channel"):
            read_item(list_all(tmp_path, **changes)[0])
    tifffile.imwrite(tmp_path / "masks" / "a.tif", np.minimum(values, 1) * 257, photometric="rgb")  # 8 bits, widened
    assert np.array_equal(read_item(list_all(tmp_path, **keys)[0])[1], bands((0, 1, 1)))


def test_folders_that_are_links_are_followed(tmp_path):
    """A folder below, and the folder of the masks."""
    write_pairs(tmp_path / "store" / "x", 3)
    write_pairs(tmp_path / "store" / "y", 2)
    root = tmp_path / "set"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
        (root / folder / "x").symlink_to(tmp_path / "store" / "x" / folder)
    assert names(list_all(root)) == ["x/000", "x/001", "x/002"]
    shutil.rmtree(root / "masks")
    (root / "masks").symlink_to(tmp_path / "store" / "y" / "masks")
    (root / "images" / "x").unlink()
    (root / "images").rmdir()
    (root / "images").symlink_to(tmp_path / "store" / "y" / "images")
    assert names(list_all(root)) == ["000", "001"]


# ---------------------------------------------------------------------------------------------------------------------
# splits


def test_the_seeded_split_depends_on_names_alone(tmp_path):
    write_pairs(tmp_path, 40)
    keys = data_keys("folders", tmp_path)
    splits = split_items(**keys)
    assert [len(split) for split in splits] == [32, 4, 4] == [len(set(names(split))) for split in splits]
    assert sorted(sum(map(names, splits), [])) == [f"{index:03d}" for index in range(40)]
    assert all(names(split) == sorted(names(split)) for split in splits)
    assert [names(split) for split in split_items(**keys)] == [names(split) for split in splits]
    other = split_items(**(keys | {"split_seed": 1}))
    assert names(other[1]) != names(splits[1])
    moved = shutil.copytree(tmp_path, tmp_path / "elsewhere")
    assert [names(split) for split in split_items(**data_keys("folders", moved))] == [names(split) for split in splits]


def test_list_files(tmp_path):
    root = write_pairs(tmp_path / "set", 9)
    (tmp_path / "train.txt").write_text("\ufeff# mine\n000\n\n001.jpg\r\nimages/002.jpg masks/002.png\n", "utf-8")
    (tmp_path / "test.txt").write_text("some/where/images/003.jpg\n004 1\n")
    lists = {"train_list": str(tmp_path / "train.txt"), "test_list": str(tmp_path / "test.txt")}
    train_items, val_items, test_items = split_items(**data_keys("folders", root, **lists, val_fraction=0.0))
    assert (names(train_items), names(val_items)) == (["000", "001", "002"], []) and names(test_items) == ["003", "004"]
    rest, val_items, test_items = split_items(**data_keys("folders", root, val_list=str(tmp_path / "test.txt")))
    assert names(val_items) == ["003", "004"] and len(rest) == 6 and len(test_items) == 1  # a tenth of the other seven
    (tmp_path / "wrong.txt").write_text("000\n077\n")
    with pytest.raises(ValueError, match="wrong.txt names '077', which the dataset lacks"):
        split_items(**data_keys("folders", root, train_list=str(tmp_path / "wrong.txt")))
    with pytest.raises(ValueError, match="003 2 times; a picture goes in one of train, val and test"):
        lists = {"train_list": str(tmp_path / "test.txt"), "val_list": str(tmp_path / "test.txt")}
        split_items(**data_keys("folders", root, **lists))
    with pytest.raises(FileNotFoundError, match="no list file nowhere.txt"):
        split_items(**data_keys("folders", root, val_list="nowhere.txt"))


def test_what_no_list_names_needs_no_mask(tmp_path):
    """PASCAL VOC has 17125 pictures, and masks of 2913."""
    write_pairs(tmp_path, 4)
    write_picture(tmp_path / "images" / "without.jpg")
    (tmp_path / "all.txt").write_text("\n".join(f"{index:03d}" for index in range(4)))
    assert len(list_all(tmp_path, train_list=str(tmp_path / "all.txt"))) == 4
    with pytest.raises(FileNotFoundError, match=r"1 of 5 pairs lack a file; image \S*without.jpg has no mask \S*.png"):
        list_all(tmp_path)


@pytest.mark.parametrize("name", ["Drawn cat 0", "Dr\u00e4wn", "IMG (2), it's"])
def test_lists_of_pets_and_streets_name_files_of_any_name(tmp_path, name):
    """Names were cut at the first space, and a letter with an accent met no file that has it as two characters."""
    on_disk = unicodedata.normalize("NFD", name)
    for folder, suffix, write in (
        ("pets/images", ".jpg", write_picture),
        ("pets/annotations/trimaps", ".png", lambda path: write_mask(path, bands((1, 2, 3)))),
        ("streets/train", ".png", write_picture),
        ("streets/trainannot", ".png", lambda path: write_mask(path, bands((0, 1)))),
    ):
        write(tmp_path / folder / f"{on_disk}{suffix}")
    (tmp_path / "pets" / "annotations" / "trainval.txt").write_text(f"{name} 1 1 1\n", encoding="utf-8")
    (tmp_path / "pets" / "annotations" / "test.txt").write_text("")
    (item,) = split_items(**data_keys("oxford_pet", tmp_path / "pets", val_fraction=0.0))[0]
    assert item.name == name and read_item(item)[1].max() == 2
    for split in ("train", "val", "test"):
        line = f"/SegNet/CamVid/train/{name}.png /SegNet/CamVid/trainannot/{name}.png\n" if split == "train" else ""
        (tmp_path / "streets" / f"{split}.txt").write_text(line, encoding="utf-8")
    (item,) = split_items(**data_keys("camvid", tmp_path / "streets"))[0]
    assert item.name == name and read_item(item)[1].max() == 1
    (tmp_path / "streets" / "train.txt").write_text("only/one.png\n")
    with pytest.raises(ValueError, match="has the line 'only/one.png'; must be two paths"):
        split_items(**data_keys("camvid", tmp_path / "streets"))


# ---------------------------------------------------------------------------------------------------------------------
# folders: which picture belongs to which mask


def test_pairs_in_subfolders_and_one_folder(tmp_path):
    for name in ("a/001", "a/002", "b/001"):
        write_picture(tmp_path / "one" / "images" / f"{name}.JPEG")
        write_mask(tmp_path / "one" / "masks" / f"{name}.png", bands((0, 1)))
    items = list_all(tmp_path / "one")
    assert names(items) == ["a/001", "a/002", "b/001"]
    assert [item.mask_path.parent.name for item in items] == ["a", "a", "b"]
    for name in ("1", "10", "[3]"):  # a prefix of another, and what a glob pattern would read (milesial #156)
        write_picture(tmp_path / "two" / f"{name}.png")
        write_mask(tmp_path / "two" / f"mask_{name}_x.png", bands((0, 1)))
    items = list_all(tmp_path / "two", image_dir=".", mask_dir=".", mask_start="mask_", mask_ending="_x")
    assert [item.mask_path.name for item in items] == ["mask_1_x.png", "mask_10_x.png", "mask_[3]_x.png"]
    assert [item.image_path.name for item in items] == ["1.png", "10.png", "[3].png"]
    with pytest.raises(ValueError, match="set data.mask_ending"):
        list_all(tmp_path / "two", image_dir=".", mask_dir=".")
    for kind in ("image", "mask"):  # of the other kind there is none, and "the same name but for the suffix" misleads
        with pytest.raises(ValueError, match=f"no file in .* between data.{kind}_start '' and data.{kind}_ending '_y'"):
            list_all(tmp_path / "two", image_dir=".", mask_dir=".", **{"mask_start": "", f"{kind}_ending": "_y"})
    for name in ("1", "2"):  # masks in a folder below the pictures
        write_picture(tmp_path / "three" / f"{name}.png")
        write_mask(tmp_path / "three" / "masks" / f"{name}.png", bands((0, 1)))
    assert names(list_all(tmp_path / "three", image_dir=".")) == ["1", "2"]


def test_split_folders(tmp_path):
    for split, num_images in (("tr", 5), ("va", 2), ("te", 3)):
        write_pairs(tmp_path / split, num_images)
    dirs = {"image_dir": "{split}/images", "mask_dir": "{split}/masks", "train_folder": "tr"}
    splits = split_items(**data_keys("folders", tmp_path, **dirs, val_folder="va", test_folder="te"))
    assert [len(split) for split in splits] == [5, 2, 3] and splits[1][0].name == "va/000"
    splits = split_items(**data_keys("folders", tmp_path, **dirs, val_folder="va", test_fraction=0.2))
    assert [len(split) for split in splits] == [4, 2, 1]
    with pytest.raises(ValueError, match="data.train_folder must be given"):
        split_items(**data_keys("folders", tmp_path, **(dirs | {"train_folder": None})))
    with pytest.raises(ValueError, match="goes in both or none"):
        split_items(**data_keys("folders", tmp_path, **(dirs | {"mask_dir": "masks"})))
    with pytest.raises(ValueError, match="data.val_folder is va, but data.image_dir images"):
        split_items(**data_keys("folders", tmp_path, val_folder="va"))


# ---------------------------------------------------------------------------------------------------------------------
# errors in the YAML


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "voc"}, "data.format is 'voc'; must be one of oxford_pet, isbi, camvid, folders"),
        ({"channels": 4}, "data.channels is 4; must be 1"),
        ({"on_bad": "ignore"}, "data.on_bad is 'ignore'; must be stop or skip"),
        ({"num_classes": 1}, "data.num_classes is 1; must be 2 to 254"),
        ({"class_names": ["cell"]}, "data.class_names has 1 different names .* but data.num_classes is 2"),
        ({"class_names": ["a", "a"]}, "data.class_names has 1 different names"),
        ({"boundary_class": "wall"}, "data.boundary_class is 'wall'; must be one of class 0, class 1, or null"),
        ({"class_values": {0: 0, 255: 2}}, r"data.class_values\[255\] is 2; must be a class index, 0 to 1"),
        ({"class_values": {0: 0, "red": 1}}, r"data.class_values\['red'\]: 'red' is no value"),
        ({"class_values": {0: 0, "256,0,0": 1}}, "'256,0,0' is no value"),
        ({"class_values": {0: 0, "255,0,0": 1}}, "hold integers and colours"),
        ({"ignore_values": [1]}, "data.ignore_values leaves out all but 1 of the 2 classes"),
        ({"ignore_values": [-1]}, "-1 is no value"),
        ({"val_fraction": 1.5}, "data.val_fraction is 1.5; must be in 0..1"),
        ({"val_fraction": 0.6, "test_fraction": 0.6}, "add up to over 1"),
    ],
)
def test_values_that_make_no_sense(tmp_path, changes, message):
    write_pairs(tmp_path)
    with pytest.raises(ValueError, match=message):
        split_items(**data_keys("folders", tmp_path, **changes))


def test_unknown_keys_missing_roots_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="unknown key data.valfraction; must be among data."):
        split_items(**data_keys("folders", write_pairs(tmp_path / "a")), valfraction=0.1)
    with pytest.raises(FileNotFoundError, match="data.root .*nowhere is not a folder"):
        split_items(**data_keys("folders", tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no folder \S*masks; see data/README.md"):
        write_picture(tmp_path / "b" / "images" / "1.jpg")
        split_items(**data_keys("folders", tmp_path / "b"))
    (tmp_path / "c" / "images").mkdir(parents=True)
    (tmp_path / "c" / "masks").mkdir()
    with pytest.raises(ValueError, match="holds no pictures in the layout 'folders'"):
        split_items(**data_keys("folders", tmp_path / "c"))
    write_pairs(tmp_path / "d", 2)
    with pytest.raises(ValueError, match="there are only 2 pictures to split"):
        split_items(**data_keys("folders", tmp_path / "d"))


def test_class_names():
    assert name_classes(3, None) == ["class 0", "class 1", "class 2"]
    assert name_classes(2, ["a", 7]) == ["a", "7"]


# ---------------------------------------------------------------------------------------------------------------------
# the layouts of published datasets


def write_pets(root: Path, names_by_list: dict[str, list[str]], unlisted=()) -> Path:
    for name in sum(names_by_list.values(), []) + list(unlisted):
        write_picture(root / "images" / f"{name}.jpg")
        write_mask(root / "annotations" / "trimaps" / f"{name}.png", bands((1, 3, 2)))
    for list_name, listed in names_by_list.items():
        text = "".join(f"{name} 1 1 1\n" for name in listed)
        (root / "annotations" / f"{list_name}.txt").write_text(text)
    return root


def test_oxford_pet_goes_by_its_lists(tmp_path):
    lists = {"trainval": [f"Abyssinian_{index}" for index in range(10)], "test": ["boxer_1", "boxer_2"]}
    root = write_pets(tmp_path, lists, unlisted=["Abyssinian_82"])
    (root / "annotations" / "trimaps" / "._Abyssinian_1.png").write_text("as published")
    train_items, val_items, test_items = split_items(**data_keys("oxford_pet", root))
    assert len(train_items) == 8 and len(val_items) == 2 and names(test_items) == ["boxer_1", "boxer_2"]
    assert sorted(names(train_items + val_items)) == sorted(lists["trainval"])
    assert np.array_equal(read_item(test_items[0])[1], bands((0, 2, 1)))
    two = split_items(**data_keys("oxford_pet_two_classes", root))[2]
    assert np.array_equal(read_item(two[0])[1], bands((1, IGNORE_INDEX, 0))) and two[0].coding.class_names[1] == "pet"
    (root / "annotations" / "trimaps" / "boxer_2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"image \S*images/boxer_2.jpg has no mask \S*trimaps/boxer_2.png"):
        split_items(**data_keys("oxford_pet", root))
    (root / "annotations" / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no list file .*test.txt"):
        split_items(**data_keys("oxford_pet", root))


def test_isbi_as_stacks_and_as_folders(tmp_path):
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (30, 12, 9), dtype=np.uint8)
    labels = rng.choice(np.uint8([0, 255]), (30, 12, 9))
    (tmp_path / "stacks").mkdir()
    for name, pages in (("train-volume", images), ("train-labels", labels), ("test-volume", images)):
        pages = [Image.fromarray(page) for page in pages]
        pages[0].save(tmp_path / "stacks" / f"{name}.tif", save_all=True, append_images=pages[1:])
    for index in range(30):
        write_mask(tmp_path / "folders" / "train" / "image" / f"{index}.png", images[index])
        write_mask(tmp_path / "folders" / "train" / "label" / f"{index}.png", labels[index])
    of_stacks = split_items(**data_keys("isbi", tmp_path / "stacks"))
    of_folders = split_items(**data_keys("isbi", tmp_path / "folders"))
    assert [len(split) for split in of_stacks] == [25, 5, 0]
    assert [names(split) for split in of_stacks] == [names(split) for split in of_folders]
    for item in sum(of_stacks + of_folders, []):
        image, class_map = read_item(item)
        assert image.shape == (12, 9, 1) and np.array_equal(image[..., 0], images[int(item.name)])
        assert np.array_equal(class_map, labels[int(item.name)] // 255)
    (tmp_path / "stacks" / "train-labels.tif").unlink()
    with pytest.raises(FileNotFoundError, match="no file .*train-labels.tif"):
        split_items(**data_keys("isbi", tmp_path / "stacks"))
    Image.fromarray(labels[0]).save(tmp_path / "stacks" / "train-labels.tif")
    with pytest.raises(ValueError, match="train-volume.tif has 30 pages, but .*train-labels.tif has 1"):
        split_items(**data_keys("isbi", tmp_path / "stacks"))
    with pytest.raises(FileNotFoundError, match="no file .*train-volume.tif and no folder .*image"):
        split_items(**data_keys("isbi", tmp_path))


@pytest.mark.parametrize("prefix", ["", "/SegNet/CamVid/", "C:\\CamVid\\"])
def test_camvid_reads_the_lists_as_published_and_as_cut(tmp_path, prefix):
    for split in ("train", "val", "test"):
        lines = []
        for index in range(2):
            image, mask = f"{split}/{split}_{index}.png", f"{split}annot/{split}_{index}.png"
            write_picture(tmp_path / image)
            write_mask(tmp_path / mask, bands((0, 10, 11)))
            line = f"{prefix}{image} {prefix}{mask}"
            lines.append(line.replace("/", "\\") if "\\" in prefix else line)
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    splits = split_items(**data_keys("camvid", tmp_path))
    assert [names(split) for split in splits] == [[f"{split}_0", f"{split}_1"] for split in ("train", "val", "test")]
    assert np.array_equal(read_item(splits[2][0])[1], bands((0, 10, IGNORE_INDEX)))
    (tmp_path / "val.txt").write_text("val/val_0.png\n")
    with pytest.raises(ValueError, match="val.txt has the line 'val/val_0.png'; must be two paths"):
        split_items(**data_keys("camvid", tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# the recipes of data/README.md, each on files in the dataset's layout


@pytest.fixture
def recipe_keys(tmp_path):
    """Return a function: name of a recipe -> its data keys, composed as a script does, with root below tmp_path."""
    recipes = re.findall(
        r"```yaml\n# configs/unet/data/(\w+).yaml\n(.*?)```", (ROOT / "data" / "README.md").read_text(), re.S
    )
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name, text in recipes:
        (tmp_path / "configs" / "unet" / "data" / f"{name}.yaml").write_text(text)

    def keys(name: str) -> dict:
        assert name in dict(recipes)
        with initialize_config_dir(str(tmp_path / "configs" / "unet"), version_base="1.3"):
            cfg = compose(f"data/{name}", [f"+data_root={tmp_path}"])
        return OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)

    keys.names = sorted(dict(recipes))
    return keys


def test_every_recipe_is_tested(recipe_keys):
    assert recipe_keys.names == ["cells", "cityscapes", "coco_stuff", "colored", "voc"]


def test_recipe_cells(tmp_path, recipe_keys):
    for index in range(10):
        write_picture(tmp_path / "cells" / f"{index:03d}.tif")
        write_mask(tmp_path / "cells" / f"{index:03d}_mask.png", bands((0, 255)))
    splits = split_items(**recipe_keys("cells"))
    assert [len(split) for split in splits] == [8, 1, 1]
    image, class_map = read_item(splits[0][0])
    assert image.shape == (8, 10, 1) and np.array_equal(class_map, bands((0, 1)))


def test_recipe_colored(tmp_path, recipe_keys):
    for index in range(10):
        write_picture(tmp_path / "colored" / "images" / f"{index}.jpg")
        colors = [(64, 0, 128), (255, 255, 255), (0, 0, 0), (128, 64, 128)]
        write_mask(tmp_path / "colored" / "masks" / f"{index}.png", bands(colors))
    assert np.array_equal(read_item(split_items(**recipe_keys("colored"))[0][0])[1], bands((2, 255, 0, 1)))


def test_recipe_voc_equals_torchvision(tmp_path, recipe_keys):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    rng = np.random.default_rng(6)
    palette = rng.integers(0, 256, 768).tolist()
    for index in range(7):
        write_picture(root / "JPEGImages" / f"2007_{index:06d}.jpg")
        index_map = rng.choice(np.uint8([*range(21), 255]), (8, 10))
        if index < 5:  # most pictures have no mask
            write_mask(root / "SegmentationClass" / f"2007_{index:06d}.png", index_map, palette)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000000\n2007_000002\n2007_000003\n")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000001\n2007_000004\n")
    *ours, test_items = split_items(**recipe_keys("voc"))
    assert not test_items
    for items, image_set in zip(ours, ("train", "val"), strict=True):
        theirs = torchvision.datasets.VOCSegmentation(tmp_path, "2012", image_set)
        assert [str(item.image_path) for item in items] == theirs.images
        for item, (image, mask) in zip(items, theirs, strict=True):
            assert np.array_equal(read_item(item)[1], np.asarray(mask))
            assert np.abs(read_item(item)[0].astype(int) - np.asarray(image)).max() <= 3  # JPEG decoders


def test_recipe_coco_stuff(tmp_path, recipe_keys):
    for split, num_images in (("train2017", 3), ("val2017", 2)):
        for index in range(num_images):
            write_picture(tmp_path / "coco" / split / f"{index:012d}.jpg")
            write_mask(tmp_path / "coco" / "stuffthingmaps" / split / f"{index:012d}.png", bands((0, 181, 255)))
    splits = split_items(**recipe_keys("coco_stuff"))
    assert [len(split) for split in splits] == [3, 2, 0]
    assert np.array_equal(read_item(splits[0][0])[1], bands((0, 181, IGNORE_INDEX)))


def test_recipe_cityscapes_equals_torchvision(tmp_path, recipe_keys):
    root = tmp_path / "cityscapes"
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau"), ("test", "berlin")):
        for index in range(2):
            stem = f"{city}_{index:06d}_000019"
            write_picture(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", 4, 40)
            ids = np.tile(np.arange(40, dtype=np.uint8) % 34, (4, 1))
            write_mask(root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png", ids)
            write_mask(root / "gtFine" / split / city / f"{stem}_gtFine_instanceIds.png", ids)
            write_mask(root / "gtFine" / split / city / f"{stem}_gtFine_color.png", np.stack([ids] * 3, 2))
            (root / "gtFine" / split / city / f"{stem}_gtFine_polygons.json").write_text("{}")
    train_items, val_items, test_items = split_items(**recipe_keys("cityscapes"))
    assert not test_items
    for items, split in ((train_items, "train"), (val_items, "val")):
        theirs = torchvision.datasets.Cityscapes(root, split, "fine", "semantic")
        assert [str(item.image_path) for item in items] == sorted(theirs.images)
        assert [str(item.mask_path) for item in items] == sorted(target for (target,) in theirs.targets)
        train_ids = np.array([label.train_id for label in theirs.classes if label.id >= 0], np.uint8)
        for item in items:
            assert np.array_equal(read_item(item)[1], train_ids[np.asarray(Image.open(item.mask_path))])
    names_of_trained = [label.name for label in theirs.classes if 0 <= label.train_id < 19]
    assert list(train_items[0].coding.class_names) == names_of_trained


# ---------------------------------------------------------------------------------------------------------------------
# real data


def test_real_oxford_pet_equals_torchvision(data_root):
    root = data_root / "oxford-iiit-pet"
    train_items, val_items, test_items = split_items(**data_keys("oxford_pet", root))
    for items, split in ((train_items + val_items, "trainval"), (test_items, "test")):
        theirs = torchvision.datasets.OxfordIIITPet(data_root, split, "segmentation")
        by_name = {path.stem: index for index, path in enumerate(theirs._images)}
        assert sorted(names(items)) == sorted(by_name)
        for item in items[::25]:
            image, trimap = theirs[by_name[item.name]]
            ours = read_item(item)
            assert np.array_equal(ours[1], np.asarray(trimap) - 1)
            assert ours[0].shape == np.asarray(image.convert("RGB")).shape
            assert np.abs(ours[0].astype(int) - np.asarray(image.convert("RGB"))).mean() < 2


def test_real_isbi(data_root):
    splits = split_items(**data_keys("isbi", data_root / "ISBI2012" / "membrane"))
    assert [len(split) for split in splits] == [25, 5, 0]
    image, class_map = read_item(splits[1][0])
    assert image.shape == (512, 512, 1) and class_map.shape == (512, 512)
    assert 0.6 < (class_map == 1).mean() < 0.9  # most is cell
    assert image[class_map == 1].mean() > image[class_map == 0].mean() + 20  # membranes are dark


def test_real_camvid(data_root):
    splits = split_items(**data_keys("camvid", data_root / "CamVid"))
    assert [len(split) for split in splits] == [60, 14, 12]
    for item in splits[2][:3]:
        image, class_map = read_item(item)
        stored = np.asarray(Image.open(item.mask_path))
        assert image.shape == (360, 480, 3)
        assert np.array_equal(class_map, np.where(stored == 11, IGNORE_INDEX, stored))
