"""Edges of pictures: from the masks of a grid of points, from Sobel and Canny, and the scores of BSDS500.

The experiment of "Segment Anything" that asks a model that never learned edges for those of BSDS500. What the paper
leaves open is said where it is chosen. A strength is float32 (H, W) in 0..1, thinned; the benchmark cuts it at 99
thresholds, matches what is left one to one with each annotator's boundaries, and counts.

Sources: Kirillov et al., "Segment Anything", arXiv 2304.02643, section 7.2 and appendix D.2; Martin, Fowlkes, Malik
2004 and Arbelaez et al. 2011 (BSDS500 and its benchmark).
"""

import io
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torchvision.ops import nms

from utils.sam2.mask_generation import decode_points, make_point_grid, measure_full_size
from utils.sam2.model import Embeddings, upscale_masks

THRESHOLDS = np.arange(1, 100) / 100  # the benchmark's 99 cuts of a strength
MAX_DISTANCE = 0.0075  # of a match, share of the picture's diagonal: 4.3 px in a picture of BSDS500
FIRST_REACHES_PX = (1, 2, 3)  # pixels so near are matched before those further apart
POINTS_AT_ONCE = 64  # decoded together, at most
MASKS_AT_ONCE = 8  # at full size: 5 MB of a picture of BSDS500
RIDGE_SIGMA_PX = 2.0  # blur before the second derivatives that give a ridge's direction
CANNY_SIGMA_PX = 1.4  # blur before Canny, the sqrt(2) that is usual
CANNY_LEVELS = 50  # high thresholds tried
CANNY_HIGHEST = 500.0  # the last of them: a black and white step blurred so has a Sobel gradient of about 560
CANNY_LOW = 0.4  # low threshold, share of the high one


# ---------------------------------------------------------------------------------------------------------------------
# BSDS500 -> pictures and boundaries


def list_bsds(root: Path, split: str) -> list[tuple[str, Path, Path]]:
    """List a part of BSDS500: images/<split>/*.jpg with groundTruth/<split>/*.mat, below <root>/data or <root>.

    Args:
        split: train, val or test.
    Returns:
        (name, picture, .mat) of each picture, sorted by name.
    Raises:
        FileNotFoundError: for a folder that is not there or has no pictures, and for a picture or a .mat without its
            other half.
    """
    base = root if (root / "images").is_dir() else root / "data"
    files = []
    for folder, suffix in ((base / "images" / split, ".jpg"), (base / "groundTruth" / split, ".mat")):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no folder {folder}; give the folder of BSDS500, with data/images and a split's name"
            )
        files.append({path.stem: path for path in folder.iterdir() if path.suffix == suffix})
    pictures, truths = files
    if not pictures and not truths:
        raise FileNotFoundError(f"no .jpg in {base / 'images' / split}; unpack BSDS500 there")
    for name in sorted(pictures.keys() ^ truths.keys()):
        if name in pictures:
            missing = base / "groundTruth" / split / f"{name}.mat"
            raise FileNotFoundError(f"picture {pictures[name]} has no {missing}; complete or remove the pair")
        missing = base / "images" / split / f"{name}.jpg"
        raise FileNotFoundError(f"boundaries {truths[name]} have no {missing}; complete or remove the pair")
    return [(name, pictures[name], truths[name]) for name in sorted(pictures)]


def read_boundaries(path: str | Path) -> list[np.ndarray]:
    """Read the boundaries that each annotator of a picture of BSDS500 drew.

    Args:
        path: a .mat of its groundTruth.
    Returns:
        bool (H, W) of each annotator, all of one size.
    Raises:
        OSError: where the file cannot be read.
        ValueError: for a file that is no such .mat.
    """
    from scipy.io import loadmat  # slow to import

    data = Path(path).read_bytes()
    try:
        annotators = loadmat(io.BytesIO(data))["groundTruth"][0]
        boundaries = [annotator["Boundaries"][0, 0] != 0 for annotator in annotators]
    except Exception as error:  # of a damaged file scipy raises almost anything
        raise ValueError(f"{path} is no .mat of BSDS500 ({type(error).__name__}: {error}); get it anew") from error
    shapes = {layer.shape for layer in boundaries}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"{path} has boundaries of shapes {sorted(shapes)}; must be one (H, W) of all; get it anew")
    return boundaries


