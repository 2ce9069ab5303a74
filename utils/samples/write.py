"""Generated datasets: small, deterministic, written to disk in the layouts of real datasets.

scenes.py draws what `sam2_nano` is pre-trained on: textured shapes that cover one another, parts on parts, crowds of
small blobs, thin strokes, regions that fill the frame. glassware.py draws vessels with materials inside, for the
default run of train_sam2.py, pets.py cats and dogs, for that of train_unet.py, moving_shapes.py videos, for those of
train_siamfc.py and track.py, and named_shapes.py objects with names, for masks from words. Every picture is a function
of its seed and index alone.
"""

import functools
import shutil
from pathlib import Path

from utils.run import REPOSITORY
from utils.samples.glassware import write_glassware
from utils.samples.moving_shapes import WILD, write_moving_shapes
from utils.samples.named_shapes import write_named_shapes
from utils.samples.pets import write_pets
from utils.samples.scenes import write_scenes
from utils.settings import check_value

NUM_MOVING_SHAPES = {"train": 30, "val": 6}  # videos
NUM_MANY_MOVING_SHAPES = {"train": 400, "val": 6}  # the first of them are those above


def write_samples(kind: str, root: str) -> Path:
    """Write a generated dataset to the repository, unless it is there already.

    Args:
        kind: "glassware" (LabPics V1 layout), "pets" (Oxford-IIIT Pet layout), "moving_shapes" (GOT-10k layout),
            "many_moving_shapes" (the same, more of them), "wild_moving_shapes" (as many, harder to track), "scenes"
            (pictures and label maps) or "named_shapes" (COCO layout).
        root: the dataset's folder below the repository.
    Returns:
        the folder's path.
    Raises:
        ValueError: for another kind, and a root that is no text.
    """
    writers = {
        "glassware": write_glassware,
        "pets": write_pets,
        "moving_shapes": functools.partial(write_moving_shapes, num_videos=NUM_MOVING_SHAPES),
        "many_moving_shapes": functools.partial(write_moving_shapes, num_videos=NUM_MANY_MOVING_SHAPES),
        "wild_moving_shapes": functools.partial(write_moving_shapes, num_videos=NUM_MANY_MOVING_SHAPES, motion=WILD),
        "scenes": write_scenes,
        "named_shapes": write_named_shapes,
    }
    if kind not in writers:
        raise ValueError(f"data.generate is {kind!r}; must be one of {', '.join(writers)}")
    check_value(root, str, "data.root")
    folder = REPOSITORY / root
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".tmp")  # renamed when whole: a killed run leaves nothing half made
        shutil.rmtree(partial, ignore_errors=True)
        print(f"writing generated {kind} to {folder}")
        writers[kind](partial)
        partial.rename(folder)
    return folder
