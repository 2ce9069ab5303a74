"""Actions of a person -> the mask of one object: clicks, a box, a choice of three masks, strokes of a brush.

An object is the list of its actions, which is replayed; what the first ones come to is remembered, so that a further
click costs one decode. Points are (x, y) px of the picture, (0, 0) is the top left pixel's centre:

    {"type": "object", "id": 3}                               first only: the mask that is there already is corrected
    {"type": "click", "x": 12.5, "y": 40.0, "label": 1}       1 the object, 0 not
    {"type": "box", "x1": 3, "y1": 5, "x2": 40, "y2": 51}     a further box takes the place of the one before
    {"type": "choose", "mask": 2}                             of the three masks of a single click, from 0
    {"type": "stroke", "erase": false, "radius": 6.0, "points": [[x, y], ...]}

Source: Kirillov et al. 2023 (Segment Anything), section 4 and appendix A: one click gives three masks; from the second
on, the logits of the mask before are fed back.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch

from utils.run import now_s
from utils.sam2 import model as models
from utils.sam2 import prompts
from utils.sam2.evaluation import LOGIT_LIMIT, predict_masks
from utils.sam2.mask_generation import upscale_part
from utils.sam2.model import Embeddings
from utils.settings import is_number, is_numbers

MOST_ACTIONS, MOST_STROKE_POINTS = 200, 20_000
MOST_REMEMBERED = 8  # lists of actions; a mask of the brush is of the picture's size
FARTHEST_PX, LARGEST_RADIUS_PX = 1e6, 512  # of a stroke, which may leave the picture
KEYS = {
    "object": {"id"},
    "click": {"x", "y", "label"},
    "box": {"x1", "y1", "x2", "y2"},
    "choose": {"mask"},
    "stroke": {"erase", "radius", "points"},
}
STROKE_BITS = 4  # OpenCV takes coordinates in 1/16 px


class Drawn(NamedTuple):
    """What actions have come to: masks of the decoder, or one mask of the picture's size once a brush was used."""

    low_res_masks: np.ndarray | None  # float32 (M, h, w) logits; None where `mask` holds
    mask: np.ndarray | None  # bool (H, W): of the brush, or of an object that is corrected
    predicted_ious: tuple[float, ...] = ()  # M, of the last decode, if there was one
    chosen: int = 0  # of the M
    decoder_ms: float = 0.0  # of the last action alone
    anchor_xy: tuple[float, float] | None = None  # px, a positive click that stands for the mask that was fed


# ---------------------------------------------------------------------------------------------------------------------
# what comes from outside


def check_actions(actions: object, orig_hw: tuple[int, int]) -> None:
    """Refuse what is no list of actions on a picture of (H, W) px.

    Raises:
        ValueError: in one line.
    """
    if not isinstance(actions, list) or not 1 <= len(actions) <= MOST_ACTIONS:
        size = f"{len(actions)} long" if isinstance(actions, list) else "no list"
        raise ValueError(f"actions is {size}; must be a list of 1 to {MOST_ACTIONS}")
    num_points = 0
    for number, action in enumerate(actions):
        kind = action.get("type") if isinstance(action, dict) else None
        if not isinstance(kind, str) or kind not in KEYS or set(action) != KEYS[kind] | {"type"}:
            raise ValueError(f"action {number} is none: it must have a type among {', '.join(KEYS)}, and its keys")
        if kind == "stroke":
            num_points += len(action["points"]) if isinstance(action["points"], list) else 0
            if num_points > MOST_STROKE_POINTS:
                raise ValueError(f"the strokes have {num_points} points or more; at most {MOST_STROKE_POINTS}")
        if not _is_fine(action, number, orig_hw):
            raise ValueError(f"action {number}, a {kind}, has a value that is not of its kind, or not of the picture")


