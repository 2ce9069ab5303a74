"""Track objects with SiamFC, or SAM 2's memory, through frames or a video; or track and evaluate a dataset's sequences.

    python track.py                                                     # the generated sequences
    python track.py input=video.mp4 'box=[120,80,60,40]'                # x, y, width, height px, in the first frame
    python track.py input=frames/                                       # the box is in groundtruth.txt there, or above
    python track.py input=frames/ box=select show=true                  # drawn with the mouse; shown while it runs
    python track.py input=rtsp://192.0.2.7/stream box=select show=true  # or camera:0, until it ends or Ctrl-C
    python track.py input=frames/ response=true                         # what the network answers, in the overlay
    python track.py input=video.mp4 'boxes=[[120,80,60,40],[300,90,50,50]]'
    python track.py input=video.mp4 'box=[120,80,60,40]' masks=true sam2.checkpoint=best.pt   # SAM 2's mask of each box
    python track.py data=otb 'sequences=[Crossing,Jumping]' checkpoint=outputs/train_siamfc/<run>/best.pt
    python track.py mode=benchmark data=otb 'results=[results/other_tracker]'
    python track.py input=video.mp4 'box=[120,80,60,40]' tracker=sam2 sam2.model=sam2.1_hiera_tiny   # its own memory
    python track.py input=video.mp4 objects=objects.json tracker=sam2 sam2.checkpoint=best.pt
    python track.py input=video.mp4 'box=[120,80,60,40]' 'write=[mot,cvat]'   # for other programs
    python track.py mode=benchmark data=davis_sequences masks=true      # J and F beside the boxes' scores
    python track.py mode=evaluate data=otb 'results=[results/a,results/b]' protocol=pysot
    python track.py --cfg job                                           # every knob with its value

Reads   frames as pictures (8 or 16 bit, grey or colour), a video, an address that PyAV opens, or camera:0;
        data=otb|vot|got10k|davis_sequences|imagenet_vid|folder_sequences; a checkpoint: the bundled one, best.pt
        of train_siamfc.py, a published siamfc_alexnet_e*.pth.
objects.json, with tracker=sam2: [{"id": 1, "frame": 0, "box": [x, y, w, h], "points": [[x, y, label], ...]}, ...], px;
    box or points, label 1 on the object, 0 not; ids 1 to N; an id's first entry starts it, later ones correct it there
Writes  outputs/track/<date_time>/, for each sequence of a dataset below <sequence>/:
    boxes.txt       x,y,width,height a line for each frame, 0-based unless box_origin=1; several objects: boxes_1.txt,
                    boxes_2.txt, ...
    tracks.json     boxes, scores, what seems lost or has not started, times, what could not be read
    overlay.mp4     the boxes over the frames (H.264); a grey box is that of a lost object
    masks/<frame>.png  masks=true or tracker=sam2: 1 to N for N objects, DAVIS's palette; a lost object has no mask.
                    tracks.json has each object's whole mask, and its predicted IoU
    mot.txt, cvat.xml, davis/   on request, write=[mot,cvat,davis]: MOTChallenge's text and "CVAT for video 1.1",
                    without what is lost; the masks numbered by frame
  mode=benchmark and evaluate:
    results/siamfc/ (or sam2/), results/still_box/   result files in the layout of the dataset's toolkit; still_box: the
                    first box kept still
    results/siamfc/<sequence>/<frame>.png masks=true: masks, of each object in a folder of its own; those of others are
                    found so, or as DAVIS's toolkits have them, <video>/<frame>.png with the objects' ids
    table.csv, success.png, precision.png; masks.csv where the dataset has masks and a tracker's folder has some
    sheets/<sequence>.png, scores/<sequence>.png   frames with groundtruth (green) and tracked box (red); score and IoU
A frame that cannot be read, and what a video lacks at its end, is named when all is written; the exit status is then 1.

Metrics, of tracking once from the first box:
    score           how far the response's peak stands above its mean; 1 is as far as in the first frame
    mean_iou        mean over the frames after the first in which the object is visible
    success_auc     OTB: mean over 21 thresholds of the share of frames with a higher IoU; at most 20/21 = 0.952
    precision_20    OTB: share of frames whose centre is at most 20 px off; success_50: whose IoU is above 0.5
    ao sr_50 sr_75  GOT-10k: mean IoU, and share of frames with an IoU above 0.5 and 0.75, without the first
    j_and_f         DAVIS 2017: mean of J (IoU) and F (contours), each a mean over the frames after the object's first
                    one, without the video's last; j_recall, f_recall: share of frames above 0.5; j_decay, f_decay:
                    first quarter less last
    frames_per_s    from the first frame asked for to the last one written; tracker_frames_per_s: the tracker alone.
                    masks_frames_per_s: SAM 2 alone. All are frames over seconds, with p50 and p95 of the ms per frame.
Source: Bertinetto et al. 2016, arXiv:1606.09549.
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
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from utils import settings as sections
from utils.images import read_image, write_image
from utils.listing import first_few
from utils.log import finish_run, start_run, write_json
from utils.run import seed_everything, set_up_device
from utils.settings import (
    FINITE,
    SAME_SECTION,
    CommonSettings,
    above,
    between,
    check_keys,
    one_of,
    read_settings,
    some_of,
)
from utils.tracking import drawing, mask_metrics, window, writers
from utils.tracking import masks as tracked_masks
from utils.tracking import sequences as datasets
from utils.tracking.frames import FrameSource, write_video
from utils.tracking.live import LiveSource, open_source, shown_name
from utils.tracking.masks import FrameMasks, Prompts, Sam2Settings, Segmenter
from utils.tracking.metrics import PROTOCOLS, mean_scores, mean_visible_iou, score_result, still_boxes
from utils.tracking.sequences import Sequence
from utils.tracking.siamfc import SiamFC, load_siamfc
from utils.tracking.tracker import SiamFCTracker, TrackedFrame, TrackerSettings, track_frames

log = logging.getLogger("track")
KEEP_EVERY_S = 20.0  # seconds from one writing of a long video's boxes to the next
REPOSITORY = Path(__file__).resolve().parent
BUNDLED_CHECKPOINT = REPOSITORY / "checkpoints" / "siamfc_alexnet.pt"
MODES_OF_KEY = {  # which modes use a key that says what to do
    "checkpoint": ("track", "benchmark"), "input": ("track",), "box": ("track",), "boxes": ("track",),
    "objects": ("track",), "show": ("track",), "response": ("track",), "masks": ("track", "benchmark"),
    "write": ("track",), "sequences": ("track", "benchmark", "evaluate"), "results": ("benchmark", "evaluate"),
    "box_origin": ("track",), "protocol": ("benchmark", "evaluate"),
}  # fmt: skip
SCORE_NAMES = ("success_auc", "precision_20", "success_50", "ao", "sr_50", "sr_75")
COLUMNS = {name: name for name in ("sequence", "tracker", "num_frames", *SCORE_NAMES, "fps")} | {"num_frames": "frames"}
STILL_NAME = "still_box"  # a tracker's name in tables and results/
SHEET_FRAMES = 8
LOW_IOU = 0.5  # mean predicted IoU of masks, below which that is said
MAX_LISTED = 50  # failures that are printed at the end


@dataclass(frozen=True)
class Config:
    """All keys of this script (configs/tracking/track.yaml explains each)."""

    common: Annotated[CommonSettings, SAME_SECTION]
    data: dict  # a file of configs/tracking/data; its reader checks the keys
    tracker: TrackerSettings
    mode: Annotated[str, one_of("track", "benchmark", "evaluate")]
    checkpoint: str  # auto, a file, or random
    input: str | None  # folder of frames, video file, address or camera:<number>; None: the dataset's sequences
    box: list | str | None  # [x, y, width, height] px, a groundtruth file, or select
    boxes: list | str | None  # [[x, y, width, height], ...] px, or a file
    box_origin: Annotated[int, one_of(0, 1)]  # what boxes in and out count from
    sequences: list | None  # names; None: the validation sequences
    overlay: bool  # write overlay.mp4
    show: bool  # show the tracking in a window
    fps: Annotated[float, above(0), FINITE]  # the overlay's, where the input is pictures
    protocol: Annotated[str, one_of(*PROTOCOLS)]
    results: list[str]  # folders of other trackers
    masks: bool = False  # SAM 2's mask of each box
    sam2: Sam2Settings = field(default_factory=Sam2Settings)
    # share of the difference in scale between box and mask that the tracker follows; 0: none
    mask_feedback: Annotated[float, between(0, 1)] = 0.0
    objects: str | None = None  # tracker=sam2: json file with prompts (see the top of track.py)
    response: bool = False  # draw the first object's search window and response into the overlay's corner
    write: Annotated[list[str], some_of(*writers.WRITERS)] = field(default_factory=list)  # further formats


class Track(NamedTuple):
    """A video's objects, followed from frame to frame: T frames, N objects."""

    boxes_xywh: np.ndarray  # float64 (T, N, 4) px, 0-based; nan before the object is there
    scores: np.ndarray  # float64 (T, N); nan where the frame was not read
    is_lost: np.ndarray  # bool (T, N)
    times_s: np.ndarray  # float64 (T,), seconds that the tracker took; nan where the frame was not read
    frame_times_s: np.ndarray  # float64 (frames tried,), seconds from one frame done to the next
    total_s: float  # from the first frame asked for to the overlay written
    unreadable: dict[int, str]  # frame -> why it was not read
    problem: str | None  # what the video lacks at its end
    # masks=true: of each frame that the source gave; None in a frame that was not read
    masks: list[FrameMasks | None]
    mask_times_s: np.ndarray  # float64 (frames that have masks,), seconds that SAM 2 took


