"""Datasets of pictures with instance masks, read straight from disk: LabPics, label maps, one file per mask, COCO,
SA-1B, DAVIS, labelme, YOLO, CVAT, PASCAL VOC.

`split_items(**config["data"])` lists a dataset: its keyword arguments are the keys of configs/sam2/data/*.yaml.
`read_item(item)` reads one picture and its objects, `item.read()` the objects alone. They come as id layers, int32
(L, H, W): 0 is background, an id lives in exactly one layer, and objects that overlap lie in different layers (label
maps have one layer).

A format is a function that lists a dataset (a row of LISTERS; its defaults are the layout as it is published) and one
that reads the objects of a picture, which each item carries with its files.
"""

import base64
import dataclasses
import functools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

import cv2
import numpy as np
import yaml

from utils import listing
from utils.images import PICTURE_SUFFIXES, read_channels, read_frame_wh, read_image, read_label_map
from utils.instances import label_folder
from utils.instances.codecs import polygons_to_mask, rle_to_mask
from utils.samples.write import write_samples
from utils.settings import check_keys

ANNOTATION_KEYS = ("id", "iscrowd", "area", "category_id", "category", "frequency", "attributes")
CVAT_SHAPES = ("polygon", "box", "mask", "ellipse", "polyline", "points", "cuboid", "skeleton")
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
OUTSIDE_SHARE = 0.02  # of the longer side, and 2 px at least: outlines may leave a picture by as much
MAX_CLASSES = 10_000  # of a YOLO dataset that only counts them
LARGE_PX = 2**24  # a mask of more pixels is made once its picture's own size has been seen, so that memory follows that


class Instances(NamedTuple):
    """The objects of one picture."""

    layers: np.ndarray  # int32 (L, H, W), L >= 1; 0 is background, every id lies in one layer only
    mask_names: tuple[str, ...] = ()  # the masks whose ids count them from 1; empty for maps, whose ids are stored
    num_crowd: int = 0  # crowd regions left out
    broken: tuple[str, ...] = ()  # objects left out, whole or a part, because their annotation is broken; each says why
    annotations: tuple[dict, ...] = ()  # what a json file says of the objects of ids 1, 2, ...: some of ANNOTATION_KEYS
    image_id: int | str | None = None  # the picture's in a COCO file
    doubts: tuple[str, ...] = ()  # objects that are read, and whose outline leaves the picture; each says where
    # bool (H, W), pixels that the annotation leaves open, such as VOC's outlines and crowds that are left out
    ignored: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Item:
    """One picture and its annotation, as files; cheap to hand to the processes that load data."""

    name: str  # unique in the dataset; lists are sorted by it
    image_path: Path
    annotation_path: Path  # a file; for masks_per_file the folder of masks
    read: Callable[[], Instances] = dataclasses.field(compare=False)  # a functools.partial of a reader below
    group: str = ""  # what a split never divides, such as a sequence of frames; "": the picture alone
    classes: tuple[str, ...] = ()  # the names that the dataset's files list, in their order; (): they list none

    @property
    def split_unit(self) -> str:
        """What a split never divides: the group, or the picture itself."""
        return self.group or self.name


# ---------------------------------------------------------------------------------------------------------------------
# list a dataset


def split_items(
    format: str,
    root: str,
    on_bad: str,
    val_fraction: float,
    split_seed: int,
    train_list: str | None = None,
    val_list: str | None = None,
    **keys,
) -> tuple[list[Item], list[Item]]:
    """List a dataset's pictures and split them into training and validation.

    The split is what the dataset has on disk (folders, list files, two json files), else a seeded fraction of the
    sorted names, which depends on nothing else.

    Args:
        format: a name in LISTERS.
        root: the dataset's folder, relative to where the user stands.
        on_bad: what to do with a picture that lacks its annotation, or the reverse: "stop" raises; with "skip" such an
            item is listed, and the dataset check leaves it out and counts it.
        val_fraction, split_seed: which share of the pictures (or groups), and which, where nothing else says so.
        train_list, val_list: list files, one name a line; with one of them the rest is the other part.
        keys: the other keys of that format's configs/sam2/data/*.yaml; the functions below explain them.
    Returns:
        (train_items, val_items), each sorted by name.
    Raises:
        FileNotFoundError: for a folder that is not there, or with on_bad "stop" a file of a pair.
        ValueError: for an unknown format or key, or a value that makes no sense.
    """
    if format not in LISTERS:
        raise ValueError(f"data.format is {format!r}; must be one of {', '.join(LISTERS)}")
    list_format = functools.partial(LISTERS[format], listing.dataset_folder(root))
    check_keys(list_format, keys, "data", others=("train_list", "val_list", "val_fraction", "split_seed", "on_bad"))
    train_items, val_items = list_format(**keys)
    paths = [(item.image_path, item.annotation_path) for item in [*train_items, *(val_items or [])]]
    listing.stop_at_missing(paths, on_bad)
    if val_items is None:
        train_items, val_items = _split(train_items, train_list, val_list, val_fraction, split_seed)
    elif train_list is not None or val_list is not None:
        raise ValueError(
            f"data.train_list is {train_list} and data.val_list {val_list}, but the data keys name a validation part "
            "of its own; set these two to null, or that one"
        )
    train_items, val_items = listing.sort_splits([train_items, val_items], root, format, "names must be unique")
    folder = functools.cache(os.path.realpath)  # a list file or a key may name the same folder in another way
    train_names = {(folder(item.image_path.parent), item.image_path.name): item.name for item in train_items}
    for item in val_items:
        if name := train_names.get((folder(item.image_path.parent), item.image_path.name)):
            raise ValueError(
                f"{item.image_path} is a training picture, {name}, and a validation picture, {item.name}; keep it in "
                "one of the two"
            )
    return train_items, val_items


def _split(
    items: list[Item], train_list: str | None, val_list: str | None, val_fraction: float, split_seed: int
) -> tuple[list[Item], list[Item]]:
    """Split by list files, else by a seeded fraction; groups stay whole."""
    units = {item.split_unit for item in items}
    train_units = set(listing.read_list(train_list, units)) if train_list is not None else None
    if val_list is not None:
        val_units = set(listing.read_list(val_list, units))
    elif train_units is not None:
        val_units = units - train_units
    else:
        val_units, _ = listing.draw_split(units, val_fraction, split_seed)
    train_units = units - val_units if train_units is None else train_units
    if train_units & val_units:
        raise ValueError(f"{train_list} and {val_list} both name {min(train_units & val_units)}; a name goes in one")
    train_items = [item for item in items if item.split_unit in train_units]
    return train_items, [item for item in items if item.split_unit in val_units]


