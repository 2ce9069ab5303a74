"""Datasets of pictures with one class per pixel, read straight from disk: Oxford-IIIT Pet, ISBI 2012, CamVid, any two
folders of pictures and masks, and pictures with annotated objects.

`split_items(**config["data"])` lists a dataset: its keyword arguments are the keys of configs/unet/data/*.yaml; of
instances.yaml they are those of `split_objects`, after `find_classes`.
`read_item(item)` reads one picture and its class map, uint8 (H, W): 0..num_classes-1, or 255 (IGNORE_INDEX) for pixels
that neither train nor count. Which value (or colour) of a mask file is which class stands in the YAML.
"""

import contextlib
import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np

from utils import listing
from utils.images import (
    IGNORE_INDEX,
    PICTURE_SUFFIXES,
    count_pages,
    lossy_kind,
    read_image,
    read_image_unscaled,
    read_label_map,
)
from utils.instances import readers as instances
from utils.segmentation import objects
from utils.settings import check_keys, one_of

UNKNOWN = 254  # in class maps under way: a value of the file that the YAML gives no class
MAX_VALUE = 65535  # a mask's values are looked up in a table; larger ones are unknown
BLURRED = 24  # a file with more values than this has been compressed or resized: classes are not that many
SPLIT_FIELD = "{split}"  # in image_dir and mask_dir: stands for train_folder, val_folder, test_folder


@dataclass(frozen=True)
class MaskCoding:
    """How the values of a mask file become classes."""

    class_names: tuple[str, ...]
    is_given: bool  # class_values stands in the YAML; if not, values are class indices
    is_color: bool  # values are RGB colours, as r * 65536 + g * 256 + b
    classes: tuple[tuple[int, int], ...]  # (value, class index or IGNORE_INDEX)
    nearest_value: bool  # another value is taken as the nearest of these
    boundary: int | None = None  # a class that separates objects, such as membranes cells


@dataclass(frozen=True)
class Item:
    """One picture and its mask, as files."""

    name: str  # unique in the dataset; lists are sorted by it
    image_path: Path
    mask_path: Path
    channels: int  # 1 or 3, of the picture as the network gets it
    coding: MaskCoding
    page: int | None = None  # the page in both files, if they are TIFF stacks
    objects: instances.Item | None = None  # of a picture with annotated objects, whose class map `draw` makes
    draw: Callable[[instances.Instances], np.ndarray] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# list a dataset


def split_items(
    format: str,
    root: str,
    channels: int,
    num_classes: int,
    class_names: list[str] | None,
    class_values: dict | None,
    ignore_values: list,
    nearest_value: bool,
    on_bad: str,
    boundary_class: str | None = None,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    split_seed: int = 0,
    **keys,
) -> tuple[list[Item], list[Item], list[Item]]:
    """List a dataset's pictures and split them into training, validation and test.

    The split is what the dataset has on disk (folders, list files), else seeded fractions of the sorted names, which
    depend on nothing else.

    Args:
        format: a name in LISTERS.
        root: the dataset's folder, relative to where the user stands.
        channels: 1 (grey) or 3 (RGB).
        num_classes: 2 to 254.
        class_names: one for each class; None: "class 0", "class 1", ...
        class_values: {value of the mask file: class index}; a value is an integer or a colour "r,g,b"; None: the
            values are the class indices.
        ignore_values: values (or colours) of the mask file whose pixels become IGNORE_INDEX; where class_values is None
            also classes, which then have no pixels.
        nearest_value: take any other value as the nearest of these, instead of refusing it.
        on_bad: what to do with a picture that lacks its mask, or the reverse: "stop" raises; with "skip" such an item
            is listed, and the dataset check leaves it out and counts it.
        boundary_class: the name of a class that separates objects, such as membranes cells; None: there is none.
        val_fraction, test_fraction, split_seed: which shares of the training part validate and test, and which pictures
            those are, where the dataset on disk has no such part.
        keys: the other keys of that format's configs/unet/data/*.yaml; the functions below explain them.
    Returns:
        (train_items, val_items, test_items), each sorted by name.
    Raises:
        FileNotFoundError: for a folder or file that is not there, naming both files of a pair.
        ValueError: for an unknown format or key, or a value that makes no sense.
    """
    if format not in LISTERS:
        of_objects = f"; {format} goes with data=instances" if format in instances.LISTERS else ""
        raise ValueError(f"data.format is {format!r}; must be one of {', '.join(LISTERS)}{of_objects}")
    check_channels(channels)
    coding = mask_coding(num_classes, class_names, class_values, ignore_values, nearest_value, boundary_class)
    item = functools.partial(Item, channels=channels, coding=coding)
    list_format = functools.partial(LISTERS[format], listing.dataset_folder(root), item)
    check_keys(list_format, keys, "data", others=("val_fraction", "test_fraction", "split_seed"))
    train_items, val_items, test_items = list_format(**keys)
    _stop_at_missing([*train_items, *(val_items or []), *(test_items or [])], on_bad)
    val_names, test_names = listing.draw_split(
        {item.name for item in train_items},
        val_fraction if val_items is None else 0.0,
        split_seed,
        test_fraction if test_items is None else 0.0,
    )
    if val_items is None:
        val_items = [item for item in train_items if item.name in val_names]
    if test_items is None:
        test_items = [item for item in train_items if item.name in test_names]
    train_items = [item for item in train_items if item.name not in val_names | test_names]
    rule = "a picture goes in one of train, val and test"
    return tuple(listing.sort_splits([train_items, val_items, test_items], root, format, rule))


