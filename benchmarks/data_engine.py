"""The data engine with a simulated annotator: what clicks buy, with and without training in between.

    DATA_ROOT=/my/datasets python -m benchmarks.data_engine runs/ nuclei glassware --seeds 3
    DATA_ROOT=/my/datasets python -m benchmarks.data_engine runs/ nuclei glassware --seeds 3 --report

Truth stands in for the hand: it clicks at the largest error of the mask before, until the IoU reaches 0.85 (nuclei) or
0.9 (glassware), after 8 clicks takes the brush, which draws the truth and costs 3 clicks more. What it accepted is what
trains and validates, not the truth; besides the hand, the test pictures alone see that. Of each dataset some are kept
to test and some are to be labelled (TASKS), drawn by the seed; a sixth of these validates, labelled by hand with the
model at the start in all of
    (a) labelling without retraining: the model at the start, for the same pictures as (b)
    (b) rounds: two assisted, one semi-automatic, one automatic for what is left; a training after each, always from the
        weights at the start, on all masks so far
    (c) as many clicks as (b), on random pictures with the model at the start, and then one training
    (d) automatic masks of the model at the start for all pictures, and one training
In the semi-automatic round the hand sees the automatic masks of a predicted IoU above `confident_iou`; it accepts those
that are good enough, deletes those below 0.5 with every object, and each further one on the same object (a click each);
the others it selects (a click) and corrects. Every training is `train_sam2.py experiment=data_engine` with the same
settings and steps: the decoder and the prompt encoder alone, embeddings cached. Weights with the best val/iou_1_click.

Prints the table of the means over seeds, and draws <folder>/data_engine_<dataset>.png: test IoU against clicks.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import torch
from omegaconf import OmegaConf
from scipy import stats
from tqdm import tqdm

import train_sam2
from benchmarks.measure import CONFIGS
from utils import images, listing, run
from utils.instances import label_folder
from utils.instances.codecs import mask_to_rle, rle_to_mask
from utils.instances.label_folder import ASSISTED, AUTOMATIC, PERSON
from utils.instances.readers import Item, list_items
from utils.sam2 import benchmark, embedding_cache, evaluation, label, mask_generation, prompts, rounds
from utils.sam2 import model as models
from utils.sam2.checked_labels import choose_confident_iou
from utils.sam2.mask_generation import AutomaticSettings, GeneratedMasks
from utils.settings import read_settings

MOST_CLICKS, BRUSH_CLICKS = 8, 3
WRONG_IOU = 0.5  # an automatic mask below it, with every object, is deleted
VAL_FRACTION = 1 / 6
ROUND_PICTURES = 8  # of each round with a person
MAX_OVERLAP = 0.15  # infer_sam2.py's own
GRID = {"points_per_side": 24, "crop_n_layers": 0}
METRICS = ("val/iou_1_click", "val/iou_3_clicks", "val/iou_box", "val/oracle_iou_1_click")


@dataclass(frozen=True)
class Task:
    """A dataset, how many of its pictures are used, the IoU at which a person is content, and how models train."""

    data: str  # a name in configs/sam2/data
    num_test: int
    num_pool: int
    enough_iou: float
    min_area_px: int
    image_size: int
    steps: int
    overrides: tuple[str, ...]


TASKS = {
    "nuclei": Task("dsb2018", 30, 48, 0.85, 30, 512, 80, ("train.batch_size=2", "train.objects_per_image=10")),
    "glassware": Task("glassware", 15, 40, 0.9, 30, 256, 120, ("train.batch_size=4", "train.objects_per_image=8")),
}


class Labelled(NamedTuple):
    """What a person made of one picture."""

    annotations: list[dict]
    clicks: list[int]  # that each object took, by its place in the truth; 0 for an accepted automatic mask
    num_deletions: int  # of automatic masks, a click each
    rejected: list[float]  # predicted IoUs of automatic masks that were corrected or deleted

    @property
    def num_clicks(self) -> int:
        """All clicks on the picture."""
        return sum(self.clicks) + self.num_deletions


# ---------------------------------------------------------------------------------------------------------------------
# the simulated annotator


def click_until(
    model: torch.nn.Module,
    embeddings: models.Embeddings,
    truth: np.ndarray,
    starts: np.ndarray | None,
    enough_iou: float,
    threads: ThreadPoolExecutor,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Click on objects of one picture, each in the centre of its largest error, until a person is content.

    Args:
        truth: bool (O, H, W).
        starts: bool (O, H, W), masks that are corrected; None: none is there yet.
    Returns:
        masks bool (O, H, W), the last ones, or the truth where the brush was taken; clicks int (O,), and strokes (O,).
    """
    num_objects, orig_hw = len(truth), truth.shape[1:]
    masks, left = np.zeros_like(truth) if starts is None else starts.copy(), np.arange(num_objects)
    clicks = np.zeros(num_objects, np.int64)
    point_coords = np.zeros((num_objects, MOST_CLICKS, 2), np.float32)
    point_labels = np.zeros((num_objects, MOST_CLICKS), np.int32)
    mask_inputs = None if starts is None else models.mask_logits(list(starts), model)
    for count in range(1, MOST_CLICKS + 1):
        points, labels = zip(*threads.map(prompts.center_point, truth[left], masks[left]), strict=True)
        point_coords[left, count - 1], point_labels[left, count - 1] = np.stack(points), labels
        prediction = evaluation.predict_masks(
            model, embeddings, point_coords[left, :count], point_labels[left, :count], mask_inputs, orig_hw, "fp32"
        )[:2]
        mask_inputs = evaluation.pick_mask(*prediction)
        all_ious, pred_masks = evaluation.measure_masks(*prediction, torch.from_numpy(truth[left]), threads)
        masks[left] = pred_masks.numpy()
        clicks[left] = count
        iou = all_ious.gather(1, prediction[1].argmax(1)[:, None])[:, 0]
        is_left = (iou < enough_iou).numpy()
        left, mask_inputs = left[is_left], mask_inputs[torch.from_numpy(is_left)]
        if not len(left):
            break
    masks[left] = truth[left]
    strokes = np.zeros(num_objects, np.int64)
    strokes[left] = BRUSH_CLICKS
    return masks, clicks, strokes


