"""Pictures of tracked boxes: over a frame, side by side on a sheet; and curves of scores."""

import math
from pathlib import Path

import cv2
import numpy as np

from utils.images import id_colors
from utils.tracking import siamfc
from utils.tracking.metrics import PRECISION_THRESHOLDS, SUCCESS_THRESHOLDS, box_iou
from utils.tracking.sequences import Sequence

LOST_RGB = (150, 150, 150)
TRUTH_RGB, TRACKED_RGB = (0, 220, 0), (255, 40, 40)
SHEET_COLUMNS, SHEET_TILE_WIDTH = 4, 320  # tiles, px
MAX_DRAWN_PX = 1e6  # boxes in mode parity may lie anywhere; OpenCV draws within 32 bits


def draw_boxes(frame: np.ndarray, boxes_xywh: np.ndarray, scores: np.ndarray, is_lost: np.ndarray) -> np.ndarray:
    """Draw objects over a frame: a colour each with the score, grey and the word "lost" where it seems lost.

    Args:
        frame: uint8 (H, W, 3) RGB; it stays as it is.
        boxes_xywh, scores, is_lost: (N, 4), (N,), (N,); a score of nan says that this frame could not be read.
    """
    image_rgb = frame.copy()
    colors = id_colors(np.arange(2, len(boxes_xywh) + 2)).tolist()  # the first id's dark blue is hard to see
    for n, (box_xywh, score, lost) in enumerate(zip(boxes_xywh, scores, is_lost, strict=True)):
        text = [str(n + 1)] if len(boxes_xywh) > 1 else []
        text += ["not read" if math.isnan(score) else f"{score:.2f}"]
        text += ["lost"] if lost else []
        color = LOST_RGB if lost else tuple(colors[n])
        draw_box(image_rgb, box_xywh, color)
        if np.isfinite(box_xywh).all():  # else it is not there so far
            draw_text(image_rgb, " ".join(text), box_xywh, color)
    return image_rgb


def draw_box(image_rgb: np.ndarray, box_xywh: np.ndarray, color: tuple[int, int, int]) -> None:
    """Draw a box's outline, placed to 1/16 px, into a picture; nothing for nan."""
    if not np.isfinite(box_xywh).all():
        return
    x, y, width, height = box_xywh
    corners = np.clip([[x, y], [x + width - 1, y + height - 1]], -MAX_DRAWN_PX, MAX_DRAWN_PX)  # the outermost pixels
    first, last = (tuple(round(16 * value) for value in corner) for corner in corners.tolist())
    thickness = line_width(image_rgb)
    cv2.rectangle(image_rgb, first, last, (0, 0, 0), thickness + 2, cv2.LINE_AA, shift=4)  # visible on any ground
    cv2.rectangle(image_rgb, first, last, color, thickness, cv2.LINE_AA, shift=4)


