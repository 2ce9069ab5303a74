"""mode=annotate: a local page on which a person labels pictures with the model's help, into a folder of labels.

The page is annotate.html beside this file; what it asks and is answered, below its secret address, in json:

    GET  pictures, picture?number=N&side=S, rate        POST open, predict, save, delete, set_class, undo, done,
                                                             heartbeat, release, latency, rate

An unfinished object is with the page alone, as its list of actions (utils/sam2/interactive.py); a finished one is on
disk before it is answered for. The folder of labels is utils/instances/label_folder.py's. Everything from outside is
checked here, and refused in one line; pictures are asked for by their number, never by a path.

Source: Kirillov et al. 2023 (Segment Anything), section 4 (assisted and semi-automatic stage), appendix E (rating).
"""

import asyncio
import base64
import contextlib
import csv
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import cv2
import numpy as np
import torch
import tornado.httpserver
import tornado.netutil
import tornado.web

from utils import images, run
from utils.instances import label_folder
from utils.instances.codecs import mask_to_rle, rle_to_mask
from utils.instances.label_edit import EditedLabels, Placed, place
from utils.instances.label_folder import ASSISTED, AUTOMATIC, PERSON
from utils.sam2 import interactive
from utils.sam2 import model as models
from utils.sam2.model import Embeddings
from utils.settings import is_number, one_of

log = logging.getLogger("infer_sam2")
PAGE = Path(__file__).with_suffix(".html")
MOST_BODY_BYTES, BODY_TIMEOUT_S, IDLE_TIMEOUT_S = 2**20, 10, 60
LOCK_S = 10  # a tab that was not heard of for so long no longer keeps others from writing
VIEW_SIDE, SIDES = 1024, (1024, 2048, 4096)  # px, longest side of what is shown
LOSSLESS_PX = 2**18  # pictures of no more pixels are sent as PNG
MOST_PREPARED, MOST_EDITED = 3, 3  # pictures whose embeddings, and whose labels, are in memory
MOST_SECONDS, MOST_ENTRIES = 1e6, 1000
ACCEPTED_SHARE, FEWEST_CHECKED, CONFIDENT_IOU = 0.9, 20, 0.9


@dataclass(frozen=True)
class AnnotateSettings:
    """How pictures are offered to a person (`annotate:`)."""

    port: int | None = None  # None: a free one
    stage: Annotated[str, one_of("assisted", "semi", "rate")] = "assisted"
    confident_iou: float | None = (
        None  # stage=semi: automatic masks below are not shown; None: see choose_confident_iou
    )
    order: Annotated[str, one_of("name", "uncertain")] = "name"
    classes: list[str] | None = None  # names, for the keys 1 to 9; None: those of the checkpoint, if it knows any


class View(NamedTuple):
    """A picture as it is shown, and as the model takes it."""

    orig_hw: tuple[int, int]
    data: bytes  # JPEG or PNG of at most VIEW_SIDE px
    encoder_input: torch.Tensor  # float32 (3, S, S)


class Prepared:
    """A picture that is read, then encoded, in threads; an exception is that of its reading."""

    def __init__(self):
        self.view: asyncio.Task[View] | None = None
        self.embeddings: asyncio.Task[Embeddings] | None = None
        self.is_next = False  # waits behind other work
        self.is_started = False  # its encoding
        self.memory: dict[tuple[str, ...], interactive.Drawn] = {}

    def cancel(self) -> None:
        for task in (self.view, self.embeddings):
            if task is not None:
                task.cancel()


class Refusal(tornado.web.HTTPError):
    """An answer in one line instead of what was asked for."""

    def __init__(self, status: int, line: str):
        super().__init__(status)
        self.line = line


# ---------------------------------------------------------------------------------------------------------------------
# which pictures, in which order, which of their masks


def order_pictures(pictures: list[images.Picture], labels_dir: Path, order: str) -> list[images.Picture]:
    """Put pictures in the order in which they are offered: as they are, or by what the model made of them.

    Args:
        order: name, or uncertain: by the mean predicted IoU of their automatic masks, lowest first, those without last.
    """
    if order == "name":
        return pictures
    means = {}
    for picture in pictures:
        record = label_folder.read_record(label_folder.record_path(labels_dir, picture.name))
        scores = [each["predicted_iou"] for each in record.get("annotations", []) if _is_scored(each)]
        means[picture.name] = float(np.mean(scores)) if scores else np.inf
    return sorted(pictures, key=lambda picture: means[picture.name])


def _is_scored(annotation: dict) -> bool:
    return annotation.get("origin") == AUTOMATIC and is_number(annotation.get("predicted_iou"))


