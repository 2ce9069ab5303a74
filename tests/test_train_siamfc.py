"""train_siamfc.py on tiny videos: the real command, pairs, loss, rates, validation by tracking, presets, and bad input.

The published code is siamfc-pytorch; that it cannot resume is in test_train_siamfc_resume.py.
"""

import csv
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_tracking as tiny
import torch
from tiny import run_command
from tiny_training import differences

import train_siamfc as script
from utils.images import read_image
from utils.loop import limit_threads
from utils.run import sample_rng
from utils.tracking import siamfc
from utils.tracking.siamfc import SiamFC
from utils.tracking.tracker import SiamFCTracker, TrackerSettings

EXPERIMENTS = tiny.ROOT / "configs" / "tracking" / "training" / "experiment"
PRESETS = sorted(path.stem for path in EXPERIMENTS.glob("siamfc_*.yaml"))
LABELS = siamfc.response_labels(15, 16.0)
WEIGHTS = siamfc.balanced_weights(LABELS)
NAN = math.nan


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_got10k(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def quick(monkeypatch):
    tiny.make_runs_quick(monkeypatch)


def optim_settings(**changes):
    return script.OptimSettings(**(tiny.compose_config()["optim"] | changes))


def read_rows(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


# ---------------------------------------------------------------------------------------------------------------------
# the real command


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """The folder and the output of a run of two steps with the real network."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    arguments = [
        *tiny.tiny_overrides(root),
        "train.steps=2", "train.eval_every=2", "train.picture_pairs=2", "train.eval_frames=2",
    ]  # fmt: skip
    done = run_command(script, run_dir, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir, done.stdout + done.stderr


def test_command_writes_the_promised_files(finished):
    run_dir, output = finished
    for name in ("best.pt", "last.pt", "metrics.csv", "curves.png", "run.json", ".hydra/config.yaml"):
        assert (run_dir / name).stat().st_size > 0, name
    assert list((run_dir / "tensorboard").glob("events*"))
    pictures = sorted(path.relative_to(run_dir / "samples").as_posix() for path in (run_dir / "samples").glob("*/*"))
    assert pictures == ["step_000000/pairs.png", "step_000002/pairs.png"]
    assert read_image(run_dir / "samples" / "step_000002" / "pairs.png").shape == (2 * 243, 635, 3)
    assert not list(run_dir.rglob("*.tmp"))
    assert f"python {tiny.ROOT / 'track.py'} checkpoint=run/best.pt" in output  # from where the user stands


def test_metrics_are_recorded(finished):
    run_dir, _ = finished
    record, rows = json.loads((run_dir / "run.json").read_text()), read_rows(run_dir)
    measured = {row["step"]: row for row in rows if "val/ao" in row}
    assert sorted(measured) == [0, 2]
    metrics = record["metrics"]
    assert metrics.keys() == {"start", "best", "last"} and "end" in record
    assert metrics["start"]["step"] == 0 and metrics["last"]["step"] == 2
    assert metrics["best"]["step"] == max(measured, key=lambda step: measured[step]["val/ao"])
    for part in metrics.values():
        assert {f"val/{name}" for name in ("ao", "sr_50", "success_auc", "still_ao", "loss", "num_frames")} <= set(part)
        assert all(part[name] == pytest.approx(measured[part["step"]][name]) for name in part if "/" in name)
    assert metrics["last"]["val/num_frames"] == 2  # two sequences, 2 frames each, those after the first
    logged = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in logged] == [1, 2]
    expected = {"train/loss", "train/hit_rate", "train/grad_norm", "lr", "pairs_per_s", "data_wait_share"}
    assert all(expected <= row.keys() for row in logged)
    assert [row["lr"] for row in logged] == pytest.approx([1e-2, 1e-5])
    assert record["data"] == {"train_sequences": 3, "val_sequences": 2}


def test_best_checkpoint_is_plain_and_tracks_as_validation_did(finished):
    run_dir, _ = finished
    best = torch.load(run_dir / "best.pt", map_location="cpu", weights_only=True)
    assert best.keys() == {"format", "script", "model", "config", "git", "metrics"} and best["format"] == 1
    plain = [best[key] for key in best if key != "model"]
    assert json.loads(json.dumps(plain)) == plain
    model = siamfc.load_siamfc(run_dir / "best.pt")
    assert not differences(dict(model.state_dict()), dict(best["model"]))
    _, sequences = script.list_data(best["config"]["data"])
    metrics = script.evaluate_tracking(model, sequences, TrackerSettings(**best["config"]["tracker"]), "fp32", 2)
    for name in script.REPORTED:
        assert metrics[f"val/{name}"] == pytest.approx(best["metrics"][f"val/{name}"], abs=1e-3)
    last = torch.load(run_dir / "last.pt", map_location="cpu", weights_only=True)
    assert not differences(dict(siamfc.load_siamfc(run_dir / "last.pt").state_dict()), dict(last["model"]))


def test_tiny_data_is_overfitted(root, tmp_path, monkeypatch, capfd, quick):
    """By the command, with a small network: it learns to leave the bright rectangles, which random features follow."""
    arguments = ["data.val_folder=train", "train.steps=40", "train.batch_size=6", "train.eval_every=20"]
    arguments += ["optim.lr=0.03", "optim.min_lr=1e-3", "train.eval_frames=null"]
    status, output = tiny.run_main(monkeypatch, capfd, tmp_path / "run", *tiny.tiny_overrides(root), *arguments)
    assert status == 0 and "3 validation sequences train, too, and say little of others: train_001, " in output, output
    metrics = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]
    assert metrics["start"]["val/ao"] < metrics["start"]["val/still_ao"] < 0.6 < 0.8 < metrics["best"]["val/ao"]
    assert metrics["best"]["val/sr_50"] > 0.9 and metrics["best"]["step"] > 0
    logged = [row for row in read_rows(tmp_path / "run") if "train/loss" in row]
    assert logged[-1]["train/loss"] < 0.7 * logged[0]["train/loss"] and logged[-1]["train/hit_rate"] > 0.9
    table = [line.split() for line in output.splitlines() if line.startswith("ao ")]
    parts = [metrics["best"]["val/still_ao"], *(metrics[part]["val/ao"] for part in ("start", "best", "last"))]
    assert table == [["ao", *(f"{value:.3f}" for value in parts)]]


# ---------------------------------------------------------------------------------------------------------------------
# which frames


LIMITS = {
    "min_side": 20, "max_side": 500, "min_share": 0.02, "max_share": 0.5, "max_aspect": 4.0, "min_cover": 0.3,
}  # fmt: skip


def usable_by_loop(sequence, limits):
    """The filter of siamfc-pytorch (`_filter`), a frame at a time."""
    frames = []
    for t, (_, _, w, h) in enumerate(sequence.boxes_xywh.tolist()):
        if not sequence.visible[t] or sequence.frame_wh is None or math.isnan(w) or math.isnan(h):
            continue
        frame_w, frame_h = sequence.frame_wh
        sides = [limits["min_side"] <= side <= limits["max_side"] for side in (w, h)]
        shares = [limits["min_share"] <= share <= limits["max_share"] for share in (w / frame_w, h / frame_h)]
        aspect = 1 / limits["max_aspect"] <= w / max(1, h) <= limits["max_aspect"]
        is_seen = True
        if sequence.cover is not None:
            is_seen = sequence.cover[t] > max(1.0, limits["min_cover"] * max(sequence.cover))
        if all(sides) and all(shares) and aspect and w * h >= 20 and is_seen:
            frames.append(t)
    return frames


def varied_sequence():
    """Boxes at, below and above each limit, in a frame of 1200 x 900 px; covers of 0 to 8; frames without box."""
    sides = [0, 17, 18, 19, 20, 21, 23, 24, 25, 30, 80, 100, 119, 120, 121, 400, 449, 450, 451, 500, 501, 599, 600, 601]
    boxes = [[5, 6, w, h] for w, h in itertools.product(sides, sides)]
    boxes += [[NAN] * 4, [3, 4, NAN, 100], [NAN, NAN, 100, 100]]
    cover = [8 if t % 3 else t // 3 % 9 for t in range(len(boxes))]
    hidden = np.arange(len(boxes)) % 17 == 0
    boxes = np.array(boxes)
    visible = (boxes[:, 2:] > 0).all(1) & np.isfinite(boxes).all(1) & ~hidden
    return tiny.make_sequence(boxes, (1200, 900), cover, visible)


@pytest.mark.parametrize("limit", [None, *LIMITS])
def test_usable_frames_equal_a_naive_loop(limit):
    """With every limit, and with each of them lifted: then there are more, so each has a say."""
    lifted = {} if limit is None else {limit: 0 if limit.startswith("min") else 1e9}
    sequence, limits = varied_sequence(), LIMITS | lifted
    frames = script.usable_frames(sequence, tiny.pair_settings(**limits))
    assert frames.dtype == np.int64 and frames.tolist() == usable_by_loop(sequence, limits)
    all_limits = usable_by_loop(sequence, LIMITS)
    assert len(all_limits) > 50 and set(all_limits) <= set(frames.tolist())
    assert (len(frames) > len(all_limits)) == (limit is not None)


def test_usable_frames_without_cover_or_size():
    boxes = [[0, 0, 50, 50], [0, 0, NAN, NAN], [0, 0, 50, 60]]
    assert script.usable_frames(tiny.make_sequence(boxes), tiny.pair_settings()).tolist() == [0, 2]
    assert script.usable_frames(tiny.make_sequence(boxes, frame_wh=None), tiny.pair_settings()).tolist() == []
    for cover, expected in [([1, 1, 1], []), ([2, 8, 3], [2]), ([0, 2, 2], [2]), ([2, 2, 2], [0, 2])]:
        assert script.usable_frames(tiny.make_sequence(boxes, cover=cover), tiny.pair_settings()).tolist() == expected


def test_a_box_beside_its_frame_is_of_no_use():
    """As where x and y are exchanged, or frames were made smaller: patches of it show nothing."""
    boxes = [[-49, 0, 50, 50], [-50, 0, 50, 50], [999, 799, 50, 50], [1000, 0, 50, 50], [0, 800, 50, 50]]
    assert script.usable_frames(tiny.make_sequence(boxes), tiny.pair_settings()).tolist() == [0, 2]


def test_large_objects_are_left_out_by_the_config_alone(root, tmp_path, capsys):
    """Limits of 500 px and half the frame are hidden in the published code; here the config has them."""
    sequence = tiny.make_sequence([[0, 0, 600, 500], [0, 0, 100, 100]])
    large = tiny.make_sequence([[0, 0, 600, 500]], name="large")
    sequences, usable = script.keep_usable([sequence, large, large], tiny.pair_settings(), "train")
    assert sequences == [sequence] and usable[0].tolist() == [1]
    output = capsys.readouterr().out
    assert "train: 2 sequences, 3 frames; pairs are cut from 1 frames of 1 sequences" in output and "large" in output
    limits = tiny.pair_settings(max_side=700, max_share=1)
    sequences, usable = script.keep_usable([sequence, large, large], limits, "train")
    assert sequences == [sequence, large, large] and [frames.tolist() for frames in usable] == [[0, 1], [0], [0]]


def test_drawn_frames_are_any_two_within_the_gap():
    """In both directions, up to the gap itself, never the same frame where there is another."""
    usable = np.array([3, 4, 7, 13, 14, 40])
    drawn = Counter(script.draw_frames(usable, 6, sample_rng(0, index)) for index in range(4000))
    near = {(a, b) for a in usable.tolist() for b in usable.tolist() if a != b and abs(a - b) <= 6}
    assert set(drawn) == near | {(40, 40)} and (7, 13) in drawn and (13, 7) in drawn
    exemplars = Counter(exemplar for exemplar, _ in drawn.elements())
    assert all(count == pytest.approx(4000 / 6, rel=0.2) for count in exemplars.values())
    assert script.draw_frames(np.array([9]), 6, sample_rng(0, 0)) == (9, 9)
    # the published form: the exemplar comes first, the gap is below the limit, and a bad draw is one frame twice
    published = {(a, b) for a, b in near if 0 < b - a < 6} | {(a, a) for a in usable.tolist()}
    assert published != set(drawn)


# ---------------------------------------------------------------------------------------------------------------------
# patches


BOXES = [(60, 40, 31, 22), (60.37, 40.81, 30.6, 21.9), (-9, -12, 30, 25), (150, 112, 25, 40), (10, 50, 140, 36)]


def cut(image, box, out_size, shift_px=0.0, index=0):
    """A patch that is varied by the shift alone."""
    return script.cut_patch(image, box, out_size, shift_px, tiny.pair_settings(), sample_rng(0, index))


def vary(patch, index=0, is_grey=False, **changes):
    """A patch in other colours."""
    return script.vary_colors(patch, is_grey, tiny.pair_settings(**changes), sample_rng(0, index))


@pytest.mark.parametrize("box", BOXES)
def test_patch_without_variation_is_the_crop_itself(box):
    image, box = tiny.textured(0, 120, 160), np.array(box, np.float64)
    for out_size in (127, script.INSTANCE_SIZE):
        patch = cut(image, box, out_size)
        side = siamfc.instance_side(siamfc.context_side(box[2:]), out_size)
        expected = siamfc.crop_and_resize(
            image, siamfc.box_center(box), side, out_size, siamfc.mean_color(image), cv2.INTER_LINEAR
        )
        assert patch.dtype == np.uint8 and np.array_equal(patch, expected)


@pytest.mark.parametrize("box", BOXES)
def test_exemplar_is_the_trackers_to_the_byte(box):
    image, box = tiny.textured(0, 120, 160), np.array(box, np.float64)
    tracker = SiamFCTracker(tiny.small_model(), TrackerSettings(mode="parity"))
    seen = []
    real = tracker._features
    tracker._features = lambda patches: seen.append(np.stack(patches)) or real(patches)
    tracker.init(image, box[None])
    patch = cut(image, box, 127)
    assert np.array_equal(patch, seen[0][0])
    shifted = cut(image, box, 127, shift_px=4.0)
    assert not np.array_equal(shifted, seen[0][0])  # the published exemplar is off the middle


def marked(center_xy, height=400, width=500):
    """A dark picture with one bright pixel."""
    image = np.zeros((height, width, 3), np.uint8)
    image[center_xy[1], center_xy[0]] = 255
    return image


def brightest(patch):
    """Where a patch is brightest: its centre of mass (x, y)."""
    patch = patch.astype(np.float64).sum(2)
    patch[patch < 0.05 * patch.max()] = 0
    yy, xx = np.mgrid[: patch.shape[0], : patch.shape[1]]
    return np.array([(patch * xx).sum(), (patch * yy).sum()]) / patch.sum()


@pytest.mark.parametrize("out_size", [127, script.INSTANCE_SIZE])
def test_object_is_in_the_middle_of_the_patch(out_size):
    """A 0-based box is taken as it is; one that is thought to count from 1 is cut a pixel too far left and up."""
    middle = (out_size - 1) / 2
    image = marked((250, 200))
    # a context square of 127 px is shown px by px
    box = np.array([250 - 31.25, 200 - 31.25, 63.5, 63.5])  # its middle pixel is (250, 200)
    for moved_px in (0, 1):
        patch = cut(image, box - [moved_px, moved_px, 0, 0], out_size)
        assert np.argwhere(patch[..., 0] == 255).tolist() == [[middle + moved_px] * 2]
    # one of 63 px is shown at twice its size: half a px of the picture, from rounding, is one of the patch
    box = np.array([250 - 15, 200 - 15, 31, 31])
    assert np.abs(brightest(cut(image, box, out_size)) - middle).max() < 1.1
    assert (brightest(cut(image, box - [1, 1, 0, 0], out_size)) - middle > 0.9).all()


def test_box_origin_of_the_files_moves_the_crop(root):
    """The same files, said to count from 0, are cut one pixel to the lower right."""
    center, other = (
        tiny.make_dataset(tiny.configure(root, f"data.box_origin={box_origin}")).sequences[0].boxes_xywh
        for box_origin in (1, 0)
    )
    assert (other - center == [1, 1, 0, 0]).all()
    frame = read_image(root / "train" / "train_001" / "00000001.jpg").astype(int)
    x, y, w, h = center[0].astype(int)
    inside, around = frame[y : y + h, x : x + w], frame[y + 1 : y + h + 1, x + 1 : x + w + 1]
    ground = (np.abs(frame - 105) < 25).all(2)
    assert ground[y : y + h, x - 2].mean() > ground[y : y + h, x].mean() and inside.shape == around.shape


def test_shift_and_stretch_are_within_their_bounds(monkeypatch):
    """What is handed to the crop: each axis is uniform up to the bound, in px of the patch, the side by its share."""
    asked = []
    monkeypatch.setattr(script.siamfc, "crop_and_resize", lambda *args: asked.append(args))
    image, box = tiny.textured(0, 120, 160), np.array([60.0, 40, 31, 22])
    for out_size, shift_px in ((127, 4.0), (script.INSTANCE_SIZE, 7.0)):
        asked.clear()
        pairs = tiny.pair_settings(stretch=0.1, random_interpolation=True)
        for index in range(600):
            script.cut_patch(image, box, out_size, shift_px, pairs, sample_rng(0, index))
        sides = np.array([args[2] for args in asked])
        stretch = sides / (siamfc.context_side(box[2:]) * out_size / 127) - 1
        shifts_px = np.array([args[1] for args in asked]) - siamfc.box_center(box)  # of the picture
        shifts = shifts_px * out_size / sides[:, None]  # px of the patch
        for draws, bound in ((stretch, 0.1), (shifts[:, 0], shift_px), (shifts[:, 1], shift_px)):
            assert -bound * 1.001 <= draws.min() < -0.97 * bound and 0.97 * bound < draws.max() <= bound * 1.001
            assert np.std(draws) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        correlations = np.corrcoef([stretch, *shifts.T])
        assert np.abs(correlations - np.eye(3)).max() < 0.15
        counts = Counter(args[5] for args in asked)
        assert set(counts) == {cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA, cv2.INTER_NEAREST, cv2.INTER_LANCZOS4}
        assert min(counts.values()) > 80
        assert {args[3] for args in asked} == {out_size}


def test_shifted_patch_shows_the_object_off_its_middle():
    """In pictures, not in arguments: the mark moves up to the bound and a half px, and no farther."""
    box = np.array([250 - 31.25, 200 - 31.25, 63.5, 63.5])
    image = marked((250, 200))
    offsets = np.array([brightest(cut(image, box, 127, 4.0, index)) - 63 for index in range(80)])
    assert 3 <= np.abs(offsets).max(0).min() and np.abs(offsets).max() <= 4.5
    assert offsets.min() < -2.5 and offsets.max() > 2.5


def test_exemplar_and_instance_have_their_own_shifts(root):
    """`exemplar_shift: 0` keeps the exemplar in the middle, whatever the instance's; the published one is off it."""
    base = ["pairs.stretch=0", "pairs.random_interpolation=false"]
    samples = {}
    for shifts in itertools.product((0, 8), (0, 8)):
        overrides = [f"pairs.exemplar_shift={shifts[0]}", f"pairs.instance_shift={shifts[1]}"]
        samples[shifts] = tiny.make_dataset(tiny.configure(root, *base, *overrides))[4]
    for shifts, others in itertools.product(samples, samples):
        for axis, key in enumerate(("exemplar", "instance")):
            is_equal = torch.equal(samples[shifts][key], samples[others][key])
            assert is_equal == (shifts[axis] == others[axis])


def test_colors_stay_as_they_are_unless_asked():
    patch = tiny.textured(1, 127, 127)
    picture = vary(patch, 0)
    assert picture.shape == (3, 127, 127) and picture.dtype == torch.uint8 and picture.is_contiguous()
    assert np.array_equal(picture.permute(1, 2, 0).numpy(), patch)


def test_grey_blur_and_jitter():
    patch = tiny.textured(1, 127, 127)
    grey = vary(patch, 0, is_grey=True).numpy()
    assert (grey[0] == grey[1]).all() and (grey[0] == grey[2]).all()
    assert np.abs(grey[0].astype(float) - patch @ np.array([0.299, 0.587, 0.114])).max() <= 1.1

    def roughness(picture):
        return np.abs(np.diff(picture.astype(float), axis=-1)).mean()

    plain = roughness(patch.transpose(2, 0, 1))
    shares = [roughness(vary(patch, index, blur=1.0).numpy()) / plain for index in range(20)]
    assert 0.3 < min(shares) < 0.7 and 0.85 < max(shares) < 1  # sigma 2.5 px, and 0.5
    is_blurred = [not np.array_equal(vary(patch, i, blur=0.3).numpy()[0], patch[..., 0]) for i in range(200)]
    assert np.mean(is_blurred) == pytest.approx(0.3, abs=0.1)

    flat = np.full((9, 9, 3), 100, np.uint8)  # only brightness changes what is flat and grey
    levels = [int(vary(flat, i, color_jitter=0.2)[0, 0, 0]) for i in range(99)]
    assert 79 <= min(levels) < 84 and 116 < max(levels) <= 121

    def jittered(picture):
        return torch.stack([vary(picture, i, color_jitter=0.5) for i in range(300)]).double()

    flat[:, ::2] = 80  # two greys: brightness leaves their ratio, so what changes it is contrast
    pictures = jittered(flat[:, :8])
    dark, light = pictures[..., 0], pictures[..., 1]
    contrast = (light - dark).mean((1, 2)) / (light + dark).mean((1, 2)) * 9
    assert 0.4 < contrast.min() < 0.6 and 1.4 < contrast.max() < 1.65
    flat[:] = 120, 100, 90  # contrast takes some of a flat colour too: beyond half as much again it is saturation
    colors = jittered(flat)[..., 0, 0]
    color = (colors[:, 0] - colors[:, 2]) / (colors @ torch.tensor([0.299, 0.587, 0.114]).double()) * 104.84 / 30
    assert color.min() < 0.4 and 1.7 < color.max() < 2.4


@pytest.mark.parametrize("height, width", [(120, 160), (500, 90), (12, 700), (3, 3), (1, 1), (1, 50)])
def test_drawn_box_is_inside_the_picture(height, width):
    image = tiny.textured(0, height, width)
    boxes = np.array([script.draw_box(image, sample_rng(0, index)) for index in range(300)])
    assert boxes.dtype == np.float64 and (boxes == np.round(boxes)).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= width).all() and (boxes[:, 1] + boxes[:, 3] <= height).all()
    if min(height, width) >= 90:
        sides = np.sqrt(boxes[:, 2] * boxes[:, 3]) / min(height, width)
        assert 0.07 < sides.min() < 0.1 and 0.36 < sides.max() < 0.42
        aspects = boxes[:, 2] / boxes[:, 3]
        assert aspects.min() < 0.6 and aspects.max() > 1.7


def test_drawn_box_prefers_contrast():
    image = np.full((200, 300, 3), 128, np.uint8)
    image[:, 150:] = tiny.textured(0, 200, 150)
    boxes = np.array([script.draw_box(image, sample_rng(0, index)) for index in range(200)])
    assert (boxes[:, 0] + boxes[:, 2] > 150).mean() > 0.85


# ---------------------------------------------------------------------------------------------------------------------
# samples


VARIED = [
    "pairs.stretch=0.05", "pairs.grey=0.3", "pairs.color_jitter=0.2", "pairs.blur=0.3", "pairs.random_boxes=0.3",
]  # fmt: skip


def varied_dataset(root, *overrides):
    return tiny.make_dataset(tiny.configure(root, *VARIED, *overrides))


def load_all(dataset, num_samples, num_workers):
    """The samples that a data loader, set up as in train, hands over."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, sampler=range(num_samples), num_workers=num_workers,
        collate_fn=script.collate, worker_init_fn=limit_threads, generator=torch.Generator(),
    )  # fmt: skip
    return list(loader)


def test_sample_is_a_function_of_seed_and_index(root):
    dataset, other = varied_dataset(root), varied_dataset(root)
    torch.manual_seed(5)  # torch's own stream, and what was read before, have no say
    np.random.seed(5)
    assert not differences(dataset[7], [other[index] for index in (9, 7)][1])
    assert dataset[7]["exemplar"].shape == (3, 127, 127) and dataset[7]["instance"].shape == (3, 239, 239)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    dataset[3]
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    other_seed = varied_dataset(root, "seed=1")
    assert [dataset[index]["name"] for index in range(9)] != [other_seed[index]["name"] for index in range(9)]
    assert differences(dataset[0]["exemplar"], dataset[len(dataset.sequences)]["exemplar"])


def test_workers_do_not_change_samples(root, monkeypatch):
    """With generators of their own, workers give other pairs than the main process, and each the same."""
    batches = load_all(varied_dataset(root), 12, 0)
    assert not differences(batches, load_all(varied_dataset(root), 12, 2))
    shared = np.random.default_rng(0)
    monkeypatch.setattr(script.run, "sample_rng", lambda seed, sample_index: shared)
    alone = load_all(varied_dataset(root), 12, 0)
    shared = np.random.default_rng(0)
    assert differences(alone, load_all(varied_dataset(root), 12, 2))


def test_each_epoch_visits_every_sequence(root):
    dataset = varied_dataset(root, "pairs.random_boxes=0")
    videos = [[Path(part).parent.name for part in dataset[index]["name"].split(" with ")] for index in range(12)]
    assert all(first == other for first, other in videos)
    epochs = [[videos[index][0] for index in range(start, start + 3)] for start in range(0, 12, 3)]
    assert all(sorted(epoch) == ["train_001", "train_002", "train_003"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_boxes_are_those_of_the_drawn_frames(root, monkeypatch):
    """The exemplar is cut around the first frame's box, the instance around the second's, each from its own file."""
    cuts = []
    real = script.cut_patch
    monkeypatch.setattr(script, "cut_patch", lambda *args: cuts.append(args) or real(*args))
    dataset = tiny.make_dataset(tiny.configure(root))
    by_name = {sequence.name: sequence for sequence in dataset.sequences}
    for index in range(6):
        cuts.clear()
        names = dataset[index]["name"].split(" with ")
        assert names[0] != names[1]
        for name, (image, box, out_size, shift, *_), size in zip(names, cuts, (127, 239), strict=True):
            expected = by_name[Path(name).parent.name].boxes_xywh[int(Path(name).stem) - 1]
            assert np.array_equal(image, read_image(name)) and np.array_equal(box, expected)
            assert (out_size, shift) == (size, 4.0)


def test_share_of_random_boxes_and_of_grey_pairs(root):
    overrides = ["pairs.random_boxes=0.4", "pairs.grey=0.25", "pairs.exemplar_shift=0"]
    dataset = tiny.make_dataset(tiny.configure(root, *overrides))
    is_random, is_grey = [], []
    for index in range(150):
        sample = dataset[index]
        first, other = sample["name"].split(" with ")
        is_random.append(first == other)
        grey = [bool((sample[key] == sample[key][:1]).all()) for key in ("exemplar", "instance")]
        assert grey[0] == grey[1]
        is_grey.append(grey[0])
    assert np.mean(is_random) == pytest.approx(0.4, abs=0.12) and np.mean(is_grey) == pytest.approx(0.25, abs=0.1)


def picture_keys(root):
    """The keys of data=pictures, for what write_pictures writes into a folder."""
    config = tiny.compose_config("data=pictures", "data.format=label_map", f"data.root={tiny.write_pictures(root)}")
    return config["data"]


def test_key_that_a_layout_of_pictures_does_not_take_is_named(tmp_path):
    keys = picture_keys(tmp_path / "pictures")
    with pytest.raises(ValueError, match="^unknown key data.vessel; must be among data.image_dir, .*data.on_bad$"):
        script.list_data(keys | {"vessel": "full"})
    given = {"image_dir": "images", "label_dir": "labels", "label_ending": "", "ignore_ids": []}  # what null stands for
    lists = [[sequence.name for part in script.list_data(own) for sequence in part] for own in (keys, keys | given)]
    assert lists[0] == lists[1] and lists[0]


def test_turns_of_parts(root, tmp_path):
    data = tiny.configure(root)["data"]
    pictures = picture_keys(tmp_path / "pictures") | {"ignore_ids": [2], "val_fraction": 0.0}
    parts = {"videos": data, "pictures": pictures}
    train, val = script.list_data({"parts": parts, "turns": {"videos": 2, "pictures": 3}})
    counts = Counter(sequence.name for sequence in train)
    videos = {f"videos/train_00{number}": 2 for number in (1, 2, 3)}
    assert counts == videos | {f"pictures/{number}.1": 3 for number in (0, 1, 2)}  # names that no other part has
    assert [sequence.name for sequence in val] == ["videos/val_001", "videos/val_002"]
    dataset = script.SiamesePairs(*script.keep_usable(train, tiny.pair_settings(), "train"), 0, tiny.pair_settings())
    visits = Counter(Path(dataset[index]["name"].split(" with ")[0]).parent.name for index in range(len(train)))
    assert visits == {"train_001": 2, "train_002": 2, "train_003": 2, "images": 9}
    train, val = script.list_data({"parts": parts, "turns": {"videos": 0, "pictures": 1}})
    assert [sequence.name for sequence in train] == [f"pictures/{number}.1" for number in (0, 1, 2)] and len(val) == 2


# ---------------------------------------------------------------------------------------------------------------------
# the loss


def published_loss(response):
    """The paper's balanced logistic loss, a cell at a time, and its derivative: in float64."""
    gradient = np.zeros_like(response)
    total = 0.0
    for b, y, x in np.ndindex(response.shape):
        is_near = abs(y - 7) + abs(x - 7) <= 2  # 16 px, 8 px from one cell to the next
        sign, weight = (1, 0.5 / 13) if is_near else (-1, 0.5 / (225 - 13))
        total += weight * np.logaddexp(0, -sign * response[b, y, x])
        gradient[b, y, x] = -sign * weight / (1 + np.exp(sign * response[b, y, x])) / len(response)
    return total / len(response), gradient


def test_loss_is_the_published_one_with_its_gradient():
    response = np.random.default_rng(0).normal(size=(3, 15, 15)) * 3 - 1
    expected, gradient = published_loss(response)
    logits = torch.from_numpy(response[:, None]).float().requires_grad_()
    loss = script.balanced_loss(logits, LABELS, WEIGHTS)
    loss.backward()
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(logits.grad[:, 0].numpy(), gradient, atol=1e-8, rtol=1e-4)
    assert script.balanced_loss(torch.zeros(2, 1, 15, 15), LABELS, WEIGHTS).item() == pytest.approx(math.log(2))
    flat = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], LABELS.expand(3, 15, 15))
    assert abs(flat.item() - expected) > 0.05  # without the balance it is another loss


