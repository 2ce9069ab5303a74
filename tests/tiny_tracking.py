"""Tiny videos, configs, networks, and runs of train_siamfc.py, for its tests and the tracker's."""

import functools
import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import tiny
import torch
import torch.nn.functional as F
from tiny import ROOT as ROOT
from tiny import without_timing as without_timing
from torch import nn

import train_siamfc
from train_siamfc import PairSettings
from utils.images import write_image, write_label_map
from utils.tracking.sequences import Sequence
from utils.tracking.siamfc import SiamFC

# ---------------------------------------------------------------------------------------------------------------------
# networks


class SmallBackbone(nn.Module):
    """Random features of AlexNet V1's sizes at a thousandth of its work: 127 px -> 6, 239 px -> 20, 255 px -> 22."""

    def __init__(self, num_channels=8, is_matching=False):
        super().__init__()
        self.conv = nn.Conv2d(3, num_channels, 10)
        self.is_matching = is_matching
        if is_matching:  # blind to brightness and contrast: the correlation is highest at the same pattern
            with torch.no_grad():
                self.conv.weight -= self.conv.weight.mean((1, 2, 3), keepdim=True)
                self.conv.bias.zero_()

    def forward(self, images):
        features = self.conv(F.avg_pool2d(images, 8))
        return F.normalize(features) * 10 if self.is_matching else features


class SmallNormBackbone(nn.Module):
    """The same sizes, with batch norm, from which a network learns and whose statistics a resumed run must have."""

    def __init__(self, num_channels=16):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, num_channels, 10, bias=False), nn.BatchNorm2d(num_channels, momentum=0.05)
        )

    def forward(self, images):
        return 5 * self.conv1(F.avg_pool2d(images, 8))


def small_model(seed=0, **keys) -> SiamFC:
    """A network with a SmallBackbone, in eval mode."""
    torch.manual_seed(seed)
    model = SiamFC(score_bias=False)
    model.backbone = SmallBackbone(**keys)
    return model.eval()


def use_backbone(monkeypatch, make=SmallNormBackbone) -> None:
    """Let train_siamfc.py build its network with another backbone."""

    def small_siamfc(score_bias):
        model = SiamFC(score_bias)
        model.backbone = make()
        return model

    monkeypatch.setattr(train_siamfc, "SiamFC", small_siamfc)


# ---------------------------------------------------------------------------------------------------------------------
# datasets


