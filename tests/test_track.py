"""track.py: each mode on small videos, the files it writes, the toolkit's scores from them, and bad input.

Most tests track with a small network (tests/test_siamfc_tracker.py), in place of AlexNet's 0.1 s a frame.
"""

import csv
import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import tiny
import torch
from forked import run_python
from got10k.experiments import ExperimentGOT10k, ExperimentOTB
from omegaconf import OmegaConf
from test_tracking_metrics import Dataset, experiment
from test_tracking_tracker import moving_object
from tiny_tracking import small_model

import track as script
from track import Config, check_settings, load_model, name_trackers, track
from utils.checkpoint import save_checkpoint
from utils.images import read_image, write_image
from utils.settings import read_settings
from utils.tracking import drawing, window
from utils.tracking.frames import FrameSource, write_video
from utils.tracking.metrics import box_iou
from utils.tracking.siamfc import SiamFC

FRAME_HW = (200, 260)  # px, as moving_object's


PLOTS = {name: getattr(drawing, name) for name in ("plot_curves", "plot_scores")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Track with a network that takes milliseconds, and without curves, for which matplotlib takes half a second."""
    monkeypatch.setattr(script, "load_model", lambda checkpoint, seed: small_model(num_channels=32, is_matching=True))
    for name in PLOTS:
        monkeypatch.setattr(drawing, name, lambda *args: None)


def compose_config(*overrides):
    """Compose as the command line does; values are set without Hydra, which takes a tenth of a second."""
    groups = [override for override in overrides if override.startswith(("data=", "+"))]
    config = OmegaConf.create(tiny.compose_config("track", "device=cpu", *groups))
    changes = OmegaConf.from_dotlist([override for override in overrides if override not in groups])
    return OmegaConf.to_container(OmegaConf.merge(config, changes))


def run(run_dir, *overrides):
    """Run track in this process, and return the failures."""
    run_dir.mkdir()
    return track(compose_config(*overrides), run_dir)


def run_main(run_dir, *arguments):
    """Run the command in this process: what it exits with."""
    status, message = tiny.run_script(script, run_dir, "device=cpu", *arguments)
    assert status == 1
    return message


def as_text(box) -> str:
    return "[" + ",".join(f"{value:g}" for value in box) + "]"


def write_frames(folder: Path, frames, suffix=".png") -> Path:
    folder.mkdir(parents=True)
    for index, frame in enumerate(frames):
        write_image(folder / f"{index + 1}{suffix}", frame)
    return folder


def write_lines(path: Path, boxes, box_origin=0) -> np.ndarray:
    """Write a groundtruth file, and return what is in it."""
    in_file = np.round(np.asarray(boxes) + [box_origin, box_origin, 0, 0], 3)
    path.write_text("".join(",".join(f"{value:.3f}" for value in box) + "\n" for box in in_file))
    return in_file


def read_lines(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", ndmin=2)


def read_tracks(folder: Path) -> dict:
    return json.loads((folder / "tracks.json").read_text())


def read_metrics(run_dir: Path) -> dict:
    return json.loads((run_dir / "run.json").read_text())["metrics"]


def read_table(run_dir: Path) -> dict:
    with (run_dir / "table.csv").open(encoding="utf-8", newline="") as file:
        return {(row["sequence"], row["tracker"]): row for row in csv.DictReader(file)}


def count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture(scope="module")
def clip():
    """14 frames of an object that moves, and its boxes."""
    return moving_object(14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clip):
    """<folder>/frames/1.png ... 14.png with groundtruth.txt above, and the same as clip.mp4."""
    folder = tmp_path_factory.mktemp("clip")
    frames, boxes = clip
    write_frames(folder / "frames", frames)
    write_lines(folder / "groundtruth.txt", boxes)
    (folder / "video").mkdir()
    with write_video(folder / "video" / "clip.mp4", FRAME_HW, 12.5) as video:
        for frame in frames:
            video.add(frame)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# a user's video


def test_a_folder_of_frames_and_all_its_files(folder, clip, tmp_path, capfd):
    frames, truth = clip
    assert run(tmp_path / "run", f"input={folder / 'frames'}") == []  # natural order: 10.png comes after 9.png
    boxes = read_lines(tmp_path / "run" / "boxes.txt")
    assert boxes.shape == (14, 4) and box_iou(boxes, truth).min() > 0.6
    assert (boxes[1:] % 1 > 0).any(1).all()  # not whole pixels
    record = read_tracks(tmp_path / "run")
    [tracked_object] = record["objects"]
    np.testing.assert_allclose(tracked_object["boxes_xywh"], boxes, atol=1e-4)
    assert tracked_object["scores"][0] == 1 and len(tracked_object["scores"]) == len(record["times_s"]) == 14
    assert tracked_object["lost"] == [False] * 14 and min(record["times_s"]) > 0
    assert record["num_frames"] == 14 and record["fps"] == 25 and record["box_origin"] == 0
    assert record["source"] == str(folder / "frames") and record["not_read"] == [] and record["problem"] is None
    with av.open(str(tmp_path / "run" / "overlay.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and float(stream.average_rate) == 25
        drawn = [picture.to_ndarray(format="rgb24").astype(int) for picture in container.decode(video=0)]
    assert len(drawn) == 14
    for picture, frame, box in zip(drawn, frames, boxes, strict=True):
        changed = np.abs(picture - frame).max(2) > 60
        x, y = round(box[0]), round(box[1] + box[3] / 2)
        assert changed[y, x - 1 : x + 2].any() and changed.mean() < 0.1  # the box's left side is drawn, and little else

    last = read_metrics(tmp_path / "run")["last"]
    assert last["num_frames"] == 14 and last["num_lost"] == last["num_failed"] == 0
    assert last["tracker_frames_per_s"] == pytest.approx(14 / sum(record["times_s"]))
    assert last["tracker_p50_ms"] == pytest.approx(1000 * np.percentile(record["times_s"], 50))
    assert last["tracker_p95_ms"] == pytest.approx(1000 * np.percentile(record["times_s"], 95))
    assert 0 < last["frames_per_s"] < last["tracker_frames_per_s"] and last["p50_ms"] <= last["p95_ms"]
    assert "frames:" not in capfd.readouterr().out  # the progress bar goes to stderr


def test_the_box_comes_from_the_command_line_or_a_file(folder, clip, tmp_path):
    box = clip[1][0]
    write_lines(tmp_path / "one_based.txt", clip[1], box_origin=1)
    arguments = {
        "found": [],
        "box": [f"box={as_text(box)}"],
        "one_based": [f"box={as_text(box + [1, 1, 0, 0])}", "box_origin=1"],
        "file": [f"box={folder / 'groundtruth.txt'}"],
        "one_based_file": [f"box={tmp_path / 'one_based.txt'}", "box_origin=1"],
        "boxes": [f"boxes=[{as_text(box)}]"],
    }
    boxes = {}
    for name, overrides in arguments.items():
        run(tmp_path / name, f"input={folder / 'frames'}", "overlay=false", *overrides)
        boxes[name] = read_lines(tmp_path / name / "boxes.txt") - [1, 1, 0, 0] * np.array("one_based" in name)
        assert not (tmp_path / name / "overlay.mp4").exists()
    for name, tracked_boxes in boxes.items():
        np.testing.assert_allclose(tracked_boxes, boxes["found"], atol=2e-3, err_msg=name)
    record = read_tracks(tmp_path / "one_based")
    assert record["box_origin"] == 1 and record["objects"][0]["boxes_xywh"][0] == pytest.approx(box + [1, 1, 0, 0])


def test_a_video_has_its_own_frame_rate(folder, clip, tmp_path):
    path = folder / "video" / "clip.mp4"
    assert run(tmp_path / "run", f"input={path}", f"box={as_text(clip[1][0])}") == []
    boxes = read_lines(tmp_path / "run" / "boxes.txt")
    assert boxes.shape == (14, 4) and box_iou(boxes, clip[1]).min() > 0.6
    assert FrameSource(tmp_path / "run" / "overlay.mp4").fps == 12.5 == read_tracks(tmp_path / "run")["fps"]
    assert count_frames(tmp_path / "run" / "overlay.mp4") == 14


def test_several_objects_equal_single_runs(tmp_path):
    frames, first = moving_object(100)
    write_frames(tmp_path / "frames", frames, ".bmp")
    boxes = np.concatenate([first[:1], [[20, 20, 30, 12], [120, 90, 22.5, 20.25]]])
    write_lines(tmp_path / "boxes.txt", boxes)
    run(tmp_path / "together", f"input={tmp_path / 'frames'}", f"boxes={tmp_path / 'boxes.txt'}", "overlay=false")
    assert not (tmp_path / "together" / "boxes.txt").exists()
    objects = read_tracks(tmp_path / "together")["objects"]
    assert [tracked_object["file"] for tracked_object in objects] == [f"boxes_{n}.txt" for n in (1, 2, 3)]
    for n, box in enumerate(boxes):
        run(tmp_path / f"run{n}", f"input={tmp_path / 'frames'}", f"box={as_text(box)}", "overlay=false")
        alone = read_lines(tmp_path / f"run{n}" / "boxes.txt")
        together = read_lines(tmp_path / "together" / f"boxes_{n + 1}.txt")
        assert together.shape == (100, 4) and np.abs(together - alone).max() < 1e-3
        np.testing.assert_allclose(together, objects[n]["boxes_xywh"], atol=1e-4)
        assert np.abs(together[-1] - together[0]).max() > 0.1  # it moved


def test_an_object_that_vanishes_is_lost_in_file_and_picture(tmp_path):
    frames, boxes = moving_object(8, hidden=(4, 5), step_xy=(0, 0))
    write_frames(tmp_path / "frames", frames)
    run(tmp_path / "run", f"input={tmp_path / 'frames'}", f"box={as_text(boxes[0])}")
    assert read_tracks(tmp_path / "run")["objects"][0]["lost"] == [t in (4, 5) for t in range(8)]
    assert read_metrics(tmp_path / "run")["last"]["num_lost"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# frames and videos with faults


def test_an_unreadable_frame_is_named_and_tracking_goes_on(clip, tmp_path, monkeypatch, capfd):
    frames, truth = clip
    write_frames(tmp_path / "frames", frames)
    (tmp_path / "frames" / "6.png").write_bytes(b"not a picture")
    monkeypatch.chdir(tmp_path)
    code = run_main(tmp_path / "run", "input=frames", f"box={as_text(truth[0])}")
    assert code.splitlines()[0] == "1 failures; all else is written:" and "frames/6.png" in code.splitlines()[1]
    assert "Traceback" not in capfd.readouterr().err
    boxes = read_lines(tmp_path / "run" / "boxes.txt")
    assert len(boxes) == 14 and (boxes[5] == boxes[4]).all() and box_iou(boxes, truth).min() > 0.5
    record = read_tracks(tmp_path / "run")
    assert record["objects"][0]["lost"] == [t == 5 for t in range(14)]
    assert record["objects"][0]["scores"][5] is None is record["times_s"][5]
    assert record["not_read"][0]["frame"] == 5 and "6.png" in record["not_read"][0]["error"]
    assert count_frames(tmp_path / "run" / "overlay.mp4") == 14
    assert read_metrics(tmp_path / "run")["last"]["num_failed"] == 1
    (tmp_path / "frames" / "1.png").write_bytes(b"not a picture")
    code = run_main(tmp_path / "first", "input=frames", f"box={as_text(truth[0])}")
    assert code.startswith("error: ") and "1.png" in code  # there is nothing to start from


def test_a_video_that_is_cut_off(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), dtype=np.uint8)
    with write_video(tmp_path / "clip.mp4", (48, 64), 10) as video:
        for frame in noise:
            video.add(frame)
    data = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(0.6 * len(data))])
    failures = run(tmp_path / "run", f"input={tmp_path / 'cut.mp4'}", "box=[20,10,20,20]")
    num_frames = len(read_lines(tmp_path / "run" / "boxes.txt"))
    assert 5 < num_frames < 30 and count_frames(tmp_path / "run" / "overlay.mp4") == num_frames
    assert "cut.mp4" in failures[-1] and "30" in failures[-1]
    assert read_tracks(tmp_path / "run")["problem"] == failures[-1]


def test_one_frame(clip, tmp_path):
    write_frames(tmp_path / "frames", clip[0][:1])
    assert run(tmp_path / "run", f"input={tmp_path / 'frames'}", f"box={as_text(clip[1][0])}") == []
    np.testing.assert_allclose(read_lines(tmp_path / "run" / "boxes.txt"), clip[1][:1], atol=1e-4)
    assert count_frames(tmp_path / "run" / "overlay.mp4") == 1
    assert run(tmp_path / "picture", f"input={tmp_path / 'frames' / '1.png'}", f"box={as_text(clip[1][0])}") == []


def test_grey_and_16_bit_frames_and_a_size_that_changes(clip, tmp_path, caplog):
    folder = tmp_path / "frames"
    folder.mkdir()
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip[0]]
    for index, frame in enumerate(grey[:6]):
        cv2.imwrite(str(folder / f"{index}.png"), frame.astype(np.uint16) * 257 if index % 2 else frame)
    for index, frame in enumerate(grey[6:8], start=6):
        cv2.imwrite(str(folder / f"{index}.png"), frame[:150, :201])
    cv2.imwrite(str(folder / "8.png"), grey[8])
    with caplog.at_level("INFO"):
        assert run(tmp_path / "run", f"input={folder}", f"box={as_text(clip[1][0])}") == []
    boxes = read_lines(tmp_path / "run" / "boxes.txt")
    assert len(boxes) == 9 and box_iou(boxes[:8], clip[1][:8]).min() > 0.5
    notes = [message for message in caplog.messages if "size changes" in message]
    assert len(notes) == 1 and "6.png" in notes[0] and "from 260 x 200 to 201 x 150 px" in notes[0]
    assert count_frames(tmp_path / "run" / "overlay.mp4") == 9


# ---------------------------------------------------------------------------------------------------------------------
# sequences of a dataset


def write_otb(root: Path, lengths=(9, 7), num_lines=None) -> dict[str, np.ndarray]:
    """Write OTB's layout, and return what is in the groundtruth files."""
    truths = {}
    for number, length in enumerate(lengths):
        frames, boxes = moving_object(length, step_xy=(1.5 + number, -0.8))
        write_frames(root / f"Video{number}" / "img", frames, ".bmp")
        path = root / f"Video{number}" / "groundtruth_rect.txt"
        truths[f"Video{number}"] = write_lines(path, boxes[: num_lines or length], box_origin=1)
    return truths


def write_got10k(root: Path, lengths=(8, 12)) -> dict[str, tuple]:
    """Write GOT-10k's layout, and return (groundtruth, cover) as in the files."""
    items = {}
    for number, length in enumerate(lengths):
        frames, boxes = moving_object(length, step_xy=(2.5 * (number + 1), -0.8))
        folder = write_frames(root / "val" / f"GOT-10k_Val_{number:06d}", frames, ".bmp")
        cover = np.random.default_rng(number).integers(0, 9, length)
        cover[:3] = 8, 0, 5
        for name, numbers in (("cover", cover), ("absence", np.zeros(length, int))):
            (folder / f"{name}.label").write_text("".join(f"{value}\n" for value in numbers))
        (folder / "meta_info.ini").write_text(f"[METAINFO]\nresolution: {FRAME_HW[::-1]}\n")
        items[folder.name] = write_lines(folder / "groundtruth.txt", boxes, box_origin=1), cover
    (root / "val" / "list.txt").write_text("\n".join(items) + "\n")
    return items


def test_sequences_of_a_dataset_and_their_mean_iou(tmp_path, caplog):
    truths = write_otb(tmp_path / "otb")
    with caplog.at_level("INFO"):
        assert run(tmp_path / "run", "data=otb", f"data.root={tmp_path / 'otb'}") == []
    last = read_metrics(tmp_path / "run")["last"]
    means, still_means = [], []
    for name, truth in truths.items():
        boxes = read_lines(tmp_path / "run" / name / "boxes.txt")  # counted from 0, the dataset's from 1
        truth = truth - [1, 1, 0, 0]
        means.append(box_iou(boxes, truth)[1:].mean())
        still_means.append(box_iou(np.tile(truth[0], (len(truth), 1)), truth)[1:].mean())
        assert count_frames(tmp_path / "run" / name / "overlay.mp4") == len(truth)
        assert read_tracks(tmp_path / "run" / name)["num_frames"] == len(truth)
        [line] = [message for message in caplog.messages if message.startswith(f"{name}: ")]
        assert f"mean IoU {means[-1]:.3f}" in line and f"kept still: {still_means[-1]:.3f}" in line
    assert last["mean_iou"] == pytest.approx(np.mean(means), abs=1e-4)
    assert last["still_box_mean_iou"] == pytest.approx(np.mean(still_means), abs=1e-6)
    assert last["mean_iou"] > last["still_box_mean_iou"] + 0.05
    run(tmp_path / "named", "data=otb", f"data.root={tmp_path / 'otb'}", "sequences=[Video1]", "overlay=false")
    assert not (tmp_path / "named" / "Video0").exists() and not (tmp_path / "named" / "Video1" / "overlay.mp4").exists()
    with pytest.raises(ValueError, match="sequences has 'Video7', which the dataset lacks"):
        run(tmp_path / "other", "data=otb", f"data.root={tmp_path / 'otb'}", "sequences=[Video7]")


def test_the_default_data_is_generated_and_its_validation_sequences_are_tracked(tmp_path, monkeypatch):
    write_got10k(tmp_path / "shapes", lengths=(3, 3))
    asked = []
    write_samples = "utils.tracking.sequences.write_samples"
    monkeypatch.setattr(write_samples, lambda *args: asked.append(args) or tmp_path / "shapes")
    (tmp_path / "shapes" / "train").mkdir()
    (tmp_path / "shapes" / "train" / "list.txt").write_text("")
    assert run(tmp_path / "run") == []  # python track.py, without arguments
    assert asked == [("moving_shapes", "data/generated_moving_shapes")]
    assert sorted(path.parent.name for path in (tmp_path / "run").glob("*/boxes.txt")) == [
        "GOT-10k_Val_000000", "GOT-10k_Val_000001",
    ]  # fmt: skip


def test_without_validation_sequences_the_training_ones_are_tracked(tmp_path):
    write_otb(tmp_path / "otb", lengths=(2, 2))
    arguments = ["data=otb", f"data.root={tmp_path / 'otb'}", "overlay=false"]
    run(tmp_path / "all_train", *arguments, "data.val_fraction=0")
    assert len(list((tmp_path / "all_train").glob("*/boxes.txt"))) == 2
    run(tmp_path / "half", *arguments, "data.val_fraction=0.5")
    assert len(list((tmp_path / "half").glob("*/boxes.txt"))) == 1


def test_a_sequence_starts_where_its_object_is_first_seen(tmp_path, caplog):
    frames, boxes = moving_object(7)
    write_frames(tmp_path / "root" / "late" / "img", frames)
    with_gap = boxes.copy()
    with_gap[:2] = np.nan
    write_lines(tmp_path / "root" / "late" / "groundtruth.txt", with_gap)
    arguments = ["data=folder_sequences", f"data.root={tmp_path / 'root'}", "data.val_fraction=1"]
    run(tmp_path / "run", *arguments)
    boxes_out = read_lines(tmp_path / "run" / "late" / "boxes.txt")
    assert boxes_out.shape == (7, 4) and np.isnan(boxes_out[:2]).all() and box_iou(boxes_out[2:], boxes[2:]).min() > 0.6
    np.testing.assert_allclose(boxes_out[2], boxes[2], atol=1e-3)
    record = read_tracks(tmp_path / "run" / "late")
    assert record["objects"][0]["boxes_xywh"][0] == [None] * 4 and record["times_s"][1] is None
    with caplog.at_level("INFO"):
        assert run(tmp_path / "benchmark", "mode=benchmark", *arguments) == []
    assert "late: its first 2 frames, before the object is there, are not scored" in caplog.messages
    row = read_table(tmp_path / "benchmark")["late", "siamfc"]
    ao = box_iou(boxes_out[3:], boxes[3:]).mean()
    assert row["frames"] == "5" and float(row["ao"]) == pytest.approx(ao, abs=1e-3)


def test_a_sequence_that_cannot_be_tracked_does_not_stop_the_others(tmp_path):
    write_otb(tmp_path / "otb", lengths=(3, 3, 3))
    (tmp_path / "otb" / "Video0" / "img" / "1.bmp").write_bytes(b"not a picture")
    (tmp_path / "otb" / "Video1" / "groundtruth_rect.txt").write_text("0,0,0,0\n0,0,0,0\n")
    (tmp_path / "otb" / "Video2" / "img" / "2.bmp").write_bytes(b"not a picture")
    for mode in ("track", "benchmark"):
        failures = run(tmp_path / mode, f"mode={mode}", "data=otb", f"data.root={tmp_path / 'otb'}")
        assert len(failures) == 3 and failures[0].startswith("Video0: ") and "1.bmp" in failures[0]
        assert failures[1] == "Video1: its groundtruth has no visible box; there is nothing to track"
        assert "Video2" in failures[2] and "2.bmp" in failures[2]
    assert {name for name, _ in read_table(tmp_path / "benchmark")} == {"Video2"}
    with pytest.raises(ValueError, match="(?s)no sequence could be tracked:.*Video0.*1.bmp"):
        run(tmp_path / "none", "mode=benchmark", "data=otb", f"data.root={tmp_path / 'otb'}", "sequences=[Video0]")


# ---------------------------------------------------------------------------------------------------------------------
# benchmark and evaluate


def test_otb_benchmark_has_the_toolkits_scores_from_the_same_files(tmp_path, caplog, monkeypatch):
    for name, plot in PLOTS.items():
        monkeypatch.setattr(drawing, name, plot)
    truths = write_otb(tmp_path / "otb")
    with caplog.at_level("INFO"):
        assert run(tmp_path / "run", "mode=benchmark", "data=otb", f"data.root={tmp_path / 'otb'}") == []
    dataset = Dataset(list(truths), [(None, truth.copy()) for truth in truths.values()])
    toolkit = experiment(ExperimentOTB, tmp_path / "run", dataset, nbins_iou=21, nbins_ce=51)
    report = toolkit.report(["siamfc", "still_box"])
    table = read_table(tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    assert len(table) == 4
    first_line = read_lines(tmp_path / "run" / "results" / "siamfc" / "Video1.txt")[0]
    np.testing.assert_allclose(first_line, truths["Video1"][0], atol=1e-3)  # counted as the dataset's files are
    for tracker in ("siamfc", "still_box"):
        theirs = {**report[tracker]["seq_wise"], "overall": report[tracker]["overall"]}
        for name, expected in theirs.items():
            ours = metrics[tracker] if name == "overall" else table[name, tracker]
            assert float(ours["success_auc"]) == pytest.approx(expected["success_score"], abs=1e-9)
            assert float(ours["precision_20"]) == pytest.approx(expected["precision_score"], abs=1e-9)
            assert float(ours["success_50"]) == pytest.approx(expected["success_rate"], abs=1e-9)
    assert metrics["siamfc"]["success_auc"] > metrics["still_box"]["success_auc"] + 0.05
    assert metrics["siamfc"]["ao"] > metrics["still_box"]["ao"] + 0.05 and metrics["siamfc"]["num_frames"] == 16

    times_s = read_lines(tmp_path / "run" / "results" / "siamfc" / "times" / "Video0_time.txt")[:, 0]
    assert float(table["Video0", "siamfc"]["fps"]) == pytest.approx(9 / times_s.sum())
    assert table["Video0", "still_box"]["fps"] == ""
    [printed] = [message for message in caplog.messages if "Video1" in message and "still_box" in message]
    assert printed.startswith("protocol got10k\n") and printed.count("mean of 2") == 2
    assert f"{metrics['siamfc']['success_auc']:.3f}" in printed
    for name in ("success.png", "precision.png", "scores/Video0.png", "scores/Video1.png"):
        assert read_image(tmp_path / "run" / name).std() > 5
    assert read_image(tmp_path / "run" / "sheets" / "Video0.png").shape == (2 * 246, 4 * 320, 3)  # 8 tiles


def test_got10k_benchmark_has_the_toolkits_scores_from_the_same_files(tmp_path, caplog):
    items = write_got10k(tmp_path / "got10k")
    arguments = ["mode=benchmark", "data=got10k", f"data.root={tmp_path / 'got10k'}", "data.train_folder=null"]
    with caplog.at_level("INFO"):
        assert run(tmp_path / "run", *arguments) == []
    assert (tmp_path / "run" / "results" / "siamfc" / "GOT-10k_Val_000001" / "GOT-10k_Val_000001_001.txt").is_file()
    resolution = str(FRAME_HW[::-1])
    dataset = Dataset(
        list(items),
        [(None, truth.copy(), {"cover": cover, "resolution": resolution}) for truth, cover in items.values()],
    )
    toolkit = experiment(ExperimentGOT10k, tmp_path / "run", dataset, subset="val", nbins_iou=101)
    report = toolkit.report(["siamfc", "still_box"])
    metrics = read_metrics(tmp_path / "run")
    for tracker in ("siamfc", "still_box"):
        ours, expected = metrics[tracker], report[tracker]["overall"]
        assert ours["ao_by_frame"] == pytest.approx(expected["ao"], abs=1e-9)
        assert ours["sr_50_by_frame"] == pytest.approx(expected["sr"], abs=1e-9)
        assert ours["sr_75_by_frame"] == pytest.approx(expected["succ_curve"][75], abs=1e-9)
        by_sequence = list(report[tracker]["seq_wise"].values())
        assert ours["ao"] == pytest.approx(np.mean([scores["ao"] for scores in by_sequence]), abs=1e-9)
        for name, scores in zip(items, by_sequence, strict=True):
            assert float(read_table(tmp_path / "run")[name, tracker]["ao"]) == pytest.approx(scores["ao"], abs=1e-9)
    assert abs(metrics["still_box"]["ao"] - metrics["still_box"]["ao_by_frame"]) > 1e-4  # not the same weights
    expected = f"over all frames AO {metrics['siamfc']['ao_by_frame']:.3f}"
    assert sum(expected in message and message.startswith("siamfc, ") for message in caplog.messages) == 1

    result_path = next((tmp_path / "run" / "results" / "siamfc").glob("*/*_001.txt"))
    result_path.with_name(result_path.name.replace("_001", "_002")).write_bytes(result_path.read_bytes())
    arguments[0] = "mode=evaluate"
    with caplog.at_level("INFO"):
        run(tmp_path / "again", *arguments, f"results=[{tmp_path / 'run' / 'results' / 'siamfc'}]")
    assert any("1 sequences were tracked several times; the first time" in message for message in caplog.messages)


def test_vot_benchmark_in_the_toolkits_layout(tmp_path):
    frames, boxes = moving_object(6)
    folder = write_frames(tmp_path / "vot" / "bag" / "color", frames).parent
    left, top, right, bottom = *(boxes[:, :2] + 1).T, *(boxes[:, :2] + boxes[:, 2:]).T
    np.savetxt(
        folder / "groundtruth.txt", np.stack([left, top, right, top, right, bottom, left, bottom], 1), "%.3f", ","
    )
    assert run(tmp_path / "run", "mode=benchmark", "data=vot", f"data.root={tmp_path / 'vot'}") == []
    lines = (tmp_path / "run" / "results" / "siamfc" / "unsupervised" / "bag" / "bag_001.txt").read_text().splitlines()
    assert len(lines) == 6 and lines[0] == "1" and lines[1].count(",") == 3
    row = read_table(tmp_path / "run")["bag", "siamfc"]
    assert float(row["success_auc"]) > 0.7 and row["frames"] == "6" and float(row["fps"]) > 0
    arguments = ["data=vot", f"data.root={tmp_path / 'vot'}", f"results=[{tmp_path / 'run' / 'results' / 'siamfc'}]"]
    run(tmp_path / "pysot", "mode=evaluate", "protocol=pysot", *arguments)
    assert float(read_table(tmp_path / "pysot")["bag", "siamfc"]["success_50"]) == 1  # the mark "1" is no miss


@pytest.mark.parametrize("protocol", ["got10k", "pysot", "pytracking"])
def test_groundtruth_against_itself_gives_20_of_21(tmp_path, protocol):
    write_otb(tmp_path / "otb", lengths=(4, 3))
    for number in range(2):  # as a tracker's folder
        (tmp_path / "truth").mkdir(exist_ok=True)
        lines = (tmp_path / "otb" / f"Video{number}" / "groundtruth_rect.txt").read_text()
        (tmp_path / "truth" / f"Video{number}.txt").write_text(lines)
    arguments = ["mode=evaluate", "data=otb", f"data.root={tmp_path / 'otb'}", f"results=[{tmp_path / 'truth'}]"]
    assert run(tmp_path / "run", *arguments, f"protocol={protocol}") == []
    for row in read_table(tmp_path / "run").values():
        assert float(row["success_auc"]) == pytest.approx(20 / 21, abs=1e-12) and row["fps"] == ""
        assert float(row["precision_20"]) == float(row["sr_75"]) == 1 and float(row["ao"]) == pytest.approx(1)
    assert not (tmp_path / "run" / "results").exists()


def test_evaluation_compares_folders_and_needs_no_checkpoint(tmp_path, monkeypatch):
    write_otb(tmp_path / "otb", lengths=(5, 4))
    data = ["data=otb", f"data.root={tmp_path / 'otb'}"]
    run(tmp_path / "first", "mode=benchmark", *data)
    monkeypatch.setattr(script, "load_model", None)
    results = tmp_path / "first" / "results"
    run(tmp_path / "again", "mode=evaluate", *data, f"results=[{results / 'siamfc'},{results / 'still_box'}]")
    assert read_table(tmp_path / "again") == read_table(tmp_path / "first")

    monkeypatch.setattr(script, "load_model", lambda checkpoint, seed: small_model())
    run(tmp_path / "both", "mode=benchmark", *data, f"results=[{results / 'siamfc'}]")
    table = read_table(tmp_path / "both")  # ours keeps its name, the other one is called by its path
    assert table["Video0", str(results / "siamfc")]["ao"] == read_table(tmp_path / "first")["Video0", "siamfc"]["ao"]
    assert table["Video0", "siamfc"]["ao"] != read_table(tmp_path / "first")["Video0", "siamfc"]["ao"]


def test_trackers_are_named_after_their_folders(tmp_path, monkeypatch):
    for name in ("a/csk", "b/csk", "b/kcf"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert list(name_trackers(["a/csk/", "b/kcf"], ("siamfc",))) == ["csk", "kcf"]
    assert list(name_trackers(["a/csk", "b/csk", "b/kcf"], ("kcf",))) == ["a/csk", "b/csk", "b/kcf"]
    (tmp_path / "siamfc").mkdir()  # another run's results, seen from there
    assert list(name_trackers(["siamfc"], ("siamfc",))) == [str(tmp_path / "siamfc")]
    with pytest.raises(FileNotFoundError, match="results has c/csk, which is no folder"):
        name_trackers(["c/csk"], ())


def test_groundtruth_shorter_than_the_frames_is_named_and_the_rest_not_scored(tmp_path, caplog):
    write_otb(tmp_path / "otb", lengths=(9, 6), num_lines=6)
    with caplog.at_level("INFO"):
        assert run(tmp_path / "run", "mode=benchmark", "data=otb", f"data.root={tmp_path / 'otb'}") == []
    assert "Video0: groundtruth ends after 6 of 9 frames; the others are not scored" in caplog.messages
    assert not any(message.startswith("Video1: groundtruth ends") for message in caplog.messages)
    assert len(read_lines(tmp_path / "run" / "results" / "siamfc" / "Video0.txt")) == 9  # tracked to the end
    (tmp_path / "short").mkdir()
    for name in ("Video0", "Video1"):  # as a tracker would write that stopped with the groundtruth
        lines = (tmp_path / "run" / "results" / "siamfc" / f"{name}.txt").read_text().splitlines()[:6]
        (tmp_path / "short" / f"{name}.txt").write_text("\n".join(lines))
    arguments = ["mode=evaluate", "data=otb", f"data.root={tmp_path / 'otb'}", f"results=[{tmp_path / 'short'}]"]
    run(tmp_path / "again", *arguments)
    ours, again = read_table(tmp_path / "run")["Video0", "siamfc"], read_table(tmp_path / "again")["Video0", "short"]
    assert ours["frames"] == again["frames"] == "6" and ours["success_auc"] == again["success_auc"]
    (tmp_path / "short" / "Video0.txt").write_text("\n".join(lines[:4]))
    with pytest.raises(ValueError, match="Video0.txt has 4 boxes, but Video0 groundtruth for 6 frames; track all"):
        run(tmp_path / "too_short", *arguments)
    run(tmp_path / "pytracking", *arguments, "protocol=pytracking")  # whose rule it is that these are misses
    row = read_table(tmp_path / "pytracking")["Video0", "short"]
    assert row["frames"] == "6" and float(row["success_50"]) == pytest.approx(4 / 6)
    assert float(row["ao"]) < float(again["ao"]) * 0.7


def test_a_test_set_with_first_boxes_alone_still_has_result_files(tmp_path, caplog):
    items = write_got10k(tmp_path / "got10k", lengths=(4,))
    [name] = items
    folder = (tmp_path / "got10k" / "val").rename(tmp_path / "got10k" / "test") / name
    write_lines(folder / "groundtruth.txt", items[name][0][:1])
    for path in folder.glob("*.label"):
        path.unlink()
    arguments = ["data=got10k", f"data.root={tmp_path / 'got10k'}", "data.train_folder=null", "data.val_folder=test"]
    with caplog.at_level("INFO"):
        assert run(tmp_path / "run", "mode=benchmark", *arguments) == []
    assert len(read_lines(tmp_path / "run" / "results" / "siamfc" / name / f"{name}_001.txt")) == 4
    assert not (tmp_path / "run" / "table.csv").exists()
    assert any(message.startswith("no sequence has groundtruth to evaluate with") for message in caplog.messages)


def test_a_missing_result_stops_before_anything_is_tracked(tmp_path, monkeypatch):
    write_otb(tmp_path / "otb", lengths=(2, 2))
    (tmp_path / "other").mkdir()
    write_lines(tmp_path / "other" / "Video0.txt", [[1, 2, 3, 4]] * 2)
    monkeypatch.setattr(script, "load_model", None)
    for mode in ("benchmark", "evaluate"):
        with pytest.raises(FileNotFoundError, match="other has no result of Video1"):
            run(
                tmp_path / mode, f"mode={mode}", "data=otb", f"data.root={tmp_path / 'otb'}",
                f"results=[{tmp_path / 'other'}]",
            )  # fmt: skip
    data = ["mode=benchmark", "data=otb", f"data.root={tmp_path / 'otb'}", f"results=[{tmp_path / 'other'}]"]
    write_lines(tmp_path / "other" / "Video1.txt", [[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="Video1.txt has 1 boxes, but Video1 groundtruth for 2 frames"):
        run(tmp_path / "short", *data)
    (tmp_path / "otb" / "Video1").rename(tmp_path / "otb" / "Video0_1")
    (tmp_path / "other" / "Video0.txt").rename(tmp_path / "other" / "Video0_1.txt")
    with pytest.raises(ValueError, match="Video0_1.txt would be the result of Video0 and of Video0_1"):
        run(tmp_path / "taken_twice", *data)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints and precision


def test_checkpoints(tmp_path):
    torch.manual_seed(3)
    model = SiamFC(score_bias=True)
    save_checkpoint(tmp_path / "best.pt", {"format": 1, "model": model.state_dict(), "config": {}})
    torch.save(SiamFC(score_bias=False).state_dict(), tmp_path / "siamfc_alexnet_e50.pth")
    loaded = load_model(str(tmp_path / "best.pt"), 0).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    assert load_model(str(tmp_path / "siamfc_alexnet_e50.pth"), 0).score_bias is None
    weight, same, other = (load_model("random", seed).backbone.conv1[0].weight for seed in (0, 0, 1))
    assert torch.equal(weight, same) and not torch.equal(weight, other)
    save_checkpoint(tmp_path / "other.pt", {"format": 1, "model": {"weight": torch.zeros(3)}, "config": {}})
    with pytest.raises(ValueError, match="other.pt does not hold the weights of SiamFC"):
        load_model(str(tmp_path / "other.pt"), 0)
    with pytest.raises(FileNotFoundError, match="missing.pt does not exist"):
        load_model("missing.pt", 0)


def test_the_bundled_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "BUNDLED_CHECKPOINT", tmp_path / "siamfc_alexnet.pt")
    with pytest.raises(FileNotFoundError, match="the bundled .* does not exist; give checkpoint=<best.pt>"):
        load_model("auto", 0)
    model = SiamFC(score_bias=False).half()
    save_checkpoint(tmp_path / "siamfc_alexnet.pt", {"format": 1, "model": model.state_dict(), "config": {}})
    weight = load_model("auto", 0).backbone.conv5[0].weight
    assert weight.dtype == torch.float32 and torch.equal(weight, model.backbone.conv5[0].weight.float())


def test_parity_is_fp32_where_precision_is_auto(monkeypatch):
    def built(*overrides):
        return script.build_tracker(read_settings(Config, compose_config(*overrides))).dtype

    # as on a device that computes in bf16
    monkeypatch.setattr("utils.run.choose_precision", lambda name, device: "bf16" if name == "auto" else name)
    assert built() == torch.bfloat16
    assert built("tracker.mode=parity") == torch.float32 == built("precision=fp32")
    with pytest.raises(ValueError, match="precision is bf16; tracker.mode=parity computes in fp32"):
        built("tracker.mode=parity", "precision=bf16")


# ---------------------------------------------------------------------------------------------------------------------
# the window


def test_select_and_show_need_a_screen(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(script, "load_model", None)
    with pytest.raises(ValueError, match=r"box=select opens a window, which matplotlib \(backend agg\) cannot do here"):
        run(tmp_path / "select", f"input={folder / 'frames'}", "box=select")
    with pytest.raises(ValueError, match="show=true opens a window"):
        run(tmp_path / "show", f"input={folder / 'frames'}", "show=true")


def test_a_box_is_drawn_with_the_mouse(folder, clip, tmp_path, monkeypatch):
    from matplotlib import pyplot
    from matplotlib.backend_bases import KeyEvent, MouseEvent

    pyplot.switch_backend("agg")
    left, top, width, height = clip[1][0]

    def draw(block):
        """A user who draws from the box's corner to the opposite one, and presses Enter."""
        canvas = pyplot.gcf().canvas
        (ax,) = pyplot.gcf().axes
        canvas.draw()
        first = ax.transData.transform([left - 0.5, top - 0.5])  # the first pixel's centre is at (0, 0)
        last = ax.transData.transform([left + width - 0.5, top + height - 0.5])
        MouseEvent("button_press_event", canvas, *first, button=1)._process()
        MouseEvent("motion_notify_event", canvas, *last, button=1)._process()
        MouseEvent("button_release_event", canvas, *last, button=1)._process()
        KeyEvent("key_press_event", canvas, "enter")._process()
        assert not pyplot.get_fignums()

    monkeypatch.setattr(pyplot, "show", draw)
    monkeypatch.setattr(window, "check_screen", lambda key: None)
    run(tmp_path / "run", f"input={folder / 'frames'}", "box=select", "overlay=false")
    boxes = read_lines(tmp_path / "run" / "boxes.txt")
    np.testing.assert_allclose(boxes[0], clip[1][0], atol=0.5)
    assert box_iou(boxes, clip[1]).min() > 0.6
    monkeypatch.setattr(pyplot, "show", lambda block: pyplot.close("all"))
    with pytest.raises(ValueError, match="box=select: no box was drawn"):
        window.select_box(clip[0][0], "a title")


def test_showing_changes_nothing_and_a_closed_window_stops_nothing(folder, tmp_path, monkeypatch):
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    shown = []

    def pause(seconds):
        (ax,) = pyplot.gcf().axes
        shown.append(np.array(ax.images[0].get_array()))
        assert len(ax.images) == 1
        if len(shown) == 5:
            pyplot.close("all")  # the user has seen enough

    monkeypatch.setattr(pyplot, "pause", pause)
    monkeypatch.setattr(window, "check_screen", lambda key: None)
    run(tmp_path / "run", f"input={folder / 'frames'}", "show=true", "overlay=false")
    run(tmp_path / "quiet", f"input={folder / 'frames'}", "overlay=false")
    assert len(shown) == 5 and shown[0].shape == (*FRAME_HW, 3) and (shown[0] != shown[1]).any()
    assert (tmp_path / "run" / "boxes.txt").read_text() == (tmp_path / "quiet" / "boxes.txt").read_text()
    assert not pyplot.get_fignums()


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mode=fast"], "mode is fast; must be one of track, benchmark, evaluate"),
        (["box_origin=2"], "box_origin is 2; must be 0 or 1"),
        (["fps=0"], "fps is 0; must be above 0"),
        (["resume=outputs/track/1"], "resume is outputs/track/1; track.py goes on with no run"),
        (["fps=many"], "fps is 'many'; must be a number"),
        (["protocol=otb"], "protocol is otb; must be one of got10k, pysot, pytracking"),
        (["results=[a]"], r"results= is given but mode is track, which does not use it: .* mode=benchmark or mode=ev"),
        (["mode=evaluate"], "mode=evaluate needs results="),
        (["mode=benchmark", "results=a"], "results is 'a'; must be a list, each text"),
        (["sequences=Video0"], "sequences is 'Video0'; must be a list or null"),
        (["sequences=[]"], r"sequences is \[\]; name some"),
        (["box=[1,2,3,4]"], "box= is given but input= is not: add input="),
        (["boxes=[[1,2,3,4]]"], "boxes= is given but input= is not"),
        (["input=frames", "box=[1,2,3,4]", "boxes=[[1,2,3,4]]"], "box= and boxes= are both given"),
        (["input=frames", "sequences=[a]"], "sequences= is given together with input="),
        (["input=frames", "box=[1,2,3]"], r"box is \[1, 2, 3\]; must be \[x, y, width, height\] px"),
        (["input=frames", "box=[1,2,3,wide]"], r"box is \[1, 2, 3, 'wide'\]; must be"),
        (["input=frames", "boxes=[[1,2,3,4],[1,2]]"], r"boxes has \[1, 2\]; must be"),
        (["input=frames", "boxes=[1,2,3,4]"], "boxes has 1; must be"),
        (["input=frames", "boxes=[]"], r"boxes is \[\]; must be"),
        (["input=frames", "box=5"], "box is 5; must be a list or text or null"),
        (["input=frames", "box=[30,30,0,20]"], r"box 1 of 1 is \[30, 30, 0, 20\]; its width and height must be above"),
        (["input=frames", "box=[300,30,20,20]"], "box 1 of 1 .* lies outside the first frame of 260 x 200 px"),
        (["input=frames", "boxes=[[30,30,9,9],[30,-40,9,9]]"], "box 2 of 2 .* lies outside the first frame"),
        (["input=frames", "box=nowhere.txt"], "box is nowhere.txt, which is no file"),
        (["input=frames", "boxes=nowhere.txt"], "boxes is nowhere.txt, which is no file .*; must be"),
        (
            ["input=frames", "response=true", "overlay=false"],
            "response is true, which is drawn into the overlay",
        ),
        (["input=frames", "tracker.lost_score=.nan"], "tracker.lost_score is nan; must be finite"),
        (["input=frames", "box=words.txt"], "words.txt, line 1, is 'no box'"),
        (["input=frames", "box=unknown.txt"], "unknown.txt has no box in its first line"),
        (["input=elsewhere/frames"], "elsewhere/frames comes without a groundtruth file; give the first frame's box"),
        (["input=nowhere"], "no folder nowhere"),
        (["input=/dev/video17"], "input is /dev/video17, which is no folder; the camera of that number is camera:17"),
        (["input=words.txt"], "words.txt cannot be opened as a video"),
        (["input=frames", "tracker.mode=slow"], "tracker.mode is slow; must be one of fast, parity, sam2"),
        (["input=frames", "tracker.scale_num=2.5"], "tracker.scale_num is 2.5; must be a whole number"),
        (["input=frames", "device=tpu"], "device is tpu; must be"),
        (["data=otb", "data.root=nowhere"], "data.root nowhere is not a folder"),
        (["data=otb", "+data.colour=red", "data.root=frames"], "unknown key data.colour"),
        (["data=otb", "data.format=coco", "data.root=frames"], "data.format is 'coco'; must be one of got10k, imagen"),
        (["mode=benchmark", "data=otb", "data.root=otb", "results=[gone]"], "results has gone, which is no folder"),
    ],
)
def test_bad_input_is_one_clear_line(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    Path("words.txt").write_text("no box\n")
    Path("unknown.txt").write_text("nan,nan,nan,nan\n1,2,3,4\n")
    if not Path("elsewhere").is_dir():
        write_frames(Path("elsewhere/frames"), [np.zeros((20, 30, 3), np.uint8)])
        write_otb(Path("otb"), lengths=(1,))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        run(tmp_path / "run", *arguments)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "run").glob("*.txt")) and not list((tmp_path / "run").glob("*.mp4*"))


def test_every_mode_refuses_the_keys_of_others():
    """A key that says what to do is used by a mode, or refused in it."""
    given = {
        "checkpoint": "best.pt", "input": "frames", "box": [1, 2, 3, 4], "boxes": [[1, 2, 3, 4]], "sequences": ["a"],
        "show": True, "response": True, "masks": True, "write": ["mot"], "objects": "o.json", "results": ["a"],
        "box_origin": 1, "protocol": "pysot",
    }  # fmt: skip
    assert given.keys() == script.MODES_OF_KEY.keys()
    for key, modes in script.MODES_OF_KEY.items():
        for mode in {"track", "benchmark", "evaluate"} - set(modes):
            with pytest.raises(ValueError, match=f"{key}= is given but mode is {mode}"):
                check_settings(read_settings(Config, compose_config() | {"mode": mode, key: given[key]}))


def test_a_typo_names_the_key(tmp_path):
    for typo in ("trackr.mode=fast", "tracker.scale_nums=3", "boks=[1,2,3,4]", "data=obt"):
        with pytest.raises(Exception, match="trackr|scale_nums|boks|obt"):
            tiny.compose_config("track", typo)  # Hydra itself
    with pytest.raises(ValueError, match="unknown key boks"):
        track(compose_config() | {"boks": None}, tmp_path)
    config = compose_config()
    with pytest.raises(ValueError, match="unknown key tracker.lost"):
        track(config | {"tracker": config["tracker"] | {"lost": 1}}, tmp_path)


def test_the_command_reports_bad_input_in_one_line(tmp_path, capfd):
    capfd.readouterr()
    code = run_main(tmp_path / "bad", "input=missing")
    assert code.startswith("error: no folder missing") and "\n" not in code
    assert capfd.readouterr() == ("", "")


def test_a_run_folder_is_used_once(folder, tmp_path):
    run(tmp_path / "run", f"input={folder / 'frames'}", "overlay=false")
    with pytest.raises(FileExistsError, match="a run needs a folder of its own"):
        track(compose_config(f"input={folder / 'frames'}", "overlay=false"), tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# the real command, long videos, real data


@pytest.mark.slow
def test_the_command_with_the_real_network_and_random_weights(clip, tmp_path):
    write_frames(tmp_path / "frames", clip[0][:4])
    write_lines(tmp_path / "frames" / "groundtruth.txt", clip[1])
    arguments = "device=cpu", "input=frames", "checkpoint=random", "hydra.run.dir=run"
    done = run_python(tiny.ROOT / "track.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "end to end" in done.stdout and "p95" in done.stdout and "Traceback" not in done.stderr
    assert "4/4" in done.stderr  # the progress bar
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".hydra", "track.log", "run.json", "boxes.txt", "tracks.json", "overlay.mp4"
    }  # fmt: skip
    helped = run_python(tiny.ROOT / "track.py", "--help", cwd=tmp_path)
    assert helped.stdout.startswith("Track objects with SiamFC") and helped.returncode == 0


MEASURE = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import test_track
test_track.script.load_model = lambda checkpoint, seed: test_track.small_model()
statm = Path("/proc/self/status")
used = []
track_frames = test_track.script.track_frames

def watched(*args):
    for found in track_frames(*args):
        if found.index in (300, 1599):
            peak = next(line for line in statm.read_text().splitlines() if line.startswith("VmHWM"))
            used.append(int(peak.split()[1]) / 1024)
        yield found

test_track.script.track_frames = watched
quick = ["tracker.scale_num=1", "tracker.response_up=2"]
failures = test_track.run(Path(sys.argv[2]), f"input={sys.argv[1]}", "box=[20,15,20,16]", *quick)
assert failures == [] and len(used) == 2, (failures, used)
print(used[1] - used[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc/self/status")
    noise = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8), (138, 106))
    with write_video(tmp_path / "long.mp4", (96, 128), 25) as video:
        for index in range(1600):
            shift = round(5 + 4 * np.sin(index / 20))
            video.add(np.ascontiguousarray(noise[shift : shift + 96, shift : shift + 128]))
    arguments = [tmp_path / "long.mp4", tmp_path / "run", tiny.ROOT, tiny.ROOT / "tests"]
    done = run_python("-c", MEASURE, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1]) < 30, done.stdout  # MiB; its frames are 56
    assert count_frames(tmp_path / "run" / "overlay.mp4") == len(read_lines(tmp_path / "run" / "boxes.txt")) == 1600


def test_groundtruth_of_real_otb_against_itself(data_root, tmp_path):
    root = data_root / "OTB100"
    if not root.is_dir():
        pytest.skip(f"real data: no {root}")
    (tmp_path / "truth").mkdir()
    for path in root.glob("*/groundtruth_rect.txt"):
        (tmp_path / "truth" / f"{path.parent.name}.txt").write_bytes(path.read_bytes())
    arguments = ["mode=evaluate", "data=otb", f"data.root={root}", f"results=[{tmp_path / 'truth'}]"]
    names = sorted(path.stem for path in (tmp_path / "truth").glob("*.txt"))
    run(tmp_path / "run", *arguments, f"sequences=[{','.join(names)}]")
    table = read_table(tmp_path / "run")
    assert len(table) == len(names) > 0
    assert all(float(row["success_auc"]) == pytest.approx(20 / 21, abs=1e-12) for row in table.values())