def split_objects(
    format: str | None,
    root: str,
    channels: int,
    classes: list[str] | None,
    order: Annotated[str, one_of("size", "file")],
    crowd: Annotated[str, one_of("ignore", "skip", "keep")],
    ignore_labels: list[str],
    num_classes: int | None,
    class_names: list[str] | None,
    on_bad: str,
    voc_class_names: list[str] | None = None,
    **keys,
) -> tuple[list[Item], list[Item], list[Item]]:
    """List pictures with annotated objects, whose class maps are drawn, and split them into training and validation.

    Args:
        format, root, on_bad: as those of `split_items` in utils/instances/readers.py; a format must be given.
        channels: 1 (grey) or 3 (RGB).
        classes, num_classes, class_names: from `find_classes`.
        order: what lies on top, see `objects.draw_classes`.
        crowd: of COCO's regions marked iscrowd: "ignore": their pixels become IGNORE_INDEX; "skip": they are as if they
            were not there; "keep": objects like others.
        ignore_labels: names of classes whose pixels become IGNORE_INDEX.
        voc_class_names: of the numbers 1, 2, ... in the class maps of the format voc; None: PASCAL VOC's own.
        keys: as those of `split_items` there; None: not given.
    Returns:
        (train_items, val_items, no test items), each sorted by name.
    Raises:
        FileNotFoundError, ValueError: as `split_items` there.
    """
    check_channels(channels)
    if format not in instances.LISTERS:
        raise ValueError(f"data.format is {format}; must be one of {', '.join(instances.LISTERS)}")
    keys = {key: value for key, value in keys.items() if value is not None} | {"on_bad": on_bad}
    if format == "coco":
        keys["crowd"] = "keep"  # drawn, ignored or passed over
    elif format == "labelme":
        keys["ignore_labels"] = []  # drawn, and ignored
    elif format == "voc" and voc_class_names is not None:
        keys["class_names"] = voc_class_names
    check_keys(instances.split_items, {"format": format, "root": root, **keys}, "data")
    coding = mask_coding(num_classes, class_names, None, [], False)
    draw = functools.partial(
        objects.draw_classes,
        class_names=coding.class_names,
        order=order,
        crowd=crowd,
        ignore_labels=tuple(ignore_labels),
    )
    make = functools.partial(Item, channels=channels, coding=coding, draw=draw)
    train_items, val_items = (
        [make(item.name, item.image_path, item.annotation_path, objects=item) for item in part]
        for part in instances.split_items(format, root, **keys)
    )
    return train_items, val_items, []


