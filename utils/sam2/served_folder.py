"""A folder of pictures while a person labels it in a browser: what is in memory, who may write, what is on disk when.

Pictures are read and encoded in threads of their own, the next one behind all other work; clicks are decoded in
another, and one thread alone reads and changes labels. The event loop that calls the methods never waits for them.
"""

import asyncio
import contextlib
import csv
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import cv2
import numpy as np
import torch

from utils import images, run
from utils.instances import label_folder
from utils.instances.codecs import rle_to_mask
from utils.instances.label_edit import EditedLabels, Placed
from utils.instances.label_folder import AUTOMATIC
from utils.sam2 import interactive
from utils.sam2 import model as models
from utils.sam2.checked_labels import finish_object, is_scored, mark_checked, rejected_ious
from utils.sam2.model import Embeddings
from utils.sam2.rate import HIGHEST, LOWEST, Rating
from utils.sam2.rounds import count_rounds
from utils.sam2.view import VIEW_SIDE, encode_ids, encode_png, encode_view, fit_view, shrink_ids
from utils.settings import between, is_number, one_of

log = logging.getLogger("infer_sam2")
clock_s = time.monotonic
LOCK_S = 10  # a tab that was not heard of for so long no longer keeps others from writing
MOST_PREPARED, MOST_EDITED = 3, 3  # pictures whose embeddings, and whose labels, are in memory


@dataclass(frozen=True)
class AnnotateSettings:
    """How pictures are offered to a person (`annotate:`)."""

    port: Annotated[int | None, between(1, 65535)] = None  # None: a free one
    stage: Annotated[str, one_of("assisted", "semi", "rate")] = "assisted"
    confident_iou: Annotated[float | None, between(0, 1)] = None  # stage=semi; None: as choose_confident_iou says
    order: Annotated[str, one_of("name", "uncertain")] = "name"
    classes: list[str] | None = None  # names, for the keys 1 to 9; None: those of the checkpoint, if it knows any


class View(NamedTuple):
    """A picture as it is shown, and as the model takes it."""

    orig_hw: tuple[int, int]
    data: bytes  # JPEG or PNG of at most VIEW_SIDE px
    encoder_input: torch.Tensor  # float32 (3, S, S)


class Prepared:
    """A picture that is read, then encoded, in threads; an exception is that of its reading."""

    view: asyncio.Task[View]
    embeddings: asyncio.Task[Embeddings]

    def __init__(self, is_next: bool):
        self.is_next = is_next  # encoded behind all other work
        self.encoding: Future | None = None  # once it is read
        self.num_waiting = 0  # requests
        self.memory: dict[tuple[str, ...], interactive.Drawn] = {}

    def cancel(self) -> None:
        self.view.cancel()
        self.embeddings.cancel()


