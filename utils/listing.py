"""Which files a dataset has, which picture belongs to which annotation, and which of them validate or test."""

import codecs
import hashlib
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from utils.images import PICTURE_SUFFIXES

MAX_LISTED = 5  # examples of what may be many
ANNOTATION_SUFFIXES = (".png", *PICTURE_SUFFIXES)  # the first is what a missing annotation is said to be


class Pair(NamedTuple):
    """A picture and its annotation; the path of one that is not there is where it was looked for."""

    name: str  # the stem without what `pair_files` was told to leave out, below its subfolders: a/001
    image_path: Path
    annotation_path: Path


def dataset_folder(root: str | Path) -> Path:
    """Turn the setting `data.root` into a folder that is there.

    Raises:
        FileNotFoundError: for what is none.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"data.root {root} is not a folder (seen from {Path.cwd()}); set data.root to the dataset's folder, "
            "or data_root (environment variable DATA_ROOT) to the folder that holds your datasets"
        )
    return Path(root)


def existing_file(path: str | Path, key: str) -> Path:
    """Give the path of a file that a key of the config names; FileNotFoundError names both where it is not there."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{key} is {path}; no such file (seen from {Path.cwd()}): correct the path")
    return path


def first_few(lines: list[str], most: int | None = MAX_LISTED) -> list[str]:
    """Keep the first lines of a list that may be long, and say how many more there are; None keeps all."""
    if most is None or len(lines) <= most:
        return lines
    return [*lines[:most], f"... and {len(lines) - most} more"]


# ---------------------------------------------------------------------------------------------------------------------
# files and pairs


def list_folders(root: Path) -> list[Path]:
    """List the folders in a folder, sorted by name, and links to nothing; hidden ones and files are passed over."""
    _check_folder(root)
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir() or (entry.is_symlink() and not entry.is_file())]
    folders = [root / name for name in sorted(names) if not name.startswith(".")]
    return [folder for folder in folders if not (is_dead_link(folder) and folder.suffix)]


def files_by_name(
    folder: Path,
    affixes: tuple[str, str] = ("", ""),
    suffixes: tuple[str, ...] = PICTURE_SUFFIXES,
    with_subfolders: bool = False,
) -> dict[str, Path]:
    """List the files of a folder whose stem is <start><name><ending>: {name: path}, in the order of the paths.

    Hidden files and folders, and files with other suffixes, are passed over. Links are followed; one to nothing is a
    file, whose reading says so. A letter with an accent is one character in names, however the file system writes it.

    Args:
        affixes: (start, ending).
        suffixes: lower case; those of the files may be of any case.
        with_subfolders: also those in folders below, which then stand before the name: a/b/<name>.
    Raises:
        FileNotFoundError, ValueError: for a folder that is not there; for two files of one name.
    """
    _check_folder(folder)
    start, ending = affixes
    files = {}
    for path in sorted(_walk(folder) if with_subfolders else folder.iterdir()):
        below = path.relative_to(folder)
        if any(part.startswith(".") for part in below.parts) or path.suffix.lower() not in suffixes or path.is_dir():
            continue
        stem = path.stem.removeprefix(start).removesuffix(ending)
        if not stem or start + stem + ending != path.stem:
            continue
        name = unicodedata.normalize("NFC", below.with_name(stem).as_posix())
        if name in files:
            raise ValueError(f"{files[name]} and {path} have the same name but for the suffix; keep one of them")
        files[name] = path
    return files


def pair_files(
    image_dir: Path,
    annotation_dir: Path,
    image_affixes: tuple[str, str] = ("", ""),
    annotation_affixes: tuple[str, str] = ("", ""),
    annotation_suffixes: tuple[str, ...] = ANNOTATION_SUFFIXES,
    with_subfolders: bool = False,
) -> list[Pair]:
    """Match pictures and annotations by name, sorted by name; one kind may lie in the other's folder, or below it.

    Args:
        image_affixes, annotation_affixes, with_subfolders: what stands around the names (see `files_by_name`).
        annotation_suffixes: the first is what a missing annotation is said to be; a missing picture is a .jpg.
    Raises:
        FileNotFoundError, ValueError: as `files_by_name`. `stop_at_missing` looks for pairs that lack a file.
    """
    images = files_by_name(image_dir, image_affixes, with_subfolders=with_subfolders)
    annotations = files_by_name(annotation_dir, annotation_affixes, annotation_suffixes, with_subfolders)
    if image_dir == annotation_dir:  # what fits any file fits those of the other kind too
        image_paths, annotation_paths = set(images.values()), set(annotations.values())
        if image_affixes == ("", ""):
            images = {name: path for name, path in images.items() if path not in annotation_paths}
        elif annotation_affixes == ("", ""):
            annotations = {name: path for name, path in annotations.items() if path not in image_paths}
    elif image_dir in annotation_dir.parents:
        images = {name: path for name, path in images.items() if annotation_dir not in path.parents}
    elif annotation_dir in image_dir.parents:
        annotations = {name: path for name, path in annotations.items() if image_dir not in path.parents}
    pairs = []
    for name in sorted(images.keys() | annotations.keys()):
        below, stem = Path(name).parent, Path(name).name
        image_path = image_dir / below / f"{stem.join(image_affixes)}.jpg"
        annotation_path = annotation_dir / below / f"{stem.join(annotation_affixes)}{annotation_suffixes[0]}"
        pairs.append(Pair(name, images.get(name, image_path), annotations.get(name, annotation_path)))
    return pairs


