"""What a model makes of a picture's objects when a user prompts them: simulated clicks and boxes, and the masks' IoUs.

All is in the picture's own frame and at its own size. Objects of a picture are decoded together.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from utils import run
from utils.images import mask_to_box
from utils.instances.readers import object_ids
from utils.sam2 import model as models
from utils.sam2 import prompts
from utils.sam2.mask_generation import upscale_part
from utils.sam2.metrics import mask_iou
from utils.sam2.model import Embeddings

# Objects of a picture that are decoded together, at most 64, by the size of their true masks; and how many of their
# masks are brought to full size together. Another size of groups would round differently on a CPU.
GROUP_PIXELS_ON_CPU, GROUP_PIXELS_ON_GPU = 2**26, 2**29
FULL_SIZE_PIXELS_ON_CPU, FULL_SIZE_PIXELS_ON_GPU = 2**20, 2**26
MOST_IN_GROUP = 64
LOGIT_LIMIT = 32.0  # the largest logit that is fed back as a mask prompt, as SAM 2's predictor limits it


class Clicked(NamedTuple):
    """What was measured of O objects that were prompted, float32 on the CPU, and what their first click showed."""

    ious: torch.Tensor  # (O, K), of the mask of highest predicted IoU after 1 to K clicks; nan where none was made
    first_ious: torch.Tensor  # (O, 3), of the three masks after one click
    first_predicted: torch.Tensor  # (O, 3), their predicted IoUs
    box_iou: torch.Tensor  # (O,), from the exact box
    first_points: list[np.ndarray]  # (x, y), px of the picture
    first_masks: np.ndarray  # bool (O, H, W), of highest predicted IoU after one click
    first_tokens: torch.Tensor  # (O, C), on the model's device, the tokens of these masks


def kept_objects(layers: np.ndarray, min_area_px: int) -> list[tuple[int, int]]:
    """List (layer, id) of the objects of one picture that are large enough to be used."""
    return [(layer, object_id) for layer, object_id, area in object_ids(layers) if area >= min_area_px]


def group_masks(layers: np.ndarray, objects: list[tuple[int, int]], device: torch.device) -> Iterator[np.ndarray]:
    """Yield the masks of a picture's objects, bool (O, H, W), in groups that are decoded together."""
    most_pixels = GROUP_PIXELS_ON_CPU if device.type == "cpu" else GROUP_PIXELS_ON_GPU
    group_size = max(1, min(MOST_IN_GROUP, most_pixels // layers[0].size))
    for start in range(0, len(objects), group_size):
        group = objects[start : start + group_size]
        yield np.stack([layers[layer] == object_id for layer, object_id in group])


def predict_masks(
    model: torch.nn.Module,
    embeddings: Embeddings,
    point_coords: np.ndarray,
    point_labels: np.ndarray,
    mask_inputs: torch.Tensor | None,
    orig_hw: tuple[int, int],
    precision: str,
    text_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict the masks of O objects of one picture, prompted in the picture's own frame.

    Args:
        embeddings: of this picture alone.
        point_coords: float32 (O, P, 2), pixels of the picture.
        point_labels: int32 (O, P).
        mask_inputs: logits fed back, as `pick_mask` returns them, or None.
        text_tokens: (O, C), from `words.TextMap`; P may be 0 beside them. None: no words.
    Returns:
        low_res_masks (O, M, S/4, S/4) logits, iou_predictions (O, M), mask_tokens (O, M, C).
    """
    coords = models.scale_points(torch.from_numpy(point_coords), orig_hw, model.image_size).to(model.device)
    labels = torch.from_numpy(point_labels).to(model.device)
    image_index = torch.zeros(len(coords), dtype=torch.long, device=model.device)
    with run.autocast(model.device, precision):
        low_res_masks, iou_predictions, _, mask_tokens = models.decode(
            model, embeddings, image_index, coords, labels, mask_inputs,
            multimask_output=coords.shape[1] + (text_tokens is not None) == 1, text_tokens=text_tokens,
        )  # fmt: skip
    return low_res_masks, iou_predictions, mask_tokens


def measure_tokens(
    model: torch.nn.Module,
    embeddings: Embeddings,
    masks: np.ndarray,
    text_tokens: torch.Tensor | None,
    precision: str,
    threads: ThreadPoolExecutor,
    point_coords: np.ndarray | None = None,
) -> torch.Tensor:
    """Measure the masks that objects of one picture get from words.

    Args:
        embeddings: of this picture alone.
        masks: bool (O, H, W), truth.
        text_tokens: (O, C), from `words.TextMap`; None: clicks alone.
        point_coords: float32 (O, P, 2), px of the picture, clicks on each object; None: words alone.
    Returns:
        float32 (O,) on the CPU: IoU of the mask of highest predicted IoU.
    """
    point_coords = np.zeros((len(masks), 0, 2), np.float32) if point_coords is None else point_coords
    labels = np.ones(point_coords.shape[:2], np.int32)
    *prediction, _ = predict_masks(
        model, embeddings, point_coords, labels, None, masks.shape[1:], precision, text_tokens
    )
    ious, _ = measure_masks(*prediction, torch.from_numpy(masks).to(model.device), threads)
    return ious.gather(1, prediction[1].argmax(1)[:, None].to(ious.device))[:, 0].cpu()


def predict_from_boxes(
    model: torch.nn.Module,
    embeddings: Embeddings,
    boxes_xyxy: np.ndarray,
    mask_inputs: torch.Tensor | None,
    orig_hw: tuple[int, int],
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict the masks of O objects of one picture from their boxes, (O, 4) px: as `predict_masks`."""
    labels = np.full((len(boxes_xyxy), 2), [2, 3], np.int32)
    corners = boxes_xyxy.reshape(-1, 2, 2).astype(np.float32)
    return predict_masks(model, embeddings, corners, labels, mask_inputs, orig_hw, precision)


def pick_mask(low_res_masks: torch.Tensor, iou_predictions: torch.Tensor) -> torch.Tensor:
    """Take the mask of highest predicted IoU as the next mask prompt: (O, M, h, w), (O, M) -> fp32 (O, 1, h, w)."""
    best = iou_predictions.argmax(1)
    best_masks = low_res_masks[torch.arange(len(best), device=best.device), best]  # (O, h, w)
    return best_masks[:, None].float().clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


def full_size_iou(low_res_masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Measure masks at their truth's size, a few objects at once: logits (O, M, h, w), bool (O, H, W) -> (O, M)."""
    parts = zip(*_split(truth, low_res_masks.float(), truth), strict=True)
    return torch.cat(
        [
            mask_iou(models.upscale_masks(logits, truth.shape[1:]) > 0, true_masks[:, None])
            for logits, true_masks in parts
        ]
    )


def measure_masks(
    low_res_masks: torch.Tensor, iou_predictions: torch.Tensor, truth: torch.Tensor, threads: ThreadPoolExecutor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare masks with the truth at the picture's own size.

    On a CPU each mask is brought to full size where it can be above 0 alone, an object for each thread; elsewhere whole
    masks of a few objects at once.

    Args:
        low_res_masks: (O, M, h, w) logits.
        iou_predictions: (O, M).
        truth: bool (O, H, W), on the same device.
    Returns:
        ious (O, M) of all masks; pred_masks bool (O, H, W), those of highest predicted IoU.
    """
    best = iou_predictions.argmax(1)
    if truth.device.type != "cpu":
        return measure_whole_masks(low_res_masks, best, truth)
    measured = threads.map(_measure_object, low_res_masks.float().numpy(), best.tolist(), truth.numpy())
    ious, pred_masks = zip(*measured, strict=True)
    return torch.tensor(ious, dtype=torch.float32), torch.from_numpy(np.stack(pred_masks))


def _measure_object(low_res_masks: np.ndarray, best: int, truth: np.ndarray) -> tuple[list[float], np.ndarray]:
    """Measure the masks of one object, logits (M, h, w) against bool (H, W): their IoUs; the best one at full size."""
    ious, pred_mask, num_true = [], np.zeros_like(truth), np.count_nonzero(truth)
    for number, logits in enumerate(low_res_masks):
        part, (x, y) = upscale_part(logits, truth.shape, 0.0)
        is_in, window = part > 0, (slice(y, y + part.shape[0]), slice(x, x + part.shape[1]))
        overlap = np.count_nonzero(is_in & truth[window])
        union = num_true + np.count_nonzero(is_in) - overlap
        ious.append(overlap / union if union else 1.0)
        if number == best:
            pred_mask[window] = is_in
    return ious, pred_mask


def measure_whole_masks(
    low_res_masks: torch.Tensor, best: torch.Tensor, truth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure as `measure_masks`, on any device: best (O,) are the masks to return."""
    ious, pred_masks = [], []
    for logits, chosen, true_masks in zip(*_split(truth, low_res_masks, best, truth), strict=True):
        all_masks = models.upscale_masks(logits, truth.shape[1:]) > 0  # (o, M, H, W)
        ious.append(mask_iou(all_masks, true_masks[:, None]))  # (o, M)
        pred_masks.append(all_masks[torch.arange(len(chosen), device=chosen.device), chosen])
    return torch.cat(ious), torch.cat(pred_masks)


def _split(truth: torch.Tensor, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Split tensors (O, ...) into parts whose masks may be brought to the size of the truth at once."""
    limit = FULL_SIZE_PIXELS_ON_CPU if truth.device.type == "cpu" else FULL_SIZE_PIXELS_ON_GPU
    return [tensor.split(max(1, limit // truth[0].numel())) for tensor in tensors]


def click_objects(
    model: torch.nn.Module,
    embeddings: Embeddings,
    masks: np.ndarray,
    num_clicks: int,
    precision: str,
    threads: ThreadPoolExecutor,
    most_clicks: int = 0,
    enough_iou: float = 1.0,
) -> Clicked:
    """Prompt objects of one picture with their boxes, then click by click, all together, feeding the logits back.

    Args:
        embeddings: of this picture alone.
        masks: bool (O, H, W), truth, none empty.
        num_clicks: clicks that every object gets, each in the centre of the largest error.
        threads: where clicks and masks at full size are computed, one object each.
        most_clicks: an object gets further ones, up to so many in all, while its IoU has not reached `enough_iou`.
    """
    orig_hw = masks.shape[1:]
    truth = torch.from_numpy(masks).to(model.device)  # (O, H, W)
    boxes = np.stack(list(threads.map(mask_to_box, masks)))
    *prediction, _ = predict_from_boxes(model, embeddings, boxes, None, orig_hw, precision)
    box_iou = measure_masks(*prediction, truth, threads)[0][:, 0]

    columns = []  # of each click: which objects it was made on, and their IoUs
    left, highest = np.arange(len(masks)), torch.zeros(len(masks), device=model.device)
    point_coords = np.zeros((len(masks), 0, 2), np.float32)
    point_labels = np.zeros((len(masks), 0), np.int32)
    pred_masks, mask_inputs = np.zeros_like(masks), None
    for count in range(1, max(num_clicks, most_clicks) + 1):
        if count > num_clicks:
            is_left = (highest < enough_iou).cpu().numpy()
            if not is_left.any():
                break
            kept = torch.from_numpy(np.flatnonzero(is_left)).to(model.device)
            left, masks, truth, mask_inputs = left[is_left], masks[is_left], truth[kept], mask_inputs[kept]
            point_coords, point_labels, pred_masks = point_coords[is_left], point_labels[is_left], pred_masks[is_left]
            highest = highest[kept]
        points, labels = zip(*threads.map(prompts.center_point, masks, pred_masks), strict=True)
        point_coords = np.concatenate([point_coords, np.stack(points)[:, None]], 1)
        point_labels = np.concatenate([point_labels, np.array(labels, np.int32)[:, None]], 1)
        *prediction, mask_tokens = predict_masks(
            model, embeddings, point_coords, point_labels, mask_inputs, orig_hw, precision
        )
        mask_inputs = pick_mask(*prediction)
        all_ious, pred_masks = measure_masks(*prediction, truth, threads)  # (o, M), (o, H, W)
        pred_masks = pred_masks.cpu().numpy()
        best = prediction[1].argmax(1)
        iou = all_ious.gather(1, best[:, None])[:, 0]  # (o,)
        columns.append((left, iou))
        highest = torch.maximum(highest, iou)
        if count == 1:
            first_ious, first_predicted = all_ious, prediction[1].float()
            first_points, first_masks = list(points), pred_masks
            first_tokens = mask_tokens[torch.arange(len(best), device=best.device), best].float()

    measured = [iou for _, iou in columns] + [first_ious.flatten(), first_predicted.flatten(), box_iou]
    *measured, first_ious, first_predicted, box_iou = torch.cat(measured).cpu().split([len(part) for part in measured])
    ious = torch.full((len(boxes), max(num_clicks, most_clicks)), torch.nan)
    for number, ((places, _), iou) in enumerate(zip(columns, measured, strict=True)):
        ious[places, number] = iou
    num_masks = len(first_ious) // len(boxes)
    of_first = first_ious.reshape(-1, num_masks), first_predicted.reshape(-1, num_masks)
    return Clicked(ious, *of_first, box_iou, first_points, first_masks, first_tokens)
