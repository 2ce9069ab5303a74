"""Check a dataset of pictures with class maps before training on it, and describe it.

A fault makes an item unusable: a missing or unreadable file, a mask of another size, a value without a class. Where
values lack a class, the report proposes the YAML lines that mend it. A remark does not: dark or blank pictures, grey
ones among colour, masks of a single class. A mask whose pixels are all ignored is left out and counted.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.images import IGNORE_INDEX, read_image_unscaled, remark_on_values
from utils.listing import first_few
from utils.segmentation.readers import (
    BLURRED,
    UNKNOWN,
    Item,
    MaskCoding,
    check_same_size,
    decode_mask,
    describe_unknown,
    read_page,
    unpack_colors,
    yaml_value,
)

REMEDIES = {  # kind of remark -> what to do about it
    "all pixels ignored": "left out of training; remove the pair, or see ignore_values in the data YAML",
    "a single class": "usable; if there should be more, see class_values in the data YAML",
    "grey for three channels": "repeated to three channels; if all pictures are grey, set channels: 1 in the data YAML",
    "colour for one channel": "turned to grey; to train on the colours, set channels: 3 in the data YAML",
    "unused intensity range": "dark to the model: stretch the values to the whole range of the file's type",
    "one value all over": "a blank picture; replace or remove it",
}
MAX_LISTED = 5  # examples printed for each kind


@dataclass(frozen=True)
class ItemReport:
    """What the check found in one item."""

    name: str
    faults: tuple[str, ...]  # each names the files; none: usable
    remarks: tuple[tuple[str, str], ...]  # (a key of REMEDIES, what and where)
    orig_hw: tuple[int, int] | None  # of the picture; None if it cannot be read
    bits: int | None  # 8 or 16 a channel
    is_grey: bool | None
    class_pixels: np.ndarray  # int64 (num_classes,); zeros if there is a fault
    num_ignored: int  # pixels
    known: tuple[int, ...]  # listed values that the mask may have: those of its classes
    unknown: tuple[tuple[int, int], ...]  # (value without a class, pixels)
    is_color: bool  # the mask's values are colours


@dataclass(frozen=True)
class CheckReport:
    """What the check found in a dataset."""

    items: tuple[ItemReport, ...]
    coding: MaskCoding | None  # None without items

    @property
    def bad(self) -> list[ItemReport]:
        return [item for item in self.items if item.faults]

    @property
    def all_ignored(self) -> list[ItemReport]:
        return [item for item in self.items if not item.faults and not item.class_pixels.any()]

    @property
    def usable(self) -> list[ItemReport]:
        return [item for item in self.items if not item.faults and item.class_pixels.any()]

    @property
    def counts(self) -> dict[str, int]:
        """Plain numbers for a run's record."""
        return {
            "num_checked": len(self.items),
            "num_usable": len(self.usable),
            "num_bad": len(self.bad),
            "num_all_ignored": len(self.all_ignored),
        }


def check_items(items: list[Item], num_threads: int | None = None) -> CheckReport:
    """Read every picture and every mask of a dataset once, as training would.

    Args:
        items: training, validation and test items together.
        num_threads: files read at a time; None: one a core, at most 16.
    Returns:
        the report, in the order of the items. It raises nothing about files: see `keep_usable`.
    """
    with ThreadPoolExecutor(num_threads or min(16, os.cpu_count() or 1)) as executor:
        reports = executor.map(check_item, items)
        reports = tuple(tqdm(reports, "check", len(items), leave=False, mininterval=1, unit=" images"))
    return CheckReport(reports, items[0].coding if items else None)


