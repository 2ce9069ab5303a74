"""Segment an image, or every image of a folder, with SAM 2; measure a model as the Segment Anything paper does.

    python infer_sam2.py input=photo.jpg                                         # everything, with the bundled model
    python infer_sam2.py input=photos/ checkpoint=outputs/train_sam2/<run>/best.pt
    python infer_sam2.py input=photos/ model=sam2.1_hiera_tiny                   # an official model
    python infer_sam2.py input=photos/ checkpoint=best.pt 'keep_classes=[cell]'  # trained with classes
    python infer_sam2.py input=photo.jpg mode=region region=region.png           # 30 random points inside a mask
    python infer_sam2.py input=photo.jpg mode=prompts 'points=[[420,310,1],[80,40,0]]'
    python infer_sam2.py input=photo.jpg mode=prompts 'boxes=[[300,200,560,430],[10,20,90,80]]'
    python infer_sam2.py input=photo.jpg mode=prompts text='a wheel' checkpoint=best.pt  # trained with prompts=text
    python infer_sam2.py input=photos/ mode=prompts prompts_file=prompts.json
    python infer_sam2.py input=photos/ mode=prompts prompts_file=more.json cache=auto   # encode each picture once
    python infer_sam2.py input=photos/ fast_decoder=false                        # sam2's own decoder, slower on a CPU
    python infer_sam2.py input=photos/ 'write=[coco,labelme,yolo,cutouts]'       # for other programs
    python infer_sam2.py mode=label input=photos/ labels=engine/ checkpoint=best.pt  # again with each round's model
    python infer_sam2.py mode=annotate input=photos/ labels=engine/ checkpoint=best.pt  # correct them, in a browser
    python infer_sam2.py mode=annotate input=photos/ labels=engine/ annotate.stage=rate 'results=[engine/,other/]'
    python infer_sam2.py mode=audit 'results=[engine/,corrected/]'
    python infer_sam2.py mode=benchmark data=coco data.root=/my/coco checkpoint=best.pt
    python infer_sam2.py mode=benchmark data=coco 'benchmark.protocols=[clicks,proposals,boxes,edges,groups]' ...
    python infer_sam2.py mode=benchmark resume=outputs/infer_sam2/<run>          # go on with a killed run
    python infer_sam2.py mode=compare 'results=[outputs/infer_sam2/<run>,outputs/infer_sam2/<another>]'
    python infer_sam2.py mode=export checkpoint=best.pt                          # ONNX, for annotation tools

Modes, each with the keys of its own:
    automatic   a grid of points; automatic.*
    region      random points inside region=<mask>
    prompts     points=, boxes=, mask=, text= or prompts_file=
    benchmark   clicks, boxes, proposals, edges, groups on data=<dataset>; benchmark.*, split
    label       masks of a grid, as a dataset to correct and train on; labels=, label.*
    annotate    a page in a browser, on which a person labels pictures with the model's help; labels=, annotate.*
    audit       results=[a,b]: masks before and after a person's corrections
    compare     results=[a,b]: runs of benchmark, or dataset.json files of train_sam2.py check=true
    export      image encoder and prompt decoder as ONNX files (pip install onnx onnxruntime)

Inputs: pictures (8 or 16 bit), and a checkpoint: our best.pt, an official SAM 2 file, or nothing for the bundled one.
prompts.json is a list of objects, each with a positive point, a box, a mask of the picture's size, or words (text)
    [{"points": [[x, y, label], ...], "box": [x1, y1, x2, y2], "mask": "file.png", "text": "a wheel"}, ...]
or, with prompts of its own for each picture of a folder, {"<file name>": [objects], ...}: other pictures are left out.
Points and boxes are px of the picture, (0, 0) is the top left pixel's centre; label 1 is the object, 0 is not.
Each mask names its prompt: "prompt" counts the objects of the list, or the boxes, or the points of a region, from 0;
prompts whose mask is empty are in "prompts_without_mask".

Written to outputs/infer_sam2/<date_time>/, for each picture,
and for each page of a file of several:
    <name>_labels.png    one id for each object, 16 bit; a 32-bit .tif above 65535 objects
    <name>_overlay.png   the objects in colour over the picture
    <name>.json          the masks in SA-1B's layout; those in the label map come first, with their id of the label map
    <name>_classes.png   with a checkpoint that knows classes: their numbers, 1, 2, ... in the order of "classes" in the
                         json, where each mask has its "class" and "class_prob"; the overlay is in their colours
    summary.csv          for each picture: name; masks: in its json; objects: in its label map; encode_ms: preprocessing
                         and image encoder, or reading the cache; ms_per_prompt: all that follows up to the finished
                         masks, per prompt
and on request, write=[...], the objects of the label map, each with its whole mask (of mode=prompts all masks):
    coco/annotations.json   all pictures, at the end; masks as run lengths, exact
    labelme/<name>.json     polygons; several of one object are a group, a hole is joined to its outline by a seam
    yolo/                   data.yaml, images/ (links) and labels/; of an object its largest part, without holes:
                            summary.csv counts what is lost
    cutouts/<name>_<id>.png each object's box of the picture, clear outside its mask
    pages/<name>.png        for these programs: the pages of files of several, and GIFs, 8 bits
An image that cannot be read is named at the end, the others are done, and the exit status is 1.
mode=benchmark writes table.csv (protocol, group, metric, value, interval, note), boxes.json and proposals.json (COCO's
result format), a picture for each protocol, and pictures/, a record of each picture; mode=compare writes compare.csv:
differences with their 95 % intervals. What each protocol is: utils/sam2/benchmark.py.
mode=annotate writes each finished object into the folder of labels (utils/instances/label_folder.py), marks of
annotate.stage=rate into its ratings.csv, and here latency.csv: of each click, how long the mask took to be drawn.
mode=export writes <model>.encoder.onnx, <model>.decoder.onnx, x_anylabeling.yaml and anylabeling.yaml to load them
with, and example.py, which needs no torch. Inputs, outputs, and what the two tools do: utils/sam2/export.py.

Sources: Ravi et al., "SAM 2: Segment Anything in Images and Videos", 2024; points in a region and stitching as in
github.com/sagieppel/fine-tune-train_segment_anything_2_in_60_lines_of_code.
"""

