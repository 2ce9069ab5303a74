"""Read and write pictures and label maps (one integer id per pixel); colour label maps.

Pictures are uint8 (H, W, 3) RGB. A label map is int32 (H, W), 0 is background. A mask is bool (H, W). Pixels are
(x, y), 0-based. Every failure to read or write is an exception that names the file.
"""

import io
import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

# Every failure becomes an exception that names the file, so OpenCV's own lines are noise (its name moved in version 5).
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
IGNORE_INDEX = 255  # in class maps: this pixel neither trains nor counts
EXIF_ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # the orientations that swap width and height


# ---------------------------------------------------------------------------------------------------------------------
# which pictures


def list_images(path: Path) -> list[Path]:
    """List the pictures of a folder, sorted, or the one picture given.

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
        if file.is_file() and file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith(".")
    )
    if not image_paths:
        raise ValueError(f"input {path} has no pictures ({', '.join(PICTURE_SUFFIXES)}); give a folder that has some")
    return image_paths


def output_names(image_paths: list[Path]) -> list[str]:
    """Name each picture's results: its stem, with its suffix where the stem alone would overwrite another file.

    Returns:
        one name for each path, all different, none of them "run" (run.json is the run's record).
    """
    uses = Counter(path.stem.lower() for path in image_paths) + Counter(["run"])  # run.json
    return [path.stem if uses[path.stem.lower()] == 1 else f"{path.stem}_{path.suffix[1:]}" for path in image_paths]


# ---------------------------------------------------------------------------------------------------------------------
# read


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture as 8-bit RGB.

    EXIF rotation is applied, alpha is dropped, a palette becomes its colours, grey is repeated, and 16-bit values are
    scaled by their type (65535 becomes 255), not by what the picture happens to use.

    Args:
        path: a file that OpenCV decodes (PNG, JPEG, TIFF, BMP, WebP).
    Returns:
        uint8 (H, W, 3), RGB.
    Raises:
        FileNotFoundError, ValueError: with the path and the reason.
    """
    image_rgb = read_image_unscaled(path)
    if image_rgb.dtype == np.uint16:
        image_rgb = np.rint(image_rgb * np.float32(255 / 65535)).astype(np.uint8)
    return image_rgb


def read_image_unscaled(path: str | Path) -> np.ndarray:
    """Read a picture as `read_image` does, but leave 16-bit values as they are.

    Returns:
        uint8 or uint16 (H, W, 3), RGB.
    """
    data = _read_bytes(path)
    if _is_jpeg(data) and hasattr(cv2, "IMREAD_COLOR_RGB"):  # from OpenCV 4.11 on: the same pixels, faster
        rgb = _decode(path, data, cv2.IMREAD_COLOR_RGB)
        if rgb is not None:
            return rgb
    decoded = _decode(path, data, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)  # (H, W, 3) BGR
    if decoded is None:
        decoded = _decode_unchanged(path, data)  # readable, but not as a picture (floats): the next lines say so
    if decoded.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"image {path} has dtype {decoded.dtype}; save it as 8-bit or 16-bit unsigned integers")
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def read_label_map(path: str | Path) -> np.ndarray:
    """Read a map of ids: PNG or TIFF of one channel (8, 16 or 32 bit), or a palette file (the index, not the colour).

    Returns:
        int32 (H, W), the file's values; 0 is background.
    Raises:
        FileNotFoundError, ValueError: with the path, what is wrong, and the remedy.
    """
    data = _read_bytes(path)
    if _is_jpeg(data):
        raise ValueError(f"label map {path} is a JPEG, whose compression changes ids; save it as PNG or TIFF")
    ids = _read_with_pillow(path, data)
    if ids is None:
        ids = _decode_unchanged(path, data)
    if ids.ndim == 3:
        if (ids[..., 1:3] != ids[..., :1]).any():
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
    """Read a file whose colour channels are numbers, not colours: as they are, not scaled or rotated.

    Returns:
        int32 (H, W, C), channels in RGB(A) order; C is 1, 3 or 4.
    Raises:
        FileNotFoundError, ValueError: with the path and the reason.
    """
    channels = _decode_unchanged(path, _read_bytes(path))
    if channels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path} has dtype {channels.dtype}; must be 8-bit or 16-bit unsigned integers")
    if channels.ndim == 2:
        channels = channels[..., None]
    channels = channels.astype(np.int32)
    if channels.shape[2] >= 3:
        channels[..., :3] = channels[..., 2::-1]  # OpenCV's order is BGR
    return channels


