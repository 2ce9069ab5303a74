"""Classes of masks: tokens, head, losses and measures against other definitions; tiny runs, their files, bad input."""

import contextlib
import csv
import dataclasses
import io
import json

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
import train_sam2
from train_sam2 import collate, mask_prediction_loss
from utils.checkpoint import load_checkpoint
from utils.images import read_image, write_image
from utils.instances.codecs import mask_to_rle
from utils.instances.readers import Instances, split_items
from utils.sam2 import class_head, class_metrics, mask_generation
from utils.sam2.class_head import ClassHead, choose_classes, class_targets, weigh_classes
from utils.sam2.mask_generation import ClassFilter, drop_duplicates, stitch_masks
from utils.sam2.model import build_sam2, choose_masks, decode, encode
from utils.sam2.prompts import background_points

NANO = read_option("sam2", "model", "sam2_nano") | {"checkpoint": "none", "image_size": 64}
COLORS = ("red", "green", "blue")  # of the three objects of a tiny picture
NONE_KEPT = dict(pred_iou_thresh=0.0, stability_score_thresh=0.0, points_per_side=4)


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return tiny_training.answer_to_prompts(build_sam2(**NANO, device="cpu"))


def encode_rle(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
    return rle | {"counts": rle["counts"].decode()}


def write_coco(root, val_names=COLORS, val_seed=1):
    """Four tiny pictures to train and two to validate as data=coco reads them, the objects' colours as classes."""
    for split, seed, numbers, kept in (("train", 0, range(4), COLORS), ("val", val_seed, range(2), val_names)):
        rng = np.random.default_rng(seed)
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for number in numbers:
            image_rgb, ids = tiny_training.draw_picture(rng, 48, 64)
            write_image(root / split / f"{number}.png", image_rgb)
            images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
            for object_id, name in enumerate(COLORS, 1):
                if name in kept:
                    place = {"id": len(annotations) + 1, "image_id": number, "category_id": object_id}
                    annotations.append(place | {"iscrowd": 0, "segmentation": encode_rle(ids == object_id)})
        categories = [{"id": number, "name": name} for number, name in enumerate(COLORS, 1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("classes") / "data")


def overrides(root, *more):
    plain = [override for override in tiny_training.tiny_overrides(root) if not override.startswith("data")]
    keys = ["train_images=train", "train_annotations=train.json", "val_images=val", "val_annotations=val.json"]
    data = ["data=coco", f"data.root={root}", *(f"data.{key}" for key in keys)]
    return [*plain, *data, "train.eval_automatic=never", *more]


def configure(root, *more):
    return tiny_training.compose_config(*overrides(root, "classes=auto", *more))


# ---------------------------------------------------------------------------------------------------------------------
# a mask's own token


@pytest.mark.parametrize("is_fast", [False, True])
def test_classes_follow_the_tokens_when_these_change_places(nano, is_fast):
    """With tokens 1, 2, 3 in another order, and all that reads them, masks and classes come in that order."""
    order = [0, 3, 1, 2]
    changed = build_sam2(**NANO, device="cpu", fast_decoder=is_fast)
    changed.load_state_dict(nano.state_dict())
    decoder = changed.sam_mask_decoder
    with torch.no_grad():
        decoder.mask_tokens.weight.copy_(decoder.mask_tokens.weight[order])
        last = decoder.iou_prediction_head.layers[-1]
        last.weight.copy_(last.weight[order])
        last.bias.copy_(last.bias[order])
    decoder.output_hypernetworks_mlps = torch.nn.ModuleList([decoder.output_hypernetworks_mlps[i] for i in order])
    head = ClassHead(["a", "b"], nano.hidden_dim)
    torch.manual_seed(1)
    images, index = torch.randn(2, 3, 64, 64), torch.tensor([0, 1, 1])
    prompts = (torch.rand(3, 1, 2) * 64, torch.ones(3, 1, dtype=torch.int32), None)
    with torch.no_grad():
        masks, ious, _, tokens = decode(nano, encode(nano, images), index, *prompts, True)
        other_masks, other_ious, _, other_tokens = decode(changed, encode(changed, images), index, *prompts, True)
        logits, other_logits = head(tokens), head(other_tokens)  # (3, 3, 3)
    assert (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3
    places = [number - 1 for number in order[1:]]
    torch.testing.assert_close(other_masks, masks[:, places], atol=1e-4, rtol=0)
    torch.testing.assert_close(other_ious, ious[:, places], atol=1e-5, rtol=0)
    torch.testing.assert_close(other_logits, logits[:, places], atol=1e-4, rtol=0)


def test_a_single_mask_has_the_token_that_it_was_made_from(nano):
    """Where it is unstable sam2 returns another of the four, and never says which."""
    decoder = nano.sam_mask_decoder
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(40, 4, 16, 16, generator=generator) * 2
    masks[::2, 0] += torch.sign(masks[::2, 0])  # no logit is near 0: these are stable
    ious, tokens = torch.rand(40, 4, generator=generator), torch.randn(40, 4, 8, generator=generator)
    expected_masks, expected_ious = decoder._dynamic_multimask_via_stability(masks, ious)
    chosen_masks, chosen_ious, chosen_tokens = choose_masks(decoder.eval(), masks, ious, tokens, False)
    assert torch.equal(chosen_masks, expected_masks) and torch.equal(chosen_ious, expected_ious)
    places = [next(m for m in range(4) if torch.equal(masks[row, m], chosen_masks[row, 0])) for row in range(40)]
    assert set(places) == {0, 1, 2, 3}
    assert torch.equal(chosen_tokens[:, 0], tokens[torch.arange(40), places])
    decoder.train()
    assert torch.equal(choose_masks(decoder, masks, ious, tokens, False)[2], tokens[:, :1])
    decoder.eval()


# ---------------------------------------------------------------------------------------------------------------------
# head and loss


def test_loss_is_the_weighted_cross_entropy_of_each_mask():
    head = ClassHead(["a", "b"], 8)
    head.class_weights = torch.tensor([0.5, 1.0, 3.0])
    tokens, targets = torch.randn(4, 3, 8, dtype=torch.bfloat16), torch.tensor([0, 1, 2, class_head.UNKNOWN])
    loss = head.loss(tokens, targets)
    probs = head.layers(tokens.float()).softmax(-1).detach()
    for row, target in enumerate(targets.tolist()):
        for mask in range(3):
            known = target != class_head.UNKNOWN
            expected = -head.class_weights[target] * probs[row, mask, target].log() if known else torch.zeros(())
            torch.testing.assert_close(loss[row, mask].detach(), expected)
    numbers, class_probs = head.classify(tokens[:, 0])
    assert torch.equal(numbers, probs[:, 0, 1:].argmax(-1))
    torch.testing.assert_close(class_probs.detach(), probs[:, 0, 1:].amax(-1))


@pytest.mark.parametrize("all_masks", [0.0, 0.5])
def test_class_counts_on_the_mask_that_trains(all_masks):
    settings = train_sam2.LossSettings(**read_option("sam2", "loss", "sam_official") | {"all_masks": all_masks})
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(2, 8, 8)
    truth[:, 2:6, 2:6] = 1
    logits = torch.randn(2, 3, 8, 8, generator=generator)
    logits[0, 2] = 8 * truth[0] - 4  # the best of the first object
    logits[1, 0] = 8 * truth[1] - 4
    arguments = (logits, torch.rand(2, 3, generator=generator), torch.zeros(2, 1), truth, settings)
    class_losses = torch.rand(2, 3, generator=generator)
    added = mask_prediction_loss(*arguments, class_losses=class_losses)[0] - mask_prediction_loss(*arguments)[0]
    expected = torch.stack([class_losses[0, 2], class_losses[1, 0]]) + all_masks * class_losses.mean(1)
    torch.testing.assert_close(added, settings.classes * expected)


def test_head_makes_no_other_draw_and_is_that_of_its_seed():
    torch.manual_seed(5)
    heads = [ClassHead(["a"], 8, seed) for seed in (0, 0, 1)]
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    first, same, other = (head.layers[2].weight for head in heads)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_samples_with_classes_are_those_without_and_more(root):
    def samples(names, clicks=0):
        config = configure(root)
        dataset = tiny_training.make_dataset(config, split_items(**data_keys(config))[0])
        dataset.class_names, dataset.background_clicks = names, clicks
        return [dataset[index] for index in range(6)]

    plain, with_classes = samples(None), samples(["blue", "red"], 5)
    for ours, other in zip(plain, with_classes, strict=True):
        assert other.keys() - ours.keys() == {"class_targets", "background_coords"}
        assert not tiny.differences(ours, {key: other[key] for key in ours})
        expected = []
        for mask in ours["masks"].numpy():  # by the colour of most pixels under the mask
            color = preprocessed_color(ours["picture"], mask)
            expected.append({"red": 2, "green": 0, "blue": 1}[COLORS[color]])
        assert other["class_targets"].tolist() == expected
        assert other["background_coords"].shape == (5, 2)
    batch = collate(with_classes)
    assert batch["background_index"].tolist() == [number for number in range(6) for _ in range(5)]
    assert batch["background_weight"].sum() == pytest.approx(1) == batch["object_weight"].sum().item()


def data_keys(config):
    others = ("min_area_px", "hflip", "color_jitter")
    return {key: value for key, value in config["data"].items() if key not in others}


def preprocessed_color(picture, mask):
    return int(picture[0][:, torch.from_numpy(mask)].mean(1).argmax())


def test_background_clicks_lie_on_no_object():
    layers = np.zeros((2, 20, 30), np.int32)
    layers[0, 5:15], layers[1, :, 3:20] = 1, 2
    ignored = np.zeros((20, 30), bool)
    ignored[:, 25:] = True
    points = background_points(layers, ignored, 500, np.random.default_rng(0)).astype(int)
    clicked = {tuple(point) for point in points}
    free = {(x, y) for y, x in zip(*np.nonzero(~layers.any(0) & ~ignored), strict=True)}
    assert clicked <= free and len(clicked) > 0.7 * len(free)
    layers[:] = 1
    assert background_points(layers, None, 5, np.random.default_rng(0)).shape == (0, 2)


@pytest.mark.parametrize("clicks_per_forward", [None, 2])
def test_background_clicks_are_none_in_all_their_masks(nano, clicks_per_forward):
    """Against a loop over pictures, clicks and masks; a picture's clicks weigh one together."""
    head = ClassHead(["a", "b"], nano.hidden_dim)
    head.class_weights = torch.tensor([0.5, 1.0, 1.0])
    settings = train_sam2.LossSettings(**read_option("sam2", "loss", "sam_official") | {"all_masks": 0.7})
    generator = torch.Generator().manual_seed(0)
    counts, embeddings = [3, 2], encode(nano, torch.randn(2, 3, 64, 64, generator=generator))
    index = torch.tensor([0, 0, 0, 1, 1])
    batch = {
        "background_coords": torch.rand(5, 2, generator=generator) * 64, "background_index": index,
        "background_weight": 1 / torch.tensor(counts)[index] / 2,
    }  # fmt: skip
    arguments = (nano, embeddings, batch, head, settings, clicks_per_forward, "fp32")
    loss = sum(train_sam2.background_losses(*arguments))
    expected = 0.0
    for click, picture in enumerate(index.tolist()):
        prompt = (batch["background_coords"][click][None, None], torch.ones(1, 1, dtype=torch.int32), None, True)
        tokens = decode(nano, embeddings, torch.tensor([picture]), *prompt)[3][0]  # (3, C)
        of_masks = [-0.5 * head(token).log_softmax(-1)[0] for token in tokens]
        expected = expected + sum(of_masks) / 3 / counts[picture] / 2
    torch.testing.assert_close(loss, settings.classes * 1.7 * expected, rtol=1e-4, atol=1e-6)
    empty = {"background_coords": torch.zeros(0, 2), "background_index": index[:0], "background_weight": index[:0]}
    assert list(train_sam2.background_losses(nano, embeddings, empty, head, settings, None, "fp32")) == []


# ---------------------------------------------------------------------------------------------------------------------
# which classes, how much each counts

COUNTS = {"train": {"": 2, "cell": 8, "debris": 2, "fibre": 2}, "val": {"cell": 3}}


def test_choice_of_classes(capfd):
    assert choose_classes("auto", COUNTS) == ["cell", "debris", "fibre"]
    assert "2 without a class teach masks alone" in capfd.readouterr().out
    assert choose_classes(["debris", "cell"], COUNTS) == ["debris", "cell"]
    printed = capfd.readouterr().out
    assert '2 training objects of other classes are "none"' in printed
    assert "class debris: no validation object is of it" in printed and "class cell:" not in printed


@pytest.mark.parametrize(
    "choice, counts, message",
    [
        (["Cell"], COUNTS, "classes has Cell, which no training object is; they are: cell 8, debris 2, fibre 2"),
        (["cell", "cell"], COUNTS, "classes has cell 2 times"),
        ("auto", {"train": {"": 4}, "val": {}}, "no training object has a class"),
        ("auto", {"train": {"none": 4}, "val": {}}, 'classes has "none"'),
    ],
)
def test_a_choice_that_cannot_be_is_said(choice, counts, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        choose_classes(choice, counts)


def test_weights_of_classes():
    names, counts = ["cell", "debris"], COUNTS["train"]
    assert weigh_classes(None, names, counts).tolist() == [1, 1, 1]
    assert weigh_classes({"debris": 3, "none": 0.5}, names, counts).tolist() == [0.5, 1, 3]
    none, cell, debris = weigh_classes("auto", names, counts).tolist()
    assert none == 1 and debris / cell == pytest.approx(2) and 8 * cell + 2 * debris == pytest.approx(10)
    with pytest.raises(ValueError, match="class_head.class_weights has dirt; must be among none, cell, debris"):
        weigh_classes({"dirt": 2}, names, counts)


def test_targets_of_objects():
    annotations = ({"category": "cell"}, {}, {"category": "other"}, {"category": ""}, {"category": "debris"})
    instances = Instances(np.array([[[1, 2, 3, 4, 5]]], np.int32), annotations=annotations)
    assert class_targets(instances, [(0, i) for i in (5, 1, 2, 3, 4)], ["cell", "debris"]) == [2, 1, -1, 0, -1]
    assert class_targets(Instances(instances.layers), [(0, 1)], ["cell"]) == [-1]


# ---------------------------------------------------------------------------------------------------------------------
# measures


def test_precision_by_class_is_cocos():
    """Against COCOeval with categories; objects without a class are left out on both sides."""
    rng, names = np.random.default_rng(0), ["a", "b", "c"]
    images, truth, results, matches = [], [], [], []
    for number in range(8):
        layers, said = np.zeros((6, 60, 60), np.int32), []
        annotations = []
        for place in range(6):
            y, x, height, width = *rng.integers(0, 40, 2), *rng.integers(8, 20, 2)
            layers[place, y : y + height, x : x + width] = place + 1
            name = rng.choice(["a", "b", ""])
            said.append({"category": str(name)} if name else {})
            mask = layers[place] > 0
            moved = np.roll(mask, rng.integers(-3, 4, 2), (0, 1))
            guess = str(rng.choice(names)) if rng.random() < 0.3 or not name else str(name)
            prob, iou = rng.random(2)
            annotations.append({"segmentation": mask_to_rle(moved), "area": int(moved.sum()), "class": guess})
            annotations[-1] |= {"class_prob": float(prob), "predicted_iou": float(iou)}
            results.append({"image_id": number, "category_id": names.index(guess) + 1, "score": float(prob * iou)})
            results[-1]["segmentation"] = encode_rle(moved)
            if name:
                shape = {"segmentation": encode_rle(mask), "area": int(mask.sum()), "iscrowd": 0}
                place = {"id": len(truth) + 1, "image_id": number, "category_id": names.index(name) + 1}
                truth.append(place | shape)
        images.append({"id": number, "height": 60, "width": 60})
        known = [place for place, each in enumerate(said) if each]
        instances = Instances(layers[known], annotations=tuple(said))
        matches.append(class_metrics.match_masks(annotations, instances, names))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        coco.dataset = {"images": images, "annotations": truth, "categories": categories}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # (T, R, K); -1 for c, which no object is
    by_class = class_metrics.precision_by_class(matches, names)
    summary = class_metrics.summarize_precision(by_class)
    assert summary["mask_ap"] == pytest.approx(precision[:, :, :2].mean(), abs=1e-9) and summary["mask_ap"] > 0.05
    assert summary["mask_ap_50"] == pytest.approx(precision[0, :, :2].mean(), abs=1e-9)
    np.testing.assert_allclose(by_class[:2], precision[:, :, :2].mean(1).T, atol=1e-9)
    assert np.isnan(by_class[2]).all()


def test_a_mask_of_an_object_without_a_class_is_neither_right_nor_wrong():
    layers = np.zeros((1, 10, 10), np.int32)
    layers[0, :4], layers[0, 6:] = 1, 2
    instances = Instances(layers, annotations=({"category": "a"}, {}))

    def precision(order):
        scores = dict(zip(order, (0.9, 0.5), strict=True))
        annotations = [
            {"segmentation": mask_to_rle(layers[0] == i), "area": 40, "class": "a", "class_prob": 1.0} for i in (1, 2)
        ]
        for number, annotation in enumerate(annotations, 1):
            annotation["predicted_iou"] = scores[number]
        return class_metrics.precision_by_class([class_metrics.match_masks(annotations, instances, ["a"])], ["a"])

    assert precision([1, 2]).mean() == precision([2, 1]).mean() == pytest.approx(1)
    of_none = class_metrics.precision_by_class([class_metrics.match_masks([], instances, ["b"])], ["b"])
    assert class_metrics.summarize_precision(of_none) == {}


def test_what_the_annotation_leaves_open_is_neither_right_nor_wrong():
    """A crowd that is left out, an object below min_area_px: masks on them take nothing from the precision."""
    layers = np.zeros((1, 20, 20), np.int32)
    layers[0, :5], layers[0, 10:12, :3] = 1, 2
    crowd = np.zeros((20, 20), bool)
    crowd[15:] = True
    instances = Instances(layers, annotations=({"category": "a"}, {"category": "a"}), ignored=crowd)
    part = np.zeros((20, 20), bool)
    part[16:18] = True
    masks = [part, layers[0] == 2, layers[0] == 1]
    annotations = [
        {"segmentation": mask_to_rle(mask), "area": int(mask.sum()), "class": "a", "class_prob": score}
        | {"predicted_iou": 1.0}
        for mask, score in zip(masks, (0.9, 0.8, 0.7), strict=True)
    ]
    for given, least, expected in (
        (instances, 10, 1.0),
        (instances, 0, 1.0),
        (instances._replace(ignored=None), 10, 0.5),
    ):
        matches = class_metrics.match_masks(annotations, given, ["a"], least)
        assert class_metrics.precision_by_class([matches], ["a"])[0] == pytest.approx(expected, abs=0.01)


def test_crowds_of_a_coco_file_are_left_open(tmp_path):
    root = write_coco(tmp_path / "data")
    content = json.loads((root / "train.json").read_text())
    content["annotations"][0]["iscrowd"] = 1
    (root / "train.json").write_text(json.dumps(content))
    items = split_items(**data_keys(configure(root)))[0]
    first = items[0].read()
    crowd = coco_mask.decode(content["annotations"][0]["segmentation"]) > 0
    assert np.array_equal(first.ignored, crowd) and not first.layers[:, crowd].any() and first.num_crowd == 1
    assert items[1].read().ignored is None


def test_answers_are_counted_and_drawn(tmp_path):
    logits = np.array([[3.0, 1, 2], [0, 5, 1], [0, 1, 9], [9, 1, 0], [0, 9, 1]])
    with_none, of_names = class_metrics.count_answers([1, 1, 2, 0, -1], logits)
    assert with_none.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert of_names.tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 1]]
    counted = [np.stack([with_none, of_names])] * 2
    values = class_metrics.report_classes(counted, [], ["cell", "débris, braun"], tmp_path / "new")
    assert values == {"class_accuracy_1_click": pytest.approx(2 / 3)}
    assert read_image(tmp_path / "new" / "confusion.png").std() > 0
    with (tmp_path / "new" / "classes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1:] == [["cell", "4", "0.5000", "", ""], ["débris, braun", "2", "1.0000", "", ""]]
    many = np.eye(101, dtype=np.int64)
    class_metrics.draw_confusion(many, [f"class {number}" for number in range(100)], tmp_path / "many.png")
    assert max(read_image(tmp_path / "many.png").shape) < 3000


# ---------------------------------------------------------------------------------------------------------------------
# masks of different classes


def test_masks_are_suppressed_by_their_own_class_alone():
    boxes = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [1.0, 0.0, 10.0, 10.0]]
    annotations = [{"bbox": box, "class": name} for box, name in zip(boxes, ("a", "b", "b"), strict=True)]
    assert drop_duplicates(annotations, [0.9, 0.8, 0.7], 0.5) == annotations[:1]
    assert drop_duplicates(annotations, [0.9, 0.8, 0.7], 0.5, across_classes=False) == annotations[:2]

    masks = np.zeros((3, 6, 10), bool)
    masks[0, :, :6], masks[1, :, 4:], masks[2, :, 4:9] = True, True, True
    rles = [mask_to_rle(mask) for mask in masks]
    assert stitch_masks(rles, [0.9, 0.8, 0.7], (6, 10))[1].tolist() == [1, 0, 0]  # a third of the second is taken
    label_map, ids = stitch_masks(rles, [0.9, 0.8, 0.7], (6, 10), 0.15, ["a", "b", "b"])
    assert ids.tolist() == [1, 2, 0] and label_map[0].tolist() == [1] * 6 + [2] * 4
    label_map, ids = stitch_masks(rles, [0.7, 0.8, 0.9], (6, 10), 0.15, ["a", "b", "c"])
    assert ids.tolist() == [3, 2, 1] and label_map[0].tolist() == [3] * 4 + [1] * 5 + [2]


def test_automatic_masks_are_kept_by_class(nano):
    head = ClassHead(["a", "b"], nano.hidden_dim)
    digits = lambda tokens: (tokens[:, :2].double() * 1e4).frac().abs()  # noqa: E731  (answers that differ)
    head.classify = lambda tokens: ((digits(tokens)[:, 0] > 0.5).long(), digits(tokens)[:, 1].float())
    image_rgb = tiny_training.draw_picture(np.random.default_rng(3), 48, 64)[0]
    settings = mask_generation.AutomaticSettings(**NONE_KEPT, box_nms_thresh=1.0)

    def masks(**keywords):
        return mask_generation.generate_masks(
            nano, image_rgb, settings, None, ClassFilter(head, **keywords)
        ).annotations

    everything = masks()
    plain = mask_generation.generate_masks(nano, image_rgb, settings).annotations
    own_keys = {"class", "class_prob"}
    strip = lambda annotation: {key: value for key, value in annotation.items() if key not in own_keys}  # noqa: E731
    assert {each["class"] for each in everything} == {"a", "b"} and len(everything) == len(plain)
    assert sorted(map(repr, map(strip, everything))) == sorted(map(repr, plain))
    scores = [each["predicted_iou"] * each["class_prob"] for each in everything]
    assert scores == sorted(scores, reverse=True)
    middle = float(np.median([each["class_prob"] for each in everything]))
    kept = masks(keep_classes=("b",), min_class_prob=middle)
    assert kept == [each for each in everything if each["class"] == "b" and each["class_prob"] >= middle] != []


# ---------------------------------------------------------------------------------------------------------------------
# tiny runs


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that sees four pictures over and over, and is measured on two of them."""
    run_dir = tmp_path_factory.mktemp("learned") / "run"
    root = write_coco(run_dir.parent / "data", val_seed=0)
    command = overrides(
        root, "model.checkpoint=auto", "classes=auto", "class_head.lr=2e-3", "loss.classes=1", "data.hflip=false",
        "optim.lr=1e-3", "train.steps=22", "train.eval_every=22", "train.batch_size=4", "train.clip_norm=1.0",
        "prompts.max_corrections=0", "train.eval_automatic=ends",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_few_points(monkeypatch)
        tiny_training.leave_out_pictures(monkeypatch)
        status, message = tiny.run_script(train_sam2, run_dir, *command)
    assert status == 0, message
    return run_dir


def use_few_points(monkeypatch):
    """Measure automatic masks of 8 x 8 points: most of the time of a tiny run."""
    real = train_sam2.choose_automatic

    def choose(*arguments, **keywords):
        automatic = real(*arguments, **keywords)
        return automatic and dataclasses.replace(automatic, points_per_side=8)

    monkeypatch.setattr(train_sam2, "choose_automatic", choose)


def test_classes_are_learned_and_lie_beside_the_weights(learned):
    metrics = json.loads((learned / "run.json").read_text())["metrics"]
    assert metrics["last"]["val/class_accuracy_1_click"] >= 0.9 > metrics["start"]["val/class_accuracy_1_click"]
    assert 0 <= metrics["start"]["val/mask_ap"] < metrics["last"]["val/mask_ap"]
    assert (learned / "samples" / "step_000022" / "confusion.png").is_file()
    best = load_checkpoint(learned / "best.pt")
    assert best["model"].keys() == build_sam2(**NANO, device="cpu").state_dict().keys()
    assert best["classes"] == sorted(COLORS) and best["class_head"]["layers.2.weight"].shape[0] == 4


def run_infer(learned, root, run_dir, *more):
    run_dir.mkdir()
    arguments = ["device=cpu", f"checkpoint={learned / 'best.pt'}", f"input={root / 'train' / '0.png'}"]
    automatic = [f"automatic.{key}={value}" for key, value in NONE_KEPT.items()] + ["automatic.crop_n_layers=0"]
    arguments += [] if "mode=prompts" in more else automatic
    infer_sam2.infer(tiny.compose_config("infer_sam2", *arguments, *more), run_dir)
    return json.loads((run_dir / "0.json").read_text())


def test_masks_that_are_written_have_classes(learned, root, tmp_path):
    record = run_infer(learned, root, tmp_path / "run")
    assert record["classes"] == sorted(COLORS)
    ids = cv2.imread(str(tmp_path / "run" / "0_labels.png"), cv2.IMREAD_UNCHANGED)
    class_map = cv2.imread(str(tmp_path / "run" / "0_classes.png"), cv2.IMREAD_UNCHANGED)
    assert ids.max() >= 2 and np.array_equal(ids > 0, class_map > 0)
    for annotation in record["annotations"]:
        assert 0.5 <= annotation["class_prob"] <= 1
        drawn = np.unique(class_map[ids == annotation["id"]]).tolist()
        assert drawn in ([], [1 + record["classes"].index(annotation["class"])])
    overlay = read_image(tmp_path / "run" / "0_overlay.png")
    assert overlay.shape[0] > ids.shape[0]  # a legend below

    image_rgb = read_image(root / "train" / "0.png")
    kept = run_infer(learned, root, tmp_path / "kept", "keep_classes=[red,green]", "min_class_prob=0.6")
    assert {annotation["class"] for annotation in kept["annotations"]} in ({"red"}, {"green"}, {"red", "green"})
    for annotation in kept["annotations"][:2]:
        color = image_rgb[coco_mask.decode(annotation["segmentation"]) > 0].mean(0).argmax()
        assert COLORS[color] == annotation["class"]
    everything = run_infer(learned, root, tmp_path / "all", "min_class_prob=0", "nms_across_classes=false")
    assert len(everything["annotations"]) > len(record["annotations"])
    prompted = run_infer(learned, root, tmp_path / "prompts", "mode=prompts", "boxes=[[3,3,20,40]]")
    assert prompted["annotations"][0]["class"] in COLORS


def test_formats_get_the_classes(learned, root, tmp_path):
    record = run_infer(learned, root, tmp_path / "run", "write=[coco,yolo]")
    coco = json.loads((tmp_path / "run" / "coco" / "annotations.json").read_text())
    assert [category["name"] for category in coco["categories"]] == sorted(COLORS)
    in_map = [each for each in record["annotations"][: len(coco["annotations"])]]
    names = {category["id"]: category["name"] for category in coco["categories"]}
    assert [names[each["category_id"]] for each in coco["annotations"]] == [each["class"] for each in in_map]
    (label_path,) = (tmp_path / "run" / "yolo" / "labels").glob("*.txt")
    numbers = [int(line.split()[0]) for line in label_path.read_text().splitlines()]
    assert numbers == [sorted(COLORS).index(each["class"]) for each in in_map]


def test_a_run_goes_on_exactly(root, tmp_path, monkeypatch):
    tiny_training.make_runs_quick(monkeypatch)
    config = configure(root, "train.steps=4", "train.save_every=2", "train.eval_every=4")
    tiny_training.train_in(tmp_path / "whole", config)
    tiny.crash_at_step(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        tiny_training.train_in(tmp_path / "half", config)
    monkeypatch.undo()
    tiny_training.make_runs_quick(monkeypatch)
    tiny_training.train_in(tmp_path / "resumed", config, tmp_path / "half" / "last.pt")
    assert not tiny.run_differences(tmp_path / "whole", tmp_path / "resumed")
    assert "class_head" in load_checkpoint(tmp_path / "resumed" / "last.pt")


def test_classes_of_no_weight_leave_the_masks_as_they_are(root, tmp_path, monkeypatch):
    tiny_training.make_runs_quick(monkeypatch)
    steps = ("train.steps=3", "train.eval_every=3")
    with_classes = tiny_training.train_in(tmp_path / "with", configure(root, *steps, "loss.classes=0"))
    without = tiny_training.train_in(tmp_path / "without", configure(root, *steps, "classes=null"))
    assert not tiny.differences(with_classes["model"], without["model"])
    learning = tiny_training.train_in(tmp_path / "learning", configure(root, *steps))
    assert tiny.differences(learning["model"], without["model"])
    assert tiny.differences(learning["class_head"], with_classes["class_head"])


def test_a_head_with_the_same_classes_goes_on(learned, root, tmp_path, capfd, monkeypatch):
    tiny_training.leave_out_pictures(monkeypatch)
    more = [f"model.checkpoint={learned / 'best.pt'}", "train.steps=0"]
    own = overrides(learned.parent / "data", "classes=auto", *more)
    status, message = tiny.run_script(train_sam2, tmp_path / "same", *own)
    assert status == 0, message
    accuracies = [
        json.loads((folder / "run.json").read_text())["metrics"]["best"]["val/class_accuracy_1_click"]
        for folder in (learned, tmp_path / "same")
    ]
    assert accuracies[0] == accuracies[1]
    only_val = overrides(root, "classes=auto", *more, "data.val_annotations=null", "data.val_fraction=1")
    status, message = tiny.run_script(train_sam2, tmp_path / "val", *only_val)  # no training picture says the classes
    assert status == 0, message
    status, message = tiny.run_script(train_sam2, tmp_path / "other", *overrides(root, "classes=[red]", *more))
    assert status == 1 and "model.checkpoint has the classes blue, green, red, but classes are red" in message
    capfd.readouterr()
    status, message = tiny.run_script(
        train_sam2, tmp_path / "anew", *overrides(root, "classes=[red]", more[0], "train.steps=1")
    )
    assert status == 0 and "they are learned anew" in capfd.readouterr().out


def test_a_class_without_validation_objects_is_said_and_not_measured(tmp_path, monkeypatch, capfd):
    tiny_training.make_runs_quick(monkeypatch)
    use_few_points(monkeypatch)
    root = write_coco(tmp_path / "data", val_names=("red", "green"))
    config = configure(root, "train.steps=0", "classes=[red,green,blue]")
    with pytest.raises(ValueError, match="with train.steps=0 nothing learns them"):
        tiny_training.train_in(tmp_path / "none", config)
    config = configure(root, "train.steps=1", "train.eval_every=1", "train.eval_automatic=ends")
    last = tiny_training.train_in(tmp_path / "run", config)
    assert "class blue: no validation object is of it" in capfd.readouterr().out
    with (tmp_path / "run" / "samples" / "step_000001" / "classes.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert "val/mask_ap" in last["best"] and rows["red"]["mask_ap"] and not rows["blue"]["mask_ap"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["classes=[purple]"], "classes has purple, which no training object is"),
        (["classes=yes"], "classes is yes; must be null, or auto or a list of names (numbers in quotes)"),
        (["classes=[]"], "classes is []; must be null, or auto or a list of names"),
        (["train.select_by=val/class_accuracy_1_click"], "which a run without classes does not measure"),
        (["classes=auto", "+class_head.class_weights={dirt:2}"], "class_head.class_weights has dirt"),
        (
            ["classes=auto", "class_head.class_weights=rare"],
            "class_head.class_weights is rare; must be null, or auto or {name: weight}",
        ),
        (["classes=[1,2]"], "classes is [1, 2]; must be null, or auto or a list of names (numbers in quotes)"),
        (["classes=auto", "class_head.lr=inf"], "class_head.lr is inf"),
        (["classes=auto", "class_head.lr=0"], "class_head.lr is 0; must be above 0"),
        (["classes=auto", "train.eval_automatic=sometimes"], "train.eval_automatic is sometimes; must be one of ends"),
    ],
)
def test_bad_settings_are_one_line(root, tmp_path, more, message):
    status, printed = tiny.run_script(train_sam2, tmp_path / "run", *overrides(root, *more))
    assert status == 1 and message in printed and "\n" not in printed.strip(), printed


def test_bad_choices_of_masks_are_one_line(learned, root, tmp_path):
    with pytest.raises(ValueError, match="keep_classes has cat; the checkpoint's classes are blue, green, red"):
        run_infer(learned, root, tmp_path / "a", "keep_classes=[cat]")
    with pytest.raises(ValueError, match="keep_classes= needs a checkpoint that knows classes"):
        run_infer(learned, root, tmp_path / "b", "keep_classes=[red]", "checkpoint=null")
    with pytest.raises(ValueError, match="keep_classes is "):
        run_infer(learned, root, tmp_path / "e", "keep_classes=[]")
    with pytest.raises(ValueError, match="min_class_prob"):
        run_infer(learned, root, tmp_path / "c", "min_class_prob=1.5")
    with pytest.raises(ValueError, match="keep_classes"):
        run_infer(learned, root, tmp_path / "d", "keep_classes=[red]", "mode=prompts", "boxes=[[3,3,20,40]]")


def test_a_head_starts_as_linear_layers_do():
    torch.manual_seed(0)
    expected = torch.nn.Linear(256, 256).weight
    weight = ClassHead(["a"], 256, seed=3).layers[0].weight
    assert weight.abs().max() <= 1 / 16 and weight.std().item() == pytest.approx(expected.std().item(), rel=0.02)


def test_the_end_measures_automatic_masks_and_the_middle_does_not(root, tmp_path, monkeypatch):
    """And the head's rate follows the schedule from its own highest one, whatever optim.lr is."""
    tiny_training.make_runs_quick(monkeypatch)
    use_few_points(monkeypatch)
    config = configure(root, "train.steps=3", "train.eval_every=1", "train.eval_automatic=ends", "optim.lr=0")
    last = tiny_training.train_in(tmp_path / "run", config)
    assert [row["step"] for row in last["metrics"] if "val/mask_ap" in row] == [0, 3]
    groups = last["optimizer"]["param_groups"]
    assert (
        groups[-1]["own_lr"] == 1e-3 and 0 < groups[-1]["lr"] <= 1e-3 and {group["lr"] for group in groups[:-1]} == {0}
    )
    start = ClassHead(sorted(COLORS), build_sam2(**NANO, device="cpu").hidden_dim).state_dict()
    moved = {name: (last["class_head"][name] - start[name]).abs().max().item() for name in start}
    assert moved.pop("class_weights") == 0 and all(0 < move < 5e-3 for move in moved.values())


def test_a_mixture_of_weights_has_the_head_of_the_end(root, tmp_path, monkeypatch):
    tiny_training.make_runs_quick(monkeypatch)
    general = {**configure(root)["data"], "val_images": "val", "val_annotations": "val.json"}
    general = {key: value for key, value in general.items() if key not in ("min_area_px", "hflip", "color_jitter")}
    config = configure(root, "train.steps=2", "train.eval_every=1", "train.blend=true") | {"general_data": general}
    last = tiny_training.train_in(tmp_path / "run", config)
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert not tiny.differences(best["class_head"], last["class_head"]) and "blend" in best["metrics"]
