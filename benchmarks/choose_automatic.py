"""Choose the thresholds of mode=automatic for a checkpoint, on generated validation scenes.

    python -m benchmarks.choose_automatic                                   # the bundled sam2_nano
    python -m benchmarks.choose_automatic checkpoint=outputs/.../best.pt

For every pair of thresholds (predicted IoU, stability) it keeps the masks of a 32 x 32 grid that pass, removes
duplicates as infer_sam2.py does, and compares with the true objects of at least 25 px: an object is found where a mask
has an IoU of at least 0.5 with it. Prints one JSON line a pair, best F1 last.
"""

import json
import sys
from pathlib import Path

import hydra
import numpy as np
import torch
from omegaconf import OmegaConf
from torchvision.ops import nms

from utils.instance_data import object_ids, read_item, split_items
from utils.mask_generation import AutomaticSettings, find_candidates, make_point_grid
from utils.mask_metrics import mask_iou
from utils.sam2_model import build_sam2, encode, preprocess, upscale_masks
from utils.sample_data import write_samples

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NUM_SCENES = 12
PRED_IOU_THRESHS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.8)
STABILITY_THRESHS = (0.8, 0.85, 0.9, 0.95)
MIN_AREA_PX = 25
MIN_IOU = 0.5


@torch.inference_mode()
def main() -> None:
    overrides = ["data=scenes", *(f"model.{argument}" for argument in sys.argv[1:])]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("train_sam2", overrides), resolve=True)
    model = build_sam2(**config["model"], device="cpu")
    other_keys = ("generate", "root", "min_area_px", "hflip", "color_jitter")
    reader_keys = {key: value for key, value in config["data"].items() if key not in other_keys}
    _, items = split_items(root=write_samples("scenes", config["data"]["root"]), **reader_keys)

    lowest = {"pred_iou_thresh": PRED_IOU_THRESHS[0], "stability_score_thresh": STABILITY_THRESHS[0]}
    permissive = AutomaticSettings(**config["model"]["automatic"] | lowest)
    scenes = []  # (candidates, IoU with every object (K, N))
    for item in items[:NUM_SCENES]:
        image_rgb, layers = read_item(item)
        orig_hw = image_rgb.shape[:2]
        truth = [layers[layer] == object_id for layer, object_id, area in object_ids(layers) if area >= MIN_AREA_PX]
        truth = torch.from_numpy(np.array(truth, bool).reshape(-1, *orig_hw))
        embeddings = encode(model, preprocess(image_rgb, model.image_size)[None])
        grid = make_point_grid(permissive.points_per_side, orig_hw)
        candidates = find_candidates(model, embeddings, grid, orig_hw, permissive)
        ious = [torch.zeros(0, len(truth))]
        for low_res_mask in candidates.low_res_masks:
            ious.append(mask_iou(upscale_masks(low_res_mask[None, None], orig_hw)[0] > 0, truth)[None])
        scenes.append((candidates, torch.cat(ious)))

    rows = []
    for pred_iou_thresh in PRED_IOU_THRESHS:
        for stability_score_thresh in STABILITY_THRESHS:
            num_right = num_masks = num_objects = 0
            for candidates, ious in scenes:
                passed = (candidates.predicted_ious > pred_iou_thresh) & (
                    candidates.stability_scores >= stability_score_thresh
                )
                boxes, scores = candidates.boxes_xyxy[passed], candidates.predicted_ious[passed]
                kept = nms(boxes, scores, permissive.box_nms_thresh)
                matched = ious[passed][kept] >= MIN_IOU  # (k, N)
                num_right += int(matched.any(0).sum())  # objects with a mask of their own
                num_masks += len(kept)
                num_objects += matched.shape[1]
            precision, recall = num_right / max(1, num_masks), num_right / max(1, num_objects)
            rows.append(
                {
                    "pred_iou_thresh": pred_iou_thresh,
                    "stability_score_thresh": stability_score_thresh,
                    "f1": round(2 * precision * recall / max(1e-9, precision + recall), 4),
                    "precision": round(precision, 4),
                    "recall": round(recall, 4),
                    "masks_per_image": round(num_masks / len(scenes), 1),
                }
            )
    for row in sorted(rows, key=lambda row: row["f1"]):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
