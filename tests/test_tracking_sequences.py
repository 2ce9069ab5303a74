"""utils/tracking/sequences.py: groundtruth files, layouts, splits, the kept list, result files; against the GOT-10k
toolkit where it reads the same."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import six  # noqa: F401  the toolkit imports it without saying so in its requirements
from got10k.datasets import OTB, VOT, GOT10k, ImageNetVID
from got10k.experiments import ExperimentGOT10k, ExperimentOTB
from got10k.experiments.vot import ExperimentVOT
from options import CONFIGS, read_option
from PIL import Image

from utils.images import write_image, write_label_map
from utils.samples import moving_shapes
from utils.tracking import sequences as datasets

BOXES = np.array([[3, 4, 20, 10], [3.5, 4.25, 21, 10.5], [-2, 0, 19.125, 11], [120, 77, 8, 9]])


def data_keys(name: str, root: Path, **changes) -> dict:
    """The keys of configs/tracking/data/<name>.yaml, with a root and changes, as a command line gives them."""
    keys = read_option("sam2" if name in ("coco", "label_map", "masks_per_file") else "tracking", "data", name)
    keys.pop("generate", None)
    assert not set(changes) - set(keys), changes
    return {**keys, "root": str(root), **changes}


def split(name: str, root: Path, **changes):
    return datasets.split_sequences(**data_keys(name, root, **changes))


def list_all(name: str, root: Path, **changes):
    return datasets.list_sequences(**data_keys(name, root, **changes))


def names(sequences) -> list[str]:
    return [sequence.name for sequence in sequences]


def videos(sequences) -> list[str]:
    return [sequence.video for sequence in sequences]


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory) -> Path:
    """A picture of 40 x 30 px, to be copied as any frame."""
    path = tmp_path_factory.mktemp("jpeg") / "frame.jpg"
    write_image(path, np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    return path


def write_frames(folder: Path, jpeg: Path, num_frames: int, first: int = 1, digits: int = 4) -> None:
    folder.mkdir(parents=True)
    data = jpeg.read_bytes()
    for number in range(first, first + num_frames):
        (folder / f"{number:0{digits}d}.jpg").write_bytes(data)


def some_boxes(num_boxes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.round(np.concatenate([rng.uniform(-5, 200, (num_boxes, 2)), rng.uniform(3, 80, (num_boxes, 2))], 1), 3)


def write_lines(path: Path, boxes: np.ndarray, separator: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(separator.join(f"{value:g}" for value in box) + "\n" for box in boxes))


# ---------------------------------------------------------------------------------------------------------------------
# groundtruth files


@pytest.mark.parametrize("separator", [",", "\t", " ", ";", ", ", "  ", " ; ", ",\t "])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_boxes_are_read_whatever_separates_them(tmp_path, separator, line_end):
    for index, (mark, tail, indent) in enumerate(
        [("", "", ""), ("\ufeff", line_end * 3 + " ", " "), ("", separator, "")]
    ):
        text = mark + line_end.join(indent + separator.join(f"{value:g}" for value in box) for box in BOXES) + tail
        path = tmp_path / f"{index}.txt"
        path.write_bytes(text.encode())
        boxes_xywh = datasets.read_boxes(path, 0)
        assert boxes_xywh.dtype == np.float64 and np.array_equal(boxes_xywh, BOXES)
        assert np.array_equal(datasets.read_boxes(path, 1), BOXES - [1, 1, 0, 0])


def test_separators_columns_and_missing_boxes_may_mix(tmp_path):
    path = tmp_path / "groundtruth.txt"
    path.write_text("1,2,3,4\n1\t2 3;4\n1e1,2.5,3,4\nNaN,NaN,NaN,NaN\nnan 2 3 4\n10,20,30,20,30,40,10,40\n")
    boxes_xywh = datasets.read_boxes(path, 0)
    assert np.array_equal(boxes_xywh[:3], [[1, 2, 3, 4], [1, 2, 3, 4], [10, 2.5, 3, 4]])
    assert np.isnan(boxes_xywh[3:5]).all()
    assert np.allclose(boxes_xywh[5], [9.5, 19.5, 21, 21])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3,4\nx,y,w,h\n", "line 2, is 'x,y,w,h'"),
        ("1,2,3,4\n1,2,3\n", "line 2, has 3 numbers"),
        ("1,2,3,4\n\n1,2,3,4\n", "line 2, is ''"),
        ("1,2,3,4,5\n", "line 1, has 5 numbers"),
        ("1,,3,4\n1,2,inf,4\n", "line 1"),
        ("1,2,inf,4\n", "line 1.*infinity"),
        ("\n \n", "is empty"),
        ("", "is empty"),
    ],
)
def test_a_faulty_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "boxes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"boxes.txt.*{message}"):
        datasets.read_boxes(path, 0)


def test_what_is_no_text_file_is_named(tmp_path, jpeg):
    with pytest.raises(ValueError, match="frame.jpg is not text in UTF-8"):
        datasets.read_boxes(jpeg, 0)
    with pytest.raises(FileNotFoundError, match="gone.txt"):
        datasets.read_boxes(tmp_path / "gone.txt", 0)


def test_corners_become_the_toolkits_boxes():
    rng = np.random.default_rng(0)
    center, turn = rng.uniform(0, 300, (200, 1, 2)), rng.uniform(0, np.pi, 200)
    half = rng.uniform(2, 60, (200, 1, 2)) * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    axes = np.stack([np.stack([np.cos(turn), -np.sin(turn)], 1), np.stack([np.sin(turn), np.cos(turn)], 1)], 1)
    corners = (center + half @ axes).reshape(200, 8)
    assert np.abs(datasets.corners_to_boxes(corners) - VOT._corner2rect(None, corners)).max() < 1e-9
    upright = np.array([[10.0, 20, 30, 20, 30, 40, 10, 40]])
    assert np.allclose(datasets.corners_to_boxes(upright), [[9.5, 19.5, 21, 21]])
    assert np.isfinite(datasets.corners_to_boxes(np.ones((1, 8)))).all()  # all corners in one point


def test_boxes_are_written_as_they_are_read(tmp_path):
    for box_origin in (0, 1):
        datasets.write_boxes(tmp_path / "boxes.txt", BOXES, box_origin)
        assert np.array_equal(datasets.read_boxes(tmp_path / "boxes.txt", box_origin), BOXES)
        assert np.array_equal(np.loadtxt(tmp_path / "boxes.txt", delimiter=","), BOXES + [box_origin, box_origin, 0, 0])
    datasets.write_boxes(tmp_path / "nan.txt", np.full((2, 4), np.nan), 1)
    assert np.isnan(datasets.read_boxes(tmp_path / "nan.txt", 1)).all()


def test_groundtruth_is_found_in_the_folder_above_and_beside_a_video(tmp_path):
    folder = tmp_path / "Crossing" / "img"
    folder.mkdir(parents=True)
    assert datasets.find_groundtruth(folder) is None
    for path in [
        tmp_path / "Crossing" / "groundtruth_rect.txt",
        tmp_path / "Crossing" / "groundtruth.txt",
        tmp_path / "Crossing" / "img.txt",
        folder / "groundtruth.txt",
    ]:
        path.write_text("1,2,3,4\n")
        assert datasets.find_groundtruth(folder) == path
        path.unlink()
    video, truth = tmp_path / "clip.mp4", tmp_path / "clip.txt"
    video.write_bytes(b"")
    truth.write_text("1,2,3,4\n")
    assert datasets.find_groundtruth(video) == truth


# ---------------------------------------------------------------------------------------------------------------------
# GOT-10k


@pytest.fixture(scope="module")
def shapes_root(tmp_path_factory) -> Path:
    """The generated sample, with fewer and smaller videos."""
    folder = tmp_path_factory.mktemp("shapes") / "moving_shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving_shapes, "MOVING_SHAPES_FRAMES", 20)
        patch.setattr(moving_shapes, "MOVING_SHAPES_HW", (160, 200))
        moving_shapes.write_moving_shapes(folder, {"train": 4, "val": 2})
    return folder


def test_got10k_is_listed_as_the_toolkit_lists_it(shapes_root):
    for subset, sequences in zip(("train", "val"), split("moving_shapes", shapes_root), strict=True):
        toolkit = GOT10k(str(shapes_root), subset, return_meta=True)
        assert names(sequences) == toolkit.seq_names
        for sequence, (image_files, boxes, meta) in zip(sequences, toolkit, strict=True):
            assert [str(path) for path in sequence.frame_paths] == image_files
            assert str(sequence.frame_path(3)) == image_files[3] and len(sequence) == len(image_files) == 20
            is_box = boxes[:, 2] > 0
            assert np.array_equal(datasets.file_coordinates(sequence.boxes_xywh, 1), boxes)
            assert np.array_equal(sequence.cover, meta["cover"])
            assert str(sequence.frame_wh) == meta["resolution"] and sequence.frame_wh == (200, 160)
            assert np.array_equal(sequence.visible, is_box & (meta["cover"] > 0) & (meta["absence"] == 0))
            assert sequence.num_annotated == 20 and sequence.box_origin == 1
    away = list_all("moving_shapes", shapes_root)[2]
    assert np.flatnonzero(~away.visible).tolist() == [12, 13, 14, 15, 16, 17]


def test_got10k_leaves_out_lists_and_splits(tmp_path, shapes_root):
    root = tmp_path / "GOT-10k"
    shutil.copytree(shapes_root, root)
    keys = read_option("tracking", "data", "got10k")
    broken = ["GOT-10k_Train_008628", "GOT-10k_Train_008630", "GOT-10k_Train_009058", "GOT-10k_Train_009059"]
    assert keys["leave_out"] == broken and keys["box_origin"] == 1
    for name in broken + ["GOT-10k_Train_009060"]:
        shutil.copytree(root / "train" / "moving_shapes_train_000001", root / "train" / name)
    (root / "train" / "list.txt").unlink()  # then the folders are the list
    train, val = split("got10k", root)
    assert "GOT-10k_Train_009060" in names(train) and not set(broken) & set(names(train)) and len(train) == 5
    assert names(val) == ["moving_shapes_val_000001", "moving_shapes_val_000002"]
    assert split("got10k", root, train_folder=None)[0] == []
    train, val = split("got10k", root, val_folder=None, val_fraction=0.4)
    assert len(train) == 3 and len(val) == 2
    picked, val = split("got10k", root, train_sequences=["moving_shapes_train_000002"])
    assert names(picked) == ["moving_shapes_train_000002"] and len(val) == 2
    with pytest.raises(ValueError, match="both null"):
        split("got10k", root, train_folder=None, val_folder=None)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        split("got10k", root, val_folder="nowhere")


def test_got10k_test_set_has_a_first_box_only(tmp_path, jpeg):
    folder = tmp_path / "test" / "GOT-10k_Test_000001"
    write_frames(folder, jpeg, 5, digits=8)
    write_lines(folder / "groundtruth.txt", BOXES[:1])
    train, [sequence] = split("got10k", tmp_path, train_folder=None, val_folder="test")
    assert train == [] and len(sequence) == 5 and sequence.num_annotated == 1
    assert np.array_equal(sequence.boxes_xywh[0], BOXES[0] - [1, 1, 0, 0]) and np.isnan(sequence.boxes_xywh[1:]).all()
    assert sequence.visible.tolist() == [True, False, False, False, False] and sequence.cover is None
    assert sequence.frame_wh == (40, 30)  # from the first frame, where no meta_info.ini says


def test_got10k_labels_hide_an_object_that_has_a_box(tmp_path, jpeg):
    folder = tmp_path / "train" / "one"
    write_frames(folder, jpeg, 4, digits=8)
    write_lines(folder / "groundtruth.txt", np.abs(BOXES) + 1)
    (folder / "cover.label").write_text("8\n0\n1\n8\n")
    (folder / "absence.label").write_text("0\n0\n0\n1\n")
    [sequence], _ = split("got10k", tmp_path, val_folder=None, val_fraction=0)
    assert sequence.visible.tolist() == [True, False, True, False] and sequence.cover.tolist() == [8, 0, 1, 8]


def test_faulty_sequences_stop_or_are_left_out(tmp_path, shapes_root, capsys):
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    too_long = root / "train" / "moving_shapes_train_000001" / "groundtruth.txt"
    too_long.write_text(too_long.read_text() + "1,2,3,4\n")
    (root / "val" / "moving_shapes_val_000001" / "cover.label").write_text("8\n8\n")
    (root / "val" / "moving_shapes_val_000002" / "groundtruth.txt").unlink()
    with pytest.raises(ValueError, match="(21 lines|cover.label).*on_bad"):
        split("moving_shapes", root)
    train, val = split("moving_shapes", root, on_bad="skip")
    assert len(train) == 3 and val == []
    printed = capsys.readouterr().out
    assert printed.count("left out") == 3 and "cover.label has 2 entries" in printed
    shutil.rmtree(root / "train" / "moving_shapes_train_000002")  # list.txt names it
    shutil.copy(shapes_root / "train" / "moving_shapes_train_000001" / "groundtruth.txt", too_long)
    with pytest.raises(FileNotFoundError, match="moving_shapes_train_000002"):
        split("moving_shapes", root)


# ---------------------------------------------------------------------------------------------------------------------
# OTB, VOT


def write_otb(root: Path, jpeg: Path) -> Path:
    lengths = {"Crossing": 6, "Jogging": 5, "Human4": 4, "Football1": 76, "Freeman4": 285, "David": 772, "BlurCar1": 3}
    for name, num_frames in lengths.items():
        write_frames(root / name / "img", jpeg, num_frames, first=247 if name == "BlurCar1" else 1)
    write_lines(root / "Crossing" / "groundtruth_rect.txt", some_boxes(6))
    write_lines(root / "Jogging" / "groundtruth_rect.1.txt", some_boxes(5, 1), "\t")
    write_lines(root / "Jogging" / "groundtruth_rect.2.txt", some_boxes(5, 2), " ")
    (root / "Human4" / "groundtruth_rect.1.txt").write_text("\n")
    write_lines(root / "Human4" / "groundtruth_rect.2.txt", some_boxes(4, 3))
    for seed, (name, num_boxes) in enumerate(
        {"Football1": 74, "Freeman4": 283, "David": 471, "BlurCar1": 3}.items(), 4
    ):
        write_lines(root / name / "groundtruth_rect.txt", some_boxes(num_boxes, seed))
    return root


def test_otb_is_listed_as_the_toolkit_lists_it(tmp_path, jpeg, monkeypatch):
    root = write_otb(tmp_path / "OTB", jpeg)
    folders = sorted(path.name for path in root.iterdir())
    monkeypatch.setattr(OTB, "_OTB__version_dict", {"here": folders})
    toolkit = OTB(str(root), "here", download=False)
    train, sequences = split("otb", root)
    assert train == []
    assert sorted(names(sequences)) == sorted(toolkit.seq_names)
    assert {"Human4", "Jogging.2"} <= set(names(sequences))
    for sequence in sequences:
        image_files, boxes = toolkit[sequence.name]
        assert [str(path) for path in sequence.frame_paths] == image_files
        assert np.abs(datasets.file_coordinates(sequence.boxes_xywh, 1) - boxes).max() < 1e-12
        assert sequence.num_annotated == len(boxes) and sequence.box_origin == 1
    david = datasets.choose_sequences(sequences, ["David"])[0]
    assert (david.frame_names[0], david.frame_names[-1], len(david)) == ("0300.jpg", "0770.jpg", 471)
    for number in range(1, 300):  # a copy that holds these frames only
        (root / "David" / "img" / f"{number:04d}.jpg").unlink()
    (root / "David" / "img" / "0771.jpg").unlink()
    (root / "David" / "img" / "0772.jpg").unlink()
    assert datasets.choose_sequences(split("otb", root)[1], ["David"])[0].frame_names == david.frame_names


def test_sequences_are_chosen_by_any_of_their_names(tmp_path, jpeg):
    for name in ("Crossing", "Jogging"):
        write_frames(tmp_path / name / "img", jpeg, 2)
        write_lines(tmp_path / name / "groundtruth_rect.1.txt", BOXES[:2])
    write_lines(tmp_path / "Jogging" / "groundtruth_rect.2.txt", BOXES[:2])
    sequences = list_all("otb", tmp_path)
    for name in ("Jogging.2", "Jogging-2", "Jogging_2"):
        assert names(datasets.choose_sequences(sequences, [name, "Crossing"])) == ["Jogging.2", "Crossing"]
    (tmp_path / "Crossing").rename(tmp_path / "e\u0301te\u0301")  # as macOS writes it
    assert names(datasets.choose_sequences(list_all("otb", tmp_path), ["\xe9t\xe9"])) == ["e\u0301te\u0301"]
    with pytest.raises(ValueError, match="sequences names Jogging.2 twice"):
        datasets.choose_sequences(sequences, ["Jogging-2", "Jogging.2"])
    with pytest.raises(ValueError, match="'Joging.2'.*Jogging.1"):
        datasets.choose_sequences(sequences, ["Joging.2"])


def test_groundtruth_shorter_than_the_frames(tmp_path, jpeg):
    write_frames(tmp_path / "Short" / "img", jpeg, 7)
    write_lines(tmp_path / "Short" / "groundtruth_rect.txt", BOXES)
    _, [sequence] = split("otb", tmp_path)
    assert len(sequence) == 7 and sequence.num_annotated == 4 and sequence.boxes_xywh.shape == (7, 4)
    assert sequence.visible.tolist() == [True] * 4 + [False] * 3 and np.isnan(sequence.boxes_xywh[4:]).all()


def test_groundtruth_longer_than_the_frames_is_named(tmp_path, jpeg):
    write_frames(tmp_path / "Long" / "img", jpeg, 3)
    write_lines(tmp_path / "Long" / "groundtruth_rect.txt", BOXES)
    with pytest.raises(ValueError, match="Long has 4 lines of groundtruth for 3 frames"):
        split("otb", tmp_path)


def test_vot_in_both_of_its_layouts(tmp_path, jpeg):
    corners = np.array(
        [[10, 20, 30, 20, 30, 40, 10, 40], [10, 21, 29, 23, 28, 40, 9, 38.5], [0, 5, 5, 0, 10, 5, 5, 10]]
    )
    write_frames(tmp_path / "bag", jpeg, 3, digits=8)
    write_frames(tmp_path / "book" / "color", jpeg, 4, digits=8)
    write_lines(tmp_path / "bag" / "groundtruth.txt", corners)
    write_lines(tmp_path / "book" / "groundtruth.txt", BOXES)
    train, [bag, book] = split("vot", tmp_path)
    assert train == [] and (bag.name, book.name) == ("bag", "book") and bag.box_origin == 1
    assert np.allclose(datasets.file_coordinates(bag.boxes_xywh, 1), VOT._corner2rect(None, corners))
    assert np.array_equal(datasets.file_coordinates(book.boxes_xywh, 1), BOXES)
    assert book.frame_paths[0] == tmp_path / "book" / "color" / "00000001.jpg"


# ---------------------------------------------------------------------------------------------------------------------
# ImageNet VID, DAVIS, folders


def write_vid(root: Path, jpeg: Path) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train/ILSVRC2015_VID_train_0000/ILSVRC2015_train_00010001", "val/ILSVRC2015_val_00000000"):
        write_frames(root / "Data" / "VID" / part, jpeg, 6, first=0, digits=6)
        for frame_file in (root / "Data" / "VID" / part).iterdir():
            frame_file.rename(frame_file.with_suffix(".JPEG"))
        (root / "Annotations" / "VID" / part).mkdir(parents=True)
        tracks = {0: [0, 1, 2, 3, 4, 5], 1: [1, 2, 4], 2: [3]}
        for frame in range(6):
            objects = ""
            for track, present in tracks.items():
                if frame in present:
                    left, top, right, bottom = rng.integers(0, 20, 2).tolist() + rng.integers(20, 40, 2).tolist()
                    objects += (
                        f"<object><trackid>{track}</trackid><name>n1</name><bndbox><xmax>{right}</xmax><xmin>{left}"
                        f"</xmin><ymax>{bottom}</ymax><ymin>{top}</ymin></bndbox><occluded>0</occluded></object>"
                    )
            text = f"<annotation><size><width>40</width><height>30</height></size>{objects}</annotation>"
            (root / "Annotations" / "VID" / part / f"{frame:06d}.xml").write_text(text)
    return root


def test_imagenet_vid_has_the_toolkits_boxes(tmp_path, jpeg, monkeypatch):
    root = write_vid(tmp_path / "ILSVRC2015", jpeg)
    for subset, sequences in zip(("train", "val"), split("imagenet_vid", root), strict=True):
        toolkit = ImageNetVID(str(root), subset, cache_dir=str(tmp_path / subset))
        assert names(sequences) == sorted(toolkit.seq_names)
        assert len(sequences) == 2  # the third object is in one frame only
        for sequence in sequences:
            image_files, boxes = toolkit[toolkit.seq_names.index(sequence.name)]
            has_box = np.isfinite(sequence.boxes_xywh).all(1)
            assert np.array_equal(sequence.boxes_xywh[has_box], boxes) and sequence.box_origin == 0
            assert [str(path) for path, has in zip(sequence.frame_paths, has_box, strict=True) if has] == image_files
            assert np.array_equal(sequence.visible, has_box) and sequence.frame_wh == (40, 30)
        gap = sequences[1]  # in frames 1, 2 and 4
        assert gap.frame_names == tuple(f"{frame:06d}.JPEG" for frame in (1, 2, 3, 4))
        assert gap.visible.tolist() == [True, True, False, True]
    path = root / "Annotations" / "VID" / "val" / "ILSVRC2015_val_00000000" / "000002.xml"
    whole = path.read_text()
    for text in ("<annotation", "<annotation><object></object></annotation>", whole.replace("<xmin>", "<xmin>3,")):
        path.write_text(text)
        with pytest.raises(ValueError, match="000002.xml is not an annotation"):
            split("imagenet_vid", root)


def write_davis(root: Path, jpeg: Path) -> dict[str, np.ndarray]:
    """Two videos of 5 frames: one object (255), and objects 1 and 3. Returns the id maps, int (5, 30, 40)."""
    rng = np.random.default_rng(1)
    maps = {}
    for video, ids in {"cow": [255], "dogs": [1, 3]}.items():
        write_frames(root / "JPEGImages" / "480p" / video, jpeg, 5, first=0, digits=5)
        (root / "Annotations" / "480p" / video).mkdir(parents=True)
        maps[video] = np.zeros((5, 30, 40), np.int32)
        for frame in range(5):
            for object_id in ids:
                y, x, h, w = rng.integers(0, 20), rng.integers(0, 30), rng.integers(1, 9), rng.integers(1, 9)
                maps[video][frame, y : y + h, x : x + w] = object_id
            if video == "dogs" and frame == 2:
                maps[video][frame] = 0  # both are away
            write_label_map(root / "Annotations" / "480p" / video / f"{frame:05d}.png", maps[video][frame])
    return maps


def tight_box(mask: np.ndarray) -> list[int]:
    pixels = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    left, top = min(x for x, _ in pixels), min(y for _, y in pixels)
    return [left, top, max(x for x, _ in pixels) - left + 1, max(y for _, y in pixels) - top + 1]


def test_davis_boxes_are_those_of_the_masks(tmp_path, jpeg):
    maps = write_davis(tmp_path, jpeg)
    sequences = list_all("davis_sequences", tmp_path)
    assert names(sequences) == ["cow", "dogs.1", "dogs.3"] and videos(sequences) == ["cow", "dogs", "dogs"]
    for sequence, object_id in zip(sequences, (255, 1, 3), strict=True):
        for frame, ids in enumerate(maps[sequence.video]):
            is_there = bool((ids == object_id).any())
            expected = tight_box(ids == object_id) if is_there else [np.nan] * 4
            assert np.array_equal(sequence.boxes_xywh[frame], expected, equal_nan=True)
            assert sequence.visible[frame] == is_there
    (tmp_path / "Annotations" / "480p" / "cow" / "00003.png").unlink()  # a frame that nobody annotated
    cow = list_all("davis_sequences", tmp_path)[0]
    assert len(cow) == 5 and cow.visible.tolist() == [True, True, True, False, True]
    (tmp_path / "JPEGImages" / "480p" / "cow" / "00001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="00001.png has no frame"):
        list_all("davis_sequences", tmp_path)
    write_label_map(tmp_path / "Annotations" / "480p" / "cow" / "00000.png", np.ones((15, 20), np.int32))
    with pytest.raises(
        ValueError, match=r"00000.png is 20 x 15 px \(width x height\), but the frames in .* are 40 x 30"
    ):
        list_all("davis_sequences", tmp_path)


def test_davis_objects_of_one_video_stay_together(tmp_path, jpeg):
    write_davis(tmp_path, jpeg)
    for seed in range(4):
        train, val = split("davis_sequences", tmp_path, val_fraction=0.5, split_seed=seed)
        assert not set(videos(train)) & set(videos(val)) and len(train) + len(val) == 3
    train, val = split("davis_sequences", tmp_path, val_sequences=["dogs"])
    assert names(train) == ["cow"] and names(val) == ["dogs.1", "dogs.3"]
    train, val = split("davis_sequences", tmp_path, train_sequences=["dogs.3"], val_sequences=["cow"])
    assert names(train) == ["dogs.3"] and names(val) == ["cow"]
    (tmp_path / "val.txt").write_text("/JPEGImages/480p/cow/00000.jpg /Annotations/480p/cow/00000.png\n\n")
    assert names(split("davis_sequences", tmp_path, val_sequences=str(tmp_path / "val.txt"))[1]) == ["cow"]
    (tmp_path / "val.txt").write_text("dogs_1\r\n")
    assert names(split("davis_sequences", tmp_path, val_sequences=str(tmp_path / "val.txt"))[1]) == ["dogs.1"]
    with pytest.raises(ValueError, match="val_sequences names cat.*cow"):
        split("davis_sequences", tmp_path, val_sequences=["cat"])
    with pytest.raises(ValueError, match="both name cow"):
        split("davis_sequences", tmp_path, train_sequences=["cow"], val_sequences=["cow"])
    with pytest.raises(FileNotFoundError, match="val_sequences is gone.txt"):
        split("davis_sequences", tmp_path, val_sequences="gone.txt")


def test_lists_name_sequences_with_spaces(tmp_path, jpeg):
    write_many(tmp_path / "train", jpeg, ["my video", "my video 2", "other"])
    (tmp_path / "list.txt").write_text("my video\r\nother 3 0.5\n")
    keys = {"val_sequences": str(tmp_path / "list.txt")}
    assert names(split("folder_sequences", tmp_path / "train", **keys)[1]) == ["my video", "other"]
    shutil.move(tmp_path / "list.txt", tmp_path / "train" / "list.txt")
    (tmp_path / "train" / "list.txt").write_text("my video 2\nother\n")
    train, _ = split("got10k", tmp_path, val_folder=None, val_fraction=0.0)
    assert names(train) == ["my video 2", "other"]


def test_folders_of_your_own(tmp_path, jpeg):
    write_frames(tmp_path / "a", jpeg, 4)
    write_frames(tmp_path / "b" / "frames", jpeg, 4)
    write_frames(tmp_path / "c" / "frames", jpeg, 4)
    write_lines(tmp_path / "a" / "groundtruth.txt", BOXES, ";")
    write_lines(tmp_path / "b" / "groundtruth_rect.txt", BOXES, " ")
    write_lines(tmp_path / "c.txt", BOXES)  # its name says whose it is
    train, val = split("folder_sequences", tmp_path, val_fraction=0)
    assert names(train) == ["a", "b", "c"] and val == []
    for sequence in train:
        assert np.array_equal(sequence.boxes_xywh, BOXES) and len(sequence) == 4 and sequence.frame_wh == (40, 30)
        assert sequence.box_origin == 0
    sequence = split("folder_sequences", tmp_path, val_fraction=0, box_origin=1)[0][0]
    assert np.array_equal(sequence.boxes_xywh, BOXES - [1, 1, 0, 0]) and sequence.box_origin == 1

    (tmp_path / "c.txt").rename(tmp_path / "groundtruth.txt")  # whose is it?
    with pytest.raises(FileNotFoundError, match="no groundtruth file"):
        split("folder_sequences", tmp_path)
    (tmp_path / "groundtruth.txt").rename(tmp_path / "c" / "mine.csv")
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name)
    keys = {"groundtruth": "mine.csv", "frame_dir": "frames", "val_fraction": 1}
    assert names(split("folder_sequences", tmp_path, **keys)[1]) == ["c"]
    with pytest.raises(ValueError, match="only c to split"):
        split("folder_sequences", tmp_path, **{**keys, "val_fraction": 0.5})
    write_frames(tmp_path / "c" / "more", jpeg, 1)
    with pytest.raises(ValueError, match="2 folders with pictures; set data.frame_dir"):
        split("folder_sequences", tmp_path)


def test_the_frame_size_is_that_of_the_turned_picture(tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    Image.new("RGB", (40, 30)).save(tmp_path / "a" / "1.jpg", exif=exif)
    write_lines(tmp_path / "a.txt", BOXES[:1])
    assert split("folder_sequences", tmp_path, val_fraction=1)[1][0].frame_wh == (30, 40)
    (tmp_path / "a" / "1.jpg").write_bytes(b"damaged")
    assert split("folder_sequences", tmp_path, val_fraction=1)[1][0].frame_wh is None


# ---------------------------------------------------------------------------------------------------------------------
# pictures with masks


def write_label_maps(root: Path, jpeg: Path) -> dict[str, np.ndarray]:
    """Write five pictures of 40 x 30 px and their maps of 0 to 3 objects, of any form. Returns the maps."""
    rng = np.random.default_rng(2)
    write_frames(root / "images", jpeg, 5)
    (root / "labels").mkdir()
    maps = {}
    for number, path in enumerate(sorted((root / "images").iterdir())):
        ids = np.zeros((30, 40), np.int32)
        for object_id in (1, 2, 7)[: number % 4]:
            y, x = rng.integers(0, [25, 35])
            ids[y : y + 5, x : x + 5] = np.where(rng.random(ids[y : y + 5, x : x + 5].shape) < 0.5, object_id, 0)
            ids[y, x] = object_id
        maps[path.stem] = ids
        write_label_map(root / "labels" / f"{path.stem}.png", ids)
    return maps


def test_objects_of_pictures_are_sequences_of_one_frame_with_tight_boxes(tmp_path, jpeg):
    maps = write_label_maps(tmp_path, jpeg)
    train, val = datasets.split_pictures(**data_keys("label_map", tmp_path, val_fraction=0.4))
    expected = {f"{name}.{key}": (name, ids == key) for name, ids in maps.items() for key in np.unique(ids[ids > 0])}
    assert sorted(names(train) + names(val)) == sorted(expected) and len(expected) == 1 + 2 + 3
    assert not set(videos(train)) & set(videos(val)) and train and val
    for sequence in train + val:
        name, mask = expected[sequence.name]
        assert sequence.boxes_xywh.dtype == np.float64 and sequence.boxes_xywh.tolist() == [tight_box(mask)]
        assert sequence.frame_paths == (tmp_path / "images" / f"{name}.jpg",) and sequence.frame_wh == (40, 30)
        assert sequence.visible.tolist() == [True] and sequence.box_origin == 0 and sequence.cover is None
        assert (sequence.video, sequence.num_annotated) == (name, 1)
    others, _ = datasets.split_pictures(**data_keys("label_map", tmp_path, val_fraction=0, ignore_ids=[1, 7]))
    assert names(others) == [name for name in sorted(expected) if name.endswith(".2")] != []


def write_coco(root: Path, jpeg: Path, annotations: list[dict]) -> dict:
    """Write a COCO dataset of one picture, 40 x 30 px; returns the keys that read it."""
    write_frames(root / "train2017", jpeg, 1)
    annotations = [{"id": key, "image_id": 1} | annotation for key, annotation in enumerate(annotations)]
    content = {"images": [{"id": 1, "file_name": "0001.jpg", "width": 40, "height": 30}], "annotations": annotations}
    (root / "annotations").mkdir()
    (root / "annotations" / "all.json").write_text(json.dumps(content))
    changes = {"train_images": "train2017", "train_annotations": "annotations/all.json", "val_annotations": None}
    return data_keys("coco", root, val_fraction=0, **changes)


def test_objects_of_a_picture_that_are_left_out_are_named(tmp_path, jpeg, capsys):
    square = [[4, 4, 24, 4, 24, 14, 4, 14]]
    keys = write_coco(
        tmp_path, jpeg, [{"segmentation": square}, {"segmentation": "x"}, {"segmentation": square, "iscrowd": 1}]
    )
    assert len(datasets.split_pictures(**keys)[0]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out of ")]
    assert len(lines) == 2 and "annotation 1" in lines[0], lines
    assert lines[1].endswith("0001.jpg: 1 regions marked as crowds"), lines
    assert len(datasets.split_pictures(**(keys | {"crowd": "keep"}))[0]) == 2


def test_objects_that_overlap_have_boxes_of_their_own(tmp_path, jpeg):
    """COCO's polygons, and a file per mask: what another object covers belongs to the box too."""
    polygons = {5: [4, 4, 24, 4, 24, 14, 4, 14], 9: [10, 8, 30, 8, 30, 28, 10, 28]}
    annotations = [{"iscrowd": 0, "segmentation": [points]} for points in polygons.values()]
    coco, _ = datasets.split_pictures(**write_coco(tmp_path / "coco", jpeg, annotations))
    masks = {}
    for key, points in polygons.items():
        xs, ys = points[::2], points[1::2]
        masks[key] = np.zeros((30, 40, 3), np.uint8)
        masks[key][min(ys) : max(ys), min(xs) : max(xs)] = 255
    folder = tmp_path / "files" / "a"
    write_frames(folder / "images", jpeg, 1)
    (folder / "masks").mkdir()
    for key, mask in masks.items():
        write_image(folder / "masks" / f"{key}.png", mask)
    keys = data_keys("masks_per_file", tmp_path / "files", val_fraction=0)
    for sequences in (coco, datasets.split_pictures(**keys)[0]):
        assert len(sequences) == 2 and len(set(names(sequences))) == 2
        assert sorted(sequence.boxes_xywh[0].tolist() for sequence in sequences) == [[4, 4, 20, 10], [10, 8, 20, 20]]
        assert set(videos(sequences)) == {sequences[0].video}