def list_items(reader_keys: dict, section: str, is_check: bool) -> tuple[list[Item], list[Item]]:
    """List a dataset's training and validation pictures, generating it if need be.

    Args:
        section: "data" or "general_data", for messages.
        is_check: list pairs that lack a file with the others: the check names them with all other faults.
    """
    reader_keys = dict(reader_keys)
    generate = reader_keys.pop("generate", None)
    check_keys(split_items, reader_keys, section)
    if generate is not None:
        reader_keys["root"] = str(write_samples(generate, reader_keys["root"]))
    try:
        return split_items(**reader_keys | ({"on_bad": "skip"} if is_check else {}))
    except (ValueError, FileNotFoundError) as error:  # which name the keys of `data:`
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(re.sub(r"\bdata\.", f"{section}.", str(error))) from error


# A function of each format: (root, its own keys) -> training and validation items, or all items and None, which
# `split_items` then splits.


def list_labpics(
    root: Path,
    subsets: list[str] = ("Simple", "Complex"),
    train_folder: str = "Train",
    val_folder: str | None = None,
    vessel: str = "visible",
) -> tuple[list[Item], list[Item] | None]:
    """List LabPics V1: <root>/<subset>/<Train or Test>/{Image,Instance}/<name>. `vessel` is explained at its reader."""
    if vessel not in ("visible", "full"):
        raise ValueError(f"data.vessel is {vessel!r}; must be visible (vessel minus its materials) or full")

    def list_folder(folder: str) -> list[Item]:
        items = []
        for subset in subsets:
            pairs = listing.pair_files(root / subset / folder / "Image", root / subset / folder / "Instance")
            for stem, image_path, label_path in pairs:
                read = functools.partial(read_labpics, label_path, vessel)
                name = f"{subset}/{folder}/{stem}"
                items.append(Item(name, image_path, label_path, read, classes=("material", "vessel")))
        return items

    return list_folder(train_folder), None if val_folder is None else list_folder(val_folder)


def list_label_maps(
    root: Path,
    image_dir: str = "images",
    label_dir: str = "labels",
    label_ending: str = "",
    ignore_ids: list[int] = (),
) -> tuple[list[Item], None]:
    """List pictures <root>/<image_dir>/<stem>.* with maps of ids <root>/<label_dir>/<stem><label_ending>.*"""
    if image_dir == label_dir and not label_ending:
        raise ValueError(
            f"data.image_dir and data.label_dir are both {image_dir!r}: set data.label_ending, such as _masks for "
            "001.png and 001_masks.png, or keep the label maps in a folder of their own"
        )
    pairs = listing.pair_files(root / image_dir, root / label_dir, annotation_affixes=("", label_ending))
    return [Item(*pair, functools.partial(read_ids, pair.annotation_path, tuple(ignore_ids))) for pair in pairs], None


def list_masks_per_file(root: Path) -> tuple[list[Item], None]:
    """List the layout of the Data Science Bowl 2018: <root>/<id>/images/<one picture>, <root>/<id>/masks/*.png."""
    items = []
    for folder in listing.list_folders(root):
        pictures = list(listing.files_by_name(folder / "images").values()) if (folder / "images").is_dir() else []
        image_path = pictures[0] if pictures else folder / "images" / f"{folder.name}.png"
        read = functools.partial(read_masks_per_file, folder / "masks", image_path)
        if len(pictures) > 1:
            problem = f"{folder / 'images'} holds {len(pictures)} pictures ({image_path.name}, ...); must be one"
            read = functools.partial(_refuse, problem)
        items.append(Item(folder.name, image_path, folder / "masks", read))
    return items, None


def list_coco(
    root: Path,
    train_images: str = "train2017",
    train_annotations: str = "annotations/instances_train2017.json",
    val_images: str = "val2017",
    val_annotations: str | None = None,
    crowd: str = "skip",
) -> tuple[list[Item], list[Item] | None]:
    """List COCO: pictures <root>/<images>/<file_name> with <root>/<annotations>, polygons or run lengths.

    One json for both parts is split by the two folders of pictures, or is one part where these are the same, too.

    Args:
        crowd: of regions marked iscrowd; skip, as COCO's rule is, or keep: each is an object like all others.
    """
    if crowd not in ("skip", "keep"):
        raise ValueError(f"data.crowd is {crowd!r}; must be skip or keep")
    train_items = _list_coco_file(root / train_images, root / train_annotations, train_images, crowd == "keep")
    is_one_file = (
        val_annotations is not None and (root / val_annotations).resolve() == (root / train_annotations).resolve()
    )
    if val_annotations is None or (is_one_file and (root / val_images).resolve() == (root / train_images).resolve()):
        return train_items, None
    val_items = _list_coco_file(root / val_images, root / val_annotations, val_images, crowd == "keep")
    if not is_one_file:
        return train_items, val_items
    are_there = [[os.path.lexists(item.image_path) for item in items] for items in (train_items, val_items)]
    for item, in_train, in_val in zip(train_items, *are_there, strict=True):
        if in_train and in_val:
            raise ValueError(
                f"{root / train_annotations} is that of both parts, and {item.image_path.name} lies in {train_images} "
                f"and in {val_images}; put the folder before the file_name, or give each part a json of its own"
            )
    # What lies in neither folder stays in the first, where it is said to be missing.
    return (
        [item for item, in_val in zip(train_items, are_there[1], strict=True) if not in_val],
        [item for item, in_val in zip(val_items, are_there[1], strict=True) if in_val],
    )


def _list_coco_file(image_dir: Path, annotation_path: Path, image_dir_name: str, with_crowds: bool) -> list[Item]:
    content = _read_json(annotation_path)
    annotations = {}  # image id -> its annotations, in the order of the file
    for annotation in _list_field(content, "annotations", annotation_path):
        image_id = plain_id(annotation.get("image_id")) if isinstance(annotation, dict) else None
        annotations.setdefault(image_id, []).append(annotation)
    images, num_nameless = {}, 0  # image id -> the entries that have it
    for image in _list_field(content, "images", annotation_path):
        if isinstance(image, dict) and isinstance(image.get("file_name"), str) and image["file_name"]:
            images.setdefault(plain_id(image.get("id")), []).append(image)
        else:
            num_nameless += 1
    if num_nameless:
        print(f"{annotation_path}: {num_nameless} entries of its images are left out: they have no file_name")
    strange = [image_id for image_id in annotations if image_id is None or image_id not in images]
    if strange:
        ids = ", ".join(listing.first_few([str(image_id) for image_id in strange], 5))
        print(
            f"{annotation_path}: {sum(len(annotations[image_id]) for image_id in strange)} annotations are left out: "
            f"their image_id is that of no picture: {ids}"
        )
    categories = {}  # id -> what its annotations get of it
    for category in _list_field(content, "categories", annotation_path) if content.get("categories") else []:
        if isinstance(category, dict) and "id" in category:
            named = {"category": category.get("name"), "frequency": category.get("frequency")}
            categories[plain_id(category["id"])] = {key: value for key, value in named.items() if value is not None}
    classes = _names_in_order({number: category.get("category") for number, category in categories.items()})
    items, names_there = [], {}
    for image_id, entries in images.items():
        file_names = sorted({image["file_name"] for image in entries})
        for image in entries:
            image_path = _find_picture(image_dir, image["file_name"], names_there)
            if len(file_names) > 1 or image_id is None:
                problem = f"{annotation_path} gives the id {image_id} to {', '.join(listing.first_few(file_names, 3))}"
                read = functools.partial(_refuse, f"{problem}; give each picture an id of its own, and its annotations")
            else:
                entry, num_crowd = _coco_entry(image, annotations.get(image_id, []), categories, with_crowds)
                read = functools.partial(read_coco, annotation_path, image_path, entry, num_crowd)
            name = unicodedata.normalize("NFC", f"{image_dir_name}/{image['file_name']}")
            items.append(Item(name, image_path, annotation_path, read, classes=classes))
    paths = Counter(item.image_path for item in items)
    for index, item in enumerate(items):
        if paths[item.image_path] > 1:
            read = functools.partial(
                _refuse, f"{annotation_path}: {paths[item.image_path]} of its images are {item.image_path}; keep one"
            )
            items[index] = dataclasses.replace(item, read=read)
    return items