def find_missing(paths: list[tuple[Path, Path]]) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
    """Find the (picture, annotation) paths without an annotation, and those without a picture.

    A link to nothing is there, and cannot be read.
    """
    without_annotation = [pair for pair in paths if not os.path.lexists(pair[1])]  # a folder of masks, too
    return without_annotation, [pair for pair in paths if not os.path.lexists(pair[0])]


def stop_at_missing(paths: list[tuple[Path, Path]], on_bad: str, kind: str = "annotation", remedy: str = "") -> None:
    """Raise a FileNotFoundError that names the first (picture, annotation) of which one is not there.

    Args:
        on_bad: "stop", or "skip": such pairs stay, and the dataset check leaves them out and counts them.
        kind: what an annotation is called.
        remedy: if there is a better one than to complete or remove the pair.
    """
    if on_bad not in ("stop", "skip"):
        raise ValueError(f"data.on_bad is {on_bad!r}; must be stop or skip")
    without_annotation, without_image = ([], []) if on_bad == "skip" else find_missing(paths)
    if without_annotation or without_image:
        examples = [f"image {image} has no {kind} {annotation}" for image, annotation in without_annotation[:1]]
        examples += [f"{kind} {annotation} has no image {image}" for image, annotation in without_image[:1]]
        raise FileNotFoundError(
            f"{len({*without_annotation, *without_image})} of {len(paths)} pairs lack a file; "
            f"{' and '.join(examples)}; {remedy or 'complete or remove the pair'}, list all with check=true, or leave "
            "such pairs out with data.on_bad=skip"
        )


def is_dead_link(path: Path) -> bool:
    """Tell whether a path is a link to a file that is not there, as those of git-annex and DVC before a fetch."""
    return path.is_symlink() and not path.exists()


def _walk(folder: Path, above: tuple[str, ...] = ()) -> list[Path]:
    """List the files in a folder and below, through links to folders too, but not in a circle."""
    above = (*above, os.path.realpath(folder))
    files = []
    for path in folder.iterdir():
        if path.is_dir():
            files += [] if os.path.realpath(path) in above else _walk(path, above)
        else:
            files.append(path)
    return files


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; see data/README.md for the layout, or change data.root")


# ---------------------------------------------------------------------------------------------------------------------
# list files and splits


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 with its mark, as spreadsheets and Windows' editor write it.

    Raises:
        OSError: where it cannot be read.
        ValueError: for another encoding, naming the file and the line.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not text in UTF-8 (line {line}: {error.reason}); save it as UTF-8") from error


