"""SAM 2 for still images: build a model with its weights, preprocess, encode images, decode prompts.

The same `encode` and `decode` serve training and inference. They call SAM 2's own modules and neither set `no_grad` nor
train/eval mode: callers do. `sam2` and `hydra.utils.instantiate` appear in this file only, inside functions, because
`import sam2` starts Hydra globally (see `_sam2_without_hydra`).
"""

import contextlib
import http.client
import importlib.resources
import os
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from utils.checkpoint import check_script, find_weights, load_checkpoint
from utils.run import REPOSITORY, may_overlap
from utils.sam2.fast_decoder import decode_fast

# What sam2.build_sam.build_sam2 sets by default: where the single mask is unstable, the best of three is given instead.
DECODER_ARGS = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}
PREFIXES = {  # how the parameters of each part that can be trained begin
    "prompt_encoder": ("sam_prompt_encoder.",),
    "mask_decoder": ("sam_mask_decoder.", "no_mem_embed"),
    "neck": ("image_encoder.neck.",),
    "image_encoder": ("image_encoder.",),
}
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as SAM 2 was trained with
MASK_LOGIT = 10.0  # a mask prompt's pixels are +10 inside and -10 outside, as in SAM 2's training
# Larger pictures are resized on the CPU: as floats these take 0.8 GB; a kernel of CUDA holds the weights of a scale.
RESIZED_ON_GPU_PX, RESIZED_ON_GPU_SCALE = 2**26, 64


class Embeddings(NamedTuple):
    """What the decoder needs of B images: C is the model's width (256; the nano 128), S the image side."""

    image_embeddings: torch.Tensor  # (B, C, S/16, S/16), with no_mem_embed added
    high_res_features: list[torch.Tensor]  # (B, C/8, S/4, S/4) and (B, C/4, S/8, S/8), after conv_s0 and conv_s1


class FrozenMaps(NamedTuple):
    """What an image encoder computes of B images before anything that trains while it is frozen.

    Maps from the embedding cache are in its own type and on the CPU until `embedding_cache.embed` restores them.
    """

    stride_4: torch.Tensor  # (B, T, S/4, S/4) of the trunk (T channels: 96 in tiny); projected (B, C/8, S/4, S/4)
    stride_8: torch.Tensor  # (B, 2T, S/8, S/8) of the trunk; projected (B, C/4, S/8, S/8)
    stride_16: torch.Tensor  # (B, C, S/16, S/16) of the neck, without no_mem_embed
    is_projected: bool  # the fine maps have been through `project_high_res`
    dtypes: list[torch.dtype] | None = None  # the encoder's three, of maps from the cache


# ---------------------------------------------------------------------------------------------------------------------
# forward: one image and its prompts through the model


