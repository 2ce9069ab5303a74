"""The Segment Anything paper's experiments on a dataset of pictures with object masks: `infer_sam2.py mode=benchmark`.

Each picture is encoded once for all protocols. What is measured of it is kept in a file of its own, from which every
number of the table is computed, for all pictures or any choice of them: a killed run goes on where it was, and two runs
are compared on resampled pictures (utils/sam2/compare.py).

clicks      clicks in the centre of the largest error, the earlier logits fed back; of each object the IoU after 1, 2,
            3, 5 and 9 of the mask of highest predicted IoU, of the best of three after one, from the exact box; NoC@85
            and NoC@90, the number of clicks to that IoU, 20 where 20 do not reach it, and the share of these objects
proposals   masks from a grid of points, ranked by the mean of predicted IoU and stability; class-agnostic average
            recall of the first 10, 100 and 1000 of a picture
boxes       masks from boxes, those of the objects or of a detector, decoded again with their own logits; average
            precision
groups      clicks at 1 and 3 by the value of an attribute
edges       utils/sam2/edges.py

Sources: Kirillov et al., "Segment Anything", 2023, sections 7 and D; the areas and averages of COCO. Where the paper is
silent: a click's centre is that of RITM; the grid's masks are not filtered by quality; boxes are scored, where no
detector scores them, by predicted IoU.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from utils import dataset_check, run
from utils.dataset_check import check_items
from utils.images import mask_to_box, read_image
from utils.instances.check import check_item, report_lines
from utils.instances.readers import Item, check_same_size, class_key, list_items, plain_id, split_items
from utils.listing import existing_file, first_few, read_json, read_text
from utils.log import drawing, write_json
from utils.sam2 import detection_metrics as metrics
from utils.sam2 import edges
from utils.sam2 import model as models
from utils.sam2.protocols import (
    AT_MOST,
    CLICKS,
    NO_CLASS,
    ProposalSettings,
    Record,
    Table,
    Truth,
    class_precisions,
    interval,
    join,
    measure_boxes,
    measure_clicks,
    measure_proposals,
    number_class,
    read_truth,
    summarize,
    summarize_groups,
)
from utils.settings import Rule, at_least, between, is_number, is_numbers, one_of

PROTOCOLS = ("clicks", "proposals", "boxes", "edges", "groups")
TRAINING_KEYS = ("generate", "min_area_px", "hflip", "color_jitter")  # of `data` in train_sam2.py, beside its reader's
MOST_OBJECTS, NUM_CHOSEN = 15_000, 10_000  # of a larger dataset so many are clicked


@dataclass(frozen=True)
class EdgeSettings:
    """The edges (`benchmark.edges:`)."""

    root: str  # of BSDS500
    split: Annotated[str, one_of("train", "val", "test")]
    points_per_side: Annotated[int, at_least(1)]
    box_nms_thresh: Annotated[float, between(0, 1)]


@dataclass(frozen=True)
class BenchmarkSettings:
    """The section `benchmark` of configs/sam2/infer_sam2.yaml, which explains each key."""

    protocols: Annotated[
        list[str],
        Rule(lambda names: names and set(names) <= set(PROTOCOLS), f"a list of some of {', '.join(PROTOCOLS)}"),
    ]
    detections: str | None  # COCO result file; None: the objects' own boxes
    groups: str | None  # a key of COCO's attributes, or a csv
    proposals: ProposalSettings
    edges: EdgeSettings

    def __post_init__(self):
        if ("groups" in self.protocols) != (self.groups is not None):
            given = "null" if self.groups is None else self.groups
            raise ValueError(
                f"benchmark.groups is {given}; must be an attribute or a csv file with groups among "
                "benchmark.protocols, and null without"
            )
        if self.detections is not None and "boxes" not in self.protocols:
            raise ValueError(f"benchmark.detections is {self.detections}, but boxes is not among benchmark.protocols")


class Given(NamedTuple):
    """What is given beside a dataset's pictures."""

    chosen: dict[str, np.ndarray]  # places of the objects that are clicked, by picture
    detections: dict[str, list[dict]] | None  # by picture; None: the objects' own boxes
    groups_csv: dict[tuple[str, int], str] | None  # from `read_groups`; None: benchmark.groups is an attribute
    class_ids: dict[int | str, int]  # the number of each class, by its `class_key`; {}: all are of one class
    keeps_crowds: bool  # regions marked iscrowd are objects like others


