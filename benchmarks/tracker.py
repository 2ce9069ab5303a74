"""Frames per second of the tracker against the published one written plainly, on generated 480p and 1080p frames.

    python -m benchmarks.tracker

The plain tracker is `benchmarks.plain_siamfc.PlainTracker` around the same network in PyTorch's default layout. Both
track the same frames, a block of an init and eight updates each in turn. End to end is from JPEG files to an overlay
video: plainly frame by frame, here with frames decoded ahead.
"""

import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.measure import print_result, time_in_turn
from benchmarks.plain_siamfc import PlainTracker
from utils.frames import FrameSource, write_video
from utils.images import write_image
from utils.siamfc import SiamFC, load_siamfc
from utils.siamfc_tracker import SiamFCTracker, TrackerSettings, track_frames

REPOSITORY = Path(__file__).resolve().parent.parent
FRAME_SIZES = {"480p": (480, 854), "1080p": (1080, 1920)}
NUM_FRAMES, REPEATS = 8, 5
NUM_OBJECTS = 8


def make_frames(height: int, width: int) -> list[np.ndarray]:
    """Draw a textured ground that drifts, as uint8 (H, W, 3) frames."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(height + 64, width + 64, 3)).astype(np.float32)
    ground = cv2.GaussianBlur(noise, (0, 0), 3)
    ground = np.clip(128 + 50 * ground / ground.std(), 0, 255).astype(np.uint8)
    return [np.ascontiguousarray(ground[2 * t : 2 * t + height, 3 * t : 3 * t + width]) for t in range(NUM_FRAMES + 1)]


def compare_updates(model: SiamFC, size: str) -> None:
    """Compare blocks of updates: parity, fast in fp32, fast in bf16; then eight objects."""
    height, width = FRAME_SIZES[size]
    frames = make_frames(height, width)
    box_xywh = np.array([width / 2, height / 2, height / 5, height / 6])
    plain = PlainTracker(model.features)

    def run_plain() -> np.ndarray:
        plain.init(frames[0], box_xywh + [1, 1, 0, 0])
        return np.stack([plain.update(frame) for frame in frames[1:]]) - [1, 1, 0, 0]

    def run(tracker: SiamFCTracker, boxes_xywh: np.ndarray) -> np.ndarray:
        tracker.init(frames[0], boxes_xywh)
        return np.stack([tracker.update(frame)[0] for frame in frames[1:]])

    for name, mode, precision, target in (
        ("parity", "parity", "fp32", 1.0), ("fast, fp32", "fast", "fp32", 1.2), ("fast, bf16", "fast", "bf16", 1.8),
    ):  # fmt: skip
        tracker = SiamFCTracker(model, TrackerSettings(mode=mode), precision)
        distance_px = np.abs(run(tracker, box_xywh[None])[:, 0] - run_plain()).max()
        if mode == "parity":
            assert distance_px == 0, distance_px
        ours_s, plain_s = time_in_turn(lambda: run(tracker, box_xywh[None]), run_plain, REPEATS)  # noqa: B023
        checked = f"boxes of {NUM_FRAMES} frames: largest difference {distance_px:.3f} px"
        per_s = {"ours_frames_per_s": round((NUM_FRAMES + 1) / ours_s, 1)}
        print_result(f"tracker {name}, {size}", target, ours_s, plain_s, checked, **per_s)

    if size == "480p":
        offsets = np.stack([np.arange(NUM_OBJECTS) * 20 - 80, np.arange(NUM_OBJECTS) * 10 - 40], 1)
        boxes_xywh = np.concatenate([box_xywh[:2] + offsets, np.tile(box_xywh[2:], (NUM_OBJECTS, 1))], 1)
        tracker = SiamFCTracker(model, TrackerSettings())
        together = run(tracker, boxes_xywh)
        alone = np.concatenate([run(tracker, box[None]) for box in boxes_xywh], 1)
        distance_px = np.abs(together - alone).max()
        ours_s, plain_s = time_in_turn(
            lambda: run(tracker, boxes_xywh), lambda: [run(tracker, box[None]) for box in boxes_xywh], 3
        )
        checked = f"boxes: largest difference {distance_px:.4f} px"
        print_result(f"tracker, {NUM_OBJECTS} objects at once, {size}", 1.1, ours_s, plain_s, checked)


def compare_end_to_end(model: SiamFC, size: str, folder: Path) -> None:
    """Compare from files to an overlay video."""
    height, width = FRAME_SIZES[size]
    for index, frame in enumerate(make_frames(height, width)):
        write_image(folder / f"{index}.jpg", frame)
    paths = sorted(folder.glob("*.jpg"), key=lambda path: int(path.stem))
    box_xywh = np.array([width / 2, height / 2, height / 5, height / 6])
    plain = PlainTracker(model.features)

    def draw(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
        x, y, w, h = (int(value) for value in box)
        return cv2.rectangle(frame, (x, y), (x + w, y + h), (255, 0, 0), 3)

    def run_plain() -> None:
        with write_video(folder / "plain.mp4", (height, width), 25) as video:
            for index, path in enumerate(paths):
                frame = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
                if index == 0:
                    plain.init(frame, box_xywh + [1, 1, 0, 0])
                    box = box_xywh
                else:
                    box = plain.update(frame)
                video.add(draw(frame, box))

    for precision in ("fp32", "bf16"):
        tracker = SiamFCTracker(model, TrackerSettings(), precision)

        def run() -> None:
            with write_video(folder / "ours.mp4", (height, width), 25) as video:
                for found in track_frames(tracker, FrameSource(paths), box_xywh[None]):  # noqa: B023
                    video.add(draw(found.frame, found.boxes_xywh[0]))

        ours_s, plain_s = time_in_turn(run, run_plain, REPEATS)
        print_result(f"track.py end to end, {precision}, {size}", 1.6, ours_s, plain_s, "")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "checkpoints" / "siamfc_alexnet.pt")
    model = load_siamfc(parser.parse_args().checkpoint)
    for size in FRAME_SIZES:
        compare_updates(model, size)
        with tempfile.TemporaryDirectory() as folder:
            compare_end_to_end(model, size, Path(folder))


if __name__ == "__main__":
    main()
