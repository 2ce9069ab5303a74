"""infer_sam2.py mode=benchmark and mode=compare: the protocols' numbers, resuming, intervals, and bad input."""

import contextlib
import copy
import csv
import functools
import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import tiny
import tiny_training
import torch
from options import read_option
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import infer_sam2
from utils.checkpoint import save_checkpoint
from utils.images import mask_to_box, write_image
from utils.instances.check import check_data, check_item
from utils.instances.codecs import mask_to_rle
from utils.instances.readers import Instances, list_items
from utils.sam2 import benchmark, evaluation, mask_generation, protocols
from utils.sam2.benchmark import choose_objects, load_records
from utils.sam2.compare import compare_records
from utils.sam2.mask_generation import GeneratedMasks
from utils.sam2.model import build_sam2
from utils.sam2.protocols import MOST_CLICKS, interval, summarize

NANO = read_option("sam2", "model", "sam2_nano") | {"image_size": 64}
PROTOCOLS = ["clicks", "proposals", "boxes", "groups"]
NUM_PICTURES = 12  # the fewest of which intervals are given, and two


def draw_objects(rng: np.random.Generator, height: int, width: int) -> list[np.ndarray]:
    """Rectangles and ellipses that may overlap, of COCO's three sizes."""
    masks = []
    for _ in range(rng.integers(2, 6)):
        sides = np.exp(rng.uniform(np.log(5), np.log(min(height, width) - 2), 2)).astype(int)
        y, x = (int(rng.integers(0, full - side + 1)) for full, side in zip((height, width), sides, strict=True))
        mask = np.zeros((height, width), np.uint8)
        if rng.random() < 0.5:
            mask[y : y + sides[0], x : x + sides[1]] = 1
        else:
            center, axes = (int(x + sides[1] // 2), int(y + sides[0] // 2)), (int(sides[1] // 2), int(sides[0] // 2))
            cv2.ellipse(mask, center, axes, 0, 0, 360, 1, -1)
        masks.append(mask.astype(bool))
    whole = np.zeros((height, width), bool)  # a large one
    whole[6:-4, 9:-7] = True
    return [*masks, whole]


def write_coco(root: Path) -> Path:
    """A dataset as COCO's: crowds, categories with frequencies, attributes that some objects lack, an empty picture."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(NUM_PICTURES):
        height, width = 120 + 4 * number, 150
        image_rgb = rng.integers(0, 90, (height, width, 3), np.uint8)
        for mask in draw_objects(rng, height, width) if number else []:
            is_crowd = int(rng.random() < 0.2)
            image_rgb[mask] = rng.integers(90, 256, 3)
            annotations.append({
                "id": len(annotations) + 1, "image_id": 100 + number, "category_id": int(rng.integers(1, 4)),
                "segmentation": mask_to_rle(mask), "area": int(mask.sum()), "iscrowd": is_crowd,
                "bbox": coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))).tolist(),
            })  # fmt: skip
            if rng.random() < 0.9:
                annotations[-1]["attributes"] = {"shade": "dark" if rng.random() < 0.5 else "light"}
        images.append({"id": 100 + number, "file_name": f"{number:02d}.png", "height": height, "width": width})
        write_image(root / "pictures" / f"{number:02d}.png", image_rgb)
    categories = [
        {"id": k, "name": name, "frequency": name[0]} for k, name in enumerate(("rare", "common", "frequent"), 1)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "all.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The dataset, and a best.pt of random weights that answer to the prompt, trained on it, by its config."""
    root = tmp_path_factory.mktemp("benchmark")
    (root / "pictures").mkdir()
    write_coco(root)
    torch.manual_seed(0)
    model = tiny_training.answer_to_prompts(build_sam2(**NANO | {"checkpoint": "none"}, device="cpu"))
    data = {key: value for key, value in configure(root)["data"].items()}
    data |= {"val_fraction": 0.25, "min_area_px": 1, "hflip": True, "color_jitter": 0.0}
    config = {"model": NANO, "data": data}
    save_checkpoint(
        root / "best.pt", {"model": model.state_dict(), "config": config, "format": 1, "script": "train_sam2"}
    )
    torch.manual_seed(1)
    model = tiny_training.answer_to_prompts(build_sam2(**NANO | {"checkpoint": "none"}, device="cpu"))
    config = {"model": NANO, "data": data | {"root": str(root / "gone")}}
    save_checkpoint(
        root / "other.pt", {"model": model.state_dict(), "config": config, "format": 1, "script": "train_sam2"}
    )
    return root


def overrides_of(root: Path) -> list[str]:
    return [
        "mode=benchmark", "data=coco", f"data.root={root}", "data.train_images=pictures", "data.val_images=pictures",
        "data.train_annotations=all.json", "data.val_annotations=null", "data.val_fraction=1", "device=cpu",
        "benchmark.protocols=[" + ",".join(PROTOCOLS) + "]", "benchmark.groups=shade",
        "benchmark.proposals.points_per_side=4",
    ]  # fmt: skip


def configure(root: Path, *overrides: str) -> dict:
    return tiny.compose_config("infer_sam2", *overrides_of(root), *overrides)


def run_in(run_dir: Path, config: dict) -> dict[tuple[str, str, str], float]:
    """Run in this process: the numbers, from the records."""
    run_dir.mkdir()
    infer_sam2.infer(config, run_dir)
    return summarize(load_records(run_dir, "data"))


@pytest.fixture(scope="module")
def run_dir(root, tmp_path_factory):
    """A finished run of all protocols that read the dataset."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    run_in(run_dir, configure(root, f"checkpoint={root / 'best.pt'}", "benchmark.proposals.single_mask=true"))
    return run_dir


run_main = functools.partial(tiny.run_main, infer_sam2)


def read_table(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def evaluate_by_coco(root: Path, results: Path, most: list[int], by_class: bool) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / "all.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "segm")
        evaluation.params.maxDets, evaluation.params.useCats = most, int(by_class)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def test_precision_and_recall_are_those_of_pycocotools(root, run_dir):
    table = summarize(load_records(run_dir, "data"))
    coco = evaluate_by_coco(root, run_dir / "boxes.json", [1, 10, 100], True)
    precision = coco.eval["precision"]  # (T, R, K, A, M)
    for number, group in enumerate(("all", "small", "medium", "large")):
        values = precision[:, :, :, number, 2]
        assert table["boxes", group, "ap"] == pytest.approx(values[values > -1].mean(), abs=1e-9)
    values = [precision[place, :, :, 0, 2] for place in (0, 5)]
    expected = [each[each > -1].mean() for each in values]
    assert [table["boxes", "all", name] for name in ("ap_50", "ap_75")] == pytest.approx(expected, abs=1e-9)
    assert 0 < expected[0] < 1 and table["boxes", "all", "num_classes"] == 3

    coco = evaluate_by_coco(root, run_dir / "proposals.json", [10, 100, 1000], False)
    for number, group in enumerate(("all", "small", "medium", "large")):
        for place, most in enumerate((10, 100, 1000)):
            expected = coco.eval["recall"][:, 0, number, place].mean()
            assert table["proposals", group, f"ar_{most}"] == pytest.approx(expected, abs=1e-9)
    assert 0 < table["proposals", "all", "ar_10"] <= table["proposals", "all", "ar_1000"] < 1
    assert table["proposals", "all", "ar_1000_single_mask"] <= table["proposals", "all", "ar_1000"]


def test_recall_by_frequency_is_that_of_the_objects_of_these_categories(root, run_dir, tmp_path):
    table = summarize(load_records(run_dir, "data"))
    content = json.loads((root / "all.json").read_text())
    for category_id, group in ((1, "rare"), (3, "frequent")):
        for annotation in content["annotations"]:  # others as COCO ignores what it shall not count
            annotation["ignore"] = annotation["iscrowd"] or annotation["category_id"] != category_id
        (tmp_path / "all.json").write_text(json.dumps(content))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(tmp_path / "all.json"))
            coco = COCOeval(truth, truth.loadRes(str(run_dir / "proposals.json")), "segm")
            coco.params.maxDets, coco.params.useCats = [10, 100, 1000], 0
            prepare = coco._prepare

            def keep_ignored(
                prepare=prepare, coco=coco, category_id=category_id
            ):  # pycocotools overwrites `ignore` by iscrowd
                prepare()
                for own in coco._gts.values():
                    for annotation in own:
                        annotation["ignore"] = annotation["iscrowd"] or annotation["category_id"] != category_id

            coco._prepare = keep_ignored
            coco.evaluate()
            coco.accumulate()
        assert table["proposals", group, "ar_100"] == pytest.approx(coco.eval["recall"][:, 0, 0, 1].mean(), abs=1e-9)


def test_the_truth_as_prediction_has_the_best_value_of_every_protocol(root, tmp_path, monkeypatch):
    known = {}

    def remember(*arguments):
        truth = real(*arguments)
        known[truth.numbers.shape[1:]] = truth  # no two pictures have one size
        return truth

    def masks_of(truth):
        return [(truth.numbers == g + 1).any(0) for g in range(len(truth.ids))]

    def depth(mask):
        return cv2.distanceTransform(np.pad(mask, 1).view(np.uint8), cv2.DIST_L2, 0)[1:-1, 1:-1]

    def predict(model, embeddings, coords, labels, mask_inputs, orig_hw, precision):
        masks, chosen = masks_of(known[orig_hw]), []
        for points, kinds in zip(coords, labels, strict=True):
            if kinds[0] == 2:  # the object of this box
                distances = [np.abs(mask_to_box(mask) - points.ravel()).max() for mask in masks]
            else:  # the object in whose centre the first click lies
                x, y = points[0].astype(int)
                distances = [depth(mask).max() - depth(mask)[y, x] if mask[y, x] else np.inf for mask in masks]
            chosen.append(masks[int(np.argmin(distances))])
        logits = torch.from_numpy(np.stack(chosen)).float()[:, None] * 20 - 10  # at the picture's size
        num_masks = 3 if coords.shape[1] == 1 else 1
        tokens = torch.zeros(len(chosen), num_masks, 8)
        return logits.expand(-1, num_masks, -1, -1), torch.ones(len(chosen), num_masks), tokens

    def generate(model, image_rgb, settings, encoded=None):
        masks = masks_of(known[image_rgb.shape[:2]])
        return GeneratedMasks(
            [
                {"segmentation": mask_to_rle(mask), "area": int(mask.sum())}
                | {"predicted_iou": 1.0, "stability_score": 1.0}
                for mask in masks
            ],
            1,
            0.0,
            0.0,
        )

    real = benchmark.read_truth
    monkeypatch.setattr(benchmark, "read_truth", remember)
    monkeypatch.setattr(evaluation, "predict_masks", predict)
    monkeypatch.setattr(mask_generation, "generate_masks", generate)
    table = run_in(tmp_path / "run", configure(root, f"checkpoint={root / 'best.pt'}"))
    worst = {"iou_error_1_click", "not_reached_85", "not_reached_90"}
    for (protocol, group, metric), value in table.items():
        if not metric.startswith("num_"):
            best = 0 if metric in worst or metric.startswith("largest_gap") else 1
            assert value == pytest.approx(best, abs=1e-9), (protocol, group, metric)
    assert {key[0] for key in table} == set(PROTOCOLS)


def test_numbers_of_clicks_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    ious = rng.random((40, MOST_CLICKS)).astype(np.float32) * 0.97
    for row in ious:  # no clicks were made after 9 once 0.9 was reached
        reached = np.flatnonzero(row >= 0.9)
        row[max(9, reached[0] + 1 if len(reached) else MOST_CLICKS) :] = np.nan
    areas = rng.uniform(10, 20000, 40)
    record = {
        "clicks/ious": ious, "clicks/area": areas, "clicks/first_ious": rng.random((40, 3), np.float32),
        "clicks/first_predicted": rng.random((40, 3), np.float32), "clicks/box_iou": rng.random(40, np.float32),
    }  # fmt: skip
    table = summarize([record])
    for threshold, name in ((0.85, "85"), (0.9, "90")):
        counts = []
        for row in ious.tolist():
            count = 1
            while count <= MOST_CLICKS and not row[count - 1] >= threshold:
                count += 1
            counts.append(count)
        expected = np.minimum(counts, MOST_CLICKS)
        assert table["clicks", "all", f"noc_{name}"] == pytest.approx(expected.mean())
        assert table["clicks", "all", f"not_reached_{name}"] == pytest.approx(np.mean(np.array(counts) > MOST_CLICKS))
    assert table["clicks", "all", "iou_5_clicks"] == pytest.approx(ious[:, 4].mean())
    is_small = areas <= 32**2
    assert table["clicks", "small", "iou_1_click"] == pytest.approx(ious[is_small, 0].mean())
    assert table["clicks", "small", "num_objects"] == is_small.sum()


def test_objects_are_clicked_on_until_they_reach_the_iou(root, monkeypatch):
    """The first nine clicks are those of all; then an object that has reached the IoU gets no more."""
    item = list_items({key: value for key, value in configure(root)["data"].items()}, "data", False)[1][3]
    layers = item.read().layers
    model = infer_sam2.models.build_sam2(**NANO | {"checkpoint": str(root / "best.pt")}, device="cpu")
    image = infer_sam2.models.preprocess(infer_sam2.images.read_image(item.image_path), 64)[None]
    objects = evaluation.kept_objects(layers, 1)
    [masks] = evaluation.group_masks(layers, objects, torch.device("cpu"))
    with torch.inference_mode(), infer_sam2.benchmark.run.start_threads() as threads:
        embeddings = infer_sam2.models.encode(model, image)
        arguments = (model, embeddings, masks, 2, "fp32", threads)
        all_clicks = evaluation.click_objects(*arguments, 6).ious
        limit = float(all_clicks[:, :3].amax(1).median())
        some = evaluation.click_objects(*arguments, 6, limit).ious
    assert some.shape == all_clicks.shape == (len(masks), 6)
    for ours, every in zip(some.tolist(), all_clicks.tolist(), strict=True):
        is_reached = np.array(every) >= limit
        last = max(2, int(is_reached.argmax()) + 1 if is_reached.any() else 6)
        assert ours[:last] == pytest.approx(every[:last], abs=1e-3) and np.isnan(ours[last:]).all()
    assert 0 < np.isnan(some).sum() < some.numel() - 2 * len(masks)


def test_groups_are_means_with_intervals_and_a_gap(root, run_dir):
    records = load_records(run_dir, "data")
    ious, groups = (np.concatenate([record[f"clicks/{key}"] for record in records]) for key in ("ious", "group"))
    content = json.loads((root / "all.json").read_text())["annotations"]
    shades = [one["attributes"]["shade"] if "attributes" in one else "" for one in content if not one["iscrowd"]]
    assert sorted(shades) == sorted(groups.tolist())
    rows = {
        (row["group"], row["metric"]): row for row in read_table(run_dir / "table.csv") if row["protocol"] == "groups"
    }
    means = {shade: ious[groups == shade, 2].mean() for shade in ("dark", "light")}
    for shade, mean in means.items():
        row = rows[shade, "iou_3_clicks"]
        assert float(row["value"]) == pytest.approx(mean, abs=1e-5) and float(row["low"]) < mean < float(row["high"])
    gap = abs(means["dark"] - means["light"])
    assert float(rows["", "largest_gap_3_clicks"]["value"]) == pytest.approx(gap, abs=1e-5)
    assert f"{shades.count('')} of {len(shades)} objects lack shade" in rows["dark", "iou_1_click"]["note"]


def test_groups_come_from_a_csv_too(root, tmp_path):
    items = list_items({key: value for key, value in configure(root)["data"].items()}, "data", False)[1]
    content = json.loads((root / "all.json").read_text())["annotations"]
    names = {int(Path(item.name).stem) + 100: item.name for item in items}
    rows = [(names[a["image_id"]], a["id"], "odd" if a["id"] % 2 else "even") for a in content]
    with (tmp_path / "groups.CSV").open("w", newline="") as file:
        csv.writer(file).writerows([("picture", "object", "value"), *rows])
    table = run_in(
        tmp_path / "run",
        configure(
            root,
            f"checkpoint={root / 'best.pt'}",
            "benchmark.protocols=[groups]",
            f"benchmark.groups={tmp_path / 'groups.CSV'}",
        ),
    )
    assert {key[1] for key in table} == {"odd", "even", ""} and {key[0] for key in table} == {"groups"}
    records = load_records(tmp_path / "run", "data")
    ids, groups = (np.concatenate([record[f"clicks/{key}"] for record in records]) for key in ("id", "group"))
    assert (groups == np.where(ids % 2, "odd", "even")).all()
    assert records[1]["clicks/ious"].shape[1] == 3  # no more clicks than the protocol asks for


def test_of_many_objects_a_seeded_part_is_clicked():
    places = {"a": np.arange(9000), "b": np.arange(0), "c": np.arange(0, 16000, 2)}  # of crowds there are no places
    chosen = choose_objects(places, 0)
    assert sum(map(len, chosen.values())) == 10_000 and len(chosen["b"]) == 0
    assert all((np.diff(own) > 0).all() and np.isin(own, places[name]).all() for name, own in chosen.items())
    assert all((chosen[name] == own).all() for name, own in choose_objects(places, 0).items())
    assert not np.array_equal(chosen["a"][:50], choose_objects(places, 1)["a"][:50])
    assert [len(own) for own in choose_objects({"a": np.arange(15_000)}, 0).values()] == [15_000]


def test_boxes_of_a_detector_are_scored_by_it(root, tmp_path):
    content = json.loads((root / "all.json").read_text())
    rng = np.random.default_rng(0)
    detections = [
        {
            "image_id": one["image_id"],
            "bbox": one["bbox"],
            "score": float(rng.random()),
            "category_id": one["category_id"],
        }
        for one in content["annotations"]
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(detections))
    table = run_in(
        tmp_path / "run",
        configure(
            root, f"checkpoint={root / 'best.pt'}", "benchmark.protocols=[boxes]", "benchmark.groups=null",
            f"benchmark.detections={tmp_path / 'boxes.json'}",
        ),
    )  # fmt: skip
    results = json.loads((tmp_path / "run" / "boxes.json").read_text())
    assert sorted(one["score"] for one in results) == pytest.approx(sorted(one["score"] for one in detections))
    coco = evaluate_by_coco(root, tmp_path / "run" / "boxes.json", [1, 10, 100], True)
    values = coco.eval["precision"][:, :, :, 0, 2]
    assert table["boxes", "all", "ap"] == pytest.approx(values[values > -1].mean(), abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# files, resuming, notes


def test_a_run_writes_what_it_promises(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"table.csv", "proposals.json", "boxes.json", "run.json", "data.json"}
    assert names >= {f"{protocol}.png" for protocol in PROTOCOLS}
    record = json.loads((run_dir / "run.json").read_text())
    table = {
        tuple(row[key] for key in ("protocol", "group", "metric")): row for row in read_table(run_dir / "table.csv")
    }
    assert {"/".join(key) for key in table} == set(record["metrics"]["last"])
    for key, row in table.items():
        assert float(row["value"]) == pytest.approx(record["metrics"]["last"]["/".join(key)], rel=1e-5)


def test_training_pictures_are_named_in_the_table(root, run_dir, tmp_path):
    note = read_table(run_dir / "table.csv")[0]["note"]
    assert "9 of the 12 measured pictures trained this checkpoint" in note
    config = configure(root, f"checkpoint={root / 'other.pt'}", "benchmark.protocols=[groups]")
    run_in(tmp_path / "other", config)
    assert "gone is not here" in read_table(tmp_path / "other" / "table.csv")[0]["note"]


@pytest.mark.parametrize("number", [1, 5, NUM_PICTURES])
def test_a_killed_run_goes_on_to_the_same_files(root, run_dir, tmp_path, monkeypatch, number):
    """Killed while the number-th picture's files are written, after its masks and before its record."""
    calls, real = [], benchmark.np.savez

    def die(file, **arrays):
        calls.append(1)
        if len(calls) == number:
            file.write(b"half")
            file.flush()
            raise MemoryError("killed")
        real(file, **arrays)

    overrides = [*overrides_of(root), f"checkpoint={root / 'best.pt'}", "benchmark.proposals.single_mask=true"]
    with monkeypatch.context() as patched:
        patched.setattr(benchmark.np, "savez", die)
        status, _ = tiny.run_script(infer_sam2, tmp_path / "killed", *overrides)
    assert status == 1 and not (tmp_path / "killed" / "table.csv").exists()
    measured, clicks = [], benchmark.measure_clicks
    monkeypatch.setattr(benchmark, "measure_clicks", lambda *args: measured.append(1) or clicks(*args))
    status, _ = tiny.run_script(infer_sam2, tmp_path / "resumed", f"resume={tmp_path / 'killed'}", "device=cpu")
    assert status == 0 and len(measured) == NUM_PICTURES - number + 1
    ours, theirs = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".npz", ".json", ".csv", ".png")
        }
        for folder in (tmp_path / "resumed", run_dir)
    )
    own = {Path("run.json")}  # the command and the times
    assert set(ours) == set(theirs) and all(ours[path] == theirs[path] for path in set(ours) - own)


