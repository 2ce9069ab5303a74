"""What each script does per second on a GPU, and in how much of its memory: a table and a JSON line for each row.

    python -m benchmarks.gpu                  # all rows that fit into --minutes, on the GPU; a few small ones on a CPU
    python -m benchmarks.gpu --only "U-Net"   # the rows whose name holds this

Rows are runs of the scripts' own `train`, `infer` and `track` on generated data with random weights (nothing is
downloaded), on a GPU each in a process of its own. The base row of a model trains prompt encoder and mask decoder in
bf16 without a cache, in sam2's own decoder; each further row of it changes one thing. Pictures/s (pairs/s, frames/s)
are the median over the last third of the steps, with reading and logging: before, CUDA's libraries choose kernels at
each new number of objects, up to a second each time. The first step stands apart. Peak GB are what PyTorch held on the
GPU; on a CPU, what the process held.
"""

import argparse
import contextlib
import csv
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import infer_sam2
import track
import train_sam2
import train_siamfc
import train_unet
from benchmarks.measure import CONFIGS
from utils.fit import has_peak_memory, read_peak_memory, reset_peak_memory
from utils.images import write_image

TASKS = {train_sam2: "sam2", infer_sam2: "sam2", train_unet: "unet", train_siamfc: "tracking", track: "tracking"}
STEPS, NUM_PICTURES, NUM_FRAMES = 60, 8, 100
BOX = "box=[300,200,120,90]"
MODELS = ("sam2.1_hiera_tiny", "sam2.1_hiera_small", "sam2.1_hiera_base_plus", "sam2.1_hiera_large")
CHANGES = {
    "last blocks": ["train.trainable=[prompt_encoder,mask_decoder,neck,{trunk_last_n:2}]"],
    "all parts": ["train.trainable=[prompt_encoder,mask_decoder,image_encoder]"],
    "fp32": ["precision=fp32"],
    "fp16": ["precision=fp16"],
    "warm cache": ["cache=FOLDER/cache"],
    "fast_decoder": ["fast_decoder=true"],
    "compile": ["train.compile=true"],
}
TRAIN = [f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=1000"]
SAM2 = [
    *TRAIN, "data=glassware", "data.root=FOLDER/glassware", "precision=bf16", "cache=off", "fast_decoder=false",
    "model.checkpoint=none", "train.eval_images=1", "train.eval_clicks=[1]", "train.picture_images=0",
]  # fmt: skip
UNET = [
    *TRAIN, "data=pets_sample", "data.root=FOLDER/pets", "precision=bf16", "train.channels_last=true",
    "train.eval_images=1", "train.picture_images=0", "train.test_at_end=false",
]  # fmt: skip
SIAMFC = [
    *TRAIN, "data.root=FOLDER/moving_shapes", "precision=bf16", "train.eval_sequences=1", "train.eval_frames=3",
    "train.eval_pairs=0", "train.picture_pairs=0",
]  # fmt: skip
AUTOMATIC = ["input=FOLDER/pictures", "model.checkpoint=none", "fast_decoder=false"]
TRACK = ["input=FOLDER/frames", BOX, "overlay=false", "checkpoint=random"]
TRACK_SAM2 = ["tracker=sam2", "input=FOLDER/frames", BOX, "overlay=false", "precision=bf16"]
RANDOM_SAM2 = [f"sam2.model={MODELS[0]}", "sam2.checkpoint=none"]


class Row(NamedTuple):
    """A run of a script; FOLDER in its overrides is where the generated data lie."""

    name: str
    script: object
    overrides: list[str]


def list_rows(device: str) -> list[Row]:
    """List what is measured on "cuda", the most telling rows first, or the few small rows of "cpu"."""
    if device == "cpu":
        nano = ["model=sam2_nano", "image_size=64", "automatic.points_per_side=4"]
        return [
            Row("sam2_nano, 64 px", train_sam2, [*SAM2, "model=sam2_nano", "model.image_size=64"]),
            Row("automatic masks, sam2_nano, 64 px", infer_sam2, AUTOMATIC + nano),
            Row("U-Net, 64 px", train_unet, [*UNET, "model.base_channels=4", "data.image_size=64"]),
            Row("SiamFC training", train_siamfc, [*SIAMFC, "train.batch_size=1", "precision=fp32"]),
            Row("track.py", track, TRACK),
        ]
    bases = [Row(f"{model}, base", train_sam2, [*SAM2, f"model={model}"]) for model in MODELS]
    others = [
        Row("automatic masks, sam2.1_hiera_tiny", infer_sam2, [*AUTOMATIC, f"model={MODELS[0]}", "precision=bf16"]),
        Row("U-Net, 31 M parameters, 256 px", train_unet, [*UNET, "model.base_channels=64", "data.image_size=256"]),
        Row("SiamFC training", train_siamfc, [*SIAMFC, "train.batch_size=32"]),
        Row("track.py, 480p", track, [*TRACK, "precision=bf16"]),
        Row("track.py masks=true, sam2_nano", track, [*TRACK, "precision=bf16", "masks=true"]),
        Row(f"track.py masks=true, {MODELS[0]}", track, [*TRACK, "precision=bf16", "masks=true", *RANDOM_SAM2]),
        Row(f"track.py tracker=sam2, {MODELS[0]}", track, [*TRACK_SAM2, *RANDOM_SAM2]),
    ]
    changed = [
        Row(f"{model}, {name}", train_sam2, [*SAM2, f"model={model}", *change])
        for model in (MODELS[0], MODELS[-1])
        for name, change in CHANGES.items()
    ]
    return bases + others + changed


def write_data(folder: Path, num_pictures: int, num_frames: int) -> None:
    """Draw what infer_sam2.py and track.py are given: FOLDER/pictures and FOLDER/frames; trainers draw their own."""
    noise = np.random.default_rng(0).integers(0, 256, (15, 27, 3), np.uint8)
    ground = cv2.resize(noise, (1100, 600), interpolation=cv2.INTER_CUBIC)
    for name, number in (("pictures", num_pictures), ("frames", num_frames)):
        (folder / name).mkdir(parents=True)
        for place in range(number):
            write_image(folder / name / f"{place:03d}.jpg", ground[place : place + 480, place : place + 854].copy())


def measure_row(row: Row, device: str, folder: Path) -> dict:
    """Run a row in this process.

    Returns:
        name, per_s (pictures, pairs or frames), unit, first_step_s (None: has no steps), peak_gb (None: not told).
    """
    task, script = CONFIGS / TASKS[row.script], row.script.__name__
    with initialize_config_dir(str(task), version_base="1.3"):
        overrides = [override.replace("FOLDER", str(folder)) for override in row.overrides]
        cfg = compose(script, [*overrides, f"device={device}", *["num_workers=0"] * (device == "cpu")])
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    result = {"name": row.name, "unit": "pictures/s", "first_step_s": None, "peak_gb": None}
    reset_peak_memory(torch.device(device))
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
        run_dirs = [Path(runs) / "first", Path(runs) / "run"]
        for run_dir in run_dirs:
            run_dir.mkdir()
        if row.script is infer_sam2:  # a folder less one of its pictures: without building the model
            seconds = []
            pictures = sorted(Path(config["input"]).iterdir())
            for run_dir, source in zip(run_dirs, (pictures[0], config["input"]), strict=True):
                start = time.perf_counter()
                infer_sam2.infer(config | {"input": str(source)}, run_dir)
                seconds.append(time.perf_counter() - start)
            result["per_s"] = (len(pictures) - 1) / (seconds[1] - seconds[0])
        elif row.script is track:
            track.track(config, run_dirs[1])
            last = json.loads((run_dirs[1] / "run.json").read_text())["metrics"]["last"]
            result |= {"per_s": last["frames_per_s"], "unit": "frames/s"}
        else:
            row.script.train(config, run_dirs[1], None)
            name = "pairs_per_s" if row.script is train_siamfc else "images_per_s"
            with (run_dirs[1] / "metrics.csv").open(newline="") as file:
                per_s = [float(line[name]) for line in csv.DictReader(file) if line[name]]
            per_step = config["train"]["batch_size"] * config["train"]["accumulate"]
            result |= {"per_s": statistics.median(per_s[-(len(per_s) // 3) :]), "first_step_s": per_step / per_s[0]}
            result["unit"] = "pairs/s" if row.script is train_siamfc else "pictures/s"
    if has_peak_memory(torch.device(device)):
        result["peak_gb"] = read_peak_memory(torch.device(device)) / 2**30
    return result


def describe_machine(device: str) -> dict:
    """Name torch, driver and card, for the table and for the JSON line."""
    machine = {"torch": torch.__version__, "cuda": torch.version.cuda, "driver": None, "card": "CPU"}
    if device == "cuda":
        machine["card"] = torch.cuda.get_device_name()
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            machine["driver"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return machine


def measure_apart(row: Row, folder: Path, timeout_s: float) -> dict:
    """Run a row on the GPU in a process of its own: the result, or {"name", "error"} with its last line."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--row", row.name, "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"name": row.name, "error": f"not done in the {timeout_s:.0f} s that were left"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"name": row.name, "error": (done.stderr.splitlines() or [f"status {done.returncode}"])[-1]}


def format_table(results: list[dict], machine: dict) -> str:
    """Lay results out as a table, below a line that names the machine."""
    lines = [", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    lines += ["| row | per second | first step, s | peak GB |", "|---|---|---|---|"]
    for result in results:
        cells = [result["name"], result.get("error", ""), "", ""]
        if "error" not in result:
            cells[1] = f"{result['per_s']:.4g} {result['unit']}"
            for place, key in ((2, "first_step_s"), (3, "peak_gb")):
                cells[place] = "" if result[key] is None else f"{result[key]:.2f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the rows whose name holds this")
    parser.add_argument("--minutes", type=float, default=15, help="leave out the rows that do not fit into these")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # of a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for row in list_rows(device) if arguments.only in row.name]
    if arguments.row is not None:
        [row] = [row for row in rows if row.name == arguments.row]
        print(json.dumps(measure_row(row, device, arguments.folder)))
        return
    stop = time.perf_counter() + 60 * arguments.minutes
    results, left_out = [], []
    machine = describe_machine(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, *(NUM_PICTURES, NUM_FRAMES) if device == "cuda" else (3, 10))
        for row in rows:
            left_s = stop - time.perf_counter()
            if left_s <= 0:
                left_out.append(row.name)
                continue
            results.append(measure_apart(row, folder, left_s) if device == "cuda" else measure_row(row, device, folder))
            print(json.dumps(results[-1] | machine), flush=True)
    print("\n" + format_table(results, machine))
    if left_out:
        print(f"\nleft out, as {arguments.minutes:g} minutes were over: {'; '.join(left_out)}")


if __name__ == "__main__":
    main()