def choose_confident_iou(labels_dir: Path) -> tuple[float, int]:
    """Choose from which predicted IoU on automatic masks are worth showing: where people left 90 % as they were.

    Returns:
        the lowest predicted IoU such that of the masks of finished pictures that have it or more 90 % were accepted
        (1 where there is none); 0.9 while fewer than 20 were checked; and how many were.
    """
    accepted, rejected = [], []
    for name in sorted(label_folder.read_done(labels_dir)):
        record = label_folder.read_record(label_folder.record_path(labels_dir, name))
        accepted += [each["predicted_iou"] for each in record.get("annotations", []) if each.get("checked")]
        rejected += record.get("rejected", [])
    num_checked = len(accepted) + len(rejected)
    if num_checked < FEWEST_CHECKED:
        return CONFIDENT_IOU, num_checked
    scores = np.array([*accepted, *rejected])
    order = np.argsort(-scores, kind="stable")
    scores, is_accepted = scores[order], (np.arange(num_checked) < len(accepted))[order]
    shares = np.cumsum(is_accepted) / np.arange(1, num_checked + 1)
    is_last = np.append(scores[1:] != scores[:-1], True)  # of those with the same score all are in
    good = np.flatnonzero(is_last & (shares >= ACCEPTED_SHARE))
    return (float(scores[good[-1]]) if len(good) else 1.0), num_checked


def count_rounds(labels_dir: Path) -> int:
    """Count the trainings on a folder of labels."""
    path = labels_dir / "rounds.csv"
    if not path.exists():
        return 0
    with path.open(encoding="utf-8", newline="") as file:
        return sum(1 for _ in csv.DictReader(file))


def fit_view(orig_hw: tuple[int, int], side: int = VIEW_SIDE) -> tuple[int, int]:
    """Fit a picture of (H, W) px into a square, without enlarging it: (h, w)."""
    scale = min(1.0, side / max(orig_hw))
    return tuple(max(1, round(scale * length)) for length in orig_hw)


def shrink_ids(label_map: np.ndarray, view_hw: tuple[int, int]) -> np.ndarray:
    """Bring a map of ids to the size of a view, each pixel the one in its middle: (H, W) -> (h, w)."""
    rows, columns = (
        ((np.arange(small) + 0.5) * large / small).astype(np.int64)
        for small, large in zip(view_hw, label_map.shape, strict=True)
    )
    return label_map[rows[:, None], columns]


def encode_png(channels: list[np.ndarray], hw: tuple[int, int]) -> str:
    """Encode up to three channels, uint8 (h, w), as red, green and blue of a PNG in base64."""
    pixels = np.zeros((*hw, 3), np.uint8)
    for number, channel in enumerate(channels):
        pixels[..., 2 - number] = channel  # OpenCV's order is BGR
    is_encoded, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert is_encoded
    return base64.b64encode(data).decode("ascii")


def encode_view(image_rgb: np.ndarray, side: int) -> bytes:
    """Encode a picture, uint8 (H, W, 3), for the page: PNG where it is small, else JPEG."""
    view_hw = fit_view(image_rgb.shape[:2], side)
    if view_hw != image_rgb.shape[:2]:
        image_rgb = cv2.resize(image_rgb, view_hw[::-1], interpolation=cv2.INTER_AREA)
    pixels = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
    is_small = view_hw[0] * view_hw[1] <= LOSSLESS_PX
    is_encoded, data = cv2.imencode(
        ".png" if is_small else ".jpg", pixels, [] if is_small else [cv2.IMWRITE_JPEG_QUALITY, 92]
    )
    assert is_encoded
    return data.tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# the server's state


