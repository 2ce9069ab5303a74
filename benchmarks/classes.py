"""Masks with classes: what the class head of train_sam2.py knows, beside two ways to name masks without it.

    DATA_ROOT=/my/datasets python -m benchmarks.classes runs/ glassware pets camvid --seeds 3

Each dataset is trained with classes=auto and with classes=null, with the same seed and all other settings the same. The
last weights are measured on the validation pictures, which choose nothing. Without a head the masks of the second run
are named (a) with the most frequent class of the training objects, (b) with the class of the training object whose mean
colour is nearest to that of the mask. Prints the share of objects named right after one click; COCO's mask AP of
automatic masks (32 x 32 points, no thresholds), mean over classes; and the mean IoU after one click of both runs.

pets: cats are Abyssinian and Bengal, dogs american_bulldog (list.txt); trained on trainval.txt, measured on test.txt.
camvid: connected parts of car, pedestrian, bicyclist of 100 px or more, trained on train, measured on val and test.
glassware: generated, vessel and material.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch

import train_sam2
from utils import run
from utils.images import read_image, read_label_map
from utils.instances.codecs import mask_to_rle
from utils.instances.readers import Item, list_items
from utils.sam2 import class_metrics, embedding_cache, evaluation, mask_generation
from utils.sam2 import model as models
from utils.sam2.class_head import class_targets
from utils.sam2.mask_generation import AutomaticSettings
from utils.settings import read_settings

SPECIES = {"1": "cat", "2": "dog"}
CAMVID_CLASSES = {8: "car", 9: "pedestrian", 10: "bicyclist"}
CAMVID_LEAST_PX = 100
ALL_PARTS = ["train.trainable=[prompt_encoder,mask_decoder,image_encoder]", "data.color_jitter=0.2"]
STEPS = {"glassware": 300, "pets": 300, "camvid": 300}


def list_pets(root: Path, split: str) -> Iterator[tuple[str, list[tuple[str, np.ndarray]]]]:
    """List pets: (picture below root, [(class, mask bool (H, W))])."""
    for line in (root / "annotations" / f"{split}.txt").read_text().splitlines():
        name, _, species, _ = line.split()
        mask = read_label_map(root / "annotations" / "trimaps" / f"{name}.png") == 1
        yield f"images/{name}.jpg", [(SPECIES[species], mask)]


def list_camvid(root: Path, split: str) -> Iterator[tuple[str, list[tuple[str, np.ndarray]]]]:
    """List CamVid's countable objects: (picture below root, [(class, mask bool (H, W)), ...])."""
    for path in sorted((root / split).glob("*.png")):
        class_map = read_label_map(root / f"{split}annot" / path.name)
        objects = []
        for value, name in CAMVID_CLASSES.items():
            num_parts, parts = cv2.connectedComponents((class_map == value).view(np.uint8), connectivity=8)
            masks = [parts == part for part in range(1, num_parts)]
            objects += [(name, mask) for mask in masks if np.count_nonzero(mask) >= CAMVID_LEAST_PX]
        yield f"{split}/{path.name}", objects