def find_classes(reader_keys: dict) -> dict:
    """Find the classes of a dataset of pictures with annotated objects: the keys of the data YAML that say them.

    Args:
        reader_keys: those of `split_objects`.
    Returns:
        {"classes": names of objects' classes, "class_names": the background's before them, "num_classes": how many};
        where all three are given, these.
    Raises:
        FileNotFoundError, ValueError: as `split_objects`; for a class that no object has, more classes than a map can
            hold, and another num_classes or class_names than those that follow.
    """
    check_keys(split_objects, reader_keys, "data")
    given = {key: reader_keys[key] for key in ("classes", "num_classes", "class_names")}
    if given["classes"] and given == _follow_from(given["classes"]):
        return given
    root, listed = reader_keys["root"], reader_keys | _follow_from([objects.ONE_CLASS]) | {"on_bad": "skip"}
    items = [item.objects for part in split_objects(**listed) for item in part]
    try:
        names = objects.list_classes(reader_keys["format"], items, reader_keys["ignore_labels"])
    except ValueError as error:
        if given["classes"] != [objects.ONE_CLASS]:
            raise ValueError(f"data.root {root}: {error}") from error
        names = given["classes"]
    classes = names
    if given["classes"] is not None:
        classes = [name for name in given["classes"] if not objects.is_background(name)]
        shown = ", ".join(listing.first_few(names, 20))
        if not classes or len(set(classes)) < len(classes):
            raise ValueError(f"data.classes is {given['classes']}; must be null, or different names among {shown}")
        if unknown := [name for name in classes if name not in names]:
            raise ValueError(
                f"data.classes names {', '.join(map(repr, unknown))}, which data.root {root} lacks; it has {shown}"
            )
    if len(classes) > objects.MOST_CLASSES:
        raise ValueError(
            f"data.root {root} has {len(classes)} classes, and a class map holds {objects.MOST_CLASSES} beside the "
            "background; choose some with data.classes"
        )
    for key, value in _follow_from(classes).items():
        if given[key] not in (None, value) and key != "classes":
            raise ValueError(f"data.{key} is {given[key]}, but follows from the classes, and is {value}; leave it null")
    return _follow_from(classes)


def _follow_from(classes: list[str]) -> dict:
    """Return the keys of the data YAML that follow from the classes of objects."""
    class_names = [objects.BACKGROUND, *classes]
    return {"classes": classes, "num_classes": len(class_names), "class_names": class_names}


# A function of each format: (root, item, its own keys) -> training, validation and test items; None for a part that
# `split_items` then draws from the training part. `item(name, image_path, mask_path, page=None)` makes an item.


def list_oxford_pet(root: Path, item) -> tuple[list[Item], None, list[Item]]:
    """List Oxford-IIIT Pet by its list files: trainval.txt, a part of which is validation, and test.txt.

    Pictures <root>/images/<name>.jpg, trimaps <root>/annotations/trimaps/<name>.png. Files that are in neither list
    are left out: the published set has 41 of them.
    """
    image_dir, mask_dir = root / "images", root / "annotations" / "trimaps"
    listed = []
    for list_name in ("trainval.txt", "test.txt"):
        lines = listing.read_lines(root / "annotations" / list_name)
        names = [re.sub(r"(\s+\d+){3}$", "", line) for line in lines]  # less class, species and breed
        paths = [(_as_on_disk(image_dir / f"{name}.jpg"), _as_on_disk(mask_dir / f"{name}.png")) for name in names]
        listed.append([item(name, *pair) for name, pair in zip(names, paths, strict=True)])
    return listed[0], None, listed[1]


def list_isbi(root: Path, item) -> tuple[list[Item], None, None]:
    """List ISBI 2012: the challenge's train-volume.tif and train-labels.tif, or train/{image,label}/<number>.png.

    The challenge's own test slices have no public labels and are not listed. Both forms give the same split.
    """
    volume_path, labels_path = root / "train-volume.tif", root / "train-labels.tif"
    if os.path.lexists(volume_path) or os.path.lexists(labels_path):  # a link to nothing, too
        num_pages, num_label_pages = count_pages(volume_path), count_pages(labels_path)
        if num_pages != num_label_pages:
            raise ValueError(
                f"{volume_path} has {num_pages} pages, but {labels_path} has {num_label_pages}; copy both again"
            )
        return [item(str(page), volume_path, labels_path, page=page) for page in range(num_pages)], None, None
    image_dir, mask_dir = root / "train" / "image", root / "train" / "label"
    if not image_dir.is_dir():
        raise FileNotFoundError(
            f"no file {volume_path} and no folder {image_dir}; see data/README.md for the layouts of isbi, or "
            "change data.root"
        )
    return [item(*pair) for pair in listing.pair_files(image_dir, mask_dir)], None, None


