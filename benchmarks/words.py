"""Masks from words: what prompts=text learns from crops alone, on generated pictures of objects with names.

    python -m benchmarks.words runs/ --seeds 3

The embedding is the stand-in text_encoder=named_shapes, in which crops and words agree by construction: this measures
the way from an embedding to a mask, not CLIP. The nano trains on crops of 12 kinds of objects; words appear in no
training. The last weights are measured on 80 test pictures, which choose nothing; each has an object of the four kinds
that no training or validation picture shows, one that shares its colour and one that shares its shape. Prints mean IoU,
mean and standard deviation over seeds, for objects of the four kinds and for the others:

    right words         the object's name, no click
    no text             the zero embedding in their place
    wrong words         the name of another object in the picture, mean over those
    crop                the object's own crop, as in training
    point               one click at the object's centre, no words
    point and words     the same click beside the name
    point, wrong words  the same click beside the name of the next object in the picture

and all rows again where the right words alone give a mask that overlaps another object more than theirs, or none.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import train_sam2
from utils import run
from utils.images import read_image
from utils.instances.readers import Item, list_items
from utils.sam2 import embedding_cache, evaluation, prompts, words
from utils.sam2 import model as models
from utils.samples.named_shapes import HELD_OUT

STEPS = 450
SETTINGS = [
    "prompts=text", "text_encoder=named_shapes", "data=named_shapes", "model.image_size=128",
    "train.trainable=[prompt_encoder,mask_decoder,image_encoder]", "prompts.text.lr=1e-2", "prompts.max_corrections=1",
    "train.eval_clicks=[1]", "train.eval_images=8", "num_workers=0",
]  # fmt: skip
ROWS = ("right words", "no text", "wrong words", "crop", "point", "point and words", "point, wrong words")


def train_one(folder: Path, seed: int, steps: int) -> Path:
    """Train unless the folder has the finished run, and return its folder."""
    run_dir = (folder / f"words_{steps}_{seed}").absolute()
    if not (run_dir / "run.json").exists() or "end" not in json.loads((run_dir / "run.json").read_text()):
        shutil.rmtree(run_dir, ignore_errors=True)
        changes = [f"train.steps={steps}", f"train.eval_every={steps}", f"seed={seed}", f"hydra.run.dir={run_dir}"]
        command = [sys.executable, "train_sam2.py", *SETTINGS, *changes]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=run.REPOSITORY)
    return run_dir


def list_test_pictures(config: dict) -> list[Item]:
    """List the pictures of the test split, which neither training nor validation reads."""
    keys = train_sam2.read_settings(train_sam2.DataSettings, config["data"], "data").reader_keys
    test = {"val_images": "test", "val_annotations": "annotations/instances_test.json"}
    return list_items(keys | test, "data", is_check=False)[1]


@torch.no_grad()
def measure(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Measure weights on every object of the test pictures.

    Returns:
        {row: IoU (N,)}; is_new bool (N,), objects of a kind that training does not show; is_lost bool (N,), objects
        whose words give a mask that overlaps another object more.
    """
    state = torch.load(path, weights_only=True, map_location="cpu")
    config = state["config"]
    device, precision = run.set_up_device("auto", config["precision"])
    model_config = config["model"] | {"checkpoint": str(path)}
    model = models.build_sam2(**model_config, device=device, fast_decoder=config["fast_decoder"])
    text_map, encoder = words.load_text_map(path, device), words.build_encoder(state["text_encoder"], device)
    ious, is_new, is_lost = {row: [] for row in ROWS}, [], []
    with run.start_threads() as threads:
        for item in list_test_pictures(config):
            instances, image_rgb = item.read(), read_image(item.image_path)
            objects = evaluation.kept_objects(instances.layers, 1)
            masks = np.stack([instances.layers[layer] == object_id for layer, object_id in objects])  # (O, H, W)
            names = [instances.annotations[object_id - 1]["category"] for _, object_id in objects]
            picture = train_sam2.read_picture(item, masks.shape[1:], False, model.image_size, None)
            embeddings = embedding_cache.embed(model, picture)

            def measure_tokens(truth, tokens, points=None, embeddings=embeddings):
                return evaluation.measure_tokens(model, embeddings, truth, tokens, precision, threads, points).numpy()

            crops = [words.crop_object(image_rgb, m, words.VALIDATION_SCALE, False, encoder.crop_side) for m in masks]
            crop_embeddings = encoder.embed_crops(torch.from_numpy(np.stack(crops)))
            tokens = text_map(encoder.embed_words(names).to(device))  # (O, C)
            no_text = text_map(torch.zeros(len(names), encoder.size, device=device))
            points = np.stack([prompts.center_point(mask, np.zeros_like(mask))[0] for mask in masks])[:, None]
            of_words, of_objects = np.divmod(np.arange(len(masks) ** 2), len(masks))
            overlaps = measure_tokens(masks[of_objects], tokens[of_words]).reshape(len(masks), -1)  # (words, objects)
            ious["right words"].append(overlaps.diagonal())
            ious["wrong words"].append((overlaps.sum(0) - overlaps.diagonal()) / (len(masks) - 1))
            ious["no text"].append(measure_tokens(masks, no_text))
            ious["crop"].append(measure_tokens(masks, text_map(crop_embeddings.to(device))))
            ious["point"].append(measure_tokens(masks, None, points))
            ious["point and words"].append(measure_tokens(masks, tokens, points))
            ious["point, wrong words"].append(measure_tokens(masks, tokens.roll(1, 0), points))
            is_new += [name in HELD_OUT for name in names]
            is_lost += (overlaps.argmax(1) != np.arange(len(masks))).tolist()
    return {row: np.concatenate(values) for row, values in ious.items()}, np.array(is_new), np.array(is_lost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    columns, counts = {}, {}
    for seed in range(arguments.seeds):
        ious, is_new, is_lost = measure(train_one(arguments.folder, seed, arguments.steps) / "last.pt")
        groups = {"unseen kinds": is_new, "seen kinds": ~is_new, "words pick another": is_lost}
        for group, is_in in groups.items():
            counts.setdefault(group, []).append(int(is_in.sum()))
            columns.setdefault(group, []).append([ious[row][is_in].mean() if is_in.any() else np.nan for row in ROWS])
    print("| mean IoU | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    print("| objects, of each seed | " + " | ".join("/".join(map(str, counts[group])) for group in columns) + " |")
    for place, row in enumerate(ROWS):
        cells = []
        for group in columns:
            values = np.array(columns[group])[:, place]
            values = values[~np.isnan(values)]
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{values.mean():.3f} ± {spread:.3f}" if len(values) else "none")
        print(f"| {row} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