def test_loss_is_fp32_and_finite():
    """In the context of bf16, and, as in the loop, outside it."""
    response = (torch.randn(2, 1, 15, 15, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    expected, _ = published_loss(response[:, 0].double().numpy())
    losses = [script.balanced_loss(response, LABELS, WEIGHTS)]
    with torch.autocast("cpu", torch.bfloat16):
        losses.append(script.balanced_loss(response, LABELS, WEIGHTS))
    for loss in losses:
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-6)
    assert script.balanced_loss(torch.full((1, 1, 15, 15), 1e4), LABELS, WEIGHTS).item() == pytest.approx(0.5e4)


def test_hit_rate():
    response = torch.zeros(4, 1, 15, 15)
    for number, (row, column) in enumerate([(7, 7), (9, 7), (9, 8), (0, 14)]):  # 0, 2, 3 and 14 cells off
        response[number, 0, row, column] = 1
    assert script.hit_rate(response, LABELS).item() == 0.5
    assert script.hit_rate(-response[:1], LABELS).item() == 0  # the first of equals is in the corner


@pytest.mark.parametrize(
    "steps, hold_steps, num_rates", [(50, 1, 50), (58300, 1166, 50), (299250, 5985, 50), (7, 3, 3)]
)
def test_rates_are_a_logspace_from_first_to_last(steps, hold_steps, num_rates):
    """The published code, with 1/50 in place of 1/49 as its exponent, ends at 1.15e-5."""
    optim = optim_settings(hold_steps=hold_steps)
    rates = np.logspace(-2, -5, num_rates)
    for number in range(num_rates):
        for step in (number * hold_steps, min(steps, (number + 1) * hold_steps) - 1):
            assert script.exponential_lr(step, steps, optim) == pytest.approx(rates[number], rel=1e-9)
    assert script.exponential_lr(0, steps, optim) == 1e-2
    assert script.exponential_lr(steps - 1, steps, optim) == pytest.approx(1e-5, rel=1e-12)
    published = 1e-2 * (1e-5 / 1e-2) ** ((num_rates - 1) / num_rates)
    assert published > 1.1 * script.exponential_lr(steps - 1, steps, optim)


def test_rate_of_very_short_runs():
    optim = optim_settings()
    assert script.exponential_lr(0, 1, optim) == optim.lr
    assert [script.exponential_lr(step, 2, optim) for step in (0, 1)] == pytest.approx([optim.lr, optim.min_lr])
    constant = optim_settings(min_lr=1e-2)
    assert {script.exponential_lr(step, 9, constant) for step in range(9)} == {1e-2}


# ---------------------------------------------------------------------------------------------------------------------
# optimizer and weights


def test_weight_decay_groups():
    """The published code decays biases and batch norm, the paper's does not, and has a score bias."""
    model = SiamFC(score_bias=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def decays(**changes):
        groups = script.build_optimizer(model, optim_settings(**changes)).param_groups
        assert all(group["momentum"] == 0.9 and not group["nesterov"] for group in groups)
        pairs = [(names[id(weight)], group["weight_decay"]) for group in groups for weight in group["params"]]
        assert sorted(name for name, _ in pairs) == sorted(names.values())
        return dict(pairs)

    assert set(decays(decay_all=True).values()) == {5e-4}
    convolutions = {f"backbone.conv{number}.0.weight" for number in range(1, 6)}
    assert decays(decay_all=False) == {name: 5e-4 if name in convolutions else 0.0 for name in names.values()}
    assert set(decays(weight_decay=0, decay_all=False).values()) == {0}


@pytest.mark.parametrize("score_bias", [False, True])
def test_every_parameter_moves_and_the_score_bias_is_one(score_bias, root, tmp_path, quick, monkeypatch):
    """Without weight decay, which would move a parameter that gets no gradient."""
    tiny.script_evaluation(monkeypatch)
    config = tiny.configure(root, f"model.score_bias={score_bias}", "optim.weight_decay=0", "train.steps=2")
    trained = tiny.train_in(tmp_path / "run", config)["model"]
    script.run.seed_everything(config["seed"])  # the weights that the run started from
    before = dict(script.SiamFC(score_bias).named_parameters())
    assert ("score_bias" in before) == score_bias
    assert not [name for name, weight in before.items() if torch.equal(weight, trained[name])]
    assert not torch.equal(trained["backbone.conv1.1.running_mean"], torch.zeros(16))


def build(**changes):
    keys = {"name": "siamfc", "score_bias": False, "checkpoint": None} | changes
    model_settings = script.read_settings(script.ModelSettings, keys, "model")
    return script.build_model(model_settings, is_resumed=False)


def test_training_starts_from_a_checkpoint(tmp_path, capsys):
    """Published ones are weights alone, without score bias."""
    published = SiamFC(score_bias=False).state_dict()
    weights = {key: weight for key, weight in published.items() if "num_batches" not in key}
    torch.save(weights, tmp_path / "siamfc_alexnet_e50.pth")
    for score_bias in (False, True):
        built = build(checkpoint=str(tmp_path / "siamfc_alexnet_e50.pth"), score_bias=score_bias).state_dict()
        assert not differences({key: built[key] for key in weights}, weights)
    assert built["score_bias"].item() == 0
    assert "score_bias: not in" in capsys.readouterr().out
    assert differences(dict(build().state_dict()), dict(built))
    torch.save({"model": SiamFC(score_bias=True).state_dict()}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="model.score_bias is false; must be true: model.checkpoint .*best.pt has one"):
        build(checkpoint=str(tmp_path / "best.pt"))
    with pytest.raises(FileNotFoundError, match="gone.pt does not exist"):
        build(checkpoint=str(tmp_path / "gone.pt"))
    with pytest.raises(ValueError, match="model.name is siamrpn; must be siamfc"):
        build(name="siamrpn")


def test_no_steps_evaluate_a_checkpoint(finished, root, tmp_path, monkeypatch, capfd):
    """Where there is no training sequence either."""
    monkeypatch.setattr(script, "plot_curves", lambda rows, path: None)
    best = torch.load(finished[0] / "best.pt", weights_only=True)["metrics"]
    arguments = ["train.steps=0", f"model.checkpoint={finished[0] / 'best.pt'}", "data.train_folder=null"]
    arguments += ["data.val_fraction=1", "train.eval_frames=2"]
    status, output = tiny.run_main(monkeypatch, capfd, tmp_path / "run", *tiny.tiny_overrides(root), *arguments)
    assert status == 0, output
    metrics = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]
    assert metrics["start"] == metrics["best"] == metrics["last"] and metrics["last"]["step"] == 0
    for name in ("ao", "sr_50", "success_auc", "loss", "still_ao"):
        assert metrics["last"][f"val/{name}"] == pytest.approx(best[f"val/{name}"], rel=1e-3, abs=1e-3), name


def test_gradients_are_clipped_to_a_norm(root, tmp_path, quick, monkeypatch):
    tiny.script_evaluation(monkeypatch)
    buffers = {}
    for clip_norm in ("null", "0.01", "1e6"):
        overrides = ["train.steps=1", "optim.weight_decay=0", f"train.clip_norm={clip_norm}"]
        last = tiny.train_in(tmp_path / clip_norm, tiny.configure(root, *overrides))
        states = last["optimizer"]["state"].values()  # after one step SGD's momentum is the gradient
        buffers[clip_norm] = torch.cat([state["momentum_buffer"].flatten() for state in states])
        logged = last["metrics"][1]["train/grad_norm"]  # before it is clipped
        assert logged == pytest.approx(buffers["null"].norm().item(), rel=1e-4)
    assert buffers["null"].norm() > 0.05 and torch.equal(buffers["null"], buffers["1e6"])
    torch.testing.assert_close(buffers["0.01"], buffers["null"] * 0.01 / buffers["null"].norm(), rtol=1e-3, atol=1e-7)


def test_tracker_in_parity_validates_in_fp32(root, tmp_path, quick):
    config = tiny.configure(root, "precision=bf16", "tracker.mode=parity", "train.steps=1")
    assert tiny.train_in(tmp_path / "run", config)["step"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# what counts as better


def test_what_selects_the_best_is_a_setting(root, tmp_path, quick, monkeypatch):
    scores = iter([(0.1, 0.9), (0.2, 0.8), (0.3, 0.95)])

    def evaluate(*args):
        ao, success_auc = next(scores)
        metrics = {"val/ao": ao, "val/sr_50": 0.0, "val/success_auc": success_auc, "val/num_frames": 1}
        return metrics | {f"val/still_{name}": 0.0 for name in script.REPORTED}

    monkeypatch.setattr(script, "evaluate_tracking", evaluate)
    overrides = ["train.steps=1", "train.eval_every=1", "train.select_by=val/success_auc"]
    (tmp_path / "run").mkdir()
    config = tiny.configure(root, *overrides)
    assert script.train(config, tmp_path / "run", None) == 0.9
    assert torch.load(tmp_path / "run" / "best.pt", weights_only=True)["metrics"]["step"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# validation


class TruthTracker:
    """Stands in for the tracker: it follows groundtruth, moved by (dx, dy) px."""

    moved_xy = (0.0, 0.0)
    sequences = ()

    def __init__(self, model, settings, precision):
        self.made_with = (settings, precision)

    def init(self, image, boxes_xywh):
        [self.sequence] = [
            sequence
            for sequence in self.sequences
            if np.array_equal(sequence.boxes_xywh[int(sequence.visible.argmax())], boxes_xywh[0])
        ]
        self.index = int(self.sequence.visible.argmax())

    def update(self, image):
        self.index += 1
        box = self.sequence.boxes_xywh[self.index] + [*self.moved_xy, 0, 0]
        return box[None], np.ones(1), np.zeros(1, bool)


@pytest.fixture
def truth(root, monkeypatch):
    """The validation sequences, one of which starts without a visible box, and a tracker that knows them."""
    _, sequences = script.list_data(tiny.configure(root)["data"])
    late = sequences[1]
    for array in (late.visible, late.cover):
        array[:2] = 0
    monkeypatch.setattr(TruthTracker, "sequences", tuple(sequences))
    monkeypatch.setattr(script, "SiamFCTracker", TruthTracker)
    return sequences


def run_evaluation(sequences, num_frames=None):
    return script.evaluate_tracking(None, sequences, TrackerSettings(), "fp32", num_frames)


def slow_iou(a, b):
    wh = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    inter = max(0.0, wh[0]) * max(0.0, wh[1])
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def test_perfect_tracking_scores_one(truth):
    metrics = run_evaluation(truth)
    assert metrics["val/ao"] == pytest.approx(1.0) and metrics["val/sr_50"] == 1.0
    assert metrics["val/success_auc"] == pytest.approx(20 / 21)
    assert metrics["val/num_frames"] == 4 + 2  # those of 5 frames after the first, and from the third on
    assert metrics["val/tracked_per_s"] > 0


@pytest.mark.parametrize("num_frames", [None, 3])
def test_scores_equal_a_slow_loop(truth, num_frames, monkeypatch):
    """Of a tracker that is off by (6, -3) px, and of a box that stays; all frames weigh the same in ao."""
    monkeypatch.setattr(TruthTracker, "moved_xy", (6.0, -3.0))
    metrics = run_evaluation(truth, num_frames)
    expected, curves = ({"val/": [], "val/still_": []} for _ in range(2))
    for sequence, first in zip(truth, (0, 2), strict=True):
        boxes = sequence.boxes_xywh[first:][:num_frames]
        for prefix, tracked_boxes in (("val/", boxes + [6, -3, 0, 0]), ("val/still_", boxes[:1].repeat(len(boxes), 0))):
            overlaps = [slow_iou(box, other) for box, other in zip(tracked_boxes[1:], boxes[1:], strict=True)]
            expected[prefix] += overlaps
            thresholds = np.linspace(0, 1, 21)
            curves[prefix].append(np.mean([[iou > t for t in thresholds] for iou in [1 - 1e-9, *overlaps]]))
    for prefix, overlaps in expected.items():
        assert metrics[f"{prefix}ao"] == pytest.approx(np.mean(overlaps)), prefix
        assert metrics[f"{prefix}sr_50"] == pytest.approx(np.mean(np.array(overlaps) > 0.5)), prefix
        assert metrics[f"{prefix}success_auc"] == pytest.approx(np.mean(curves[prefix])), prefix
        assert metrics["val/num_frames"] == len(overlaps) == (6 if num_frames is None else 4)
    assert 0.2 < metrics["val/ao"] < 0.95 and metrics["val/ao"] != metrics["val/still_ao"]


def test_hidden_frames_do_not_count(truth):
    truth[0].cover[2] = 0
    truth[0].boxes_xywh[3] = NAN
    truth[0].visible[2:4] = False
    truth[0].cover[3] = 0
    assert run_evaluation(truth[:1])["val/num_frames"] == 2


def test_frame_that_cannot_be_read_is_named_with_its_sequence(truth, tmp_path):
    broken = tmp_path / "00000002.jpg"
    broken.write_bytes(b"no picture")
    sequence = script.Sequence(**(truth[0].__dict__ | {"frame_dir": tmp_path}))
    for name in ("00000001.jpg", "00000003.jpg"):
        (tmp_path / name).write_bytes(truth[0].frame_path(0).read_bytes())
    with pytest.raises(ValueError, match="sequence val_001: .*00000002.jpg"):
        run_evaluation([sequence])
    (tmp_path / "00000001.jpg").unlink()  # the first, too
    with pytest.raises(ValueError, match="sequence val_001: .*00000001.jpg"):
        run_evaluation([sequence])


def test_first_box_outside_its_frame_names_the_sequence(root):
    _, [sequence, _] = script.list_data(tiny.configure(root)["data"])
    sequence.boxes_xywh[0] = [500, 500, 20, 20]
    with pytest.raises(ValueError, match="sequence val_001: box 1 of 1 is .* outside the first frame"):
        script.evaluate_tracking(tiny.small_model(), [sequence], TrackerSettings(), "fp32", None)


def test_validation_leaves_the_model_and_the_streams_alone(root):
    """Training goes on as if there had been none: batch norm's statistics, gradients, and random numbers."""
    config = tiny.configure(root)
    model = SiamFC(score_bias=False)
    model.backbone = tiny.SmallNormBackbone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    _, sequences = script.list_data(config["data"])
    first = script.evaluate_tracking(model.train(), sequences, TrackerSettings(), "fp32", 3)
    pairs = tiny.make_dataset(config)
    keys = config["train"] | {"eval_pairs": 3, "batch_size": 2, "picture_pairs": 0}
    settings = script.read_settings(script.TrainSettings, keys, "train")
    arguments = (pairs, settings, "fp32", None)
    metrics = script.evaluate_pairs(model.train(), *arguments)
    assert metrics == script.evaluate_pairs(model.train(), *arguments)  # the same pairs each time
    assert not differences(dict(model.state_dict()), before) and torch.equal(torch.get_rng_state(), stream)
    assert all(parameter.grad is None for parameter in model.parameters())
    second = script.evaluate_tracking(model, sequences, TrackerSettings(), "fp32", 3)
    assert tiny.without_timing(first) == tiny.without_timing(second)
    # three pairs in batches of two weigh the same
    with torch.no_grad():
        batches = [script.collate([pairs[index]]) for index in range(3)]
        responses = [model.eval()(batch["exemplars"].float(), batch["instances"].float()) for batch in batches]
    with np.errstate(over="ignore"):
        losses = [published_loss(response[:, 0].double().numpy())[0] for response in responses]
    assert metrics["val/loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    hits = [script.hit_rate(response, LABELS).item() for response in responses]
    assert metrics["val/hit_rate"] == pytest.approx(np.mean(hits))


def test_drawn_pair_marks_the_highest_cell():
    exemplar, instance = torch.zeros(3, 127, 127, dtype=torch.uint8), torch.zeros(3, 239, 239, dtype=torch.uint8)
    for row, column in ((7, 7), (0, 14), (12, 3)):
        response = torch.zeros(15, 15)
        response[row, column] = 1
        picture = script.draw_pair(exemplar, instance, response)
        assert picture.shape == (243, 635, 3)
        is_mark = (picture[:, 137:386] == [255, 0, 0]).all(2)
        y, x = np.argwhere(is_mark).mean(0)
        expected = 119 + 8 * np.array([row - 7, column - 7])  # px of the instance, whose frame is 2 and 5 px wide
        assert np.abs([y - 2, x - 5] - expected).max() < 1
        heat = picture[2:241, 386 + 5 : 386 + 244].astype(int)
        hot = np.argwhere(heat[..., 0] - heat[..., 2] > 100)  # red
        assert np.abs(hot.mean(0) - (np.array([row, column]) + 0.5) * 239 / 15).max() < 1


def test_validation_sequences_are_chosen_after_what_cannot_be_tracked(root, tmp_path, quick):
    """Pictures, which have one frame, do not use up `eval_sequences`; their pairs count in val/loss."""
    pictures = picture_keys(tmp_path / "pictures") | {"ignore_ids": [2], "val_fraction": 0.5}
    config = tiny.configure(root, "train.steps=1", "train.eval_sequences=1")
    config["data"] = {"parts": {"a": pictures, "b": config["data"]}, "turns": {"a": 1, "b": 1}}
    last = tiny.train_in(tmp_path / "run", config)
    assert last["metrics"][0]["val/num_frames"] == 2 and last["metrics"][0]["val/loss"] > 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"] == {"train_sequences": 4, "val_sequences": 1}


def test_a_sequence_of_a_first_box_alone_measures_nothing(root, tmp_path):
    """It counted as a perfect one in val/success_auc."""
    shutil.copytree(root, tmp_path / "data")
    folder = tmp_path / "data" / "val" / "val_001"
    for name in ("groundtruth.txt", "cover.label", "absence.label"):
        (folder / name).write_text((folder / name).read_text().splitlines()[0] + "\n")
    settings = script.read_settings(script.Config, tiny.configure(tmp_path / "data"))
    _, _, val_sequences, _ = script.list_pairs(settings, None)
    assert [sequence.name for sequence in val_sequences] == ["val_002"]


def test_no_validation_pairs_is_a_setting(root, tmp_path, quick):
    last = tiny.train_in(tmp_path / "run", tiny.configure(root, "train.steps=1", "train.eval_pairs=0"))
    assert "val/ao" in last["metrics"][0] and "val/loss" not in last["metrics"][0]
    assert not list((tmp_path / "run" / "samples").glob("*/*"))


# ---------------------------------------------------------------------------------------------------------------------
# other datasets, and presets


def test_pictures_alone_train_beside_videos_that_validate(root, tmp_path, quick):
    """data=pictures: exemplar and instance are cut from one picture; a part with 0 turns only validates."""
    pictures = picture_keys(tmp_path / "pictures") | {"ignore_ids": [2], "val_fraction": 0.0}
    config = tiny.configure(root, "train.steps=2")
    config["data"] = {"parts": {"pictures": pictures, "videos": config["data"]}, "turns": {"pictures": 1, "videos": 0}}
    last = tiny.train_in(tmp_path / "run", config)
    assert last["step"] == 2 and last["metrics"][0]["val/num_frames"] == 4
    dataset = tiny.make_dataset(config)
    names = [dataset[index]["name"].split(" with ") for index in range(6)]
    assert all(first == other and "pictures" in first for first, other in names)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_composes(name):
    config = tiny.compose_config(f"experiment={name}", "data_root=/nowhere")
    script.read_settings(script.Config, config)
    assert "override /model:" in (EXPERIMENTS / f"{name}.yaml").read_text()
    optim = script.OptimSettings(**config["optim"])
    steps = config["train"]["steps"]
    assert script.exponential_lr(steps - 1, steps, optim) == pytest.approx(optim.min_lr)
    if name in ("siamfc_got10k", "siamfc_paper"):  # 50 epochs, a rate each
        assert len({script.exponential_lr(step, steps, optim) for step in range(0, steps, optim.hold_steps)}) == 50


def test_presets_say_what_their_sources_do():
    assert set(PRESETS) >= {"siamfc_got10k", "siamfc_paper", "siamfc_bundled"}
    published, paper = (tiny.compose_config(f"experiment={name}") for name in ("siamfc_got10k", "siamfc_paper"))
    assert published["train"]["steps"] * published["train"]["batch_size"] == 50 * 9328
    assert paper["train"]["steps"] * paper["train"]["batch_size"] == 50 * 47880
    assert [config["model"]["score_bias"] for config in (published, paper)] == [False, True]
    assert [config["optim"]["decay_all"] for config in (published, paper)] == [True, False]
    assert [config["pairs"]["exemplar_shift"] for config in (published, paper)] == [4.0, 0.0]
    assert [config["pairs"]["grey"] for config in (published, paper)] == [0.0, 0.25]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    return tiny.write_data_root(tmp_path_factory.mktemp("all") / "data")


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_two_steps(name, data_folder, tmp_path, quick):
    """On tiny videos in the layout that the preset reads, with a small network."""
    overrides = [f"experiment={name}", f"data_root={data_folder}", "device=cpu", "num_workers=0"]
    overrides += ["train.steps=2", "train.batch_size=2", "train.eval_pairs=2", "train.eval_frames=3"]
    if name == "siamfc_bundled":  # its moving shapes are many, and below the repository
        for part in ("data.parts.moving_shapes", "data.parts.wild_shapes"):
            overrides += [f"{part}.generate=null", f"{part}.root={data_folder / 'GOT-10k'}"]
    last = tiny.train_in(tmp_path / "run", tiny.compose_config(*overrides))
    assert last["step"] == 2 and [row["step"] for row in last["metrics"] if "val/ao" in row] == [0, 2]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    expected = {
        "siamfc_got10k": {"train_sequences": 3, "val_sequences": 2},
        "siamfc_paper": {"train_sequences": 2, "val_sequences": 1},
        "siamfc_bundled": {"train_sequences": 1 + 3 + 3 + 3 + 3 + 1 + 1, "val_sequences": 2 + 2},
    }[name]
    assert record["data"] == expected


# ---------------------------------------------------------------------------------------------------------------------
# settings


def test_radius_that_labels_all_cells_alike_is_named(root, tmp_path, quick):
    with pytest.raises(ValueError, match="train.r_pos is 500.0; gives all 15 x 15 cells"):
        tiny.train_in(tmp_path / "run", tiny.configure(root, "train.r_pos=500.0"))
    assert not (tmp_path / "run" / "run.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# what a user sees when something is wrong


def fails_with(monkeypatch, capfd, run_dir, *arguments):
    status, output = tiny.run_main(monkeypatch, capfd, run_dir, *arguments)
    assert status == 1 and "Traceback" not in output and "error: " in output, output
    return output[output.rindex("error: ") :]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["data.root=/nowhere"], "data.root /nowhere is not a folder"),
        (["data.train_folder=null"], "no training sequence with a usable box: see data.* and pairs.*"),
        (["pairs.min_side=400"], "no training sequence with a usable box"),
        (["data.val_folder=null", "data.val_fraction=0"], "no validation sequence with a box: see data.val_fraction"),
        (["data=pictures", "data.format=label_map", "data.root={pictures}"], "pictures alone cannot"),
        (["resume=/nowhere"], "resume is /nowhere, which does not exist"),
        (["model.checkpoint=/nowhere.pt"], "checkpoint /nowhere.pt does not exist"),
        (["device=tpu"], "device is tpu; must be auto, cpu"),
    ],
)
def test_command_that_makes_no_sense(arguments, message, root, tmp_path, monkeypatch, capfd, quick):
    pictures = tiny.write_pictures(tmp_path / "pictures")
    arguments = [argument.replace("{pictures}", str(pictures)) for argument in arguments]
    assert message in fails_with(monkeypatch, capfd, tmp_path / "run", *tiny.tiny_overrides(root), *arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"turns": {"a": 1}}, "data.turns names a; must name a, b"),
        ({"turns": {"a": 1, "b": 1, "c": 1}}, "data.turns names a, b, c; must name a, b"),
        ({"turns": {"a": 1, "b": -1}}, "data.turns.b is -1; must be 0 or more"),
        ({"turns": {"a": 1, "b": 1.5}}, "data.turns.b is 1.5; must be a whole number"),
        ({"rooot": "x"}, "unknown key data.rooot; must be among data.parts, data.turns"),
        ({"turns": None}, "the config lacks data.turns"),
        ({"turns": 3}, "data.turns is 3; must be keys and values"),
        ({"parts": {"a": 3, "b": 3}}, "data.parts.a is 3; must be keys and values"),
    ],
)
def test_parts_that_make_no_sense(change, message, root):
    part = tiny.configure(root)["data"]
    data = {"parts": {"a": part, "b": part}, "turns": {"a": 1, "b": 1}} | change
    with pytest.raises(ValueError, match=f"^{message}"):
        script.list_data({key: value for key, value in data.items() if value is not None})


