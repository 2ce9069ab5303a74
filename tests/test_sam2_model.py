"""utils/sam2/model.py: building beside Hydra, the same numbers as sam2's own predictor, weights, trainable parts.

sam2 is imported inside tests only, after our builder imported it: `import sam2` alone starts Hydra globally.
"""

import http.client
import importlib.util
import inspect
import re
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import child_environment, run_python
from options import read_option
from tiny_training import make_predictor

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.sam2 import model as models

ROOT = Path(__file__).resolve().parent.parent
MODEL_FILES = sorted((ROOT / "configs" / "sam2" / "model").glob("sam2*.yaml"))
NAMES = [path.stem for path in MODEL_FILES]


def model_config(name: str, **changes) -> dict:
    return read_option("sam2", "model", name) | changes


def build_random(name: str, image_size: int, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return models.build_sam2(**model_config(name, checkpoint="none", image_size=image_size), device="cpu")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Hydra and `import sam2`, each order in a process of its own

TRAP = """
import sys
from pathlib import Path
import hydra
import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from utils.sam2 import model as sam2_model
from utils.sam2.mask_generation import AutomaticSettings

def config(name):
    path = Path(sam2_model.__file__).resolve().parents[2] / "configs" / "sam2" / "model" / f"{name}.yaml"
    return yaml.safe_load(path.read_text()) | {"checkpoint": "none", "image_size": 64, "device": "cpu"}

TINY, NANO = config("sam2.1_hiera_tiny"), config("sam2_nano")
seen = []

def build(**keys):
    before = GlobalHydra.instance().hydra
    model = sam2_model.build_sam2(**keys)
    assert GlobalHydra.instance().hydra is before, "Hydra's global state changed"
    assert model.image_size == 64
    assert model.sam_mask_decoder.dynamic_multimask_via_stability
    return model

@hydra.main(version_base="1.3", config_path=".", config_name="job")
def main(cfg):
    seen.append(cfg.number)
    if ORDER != "after":
        build(**TINY)
        build(**NANO)
    assert compose("job", ["number=5"]).number == 5, "the script's own config folder is no longer found"

ORDER = sys.argv.pop(1)
if ORDER == "sam2_first":
    import sam2
    mine = build(**TINY)
    build(**NANO)
    from sam2.build_sam import build_sam2
    official = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu")
    assert official.state_dict().keys() == mine.state_dict().keys()
else:
    if ORDER == "before":
        build(**NANO)
        build(**TINY)
        assert not GlobalHydra.instance().is_initialized()
    main()
    assert seen == ([1, 2] if "--multirun" in sys.argv else [0]), seen
    assert not GlobalHydra.instance().is_initialized()
    build(**TINY)
    build(**NANO)
print("done", ORDER)
"""


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(["sam2_first"], id="import_sam2_before_and_its_own_builder_after"),
        pytest.param(["before"], id="build_twice_then_main_then_build"),
        pytest.param(["inside"], id="build_inside_main_then_after", marks=pytest.mark.slow),
        pytest.param(["after"], id="build_after_main", marks=pytest.mark.slow),
        pytest.param(["inside", "--multirun", "number=1,2"], id="multirun", marks=pytest.mark.slow),
    ],
)
def test_sam2_and_hydra_in_every_order(order, tmp_path):
    (tmp_path / "job.py").write_text(TRAP)
    (tmp_path / "job.yaml").write_text("number: 0\n")
    done = run_python("job.py", *order, cwd=tmp_path, environment=child_environment(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"done {order[0]}" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# the same numbers as sam2's own transforms and predictor


def official_tiny(image_size: int) -> torch.nn.Module:
    """Build sam2.1 tiny by sam2's own, untouched builder."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    build_random("sam2_nano", 64)  # imports sam2 without starting Hydra
    GlobalHydra.instance().clear()
    with initialize_config_module("sam2", version_base="1.2"):
        from sam2.build_sam import build_sam2 as official_build_sam2

        override = f"++model.image_size={image_size}"
        return official_build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu", hydra_overrides_extra=[override])


@pytest.fixture(scope="module", params=[256, pytest.param(1024, marks=pytest.mark.slow)])
def tiny(request):
    """Random weights in our model and in the official one; a picture; our embeddings, and the predictor holding it."""
    image_size = request.param
    model = build_random("sam2.1_hiera_tiny", image_size)
    with torch.no_grad():
        model.no_mem_embed.normal_()  # large enough that leaving it out would show
    official = official_tiny(image_size)
    official.load_state_dict(model.state_dict())

    predictor = make_predictor(official)
    image_rgb = picture(200, 330)
    predictor.set_image(image_rgb)
    with torch.no_grad():
        embeddings = models.encode(model, models.preprocess(image_rgb, image_size)[None])
    return model, image_rgb, embeddings, predictor


def predict_ours(tiny, point_coords, point_labels, mask_inputs, multimask_output):
    model, image_rgb, embeddings, _ = tiny
    points = models.scale_points(torch.tensor(point_coords), image_rgb.shape[:2], model.image_size)
    labels = torch.tensor([point_labels], dtype=torch.int32)
    with torch.no_grad():
        return models.decode(model, embeddings, torch.tensor([0]), points[None], labels, mask_inputs, multimask_output)[
            :3
        ]


POINTS, BOX = [[40.5, 61.0], [200.0, 150.0], [329.0, 0.0]], [30.0, 20.0, 250.0, 180.5]


@pytest.mark.parametrize("prompt", ["point", "points", "box", "box_and_points", "mask_and_point", "mask_and_box"])
@pytest.mark.parametrize("multimask_output", [True, False])
def test_logits_are_those_of_the_official_predictor(tiny, prompt, multimask_output):
    model, image_rgb, _, predictor = tiny
    points = POINTS if "points" in prompt else POINTS[:1] if "point" in prompt else []
    labels = [1, 0, 1][: len(points)]
    has_box = "box" in prompt
    mask_inputs = None
    if "mask" in prompt:
        side = model.image_size // 4
        mask_inputs = 10 * torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(1))
    masks, ious, low_res = predictor.predict(
        point_coords=np.array(points, np.float32) if points else None,
        point_labels=np.array(labels) if points else None,
        box=np.array(BOX) if has_box else None,
        mask_input=None if mask_inputs is None else mask_inputs[0].numpy(),
        multimask_output=multimask_output,
        return_logits=True,
    )
    corners = [BOX[:2], BOX[2:]] if has_box else []
    our_labels = [2, 3] * has_box + labels
    low_res_masks, iou_predictions, scores = predict_ours(
        tiny, corners + points, our_labels, mask_inputs, multimask_output
    )
    assert low_res_masks.shape == (1, 3 if multimask_output else 1, model.image_size // 4, model.image_size // 4)
    assert low_res_masks.std() > 0.02  # not all the same
    np.testing.assert_allclose(low_res_masks[0].clamp(-32, 32).numpy(), low_res, atol=1e-4, rtol=0)
    np.testing.assert_allclose(iou_predictions[0].numpy(), ious, atol=1e-4, rtol=0)
    full_size = models.upscale_masks(low_res_masks, image_rgb.shape[:2])
    np.testing.assert_allclose(full_size[0].numpy(), masks, atol=1e-4, rtol=0)
    assert scores.shape == (1, 1)


def test_prompts_move_the_logits(tiny):
    """The comparison above would mean nothing if every prompt gave the same mask."""
    side = tiny[0].image_size // 4
    clicked = predict_ours(tiny, POINTS[:1], [1], None, True)[0]
    for other in (
        predict_ours(tiny, POINTS[1:2], [1], None, True)[0],
        predict_ours(tiny, POINTS[:1], [0], None, True)[0],
        predict_ours(tiny, [BOX[:2], BOX[2:]], [2, 3], None, True)[0],
        predict_ours(tiny, POINTS[:1], [1], torch.full((1, 1, side, side), 5.0), True)[0],
        predict_ours(tiny, [*POINTS[:1], [0.0, 0.0]], [1, -1], None, True)[0],  # padding moves logits: never pad
    ):
        assert (clicked - other).abs().max() > 1e-3


def test_decoder_falls_back_to_the_best_of_three_in_eval_mode_as_official(tiny, monkeypatch):
    model, _, _, predictor = tiny
    decoder, official_decoder = model.sam_mask_decoder, predictor.model.sam_mask_decoder
    for key in ("via_stability", "stability_delta", "stability_thresh"):
        assert getattr(decoder, f"dynamic_multimask_{key}") == getattr(official_decoder, f"dynamic_multimask_{key}")
    box = [BOX[:2], BOX[2:]], [2, 3], None, False
    with_fallback = predict_ours(tiny, *box)[0]
    monkeypatch.setattr(decoder, "dynamic_multimask_via_stability", False)
    without = predict_ours(tiny, *box)[0]
    assert (with_fallback - without).abs().max() > 0.01
    monkeypatch.undo()
    decoder.train()  # in training the single mask itself learns
    try:
        assert torch.equal(predict_ours(tiny, *box)[0], without)
    finally:
        decoder.eval()


def test_another_image_size_is_the_same_model_with_the_same_weights(tiny):
    model, _, _, predictor = tiny
    assert not model.training
    other = build_random("sam2.1_hiera_tiny", 96)
    other.load_state_dict(model.state_dict())
    assert (other.image_size, other.sam_prompt_encoder.input_image_size) == (96, (96, 96))
    with torch.no_grad():
        embeddings = models.encode(other, torch.zeros(2, 3, 96, 96))
    assert embeddings.image_embeddings.shape == (2, 256, 6, 6)
    assert [tuple(f.shape) for f in embeddings.high_res_features] == [(2, 32, 24, 24), (2, 64, 12, 12)]
    with pytest.raises(AssertionError):
        models.encode(other, torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize("name", ["sam2_nano", "sam2.1_hiera_tiny"])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_encoding_in_two_parts_is_sam2s_own_bit_for_bit(name, is_training, precision):
    """And no gradient of what trains by default is lost between the parts."""
    model = build_random(name, 128).train(is_training)
    with torch.no_grad():
        model.no_mem_embed.normal_()
    models.freeze_except(model, ["prompt_encoder", "mask_decoder"])
    images = torch.stack([models.preprocess(picture(90, 120, seed), 128) for seed in range(2)])
    with torch.autocast("cpu", precision, enabled=precision is not None):
        maps = models.encode_frozen(model, images)
        assert not any(values.requires_grad for values in maps[:3])
        expected = model.forward_image(images)["backbone_fpn"]
        expected[2] = expected[2] + model.no_mem_embed.view(1, -1, 1, 1)
        for embeddings in (
            models.finish_embeddings(model, maps),
            models.finish_embeddings(model, models.project_high_res(model, maps)),
            models.encode(model, images),
        ):
            embedded = [*embeddings.high_res_features, embeddings.image_embeddings]
            for array, other in zip(embedded, expected, strict=True):
                assert array.dtype == other.dtype and torch.equal(array, other)
            sum(values.float().square().sum() for values in embedded).backward()
    still = {name for name, values in model.named_parameters() if values.requires_grad and values.grad is None}
    assert not {name for name in still if "conv_s" in name or "no_mem_embed" in name}


def test_neck_of_another_kind_is_refused(nano, monkeypatch):
    monkeypatch.setattr(nano.image_encoder.neck, "fpn_top_down_levels", [0, 1, 2, 3])
    with pytest.raises(ValueError, match="the model's neck has .*; must be .* as in all configs of SAM 2"):
        models.encode_frozen(nano, torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize("image_size", [0, -32, 250, 1000, 16])
def test_image_size_must_be_a_multiple_of_32(image_size):
    with pytest.raises(ValueError, match=f"model.image_size is {image_size}; must be a multiple of 32"):
        build_random("sam2_nano", image_size)


@pytest.mark.parametrize("height, width, image_size", [(100, 100, 256), (333, 517, 256), (37, 1500, 128), (1, 1, 32)])
def test_preprocess_and_scale_points_are_sam2s_own_transforms(height, width, image_size):
    build_random("sam2_nano", 32)
    from sam2.utils.transforms import SAM2Transforms

    transforms = SAM2Transforms(image_size, mask_threshold=0.0)
    image_rgb = picture(height, width)
    image = models.preprocess(image_rgb, image_size)
    assert image.shape == (3, image_size, image_size) and image.dtype == torch.float32
    torch.testing.assert_close(image, transforms(image_rgb), atol=1e-6, rtol=0)
    mirrored = models.preprocess(image_rgb[:, ::-1], image_size)  # negative strides, as after a flip
    torch.testing.assert_close(mirrored, transforms(image_rgb[:, ::-1].copy()), atol=1e-6, rtol=0)

    points = torch.tensor([[[0.0, 0.0], [width - 1, height - 1]], [[width / 2, height / 3], [5, 7]]])
    expected = transforms.transform_coords(points, normalize=True, orig_hw=(height, width))
    torch.testing.assert_close(models.scale_points(points, (height, width), image_size), expected)
    assert points[0, 0].tolist() == [0, 0] and points[1, 1].tolist() == [5, 7]  # left as they were


@pytest.mark.gpu
@pytest.mark.parametrize("height, width", [(333, 517), (37, 1500), (4500, 300), (1, 1)])
def test_a_gpu_resizes_pictures_up_to_rounding_as_the_cpu_does(height, width):
    """The third is too high for the kernel of CUDA: the CPU resizes it."""
    image_rgb = picture(height, width)
    image = models.preprocess(image_rgb, 64, "cuda")
    assert image.device.type == "cuda"
    torch.testing.assert_close(image.cpu(), models.preprocess(image_rgb, 64), atol=1e-5, rtol=0)


def test_half_precision_logits_are_upscaled_in_fp32():
    low_res_masks = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    masks = models.upscale_masks(low_res_masks, (17, 29))
    assert masks.dtype == torch.float32 and masks.shape == (2, 3, 17, 29)
    expected = torch.nn.functional.interpolate(low_res_masks.double(), (17, 29), mode="bilinear").float()
    torch.testing.assert_close(masks, expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# many pictures, many objects


@pytest.fixture(scope="module")
def nano():
    return build_random("sam2_nano", 128)


def object_prompts(num_objects: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    point_coords = 128 * torch.rand(num_objects, 2, 2, generator=generator)
    point_labels = torch.randint(0, 2, (num_objects, 2), generator=generator, dtype=torch.int32)
    mask_inputs = 8 * torch.randn(num_objects, 1, 32, 32, generator=generator)
    return point_coords, point_labels, mask_inputs


IMAGE_INDEX = torch.tensor([2, 0, 0, 1, 2, 2, 0])  # of seven objects in three pictures, in no order


@pytest.mark.parametrize("with_masks", [True, False])
def test_a_batch_equals_its_pictures_one_at_a_time(nano, with_masks, monkeypatch):
    # a ReLU at its kink would turn the last bit of a sum into a jump of the gradient
    monkeypatch.setattr(torch.nn.ReLU, "forward", lambda self, x: torch.nn.functional.gelu(x))
    images = torch.stack([models.preprocess(picture(90, 120, seed), 128) for seed in range(3)])
    point_coords, point_labels, mask_inputs = object_prompts(len(IMAGE_INDEX))
    mask_inputs = mask_inputs if with_masks else None

    def predict(embeddings, image_index, chosen):
        masks = None if mask_inputs is None else mask_inputs[chosen]
        return models.decode(nano, embeddings, image_index, point_coords[chosen], point_labels[chosen], masks, True)

    def gradients(outputs):
        nano.zero_grad()
        (sum((part**2).mean((0, 1)).sum() * len(part) for part in outputs) / 100).backward()
        return {name: p.grad.clone() for name, p in nano.named_parameters() if p.grad is not None}

    embeddings = models.encode(nano, images)
    together = predict(embeddings, IMAGE_INDEX, torch.arange(7))
    together_gradients = gradients(together)
    single_gradients = {}
    for number in range(7):
        image_index = IMAGE_INDEX[number : number + 1]
        alone = predict(models.encode(nano, images[image_index]), torch.tensor([0]), torch.tensor([number]))
        for part, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(part[0], whole[number], atol=1e-4, rtol=0)
        for name, gradient in gradients(alone).items():
            single_gradients[name] = single_gradients.get(name, 0) + gradient
    assert together_gradients.keys() == single_gradients.keys()
    largest = max(gradient.abs().max() for gradient in together_gradients.values())
    for name, gradient in together_gradients.items():
        torch.testing.assert_close(
            gradient, single_gradients[name], atol=1e-5 * max(1, largest.item()), rtol=0, msg=name
        )

    # the popular tutorial's form gives every object the last picture's high-resolution features
    last = models.Embeddings(embeddings.image_embeddings, [f[-1:].expand_as(f) for f in embeddings.high_res_features])
    wrong = predict(last, IMAGE_INDEX, torch.arange(7))[0]
    difference = (wrong - together[0]).abs().amax((1, 2, 3))
    assert (difference[IMAGE_INDEX != 2] > 1e-2).all() and (difference[IMAGE_INDEX == 2] == 0).all()


def test_many_objects_on_one_picture_equal_one_at_a_time(nano):
    point_coords, point_labels, mask_inputs = object_prompts(3)
    with torch.no_grad():
        embeddings = models.encode(nano, models.preprocess(picture(90, 120), 128)[None])
        zeros = torch.zeros(3, dtype=torch.long)
        together = models.decode(nano, embeddings, zeros, point_coords, point_labels, mask_inputs, False)
        for k in range(3):
            row = slice(k, k + 1)
            prompt = point_coords[row], point_labels[row], mask_inputs[row]
            alone = models.decode(nano, embeddings, zeros[row], *prompt, False)
            for part, whole in zip(alone, together, strict=True):
                torch.testing.assert_close(part[0], whole[k], atol=1e-4, rtol=0)
    assert (together[0][0] - together[0][1]).abs().max() > 1e-2


def test_conv_trunk_has_four_strides_and_a_batch_of_one_is_the_same():
    trunk = models.ConvTrunk(channels=(16, 32, 48, 64), blocks=(1, 2, 1, 1)).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, alone = trunk(images), trunk(images[1:])
    assert [tuple(f.shape) for f in features] == [(2, 16, 16, 16), (2, 32, 8, 8), (2, 48, 4, 4), (2, 64, 2, 2)]
    assert trunk.channel_list == [64, 48, 32, 16]
    for whole, part in zip(features, alone, strict=True):
        torch.testing.assert_close(whole[1:], part)


# ---------------------------------------------------------------------------------------------------------------------
# every model of configs/sam2/model: architectures on the meta device, which takes no memory and no time


@pytest.fixture(scope="module")
def state_dicts() -> dict[str, dict]:
    """Shapes of every model's weights by name, and the models' parameter counts under "count <name>"."""
    linspace, numbers = torch.linspace, {}
    torch.linspace = lambda *args, **keys: linspace(*args, **keys | {"device": "cpu"})  # Hiera reads its values
    try:
        for name in NAMES:
            config = model_config(name)["config"]
            with torch.device("meta"), models._without_cuda():  # else sam2 moves what has no values
                model = models._build_nano(256) if config is None else models._build_official(config, 1024)
            numbers[name] = model.state_dict()
            numbers[f"count {name}"] = sum(p.numel() for p in model.parameters())
    finally:
        torch.linspace = linspace
    return numbers


@pytest.mark.parametrize("name", NAMES)
def test_every_models_weights_are_recognised(state_dicts, name):
    assert models.recognise_weights(state_dicts[name]) == name


def test_other_weights_are_recognised_as_nothing(state_dicts):
    tiny = state_dicts["sam2.1_hiera_tiny"]
    assert models.recognise_weights({}) is None
    assert models.recognise_weights({"conv1.weight": torch.zeros(64, 3, 7, 7)}) is None
    assert models.recognise_weights({key: value for key, value in tiny.items() if "image_encoder" not in key}) is None
    assert models.recognise_weights({f"sam2_model.{key}": value for key, value in tiny.items()}) is None  # other forks'
    assert models.recognise_weights({key: value for key, value in tiny.items() if ".blocks.3." not in key}) is None


@pytest.mark.parametrize("name", NAMES)
def test_model_files_hold_build_sam2s_keywords_and_what_their_header_says(state_dicts, name):
    config = model_config(name)
    others = {"device", "fast_decoder"} | ({"automatic"} if name != "sam2_nano" else set())
    assert config.keys() == inspect.signature(models.build_sam2).parameters.keys() - others
    assert config["name"] == name and config["checkpoint"] == "auto"
    text = (ROOT / "configs" / "sam2" / "model" / f"{name}.yaml").read_text()
    millions = f"{state_dicts[f'count {name}'] / 1e6 - 0.05:.1f}"  # cut, not rounded, as SAM 2's README has them
    rounded = f"{state_dicts[f'count {name}'] / 1e6:.1f}"
    header = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert any(f" {number.removesuffix('.0')} M parameters" in header for number in (millions, rounded)), header


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sam2_nano"])
def test_official_model_files_are_what_sam2_publishes(state_dicts, name):
    from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES

    config = model_config(name)
    published = HF_MODEL_ID_TO_FILENAMES["facebook/" + name.replace("_", "-")]
    assert (config["config"], config["url"].rsplit("/", 1)[1]) == published
    folder = "092824" if name.startswith("sam2.1") else "072824"
    assert config["url"] == f"https://dl.fbaipublicfiles.com/segment_anything_2/{folder}/{published[1]}"
    package = Path(importlib.util.find_spec("sam2").submodule_search_locations[0])
    packaged = yaml.safe_load((package / config["config"]).read_text())
    assert packaged["model"]["image_size"] == config["image_size"] == 1024
    assert "automatic" not in config  # so that the defaults of AutomaticSettings count, which are sam2's own


def test_the_bundled_nano_is_small_and_is_the_default(state_dicts):
    assert 5e6 <= state_dicts["count sam2_nano"] <= 9e6
    assert not [key for key in state_dicts["sam2_nano"] if key.startswith(("memory_", "obj_ptr", "mask_downsample"))]
    path = ROOT / "checkpoints" / "sam2_nano.pt"
    assert path.stat().st_size < 16e6
    weights = load_checkpoint(path)["model"]
    assert {value.dtype for value in weights.values()} == {torch.float16}
    loaded = models.build_sam2(**model_config("sam2_nano"), device="cpu").state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in weights.items())


# ---------------------------------------------------------------------------------------------------------------------
# where weights come from


@pytest.mark.parametrize(
    "name, stored",
    [
        ("sam2.1_hiera_tiny", "sam2_hiera_tiny"),
        ("sam2_hiera_small", "sam2.1_hiera_small"),
        ("sam2.1_hiera_tiny", "sam2.1_hiera_large"),
        ("sam2_nano", "sam2.1_hiera_tiny"),
        ("sam2_hiera_large", "sam2_nano"),
    ],
)
def test_weights_of_another_model_are_named(state_dicts, name, stored):
    model = torch.nn.Module()
    model.state_dict = lambda: state_dicts[name]
    message = f"checkpoint some/file.pt holds weights of {stored}, but model is {name}; use model={stored} "
    with pytest.raises(ValueError, match=re.escape(message)):
        models._load_weights(model, state_dicts[stored], name, Path("some/file.pt"))


def test_damaged_and_foreign_weights_say_what_does_not_fit(tmp_path, nano):
    def load(state):
        save_checkpoint(tmp_path / "file.pt", state)
        return models.build_sam2(**model_config("sam2_nano", checkpoint=str(tmp_path / "file.pt")), device="cpu")

    weights = dict(nano.state_dict())
    assert load({"model": weights}).image_size == 256  # the geometry is not in the weights
    removed = weights.pop("no_mem_embed")
    with pytest.raises(ValueError, match=r"looks like sam2_nano but does not fit it.*\(1 entries missing.*no_mem"):
        load({"model": weights})
    with pytest.raises(ValueError, match=r"0 entries missing, 0 too many, 1 of another shape, such as no_mem_embed"):
        load({"model": weights | {"no_mem_embed": removed[..., :64].clone()}})
    with pytest.raises(ValueError, match="0 entries missing, 1 too many"):
        load({"model": weights | {"no_mem_embed": removed, "extra": torch.zeros(1)}})
    with pytest.raises(ValueError, match="no SAM 2 model that this toolkit knows; give a checkpoint of sam2_nano"):
        load({"model": {"fc.weight": torch.zeros(2, 2)}})
    weights["no_mem_embed"] = removed
    for state in (weights, {"state_dict": weights}, {"model": {f"module.{name}": w for name, w in weights.items()}}):
        assert load(state).image_size == 256  # wrapped as other programs do
    with pytest.raises(ValueError, match="file.pt holds no weights; its entries are model"):
        load({"model": None})


@pytest.mark.parametrize("name", ["sam2_nano", "sam2.1_hiera_tiny"])
def test_a_model_for_another_device_puts_nothing_on_the_first_gpu(name, monkeypatch):
    """sam2 fills caches of positions on a CUDA device that it sees, for device=cpu and device=cuda:1 too."""

    def is_available():
        return True

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    model = models.build_sam2(**read_option("sam2", "model", name) | {"checkpoint": "none"}, device=torch.device("cpu"))
    assert torch.cuda.is_available is is_available
    assert not model.image_encoder.neck.position_encoding.cache


def test_random_weights_only_on_request_and_said_so(capsys):
    model = build_random("sam2_nano", 64)
    assert "random weights" in capsys.readouterr().out
    assert not model.training and model.device.type == "cpu"
    assert not torch.equal(model.no_mem_embed, build_random("sam2_nano", 64, seed=1).no_mem_embed)


URL = "https://example.org/folder/weights.pt"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty repository far from where the user stands."""
    monkeypatch.setattr(models, "REPOSITORY", tmp_path / "repository")
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    return tmp_path / "repository"


class Response:
    """What urlopen gives: `blocks` one read at a time; an exception among them is raised."""

    def __init__(self, blocks, content_length):
        self.blocks, self.headers = list(blocks), {"Content-Length": content_length}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def read(self, size):
        block = self.blocks.pop(0) if self.blocks else b""
        if isinstance(block, BaseException):
            raise block
        return block


def set_network(monkeypatch, answer):
    """Let urlopen raise or return `answer`; returns the addresses that were asked for."""
    asked = []

    def urlopen(url, **keys):
        asked.append(url)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(models.urllib.request, "urlopen", urlopen)
    return asked


def test_official_weights_are_downloaded_once_below_the_repository(repository, monkeypatch):
    asked = set_network(monkeypatch, Response([b"abc", b"defg"], "7"))
    path = models.find_checkpoint("some_model", URL, "auto")
    assert path == repository / "checkpoints" / "weights.pt" and path.read_bytes() == b"abcdefg"
    assert models.find_checkpoint("some_model", URL, "auto") == path
    assert asked == [URL] and [file.name for file in path.parent.iterdir()] == ["weights.pt"]


def test_a_download_without_a_length_is_taken_as_it_ends(repository, monkeypatch):
    set_network(monkeypatch, Response([b"abc"], None))
    assert models.find_checkpoint("some_model", URL, "auto").read_bytes() == b"abc"


@pytest.mark.parametrize(
    "answer",
    [
        urllib.error.URLError("Name or service not known"),
        urllib.error.HTTPError(URL, 404, "Not Found", None, None),
        TimeoutError("timed out"),
        Response([b"abc"], "7"),  # the line goes quiet
        Response([b"abc", ConnectionResetError("reset by peer")], "7"),
        Response([b"abc", http.client.IncompleteRead(b"")], None),
    ],
    ids=["no_network", "not_found", "timeout", "too_short", "reset", "incomplete"],
)
def test_a_failed_download_names_address_and_path_and_leaves_no_file(repository, monkeypatch, answer):
    set_network(monkeypatch, answer)
    with pytest.raises(ConnectionError) as error:
        models.find_checkpoint("some_model", URL, "auto")
    message = str(error.value)
    assert URL in message and str(repository / "checkpoints" / "weights.pt") in message and "\n" not in message
    assert list((repository / "checkpoints").iterdir()) == []


def test_an_interrupted_download_leaves_no_file(repository, monkeypatch):
    set_network(monkeypatch, Response([b"abc", KeyboardInterrupt()], "7"))
    with pytest.raises(KeyboardInterrupt):
        models.find_checkpoint("some_model", URL, "auto")
    assert list((repository / "checkpoints").iterdir()) == []


def test_bundled_weights_are_found_below_the_repository_and_never_asked_for(repository, monkeypatch):
    asked = set_network(monkeypatch, AssertionError("no download"))
    with pytest.raises(FileNotFoundError, match=r"sam2_nano\.pt, the bundled weights of sam2_nano, is missing"):
        models.find_checkpoint("sam2_nano", None, "auto")
    (repository / "checkpoints").mkdir(parents=True)
    (repository / "checkpoints" / "sam2_nano.pt").write_bytes(b"x")
    assert models.find_checkpoint("sam2_nano", None, "auto") == repository / "checkpoints" / "sam2_nano.pt"
    assert asked == []


def test_a_given_path_is_relative_to_where_the_user_stands(repository, monkeypatch):
    asked = set_network(monkeypatch, AssertionError("no download"))
    (repository / "checkpoints").mkdir(parents=True)
    (repository / "checkpoints" / "mine.pt").write_bytes(b"x")
    Path("here.pt").write_bytes(b"x")
    assert models.find_checkpoint("sam2_nano", URL, "here.pt").resolve() == Path.cwd() / "here.pt"
    for given in ("mine.pt", "checkpoints/mine.pt", ".", None, ""):  # null in YAML is None
        with pytest.raises(FileNotFoundError, match="model.checkpoint .* is not a file .*auto .* or none"):
            models.find_checkpoint("sam2_nano", URL, given)
    assert asked == []


# ---------------------------------------------------------------------------------------------------------------------
# trainable parts


@pytest.fixture(scope="module")
def small_tiny():
    return build_random("sam2.1_hiera_tiny", 64)


NOT_IN_THE_TUTORIAL = {"sam_mask_decoder.conv_s0", "sam_mask_decoder.conv_s1", "no_mem_embed"}


@pytest.mark.parametrize("fixture", ["nano", "small_tiny"])
@pytest.mark.parametrize(
    "trainable, prefixes",
    [
        (["prompt_encoder"], ["sam_prompt_encoder"]),
        (["mask_decoder"], ["sam_mask_decoder", "no_mem_embed"]),
        (["neck"], ["image_encoder.neck"]),
        (["image_encoder"], ["image_encoder"]),
        (
            ["prompt_encoder", "mask_decoder", "neck"],
            ["sam_prompt_encoder", "sam_mask_decoder", "no_mem_embed", "image_encoder.neck"],
        ),
    ],
)
def test_exactly_the_named_parts_are_trainable(request, fixture, trainable, prefixes):
    model = request.getfixturevalue(fixture)
    parameters = models.freeze_except(model, trainable)
    expected = [
        name
        for name, _ in model.named_parameters()
        if any(name.split(".")[: len(prefix.split("."))] == prefix.split(".") for prefix in prefixes)
    ]
    assert list(parameters) == expected and expected
    assert [name for name, p in model.named_parameters() if p.requires_grad] == expected
    assert all(p is dict(model.named_parameters())[name] for name, p in parameters.items())
    if "mask_decoder" in trainable:  # the popular tutorial never trains these
        for prefix in NOT_IN_THE_TUTORIAL:
            assert any(name.startswith(prefix) for name in expected)
    model.requires_grad_(True)


@pytest.mark.parametrize("num_last", [1, 2, 3])
def test_the_last_blocks_of_both_trunks(nano, small_tiny, num_last):
    chosen = models.freeze_except(nano, [{"trunk_last_n": num_last}]).keys()
    places = [(stage, block) for stage, count in enumerate((2, 2, 3, 1)) for block in range(count)][-num_last:]
    layers = ("norm", "conv1", "conv2")
    expected = {
        f"image_encoder.trunk.stages.{stage}.{block}.{layer}.{kind}"
        for stage, block in places
        for layer in layers
        for kind in ("weight", "bias")
    }
    assert chosen == expected
    nano.requires_grad_(True)

    chosen = {name.split(".")[3] for name in models.freeze_except(small_tiny, [{"trunk_last_n": num_last}, "neck"])}
    blocks = {number for number in chosen if number.isdigit() and int(number) >= 4}  # necks count from 0 to 3
    assert blocks == {str(number) for number in range(12 - num_last, 12)}
    trunk = [name for name, p in small_tiny.named_parameters() if p.requires_grad and ".trunk." in name]
    assert all(name.startswith(tuple(f"image_encoder.trunk.blocks.{number}." for number in blocks)) for name in trunk)
    small_tiny.requires_grad_(True)


@pytest.mark.parametrize(
    "trainable, message",
    [
        (["memory"], "train.trainable has memory: still images never run the memory modules"),
        (["decoder"], r"train.trainable has 'decoder'; must be among prompt_encoder, mask_decoder, neck"),
        ([{"trunk_first_n": 2}], "train.trainable has {'trunk_first_n': 2}; must be among"),
        ([{"trunk_last_n": 0}], "trunk_last_n: 0; must be 1 to 8"),
        ([{"trunk_last_n": 9}], "trunk_last_n: 9; must be 1 to 8"),
        ([{"trunk_last_n": "2"}], "trunk_last_n: 2; must be 1 to 8"),
        ([{"trunk_last_n": True}], "trunk_last_n: True; must be 1 to 8"),
        ([], r"train.trainable is \[\]; must be a list such as"),
        ("mask_decoder", "train.trainable is 'mask_decoder'; must be a list such as"),
        (None, "train.trainable is None; must be a list such as"),
    ],
)
def test_parts_that_make_no_sense_are_refused_and_nothing_is_frozen(nano, trainable, message):
    with pytest.raises(ValueError, match=message):
        models.freeze_except(nano, trainable)
    assert all(p.requires_grad for p in nano.parameters())


def test_gradients_are_the_same_every_time_in_several_threads():
    """Indexing with [] adds the gradients of an image's objects in whatever order threads come."""
    model = build_random("sam2_nano", 256)
    with torch.no_grad():
        image_embeddings, features = models.encode(model, torch.randn(2, 3, 256, 256))
    features = [feature.requires_grad_() for feature in features]
    coords, labels = torch.rand(32, 1, 2) * 256, torch.ones(32, 1, dtype=torch.int32)
    image_index = torch.arange(32) % 2
    num_threads, first = torch.get_num_threads(), None
    torch.set_num_threads(4)
    try:
        for _ in range(6):
            embeddings = models.Embeddings(image_embeddings, features)
            masks, *_ = models.decode(model, embeddings, image_index, coords, labels, None, multimask_output=True)
            grads = torch.autograd.grad(masks.square().sum(), features)
            first = first or grads
            assert all(torch.equal(grad, other) for grad, other in zip(first, grads, strict=True))
    finally:
        torch.set_num_threads(num_threads)
