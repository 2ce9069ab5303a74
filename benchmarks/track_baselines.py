"""SiamFC beside three baselines on six real test sequences of OTB and VOT, in one run.

    DATA_ROOT=/my/datasets python -m benchmarks.track_baselines                          # the bundled checkpoint
    DATA_ROOT=/my/datasets python -m benchmarks.track_baselines --checkpoint best.pt
    DATA_ROOT=/my/datasets python -m benchmarks.track_baselines --parity                 # also tracker.mode=parity
    DATA_ROOT=/my/datasets python -m benchmarks.track_baselines --frames 20              # a try

The baselines: the first box kept still, the same network with random weights, and OpenCV's own MIL tracker. Each tracks
once from the first box; the result files go to outputs/track_baselines/<tracker>/ and are scored from there, as
`python track.py mode=evaluate` would (protocol got10k). Prints a Markdown table of success AUC, precision at 20 px and
AO, per sequence and on average, and the frames per second of each tracker alone. With --parity it prints how far
tracker.mode=fast is from the published arithmetic.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import cv2
import hydra
import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from utils.run import choose_device, seed_everything
from utils.settings import read_settings
from utils.tracking.frames import FrameSource
from utils.tracking.metrics import center_error, got10k_scores, mean_one_pass_scores, score_result
from utils.tracking.sequences import Sequence, choose_sequences, list_sequences, read_result, write_result
from utils.tracking.siamfc import SiamFC, load_siamfc
from utils.tracking.tracker import SiamFCTracker, TrackerSettings, track_frames

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "outputs" / "track_baselines"
TEST_SEQUENCES = {  # folder below the data root: layout, names
    "OTB100": ("otb", ["Crossing", "DragonBaby", "Human7", "Jumping"]),
    "VOT2015": ("vot", ["bag"]),
    "VOT2017": ("vot", ["book"]),
}
PROTOCOL = "got10k"
PARTED_PX = 0.5  # mean centre distance from which on fast and parity have parted


def compose_config(*overrides: str) -> dict:
    with hydra.initialize_config_dir(str(REPOSITORY / "configs" / "tracking"), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("track", list(overrides)), resolve=True)


def list_test_sequences(num_frames: int | None) -> list[Sequence]:
    """List the test sequences, cut to their first frames if asked."""
    sequences = []
    for folder, (layout, names) in TEST_SEQUENCES.items():
        config = compose_config(f"data={layout}")
        root = Path(config["data_root"]) / folder
        sequences += choose_sequences(list_sequences(**config["data"] | {"root": str(root)}), names)
    if num_frames is None:
        return sequences
    return [
        replace(
            sequence,
            frame_names=sequence.frame_names[:num_frames],
            boxes_xywh=sequence.boxes_xywh[:num_frames],
            visible=sequence.visible[:num_frames],
            num_annotated=min(sequence.num_annotated, num_frames),
        )
        for sequence in sequences
    ]


def track_siamfc(tracker: SiamFCTracker, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Track with SiamFC: boxes_xywh float64 (T, 4) px, 0-based; seconds (T,)."""
    boxes, times_s = [], []
    frames = track_frames(tracker, FrameSource(sequence.frame_paths), sequence.boxes_xywh[:1])
    for tracked_frame in tqdm(frames, total=len(sequence), desc=sequence.name, leave=False):
        if tracked_frame.error is not None:
            raise tracked_frame.error
        boxes.append(tracked_frame.boxes_xywh[0])
        times_s.append(tracked_frame.time_s)
    return np.stack(boxes), np.array(times_s)


