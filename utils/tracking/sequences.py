"""Video sequences with a box per frame, read straight from disk: GOT-10k, ImageNet VID, DAVIS, OTB, VOT, any folders;
pictures with masks as sequences of one frame; and the result files of OTB, GOT-10k and VOT.

`split_sequences(**config["data"])` lists a dataset: its keyword arguments are the keys of configs/tracking/data/*.yaml.
Boxes are boxes_xywh, float64 (..., 4): left, top, width, height in pixels, 0-based: the top left pixel is at (0, 0).
Many files count from 1; `box_origin` in the YAML says which, and reading and writing convert.
"""

import functools
import json
import os
import re
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from utils.images import mask_to_box, read_frame_wh, read_label_map
from utils.instances.readers import LISTERS, Item, check_same_size, object_ids, split_items
from utils.listing import dataset_folder, draw_split, first_few, list_folders, read_lines, read_text
from utils.samples.write import write_samples
from utils.settings import check_keys, one_of
from utils.tracking.frames import list_frames, natural_key, picture_names

# The keys that every format has; `_read_split` explains them.
COMMON_KEYS = ("on_bad", "train_sequences", "val_sequences", "val_fraction", "split_seed")
MANY_VIDEOS = 500  # from here on, listing shows its progress
GROUNDTRUTH_NAMES = ("groundtruth_rect.txt", "groundtruth.txt", "groundtruth_rect.1.txt")
# Frames that belong to an OTB sequence where its folder holds more: first and last number, as the benchmark says.
OTB_FRAME_RANGES = {
    "david": (300, 770), "diving": (1, 215), "football1": (1, 74), "freeman3": (1, 460), "freeman4": (1, 283),
}  # fmt: skip
BoxOrigin = Annotated[int, one_of(0, 1)]  # what a dataset's files count from
Videos = tuple[Callable[[Path], list["Sequence"]], list[Path] | None, list[Path] | None]


@dataclass(frozen=True, eq=False)
class Sequence:
    """The frames of one video and the box of one object in them; T frames."""

    name: str  # unique in the dataset; result files are named after it
    video: str  # the video's folder; objects of one video are sequences of their own
    frame_dir: Path
    frame_names: tuple[str, ...]  # T files in frame_dir, in order
    boxes_xywh: np.ndarray  # float64 (T, 4), 0-based px; nan where the files say nothing
    visible: np.ndarray  # bool (T,): there is a box above 0 px, and no label says that the object is hidden or absent
    num_annotated: int  # frames with a line in the groundtruth file; less than T where it is shorter than the video
    box_origin: int  # 0 or 1: what the dataset's files count from, and so its result files
    cover: np.ndarray | None = None  # int (T,), GOT-10k's label: 0 hidden .. 8 wholly visible
    frame_wh: tuple[int, int] | None = None  # width, height of the first frame, px; None if it cannot be read
    mask_dir: Path | None = None  # where masks of the frames are, <frame>.png; None: the dataset has boxes alone
    mask_id: int | None = None  # the object's in them; None: all that is not 0

    def __len__(self) -> int:
        return len(self.frame_names)

    @property
    def frame_paths(self) -> tuple[Path, ...]:
        """All T frames as files, made anew each time; `frame_path` gives one."""
        return tuple(self.frame_dir / name for name in self.frame_names)

    @property
    def is_scored(self) -> bool:
        """Whether there is groundtruth after the first frame in which the object is visible."""
        return bool(self.visible.any()) and self.num_annotated - int(self.visible.argmax()) > 1

    def frame_path(self, index: int) -> Path:
        """Return the file of one frame."""
        return self.frame_dir / self.frame_names[index]


# ---------------------------------------------------------------------------------------------------------------------
# list a dataset


def split_dataset(format: str, root: str, **keys) -> tuple[list[Sequence], list[Sequence]]:
    """List a dataset of video sequences, or of pictures with masks: its format says which.

    Args:
        format: a name in SEQUENCE_FORMATS, as `split_sequences`, or one in LISTERS of utils/instances/readers.py, as
            `split_pictures`.
        root, keys: as theirs.
    Returns:
        (train_sequences, val_sequences).
    Raises:
        FileNotFoundError, ValueError: as `split_sequences`.
    """
    if format in SEQUENCE_FORMATS:
        return split_sequences(format, root, **keys)
    if format not in LISTERS:
        raise ValueError(f"data.format is {format!r}; must be one of {', '.join({**SEQUENCE_FORMATS, **LISTERS})}")
    return split_pictures(format, root, **keys)