# ---------------------------------------------------------------------------------------------------------------------
# picture or masks -> strength


@torch.inference_mode()
def find_mask_edges(
    model: torch.nn.Module,
    embeddings: Embeddings,
    orig_hw: tuple[int, int],
    points_per_side: int = 16,
    box_nms_thresh: float = 0.7,
) -> np.ndarray:
    """Find the edges of a picture from the masks of a grid of points, without any training on edges.

    All three masks of each point count, none is dropped for its predicted IoU or stability. Of masks whose boxes
    overlap more than box_nms_thresh the one of the highest predicted IoU stays. The magnitude of the Sobel filter of
    each mask's probability (the sigmoid of its logits at full size) is kept where it meets the mask's boundary; the
    largest over all masks is divided by its own largest value, and thinned.

    The paper is silent on what an outer boundary pixel is. Here it is each pixel that differs from one of its four
    neighbours, in the mask or out of it, so one pixel on each side, where the probability crosses 0.5 and is steepest;
    holes have such a boundary too, the border of the picture is none. It says neither what redundant masks were ranked
    by, nor how edges were thinned beyond citing Canny: see `thin_edges`.

    Args:
        model: from `model.build_sam2`, in eval mode.
        embeddings: one picture's.
        orig_hw: its size (H, W).
        points_per_side: of the grid; the paper's 16 make 256 points and 768 masks.
        box_nms_thresh: IoU of boxes, 0..1.
    Returns:
        strength float32 (H, W), 0..1; zeros where no mask has a boundary. At full size no more than MASKS_AT_ONCE masks
        are held.
    Source: Kirillov et al. 2023, appendix D.2.
    """
    low_res_masks, predicted_ious, boxes_xyxy = _decode_grid(model, embeddings, orig_hw, points_per_side)
    best = nms(boxes_xyxy, predicted_ious, box_nms_thresh)
    strength = np.zeros(orig_hw, np.float32)
    for masks in low_res_masks[best].split(MASKS_AT_ONCE):
        logits = upscale_masks(masks[:, None], orig_hw)[:, 0]  # (k, H, W)
        parts = zip(logits.sigmoid().cpu().numpy(), (logits > 0).cpu().numpy(), strict=True)
        for probability, mask in parts:
            np.maximum(strength, _sobel_magnitude(probability) * _find_boundary(mask), out=strength)
    return thin_edges(_scale_to_one(strength))