def _is_fine(action: dict, number: int, orig_hw: tuple[int, int]) -> bool:
    """Tell whether the values of an action, whose keys are right, can be."""
    kind, (height, width) = action["type"], orig_hw
    if kind == "object":
        return number == 0 and type(action["id"]) is int
    if kind == "choose":
        return type(action["mask"]) is int and 0 <= action["mask"] <= 2
    if kind == "stroke":
        points, radius = action["points"], action["radius"]
        is_shaped = isinstance(points, list) and len(points) > 0 and all(is_numbers(point, 2) for point in points)
        is_near = is_shaped and max(max(abs(x), abs(y)) for x, y in points) <= FARTHEST_PX
        return is_near and is_number(radius) and 0 < radius <= LARGEST_RADIUS_PX and type(action["erase"]) is bool
    if not all(is_number(action[key]) for key in KEYS[kind]):
        return False
    if kind == "click":
        is_inside = -0.5 <= action["x"] <= width - 0.5 and -0.5 <= action["y"] <= height - 0.5
        return is_inside and type(action["label"]) is int and action["label"] in (0, 1)
    is_wide = -0.5 <= action["x1"] <= action["x2"] <= width - 0.5
    return is_wide and -0.5 <= action["y1"] <= action["y2"] <= height - 0.5


# ---------------------------------------------------------------------------------------------------------------------
# actions -> a mask


def needs_model(actions: Sequence[dict]) -> bool:
    """Tell whether actions need the model, which the brush does not."""
    return any(action["type"] in ("click", "box") for action in actions)


@torch.inference_mode()
def draw_object(
    model: torch.nn.Module,
    embeddings: Embeddings | None,
    orig_hw: tuple[int, int],
    actions: Sequence[dict],
    start_mask: np.ndarray | None,
    precision: str,
    memory: dict[tuple[str, ...], Drawn],
) -> Drawn:
    """Draw an object from its actions, from the longest list of first ones that is remembered.

    Args:
        embeddings: of this picture alone; not read where `needs_model` says so.
        orig_hw: its size.
        actions: as `check_actions` lets them pass.
        start_mask: bool (H, W), of the object that the first action names; None where it names none.
        memory: of this picture, whose objects have not changed since; what is drawn is added, and the oldest drops out.
    Raises:
        ValueError: for a choice where there are not so many masks.
    """
    keys = tuple(json.dumps(action, sort_keys=True) for action in actions)
    known = next((count for count in range(len(keys), 0, -1) if keys[:count] in memory), 0)
    drawn = memory.pop(keys[:known]) if known else Drawn(None, None)
    if known:
        memory[keys[:known]] = drawn  # the latest again
    decoder_ms = 0.0
    for count in range(known + 1, len(keys) + 1):
        drawn = _act(model, embeddings, orig_hw, actions[:count], drawn, start_mask, precision)
        decoder_ms += drawn.decoder_ms
        memory[keys[:count]] = drawn
        while len(memory) > MOST_REMEMBERED:
            del memory[next(iter(memory))]
    return drawn._replace(decoder_ms=decoder_ms)


def _act(
    model: torch.nn.Module,
    embeddings: Embeddings,
    orig_hw: tuple[int, int],
    actions: Sequence[dict],
    before: Drawn,
    start_mask: np.ndarray | None,
    precision: str,
) -> Drawn:
    """Add the last of the actions to what those before it have come to."""
    action = actions[-1]
    if action["type"] == "object":
        return Drawn(None, start_mask)
    if action["type"] == "choose":
        num_masks = 0 if before.low_res_masks is None else len(before.low_res_masks)
        if action["mask"] >= num_masks:
            raise ValueError(f"choose has mask {action['mask']}; there are {num_masks} to choose from")
        return before._replace(chosen=action["mask"], decoder_ms=0.0)
    if action["type"] == "stroke":
        mask = draw_stroke(full_mask(before, orig_hw), action["points"], action["radius"], action["erase"])
        return before._replace(low_res_masks=None, mask=mask, decoder_ms=0.0)
    anchor_xy = before.anchor_xy
    if before.mask is not None:
        anchor_xy = choose_anchor(before.mask, is_needed=anchor_xy is not None or not _is_pointed_at(actions[:-1]))
    point_coords, point_labels = gather_points(actions, anchor_xy)
    if before.low_res_masks is not None:
        mask_inputs = torch.from_numpy(before.low_res_masks[before.chosen]).to(model.device)[None, None]
        mask_inputs = mask_inputs.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)  # (1, 1, h, w)
    elif before.mask is not None and before.mask.any():
        mask_inputs = models.mask_logits([before.mask], model)  # (1, 1, S/4, S/4)
    else:
        mask_inputs = None
    if mask_inputs is None and not (point_labels > 0).any():  # what is not the object alone says nothing of it
        return before._replace(decoder_ms=0.0)
    start = now_s(model.device)
    low_res_masks, iou_predictions, _ = predict_masks(
        model, embeddings, point_coords[None], point_labels[None], mask_inputs, orig_hw, precision
    )  # (1, M, h, w), (1, M)
    low_res_masks, predicted_ious = low_res_masks[0].float().cpu().numpy(), iou_predictions[0].float().tolist()
    decoder_ms = 1000 * (now_s(model.device) - start)
    return Drawn(low_res_masks, None, tuple(predicted_ious), int(np.argmax(predicted_ious)), decoder_ms, anchor_xy)


