"""Datasets of pictures with instance masks, read straight from disk: LabPics, label maps, one file per mask, COCO,
SA-1B, DAVIS.

`split_items(**config["data"])` lists a dataset: its keyword arguments are the keys of configs/sam2/data/*.yaml.
`read_item(item)` reads one picture and its objects. Objects come as id layers, int32 (L, H, W): 0 is background, an id
lives in exactly one layer, and objects that overlap lie in different layers (label maps have one layer).
"""

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.images import PICTURE_SUFFIXES, read_channels, read_image, read_label_map
from utils.instances.codecs import polygons_to_mask, rle_to_mask
from utils.listing import dataset_folder, draw_validation
from utils.settings import check_keys


@dataclass(frozen=True)
class Item:
    """One picture and its annotation, as files."""

    name: str  # unique in the dataset; lists are sorted by it
    format: str  # which reader: labpics, label_map, masks_per_file, coco, sa1b or davis
    image_path: Path
    annotation_path: Path  # a file; for masks_per_file the folder of masks
    group: str = ""  # davis only: the sequence
    vessel: str = "visible"  # labpics only
    ignore_ids: tuple[int, ...] = ()  # label_map only
    coco_json: str = ""  # coco only: this picture's size and annotations as json text, cheap to hand to workers
    num_crowd: int = 0  # coco only: crowd regions left out

    @property
    def split_unit(self) -> str:
        """What a split never divides: the group, or the picture itself."""
        return self.group or self.name


# ---------------------------------------------------------------------------------------------------------------------
# list a dataset


def split_items(format: str, root: str, **keys) -> tuple[list[Item], list[Item]]:
    """List a dataset's pictures and split them into training and validation.

    The split is what the dataset has on disk (folders, list files, two json files), else a seeded fraction of the
    sorted names, which depends on nothing else.

    Args:
        format: one of labpics, label_map, masks_per_file, coco, sa1b, davis.
        root: the dataset's folder, relative to where the user stands.
        keys: the other keys of that format's configs/sam2/data/*.yaml; the functions below explain them.
    Returns:
        (train_items, val_items), each sorted by name.
    Raises:
        FileNotFoundError: for a folder that is not there, or a picture without annotation (or the reverse) where
            on_bad is "stop"; with "skip" such an item is listed, and the dataset check leaves it out and counts it.
        ValueError: for an unknown format or key, or a value that makes no sense.
    """
    listers = {
        "labpics": split_labpics,
        "label_map": split_label_map,
        "masks_per_file": split_masks_per_file,
        "coco": split_coco,
        "sa1b": split_sa1b,
        "davis": split_davis,
    }
    if format not in listers:
        raise ValueError(f"data.format is {format!r}; must be one of {', '.join(listers)}")
    split = functools.partial(listers[format], dataset_folder(root))
    check_keys(split, keys, "data")
    train_items, val_items = split(**keys)
    if not train_items and not val_items:
        raise ValueError(f"data.root {root} holds no pictures in the layout {format!r} (see data/README.md)")
    most_common = Counter(item.name for item in train_items + val_items).most_common(1)
    if most_common[0][1] > 1:
        raise ValueError(f"{root} lists {most_common[0][0]} {most_common[0][1]} times; names must be unique")
    return sorted(train_items, key=lambda item: item.name), sorted(val_items, key=lambda item: item.name)


def split_labpics(
    root: Path,
    *,
    subsets: Sequence[str] = ("Simple", "Complex"),
    train_folder: str = "Train",
    val_folder: str | None = None,
    vessel: str = "visible",
    val_fraction: float,
    split_seed: int,
    on_bad: str,
) -> tuple[list[Item], list[Item]]:
    """List LabPics V1: <root>/<subset>/<Train or Test>/{Image,Instance}/<name>. `vessel` is explained at its reader."""
    if vessel not in ("visible", "full"):
        raise ValueError(f"data.vessel is {vessel!r}; must be visible (vessel minus its materials) or full")

    def list_folder(folder: str) -> list[Item]:
        items = []
        for subset in subsets:
            image_dir, label_dir = root / subset / folder / "Image", root / subset / folder / "Instance"
            pairs = _pair(_pictures(image_dir), _pictures(label_dir), image_dir, label_dir, ".png", on_bad)
            for stem, image_path, label_path in pairs:
                items.append(Item(f"{subset}/{folder}/{stem}", "labpics", image_path, label_path, vessel=vessel))
        return items

    if val_folder is None:
        return _split_by_fraction(list_folder(train_folder), val_fraction, split_seed)
    return list_folder(train_folder), list_folder(val_folder)


