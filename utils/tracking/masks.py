"""Masks of tracked objects: each frame is encoded once by SAM 2, and each object's box prompts a mask.

This file alone joins the tracker and SAM 2.

Sources: Ravi et al. 2024 (SAM 2); DAVIS (Perazzi et al. 2016) for the files, <frame>.png with a palette.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils.images import mask_to_box, overlay_label_map
from utils.instances.codecs import mask_to_rle
from utils.listing import existing_file, read_json
from utils.run import autocast
from utils.sam2 import evaluation
from utils.sam2 import model as models
from utils.sam2.mask_generation import upscale_part
from utils.settings import Rule, is_numbers
from utils.tracking.frames import FrameSource
from utils.tracking.tracker import MIN_BOX_PX, Target, TrackedFrame

PALETTE_COLORS = 255  # ids that a palette PNG holds
FARTHEST_PX = 1e7  # of a prompt: beyond, float32 does not hold a pixel
FEEDBACK_LIMIT = 1.5  # a factor of scale between box and mask
MULTIPLE_OF_32 = Rule(lambda side: side >= 32 and side % 32 == 0, "a multiple of 32")


@dataclass(frozen=True)
class Sam2Settings:
    """Which SAM 2 makes the masks (`sam2:`)."""

    checkpoint: str | None = None  # as infer_sam2.py's; none: random weights
    model: str | None = None  # a name in configs/sam2/model
    image_size: Annotated[int | None, MULTIPLE_OF_32] = None  # px


class Segmenter(NamedTuple):
    """A SAM 2 model and how it computes."""

    model: torch.nn.Module
    precision: str


class FrameMasks(NamedTuple):
    """The masks of N objects in one frame."""

    label_map: np.ndarray | None  # int32 (H, W): 1 to N, 0 where no object is; overlaps go to the higher predicted IoU
    segmentations: list[dict | None]  # COCO run lengths of each whole mask; None where an object has none
    predicted_ious: np.ndarray  # float64 (N,); nan where an object has no mask
    boxes_xywh: np.ndarray  # float64 (N, 4), tight boxes of the whole masks, px; nan likewise


def load_segmenter(settings: Sam2Settings, device: torch.device, precision: str) -> Segmenter:
    """Build the model that the settings name, the bundled nano by default.

    Raises:
        FileNotFoundError, ValueError: as `choose_model` and `build_sam2`; for a name that is no model.
    """
    named = None if settings.model is None else models.read_model_config(settings.model)
    model_config = models.choose_model(settings.checkpoint, settings.image_size, named)
    model = models.build_sam2(**model_config, device=device, fast_decoder=device.type == "cpu")
    return Segmenter(model, precision)


@torch.inference_mode()
def segment_boxes(segmenter: Segmenter, frame: np.ndarray, boxes_xywh: np.ndarray, is_there: np.ndarray) -> FrameMasks:
    """Make the masks of the objects in one frame from their boxes.

    Args:
        frame: uint8 (H, W, 3) RGB.
        boxes_xywh: float (N, 4) px, 0-based; parts beyond the frame are cut off.
        is_there: bool (N,); objects that are not, and those whose box does not meet the frame, get no mask.
    """
    height, width = frame.shape[:2]
    label_map = np.zeros((height, width), np.int32)
    segmentations: list[dict | None] = [None] * len(boxes_xywh)
    predicted_ious, mask_boxes = np.full(len(boxes_xywh), np.nan), np.full((len(boxes_xywh), 4), np.nan)
    corners = cut_boxes(boxes_xywh, (height, width))  # (N, 4)
    places = np.flatnonzero(is_there & np.isfinite(corners).all(1))
    if not len(places):
        return FrameMasks(label_map, segmentations, predicted_ious, mask_boxes)
    model = segmenter.model
    with autocast(model.device, segmenter.precision):
        embeddings = models.encode(model, models.preprocess(frame, model.image_size, model.device)[None])
    low_res_masks, iou_predictions, _ = evaluation.predict_from_boxes(
        model, embeddings, corners[places], None, (height, width), segmenter.precision
    )
    logits, scores = low_res_masks[:, 0].float().cpu().numpy(), iou_predictions[:, 0].float().cpu().numpy()
    for number in np.argsort(scores, kind="stable"):  # the best last, on top
        place = int(places[number])
        part, (x, y) = upscale_part(logits[number], (height, width), 0.0)
        mask = np.zeros((height, width), bool, order="F")  # run lengths go down the columns
        mask[y : y + part.shape[0], x : x + part.shape[1]] = part > 0
        if not mask.any():
            continue
        label_map[mask] = place + 1
        segmentations[place], predicted_ious[place] = mask_to_rle(mask), scores[number]
        x1, y1, x2, y2 = mask_to_box(mask)
        mask_boxes[place] = x1, y1, x2 - x1 + 1, y2 - y1 + 1
    return FrameMasks(label_map, segmentations, predicted_ious, mask_boxes)


def cut_boxes(boxes_xywh: np.ndarray, frame_hw: tuple[int, int]) -> np.ndarray:
    """Cut boxes to a frame: float32 (N, 4), the outermost pixels x1, y1, x2, y2, as SAM 2 is prompted; nan outside."""
    x, y, width, height = np.asarray(boxes_xywh, np.float64).T
    corners = np.stack([x, y, x + width - 1, y + height - 1], 1)
    limit = np.array([frame_hw[1] - 1, frame_hw[0] - 1] * 2, np.float64)
    is_outside = (corners[:, 2:] < 0).any(1) | (corners[:, :2] > limit[:2]).any(1)
    corners = np.clip(corners, 0, limit)
    corners[is_outside] = np.nan
    return corners.astype(np.float32)


def follow_mask(target: Target, mask_box_xywh: np.ndarray, share: float) -> None:
    """Bring a tracked object's scale nearer to that of its mask.

    Args:
        target: of SiamFCTracker; its size and search window are scaled together.
        mask_box_xywh: (4,) px; nan: nothing is changed.
        share: of the difference in scale that is followed, 0..1; a mask that is off by more than FEEDBACK_LIMIT is not
            believed.
    """
    if not np.isfinite(mask_box_xywh).all():
        return
    ratio = float(np.sqrt(np.prod(mask_box_xywh[2:]) / np.prod(target.size_wh.astype(np.float64))))
    if not 1 / FEEDBACK_LIMIT <= ratio <= FEEDBACK_LIMIT:
        return
    factor = ratio**share
    target.size_wh = (target.size_wh.astype(np.float64) * factor).astype(np.float32)
    target.side *= factor


def write_mask(path: Path, label_map: np.ndarray) -> None:
    """Write a frame's label map as DAVIS does, 8 bits with a palette; other ids than 0 to 255 as 16 bits without."""
    if label_map.max(initial=0) > PALETTE_COLORS:
        Image.fromarray(label_map.astype(np.uint16)).save(path)
        return
    picture = Image.fromarray(label_map.astype(np.uint8), "P")
    picture.putpalette(davis_palette().ravel().tolist())
    picture.save(path)


