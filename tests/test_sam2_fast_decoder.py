"""utils/sam2/fast_decoder.py: the same function as sam2's own MaskDecoder, values and gradients, in float64 to 1e-9."""

import pytest
import torch
from test_sam2_model import model_config

from utils.sam2 import fast_decoder
from utils.sam2.fast_decoder import decode_fast, to_pixels
from utils.sam2.model import (
    FrozenMaps,
    build_sam2,
    choose_masks,
    decode,
    finish_embeddings,
    freeze_except,
    project_high_res,
)

UNSEEN = "cross_attn_token_to_image.k_proj.bias", "final_attn_token_to_image.k_proj.bias"  # no mask depends on them
IMAGE_INDEX = torch.tensor([3, 0, 0, 1, 3, 3, 0])  # seven objects in four images, in no order; none in the third


@pytest.fixture(scope="module", params=["sam2_nano", "sam2.1_hiera_tiny"])
def model(request):
    """A model of random weights in float64, whose position code of pixels sam2 would only compute in float32."""
    torch.manual_seed(0)
    config = model_config(request.param, checkpoint="none", image_size=96)
    model = build_sam2(**config, device="cpu", fast_decoder=True)
    pixel_pe = model.sam_prompt_encoder.get_dense_pe().double()
    model.sam_prompt_encoder.get_dense_pe = lambda: pixel_pe
    freeze_except(model, ["prompt_encoder", "mask_decoder"])
    return model.double()


def random_inputs(model: torch.nn.Module, num_images: int, num_objects: int, num_tokens: int, has_masks: bool) -> dict:
    """Embeddings of images and prompts, all with gradient."""
    generator = torch.Generator().manual_seed(1)
    channels, side = model.hidden_dim, model.image_size // 16

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "image_embeddings": random(num_images, channels, side, side),
        "stride_4": random(num_images, channels // 8, 4 * side, 4 * side),
        "stride_8": random(num_images, channels // 4, 2 * side, 2 * side),
        "sparse_embeddings": random(num_objects, num_tokens, channels),
        "dense_embeddings": random(num_objects if has_masks else 1, channels, side, side),
    }


def run(model, inputs: dict, image_index: torch.Tensor, multimask_output: bool, fast: bool):
    """Decode by decode_fast, or by sam2's decoder: outputs, and gradients of all inputs and parameters by name."""
    model.zero_grad(set_to_none=True)
    for tensor in inputs.values():
        tensor.grad = None
    dense = inputs["dense_embeddings"]
    is_shared = len(dense) == 1
    dense = dense.expand(len(image_index), -1, -1, -1)
    high_res_features = [inputs["stride_4"], inputs["stride_8"]]
    if fast:
        *of_masks, scores = decode_fast(
            model, inputs["image_embeddings"], high_res_features, image_index,
            model.sam_prompt_encoder.get_dense_pe(), inputs["sparse_embeddings"], dense, is_shared,
        )  # fmt: skip
        outputs = *choose_masks(model.sam_mask_decoder, *of_masks, multimask_output)[:2], scores
    else:
        masks, ious, _, scores = model.sam_mask_decoder(
            image_embeddings=inputs["image_embeddings"][image_index],
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=inputs["sparse_embeddings"],
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
            repeat_image=False,
            high_res_features=[features[image_index] for features in high_res_features],
        )
        outputs = masks, ious, scores
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in outputs]
    if torch.is_grad_enabled():
        sum((tensor * weight).sum() for tensor, weight in zip(outputs, weights, strict=True)).backward()
    gradients = {name: tensor.grad for name, tensor in [*inputs.items(), *model.named_parameters()]}
    return outputs, {name: gradient for name, gradient in gradients.items() if gradient is not None}


