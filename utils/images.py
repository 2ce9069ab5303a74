"""Read and write pictures and label maps (one integer id per pixel); colour label maps.

Pictures are uint8 (H, W, 3) RGB. A label map is int32 (H, W), 0 is background. A mask is bool (H, W). Pixels are
(x, y), 0-based. Every failure to read or write is an exception that names the file.
"""

import contextlib
import functools
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import Image

# Every failure becomes an exception that names the file, so the libraries' own lines are noise.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
MAX_PX = 2**30  # pixels of one picture: OpenCV's own bound, held by all decoders: a damaged size must not fill memory
Image.MAX_IMAGE_PIXELS = MAX_PX // 2  # Pillow refuses twice as many

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
WRITTEN_SUFFIXES = PICTURE_SUFFIXES[:-1]
READ_KINDS = {  # format: where its mark stands, and what it may be
    "PNG": (0, (b"\x89PNG\r\n\x1a\n",)),
    "JPEG": (0, (b"\xff\xd8",)),
    "TIFF": (0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    "BMP": (0, (b"BM",)),
    "WebP": (8, (b"WEBP",)),
    "GIF": (0, (b"GIF87a", b"GIF89a")),
}
OTHER_KINDS = {
    "HEIC, as phones write": (4, (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypmif1", b"ftypmsf1")),
    "AVIF": (4, (b"ftypavif", b"ftypavis")),
    "a film": (4, (b"ftyp", b"moov", b"mdat")),
    "a film (AVI)": (8, (b"AVI ",)),
    "a film (Matroska or WebM)": (0, (b"\x1a\x45\xdf\xa3",)),
    "JPEG 2000": (4, (b"jP  ",)),
    "JPEG 2000 or XL": (0, (b"\xff\x4f\xff\x51", b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    "DICOM": (128, (b"DICM",)),
    "OpenEXR": (0, (b"\x76\x2f\x31\x01",)),
    "a Photoshop file": (0, (b"8BPS",)),
    "PDF": (0, (b"%PDF-",)),
    "Netpbm": (0, tuple(b"P%d%c" % (digit, space) for digit in range(1, 8) for space in b" \n")),
    "a numpy file": (0, (b"\x93NUMPY",)),
    "a MATLAB file": (0, (b"MATLAB",)),
    "HDF5": (0, (b"\x89HDF\r\n\x1a\n",)),
    "an archive": (0, (b"PK\3\4", b"\x1f\x8b", b"Rar!", b"7z\xbc\xaf")),
    "a web page": (0, (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML")),
    "XML or SVG": (0, (b"<?xml", b"<svg")),
    "a pointer of Git LFS, not the file that it stands for": (0, (b"version https://git-lfs",)),
    "a pointer of git-annex, not the file that it stands for": (0, (b"/annex/objects",)),
}
IGNORE_INDEX = 255  # in class maps: this pixel neither trains nor counts
EXIF_ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # the orientations that swap width and height


# ---------------------------------------------------------------------------------------------------------------------
# which pictures


class Picture(NamedTuple):
    """One picture to work on: a file, or one page of a file that has several."""

    path: Path
    page: int | None  # 0-based; None: the file has one
    name: str  # what its results are called; no two pictures of a list share it

    def __str__(self) -> str:
        return str(self.path) if self.page is None else f"{self.path}, page {self.page + 1}"


def list_images(path: Path) -> list[Path]:
    """List the pictures of a folder, sorted, or the one picture given; a link to nothing is one that is not readable.

    Folders in the folder are not entered; a printed line counts them.

    Raises:
        FileNotFoundError, ValueError: where there is no such path, or no picture in the folder.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"input {path} does not exist; give a picture or a folder of pictures")
    image_paths = sorted(
        file
        for file in path.iterdir()
        if not file.is_dir() and file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".")
    )
    num_folders = sum(folder.is_dir() and not folder.name.startswith(".") for folder in path.iterdir())
    passed_over = f"; its {num_folders} folders are not entered: give one of them as input" if num_folders else ""
    if not image_paths:
        remedy = passed_over or "; give a folder that has some"
        raise ValueError(f"input {path} has no pictures ({', '.join(PICTURE_SUFFIXES)}){remedy}")
    if passed_over:
        print(f"input {path} has {len(image_paths)} pictures{passed_over}")
    return image_paths


def list_pictures(path: Path) -> list[Picture]:
    """List the pictures of a folder, or of one file, each page of a file of several for itself.

    Their results are named after the file's stem, with its suffix and a number where the stem alone would overwrite
    another's; none is "run" (run.json is the run's record). Pages are numbered from 1: cells_0001.

    Raises:
        as `list_images`; a file that cannot be read is one picture, whose reading says so.
    """
    pages, names = [], []
    for image_path in list_images(path):
        try:
            num_pages = count_pages(image_path)
        except (OSError, ValueError):
            num_pages = 1
        for page in [None] if num_pages == 1 else range(num_pages):
            pages.append((image_path, page))
            names.append(image_path.stem + ("" if page is None else f"_{page + 1:04d}"))
    uses, taken, pictures = Counter(name.lower() for name in names) + Counter(["run"]), {"run"}, []
    taken |= {name for name, count in uses.items() if count == 1}
    for (image_path, page), name in zip(pages, names, strict=True):
        if uses[name.lower()] > 1:
            stem, number = f"{name}_{image_path.suffix[1:]}", 2
            name = stem
            while name.lower() in taken:
                name, number = f"{stem}_{number}", number + 1
            taken.add(name.lower())
        pictures.append(Picture(image_path, page, name))
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# read


def read_image(path: str | Path, page: int | None = None) -> np.ndarray:
    """Read a picture as 8-bit RGB.

    The orientation tag is applied, alpha and further bands are dropped (never multiplied in), a palette becomes its
    colours, grey is repeated, white-is-zero is turned to black-is-zero, and values are scaled by their type (65535
    becomes 255), not by what the picture happens to use.

    Args:
        path: PNG, JPEG, TIFF, BMP, WebP or GIF, whatever its name ends in.
        page: of a file of several, 0-based; None for a file that must have one.
    Returns:
        uint8 (H, W, 3), RGB.
    Raises:
        FileNotFoundError, PermissionError, ValueError: with the path, what the file is, and the remedy.
    """
    return scale_to_8_bits(read_image_unscaled(path, page))


def scale_to_8_bits(image: np.ndarray) -> np.ndarray:
    """Scale uint16 values by their type, so that 65535 becomes 255; uint8 ones stay as they are."""
    return np.rint(image * np.float32(255 / 65535)).astype(np.uint8) if image.dtype == np.uint16 else image


def read_image_unscaled(path: str | Path, page: int | None = None) -> np.ndarray:
    """Read a picture as `read_image` does, but leave 16-bit values as they are.

    Returns:
        uint8 or uint16 (H, W, 3), RGB.
    """
    kind = _find_kind(path)
    if kind == "TIFF":
        return _render_tiff(path, page)
    if kind != "JPEG":  # the further pictures of a phone's JPEG are reduced or depths
        page = _check_page(path, count_pages(path), page)
    if kind == "GIF" or page:  # OpenCV decodes the first page
        with _decoding(path, kind), Image.open(path) as picture:
            picture.seek(page)
            return np.array(picture.convert("RGB"))
    if kind == "JPEG" and hasattr(cv2, "IMREAD_COLOR_RGB"):  # from OpenCV 4.11 on: the same pixels, faster
        return _decode(path, kind, cv2.IMREAD_COLOR_RGB)
    decoded = _decode(path, kind, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)  # (H, W, 3) BGR
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def read_label_map(path: str | Path, page: int | None = None) -> np.ndarray:
    """Read a map of ids: PNG, TIFF, BMP, GIF or lossless WebP of one channel, or of equal ones.

    Ids are the numbers in the file, at any bit depth: the index of a palette, not its colour; 1 of a 1-bit file, not
    255; and what a TIFF holds also where it says that white is zero. The orientation tag is applied, as to a picture.

    Args:
        page: as for `read_image`.
    Returns:
        int32 (H, W); 0 is background.
    Raises:
        FileNotFoundError, PermissionError, ValueError: with the path, what is wrong, and the remedy.
    """
    ids = _read_numbers(path, page, "label map ")
    if ids.ndim == 3:
        num_colors = 3 if ids.shape[2] == 4 else ids.shape[2]  # without alpha
        if (ids[..., 1:num_colors] != ids[..., :1]).any():
            raise ValueError(
                f"label map {path} has {ids.shape[2]} different channels, a colour picture; "
                "turn each colour into one id and save a map of one channel (8- or 16-bit PNG, or a palette PNG)"
            )
        ids = ids[..., 0]
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"label map {path} has dtype {ids.dtype}; save its ids as integers (16-bit PNG or TIFF)")
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise ValueError(
            f"label map {path} has ids from {ids.min()} to {ids.max()}; they must be in 0..{np.iinfo(np.int32).max}"
        )
    return ids.astype(np.int32)


def read_channels(path: str | Path) -> np.ndarray:
    """Read a file whose colour channels are numbers, not colours: as they are, not scaled, turned as a picture is.

    Returns:
        int32 (H, W, C), channels in the file's order, RGB(A).
    Raises:
        FileNotFoundError, PermissionError, ValueError: with the path and the reason.
    """
    channels = _read_numbers(path, None, "")
    if channels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path} has dtype {channels.dtype}; must be 8-bit or 16-bit unsigned integers")
    return channels.astype(np.int32).reshape(*channels.shape[:2], -1)


def count_pages(path: str | Path) -> int:
    """Count the pictures of a file; overviews, thumbnails and masks of another page are none.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `read_image`.
    """
    kind = _find_kind(path)
    with _decoding(path, kind):
        if kind == "TIFF":
            return len(_tiff_pages(path, os.stat(path).st_mtime_ns))
        if kind in ("PNG", "WebP", "GIF"):
            with Image.open(path) as picture:
                return getattr(picture, "n_frames", 1)
    return 1


def lossy_kind(path: str | Path) -> str | None:
    """Say what a file is whose compression changes numbers, such as "a JPEG"; None where it keeps them.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `read_image`.
    """
    kind = _find_kind(path)
    if kind == "TIFF":
        with _decoding(path, kind), tifffile.TiffFile(path) as tiff:
            pages = [tiff.pages[number].aspage() for number in _tiff_pages(path, os.stat(path).st_mtime_ns)]
            return "a TIFF of JPEG" if any("JPEG" in repr(page.compression) for page in pages) else None
    if kind == "WebP" and b"VP8 " in _read_head(path)[:64]:
        return "a lossy WebP"
    return "a JPEG" if kind == "JPEG" else None


def read_orientation(path: str | Path) -> int:
    """Read how a file's rows and columns lie: 1 as they are shown, 2 to 8 as in EXIF; 1 where no tag says so."""
    header = _read_header(path)
    return header[1] if header else 1


def read_frame_wh(path: Path) -> tuple[int, int] | None:
    """Read a picture's width and height from its header, as `read_image` turns it; None if it has none."""
    header = _read_header(path)
    if header is None:
        return None
    (width, height), orientation = header
    return (height, width) if orientation in LYING else (width, height)


def _read_header(path: str | Path) -> tuple[tuple[int, int], int] | None:
    """Read ((width, height) as stored, orientation 1 to 8), without the pixels; None where there is no such header."""
    try:
        if _find_kind(path) == "TIFF":  # Pillow's size is of the first page, a thumbnail too, and may be turned already
            with _decoding(path, "header"), tifffile.TiffFile(path) as tiff:
                page = tiff.pages[_tiff_pages(path, os.stat(path).st_mtime_ns)[0]].aspage()
                tag = page.tags.get("Orientation")
                frame_wh, orientation = (page.imagewidth, page.imagelength), tag.value if tag else 1
        else:
            with _decoding(path, "header"), Image.open(path) as picture:
                has_no_tag = picture.format == "PNG" and not _has_exif_chunk(path)
                frame_wh = picture.size
                orientation = 1 if has_no_tag else picture.getexif().get(EXIF_ORIENTATION, 1)
        return frame_wh, orientation if orientation in range(1, 9) else 1  # 0 says nothing, as in OpenCV
    except (OSError, ValueError):
        return None


def _has_exif_chunk(path: str | Path) -> bool:
    """Tell whether a PNG has a chunk of EXIF: asked for it, Pillow decodes the whole picture to look."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            if start[4:] == b"eXIf":
                return True
            file.seek(int.from_bytes(start[:4], "big") + 4, os.SEEK_CUR)  # the chunk and its checksum
    return False


def remark_on_values(image: np.ndarray) -> tuple[str, str] | None:
    """Say what looks wrong with a picture's values, unscaled as its file holds them: (kind, what was seen), or None."""
    lowest, largest, full = int(image.min()), int(image.max()), np.iinfo(image.dtype).max
    if lowest == largest:
        return "one value all over", str(largest)
    if largest < full / 4:
        return "unused intensity range", f"largest value {largest} of {full}"
    return None


def _read_head(path: str | Path) -> bytes:
    """Return a file's first 256 bytes, refusing a missing or empty one."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{path} is a link to {os.readlink(path)}, which is not there; fetch it or remove the link"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    head = np.fromfile(path, np.uint8, 256).tobytes()
    if not head:
        raise ValueError(f"{path} is empty (0 bytes); copy it again or remove it")
    return head


def _find_kind(path: str | Path) -> str:
    """Tell by a file's first bytes which of the formats that are read it is.

    Raises:
        ValueError: for another one, saying which.
    """
    head = _read_head(path)
    kinds = READ_KINDS | OTHER_KINDS
    kind = next((kind for kind, (offset, marks) in kinds.items() if head.startswith(marks, offset)), None)
    if kind is None:
        raise ValueError(f"{path} cannot be decoded as a picture (damaged, or not one); copy it again or remove it")
    if kind not in READ_KINDS:
        raise ValueError(f"{path} is {kind}, which is not read; save it as {', '.join(READ_KINDS)}")
    return kind


def _check_page(path: str | Path, num_pages: int, page: int | None) -> int:
    if page is None and num_pages > 1:
        raise ValueError(f"{path} has {num_pages} pages; save one file for each picture")
    if page is not None and page >= num_pages:
        raise ValueError(f"{path} has {num_pages} pages; page {page + 1} is not there")
    return page or 0


def _read_numbers(path: str | Path, page: int | None, what: str) -> np.ndarray:
    """Read the numbers in a file, any type, turned as a picture is: (H, W), or (H, W, C) in RGB(A) order."""
    kind = _find_kind(path)
    if lossy := lossy_kind(path):
        raise ValueError(f"{what}{path} is {lossy}, whose compression changes ids; save it as PNG or TIFF without")
    if kind == "TIFF":
        return _read_tiff(path, page)[0]
    page = _check_page(path, count_pages(path), page)
    orientation = read_orientation(path)
    with _decoding(path, kind), Image.open(path) as picture:
        if picture.mode in ("P", "1") or kind == "GIF":  # OpenCV would turn them into colours
            picture.seek(page)
            return _turn(np.array(picture).astype(np.uint8), orientation)
    numbers = _decode(path, kind, cv2.IMREAD_UNCHANGED)  # (H, W) or (H, W, C) in OpenCV's channel order
    if numbers.ndim == 3:
        numbers = np.concatenate([numbers[..., 2::-1], numbers[..., 3:]], 2)  # OpenCV's order is BGR
    depth = _read_head(path)[24] if kind == "PNG" else 8
    if depth < 8:  # grey of 2 or 4 bits, which OpenCV spreads over 0..255
        numbers = numbers // (255 // (2**depth - 1))
    return _turn(numbers, orientation)


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Lay rows and columns as the orientation tag of EXIF and TIFF, 1 to 8, says that they are shown."""
    if orientation in LYING:
        pixels = pixels.swapaxes(0, 1)  # now 5 is done, 6, 7 and 8 are mirrored
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _decode(path: str | Path, kind: str, flags: int) -> np.ndarray:
    data = np.fromfile(path, np.uint8)
    if kind == "JPEG" and not _is_whole_jpeg(data.tobytes()):
        raise ValueError(f"{path} is a JPEG that ends in the middle; copy it again or remove it")
    with _decoding(path, kind):
        decoded = cv2.imdecode(data, flags)
    if decoded is None:
        raise ValueError(f"{path} cannot be decoded as a picture (damaged {kind}); copy it again or remove it")
    return decoded


@contextlib.contextmanager
def _decoding(path: str | Path, kind: str):
    """Turn whatever a decoder raises on a damaged file, which can be any exception, into an error that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # a refusal of ours
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the disk's, such as no permission
        if isinstance(error, MemoryError) or getattr(error, "code", None) == cv2.Error.StsNoMem:
            raise  # the file may be whole
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} cannot be decoded as a picture (damaged or unusual {kind}: {reason}); copy it again, save it anew "
            "or remove it"
        ) from error


def _is_whole_jpeg(data: bytes) -> bool:
    """Tell whether a JPEG has its end mark: some OpenCV versions fill what is missing with grey and say nothing."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:  # 0xDA: pixels follow
        if data[position + 1] == 0xFF:  # padding
            position += 1
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")  # a segment, such as a thumbnail
    return data.find(b"\xff\xd9", position) >= 0


# ---------------------------------------------------------------------------------------------------------------------
# read TIFF, whose decoders disagree on what they show: numbers come from tifffile, and are rendered here


@functools.lru_cache(maxsize=8)  # each page of a stack of 1,000 would list them all again
def _tiff_pages(path: str | Path, mtime_ns: int) -> tuple[int, ...]:
    """List the pages that are pictures: no overviews or thumbnails (bit 1 of NewSubfileType), no masks (bit 4)."""
    numbers, offsets = [], set()
    with tifffile.TiffFile(path) as tiff:
        for number, page in enumerate(tiff.pages):
            if page.offset in offsets:
                raise ValueError("its list of pages is a circle")
            offsets.add(page.offset)
            if not page.aspage().subfiletype & 5:
                numbers.append(number)
        if len(offsets) == 1 and tiff.series and tiff.series[0].size > tiff.pages[0].size:  # ImageJ's, above 4 GB
            raise ValueError(f"{path} holds {tiff.series[0].shape} in one page; save one page for each picture")
    return tuple(numbers or [0])


def _check_tiff_data(page: tifffile.TiffPage) -> None:
    """Refuse a page whose strips or tiles are not all in the file: decoders fill in 0 and say nothing.

    One that is all 0 may be left out on purpose (sparse files): it then has place 0 and 0 bytes.

    Raises:
        EOFError: without the path.
    """
    starts, counts = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    is_short = len(starts) != len(counts) or len(starts) < math.prod(page.chunked)
    if is_short or ((starts == 0) != (counts == 0)).any() or (starts + counts).max() > page.parent.filehandle.size:
        raise EOFError("its strips or tiles are not all there")
    if page.compression == 1 and starts.all() and counts.sum() * 8 < math.prod(page.shape) * page.bitspersample:
        raise EOFError(f"{counts.sum()} bytes for {page.shape} numbers of {page.bitspersample} bits")


def _read_tiff(path: str | Path, page: int | None) -> tuple[np.ndarray, tifffile.TiffPage, np.ndarray | None]:
    """Read a page: its numbers, (H, W) or (H, W, C) in the file's order, turned as its tag says; tags; palette."""
    with _decoding(path, "TIFF"), tifffile.TiffFile(path) as tiff:
        page_numbers = _tiff_pages(path, os.stat(path).st_mtime_ns)
        tiff_page = tiff.pages[page_numbers[_check_page(path, len(page_numbers), page)]].aspage()
        if not 0 < math.prod(tiff_page.shape) <= MAX_PX:
            raise ValueError(f"{path} has a page of shape {tiff_page.shape}; 1 to {MAX_PX} numbers are read")
        _check_tiff_data(tiff_page)
        numbers = tiff_page.asarray()
        if numbers.size != math.prod(tiff_page.shape):
            raise ValueError(f"its page decodes to {numbers.size} numbers, not to its shape of {tiff_page.shape}")
        if numbers.ndim == 3 and tiff_page.planarconfig == 2:
            numbers = numbers.transpose(1, 2, 0)  # separate planes
        if numbers.ndim not in (2, 3):
            raise ValueError(f"{path} has a page of shape {numbers.shape}; save pictures of (height, width, bands)")
        orientation = tiff_page.tags.get("Orientation")
        numbers = numbers.astype(np.uint8) if numbers.dtype == bool else numbers
        return _turn(numbers, orientation.value if orientation else 1), tiff_page, tiff_page.colormap


def _render_tiff(path: str | Path, page: int | None) -> np.ndarray:
    """Turn one page's numbers into colours, uint8 or uint16 (H, W, 3) RGB."""
    numbers, tiff_page, colormap = _read_tiff(path, page)
    if numbers.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"image {path} has dtype {numbers.dtype}; save it as 8-bit or 16-bit unsigned integers")
    photometric, bits = getattr(tiff_page.photometric, "name", "unknown"), tiff_page.bitspersample
    if photometric == "PALETTE":
        with _decoding(path, "TIFF"):
            return (colormap.T[numbers] >> 8).astype(np.uint8)  # (H, W, 3); (3, 2**bits) has 16 bits
    if photometric not in ("MINISWHITE", "MINISBLACK", "RGB", "YCBCR"):
        with _decoding(path, "TIFF"), Image.open(path) as picture:  # CMYK, L*a*b*
            picture.seek(tiff_page.index)
            return np.array(picture.convert("RGB"))
    bands = numbers.reshape(*numbers.shape[:2], -1)
    if bands.shape[2] not in (1, 3, 4) and not (bands.shape[2] == 2 and tiff_page.extrasamples in ((1,), (2,))):
        raise ValueError(f"image {path} has {bands.shape[2]} bands; save one (grey), or three of them as R, G, B")
    bands = bands[..., :3] if bands.shape[2] > 2 else bands[..., :1].repeat(3, 2)  # without alpha or further bands
    full = np.iinfo(bands.dtype).max
    if bits not in (8, 16):  # such as 1, 4 or 12: spread over the type
        bands = np.rint(bands * (full / (2**bits - 1))).astype(bands.dtype)
    return full - bands if photometric == "MINISWHITE" else np.ascontiguousarray(bands)


# ---------------------------------------------------------------------------------------------------------------------
# write


def write_image(path: str | Path, image_rgb: np.ndarray) -> Path:
    """Write a picture, in the format its suffix names, so that the file is whole or absent.

    Args:
        path: file name ending in .png, .jpg, .jpeg, .bmp, .tif, .tiff or .webp.
        image_rgb: uint8 (H, W, 3) RGB, (H, W, 4) RGB and alpha (PNG, TIFF, WebP), or (H, W) grey.
    Returns:
        The path.
    Raises:
        ValueError: for another suffix.
    """
    path = Path(path)
    assert image_rgb.dtype == np.uint8, image_rgb.dtype
    if path.suffix.lower() not in WRITTEN_SUFFIXES:
        raise ValueError(f"cannot write {path}: suffix {path.suffix!r} is not one of {', '.join(WRITTEN_SUFFIXES)}")
    pixels = image_rgb
    if image_rgb.ndim == 3:  # OpenCV's order is BGR
        pixels = cv2.cvtColor(image_rgb, cv2.COLOR_RGBA2BGRA if image_rgb.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    is_encoded, data = cv2.imencode(path.suffix.lower(), pixels)
    assert is_encoded, path
    return _write_bytes(path, data.tobytes())


def write_label_map(path: str | Path, ids: np.ndarray) -> Path:
    """Write a map of ids so that no id changes: 16-bit PNG up to id 65535, else a 32-bit TIFF.

    Args:
        path: file name ending in .png; its suffix becomes .tif where the ids need 32 bits.
        ids: non-negative integers (H, W).
    Returns:
        The path written.
    Raises:
        ValueError: for another suffix, or ids below 0 or above 2**31 - 1.
    """
    path, largest = Path(path), int(ids.max(initial=0))
    if path.suffix.lower() != ".png":
        raise ValueError(f"cannot write label map {path}: its name must end in .png")
    if ids.min(initial=0) < 0 or largest > np.iinfo(np.int32).max:
        raise ValueError(f"cannot write label map {path}: ids must be in 0..{np.iinfo(np.int32).max}")
    if largest <= np.iinfo(np.uint16).max:
        is_encoded, data = cv2.imencode(".png", np.ascontiguousarray(ids, np.uint16))
        assert is_encoded, path
        return _write_bytes(path, data.tobytes())
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ids, np.int32)).save(buffer, "TIFF", compression="tiff_adobe_deflate")
    return _write_bytes(path.with_suffix(".tif"), buffer.getvalue())


def _write_bytes(path: Path, data: bytes) -> Path:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# colours


def id_colors(ids: np.ndarray) -> np.ndarray:
    """Give each id its colour: bright, far from its neighbours', the same in every picture and every run.

    Args:
        ids: non-negative integers (N,).
    Returns:
        uint8 (N, 3) RGB; id 0 is black.
    """
    ids = np.asarray(ids, np.int64)
    hue = ids * 0.6180339887498949 % 1.0 * 6  # golden ratio: consecutive ids land far apart on the colour circle
    saturation = np.array([1.0, 0.65, 0.85])[ids % 3]
    value = np.array([1.0, 0.75])[ids // 3 % 2]
    sector = (np.array([[5.0], [3.0], [1.0]]) + hue) % 6  # (3, N), one row for each of R, G, B
    colors = value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return np.where(ids[:, None] == 0, 0, np.rint(colors.T * 255)).astype(np.uint8)


def overlay_label_map(image_rgb: np.ndarray, ids: np.ndarray, color_ids: np.ndarray | None = None) -> np.ndarray:
    """Draw the objects of a label map over its picture: half picture, half colour, with a contour one pixel thin.

    Args:
        image_rgb: uint8 (H, W, 3) RGB.
        ids: non-negative integers (H, W); 0 is left as it is.
        color_ids: the number whose colour each id has, by id, such as that of its class; None: each has its own.
    Returns:
        uint8 (H, W, 3) RGB, a new array.
    """
    assert image_rgb.shape[:2] == ids.shape, (image_rgb.shape, ids.shape)
    overlay = image_rgb.copy()
    rows, columns = np.flatnonzero(ids.any(1)), np.flatnonzero(ids.any(0))
    if not len(rows):
        return overlay
    part = np.s_[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2]  # and their neighbours
    ids, pixels = ids[part], overlay[part]
    if color_ids is not None:
        colors = id_colors(color_ids)[ids]
    elif ids.max() <= ids.size:
        colors = id_colors(np.arange(ids.max() + 1))[ids]  # (h, w, 3)
    else:  # few, large ids
        present, index = np.unique(ids, return_inverse=True)
        colors = id_colors(present)[index.reshape(ids.shape)]
    is_contour = np.zeros(ids.shape, bool)
    is_contour[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    is_contour[:, 1:] |= ids[:, :-1] != ids[:, 1:]
    is_contour[:-1] |= ids[:-1] != ids[1:]
    is_contour[1:] |= ids[:-1] != ids[1:]
    half = (pixels | colors) - ((pixels ^ colors) >> 1)  # (pixels + colors + 1) // 2, within 8 bits
    half = cv2.copyTo(colors, is_contour.view(np.uint8), half)
    overlay[part] = cv2.copyTo(half, (ids > 0).view(np.uint8), pixels.copy())
    return overlay


def draw_legend(names: Sequence[str], color_ids: Sequence[int], width: int) -> np.ndarray:
    """Draw which colour is whose, up to six in a row: uint8 (h, width, 3) RGB; what has the colour of 0 is hollow."""
    shown, font = [name[:24] for name in names], (cv2.FONT_HERSHEY_SIMPLEX, 0.4)
    widest = max(cv2.getTextSize(name, *font, 1)[0][0] for name in shown)
    columns = max(1, min(6, width // (widest + 22)))
    legend = np.full((16 * math.ceil(len(shown) / columns) + 4, width, 3), 255, np.uint8)
    for index, (name, color) in enumerate(zip(shown, id_colors(color_ids).tolist(), strict=True)):
        x, y = index % columns * width // columns, 16 * (index // columns)
        cv2.rectangle(legend, (x + 4, y + 4), (x + 14, y + 14), color, -1 if any(color) else 1)
        cv2.putText(legend, name, (x + 18, y + 14), *font, (0, 0, 0), 1, cv2.LINE_AA)
    return legend


# ---------------------------------------------------------------------------------------------------------------------
# masks


def mask_to_box(mask: np.ndarray) -> np.ndarray:
    """Return the tight box of a mask.

    Args:
        mask: bool (H, W).
    Returns:
        boxes_xyxy float32 (4,): x1, y1, x2, y2 of its outermost pixels, inclusive; zeros for an empty mask.
    """
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(xs):
        return np.zeros(4, np.float32)
    return np.array([xs[0], ys[0], xs[-1], ys[-1]], np.float32)
