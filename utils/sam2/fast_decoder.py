"""SAM 2's mask decoder computed in another order, on its own weights: the same masks and gradients, less work.

`decode` of utils/sam2/model.py runs sam2's own MaskDecoder; with fast_decoder=true it runs `decode_fast`. In exact
arithmetic both are the same function. In float32 they round differently, by 1e-6 of the largest logit, hence the
switch; a gradient can jump where rounding moves a unit of an MLP across its ReLU's kink. "auto" is on where it was
measured to be faster, on CPUs: on a GPU, images are decoded one after another, and no fused attention kernel is used.
In training, on 2 cores, with 1 / 3 / 9 points an object, hiera_tiny at 1024 px takes 0.53 / 0.60 / 0.66 of the time of
sam2's, the nano at 256 px 0.85 / 0.98 / 1.13, so that it loses a little where clicks are many.
What is saved, for O objects of one image with T tokens each (8 for one click), N = (S/16)**2 pixels and C channels:

* Until the first layer has written to them, an image's pixels are the same for all its objects (without mask prompts):
  they are kept once, not O times.
* A few tokens attend to thousands of pixels. sam2 projects every pixel, then compares it with every token; here the
  projection is applied to the tokens instead, q.(W k) = (W'q).k, and to the weighted mean of the pixels, sum(a W v) =
  W sum(a v). A pair of attentions then costs 4 heads T N C multiplications for each object instead of 2 N C C: half of
  them for one click and C = 256, as many for nine clicks, or for one with C = 128.
* Upscaling by transposed convolutions of kernel and stride 2 is a matrix product for each pixel. The pixels stay in
  (pixel, channel) order to the end, and only the finished masks are put in image order.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from utils.run import choose_device
from utils.settings import Rule

DecoderSetting = Annotated[bool | str, Rule(lambda setting: setting in (True, False, "auto"), "auto, true or false")]
# Pixels decoded at once on a CPU where no gradient is wanted, 4 objects at 1024 px: what they need fits the caches.
PIXELS_ON_CPU = 4 * 64 * 64


def fix_decoder(config: dict) -> dict:
    """Put true or false in the place of a config's fast_decoder "auto": true on a CPU."""
    if "fast_decoder" not in config or config["fast_decoder"] != "auto":  # a run's is older than the key, or settled
        return config
    return config | {"fast_decoder": choose_device(config["device"]).type == "cpu"}


