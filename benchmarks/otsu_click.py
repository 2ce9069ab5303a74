"""The baseline that knows nothing: Otsu's threshold, and the connected component under the click.

    DATA_ROOT=/my/datasets python -m benchmarks.otsu_click            # data=dsb2018, its validation pictures
    DATA_ROOT=/my/datasets python -m benchmarks.otsu_click all        # its training pictures too

Prints one JSON line: mean IoU over the same objects, with the same first click (the object's centre), as
val/iou_1_click of `python train_sam2.py experiment=dsb2018`. The clicked pixel's side of the threshold is the
foreground, so dark objects on a light ground are found as well.
"""

import json
import sys
from pathlib import Path

import cv2
import hydra
import numpy as np
from omegaconf import OmegaConf

from utils.instances.readers import object_ids, read_item, split_items
from utils.sam2.prompts import center_point

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def clicked_component(image_rgb: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Segment the connected component (8 neighbours) around a click after Otsu's threshold.

    Args:
        image_rgb: uint8 (H, W, 3).
        point: (2,), (x, y) pixels.
    Returns:
        bool (H, W).
    """
    grey = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY)
    _, is_light = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    x, y = int(point[0]), int(point[1])
    _, components = cv2.connectedComponents((is_light == is_light[y, x]).astype(np.uint8), connectivity=8)
    return components == components[y, x]


def main() -> None:
    with hydra.initialize_config_dir(str(CONFIGS / "sam2"), version_base="1.3"):
        data = OmegaConf.to_container(hydra.compose("train_sam2", ["experiment=dsb2018"]).data, resolve=True)
    min_area_px = data["min_area_px"]
    reader_keys = {key: value for key, value in data.items() if key not in ("min_area_px", "hflip", "color_jitter")}
    train_items, val_items = split_items(**reader_keys)
    items = train_items + val_items if "all" in sys.argv[1:] else val_items
    ious = []
    for item in items:
        image_rgb, layers = read_item(item)
        for layer, object_id, area_px in object_ids(layers):
            if area_px >= min_area_px:
                mask = layers[layer] == object_id
                point, _ = center_point(mask, np.zeros_like(mask))
                pred_mask = clicked_component(image_rgb, point)
                ious.append((mask & pred_mask).sum() / (mask | pred_mask).sum())
    print(
        json.dumps(
            {"name": "otsu_click", "iou_1_click": float(np.mean(ious)), "objects": len(ious), "images": len(items)}
        )
    )


if __name__ == "__main__":
    main()