def write_coco(path: Path, pictures: list[tuple[str, list[tuple[str, np.ndarray]]]]) -> None:
    """Write objects with classes as a COCO json; pictures without objects are left out."""
    names = sorted({name for _, objects in pictures for name, _ in objects})
    images, annotations = [], []
    for file_name, objects in pictures:
        if not objects:
            continue
        height, width = objects[0][1].shape
        images.append({"id": len(images) + 1, "file_name": file_name, "height": height, "width": width})
        for name, mask in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": len(images), "category_id": 1 + names.index(name),
                    "iscrowd": 0, "area": int(mask.sum()), "segmentation": mask_to_rle(mask),
                }
            )  # fmt: skip
    categories = [{"id": 1 + number, "name": name} for number, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def data_overrides(dataset: str, folder: Path, data_root: Path, is_choosing: bool) -> list[str]:
    """Write a dataset's annotations where it has none with classes, and return what its command line adds.

    Args:
        is_choosing: train on a half of the training pictures, and measure the other one.
    """
    if dataset == "glassware":
        return ["data=glassware", *(["data.val_folder=null", "data.val_fraction=0.5"] if is_choosing else [])]
    root = data_root / {"pets": "oxford-iiit-pet", "camvid": "CamVid"}[dataset]
    list_part = {"pets": list_pets, "camvid": list_camvid}[dataset]
    splits = {
        "pets": {"train": ["trainval"], "val": ["test"]},
        "camvid": {"train": ["train"], "val": ["val", "test"]},
    }
    pictures = {split: [e for p in parts for e in list_part(root, p)] for split, parts in splits[dataset].items()}
    if is_choosing:
        pictures = {"train": pictures["train"][::2], "val": pictures["train"][1::2]}
    for split in pictures:
        write_coco(folder / f"{dataset}_{split}.json", pictures[split])
    overrides = ["data=coco", f"data.root={root.absolute()}", "data.train_images=.", "data.val_images=."]
    files = {split: (folder / f"{dataset}_{split}.json").absolute() for split in ("train", "val")}
    return [*overrides, *(f"data.{split}_annotations={path}" for split, path in files.items())]


def train_one(folder: Path, dataset: str, choice: str, seed: int, overrides: list[str], weight: float) -> Path:
    """Train unless the folder has the finished run, and return its folder."""
    weighted = f"auto_{weight}" if choice == "auto" else choice
    run_dir = (folder / f"{dataset}_{weighted}_{seed}").absolute()
    if not (run_dir / "run.json").exists() or "end" not in json.loads((run_dir / "run.json").read_text()):
        shutil.rmtree(run_dir, ignore_errors=True)
        steps = [f"train.steps={STEPS[dataset]}", f"train.eval_every={STEPS[dataset]}", "train.eval_clicks=[1]"]
        command = [sys.executable, "train_sam2.py", *overrides, *ALL_PARTS, *steps, f"classes={choice}", f"seed={seed}"]
        command.append(f"loss.classes={weight}")
        subprocess.run(
            [*command, f"hydra.run.dir={run_dir}"], check=True, stdout=subprocess.DEVNULL, cwd=run.REPOSITORY
        )
    return run_dir


def mean_color(image_rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Average a picture's colour over a mask: float (3,)."""
    return image_rgb[mask].mean(0)


@torch.no_grad()
def measure_without_head(path: Path) -> dict[str, dict[str, float]]:
    """Name the masks of weights without classes by two simple rules: {rule: {"accuracy": ..., "mask_ap": ...}}."""
    config = torch.load(path, weights_only=True, map_location="cpu")["config"]
    device, precision = run.set_up_device("auto", config["precision"])
    model_config = config["model"] | {"checkpoint": str(path)}
    model = models.build_sam2(**model_config, device=device, fast_decoder=config["fast_decoder"])
    automatic = AutomaticSettings(pred_iou_thresh=0.0, stability_score_thresh=0.0)  # as train_sam2.py measures
    data = read_settings(train_sam2.DataSettings, config["data"], "data")
    train_items, val_items = list_items(data.reader_keys, "data", is_check=False)

    colors, names_of_colors = [], []
    for item in train_items:
        instances, image_rgb = item.read(), read_image(item.image_path)
        for layer, object_id in evaluation.kept_objects(instances.layers, data.min_area_px):
            colors.append(mean_color(image_rgb, instances.layers[layer] == object_id))
            names_of_colors.append(instances.annotations[object_id - 1]["category"])
    names, (most_frequent, _) = sorted(set(names_of_colors)), Counter(names_of_colors).most_common(1)[0]
    colors = np.array(colors)

    def nearest(image_rgb: np.ndarray, mask: np.ndarray) -> str:
        if not mask.any():
            return most_frequent
        return names_of_colors[np.linalg.norm(colors - mean_color(image_rgb, mask), axis=1).argmin()]

    rules = {"most frequent": lambda image_rgb, mask: most_frequent, "nearest colour": nearest}
    right = {rule: [] for rule in rules}
    matched = {rule: [] for rule in rules}
    with run.start_threads() as threads:
        for item in val_items:
            measure_picture(model, item, automatic, precision, data.min_area_px, threads, rules, names, right, matched)
    return {
        rule: {"accuracy": float(np.mean(right[rule]))}
        | class_metrics.summarize_precision(class_metrics.precision_by_class(matched[rule], names))
        for rule in rules
    }


def measure_picture(
    model, item: Item, automatic, precision, min_area_px, threads, rules, names, right: dict, matched: dict
) -> None:
    """Name the masks of one picture, clicked and automatic, by each rule, and add what is right to the lists."""
    instances, image_rgb = item.read(), read_image(item.image_path)
    objects = evaluation.kept_objects(instances.layers, min_area_px)
    if not objects:
        return
    targets = class_targets(instances, objects, names)
    picture = train_sam2.read_picture(item, instances.layers.shape[1:], False, model.image_size, None)
    with run.autocast(model.device, precision):
        embeddings = embedding_cache.embed(model, picture)
        generated = mask_generation.generate_masks(model, image_rgb, automatic, embeddings).annotations
    clicked = [
        mask
        for masks in evaluation.group_masks(instances.layers, objects, model.device)
        for mask in evaluation.click_objects(model, embeddings, masks, 1, precision, threads).first_masks
    ]
    for rule, name_mask in rules.items():
        answers = [1 + names.index(name_mask(image_rgb, mask)) for mask in clicked]
        right[rule] += [answer == target for answer, target in zip(answers, targets, strict=True)]
        named = [
            each | {"class": name_mask(image_rgb, class_metrics.rle_to_mask(each["segmentation"])), "class_prob": 1.0}
            for each in generated
        ]
        matched[rule].append(class_metrics.match_masks(named, instances, names, min_area_px))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("datasets", nargs="+", choices=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--class-loss", type=float, default=0.1, help="loss.classes")
    parser.add_argument("--choose", action="store_true", help="measure a half of the training pictures")
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("DATA_ROOT", run.REPOSITORY / "data")))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = ["head", "most frequent", "nearest colour"]
    print("| dataset | masks named by | right after 1 click | mask AP | AP at 0.5 |\n|---|---|---|---|---|")
    lines = []
    for dataset in arguments.datasets:
        overrides = data_overrides(dataset, arguments.folder, arguments.data_root, arguments.choose)
        measured, ious = {row: [] for row in rows}, {"auto": [], "null": []}
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            train = functools.partial(
                train_one, arguments.folder, dataset, seed=seed, overrides=overrides, weight=arguments.class_loss
            )
            folders = {choice: train(choice=choice) for choice in ("auto", "null")}
            last = {c: json.loads((f / "run.json").read_text())["metrics"]["last"] for c, f in folders.items()}
            stored = folders["null"] / "named.json"
            if not stored.exists():
                stored.write_text(json.dumps(measure_without_head(folders["null"] / "last.pt")))
            named = json.loads(stored.read_text())
            of_head = {name.removeprefix("val/"): value for name, value in last["auto"].items()}
            named["head"] = of_head | {"accuracy": of_head["class_accuracy_1_click"]}
            for row in rows:
                measured[row].append([named[row][key] for key in ("accuracy", "mask_ap", "mask_ap_50")])
            for choice in ious:
                ious[choice].append(last[choice]["val/iou_1_click"])
        for row in rows:
            table = np.array(measured[row])  # (seeds, 3)
            cells = [f"{v.mean():.3f} ± {v.std(ddof=1) if len(v) > 1 else 0:.3f}" for v in table.T]
            print(f"| {dataset} | {row} | " + " | ".join(cells) + " |")
        difference = np.array(ious["auto"]) - np.array(ious["null"])
        lines.append(
            f"{dataset}: IoU after one click {np.mean(ious['auto']):.3f} with classes, {np.mean(ious['null']):.3f} "
            f"without; difference by seed {', '.join(f'{value:+.3f}' for value in difference)}"
        )
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
