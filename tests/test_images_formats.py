"""utils/images.py reads, or refuses by name, each row of the table in data/README.md; the rest of the kinds of fault.

Every file is written by Pillow, tifffile or OpenCV from numbers that the test holds; they are what must come back.
Inputs beside those of the bug reports, tried for this file: MPO of two pictures, a TIFF whose first page is the
thumbnail, SubIFDs, BigTIFF, big-endian and tiled files, 12-bit packed numbers, 4-bit palettes, a sparse TIFF, files cut
at 40 places for 5 compressions, lossy WebP as a map, 2-bit PNG, 1-bit BMP, an animated GIF with frames that differ,
signed and 64-bit maps, CMYK in TIFF and JPEG, a page of 0 pixels, a web page, an LFS pointer and a film named .png,
a TIFF whose pages are a circle, ImageJ's stack of one page, and bytes of each of these files changed at random.
"""

import re
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from utils.images import (
    OTHER_KINDS,
    count_pages,
    list_images,
    list_pictures,
    lossy_kind,
    read_channels,
    read_frame_wh,
    read_image,
    read_image_unscaled,
    read_label_map,
    read_orientation,
)

RNG = np.random.default_rng(0)
GREY8, GREY16 = RNG.integers(0, 256, (20, 24), np.uint8), RNG.integers(0, 2**16, (20, 24), np.uint16)
RGB8, RGB16 = RNG.integers(0, 256, (20, 24, 3), np.uint8), RNG.integers(0, 2**16, (20, 24, 3), np.uint16)
MORE8 = np.concatenate([RGB8, RNG.integers(0, 256, (20, 24, 2), np.uint8)], 2)  # 5 bands
BINARY = GREY8 > 200
RAMP = np.arange(480).reshape(20, 24).astype(np.uint8)  # Pillow renumbers a GIF that leaves out a value
COLORS = RNG.integers(0, 256, (256, 3), np.uint8)
SMOOTH = cv2.resize(RGB8[:3, :3], (24, 20))  # what lossy compression keeps, within a few levels
TURNS = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, 3), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: np.rot90}  # fmt: skip


def grey(numbers: np.ndarray) -> np.ndarray:
    return np.repeat(numbers[..., None], 3, 2)


def pillow(image: np.ndarray, mode: str | None = None, **options):
    picture = Image.fromarray(image)
    if mode == "P":
        picture.putpalette(COLORS.tobytes())
    elif mode:
        picture = picture.convert(mode)
    return lambda path: picture.save(path, **options)


def opencv(image: np.ndarray):
    return lambda path: cv2.imwrite(str(path), image[..., ::-1] if image.ndim == 3 else image)


