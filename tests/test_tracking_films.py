"""Films as cameras, browsers and editors write them: times, streams, orientation, cuts; boxes before the overlay.

Inputs beside those of the bug reports, made here with PyAV: equal and falling timestamps, times that are missing, one
frame alone, 30000/1001 frames a second, all eight orientations, oblong pixels in the overlay, each file of pages.
"""

import itertools
import json
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from test_track import as_text, count_frames, quick, read_lines, run, run_main  # noqa: F401 (quick: a fixture)
from test_tracking_tracker import moving_object

import track as script
from utils.images import write_image
from utils.tracking.frames import FrameSource, write_video

UNEVEN_S = [0.0, 0.04, 0.5, 0.52, 1.2, 2.88]


def picture(index, height=48, width=64):
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), np.uint8)


def write_film(path, times_s, size_hw=(48, 64), sample_aspect=None, fps=25):
    with write_video(path, size_hw, fps, sample_aspect) as video:
        for index, time_s in enumerate(times_s):
            video.add(picture(index, *size_hw), time_s)
    return path


def read_times(path):
    source = FrameSource(path)
    frames = list(source)
    assert all(error is None for _, _, error in frames)
    return source, source.times_s


@pytest.mark.parametrize("times_s", [UNEVEN_S, [0.0, 3600.0, 7200.0], [0.0], [n * 1001 / 30000 for n in range(9)]])
def test_each_frame_has_its_own_time(times_s, tmp_path):
    """One rate stood for all: 0.8 s became 0.02 s, and a timelapse of one frame an hour was a ZeroDivisionError."""
    source, read_s = read_times(write_film(tmp_path / "film.mp4", times_s))
    assert read_s == pytest.approx(times_s, abs=1e-4) and source.problem is None


def test_a_film_of_a_browser_has_its_times(tmp_path):
    """MediaRecorder's WebM: milliseconds, no rate, no number of frames."""
    with av.open(str(tmp_path / "film.webm"), "w") as container:
        stream = container.add_stream("libvpx", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time_s in enumerate(UNEVEN_S):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time_s), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    source, read_s = read_times(tmp_path / "film.webm")
    assert read_s == pytest.approx(UNEVEN_S, abs=2e-3) and source.problem is None


def test_the_overlay_and_the_record_have_the_films_times(tmp_path):
    frames, boxes = moving_object(6)
    with write_video(tmp_path / "film.mp4", frames[0].shape[:2], 25, Fraction(4, 3)) as video:
        for frame, time_s in zip(frames, UNEVEN_S, strict=True):
            video.add(frame, time_s)
    assert run(tmp_path / "run", f"input={tmp_path / 'film.mp4'}", f"box={as_text(boxes[0])}") == []
    record = json.loads((tmp_path / "run" / "tracks.json").read_text())
    assert record["shown_at_s"] == pytest.approx(UNEVEN_S, abs=1e-4)
    source, read_s = read_times(tmp_path / "run" / "overlay.mp4")
    assert read_s == pytest.approx(UNEVEN_S, abs=1e-4)
    assert source.sample_aspect == Fraction(4, 3)  # pixels that are wider than high stay so


def test_timestamps_that_do_not_rise_are_mended(tmp_path, monkeypatch):
    path = write_film(tmp_path / "film.mp4", [n / 25 for n in range(5)])
    times = iter([0.0, 0.04, 0.04, 0.01, None])
    monkeypatch.setattr("utils.tracking.frames._time_of", lambda frame: next(times))
    _, read_s = read_times(path)
    assert read_s == pytest.approx([0, 0.04, 0.08, 0.12, 0.16])


