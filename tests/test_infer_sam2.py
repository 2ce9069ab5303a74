"""infer_sam2.py: each mode against sam2's own predictor, the files it writes, checkpoints, folders, and bad input."""

import csv
import functools
import json
import shutil
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import tiny_training
import torch
from forked import run_python
from options import read_option
from pycocotools import mask as coco_mask

import infer_sam2
from infer_sam2 import infer
from utils.checkpoint import save_checkpoint
from utils.images import list_images, overlay_label_map, read_image, write_image
from utils.instances.readers import read_sa1b
from utils.sam2 import model as models
from utils.sam2.fast_decoder import decode_fast
from utils.sam2.model import build_sam2, decode

ROOT = Path(__file__).resolve().parent.parent
NANO = read_option("sam2", "model", "sam2_nano")
MANY_MASKS = [  # random weights: masks cover the whole picture and no score is high
    "automatic.pred_iou_thresh=0.01",
    "automatic.stability_score_thresh=0.01",
    "automatic.stability_score_offset=0.1",
    "automatic.box_nms_thresh=1.0",
    "automatic.points_per_side=6",
    "automatic.crop_n_layers=0",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """best.pt and official.pt of a nano with random weights that answer to the prompt, and one picture with a mask."""
    folder = tmp_path_factory.mktemp("infer")
    torch.manual_seed(0)
    model = tiny_training.answer_to_prompts(build_sam2(**NANO | {"checkpoint": "none"}, device="cpu"))
    save_checkpoint(folder / "best.pt", {"model": model.state_dict(), "config": {"model": NANO}, "format": 1})
    save_checkpoint(folder / "official.pt", {"model": model.state_dict()})
    rng = np.random.default_rng(0)
    image_rgb = cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)
    write_image(folder / "photo.png", image_rgb)
    region = np.zeros((120, 160), np.uint8)
    region[30:80, 50:120] = 255
    write_image(folder / "region.png", region)
    return folder


compose_config = functools.partial(tiny.compose_config, "infer_sam2", "device=cpu")


def run(folder, run_dir, *overrides):
    """Run infer in this process; {name: json}, label maps by name, and the failures."""
    run_dir.mkdir(exist_ok=True)
    if not any(override.startswith("checkpoint=") for override in overrides):
        overrides = [f"checkpoint={folder / 'best.pt'}", *overrides]
    failures = infer(compose_config(*overrides), run_dir)
    records = {path.stem: json.loads(path.read_text()) for path in run_dir.glob("*.json") if path.stem != "run"}
    labels = {path.name[:-11]: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in run_dir.glob("*_labels.png")}
    return records, labels, failures


def run_command(*arguments, cwd):
    """Run the real command."""
    return run_python(ROOT / "infer_sam2.py", "device=cpu", *arguments, cwd=cwd)


def masks_of(record):
    return [coco_mask.decode(annotation["segmentation"]).astype(bool) for annotation in record["annotations"]]


@pytest.fixture(scope="module")
def predictor(folder):
    """sam2's own predictor with the same weights, looking at photo.png."""
    model = build_sam2(**NANO | {"checkpoint": str(folder / "best.pt")}, device="cpu")
    predictor = tiny_training.make_predictor(model)
    predictor.set_image(read_image(folder / "photo.png"))
    return predictor


# ---------------------------------------------------------------------------------------------------------------------
# modes


POINTS = [[40.0, 50.0, 1], [100.0, 20.0, 0], [60.0, 90.0, 1]]
BOX = [20.0, 30.0, 110.0, 100.0]


