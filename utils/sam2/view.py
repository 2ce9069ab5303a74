"""A picture and its masks as the page of mode=annotate gets them: small enough for a screen, quickly encoded."""

import base64

import cv2
import numpy as np

VIEW_SIDE = 1024  # px, longest side of what is shown at first
LOSSLESS_PX = 2**18  # pictures of no more pixels are sent as PNG


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


def encode_png(pixels: np.ndarray) -> str:
    """Encode pixels, uint8 (h, w) or RGB (h, w, 3), as a PNG in base64; quickly."""
    pixels = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    is_encoded, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert is_encoded
    return base64.b64encode(data).decode("ascii")


def encode_ids(label_map: np.ndarray) -> str:
    """Encode a map of ids, (h, w), as a PNG in base64 whose red and green are the id's lower and higher byte."""
    low, high = (label_map & 255).astype(np.uint8), (label_map >> 8).astype(np.uint8)
    return encode_png(np.stack([low, high, np.zeros_like(low)], 2))


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
