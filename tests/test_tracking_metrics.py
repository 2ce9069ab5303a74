"""utils/tracking/metrics.py: equal to the GOT-10k toolkit's own reports, to plain loops for the other protocols, and to
counted pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import six  # noqa: F401  the toolkit imports it without saying so in its requirements
from got10k.experiments import ExperimentGOT10k, ExperimentOTB
from got10k.utils.metrics import center_error as toolkit_center_error
from got10k.utils.metrics import rect_iou
from tiny_tracking import make_sequence

from utils.tracking import metrics
from utils.tracking.metrics import (
    PROTOCOLS,
    box_iou,
    center_error,
    got10k_overlaps,
    got10k_scores,
    mean_one_pass_scores,
    one_pass_scores,
)
from utils.tracking.sequences import read_result, write_result


def some_track(num_frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Groundtruth that wanders, with whole pixels as OTB has, and boxes that lose it slowly; some beyond the frame."""
    rng = np.random.default_rng(seed)
    truth = np.cumsum(rng.normal(0, 4, (num_frames, 4)), 0) + [60, 50, 40, 50]
    truth[:, 2:] = np.clip(truth[:, 2:], 8, 90)
    truth = np.round(truth)
    boxes = truth + np.cumsum(rng.normal(0, 1.2, (num_frames, 4)), 0)
    boxes[:, 2:] = np.clip(boxes[:, 2:], 4, 120)
    return boxes, truth


# ---------------------------------------------------------------------------------------------------------------------
# overlap and distance


def test_overlap_of_whole_pixels_is_counted():
    rng = np.random.default_rng(0)
    boxes, truth = (np.concatenate([rng.integers(0, 12, (60, 2)), rng.integers(0, 9, (60, 2))], 1) for _ in range(2))

    def pixels(box):
        return {(x, y) for x in range(box[0], box[0] + box[2]) for y in range(box[1], box[1] + box[3])}

    for iou, box, true in zip(box_iou(boxes, truth), boxes, truth, strict=True):
        both, any_of = len(pixels(box) & pixels(true)), len(pixels(box) | pixels(true))
        assert iou == pytest.approx(both / any_of if any_of else 0, abs=1e-12)


@pytest.mark.parametrize("bound_wh", [None, (120, 90)])
def test_overlap_and_distance_are_the_toolkits_and_change_nothing(bound_wh):
    rng = np.random.default_rng(1)
    boxes, truth = (rng.uniform([-40, -40, 0, 0], [160, 120, 80, 80], (500, 4)) for _ in range(2))
    truth[:250] = boxes[:250] + rng.normal(0, 3, (250, 4))
    before = boxes.copy(), truth.copy()
    expected = rect_iou(boxes.copy(), truth.copy(), bound_wh)  # which cuts its arguments in place
    assert np.array_equal(box_iou(boxes, truth, bound_wh), expected) and 0.2 < expected.mean() < 0.8
    assert np.array_equal(center_error(boxes, truth), toolkit_center_error(boxes, truth))
    assert np.array_equal(boxes, before[0]) and np.array_equal(truth, before[1])


def test_overlap_of_nothing():
    empty, box = np.array([[5.0, 5, 0, 0]]), np.array([[0.0, 0, 10, 10]])
    assert box_iou(empty, box)[0] == box_iou(empty, empty)[0] == 0 and box_iou(box, box)[0] == 1
    assert np.isnan(box_iou(np.full((1, 4), np.nan), box)[0])


# ---------------------------------------------------------------------------------------------------------------------
# OTB


class Dataset(list):
    """What the toolkit's experiments need of a dataset."""

    def __init__(self, names, items):
        super().__init__(items)
        self.seq_names = names

    def __getitem__(self, key):
        return super().__getitem__(self.seq_names.index(key) if isinstance(key, str) else key)