@pytest.mark.parametrize(
    "prompt",
    [
        {"points": POINTS[:1]},
        {"points": POINTS[:2]},
        {"box": BOX},
        {"box": BOX, "points": POINTS},
        {"mask": "region.png", "points": POINTS[:1]},
        {"mask": "region.png", "box": BOX},
    ],
    ids=lambda prompt: "+".join(prompt) + str(len(prompt.get("points", []))),
)
def test_prompts_give_the_masks_of_the_official_predictor(folder, tmp_path, predictor, monkeypatch, prompt):
    monkeypatch.chdir(folder)
    arguments = {"points": prompt.get("points"), "boxes": [prompt["box"]] if "box" in prompt else None}
    overrides = [f"{key}={value}".replace(" ", "") for key, value in arguments.items() if value]
    overrides += ["mask=region.png"] if "mask" in prompt else []
    asked = []  # the masks cannot tell: where the single mask is unstable the decoder itself returns one of the three
    monkeypatch.setattr(
        "utils.sam2.model.decode", lambda *args, **kwargs: asked.append(kwargs) or decode(*args, **kwargs)
    )
    records, labels, _ = run(folder, tmp_path / "run", "input=photo.png", "mode=prompts", *overrides)

    mask_input = None
    if "mask" in prompt:  # as in SAM 2's training: logits of +-10, resized with antialiasing
        region = torch.from_numpy(cv2.imread("region.png", 0)).float()[None, None] / 255 * 20 - 10
        mask_input = torch.nn.functional.interpolate(region, (64, 64), mode="bilinear", antialias=True)[0].numpy()
    is_single_click = set(prompt) == {"points"} and len(prompt["points"]) == 1
    masks, ious, _ = predictor.predict(
        np.array(prompt["points"])[:, :2] if "points" in prompt else None,
        np.array(prompt["points"])[:, 2] if "points" in prompt else None,
        np.array(prompt["box"]) if "box" in prompt else None,
        mask_input,
        multimask_output=is_single_click,
    )
    assert len(masks) == (3 if is_single_click else 1)
    assert [prompt["multimask_output"] for prompt in asked] == [is_single_click]
    expected = masks[ious.argmax()] > 0
    (annotation,) = records["photo"]["annotations"]
    (mask,) = masks_of(records["photo"])
    assert 0 < expected.sum() < expected.size
    assert (mask != expected).mean() < 1e-3
    assert annotation["predicted_iou"] == pytest.approx(ious.max(), abs=1e-4)
    assert annotation["point_coords"] == [point[:2] for point in prompt.get("points", [])]
    np.testing.assert_array_equal(labels["photo"], mask)


def test_several_objects_at_once_equal_one_at_a_time(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    objects = [
        {"points": POINTS},
        {"box": BOX},
        {"points": POINTS[:1]},
        {"mask": "region.png"},
        {"box": [5, 6, 70, 80]},
        {"mask": "region.png", "points": POINTS[:1]},
        {"points": [POINTS[2]]},
    ]

    def predict(name, prompts):
        (tmp_path / f"{name}.json").write_text(json.dumps(prompts))
        arguments = [
            "input=photo.png",
            "mode=prompts",
            f"prompts_file={tmp_path / name}.json",
            "automatic.points_per_batch=2",
        ]
        record = run(folder, tmp_path / name, *arguments)[0]["photo"]
        return {
            annotation["predicted_iou"]: mask
            for annotation, mask in zip(record["annotations"], masks_of(record), strict=True)
        }

    together = predict("together", objects)
    assert len(together) == len(objects)
    for index, object_prompt in enumerate(objects):
        ((iou, mask),) = predict(f"object{index}", [object_prompt]).items()
        nearest = min(together, key=lambda other: abs(other - iou))
        assert nearest == pytest.approx(iou, abs=1e-5)
        assert (together[nearest] != mask).mean() < 1e-3


def test_box_prompts_of_the_command_line_are_one_object_each(folder, tmp_path):
    boxes = f"boxes=[{BOX},[5,6,70,80]]".replace(" ", "")
    records, _, _ = run(folder, tmp_path / "run", f"input={folder / 'photo.png'}", "mode=prompts", boxes)
    assert len(records["photo"]["annotations"]) == 2
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))
    assert [row["name"] for row in rows] == ["photo.png"] and rows[0]["masks"] == "2"


@pytest.mark.parametrize("num_points", [1, 30])
def test_region_gives_one_mask_a_point(folder, tmp_path, predictor, num_points):
    """Each is the mask of highest predicted IoU; the tutorial takes the first of three, and of a single point's mask
    one row: its masks[:, 0] expects an axis of prompts.
    """
    arguments = [f"input={folder / 'photo.png'}", "mode=region", f"region={folder / 'region.png'}"]
    arguments += [f"num_points={num_points}"] if num_points != 30 else []  # 30 is the default
    record = run(folder, tmp_path / "run", *arguments)[0]["photo"]
    assert len(record["annotations"]) == num_points
    region = cv2.imread(str(folder / "region.png"), 0) > 0
    num_first = 0
    for annotation, mask in list(zip(record["annotations"], masks_of(record), strict=True))[:5]:
        ((x, y),) = annotation["point_coords"]
        assert region[int(y), int(x)]
        masks, ious, _ = predictor.predict(np.array([[x, y]]), np.array([1]))
        assert (mask != (masks[ious.argmax()] > 0)).mean() < 1e-3
        num_first += (mask != (masks[0] > 0)).mean() < 1e-3
    assert num_points == 1 or num_first < 5


