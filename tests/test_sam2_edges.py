"""utils/sam2/edges.py: matches, counts, scores against other definitions; thinning; edges of masks; BSDS500's files."""

import csv

import cv2
import numpy as np
import pytest
import tiny
import torch
from options import read_option
from scipy.io import savemat
from scipy.optimize import linear_sum_assignment
from skimage.morphology import thin
from torchvision.ops import nms

import infer_sam2
from utils.images import read_image, write_image
from utils.sam2 import edges, mask_generation
from utils.sam2.edges import (
    canny_edges,
    count_matches,
    find_mask_edges,
    list_bsds,
    match_boundaries,
    read_boundaries,
    score_edges,
    sobel_edges,
    thin_edges,
)
from utils.sam2.mask_generation import make_point_grid
from utils.sam2.model import build_sam2, decode, encode, preprocess, scale_points

# ---------------------------------------------------------------------------------------------------------------------
# matching


@pytest.mark.parametrize("seed", range(12))
def test_as_many_are_matched_as_an_assignment_matches(seed):
    rng = np.random.default_rng(seed)
    shape = rng.integers(8, 30, 2)
    pred, truth = (rng.random(shape) < share for share in rng.uniform(0.02, 0.4, 2))
    max_distance_px = float(rng.choice([1, np.sqrt(2), 2.5, 5]))
    is_pred_matched, is_truth_matched = match_boundaries(pred, truth, max_distance_px)

    apart = np.argwhere(pred)[:, None] - np.argwhere(truth)[None]
    in_reach = np.hypot(*np.moveaxis(apart, -1, 0)) <= max_distance_px
    most = in_reach[linear_sum_assignment(in_reach, maximize=True)].sum()
    assert is_pred_matched.sum() == is_truth_matched.sum() == most
    assert not (is_pred_matched & ~pred).any() and not (is_truth_matched & ~truth).any()
    in_reach = in_reach[np.ix_(is_pred_matched[pred], is_truth_matched[truth])]  # the matched ones among themselves
    assert in_reach[linear_sum_assignment(in_reach, maximize=True)].sum() == most


def test_nothing_is_matched_with_nothing():
    some, none = np.eye(5, dtype=bool), np.zeros((5, 5), bool)
    for pred, truth in ((some, none), (none, some), (none, none)):
        assert not np.any(match_boundaries(pred, truth, 3.0))


@pytest.mark.parametrize("shift, num_matched", [(2, 30), (3, 30), (4, 0)])
def test_a_shifted_line_is_matched_within_the_distance(shift, num_matched):
    pred, truth = np.zeros((2, 30, 20), bool)
    truth[:, 8], pred[:, 8 + shift] = True, True
    assert [matched.sum() for matched in match_boundaries(pred, truth, 3.0)] == [num_matched] * 2


def test_the_nearest_pixel_is_matched_first():
    pred, truth = np.zeros((2, 9, 9), bool)
    truth[4, 4] = pred[4, 1] = pred[4, 5] = pred[6, 4] = True
    assert np.argwhere(match_boundaries(pred, truth, 3.0)[0]).tolist() == [[4, 5]]


def test_maps_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"size \(4, 6\), the prediction \(4, 5\)"):
        match_boundaries(np.ones((4, 5), bool), np.ones((4, 6), bool), 1.0)
    with pytest.raises(ValueError, match=r"size \(4, 6\), the prediction \(4, 5\)"):
        count_matches(np.ones((4, 5), np.float32), [np.ones((4, 6), bool)])


# ---------------------------------------------------------------------------------------------------------------------
# counts and scores


def draw_lines(seed: int) -> np.ndarray:
    lines, rng = np.zeros((80, 100), np.uint8), np.random.default_rng(seed)
    for _ in range(4):
        ends = rng.integers((0, 0), (100, 80), (2, 2)).tolist()
        cv2.line(lines, *ends, 1)
    return thin(lines > 0)


def test_the_truth_as_prediction_is_perfect():
    truth = draw_lines(0)
    scores = score_edges([count_matches(truth.astype(np.float32), [truth])] * 2)
    assert scores == {"ods": 1, "ois": 1, "r50": 1, "ap": 0}  # the benchmark has no area where all recalls are equal
    ys, xs = np.nonzero(truth)
    strength = np.zeros(truth.shape, np.float32)
    strength[ys, xs] = np.linspace(0.005, 1, len(xs))  # ever less of it, from left to right and down
    truth[ys[0], xs[0]] = False  # which no threshold reaches
    scores = score_edges([count_matches(strength, [truth])])
    assert [scores[name] for name in ("ods", "ois", "r50")] == [1, 1, 1]
    assert scores["ap"] == pytest.approx(1.01, abs=0.021)  # 101 values, of which the lowest recalls are not reached