def split_sequences(
    format: str, root: str, index: str | None = None, generate: str | None = None, **keys
) -> tuple[list[Sequence], list[Sequence]]:
    """List a dataset's sequences and split them into training and validation.

    The split is what the dataset has on disk (folders), or what train_sequences and val_sequences name, else a seeded
    fraction of the sorted folders, which depends on nothing else. Objects of one video stay together.

    Args:
        format: a name in SEQUENCE_FORMATS.
        root: the dataset's folder, relative to where the user stands.
        index: a file (.npz) to keep the list in, for the next run; None: read all annotations each time.
        generate: the kind of `write_samples` to draw into root first, if it is not there; None: none.
        keys: the other keys of that format's configs/tracking/data/*.yaml: COMMON_KEYS, and those that the functions
            below explain.
    Returns:
        (train_sequences, val_sequences), each in natural order of the names.
    Raises:
        FileNotFoundError: for a folder or file that is not there.
        ValueError: for an unknown format or key, a value that makes no sense, or a faulty groundtruth file (with on_bad
            "skip" such a sequence is left out, and a printed line says so).
    """
    if format not in SEQUENCE_FORMATS:
        raise ValueError(f"data.format is {format!r}; must be one of {', '.join(SEQUENCE_FORMATS)}")
    check_keys(split_sequences, {"format": format, "root": root, "index": index, "generate": generate}, "data")
    folder = dataset_folder(root if generate is None else write_samples(generate, root))
    common_keys = {key: value for key, value in keys.items() if key in COMMON_KEYS}
    format_keys = {key: value for key, value in keys.items() if key not in COMMON_KEYS}
    list_format = functools.partial(SEQUENCE_FORMATS[format], folder)
    check_keys(list_format, format_keys, "data", others=COMMON_KEYS)
    check_keys(functools.partial(_read_split, None, None, None), common_keys, "data")
    files = {key: keys[key] for key in ("train_sequences", "val_sequences") if isinstance(keys.get(key), str)}
    lists = {key: _list_names(path, key) for key, path in files.items()}  # as they are now
    asked = json.dumps({"format": format, "root": str(folder.resolve()), **keys, **lists}, sort_keys=True)
    if index is not None and Path(index).is_file():
        return _read_index(Path(index), asked)
    train_sequences, val_sequences = map(_in_order, _read_split(*list_format(**format_keys), **common_keys))
    if not train_sequences and not val_sequences:
        raise ValueError(f"data.root {root} holds no sequences in the layout {format!r} (see data/README.md)")
    if index is not None:
        _write_index(Path(index), asked, train_sequences, val_sequences)
    return train_sequences, val_sequences


def list_sequences(**keys) -> list[Sequence]:
    """List all sequences of a dataset, training and validation together, in natural order of the names.

    Args:
        keys: as those of `split_sequences`.
    """
    train_sequences, val_sequences = split_sequences(**keys)
    return _in_order(train_sequences + val_sequences)


def choose_sequences(sequences: list[Sequence], names: list[str]) -> list[Sequence]:
    """Choose sequences by name, in the order of the names; Jogging.1, Jogging-1 and Jogging_1 mean the same.

    Raises:
        ValueError: for a name that is not there, with those that are; for one that is there twice.
    """
    by_name = {_plain_name(sequence.name): sequence for sequence in sequences}
    by_name |= {sequence.name: sequence for sequence in sequences}
    chosen = []
    for name in map(str, names):
        sequence = by_name.get(name, by_name.get(_plain_name(name)))
        if sequence is None:
            known = ", ".join(first_few([sequence.name for sequence in sequences]))
            raise ValueError(f"sequences has {name!r}, which the dataset lacks; it has {known}")
        if sequence in chosen:
            raise ValueError(f"sequences names {sequence.name} twice; name each once")
        chosen.append(sequence)
    return chosen


# A function of each format: (root, its own keys) -> (read, training videos, validation videos). The videos are folders,
# of which `read` makes the sequences of one; None stands for a part that the dataset on disk does not have, so that
# `_read_split` divides the other.


def list_got10k(
    root: Path, train_folder: str | None, val_folder: str | None, leave_out: list[str], box_origin: BoxOrigin
) -> Videos:
    """List GOT-10k: <root>/<train_folder>/<sequence>/{00000001.jpg, groundtruth.txt, cover.label, absence.label, ...}.

    A folder's list.txt says which sequences it has; without one all its folders do. With both folders given these are
    the split (train_sequences then picks some of the first, such as the VOT challenge's list); else train_folder is
    split, or all of val_folder validates. The test set, of which only the first boxes are public, is read the same way:
    val_folder test.
    """

    def list_part(folder: Path) -> list[Path]:
        list_path = folder / "list.txt"
        if list_path.is_file():
            paths = [folder / name for name in read_lines(list_path)]
        else:
            paths = list_folders(folder)
        return [path for path in paths if path.name not in leave_out]

    def read(folder: Path) -> list[Sequence]:
        frame_names = _frame_names(folder)
        boxes_xywh = read_boxes(folder / "groundtruth.txt", box_origin)
        cover, absence = (_read_label(folder / f"{name}.label", len(boxes_xywh)) for name in ("cover", "absence"))
        hidden = np.zeros(len(boxes_xywh), bool)
        if cover is not None:
            hidden |= cover <= 0
        if absence is not None:
            hidden |= absence > 0
        info_path = folder / "meta_info.ini"
        info = info_path.read_text(encoding="utf-8", errors="replace") if info_path.is_file() else ""
        resolution = re.search(r"^resolution: *\(([0-9]+), *([0-9]+)\)", info, re.MULTILINE)
        frame_wh = (int(resolution[1]), int(resolution[2])) if resolution else None
        return [_make(folder.name, folder.name, folder, frame_names, boxes_xywh, box_origin, hidden, cover, frame_wh)]

    return read, *(None if folder is None else list_part(root / folder) for folder in (train_folder, val_folder))


