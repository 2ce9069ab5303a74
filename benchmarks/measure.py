"""What the speed benchmarks share: configs, time of ours and a plain reference in turn; the JSON line."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CPU = torch.device("cpu")


def read_config(group: str, name: str) -> dict:
    """Read configs/<group>/<name>.yaml, such as "sam2/loss", "tutorial", with the files that it inherits from."""
    task, option = group.split("/")
    with initialize_config_dir(str(CONFIGS / task), version_base="1.3"):
        return OmegaConf.to_container(compose(f"{option}/{name}")[option])


def time_in_turn(ours: Callable[[], object], plain: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Call both once to warm up, then both in turn: median seconds of ours and of the plain reference."""
    ours()
    plain()
    times_s = {ours: [], plain: []}
    for _ in range(repeats):
        for function in (ours, plain):
            start = time.perf_counter()
            function()
            times_s[function].append(time.perf_counter() - start)
    return statistics.median(times_s[ours]), statistics.median(times_s[plain])


def print_result(name: str, target: float | None, ours_s: float, plain_s: float, checked: str, **more) -> None:
    """Print one benchmark as a JSON line.

    Args:
        name: what was compared.
        target: the ratio aimed at, plain_s / ours_s; None: none.
        checked: what was found equal in this run.
        more: further numbers.
    """
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    record = {"name": name, "ratio": round(plain_s / ours_s, 2), "target": target, "ours_s": round(ours_s, 4)}
    record |= {"plain_s": round(plain_s, 4), "peak_memory_gb": round(peak, 2), "checked_equal": checked}
    print(json.dumps(record | more), flush=True)
