"""Images per second of training a U-Net, against the plain loop: fp32, each picture decoded when its turn comes.

    python -m benchmarks.unet_training              # the 31 M network at 256 px; a small one on the generated pets

A step: the same network (`UNet`, 64 base channels, 31 M parameters), batch and loss; ours channels_last and
bf16. An epoch: `train_unet.py` with data-loading processes and precision=bf16 against a loop that reads, resizes and
augments one picture after the other in fp32, on the same pictures, network, batch size, optimizer and schedule, over
three seeds; the mean loss of the last fifth of the steps must agree within 3 %.
"""

import contextlib
import io
import tempfile
import time
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import OmegaConf

import train_unet
from benchmarks.measure import print_result, time_in_turn
from utils.run import seed_everything
from utils.segmentation.unet import UNet

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH_SIZE, IMAGE_SIZE, REPEATS = 2, 256, 4
STEPS, SEEDS = 80, (0, 1, 2)


def compare_steps() -> None:
    """Compare one step of the 31 M network."""
    seed_everything(0)
    model = UNet(3, 3, base_channels=64, depth=4, up="transposed")
    images = torch.rand(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    targets = torch.randint(0, 3, (BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE))
    losses = {}
    steps = {}
    for name, memory_format, is_bf16 in (
        ("ours", torch.channels_last, True), ("plain", torch.contiguous_format, False),
    ):  # fmt: skip
        network = UNet(3, 3, base_channels=64, depth=4, up="transposed")
        network.load_state_dict(model.state_dict())
        network = network.to(memory_format=memory_format)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        inputs = images.to(memory_format=memory_format)

        def step(name=name, network=network, optimizer=optimizer, inputs=inputs, is_bf16=is_bf16) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                logits = network(inputs)
            loss = torch.nn.functional.cross_entropy(logits.float(), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.setdefault(name, loss.item())  # the first step's

        steps[name] = step
    ours_s, plain_s = time_in_turn(steps["ours"], steps["plain"], REPEATS)
    checked = f"loss of the first step: {losses['ours']:.4f} and {losses['plain']:.4f}"
    per_s = {"ours_images_per_s": round(BATCH_SIZE / ours_s, 2), "plain_images_per_s": round(BATCH_SIZE / plain_s, 2)}
    print_result(f"U-Net step, 31 M parameters, {IMAGE_SIZE} px", 2.0, ours_s, plain_s, checked, **per_s)


def compose_config(seed: int) -> dict:
    with hydra.initialize_config_dir(str(REPOSITORY / "configs" / "unet"), version_base="1.3"):
        overrides = [
            f"seed={seed}", f"train.steps={STEPS}", f"train.eval_every={STEPS}", "train.eval_images=1", "device=cpu",
            "train.test_at_end=false", "train.picture_images=0", "train.log_every=1000", "precision=bf16",
        ]  # fmt: skip
        return OmegaConf.to_container(hydra.compose("train_unet", overrides), resolve=True)


def train_ours(config: dict) -> tuple[float, float]:
    """Train with train_unet.py: seconds a step, and the mean loss of the last fifth."""
    losses = []
    real_loss = train_unet.weighted_loss

    def record(logits: torch.Tensor, targets: torch.Tensor, *rest) -> torch.Tensor:
        loss = real_loss(logits, targets, *rest)
        if logits.requires_grad:
            losses.append((time.perf_counter(), loss.item()))
        return loss

    train_unet.weighted_loss = record
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train_unet.train(config, Path(folder), None)
    train_unet.weighted_loss = real_loss
    seconds, step_losses = zip(*losses, strict=True)
    return (seconds[-1] - seconds[5]) / (len(seconds) - 6), float(np.mean(step_losses[-STEPS // 5 :]))


def train_plainly(config: dict) -> tuple[float, float]:
    """Train in a plain loop: fp32, one picture after the other, in PyTorch's default layout."""
    settings = train_unet.read_settings(train_unet.Config, config)
    train_settings, reader_keys = settings.train, settings.data.reader_keys
    seed_everything(config["seed"])
    model = train_unet.build_network(settings.model, reader_keys["channels"], reader_keys["num_classes"]).train()
    items = train_unet.list_splits(reader_keys)["train"]
    dataset = train_unet.AugmentedPairs(items, config["seed"], settings.data, 0, settings.loss)
    optimizer = train_unet.build_optimizer(model, settings.optim)
    seconds, step_losses = [], []
    for step in range(train_settings.steps):
        first = step * train_settings.batch_size
        batch = train_unet.collate([dataset[first + place] for place in range(train_settings.batch_size)])
        for group in optimizer.param_groups:
            group["lr"] = train_unet.scheduled_lr(step, train_settings.steps, settings.optim)
        logits = model(batch["images"].float() / 255)
        loss = train_unet.weighted_loss(logits, batch["targets"], settings.loss, None)
        step_losses.append(loss.item())
        seconds.append(time.perf_counter())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train_settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (seconds[-1] - seconds[5]) / (len(seconds) - 6), float(np.mean(step_losses[-STEPS // 5 :]))


def compare_epochs() -> None:
    """Compare whole trainings of the default network on the generated pets, in turn."""
    ours, plain = [], []
    for seed in SEEDS:
        config = compose_config(seed)
        ours.append(train_ours(config))
        plain.append(train_plainly(config))
    ours_s, plain_s = (float(np.median([seconds for seconds, _ in runs])) for runs in (ours, plain))
    ours_loss, plain_loss = (float(np.mean([loss for _, loss in runs])) for runs in (ours, plain))
    apart = ours_loss / plain_loss - 1
    checked = f"mean loss of the last fifth, {len(SEEDS)} seeds: {ours_loss:.4f} and {plain_loss:.4f} ({apart:+.1%})"
    batch_size = compose_config(0)["train"]["batch_size"]
    per_s = {"ours_images_per_s": round(batch_size / ours_s, 1), "plain_images_per_s": round(batch_size / plain_s, 1)}
    print_result("U-Net epoch with data loading, 0.5 M parameters, 128 px", 2.0, ours_s, plain_s, checked, **per_s)


def main() -> None:
    compare_steps()
    compare_epochs()


if __name__ == "__main__":
    main()