import signal
import sys

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):  # before the imports below, which take seconds
        print(__doc__)
        sys.exit()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends at once, up to read_command_line

import contextlib
import csv
import functools
import logging
import os
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from utils import images, onnx_files
from utils import settings as sections
from utils.checkpoint import load_checkpoint, resumed_config
from utils.dataset_check import PICTURE_REMEDIES
from utils.instances import label_folder, writers
from utils.listing import first_few, read_json
from utils.log import finish_run, start_run, write_json
from utils.run import autocast, now_s, read_ahead, sample_rng, seed_everything, set_up_device
from utils.sam2 import annotate, benchmark, compare, embedding_cache, export, label, mask_generation, words
from utils.sam2 import model as models
from utils.sam2.annotate import AnnotateSettings
from utils.sam2.benchmark import BenchmarkSettings
from utils.sam2.class_head import ClassHead, load_class_head
from utils.sam2.embedding_cache import CachePlan
from utils.sam2.fast_decoder import DecoderSetting, fix_decoder
from utils.sam2.mask_generation import AutomaticSettings, ClassFilter, GeneratedMasks
from utils.settings import (
    FINITE,
    SAME_SECTION,
    CommonSettings,
    at_least,
    between,
    check_keys,
    one_of,
    read_settings,
    some_of,
)

log = logging.getLogger("infer_sam2")
REPOSITORY = Path(__file__).resolve().parent
SEGMENTING = ("automatic", "region", "prompts")
GRID = ("automatic", "label")  # masks of a grid of points
FOLDER = (*SEGMENTING, "label")  # of pictures
LOADING = (*FOLDER, "annotate", "benchmark", "export")  # a model
CLASS_KEYS = ("keep_classes", "min_class_prob", "nms_across_classes")  # which masks are kept by their class
MODES_OF_KEY = {  # which modes use a key that not all of them use
    "input": (*FOLDER, "annotate"), "labels": ("label", "annotate"), "label.val_fraction": ("label", "annotate"),
    "region": ("region",), "num_points": ("region",), "points": ("prompts",),
    "boxes": ("prompts",), "mask": ("prompts",), "text": ("prompts",), "prompts_file": ("prompts",),
    "data": ("benchmark",),
    "split": ("benchmark",), "results": ("compare", "audit", "annotate"), "checkpoint": LOADING, "model": LOADING,
    **dict.fromkeys(CLASS_KEYS, GRID), "image_size": LOADING, "max_overlap": FOLDER,
    "write": SEGMENTING, "outline_tolerance_px": SEGMENTING, "cache": SEGMENTING, "cache_precision": SEGMENTING,
    **{f"annotate.{field.name}": ("annotate",) for field in fields(AnnotateSettings)},
    **{f"benchmark.{field.name}": ("benchmark",) for field in fields(BenchmarkSettings)},
    **{f"automatic.{field.name}": GRID for field in fields(AutomaticSettings)},
    **{f"automatic.{name}": FOLDER for name in ("points_per_batch", "stability_score_offset", "min_region_area")},
}  # fmt: skip
MOST_NAME_BYTES = 255 - len("_overlay.png.tmp")  # of a picture, where file systems take 255
PROMPTS = ("region", "points", "boxes", "mask", "text", "prompts_file")  # keys that say what to look for


@dataclass(frozen=True)
class Config:
    """All keys of this script (configs/sam2/infer_sam2.yaml explains each)."""

    common: Annotated[CommonSettings, SAME_SECTION]
    model: dict | None  # a file of configs/sam2/model; None: as the checkpoint says
    automatic: dict  # changes of the model's AutomaticSettings; null: none
    data: dict | None  # mode=benchmark: the keys of a reader
    input: str | None  # a picture, or a folder of pictures
    checkpoint: str | None  # .pt file; None: the model's own, and the bundled nano if no model is named either
    image_size: int | None  # side S that pictures are resized to, px; None: as the checkpoint was trained
    mode: Annotated[str, one_of(*LOADING, "audit", "compare")]
    region: str | None  # mode=region: mask file of the picture's size, the region is where it is not 0
    num_points: Annotated[int, at_least(1)]  # mode=region: points drawn in it, one mask each
    points: list | None  # mode=prompts: [[x, y, label], ...] px, all of one object
    boxes: list | None  # mode=prompts: [[x1, y1, x2, y2], ...] px, one object each
    mask: str | None  # mode=prompts: mask file of the picture's size, of one object
    prompts_file: str | None  # mode=prompts: json file (see the top of infer_sam2.py)
    keep_classes: list[str] | None  # mode=automatic, label: masks of these classes alone; None: of all
    min_class_prob: Annotated[float, between(0, 1)]  # mode=automatic, label: of a mask's class
    nms_across_classes: bool  # mode=automatic, label: a mask may be suppressed by one of another class
    # a mask of which a larger share is taken by better ones is left out of the label map
    max_overlap: Annotated[float, between(0, 1)]
    split: Annotated[str, one_of("val", "train")]  # mode=benchmark: of data
    benchmark: BenchmarkSettings
    results: list[str] | None  # mode=compare: runs, or dataset.json files; mode=audit, annotate: two folders
    labels: str | None  # mode=label, annotate: the folder of labels
    label: label.LabelSettings
    cache: embedding_cache.Setting  # off (false is what YAML makes of it), auto, or a folder
    cache_precision: embedding_cache.Precision
    fast_decoder: DecoderSetting
    write: Annotated[list[str], some_of(*writers.WRITERS)] = field(default_factory=list)  # further formats
    outline_tolerance_px: Annotated[float, at_least(0), FINITE] = 1.0  # of polygons
    annotate: AnnotateSettings = field(default_factory=AnnotateSettings)
    text: str | None = None  # mode=prompts: words for one object, with a checkpoint of prompts=text