def track(config: dict, run_dir: Path) -> list[str]:
    """Do what the mode says, and write the results.

    Args:
        config: the resolved config of configs/tracking/track.yaml, plain types.
        run_dir: where everything is written.
    Returns:
        One line for each frame or sequence that failed; where nothing can be tracked, that is raised instead.
    Raises:
        ValueError, OSError: for what makes the whole run impossible.
    """
    settings = read_settings(Config, config)
    check_settings(settings)
    if settings.show or settings.box == "select":
        window.check_screen("show=true" if settings.show else "box=select")

    if settings.input is not None:
        source = open_source(settings.input)
        prompts = None
        if settings.objects is None:
            boxes_xywh = choose_first_boxes(settings, source)  # (N, 4)
        else:
            prompts, num_objects = tracked_masks.read_prompts(Path(settings.objects), settings.box_origin, source)
            boxes_xywh = np.full((num_objects, 4), np.nan)
        counts = {"frames": source.num_frames, "objects": len(boxes_xywh)}
    else:
        sequences = choose_dataset(settings.data, settings.sequences)
        counts = {"sequences": len(sequences), "frames": sum(map(len, sequences))}
        taken = (our_name(settings), STILL_NAME, "last") if settings.mode == "benchmark" else ()  # in metrics
        others = name_trackers(settings.results, taken)
        for folder in others.values():  # a missing or faulty file stops the run now, not after an hour of tracking
            check_results(folder, sequences, settings.protocol)
    is_siamfc = settings.tracker.mode != "sam2"
    tracker = build_tracker(settings) if settings.mode != "evaluate" and is_siamfc else None
    has_masks = settings.mode != "evaluate" and (settings.masks or not is_siamfc)
    segmenter = build_segmenter(settings) if has_masks else None
    start_run(run_dir, config, counts)

    failures = []
    if settings.input is not None:
        metrics, failures = track_input(tracker, segmenter, source, boxes_xywh, prompts, settings, run_dir)
    elif settings.mode == "evaluate":
        metrics, failures = evaluate(sequences, others, settings.protocol, run_dir)
    else:
        metrics, failures = track_dataset(tracker, segmenter, sequences, others, settings, run_dir)
    finish_run(run_dir, metrics)
    log.info(f"written to {run_dir}")
    return failures


