"""Check a dataset of pictures with instance masks before training on it, and describe it: what the masks hold.

Objects, empty and tiny masks; utils/dataset_check.py has what all kinds of annotation share.
"""

import csv
import functools
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils import dataset_check
from utils.dataset_check import CheckReport, ItemReport
from utils.images import LYING, read_image_unscaled, read_orientation, remark_on_values
from utils.instances.readers import (
    Instances,
    Item,
    check_same_size,
    class_key,
    class_name,
    is_marked_crowd,
    object_ids,
)
from utils.listing import MAX_LISTED, existing_file, first_few, read_text
from utils.log import drawing, write_json

TINY_PX = 16  # an object of fewer pixels is remarked on
TURNS = {
    2: "mirrored", 3: "turned by 180 degrees", 4: "upside down", 5: "mirrored and turned", 6: "turned by 90 degrees",
    7: "mirrored and turned", 8: "turned by 270 degrees",
}  # fmt: skip
REMEDIES = {  # kind of remark -> what to do about it
    "no objects": "left out of training; remove the picture, or annotate it",
    "crowd regions alone": "left out of training; if each is one object (CVAT marks all masks so), data.crowd=keep",
    "broken annotations": "what is broken is left out, other objects are not; export them again, or remove them",
    "outlines that leave the picture": "cut off there; look whether x and y are exchanged, or the picture was resized",
    "a turn by EXIF and masks that fit with and without it": "look whether they lie right; if not, turn them, too",
    "empty masks": "they are no objects and are passed over; remove them, or draw them",
    f"objects below {TINY_PX} px": "remove stray pixels; real objects this small need larger pictures",
    "a single id 255": "a mask, taken as one object; if it covers several, give each its own id (1, 2, 3, ...)",
} | dataset_check.PICTURE_REMEDIES


@dataclass(frozen=True)
class Objects:
    """What the check found in one annotation: N objects."""

    areas_px: np.ndarray  # int64 (N,)
    centers_xy: np.ndarray  # float64 (N, 2), mean position of the object's pixels, as a share of width and height, 0..1
    concavities: np.ndarray  # float64 (N,), 1 - area / area of the convex hull, 0..1; of check=true alone
    num_crowd: int  # crowd regions left out
    num_broken: int  # broken annotations, left out whole or in part
    image_id: int | str | None = None  # the picture's, in a COCO file
    is_crowd: np.ndarray | None = None  # bool (N,), marked so in a COCO file
    classes: frozenset = frozenset()  # `class_key`s of its objects whose category has a name
    attributes: frozenset = frozenset()  # keys of its objects' attributes
    class_names: tuple[str, ...] = ()  # of its objects, "" where one has none
    listed_classes: tuple[str, ...] = ()  # those that the dataset's files list


def check_data(
    splits: dict[str, list[Item]],
    min_area_px: int,
    on_bad: str,
    run_dir: Path,
    list_all: bool,
    picture_attributes: str | None = None,
) -> tuple[dict[str, list[Item]], dict[str, int], CheckReport]:
    """Check a dataset, print what was found, draw its statistics, and leave out what cannot be used.

    Args:
        splits: {"train": items, "val": items}.
        min_area_px: smaller objects do not count.
        on_bad: "stop" or "skip", what to do about faulty files.
        run_dir: for dataset.png, and dataset.json.
        list_all: check=true: print all findings, not some examples of each kind, and write dataset.json.
        picture_attributes: a csv for it, see `describe_dataset`.
    Returns:
        the usable items of each split, each with an object of at least min_area_px; counts for run.json; the report.
    Raises:
        ValueError: for faulty files where on_bad is "stop".
    """
    all_items = [item for items in splits.values() for item in items]
    report = dataset_check.check_items(all_items, functools.partial(check_item, with_shapes=list_all))
    print("\n".join(report_lines(report, None if list_all else MAX_LISTED)))
    if list_all:
        write_json(run_dir / "dataset.json", describe_dataset(report, picture_attributes))
    with drawing(run_dir / "dataset.png"):
        plot_statistics(report, run_dir / "dataset.png")
    with_large = {item.name for item in report.usable if item.content.areas_px.max() >= min_area_px}
    usable = {split: dataset_check.keep_usable(items, report, on_bad) for split, items in splits.items()}
    splits = {split: [item for item in items if item.name in with_large] for split, items in usable.items()}
    num_small = sum(int((item.content.areas_px < min_area_px).sum()) for item in report.items)
    counts = count(report) | {
        "train_images": len(splits["train"]),
        "val_images": len(splits["val"]),
        "num_small_objects_left_out": num_small,
        "classes": {split: count_classes(report, items, min_area_px) for split, items in splits.items()},
    }
    print(
        f"train on {len(splits['train'])} images, validate on {len(splits['val'])}; {num_small} objects below "
        f"data.min_area_px={min_area_px} left out; statistics in {run_dir / 'dataset.png'}"
    )
    return splits, counts, report