@dataclass(frozen=True)
class ObjectPrompt:
    """What is known of one object, in px of its picture."""

    point_coords: np.ndarray  # float32 (P, 2), (x, y); a box is two points, its corners, put first
    point_labels: np.ndarray  # int32 (P,), 1 object, 0 not, 2 and 3 the corners of a box, -1 no point
    mask: np.ndarray | None  # bool (H, W)
    text: str | None = None
    text_token: torch.Tensor | None = None  # (C,), what the text is to the decoder


def infer(config: dict, run_dir: Path) -> list[str]:
    """Segment all pictures and write the results.

    Args:
        config: the resolved config of configs/sam2/infer_sam2.yaml, plain types.
        run_dir: where everything is written.
    Returns:
        One line for each picture that failed; always empty for a single picture, whose failure is raised.
    Raises:
        ValueError, FileNotFoundError: for what makes the whole run impossible.
    """
    config = fix_decoder(config)
    settings = read_settings(Config, config)
    check_mode(settings)
    if settings.mode == "compare":
        start_run(run_dir, config, {})
        compare.compare_runs(settings.results, settings.common.seed, run_dir)
        finish_run(run_dir, {})
        return []
    if settings.mode == "benchmark":
        measure(config, settings, run_dir)
        return []
    if settings.mode == "export":
        export_onnx(config, settings, run_dir)
        return []
    if settings.mode == "label":
        return make_labels(config, settings, run_dir)
    if settings.mode == "annotate":
        annotate_pictures(config, settings, run_dir)
        return []
    if settings.mode == "audit":
        start_run(run_dir, config, {})
        audited = label.audit_labels(*map(Path, settings.results), run_dir / "audit.csv")
        finish_run(run_dir, {"last": audited})
        log.info(describe_audit(audited, run_dir))
        return []
    pictures = images.list_pictures(Path(settings.input))
    objects_of = read_prompts(settings, pictures) if settings.mode == "prompts" else {}
    if settings.mode == "prompts":
        pictures = [picture for picture in pictures if file_name(picture) in objects_of]
    region = images.read_label_map(settings.region) > 0 if settings.mode == "region" else None  # (H, W)

    device, precision = set_up_device(settings.common.device, settings.common.precision)
    model, model_config, automatic = load_model(settings, device)
    class_head = load_class_head(model_config["checkpoint"], device)
    text_tokens = embed_texts(objects_of, model_config["checkpoint"], device)
    class_filter = choose_classes(settings, class_head)
    class_names = [] if class_head is None else class_head.names
    # None is mirrored; what cannot be read is said when its turn comes.
    cached = [(each.path, False) for each in pictures if each.page is None and os.access(each.path, os.R_OK)]
    obstacle = "mode=automatic encodes crops of pictures, too" if settings.mode == "automatic" else None
    plan = embedding_cache.plan_cache(
        model, settings.cache, settings.cache_precision, precision, True, cached, obstacle
    )
    start_run(run_dir, config | {"model": model_config, "automatic": asdict(automatic)}, {"images": len(pictures)})

    is_single = len(pictures) == 1
    failures, remarks, num_done, num_masks, num_empty = [], {}, 0, 0, 0
    written, lost = [], Counter()
    write = functools.partial(
        writers.write_formats, settings.write, run_dir, class_names or writers.NO_CLASSES, settings.outline_tolerance_px
    )

    def read(image_index: int) -> tuple[np.ndarray, list[ObjectPrompt], tuple[str, str] | None]:
        picture = pictures[image_index]
        if len(os.fsencode(picture.name)) > MOST_NAME_BYTES:
            raise ValueError(f"its results' names would be too long; give the file a name of {MOST_NAME_BYTES} bytes")
        image_unscaled = images.read_image_unscaled(picture.path, picture.page)  # uint8 or uint16 (H, W, 3)
        orig_hw, objects = image_unscaled.shape[:2], []
        if settings.mode == "region":
            rng = sample_rng(settings.common.seed, image_index)
            objects = objects_in_region(region, orig_hw, settings.num_points, rng)
        elif settings.mode == "prompts":
            objects = [parse_object(prompt, orig_hw, text_tokens) for prompt in objects_of[file_name(picture)]]
        return images.scale_to_8_bits(image_unscaled), objects, images.remark_on_values(image_unscaled)

    with (
        # A name need not be text in UTF-8.
        (run_dir / "summary.csv").open("w", encoding="utf-8", errors="backslashreplace", newline="") as summary_file,
        contextlib.ExitStack() as at_end,
    ):
        at_end.callback(write, labelled=written, is_end=True)  # after Ctrl-C, too: of the pictures that are done
        summary = csv.writer(summary_file)
        lost_columns = ["yolo_lost_holes", "yolo_lost_islands"] if "yolo" in settings.write else []
        summary.writerow(["name", "masks", "objects", "encode_ms", "ms_per_prompt", *lost_columns])
        progress = tqdm(pictures, desc="segment", unit="image", disable=is_single)
        readings = read_ahead(read, range(len(pictures)))
        for image_index, (picture, reading) in enumerate(zip(progress, readings, strict=True)):
            try:
                image_rgb, objects, remark = reading.result()
            except (ValueError, OSError) as error:
                if is_single:
                    raise
                failures.append(f"{picture}: {error}")
                continue
            if remark:
                remarks.setdefault(remark[0], []).append(f"{picture}: {remark[1]}")
            with torch.inference_mode(), autocast(device, precision):
                if settings.mode == "automatic":
                    generated = mask_generation.generate_masks(model, image_rgb, automatic, class_filter=class_filter)
                else:
                    generated = segment_objects(model, image_rgb, objects, automatic, plan, picture, class_head)
            is_apart = class_head is not None and not settings.nms_across_classes
            label_map, ids = mask_generation.stitch_masks(
                [annotation["segmentation"] for annotation in generated.annotations],
                [mask_generation.score_mask(annotation) for annotation in generated.annotations],
                image_rgb.shape[:2],
                settings.max_overlap,
                [annotation["class"] for annotation in generated.annotations] if is_apart else None,
            )
            annotations = write_results(
                run_dir, picture.name, picture.path.name, image_rgb, label_map, ids, generated, image_index, class_names
            )
            ms_per_prompt = generated.prompts_ms / generated.num_prompts
            num_objects = int(np.count_nonzero(ids))
            lost_here = Counter()
            if settings.write:
                chosen = annotations if settings.mode == "prompts" else annotations[:num_objects]
                labelled = writers.label_picture(run_dir, picture, image_index + 1, image_rgb, chosen)
                written += [labelled] if any(writers.WRITERS[name].needs_all for name in settings.write) else []
                lost_here = write(labelled=[labelled], is_end=False)
                lost += lost_here
            shown = picture.path.name if picture.page is None else picture.name
            row = [shown, len(ids), num_objects, f"{generated.encode_ms:.1f}", f"{ms_per_prompt:.3f}"]
            summary.writerow(row + [lost_here[name.rpartition("_")[2]] for name in lost_columns])
            summary_file.flush()  # what is done stays if a later picture stops the run
            num_done, num_masks, num_empty = num_done + 1, num_masks + len(ids), num_empty + (len(ids) == 0)
            if is_single:
                log.info(
                    f"{shown}: {len(ids)} masks, {num_objects} of them in the label map; "
                    f"encode {generated.encode_ms:.0f} ms, "
                    f"{ms_per_prompt:.2f} ms for each of {generated.num_prompts} prompts"
                )
    finish_run(run_dir, {"last": {"num_images": num_done, "num_masks": num_masks, "num_failed": len(failures)}})
    if settings.mode == "automatic" and num_empty > 0:
        log.info(f"{num_empty} images without a mask: {describe_filters(automatic, class_filter)}")
    for kind, which in remarks.items():
        log.info(f"{len(which)} with {kind}: {PICTURE_REMEDIES[kind]}")
        for line in first_few(which):
            log.info(f"  {line}")
    if lost:
        log.info(
            f"yolo/ lacks {lost['holes']} holes and {lost['islands']} islands of {lost['objects']} objects, which YOLO "
            "cannot hold; coco/ and labelme/ hold them"
        )
    log.info(f"{num_done} images, {num_masks} masks: {run_dir}")
    return failures


