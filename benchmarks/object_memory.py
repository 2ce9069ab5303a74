"""Memory and time of a SAM 2 training step by the number of objects, all at once and in groups.

    python -m benchmarks.object_memory                                         # sam2.1_hiera_tiny at 1024 px, on a CPU
    python -m benchmarks.object_memory --objects 4 16 --prompts official

One generated picture with so many objects, through `prompted_losses` of train_sam2.py as its loop calls it: the encoder
frozen, prompt encoder and mask decoder trained. "at once" is train.objects_per_forward=null (up to --at-once objects,
which memory must hold), "in groups" is train.objects_per_forward=4. Each row is a process of its own; the peak is that
of resident memory above what is resident once embeddings and true masks are there (Linux), so that a bound would be one
group's. One JSON line each.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

from benchmarks.measure import CPU, read_config
from train_sam2 import LossSettings, PromptSettings, prompted_losses
from utils import run
from utils.fit import read_peak_memory, reset_peak_memory
from utils.sam2 import model as models

GROUP = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="sam2.1_hiera_tiny", help="a file of configs/sam2/model")
    parser.add_argument("--image-size", type=int, default=1024, help="px")
    parser.add_argument("--prompts", default="mixed", help="a file of configs/sam2/prompts")
    parser.add_argument("--objects", type=int, nargs="+", default=[4, 16, 64, 300])
    parser.add_argument("--at-once", type=int, default=16, help="most objects that are also decoded at once")
    parser.add_argument("--measure", type=int, nargs=2, help=argparse.SUPPRESS)  # objects, objects_per_forward
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments, *arguments.measure)
    for num_objects in arguments.objects:
        for group in (num_objects, GROUP) if GROUP < num_objects <= arguments.at_once else (GROUP,):
            command = [sys.executable, "-m", "benchmarks.object_memory", "--model", arguments.model]
            command += ["--image-size", str(arguments.image_size), "--prompts", arguments.prompts]
            subprocess.run([*command, "--measure", str(num_objects), str(group)], check=True)


def measure(arguments: argparse.Namespace, num_objects: int, objects_per_forward: int) -> None:
    """Train one step, and print its peak memory and time."""
    run.seed_everything(0)
    side = arguments.image_size
    config = read_config("sam2/model", arguments.model) | {"checkpoint": "none", "image_size": side}
    model = models.build_sam2(**config, device=CPU, fast_decoder=True).train()
    models.freeze_except(model, ["prompt_encoder", "mask_decoder"])
    prompts = PromptSettings(**read_config("sam2/prompts", arguments.prompts))
    loss_settings = LossSettings(**read_config("sam2/loss", "sam"))
    masks = torch.zeros(num_objects, side, side, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, side - side // 8, (num_objects, 2), generator=generator)
    for mask, (x, y) in zip(masks, corners.tolist(), strict=True):
        mask[y : y + side // 8, x : x + side // 8] = True
    num_rounds = prompts.max_corrections
    batch = {
        "masks": masks,
        "point_coords": torch.stack([corners + side // 16, torch.zeros_like(corners)], 1).float(),
        "point_labels": torch.tensor([[1, -1]], dtype=torch.int32).repeat(num_objects, 1),
        "num_points": torch.ones(num_objects, dtype=torch.int64),
        "num_rounds": torch.full((num_objects,), 1 + num_rounds),
        "is_click": torch.ones(num_objects, num_rounds, dtype=torch.bool),
        "is_truth_click": torch.zeros(num_objects, num_rounds, dtype=torch.bool),
        "uniform": torch.rand(num_objects, num_rounds, generator=generator),
        "image_index": torch.zeros(num_objects, dtype=torch.int64),
    }
    embeddings = models.encode(model, torch.randn(1, 3, side, side, generator=generator))
    cut_embeddings, leaves = models.cut(embeddings)
    reset_peak_memory(CPU)
    resident_mib, start = read_peak_memory(CPU) // 2**20, time.perf_counter()
    for _, loss, _ in prompted_losses(
        model, cut_embeddings, batch, prompts, loss_settings, side // 4, objects_per_forward
    ):
        (loss.sum() / num_objects).backward()
    models.send_back(embeddings, leaves)
    row = {"model": arguments.model, "prompts": arguments.prompts, "objects": num_objects}
    row |= {"objects_per_forward": objects_per_forward, "peak_mib_above": read_peak_memory(CPU) // 2**20 - resident_mib}
    row |= {"true_masks_mib": masks.numel() / 2**20, "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