def count_classes(report: CheckReport, items: list[Item], min_area_px: int) -> dict[str, int]:
    """Count the objects of each class, "" for those without one, that are large enough: {name: objects}, sorted."""
    names = {item.name for item in items}
    contents = [item.content for item in report.usable if item.name in names]
    pairs = [pair for content in contents for pair in zip(content.class_names, content.areas_px, strict=True)]
    return dict(sorted(Counter(name for name, area in pairs if area >= min_area_px).items()))


def count(report: CheckReport) -> dict[str, int]:
    """Count items and objects, for a run's record."""
    return report.counts | {
        "num_without_objects": len(report.empty),
        "num_objects": sum(len(item.content.areas_px) for item in report.usable),
        "num_crowd": sum(item.content.num_crowd for item in report.items),
        "num_broken": sum(item.content.num_broken for item in report.items),
    }


def check_item(item: Item, with_shapes: bool = False) -> ItemReport:
    """Check one item; `with_shapes` also looks at the shape of each object."""
    faults, remarks = [], []
    orig_hw = bits = instances = None
    areas_px, centers_xy, num_crowd, num_broken = np.zeros(0, np.int64), np.zeros((0, 2)), 0, 0
    concavities, said = np.zeros(0), {"is_crowd": np.zeros(0, bool)}
    try:
        image_rgb = read_image_unscaled(item.image_path)
        orig_hw, bits = image_rgb.shape[:2], 8 * image_rgb.itemsize
        if remark := remark_on_values(image_rgb):
            remarks.append((remark[0], f"{item.image_path}: {remark[1]}"))
    except (OSError, ValueError) as error:
        faults.append(str(error))
    try:
        instances = item.read()
        num_crowd, num_broken = instances.num_crowd, len(instances.broken)
        if orig_hw is not None:
            check_same_size(item, orig_hw, instances.layers.shape[1:])
    except (OSError, ValueError) as error:
        faults.append(str(error))
    if not faults:
        objects = object_ids(instances.layers)
        areas_px = np.array([area for _, _, area in objects], np.int64)
        said = read_annotations(instances, objects)
        centers_xy = _centers(instances.layers)
        if with_shapes:
            concavities = np.array([_concavity(instances.layers[layer] == i) for layer, i, _ in objects])
        remarks += remark_on_objects(item, instances, objects)
        orientation = read_orientation(item.image_path)
        is_size_kept = orientation not in LYING or orig_hw[0] == orig_hw[1]
        if orientation not in (1, read_orientation(item.annotation_path)) and is_size_kept:
            turn = ("a turn by EXIF and masks that fit with and without it", f"{item.image_path}: {TURNS[orientation]}")
            remarks.append(turn)
    content = Objects(areas_px, centers_xy, concavities, num_crowd, num_broken, listed_classes=item.classes, **said)
    return ItemReport(item.name, tuple(faults), tuple(remarks), orig_hw, bits, len(areas_px) > 0, content)


