"""Training recipes of train_sam2.py side by side, over seeds: which one is ahead, at which prompt, by how much.

    DATA_ROOT=/my/datasets python -m benchmarks.sam2_recipe runs/ nuclei choose sam sam_official tutorial --seeds 2
    DATA_ROOT=/my/datasets python -m benchmarks.sam2_recipe runs/ nuclei report sam published tutorial --seeds 5

Each recipe is a row of RECIPES, each dataset one of DATASETS: what is added to the command line of train_sam2.py. A run
that is in the folder already is not trained again. Where recipes were chosen on a dataset, its validation pictures are
divided in two seeded halves: recipes are chosen on one (`choose`), and the table is that of the other (`report`). The
last weights are measured, so that no picture chooses a checkpoint.

Prints a table of means over seeds of all objects' IoUs, and for each recipe but the last the differences to the last
one, paired by seed, with their 95 % intervals (Student's t); and how masks were ranked after one click: for each of the
three masks the share of objects for which it was chosen and for which it is best, its mean true and predicted IoU, the
regret of the choice, and the mean of |predicted - true IoU| of the chosen mask.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_sam2
from utils import run
from utils.instances.readers import Item, list_items
from utils.sam2 import embedding_cache, evaluation
from utils.sam2 import model as models
from utils.settings import read_settings

CLICKS = [1, 3, 5]
PROMPTS = ["iou_1_click", "iou_3_clicks", "iou_5_clicks", "iou_box", "oracle_iou_1_click"]
FROZEN = ["train.trainable=[prompt_encoder,mask_decoder]", "data.color_jitter=0", "cache=auto"]
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile, by the number of seeds


class DatasetRow(NamedTuple):
    """A dataset: what is added to the command line, and whether recipes were chosen on it."""

    overrides: list[str]
    is_halved: bool
    published_steps: int  # of one picture with all its objects: as many objects as the other recipes see


DATASETS = {
    "nuclei": DatasetRow(["experiment=dsb2018"], True, 380),
    "glassware": DatasetRow(["train.trainable=[prompt_encoder,mask_decoder,image_encoder]"], True, 600),
    "pets": DatasetRow(
        ["data=label_map", "data.root=${data_root}/oxford-iiit-pet", "data.label_dir=annotations/trimaps"]
        + ["data.ignore_ids=[2,3]", "data.val_fraction=0.3", *FROZEN],
        False,
        600,
    ),
    "davis": DatasetRow(
        ["data=davis", "data.root=${data_root}/DAVIS2016", "data.val_fraction=0.3", *FROZEN], False, 600
    ),
}
RECIPES = {
    "sam": ["loss=sam"],
    "sam_official": ["loss=sam_official"],
    "sam_official_256": ["loss=sam_official", "train.loss_size=256"],
    "sam_full_size_iou": ["loss=sam_official", "loss.full_size_iou=true"],
    "sam_without_all_masks": ["loss=sam", "loss.all_masks=0"],
    "sam_half_focal": ["loss=sam", "loss.terms.focal=10", "loss.terms.cross_entropy=2.5"],
    "sam_focal": ["loss=sam", "loss.terms.focal=20", "loss.terms.cross_entropy=0"],  # the default until November 2026
    "tutorial": ["loss=tutorial"],
    "tutorial_256": ["loss=tutorial", "train.loss_size=256"],
    "published": [  # the tutorial as it was published: one picture a step, its optimizer and its rate
        *("loss=tutorial", "prompts.box_share=0", "prompts.min_corrections=0", "prompts.max_corrections=0"),
        *("prompts.repeat_objects=false", "data.hflip=false", "data.color_jitter=0"),
        *("optim.lr=1e-5", "optim.weight_decay=4e-5", "optim.warmup_steps=0", "optim.min_lr_factor=1"),
        *("train.batch_size=1", "train.objects_per_image=1000", "train.clip_norm=1e9"),
        "train.trainable=[prompt_encoder,mask_decoder]",
    ],
}
RECIPES["published_lr"] = [*RECIPES["published"], "optim.lr=${model.lr}"]  # and the nano's rate


def list_overrides(dataset: str, recipe: str, seed: int) -> list[str]:
    """List what a run adds to the command line of train_sam2.py."""
    overrides = [*DATASETS[dataset].overrides, *RECIPES[recipe], f"seed={seed}"]
    if recipe.startswith("published"):
        overrides.append(f"train.steps={DATASETS[dataset].published_steps}")
    return [*overrides, "train.eval_every=100000", "train.eval_images=1", "train.picture_images=0"]


def train_one(folder: Path, dataset: str, recipe: str, seed: int) -> Path:
    """Train unless the folder has the finished run, and return its last.pt."""
    run_dir = (folder / dataset / recipe / f"seed_{seed}").absolute()
    if not (run_dir / "run.json").exists() or "end" not in json.loads((run_dir / "run.json").read_text()):
        shutil.rmtree(run_dir, ignore_errors=True)
        command = [sys.executable, "train_sam2.py", *list_overrides(dataset, recipe, seed), f"hydra.run.dir={run_dir}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=run.REPOSITORY)
    return run_dir / "last.pt"


def choose_items(config: dict, is_halved: bool, part: str) -> list[Item]:
    """List the validation pictures of a run, or that half of them that chooses or reports."""
    reader_keys = read_settings(train_sam2.DataSettings, config["data"], "data").reader_keys
    _, items = list_items(reader_keys, "data", is_check=False)
    if not is_halved:
        return items
    order = np.random.default_rng(0).permutation(len(items))
    chosen = order[: len(items) // 2] if part == "choose" else order[len(items) // 2 :]
    return [items[number] for number in sorted(chosen)]


@torch.no_grad()
def measure(path: Path, is_halved: bool, part: str) -> dict[str, np.ndarray]:
    """Measure weights on every object: {prompt: (O,)}, and after one click true (O, 3) and predicted (O, 3) IoUs."""
    config = torch.load(path, weights_only=True, map_location="cpu")["config"]
    device, precision = run.set_up_device("auto", config["precision"])
    model = models.build_sam2(**config["model"] | {"checkpoint": str(path)}, device=device, fast_decoder=True).eval()
    measured: dict[str, list] = {}
    with run.start_threads() as threads:
        for item in choose_items(config, is_halved, part):
            layers = item.read().layers
            picture = train_sam2.read_picture(item, layers.shape[1:], False, model.image_size, None)
            with run.autocast(model.device, precision):
                embeddings = embedding_cache.embed(model, picture)
            objects = evaluation.kept_objects(layers, config["data"]["min_area_px"])
            for masks in evaluation.group_masks(layers, objects, device):
                clicked = evaluation.click_objects(model, embeddings, masks, max(CLICKS), precision, threads)
                after_clicks = [clicked.ious[:, count - 1] for count in CLICKS]
                of_prompts = [*after_clicks, clicked.box_iou, clicked.first_ious.amax(1)]
                rows = dict(zip(PROMPTS, of_prompts, strict=True))
                rows |= {"true": clicked.first_ious, "predicted": clicked.first_predicted}
                for name, values in rows.items():
                    measured.setdefault(name, []).append(values.numpy())
    return {name: np.concatenate(values) for name, values in measured.items()}


def describe_ranking(measured: dict[str, np.ndarray]) -> np.ndarray:
    """Describe the choice among three masks: chosen, best, true, predicted (3 each), regret, |predicted - true|."""
    true, predicted = measured["true"], measured["predicted"]
    chosen, best = predicted.argmax(1), true.argmax(1)
    rows = np.arange(len(true))
    shares = [np.bincount(numbers, minlength=3) / len(true) for numbers in (chosen, best)]
    regret = (true.max(1) - true[rows, chosen]).mean()
    error = np.abs(predicted[rows, chosen] - true[rows, chosen]).mean()
    return np.concatenate([*shares, true.mean(0), predicted.mean(0), [regret, error]])


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Give mean and half width of the 95 % interval of paired differences (Student's t): (seeds,)."""
    return differences.mean(), STUDENT_T[len(differences)] * differences.std(ddof=1) / len(differences) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("part", choices=["choose", "report"])
    parser.add_argument("recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--seeds", type=int, default=5, choices=[2, 3, 4, 5])
    arguments = parser.parse_args()
    is_halved = DATASETS[arguments.dataset].is_halved
    part = arguments.part if is_halved else "all"
    of_recipe: dict[str, list[dict[str, np.ndarray]]] = {recipe: [] for recipe in arguments.recipes}
    for seed in range(arguments.seeds):  # seed by seed: an unfinished table compares all recipes
        for recipe in arguments.recipes:
            path = train_one(arguments.folder, arguments.dataset, recipe, seed)
            stored = path.parent / f"objects_{part}.npz"
            if not stored.exists():
                np.savez(stored, **measure(path, is_halved, arguments.part))
            of_recipe[recipe].append(dict(np.load(stored)))

    means = {  # (seeds, prompts)
        recipe: np.array([[measured[name].mean() for name in PROMPTS] for measured in runs])
        for recipe, runs in of_recipe.items()
    }
    print("| recipe | " + " | ".join(PROMPTS) + " | mean of five |\n|" + "---|" * (len(PROMPTS) + 2))
    last = means[arguments.recipes[-1]]
    for recipe, table in means.items():
        table = np.column_stack([table, table.mean(1)])
        print(f"| {recipe} | " + " | ".join(f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in table.T) + " |")
        if recipe != arguments.recipes[-1]:
            differences = table - np.column_stack([last, last.mean(1)])
            cells = ["{:+.3f} ± {:.3f}".format(*interval(column)) for column in differences.T]
            print(f"| minus {arguments.recipes[-1]} | " + " | ".join(cells) + " |")
    print("\n| recipe | chosen | best | true IoU | predicted IoU | regret | error |\n|---|---|---|---|---|---|---|")
    for recipe, runs in of_recipe.items():
        row = np.mean([describe_ranking(measured) for measured in runs], 0)
        triples = [" ".join(f"{value:.2f}" for value in row[start : start + 3]) for start in (0, 3, 6, 9)]
        print(f"| {recipe} | " + " | ".join(triples) + f" | {row[12]:.3f} | {row[13]:.3f} |")


if __name__ == "__main__":
    main()
