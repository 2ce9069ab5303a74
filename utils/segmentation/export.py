"""A segmentation network as an ONNX file of dynamic batch, height and width, and a README that says how to feed it."""

from pathlib import Path

import torch
from torch import nn

from utils.onnx_files import compare_with_torch, describe_comparison, write_onnx
from utils.segmentation.prediction import Predictor

TRACED_HW = (236, 252)  # px of the picture that is traced: any will do, but for unet_paper, which needs 16 k + 60
MOST_COMPARED = 1020  # px of a side of the picture that is compared; 16 k + 60, too
README = """\
# {name}.onnx

* Input `image`: float32 (batch, {channels}, height, width), {colors} / 255, not normalised otherwise.
* Output `{output}`: float32 (batch, {num_classes}, ...), the highest along axis 1 is the class: {classes}.
* {sizes}

What `train_unet.py mode=predict` does, for the same answer:

1. {framing}
2. {tiles}
3. {last}
"""
PADDED_SIZES = "Any batch, height and width; the output has the input's height and width."
UNPADDED_SIZES = """\
Any batch; height and width must be 16 k + 60, k >= 8 (188, 204, ...): others are not refused, and answered wrongly. The
  output is the middle, height - {lost} and width - {lost}: its first pixel is the input's at ({margin}, {margin})."""
RESIZED = (
    "Resize the picture to {seen_h} x {seen_w} px (height x width), bilinearly with antialiasing, to whole numbers."
)
PADDED_TILES = """\
A height of up to {tile_h} px and a width of up to {tile_w} px go through whole. A longer axis is cut into tiles of
   that length: the first starts {half} px before the picture, the others every {step_h} px (height) or {step_w} px
   (width), as long as they start more than {half} px before its end. What lies outside the picture is mirrored at its
   outermost pixel, which is not repeated. Average the logits of all tiles, with the weight min(1, (d + 1) / {ramp})
   along such an axis, d px from the tile's nearer end, times that of the other axis (1 where it is whole)."""
UNPADDED_TILES = """\
For H px of an axis a tile is T px long: the smallest 16 k + 60 of at least H + {lost}, but at most {tile_h} (height)
   or {tile_w} (width). It starts {margin} px before the pixel of its first output, outputs start at pixel 0 and every
   (T - {lost}) // 16 * 16 px, until H is covered; where two meet they agree to rounding. What lies outside the picture
   is mirrored at its outermost pixel, which is not repeated."""


class ExportedNetwork(nn.Module):
    """A network, followed by a softmax over classes if its file shall give probabilities."""

    def __init__(self, network: nn.Module, has_softmax: bool):
        super().__init__()
        self.network, self.has_softmax = network, has_softmax

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.network(image)  # (B, C, h, w)
        return logits.softmax(1) if self.has_softmax else logits


def export_network(
    predictor: Predictor, name: str, channels: int, class_names: tuple[str, ...], has_softmax: bool, out_dir: Path
) -> dict[str, float]:
    """Write <name>.onnx and README.md.

    Args:
        predictor: on the CPU, in fp32.
        name: the network's.
        channels: of a picture, 3 (RGB) or 1.
        has_softmax: the file's output is called probabilities instead of logits.
        out_dir: a folder.
    Returns:
        What `compare_with_torch` measured, on a picture of another size than that which was traced.
    Raises:
        ValueError: as `compare_with_torch`.
    """
    network = ExportedNetwork(predictor.model, has_softmax).eval()
    output = "probabilities" if has_softmax else "logits"
    out_hw = ["out_height", "out_width"] if predictor.margin > 0 else ["height", "width"]
    example = torch.rand(2, channels, *TRACED_HW, generator=torch.Generator().manual_seed(0))
    path = out_dir / f"{name}.onnx"
    write_onnx(
        path,
        network,
        {"image": (example, ["batch", channels, "height", "width"])},
        {output: ["batch", len(class_names), *out_hw]},
        {"image": f"{name_colors(channels)} / 255", "classes": ", ".join(class_names)},
    )
    text = describe_file(predictor, name, channels, class_names, output)
    (out_dir / "README.md").write_text(text, encoding="utf-8")
    height, width = (min(side, MOST_COMPARED) for side in predictor.framing.input_hw)
    other = torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(1))
    measured = compare_with_torch(path, network, {"image": other})
    print(f"{describe_comparison(path, measured)}, for one picture of {height} x {width} px")
    return measured


def name_colors(channels: int) -> str:
    """Say what a picture's channels are."""
    return {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")


def describe_file(predictor: Predictor, name: str, channels: int, class_names: tuple[str, ...], output: str) -> str:
    """Explain the input, the output, and how mode=predict brings a picture of any size before the network."""
    margin, (tile_h, tile_w), overlap = predictor.margin, predictor.tile_hw, predictor.overlap
    seen_h, seen_w = (side - 2 * margin for side in predictor.framing.input_hw)
    classes = ", ".join(f"{index} {class_name}" for index, class_name in enumerate(class_names))
    framing, last = "Take the picture at its own size.", "The highest logit is the class."
    if predictor.framing.fit == "resize":
        framing = RESIZED.format(seen_h=seen_h, seen_w=seen_w)
        last = "Resize the logits to the picture's size, bilinearly; the highest is the class."
    if output == "probabilities":
        last += (
            "\n   The softmax is in this file: resized or averaged, probabilities differ a little from those of logits."
        )
    sizes = UNPADDED_SIZES if margin > 0 else PADDED_SIZES
    tiles = UNPADDED_TILES if margin > 0 else PADDED_TILES
    return README.format(
        name=name,
        channels=channels,
        colors=name_colors(channels),
        output=output,
        num_classes=len(class_names),
        classes=classes,
        sizes=sizes.format(margin=margin, lost=2 * margin),
        framing=framing,
        tiles=tiles.format(
            tile_h=tile_h,
            tile_w=tile_w,
            margin=margin,
            lost=2 * margin,
            half=overlap // 2,
            step_h=tile_h - overlap,
            step_w=tile_w - overlap,
            ramp=overlap + 1,
        ),
        last=last,
    )