def _names_in_order(names: dict[int | str | None, object]) -> tuple[str, ...]:
    """Return the names of numbered classes in the order of their numbers, each once; what is no number comes last."""
    numbers = sorted(names, key=lambda number: number if isinstance(number, int) else float("inf"))
    return tuple(dict.fromkeys(str(names[number]) for number in numbers if names[number] is not None))


def _coco_entry(
    image: dict, annotations: list[dict], categories: dict[object, dict], with_crowds: bool
) -> tuple[str, int]:
    """Return what `read_coco` reads of a picture, and how many crowd regions are left out."""
    crowds = [annotation for annotation in annotations if is_marked_crowd(annotation) and not with_crowds]
    objects = [annotation for annotation in annotations if not is_marked_crowd(annotation) or with_crowds]
    kept = [
        {key: annotation[key] for key in ("segmentation", *ANNOTATION_KEYS) if key in annotation}
        | categories.get(plain_id(annotation.get("category_id")), {})
        for annotation in objects
    ]
    entry = {
        "image_id": plain_id(image.get("id")), "orig_hw": [image.get("height"), image.get("width")],
        "annotations": kept, "crowds": [{"segmentation": crowd.get("segmentation")} for crowd in crowds],
    }  # fmt: skip
    return json.dumps(entry), len(crowds)


def class_name(annotation: dict) -> str:
    """Give the name of an object's class, "" where its annotation names none."""
    name = annotation.get("category")
    return "" if name is None else str(name)


def class_key(annotation: dict) -> int | str | None:
    """Give what tells the class of an annotation or detection: its category's number, or else its name, or None."""
    class_id = plain_id(annotation.get("category_id"))
    return annotation.get("category") if class_id is None else class_id


def is_marked_crowd(annotation: dict) -> bool:
    """Tell whether a COCO annotation is marked as a crowd region."""
    return annotation.get("iscrowd") in (1, "1", "true")


def _find_picture(image_dir: Path, file_name: str, names_there: dict[str, Path]) -> Path:
    """Find a picture by the name that an annotation file has for it.

    Accents and slashes may be written otherwise, and the name may begin above the folder: with the folder's own name,
    or with the root of the disk on which the dataset was made.

    Args:
        names_there: of the folder's files, made here once a name is not found as it is.
    """
    path = image_dir / file_name
    if os.path.lexists(path):
        return path
    parts = PurePosixPath(file_name.replace("\\", "/")).parts
    is_absolute = len(parts) > 0 and (parts[0] in ("/", "//") or parts[0].endswith(":"))
    is_from_above = len(parts) > 1 and parts[0] == image_dir.name
    for start in range(1, len(parts)) if is_absolute else [1] * is_from_above:
        if os.path.lexists(image_dir.joinpath(*parts[start:])):
            return image_dir.joinpath(*parts[start:])
    if not file_name.isascii() and not names_there:
        paths = sorted(image_dir.rglob("*"))
        names_there |= {unicodedata.normalize("NFC", path.relative_to(image_dir).as_posix()): path for path in paths}
    name = unicodedata.normalize("NFC", file_name.replace("\\", "/"))
    return names_there.get(name, image_dir / name)


def _refuse(problem: str) -> Instances:
    """Read nothing: say what is wrong with a picture's entry."""
    raise ValueError(problem)


def plain_id(value: object) -> int | str | None:
    """Return an id as a number where it is one: 7, 7.0 and "7" are the same."""
    number = _whole_number(value)
    return str(value) if number is None and value is not None else number


