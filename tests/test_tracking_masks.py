"""Masks of tracked objects, J and F against DAVIS's formulae written out, and track.py masks=true."""

import csv
import json
import math

import numpy as np
import pytest
import tiny_training
import torch
from options import read_option
from PIL import Image
from skimage.morphology import dilation, disk
from test_track import compose_config, quick, run  # noqa: F401 (quick is a fixture)
from test_tracking_tracker import moving_object

from track import track
from utils.images import read_label_map, write_image
from utils.instances.codecs import rle_to_mask
from utils.sam2 import evaluation
from utils.sam2 import model as models
from utils.sam2.model import build_sam2
from utils.tracking import mask_metrics, masks
from utils.tracking.masks import Segmenter, cut_boxes, segment_boxes

NANO = read_option("sam2", "model", "sam2_nano") | {"checkpoint": "none", "image_size": 64}


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return Segmenter(tiny_training.answer_to_prompts(build_sam2(**NANO, device="cpu")), "fp32")


def random_mask(rng, hw):
    mask = np.zeros(hw, bool)
    for _ in range(rng.integers(0, 4)):
        (y, x), (h, w) = rng.integers(-5, hw, 2), rng.integers(3, 30, 2)
        mask[max(0, y) : max(0, y + h), max(0, x) : max(0, x + w)] = True
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# J and F


def official_contour(mask):
    """DAVIS's seg2bmap at the mask's own size, pixel by pixel."""
    height, width = mask.shape
    contour = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            right = mask[y, x + 1] if x + 1 < width else None
            below = mask[y + 1, x] if y + 1 < height else None
            across = mask[y + 1, x + 1] if x + 1 < width and y + 1 < height else None
            contour[y, x] = any(other is not None and other != mask[y, x] for other in (right, below, across))
    return contour


def official_f(mask, truth):
    radius = math.ceil(0.008 * math.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2))
    ours, theirs = official_contour(mask), official_contour(truth)
    near_ours, near_theirs = (dilation(each.astype(np.uint8), disk(radius)) > 0 for each in (ours, theirs))
    if ours.sum() == 0 and theirs.sum() == 0:
        precision, recall = 1.0, 1.0
    elif ours.sum() == 0:
        precision, recall = 1.0, 0.0
    elif theirs.sum() == 0:
        precision, recall = 0.0, 1.0
    else:
        precision, recall = (ours * near_theirs).sum() / ours.sum(), (theirs * near_ours).sum() / theirs.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def test_contours_agree_with_the_formula_written_out():
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(16):
        hw = tuple(rng.integers(20, 110, 2))  # a radius of 1 or 2 px
        mask = random_mask(rng, hw)
        truth = np.roll(mask, rng.integers(-3, 4, 2), (0, 1)) if rng.random() < 0.6 else random_mask(rng, hw)
        f = mask_metrics.contour_accuracy(mask, truth)
        assert f == pytest.approx(official_f(mask, truth), abs=1e-6)
        union = (mask | truth).sum()
        j = (mask & truth).sum() / union if union else 1
        assert mask_metrics.region_similarity(mask, truth) == pytest.approx(j, abs=1e-6)
        seen.append(f)
    assert 0 in seen and 1 in seen and any(0.2 < f < 0.95 for f in seen)