def test_faulty_pictures_stop_or_are_left_out(tmp_path, jpeg, capsys):
    """Also one that does not fit its annotation, whose boxes would lie beside the objects."""
    write_label_maps(tmp_path, jpeg)
    write_image(tmp_path / "images" / "0002.jpg", np.zeros((40, 30, 3), np.uint8))
    (tmp_path / "labels" / "0003.png").write_bytes(b"no picture")
    (tmp_path / "images" / "0004.jpg").write_bytes(b"no picture")
    whole, _ = datasets.split_pictures(**data_keys("label_map", tmp_path, val_fraction=0, on_bad="skip"))
    assert whole == []
    printed = capsys.readouterr().out
    assert printed.count("left out 000") == 3 and "is 40 x 30 px (height x width), but its annotation" in printed
    with pytest.raises(ValueError, match=r"0002.jpg is 40 x 30 .*data.on_bad=skip leaves such"):
        datasets.split_pictures(**data_keys("label_map", tmp_path, val_fraction=0))
    (tmp_path / "images" / "0005.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="0005"):
        datasets.split_pictures(**data_keys("label_map", tmp_path, val_fraction=0))
    datasets.split_pictures(**data_keys("label_map", tmp_path, val_fraction=0, on_bad="skip"))
    with pytest.raises(ValueError, match="unknown key data.frame_dir"):
        datasets.split_pictures(**data_keys("label_map", tmp_path), frame_dir="x")


# ---------------------------------------------------------------------------------------------------------------------
# splits, wrong values, the kept list


def write_many(root: Path, jpeg: Path, videos) -> Path:
    for video in videos:
        write_frames(root / video, jpeg, 1)
        write_lines(root / video / "groundtruth.txt", BOXES[:1])
    return root


def test_the_split_follows_from_the_seed_and_the_names(tmp_path, jpeg):
    here = write_many(tmp_path / "here", jpeg, [f"v{number}" for number in range(20)])
    train, val = split("folder_sequences", here, val_fraction=0.25)
    assert len(val) == 5 and not set(names(train)) & set(names(val))
    assert names(train) == sorted(names(train), key=lambda name: int(name[1:]))  # natural order
    there = tmp_path / "there" / "deeper"
    shutil.copytree(here, there)
    assert names(split("folder_sequences", there, val_fraction=0.25)[1]) == names(val)
    assert names(split("folder_sequences", here, val_fraction=0.25, split_seed=1)[1]) != names(val)
    write_many(here, jpeg, ["v20", "v21", "v22", "v23"])  # 6 of 24: new ones move no other from train to val and back
    assert len(set(names(split("folder_sequences", here, val_fraction=0.25)[1])) & set(names(val))) >= 4
    with pytest.raises(ValueError, match="val_fraction is 1.5"):
        split("folder_sequences", here, val_fraction=1.5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "got1k"}, ValueError, "data.format is 'got1k'"),
        ({"box_origin": 2}, ValueError, "data.box_origin is 2; must be 0 or 1"),
        ({"index": 5}, ValueError, "data.index is 5; must be text or null"),
        ({"on_bad": "ignore"}, ValueError, "data.on_bad is ignore; must be stop or skip"),
        ({"root": "nowhere"}, FileNotFoundError, "data.root nowhere is not a folder"),
        ({"split_sed": 1}, ValueError, "unknown key data.split_sed"),
        ({"format": "imagenet_vid"}, ValueError, "unknown key data.frame_dir"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, jpeg, changes, error, message):
    root = write_many(tmp_path / "videos", jpeg, ["a", "b"])
    keys = {**data_keys("folder_sequences", root), **changes}
    with pytest.raises(error, match=message):
        datasets.split_sequences(**keys)


