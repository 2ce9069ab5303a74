"""What the protocols of utils/sam2/benchmark.py measure of a picture, and what is computed from many pictures' records.

A record is a flat dict of arrays, one a picture. Every number of a table is a function of the records of some pictures,
so that it can be computed again for any choice of them.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from utils.instances.codecs import mask_to_rle, rle_to_mask
from utils.instances.readers import Instances, class_key, is_marked_crowd, object_ids, plain_id
from utils.sam2 import detection_metrics as metrics
from utils.sam2 import edges, evaluation, mask_generation
from utils.sam2 import model as models
from utils.sam2.mask_generation import AutomaticSettings
from utils.sam2.model import Embeddings
from utils.settings import FINITE, at_least, between, is_number

CLICKS, MOST_CLICKS = (1, 2, 3, 5, 9), 20
NOC_IOUS = (0.85, 0.9)
AT_MOST = (10, 100, 1000)  # proposals of a picture
ONE_CLASS = 1  # of all objects where there are no categories: pycocotools takes it for one
NO_CLASS = -1  # of an object that has no category where others have
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}  # LVIS's
RESAMPLES, FEWEST_PICTURES = 1000, 10  # of an interval
Record = dict[str, np.ndarray]  # what was measured of a picture, {"clicks/ious": ...}
Table = dict[tuple[str, str, str], float]  # {(protocol, group, metric): value}


@dataclass(frozen=True)
class ProposalSettings:
    """The grid of the proposals (`benchmark.proposals:`)."""

    points_per_side: Annotated[int, at_least(1)]
    box_nms_thresh: Annotated[float, between(0, 1)]
    pred_iou_thresh: Annotated[float, FINITE]
    stability_score_thresh: Annotated[float, FINITE]
    single_mask: bool  # also with a single mask for each point, the paper's ablation


class Truth(NamedTuple):
    """The objects of a picture, G of them; a crowd region is none that is clicked or boxed."""

    numbers: np.ndarray  # int32 (L, H, W): id layers, renumbered, object g has g + 1
    ids: np.ndarray  # int64 (G,), of the annotation in a json file, else of the mask
    areas: np.ndarray  # float64 (G,), px
    given_areas: np.ndarray  # float64 (G,), those of the file where it has them: sizes go by them, as COCO's
    is_crowd: np.ndarray  # bool (G,)
    classes: np.ndarray  # int64 (G,), category_id, or NO_CLASS
    frequencies: np.ndarray  # str (G,), a key of FREQUENCIES or ""
    attributes: tuple[dict, ...]
    image_id: int | str | None


def read_truth(instances: Instances, class_ids: dict[int | str, int]) -> Truth:
    """Lay out a picture's objects for measuring.

    Args:
        class_ids: the number of each class, by its `class_key`; {}: all are of one class.
    """
    layers = instances.layers
    objects = object_ids(layers)
    numbers = np.zeros_like(layers)
    for number, (layer, object_id, _) in enumerate(objects, 1):
        numbers[layer][layers[layer] == object_id] = number
    said = [instances.annotations[object_id - 1] if instances.annotations else {} for _, object_id, _ in objects]
    areas = np.array([area for *_, area in objects], np.float64)
    ids = [plain_id(annotation.get("id")) for annotation in said]
    given = [annotation.get("area") for annotation in said]
    return Truth(
        numbers,
        np.array([i if fits_int64(i) else own for i, (_, own, _) in zip(ids, objects, strict=True)], np.int64),
        areas,
        np.array([a if is_number(a) and a > 0 else own for a, own in zip(given, areas, strict=True)], np.float64),
        np.array([is_marked_crowd(annotation) for annotation in said], bool),
        np.array([number_class(annotation, class_ids) for annotation in said], np.int64),
        np.array([str(annotation.get("frequency") or "") for annotation in said], "U1"),
        tuple(each if isinstance(each := annotation.get("attributes"), dict) else {} for annotation in said),
        instances.image_id,
    )


def fits_int64(value: object) -> bool:
    """Tell whether an id is a number of 64 bits; those that are made of hashes need not be."""
    return type(value) is int and -(2**63) <= value < 2**63


def number_class(entry: dict, class_ids: dict[int | str, int]) -> int:
    """Give the number of an annotation's or a detection's class; NO_CLASS where it is none of them."""
    key = class_key(entry)
    if not class_ids:
        return ONE_CLASS
    return class_ids[key] if key in class_ids else NO_CLASS


# ---------------------------------------------------------------------------------------------------------------------
# one picture -> its record


def measure_clicks(
    model: torch.nn.Module,
    embeddings: Embeddings,
    truth: Truth,
    chosen: np.ndarray,
    is_short: bool,
    precision: str,
    threads: ThreadPoolExecutor,
) -> Record:
    """Click and box the chosen objects of a picture.

    Args:
        chosen: int64 (O,), places in `truth`.
        is_short: three clicks alone, for `groups`.
    Returns:
        clicks/id (O,); area (O,); ious (O, 20 or 3), nan where no click was needed; first_ious and first_predicted
        (O, 3); box_iou (O,).
    """
    num_clicks, most_clicks = (3, 3) if is_short else (max(CLICKS), MOST_CLICKS)
    layer_of = {}
    for layer, numbers in enumerate(truth.numbers):
        layer_of |= dict.fromkeys(np.unique(numbers[numbers > 0]).tolist(), layer)
    objects = [(layer_of[place + 1], place + 1) for place in chosen.tolist()]
    parts = [
        evaluation.click_objects(
            model, embeddings, masks, num_clicks, precision, threads, most_clicks, max(NOC_IOUS)
        )[:4]
        for masks in evaluation.group_masks(truth.numbers, objects, model.device)
    ]  # fmt: skip
    empty = [np.zeros((0, size), np.float32) for size in (most_clicks, 3, 3)] + [np.zeros(0, np.float32)]
    measured = [torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True)] if parts else empty
    names = ("clicks/ious", "clicks/first_ious", "clicks/first_predicted", "clicks/box_iou")
    record = {"clicks/id": truth.ids[chosen], "clicks/area": truth.given_areas[chosen]}
    return record | dict(zip(names, measured, strict=True))


def count_overlaps(mask: np.ndarray, truth: Truth) -> np.ndarray:
    """Count the pixels that a mask, bool (H, W), shares with each object: int64 (G,)."""
    counts = [np.bincount(numbers[mask], minlength=len(truth.ids) + 1)[1:] for numbers in truth.numbers]
    return np.sum(counts, 0)


def measure_overlaps(overlaps: np.ndarray, pred_areas: np.ndarray, truth: Truth) -> np.ndarray:
    """Turn shared pixels (D, G) into IoUs, or with a crowd the share of the prediction that it covers."""
    union = np.where(truth.is_crowd, pred_areas[:, None], pred_areas[:, None] + truth.areas - overlaps)
    return overlaps / np.maximum(union, 1)


def measure_proposals(
    model: torch.nn.Module,
    embeddings: Embeddings,
    image_rgb: np.ndarray,
    truth: Truth,
    settings: ProposalSettings,
    is_single: bool,
) -> tuple[Record, list[dict]]:
    """Find the objects of a picture with a grid of points.

    Returns:
        {name}/found/{group}_{most} int64 (T,), objects found at each IoU threshold; {name}/num/{group}; name is
        proposals, or single_mask. And the masks in COCO's result format, without the picture's id.
    """
    automatic = AutomaticSettings(
        points_per_side=settings.points_per_side,
        pred_iou_thresh=settings.pred_iou_thresh,
        stability_score_thresh=settings.stability_score_thresh,
        box_nms_thresh=settings.box_nms_thresh,
        multimask_output=not is_single,
    )
    generated = mask_generation.generate_masks(model, image_rgb, automatic, embeddings).annotations
    scores = np.array([(entry["predicted_iou"] + entry["stability_score"]) / 2 for entry in generated])
    best = np.argsort(-scores, kind="stable")[: max(AT_MOST)]
    generated, scores = [generated[k] for k in best], scores[best]
    overlaps = [count_overlaps(rle_to_mask(entry["segmentation"]), truth) for entry in generated]
    overlaps = np.array(overlaps, np.float64).reshape(len(generated), len(truth.ids))
    pred_areas = np.array([entry["area"] for entry in generated], np.float64)
    ious = measure_overlaps(overlaps, pred_areas, truth)
    name, record = "single_mask" if is_single else "proposals", {}
    groups = {group: (truth.given_areas, limits) for group, limits in metrics.AREA_RANGES.items()}
    for key, group in FREQUENCIES.items():
        if (truth.frequencies == key).any():  # the others get an area beyond all ranges, and are ignored
            groups[group] = np.where(truth.frequencies == key, truth.given_areas, np.inf), metrics.AREA_RANGES["all"]
    for group, (areas, limits) in groups.items():
        matches = metrics.match_predictions(ious, scores, pred_areas, areas, truth.is_crowd, limits, max(AT_MOST))
        is_found = matches.is_matched & ~matches.is_ignored  # (T, D), the best first: each prefix is matched alike
        for most in AT_MOST:
            record[f"{name}/found/{group}_{most}"] = is_found[:, :most].sum(1)
        record[f"{name}/num/{group}"] = np.array(matches.num_objects)
    results = [
        {"category_id": ONE_CLASS, "segmentation": entry["segmentation"], "score": float(score)}
        for entry, score in zip(generated, scores, strict=True)
    ]
    return record, results


def measure_boxes(
    model: torch.nn.Module,
    embeddings: Embeddings,
    truth: Truth,
    boxes_xyxy: np.ndarray,
    scores: np.ndarray | None,
    classes: np.ndarray,
    orig_hw: tuple[int, int],
    precision: str,
) -> tuple[Record, list[dict]]:
    """Turn the boxes of a picture into masks, each decoded a second time with its own logits.

    Args:
        boxes_xyxy: float (D, 4), px.
        scores: float (D,), a detector's; None: the predicted IoUs.
        classes: int64 (D,).
    Returns:
        boxes/scores (D,), classes (D,), is_matched and is_ignored (R, T, D) for the R ranges of areas, num_classes (C,)
        and num_objects (R, C): what is matched within each class. And the masks in COCO's result format.
    """
    overlaps, areas, predicted, results = [], [], [], []
    for start in range(0, len(boxes_xyxy), evaluation.MOST_IN_GROUP):
        part = boxes_xyxy[start : start + evaluation.MOST_IN_GROUP]
        *first, _ = evaluation.predict_from_boxes(model, embeddings, part, None, orig_hw, precision)
        mask_inputs = evaluation.pick_mask(*first)
        logits, ious, _ = evaluation.predict_from_boxes(model, embeddings, part, mask_inputs, orig_hw, precision)
        for low_res_masks in logits.split(1):
            mask = (models.upscale_masks(low_res_masks, orig_hw)[0, 0] > 0).cpu().numpy()  # (H, W)
            overlaps.append(count_overlaps(mask, truth))
            areas.append(np.count_nonzero(mask))
            results.append({"segmentation": mask_to_rle(mask)})
        predicted += ious[:, 0].float().tolist()
    overlaps = np.array(overlaps, np.float64).reshape(len(boxes_xyxy), len(truth.ids))
    areas, scores = np.array(areas, np.float64), np.array(predicted) if scores is None else scores
    for entry, class_id, score in zip(results, classes.tolist(), scores.tolist(), strict=True):
        entry |= {"category_id": class_id, "score": score}
    ious = measure_overlaps(overlaps, areas, truth)
    num_ranges, num_thresholds = len(metrics.AREA_RANGES), len(metrics.IOU_THRESHOLDS)
    is_matched, is_ignored = np.zeros((2, num_ranges, num_thresholds, len(scores)), bool)
    all_classes = np.union1d(classes, truth.classes)
    num_objects = np.zeros((num_ranges, len(all_classes)), np.int64)
    for c, class_id in enumerate(all_classes):
        own, objects = np.flatnonzero(classes == class_id), np.flatnonzero(truth.classes == class_id)
        own = own[np.argsort(-scores[own], kind="stable")]
        for r, limits in enumerate(metrics.AREA_RANGES.values()):
            matches = metrics.match_predictions(
                ious[np.ix_(own, objects)], scores[own], areas[own], truth.given_areas[objects],
                truth.is_crowd[objects], limits, 100,
            )  # fmt: skip
            counted = own[: len(matches.scores)]
            is_matched[r][:, counted], is_ignored[r][:, counted] = matches.is_matched, matches.is_ignored
            is_ignored[r][:, own[len(counted) :]] = True  # COCO counts 100 of a class and picture
            num_objects[r, c] = matches.num_objects
    record = {"scores": scores, "classes": classes, "is_matched": is_matched, "is_ignored": is_ignored}
    record |= {"all_classes": all_classes, "num_objects": num_objects}
    return {f"boxes/{key}": value for key, value in record.items()}, results


# ---------------------------------------------------------------------------------------------------------------------
# records -> numbers


def summarize(records: list[Record]) -> Table:
    """Compute every number of the table from the records of some pictures."""
    table = {}
    summarizers = {
        "clicks/ious": summarize_clicks, "clicks/group": summarize_groups, "proposals/num/all": summarize_proposals,
        "boxes/scores": summarize_boxes, "edges/sam": summarize_edges,
    }  # fmt: skip
    for key, summarizer in summarizers.items():
        own = [record for record in records if key in record]
        table |= summarizer(own) if own else {}
    return table


def join(records: list[Record], key: str) -> np.ndarray:
    """Join what records have of their objects."""
    return np.concatenate([record[key] for record in records])


def summarize_clicks(records: list[Record]) -> Table:
    """Average over objects, of all sizes and by size."""
    ious, areas = join(records, "clicks/ious"), join(records, "clicks/area")
    if ious.shape[1] < max(CLICKS):
        return {}  # three clicks alone, for the groups
    first, predicted = join(records, "clicks/first_ious"), join(records, "clicks/first_predicted")
    columns = {f"iou_{count}_click" + "s" * (count > 1): ious[:, count - 1] for count in CLICKS}
    columns |= {"best_of_three_1_click": first.max(1), "iou_box": join(records, "clicks/box_iou")}
    columns["iou_error_1_click"] = np.abs(predicted.max(1) - ious[:, 0])
    for iou in NOC_IOUS:
        is_reached = np.nan_to_num(ious) >= iou  # (O, K)
        num_clicks = np.where(is_reached.any(1), is_reached.argmax(1) + 1, MOST_CLICKS)
        columns |= {f"noc_{iou:.0%}"[:-1]: num_clicks, f"not_reached_{iou:.0%}"[:-1]: ~is_reached.any(1)}
    table = {}
    for group, (least, most) in metrics.AREA_RANGES.items():
        is_in = (areas >= least) & (areas <= most)
        if is_in.any():
            table |= {("clicks", group, name): float(values[is_in].mean()) for name, values in columns.items()}
            table["clicks", group, "num_objects"] = int(is_in.sum())
    return table


def summarize_groups(records: list[Record]) -> Table:
    """Average the IoUs at 1 and 3 clicks of each value of the attribute, and give the largest gap between two."""
    ious, groups = join(records, "clicks/ious"), join(records, "clicks/group")
    table = {}
    for count in (1, 3):
        name = f"iou_{count}_click" + "s" * (count > 1)
        means = {group: float(ious[groups == group, count - 1].mean()) for group in np.unique(groups[groups != ""])}
        table |= {("groups", str(group), name): mean for group, mean in means.items()}
        if means:
            gap = max(means.values()) - min(means.values())
            table["groups", "", name.replace("iou", "largest_gap")] = gap
    for group in np.unique(groups[groups != ""]):
        table["groups", str(group), "num_objects"] = int((groups == group).sum())
    return table


def summarize_proposals(records: list[Record]) -> Table:
    """Compute the average recall, over IoUs of 0.5 to 0.95, of the best 10, 100 and 1000 masks of a picture."""
    table = {}
    names = ["proposals", "single_mask"] if "single_mask/num/all" in records[0] else ["proposals"]
    for name in names:
        for group in [*metrics.AREA_RANGES, *FREQUENCIES.values()]:
            own = [record for record in records if f"{name}/num/{group}" in record]
            num_objects = sum(int(record[f"{name}/num/{group}"]) for record in own)
            if num_objects == 0:
                continue
            for most in AT_MOST:
                found = sum(record[f"{name}/found/{group}_{most}"] for record in own)
                table["proposals", group, f"ar_{most}" + "_single_mask" * (name != "proposals")] = float(
                    (found / num_objects).mean()
                )
            table["proposals", group, "num_objects"] = num_objects
    return table


def class_matches(records: list[Record], range_number: int) -> dict[int, list[metrics.Matches]]:
    """Give the matches of each class, picture by picture, in one range of areas."""
    of_class = {}
    for record in records:
        scores, classes = record["boxes/scores"], record["boxes/classes"]
        for c, class_id in enumerate(record["boxes/all_classes"].tolist()):
            own = np.flatnonzero(classes == class_id)
            own = own[np.argsort(-scores[own], kind="stable")]
            parts = (record[f"boxes/{key}"][range_number][:, own] for key in ("is_matched", "is_ignored"))
            num_objects = int(record["boxes/num_objects"][range_number, c])
            of_class.setdefault(class_id, []).append(metrics.Matches(scores[own], *parts, num_objects))
    return of_class


def class_precisions(records: list[Record], range_number: int) -> list[np.ndarray]:
    """Compute the average precision of each class that has objects in a range of areas: float (T,) each."""
    of_class = class_matches(records, range_number)
    precisions = [metrics.average_precision(of_class[key]) for key in sorted(of_class) if key != NO_CLASS]
    return [precision for precision in precisions if not np.isnan(precision).any()]


def summarize_boxes(records: list[Record]) -> Table:
    """Compute COCO's average precision: the mean over classes that have objects."""
    table = {}
    for number, group in enumerate(metrics.AREA_RANGES):
        precisions = class_precisions(records, number)
        if not precisions:
            continue
        mean = np.mean(precisions, 0)  # (T,)
        table["boxes", group, "ap"] = float(mean.mean())
        if group == "all":
            table |= {("boxes", group, "ap_50"): float(mean[0]), ("boxes", group, "ap_75"): float(mean[5])}
            table["boxes", group, "num_classes"] = len(precisions)
        table["boxes", group, "num_objects"] = int(sum(record["boxes/num_objects"][number].sum() for record in records))
    return table