def test_statistics_agree_with_the_formula_written_out():
    rng = np.random.default_rng(0)
    for num_frames in (1, 2, 3, 7, 40, 78, 255):
        values = rng.random(num_frames)
        ids = np.round(np.linspace(1, num_frames, 5) + 1e-10) - 1
        ids = ids.astype(np.uint8)  # as DAVIS 2017's db_statistics: right up to 256 frames
        bins = [values[ids[i] : ids[i + 1] + 1] for i in range(4)]
        found = mask_metrics.summarize_frames(values)
        assert found["mean"] == pytest.approx(values.mean(), abs=1e-6)
        assert found["recall"] == pytest.approx((values > 0.5).mean(), abs=1e-6)
        assert found["decay"] == pytest.approx(bins[0].mean() - bins[3].mean(), abs=1e-6)
    falling = np.linspace(1, 0, 400)
    assert mask_metrics.summarize_frames(falling)["decay"] == pytest.approx(0.75, abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# masks of boxes


def test_masks_are_those_of_the_boxes_one_by_one(segmenter):
    rng = np.random.default_rng(1)
    frame = rng.integers(0, 255, (60, 90, 3)).astype(np.uint8)
    boxes = np.array([[10, 10, 30, 25], [20, 15, 40, 40], [-8, 30, 20, 60], [200, 10, 5, 5], [40, 5, 20, 20.0]])
    is_there = np.array([True, True, True, True, False])
    made = segment_boxes(segmenter, frame, boxes, is_there)
    model, wholes = segmenter.model, {}
    with torch.inference_mode():
        embeddings = models.encode(model, models.preprocess(frame, 64)[None])
        for place, corners in enumerate([[10, 10, 39, 34], [20, 15, 59, 54], [0, 30, 11, 59]]):
            low_res, predicted, _ = evaluation.predict_from_boxes(
                model, embeddings, np.array([corners], np.float32), None, (60, 90), "fp32"
            )
            wholes[place] = (models.upscale_masks(low_res, (60, 90))[0, 0] > 0).numpy()
            assert made.predicted_ious[place] == pytest.approx(predicted.item(), abs=1e-4)
            own = rle_to_mask(made.segmentations[place])
            assert (own != wholes[place]).sum() <= 2 and own.any()  # rounding of another batch
            ys, xs = np.nonzero(own)
            box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
            assert made.boxes_xywh[place].tolist() == box
            wholes[place] = own
    assert made.segmentations[3] is made.segmentations[4] is None and np.isnan(made.predicted_ious[3:]).all()
    expected = np.zeros((60, 90), int)
    for y in range(60):
        for x in range(90):
            over = [place for place in wholes if wholes[place][y, x]]
            expected[y, x] = 1 + max(over, key=lambda place: made.predicted_ious[place]) if over else 0
    assert np.array_equal(made.label_map, expected) and sum(m.astype(int) for m in wholes.values()).max() > 1


def test_boxes_are_cut_to_the_frame():
    boxes = np.array([[0, 0, 5, 4], [-3.5, 2, 10, 100], [50, 0, 3, 3], [-9, 0, 9, 3], [-9, 0, 10, 3], [np.nan] * 4])
    corners = cut_boxes(boxes, (40, 50))
    assert corners[[0, 1, 4]].tolist() == [[0, 0, 4, 3], [0, 2, 5.5, 39], [0, 0, 0, 2]]
    assert np.isnan(corners[[2, 3, 5]]).all()


def test_files_have_davis_colours(tmp_path):
    ids = np.arange(256).reshape(16, 16)
    masks.write_mask(tmp_path / "a.png", ids)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P" and np.array_equal(np.array(picture), ids)
        colors = np.array(picture.convert("RGB")).reshape(-1, 3)
    known = {0: [0, 0, 0], 1: [128, 0, 0], 2: [0, 128, 0], 3: [128, 128, 0], 15: [192, 128, 128], 255: [224, 224, 192]}
    assert {number: colors[number].tolist() for number in known} == known  # PASCAL VOC's, and its void
    assert np.array_equal(read_label_map(tmp_path / "a.png"), ids)
    masks.write_mask(tmp_path / "b.png", ids + 1)
    assert np.array_equal(read_label_map(tmp_path / "b.png"), ids + 1)


# ---------------------------------------------------------------------------------------------------------------------
# track.py


@pytest.fixture
def davis(tmp_path):
    """A moving object, 7 frames with its masks; the fifth frame's file is torn."""
    frames, boxes = moving_object(7)
    folders = [tmp_path / "DAVIS" / name / "480p" / "box" for name in ("JPEGImages", "Annotations")]
    for folder in folders:
        folder.mkdir(parents=True)
    for number, (frame, (x, y, w, h)) in enumerate(zip(frames, np.asarray(boxes).round().astype(int), strict=True)):
        write_image(folders[0] / f"{number:05d}.png", frame)
        mask = np.zeros(frame.shape[:2], np.uint8)
        mask[y : y + h, x : x + w] = 1
        masks.write_mask(folders[1] / f"{number:05d}.png", mask)
    return tmp_path / "DAVIS"


def test_track_writes_masks(davis, tmp_path, segmenter, monkeypatch):
    monkeypatch.setattr("utils.tracking.masks.load_segmenter", lambda settings, device, precision: segmenter)
    folder = davis / "JPEGImages" / "480p" / "box"
    (folder / "00004.png").write_bytes(b"\x89PNG\r\n")
    boxes = "boxes=[[20,20,40,40],[60,60,50,50]]"
    failures = run(tmp_path / "run", f"input={folder}", boxes, "masks=true", "tracker.lost_score=-100", "overlay=false")
    assert len(failures) == 1
    names = [path.name for path in sorted((tmp_path / "run" / "masks").iterdir())]
    assert names == [f"{number:05d}.png" for number in (0, 1, 2, 3, 5, 6)]
    record = json.loads((tmp_path / "run" / "tracks.json").read_text())
    for number in (0, 1, 2, 3, 5, 6):
        label_map = read_label_map(tmp_path / "run" / "masks" / f"{number:05d}.png")
        wholes = [rle_to_mask(each["masks"][number]) for each in record["objects"]]
        assert np.array_equal(label_map > 0, wholes[0] | wholes[1]) and set(np.unique(label_map)) <= {0, 1, 2}
        assert all((wholes[n] >= (label_map == n + 1)).all() for n in (0, 1))
        frame = np.array(Image.open(folder / f"{number:05d}.png"))
        at = np.array([each["boxes_xywh"][number] for each in record["objects"]])
        again = segment_boxes(segmenter, frame, at, np.ones(2, bool))
        assert again.segmentations == [each["masks"][number] for each in record["objects"]]
    assert all(each["masks"][4] is None and each["predicted_ious"][4] is None for each in record["objects"])
    speed = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["last"]
    assert speed["masks_frames_per_s"] > 0

    run(tmp_path / "lost", f"input={folder}", boxes, "masks=true", "tracker.lost_score=100", "overlay=false")
    assert read_label_map(tmp_path / "lost" / "masks" / "00000.png").any()
    assert not read_label_map(tmp_path / "lost" / "masks" / "00001.png").any()


def test_benchmark_scores_masks(davis, tmp_path, segmenter, monkeypatch):
    """Ours, and a folder that has the truth but for one frame, by hand."""
    monkeypatch.setattr("utils.tracking.masks.load_segmenter", lambda settings, device, precision: segmenter)
    truth_dir, other = davis / "Annotations" / "480p" / "box", tmp_path / "other" / "box"
    other.mkdir(parents=True)
    for number in (0, 1, 2, 4, 5, 6):  # the mask of frame 3 is missing
        (other / f"{number:05d}.png").write_bytes((truth_dir / f"{number:05d}.png").read_bytes())
    data = ["data=davis_sequences", f"data.root={davis}", "data.val_fraction=1"]
    assert run(tmp_path / "run", *data, "mode=benchmark", "masks=true") == []
    (tmp_path / "other" / "box.txt").write_bytes((tmp_path / "run/results/siamfc/box.txt").read_bytes())
    (tmp_path / "third" / "box").mkdir(parents=True)  # boxes alone, as GOT-10k lays them out
    (tmp_path / "third" / "box.txt").write_bytes((tmp_path / "run/results/siamfc/box.txt").read_bytes())
    results = f"results=[{tmp_path / 'run/results/siamfc'},{tmp_path / 'other'},{tmp_path / 'third'}]"
    run(tmp_path / "evaluated", *data, "mode=evaluate", results)
    with (tmp_path / "evaluated" / "masks.csv").open(newline="") as file:
        ours, theirs = csv.DictReader(file)
    assert float(theirs["j_mean"]) == pytest.approx(0.8) and float(theirs["f_mean"]) == pytest.approx(0.8)
    assert float(theirs["j_recall"]) == pytest.approx(0.8) and float(theirs["j_and_f"]) == pytest.approx(0.8)
    j = []
    for number in range(1, 6):
        own, true = (
            read_label_map(folder / f"{number:05d}.png") > 0
            for folder in (tmp_path / "run/results/siamfc/box", truth_dir)
        )
        j.append((own & true).sum() / (own | true).sum())
    assert float(ours["j_mean"]) == pytest.approx(np.mean(j), abs=1e-6)
    metrics = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["siamfc"]
    assert metrics["j_and_f"] == pytest.approx(float(ours["j_and_f"]), abs=1e-6)


def test_masks_of_other_trackers(tmp_path):
    """Truth with other suffixes, an object that goes, ids in one file, and a file that is none beside them."""
    frame_dir, truth_dir, other, torn = folders = [
        tmp_path / name
        for name in ("DAVIS/JPEGImages/480p/box", "DAVIS/Annotations/480p/box", "other/box", "torn/box.1")
    ]
    for folder in folders:
        folder.mkdir(parents=True)
    for number in range(6):
        ids = np.zeros((40, 60), np.uint8)
        ids[20:30, 40:50] = 2
        ids[5:15, 5:15] = number < 3  # object 1 leaves
        write_image(frame_dir / f"{number:05d}.png", np.zeros((40, 60, 3), np.uint8))
        masks.write_mask(truth_dir / f"{number:05d}.png", ids)
        (truth_dir / f"{number:05d}.png").rename(truth_dir / f"{number:05d}.PNG")
        ids[5:15, 5:15] = number != 4  # the tracker sees it in frame 3, where it is not
        masks.write_mask(other / f"{number:05d}.PNG", ids)
        write_image(other / f"{number:05d}.jpg", np.zeros((40, 60, 3), np.uint8))  # what it drew for the eye
    (torn / "00001.png").write_bytes(b"\x89PNG\r\n")
    for folder in (other.parent, torn.parent):
        for name in ("box.1", "box.2"):
            (folder / f"{name}.txt").write_text("1,1,2,2\n" * 6)
    data = ["mode=evaluate", "data=davis_sequences", f"data.root={tmp_path / 'DAVIS'}", "data.val_fraction=1"]
    [failure] = run(tmp_path / "run", *data, f"results=[{torn.parent},{other.parent}]")
    assert failure.startswith("box.1: masks of torn are not scored: ") and "00001.png" in failure
    with (tmp_path / "run" / "masks.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert [first["sequence"], second["sequence"]] == ["box.1", "box.2"] and first["tracker"] == "other"
    assert float(first["j_mean"]) == float(first["f_mean"]) == 0.75  # frames 1 to 4, as DAVIS 2017's toolkit counts
    assert float(second["j_and_f"]) == 1
    metrics = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]
    assert metrics["other"]["j_mean"] == 0.875 and "j_mean" not in metrics["torn"]


def test_random_weights_follow_the_seed(tmp_path):
    frames, boxes = moving_object(2)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        write_image(tmp_path / "frames" / f"{number}.png", frame)
    made = []
    for number, seed in enumerate((0, 0, 1)):
        box = f"boxes={[[float(value) for value in boxes[0]]]}"
        arguments = [f"input={tmp_path / 'frames'}", box, "masks=true", "overlay=false", f"seed={seed}"]
        run(tmp_path / f"run_{number}", *arguments, "sam2.model=sam2_nano", "sam2.checkpoint=none")
        made.append(
            json.loads((tmp_path / f"run_{number}" / "tracks.json").read_text())["objects"][0]["predicted_ious"]
        )
    assert made[0] == made[1] != made[2]


def test_scale_follows_the_mask():
    from utils.tracking.tracker import Target

    target = Target(np.zeros(2, np.float32), np.array([20, 10], np.float32), 60.0, 60.0)
    masks.follow_mask(target, np.array([0, 0, 24, 12.0]), 0.5)
    assert target.size_wh.tolist() == pytest.approx([20 * 1.2**0.5, 10 * 1.2**0.5]) and target.side == 60 * 1.2**0.5
    before = target.side
    masks.follow_mask(target, np.full(4, np.nan), 0.5)
    masks.follow_mask(target, np.array([0, 0, 100, 100.0]), 0.5)  # not believed
    assert target.side == before


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["sam2.model=sam2.1_hiera_tiny"], "sam2.model is sam2.1_hiera_tiny, which masks=true and tracker=sam2 use"),
        (["mask_feedback=0.5"], "mask_feedback is 0.5, but masks are off"),
        (["masks=true", "sam2.model=hiera"], "there is no SAM 2 model hiera; must be one of"),
        (["masks=true", "sam2.checkpoint=none.pt"], "none.pt"),
        (["masks=true", "sam2.image_size=100"], "sam2.image_size is 100; must be null, or a multiple of 32"),
        (["masks=true", "mode=evaluate", "results=[.]"], "masks= is given but mode is evaluate"),
        (["masks=true", "mask_feedback=0.5", "tracker.mode=parity"], "mask_feedback changes what tracker.mode=parity"),
    ],
)
def test_bad_input_is_one_line(davis, tmp_path, overrides, message):
    config = compose_config("data=davis_sequences", f"data.root={davis}", "data.val_fraction=1", *overrides)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        track(config, tmp_path)
