"""Tracks as other programs read them: MOT by trackeval, CVAT's xml by Datumaro and replayed, DAVIS's masks."""

import csv
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny_training
import torch
from PIL import Image
from test_track import compose_config, quick, run  # noqa: F401 (quick is a fixture)
from test_tracking_masks import NANO
from test_tracking_tracker import moving_object

import track as script
from utils.images import write_image
from utils.sam2.model import build_sam2
from utils.tracking import writers
from utils.tracking.masks import Segmenter
from utils.tracking.writers import Tracked


def make_tracks(num_frames=20):
    """Three objects; the first is lost in frames 5 to 9, the second comes in frame 3, the third leaves in frame 15."""
    rng = np.random.default_rng(0)
    boxes = np.zeros((num_frames, 3, 4))
    boxes[0] = [[10, 20, 30, 40], [100, 30, 25.5, 20], [50.25, 90, 40, 30]]
    for index in range(1, num_frames):
        boxes[index] = boxes[index - 1] + np.pad(rng.uniform(-2, 2, (3, 2)), ((0, 0), (0, 2)))
    is_lost = np.zeros((num_frames, 3), bool)
    is_lost[5:10, 0] = is_lost[:3, 1] = is_lost[15:, 2] = True
    boxes[:3, 1] = np.nan
    return Tracked(boxes, np.where(is_lost, 0.1, 0.8), is_lost, (150, 200))


def test_mot_is_scored_by_trackeval(tmp_path):
    """Against the same boxes without anything lost: what is missing is missed, and nothing else is wrong."""
    trackeval = pytest.importorskip("trackeval", reason="pip install --no-deps trackeval tabulate")
    tracked = make_tracks()
    whole = Tracked(
        np.nan_to_num(tracked.boxes_xywh, nan=60.0), tracked.scores * 0 + 1, tracked.is_lost & False, (150, 200)
    )
    folders = {"gt": tmp_path / "gt" / "video" / "gt", "tracker": tmp_path / "trackers" / "ours" / "data"}
    for folder in folders.values():
        folder.mkdir(parents=True)
    writers.write_mot(folders["gt"], "video", whole, {})
    writers.write_mot(folders["tracker"], "video", tracked, {})
    truth = (folders["gt"] / "mot.txt").read_text().splitlines()
    lines = [",".join([*line.split(",")[:6], "1", "1", "1"]) for line in truth]  # consider it; class 1; all visible
    (folders["gt"] / "gt.txt").write_text("\n".join(lines))
    (folders["tracker"] / "mot.txt").rename(folders["tracker"] / "video.txt")
    dataset = trackeval.datasets.MotChallenge2DBox(
        {
            "GT_FOLDER": str(tmp_path / "gt"), "TRACKERS_FOLDER": str(tmp_path / "trackers"), "SKIP_SPLIT_FOL": True,
            "SEQ_INFO": {"video": 20}, "PRINT_CONFIG": False, "DO_PREPROC": False,
        }
    )  # fmt: skip
    evaluator = trackeval.Evaluator({"PRINT_RESULTS": False, "PRINT_CONFIG": False, "OUTPUT_SUMMARY": False,
                                     "OUTPUT_DETAILED": False, "PLOT_CURVES": False, "TIME_PROGRESS": False,
                                     "LOG_ON_ERROR": None})  # fmt: skip
    metrics = [trackeval.metrics.CLEAR({"PRINT_CONFIG": False}), trackeval.metrics.Identity({"PRINT_CONFIG": False})]
    results, _ = evaluator.evaluate([dataset], metrics)
    scores = results["MotChallenge2DBox"]["ours"]["video"]["pedestrian"]
    num_missed = 5 + 3 + 5
    assert scores["CLEAR"]["CLR_FN"] == num_missed and scores["CLEAR"]["CLR_FP"] == scores["CLEAR"]["IDSW"] == 0
    assert scores["CLEAR"]["MOTA"] == pytest.approx(1 - num_missed / 60)
    assert scores["CLEAR"]["MOTP"] == pytest.approx(1, abs=1e-3)
    assert scores["Identity"]["IDF1"] == pytest.approx(2 * 47 / (47 + 60))
    first = truth[0].split(",")
    assert first[:2] == ["1", "1"] and [float(value) for value in first[2:6]] == [11, 21, 30, 40]  # from 1


def replay_cvat(path):
    """Read CVAT's tracks as its format says: a box holds until the track's next one, and is not there while outside."""
    root = ElementTree.parse(path).getroot()
    size = int(root.find("meta/task/size").text)
    tracks = {}
    for track in root.findall("track"):
        shapes = {int(box.get("frame")): box for box in track.findall("box")}
        now, boxes = None, []
        for index in range(size):
            now = shapes.get(index, now)
            is_there = now is not None and now.get("outside") == "0"
            boxes.append([float(now.get(key)) for key in ("xtl", "ytl", "xbr", "ybr")] if is_there else None)
        tracks[int(track.get("id"))] = boxes
    return tracks, root