def read_annotations(instances: Instances, objects: list[tuple[int, int, int]]) -> dict:
    """Collect what a json file says of a picture's objects, for `Objects`."""
    of_objects = [instances.annotations[i - 1] if instances.annotations else {} for _, i, _ in objects]
    named = [annotation for annotation in of_objects if "category" in annotation]
    attributes = [annotation["attributes"] for annotation in of_objects if "attributes" in annotation]
    return {
        "image_id": instances.image_id,
        "is_crowd": np.array([is_marked_crowd(annotation) for annotation in of_objects], bool),
        "classes": frozenset(class_key(annotation) for annotation in named),
        "attributes": frozenset(key for each in attributes if isinstance(each, dict) for key in each),
        "class_names": tuple(class_name(annotation) for annotation in of_objects),
    }


def report_lines(report: CheckReport, max_listed: int | None = MAX_LISTED) -> list[str]:
    """Put a report into lines to print.

    Args:
        max_listed: examples for each kind of finding; None: all.
    """
    lines = dataset_check.summary_lines(report, "without objects")
    if report.usable:
        per_image, area_share, centers = measure_objects(report)
        p5, p50, p95 = np.percentile(area_share, [5, 50, 95])
        (mean_x, mean_y), (std_x, std_y) = centers.mean(0), centers.std(0)
        in_middle = (np.abs(centers - 0.5) < 1 / 6).all(1).mean()
        lines += [
            f"masks per image: {per_image.min()} to {per_image.max()}, mean {per_image.mean():.1f}, "
            f"median {np.median(per_image):.0f}",
            f"mask area, share of the image: {p5:.3%} / {p50:.3%} / {p95:.3%} (5th, 50th, 95th percentile)",
            f"object centres: mean ({mean_x:.2f}, {mean_y:.2f}), spread ({std_x:.2f}, {std_y:.2f}) of (width, height); "
            f"{in_middle:.0%} in the middle ninth (11% if even)",
        ]
    listed_classes = [name for item in report.items for name in item.content.listed_classes]
    names_of_pictures = [item.content.class_names for item in report.usable]
    lines += class_lines(names_of_pictures, max_listed, listed_classes, [item.name for item in report.usable])
    if num_crowd := count(report)["num_crowd"]:
        lines.append(f"crowd regions left out: {num_crowd}; data.crowd=keep trains on them and clicks them")
    return lines + dataset_check.finding_lines(report, REMEDIES, max_listed)


def class_lines(
    names_of_pictures: list[tuple[str, ...]],
    max_listed: int | None,
    listed_classes: list[str] = (),
    pictures: list[str] | None = None,
) -> list[str]:
    """Count the objects and pictures of each class, and name what looks like a slip; no line where no object has one.

    Args:
        names_of_pictures: of each picture the names of its objects' classes, "" where one has none.
        listed_classes: those that the dataset's files list, some of which may have no objects.
        pictures: their names, of which those are named that have objects without a class; None: they are counted alone.
    """
    objects = Counter(name for names in names_of_pictures for name in names)
    num_pictures = Counter(name for names in names_of_pictures for name in set(names))
    named = [name for name in objects if name]
    if not named:
        return []
    named.sort(key=lambda name: (-objects[name], name))
    shown = [f"{name} {objects[name]} ({num_pictures[name]})" for name in named]
    lines = [f"classes, objects (pictures): {', '.join(first_few(shown, max_listed))}"]
    if unused := [name for name in dict.fromkeys(listed_classes) if name and not objects[name]]:
        lines.append(f"classes without objects: {', '.join(first_few(unused, max_listed))}")
    if objects[""]:
        where = [name for name, names in zip(pictures or [], names_of_pictures, strict=False) if "" in names]
        lines.append(f"{objects['']} objects have no class: {', '.join(first_few(where, max_listed))}".rstrip(": "))
    alike = {}
    for name in sorted(named):
        alike.setdefault(name.strip().casefold(), []).append(name)
    lines += [
        f"{' and '.join(map(repr, names))} differ in case or spaces alone: are they one class?"
        for names in alike.values()
        if len(names) > 1
    ]
    return lines