class Annotation:
    """What the server knows, and the answers to what the page asks."""

    def __init__(
        self,
        model: torch.nn.Module,
        pictures: list[images.Picture],
        labels_dir: Path,
        settings: AnnotateSettings,
        classes: list[str],
        confident_iou: float | None,
        precision: str,
        run_dir: Path,
    ):
        """Take over what is served.

        Args:
            model: in eval mode.
            pictures: in the order in which they are offered.
            labels_dir: a folder of labels, opened for writing.
            confident_iou: automatic masks below are not shown; None: all are.
            run_dir: latency.csv is written there.
        """
        self.model, self.pictures, self.labels_dir = model, pictures, labels_dir
        self.settings, self.classes, self.confident_iou, self.precision = settings, classes, confident_iou, precision
        self.round = 1 + count_rounds(labels_dir)
        self.val_names = set(label_folder.listing.read_lines(labels_dir / "val.txt"))
        self.done_names = label_folder.read_done(labels_dir)
        self.labelled_names = set(label_folder.list_records(labels_dir))
        self.locks: dict[int, tuple[str, float]] = {}  # number -> the tab that writes, and when it was last heard of
        self.prepared: dict[int, Prepared] = {}  # the latest last
        self.edited: dict[int, EditedLabels] = {}  # the latest last
        self.is_writing = asyncio.Lock()  # what changes labels goes in the order of its coming
        self.reading, self.decoding = ThreadPoolExecutor(2), ThreadPoolExecutor(1)
        self.encoding, self.writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.encoding_next = ThreadPoolExecutor(1, initializer=_step_back)
        self.num_encoding_next = 0
        self.latency_path = run_dir / "latency.csv"
        self.latencies: list[tuple[float, float, bool]] = []
        with self.latency_path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(["picture", "total_ms", "decoder_ms", "waited_ms", "added_ms", "is_encoding"])

    # ----- pictures

    def list_all(self) -> dict:
        """List all pictures."""
        listed = [
            {
                "name": picture.name,
                "is_val": picture.name in self.val_names,
                "is_done": picture.name in self.done_names,
                "has_labels": picture.name in self.labelled_names,
            }
            for picture in self.pictures
        ]
        return {
            "stage": self.settings.stage,
            "classes": self.classes,
            "confident_iou": self.confident_iou,
            "pictures": listed,
        }

    def prepare(self, number: int, is_next: bool) -> Prepared:
        """Read and encode a picture, unless it is in memory; the next one behind all other work."""
        prepared = self.prepared.pop(number, None)
        is_late = prepared is not None and prepared.is_next and not is_next and not prepared.is_started
        if prepared is None or is_late:
            if prepared is not None:
                prepared.cancel()
            prepared = Prepared()
            prepared.is_next = is_next
            prepared.view = asyncio.create_task(self._read(self.pictures[number]))
            prepared.embeddings = asyncio.create_task(self._encode(prepared))
            for task in (prepared.view, prepared.embeddings):
                task.add_done_callback(lambda task: task.cancelled() or task.exception())  # who waits for it is told
        self.prepared[number] = prepared
        while len(self.prepared) > MOST_PREPARED:
            self.prepared.pop(next(iter(self.prepared))).cancel()
        return prepared

    async def _read(self, picture: images.Picture) -> View:
        def read() -> View:
            image_rgb = images.read_image(picture.path)
            encoder_input = models.preprocess(image_rgb, self.model.image_size, self.model.device)
            return View(image_rgb.shape[:2], encode_view(image_rgb, VIEW_SIDE), encoder_input)

        return await asyncio.get_running_loop().run_in_executor(self.reading, read)

    async def _encode(self, prepared: Prepared) -> Embeddings:
        view = await asyncio.shield(prepared.view)

        @torch.inference_mode()
        def encode() -> Embeddings:
            prepared.is_started = True
            self.num_encoding_next += prepared.is_next  # this thread alone changes it where it is not 0
            try:
                with run.autocast(self.model.device, self.precision):
                    return models.encode(self.model, view.encoder_input[None])
            finally:
                self.num_encoding_next -= prepared.is_next

        executor = self.encoding_next if prepared.is_next else self.encoding
        return await asyncio.get_running_loop().run_in_executor(executor, encode)

    async def see(self, number: int) -> View:
        """Wait for a picture to be read.

        Raises:
            Refusal: for one that cannot be.
        """
        try:
            return await asyncio.shield(self.prepare(number, is_next=False).view)
        except (ValueError, OSError) as error:
            raise Refusal(409, f"{self.pictures[number]}: {_one_line(error)}") from error

    async def show(self, number: int, side: int) -> bytes:
        """Return a picture's pixels as a file for the browser, no side longer than `side`."""
        if side == VIEW_SIDE:
            return (await self.see(number)).data

        def read() -> bytes:
            return encode_view(images.read_image(self.pictures[number].path), side)

        try:
            return await asyncio.get_running_loop().run_in_executor(self.reading, read)
        except (ValueError, OSError) as error:
            raise Refusal(409, f"{self.pictures[number]}: {_one_line(error)}") from error

    # ----- who may write

    def may_write(self, number: int, tab: str) -> bool:
        """Let a tab write to a picture, if no other does."""
        holder, heard_s = self.locks.get(number, (tab, 0.0))
        if holder != tab and time.monotonic() - heard_s < LOCK_S:
            return False
        self.locks[number] = tab, time.monotonic()
        return True

    def hear(self, number: int, tab: str) -> bool:
        """Note that a tab still has a picture open; tell whether it may write to it."""
        if self.locks.get(number, ("", 0.0))[0] != tab:
            return False
        self.locks[number] = tab, time.monotonic()
        return True

    def release(self, number: int, tab: str) -> None:
        """Let others write to a picture."""
        if self.locks.get(number, ("", 0.0))[0] == tab:
            del self.locks[number]

    # ----- labels

    async def labels_of(self, number: int, orig_hw: tuple[int, int]) -> EditedLabels:
        """Return the labels of a picture, which are read if they are not in memory.

        Raises:
            Refusal: for a record that is none, or of another size.
        """
        picture = self.pictures[number]
        labels = self.edited.pop(number, None)
        if labels is None:
            try:
                labels = await self.write(self._read_labels, picture, orig_hw)
            except (ValueError, OSError) as error:
                raise Refusal(409, _one_line(error)) from error
            labels = self.edited.pop(number, labels)  # which another request has read meanwhile
        self.edited[number] = labels
        while len(self.edited) > MOST_EDITED:
            del self.edited[next(iter(self.edited))]
        return labels

    def _read_labels(self, picture: images.Picture, orig_hw: tuple[int, int]) -> EditedLabels:
        path = label_folder.record_path(self.labels_dir, picture.name)
        record = label_folder.read_record(path)
        if record and (record["image"]["height"], record["image"]["width"]) != orig_hw:
            sizes = [record["image"]["height"], record["image"]["width"]], list(orig_hw)
            raise ValueError(f"{path} is of a picture of {sizes[0]} px (height, width), {picture} has {sizes[1]} now")
        annotations = [each for each in record.get("annotations", []) if self._is_shown(each)]
        return EditedLabels(record, annotations, orig_hw)

    def _is_shown(self, annotation: dict) -> bool:
        if self.confident_iou is None or annotation.get("origin") != AUTOMATIC or annotation.get("checked"):
            return True
        return _is_scored(annotation) and annotation["predicted_iou"] >= self.confident_iou

    async def write(self, function: Callable, *arguments) -> object:
        """Call a function in the thread that alone reads and changes labels."""
        return await asyncio.get_running_loop().run_in_executor(self.writing, function, *arguments)

    def describe(self, number: int, labels: EditedLabels) -> dict:
        """Describe the labels of a picture for the page; in the thread that writes."""
        ids = shrink_ids(labels.label_map, fit_view(labels.label_map.shape))
        objects, warnings = labels.describe()
        return {
            "map": encode_png([ids & 255, ids >> 8], ids.shape),
            "objects": objects,
            "warnings": warnings,
            "can_undo": bool(labels.undone),
            "is_done": self.pictures[number].name in self.done_names,
        }

    def store(self, number: int, labels: EditedLabels) -> dict:
        """Write the labels of a picture to disk, then describe them; in the thread that writes."""
        picture = self.pictures[number]
        is_done = picture.name in self.done_names
        annotations = [mark_checked(placed.annotation, is_done) for placed in labels.objects]
        record = labels.record | {"annotations": annotations}
        label_folder.write_labels(self.labels_dir, picture, labels.label_map.shape, record, labels.label_map)
        self.labelled_names.add(picture.name)
        return self.describe(number, labels)

    async def open(self, number: int, tab: str) -> dict:
        """Open a picture in a tab: it is encoded, and the next one after it."""
        picture = self.pictures[number]
        answer = {"name": picture.name, "width": 0, "height": 0, "view_width": 0, "view_height": 0}
        answer |= {"is_writable": False, "error": None, "is_done": picture.name in self.done_names}
        answer |= {"map": None, "objects": [], "warnings": [], "can_undo": False}
        self.prepare(number, is_next=False)
        if number + 1 < len(self.pictures):
            self.prepare(number + 1, is_next=True)
        try:
            view = await self.see(number)
            answer |= {"height": view.orig_hw[0], "width": view.orig_hw[1]}
            answer["view_height"], answer["view_width"] = fit_view(view.orig_hw)
            labels = await self.labels_of(number, view.orig_hw)
        except Refusal as refusal:
            return answer | {"error": refusal.line}
        is_writable = self.may_write(number, tab)
        return answer | {"is_writable": is_writable} | await self.write(self.describe, number, labels)

    async def draw(
        self, number: int, actions: list, labels: EditedLabels, orig_hw: tuple[int, int]
    ) -> tuple[interactive.Drawn, float]:
        """Draw the object that actions describe; and say for how many seconds that waited for the encoder."""
        try:
            interactive.check_actions(actions, orig_hw)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        prepared = self.prepare(number, is_next=False)
        segmentation = None
        if actions[0]["type"] == "object":
            segmentation = self.find(labels, actions[0]["id"]).annotation["segmentation"]
        memory, start = prepared.memory, time.perf_counter()
        embeddings = await asyncio.shield(prepared.embeddings)
        waited_s = time.perf_counter() - start

        def draw() -> interactive.Drawn:
            start_mask = None if segmentation is None else rle_to_mask(segmentation)
            return interactive.draw_object(self.model, embeddings, orig_hw, actions, start_mask, self.precision, memory)

        try:
            return await asyncio.get_running_loop().run_in_executor(self.decoding, draw), waited_s
        except ValueError as error:
            raise Refusal(400, _one_line(error)) from error

    def find(self, labels: EditedLabels, object_id: int) -> Placed:
        """Find an object by its id.

        Raises:
            Refusal: where there is none.
        """
        if not 1 <= object_id <= len(labels.objects):
            raise Refusal(409, f"there is no object {object_id}; the picture has {len(labels.objects)}")
        return labels.objects[object_id - 1]

    async def predict(self, number: int, tab: str, actions: list) -> dict:
        """Draw the masks of an object that is not finished."""
        start = time.perf_counter()
        is_encoding = self.num_encoding_next > 0
        view = await self.see(number)
        labels = await self.labels_of(number, view.orig_hw)
        drawn, waited_s = await self.draw(number, actions, labels, view.orig_hw)
        view_hw = fit_view(view.orig_hw)

        def encode() -> tuple[str, int]:
            masks = interactive.view_masks(drawn, view.orig_hw, view_hw)
            return encode_png([mask.view(np.uint8) * 255 for mask in masks], view_hw), len(masks)

        png, num_masks = await asyncio.get_running_loop().run_in_executor(self.decoding, encode)
        return {
            "masks": png,
            "num_masks": num_masks,
            "predicted_ious": list(drawn.predicted_ious) if drawn.low_res_masks is not None else [],
            "chosen": drawn.chosen,
            "decoder_ms": drawn.decoder_ms,
            "waited_ms": 1000 * waited_s,
            "server_ms": 1000 * (time.perf_counter() - start),
            "is_encoding": is_encoding or self.num_encoding_next > 0,
        }

    @contextlib.asynccontextmanager
    async def changing(self, number: int, tab: str):
        """Give the labels of a picture to a tab that may change them, one change after the other; then write them."""
        if not self.may_write(number, tab):
            raise Refusal(
                409, f"{self.pictures[number].name} is open in another tab, which writes to it; this one reads"
            )
        async with self.is_writing:
            view = await self.see(number)
            labels = await self.labels_of(number, view.orig_hw)
            yield labels, view.orig_hw
            self.prepare(number, is_next=False).memory = {}  # ids may mean other objects now

    async def save(self, number: int, tab: str, actions: list, class_name: str | None, seconds: float) -> dict:
        """Finish an object: a new one on top of all, a corrected one in its place."""
        async with self.changing(number, tab) as (labels, orig_hw):
            drawn, _ = await self.draw(number, actions, labels, orig_hw)

            def change() -> dict:
                old = self.find(labels, actions[0]["id"]) if actions[0]["type"] == "object" else None
                placed = finish_object(drawn, orig_hw, actions, old, class_name, seconds, self.round)
                if placed.area == 0:
                    raise Refusal(409, "the mask is empty, nothing is saved; click on the object, or delete it")
                objects = [placed if each is old else each for each in labels.objects]
                labels.change(objects if old else [*labels.objects, placed], rejected_ious(old))
                return self.store(number, labels)

            return await self.write(change)

    async def delete(self, number: int, tab: str, object_id: int) -> dict:
        """Delete an object."""
        async with self.changing(number, tab) as (labels, _):
            old = self.find(labels, object_id)

            def change() -> dict:
                labels.change([each for each in labels.objects if each is not old], rejected_ious(old))
                return self.store(number, labels)

            return await self.write(change)

    async def set_class(self, number: int, tab: str, object_id: int, class_name: str | None) -> dict:
        """Give an object a class, or none."""
        async with self.changing(number, tab) as (labels, _):
            old = self.find(labels, object_id)
            annotation = {key: value for key, value in old.annotation.items() if key not in ("class", "class_prob")}
            annotation |= {} if class_name is None else {"class": class_name}

            def change() -> dict:
                new = old._replace(annotation=annotation)
                labels.change([new if each is old else each for each in labels.objects], [])
                return self.store(number, labels)

            return await self.write(change)

    async def undo(self, number: int, tab: str) -> dict:
        """Take back the last change of a picture."""
        async with self.changing(number, tab) as (labels, _):
            if not labels.undone:
                raise Refusal(409, "there is nothing to take back")

            def change() -> dict:
                labels.take_back()
                return self.store(number, labels)

            return await self.write(change)

    async def set_done(self, number: int, tab: str, is_done: bool) -> dict:
        """Note that a picture is finished, and that its automatic masks that are left are good; or that it is not."""
        async with self.changing(number, tab) as (labels, _):
            name = self.pictures[number].name

            def change() -> dict:
                self.done_names = self.done_names | {name} if is_done else self.done_names - {name}
                if not is_done:  # first, so that a kill leaves no finished picture with masks that nobody checked
                    label_folder.write_done(self.labels_dir, self.done_names)
                self.store(number, labels)
                if is_done:
                    label_folder.write_done(self.labels_dir, self.done_names)
                return self.describe(number, labels)

            return await self.write(change)

    # ----- latency

    def note_latency(self, entries: list[dict]) -> dict:
        """Write down how long clicks took from the click to the drawn mask."""
        with self.latency_path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            for entry in entries:
                total_ms, decoder_ms, waited_ms = (entry[key] for key in ("total_ms", "decoder_ms", "waited_ms"))
                added_ms = total_ms - decoder_ms - waited_ms
                times = [f"{each:.1f}" for each in (total_ms, decoder_ms, waited_ms, added_ms)]
                writer.writerow([self.pictures[entry["number"]].name, *times, int(entry["is_encoding"])])
                self.latencies.append((added_ms, decoder_ms, entry["is_encoding"]))
        return {}

    def summarise(self) -> dict[str, float]:
        """Say how long clicks took, and where all is."""
        summary = {}
        for name, is_encoding in (("idle", False), ("encoding", True)):
            rows = np.array([row[:2] for row in self.latencies if row[2] == is_encoding]).reshape(-1, 2)
            if len(rows):
                added, decoder = np.percentile(rows, 95, axis=0)
                summary |= {
                    f"clicks_{name}": len(rows),
                    f"added_ms_p95_{name}": added,
                    f"decoder_ms_p95_{name}": decoder,
                }
                log.info(
                    f"{len(rows)} clicks {'while the next picture was encoded' if is_encoding else 'otherwise'}: the "
                    f"page added {added:.0f} ms to the decoder's {decoder:.0f} ms (95th percentiles)"
                )
        log.info(f"labels are in {self.labels_dir}, the latency of each click in {self.latency_path}")
        return summary