def test_cvat_says_when_an_object_is_outside(tmp_path):
    tracked = make_tracks()
    writers.write_cvat(tmp_path, "a & b", tracked, {})
    tracks, root = replay_cvat(tmp_path / "cvat.xml")
    assert root.find("meta/task/name").text == "a & b" and root.find("meta/task/original_size/width").text == "200"
    assert set(tracks) == {0, 1, 2}
    for n, boxes in tracks.items():
        for index, corners in enumerate(boxes):
            assert (corners is None) == tracked.is_lost[index, n]
            if corners is not None:
                x, y, w, h = tracked.boxes_xywh[index, n]
                assert corners == pytest.approx([x, y, x + w, y + h], abs=0.006)


def test_cvat_is_read_by_datumaro(tmp_path):
    reason = (
        "pip install --no-deps datumaro orjson json-stream json-stream-rs-tokenizer imagesize pandas lxml defusedxml"
    )
    cvat = pytest.importorskip("datumaro.plugins.data_formats.cvat.base", reason=reason)
    tracked = make_tracks()
    writers.write_cvat(tmp_path, "video", tracked, {})
    read = np.full(tracked.boxes_xywh.shape, np.nan)
    for item in cvat.CvatBase(str(tmp_path / "cvat.xml")):
        for box in item.annotations:
            if not box.attributes["outside"]:
                read[item.attributes["frame"], box.attributes["track_id"]] = box.x, box.y, box.w, box.h
    expected = np.where(tracked.is_lost[..., None], np.nan, tracked.boxes_xywh)
    assert np.allclose(read, expected, rtol=0, atol=0.011, equal_nan=True)  # two corners of two decimals


def test_track_writes_all_formats(tmp_path, monkeypatch):
    torch.manual_seed(0)
    segmenter = Segmenter(tiny_training.answer_to_prompts(build_sam2(**NANO, device="cpu")), "fp32")
    monkeypatch.setattr("utils.tracking.masks.load_segmenter", lambda settings, device, precision: segmenter)
    frames, boxes = moving_object(4)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        write_image(tmp_path / "frames" / f"f{number + 7}.png", frame)
    box = f"boxes={[[float(v) for v in boxes[0]]]}"
    arguments = [f"input={tmp_path / 'frames'}", box, "masks=true", "overlay=false", "tracker.lost_score=-100"]
    assert run(tmp_path / "run", *arguments, "write=[mot,cvat,davis]") == []
    with (tmp_path / "run" / "mot.txt").open() as file:
        rows = [[float(value) for value in row] for row in csv.reader(file)]
    written = np.loadtxt(tmp_path / "run" / "boxes.txt", delimiter=",")
    assert np.allclose(np.array(rows)[:, 2:6], written + [1, 1, 0, 0], atol=0.006) and len(rows) == 4
    assert len(replay_cvat(tmp_path / "run" / "cvat.xml")[0][0]) == 4
    for number in range(4):
        files = tmp_path / "run" / "davis" / "frames" / f"{number:05d}.png", tmp_path / f"run/masks/f{number + 7}.png"
        assert np.array_equal(*(np.array(Image.open(path)) for path in files))


def test_cvat_has_the_first_frames_size_and_any_name(tmp_path):
    frames, boxes = moving_object(3)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        write_image(tmp_path / "frames" / f"{number}.png", frame[: -8 * number or None])
    box = f"boxes={[[float(value) for value in boxes[0]]]}"
    assert run(tmp_path / "run", f"input={tmp_path / 'frames'}", box, "overlay=false", "write=[cvat]") == []
    _, root = replay_cvat(tmp_path / "run" / "cvat.xml")
    assert root.find("meta/task/original_size/height").text == str(len(frames[0]))
    writers.write_cvat(tmp_path, "a\x01b\udcff", make_tracks(), {})  # a folder's name may hold what no xml does
    assert replay_cvat(tmp_path / "cvat.xml")[1].find("meta/task/name").text == "a\ufffdb\ufffd"


def test_what_fails_keeps_nothing_else_from_being_written(tmp_path):
    frames, boxes = moving_object(2)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        write_image(tmp_path / "frames" / f"{number}.png", frame)
    (tmp_path / "run" / "mot.txt").mkdir(parents=True)
    (tmp_path / "run" / "tracks.json").mkdir()
    box = f"boxes={[[float(value) for value in boxes[0]]]}"
    with pytest.raises(OSError, match="mot.txt|tracks.json"):
        script.track(compose_config(f"input={tmp_path / 'frames'}", box, "write=[mot,cvat]"), tmp_path / "run")
    assert len(replay_cvat(tmp_path / "run" / "cvat.xml")[0][0]) == 2 and (tmp_path / "run" / "boxes.txt").is_file()


def test_masks_without_masks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="write has davis, which are masks, but masks are off: add masks=true"):
        run(tmp_path / "run", "write=[davis]")
    with pytest.raises(ValueError, match="write"):
        run(tmp_path / "other", "write=[kitti]")
