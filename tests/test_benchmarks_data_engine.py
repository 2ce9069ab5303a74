"""The simulated annotator of benchmarks/data_engine.py: what it accepts, corrects, deletes, and what that costs."""

import numpy as np
import pytest
import tiny_training
import torch
from options import read_option

from benchmarks import data_engine
from benchmarks.data_engine import BRUSH_CLICKS, MOST_CLICKS, Task
from utils.instances.codecs import mask_to_rle, rle_to_mask
from utils.sam2.model import build_sam2

NANO = read_option("sam2", "model", "sam2_nano") | {"checkpoint": "none", "image_size": 64}
TASK = Task("label_map", 1, 1, 0.9, 1, 64, 1, ())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_training.answer_to_prompts(build_sam2(**NANO, device="cpu"))


def square(x, y, side):
    mask = np.zeros((48, 64), bool)
    mask[y : y + side, x : x + side] = True
    return mask


def shown(mask, predicted_iou):
    return {"segmentation": mask_to_rle(mask), "predicted_iou": predicted_iou, "origin": "automatic"}


def test_what_a_hand_does_to_automatic_masks(model):
    """Random weights never please it, so that each object that is clicked takes all clicks and the brush."""
    truth = np.array([square(2, 2, 10), square(20, 2, 12), square(40, 20, 20)])
    automatic = [
        shown(square(2, 2, 10), 0.8),  # right
        shown(square(2, 3, 10), 0.7),  # the same object again
        shown(square(20, 2, 10), 0.6),  # IoU 100 / 144
        shown(square(5, 30, 8), 0.5),  # nothing
    ]
    image_rgb = np.zeros((48, 64, 3), np.uint8)
    made = data_engine.label_by_hand(model, image_rgb, truth, TASK, automatic)
    brush = MOST_CLICKS + BRUSH_CLICKS
    assert made.clicks == [0, 1 + brush, brush] and made.num_deletions == 2 and made.num_clicks == 3 + 2 * brush
    assert made.rejected == [0.7, 0.6, 0.5]
    assert [each["origin"] for each in made.annotations] == ["automatic", "person", "person"]
    assert made.annotations[0]["checked"] and made.annotations[0]["predicted_iou"] == 0.8
    masks = [rle_to_mask(each["segmentation"]) for each in made.annotations]
    assert np.array_equal(masks, truth[[0, 2, 1]])
    assert sum(each.get("clicks", 0) + each.get("strokes", 0) for each in made.annotations) == sum(made.clicks)

    content = Task("label_map", 1, 1, 0.0, 1, 64, 1, ())  # with any mask
    made = data_engine.label_by_hand(model, image_rgb, truth, content, [])
    assert made.clicks == [1, 1, 1] and {each["origin"] for each in made.annotations} == {"assisted"}


def test_masks_are_taken_until_the_clicks_are_spent():
    def labelled(*costs):
        annotations = [{"clicks": cost, "strokes": 0, "place": place} for place, cost in enumerate(costs)]
        return data_engine.Labelled(annotations, list(costs), 0, [])

    made = {"a": labelled(3, 4), "b": labelled(2, 5, 1)}
    taken = data_engine.cut_at_budget(made, ["b", "a"], 11)
    assert {name: [each["clicks"] for each in masks] for name, masks in taken.items()} == {"b": [2, 5, 1], "a": [3]}
    assert data_engine.cut_at_budget(made, ["b", "a"], 1) == {}
