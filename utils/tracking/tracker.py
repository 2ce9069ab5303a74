"""Track objects with SiamFC, frame by frame: used by track.py and by validation in training.

The exemplar is cut around the first box and never changes. In each frame the instance is cut around the object's last
place at three scales, the response of each is enlarged 16 times, and the best scale's peak, drawn towards the middle by
a window, is where the object is now.

Source: Bertinetto et al., arXiv:1606.09549; the arithmetic, with its order and float types, is that of
github.com/huanglianghua/siamfc-pytorch under NumPy 2.
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils.settings import FINITE, Rule, above, at_least, between, one_of
from utils.tracking import siamfc
from utils.tracking.frames import FrameSource
from utils.tracking.siamfc import EXEMPLAR_SIZE, INSTANCE_SIZE, TOTAL_STRIDE, SiamFC

# Objects in one forward in mode fast. On a GPU, this many bound memory: 96 crops of 255 px, about 1 GB of features. On
# a CPU, the features of more than one leave its caches, which costs more than a larger forward gains.
GPU_OBJECTS_PER_FORWARD, CPU_OBJECTS_PER_FORWARD = 32, 1
WINDOW_STEP = 0.5  # share of the instance's side from one window to the next: what one response covers
MOST_WINDOWS = 32  # in which a lost object is looked for in one frame
MAX_INSTANCE_SIDE = 2.0**20  # px; an object does not grow beyond this even without max_scale_change
MIN_BOX_PX, MAX_BOX_PX = 0.01, 100_000  # sides of a first box; areas far beyond these leave the range of float32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


ODD = Rule(lambda value: value >= 1 and value % 2 == 1, "1, 3, 5 or another odd number")
ABOVE_0_TO_1 = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")


@dataclass(frozen=True)
class TrackerSettings:
    """How the response becomes a box (`tracker:`). Those marked "fast" have no effect in mode parity."""

    # fast, or parity: the published numbers, bit for bit, without limits and one object at a time; sam2: in track.py
    # alone, another tracker in place of this one
    mode: Annotated[str, one_of("fast", "parity", "sam2")] = "fast"
    context_amount: Annotated[float, at_least(0), FINITE] = 0.5  # share of width + height that is added around the box
    scale_num: Annotated[int, ODD] = 3  # scales searched in each frame
    scale_step: Annotated[float, above(1), FINITE] = 1.0375  # factor from one scale to the next
    scale_penalty: Annotated[float, ABOVE_0_TO_1] = 0.9745  # factor of the responses of all scales but the middle one
    scale_lr: Annotated[float, between(0, 1)] = 0.59  # share of a change of scale that is followed at once
    window_influence: Annotated[float, between(0, 1)] = 0.176  # weight of the window, which prefers small movements
    response_up: Annotated[int, at_least(1)] = 16  # how many times the response is enlarged
    subpixel_peak: bool = False  # fast: place the peak between the cells of the enlarged response
    # fast: limit of growing and shrinking from the first box; null: none
    max_scale_change: Annotated[float | None, at_least(1)] = 5.0
    keep_center_inside: bool = True  # fast: the box's centre stays inside the frame
    lost_score: Annotated[float, FINITE] = 0.4  # an object of a lower score seems lost; the first frame's score is 1
    # fast: a lost object stays where it was, and is looked for around that, farther in each frame; one of this score or
    # more is it. None: a lost object follows what looks most like it
    found_score: Annotated[float | None, FINITE] = None

    def __post_init__(self):
        if self.found_score is not None and self.found_score <= self.lost_score:
            raise ValueError(
                f"tracker.found_score is {self.found_score}; must be above tracker.lost_score ({self.lost_score})"
            )


@dataclass
class Target:
    """Where one object is now. Numbers are rounded to float32 exactly where the published tracker does so."""

    center_xy: np.ndarray  # float32 (2,), px, 0-based
    size_wh: np.ndarray  # float32 (2,), px
    side: float  # px, the side of the square that becomes the instance
    first_side: float  # px, the same in the first frame
    first_contrast: float = 1.0  # how far the response's peak stood above its mean in the first frame
    num_searched: int = 0  # windows that were searched since the object was lost; 0: it is there

    @property
    def box_xywh(self) -> np.ndarray:
        """The box, float64 (4,) px, 0-based."""
        # Published boxes are 1-based float32: rounded as those, so that 1 more is the published number, bit for bit.
        half_wh = (self.size_wh - np.float32(1)) / np.float32(2)
        left_top = (self.center_xy + np.float32(1) - half_wh).astype(np.float64) - 1
        return np.concatenate([left_top, self.size_wh.astype(np.float64)])


class Search(NamedTuple):
    """Where an object was searched for in a frame, and what the network answered."""

    center_xy: np.ndarray  # float32 (2,), px
    side: float  # px, of the square that became the instance
    response: np.ndarray  # float32 (r, r) logits, of the scale that was chosen


class SiamFCTracker:
    """Track N objects at once: `init` with the first frame and its boxes, then `update` with each further frame.

    The tracker works on a copy of the model, so training may go on.

    Args:
        model: SiamFC on the device to use, in train or eval mode.
        precision: the features', "fp32", "bf16" or "fp16" (`choose_precision`); mode parity computes in fp32.
    Raises:
        ValueError: for another precision in mode parity; for mode sam2, which is not this tracker's.
    """

    def __init__(self, model: SiamFC, settings: TrackerSettings, precision: str = "fp32"):
        if settings.mode == "sam2":
            raise ValueError("tracker.mode is sam2, which track.py alone has; must be fast or parity here")
        self.settings = settings
        self.is_fast = settings.mode == "fast"
        if precision != "fp32" and not self.is_fast:
            raise ValueError(f"precision is {precision}; tracker.mode=parity computes in fp32: set precision=fp32")
        self.dtype = DTYPES[precision]
        self.device = next(model.parameters()).device
        if self.is_fast:
            self.model = fold_batch_norm(model).to(memory_format=torch.channels_last)
            self.model.backbone.to(self.dtype)
            is_cpu = self.device.type == "cpu"
            self.objects_per_forward = CPU_OBJECTS_PER_FORWARD if is_cpu else GPU_OBJECTS_PER_FORWARD
        else:
            self.model = copy.deepcopy(model).eval()
            self.objects_per_forward = 1
        exponents = np.linspace(-(settings.scale_num // 2), settings.scale_num // 2, settings.scale_num)
        self.scale_factors = settings.scale_step**exponents  # float64 (scale_num,)
        self.targets: list[Target] = []
        self.searches: list[Search] = []  # of the last frame, for each object; none in the first

    @torch.inference_mode()
    def init(self, image: np.ndarray, boxes_xywh: np.ndarray) -> None:
        """Take the first frame and the boxes of the N objects to track.

        Args:
            image: uint8 (H, W, 3), RGB.
            boxes_xywh: (N, 4) px, 0-based; a box may reach beyond the frame.
        Raises:
            ValueError: for no box, and for a box that is empty, not finite, or wholly outside the frame.
        """
        boxes_xywh = np.asarray(boxes_xywh, np.float64)
        check_boxes(boxes_xywh, image.shape[:2])
        self.border_rgb = siamfc.mean_color(image)  # the first frame's, for the whole video
        self.targets, self.searches = [], []
        exemplars = []
        for box_xywh in boxes_xywh:
            exemplar_side = siamfc.context_side(box_xywh[2:], self.settings.context_amount)
            side = siamfc.instance_side(exemplar_side)
            self.targets.append(Target(siamfc.box_center(box_xywh), box_xywh[2:].astype(np.float32), side, side))
            center_xy = self.targets[-1].center_xy
            exemplars.append(siamfc.crop_and_resize(image, center_xy, exemplar_side, EXEMPLAR_SIZE, self.border_rgb))
        self.exemplar_features = [
            self._features(exemplars[start : start + self.objects_per_forward])
            for start in range(0, len(exemplars), self.objects_per_forward)
        ]  # each (N', 256, 6, 6)

        responses = self._responses(image, np.ones(1))  # (1, N, 17, 17)
        self.response_hw = responses.shape[-2:]
        for target, response in zip(self.targets, responses[0], strict=True):
            target.first_contrast = contrast(response)
        enlarged_size = responses.shape[-1] * self.settings.response_up  # 272
        window = np.outer(np.hanning(enlarged_size), np.hanning(enlarged_size))  # float64
        self.weighted_window = self.settings.window_influence * (window / window.sum())

    @torch.inference_mode()
    def update(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the objects in the next frame.

        Args:
            image: uint8 (H, W, 3), RGB; its size may differ from earlier frames'.
        Returns:
            boxes_xywh float64 (N, 4) px, 0-based; scores float64 (N,): how far the response's peak stands above its
            mean, 1 is as far as in the first frame; is_lost bool (N,): the score is below `lost_score`.
        """
        assert self.targets, "init comes before update"
        settings = self.settings
        responses = self._responses(image, self.scale_factors)  # (scale_num, N, 17, 17)
        scores, self.searches = np.zeros(len(self.targets)), []
        for n, target in enumerate(self.targets):
            scale_index, disp_in_instance = self._find_peak(responses[:, n])
            side = target.side * float(self.scale_factors[scale_index])
            self.searches.append(Search(target.center_xy, side, responses[scale_index, n]))
            scores[n] = contrast(responses[scale_index, n]) / max(target.first_contrast, 1e-12)
            is_searched = self.is_fast and settings.found_score is not None
            if is_searched and scores[n] < (settings.found_score if target.num_searched else settings.lost_score):
                scores[n] = self._search(image, n, float(scores[n]))
                continue
            target.num_searched = 0
            self._move(target, float(self.scale_factors[scale_index]), disp_in_instance, image.shape[:2])
        boxes_xywh = np.stack([target.box_xywh for target in self.targets])
        is_lost = ~(scores >= settings.lost_score)  # nan is lost
        return boxes_xywh, scores, is_lost | np.array([target.num_searched > 0 for target in self.targets])

    def _search(self, image: np.ndarray, n: int, score: float) -> float:
        """Look for a lost object in windows around its last place, farther in each frame, and take it if it is there.

        Args:
            score: of its last place in this frame.
        Returns:
            the score of where it is now, or that of its last place.
        """
        target = self.targets[n]
        centers = list_windows(target.center_xy, WINDOW_STEP * target.side, image.shape[:2])
        first = target.num_searched % max(1, len(centers))
        chosen = centers[first : first + MOST_WINDOWS]
        target.num_searched += max(1, len(chosen))
        if not len(chosen):
            return score
        z = self.exemplar_features[n // self.objects_per_forward][n % self.objects_per_forward][None]
        best_score, best_xy = score, None
        for center_xy in chosen:
            instance = siamfc.crop_and_resize(image, center_xy, target.side, INSTANCE_SIZE, self.border_rgb)
            response = self.model.respond(z, self._features([instance])).reshape(*self.response_hw).cpu().numpy()
            window_score = contrast(response) / max(target.first_contrast, 1e-12)
            if window_score >= self.settings.found_score and window_score > best_score:
                row, column = np.unravel_index(response.argmax(), response.shape)
                disp_in_instance = (np.array([column, row]) - (np.array(response.shape[::-1]) - 1) / 2) * TOTAL_STRIDE
                best_score = window_score
                best_xy = (center_xy + disp_in_instance * target.side / INSTANCE_SIZE).astype(np.float32)
        if best_xy is None:
            return score
        target.center_xy, target.num_searched = best_xy, 0
        return best_score

    def _features(self, patches: list[np.ndarray]) -> torch.Tensor:
        """Compute features of B patches uint8 (S, S, 3): (B, 256, s, s)."""
        if len(patches) == 1 and not self.is_fast:
            # The published exemplar lies in memory with a batch stride of 3, which hides from PyTorch that it is
            # channels_last: the convolutions add in another order.
            images = torch.from_numpy(patches[0]).to(self.device).permute(2, 0, 1)[None]  # (1, 3, S, S)
        else:
            images = torch.from_numpy(np.stack(patches)).to(self.device).permute(0, 3, 1, 2)  # (B, 3, S, S)
        return self.model.features(images.to(self.dtype))  # stays channels_last in memory

    def _responses(self, image: np.ndarray, scale_factors: np.ndarray) -> np.ndarray:
        """Search all objects around their last places: float32 (K, N, r, r) logits for K scales."""
        responses = []
        for group, z in enumerate(self.exemplar_features):
            first = group * self.objects_per_forward
            targets = self.targets[first : first + self.objects_per_forward]
            instances = [
                siamfc.crop_and_resize(image, target.center_xy, target.side * factor, INSTANCE_SIZE, self.border_rgb)
                for factor in scale_factors
                for target in targets
            ]
            response = self.model.respond(z, self._features(instances))  # (K * N', 1, r, r)
            responses.append(response.reshape(len(scale_factors), len(targets), *response.shape[2:]).cpu().numpy())
        return np.concatenate(responses, axis=1)

    def _find_peak(self, responses: np.ndarray) -> tuple[int, np.ndarray]:
        """Find the best scale and the movement in it.

        Args:
            responses: float32 (K, r, r), one object's at all scales.
        Returns:
            scale_index; disp_in_instance float64 (2,), (x, y) px of the instance.
        """
        settings = self.settings
        enlarged_size = responses.shape[-1] * settings.response_up
        enlarged = [
            cv2.resize(response, (enlarged_size, enlarged_size), interpolation=cv2.INTER_CUBIC)
            for response in responses
        ]  # K maps, float32 (272, 272)
        peaks = np.array([response.max() for response in enlarged])  # float32 (K,)
        penalty = np.full(len(responses), settings.scale_penalty, np.float32)
        if self.is_fast:  # a peak below 0 (a lost object, a score bias) would gain from a factor below 1
            penalty[peaks < 0] = 1 / settings.scale_penalty
        penalty[len(responses) // 2] = 1
        scale_index = int((peaks * penalty).argmax())  # a product's peak is the peak's product, bit for bit

        response = enlarged[scale_index]
        response *= penalty[scale_index]
        response -= response.min()
        response /= response.sum() + np.float32(1e-16)
        response = np.float32(1 - settings.window_influence) * response + self.weighted_window  # float64
        row, column = np.unravel_index(response.argmax(), response.shape)
        peak_xy = np.array([column, row], np.float64)
        if self.is_fast and settings.subpixel_peak:
            peak_xy += [vertex_offset(response[row], column), vertex_offset(response[:, column], row)]
        disp_in_response = peak_xy - (enlarged_size - 1) / 2
        return scale_index, disp_in_response * TOTAL_STRIDE / settings.response_up

    def _move(
        self, target: Target, scale_factor: float, disp_in_instance: np.ndarray, frame_hw: tuple[int, int]
    ) -> None:
        """Bring one object to its new place and size; sums are float64 and rounded to float32 when stored."""
        settings = self.settings
        disp_in_image = disp_in_instance * target.side * scale_factor / INSTANCE_SIZE  # px of the frame
        target.center_xy = (target.center_xy + disp_in_image).astype(np.float32)
        scale = (1 - settings.scale_lr) * 1.0 + settings.scale_lr * scale_factor
        if self.is_fast and settings.max_scale_change is not None:
            limit = settings.max_scale_change
            side = min(max(target.side * scale, target.first_side / limit), target.first_side * limit)
            scale = side / target.side
        if target.side * scale > MAX_INSTANCE_SIDE:
            scale = 1.0
        target.size_wh = (target.size_wh.astype(np.float64) * scale).astype(np.float32)
        target.side *= scale
        if self.is_fast and settings.keep_center_inside:
            last_xy = np.array([frame_hw[1] - 1, frame_hw[0] - 1], np.float32)
            target.center_xy = np.clip(target.center_xy, np.float32(0), last_xy)


def fold_batch_norm(model: SiamFC) -> SiamFC:
    """Copy a model in eval mode with its batch norm merged into the convolutions: the same values up to rounding."""
    folded = copy.deepcopy(model).eval()
    for name, block in folded.backbone.named_children():
        layers = list(block.children())
        if len(layers) > 1:  # convolution, batch norm of any kind, ReLU, pooling
            fused = fuse_conv_bn_eval(layers[0], layers[1])
            # The pooling, if any, before the ReLU: the same values, of which a quarter is left for the ReLU.
            setattr(folded.backbone, name, nn.Sequential(fused, *reversed(layers[2:])))
    return folded


class TrackedFrame(NamedTuple):
    """What `track_frames` found in one frame; N objects."""

    index: int  # the frame's place in its source, from 0
    frame: np.ndarray | None  # uint8 (H, W, 3) RGB; None where it cannot be read
    boxes_xywh: np.ndarray  # float64 (N, 4) px, 0-based
    scores: np.ndarray  # float64 (N,): 1 in the first frame; nan where the frame cannot be read
    is_lost: np.ndarray  # bool (N,)
    time_s: float  # seconds that init or update took; nan where the frame cannot be read
    error: Exception | None  # why the frame cannot be read, naming it


def track_frames(tracker: SiamFCTracker, frames: FrameSource, boxes_xywh: np.ndarray) -> Iterator[TrackedFrame]:
    """Track objects from the first frame to the last, one frame at a time.

    In a frame that cannot be read the objects stay where they were, lost, and tracking goes on with the next.

    Args:
        boxes_xywh: (N, 4) px, 0-based, in the first frame.
    Yields:
        a TrackedFrame for each frame; the first has the given boxes.
    Raises:
        ValueError: where the first frame cannot be read, or its boxes not be tracked; OSError: likewise.
    """
    boxes_xywh = np.array(boxes_xywh, np.float64)
    nothing = np.full(len(boxes_xywh), np.nan)
    for index, frame, error in frames:
        if error is not None and index == 0:
            raise error
        if error is not None:
            yield TrackedFrame(index, None, boxes_xywh, nothing, np.ones(len(nothing), bool), math.nan, error)
            continue
        start = time.perf_counter()
        if index == 0:
            tracker.init(frame, boxes_xywh)
            scores, is_lost = np.ones(len(boxes_xywh)), np.zeros(len(boxes_xywh), bool)
        else:
            boxes_xywh, scores, is_lost = tracker.update(frame)
        yield TrackedFrame(index, frame, boxes_xywh, scores, is_lost, time.perf_counter() - start, None)


def check_boxes(boxes_xywh: np.ndarray, frame_hw: tuple[int, int]) -> None:
    """Raise a ValueError unless boxes (N, 4), px, 0-based, can be tracked from a frame of (H, W) px."""
    if boxes_xywh.ndim != 2 or boxes_xywh.shape[1] != 4 or len(boxes_xywh) == 0:
        raise ValueError(f"boxes have the shape {boxes_xywh.shape}; must be one or more rows x, y, width, height")
    height, width = frame_hw
    for number, (x, y, w, h) in enumerate(boxes_xywh.tolist()):
        if not all(math.isfinite(value) for value in (x, y, w, h)):
            problem = "its numbers must be finite"
        elif min(w, h) < MIN_BOX_PX or max(w, h) > MAX_BOX_PX:
            problem = f"its width and height must be above 0: from {MIN_BOX_PX:g} to {MAX_BOX_PX:g} px"
        elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
            problem = f"it lies outside the first frame of {width} x {height} px; give x, y, width, height in px"
        else:
            continue
        raise ValueError(f"box {number + 1} of {len(boxes_xywh)} is [{x:g}, {y:g}, {w:g}, {h:g}]; {problem}")


def list_windows(center_xy: np.ndarray, step: float, frame_hw: tuple[int, int]) -> np.ndarray:
    """List the centres of windows around a place, ring by ring outwards, that lie in the frame: float32 (K, 2) px."""
    height, width = frame_hw
    reach = math.ceil(max(height, width) / step)
    places = [(i, j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1) if (i, j) != (0, 0)]
    places.sort(key=lambda place: (max(map(abs, place)), place))
    centers = np.asarray(center_xy, np.float32) + np.array(places, np.float32) * np.float32(step)
    is_in = (centers >= 0).all(1) & (centers <= np.array([width - 1, height - 1])).all(1)
    return centers[is_in]


def contrast(response: np.ndarray) -> float:
    """Compute how far the peak of a response (r, r) stands above its mean."""
    return float(response.max() - response.mean(dtype=np.float64))


def vertex_offset(profile: np.ndarray, index: int) -> float:
    """Find the peak near the largest value of a profile, by the parabola through it and its two neighbours.

    Args:
        profile: (n,), values at equal distances.
        index: the place of the largest value.
    Returns:
        the vertex's distance from index, -0.5..0.5; 0 at the ends and on a plateau.
    """
    if index == 0 or index == len(profile) - 1:
        return 0.0
    before, peak, after = profile[index - 1 : index + 2].tolist()
    curvature = before - 2 * peak + after
    return 0.5 * (before - after) / curvature if curvature < 0 else 0.0
