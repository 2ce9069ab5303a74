"""Several processes train what one trains: the whole proof of tests/test_ranks.py, under torchrun, on CPUs with gloo.

    python -m benchmarks.ranks                 # all of it, about 10 min on 2 cores
    python -m benchmarks.ranks --only kill     # one part: equal, same, kill, agents, traffic

equal    6 steps of 6 samples by 1, 2 and 3 processes: weights against one process's, and the validation of step 0
same     20 steps as a user runs them: whether all processes have the same weights, to the bit
kill     kill -9 of one of two at five random moments: how long the other lives, what the resumed runs are
agents   two torchruns (--nnodes=2) on this machine: weights against those of one torchrun
traffic  calculated, not measured: what a step sends, and how long that takes on a network
Prints Markdown tables.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from utils.checkpoint import load_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = {"train_sam2": "sam2", "train_unet": "unet", "train_siamfc": "tracking"}
SHORT = ["num_workers=0", "device=cpu", "train.log_every=1"]
EQUAL = {
    "SAM 2's nano": ["train_sam2", "train.eval_images=4", "train.eval_clicks=[1]", "train.picture_images=0"],
    "`unet_paper`, dropout 0, `soft_iou`": ["train_unet", "model=unet_paper", "model.base_channels=8", "loss=soft_iou",
        "model.dropout=0", "data.image_size=188", "train.eval_images=4", "train.test_at_end=false"],
    "SiamFC": ["train_siamfc", "train.eval_frames=5", "train.eval_pairs=6"],
}  # fmt: skip
SHAPES = {1: (1, 6), 2: (2, 3), 3: (3, 2)}  # processes: batch, accumulate
SAME = {"`unet_small`": ["train_unet", "train.eval_images=4"], "SiamFC": ["train_siamfc", "train.eval_frames=5"]}
GBIT_S = (10, 100)
LEFT_OUT = ("val/tracked_per_s", "val/loss", "val/hit_rate")


def start(script: str, run_dir: Path, count: int, *overrides: str, agent: list[str] | tuple = ()) -> subprocess.Popen:
    """Start `torchrun --nproc_per_node=<count> <script>.py`, through `train_and_save`; one process without torchrun."""
    is_resumed = any(override.startswith("resume=") for override in overrides)
    overrides = [*(() if is_resumed else SHORT), *overrides]
    child = [__file__, "--child", script, str(run_dir), *overrides, f"hydra.run.dir={run_dir}"]
    launcher = ["-m", "torch.distributed.run", *(agent or ["--standalone"]), f"--nproc_per_node={count}"]
    command = [sys.executable, *(launcher if count > 1 or agent else []), *child]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    printed, _ = process.communicate(timeout=1200)
    if process.returncode != 0:
        sys.exit(printed)


def train_and_save(script: str, prefix: str, overrides: list[str]) -> None:
    """Be one process of a run: train, then save what it holds as <prefix>_<rank>.pt."""
    import importlib

    from utils import loop, settings

    module, trained, clip = importlib.import_module(script), [], loop.clip_gradients

    def clip_and_keep(parameters, *rest):
        trained[:] = list(parameters)
        return clip(trained, *rest)

    loop.clip_gradients = clip_and_keep
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", "--config-path", str(REPOSITORY / "configs" / CONFIGS[script]), *overrides]
    settings.read_command_line(CONFIGS[script])
    module.main()
    torch.save([parameter.detach() for parameter in trained], f"{prefix}_{os.environ.get('RANK', 0)}.pt")


def difference(run_dir: Path, other_dir: Path) -> float:
    """The norm of the difference of two runs' last weights over their norm; running statistics do not count."""
    states = [load_checkpoint(folder / "last.pt")["model"] for folder in (run_dir, other_dir)]
    names = [name for name, value in states[0].items() if value.is_floating_point() and "running" not in name]
    ours, theirs = (torch.cat([state[name].double().flatten() for name in names]) for state in states)
    return float((ours - theirs).norm() / ours.norm())


def first_validation(run_dir: Path) -> dict[str, float]:
    """The row of step 0, but for speed, and for what SiamFC computes of pairs in batches, here not of one size."""
    row = next(row for row in load_checkpoint(run_dir / "last.pt")["loop"]["rows"] if row["step"] == 0)
    return {name: value for name, value in row.items() if name not in LEFT_OUT}


def show_equal(folder: Path) -> None:
    print("| 6 steps of 6 samples | 2 processes | 3 processes | validation of step 0 |\n|---|---|---|---|")
    for name, (script, *overrides) in EQUAL.items():
        run_dirs = {}
        for count, (batch_size, accumulate) in SHAPES.items():
            run_dirs[count] = folder / f"equal_{script}_{count}"
            sizes = [f"train.batch_size={batch_size}", f"train.accumulate={accumulate}", "train.steps=6"]
            finish(start(script, run_dirs[count], count, *overrides, *sizes, "train.eval_every=100"))
        rows = [first_validation(run_dir) for run_dir in run_dirs.values()]
        shown = "equal to the bit" if rows[0] == rows[1] == rows[2] else f"{rows}"
        differences = [f"{difference(run_dirs[1], run_dirs[count]):.1e}" for count in (2, 3)]
        print(f"| {name} | {' | '.join(differences)} | {shown} |", flush=True)


def show_same(folder: Path) -> None:
    print("\n| 20 steps by 2 processes | weights of both |\n|---|---|")
    for name, (script, *overrides) in SAME.items():
        run_dir = folder / f"same_{script}"
        finish(start(script, run_dir, 2, *overrides, "train.steps=20", "train.eval_every=10"))
        weights = [torch.load(f"{run_dir}_{rank}.pt") for rank in range(2)]
        is_same = all(map(torch.equal, *weights))
        print(f"| {name} | {'equal to the bit' if is_same else 'differ'} |", flush=True)