def decode_fast(
    model: nn.Module,
    image_embeddings: torch.Tensor,
    high_res_features: list[torch.Tensor],
    image_index: torch.Tensor,
    image_pe: torch.Tensor,
    sparse_embeddings: torch.Tensor,
    dense_embeddings: torch.Tensor,
    is_dense_shared: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict all four masks of O prompted objects; the images are decoded one after another.

    Args:
        model: SAM 2, with high-resolution features and object scores as in all its configs.
        image_embeddings: (B, C, S/16, S/16).
        high_res_features: (B, C/8, S/4, S/4) and (B, C/4, S/8, S/8).
        image_index: int64 (O,), which of the B images each object lies in; best on the CPU, which reads it.
        image_pe: (1, C, S/16, S/16), the position code of pixels.
        sparse_embeddings: (O, T', C) of points and boxes.
        dense_embeddings: (O, C, S/16, S/16) of mask prompts.
        is_dense_shared: there are no mask prompts, so dense_embeddings are the same for all objects.
    Returns:
        low_res_masks (O, 4, S/4, S/4) logits, iou_predictions (O, 4), mask_tokens (O, 4, C), object scores (O, 1).
    Source: sam2.modeling.sam.mask_decoder.MaskDecoder.predict_masks, whose function this is.
    """
    decoder = model.sam_mask_decoder
    if not (decoder.use_high_res_features and decoder.pred_obj_scores and decoder.num_mask_tokens == 4):
        raise ValueError(
            "the decoder lacks high-resolution features, object scores or four masks, which all configs of SAM 2 have; "
            "use fast_decoder=false"
        )
    pixel_pe = to_pixels(image_pe)  # (1, N, C)
    most_objects = len(image_index)
    if image_embeddings.device.type == "cpu" and not torch.is_grad_enabled():
        most_objects = max(1, PIXELS_ON_CPU // pixel_pe.shape[1])
    counts, order = [len(image_index)], None  # objects of each image; the order that brings them together
    if len(image_embeddings) > 1:
        image_index = image_index.cpu()
        counts = image_index.bincount(minlength=len(image_embeddings)).tolist()
        if (image_index.diff() < 0).any():
            order = image_index.argsort(stable=True).to(sparse_embeddings.device)
            sparse_embeddings = sparse_embeddings.index_select(0, order)
            dense_embeddings = dense_embeddings if is_dense_shared else dense_embeddings.index_select(0, order)
    assert len(counts) == len(image_embeddings), (counts, len(image_embeddings))
    parts, stop = [], 0
    for image, count in enumerate(counts):
        first, stop = stop, stop + count
        for start in range(first, stop, most_objects):  # objects of one image that are decoded together
            objects = slice(start, min(start + most_objects, stop))
            dense = dense_embeddings[:1] if is_dense_shared else dense_embeddings[objects]
            parts.append(
                _decode_image(
                    decoder,
                    image_embeddings[image : image + 1] + dense,
                    [features[image : image + 1] for features in high_res_features],
                    sparse_embeddings[objects],
                    pixel_pe,
                )
            )
    outputs = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    if order is not None:
        outputs = [output.index_select(0, order.argsort()) for output in outputs]
    return tuple(outputs)


def _decode_image(
    decoder: nn.Module,
    embeddings: torch.Tensor,
    high_res_features: list[torch.Tensor],
    sparse_embeddings: torch.Tensor,
    pixel_pe: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict all four masks of O objects of one image.

    Args:
        embeddings: (G, C, S/16, S/16) of image and mask prompts; G is 1 where it is the same for all objects, else O.
        high_res_features: (1, C/8, S/4, S/4) and (1, C/4, S/8, S/8).
        sparse_embeddings: (O, T', C).
        pixel_pe: (1, N, C).
    Returns:
        as `decode_fast`.
    """
    num_objects = len(sparse_embeddings)
    own_tokens = torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([own_tokens.expand(num_objects, -1, -1), sparse_embeddings], dim=1)  # (O, 6 + T', C)
    tokens, pixels = _transform(decoder.transformer, tokens, to_pixels(embeddings), pixel_pe)  # (O, T, C), (O, N, C)

    features = _upscale(decoder.output_upscaling, pixels, high_res_features, embeddings.shape[-2:])  # (O, 16 N, C/8)
    mask_tokens = tokens[:, 2:6]  # (O, 4, C)
    mlps = decoder.output_hypernetworks_mlps
    kernels = [mlp(token) for mlp, token in zip(mlps, mask_tokens.unbind(1), strict=True)]  # 4 of (O, C/8)
    logits = torch.stack(kernels, dim=1) @ features.transpose(1, 2)  # (O, 4, 16 N)
    height, width = embeddings.shape[-2:]
    logits = logits.reshape(num_objects, 4, height, width, 2, 2, 2, 2)  # two levels of (row, column) inside a pixel
    low_res_masks = logits.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(num_objects, 4, 4 * height, 4 * width)
    iou_predictions, scores = decoder.iou_prediction_head(tokens[:, 1]), decoder.pred_obj_score_head(tokens[:, 0])
    return low_res_masks, iou_predictions, mask_tokens, scores


def to_pixels(maps: torch.Tensor) -> torch.Tensor:
    """Put (B, C, H, W) in (pixel, channel) order: (B, H * W, C)."""
    return maps.flatten(2).transpose(1, 2).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# the two-way transformer


def _transform(
    transformer: nn.Module, tokens: torch.Tensor, pixels: torch.Tensor, pixel_pe: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let tokens (O, T, C) and pixels (G, N, C), G = 1 or O, attend to each other: (O, T, C) and (O, N, C)."""
    queries = tokens  # the tokens as they came serve as their position code
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            queries = layer.self_attn(queries, queries, queries)
        else:
            placed = queries + tokens
            queries = queries + layer.self_attn(placed, placed, queries)
        queries = layer.norm1(queries)
        placed_pixels = pixels + pixel_pe
        attention = layer.cross_attn_token_to_image
        queries = layer.norm2(queries + _attend_to_pixels(attention, queries + tokens, placed_pixels, pixels))
        queries = layer.norm3(queries + layer.mlp(queries))
        attention = layer.cross_attn_image_to_token
        pixels = layer.norm4(_add_from_tokens(attention, pixels, placed_pixels, queries + tokens, queries))
    attention = transformer.final_attn_token_to_image
    queries = queries + _attend_to_pixels(attention, queries + tokens, pixels + pixel_pe, pixels)
    return transformer.norm_final_attn(queries), pixels


def _split_heads(projected: torch.Tensor, num_heads: int, is_scaled: bool = False) -> torch.Tensor:
    """(O, T, heads * D) -> (O, heads, T, D); scaled, divided by the square root of D."""
    split = projected.unflatten(2, (num_heads, -1)).transpose(1, 2)
    return split * split.shape[-1] ** -0.5 if is_scaled else split


def _attend_to_pixels(
    attention: nn.Module, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Compute attention(queries, keys, values) for tokens (O, T, C) that look at pixels (G, N, C): (O, T, C)."""
    num_objects, num_tokens, num_channels = queries.shape
    heads = attention.num_heads
    q = _split_heads(attention.q_proj(queries), heads, is_scaled=True)  # (O, heads, T, D)
    # k_proj's bias would add the same to all pixels of a row, which the softmax takes away again: it gets no gradient
    probes = q @ attention.k_proj.weight.unflatten(0, (heads, -1))  # (O, heads, T, C)
    scores = probes.reshape(len(keys), -1, num_channels) @ keys.transpose(1, 2)  # (G, O/G * heads * T, N)
    seen = (scores.softmax(2) @ values).reshape(num_objects, heads, num_tokens, num_channels)
    out = seen @ attention.v_proj.weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (O, heads, T, D)
    return attention.out_proj(out.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def _add_from_tokens(
    attention: nn.Module,
    pixels: torch.Tensor,
    queries: torch.Tensor,
    token_keys: torch.Tensor,
    token_values: torch.Tensor,
) -> torch.Tensor:
    """Compute pixels + attention(queries, token_keys, token_values) for pixels that look at tokens.

    Args:
        pixels, queries: (G, N, C), G = 1 or O.
        token_keys, token_values: (O, T, C).
    Returns:
        (O, N, C).
    """
    num_objects, num_tokens, num_channels = token_keys.shape
    heads = attention.num_heads
    k = _split_heads(attention.k_proj(token_keys), heads, is_scaled=True)  # (O, heads, T, D)
    probes = k @ attention.q_proj.weight.unflatten(0, (heads, -1))  # (O, heads, T, C)
    offsets = k @ attention.q_proj.bias.unflatten(0, (heads, -1, 1))  # (O, heads, T, 1)
    scores = probes.reshape(len(queries), -1, num_channels) @ queries.transpose(1, 2)  # (G, O/G * heads * T, N)
    weights = (scores.reshape(num_objects, heads, num_tokens, -1) + offsets).softmax(2).flatten(1, 2)

    v = _split_heads(attention.v_proj(token_values), heads)
    changes = v @ attention.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # (O, heads, T, C)
    changes = changes + attention.out_proj.bias / heads  # the weights of each head add up to 1
    return pixels + weights.transpose(1, 2) @ changes.flatten(1, 2)  # not baddbmm: autocast would round the pixels, too


# ---------------------------------------------------------------------------------------------------------------------
# upscaling


def _upscale(
    upscaling: nn.Sequential, pixels: torch.Tensor, high_res_features: list[torch.Tensor], image_hw: tuple[int, int]
) -> torch.Tensor:
    """Enlarge pixels four times, adding the finer maps.

    Args:
        upscaling: SAM 2's ConvTranspose2d, LayerNorm2d, GELU, ConvTranspose2d, GELU.
        pixels: (O, N, C), N = h * w.
        high_res_features: (1, C/8, 4h, 4w) and (1, C/4, 2h, 2w).
        image_hw: (h, w).
    Returns:
        (O, 16 N, C/8), by (row, column) of the coarse pixel, then of the middle one in it, then of the fine one
    """
    conv1, norm, activate1, conv2, activate2 = upscaling
    (height, width), (num_objects, num_pixels, _) = image_hw, pixels.shape
    stride_4, stride_8 = high_res_features
    middle, fine = conv1.out_channels, conv2.out_channels
    x = _enlarge(pixels, conv1)  # (O, N, 4 * C/4)
    added = stride_8.reshape(middle, height, 2, width, 2).permute(1, 3, 2, 4, 0)
    x += added.reshape(1, num_pixels, 4 * middle) + conv1.bias.repeat(4)
    x = x.reshape(num_objects, 4 * num_pixels, middle)
    x = activate1(F.layer_norm(x, (middle,), norm.weight, norm.bias, norm.eps))
    x = _enlarge(x, conv2)  # (O, 4 N, 4 * C/8)
    added = stride_4.reshape(fine, height, 2, 2, width, 2, 2).permute(1, 4, 2, 5, 3, 6, 0)
    x += added.reshape(1, 4 * num_pixels, 4 * fine) + conv2.bias.repeat(4)
    return activate2(x).reshape(num_objects, 16 * num_pixels, fine)


def _enlarge(pixels: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
    """Apply a transposed convolution of kernel and stride 2, without its bias: (O, N, C) -> (O, N, 2 * 2 * C')."""
    return F.linear(pixels, conv.weight.permute(2, 3, 1, 0).flatten(0, 2))  # weight (C, C', 2, 2) -> (4 C', C)
