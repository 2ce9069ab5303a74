"""Frames of a camera or of a network address while they are made: what the tracker is too slow for is dropped."""

import contextlib
import queue
import re
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from urllib.parse import urlsplit

import av
import cv2
import numpy as np

from utils.tracking.frames import NUM_AHEAD, FrameSource, choose_film, read_display, to_rgb

CAMERA = "camera:"
WAIT_S, RETRY_S = 10.0, 0.2  # how long nothing may come before it counts as the end; from one try to open to the next


def open_source(address: str) -> "FrameSource | LiveSource":
    """Open a folder, a video file, an address (rtsp://, http://, tcp://, ...), or camera:<number>."""
    number = re.fullmatch(r"(?:/dev/video)?([0-9]+)", address)  # as OpenCV and Linux name cameras
    if number and not (Path(address).is_dir() or Path(address).is_file()):
        raise ValueError(f"input is {address}, which is no folder; the camera of that number is camera:{number[1]}")
    return LiveSource(address) if address.startswith(CAMERA) or "://" in address else FrameSource(address)


class LiveSource:
    """The frames of a camera or an address, as `FrameSource` gives those of files.

    A thread reads as fast as frames come; of those that wait for the tracker, NUM_AHEAD at most, the oldest is dropped
    for a new one. An address whose video has a length is a file, read as `FrameSource` reads one. Where a stream stalls
    or breaks off, it is opened again, until nothing has come for `wait_s`.

    Attributes:
        name: the address. num_frames: None. fps, sample_aspect: as the stream says; None where it does not.
        times_s: of the frames yielded, s since the first: when they came; of a file, when they are shown.
        num_dropped: frames that came and were not yielded. num_broken: packets without a picture, but those before the
        first keyframe, which are num_before_keyframe.
        problem: how it ended, where that was not with its end.
    """

    def __init__(self, address: str, wait_s: float = WAIT_S):
        """Take an address.

        Raises:
            ValueError: for a camera without a number.
        """
        if address.startswith(CAMERA) and not address.removeprefix(CAMERA).isdecimal():
            raise ValueError(f"input is {address}; must be camera: and a number, such as camera:0")
        self.name, self.wait_s = address, wait_s
        self.num_frames: int | None = None
        self.fps: float | None = None
        self.sample_aspect: Fraction | None = None
        self.problem: str | None = None
        self.times_s: list[float] = []
        self.num_before_keyframe = self.num_dropped = self.num_broken = 0

    def frame_name(self, index: int) -> str:
        """Name a frame for messages."""
        return f"{self.name}, frame {index}"

    def frame_stem(self, index: int) -> str:
        """Name a frame's files: by its number among those that were not dropped."""
        return f"{index:05d}"

    def __iter__(self) -> Iterator[tuple[int, np.ndarray | None, Exception | None]]:
        """Yield (index from 0, frame uint8 (H, W, 3) RGB, None); of a file (index, None, error), too.

        Raises:
            ValueError: where there is no such camera, or nothing to be seen at the address.
        """
        self.problem, self.times_s = None, []
        self.num_before_keyframe = self.num_dropped = self.num_broken = 0
        waiting: queue.Queue = queue.Queue(maxsize=NUM_AHEAD)
        stop = threading.Event()

        def read() -> None:
            try:
                frames = self._read_camera() if self.name.startswith(CAMERA) else self._read_address(stop)
                with contextlib.closing(frames):
                    for frame, time_s, may_drop, error in frames:
                        self._hand_over(waiting, (time_s, frame, error), may_drop, stop)
                        if stop.is_set():
                            return
                self._hand_over(waiting, None, False, stop)
            except BaseException as error:  # the loop that waits must see it
                self._hand_over(waiting, error, False, stop)

        thread = threading.Thread(target=read, name="live frames", daemon=True)
        thread.start()
        first_s, index = None, 0
        try:
            while (item := waiting.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                time_s, frame, error = item
                first_s = time_s if first_s is None else first_s
                last_s = self.times_s[-1] if self.times_s else -1.0
                self.times_s.append(max(time_s - first_s, last_s + 1e-3))
                yield index, frame, error
                index += 1
        finally:
            stop.set()
            thread.join(self.wait_s)  # a read that hangs ends with its own limit

    def _hand_over(self, waiting: queue.Queue, item, may_drop: bool, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.0 if may_drop else 0.1)
            except queue.Full:
                if may_drop:
                    with contextlib.suppress(queue.Empty):
                        waiting.get_nowait()
                        self.num_dropped += 1

    def _read_camera(self) -> Iterator[tuple[np.ndarray, float, bool, None]]:
        """Yield frames, when they came, s, True: they may be dropped, and None: no error."""
        number = int(self.name.removeprefix(CAMERA))
        camera = cv2.VideoCapture(number)
        try:
            if not camera.isOpened():
                raise ValueError(f"input is {self.name}, but there is no camera {number}, or it is in use")
            self.fps = camera.get(cv2.CAP_PROP_FPS) or None
            while True:
                is_read, frame_bgr = camera.read()
                if not is_read:
                    self.problem = f"{self.name} gives no more frames"
                    return
                yield cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB), time.monotonic(), True, None
        finally:
            camera.release()

    def _read_address(self, stop: threading.Event) -> Iterator[tuple[np.ndarray | None, float, bool, Exception | None]]:
        """Yield frames, when they came or are shown, s, whether they may be dropped, and why one cannot be read."""
        last_s, num_read, reason, matrix, is_file = time.monotonic(), 0, None, None, False
        while not stop.is_set():
            is_open = False
            try:
                with av.open(self.name, timeout=(self.wait_s, self.wait_s)) as container:
                    stream, is_open = choose_film(container, self.name), True
                    self.fps = float(stream.average_rate) if stream.average_rate else None
                    if is_file := container.duration is not None and num_read == 0:
                        break
                    for packet in container.demux(stream):
                        try:
                            pictures = packet.decode()
                        except av.InvalidDataError:  # until the next whole picture
                            self.num_before_keyframe += num_read == 0
                            self.num_broken += num_read > 0
                            continue
                        for picture in pictures:
                            if num_read == 0:
                                matrix, self.sample_aspect = read_display(picture, stream)
                            last_s, num_read = time.monotonic(), num_read + 1
                            yield to_rgb(picture, matrix), last_s, True, None
                        if stop.is_set():
                            return
                    reason = None
            except (av.FFmpegError, OSError) as error:
                if is_open or not num_read:  # one that has ended, and is not there again, has ended
                    reason = error.strerror
            if time.monotonic() - last_s > self.wait_s:
                break
            stop.wait(RETRY_S)
        if is_file:
            yield from self._read_film()
            return
        if not num_read and not stop.is_set():
            raise ValueError(
                f"input is {self.name}, from which no frame came in {self.wait_s:g} s ({reason or 'it ends'})"
            )
        if reason is not None:
            self.problem = (
                f"{self.name} was lost after {num_read} frames, and did not come back in {self.wait_s:g} s ({reason})"
            )

    def _read_film(self) -> Iterator[tuple[np.ndarray | None, float, bool, Exception | None]]:
        """Yield as `_read_address` the frames of an address that is a file: no error is followed by another try."""
        film = FrameSource(self.name, wait_s=self.wait_s)
        for _, frame, error in film.read_video():
            self.sample_aspect, self.num_before_keyframe = film.sample_aspect, film.num_before_keyframe
            yield frame, film.times_s[-1], False, error
        self.problem = film.problem


def shown_name(address: str) -> str:
    """Name an input in results: its last part."""
    if "://" not in address:
        return Path(address).resolve().name
    parts = urlsplit(address)
    return Path(parts.path.rstrip("/")).name or parts.netloc.rpartition("@")[2]  # without a password
