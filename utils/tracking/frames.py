"""The frames of a folder of pictures or of a video file, decoded ahead in a thread; and a writer of H.264 videos.

Frames are uint8 (H, W, 3) RGB. Memory does not grow with the length of a video: a few frames are held at a time.
"""

import contextlib
import math
import os
import queue
import re
import threading
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace

from utils.images import PICTURE_SUFFIXES, count_pages, read_image

NUM_AHEAD = 4  # decoded frames that wait for the tracker
STOP_CHECK_S = 0.1  # how often a full queue looks whether anyone still wants frames
NO_FILM = Disposition.attached_pic | Disposition.timed_thumbnails
ONE_A_PACKET = ("h264", "hevc", "vp9", "av1", "libdav1d")  # decoders: every packet of their films is a picture
TIMED_HEADER = "matroska,webm"  # a format whose header says how long a film is, and whose films play when cut off
MOST_SHORT_S = 0.25  # that a film may be shorter than its header says
VIDEO_CLOCK = 90_000  # ticks a second of written videos: 25, 30, 30000/1001 and milliseconds are whole numbers of them
VIDEO_QUALITY = "20"  # x264's constant rate factor: 0 lossless, 18 looks the same, 51 worst

# ---------------------------------------------------------------------------------------------------------------------
# a folder's pictures


def natural_key(name: str) -> tuple:
    """Make a sort key by which numbers in names count as numbers: 9.jpg comes before 10.jpg."""
    parts = re.split(r"([0-9]+)", name.lower())  # text, digits, text, digits, ...
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


def list_frames(folder: str | Path) -> list[Path]:
    """List the pictures of a folder in natural order; hidden files, folders and other files are passed over.

    Raises:
        FileNotFoundError: where there is no such folder.
        ValueError: for a folder without pictures, or with two of one name (a.jpg, a.png), which would be shown twice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} (seen from {Path.cwd()}); give a folder of frames or a video file")
    names = picture_names(folder)
    if not names:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and picture_names(path))
        remedy = f"give {folder / inside[0]}, which has some" if inside else "give a folder of frames or a video file"
        raise ValueError(f"{folder} has no pictures ({', '.join(PICTURE_SUFFIXES)}); {remedy}")
    of_stem = {}
    for name in names:
        other = of_stem.setdefault(Path(name).stem, name)
        if other != name:
            raise ValueError(f"{folder} has both {other} and {name}; keep one picture for each frame")
    return [folder / name for name in names]


def picture_names(folder: Path) -> list[str]:
    """List the names of a folder's pictures in natural order; hidden files and folders are passed over."""
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if Path(entry.name).suffix.lower() in PICTURE_SUFFIXES and entry.name[0] != "." and not entry.is_dir()
        ]
    return sorted(names, key=natural_key)


# ---------------------------------------------------------------------------------------------------------------------
# frames, decoded ahead