def split_label_map(
    root: Path,
    *,
    image_dir: str = "images",
    label_dir: str = "labels",
    label_ending: str = "",
    ignore_ids: Sequence[int] = (),
    train_list: str | None = None,
    val_list: str | None = None,
    val_fraction: float,
    split_seed: int,
    on_bad: str,
) -> tuple[list[Item], list[Item]]:
    """List pictures <root>/<image_dir>/<stem>.* with maps of ids <root>/<label_dir>/<stem><label_ending>.*"""
    images, labels = _pictures(root / image_dir), _pictures(root / label_dir)
    if label_ending:
        labels = {stem: path for stem, path in labels.items() if stem.endswith(label_ending)}
        if image_dir == label_dir:
            images = {stem: path for stem, path in images.items() if stem not in labels}
        labels = {stem.removesuffix(label_ending): path for stem, path in labels.items()}
    elif image_dir == label_dir:
        raise ValueError(
            f"data.image_dir and data.label_dir are both {image_dir!r}: set data.label_ending, such as _masks for "
            "001.png and 001_masks.png, or keep the label maps in a folder of their own"
        )
    pairs = _pair(images, labels, root / image_dir, root / label_dir, f"{label_ending}.png", on_bad)
    items = [
        Item(stem, "label_map", image_path, label_path, ignore_ids=tuple(ignore_ids))
        for stem, image_path, label_path in pairs
    ]
    return _split_by_lists(items, train_list, val_list, val_fraction, split_seed)


def split_masks_per_file(
    root: Path,
    *,
    train_list: str | None = None,
    val_list: str | None = None,
    val_fraction: float,
    split_seed: int,
    on_bad: str,
) -> tuple[list[Item], list[Item]]:
    """List the layout of the Data Science Bowl 2018: <root>/<id>/images/<one picture>, <root>/<id>/masks/*.png."""
    items, missing = [], []
    for folder in _folders(root):
        pictures = list(_pictures(folder / "images").values()) if (folder / "images").is_dir() else []
        if len(pictures) > 1:
            raise ValueError(
                f"{folder / 'images'} holds {len(pictures)} pictures ({pictures[0].name}, ...); must be one"
            )
        image_path = pictures[0] if pictures else folder / "images" / f"{folder.name}.png"
        items.append(Item(folder.name, "masks_per_file", image_path, folder / "masks"))
        if not pictures or not (folder / "masks").is_dir():
            missing.append((image_path, folder / "masks"))
    _stop_at_missing(missing, len(items), on_bad)
    return _split_by_lists(items, train_list, val_list, val_fraction, split_seed)


def split_coco(
    root: Path,
    *,
    train_images: str = "train2017",
    train_annotations: str = "annotations/instances_train2017.json",
    val_images: str = "val2017",
    val_annotations: str | None = None,
    val_fraction: float,
    split_seed: int,
    on_bad: str,
) -> tuple[list[Item], list[Item]]:
    """List COCO: pictures <root>/<images>/<file_name> with <root>/<annotations>, polygons or run lengths; no crowds."""
    train_items = _list_coco(root / train_images, root / train_annotations, train_images, on_bad)
    if val_annotations is None:
        return _split_by_fraction(train_items, val_fraction, split_seed)
    return train_items, _list_coco(root / val_images, root / val_annotations, val_images, on_bad)


