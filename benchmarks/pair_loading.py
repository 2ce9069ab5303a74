"""Training pairs per second cut from 1080p frames, against the usual way, in one process.

    python -m benchmarks.pair_loading

The usual way (as siamfc-pytorch with the GOT-10k toolkit): for each pair list the folder, parse the annotation files,
decode the first frame for its size, decode the two frames, convert, average and pad both as a whole, cut and resize.
Ours is `train_siamfc.SiamesePairs`, which has listed the sequences once. Both draw the same pairs, equal to the byte.
"""

import tempfile
from pathlib import Path

import cv2
import numpy as np

from benchmarks.measure import print_result, time_in_turn
from benchmarks.plain_siamfc import padded_patch
from train_siamfc import INSTANCE_SIZE, INTERPOLATIONS, PairSettings, SiamesePairs, draw_frames, usable_frames
from utils.images import write_image
from utils.run import sample_rng, shuffled_item
from utils.tracking.sequences import split_sequences
from utils.tracking.siamfc import EXEMPLAR_SIZE

NUM_SEQUENCES, NUM_FRAMES, SIZE_HW = 4, 6, (1080, 1920)
NUM_PAIRS, REPEATS = 16, 5
PAIRS = PairSettings(
    max_gap=100, stretch=0.05, exemplar_shift=4.0, instance_shift=4.0, grey=0.0, color_jitter=0.0,
    blur=0.0, random_interpolation=True, random_boxes=0.0, min_side=20, max_side=500, min_share=0.01, max_share=0.5,
    max_aspect=4.0, min_cover=0.3,
)  # fmt: skip


def write_sequences(root: Path) -> None:
    """Write videos of textured frames in GOT-10k's layout."""
    rng = np.random.default_rng(0)
    height, width = SIZE_HW
    for number in range(NUM_SEQUENCES):
        folder = root / "train" / f"video_{number}"
        folder.mkdir(parents=True)
        boxes = []
        for frame in range(NUM_FRAMES):
            noise = cv2.GaussianBlur(rng.normal(size=(height, width, 3)).astype(np.float32), (0, 0), 3)
            image = np.clip(128 + 50 * noise / noise.std(), 0, 255).astype(np.uint8)
            write_image(folder / f"{frame + 1:08d}.jpg", image)
            x, y = rng.integers(1, width - 250), rng.integers(1, height - 200)
            boxes.append(f"{x},{y},{rng.integers(60, 240)},{rng.integers(60, 190)}")
        (folder / "groundtruth.txt").write_text("\n".join(boxes) + "\n")
        for label, value in (("absence", 0), ("cut_by_image", 0), ("cover", 8)):
            (folder / f"{label}.label").write_text(f"{value}\n" * NUM_FRAMES)
        (folder / "meta_info.ini").write_text(f"[METAINFO]\nresolution: ({width}, {height})\n")


def plain_pair(folders: list[Path], sample_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut one pair the usual way: exemplar (127, 127, 3), instance (239, 239, 3), uint8."""
    number = shuffled_item(0, sample_index, len(folders))
    paths = sorted(folders[number].glob("*.jpg"))
    boxes = np.loadtxt(folders[number] / "groundtruth.txt", delimiter=",", dtype=np.float32)
    for label in ("absence", "cut_by_image", "cover"):
        np.loadtxt(folders[number] / f"{label}.label", dtype=np.uint8)
    (folders[number] / "meta_info.ini").read_text().split("\n")
    cv2.imread(str(paths[0]))  # for its size, which the filter of boxes needs
    rng = sample_rng(0, sample_index)
    rng.random()
    frames = draw_frames(np.arange(len(paths)), PAIRS.max_gap, rng)
    images = [cv2.cvtColor(cv2.imread(str(paths[frame])), cv2.COLOR_BGR2RGB) for frame in frames]
    patches = []
    for image, frame, out_size, shift_px in zip(
        images, frames, (EXEMPLAR_SIZE, INSTANCE_SIZE), (PAIRS.exemplar_shift, PAIRS.instance_shift), strict=True
    ):
        x, y, w, h = boxes[frame] - np.array([1, 1, 0, 0], np.float32)
        context = np.float32(0.5) * (w + h)
        side = float(np.sqrt((w + context) * (h + context))) * out_size / EXEMPLAR_SIZE
        side *= 1 + PAIRS.stretch * rng.uniform(-1, 1)
        shift_xy = rng.uniform(-shift_px, shift_px, 2) * side / out_size
        interpolation = INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]
        center_yx = (np.array([y + (h - 1) / 2, x + (w - 1) / 2], np.float32) + shift_xy[::-1]).astype(np.float32)
        color = np.mean(image, axis=(0, 1))
        patches.append(padded_patch(image, center_yx, side, out_size, color, interpolation)[0])
    return patches[0], patches[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_sequences(Path(folder))
        sequences, _ = split_sequences(
            format="got10k", root=folder, index=None, train_folder="train", val_folder=None, leave_out=[],
            train_sequences=None, val_sequences=[], val_fraction=0.0, split_seed=0, box_origin=1, on_bad="stop",
        )  # fmt: skip
        dataset = SiamesePairs(sequences, [usable_frames(sequence, PAIRS) for sequence in sequences], 0, PAIRS)
        folders = [sequence.frame_dir for sequence in sequences]
        for index in range(NUM_PAIRS):
            sample, plain = dataset[index], plain_pair(folders, index)
            for ours, other in zip((sample["exemplar"], sample["instance"]), plain, strict=True):
                assert np.array_equal(ours.permute(1, 2, 0).numpy(), other), index
        ours_s, plain_s = time_in_turn(
            lambda: [dataset[index] for index in range(NUM_PAIRS)],
            lambda: [plain_pair(folders, index) for index in range(NUM_PAIRS)],
            REPEATS,
        )
    checked = f"{NUM_PAIRS} exemplars and instances, to the byte"
    per_s = {"ours_pairs_per_s": round(NUM_PAIRS / ours_s, 1), "plain_pairs_per_s": round(NUM_PAIRS / plain_s, 1)}
    print_result("pair loading, 1080p", 5.0, ours_s, plain_s, checked, **per_s)


if __name__ == "__main__":
    main()
