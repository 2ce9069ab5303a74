"""Masks of a whole image from a grid of points, and one label map from many masks.

`generate_masks` finds what SAM 2's own SAM2AutomaticMaskGenerator finds, with less work and memory: masks are filtered
by predicted IoU, and by what their stability can be at most, before they leave the decoder's resolution; only the part
of a mask that can be above the threshold is brought to full size, a mask for each thread, and only the survivors of
non-maximum suppression are encoded.

Sources: Kirillov et al., "Segment Anything", 2023, appendix B; Ravi et al., "SAM 2", 2024 (default values); the
stitching is that of github.com/sagieppel/fine-tune-train_segment_anything_2_in_60_lines_of_code.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Annotated, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, box_convert, nms

from utils.instances.codecs import decode_rle_counts, mask_to_rle
from utils.run import now_s, start_threads
from utils.sam2.class_head import ClassHead
from utils.sam2.model import Embeddings, decode, encode, preprocess, scale_points, upscale_masks
from utils.settings import FINITE, at_least, between

CROP_EDGE_TOLERANCE_PX = 20  # a box this close to an edge of its crop, but not of the image, is a mask cut off there
CHUNK_PIXELS = 64 * 1024**2  # full-size logits held at once on a GPU: 256 MB
# Pixels of embeddings decoded at once on a CPU, 8 points at 1024 px: an eighth of the memory of 64 points, and less
# time, as the system hands out the pages of large tensors anew. A CPU's matrix kernel goes by the number of rows: with
# fewer than 6 points at once the masks were seen to round differently, with up to 33 the predicted IoU (by 1e-7).
PIXELS_ON_CPU, FEWEST_POINTS = 8 * 64 * 64, 8
ROUNDING = 1e-4  # a share of the largest logit, and of a stability, by which no computation of it is off


@dataclass(frozen=True)
class AutomaticSettings:
    """What is kept of a grid of points. The defaults are SAM 2's own; a model's YAML has those that suit it."""

    points_per_side: Annotated[int, at_least(1)] = 32  # points along each side of the image (and of each crop)
    # points decoded together, at most: changes memory, and results by rounding alone
    points_per_batch: Annotated[int, at_least(1)] = 64
    pred_iou_thresh: Annotated[float, FINITE] = 0.8  # keep masks of a predicted IoU above this, 0..1
    stability_score_thresh: Annotated[float, FINITE] = 0.95  # keep masks of at least this stability, 0..1
    # stability: area at logits > +offset over area at logits > -offset
    stability_score_offset: Annotated[float, at_least(0), FINITE] = 1.0
    # where two masks' boxes have a higher IoU than this, the better mask is kept
    box_nms_thresh: Annotated[float, between(0, 1)] = 0.7
    # layer i adds 4**i crops of the image, each with its own grid of points
    crop_n_layers: Annotated[int, at_least(0)] = 0
    # box_nms_thresh between crops; the mask of the smaller crop is kept
    crop_nms_thresh: Annotated[float, between(0, 1)] = 0.7
    # how far the first layer's crops overlap, share of the shorter side
    crop_overlap_ratio: Annotated[float, between(0, 1)] = 512 / 1500
    # points_per_side is divided by this in each further layer
    crop_n_points_downscale_factor: Annotated[int, at_least(1)] = 1
    min_area: Annotated[int, at_least(0)] = 0  # drop masks of fewer pixels
    min_region_area: Annotated[int, at_least(0)] = 0  # remove islands and fill holes of fewer pixels
    multimask_output: bool = True  # three masks for each point; False: one, SAM 2's own choice of a single mask


class GeneratedMasks(NamedTuple):
    """The masks of one image, and the time they took."""

    annotations: list[dict]  # a grid's best first; the keys are those of `annotate_mask`
    num_prompts: int
    encode_ms: float  # preprocessing and image encoder
    prompts_ms: float  # all the rest
    without_mask: tuple[int, ...] = ()  # prompts, counted from 0, whose mask is empty; a grid's do not count


class ClassFilter(NamedTuple):
    """Which masks are kept by the class that a head gives them, and which of them get in each other's way."""

    head: ClassHead
    keep_classes: tuple[str, ...] | None = None  # None: all
    min_class_prob: float = 0.0  # of the mask's class
    nms_across_classes: bool = True  # False: a mask is suppressed by those of its own class alone