def list_imagenet_vid(root: Path, train_folder: str | None, val_folder: str | None) -> Videos:
    """List ImageNet VID: <root>/Data/VID/train/<part>/<snippet>/000000.JPEG, <root>/Annotations/VID/..., .xml.

    Each object of a snippet is a sequence <snippet>.<track>, from the first frame that has it to the last; objects in
    one frame only are left out. The reader walks through a million small files: set data.index to do that once.
    """
    annotation_dir = root / "Annotations" / "VID"

    def list_part(folder: Path) -> list[Path]:
        snippets = []
        for path in list_folders(folder):
            with os.scandir(path) as entries:
                is_snippet = any(entry.name.endswith(".xml") for entry in entries)
            snippets += [path] if is_snippet else list_folders(path)  # val has snippets, train folders of snippets
        return snippets

    def read(folder: Path) -> list[Sequence]:
        snippet = folder.relative_to(annotation_dir)  # <train_folder>/<part>/<snippet>
        frame_dir, video = root / "Data" / "VID" / snippet, Path(*snippet.parts[1:]).as_posix()
        frame_names = _frame_names(frame_dir)
        tracks: dict[int, dict[int, list[float]]] = {}  # track -> frame -> box
        frame_wh = None
        for index, frame_name in enumerate(frame_names):
            path = folder / f"{Path(frame_name).stem}.xml"
            try:
                tree = ElementTree.parse(_existing(path))
                frame_wh = frame_wh or (int(tree.find("size/width").text), int(tree.find("size/height").text))
                for annotation in tree.findall("object"):
                    sides = [float(annotation.find(f"bndbox/{side}").text) for side in ("xmin", "ymin", "xmax", "ymax")]
                    tracks.setdefault(int(annotation.find("trackid").text), {})[index] = _to_xywh(*sides)
            except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is not an annotation of ImageNet VID ({error}); copy it again") from error
        sequences = []
        for track, boxes in sorted(tracks.items()):
            if len(boxes) < 2:
                continue
            frames = range(min(boxes), max(boxes) + 1)
            boxes_xywh = np.array([boxes.get(index, [np.nan] * 4) for index in frames])
            names = frame_names[frames.start : frames.stop]
            sequences.append(_make(f"{folder.name}.{track}", video, frame_dir, names, boxes_xywh, 0, frame_wh=frame_wh))
        return sequences

    parts = (None if folder is None else annotation_dir / folder for folder in (train_folder, val_folder))
    return read, *(None if folder is None else list_part(folder) for folder in parts)


def list_davis(root: Path, image_dir: str, annotation_dir: str) -> Videos:
    """List DAVIS: frames <root>/<image_dir>/<video>/*.jpg, masks <root>/<annotation_dir>/<video>/*.png.

    Boxes are those of the masks, tight. Each object of a video with several is a sequence <video>.<id>. Frames without
    a mask file (YouTube-VOS has them) have no box.
    """

    def read(folder: Path) -> list[Sequence]:
        video, frame_dir = folder.name, root / image_dir / folder.name
        frame_names = _frame_names(frame_dir)
        frame_wh = read_frame_wh(frame_dir / frame_names[0])
        index_of = {Path(frame_name).stem: index for index, frame_name in enumerate(frame_names)}
        boxes: dict[int, np.ndarray] = {}  # object id -> (T, 4)
        for path in list_frames(folder):
            if path.stem not in index_of:
                raise FileNotFoundError(f"mask {path} has no frame in {frame_dir}")
            ids = read_label_map(path)
            if frame_wh not in (None, ids.shape[::-1]):
                raise ValueError(
                    f"mask {path} is {ids.shape[1]} x {ids.shape[0]} px (width x height), but the frames in "
                    f"{frame_dir} are {frame_wh[0]} x {frame_wh[1]}; name those that it was drawn on (data.image_dir)"
                )
            for object_id in np.unique(ids[ids > 0]).tolist():
                object_boxes = boxes.setdefault(object_id, np.full((len(frame_names), 4), np.nan))
                object_boxes[index_of[path.stem]] = _to_xywh(*mask_to_box(ids == object_id))
        if not boxes:
            raise ValueError(f"the masks in {folder} are all empty; remove the folder, or draw the object")
        is_alone = len(boxes) == 1
        return [
            replace(
                _make(video if is_alone else f"{video}.{object_id}", video, frame_dir, frame_names, object_boxes, 0),
                mask_dir=folder,
                mask_id=None if is_alone else object_id,
            )
            for object_id, object_boxes in sorted(boxes.items())
        ]

    return read, list_folders(root / annotation_dir), None