def draw_response(
    image_rgb: np.ndarray, frame: np.ndarray, center_xy: np.ndarray, side: float, response: np.ndarray
) -> None:
    """Draw into a picture's top left corner what the network saw, and over it, from blue to red, what it answered.

    Args:
        image_rgb: uint8 (H, W, 3), the picture; it is changed.
        frame: uint8 (H, W, 3), without anything drawn on it.
        center_xy, side: of the square that was searched, px of the frame.
        response: (r, r) logits; a cell is TOTAL_STRIDE px of the instance.
    """
    patch = siamfc.crop_and_resize(frame, center_xy, side, siamfc.INSTANCE_SIZE, siamfc.mean_color(frame))
    covered = response.shape[0] * siamfc.TOTAL_STRIDE
    spread = float(response.max() - response.min())
    levels = np.rint(255 * (response - response.min()) / spread if spread else 0 * response).astype(np.uint8)
    heat = cv2.applyColorMap(cv2.resize(levels, (covered, covered), interpolation=cv2.INTER_CUBIC), cv2.COLORMAP_JET)
    first = (len(patch) - covered) // 2
    inside = patch[first : first + covered, first : first + covered]
    inside[:] = cv2.addWeighted(inside, 0.5, cv2.cvtColor(heat, cv2.COLOR_BGR2RGB), 0.5, 0)
    shown_px = max(1, min(image_rgb.shape[:2]) // 3)
    image_rgb[:shown_px, :shown_px] = cv2.resize(patch, (shown_px, shown_px), interpolation=cv2.INTER_AREA)
    cv2.rectangle(image_rgb, (0, 0), (shown_px - 1, shown_px - 1), (255, 255, 255), 1)


def draw_text(image_rgb: np.ndarray, text: str, box_xywh: np.ndarray, color: tuple[int, int, int]) -> None:
    """Write above a box, or as near as the picture allows, on black; (0, 0, 0, 0) is the picture's corner."""
    height, width = image_rgb.shape[:2]
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, max(0.45, min(height, width) / 900)
    thickness = max(1, round(scale))
    (text_width, text_height), below = cv2.getTextSize(text, font, scale, thickness)
    x = round(min(max(float(box_xywh[0]), 0), max(0, width - text_width)))
    y = round(min(max(float(box_xywh[1]) - below - 2, text_height), height - below))  # the letters' foot
    cv2.rectangle(image_rgb, (x, y - text_height), (x + text_width, y + below), (0, 0, 0), cv2.FILLED)
    cv2.putText(image_rgb, text, (x, y), font, scale, color, thickness, cv2.LINE_AA)


def line_width(image_rgb: np.ndarray) -> int:
    """Choose how thick lines are in a picture, px."""
    return max(2, round(min(image_rgb.shape[:2]) / 300))


def draw_sheet(frames: dict[int, np.ndarray], boxes_xywh: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Draw a sequence's frames side by side, with groundtruth in green, the tracked box in red, and their number.

    Args:
        frames: {index: uint8 (H, W, 3) RGB}.
        boxes_xywh, truth: (T, 4) px, 0-based.
    Returns:
        uint8 (H', W', 3) RGB.
    """
    first_height, first_width = next(iter(frames.values())).shape[:2]
    tile_hw = max(1, round(first_height * SHEET_TILE_WIDTH / first_width)), SHEET_TILE_WIDTH
    tiles = []
    for index, frame in sorted(frames.items()):
        to_tile = np.array([tile_hw[1] / frame.shape[1], tile_hw[0] / frame.shape[0]] * 2)
        tile = cv2.resize(frame, tile_hw[::-1], interpolation=cv2.INTER_AREA)
        draw_box(tile, truth[index] * to_tile, TRUTH_RGB)
        draw_box(tile, boxes_xywh[index] * to_tile, TRACKED_RGB)
        draw_text(tile, str(index), np.zeros(4), (255, 255, 255))
        tiles.append(tile)
    columns = min(SHEET_COLUMNS, len(tiles))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[first : first + columns], 1) for first in range(0, len(tiles), columns)]
    return np.concatenate(rows)


def plot_scores(
    boxes_xywh: np.ndarray, scores: np.ndarray, is_lost: np.ndarray, sequence: Sequence, path: Path
) -> None:
    """Draw score and IoU against the frame; frames in which the object seems lost are marked.

    Args:
        boxes_xywh, scores, is_lost: (T, 4) px, 0-based; (T,); bool (T,).
    """
    from matplotlib.figure import Figure  # slow to import

    frames = np.arange(len(sequence))
    iou = np.where(sequence.visible, box_iou(boxes_xywh, sequence.boxes_xywh), np.nan)
    is_marked = is_lost & (frames >= sequence.visible.argmax())
    figure = Figure(figsize=(9, 3), layout="constrained")
    ax = figure.subplots()
    ax.plot(frames, scores, label="score", color="tab:blue")
    ax.plot(frames, iou, label="IoU", color="tab:green")
    ax.plot(frames[is_marked], np.zeros(is_marked.sum()), "x", label="seems lost", color="tab:red")
    ax.set_title(sequence.name, parse_math=False)
    ax.set(xlabel="frame", ylim=(-0.05, max(1.05, np.nanmax(scores) + 0.05)))
    ax.grid(alpha=0.3)
    ax.legend(loc="upper right")
    figure.savefig(path, dpi=100)


def plot_curves(means: list[dict], protocol: str, run_dir: Path) -> None:
    """Draw success.png and precision.png: a curve for each tracker, best first, with its score in the legend."""
    from matplotlib.figure import Figure  # slow to import

    for kind, score, thresholds, label in (
        ("success", "success_auc", SUCCESS_THRESHOLDS, "IoU above"),
        ("precision", "precision_20", PRECISION_THRESHOLDS, "centre at most so many px off"),
    ):
        figure = Figure(figsize=(6, 5), layout="constrained")
        ax = figure.subplots()
        rows = sorted(means, key=lambda row: -row[score])
        for row in rows:
            ax.plot(thresholds, row[f"{kind}_curve"], label=score)
        ax.set(title=f"{kind}, {row['sequence']} sequences", xlabel=label, ylabel="share of frames", ylim=(0, 1.02))
        ax.grid(alpha=0.3)
        legend = ax.legend(title=f"{score}, protocol {protocol}")
        for text, row in zip(legend.get_texts(), rows, strict=True):  # as label= a name may start no _, nor have two $
            text.set_parse_math(False)
            text.set_text(f"{row['tracker']} [{row[score]:.3f}]")
        figure.savefig(run_dir / f"{kind}.png", dpi=100)