def experiment(kind, tmp_path: Path, dataset: Dataset, **attributes):
    """One of the toolkit's experiments, without the look for the dataset on disk, the download, and the plots."""
    made = kind.__new__(kind)
    made.dataset, made.result_dir, made.report_dir = dataset, str(tmp_path / "results"), str(tmp_path / "reports")
    made.plot_curves = lambda *names: None
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def test_otb_scores_are_those_of_the_toolkits_report(tmp_path):
    names = ["Crossing", "Jogging.1", "Jogging.2"]
    tracks = [some_track(num_frames, seed) for seed, num_frames in enumerate((40, 25, 60))]
    for name, (boxes, truth) in zip(names, tracks, strict=True):
        write_result("otb", tmp_path / "results" / "ours", name, boxes - [1, 1, 0, 0], np.full(len(truth), 0.01), 1)
    dataset = Dataset(names, [(None, truth.copy()) for _, truth in tracks])
    toolkit = experiment(ExperimentOTB, tmp_path, dataset, nbins_iou=21, nbins_ce=51)
    report = json.loads(json.dumps(toolkit.report(["ours"])))["ours"]

    scores = [
        one_pass_scores(read_result(tmp_path / "results" / "ours", name), truth, "got10k")
        for name, (_, truth) in zip(names, tracks, strict=True)
    ]
    theirs = [report["seq_wise"][name] for name in names] + [report["overall"]]
    for ours, expected in zip([*scores, mean_one_pass_scores(scores)], theirs, strict=True):
        assert ours["success_auc"] == pytest.approx(expected["success_score"], abs=1e-9)
        assert ours["precision_20"] == pytest.approx(expected["precision_score"], abs=1e-9)
        assert ours["success_50"] == pytest.approx(expected["success_rate"], abs=1e-9)
        assert np.abs(ours["success_curve"] - expected["success_curve"]).max() < 1e-9
        assert np.abs(ours["precision_curve"] - expected["precision_curve"]).max() < 1e-9
    assert 0.3 < scores[0]["success_auc"] < 0.94
    assert scores[0]["success_auc"] == scores[0]["success_curve"].mean()


def plain_curves(boxes, truth, protocol: str) -> tuple[list[float], list[float]]:
    """Both curves frame by frame, from the rules of pysot and pytracking."""
    boxes, truth = [list(box) for box in boxes[: len(truth)]], [list(box) for box in truth]
    overlaps, distances = [], []
    if protocol == "pytracking":
        for t in range(1, len(boxes)):
            if 0 in boxes[t][2:] and not np.isnan(truth[t]).any():
                boxes[t] = boxes[t - 1]
        boxes += [[0, 0, 0, 0]] * (len(truth) - len(boxes))
        boxes[0] = truth[0]
    for (x1, y1, w1, h1), (x2, y2, w2, h2) in zip(boxes, truth, strict=True):
        width, height = min(x1 + w1, x2 + w2) - max(x1, x2), min(y1 + h1, y2 + h2) - max(y1, y2)
        both = width * height if width > 0 and height > 0 else 0
        dx, dy = (x1 + (w1 - 1) / 2) - (x2 + (w2 - 1) / 2), (y1 + (h1 - 1) / 2) - (y2 + (h2 - 1) / 2)
        has_box = w2 > 0 and h2 > 0
        has_center = x2 + (w2 - 1) / 2 > 0 and y2 + (h2 - 1) / 2 > 0
        if protocol == "pytracking":
            has_box = has_box and x2 > 0 and y2 > 0
            distances.append((dx * dx + dy * dy) ** 0.5 if has_box else float("inf"))
        else:
            distances.append((dx * dx + dy * dy) ** 0.5 if has_center else -1)
        overlaps.append(both / (w1 * h1 + w2 * h2 - both) if has_box else -1)
    num_frames = len(truth)
    success = [sum(overlap > k / 20 for overlap in overlaps) / num_frames for k in range(21)]
    return success, [sum(distance <= k for distance in distances) / num_frames for k in range(51)]


