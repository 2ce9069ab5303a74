"""Frames per second of the tracker against the published one written plainly, on generated 480p and 1080p frames.

    python -m benchmarks.tracker

The plain tracker is `benchmarks.plain_siamfc.PlainTracker` around the same network in PyTorch's default layout. All
track the same frames, a block of an init and eight updates each in turn. Ratios are of updates alone; with the init,
which here searches the first frame too for its score, and plainly does not, they are printed beside. End to end is
from JPEG files to an overlay video: plainly frame by frame, here with frames decoded ahead.
"""

import argparse
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from benchmarks.measure import print_result
from benchmarks.plain_siamfc import PlainTracker
from utils.images import write_image
from utils.tracking.frames import VIDEO_QUALITY, FrameSource, write_video
from utils.tracking.siamfc import SiamFC, load_siamfc
from utils.tracking.tracker import SiamFCTracker, TrackerSettings, track_frames

REPOSITORY = Path(__file__).resolve().parent.parent
FRAME_SIZES = {"480p": (480, 854), "1080p": (1080, 1920)}
NUM_FRAMES, REPEATS = 8, 9  # updates in a block, blocks of each tracker
NUM_OBJECTS, OBJECTS_FRAMES, OBJECTS_REPEATS = 8, 4, 5


def make_frames(height: int, width: int) -> list[np.ndarray]:
    """Draw a textured ground that drifts, as uint8 (H, W, 3) frames."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(height + 64, width + 64, 3)).astype(np.float32)
    ground = cv2.GaussianBlur(noise, (0, 0), 3)
    ground = np.clip(128 + 50 * ground / ground.std(), 0, 255).astype(np.uint8)
    return [np.ascontiguousarray(ground[2 * t : 2 * t + height, 3 * t : 3 * t + width]) for t in range(NUM_FRAMES + 1)]


def time_blocks(trackers: dict, frames: list[np.ndarray], repeats: int) -> tuple[dict, dict]:
    """Track the frames with each tracker in turn, once to warm up and `repeats` times for their times.

    Args:
        trackers: {name: (init, update)}, functions of a frame.
    Returns:
        {name: boxes of the updates}, and {name: median seconds of an init, of an update}.
    """
    boxes, times_s = {}, {name: ([], []) for name in trackers}
    for repeat in range(repeats + 1):
        for name, (init, update) in trackers.items():
            start = time.perf_counter()
            init(frames[0])
            middle = time.perf_counter()
            boxes[name] = np.stack([update(frame) for frame in frames[1:]])
            end = time.perf_counter()
            if repeat:
                times_s[name][0].append(middle - start)
                times_s[name][1].append((end - middle) / (len(frames) - 1))
    return boxes, {name: tuple(map(statistics.median, both)) for name, both in times_s.items()}


def compare_updates(model: SiamFC, size: str) -> None:
    """Compare blocks of updates: parity, fast in fp32, fast in bf16."""
    height, width = FRAME_SIZES[size]
    frames = make_frames(height, width)
    box_xywh = np.array([width / 2, height / 2, height / 5, height / 6])
    plain = PlainTracker(model.features)
    trackers = {
        "plain": (
            lambda frame: plain.init(frame, box_xywh + [1, 1, 0, 0]),
            lambda frame: plain.update(frame) - [1, 1, 0, 0],
        )
    }
    targets = {"parity": 1.0, "fast, fp32": 1.2, "fast, bf16": 1.8}
    for name in targets:
        mode, _, precision = name.partition(", ")
        tracker = SiamFCTracker(model, TrackerSettings(mode=mode), precision or "fp32")
        trackers[name] = (
            lambda frame, tracker=tracker: tracker.init(frame, box_xywh[None]),
            lambda frame, tracker=tracker: tracker.update(frame)[0][0],
        )
    boxes, times_s = time_blocks(trackers, frames, REPEATS)
    plain_init_s, plain_s = times_s["plain"]
    for name, target in targets.items():
        distance_px = np.abs(boxes[name] - boxes["plain"]).max()
        if name == "parity":
            assert distance_px == 0, distance_px
        init_s, ours_s = times_s[name]
        with_init = (plain_init_s + NUM_FRAMES * plain_s) / (init_s + NUM_FRAMES * ours_s)
        checked = f"boxes, to {distance_px:.3f} px; the ratio with init is {with_init:.2f}"
        more = {"ours_frames_per_s": round(1 / ours_s, 1)}
        print_result(f"tracker {name}, {size}", target, ours_s, plain_s, checked, **more)


def compare_objects(model: SiamFC, size: str) -> None:
    """Compare updates of eight objects at once with those of eight runs of one."""
    height, width = FRAME_SIZES[size]
    frames = make_frames(height, width)[: OBJECTS_FRAMES + 1]
    offsets = np.stack([np.arange(NUM_OBJECTS) * 20 - 80, np.arange(NUM_OBJECTS) * 10 - 40], 1)
    boxes_xywh = np.tile([width / 2, height / 2, height / 5, height / 6], (NUM_OBJECTS, 1))
    boxes_xywh[:, :2] += offsets
    together = SiamFCTracker(model, TrackerSettings())
    alone = [SiamFCTracker(model, TrackerSettings()) for _ in boxes_xywh]
    trackers = {
        "alone": (
            lambda frame: [tracker.init(frame, box[None]) for tracker, box in zip(alone, boxes_xywh, strict=True)],
            lambda frame: np.concatenate([tracker.update(frame)[0] for tracker in alone]),
        ),
        "together": (lambda frame: together.init(frame, boxes_xywh), lambda frame: together.update(frame)[0]),
    }
    boxes, times_s = time_blocks(trackers, frames, OBJECTS_REPEATS)
    checked = f"boxes, to {np.abs(boxes['together'] - boxes['alone']).max():.4f} px"
    ours_s, alone_s = times_s["together"][1], times_s["alone"][1]
    print_result(f"tracker, {NUM_OBJECTS} objects at once, {size}", 1.1, ours_s, alone_s, checked)


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
        with av.open(str(folder / "plain.mp4"), "w") as container:
            options = {"crf": VIDEO_QUALITY, "preset": "veryfast"}
            stream = container.add_stream("libx264", rate=Fraction(25), options=options)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for index, path in enumerate(paths):
                frame = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
                if index == 0:
                    plain.init(frame, box_xywh + [1, 1, 0, 0])
                    box = box_xywh
                else:
                    box = plain.update(frame)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(frame, box), format="rgb24")))
            container.mux(stream.encode())

    def run(tracker: SiamFCTracker) -> None:
        with write_video(folder / "ours.mp4", (height, width), 25) as video:
            for tracked_frame in track_frames(tracker, FrameSource(paths), box_xywh[None]):
                video.add(draw(tracked_frame.frame, tracked_frame.boxes_xywh[0]))

    runs = {"plain": run_plain}
    for precision in ("fp32", "bf16"):
        tracker = SiamFCTracker(model, TrackerSettings(), precision)
        runs[precision] = lambda tracker=tracker: run(tracker)
    times_s = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):  # the first to warm up
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            if repeat:
                times_s[name].append(time.perf_counter() - start)
    plain_s = statistics.median(times_s.pop("plain"))
    for precision, ours in times_s.items():
        per_s = {"ours_frames_per_s": round(len(paths) / statistics.median(ours), 1)}
        name = f"track.py end to end, {precision}, {size}"
        print_result(name, 1.6, statistics.median(ours), plain_s, "", **per_s)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "checkpoints" / "siamfc_alexnet.pt")
    model = load_siamfc(parser.parse_args().checkpoint)
    for size in FRAME_SIZES:
        compare_updates(model, size)
        if size == "480p":
            compare_objects(model, size)
        with tempfile.TemporaryDirectory() as folder:
            compare_end_to_end(model, size, Path(folder))


if __name__ == "__main__":
    main()