# ---------------------------------------------------------------------------------------------------------------------
# what to track, and with what


def check_settings(settings: Config) -> None:
    """Refuse keys that the mode does not use, a mode without its input, and keys that exclude each other."""
    absent = {"checkpoint": "auto", "results": [], "show": False, "response": False, "masks": False, "write": []}
    absent |= {"box_origin": 0, "protocol": "got10k"}
    given = [key for key in MODES_OF_KEY if getattr(settings, key) != absent.get(key)]
    sections.check_modes(given, MODES_OF_KEY, settings.mode)
    if settings.common.resume is not None:
        raise ValueError(f"resume is {settings.common.resume}; track.py goes on with no run: leave it out, start anew")
    if settings.mode == "evaluate" and not settings.results:
        raise ValueError("mode=evaluate needs results=[<folder of a tracker's result files>, ...]")
    if settings.sequences == []:
        raise ValueError("sequences is []; name some, or leave it out for the validation sequences")
    is_sam2 = settings.tracker.mode == "sam2"
    if is_sam2:
        of_siamfc = {"checkpoint": settings.checkpoint, "mask_feedback": settings.mask_feedback}
        for key, value in (of_siamfc | {"response": settings.response}).items():
            if value not in ("auto", 0.0, False):
                raise ValueError(
                    f"{key} is {value}, which is SiamFC's, but tracker=sam2; leave it out (sam2.checkpoint is SAM 2's)"
                )
    elif settings.objects is not None:
        raise ValueError(f"objects is {settings.objects}, which tracker=sam2 alone takes; add that, or give boxes=")
    if settings.objects is not None and ({"box", "boxes"} & set(given) or settings.input is None):
        raise ValueError("objects= holds all prompts of input=; leave out box= and boxes=, and give input=")
    if not settings.masks and not is_sam2:
        for key, value in {f"sam2.{key}": value for key, value in asdict(settings.sam2).items()}.items():
            if value is not None:
                raise ValueError(
                    f"{key} is {value}, which masks=true and tracker=sam2 use; add one of them, or leave it out"
                )
        if "davis" in settings.write:
            raise ValueError("write has davis, which are masks, but masks are off: add masks=true")
        if settings.mask_feedback > 0:
            raise ValueError(f"mask_feedback is {settings.mask_feedback}, but masks are off: add masks=true")
    if settings.mask_feedback > 0 and settings.tracker.mode == "parity":
        raise ValueError("mask_feedback changes what tracker.mode=parity promises; leave out one of them")
    if settings.response and not (settings.overlay or settings.show):
        raise ValueError("response is true, which is drawn into the overlay; leave out overlay=false, or add show=true")
    if {"box", "boxes"} <= set(given):
        raise ValueError("box= and boxes= are both given; leave out one of them")
    for key in ("box", "boxes"):
        if key in given and "input" not in given:
            raise ValueError(f"{key}= is given but input= is not: add input=<folder of frames or video file>")
    if {"input", "sequences"} <= set(given):
        raise ValueError("sequences= is given together with input=; sequences are those of a dataset: leave out one")


def our_name(settings: Config) -> str:
    """Name the tracker in tables and results/."""
    return "sam2" if settings.tracker.mode == "sam2" else "siamfc"


def choose_first_boxes(settings: Config, source: FrameSource | LiveSource) -> np.ndarray:
    """Find the boxes of the objects in the first frame: from the command line, a file, or the user's mouse.

    Returns:
        boxes_xywh float64 (N, 4) px, 0-based; whether they lie in the frame is for the tracker to say.
    """
    box, boxes = settings.box, settings.boxes
    if box == "select":
        return window.select_box(read_first_frame(source), source.frame_name(0))[None]
    if isinstance(box, list):
        boxes = [box]
    if isinstance(boxes, list):
        for box_xywh in boxes:
            if not sections.is_numbers(box_xywh, 4):
                key = "box is" if box is not None else "boxes has"
                raise ValueError(f"{key} {box_xywh}; must be [x, y, width, height] px")
        if not boxes:
            raise ValueError("boxes is []; must be [[x, y, width, height], ...] px")
        return np.array(boxes, np.float64) - [settings.box_origin, settings.box_origin, 0, 0]
    for key, path, others in (("box", box, "a groundtruth file, or select"), ("boxes", boxes, "or a file of such")):
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(
                f"{key} is {path}, which is no file (seen from {Path.cwd()}); must be "
                f"{'[x, y, width, height]' if key == 'box' else '[[x, y, width, height], ...]'} px, {others}"
            )
    if boxes is not None:
        return datasets.read_boxes(boxes, settings.box_origin)
    path = box or datasets.find_groundtruth(settings.input)
    if path is None:
        raise ValueError(
            f"input {settings.input} comes without a groundtruth file; give the first frame's box: "
            "'box=[x,y,width,height]' px, box=<groundtruth file>, box=select (with the mouse), or boxes= for several"
        )
    box_xywh = datasets.read_boxes(path, settings.box_origin)[0]
    if not np.isfinite(box_xywh).all():
        raise ValueError(f"{path} has no box in its first line; give 'box=[x,y,width,height]' px")
    log.info(f"the first box is that of {path}, counted from {settings.box_origin} (box_origin)")
    return box_xywh[None]


def read_first_frame(source: FrameSource | LiveSource) -> np.ndarray:
    """Read the first frame alone, uint8 (H, W, 3) RGB."""
    for _, frame, error in source:
        if error is not None:
            raise error
        return frame
    raise ValueError(source.problem or f"{source.frame_name(0)} cannot be read: there are no frames")


def choose_dataset(data: dict, names: list | None) -> list[Sequence]:
    """List the sequences to track; generate them if need be.

    Args:
        data: the values of a file of configs/tracking/data.
        names: any of the dataset's sequences; None: the validation sequences, or if there are none the training ones
    """
    check_keys(datasets.split_sequences, data, "data")
    if names is not None:
        return datasets.choose_sequences(datasets.list_sequences(**data), names)
    train_sequences, val_sequences = datasets.split_sequences(**data)
    return val_sequences or train_sequences


