"""Masks as COCO writes them: run lengths, compressed or not, and polygons."""

import numpy as np

POLYGON_SCALE = 5  # COCO draws polygons on a grid this much finer than the pixels
FAR_PX = 500  # beyond the picture, an outline is followed so far
FARTHEST_PX = 1e12  # a polygon's corner that lies farther is moved here, where numbers are still exact to a pixel
NUM_COUNT_DIGITS = 7  # 5 bits each: more than any run length or difference of two has


def mask_to_rle(mask: np.ndarray) -> dict:
    """Encode a mask as COCO's compressed run lengths.

    Args:
        mask: bool (H, W).
    Returns:
        {"size": [H, W], "counts": str}, plain types: goes straight into json, and pycocotools decodes it.
    Source: COCO's maskApi (column-major runs, first of zeros; differences to the run two before, 5 bits a character).
    """
    height, width = mask.shape
    flat = np.asarray(mask, bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0] if flat[:1].any() else [], changes]).astype(np.int64)  # runs of alternating value
    counts = np.diff(np.concatenate([[0], starts, [flat.size]]))
    values = counts.copy()
    values[3:] -= counts[1:-2]
    data = np.zeros((NUM_COUNT_DIGITS, len(values)), np.uint8)  # characters, lowest digit first; 0: not written
    left = np.arange(len(values))  # whose digits are not all written
    for row in data:
        digits, values = values & 0x1F, values >> 5
        has_more = np.where(digits & 0x10, values != -1, values != 0)  # the last digit's top bit is the sign
        row[left] = digits + np.where(has_more, 0x20 + 48, 48)
        left, values = left[has_more], values[has_more]
        if not left.size:
            break
    counts_text = data.T[data.T > 0].tobytes().decode("ascii")
    return {"size": [height, width], "counts": counts_text}


def rle_to_mask(rle: dict) -> np.ndarray:
    """Decode COCO run lengths.

    Args:
        rle: {"size": [H, W], "counts": compressed str or bytes, or an uncompressed list of run lengths}.
    Returns:
        bool (H, W).
    Raises:
        ValueError: if the run lengths do not fill the mask.
    """
    return _counts_to_mask(_read_counts(rle), *rle["size"])


