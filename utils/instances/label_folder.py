"""A folder of labels, made in rounds by models and people: what is on disk, and who may write it.

    masks/<picture>.json  the record of a picture, in SA-1B's layout: who made which mask, and what it took
    maps/<picture>.png    drawn from it, 16 bit: later objects of the record lie on top
    val.txt               pictures that validate, drawn once; their masks are people's, never automatic
    done.txt              pictures that a person has finished; no model labels them again
    rounds.csv, .png      a row for each training on the folder (utils/sam2/rounds.py)
    best.pt               the model of the last round
    in_use                locked by the process that writes

A record is {"image": {"file_name", "height", "width"}, "made_by": of its automatic masks, "annotations": [...],
"rejected": [predicted IoU of each automatic mask that a person corrected or deleted]}. An annotation has "id", from 1,
its number in the map; "segmentation"; "origin": automatic, assisted (a model answered a person's clicks) or person
(drawn with the brush, at least in part); of automatic masks "predicted_iou", and "checked": true where a person left it
as it was in a finished picture; of people's "clicks" (points and boxes), "strokes" (of the brush), "seconds" and
"round"; and "class", a name, where there are classes.

Source: Kirillov et al. 2023 (Segment Anything), section 4 (the data engine).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils import images, listing
from utils.instances.codecs import rle_to_part
from utils.log import write_json

AUTOMATIC, ASSISTED, PERSON = "automatic", "assisted", "person"
ORIGINS = (PERSON, ASSISTED, AUTOMATIC)


@contextlib.contextmanager
def open_folder(labels_dir: Path) -> Iterator[None]:
    """Make a folder of labels if it is new, and keep other processes from writing to it.

    Raises:
        ValueError: for a file, and for a folder that another process writes to.
    """
    if labels_dir.is_file():
        raise ValueError(f"labels is {labels_dir}, a file; give a folder, new or of an earlier round")
    for name in ("masks", "maps"):
        (labels_dir / name).mkdir(parents=True, exist_ok=True)
    import fcntl  # not on Windows; reading records, which trainings do, needs none

    with (labels_dir / "in_use").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process, however it ends
        except BlockingIOError as error:
            raise ValueError(f"labels is {labels_dir}, which another process labels now; end that one first") from error
        yield


def check_names(labels_dir: Path, pictures: list[images.Picture]) -> None:
    """Refuse pictures whose names no list can hold, or are no longer those of their records.

    A name has its suffix where two pictures differ in that alone: one that comes or goes renames the other.

    Raises:
        ValueError: naming the first.
    """
    names, val_names = {picture.name for picture in pictures}, read_validation(labels_dir)
    for picture in pictures:
        if "\n" in picture.name or picture.name != picture.name.encode(errors="ignore").decode():
            raise ValueError(f"input has {str(picture)!r}, whose name is not one line of UTF-8; rename the file")
        stem, suffix = picture.path.stem, picture.path.suffix[1:]
        before = f"{stem}_{suffix}" if picture.name == stem else stem
        path = record_path(labels_dir, before)
        image = skim_record(path).get("image") if before not in names else None
        is_of_it = isinstance(image, dict) and image.get("file_name") == picture.path.name
        if is_of_it or (before not in names and before in val_names and not path.exists()):
            raise ValueError(
                f"{picture} is {picture.name} now and was {before} in {labels_dir}: a file of its name with another "
                "suffix is new, or gone; rename one of the two"
            )


def record_path(labels_dir: Path, name: str) -> Path:
    """Give the path of a picture's record."""
    return labels_dir / "masks" / f"{name}.json"


def read_record(path: Path) -> dict:
    """Read the record of a picture; {} where there is none yet.

    Raises:
        ValueError: for a file that is no record of masks: it may be somebody's work, and is not overwritten.
    """
    if not path.exists():
        return {}
    record = listing.read_json(path)
    try:
        size = [record["image"]["height"], record["image"]["width"]]
        if not all(type(side) is int and side > 0 for side in size):
            raise TypeError(f"a picture of {size} px")
        for annotation in record["annotations"]:
            if annotation["segmentation"]["size"] != size:
                raise ValueError(f"a mask of {annotation['segmentation']['size']} px in a picture of {size}")
            rle_to_part(annotation["segmentation"])
        if not isinstance(record.get("rejected", []), list):
            raise TypeError("its rejected is no list")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no record of masks, run lengths in SA-1B's layout; move it away ({error})"
        ) from error
    return record


