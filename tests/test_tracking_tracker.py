"""The tracker: parity with a plain form of the published one, fast mode beside it, limits, lost objects, bad boxes."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_tracking import small_model, textured
from torch import nn

from benchmarks.plain_siamfc import PlainTracker
from utils.images import read_image, write_image
from utils.settings import read_settings
from utils.tracking import tracker as siamfc_tracker
from utils.tracking.frames import FrameSource
from utils.tracking.sequences import read_boxes
from utils.tracking.siamfc import SiamFC, load_siamfc, mean_color
from utils.tracking.tracker import SiamFCTracker, TrackerSettings, fold_batch_norm, track_frames, vertex_offset

DEFAULT, PARITY = TrackerSettings(), TrackerSettings(mode="parity")
SUBPIXEL = TrackerSettings(subpixel_peak=True)
needs_numpy_2 = pytest.mark.skipif(np.__version__ < "2", reason="NumPy 1 gives the plain tracker other float types")


# ---------------------------------------------------------------------------------------------------------------------
# the published tracker, written plainly from its description in benchmarks/plain_siamfc.py


def suite():
    """Yield (name, frames, 0-based box): targets at the border, outside, tiny, huge; grey frames; sizes that change."""
    rng = np.random.default_rng(0)
    for name, box, num_frames, (height, width) in [
        ("inside", (60, 40, 31, 22), 70, (120, 160)),
        ("fractions", (60.37, 40.81, 30.6, 21.9), 70, (120, 160)),
        ("top left corner", (-9, -12, 30, 25), 60, (120, 160)),
        ("bottom right corner", (150, 112, 25, 40), 60, (120, 160)),
        ("leaves", (140, 100, 18, 18), 60, (120, 160)),
        ("tiny", (70, 50, 2, 3), 50, (120, 160)),
        ("part of a pixel", (70.2, 50.6, 0.8, 0.9), 20, (120, 160)),
        ("huge", (-40, -30, 260, 170), 40, (120, 160)),
        ("long", (10, 50, 150, 6), 40, (120, 160)),
        ("grey", (60, 40, 31, 22), 30, (120, 160)),
    ]:
        ground = textured(rng, height + 80, width + 80)
        frames = []
        for t in range(num_frames):
            y, x = np.round(40 + 30 * np.sin([t / 9, t / 7])).astype(int)
            zoom = 1 + 0.2 * np.sin(t / 11)
            frame = ground[y : y + height, x : x + width]
            frame = np.ascontiguousarray(cv2.resize(frame, None, fx=zoom, fy=zoom)[:height, :width])
            if name == "leaves" and 20 <= t < 45:
                frame = np.ascontiguousarray(frame[:60, :50])  # the target's place is outside such a frame
            if name == "grey":
                frame = np.repeat(frame[..., :1], 3, axis=2)
            frames.append(frame)
        yield name, frames, np.array(box, np.float64)


@needs_numpy_2
def test_parity_equals_the_plain_tracker_in_500_frames():
    num_frames = num_padded = num_outside = 0
    used_scales, sides = [], []
    for seed, (name, frames, box_xywh) in enumerate(suite()):
        model = small_model(seed)
        penalty = 0.9745 if seed % 2 else 0.999  # the second has many changes of scale
        plain = PlainTracker(model.features, scale_penalty=penalty)
        tracker = SiamFCTracker(model, TrackerSettings(mode="parity", scale_penalty=penalty))
        with torch.inference_mode():
            plain.init(frames[0], box_xywh + [1, 1, 0, 0])
            tracker.init(frames[0], box_xywh[None])
            for t, frame in enumerate(frames[1:], start=1):
                expected = plain.update(frame)
                assert expected.dtype == np.float32
                box = tracker.update(frame)[0][0]
                assert np.array_equal(box + [1, 1, 0, 0], expected), (name, t, box, expected)
                sides.append(float(plain.x_side))
        num_frames += len(frames)
        num_padded += plain.num_padded
        num_outside += plain.num_outside
        used_scales += plain.used_scales
    assert num_frames >= 500 and min(used_scales.count(0), used_scales.count(2)) > 10  # as varied as it claims
    assert num_padded > 100 and num_outside > 10 and min(sides) < 4 and max(sides) > 700, (num_padded, num_outside)


@needs_numpy_2
def test_parity_with_five_scales_and_several_objects():
    """Each object is searched on its own, so parity holds beside others too."""
    settings = TrackerSettings(mode="parity", scale_num=5, scale_step=1.0255, scale_penalty=0.998)
    model, (_, frames, _) = small_model(), next(suite())
    boxes_xywh = np.array([[60, 40, 31, 22], [10, 70, 12, 40], [100, 20, 20.5, 9]], np.float64)
    tracker = SiamFCTracker(model, settings)
    plain_trackers = [PlainTracker(model.features, 5, 1.0255, 0.998) for _ in boxes_xywh]
    with torch.inference_mode():
        tracker.init(frames[0], boxes_xywh)
        for plain, box_xywh in zip(plain_trackers, boxes_xywh, strict=True):
            plain.init(frames[0], box_xywh + [1, 1, 0, 0])
        for frame in frames[1:20]:
            expected = np.stack([plain.update(frame) for plain in plain_trackers])
            assert np.array_equal(tracker.update(frame)[0] + [1, 1, 0, 0], expected)
    assert len({scale for plain in plain_trackers for scale in plain.used_scales}) > 2


@needs_numpy_2
def test_parity_on_real_frames(data_root):
    folder = data_root / "OTB100" / "Human7"
    if not folder.is_dir():
        pytest.skip(f"real data: {folder} is absent")
    frames = [read_image(path) for path in sorted((folder / "img").glob("*.jpg"))[:20]]
    box = np.array((folder / "groundtruth_rect.txt").read_text().splitlines()[0].split(","), np.float64)  # 1-based
    model = small_model()
    plain, tracker = PlainTracker(model.features), SiamFCTracker(model, PARITY)
    with torch.inference_mode():
        plain.init(frames[0], box)
        tracker.init(frames[0], box[None] - [1, 1, 0, 0])
        for frame in frames[1:]:
            assert np.array_equal(tracker.update(frame)[0][0] + [1, 1, 0, 0], plain.update(frame))


def plain_network(weights):
    """Make the published network from its weights, as a function of images."""

    def features(images):
        for block, stride, groups in [(1, 2, 1), (2, 1, 2), (3, 1, 1), (4, 1, 2), (5, 1, 2)]:
            conv, norm = f"backbone.conv{block}.0.", f"backbone.conv{block}.1."
            images = F.conv2d(images, weights[conv + "weight"], weights[conv + "bias"], stride, groups=groups)
            if block < 5:
                statistics = weights[norm + "running_mean"], weights[norm + "running_var"]
                images = F.batch_norm(images, *statistics, weights[norm + "weight"], weights[norm + "bias"], eps=1e-6)
                images = F.relu(images)
            if block < 3:
                images = F.max_pool2d(images, 3, 2)
        return images

    return features


def real_model(seed=0):
    """Make the real network with batch norm that fits its input, as trained ones have."""
    torch.manual_seed(seed)
    model = SiamFC(score_bias=False)
    rng = np.random.default_rng(seed)
    patches = torch.from_numpy(np.stack([textured(rng, 127, 127) for _ in range(2)])).permute(0, 3, 1, 2).float()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train().features(patches)
    return model.eval()


@needs_numpy_2
def test_the_real_network_in_parity_and_fast():
    model = real_model()
    plain = PlainTracker(plain_network(model.state_dict()))
    trackers = {
        "parity": SiamFCTracker(model.train(), PARITY),  # trackers copy the model, whatever its mode
        "fast": SiamFCTracker(model, DEFAULT),
        "subpixel": SiamFCTracker(model, SUBPIXEL),
    }
    assert model.training
    _, frames, box_xywh = next(suite())
    with torch.inference_mode():
        plain.init(frames[0], box_xywh + [1, 1, 0, 0])
        for tracker in trackers.values():
            tracker.init(frames[0], box_xywh[None])
        assert torch.equal(trackers["parity"].exemplar_features[0], plain.kernel)  # bit for bit, in its layout too
        for frame in frames[1:4]:
            expected = plain.update(frame)
            boxes = {name: tracker.update(frame)[0][0] + [1, 1, 0, 0] for name, tracker in trackers.items()}
            assert np.array_equal(boxes["parity"], expected)
            np.testing.assert_allclose(boxes["fast"], expected, atol=1e-3)
            np.testing.assert_allclose(boxes["subpixel"], expected, atol=1)
    assert plain.num_padded > 0


REAL_SEQUENCES = [  # a folder of frames in DATA_ROOT, and its groundtruth
    *((f"OTB100/{name}/img", "../groundtruth_rect.txt") for name in ("Crossing", "DragonBaby", "Human7", "Jumping")),
    ("VOT2015/bag", "groundtruth.txt"), ("VOT2017/book/color", "../groundtruth.txt"),
    *((f"DAVIS2016/JPEGImages/480p/{name}", f"../../../boxes_derived/480p/{name}.txt") for name in (
        "blackswan", "bmx-trees", "car-shadow", "dog", "drift-straight", "horsejump-high", "scooter-black",
    )),
]  # fmt: skip


@needs_numpy_2
@pytest.mark.slow
@pytest.mark.parametrize("folder, groundtruth", REAL_SEQUENCES)
def test_parity_with_the_bundled_weights_on_real_sequences(folder, groundtruth, data_root, one_thread):
    """Exemplar features, responses and boxes. The features differed by rounding, in the first frame of each sequence;
    on 1,020 frames one near-tie then fell the other way at frame 667. The first frames show it.
    """
    folder = data_root / folder
    if not folder.is_dir():
        pytest.skip(f"real data: {folder} is absent")
    model = load_siamfc(Path(__file__).parent.parent / "checkpoints" / "siamfc_alexnet.pt")
    plain, tracker = PlainTracker(model.features), SiamFCTracker(model, PARITY)
    frames = [read_image(path) for path in sorted(folder.glob("*.jpg"))[:3]]
    box_xywh = read_boxes(folder / groundtruth, box_origin=1)[0]
    with torch.inference_mode():
        plain.init(frames[0], box_xywh + [1, 1, 0, 0])
        tracker.init(frames[0], box_xywh[None])
        assert torch.equal(tracker.exemplar_features[0], plain.kernel)
        for frame in frames[1:]:
            instances = [plain.patch(frame, plain.x_side * scale, 255) for scale in plain.scales]
            x = plain.features(torch.from_numpy(np.stack(instances)).permute(0, 3, 1, 2).float())
            responses = F.conv2d(x, plain.kernel) * 0.001  # (3, 1, 17, 17)
            assert np.array_equal(tracker._responses(frame, tracker.scale_factors), responses.numpy())
            assert np.array_equal(tracker.update(frame)[0][0] + [1, 1, 0, 0], plain.update(frame))


def test_folding_batch_norm_keeps_the_values_and_the_model():
    model = real_model().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # real_model leaves them 1 and 0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folded = fold_batch_norm(model)
    assert model.training and all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.rand(1, 3, 143, 143) * 255
    with torch.no_grad():
        torch.testing.assert_close(folded.features(images), model.eval().features(images), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# an object that moves, grows, vanishes and comes back


def moving_object(num_frames, hidden=(), growth=1.0, step_xy=(1.5, -0.8)):
    """Make frames of a textured square over faint ground, and its boxes (num_frames, 4)."""
    rng = np.random.default_rng(1)
    ground = (118 + textured(rng, 200, 260) // 12).astype(np.uint8)
    pattern = textured(rng, 24, 24, blur=3.0)
    frames, boxes = [], []
    for t in range(num_frames):
        size = 24 * growth**t
        left, top = 70 + step_xy[0] * t - size / 2, 130 + step_xy[1] * t - size / 2
        frame = ground.copy()
        if t not in hidden:
            factor = size / 24
            to_frame = np.array([[factor, 0, left + (factor - 1) / 2], [0, factor, top + (factor - 1) / 2]])
            warped = cv2.warpAffine(pattern, to_frame, (260, 200))
            mask = cv2.warpAffine(np.ones((24, 24), np.uint8), to_frame, (260, 200), flags=cv2.INTER_NEAREST)
            frame[mask > 0] = warped[mask > 0]
        frames.append(frame)
        boxes.append([left, top, size, size])
    return frames, np.array(boxes)


def iou(a, b):
    inter = np.prod(np.maximum(0, np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])))
    return inter / (np.prod(a[2:]) + np.prod(b[2:]) - inter)


def start(frame, boxes_xywh, settings=DEFAULT, model=None):
    """A tracker that has seen its first frame; without a model it has one that follows the object."""
    tracker = SiamFCTracker(model or small_model(num_channels=32, is_matching=True), settings)
    tracker.init(frame, np.array(boxes_xywh))
    return tracker


@pytest.mark.parametrize("mode, growth", [("fast", 1.01), ("fast", 0.99), ("parity", 1.01)])
def test_following_an_object_that_moves_and_changes_its_size(mode, growth):
    frames, boxes = moving_object(45, growth=growth)
    tracker = start(frames[0], boxes[:1], TrackerSettings(mode=mode))
    results = [tracker.update(frame) for frame in frames[1:]]
    overlaps = [iou(result[0][0], box) for result, box in zip(results, boxes[1:], strict=True)]
    assert np.mean(overlaps) > 0.7 and min(overlaps) > 0.5, overlaps
    assert 0.75 < results[-1][0][0, 2] / boxes[-1, 2] < 1.25  # the first size would be 0.64 or 1.56
    assert all(0.6 < result[1][0] < 1.4 for result in results) and not any(result[2][0] for result in results)
    found_boxes, scores, is_lost = results[0]
    assert found_boxes.shape == (1, 4) and scores.shape == is_lost.shape == (1,)
    assert found_boxes.dtype == scores.dtype == np.float64 and is_lost.dtype == bool


def test_an_object_that_vanishes_seems_lost_until_it_is_back():
    hidden = range(10, 16)
    frames, boxes = moving_object(25, hidden=hidden, step_xy=(0, 0))
    tracker = start(frames[0], boxes[:1])
    is_lost = [bool(tracker.update(frame)[2][0]) for frame in frames[1:]]
    assert is_lost == [t in hidden for t in range(1, 25)]


def test_a_frame_without_contrast():
    plain = np.full((60, 80, 3), 90, np.uint8)
    boxes, scores, is_lost = start(plain, [[30, 20, 10, 10]], model=small_model()).update(plain)
    assert np.isfinite(boxes).all() and is_lost[0] and np.isfinite(scores).all()


# ---------------------------------------------------------------------------------------------------------------------
# several objects


def test_several_objects_equal_single_runs():
    frames, first = moving_object(100)
    boxes_xywh = np.concatenate([first[:1], [[20, 20, 30, 12], [200, 150, 9, 40], [120, 90, 22.5, 20.25]]])

    def track(boxes_xywh):
        tracker = start(frames[0], boxes_xywh)
        results = [tracker.update(frame) for frame in frames[1:]]
        return np.stack([boxes for boxes, _, _ in results]), np.stack([scores for _, scores, _ in results])

    together, scores = track(boxes_xywh)  # (T, 4, 4), (T, 4)
    for n in range(4):
        alone, alone_scores = track(boxes_xywh[n : n + 1])
        np.testing.assert_allclose(together[:, n], alone[:, 0], atol=1e-3)
        np.testing.assert_allclose(scores[:, n], alone_scores[:, 0], atol=1e-4)
    assert np.abs(together[-1] - boxes_xywh).max(axis=1).min() > 0.1  # all of them moved


def test_objects_in_groups_of_any_size_equal_single_runs(monkeypatch):
    frames, first = moving_object(2)
    boxes_xywh = first[[0] * 5] + np.arange(5)[:, None] * [1, 1, 0.5, 0.25]
    model = small_model()
    alone = [start(frames[0], [box_xywh], model=model).update(frames[1])[0][0] for box_xywh in boxes_xywh]
    for mode, num_per_forward in (("fast", 1), ("fast", 2), ("fast", 5), ("fast", 32), ("parity", 1)):
        monkeypatch.setattr(siamfc_tracker, "CPU_OBJECTS_PER_FORWARD", num_per_forward)
        tracker = SiamFCTracker(model, TrackerSettings(mode=mode))
        calls = []
        features = tracker.model.features
        monkeypatch.setattr(tracker.model, "features", lambda images: calls.append(len(images)) or features(images))  # noqa: B023
        tracker.init(frames[0], boxes_xywh)
        boxes = tracker.update(frames[1])[0]
        groups = {1: [1] * 5, 2: [2, 2, 1], 5: [5], 32: [5]}[num_per_forward]
        assert calls == groups + groups + [3 * num for num in groups]  # exemplars, first responses, three scales
        np.testing.assert_allclose(boxes, np.stack(alone), atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# a whole video


def write_moving(folder, num_frames=6):
    frames, boxes = moving_object(num_frames)
    for t, frame in enumerate(frames):
        write_image(folder / f"{t}.png", frame)
    return frames, np.concatenate([boxes[:1], boxes[:1] + [30, 10, 0, 4]])


def test_tracking_a_video_is_init_and_updates(tmp_path):
    frames, boxes_xywh = write_moving(tmp_path)
    expected = start(frames[0], boxes_xywh)
    given = boxes_xywh.copy()
    tracker = SiamFCTracker(small_model(num_channels=32, is_matching=True), DEFAULT)
    tracked = list(track_frames(tracker, FrameSource(tmp_path), given))
    assert [tracked_frame.index for tracked_frame in tracked] == list(range(6)) and np.array_equal(given, boxes_xywh)
    assert np.array_equal(tracked[0].boxes_xywh, boxes_xywh) and tracked[0].boxes_xywh.dtype == np.float64
    assert tracked[0].scores.tolist() == [1, 1] and tracked[0].is_lost.tolist() == [False, False]
    for tracked_frame, frame in zip(tracked, frames, strict=True):
        assert tracked_frame.error is None and tracked_frame.time_s > 0
        assert np.array_equal(tracked_frame.frame, frame)
        if tracked_frame.index > 0:
            boxes, scores, is_lost = expected.update(frame)
            assert np.array_equal(tracked_frame.boxes_xywh, boxes) and np.array_equal(tracked_frame.scores, scores)
            assert np.array_equal(tracked_frame.is_lost, is_lost)
    assert np.abs(tracked[-1].boxes_xywh - boxes_xywh).max() > 2  # earlier answers are not changed by later frames


def test_a_frame_that_cannot_be_read_leaves_the_objects_where_they_were(tmp_path):
    frames, boxes_xywh = write_moving(tmp_path)
    for t in (2, 3):
        (tmp_path / f"{t}.png").write_bytes(b"no picture")
    expected = start(frames[0], boxes_xywh)
    tracker = SiamFCTracker(small_model(num_channels=32, is_matching=True), DEFAULT)
    tracked = list(track_frames(tracker, FrameSource(tmp_path), boxes_xywh))
    assert [tracked_frame.index for tracked_frame in tracked] == list(range(6))
    assert [t for t in range(6) if tracked[t].error is not None] == [2, 3]
    before = expected.update(frames[1])[0]
    for t in (2, 3):
        assert f"{t}.png" in str(tracked[t].error) and tracked[t].frame is None and np.isnan(tracked[t].time_s)
        assert np.array_equal(tracked[t].boxes_xywh, before) and np.isnan(tracked[t].scores).all()
        assert tracked[t].is_lost.tolist() == [True, True]
    for t in (4, 5):
        assert np.array_equal(tracked[t].boxes_xywh, expected.update(frames[t])[0])


def test_a_video_whose_first_frame_or_box_is_no_good(tmp_path):
    _, boxes_xywh = write_moving(tmp_path, 3)
    tracker = SiamFCTracker(small_model(), DEFAULT)
    with pytest.raises(ValueError, match="box 1 of 1 is .* outside the first frame"):
        next(track_frames(tracker, FrameSource(tmp_path), [[900, 900, 10, 10]]))
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="0.png"):
        next(track_frames(tracker, FrameSource(tmp_path), boxes_xywh))
    (tmp_path / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match="0.png"):
        next(track_frames(tracker, FrameSource([tmp_path / "0.png", tmp_path / "1.png"]), boxes_xywh))


# ---------------------------------------------------------------------------------------------------------------------
# from the response to the box, in closed form


def track_responses(settings, responses, num_frames=1, box=(100, 80, 20, 30), frame_hw=(200, 300)):
    """Track with responses (3, 17, 17) that are given: the boxes (num_frames, 4)."""
    frame = textured(0, *frame_hw)
    tracker = start(frame, [box], settings, small_model())
    tracker._responses = lambda image, scale_factors: responses[:, None].astype(np.float32)
    return np.stack([tracker.update(frame)[0][0] for _ in range(num_frames)])


def one_peak(row, column, scale_index=1):
    responses = np.zeros((3, 17, 17))
    responses[scale_index, row, column] = 1
    return responses


def center(box_xywh):
    return box_xywh[:2] + (box_xywh[2:] - 1) / 2


def test_one_cell_is_eight_instance_px():
    side = np.sqrt((20 + 25) * (30 + 25)) * 255 / 127
    no_window = {"window_influence": 0.0, "keep_center_inside": False, "subpixel_peak": True}
    for row, column in [(8, 8), (8, 11), (4, 10)]:
        box = track_responses(TrackerSettings(**no_window), one_peak(row, column))[0]
        expected = np.array([109.5, 94.5]) + np.array([column - 8, row - 8]) * 8 * side / 255
        np.testing.assert_allclose(center(box), expected, atol=1e-3)
        np.testing.assert_allclose(box[2:], [20, 30], atol=1e-5)
    box = track_responses(TrackerSettings(**no_window), one_peak(8, 11, scale_index=2))[0]  # at the larger scale
    np.testing.assert_allclose(center(box), [109.5 + 3 * 8 * side * 1.0375 / 255, 94.5], atol=1e-3)
    np.testing.assert_allclose(box[2:], np.array([20, 30]) * (0.41 + 0.59 * 1.0375), rtol=1e-6)


def test_an_object_at_rest_stays_where_it_is():
    """The published peak is never in the middle, but a quarter of an instance px to its left and above."""
    side = np.sqrt((20 + 25) * (30 + 25)) * 255 / 127
    for responses in (one_peak(8, 8), np.ones((3, 17, 17))):
        box = track_responses(SUBPIXEL, responses)[0]
        np.testing.assert_allclose(box, [100, 80, 20, 30], atol=1e-4)
        for settings in (PARITY, DEFAULT):  # the default stays with the published peak
            box = track_responses(settings, responses)[0]
            np.testing.assert_allclose(center(box), np.array([109.5, 94.5]) - 0.25 * side / 255, atol=1e-4)


def test_a_negative_peak_does_not_favour_a_change_of_scale():
    """The published penalty, a factor below 1, makes negative responses larger."""
    responses = np.full((3, 17, 17), -2.0) + one_peak(8, 8, 0) + one_peak(8, 8, 1) + one_peak(8, 8, 2)
    assert track_responses(DEFAULT, responses)[0, 2] == 20
    assert track_responses(PARITY, responses)[0, 2] < 19.6


@pytest.mark.parametrize("scale_index, limit", [(2, 5.0), (0, 0.2)])
def test_the_scale_is_limited(scale_index, limit):
    """The published scale runs away without end."""
    responses = one_peak(8, 8, scale_index)
    boxes = track_responses(SUBPIXEL, responses, 120)
    np.testing.assert_allclose(boxes[-1, 2:], [20 * limit, 30 * limit], rtol=1e-4)
    np.testing.assert_allclose(center(boxes[-1]), [109.5, 94.5], atol=0.1)
    free = track_responses(TrackerSettings(max_scale_change=None), responses, 120)
    parity = track_responses(PARITY, responses, 120)
    for other in (free, parity):
        factor = 0.41 + 0.59 * 1.0375 ** (scale_index - 1)
        np.testing.assert_allclose(other[-1, 2:], np.array([20, 30]) * factor**120, rtol=1e-3)


@pytest.mark.parametrize("scale_index", [0, 2])
def test_a_scale_that_runs_away_ends_no_run(scale_index):
    """The published code fails in OpenCV where the scale shrinks, and fills the memory where it grows."""
    frame = textured(0, 60, 80)
    tracker = start(frame, [[30, 20, 10, 12]], PARITY, small_model())
    tracker._responses = lambda image, scale_factors: one_peak(8, 8, scale_index)[:, None].astype(np.float32)
    for _ in range(700):
        boxes, _, _ = tracker.update(frame)
    assert 1e5 < boxes[0, 2] < 2**20 if scale_index == 2 else 0 <= boxes[0, 2] < 1e-5
    del tracker._responses  # from here on with real crops
    assert np.isfinite(tracker.update(frame)[0]).all()


def test_the_center_stays_inside_the_frame():
    boxes = track_responses(DEFAULT, one_peak(2, 14), 40)
    np.testing.assert_allclose(center(boxes[-1]), [299, 0], atol=1e-3)
    for settings in (TrackerSettings(keep_center_inside=False), PARITY):
        x, y = center(track_responses(settings, one_peak(2, 14), 40)[-1])
        assert x > 500 and y < -200


def test_the_window_prefers_small_movements():
    responses = 1 + 0.10 * one_peak(8, 9) + 0.12 * one_peak(1, 16) - one_peak(16, 0)
    near = track_responses(DEFAULT, responses)[0]
    far = track_responses(TrackerSettings(window_influence=0.0), responses)[0]
    assert 0 < center(near)[0] - 109.5 < 5 and abs(center(near)[1] - 94.5) < 0.5
    assert center(far)[0] - 109.5 > 20 and center(far)[1] - 94.5 < -20


def test_vertex_of_a_parabola():
    places = np.arange(9)
    for peak in (3.0, 3.2, 3.5, 4.49, 5.0):
        profile = 7 - 0.3 * (places - peak) ** 2
        index = int(profile.argmax())
        assert index + vertex_offset(profile, index) == pytest.approx(peak)
    assert vertex_offset(np.array([3.0, 2, 1]), 0) == vertex_offset(np.array([1.0, 2, 3]), 2) == 0
    assert vertex_offset(np.ones(5), 2) == 0


# ---------------------------------------------------------------------------------------------------------------------
# the frame's colour, precision, bad input


def test_the_border_has_the_first_frames_mean_colour():
    first, second = textured(0, 50, 60), np.zeros((50, 60, 3), np.uint8)
    tracker = start(first, [[0, 0, 10, 10]], model=small_model())
    tracker.update(second)
    assert np.array_equal(tracker.border_rgb, mean_color(first))


def test_bf16_features_give_nearly_the_same_boxes():
    frames, boxes = moving_object(6)
    results = []
    for precision in ("fp32", "bf16"):
        tracker = SiamFCTracker(small_model(num_channels=32, is_matching=True), SUBPIXEL, precision)
        tracker.init(frames[0], boxes[:1])
        results.append(np.stack([tracker.update(frame)[0] for frame in frames[1:]]))
    assert tracker.exemplar_features[0].dtype == torch.bfloat16
    assert 0 < np.abs(results[0] - results[1]).max() < 0.5


def test_parity_computes_in_fp32_alone():
    with pytest.raises(ValueError, match="precision is bf16; tracker.mode=parity computes in fp32"):
        SiamFCTracker(small_model(), PARITY, "bf16")


@pytest.mark.parametrize(
    "boxes, message",
    [
        ([[5, 5, 0, 10]], r"box 1 of 1 is \[5, 5, 0, 10\]; its width and height must be above 0"),
        ([[5, 5, 10, 10], [5, 5, 10, -3]], r"box 2 of 2 is .*above 0"),
        ([[5, 5, 1e-30, 10]], r"box 1 of 1 is .*above 0: from 0.01 to 100000 px"),
        ([[-5e29, 5, 1e30, 10]], r"box 1 of 1 is .*from 0.01 to 100000 px"),
        ([[5, np.nan, 10, 10]], r"box 1 of 1 is \[5, nan, 10, 10\]; its numbers must be finite"),
        ([[80, 5, 10, 10]], r"box 1 of 1 is .*; it lies outside the first frame of 80 x 60 px"),
        ([[5, -10, 10, 10]], r"outside the first frame"),
        ([5, 5, 10, 10], r"boxes have the shape \(4,\)"),
        (np.zeros((0, 4)), r"boxes have the shape \(0, 4\)"),
    ],
)
def test_bad_boxes(boxes, message):
    with pytest.raises(ValueError, match=message):
        SiamFCTracker(small_model(), DEFAULT).init(np.zeros((60, 80, 3), np.uint8), boxes)


@pytest.mark.parametrize(
    "key, value",
    [
        ("mode", "slow"), ("scale_num", 2), ("scale_num", 0), ("scale_step", 1.0), ("scale_step", float("nan")),
        ("scale_penalty", 0.0), ("scale_lr", 1.5), ("window_influence", -0.1), ("response_up", 0),
        ("context_amount", -0.5), ("max_scale_change", 0.5),
    ],
)  # fmt: skip
def test_bad_settings_name_the_key(key, value):
    with pytest.raises(ValueError, match=f"tracker.{key} is {value}; must be"):
        read_settings(TrackerSettings, {key: value}, "tracker")


# ---------------------------------------------------------------------------------------------------------------------
# lost and found


def absent_object(distractor=0.0, num_before=4, num_absent=8, num_after=6):
    """Make frames of a square that vanishes and comes back far away, and a mixture of it and noise, when it is gone."""
    rng = np.random.default_rng(3)
    ground = (118 + textured(rng, 200, 260) // 12).astype(np.uint8)
    pattern, noise = textured(rng, 24, 24, blur=3.0), textured(rng, 24, 24, blur=3.0)
    frames, places = [], []
    for t in range(num_before + num_absent + num_after):
        frame, place = ground.copy(), None
        if t < num_before:
            place = 40 + 2 * t, 150
        elif t >= num_before + num_absent:
            place = 210, 30
        elif distractor:
            frame[20:44, 60:84] = (distractor * pattern + (1 - distractor) * noise).astype(np.uint8)
        if place is not None:
            frame[place[1] : place[1] + 24, place[0] : place[0] + 24] = pattern
        frames.append(frame)
        places.append(place)
    return frames, places


def follow(frames, box, settings):
    tracker = start(frames[0], [box], settings)
    return [[value[0] for value in tracker.update(frame)] for frame in frames[1:]]


def test_a_lost_object_is_found_far_away():
    frames, places = absent_object()
    plain = follow(frames, [*places[0], 24, 24], DEFAULT)
    found = follow(frames, [*places[0], 24, 24], replace(DEFAULT, found_score=0.7))
    there = np.array([*places[-1], 24, 24.0])
    assert iou(plain[-1][0], there) == 0
    assert iou(found[-1][0], there) > 0.5 and found[-1][1] >= 0.7 and not found[-1][2]
    lost = [is_lost for _, _, is_lost in found]
    assert lost[:3] == [False] * 3 and all(lost[4:11])
    stays = np.array([box for box, _, _ in found[4:11]])
    assert (stays == stays[0]).all() and iou(stays[0], np.array([46, 150, 24, 24])) > 0.3  # where it was
    is_back = [iou(box, there) > 0.5 for box, _, _ in found[11:]]
    assert True in is_back[:3]


def test_a_lost_object_is_not_taken_for_another():
    frames, places = absent_object(distractor=0.45)
    found = follow(frames, [*places[0], 24, 24], replace(DEFAULT, found_score=0.8))
    other = np.array([60, 20, 24, 24.0])
    assert all(iou(box, other) == 0 for box, _, _ in found)
    taken = follow(frames, [*places[0], 24, 24], replace(DEFAULT, found_score=0.45))  # a score that anything has
    assert any(iou(box, other) > 0.3 for box, _, _ in taken)


def test_windows_go_outwards_and_stay_in_the_frame():
    centers = siamfc_tracker.list_windows(np.array([50, 40], np.float32), 20.0, (100, 130))
    rings = np.abs(centers - [50, 40]).max(1) / 20
    assert (np.diff(rings) >= 0).all() and rings[0] == 1
    assert (centers >= 0).all() and (centers <= [129, 99]).all()
    expected = {(x, y) for x in range(10, 130, 20) for y in range(0, 100, 20)} - {(50, 40)}
    assert {tuple(map(int, center)) for center in centers.tolist()} == expected


def test_found_score_lies_above_lost_score():
    with pytest.raises(ValueError, match=r"tracker.found_score is 0.3; must be above tracker.lost_score \(0.4\)"):
        TrackerSettings(found_score=0.3)
    parity = replace(DEFAULT, mode="parity")
    frames, places = absent_object(num_before=3, num_absent=3, num_after=1)
    box = [*places[0], 24, 24]
    ways = [follow(frames, box, settings) for settings in (parity, replace(parity, found_score=0.7))]
    assert np.array_equal([box for box, _, _ in ways[0]], [box for box, _, _ in ways[1]])  # off in parity