def rle_to_part(rle: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode the part of a mask that lies in its tight box, in time that follows the part's columns.

    Args:
        rle: as for `rle_to_mask`.
    Returns:
        bool (h, w), (0, 0) for an empty mask; the box's corner (x, y) px.
    """
    height, _ = rle["size"]
    counts = _read_counts(rle)
    counts = counts[: len(counts) // 2 * 2]  # without a last run of zeros
    if not counts[1::2].any():
        return np.zeros((0, 0), bool), (0, 0)
    first, last = int(counts[0]) // height, (int(counts.sum()) - 1) // height  # columns
    counts = np.append(counts, (last + 1) * height - counts.sum())
    counts[0] -= first * height
    part = _counts_to_mask(counts, height, last + 1 - first)
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    part = np.ascontiguousarray(part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return part, (first + int(columns[0]), int(rows[0]))


def _read_counts(rle: dict) -> np.ndarray:
    """Return the run lengths, int64 (R,), having seen that they fill the mask."""
    height, width = rle["size"]
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        counts = decode_rle_counts(counts)
    try:
        counts = np.asarray(counts, np.int64)
    except OverflowError as error:
        raise ValueError(f"a run length is no number of pixels ({error})") from error
    if counts.sum() != height * width or (counts < 0).any() or (counts > height * width).any():
        raise ValueError(
            f"run lengths add up to {counts.sum()} pixels, but the mask is {height} x {width} = {height * width}"
        )
    return counts


def decode_rle_counts(text: str | bytes) -> np.ndarray:
    """Turn a compressed string into run lengths, int64 (R,)."""
    data = text.encode("ascii", "replace") if isinstance(text, str) else text
    characters = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if not characters.size:
        return characters
    is_last = (characters & 0x20) == 0
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    is_valid = (characters >= 0).all() and (characters < 64).all() and is_last[-1] and lengths.max() <= NUM_COUNT_DIGITS
    if not is_valid:
        raise ValueError(f"run-length string {str(text)[:40]!r} is not in COCO's compressed form")
    place = np.arange(len(characters)) - np.repeat(starts, lengths)
    values = np.add.reduceat((characters & 0x1F) << (5 * place), starts)
    values -= np.where(characters[ends] & 0x10, 1 << (5 * lengths), 0)  # sign bit of the last digit
    counts = values.copy()
    counts[1::2] = values[1::2].cumsum()  # from the fourth on, a difference to the run two before
    counts[2::2] = values[2::2].cumsum()
    return counts


def _counts_to_mask(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def polygons_to_mask(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """Draw an object given as polygons, pixel for pixel as pycocotools does.

    Args:
        polygons: each [x1, y1, x2, y2, ...] pixels, 3 points or more; the object is their union.
        height, width: of the picture, pixels.
    Returns:
        bool (H, W).
    Raises:
        ValueError: for a polygon of fewer than 3 points or an odd number of values.
    Source: COCO's maskApi, rleFrPoly: the outline is walked on a grid 5 times finer; where it steps sideways, all
        pixels below in that column, and all columns after it, are switched. Of an outline that leaves the picture by
        more than its sides and FAR_PX, the part that far away is cut off first: the walk there would take memory for
        each of its steps.
    """
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        points = np.asarray(polygon, np.float64)
        if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
            raise ValueError(f"a polygon is {str(polygon)[:60]}; it must be numbers x1, y1, x2, y2, x3, y3, ...")
        points, reach = points.reshape(-1, 2).clip(-FARTHEST_PX, FARTHEST_PX), height + width + FAR_PX
        for axis, side in ((0, width), (1, height)):
            points = _cut_off(points, axis, -reach)
            points[:, axis] *= -1
            points = _cut_off(points, axis, -(side + reach))
            points[:, axis] *= -1
        mask |= _polygon_to_mask(points, height, width) if len(points) else False
    return mask


def _cut_off(points: np.ndarray, axis: int, limit: float) -> np.ndarray:
    """Cut off the part of an outline, (K, 2), that lies below a limit in x (axis 0) or y (axis 1)."""
    is_inside = points[:, axis] >= limit
    if is_inside.all():
        return points.copy()
    corners = []
    for start, end, *inside in zip(np.roll(points, 1, 0), points, np.roll(is_inside, 1), is_inside, strict=True):
        if inside[0] != inside[1]:  # the edge crosses the limit
            share = (limit - start[axis]) / (end[axis] - start[axis])
            corners.append(start + share * (end - start))
        if inside[1]:
            corners.append(end)
    return np.array(corners, np.float64).reshape(-1, 2)


def _polygon_to_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    corners = np.trunc(POLYGON_SCALE * points + 0.5).astype(np.int64)  # (K, 2) on the fine grid
    first, last = corners, np.roll(corners, -1, 0)  # edges, in the order of the outline
    span = np.abs(last - first)  # (K, 2)
    is_flat = span[:, 0] >= span[:, 1]  # walks along x, else along y
    is_flipped = np.where(is_flat, first[:, 0] > last[:, 0], first[:, 1] > last[:, 1])
    low, high = np.where(is_flipped[:, None], last, first), np.where(is_flipped[:, None], first, last)
    num_steps = span.max(1)
    slope = np.where(is_flat, high[:, 1] - low[:, 1], high[:, 0] - low[:, 0]) / np.maximum(num_steps, 1)

    edge = np.repeat(np.arange(len(corners)), num_steps + 1)  # the edge of each walked point, (L,)
    along = np.arange(len(edge)) - np.repeat(np.cumsum(num_steps + 1) - (num_steps + 1), num_steps + 1)
    along = np.where(is_flipped[edge], num_steps[edge] - along, along)
    low_x, low_y, slope, is_flat = low[edge, 0], low[edge, 1], slope[edge], is_flat[edge]
    xs = np.where(is_flat, low_x + along, np.trunc(low_x + slope * along + 0.5)).astype(np.int64)
    ys = np.where(is_flat, np.trunc(low_y + slope * along + 0.5), low_y + along).astype(np.int64)

    is_step = xs[1:] != xs[:-1]  # the outline steps sideways
    column = (np.minimum(xs[1:], xs[:-1])[is_step] + 0.5) / POLYGON_SCALE - 0.5
    row = (np.minimum(ys[1:], ys[:-1])[is_step] + 0.5) / POLYGON_SCALE - 0.5
    is_kept = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)  # at a pixel's centre, inside
    row = np.ceil(row[is_kept].clip(0, height)).astype(np.int64)
    switches = column[is_kept].astype(np.int64) * height + row  # flat, column-major
    switches, num_times = np.unique(switches, return_counts=True)
    switches = switches[num_times % 2 == 1]
    return _counts_to_mask(np.diff(np.concatenate([[0], switches, [height * width]])), height, width)