@pytest.mark.parametrize("mode", [MANY_MASKS, ["mode=prompts", f"boxes={[BOX]}".replace(" ", "")]], ids=["grid", "box"])
def test_fast_decoder_finds_the_same_masks(folder, tmp_path, mode, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "utils.sam2.model.decode_fast", lambda *args, **keys: calls.append(1) or decode_fast(*args, **keys)
    )
    exact = run(folder, tmp_path / "exact", f"input={folder / 'photo.png'}", *mode, "fast_decoder=false")
    assert not calls
    fast = run(folder, tmp_path / "fast", f"input={folder / 'photo.png'}", *mode)
    assert calls  # by default, on a CPU
    assert (fast[1]["photo"] != exact[1]["photo"]).mean() < 1e-3
    masks, expected = masks_of(fast[0]["photo"]), masks_of(exact[0]["photo"])
    assert len(masks) == len(expected) >= 1
    for mask, other in zip(masks, expected, strict=True):
        assert (mask & other).sum() >= 0.999 * (mask | other).sum()


def test_automatic_masks_and_their_files(folder, tmp_path):
    records, labels, _ = run(folder, tmp_path / "run", f"input={folder / 'photo.png'}", *MANY_MASKS, "max_overlap=0.9")
    record, label_map = records["photo"], labels["photo"]
    assert record["image"] == {"image_id": 1, "width": 160, "height": 120, "file_name": "photo.png"}
    count = len(record["annotations"])
    assert 50 < count <= 3 * 6 * 6
    assert label_map.dtype == np.uint16 and label_map.max() >= 2
    assert [annotation["id"] for annotation in record["annotations"]] == list(range(1, count + 1))
    taken = np.zeros(label_map.shape, bool)
    for annotation, mask in zip(record["annotations"], masks_of(record), strict=True):
        ys, xs = np.nonzero(mask)
        assert annotation["area"] == mask.sum() == coco_mask.area(annotation["segmentation"])
        assert annotation["bbox"] == [xs.min(), ys.min(), xs.max() - xs.min(), ys.max() - ys.min()]
        assert set(annotation) == {
            "id", "segmentation", "bbox", "area", "predicted_iou", "stability_score", "point_coords", "crop_box"
        }  # fmt: skip
        if annotation["id"] <= label_map.max():  # the label map's ids are the json's, best first
            np.testing.assert_array_equal(label_map == annotation["id"], mask & ~taken)
            taken |= mask
    overlay = cv2.cvtColor(cv2.imread(str(tmp_path / "run" / "photo_overlay.png")), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(
        overlay, overlay_label_map(read_image(folder / "photo.png"), label_map.astype(np.int32))
    )
    assert np.abs(overlay.astype(int) - overlay[..., ::-1]).max() > 50  # red and blue exchanged would be seen
    run_record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run_record["end"] and run_record["metrics"]["last"]["num_masks"] == count
    assert run_record["config"]["automatic"]["points_per_side"] == 6

    layers = read_sa1b(tmp_path / "run" / "photo.json", folder / "photo.png").layers
    assert len(np.unique(layers[layers > 0])) == count  # our own reader, for data=sa1b

    again = run(folder, tmp_path / "again", f"input={folder / 'photo.png'}", *MANY_MASKS, "max_overlap=0.9")
    assert again[0] == records
    np.testing.assert_array_equal(again[1]["photo"], label_map)


def test_no_mask_at_all_still_writes_everything(folder, tmp_path):
    arguments = [f"input={folder / 'photo.png'}", "automatic.pred_iou_thresh=1", "automatic.points_per_side=4"]
    records, labels, _ = run(folder, tmp_path / "run", *arguments)
    assert records["photo"]["annotations"] == [] and not labels["photo"].any()
    assert (tmp_path / "run" / "photo_overlay.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# folders


def test_a_folder_goes_on_past_a_picture_that_cannot_be_read(folder, tmp_path, monkeypatch, capfd):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shutil.copy(folder / "photo.png", pictures / "a.png")
    (pictures / "b.jpg").write_text("no picture")
    shutil.copy(folder / "photo.png", pictures / "c.png")
    cv2.imwrite(str(pictures / "c.jpg"), cv2.imread(str(folder / "photo.png")))  # the same stem
    (pictures / "notes.txt").write_text("left alone")
    monkeypatch.chdir(tmp_path)
    arguments = ["device=cpu", "input=pictures", f"checkpoint={folder / 'best.pt'}", *MANY_MASKS]
    status, output = tiny.run_main(infer_sam2, monkeypatch, capfd, Path("run"), *arguments)
    assert status == 1
    assert output.rstrip().splitlines()[-1].startswith("  pictures/b.jpg: ")
    assert "Traceback" not in output
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"a_labels.png", "a_overlay.png", "a.json", "c_png.json", "c_jpg.json", "c_jpg_labels.png"} <= written
    assert not any(name.startswith("b") for name in written)
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))
    assert [row["name"] for row in rows] == ["a.png", "c.jpg", "c.png"]
    assert all(float(row["encode_ms"]) > 0 and float(row["ms_per_prompt"]) > 0 for row in rows)