def list_camvid(root: Path, item) -> tuple[list[Item], list[Item], list[Item]]:
    """List CamVid in SegNet's form: {train,val,test}.txt, each line a picture and its mask.

    Of each path the last folder and the name count, below root: the published lists start with /SegNet/CamVid/.
    """
    splits = []
    for split in ("train", "val", "test"):
        items = []
        list_path = root / f"{split}.txt"
        for line in listing.read_lines(list_path):
            two = re.fullmatch(r"(.*\S\.\w+)\s+(\S.*\.\w+)", line)  # names may have spaces
            if two is None:
                raise ValueError(f"{list_path} has the line {line!r}; must be two paths, of a picture and of its mask")
            image_path, mask_path = (root.joinpath(*Path(path.replace("\\", "/")).parts[-2:]) for path in two.groups())
            items.append(item(image_path.stem, _as_on_disk(image_path), _as_on_disk(mask_path)))
        splits.append(items)
    return tuple(splits)


def list_two_folders(
    root: Path,
    item,
    image_dir: str,
    mask_dir: str,
    image_start: str,
    image_ending: str,
    mask_start: str,
    mask_ending: str,
    train_folder: str | None,
    val_folder: str | None,
    test_folder: str | None,
    train_list: str | None,
    val_list: str | None,
    test_list: str | None,
) -> tuple[list[Item], list[Item] | None, list[Item] | None]:
    """List pictures <root>/<image_dir>/<name>.* with masks <root>/<mask_dir>/<name>.*

    Before and after the name a picture's file has image_start and image_ending, a mask's mask_start and mask_ending. A
    name may have folders before it, the same on both sides. Where image_dir and mask_dir hold "{split}", that stands
    for train_folder, val_folder and test_folder. Otherwise list files name the parts, one name a line (a picture
    without mask that no list names is left out); with val_list or test_list alone, training is the rest. A part without
    folder and list is a seeded fraction of training.
    """
    affixes = (image_start, image_ending), (mask_start, mask_ending)

    def list_folder(folder: str = "") -> list[Item]:
        dirs = [root / parent.replace(SPLIT_FIELD, folder) for parent in (image_dir, mask_dir)]
        if dirs[0] == dirs[1] and affixes[0] == affixes[1]:
            raise ValueError(
                f"data.image_dir and data.mask_dir are both {dirs[0]}: set data.mask_ending, such as _mask for "
                "001.png and 001_mask.png, or keep the masks in a folder of their own"
            )
        pairs = listing.pair_files(*dirs, *affixes, with_subfolders=True)
        suffixes = Counter(path.suffix for path in dirs[0].iterdir() if path.suffix and path.is_file())
        if not pairs and suffixes and (suffix := suffixes.most_common(1)[0][0]).lower() not in PICTURE_SUFFIXES:
            raise ValueError(
                f"{dirs[0]} has {suffixes[suffix]} files of {suffix}, which are not read: save them as one of "
                + ", ".join(PICTURE_SUFFIXES)
            )
        for number, (kind, around) in enumerate(zip(("image", "mask"), affixes, strict=True)):
            if pairs and any(around) and not any(os.path.lexists(pair[1 + number]) for pair in pairs):
                raise ValueError(
                    f"no file in {dirs[number]} has a name between data.{kind}_start {around[0]!r} and "
                    f"data.{kind}_ending {around[1]!r} (without its suffix); correct them"
                )
        return [item(f"{folder}/{name}" if folder else name, *paths) for name, *paths in pairs]

    lists = {"train_list": train_list, "val_list": val_list, "test_list": test_list}
    folders = {"train_folder": train_folder, "val_folder": val_folder, "test_folder": test_folder}
    given_lists = {key: value for key, value in lists.items() if value is not None}
    given_folders = {key: value for key, value in folders.items() if value is not None}
    if (SPLIT_FIELD in image_dir) != (SPLIT_FIELD in mask_dir):
        raise ValueError(f"data.image_dir is {image_dir}, data.mask_dir {mask_dir}; {SPLIT_FIELD} goes in both or none")
    if SPLIT_FIELD in image_dir:
        if given_lists or train_folder is None:
            raise ValueError(
                f"data.image_dir is {image_dir}: with {SPLIT_FIELD} in it, data.train_folder must be given, and "
                f"train_list, val_list, test_list be null; they are {train_folder} and {given_lists or 'null'}"
            )
        return tuple(None if folder is None else list_folder(folder) for folder in folders.values())
    if given_folders:
        key, value = next(iter(given_folders.items()))
        raise ValueError(
            f"data.{key} is {value}, but data.image_dir {image_dir} and data.mask_dir {mask_dir} have no {SPLIT_FIELD} "
            f"for it to stand in, as in images/{SPLIT_FIELD} and masks/{SPLIT_FIELD}"
        )
    items = {listed.name: listed for listed in list_folder()}
    names = [None if path is None else listing.read_list(path, set(items), affixes[0]) for path in lists.values()]
    if train_list is None:
        elsewhere = {name for part in names if part is not None for name in part}
        names[0] = [name for name in items if name not in elsewhere]
    return tuple(None if part is None else [items[name] for name in part] for part in names)