def take_over_config(config: dict, overrides: list[str]) -> dict:
    """Take the config of the run of mode=benchmark that `resume` names: all that the command line does not repeat."""
    if config["resume"] is None:
        return config
    path = Path(config["resume"]) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"resume= is {config['resume']}; no run.json there: give the folder of a run")
    record = read_json(path)
    stored = record["config"] if isinstance(record, dict) and "config" in record else {}
    if "mode" not in stored or "benchmark" not in stored:
        raise ValueError(f"resume= is {config['resume']}, a run of another script; must be one of mode=benchmark")
    if stored["mode"] != "benchmark":
        raise ValueError(f"resume= is {config['resume']}, of mode={stored['mode']}; only benchmark resumes")
    allowed = ("resume", "device", "num_workers", "data.root", "benchmark.edges.root")
    return resumed_config(stored, config, overrides, allowed)


def measure(config: dict, settings: Config, run_dir: Path) -> None:
    """Measure a model on a dataset: mode=benchmark."""
    device, precision = set_up_device(settings.common.device, settings.common.precision)
    model_config = models.choose_model(settings.checkpoint, settings.image_size, settings.model)
    check_keys(functools.partial(models.build_sam2, device=device), model_config, "model")
    seed_everything(settings.common.seed)  # of random weights, the floor
    model = models.build_sam2(**model_config, device=device, fast_decoder=settings.fast_decoder)
    start_run(run_dir, config, {})
    keys = [model_config[key] for key in ("name", "url", "checkpoint")]
    state = {} if keys[-1] == "none" else load_checkpoint(models.find_checkpoint(*keys))
    trained_on = state["config"].get("data") if "config" in state else None
    resumed_dir = None if settings.common.resume is None else Path(settings.common.resume)
    table = benchmark.run_benchmark(
        model, settings.data or {}, settings.split, settings.benchmark, trained_on, settings.common.seed, precision,
        run_dir, resumed_dir,
    )  # fmt: skip
    finish_run(run_dir, {"last": {"/".join(key): value for key, value in table.items()}})
    log.info(f"written to {run_dir}")


def make_labels(config: dict, settings: Config, run_dir: Path) -> list[str]:
    """Label a folder of pictures for training, in rounds: mode=label. Returns a line for each picture that failed."""
    pictures = images.list_pictures(Path(settings.input))
    device, precision = set_up_device(settings.common.device, settings.common.precision)
    model, model_config, automatic = load_model(settings, device)
    class_filter = choose_classes(settings, load_class_head(model_config["checkpoint"], device))
    start_run(run_dir, config | {"model": model_config, "automatic": asdict(automatic)}, {"images": len(pictures)})
    filtered = None if class_filter is None else class_filter[1:]
    made_by = benchmark.digest(
        repr((benchmark.digest_weights(model), model.image_size, automatic, filtered, settings.max_overlap)).encode()
    )

    def generate(image_rgb: np.ndarray) -> GeneratedMasks:
        with torch.inference_mode(), autocast(device, precision):
            return mask_generation.generate_masks(model, image_rgb, automatic, class_filter=class_filter)

    labels_dir = Path(settings.labels)
    with label_folder.open_folder(labels_dir):
        counts, failures = label.label_pictures(
            generate, pictures, labels_dir, made_by, settings.max_overlap, settings.label, settings.common.seed
        )
    finish_run(run_dir, {"last": counts})
    log.info(
        f"{settings.labels}: {counts['labelled']} pictures labelled with {counts['masks']} automatic masks beside "
        f"{counts['kept']} of people's; {counts['done_before']} were done before, a person has finished "
        f"{counts['finished']}, {counts['validating']} validate and wait for a person (val.txt)"
    )
    val_names = label_folder.read_validation(labels_dir)
    if any(label_folder.record_path(labels_dir, name).exists() for name in val_names):
        folder = settings.input if Path(settings.input).is_dir() else Path(settings.input).parent
        where = {"data.root": folder, "data.labels": settings.labels}
        log.info(f"train on them: {sections.show_command('train_sam2.py experiment=data_engine', **where)}")
    else:  # without a validation part no training starts
        where = {"input": settings.input, "labels": settings.labels}
        where |= {"checkpoint": settings.checkpoint} if settings.checkpoint else {}
        log.info(f"then a person labels some: {sections.show_command('infer_sam2.py mode=annotate', **where)}")
    return failures