def test_an_empty_folder_holds_no_sequences(tmp_path):
    for name in ("folder_sequences", "otb", "vot"):
        with pytest.raises(ValueError, match="holds no sequences"):
            split(name, tmp_path)


def test_every_dataset_yaml_has_the_keys_of_its_format(tmp_path):
    for name in (path.stem for path in (CONFIGS / "tracking" / "data").glob("*.yaml")):
        keys = data_keys(name, tmp_path / "gone")
        with pytest.raises(FileNotFoundError, match="data.root"):
            datasets.split_sequences(**keys)
        tmp_path.joinpath(name).mkdir()
        with pytest.raises((FileNotFoundError, ValueError)) as raised:
            datasets.split_sequences(**{**keys, "root": str(tmp_path / name)})
        assert not re.search("unknown key|the config lacks", str(raised.value))  # each key is one of the format's


def fields(sequence) -> dict:
    arrays = (sequence.boxes_xywh, sequence.visible, sequence.cover)
    dtypes = [getattr(array, "dtype", None) for array in arrays]
    return vars(sequence) | {"frame_dir": sequence.frame_dir.resolve(), "dtypes": dtypes}


@pytest.mark.parametrize("name", ["moving_shapes", "davis_sequences"])
def test_a_kept_list_gives_the_same_sequences(tmp_path, jpeg, shapes_root, name):
    root = tmp_path / "data"
    if name == "moving_shapes":
        shutil.copytree(shapes_root, root)
    else:
        write_davis(root, jpeg)
    index = str(tmp_path / "lists" / "index.npz")
    plain = split(name, root)
    for _ in range(2):  # written, then read
        for sequences, expected in zip(split(name, root, index=index), plain, strict=True):
            np.testing.assert_equal(list(map(fields, sequences)), list(map(fields, expected)))
        for path in [*root.rglob("groundtruth.txt"), *root.rglob("*.label"), *root.rglob("Annotations/*/*/*.png")]:
            path.unlink()  # the second time no annotation is read
    with pytest.raises(ValueError, match="index.npz was made for other data keys"):
        split(name, root, index=index, val_sequences=["other"])
    for content in (b"PK damaged", b""):
        Path(index).write_bytes(content)
        with pytest.raises(ValueError, match="index.npz is damaged"):
            split(name, root, index=index)