LISTERS = {"oxford_pet": list_oxford_pet, "isbi": list_isbi, "camvid": list_camvid, "folders": list_two_folders}


# ---------------------------------------------------------------------------------------------------------------------
# files and pairs


def _as_on_disk(path: Path) -> Path:
    """Find the file that a list names, whose accents the file system may write otherwise; itself if there is none."""
    if os.path.lexists(path) or not path.parent.is_dir():
        return path
    name = unicodedata.normalize("NFC", path.name)
    return next((other for other in path.parent.iterdir() if unicodedata.normalize("NFC", other.name) == name), path)


def _stop_at_missing(items: list[Item], on_bad: str) -> None:
    remedy = suggest_partners(items) if on_bad == "stop" else ""
    listing.stop_at_missing([(item.image_path, item.mask_path) for item in items], on_bad, "mask", remedy)


def suggest_partners(items: list[Item]) -> str:
    """Say what gives files that lack a picture or a mask their partner; "" where a few got lost, or none."""
    without_mask, without_image = listing.find_missing([(item.image_path, item.mask_path) for item in items])
    missing = [mask for _, mask in without_mask] + [image for image, _ in without_image]
    present = {}  # (folder, stem) -> a file of another suffix
    for folder in {path.parent for path in missing if path.parent.is_dir()}:
        present |= {(folder, path.stem): path for path in sorted(folder.iterdir()) if path.is_file()}
    for path in missing:
        other = present.get((path.parent, path.stem))
        if other is not None and other.suffix.lower() not in PICTURE_SUFFIXES:
            read = ", ".join(PICTURE_SUFFIXES)
            return f"{other} is there, but files of {other.suffix} are not read; save them as PNG (read are {read})"
    image_paths = [image for image, _ in without_mask if os.path.lexists(image)]
    if 4 * len(image_paths) > len(items):  # not a few that got lost: another rule
        return suggest_pairing(image_paths, [mask for _, mask in without_image if os.path.lexists(mask)])
    return ""


def suggest_pairing(image_paths: list[Path], mask_paths: list[Path]) -> str:
    """Find what pairs files whose names differ by a fixed start or ending, such as 001.jpg and 001_mask.png.

    Args:
        image_paths, mask_paths: the files that have no partner by name.
    Returns:
        the YAML lines that pair most pictures, after words that introduce them; other words if none pairs half of them.
    """
    image_stems, mask_stems = [path.stem for path in image_paths], sorted({path.stem for path in mask_paths})
    num_same = {}  # rule -> characters of the name it leaves
    for image_stem in image_stems[:3]:
        for mask_stem in mask_stems[:1000]:
            match = SequenceMatcher(None, image_stem, mask_stem, False).find_longest_match()
            image_affixes = image_stem[: match.a], image_stem[match.a + match.size :]
            mask_affixes = mask_stem[: match.b], mask_stem[match.b + match.size :]
            if match.size:
                num_same[(*image_affixes, *mask_affixes)] = match.size
    best, num_paired = None, 1
    for rule in sorted(num_same, key=lambda rule: -num_same[rule])[:100]:
        start, ending, mask_start, mask_ending = rule
        fitting = [stem for stem in image_stems if stem.startswith(start) and stem.endswith(ending)]
        renamed = {mask_start + stem.removeprefix(start).removesuffix(ending) + mask_ending for stem in fitting}
        if len(renamed.intersection(mask_stems)) > num_paired:
            best, num_paired = rule, len(renamed.intersection(mask_stems))
    if best is None or 2 * num_paired < len(image_stems):
        return "give a picture and its mask the same name but for the suffix"
    keys = zip(("image_start", "image_ending", "mask_start", "mask_ending"), best, strict=True)
    lines = ", ".join(f"{key}: {value}" for key, value in keys if value)
    return f"in configs/unet/data/folders.yaml set {lines}, which pairs {num_paired}"