def list_otb(root: Path, box_origin: BoxOrigin) -> Videos:
    """List OTB: <root>/<video>/img/0001.jpg, <root>/<video>/groundtruth_rect.txt; whatever videos there are.

    Several groundtruth files in a folder (Jogging, Skating2) are as many sequences, <video>.1 and <video>.2, as the
    GOT-10k toolkit names them; empty ones (Human4) do not count.
    """

    def read(folder: Path) -> list[Sequence]:
        video, frame_dir = folder.name, folder / "img"
        all_names = _frame_names(frame_dir)
        paths = [path for path in sorted(folder.glob("groundtruth*.txt")) if path.read_bytes().strip()]
        if not paths:
            raise FileNotFoundError(f"no file {folder / 'groundtruth_rect.txt'}, or it is empty")
        sequences = []
        for number, path in enumerate(paths, start=1):
            boxes_xywh, frame_names = read_boxes(path, box_origin), all_names
            if video.lower() in OTB_FRAME_RANGES and len(all_names) > len(boxes_xywh):
                first, last = OTB_FRAME_RANGES[video.lower()]
                numbered = [name for name in all_names if Path(name).stem.isdecimal()]
                frame_names = tuple(name for name in numbered if first <= int(Path(name).stem) <= last)
            name = f"{video}.{number}" if len(paths) > 1 else video
            sequences.append(_make(name, video, frame_dir, frame_names, boxes_xywh, box_origin))
        return sequences

    return read, list_folders(root), None


def list_vot(root: Path, box_origin: BoxOrigin) -> Videos:
    """List VOT: <root>/<video>/groundtruth.txt (4 numbers a line, or 8: corners), frames beside it or in color/."""

    def read(folder: Path) -> list[Sequence]:
        frame_dir = folder / "color" if (folder / "color").is_dir() else folder
        boxes_xywh = read_boxes(folder / "groundtruth.txt", box_origin)
        return [_make(folder.name, folder.name, frame_dir, _frame_names(frame_dir), boxes_xywh, box_origin)]

    return read, list_folders(root), None


def list_own_folders(root: Path, frame_dir: str | None, groundtruth: str | None, box_origin: BoxOrigin) -> Videos:
    """List your own videos: <root>/<video>/<frame_dir>/*.jpg with <root>/<video>/<groundtruth>.

    Args:
        frame_dir: the frames' folder below the video's; None: the video's, or the one folder in it with pictures.
        groundtruth: the file's name in the video's folder; None: groundtruth_rect.txt, groundtruth.txt or
            groundtruth_rect.1.txt there or beside the frames, or <root>/<video>.txt.
    """

    def read(folder: Path) -> list[Sequence]:
        frames = folder / (frame_dir or "")
        if frame_dir is None and not picture_names(frames):
            inside = [path for path in list_folders(frames) if picture_names(path)]
            if len(inside) != 1:
                remedy = "set data.frame_dir to the one whose frames they are"
                if not inside:  # such as LaSOT's <class>/<class>-1/img
                    deeper = [path for path in list_folders(frames) if any(map(picture_names, list_folders(path)))]
                    remedy = "give a folder of videos, each a folder of pictures"
                    remedy = f"its videos lie deeper: set data.root={frames}, a class at a time" if deeper else remedy
                raise ValueError(f"{frames} has no pictures, and {len(inside)} folders with pictures; {remedy}")
            frames = inside[0]
        named_path = root / f"{folder.name}.txt"
        path = folder / groundtruth if groundtruth else _first_groundtruth([frames, folder], named_path)
        if path is None:
            raise FileNotFoundError(
                f"no groundtruth file ({', '.join(GROUNDTRUTH_NAMES)}) in {folder}, and no {named_path}"
            )
        boxes_xywh = read_boxes(path, box_origin)
        return [_make(folder.name, folder.name, frames, _frame_names(frames), boxes_xywh, box_origin)]

    return read, list_folders(root), None


SEQUENCE_FORMATS = {
    "got10k": list_got10k,
    "imagenet_vid": list_imagenet_vid,
    "davis": list_davis,
    "otb": list_otb,
    "vot": list_vot,
    "folders": list_own_folders,
}


def split_pictures(
    format: str, root: str, generate: str | None = None, **keys
) -> tuple[list[Sequence], list[Sequence]]:
    """List pictures with masks as sequences of one frame, one for each object, and split them by picture.

    All masks are read here, for their tight boxes: about a minute for 3,000 pictures.

    Args:
        format: one of those of `readers.split_items`.
        generate: as for `split_sequences`.
        root, keys: as in that format's configs/sam2/data/*.yaml; None: not given, so that the reader's default counts.
    Returns:
        (train_sequences, val_sequences), named <picture>.<object id>, or .<layer>.<object id> where objects overlap.
    Raises:
        FileNotFoundError, ValueError: as `split_sequences`.
    """
    keys = {key: value for key, value in keys.items() if value is not None}
    root = root if generate is None else str(write_samples(generate, root))
    check_keys(split_items, {"format": format, "root": root, **keys}, "data")
    train_items, val_items = split_items(format, root, **keys)
    return tuple(_read_all(_read_picture, items, keys["on_bad"]) for items in (train_items, val_items))