class Refusal(Exception):
    """An answer in one line instead of what was asked for."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status, self.line = status, line


class ServedFolder:
    """What the server knows, and the answers to what the page asks."""

    def __init__(
        self,
        model: torch.nn.Module | None,
        pictures: list[images.Picture],
        labels_dir: Path,
        settings: AnnotateSettings,
        classes: list[str],
        confident_iou: float | None,
        precision: str,
        rating: Rating | None,
        run_dir: Path,
    ):
        """Take over what is served.

        Args:
            model: in eval mode; None beside a rating.
            pictures: in the order in which they are offered.
            labels_dir: a folder of labels, opened for writing.
            confident_iou: automatic masks below are not shown; None: all are.
            rating: of stage=rate, in which nothing is labelled; None: of the other stages.
            run_dir: latency.csv is written there.
        """
        self.model, self.pictures, self.labels_dir = model, pictures, labels_dir
        self.settings, self.classes, self.confident_iou, self.precision = settings, classes, confident_iou, precision
        self.rating = rating
        self.round = 1 + count_rounds(labels_dir)
        self.val_names = label_folder.read_validation(labels_dir)
        self.done_names = label_folder.read_done(labels_dir)
        self.labelled_names = {path.stem for path in label_folder.list_records(labels_dir).values()}  # as pictures do
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
        if rating is None:
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
        if prepared is None:
            prepared = Prepared(is_next)
            prepared.view = self._start(self._read(self.pictures[number]))
            prepared.embeddings = self._start(self._encode(prepared))
        elif prepared.is_next and not is_next:
            prepared.is_next = False
            if prepared.encoding is not None and prepared.encoding.cancel():  # it was still waiting
                prepared.embeddings = self._start(self._encode(prepared))
        self.prepared[number] = prepared
        free = [each for each, other in self.prepared.items() if other.num_waiting == 0 and each != number]
        for displaced in free[: max(0, len(self.prepared) - MOST_PREPARED)]:
            self.prepared.pop(displaced).cancel()
        return prepared

    async def _run(self, executor: ThreadPoolExecutor, function: Callable, *arguments) -> object:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)

    def _start(self, coroutine: Coroutine) -> asyncio.Task:
        task = asyncio.create_task(coroutine)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # who waits for it is told
        return task

    async def _read(self, picture: images.Picture) -> View:
        def read() -> View:
            image_rgb = images.read_image(picture.path)
            encoder_input = models.preprocess(image_rgb, self.model.image_size, self.model.device)
            return View(image_rgb.shape[:2], encode_view(image_rgb, VIEW_SIDE), encoder_input)

        return await self._run(self.reading, read)

    async def _encode(self, prepared: Prepared) -> Embeddings:
        view, is_next = await asyncio.shield(prepared.view), prepared.is_next

        @torch.inference_mode()
        def encode() -> Embeddings:
            self.num_encoding_next += is_next  # which one thread alone changes
            try:
                with run.autocast(self.model.device, self.precision):
                    return models.encode(self.model, view.encoder_input[None])
            finally:
                self.num_encoding_next -= is_next

        prepared.encoding = (self.encoding_next if is_next else self.encoding).submit(encode)
        return await asyncio.wrap_future(prepared.encoding)

    async def wait_for(self, number: int, part: str) -> View | Embeddings:
        """Wait for the view, or for the embeddings, of a picture, which other pictures do not displace meanwhile."""
        prepared = self.prepare(number, is_next=False)
        prepared.num_waiting += 1
        try:
            return await asyncio.shield(getattr(prepared, part))
        finally:
            prepared.num_waiting -= 1

    async def see(self, number: int) -> View:
        """Wait for a picture to be read.

        Raises:
            Refusal: for one that cannot be.
        """
        try:
            return await self.wait_for(number, "view")
        except (ValueError, OSError) as error:
            self.prepared.pop(number, None)  # the file may be mended
            raise Refusal(409, f"{self.pictures[number]}: {_one_line(error)}") from error

    async def show(self, number: int, side: int) -> bytes:
        """Return a picture's pixels as a file for the browser, no side longer than `side`."""
        prepared = self.prepared.get(number)
        if side == VIEW_SIDE and prepared is not None:
            await asyncio.wait([prepared.view])
            if not prepared.view.cancelled() and prepared.view.exception() is None:
                return prepared.view.result().data

        def read() -> bytes:
            return encode_view(images.read_image(self.pictures[number].path), side)

        try:
            return await self._run(self.reading, read)
        except (ValueError, OSError) as error:
            raise Refusal(409, f"{self.pictures[number]}: {_one_line(error)}") from error

    # ----- who may write

    def may_write(self, number: int, tab: str) -> bool:
        """Let a tab write to a picture, if no other does."""
        holder, heard_s = self.locks.get(number, (tab, 0.0))
        if holder != tab and clock_s() - heard_s < LOCK_S:
            return False
        self.locks[number] = tab, clock_s()
        return True

    def hear(self, number: int, tab: str) -> bool:
        """Note that a tab still has a picture open; tell whether it may write to it."""
        if self.locks.get(number, ("", 0.0))[0] != tab:
            return False
        self.locks[number] = tab, clock_s()
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
        if record:
            label_folder.restore_map(self.labels_dir, picture.name, record)
        annotations = [each for each in record.get("annotations", []) if self._is_shown(each)]
        return EditedLabels(record, annotations, orig_hw)

    def _is_shown(self, annotation: dict) -> bool:
        if self.confident_iou is None or annotation.get("origin") != AUTOMATIC or annotation.get("checked"):
            return True
        return is_scored(annotation) and annotation["predicted_iou"] >= self.confident_iou

    async def write(self, function: Callable, *arguments) -> object:
        """Call a function in the thread that alone reads and changes labels."""
        return await self._run(self.writing, function, *arguments)

    def describe(self, number: int, labels: EditedLabels) -> dict:
        """Describe the labels of a picture for the page; in the thread that writes."""
        ids = shrink_ids(labels.label_map, fit_view(labels.label_map.shape))
        objects, warnings = labels.describe()
        return {
            "map": encode_ids(ids),
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
        self, number: int, actions: list, orig_hw: tuple[int, int], finish: Callable
    ) -> tuple[object, Placed | None, float]:
        """Draw the object that actions describe.

        Args:
            finish: called in the thread that draws, with Drawn and the object that the actions correct, or None.
        Returns:
            what `finish` returns; the object that is corrected; for how many seconds the encoder was waited for.
        Raises:
            Refusal: for what are no actions.
        """
        try:
            interactive.check_actions(actions, orig_hw)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        start = time.perf_counter()
        embeddings = await self.wait_for(number, "embeddings") if interactive.needs_model(actions) else None
        waited_s = time.perf_counter() - start
        old = None
        if actions[0]["type"] == "object":
            old = self.find(await self.labels_of(number, orig_hw), actions[0]["id"])
        memory = self.prepare(number, is_next=False).memory

        def draw() -> object:
            start_mask = None if old is None else rle_to_mask(old.annotation["segmentation"])
            try:
                drawn = interactive.draw_object(
                    self.model, embeddings, orig_hw, actions, start_mask, self.precision, memory
                )
            except ValueError as error:
                raise Refusal(400, _one_line(error)) from error
            return finish(drawn, old)

        return await self._run(self.decoding, draw), old, waited_s

    def find(self, labels: EditedLabels, object_id: int) -> Placed:
        """Find an object by its id.

        Raises:
            Refusal: where there is none.
        """
        if not 1 <= object_id <= len(labels.objects):
            raise Refusal(409, f"there is no object {object_id}; the picture has {len(labels.objects)}")
        return labels.objects[object_id - 1]

    def check_class(self, labels: EditedLabels, class_name: str | None) -> None:
        """Refuse a class that is neither offered nor in the picture."""
        in_picture = [placed.annotation.get("class") for placed in labels.objects]
        if class_name not in [None, *self.classes, *in_picture]:
            raise Refusal(400, f"class must be null or among annotate.classes: {', '.join(self.classes) or 'none'}")

    async def predict(self, number: int, actions: list) -> dict:
        """Draw the masks of an object that is not finished."""
        start, is_encoding = time.perf_counter(), self.num_encoding_next > 0
        orig_hw = (await self.see(number)).orig_hw
        view_hw = fit_view(orig_hw)

        def encode(drawn: interactive.Drawn, old: Placed | None) -> dict:
            masks = interactive.view_masks(drawn, orig_hw, view_hw)
            bits = sum(mask.view(np.uint8) << number for number, mask in enumerate(masks))  # PNGs of one are fast
            left, top, width, height = cv2.boundingRect(bits)
            shown = bits[top : top + max(1, height), left : left + max(1, width)]
            predicted_ious = list(drawn.predicted_ious) if drawn.low_res_masks is not None else []
            if old is not None and len(actions) == 1:
                score = old.annotation.get("predicted_iou")
                predicted_ious = [score if is_number(score) else None]
            return {
                "masks": encode_png(shown),  # bit k of a pixel is mask k
                "left": left,
                "top": top,
                "num_masks": len(masks),
                "predicted_ious": predicted_ious,
                "chosen": drawn.chosen,
                "decoder_ms": drawn.decoder_ms,
            }

        answer, _, waited_s = await self.draw(number, actions, orig_hw, encode)
        return answer | {
            "waited_ms": 1000 * waited_s,
            "server_ms": 1000 * (time.perf_counter() - start),
            "is_encoding": is_encoding or self.num_encoding_next > 0,
        }

    @contextlib.asynccontextmanager
    async def changing(self, number: int, tab: str):
        """Give the labels of a picture, and its size, to a tab that may change them, one change after the other.

        Raises:
            Refusal: where another tab writes, and for what cannot be written: the labels are then as they are on disk.
        """
        if not self.may_write(number, tab):
            raise Refusal(409, f"{self.pictures[number].name} is open in another tab, which writes to it")
        async with self.is_writing:
            orig_hw = (await self.see(number)).orig_hw
            labels = await self.labels_of(number, orig_hw)
            try:
                yield labels, orig_hw
            except Refusal:  # nothing was changed
                raise
            except Exception as error:
                self.edited.pop(number, None)
                self.done_names = label_folder.read_done(self.labels_dir)
                if isinstance(error, OSError):
                    raise Refusal(500, f"not saved: {_one_line(error)}") from error
                raise
            else:
                self.edited[number] = labels  # should it have been displaced meanwhile
            finally:
                self.prepare(number, is_next=False).memory = {}  # ids may mean other objects now

    async def save(self, number: int, tab: str, actions: list, class_name: str | None, seconds: float) -> dict:
        """Finish an object: a new one on top of all, a corrected one in its place."""
        async with self.changing(number, tab) as (labels, orig_hw):
            self.check_class(labels, class_name)

            def finish(drawn: interactive.Drawn, old: Placed | None) -> Placed:
                placed = finish_object(drawn, orig_hw, actions, old, class_name, seconds, self.round)
                if placed.area == 0:
                    raise Refusal(409, "the mask is empty, nothing is saved; click on the object, or delete it")
                return placed

            placed, old, _ = await self.draw(number, actions, orig_hw, finish)

            def change() -> dict:
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
            self.check_class(labels, class_name)
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
                answer = self.store(number, labels)
                if is_done:
                    label_folder.write_done(self.labels_dir, self.done_names)
                return answer

            return await self.write(change)

    async def close(self) -> None:
        """Wait for what is being written, and end the threads."""
        async with self.is_writing:
            for prepared in self.prepared.values():
                prepared.cancel()
        for executor in (self.reading, self.decoding, self.encoding, self.encoding_next, self.writing):
            executor.shutdown(wait=True, cancel_futures=True)

    # ----- rating

    async def show_item(self) -> dict:
        """Show the next mask that has no mark."""
        item = self.rating.next_item()
        answer = {"num_left": len(self.rating.masks) - len(self.rating.ratings), "num_items": len(self.rating.masks)}
        if item is None:
            return answer | {"item": None}
        number = self.rating.masks[item].number

        def read() -> dict:
            label_map = self.rating.read_mask(item)
            ids = shrink_ids(label_map, fit_view(label_map.shape))
            height, width = label_map.shape
            sizes = {"width": width, "height": height, "view_width": ids.shape[1], "view_height": ids.shape[0]}
            return sizes | {"map": encode_ids(ids)}

        try:
            shown = await self._run(self.reading, read)
        except (ValueError, OSError) as error:
            raise Refusal(409, _one_line(error)) from error
        return answer | {"item": item, "number": number, "name": self.pictures[number].name} | shown

    def rate(self, item: int, rating: int) -> None:
        """Write a mark down, of the mask that is shown."""
        if not LOWEST <= rating <= HIGHEST:
            raise Refusal(400, f"rating must be in {LOWEST}..{HIGHEST}")
        if item != self.rating.next_item():
            raise Refusal(409, "another mask waits for its mark now; reload the page")
        try:
            self.rating.rate(item, rating)
        except OSError as error:
            raise Refusal(500, f"not saved: {_one_line(error)}") from error

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
        """Say how long clicks took, or which marks masks have got, and where all is."""
        summary = {}
        for folder, measured in self.rating.summarise().items() if self.rating else ():
            mean, low, high, count = measured.values()
            log.info(f"{folder}: mean {mean:.2f}, 95 % interval {low:.2f} to {high:.2f}, of {count} masks")
            summary |= {f"{folder}/{name}": value for name, value in measured.items()}
        for name, is_encoding in (("idle", False), ("encoding", True)):
            rows = np.array([row[:2] for row in self.latencies if row[2] == is_encoding]).reshape(-1, 2)
            if len(rows):
                added, decoder = np.percentile(rows, 95, axis=0)
                summary[f"clicks_{name}"] = len(rows)
                summary |= {f"added_ms_p95_{name}": float(added), f"decoder_ms_p95_{name}": float(decoder)}
                log.info(
                    f"{len(rows)} clicks {'while the next picture was encoded' if is_encoding else 'otherwise'}: the "
                    f"page added {added:.0f} ms to the decoder's {decoder:.0f} ms (95th percentiles)"
                )
        if self.rating:
            log.info(f"{len(self.rating.ratings)} of {len(self.rating.masks)} masks have a mark: {self.rating.path}")
        else:
            log.info(f"labels are in {self.labels_dir}, the latency of each click in {self.latency_path}")
        return summary


def _step_back() -> None:
    """Let this thread run behind all others, where threads have priorities of their own: on Linux."""
    if hasattr(os, "setpriority") and os.uname().sysname == "Linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
