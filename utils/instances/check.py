"""Check a dataset of pictures with instance masks before training on it, and describe it.

A fault makes an item unusable: a missing or unreadable file, an annotation of another size or of the wrong form. A
remark does not: dark or blank pictures, empty or tiny masks, no objects.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.images import read_image_unscaled, remark_on_values
from utils.instances.readers import Instances, Item, check_same_size, object_ids
from utils.listing import first_few

TINY_PX = 16  # an object of fewer pixels is remarked on
REMEDIES = {  # kind of remark -> what to do about it
    "no objects": "left out of training; remove the picture, or annotate it",
    "empty masks": "they are no objects and are passed over; remove them, or draw them",
    f"objects below {TINY_PX} px": "remove stray pixels; real objects this small need larger pictures",
    "a single id 255": "a mask, taken as one object; if it covers several, give each its own id (1, 2, 3, ...)",
    "unused intensity range": "dark to the model: stretch the values to the whole range of the file's type",
    "one value all over": "a blank picture; replace or remove it",
}
MAX_LISTED = 5  # examples printed for each kind


@dataclass(frozen=True)
class ItemReport:
    """What the check found in one item."""

    name: str
    faults: tuple[str, ...]  # each names the files and the remedy; none: usable
    remarks: tuple[tuple[str, str], ...]  # (a key of REMEDIES, what and where)
    orig_hw: tuple[int, int] | None  # of the picture; None if it cannot be read
    bits: int | None  # 8 or 16 a channel
    areas_px: np.ndarray  # int64 (N,), one an object
    centers_xy: np.ndarray  # float64 (N, 2), mean position of the object's pixels, as a share of width and height, 0..1
    num_crowd: int  # crowd regions left out


@dataclass(frozen=True)
class CheckReport:
    """What the check found in a dataset."""

    items: tuple[ItemReport, ...]

    @property
    def bad(self) -> list[ItemReport]:
        return [item for item in self.items if item.faults]

    @property
    def without_objects(self) -> list[ItemReport]:
        return [item for item in self.items if not item.faults and not len(item.areas_px)]

    @property
    def counts(self) -> dict[str, int]:
        """Plain numbers for a run's record."""
        usable = [item for item in self.items if not item.faults and len(item.areas_px)]
        return {
            "num_checked": len(self.items),
            "num_usable": len(usable),
            "num_bad": len(self.bad),
            "num_without_objects": len(self.without_objects),
            "num_objects": sum(len(item.areas_px) for item in usable),
            "num_crowd": sum(item.num_crowd for item in self.items),
        }


def check_items(items: list[Item], num_threads: int | None = None) -> CheckReport:
    """Read every picture and every annotation of a dataset once, as training would.

    Args:
        items: training and validation items together.
        num_threads: files read at a time; None: one a core, at most 16.
    Returns:
        the report, in the order of the items. It raises nothing about files: see `keep_usable`.
    """
    with ThreadPoolExecutor(num_threads or min(16, os.cpu_count() or 1)) as executor:
        reports = executor.map(check_item, items)
        return CheckReport(tuple(tqdm(reports, "check", len(items), leave=False, mininterval=1, unit=" images")))


def check_item(item: Item) -> ItemReport:
    """Check one item."""
    faults, remarks = [], []
    orig_hw = bits = instances = None
    areas_px, centers_xy = np.zeros(0, np.int64), np.zeros((0, 2))
    try:
        image_rgb = read_image_unscaled(item.image_path)
        orig_hw, bits = image_rgb.shape[:2], 8 * image_rgb.itemsize
        if remark := remark_on_values(image_rgb):
            remarks.append((remark[0], f"{item.image_path}: {remark[1]}"))
    except (OSError, ValueError) as error:
        faults.append(str(error))
    try:
        instances = item.read()
        if orig_hw is not None:
            check_same_size(item, orig_hw, instances.layers.shape[1:])
    except (OSError, ValueError) as error:
        faults.append(str(error))
    if instances is not None and not faults:
        objects = object_ids(instances.layers)
        areas_px = np.array([area for _, _, area in objects], np.int64)
        centers_xy = _centers(instances.layers)
        remarks += _remark_on_objects(item, instances, objects)
    num_crowd = instances.num_crowd if instances is not None else 0
    return ItemReport(item.name, tuple(faults), tuple(remarks), orig_hw, bits, areas_px, centers_xy, num_crowd)