def describe_dataset(report: CheckReport, picture_attributes: str | None) -> dict:
    """Describe what the masks of a dataset look like, as the Segment Anything paper does: what dataset.json holds.

    Args:
        report: of a check with shapes.
        picture_attributes: csv with a column `picture`, the names of the pictures, and one for each attribute, such as
            country: pictures and masks are counted for each of its values. None: nothing more.
    Returns:
        num_pictures, those with masks; num_masks; masks_per_picture (I,); of the masks relative_sizes (N,), the root of
        the share of the picture that each covers, concavities (N,), 1 - area / area of its convex hull, centers_xy
        (N, 2), shares of width and height, and center_distances (N,), of half the diagonal of a square; mean_... of
        each; attributes {attribute: {value: {"pictures", "masks"}}}.
    Source: Kirillov et al. 2023, figures 5 to 7.
    """
    per_image, area_share, centers = np.zeros(0, int), np.zeros(0), np.zeros((0, 2))
    if report.usable:
        per_image, area_share, centers = measure_objects(report)
    values = {
        "masks_per_picture": per_image,
        "relative_sizes": np.sqrt(area_share),
        "concavities": np.concatenate([np.zeros(0)] + [item.content.concavities for item in report.usable]),
        "center_distances": np.hypot(*(centers - 0.5).T) / np.hypot(0.5, 0.5),
    }
    means = {f"mean_{name}": float(numbers.mean()) for name, numbers in values.items() if len(numbers)}
    lists = {name: numbers.tolist() for name, numbers in values.items()} | {"centers_xy": centers.tolist()}
    numbers = {"num_pictures": len(report.usable), "num_masks": len(area_share)} | means
    attributes = {} if picture_attributes is None else count_attributes(report, Path(picture_attributes))
    return numbers | {"attributes": attributes} | lists


