"""Masks from words: embeddings of crops and of words that agree, and the map from an embedding to a prompt token.

Training needs no words: an object's token comes from the picture of the object itself, cut out. At inference the words'
embedding takes its place. The map lies beside SAM 2's weights in best.pt ("text_map", "text_encoder").

Source: Kirillov et al. 2023 (Segment Anything), section 7.5 and appendix D.5, less the masked attention in CLIP's last
layer, which its image encoder would have to be opened for.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.checkpoint import load_checkpoint
from utils.images import mask_to_box
from utils.listing import first_few
from utils.samples.named_shapes import COLORS, SHAPES, shape_outline
from utils.settings import above, at_least, between

NAMED_SHAPES = "named_shapes"
VALIDATION_SCALE = 1.5  # of a crop whose embedding is measured: the middle of the paper's range
CHROMA = 40  # of 255: pixels of a lower one are ground


@dataclass(frozen=True)
class TextSettings:
    """How words are learned from crops (`prompts.text:`, configs/sam2/prompts/text.yaml)."""

    share: Annotated[float, between(0, 1)]  # of the objects that are large enough: they start with their crop alone
    min_area_px: Annotated[int, at_least(1)]  # pixels of the original picture; smaller ones start as without words
    crop_scale_min: Annotated[float, at_least(1)]  # side of the crop over the longer side of the object's box, drawn
    crop_scale_max: Annotated[float, at_least(1)]
    blank_share: Annotated[float, between(0, 1)]  # of the crops, whose pixels outside the object are black
    lr: Annotated[float, above(0)]  # highest rate of the map, which starts from random weights

    def __post_init__(self):
        if not self.crop_scale_min <= self.crop_scale_max < np.inf:
            raise ValueError(
                f"prompts.text.crop_scale_max is {self.crop_scale_max}; must be finite, and at least "
                f"prompts.text.crop_scale_min ({self.crop_scale_min})"
            )


# ---------------------------------------------------------------------------------------------------------------------
# embeddings that crops and words share: each class has name, size, crop_side, embed_crops and embed_words


class NamedShapes:
    """A stand-in for CLIP on generated pictures (data=named_shapes): it knows a few colours and shapes.

    A crop's embedding is measured in its pixels: the hues of the coloured region at its centre, and how that region
    fills its hull, its circle and its rectangle. That of words has a 1 for each colour and shape they name.
    """

    name, crop_side = NAMED_SHAPES, 96
    size = len(COLORS) + len(SHAPES)

    def embed_crops(self, crops: torch.Tensor) -> torch.Tensor:
        """Embed crops, uint8 (N, 3, s, s): float32 (N, D) of norm 1, or 0 where nothing is coloured."""
        found = [self._embed_crop(crop.permute(1, 2, 0).cpu().numpy()) for crop in crops]
        return torch.tensor(np.array(found, np.float32).reshape(-1, self.size), device=crops.device)

    def embed_words(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts: float32 (N, D) of norm 1.

        Raises:
            ValueError: for a text in which no known word is.
        """
        words = [*COLORS, *SHAPES]
        found = torch.tensor([[float(word in text.lower().split()) for word in words] for text in texts])
        for text, row in zip(texts, found, strict=True):
            if not row.any():
                raise ValueError(
                    f"text is {text!r}, with no word that text_encoder={self.name} knows: {', '.join(words)}"
                )
        return F.normalize(found.reshape(-1, self.size), dim=1)

    def _embed_crop(self, crop_rgb: np.ndarray) -> np.ndarray:
        chroma = np.ptp(crop_rgb.astype(np.int16), axis=2)
        hue = 2.0 * cv2.cvtColor(crop_rgb, cv2.COLOR_RGB2HSV)[..., 0]  # (s, s) degrees
        distances = np.abs((hue[..., None] - [*COLORS.values()] + 180) % 360 - 180)  # (s, s, colours)
        nearest = np.where(chroma > CHROMA, distances.argmin(2), -1)
        grid = np.linspace(-1, 1, len(crop_rgb))
        is_central = np.exp(-2 * (grid[None] ** 2 + grid[:, None] ** 2))
        regions = []
        for number in np.unique(nearest[nearest >= 0]):
            num_parts, parts = cv2.connectedComponents((nearest == number).view(np.uint8), connectivity=4)
            regions += [parts == part for part in range(1, num_parts)]
        if not regions:
            return np.zeros(self.size)
        region = max(regions, key=lambda region: is_central[region].sum())
        near_hue = np.exp(-0.5 * (distances[region].mean(0) / 20) ** 2)
        away = (_fill_shares(region) - _known_shares()) / 0.07  # (shapes, 3)
        near_shape = np.exp(-0.5 * (away**2).sum(1)) + 1e-9
        embedding = np.concatenate([near_hue / np.linalg.norm(near_hue), near_shape / np.linalg.norm(near_shape)])
        return embedding / 2**0.5