def _read_picture(item: Item) -> list[Sequence]:
    path, frame_wh = item.image_path, read_frame_wh(item.image_path)
    if frame_wh is None:
        raise ValueError(f"image {path} is missing or cannot be read; copy it again, or remove its annotation")
    instances = item.read()
    layers, num_crowd, broken = instances.layers, instances.num_crowd, instances.broken  # layers int32 (L, H, W)
    check_same_size(item, frame_wh[::-1], layers.shape[1:])
    for reason in [*broken, *([f"{num_crowd} regions marked as crowds"] if num_crowd else [])]:
        print(f"left out of {item.name}: {reason}")
    sequences = []
    for layer, object_id, _ in object_ids(layers):
        box_xywh = np.array([_to_xywh(*mask_to_box(layers[layer] == object_id))], np.float64)
        name = f"{item.name}.{object_id}" if len(layers) == 1 else f"{item.name}.{layer}.{object_id}"
        sequences.append(_make(name, item.name, path.parent, (path.name,), box_xywh, 0, frame_wh=frame_wh))
    return sequences


# ---------------------------------------------------------------------------------------------------------------------
# files


def _make(
    name: str,
    video: str,
    frame_dir: Path,
    frame_names: tuple[str, ...],
    boxes_xywh: np.ndarray,
    box_origin: int,
    hidden: np.ndarray | None = None,
    cover: np.ndarray | None = None,
    frame_wh: tuple[int, int] | None = None,
) -> Sequence:
    """Make a sequence; groundtruth shorter than the video is filled up with frames without box."""
    num_frames, num_annotated = len(frame_names), len(boxes_xywh)
    if num_annotated > num_frames:
        raise ValueError(
            f"{name} has {num_annotated} lines of groundtruth for {num_frames} frames in {frame_dir}; which frames are "
            "missing? Complete them, or remove their lines"
        )
    num_missing = num_frames - num_annotated
    boxes_xywh = np.concatenate([np.asarray(boxes_xywh, np.float64), np.full((num_missing, 4), np.nan)])
    visible = (boxes_xywh[:, 2:] > 0).all(1) & np.isfinite(boxes_xywh).all(1)
    if hidden is not None:
        visible[:num_annotated] &= ~hidden
    if cover is not None:
        cover = np.concatenate([cover, np.zeros(num_missing, cover.dtype)])
    if frame_wh is None:
        frame_wh = read_frame_wh(frame_dir / frame_names[0])
    return Sequence(
        name, video, frame_dir, frame_names, boxes_xywh, visible, num_annotated, box_origin, cover, frame_wh
    )


def _frame_names(folder: Path) -> tuple[str, ...]:
    """List a folder's frames; names such as 00000001.jpg are kept once for all the sequences that share them."""
    return tuple(sys.intern(path.name) for path in list_frames(folder))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return path


def _to_xywh(left: float, top: float, right: float, bottom: float) -> list[float]:
    """Turn a box's first and last pixels into left, top, width, height, px."""
    return [left, top, right - left + 1, bottom - top + 1]


def _read_all(read: Callable, videos: list[Path] | list[Item], on_bad: str) -> list[Sequence]:
    """Read the sequences of each video or picture; faulty ones stop, or are left out with a line."""
    sequences = []
    for video in tqdm(videos, unit=" videos", disable=len(videos) < MANY_VIDEOS):
        try:
            sequences += read(video)
        except (ValueError, FileNotFoundError) as error:
            if on_bad == "stop":
                kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                raise kind(f"{error} (data.on_bad=skip leaves such sequences out)") from error
            print(f"left out {video.name}: {error}")
    return sequences


def _read_label(path: Path, num_lines: int) -> np.ndarray | None:
    """Read a GOT-10k label file, an integer a line: int64 (T,); None where there is none, as in the test set."""
    if not path.is_file():
        return None
    words = read_text(path).split()
    if len(words) != num_lines or not all(re.fullmatch(r"-?[0-9]+", word) for word in words):
        raise ValueError(f"{path} has {len(words)} entries; must be {num_lines} integers, as groundtruth.txt has lines")
    return np.array([int(word) for word in words], np.int64)


def find_groundtruth(path: str | Path) -> Path | None:
    """Find the groundtruth file of a folder of frames (in it, or one level above) or of a video file (beside it).

    Returns:
        groundtruth_rect.txt, groundtruth.txt or groundtruth_rect.1.txt, or <name of the folder or video>.txt one level
        above; None where there is none.
    """
    path = Path(path).resolve()
    places = [path.parent] if path.is_file() else [path, path.parent]
    return _first_groundtruth(places, path.parent / f"{path.stem if path.is_file() else path.name}.txt")


def _first_groundtruth(places: list[Path], named_path: Path) -> Path | None:
    """Find the first file of GROUNDTRUTH_NAMES in the first of several folders that has one, else the named one."""
    paths = [place / name for place in places for name in GROUNDTRUTH_NAMES]
    return next((path for path in [*paths, named_path] if path.is_file()), None)


# ---------------------------------------------------------------------------------------------------------------------
# boxes in text files