def test_counts_are_those_of_matching_at_each_threshold():
    rng = np.random.default_rng(1)
    truths = [draw_lines(seed) for seed in (1, 2, 1)]
    strength = np.where(draw_lines(1) | (rng.random((80, 100)) < 0.05), rng.integers(0, 9, (80, 100)) / 8, 0)
    strength = np.roll(strength, 2, 1).astype(np.float32)
    thresholds, max_distance = np.array([0.1, 0.12, 0.3, 0.5, 1.0]), 0.02
    counts = count_matches(strength, truths, thresholds, max_distance)
    for threshold, row in zip(thresholds, counts.tolist(), strict=True):
        pred = thin(strength >= threshold)
        matches = [match_boundaries(pred, truth, max_distance * np.hypot(80, 100)) for truth in truths]
        num_right = np.any([is_pred for is_pred, _ in matches], 0).sum()
        num_found = sum(is_truth.sum() for _, is_truth in matches)
        assert row[:2] == [num_found, sum(truth.sum() for truth in truths)] and row[3] == pred.sum()
        assert row[2] == num_right


def test_a_strength_of_a_threshold_is_at_it():
    strength = np.zeros((9, 9), np.float32)
    strength[2, 1:8], strength[6, 1:8] = 0.3, 0.7
    counts = count_matches(strength, [strength > 0])
    assert counts[:, 3].tolist() == [14] * 30 + [7] * 40 + [0] * 29
    assert counts.dtype == np.int64 and counts.shape == (99, 4)


def test_lines_are_thinned_as_skimage_thins_them():
    for seed in range(8):
        noise = np.random.default_rng(seed).random((50, 60)).astype(np.float32)
        for is_edge in (noise < (seed + 1) / 9, cv2.GaussianBlur(noise, (0, 0), 1.5) < 0.5):
            np.testing.assert_array_equal(edges._thin_lines(is_edge), thin(is_edge))


def test_scores_of_a_table():
    # Thresholds 0.25, 0.5, 0.75; true pixels matched and all, predicted pixels matched and all.
    first = np.array([[80, 100, 40, 100], [50, 100, 30, 40], [20, 100, 10, 10]])
    second = np.array([[60, 100, 50, 100], [10, 100, 18, 20], [10, 100, 9, 10]])
    # Together: recall 0.7, 0.3, 0.15; precision 0.45, 0.8, 0.95.
    # F at thresholds: 0.5478, 0.4364, 0.2591. Between the first two, w of the second and 1 - w of the first:
    # F = 2 (0.7 - 0.4 w) (0.45 + 0.35 w) / (1.15 - 0.05 w), highest near w = 0.25.
    between = [2 * (0.7 - 0.4 * w) * (0.45 + 0.35 * w) / (1.15 - 0.05 * w) for w in np.arange(100) / 99]
    # Each at its best: the first at 0.5 (F 0.6, against 0.5333 and 0.3333), the second at 0.25 (0.5455, 0.18, 0.18):
    # recall (50 + 60) / 200, precision (30 + 50) / (40 + 100).
    recall, precision = 0.55, 80 / 140
    # Recall 0.15, 0.16 .. 0.7: a line from 0.95 to 0.8 at 0.3, and one from there to 0.45 at 0.7.
    area = sum(0.95 - 0.01 * k for k in range(16)) + sum(0.8 - 0.00875 * k for k in range(1, 41))
    expected = {
        "ods": max(between),
        "ois": 2 * recall * precision / (recall + precision),
        "ap": area / 100,
        "r50": 0.7 - 0.4 / 7,  # precision 0.5 is a seventh of the way from 0.45 to 0.8
    }
    assert score_edges([first, second]) == pytest.approx(expected, abs=1e-12)
    assert max(between) > 0.5478 + 1e-3


def test_scores_at_the_ends():
    nothing = np.array([[0, 10, 0, 5], [0, 10, 0, 0]])
    assert score_edges([nothing]) == {"ods": 0, "ois": 0, "ap": 0, "r50": 0}
    precise = np.array([[6, 10, 9, 10], [3, 10, 5, 5]])
    assert score_edges([precise])["r50"] == 0.6  # precision never falls to 0.5
    dipping = np.array([[9, 10, 4, 10], [8, 10, 6, 10], [7, 10, 4, 10], [6, 10, 6, 10]])
    assert score_edges([dipping])["r50"] == pytest.approx(0.85)  # the highest of the recalls at 0.5
    for counts in ([], [precise, nothing[:1]], [precise[:, :3]]):
        with pytest.raises(ValueError, match="counts have shapes"):
            score_edges(counts)