def test_fault_in_a_part_names_it(root, tmp_path):
    part = tiny.configure(root)["data"]
    turns = {"a": 1, "b": 1}
    for change, kind, message in [
        ({"rooot": 1}, ValueError, "data.parts.b: unknown key data.rooot"),
        ({"root": str(tmp_path / "gone")}, FileNotFoundError, "data.parts.b: data.root .*gone is not a folder"),
        ({"format": "got1k"}, ValueError, "data.parts.b: data.format is 'got1k'"),
    ]:
        with pytest.raises(kind, match=f"^{message}"):
            script.list_data({"parts": {"a": part, "b": part | change}, "turns": turns})
    copy = tiny.write_got10k(tmp_path / "copy", 1, 1, 2)
    (copy / "train" / "list.txt").write_bytes("träin".encode("latin-1"))  # an error that cannot be made anew
    with pytest.raises(ValueError, match="^data.parts.b: .*UTF-8"):
        script.list_data({"parts": {"a": part, "b": part | {"root": str(copy)}}, "turns": turns})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_frame_that_cannot_be_read_is_named_in_one_line(num_workers, tmp_path, monkeypatch, capfd, quick):
    broken = tiny.write_got10k(tmp_path / "data", 1, 1, 3)
    for number in (1, 2, 3):
        (broken / "train" / "train_001" / f"{number:08d}.jpg").write_bytes(b"no picture")
    arguments = [*tiny.tiny_overrides(broken), f"num_workers={num_workers}"]
    message = fails_with(monkeypatch, capfd, tmp_path / "run", *arguments)
    assert "train_001/0000000" in message and len(message.strip().splitlines()) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_validation_frame_that_cannot_be_read_is_named(number, tmp_path, monkeypatch, capfd, quick):
    """Also the first, which tells the frame's size where no file does."""
    root = tiny.write_got10k(tmp_path / "data", 1, 1, 3)
    (root / "val" / "val_001" / f"{number:08d}.jpg").write_bytes(b"no picture")
    if number == 1:
        (root / "val" / "val_001" / "meta_info.ini").unlink()
    arguments = [*tiny.tiny_overrides(root), "train.eval_pairs=0"]
    message = fails_with(monkeypatch, capfd, tmp_path / "run", *arguments)
    assert "sequence val_001: " in message and f"{number:08d}.jpg" in message


