"""Average precision and recall against pycocotools' COCOeval: crowds, areas, ties, empty pictures."""

import contextlib
import io

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.sam2.detection_metrics import AREA_RANGES, average_precision, match_predictions

SIDE = 160


def draw_pictures(rng: np.random.Generator) -> list[dict]:
    """Pictures of rectangles, objects and predictions: some without objects, without predictions, or both."""
    pictures = []
    for number in range(8):
        num_objects, num_predictions = (0, 0) if number == 0 else rng.integers(0, 9, 2)
        objects = [draw_rectangle(rng) for _ in range(num_objects)]
        chosen = [rng.integers(num_objects) for _ in range(num_predictions) if num_objects and rng.random() < 0.8]
        near = [np.roll(objects[number], rng.integers(-4, 5, 2), (0, 1)) for number in chosen]
        predictions = near + [draw_rectangle(rng) for _ in range(num_predictions - len(near))]
        pictures.append({
            "objects": objects,
            "is_crowd": rng.random(num_objects) < 0.25,
            "predictions": predictions,
            "scores": rng.integers(0, 6, num_predictions) / 5,  # with ties
        })  # fmt: skip
    return pictures


def draw_rectangle(rng: np.random.Generator) -> np.ndarray:
    sides = np.exp(rng.uniform(np.log(4), np.log(120), 2)).astype(int)
    y, x = rng.integers(0, SIDE - sides + 1)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[y : y + sides[0], x : x + sides[1]] = 1
    return mask


def average_recall(pictures):
    """The share of the objects that are found, at each IoU threshold."""
    num_objects = sum(picture.num_objects for picture in pictures)
    num_found = sum((picture.is_matched & ~picture.is_ignored).sum(1) for picture in pictures)
    return num_found / num_objects if num_objects else np.full(10, np.nan)


def encode(masks: list[np.ndarray]) -> list[dict]:
    return [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]


def evaluate_by_coco(pictures: list[dict], most: list[int]) -> COCOeval:
    images, annotations, results = [], [], []
    for number, picture in enumerate(pictures):
        images.append({"id": number, "height": SIDE, "width": SIDE})
        for rle, is_crowd in zip(encode(picture["objects"]), picture["is_crowd"], strict=True):
            area = int(coco_mask.area(rle))
            shape = {"segmentation": rle, "area": area, "bbox": coco_mask.toBbox(rle).tolist()}
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": int(is_crowd)}
            annotations.append(annotation | shape)
        for rle, score in zip(encode(picture["predictions"]), picture["scores"], strict=True):
            results.append({"image_id": number, "category_id": 1, "segmentation": rle, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.params.maxDets = most
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def match_all(pictures: list[dict], area_range: tuple[float, float], most: int) -> list:
    matches = []
    for picture in pictures:
        objects, predictions = encode(picture["objects"]), encode(picture["predictions"])
        ious = (
            coco_mask.iou(predictions, objects, picture["is_crowd"].astype(np.uint8)) if objects and predictions else []
        )
        ious = np.reshape(ious, (len(predictions), len(objects)))
        areas = [np.array([coco_mask.area(rle) for rle in rles], np.float64) for rles in (predictions, objects)]
        matches.append(match_predictions(ious, picture["scores"], *areas, picture["is_crowd"], area_range, most))
    return matches


@pytest.mark.parametrize("seed", range(4))
def test_precision_and_recall_are_cocos(seed):
    pictures = draw_pictures(np.random.default_rng(seed))
    most = [1, 3, 100]
    evaluation = evaluate_by_coco(pictures, most)
    for a, area_range in enumerate(AREA_RANGES.values()):
        for m, number in enumerate(most):
            matches = match_all(pictures, area_range, number)
            precision = evaluation.eval["precision"][:, :, 0, a, m]  # (T, R); -1 where nothing counts
            recall = evaluation.eval["recall"][:, 0, a, m]
            expected = np.where(precision[:, 0] < 0, np.nan, precision.mean(1)), np.where(recall < 0, np.nan, recall)
            np.testing.assert_allclose(average_precision(matches), expected[0], atol=1e-9)
            np.testing.assert_allclose(average_recall(matches), expected[1], atol=1e-9)


def test_the_truth_as_prediction_is_perfect():
    pictures = draw_pictures(np.random.default_rng(9))
    for picture in pictures:
        kept = ~picture["is_crowd"]
        picture["objects"] = [mask for mask, is_kept in zip(picture["objects"], kept, strict=True) if is_kept]
        picture["is_crowd"] = picture["is_crowd"][kept]
        picture["predictions"], picture["scores"] = picture["objects"], np.ones(len(picture["objects"]))
    matches = match_all(pictures, AREA_RANGES["all"], 100)
    assert average_precision(matches).tolist() == average_recall(matches).tolist() == [1] * 10


def test_nothing_to_find_is_no_number():
    matches = match_all([{"objects": [], "is_crowd": np.zeros(0, bool), "predictions": [], "scores": np.zeros(0)}],
                        AREA_RANGES["all"], 100)  # fmt: skip
    assert np.isnan(average_precision(matches)).all() and np.isnan(average_recall(matches)).all()