class FrameSource:
    """The frames of a folder, of a list of pictures, or of a video file, in order.

        for index, frame, error in FrameSource("video.mp4"): ...

    A thread decodes up to `num_ahead` frames while the loop works. A frame that cannot be read comes as
    (index, None, error), with the error that names its file, and the next ones follow. The loop may be left early, and
    started again.

    Attributes:
        name: where the frames are: the file or folder given, or that of the first picture of a list.
        num_frames: how many the folder has, or the video's header says; None where it does not say.
        fps: the video's frames per second on average; None for pictures, and where the file does not say.
        sample_aspect: width over height of the video's pixels, as it asks to be shown; None: square.
        times_s: of the frames read so far, s from the first one on, ascending; empty for pictures.
        num_before_keyframe: packets before the video's first frame that can be decoded: a cut recording; left out.
        problem: after the last frame, what was wrong with the end of the video (such as a file cut off); else None.
    """

    def __init__(self, source: str | Path | Iterable[Path], num_ahead: int = NUM_AHEAD, wait_s: float | None = None):
        """Find the frames, and open a video to see that it is one; nothing is decoded yet.

        Args:
            source: a folder of pictures (taken in natural order), a video file, or pictures in the order given.
            num_ahead: decoded frames that may wait, at least 1.
            wait_s: given where the source is the address of a video file: how long nothing may come from there.
        Raises:
            FileNotFoundError, ValueError: where there is no such path, or neither pictures nor a video in it.
        """
        assert num_ahead >= 1, num_ahead
        self.num_ahead = num_ahead
        self.problem: str | None = None
        self.fps: float | None = None
        self.sample_aspect: Fraction | None = None
        self.times_s: list[float] = []
        self.num_before_keyframe = 0
        self._pages: list[int | None] | None = None  # where one file has several
        self._video_path: Path | str | None = None
        self._wait_s = wait_s
        self._first_s: float | None = None  # when the video's first picture is shown
        self._matrix: list[int] | None = None  # of `to_rgb`
        if not isinstance(source, (str, Path)):
            self._frame_paths = [Path(path) for path in source]
            source = self._frame_paths[0].parent
        elif Path(source).suffix.lower() in PICTURE_SUFFIXES and Path(source).is_file():
            num_pages = count_pages(source)
            self._frame_paths = [Path(source)] * num_pages
            self._pages = [None] if num_pages == 1 else list(range(num_pages))
        elif wait_s is not None or Path(source).is_file():
            self._frame_paths = []
            self._video_path = Path(source) if wait_s is None else source
            with _open_video(self._video_path, wait_s) as (container, stream):
                self.num_frames = stream.frames or None
                self.fps = float(stream.average_rate) if stream.average_rate else None
        else:
            self._frame_paths = list_frames(source)
        if self._video_path is None:
            self.num_frames = len(self._frame_paths)
        self.name = str(source)

    def frame_name(self, index: int) -> str:
        """Name a frame for messages: its file, or its number in the video or file of pages."""
        if self._video_path:
            return f"{self._video_path}, frame {index}"
        is_page = self._pages is not None and len(self._pages) > 1
        return f"{self._frame_paths[index]}, page {index + 1}" if is_page else str(self._frame_paths[index])

    def frame_stem(self, index: int) -> str:
        """Name a frame's files: as its own, or by its number in the video or file of pages, 00000."""
        is_numbered = self._video_path is not None or (self._pages is not None and len(self._pages) > 1)
        return f"{index:05d}" if is_numbered else self._frame_paths[index].stem

    def __iter__(self) -> Iterator[tuple[int, np.ndarray | None, Exception | None]]:
        """Yield (index from 0, frame uint8 (H, W, 3) RGB or None, error or None)."""
        self.problem, self.times_s, self.num_before_keyframe = None, [], 0
        decoded: queue.Queue = queue.Queue(maxsize=self.num_ahead)
        stop = threading.Event()

        def hand_over(item) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    return decoded.put(item, timeout=STOP_CHECK_S)

        def decode() -> None:
            try:
                frames = self._read_pictures() if self._video_path is None else self.read_video()
                for item in frames:
                    hand_over(item)
                    if stop.is_set():
                        frames.close()
                        return
                hand_over(None)
            except BaseException as error:  # a fault of this program: the loop that waits must see it
                hand_over(error)

        thread = threading.Thread(target=decode, name="frames", daemon=True)
        thread.start()
        try:
            while (item := decoded.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _read_pictures(self):
        for index, path in enumerate(self._frame_paths):
            try:
                frame, error = read_image(path, self._pages[index] if self._pages else None), None
            except (OSError, ValueError) as failure:
                frame, error = None, failure
            yield index, frame, error

    def read_video(self):
        """Decode on all cores; where that goes wrong, on one from there on.

        With several frames under way at once, FFmpeg reports a damaged one some frames late, and drops those that are
        under way when a film ends or breaks off behind it: nothing of that is known before the end.

        Yields:
            as the loop over the source does, in this thread and with nothing decoded ahead.
        """
        num_shown = yield from self._read_undamaged_video()
        if num_shown is not None:
            yield from self._read_damaged_video(num_shown)

    def _read_undamaged_video(self):
        """Decode as long as nothing is wrong: how many pictures were shown until then; None where nothing was."""
        index = num_packets = 0
        waiting: set[int] = set()  # times of packets whose pictures have not come so far
        first_pts = last_pts = None  # of the pictures
        with _open_video(self._video_path, self._wait_s) as (container, stream):
            stream.thread_type = "AUTO"
            is_one_a_packet = stream.codec_context.name in ONE_A_PACKET
            try:
                for packet in container.demux(stream):
                    num_packets += packet.size > 0
                    waiting |= _shown_times(packet)
                    for picture in packet.decode():
                        if is_one_a_packet and _is_between(waiting, first_pts, picture.pts):
                            return index
                        yield index, self._show(picture, stream), None
                        index, last_pts = index + 1, picture.pts
                        first_pts = last_pts if first_pts is None else first_pts
                        waiting.discard(last_pts)
            except av.FFmpegError:
                return index
            is_short = index < num_packets if last_pts is None else _is_between(waiting, last_pts, math.inf)
            return index if is_short or self._is_cut(container, stream, num_packets) else None

    def _read_damaged_video(self, num_shown: int):
        """Decode frame by frame, and name what cannot be; the first `num_shown` pictures have been shown already."""
        index, num_decoded, num_packets, has_keyframe = num_shown, 0, 0, False
        waiting: set[int] = set()  # as in `_read_undamaged_video`
        first_pts = None
        broken: list[tuple[float, str]] = []  # when it would have been shown, and why it is not; not yielded so far

        def name_broken(until: float):
            nonlocal index
            if stream.codec_context.name in ONE_A_PACKET and first_pts is not None:
                silent = {pts for pts in waiting if first_pts < pts < until}
                broken.extend((pts, "the decoder gives no picture") for pts in silent)
                waiting.difference_update(silent)
            broken.sort()
            while broken and broken[0][0] < until:
                self.times_s.append(self._next_time())
                error = ValueError(f"{self.frame_name(index)} cannot be decoded: {broken.pop(0)[1]}")
                yield index, None, error
                index += 1

        with _open_video(self._video_path, self._wait_s) as (container, stream):
            stream.codec_context.thread_count = 1
            try:
                for packet in container.demux(stream):
                    num_packets += packet.size > 0
                    try:
                        pictures = packet.decode()
                    except av.FFmpegError as error:
                        if has_keyframe or index > 0:
                            broken.append((-math.inf if packet.pts is None else packet.pts, error.strerror))
                        else:  # it cannot be decoded without what came before the cut
                            self.num_before_keyframe += 1
                        continue
                    has_keyframe |= packet.is_keyframe
                    waiting |= _shown_times(packet)
                    for picture in pictures:
                        num_decoded += 1
                        first_pts = picture.pts if first_pts is None else first_pts
                        waiting.discard(picture.pts)
                        if num_decoded > num_shown:
                            yield from name_broken(math.inf if picture.pts is None else picture.pts)
                            yield index, self._show(picture, stream), None
                            index += 1
            except av.FFmpegError as error:
                self.problem = f"{self._video_path} cannot be read after frame {index - 1}: {error.strerror}"
            yield from name_broken(math.inf)
            if self.problem is None and self._is_cut(container, stream, num_packets):
                of_frames = f" of the {self.num_frames} frames that it should have" if self.num_frames else " frames"
                self.problem = f"{self._video_path} ends after {index}{of_frames}"

    def _is_cut(self, container: av.container.InputContainer, stream: av.VideoStream, num_packets: int) -> bool:
        """Tell whether a film has less in it than its index or header promises.

        A film trimmed without decoding has packets that are not shown: those that are there count, not the frames.
        """
        end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        is_file = isinstance(self._video_path, Path)
        if is_file and end > self._video_path.stat().st_size:
            return True
        if num_packets < (self.num_frames or 0) and not (is_file and end):
            return True
        if container.format.name != TIMED_HEADER or container.duration is None or not self.times_s:
            return False
        duration_s = container.duration / av.time_base
        if duration_s - self.times_s[-1] <= MOST_SHORT_S:
            return False
        end_s = 0.0  # of all streams: the sound may be longer
        with _open_container(self._video_path, self._wait_s) as whole, contextlib.suppress(av.FFmpegError):
            for packet in whole.demux():
                if packet.pts is not None:
                    end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        return duration_s - end_s > MOST_SHORT_S

    def _show(self, picture: av.VideoFrame, stream: av.VideoStream) -> np.ndarray:
        """Note when a picture is shown, and convert it as the film asks."""
        shown_s = _time_of(picture)
        if not self.times_s:  # the whole film's; asked of each frame, frames would pile up in memory
            self._first_s, (self._matrix, self.sample_aspect) = shown_s, read_display(picture, stream)
        self._first_s = shown_s if self._first_s is None else self._first_s
        time_s = self._next_time() if shown_s is None else shown_s - self._first_s
        if self.times_s and time_s <= self.times_s[-1]:  # broken timestamps
            time_s = self._next_time()
        self.times_s.append(time_s)
        return to_rgb(picture, self._matrix)

    def _next_time(self) -> float:
        """Guess when a frame without a time is shown: one frame after the last."""
        return self.times_s[-1] + 1 / (self.fps or 25.0) if self.times_s else 0.0


@contextlib.contextmanager
def _open_video(path: Path | str, wait_s: float | None = None):
    """Open a video: its container, and the stream that is the film, no cover or thumbnail."""
    try:
        container = _open_container(path, wait_s)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(
            f"{path} cannot be opened as a video ({error.strerror}): not one, or cut off; give a video file, such as "
            "mp4, avi, mkv or webm, or a folder of frames"
        ) from error
    with container:
        yield container, choose_film(container, str(path))


def _open_container(path: Path | str, wait_s: float | None) -> av.container.InputContainer:
    """Open a file, or an address from which nothing may come for so many seconds."""
    if isinstance(path, Path):
        path = path.absolute()  # FFmpeg takes what stands before a colon, as in 10:20:30.mp4, for a protocol
    return av.open(str(path), timeout=None if wait_s is None else (wait_s, wait_s))


def choose_film(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """Choose the stream that is the film, no cover or thumbnail; ValueError, with the container's name, for none."""
    films = [stream for stream in container.streams.video if not stream.disposition & NO_FILM]
    if not films:
        what = "a cover picture" if container.streams.video else "sound but no pictures"
        raise ValueError(f"{name} has {what}, and no film; give a video file or a folder of frames")
    return max(films, key=lambda stream: (bool(stream.disposition & Disposition.default), stream.frames))


def read_display(picture: av.VideoFrame, stream: av.VideoStream) -> tuple[list[int] | None, Fraction | None]:
    """Read from a film's first picture how all are shown: the matrix of `to_rgb`, and width over height of a pixel."""
    matrix = picture.side_data.get("DISPLAYMATRIX")
    matrix = None if matrix is None else np.frombuffer(matrix, np.int32).tolist()
    if stream.sample_aspect_ratio in (None, 0, 1):
        return matrix, None
    aspect = Fraction(stream.sample_aspect_ratio)
    return matrix, 1 / aspect if matrix and matrix[0] == 0 else aspect


def _shown_times(packet: av.Packet) -> set[int]:
    """When the picture of a packet is to be shown; empty where that is not known, or it is not to be shown."""
    return {packet.pts} if packet.size and packet.pts is not None and not packet.is_discard else set()


def _is_between(times: set[int], first: int | None, last: float | None) -> bool:
    """Tell whether one of the times lies between two others; not where one of these is not known."""
    return first is not None and last is not None and any(first < time < last for time in times)


def _time_of(picture: av.VideoFrame) -> float | None:
    """When a frame is shown, s; None where the file does not say."""
    return picture.time


def to_rgb(picture: av.VideoFrame, matrix: list[int] | None) -> np.ndarray:
    """Convert to uint8 (H, W, 3) RGB, turned and mirrored as the file asks to be shown: phones store upright videos
    lying, and front cameras mirrored.

    Args:
        matrix: a, b, u, c, d, ...: shown x is a x + c y, shown y is b x + d y; None: as it is.
    """
    frame = picture.to_ndarray(format="rgb24")
    if matrix is None:
        return frame
    a, b, _, c, d = matrix[:5]
    if abs(a) < abs(b):
        frame, a, d = frame.swapaxes(0, 1), c, b
    frame = frame[:, ::-1] if a < 0 else frame
    frame = frame[::-1] if d < 0 else frame
    return np.ascontiguousarray(frame)


# ---------------------------------------------------------------------------------------------------------------------
# write a video


class VideoWriter:
    """A video under way, as `write_video` gives it."""

    def __init__(self, container, stream, size_hw: tuple[int, int], fps: float):
        self.num_frames, self._last_pts, self._fps = 0, -1, fps
        self.is_broken = False
        self._container, self._stream, self._size_hw = container, stream, size_hw

    def add(self, image_rgb: np.ndarray, time_s: float | None = None) -> None:
        """Append a frame.

        Args:
            time_s: when it is shown, s from the first frame on, later than the one before; None: one frame later.
            image_rgb: uint8 (H, W, 3) RGB. One of another size than the video's is fitted in, between black borders.
        """
        assert image_rgb.dtype == np.uint8 and image_rgb.ndim == 3 and image_rgb.shape[2] == 3, image_rgb.shape
        height, width = self._size_hw
        image_rgb = _fit(image_rgb, height, width)
        padding = (0, height % 2), (0, width % 2), (0, 0)  # yuv420p needs even sides
        image_rgb = np.pad(image_rgb, padding, mode="edge")
        picture = av.VideoFrame.from_ndarray(image_rgb, format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        time_s = self.num_frames / self._fps if time_s is None else time_s
        self._last_pts = max(round(time_s * VIDEO_CLOCK), self._last_pts + 1)
        picture.pts, picture.time_base = self._last_pts, Fraction(1, VIDEO_CLOCK)
        self.is_broken = True  # until it is written: a video with a gap gets no name
        try:
            self._container.mux(self._stream.encode(picture))
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror, self._container.name) from error
        self.is_broken = False
        self.num_frames += 1


@contextlib.contextmanager
def write_video(
    path: str | Path, size_hw: tuple[int, int], fps: float, sample_aspect: Fraction | None = None
) -> Iterator[VideoWriter]:
    """Open an .mp4 to write: H.264, yuv420p, index at the start, which browsers and common players show.

        with write_video("overlay.mp4", (height, width), fps=25) as video:
            video.add(image_rgb, time_s=0.04)

    The file is written whole or not at all: it gets its name when the block ends without an exception.

    Args:
        size_hw: height and width, px; an odd side gains one pixel, a copy of the last.
        fps: frames per second, about: each frame has its own time.
        sample_aspect: width over height of a pixel; None: square.
    Raises:
        ValueError: for an fps that is not above 0, or a video without frames.
    """
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps of {path} is {fps}; must be above 0")
    path, (height, width) = Path(path), size_hw
    partial = path.with_name(path.name + ".tmp")
    try:
        with av.open(str(partial.absolute()), "w", format="mp4", options={"movflags": "faststart"}) as container:
            rate = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))  # 30000/1001 is exact; 0 is no rate
            stream = container.add_stream("libx264", rate=rate, options={"crf": VIDEO_QUALITY, "preset": "veryfast"})
            stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
            stream.codec_context.time_base = Fraction(1, VIDEO_CLOCK)
            if sample_aspect is not None:
                stream.codec_context.sample_aspect_ratio = sample_aspect
            stream.codec_context.colorspace = stream.codec_context.color_primaries = Colorspace.ITU709
            stream.codec_context.color_trc = Colorspace.ITU709
            stream.codec_context.color_range = ColorRange.MPEG
            video = VideoWriter(container, stream, (height, width), fps)
            yield video
            if video.is_broken or not video.num_frames:
                raise ValueError(f"{path} is not written: it has no frames, or one that could not be written")
            container.mux(stream.encode())  # what the encoder still holds
        os.replace(partial, path)
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _fit(image_rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale a picture to fit a size, in the middle of black borders."""
    if image_rgb.shape[:2] == (height, width):
        return image_rgb
    scale = min(height / image_rgb.shape[0], width / image_rgb.shape[1])
    fitted_hw = [max(1, round(side * scale)) for side in image_rgb.shape[:2]]
    top, left = (height - fitted_hw[0]) // 2, (width - fitted_hw[1]) // 2
    fitted = cv2.resize(image_rgb, fitted_hw[::-1], interpolation=cv2.INTER_AREA)
    bottom, right = height - top - fitted_hw[0], width - left - fitted_hw[1]
    return cv2.copyMakeBorder(fitted, top, bottom, left, right, cv2.BORDER_CONSTANT)