def preprocess(image_rgb: np.ndarray, image_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Turn a picture into the model's input: float, square antialiased resize, normalised.

    Args:
        image_rgb: uint8 (H, W, 3).
        image_size: side S of the model's input, pixels.
        device: where the input is needed; a CUDA device also resizes, which rounds differently, unless the picture is
            too large for its memory or kernel.
    Returns:
        float32 (3, S, S) on the device, on a CPU the same values as sam2's own SAM2Transforms.
    """
    height, width = image_rgb.shape[:2]
    is_small = height * width <= RESIZED_ON_GPU_PX and max(height, width) <= RESIZED_ON_GPU_SCALE * image_size
    resized_on = device if torch.device(device).type == "cuda" and is_small else "cpu"
    image = torch.from_numpy(image_rgb.copy()).to(resized_on).permute(2, 0, 1).float().div_(255)  # (3, H, W)
    image = resize(image, [image_size, image_size], antialias=True).to(device)  # (3, S, S)
    mean, std = torch.tensor([IMAGE_MEAN, IMAGE_STD], device=device).view(2, 3, 1, 1)
    return (image - mean) / std


def scale_points(point_coords: torch.Tensor, orig_hw: tuple[int, int], image_size: int) -> torch.Tensor:
    """Scale (x, y) points from a picture of (H, W) pixels to the model's S x S frame: x*S/W, y*S/H.

    Args:
        point_coords: float (..., 2), pixels of the original picture.
    Returns:
        The same shape, pixels of the S x S frame.
    """
    height, width = orig_hw
    x, y = point_coords.unbind(-1)
    return torch.stack([x * (image_size / width), y * (image_size / height)], -1)  # no copy of factors to a device


def mask_logits(masks: list[np.ndarray], model: nn.Module) -> torch.Tensor:
    """Turn masks (H, W) into the decoder's mask prompts, (O, 1, S/4, S/4): their averages, from -10 to 10."""
    side = model.image_size // 4
    averages = []
    for mask in masks:
        whole = torch.from_numpy(mask)[None, None].float()  # (1, 1, H, W)
        averages.append(F.interpolate(whole, (side, side), mode="bilinear", align_corners=False, antialias=True))
    return torch.cat(averages).mul_(2 * MASK_LOGIT).sub_(MASK_LOGIT).to(model.device)


def encode(model: nn.Module, images: torch.Tensor) -> Embeddings:
    """Encode a batch of preprocessed images.

    Args:
        model: from `build_sam2`.
        images: (B, 3, S, S), S = model.image_size.
    Returns:
        Embeddings of the B images; bit for bit `finish_embeddings(model, encode_frozen(model, images))`, unless
        `model.fast_decoder` lets the latter round differently.
    """
    assert images.shape[-2:] == (model.image_size, model.image_size), (images.shape, model.image_size)
    stride_4, stride_8, stride_16 = model.forward_image(images)["backbone_fpn"]  # conv_s0 and conv_s1 are applied there
    return finish_embeddings(model, FrozenMaps(stride_4, stride_8, stride_16, is_projected=True))


def encode_frozen(model: nn.Module, images: torch.Tensor) -> FrozenMaps:
    """Compute the part of `encode` that never changes while the image encoder is frozen: the trunk, most of the neck.

    The neck's lateral convolutions of the two fine levels are left to `project_high_res`: what they put out is larger
    than what they take, and nothing but conv_s0 and conv_s1 reads it.

    Args:
        images: (B, 3, S, S), S = model.image_size.
    Returns:
        FrozenMaps of the B images, not projected.
    Raises:
        ValueError: for a neck that also mixes coarse levels into fine ones, or drops other levels: none of SAM 2's.
    """
    assert images.shape[-2:] == (model.image_size, model.image_size), (images.shape, model.image_size)
    encoder = model.image_encoder
    neck = encoder.neck
    layout = sorted(neck.fpn_top_down_levels), encoder.scalp, len(neck.convs), neck.fuse_type
    if layout != ([2, 3], 1, 4, "sum") or not model.use_high_res_features_in_sam:
        raise ValueError(
            "the model's neck has (fpn_top_down_levels, scalp, levels, fuse_type) "
            f"{layout}, use_high_res_features_in_sam {model.use_high_res_features_in_sam}; "
            "must be ([2, 3], 1, 4, 'sum') and True, as in all configs of SAM 2"
        )
    stride_4, stride_8, stride_16, stride_32 = encoder.trunk(images)
    top_down = F.interpolate(  # as FpnNeck.forward has it; the output at stride 32 itself is dropped (scalp)
        neck.convs[0](stride_32).float(),
        scale_factor=2.0,
        mode=neck.fpn_interp_model,
        align_corners=None if neck.fpn_interp_model == "nearest" else False,
        antialias=False,
    )  # (B, C, S/16, S/16)
    return FrozenMaps(stride_4, stride_8, neck.convs[1](stride_16) + top_down, is_projected=False)


def project_high_res(model: nn.Module, maps: FrozenMaps, at_once: bool = False) -> FrozenMaps:
    """Bring the two fine maps through the neck's lateral convolutions, then conv_s0 and conv_s1.

    Args:
        maps: of `encode_frozen`, not projected.
        at_once: make one convolution of each two, since both are of one pixel: less work, and it rounds differently.
    Returns:
        FrozenMaps, projected.
    """
    assert not maps.is_projected
    lateral_convs, decoder = model.image_encoder.neck.convs, model.sam_mask_decoder
    stride_4 = _convolve_twice(maps.stride_4, lateral_convs[3].conv, decoder.conv_s0, at_once)  # (B, C/8, S/4, S/4)
    stride_8 = _convolve_twice(maps.stride_8, lateral_convs[2].conv, decoder.conv_s1, at_once)  # (B, C/4, S/8, S/8)
    return FrozenMaps(stride_4, stride_8, maps.stride_16, is_projected=True)


def _convolve_twice(maps: torch.Tensor, first: nn.Conv2d, second: nn.Conv2d, at_once: bool) -> torch.Tensor:
    """Apply two convolutions: (B, C, h, w) -> (B, C'', h, w); two of 1 x 1 at once, if asked, which takes an eighth of
    the multiplications in hiera_tiny.
    """
    if not at_once:
        return second(first(maps))
    assert first.kernel_size == second.kernel_size == (1, 1), (first, second)
    weight = second.weight[:, :, 0, 0] @ first.weight[:, :, 0, 0]  # (C'', C)
    bias = second.weight[:, :, 0, 0] @ first.bias + second.bias
    return F.conv2d(maps, weight[:, :, None, None], bias)


def finish_embeddings(model: nn.Module, maps: FrozenMaps) -> Embeddings:
    """Turn what a frozen image encoder computed into embeddings, with all that trains by default: conv_s0, conv_s1 and
    no_mem_embed. Maps that are not projected are, and at once with `model.fast_decoder`.
    """
    if not maps.is_projected:
        maps = project_high_res(model, maps, at_once=model.fast_decoder)
    stride_16 = maps.stride_16
    if model.directly_add_no_mem_embed:  # "no memory of earlier frames": still images
        stride_16 = stride_16 + model.no_mem_embed.view(1, -1, 1, 1)
    return Embeddings(stride_16, [maps.stride_4, maps.stride_8])


def decode(
    model: nn.Module,
    embeddings: Embeddings,
    image_index: torch.Tensor,
    point_coords: torch.Tensor,
    point_labels: torch.Tensor,
    mask_inputs: torch.Tensor | None,
    multimask_output: bool,
    text_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict the masks of O prompted objects, each on its own image's embeddings.

    Args:
        model: from `build_sam2`, which sets `model.fast_decoder`.
        image_index: int64 (O,), which of the B images each object lies in; best on the CPU.
        point_coords: float (O, P, 2), (x, y) pixels of the S x S frame; a box is two points (its corners) put first.
        point_labels: int (O, P), 1 foreground, 0 background, 2 and 3 box corners.
        mask_inputs: (O, 1, S/4, S/4) logits of an earlier prediction, or None.
        multimask_output: three masks (ambiguous prompt: one point, or words alone) or one (box, several points).
        text_tokens: float (O, C), a prompt token each, from `words.TextMap`; P may be 0 beside it. None: no words.
    Returns:
        low_res_masks (O, M, S/4, S/4) logits, iou_predictions (O, M), object_score_logits (O, 1), and mask_tokens
        (O, M, C), what each mask was made from; M is 3 or 1.
    """
    prompt_encoder, (image_embeddings, high_res_features) = model.sam_prompt_encoder, embeddings
    with torch.autocast(image_embeddings.device.type, enabled=False):  # bf16 would move a click by up to 2 px of 1024
        sparse_embeddings, dense_embeddings = prompt_encoder(
            points=(point_coords, point_labels), boxes=None, masks=None
        )
        image_pe = prompt_encoder.get_dense_pe().to(image_embeddings.dtype)
    if text_tokens is not None:
        sparse_embeddings = torch.cat([text_tokens[:, None], sparse_embeddings], 1)  # (O, 1 + P + 1, C)
    if mask_inputs is not None:
        _, dense_embeddings = prompt_encoder(points=None, boxes=None, masks=mask_inputs)
    if model.fast_decoder:
        low_res_masks, iou_predictions, mask_tokens, object_score_logits = decode_fast(
            model,
            image_embeddings,
            high_res_features,
            image_index,
            image_pe,
            sparse_embeddings,
            dense_embeddings,
            is_dense_shared=mask_inputs is None,
        )
    else:
        device = image_embeddings.device
        image_index = image_index.to(device, non_blocking=may_overlap(device))
        if len(image_embeddings) > 1:  # one image's are broadcast, which saves most of the memory
            high_res_features = [features.index_select(0, image_index) for features in high_res_features]
        low_res_masks, iou_predictions, mask_tokens, object_score_logits = model.sam_mask_decoder.predict_masks(
            image_embeddings=image_embeddings.index_select(0, image_index),
            image_pe=image_pe,
            sparse_prompt_embeddings=sparse_embeddings,
            dense_prompt_embeddings=dense_embeddings,
            repeat_image=False,  # image_index has laid out one image per object already
            high_res_features=high_res_features,
        )
    of_masks = choose_masks(
        model.sam_mask_decoder, low_res_masks, iou_predictions, mask_tokens, multimask_output=multimask_output
    )
    return *of_masks[:2], object_score_logits, of_masks[2]


def choose_masks(
    decoder: nn.Module,
    low_res_masks: torch.Tensor,
    iou_predictions: torch.Tensor,
    mask_tokens: torch.Tensor,
    multimask_output: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose three of a decoder's four masks, or one, each with its own IoU prediction and its own token.

    Args:
        decoder: SAM 2's MaskDecoder.
        low_res_masks: (O, 4, h, w) logits.
        iou_predictions: (O, 4).
        mask_tokens: (O, 4, C).
    Returns:
        low_res_masks (O, M, h, w), iou_predictions (O, M), mask_tokens (O, M, C); M is 3 or 1. A single mask is the
        first, or in eval mode, where that is unstable, the one of the others with the highest predicted IoU.
    Source: sam2.modeling.sam.mask_decoder.MaskDecoder.forward, which does not return the token of the mask it chose.
    """
    of_masks = low_res_masks, iou_predictions, mask_tokens
    if multimask_output:
        return tuple(tensor[:, 1:] for tensor in of_masks)
    if decoder.training or not decoder.dynamic_multimask_via_stability:
        return tuple(tensor[:, :1] for tensor in of_masks)
    stability_scores = decoder._get_stability_scores(low_res_masks[:, 0])  # (O,)
    best_of_others = 1 + iou_predictions[:, 1:].argmax(1)
    is_stable = stability_scores >= decoder.dynamic_multimask_stability_thresh
    chosen = torch.where(is_stable, 0, best_of_others)  # (O,)
    rows = torch.arange(len(chosen), device=chosen.device)
    return tuple(tensor[rows, chosen][:, None] for tensor in of_masks)


def cut(embeddings: Embeddings) -> tuple[Embeddings, list[torch.Tensor]]:
    """Cut embeddings off the encoder, so that several losses can be sent back one after the other.

    Returns:
        the same embeddings, for the decoder; and fp32 leaves below them, whose .grad adds up what comes back, for
        `send_back` to hand it on to the encoder, once.
    """
    tensors = [embeddings.image_embeddings, *embeddings.high_res_features]
    leaves = [tensor.detach().float().requires_grad_() if tensor.requires_grad else tensor for tensor in tensors]
    image_embeddings, *high_res = [leaf.to(tensor.dtype) for leaf, tensor in zip(leaves, tensors, strict=True)]
    return Embeddings(image_embeddings, high_res), leaves


def send_back(embeddings: Embeddings, leaves: list[torch.Tensor]) -> None:
    """Send the gradients that the leaves of `cut` have gathered back through what made the embeddings."""
    tensors = [embeddings.image_embeddings, *embeddings.high_res_features]
    pairs = [(tensor, leaf.grad) for tensor, leaf in zip(tensors, leaves, strict=True) if leaf.grad is not None]
    if pairs:
        torch.autograd.backward(
            [tensor for tensor, _ in pairs], [gradient.to(tensor.dtype) for tensor, gradient in pairs]
        )


def upscale_masks(low_res_masks: torch.Tensor, orig_hw: tuple[int, int]) -> torch.Tensor:
    """Bring low-resolution logits (O, M, h, w) to a picture's size (O, M, H, W), bilinear, in fp32."""
    return F.interpolate(low_res_masks.float(), tuple(orig_hw), mode="bilinear", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------------
# the small model that the project trains itself


class ConvTrunk(nn.Module):
    """A plain residual convolutional trunk with feature maps at strides 4, 8, 16 and 32, for SAM 2's FpnNeck."""

    def __init__(self, channels: tuple[int, ...] = (48, 96, 192, 384), blocks: tuple[int, ...] = (2, 2, 3, 1)):
        super().__init__()
        self.channel_list = list(channels[::-1])  # coarsest first, as ImageEncoder expects
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(3 * 4 * 4, channels[0], 3, padding=1))
        self.downsamples = nn.ModuleList(
            nn.Conv2d(before, after, 2, stride=2) for before, after in zip(channels[:-1], channels[1:], strict=True)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(ResidualBlock(width) for _ in range(depth))
            for width, depth in zip(channels, blocks, strict=True)
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = self.stem(images)  # (B, 48, S/4, S/4)
        features = []
        for level, stage in enumerate(self.stages):
            if level > 0:
                x = self.downsamples[level - 1](x)
            for block in stage:
                x = block(x)
            features.append(x)
        return features  # (B, 48, S/4, S/4) .. (B, 384, S/32, S/32)


class ResidualBlock(nn.Module):
    """x + conv(gelu(conv(norm(x)))), 3x3 convolutions. Group norm: the same for a batch of one."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(width // 16, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.gelu(self.conv1(self.norm(x))))


def _build_nano(image_size: int) -> nn.Module:
    """Make sam2_nano: SAM 2's own classes around `ConvTrunk`, width 128, no memory modules, random weights."""
    with _sam2_without_hydra():
        from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
        from sam2.modeling.position_encoding import PositionEmbeddingSine
        from sam2.modeling.sam2_base import SAM2Base

    trunk = ConvTrunk()
    neck = FpnNeck(
        position_encoding=PositionEmbeddingSine(num_pos_feats=128, normalize=True, scale=None, temperature=10000),
        d_model=128,
        backbone_channel_list=trunk.channel_list,
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    return SAM2Base(
        image_encoder=ImageEncoder(trunk=trunk, neck=neck, scalp=1),
        memory_attention=None,
        memory_encoder=None,
        num_maskmem=0,
        image_size=image_size,
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        sam_mask_decoder_extra_args=dict(DECODER_ARGS),
    )


# ---------------------------------------------------------------------------------------------------------------------
# build a model and load its weights


def build_sam2(
    *,
    name: str,
    config: str | None,
    url: str | None,
    checkpoint: str,
    image_size: int,
    automatic: dict | None = None,
    lr: float,
    device,
    fast_decoder: bool = False,
) -> nn.Module:
    """Build a SAM 2 model with its weights, in eval mode. The keywords are the keys of configs/sam2/model/*.yaml.

    Args:
        name: the model's name, for messages and to choose the nano.
        config: the model's YAML inside the sam2 package; None for sam2_nano, which is built here.
        url: where its official weights are published; None where there are none.
        checkpoint: "auto" (the bundled or downloaded file in checkpoints/ of the repository, downloaded if absent),
            "none" (random weights) or a path, relative to where the user stands.
        image_size: side S of the input in pixels, a multiple of 32; fixed from here on.
        automatic, lr: thresholds for infer_sam2.py where they are not SAM 2's own, and learning rate for train_sam2.py;
            not used here.
        device: where to put the model.
        fast_decoder: compute masks as utils/sam2/fast_decoder.py does, which rounds differently; no key of those files.
    Raises:
        ValueError: a wrong image size, or weights of another model, which is named.
        FileNotFoundError: a checkpoint that is not there.
        ConnectionError: weights that could not be downloaded, with the address and the path to put them.
    """
    if image_size % 32 != 0 or image_size <= 0:
        raise ValueError(f"model.image_size is {image_size}; must be a multiple of 32")
    with _without_cuda():
        model = _build_nano(image_size) if config is None else _build_official(config, image_size)
    if checkpoint == "none":
        print(f"{name}: random weights (checkpoint=none)")
    else:
        path = find_checkpoint(name, url, checkpoint)
        state = load_checkpoint(path)
        if "script" in state:
            check_script(state, path, "train_sam2")
        _load_weights(model, find_weights(state, path), name, path)
    model.fast_decoder = fast_decoder
    head = model.sam_mask_decoder.iou_prediction_head
    head.forward = types.MethodType(_forward_without_autocast, head)
    return model.to(device).eval()


def _forward_without_autocast(head: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Compute predicted IoUs in their weights' fp32: in steps of bf16, 1/256, they tie, and the wrong mask wins."""
    with torch.autocast(tokens.device.type, enabled=False):
        return type(head).forward(head, tokens.to(head.layers[0].weight.dtype))


def has_checkpoint(config: dict) -> bool:
    """Tell whether the weights that a model's config asks for are on this machine, or that it asks for none."""
    if config["checkpoint"] != "auto":
        return True  # `find_checkpoint` says where a path leads nowhere
    return auto_checkpoint(config["name"], config["url"]).is_file()


def auto_checkpoint(name: str, url: str | None) -> Path:
    """Name the file of a model's own weights in checkpoints/ of the repository."""
    return REPOSITORY / "checkpoints" / (f"{name}.pt" if url is None else url.rsplit("/", 1)[-1])


def find_checkpoint(name: str, url: str | None, checkpoint: str) -> Path:
    """Find the file that holds a model's weights, downloading official ones that are not there yet.

    Args, Raises: as for `build_sam2`.
    """
    if checkpoint != "auto":
        path = Path(str(checkpoint))
        if not path.is_file():
            raise FileNotFoundError(
                f"model.checkpoint {path} is not a file (seen from {Path.cwd()}); "
                f"give a path, auto (official or bundled weights) or none (random weights)"
            )
        return path
    path = auto_checkpoint(name, url)
    if path.is_file():
        return path
    if url is None:
        raise FileNotFoundError(f"{path}, the bundled weights of {name}, is missing; restore it with git checkout")
    _download(url, path)
    return path


def _download(url: str, path: Path) -> None:
    """Download with a progress bar to <path>.part, then rename: an interrupted download is never taken for a file."""
    partial = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(partial, "wb") as file:
            num_bytes = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=num_bytes or None, unit="B", unit_scale=True, desc=path.name) as progress:
                while block := response.read(1 << 20):
                    file.write(block)
                    progress.update(len(block))
            if num_bytes and file.tell() != num_bytes:
                raise ConnectionError(f"it ended after {file.tell()} of {num_bytes} bytes")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and ConnectionError are OSErrors
        raise ConnectionError(
            f"could not download {url} ({error}); download it elsewhere and put it at {path}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)  # also after Ctrl-C


@contextlib.contextmanager
def _sam2_without_hydra():
    """Allow `import sam2` inside the block; afterwards Hydra's global state is what it was before.

    `import sam2` starts Hydra globally unless it is up already, which would make a later @hydra.main fail.
    """
    from hydra.core.global_hydra import GlobalHydra

    was_initialized = GlobalHydra.instance().is_initialized()
    try:
        yield
    finally:
        if not was_initialized:
            GlobalHydra.instance().clear()


@contextlib.contextmanager
def _without_cuda():
    """Let sam2 see no CUDA device: it fills a cache of positions on one, the first, that a model elsewhere never reads.

    Positions are computed where they are needed, on the model's device.
    """
    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = is_available


def _build_official(config: str, image_size: int) -> nn.Module:
    """Make an official model with random weights from the YAML in the sam2 package, without Hydra's global state."""
    with _sam2_without_hydra():
        import sam2  # noqa: F401  (its modules are named in the YAML)
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        settings = OmegaConf.create((importlib.resources.files("sam2") / config).read_text())
        settings.model.image_size = image_size
        settings.model.sam_mask_decoder_extra_args = DECODER_ARGS
        return instantiate(settings.model, _recursive_=True)


def _load_weights(model: nn.Module, state_dict: dict, name: str, path: Path) -> None:
    """Load weights strictly; a mismatch says whose weights they are."""
    expected = model.state_dict()
    missing, extra = expected.keys() - state_dict.keys(), state_dict.keys() - expected.keys()
    other_shape = [key for key in expected.keys() & state_dict.keys() if expected[key].shape != state_dict[key].shape]
    if missing or extra or other_shape:
        recognised = recognise_weights(state_dict)
        if recognised == name:
            problem = f"looks like {name} but does not fit it; give another checkpoint"
        elif recognised:
            problem = f"holds weights of {recognised}, but model is {name}; use model={recognised}"
        else:
            problem = f"holds weights of no SAM 2 model that this toolkit knows; give a checkpoint of {name}"
        raise ValueError(
            f"checkpoint {path} {problem} ({len(missing)} entries missing, {len(extra)} too many, "
            f"{len(other_shape)} of another shape, such as {sorted([*missing, *extra, *other_shape])[0]})"
        )
    model.load_state_dict(state_dict)


def recognise_weights(state_dict: dict) -> str | None:
    """Name the model that weights belong to: the version by keys, the size by shapes. None for anything else."""
    if "image_encoder.trunk.stem.1.weight" in state_dict:
        return "sam2_nano"
    patch_embedding = state_dict.get("image_encoder.trunk.patch_embed.proj.weight")
    if patch_embedding is None or "sam_mask_decoder.iou_token.weight" not in state_dict:
        return None
    num_blocks = len({key.split(".")[3] for key in state_dict if key.startswith("image_encoder.trunk.blocks.")})
    sizes = {(96, 12): "tiny", (96, 16): "small", (112, 24): "base_plus", (144, 48): "large"}
    size = sizes.get((patch_embedding.shape[0], num_blocks))
    version = "sam2.1" if "no_obj_embed_spatial" in state_dict else "sam2"
    return f"{version}_hiera_{size}" if size else None


def choose_model(checkpoint: str | None, image_size: int | None, model: dict | None) -> dict:
    """Find which model to build, and its weights.

    Args:
        checkpoint: a file; None or "auto" for the model's own weights, "none" for random ones.
        image_size: px; None for the checkpoint's, or the model's.
        model: the values of a file of configs/sam2/model, of which those that were changed count before the
            checkpoint's; None to read the architecture from the checkpoint, or for the bundled nano where there is no
            checkpoint either.
    Returns:
        The arguments of `build_sam2`, less the device.
    Raises:
        FileNotFoundError: for a missing checkpoint.
        ValueError: for one that is not of the named model, or of none.
    """
    chosen = model
    if model is not None and not checkpoint:
        checkpoint = model.get("checkpoint")  # model.checkpoint=best.pt, as of train_sam2.py, is no other choice
    if checkpoint and checkpoint not in ("auto", "none"):
        state = load_checkpoint(Path(checkpoint))
        if {"script", "format"} & set(state):  # a file of this toolkit
            check_script(state, checkpoint, "train_sam2")
            chosen = state["config"]["model"]
            if model is not None and model["name"] != chosen.get("name"):
                raise ValueError(
                    f"checkpoint {checkpoint} is of model {chosen.get('name')}, not {model['name']}; leave out model="
                )
            with contextlib.suppress(ValueError):  # of a name of the user's own
                own = read_model_config(chosen["name"]) if model is not None else {}
                chosen = chosen | {key: value for key, value in (model or {}).items() if value != own.get(key)}
        elif model is None:
            weights = find_weights(state, checkpoint)
            name = recognise_weights(weights)
            if name is None:
                listed = ", ".join(list(weights)[:3])
                raise ValueError(
                    f"checkpoint {checkpoint} holds weights of no SAM 2 model that this toolkit knows ({listed}, ...); "
                    "its own models are listed by model=?"
                )
            chosen = read_model_config(name)
    elif model is None:
        chosen = read_model_config("sam2_nano")
    given = {"checkpoint": str(checkpoint) if checkpoint else None, "image_size": image_size}
    return chosen | {key: value for key, value in given.items() if value is not None}


def read_model_config(name: str) -> dict:
    """Read a file of configs/sam2/model, by its name."""
    path = REPOSITORY / "configs" / "sam2" / "model" / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml")))
        raise ValueError(f"there is no SAM 2 model {name}; must be one of {names}")
    return OmegaConf.to_container(OmegaConf.load(path))


# ---------------------------------------------------------------------------------------------------------------------
# which parts are trained


def freeze_except(model: nn.Module, trainable: list) -> dict[str, nn.Parameter]:
    """Make exactly the named parts trainable and return their parameters.

    Args:
        trainable: any of "prompt_encoder" (sam_prompt_encoder.*), "mask_decoder" (sam_mask_decoder.* with conv_s0 and
            conv_s1, and no_mem_embed), "neck" (image_encoder.neck.*), {"trunk_last_n": k} (the trunk's last k blocks),
            "image_encoder" (trunk and neck).
    Returns:
        {name: parameter} of every trainable parameter; all others have requires_grad False.
    Raises:
        ValueError: for no part, an unknown part, "memory", and for more blocks than there are.
    """
    if not isinstance(trainable, list) or not trainable:
        raise ValueError(f"train.trainable is {trainable!r}; must be a list such as [prompt_encoder, mask_decoder]")
    prefixes = []
    for part in trainable:
        if isinstance(part, dict) and list(part) == ["trunk_last_n"]:
            prefixes += _last_blocks(model, part["trunk_last_n"])
        elif isinstance(part, str) and part in PREFIXES:
            prefixes += PREFIXES[part]
        elif part == "memory":
            raise ValueError(
                "train.trainable has memory: still images never run the memory modules, so they would get no gradient; "
                "leave it out"
            )
        else:
            raise ValueError(
                f"train.trainable has {part!r}; must be among {', '.join(PREFIXES)} and {{trunk_last_n: k}}"
            )
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.startswith(tuple(prefixes)))
    return {parameter_name: p for parameter_name, p in model.named_parameters() if p.requires_grad}


def _last_blocks(model: nn.Module, num_last: int) -> list[str]:
    """Name the trunk's last blocks, as prefixes of their parameters."""
    trunk = model.image_encoder.trunk
    blocks = list(trunk.blocks) if hasattr(trunk, "blocks") else [block for stage in trunk.stages for block in stage]
    if type(num_last) is not int or not 1 <= num_last <= len(blocks):
        raise ValueError(
            f"train.trainable has trunk_last_n: {num_last}; must be 1 to {len(blocks)}, the trunk's blocks"
        )
    chosen = set(blocks[-num_last:])
    return [f"{name}." for name, module in model.named_modules() if module in chosen]