# ---------------------------------------------------------------------------------------------------------------------
# which value is which class


def name_classes(num_classes: int, class_names: list[str] | None) -> list[str]:
    """Return one name for each class: those given, or "class 0", "class 1", ...

    Raises:
        ValueError: for fewer than 2 or more than 254 classes, or another number of names.
    """
    if not isinstance(num_classes, int) or not 2 <= num_classes <= UNKNOWN:
        raise ValueError(
            f"data.num_classes is {num_classes!r}; must be 2 to {UNKNOWN} (background, if there is one, is a class)"
        )
    if class_names is None:
        return [f"class {index}" for index in range(num_classes)]
    if len(class_names) != num_classes or len(set(class_names)) != num_classes:
        raise ValueError(
            f"data.class_names has {len(set(class_names))} different names ({', '.join(map(str, class_names[:8]))}), "
            f"but data.num_classes is {num_classes}; give each class one, or class_names: null"
        )
    return [str(name) for name in class_names]


def mask_coding(
    num_classes: int,
    class_names: list[str] | None,
    class_values: dict | None,
    ignore_values: list,
    nearest_value: bool,
    boundary_class: str | None = None,
) -> MaskCoding:
    """Turn the keys of the data YAML into how mask values become classes.

    Raises:
        ValueError: naming the key, for a class that does not exist, a value that is neither an integer nor a colour,
            or integers and colours in one mapping.
    """
    names = name_classes(num_classes, class_names)
    if boundary_class is not None and boundary_class not in names:
        raise ValueError(f"data.boundary_class is {boundary_class!r}; must be one of {', '.join(names)}, or null")
    boundary = None if boundary_class is None else names.index(boundary_class)
    given = class_values
    if given is None:  # a class can be left out, too
        given = {index: index for index in range(num_classes) if index not in ignore_values}
        if len(given) < 2:
            raise ValueError(f"data.ignore_values leaves out all but {len(given)} of the {num_classes} classes")
    pairs = [(f"data.class_values[{value!r}]", value, class_index) for value, class_index in given.items()]
    pairs += [("data.ignore_values", value, IGNORE_INDEX) for value in ignore_values]
    classes, kinds = {}, set()
    for key, value, class_index in pairs:
        is_index = isinstance(class_index, int) and (0 <= class_index < num_classes or key == "data.ignore_values")
        if not is_index:
            raise ValueError(
                f"{key} is {class_index!r}; must be a class index, 0 to {num_classes - 1} (data.num_classes is "
                f"{num_classes}); values to leave out go into data.ignore_values"
            )
        number, is_color = _parse_value(key, value)
        if number in classes:
            raise ValueError(f"{key}: {value!r} is given twice, in data.class_values and data.ignore_values")
        classes[number] = class_index
        kinds.add(is_color)
    if len(kinds) > 1:
        raise ValueError(
            "data.class_values and data.ignore_values hold integers and colours; a mask file has one kind: "
            'write grey 0 as the colour "0,0,0"'
        )
    is_given, is_color = class_values is not None, kinds == {True}
    return MaskCoding(tuple(names), is_given, is_color, tuple(classes.items()), nearest_value, boundary)


