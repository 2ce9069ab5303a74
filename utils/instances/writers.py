"""Pictures with their objects as other programs read them: COCO, labelme, YOLO, and cut-outs.

Outlines run along the edges of pixels: pixel (0, 0) covers 0..1 in x and in y, so its centre is (0.5, 0.5), as COCO and
labelme count. Drawn again, an outline of tolerance 0 is its mask, exactly; with the tolerance of the YAML file it has a
fraction of the points, and an IoU of at least MIN_IOU.

A format is a function (folder, pictures, classes, tolerance_px) -> what it could not hold, and a row of WRITERS.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import yaml

from utils.images import WRITTEN_SUFFIXES, Picture, read_image, write_image
from utils.instances.codecs import polygons_to_mask, rle_to_part
from utils.log import write_json

NO_CLASSES = ["object"]  # the one class of objects that have none
MIN_IOU = 0.99  # of a simplified ring with the whole one, both filled
LEAST_TOLERANCE_PX = 0.2  # below it hardly a corner is left out
# Of the annotations of <name>.json: number, COCO's run lengths, score, and where there are classes the name of its own
# and its probability, 0..1.
OBJECT_KEYS = ("id", "segmentation", "predicted_iou", "class", "class_prob")
LABELME_VERSION = "5.5.0"  # whose fields are written


class Labelled(NamedTuple):
    """A picture and the objects in it, as they are written."""

    picture: Picture
    image_path: Path  # what other programs open: the picture's file, or that of its page, see `label_picture`
    image_id: int
    orig_hw: tuple[int, int]
    objects: list[dict]  # each with some of OBJECT_KEYS


class Writer(NamedTuple):
    """How a format is written."""

    write: Callable[[Path, list[Labelled], list[str], float], Counter]
    needs_all: bool  # once, with all pictures; otherwise each picture is written as soon as it is done


class Part(NamedTuple):
    """A connected part of a mask."""

    outer: np.ndarray  # int64 (K, 2), corners (x, y) px, clockwise as seen
    holes: list[np.ndarray]  # counter-clockwise


# ---------------------------------------------------------------------------------------------------------------------
# mask -> outlines

# By the 4 pixels around a corner of pixels, 1 top left + 2 top right + 4 bottom left + 8 bottom right: how many corners
# of outlines it is. Two pixels that touch there alone are apart, so each has a corner of its own.
NUM_CORNERS = np.array([0, 1, 1, 0, 1, 0, 2, 1, 1, 2, 0, 1, 0, 1, 1, 0], np.uint8)


def trace_rings(mask: np.ndarray) -> list[np.ndarray]:
    """Trace the outlines of a mask along the edges of its pixels; pixels that touch by a corner alone are apart.

    Each outline turns at each of its corners, so along a line of pixel edges, from left to right, corners are the
    start and the end of an edge in turn; likewise along a column, from top to bottom. That links them to rings.

    Args:
        mask: bool (H, W).
    Returns:
        rings int64 (K, 2): corners (x, y), 0..W and 0..H, the first one not repeated; the object is on the right, so
        that the area of `ring_area` is above 0 for the outside of a part and below 0 for a hole.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    blocks = padded[:-1, :-1] | padded[:-1, 1:] << 1 | padded[1:, :-1] << 2 | padded[1:, 1:] << 3  # (H + 1, W + 1)
    flat = np.flatnonzero(NUM_CORNERS[blocks])
    counts = NUM_CORNERS[blocks.ravel()[flat]]
    flat = np.repeat(flat, counts)  # (N,) line by line
    ys, xs = np.divmod(flat, blocks.shape[1])
    kinds = blocks.ravel()[flat]

    # Of a double corner the first copy ends the edge on the left, the second starts the one on the right. In its column
    # the copy that ends the edge above is the first if the pixel top left is in the mask, else the second.
    is_second = np.concatenate([[False], flat[1:] == flat[:-1]])
    by_column = np.lexsort((is_second ^ (kinds == 6), ys, xs))
    across = np.empty(len(flat), np.int64)  # the other end of each corner's vertical edge
    across[by_column[::2]], across[by_column[1::2]] = by_column[1::2], by_column[::2]

    starts = np.arange(0, len(flat), 2)
    starts += (kinds[::2] & 8) == 0  # a horizontal edge runs to the right where the object is below it
    following = across[starts ^ 1] // 2  # the horizontal edge that follows each: (N / 2,)
    rings, is_traced, following = [], np.zeros(len(starts), bool).tolist(), following.tolist()
    for first in range(len(starts)):
        if is_traced[first]:
            continue
        edges, edge = [], first
        while not is_traced[edge]:
            is_traced[edge] = True
            edges.append(edge)
            edge = following[edge]
        corners = np.stack([starts[edges], starts[edges] ^ 1], 1).ravel()
        rings.append(np.stack([xs[corners], ys[corners]], 1))
    return rings