@torch.inference_mode()
def label_by_hand(
    model: torch.nn.Module, image_rgb: np.ndarray, truth: np.ndarray, task: Task, shown: list[dict]
) -> Labelled:
    """Label one picture: check the automatic masks that are shown, then click on the objects that are left.

    Args:
        truth: bool (O, H, W).
        shown: annotations of automatic masks.
    """
    accepted, to_correct, rejected, num_deletions = {}, {}, [], 0
    for annotation in sorted(shown, key=lambda each: -each["predicted_iou"]):
        mask = rle_to_mask(annotation["segmentation"])
        ious = np.array([np.count_nonzero(mask & each) / np.count_nonzero(mask | each) for each in truth])
        place = int(ious.argmax())
        if ious[place] < WRONG_IOU or place in accepted or place in to_correct:
            num_deletions += 1
        elif ious[place] >= task.enough_iou:
            accepted[place] = annotation | {"checked": True}
            continue
        else:
            to_correct[place] = mask
        rejected.append(annotation["predicted_iou"])
    clicks = np.zeros(len(truth), np.int64)
    annotations = list(accepted.values())
    embeddings = embedding_cache.embed(model, models.preprocess(image_rgb, model.image_size, model.device)[None])
    places = [place for place in range(len(truth)) if place not in accepted and place not in to_correct]
    with run.start_threads() as threads:
        for chosen, starts in ((places, None), (list(to_correct), np.array(list(to_correct.values())))):
            for first in range(0, len(chosen), evaluation.MOST_IN_GROUP):
                group = slice(first, first + evaluation.MOST_IN_GROUP)
                started = None if starts is None else starts[group]
                masks, made, strokes = click_until(
                    model, embeddings, truth[chosen[group]], started, task.enough_iou, threads
                )
                made += starts is not None  # the click that selects
                clicks[chosen[group]] = made + strokes
                annotations += [
                    {
                        "segmentation": mask_to_rle(mask),
                        "origin": PERSON if num_strokes else ASSISTED,
                        "clicks": int(num_clicks),
                        "strokes": int(num_strokes),
                    }
                    for mask, num_clicks, num_strokes in zip(masks, made, strokes, strict=True)
                ]
    return Labelled(annotations, clicks.tolist(), num_deletions, rejected)


