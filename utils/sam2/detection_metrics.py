"""Matches of masks with scores, as COCO counts them, kept picture by picture, and their average precision.

Matching a picture's predictions with its objects needs the masks; what is reported needs only the matches, so that it
can be computed again for any choice of pictures (confidence intervals). One class at a time: class-agnostic is one.
Sources: Lin et al. 2014 (COCO) and the arithmetic of pycocotools' COCOeval, which the tests hold to 1e-9.
"""

from typing import NamedTuple

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)  # where precision is read
AREA_RANGES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # px


class Matches(NamedTuple):
    """The predictions of one class in one picture, highest score first; D predictions, T IoU thresholds."""

    scores: np.ndarray  # float (D,)
    is_matched: np.ndarray  # bool (T, D)
    is_ignored: np.ndarray  # bool (T, D): neither right nor wrong
    num_objects: int  # that count


def match_predictions(
    ious: np.ndarray,
    scores: np.ndarray,
    pred_areas: np.ndarray,
    object_areas: np.ndarray,
    is_crowd: np.ndarray,
    area_range: tuple[float, float] = AREA_RANGES["all"],
    most: int | None = None,
) -> Matches:
    """Match predictions with objects at each of IOU_THRESHOLDS, the highest score first, each to the best object left.

    Objects that are crowds or outside the range of areas are ignored: what matches them counts as nothing, and a crowd
    matches many. Predictions without a match that are outside the range are ignored too.

    Args:
        ious: float (D, G), with a crowd the share of the prediction that it covers.
        scores: float (D,), in any order.
        pred_areas, object_areas: px, (D,) and (G,).
        is_crowd: bool (G,).
        area_range: px, both included.
        most: predictions of the highest scores that count; None: all.
    """
    order = np.argsort(-scores, kind="stable")[:most]
    is_ignored_object = is_crowd | (object_areas < area_range[0]) | (object_areas > area_range[1])
    objects = np.argsort(is_ignored_object, kind="stable")  # those that count come first
    ious, is_crowd, is_ignored_object = ious[np.ix_(order, objects)], is_crowd[objects], is_ignored_object[objects]
    num_thresholds, num_predictions = len(IOU_THRESHOLDS), len(order)
    is_matched, is_ignored = np.zeros((2, num_thresholds, num_predictions), bool)
    for t, threshold in enumerate(IOU_THRESHOLDS):
        is_free = np.ones(len(objects), bool)
        for d in range(num_predictions):
            may_match = (is_free | is_crowd) & (ious[d] >= min(threshold, 1 - 1e-10))
            for are_ignored in (False, True):  # an object that counts goes before one that does not
                candidates = np.flatnonzero(may_match & (is_ignored_object == are_ignored))
                if len(candidates):
                    last_first = candidates[::-1]  # of equal ones the last is taken
                    best = last_first[ious[d, last_first].argmax()]
                    is_free[best] = False
                    is_matched[t, d], is_ignored[t, d] = True, are_ignored
                    break
    areas = pred_areas[order]
    is_ignored |= ~is_matched & ((areas < area_range[0]) | (areas > area_range[1]))
    return Matches(scores[order], is_matched, is_ignored, int((~is_ignored_object).sum()))


def average_precision(pictures: list[Matches]) -> np.ndarray:
    """Compute the average precision of a class at each IoU threshold: float (T,); nan where no object counts."""
    num_objects = sum(picture.num_objects for picture in pictures)
    if num_objects == 0:
        return np.full(len(IOU_THRESHOLDS), np.nan)
    order = np.argsort(-np.concatenate([picture.scores for picture in pictures]), kind="stable")
    is_matched, is_ignored = (
        np.concatenate([picture[part] for picture in pictures], 1)[:, order] for part in (1, 2)
    )  # (T, D) of all pictures
    precisions = []
    for right, wrong in zip(is_matched & ~is_ignored, ~is_matched & ~is_ignored, strict=True):
        num_right, num_wrong = np.cumsum(right, dtype=np.float64), np.cumsum(wrong, dtype=np.float64)
        recall = num_right / num_objects
        precision = num_right / (num_right + num_wrong + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
        places = np.searchsorted(recall, RECALLS, side="left")
        precisions.append(np.append(precision, 0.0)[places].mean())  # 0 at recalls that are not reached
    return np.array(precisions)