def textured(seed: int | np.random.Generator, height: int, width: int, blur=2.0) -> np.ndarray:
    """Draw a texture, uint8 (H, W, 3); a generator goes on from where it is."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), blur)
    return np.clip(128 + 50 * noise / noise.std(), 0, 255).astype(np.uint8)


def draw_video(rng: np.random.Generator, num_frames: int, height=120, width=160) -> tuple[list, np.ndarray]:
    """Draw a textured rectangle that moves over faint noise, past bright ones, which a network has to learn to leave.

    Returns:
        frames uint8 (H, W, 3); boxes float64 (T, 4), 0-based.
    """
    ground = rng.integers(90, 120, (height, width, 3)).astype(np.uint8)
    for x, y in rng.integers([0, 0], [width - 20, height - 20], (5, 2)):
        ground[y : y + 20, x : x + 20] = rng.integers(200, 256, 3)
    box_wh = rng.integers(22, 34, 2)
    cells = rng.integers(0, 160, (5, 5, 3)).astype(np.uint8)
    pattern = cv2.resize(cells, box_wh.tolist(), interpolation=cv2.INTER_AREA)
    xy = rng.uniform([20, 20], [width - 60, height - 60])
    step_xy = rng.uniform(-5, 5, 2)
    frames, boxes = [], []
    for t in range(num_frames):
        x, y = np.round(np.clip(xy + t * step_xy, 0, [width, height] - box_wh)).astype(int)
        frame = ground.copy()
        frame[y : y + box_wh[1], x : x + box_wh[0]] = pattern
        frames.append(frame)
        boxes.append([x, y, *box_wh])
    return frames, np.array(boxes, np.float64)


def write_got10k(root: Path, num_train=3, num_val=2, num_frames=5) -> Path:
    """Write videos as data=got10k reads them."""
    rng = np.random.default_rng(0)
    for split, number in (("train", num_train), ("val", num_val)):
        names = [f"{split}_{index + 1:03d}" for index in range(number)]
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            frames, boxes = draw_video(rng, num_frames)
            for t, frame in enumerate(frames):
                write_image(folder / f"{t + 1:08d}.jpg", frame)
            lines = [",".join(f"{value:.4f}" for value in box + [1, 1, 0, 0]) + "\n" for box in boxes]
            (folder / "groundtruth.txt").write_text("".join(lines))
            (folder / "cover.label").write_text("8\n" * num_frames)
            (folder / "absence.label").write_text("0\n" * num_frames)
            height, width, _ = frames[0].shape
            (folder / "meta_info.ini").write_text(f"[METAINFO]\nresolution: ({width}, {height})\n")
        (root / split / "list.txt").write_text("\n".join(names) + "\n")
    return root


def write_imagenet_vid(root: Path, num_frames=4) -> Path:
    """Write two snippets to train on and one to validate on, as data=imagenet_vid reads them."""
    rng = np.random.default_rng(1)
    for part in ("train/ILSVRC2015_VID_train_0000/a", "train/ILSVRC2015_VID_train_0000/b", "val/c"):
        image_dir, annotation_dir = (root / kind / "VID" / part for kind in ("Data", "Annotations"))
        image_dir.mkdir(parents=True)
        annotation_dir.mkdir(parents=True)
        frames, boxes = draw_video(rng, num_frames)
        for t, (frame, box) in enumerate(zip(frames, boxes, strict=True)):
            write_image(image_dir / f"{t:06d}.jpg", frame).rename(image_dir / f"{t:06d}.JPEG")
            x, y, w, h = box.astype(int)
            (annotation_dir / f"{t:06d}.xml").write_text(
                f"<annotation><size><width>{frame.shape[1]}</width><height>{frame.shape[0]}</height></size><object>"
                f"<trackid>0</trackid><bndbox><xmax>{x + w - 1}</xmax><xmin>{x}</xmin><ymax>{y + h - 1}</ymax>"
                f"<ymin>{y}</ymin></bndbox></object></annotation>"
            )
    return root


def write_davis(root: Path, names=("dog", "drift-straight", "bear"), num_frames=4) -> Path:
    """Write videos with a mask per frame, as data=davis_sequences reads them."""
    rng = np.random.default_rng(2)
    for name in names:
        image_dir, mask_dir = root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name
        image_dir.mkdir(parents=True)
        mask_dir.mkdir(parents=True)
        frames, boxes = draw_video(rng, num_frames)
        for t, (frame, box) in enumerate(zip(frames, boxes.astype(int), strict=True)):
            ids = np.zeros(frame.shape[:2], np.int32)
            ids[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 255
            write_image(image_dir / f"{t:05d}.jpg", frame)
            write_label_map(mask_dir / f"{t:05d}.png", ids)
    return root


def write_pictures(root: Path, image_dir="images", label_dir="labels", num_pictures=3) -> Path:
    """Write pictures of one object each, and maps with 1 on it and 2 elsewhere, as data=label_map reads them."""
    rng = np.random.default_rng(3)
    for folder in (image_dir, label_dir):
        (root / folder).mkdir(parents=True)
    for number in range(num_pictures):
        [frame], [box] = draw_video(rng, 1)
        x, y, w, h = box.astype(int)
        ids = np.full(frame.shape[:2], 2, np.int32)
        ids[y : y + h, x : x + w] = 1
        write_image(root / image_dir / f"{number}.jpg", frame)
        write_label_map(root / label_dir / f"{number}.png", ids)
    return root


def write_data_root(data_root: Path) -> Path:
    """Write each dataset that the presets read, in a folder of its own."""
    write_got10k(data_root / "GOT-10k")
    write_imagenet_vid(data_root / "ILSVRC2015")
    write_davis(data_root / "DAVIS2016")
    write_davis(data_root / "DAVIS2016_more")
    write_pictures(data_root / "oxford-iiit-pet", "images", "annotations/trimaps")
    write_coco(data_root / "COCO_panoptic_sample", "input_images", "panoptic_coco_detection_format.json")
    write_coco(data_root / "COCO_labelme_voc3" / "data_dataset_coco", ".", "annotations.json")
    return data_root


def write_coco(root: Path, image_dir: str, annotations: str) -> None:
    """Write a picture with one polygon as COCO has it."""
    [frame], [box] = draw_video(np.random.default_rng(4), 1)
    x, y, w, h = box.tolist()
    (root / image_dir).mkdir(parents=True)
    write_image(root / image_dir / "a.jpg", frame)
    polygon = {"id": 1, "image_id": 7, "category_id": 1, "iscrowd": 0, "area": w * h, "bbox": [x, y, w, h]}
    polygon["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    image = {"id": 7, "file_name": "a.jpg", "height": frame.shape[0], "width": frame.shape[1]}
    record = {"images": [image], "annotations": [polygon], "categories": [{"id": 1, "name": "thing"}]}
    (root / annotations).write_text(json.dumps(record))


def make_sequence(boxes_xywh, frame_wh=(1000, 800), cover=None, visible=None, name="made", box_origin=0) -> Sequence:
    """Make a sequence whose frames are on no disk."""
    boxes_xywh = np.array(boxes_xywh, np.float64)
    if visible is None:
        visible = (boxes_xywh[:, 2:] > 0).all(1) & np.isfinite(boxes_xywh).all(1)
    return Sequence(
        name=name,
        video=name,
        frame_dir=Path("/nowhere"),
        frame_names=tuple(f"{t}.jpg" for t in range(len(boxes_xywh))),
        boxes_xywh=boxes_xywh,
        visible=np.array(visible),
        num_annotated=len(boxes_xywh),
        box_origin=box_origin,
        cover=None if cover is None else np.array(cover),
        frame_wh=frame_wh,
    )


# ---------------------------------------------------------------------------------------------------------------------
# configs and runs


def tiny_overrides(root: Path) -> list[str]:
    """The command-line settings that make a run tiny, on what write_got10k wrote."""
    return [
        "device=cpu",
        "num_workers=0",
        "data=got10k",
        f"data.root={root}",
        "train.batch_size=2",
        "train.log_every=1",
        "train.eval_pairs=2",
        "train.eval_frames=3",
        "train.picture_pairs=1",
    ]


compose_config = functools.partial(tiny.compose_config, "train_siamfc")


def configure(root: Path, *overrides: str) -> dict:
    """Compose the config of a tiny run on what write_got10k wrote."""
    return compose_config(*tiny_overrides(root), *overrides)


train_in = functools.partial(tiny.train_in, train_siamfc)
run_main = functools.partial(tiny.run_main, train_siamfc)


def pair_settings(**changes) -> PairSettings:
    """The default pairs, without any variation but for these changes."""
    plain = {"stretch": 0.0, "exemplar_shift": 0.0, "instance_shift": 0.0, "random_interpolation": False}
    return PairSettings(**(compose_config()["pairs"] | plain | changes))


def make_dataset(config: dict) -> train_siamfc.SiamesePairs:
    """The training set of a config, as train makes it."""
    pairs = PairSettings(**config["pairs"])
    sequences, usable = train_siamfc.keep_usable(train_siamfc.list_data(config["data"])[0], pairs, "train")
    return train_siamfc.SiamesePairs(sequences, usable, config["seed"], pairs)


def make_runs_quick(monkeypatch) -> None:
    """Leave out pictures of curves and the call of git, and take a small network: most of the time of a tiny run."""
    tiny.make_runs_quick(train_siamfc, monkeypatch)
    use_backbone(monkeypatch)


def script_evaluation(monkeypatch, scores: list[float] | None = None) -> None:
    """Let validation return these scores, one after the other (None: always 0.5), without looking at the model."""
    scores = itertools.repeat(0.5) if scores is None else iter(scores)

    def evaluate_tracking(model, sequences, *rest):
        names = [f"{prefix}{name}" for prefix in ("val/", "val/still_") for name in train_siamfc.REPORTED]
        return dict.fromkeys(names, next(scores)) | {"val/num_frames": len(sequences), "val/tracked_per_s": 1.0}

    monkeypatch.setattr(train_siamfc, "evaluate_tracking", evaluate_tracking)
    monkeypatch.setattr(train_siamfc, "evaluate_pairs", lambda *args: {"val/loss": 0.5, "val/hit_rate": 0.5})