def name_trackers(folders: list[str], taken: tuple[str, ...]) -> dict[str, Path]:
    """Name trackers after their folders: {name: folder}; by the whole path where names meet each other or `taken`."""
    uses = Counter([*taken, *(Path(folder).resolve().name for folder in folders)])
    named = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"results has {folder}, which is no folder (seen from {Path.cwd()})")
        name = Path(folder).resolve().name
        if uses[name] > 1:
            name = str(folder) if str(folder) not in uses else str(Path(folder).resolve())
        named[name] = Path(folder)
    return named


def check_results(folder: Path, sequences: list[Sequence], protocol: str) -> None:
    """Raise a ValueError or FileNotFoundError for a result file that is missing, faulty, or meant for two sequences."""
    sequence_of, num_repeated = {}, 0
    for sequence in sequences:
        path = datasets.find_result(folder, sequence.name)
        again = path.with_name(f"{path.parent.name}_002.txt")
        num_repeated += path.stem == f"{path.parent.name}_001" and again.is_file()
        other = sequence_of.setdefault(path, sequence.name)
        if other != sequence.name:
            raise ValueError(f"{path} would be the result of {other} and of {sequence.name}; one of theirs is missing")
        if sequence.is_scored:
            score_result(folder, sequence, protocol)
    if num_repeated:
        log.info(f"{folder}: {num_repeated} sequences were tracked several times; the first time of each is scored")


def build_tracker(settings: Config) -> SiamFCTracker:
    """Load the weights and make the tracker on the chosen device."""
    is_parity = settings.tracker.mode == "parity" and settings.common.precision == "auto"
    device, precision = set_up_device(settings.common.device, "fp32" if is_parity else settings.common.precision)
    model = load_model(settings.checkpoint, settings.common.seed).to(device)
    return SiamFCTracker(model, settings.tracker, precision)


def build_segmenter(settings: Config) -> Segmenter:
    """Load the SAM 2 that makes masks, on the chosen device."""
    device, precision = set_up_device(settings.common.device, settings.common.precision)
    seed_everything(settings.common.seed)  # of random weights
    return tracked_masks.load_segmenter(settings.sam2, device, precision)


def load_model(checkpoint: str, seed: int) -> SiamFC:
    """Load SiamFC from a checkpoint, from the bundled one ("auto"), or draw its weights from the seed ("random")."""
    if checkpoint == "random":
        seed_everything(seed)
        return SiamFC(score_bias=False).eval()
    if checkpoint == "auto" and not BUNDLED_CHECKPOINT.is_file():
        raise FileNotFoundError(
            f"checkpoint is auto, but the bundled {BUNDLED_CHECKPOINT} does not exist; give checkpoint=<best.pt> of "
            "train_siamfc.py, or checkpoint=random to try without"
        )
    return load_siamfc(BUNDLED_CHECKPOINT if checkpoint == "auto" else Path(checkpoint))


# ---------------------------------------------------------------------------------------------------------------------
# track one video


