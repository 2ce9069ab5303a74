"""The three trainers on their tiny datasets, for what all three do alike: the fixture `trainer` goes through them."""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import tiny_segmentation
import tiny_tracking
import tiny_training
from tiny import crash_at_step

import train_sam2
import train_siamfc
import train_unet

LOSSES = {"train_sam2": "prompted_losses", "train_unet": "weighted_loss", "train_siamfc": "balanced_loss"}


class Trainer(NamedTuple):
    script: ModuleType
    tiny: ModuleType  # its dataset, configs and runs
    root: Path  # its dataset

    @property
    def name(self) -> str:
        return self.script.__name__

    def configure(self, *overrides: str) -> dict:
        """Compose the config of a tiny run; another model comes without the tiny one's settings."""
        is_other_model = any(override.startswith("model=") for override in overrides)
        tiny_overrides = [
            override
            for override in self.tiny.tiny_overrides(self.root)
            if not (is_other_model and override.startswith("model"))
        ]
        return self.tiny.compose_config(*tiny_overrides, *overrides)

    def replace_loss(self, monkeypatch, change) -> list[str]:
        """Let the loss of the n-th forward, from 1, be change(loss, n).

        Returns:
            the samples of all batches so far, in a list that grows.
        """
        real_loss, real_collate, calls, names = getattr(self.script, LOSSES[self.name]), self.script.collate, [], []

        def changed_loss(*args):
            calls.append(1)
            return change(real_loss(*args), len(calls))

        def changed_parts(*args):  # SAM 2's loss comes in parts: (objects, loss, IoU)
            parts = real_loss(*args)
            calls.append(1)
            chosen, loss, iou = next(parts)
            yield chosen, change(loss, len(calls)), iou
            yield from parts

        def record_names(samples):
            batch = real_collate(samples)
            names.extend(batch["names"])
            return batch

        is_in_parts = self.name == "train_sam2"
        monkeypatch.setattr(self.script, LOSSES[self.name], changed_parts if is_in_parts else changed_loss)
        monkeypatch.setattr(self.script, "collate", record_names)
        return names


def make_trainer(name: str, root: Path) -> Trainer:
    """Write the tiny dataset of a trainer."""
    if name == "train_sam2":
        return Trainer(train_sam2, tiny_training, tiny_training.write_dataset(root))
    if name == "train_unet":
        return Trainer(train_unet, tiny_segmentation, tiny_segmentation.write_dataset(root))
    return Trainer(train_siamfc, tiny_tracking, tiny_tracking.write_got10k(root, num_val=1, num_frames=3))


def train_and_crash(trainer: Trainer, run_dir: Path, config: dict, step: int, resume_path: Path | None = None) -> Path:
    """Train, let the backward of the update after `step` done ones raise, and return the run's last.pt."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at_step(patch, step)
        trainer.tiny.train_in(run_dir, config, resume_path)
    return run_dir / "last.pt"