def read_boxes(path: str | Path, box_origin: int) -> np.ndarray:
    """Read a groundtruth file: a box a line, 4 numbers (left, top, width, height) or 8 (x1, y1, ... x4, y4: corners).

    Numbers stand apart by commas, tabs, spaces or semicolons, also mixed; a byte-order mark, any line ends and empty
    lines at the end are accepted. A line with nan is a frame without box.

    Args:
        box_origin: 0 or 1: what the file counts from.
    Returns:
        boxes_xywh float64 (N, 4), 0-based px; corners become the box of `corners_to_boxes`.
    Raises:
        FileNotFoundError, ValueError: with the file and the line.
    """
    assert box_origin in (0, 1), box_origin
    lines = _read_lines(Path(path))
    boxes_xywh = np.stack([_read_box(path, number, line) for number, line in enumerate(lines, start=1)])
    boxes_xywh[:, :2] -= box_origin
    return boxes_xywh


def _read_lines(path: Path) -> list[str]:
    lines = read_text(_existing(path)).rstrip().splitlines()
    if not lines:
        raise ValueError(f"{path} is empty; must have a box a line: x,y,width,height")
    return lines


def _read_box(path: str | Path, number: int, line: str) -> np.ndarray:
    try:
        numbers = np.array([float(word) for word in re.split(r"[,;\s]+", line.strip(" \t,;"))])
    except ValueError:
        raise ValueError(
            f"{path}, line {number}, is {line[:60]!r}; must be 4 numbers (x,y,width,height) or 8 (corners), "
            "or nan,nan,nan,nan for a frame without box"
        ) from None
    if len(numbers) not in (4, 8):
        raise ValueError(
            f"{path}, line {number}, has {len(numbers)} numbers; must be 4 (x,y,width,height) or 8 (corners)"
        )
    if np.isinf(numbers).any():
        raise ValueError(f"{path}, line {number}, is {line[:60]!r}; infinity is no pixel")
    if np.isnan(numbers).any():
        return np.full(4, np.nan)
    if len(numbers) == 8:
        first, second, third, fourth = numbers.reshape(4, 2)
        apart_px = np.abs((first + third) - (second + fourth)).max() / 2
        if apart_px > max(1.0, 0.05 * np.ptp(numbers.reshape(4, 2), 0).max()):
            raise ValueError(
                f"{path}, line {number}, is {line[:60]!r}; its 8 numbers are no corners of a box, whose diagonals meet "
                "in their middles: decimal commas, or another tool's columns? Give x,y,width,height with points"
            )
        return corners_to_boxes(numbers[None])[0]
    return numbers


def corners_to_boxes(corners: np.ndarray) -> np.ndarray:
    """Turn rotated boxes into upright ones of about their area, around the same centre.

    Args:
        corners: float (N, 8): x1, y1, ... x4, y4 px, around the box.
    Returns:
        boxes_xywh float64 (N, 4): the corners' bounding box, shrunk to the rotated box's area, plus 1 px on each side.
    Source: the conversion of the VOT toolkit for trackers with upright boxes, as the GOT-10k toolkit has it.
    """
    points = np.asarray(corners, np.float64).reshape(-1, 4, 2)
    side_1 = np.linalg.norm(points[:, 0] - points[:, 1], axis=1)
    side_2 = np.linalg.norm(points[:, 1] - points[:, 2], axis=1)
    bounding_wh = points.max(1) - points.min(1)  # (N, 2)
    bounding_area = np.prod(bounding_wh, 1)
    scale = np.sqrt(side_1 * side_2 / np.where(bounding_area > 0, bounding_area, 1))
    wh = scale[:, None] * bounding_wh + 1
    return np.concatenate([points.mean(1) - wh / 2, wh], 1)


def write_boxes(path: str | Path, boxes_xywh: np.ndarray, box_origin: int, decimals: int = 4) -> None:
    """Write boxes to a text file, x,y,width,height a line, counted from box_origin.

    Args:
        boxes_xywh: float (N, 4), 0-based px; nan for a frame without box.
    """
    in_file = file_coordinates(np.asarray(boxes_xywh, np.float64), box_origin)
    lines = [",".join(f"{value:.{decimals}f}" for value in row) + "\n" for row in in_file]
    Path(path).write_text("".join(lines), encoding="utf-8", newline="")


def file_coordinates(boxes_xywh: np.ndarray, box_origin: int) -> np.ndarray:
    """Count boxes from box_origin, as a dataset's files do: float (N, 4), a copy."""
    return boxes_xywh + np.array([box_origin, box_origin, 0, 0])


# ---------------------------------------------------------------------------------------------------------------------
# result files

# The boxes' and the times' file of a sequence, {0}, and their decimals, as each benchmark's toolkit has them.
RESULT_FILES = {
    "otb": ("{0}.txt", "times/{0}_time.txt", 3, 8),
    "got10k": ("{0}/{0}_001.txt", "{0}/{0}_time.txt", 3, 8),
    "vot": ("unsupervised/{0}/{0}_001.txt", "unsupervised/{0}/{0}_time.txt", 4, 4),
}