def track_video(
    tracker: SiamFCTracker | None,
    segmenter: Segmenter | None,
    source: FrameSource | LiveSource,
    boxes_xywh: np.ndarray,
    name: str,
    settings: Config,
    out_dir: Path | None = None,
    start: int = 0,
    mask_dir: Path | None = None,
    prompts: Prompts | None = None,
) -> Track:
    """Track objects through a video, and draw what is asked for on the way; no frame is kept.

    Boxes are written once in KEEP_EVERY_S, at Ctrl-C, and before the overlay is closed: what fails or ends there leaves
    them.

    Args:
        boxes_xywh: (N, 4) px, 0-based, in the source's first frame.
        name: the video's, for the progress bar and the window.
        settings: show; overlay; and fps, the overlay's where the source is not a video.
        out_dir: where overlay.mp4, boxes and tracks.json are written; None: nowhere.
        start: frames of the video that come before the source's first: nan, and lost, in what is returned.
        mask_dir: where a segmenter's masks are written, a png for each frame.
        prompts: for a segmenter without a tracker; None: the boxes.
    Raises:
        ValueError, OSError: where the first frame cannot be read, or its boxes not be tracked.
    """
    no_boxes, is_lost = np.full((len(boxes_xywh), 4), np.nan), np.ones(len(boxes_xywh), bool)
    tracked = [TrackedFrame(-1, None, no_boxes, no_boxes[:, 0], is_lost, math.nan, None)] * start
    frame_times_s, masked, mask_times_s, mask_paths = [], [], [], {}
    first_hw = last_frame = video = figure = problem = None
    is_resized = False

    def write_so_far() -> None:
        track = join_so_far(time.perf_counter() - begin)
        shown = writers.Tracked(track.boxes_xywh, track.scores, track.is_lost, first_hw)
        with contextlib.ExitStack() as writes:  # all are tried, also where one fails
            for form in settings.write:
                writes.callback(writers.WRITERS[form], out_dir, name, shown, mask_paths)
            writes.callback(write_tracks, out_dir, track, source, settings)

    def join_so_far(total_s: float) -> Track:
        return join_frames(tracked, frame_times_s, total_s, source, masked, mask_times_s)

    with contextlib.ExitStack() as opened:
        progress = opened.enter_context(tqdm(total=source.num_frames, desc=name, unit="frame", leave=False))
        begin = last_done = last_kept = time.perf_counter()
        try:
            for tracked_frame, frame_masks, mask_s in follow(tracker, segmenter, source, boxes_xywh, prompts, settings):
                frame = last_frame if tracked_frame.error is not None else tracked_frame.frame
                if last_frame is not None and frame.shape != last_frame.shape and not is_resized:
                    is_resized = True  # said once
                    (old_height, old_width), (height, width) = last_frame.shape[:2], frame.shape[:2]
                    log.info(
                        f"{source.frame_name(tracked_frame.index)}: the frames' size changes here from {old_width} x "
                        f"{old_height} to {width} x {height} px; boxes are in px of their own frame"
                    )
                last_frame, first_hw = frame, first_hw or frame.shape[:2]
                if segmenter is not None:
                    if frame_masks is not None:
                        mask_times_s += [mask_s] if tracker is not None else []
                        path = mask_dir / f"{source.frame_stem(tracked_frame.index)}.png"
                        tracked_masks.write_mask(path, frame_masks.label_map)
                        mask_paths[start + tracked_frame.index] = path
                        frame = tracked_masks.draw_masks(frame, frame_masks.label_map)
                        frame_masks = frame_masks._replace(label_map=None)  # no frame is kept
                has_overlay = out_dir is not None and settings.overlay and problem is None
                if has_overlay or settings.show:
                    boxes, scores = tracked_frame.boxes_xywh, tracked_frame.scores
                    drawn = drawing.draw_boxes(frame, boxes, scores, tracked_frame.is_lost)
                    if settings.response and tracked_frame.error is None and tracker.searches:
                        drawing.draw_response(drawn, tracked_frame.frame, *tracker.searches[0])
                if has_overlay:
                    try:
                        if video is None:
                            hw, fps = drawn.shape[:2], source.fps or settings.fps
                            writer = write_video(out_dir / "overlay.mp4", hw, fps, source.sample_aspect)
                            video = opened.enter_context(contextlib.ExitStack())
                            overlay = video.enter_context(writer)
                        overlay.add(drawn, source.times_s[tracked_frame.index] if source.times_s else None)
                    except (OSError, ValueError) as error:  # a full disk, or a side that H.264 does not have
                        problem = f"{out_dir / 'overlay.mp4'} cannot be written: {error}"
                if settings.show:
                    if figure is None:
                        figure = window.open_window(name)
                        opened.callback(window.close_window, figure)
                    window.show_image(figure, drawn)
                progress.update()
                tracked.append(tracked_frame._replace(frame=None))  # now that it is done: Ctrl-C leaves lists as long
                masked += [frame_masks] if segmenter is not None else []
                now = time.perf_counter()
                frame_times_s.append(now - last_done)
                last_done = now
                if out_dir is not None and now - last_kept > KEEP_EVERY_S:
                    write_so_far()
                    last_kept = time.perf_counter()
        finally:
            if frame_times_s and out_dir is not None:
                write_so_far()
        try:
            if video is not None:
                video.close()  # writes what the encoder still holds
        except (OSError, ValueError) as error:
            problem = problem or f"{out_dir / 'overlay.mp4'} cannot be written: {error}"
    if not frame_times_s:
        raise ValueError(source.problem or f"{name} has no frames")
    if isinstance(source, LiveSource) and source.num_dropped:
        log.info(f"{name}: {source.num_dropped} frames came faster than they could be tracked, and were dropped")
    if isinstance(source, LiveSource) and source.num_broken:
        log.info(f"{name}: {source.num_broken} packets of the stream were broken, and gave no picture")
    if source.num_before_keyframe:
        log.info(f"{name}: starts with {source.num_before_keyframe} packets before its first keyframe; left out")
    track = join_so_far(time.perf_counter() - begin)
    return track._replace(problem="; ".join(filter(None, (track.problem, problem))) or None)


def follow(
    tracker: SiamFCTracker | None,
    segmenter: Segmenter | None,
    source: FrameSource | LiveSource,
    boxes_xywh: np.ndarray,
    prompts: Prompts | None,
    settings: Config,
) -> Iterator[tuple[TrackedFrame, FrameMasks | None, float]]:
    """Track objects with SiamFC, its boxes turned into masks by a segmenter if there is one, or with SAM 2 alone.

    Yields:
        each frame, its masks, and the seconds that these took where they come after the tracker; None and nan for none.
    """
    if tracker is None:
        prompts = tracked_masks.prompt_boxes(boxes_xywh) if prompts is None else prompts
        for tracked_frame, frame_masks in tracked_masks.follow_objects(segmenter, source, prompts, len(boxes_xywh)):
            yield tracked_frame, frame_masks, math.nan
        return
    for tracked_frame in track_frames(tracker, source, boxes_xywh):
        if segmenter is None or tracked_frame.error is not None:
            yield tracked_frame, None, math.nan
        else:
            yield tracked_frame, *segment_frame(segmenter, tracker, tracked_frame, settings.mask_feedback)


def segment_frame(
    segmenter: Segmenter, tracker: SiamFCTracker, tracked_frame: TrackedFrame, feedback: float
) -> tuple[FrameMasks, float]:
    """Make a frame's masks, and let the tracker follow their scale: they, and the seconds that it took."""
    start = time.perf_counter()
    boxes_xywh, is_lost = tracked_frame.boxes_xywh, tracked_frame.is_lost
    frame_masks = tracked_masks.segment_boxes(segmenter, tracked_frame.frame, boxes_xywh, ~is_lost)
    if feedback > 0 and tracked_frame.index > 0:
        for target, mask_box_xywh in zip(tracker.targets, frame_masks.boxes_xywh, strict=True):
            tracked_masks.follow_mask(target, mask_box_xywh, feedback)
    return frame_masks, time.perf_counter() - start


def join_frames(
    tracked: list[TrackedFrame],
    frame_times_s: list[float],
    total_s: float,
    source: FrameSource | LiveSource,
    masked: list[FrameMasks | None],
    mask_times_s: list[float],
) -> Track:
    """Put what was found frame by frame into arrays."""
    return Track(
        np.stack([tracked_frame.boxes_xywh for tracked_frame in tracked]),
        np.stack([tracked_frame.scores for tracked_frame in tracked]),
        np.stack([tracked_frame.is_lost for tracked_frame in tracked]),
        np.array([tracked_frame.time_s for tracked_frame in tracked]),
        np.array(frame_times_s),
        total_s,
        {index: str(tracked_frame.error) for index, tracked_frame in enumerate(tracked) if tracked_frame.error},
        source.problem,
        list(masked),
        np.array(mask_times_s),
    )