def annotate_pictures(config: dict, settings: Config, run_dir: Path) -> None:
    """Serve a page on which a person labels pictures with the model's help, or rates masks: mode=annotate."""
    pictures = images.list_pictures(Path(settings.input))
    model, class_names, precision, model_config = None, [], "fp32", None
    if settings.annotate.stage != "rate":
        device, precision = set_up_device(settings.common.device, settings.common.precision)
        model, model_config, _ = load_model(settings, device)
        class_head = load_class_head(model_config["checkpoint"], device)
        class_names = [] if class_head is None else class_head.names
    start_run(run_dir, config | {"model": model_config}, {"images": len(pictures)})
    with label_folder.open_folder(Path(settings.labels)):
        measured = annotate.annotate_pictures(
            model, pictures, Path(settings.labels), settings.annotate, class_names, settings.label.val_fraction,
            settings.results, settings.common.seed, precision, run_dir,
        )  # fmt: skip
    finish_run(run_dir, {"last": measured})


def describe_audit(audited: dict[str, float], run_dir: Path) -> str:
    """Say what mode=audit found."""
    return (
        f"{audited['pairs']} pairs of masks in {audited['pictures']} pictures: {audited['above_90']:.1%} have an IoU "
        f"above 0.9, {audited['above_75']:.1%} above 0.75, mean {audited['mean_iou']:.3f}; {audited['removed']} masks "
        f"of the first were removed, {audited['added']} added: {run_dir / 'audit.csv'}"
    )


def load_model(settings: Config, device: torch.device) -> tuple[torch.nn.Module, dict, AutomaticSettings]:
    """Build the model that the settings name: it, the arguments of `build_sam2`, and its grid of points."""
    model_config = models.choose_model(settings.checkpoint, settings.image_size, settings.model)
    changed = {key: value for key, value in settings.automatic.items() if value is not None}
    automatic = read_settings(AutomaticSettings, model_config.get("automatic", {}) | changed, "automatic")
    check_keys(functools.partial(models.build_sam2, device=device), model_config, "model")
    seed_everything(settings.common.seed)  # of random weights
    model = models.build_sam2(**model_config, device=device, fast_decoder=settings.fast_decoder)
    return model, model_config, automatic