# ---------------------------------------------------------------------------------------------------------------------
# files of a picture


def write_record(folder: Path, stem: str, record: Record, results: dict[str, list[dict]]) -> None:
    """Write what was measured of a picture, the record last: where it is, all is."""
    for protocol, entries in results.items():
        _replace(folder / f"{stem}_{protocol}.json", json.dumps(entries).encode())
    path = folder / f"{stem}.npz.tmp"
    with path.open("wb") as file:
        np.savez(file, **{key.replace("/", "."): value for key, value in record.items()})
    os.replace(path, folder / f"{stem}.npz")


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(data)
    os.replace(partial, path)


def read_record(path: Path) -> Record:
    """Read a record that `write_record` wrote; ValueError for a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key.replace(".", "/"): arrays[key] for key in arrays.files}
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); measure again") from error


def join_results(folder: Path, protocol: str, num_pictures: int, path: Path) -> None:
    """Write the masks of all pictures as one COCO result file, without holding more than one picture's."""
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        is_first = True
        for number in range(num_pictures):
            for entry in json.loads((folder / f"data_{number:06d}_{protocol}.json").read_text(encoding="utf-8")):
                file.write(("" if is_first else ",") + "\n" + json.dumps(entry))
                is_first = False
        file.write("\n]\n")


# ---------------------------------------------------------------------------------------------------------------------
# what is given beside the dataset


