"""Check a dataset of pictures and annotations before training on it: what is the same for every kind of annotation.

A fault makes an item unusable: a missing or unreadable file, an annotation of another size or of the wrong form. A
remark does not: dark or blank pictures, empty masks. Each kind has a checker of its own, utils/instances/check.py and
utils/segmentation/check.py, whose `check_item` looks at one item and whose `check_data` does all that a script needs.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from utils.listing import first_few

PICTURE_REMEDIES = {  # kind of remark, as `images.remark_on_values` makes them -> what to do about it
    "unused intensity range": "dark to the model: stretch the values to the whole range of the file's type",
    "one value all over": "a blank picture; replace or remove it",
}


@dataclass(frozen=True)
class ItemReport:
    """What the check found in one item."""

    name: str
    faults: tuple[str, ...]  # each names the files and the remedy
    remarks: tuple[tuple[str, str], ...]  # (kind: a key of the remedies; what and where)
    orig_hw: tuple[int, int] | None  # the picture's; None if it cannot be read
    bits: int | None  # 8 or 16 a channel
    is_usable: bool  # there is no fault, and something to learn from
    content: object  # what the annotation holds, as the kind's check says


@dataclass(frozen=True)
class CheckReport:
    """What the check found in a dataset."""

    items: tuple[ItemReport, ...]

    @property
    def bad(self) -> list[ItemReport]:
        return [item for item in self.items if item.faults]

    @property
    def usable(self) -> list[ItemReport]:
        return [item for item in self.items if item.is_usable]

    @property
    def empty(self) -> list[ItemReport]:
        """Items without a fault, and without anything to learn from."""
        return [item for item in self.items if not item.faults and not item.is_usable]

    @property
    def counts(self) -> dict[str, int]:
        """Plain numbers for a run's record."""
        return {"num_checked": len(self.items), "num_usable": len(self.usable), "num_bad": len(self.bad)}


def check_items(items: list, check_item: Callable[[object], ItemReport], num_threads: int | None = None) -> CheckReport:
    """Read every picture and every annotation of a dataset once, as training would.

    Args:
        items: those of all splits together.
        check_item: the kind's check of one item.
        num_threads: files read at a time; None: one a core, at most 16.
    Returns:
        the report, in the order of the items. It raises nothing about files: see `keep_usable`.
    """
    with ThreadPoolExecutor(num_threads or min(16, os.cpu_count() or 1)) as executor:
        reports = executor.map(check_item, items)
        return CheckReport(tuple(tqdm(reports, "check", len(items), leave=False, mininterval=1, unit=" images")))


def keep_usable(items: list, report: CheckReport, on_bad: str, advice: list[str] = ()) -> list:
    """Leave out what cannot be trained on: items with faults, and those without anything to learn from.

    Args:
        items: all or some of the checked items.
        on_bad: "stop" raises if any of the dataset's items has a fault; "skip" leaves those out.
        advice: lines that end the error.
    Returns:
        the rest, in the same order.
    Raises:
        ValueError: naming the files and the remedies.
    """
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"data.on_bad is {on_bad!r}; must be stop or skip")
    if report.bad and on_bad == "stop":
        lines = [
            f"{len(report.bad)} of {len(report.items)} images cannot be used; repair them, "
            "or leave them out with data.on_bad=skip (check=true lists all):",
            *first_few([fault for item in report.bad for fault in item.faults]),
            *advice,
        ]
        raise ValueError("\n  ".join(lines))
    usable = {item.name for item in report.usable}
    return [item for item in items if item.name in usable]


def summary_lines(report: CheckReport, empty: str, colors: str = "") -> list[str]:
    """Put the numbers of items and the sizes of their pictures into one or two lines.

    Args:
        empty: what items are that hold nothing to learn from, such as "without objects".
        colors: the end of the line of sizes.
    """
    lines = [
        f"checked {len(report.items)} images: {len(report.usable)} usable, {len(report.bad)} bad, "
        f"{len(report.empty)} {empty}"
    ]
    readable = [item for item in report.items if item.orig_hw is not None]
    if readable:
        by_area = sorted((item.orig_hw for item in readable), key=lambda orig_hw: (orig_hw[0] * orig_hw[1], orig_hw))
        sizes = " to ".join(dict.fromkeys(f"{height} x {width}" for height, width in (by_area[0], by_area[-1])))
        bits = ", ".join(f"{sum(item.bits == bits for item in readable)} of {bits} bits" for bits in (8, 16))
        lines.append(f"pictures: {sizes} px (height x width); {bits}{colors}")
    return lines


def finding_lines(
    report: CheckReport, remedies: dict[str, str], max_listed: int | None, advice: list[str] = ()
) -> list[str]:
    """Put faults, advice about them, and remarks with their remedies into lines.

    Args:
        remedies: kind of remark -> what to do about it, in the order of the lines.
        max_listed: examples for each kind of finding; None: all.
    """
    lines = []
    if report.bad:
        faults = [fault for item in report.bad for fault in item.faults]
        lines += [f"{len(report.bad)} bad:", *(f"  {line}" for line in first_few(faults, max_listed))]
    lines += advice
    for kind, remedy in remedies.items():
        examples = [what for item in report.items for remark, what in item.remarks if remark == kind]
        if examples:
            lines.append(f"{len(examples)} with {kind}: {remedy}")
            lines += [f"  {line}" for line in first_few(examples, max_listed)]
    return lines
