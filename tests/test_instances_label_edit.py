"""Masks of a picture while they are edited: the map is as drawn anew, changes are taken back, hidden shares."""

import json

import numpy as np

from utils.instances.codecs import mask_to_rle, rle_to_mask
from utils.instances.label_edit import EditedLabels, place
from utils.instances.label_folder import draw_map

HW = 40, 50


def blob(rng):
    y, x, height, width = (rng.random(4) * [40, 50, 25, 30]).astype(int)
    mask = np.zeros(HW, bool)
    mask[y : y + height, x : x + width] = rng.random(HW)[y : y + height, x : x + width] > 0.2  # empty at times
    return {"segmentation": mask_to_rle(mask), "origin": "person"}


def test_the_map_is_as_drawn_anew_and_changes_are_taken_back():
    rng = np.random.default_rng(0)
    labels = EditedLabels({"made_by": "x", "annotations": []}, [blob(rng) for _ in range(6)], HW)
    states = []
    for _ in range(120):
        states.append(json.dumps([labels.record, [placed.annotation for placed in labels.objects]]))
        place_of, kind = int(rng.integers(len(labels.objects) + 1)), rng.integers(4)
        before, after = labels.objects[:place_of], labels.objects[place_of + 1 :]
        if kind == 0:
            labels.change([*labels.objects, place(blob(rng))], [])
        elif kind == 1:
            labels.change([*before, *after], [0.5])
        elif kind == 2:
            labels.change([*before, place(blob(rng)), *after], [])
        elif labels.objects[place_of:]:
            old = labels.objects[place_of]
            labels.change([*before, old._replace(annotation=old.annotation | {"class": "cell"}), *after], [])
        else:
            labels.change([place(blob(rng)) for _ in range(5)], [])
        assert np.array_equal(labels.label_map, draw_map([placed.annotation for placed in labels.objects], HW))
    while labels.undone:
        labels.take_back()
        assert json.dumps([labels.record, [placed.annotation for placed in labels.objects]]) == states.pop()
        assert np.array_equal(labels.label_map, draw_map([placed.annotation for placed in labels.objects], HW))
    assert len(states) == 70  # the last 50 changes can be taken back


def test_what_is_hidden_is_said():
    rng = np.random.default_rng(3)
    masks = [np.zeros(HW, bool) for _ in range(4)]
    masks[0][5:15, 5:15] = True
    masks[1][5:12, 5:15] = True  # hides 70 of 100 px
    masks[2][5:8, 0:40] = True  # of these, hides 30: object 2 still hides 40 of object 1, none more than half
    masks[3][20:30, 20:30] = rng.random((10, 10)) > 0.5
    annotations = [{"segmentation": mask_to_rle(mask), "origin": "person", "class": "c"} for mask in masks]
    for count in (2, 3, 4):
        labels = EditedLabels({}, annotations[:count], HW)
        described, warnings = labels.describe()
        drawn = draw_map(annotations[:count], HW)
        for number, each in enumerate(described, 1):
            mask = rle_to_mask(annotations[number - 1]["segmentation"])
            visible = np.count_nonzero(drawn == number) / np.count_nonzero(mask)
            assert each["area"] == np.count_nonzero(mask) and np.isclose(each["hidden_share"], 1 - visible)
            assert each["id"] == number and each["class"] == "c" and each["predicted_iou"] is None
        expected = [
            f"object {high + 1} hides {share:.0%} of object {low + 1}"
            for low in range(count)
            for high in range(low + 1, count)
            if (share := np.count_nonzero(masks[low] & (drawn == high + 1)) / np.count_nonzero(masks[low])) > 0.5
        ]
        assert warnings == expected and len(expected) == (1 if count == 2 else 0)