def check_item(item: Item) -> ItemReport:
    """Check one item."""
    num_classes = len(item.coding.class_names)
    faults, remarks, known, unknown = [], [], (), {}
    orig_hw = bits = is_grey = class_map = None
    is_color, class_pixels, num_ignored = False, np.zeros(num_classes, np.int64), 0
    try:
        image = read_image_unscaled(item.image_path) if item.page is None else read_page(item.image_path, item.page)
        orig_hw, bits = image.shape[:2], 8 * image.itemsize
        is_grey = image.ndim == 2 or bool((image[..., 1:] == image[..., :1]).all())
        remarks += _remark_on_picture(item, image, is_grey)
    except (OSError, ValueError) as error:
        faults.append(str(error))
    try:
        class_map, values, is_color = decode_mask(item)
        pixels = np.bincount(class_map.ravel(), minlength=IGNORE_INDEX + 1)
        known = tuple(value for value, class_index in item.coding.classes if pixels[class_index])
        if orig_hw is not None:
            check_same_size(item, orig_hw, class_map.shape)
        if pixels[UNKNOWN]:
            fault, unknown = describe_unknown(item, class_map, values, is_color)
            faults.append(fault)
    except (OSError, ValueError) as error:
        faults.append(str(error))
    if class_map is not None and not faults:
        class_pixels, num_ignored = pixels[:num_classes], int(pixels[IGNORE_INDEX])
        remarks += _remark_on_classes(item, class_pixels)
    return ItemReport(
        name=item.name,
        faults=tuple(faults),
        remarks=tuple(remarks),
        orig_hw=orig_hw,
        bits=bits,
        is_grey=is_grey,
        class_pixels=class_pixels,
        num_ignored=num_ignored,
        known=known,
        unknown=tuple(unknown.items()),
        is_color=is_color,
    )


def keep_usable(items: list[Item], report: CheckReport, on_bad: str) -> list[Item]:
    """Leave out what cannot be trained on: items with faults, and those whose pixels are all ignored.

    Args:
        items: all or some of the checked items.
        on_bad: "stop" raises if any of the dataset's items has a fault; "skip" leaves those out.
    Returns:
        the rest, in the same order.
    Raises:
        ValueError: naming the files and the remedies; also where the whole dataset has fewer than two classes, which
            nothing can be learned from.
    """
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"data.on_bad is {on_bad!r}; must be stop or skip")
    if report.bad and on_bad == "stop":
        raise ValueError(
            "\n  ".join(
                [
                    f"{len(report.bad)} of {len(report.items)} images cannot be used; repair them, "
                    "or leave them out with data.on_bad=skip (check=true lists all):",
                    *first_few([fault for item in report.bad for fault in item.faults], MAX_LISTED),
                    *suggestions(report),
                ]
            )
        )
    if report.usable and len(present_classes(report)) < 2:
        raise ValueError("\n  ".join(suggestions(report)))
    left_out = {item.name for item in report.bad + report.all_ignored}
    return [item for item in items if item.name not in left_out]


def class_frequencies(report: CheckReport, items: list[Item]) -> np.ndarray:
    """Return each class's share of the pixels of some of the checked items, such as those of the training split.

    Returns:
        float64 (num_classes,), sums to 1; ignored pixels do not count.
    """
    class_pixels = count_class_pixels(report, items)
    return class_pixels / class_pixels.sum()


def count_class_pixels(report: CheckReport, items: list[Item]) -> np.ndarray:
    """Count the pixels of each class in some of the checked items: int64 (num_classes,)."""
    names = {item.name for item in items}
    return sum(item.class_pixels for item in report.usable if item.name in names)


def present_classes(report: CheckReport) -> list[int]:
    """List the classes that occur."""
    return np.flatnonzero(sum(item.class_pixels for item in report.usable)).tolist() if report.usable else []