def davis_palette() -> np.ndarray:
    """Return the palette of DAVIS and PASCAL VOC, uint8 (256, 3): ids by their bits."""
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def draw_masks(frame: np.ndarray, label_map: np.ndarray) -> np.ndarray:
    """Draw masks over a frame, uint8 (H, W, 3), in the colours in which `drawing.draw_boxes` draws their boxes."""
    return overlay_label_map(frame, label_map, np.arange(1, label_map.max(initial=0) + 2))


# ---------------------------------------------------------------------------------------------------------------------
# SAM 2's own memory


class FramePrompt(NamedTuple):
    """What is said of one object in one frame."""

    place: int  # the object's, from 0
    point_coords: np.ndarray  # float32 (P, 2), (x, y) px of the frame; a box is two points, its corners, put first
    point_labels: np.ndarray  # int32 (P,): 1 object, 0 not, 2 and 3 the corners of a box


Prompts = dict[int, list[FramePrompt]]  # by frame, from 0


def prompt_boxes(boxes_xywh: np.ndarray) -> Prompts:
    """Make the prompts of boxes in the first frame, float (N, 4) px, 0-based; ValueError for one that is none."""
    for number, box_xywh in enumerate(np.asarray(boxes_xywh, np.float64).tolist(), 1):
        is_finite = all(map(math.isfinite, box_xywh))
        if not is_finite or min(box_xywh[2:]) < MIN_BOX_PX or max(map(abs, box_xywh)) > FARTHEST_PX:
            raise ValueError(
                f"box {number} of {len(boxes_xywh)} is {box_xywh}; must be x, y, width, height px, finite, at most "
                f"{FARTHEST_PX:g}, the last two above 0"
            )
    x, y, width, height = np.asarray(boxes_xywh, np.float64).T
    corners = np.stack([x, y, x + width - 1, y + height - 1], 1).reshape(-1, 2, 2)  # the outermost pixels
    labels = np.array([2, 3], np.int32)
    return {0: [FramePrompt(place, each, labels) for place, each in enumerate(corners.astype(np.float32))]}