def _decode_grid(
    model: torch.nn.Module, embeddings: Embeddings, orig_hw: tuple[int, int], points_per_side: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode three masks for each point of a grid, and drop the empty ones: they have no boundary and no box.

    Returns:
        low_res_masks float32 (K, h, w) logits, predicted_ious (K,), boxes_xyxy (K, 4) px at full size.
    """
    points = torch.as_tensor(make_point_grid(points_per_side, orig_hw), dtype=torch.float32, device=model.device)
    parts = []
    decoded = decode_points(model, embeddings, points, orig_hw, POINTS_AT_ONCE, True)
    for _, low_res_masks, iou_predictions, _ in decoded:
        masks, predicted_ious = low_res_masks.flatten(0, 1).float(), iou_predictions.flatten().float()
        are_there, boxes_xyxy = measure_full_size(masks, orig_hw, 0.0)  # a stability of 1, or 0 for an empty mask
        kept = torch.nonzero(are_there)[:, 0]
        parts.append((masks[kept], predicted_ious[kept], boxes_xyxy[kept]))
    low_res_masks, predicted_ious, boxes_xyxy = (torch.cat(part) for part in zip(*parts, strict=True))
    return low_res_masks, predicted_ious, boxes_xyxy


def _find_boundary(mask: np.ndarray) -> np.ndarray:
    """Find the pixels of which one of the four neighbours in the picture differs: bool (H, W) -> bool (H, W)."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    layer = mask.view(np.uint8)
    return cv2.dilate(layer, cross) != cv2.erode(layer, cross)  # what lies beyond the border counts as no neighbour


def _sobel_magnitude(layer: np.ndarray) -> np.ndarray:
    """Compute the magnitude of the 3 x 3 Sobel filter: float32 (H, W) -> float32 (H, W), >= 0."""
    return cv2.magnitude(cv2.Sobel(layer, cv2.CV_32F, 1, 0), cv2.Sobel(layer, cv2.CV_32F, 0, 1))


def _scale_to_one(strength: np.ndarray) -> np.ndarray:
    """Divide a map >= 0 by its largest value; zeros stay zeros."""
    largest = strength.max(initial=0)
    return strength / largest if largest > 0 else strength


def thin_edges(strength: np.ndarray) -> np.ndarray:
    """Keep a strength where it is largest across the ridge it lies on, and set the rest to 0.

    The normal of a ridge is the direction in which the map, blurred by RIDGE_SIGMA_PX, curves down the most: from its
    second derivatives, as Dollar and Zitnick's structured edges do, since a gradient vanishes on a ridge. A pixel stays
    if it is not below the map one pixel ahead along the normal, and above it one pixel behind, so that of two equal
    ones one stays; the map is interpolated linearly there (bilinear), and is 0 beyond the border. A diagonal line may
    stay as a staircase of two pixels in each row, which `count_matches` thins to one.

    Args:
        strength: float32 (H, W), >= 0.
    Returns:
        float32 (H, W), the values that stay.
    Source: Canny 1986; the edge toolbox of Dollar and Zitnick 2015, whose fading near the border is left out.
    """
    blurred = cv2.GaussianBlur(strength, (0, 0), RIDGE_SIGMA_PX)
    xx, yy = cv2.Sobel(blurred, cv2.CV_32F, 2, 0), cv2.Sobel(blurred, cv2.CV_32F, 0, 2)
    xy = cv2.Sobel(blurred, cv2.CV_32F, 1, 1)  # all three filters are four times the derivative
    along = np.arctan2(2 * xy, xx - yy) / 2  # of the largest curvature, up being positive
    normal = np.mod(along + np.pi / 2, np.pi)
    steps = np.cos(normal), np.sin(normal)
    ys, xs = np.indices(strength.shape, dtype=np.float32)
    ahead, behind = (
        cv2.remap(
            strength,
            xs + sign * steps[0],
            ys + sign * steps[1],
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=0,
        )
        for sign in (1, -1)
    )
    return np.where((strength >= ahead) & (strength > behind), strength, np.float32(0))


def sobel_edges(image_rgb: np.ndarray) -> np.ndarray:
    """Find edges as the magnitude of the Sobel filter of the grey picture, by its largest value, thinned.

    Args:
        image_rgb: uint8 (H, W, 3); it is not blurred.
    Returns:
        strength float32 (H, W), 0..1.
    """
    grey = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return thin_edges(_scale_to_one(_sobel_magnitude(grey)))


def canny_edges(image_rgb: np.ndarray) -> np.ndarray:
    """Find edges with Canny's detector; an edge is as strong as the highest threshold at which it is one.

    The grey picture is blurred by CANNY_SIGMA_PX. CANNY_LEVELS high thresholds, evenly spaced up to CANNY_HIGHEST and
    the same for all pictures, each with a low one of CANNY_LOW of it; a strength of k / CANNY_LEVELS says that the k-th
    was the last. What is an edge at one is so at those below, so a cut of the strength is what Canny gives there.

    Args:
        image_rgb: uint8 (H, W, 3).
    Returns:
        strength float32 (H, W), 0..1; Canny's edges are thin.
    """
    grey = cv2.GaussianBlur(cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY), (0, 0), CANNY_SIGMA_PX)
    strength = np.zeros(grey.shape, np.float32)
    for level in range(1, CANNY_LEVELS + 1):
        high = CANNY_HIGHEST * level / CANNY_LEVELS
        is_edge = cv2.Canny(grey, CANNY_LOW * high, high, L2gradient=True) > 0
        if not is_edge.any():
            break
        strength[is_edge] = level / CANNY_LEVELS
    return strength


# ---------------------------------------------------------------------------------------------------------------------
# strength and boundaries -> counts -> scores


class Links(NamedTuple):
    """Which true pixels each predicted pixel may be matched with: P predicted pixels, L links, S stages."""

    starts: np.ndarray  # int (P,), where a pixel's links start
    counts: np.ndarray  # int (S, P), how many of them are in reach at each stage, more at each
    truths: np.ndarray  # int (L,), the true pixel of each link, a pixel's nearest first
    num_truths: int