def summarize_edges(records: list[Record]) -> Table:
    """Score the edges of SAM, Sobel and Canny as BSDS500 does."""
    table = {}
    for name in ("sam", "sobel", "canny"):
        scores = edges.score_edges([record[f"edges/{name}"] for record in records])
        table |= {("edges", name, key): value for key, value in scores.items()}
    return table


def interval(
    measure: Callable[..., Table], num_pictures: list[int], seed: int
) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Give the 95 % interval of each number over 1,000 seeded resamples of pictures; {} with fewer than 10.

    Args:
        measure: of places of pictures, int64 (num_pictures[i],) for each i, some of them several times.
        num_pictures: of each set that is resampled by itself.
    """
    if min(num_pictures) < FEWEST_PICTURES:
        return {}
    rng, sampled = np.random.default_rng(seed), {}
    for _ in tqdm(range(RESAMPLES), desc="resample", leave=False, disable=None):
        for key, value in measure(*(rng.integers(count, size=count) for count in num_pictures)).items():
            if not key[2].startswith(("num_", "largest_gap")):  # a gap is never below 0: its interval would mislead
                sampled.setdefault(key, []).append(value)
    return {key: tuple(np.nanpercentile(values, [2.5, 97.5]).tolist()) for key, values in sampled.items()}
