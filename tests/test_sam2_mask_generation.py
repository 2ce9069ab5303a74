"""utils/sam2/mask_generation.py against sam2's own generator and amg functions, torch's interpolate, plain loops."""

import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from options import read_option
from pycocotools import mask as coco_mask
from torch import nn

from utils.instances.codecs import mask_to_rle, rle_to_mask
from utils.sam2 import mask_generation
from utils.sam2.mask_generation import (
    AutomaticSettings,
    _measure_chunk,
    bound_stability,
    generate_masks,
    is_cut_off,
    make_crops,
    make_point_grid,
    measure_full_size,
    remove_small_regions,
    sample_points_in_mask,
    stitch_masks,
    upscale_part,
)
from utils.sam2.model import _sam2_without_hydra, build_sam2, decode

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def official():
    """sam2's module of mask generation, imported so that Hydra is left as it was (`import sam2` starts it)."""
    with _sam2_without_hydra():
        import sam2.automatic_mask_generator
    return sam2.automatic_mask_generator


class BlobModel(nn.Module):
    """Stands in for SAM 2: for a point three blobs around it, shaped by the picture, with a made-up predicted IoU."""

    image_size = 128
    directly_add_no_mem_embed = False
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.fast_decoder = False
        self.sam_prompt_encoder, self.sam_mask_decoder = BlobPrompts(), BlobDecoder()

    def forward_image(self, images):  # the real one's keys and shapes, with the picture itself as the features
        return {"backbone_fpn": [F.avg_pool2d(images, stride) for stride in (4, 8, 16)]}

    def _prepare_backbone_features(self, backbone_out):
        features = [level.flatten(2).permute(2, 0, 1) for level in backbone_out["backbone_fpn"]]
        return backbone_out, features, None, None


class BlobPrompts(nn.Module):
    def forward(self, points, boxes, masks):
        return points[0], None  # the "sparse embeddings" are the points, S x S frame

    def get_dense_pe(self):
        return torch.zeros(1)  # not used


class BlobDecoder(nn.Module):
    def forward(self, *, multimask_output, **inputs):
        low_res_masks, predicted_ious, *_ = self.predict_masks(**inputs)
        chosen = slice(1, 4) if multimask_output else slice(1)
        return low_res_masks[:, chosen], predicted_ious[:, chosen], None, None

    def predict_masks(self, *, sparse_prompt_embeddings, high_res_features, **unused):
        points = sparse_prompt_embeddings[:, 0]  # (O, 2)
        side = high_res_features[0].shape[-1]  # S/4
        ys, xs = torch.meshgrid(torch.arange(side) * 4.0, torch.arange(side) * 4.0, indexing="ij")
        distance = torch.hypot(xs - points[:, 0, None, None], ys - points[:, 1, None, None])  # (O, h, w) px of S x S
        phase = (points[:, 0] * 0.9 + points[:, 1] * 1.7)[:, None] + torch.tensor([0.0, 2.0, 4.0])  # (O, 3)
        radius = 14 + 10 * torch.sin(phase)
        brightness = high_res_features[0].mean(1)  # (1 or O, h, w)
        low_res_masks = 3 * (radius[..., None, None] - distance[:, None] + 6 * brightness[:, None])
        predicted_ious = 0.75 + 0.25 * torch.sin(3 * phase)
        order = [0, 0, 1, 2]  # a single mask is the first of three
        tokens = phase[:, order, None]  # (O, 4, 1)
        return low_res_masks[:, order], predicted_ious[:, order], tokens, None


def smooth_image(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 9, 11))).float()
    image = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(0, 255)
    return image[0].permute(1, 2, 0).numpy().astype(np.uint8)


