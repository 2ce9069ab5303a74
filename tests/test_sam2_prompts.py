"""utils/sam2/prompts.py: simulated clicks and boxes, against SAM 2's samplers and exact counts."""

import cv2
import numpy as np
import pytest
import torch
from scipy import stats

from utils.sam2.model import _sam2_without_hydra
from utils.sam2.prompts import center_point, noised_box, random_correction_points, random_point


def blobs(rng: np.random.Generator, height: int, width: int, level: float = 0.5) -> np.ndarray:
    """Draw a mask of a few smooth blobs."""
    noise = cv2.resize(rng.random((5, 6)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return noise > level


# ---------------------------------------------------------------------------------------------------------------------
# evaluation clicks


def test_center_clicks_are_those_of_sam2():
    with _sam2_without_hydra():
        from sam2.modeling.sam2_utils import sample_one_point_from_error_center

    rng = np.random.default_rng(0)
    labels_seen = []
    for number in range(80):
        height, width = rng.integers(3, 90, 2)
        mask, pred_mask = blobs(rng, height, width), blobs(rng, height, width, rng.uniform(0.2, 0.8))
        if number % 4 == 0:  # ragged
            mask, pred_mask = mask ^ (rng.random(mask.shape) < 0.1), pred_mask ^ (rng.random(mask.shape) < 0.1)
        if number % 8 == 1:  # the first click
            pred_mask[:] = False
        if number == 2:
            pred_mask = mask.copy()
        if number == 3:
            mask[:], pred_mask[:] = True, False
        if number == 6:
            mask[:], pred_mask[:] = False, True
        point, label = center_point(mask, pred_mask)
        expected_point, expected_label = sample_one_point_from_error_center(
            torch.from_numpy(mask)[None, None], torch.from_numpy(pred_mask)[None, None]
        )
        assert point.tolist() == expected_point[0, 0].tolist() and label == expected_label.item(), number
        assert point.dtype == np.float32 and point.shape == (2,)
        labels_seen.append(label)
    assert 10 < sum(labels_seen) < 70  # both kinds were compared


def click_from_whole_pictures(mask: np.ndarray, pred_mask: np.ndarray) -> tuple[np.ndarray, int]:
    """As `center_point`, by distance transforms of the whole picture."""
    missed_depth, overpainted_depth = (
        np.rint(np.square(cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 0)))[1:-1, 1:-1]
        for region in (mask & ~pred_mask, pred_mask & ~mask)
    )
    label = int(missed_depth.max() > overpainted_depth.max())
    depth = missed_depth if label else overpainted_depth
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return np.array([x, y], np.float32), label


def test_center_clicks_of_bounding_boxes_are_those_of_whole_pictures():
    rng = np.random.default_rng(1)
    num_ties = 0
    for number in range(600):
        height, width = rng.integers(1, 100, 2)
        mask, pred_mask = blobs(rng, height, width), blobs(rng, height, width, rng.uniform(0.2, 0.9))
        match number % 6:
            case 0:  # ragged
                mask, pred_mask = mask ^ (rng.random(mask.shape) < 0.1), pred_mask ^ (rng.random(mask.shape) < 0.1)
            case 1:
                pred_mask[:] = False
            case 2:  # both regions are equally deep, and each deepest pixel is one of many
                mask[:] = False
                mask[: height // 2, width // 3 :] = True
                pred_mask = mask[::-1, ::-1]
            case 3:
                mask[:], pred_mask[:] = False, number % 12 == 3
            case 4:
                pred_mask = mask.copy()
        point, label = center_point(mask, pred_mask)
        expected_point, expected_label = click_from_whole_pictures(mask, pred_mask)
        assert (point.tolist(), label) == (expected_point.tolist(), expected_label), number
        assert point.dtype == expected_point.dtype and type(label) is int
        num_ties += click_from_whole_pictures(pred_mask, mask)[1] == label == 0  # neither region is the deeper one
    assert num_ties > 200


def test_center_click_looks_at_the_error_alone(monkeypatch):
    areas, real = [], cv2.distanceTransform
    monkeypatch.setattr(
        cv2, "distanceTransform", lambda region, *args: areas.append(region.size) or real(region, *args)
    )
    mask, pred_mask = np.zeros((2, 1080, 1920), bool)
    mask[500:520, 1000:1030] = True
    pred_mask[505:525, 1000:1030] = True
    assert center_point(mask, pred_mask)[0].tolist() == [1002, 522]
    assert areas == [7 * 32, 7 * 32]


def test_center_click_lies_in_the_middle_of_the_larger_error():
    mask, pred_mask = np.zeros((2, 40, 60), bool)
    mask[10:21, 30:51] = True  # centre row 15, a ridge of columns 35..45
    pred_mask[30:35, 2:7] = True  # smaller
    point, label = center_point(mask, pred_mask)
    assert label == 1 and point[1] == 15 and 35 <= point[0] <= 45
    point, label = center_point(mask, mask | pred_mask)
    assert label == 0 and point.tolist() == [4, 32]
    assert center_point(np.ones((9, 9), bool), np.zeros((9, 9), bool))[0].tolist() == [4, 4]  # the frame is a border


# ---------------------------------------------------------------------------------------------------------------------
# training clicks


def error_pixels(mask: np.ndarray, pred_mask: np.ndarray) -> list[tuple[int, int, int]]:
    """List (x, y, label) of the pixels that may be clicked, row by row, by a naive loop."""
    height, width = mask.shape
    every = [(x, y) for y in range(height) for x in range(width)]
    wrong = [(x, y, int(mask[y, x])) for x, y in every if mask[y, x] != pred_mask[y, x]]
    background = [(x, y, 0) for x, y in every if not mask[y, x]]
    return wrong or background or [(x, y, 1) for x, y in every]


def correction_cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    some, other = rng.random((2, 7, 11)) < 0.4
    empty, full = np.zeros((7, 11), bool), np.ones((7, 11), bool)
    one_missed = some.copy()
    one_missed[tuple(np.argwhere(some)[-1])] = False
    return {
        "missed and overpainted": (some, other),
        "missed alone": (some, empty),
        "overpainted alone": (some, full),
        "one pixel": (some, one_missed),
        "perfect: background": (some, some),
        "perfect, full frame": (full, full),
        "empty, perfect": (empty, empty),
        "full frame missed": (full, empty),
    }


@pytest.mark.parametrize("name", correction_cases())
def test_corrections_reach_every_error_pixel_once_as_uniform_runs_through_0_to_1(name):
    mask, pred_mask = correction_cases()[name]
    expected = error_pixels(mask, pred_mask)
    count = len(expected)
    uniform = (torch.arange(count) + 0.5) / count
    masks = torch.from_numpy(mask).expand(count, -1, -1)
    pred_masks = torch.from_numpy(pred_mask).expand(count, -1, -1)
    point_coords, point_labels = random_correction_points(masks, pred_masks, uniform)
    assert point_coords.shape == (count, 1, 2) and point_coords.dtype == torch.float32
    assert point_labels.shape == (count, 1) and point_labels.dtype == torch.int32
    clicks = torch.cat([point_coords[:, 0].int(), point_labels], dim=1)  # x, y, label
    assert [tuple(click) for click in clicks.tolist()] == expected
    ends = torch.tensor([0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
    at_ends, _ = random_correction_points(masks[:1].expand(2, -1, -1), pred_masks[:1].expand(2, -1, -1), ends)
    assert at_ends[:, 0].int().tolist() == [list(expected[0][:2]), list(expected[-1][:2])]


def test_corrections_of_different_objects_do_not_mix():
    cases = list(correction_cases().values())
    masks = torch.from_numpy(np.stack([mask for mask, _ in cases]))
    pred_masks = torch.from_numpy(np.stack([pred_mask for _, pred_mask in cases]))
    rng = np.random.default_rng(2)
    for _ in range(20):
        uniform = torch.from_numpy(rng.random(len(cases), np.float32))
        point_coords, point_labels = random_correction_points(masks, pred_masks, uniform)
        for number, (mask, pred_mask) in enumerate(cases):
            pixels = error_pixels(mask, pred_mask)
            click = (*point_coords[number, 0].int().tolist(), point_labels[number, 0].item())
            assert click == pixels[int(uniform[number].item() * len(pixels))]


def test_corrections_in_a_whole_large_frame_and_of_no_objects():
    masks, pred_masks = torch.ones(3, 1024, 1024, dtype=torch.bool), torch.zeros(3, 1024, 1024, dtype=torch.bool)
    uniform = torch.tensor([0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))])
    point_coords, point_labels = random_correction_points(masks, pred_masks, uniform)
    assert point_coords[:, 0].tolist() == [[0, 0], [0, 512], [1023, 1023]] and point_labels.tolist() == [[1]] * 3
    point_coords, point_labels = random_correction_points(masks[:0], pred_masks[:0], uniform[:0])
    assert point_coords.shape == (0, 1, 2) and point_labels.shape == (0, 1)


def test_random_points_are_uniform_over_the_mask():
    rng = np.random.default_rng(3)
    mask = rng.random((6, 9)) < 0.5
    counts = np.zeros(mask.shape, int)
    for _ in range(200 * mask.sum()):
        x, y = random_point(mask, rng)
        counts[int(y), int(x)] += 1
    assert (counts[~mask] == 0).all()
    assert stats.chisquare(counts[mask]).pvalue > 1e-4
    assert random_point(mask, rng).dtype == np.float32 and random_point(mask, rng).shape == (2,)
    again = [random_point(mask, np.random.default_rng(5)).tolist() for _ in range(2)]
    assert again[0] == again[1]


# ---------------------------------------------------------------------------------------------------------------------
# boxes


@pytest.mark.parametrize(
    "image_hw, expected_xy", [((320, 640), (6, 3)), ((320, 160), (3.125, 3)), ((96, 640), (6, 1.875))]
)
def test_box_noise_is_uniform_within_a_tenth_of_the_side_and_the_cap(image_hw, expected_xy):
    """The cap is 20 px where the picture is 1024 px wide or high."""
    mask = np.zeros(image_hw, bool)
    mask[40:71, 80:141] = True  # corners (80, 40) and (140, 70): 60 by 30 px between them
    rng = np.random.default_rng(6)
    noise = np.array([noised_box(mask, rng) for _ in range(1500)]) - [80, 40, 140, 70]
    limits = np.array([*expected_xy, *expected_xy])
    assert (np.abs(noise) <= limits + 1e-4).all()
    for side in range(4):
        assert stats.kstest(noise[:, side] / limits[side], stats.uniform(-1, 2).cdf).pvalue > 1e-4
    assert np.abs(np.corrcoef(noise.T) - np.eye(4)).max() < 0.12  # each side by itself


def test_noised_boxes_stay_in_the_picture_and_keep_their_corners_in_order():
    rng = np.random.default_rng(7)
    at_corner = np.zeros((50, 60), bool)
    at_corner[:30, 20:] = True
    thin, one_pixel = np.zeros((2, 50, 60), bool)
    thin[10, 5:55] = True
    one_pixel[20, 30] = True
    for mask in (at_corner, thin, one_pixel, np.ones((50, 60), bool)):
        for _ in range(200):
            x1, y1, x2, y2 = box = noised_box(mask, rng)
            assert 0 <= x1 <= x2 <= 59 and 0 <= y1 <= y2 <= 49
            assert box.dtype == np.float32
    assert noised_box(one_pixel, rng).tolist() == [30, 20, 30, 20]


def test_the_evaluation_click_does_not_hang_on_the_last_bit_of_a_distance(monkeypatch):
    """OpenCV 5's distances of equal masks differ there from call to call, and ties moved clicks."""
    rng, real = np.random.default_rng(0), cv2.distanceTransform

    def rounded_otherwise(*args):
        depth = real(*args)
        return depth * (1 + rng.uniform(-2e-7, 2e-7, depth.shape)).astype(np.float32)

    monkeypatch.setattr(cv2, "distanceTransform", rounded_otherwise)
    mask = np.zeros((40, 60), bool)
    mask[5:14, 5:55] = mask[20:29, 5:55] = True  # 100 pixels lie equally deep
    clicks = {(*center_point(mask, np.zeros_like(mask))[0].tolist(),) for _ in range(12)}
    assert clicks == {(9.0, 9.0)}  # the first of them