@pytest.mark.parametrize("protocol", ["pysot", "pytracking"])
def test_other_protocols_equal_plain_loops(protocol):
    for seed in range(6):
        boxes, truth = some_track(40, seed)
        truth[5], truth[6], truth[7] = [0, 0, 0, 0], [np.nan] * 4, [-90, 20, 30, 30]  # away, unknown, left of the frame
        truth[8, 0], truth[9, 2:] = 0, 0  # at the border; no area
        boxes[11, 2:], boxes[12, 3], boxes[0] = 0, 0, boxes[0] + 15
        success, precision = plain_curves(boxes, truth, protocol)
        scores = one_pass_scores(boxes, truth, protocol)
        assert np.allclose(scores["success_curve"], success, rtol=0, atol=1e-12)
        assert np.allclose(scores["precision_curve"], precision, rtol=0, atol=1e-12)


def test_protocols_differ_where_they_should():
    truth = np.tile([20.0, 20, 10, 10], (10, 1))
    truth[4] = 0  # away
    boxes = np.tile([20.0, 20, 10, 10], (10, 1))
    boxes[0] += [30, 30, 0, 0]
    scores = {name: one_pass_scores(boxes, truth, name) for name in PROTOCOLS}
    # the first frame is given in two of them; a frame without object is a miss, but in pysot precise
    assert [scores[name]["success_50"] for name in PROTOCOLS] == [0.9, 0.8, 0.9]
    assert [scores[name]["precision_20"] for name in PROTOCOLS] == [0.9, 0.9, 0.9]
    assert scores["pysot"]["precision_curve"][0] == 0.9 and scores["pytracking"]["precision_curve"][0] == 0.9
    truth[4] = [500, 500, 0, 0]  # a centre somewhere, but no object
    assert one_pass_scores(boxes, truth, "pysot")["precision_20"] == 0.8
    with pytest.raises(ValueError, match="protocol is 'otb'; must be one of got10k, pysot, pytracking"):
        one_pass_scores(boxes, truth, "otb")


def test_lengths_that_differ():
    boxes, truth = some_track(30, 3)
    for protocol in PROTOCOLS:  # groundtruth ends before the video
        cut, alone = (one_pass_scores(tracked, truth[:20], protocol) for tracked in (boxes, boxes[:20]))
        assert np.array_equal(cut["success_curve"], alone["success_curve"])
    for protocol in ("got10k", "pysot"):
        with pytest.raises(ValueError, match="20 boxes for 30 frames"):
            one_pass_scores(boxes[:20], truth, protocol)
    half = one_pass_scores(truth[:15] + [200, 200, 0, 0], truth + [200, 200, 0, 0], "pytracking")
    assert half["success_50"] == half["precision_20"] == 0.5
    with pytest.raises(ValueError, match="20 boxes for 30 frames"):
        got10k_overlaps(boxes[:20], truth, (320, 240), None)


# ---------------------------------------------------------------------------------------------------------------------
# GOT-10k


def test_got10k_scores_are_those_of_the_toolkits_report(tmp_path):
    names, frame_wh = ["GOT-10k_Val_000001", "GOT-10k_Val_000002"], (110, 100)
    tracks, covers = [some_track(50, 5), some_track(20, 6)], []
    for seed, (name, (boxes, truth)) in enumerate(zip(names, tracks, strict=True)):
        covers.append(np.random.default_rng(seed).integers(0, 9, len(truth)))
        covers[-1][:3] = 8, 0, 5
        write_result("got10k", tmp_path / "results" / "ours", name, boxes - [1, 1, 0, 0], np.full(len(truth), 0.01), 1)
    items = [
        (None, truth.copy(), {"cover": cover, "resolution": str(frame_wh)})
        for (_, truth), cover in zip(tracks, covers, strict=True)
    ]
    report = experiment(ExperimentGOT10k, tmp_path, Dataset(names, items), subset="val", nbins_iou=101).report(["ours"])
    overall, by_sequence = report["ours"]["overall"], [report["ours"]["seq_wise"][name] for name in names]

    overlaps = [
        got10k_overlaps(read_result(tmp_path / "results" / "ours", name), truth, frame_wh, cover)
        for name, (_, truth), cover in zip(names, tracks, covers, strict=True)
    ]
    scores = got10k_scores(overlaps)
    assert scores["ao"] == pytest.approx(overall["ao"], abs=1e-9)
    assert scores["sr_50"] == pytest.approx(overall["sr"], abs=1e-9)
    assert scores["sr_75"] == pytest.approx(overall["succ_curve"][75], abs=1e-9)
    assert scores["ao_by_sequence"] == pytest.approx(np.mean([row["ao"] for row in by_sequence]), abs=1e-9)
    assert scores["sr_50_by_sequence"] == pytest.approx(np.mean([row["sr"] for row in by_sequence]), abs=1e-9)
    assert abs(scores["ao"] - scores["ao_by_sequence"]) > 1e-3  # the two weights are not the same number
    assert scores["num_frames"] == sum((cover[1:] > 0).sum() for cover in covers)
    assert scores["sr_75_by_sequence"] == pytest.approx(np.mean([(iou > 0.75).mean() for iou in overlaps]))


