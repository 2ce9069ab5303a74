"""mode=benchmark of infer_sam2.py: memory over many pictures, and time against sam2's predictor, one object at a time.

    python -m benchmarks.paper_protocols    # the bundled nano, hiera_tiny with random weights; 10 minutes on a CPU
    python -m benchmarks.paper_protocols --groups groups.csv    # say what is a vessel in the generated glassware

Memory: 200 generated pictures of 50 objects, three clicks and a box each, with the nano; resident memory after the
20th and after the 200th picture. Time: the same prompts, the picture encoded once on both sides; ours decodes the
objects of a picture together, the other calls SAM2ImagePredictor for each object and click. IoUs are compared.
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.measure import read_config
from utils import run
from utils.images import mask_to_box, read_channels, write_image, write_label_map
from utils.instances.readers import list_items, object_ids
from utils.sam2 import benchmark, evaluation, prompts
from utils.sam2 import model as models
from utils.sam2.benchmark import BenchmarkSettings, EdgeSettings
from utils.sam2.protocols import ProposalSettings

NUM_PICTURES, NUM_OBJECTS, NUM_CLICKS = 200, 50, 3
CPU = torch.device("cpu")


def draw_picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw 50 ellipses that do not touch: uint8 (H, W, 3), ids uint8 (H, W)."""
    image_rgb = rng.integers(0, 80, (300, 420, 3), np.uint8)
    ids = np.zeros((300, 420), np.uint8)
    for number in range(NUM_OBJECTS):
        row, column = divmod(number, 10)
        center = (42 * column + 21, 60 * row + 30)
        axes = (int(rng.integers(6, 19)), int(rng.integers(6, 27)))
        cv2.ellipse(ids, center, axes, 0, 0, 360, number + 1, -1)
        image_rgb[ids == number + 1] = rng.integers(90, 256, 3)
    return image_rgb, ids


def resident_mb() -> float:
    """Read the process's resident memory."""
    return next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )


def measure_memory(num_pictures: int) -> list[float]:
    """Measure the pictures of a generated dataset: resident MB after each."""
    model = models.build_sam2(**read_config("sam2/model", "sam2_nano") | {"checkpoint": "none"}, device=CPU)
    after, write = [], benchmark.write_record
    with tempfile.TemporaryDirectory() as name:
        root, rng = Path(name), np.random.default_rng(0)
        for folder in ("images", "labels", "run"):
            (root / folder).mkdir()
        with (root / "groups.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["picture", "object", "value"])
            for number in range(num_pictures):
                image_rgb, ids = draw_picture(rng)
                write_image(root / "images" / f"{number:03d}.png", image_rgb)
                write_label_map(root / "labels" / f"{number:03d}.png", ids)
                writer.writerows([f"{number:03d}", object_id, object_id % 2] for object_id in range(1, NUM_OBJECTS + 1))
        proposals, edges = ProposalSettings(16, 0.9, 0.0, 0.0, False), EdgeSettings("", "test", 16, 0.7)
        settings = BenchmarkSettings(["groups", "boxes"], None, str(root / "groups.csv"), proposals, edges)

        def write_and_look(*arguments):
            write(*arguments)
            after.append(resident_mb())

        benchmark.write_record = write_and_look
        data = read_config("sam2/data", "label_map") | {"root": str(root), "val_fraction": 1}
        benchmark.run_benchmark(model, data, "val", settings, None, 0, "fp32", root / "run", None)
        benchmark.write_record = write
    return after


def measure_time(model_name: str, num_pictures: int, fast_decoder: bool) -> tuple[float, float, float]:
    """Prompt objects of some pictures both ways: seconds an object, ours and theirs; the mean difference of IoUs."""
    config = read_config("sam2/model", model_name)
    config |= {} if model_name == "sam2_nano" else {"checkpoint": "none"}
    torch.manual_seed(0)
    model = models.build_sam2(**config, device=CPU, fast_decoder=fast_decoder)
    plain = models.build_sam2(**config, device=CPU)
    plain.load_state_dict(model.state_dict())
    from sam2.sam2_image_predictor import SAM2ImagePredictor  # after ours, which keeps Hydra as it was

    predictor = SAM2ImagePredictor(plain)
    predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]
    rng, seconds, differences = np.random.default_rng(0), np.zeros(2), []
    with torch.inference_mode(), run.start_threads() as threads:
        for _ in range(num_pictures):
            image_rgb, ids = draw_picture(rng)
            masks = np.stack([ids == number for number in range(1, NUM_OBJECTS + 1)])
            embeddings = models.encode(model, models.preprocess(image_rgb, model.image_size)[None])
            predictor.set_image(image_rgb)
            start = time.perf_counter()
            clicked = evaluation.click_objects(model, embeddings, masks, NUM_CLICKS, "fp32", threads)
            seconds[0] += time.perf_counter() - start
            start = time.perf_counter()
            theirs = np.array([click_one(predictor, mask) for mask in masks])  # (O, 1 + clicks)
            seconds[1] += time.perf_counter() - start
            differences.append(np.abs(np.column_stack([clicked.box_iou, clicked.ious]) - theirs).mean())
    return *(seconds / (num_pictures * NUM_OBJECTS)), float(np.mean(differences))