def suggestions(report: CheckReport) -> list[str]:
    """Propose YAML lines for the whole dataset: values without a class, classes without a pixel."""
    lines = []
    for is_color in (False, True):
        of_kind = [item for item in report.items if item.is_color == is_color]
        unknown = {value for item in of_kind for value, _ in item.unknown}
        if unknown:
            known = {value for item in of_kind for value in item.known}
            lines.append(f"to mend: {suggest_coding(report.coding, known, unknown, is_color)}")
    present, names = present_classes(report), report.coding.class_names if report.coding else ()
    absent = [f"{index} ({names[index]})" for index in range(len(names)) if index not in present]
    if report.usable and len(present) < 2:
        num_ignored = sum(item.num_ignored for item in report.usable)
        num_pixels = num_ignored + sum(int(item.class_pixels.sum()) for item in report.usable)
        lines.append(
            f"only class {present[0]} ({names[present[0]]}) occurs in {len(report.usable)} masks, and "
            f"{num_ignored / num_pixels:.1%} of their pixels are ignored: nothing to learn; see class_values and "
            f"ignore_values in the data YAML (masks of 0 and 255: class_values: {{0: 0, 255: 1}}, ignore_values: [])"
        )
    elif report.usable and absent:
        lines.append(
            f"classes without a pixel: {', '.join(absent)}; if that is not meant, see class_values in the data YAML, "
            "or leave the class out of num_classes and class_names"
        )
    return lines


def suggest_coding(coding: MaskCoding, known: set[int], unknown: set[int], is_color: bool) -> str:
    """Propose the YAML lines that give every value a class.

    Args:
        known: values seen that have a class, or are ignored.
        unknown: values seen that have none.
        is_color: these are colours.
    Returns:
        words and YAML lines, for one message.
    """
    num_classes = len(coding.class_names)
    ignored = [value for value, class_index in coding.classes if class_index == IGNORE_INDEX]
    is_new = is_color != coding.is_color  # the other kind of mask: nothing of what is given holds
    if (
        is_color and (np.ptp(unpack_colors(np.array(sorted(unknown))), 1) == 0).all()
    ):  # grey, where colours are expected
        is_color, is_new = False, True
        known, unknown = {value & 255 for value in known}, {value & 255 for value in unknown}
    if len(unknown) > BLURRED:
        return (
            f"{len(unknown)} values are more than there are classes, so the mask has been compressed, smoothed or "
            "resized: export it again with nearest-neighbour resizing, or, with the true values in class_values, take "
            "each pixel as the nearest of them with nearest_value: true"
        )
    if coding.is_given and not is_new:
        left_out = ", ".join(yaml_value(value, is_color) for value in [*ignored, *sorted(unknown)])
        return (
            "in the data YAML give each its class in class_values, or leave its pixels out with "
            f"ignore_values: [{left_out}]"
        )
    seen = sorted(known - set(ignored) | unknown)
    if not is_color and not is_new:
        if unknown == {IGNORE_INDEX} and len(seen) > 2:
            return (
                "if 255 marks pixels to leave out, in the data YAML: "
                f"ignore_values: [{', '.join(map(str, [*ignored, IGNORE_INDEX]))}]"
            )
        classes_seen = [value for value in seen if value != IGNORE_INDEX]
        if 0 in seen and num_classes < max(classes_seen) + 1 <= 2 * len(classes_seen):
            left_out = f", ignore_values: {[*ignored, IGNORE_INDEX]}" if IGNORE_INDEX in seen else ""
            return (
                f"in the data YAML: num_classes: {max(classes_seen) + 1}, with as many class_names (or null){left_out}"
                "; or give the surplus values a class in class_values"
            )
    pairs = ", ".join(f"{yaml_value(value, is_color)}: {index}" for index, value in enumerate(seen))
    lines = f"class_values: {{{pairs}}}"
    if is_new and ignored:
        lines += ", ignore_values: []"
    if len(seen) != num_classes and len(seen) > 1:
        lines += f", num_classes: {len(seen)}, class_names: null"
    return f"in the data YAML, with your order of classes: {lines}"


