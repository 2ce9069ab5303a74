"""Tracks as other programs read them: MOTChallenge's text, CVAT's video xml, DAVIS's folders of masks.

A format is a function (folder, name, tracked, mask_paths) and a row of WRITERS. T frames, N objects.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from utils.log import write_text

NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that no xml holds


@dataclass(frozen=True)
class Tracked:
    """What is written of a video's objects."""

    boxes_xywh: np.ndarray  # float64 (T, N, 4) px, 0-based; nan before an object is there
    scores: np.ndarray  # float64 (T, N)
    is_lost: np.ndarray  # bool (T, N)
    frame_hw: tuple[int, int]  # of the first frame, px


def write_mot(folder: Path, name: str, tracked: Tracked, mask_paths: dict[int, Path]) -> None:
    """Write <folder>/mot.txt: frame, object, left, top, width, height, score, -1, -1, -1; all counted from 1.

    Frames in which an object is lost have no line of it.
    """
    lines = []
    for index, (boxes, scores, is_lost) in enumerate(
        zip(tracked.boxes_xywh, tracked.scores, tracked.is_lost, strict=True)
    ):
        for n in np.flatnonzero(~is_lost & np.isfinite(boxes).all(1)).tolist():
            x, y, width, height = boxes[n].tolist()
            lines.append(
                f"{index + 1},{n + 1},{x + 1:.3f},{y + 1:.3f},{width:.3f},{height:.3f},{scores[n]:.4f},-1,-1,-1"
            )
    write_text(folder / "mot.txt", "".join(f"{line}\n" for line in lines))


def write_cvat(folder: Path, name: str, tracked: Tracked, mask_paths: dict[int, Path]) -> None:
    """Write <folder>/cvat.xml, "CVAT for video 1.1": a track for each object, outside where it is lost.

    Boxes run along the edges of pixels: xtl is the left one's left edge, xbr the right one's right edge.
    """
    height, width = tracked.frame_hw
    num_frames, num_objects = tracked.is_lost.shape
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    for key, value in {"name": name, "size": num_frames, "mode": "interpolation", "start_frame": 0}.items():
        ElementTree.SubElement(task, key).text = NO_XML.sub("\N{REPLACEMENT CHARACTER}", str(value))
    ElementTree.SubElement(task, "stop_frame").text = str(num_frames - 1)
    label = ElementTree.SubElement(ElementTree.SubElement(task, "labels"), "label")
    ElementTree.SubElement(label, "name").text = "object"
    ElementTree.SubElement(label, "attributes")
    size = ElementTree.SubElement(task, "original_size")
    ElementTree.SubElement(size, "width").text, ElementTree.SubElement(size, "height").text = str(width), str(height)
    for n in range(num_objects):
        track = ElementTree.SubElement(root, "track", id=str(n), label="object", source="automatic")
        last, was_outside = None, True
        for index in range(num_frames):
            x, y, box_width, box_height = tracked.boxes_xywh[index, n].tolist()
            is_outside = bool(tracked.is_lost[index, n]) or not np.isfinite([x, y, box_width, box_height]).all()
            if is_outside and was_outside:
                continue  # a track is outside until a frame says otherwise
            corners = last if is_outside else [x, y, x + box_width, y + box_height]
            edges = {key: f"{value:.2f}" for key, value in zip(("xtl", "ytl", "xbr", "ybr"), corners, strict=True)}
            state = {"frame": str(index), "outside": str(int(is_outside)), "occluded": "0", "keyframe": "1"}
            ElementTree.SubElement(track, "box", state | edges | {"z_order": "0"})
            last, was_outside = corners, is_outside
    ElementTree.indent(root)
    write_text(folder / "cvat.xml", ElementTree.tostring(root, encoding="unicode", xml_declaration=True))


def write_davis(folder: Path, name: str, tracked: Tracked, mask_paths: dict[int, Path]) -> None:
    """Write <folder>/davis/<name>/00000.png, ...: the masks, numbered by frame, as DAVIS's toolkits take results."""
    to_dir = folder / "davis" / name
    to_dir.mkdir(parents=True, exist_ok=True)
    for index, path in mask_paths.items():
        to_path = to_dir / f"{index:05d}.png"
        if not to_path.exists():
            shutil.copyfile(path, to_path)


WRITERS: dict[str, Callable[[Path, str, Tracked, dict[int, Path]], None]] = {
    "mot": write_mot,
    "cvat": write_cvat,
    "davis": write_davis,
}