def read_detections(
    path: str, places: dict[int | str, tuple[str, tuple[int, int]]], class_ids: dict[int | str, int]
) -> tuple[dict[str, list[dict]], str]:
    """Read a COCO result file of boxes.

    Args:
        places: {COCO's id of a picture: its name and its size}.
        class_ids: as for `read_truth`.
    Returns:
        {name: [{"bbox": [x, y, w, h], "score", "category_id"}, ...]}; what is to be said of them, or "".
    """
    entries = read_json(existing_file(path, "benchmark.detections"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"benchmark.detections {path}: must be a list of results, with one at least")
    of_picture, strange, outside, unknown = {}, [], [], []
    for entry in entries:
        is_whole = isinstance(entry, dict) and is_numbers(entry.get("bbox"), 4) and is_number(entry.get("score"))
        if not is_whole or min(entry["bbox"][2:]) <= 0:
            raise ValueError(
                f"benchmark.detections {path}: {str(entry)[:80]} must have bbox, [x, y, width, height], and score"
            )
        image_id = entry.get("image_id")
        image_id = plain_id(image_id) if isinstance(image_id, int | float | str) else None
        if image_id not in places:
            strange.append(str(entry.get("image_id")))
            continue
        (name, (height, width)), (x, y, box_width, box_height) = places[image_id], entry["bbox"]
        if x >= width or y >= height or x + box_width <= 0 or y + box_height <= 0:
            outside.append(str(entry)[:80])
            continue
        class_id = number_class(entry, class_ids)
        if class_id == NO_CLASS:
            unknown.append(str(class_key(entry)))
        detection = {"bbox": entry["bbox"], "score": float(entry["score"]), "category_id": class_id}
        of_picture.setdefault(name, []).append(detection)
    if strange:
        named = ", ".join(first_few(sorted(set(strange)), 5))
        raise ValueError(
            f"benchmark.detections {path}: {len(strange)} of {len(entries)} entries are of pictures that are not "
            f"measured, such as image_id {named}; leave them out, or choose their split"
        )
    if outside:
        raise ValueError(
            f"benchmark.detections {path}: {len(outside)} of {len(entries)} boxes lie outside their picture, such as "
            f"{outside[0]}"
        )
    note = ""
    if unknown:
        named, known = (", ".join(first_few(sorted(set(map(str, each))), 5)) for each in (unknown, class_ids))
        note = (
            f"{len(unknown)} of {len(entries)} detections are of categories that no object has ({named}); the objects' "
            f"are {known}"
        )
    if len(unknown) == len(entries):
        raise ValueError(f"benchmark.detections {path}: {note}")
    return of_picture, note


def read_groups(path: str) -> dict[tuple[str, int], str]:
    """Read a csv with the columns picture, object and value: {(picture, id): value}.

    A picture is named as in data.json, an object by its annotation's id in a json file, else by that of its mask.
    """
    rows = csv.DictReader(io.StringIO(read_text(existing_file(path, "benchmark.groups"))), skipinitialspace=True)
    if not {"picture", "object", "value"} <= set(rows.fieldnames or []):
        raise ValueError(f"benchmark.groups {path} has the columns {rows.fieldnames}; must be picture,object,value")
    groups = {}
    for row in rows:
        object_id = plain_id(row["object"])
        if type(object_id) is not int or (row["picture"], object_id) in groups:
            what = "is there twice" if type(object_id) is int else "must be an object's id, a number"
            raise ValueError(f"benchmark.groups {path}: {row['picture']}, {row['object']} {what}")
        groups[unicodedata.normalize("NFC", row["picture"]), object_id] = row["value"] or ""
    return groups


def choose_objects(places: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Choose which objects of each picture, by their places, are clicked: all, of more than 15,000 a seeded 10,000."""
    num_objects = sum(map(len, places.values()))
    if num_objects <= MOST_OBJECTS:
        return places
    is_chosen = np.zeros(num_objects, bool)
    is_chosen[np.random.default_rng(seed).permutation(num_objects)[:NUM_CHOSEN]] = True
    ends = np.cumsum([len(own) for own in places.values()])
    return {name: own[is_chosen[end - len(own) : end]] for (name, own), end in zip(places.items(), ends, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# the whole run


@torch.inference_mode()
def measure_pictures(
    model: torch.nn.Module,
    items: list[Item],
    given: Given,
    settings: BenchmarkSettings,
    precision: str,
    folder: Path,
) -> None:
    """Measure each picture that has no record yet, and write its record and its masks.

    Args:
        folder: of the records, data_000000.npz and so on.
    """
    protocols = set(settings.protocols)

    def read(number: int) -> tuple[np.ndarray, Truth] | None:
        if (folder / f"data_{number:06d}.npz").exists():
            return None
        item = items[number]
        image_rgb, instances = read_image(item.image_path), item.read()
        check_same_size(item, image_rgb.shape[:2], instances.layers.shape[1:])
        truth = read_truth(instances, given.class_ids)
        return image_rgb, truth._replace(is_crowd=np.zeros_like(truth.is_crowd)) if given.keeps_crowds else truth

    progress = tqdm(items, desc="measure", unit="image", disable=None)
    with run.start_threads() as threads:
        readings = run.read_ahead(read, range(len(items)))
        for number, (item, reading) in enumerate(zip(progress, readings, strict=True)):
            if reading.result() is None:
                continue
            image_rgb, truth = reading.result()
            orig_hw, record, results = image_rgb.shape[:2], {}, {}
            clicked = given.chosen[item.name]
            embeddings = None
            if len(clicked) or protocols & {"proposals", "boxes"}:
                with run.autocast(model.device, precision):
                    images = models.preprocess(image_rgb, model.image_size, model.device)[None]
                    embeddings = models.encode(model, images)
            if protocols & {"clicks", "groups"}:
                is_short = "clicks" not in protocols
                record |= measure_clicks(model, embeddings, truth, clicked, is_short, precision, threads)
            if "groups" in protocols:
                record["clicks/group"] = name_groups(item, truth, clicked, settings.groups, given.groups_csv)
            if "proposals" in protocols:
                with run.autocast(model.device, precision):
                    for is_single in (False, True)[: 1 + settings.proposals.single_mask]:
                        measured, masks = measure_proposals(
                            model, embeddings, image_rgb, truth, settings.proposals, is_single
                        )
                        record |= measured
                        results |= {} if is_single else {"proposals": masks}
            if "boxes" in protocols:
                boxes_xyxy, scores, classes = list_boxes(item, truth, given.detections, orig_hw)
                measured, results["boxes"] = measure_boxes(
                    model, embeddings, truth, boxes_xyxy, scores, classes, orig_hw, precision
                )
                record |= measured
            image_id = number + 1 if truth.image_id is None else truth.image_id
            results = {name: [{"image_id": image_id} | entry for entry in entries] for name, entries in results.items()}
            write_record(folder, f"data_{number:06d}", record, results)


def name_groups(
    item: Item, truth: Truth, clicked: np.ndarray, attribute: str, groups_csv: dict[tuple[str, int], str] | None
) -> np.ndarray:
    """Name the group of each clicked object, str (O,); "" where the attribute is missing."""
    if groups_csv is not None:
        return np.array([groups_csv.get((item.name, int(truth.ids[place])), "") for place in clicked], str).astype("U")
    values = [truth.attributes[place].get(attribute) for place in clicked]
    return np.array(["" if value is None else str(value) for value in values], str).astype("U")


def list_boxes(
    item: Item, truth: Truth, detections: dict[str, list[dict]] | None, orig_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """List the boxes of a picture: float (D, 4) px, corners; scores (D,) or None; classes int64 (D,)."""
    if detections is None:
        places = np.flatnonzero(~truth.is_crowd)
        boxes = np.array([mask_to_box((truth.numbers == place + 1).any(0)) for place in places], np.float64)
        boxes = boxes.reshape(-1, 4)
        return boxes, None, truth.classes[places]
    entries = detections[item.name] if item.name in detections else []
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clip(0, [orig_hw[1], orig_hw[0], orig_hw[1], orig_hw[0]])
    scores = np.array([entry["score"] for entry in entries], np.float64)
    return boxes, scores, np.array([entry["category_id"] for entry in entries], np.int64)


@torch.inference_mode()
def measure_edges(
    model: torch.nn.Module,
    pictures: list[tuple[str, Path, Path]],
    settings: EdgeSettings,
    precision: str,
    folder: Path,
) -> None:
    """Measure the edges of each picture, from `list_bsds`, that has no record yet."""
    for number, (_, image_path, truth_path) in enumerate(tqdm(pictures, desc="edges", unit="image", disable=None)):
        if (folder / f"edges_{number:06d}.npz").exists():
            continue
        image_rgb, truths = read_image(image_path), edges.read_boundaries(truth_path)
        with run.autocast(model.device, precision):
            embeddings = models.encode(model, models.preprocess(image_rgb, model.image_size, model.device)[None])
            strength = edges.find_mask_edges(
                model, embeddings, image_rgb.shape[:2], settings.points_per_side, settings.box_nms_thresh
            )
        of_method = {"sam": strength, "sobel": edges.sobel_edges(image_rgb), "canny": edges.canny_edges(image_rgb)}
        record = {f"edges/{name}": edges.count_matches(strength, truths) for name, strength in of_method.items()}
        write_record(folder, f"edges_{number:06d}", record, {})


def load_records(run_dir: Path, kind: str) -> list[Record]:
    """Read the records of a run's pictures, "data" or "edges", in the order of data.json or edges.json."""
    path = run_dir / f"{kind}.json"
    num_pictures = len(read_json(path)["pictures"]) if path.is_file() else 0
    return [read_record(run_dir / "pictures" / f"{kind}_{number:06d}.npz") for number in range(num_pictures)]


def run_benchmark(
    model: torch.nn.Module,
    data: dict,
    split: str,
    settings: BenchmarkSettings,
    trained_on: dict | None,
    seed: int,
    precision: str,
    run_dir: Path,
    resumed_dir: Path | None,
) -> Table:
    """Measure a model by the chosen protocols, and write table.csv, COCO result files and a picture for each.

    Args:
        model: from `build_sam2`, in eval mode.
        data: the keys of the dataset's reader.
        split: val or train.
        trained_on: the `data` section of the config that the checkpoint was trained with; None: it names none.
        seed: of the choice among very many objects, and of intervals.
        run_dir: where everything is written; run.json is there.
        resumed_dir: the folder of a run that was cut off, whose records are taken over.
    Raises:
        ValueError, FileNotFoundError: for data, detections and groups that cannot be measured.
    """
    folder = run_dir / "pictures"
    folder.mkdir()
    prints = {"weights": digest_weights(model)}
    edge_pictures, items, given, notes = [], [], None, []
    if "edges" in settings.protocols:  # what cannot be measured is said before the hours of the rest
        edge_pictures = edges.list_bsds(Path(settings.edges.root), settings.edges.split)
        edges.read_boundaries(edge_pictures[0][2])
        write_json(run_dir / "edges.json", prints | {"pictures": [name for name, *_ in edge_pictures]})
    if set(settings.protocols) - {"edges"}:
        items, digests, given, notes = list_pictures(data, split, settings, trained_on, seed)
        files = [path for path in (settings.detections, settings.groups) if path is not None and Path(path).is_file()]
        prints |= {path: digest(Path(path).read_bytes()) for path in files}
        write_json(run_dir / "data.json", prints | {"pictures": [item.name for item in items], "digests": digests})
    if resumed_dir is not None:
        take_over_records(resumed_dir, run_dir)
    records = []
    if items:
        measure_pictures(model, items, given, settings, precision, folder)
        for protocol in {"proposals", "boxes"} & set(settings.protocols):
            join_results(folder, protocol, len(items), run_dir / f"{protocol}.json")
        records += load_records(run_dir, "data")
        notes += describe_groups(records, settings.groups, given)
    if edge_pictures:
        measure_edges(model, edge_pictures, settings.edges, precision, folder)
        records += load_records(run_dir, "edges")
    table = summarize(records)
    intervals = {}
    if "groups" in settings.protocols:
        clicked = [
            {key: record[key] for key in ("clicks/ious", "clicks/group")}
            for record in records
            if "clicks/group" in record
        ]
        intervals = interval(lambda places: summarize_groups([clicked[k] for k in places]), [len(clicked)], seed)
    write_table(run_dir / "table.csv", table, intervals, "; ".join(notes))
    draw_protocols(records, table, intervals, run_dir)
    print("\n".join(table_lines(table, intervals)))
    for note in notes:
        print(note)
    return table


def digest(data: bytes) -> str:
    """Give a short digest of a file, to tell whether it is still the same."""
    return hashlib.sha256(data).hexdigest()[:16]


def digest_weights(model: torch.nn.Module) -> str:
    """Give a short digest of a model's weights."""
    summed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        summed.update(name.encode() + numbers.tobytes())
    return summed.hexdigest()[:16]


def take_over_records(resumed_dir: Path, run_dir: Path) -> None:
    """Take over the records of a run that was cut off; one that is damaged is measured again.

    Raises:
        ValueError: where pictures, objects, weights or files given beside them are not those of that run any more.
    """
    for kind in ("data", "edges"):
        path = resumed_dir / f"{kind}.json"
        if not path.is_file():
            continue
        before, now = read_json(path), read_json(run_dir / f"{kind}.json")
        if changed := [key for key in now if key not in before or before[key] != now[key]]:
            raise ValueError(
                f"resume= is {resumed_dir}, whose {', '.join(changed)} ({kind}.json) are not those of now; start a new "
                "run"
            )
    for path in sorted((resumed_dir / "pictures").glob("*.npz")):
        try:
            read_record(path)
        except ValueError:
            continue
        for own in [path, *path.parent.glob(f"{path.stem}_*.json")]:
            shutil.copyfile(own, run_dir / "pictures" / own.name)


def one_split(data: dict, split: str) -> dict:
    """Let a COCO dataset with a json file for each split be the wanted one alone: the other need not be there."""
    if data["format"] != "coco" or data["val_annotations"] is None:
        return data
    own = {f"train_{key}": data[f"{split}_{key}"] for key in ("images", "annotations")}
    return data | own | {"val_annotations": None, "val_fraction": 1.0}


def list_pictures(
    data: dict, split: str, settings: BenchmarkSettings, trained_on: dict | None, seed: int
) -> tuple[list[Item], list[str], Given, list[str]]:
    """List and check a dataset's pictures, and read what is given beside it.

    Returns:
        the pictures, in the order of COCO's ids where they have some; a digest of each one's size and objects; what is
        given; and what is to be said of the numbers.
    """
    keeps_crowds = "crowd" in data and data["crowd"] == "keep"
    reader_keys = one_split(data, split)
    is_val = split == "val" or reader_keys is not data
    reader_keys = reader_keys | ({"crowd": "keep"} if "crowd" in data else {})  # crowds are ignored, not missed
    items = list_items(reader_keys, "data", is_check=False)[is_val]
    report = check_items(items, check_item)
    print("\n".join(report_lines(report)))
    dataset_check.keep_usable(items, report, data["on_bad"])  # which stops where it is to
    reports = {item.name: item for item in report.items if not item.faults}
    items = [item for item in items if item.name in reports]
    contents = {item.name: reports[item.name].content for item in items}
    if all(type(content.image_id) is int for content in contents.values()):  # predictions that tie are in their order
        items.sort(key=lambda item: contents[item.name].image_id)
    is_object = {
        name: np.ones_like(content.is_crowd) if keeps_crowds else ~content.is_crowd
        for name, content in contents.items()
    }
    if not any(are_objects.any() for are_objects in is_object.values()):
        raise ValueError(f"data.root {data['root']}: none of the {len(items)} pictures of split={split} has objects")
    classes, notes = set().union(*(content.classes for content in contents.values())), []
    names = sorted(key for key in classes if type(key) is str)
    highest = max((key for key in classes if type(key) is int), default=0)
    class_ids = {key: key for key in classes - set(names)} | {name: highest + k for k, name in enumerate(names, 1)}
    if "boxes" in settings.protocols and not classes:
        print("boxes: the objects have no categories: all are of one class")
    if "boxes" in settings.protocols and names:
        print(f"boxes: category_ids of boxes.json: {', '.join(f'{class_ids[name]} {name}' for name in names)}")
    detections = groups_csv = None
    if settings.detections is not None:
        places = {}
        for number, item in enumerate(items, 1):
            image_id = contents[item.name].image_id
            places[number if image_id is None else image_id] = item.name, reports[item.name].orig_hw
        detections, unknown = read_detections(settings.detections, places, class_ids)
        notes += [unknown] if unknown else []
    if settings.groups is not None and Path(settings.groups).suffix.lower() == ".csv":
        groups_csv = read_groups(settings.groups)
        named = {name for name, _ in groups_csv}
        if not named & set(contents):
            raise ValueError(
                f"benchmark.groups {settings.groups} names none of the measured pictures: it has "
                f"{', '.join(first_few(sorted(named), 1)) or 'no rows'}, they are named like {items[0].name}"
            )
    elif settings.groups is not None:
        there = set().union(*(content.attributes for content in contents.values()))
        if settings.groups not in there:
            raise ValueError(
                f"benchmark.groups is {settings.groups}: none of the objects has it; they have "
                f"{', '.join(sorted(map(str, there))) or 'no attributes'}"
            )
    if trained_on is not None and (note := describe_training(trained_on, items)):
        notes.append(note)
    chosen = choose_objects({item.name: np.flatnonzero(is_object[item.name]) for item in items}, seed)
    digests = [
        digest(repr((reports[name].orig_hw, content.areas_px.tolist(), content.centers_xy.round(4).tolist())).encode())
        for name, content in ((item.name, contents[item.name]) for item in items)
    ]
    return items, digests, Given(chosen, detections, groups_csv, class_ids, keeps_crowds), notes


def describe_groups(records: list[Record], groups: str | None, given: Given) -> list[str]:
    """Say how many objects have no group, and how many lines of a csv met no object."""
    if groups is None:
        return []
    named = join(records, "clicks/group")
    if not (named != "").any():
        raise ValueError(f"benchmark.groups is {groups}: none of the {len(named)} objects has it")
    notes = []
    if num_without := int((named == "").sum()):
        notes.append(f"groups: {num_without} of {len(named)} objects lack {groups}, and do not count")
    if given.groups_csv is not None and len(given.groups_csv) > len(named):
        notes.append(f"groups: {groups} names {len(given.groups_csv)} objects, but {len(named)} were clicked")
    return notes


def describe_training(trained_on: dict, items: list[Item]) -> str:
    """Say how many of the measured pictures the checkpoint's config names among its training pictures."""
    keys = {key: value for key, value in trained_on.items() if key not in TRAINING_KEYS}
    unknown = "whether some of the measured pictures trained this checkpoint is unknown"
    if "generate" in trained_on:
        keys["root"] = str(run.REPOSITORY / keys["root"])
        if not Path(keys["root"]).is_dir():
            return ""  # drawn pictures that are not there are none of those that are measured
    if not Path(str(keys.get("root"))).is_dir():
        return f"{unknown}: {keys.get('root')} is not here"
    try:
        trained = {item.image_path.resolve() for item in split_items(**keys)[0]}
    except (OSError, ValueError, TypeError) as error:
        return f"{unknown}: {error}"
    num_trained = sum(item.image_path.resolve() in trained for item in items)
    return f"{num_trained} of the {len(items)} measured pictures trained this checkpoint" if num_trained else ""


# ---------------------------------------------------------------------------------------------------------------------
# the table and the pictures


def write_table(path: Path, table: Table, intervals: dict[tuple, tuple[float, float]], note: str) -> None:
    """Write a line for each number: protocol, group, metric, value, the ends of its interval, and the note."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["protocol", "group", "metric", "value", "low", "high", "note"])
        for key, value in table.items():
            ends = [f"{end:.6g}" for end in intervals[key]] if key in intervals else ["", ""]
            writer.writerow([*key, f"{value:.6g}", *ends, note])


def table_lines(table: Table, intervals: dict[tuple, tuple[float, float]]) -> list[str]:
    """Put the numbers into lines to print, one for each group of a protocol."""
    lines = {}
    for (protocol, group, metric), value in table.items():
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        if (protocol, group, metric) in intervals:
            shown += " ({:.3f} to {:.3f})".format(*intervals[protocol, group, metric])
        lines.setdefault(f"{protocol}, {group}", []).append(f"{metric} {shown}")
    return [f"{name}: {'  '.join(shown)}" for name, shown in lines.items()]


def draw_protocols(
    records: list[Record], table: Table, intervals: dict[tuple, tuple[float, float]], run_dir: Path
) -> None:
    """Draw a picture for each protocol that was measured: clicks.png and so on."""
    painters = {
        "clicks": draw_clicks, "proposals": draw_proposals, "boxes": draw_boxes, "edges": draw_edges,
        "groups": draw_groups,
    }  # fmt: skip
    for protocol in {key[0] for key in table} & set(painters):
        with drawing(run_dir / f"{protocol}.png"):
            from matplotlib.figure import Figure  # slow to import

            figure = Figure(figsize=(6.4, 4.4), layout="constrained")
            axes = figure.subplots()
            painters[protocol](axes, records, table, intervals)
            axes.grid(alpha=0.3)
            figure.savefig(run_dir / f"{protocol}.png", dpi=110)


def draw_clicks(axes, records: list[Record], table: Table, intervals: dict) -> None:
    """Draw mean IoU against the number of clicks, by size."""
    records = [record for record in records if "clicks/ious" in record]
    ious, areas = join(records, "clicks/ious"), join(records, "clicks/area")
    counts = np.arange(1, max(CLICKS) + 1)
    for group, (least, most) in metrics.AREA_RANGES.items():
        is_in = (areas >= least) & (areas <= most)
        if is_in.any():
            axes.plot(counts, ious[is_in][:, : len(counts)].mean(0), marker="o", label=f"{group} ({is_in.sum()})")
    axes.axhline(table["clicks", "all", "iou_box"], color="black", linestyle=":", label="box, all")
    axes.set(title="clicks", xlabel="clicks", ylabel="mean IoU", ylim=(0, 1))
    axes.legend()


def draw_proposals(axes, records: list[Record], table: Table, intervals: dict) -> None:
    """Draw recall against the IoU that counts as found, for each number of proposals."""
    records = [record for record in records if "proposals/num/all" in record]
    num_objects = sum(int(record["proposals/num/all"]) for record in records)
    for most in AT_MOST:
        found = sum(record[f"proposals/found/all_{most}"] for record in records)
        axes.plot(metrics.IOU_THRESHOLDS, found / max(num_objects, 1), marker="o", label=f"{most} masks")
    axes.set(title=f"proposals, {num_objects} objects", xlabel="IoU", ylabel="recall", ylim=(0, 1))
    axes.legend()


def draw_boxes(axes, records: list[Record], table: Table, intervals: dict) -> None:
    """Draw average precision against the IoU that counts as right, by size."""
    records = [record for record in records if "boxes/scores" in record]
    for number, group in enumerate(metrics.AREA_RANGES):
        precisions = class_precisions(records, number)
        if precisions:
            axes.plot(metrics.IOU_THRESHOLDS, np.mean(precisions, 0), marker="o", label=group)
    axes.set(title="masks from boxes", xlabel="IoU", ylabel="average precision", ylim=(0, 1))
    axes.legend()


def draw_edges(axes, records: list[Record], table: Table, intervals: dict) -> None:
    """Draw precision against recall of the edges."""
    records = [record for record in records if "edges/sam" in record]
    for name in ("sam", "sobel", "canny"):
        matched_true, true, matched, predicted = np.sum([record[f"edges/{name}"] for record in records], 0).T
        recall, precision = matched_true / np.maximum(true, 1), matched / np.maximum(predicted, 1)
        is_there = predicted > 0
        axes.plot(recall[is_there], precision[is_there], label=f"{name}, ODS {table['edges', name, 'ods']:.3f}")
    axes.set(title=f"edges, {len(records)} pictures", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes.legend()


def draw_groups(axes, records: list[Record], table: Table, intervals: dict) -> None:
    """Draw the mean IoU of each group at 1 and 3 clicks, with its interval."""
    groups = list(dict.fromkeys(key[1] for key in table if key[0] == "groups" and key[1]))
    for metric, offset in (("iou_1_click", -0.1), ("iou_3_clicks", 0.1)):
        means = np.array([table["groups", group, metric] for group in groups])
        keys = [("groups", group, metric) for group in groups]
        ends = [intervals[key] if key in intervals else (table[key], table[key]) for key in keys]
        reach = np.abs(np.array(ends).T - means)
        axes.errorbar(means, np.arange(len(groups)) + offset, xerr=reach, fmt="o", capsize=3, label=metric)
    axes.set(title="groups, 95 % intervals", xlabel="mean IoU", yticks=range(len(groups)))
    axes.set_yticklabels([group.replace("$", r"\$") for group in groups])
    axes.legend()