def test_got10k_counts_neither_the_first_frame_nor_hidden_ones():
    truth = np.tile([20.0, 20, 10, 10], (6, 1))
    boxes = truth.copy()
    boxes[0] += 50
    boxes[3] += 50
    cover = np.array([8, 8, 8, 0, 8, 8])
    assert got10k_overlaps(boxes, truth, (100, 100), cover).tolist() == [1, 1, 1, 1]
    assert got10k_overlaps(boxes, truth, (100, 100), None).tolist() == [1, 1, 0, 1, 1]
    truth[4] = -1  # away
    assert got10k_overlaps(boxes, truth, (100, 100), None).tolist() == [1, 1, 0, 1]
    boxes[2] = np.nan  # not tracked
    assert got10k_overlaps(boxes, truth, (100, 100), None).tolist() == [1, 0, 0, 1]
    wide = np.array([[0.0, 0, 10, 10], [90, 90, 20, 20]])
    assert got10k_overlaps(wide, np.array([[0.0, 0, 10, 10], [90, 90, 10, 10]]), (100, 100), None).tolist() == [1]
    with pytest.raises(ValueError, match="nothing can be scored"):
        got10k_scores([np.zeros(0)])


@pytest.mark.parametrize("protocol", ["got10k", "pysot", "pytracking"])
def test_tiger1_without_its_first_frames_is_scored_where_it_lies(protocol, tmp_path):
    """As pysot's and pytracking's results of OTB-100 have it: scored 5 frames off, a perfect file had 0.198."""
    boxes = np.stack([np.linspace(10, 200, 30), np.linspace(20, 90, 30), np.full(30, 20), np.full(30, 15)], 1)
    sequence = make_sequence(boxes, name="Tiger1")
    for first in (0, 5):
        np.savetxt(tmp_path / "Tiger1.txt", boxes[first:], delimiter=",")
        row = metrics.score_result(tmp_path, sequence, protocol)
        assert row["num_frames"] == 30 - first and row["overlaps"].min() > 0.99
    np.savetxt(tmp_path / "Tiger1.txt", boxes[3:], delimiter=",")
    if protocol != "pytracking":
        with pytest.raises(ValueError, match="has 27 boxes, but Tiger1 groundtruth for 30 frames"):
            metrics.score_result(tmp_path, sequence, protocol)


def test_a_box_that_is_none_has_no_overlap():
    sequence = make_sequence(np.tile([10.0, 10, 20, 20], (5, 1)))
    boxes_xywh = np.concatenate([sequence.boxes_xywh[:3], np.full((2, 4), np.nan)])
    assert metrics.mean_visible_iou(boxes_xywh, sequence) == pytest.approx(0.5)


def test_times_of_other_editors_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("1,1,2,2\n")
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a_time.txt").write_bytes("0.5\r\n0.25\r\n".encode(encoding))
        assert metrics.read_times(tmp_path, "a").tolist() == [0.5, 0.25]