def _whole_number(value: object) -> int | None:
    """Return a whole number that json has as a number or as text; None for anything else."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return int(value) if float(value) == int(value) else None
        except (ValueError, OverflowError):
            return None
    return None


def list_sa1b(root: Path, image_dir: str = ".", annotation_dir: str = ".") -> tuple[list[Item], None]:
    """List SA-1B: pictures <root>/<image_dir>/<stem>.jpg with <root>/<annotation_dir>/<stem>.json.

    Where no picture, or more than one, has a file's stem, the file's own word counts: infer_sam2.py writes a_jpg.json
    and a_png.json for a.jpg and a.png, and its record run.json, which is of no picture.
    """
    pictures = {}  # stem -> files
    for suffix in PICTURE_SUFFIXES:
        for stem, path in listing.files_by_name(root / image_dir, suffixes=(suffix,)).items():
            pictures.setdefault(stem, []).append(path)
    annotations = listing.files_by_name(root / annotation_dir, suffixes=(".json",))
    if "run" in annotations and ("run" not in pictures or _is_run_record(annotations["run"])):
        del annotations["run"]
    items, used = [], set()
    for name, path in annotations.items():
        image_path, *others = pictures.get(name, [root / image_dir / f"{name}.jpg"])
        if others or name not in pictures:
            named = [each for paths in pictures.values() for each in paths if each.name == _named_picture(path)]
            image_path = named[0] if named else image_path
        used.add(image_path)
        items.append(Item(name, image_path, path, functools.partial(read_sa1b, path, image_path)))
    for stem, paths in pictures.items():
        for image_path in [each for each in paths if each not in used]:
            path = root / annotation_dir / f"{stem}.json"
            name = stem if len(paths) == 1 else image_path.name
            items.append(Item(name, image_path, path, functools.partial(read_sa1b, path, image_path)))
    return items, None


def list_labels(root: Path, labels: str) -> tuple[list[Item], list[Item]]:
    """List pictures that have a record in a folder of labels; those that its val.txt names validate.

    Args:
        labels: the folder, seen from where the user stands (utils/instances/label_folder.py).
    """
    folder = Path(labels)
    if not (folder / "masks").is_dir():
        raise FileNotFoundError(
            f"data.labels is {labels}, no folder of labels (seen from {Path.cwd()}); infer_sam2.py mode=label or "
            "mode=annotate makes one"
        )
    if not (folder / "val.txt").is_file():
        raise FileNotFoundError(
            f"{folder / 'val.txt'}, the pictures that validate, is not there; infer_sam2.py mode=label or "
            "mode=annotate draws it for two pictures or more"
        )
    items, _ = list_sa1b(root, ".", str((folder / "masks").absolute()))
    items = [item for item in items if item.annotation_path.exists()]  # the others wait for labels
    val_names = {unicodedata.normalize("NFC", name) for name in label_folder.read_validation(folder)}
    is_val = [unicodedata.normalize("NFC", item.annotation_path.stem) in val_names for item in items]
    splits = [[item for item, is_in in zip(items, is_val, strict=True) if is_in is wanted] for wanted in (False, True)]
    if not splits[1]:
        raise ValueError(
            f"{folder / 'val.txt'} names {len(val_names)} pictures that validate, and none of them is labelled; a "
            "person labels them: infer_sam2.py mode=annotate"
        )
    return splits[0], splits[1]


def _is_run_record(path: Path) -> bool:
    """Tell whether a json file is what infer_sam2.py notes of a run; of a picture run.jpg it writes run_jpg.json."""
    try:
        return "command" in _read_json(path)
    except (OSError, ValueError, TypeError):
        return False


def _named_picture(path: Path) -> str | None:
    """Return the file name of the picture that an SA-1B file says it is of; None where it cannot be read."""
    try:
        return _read_json(path)["image"]["file_name"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def list_davis(
    root: Path, image_dir: str = "JPEGImages/480p", annotation_dir: str = "Annotations/480p"
) -> tuple[list[Item], None]:
    """List DAVIS: frames <root>/<image_dir>/<sequence>/*.jpg with <root>/<annotation_dir>/<sequence>/*.png.

    An item is an annotated frame; frames between annotated ones (YouTube-VOS has them) are no items. Whole sequences go
    to training or to validation.
    """
    items = []
    folders = listing.list_folders(root / image_dir) + listing.list_folders(root / annotation_dir)
    for sequence in sorted({folder.name for folder in folders}):
        frame_dir, label_dir = root / image_dir / sequence, root / annotation_dir / sequence
        frames = listing.files_by_name(frame_dir) if frame_dir.is_dir() else {}
        labels = listing.files_by_name(label_dir) if label_dir.is_dir() else {}
        if not labels:  # nothing says which frames: name the first
            labels = {stem: label_dir / f"{stem}.png" for stem in sorted(frames)[:1]}
        for stem, label_path in sorted(labels.items()):
            image_path = frames[stem] if stem in frames else frame_dir / f"{stem}.jpg"
            read = functools.partial(read_ids, label_path)
            items.append(Item(f"{sequence}/{stem}", image_path, label_path, read, group=sequence))
    return items, None


def list_labelme(
    root: Path, image_dir: str = ".", annotation_dir: str = ".", ignore_labels: list[str] = ("__ignore__",)
) -> tuple[list[Item], None]:
    """List labelme: pictures <root>/<image_dir>/**/<stem>.jpg with <root>/<annotation_dir>/**/<stem>.json.

    A json beside which no picture has its name is of the one that it names, its imagePath.

    Args:
        ignore_labels: labels whose shapes are no objects.
    """
    pairs = listing.pair_files(
        root / image_dir, root / annotation_dir, annotation_suffixes=(".json",), with_subfolders=True
    )
    named = {}  # annotation -> the picture that it names
    for pair in pairs:
        if not os.path.lexists(pair.image_path) and (image_path := _named_labelme_picture(pair.annotation_path)):
            named[pair.annotation_path] = image_path
    of_others = {os.path.realpath(path) for path in named.values()}
    items = []
    for name, own_path, annotation_path in pairs:
        if not os.path.lexists(annotation_path) and os.path.realpath(own_path) in of_others:
            continue
        image_path = named.get(annotation_path, own_path)
        read = functools.partial(read_labelme, annotation_path, image_path, tuple(ignore_labels))
        items.append(Item(name, image_path, annotation_path, read))
    return items, None


def _named_labelme_picture(path: Path) -> Path | None:
    """Find the picture that a labelme file says it is of; None where it is not there or cannot be read."""
    try:
        image_path = path.parent / str(_read_json(path)["imagePath"]).replace("\\", "/")
        return image_path if image_path.is_file() else None
    except (OSError, ValueError, LookupError):
        return None


def list_yolo(root: Path, data_yaml: str = "data.yaml") -> tuple[list[Item], list[Item] | None]:
    """List YOLO's polygons: <root>/data.yaml names the classes and the places of pictures; labels lie beside images.

    A place is a folder or a list file, .txt with a picture a line; train and val may have several. images/train with
    labels/train, as ultralytics has it, or train/images with train/labels, as Roboflow; else labels lie beside the
    pictures. A picture without a label file has no objects. Where val is train, it is no part.
    """
    path = root / data_yaml
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; data.data_yaml names it, below data.root")
    try:
        content = yaml.safe_load(listing.read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    names = _read_yolo_names(content) if isinstance(content, dict) and content.get("train") is not None else {}
    if not names:
        raise ValueError(f"{path} must have names, a list or numbers with names, and train, a folder of pictures")
    base = content.get("path")
    bases = [path.parent, root]
    if base is not None:
        bases = [path.parent / str(base), root / str(base), *bases, Path(str(base))]
    splits = []
    for key in ("train", "val" if "val" in content else "validation"):
        places = content.get(key)
        if places is None:
            splits.append(None)
            continue
        items = []
        for place in map(str, places if isinstance(places, list) else [places]):
            for name, image_path in _list_yolo_place(bases, place, path, key).items():
                label_path = _yolo_label_path(image_path)
                read = functools.partial(read_yolo, label_path, image_path, names)
                has_labels = os.path.lexists(label_path)
                annotation_path = label_path if has_labels else path
                items.append(Item(name, image_path, annotation_path, read, classes=_names_in_order(names)))
        splits.append(items)
    train_items, val_items = splits
    if val_items is not None and {item.image_path for item in val_items} == {item.image_path for item in train_items}:
        return train_items, None
    return train_items, val_items


def _read_yolo_names(content: dict) -> dict[int, str]:
    """Read the classes of a data.yaml, {number: name}; of one that only counts them, class_0, class_1, ..."""
    names, count = content.get("names"), _whole_number(content.get("nc"))
    if names is None and count is not None:
        names = [f"class_{number}" for number in range(min(count, MAX_CLASSES))]
    names = dict(enumerate(names)) if isinstance(names, list) else names
    named = {_whole_number(number): str(name) for number, name in names.items()} if isinstance(names, dict) else {}
    return {number: name for number, name in named.items() if number is not None}


def _list_yolo_place(bases: list[Path], place: str, data_yaml: Path, key: str) -> dict[str, Path]:
    """List the pictures of a folder or of a list file that a data.yaml names: {name, unique in the dataset: picture}.

    Args:
        bases: folders that places may count from.
    """
    place = place.replace("\\", "/")
    above = re.sub(r"^(\.\./)+", "", place)
    found = next((each for base in bases for each in (base / place, base / above) if os.path.lexists(each)), None)
    if found is not None and found.is_dir():
        below = listing.files_by_name(found, with_subfolders=True)
        return {f"{above}/{name}": image_path for name, image_path in below.items()}
    if found is None or found.suffix.lower() != ".txt":
        raise FileNotFoundError(
            f"{data_yaml}: {key} is {place}, and no such folder is below {data_yaml.parent}, nor a list file (.txt); "
            "correct it there"
        )
    pictures, names_there = {}, {}
    for line in listing.read_lines(found):
        line = line.replace("\\", "/")
        folders = [found.parent, *bases]
        picture = next((folder / line for folder in folders if os.path.lexists(folder / line)), None)
        if picture is None:  # such as a path of the disk on which the list was made
            picture = _find_picture(data_yaml.parent, line, names_there)
        name = os.path.splitext(os.path.normpath(line.removeprefix("/")))[0]
        pictures[unicodedata.normalize("NFC", name)] = picture
    return pictures


def _yolo_label_path(image_path: Path) -> Path:
    """Name the label file of a picture: its path with the last `images` as `labels`, else beside it."""
    parts = list(image_path.parts)
    if "images" in parts[:-1]:
        place = len(parts) - 2 - parts[:-1][::-1].index("images")
        parts[place] = "labels"
    path, beside = Path(*parts).with_suffix(".txt"), image_path.with_suffix(".txt")
    is_beside = not os.path.lexists(path) and os.path.lexists(beside)  # that `images` may be above the dataset
    return beside if is_beside else path


def list_cvat(root: Path, annotations: str = "annotations.xml", image_dir: str = "images") -> tuple[list[Item], None]:
    """List CVAT's export "for images 1.1": <root>/<annotations>, pictures <root>/<image_dir>/<their name>."""
    path = root / annotations
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no file {path}; data.annotations names it, below data.root")
    try:
        tree = ElementTree.fromstring(path.read_bytes())
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is no valid xml: {error}") from error
    labels = [label.text or "" for label in tree.findall("meta//labels/label/name")]
    drawn = ("polygon", "box", "mask", "ellipse")
    labels += sorted({shape.get("label", "") for kind in drawn for shape in tree.iterfind(f"image/{kind}")})
    classes = tuple(dict.fromkeys(filter(None, labels)))
    items, names_there = [], {}
    for image in tree.iter("image"):
        name = unicodedata.normalize("NFC", image.get("name", ""))
        shapes = [{"kind": shape.tag, **shape.attrib} for shape in image if shape.tag in CVAT_SHAPES]
        entry = {"orig_hw": [image.get("height"), image.get("width")], "shapes": shapes}
        image_path = _find_picture(root / image_dir, name, names_there)
        read = functools.partial(read_cvat, path, image_path, json.dumps(entry))
        items.append(Item(name, image_path, path, read, classes=classes))
    if not items:
        raise ValueError(f"{path} has no <image>; export as CVAT for images 1.1, not for video")
    return items, None