def write_result(
    layout: str, folder: str | Path, name: str, boxes_xywh: np.ndarray, times_s: np.ndarray, box_origin: int
) -> Path:
    """Write the tracked boxes of a sequence as a benchmark's toolkit does, which then reads them.

    otb      <folder>/<name>.txt (3 decimals), <folder>/times/<name>_time.txt
    got10k   <folder>/<name>/<name>_001.txt (3 decimals), <folder>/<name>/<name>_time.txt
    vot      <folder>/unsupervised/<name>/<name>_001.txt (4 decimals, first line 1: the start), ..._time.txt

    Args:
        folder: the tracker's.
        boxes_xywh: float (T, 4), 0-based px, the first as given.
        times_s: float (T,), seconds for each frame.
        box_origin: 0 or 1: what the dataset's files count from (`Sequence.box_origin`).
    Returns:
        the file with the boxes.
    """
    *places, box_decimals, time_decimals = RESULT_FILES[layout]
    path, time_path = (Path(folder, place.format(name)) for place in places)
    path.parent.mkdir(parents=True, exist_ok=True)
    time_path.parent.mkdir(parents=True, exist_ok=True)
    write_boxes(path, boxes_xywh, box_origin, box_decimals)
    if layout == "vot":
        lines = read_text(path).splitlines(keepends=True)
        path.write_text("".join(["1\n", *lines[1:]]), encoding="utf-8", newline="")
    times = "".join(f"{time_s:.{time_decimals}f}\n" for time_s in times_s)
    time_path.write_text(times.replace("nan", "NaN"), encoding="utf-8", newline="")
    return path


def find_result(folder: str | Path, name: str) -> Path:
    """Find a sequence's result file in a tracker's folder, in any of the layouts of `write_result`.

    Jogging.1, Jogging-1 and Jogging_1 mean the same, and Human4, Human4-2 and Human4_2: toolkits name them differently.

    Raises:
        FileNotFoundError: where there is none.
    """
    base, number = re.fullmatch(r"(.*?)(?:[.\-_]([12]))?", name).groups()
    names = [name, *(f"{base}{mark}{each}" for each in ([number] if number else ["1", "2"]) for mark in ".-_")]
    places = [place for place, *_ in RESULT_FILES.values()] + ["baseline/{0}/{0}_001.txt"]
    paths = [Path(folder, place.format(each)) for each in names for place in places]
    result_path = next((path for path in paths if path.is_file()), None)
    if result_path is None:
        raise FileNotFoundError(f"{folder} has no result of {name}, such as {name}.txt or {name}/{name}_001.txt")
    return result_path


def read_result(folder: str | Path, name: str) -> np.ndarray:
    """Read the tracked boxes of a sequence, from any of the layouts of `write_result`, or tab-separated integers.

    Returns:
        boxes float64 (T, 4), counted as in the file (metrics are computed on these, as toolkits do); nan where a VOT
        file has a mark (1 start, 2 failure, 0 skipped) in place of a box.
    Raises:
        FileNotFoundError, ValueError: with the file and the line.
    """
    path = find_result(folder, name)
    boxes = [
        np.full(4, np.nan) if line.strip() in ("0", "1", "2") else _read_box(path, number, line)
        for number, line in enumerate(_read_lines(path), start=1)
    ]
    return np.stack(boxes)


# ---------------------------------------------------------------------------------------------------------------------
# splits and order


def _in_order(sequences: list[Sequence]) -> list[Sequence]:
    """Sort by name, in natural order; names must be unique."""
    sequences = sorted(sequences, key=lambda sequence: natural_key(sequence.name))
    for before, sequence in zip(sequences, sequences[1:], strict=False):
        if before.name == sequence.name:
            dirs = f"{before.frame_dir} and {sequence.frame_dir}"
            raise ValueError(f"{dirs} are both sequences {sequence.name}; names are unique")
    return sequences


def _plain_name(name: str) -> str:
    """Write Jogging.1, Jogging-1 and Jogging_1 the same way, and accents, which file systems write in two ways."""
    return re.sub(r"[.\-_](?=[0-9]+$)", ".", unicodedata.normalize("NFC", name))


def _read_split(
    read: Callable,
    train_videos: list[Path] | None,
    val_videos: list[Path] | None,
    on_bad: Annotated[str, one_of("stop", "skip")],
    train_sequences: list[str] | str | None = None,
    val_sequences: list[str] | str | None = None,
    val_fraction: float = 0.0,
    split_seed: int = 0,
) -> tuple[list[Sequence], list[Sequence]]:
    """Read what a dataset has on disk, and split it.

    Args:
        read, train_videos, val_videos: from a function of SEQUENCE_FORMATS. With both parts, these are the split, and
            names pick some of each. With the first alone, names split it (with names of one part, the rest is the
            other), else a seeded fraction of the videos. With the second alone the same, but without names all of it
            validates.
    """
    if train_videos is None and val_videos is None:
        raise ValueError("data.train_folder and data.val_folder are both null; at least one must name a folder")
    train, val = (None if videos is None else _read_all(read, videos, on_bad) for videos in (train_videos, val_videos))
    is_divided = train is not None and val is not None
    if not is_divided:
        val_fraction = val_fraction if val is None else 1.0
        train = val = train if val is None else val
    train_names = _named(train, train_sequences, "train_sequences")
    val_names = _named(val, val_sequences, "val_sequences")
    if not is_divided:
        if train_names is None and val_names is None:
            val_videos, _ = draw_split({sequence.video for sequence in train}, val_fraction, split_seed)
            val_names = {sequence.name for sequence in train if sequence.video in val_videos}
        elif train_names is not None and val_names is not None and train_names & val_names:
            raise ValueError(f"data.train_sequences and data.val_sequences both name {min(train_names & val_names)}")
        names = {sequence.name for sequence in train}
        train_names = names - val_names if train_names is None else train_names
        val_names = names - train_names if val_names is None else val_names
    train = [sequence for sequence in train if train_names is None or sequence.name in train_names]
    return train, [sequence for sequence in val if val_names is None or sequence.name in val_names]