class Candidates(NamedTuple):
    """K masks that passed the filters, still at the decoder's resolution."""

    low_res_masks: list[torch.Tensor]  # K of (h, w), logits
    predicted_ious: torch.Tensor  # (K,)
    stability_scores: torch.Tensor  # (K,)
    boxes_xyxy: torch.Tensor  # (K, 4), px of the crop, of the outermost pixels
    point_coords: torch.Tensor  # (K, 2), px of the crop
    class_numbers: torch.Tensor  # int64 (K,), places among the head's names; 0 without a head
    class_probs: torch.Tensor  # (K,); 1 without a head


# ---------------------------------------------------------------------------------------------------------------------
# a grid of points -> masks


@torch.inference_mode()
def generate_masks(
    model: torch.nn.Module,
    image_rgb: np.ndarray,
    settings: AutomaticSettings,
    encoded: Embeddings | None = None,
    class_filter: ClassFilter | None = None,
) -> GeneratedMasks:
    """Find the masks of an image with a grid of point prompts.

    Args:
        model: from `model.build_sam2`, in eval mode.
        image_rgb: uint8 (H, W, 3).
        encoded: of the whole image, where it is there already.
        class_filter: gives each mask a class; masks then rank by predicted IoU times the probability of their class.
    Returns:
        GeneratedMasks; no mask is empty. Of classes, annotations have those of `ClassHead.describe`, too.
    Source: sam2.automatic_mask_generator, whose filters these are, in its order.
    """
    orig_hw = image_rgb.shape[:2]
    crops = make_crops(orig_hw, settings.crop_n_layers, settings.crop_overlap_ratio)
    annotations, crop_areas, num_prompts, encode_s = [], [], 0, 0.0
    is_across = class_filter is None or class_filter.nms_across_classes
    start = now_s(model.device)
    for crop_xyxy, layer in crops:
        x1, y1, x2, y2 = crop_xyxy
        crop_hw = (y2 - y1, x2 - x1)
        encode_start = now_s(model.device)
        embeddings = encoded if layer == 0 else None
        if embeddings is None:
            images = preprocess(image_rgb[y1:y2, x1:x2], model.image_size, model.device)[None]  # (1, 3, S, S)
            embeddings = encode(model, images)
        encode_s += now_s(model.device) - encode_start

        points_per_side = max(1, int(settings.points_per_side / settings.crop_n_points_downscale_factor**layer))
        point_coords = make_point_grid(points_per_side, crop_hw)  # (P, 2)
        num_prompts += len(point_coords)
        candidates = find_candidates(model, embeddings, point_coords, crop_hw, settings, class_filter)
        whole = torch.nonzero(~is_cut_off(candidates.boxes_xyxy, crop_xyxy, orig_hw))[:, 0]
        boxes_xyxy, scores = candidates.boxes_xyxy[whole], candidates.predicted_ious[whole]
        if class_filter is not None:
            scores = scores * candidates.class_probs[whole]
        groups = None if is_across else candidates.class_numbers[whole]
        best = whole[suppress(boxes_xyxy, scores, groups, settings.box_nms_thresh)]
        if len(best) == 0:
            continue
        annotated = annotate_masks(
            torch.stack([candidates.low_res_masks[k] for k in best.tolist()]),
            candidates.predicted_ious[best],
            candidates.stability_scores[best],
            [[[x1 + x, y1 + y]] for x, y in candidates.point_coords[best].tolist()],
            crop_xyxy,
            orig_hw,
            settings.min_region_area,
        )
        if class_filter is not None:
            described = class_filter.head.describe(candidates.class_numbers[best], candidates.class_probs[best])
            annotated = [annotation | named for annotation, named in zip(annotated, described, strict=True)]
        annotations += annotated
        crop_areas += [crop_hw[0] * crop_hw[1]] * len(best)
    if len(crops) > 1:  # the smaller crop shows more detail
        inverse_areas = [1 / area for area in crop_areas]
        annotations = drop_duplicates(annotations, inverse_areas, settings.crop_nms_thresh, is_across)
    if settings.min_region_area > 0:  # without its islands a mask may have become the same as another
        annotations = drop_duplicates(
            annotations, [score_mask(each) for each in annotations], settings.box_nms_thresh, is_across
        )
    annotations = [annotation for annotation in annotations if annotation["area"] >= max(1, settings.min_area)]
    annotations.sort(key=lambda annotation: -score_mask(annotation))
    total_s = now_s(model.device) - start
    return GeneratedMasks(annotations, num_prompts, 1000 * encode_s, 1000 * (total_s - encode_s))