def assert_close(computed: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """Compare to 1e-9 of the largest value."""
    assert computed.shape == expected.shape, name
    assert (computed - expected).abs().max() <= 1e-9 * expected.abs().max(), name


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("has_masks, num_tokens", [(False, 2), (True, 2), (False, 11), (True, 1)])
@pytest.mark.parametrize("image_index", [torch.zeros(5, dtype=torch.long), IMAGE_INDEX, torch.tensor([0])])
def test_masks_and_gradients_are_those_of_sam2s_decoder(
    model, image_index, has_masks, num_tokens, multimask_output, is_training
):
    inputs = random_inputs(model, int(image_index.max()) + 1, len(image_index), num_tokens, has_masks)
    model.train(is_training)
    expected, expected_gradients = run(model, inputs, image_index, multimask_output, fast=False)
    fast, gradients = run(model, inputs, image_index, multimask_output, fast=True)
    for ours, other in zip(fast, expected, strict=True):
        assert_close(ours, other)
    unseen = {name for name in expected_gradients if name.endswith(UNSEEN)}
    assert len(unseen) == 3 and gradients.keys() == expected_gradients.keys() - unseen
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-9 * largest, name
    for name in unseen:  # sam2's gradient of them is rounding alone
        assert expected_gradients[name].abs().max() <= 1e-12 * largest


@pytest.mark.parametrize("most_objects", [1, 3])
def test_without_gradient_few_objects_at_a_time_give_the_same(model, most_objects, monkeypatch):
    num_objects = 9
    image_index = torch.arange(num_objects) % 2  # two images in turn
    monkeypatch.setattr(fast_decoder, "PIXELS_ON_CPU", most_objects * 6 * 6)
    calls = []
    decode_image = fast_decoder._decode_image
    monkeypatch.setattr(fast_decoder, "_decode_image", lambda *args: calls.append(len(args[3])) or decode_image(*args))
    inputs = random_inputs(model, 2, num_objects, 2, has_masks=True)
    model.eval()
    with torch.no_grad():
        expected = run(model, inputs, image_index, True, fast=False)[0]
        fast = run(model, inputs, image_index, True, fast=True)[0]
    for ours, other in zip(fast, expected, strict=True):
        assert_close(ours, other)
    assert calls == {1: [1] * 9, 3: [3, 2, 3, 1]}[most_objects]


def test_an_object_gets_nothing_from_another_image(model):
    """The comparisons above would mean nothing if all images gave the same masks."""
    inputs = random_inputs(model, 4, len(IMAGE_INDEX), 2, has_masks=False)
    model.train()
    before = run(model, inputs, IMAGE_INDEX, True, fast=True)[0][0]
    for name in ("image_embeddings", "stride_4", "stride_8"):
        changed = inputs | {name: torch.cat([inputs[name][:3], -inputs[name][3:]]).detach().requires_grad_()}
        after = run(model, changed, IMAGE_INDEX, True, fast=True)[0][0]
        is_changed = (after != before).flatten(1).any(1)
        assert is_changed.equal(IMAGE_INDEX == 3), name


def test_fine_maps_through_one_convolution_are_those_through_two(model):
    channels, side = model.image_encoder.trunk.channel_list, model.image_size
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, channels[3], side // 4, side // 4), (2, channels[2], side // 8, side // 8), (2, 1, 1, 1)]
    maps = FrozenMaps(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes), False)
    seen = []
    for fast in (False, True):
        model.zero_grad(set_to_none=True)
        projected = project_high_res(model, maps, at_once=fast)
        (projected.stride_4.sin().sum() + projected.stride_8.sin().sum()).backward()
        decoder = model.sam_mask_decoder
        parameters = [*decoder.conv_s0.parameters(), *decoder.conv_s1.parameters()]
        seen.append([projected.stride_4, projected.stride_8, *(parameter.grad for parameter in parameters)])
    for expected, computed in zip(*seen, strict=True):
        assert_close(computed, expected)


def test_a_decoder_of_another_kind_is_refused(model, monkeypatch):
    inputs = random_inputs(model, 1, 1, 2, has_masks=False)
    monkeypatch.setattr(model.sam_mask_decoder, "pred_obj_scores", False)
    with pytest.raises(
        ValueError, match="lacks high-resolution features, object scores or four masks.*fast_decoder=false"
    ):
        run(model, inputs, torch.tensor([0]), True, fast=True)


def test_pixels_are_in_row_order():
    maps = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert torch.equal(to_pixels(maps)[1, 2 * 5 + 3], maps[1, :, 2, 3])


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("has_mask", [False, True])
def test_decode_uses_it_where_the_model_says_so(precision, has_mask):
    """From points to masks in float32, and in bfloat16 within what bfloat16 itself changes."""
    torch.manual_seed(0)
    config = model_config("sam2_nano", image_size=128)
    models = [build_sam2(**config, device="cpu", fast_decoder=fast) for fast in (False, True)]
    maps = FrozenMaps(torch.randn(2, 48, 32, 32), torch.randn(2, 96, 16, 16), torch.randn(2, 128, 8, 8), False)
    image_index = torch.tensor([1, 0, 1])
    points, labels = 128 * torch.rand(3, 2, 2), torch.tensor([[1, 0], [1, 1], [2, 3]], dtype=torch.int32)
    masks = 5 * torch.randn(3, 1, 32, 32) if has_mask else None
    with torch.no_grad():
        exact = decode(models[0], finish_embeddings(models[0], maps), image_index, points, labels, masks, True)
        with torch.autocast("cpu", precision, enabled=precision is not None):
            outputs = [
                decode(model, finish_embeddings(model, maps), image_index, points, labels, masks, True)
                for model in models
            ]
    for ours, official, truth in zip(outputs[1], outputs[0], exact, strict=True):
        limit = 1e-5 * truth.abs().max() if precision is None else 2 * (official.float() - truth).abs().max()
        assert (ours.float() - truth).abs().max() <= limit
    assert not torch.equal(outputs[1][0], outputs[0][0])  # it is another way: it rounds differently
