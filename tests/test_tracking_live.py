"""Frames of a network address that stalls, breaks off and comes back, of a file behind one, and of no camera."""

import contextlib
import functools
import http.server
import io
import socket
import threading
import time

import av
import numpy as np
import pytest
from test_track import quick, run  # noqa: F401 (quick is a fixture)
from test_tracking_tracker import moving_object

from utils.tracking.frames import write_video
from utils.tracking.live import LiveSource, open_source, shown_name

LEVELS = [10 + 9 * index for index in range(26)]  # the grey of each frame says which it is


def make_stream(levels, seconds=0.0):
    """An MPEG transport stream of grey frames, each of which can be decoded alone: its bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25, options={"tune": "zerolatency", "g": "1", "crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, level in enumerate(levels):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


@contextlib.contextmanager
def serve(connections):
    """Serve connections one after the other, each a list of bytes and of seconds to wait: the address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def work():
        for parts in connections:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    for part in parts:
                        time.sleep(part) if isinstance(part, float) else connection.sendall(part)
        listener.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


@contextlib.contextmanager
def serve_folder(folder, share=1.0):
    """Serve a folder's files by HTTP, of each its first bytes alone where the share is below 1: the address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def copyfile(self, source, outputfile):
            whole = source.read()
            outputfile.write(whole[: round(share * len(whole))])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def read_levels(source, pause_s=0.0):
    levels = []
    for index, frame, error in source:
        assert error is None and index == len(levels)
        levels.append(int(np.median(frame)))
        time.sleep(pause_s)
    return levels


def nearest(levels):
    return [int(np.abs(np.array(LEVELS) - level).argmin()) for level in levels]


def test_a_stream_that_stalls_breaks_and_comes_back():
    """A stall, a break in the middle of a frame, and the rest: nothing twice, nothing out of order."""
    first, second = make_stream(LEVELS[:14]), make_stream(LEVELS[14:])
    half = len(first) // 2
    with serve([[first[:half], 0.5, first[half:-900]], [second]]) as address:
        source = LiveSource(address, wait_s=1.5)
        start = time.monotonic()
        numbers = nearest(read_levels(source))
    assert numbers == sorted(set(numbers)) and len(numbers) + source.num_dropped >= 22
    assert set(range(15, 25)) <= set(numbers) or source.num_dropped  # the second connection's
    assert time.monotonic() - start < 10  # it waits for a bounded time
    assert source.times_s == sorted(source.times_s) and len(source.times_s) == len(numbers)


def test_old_frames_are_dropped_for_new_ones():
    """Of many frames at once a slow reader gets few: a bounded number waited, and the last one is there."""
    with serve([[make_stream(LEVELS)]]) as address:
        source = LiveSource(address, wait_s=1.5)
        numbers = nearest(read_levels(source, pause_s=0.05))
    assert numbers == sorted(set(numbers)) and numbers[-1] >= 24
    assert source.num_dropped >= 10 and len(numbers) + source.num_dropped in (25, 26)


def test_a_file_behind_an_address_is_read_whole(tmp_path):
    with write_video(tmp_path / "film.mp4", (48, 64), 25) as video:
        for level in LEVELS:
            video.add(np.full((48, 64, 3), level, np.uint8))

    with serve_folder(tmp_path) as address:
        source = open_source(f"{address}/film.mp4")
        assert nearest(read_levels(source, pause_s=0.005)) == list(range(26))
        assert source.num_dropped == 0 and source.problem is None and source.fps == 25
        assert source.times_s == pytest.approx(np.arange(26) / 25, abs=2e-3)  # the film's, not those of its reading


def test_what_a_file_behind_an_address_lacks_is_said(tmp_path):
    """A damaged frame keeps its place; a film whose server breaks off ends there: it was played again, without end."""
    rng = np.random.default_rng(0)
    with write_video(tmp_path / "film.mp4", (48, 64), 25) as video:
        for level in LEVELS:  # noise: a film of more than the one piece in which it is read
            video.add(rng.integers(level - 9, level + 9, (48, 64, 3)).astype(np.uint8))
    data = bytearray((tmp_path / "film.mp4").read_bytes())
    with av.open(str(tmp_path / "film.mp4")) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][12]
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    (tmp_path / "damaged.mp4").write_bytes(data)
    with serve_folder(tmp_path) as address:
        source = open_source(f"{address}/damaged.mp4")
        bad = [(index, str(error)) for index, frame, error in source if frame is None]
    assert [index for index, _ in bad] == [round(packet.pts * packet.time_base * 25)] and len(source.times_s) == 26
    assert f"{address}/damaged.mp4, frame {bad[0][0]} cannot be decoded" in bad[0][1]

    with serve_folder(tmp_path, share=0.6) as address:
        source = LiveSource(f"{address}/film.mp4", wait_s=1.0)
        numbers = [nearest([np.median(frame)])[0] for _, frame, _ in source if frame is not None]
    assert 5 < len(numbers) < 20 and numbers == list(range(len(numbers)))
    assert f"{address}/film.mp4 " in source.problem


def test_what_never_comes_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=f"tcp://127.0.0.1:{port}, from which no frame came in 0.5 s"):
            read_levels(LiveSource(f"tcp://127.0.0.1:{port}", wait_s=0.5))
    with pytest.raises(ValueError, match="must be camera: and a number"):
        open_source("camera:front")
    assert shown_name("rtsp://me:secret@192.0.2.7:554/") == "192.0.2.7:554"  # which goes into files
    with pytest.raises(ValueError, match="there is no camera 63, or it is in use"):
        read_levels(open_source("camera:63"))


def test_a_loop_may_be_left_early_and_started_again():
    stream = make_stream(LEVELS)
    with serve([[stream, 0.3], [stream, 0.3]]) as address:
        source = LiveSource(address, wait_s=10.0)
        for _ in range(2):
            for index, _, _ in source:
                if index == 1:
                    break
            assert "live frames" not in {thread.name for thread in threading.enumerate()}


def test_track_follows_a_stream(tmp_path):
    frames, boxes = moving_object(6)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25, options={"tune": "zerolatency", "g": "1", "crf": "5"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    with serve([[buffer.getvalue()]]) as address:
        box = f"box={[float(value) for value in boxes[0]]}"
        LiveSource.__init__.__defaults__, before = (1.5,), LiveSource.__init__.__defaults__
        try:
            assert run(tmp_path / "run", f"input={address}", box, "overlay=false") == []
        finally:
            LiveSource.__init__.__defaults__ = before
    lines = (tmp_path / "run" / "boxes.txt").read_text().splitlines()
    assert 1 <= len(lines) <= 6