def find_candidates(
    model: torch.nn.Module,
    embeddings: Embeddings,
    point_coords: np.ndarray,
    crop_hw: tuple[int, int],
    settings: AutomaticSettings,
    class_filter: ClassFilter | None = None,
) -> Candidates:
    """Decode the masks of each point and keep those that are good by predicted IoU, by class, then by stability.

    Args:
        embeddings: one image's, or a crop's of it.
        point_coords: float (P, 2), px of the crop, one foreground point for each prompt.
        crop_hw: size of the crop.
    Returns:
        Candidates, in the order of the points.
    """
    points = torch.as_tensor(point_coords, dtype=torch.float32, device=model.device)  # (P, 2)
    batches = []
    decoded = decode_points(model, embeddings, points, crop_hw, settings.points_per_batch, settings.multimask_output)
    for batch_points, low_res_masks, iou_predictions, mask_tokens in decoded:  # (p, 2), (p, M, h, w), (p, M), (p, M, C)
        predicted_ious = iou_predictions.float().flatten()  # (M * p,)
        class_numbers, class_probs = torch.zeros_like(predicted_ious, dtype=torch.long), torch.ones_like(predicted_ious)
        is_good = predicted_ious > settings.pred_iou_thresh
        if class_filter is not None:
            class_numbers, class_probs = class_filter.head.classify(mask_tokens.flatten(0, 1))
            is_good &= is_kept_class(class_filter, class_numbers, class_probs)
        indices = torch.nonzero(is_good)[:, 0]  # (k,) of the M * p masks
        masks = low_res_masks.flatten(0, 1)[indices].float()  # (k, h, w)
        most_stability = bound_stability(masks, crop_hw, settings.stability_score_offset)
        can_be_stable = torch.nonzero(most_stability >= settings.stability_score_thresh)[:, 0]
        indices, masks = indices[can_be_stable], masks[can_be_stable]
        stability_scores, boxes_xyxy = measure_full_size(masks, crop_hw, settings.stability_score_offset)
        is_stable = torch.nonzero(stability_scores >= settings.stability_score_thresh)[:, 0]
        indices = indices[is_stable]
        batches.append(
            Candidates(
                list(masks[is_stable]),
                predicted_ious[indices],
                stability_scores[is_stable],
                boxes_xyxy[is_stable],
                batch_points[indices // iou_predictions.shape[1]],
                class_numbers[indices],
                class_probs[indices],
            )
        )
    masks = [mask for batch in batches for mask in batch.low_res_masks]
    return Candidates(masks, *(torch.cat(parts) for parts in list(zip(*batches, strict=True))[1:]))


def decode_points(
    model: torch.nn.Module,
    embeddings: Embeddings,
    points: torch.Tensor,
    image_hw: tuple[int, int],
    most: int,
    multimask_output: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Decode the masks of points, (P, 2) px of the image, each a prompt of its own.

    Args:
        most: points that are decoded together, at most; on a CPU no more than are quick there.
    Yields:
        some of the points (p, 2), low_res_masks (p, M, h, w) logits, iou_predictions (p, M), mask_tokens (p, M, C).
    """
    parts = points.split(most)
    if model.device.type == "cpu":
        at_once = max(FEWEST_POINTS, PIXELS_ON_CPU // embeddings.image_embeddings[0, 0].numel())
        parts = [part for batch in parts for part in batch.tensor_split(max(1, len(batch) // at_once))]
    for part in parts:
        low_res_masks, iou_predictions, _, mask_tokens = decode(
            model,
            embeddings,
            image_index=torch.zeros(len(part), dtype=torch.long, device=model.device),
            point_coords=scale_points(part, image_hw, model.image_size)[:, None],  # (p, 1, 2)
            point_labels=torch.ones(len(part), 1, dtype=torch.int32, device=model.device),
            mask_inputs=None,
            multimask_output=multimask_output,
        )
        yield part, low_res_masks, iou_predictions, mask_tokens


def make_point_grid(points_per_side: int, image_hw: tuple[int, int]) -> np.ndarray:
    """Spread points evenly over an image, row by row: the centres of points_per_side x points_per_side tiles.

    Returns:
        point_coords float64 (points_per_side**2, 2), (x, y) px of the image.
    """
    height, width = image_hw
    centres = (np.arange(points_per_side) + 0.5) / points_per_side
    ys, xs = np.meshgrid(centres * height, centres * width, indexing="ij")
    return np.stack([xs.ravel(), ys.ravel()], axis=1)


def make_crops(
    orig_hw: tuple[int, int], num_layers: int, overlap_ratio: float
) -> list[tuple[tuple[int, int, int, int], int]]:
    """List the parts of an image that are searched for masks: the image, then 4**layer overlapping crops a layer.

    Args:
        overlap_ratio: overlap of the first layer's crops, share of the image's shorter side; halved with each layer.
    Returns:
        (crop_xyxy, layer) for each: px, x2 and y2 not included.
    """
    height, width = orig_hw
    crops = [((0, 0, width, height), 0)]
    for layer in range(1, num_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(height, width) * 2 / per_side)
        crop_width = math.ceil((width + overlap * (per_side - 1)) / per_side)
        crop_height = math.ceil((height + overlap * (per_side - 1)) / per_side)
        for column in range(per_side):
            for row in range(per_side):
                x1, y1 = column * (crop_width - overlap), row * (crop_height - overlap)
                if x1 < width and y1 < height:  # of a picture of a few pixels
                    crops.append(((x1, y1, min(x1 + crop_width, width), min(y1 + crop_height, height)), layer))
    return crops


def is_cut_off(
    boxes_xyxy: torch.Tensor, crop_xyxy: tuple[int, int, int, int], orig_hw: tuple[int, int]
) -> torch.Tensor:
    """Tell which boxes touch an edge of their crop that is not an edge of the image.

    Args:
        boxes_xyxy: (K, 4), px of the crop.
    Returns:
        bool (K,).
    """
    corner, image = (*crop_xyxy[:2], *crop_xyxy[:2]), (0, 0, orig_hw[1], orig_hw[0])
    corner, crop, image = torch.tensor([corner, crop_xyxy, image], device=boxes_xyxy.device)
    boxes_in_image = boxes_xyxy + corner
    is_near_crop = (boxes_in_image - crop).abs() <= CROP_EDGE_TOLERANCE_PX  # (K, 4)
    is_near_image = (boxes_in_image - image).abs() <= CROP_EDGE_TOLERANCE_PX
    return (is_near_crop & ~is_near_image).any(1)


def is_kept_class(class_filter: ClassFilter, class_numbers: torch.Tensor, class_probs: torch.Tensor) -> torch.Tensor:
    """Tell which masks are kept by their class: int64 (K,), (K,) -> bool (K,)."""
    is_kept = class_probs >= class_filter.min_class_prob
    if class_filter.keep_classes is not None:
        places = [class_filter.head.names.index(name) for name in class_filter.keep_classes]
        is_kept &= torch.isin(class_numbers, torch.tensor(places, device=class_numbers.device))
    return is_kept


def score_mask(annotation: dict) -> float:
    """Score a mask for ranking: its predicted IoU, times the probability of its class where it has one."""
    return annotation["predicted_iou"] * annotation.get("class_prob", 1.0)


def suppress(
    boxes_xyxy: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor | None, max_iou: float
) -> torch.Tensor:
    """Suppress boxes (K, 4) that have a higher IoU than max_iou with a better one of their group (K,): places kept."""
    if groups is None:
        return nms(boxes_xyxy, scores, max_iou)
    return batched_nms(boxes_xyxy, scores, groups, max_iou)


def drop_duplicates(
    annotations: list[dict], scores: list[float], max_iou: float, across_classes: bool = True
) -> list[dict]:
    """Keep, of masks whose boxes have a higher IoU than max_iou, the one of the highest score; the first on a tie.

    Args:
        across_classes: False: masks are compared with those of their own "class" alone.
    """
    boxes_xywh = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32).reshape(-1, 4)
    groups = None
    if not across_classes:
        names = [annotation["class"] for annotation in annotations]
        groups = torch.tensor([sorted(set(names)).index(name) for name in names], dtype=torch.long)
    boxes_xyxy = box_convert(boxes_xywh, "xywh", "xyxy")
    best = suppress(boxes_xyxy, torch.tensor(scores, dtype=torch.float32), groups, max_iou)
    return [annotations[k] for k in best.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# low-resolution logits -> masks at full size


def bound_stability(low_res_masks: torch.Tensor, full_hw: tuple[int, int], offset: float) -> torch.Tensor:
    """Tell, at low resolution, how stable masks can be at full size at most.

    A pixel at full size lies between four low-resolution ones and has a value between theirs: it may be above the
    offset where the highest of them is, and is above -offset where the lowest is.

    Args:
        low_res_masks: float32 (K, h, w) logits.
        full_hw: size (H, W) that stability is measured at.
        offset: as in `measure_full_size`.
    Returns:
        float32 (K,), no less than the stability of `measure_full_size`.
    """
    padded = F.pad(low_res_masks[:, None], (1, 1, 1, 1), mode="replicate")
    highest = F.max_pool2d(padded, 2, stride=1)[:, 0]  # (K, h + 1, w + 1), of each four neighbours
    lowest = -F.max_pool2d(-padded, 2, stride=1)[:, 0]
    slack = ROUNDING * low_res_masks.abs().amax((1, 2), keepdim=True)
    rows, columns = (
        _count_between(low_size, full_size, low_res_masks.device)
        for low_size, full_size in zip(low_res_masks.shape[1:], full_hw, strict=True)
    )
    most_inner = (((highest > offset - slack) * columns).sum(2) * rows).sum(1)  # (K,) pixels
    least_outer = (((lowest > -offset + slack) * columns).sum(2) * rows).sum(1)
    return (most_inner / least_outer.clamp(min=1) * (1 + ROUNDING)).clamp(max=1)


@functools.lru_cache(maxsize=16)  # the same for all points of a crop; each copy to a device waits for it
def _count_between(low_size: int, full_size: int, device: torch.device) -> torch.Tensor:
    """Count the pixels at full size between each two at low resolution, and beyond the outermost.

    Returns:
        int32 (low_size + 1,), whose sum is full_size.
    """
    positions = (torch.arange(full_size, dtype=torch.float64) + 0.5) * low_size / full_size - 0.5
    following = (positions.floor().long() + 1).clamp(0, low_size)
    return torch.bincount(following, minlength=low_size + 1).int().to(device)


def measure_full_size(
    low_res_masks: torch.Tensor, full_hw: tuple[int, int], offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure masks as they are at full size: stability and box.

    Args:
        low_res_masks: float32 (K, h, w) logits.
        full_hw: the size to measure at.
        offset: stability is (pixels of logits > offset) / (pixels of logits > -offset), 0 where there are none.
    Returns:
        stability_scores float32 (K,), 0..1; boxes_xyxy float32 (K, 4), px, of the outermost pixels with logits > 0,
        zeros for an empty mask.
    """
    if low_res_masks.device.type == "cpu":
        measure = functools.partial(_measure_one, full_hw=full_hw, offset=offset)
        with start_threads() as threads:
            measured = list(threads.map(measure, low_res_masks.numpy()))
        measured = torch.tensor(measured, dtype=torch.float64).reshape(-1, 5)
    else:
        chunk = max(1, CHUNK_PIXELS // (full_hw[0] * full_hw[1]))
        parts = [_measure_chunk(masks, full_hw, offset) for masks in low_res_masks.split(chunk)]
        measured = torch.cat(parts) if parts else low_res_masks.new_zeros(0, 5)
    return measured[:, 0].float(), measured[:, 1:].float()


def _measure_one(low_res_mask: np.ndarray, full_hw: tuple[int, int], offset: float) -> tuple[float, ...]:
    """Measure one mask on the CPU: (stability, x1, y1, x2, y2)."""
    logits, (x, y) = upscale_part(low_res_mask, full_hw, -offset)
    num_outer = np.count_nonzero(logits > -offset)
    if num_outer == 0:
        return 0.0, 0, 0, 0, 0
    stability = np.count_nonzero(logits > offset) / num_outer
    box_x, box_y, width, height = cv2.boundingRect((logits > 0).view(np.uint8))
    if width == 0:
        return stability, 0, 0, 0, 0
    return stability, x + box_x, y + box_y, x + box_x + width - 1, y + box_y + height - 1


def _measure_chunk(low_res_masks: torch.Tensor, full_hw: tuple[int, int], offset: float) -> torch.Tensor:
    """Measure masks on any device, whole and together: (K, 5) as `_measure_one`."""
    logits = upscale_masks(low_res_masks[:, None], full_hw)[:, 0]  # (K, H, W)
    num_inner = (logits > offset).sum((1, 2))
    num_outer = (logits > -offset).sum((1, 2))
    mask = logits > 0
    axes = mask.any(1).to(torch.uint8), mask.any(2).to(torch.uint8)  # columns (K, W) and rows (K, H) that are used
    first = [used.argmax(1) for used in axes]
    last = [used.shape[1] - 1 - used.flip(1).argmax(1) for used in axes]
    boxes_xyxy = torch.stack([*first, *last], dim=1) * axes[0].amax(1, keepdim=True)  # zeros for an empty mask
    stability = num_inner.float() / num_outer.clamp(min=1)
    return torch.cat([stability[:, None], boxes_xyxy], dim=1)


def upscale_part(
    low_res_mask: np.ndarray, full_hw: tuple[int, int], floor: float
) -> tuple[np.ndarray, tuple[int, int]]:
    """Bring to full size the part of a mask's logits that can be above a floor; all the rest is at or below it.

    Args:
        low_res_mask: float32 (h, w) logits.
        full_hw: size (H, W) of the whole.
        floor: logits.
    Returns:
        float32 logits of the part, the values of the whole one's bilinear upscaling except where both are at or below
        the floor, and its corner (x, y) in px; the part is (0, 0) in size where nothing is above the floor.
    """
    column, row, width, height = cv2.boundingRect((low_res_mask > floor).view(np.uint8))
    if width == 0:
        return np.zeros((0, 0), np.float32), (0, 0)
    row1, row2, y1, y2 = _align(row, row + height, low_res_mask.shape[0], full_hw[0])
    column1, column2, x1, x2 = _align(column, column + width, low_res_mask.shape[1], full_hw[1])
    part = low_res_mask[row1:row2, column1:column2]
    return cv2.resize(part, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR), (x1, y1)


def _align(start: int, stop: int, low_size: int, full_size: int) -> tuple[int, int, int, int]:
    """Widen a range of low-resolution pixels by at least one, to where pixel edges of both resolutions meet.

    Returns:
        start and stop at low resolution, start and stop at full size; a resize of that part has the same sampling
        positions as a resize of the whole.
    """
    divisor = math.gcd(low_size, full_size)
    low_unit, full_unit = low_size // divisor, full_size // divisor
    first = max(0, (start - 1) // low_unit)
    last = min(divisor, -(-(stop + 1) // low_unit))
    return first * low_unit, last * low_unit, first * full_unit, last * full_unit


def annotate_masks(
    low_res_masks: torch.Tensor,
    predicted_ious: torch.Tensor,
    stability_scores: torch.Tensor,
    point_coords: list[list[list[float]]],
    crop_xyxy: tuple[int, int, int, int],
    orig_hw: tuple[int, int],
    min_region_area: int,
) -> list[dict]:
    """Annotate K masks as `annotate_mask` does, after one copy of all from their device, in threads.

    Args:
        low_res_masks: float32 (K, h, w) logits, of the crop.
        predicted_ious, stability_scores: float32 (K,).
        point_coords: K lists of [x, y] px of the image.
    """
    scores = torch.stack([predicted_ious, stability_scores]).tolist()  # waits once for the device, not for each mask
    masks = low_res_masks.cpu().numpy()
    shared = repeat(crop_xyxy), repeat(orig_hw), repeat(min_region_area)
    with start_threads() as threads:
        return list(threads.map(annotate_mask, masks, *scores, point_coords, *shared))


def annotate_mask(
    low_res_mask: np.ndarray,
    predicted_iou: float,
    stability_score: float,
    point_coords: list[list[float]],
    crop_xyxy: tuple[int, int, int, int],
    orig_hw: tuple[int, int],
    min_region_area: int,
) -> dict:
    """Turn a decoded mask into a record of SA-1B's kind.

    Args:
        low_res_mask: float32 (h, w) logits, of the crop.
        point_coords: [[x, y], ...] px of the image; SA-1B has one point each.
        crop_xyxy: the part of the image that was encoded, px, x2 and y2 not included.
        min_region_area: islands and holes of fewer pixels go; 0 leaves the mask as it is.
    Returns:
        segmentation (COCO run lengths of the whole image), area px, bbox (x, y, w, h) as `box_xywh` where w and h are
        the distances between the outermost pixels, predicted_iou, stability_score, point_coords, and crop_box
        (x, y, w, h): SA-1B's keys less `id`.
    """
    x1, y1, x2, y2 = crop_xyxy
    logits, (x, y) = upscale_part(low_res_mask, (y2 - y1, x2 - x1), 0.0)
    part = logits > 0
    if min_region_area > 0 and part.size:
        part = remove_small_regions(part, min_region_area)
    mask = np.zeros(orig_hw, bool, order="F")  # run lengths go down the columns
    mask[y1 + y : y1 + y + part.shape[0], x1 + x : x1 + x + part.shape[1]] = part
    box_x, box_y, width, height = cv2.boundingRect(part.view(np.uint8)) if part.size else (0, 0, 0, 0)
    return {
        "segmentation": mask_to_rle(mask),
        "area": int(np.count_nonzero(part)),
        "bbox": [float(v) for v in (x1 + x + box_x, y1 + y + box_y, max(0, width - 1), max(0, height - 1))],
        "predicted_iou": predicted_iou,
        "stability_score": stability_score,
        "point_coords": point_coords,
        "crop_box": [float(v) for v in (x1, y1, x2 - x1, y2 - y1)],
    }


def remove_small_regions(mask: np.ndarray, min_region_area: int) -> np.ndarray:
    """Fill the small holes of a mask, then remove its small islands; the largest island always stays.

    Args:
        mask: bool (H, W). Background that touches the border of the array is no hole.
        min_region_area: px; regions of fewer are small. Pixels that touch by a corner are of one region.
    Returns:
        bool (H, W).
    """
    num_regions, regions, stats, _ = cv2.connectedComponentsWithStats((~mask).view(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    is_hole = (areas < min_region_area) & ~np.isin(np.arange(num_regions), border)
    is_hole[0] = False  # region 0 is the mask itself
    mask = mask | is_hole[regions]

    num_regions, regions, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    if num_regions == 1:
        return mask
    areas = stats[:, cv2.CC_STAT_AREA]
    is_kept = areas >= min(min_region_area, areas[1:].max())
    is_kept[0] = False  # region 0 is the background
    return is_kept[regions]


# ---------------------------------------------------------------------------------------------------------------------
# masks -> label map, region -> points


def stitch_masks(
    segmentations: list[dict],
    scores: list[float],
    orig_hw: tuple[int, int],
    max_overlap: float = 0.15,
    classes: list[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Lay masks into one label map, from the highest score to the lowest.

    A mask of which more than max_overlap is taken already is dropped, else it gets its free pixels; an empty mask, and
    one without a free pixel, gets no id.

    Args:
        segmentations: N masks as COCO run lengths (compressed), each of the whole image.
        scores: N; of equal ones the earlier mask goes first.
        orig_hw: size (H, W) of the image.
        max_overlap: share of a mask's own area, 0..1.
        classes: N; what counts as taken is what masks of the same class have; None: what any have.
    Returns:
        label_map int32 (H, W), 0 where there is no mask; ids int32 (N,), the id of each mask, 1, 2, ... by score, and
        0 for a dropped one.
    """
    height, width = orig_hw
    columns = np.zeros(height * width, np.int32)  # the label map in the order of run lengths: column after column
    ids = np.zeros(len(segmentations), np.int32)
    class_of_mask = np.unique(classes or [""] * len(ids), return_inverse=True)[1]
    class_of_id = np.full(len(segmentations) + 1, -1)  # id 0 is of none
    next_id = 1
    for index in np.argsort(-np.asarray(scores, np.float64), kind="stable"):
        rle = segmentations[index]
        if list(rle["size"]) != [height, width]:
            raise ValueError(f"a mask has size {list(rle['size'])}; the label map is [{height}, {width}]")
        counts = decode_rle_counts(rle["counts"])  # lengths of runs, the first of zeros
        area = int(counts[1::2].sum())
        num_runs = len(counts) // 2 * 2  # without a last run of zeros
        first, last = int(counts[0]), int(counts[:num_runs].sum())
        is_mask = np.repeat(np.arange(1, num_runs) % 2 == 1, counts[1:num_runs])  # for columns[first:last]
        part = columns[first:last]
        is_free = is_mask & (part == 0)
        num_free = int(np.count_nonzero(is_free))
        num_taken = area - num_free
        if classes is not None:
            num_taken = int(np.count_nonzero(class_of_id[part[is_mask]] == class_of_mask[index]))
        if num_free == 0 or num_taken > max_overlap * area:  # an empty mask has no free pixel
            continue
        part[is_free] = next_id
        class_of_id[next_id] = class_of_mask[index]
        ids[index] = next_id
        next_id += 1
    return np.ascontiguousarray(columns.reshape(width, height).T), ids


def sample_points_in_mask(mask: np.ndarray, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """Draw pixels of a mask at random, each at most once as long as there are enough.

    Args:
        mask: bool (H, W), not empty.
    Returns:
        point_coords float32 (num_points, 2), (x, y) px.
    """
    ys, xs = np.nonzero(mask)
    chosen = rng.choice(len(xs), size=num_points, replace=num_points > len(xs))
    return np.stack([xs[chosen], ys[chosen]], axis=1).astype(np.float32)