def remark_on_values(image: np.ndarray) -> tuple[str, str] | None:
    """Say what looks wrong with a picture's values, unscaled as its file holds them: (kind, what was seen), or None."""
    lowest, largest, full = int(image.min()), int(image.max()), np.iinfo(image.dtype).max
    if lowest == largest:
        return "one value all over", str(largest)
    if largest < full / 4:
        return "unused intensity range", f"largest value {largest} of {full}"
    return None


def read_frame_wh(path: Path) -> tuple[int, int] | None:
    """Read a picture's width and height from its header, as `read_image` turns it; None if it has none."""
    try:
        with Image.open(path) as picture:
            is_lying = picture.getexif().get(EXIF_ORIENTATION) in LYING
            return picture.size[::-1] if is_lying else picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _read_bytes(path: str | Path) -> np.ndarray:
    """Return a file's bytes, uint8 (N,), refusing a missing, empty or cut-off one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    data = np.fromfile(path, np.uint8)
    if not data.size:
        raise ValueError(f"{path} is empty (0 bytes); copy it again or remove it")
    if _is_jpeg(data) and not _is_whole_jpeg(data.tobytes()):
        raise ValueError(f"{path} is a JPEG that ends in the middle; copy it again or remove it")
    return data


def _decode(path: str | Path, data: np.ndarray, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(data, flags)
    except cv2.error as error:  # such as a picture of more than 2**30 pixels
        raise ValueError(f"{path} cannot be decoded as a picture: {' '.join(str(error).split())}") from error


def _decode_unchanged(path: str | Path, data: np.ndarray) -> np.ndarray:
    """Decode without any conversion: (H, W) or (H, W, C) in OpenCV's channel order, any dtype."""
    decoded = _decode(path, data, cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise ValueError(f"{path} cannot be decoded as a picture (damaged, or not one); copy it again or remove it")
    return decoded


def _read_with_pillow(path: str | Path, data: np.ndarray) -> np.ndarray | None:
    """Read what OpenCV would turn into colours (a palette's index) or cannot read in all its versions (32 bit)."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise ValueError(f"label map {path} has {picture.n_frames} pages; save one file for each image")
            return np.array(picture) if picture.mode in ("P", "I") else None
    except (OSError, SyntaxError, Image.DecompressionBombError):  # OpenCV reads it or says so
        return None


def _is_jpeg(data: np.ndarray) -> bool:
    return data[:2].tobytes() == b"\xff\xd8"


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
# write


def write_image(path: str | Path, image_rgb: np.ndarray) -> Path:
    """Write a picture, in the format its suffix names, so that the file is whole or absent.

    Args:
        path: file name ending in .png, .jpg, .jpeg, .bmp, .tif, .tiff or .webp.
        image_rgb: uint8 (H, W, 3) RGB, or (H, W) grey.
    Returns:
        The path.
    Raises:
        ValueError: for another suffix.
    """
    path = Path(path)
    assert image_rgb.dtype == np.uint8, image_rgb.dtype
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"cannot write {path}: suffix {path.suffix!r} is not one of {', '.join(PICTURE_SUFFIXES)}")
    channels_last = image_rgb if image_rgb.ndim == 2 else cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
    is_encoded, data = cv2.imencode(path.suffix.lower(), channels_last)
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


def overlay_label_map(image_rgb: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Draw the objects of a label map over its picture: half picture, half colour, with a contour one pixel thin.

    Args:
        image_rgb: uint8 (H, W, 3) RGB.
        ids: non-negative integers (H, W); 0 is left as it is.
    Returns:
        uint8 (H, W, 3) RGB, a new array.
    """
    assert image_rgb.shape[:2] == ids.shape, (image_rgb.shape, ids.shape)
    if ids.max(initial=0) <= ids.size:
        colors = id_colors(np.arange(ids.max(initial=0) + 1))[ids]  # (H, W, 3)
    else:  # few, large ids
        present, index = np.unique(ids, return_inverse=True)
        colors = id_colors(present)[index.reshape(ids.shape)]
    is_contour = np.zeros(ids.shape, bool)
    is_contour[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    is_contour[:, 1:] |= ids[:, :-1] != ids[:, 1:]
    is_contour[:-1] |= ids[:-1] != ids[1:]
    is_contour[1:] |= ids[:-1] != ids[1:]
    half = ((image_rgb.astype(np.uint16) + colors + 1) // 2).astype(np.uint8)
    overlay = np.where(is_contour[..., None], colors, half)
    return np.where(ids[..., None] > 0, overlay, image_rgb)


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