def test_the_next_picture_is_read_while_one_is_segmented(folder, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name in "abc":
        shutil.copy(folder / "photo.png", tmp_path / "photos" / f"{name}.png")
    was_read = {name: threading.Event() for name in "abc"}
    real_read, real_segment = infer_sam2.images.read_image_unscaled, infer_sam2.segment_objects

    def read(path, page):
        was_read[path.stem].set()
        return real_read(path, page)

    def segment(model, image_rgb, objects, automatic, plan, picture, class_head):
        following = {"a": "b", "b": "c"}.get(picture.path.stem)
        assert following is None or was_read[following].wait(10), following
        return real_segment(model, image_rgb, objects, automatic, plan, picture, class_head)

    monkeypatch.setattr(infer_sam2.images, "read_image_unscaled", read)
    monkeypatch.setattr(infer_sam2, "segment_objects", segment)
    arguments = [f"input={tmp_path / 'photos'}", "mode=prompts", f"boxes=[{BOX}]"]
    records, _, failures = run(folder, tmp_path / "run", *arguments)
    assert sorted(records) == ["a", "b", "c"] and failures == []


def test_prompts_of_a_folder(folder, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(folder / "photo.png", pictures / f"{name}.png")
    prompts = {"a.png": [{"box": BOX}, {"points": POINTS}], "c.png": [{"points": [[500, 10, 1]]}]}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    arguments = [f"input={pictures}", "mode=prompts", f"prompts_file={tmp_path / 'prompts.json'}"]
    records, _, failures = run(folder, tmp_path / "run", *arguments)
    assert set(records) == {"a"} and len(records["a"]["annotations"]) == 2
    assert len(failures) == 1 and "c.png" in failures[0] and "outside the picture of 160 x 120 px" in failures[0]


FORMATS = "write=[coco,labelme,yolo,cutouts]"


def test_formats_on_request_hold_the_label_maps_objects(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    shutil.copy(folder / "photo.png", tmp_path / "photos" / "été 1.png")
    page = cv2.imread(str(folder / "photo.png"))
    cv2.imwritemulti(str(tmp_path / "photos" / "stack.tif"), [page, page[:, ::-1]])
    (tmp_path / "photos" / "broken.jpg").write_text("no picture")
    arguments = [f"input={tmp_path / 'photos'}", *MANY_MASKS, "max_overlap=0.9", "automatic.points_per_side=3"]
    plain = run(folder, tmp_path / "plain", *arguments)
    records, labels, failures = run(folder, tmp_path / "run", *arguments, FORMATS, "outline_tolerance_px=0")
    assert records == plain[0] and len(failures) == 1
    assert not {path.name for path in (tmp_path / "plain").iterdir()} & {"coco", "labelme", "yolo", "cutouts", "pages"}
    coco = json.loads((tmp_path / "run" / "coco" / "annotations.json").read_text())
    assert [image["file_name"].split("/")[-1] for image in coco["images"]] == [
        "stack_0001.png", "stack_0002.png", "été 1.png"
    ]  # fmt: skip
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "run" / "summary.csv").open(encoding="utf-8"))}
    num_written = 0
    for image, name in zip(coco["images"], ("stack_0001", "stack_0002", "été 1"), strict=True):
        num_objects, annotations = int(labels[name].max()), records[name]["annotations"]
        assert 1 < num_objects < len(annotations) and image["id"] == records[name]["image"]["image_id"]
        expected = [annotation["segmentation"] for annotation in annotations[:num_objects]]
        written = [each["segmentation"] for each in coco["annotations"] if each["image_id"] == image["id"]]
        assert written == expected
        shapes = json.loads((tmp_path / "run" / "labelme" / f"{name}.json").read_text())["shapes"]
        rings = [coco_mask.merge(coco_mask.frPyObjects([sum(s["points"], [])], 120, 160)) for s in shapes]
        both = [coco_mask.decode(coco_mask.merge(each)).astype(bool) for each in (rings, expected)]
        np.testing.assert_array_equal(*both)
        lines = (tmp_path / "run" / "yolo" / "labels" / f"{name}.txt").read_text().splitlines()
        assert len(lines) == num_objects == len(list((tmp_path / "run" / "cutouts").glob(f"{name}_*.png")))
        assert (tmp_path / "run" / "yolo" / "images" / f"{name}.png").is_file()
        row = rows.get(name) or rows[f"{name}.png"]
        num_islands = len(shapes) - num_objects
        assert int(row["yolo_lost_islands"]) == num_islands and int(row["yolo_lost_holes"]) >= 0
        num_written += num_objects
    assert [each["id"] for each in coco["annotations"]] == list(range(1, num_written + 1))