def read_prompts(path: Path, box_origin: int, source: FrameSource) -> tuple[Prompts, int]:
    """Read the prompts of objects from a json file (see the top of track.py): they, and the number of objects.

    Args:
        box_origin: 0 or 1, what its pixels are counted from.
        source: whose frames are meant.
    Raises:
        FileNotFoundError, ValueError: for a file that is not there; naming the entry that is wrong.
    """
    entries = read_json(existing_file(path, "objects"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'objects {path} must hold a list of [{{"id": 1, "frame": 0, "box": [x, y, w, h]}}, ...]')
    prompts: Prompts = {}
    seen: set[tuple[int, int]] = set()
    for number, entry in enumerate(entries, 1):
        where = f"objects {path}, entry {number}"
        if not isinstance(entry, dict) or not {"id", "frame"} <= set(entry) <= {"id", "frame", "box", "points"}:
            raise ValueError(f"{where} is {entry}; must have id, frame, and box or points, and nothing else")
        object_id, frame = entry["id"], entry["frame"]
        for key, least in (("id", 1), ("frame", 0)):
            if type(entry[key]) is not int or entry[key] < least:
                raise ValueError(f"{where}: {key} is {entry[key]}; must be a whole number from {least}")
        if source.num_frames is not None and frame >= source.num_frames:
            raise ValueError(f"{where}: frame is {frame}, but {source.name} has {source.num_frames}, from 0")
        if (object_id, frame) in seen:
            raise ValueError(f"{where}: object {object_id} has an entry for frame {frame} already; join them")
        seen.add((object_id, frame))
        coords, labels = _read_prompt(entry, box_origin, where)
        prompts.setdefault(frame, []).append(FramePrompt(object_id - 1, coords, labels))
    ids = {object_id for object_id, _ in seen}
    num_objects = len(ids)
    if missing := [each for each in range(1, num_objects + 1) if each not in ids]:
        raise ValueError(f"objects {path} has no object {missing[0]}; ids must be 1 to N")
    for object_id in range(1, num_objects + 1):
        first = min(frame for each, frame in seen if each == object_id)
        start = next(prompt for prompt in prompts[first] if prompt.place == object_id - 1)
        if not {1, 2} & set(start.point_labels.tolist()):
            raise ValueError(f"objects {path}: object {object_id} starts with no box and no point of label 1")
    return prompts, num_objects


def _read_prompt(entry: dict, box_origin: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the box and the points of an entry: float32 (P, 2) px, 0-based, and int32 (P,)."""
    coords, labels = [], []
    if (box := entry.get("box")) is not None:
        if not is_numbers(box, 4) or min(box[2:]) <= 0 or max(map(abs, box)) > FARTHEST_PX:
            raise ValueError(
                f"{where}: box is {box}; must be [x, y, width, height] px, up to {FARTHEST_PX:g}, the last two above 0"
            )
        x, y, width, height = box
        coords += [[x, y], [x + width - 1, y + height - 1]]
        labels += [2, 3]
    points = entry.get("points") or []
    if not isinstance(points, list):
        raise ValueError(f"{where}: points is {points}; must be a list of [x, y, label]")
    for point in points:
        if not is_numbers(point, 3) or point[2] not in (0, 1) or max(map(abs, point)) > FARTHEST_PX:
            raise ValueError(
                f"{where}: point is {point}; must be [x, y, label], px up to {FARTHEST_PX:g}, with label 1 (object) "
                "or 0 (not)"
            )
        coords.append(point[:2])
        labels.append(int(point[2]))
    if not coords:
        raise ValueError(f"{where} has neither a box nor points")
    return (np.array(coords, np.float64) - box_origin).astype(np.float32), np.array(labels, np.int32)


def follow_objects(
    segmenter: Segmenter, frames: FrameSource, prompts: Prompts, num_objects: int
) -> Iterator[tuple[TrackedFrame, FrameMasks | None]]:
    """Follow objects with SAM 2's memory from the first frame to the last, one frame at a time.

    A frame that cannot be read is passed over, all objects in it lost; its prompts are, too. `frames.problem` says so,
    and of prompts of frames that the video turns out not to have.

    Yields:
        a TrackedFrame for each frame, with the tight boxes of the masks, the probability of each object to be seen, and
        lost where that is at most 0.5 or there is no mask; and the masks, None where the frame cannot be read.
    Raises:
        ValueError: where the first frame cannot be read; for a prompt outside its frame; for a model without memory.
            OSError: likewise.
    """
    tracker = MemoryTracker(segmenter, num_objects, frames.num_frames)
    boxes_xywh = np.full((num_objects, 4), np.nan)
    nothing, index, lines = np.full(num_objects, np.nan), -1, []
    for index, frame, error in frames:
        if error is not None and index == 0:
            raise error
        if error is not None:
            lines += [
                f"{frames.frame_name(index)} cannot be read, and with it the prompt of object {prompt.place + 1}"
                for prompt in prompts.get(index, [])
            ]
            tracker.next_index += 1
            is_lost = np.ones(num_objects, bool)
            yield TrackedFrame(index, None, boxes_xywh.copy(), nothing, is_lost, math.nan, error), None
            continue
        start = time.perf_counter()
        has_started = [bool(bank["cond_frame_outputs"]) for bank in tracker.banks]
        now = [  # what would correct an object whose first prompt is lost does not start it
            prompt
            for prompt in prompts.get(index, [])
            if has_started[prompt.place] or {1, 2} & set(prompt.point_labels.tolist())
        ]
        for prompt in now:
            height, width = frame.shape[:2]
            is_in = (prompt.point_coords > -1) & (prompt.point_coords < [width, height])
            is_corner = np.isin(prompt.point_labels, (2, 3))
            meets = np.isfinite(cut_boxes(corners_to_xywh(prompt.point_coords[is_corner]), (height, width))).all()
            if not is_in[~is_corner].all() or not meets:
                raise ValueError(
                    f"{frames.frame_name(index)}: a prompt of object {prompt.place + 1} lies outside the frame of "
                    f"{width} x {height} px"
                )
        frame_masks, scores = tracker.step(frame, now)
        has_mask = np.isfinite(frame_masks.boxes_xywh).all(1)
        boxes_xywh[has_mask] = frame_masks.boxes_xywh[has_mask]
        is_lost = ~((scores > 0.5) & has_mask)
        time_s = time.perf_counter() - start
        yield TrackedFrame(index, frame, boxes_xywh.copy(), scores, is_lost, time_s, None), frame_masks
    if late := [frame for frame in prompts if frame > index]:
        lines.append(f"objects has an entry for frame {min(late)}, but {frames.name} ends with frame {index}")
    frames.problem = "; ".join(filter(None, [frames.problem, *lines])) or None


def corners_to_xywh(corners: np.ndarray) -> np.ndarray:
    """Turn the corners of boxes, (2 N, 2), the outermost pixels, into boxes (N, 4): left, top, width, height px."""
    first, last = corners.reshape(-1, 2, 2).astype(np.float64).transpose(1, 0, 2)
    return np.concatenate([first, last - first + 1], 1)


class MemoryTracker:
    """Follow N objects with SAM 2's video memory, frame by frame; what the model no longer looks at is forgotten.

    The arithmetic is that of sam2's SAM2VideoPredictor, whose modules these are, with fill_hole_area=0 and
    add_all_frames_to_correct_as_cond=True, for prompts that are given when tracking has come to their frame: frames are
    resized by Pillow, in 8 bits, and memories kept in bf16.

    Args:
        segmenter: an official model; the nano has no memory.
        num_frames: of the video, where that is known: in those of fewer than 16 it scales the pointers' positions.
    Raises:
        ValueError: for a model without memory.
    """

    def __init__(self, segmenter: Segmenter, num_objects: int, num_frames: int | None):
        self.model, self.precision = segmenter
        if self.model.num_maskmem == 0:
            raise ValueError(
                "tracker=sam2 needs a model with memory modules, which the nano has not: take "
                "sam2.model=sam2.1_hiera_tiny, or a checkpoint that was trained from an official model"
            )
        assert self.model.memory_temporal_stride_for_eval == 1
        self.model.binarize_mask_from_pts_for_mem_enc = True  # as sam2.build_sam.build_sam2_video_predictor sets it
        self.num_frames = num_frames or 2**31  # in a stream, as if it never ended
        self.banks = [{"cond_frame_outputs": {}, "non_cond_frame_outputs": {}} for _ in range(num_objects)]
        self.next_index = 0

    @torch.inference_mode()
    def step(self, frame: np.ndarray, prompts: list[FramePrompt]) -> tuple[FrameMasks, np.ndarray]:
        """Find the objects in the next frame.

        Args:
            frame: uint8 (H, W, 3) RGB.
            prompts: of this frame; an object's first one starts it, a later one corrects it.
        Returns:
            the masks, none of objects that have not started; and scores float64 (N,), the probability that the object
            is to be seen, nan before it starts. Overlaps go to the object of the higher logit.
        """
        index, self.next_index = self.next_index, self.next_index + 1
        prompted = {prompt.place: prompt for prompt in prompts}
        height, width = frame.shape[:2]
        low_res_masks: dict[int, torch.Tensor] = {}
        score_logits: dict[int, torch.Tensor] = {}
        with autocast(self.model.device, self.precision):
            features = self.model._prepare_backbone_features(self.model.forward_image(self._read(frame)))[1:]
            for place, bank in enumerate(self.banks):
                output = None
                if bank["cond_frame_outputs"]:
                    output = self._track(bank, index, features, has_memory=place not in prompted)
                    bank["non_cond_frame_outputs"][index] = output
                if place in prompted:
                    output = self._track_prompted(bank, index, features, output, prompted[place], frame.shape[:2])
                    bank["non_cond_frame_outputs"].pop(index, None)
                    bank["cond_frame_outputs"][index] = output
                if output is not None:
                    low_res_masks[place] = output["pred_masks"][0, 0].float()
                    score_logits[place] = output["object_score_logits"][0, 0].float()
                self._forget(bank, index)
        scores = np.full(len(self.banks), np.nan)
        if score_logits:  # at once: a GPU is waited for here alone
            scores[list(score_logits)] = torch.stack(list(score_logits.values())).sigmoid().cpu().numpy()
        return self._join(low_res_masks, (height, width)), scores

    def _read(self, frame: np.ndarray) -> torch.Tensor:
        """Resize and normalise a frame as sam2's video reader does: (1, 3, S, S)."""
        side = self.model.image_size
        small = torch.from_numpy(np.array(Image.fromarray(frame).resize((side, side)))).to(self.model.device)
        shares = (torch.arange(256, dtype=torch.float64) / 255.0).float().to(self.model.device)  # divided as theirs are
        image = shares[small.permute(2, 0, 1).long()]
        mean, std = (image.new_tensor(values)[:, None, None] for values in (models.IMAGE_MEAN, models.IMAGE_STD))
        return ((image - mean) / std)[None]

    def _track(
        self, bank: dict, index: int, features: tuple, has_memory: bool, points: dict | None = None, before=None
    ) -> dict:
        """Run SAM 2 on one object in one frame; what is kept of its output."""
        vision_features, positions, sizes = features
        output = self.model.track_step(
            index,
            not bank["cond_frame_outputs"],
            vision_features,
            positions,
            sizes,
            points,
            None,
            bank,
            self.num_frames,
            run_mem_encoder=has_memory,
            prev_sam_mask_logits=before,
        )
        return self._compact(output)

    def _track_prompted(
        self, bank: dict, index: int, features: tuple, tracked: dict | None, prompt: FramePrompt, orig_hw
    ) -> dict:
        """Run SAM 2 on one object with a prompt, after what it tracked there itself, if it did."""
        device = self.model.device
        coords = models.scale_points(torch.from_numpy(prompt.point_coords)[None], orig_hw, self.model.image_size)
        points = {
            "point_coords": coords.to(device),
            "point_labels": torch.from_numpy(prompt.point_labels)[None].to(device),
        }
        limit = evaluation.LOGIT_LIMIT
        before = None if tracked is None else tracked["pred_masks"].clamp(-limit, limit)
        bank["non_cond_frame_outputs"].pop(index, None)
        output = self._track(bank, index, features, False, points, before)
        side = self.model.image_size
        large = F.interpolate(output["pred_masks"], (side, side), mode="bilinear", align_corners=False)
        vision_features, _, sizes = features
        memory, positions = self.model._encode_new_memory(
            vision_features, sizes, large, output["object_score_logits"], is_mask_from_pts=True
        )
        return self._compact(output | {"maskmem_features": memory, "maskmem_pos_enc": positions})

    def _compact(self, output: dict) -> dict:
        memory = output["maskmem_features"]
        kept = {key: output[key] for key in ("pred_masks", "obj_ptr", "object_score_logits", "maskmem_pos_enc")}
        return kept | {"maskmem_features": None if memory is None else memory.to(torch.bfloat16)}

    def _forget(self, bank: dict, index: int) -> None:
        """Drop what no later frame looks at: memories of old frames, then their pointers; prompted frames stay."""
        outputs = bank["non_cond_frame_outputs"]
        for old in [each for each in outputs if each <= index + 1 - self.model.max_obj_ptrs_in_encoder]:
            del outputs[old]
        for old, output in outputs.items():
            if old <= index + 1 - self.model.num_maskmem:
                output["maskmem_features"] = output["maskmem_pos_enc"] = output["pred_masks"] = None

    def _join(self, low_res_masks: dict[int, torch.Tensor], frame_hw: tuple[int, int]) -> FrameMasks:
        num_objects = len(self.banks)
        device = self.model.device
        highest, label_map = (
            torch.zeros(frame_hw, device=device),
            torch.zeros(frame_hw, dtype=torch.int32, device=device),
        )
        segmentations: list[dict | None] = [None] * num_objects
        mask_boxes = np.full((num_objects, 4), np.nan)
        masks = {}
        for place, logits in low_res_masks.items():
            large = models.upscale_masks(logits[None, None], frame_hw)[0, 0]
            label_map.masked_fill_(large > highest, place + 1)
            highest = torch.maximum(highest, large)
            masks[place] = large > 0
        for place, mask in masks.items():
            mask = mask.cpu().numpy()
            if not mask.any():
                continue
            segmentations[place] = mask_to_rle(mask)
            x1, y1, x2, y2 = mask_to_box(mask)
            mask_boxes[place] = x1, y1, x2 - x1 + 1, y2 - y1 + 1
        return FrameMasks(label_map.cpu().numpy(), segmentations, np.full(num_objects, np.nan), mask_boxes)