def ring_area(ring: np.ndarray) -> float:
    """Compute a ring's area, px, above 0 where it runs clockwise as seen (y points down)."""
    following = np.roll(ring, -1, 0)
    return float((ring[:, 0] * following[:, 1] - following[:, 0] * ring[:, 1]).sum() / 2)


def trace_parts(mask: np.ndarray) -> list[Part]:
    """Trace a mask's parts, pixels that are connected by their sides, each with its holes; the largest comes first.

    Args:
        mask: bool (H, W).
    """
    _, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    outers, holes = {}, {}
    for ring in trace_rings(mask):
        (x, y), (next_x, _) = ring[:2]  # the object is below an edge that runs to the right, else above
        part = labels[y, x] if next_x > x else labels[y - 1, next_x]
        if ring_area(ring) > 0:
            outers[part] = ring
        else:
            holes.setdefault(part, []).append(ring)
    parts = [Part(outer, holes.get(part, [])) for part, outer in outers.items()]
    return sorted(parts, key=lambda part: -ring_area(part.outer))


def simplify_ring(ring: np.ndarray, tolerance_px: float) -> np.ndarray:
    """Leave out corners of a ring, so that the rest strays from its edges by at most a tolerance.

    The line that is simplified goes through the middles of the edges and cuts the corners of stairs, which are slopes;
    corners between longer edges stay. Where the filled ring would differ too much from the whole one (MIN_IOU), the
    tolerance is lowered, and at last all corners are kept.

    Args:
        ring: int64 (K, 2) of `trace_rings`.
        tolerance_px: 0 or more.
    Returns:
        float64 (k, 2).
    Source: Douglas and Peucker, 1973, as OpenCV has it.
    """
    if tolerance_px == 0:
        return ring.astype(np.float64)
    corner_xy = ring.min(0)
    width, height = ring.max(0) - corner_xy
    local = ring - corner_xy
    filled = polygons_to_mask([local.ravel().tolist()], height, width)
    edges = np.roll(local, -1, 0) - local  # (K, 2), the edge that each corner starts
    lengths = np.abs(edges).sum(1)
    halves = edges / (2 * lengths[:, None])
    is_corner = (lengths > 1) & (np.roll(lengths, 1) > 1)
    points = np.stack([np.where(is_corner[:, None], local, local + halves), local + halves, local + edges - halves], 1)
    points = points.reshape(-1, 1, 2).astype(np.float32)
    tolerance = min(tolerance_px, max(width, height))
    while tolerance > LEAST_TOLERANCE_PX:
        simple = cv2.approxPolyDP(points, tolerance, True)[:, 0].astype(np.float64)
        tolerance *= 0.7
        if not 3 <= len(simple) < len(ring):
            continue
        # Programs differ in whether a pixel counts whose centre lies on the line. Turned around, it is the other way.
        drawn = polygons_to_mask([simple.ravel().tolist()], height, width)
        turned = polygons_to_mask([([width, height] - simple).ravel().tolist()], height, width)[::-1, ::-1]
        num_common = np.count_nonzero(drawn & turned & filled)
        if num_common >= MIN_IOU * np.count_nonzero(drawn | turned | filled):
            return simple + corner_xy
    return ring.astype(np.float64)


