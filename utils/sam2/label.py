"""mode=label, automatic masks of a folder of pictures as labels, and mode=audit, how good masks were.

What a folder of labels is: utils/instances/label_folder.py.

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

from utils import images
from utils.instances import label_folder
from utils.instances.codecs import rle_to_part
from utils.instances.label_folder import AUTOMATIC
from utils.run import read_ahead
from utils.sam2.mask_generation import GeneratedMasks, score_mask, stitch_masks
from utils.settings import between

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
    """Label pictures, but for those that validate, that a person has finished, and that this model has labelled before.

    Args:
        generate: the automatic masks of a picture, uint8 (H, W, 3).
        labels_dir: a folder of labels, opened for writing.
        made_by: tells model, settings and code apart; a picture that has it in its record is done.
        max_overlap: a mask of which a larger share is taken by better ones, or by people's, is left out.
    Returns:
        {"labelled": pictures, "done_before": ..., "finished": by a person, "validating": ..., "masks": automatic ones,
        "kept": those of people}; and a line for each picture that cannot be read.
    Raises:
        ValueError: for a record that is none, before it would be overwritten; as `label_folder.check_names`.
    """
    label_folder.check_names(labels_dir, pictures)
    val_names = label_folder.draw_validation(labels_dir, {each.name for each in pictures}, settings.val_fraction, seed)
    finished = label_folder.read_done(labels_dir)
    counts = {"labelled": 0, "done_before": 0, "finished": 0, "validating": 0, "masks": 0, "kept": 0}
    failures, waiting = [], []
    for picture in pictures:
        if picture.page is not None:
            failures.append(f"{picture}: a dataset has no pages; save them as files of their own")
        elif picture.name in val_names:
            counts["validating"] += 1
        elif picture.name in finished:
            counts["finished"] += 1
        elif is_labelled(label_folder.record_path(labels_dir, picture.name), picture, made_by):
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
        record = label_folder.read_record(label_folder.record_path(labels_dir, picture.name))
        kept = [each for each in record.get("annotations", []) if each.get("origin") != AUTOMATIC]
        if kept and (record["image"]["height"], record["image"]["width"]) != orig_hw:
            sizes = [record["image"]["height"], record["image"]["width"]], list(orig_hw)
            failures.append(f"{picture}: people's masks are of {sizes[0]} px (height, width), it is {sizes[1]} now")
            continue
        generated = [each | {"origin": AUTOMATIC} for each in generate(image_rgb).annotations]
        annotations = join_masks(generated, kept, orig_hw, max_overlap)
        written = record | {"made_by": made_by, "annotations": annotations}
        label_folder.write_labels(labels_dir, picture, orig_hw, written)
        counts["labelled"] += 1
        counts["kept"] += len(kept)
        counts["masks"] += len(annotations) - len(kept)
    return counts, failures


def is_labelled(path: Path, picture: images.Picture, made_by: str) -> bool:
    """Tell whether a record has this model's masks of a picture as it is: a file of another size has come anew."""
    record = label_folder.read_record(path)
    if record.get("made_by") != made_by:
        return False
    frame_wh = images.read_frame_wh(picture.path)
    return frame_wh is None or frame_wh == (record["image"]["width"], record["image"]["height"])


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
    before, after = (label_folder.list_records(folder) for folder in (before_dir, after_dir))
    names = sorted(before.keys() & after.keys())
    if not names:
        raise ValueError(f"{before_dir} and {after_dir} have no json file of the same name; give two folders of labels")
    rows = []
    for name in tqdm(names, desc="audit", unit="image", disable=None):
        records = [label_folder.read_record(path) for path in (before[name], after[name])]
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


def pair_masks(before: dict, after: dict) -> list[tuple[int | str, int | str, float | None]]:
    """Pair the masks of two records of a picture: (id before, id after, IoU), "" and None for one without a partner."""
    records = before, after
    ids = [[each.get("id", number) for number, each in enumerate(record["annotations"], 1)] for record in records]
    parts = [[rle_to_part(each["segmentation"]) for each in record["annotations"]] for record in records]
    overlaps = np.array([[_count_common(old, new) for new in parts[1]] for old in parts[0]], np.float64)
    overlaps = overlaps.reshape(len(ids[0]), len(ids[1]))
    areas = [np.array([np.count_nonzero(part) for part, _ in of_record], np.float64) for of_record in parts]
    ious = overlaps / np.maximum(areas[0][:, None] + areas[1] - overlaps, 1)
    pairs = [(i, j) for i, j in zip(*linear_sum_assignment(-ious), strict=True) if ious[i, j] > 0]
    old_left = set(range(len(ids[0]))) - {i for i, _ in pairs}
    new_left = set(range(len(ids[1]))) - {j for _, j in pairs}
    return [
        *((ids[0][i], ids[1][j], float(ious[i, j])) for i, j in pairs),
        *((ids[0][i], "", None) for i in sorted(old_left)),
        *(("", ids[1][j], None) for j in sorted(new_left)),
    ]


def _count_common(old: tuple[np.ndarray, tuple[int, int]], new: tuple[np.ndarray, tuple[int, int]]) -> int:
    """Count the pixels that two masks share, each from `rle_to_part`: only where their boxes meet."""
    (old_part, (old_x, old_y)), (new_part, (new_x, new_y)) = old, new
    x, y = max(old_x, new_x), max(old_y, new_y)
    old_part, new_part = old_part[y - old_y :, x - old_x :], new_part[y - new_y :, x - new_x :]
    height, width = np.minimum(old_part.shape, new_part.shape)
    return np.count_nonzero(old_part[:height, :width] & new_part[:height, :width])