def measure_speed(tracks: list[Track]) -> dict[str, float]:
    """Compute frames over seconds and percentiles of the ms per frame, end to end and of the tracker alone.

    Only frames that were read count.
    """
    times_s = np.concatenate([track.times_s[np.isfinite(track.times_s)] for track in tracks])
    frame_times_s = np.concatenate([track.frame_times_s for track in tracks])
    mask_times_s = np.concatenate([track.mask_times_s for track in tracks])
    total_s = sum(track.total_s for track in tracks)
    of_masks = {}
    if len(mask_times_s):
        of_masks = {"masks_frames_per_s": len(mask_times_s) / float(mask_times_s.sum())}
        of_masks |= {f"masks_p{q}_ms": float(1000 * np.percentile(mask_times_s, q)) for q in (50, 95)}
    return of_masks | {
        "frames_per_s": len(times_s) / total_s,
        "p50_ms": float(1000 * np.percentile(frame_times_s, 50)),
        "p95_ms": float(1000 * np.percentile(frame_times_s, 95)),
        "tracker_frames_per_s": len(times_s) / float(times_s.sum()),
        "tracker_p50_ms": float(1000 * np.percentile(times_s, 50)),
        "tracker_p95_ms": float(1000 * np.percentile(times_s, 95)),
    }


def describe_speed(speed: dict[str, float]) -> str:
    """Put what `measure_speed` returns into words."""
    return ", ".join(
        f"{words} {speed[f'{key}frames_per_s']:.1f} frames/s "
        f"(p50 {speed[f'{key}p50_ms']:.1f} ms, p95 {speed[f'{key}p95_ms']:.1f} ms)"
        for words, key in (("end to end", ""), ("tracker alone", "tracker_"), ("masks alone", "masks_"))
        if f"{key}frames_per_s" in speed
    )


def list_failures(track: Track) -> list[str]:
    """List what could not be read in a video, a line each."""
    return [*track.unreadable.values(), *([track.problem] if track.problem else [])]


# ---------------------------------------------------------------------------------------------------------------------
# what becomes of the tracks


def track_input(
    tracker: SiamFCTracker | None,
    segmenter: Segmenter | None,
    source: FrameSource | LiveSource,
    boxes_xywh: np.ndarray,
    prompts: Prompts | None,
    settings: Config,
    run_dir: Path,
) -> tuple[dict, list[str]]:
    """Track the user's video, and write its files into the run's folder; return metrics, and what could not be read."""
    name = shown_name(settings.input)
    mask_dir = make_mask_dir(run_dir / "masks", segmenter)
    track = track_video(
        tracker, segmenter, source, boxes_xywh, name, settings, run_dir, mask_dir=mask_dir, prompts=prompts
    )
    failures, speed = list_failures(track), measure_speed([track])
    has_started = np.logical_or.accumulate(np.isfinite(track.scores))  # (T, N)
    num_frames, num_lost = len(track.boxes_xywh), int((track.is_lost & has_started).any(1).sum())
    log.info(f"{name}: {num_frames} frames, an object seems lost in {num_lost} of them; {describe_speed(speed)}")
    counts = {"num_frames": num_frames, "num_lost": num_lost, "num_failed": len(failures)}
    if settings.masks and tracker is not None:
        log.info(describe_masks([track]))
    return {"last": counts | speed}, failures


def make_mask_dir(folder: Path, segmenter: Segmenter | None) -> Path | None:
    """Make the folder of a video's masks; None where none are made."""
    if segmenter is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe_masks(tracks: list[Track]) -> str:
    """Say what SAM 2 thinks of its masks."""
    made = [frame_masks for track in tracks for frame_masks in track.masks if frame_masks is not None]
    predicted_ious = np.concatenate([frame_masks.predicted_ious for frame_masks in made] or [np.zeros(0)])
    num_masks = int(np.isfinite(predicted_ious).sum())
    if not num_masks:
        return "no object has a mask"
    mean = float(np.nanmean(predicted_ious))
    remedy = ": low; the model knows such pictures little, see sam2.model and sam2.checkpoint" if mean < LOW_IOU else ""
    return f"{num_masks} masks of a mean predicted IoU of {mean:.2f}{remedy}"


def track_dataset(
    tracker: SiamFCTracker | None,
    segmenter: Segmenter | None,
    sequences: list[Sequence],
    others: dict[str, Path],
    settings: Config,
    run_dir: Path,
) -> tuple[dict, list[str]]:
    """Track sequences, each from the first frame in which its object is visible, and write what the mode asks for.

    Args:
        others: mode=benchmark: folders of other trackers' result files, by name.
    Returns:
        metrics, as `finish_run` takes them; one line for each frame or sequence that failed.
    Raises:
        ValueError: where no sequence can be tracked.
    """
    is_benchmark = settings.mode == "benchmark"
    failures, tracks, tracked = [], [], []
    for sequence in tqdm(sequences, desc="sequences", disable=not is_benchmark or len(sequences) == 1):
        folder = run_dir if is_benchmark else run_dir / sequence.name
        folder.mkdir(exist_ok=True)
        try:
            mask_dir = run_dir / "results" / our_name(settings) / sequence.name if is_benchmark else folder / "masks"
            mask_dir = make_mask_dir(mask_dir, segmenter)
            track = track_sequence(tracker, segmenter, sequence, settings, None if is_benchmark else folder, mask_dir)
        except (ValueError, OSError) as error:
            failures.append(f"{sequence.name}: {error}")
            continue
        if is_benchmark:
            write_results(sequence, track, settings.data["format"], our_name(settings), run_dir)
        else:
            log.info(f"{sequence.name}: {len(sequence)} frames{describe_iou(measure_iou([sequence], [track]))}")
        failures += list_failures(track)
        tracks.append(track)
        tracked.append(sequence)
    if not tracks:
        raise ValueError("no sequence could be tracked:\n" + "\n".join(f"  {line}" for line in failures))
    speed = measure_speed(tracks)
    last = {"num_sequences": len(tracks), "num_failed": len(failures)} | speed
    if is_benchmark:
        result_dirs = {name: run_dir / "results" / name for name in (our_name(settings), STILL_NAME)}
        scores, unscored = evaluate(tracked, result_dirs | others, settings.protocol, run_dir)
        failures += unscored
        last["num_failed"] = len(failures)
    else:
        scores = {}
        iou = measure_iou(tracked, tracks)
        last |= iou
        log.info(f"{len(tracks)} sequences{describe_iou(iou)}")
    log.info(describe_speed(speed))
    if settings.masks and tracker is not None:
        log.info(describe_masks(tracks))
    return {"last": last} | scores, failures