def finish_object(
    drawn: interactive.Drawn,
    orig_hw: tuple[int, int],
    actions: list[dict],
    old: Placed | None,
    class_name: str | None,
    seconds: float,
    round_number: int,
) -> Placed:
    """Make the annotation of a finished object.

    Args:
        old: the object that it corrects: what people have spent on it adds up.
        seconds: that a person took.
    """
    spent = {} if old is None else old.annotation
    clicks = sum(action["type"] in ("click", "box") for action in actions) + spent.get("clicks", 0)
    strokes = sum(action["type"] == "stroke" for action in actions) + spent.get("strokes", 0)
    mask = interactive.full_mask(drawn, orig_hw)
    box = images.mask_to_box(mask)
    annotation = {
        "segmentation": mask_to_rle(mask),
        "area": int(np.count_nonzero(mask)),
        "bbox": [float(v) for v in (*box[:2], *(box[2:] - box[:2]))],
        **({"predicted_iou": drawn.predicted_ious[drawn.chosen]} if drawn.predicted_ious else {}),
        "origin": PERSON if strokes else ASSISTED,
        "clicks": clicks,
        "strokes": strokes,
        "seconds": round(seconds + spent.get("seconds", 0.0), 2),
        "round": round_number,
        **({} if class_name is None else {"class": class_name}),
    }
    return place(annotation)