def export_onnx(config: dict, settings: Config, run_dir: Path) -> None:
    """Write a model as ONNX files: mode=export, on the CPU in fp32."""
    onnx_files.check_packages()
    model_config = models.choose_model(settings.checkpoint, settings.image_size, settings.model)
    check_keys(functools.partial(models.build_sam2, device="cpu"), model_config, "model")
    automatic = read_settings(AutomaticSettings, model_config.get("automatic", {}), "automatic")
    seed_everything(settings.common.seed)  # of random weights
    model = models.build_sam2(**model_config, device="cpu")
    start_run(run_dir, config | {"model": model_config}, {})
    measured = export.export_model(model, model_config["name"], automatic, run_dir)
    metrics = {f"{part}/{name}": value for part, values in measured.items() for name, value in values.items()}
    finish_run(run_dir, {"last": metrics})
    if load_class_head(model_config["checkpoint"], torch.device("cpu")) is not None:
        log.info("the classes that the checkpoint knows are not in the files, which hold masks alone")
    log.info(
        f"written to {run_dir}, for pictures of {model.image_size} x {model.image_size} px: load x_anylabeling.yaml or "
        "anylabeling.yaml as a custom model, or run example.py (utils/sam2/export.py says more)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# what to segment, and with what


def check_mode(settings: Config) -> None:
    """Refuse a mode without its input, and input that the mode would not use."""
    given = list_given(settings)
    if settings.text is not None and not settings.text.strip():
        raise ValueError("text= is empty; say what to look for, such as text='a wheel', or leave it out")
    sections.check_modes(given, MODES_OF_KEY, settings.mode)
    if settings.common.resume is not None and settings.mode != "benchmark":
        raise ValueError(
            f"resume= is {settings.common.resume}, but mode={settings.mode} resumes no run; leave it out: "
            "mode=benchmark does"
        )
    if settings.mode in MODES_OF_KEY["input"] and settings.input is None:
        raise ValueError(f"mode={settings.mode} needs input=<a picture, or a folder of pictures>")
    if settings.mode == "benchmark" and settings.data is None and settings.benchmark.protocols != ["edges"]:
        raise ValueError("mode=benchmark needs data=<a dataset>, such as data=coco data.root=/my/coco")
    if settings.mode == "benchmark" and settings.data is not None and settings.benchmark.protocols == ["edges"]:
        raise ValueError("data= is given but benchmark.protocols is [edges], which does not use it; leave it out")
    if settings.mode in MODES_OF_KEY["labels"] and settings.labels is None:
        raise ValueError(f"mode={settings.mode} needs labels=<a folder, new or of an earlier round>")
    if settings.mode == "annotate":
        check_stage(settings, given)
    if settings.mode == "audit" and len(settings.results or []) != 2:
        raise ValueError("mode=audit needs 'results=[a,b]': two folders of masks, such as before and after a person")
    if settings.mode == "compare" and len(settings.results or []) < 2:
        raise ValueError("mode=compare needs 'results=[a,b]', two or more folders that mode=benchmark wrote")
    given = [key for key in given if key in PROMPTS]
    if settings.mode == "region" and not given:
        raise ValueError("mode=region needs region=<mask file of the picture's size>")
    if settings.mode == "prompts" and not given:
        raise ValueError("mode=prompts needs points=, boxes=, mask=, text= or prompts_file=")
    if "prompts_file" in given and len(given) > 1:
        raise ValueError(f"prompts_file= is given together with {given[0]}=; put all prompts in the json file")


def check_stage(settings: Config, given: list[str]) -> None:
    """Refuse a stage of mode=annotate without its folders, and what it would not use."""
    stage = settings.annotate.stage
    if stage == "rate" and len(settings.results or []) != 2:
        raise ValueError("annotate.stage=rate needs 'results=[a,b]': two folders of masks of the same pictures")
    classes = settings.annotate.classes or []
    if len(set(classes)) < len(classes) or "" in classes:
        raise ValueError(f"annotate.classes is {classes}; must be names that differ")
    unused = ["checkpoint", "model", "image_size"] if stage == "rate" else ["results"]
    unused += [] if stage == "semi" else ["annotate.confident_iou"]
    for key in given:
        if key in unused:
            raise ValueError(f"{key}= is given but annotate.stage is {stage}, which does not use it; leave it out")


def list_given(settings: Config) -> list[str]:
    """List the keys of MODES_OF_KEY that are not as in the YAML file; an empty list or text gives nothing."""
    own = OmegaConf.load(REPOSITORY / "configs" / "sam2" / "infer_sam2.yaml")
    own.data_root = settings.common.data_root
    before, now = OmegaConf.to_container(own, resolve=True), asdict(settings)
    now["cache"] = now["cache"] or "off"  # which YAML makes false of
    given = []
    for key in MODES_OF_KEY:
        section, _, name = key.rpartition(".")
        old, new = (values[section].get(name) if section else values[name] for values in (before, now))
        if new != old and new not in ([], ""):
            given.append(key)
    return given


def describe_filters(automatic: AutomaticSettings, class_filter: ClassFilter | None) -> str:
    """Say what keeps automatic masks from being written, for pictures that have none."""
    limits = {f"automatic.{name}": getattr(automatic, name) for name in ("stability_score_thresh", "pred_iou_thresh")}
    if class_filter is not None:
        limits["min_class_prob"] = class_filter.min_class_prob
    if class_filter is not None and class_filter.keep_classes is not None:
        limits["keep_classes"] = ", ".join(class_filter.keep_classes)
    listed = ", ".join(f"{key} ({value})" for key, value in limits.items())
    return f"try other {listed}; masks of a model that has seen little of such pictures are often unstable"


def choose_classes(settings: Config, class_head: ClassHead | None) -> ClassFilter | None:
    """Choose which automatic masks are kept by class; None for a checkpoint that knows no classes.

    Raises:
        ValueError: for a choice where there are no classes, and for a class that the checkpoint does not know.
    """
    if class_head is None:
        chosen = [key for key in list_given(settings) if key in CLASS_KEYS]
        if chosen:
            raise ValueError(
                f"{chosen[0]}= needs a checkpoint that knows classes: train_sam2.py classes=auto makes one"
            )
        return None
    if settings.keep_classes is not None:
        if not settings.keep_classes:
            raise ValueError("keep_classes is [], which keeps no mask; name classes, or leave it out")
        if strange := [name for name in settings.keep_classes if name not in class_head.names]:
            listed = ", ".join(first_few(class_head.names, 20))
            raise ValueError(f"keep_classes has {strange[0]}; the checkpoint's classes are {listed}")
    keep = None if settings.keep_classes is None else tuple(settings.keep_classes)
    return ClassFilter(class_head, keep, settings.min_class_prob, settings.nms_across_classes)


# ---------------------------------------------------------------------------------------------------------------------
# prompts


def file_name(picture: images.Picture) -> str:
    """Return the name by which a prompts file calls a picture; an accented letter is one character."""
    return unicodedata.normalize("NFC", picture.path.name)


def read_prompts(settings: Config, pictures: list[images.Picture]) -> dict[str, list[dict]]:
    """Collect the prompts from the command line or the json file.

    Returns:
        {picture's `file_name`: [{"points": ..., "box": ..., "mask": ..., "text": ...}, ...]}, values not checked yet.
    """
    names = [file_name(picture) for picture in pictures]
    if not settings.prompts_file:
        boxes = settings.boxes or []
        if len(boxes) > 1 and (settings.points or settings.mask or settings.text):
            raise ValueError(
                f"points=, mask= or text= is given with {len(boxes)} boxes; say in a prompts_file= which is whose"
            )
        shared = {key: getattr(settings, key) for key in ("points", "mask", "text") if getattr(settings, key)}
        return {name: [shared | {"box": box} for box in boxes] or [shared] for name in names}
    path = Path(settings.prompts_file)
    if not path.is_file():
        raise FileNotFoundError(f"prompts file {path} does not exist")
    prompts = read_json(path)
    if isinstance(prompts, list):
        prompts = {name: prompts for name in names}
    if not isinstance(prompts, dict) or not all(isinstance(objects, list) and objects for objects in prompts.values()):
        raise ValueError(f"prompts file {path} must hold a list of objects, or {{file name: list of objects}}")
    prompts = {unicodedata.normalize("NFC", name): objects for name, objects in prompts.items()}
    for name in prompts:
        if name not in names:
            raise ValueError(f"prompts file {path} names the picture {name}, which is not in {settings.input}")
    if not prompts:
        raise ValueError(f"prompts file {path} holds no prompts")
    return prompts


def parse_object(
    prompt: dict, orig_hw: tuple[int, int], text_tokens: dict[str, torch.Tensor] | None = None
) -> ObjectPrompt:
    """Check one object's prompts against its picture.

    Args:
        prompt: {"points": [[x, y, label], ...], "box": [x1, y1, x2, y2], "mask": file, "text": words}, at least one.
        orig_hw: size of the picture.
        text_tokens: of all texts, from `embed_texts`; None: there is no text.
    Raises:
        ValueError: naming the value that is wrong.
    """
    height, width = orig_hw
    if not isinstance(prompt, dict) or not set(prompt) <= {"points", "box", "mask", "text"}:
        raise ValueError(f"an object's prompts are {prompt}; must have points, box, mask or text and nothing else")
    point_coords, point_labels = [], []
    if prompt.get("box") is not None:
        box = prompt["box"]
        if not sections.is_numbers(box, 4):
            raise ValueError(f"box is {box}; must be [x1, y1, x2, y2]")
        x1, y1, x2, y2 = box
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise ValueError(
                f"box is {box}; must have x1 < x2, y1 < y2 and lie in the picture of {width} x {height} px"
            )
        point_coords += [[x1, y1], [x2, y2]]
        point_labels += [2, 3]
    points, mask_path = prompt.get("points") or [], prompt.get("mask")
    if not isinstance(points, list) or not isinstance(mask_path, str | None):
        raise ValueError(f"an object's prompts are {prompt}; points must be a list of points, mask a file")
    for point in points:
        if not sections.is_numbers(point, 3) or point[2] not in (0, 1):
            raise ValueError(f"point is {point}; must be [x, y, label] with label 1 (object) or 0 (not)")
        if not (0 <= point[0] < width and 0 <= point[1] < height):
            raise ValueError(f"point {point[:2]} lies outside the picture of {width} x {height} px")
        point_coords.append(point[:2])
        point_labels.append(int(point[2]))
    mask = None
    if mask_path:
        mask = images.read_label_map(mask_path) > 0
        check_mask(mask, orig_hw, f"mask {mask_path}")
        if not point_coords:  # SAM 2 is trained with one "no point" beside a mask
            point_coords, point_labels = [[0, 0]], [-1]
    text = prompt.get("text")
    if not isinstance(text, str | None) or (text is not None and not text.strip()):
        raise ValueError(f"an object's text is {text!r}; must be words, such as 'a wheel'")
    if not {1, 2, -1} & set(point_labels) and mask is None and text is None:
        raise ValueError(f"an object's prompts are {prompt}; it needs a point with label 1, a box, a mask or text")
    point_coords = np.array(point_coords, np.float32).reshape(-1, 2)
    token = None if text is None else text_tokens[text]
    return ObjectPrompt(point_coords, np.array(point_labels, np.int32), mask, text, token)


def embed_texts(
    objects_of: dict[str, list[dict]], checkpoint: str | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """Make the prompt tokens of all texts: {text: float32 (C,)}.

    Args:
        objects_of: from `read_prompts`.
        checkpoint: whose text map is used.
    Raises:
        ValueError: for texts without a text map; as `build_encoder` and its embed_words.
    """
    prompts = [prompt for objects in objects_of.values() for prompt in objects if isinstance(prompt, dict)]
    texts = sorted({prompt["text"] for prompt in prompts if isinstance(prompt.get("text"), str)} - {""})
    if not texts:
        return {}
    text_map = words.load_text_map(checkpoint, device)
    if text_map is None:
        raise ValueError(
            f"text is {texts[0]!r}, but checkpoint {checkpoint} has no text map; "
            "train_sam2.py prompts=text text_encoder=<a model of open_clip> makes one"
        )
    embeddings = words.build_encoder(text_map.encoder_name, device).embed_words(texts).to(device)
    with torch.inference_mode():
        return dict(zip(texts, text_map(embeddings), strict=True))


def check_mask(mask: np.ndarray, orig_hw: tuple[int, int], name: str) -> None:
    """Refuse a mask that is empty or not of its picture's size."""
    if mask.shape != tuple(orig_hw):
        raise ValueError(
            f"{name} is {mask.shape[1]} x {mask.shape[0]} px, its picture {orig_hw[1]} x {orig_hw[0]}; must be equal"
        )
    if not mask.any():
        raise ValueError(f"{name} is empty; mark its pixels with a value other than 0")


def objects_in_region(
    region: np.ndarray, orig_hw: tuple[int, int], num_points: int, rng: np.random.Generator
) -> list[ObjectPrompt]:
    """Draw points at random in a region, (H, W) bool of the picture's size; each is the prompt of an object."""
    check_mask(region, orig_hw, "the region mask")
    points = mask_generation.sample_points_in_mask(region, num_points, rng)  # (N, 2)
    return [ObjectPrompt(point[None], np.ones(1, np.int32), None) for point in points]


def segment_objects(
    model: torch.nn.Module,
    image_rgb: np.ndarray,
    objects: list[ObjectPrompt],
    automatic: AutomaticSettings,
    plan: CachePlan | None,
    picture: images.Picture,
    class_head: ClassHead | None,
) -> GeneratedMasks:
    """Predict one mask for each object: the best of three by predicted IoU for one point or words alone, else the only.

    Args:
        image_rgb: uint8 (H, W, 3).
        automatic: of it, points_per_batch, stability_score_offset and min_region_area are used.
        plan: from `plan_cache`: the picture's entry is read, and made first if it is missing; None: no cache.
        picture: the picture's file; a page of a file of several has no entry.
        class_head: gives each mask its class; None: they have none.
    Returns:
        GeneratedMasks in the order of the objects, less empty masks; "prompt" is the object's number, from 0.
    """
    orig_hw = image_rgb.shape[:2]
    start = now_s(model.device)
    key = picture.path, False
    if plan is None or key not in plan.entries:
        encoder_input = models.preprocess(image_rgb, model.image_size, model.device)[None]
    else:
        if key in plan.missing:  # then read: the first run rounds as all others do
            embedding_cache.fill_entry(model, plan, key, image_rgb)
        encoder_input = embedding_cache.read_entry(plan.entries[key])
    embeddings = embedding_cache.embed(model, encoder_input)
    encoded = now_s(model.device)
    groups = {}  # one decode call holds objects with as many points, and all or none with a mask, and with words
    for index, prompt in enumerate(objects):
        kind = len(prompt.point_labels), prompt.mask is not None, prompt.text is not None
        groups.setdefault(kind, []).append(index)
    size = automatic.points_per_batch
    batches = [indices[i : i + size] for indices in groups.values() for i in range(0, len(indices), size)]
    annotations = {}
    for batch in batches:
        point_coords = torch.from_numpy(np.stack([objects[i].point_coords for i in batch]))  # (O, P, 2)
        point_labels = torch.from_numpy(np.stack([objects[i].point_labels for i in batch]))  # (O, P)
        masks = [objects[i].mask for i in batch if objects[i].mask is not None]
        text_tokens = [objects[i].text_token for i in batch if objects[i].text is not None]
        low_res_masks, iou_predictions, _, mask_tokens = models.decode(
            model,
            embeddings,
            image_index=torch.zeros(len(batch), dtype=torch.long, device=model.device),
            point_coords=models.scale_points(point_coords.to(model.device), orig_hw, model.image_size),
            point_labels=point_labels.to(model.device),
            mask_inputs=models.mask_logits(masks, model) if masks else None,
            multimask_output=point_labels.shape[1] + bool(text_tokens) == 1 and not masks,
            text_tokens=torch.stack(text_tokens) if text_tokens else None,
        )  # (O, M, h, w), (O, M), (O, M, C)
        predicted_ious, best = iou_predictions.float().max(1)
        best_masks = low_res_masks[torch.arange(len(batch), device=best.device), best].float()  # (O, h, w)
        stability_scores, _ = mask_generation.measure_full_size(best_masks, orig_hw, automatic.stability_score_offset)
        annotated = mask_generation.annotate_masks(
            best_masks,
            predicted_ious,
            stability_scores,
            [objects[i].point_coords[np.isin(objects[i].point_labels, (0, 1))].tolist() for i in batch],
            (0, 0, orig_hw[1], orig_hw[0]),
            orig_hw,
            automatic.min_region_area,
        )
        if class_head is not None:
            best_tokens = mask_tokens[torch.arange(len(batch), device=best.device), best]  # (O, C)
            described = class_head.describe(*class_head.classify(best_tokens))
            annotated = [annotation | named for annotation, named in zip(annotated, described, strict=True)]
        annotations |= dict(zip(batch, annotated, strict=True))
    for i, prompt in enumerate(objects):
        annotations[i] |= {"prompt": i} | ({} if prompt.text is None else {"text": prompt.text})
    filled = [annotations[i] for i in range(len(objects)) if annotations[i]["area"] > 0]
    empty = tuple(i for i in range(len(objects)) if annotations[i]["area"] == 0)
    if empty:
        numbers = ", ".join(first_few([str(i) for i in empty], 10))
        log.info(f"{picture}: {len(empty)} of {len(objects)} prompts gave an empty mask, counted from 0: {numbers}")
    times_ms = 1000 * (encoded - start), 1000 * (now_s(model.device) - encoded)
    return GeneratedMasks(filled, len(objects), *times_ms, empty)


# ---------------------------------------------------------------------------------------------------------------------
# results


def write_results(
    run_dir: Path,
    name: str,
    file_name: str,
    image_rgb: np.ndarray,
    label_map: np.ndarray,
    ids: np.ndarray,
    generated: GeneratedMasks,
    image_index: int,
    class_names: list[str],
) -> list[dict]:
    """Write a picture's label map, overlay and json, and with classes its class map.

    Args:
        label_map, ids: from `stitch_masks`; masks without an id get the numbers that follow.
        class_names: of the checkpoint; [] where it knows none.
    Returns:
        the annotations of the json, those in the label map first.
    """
    images.write_label_map(run_dir / f"{name}_labels.png", label_map)
    if class_names:
        class_of_id = np.zeros(ids.max(initial=0) + 1, np.int64)  # 1, 2, ...; 0 where no mask is
        class_of_id[ids] = [1 + class_names.index(annotation["class"]) for annotation in generated.annotations]
        class_of_id[0] = 0
        images.write_label_map(run_dir / f"{name}_classes.png", class_of_id[label_map])
        overlay = images.overlay_label_map(image_rgb, label_map, class_of_id)
        present = np.unique(class_of_id[1:])
        if len(present):
            legend = images.draw_legend([class_names[number - 1] for number in present], present, image_rgb.shape[1])
            overlay = np.concatenate([overlay, legend])
    else:
        overlay = images.overlay_label_map(image_rgb, label_map)
    images.write_image(run_dir / f"{name}_overlay.png", overlay)
    numbers = ids.copy()
    numbers[ids == 0] = np.arange(ids.max(initial=0) + 1, len(ids) + 1)
    record = {
        "image": {
            "image_id": image_index + 1,
            "width": image_rgb.shape[1],
            "height": image_rgb.shape[0],
            "file_name": file_name,
        },
        **({"classes": class_names} if class_names else {}),
        "annotations": [{"id": int(numbers[k])} | generated.annotations[k] for k in np.argsort(numbers)],
        "prompts_without_mask": list(generated.without_mask),
    }
    write_json(run_dir / f"{name}.json", record)
    return record["annotations"]


@hydra.main(version_base="1.3", config_path="configs/sam2", config_name="infer_sam2")
def main(cfg: DictConfig) -> None:
    """Read the config, segment, and end with one line on what went wrong and status 1, if anything did."""
    with sections.one_line_errors("infer_sam2", "a smaller automatic.points_per_batch or image_size"):
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        hydra_config = HydraConfig.get()
        config = take_over_config(config, list(hydra_config.overrides.task))
        failures = infer(config, Path(hydra_config.runtime.output_dir))
    if failures:
        sys.exit(f"{len(failures)} images failed:\n" + "\n".join(f"  {line}" for line in failures))


if __name__ == "__main__":
    sections.read_command_line("sam2")
    main()