def click_one(predictor, mask: np.ndarray) -> list[float]:
    """Prompt one object with sam2's predictor: IoUs from its box, and after each click."""

    def iou(pred_mask: np.ndarray) -> float:
        return np.count_nonzero(pred_mask & mask) / np.count_nonzero(pred_mask | mask)

    masks, _, _ = predictor.predict(box=mask_to_box(mask), multimask_output=False)
    ious, points, labels = [iou(masks[0].astype(bool))], [], []
    pred_mask, logits = np.zeros_like(mask), None
    for count in range(1, NUM_CLICKS + 1):
        point, label = prompts.center_point(mask, pred_mask)
        points.append(point)
        labels.append(label)
        masks, scores, low_res_masks = predictor.predict(
            np.array(points), np.array(labels), mask_input=logits, multimask_output=count == 1
        )
        best = scores.argmax()
        pred_mask, logits = masks[best].astype(bool), low_res_masks[best][None]
        ious.append(iou(pred_mask))
    return ious


def write_groups(path: Path) -> None:
    """Write a csv for benchmark.groups: which objects of the validating glassware are vessels, which materials."""
    keys = read_config("sam2/data", "glassware")
    _, items = list_items(keys, "data", is_check=False)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "object", "value"])
        for item in items:
            last_material = read_channels(item.annotation_path)[..., 2].max()  # vessels' ids follow the materials'
            for _, object_id, _ in object_ids(item.read().layers):
                value = "vessel" if object_id > last_material else "material"
                writer.writerow([item.name, object_id, value])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=NUM_PICTURES, help="of the memory's measurement")
    parser.add_argument("--groups", type=Path, help="write this csv, and stop")
    arguments = parser.parse_args()
    if arguments.groups is not None:
        write_groups(arguments.groups)
        return
    print("| model | ours, ms an object | one at a time | ratio | mean difference of IoUs |\n|---|---|---|---|---|")
    for name, num_pictures, fast_decoder in (
        ("sam2_nano", 4, False),
        ("sam2_nano", 4, True),
        ("sam2.1_hiera_tiny", 2, True),
    ):
        ours, theirs, difference = measure_time(name, num_pictures, fast_decoder)
        shown = f"{name}, {read_config('sam2/model', name)['image_size']} px" + ", fast_decoder" * fast_decoder
        print(
            f"| {shown} | {1000 * ours:.1f} | {1000 * theirs:.1f} | {theirs / ours:.2f} | {difference:.1e} |",
            flush=True,
        )
    after = measure_memory(arguments.pictures)
    print(f"\nresident after picture 20: {after[19]:.0f} MB, after picture {len(after)}: {after[-1]:.0f} MB", end="")
    print(f" ({after[-1] / after[19] - 1:+.1%})")


if __name__ == "__main__":
    main()