def _fill_shares(region: np.ndarray) -> np.ndarray:
    """Measure a region, bool (H, W): its area as shares of its hull, its circle, and its smallest rectangle's: (3,)."""
    outlines, _ = cv2.findContours(region.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = cv2.convexHull(np.concatenate(outlines))
    width, height = cv2.minAreaRect(hull)[1]
    around = [cv2.contourArea(hull), np.pi * cv2.minEnclosingCircle(hull)[1] ** 2, width * height]
    return max(map(cv2.contourArea, outlines)) / np.maximum(around, 1.0)


@functools.cache
def _known_shares() -> np.ndarray:
    """Measure the shapes themselves: (shapes, 3)."""
    drawn = np.zeros((len(SHAPES), 200, 200), np.uint8)
    for mask, shape in zip(drawn, SHAPES, strict=True):
        cv2.fillPoly(mask, [np.round(100 + 80 * shape_outline(shape)).astype(np.int32)], 1)
    return np.stack([_fill_shares(mask.view(bool)) for mask in drawn])


class OpenClip:
    """A model of open_clip_torch, frozen: <its name>, or <its name>/<tag of its weights>; /none is random weights."""

    def __init__(self, name: str, device: torch.device):
        open_clip = import_open_clip(name)
        model_name, _, tag = name.partition("/")
        if model_name not in open_clip.list_models():
            near = [each for each in open_clip.list_models() if model_name.lower()[:5] in each.lower()]
            listed = ", ".join(first_few(near or open_clip.list_models(), 20))
            raise ValueError(f"text_encoder is {name}; must be {NAMED_SHAPES} or a model of open_clip: {listed}")
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        tag = tag or (tags[0] if tags else "")
        if tag not in (*tags, "none"):
            listed = ", ".join([*tags, "none (random)"])
            raise ValueError(f"text_encoder is {name}; give one of its weights, {model_name}/<tag>: {listed}")
        self.name, weights = f"{model_name}/{tag}", None if tag == "none" else tag
        try:
            with torch.random.fork_rng(devices=[]):  # random weights are the same in every run, and draw nothing of it
                torch.manual_seed(0)
                model = open_clip.create_model(model_name, pretrained=weights, device=device)
            self.tokenizer = open_clip.get_tokenizer(model_name)
        except (OSError, RuntimeError) as error:  # requests' and huggingface_hub's errors are OSErrors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConnectionError(
                f"text_encoder={self.name}: its weights are not here and could not be downloaded ({reason}); "
                "run once with a network, or copy huggingface_hub's cache (HF_HOME) from a machine that has them"
            ) from error
        self.model, self.device = model.eval().requires_grad_(False), device
        side = model.visual.image_size
        self.crop_side = side if isinstance(side, int) else side[0]
        self.mean_std = [torch.tensor(v, device=device).view(3, 1, 1) for v in _pixel_statistics(model)]
        self.size = self.embed_words(["a"]).shape[1]

    @torch.no_grad()
    def embed_crops(self, crops: torch.Tensor) -> torch.Tensor:
        """Embed crops, uint8 (N, 3, s, s): float32 (N, D) of norm 1."""
        mean, std = self.mean_std
        if not len(crops):
            return torch.zeros(0, self.size, device=self.device)
        return F.normalize(self.model.encode_image((crops.to(self.device) / 255 - mean) / std).float(), dim=1)

    @torch.no_grad()
    def embed_words(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts: float32 (N, D) of norm 1."""
        return F.normalize(self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float(), dim=1)


def _pixel_statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return model.visual.image_mean, model.visual.image_std


def import_open_clip(name: str):
    """Import open_clip, or say in one line what is missing for text_encoder=<name>."""
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            f"text_encoder is {name}; must be {NAMED_SHAPES}, or a model of open_clip, which is not installed "
            f"({error}): pip install open_clip_torch"
        ) from None
    return open_clip


def build_encoder(name: str, device: torch.device) -> NamedShapes | OpenClip:
    """Make the embedding that a run names: named_shapes, or a model of open_clip.

    Raises:
        ValueError: for an unknown name, and where open_clip is not installed.
        ConnectionError: where weights are missing and cannot be downloaded.
    """
    return NamedShapes() if name == NAMED_SHAPES else OpenClip(name, device)


# ---------------------------------------------------------------------------------------------------------------------
# crops, and the map from an embedding to a token


def crop_object(image_rgb: np.ndarray, mask: np.ndarray, scale: float, is_blank: bool, crop_side: int) -> np.ndarray:
    """Cut an object out: a square around its box, black where the picture ends.

    Args:
        image_rgb: uint8 (H, W, 3).
        mask: bool (H, W), not empty.
        scale: side of the square over the longer side of the box.
        is_blank: make all pixels outside the mask black.
        crop_side: s, pixels.
    Returns:
        uint8 (3, s, s).
    """
    x1, y1, x2, y2 = mask_to_box(mask) + [0, 0, 1, 1]
    side = max(1, round(float(max(x2 - x1, y2 - y1) * scale)))
    left, top = round(float(x1 + x2 - side) / 2), round(float(y1 + y2 - side) / 2)
    crop = np.zeros((side, side, 3), np.uint8)
    bottom, right = min(top + side, mask.shape[0]), min(left + side, mask.shape[1])
    inside = slice(max(top, 0), bottom), slice(max(left, 0), right)
    part = image_rgb[inside] * mask[inside][..., None] if is_blank else image_rgb[inside]
    y, x = inside[0].start - top, inside[1].start - left
    crop[y : y + part.shape[0], x : x + part.shape[1]] = part
    interpolation = cv2.INTER_AREA if side > crop_side else cv2.INTER_LINEAR
    return cv2.resize(crop, (crop_side, crop_side), interpolation=interpolation).transpose(2, 0, 1)


def draw_crops(
    image_rgb: np.ndarray, masks: Sequence[np.ndarray], settings: TextSettings, crop_side: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw which objects of a picture start with their crop, and the crops.

    Args:
        masks: bool (H, W) each, of N objects.
        rng: the sample's own generator.
    Returns:
        has_text bool (N,); crops uint8 (N, 3, s, s), black for the others.
    """
    has_text = torch.zeros(len(masks), dtype=torch.bool)
    crops = torch.zeros(len(masks), 3, crop_side, crop_side, dtype=torch.uint8)
    for number, mask in enumerate(masks):
        uniform, scale = rng.random(2), rng.uniform(settings.crop_scale_min, settings.crop_scale_max)
        if uniform[0] < settings.share and np.count_nonzero(mask) >= settings.min_area_px:
            has_text[number] = True
            crop = crop_object(image_rgb, mask, scale, uniform[1] < settings.blank_share, crop_side)
            crops[number] = torch.from_numpy(crop)
    return has_text, crops


class TextMap(nn.Module):
    """Map an embedding of norm 1 to a prompt token, linearly."""

    def __init__(self, encoder_name: str, size: int, num_channels: int, seed: int = 0):
        super().__init__()
        self.encoder_name = encoder_name
        generator = torch.Generator().manual_seed(seed)  # no other draw of a run changes
        self.linear = nn.utils.skip_init(nn.Linear, size, num_channels)
        with torch.no_grad():
            self.linear.weight.normal_(generator=generator)  # tokens are then about as large as those of points
            self.linear.bias.zero_()

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute tokens, float32 (O, C), of embeddings (O, D); under autocast, too, in fp32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.linear(embeddings.float())


def load_text_map(path: str | Path | None, device: torch.device) -> TextMap | None:
    """Read the text map that lies beside the weights in a checkpoint; None where there is none.

    Args:
        path: of a checkpoint, or None, "auto" or "none" for weights without one.
    """
    state = {} if path in (None, "auto", "none") else load_checkpoint(Path(path))
    if "text_map" not in state:
        return None
    num_channels, size = state["text_map"]["linear.weight"].shape
    text_map = TextMap(state["text_encoder"], size, num_channels)
    text_map.load_state_dict(state["text_map"])
    return text_map.to(device).eval()


def make_text_map(
    encoder: NamedShapes | OpenClip, num_channels: int, seed: int, checkpoint: str | None, is_trained: bool
) -> TextMap:
    """Make the map that a run trains; one in its checkpoint goes on from there.

    Args:
        checkpoint: what the weights come from, see `load_text_map`; None: nothing to go on from.
        is_trained: the run has steps.
    Raises:
        ValueError: for a checkpoint with a map for another encoder; where nothing trains and it has none.
    """
    earlier = load_text_map(checkpoint, torch.device("cpu"))
    if earlier is not None and earlier.encoder_name != encoder.name:
        raise ValueError(
            f"text_encoder is {encoder.name}, but model.checkpoint {checkpoint} was trained with "
            f"{earlier.encoder_name}; use that, or a checkpoint without a text map"
        )
    if earlier is None and not is_trained:
        raise ValueError(
            f"text_encoder is {encoder.name}, but model.checkpoint {checkpoint} has no text map, and with "
            "train.steps=0 none is learned"
        )
    text_map = TextMap(encoder.name, encoder.size, num_channels, seed)
    if earlier is not None:
        text_map.load_state_dict(earlier.state_dict())
    return text_map
