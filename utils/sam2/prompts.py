"""Simulated user prompts: first click, noised box, correction clicks for training, centre clicks for evaluation.

Points are (x, y) pixels, 0-based, of the frame their mask lies in; labels are 1 foreground, 0 background, 2 and 3 the
corners of a box.
"""

import cv2
import numpy as np
import torch

from utils.images import mask_to_box

BOX_NOISE = 0.1  # share of the box's side (SAM paper, appendix A)
BOX_NOISE_MAX_PX = 20.0  # in the 1024 x 1024 px input


def random_point(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one uniform point of a mask.

    Args:
        mask: bool (H, W), not empty.
        rng: the sample's own generator.
    Returns:
        float32 (2,), (x, y) pixels of the mask's frame.
    """
    flat_index = np.flatnonzero(mask)
    y, x = divmod(int(flat_index[rng.integers(len(flat_index))]), mask.shape[1])
    return np.array([x, y], np.float32)


def background_points(
    layers: np.ndarray, ignored: np.ndarray | None, num_points: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw uniform points where no object lies.

    Args:
        layers: int32 (L, H, W), id layers.
        ignored: bool (H, W), where the annotation does not say what lies there, such as crowds; None: nowhere.
        num_points: how many; there are none where objects fill the picture.
    Returns:
        float32 (K, 2), (x, y) pixels of the picture; K is num_points or 0.
    """
    is_taken = layers.any(0) if ignored is None else layers.any(0) | ignored
    flat_index = np.flatnonzero(~is_taken)
    chosen = flat_index[rng.integers(len(flat_index), size=num_points)] if len(flat_index) else flat_index
    return np.stack([chosen % layers.shape[2], chosen // layers.shape[2]], 1).astype(np.float32)


def noised_box(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a user's box: each side moved uniformly by up to 10 % of the box's side, at most 20 px of 1024.

    Args:
        mask: bool (H, W) of the whole picture, not empty.
        rng: the sample's own generator.
    Returns:
        float32 (4,), x1, y1, x2, y2, inside the picture.
    Source: SAM paper, appendix A; SAM 2's training (uniform rather than Gaussian noise).
    """
    x1, y1, x2, y2 = box = mask_to_box(mask)
    height, width = mask.shape
    # none for one pixel, whose corners would change places
    limit_x = min((x2 - x1) * BOX_NOISE, BOX_NOISE_MAX_PX * width / 1024)
    limit_y = min((y2 - y1) * BOX_NOISE, BOX_NOISE_MAX_PX * height / 1024)
    box = box + rng.uniform(-1, 1, 4) * [limit_x, limit_y, limit_x, limit_y]
    return box.clip(0, [width - 1, height - 1, width - 1, height - 1]).astype(np.float32)


def random_correction_points(
    masks: torch.Tensor, pred_masks: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one click per object, uniform over its error region: positive where missed, negative where overpainted.

    A perfect prediction gets a negative click in the background, as SAM 2's training does; where the object also fills
    the whole frame, a positive click.

    Args:
        masks: bool (O, H, W), truth.
        pred_masks: bool (O, H, W).
        uniform: (O,) in [0, 1), one random number per object: the draw is a function of it.
    Returns:
        point_coords float32 (O, 1, 2) in the masks' frame, point_labels int32 (O, 1).
    """
    width = masks.shape[-1]
    region = (masks ^ pred_masks).flatten(1)  # (O, H*W)
    region = torch.where(region.any(1, keepdim=True), region, ~masks.flatten(1))
    region = torch.where(region.any(1, keepdim=True), region, True)
    counts = region.cumsum(1)  # (O, H*W), how many region pixels up to and with this one
    num_pixels = counts[:, -1]  # (O,), of the region
    rank = (uniform.to(counts.device) * num_pixels).long().clamp(max=num_pixels - 1) + 1  # (O,) in 1..num_pixels
    flat_index = torch.searchsorted(counts, rank[:, None]).squeeze(1)  # first pixel with that count
    point_coords = torch.stack([flat_index % width, flat_index // width], dim=1).float()
    is_positive = masks.flatten(1).gather(1, flat_index[:, None])  # missed pixels are foreground by definition
    return point_coords[:, None], is_positive.int()


def center_point(mask: np.ndarray, pred_mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Find the evaluation click: the point of the larger error region farthest from that region's border.

    Args:
        mask: bool (H, W), truth.
        pred_mask: bool (H, W); all False for the first click.
    Returns:
        (x, y) float32 (2,) in the mask's frame, and its label: 1 where foreground was missed, 0 where overpainted.
    Source: RITM (Sofiiuk et al. 2021); SAM 2's `sample_one_point_from_error_center`.
    """
    (missed_depth, missed_xy), (overpainted_depth, overpainted_xy) = (
        _deepest_pixel(mask & ~pred_mask),
        _deepest_pixel(pred_mask & ~mask),
    )
    label = int(missed_depth > overpainted_depth)
    return np.array(missed_xy if label else overpainted_xy, np.float32), label


def _deepest_pixel(region: np.ndarray) -> tuple[float, tuple[int, int]]:
    """Find the pixel of a region, bool (H, W), that is farthest from all others, the frame's surroundings among them.

    Only the region's bounding box is looked at: the nearest pixel outside the region lies in it or touches it.

    Returns:
        squared distance in px^2, and (x, y) of the first such pixel row by row; 0 and (0, 0) for an empty region.
    """
    left, top, width, height = cv2.boundingRect(region.view(np.uint8))
    if width == 0:
        return 0.0, (0, 0)
    part = np.pad(region[top : top + height, left : left + width].view(np.uint8), 1)
    # squared, px^2: whole numbers, where OpenCV 5's roots differ from call to call
    depth = np.rint(np.square(cv2.distanceTransform(part, cv2.DIST_L2, 0)))
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return depth[y, x], (left + x - 1, top + y - 1)