def _is_pointed_at(actions: Sequence[dict]) -> bool:
    """Tell whether a box or a positive click has said where the object is."""
    return any(action["type"] == "box" or (action["type"] == "click" and action["label"] == 1) for action in actions)


def choose_anchor(mask: np.ndarray, is_needed: bool) -> tuple[float, float] | None:
    """Choose the click that comes with a mask which nobody has clicked on: its innermost pixel, (x, y) px.

    Models are trained to see a positive click beside a mask: without, a negative one emptied 9 of 10 nuclei.
    """
    if not is_needed or not mask.any():
        return None
    point, _ = prompts.center_point(mask, np.zeros_like(mask))
    return tuple(point.tolist())


def gather_points(
    actions: Sequence[dict], anchor_xy: tuple[float, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Gather the decoder's points: the corners of the last box, the anchor, then all clicks.

    Returns:
        point_coords float32 (P, 2) px of the picture; point_labels int32 (P,), 1, 0, and 2 and 3 of the corners.
    """
    boxes = [action for action in actions if action["type"] == "box"][-1:]
    clicks = [action for action in actions if action["type"] == "click"]
    corners = [point for box in boxes for point in ((box["x1"], box["y1"]), (box["x2"], box["y2"]))]
    anchors = [] if anchor_xy is None else [anchor_xy]
    point_coords = corners + anchors + [(click["x"], click["y"]) for click in clicks]
    point_labels = [2, 3] * len(boxes) + [1] * len(anchors) + [click["label"] for click in clicks]
    return np.array(point_coords, np.float32).reshape(-1, 2), np.array(point_labels, np.int32)


def full_mask(drawn: Drawn, orig_hw: tuple[int, int]) -> np.ndarray:
    """Return the chosen mask at the picture's size, bool (H, W)."""
    if drawn.low_res_masks is not None:
        return upscale_mask(drawn.low_res_masks[drawn.chosen], orig_hw)
    return np.zeros(orig_hw, bool) if drawn.mask is None else drawn.mask


def view_masks(drawn: Drawn, orig_hw: tuple[int, int], view_hw: tuple[int, int]) -> list[np.ndarray]:
    """Return all masks at the size of a view, bool (h, w) each: of the decoder's, straight from its resolution."""
    if drawn.low_res_masks is not None:
        return [upscale_mask(logits, view_hw) for logits in drawn.low_res_masks]
    mask = full_mask(drawn, orig_hw)
    if view_hw == orig_hw:
        return [mask]
    return [cv2.resize(mask.view(np.uint8) * 255, view_hw[::-1], interpolation=cv2.INTER_AREA) > 127]


def upscale_mask(low_res_mask: np.ndarray, full_hw: tuple[int, int]) -> np.ndarray:
    """Bring logits, float32 (h, w), to another size and threshold them: bool (H, W)."""
    mask = np.zeros(full_hw, bool)
    logits, (x, y) = upscale_part(low_res_mask, full_hw, 0.0)
    mask[y : y + logits.shape[0], x : x + logits.shape[1]] = logits > 0
    return mask


def draw_stroke(mask: np.ndarray, points: list[list[float]], radius: float, erase: bool) -> np.ndarray:
    """Draw a stroke of the brush, or of the eraser, on a mask.

    Args:
        mask: bool (H, W).
        points: [[x, y], ...] px, which lines join.
        radius: px.
    Returns:
        bool (H, W), a new array.
    """
    drawn = mask.astype(np.uint8)
    corners = np.rint(np.array([*points, points[-1]]) * (1 << STROKE_BITS)).astype(np.int32)  # of one point, two
    thickness = max(1, 2 * int(radius))  # an odd one reaches a pixel too far
    cv2.polylines(drawn, [corners], False, 0 if erase else 1, thickness, cv2.LINE_8, STROKE_BITS)
    return drawn.view(bool)