def track_mil(sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Track with OpenCV's MIL, whose boxes are whole pixels; where it fails, the last box stays."""
    cv2.setRNGSeed(0)
    tracker = cv2.TrackerMIL_create() if hasattr(cv2, "TrackerMIL_create") else cv2.TrackerMIL.create()
    boxes, times_s = [], []
    frames = FrameSource(sequence.frame_paths)
    for index, frame, error in tqdm(frames, total=len(sequence), desc=sequence.name, leave=False):
        if error is not None:
            raise error
        image_bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        start = time.perf_counter()
        if index == 0:
            tracker.init(image_bgr, [round(value) for value in sequence.boxes_xywh[0].tolist()])
            boxes.append(sequence.boxes_xywh[0])
        else:
            is_found, box = tracker.update(image_bgr)
            boxes.append(np.array(box, np.float64) if is_found else boxes[-1])
        times_s.append(time.perf_counter() - start)
    return np.stack(boxes), np.array(times_s)


def track_still(sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Keep the first box."""
    return np.repeat(sequence.boxes_xywh[:1], len(sequence), 0), np.full(len(sequence), np.nan)


def table_lines(scores: dict[str, list[dict]], sequences: list[Sequence], fps: dict[str, float]) -> list[str]:
    """Lay out scores {tracker: [a sequence's]} as Markdown: success AUC / precision at 20 px / AO."""
    lines = [
        f"| AUC / precision at 20 px / AO | {' | '.join(scores)} |",
        f"|---|{'---|' * len(scores)}",
    ]
    for k, sequence in enumerate(sequences):
        rows = [tracker_scores[k] | {"ao": tracker_scores[k]["overlaps"].mean()} for tracker_scores in scores.values()]
        lines.append(f"| {sequence.name}, {len(sequence)} frames | {' | '.join(map(describe, rows))} |")
    means = [
        mean_one_pass_scores(rows) | {"ao": got10k_scores([row["overlaps"] for row in rows])["ao_by_sequence"]}
        for rows in scores.values()
    ]
    lines.append(f"| mean of {len(sequences)} | {' | '.join(map(describe, means))} |")
    speeds = [f"{fps[name]:.1f}" if np.isfinite(fps[name]) else "" for name in scores]
    return [*lines, f"| frames/s, tracker alone | {' | '.join(speeds)} |"]


def describe(row: dict) -> str:
    return f"{row['success_auc']:.3f} / {row['precision_20']:.3f} / {row['ao']:.3f}"


def parity_lines(scores: dict[str, list[dict]], sequences: list[Sequence]) -> list[str]:
    """Say how far tracker.mode=fast is from parity."""
    distances_px = {}
    for sequence in sequences:
        boxes = [read_result(RESULTS / name, sequence.name) for name in ("siamfc", "parity")]
        distances_px[sequence.name] = float(center_error(*boxes).mean())
    fast, parity = (np.mean([row["success_auc"] for row in scores[name]]) for name in ("siamfc", "parity"))
    median_px = np.median(list(distances_px.values()))
    parted = [f"{name} ({distance_px:.2f} px)" for name, distance_px in distances_px.items() if distance_px > PARTED_PX]
    return [
        f"fast against parity: median over sequences of the mean centre distance {median_px:.3f} px; "
        f"AUC {fast:.4f} against {parity:.4f}, a difference of {fast - parity:+.4f}",
        f"sequences that part by more than {PARTED_PX:g} px on average: {', '.join(parted) or 'none'}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "checkpoints" / "siamfc_alexnet.pt")
    parser.add_argument("--frames", type=int, help="only the first so many of each sequence, 2 or more; default: all")
    parser.add_argument("--parity", action="store_true", help="compare tracker.mode=fast with parity")
    args = parser.parse_args()
    if args.frames is not None and args.frames < 2:
        parser.error(f"--frames is {args.frames}; must be 2 or more")

    device = choose_device("auto")
    settings = read_settings(TrackerSettings, compose_config()["tracker"] | {"mode": "fast"}, "tracker")
    sequences = list_test_sequences(args.frames)
    model = load_siamfc(args.checkpoint).to(device)
    seed_everything(0)
    random_model = SiamFC(score_bias=model.score_bias is not None).eval().to(device)
    trackers = {
        "siamfc": SiamFCTracker(model, settings),
        "still_box": None,
        "random_weights": SiamFCTracker(random_model, settings),
        "mil": None,
    }
    if args.parity:
        trackers["parity"] = SiamFCTracker(model, replace(settings, mode="parity"))

    scores, fps = {}, {}
    for name, tracker in trackers.items():
        scores[name], all_times_s = [], []
        for sequence in sequences:
            if tracker is not None:
                boxes_xywh, times_s = track_siamfc(tracker, sequence)
            else:
                boxes_xywh, times_s = (track_still if name == "still_box" else track_mil)(sequence)
            write_result("otb", RESULTS / name, sequence.name, boxes_xywh, times_s, sequence.box_origin)
            scores[name].append(score_result(RESULTS / name, sequence, PROTOCOL))
            all_times_s.append(times_s)
        fps[name] = 1 / float(np.mean(np.concatenate(all_times_s)))
    print("\n".join(table_lines(scores, sequences, fps)))
    print(f"\n{args.checkpoint.name}, {device}, {torch.get_num_threads()} threads, protocol {PROTOCOL}")
    if args.parity:
        print("\n".join(parity_lines(scores, sequences)))


if __name__ == "__main__":
    main()
