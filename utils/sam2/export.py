"""SAM 2 as two ONNX files for annotation tools, with the YAML that the tools ask for, and an example without torch.

    encoder   image (1, 3, S, S)
              -> high_res_feats_0 (1, C/8, S/4, S/4), high_res_feats_1 (1, C/4, S/8, S/8),
                 image_embed (1, C, S/16, S/16)
    decoder   image_embed, high_res_feats_0, high_res_feats_1, point_coords (N, P, 2), point_labels (N, P),
              mask_input (N, 1, S/4, S/4), has_mask_input (1,)
              -> masks (N, M, S/4, S/4) logits, iou_predictions (N, M)

All are float32; N objects and P points may be any. The image is RGB / 255, less IMAGE_MEAN, over IMAGE_STD, resized
to S x S with antialiasing (`preprocess`). Points are px of the S x S frame; labels are 1 object, 0 not, 2 and 3 the
corners of a box, -1 padding. mask_input, logits of an earlier prediction, counts where has_mask_input is 1.

M is 3 where none of the N objects has more than one point, padding aside, and there is no mask prompt, since
infer_sam2.py takes the best of three for a single click. Otherwise it is 1: the single mask, or where that is unstable
the best of the three, as `decode` gives it. A reader that takes the mask of the highest iou_predictions, whatever M is,
has that of infer_sam2.py mode=prompts.

What reads these files, X-AnyLabeling (August 2026) and AnyLabeling (April 2026):
* S is the encoder's, other sizes than 1024 will do. Inputs are fed by position, outputs read by position, so the order
  counts; AnyLabeling also knows SAM 2 by the decoder's input high_res_feats_0.
* A picture's marks are one object (N = 1), points and the two corners of a box in the order in which they were drawn;
  mask_input is 0 and has_mask_input 0. The best mask by iou_predictions is taken. X-AnyLabeling's "segment everything"
  feeds a batch of single clicks and filters all M masks of each.
* Both cut clicks to whole px of the S x S frame: of a picture four times as large as S, to 4 px.
* X-AnyLabeling resizes with antialiasing, as here. AnyLabeling does not, which matters little, and swaps red and blue,
  which matters in photographs (README.md).
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from utils.onnx_files import compare_with_torch, describe_comparison, write_onnx
from utils.sam2.mask_generation import AutomaticSettings
from utils.sam2.model import IMAGE_MEAN, IMAGE_STD, encode

X_ANYLABELING = """\
# X-AnyLabeling: AI, Load Custom Model, this file. Keep it beside the two .onnx files.
type: segment_anything_2
name: {name}
display_name: {name} ({side} px)
provider: fine-tuned
encoder_model_path: {name}.encoder.onnx
decoder_model_path: {name}.decoder.onnx
epsilon: 0.001                    # how far a polygon may be off the mask's outline, as a share of its length
padding_ratio: 0.2                # "cropping": what is seen around a box, as a share of it
amg_points_per_side: {points_per_side}           # "segment everything": the model's own thresholds
amg_points_per_batch: {points_per_batch}
amg_pred_iou_thresh: {pred_iou_thresh}
amg_stability_score_thresh: {stability_score_thresh}
amg_stability_score_offset: {stability_score_offset}
amg_box_nms_thresh: {box_nms_thresh}
"""
ANYLABELING = """\
# AnyLabeling: Load Custom Model, this file. Keep it beside the two .onnx files.
# It hands pictures over with red and blue swapped (April 2026): in photographs masks are worse than X-AnyLabeling's.
type: segment_anything
name: {name}
display_name: {name} ({side} px)
encoder_model_path: {name}.encoder.onnx
decoder_model_path: {name}.decoder.onnx
input_size: {side}                   # it asks for these three, and takes the size from the encoder
max_width: {side}
max_height: {side}
"""
EXAMPLE = '''\
"""Mask of the object under a click: python example.py photo.jpg 420 310 mask.png (onnxruntime, numpy, opencv)."""

import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

photo, x, y, out = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
files = [str(Path(__file__).resolve().parent / f"{name}.{{part}}.onnx") for part in ("encoder", "decoder")]
encoder, decoder = [onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files]
side = encoder.get_inputs()[0].shape[2]
image = cv2.cvtColor(cv2.imdecode(np.fromfile(photo, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
height, width = image.shape[:2]
resized = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if side < min(height, width) else 1)  # 1: linear
normalised = (resized / 255 - {mean}) / {std}
feats_0, feats_1, embed = encoder.run(None, {{"image": normalised.transpose(2, 0, 1)[None].astype(np.float32)}})
points = np.array([[[x * side / width, y * side / height]]], np.float32)  # (N, P, 2); a box: its two corners
labels = np.array([[1]], np.float32)  # (N, P); 1 object, 0 not, 2 and 3 the corners of a box
no_mask = np.zeros((1, 1, side // 4, side // 4), np.float32), np.zeros(1, np.float32)
names = [each.name for each in decoder.get_inputs()]
masks, ious = decoder.run(None, dict(zip(names, (embed, feats_0, feats_1, points, labels, *no_mask))))
best = cv2.resize(masks[0, ious[0].argmax()], (width, height))  # logits: above 0 is the object
cv2.imencode(".png", np.uint8(best > 0) * 255)[1].tofile(out)
'''


class ExportedEncoder(nn.Module):
    """`encode` of one picture, its maps in the order of the file."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, trunk = model, model.image_encoder.trunk
        if hasattr(trunk, "_get_pos_embed"):  # hiera's positions hang on S alone; tiled in the file, onnxruntime warns
            positions = trunk._get_pos_embed((model.image_size // 4, model.image_size // 4)).detach()
            trunk._get_pos_embed = lambda hw: positions

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        image_embeddings, high_res_features = encode(self.model, image)
        return *high_res_features, image_embeddings


class ExportedDecoder(nn.Module):
    """`decode` in a form that can be traced: with and without mask prompts, with three masks or one, for any N and P.

    Every switch is computed: both forms of a thing, then the choice.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self,
        image_embed: torch.Tensor,
        high_res_feats_0: torch.Tensor,
        high_res_feats_1: torch.Tensor,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_input: torch.Tensor,
        has_mask_input: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prompt_encoder, decoder = self.model.sam_prompt_encoder, self.model.sam_mask_decoder
        has_mask = has_mask_input.max() > 0
        sparse, no_mask = prompt_encoder(points=(point_coords, point_labels), boxes=None, masks=None)
        _, of_mask = prompt_encoder(points=None, boxes=None, masks=mask_input)
        masks, ious, _, _ = decoder.predict_masks(
            image_embeddings=image_embed.expand(point_labels.shape[0], -1, -1, -1),
            image_pe=prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=torch.where(has_mask, of_mask, no_mask),
            repeat_image=False,
            high_res_features=[high_res_feats_0, high_res_feats_1],
        )  # (N, 4, S/4, S/4), (N, 4)
        single, single_iou = decoder._dynamic_multimask_via_stability(masks, ious)  # (N, 1, S/4, S/4), (N, 1)
        masks, ious = torch.cat([single, masks[:, 1:]], 1), torch.cat([single_iou, ious[:, 1:]], 1)
        is_click = ((point_labels != -1).sum(1).max() <= 1) & ~has_mask
        chosen = ((torch.arange(4) > 0) == is_click).nonzero()[:, 0]  # [1, 2, 3] for a click, else [0]
        return masks.index_select(1, chosen), ious.index_select(1, chosen)


def export_model(model: nn.Module, name: str, automatic: AutomaticSettings, out_dir: Path) -> dict[str, dict]:
    """Write <name>.encoder.onnx, <name>.decoder.onnx, x_anylabeling.yaml, anylabeling.yaml and example.py.

    Args:
        model: from `build_sam2`, on the CPU.
        name: the model's, of letters, digits, dots, underscores and hyphens.
        automatic: for X-AnyLabeling's "segment everything".
        out_dir: a folder.
    Returns:
        {"encoder": what `compare_with_torch` measured, "decoder": ...}.
    Raises:
        ValueError: as `compare_with_torch`.
    """
    side = model.image_size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    prompt = _example_prompt(2, 3, side)
    encoder, decoder = ExportedEncoder(model).eval(), ExportedDecoder(model).eval()
    with torch.no_grad():
        stride_4, stride_8, embed = encoder(image)
    maps = {"high_res_feats_0": stride_4, "high_res_feats_1": stride_8, "image_embed": embed}
    dims = {map_name: list(values.shape) for map_name, values in maps.items()}
    properties = {
        "model": name,
        "image": f"resized to {side} x {side} with antialiasing, RGB / 255, less {IMAGE_MEAN}, over {IMAGE_STD}",
        "point_coords": f"(x, y) px of the {side} x {side} frame",
        "point_labels": "1 object, 0 not, 2 and 3 the corners of a box, -1 padding",
    }
    paths = {part: out_dir / f"{name}.{part}.onnx" for part in ("encoder", "decoder")}
    write_onnx(paths["encoder"], encoder, {"image": (image, list(image.shape))}, dims, properties)
    prompt_dims = {
        "point_coords": ["N", "P", 2],
        "point_labels": ["N", "P"],
        "mask_input": ["N", 1, side // 4, side // 4],
        "has_mask_input": [1],
    }
    order = ("image_embed", "high_res_feats_0", "high_res_feats_1")
    inputs = {map_name: (maps[map_name], dims[map_name]) for map_name in order}
    inputs |= {key: (prompt[key], prompt_dims[key]) for key in prompt_dims}
    outputs = {"masks": ["N", "M", side // 4, side // 4], "iou_predictions": ["N", "M"]}
    write_onnx(paths["decoder"], decoder, inputs, outputs, properties)
    values = asdict(automatic) | {"name": name, "side": side}
    texts = {
        "x_anylabeling.yaml": X_ANYLABELING.format(**values),
        "anylabeling.yaml": ANYLABELING.format(**values),
        "example.py": EXAMPLE.format(name=name, mean=list(IMAGE_MEAN), std=list(IMAGE_STD)),
    }
    for file_name, text in texts.items():
        (out_dir / file_name).write_text(text, encoding="utf-8")
    # one click: whether a single mask is stable can hang on a bit
    click = {map_name: maps[map_name] for map_name in order} | _example_prompt(1, 1, side)
    measured = {
        "encoder": compare_with_torch(paths["encoder"], encoder, {"image": image}),
        "decoder": compare_with_torch(paths["decoder"], decoder, click),
    }
    for part, path in paths.items():
        print(describe_comparison(path, measured[part]))
    return measured


def _example_prompt(num_objects: int, num_points: int, side: int) -> dict[str, torch.Tensor]:
    """Make a decoder's prompts, all points object, without mask prompts."""
    return {
        "point_coords": torch.full((num_objects, num_points, 2), side / 2.0),
        "point_labels": torch.ones(num_objects, num_points),
        "mask_input": torch.zeros(num_objects, 1, side // 4, side // 4),
        "has_mask_input": torch.zeros(1),
    }