def mark_checked(annotation: dict, is_done: bool) -> dict:
    """Note that a person has left an automatic mask as it was, or that it is not known."""
    kept = {key: value for key, value in annotation.items() if key != "checked"}
    return kept | ({"checked": True} if is_done and kept.get("origin") == AUTOMATIC else {})


def rejected_ious(old: Placed | None) -> list[float]:
    """Return the predicted IoU of an automatic mask that is not kept as it was, if it has one."""
    return [old.annotation["predicted_iou"]] if old is not None and _is_scored(old.annotation) else []


def _step_back() -> None:
    """Let this thread run behind all others, where threads have priorities of their own: on Linux."""
    if hasattr(os, "setpriority") and os.uname().sysname == "Linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def annotate_pictures(
    model: torch.nn.Module,
    pictures: list[images.Picture],
    labels_dir: Path,
    settings: AnnotateSettings,
    class_names: list[str],
    val_fraction: float,
    seed: int,
    precision: str,
    run_dir: Path,
) -> dict[str, float]:
    """Serve the page until Ctrl-C: stages assisted and semi.

    Args:
        model: in eval mode.
        labels_dir: a folder of labels, opened for writing.
        class_names: of the checkpoint, used where settings have none.
        val_fraction: of the pictures, that validate, where that was not drawn before.
    Returns:
        what was measured, for run.json.
    """
    pages = [picture for picture in pictures if picture.page is not None]
    if pages:
        log.info(f"{len(pages)} pages are left out, such as {pages[0]}: a dataset has none; save them as files")
    pictures = [picture for picture in pictures if picture.page is None]
    if not pictures:
        raise ValueError("input has no picture but pages of files of several; save them as files of their own")
    label_folder.draw_validation(labels_dir, {picture.name for picture in pictures}, val_fraction, seed)
    confident_iou = settings.confident_iou if settings.stage == "semi" else None
    if settings.stage == "semi" and confident_iou is None:
        confident_iou, num_checked = choose_confident_iou(labels_dir)
        log.info(
            f"automatic masks of a predicted IoU of {confident_iou:.3f} and more are shown ({num_checked} checked)"
        )
    classes = class_names if settings.classes is None else settings.classes
    pictures = order_pictures(pictures, labels_dir, settings.order)
    state = Annotation(model, pictures, labels_dir, settings, classes, confident_iou, precision, run_dir)
    asyncio.run(serve(state, settings.port))
    return state.summarise()