def count_attributes(report: CheckReport, path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Count the pictures and masks of each value of each attribute of a csv; pictures that it lacks count as ""."""
    rows = list(csv.DictReader(io.StringIO(read_text(existing_file(path, "picture_attributes")))))
    attributes = [name for name in (rows[0] if rows else {}) if name != "picture"]
    if not rows or "picture" not in rows[0] or not attributes:
        raise ValueError(f"picture_attributes {path} must have a column picture, and one for each attribute")
    if wrong := [row for row in rows if None in row or None in row.values()]:
        raise ValueError(
            f"picture_attributes {path}: a row has more or fewer cells than the first: {[*wrong[0].values()]}"
        )
    of_picture = {row["picture"]: row for row in rows}
    if len(of_picture) < len(rows):
        raise ValueError(f"picture_attributes {path} names {len(rows) - len(of_picture)} pictures more than once")
    if unknown := sorted(set(of_picture) - {item.name for item in report.items}):
        raise ValueError(
            f"picture_attributes {path} names {len(unknown)} pictures that are not in the dataset, such as "
            f"{', '.join(first_few(unknown, 3))}; they are called such as {report.items[0].name}"
        )
    counts = {attribute: {} for attribute in attributes}
    for item in report.usable:
        for attribute in attributes:
            value = of_picture[item.name][attribute] if item.name in of_picture else ""
            count = counts[attribute].setdefault(value, {"pictures": 0, "masks": 0})
            count["pictures"] += 1
            count["masks"] += len(item.content.areas_px)
    return counts


def plot_statistics(report: CheckReport, path: str | Path) -> None:
    """Draw the statistics of the usable items as one picture: masks per image, mask area, object centres."""
    from matplotlib.figure import Figure  # slow to import, and needed here only

    figure = Figure(figsize=(14, 4), layout="constrained")
    per_image_axes, area_axes, center_axes = figure.subplots(1, 3)
    figure.suptitle(f"{len(report.usable)} images, {count(report)['num_objects']} objects")
    per_image_axes.set(title="masks per image", xlabel="masks", ylabel="images")
    area_axes.set(title="mask area", xlabel="share of the image", ylabel="masks", xscale="log")
    center_axes.set(title="object centres", xlabel="x / width", ylabel="y / height", xlim=(0, 1), ylim=(1, 0))
    if report.usable:
        per_image, area_share, centers = measure_objects(report)
        width = -(-(np.ptp(per_image) + 1) // 40)  # of a bar, which lies over the whole numbers that it counts
        per_image_axes.hist(per_image, bins=np.arange(per_image.min() - 0.5, per_image.max() + width, width))
        per_image_axes.xaxis.get_major_locator().set_params(integer=True)
        area_axes.hist(area_share, bins=np.geomspace(area_share.min() * 0.99, 1, 40))
        *_, colored = center_axes.hist2d(centers[:, 0], centers[:, 1], bins=24, range=[[0, 1], [0, 1]])
        figure.colorbar(colored, ax=center_axes, label="masks")
    figure.savefig(path, dpi=100)


def measure_objects(report: CheckReport) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of the usable items the masks per image (I,), and of all N objects the share of the image that each covers
    (N,) and its centre (N, 2), 0..1.
    """
    contents = [item.content for item in report.usable]
    image_px = [item.orig_hw[0] * item.orig_hw[1] for item in report.usable]
    area_share = [content.areas_px / px for content, px in zip(contents, image_px, strict=True)]
    per_image = np.array([len(content.areas_px) for content in contents])
    return per_image, np.concatenate(area_share), np.concatenate([content.centers_xy for content in contents])


def remark_on_objects(item: Item, instances: Instances, objects: list[tuple[int, int, int]]) -> list[tuple[str, str]]:
    """Remark on a picture's objects: (kind, a key of REMEDIES; what and where).

    Args:
        objects: from `object_ids`.
    """
    remarks = []
    ids = {object_id for _, object_id, _ in objects}
    if not objects:
        kind = "crowd regions alone" if instances.num_crowd else "no objects"
        remarks.append((kind, f"{item.image_path} ({item.annotation_path})"))
    remarks += [("broken annotations", which) for which in instances.broken]
    remarks += [("outlines that leave the picture", which) for which in instances.doubts]
    empty = [name for index, name in enumerate(instances.mask_names) if index + 1 not in ids]
    if empty:
        remarks.append(("empty masks", f"{item.annotation_path} ({item.name}): {', '.join(empty)}"))
    tiny = [f"{object_id} ({area_px} px)" for _, object_id, area_px in objects if area_px < TINY_PX]
    if tiny:
        remarks.append((f"objects below {TINY_PX} px", f"{item.annotation_path} ({item.name}): {', '.join(tiny)}"))
    if ids == {255} and not item.group:  # in a sequence (DAVIS 2016) it is the one object
        remarks.append(("a single id 255", str(item.annotation_path)))
    return remarks


def _concavity(mask: np.ndarray) -> float:
    """Tell which share of a mask's convex hull it leaves out, 0..1; both are drawn by pixel corners."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    corners = np.pad(mask[y : y + height, x : x + width], ((0, 1), (0, 1)))
    corners[1:] |= corners[:-1].copy()
    corners[:, 1:] |= corners[:, :-1].copy()
    hull = cv2.convexHull(cv2.findNonZero(corners.view(np.uint8)))
    return float(1 - np.count_nonzero(mask) / cv2.contourArea(hull))


def _centers(layers: np.ndarray) -> np.ndarray:
    """Return each object's mean position as a share of width and height, float64 (N, 2), in the order of object_ids."""
    _, height, width = layers.shape
    xs = np.tile((np.arange(width) + 0.5) / width, height)  # (H*W,), of each pixel
    ys = np.repeat((np.arange(height) + 0.5) / height, width)
    centers = []
    for ids in layers:
        flat = ids.ravel()
        if flat.max() > flat.size:  # number large ids from 1, in the same order, so that a table can hold them
            flat = np.unique(np.append(flat, 0), return_inverse=True)[1][:-1]
        areas = np.bincount(flat)
        ids_there = np.flatnonzero(areas[1:]) + 1
        sums_xy = np.stack([np.bincount(flat, xs), np.bincount(flat, ys)], 1)  # (largest id + 1, 2)
        centers.append(sums_xy[ids_there] / areas[ids_there, None])
    return np.concatenate(centers)
