"""What the three training loops share: their state, saved and restored, and leaves for single phases.

The loops themselves stand in the scripts. Nothing here calls back into them.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from utils import ranks
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.listing import first_few
from utils.log import git_state
from utils.run import choose_num_workers, may_overlap

RUNNING_MEAN_DECAY = 0.99
MAX_SKIPPED_IN_A_ROW = 50  # steps whose fp16 gradients overflowed, each at half the scale of the one before


# ---------------------------------------------------------------------------------------------------------------------
# the state of a run, in last.pt


@dataclass
class LoopState:
    """What a training loop carries from step to step, plain types: with the weights, the optimizer and the scaler
    it is all that a resumed run takes over.
    """

    step: int = 0  # updates attempted
    evaluated_step: int = -1  # step of the last evaluation
    bad_evals: int = 0  # evaluations since the best one
    num_skipped: int = 0  # updates left out because fp16 gradients overflowed
    skipped_in_a_row: int = 0
    start_metrics: dict[str, float] = field(default_factory=dict)  # "step" and the metrics of the first evaluation
    best: dict[str, float] = field(default_factory=dict)  # the same of the best evaluation
    running: dict[str, float] = field(default_factory=dict)  # see `running_means`
    rows: list[dict[str, int | float]] = field(default_factory=list)  # all that the metrics log has

    def take(self, metrics: dict[str, float], select_by: str) -> bool:
        """Take over what an evaluation measured at this step, and tell whether it is the best so far.

        Of two that are equal, as perfect scores are, the one with the lower val/loss is better, where it is measured.
        """
        self.evaluated_step = self.step
        metrics = {"step": self.step, **metrics}
        self.start_metrics = self.start_metrics or metrics
        is_best = not self.best or metrics[select_by] > self.best[select_by]
        if not is_best and metrics[select_by] == self.best[select_by] and "val/loss" in metrics:
            is_best = metrics["val/loss"] < self.best["val/loss"]
        self.bad_evals = 0 if is_best else self.bad_evals + 1
        self.best = metrics if is_best else self.best
        return is_best


def save_run(
    run_dir: Path,
    loop: LoopState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    description: dict,
    splits: dict[str, list[str]],
    is_best: bool,
    beside: dict[str, torch.nn.Module] | None = None,
) -> None:
    """Write last.pt, then best.pt where these weights are the best: `resume_run` mends what a kill between them leaves.

    Of several processes the first one writes.

    Args:
        description: what both files hold beside the weights, plain types: {"script": ..., "config": ..., ...}.
        splits: names of the samples of each split, for last.pt; see `keep_splits`.
        beside: what trains and is no part of the model; the weights of each lie beside the model's, by its name.
    """
    if not ranks.is_first():
        return
    weights = {name: module.state_dict() for name, module in {"model": model, **(beside or {})}.items()}
    best = {"format": 1, **description, **weights, "git": git_state()}
    state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "loop": asdict(loop)}
    save_checkpoint(run_dir / "last.pt", best | state | {"splits": splits, "best_keys": list(best)})
    if is_best:
        save_checkpoint(run_dir / "best.pt", best | {"metrics": loop.best})


def resume_run(
    resume_path: Path,
    run_dir: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    beside: dict[str, torch.nn.Module] | None = None,
) -> LoopState:
    """Bring a run back from its last.pt, and its best.pt into the new folder.

    Where last.pt is the best, best.pt is made from it: a run killed just after saving it has that of before.

    Args:
        beside: as for `save_run`.
    Returns:
        the state in which the loop goes on.
    """
    state = load_checkpoint(resume_path)
    for name, module in {"model": model, **(beside or {})}.items():
        module.load_state_dict(state[name])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # none of a run that computed in bf16 or fp32, on another device
        scaler.load_state_dict(state["scaler"])
    loop = LoopState(**state["loop"])
    if loop.best["step"] == loop.step:
        best = {key: state[key] for key in state["best_keys"]} | {"metrics": loop.best}
    else:
        best = load_checkpoint(resume_path.parent / "best.pt")
    if ranks.is_first():
        save_checkpoint(run_dir / "best.pt", best)
    print(f"resumed from {resume_path} at step {loop.step}")
    return loop


def stored_splits(resume_path: Path | None) -> dict[str, list[str]]:
    """Read the names of the samples of each split that a run to resume has; none for a new run and an older file."""
    state = {} if resume_path is None else load_checkpoint(resume_path)
    return state["splits"] if "splits" in state else {}


def split_names(splits: dict[str, list]) -> dict[str, list[str]]:
    """Name the samples of each split, for last.pt."""
    return {split: [sample.name for sample in samples] for split, samples in splits.items()}


def keep_splits(stored: dict[str, list[str]], splits: dict[str, list]) -> dict[str, list]:
    """Give a resumed run the samples that it had, each in the split that it had, whatever came to the dataset since.

    Args:
        stored: {split: names} from last.pt; a split that is not in it stays as it is (an older file has none).
        splits: {split: samples that are there now}, each with a `name` that no other has.
    Returns:
        {split: those with the stored names, in their order}.
    Raises:
        ValueError: for names that are in none of the splits any more.
    """
    present = {sample.name: sample for split in stored for sample in splits[split]}
    stored_names = {name for names in stored.values() for name in names}
    if gone := [f"{split} {name}" for split, names in stored.items() for name in names if name not in present]:
        raise ValueError(
            f"{len(gone)} of the {len(stored_names)} samples of the run to resume are not in the dataset, or not "
            f"usable, any more: {', '.join(first_few(gone))}; put them back, or start a new run"
        )
    if new := [name for name in present if name not in stored_names]:
        listed = ", ".join(first_few(new))
        print(f"resumed with the samples that the run had; left out {len(new)} others, new or unusable then: {listed}")
    return splits | {split: [present[name] for name in names] for split, names in stored.items()}


# ---------------------------------------------------------------------------------------------------------------------
# samples on their way to the device


def load_batches(
    dataset: Dataset,
    collate,
    first_sample: int,
    stop: int,
    batch_size: int,
    num_workers: int | str,
    device: torch.device,
) -> Iterator[dict]:
    """Read the samples first_sample, first_sample + 1, ... up to stop (not included), in processes, in batches.

    Where several processes train, each reads its share of each batch.

    Args:
        dataset: gives a sample for each sample_index of the endless stream, a function of (seed, sample_index).
        batch_size: samples of one forward, of all processes that train together.
        collate: list of samples -> batch.
        num_workers: the setting, see `choose_num_workers`.
        device: where the batches will go.
    """
    num_workers, own_size = choose_num_workers(num_workers), ranks.own_size("train.batch_size", batch_size)
    first = first_sample + ranks.rank() * own_size
    return iter(
        DataLoader(
            dataset,
            batch_sampler=[range(start, start + own_size) for start in range(first, stop, batch_size)],
            num_workers=num_workers,
            collate_fn=collate,
            worker_init_fn=limit_threads,
            generator=torch.Generator(),  # torch's own stream, which dropout follows, must not be drawn from
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
        )
    )


def limit_threads(worker: int) -> None:
    """Let a data-loading process decode in one thread: there are as many processes as cores already."""
    cv2.setNumThreads(0)


def to_device(batch: dict, device: torch.device) -> dict:
    """Bring a batch's tensors to a device; all else stays as it is."""
    return {
        key: value.to(device, non_blocking=may_overlap(device)) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


class SpeedWindow:
    """The steps since the last reading, and the seconds that they took: without evaluations, and the wait for data."""

    def __init__(self, step: int):
        self.first_step, self.start, self.waited_s = step, time.perf_counter(), 0.0

    def next_batch(self, batches: Iterator[dict]) -> dict:
        """Take the next batch, and count the wait for it."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited_s += time.perf_counter() - start
        return batch

    @contextlib.contextmanager
    def paused(self):
        """Leave out the time of a block."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def read(self, step: int) -> tuple[float, float]:
        """Return (steps per second, share of the time that was waited for data), 0..1, and start anew."""
        now = time.perf_counter()
        steps_per_s, wait_share = (step - self.first_step) / (now - self.start), self.waited_s / (now - self.start)
        self.first_step, self.start, self.waited_s = step, now, 0.0
        return steps_per_s, wait_share


# ---------------------------------------------------------------------------------------------------------------------
# gradients, and what is logged of them


def check_finite(loss: float, step: int, samples: str) -> float:
    """Return the loss of a forward.

    Args:
        samples: what it was computed from, such as "pictures a.png, b.png".
    Raises:
        FloatingPointError: for nan or infinity, before an update spreads it.
    """
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss is {loss} at step {step}, {samples}")
    return loss


def clip_gradients(
    parameters: Iterable[torch.nn.Parameter],
    clip_norm: float | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loop: LoopState,
    samples: str,
) -> float:
    """Unscale gradients, clip them, and count in `loop` the steps whose fp16 gradients overflowed.

    Args:
        clip_norm: the largest norm of all gradients together; None: any.
        samples: as for `check_finite`.
    Returns:
        the norm before clipping.
    Raises:
        FloatingPointError: for gradients that are not finite without a scaler, which would leave the step out, and for
            an overflow in too many steps in a row.
    """
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm).item()
    is_skipped = not math.isfinite(grad_norm)
    if is_skipped and not scaler.is_enabled():
        all_samples = "; ".join(ranks.gather([samples]))
        raise FloatingPointError(f"gradient norm is {grad_norm} at step {loop.step}, {all_samples}")
    loop.num_skipped += is_skipped
    loop.skipped_in_a_row = loop.skipped_in_a_row + 1 if is_skipped else 0
    if loop.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise FloatingPointError(
            f"fp16 gradients overflowed at {loop.skipped_in_a_row} steps in a row, the last is step {loop.step}: "
            "nothing is learned; use precision=bf16 or precision=fp32, or start from other weights"
        )
    return grad_norm


def running_means(running: dict[str, float], values: dict[str, float]) -> dict[str, float]:
    """Bring exponential means (decay 0.99) one step on, in place, and return them corrected for their start at 0.

    Args:
        running: {name: mean, "updates": steps so far}; empty at the start.
        values: {name: this step's}, the same names at each step.
    """
    running["updates"] = running["updates"] + 1 if running else 1
    for name, value in values.items():
        before = running[name] if name in running else 0.0
        running[name] = RUNNING_MEAN_DECAY * before + (1 - RUNNING_MEAN_DECAY) * value
    return {name: running[name] / (1 - RUNNING_MEAN_DECAY ** running["updates"]) for name in values}