def join_holes(outer: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """Make one outline of a ring and its holes: a seam, run along there and back, leads to each hole.

    Programs that fill by crossings or by turns see the holes; a seam covers nothing.

    Args:
        outer: float64 (K, 2).
        holes: as many rings, float64 (k, 2), run the other way round.
    Returns:
        float64 (N, 2).
    """
    outline = outer
    for hole in sorted(holes, key=lambda hole: hole[:, 0].min()):  # what is left of a hole is joined before it
        hole = np.roll(hole, -int(np.lexsort((hole[:, 1], hole[:, 0]))[0]), 0)  # starts at its leftmost point
        x, y = hole[0]
        start, end = outline, np.roll(outline, -1, 0)
        rise = end[:, 1] - start[:, 1]
        is_met = (rise != 0) & (np.minimum(start[:, 1], end[:, 1]) <= y) & (y <= np.maximum(start[:, 1], end[:, 1]))
        share = (y - start[:, 1]) / np.where(rise == 0, 1, rise)
        met_x = start[:, 0] + share * (end[:, 0] - start[:, 0])
        met_x = np.where(is_met & (met_x <= x), met_x, -np.inf)  # of the edges that lie to the left
        edge = int(met_x.argmax())
        met = [[met_x[edge], y]]
        if met_x[edge] == -np.inf:  # simplified, the hole reaches out of the ring
            edge = int(np.hypot(*(outline - hole[0]).T).argmin())
            met = outline[edge : edge + 1]
        outline = np.concatenate([outline[: edge + 1], met, hole, hole[:1], met, outline[edge + 1 :]])
    return outline


def trace_object(labelled_object: dict) -> list[Part]:
    """Trace the parts of an object of `Labelled`, in px of the picture; none where its mask is empty."""
    mask, corner_xy = rle_to_part(labelled_object["segmentation"])
    return [
        Part(part.outer + corner_xy, [hole + corner_xy for hole in part.holes])
        for part in (trace_parts(mask) if mask.size else [])
    ]


# ---------------------------------------------------------------------------------------------------------------------
# formats


def write_coco(folder: Path, pictures: list[Labelled], classes: list[str], tolerance_px: float) -> Counter:
    """Write <folder>/annotations.json: all pictures, masks as run lengths, which hold any mask exactly.

    Names of pictures are as seen from the folder that they lie in; ids of annotations and categories count from 1.

    Args:
        classes: names of the categories, in their order.
        tolerance_px: unused, run lengths have no outline.
    """
    category_ids = {name: number for number, name in enumerate(classes, 1)}
    annotations = []
    for labelled in pictures:
        for each in labelled.objects:
            part, (x, y) = rle_to_part(each["segmentation"])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": labelled.image_id,
                    "category_id": category_ids[class_of(each, classes)],
                    "segmentation": each["segmentation"],
                    "area": int(np.count_nonzero(part)),
                    "bbox": [x, y, part.shape[1], part.shape[0]],  # from pixel edge to pixel edge, as COCO's are
                    "iscrowd": 0,
                    "score": each["predicted_iou"] * each.get("class_prob", 1.0),
                }
            )
    images = [
        {
            "id": labelled.image_id,
            "file_name": path_from(labelled.image_path, labelled.picture.path.parent),
            "width": labelled.orig_hw[1],
            "height": labelled.orig_hw[0],
        }
        for labelled in pictures
    ]
    categories = [{"id": number, "name": name, "supercategory": ""} for name, number in category_ids.items()]
    folder.mkdir(parents=True, exist_ok=True)
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "annotations.json", content)
    return Counter()


def write_labelme(folder: Path, pictures: list[Labelled], classes: list[str], tolerance_px: float) -> Counter:
    """Write <folder>/<name>.json for each picture: a polygon for each part of an object, those of one as a group.

    Holes are in the polygon of their part (`join_holes`), so that nothing is lost.

    Args:
        classes: names of the labels that there are.
        tolerance_px: of outlines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for labelled in pictures:
        shapes = []
        for each in labelled.objects:
            parts = trace_object(each)
            for part in parts:
                rings = [simplify_ring(ring, tolerance_px) for ring in (part.outer, *part.holes)]
                shape = {"label": class_of(each, classes), "points": join_holes(rings[0], rings[1:]).tolist()}
                group_id = each["id"] if len(parts) > 1 else None
                shapes.append(
                    shape
                    | {"group_id": group_id, "description": "", "shape_type": "polygon", "flags": {}, "mask": None}
                )
        content = {"version": LABELME_VERSION, "flags": {}, "shapes": shapes}
        content |= {"imagePath": path_from(labelled.image_path, folder), "imageData": None}
        content |= {"imageHeight": labelled.orig_hw[0], "imageWidth": labelled.orig_hw[1]}
        write_json(folder / f"{labelled.picture.name}.json", content)
    return Counter()


def write_yolo(folder: Path, pictures: list[Labelled], classes: list[str], tolerance_px: float) -> Counter:
    """Write <folder>/data.yaml, images/<name>.* (links, or copies) and labels/<name>.txt, a line for each object.

    A line holds one ring, so it is that of the object's largest part, without holes.

    Args:
        classes: names of the classes 0, 1, ...
        tolerance_px: of outlines.
    Returns:
        holes and islands that were lost, and the objects that lost some.
    """
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = dict(enumerate(classes))
    content = yaml.safe_dump(
        {"train": "images", "val": "images", "nc": len(names), "names": names}, allow_unicode=True, sort_keys=False
    )
    (folder / "data.yaml").write_text(content, encoding="utf-8")
    lost = Counter()
    for labelled in pictures:
        lines = []
        for each in labelled.objects:
            if not (parts := trace_object(each)):
                continue
            largest = max(parts, key=lambda part: ring_area(part.outer))
            num_islands, num_holes = len(parts) - 1, len(largest.holes)
            lost += Counter(holes=num_holes, islands=num_islands, objects=int(num_islands + num_holes > 0))
            shares = simplify_ring(largest.outer, tolerance_px) / labelled.orig_hw[::-1]
            class_id = classes.index(class_of(each, classes))
            lines.append(" ".join([str(class_id), *(f"{share:.7f}" for share in shares.ravel())]) + "\n")
        name = labelled.picture.name
        (folder / "labels" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
        link_or_copy(labelled.image_path, folder / "images" / f"{name}{labelled.image_path.suffix}")
    return lost


def write_cutouts(folder: Path, pictures: list[Labelled], classes: list[str], tolerance_px: float) -> Counter:
    """Write <folder>/<name>_<id>.png for each object: its box of the picture, RGBA of 8 bits, clear outside its mask.

    Args:
        classes, tolerance_px: unused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for labelled in pictures:
        image_rgb = read_image(labelled.picture.path, labelled.picture.page)
        for each in labelled.objects:
            mask, (x, y) = rle_to_part(each["segmentation"])
            if not mask.size:
                continue
            part = image_rgb[y : y + mask.shape[0], x : x + mask.shape[1]]
            rgba = np.dstack([part, np.full(mask.shape, 255, np.uint8)]) * mask[..., None]
            write_image(folder / f"{labelled.picture.name}_{each['id']}.png", rgba)
    return Counter()


