"""Records that models and people make in turn: which picture comes first, which masks are trusted, what a person adds.

What a record is: utils/instances/label_folder.py.
"""

from pathlib import Path

import numpy as np

from utils import images
from utils.instances import label_folder
from utils.instances.codecs import mask_to_rle
from utils.instances.label_edit import Placed, place
from utils.instances.label_folder import ASSISTED, AUTOMATIC, PERSON
from utils.sam2 import interactive
from utils.settings import is_number

ACCEPTED_SHARE, FEWEST_CHECKED, CONFIDENT_IOU = 0.9, 20, 0.9


def order_pictures(pictures: list[images.Picture], labels_dir: Path, order: str) -> list[images.Picture]:
    """Put pictures in the order in which they are offered: as they are, or by what the model made of them.

    Args:
        order: name, or uncertain: by the mean predicted IoU of their automatic masks, lowest first, those without last.
    """
    if order == "name":
        return pictures
    means = {}
    for picture in pictures:
        record = label_folder.skim_record(label_folder.record_path(labels_dir, picture.name))
        scores = [each["predicted_iou"] for each in record.get("annotations", []) if is_scored(each)]
        means[picture.name] = float(np.mean(scores)) if scores else np.inf
    return sorted(pictures, key=lambda picture: means[picture.name])


def is_scored(annotation: dict) -> bool:
    """Tell whether a mask is an automatic one with a predicted IoU."""
    return annotation.get("origin") == AUTOMATIC and is_number(annotation.get("predicted_iou"))


def choose_confident_iou(labels_dir: Path) -> tuple[float, int]:
    """Choose from which predicted IoU on automatic masks are worth showing: where people left 90 % as they were.

    Returns:
        the lowest predicted IoU such that of the masks of finished pictures that have it or more 90 % were accepted
        (1 where there is none); 0.9 while fewer than 20 were checked; and how many were.
    """
    accepted, rejected = [], []
    for name in sorted(label_folder.read_done(labels_dir)):
        record = label_folder.skim_record(label_folder.record_path(labels_dir, name))
        annotations = [each for each in record.get("annotations", []) if is_scored(each)]
        accepted += [each["predicted_iou"] for each in annotations if each.get("checked")]
        rejected += filter(is_number, record.get("rejected", []))
    num_checked = len(accepted) + len(rejected)
    if num_checked < FEWEST_CHECKED:
        return CONFIDENT_IOU, num_checked
    scores = np.array([*accepted, *rejected])
    order = np.argsort(-scores, kind="stable")
    scores, is_accepted = scores[order], (np.arange(num_checked) < len(accepted))[order]
    shares = np.cumsum(is_accepted) / np.arange(1, num_checked + 1)
    is_last = np.append(scores[1:] != scores[:-1], True)  # of those with the same score all are in
    good = np.flatnonzero(is_last & (shares >= ACCEPTED_SHARE))
    return (float(scores[good[-1]]) if len(good) else 1.0), num_checked


def finish_object(
    drawn: interactive.Drawn,
    orig_hw: tuple[int, int],
    actions: list[dict],
    old: Placed | None,
    class_name: str | None,
    seconds: float,
    round_number: int,
) -> Placed:
    """Make the annotation of a finished object.

    Args:
        old: the object that it corrects: what people have spent on it adds up.
        seconds: that a person took.
    """
    spent = {} if old is None else old.annotation
    before = {key: spent[key] if is_number(spent.get(key)) else 0 for key in ("clicks", "strokes", "seconds")}
    strokes = sum(action["type"] == "stroke" for action in actions) + before["strokes"]
    mask = interactive.full_mask(drawn, orig_hw)
    box = images.mask_to_box(mask)
    annotation = {
        "segmentation": mask_to_rle(mask),
        "area": int(np.count_nonzero(mask)),
        "bbox": [float(v) for v in (*box[:2], *(box[2:] - box[:2]))],
        **({"predicted_iou": drawn.predicted_ious[drawn.chosen]} if drawn.predicted_ious else {}),
        "origin": PERSON if strokes or spent.get("origin") == PERSON else ASSISTED,
        "clicks": sum(action["type"] in ("click", "box") for action in actions) + before["clicks"],
        "strokes": strokes,
        "seconds": round(seconds + before["seconds"], 2),
        "round": round_number,
        **({} if class_name is None else {"class": class_name}),
    }
    return place(annotation)


def mark_checked(annotation: dict, is_done: bool) -> dict:
    """Note that a person has left an automatic mask as it was, or that it is not known."""
    kept = {key: value for key, value in annotation.items() if key != "checked"}
    return kept | ({"checked": True} if is_done and kept.get("origin") == AUTOMATIC else {})


def rejected_ious(old: Placed | None) -> list[float]:
    """Return the predicted IoU of an automatic mask that is not kept as it was, if it has one."""
    return [old.annotation["predicted_iou"]] if old is not None and is_scored(old.annotation) else []