def track_sequence(
    tracker: SiamFCTracker | None,
    segmenter: Segmenter | None,
    sequence: Sequence,
    settings: Config,
    out_dir: Path | None = None,
    mask_dir: Path | None = None,
) -> Track:
    """Track a sequence from the first frame in which its object is visible.

    Raises:
        ValueError, OSError: where there is no such frame, it cannot be read, or its box not be tracked.
    """
    if not sequence.visible.any():
        raise ValueError("its groundtruth has no visible box; there is nothing to track")
    start = int(sequence.visible.argmax())
    source = FrameSource(sequence.frame_paths[start:])
    boxes_xywh = sequence.boxes_xywh[[start]]
    return track_video(tracker, segmenter, source, boxes_xywh, sequence.name, settings, out_dir, start, mask_dir)


def write_tracks(folder: Path, track: Track, source: FrameSource | LiveSource, settings: Config) -> None:
    """Write boxes.txt (several objects: boxes_1.txt, ...) and tracks.json, boxes counted from box_origin."""
    box_origin, fps = settings.box_origin, source.fps or settings.fps
    num_before = len(track.boxes_xywh) - len(track.frame_times_s)  # frames before the source's first
    shown_s = [number / fps for number in range(len(track.frame_times_s))]
    shown_s = source.times_s[: len(shown_s)] if source.times_s else shown_s
    num_objects = track.boxes_xywh.shape[1]
    names = ["boxes.txt"] if num_objects == 1 else [f"boxes_{n + 1}.txt" for n in range(num_objects)]
    for n, name in enumerate(names):
        datasets.write_boxes(folder / name, track.boxes_xywh[:, n], box_origin)
    in_file = datasets.file_coordinates(track.boxes_xywh, box_origin)
    record = {
        "source": source.name,
        "num_frames": len(in_file),
        "fps": fps,
        "box_origin": box_origin,
        "shown_at_s": [None] * num_before + shown_s,
        "objects": [
            {
                "file": name,
                "boxes_xywh": in_file[:, n].tolist(),
                "scores": track.scores[:, n].tolist(),
                "lost": track.is_lost[:, n].tolist(),
                **describe_object_masks(track, n, num_before),
            }
            for n, name in enumerate(names)
        ],
        "times_s": track.times_s.tolist(),
        "not_read": [{"frame": index, "error": error} for index, error in track.unreadable.items()],
        "problem": track.problem,
    }
    write_json(folder / "tracks.json", record)


def describe_object_masks(track: Track, n: int, num_before: int) -> dict:
    """Put an object's masks into its record of tracks.json; nothing where none were made."""
    if not track.masks:
        return {}
    made = [None if each is None else (each.segmentations[n], float(each.predicted_ious[n])) for each in track.masks]
    made = [*[None] * num_before, *made]
    return {
        "masks": [None if each is None else each[0] for each in made],
        "predicted_ious": [None if each is None else each[1] for each in made],  # nan, with tracker=sam2: null
    }


def measure_iou(sequences: list[Sequence], tracks: list[Track]) -> dict[str, float]:
    """Compute the mean IoU of tracks and of the first box kept still, each sequence counting the same.

    Sequences whose object is visible in one frame only do not count; {} where there is no other.
    """
    mean_ious, still_ious = [], []
    for sequence, track in zip(sequences, tracks, strict=True):
        mean_iou = mean_visible_iou(track.boxes_xywh[:, 0], sequence)
        if mean_iou is not None:
            mean_ious.append(mean_iou)
            still_ious.append(mean_visible_iou(still_boxes(sequence), sequence))
    if not mean_ious:
        return {}
    return {"mean_iou": float(np.mean(mean_ious)), "still_box_mean_iou": float(np.mean(still_ious))}


def describe_iou(iou: dict[str, float]) -> str:
    """Put what `measure_iou` returns into words that follow others."""
    if not iou:
        return ""
    return f", mean IoU {iou['mean_iou']:.3f} (the first box kept still: {iou['still_box_mean_iou']:.3f})"


# ---------------------------------------------------------------------------------------------------------------------
# mode=benchmark and evaluate


def write_results(sequence: Sequence, track: Track, data_format: str, name_of_ours: str, run_dir: Path) -> None:
    """Write a sequence's result files in the layout of the dataset's toolkit, and its pictures."""
    layout = data_format if data_format in ("got10k", "vot") else "otb"
    boxes_xywh, still = track.boxes_xywh[:, 0], still_boxes(sequence)
    for name, boxes, times_s in ((name_of_ours, boxes_xywh, track.times_s), (STILL_NAME, still, np.zeros(len(still)))):
        datasets.write_result(layout, run_dir / "results" / name, sequence.name, boxes, times_s, sequence.box_origin)
    for name in ("sheets", "scores"):
        (run_dir / name).mkdir(exist_ok=True)
    indices = np.linspace(sequence.visible.argmax(), len(sequence) - 1, SHEET_FRAMES).round().astype(int).tolist()
    frames = {i: read_image(sequence.frame_path(i)) for i in indices if i not in track.unreadable}
    sheet = drawing.draw_sheet(frames, boxes_xywh, sequence.boxes_xywh)
    write_image(run_dir / "sheets" / f"{sequence.name}.png", sheet)
    scores_path = run_dir / "scores" / f"{sequence.name}.png"
    drawing.plot_scores(boxes_xywh, track.scores[:, 0], track.is_lost[:, 0], sequence, scores_path)