def test_a_kept_list_is_that_of_the_list_file_as_it_is_now(tmp_path, jpeg):
    write_many(tmp_path / "videos", jpeg, "abc")
    keys = {"index": str(tmp_path / "index.npz"), "val_sequences": str(tmp_path / "val.txt")}
    (tmp_path / "val.txt").write_text("a\n")
    for _ in range(2):
        assert names(split("folder_sequences", tmp_path / "videos", **keys)[1]) == ["a"]
    (tmp_path / "val.txt").write_text("b\n")
    with pytest.raises(ValueError, match="index.npz was made for other data keys"):
        split("folder_sequences", tmp_path / "videos", **keys)


# ---------------------------------------------------------------------------------------------------------------------
# result files


def test_result_files_are_those_of_the_toolkit_byte_for_byte(tmp_path):
    rng = np.random.default_rng(0)
    boxes, times_s = rng.uniform(-10, 300, (6, 4)), rng.uniform(0.001, 0.2, 6)
    in_file = datasets.file_coordinates(boxes, 1)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for layout in ("otb", "got10k", "vot"):
        datasets.write_result(layout, ours / layout, "Jogging.1", boxes, times_s, box_origin=1)
    ExperimentOTB._record(None, str(theirs / "otb" / "Jogging.1.txt"), in_file, times_s)
    ExperimentGOT10k._record(None, str(theirs / "got10k" / "Jogging.1" / "Jogging.1_001.txt"), in_file, times_s)
    vot_file = theirs / "vot" / "unsupervised" / "Jogging.1" / "Jogging.1_001.txt"
    ExperimentVOT._record(None, str(vot_file), [[1], *in_file[1:]], times_s)
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.txt"))
    assert len(files) == 6 and files == sorted(path.relative_to(ours) for path in ours.rglob("*.txt"))
    for path in files:
        assert (ours / path).read_bytes().rstrip() == (theirs / path).read_bytes().rstrip(), path

    for layout, decimals in (("otb", 3), ("got10k", 3), ("vot", 4)):
        tracked_boxes = datasets.read_result(ours / layout, "Jogging.1")
        assert np.abs(tracked_boxes[1:] - in_file[1:]).max() <= 0.51 * 10**-decimals
        first = [np.nan] * 4 if layout == "vot" else in_file[0]
        assert np.allclose(tracked_boxes[0], first, atol=1e-3, equal_nan=True)


