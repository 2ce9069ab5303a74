"""infer_sam2.py mode=export: its files fed as annotation tools feed them, against sam2's own predictor; bad input.

The tools' reading is written here from what X-AnyLabeling and AnyLabeling do (positions, types, what they round), not
from the names of utils/sam2/export.py.
"""

import json
import re
import subprocess
import sys

import cv2
import numpy as np
import onnxruntime
import pytest
import skimage.data
import tiny
import tiny_training
import torch
import yaml
from options import read_option
from PIL import Image
from tiny import ROOT

import infer_sam2
from utils.images import write_image
from utils.sam2.export import export_model
from utils.sam2.mask_generation import AutomaticSettings
from utils.sam2.model import build_sam2, decode, encode, preprocess

NANO, TINY = read_option("sam2", "model", "sam2_nano"), read_option("sam2", "model", "sam2.1_hiera_tiny")
PHOTO = skimage.data.coffee()  # uint8 (400, 600, 3)
CUP, SPOON, TABLE = [310, 190], [450, 100], [30, 30]  # px of it
BOX = [155, 60, 470, 310]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder that `infer_sam2.py mode=export` writes."""
    run_dir = tmp_path_factory.mktemp("export") / "run"
    assert tiny.run_script(infer_sam2, run_dir, "mode=export", "device=cpu") == (0, "")
    return run_dir


@pytest.fixture(scope="module")
def nano():
    return build_sam2(**NANO, device="cpu")


@pytest.fixture(scope="module")
def predictor(nano):
    """sam2's own, looking at the photograph."""
    predictor = tiny_training.make_predictor(nano)
    predictor.set_image(PHOTO)
    return predictor