def find_ranks(run_dir: Path) -> dict[int, int]:
    """Find the processes of a run: {rank: process id}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((path / name).read_text() for name in ("cmdline", "environ"))
        except OSError:  # it has ended, or is another user's
            continue
        rank = next((word[5:] for word in environment.split("\0") if word.startswith("RANK=")), None)
        if "--child" in command and f"hydra.run.dir={run_dir}" in command and rank is not None:
            found[int(rank)] = int(path.name)
    return found


def show_kill(folder: Path) -> None:
    script = "train_sam2"  # its loss is a mean over pictures: one process gives the same with the same batch
    overrides = ["train.eval_images=2", "train.eval_clicks=[1]", "train.picture_images=0", "train.steps=16"]
    # a further click lies in the error of a mask: where a logit is 0 but for rounding, one process clicks elsewhere
    overrides += ["train.eval_every=5", "train.save_every=1", "train.batch_size=2", "prompts=point"]
    whole = folder / "kill_whole"
    start_s = time.monotonic()
    process = start(script, whole, 2, *overrides)
    while not (whole / "last.pt").exists():
        time.sleep(0.05)
    first_s = time.monotonic() - start_s
    finish(process)
    span_s, rng = time.monotonic() - start_s - first_s, random.Random(0)
    print(
        "\n| killed | s after its first save | step of last.pt | all ended within s | resumed by 2 | by 1 |\n"
        + "|---" * 6
        + "|"
    )
    for number in range(5):
        run_dir, killed, after_s = folder / f"kill_{number}", number % 2, rng.uniform(0, 0.7) * span_s
        process = start(script, run_dir, 2, *overrides)
        while not (run_dir / "last.pt").exists():
            time.sleep(0.02)
        time.sleep(after_s)
        ranks = find_ranks(run_dir)
        os.kill(ranks[killed], signal.SIGKILL)
        killed_s = time.monotonic()
        process.communicate(timeout=60)
        ended_s = time.monotonic() - killed_s
        step, ends = load_checkpoint(run_dir / "last.pt")["loop"]["step"], []
        for count in (2, 1):
            resumed = folder / f"kill_{number}_by_{count}"
            finish(start(script, resumed, count, f"resume={run_dir}"))
            ends.append(difference(whole, resumed))
        shown = ["equal to the bit" if end == 0 else f"{end:.1e}" for end in ends]
        print(f"| rank {killed} | {after_s:.1f} | {step} | {ended_s:.1f} | {' | '.join(shown)} |", flush=True)


def show_agents(folder: Path) -> None:
    script, overrides = "train_unet", ["train.steps=6", "train.eval_images=4", "train.test_at_end=false"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    agent = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=benchmark"]
    processes = [start(script, folder / "agents", 1, *overrides, agent=agent) for _ in range(2)]
    for process in processes:
        finish(process)
    finish(start(script, folder / "one_agent", 2, *overrides))
    end = difference(folder / "one_agent", folder / "agents")
    print(f"\ntwo agents of one process against one agent of two: {'equal to the bit' if end == 0 else f'{end:.1e}'}")


def show_traffic() -> None:
    """Calculate: in a ring each of N processes sends 2 (N - 1) / N times its gradients, at most twice their bytes."""
    from utils.sam2 import model as models
    from utils.segmentation.unet import UNet
    from utils.tracking.siamfc import SiamFC

    rows = []
    decoder = ["prompt_encoder", "mask_decoder"]
    for name in ("sam2_nano", "sam2.1_hiera_tiny", "sam2.1_hiera_large"):
        config = {"name": name, "checkpoint": "none"} | ({"image_size": 256} if name == "sam2_nano" else {})
        for parts in (decoder, [*decoder, "image_encoder"]):
            model = models.build_sam2(**read_model(name) | config, device="cpu")
            trained = models.freeze_except(model, parts)
            rows.append((f"{name}, {' + '.join(parts)}", sum(weight.numel() for weight in trained.values())))
    rows.append(("unet, 64 channels", sum(weight.numel() for weight in UNet(3, 2, 64, 4, "transposed").parameters())))
    rows.append(("siamfc", sum(weight.numel() for weight in SiamFC(False).parameters())))
    heads = "".join(f" ms at {speed} Gbit/s |" for speed in GBIT_S)
    print(f"\n| trained (calculated) | parameters | sent per step, MB |{heads}\n|---|---|---|---|---|")
    for name, number in rows:
        megabytes = 2 * 4 * number / 1e6
        times_ms = [f"{8 * megabytes / speed:.1f}" for speed in GBIT_S]
        print(f"| {name} | {number / 1e6:.1f} M | {megabytes:.1f} | {' | '.join(times_ms)} |")


def read_model(name: str) -> dict:
    """The keys of configs/sam2/model/<name>.yaml that build the model."""
    import hydra
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(REPOSITORY / "configs" / "sam2"), version_base="1.3"):
        cfg = hydra.compose("train_sam2", [f"model={name}"])
    return OmegaConf.to_container(cfg.model, resolve=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return train_and_save(*sys.argv[2:4], sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"equal": show_equal, "same": show_same, "kill": show_kill, "agents": show_agents}
    parser.add_argument("--only", choices=[*parts, "traffic"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, show in parts.items():
            if args.only in (None, name):
                show(Path(folder))
    if args.only in (None, "traffic"):
        show_traffic()


if __name__ == "__main__":
    main()
