"""Actions of a person -> masks: clicks, boxes, choices and strokes against decoding by hand; what is refused."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from options import read_option
from scipy import ndimage

from utils.run import seed_everything
from utils.sam2 import interactive
from utils.sam2 import model as models
from utils.sam2.interactive import check_actions, draw_object, draw_stroke, full_mask, view_masks

HW = 60, 90
NANO = read_option("sam2", "model", "sam2_nano") | {"checkpoint": "none", "image_size": 64}


def click(x, y, label=1):
    return {"type": "click", "x": x, "y": y, "label": label}


def box(x1, y1, x2, y2):
    return {"type": "box", "x1": x1, "y1": y1, "x2": x2, "y2": y2}


def stroke(*points, radius=4.0, erase=False):
    return {"type": "stroke", "erase": erase, "radius": radius, "points": [list(point) for point in points]}


@pytest.fixture(scope="module")
def encoded():
    """A model with random weights, and its embeddings of a picture."""
    seed_everything(0)
    model = models.build_sam2(**NANO, device="cpu", fast_decoder=False)
    image_rgb = np.random.default_rng(0).integers(0, 256, (*HW, 3), np.uint8)
    with torch.inference_mode():
        return model, models.encode(model, models.preprocess(image_rgb, 64)[None])


def draw(encoded, actions, start_mask=None, memory=None):
    check_actions(actions, HW)
    return draw_object(*encoded, HW, actions, start_mask, "fp32", {} if memory is None else memory)


def decode(encoded, points, labels, mask_inputs=None):
    """Decode points by hand: logits (M, 16, 16), predicted IoUs (M,); several masks for one point alone."""
    model, embeddings = encoded
    scaled = torch.tensor(points, dtype=torch.float32) * torch.tensor([64 / HW[1], 64 / HW[0]])
    with torch.inference_mode():
        logits, ious, *_ = models.decode(
            model, embeddings, torch.tensor([0]), scaled[None], torch.tensor([labels]), mask_inputs,
            multimask_output=len(points) == 1 and mask_inputs is None,
        )  # fmt: skip
    return logits[0], ious[0]


def upscale(logits, hw):
    return (F.interpolate(logits[None, None], hw, mode="bilinear", align_corners=False)[0, 0] > 0).numpy()


def test_each_click_feeds_back_the_mask_before(encoded):
    first, ious = decode(encoded, [[40, 30]], [1])
    drawn = draw(encoded, [click(40, 30)])
    assert np.allclose(drawn.low_res_masks, first) and np.allclose(drawn.predicted_ious, ious) and len(ious) == 3
    assert drawn.chosen == ious.argmax()
    best, other = int(ious.argmax()), (int(ious.argmax()) + 1) % 3
    for choice, actions in ((best, []), (other, [{"type": "choose", "mask": other}])):
        mask_inputs = first[choice][None, None].clamp(-32, 32)
        second, second_ious = decode(encoded, [[40, 30], [5, 50]], [1, 0], mask_inputs)
        drawn = draw(encoded, [click(40, 30), *actions, click(5, 50, 0)])
        assert np.allclose(drawn.low_res_masks, second, atol=1e-5) and np.allclose(drawn.predicted_ious, second_ious)
        assert np.array_equal(full_mask(drawn, HW), upscale(second[0], HW)) and drawn.chosen == 0
    assert np.array_equal(full_mask(draw(encoded, [click(40, 30), actions[0]]), HW), upscale(first[other], HW))


def test_a_box_comes_first_and_a_later_one_in_its_place(encoded):
    first, _ = decode(encoded, [[10, 12], [50, 40]], [2, 3])
    second, _ = decode(encoded, [[10, 12], [50, 40], [20, 20]], [2, 3, 0], first[:1][None].clamp(-32, 32))
    third, ious = decode(encoded, [[9, 9], [55, 44], [20, 20]], [2, 3, 0], second[:1][None].clamp(-32, 32))
    drawn = draw(encoded, [box(10, 12, 50, 40), click(20, 20, 0), box(9, 9, 55, 44)])
    assert np.allclose(drawn.low_res_masks, third, atol=1e-5) and drawn.predicted_ious == pytest.approx(ious.tolist())


def innermost(mask):
    """The pixel that is farthest from all others, (x, y)."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return [int(place) for place in np.unravel_index(np.rint(depth**2).argmax(), mask.shape)][::-1]


def prompt_of(mask):
    averages = F.interpolate(torch.tensor(mask)[None, None].float(), (16, 16), mode="bilinear", antialias=True)
    return averages * 20 - 10


