"""Labels of a folder of pictures, made by a model, corrected by people and trained on: mode=label and mode=audit.

A folder of labels is a dataset that train_sam2.py reads as data=sa1b (masks/) or data=label_map (maps/):
    masks/<name>.json   the record, in SA-1B's layout; each annotation has its "origin": automatic, assisted or person
    maps/<name>.png     drawn from it, 16 bit: later objects of the record lie on top
    val.txt             pictures that validate, drawn once; their masks are a person's, never automatic

Source: Kirillov et al. 2023 (Segment Anything), section 4 (the data engine) and section 5 (mask quality).
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from utils import images, listing
from utils.instances.codecs import rle_to_mask
from utils.log import write_json
from utils.run import read_ahead
from utils.sam2.mask_generation import GeneratedMasks, score_mask, stitch_masks
from utils.settings import between

AUTOMATIC = "automatic"  # the origin of masks that the next round makes anew; those of people stay
AUDITED_IOUS = (0.9, 0.75)


@dataclass(frozen=True)
class LabelSettings:
    """How a folder is labelled (`label:`)."""

    val_fraction: Annotated[float, between(0, 1)]  # of the pictures of the first round: for a person


def label_pictures(
    generate: Callable[[np.ndarray], GeneratedMasks],
    pictures: list[images.Picture],
    labels_dir: Path,
    made_by: str,
    max_overlap: float,
    settings: LabelSettings,
    seed: int,
) -> tuple[dict[str, int], list[str]]:
    """Label pictures, but for those that validate and those that the same model has labelled before.

    Args:
        generate: the automatic masks of a picture, uint8 (H, W, 3).
        labels_dir: a new folder, or that of an earlier round.
        made_by: tells model, settings and code apart; a picture that has it in its record is done.
        max_overlap: a mask of which a larger share is taken by better ones, or by people's, is left out.
    Returns:
        {"labelled": pictures, "done_before": ..., "validating": ..., "masks": automatic ones, "kept": those of people};
        and a line for each picture that cannot be read.
    Raises:
        ValueError: for a record that is none, before it would be overwritten.
    """
    if labels_dir.is_file():
        raise ValueError(f"labels is {labels_dir}, a file; give a folder, new or of an earlier round")
    for folder in ("masks", "maps"):
        (labels_dir / folder).mkdir(parents=True, exist_ok=True)
    val_names = draw_validation(labels_dir / "val.txt", {picture.name for picture in pictures}, settings, seed)
    counts = {"labelled": 0, "done_before": 0, "validating": 0, "masks": 0, "kept": 0}
    failures, waiting = [], []
    for picture in pictures:
        if picture.page is not None:
            failures.append(f"{picture}: a dataset has no pages; save them as files of their own")
        elif picture.name in val_names:
            counts["validating"] += 1
        elif read_record(labels_dir / "masks" / f"{picture.name}.json").get("made_by") == made_by:
            counts["done_before"] += 1
        else:
            waiting.append(picture)
    readings = read_ahead(lambda picture: images.read_image(picture.path, picture.page), waiting)
    for picture, reading in zip(tqdm(waiting, desc="label", unit="image", disable=None), readings, strict=True):
        try:
            image_rgb = reading.result()
        except (ValueError, OSError) as error:
            failures.append(f"{picture}: {error}")
            continue
        orig_hw = image_rgb.shape[:2]
        record = read_record(labels_dir / "masks" / f"{picture.name}.json")
        kept = [each for each in record.get("annotations", []) if each.get("origin") != AUTOMATIC]
        if kept and (record["image"]["height"], record["image"]["width"]) != orig_hw:
            sizes = [record["image"]["height"], record["image"]["width"]], list(orig_hw)
            failures.append(f"{picture}: people's masks are of {sizes[0]} px (height, width), it is {sizes[1]} now")
            continue
        generated = [each | {"origin": AUTOMATIC} for each in generate(image_rgb).annotations]
        annotations = join_masks(generated, kept, orig_hw, max_overlap)
        write_labels(labels_dir, picture, orig_hw, annotations, made_by)
        counts["labelled"] += 1
        counts["kept"] += len(kept)
        counts["masks"] += len(annotations) - len(kept)
    return counts, failures


def draw_validation(path: Path, names: set[str], settings: LabelSettings, seed: int) -> set[str]:
    """Read which pictures validate, or draw them: once, so that pictures that come later train."""
    if path.exists():
        return set(listing.read_lines(path))
    val_names, _ = listing.draw_split(names, settings.val_fraction, seed)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(f"{name}\n" for name in sorted(val_names)), encoding="utf-8")
    partial.replace(path)
    return val_names


def read_record(path: Path) -> dict:
    """Read the record of a picture; {} where there is none yet.

    Raises:
        ValueError: for a file that is no record of masks: it may be somebody's work, and is not overwritten.
    """
    if not path.exists():
        return {}
    record = listing.read_json(path)
    try:
        size = [record["image"]["height"], record["image"]["width"]]
        for annotation in record["annotations"]:
            if annotation["segmentation"]["size"] != size:
                raise ValueError(f"a mask of {annotation['segmentation']['size']} px in a picture of {size}")
            rle_to_mask(annotation["segmentation"])
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no record of masks, run lengths in SA-1B's layout; move it away ({error})"
        ) from error
    return record


def join_masks(generated: list[dict], kept: list[dict], orig_hw: tuple[int, int], max_overlap: float) -> list[dict]:
    """Join automatic masks with those that people made: the order of a record, the lowest first.

    Masks of people lie on top, as they were; automatic ones below, the best uppermost, less those that overlap.
    """
    scores = [*np.arange(len(kept), 0, -1) * 1e6, *map(score_mask, generated)]  # all of people's before
    segmentations = [annotation["segmentation"] for annotation in [*kept, *generated]]
    _, ids = stitch_masks(segmentations, scores, orig_hw, max_overlap)
    is_free = ids[len(kept) :] > 0
    best_last = sorted((each for each, free in zip(generated, is_free, strict=True) if free), key=score_mask)
    return [*best_last, *kept]


def write_labels(
    labels_dir: Path, picture: images.Picture, orig_hw: tuple[int, int], annotations: list[dict], made_by: str
) -> None:
    """Write a picture's map and, last, its record: what a kill leaves between them is made again."""
    numbered = [annotation | {"id": number} for number, annotation in enumerate(annotations, 1)]
    label_map = np.zeros(orig_hw, np.int32)
    for annotation in numbered:
        label_map[rle_to_mask(annotation["segmentation"])] = annotation["id"]
    images.write_label_map(labels_dir / "maps" / f"{picture.name}.png", label_map)
    image = {"file_name": picture.path.name, "height": orig_hw[0], "width": orig_hw[1]}
    record = {"image": image, "made_by": made_by, "annotations": numbered}
    write_json(labels_dir / "masks" / f"{picture.name}.json", record)


