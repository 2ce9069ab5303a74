"""Masks from words: embeddings that agree, the token up to the decoder, training, and what infer_sam2.py says."""

import json
import sys

import cv2
import numpy as np
import pytest
import tiny
import tiny_training
import torch
from PIL import Image
from test_sam2_model import model_config
from tiny import run_differences
from tiny_training import configure, make_dataset, train_in

import infer_sam2
import train_sam2
from utils.checkpoint import load_checkpoint
from utils.images import write_image, write_label_map
from utils.run import start_threads
from utils.sam2 import evaluation, words
from utils.sam2 import model as models
from utils.samples import named_shapes
from utils.samples.named_shapes import ALL_NAMES, HELD_OUT, choose_names, draw_named_shapes

TEXT = ["prompts=text", "text_encoder=named_shapes", "prompts.text.min_area_px=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_training.write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def quick(monkeypatch):
    tiny_training.leave_out_pictures(monkeypatch)


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A run of four steps with words: its folder and what last.pt holds."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_training.leave_out_pictures(monkeypatch)
        last = train_in(run_dir, configure(root, *TEXT, "train.steps=4", "train.eval_every=2"))
    return run_dir, last


# ---------------------------------------------------------------------------------------------------------------------
# pictures, crops, embeddings


def test_crops_and_words_agree_on_all_kinds_of_objects():
    encoder = words.NamedShapes()
    of_words = encoder.embed_words(ALL_NAMES)
    assert torch.allclose(of_words.norm(dim=1), torch.ones(len(ALL_NAMES)))
    asked, crops = [], []
    for index in range(8):
        rng = np.random.default_rng([5, index])
        names = choose_names(rng, "test" if index % 2 else "train")
        image_rgb, masks = draw_named_shapes(rng, names, 512)
        for name, mask in zip(names, masks, strict=True):
            asked.append(name)
            crops.append(words.crop_object(image_rgb, mask, rng.uniform(1, 2), rng.random() < 0.5, encoder.crop_side))
    of_crops = encoder.embed_crops(torch.from_numpy(np.stack(crops)))
    similarity = of_crops @ of_words.T
    assert [ALL_NAMES[place] for place in similarity.argmax(1)] == asked
    assert similarity.amax(1).min() > 0.85
    grey = torch.full((1, 3, 96, 96), 128, dtype=torch.uint8)
    assert encoder.embed_crops(grey).norm() == 0 and encoder.embed_crops(grey[:0]).shape == (0, encoder.size)


def test_generated_pictures_make_both_words_count_and_keep_four_kinds_for_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr(named_shapes, "NUM_PICTURES", {"train": 3, "val": 2, "test": 3})
    named_shapes.write_named_shapes(tmp_path / "shapes")
    assert {name.split()[0] for name in HELD_OUT} == set(named_shapes.COLORS)
    assert {name.split()[1] for name in HELD_OUT} == set(named_shapes.SHAPES)
    for split in ("train", "val", "test"):
        record = json.loads((tmp_path / "shapes" / "annotations" / f"instances_{split}.json").read_text())
        names = {category["id"]: category["name"] for category in record["categories"]}
        for image in record["images"]:
            assert (tmp_path / "shapes" / split / image["file_name"]).is_file()
            objects = [each for each in record["annotations"] if each["image_id"] == image["id"]]
            first, *others = [names[each["category_id"]].split() for each in objects]
            assert first[0] in [color for color, _ in others] and first[1] in [shape for _, shape in others]
            kinds = [" ".join(pair) for pair in (first, *others)]
            assert len(set(kinds)) == len(kinds) and bool(set(kinds) & set(HELD_OUT)) == (split == "test")
            assert all(each["area"] > 10_000 for each in objects)


def test_crop_equals_a_padded_picture_cut_open():
    rng = np.random.default_rng(0)
    image_rgb = rng.integers(1, 256, (40, 60, 3)).astype(np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[2:12, 40:60] = True  # 20 wide, 10 high, at the right edge
    mask[3, 45] = False
    padded = np.pad(image_rgb, ((50, 50), (50, 50), (0, 0)))
    for scale, side in ((1.0, 20), (2.0, 40)):
        top, left = 50 + 7 - side // 2, 50 + 50 - side // 2
        expected = padded[top : top + side, left : left + side]
        crop = words.crop_object(image_rgb, mask, scale, False, side)
        np.testing.assert_array_equal(crop, expected.transpose(2, 0, 1))
        blank = words.crop_object(image_rgb, mask, scale, True, side)
        kept = np.pad(mask, 50)[top : top + side, left : left + side]
        np.testing.assert_array_equal(blank, np.where(kept, crop, 0))
    small = words.crop_object(image_rgb, mask, 2.0, False, 8)
    np.testing.assert_array_equal(small, cv2.resize(expected, (8, 8), interpolation=cv2.INTER_AREA).transpose(2, 0, 1))
    pixel = np.zeros((1, 1), bool) | True
    assert words.crop_object(np.full((1, 1, 3), 9, np.uint8), pixel, 1.0, False, 4).min() == 9


def test_sample_with_words_has_the_other_draws_of_one_without(root):
    plain, worded = (make_dataset_of(configure(root, *changes)) for changes in (["prompts.box_share=0"], TEXT))
    shares = []
    for index in range(12):
        ours, other = worded[index], plain[index]
        for key in other.keys() - {"num_points"}:
            assert ours[key] == other[key] if key == "name" else torch.equal(ours[key], other[key]), key
        has_text = ours["has_text"]
        assert torch.equal(ours["num_points"], torch.where(has_text, 0, other["num_points"]))
        assert torch.equal(ours["crops"].flatten(1).any(1), has_text)
        assert all(torch.equal(a, b) for a, b in zip(ours["crops"], worded[index]["crops"], strict=True))
        shares.append(has_text.float().mean())
    assert 0.5 < np.mean(shares) < 0.95
    assert not make_dataset_of(configure(root, *TEXT[:2]))[0]["has_text"].any()  # all smaller than 100**2


def make_dataset_of(config):
    """The training set of a config, with crops."""
    dataset = make_dataset(config)
    text = config["prompts"]["text"]
    settings = train_sam2.read_settings(train_sam2.PromptSettings, config["prompts"], "prompts")
    dataset.prompt_settings, dataset.crop_side = settings, 96 if text else 0
    return dataset


# ---------------------------------------------------------------------------------------------------------------------
# the token on its way to the decoder


@pytest.mark.parametrize("is_fast", [True, False])
def test_token_is_one_more_prompt_and_gets_gradient(is_fast):
    """A point's own embedding, given as words, is that point; the loss reaches the map."""
    torch.manual_seed(0)
    model = models.build_sam2(**model_config("sam2_nano", checkpoint="none", image_size=64), device="cpu")
    model = tiny_training.answer_to_prompts(model)
    model.fast_decoder = is_fast
    embeddings = models.encode(model, torch.randn(2, 3, 64, 64))
    embeddings = models.Embeddings(embeddings[0].detach(), [each.detach() for each in embeddings[1]])
    index, coords, labels = torch.tensor([1, 0, 1]), 64 * torch.rand(3, 2, 2), torch.ones(3, 2, dtype=torch.int32)
    points, _ = model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)  # (3, 2 + 1, C)
    for count in (1, 2):
        others = coords[:, 1:count], labels[:, 1:count]
        expected = models.decode(model, embeddings, index, coords[:, :count], labels[:, :count], None, count == 1)
        given = models.decode(model, embeddings, index, *others, None, count == 1, points[:, 0])
        for ours, theirs in zip(given, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    text_map = words.TextMap("named_shapes", words.NamedShapes.size, model.hidden_dim)
    tokens = text_map(words.NamedShapes().embed_words(["red circle", "blue star", "red star"]))
    masks, *_ = models.decode(model, embeddings, index, coords[:, :0], labels[:, :0], None, True, tokens)
    masks.square().mean().backward()
    assert masks.shape == (3, 3, 16, 16) and all(each.grad.abs().max() > 0 for each in text_map.parameters())
    assert (masks[0] - masks[2]).abs().max() > 0  # the same picture


# ---------------------------------------------------------------------------------------------------------------------
# training


def test_map_lies_beside_the_model_and_trains(trained, root):
    run_dir, last = trained
    best = load_checkpoint(run_dir / "best.pt")
    model = models.build_sam2(**best["config"]["model"] | {"checkpoint": str(run_dir / "best.pt")}, device="cpu")
    assert best["model"].keys() == model.state_dict().keys()
    assert best["text_encoder"] == last["text_encoder"] == "named_shapes"
    start = words.TextMap("named_shapes", words.NamedShapes.size, model.hidden_dim).state_dict()
    assert all((last["text_map"][name] - start[name]).abs().max() > 1e-4 for name in start)
    loaded = words.load_text_map(run_dir / "best.pt", torch.device("cpu"))
    assert all(torch.equal(best["text_map"][name], each) for name, each in loaded.state_dict().items())
    assert {"val/iou_crop", "val/iou_1_click"} <= best["metrics"].keys() and "val/iou_words" not in best["metrics"]


def test_resume_is_exact(trained, root, tmp_path, quick, monkeypatch):
    run_dir, last = trained
    with pytest.MonkeyPatch.context() as crashing:
        tiny.crash_at_step(crashing, 3)
        with pytest.raises(KeyboardInterrupt):
            train_in(tmp_path / "crashed", last["config"])
    train_in(tmp_path / "resumed", last["config"], tmp_path / "crashed" / "last.pt")
    assert not run_differences(run_dir, tmp_path / "resumed")


def test_gradients_through_all_rounds_reach_the_map_too(root, tmp_path, quick, monkeypatch):
    tiny_training.script_evaluation(monkeypatch)
    config = configure(root, *TEXT, "prompts.detach=false", "fast_decoder=false", "train.steps=1")
    last = train_in(tmp_path / "run", config)
    start = words.TextMap("named_shapes", words.NamedShapes.size, 128).state_dict()
    assert all((last["text_map"][name] - start[name]).abs().max() > 1e-4 for name in start)


def test_weights_go_on_from_a_checkpoint_and_refuse_what_does_not_fit(trained, root, tmp_path, quick):
    run_dir, last = trained
    best = f"model.checkpoint={run_dir / 'best.pt'}"
    again = train_in(tmp_path / "again", configure(root, *TEXT, best, "train.steps=0"))
    assert tiny.differences(again["text_map"], load_checkpoint(run_dir / "best.pt")["text_map"]) == []
    metrics = load_checkpoint(run_dir / "best.pt")["metrics"]
    assert again["best"]["val/iou_crop"] == pytest.approx(metrics["val/iou_crop"], abs=1e-6)
    other = load_checkpoint(run_dir / "best.pt") | {"text_encoder": "ViT-B-32/openai"}
    torch.save(other, tmp_path / "other.pt")
    for changes, message in [
        ([*TEXT, f"model.checkpoint={tmp_path / 'other.pt'}"], "was trained with ViT-B-32/openai; use that"),
        ([*TEXT, "train.steps=0"], "has no text map, and with train.steps=0 none is learned"),
        (TEXT[:1], "prompts=text is given alone; masks from words need text_encoder="),
        (TEXT[1:2], "text_encoder=named_shapes is given alone; masks from words need prompts=text"),
        ([*TEXT, "text_encoder=ViT-B-23"], "text_encoder is ViT-B-23; must be named_shapes"),
        ([*TEXT, "prompts.text.crop_scale_max=0.5"], "prompts.text.crop_scale_max is 0.5; must be 1 or more"),
        ([*TEXT, "prompts.text.crop_scale_min=3"], "prompts.text.crop_scale_max is 2.0; must be finite"),
        (["train.select_by=val/iou_crop"], "which a run without prompts=text does not measure"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_in(tmp_path / message[-20:], configure(root, *changes))


def test_trained_on_crops_words_choose_the_right_object(tmp_path, quick, monkeypatch):
    """Over-fitted: a red disc and a blue square, on either side; no word was ever shown."""
    tiny_training.script_evaluation(monkeypatch)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    pictures = []
    for number in range(4):
        image_rgb, ids = np.full((64, 64, 3), 90, np.uint8), np.zeros((64, 64), np.int32)
        left, right = (14 + number, 48 - number)[:: 1 if number % 2 else -1]
        cv2.circle(ids, (left, 20 + 7 * number), 11, 1, -1)
        cv2.rectangle(ids, (right - 9, 44 - 7 * number), (right + 9, 62 - 7 * number), 2, -1)
        image_rgb[ids > 0] = np.array([(220, 30, 30), (40, 60, 230)], np.uint8)[ids[ids > 0] - 1]
        write_image(tmp_path / "images" / f"{number}.png", image_rgb)
        write_label_map(tmp_path / "labels" / f"{number}.png", ids)
        pictures.append((image_rgb, np.stack([ids == 1, ids == 2])))
    overrides = [*TEXT, "prompts.text.share=1", "prompts.text.lr=1e-2", "prompts.max_corrections=0", "loss=balanced",
                 "loss.click_similarity=0", "train.steps=45", "train.batch_size=3", "data.val_list=null",
                 "data.val_fraction=0.25", "model.checkpoint=auto", "cache_precision=fp32"]  # fmt: skip
    train_in(tmp_path / "run", configure(tmp_path, *overrides))
    path = tmp_path / "run" / "last.pt"
    config = load_checkpoint(path)["config"]
    model = models.build_sam2(**config["model"] | {"checkpoint": str(path)}, device="cpu", fast_decoder=True)
    tokens = words.load_text_map(path, model.device)(words.NamedShapes().embed_words(["red circle", "blue square"]))
    right, wrong = [], []
    with torch.no_grad(), start_threads() as threads:
        for image_rgb, masks in pictures:
            embeddings = models.encode(model, models.preprocess(image_rgb, 64)[None])
            for ious, asked in ((right, tokens), (wrong, tokens.flip(0))):
                ious.append(evaluation.measure_tokens(model, embeddings, masks, asked, "fp32", threads))
    assert torch.stack(right).mean() > 0.5 and torch.stack(wrong).mean() < torch.stack(right).mean() - 0.3


# ---------------------------------------------------------------------------------------------------------------------
# open_clip, with random weights


def test_open_clip_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match="ViT-B-32; must be named_shapes, or .* pip install open_clip_torch"):
        words.build_encoder("ViT-B-32", torch.device("cpu"))


def test_open_clip_embeds_crops_and_words(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    (tmp_path / "tiny-clip.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    encoder = words.build_encoder("tiny-clip/none", torch.device("cpu"))
    assert (encoder.name, encoder.size, encoder.crop_side) == ("tiny-clip/none", 24, 32)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", pretrained=None)
    model.load_state_dict(encoder.model.state_dict())
    image_rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    with torch.no_grad():
        expected = model.eval().encode_image(preprocess(Image.fromarray(image_rgb))[None])
        of_words = model.encode_text(open_clip.get_tokenizer("tiny-clip")(["a wheel"]))
    ours = encoder.embed_crops(torch.from_numpy(image_rgb.transpose(2, 0, 1))[None])
    torch.testing.assert_close(ours, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.embed_words(["a wheel"]), of_words / of_words.norm(dim=1, keepdim=True))
    for name in ("tiny-clip", "tiny-clip/laion"):
        with pytest.raises(ValueError, match=f"text_encoder is {name}; give one of its weights, .*: none .random"):
            words.build_encoder(name, torch.device("cpu"))
    with pytest.raises(ValueError, match="text_encoder is ViT-B-23; must be named_shapes or a model of open_clip: "):
        words.build_encoder("ViT-B-23", torch.device("cpu"))

    def fail(*args, **keywords):
        raise OSError("cannot reach the hub\nand more")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(
        ConnectionError, match="could not be downloaded .cannot reach the hub.; run once with a network"
    ):
        words.build_encoder("ViT-B-32/openai", torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# infer_sam2.py


def read_record(run_dir):
    return json.loads(next(run_dir.glob("[0-9]*.json")).read_text())


def test_text_alone_and_beside_a_point(trained, root, tmp_path):
    run_dir, _ = trained
    common = [f"checkpoint={run_dir / 'last.pt'}", "device=cpu", "mode=prompts", f"input={root / 'images' / '001.png'}"]
    status, message = tiny.run_script(infer_sam2, tmp_path / "alone", *common, "text=a red circle, or so")
    assert status == 0, message
    alone = read_record(tmp_path / "alone")
    prompts_file = tmp_path / "prompts.json"
    objects = [{"text": "a red circle, or so"}, {"text": "blue"}, {"text": "blue", "points": [[9, 9, 1]]}]
    prompts_file.write_text(json.dumps([*objects, {"points": [[9, 9, 1]]}]))
    status, message = tiny.run_script(infer_sam2, tmp_path / "file", *common, f"prompts_file={prompts_file}")
    assert status == 0, message
    several = read_record(tmp_path / "file")
    of_prompt = {each["prompt"]: each for each in several["annotations"]}
    assert sorted([*of_prompt, *several["prompts_without_mask"]]) == [0, 1, 2, 3]
    for each in alone["annotations"]:
        assert each["text"] == "a red circle, or so" and each["segmentation"] == of_prompt[0]["segmentation"]
    assert all(("text" in each) == (number != 3) for number, each in of_prompt.items())
    if {2, 3} <= of_prompt.keys():
        assert of_prompt[2]["predicted_iou"] != of_prompt[3]["predicted_iou"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mode=prompts", "text="], "text= is empty; say what to look for"),
        (["text=star"], "text= is given but mode is automatic, which does not use it"),
        (["mode=prompts", "text=a wheel", "checkpoint=BEST"], "text is 'a wheel', with no word that text_encoder="),
        (["mode=prompts", "text=star"], "has no text map; train_sam2.py prompts=text text_encoder="),
        (
            ["mode=prompts", "text=star", "boxes=[[1,1,9,9],[2,2,9,9]]", "checkpoint=BEST"],
            "text= is given with 2 boxes",
        ),
        (["mode=prompts", "text=star", "prompts_file=FILE"], "prompts_file= is given together with text="),
        (["mode=prompts", "prompts_file=FILE", "checkpoint=BEST"], "an object's text is 3; must be words"),
        (["mode=prompts", "text=star", "checkpoint=CLIP"], "which is not installed"),
    ],
)
def test_text_that_cannot_be_used_is_one_line(arguments, message, trained, root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    (tmp_path / "prompts.json").write_text('[{"text": 3}]')
    best = load_checkpoint(trained[0] / "best.pt")
    torch.save(best | {"text_encoder": "ViT-B-32/openai"}, tmp_path / "clip.pt")
    places = {"BEST": trained[0] / "best.pt", "FILE": tmp_path / "prompts.json", "CLIP": tmp_path / "clip.pt"}
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    picture = f"input={root / 'images' / '001.png'}"
    status, said = tiny.run_script(infer_sam2, tmp_path / "run", "device=cpu", picture, *arguments)
    assert status == 1 and message in said and "\n" not in said
