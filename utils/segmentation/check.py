"""Check a dataset of pictures with class maps before training on it, and describe it: what the masks hold.

Where values lack a class, or files a partner, the report proposes the YAML lines that mend it. Remarks are on grey
pictures among colour, on masks of a single class, and on orientation tags that one of a pair lacks; a mask whose pixels
are all ignored is left out and counted. utils/dataset_check.py has what all kinds of annotation share.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import dataset_check
from utils.dataset_check import CheckReport, ItemReport
from utils.images import IGNORE_INDEX, LYING, read_image_unscaled, read_orientation, remark_on_values
from utils.instances import check as objects_check
from utils.instances.readers import Instances, object_ids
from utils.listing import MAX_LISTED
from utils.segmentation import readers
from utils.segmentation.readers import Item, MaskCoding, yaml_value

REMEDIES = {  # kind of remark -> what to do about it
    "all pixels ignored": "left out of training; remove the pair, or see ignore_values in the data YAML",
    "a single class": "usable; if there should be more, see class_values in the data YAML",
    "grey for three channels": "repeated to three channels; if all pictures are grey, set channels: 1 in the data YAML",
    "colour for one channel": "turned to grey; to train on the colours, set channels: 3 in the data YAML",
    "an orientation that the other of the pair lacks": "each is turned as its own tag says, so a mask drawn on the "
    "unturned picture lies elsewhere on it; turn the mask likewise, or remove the tag",
} | dataset_check.PICTURE_REMEDIES
REMEDIES_OF_OBJECTS = REMEDIES | objects_check.REMEDIES | {
    "no objects": "all of it is background, and trains as such; if that is not meant, annotate it",
    "crowd regions alone": "if each is one object (CVAT marks all masks so), data.crowd=keep",
}  # fmt: skip


@dataclass(frozen=True)
class Classes:
    """What the check found in one mask."""

    item: Item
    is_grey: bool | None  # the picture; None if it cannot be read
    class_pixels: np.ndarray  # int64 (num_classes,); zeros if there is a fault
    num_ignored: int  # pixels
    known: tuple[int, ...]  # listed values that the mask may have: those of its classes
    unknown: tuple[tuple[int, int], ...]  # (value without a class, pixels)
    is_color: bool  # the mask's values are colours
    object_names: tuple[str, ...] = ()  # of a picture with annotated objects: their classes, "" where one has none


def check_data(
    splits: dict[str, list[Item]], on_bad: str, run_dir: Path, list_all: bool
) -> tuple[dict[str, list[Item]], dict[str, int], CheckReport]:
    """Check a dataset, print what was found, draw its statistics, and leave out what cannot be used.

    Args:
        on_bad: "stop" or "skip", what to do about faulty files.
        run_dir: for dataset.png.
        list_all: print all findings, not some examples of each kind.
    Returns:
        the usable items of each split; the counts for run.json; the report.
    Raises:
        ValueError: for faulty files where on_bad is "stop".
    """
    report = dataset_check.check_items([item for items in splits.values() for item in items], check_item)
    print("\n".join(report_lines(report, None if list_all else MAX_LISTED)))
    plot_statistics(report, run_dir / "dataset.png")
    splits = {split: keep_usable(items, report, on_bad) for split, items in splits.items()}
    num_images = ", ".join(f"{split} {len(items)}" for split, items in splits.items())
    print(f"images: {num_images}; statistics in {run_dir / 'dataset.png'}")
    counts = report.counts | {"num_all_ignored": len(report.empty)}
    return splits, counts | {f"{split}_images": len(items) for split, items in splits.items()}, report


def check_item(item: Item) -> ItemReport:
    """Check one item."""
    num_classes = len(item.coding.class_names)
    faults, remarks, known, unknown = [], [], (), {}
    orig_hw = bits = is_grey = None
    is_color, class_pixels, num_ignored, object_names = False, np.zeros(num_classes, np.int64), 0, ()
    try:
        path = item.image_path
        image = read_image_unscaled(path, item.page)
        orig_hw, bits = image.shape[:2], 8 * image.itemsize
        is_grey = image.ndim == 2 or bool((image[..., 1:] == image[..., :1]).all())
        if is_grey and item.channels == 3:
            remarks.append(("grey for three channels", str(path)))
        if not is_grey and item.channels == 1:
            remarks.append(("colour for one channel", str(path)))
        if remark := remark_on_values(image):
            remarks.append((remark[0], f"{path}: {remark[1]}"))
    except (OSError, ValueError) as error:
        faults.append(str(error))
    try:
        if item.objects is None:
            class_map, values, is_color = readers.decode_mask(item)
        else:
            instances = item.objects.read()
            class_map = item.draw(instances)  # of values that are all classes
        pixels = np.bincount(class_map.ravel(), minlength=IGNORE_INDEX + 1)
        known = tuple(value for value, class_index in item.coding.classes if pixels[class_index])
        if orig_hw is not None:
            readers.check_same_size(item, orig_hw, class_map.shape)
        if pixels[readers.UNKNOWN]:
            fault, unknown = readers.describe_unknown(item, class_map, values, is_color)
            faults.append(fault)
    except (OSError, ValueError) as error:
        faults.append(str(error))
    if not faults:
        class_pixels, num_ignored = pixels[:num_classes], int(pixels[IGNORE_INDEX])
        present = np.flatnonzero(class_pixels)
        if not len(present):
            remarks.append(("all pixels ignored", str(item.mask_path)))
        orientations = read_orientation(item.image_path), read_orientation(item.mask_path)
        fits_either_way = orig_hw[0] == orig_hw[1] or (orientations[0] in LYING) == (orientations[1] in LYING)
        if orientations[0] != orientations[1] and fits_either_way:
            what = f"{item.image_path}: orientation {orientations[0]}, {item.mask_path}: {orientations[1]}"
            remarks.append(("an orientation that the other of the pair lacks", what))
        if item.objects is not None:
            object_names, remarks_on_objects = _describe_objects(item, instances, present.tolist())
            remarks += remarks_on_objects
        elif len(present) == 1:
            remarks.append(("a single class", f"{item.mask_path}: {item.coding.class_names[present[0]]}"))
    content = Classes(item, is_grey, class_pixels, num_ignored, known, tuple(unknown.items()), is_color, object_names)
    is_usable = bool(class_pixels.any())
    return ItemReport(item.name, tuple(faults), tuple(remarks), orig_hw, bits, is_usable, content)


def _describe_objects(item: Item, instances: Instances, present: list[int]) -> tuple[tuple[str, ...], list]:
    """Return the names of the classes of a picture's objects, and the remarks on these.

    Args:
        present: the classes that its map has.
    """
    objects = object_ids(instances.layers)
    said = objects_check.read_annotations(instances, objects)
    remarks = objects_check.remark_on_objects(item.objects, instances, objects)
    if said["is_crowd"].any() and present == [0]:  # they are ignored
        remarks.append(("crowd regions alone", f"{item.image_path} ({item.mask_path})"))
    return said["class_names"], remarks


def keep_usable(items: list[Item], report: CheckReport, on_bad: str) -> list[Item]:
    """Leave out items with faults and those whose pixels are all ignored, as `dataset_check.keep_usable`.

    Raises:
        ValueError: as that does, with lines for the data YAML.
    """
    return dataset_check.keep_usable(items, report, on_bad, suggestions(report))


def stop_at_one_class(report: CheckReport) -> None:
    """Raise a ValueError where the whole dataset has fewer than two classes, which nothing can be learned from."""
    if report.usable and len(present_classes(report)) < 2:
        raise ValueError("\n  ".join(suggestions(report)))


def count_class_pixels(report: CheckReport, items: list[Item]) -> np.ndarray:
    """Count the pixels of each class in some of the checked items, such as those of the training split.

    Returns:
        int64 (num_classes,); ignored pixels do not count.
    """
    names = {item.name for item in items}
    return sum(item.content.class_pixels for item in report.usable if item.name in names)


def remark_on_parts(report: CheckReport, train_items: list[Item], val_items: list[Item]) -> list[str]:
    """Say which classes of the dataset the training part lacks, and whether validation has a single class."""
    lines, names = [], _coding(report).class_names
    if train_items:
        train_pixels = count_class_pixels(report, train_items)
        if absent := [names[index] for index in present_classes(report) if not train_pixels[index]]:
            lines.append(
                f"no pixel of the training pictures is {', '.join(absent)}: that cannot be learned; divide the dataset "
                "otherwise (data.split_seed, or the lists and folders of its parts)"
            )
    if val_items:
        present = np.flatnonzero(count_class_pixels(report, val_items))
        if len(present) == 1:
            lines.append(
                f"the validation pictures are {names[present[0]]} alone: what answers nothing else is perfect on them, "
                "so best.pt says little; validate on others (data.split_seed, data.val_list), or on more of them"
            )
        elif absent := [names[index] for index in present_classes(report) if index not in present]:
            lines.append(f"no pixel of the validation pictures is {', '.join(absent)}: not measured there")
    return lines


def present_classes(report: CheckReport) -> list[int]:
    """List the classes that occur."""
    return np.flatnonzero(sum(item.content.class_pixels for item in report.usable)).tolist()


def suggestions(report: CheckReport) -> list[str]:
    """Propose YAML lines for the whole dataset: files without a partner, values and pixels without a class."""
    lines, coding, are_drawn = [], _coding(report), report.items[0].content.item.objects is not None
    if not are_drawn and (partners := readers.suggest_partners([item.content.item for item in report.items])):
        lines.append(f"to mend: {partners}")
    for is_color in (False, True):
        masks = [item.content for item in report.items if item.content.is_color == is_color]
        unknown = {value for mask in masks for value, _ in mask.unknown}
        if unknown:
            known = {value for mask in masks for value in mask.known}
            is_blurred = np.median([len(mask.unknown) for mask in masks if mask.unknown]) > readers.BLURRED
            lines.append(f"to mend: {suggest_coding(coding, known, unknown, is_color, is_blurred)}")
    present, names = present_classes(report), coding.class_names
    absent = [f"{index} ({names[index]})" for index in range(len(names)) if index not in present]
    codes = (
        "class_values and ignore_values in the data YAML (masks of 0 and 255: class_values: {0: 0, 255: 1}, "
        "ignore_values: [])"
    )
    if report.usable and len(present) < 2:
        num_ignored = sum(item.content.num_ignored for item in report.usable)
        num_pixels = num_ignored + sum(int(item.content.class_pixels.sum()) for item in report.usable)
        lines.append(
            f"only class {present[0]} ({names[present[0]]}) occurs in {len(report.usable)} masks, and "
            f"{num_ignored / num_pixels:.1%} of their pixels are ignored: nothing to learn; see "
            + ("data.classes, and data.crowd where all objects are marked as crowds" if are_drawn else codes)
        )
    elif report.usable and absent:
        remedy = "see class_values in the data YAML, or leave the class out of num_classes and class_names"
        remedy = "choose with data.classes" if are_drawn else remedy
        lines.append(f"classes without a pixel: {', '.join(absent)}; if that is not meant, {remedy}")
    return lines


def suggest_coding(coding: MaskCoding, known: set[int], unknown: set[int], is_color: bool, is_blurred: bool) -> str:
    """Propose the YAML lines that give every value a class.

    Args:
        known: values seen that have a class, or are ignored.
        unknown: values seen that have none.
        is_color: these are colours.
        is_blurred: most masks have more values than there are classes.
    Returns:
        words and YAML lines, for one message.
    """
    num_classes = len(coding.class_names)
    ignored = [value for value, class_index in coding.classes if class_index == IGNORE_INDEX]
    # the other kind of mask, or none of the values that are given: nothing of that holds
    is_new = is_color != coding.is_color or coding.is_given and not known
    is_grey = not np.ptp(readers.unpack_colors(np.array(sorted(unknown))), 1).any()
    if is_color and is_grey:  # where colours are expected
        is_color, is_new = False, True
        known, unknown = {value & 255 for value in known}, {value & 255 for value in unknown}
    if is_blurred:
        return (
            f"{len(unknown)} values are more than there are classes, so the mask has been compressed, smoothed or "
            "resized: export it again with nearest-neighbour resizing, or, with the true values in class_values, take "
            "each pixel as the nearest of them with nearest_value: true"
            + ("" if is_color else "; if each value is an object, data=instances data.format=label_map reads the mask")
        )
    if coding.is_given and not is_new:
        left_out = ", ".join(yaml_value(value, is_color) for value in [*ignored, *sorted(unknown)])
        return (
            "in the data YAML give each its class in class_values, or leave its pixels out with "
            f"ignore_values: [{left_out}]"
        )
    seen = sorted(known - set(ignored) | unknown)
    classes_seen = [value for value in seen if is_color or value != IGNORE_INDEX]
    # Far above the others, as in PASCAL VOC, 255 marks pixels to leave out; as one of several greys it is a class.
    gaps = np.diff(classes_seen)
    is_ignored = len(gaps) and len(seen) > len(classes_seen) and IGNORE_INDEX - classes_seen[-1] > 4 * np.median(gaps)
    if not is_color and not is_new:
        if unknown == {IGNORE_INDEX} and len(seen) > 2:
            return (
                "if 255 marks pixels to leave out, in the data YAML: "
                f"ignore_values: [{', '.join(map(str, [*ignored, IGNORE_INDEX]))}]"
            )
        if 0 in seen and num_classes < max(classes_seen) + 1 <= 2 * len(classes_seen):
            left_out = f", ignore_values: {[*ignored, IGNORE_INDEX]}" if IGNORE_INDEX in seen else ""
            return (
                f"in the data YAML: num_classes: {max(classes_seen) + 1}, with as many class_names (or null){left_out}"
                "; or give the surplus values a class in class_values"
            )
    classes = classes_seen if is_ignored else seen
    pairs = ", ".join(f"{yaml_value(value, is_color)}: {index}" for index, value in enumerate(classes))
    lines = f"class_values: {{{pairs}}}"
    if is_ignored:
        lines += f", ignore_values: {[*([] if is_new else ignored), IGNORE_INDEX]}"
    elif is_new and ignored:
        lines += ", ignore_values: []"
    if len(classes) != num_classes and len(classes) > 1:
        lines += f", num_classes: {len(classes)}, class_names: null"
    doubt = " (255 is taken to mark pixels to leave out; if it is a class, class_values has it)" if is_ignored else ""
    return f"in the data YAML, with your order of classes: {lines}{doubt}"


def report_lines(report: CheckReport, max_listed: int | None = MAX_LISTED) -> list[str]:
    """Put a report into lines to print.

    Args:
        max_listed: examples for each kind of finding; None: all.
    """
    greys = [item.content.is_grey for item in report.items if item.content.is_grey is not None]
    colors = f"; {sum(greys)} grey, {len(greys) - sum(greys)} colour"
    lines = dataset_check.summary_lines(report, "with all pixels ignored", colors)
    if report.usable:
        names, class_pixels, num_images = _measure_classes(report)
        num_ignored = sum(item.content.num_ignored for item in report.usable + report.empty)
        lines.append("classes (share of the pixels that count; images that have it):")
        lines += [
            f"  {index:3} {names[index]:<{max(map(len, names))}} {class_pixels[index] / class_pixels.sum():9.3%} "
            f"{num_images[index]:6}"
            for index in range(len(names))
        ]
        if num_ignored:
            lines.append(f"ignored: {num_ignored / (num_ignored + class_pixels.sum()):.3%} of the pixels")
    lines += objects_check.class_lines([item.content.object_names for item in report.usable], max_listed)
    remedies = REMEDIES if report.items[0].content.item.objects is None else REMEDIES_OF_OBJECTS
    return lines + dataset_check.finding_lines(report, remedies, max_listed, suggestions(report))


def plot_statistics(report: CheckReport, path: str | Path) -> None:
    """Draw the usable items' classes as one picture: share of the pixels, and images that have the class."""
    from matplotlib.figure import Figure  # slow to import, and needed here only

    figure = Figure(figsize=(12, 1.5 + 0.25 * len(_coding(report).class_names)), layout="constrained")
    share_axes, image_axes = figure.subplots(1, 2, sharey=True)
    figure.suptitle(f"{len(report.usable)} images")
    share_axes.set(title="share of the pixels", xlim=(0, 1))
    image_axes.set(title="images that have the class")
    share_axes.invert_yaxis()
    if report.usable:
        names, class_pixels, num_images = _measure_classes(report)
        share_axes.barh(range(len(names)), class_pixels / class_pixels.sum())
        image_axes.barh(range(len(names)), num_images)
        share_axes.set_yticks(range(len(names)), names, parse_math=False)
    figure.savefig(path, dpi=100)


def _coding(report: CheckReport) -> MaskCoding:
    """Return the mask coding, which all items share."""
    return report.items[0].content.item.coding


def _measure_classes(report: CheckReport) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Return of each class the name, its pixels (num_classes,), and the images that have it (num_classes,)."""
    pixels = np.stack([item.content.class_pixels for item in report.usable])  # (I, num_classes)
    return _coding(report).class_names, pixels.sum(0), (pixels > 0).sum(0)
