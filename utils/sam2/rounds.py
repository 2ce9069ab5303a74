"""What each training on a folder of labels had, took and gave: a row of its rounds.csv, rounds.png, and its best.pt.

Columns of rounds.csv:
    round             from 1
    pictures          that trained
    person, assisted, automatic  their masks, by origin (utils/instances/label_folder.py)
    checked           of the automatic ones, those that a person left as they were in a finished picture
    made              masks that people made since the round before, in pictures that train or validate
    clicks_per_mask   of these: points, boxes and strokes of the brush, mean
    seconds_per_mask  of these, mean
    val_pictures      that validated
    iou_before, iou_after  val/iou_1_click of the weights that the training started with, and of best.pt
    checkpoint        model.checkpoint that the training started with
    run               its folder
"""

import csv
import io
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from utils.instances import label_folder
from utils.instances.label_folder import ORIGINS
from utils.log import drawing, write_text
from utils.settings import is_number


def count_rounds(labels_dir: Path) -> int:
    """Count the trainings that a folder of labels has seen."""
    return len(_read_rows(labels_dir))


def add_round(
    labels_dir: Path,
    train_paths: Iterable[Path],
    num_val: int,
    ious: tuple[float, float],
    checkpoint: str,
    run_dir: Path,
) -> None:
    """Add a row to rounds.csv, draw rounds.png, and keep the run's best.pt as the folder's.

    Args:
        train_paths: the records of the pictures that trained.
        num_val: pictures that validated.
        ious: val/iou_1_click before and after.
        checkpoint: `model.checkpoint` of the run.
    """
    rows = _read_rows(labels_dir)
    number = len(rows) + 1
    annotations = [each for path in train_paths for each in _read_annotations(path)]
    origins = Counter(str(each.get("origin")) for each in annotations)
    paths = label_folder.list_records(labels_dir).values()
    made = [each for path in paths for each in _read_annotations(path) if each.get("round") == number]
    spent = [[each[key] for key in ("clicks", "strokes") if is_number(each.get(key))] for each in made]
    clicks = [sum(counts) for counts in spent]
    seconds = [each["seconds"] for each in made if is_number(each.get("seconds"))]
    rows.append(
        {
            "round": number,
            "pictures": len(train_paths),
            **{origin: origins[origin] for origin in ORIGINS},
            "checked": sum(each.get("checked") is True for each in annotations),
            "made": len(made),
            "clicks_per_mask": f"{np.mean(clicks):.3f}" if clicks else "",
            "seconds_per_mask": f"{np.mean(seconds):.3f}" if seconds else "",
            "val_pictures": num_val,
            "iou_before": f"{ious[0]:.6f}",
            "iou_after": f"{ious[1]:.6f}",
            "checkpoint": checkpoint,
            "run": str(run_dir),
        }
    )
    partial = labels_dir / "best.pt.tmp"
    shutil.copyfile(run_dir / "best.pt", partial)
    partial.replace(labels_dir / "best.pt")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))  # columns of people, too
    writer.writeheader()
    writer.writerows(rows)
    write_text(labels_dir / "rounds.csv", text.getvalue())
    with drawing(labels_dir / "rounds.png"):
        plot_rounds(rows, labels_dir / "rounds.png")


def _read_annotations(path: Path) -> list[dict]:
    """Read a record's annotations; none of a file that is no record, which the dataset check has named."""
    try:
        return label_folder.skim_record(path).get("annotations", [])
    except (ValueError, OSError):
        return []


def _read_rows(labels_dir: Path) -> list[dict[str, str]]:
    path = labels_dir / "rounds.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def plot_rounds(rows: list[dict], path: Path) -> None:
    """Draw rounds.csv: IoU before and after each training, what a mask took, and who made the masks."""
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import MaxNLocator

    numbers = np.array([int(row["round"]) for row in rows])

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) if row[name] != "" else np.nan for row in rows])

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    iou_ax, work_ax, mask_ax = figure.subplots(1, 3)
    iou_ax.plot(numbers, column("iou_before"), "o--", color="0.5", label="before training")
    iou_ax.plot(numbers, column("iou_after"), "o-", label="after")
    iou_ax.set_title("mean IoU after one click, validation")
    work_ax.plot(numbers, column("clicks_per_mask"), "o-", label="clicks")
    if not np.isnan(column("seconds_per_mask")).all():
        work_ax.plot(numbers, column("seconds_per_mask"), "s-", label="seconds")
    work_ax.set_title("what a person's mask took, mean")
    work_ax.set_ylim(0, 1.1 * work_ax.get_ylim()[1])
    bottom = np.zeros(len(rows))
    for origin in ORIGINS:
        counts = column(origin)
        mask_ax.bar(numbers, counts, 0.6, bottom, label=origin)
        bottom += counts
    mask_ax.set_title("masks that trained, by who made them")
    for ax in (iou_ax, work_ax, mask_ax):
        ax.set_xlabel("round")
        ax.set_xlim(0.5, len(rows) + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
        ax.legend()
    partial = path.with_name(path.name + ".tmp")
    figure.savefig(partial, format="png", dpi=100)
    partial.replace(path)