# ---------------------------------------------------------------------------------------------------------------------
# strength


@pytest.mark.parametrize("degrees", [0, 20, 45, 70, 90, 110, 135, 160])
def test_of_a_blurred_line_one_pixel_is_left(degrees):
    ys, xs = np.indices((61, 61)) - 30.0
    angle = np.deg2rad(degrees)
    away = xs * np.sin(angle) - ys * np.cos(angle) + 0.2  # px from the line
    strength = np.exp(-(away**2) / 18).astype(np.float32)
    thinned = thin_edges(strength)
    ridge = thinned[8:-8, 8:-8] > 0
    assert np.abs(away[8:-8, 8:-8][ridge]).max() < 1
    is_steep = abs(np.sin(angle)) > 0.7  # a row has one pixel of a steep line, a column one of a flat line
    per_line = ridge.sum(1 if is_steep else 0)
    assert per_line.min() >= 1 and per_line.max() <= 2, per_line
    if degrees % 90 != 45:  # a diagonal's neighbours lie at 0.7 px on either side, so that two may be largest
        assert per_line.mean() < 1.35, per_line
    assert set(np.unique(thinned)) <= {0, *np.unique(strength)}
    np.testing.assert_array_equal(thin(ridge).sum(1 if is_steep else 0)[2:-2], 1)


@pytest.mark.parametrize("turned", [False, True])
def test_of_two_equal_pixels_one_is_left(turned):
    strength = np.zeros((20, 30), np.float32)
    strength[:, 10:12] = 0.5
    strength = strength.T.copy() if turned else strength
    thinned = thin_edges(strength)
    thinned = thinned.T if turned else thinned
    assert (np.count_nonzero(thinned, axis=1) == 1).all() and thinned[:, 10:12].max(1).min() == 0.5
    assert not thin_edges(np.zeros((7, 9), np.float32)).any()


@pytest.mark.parametrize("find", [sobel_edges, canny_edges])
def test_baselines_find_the_sides_of_a_square(find):
    image_rgb = np.full((60, 80, 3), 40, np.uint8)
    image_rgb[20:45, 30:60] = 220
    strength = find(image_rgb)
    assert strength.shape == (60, 80) and strength.dtype == np.float32 and 0.5 < strength.max() <= 1
    truth = np.zeros((60, 80), bool)
    truth[20:45, 30:60] = True
    truth = edges._thin_lines(edges._find_boundary(truth))
    assert score_edges([count_matches(strength, [truth], max_distance=0.02)])["ods"] > 0.95
    assert not find(np.full((20, 20, 3), 90, np.uint8)).any()


def test_a_cut_of_cannys_strength_is_canny():
    image_rgb = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8), (120, 90))
    strength = canny_edges(image_rgb)
    grey = cv2.GaussianBlur(cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY), (0, 0), edges.CANNY_SIGMA_PX)
    for level in (1, 5, 12):
        high = edges.CANNY_HIGHEST * level / edges.CANNY_LEVELS
        expected = cv2.Canny(grey, edges.CANNY_LOW * high, high, L2gradient=True) > 0
        np.testing.assert_array_equal(strength >= np.float32(level / edges.CANNY_LEVELS), expected)
        assert expected.any()


# ---------------------------------------------------------------------------------------------------------------------
# edges of masks


@pytest.fixture(scope="module")
def nano():
    return build_sam2(**read_option("sam2", "model", "sam2_nano"), device="cpu")


def draw_discs() -> np.ndarray:
    image_rgb = np.full((90, 130, 3), 60, np.uint8)
    for centre, radius, color in (
        ((35, 40), 22, (200, 40, 40)),
        ((95, 50), 28, (40, 200, 90)),
        ((70, 20), 9, (240,) * 3),
    ):
        cv2.circle(image_rgb, centre, radius, color, -1, cv2.LINE_AA)
    return image_rgb