def test_a_mask_that_is_there_is_fed_with_a_click_inside(encoded):
    start_mask = np.zeros(HW, bool)
    start_mask[10:40, 20:70] = True
    actions = [{"type": "object", "id": 1}, click(30, 20, 0), click(60, 30)]
    assert np.array_equal(full_mask(draw(encoded, actions[:1], start_mask), HW), start_mask)
    first, _ = decode(encoded, [innermost(start_mask), [30, 20]], [1, 0], prompt_of(start_mask))
    assert len(first) == 1 and np.allclose(draw(encoded, actions[:2], start_mask).low_res_masks, first, atol=1e-5)
    second, _ = decode(encoded, [innermost(start_mask), [30, 20], [60, 30]], [1, 0, 1], first[None].clamp(-32, 32))
    assert np.allclose(draw(encoded, actions, start_mask).low_res_masks, second, atol=1e-4)

    painted = stroke([20, 10], [69, 10])  # so is one of the brush
    mask = draw_stroke(np.zeros(HW, bool), painted["points"], 4.0, False)
    expected, _ = decode(encoded, [innermost(mask), [30, 20]], [1, 1], prompt_of(mask))
    assert np.allclose(draw(encoded, [painted, click(30, 20)]).low_res_masks, expected, atol=1e-5)
    mask = full_mask(draw(encoded, [click(40, 30), painted]), HW)  # but where a person's click is there already
    expected, _ = decode(encoded, [[40, 30], [30, 20]], [1, 0], prompt_of(mask))
    drawn = draw(encoded, [click(40, 30), painted, click(30, 20, 0)])
    assert np.allclose(drawn.low_res_masks, expected, atol=1e-5)
    wiped = stroke([0, 30], [89, 30], radius=100, erase=True)  # nothing is left to be fed
    expected, _ = decode(encoded, [[30, 20]], [1])
    assert np.allclose(draw(encoded, [actions[0], wiped, click(30, 20)], start_mask).low_res_masks, expected, atol=1e-5)


def test_what_is_not_the_object_alone_is_an_empty_mask(encoded):
    memory = {}
    drawn = draw(encoded, [click(3, 3, 0)], memory=memory)
    assert not full_mask(drawn, HW).any() and drawn.predicted_ious == ()
    expected, _ = decode(encoded, [[3, 3], [40, 30]], [0, 1])
    assert np.allclose(draw(encoded, [click(3, 3, 0), click(40, 30)], memory=memory).low_res_masks, expected)


def test_strokes_cover_what_lies_within_their_radius():
    rng = np.random.default_rng(1)
    ys, xs = np.mgrid[: HW[0], : HW[1]]
    for radius in (1.5, 2.5, 7.0):
        points = (rng.random((4, 2)) * [110, 80] - 10).tolist()  # outside the picture, too
        distance = np.full(HW, np.inf)
        for (x1, y1), (x2, y2) in zip(points[:-1], points[1:], strict=True):
            along = ((xs - x1) * (x2 - x1) + (ys - y1) * (y2 - y1)) / ((x2 - x1) ** 2 + (y2 - y1) ** 2)
            along = along.clip(0, 1)
            distance = np.minimum(distance, np.hypot(xs - x1 - along * (x2 - x1), ys - y1 - along * (y2 - y1)))
        before = rng.random(HW) > 0.5
        drawn, erased = (draw_stroke(before, points, radius, erase) for erase in (False, True))
        near, far = distance < radius - 1, distance > radius + 1
        assert near.any() and drawn[near].all() and np.array_equal(drawn[far], before[far])
        assert not erased[near].any() and np.array_equal(erased[far], before[far])
        line = draw_stroke(np.zeros(HW, bool), points, radius, False)
        assert np.array_equal(drawn, before | line) and np.array_equal(erased, before & ~line)
    assert draw_stroke(np.zeros(HW, bool), [[20, 30]], 5.0, False).sum() == pytest.approx(np.pi * 25, rel=0.2)


def test_the_brush_draws_on_the_mask_of_the_clicks(encoded):
    clicked = full_mask(draw(encoded, [click(40, 30)]), HW)
    drawn = draw(encoded, [click(40, 30), stroke([2, 2], [30, 8]), stroke([40, 30], erase=True)])
    line = draw_stroke(np.zeros(HW, bool), [[2, 2], [30, 8]], 4.0, False)
    spot = draw_stroke(np.zeros(HW, bool), [[40, 30]], 4.0, False)
    assert np.array_equal(full_mask(drawn, HW), (clicked | line) & ~spot)
    assert np.array_equal(view_masks(drawn, HW, HW)[0], full_mask(drawn, HW)) and drawn.predicted_ious != ()


