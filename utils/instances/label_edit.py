"""The masks of one picture while a person edits them: the label map is painted along, and changes can be taken back.

What is on disk: utils/instances/label_folder.py.
"""

from collections import deque
from typing import NamedTuple

import numpy as np

from utils.instances.codecs import rle_to_part
from utils.settings import is_number

HIDES_MUCH = 0.5  # of another object: worth a word
MOST_UNDONE = 50  # changes that can be taken back; of each, a list of objects that are shared


class Placed(NamedTuple):
    """An annotation of a record, and where its mask lies."""

    annotation: dict
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 px, the last two not included; zeros for an empty mask
    area: int  # px


def place(annotation: dict) -> Placed:
    """Find where the mask of an annotation lies."""
    part, (x, y) = rle_to_part(annotation["segmentation"])
    return Placed(annotation, (x, y, x + part.shape[1], y + part.shape[0]), int(np.count_nonzero(part)))


class EditedLabels:
    """The objects of a picture, the lowest first, their label map, and what was changed last."""

    def __init__(self, record: dict, annotations: list[dict], orig_hw: tuple[int, int]):
        """Take over a record.

        Args:
            record: from `label_folder.read_record`.
            annotations: those of its masks that are shown.
            orig_hw: of the picture.
        """
        self.record = {key: value for key, value in record.items() if key != "annotations"}
        self.objects: list[Placed] = []
        self.label_map = np.zeros(orig_hw, np.int32)
        self.undone = deque(maxlen=MOST_UNDONE)  # of (objects, record) before each change
        self._paint([place(annotation) for annotation in annotations])

    def change(self, objects: list[Placed], rejected: list[float]) -> None:
        """Put other objects in the place of these, such that it can be undone.

        Args:
            rejected: predicted IoUs of automatic masks that the change corrects or deletes.
        """
        self.undone.append((self.objects, self.record))
        if rejected:
            self.record = self.record | {"rejected": [*self.record.get("rejected", []), *rejected]}
        self._paint(objects)

    def take_back(self) -> None:
        """Take back the last change."""
        objects, self.record = self.undone.pop()
        self._paint(objects)

    def _paint(self, objects: list[Placed]) -> None:
        repaint(self.label_map, self.objects, objects)
        self.objects = objects

    def describe(self) -> tuple[list[dict], list[str]]:
        """Say what the objects are, and which of them hide much of another.

        Returns:
            [{"id", "origin", "class", "predicted_iou", "area", "hidden_share"}, ...], and a line for each pair.
        """
        visible = np.bincount(self.label_map.ravel(), minlength=len(self.objects) + 1)
        described, warnings = [], []
        for number, (annotation, _, area) in enumerate(self.objects, 1):
            hidden_share = 1 - float(visible[number]) / area if area else 0.0
            origin, name, predicted_iou = (annotation.get(key) for key in ("origin", "class", "predicted_iou"))
            described.append(
                {
                    "id": number,
                    "origin": origin if isinstance(origin, str) else None,  # a record may be of another program
                    "class": name if isinstance(name, str) else None,
                    "predicted_iou": predicted_iou if is_number(predicted_iou) else None,
                    "area": area,
                    "hidden_share": hidden_share,
                }
            )
            if hidden_share > HIDES_MUCH:
                hiding, share = self._find_hiding(number)
                if share > HIDES_MUCH:
                    warnings.append(f"object {hiding} hides {share:.0%} of object {number}")
        return described, warnings

    def _find_hiding(self, number: int) -> tuple[int, float]:
        """Find which object hides most of one, and how large a share of it."""
        annotation, (x1, y1, x2, y2), area = self.objects[number - 1]
        part, _ = rle_to_part(annotation["segmentation"])
        counts = np.bincount(self.label_map[y1:y2, x1:x2][part])
        counts[number : number + 1] = 0
        return int(counts.argmax()), float(counts.max()) / area


def repaint(label_map: np.ndarray, before: list[Placed], after: list[Placed]) -> None:
    """Paint the map of some objects into that of others, where they differ alone.

    Args:
        label_map: int32 (H, W), each object's place from 1, later ones on top; it is changed.
        before, after: the objects that it shows, and that it is to show. What is in both is the same in memory.
    """
    masks_before = [placed.annotation["segmentation"] for placed in before]
    masks_after = [placed.annotation["segmentation"] for placed in after]
    most = min(len(before), len(after))
    first = next((i for i in range(most) if masks_before[i] is not masks_after[i]), most)
    last = next((i for i in range(most - first) if masks_before[-1 - i] is not masks_after[-1 - i]), most - first)
    old, new = before[first : len(before) - last], after[first : len(after) - last]
    if last and len(old) != len(new):
        label_map[label_map > len(before) - last] += len(after) - len(before)
    if not old and not last:  # on top of all
        for number, placed in enumerate(new, first + 1):
            _draw(label_map, placed, number, placed.box)
        return
    boxes = np.array([placed.box for placed in [*old, *new] if placed.area]).reshape(-1, 4)
    if len(boxes):
        x1, y1, x2, y2 = window = (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())
        label_map[y1:y2, x1:x2] = 0
        for number, placed in enumerate(after, 1):
            _draw(label_map, placed, number, window)


def _draw(label_map: np.ndarray, placed: Placed, number: int, window: tuple[int, int, int, int]) -> None:
    """Draw an object's mask where it lies in a window, x1, y1, x2, y2 px of the picture."""
    x, y = placed.box[:2]
    x1, y1 = max(x, window[0]), max(y, window[1])
    x2, y2 = min(placed.box[2], window[2]), min(placed.box[3], window[3])
    if x1 < x2 and y1 < y2:
        part, _ = rle_to_part(placed.annotation["segmentation"])
        label_map[y1:y2, x1:x2][part[y1 - y : y2 - y, x1 - x : x2 - x]] = number