def _parse_value(key: str, value: object) -> tuple[int, bool]:
    """Return a mask value of the YAML as a number, and whether it is a colour."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_VALUE:
        return value, False
    parts = str(value).split(",")
    if len(parts) == 3 and all(part.strip().isdigit() and int(part) <= 255 for part in parts):
        red, green, blue = map(int, parts)
        return red * 65536 + green * 256 + blue, True
    raise ValueError(
        f'{key}: {value!r} is no value of a mask file; must be an integer 0 to {MAX_VALUE}, or a colour "r,g,b" such '
        'as "128,0,0"'
    )


@functools.lru_cache(maxsize=4)
def _class_table(coding: MaskCoding) -> np.ndarray:
    """Return the class of every value, uint8, UNKNOWN where there is none, as for all values above MAX_VALUE."""
    table = np.full(2**24 if coding.is_color else MAX_VALUE + 2, UNKNOWN, np.uint8)
    for value, class_index in coding.classes:
        table[value] = class_index
    return table


# ---------------------------------------------------------------------------------------------------------------------
# read one item


def check_channels(channels: int) -> None:
    """Raise a ValueError for channels that no picture is brought to."""
    if type(channels) is not int or channels not in (1, 3):
        raise ValueError(f"data.channels is {channels!r}; must be 1 (grey) or 3 (colour; alpha is dropped)")


def read_item(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Read a picture and its class map.

    Returns:
        image uint8 (H, W, channels), RGB or grey; class_map uint8 (H, W), 0..num_classes-1 or IGNORE_INDEX.
    Raises:
        FileNotFoundError, ValueError: with the file, what is wrong, and the remedy; also if the two differ in size.
    """
    image, class_map = read_picture(item.image_path, item.channels, item.page), read_class_map(item)
    check_same_size(item, image.shape[:2], class_map.shape)
    return image, class_map


def check_same_size(item: Item, image_hw: tuple[int, int], mask_hw: tuple[int, int]) -> None:
    """Raise a ValueError that names both files if a picture and its mask differ in size (height, width)."""
    if item.objects is not None:
        instances.check_same_size(item.objects, image_hw, mask_hw)
    if tuple(image_hw) != tuple(mask_hw):
        remedy = "export both at one size (masks with nearest-neighbour resizing)"
        if tuple(image_hw) == tuple(mask_hw[::-1]):
            remedy = "if the picture carries an EXIF rotation, which is applied here, turn the mask too"
        raise ValueError(
            f"image {item.image_path} is {image_hw[0]} x {image_hw[1]} px (height x width), but its mask "
            f"{item.mask_path} is {mask_hw[0]} x {mask_hw[1]}; {remedy}, or leave such pairs out with on_bad: skip"
        )


def read_picture(path: Path, channels: int, page: int | None = None) -> np.ndarray:
    """Read a picture as a network gets it: grey or RGB, 8 bits.

    A grey file is repeated for 3 channels, and a colour file becomes its luminance for 1. EXIF rotation, alpha,
    palettes and 16 bits are treated as `read_image` does.

    Args:
        channels: 1 or 3.
        page: of a file of several, 0-based.
    Returns:
        uint8 (H, W, channels).
    Raises:
        FileNotFoundError, ValueError: with the path and the reason.
    """
    image = read_image(path, page)
    return image if channels == 3 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]


def read_class_map(item: Item) -> np.ndarray:
    """Read a mask and give each pixel its class.

    Returns:
        uint8 (H, W): 0..num_classes-1 or IGNORE_INDEX.
    Raises:
        FileNotFoundError, ValueError: with the file; also for a value without a class.
    """
    class_map, values, is_color = decode_mask(item)
    if (class_map == UNKNOWN).any():
        fault, _ = describe_unknown(item, class_map, values, is_color)
        raise ValueError(f"{fault}; check=true proposes class_values and ignore_values for the data YAML")
    return class_map


def decode_mask(item: Item) -> tuple[np.ndarray, np.ndarray, bool]:
    """Read a mask and look its values up, leaving UNKNOWN where a value has no class.

    Returns:
        class_map uint8 (H, W); the file's values int32 (H, W); whether these are colours, r * 65536 + g * 256 + b.
    Raises:
        FileNotFoundError, ValueError: with the file, if it cannot be read or is a JPEG.
    """
    coding = item.coding
    if item.objects is not None:
        class_map = item.draw(item.objects.read())
        return class_map, class_map.astype(np.int32), False
    values, is_color = _read_mask_values(item)
    if is_color != coding.is_color:
        return np.full(values.shape, UNKNOWN, np.uint8), values, is_color
    table = _class_table(coding)
    class_map = table[np.minimum(values, len(table) - 1)]
    if coding.nearest_value:
        is_unknown = class_map == UNKNOWN
        class_map[is_unknown] = _nearest_classes(coding, values[is_unknown])
    return class_map, values, is_color


