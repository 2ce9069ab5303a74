"""utils/tracking/frames.py: frames in order, decoded ahead, faults in the middle; videos that other programs read."""

import contextlib
import os
import struct
import threading
import time
import wave
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from utils.images import write_image
from utils.tracking import frames
from utils.tracking.frames import FrameSource, list_frames, natural_key, write_video


def picture(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture that differs from one index to the next."""
    rng = np.random.default_rng(index)
    return cv2.resize(rng.integers(30, 220, (3, 4, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)


def write_folder(folder: Path, num_frames: int) -> Path:
    folder.mkdir()
    for index in range(num_frames):
        write_image(folder / f"{index}.png", picture(index))
    return folder


def read_all(source):
    return list(FrameSource(source))


# ---------------------------------------------------------------------------------------------------------------------
# folders


def test_natural_order():
    names = ["a1.jpg", "a2.jpg", "A10.jpg", "a10b2.jpg", "a10b10.jpg", "b.jpg"]
    assert sorted(reversed(names), key=natural_key) == names
    assert sorted(["10", "9", "x", "1"], key=natural_key) == ["1", "9", "10", "x"]  # digits first, text later
    assert sorted(["007.png", "8.png", "07.png"], key=natural_key)[-1] == "8.png"


def test_a_folder_gives_its_pictures_in_natural_order(tmp_path):
    for name in ("2.PNG", "10.jpg", "9.jpeg", ".hidden.jpg", "1.tif"):
        write_image(tmp_path / name.replace("PNG", "png").replace("jpeg", "jpg"), picture(0))
    os.rename(tmp_path / "2.png", tmp_path / "2.PNG")
    (tmp_path / "groundtruth.txt").write_text("1,1,2,2\n")
    (tmp_path / "3.jpg").mkdir()
    assert [path.name for path in list_frames(tmp_path)] == ["1.tif", "2.PNG", "9.jpg", "10.jpg"]


def test_a_folder_that_has_no_frames_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        FrameSource(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no pictures"):
        FrameSource(tmp_path)
    (tmp_path / "img").mkdir()
    write_image(tmp_path / "img" / "1.png", picture(0))
    with pytest.raises(ValueError, match="give .*img"):
        FrameSource(tmp_path)
    write_image(tmp_path / "img" / "1.jpg", picture(0))
    with pytest.raises(ValueError, match="both 1.jpg and 1.png"):
        FrameSource(tmp_path / "img")


def test_pictures_of_any_kind_and_size_come_as_rgb(tmp_path):
    color = picture(3)
    write_image(tmp_path / "1.png", color)
    cv2.imwrite(str(tmp_path / "2.png"), color[..., 0])  # grey
    cv2.imwrite(str(tmp_path / "3.png"), color[..., 0].astype(np.uint16) * 257)  # 16 bit
    write_image(tmp_path / "4.png", picture(4, 20, 31))  # the size changes midway
    frames = read_all(tmp_path)
    assert [index for index, _, _ in frames] == [0, 1, 2, 3] and all(error is None for _, _, error in frames)
    assert np.array_equal(frames[0][1], color)
    for _, frame, _ in frames[1:3]:
        assert frame.dtype == np.uint8 and np.array_equal(frame, np.repeat(color[..., :1], 3, 2))
    assert frames[3][1].shape == (20, 31, 3)
    source = FrameSource(tmp_path)
    assert source.num_frames == 4 and source.fps is None and source.frame_name(1) == str(tmp_path / "2.png")
    assert source.name == FrameSource([tmp_path / "2.png"]).name == str(tmp_path)
    assert len(read_all(tmp_path / "1.png")) == 1  # one picture is a video of one frame
    assert FrameSource(tmp_path / "1.png").name == str(tmp_path / "1.png")


def test_an_unreadable_frame_is_named_and_the_next_ones_follow(tmp_path):
    folder = write_folder(tmp_path / "video", 6)
    (folder / "3.png").write_bytes(b"not a picture")
    (folder / "4.png").write_bytes(b"")
    frames = read_all(folder)
    assert [index for index, _, _ in frames] == [0, 1, 2, 3, 4, 5]
    assert [frame is None for _, frame, _ in frames] == [False, False, False, True, True, False]
    assert "3.png" in str(frames[3][2]) and "4.png" in str(frames[4][2])
    assert np.array_equal(frames[5][1], picture(5))
    paths = [folder / "5.png", folder / "gone.png", folder / "0.png"]  # in the order given
    frames = list(FrameSource(paths))
    assert np.array_equal(frames[0][1], picture(5)) and np.array_equal(frames[2][1], picture(0))
    assert isinstance(frames[1][2], FileNotFoundError) and "gone.png" in str(frames[1][2])


def test_a_few_frames_are_decoded_ahead_and_no_more(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "video", 20)
    num_read = 0
    read = frames.read_image

    def count(path, page):
        nonlocal num_read
        num_read += 1
        return read(path, page)

    monkeypatch.setattr(frames, "read_image", count)
    source = iter(FrameSource(folder, num_ahead=3))
    next(source)
    deadline = time.monotonic() + 10
    while num_read < 4 and time.monotonic() < deadline:  # the loop sits still, the thread works
        time.sleep(0.01)
    time.sleep(0.25)
    assert 4 <= num_read <= 5  # one given, three waiting, one in hand
    assert len(list(source)) == 19 and num_read == 20


def test_leaving_early_ends_the_thread_and_a_second_pass_starts_anew(tmp_path):
    source = FrameSource(write_folder(tmp_path / "video", 12), num_ahead=2)
    for index, _, _ in source:
        if index == 3:
            break
    assert "frames" not in {thread.name for thread in threading.enumerate()}
    assert [index for index, _, _ in source] == list(range(12))


def test_an_error_of_our_own_reaches_the_loop(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "video", 2)
    monkeypatch.setattr(frames, "read_image", lambda path, page: {}["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        read_all(folder)


# ---------------------------------------------------------------------------------------------------------------------
# videos


@pytest.fixture(scope="module")
def video_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with write_video(path, (47, 63), 30000 / 1001) as video:
        for index in range(40):
            video.add(picture(index // 4, 47, 63))
    return path


def test_a_written_video_is_one_that_players_show(video_path):
    with av.open(str(video_path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.height, stream.width) == (48, 64)  # even, as yuv420p needs
        assert float(stream.average_rate) == 30000 / 1001 and stream.frames == 40
        assert float(stream.duration * stream.time_base) == pytest.approx(40 * 1001 / 30000, abs=1e-3)
    data = video_path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")  # starts to play before it is loaded
    assert [path.name for path in video_path.parent.iterdir()] == ["clip.mp4"]  # nothing half made beside it


def test_a_video_is_read_as_opencv_reads_it(video_path):
    frames = read_all(video_path)
    source = FrameSource(video_path)
    assert source.num_frames == 40 and source.fps == 30000 / 1001
    capture = cv2.VideoCapture(str(video_path))
    for index, (number, frame, error) in enumerate(frames):
        is_read, expected = capture.read()
        assert is_read and number == index and error is None
        assert np.abs(frame.astype(int) - expected[..., ::-1]).mean() < 2
        assert np.abs(frame[:47, :63].astype(int) - picture(index // 4, 47, 63)).mean() < 4
    assert len(frames) == 40 and not capture.read()[0]


def test_colors_of_a_video_are_those_given(tmp_path):
    colors = [(220, 30, 30), (30, 200, 40), (40, 40, 220), (128, 128, 128), (250, 240, 20)]
    with write_video(tmp_path / "colors.mp4", (64, 64), 5) as video:
        for color in colors:
            video.add(np.full((64, 64, 3), color, np.uint8))
    for (_, frame, _), color in zip(read_all(tmp_path / "colors.mp4"), colors, strict=True):
        assert np.abs(frame[32, 32].astype(int) - color).max() <= 4


def test_a_video_cut_off_ends_early_and_says_so(tmp_path, video_path):
    data = video_path.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: int(0.8 * len(data))])
    source = FrameSource(cut)
    frames = list(source)
    assert 10 < len(frames) < 40
    assert all(error is None or "cut.mp4" in str(error) for _, _, error in frames)
    assert "cut.mp4" in source.problem and "40" in source.problem
    whole = FrameSource(video_path)
    assert len(list(whole)) == 40 and whole.problem is None

    # a camera that lost power before it wrote the index
    cut.write_bytes(data[: data.index(b"moov") - 4] + data[data.index(b"mdat") - 4 :])
    with pytest.raises(ValueError, match="cut.mp4 cannot be opened as a video"):
        FrameSource(cut)


@pytest.mark.parametrize("num_threads", [1, 16])
def test_a_damaged_frame_of_a_video_is_named_and_the_next_ones_follow(tmp_path, video_path, num_threads, monkeypatch):
    """The very frame, at the end, too, and however many cores decode: with 16, FFmpeg drops what follows one there."""

    @contextlib.contextmanager
    def open_video(*arguments, original=frames._open_video):
        with original(*arguments) as (container, stream):
            stream.codec_context.thread_count = num_threads
            yield container, stream

    monkeypatch.setattr(frames, "_open_video", open_video)
    with av.open(str(video_path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in (packets[1], *packets[15:18], *packets[-4:]):
        data = bytearray(video_path.read_bytes())
        data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
        (tmp_path / "damaged.mp4").write_bytes(data)
        seen = read_all(tmp_path / "damaged.mp4")
        assert [index for index, _, _ in seen] == list(range(40))
        bad = [(index, str(error)) for index, frame, error in seen if frame is None]
        place = round(packet.pts * packet.time_base * 30000 / 1001)
        assert [index for index, _ in bad] == [place] and f"damaged.mp4, frame {place} " in bad[0][1]


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "notes.mp4").write_text("no video\n" * 50)
    with pytest.raises(ValueError, match="notes.mp4 cannot be opened as a video"):
        FrameSource(tmp_path / "notes.mp4")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with pytest.raises(ValueError, match="sound but no pictures"):
        FrameSource(tmp_path / "sound.wav")


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
def test_a_video_that_asks_to_be_turned_is_turned(tmp_path, video_path, matrix):
    """Phones store upright videos lying, with a matrix in the track's header; OpenCV applies it too."""
    data = bytearray(video_path.read_bytes())
    start = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # type, flags, times and ids, reserved, layer and volume
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 64 << 16, 64 << 16, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    _, frame, _ = next(iter(FrameSource(tmp_path / "turned.mp4")))
    expected = cv2.VideoCapture(str(tmp_path / "turned.mp4")).read()[1][..., ::-1]
    assert frame.shape == expected.shape == ((64, 48, 3) if matrix[0] == 0 else (48, 64, 3))
    assert np.abs(frame.astype(int) - expected).mean() < 2
    assert frame.flags["C_CONTIGUOUS"]


def test_frames_of_another_size_are_fitted_in(tmp_path):
    with write_video(tmp_path / "sizes.mp4", (64, 64), 10) as video:
        video.add(np.full((64, 64, 3), 200, np.uint8))
        video.add(np.full((16, 32, 3), 200, np.uint8))  # wide: black above and below
        video.add(np.full((300, 100, 3), 200, np.uint8))  # tall: black at the sides
    _, wide, tall = (frame.astype(int)[..., 0] for _, frame, _ in read_all(tmp_path / "sizes.mp4"))
    assert abs(wide[32, 2] - 200) < 8 and wide[4, 32] < 8 and wide[60, 32] < 8
    assert abs(tall[2, 32] - 200) < 8 and tall[32, 4] < 8 and tall[32, 60] < 8


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    """FFmpeg took 10:20:30.mp4 for an address: "Protocol not found"; and a frame in three hours for a rate of 0."""
    monkeypatch.chdir(tmp_path)
    with write_video("10:20:30.mp4", (32, 32), 1e-4) as video:
        video.add(np.zeros((32, 32, 3), np.uint8))
        video.add(np.zeros((32, 32, 3), np.uint8), time_s=1e4)
    assert len(read_all("10:20:30.mp4")) == 2


def test_a_video_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"an older one")
    with pytest.raises(KeyboardInterrupt):
        with write_video(path, (32, 32), 10) as video:
            video.add(np.zeros((32, 32, 3), np.uint8))
            raise KeyboardInterrupt
    assert path.read_bytes() == b"an older one" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="out.mp4 is not written: it has no frames"):
        with write_video(path, (32, 32), 10):
            pass
    for fps in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="fps"):
            with write_video(path, (32, 32), fps):
                pass
    assert path.read_bytes() == b"an older one" and list(tmp_path.iterdir()) == [path]