def test_results_are_found_whatever_the_toolkit_calls_them(tmp_path):
    (tmp_path / "Skating2-2.txt").write_text("1\t2\t3\t4\n5\t6\t7\t8\n")  # as pytracking and pysot write
    assert datasets.read_result(tmp_path, "Skating2.2").tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    (tmp_path / "baseline" / "bag").mkdir(parents=True)
    (tmp_path / "baseline" / "bag" / "bag_001.txt").write_text("1\n1,2,3,4\n2\n0\n1\n10,20,30,20,30,40,10,40")
    tracked_boxes = datasets.read_result(tmp_path, "bag")
    assert np.isnan(tracked_boxes).all(1).tolist() == [True, False, True, True, True, False]
    assert tracked_boxes[1].tolist() == [1, 2, 3, 4]
    with pytest.raises(FileNotFoundError, match="no result of Skating2.1"):
        datasets.find_result(tmp_path, "Skating2.1")
    (tmp_path / "bag.txt").write_text("1,2,3,4\n1,2,3\n")
    with pytest.raises(ValueError, match="bag.txt, line 2"):
        datasets.read_result(tmp_path, "bag")


# ---------------------------------------------------------------------------------------------------------------------
# real data


def test_real_otb_and_vot(data_root, monkeypatch):
    root = data_root / "OTB100"
    if not root.is_dir():
        pytest.skip(f"real data: no {root}")
    monkeypatch.setattr(OTB, "_OTB__version_dict", {"here": sorted(path.name for path in root.iterdir())})
    toolkit = OTB(str(root), "here", download=False)
    sequences = list_all("otb", root)
    assert sorted(names(sequences)) == sorted(toolkit.seq_names)
    for sequence in sequences:
        image_files, boxes = toolkit[sequence.name]
        assert [str(path) for path in sequence.frame_paths] == image_files
        assert np.array_equal(datasets.file_coordinates(sequence.boxes_xywh, 1), boxes) and sequence.visible.all()
    for version in ("VOT2015", "VOT2017"):
        for sequence in list_all("vot", data_root / version):
            corners = np.loadtxt(data_root / version / sequence.name / "groundtruth.txt", delimiter=",")
            expected = VOT._corner2rect(None, corners)
            assert np.abs(datasets.file_coordinates(sequence.boxes_xywh, 1) - expected).max() < 1e-9
            assert len(sequence) == len(expected) and sequence.visible.all()


