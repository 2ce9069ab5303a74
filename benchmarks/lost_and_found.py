"""Objects that are covered for a while: does the tracker find them again, with tracker.found_score and without?

    DATA_ROOT=/my/datasets python -m benchmarks.lost_and_found choose      # which score, on three makings from DAVIS
    DATA_ROOT=/my/datasets python -m benchmarks.lost_and_found test 0.7    # six makings of OTB and VOT, DragonBaby, AUC

A making: 15 frames as they are, then 10 to 40 in which a patch of another sequence covers the object, then 25 as they
are. Found again: an IoU above 0.5 in one of the first ten frames after that, of those in which the object is there. The
sequences of DAVIS trained the tracker; those of OTB and VOT did not, and choose nothing here. Of these, as they are:
AUC, and each time that the box leaves the object (an IoU of 0), whether it is above 0.5 again in the next ten frames.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks.track_baselines import PROTOCOL, compose_config, list_test_sequences
from utils.images import read_image
from utils.run import REPOSITORY
from utils.settings import read_settings
from utils.tracking.metrics import box_iou, one_pass_scores
from utils.tracking.sequences import Sequence, list_sequences
from utils.tracking.siamfc import load_siamfc
from utils.tracking.tracker import SiamFCTracker, TrackerSettings

NUM_BEFORE, NUM_AFTER, NUM_TRIED = 15, 25, 10
COVER = 1.6  # the patch's sides, times the box's
SCORES = (None, 0.5, 0.6, 0.7, 0.8, 0.9)


def make_absence(sequence: Sequence, other: Sequence, seed: int) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Cover an object for a while: frames uint8 (H, W, 3), boxes (T, 4), and the first frame in which it is back."""
    rng = np.random.default_rng(seed)
    num_absent = min(int(rng.integers(10, 41)), len(sequence) - NUM_BEFORE - NUM_AFTER)
    start = int(rng.integers(0, len(sequence) - NUM_BEFORE - num_absent - NUM_AFTER + 1))
    patch_frame = read_image(other.frame_path(int(rng.integers(len(other)))))
    frames = []
    boxes = sequence.boxes_xywh[start : start + NUM_BEFORE + num_absent + NUM_AFTER]
    for offset in range(len(boxes)):
        frame = read_image(sequence.frame_path(start + offset)).copy()
        if NUM_BEFORE <= offset < NUM_BEFORE + num_absent and np.isfinite(boxes[offset]).all():
            x, y, width, height = boxes[offset]
            size = max(2, round(COVER * width)), max(2, round(COVER * height))
            left, top = round(x + width / 2 - size[0] / 2), round(y + height / 2 - size[1] / 2)
            patch = cv2.resize(patch_frame, size, interpolation=cv2.INTER_AREA)
            x1, y1 = max(0, left), max(0, top)
            x2, y2 = min(frame.shape[1], left + size[0]), min(frame.shape[0], top + size[1])
            if x1 < x2 and y1 < y2:
                frame[y1:y2, x1:x2] = patch[y1 - top : y2 - top, x1 - left : x2 - left]
        frames.append(frame)
    return frames, boxes, NUM_BEFORE + num_absent


def is_found(
    settings: TrackerSettings, frames: list[np.ndarray], boxes: np.ndarray, back: int, model
) -> tuple[bool, int]:
    """Tell whether the object is found again, and in how many of the covered frames it was said to be lost."""
    tracker = SiamFCTracker(model, settings)
    tracker.init(frames[0], boxes[:1])
    tracked, lost = [boxes[0]], [False]
    for frame in frames[1 : back + NUM_TRIED]:
        found_boxes, _, is_lost = tracker.update(frame)
        tracked.append(found_boxes[0])
        lost.append(bool(is_lost[0]))
    iou = box_iou(np.array(tracked), boxes[: len(tracked)])
    return bool((iou[back:] > 0.5).any()), sum(lost[NUM_BEFORE:back])


def list_davis(root: Path) -> list[Sequence]:
    return list_sequences(**compose_config("data=davis_sequences", f"data.root={root}")["data"])


def measure_sequence(settings: TrackerSettings, sequence: Sequence, model) -> tuple[float, int, int]:
    """Track a sequence as it is: AUC; how often the box left the object; how often it was back within ten frames."""
    tracker = SiamFCTracker(model, settings)
    tracker.init(read_image(sequence.frame_path(0)), sequence.boxes_xywh[:1])
    boxes = [sequence.boxes_xywh[0]]
    boxes += [tracker.update(read_image(path))[0][0] for path in sequence.frame_paths[1:]]
    iou = box_iou(np.array(boxes), sequence.boxes_xywh)
    left = [index for index in range(1, len(iou)) if iou[index] == 0 and iou[index - 1] > 0]
    num_back = sum(bool((iou[index + 1 : index + 1 + NUM_TRIED] > 0.5).any()) for index in left)
    return one_pass_scores(np.array(boxes), sequence.boxes_xywh, PROTOCOL)["success_auc"], len(left), num_back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["choose", "test"])
    parser.add_argument("score", type=float, nargs="?")
    parser.add_argument("--data-root", type=Path, default=Path(os.environ.get("DATA_ROOT", REPOSITORY / "data")))
    arguments = parser.parse_args()
    plain = read_settings(TrackerSettings, compose_config()["tracker"], "tracker")
    model = load_siamfc(REPOSITORY / "checkpoints" / "siamfc_alexnet.pt")
    if arguments.part == "choose":
        sequences = list_davis(arguments.data_root / "DAVIS2016_more")
        pairs = [(sequences[number], sequences[number - 1], number) for number in (0, 3, 6)]
        scores = SCORES
    else:
        named = {sequence.name: sequence for sequence in list_test_sequences(None)}
        names = ["Crossing", "Human7", "Jumping", "bag", "book", "Human7"]
        pairs = [(named[name], named[names[number - 1]], 100 + number) for number, name in enumerate(names)]
        scores = (None, arguments.score)
    makings = [(sequence.name, *make_absence(sequence, other, seed)) for sequence, other, seed in pairs]
    print("| found_score | found again | lost frames of those covered |\n|---|---|---|")
    for score in scores:
        settings = replace(plain, found_score=score)
        outcomes = [
            is_found(settings, frames, boxes, back, model) for _, frames, boxes, back in tqdm(makings, disable=None)
        ]
        cells = [f"{name} {'yes' if found else 'no'}" for (name, *_), (found, _) in zip(makings, outcomes, strict=True)]
        covered = sum(back - NUM_BEFORE for *_, back in makings)
        lost = sum(num_lost for _, num_lost in outcomes)
        print(
            f"| {score} | {sum(f for f, _ in outcomes)} of {len(outcomes)}: {', '.join(cells)} | {lost} of {covered} |",
            flush=True,
        )
    if arguments.part == "test":
        print("| sequence | AUC without | with | found again without | with |\n|---|---|---|---|---|")
        rows = []
        for sequence in named.values():
            rows.append([measure_sequence(replace(plain, found_score=score), sequence, model) for score in scores])
            cells = [f"{auc:.3f}" for auc, *_ in rows[-1]] + [f"{back} of {left}" for _, left, back in rows[-1]]
            print(f"| {sequence.name} | {' | '.join(cells)} |", flush=True)
        print("| mean | " + " | ".join(f"{value:.3f}" for value in np.array(rows)[:, :, 0].mean(0)) + " | | |")


if __name__ == "__main__":
    main()
