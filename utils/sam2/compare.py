"""Lay runs of mode=benchmark, or dataset.json files, side by side: `infer_sam2.py mode=compare 'results=[a,b]'`.

Each further run is compared with the first: the difference of each number and its 95 % interval, from 1,000 seeded
resamples of the pictures, on each of which all numbers are computed anew, AP and AR too. Two runs on the same pictures
are resampled together (paired); runs on different ones each by itself. With fewer than 10 there is no interval.
"""

import csv
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.listing import existing_file, read_json
from utils.log import drawing
from utils.sam2.benchmark import load_records
from utils.sam2.protocols import Record, Table, interval, summarize
from utils.settings import is_number

CURVES = {  # what is drawn of a dataset.json: its axis, and the axis's scale
    "masks_per_picture": ("masks a picture", "linear"),
    "relative_sizes": ("root of the share of the picture", "log"),
    "concavities": ("1 - area / area of the convex hull", "linear"),
    "center_distances": ("distance of centres from the middle, share of half the diagonal", "linear"),
}


class Run(NamedTuple):
    """A finished run of mode=benchmark."""

    folder: Path
    records: dict[str, list[Record]]  # of "data" and "edges"
    pictures: dict[str, list]  # their names, and digests of their objects


def read_run(folder: Path) -> Run:
    """Read the records of a run.

    Raises:
        FileNotFoundError, ValueError: for a folder that is not that of a finished run of mode=benchmark.
    """
    if not (folder / "table.csv").is_file():
        raise FileNotFoundError(f"results: {folder} has no table.csv; must be the folder of a finished mode=benchmark")
    records, pictures = {}, {}
    for kind in ("data", "edges"):
        records[kind] = load_records(folder, kind)
        content = read_json(folder / f"{kind}.json") if records[kind] else {}
        pictures[kind] = [content[key] for key in ("pictures", "digests") if key in content]
    return Run(folder, records, pictures)


def compare_runs(results: list[str], seed: int, run_dir: Path) -> None:
    """Compare runs with the first, print the numbers, and write compare.csv; of dataset.json files compare.png, too.

    Args:
        results: folders of runs, or dataset.json files that train_sam2.py check=true wrote; two or more.
    """
    paths = [Path(path) for path in results]
    if all(path.suffix == ".json" for path in paths):
        compare_datasets(paths, run_dir)
        return
    first, *others = [read_run(path) for path in paths]
    rows = []
    for other in others:
        for kind in ("data", "edges"):
            if first.records[kind] and other.records[kind]:
                is_paired = first.pictures[kind] == other.pictures[kind]
                rows += [
                    [str(other.folder), *row, "paired" if is_paired else "unpaired"]
                    for row in compare_records(first.records[kind], other.records[kind], is_paired, seed)
                ]
    if not rows:
        raise ValueError(f"results: {', '.join(results)} have no protocol in common")
    with (run_dir / "compare.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["run", "protocol", "group", "metric", "first", "other", "difference", "low", "high", "pictures"]
        )
        writer.writerows([[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows])
    for _, protocol, group, metric, before, after, difference, low, high, _ in rows:
        reach = f" ({low:+.3f} to {high:+.3f})" if low != "" else ""
        print(f"{protocol}, {group}, {metric}: {before:.3f} -> {after:.3f}, {difference:+.3f}{reach}")


def compare_records(first: list[Record], other: list[Record], is_paired: bool, seed: int) -> list[list]:
    """Compare what was measured of pictures: protocol, group, metric, both values, the difference, its interval's ends.

    Args:
        is_paired: record i of both is of the same picture.
    """
    both = summarize(first), summarize(other)
    num_pictures = [len(first)] if is_paired else [len(first), len(other)]
    intervals = interval(functools.partial(subtract, first, other), num_pictures, seed)
    rows = []
    for key in [key for key in both[0] if key in both[1] and not key[2].startswith(("num_", "largest_gap"))]:
        before, after = float(both[0][key]), float(both[1][key])
        rows.append([*key, before, after, after - before, *(intervals[key] if key in intervals else ("", ""))])
    return rows


def subtract(first: list[Record], other: list[Record], *places: np.ndarray) -> Table:
    """Compute the differences of all numbers on a choice of pictures: of both, or of each its own."""
    before, after = (
        summarize([records[place] for place in own])
        for records, own in zip((first, other), (places[0], places[-1]), strict=True)
    )
    return {key: after[key] - before[key] for key in before if key in after}


def compare_datasets(paths: list[Path], run_dir: Path) -> None:
    """Lay statistics of datasets over each other: compare.csv and compare.png."""
    datasets = [read_json(existing_file(path, "results")) for path in paths]
    for path, dataset in zip(paths, datasets, strict=True):
        if not isinstance(dataset, dict) or not {*CURVES, "attributes"} <= set(dataset):
            raise ValueError(
                f"results: {path} is no dataset.json of train_sam2.py check=true: it lacks {', '.join(CURVES)}"
            )
    names = [f"{path.parent.name}/{path.name}" for path in paths]
    numbers = list(dict.fromkeys(key for dataset in datasets for key, value in dataset.items() if is_number(value)))
    with (run_dir / "compare.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", *names])
        for key in numbers:
            cells = [f"{dataset[key]:.6g}" if key in dataset else "" for dataset in datasets]
            writer.writerow([key, *cells])
            print(f"{key}: {', '.join(cells)}")
        counts = [count_values(dataset) for dataset in datasets]
        for key in dict.fromkeys(key for own in counts for key in own):
            cells = [str(own[key]) if key in own else "" for own in counts]
            writer.writerow([key, *cells])
            print(f"{key}: {', '.join(cells)}")
    with drawing(run_dir / "compare.png"):
        from matplotlib.figure import Figure  # slow to import

        figure = Figure(figsize=(5 * len(CURVES), 4), layout="constrained")
        for axes, (key, (label, scale)) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
            for name, dataset in zip(names, datasets, strict=True):
                values = np.sort(np.array(dataset[key], float).reshape(-1))
                axes.plot(values, np.arange(1, len(values) + 1) / max(len(values), 1), label=name.replace("$", r"\$"))
            axes.set(xlabel=label, xscale=scale, ylabel="share with less or as much", ylim=(0, 1))
            axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(run_dir / "compare.png", dpi=110)


def count_values(dataset: dict) -> dict[str, int]:
    """Lay out a dataset.json's attributes: {"country=France, pictures": 12, ...}."""
    return {
        f"{attribute}={value}, {kind}": count
        for attribute, values in dataset["attributes"].items()
        for value, counts in values.items()
        for kind, count in counts.items()
    }