def remux(path, new_path, change, **options):
    """Copy a film's packets, as change(index, packet) leaves them; None: left out."""
    with av.open(str(path)) as old, av.open(str(new_path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for index, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            if (packet := change(index, packet)) is not None:
                packet.stream = stream
                new.mux(packet)


def test_a_film_that_was_trimmed_without_decoding_is_whole(tmp_path):
    """Edit lists leave out frames that the file still has: "ends after 48 of the 60 frames", and status 1."""
    path = write_film(tmp_path / "film.mp4", [n / 25 for n in range(60)])

    def earlier(index, packet):
        packet.pts, packet.dts = packet.pts - 12 * 3600, packet.dts - 12 * 3600
        return packet

    remux(path, tmp_path / "trimmed.mp4", earlier, avoid_negative_ts="disabled")
    source = FrameSource(tmp_path / "trimmed.mp4")
    assert source.num_frames == 60
    assert len(list(source)) == 48 and source.times_s[:2] == pytest.approx([0, 0.04]) and source.problem is None


def test_a_film_that_is_cut_is_told(tmp_path):
    path = write_film(tmp_path / "film.mp4", [n / 25 for n in range(60)])
    data = path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(0.7 * len(data))])
    source = FrameSource(tmp_path / "cut.mp4")
    assert 0 < len([frame for _, frame, _ in source if frame is not None]) < 60
    assert "cut.mp4" in source.problem and "60" in source.problem


def mux_silence(container, sound):
    """Write a second of sound."""
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
    silence.sample_rate = 8000
    container.mux(sound.encode(silence))
    container.mux(sound.encode())


def test_a_cover_is_no_film(tmp_path):
    """It was tracked instead of the film; a song with a cover was "tracked"."""
    path = tmp_path / "film.mp4"
    for has_film in (True, False):
        with av.open(str(path), "w") as container:
            cover = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 320, 320, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            sound = container.add_stream("aac", rate=8000)
            film = container.add_stream("libx264", rate=25) if has_film else None
            if film:
                film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
            container.mux(cover.encode(av.VideoFrame.from_ndarray(picture(0, 320, 320), format="rgb24")))
            container.mux(cover.encode())
            mux_silence(container, sound)
            for index in range(5 if has_film else 0):
                container.mux(film.encode(av.VideoFrame.from_ndarray(picture(index), format="rgb24")))
            container.mux(film.encode() if has_film else [])
        if has_film:
            source = FrameSource(path)
            assert {frame.shape for _, frame, _ in source} == {(48, 64, 3)} and len(source.times_s) == 5
        else:
            with pytest.raises(ValueError, match="film.mp4 has a cover picture, and no film"):
                FrameSource(path)


@pytest.mark.parametrize("matrix", list(itertools.product((1, -1), (1, -1), (False, True))))
def test_mirrored_and_turned_films_are_shown_as_they_ask(matrix, tmp_path):
    """Front cameras mirror: shown upside down. The track's header says shown x = a x + c y, y = b x + d y."""
    x_sign, y_sign, is_turned = matrix
    path = write_film(tmp_path / "film.mp4", [0.0, 0.04])
    _, plain, _ = next(iter(FrameSource(path)))
    a, b, c, d = (0, y_sign, x_sign, 0) if is_turned else (x_sign, 0, 0, y_sign)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # type, flags, times and ids, reserved, layer and volume
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    _, frame, _ = next(iter(FrameSource(path)))
    height, width = plain.shape[:2]
    expected = np.zeros((width, height, 3) if is_turned else plain.shape, np.uint8)
    for y in range(height):
        for x in range(width):
            shown_x, shown_y = a * x + c * y, b * x + d * y
            expected[shown_y % len(expected), shown_x % expected.shape[1]] = plain[y, x]
    for axis, sign in ((1, x_sign), (0, y_sign)):  # -1 * 0 is the last column, not the first
        expected = np.roll(expected, -1, axis) if sign < 0 else expected
    assert np.array_equal(frame, expected)