def read_json(path: str | Path) -> object:
    """Read a json file, in the encodings of `read_text`.

    Raises:
        OSError: where it cannot be read.
        ValueError: for one that is not json, naming it.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # RecursionError: lists in lists in lists, thousands deep
        raise ValueError(f"{path} is not valid json ({error}); copy or export it again") from error


def read_lines(path: str | Path) -> list[str]:
    """Return a text file's lines, less empty ones and those that start with #."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no list file {path} (seen from {Path.cwd()}); see data/README.md for the layout")
    lines = [line.strip() for line in read_text(path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def read_list(path: str | Path, names: set[str], affixes: tuple[str, str] = ("", "")) -> list[str]:
    """Read which names a list file names, one a line.

    Args:
        names: those of the dataset.
        affixes: what stands before and after the name in the stem of a picture's file.
    Returns:
        of each line the one among names that is: the line, or its first word where columns follow; the end of that
        path, less suffix and affixes; its file name; or the folder of the file (DAVIS 2016 lists a sequence by the
        paths of its frames); or else the only name that ends in the whole line, with or without suffix (COCO's do).
    Raises:
        FileNotFoundError, ValueError: for a file that is not there; a line that is no name.
    """
    named, names_by_end = [], _find_ends(names)
    for line in read_lines(path):
        line = unicodedata.normalize("NFC", line.replace("\\", "/"))
        words = line.split()
        has_columns = len(words) > 1 and all(_is_column(word) for word in words[1:])
        name = None
        for entry in (line, words[0])[: 1 + has_columns]:
            entry_path = Path(entry)
            parts = [*entry_path.parts[:-1], entry_path.stem.removeprefix(affixes[0]).removesuffix(affixes[1])]
            ends = ["/".join(parts[start:]) for start in range(len(parts))]
            whole_ends = ["/".join(entry_path.parts[start:]) for start in range(len(parts))]
            candidates = [entry, *ends, *whole_ends, entry_path.name, entry_path.parent.name]
            name = name or next((candidate for candidate in candidates if candidate in names), None)
            lines = entry, ends[0], whole_ends[0]  # whole: an end of the line may be that of another folder's file
            name = name or next((names_by_end[end] for end in lines if end in names_by_end), None)
        if name is None:
            example = min(names, default="")
            raise ValueError(f"{path} names {line!r}, which the dataset lacks; names look like {example!r}")
        named.append(name)
    return named


def _find_ends(names: set[str]) -> dict[str, str]:
    """List the ends of names that are paths, with and without suffix, that are those of one name alone."""
    names_by_end = {}
    for name in names:
        parts = name.split("/")
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            for each in {end, os.path.splitext(end)[0]}:
                names_by_end.setdefault(each, []).append(name)
    return {end: those[0] for end, those in names_by_end.items() if len(those) == 1}


def _is_column(word: str) -> bool:
    """Tell whether a word after a name is of a further column: a number (pets, VOC), or a path (CamVid, DAVIS)."""
    return "/" in word or word.lstrip("+-").replace(".", "", 1).isdigit()


def draw_split(
    names: set[str], val_fraction: float, split_seed: int, test_fraction: float = 0.0
) -> tuple[set[str], set[str]]:
    """Draw fractions of names by a seeded order of them: a new name does not reshuffle the others.

    Returns:
        the names for validation and those for test; each part whose share is not 0, training too, gets a name.
    Raises:
        ValueError: for a fraction outside 0..1, fractions of over 1 together, and fewer names than parts.
    """
    for key, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction <= 1:
            raise ValueError(f"data.{key} is {fraction}; must be in 0..1")
    if val_fraction + test_fraction > 1:
        raise ValueError(f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction} add up to over 1")
    shares = [val_fraction, test_fraction, max(0.0, 1 - val_fraction - test_fraction)]
    num_val = round(val_fraction * len(names))
    num_test = round((val_fraction + test_fraction) * len(names)) - num_val
    counts = [num_val, num_test, len(names) - num_val - num_test]
    wanted = [index for index, share in enumerate(shares) if share > 1e-9]
    if 0 < len(names) < len(wanted) and test_fraction == 0:
        raise ValueError(
            f"data.val_fraction is {val_fraction}, but there is only {min(names)} to split; "
            "add a second one, or set data.val_fraction=1 to evaluate alone, with train.steps=0"
        )
    if 0 < len(names) < len(wanted):
        raise ValueError(
            f"data.val_fraction is {val_fraction} and test_fraction {test_fraction}, but there are only {len(names)} "
            "pictures to split; set those that are not needed to 0"
        )
    for index in wanted:
        if names and counts[index] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[index] += 1
    keys = {name: f"{split_seed} {name}".encode(errors="surrogateescape") for name in names}
    in_seeded_order = sorted(names, key=lambda name: hashlib.sha256(keys[name]).digest())
    return set(in_seeded_order[: counts[0]]), set(in_seeded_order[counts[0] :][: counts[1]])


def sort_splits(splits: list[list], root: str | Path, format: str, rule: str) -> list[list]:
    """Sort the items of each split by name, having seen that there are items, and none of one name.

    Args:
        splits: lists of items that have a `name`.
        root, format: data.root and data.format, for messages.
        rule: what a dataset that lists an item twice breaks.
    """
    counts = Counter(item.name for split in splits for item in split)
    if not counts:
        raise ValueError(f"data.root {root} holds no pictures in the layout {format!r} (see data/README.md)")
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise ValueError(f"{root} lists {name} {count} times; {rule}")
    return [sorted(split, key=lambda item: item.name) for split in splits]