def report_lines(report: CheckReport, max_listed: int | None = MAX_LISTED) -> list[str]:
    """Put a report into lines to print.

    Args:
        max_listed: examples for each kind of finding; None: all.
    """
    counts = report.counts
    lines = [
        f"checked {counts['num_checked']} images: {counts['num_usable']} usable, {counts['num_bad']} bad, "
        f"{counts['num_all_ignored']} with all pixels ignored"
    ]
    readable = [item for item in report.items if item.orig_hw is not None]
    if readable:
        by_area = sorted((item.orig_hw for item in readable), key=lambda orig_hw: (orig_hw[0] * orig_hw[1], orig_hw))
        sizes = " to ".join(dict.fromkeys(f"{height} x {width}" for height, width in (by_area[0], by_area[-1])))
        bits = ", ".join(f"{sum(item.bits == bits for item in readable)} of {bits} bits" for bits in (8, 16))
        num_grey = sum(item.is_grey for item in readable)
        lines.append(
            f"pictures: {sizes} px (height x width); {bits}; {num_grey} grey, {len(readable) - num_grey} colour"
        )
    if report.usable:
        names = report.coding.class_names
        class_pixels = sum(item.class_pixels for item in report.usable)  # (num_classes,)
        num_images = sum((item.class_pixels > 0).astype(int) for item in report.usable)
        num_ignored = sum(item.num_ignored for item in report.usable + report.all_ignored)
        lines.append("classes (share of the pixels that count; images that have it):")
        lines += [
            f"  {index:3} {names[index]:<{max(map(len, names))}} {class_pixels[index] / class_pixels.sum():9.3%} "
            f"{num_images[index]:6}"
            for index in range(len(names))
        ]
        if num_ignored:
            lines.append(f"ignored: {num_ignored / (num_ignored + class_pixels.sum()):.3%} of the pixels")
    if report.bad:
        lines.append(f"{len(report.bad)} bad:")
        faults = [fault for item in report.bad for fault in item.faults]
        lines += [f"  {line}" for line in first_few(faults, max_listed)]
    lines += suggestions(report)
    for kind, remedy in REMEDIES.items():
        found = [what for item in report.items for remark, what in item.remarks if remark == kind]
        if found:
            lines.append(f"{len(found)} with {kind}: {remedy}")
            lines += [f"  {line}" for line in first_few(found, max_listed)]
    return lines


def plot_statistics(report: CheckReport, path: str | Path) -> None:
    """Draw the usable items' classes as one picture: share of the pixels, and images that have the class."""
    from matplotlib.figure import Figure  # slow to import, and needed here only

    names = report.coding.class_names if report.coding else ()
    figure = Figure(figsize=(12, 1.5 + 0.25 * len(names)), layout="constrained")
    share_axes, image_axes = figure.subplots(1, 2, sharey=True)
    figure.suptitle(f"{len(report.usable)} images")
    share_axes.set(title="share of the pixels", xlim=(0, 1))
    image_axes.set(title="images that have the class")
    share_axes.invert_yaxis()
    if report.usable:
        class_pixels = sum(item.class_pixels for item in report.usable)
        share_axes.barh(names, class_pixels / class_pixels.sum())
        image_axes.barh(names, sum((item.class_pixels > 0).astype(int) for item in report.usable))
    figure.savefig(path, dpi=100)


def _remark_on_picture(item: Item, image: np.ndarray, is_grey: bool) -> list[tuple[str, str]]:
    remarks = []
    if is_grey and item.channels == 3:
        remarks.append(("grey for three channels", str(item.image_path)))
    if not is_grey and item.channels == 1:
        remarks.append(("colour for one channel", str(item.image_path)))
    if remark := remark_on_values(image):
        remarks.append((remark[0], f"{item.image_path}: {remark[1]}"))
    return remarks


def _remark_on_classes(item: Item, class_pixels: np.ndarray) -> list[tuple[str, str]]:
    present = np.flatnonzero(class_pixels)
    if len(present) > 1:
        return []
    if not len(present):
        return [("all pixels ignored", str(item.mask_path))]
    return [("a single class", f"{item.mask_path}: {item.coding.class_names[present[0]]}")]