def test_check_draws_pairs_and_stops(root, tmp_path, monkeypatch, capfd, quick):
    arguments = [*tiny.tiny_overrides(root), "check=true"]
    status, output = tiny.run_main(monkeypatch, capfd, tmp_path / "run", *arguments, "train.picture_pairs=3")
    assert status == 0 and "train: 3 sequences, 15 frames; pairs are cut from 15 frames of 3 sequences" in output
    assert "val: 2 sequences" in output
    picture = read_image(tmp_path / "run" / "pairs.png")
    assert picture.shape == (3 * 243, 635, 3)
    assert not (tmp_path / "run" / "run.json").exists() and not (tmp_path / "run" / "last.pt").exists()
    dataset = tiny.make_dataset(tiny.configure(root))
    assert np.array_equal(picture[2:129, 5:132], dataset[0]["exemplar"].permute(1, 2, 0).numpy())
    marks = np.argwhere((picture[:243, 137:386] == [255, 0, 0]).all(2))
    assert np.abs(marks.mean(0) - [121, 124]).max() < 2  # the middle of the instance
    status, output = tiny.run_main(monkeypatch, capfd, tmp_path / "none", *arguments, "pairs.min_side=400")
    assert status == 0 and "pairs are cut from 0 frames of 0 sequences" in output and "train_002" in output


def test_a_dataset_without_boxes_is_named(root, tmp_path, quick):
    config = tiny.compose_config("data=pictures", "data.format=camvid", f"data.root={tmp_path}", "device=cpu")
    with pytest.raises(ValueError, match="data.format is 'camvid'; must be one of got10k, .*, coco, sa1b, .*voc$"):
        tiny.train_in(tmp_path / "run", config)