# ---------------------------------------------------------------------------------------------------------------------
# one dataset with one seed


@dataclass(frozen=True)
class Trial:
    """The pictures of one dataset and seed."""

    folder: Path
    task: Task
    seed: int
    pictures: dict[str, images.Picture]  # to be labelled, by name, in the order in which a person takes them
    truth: dict[str, np.ndarray]  # bool (O, H, W), of these
    val_names: set[str]
    test_items: list[Item]

    @property
    def train_names(self) -> list[str]:
        """The pictures that train, in the order in which a person takes them."""
        return [name for name in self.pictures if name not in self.val_names]


def read_truth(item: Item, min_area_px: int) -> np.ndarray:
    """Read a picture's objects: bool (O, H, W)."""
    layers = item.read().layers
    objects = evaluation.kept_objects(layers, min_area_px)
    return np.array([layers[layer] == object_id for layer, object_id in objects], bool)


def draw_items(name: str, seed: int, data_root: Path) -> tuple[list[Item], list[Item], dict[Item, np.ndarray]]:
    """Draw the pictures of a trial: those that test, those to be labelled, and the objects of all, bool (O, H, W)."""
    task = TASKS[name]
    with hydra.initialize_config_dir(str(CONFIGS / "sam2"), version_base="1.3"):
        overrides = [f"data={task.data}", f"data_root={data_root}", f"data.min_area_px={task.min_area_px}"]
        config = OmegaConf.to_container(hydra.compose("train_sam2", overrides), resolve=True)
    data = read_settings(train_sam2.DataSettings, config["data"], "data")
    train_items, val_items = list_items(data.reader_keys, "data", is_check=False)
    truth = {item: read_truth(item, task.min_area_px) for item in [*train_items, *val_items]}
    items = sorted((item for item, masks in truth.items() if len(masks)), key=lambda item: item.name)
    order = np.random.default_rng(seed).permutation(len(items))
    chosen = [items[number] for number in order]
    return chosen[: task.num_test], chosen[task.num_test : task.num_test + task.num_pool], truth


def start_trial(folder: Path, name: str, seed: int, data_root: Path) -> Trial:
    """Draw the pictures of a trial, and put links to those that are labelled into a folder of their own."""
    test_items, pool, truth = draw_items(name, seed, data_root)
    photos = folder / "photos"
    photos.mkdir(parents=True)
    pictures, masks_of = {}, {}
    for item in pool:
        picture_name = item.name.replace("/", "_")
        path = photos / f"{picture_name}{item.image_path.suffix}"
        path.symlink_to(item.image_path.absolute())
        pictures[picture_name], masks_of[picture_name] = images.Picture(path, None, picture_name), truth[item]
    val_names, _ = listing.draw_split(set(pictures), VAL_FRACTION, seed)
    return Trial(folder, TASKS[name], seed, pictures, masks_of, val_names, test_items)


def build_model(task: Task, checkpoint: str) -> torch.nn.Module:
    """Build the nano at the size of the task, "auto" with its bundled weights."""
    model_config = models.read_model_config("sam2_nano") | {"checkpoint": checkpoint, "image_size": task.image_size}
    return models.build_sam2(**model_config, device=torch.device("cpu"), fast_decoder=True)


def make_folder(trial: Trial, arm: str) -> Path:
    """Make the folder of labels of one way to label, with the pictures that validate drawn."""
    labels_dir = trial.folder / arm
    with label_folder.open_folder(labels_dir):
        label_folder.draw_validation(labels_dir, set(trial.pictures), VAL_FRACTION, trial.seed)
    return labels_dir