def _nearest_classes(coding: MaskCoding, values: np.ndarray) -> np.ndarray:
    """Return the class of the nearest listed value, uint8 (N,), for values (N,)."""
    different, index = np.unique(values, return_inverse=True)
    listed, classes = np.array(coding.classes).T
    points, listed_points = (unpack_colors(n) if coding.is_color else n[:, None] for n in (different, listed))
    nearest, least = np.zeros(len(points), int), np.full(len(points), np.inf)
    for number, listed_point in enumerate(listed_points):  # one by one: a JPEG can have a million colours
        distance = np.square(points.astype(np.int64) - listed_point).sum(1)
        is_nearer = distance < least
        nearest[is_nearer], least[is_nearer] = number, distance[is_nearer]
    return classes.astype(np.uint8)[nearest][index]


def _read_mask_values(item: Item) -> tuple[np.ndarray, bool]:
    """Return a mask's values as stored, int32 (H, W), and whether they are colours."""
    path, coding = item.mask_path, item.coding
    if item.page is not None:
        return read_label_map(path, item.page), False
    if lossy := lossy_kind(path):
        if not coding.nearest_value:
            raise ValueError(
                f"mask {path} is {lossy}, whose compression changes values; export masks as PNG, or, if there is "
                "nothing else, take each pixel as the nearest of the values in class_values with nearest_value: true"
            )
        image_rgb = read_image(path)
        if coding.is_color or np.ptp(image_rgb, 2).max() > BLURRED:
            return _pack(image_rgb), True
        return image_rgb[..., 1].astype(np.int32), False
    if coding.is_color:
        return _pack(_read_colors(path)), True
    try:
        return read_label_map(path), False
    except ValueError:
        has_colors = False
        with contextlib.suppress(ValueError):
            has_colors = np.ptp(read_image_unscaled(path), 2).any()
        if not has_colors:
            raise
    return _pack(_read_colors(path)), True


def _read_colors(path: Path) -> np.ndarray:
    """Read a mask's colours, uint8 (H, W, 3) RGB; those of 16 bits only where these are 8 bits, widened."""
    colors = read_image_unscaled(path)
    if colors.dtype == np.uint8:
        return colors
    if (colors % 257).any():
        raise ValueError(
            f"mask {path} has colours of 16 bits; save it with 8 bits a channel, as class_values lists them"
        )
    return (colors // 257).astype(np.uint8)


def _pack(image_rgb: np.ndarray) -> np.ndarray:
    """Put a colour into one number: uint8 (H, W, 3) to int32 (H, W)."""
    red, green, blue = cv2.split(image_rgb.astype(np.int32))
    return (red << 16) | (green << 8) | blue


def unpack_colors(values: np.ndarray) -> np.ndarray:
    """Take colours (N,) apart again: int (N, 3)."""
    return np.stack([values >> 16, values >> 8 & 255, values & 255], 1)


def describe_unknown(
    item: Item, class_map: np.ndarray, values: np.ndarray, is_color: bool
) -> tuple[str, dict[int, int]]:
    """Say which values of a mask have no class.

    Args:
        class_map, values, is_color: what `decode_mask` returned, with UNKNOWN in it.
    Returns:
        one line that names the file; {value: pixels}, most pixels first.
    """
    different, counts = np.unique(values[class_map == UNKNOWN], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    unknown = {int(different[index]): int(counts[index]) for index in order}
    shown = ", ".join(
        f"{yaml_value(value, is_color)} ({count / values.size:.2%} of its pixels)"
        for value, count in list(unknown.items())[:4]
    )
    more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
    what = "values"
    if is_color:
        what = "colours" if item.coding.is_color else "colours, where class_values expects one number per pixel,"
    page = "" if item.page is None else f", page {item.page},"
    return f"mask {item.mask_path}{page} has {what} that are no class: {shown}{more}", unknown


def yaml_value(value: int, is_color: bool) -> str:
    """Write a mask value as the data YAML has it: 255, or "128,0,0"."""
    return f'"{value >> 16},{value >> 8 & 255},{value & 255}"' if is_color else str(value)