def evaluate(
    sequences: list[Sequence], trackers: dict[str, Path], protocol: str, run_dir: Path
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Score trackers from their result files; print and write the table, and draw the curves.

    Args:
        trackers: folders of result files, by the trackers' names.
    Returns:
        {tracker: {metric: value}}, over all sequences; empty where there is nothing to compare with. And one line for
        each of the masks that cannot be scored.
    """
    scored = []
    for sequence in sequences:
        start = int(sequence.visible.argmax())
        num_unknown = int(np.isnan(sequence.boxes_xywh[start : sequence.num_annotated]).any(1).sum())
        if start:
            log.info(f"{sequence.name}: its first {start} frames, before the object is there, are not scored")
        if sequence.num_annotated < len(sequence):
            log.info(
                f"{sequence.name}: groundtruth ends after {sequence.num_annotated} of {len(sequence)} frames; "
                "the others are not scored"
            )
        if num_unknown:
            log.info(f"{sequence.name}: {num_unknown} frames without a box in the groundtruth; see protocol {protocol}")
        if sequence.is_scored:
            scored.append(sequence)
        else:
            log.info(f"{sequence.name} is not scored: its groundtruth has no box, or the first one alone")
    if not scored:
        folders = ", ".join(map(str, trackers.values()))
        log.info(f"no sequence has groundtruth to evaluate with; the result files are in {folders}")
        return {}, []
    rows = []
    for sequence in scored:
        for name, folder in trackers.items():
            row = score_result(folder, sequence, protocol)
            rows.append(row | mean_scores([row]) | {"sequence": sequence.name, "tracker": name})
    means = [
        mean_scores([row for row in rows if row["tracker"] == name])
        | {"sequence": f"mean of {len(scored)}", "tracker": name}
        for name in trackers
    ]
    with (run_dir / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS.values())
        writer.writerows([["" if row[name] is None else row[name] for name in COLUMNS] for row in rows])
    log.info(f"protocol {protocol}\n" + "\n".join(table_lines(rows + means)))
    for row in means:
        log.info(
            f"{row['tracker']}, GOT-10k's scores: over all frames AO {number(row['ao_by_frame'])}, SR0.5 "
            f"{number(row['sr_50_by_frame'])}, SR0.75 {number(row['sr_75_by_frame'])}; over sequences AO "
            f"{number(row['ao'])}, SR0.5 {number(row['sr_50'])}, SR0.75 {number(row['sr_75'])}"
        )
    drawing.plot_curves(means, protocol, run_dir)
    names = ("num_frames", *SCORE_NAMES, "ao_by_frame", "sr_50_by_frame", "sr_75_by_frame", "fps")
    of_masks, failures = evaluate_masks(scored, trackers, run_dir)
    scores = {row["tracker"]: {name: row[name] for name in names} for row in means}
    return {name: row | of_masks.get(name, {}) for name, row in scores.items()}, failures


def evaluate_masks(
    sequences: list[Sequence], trackers: dict[str, Path], run_dir: Path
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Score the masks in trackers' folders; print and write the table.

    Returns:
        {tracker: means over the sequences of all whose masks are there}; empty where the dataset has no masks. And one
        line for each sequence whose masks cannot be scored; it is left out of the means.
    """
    rows, means, failures = [], {}, []
    for name, folder in trackers.items():
        with_masks = [each for each in sequences if mask_metrics.find_masks(folder, each)[0]]
        scores = []
        for sequence in tqdm(with_masks, desc=f"masks of {name}", leave=False, disable=None):
            try:
                scores.append(mask_metrics.score_folder(folder, sequence))
            except (ValueError, OSError) as error:
                failures.append(f"{sequence.name}: masks of {name} are not scored: {error}")
                continue
            rows.append({"sequence": sequence.name, "tracker": name} | scores[-1])
        if scores:
            means[name] = {key: float(np.mean([row[key] for row in scores])) for key in scores[0]}
            rows.append({"sequence": f"mean of {len(scores)}", "tracker": name} | means[name])
    if rows:
        with (run_dir / "masks.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(row for row in rows if not row["sequence"].startswith("mean of"))
        keys = list(rows[0])[2:]
        cells = [["sequence", "tracker", *keys]]
        cells += [[row["sequence"], row["tracker"], *(number(row[key]) for key in keys)] for row in rows]
        log.info("masks, DAVIS 2017\n" + "\n".join(align_columns(cells)))
    return means, failures


def table_lines(rows: list[dict]) -> list[str]:
    """Lay rows out as a table of plain text."""
    cells = [list(COLUMNS.values())]
    for row in rows:
        scores = [number(row[name]) for name in SCORE_NAMES]
        cells.append([row["sequence"], row["tracker"], str(row["num_frames"]), *scores, number(row["fps"], decimals=1)])
    return align_columns(cells)


def align_columns(cells: list[list[str]]) -> list[str]:
    """Lay cells out as lines of plain text; the first two columns are names."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        padded[:2] = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]  # names
        lines.append("  ".join(padded).rstrip())
    return lines


def number(value: float | None, decimals: int = 3) -> str:
    """Write a number for a table; "-" where there is none."""
    return "-" if value is None else f"{value:.{decimals}f}"


@hydra.main(version_base="1.3", config_path="configs/tracking", config_name="track")
def main(cfg: DictConfig) -> None:
    """Read the config, track, and end with one line on what went wrong and status 1, if anything did."""
    with sections.one_line_errors("track", "a smaller tracker.scale_num, or precision=bf16"):
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        failures = track(config, Path(HydraConfig.get().runtime.output_dir))
    if failures:
        sys.exit("\n  ".join([f"{len(failures)} failures; all else is written:", *first_few(failures, MAX_LISTED)]))


if __name__ == "__main__":
    sections.read_command_line("tracking")
    main()
