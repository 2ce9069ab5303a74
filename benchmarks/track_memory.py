"""Memory of tracker=sam2 by the length of the video, beside sam2's own video predictor.

    python -m benchmarks.track_memory 100 300                # both, in processes of their own
    python -m benchmarks.track_memory 2000 --ours
    python -m benchmarks.track_memory 100 300 --side 1024    # on a GPU, where there is one

sam2.1_hiera_tiny with random weights, one object from a box, square frames of --side px as jpg files; fp32 on a CPU,
bf16 on a GPU. Prints the peak of each process, on a GPU that of PyTorch there, and seconds per frame. The official
predictor keeps all frames and all outputs, by its design.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.measure import read_config
from utils.fit import has_peak_memory, read_peak_memory
from utils.images import write_image
from utils.run import autocast
from utils.sam2 import model as models
from utils.tracking.frames import FrameSource
from utils.tracking.masks import FramePrompt, MemoryTracker, Segmenter

BOX = np.array([[60, 60], [140, 140]], np.float32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = "bf16" if DEVICE.type == "cuda" else "fp32"


def write_frames(folder: Path, num_frames: int, side: int) -> None:
    ground = np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)
    ground = cv2.GaussianBlur(ground, (0, 0), 3)
    for index in range(num_frames):
        frame = ground.copy()
        cv2.circle(frame, (100 + index % 80, 100), 40, (220, 60, 50), -1)
        write_image(folder / f"{index:05d}.jpg", frame)


def build_model(side: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = read_config("sam2/model", "sam2.1_hiera_tiny") | {"checkpoint": "none", "image_size": side}
    return models.build_sam2(**config, device=DEVICE)


def track_ours(folder: Path, side: int) -> int:
    source = FrameSource(folder)
    tracker = MemoryTracker(Segmenter(build_model(side), PRECISION), 1, source.num_frames)
    for index, frame, _ in source:
        tracker.step(frame, [FramePrompt(0, BOX, np.array([2, 3], np.int32))] if index == 0 else [])
    return source.num_frames


@torch.inference_mode()
def track_official(folder: Path, side: int) -> int:
    with models._sam2_without_hydra():
        from hydra import compose, initialize_config_module
        from hydra.utils import instantiate

        with initialize_config_module("sam2", version_base="1.2"):
            overrides = ["++model._target_=sam2.sam2_video_predictor.SAM2VideoPredictor", f"++model.image_size={side}"]
            config = compose("configs/sam2.1/sam2.1_hiera_t.yaml", overrides)
            predictor = instantiate(config.model, _recursive_=True)
    predictor.load_state_dict(build_model(side).state_dict())
    predictor.fill_hole_area = 0  # as ours
    with autocast(DEVICE, PRECISION):
        state = predictor.to(DEVICE).eval().init_state(str(folder))
        predictor.add_new_points_or_box(state, 0, 1, box=BOX.ravel())
        return sum(1 for _ in predictor.propagate_in_video(state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_frames", type=int, nargs="+")
    parser.add_argument("--ours", action="store_true", help="without the official predictor")
    parser.add_argument("--side", type=int, default=256, help="of the frames and of the model's image, px")
    parser.add_argument("--in-process", choices=["ours", "official"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        start = time.perf_counter()
        run = {"ours": track_ours, "official": track_official}[arguments.in_process]
        count = run(arguments.folder, arguments.side)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if has_peak_memory(DEVICE):
            peak_mb = read_peak_memory(DEVICE) / 2**20
        print(f"{count} {peak_mb:.0f} {(time.perf_counter() - start) / count:.3f}")
        return
    print("| tracker | frames | peak, MB | s per frame, with its start |\n|---|---|---|---|")
    for num_frames in arguments.num_frames:
        with tempfile.TemporaryDirectory() as folder:
            write_frames(Path(folder), num_frames, arguments.side)
            for name in ["ours"] if arguments.ours else ["ours", "official"]:
                command = [sys.executable, "-m", "benchmarks.track_memory", str(num_frames), "--in-process", name]
                command += ["--folder", folder, "--side", str(arguments.side)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                count, peak_mb, seconds = done.stdout.split("\n")[-2].split()
                print(f"| {name} | {count} | {peak_mb} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