def _list_coco(image_dir: Path, annotation_path: Path, image_dir_name: str, on_bad: str) -> list[Item]:
    content = _read_json(annotation_path)
    annotations = {}  # image id -> its annotations, in the order of the file
    for annotation in _field(content, "annotations", annotation_path):
        annotations.setdefault(_field(annotation, "image_id", annotation_path), []).append(annotation)
    items, missing = [], []
    for image in _field(content, "images", annotation_path):
        file_name = _field(image, "file_name", annotation_path)
        of_image = annotations.get(_field(image, "id", annotation_path), [])
        kept = [
            {"id": annotation.get("id"), "segmentation": annotation.get("segmentation")}
            for annotation in of_image
            if not annotation.get("iscrowd", 0)
        ]
        orig_hw = [image.get("height"), image.get("width")]
        items.append(
            Item(
                name=f"{image_dir_name}/{file_name}",
                format="coco",
                image_path=image_dir / file_name,
                annotation_path=annotation_path,
                coco_json=json.dumps({"orig_hw": orig_hw, "annotations": kept}),
                num_crowd=len(of_image) - len(kept),
            )
        )
        if not (image_dir / file_name).is_file():
            missing.append((image_dir / file_name, annotation_path))
    _stop_at_missing(missing, len(items), on_bad)
    return items


def split_sa1b(
    root: Path,
    *,
    image_dir: str = ".",
    annotation_dir: str = ".",
    train_list: str | None = None,
    val_list: str | None = None,
    val_fraction: float,
    split_seed: int,
    on_bad: str,
) -> tuple[list[Item], list[Item]]:
    """List SA-1B: pictures <root>/<image_dir>/<stem>.jpg with <root>/<annotation_dir>/<stem>.json."""
    annotations = _by_stem(root / annotation_dir, (".json",))
    pairs = _pair(_pictures(root / image_dir), annotations, root / image_dir, root / annotation_dir, ".json", on_bad)
    items = [Item(stem, "sa1b", image_path, annotation_path) for stem, image_path, annotation_path in pairs]
    return _split_by_lists(items, train_list, val_list, val_fraction, split_seed)


def split_davis(
    root: Path,
    image_dir: str,
    annotation_dir: str,
    train_list: str | None,
    val_list: str | None,
    val_fraction: float,
    split_seed: int,
    on_bad: str,
) -> tuple[list[Item], list[Item]]:
    """List DAVIS: frames <root>/<image_dir>/<sequence>/*.jpg with <root>/<annotation_dir>/<sequence>/*.png.

    An item is an annotated frame; frames between annotated ones (YouTube-VOS has them) are no items. Whole sequences go
    to training or to validation.
    """
    items, missing = [], []
    sequences = {folder.name for folder in _folders(root / image_dir) + _folders(root / annotation_dir)}
    for sequence in sorted(sequences):
        frame_dir, label_dir = root / image_dir / sequence, root / annotation_dir / sequence
        frames = _pictures(frame_dir) if frame_dir.is_dir() else {}
        labels = _pictures(label_dir) if label_dir.is_dir() else {}
        if not labels:  # nothing says which frames: name the first
            labels = {stem: label_dir / f"{stem}.png" for stem in sorted(frames)[:1]}
            missing += [(frames[stem], label_dir) for stem in labels]
        for stem, label_path in sorted(labels.items()):
            image_path = frames[stem] if stem in frames else frame_dir / f"{stem}.jpg"
            items.append(Item(f"{sequence}/{stem}", "davis", image_path, label_path, group=sequence))
            if stem not in frames:
                missing.append((image_path, label_path))
    _stop_at_missing(missing, len(items), on_bad)
    return _split_by_lists(items, train_list, val_list, val_fraction, split_seed)


# ---------------------------------------------------------------------------------------------------------------------
# files and pairs


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the files with these suffixes (any case), by stem; folders, hidden and other files are passed over."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; see data/README.md for the layout, or change data.root")
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes or not path.is_file():
            continue
        if path.stem in files:
            raise ValueError(f"{files[path.stem]} and {path} have the same name but for the suffix; keep one of them")
        files[path.stem] = path
    return files


def _pictures(folder: Path) -> dict[str, Path]:
    return _by_stem(folder, PICTURE_SUFFIXES)


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; see data/README.md for the layout, or change data.root")
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _pair(
    images: dict[str, Path],
    annotations: dict[str, Path],
    image_dir: Path,
    annotation_dir: Path,
    annotation_ending: str,
    on_bad: str,
) -> list[tuple[str, Path, Path]]:
    """Match pictures and annotations by stem: (stem, image path, annotation path), sorted by stem."""
    pairs, missing = [], []
    for stem in sorted(images.keys() | annotations.keys()):
        image_path = images[stem] if stem in images else image_dir / f"{stem}.jpg"
        has_both = stem in images and stem in annotations
        annotation_path = annotations[stem] if stem in annotations else annotation_dir / f"{stem}{annotation_ending}"
        pairs.append((stem, image_path, annotation_path))
        if not has_both:
            missing.append((image_path, annotation_path))
    _stop_at_missing(missing, len(pairs), on_bad)
    return pairs