def label_all(
    trial: Trial, model: torch.nn.Module, names: Iterable[str], labels_dir: Path, confident_iou: float | None = None
) -> dict[str, Labelled]:
    """Label pictures by hand, finish them, and write their records; {name: what it took}.

    Args:
        confident_iou: of the automatic masks in the record those of a predicted IoU from here on are shown; None: none.
    """
    made = {}
    for name in tqdm(list(names), desc=f"label {labels_dir.name}", disable=None):
        picture, truth = trial.pictures[name], trial.truth[name]
        record = label_folder.read_record(label_folder.record_path(labels_dir, name))
        shown = [
            each
            for each in record.get("annotations", [])
            if confident_iou is not None and each["predicted_iou"] >= confident_iou
        ]
        made[name] = label_by_hand(model, images.read_image(picture.path), truth, trial.task, shown)
        number = 1 + rounds.count_rounds(labels_dir)
        annotations = [
            each | ({} if each["origin"] == AUTOMATIC else {"round": number}) for each in made[name].annotations
        ]
        written = record | {"annotations": annotations, "rejected": made[name].rejected}
        label_folder.write_labels(labels_dir, picture, truth.shape[1:], written)
    label_folder.write_done(labels_dir, label_folder.read_done(labels_dir) | set(made))
    return made


def label_automatically(trial: Trial, model: torch.nn.Module, names: Iterable[str], labels_dir: Path) -> dict[str, int]:
    """Label pictures as mode=label does, with one grid of points and without crops."""
    automatic = read_settings(AutomaticSettings, models.read_model_config("sam2_nano")["automatic"] | GRID, "automatic")

    def generate(image_rgb: np.ndarray) -> GeneratedMasks:
        return mask_generation.generate_masks(model, image_rgb, automatic)

    chosen = [trial.pictures[name] for name in names]
    settings = label.LabelSettings(VAL_FRACTION)
    made_by = benchmark.digest_weights(model)
    with label_folder.open_folder(labels_dir):
        counts, failures = label.label_pictures(
            generate, chosen, labels_dir, made_by, MAX_OVERLAP, settings, trial.seed
        )
    assert not failures
    return counts