# ---------------------------------------------------------------------------------------------------------------------
# how good masks were, by what people changed


def audit_labels(before_dir: Path, after_dir: Path, path: Path) -> dict[str, float]:
    """Compare two sets of masks of the same pictures, such as automatic ones and what a person made of them.

    Masks of a picture are paired so that their IoUs add up to the most; a pair shares a pixel at least.

    Args:
        before_dir, after_dir: folders of labels, or of the json files of infer_sam2.py.
        path: the csv to write, a row for each mask: picture, before, after (ids), iou.
    Returns:
        {"pictures", "pairs", "removed", "added", "mean_iou", "above_90", "above_75": shares of the pairs}.
    Raises:
        ValueError: where no picture is in both.
    """
    before, after = (list_records(folder) for folder in (before_dir, after_dir))
    names = sorted(before.keys() & after.keys())
    if not names:
        raise ValueError(f"{before_dir} and {after_dir} have no json file of the same name; give two folders of labels")
    rows = []
    for name in tqdm(names, desc="audit", unit="image", disable=None):
        records = [read_record(path) for path in (before[name], after[name])]
        sizes = [(record["image"]["height"], record["image"]["width"]) for record in records]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{before[name]} is of a picture of {sizes[0]} px (height, width), {after[name]} of {sizes[1]}"
            )
        rows += [(name, *row) for row in pair_masks(*records)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "before", "after", "iou"])
        writer.writerows((name, old, new, "" if iou is None else f"{iou:.6f}") for name, old, new, iou in rows)
    ious = np.array([iou for *_, iou in rows if iou is not None])
    shares = {f"above_{100 * limit:.0f}": float((ious > limit).mean()) if len(ious) else 0.0 for limit in AUDITED_IOUS}
    return {
        "pictures": len(names),
        "pairs": len(ious),
        "removed": sum(new == "" for _, _, new, _ in rows),
        "added": sum(old == "" for _, old, _, _ in rows),
        "mean_iou": float(ious.mean()) if len(ious) else 0.0,
        **shares,
    }


def list_records(folder: Path) -> dict[str, Path]:
    """Find the records in a folder of labels, or of json files: {picture's name: file}."""
    place = folder / "masks" if (folder / "masks").is_dir() else folder
    if not place.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of labels")
    files = listing.files_by_name(place, suffixes=(".json",))
    return {name: path for name, path in files.items() if name != "run"}


def pair_masks(before: dict, after: dict) -> list[tuple[int | str, int | str, float | None]]:
    """Pair the masks of two records of a picture: (id before, id after, IoU), "" and None for one without a partner."""
    records = before, after
    ids = [[each.get("id", number) for number, each in enumerate(record["annotations"], 1)] for record in records]
    masks = [
        np.array([rle_to_mask(each["segmentation"]).ravel() for each in record["annotations"]]).reshape(
            len(record["annotations"]), -1
        )
        for record in records
    ]
    overlaps = np.array([[np.count_nonzero(old & new) for new in masks[1]] for old in masks[0]], np.float64)
    overlaps = overlaps.reshape(len(ids[0]), len(ids[1]))
    areas = [of_record.sum(1).astype(np.float64) for of_record in masks]
    ious = overlaps / np.maximum(areas[0][:, None] + areas[1] - overlaps, 1)
    pairs = [(i, j) for i, j in zip(*linear_sum_assignment(-ious), strict=True) if ious[i, j] > 0]
    old_left = set(range(len(ids[0]))) - {i for i, _ in pairs}
    new_left = set(range(len(ids[1]))) - {j for _, j in pairs}
    return [
        *((ids[0][i], ids[1][j], float(ious[i, j])) for i, j in pairs),
        *((ids[0][i], "", None) for i in sorted(old_left)),
        *(("", ids[1][j], None) for j in sorted(new_left)),
    ]