def list_voc(
    root: Path,
    image_dir: str = "JPEGImages",
    object_dir: str = "SegmentationObject",
    class_dir: str = "SegmentationClass",
    class_names: list[str] = VOC_CLASSES,
) -> tuple[list[Item], None]:
    """List PASCAL VOC: pictures that have a map of objects, <root>/<object_dir>/<stem>.png, and one of classes.

    Args:
        class_names: of the classes 1, 2, ...; 0 is background, 255 the outlines, which are no objects.
    """
    if class_names and class_names[0].strip("_").lower() == "background":
        raise ValueError(
            f"the list class_names begins with {class_names[0]!r}, which is 0; name the classes 1, 2, ... alone"
        )
    objects = listing.files_by_name(root / object_dir)
    images = listing.files_by_name(root / image_dir)
    class_maps = listing.files_by_name(root / class_dir) if (root / class_dir).is_dir() else {}
    classes = tuple(class_names) if class_maps else ()
    items = []
    for name, path in objects.items():  # most of VOC's pictures have none
        image_path = images[name] if name in images else root / image_dir / f"{name}.jpg"
        class_path = class_maps.get(name, root / class_dir / path.name)
        read = functools.partial(read_voc, path, class_path, tuple(class_names))
        items.append(Item(name, image_path, path, read, classes=classes))
    return items, None


LISTERS = {
    "labpics": list_labpics,
    "label_map": list_label_maps,
    "masks_per_file": list_masks_per_file,
    "coco": list_coco,
    "sa1b": list_sa1b,
    "labels": list_labels,
    "labelme": list_labelme,
    "yolo": list_yolo,
    "cvat": list_cvat,
    "voc": list_voc,
    "davis": list_davis,
}


# ---------------------------------------------------------------------------------------------------------------------
# read one item