def label_picture(
    run_dir: Path, picture: Picture, image_id: int, image_rgb: np.ndarray, annotations: list[dict]
) -> Labelled:
    """Put together what is written of a picture.

    A page of a file of several, and a GIF, is saved as <run_dir>/pages/<name>.png, in 8 bits: few programs read them.

    Args:
        run_dir: the folder of all that is written.
        image_rgb: uint8 (H, W, 3).
        annotations: of <name>.json, those to write.
    """
    image_path = picture.path
    if picture.page is not None or picture.path.suffix.lower() not in WRITTEN_SUFFIXES:
        image_path = run_dir / "pages" / f"{picture.name}.png"
        image_path.parent.mkdir(parents=True, exist_ok=True)
        write_image(image_path, image_rgb)
    objects = [{key: each[key] for key in OBJECT_KEYS if key in each} for each in annotations]
    return Labelled(picture, image_path, image_id, image_rgb.shape[:2], objects)


def write_formats(
    formats: list[str], run_dir: Path, classes: list[str], tolerance_px: float, labelled: list[Labelled], is_end: bool
) -> Counter:
    """Write pictures in some formats, each to a folder of its name.

    Args:
        formats: keys of WRITERS.
        labelled: the pictures that are done since the last call; at the end, those of the whole run.
        is_end: write the formats that need all pictures; else the others.
    Returns:
        what could not be held, as the formats say.
    """
    lost = Counter()
    for name in dict.fromkeys(formats):
        if labelled and WRITERS[name].needs_all == is_end:
            lost += WRITERS[name].write(run_dir / name, labelled, classes, tolerance_px)
    return lost


WRITERS = {
    "coco": Writer(write_coco, needs_all=True),
    "labelme": Writer(write_labelme, needs_all=False),
    "yolo": Writer(write_yolo, needs_all=False),
    "cutouts": Writer(write_cutouts, needs_all=False),
}


def class_of(labelled_object: dict, classes: list[str]) -> str:
    """Return the name of an object's class; where objects have none, there is one for all."""
    name = labelled_object["class"] if "class" in labelled_object else classes[0]
    assert name in classes and ("class" in labelled_object or len(classes) == 1), (name, classes)
    return name


def path_from(path: Path, folder: Path) -> str:
    """Write a file's path as seen from a folder, with slashes; from the root where no way leads there (Windows)."""
    real = os.path.join(os.path.realpath(path.parent), path.name)  # a link's own name counts; ".." leaves real folders
    try:
        return Path(os.path.relpath(real, os.path.realpath(folder))).as_posix()
    except ValueError:  # another drive
        return Path(real).as_posix()


def link_or_copy(path: Path, new_path: Path) -> None:
    """Make a link to a file, or a copy of it where links cannot be made (some Windows accounts and disks)."""
    try:
        new_path.symlink_to(os.path.realpath(path))
    except OSError:
        shutil.copyfile(path, new_path)