def _list_names(names: list[str] | str, key: str) -> list[list[str]]:
    """Read the names of a list or a text file, each in the forms that may be meant.

    A line of a file is a name, alone or before other columns, or DAVIS 2016's: the paths of a picture and a mask, whose
    folder is the video.
    """
    if not isinstance(names, str):
        return [[str(name)] for name in names]
    if not Path(names).is_file():
        raise FileNotFoundError(f"data.{key} is {names}; no such list file (seen from {Path.cwd()})")
    lines = [(line, line.split()[0]) for line in read_lines(names)]
    return [[line, Path(word).parent.name if "/" in word else word] for line, word in lines]


def _named(sequences: list[Sequence], names: list[str] | str | None, key: str) -> set[str] | None:
    """Return the sequences that a list or a text file names, by their own name or their video's; None for no list."""
    if names is None:
        return None
    by_name: dict[str, set[str]] = {}
    for sequence in sequences:
        for name in {sequence.name, sequence.video, Path(sequence.video).name}:
            by_name.setdefault(name, set()).add(sequence.name)
    for sequence in sequences:
        by_name.setdefault(_plain_name(sequence.name), {sequence.name})
    named = set()
    for forms in _list_names(names, key):
        sequence_names = next(
            (by_name[form] for name in forms for form in (name, _plain_name(name)) if form in by_name), None
        )
        if sequence_names is None:
            example = f"; names look like {sequences[0].name}" if sequences else ""
            raise ValueError(f"data.{key} names {forms[0]}, which the dataset lacks{example}")
        named |= sequence_names
    return named


# ---------------------------------------------------------------------------------------------------------------------
# the list, kept in a file

DESCRIBED = ("name", "video", "num_annotated", "box_origin", "frame_wh")  # a sequence's fields that are plain values


def _write_index(path: Path, asked: str, train_sequences: list[Sequence], val_sequences: list[Sequence]) -> None:
    """Keep a list in an .npz file of plain arrays: a text with what describes each sequence, and their frames' rows."""
    sequences = train_sequences + val_sequences
    described = [
        {key: getattr(sequence, key) for key in DESCRIBED}
        | {"frame_dir": str(sequence.frame_dir.resolve()), "num_frames": len(sequence)}
        | {"has_cover": sequence.cover is not None, "mask_id": sequence.mask_id}
        | {"mask_dir": None if sequence.mask_dir is None else str(sequence.mask_dir.resolve())}
        for sequence in sequences
    ]
    text = json.dumps({"asked": asked, "num_train": len(train_sequences), "sequences": described})
    names = "\n".join(name for sequence in sequences for name in sequence.frame_names)
    covers = [np.zeros(len(sequence)) if sequence.cover is None else sequence.cover for sequence in sequences]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        np.savez_compressed(
            file,
            described=np.frombuffer(text.encode(), np.uint8),
            frame_names=np.frombuffer(names.encode(), np.uint8),
            boxes_xywh=np.concatenate([sequence.boxes_xywh for sequence in sequences]),
            visible=np.concatenate([sequence.visible for sequence in sequences]),
            cover=np.concatenate(covers).astype(np.int64),
        )
    os.replace(partial, path)


def _read_index(path: Path, asked: str) -> tuple[list[Sequence], list[Sequence]]:
    """Read what `_write_index` wrote, if it was written for the same dataset and keys."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("described", "frame_names", "boxes_xywh", "visible", "cover")}
        header = json.loads(arrays["described"].tobytes().decode())
        is_same = header["asked"] == asked
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"data.index {path} is damaged or not an index; remove it, and it is made anew") from error
    if not is_same:
        raise ValueError(f"data.index {path} was made for other data keys; remove it, or name another file")
    frame_names = [sys.intern(name) for name in arrays["frame_names"].tobytes().decode().split("\n")]
    sequences, end = [], 0
    for entry in header["sequences"]:
        start, end = end, end + entry["num_frames"]
        entry["frame_wh"] = tuple(entry["frame_wh"]) if entry["frame_wh"] else None
        sequences.append(
            Sequence(
                **{key: entry[key] for key in DESCRIBED},
                frame_dir=Path(entry["frame_dir"]),
                mask_dir=Path(entry["mask_dir"]) if entry.get("mask_dir") else None,  # an older index has none
                mask_id=entry.get("mask_id"),
                frame_names=tuple(frame_names[start:end]),
                boxes_xywh=arrays["boxes_xywh"][start:end],
                visible=arrays["visible"][start:end],
                cover=arrays["cover"][start:end] if entry["has_cover"] else None,
            )
        )
    return sequences[: header["num_train"]], sequences[header["num_train"] :]