# ---------------------------------------------------------------------------------------------------------------------
# what comes in over HTTP


class Page(tornado.web.RequestHandler):
    """Every request: checked, answered in json, or refused in one line of plain text."""

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in self.settings["headers"].items():
            self.set_header(name, value)

    def prepare(self) -> None:
        """Refuse who does not come from this page on this machine."""
        allowed = [f"{name}:{self.settings['port']}" for name in ("127.0.0.1", "localhost")]
        host, origin = self.request.headers.get("Host", ""), self.request.headers.get("Origin")
        if host not in allowed:
            raise Refusal(403, f"the page is at {allowed[0]} alone; a tunnel must have the same port at its other end")
        if origin is not None and origin != f"http://{host}":
            raise Refusal(403, "asked for by another page")
        token, _, self.route = self.request.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.settings["token"].encode()):
            raise Refusal(403, "the address lacks its secret part; take the one that the server has printed")

    async def get(self) -> None:
        """Answer what does not change anything."""
        state: Annotation = self.settings["state"]
        if self.route == "" and self.request.path.endswith("/"):
            self.set_header("Content-Type", "text/html; charset=utf-8")
            self.write(self.settings["page"])
        elif self.route == "pictures":
            self.answer(state.list_all())
        elif self.route == "picture":
            number, side = (self.read_number(name) for name in ("number", "side"))
            if side not in SIDES:
                raise Refusal(400, f"side is {side}; must be among {SIDES}")
            data = await state.show(self.check_number(number), side)
            self.set_header("Content-Type", "image/png" if data[:4] == b"\x89PNG" else "image/jpeg")
            self.write(data)
        else:
            raise Refusal(404, "there is no such page")

    async def post(self) -> None:
        """Answer what the page's actions ask for."""
        state: Annotation = self.settings["state"]
        if self.route == "latency":
            self.answer(state.note_latency(self.read_entries()))
            return
        kinds = {"number": int, "tab": str} | POST_KEYS.get(self.route, {})
        if self.route not in POST_KEYS:
            raise Refusal(404, "there is no such page")
        body = self.read_body(kinds)
        self.check_number(body["number"])
        number, tab = body["number"], body["tab"]
        if not 1 <= len(tab) <= 64:
            raise Refusal(400, "tab must have 1 to 64 characters")
        if body.get("class") is not None and body["class"] not in state.classes:
            raise Refusal(400, f"class must be null, or among annotate.classes: {', '.join(state.classes) or 'none'}")
        if not 0 <= body.get("seconds", 0) <= MOST_SECONDS:
            raise Refusal(400, f"seconds must be in 0..{MOST_SECONDS:.0f}")
        if self.route == "open":
            self.answer(await state.open(number, tab))
        elif self.route == "predict":
            self.answer(await state.predict(number, tab, body["actions"]))
        elif self.route == "save":
            self.answer(await state.save(number, tab, body["actions"], body["class"], body["seconds"]))
        elif self.route == "delete":
            self.answer(await state.delete(number, tab, body["id"]))
        elif self.route == "set_class":
            self.answer(await state.set_class(number, tab, body["id"], body["class"]))
        elif self.route == "undo":
            self.answer(await state.undo(number, tab))
        elif self.route == "done":
            self.answer(await state.set_done(number, tab, body["is_done"]))
        elif self.route == "heartbeat":
            self.answer({"is_writable": state.hear(number, tab)})
        else:
            state.release(number, tab)
            self.answer({})

    def answer(self, content: dict) -> None:
        self.set_header("Content-Type", "application/json")
        self.write(json.dumps(content, allow_nan=False))

    def read_number(self, name: str) -> int:
        """Read a number from the address, whose names must be those of `picture`."""
        if set(self.request.arguments) != {"number", "side"} or len(self.get_query_arguments(name)) != 1:
            raise Refusal(400, "must have number= and side=, once each, and nothing else")
        text = self.get_query_argument(name, strip=False)
        if not re.fullmatch("[0-9]{1,9}", text):
            raise Refusal(400, f"{name} must be a whole number")
        return int(text)

    def check_number(self, number: int) -> int:
        num_pictures = len(self.settings["state"].pictures)
        if not 0 <= number < num_pictures:
            raise Refusal(404, f"there is no such picture; number must be in 0..{num_pictures - 1}")
        return number

    def read_json(self) -> object:
        try:
            return json.loads(self.request.body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "the body is no json, or has NaN or Infinity, which json lacks") from error

    def read_body(self, kinds: dict[str, type]) -> dict:
        """Read a body that has exactly some keys, of some types."""
        body = self.read_json()
        if not isinstance(body, dict) or set(body) != set(kinds):
            raise Refusal(400, f"the body must have {', '.join(kinds)} and nothing else")
        for key, kind in kinds.items():
            is_fine = is_number(body[key]) if kind is float else isinstance(body[key], kind)
            if not is_fine or (isinstance(body[key], bool) and kind is not bool):
                raise Refusal(400, f"{key} is not of its type")
        return body

    def read_entries(self) -> list[dict]:
        """Read what the page has measured."""
        entries = self.read_body({"entries": list})["entries"]
        times = {"total_ms", "decoder_ms", "waited_ms"}
        keys = times | {"number", "is_encoding"}
        for entry in entries[: MOST_ENTRIES + 1]:
            is_fine = isinstance(entry, dict) and set(entry) == keys and type(entry["number"]) is int
            is_fine = is_fine and all(is_number(entry[key]) for key in times)
            if not is_fine or type(entry["is_encoding"]) is not bool or len(entries) > MOST_ENTRIES:
                raise Refusal(400, f"entries must be at most {MOST_ENTRIES} of {', '.join(sorted(keys))}")
            self.check_number(entry["number"])
        return entries

    def write_error(self, status_code: int, **kwargs) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        line = error.line if isinstance(error, Refusal) else self._reason
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(line + "\n")

    def log_exception(self, kind, error, trace) -> None:
        if not isinstance(error, tornado.web.HTTPError):
            super().log_exception(kind, error, trace)