def test_other_pictures_weights_or_files_are_not_resumed(root, run_dir, tmp_path):
    """The records would be those of other pictures, or of another model."""
    content = json.loads((root / "all.json").read_text())
    other = tmp_path / "data"
    other.mkdir()
    (other / "pictures").symlink_to(root / "pictures")
    data = [override for override in overrides_of(other) if override.startswith("data")]
    resume = [f"resume={run_dir}", "device=cpu", *data]
    moved = copy.deepcopy(content)
    moved["annotations"][0]["segmentation"] = mask_to_rle(np.eye(124, 150) > 0)
    for number, changed in enumerate((content | {"images": content["images"][1:]}, moved)):
        (other / "all.json").write_text(json.dumps(changed))
        status, message = tiny.run_script(infer_sam2, tmp_path / f"run_{number}", *resume)
        assert status == 1 and "(data.json) are not those of now; start a new run" in message, message
    (other / "all.json").write_text(json.dumps(content))  # the same data elsewhere are
    assert tiny.run_script(infer_sam2, tmp_path / "moved", *resume)[0] == 0
    assert (tmp_path / "moved" / "table.csv").read_bytes() == (run_dir / "table.csv").read_bytes()


def test_a_damaged_record_is_measured_again(run_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run_dir, broken)
    path = broken / "pictures" / "data_000004.npz"
    path.write_bytes(path.read_bytes()[:100])
    status, message = tiny.run_script(
        infer_sam2, tmp_path / "compared", "mode=compare", f"results=[{run_dir},{broken}]"
    )
    assert status == 1 and "data_000004.npz is damaged" in message
    assert tiny.run_script(infer_sam2, tmp_path / "again", f"resume={broken}", "device=cpu")[0] == 0
    assert (tmp_path / "again" / "table.csv").read_bytes() == (run_dir / "table.csv").read_bytes()