def _stop_at_missing(missing: list[tuple[Path, Path]], num_pairs: int, on_bad: str) -> None:
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"data.on_bad is {on_bad!r}; must be stop or skip")
    if missing and on_bad == "stop":
        image_path, annotation_path = missing[0]
        first = f"image {image_path} has no annotation {annotation_path}"
        if not image_path.is_file():
            first = f"annotation {annotation_path} has no image {image_path}"
        raise FileNotFoundError(
            f"{len(missing)} of {num_pairs} pairs lack a file; first: {first}; complete or remove the pair, "
            "list all with check=true, or leave such pairs out with data.on_bad=skip"
        )


# ---------------------------------------------------------------------------------------------------------------------
# splits


def _split_by_fraction(items: list[Item], val_fraction: float, split_seed: int) -> tuple[list[Item], list[Item]]:
    """Split by a seeded order of the names: a new picture does not reshuffle the others. Groups stay whole."""
    val_units = draw_validation({item.split_unit for item in items}, val_fraction, split_seed)
    train_items = [item for item in items if item.split_unit not in val_units]
    return train_items, [item for item in items if item.split_unit in val_units]


def _split_by_lists(
    items: list[Item], train_list: str | None, val_list: str | None, val_fraction: float, split_seed: int
) -> tuple[list[Item], list[Item]]:
    """Split by list files, one name a line; with one list, the rest is the other part; with none, a seeded fraction."""
    if train_list is None and val_list is None:
        return _split_by_fraction(items, val_fraction, split_seed)
    units = {item.split_unit for item in items}
    train_units = _read_list(Path(train_list), units) if train_list is not None else None
    val_units = _read_list(Path(val_list), units) if val_list is not None else units - train_units
    train_units = units - val_units if train_units is None else train_units
    if train_units & val_units:
        raise ValueError(f"{train_list} and {val_list} both name {min(train_units & val_units)}; a name goes in one")
    train_items = [item for item in items if item.split_unit in train_units]
    return train_items, [item for item in items if item.split_unit in val_units]


def _read_list(path: Path, units: set[str]) -> set[str]:
    """Read a list file: a name a line, with or without suffix; or DAVIS 2016's lines, image and annotation path."""
    if not path.is_file():
        raise FileNotFoundError(f"no list file {path} (seen from {Path.cwd()})")
    named = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        entry = Path(words[0])
        candidates = [line.strip(), words[0], entry.stem, entry.name, entry.parent.name]  # the last: the sequence
        unit = next((candidate for candidate in candidates if candidate in units), None)
        if unit is None:
            raise ValueError(f"{path} names {line.strip()!r}, which the dataset lacks; names look like {min(units)!r}")
        named.add(unit)
    return named


# ---------------------------------------------------------------------------------------------------------------------
# read one item


