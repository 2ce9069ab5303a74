"""Fine-tuning steps with a warm embedding cache against the usual plain loop.

    python -m benchmarks.embedding_cache --model sam2.1_hiera_small               # target: 3 times the objects/s
    python -m benchmarks.embedding_cache --model sam2.1_hiera_tiny                # 2.5 times
    python -m benchmarks.embedding_cache --model sam2_nano --image-size 256       # reported only
    python -m benchmarks.embedding_cache --fast-decoder                           # ours with fast_decoder=true

Both ways train prompt encoder and mask decoder of the same model (random weights: nothing is downloaded) on the same
generated pictures of S x S px with 8 objects each, one click an object, one picture a step, in turn, in one warm
process. A step goes from the files on disk to the updated weights.

Ours: the dataset, collate, prompted_losses, clipping and AdamW of train_sam2.py with cache=<folder>, loss on masks of
S/4, as it is by default. Plain: the usual way as tutorials have it: read picture and annotation, set_image of SAM 2's
own predictor, encode the prompts, decode, bring all masks to the picture's size, loss there, AdamW.
Both use the tutorial's loss (cross-entropy of the first mask and 0.05 times the error of its score).

Before the clock starts, the two ways are compared on the same weights and prompts: every low-resolution logit, and the
loss with ours computed at full size too (limits: LIMITS). Prints one JSON line: name, ratio (objects/s, ours over
plain), target, both times (median s a step), peak memory (resident, MiB; null where the system does not tell), what
was checked equal; and what filling the cache takes, per entry, and after how many steps it has paid off.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.measure import CPU, read_config
from train_sam2 import (
    Augmentation,
    DataSettings,
    LossSettings,
    OptimSettings,
    PromptedMasks,
    PromptSettings,
    collate,
    parameter_groups,
    prompted_losses,
)
from utils.fit import has_peak_memory, read_peak_memory, reset_peak_memory
from utils.images import write_image, write_label_map
from utils.instances.readers import Item, read_ids
from utils.run import seed_everything
from utils.sam2.embedding_cache import embed, fill_cache, plan_cache
from utils.sam2.model import build_sam2, decode, freeze_except

TARGETS = {"sam2.1_hiera_small": 3.0, "sam2.1_hiera_tiny": 2.5}
LIMITS = {"fp16": 5e-3, "fp32": 1e-5}  # the relative difference of losses; that of logits, by their largest
NUM_OBJECTS, NUM_PICTURES = 8, 3
CLIP_NORM = 0.1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="sam2.1_hiera_small", help="a file of configs/sam2/model")
    parser.add_argument("--image-size", type=int, default=1024, help="px")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each way, after one that warms up")
    parser.add_argument("--cache-precision", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--fast-decoder", action="store_true", help="ours with fast_decoder=true")
    arguments = parser.parse_args()
    seed_everything(0)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(arguments, Path(folder))))


def compare(arguments: argparse.Namespace, folder: Path) -> dict:
    """Check that both ways compute the same, then time their steps in turn."""
    side = arguments.image_size
    config = read_config("sam2/model", arguments.model) | {"checkpoint": "none", "image_size": side}
    optim = OptimSettings(**read_config("sam2/optim", "adamw") | {"lr": 1e-5})
    loss = LossSettings(**read_config("sam2/loss", "tutorial"))
    prompts = PromptSettings(**read_config("sam2/prompts", "point"))
    model = build_sam2(**config, device=CPU, fast_decoder=arguments.fast_decoder)
    trainable = freeze_except(model, ["prompt_encoder", "mask_decoder"])
    optimizer = torch.optim.AdamW(parameter_groups(trainable, optim), lr=optim.lr)
    items = write_pictures(folder / "data", side)
    data_settings = DataSettings(1, Augmentation(hflip=False, color_jitter=0.0), {})

    pictures = [(item.image_path, False) for item in items]
    cache_dir, stored = str(folder / "cache"), arguments.cache_precision
    plan = plan_cache(model, cache_dir, stored, "fp32", False, pictures, None)
    start = time.perf_counter()
    fill_cache(model, plan)
    fill_s = (time.perf_counter() - start) / NUM_PICTURES
    plan = plan_cache(model, cache_dir, stored, "fp32", False, pictures, None)
    assert not plan.missing
    dataset = PromptedMasks(items, 0, side, NUM_OBJECTS, data_settings, prompts, plan.entries)
    predictor = make_predictor(model)

    def step_ours(sample_index: int) -> None:
        model.train()
        batch = collate([dataset[sample_index]])
        embeddings = embed(model, batch["pictures"])
        for chosen, object_loss, _ in prompted_losses(model, embeddings, batch, prompts, loss, side // 4):
            (object_loss * batch["object_weight"][chosen]).sum().backward()
        torch.nn.utils.clip_grad_norm_(trainable.values(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step_plain(sample_index: int) -> None:
        item, points = items_by_path[samples[sample_index]["name"]], samples[sample_index]["points"]
        plain_loss, _ = plain_forward(predictor, item, points)
        plain_loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # the plain loop is given its points: drawing them costs it nothing
    items_by_path = {str(item.image_path): item for item in items}
    samples = [find_points(dataset[index]) for index in range(arguments.steps + 1)]

    loss_difference, logit_difference = find_differences(model, dataset, predictor, items_by_path, prompts, loss)
    limit = LIMITS[stored]
    assert loss_difference <= limit, f"losses differ by {loss_difference}, more than {limit}"
    assert logit_difference <= limit, f"logits differ by {logit_difference} of the largest, more than {limit}"

    times: dict[str, list[float]] = {"ours": [], "plain": []}
    peaks: dict[str, int | None] = {}
    for sample_index in range(arguments.steps + 1):
        for name, step in (("ours", step_ours), ("plain", step_plain)):
            reset_peak_memory(CPU)
            start = time.perf_counter()
            step(sample_index)
            times[name].append(time.perf_counter() - start)
            peaks[name] = max(peaks.get(name, 0), read_peak_memory(CPU) // 2**20) if has_peak_memory(CPU) else None
    ours_s, plain_s = (statistics.median(times[name][1:]) for name in ("ours", "plain"))
    return {
        "name": f"training step, warm cache, {arguments.model}, {side} px{', fast_decoder' * arguments.fast_decoder}",
        "ratio": round(plain_s / ours_s, 2),
        "target": TARGETS[arguments.model] if side == 1024 and arguments.model in TARGETS else None,
        "ours_s": round(ours_s, 4),
        "plain_s": round(plain_s, 4),
        "ours_objects_per_s": round(NUM_OBJECTS / ours_s, 2),
        "plain_objects_per_s": round(NUM_OBJECTS / plain_s, 2),
        "ours_peak_mib": peaks["ours"],
        "plain_peak_mib": peaks["plain"],
        "checked_equal": f"full-size losses, to {loss_difference:.0e}; logits, to {logit_difference:.0e} of the peak",
        "limit": limit,
        "cache_precision": stored,
        "fill_s_per_entry": round(fill_s, 3),
        "mib_per_entry": round(next(iter(plan.entries.values())).stat().st_size / 2**20, 1),
        "pays_off_after_steps_per_entry": round(fill_s / (plain_s - ours_s), 2) if plain_s > ours_s else None,
        "threads": torch.get_num_threads(),
        "steps": arguments.steps,
    }


def write_pictures(root: Path, side: int) -> list[Item]:
    """Draw noisy pictures with NUM_OBJECTS ellipses each, and their label maps."""
    root.mkdir()
    rng = np.random.default_rng(0)
    items = []
    for number in range(NUM_PICTURES):
        ids = np.zeros((side, side), np.uint8)
        image_rgb = cv2.resize(rng.integers(0, 90, (side // 8, side // 8, 3), np.uint8), (side, side))
        for object_id in range(1, NUM_OBJECTS + 1):
            column, row = (object_id - 1) % 4, (object_id - 1) // 4  # a cell each: none is covered
            center = int((column + rng.uniform(0.4, 0.6)) * side / 4), int((row + rng.uniform(0.4, 0.6)) * side / 2)
            axes = int(rng.uniform(0.15, 0.35) * side / 4), int(rng.uniform(0.15, 0.35) * side / 2)
            cv2.ellipse(ids, center, axes, 0, 0, 360, object_id, -1)
            image_rgb[ids == object_id] = rng.integers(90, 256, 3)
        write_image(root / f"{number}.jpg", image_rgb)
        write_label_map(root / f"{number}.png", ids)
        label_path = root / f"{number}.png"
        items.append(Item(f"{number}", root / f"{number}.jpg", label_path, functools.partial(read_ids, label_path)))
    return items


# ---------------------------------------------------------------------------------------------------------------------
# the plain loop


def make_predictor(model: torch.nn.Module):
    """Make SAM 2's own predictor around the model."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    with warnings.catch_warnings():  # torch.jit.script is deprecated
        warnings.simplefilter("ignore")
        predictor = SAM2ImagePredictor(model)
    side = model.image_size
    predictor._bb_feat_sizes = [(side // stride, side // stride) for stride in (4, 8, 16)]  # it hard-codes 1024 px
    return predictor


def find_points(sample: dict) -> dict:
    """Keep of one of our samples what the plain loop needs: which picture, and a point on each object with its id."""
    return {"name": sample["name"], "points": sample["point_coords"][:, :1].numpy()}


def plain_forward(predictor, item: Item, points: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a step's loss the usual way, with one click an object.

    Args:
        predictor: SAM 2's SAM2ImagePredictor.
        item: the picture and its label map.
        points: (O, 1, 2) pixels of the picture, one on each object.
    Returns:
        the loss; low_res_masks (O, 3, S/4, S/4).
    Source: the published way of fine-tuning through the predictor, as in
        github.com/sagieppel/fine-tune-train_segment_anything_2_in_60_lines_of_code: cross-entropy on the first of three
        masks at the picture's size, and 0.05 times the error of its score. Written anew.
    """
    model = predictor.model
    model.sam_mask_decoder.train()
    model.sam_prompt_encoder.train()
    image_rgb = cv2.cvtColor(cv2.imread(str(item.image_path)), cv2.COLOR_BGR2RGB)
    ids = cv2.imread(str(item.annotation_path), cv2.IMREAD_UNCHANGED)
    truth = np.stack([ids == ids[int(y), int(x)] for x, y in points[:, 0]])  # (O, H, W)
    truth = torch.from_numpy(truth.astype(np.float32))

    predictor.set_image(image_rgb)  # without gradient
    labels = np.ones(points.shape[:2])
    _, coords, labels, _ = predictor._prep_prompts(points, labels, box=None, mask_logits=None, normalize_coords=True)
    sparse_embeddings, dense_embeddings = model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
    low_res_masks, scores, _, _ = model.sam_mask_decoder(
        image_embeddings=predictor._features["image_embed"][-1][None],
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse_embeddings,
        dense_prompt_embeddings=dense_embeddings,
        multimask_output=True,
        repeat_image=len(coords) > 1,
        high_res_features=[level[-1][None] for level in predictor._features["high_res_feats"]],
    )
    masks = predictor._transforms.postprocess_masks(low_res_masks, predictor._orig_hw[-1])  # (O, 3, H, W)
    logits = masks[:, 0]
    mask_loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
    pred_masks = (logits > 0).float()
    intersection = (truth * pred_masks).sum((1, 2))
    iou = intersection / (truth.sum((1, 2)) + pred_masks.sum((1, 2)) - intersection)
    score_loss = (scores[:, 0] - iou).abs().mean()
    return mask_loss + 0.05 * score_loss, low_res_masks


# ---------------------------------------------------------------------------------------------------------------------
# what is compared


@torch.no_grad()
def find_differences(
    model: torch.nn.Module,
    dataset: PromptedMasks,
    predictor,
    items_by_path: dict[str, Item],
    prompts: PromptSettings,
    loss: LossSettings,
) -> tuple[float, float]:
    """Compare the two ways on each picture, both losses on masks of the picture's size.

    Returns:
        the largest relative difference of losses; the largest difference of logits as a share of the largest logit.
    """
    loss_differences, logit_differences = [], []
    model.train()
    for index in range(NUM_PICTURES):
        sample = dataset[index]
        plain_loss, plain_masks = plain_forward(predictor, items_by_path[sample["name"]], find_points(sample)["points"])
        model.train()
        batch = collate([sample])
        embeddings = embed(model, batch["pictures"])
        ((_, object_loss, _),) = prompted_losses(model, embeddings, batch, prompts, loss, model.image_size)
        our_loss = (object_loss * batch["object_weight"]).sum()
        loss_differences.append((abs(our_loss - plain_loss) / plain_loss).item())
        masks, *_ = decode(
            model,
            embed(model, batch["pictures"]),
            batch["image_index"],
            batch["point_coords"][:, :1],
            batch["point_labels"][:, :1],
            None,
            multimask_output=True,
        )
        logit_differences.append(((masks - plain_masks).abs().max() / plain_masks.abs().max()).item())
    return max(loss_differences), max(logit_differences)


if __name__ == "__main__":
    main()