def tiff(numbers: np.ndarray, photometric="minisblack", **options):
    return lambda path: tifffile.imwrite(path, numbers, photometric=photometric, **options)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def small_png(numbers: np.ndarray, bits: int):
    """Write a grey PNG of 2 or 4 bits by hand: no library here does."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = numbers.shape
    digits = np.unpackbits(numbers[..., None], axis=2)[..., 8 - bits :].reshape(height, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(digits, axis=1))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return lambda path: path.write_bytes(data)


def one_page_stack(path):
    """Write a stack as ImageJ does above 4 GB: one page, and further slices after its pixels."""
    tifffile.imwrite(path, np.stack([GREY8, 255 - GREY8]), imagej=True)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        end = file.pages[0].offset + 2 + 12 * len(file.pages[0].tags)  # where the place of the next page stands
    data[end : end + 4] = bytes(4)
    path.write_bytes(data)


def circle_of_pages(path):
    tiff_pages((GREY8, {}), (GREY8, {}))(path)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        end = file.pages[1].offset + 2 + 12 * len(file.pages[1].aspage().tags)
        data[end : end + 4] = struct.pack("<I", file.pages[0].offset)
    path.write_bytes(data)


def resized(tag: int, size: int):
    """Write a TIFF of 24 x 20 px whose tag of width (256) or height (257) says another size."""

    def write(path):
        tiff(GREY8)(path)
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags[tag].overwrite(size)

    return write


def tiff_pages(*pages: tuple[np.ndarray, dict]):
    def write(path):
        with tifffile.TiffWriter(path) as file:
            for numbers, options in pages:
                file.write(numbers, photometric="minisblack", metadata=None, **options)

    return write


def animated(**options):
    frames = [Image.fromarray(RGB8), Image.fromarray(255 - RGB8)]
    return lambda path: frames[0].save(path, save_all=True, append_images=frames[1:], **options)


def sub_ifd(path):
    with tifffile.TiffWriter(path) as file:
        file.write(GREY8, photometric="minisblack", subifds=1)
        file.write(GREY8[::2, ::2], photometric="minisblack", subfiletype=1)


# row of data/README.md: how it is written, what the picture is, what the map is; text: what the refusal says;
# "lossy": near SMOOTH. Two of a kind stand in one row, as a list.
COLOUR, JPEG, PAGES = "3 different channels", "compression changes ids", "2 pages; save one file for each picture"
CASES = {
    "PNG, grey, 1 bit": [("png", pillow(BINARY), grey(BINARY * np.uint8(255)), BINARY)],
    "PNG, grey, 2 or 4 bits": [
        ("png", small_png(GREY8 >> 6, 2), grey((GREY8 >> 6) * np.uint8(85)), GREY8 >> 6),
        ("png", small_png(GREY8 >> 4, 4), grey((GREY8 >> 4) * np.uint8(17)), GREY8 >> 4),
    ],
    "PNG, grey, 8 bits": [("png", pillow(GREY8), grey(GREY8), GREY8)],
    "PNG, grey, 16 bits": [("png", opencv(GREY16), grey(GREY16), GREY16)],
    "PNG, grey and alpha": [
        ("png", lambda path: Image.merge("LA", [Image.fromarray(GREY8), Image.fromarray(255 - GREY8)]).save(path),
         grey(GREY8), GREY8),
    ],
    "PNG, palette of 1 to 8 bits": [
        ("png", pillow(GREY8, "P"), COLORS[GREY8], GREY8),
        ("png", pillow(GREY8 >> 6, "P", bits=2), COLORS[GREY8 >> 6], GREY8 >> 6),
        ("png", pillow(GREY8 >> 4, "P", bits=4), COLORS[GREY8 >> 4], GREY8 >> 4),
    ],
    "PNG, RGB or RGBA, 8 or 16 bits": [
        ("png", pillow(RGB8), RGB8, COLOUR),
        ("png", pillow(MORE8[..., :4]), RGB8, "4 different channels"),
        ("png", opencv(RGB16), RGB16, COLOUR),
    ],
    "PNG, RGB or RGBA of equal channels": [
        ("png", pillow(grey(GREY8)), grey(GREY8), GREY8),
        ("png", pillow(np.concatenate([grey(GREY8), RGB8[..., :1]], 2)), grey(GREY8), GREY8),
    ],
    "PNG, animated": [("png", animated(), PAGES, PAGES)],
    "JPEG, grey, RGB or CMYK": [
        ("jpg", pillow(SMOOTH[..., 0], quality=100), "lossy", JPEG),
        ("jpg", pillow(SMOOTH, quality=100, subsampling=0), "lossy", JPEG),
        ("jpg", pillow(SMOOTH, "CMYK", quality=100), "lossy", JPEG),
    ],
    "JPEG with further pictures (MPO: gain map, depth, preview)": [
        ("jpg", lambda path: Image.fromarray(SMOOTH).save(
            path, "MPO", save_all=True, append_images=[Image.fromarray(RGB8)], quality=100, subsampling=0,
        ), "lossy", JPEG),
    ],
    "BMP, 1 to 24 bits": [
        ("bmp", pillow(BINARY), grey(BINARY * np.uint8(255)), BINARY),
        ("bmp", pillow(GREY8, "P"), COLORS[GREY8], GREY8),
        ("bmp", pillow(GREY8), grey(GREY8), GREY8),
        ("bmp", pillow(RGB8), RGB8, COLOUR),
    ],
    "GIF": [("gif", pillow(RAMP, "P"), COLORS[RAMP], RAMP), ("gif", pillow(RAMP), grey(RAMP), RAMP)],
    "GIF, animated": [("gif", animated(), PAGES, PAGES)],
    "WebP, lossless": [
        ("webp", pillow(RGB8, lossless=True), RGB8, COLOUR),
        ("webp", pillow(grey(GREY8), lossless=True), grey(GREY8), GREY8),
    ],
    "WebP, lossy": [("webp", pillow(SMOOTH, quality=100), "lossy", JPEG)],
    "WebP, animated": [("webp", animated(lossless=True), PAGES, PAGES)],
    "TIFF, grey, 1 bit": [("tif", tiff(BINARY), grey(BINARY * np.uint8(255)), BINARY)],
    "TIFF, grey, 1 bit, white is zero": [
        ("tif", tiff(BINARY, "miniswhite"), grey(~BINARY * np.uint8(255)), BINARY),
    ],
    "TIFF, grey, 8 or 16 bits": [
        ("tif", tiff(GREY8), grey(GREY8), GREY8),
        ("tif", tiff(GREY16), grey(GREY16), GREY16),
        ("tif", pillow(GREY8), grey(GREY8), GREY8),
    ],
    "TIFF, grey, 8 or 16 bits, white is zero": [
        ("tif", tiff(GREY8, "miniswhite"), grey(255 - GREY8), GREY8),
        ("tif", tiff(GREY16, "miniswhite"), grey(65535 - GREY16), GREY16),
    ],
    "TIFF, grey, 2, 4 or 12 bits": [
        ("tif", tiff(GREY8 >> 6, bitspersample=2), grey((GREY8 >> 6) * np.uint8(85)), GREY8 >> 6),
        ("tif", tiff(GREY8 >> 4, bitspersample=4), grey((GREY8 >> 4) * np.uint8(17)), GREY8 >> 4),
        ("tif", tiff(GREY16 >> 4, bitspersample=12),
         grey(np.rint((GREY16 >> 4) * (65535 / 4095)).astype(np.uint16)), GREY16 >> 4),
    ],
    "TIFF, signed, 32-bit or 64-bit integers": [
        ("tif", tiff(GREY8.astype(np.int16)), "dtype int16", GREY8),
        ("tif", tiff(GREY16.astype(np.int32)), "dtype int32", GREY16),
        ("tif", tiff(GREY16.astype(np.uint32) * 9), "dtype uint32", GREY16.astype(int) * 9),
        ("tif", tiff(GREY16.astype(np.uint32) * 65536), "dtype uint32", "must be in 0..2147483647"),
        ("tif", tiff(GREY8.astype(np.int16) - 9), "dtype int16", "has ids from -9"),
        ("tif", tiff(GREY16.astype(np.int64)), "dtype int64", GREY16),
    ],
    "TIFF, floats": [("tif", tiff(GREY8.astype(np.float32)), "dtype float32", "dtype float32")],
    "TIFF, palette": [
        ("tif", pillow(GREY8, "P"), COLORS[GREY8], GREY8),
        ("tif", tiff(GREY8, "palette", colormap=COLORS.T.astype(np.uint16) * 257), COLORS[GREY8], GREY8),
    ],
    "TIFF, RGB, 8 or 16 bits, interleaved or in separate planes": [
        ("tif", tiff(RGB8, "rgb"), RGB8, COLOUR),
        ("tif", tiff(RGB16, "rgb"), RGB16, COLOUR),
        ("tif", tiff(RGB8.transpose(2, 0, 1), "rgb", planarconfig="separate"), RGB8, COLOUR),
        ("tif", tiff(RGB16.transpose(2, 0, 1), "rgb", planarconfig="separate"), RGB16, COLOUR),
    ],
    "TIFF, RGB and a 4th band: alpha, or any other": [
        ("tif", tiff(MORE8[..., :4], "rgb", extrasamples=["unassalpha"]), RGB8, "4 different channels"),
        ("tif", tiff(MORE8[..., :4], "rgb", extrasamples=["assocalpha"]), RGB8, "4 different channels"),
        ("tif", tiff(MORE8[..., :4], "rgb", extrasamples=["unspecified"]), RGB8, "4 different channels"),
    ],
    "TIFF, grey and alpha": [
        ("tif", tiff(MORE8[..., :2], extrasamples=["unassalpha"], planarconfig="contig"), grey(RGB8[..., 0]),
         "2 different channels"),
    ],
    "TIFF, 3 or 4 bands marked as grey": [
        ("tif", tiff(RGB8, planarconfig="contig"), RGB8, COLOUR),
        ("tif", tiff(RGB16.transpose(2, 0, 1), planarconfig="separate"), RGB16, COLOUR),
        ("tif", tiff(MORE8[..., :4], planarconfig="contig"), RGB8, "4 different channels"),
    ],
    "TIFF, 2 bands, or 5 and more": [
        ("tif", tiff(MORE8[..., :2], planarconfig="contig", extrasamples=["unspecified"]), "2 bands",
         "2 different channels"),
        ("tif", tiff(MORE8, planarconfig="contig"), "5 bands", "5 different channels"),
    ],
    "TIFF, CMYK": [("tif", pillow(SMOOTH, "CMYK"), "lossy", "4 different channels")],
    "TIFF, compressed: LZW, Deflate, PackBits, Zstandard; predictor; tiles; BigTIFF; big-endian": [
        ("tif", tiff(RGB16, "rgb", compression="lzw", predictor=True), RGB16, COLOUR),
        ("tif", tiff(GREY16, compression="zlib", predictor=True), grey(GREY16), GREY16),
        ("tif", tiff(GREY8, compression="packbits"), grey(GREY8), GREY8),
        ("tif", tiff(GREY8, compression="zstd"), grey(GREY8), GREY8),
        ("tif", tiff(RGB8, "rgb", tile=(16, 16)), RGB8, COLOUR),
        ("tif", tiff(GREY16, bigtiff=True), grey(GREY16), GREY16),
        ("tif", tiff(GREY16, byteorder=">"), grey(GREY16), GREY16),
        ("tif", lambda path: tifffile.imwrite(path, shape=(20, 24), dtype=np.uint8, tile=(16, 16)),
         0 * grey(GREY8), 0 * GREY8),  # sparse: no tile of it is in the file
    ],
    "TIFF, compressed: JPEG": [
        ("tif", tiff(SMOOTH, "rgb", compression="jpeg", compressionargs={"level": 100}), "lossy", JPEG),
        ("tif", tiff(SMOOTH[..., 0], compression="jpeg", compressionargs={"level": 100}), "lossy", JPEG),
    ],
    "TIFF with overviews, thumbnails or masks of its page": [
        ("tif", tiff_pages((GREY8, {}), (GREY8[::2, ::2], {"subfiletype": 1})), grey(GREY8), GREY8),
        ("tif", tiff_pages((GREY8[::2, ::2], {"subfiletype": 1}), (GREY8, {})), grey(GREY8), GREY8),
        ("tif", tiff_pages((GREY8, {}), (BINARY, {"subfiletype": 4})), grey(GREY8), GREY8),
        ("tif", sub_ifd, grey(GREY8), GREY8),
    ],
    "TIFF, several pages: stacks, hyperstacks, composites": [
        ("tif", tiff_pages((GREY8, {}), (255 - GREY8, {})), PAGES, PAGES),
        ("tif", lambda path: tifffile.imwrite(path, RGB8[:, :, :2].transpose(2, 0, 1), imagej=True,
                                              metadata={"axes": "CYX", "mode": "composite"}), PAGES, PAGES),
        ("tif", one_page_stack, r"holds \(2, 20, 24\) in one page", r"holds \(2, 20, 24\) in one page"),
    ],
    "orientation tag, in any of them": [
        case
        for orientation, turn in TURNS.items()
        for case in [
            ("tif", tiff(GREY8, extratags=[(274, 3, 1, orientation, True)]), grey(turn(GREY8)), turn(GREY8)),
            ("png", pillow(GREY8, exif=exif(orientation)), grey(turn(GREY8)), turn(GREY8)),
            ("png", pillow(GREY8, "P", exif=exif(orientation)), COLORS[turn(GREY8)], turn(GREY8)),
            ("jpg", pillow(SMOOTH, quality=100, subsampling=0, exif=exif(orientation)), ("lossy", turn(SMOOTH)), JPEG),
            ("webp", pillow(RGB8, lossless=True, exif=exif(orientation)), turn(RGB8), COLOUR),
        ]
    ],
}  # fmt: skip
ROWS = [(row, number) for row, cases in CASES.items() for number in range(len(cases))]


@pytest.mark.parametrize("row, number", ROWS)
def test_each_row_of_the_table_is_read_or_refused_as_it_says(row, number, tmp_path):
    suffix, write, picture, ids = CASES[row][number]
    path = tmp_path / f"file.{suffix}"
    write(path)
    if isinstance(picture, str) and picture != "lossy":
        with pytest.raises(ValueError, match=picture) as error:
            read_image_unscaled(path)
        assert str(path) in str(error.value)
    elif isinstance(picture, np.ndarray):
        image_rgb = read_image_unscaled(path)
        assert image_rgb.dtype == picture.dtype and np.array_equal(image_rgb, picture)
        assert read_image(path).shape == picture.shape
    else:
        expected = picture[1] if isinstance(picture, tuple) else SMOOTH
        expected = grey(expected[..., 0]) if np.ptp(read_image(path), 2).max() == 0 else expected
        assert np.abs(read_image(path).astype(int) - expected).max() < 20
    if isinstance(ids, str):
        with pytest.raises(ValueError, match=ids) as error:
            read_label_map(path)
        assert str(path) in str(error.value)
    else:
        assert read_label_map(path).dtype == np.int32 and np.array_equal(read_label_map(path), ids)


def test_the_table_in_the_readme_has_these_rows():
    text = (Path(__file__).resolve().parent.parent / "data" / "README.md").read_text()
    table = re.findall(r"^\| ((?:PNG|JPEG|BMP|GIF|WebP|TIFF|orientation)[^|]*) \| ([^|]+) \| ([^|]+) \|$", text, re.M)
    assert [row for row, _, _ in table] == list(CASES)
    for row, as_picture, as_map in table:
        for kind, words in ((2, as_picture), (3, as_map)):
            are_refused = [isinstance(case[kind], str) and case[kind] != "lossy" for case in CASES[row]]
            assert ("refused" in words) == any(are_refused), (row, words)
            assert words.startswith("refused") <= all(are_refused), (row, words)


def test_pages_are_read_one_by_one(tmp_path):
    volume = RNG.integers(0, 2**16, (3, 20, 24), np.uint16)
    tifffile.imwrite(tmp_path / "stack.tif", volume, photometric="minisblack")
    animated()(tmp_path / "film.png")
    animated(lossless=True)(tmp_path / "film.webp")
    frames = [Image.fromarray(255 * np.eye(20, dtype=np.uint8)), Image.fromarray(GREY8[:, :20])]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert [count_pages(tmp_path / name) for name in ("stack.tif", "film.png", "film.webp", "film.gif")] == [3, 2, 2, 2]
    for page in range(3):
        assert np.array_equal(read_image_unscaled(tmp_path / "stack.tif", page), grey(volume[page]))
        assert np.array_equal(read_label_map(tmp_path / "stack.tif", page), volume[page])
    for name in ("film.png", "film.webp"):
        assert np.array_equal(read_image(tmp_path / name, 0), RGB8)
        assert np.array_equal(read_image(tmp_path / name, 1), 255 - RGB8)
    assert np.array_equal(read_image(tmp_path / "film.gif", 1)[..., 0], GREY8[:, :20])
    for name, page in (("stack.tif", 3), ("film.gif", 2)):
        with pytest.raises(ValueError, match=rf"{name} has {page} pages; page {page + 1} is not there"):
            read_image(tmp_path / name, page)
    names = [picture.name for picture in list_pictures(tmp_path)]
    assert names == [
        *("film_0001_gif", "film_0002_gif", "film_0001_png", "film_0002_png", "film_0001_webp", "film_0002_webp"),
        *("stack_0001", "stack_0002", "stack_0003"),
    ]


def test_results_of_pictures_never_share_a_name(tmp_path):
    for name in ("a.jpg", "a.png", "a_jpg.png", "A.PNG.bmp", "run.png", "b.png", "a_jpg.jpg"):
        (tmp_path / name).write_bytes(b"x")
    names = [picture.name.lower() for picture in list_pictures(tmp_path)]
    assert len(names) == len(set(names)) == 7 and "b" in names and "run" not in names


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_whole_file_of_another_kind_is_named(kind, tmp_path):
    offset, marks = OTHER_KINDS[kind]
    path = tmp_path / "IMG_0001.jpg"
    path.write_bytes(b"\0" * offset + marks[0] + bytes(300))
    for reader in (read_image, read_label_map, read_channels, count_pages):
        with pytest.raises(ValueError, match=rf"IMG_0001\.jpg is {re.escape(kind)}, which is not read; save it as PNG"):
            reader(path)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "packbits", "jpeg"])
def test_a_tiff_that_is_cut_anywhere_is_refused(compression, tmp_path):
    """LZW's last byte and JPEG's last half can be left out without a word from their decoders."""
    path = tmp_path / "cut.tif"
    tifffile.imwrite(path, GREY8, photometric="minisblack", compression=compression)
    data = path.read_bytes()
    for length in np.linspace(9, len(data) - 1, 40).astype(int):
        path.write_bytes(data[:length])
        for reader in (read_image, read_label_map, read_channels):
            with pytest.raises(ValueError, match=r"cut\.tif"):
                reader(path)


def test_dead_links_are_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "annex" / "key")
    Image.fromarray(GREY8).save(tmp_path / "b.png")
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.png"]
    with pytest.raises(FileNotFoundError, match=r"a\.png is a link to .*key, which is not there; fetch it or remove"):
        read_image(tmp_path / "a.png")


def test_orientation_is_read_of_any_file(tmp_path):
    tiff(GREY8, extratags=[(274, 3, 1, 6, True)])(tmp_path / "a.tif")
    pillow(GREY8, exif=exif(3))(tmp_path / "b.jpg")
    pillow(GREY8)(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(b"x")
    assert [read_orientation(tmp_path / name) for name in ("a.tif", "b.jpg", "c.png", "d.png")] == [6, 3, 1, 1]
    for value in (0, 9, 65535):  # a real picture of Oxford-IIIT Pet has 0: the dataset check ended in a KeyError
        pillow(GREY8, exif=exif(value))(tmp_path / "e.jpg")
        tiff(GREY8, extratags=[(274, 3, 1, value, True)])(tmp_path / "e.tif")
        for name in ("e.jpg", "e.tif"):
            assert read_orientation(tmp_path / name) == 1 and read_image(tmp_path / name).shape[:2] == GREY8.shape


def test_the_size_in_a_tiffs_header_is_that_of_its_picture(tmp_path):
    """Pillow gives the size turned already, or that of a thumbnail, or none: labels of such pictures were refused."""
    tiff(RGB8, photometric="rgb", extratags=[(274, 3, 1, 6, True)])(tmp_path / "turned.tif")
    tiff(np.concatenate([RGB8, RGB8[..., :1]], 2), photometric="minisblack", planarconfig="contig")(tmp_path / "4.tif")
    with tifffile.TiffWriter(tmp_path / "thumbnail_first.tif") as file:
        file.write(RGB8[::4, ::4], photometric="rgb", subfiletype=1)
        file.write(RGB8, photometric="rgb")
    for name in ("turned.tif", "4.tif", "thumbnail_first.tif"):
        assert read_frame_wh(tmp_path / name) == read_image(tmp_path / name).shape[1::-1], name


def test_a_damaged_file_is_one_error_that_names_it(tmp_path):
    """Each kind of file with 1 to 5 of its bytes changed, mostly in its header, is read or is refused by its name."""
    rng, num_refused = np.random.default_rng(3), 0
    readers = (read_image, read_label_map, read_channels, count_pages, lossy_kind, read_orientation, read_frame_wh)
    for suffix, write, _, _ in [case for cases in CASES.values() for case in cases]:
        path = tmp_path / f"file.{suffix}"
        write(path)
        whole = np.fromfile(path, np.uint8)
        for _ in range(4):
            changed, num_changes = whole.copy(), rng.integers(1, 6)
            end = min(len(changed), 400) if rng.random() < 0.6 else len(changed)
            changed[rng.integers(2, end, num_changes)] = rng.integers(0, 256, num_changes)
            changed.tofile(path)
            for reader in readers:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        reader(path)
                except (OSError, ValueError) as error:
                    assert str(path) in str(error), (reader, error)
                    num_refused += 1
    assert num_refused > 100


@pytest.mark.parametrize(
    "write, match",
    [
        (circle_of_pages, "its list of pages is a circle"),
        (resized(256, 40), r"480 bytes for \(20, 40\) numbers of 8 bits"),  # was black but for its start
        (resized(257, 0), "damaged or unusual TIFF"),
        (
            resized(256, 2**30),
            r"page of shape \(20, 1073741824\); 1 to 1073741824 numbers are read",
        ),  # a damaged width filled the memory
    ],
)
def test_a_tiff_whose_tags_contradict_each_other_is_refused(write, match, tmp_path):
    path = tmp_path / "odd.tif"
    write(path)
    for reader in (read_image, read_label_map):
        with pytest.raises(ValueError, match=match) as error:
            reader(path)
        assert str(path) in str(error.value)


def test_the_pixels_of_a_file_are_not_read_to_tell_its_kind_pages_or_size(tmp_path, monkeypatch):
    """Folders are looked through before they are begun: of each file only its header."""
    for name in ("a.tif", "b.png", "c.webp", "d.jpg"):
        pillow(RGB8)(tmp_path / name)
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", None)
    monkeypatch.setattr(cv2, "imdecode", None)
    for name in ("a.tif", "b.png", "c.webp", "d.jpg"):
        path = tmp_path / name
        assert (count_pages(path), read_orientation(path), read_frame_wh(path)) == (1, 1, (24, 20))


def test_a_tiff_that_decodes_to_less_than_its_shape_is_an_error_that_names_it(tmp_path, monkeypatch):
    """As some versions of the decoder give a damaged page: nothing, and no error."""
    tifffile.imwrite(tmp_path / "a.tif", np.ones((4, 5), np.uint8))
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda page: np.zeros((0, 0), np.uint8))
    for reader in (read_image, read_label_map, read_channels):
        with pytest.raises(
            ValueError, match=r"a.tif cannot be decoded .* decodes to 0 numbers, not to its shape of \(4, 5\)"
        ):
            reader(tmp_path / "a.tif")


@pytest.mark.parametrize("name, decoder", [("a.png", (cv2, "imdecode")), ("a.tif", (tifffile.TiffPage, "asarray"))])
def test_a_file_for_which_memory_runs_out_is_not_called_damaged(name, decoder, tmp_path, monkeypatch):
    def fail(*args, **keys):
        raise MemoryError("Unable to allocate 9 GiB")

    pillow(RGB8)(tmp_path / name)
    monkeypatch.setattr(*decoder, fail)
    with pytest.raises(MemoryError, match="9 GiB"):
        read_image(tmp_path / name)