def match_boundaries(pred: np.ndarray, truth: np.ndarray, max_distance_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Match predicted pixels with true ones, one to one, as many as can be.

    What the benchmark counts is how many are matched. Its correspondPixels solves an assignment of the least total
    distance in which a pixel without a partner costs 100 times the largest distance, so it has as many matches (but for
    the outliers that it draws at random), and of all such matchings the one of the least distance. This one matches as
    many as can be within 1 px, then 2, 3 and the largest distance, each time keeping the pixels that are matched. The
    number is the same; which predicted pixels are matched may differ a little, and so how many any of several
    annotators matches: by up to 0.5 % in parts of 12 pictures of BSDS500.

    Args:
        pred: bool (H, W).
        truth: bool (H, W).
        max_distance_px: between the centres of two matched pixels, at most.
    Returns:
        is_pred_matched, is_truth_matched: bool (H, W) each, of equally many pixels.
    Raises:
        ValueError: for maps of different sizes.
    """
    _check_same_size(pred, [truth])
    pred_yx, truth_yx = np.argwhere(pred), np.argwhere(truth)
    partners = _match(_link_pixels(pred_yx, truth_yx, max_distance_px), np.ones(len(pred_yx), bool))
    is_pred_matched, is_truth_matched = np.zeros_like(pred), np.zeros_like(truth)
    is_pred_matched[tuple(pred_yx[partners >= 0].T)] = True
    is_truth_matched[tuple(truth_yx[partners[partners >= 0]].T)] = True
    return is_pred_matched, is_truth_matched


def _check_same_size(pred: np.ndarray, truths: list[np.ndarray]) -> None:
    for truth in truths:
        if truth.shape != pred.shape:
            raise ValueError(f"boundaries have size {truth.shape}, the prediction {pred.shape}; must be of one picture")


def _link_pixels(pred_yx: np.ndarray, truth_yx: np.ndarray, max_distance_px: float) -> Links:
    """Link each predicted pixel with the true ones in reach: int (P, 2) and (T, 2) px -> Links."""
    from scipy.spatial import cKDTree  # slow to import

    pairs = cKDTree(pred_yx).sparse_distance_matrix(cKDTree(truth_yx), max_distance_px, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs["j"], pairs["v"], pairs["i"]))]
    reaches_px = [reach for reach in FIRST_REACHES_PX if reach < max_distance_px] + [max_distance_px + 1]  # all
    counts = np.stack([np.bincount(pairs["i"][pairs["v"] <= r], minlength=len(pred_yx)) for r in reaches_px])
    return Links(np.cumsum(counts[-1]) - counts[-1], counts, pairs["j"], len(truth_yx))


def _match(links: Links, is_pred: np.ndarray) -> np.ndarray:
    """Match predicted pixels with true ones, as many as can be at each stage; what is matched stays so.

    Written out because scipy's maximum_bipartite_matching, though quick for most maps, takes over 10 s for some.

    Args:
        is_pred: bool (P,), the pixels that take part.
    Returns:
        int (P,), the true pixel of each predicted one, or -1.
    """
    partners, taken_by = np.full(len(is_pred), -1), np.full(links.num_truths, -1)
    for counts in links.counts:
        rows = np.flatnonzero(is_pred & (counts > 0))
        while _augment(links, counts, rows[partners[rows] < 0], partners, taken_by):
            pass
    return partners


def _augment(links: Links, counts: np.ndarray, roots: np.ndarray, partners: np.ndarray, taken_by: np.ndarray) -> bool:
    """Match more pixels, along paths from unmatched predicted pixels to free true ones.

    A tree grows from each root: to the true pixels in reach, and from one that is taken on to the predicted pixel that
    took it. No true pixel belongs to two trees, so the paths that end at free ones change partners all at once.

    Args:
        counts: int (P,), how many of a pixel's links are in reach.
        roots: int (R,), predicted pixels.
        partners: int (P,), changed in place.
        taken_by: int (T,), the other way round, changed in place.
    Returns:
        whether there was a path; where there is none, no more pixels can be matched (Berge 1957).
    """
    tree = np.full(len(partners), -1)  # the root of a predicted pixel's tree
    reached_from = np.full(len(taken_by), -1)
    ends = np.full(len(partners), -1)  # the free true pixel of a root's tree
    tree[roots] = front = roots
    while len(front):
        num_links = counts[front]
        skipped = links.starts[front] - (np.cumsum(num_links) - num_links)
        truths = links.truths[np.arange(num_links.sum()) + np.repeat(skipped, num_links)]
        preds = np.repeat(front, num_links)
        is_new = reached_from[truths] < 0
        truths, preds = truths[is_new], preds[is_new]
        reached_from[truths[::-1]] = preds[::-1]  # the first of several gets it, here and below
        is_own = reached_from[truths] == preds
        truths, preds = truths[is_own], preds[is_own]
        is_free = taken_by[truths] < 0
        ends[tree[preds[is_free]][::-1]] = truths[is_free][::-1]
        front = taken_by[truths[~is_free]]
        tree[front] = tree[preds[~is_free]]
        front = front[ends[tree[front]] < 0]
    truths = ends[ends >= 0]
    has_path = len(truths) > 0
    while len(truths):  # back to the roots, all paths in step
        preds = reached_from[truths]
        before = partners[preds]
        partners[preds], taken_by[truths] = truths, preds
        truths = before[before >= 0]
    return has_path


def count_matches(
    strength: np.ndarray,
    truths: list[np.ndarray],
    thresholds: np.ndarray = THRESHOLDS,
    max_distance: float = MAX_DISTANCE,
) -> np.ndarray:
    """Count a picture's matched pixels at each threshold, as the benchmark's evaluation_bdry_image does.

    Each cut of the strength is thinned once more to lines one pixel wide, as the benchmark does with MATLAB's bwmorph;
    the boundaries are taken as they are. A predicted pixel is right if any annotator's boundaries match it. A picture
    of BSDS500 takes 2 to 6 s on one core.

    Args:
        strength: float (H, W), 0..1, thinned.
        truths: bool (H, W) of each annotator.
        thresholds: float (T,); an edge has a strength of at least that.
        max_distance: of a match, share of the picture's diagonal.
    Returns:
        int64 (T, 4): true pixels that are matched and all true pixels, summed over annotators; predicted pixels that
        are matched, all predicted pixels.
    Raises:
        ValueError: for maps of different sizes.
    """
    _check_same_size(strength, truths)
    max_distance_px = max_distance * np.hypot(*strength.shape)
    thresholds = np.asarray(thresholds, np.float32)  # as the strength: 0.3 must be at least 0.3
    candidates_yx = np.argwhere(strength >= thresholds.min())
    links = [_link_pixels(candidates_yx, np.argwhere(truth), max_distance_px) for truth in truths]
    num_true = sum(np.count_nonzero(truth) for truth in truths)
    counts, last_cut = np.zeros((len(thresholds), 4), np.int64), None
    for t, threshold in enumerate(thresholds):
        cut = strength >= threshold
        if last_cut is not None and np.array_equal(cut, last_cut):
            counts[t] = counts[t - 1]
            continue
        last_cut = cut
        is_pred = _thin_lines(cut)[tuple(candidates_yx.T)]  # of the candidates
        is_matched, num_true_matched = np.zeros_like(is_pred), 0
        for of_one in links:
            are_matched = _match(of_one, is_pred) >= 0
            num_true_matched += np.count_nonzero(are_matched)
            is_matched |= are_matched
        counts[t] = num_true_matched, num_true, np.count_nonzero(is_matched), np.count_nonzero(is_pred)
    return counts


def _make_thinning_tables() -> np.ndarray:
    """Tabulate which pixels a pass of thinning removes, by their neighbours: bool (2, 256), a row for each half pass.

    Bit k of a column's number is neighbour k, anticlockwise from the right-hand one.
    Source: Lam, Lee and Suen 1992, page 879, as MATLAB's bwmorph documents its "thin".
    """
    right, up_right, up, up_left, left, down_left, down, down_right = ring = (
        np.arange(256) >> np.arange(8)[:, None]
    ) & 1
    following = np.roll(ring, -1, 0)
    num_runs = (~ring[0::2] & 1 & (ring[1::2] | following[1::2])).sum(0)
    num_pairs = np.minimum((ring[0::2] | ring[1::2]).sum(0), (ring[1::2] | following[1::2]).sum(0))
    is_removable = (num_runs == 1) & (num_pairs >= 2) & (num_pairs <= 3)
    is_first = ((up_right | up | ~down_right & 1) & right) == 0
    is_second = ((down_left | down | ~up_left & 1) & left) == 0
    return np.stack([is_removable & is_first, is_removable & is_second])


THINNING_TABLES = _make_thinning_tables()
NEIGHBOUR_BITS = np.array([[8, 4, 2], [16, 0, 1], [32, 64, 128]], np.float32)


def _thin_lines(is_edge: np.ndarray) -> np.ndarray:
    """Thin the regions of a map to lines one pixel wide, as bwmorph(map, 'thin', inf): bool (H, W) -> bool (H, W)."""
    lines = is_edge.astype(np.uint8)
    while True:
        num_before = cv2.countNonZero(lines)
        for table in THINNING_TABLES:
            neighbours = cv2.filter2D(lines, cv2.CV_8U, NEIGHBOUR_BITS, borderType=cv2.BORDER_CONSTANT)
            lines[table[neighbours]] = 0
        if cv2.countNonZero(lines) == num_before:
            return lines > 0


def score_edges(counts: list[np.ndarray]) -> dict[str, float]:
    """Compute the scores of BSDS500 from the counts of its pictures.

    Args:
        counts: int (T, 4) of each picture, from `count_matches`, at the same ascending thresholds.
    Returns:
        ods: the highest F of all pictures' counts together, precision and recall interpolated linearly between
            thresholds (98 values between each two);
        ois: F of the counts of each picture at its own best threshold, the lowest of equal ones, not interpolated;
        ap: area under precision over recall at 0, 0.01 .. 1, interpolated linearly, 0 beyond the recalls that are
            reached, of equal recalls the lowest threshold's; as there, 0 where all thresholds have one recall, and up
            to 1.01 as 101 values are each taken for a hundredth;
        r50: the highest recall at which precision is 0.5 or more, interpolated linearly between thresholds; 0 where
            it never is. Dollar and Zitnick's edgesEvalDir reads the same where precision rises with the threshold.
    Raises:
        ValueError: for no pictures, or counts of other shapes.
    Source: the benchmark's collect_eval_bdry; R50: edgesEvalDir.
    """
    shapes = {np.shape(table) for table in counts}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 2 or shape[0] == 0 or shape[1] != 4:
        raise ValueError(f"counts have shapes {sorted(shapes)}; must be one (thresholds, 4) of all pictures")
    tables = np.stack(counts).astype(np.float64)  # (N, T, 4)
    recalls, precisions = _rates(tables.sum(0))
    weights = np.linspace(0, 1, 100)
    between = [values[:-1, None] * (1 - weights) + values[1:, None] * weights for values in (recalls, precisions)]
    best_of_each = _f_measure(*_rates(tables)).argmax(1)
    at_best = tables[np.arange(len(tables)), best_of_each].sum(0)
    return {
        "ods": float(max(_f_measure(recalls, precisions).max(), _f_measure(*between).max(initial=0))),
        "ois": float(_f_measure(*_rates(at_best))),
        "ap": _average_precision(recalls, precisions),
        "r50": _recall_at(recalls, precisions, 0.5),
    }


def _rates(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide counts (..., 4) into recall and precision (...); 0 where there is nothing to divide by."""
    return counts[..., 0] / np.maximum(counts[..., 1], 1), counts[..., 2] / np.maximum(counts[..., 3], 1)


def _f_measure(recalls: np.ndarray, precisions: np.ndarray) -> np.ndarray:
    total = recalls + precisions
    return 2 * recalls * precisions / np.where(total == 0, 1, total)


def _average_precision(recalls: np.ndarray, precisions: np.ndarray) -> float:
    rising, first = np.unique(recalls, return_index=True)
    if len(rising) == 1:
        return 0.0
    return float(np.interp(np.arange(101) / 100, rising, precisions[first], left=0, right=0).sum() / 100)


def _recall_at(recalls: np.ndarray, precisions: np.ndarray, precision: float) -> float:
    is_reached = precisions >= precision
    crossings = np.flatnonzero(is_reached[1:] != is_reached[:-1])
    before, after = precisions[crossings], precisions[crossings + 1]
    shares = (precision - before) / (after - before)
    at_crossings = recalls[crossings] * (1 - shares) + recalls[crossings + 1] * shares
    return float(np.concatenate([recalls[is_reached], at_crossings]).max(initial=0))