def keep_usable(items: list[Item], report: CheckReport, on_bad: str) -> list[Item]:
    """Leave out what cannot be trained on: items with faults, and those without objects.

    Args:
        items: all or some of the checked items.
        on_bad: "stop" raises if any of the dataset's items has a fault; "skip" leaves those out.
    Returns:
        the rest, in the same order.
    Raises:
        ValueError: naming the files and the remedies.
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
                ]
            )
        )
    left_out = {item.name for item in report.bad + report.without_objects}
    return [item for item in items if item.name not in left_out]


def report_lines(report: CheckReport, max_listed: int | None = MAX_LISTED) -> list[str]:
    """Put a report into lines to print.

    Args:
        max_listed: examples for each kind of finding; None: all.
    """
    counts = report.counts
    lines = [
        f"checked {counts['num_checked']} images: {counts['num_usable']} usable, {counts['num_bad']} bad, "
        f"{counts['num_without_objects']} without objects"
    ]
    readable = [item for item in report.items if item.orig_hw is not None]
    if readable:
        by_area = sorted(item.orig_hw for item in readable)
        by_area = sorted(by_area, key=lambda orig_hw: orig_hw[0] * orig_hw[1])
        sizes = " to ".join(dict.fromkeys(f"{height} x {width}" for height, width in (by_area[0], by_area[-1])))
        bits = ", ".join(f"{sum(item.bits == bits for item in readable)} of {bits} bits" for bits in (8, 16))
        lines.append(f"pictures: {sizes} px (height x width); {bits}")
    statistics = mask_statistics(report)
    if statistics:
        lines += [
            "masks per image: {min} to {max}, mean {mean:.1f}, median {median:.0f}".format(
                **statistics["masks_per_image"]
            ),
            "mask area, share of the image: {p5:.3%} / {p50:.3%} / {p95:.3%} (5th, 50th, 95th percentile)".format(
                **statistics["area_share"]
            ),
            "object centres: mean ({mean_x:.2f}, {mean_y:.2f}), spread ({std_x:.2f}, {std_y:.2f}) of (width, height); "
            "{in_middle:.0%} in the middle ninth (11% if even)".format(**statistics["centers"]),
        ]
    if counts["num_crowd"]:
        lines.append(f"crowd regions left out: {counts['num_crowd']}")
    if report.bad:
        lines.append(f"{len(report.bad)} bad:")
        faults = [fault for item in report.bad for fault in item.faults]
        lines += [f"  {line}" for line in first_few(faults, max_listed)]
    for kind, remedy in REMEDIES.items():
        found = [what for item in report.items for remark, what in item.remarks if remark == kind]
        if found:
            lines.append(f"{len(found)} with {kind}: {remedy}")
            lines += [f"  {line}" for line in first_few(found, max_listed)]
    return lines


def mask_statistics(report: CheckReport) -> dict[str, dict[str, float]]:
    """Describe the usable items: masks per image, share of the image a mask covers, where the centres lie.

    Returns:
        masks_per_image {min, max, mean, median}, area_share {p5, p50, p95} in 0..1, centers {mean_x, mean_y, std_x,
        std_y, in_middle} in 0..1; empty if there are no objects.
    """
    usable = [item for item in report.items if not item.faults and len(item.areas_px)]
    if not usable:
        return {}
    per_image = np.array([len(item.areas_px) for item in usable])
    area_share = np.concatenate([item.areas_px / (item.orig_hw[0] * item.orig_hw[1]) for item in usable])
    centers = np.concatenate([item.centers_xy for item in usable])  # (N, 2)
    p5, p50, p95 = np.percentile(area_share, [5, 50, 95])
    return {
        "masks_per_image": {
            "min": int(per_image.min()),
            "max": int(per_image.max()),
            "mean": float(per_image.mean()),
            "median": float(np.median(per_image)),
        },
        "area_share": {"p5": float(p5), "p50": float(p50), "p95": float(p95)},
        "centers": {
            "mean_x": float(centers[:, 0].mean()),
            "mean_y": float(centers[:, 1].mean()),
            "std_x": float(centers[:, 0].std()),
            "std_y": float(centers[:, 1].std()),
            "in_middle": float((np.abs(centers - 0.5) < 1 / 6).all(1).mean()),
        },
    }


def plot_statistics(report: CheckReport, path: str | Path) -> None:
    """Draw the statistics of the usable items as one picture: masks per image, mask area, object centres."""
    from matplotlib.figure import Figure  # slow to import, and needed here only

    usable = [item for item in report.items if not item.faults and len(item.areas_px)]
    figure = Figure(figsize=(14, 4), layout="constrained")
    per_image_axes, area_axes, center_axes = figure.subplots(1, 3)
    figure.suptitle(f"{len(usable)} images, {report.counts['num_objects']} objects")
    per_image_axes.set(title="masks per image", xlabel="masks", ylabel="images")
    area_axes.set(title="mask area", xlabel="share of the image", ylabel="masks", xscale="log")
    center_axes.set(title="object centres", xlabel="x / width", ylabel="y / height", xlim=(0, 1), ylim=(1, 0))
    if usable:
        per_image = np.array([len(item.areas_px) for item in usable])
        area_share = np.concatenate([item.areas_px / (item.orig_hw[0] * item.orig_hw[1]) for item in usable])
        centers = np.concatenate([item.centers_xy for item in usable])
        per_image_axes.hist(per_image, bins=min(40, int(per_image.max() - per_image.min()) + 1))
        area_axes.hist(area_share, bins=np.geomspace(area_share.min() * 0.99, 1, 40))
        *_, colored = center_axes.hist2d(centers[:, 0], centers[:, 1], bins=24, range=[[0, 1], [0, 1]])
        figure.colorbar(colored, ax=center_axes, label="masks")
    figure.savefig(path, dpi=100)


def _remark_on_objects(item: Item, instances: Instances, objects: list[tuple[int, int, int]]) -> list[tuple[str, str]]:
    remarks = []
    ids = {object_id for _, object_id, _ in objects}
    if not objects:
        remarks.append(("no objects", str(item.annotation_path)))
    empty = [name for index, name in enumerate(instances.mask_names) if index + 1 not in ids]
    if empty:
        remarks.append(("empty masks", f"{item.annotation_path} ({item.name}): {', '.join(empty)}"))
    tiny = [f"{object_id} ({area_px} px)" for _, object_id, area_px in objects if area_px < TINY_PX]
    if tiny:
        remarks.append((f"objects below {TINY_PX} px", f"{item.annotation_path} ({item.name}): {', '.join(tiny)}"))
    if ids == {255} and not item.group:  # in a sequence (DAVIS 2016) it is the one object
        remarks.append(("a single id 255", str(item.annotation_path)))
    return remarks


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
        values = np.flatnonzero(areas[1:]) + 1
        sums_xy = np.stack([np.bincount(flat, xs), np.bincount(flat, ys)], 1)  # (largest id + 1, 2)
        centers.append(sums_xy[values] / areas[values, None])
    return np.concatenate(centers)