def test_a_further_click_costs_one_decode_and_undo_none(encoded, monkeypatch):
    calls, real = [], interactive.predict_masks
    monkeypatch.setattr(interactive, "predict_masks", lambda *inputs: calls.append(len(inputs[2][0])) or real(*inputs))
    actions, memory = [click(5 + 5 * i, 30, 1 - i % 2) for i in range(12)], {}
    for count in range(1, 13):
        draw(encoded, actions[:count], memory=memory)
        assert len(calls) == count
    assert len(memory) == interactive.MOST_REMEMBERED
    for count in range(11, 12 - interactive.MOST_REMEMBERED, -1):
        draw(encoded, actions[:count], memory=memory)
    assert len(calls) == 12
    remembered = draw(encoded, actions, memory=memory)
    fresh = draw(encoded, actions)
    assert np.array_equal(remembered.low_res_masks, fresh.low_res_masks) and len(calls) == 24
    assert remembered.decoder_ms == 0 < fresh.decoder_ms


def test_masks_of_the_view_are_those_of_the_picture(encoded):
    logits = cv2.GaussianBlur(np.random.default_rng(2).normal(size=(3, 32, 32)).astype(np.float32), (0, 0), 3)
    drawn = interactive.Drawn(
        np.stack([cv2.GaussianBlur(each, (0, 0), 3) for each in logits]), None, (0.1, 0.2, 0.3), 1
    )
    hw, view_hw = (900, 1350), (300, 450)
    assert np.array_equal(view_masks(drawn, hw, hw)[1], full_mask(drawn, hw))  # small pictures are shown as they are
    for number, shown in enumerate(view_masks(drawn, hw, view_hw)):
        full = full_mask(drawn._replace(chosen=number), hw)
        assert 0.1 < full.mean() < 0.9
        assert (shown != full[1::3, 1::3]).mean() < 0.002  # of the view's pixels, whose middles these are
    by_hand = interactive.Drawn(None, full, (), 0)
    assert (view_masks(by_hand, hw, view_hw)[0] != full[1::3, 1::3]).mean() < 0.01


def test_a_picture_of_one_pixel(encoded):
    model, _ = encoded
    with torch.inference_mode():
        embeddings = models.encode(model, models.preprocess(np.full((1, 1, 3), 90, np.uint8), 64)[None])
    actions = [click(0, 0), box(0, 0, 0, 0), stroke([0, 0], radius=0.5)]
    check_actions(actions, (1, 1))
    drawn = draw_object(model, embeddings, (1, 1), actions, None, "fp32", {})
    assert full_mask(drawn, (1, 1)).tolist() == [[True]]


@pytest.mark.parametrize(
    "actions",
    [
        None, [], {}, ["click"], [{}], [click(1, 1)] * 201, [click(1, 1) | {"more": 1}], [{"type": "click", "x": 1}],
        [{"type": ["click"]}], [click(float("nan"), 1)], [click(float("inf"), 1)], [click("1", 1)], [click(True, 1)],
        [click(89.6, 1)], [click(1, -0.6)], [click(1, 1, 2)], [click(1, 1, True)], [click(10**400, 1)],
        [box(5, 5, 4, 9)], [box(0, 0, 90, 9)], [box(0, None, 9, 9)],
        [{"type": "choose", "mask": 3}], [{"type": "choose", "mask": -1}], [{"type": "choose", "mask": 1.0}],
        [click(1, 1), {"type": "object", "id": 1}], [{"type": "object", "id": "1"}],
        [stroke()], [stroke([1, 2, 3])], [stroke([1, float("nan")])], [stroke([1e7, 0])], [stroke([1, 1], radius=0)],
        [stroke([1, 1], radius=513)], [stroke([1, 1]) | {"erase": 1}], [stroke([1, 1]) | {"points": "no"}],
        [stroke(*[[1, 1]] * 15_000), stroke(*[[1, 1]] * 15_000)],
    ],
)  # fmt: skip
def test_what_is_no_action_is_refused_in_one_line(actions):
    with pytest.raises(ValueError) as refused:
        check_actions(actions, HW)
    assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)


def test_a_choice_needs_masks_to_choose_from(encoded):
    for actions in ([{"type": "choose", "mask": 0}], [click(1, 1), click(2, 2), {"type": "choose", "mask": 1}]):
        with pytest.raises(ValueError, match="to choose from"):
            draw(encoded, actions)