def skim_record(path: Path) -> dict:
    """Read the record of a picture without a look at its masks, which take most of the time; {} where there is none.

    Raises:
        ValueError: for a file that is no record.
    """
    if not path.exists():
        return {}
    record = listing.read_json(path)
    annotations = record.get("annotations") if isinstance(record, dict) else None
    is_record = isinstance(annotations, list) and all(isinstance(annotation, dict) for annotation in annotations)
    if not is_record or not isinstance(record.get("rejected", []), list):
        raise ValueError(f"{path} is no record of masks, run lengths in SA-1B's layout; move it away")
    return record


def write_labels(
    labels_dir: Path,
    picture: images.Picture,
    orig_hw: tuple[int, int],
    record: dict,
    label_map: np.ndarray | None = None,
) -> dict:
    """Write a picture's map and, last, its record: what a kill leaves between them is made again (`restore_map`).

    Args:
        record: "annotations" in the order of the map, the lowest first, and what else the record has.
        label_map: int32 (H, W), as `draw_map` draws it, where that is done already.
    Returns:
        the record as it is written, its annotations numbered.
    """
    annotations = [annotation | {"id": number} for number, annotation in enumerate(record["annotations"], 1)]
    image = {"file_name": picture.path.name, "height": orig_hw[0], "width": orig_hw[1]}
    record = record | {"image": image, "annotations": annotations}
    label_map = draw_map(annotations, orig_hw) if label_map is None else label_map
    images.write_label_map(labels_dir / "maps" / f"{picture.name}.png", label_map)
    write_json(record_path(labels_dir, picture.name), record)
    return record


def restore_map(labels_dir: Path, name: str, record: dict) -> None:
    """Draw a picture's map again where it is missing, or younger than its record: a kill came between the two."""
    path, map_path = record_path(labels_dir, name), labels_dir / "maps" / f"{name}.png"
    if not map_path.exists() or map_path.stat().st_mtime_ns > path.stat().st_mtime_ns:
        orig_hw = record["image"]["height"], record["image"]["width"]
        images.write_label_map(map_path, draw_map(record["annotations"], orig_hw))


def draw_map(annotations: list[dict], orig_hw: tuple[int, int]) -> np.ndarray:
    """Draw the masks of a record, later ones on top: int32 (H, W), each mask's place from 1."""
    label_map = np.zeros(orig_hw, np.int32)
    for number, annotation in enumerate(annotations, 1):
        part, (x, y) = rle_to_part(annotation["segmentation"])
        label_map[y : y + part.shape[0], x : x + part.shape[1]][part] = number
    return label_map


# ---------------------------------------------------------------------------------------------------------------------
# which pictures validate, which are finished


def draw_validation(labels_dir: Path, names: set[str], val_fraction: float, seed: int) -> set[str]:
    """Read which pictures validate, or draw them: once, so that later ones train; of a single one none."""
    path = labels_dir / "val.txt"
    if not path.exists() and len(names) == 1 and val_fraction < 1:
        return set()  # drawn when there are more
    if not path.exists():
        val_names, _ = listing.draw_split(names, val_fraction, seed)
        _write_names(path, val_names)
    return read_validation(labels_dir)


def read_validation(labels_dir: Path) -> set[str]:
    """Read which pictures validate; none where that was not drawn yet."""
    names = _read_names(labels_dir / "val.txt")
    return names | {name.strip() for name in names}  # people edit this file, too


def read_done(labels_dir: Path) -> set[str]:
    """Read which pictures a person has finished."""
    return _read_names(labels_dir / "done.txt")


def write_done(labels_dir: Path, names: set[str]) -> None:
    """Write which pictures a person has finished."""
    _write_names(labels_dir / "done.txt", names)


def _read_names(path: Path) -> set[str]:
    """Read names, one a line, as they are: a picture's may begin with # or end in a blank."""
    lines = listing.read_text(path).split("\n") if path.exists() else []
    return {line.removesuffix("\r") for line in lines} - {""}


def _write_names(path: Path, names: set[str]) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(f"{name}\n" for name in sorted(names)), encoding="utf-8")
    partial.replace(path)


def list_records(folder: Path) -> dict[str, Path]:
    """Find the records in a folder of labels, or of the json files of infer_sam2.py: {picture's name: file}."""
    place = folder / "masks" if (folder / "masks").is_dir() else folder
    if not place.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of labels")
    files = listing.files_by_name(place, suffixes=(".json",))
    return {name: path for name, path in files.items() if name != "run"}