def encode_film(path, codec, options, num_frames=40):
    """Write a bar that moves by 2 px a frame: frame n has it at x = 2 n."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(num_frames):
            frame = np.full((64, 96, 3), 40, np.uint8)
            frame[:, 2 * index : 2 * index + 8] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def shown_frames(source):
    """Which frames of `encode_film` a source gives, by where the bar is; None: one that cannot be read."""
    return [None if frame is None else int(np.argmax(frame[30, :, 0] > 150)) // 2 for _, frame, _ in source]


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("webm", "libvpx", {"g": "12", "lag-in-frames": "0"}),  # what browsers record: refused whole
        ("webm", "libvpx-vp9", {"g": "12", "lag-in-frames": "0"}),
        ("mp4", "libx264", {"x264-params": "keyint=12:min-keyint=12:bframes=0:scenecut=0"}),  # "ends after 28 of 35"
    ],
)
def test_a_recording_that_starts_before_its_first_keyframe(suffix, codec, options, tmp_path):
    path = encode_film(tmp_path / f"film.{suffix}", codec, options)
    later = tmp_path / f"later.{suffix}"
    remux(path, later, lambda index, packet: packet if index >= 5 else None)
    source = FrameSource(later)
    assert shown_frames(source) == list(range(12, 40)) and source.problem is None
    assert source.times_s[:2] == pytest.approx([0, 0.04], abs=0.002)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_film_that_was_cut_at_an_open_group_of_pictures_is_whole(suffix, tmp_path):
    """Its second packet is shown before its first, and needs what was cut off: "ends after 30 of the 31 frames"."""
    open_gop = "open-gop=1:keyint=10:min-keyint=10:bframes=3:b-adapt=0:scenecut=0"
    path, cut = (tmp_path / f"{name}.{suffix}" for name in ("film", "cut"))
    encode_film(path, "libx264", {"x264-params": open_gop})
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        start = [index for index, packet in enumerate(packets) if packet.is_keyframe][1]
    assert packets[start + 1].pts < packets[start].pts  # the group is open
    remux(path, cut, lambda index, packet: packet if index >= start else None)
    source = FrameSource(cut)
    frames = shown_frames(source)
    assert frames == list(range(frames[0], 40)) and len(frames) < len(packets) - start and source.problem is None


def test_a_part_of_an_mkv_is_no_whole_film(tmp_path):
    """As a download that broke off: it plays, and its header says that there was more."""
    path, part = tmp_path / "film.mkv", tmp_path / "part.mkv"
    encode_film(path, "libx264", {})
    part.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    source = FrameSource(part)
    frames = shown_frames(source)
    assert frames == list(range(len(frames))) and 10 < len(frames) < 34
    assert f"part.mkv ends after {len(frames)} frames" in source.problem


def test_a_frame_that_the_decoder_passes_over_in_silence_is_named(tmp_path):
    """HEVC: no error, no picture, and what needs it comes to nothing either: all others stay in their places."""
    path = tmp_path / "film.mp4"
    encode_film(path, "libx265", {"x265-params": "log-level=none"})
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
        data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    data[packet.pos + 8 : packet.pos + packet.size] = rng.integers(0, 256, packet.size - 8, np.uint8).tobytes()
    path.write_bytes(data)
    frames = shown_frames(FrameSource(path))
    place = round(packet.pts * packet.time_base * 25)
    assert len(frames) == 40 and frames[place] is None and frames[:15] == list(range(15))
    assert all(frame in (None, index) for index, frame in enumerate(frames))


@pytest.mark.skipif(not hasattr(av.container.OutputContainer, "add_attachment"), reason="PyAV is older: no attachments")
@pytest.mark.parametrize("has_film", [True, False])
def test_an_attached_cover_of_mkv_is_no_film(has_film, tmp_path):
    """A song with a cover was tracked."""
    path = tmp_path / "film.mkv"
    write_image(tmp_path / "cover.jpg", picture(0, 320, 320))
    with av.open(str(path), "w") as container:
        film = container.add_stream("libx264", rate=25) if has_film else None
        if film:
            film.width, film.height, film.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=8000)
        container.add_attachment("cover.jpg", "image/jpeg", (tmp_path / "cover.jpg").read_bytes())
        for index in range(5 if has_film else 0):
            container.mux(film.encode(av.VideoFrame.from_ndarray(picture(index), format="rgb24")))
        container.mux(film.encode() if has_film else [])
        mux_silence(container, sound)
    if has_film:
        source = FrameSource(path)
        assert {frame.shape for _, frame, _ in source} == {(48, 64, 3)} and len(source.times_s) == 5
    else:
        with pytest.raises(ValueError, match="film.mkv has a cover picture, and no film"):
            FrameSource(path)


def test_boxes_are_kept_where_the_overlay_fails(tmp_path):
    """A side above 16384 px: H.264 does not have it; a full disk ends alike."""
    (tmp_path / "frames").mkdir()
    for index in range(3):
        write_image(tmp_path / "frames" / f"{index}.png", picture(index, 32, 16400))
    message = run_main(tmp_path / "run", f"input={tmp_path / 'frames'}", "box=[20,5,20,16]")
    assert "overlay.mp4 cannot be written" in message and "Traceback" not in message
    assert len(read_lines(tmp_path / "run" / "boxes.txt")) == 3
    assert json.loads((tmp_path / "run" / "tracks.json").read_text())["num_frames"] == 3
    assert not list((tmp_path / "run").glob("overlay*"))


def test_boxes_are_kept_at_ctrl_c(tmp_path, monkeypatch):
    frames, boxes = moving_object(9)
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(frames):
        write_image(tmp_path / "frames" / f"{index}.png", frame)
    track_frames = script.track_frames

    def interrupted(*args):
        for tracked_frame in track_frames(*args):
            if tracked_frame.index == 5:
                raise KeyboardInterrupt
            yield tracked_frame

    draw_boxes, drawn = script.drawing.draw_boxes, []

    def interrupted_later(*args):  # the frame is tracked, but not done
        drawn.append(draw_boxes(*args))
        if len(drawn) == 6:
            raise KeyboardInterrupt
        return drawn[-1]

    for owner, name, replacement in (
        (script, "track_frames", interrupted), (script.drawing, "draw_boxes", interrupted_later),
    ):  # fmt: skip
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(owner, name, replacement)
            run(tmp_path / name, f"input={tmp_path / 'frames'}", f"box={as_text(boxes[0])}")
        assert len(read_lines(tmp_path / name / "boxes.txt")) == 5
        record = json.loads((tmp_path / name / "tracks.json").read_text())
        assert record["num_frames"] == 5 and record["shown_at_s"] == pytest.approx([0, 0.04, 0.08, 0.12, 0.16])


def test_boxes_of_a_long_film_are_kept_as_it_goes(tmp_path, monkeypatch):
    frames, boxes = moving_object(6)
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(frames):
        write_image(tmp_path / "frames" / f"{index}.png", frame)
    lines, write_tracks = [], script.write_tracks
    monkeypatch.setattr(script, "KEEP_EVERY_S", 0.0)
    monkeypatch.setattr(
        script,
        "write_tracks",
        lambda *args: write_tracks(*args) or lines.append(len(read_lines(args[0] / "boxes.txt"))),
    )
    run(tmp_path / "run", f"input={tmp_path / 'frames'}", f"box={as_text(boxes[0])}")
    assert lines == [1, 2, 3, 4, 5, 6, 6] and count_frames(tmp_path / "run" / "overlay.mp4") == 6


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_pages_of_a_file_are_frames(suffix, tmp_path):
    """Their first page alone was the film."""
    from PIL import Image

    frames, boxes = moving_object(4)
    pages = [Image.fromarray(frame) for frame in frames]
    pages[0].save(tmp_path / f"film.{suffix}", save_all=True, append_images=pages[1:])
    assert run(tmp_path / "run", f"input={tmp_path / f'film.{suffix}'}", f"box={as_text(boxes[0])}") == []
    assert len(read_lines(tmp_path / "run" / "boxes.txt")) == 4
    source = FrameSource(tmp_path / f"film.{suffix}")
    assert source.name == str(tmp_path / f"film.{suffix}") and source.frame_name(2) == f"{source.name}, page 3"