def test_edges_of_masks_are_those_of_a_plain_loop(nano):
    image_rgb = draw_discs()
    orig_hw, side = image_rgb.shape[:2], 4
    with torch.inference_mode():
        embeddings = encode(nano, preprocess(image_rgb, nano.image_size)[None])
        strength = find_mask_edges(nano, embeddings, orig_hw, points_per_side=side)

        probabilities, predicted_ious = [], []
        for point in torch.from_numpy(make_point_grid(side, orig_hw)).float():
            point = scale_points(point[None, None].expand(8, 1, 2), orig_hw, nano.image_size)  # 8: rounds as in batches
            labels = torch.ones(8, 1, dtype=torch.int32)
            masks, ious, *_ = decode(nano, embeddings, torch.zeros(8, dtype=torch.long), point, labels, None, True)
            full = torch.nn.functional.interpolate(masks[:1], orig_hw, mode="bilinear", align_corners=False)[0]
            probabilities += list(full.sigmoid().numpy())
            predicted_ious += ious[0].tolist()
    places = [np.argwhere(probability > 0.5) for probability in probabilities]
    there = [k for k, place in enumerate(places) if len(place)]
    boxes = torch.tensor(np.array([[*places[k].min(0)[::-1], *places[k].max(0)[::-1]] for k in there])).float()
    best = [there[k] for k in nms(boxes, torch.tensor(predicted_ious)[there], 0.7).tolist()]
    assert len(places) == 48 and 3 <= len(best) < len(there)

    expected, is_boundary_of_any = np.zeros(orig_hw, np.float32), np.zeros(orig_hw, bool)
    for k in best:
        padded = np.pad(probabilities[k], 1, mode="reflect")
        rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
        columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
        magnitude = np.hypot(rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2])
        mask = probabilities[k] > 0.5
        is_boundary = np.zeros(orig_hw, bool)
        is_boundary[1:] |= mask[1:] != mask[:-1]
        is_boundary[:-1] |= mask[1:] != mask[:-1]
        is_boundary[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        is_boundary[:, :-1] |= mask[:, 1:] != mask[:, :-1]
        expected = np.maximum(expected, magnitude * is_boundary)
        is_boundary_of_any |= is_boundary
    expected = thin_edges((expected / expected.max()).astype(np.float32))

    assert strength.dtype == np.float32 and strength.shape == orig_hw
    assert strength.min() == 0 and 0.9 < strength.max() <= 1 and not strength[~is_boundary_of_any].any()
    is_same = np.isclose(strength, expected, atol=1e-4)
    assert is_same.mean() > 0.999  # where two values are nearly equal, rounding chooses which is thinned away


def test_edges_of_masks_lie_on_the_discs(nano):
    image_rgb = draw_discs()
    with torch.inference_mode():
        embeddings = encode(nano, preprocess(image_rgb, nano.image_size)[None])
    strength = find_mask_edges(nano, embeddings, image_rgb.shape[:2], points_per_side=6)
    discs = np.zeros(image_rgb.shape[:2], np.uint8)
    for centre, radius in (((35, 40), 22), ((95, 50), 28)):
        cv2.circle(discs, centre, radius, 1, 1)
    recall, _ = [matched.sum() for matched in match_boundaries(strength > 0.3, discs > 0, 3.0)]
    assert recall > 0.8 * discs.sum()


def test_empty_masks_have_no_edges(nano, monkeypatch):
    def decode_nothing(*arguments, image_index, **keywords):
        num_points = len(image_index)
        return torch.full((num_points, 3, 16, 16), -5.0), torch.zeros(num_points, 3), None, None

    monkeypatch.setattr(mask_generation, "decode", decode_nothing)
    with torch.inference_mode():
        embeddings = encode(nano, torch.zeros(1, 3, nano.image_size, nano.image_size))
    assert not find_mask_edges(nano, embeddings, (30, 40), points_per_side=2).any()


# ---------------------------------------------------------------------------------------------------------------------
# files of BSDS500


def make_bsds(root, split="val"):
    """Two pictures with two annotators each: {name: boundaries bool (2, 12, 16)}."""
    rng, boundaries = np.random.default_rng(0), {}
    for folder in ("images", "groundTruth"):
        (root / folder / split).mkdir(parents=True)
    for name in ("12", "3"):
        boundaries[name] = rng.random((2, 12, 16)) < 0.2
        write_image(root / "images" / split / f"{name}.png", rng.integers(0, 256, (12, 16, 3), np.uint8))
        (root / "images" / split / f"{name}.png").rename(root / "images" / split / f"{name}.jpg")
        cell = np.empty((1, 2), object)
        for k, layer in enumerate(boundaries[name]):
            cell[0, k] = {"Segmentation": np.ones((12, 16), np.uint16), "Boundaries": layer.astype(np.uint8)}
        savemat(root / "groundTruth" / split / f"{name}.mat", {"groundTruth": cell})
    return boundaries


@pytest.mark.parametrize("below", ["data", "."])
def test_pictures_and_boundaries_are_listed_and_read(tmp_path, below):
    boundaries = make_bsds(tmp_path / below)
    (tmp_path / below / "images" / "val" / "Thumbs.db").write_bytes(b"as in the original")
    items = list_bsds(tmp_path, "val")
    assert [name for name, _, _ in items] == ["12", "3"]
    for name, image_path, truth_path in items:
        assert read_image(image_path).shape == (12, 16, 3)
        np.testing.assert_array_equal(read_boundaries(truth_path), boundaries[name])
        assert all(layer.dtype == bool for layer in read_boundaries(truth_path))


def test_what_is_missing_is_named(tmp_path):
    make_bsds(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"no folder .*images/test"):
        list_bsds(tmp_path, "test")
    (tmp_path / "data" / "groundTruth" / "val" / "3.mat").rename(tmp_path / "3.mat")
    with pytest.raises(FileNotFoundError, match=r"picture .*3\.jpg has no .*groundTruth/val/3\.mat"):
        list_bsds(tmp_path, "val")
    (tmp_path / "data" / "images" / "val" / "3.jpg").unlink()
    (tmp_path / "data" / "images" / "val" / "12.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"boundaries .*12\.mat have no .*images/val/12\.jpg"):
        list_bsds(tmp_path, "val")
    (tmp_path / "data" / "groundTruth" / "val" / "12.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.jpg in .*images/val"):
        list_bsds(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_boundaries(tmp_path / "absent.mat")


def test_what_is_no_such_mat_is_named(tmp_path):
    path, cell = tmp_path / "a.mat", np.empty((1, 2), object)
    cell[0, 0], cell[0, 1] = ({"Boundaries": np.ones((4, width))} for width in (5, 6))
    make_bsds(tmp_path)
    whole = (tmp_path / "groundTruth" / "val" / "3.mat").read_bytes()
    savemat(tmp_path / "b.mat", {"other": 1})
    savemat(tmp_path / "c.mat", {"groundTruth": cell})
    savemat(tmp_path / "d.mat", {"groundTruth": np.zeros((1, 0))})
    others = [(tmp_path / f"{name}.mat").read_bytes() for name in "bcd"]
    for data in (b"", b"text " * 100, whole[: len(whole) // 2], *others):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.mat ") as caught:
            read_boundaries(path)
        assert "\n" not in str(caught.value)


def test_sobel_on_a_picture_of_bsds500(data_root):
    _, image_path, truth_path = list_bsds(data_root / "BSDS500", "test")[1]
    counts = count_matches(sobel_edges(read_image(image_path)), read_boundaries(truth_path), np.arange(1, 20) / 20)
    assert 0.3 < score_edges([counts])["ods"] < 0.8


def test_edges_are_measured_by_the_script_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    make_bsds(tmp_path)
    counted, real = [], edges.count_matches

    def count(strength, truths):
        counted.append(strength)
        if len(counted) == 5:  # sam, sobel and canny of the first picture, and two of the second
            raise MemoryError("killed")
        return real(strength, truths)

    monkeypatch.setattr(edges, "count_matches", count)
    keys = ["split=val", f"root={tmp_path}", "points_per_side=2"]
    overrides = ["mode=benchmark", "benchmark.protocols=[edges]", *(f"benchmark.edges.{key}" for key in keys)]
    overrides += ["model=sam2_nano", "model.checkpoint=none", "image_size=64", "device=cpu"]
    assert tiny.run_script(infer_sam2, tmp_path / "killed", *overrides)[0] == 1
    assert tiny.run_script(infer_sam2, tmp_path / "resumed", f"resume={tmp_path / 'killed'}", "device=cpu")[0] == 0
    assert len(counted) == 5 + 3
    with (tmp_path / "resumed" / "table.csv").open(newline="") as file:
        table = {(row["group"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    pictures = [read_image(path) for _, path, _ in list_bsds(tmp_path, "val")]
    truths = [read_boundaries(path) for *_, path in list_bsds(tmp_path, "val")]
    expected = score_edges([real(sobel_edges(image), own) for image, own in zip(pictures, truths, strict=True)])
    assert {name: table["sobel", name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert (tmp_path / "resumed" / "edges.png").is_file() and {key[0] for key in table} == {"sam", "sobel", "canny"}