def train_round(trial: Trial, labels_dir: Path) -> dict[str, float]:
    """Train on a folder of labels from the weights at the start; what the test pictures say of its best.pt."""
    number = rounds.count_rounds(labels_dir) + 1
    run_dir = trial.folder / f"{labels_dir.name}_train_{number}"
    shutil.rmtree(run_dir, ignore_errors=True)
    task, start_s = trial.task, time.perf_counter()
    command = [sys.executable, "train_sam2.py", "experiment=data_engine", f"seed={trial.seed}"]
    command += [
        f"data.root={trial.folder / 'photos'}",
        f"data.labels={labels_dir}",
        f"model.image_size={task.image_size}",
    ]
    command += [f"train.steps={task.steps}", f"train.eval_every={task.steps}", "train.eval_clicks=[1,3]"]
    command += ["prompts.repeat_objects=true", f"cache={trial.folder.parent / 'cache'}", *task.overrides]
    subprocess.run(
        [*command, f"hydra.run.dir={run_dir}"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        cwd=run.REPOSITORY,
    )  # fmt: skip
    train_s = time.perf_counter() - start_s
    return measure_test(trial, build_model(task, str(labels_dir / "best.pt"))) | {"train_s": train_s}


def measure_test(trial: Trial, model: torch.nn.Module) -> dict[str, float]:
    """Measure a model on the test pictures."""
    metrics = train_sam2.evaluate(model, trial.test_items, trial.task.min_area_px, [1, 3], "fp32", None, 0)
    return {name: metrics[name] for name in METRICS}


def summarize(made: dict[str, Labelled]) -> dict[str, float]:
    """Sum up what a person did to pictures."""
    clicks = np.concatenate([np.array(labelled.clicks) for labelled in made.values()])
    annotations = [each for labelled in made.values() for each in labelled.annotations]
    return {
        "pictures": len(made),
        "masks": len(clicks),
        "clicks": int(sum(labelled.num_clicks for labelled in made.values())),
        "clicks_per_mask": sum(labelled.num_clicks for labelled in made.values()) / len(clicks),
        "brush": sum(each["origin"] == PERSON for each in annotations) / len(clicks),
        "accepted": sum(each["origin"] == AUTOMATIC for each in annotations),
        "deleted": sum(labelled.num_deletions for labelled in made.values()),
    }


def run_trial(trial: Trial) -> list[dict]:
    """Label and train in all four ways: rows with the arm, all clicks so far, and what was measured."""
    start = build_model(trial.task, "auto")
    untrained = measure_test(trial, start)
    names = trial.train_names
    parts = [names[first : first + ROUND_PICTURES] for first in range(0, 3 * ROUND_PICTURES, ROUND_PICTURES)]
    rest = names[3 * ROUND_PICTURES :]

    labels_dir = make_folder(trial, "b")
    val_made = label_all(trial, start, sorted(trial.val_names), labels_dir)
    val_records = {name: (labels_dir / "masks" / f"{name}.json").read_bytes() for name in trial.val_names}
    spent = num_val = summarize(val_made)["clicks"]
    rows = [{"arm": "b", "stage": "validation", **summarize(val_made), "spent": spent, **untrained}]
    model = start
    for number, (stage, chosen) in enumerate(zip(("assisted", "semi", "semi"), parts, strict=True), 1):
        confident_iou, seen = None, {}
        if stage == "semi":
            label_automatically(trial, model, chosen, labels_dir)
            confident_iou, _ = choose_confident_iou(labels_dir)
        made = label_all(trial, model, chosen, labels_dir, confident_iou)
        spent += summarize(made)["clicks"]
        seen = {"confident_iou": confident_iou} | train_round(trial, labels_dir)
        rows.append({"arm": "b", "stage": f"{number} {stage}", **summarize(made), "spent": spent, **seen})
        model = build_model(trial.task, str(labels_dir / "best.pt"))
    counts = label_automatically(trial, model, rest, labels_dir)
    seen = {"pictures": counts["labelled"], "masks": counts["masks"]} | train_round(trial, labels_dir)
    rows.append({"arm": "b", "stage": "4 automatic", "spent": spent, **seen})

    labels_dir, done = make_folder(trial, "a"), num_val
    rows.append({"arm": "a", "stage": "validation", "spent": done, **untrained})
    hand_made = {}
    for number, chosen in enumerate(parts, 1):
        made = label_all(trial, start, chosen, labels_dir)
        hand_made |= made
        done += summarize(made)["clicks"]
        rows.append({"arm": "a", "stage": f"{number} assisted", **summarize(made), "spent": done, **untrained})

    labels_dir, done = make_folder(trial, "c"), num_val
    copy_records(trial, labels_dir, val_records)
    hand_made |= label_all(trial, start, rest, trial.folder / "a")
    taken = cut_at_budget(hand_made, names, spent - num_val)
    for name, annotations in taken.items():
        record = {"annotations": [each | {"round": 1} for each in annotations]}
        label_folder.write_labels(labels_dir, trial.pictures[name], trial.truth[name].shape[1:], record)
    done += sum(each["clicks"] + each["strokes"] for annotations in taken.values() for each in annotations)
    num_masks = sum(map(len, taken.values()))
    seen = {"pictures": len(taken), "masks": num_masks} | train_round(trial, labels_dir)
    rows.append({"arm": "c", "stage": "assisted", "spent": done, **seen})

    labels_dir = make_folder(trial, "d")
    copy_records(trial, labels_dir, val_records)
    counts = label_automatically(trial, start, names, labels_dir)
    seen = {"pictures": counts["labelled"], "masks": counts["masks"]} | train_round(trial, labels_dir)
    rows.append({"arm": "d", "stage": "automatic", "spent": num_val, **seen})
    return rows


def copy_records(trial: Trial, labels_dir: Path, records: dict[str, bytes]) -> None:
    """Put the records of the pictures that validate into another folder of labels."""
    for name, content in records.items():
        label_folder.record_path(labels_dir, name).write_bytes(content)


def cut_at_budget(made: dict[str, Labelled], names: list[str], budget: int) -> dict[str, list[dict]]:
    """Take pictures in order, mask by mask, until the clicks are spent: {name: annotations}."""
    taken = {}
    for name in names:
        for annotation in made[name].annotations:
            cost = annotation["clicks"] + annotation["strokes"]
            if cost > budget:
                return taken
            budget -= cost
            taken.setdefault(name, []).append(annotation)
    return taken


# ---------------------------------------------------------------------------------------------------------------------
# the report


def describe(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    values = np.array(values, float)
    spread = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():.{digits}f} ± {spread:.{digits}f}"


def interval(values: list[float]) -> str:
    """The mean of paired differences over seeds, and its 95 % interval (Student's t)."""
    values = np.array(values, float)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{values.mean():+.3f} [{values.mean() - half:+.3f}, {values.mean() + half:+.3f}]"


def report(folder: Path, name: str, trials: list[list[dict]]) -> None:
    """Print a dataset's table and draw its curves.

    Args:
        trials: the rows of each seed.
    """
    print(f"\n### {name}, {len(trials)} seeds\n")
    head = [
        "way",
        "stage",
        "masks",
        "clicks so far",
        "clicks/mask",
        "brush",
        "accepted",
        "deleted",
        "1 click",
        "3 clicks",
    ]
    head += ["box", "training, s"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for place, row in enumerate(trials[0]):
        rows = [trial[place] for trial in trials]

        def cell(key: str, digits: int, rows=rows) -> str:
            return describe([each[key] for each in rows], digits) if rows[0].get(key) is not None else ""

        cells = [f"({row['arm']})", row["stage"], cell("masks", 0), cell("spent", 0), cell("clicks_per_mask", 2)]
        cells += [cell("brush", 2), cell("accepted", 0), cell("deleted", 0)]
        cells += [cell(key, 3) for key in METRICS[:3]] + [cell("train_s", 0)]
        print("| " + " | ".join(cells) + " |")
    of = [{(row["arm"], row["stage"]): row for row in trial} for trial in trials]
    last_a, last_b = [[each[arm, stage] for each in of] for arm, stage in (("a", "3 assisted"), ("b", "3 semi"))]
    per_mask = [b["clicks_per_mask"] - a["clicks_per_mask"] for a, b in zip(last_a, last_b, strict=True)]
    share = [b["clicks_per_mask"] / a["clicks_per_mask"] for a, b in zip(last_a, last_b, strict=True)]
    print(f"\nclicks per mask of the last round with a person, (b) - (a), the same pictures: {interval(per_mask)};")
    print(f"(b) / (a): {describe(share)}")
    for stage in ("3 semi", "4 automatic"):
        for key in METRICS[:3]:
            differences = [each["b", stage][key] - each["c", "assisted"][key] for each in of]
            print(f"(b) after {stage} - (c), {key}: {interval(differences)}")
    confident = [row.get("confident_iou") for trial in trials for row in trial if row["stage"].endswith("semi")]
    print(f"confident_iou in semi-automatic rounds, by seed and round: {confident}")
    plot(folder / f"data_engine_{name}.png", name, trials)


def plot(path: Path, name: str, trials: list[list[dict]]) -> None:
    """Draw test IoU after one click, and clicks per mask, against clicks: means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    iou_ax, work_ax = figure.subplots(1, 2)
    labels = {"a": "no retraining", "b": "rounds", "c": "random pictures, one training", "d": "automatic masks alone"}
    for arm, words in labels.items():
        places = [place for place, row in enumerate(trials[0]) if row["arm"] == arm]
        spent = [[trial[place]["spent"] for place in places] for trial in trials]
        ious = np.array([[trial[place][METRICS[0]] for place in places] for trial in trials])
        spread = ious.std(0, ddof=1) if len(trials) > 1 else None
        iou_ax.errorbar(np.mean(spent, 0), ious.mean(0), spread, marker="o", capsize=3, label=f"({arm}) {words}")
        worked = [
            place
            for place in places
            if trials[0][place].get("clicks_per_mask") and trials[0][place]["stage"][0].isdigit()
        ]
        if worked:
            costs = np.array([[trial[place]["clicks_per_mask"] for place in worked] for trial in trials])
            spread = costs.std(0, ddof=1) if len(trials) > 1 else None
            work_ax.errorbar(
                np.arange(1, len(worked) + 1), costs.mean(0), spread, marker="o", capsize=3, label=f"({arm})"
            )
    iou_ax.set(xlabel="clicks, with those for validation", ylabel="test IoU after one click", title=name)
    work_ax.set(xlabel="round, the same pictures", ylabel="clicks per mask", ylim=(0, None), xticks=[1, 2, 3])
    for ax in (iou_ax, work_ax):
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path, dpi=100)


@torch.inference_mode()
def count_clicks(model: torch.nn.Module, items: list[Item], task: Task, enough_iou: float) -> tuple[float, float]:
    """Count what the hand needs on pictures: clicks per object, the brush's too, and the share that needs the brush."""
    clicks, strokes = [], []
    with run.start_threads() as threads:
        for item in items:
            truth, image_rgb = read_truth(item, task.min_area_px), images.read_image(item.image_path)
            encoder_input = models.preprocess(image_rgb, model.image_size, model.device)[None]
            embeddings = embedding_cache.embed(model, encoder_input)
            for first in range(0, len(truth), evaluation.MOST_IN_GROUP):
                group = truth[first : first + evaluation.MOST_IN_GROUP]
                _, made, strokes_made = click_until(model, embeddings, group, None, enough_iou, threads)
                clicks += made.tolist()
                strokes += strokes_made.tolist()
    return float(np.mean(clicks) + np.mean(strokes)), float(np.mean(np.array(strokes) > 0))


def report_clicks(folder: Path, name: str, seeds: Iterable[int], enough_iou: float, data_root: Path) -> None:
    """Print what the hand needs on the test pictures for another IoU, with the weights of each training."""
    task = TASKS[name]
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        test_items, _, _ = draw_items(name, seed, data_root)
        runs = {f"({arm}) training {number}": folder / f"{name}_{seed}" / f"{arm}_train_{number}" / "best.pt"
                for arm, number in (("b", 1), ("b", 2), ("b", 3), ("b", 4), ("c", 1))}  # fmt: skip
        for title, path in {"at the start": "auto", **runs}.items():
            model = build_model(task, str(path))
            rows.setdefault(title, []).append(count_clicks(model, test_items, task, enough_iou))
    print(f"\n{name}, test pictures, until IoU {enough_iou}\n\n| weights | clicks/mask | brush |\n|---|---|---|")
    for title, counted in rows.items():
        clicks, brush = zip(*counted, strict=True)
        print(f"| {title} | {describe(clicks, 2)} | {describe(brush, 2)} |")
    last, first = (np.array(rows[title])[:, 0] for title in ("(b) training 3", "at the start"))
    print(f"training 3 - start: {interval(last - first)}; training 3 / start: {describe(last / first)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("datasets", nargs="+", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="of what is there, without measuring anything")
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("DATA_ROOT", run.REPOSITORY / "data")))
    parser.add_argument("--clicks-at", type=float, help="instead, clicks on the test pictures until another IoU")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.datasets:
        trials, seeds = [], range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        if arguments.clicks_at is not None:
            report_clicks(arguments.folder, name, seeds, arguments.clicks_at, arguments.data_root.absolute())
            continue
        for seed in seeds:
            folder = (arguments.folder / f"{name}_{seed}").absolute()
            stored = folder / "rows.json"
            if not stored.exists() and not arguments.report:
                shutil.rmtree(folder, ignore_errors=True)
                start_s = time.perf_counter()
                rows = run_trial(start_trial(folder, name, seed, arguments.data_root.absolute()))
                stored.write_text(json.dumps(rows, indent=1))
                print(f"{name}, seed {seed}: {(time.perf_counter() - start_s) / 60:.1f} min", flush=True)
            if stored.exists():
                trials.append(json.loads(stored.read_text()))
        if trials:
            report(arguments.folder, name, trials)


if __name__ == "__main__":
    main()