class Tool:
    """What both tools do with an encoder and a decoder: by position alone, float32."""

    def __init__(self, encoder_path, decoder_path):
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            for path in (encoder_path, decoder_path)
        )
        self.side = self.encoder.get_inputs()[0].shape[2:]

    def look_at(self, image_rgb):
        """Resize each channel as floats by Pillow, normalise, encode: X-AnyLabeling."""
        planes = [Image.fromarray(plane) for plane in (image_rgb / 255).astype(np.float32).transpose(2, 0, 1)]
        seen = np.stack([plane.resize(self.side[::-1], Image.Resampling.BILINEAR) for plane in planes])
        mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
        seen = (seen - mean[:, None, None]) / std[:, None, None]
        self.hw = image_rgb.shape[:2]
        self.fine, self.middle, self.coarse = self.encoder.run(None, {self.encoder.get_inputs()[0].name: seen[None]})

    def feed(self, coords, labels, mask_input=None):
        """Run the decoder on points of the S x S frame, (N, P, 2) and (N, P), as its inputs follow each other."""
        has_mask = np.array([mask_input is not None], np.float32)
        if mask_input is None:
            mask_input = np.zeros((len(coords), 1, self.side[0] // 4, self.side[1] // 4), np.float32)
        values = [self.coarse, self.fine, self.middle, coords, labels, mask_input, has_mask]
        values = [np.asarray(value, np.float32) for value in values]
        names = [each.name for each in self.decoder.get_inputs()]
        return self.decoder.run(
            [each.name for each in self.decoder.get_outputs()], dict(zip(names, values, strict=True))
        )

    def segment(self, marks):
        """The mask of an object's marks: whole px of the picture, scaled in an array of integers; the best by score."""
        coords = np.array([point for mark in marks for point in np.reshape(mark["data"], (-1, 2))])
        labels = [label for mark in marks for label in ([2, 3] if mark["type"] == "rectangle" else [mark["label"]])]
        coords[:, 0], coords[:, 1] = coords[:, 0] / self.hw[1] * self.side[1], coords[:, 1] / self.hw[0] * self.side[0]
        masks, scores = self.feed(coords[None], [labels])
        best = masks[0][np.argmax(scores.squeeze())]
        return cv2.resize(best, self.hw[::-1]) > 0, coords, np.array(labels)


@pytest.fixture(scope="module")
def tool(exported):
    tool = Tool(exported / "sam2_nano.encoder.onnx", exported / "sam2_nano.decoder.onnx")
    tool.look_at(PHOTO)
    return tool


def iou(mask, other):
    return (mask & other).sum() / (mask | other).sum()


def difference(values, expected):
    expected = expected.numpy()
    assert values.shape == expected.shape
    return np.abs(values - expected).max() / np.abs(expected).max()


# ---------------------------------------------------------------------------------------------------------------------
# what the tools find


def describe(each):
    return each.name, each.type, each.shape


def test_names_order_types_and_shapes(tool):
    kind = "tensor(float)"
    assert [describe(each) for each in tool.encoder.get_inputs()] == [("image", kind, [1, 3, 256, 256])]
    maps = {"high_res_feats_0": [1, 16, 64, 64], "high_res_feats_1": [1, 32, 32, 32], "image_embed": [1, 128, 16, 16]}
    assert [describe(each) for each in tool.encoder.get_outputs()] == [(name, kind, maps[name]) for name in maps]
    order = ["image_embed", "high_res_feats_0", "high_res_feats_1"]
    assert [describe(each) for each in tool.decoder.get_inputs()] == [
        *((name, kind, maps[name]) for name in order),
        ("point_coords", kind, ["N", "P", 2]),
        ("point_labels", kind, ["N", "P"]),
        ("mask_input", kind, ["N", 1, 64, 64]),
        ("has_mask_input", kind, [1]),
    ]
    assert [describe(each) for each in tool.decoder.get_outputs()] == [
        ("masks", kind, ["N", "M", 64, 64]),
        ("iou_predictions", kind, ["N", "M"]),
    ]


def click(point, label=1):
    return {"type": "point", "data": point, "label": label}


@pytest.mark.parametrize(
    "marks",
    [
        [click(CUP)],
        [click(CUP), click(SPOON, 0), click(TABLE, 0)],
        [{"type": "rectangle", "data": BOX}],
        [click(TABLE, 0), {"type": "rectangle", "data": BOX}, click(CUP)],  # in the order in which they were drawn
    ],
    ids=["click", "clicks", "box", "box and clicks"],
)
def test_tool_finds_the_masks_of_sam2_s_own_predictor(marks, tool, predictor):
    found, coords, labels = tool.segment(marks)
    is_box = np.isin(labels, (2, 3))
    in_picture = coords * (np.array(tool.hw[::-1]) / 256)  # of the point that the tool cut to whole px
    logits, scores, _ = predictor.predict(
        in_picture[~is_box] if (~is_box).any() else None,
        labels[~is_box] if (~is_box).any() else None,
        in_picture[is_box].ravel() if is_box.any() else None,
        multimask_output=len(labels) == 1,
    )
    expected = logits[np.argmax(scores)] > 0
    assert 500 < expected.sum() < expected.size / 2
    assert iou(found, expected) >= 0.999


def test_a_grid_of_single_clicks_gives_all_three_masks_of_each(tool, predictor):
    """X-AnyLabeling's "segment everything": a batch of objects of one point each, padded to the most there are."""
    points = np.stack(np.meshgrid(np.arange(20, 256, 80), np.arange(40, 256, 80)), -1).reshape(-1, 1, 2)  # (9, 1, 2)
    masks, scores = tool.feed(points, np.ones((9, 1)))
    assert masks.shape == (9, 3, 64, 64) and scores.shape == (9, 3)
    for point, of_point, score in zip(points, masks, scores, strict=True):
        in_picture = point * (np.array(tool.hw[::-1]) / 256)
        _, expected_scores, low_res = predictor.predict(in_picture, np.ones(1), multimask_output=True)
        low_res = torch.from_numpy(low_res)  # which the predictor cuts to -32..32
        assert difference(of_point.clip(-32, 32), low_res) < 1e-4
        np.testing.assert_allclose(score, expected_scores, atol=1e-4)


PADDED = [[1, -1, -1], [1, 0, -1], [2, 3, 1]]  # labels of objects that are decoded together


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(
    "labels", [[[1]], [[1], [0]], PADDED, [[2, 3]] * 5, [[1, -1]], [[1, 1, 0, 1, 0, 0, 1]]], ids=str
)
def test_every_n_and_p_with_and_without_mask_prompts(labels, has_mask, tool, nano):
    """One file against `decode`: as many masks, and the same, whatever lies in mask_input while it does not count."""
    labels, rng = np.array(labels), np.random.default_rng(len(labels))
    coords = rng.uniform(0, 256, (*labels.shape, 2)).astype(np.float32)
    coords[labels == -1] = 0
    mask_input = rng.normal(0, 8, (len(labels), 1, 64, 64)).astype(np.float32)
    is_click = (labels != -1).sum(1).max() == 1 and not has_mask
    with torch.inference_mode():
        expected, expected_scores, *_ = decode(
            nano,
            encode(nano, preprocess(PHOTO, 256)[None]),
            torch.zeros(len(labels), dtype=torch.long),
            torch.from_numpy(coords),
            torch.from_numpy(labels),
            torch.from_numpy(mask_input) if has_mask else None,
            multimask_output=bool(is_click),
        )
    masks, scores = tool.feed(coords, labels, mask_input if has_mask else None)
    assert masks.shape[1] == (3 if is_click else 1)
    assert difference(masks, expected) < 1e-4 and difference(scores, expected_scores) < 1e-4
    if not has_mask:
        values = [tool.coarse, tool.fine, tool.middle, coords, labels, mask_input * np.nan, np.zeros(1)]
        names = [each.name for each in tool.decoder.get_inputs()]
        values = {name: np.asarray(value, np.float32) for name, value in zip(names, values, strict=True)}
        np.testing.assert_array_equal(tool.decoder.run(None, values)[0], masks)


def test_hiera_with_random_weights(tmp_path):
    """Windows, attention and interpolated positions, at 128 px; random masks are unstable, so one of three is given."""
    torch.manual_seed(0)
    model = tiny_training.answer_to_prompts(
        build_sam2(**TINY | {"checkpoint": "none", "image_size": 128}, device="cpu")
    )
    name = "sam2.1_hiera_tiny"
    export_model(model, name, AutomaticSettings(), tmp_path)
    tool = Tool(tmp_path / f"{name}.encoder.onnx", tmp_path / f"{name}.decoder.onnx")
    tool.look_at(PHOTO)
    coords, labels = np.array([[[30, 40], [100, 90]], [[70, 60], [9, 9]]]), np.array([[2, 3], [1, 0]])
    with torch.inference_mode():
        embeddings = encode(model, preprocess(PHOTO, 128)[None])
        objects, points = torch.zeros(2, dtype=torch.long), torch.from_numpy(coords).float()
        single, *_ = decode(model, embeddings, objects, points, torch.from_numpy(labels), None, False)
        three, *_ = decode(model, embeddings, objects, points, torch.from_numpy(labels), None, True)
    assert all(any(torch.equal(mask[0], each) for each in three[i]) for i, mask in enumerate(single))
    assert difference(tool.coarse, embeddings.image_embeddings) < 1e-4
    assert difference(tool.feed(coords, labels)[0], single) < 1e-4
    assert difference(tool.feed(coords[:, :1], np.ones((2, 1)))[0][:1], decode_click(model, embeddings, points)) < 1e-4


def decode_click(model, embeddings, points):
    with torch.inference_mode():
        return decode(
            model, embeddings, torch.zeros(1, dtype=torch.long), points[:1, :1], torch.ones(1, 1), None, True
        )[0]


# ---------------------------------------------------------------------------------------------------------------------
# what lies beside the files


def test_yaml_holds_what_the_tools_ask_for(exported):
    keys = {"type", "name", "display_name", "encoder_model_path", "decoder_model_path"}
    texts = {name: yaml.safe_load((exported / name).read_text()) for name in ("x_anylabeling.yaml", "anylabeling.yaml")}
    for name, kind in (("x_anylabeling.yaml", "segment_anything_2"), ("anylabeling.yaml", "segment_anything")):
        assert keys <= texts[name].keys() and texts[name]["type"] == kind
        assert re.fullmatch(r"[A-Za-z0-9._-]+", texts[name]["name"])  # X-AnyLabeling makes a folder of it
        for part in ("encoder", "decoder"):
            assert (exported / texts[name][f"{part}_model_path"]).is_file()  # relative to the YAML
    assert [texts["anylabeling.yaml"][key] for key in ("input_size", "max_width", "max_height")] == [256] * 3
    assert texts["x_anylabeling.yaml"]["amg_pred_iou_thresh"] == NANO["automatic"]["pred_iou_thresh"]


def test_example_runs_where_torch_cannot_be_imported(exported, tmp_path, tool):
    write_image(tmp_path / "a cup, café.png", PHOTO)
    blocked = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0])"
    command = [
        sys.executable,
        "-c",
        blocked,
        str(exported / "example.py"),
        "a cup, café.png",
        "310",
        "190",
        "mask é.png",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stderr
    mask = cv2.imdecode(np.fromfile(tmp_path / "mask é.png", np.uint8), cv2.IMREAD_UNCHANGED)
    assert mask.shape == PHOTO.shape[:2] and set(np.unique(mask)) == {0, 255}
    masks, scores = tool.feed([[[310 * 256 / 600, 190 * 256 / 400]]], [[1]])
    expected = cv2.resize(masks[0, scores[0].argmax()], (600, 400)) > 0
    assert iou(mask > 0, expected) > 0.97  # it resizes with OpenCV
    assert len((exported / "example.py").read_text().splitlines()) < 30


def test_run_records_how_far_it_is_off(exported):
    last = json.loads((exported / "run.json").read_text())["metrics"]["last"]
    assert last["encoder/difference"] < 1e-4 and last["decoder/difference"] < 1e-4
    assert last["encoder/onnxruntime_ms"] > 0 < last["decoder/torch_ms"]


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["input=photo.jpg"], "input= is given but mode is export, which does not use it"),
        (["points=[[1,2,1]]"], "points= is given but mode is export"),
        (["cache=auto"], "cache= is given but mode is export"),
        (["image_size=250"], "model.image_size is 250; must be a multiple of 32"),
        (["checkpoint=/nowhere/best.pt"], "/nowhere/best.pt does not exist"),
        ([f"checkpoint={ROOT / 'checkpoints' / 'siamfc_alexnet.pt'}"], "siamfc_alexnet.pt"),
        ([f"checkpoint={ROOT / 'README.md'}"], "README.md"),
        (["resume=outputs"], "no run.json there: give the folder of a run"),
    ],
)
def test_export_that_makes_no_sense(arguments, message, tmp_path):
    status, output = tiny.run_script(infer_sam2, tmp_path / "run", "mode=export", "device=cpu", *arguments)
    assert status == 1 and output.startswith("error: ") and message in output and "\n" not in output.strip()
    assert not list(tmp_path.rglob("*.onnx"))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    status, output = tiny.run_script(infer_sam2, tmp_path / "run", "mode=export", "device=cpu")
    assert status == 1 and "cannot be imported: pip install onnx onnxruntime (" in output


def test_picture_of_another_size_is_refused_by_the_file(tool):
    with pytest.raises(Exception, match="Got: 128 Expected: 256"):
        tool.encoder.run(None, {"image": np.zeros((1, 3, 128, 128), np.float32)})