def test_formats_of_prompts_hold_a_mask_for_each(folder, tmp_path):
    boxes = f"boxes=[{BOX},{BOX}]".replace(" ", "")  # the same mask twice: one of them is in the label map
    arguments = [f"input={folder / 'photo.png'}", "mode=prompts", boxes, "write=[coco]"]
    _, labels, _ = run(folder, tmp_path / "run", *arguments)
    assert labels["photo"].max() == 1
    coco = json.loads((tmp_path / "run" / "coco" / "annotations.json").read_text())
    assert len(coco["annotations"]) == 2 and coco["images"][0]["file_name"] == "photo.png"


def test_an_interrupted_run_leaves_a_coco_file_of_what_is_done(folder, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name in "ab":
        shutil.copy(folder / "photo.png", tmp_path / "photos" / f"{name}.png")
    real = infer_sam2.segment_objects

    def interrupt(*args):
        if args[-2].path.stem == "b":
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(infer_sam2, "segment_objects", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "run", f"input={tmp_path / 'photos'}", "mode=prompts", f"boxes=[{BOX}]", "write=[coco]")
    coco = json.loads((tmp_path / "run" / "coco" / "annotations.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["a.png"] and len(coco["annotations"]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def test_official_and_own_checkpoints_give_the_same_masks(folder, tmp_path):
    arguments = [f"input={folder / 'photo.png'}", "mode=prompts", f"boxes=[{BOX}]".replace(" ", "")]
    own = run(folder, tmp_path / "own", *arguments)[0]
    recognised = run(folder, tmp_path / "recognised", *arguments, f"checkpoint={folder / 'official.pt'}")[0]
    named = run(folder, tmp_path / "named", *arguments, f"checkpoint={folder / 'official.pt'}", "model=sam2_nano")[0]
    through_model = [*arguments, "model=sam2_nano", f"model.checkpoint={folder / 'official.pt'}", "checkpoint=null"]
    assert own == recognised == named == run(folder, tmp_path / "model", *through_model)[0]


def test_geometry_comes_from_the_checkpoint(folder, tmp_path):
    state = torch.load(folder / "best.pt", weights_only=True)
    state["config"]["model"] = NANO | {"image_size": 128, "automatic": NANO["automatic"] | {"points_per_side": 5}}
    save_checkpoint(tmp_path / "best.pt", state)
    assert models.choose_model(tmp_path / "best.pt", None, None)["image_size"] == 128
    assert models.choose_model(tmp_path / "best.pt", None, NANO)["image_size"] == 128
    assert models.choose_model(tmp_path / "best.pt", 192, None)["image_size"] == 192
    named = NANO | {"checkpoint": str(tmp_path / "best.pt")}  # model.checkpoint=, as train_sam2.py has it
    assert models.choose_model(None, None, named)["image_size"] == 128
    for checkpoint in (None, tmp_path / "best.pt"):
        assert models.choose_model(checkpoint, None, named | {"image_size": 160})["image_size"] == 160
    assert models.choose_model(tmp_path / "best.pt", None, None)["automatic"]["points_per_side"] == 5
    assert models.choose_model(None, None, None) == models.choose_model("auto", None, None) == NANO
    assert models.choose_model("none", None, None) == NANO | {"checkpoint": "none"}  # random weights
    with pytest.raises(ValueError, match="is of model sam2_nano, not sam2.1_hiera_tiny; leave out model="):
        models.choose_model(tmp_path / "best.pt", None, NANO | {"name": "sam2.1_hiera_tiny"})
    save_checkpoint(tmp_path / "other.pt", {"model": {"weight": torch.zeros(3)}})
    with pytest.raises(ValueError, match="of no SAM 2 model that this toolkit knows"):
        models.choose_model(tmp_path / "other.pt", None, None)
    with pytest.raises(FileNotFoundError, match=r"missing\.pt does not exist"):
        models.choose_model(tmp_path / "missing.pt", None, None)


def test_random_weights_follow_the_seed(folder, tmp_path):
    arguments = [
        "checkpoint=none",
        f"input={folder / 'photo.png'}",
        "mode=prompts",
        f"points={POINTS[:1]}",
        "image_size=64",
    ]
    made = [run(folder, tmp_path / f"{n}", *arguments, f"seed={seed}")[0]["photo"] for n, seed in enumerate((0, 0, 1))]
    assert made[0]["annotations"] == made[1]["annotations"] != made[2]["annotations"]


# What a user of sam2 does with best.pt, in a process that knows nothing of this project.
UNTOUCHED_SAM2 = r"""
import json, sys
import numpy as np
from PIL import Image
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor

checkpoint, picture, point, box, masks_path = sys.argv[1:]
model = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", checkpoint, device="cpu")
predictor = SAM2ImagePredictor(model)
predictor.set_image(np.array(Image.open(picture)))
masks, scores, _ = predictor.predict(np.array([json.loads(point)[:2]]), np.array([1]))
box_masks, _, _ = predictor.predict(box=np.array(json.loads(box)), multimask_output=False)
np.save(masks_path, np.stack([masks[scores.argmax()], box_masks[0]]) > 0)
"""


@pytest.mark.slow
def test_best_checkpoint_of_training_predicts_the_same_in_an_untouched_sam2(folder, tmp_path, monkeypatch):
    """An official model, random weights, one step at 256 px; then one point and one box at 1024 px."""
    root = tiny_training.write_dataset(tmp_path / "data")
    overrides = ["model=sam2.1_hiera_tiny", "model.checkpoint=none", "model.image_size=256", "train.steps=1"]
    overrides += ["train.batch_size=1", "train.objects_per_image=1", "prompts.max_corrections=1"]
    config = tiny_training.compose_config(*tiny_training.tiny_overrides(root), *overrides)
    tiny_training.make_runs_quick(monkeypatch)
    tiny_training.script_evaluation(monkeypatch, [0.1, 0.2])
    tiny_training.train_in(tmp_path / "trained", config)
    best_path, picture = tmp_path / "trained" / "best.pt", folder / "photo.png"
    assert torch.load(best_path, weights_only=True)["metrics"]["step"] == 1

    prompts_path = tmp_path / "prompts.json"
    prompts_path.write_text(json.dumps([{"points": POINTS[:1]}, {"box": BOX}]))
    arguments = [f"checkpoint={best_path}", f"input={picture}", "mode=prompts", f"prompts_file={prompts_path}"]
    arguments += ["image_size=1024"]
    annotations = run(folder, tmp_path / "ours", *arguments)[0]["photo"]["annotations"]
    ours = {
        len(annotation["point_coords"]): coco_mask.decode(annotation["segmentation"]) > 0 for annotation in annotations
    }

    arguments = best_path, picture, POINTS[0], BOX, tmp_path / "masks.npy"
    done = run_python("-c", UNTOUCHED_SAM2, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    point_mask, box_mask = np.load(tmp_path / "masks.npy")
    assert all(0.05 < mask.mean() < 0.95 for mask in (point_mask, box_mask)) and (point_mask != box_mask).any()
    assert (ours[1] != point_mask).mean() < 1e-3 and (ours[0] != box_mask).mean() < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["input=missing.jpg"], "input missing.jpg does not exist"),
        (["input=nothing_here"], "input nothing_here has no pictures"),
        (["input=text.jpg"], "text.jpg cannot be decoded"),
        (["mode=fast"], "mode is fast; must be one of automatic, region, prompts"),
        (
            ["points=[[1,2,1]]"],
            "points= is given but mode is automatic, which does not use it: leave it out, or take mode=prompts",
        ),
        (["region=region.png"], "region= is given but mode is automatic.*leave it out, or take mode=region"),
        (["automatic.points_per_side=0"], "points_per_side is 0; must be 1 or more"),
        (["automatic.points_per_batch=0"], "automatic.points_per_batch is 0; must be 1 or more"),
        (["automatic.points_per_batch=-3"], "automatic.points_per_batch is -3; must be 1 or more"),
        (["automatic.crop_n_points_downscale_factor=0"], "crop_n_points_downscale_factor is 0; must be 1 or more"),
        (["automatic.stability_score_offset=-1"], "automatic.stability_score_offset is -1; must be 0 or more"),
        (["fast_decoder=maybe"], "fast_decoder is maybe; must be auto, true or false"),
        (["mode=region"], "mode=region needs region="),
        (["mode=region", "region=missing.png"], "no file missing.png"),
        (["mode=region", "region=small.png"], "region mask is 30 x 20 px, its picture 160 x 120; must be equal"),
        (["mode=region", "region=empty.png"], "region mask is empty"),
        (["mode=region", "region=region.png", "num_points=0"], "num_points is 0"),
        (["num_points=many"], "num_points is 'many'; must be a whole number"),
        (["max_overlap=x"], "max_overlap is 'x'; must be a number"),
        (["max_overlap=15"], "max_overlap is 15; must be between 0 and 1"),
        (["automatic.crop_overlap_ratio=-1"], "automatic.crop_overlap_ratio is -1; must be between 0 and 1"),
        (["automatic.box_nms_thresh=nan"], "automatic.box_nms_thresh is nan; must be between 0 and 1"),
        (["automatic.pred_iou_thresh=nan"], "automatic.pred_iou_thresh is nan; must be finite"),
        (["image_size=0"], "model.image_size is 0; must be a multiple of 32"),
        (
            ["mode=prompts", "points=[[5,6,1]]", "automatic.min_area=9"],
            "automatic.min_area= is given but mode is prompts, .* take mode=automatic or mode=label",
        ),
        (["write=[coco,voc]"], r"write is \['coco', 'voc'\]; must be a list of some of coco, labelme, yolo, cutouts"),
        (["write=coco"], "write is 'coco'; must be a list"),
        (["write=[yolo]", "outline_tolerance_px=-1"], "outline_tolerance_px is -1; must be 0 or more"),
        (["write=[yolo]", "outline_tolerance_px=inf"], "outline_tolerance_px is inf; must be finite"),
        (["mode=compare", "input=null", "checkpoint=null", "results=[a,b]", "seed=-1"], "seed is -1; must be a whole"),
        (
            ["mode=compare", "input=null", "checkpoint=null", "write=[coco]"],
            "write= is given but mode is compare.*take mode=automatic",
        ),
        (["mode=prompts", "points=5"], "points is 5; must be a list or null"),
        (["image_size=1.5"], "image_size is 1.5; must be a whole number or null"),
        (["automatic.points_per_side=2.5"], "automatic.points_per_side is 2.5; must be a whole number"),
        (
            ["checkpoint=null", "model=sam2_nano", "model.image_size=big"],
            "model.image_size is 'big'; must be a whole number",
        ),
        (["mode=prompts"], "mode=prompts needs points=, boxes=, mask=, text= or prompts_file="),
        (["mode=prompts", "points=[[160,5,1]]"], r"point \[160, 5\] lies outside the picture of 160 x 120 px"),
        (["mode=prompts", "points=[[5,-1,1]]"], r"point \[5, -1\] lies outside"),
        (["mode=prompts", "points=[[5,6]]"], r"point is \[5, 6\]; must be \[x, y, label\]"),
        (["mode=prompts", "points=[[5,6,2]]"], r"point is \[5, 6, 2\]; must be"),
        (["mode=prompts", "points=[[5,6,0]]"], "needs a point with label 1, a box, a mask or text"),
        (["mode=prompts", "boxes=[[50,10,20,40]]"], r"box is \[50, 10, 20, 40\]; must have x1 < x2"),
        (["mode=prompts", "boxes=[[0,0,200,40]]"], "lie in the picture of 160 x 120 px"),
        (["mode=prompts", "boxes=[[0,0,9]]"], r"box is \[0, 0, 9\]; must be"),
        (["mode=prompts", "boxes=[[0,0,9,9],[0,0,5,5]]", "points=[[5,6,1]]"], "with 2 boxes"),
        (["mode=prompts", "mask=small.png"], "mask small.png is 30 x 20 px"),
        (["mode=prompts", "prompts_file=missing.json"], "prompts file missing.json does not exist"),
        (["mode=prompts", "prompts_file=text.jpg"], "is not valid json"),
        (["mode=prompts", "prompts_file=other.json"], "names the picture other.png, which is not in photo.png"),
        (["mode=prompts", "prompts_file=typo.json"], "must have points, box, mask or text and nothing else"),
        (["mode=prompts", "prompts_file=typo.json", "mask=region.png"], "put all prompts in the json file"),
    ],
)
def test_bad_input_is_one_clear_line(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    Path("nothing_here").mkdir(exist_ok=True)
    Path("text.jpg").write_text("no picture")
    write_image("small.png", np.full((20, 30), 255, np.uint8))
    write_image("empty.png", np.zeros((120, 160), np.uint8))
    Path("other.json").write_text('{"other.png": [{"box": [1, 2, 3, 4]}]}')
    Path("typo.json").write_text('[{"boxes": [1, 2, 3, 4]}]')
    if not any(argument.startswith("input=") for argument in arguments):
        arguments = ["input=photo.png", *arguments]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        run(folder, tmp_path / "run", *arguments)
    assert "\n" not in str(raised.value)


def test_the_command_reports_bad_input_in_one_line(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    status, message = tiny.run_script(infer_sam2, Path("bad"), "device=cpu", "input=missing.jpg")
    assert (status, capfd.readouterr()) == (1, ("", ""))
    assert message == "error: input missing.jpg does not exist; give a picture or a folder of pictures"


def test_a_typo_names_the_key():
    with pytest.raises(Exception, match="pred_iou_tresh"):
        compose_config("input=a.png", "automatic.pred_iou_tresh=0.5")
    with pytest.raises(Exception, match="sam2_huge"):
        compose_config("input=a.png", "model=sam2_huge")
    config = compose_config("input=a.png")
    with pytest.raises(ValueError, match="unknown key modes"):
        infer(config | {"modes": "automatic"}, Path("."))


def test_pictures_are_listed_sorted_without_hidden_files(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.PNG"]


# ---------------------------------------------------------------------------------------------------------------------
# real photographs


@pytest.mark.slow
def test_the_bundled_nano_finds_things_in_a_real_photograph(data_root, tmp_path):
    pictures = data_root / "SAM2_media" / "images"
    picture = pictures / "groceries.jpg"
    done = run_command(f"input={picture}", "hydra.run.dir=run", cwd=tmp_path)  # as a user would: all else is default
    assert done.returncode == 0, done.stderr
    num_masks, num_objects = 0, 0
    for path in [picture]:
        annotations = json.loads((tmp_path / "run" / f"{path.stem}.json").read_text())["annotations"]
        label_map = cv2.imread(str(tmp_path / "run" / f"{path.stem}_labels.png"), cv2.IMREAD_UNCHANGED)
        assert all(annotation["predicted_iou"] > 0.5 for annotation in annotations)
        num_masks, num_objects = num_masks + len(annotations), num_objects + int(label_map.max())
    assert num_masks >= 11 and num_objects >= 7
