"""Pictures with annotated objects as class maps: which classes a dataset has, and which object a pixel shows.

The layouts are those of utils/instances/readers.py. Class 0 is the background, where no object lies.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from utils.images import IGNORE_INDEX
from utils.instances.readers import Instances, Item, class_name, is_marked_crowd, plain_id
from utils.listing import first_few

BACKGROUND, ONE_CLASS = "background", "object"
WITHOUT_CLASSES = ("label_map", "masks_per_file", "davis")  # formats whose files name no classes
MOST_CLASSES = 253  # beside the background, in maps of 8 bits with two values that are no class


def is_background(name: str) -> bool:
    """Tell whether a class of objects is named as the background is: background, _background_ (labelme)."""
    return name.strip("_ ").casefold() == BACKGROUND


def list_classes(format: str, items: list[Item], ignore_labels: list[str]) -> list[str]:
    """List the classes of a dataset's objects: in the order of its own list, sorted where the format has none.

    Args:
        items: those of all splits together.
        ignore_labels: names that are no classes.
    Returns:
        names, without the background's; of objects that have none: [ONE_CLASS].
    Raises:
        ValueError: for objects with several numbers of classes and no names.
    """
    names = [*dict.fromkeys(name for item in items for name in item.classes)]
    if not names and format not in WITHOUT_CLASSES:  # only the objects themselves say
        with ThreadPoolExecutor() as executor:
            of_pictures = tqdm(executor.map(_list_kinds, items), "classes", len(items), leave=False, disable=None)
            kinds = set().union(*of_pictures)
        names = sorted({name for name, _ in kinds if name.strip()})
        numbers = sorted({str(number) for name, number in kinds if number is not None})
        if not names and len(numbers) > 1:
            raise ValueError(
                f"the objects have the class numbers {', '.join(first_few(numbers))}, and the files name none of them: "
                f"add the names (COCO: categories), or take all as one class with data.classes=[{ONE_CLASS}]"
            )
    names = [name for name in names if name.strip() and name not in ignore_labels and not is_background(name)]
    return names or [ONE_CLASS]


def _list_kinds(item: Item) -> set[tuple[str, int | str | None]]:
    """Return the names and numbers of the classes of a picture's objects; none of files that cannot be read."""
    try:
        annotations = item.read().annotations
    except (OSError, ValueError):  # the check says so
        return set()
    return {(class_name(annotation), plain_id(annotation.get("category_id"))) for annotation in annotations}


def draw_classes(
    instances: Instances,
    class_names: tuple[str, ...],
    order: str,
    crowd: str,
    ignore_labels: tuple[str, ...],
) -> np.ndarray:
    """Draw the objects of a picture as a class map.

    Objects of classes that are not among class_names are as if they were not annotated; those without a class are
    ignored, unless all are of ONE_CLASS.

    Args:
        class_names: the background's first.
        order: what lies on top: "size", the object with fewer pixels, of equal ones the later in the file; or "file",
            the later in the file.
        crowd: regions marked so: "ignore": they are ignored, below all objects; "skip": passed over; "keep": objects.
        ignore_labels: names of classes whose pixels are ignored.
    Returns:
        uint8 (H, W): classes, and IGNORE_INDEX.
    """
    values = {name: index for index, name in enumerate(class_names)} | dict.fromkeys(ignore_labels, IGNORE_INDEX)
    without_name = values.get(ONE_CLASS, IGNORE_INDEX)
    if not instances.annotations:  # ids are those of the file, and nothing names their classes
        class_map = np.where((instances.layers > 0).any(0), without_name, 0).astype(np.uint8)
    else:
        num_objects = len(instances.annotations)
        areas_px = sum(np.bincount(layer.ravel(), minlength=num_objects + 1) for layer in instances.layers)
        drawn = []  # of each object: what it is drawn after, its id, its value
        for object_id, annotation in enumerate(instances.annotations, 1):
            name = class_name(annotation)
            is_crowd = is_marked_crowd(annotation)
            if is_crowd and crowd == "skip":
                continue
            is_ignored_crowd = is_crowd and crowd == "ignore"
            value = 0 if is_background(name) else values.get(name) if name.strip() else without_name
            if value is not None:
                place = (not is_ignored_crowd, -areas_px[object_id] if order == "size" else 0, object_id)
                drawn.append((place, object_id, IGNORE_INDEX if is_ignored_crowd else value))
        ranks, value_of_rank = np.zeros(num_objects + 1, np.int32), np.zeros(num_objects + 1, np.uint8)
        for rank, (_, object_id, value) in enumerate(sorted(drawn), 1):
            ranks[object_id], value_of_rank[rank] = rank, value
        top = np.zeros(instances.layers.shape[1:], np.int32)
        for layer in instances.layers:
            np.maximum(top, ranks[layer], out=top)
        class_map = value_of_rank[top]  # (H, W)
    if instances.ignored is not None:
        class_map[instances.ignored] = IGNORE_INDEX
    return class_map