POST_KEYS = {
    "open": {},
    "predict": {"actions": list},
    "save": {"actions": list, "class": str | None, "seconds": float},
    "delete": {"id": int},
    "set_class": {"id": int, "class": str | None},
    "undo": {},
    "done": {"is_done": bool},
    "heartbeat": {},
    "release": {},
}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no json")


def page_headers(page: str) -> dict[str, str]:
    """Say what the page may do: run its own script, and talk to this server alone."""
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


async def serve(state: Annotation, port: int | None) -> None:
    """Serve the page on this machine until Ctrl-C.

    Raises:
        ValueError: for a port that is taken.
    """
    try:
        sockets = tornado.netutil.bind_sockets(port or 0, "127.0.0.1", socket.AF_INET)
    except OSError as error:
        raise ValueError(f"annotate.port is {port}, which cannot be used; take another, or null ({error})") from error
    port, token = sockets[0].getsockname()[1], secrets.token_urlsafe(16)
    page = PAGE.read_text(encoding="utf-8")
    application = tornado.web.Application(
        [("/.*", Page)],
        default_handler_class=Page,
        log_function=lambda handler: None,
        headers=page_headers(page),
        page=page,
        port=port,
        token=token,
        state=state,
    )
    server = tornado.httpserver.HTTPServer(
        application,
        max_body_size=MOST_BODY_BYTES,
        body_timeout=BODY_TIMEOUT_S,
        idle_connection_timeout=IDLE_TIMEOUT_S,
    )
    server.add_sockets(sockets)
    log.info(f"{len(state.pictures)} pictures; open http://127.0.0.1:{port}/{token}/ and end with Ctrl-C")
    log.info(f"from another machine, first: ssh -L {port}:127.0.0.1:{port} <user>@<this machine>")
    is_ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, is_ended.set)
    await is_ended.wait()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.remove_signal_handler(number)  # a second Ctrl-C ends at once
    server.stop()
    async with state.is_writing:  # what is being saved
        for prepared in state.prepared.values():
            prepared.cancel()
    await server.close_all_connections()
    for executor in (state.reading, state.decoding, state.encoding, state.encoding_next, state.writing):
        executor.shutdown(wait=True, cancel_futures=True)