@pytest.mark.slow
def test_real_davis_boxes(data_root):
    root = data_root / "DAVIS2016"
    if not (root / "boxes_derived").is_dir():
        pytest.skip(f"real data: no {root / 'boxes_derived'}")
    for sequence in list_all("davis_sequences", root):
        expected = np.loadtxt(root / "boxes_derived" / "480p" / f"{sequence.name}.txt", delimiter=",")
        assert np.array_equal(sequence.boxes_xywh, expected) and sequence.frame_wh == (854, 480)


# ---------------------------------------------------------------------------------------------------------------------
# files that other tools wrote


def test_eight_numbers_that_are_no_corners_are_refused(tmp_path):
    """Decimal commas, and other tools' columns, became boxes."""
    for line in ("10,5,20,3,30,1,40,7", "1,-1,10,20,30,40,1,-1", "0,0,100,0,100,50,0,90"):
        (tmp_path / "boxes.txt").write_text(f"1,2,3,4\n{line}\n")
        with pytest.raises(ValueError, match=r"boxes\.txt, line 2, is .*; its 8 numbers are no corners of a box"):
            datasets.read_boxes(tmp_path / "boxes.txt", 0)
    (tmp_path / "boxes.txt").write_text("10.2,20,30.7,20.4,30.5,41,10,40.6\n")  # a rotated box, rounded
    assert np.isfinite(datasets.read_boxes(tmp_path / "boxes.txt", 0)).all()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_groundtruth_of_windows_is_read(encoding, tmp_path):
    (tmp_path / "boxes.txt").write_bytes("1,2,3,4\r\n5,6,7,8\r\n".encode(encoding))
    assert datasets.read_boxes(tmp_path / "boxes.txt", 0).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    (tmp_path / "latin.txt").write_bytes("1,2,3,4\n# größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not text in UTF-8 \(line 2"):
        datasets.read_boxes(tmp_path / "latin.txt", 0)


@pytest.mark.parametrize("file_name", ["Human4.txt", "Human4-2.txt", "Human4_2.txt"])
def test_results_under_other_tools_names_are_found(file_name, tmp_path):
    (tmp_path / file_name).write_text("1,2,3,4\n")
    assert datasets.find_result(tmp_path, "Human4").name == file_name
    with pytest.raises(FileNotFoundError, match="has no result of Human5"):
        datasets.find_result(tmp_path, "Human5")


def test_a_root_of_classes_is_told_where_its_videos_lie(tmp_path):
    """LaSOT: "set data.frame_dir" helped nobody."""
    for number in (1, 2):
        folder = tmp_path / "bear" / f"bear-{number}" / "img"
        folder.mkdir(parents=True)
        write_image(folder / "1.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(
        ValueError, match=f"its videos lie deeper: set data.root={tmp_path / 'bear'}, a class at a time"
    ):
        list_all("folder_sequences", tmp_path)