def read_item(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """Read a picture and its objects.

    Returns:
        image_rgb uint8 (H, W, 3), id layers int32 (L, H, W).
    Raises:
        FileNotFoundError, ValueError: with the file; also if picture and annotation differ in size.
    """
    image_rgb, layers = read_image(item.image_path), read_instances(item)
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


def read_instances(item: Item) -> np.ndarray:
    """Read the objects of one picture.

    Returns:
        int32 (L, H, W), L >= 1: 0 is background; every id lies in one layer only; objects that overlap lie in different
        layers.
    Raises:
        FileNotFoundError, ValueError: with the file, what is wrong, and the remedy.
    """
    if item.format == "labpics":
        return _read_labpics(item.annotation_path, item.vessel)
    if item.format in ("label_map", "davis"):
        ids = read_label_map(item.annotation_path)
        for ignore_id in item.ignore_ids:
            ids[ids == ignore_id] = 0
        return ids[None]
    if item.format == "masks_per_file":
        return _read_masks_per_file(item)
    if item.format == "coco":
        content = json.loads(item.coco_json)
        where = f"{item.annotation_path}, image {item.image_path.name}"
        return _read_segmentations(content["annotations"], content["orig_hw"], where)
    assert item.format == "sa1b", item.format
    content = _read_json(item.annotation_path)
    image = _field(content, "image", item.annotation_path)
    orig_hw = [_field(image, "height", item.annotation_path), _field(image, "width", item.annotation_path)]
    return _read_segmentations(_field(content, "annotations", item.annotation_path), orig_hw, str(item.annotation_path))


def object_ids(layers: np.ndarray) -> list[tuple[int, int, int]]:
    """List the objects in id layers: (layer, id, area in pixels), sorted; 0 is background, whether it occurs or not."""
    objects = []
    for layer, ids in enumerate(layers):
        flat = ids[ids > 0]
        if flat.max(initial=0) <= ids.size:  # counting is much faster than sorting
            areas = np.bincount(flat)
            values = np.flatnonzero(areas)
            areas = areas[values]
        else:
            values, areas = np.unique(flat, return_counts=True)
        objects += [(layer, int(value), int(area)) for value, area in zip(values, areas, strict=True)]
    return objects


def mask_names(item: Item) -> list[str]:
    """Name the masks of a picture whose ids count them from 1, in that order; empty for maps, whose ids are stored."""
    if item.format == "masks_per_file":
        return [path.name for path in _pictures(item.annotation_path).values()]
    if item.format not in ("coco", "sa1b"):
        return []
    content = json.loads(item.coco_json) if item.format == "coco" else _read_json(item.annotation_path)
    return [f"annotation {annotation.get('id', '?')}" for annotation in content["annotations"]]


def _read_labpics(path: Path, vessel: str) -> np.ndarray:
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
    vessels = np.where(vessels > 0, vessels + materials.max(), 0)
    if vessel == "full":
        return np.stack([materials, vessels])
    return np.where(materials > 0, materials, vessels)[None]


def _read_masks_per_file(item: Item) -> np.ndarray:
    """Read one file per object; ids are 1, 2, ... in the order of the file names."""
    paths = list(_pictures(item.annotation_path).values())
    masks = [read_label_map(path) > 0 for path in paths]
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise ValueError(
                f"mask {path} is {mask.shape[0]} x {mask.shape[1]} px (height x width), but {paths[0]} is "
                f"{masks[0].shape[0]} x {masks[0].shape[1]}; all masks of a picture must have its size"
            )
    orig_hw = masks[0].shape if masks else read_image(item.image_path).shape[:2]
    return _stack_masks(masks, orig_hw)


def _read_segmentations(annotations: list[dict], orig_hw: list[int | None], where: str) -> np.ndarray:
    """Read COCO's `segmentation`s: polygons, or run lengths, compressed or not; ids are 1, 2, ... in file order."""
    if not all(isinstance(side, int) and side > 0 for side in orig_hw):
        raise ValueError(f"{where}: height and width are {orig_hw}; the picture's entry must give both in pixels")
    masks = []
    for annotation in annotations:
        segmentation = annotation.get("segmentation")
        which = f"{where}, annotation {annotation.get('id', '?')}"
        if segmentation is None:
            raise ValueError(f"{which}: has no segmentation (a box alone is no mask); remove it or add the mask")
        if isinstance(segmentation, dict) and list(segmentation.get("size", [])) != list(orig_hw):
            raise ValueError(f"{which}: its mask is {segmentation.get('size')} px, but the picture is {orig_hw}")
        try:
            is_rle = isinstance(segmentation, dict)
            masks.append(rle_to_mask(segmentation) if is_rle else polygons_to_mask(segmentation, *orig_hw))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{which}: {error}") from error
    return _stack_masks(masks, tuple(orig_hw))


def _stack_masks(masks: list[np.ndarray], orig_hw: tuple[int, int]) -> np.ndarray:
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
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid json ({error}); copy or export it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a json {type(content).__name__}; must be an object with named fields")
    return content


def _field(record: dict, name: str, path: Path) -> object:
    """Return a field of a json record, naming the file if the record lacks it."""
    if not isinstance(record, dict) or name not in record:
        raise ValueError(f"{path}: no {name!r} in {str(record)[:60]}; is it in the format that data.format names?")
    return record[name]