def official_masks(official, model, image_rgb, **settings):
    with warnings.catch_warnings():  # torch.jit.script is deprecated
        warnings.simplefilter("ignore")
        generator = official.SAM2AutomaticMaskGenerator(model, output_mode="coco_rle", **settings)
    side = model.image_size
    generator.predictor._bb_feat_sizes = [(side // stride, side // stride) for stride in (4, 8, 16)]  # else 1024 px
    return generator.generate(image_rgb)


def assert_same_masks(theirs, ours):
    """Issue's measure: matched mean IoU >= 0.99, at most 1 % unmatched either way; and the records of the matched."""
    assert len(theirs) >= 20, len(theirs)
    segmentations = [[annotation["segmentation"] for annotation in annotations] for annotations in (ours, theirs)]
    ious = coco_mask.iou(*segmentations, [0] * len(theirs))
    assert ious.max(0).mean() >= 0.99 and ious.max(1).mean() >= 0.99
    assert (ious.max(0) < 0.9).mean() <= 0.01 and (ious.max(1) < 0.9).mean() <= 0.01
    num_same = 0
    for ours_index, theirs_index in enumerate(ious.argmax(1)):
        mine, other = ours[ours_index], theirs[theirs_index]
        if ious[ours_index, theirs_index] == 1 and mine["point_coords"] == pytest.approx(
            np.array(other["point_coords"])
        ):
            num_same += 1
            assert set(mine) == set(other)
            assert mine["bbox"] == other["bbox"] and mine["area"] == other["area"]
            assert mine["crop_box"] == other["crop_box"]
            assert mine["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-4)
            assert mine["stability_score"] == pytest.approx(other["stability_score"], abs=1e-3)
    assert num_same >= 0.9 * len(ours)


def test_masks_and_their_scores_leave_the_device_together(monkeypatch):
    """On a GPU each of these calls waits for all that came before."""
    calls = []
    for name in ("item", "cpu", "tolist"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real, name=name: calls.append(name) or real(self))
    settings = AutomaticSettings(points_per_side=8, stability_score_thresh=0.5)
    generated = generate_masks(BlobModel(), smooth_image(96, 128), settings)
    assert len(generated.annotations) > 20 and len(calls) <= 4, calls


def test_annotated_together_is_annotated_one_by_one():
    low_res_masks = torch.from_numpy(np.stack([smooth_image(32, 32, seed)[..., 0] for seed in range(12)])).float() - 120
    scores, points = torch.rand(2, 12), [[[float(k), 1.5]] for k in range(12)]
    geometry = (10, 20, 74, 84), (100, 90), 5
    together = mask_generation.annotate_masks(low_res_masks, *scores, points, *geometry)
    for k, annotation in enumerate(together):
        assert annotation == mask_generation.annotate_mask(
            low_res_masks[k].numpy(), scores[0, k].item(), scores[1, k].item(), points[k], *geometry
        )


# ---------------------------------------------------------------------------------------------------------------------
# against sam2's own generator


@pytest.mark.parametrize("image_hw", [(135, 167), (128, 256), (61, 90)])
@pytest.mark.parametrize("crop_n_layers", [0, 1])
def test_generates_the_masks_of_the_official_generator(official, image_hw, crop_n_layers):
    image_rgb = smooth_image(*image_hw)
    settings = dict(points_per_side=16, crop_n_layers=crop_n_layers, crop_n_points_downscale_factor=2)
    if image_hw == (61, 90):
        settings["stability_score_thresh"] = 0.85  # small masks
    theirs = official_masks(official, BlobModel(), image_rgb, **settings)
    ours = generate_masks(BlobModel(), image_rgb, AutomaticSettings(**settings))
    assert_same_masks(theirs, ours.annotations)
    assert ours.num_prompts == 16 * 16 + crop_n_layers * 4 * 8 * 8
    scores = [annotation["predicted_iou"] for annotation in ours.annotations]
    assert scores == sorted(scores, reverse=True)


def test_one_mask_a_point_is_that_of_the_official_generator(official):
    image_rgb, settings = smooth_image(135, 167), dict(points_per_side=24, multimask_output=False)
    theirs = official_masks(official, BlobModel(), image_rgb, **settings)
    ours = generate_masks(BlobModel(), image_rgb, AutomaticSettings(**settings)).annotations
    assert_same_masks(theirs, ours)
    assert len(ours) < len(generate_masks(BlobModel(), image_rgb, AutomaticSettings(points_per_side=24)).annotations)


def test_a_picture_that_is_encoded_already_is_not_encoded_again(monkeypatch):
    image_rgb, model, settings = smooth_image(100, 120), BlobModel(), AutomaticSettings(points_per_side=8)
    expected = generate_masks(model, image_rgb, settings).annotations
    embeddings = mask_generation.encode(model, mask_generation.preprocess(image_rgb, model.image_size)[None])
    monkeypatch.setattr(mask_generation, "encode", lambda *args: pytest.fail("encoded again"))
    assert generate_masks(model, image_rgb, settings, embeddings).annotations == expected


@pytest.mark.slow
def test_generates_the_masks_of_the_official_generator_with_the_nano(official):
    config = read_option("sam2", "model", "sam2_nano")
    model, image_rgb = build_sam2(**config, device="cpu"), coins()
    settings = config["automatic"] | {"points_per_side": 16}  # of 32, which takes the official one four times as long
    theirs = official_masks(official, model, image_rgb, **settings)
    ours = generate_masks(model, image_rgb, AutomaticSettings(**settings))
    assert len(ours.annotations) >= 20
    assert_same_masks(theirs, ours.annotations)


def coins():
    """A picture of 48 discs of different colours and sizes, uint8 (270, 360, 3)."""
    rng = np.random.default_rng(0)
    image_rgb = np.full((270, 360, 3), 60, np.uint8)
    for row in range(6):
        for column in range(8):
            centre = (22 + 45 * column + int(rng.integers(-4, 5)), 22 + 45 * row + int(rng.integers(-4, 5)))
            cv2.circle(image_rgb, centre, int(rng.integers(8, 17)), rng.integers(100, 256, 3).tolist(), -1, cv2.LINE_AA)
    return cv2.GaussianBlur(image_rgb, (0, 0), 0.8)


def test_defaults_are_the_official_ones(official):
    import inspect

    parameters = inspect.signature(official.SAM2AutomaticMaskGenerator).parameters
    settings = AutomaticSettings()
    for name in AutomaticSettings.__dataclass_fields__:
        if name in parameters:
            assert getattr(settings, name) == parameters[name].default, name


@pytest.fixture
def num_points(monkeypatch):
    """Grows by the number of points of each call of decode."""
    counts = []

    def record(*arguments, image_index, **keywords):
        counts.append(len(image_index))
        return decode(*arguments, image_index=image_index, **keywords)

    monkeypatch.setattr(mask_generation, "decode", record)
    return counts


def test_a_cpu_decodes_few_points_at_once_and_finds_the_same(num_points, monkeypatch):
    image_rgb = smooth_image(100, 120)
    together = generate_masks(BlobModel(), image_rgb, AutomaticSettings(points_per_side=8))
    num_points.clear()
    monkeypatch.setattr(mask_generation, "PIXELS_ON_CPU", 10 * 8 * 8)  # 10 points: BlobModel has 8 x 8 pixels
    few = generate_masks(BlobModel(), image_rgb, AutomaticSettings(points_per_side=8, points_per_batch=33))
    assert num_points == [11, 11, 11, 11, 10, 10]
    assert few.annotations == together.annotations and few.annotations


def rounds_by_the_number_of_rows(model: nn.Module, part_sizes: set[int], num_points: int) -> bool:
    """Whether this CPU multiplies a part of some rows otherwise than all of them, in a layer with a row for each point.

    Such layers are the decoder's heads; a matrix kernel is chosen by the number of rows, and adds in its own order.
    """
    decoder = model.sam_mask_decoder
    heads = [decoder.iou_prediction_head, decoder.pred_obj_score_head, *decoder.output_hypernetworks_mlps]
    generator = torch.Generator().manual_seed(0)
    for layer in (layer for head in heads for layer in head.layers):
        rows = torch.randn(num_points, layer.in_features, generator=generator)
        with torch.inference_mode():
            if any(not torch.equal(layer(rows[:size]), layer(rows)[:size]) for size in part_sizes):
                return True
    return False


@pytest.mark.parametrize("image_size, points_per_side", [(256, 9), (1280, 5)])
def test_parts_of_a_batch_give_its_masks(image_size, points_per_side, num_points, monkeypatch):
    """With the real decoder: bit for bit where this CPU's matrix kernels do so, else up to rounding."""
    config = read_option("sam2", "model", "sam2_nano")
    model = build_sam2(**config | {"image_size": image_size}, device="cpu")
    settings = AutomaticSettings(points_per_side=points_per_side, pred_iou_thresh=0.1, stability_score_thresh=0.1)
    results = []
    for pixels in (1, 2**40):
        monkeypatch.setattr(mask_generation, "PIXELS_ON_CPU", pixels)
        results.append(generate_masks(model, smooth_image(100, 120), settings).annotations)
    in_parts, together = results
    most_points = min(points_per_side**2, settings.points_per_batch)
    assert in_parts and min(num_points) == mask_generation.FEWEST_POINTS and max(num_points) == most_points
    if not rounds_by_the_number_of_rows(model, set(num_points), most_points):
        assert in_parts == together
    assert len(in_parts) == len(together)
    for of_part, of_all in zip(in_parts, together, strict=True):
        assert of_part["point_coords"] == of_all["point_coords"]
        assert of_part["predicted_iou"] == pytest.approx(of_all["predicted_iou"], abs=1e-6)
        assert of_part["stability_score"] == pytest.approx(of_all["stability_score"], abs=mask_generation.ROUNDING)
        masks = [rle_to_mask(annotation["segmentation"]) for annotation in (of_part, of_all)]
        assert (masks[0] != masks[1]).sum() <= 1e-3 * masks[1].sum()


def test_nothing_found_is_an_empty_list():
    settings = AutomaticSettings(points_per_side=4, pred_iou_thresh=1.0)
    generated = generate_masks(BlobModel(), smooth_image(50, 60), settings)
    assert generated.annotations == [] and generated.num_prompts == 16


def test_min_area_drops_small_masks():
    image_rgb = smooth_image(200, 200)
    annotations = generate_masks(BlobModel(), image_rgb, AutomaticSettings(points_per_side=12)).annotations
    limit = int(np.median([annotation["area"] for annotation in annotations]))
    large = generate_masks(BlobModel(), image_rgb, AutomaticSettings(points_per_side=12, min_area=limit)).annotations
    assert large == [annotation for annotation in annotations if annotation["area"] >= limit]
    assert 0 < len(large) < len(annotations)


def test_min_region_area_leaves_no_small_region():
    rng = np.random.default_rng(0)
    image_rgb = rng.integers(0, 2, (25, 25, 1), dtype=np.uint8).repeat(8, 0).repeat(8, 1).repeat(3, 2) * 255  # ragged
    settings = dict(points_per_side=8, stability_score_thresh=0.5)
    ragged = generate_masks(BlobModel(), image_rgb, AutomaticSettings(**settings)).annotations
    clean = generate_masks(BlobModel(), image_rgb, AutomaticSettings(**settings, min_region_area=60)).annotations
    assert ragged and clean
    assert any(smallest_region(annotation) < 60 for annotation in ragged)
    for annotation in clean:
        mask = rle_to_mask(annotation["segmentation"])
        assert smallest_region(annotation) >= 60
        assert annotation["area"] == mask.sum()
        ys, xs = np.nonzero(mask)
        assert annotation["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min(), ys.max() - ys.min()]


def smallest_region(annotation):
    """Area of the smallest island, or hole not open to the border, by scipy."""
    from scipy.ndimage import label

    mask = rle_to_mask(annotation["segmentation"])
    around = np.ones((3, 3))
    islands = np.bincount(label(mask, around)[0].ravel())[1:]
    regions, count = label(~mask, around)
    border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    holes = [np.sum(regions == k) for k in range(1, count + 1) if k not in border]
    return min([*islands, *holes]) if len(islands) > 1 or holes else 10**9


def test_the_benchmark_counts_masks_without_a_partner_as_zero():
    from benchmarks.automatic_masks import compare_masks

    squares = []
    for x in range(10):
        mask = np.zeros((20, 220), bool)
        mask[:, 20 * x : 20 * x + 10] = True
        squares.append({"segmentation": mask_to_rle(mask)})
    assert compare_masks(squares[::-1], squares) == "10 masks, mean IoU 1.0000, 0 unmatched"
    for ours, plain in ((squares[1:], squares), (squares, squares[1:]), (squares[:1] * 10, squares)):
        with pytest.raises(AssertionError, match="mean IoU 0"):
            compare_masks(ours, plain)


# ---------------------------------------------------------------------------------------------------------------------
# parts of it


@pytest.mark.parametrize("full_hw", [(256, 192), (135, 240), (687, 678), (64, 64), (50, 33), (128, 31)])
def test_part_of_a_mask_is_upscaled_as_the_whole(full_hw):
    rng = np.random.default_rng(1)
    for _ in range(20):
        low_res_mask = np.full((64, 64), -3.0, np.float32) + rng.normal(0, 0.5, (64, 64)).astype(np.float32)
        y, x = rng.integers(0, 60, 2)
        height, width = rng.integers(1, 20, 2)
        low_res_mask[y : y + height, x : x + width] = rng.normal(
            1, 3, low_res_mask[y : y + height, x : x + width].shape
        )
        whole = F.interpolate(torch.from_numpy(low_res_mask)[None, None], full_hw, mode="bilinear", align_corners=False)
        whole = whole[0, 0].numpy()
        part, (left, top) = upscale_part(low_res_mask, full_hw, -1.0)
        rebuilt = np.full(full_hw, -np.inf, np.float32)
        rebuilt[top : top + part.shape[0], left : left + part.shape[1]] = part
        is_above = (whole > -1) | (rebuilt > -1)
        np.testing.assert_allclose(rebuilt[is_above], whole[is_above], atol=1e-4)


def test_a_small_mask_is_upscaled_in_part_only():
    low_res_mask = np.full((64, 64), -5.0, np.float32)
    low_res_mask[20:24, 30:33] = 5
    part, _ = upscale_part(low_res_mask, (640, 960), 0.0)
    assert part.size < 0.02 * 640 * 960
    assert upscale_part(np.full((64, 64), -5.0, np.float32), (640, 960), 0.0)[0].size == 0


@pytest.mark.parametrize("full_hw", [(135, 240), (40, 30)])
def test_stability_and_boxes_are_those_of_the_full_size(official, full_hw):
    low_res_masks = F.interpolate(
        torch.randn(40, 1, 6, 6, generator=torch.manual_seed(0)) * 4, (64, 64), mode="bicubic"
    )[:, 0]
    low_res_masks[0] = -5  # empty in every way
    low_res_masks[1] = -0.5  # empty, with something above -1
    whole = F.interpolate(low_res_masks[:, None], full_hw, mode="bilinear", align_corners=False)[:, 0]
    expected_stability = official.calculate_stability_score(whole, 0.0, 1.0).nan_to_num(0.0)
    expected_boxes = official.batched_mask_to_box(whole > 0)
    stability, boxes = measure_full_size(low_res_masks, full_hw, 1.0)
    torch.testing.assert_close(stability, expected_stability, atol=1e-3, rtol=0)
    torch.testing.assert_close(boxes, expected_boxes.float(), atol=0, rtol=0)
    on_gpu = _measure_chunk(low_res_masks, full_hw, 1.0)  # the path of other devices
    torch.testing.assert_close(on_gpu[:, 0], expected_stability, atol=1e-6, rtol=0)
    torch.testing.assert_close(on_gpu[:, 1:], expected_boxes.float(), atol=0, rtol=0)
    assert measure_full_size(low_res_masks[:0], full_hw, 1.0)[1].shape == (0, 4)


@pytest.mark.parametrize("full_hw", [(640, 960), (135, 240), (64, 64), (40, 30), (31, 500)])
@pytest.mark.parametrize("scale", [0.5, 4.0, 40.0])
def test_no_mask_is_more_stable_than_its_bound(official, full_hw, scale):
    low_res_masks = scale * F.interpolate(
        torch.randn(60, 1, 6, 6, generator=torch.manual_seed(0)), (64, 64), mode="bicubic"
    )
    low_res_masks[0], low_res_masks[1], low_res_masks[2] = -5, -0.5, 5  # empty, nearly so, and everywhere
    low_res_masks[3], low_res_masks[3, 0, 20, 30] = -5, 5
    whole = F.interpolate(low_res_masks, full_hw, mode="bilinear", align_corners=False)[:, 0]
    stability = official.calculate_stability_score(whole, 0.0, 1.0).nan_to_num(0.0)
    bound = bound_stability(low_res_masks[:, 0], full_hw, 1.0)
    assert (bound >= stability).all() and bound.max() == 1
    with torch.autocast("cpu", torch.bfloat16):  # as infer_sam2.py runs on a GPU
        assert torch.equal(bound_stability(low_res_masks[:, 0], full_hw, 1.0), bound)
    if scale == 4 and min(full_hw) >= 64:  # near enough to be of use
        assert (bound - stability)[4:].max() < 0.2 < stability[4:].min()
    assert bound_stability(low_res_masks[:0, 0], full_hw, 1.0).shape == (0,)


def test_points_crops_and_edges_are_the_official_ones(official):
    from sam2.utils import amg

    np.testing.assert_allclose(make_point_grid(7, (50, 90)), amg.build_point_grid(7) * [90, 50])
    for orig_hw, layers, ratio in [((1080, 1920), 2, 512 / 1500), ((333, 271), 1, 0.25), ((64, 64), 0, 0.5)]:
        boxes, layer_of = amg.generate_crop_boxes(orig_hw, layers, ratio)
        assert [(list(box), layer) for box, layer in make_crops(orig_hw, layers, ratio)] == list(
            zip(boxes, layer_of, strict=True)
        )
    crop, orig_hw = (100, 60, 400, 300), (300, 640)
    corners = torch.randint(0, 240, (500, 2, 2), generator=torch.manual_seed(0)).sort(1).values.flatten(1)
    expected = amg.is_box_near_crop_edge(corners, list(crop), [0, 0, orig_hw[1], orig_hw[0]])
    assert torch.equal(is_cut_off(corners, crop, orig_hw), expected) and 0 < expected.sum() < 500


def test_small_regions_go_as_in_sam():
    from sam2.utils.amg import remove_small_regions as official_remove

    rng = np.random.default_rng(0)
    num_changed = 0
    for _ in range(50):
        mask = np.pad(rng.random((40, 50)) < rng.choice([0.3, 0.5, 0.7]), 12)  # nothing of interest at the border
        expected = official_remove(official_remove(mask, 9, "holes")[0], 9, "islands")[0]
        np.testing.assert_array_equal(remove_small_regions(mask, 9), expected)
        num_changed += (expected != mask).any()
    assert num_changed > 40
    assert not remove_small_regions(np.zeros((5, 5), bool), 3).any()
    assert remove_small_regions(np.ones((5, 5), bool), 100).all()  # the largest region stays


# ---------------------------------------------------------------------------------------------------------------------
# stitching


def stitch_by_loop(masks, scores, max_overlap):
    """The rule, word for word, on whole images."""
    label_map, ids, next_id = np.zeros(masks[0].shape, int), [0] * len(masks), 1
    for index in sorted(range(len(masks)), key=lambda k: -scores[k]):
        mask = masks[index]
        if mask.sum() == 0:
            continue
        is_taken = mask & (label_map > 0)
        if is_taken.sum() / mask.sum() > max_overlap:
            continue
        label_map[mask & (label_map == 0)] = next_id
        ids[index] = next_id
        next_id += 1
    return label_map, ids


def stitch_as_the_tutorial(masks, scores):
    """The tutorial's loop: the id is the place in the order, in a uint8 map, which ends at 255."""
    sorted_masks = masks[np.argsort(scores)][::-1].copy()
    seg_map, occupancy_mask = np.zeros(masks[0].shape, np.uint8), np.zeros(masks[0].shape, bool)
    for i, mask in enumerate(sorted_masks):
        with np.errstate(invalid="ignore"):
            if (mask * occupancy_mask).sum() / mask.sum() > 0.15:
                continue
        mask[occupancy_mask] = 0
        seg_map[mask] = i + 1
        occupancy_mask[mask] = 1
    return seg_map


def random_masks(count, height, width, rng):
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        y, x = rng.integers(0, height), rng.integers(0, width)
        mask[y : y + rng.integers(1, 14), x : x + rng.integers(1, 14)] = True
    return masks


def test_stitching_follows_the_rule():
    rng = np.random.default_rng(0)
    for max_overlap in (0.0, 0.15, 0.5, 0.99):
        masks = random_masks(60, 50, 70, rng)
        masks[5] = False
        masks[6] = True
        scores = rng.choice([0.1, 0.5, 0.7, 0.9], 60).tolist()  # with ties
        label_map, ids = stitch_masks([mask_to_rle(mask) for mask in masks], scores, (50, 70), max_overlap)
        expected_map, expected_ids = stitch_by_loop(masks, scores, max_overlap)
        np.testing.assert_array_equal(label_map, expected_map)
        assert ids.tolist() == expected_ids and label_map.dtype == np.int32


def test_overlap_of_just_15_percent_stays():
    first, second, third = np.zeros((3, 1, 200), bool)
    first[0, :15] = True
    second[0, :100] = True  # 15 of 100 taken
    third[0, 85:185] = True  # 15 of 100 taken
    rles = [mask_to_rle(mask) for mask in (first, second, third)]
    assert stitch_masks(rles, [0.9, 0.8, 0.7], (1, 200))[1].tolist() == [1, 2, 3]
    first[0, 15] = True  # 16 of 100
    assert stitch_masks([mask_to_rle(first), *rles[1:]], [0.9, 0.8, 0.7], (1, 200))[1].tolist() == [1, 0, 2]


def test_empty_masks_take_no_id():
    empty, some = np.zeros((4, 5), bool), np.ones((4, 5), bool)
    label_map, ids = stitch_masks([mask_to_rle(empty), mask_to_rle(some), mask_to_rle(empty)], [0.9, 0.5, 0.1], (4, 5))
    assert ids.tolist() == [0, 1, 0] and (label_map == 1).all()
    label_map, ids = stitch_masks([], [], (4, 5))
    assert label_map.shape == (4, 5) and not label_map.any() and len(ids) == 0
    assert (stitch_as_the_tutorial(np.stack([empty, some, empty]), [0.9, 0.5, 0.1]) == 2).all()


def test_objects_above_255_have_ids_that_uint8_does_not_hold():
    masks = np.eye(300, dtype=bool).reshape(300, 15, 20)  # a pixel each
    scores = np.linspace(1, 0.1, 300)
    label_map, ids = stitch_masks([mask_to_rle(mask) for mask in masks], scores.tolist(), (15, 20))
    np.testing.assert_array_equal(label_map.ravel(), np.arange(1, 301))
    assert ids.tolist() == list(range(1, 301))
    assert stitch_as_the_tutorial(masks[:255], scores[:255]).max() == 255
    with pytest.raises(OverflowError):  # with NumPy 1, the object's id is 0
        stitch_as_the_tutorial(masks, scores)


@pytest.mark.parametrize("per_side", [18, pytest.param(265, marks=pytest.mark.slow)])  # 324 and 70,225 masks
def test_many_masks_keep_their_ids(per_side):
    side, count = 4 * per_side, per_side**2
    rows, columns = np.divmod(np.arange(count), per_side)
    rles, runs_of_one = [], np.full(3, side - 3)
    for row, column in zip(rows * 4, columns * 4, strict=True):  # 3 x 3 pixels in each tile of 4 x 4
        first = column * side + row
        counts = [first, 3, runs_of_one[0], 3, runs_of_one[1], 3]
        rles.append({"size": [side, side], "counts": [*counts, side * side - sum(counts)]})
    rles = coco_mask.frPyObjects(rles, side, side)
    order = np.random.default_rng(0).permutation(count)
    start = time.perf_counter()
    label_map, ids = stitch_masks(rles, (-order).tolist(), (side, side))
    seconds = time.perf_counter() - start
    np.testing.assert_array_equal(ids, order + 1)
    expected = np.zeros((side, side), int)
    for y in range(3):
        for x in range(3):
            expected[rows * 4 + y, columns * 4 + x] = order + 1
    np.testing.assert_array_equal(label_map, expected)
    assert seconds < 30, seconds


def test_stitching_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r"\[3, 4\].*\[4, 3\]"):
        stitch_masks([mask_to_rle(np.ones((3, 4), bool))], [1.0], (4, 3))


# ---------------------------------------------------------------------------------------------------------------------
# points in a region


def test_points_lie_in_the_region():
    mask = np.zeros((30, 50), bool)
    mask[10:14, 40:48] = True
    points = sample_points_in_mask(mask, 32, np.random.default_rng(0))
    assert points.shape == (32, 2) and points.dtype == np.float32
    assert mask[points[:, 1].astype(int), points[:, 0].astype(int)].all()
    assert len(np.unique(points, axis=0)) == 32  # each of the 32 pixels once
    assert sample_points_in_mask(mask, 1, np.random.default_rng(0)).shape == (1, 2)
    assert sample_points_in_mask(mask, 100, np.random.default_rng(0)).shape == (100, 2)
    again = sample_points_in_mask(mask, 32, np.random.default_rng(0))
    np.testing.assert_array_equal(points, again)
