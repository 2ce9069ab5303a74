"""Choose the thresholds of mode=automatic for a checkpoint, on generated validation scenes.

    python -m benchmarks.choose_automatic                                   # the bundled sam2_nano
    python -m benchmarks.choose_automatic checkpoint=outputs/.../best.pt

For every offset of the stability score and every pair of thresholds (predicted IoU, stability) it keeps the masks of a
32 x 32 grid that pass, removes duplicates and stitches the rest into a label map, as infer_sam2.py does, and compares
with the true objects of at least 25 px: an object is found where a part of the map has an IoU of at least 0.5 with
it. Prints one JSON line each, the best F1 last; F1, precision and recall are means over scenes, so that a crowd of a
hundred blobs counts no more than five large objects.
"""

import json
import sys
from itertools import product
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import OmegaConf
from torchvision.ops import nms

from utils.instances.codecs import mask_to_rle
from utils.instances.readers import object_ids, read_item, split_items
from utils.sam2.mask_generation import (
    AutomaticSettings,
    find_candidates,
    make_point_grid,
    measure_full_size,
    stitch_masks,
)
from utils.sam2.model import build_sam2, encode, preprocess, upscale_masks
from utils.samples.write import write_samples

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NUM_SCENES = 12
PRED_IOU_THRESHS = (0.3, 0.4, 0.5, 0.6, 0.7)
STABILITY_OFFSETS = (0.25, 0.5, 1.0)
STABILITY_THRESHS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
MIN_AREA_PX = 25
MIN_IOU = 0.5


def count_found(label_map: np.ndarray, truth: np.ndarray) -> int:
    """Count the true objects with an IoU of at least MIN_IOU with a part of a label map; both int (H, W), 0 is none."""
    num_parts, num_objects = label_map.max() + 1, truth.max() + 1
    pairs = np.bincount((label_map * num_objects + truth).ravel(), minlength=num_parts * num_objects)
    intersection = pairs.reshape(num_parts, num_objects)
    union = intersection.sum(1, keepdims=True) + intersection.sum(0) - intersection
    return int(((intersection / np.maximum(union, 1))[1:, 1:] >= MIN_IOU).any(0).sum())


@torch.inference_mode()
def main() -> None:
    overrides = ["data=scenes", *(f"model.{argument}" for argument in sys.argv[1:])]
    with hydra.initialize_config_dir(str(CONFIGS / "sam2"), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("train_sam2", overrides), resolve=True)
    model = build_sam2(**config["model"], device="cpu")
    other_keys = ("generate", "root", "min_area_px", "hflip", "color_jitter")
    reader_keys = {key: value for key, value in config["data"].items() if key not in other_keys}
    _, items = split_items(root=write_samples("scenes", config["data"]["root"]), **reader_keys)

    lowest = {"pred_iou_thresh": PRED_IOU_THRESHS[0], "stability_score_thresh": 0.0}
    permissive = AutomaticSettings(**config["model"].get("automatic", {}) | lowest)
    scores = {}  # (offset, predicted IoU, stability) -> (precision, recall, F1, masks) of each scene
    for item in items[:NUM_SCENES]:
        image_rgb, layers = read_item(item)
        orig_hw = image_rgb.shape[:2]
        truth = np.zeros(orig_hw, np.int32)  # numbered from 1, without the small ones
        objects = [(layer, object_id) for layer, object_id, area in object_ids(layers) if area >= MIN_AREA_PX]
        for number, (layer, object_id) in enumerate(objects, start=1):
            truth[layers[layer] == object_id] = number
        embeddings = encode(model, preprocess(image_rgb, model.image_size)[None])
        grid = make_point_grid(permissive.points_per_side, orig_hw)
        candidates = find_candidates(model, embeddings, grid, orig_hw, permissive)
        masks = torch.stack(candidates.low_res_masks)
        segmentations = [mask_to_rle((upscale_masks(mask[None, None], orig_hw)[0, 0] > 0).numpy()) for mask in masks]
        for offset in STABILITY_OFFSETS:
            stability_scores, _ = measure_full_size(masks, orig_hw, offset)
            for pred_iou_thresh, stability_score_thresh in product(PRED_IOU_THRESHS, STABILITY_THRESHS):
                passed = candidates.predicted_ious > pred_iou_thresh
                passed &= stability_scores >= stability_score_thresh
                passed = passed.nonzero().squeeze(1)
                boxes, predicted_ious = candidates.boxes_xyxy[passed], candidates.predicted_ious[passed]
                best = passed[nms(boxes, predicted_ious, permissive.box_nms_thresh)].tolist()
                scores_of_best = candidates.predicted_ious[best].tolist()
                label_map, ids = stitch_masks([segmentations[index] for index in best], scores_of_best, orig_hw)
                num_found, num_parts = count_found(label_map, truth), int(ids.max(initial=0))
                precision, recall = num_found / max(1, num_parts), num_found / max(1, len(objects))
                f1 = 2 * precision * recall / max(1e-9, precision + recall)
                key = (offset, pred_iou_thresh, stability_score_thresh)
                scores.setdefault(key, []).append((f1, precision, recall, num_parts))

    names = ("stability_score_offset", "pred_iou_thresh", "stability_score_thresh")
    for key, scene_scores in sorted(scores.items(), key=lambda item: np.mean(item[1], 0)[0]):
        means = dict(
            zip(("f1", "precision", "recall", "parts_per_image"), np.mean(scene_scores, 0).round(4), strict=True)
        )
        print(json.dumps(dict(zip(names, key, strict=True)) | {name: float(value) for name, value in means.items()}))


if __name__ == "__main__":
    main()