def test_predictions_that_tie_are_in_the_order_of_the_pictures_ids(root, tmp_path):
    """As pycocotools takes them: here names and ids are in opposite orders, and all scores equal."""
    content = json.loads((root / "all.json").read_text())
    for image in content["images"]:
        image["id"] = 300 - image["id"]
    for annotation in content["annotations"]:
        annotation |= {"image_id": 300 - annotation["image_id"], "category_id": str(annotation["category_id"])}
    (tmp_path / "pictures").symlink_to(root / "pictures")
    boxes = [
        {"image_id": a["image_id"], "bbox": a["bbox"], "score": 0.9, "category_id": int(a["category_id"])}
        for a in content["annotations"]
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    (tmp_path / "all.json").write_text(json.dumps(content))
    table = run_in(
        tmp_path / "run",
        configure(
            root, f"checkpoint={root / 'best.pt'}", f"data.root={tmp_path}", "benchmark.protocols=[boxes]",
            "benchmark.groups=null", f"benchmark.detections={tmp_path / 'boxes.json'}",
        ),
    )  # fmt: skip
    for annotation in content["annotations"]:
        annotation["category_id"] = int(annotation["category_id"])  # ours takes text for the number that it is
    (tmp_path / "all.json").write_text(json.dumps(content))
    coco = evaluate_by_coco(tmp_path, tmp_path / "run" / "boxes.json", [1, 10, 100], True)
    values = coco.eval["precision"][:, :, :, 0, 2]
    assert table["boxes", "all", "ap"] == pytest.approx(values[values > -1].mean(), abs=1e-9)


def test_classes_that_have_names_alone_are_classes(root, run_dir, tmp_path):
    """As labelme's: the same objects with names instead of numbers have the same average precision."""
    content = json.loads((root / "all.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    for annotation in content["annotations"]:
        annotation["category_id"] = names[annotation["category_id"]]
    content["categories"] = [{"id": name, "name": name} for name in names.values()]
    (tmp_path / "pictures").symlink_to(root / "pictures")
    (tmp_path / "all.json").write_text(json.dumps(content))
    overrides = ["benchmark.protocols=[boxes]", "benchmark.groups=null", f"data.root={tmp_path}"]
    table = run_in(tmp_path / "run", configure(root, f"checkpoint={root / 'best.pt'}", *overrides))
    expected = summarize(load_records(run_dir, "data"))
    assert table["boxes", "all", "ap"] == pytest.approx(expected["boxes", "all", "ap"], abs=1e-9)
    assert table["boxes", "all", "num_classes"] == 3


def test_one_split_of_coco_needs_no_file_of_the_other(root, tmp_path):
    overrides = ["data.val_annotations=all.json", "data.train_annotations=gone.json", "data.train_images=gone"]
    table = run_in(tmp_path / "run", configure(root, f"checkpoint={root / 'best.pt'}", *overrides))
    assert table["clicks", "all", "num_objects"] > 0


def test_another_config_is_not_resumed(root, run_dir, tmp_path):
    status, message = tiny.run_script(
        infer_sam2, tmp_path / "resumed", f"resume={run_dir}", "benchmark.proposals.points_per_side=5"
    )
    assert status == 1 and "benchmark.proposals.points_per_side: stored 4, now 5" in message


# ---------------------------------------------------------------------------------------------------------------------
# mode=compare


def test_runs_are_compared_on_the_same_resamples(root, run_dir, tmp_path, monkeypatch, capfd):
    run_in(tmp_path / "other", configure(root, f"checkpoint={root / 'other.pt'}"))
    monkeypatch.setattr(protocols, "RESAMPLES", 40)
    status, printed = run_main(
        monkeypatch, capfd, tmp_path / "compare", "mode=compare", f"results=[{run_dir},{tmp_path / 'other'}]"
    )
    assert status == 0, printed
    rows = {
        (row["protocol"], row["group"], row["metric"]): row for row in read_table(tmp_path / "compare" / "compare.csv")
    }
    assert {row["pictures"] for row in rows.values()} == {"paired"}
    both = [load_records(folder, "data") for folder in (run_dir, tmp_path / "other")]
    tables = [summarize(records) for records in both]
    key = "boxes", "all", "ap"
    row = {name: float(rows[key][name]) for name in ("first", "other", "difference", "low", "high")}
    assert row["difference"] == pytest.approx(tables[1][key] - tables[0][key], abs=1e-5)
    rng, sampled = np.random.default_rng(0), []
    for _ in range(40):  # average precision is computed anew each time
        places = rng.integers(NUM_PICTURES, size=NUM_PICTURES)
        before, after = (summarize([records[place] for place in places])[key] for records in both)
        sampled.append(after - before)
    assert [row["low"], row["high"]] == pytest.approx(np.percentile(sampled, [2.5, 97.5]), abs=1e-5)


def test_other_pictures_are_resampled_by_themselves_and_few_give_no_interval(run_dir, monkeypatch):
    monkeypatch.setattr(protocols, "RESAMPLES", 60)
    records = load_records(run_dir, "data")
    rows = {tuple(row[:3]): row for row in compare_records(records, records[1:], False, 0)}
    *_, difference, low, high = rows["clicks", "all", "iou_1_click"]
    assert difference == 0 and low < 0 < high  # the same objects: paired, this would be 0 wide
    paired = {tuple(row[:3]): row for row in compare_records(records, records, True, 0)}
    assert paired["clicks", "all", "iou_1_click"][-2:] == [0, 0]
    rows = compare_records(records[:9], records[:9], True, 0)
    assert all(row[-2:] == ["", ""] for row in rows)
    assert interval(lambda places: {("a", "b", "c"): 1.0}, [9], 0) == {}


def test_an_interval_is_a_plain_bootstrap():
    values = np.random.default_rng(3).random(25)
    [(low, high)] = interval(lambda places: {("a", "b", "c"): values[places].mean()}, [25], 5).values()
    rng = np.random.default_rng(5)
    means = [values[rng.integers(25, size=25)].mean() for _ in range(1000)]
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]))