def read_item(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Read a picture and its objects.

    Returns:
        image_rgb uint8 (H, W, 3), id layers int32 (L, H, W).
    Raises:
        FileNotFoundError, ValueError: with the file; also if picture and annotation differ in size.
    """
    image_rgb, layers = read_image(item.image_path), item.read().layers
    check_same_size(item, image_rgb.shape[:2], layers.shape[1:])
    return image_rgb, layers


def check_same_size(item: Item, image_hw: tuple[int, int], annotation_hw: tuple[int, int]) -> None:
    """Raise a ValueError that names both files if a picture and its annotation differ in size (height, width)."""
    if tuple(image_hw) != tuple(annotation_hw):
        remedy = "export both at one size"
        if tuple(image_hw) == tuple(annotation_hw[::-1]):
            remedy = "if the picture carries an EXIF rotation, which is applied here, turn the annotation too"
        raise ValueError(
            f"image {item.image_path} is {image_hw[0]} x {image_hw[1]} px (height x width), but its annotation "
            f"{item.annotation_path} is {annotation_hw[0]} x {annotation_hw[1]}; {remedy}"
        )


def object_ids(layers: np.ndarray) -> list[tuple[int, int, int]]:
    """List the objects in id layers: (layer, id, area in pixels), sorted; 0 is background, whether it occurs or not."""
    objects = []
    for layer, ids in enumerate(layers):
        flat = ids[ids > 0]
        if flat.max(initial=0) <= ids.size:  # counting is much faster than sorting
            areas = np.bincount(flat)
            ids_there = np.flatnonzero(areas)
            areas = areas[ids_there]
        else:
            ids_there, areas = np.unique(flat, return_counts=True)
        objects += [(layer, int(object_id), int(area)) for object_id, area in zip(ids_there, areas, strict=True)]
    return objects


# ---------------------------------------------------------------------------------------------------------------------
# read the objects of one picture: a function of each format; FileNotFoundError and ValueError name the file, what is
# wrong with it, and the remedy


def read_labpics(path: Path, vessel: str = "visible") -> Instances:
    """Read a LabPics V1 instance file: R holds vessel ids, B material ids.

    Vessel ids are put after the material ids, in int32: two objects never share an id.

    Args:
        vessel: visible, the vessel's pixels without those of materials (one layer); or full, vessels and materials in
            a layer each.
    """
    channels = read_channels(path)
    if channels.shape[2] < 3:
        raise ValueError(f"LabPics instance file {path} has one channel; must be RGB (R vessel ids, B material ids)")
    vessels, materials = channels[..., 0], channels[..., 2]
    num_materials = int(materials.max(initial=0))
    vessels = np.where(vessels > 0, vessels + num_materials, 0)
    num_vessels = int(vessels.max(initial=0)) - num_materials
    annotations = ({"category": "material"},) * num_materials + ({"category": "vessel"},) * num_vessels
    layers = [materials, vessels] if vessel == "full" else [np.where(materials > 0, materials, vessels)]
    return Instances(np.stack(layers), annotations=annotations)


def read_ids(path: Path, ignore_ids: tuple[int, ...] = ()) -> Instances:
    """Read a map of ids; those to ignore become background."""
    ids = read_label_map(path)
    ignored = np.isin(ids, ignore_ids)
    ids[ignored] = 0
    return Instances(ids[None], ignored=ignored)


def read_masks_per_file(folder: Path, image_path: Path) -> Instances:
    """Read one file per object; ids are 1, 2, ... in the order of the file names.

    Args:
        image_path: the picture, whose size is that of no masks.
    """
    paths = list(listing.files_by_name(folder).values())
    masks = [read_label_map(path) > 0 for path in paths]
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise ValueError(
                f"mask {path} is {mask.shape[0]} x {mask.shape[1]} px (height x width), but {paths[0]} is "
                f"{masks[0].shape[0]} x {masks[0].shape[1]}; all masks of a picture must have its size"
            )
    orig_hw = masks[0].shape if masks else read_image(image_path).shape[:2]
    return Instances(stack_masks(masks, orig_hw), tuple(path.name for path in paths))


def read_coco(path: Path, image_path: Path, entry_json: str, num_crowd: int) -> Instances:
    """Read a picture's part of a COCO file.

    Args:
        path: the file, for messages.
        image_path: the picture.
        entry_json: {"image_id", "orig_hw": [height, width], "annotations": [{"id", "segmentation", ...}, ...],
            "crowds": [{"segmentation"}, ...], those left out} as text.
        num_crowd: annotations left out of it.
    """
    entry = json.loads(entry_json)
    where = f"{path}, image {image_path.name}"
    instances = _read_segmentations(entry["annotations"], entry["orig_hw"], image_path, where)
    ignored = None
    if entry["crowds"]:
        ignored = _read_segmentations(entry["crowds"], entry["orig_hw"], image_path, where).layers.any(0)
    return instances._replace(num_crowd=num_crowd, image_id=entry["image_id"], ignored=ignored)


def read_sa1b(path: Path, image_path: Path) -> Instances:
    """Read an SA-1B file, a picture's size and annotations with run lengths.

    Args:
        image_path: the picture.
    """
    content = _read_json(path)
    image = _field(content, "image", path)
    orig_hw = [_field(image, "height", path), _field(image, "width", path)]
    annotations = [
        annotation | {"category": annotation["class"]}  # as infer_sam2.py writes it
        if isinstance(annotation, dict) and isinstance(annotation.get("class"), str) else annotation
        for annotation in _list_field(content, "annotations", path)
    ]  # fmt: skip
    return _read_segmentations(annotations, orig_hw, image_path, str(path))


def read_labelme(path: Path, image_path: Path, ignore_labels: tuple[str, ...] = ()) -> Instances:
    """Read a labelme file: polygons, rectangles, circles and masks; shapes of one label and group id are one object.

    Args:
        image_path: the picture, whose size counts where the file has none.
        ignore_labels: labels whose shapes are no objects.
    """
    content = _read_json(path)
    sides = [content.get(key) for key in ("imageHeight", "imageWidth")]
    orig_hw = _picture_hw(image_path) if None in sides else _declared_hw(sides, image_path, str(path))
    shapes = []
    for number, shape in enumerate(_list_field(content, "shapes", path)):
        shape = shape if isinstance(shape, dict) else {}
        label, group = "" if shape.get("label") is None else str(shape["label"]), plain_id(shape.get("group_id"))
        if label not in ignore_labels:
            shapes.append((number, label, None if group == "" else group, shape))
    return _join_shapes(shapes, _draw_labelme_shape, orig_hw, str(path))


def _join_shapes(
    shapes: list[tuple[int, str, object, dict]],
    draw: Callable[[dict, tuple[int, int]], tuple[np.ndarray, str]],
    orig_hw: tuple[int, int],
    where: str,
) -> Instances:
    """Draw shapes; those of one label and one group are one object, and one that cannot be drawn costs itself.

    Args:
        shapes: of each its place in the file, its label, its group or None, and what `draw` makes a mask of, and words
            about what looks wrong with it, or "".
        where: for messages.
    """
    masks, labels = {}, {}  # by object: a label and its group, or the place of a shape without one
    broken, doubts = [], []
    for number, label, group, shape in shapes:
        try:
            mask, doubt = draw(shape, orig_hw)
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            broken.append(f"{where}, shape {number} ({label}): {reason}")
            continue
        doubts += [f"{where}, shape {number} ({label}): {doubt}"] if doubt else []
        key = number if group is None else (label, group)
        masks[key] = masks[key] | mask if key in masks else mask
        labels[key] = label
    names = tuple(f"{label} ({'shape' if isinstance(key, int) else 'group'} {key})" for key, label in labels.items())
    annotations = tuple({"category": label} for label in labels.values())
    layers = stack_masks([*masks.values()], orig_hw)
    return Instances(layers, names, broken=tuple(broken), doubts=tuple(doubts), annotations=annotations)


def _draw_outlines(polygons: list[list[float]], orig_hw: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Draw an object given as polygons, [x1, y1, x2, y2, ...] px each, having looked at where they lie.

    Returns:
        bool (H, W); words about an outline that leaves the picture by more than a rough hand does, or "".
    Raises:
        ValueError: for what is no polygon, and for one that covers nothing: shares of the sides instead of pixels, or
            all of it beside the picture.
    """
    height, width = orig_hw
    mask = polygons_to_mask(polygons, height, width)
    points = np.concatenate([np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in polygons])
    is_corner_pixel = np.abs(points - points.round()).max() < 1e-3
    if max(orig_hw) > 2 and (points >= 0).all() and (points <= 1).all() and not is_corner_pixel:
        raise ValueError(
            f"all its coordinates are from 0 to 1, such as {_show_point(points[0])}: shares of width and height? "
            f"They must be pixels of {width} x {height}"
        )
    margin = max(2, OUTSIDE_SHARE * max(orig_hw))
    is_outside = ((points < -margin) | (points > np.array([width, height]) + margin)).any(1)
    if not is_outside.any():
        return mask, ""
    fits_turned = ((points >= -margin) & (points <= np.array([height, width]) + margin)).all()
    doubt = f"it reaches {_show_point(points[is_outside][0])}, outside the picture of {width} x {height} px"
    doubt += "; with x and y exchanged it would fit" if fits_turned else ""
    if not mask.any():
        raise ValueError(doubt)
    return mask, doubt


def _show_point(point: np.ndarray) -> str:
    return f"({point[0]:g}, {point[1]:g})"


def _declared_hw(sides: list, image_path: Path, where: str) -> tuple[int, int]:
    """Check the size that an annotation gives its picture, [height, width], before a mask of it is made."""
    orig_hw = tuple(map(_whole_number, sides))
    if None in orig_hw or min(orig_hw) <= 0:
        raise ValueError(f"{where}: height and width are {sides}; the picture's entry must give both in pixels")
    if orig_hw[0] * orig_hw[1] > LARGE_PX and read_frame_wh(image_path) != orig_hw[::-1]:
        raise ValueError(f"{where}: height and width are {sides}, which are not those of {image_path}")
    return orig_hw


def _picture_hw(path: Path) -> tuple[int, int]:
    """Read a picture's height and width, from its header where it has one."""
    frame_wh = read_frame_wh(path)
    return read_image(path).shape[:2] if frame_wh is None else frame_wh[::-1]


def _draw_labelme_shape(shape: dict, orig_hw: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Draw a shape of labelme: bool (H, W), and what `_draw_outlines` says."""
    kind, points = shape.get("shape_type") or "polygon", np.array(shape["points"], np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"its points are {str(shape['points'])[:60]}; must be [[x, y], ...]")
    if kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    if kind in ("polygon", "rectangle", "oriented_rectangle", "rotation"):  # the last: X-AnyLabeling's name for it
        return _draw_outlines([points.ravel().tolist()], orig_hw)
    if kind == "circle":
        if len(points) != 2:
            raise ValueError(f"it is a circle of {len(points)} points; must be 2, its centre and one of its line")
        center, edge = points
        ys, xs = np.mgrid[: orig_hw[0], : orig_hw[1]] + 0.5
        return np.hypot(xs - center[0], ys - center[1]) <= np.hypot(*(edge - center)), ""
    if kind == "mask":
        data = np.frombuffer(base64.b64decode(shape["mask"]), np.uint8)
        part = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if len(data) else None
        if part is None:
            raise ValueError("its mask is no PNG")
        return _place_mask(part > 0, *points[0].round().astype(int).tolist(), orig_hw), ""
    raise ValueError(f"its shape_type is {kind}, which covers no pixels")


def _place_mask(part: np.ndarray, left: int, top: int, orig_hw: tuple[int, int]) -> np.ndarray:
    """Lay a mask, bool (h, w), into one of the picture's size; what lies outside is cut off."""
    mask = np.zeros(orig_hw, bool)
    part = part[max(0, -top) :, max(0, -left) :]
    top, left = max(0, top), max(0, left)
    window = mask[top : top + part.shape[0], left : left + part.shape[1]]
    window |= part[: window.shape[0], : window.shape[1]]
    return mask


def read_yolo(path: Path, image_path: Path, names: dict[int, str]) -> Instances:
    """Read YOLO's polygons: a line `class x1 y1 x2 y2 x3 y3 ...` for each object, shares of width and height.

    Args:
        path: the label file; no file: no objects.
        image_path: the picture, whose size counts.
        names: {class: its name}.
    """
    height, width = _picture_hw(image_path)
    masks, labels, annotations, broken, doubts = [], [], [], [], []
    for number, line in enumerate(listing.read_text(path).splitlines() if os.path.lexists(path) else [], 1):
        words = line.split()
        if not words:
            continue
        try:
            class_id, coords = _whole_number(words[0]), np.array(words[1:], np.float64)
            if class_id not in names:
                raise ValueError(f"class {words[0]} is not among the names, {min(names)} to {max(names)}")
            if len(coords) == 4:
                raise ValueError("a box alone is no mask")
            if len(coords) < 6 or len(coords) % 2:
                raise ValueError(f"{len(coords)} numbers; must be x1 y1 x2 y2 x3 y3 ...")
            if not np.abs(coords).max() <= 1.5:
                raise ValueError(f"{coords.max():g} is no share of the picture's side; must be 0 to 1")
            mask, doubt = _draw_outlines([(coords.reshape(-1, 2) * [width, height]).ravel().tolist()], (height, width))
            masks.append(mask)
            doubts += [f"{path}, line {number}: {doubt}"] if doubt else []
            labels.append(f"line {number}")
            annotations.append({"category_id": class_id, "category": names[class_id]})
        except ValueError as error:
            broken.append(f"{path}, line {number}: {error}")
    layers = stack_masks(masks, (height, width))
    return Instances(layers, tuple(labels), broken=tuple(broken), doubts=tuple(doubts), annotations=tuple(annotations))


def read_cvat(path: Path, image_path: Path, entry_json: str) -> Instances:
    """Read a picture's part of a CVAT file: polygons, boxes, ellipses and masks; those of one group are one object.

    Args:
        path: the file, for messages.
        image_path: the picture.
        entry_json: {"orig_hw": [height, width], "shapes": [{"kind", "label", "points", ...}, ...]} as text.
    """
    entry, where = json.loads(entry_json), f"{path}, {image_path.name}"
    shapes = [  # CVAT's group 0 is none
        (number, shape.get("label", ""), _whole_number(shape.get("group_id")) or None, shape)
        for number, shape in enumerate(entry["shapes"])
    ]
    return _join_shapes(shapes, _draw_cvat_shape, _declared_hw(entry["orig_hw"], image_path, where), where)


def _draw_cvat_shape(shape: dict, orig_hw: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Draw a shape of CVAT: bool (H, W), and what `_draw_outlines` says."""
    height, width = orig_hw
    turn = np.deg2rad(float(shape.get("rotation", 0)))  # clockwise, about the shape's centre
    along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    if shape["kind"] == "polygon":
        points = [float(number) for point in shape["points"].split(";") for number in point.split(",")]
        return _draw_outlines([points], orig_hw)
    if shape["kind"] == "box":
        x1, y1, x2, y2 = (float(shape[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        center, sides = np.array([x1 + x2, y1 + y2]) / 2, np.array([x2 - x1, y2 - y1]) / 2
        corners = [
            center + x * sides[0] * along + y * sides[1] * across for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        return _draw_outlines([np.ravel(corners).tolist()], orig_hw)
    if shape["kind"] == "ellipse":
        center_x, center_y, radius_x, radius_y = (float(shape[key]) for key in ("cx", "cy", "rx", "ry"))
        ys, xs = np.mgrid[:height, :width] + 0.5
        offsets = np.stack([xs - center_x, ys - center_y], 2)  # (H, W, 2)
        lengths = (radius_y * (offsets @ along)) ** 2 + (radius_x * (offsets @ across)) ** 2
        return lengths <= (radius_x * radius_y) ** 2, ""
    if shape["kind"] == "mask":  # runs row by row within its box, the first of them background
        counts = [int(count) for count in shape["rle"].split(",")]
        left, top, part_width, part_height = (int(float(shape[key])) for key in ("left", "top", "width", "height"))
        if min(counts) < 0 or sum(counts) != part_width * part_height:
            raise ValueError(f"its runs are of {sum(counts)} pixels, and its box of {part_width} x {part_height}")
        flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return _place_mask(flat.reshape(part_height, part_width), left, top, orig_hw), ""
    raise ValueError(f"it is a {shape['kind']}, which covers no pixels")


def read_voc(path: Path, class_path: Path, class_names: tuple[str, ...]) -> Instances:
    """Read a VOC map of objects; the class of each is the one that most of its pixels have in the other map.

    Args:
        path: ids, 0 background, 255 outlines.
        class_path: classes, of the same size; where there is none, objects have no class.
        class_names: of the classes 1, 2, ...
    """
    ids = read_label_map(path)
    there = np.setdiff1d(ids, [0, 255])
    masks, annotations, ignored = [ids == i for i in there], [], ids == 255
    if os.path.lexists(class_path):
        classes = read_label_map(class_path)
        if classes.shape != ids.shape:
            raise ValueError(
                f"{class_path} is {classes.shape[::-1]} px, but {path} is {ids.shape[::-1]}; must be equal"
            )
        ignored |= classes == 255
        for mask in masks:
            counts = np.bincount(classes[mask], minlength=256)
            counts[[0, 255]] = 0
            class_id = int(counts.argmax())
            is_named = counts.any() and class_id <= len(class_names)
            category = {"category": class_names[class_id - 1]} if is_named else {}
            annotations.append({"category_id": class_id, **category} if counts.any() else {})
    names = tuple(f"object {i}" for i in there)
    return Instances(stack_masks(masks, ids.shape), names, annotations=tuple(annotations), ignored=ignored)


def _read_segmentations(annotations: list, sides: list, image_path: Path, where: str) -> Instances:
    """Read COCO's `segmentation`s: polygons, or run lengths, compressed or not; ids are 1, 2, ... in file order.

    An annotation that is broken costs its own object, and a part of fewer than 3 points, which covers nothing, itself.

    Args:
        sides: [height, width], as the file has them.
        image_path: the picture, whose size is looked at before a large mask is made.
        where: for messages.
    """
    orig_hw = _declared_hw(sides, image_path, where)
    masks, names, kept, broken, doubts = [], [], [], [], []
    for annotation in annotations:
        name = f"annotation {annotation.get('id', '?') if isinstance(annotation, dict) else '?'}"
        segmentation = annotation.get("segmentation") if isinstance(annotation, dict) else None
        if isinstance(segmentation, dict) and _sides_of(segmentation) != orig_hw:
            raise ValueError(
                f"{where}, {name}: its mask is {segmentation.get('size')} px, but the picture is {[*orig_hw]}"
            )
        try:
            if not segmentation:
                raise ValueError("has no segmentation (a box alone is no mask)")
            if isinstance(segmentation, dict):
                masks.append(rle_to_mask(segmentation | {"size": orig_hw}))
            else:
                parts = [part for part in segmentation if not isinstance(part, list) or len(part) >= 6]
                if len(parts) < len(segmentation):
                    broken.append(
                        f"{where}, {name}: {len(segmentation) - len(parts)} of {len(segmentation)} parts have fewer "
                        "than 3 points"
                    )
                if not parts:
                    continue
                mask, doubt = _draw_outlines(parts, orig_hw)
                masks.append(mask)
                doubts += [f"{where}, {name}: {doubt}"] if doubt else []
            names.append(name)
            kept.append({key: annotation[key] for key in ANNOTATION_KEYS if key in annotation})
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            broken.append(f"{where}, {name}: {error}")
    layers = stack_masks(masks, orig_hw)
    return Instances(layers, tuple(names), broken=tuple(broken), doubts=tuple(doubts), annotations=tuple(kept))


def _sides_of(rle: dict) -> tuple[int | None, ...] | None:
    size = rle.get("size")
    return tuple(map(_whole_number, size)) if isinstance(size, list) else None


def stack_masks(masks: list[np.ndarray], orig_hw: tuple[int, int]) -> np.ndarray:
    """Put masks into as few id layers as a first fit needs; mask i (from 0) gets id i + 1, an empty one no pixel."""
    layers = [np.zeros(orig_hw, np.int32)]
    for index, mask in enumerate(masks):
        rows = np.flatnonzero(mask.any(1))
        if not len(rows):
            continue
        columns = np.flatnonzero(mask.any(0))
        window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        inside = mask[window]
        free = next((layer for layer in layers if not layer[window][inside].any()), None)
        if free is None:
            free = np.zeros(orig_hw, np.int32)
            layers.append(free)
        free[window][inside] = index + 1
    return np.stack(layers)


def _read_json(path: Path) -> dict:
    """Read a json file that holds an object, naming the file if it does not."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no file {path}")
    content = listing.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a json {type(content).__name__}; must be an object with named fields")
    return content


def _field(record: dict, name: str, path: Path) -> object:
    """Return a field of a json record, naming the file if the record lacks it."""
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{path}: no {name!r} in {str(record)[:60]}; is it in the format that data.format names?")
    return record[name]


def _list_field(record: dict, name: str, path: Path) -> list:
    """Return a field that is a list, empty where it is null."""
    entries = _field(record, name, path)
    if not isinstance(entries, list | None):
        raise ValueError(f"{path}: {name!r} is {str(entries)[:60]}; must be a list")
    return entries or []