def test_ids_of_more_than_64_bits_are_those_of_the_masks():
    annotations = ({"id": 2**64 - 1}, {"id": 77})  # made of a hash
    layers = np.array([[[1, 2, 2]]], np.int32)
    truth = protocols.read_truth(Instances(layers, annotations=annotations), {})
    assert truth.ids.tolist() == [1, 77]


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one line each


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["benchmark.protocols=[clickz]"], "benchmark.protocols is ['clickz']; must be a list of some of clicks"),
        (["benchmark.groups=null"], "benchmark.groups is null; must be an attribute"),
        (["benchmark.groups=colour"], "benchmark.groups is colour: none of the objects has it; they have shade"),
        (["benchmark.groups=FOLDER/none.csv"], "none.csv; no such file"),
        (["benchmark.detections=FOLDER/none.json"], "none.json; no such file"),
        (["benchmark.groups=FOLDER/wrong.csv"], "must be picture,object,value"),
        (["benchmark.groups=FOLDER/others.csv"], "others.csv names none of the measured pictures: it has 00.png, they"),
        (["benchmark.detections=FOLDER/unknown.json"], "1 of 2 entries are of pictures that are not measured, such as"),
        (["benchmark.detections=FOLDER/no_box.json"], "must have bbox"),
        (["benchmark.detections=FOLDER/no_list.json"], "must be a list of results"),
        (["benchmark.detections=FOLDER/other_classes.json"], "2 of 2 detections are of categories that no object has"),
        (["benchmark.detections=FOLDER/text.json"], "1 of 1 detections are of categories that no object has (car)"),
        (["benchmark.detections=FOLDER/nan.json"], "must have bbox"),
        (["benchmark.detections=FOLDER/outside.json"], "1 of 2 boxes lie outside their picture"),
        (["benchmark.detections=FOLDER/list_id.json"], "1 of 2 entries are of pictures that are not measured"),
        (["benchmark.groups=FOLDER/twice.csv"], "00.png, 1 is there twice"),
        (["checkpoint=FOLDER/none.pt"], "none.pt"),
        (["num_points=4"], "num_points= is given but mode is benchmark"),
        (["benchmark.protocols=[edges]", "benchmark.groups=null"], "data= is given but benchmark.protocols is [edges]"),
        (["data.train_annotations=empty.json"], "none of the 12 pictures of split=val has objects"),
        (["data.train_annotations=other_size.json"], "1 of 12 images cannot be used"),
        (["data.train_annotations=missing.json"], "missing.json"),
        (["split=test"], "split is test; must be val or train"),
        (["cache=auto"], "cache= is given but mode is benchmark"),
        (["automatic.points_per_side=8"], "automatic.points_per_side= is given but mode is benchmark"),
        (["input=photo.png"], "input= is given but mode is benchmark"),
        (["mode=automatic", "input=photo.png"], "benchmark.protocols= is given but mode is automatic"),
        (
            ["benchmark.protocols=[clicks,edges]", "benchmark.groups=null", "benchmark.edges.root=FOLDER"],
            "give the folder of BSDS500",
        ),
        (["resume=FOLDER"], "no run.json there"),
        (["resume=FOLDER/broken"], "a run of another script; must be one of mode=benchmark"),
        (["mode=compare", "results=[FOLDER/a.json,FOLDER/b.json]"], "a.json; no such file"),
        (["mode=compare", "results=[FOLDER]"], "needs 'results=[a,b]'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(root, tmp_path, monkeypatch, capfd, arguments, words):
    content = json.loads((root / "all.json").read_text())
    box = {"image_id": 101, "bbox": [1, 2, 30, 40], "score": 0.5, "category_id": 1}
    (tmp_path / "unknown.json").write_text(json.dumps([box, box | {"image_id": 7}]))
    (tmp_path / "no_box.json").write_text(json.dumps([box, {"image_id": 101, "score": 1}]))
    (tmp_path / "no_list.json").write_text(json.dumps({"annotations": [box]}))
    (tmp_path / "other_classes.json").write_text(json.dumps([box | {"category_id": 0}] * 2))
    (tmp_path / "text.json").write_text(json.dumps([box | {"category_id": "car"}]))
    (tmp_path / "nan.json").write_text(json.dumps([box | {"bbox": [float("nan"), 1, 2, 3]}]))
    (tmp_path / "outside.json").write_text(json.dumps([box, box | {"bbox": [500, 10, 20, 20]}]))
    (tmp_path / "list_id.json").write_text(json.dumps([box, box | {"image_id": [101]}]))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{}")
    (tmp_path / "wrong.csv").write_text("name,value\na,b\n")
    (tmp_path / "others.csv").write_text("picture,object,value\n00.png,1,a\n")
    (tmp_path / "twice.csv").write_text("picture,object,value\n00.png,1,a\n00.png,1,b\n")
    (root / "empty.json").write_text(json.dumps(content | {"annotations": []}))
    content["images"][1] |= {"height": 50}
    (root / "other_size.json").write_text(json.dumps(content))
    arguments = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    given = {argument.split("=")[0] for argument in arguments}
    overrides = [override for override in overrides_of(root) if override.split("=")[0] not in given]
    if {"mode=automatic", "mode=compare"} & set(arguments):
        overrides = [override for override in overrides if not override.startswith("data")]
        overrides = overrides if "mode=automatic" in arguments else ["device=cpu"]
    if not {"checkpoint", "mode"} & given:
        arguments = [*arguments, f"checkpoint={root / 'best.pt'}"]
    status, printed = run_main(monkeypatch, capfd, tmp_path / "run", *overrides, *arguments)
    assert status == 1 and words in printed and "Traceback" not in printed, printed


def test_an_attribute_that_some_lack_and_no_categories_are_said(root, tmp_path, monkeypatch, capfd):
    content = json.loads((root / "all.json").read_text())
    del content["categories"]
    for annotation in content["annotations"]:
        del annotation["category_id"]
    (root / "bare.json").write_text(json.dumps(content))
    overrides = [*overrides_of(root)[:-3], "data.train_annotations=bare.json", "benchmark.protocols=[boxes]"]
    status, printed = run_main(monkeypatch, capfd, tmp_path / "run", *overrides, f"checkpoint={root / 'best.pt'}")
    assert status == 0 and "the objects have no categories: all are of one class" in printed
    rows = {(row["group"], row["metric"]): row["value"] for row in read_table(tmp_path / "run" / "table.csv")}
    assert rows["all", "num_classes"] == "1"


# ---------------------------------------------------------------------------------------------------------------------
# dataset.json


def test_shapes_are_those_of_scikit_image(root):
    from skimage.morphology import convex_hull_image

    item = list_items({key: value for key, value in configure(root)["data"].items()}, "data", False)[1][5]
    content = check_item(item, with_shapes=True).content
    layers = item.read().layers
    masks = [layers[layer] == number for layer, number in evaluation.kept_objects(layers, 1)]
    expected = [1 - mask.sum() / convex_hull_image(mask, offset_coordinates=True).sum() for mask in masks]
    assert content.concavities == pytest.approx(expected, abs=0.06) and (content.concavities >= -1e-9).all()
    ring = np.ones((9, 9), bool)
    ring[3:6, 3:6] = False
    from utils.instances.check import _concavity

    assert _concavity(ring) == pytest.approx(9 / 81) and _concavity(np.ones((4, 6), bool)) == 0


def test_dataset_json_counts_attributes_and_is_compared(root, tmp_path, monkeypatch, capfd):
    items = list_items({key: value for key, value in configure(root)["data"].items()}, "data", False)[1]
    with (tmp_path / "countries.csv").open("w", newline="") as file:
        rows = [(item.name, "Peru" if number % 2 else "Chad") for number, item in enumerate(items) if number < 9]
        csv.writer(file).writerows([("picture", "country"), *rows])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        check_data({"train": [], "val": items}, 1, "stop", tmp_path / name, True, str(tmp_path / "countries.csv"))
    dataset = json.loads((tmp_path / "one" / "dataset.json").read_text())
    counts = [len(evaluation.kept_objects(item.read().layers, 1)) for item in items]
    assert dataset["num_pictures"] == NUM_PICTURES - 1 and dataset["num_masks"] == sum(counts)
    assert sorted(dataset["masks_per_picture"]) == sorted(counts[1:])
    expected = {"Chad": counts[2:9:2], "Peru": counts[1:9:2], "": counts[9:]}  # the first picture has no objects
    expected = {value: {"pictures": len(own), "masks": sum(own)} for value, own in expected.items()}
    assert dataset["attributes"] == {"country": expected}
    assert all(len(dataset[key]) == sum(counts) for key in ("relative_sizes", "concavities", "center_distances"))

    results = f"results=[{tmp_path / 'one' / 'dataset.json'},{tmp_path / 'two' / 'dataset.json'}]"
    status, printed = run_main(monkeypatch, capfd, tmp_path / "compare", "mode=compare", results)
    assert status == 0 and f"country=Peru, masks: {expected['Peru']['masks']}, {expected['Peru']['masks']}" in printed
    assert (tmp_path / "compare" / "compare.png").is_file() and (tmp_path / "compare" / "compare.csv").is_file()

    with pytest.raises(FileNotFoundError, match="picture_attributes is .*none.csv; no such file"):
        check_data({"train": [], "val": items}, 1, "stop", tmp_path / "two", True, str(tmp_path / "none.csv"))
    (tmp_path / "countries.csv").write_text("picture,country\nnowhere.png,Peru\n")
    with pytest.raises(ValueError, match="names 1 pictures that are not in the dataset, such as nowhere.png"):
        check_data({"train": [], "val": items}, 1, "stop", tmp_path / "two", True, str(tmp_path / "countries.csv"))
