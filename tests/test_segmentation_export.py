"""train_unet.py mode=export: the file in onnxruntime against PyTorch, its README followed by numpy alone, bad input."""

import json
import re
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from options import read_option
from tiny_segmentation import ROOT, compose_config, make_runs_quick, run_main, tiny_overrides, train_in, write_dataset

import train_unet
from utils.segmentation.export import export_network
from utils.segmentation.prediction import Predictor
from utils.segmentation.views import Framing

CPU = torch.device("cpu")
SMALL = {  # of configs/unet/model, made small
    "unet": {"base_channels": 4, "depth": 3},
    "unet bilinear": {"base_channels": 4, "depth": 3, "up": "bilinear"},
    "unet_paper": {"base_channels": 3},
    "fcn": {"base_channels": 3, "head_channels": 8},
    "segnet": {"base_channels": 3},
    "segnet_dsc": {"base_channels": 3},
    "vit": {"image_size": 64, "patch_size": 8, "dim": 24, "num_blocks": 2, "num_heads": 2},
    "deeplabv3": {"backbone": "mobilenet_v3_large"},
}


def make_network(name: str, channels: int = 3, num_classes: int = 4) -> torch.nn.Module:
    """A network of random weights whose batch norm has seen pictures, in eval mode: else its logits are constant."""
    torch.manual_seed(0)
    config = read_option("unet", "model", name.split()[0]) | SMALL[name]
    network = train_unet.build_network(config, channels, num_classes)
    for norm in (module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = None  # the mean of all that it sees
    with torch.no_grad():
        network(blobs(4, channels, *(188, 204) if name == "unet_paper" else (64, 80)))
    return network.eval()


def blobs(*shape: int) -> torch.Tensor:
    """Pictures 0..1 that differ from place to place at all scales."""
    coarse = torch.nn.functional.interpolate(torch.rand(*shape[:2], 5, 6), shape[2:], mode="bilinear")
    return 0.7 * coarse + 0.3 * torch.rand(shape)


def export(
    name: str, network: torch.nn.Module, out_dir, framing, tile_hw=(512, 512), overlap=8, channels=3, has_softmax=False
):
    """The session of an exported network, and its Predictor; classes c0, c1, ..."""
    margin = 92 if name == "unet_paper" else 0
    predictor = Predictor(network, framing, margin, tile_hw, overlap, CPU, "fp32")
    class_names = tuple(f"c{index}" for index in range(4))
    measured = export_network(predictor, name, channels, class_names, has_softmax, out_dir)
    assert measured["difference"] < 1e-5
    return onnxruntime.InferenceSession(str(out_dir / f"{name}.onnx"), providers=["CPUExecutionProvider"]), predictor


@pytest.mark.parametrize("name", SMALL)
def test_one_file_gives_the_logits_of_pytorch_at_any_size_and_batch(name, tmp_path):
    network, size = make_network(name), 188 if name == "unet_paper" else 64
    session, _ = export(name, network, tmp_path, Framing(size, "resize"))
    exact = network.double()  # float32 alone is off by up to 7e-6 of segnet's peak, PyTorch's as well as onnxruntime's
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("image", "tensor(float)", ["batch", 3, "height", "width"])
    assert answer.name == "logits" and answer.type == "tensor(float)" and answer.shape[:2] == ["batch", 4]
    shapes = [(1, 64, 64), (3, 45, 77), (2, 90, 31), (1, 5, 9)]
    for batch, height, width in [(1, 188, 204), (2, 220, 188), (3, 204, 204)] if name == "unet_paper" else shapes:
        image = blobs(batch, 3, height, width)
        with torch.no_grad():
            expected = exact(image.double()).numpy()
        (logits,) = session.run(None, {"image": image.numpy()})
        assert logits.shape == expected.shape
        assert height < 16 or expected.std((2, 3)).max() > 0.02 * np.abs(expected).max()
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max(), (batch, height, width)


def test_softmax_in_the_file(tmp_path):
    network = make_network("unet", channels=1)
    session, _ = export("unet", network, tmp_path, Framing([32, 48], "crop"), channels=1, has_softmax=True)
    image = blobs(2, 1, 40, 56)
    (probabilities,) = session.run(["probabilities"], {"image": image.numpy()})
    with torch.no_grad():
        scores = np.exp(network(image).numpy().astype(np.float64))
    np.testing.assert_allclose(probabilities, scores / scores.sum(1, keepdims=True), atol=1e-6)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "`probabilities`: float32 (batch, 4" in text and "(batch, 1, height, width), grey / 255" in text


# ---------------------------------------------------------------------------------------------------------------------
# what README.md says, done in numpy


def mirror(image, tops, lefts):
    """The pixels at these rows and columns of (C, H, W), mirrored beyond its ends as often as it takes."""
    for axis, index in ((1, tops), (2, lefts)):
        before = max(0, -index.min())
        after = max(0, index.max() + 1 - image.shape[axis])
        widths = [(0, 0)] * 3
        widths[axis] = (before, after)
        image = np.take(np.pad(image, widths, mode="reflect"), index + before, axis=axis)
    return image


def numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.search(pattern, " ".join(text.split())).groups()]


def follow_padded(text, session, image):
    """Tiles of a padded network as README.md has them: logits (C, H, W)."""
    tile = numbers(r"height of up to (\d+) px and a width of up to (\d+) px go through whole", text)
    half, *steps = numbers(
        r"starts (\d+) px before the picture, the others every (\d+) px \(height\) or (\d+) px", text
    )
    (ramp,) = numbers(r"min\(1, \(d \+ 1\) / (\d+)\)", text)
    starts, lengths, weights = [], [], []
    for size, length, step in zip(image.shape[1:], tile, steps, strict=True):
        whole = size <= length
        starts.append([0] if whole else [start for start in range(-half, size, step) if size - start > half])
        lengths.append(size if whole else length)
        near = [min(d, length - 1 - d) for d in range(length)]
        weights.append(np.ones(size) if whole else np.array([min(1, (d + 1) / ramp) for d in near]))
    total, weight_sum = np.zeros((4, *image.shape[1:])), np.zeros(image.shape[1:])
    for top in starts[0]:
        for left in starts[1]:
            rows, columns = top + np.arange(lengths[0]), left + np.arange(lengths[1])
            (logits,) = session.run(None, {"image": mirror(image, rows, columns)[None]})
            for i, y in enumerate(rows):
                for j, x in enumerate(columns):
                    if 0 <= y < image.shape[1] and 0 <= x < image.shape[2]:
                        weight = weights[0][i] * weights[1][j]
                        total[:, y, x] += weight * logits[0, :, i, j]
                        weight_sum[y, x] += weight
    return total / weight_sum


def follow_unpadded(text, session, image):
    """Tiles of unet_paper as README.md has them: logits (C, H, W)."""
    lost, most_h, most_w = numbers(r"at least H \+ (\d+), but at most (\d+) \(height\) or (\d+)", text)
    (margin,) = numbers(r"starts (\d+) px before the pixel of its first output", text)
    starts, lengths = [], []
    for size, most in zip(image.shape[1:], (most_h, most_w), strict=True):
        length = min(most, next(16 * k + 60 for k in range(8, 999) if 16 * k + 60 >= size + lost))
        step = (length - lost) // 16 * 16
        starts.append([0] if length - lost >= size else list(range(0, size - (length - lost) + step, step)))
        lengths.append(length)
    answer = np.zeros((4, *image.shape[1:]))
    for top in starts[0]:
        for left in starts[1]:
            rows, columns = top - margin + np.arange(lengths[0]), left - margin + np.arange(lengths[1])
            (logits,) = session.run(None, {"image": mirror(image, rows, columns)[None]})
            height, width = (min(size - start, length - lost) for size, start, length in
                             zip(image.shape[1:], (top, left), lengths, strict=True))  # fmt: skip
            answer[:, top : top + height, left : left + width] = logits[0, :, :height, :width]
    return answer


@pytest.mark.parametrize(
    "name, framing, tile_hw, overlap, picture_hw",
    [
        ("unet", Framing([32, 40], "crop"), (32, 40), 9, (70, 93)),
        ("unet", Framing([32, 40], "crop"), (64, 40), 8, (50, 60)),
        ("unet_paper", Framing(188, "crop"), (204, 220), 0, (50, 61)),
        ("unet_paper", Framing(188, "crop"), (236, 236), 0, (30, 41)),
    ],
)
def test_readme_s_tiles_give_what_the_predictor_gives(name, framing, tile_hw, overlap, picture_hw, tmp_path):
    session, predictor = export(name, make_network(name), tmp_path, framing, tile_hw, overlap)
    picture = (blobs(1, 3, *picture_hw)[0].permute(1, 2, 0) * 255).byte().numpy()
    follow = follow_unpadded if name == "unet_paper" else follow_padded
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "1. Take the picture at its own size" in text and "0 c0, 1 c1, 2 c2, 3 c3" in text
    logits = follow(text, session, (picture.transpose(2, 0, 1) / 255).astype(np.float32))
    expected = predictor.predict(picture).numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    assert expected.std((1, 2)).max() > 0.02 * np.abs(expected).max()


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """The best.pt of a run that has learnt something."""
    folder = tmp_path_factory.mktemp("export")
    config = compose_config(*tiny_overrides(write_dataset(folder / "data")), "optim.lr=0.02", "train.steps=12")
    config["train"] |= {"eval_every": 12, "batch_size": 5, "picture_images": 0, "test_at_end": False}
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_runs_quick(monkeypatch)
        train_in(folder / "run", config)
    return folder / "run" / "best.pt"


def test_command_writes_what_mode_predict_sees(best, tmp_path, monkeypatch, capfd):
    """Resized by Pillow, run by onnxruntime, enlarged by OpenCV: the classes of mode=predict."""
    cv2, image_module = pytest.importorskip("cv2"), pytest.importorskip("PIL.Image")
    status, output = run_main(monkeypatch, capfd, tmp_path / "out", "mode=export", f"checkpoint={best}", "device=cpu")
    assert status == 0 and "unet.onnx: " in output and "README.md (input, output, tiles)" in output
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]["last"]
    assert metrics.keys() == {"difference", "onnxruntime_ms", "torch_ms"} and metrics["difference"] < 1e-5
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "0 background, 1 disc, 2 square" in text
    height, width = numbers(r"Resize the picture to (\d+) x (\d+) px \(height x width\)", text)
    assert (height, width) == (32, 40)

    photo = best.parent.parent / "data" / "images" / "008.png"
    arguments = ["mode=predict", f"checkpoint={best}", f"input={photo}", "device=cpu", "precision=fp32"]
    assert run_main(monkeypatch, capfd, tmp_path / "predicted", *arguments)[0] == 0
    expected = cv2.imread(str(tmp_path / "predicted" / "008_classes.png"), cv2.IMREAD_UNCHANGED)
    picture = image_module.open(photo).convert("RGB")
    seen = np.asarray(picture.resize((width, height), image_module.Resampling.BILINEAR), np.float32) / 255
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "unet.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": seen.transpose(2, 0, 1)[None]})
    classes = np.stack([cv2.resize(plane, picture.size) for plane in logits[0]]).argmax(0)
    assert classes.shape == expected.shape and (classes != expected).mean() < 0.01
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mode=export"], "mode=export needs checkpoint=<best.pt>"),
        (["mode=export", "checkpoint={best}", "input=x.png"], "input= is given but mode is export, which does not use"),
        (["mode=export", f"checkpoint={ROOT / 'checkpoints' / 'sam2_nano.pt'}"], "was not written by train_unet.py"),
        (["mode=export", "checkpoint={best}", "data.image_size=99"], "data.image_size is 99; checkpoint"),
        (["mode=export", "checkpoint={best}", "model=segnet"], "is of the model {'name': 'unet'"),
        (["mode=export", "checkpoint={best}", "optim.lr=1"], "optim.lr= has no effect with mode=export"),
    ],
)
def test_export_that_makes_no_sense(arguments, message, best, tmp_path, monkeypatch, capfd):
    arguments = [argument.replace("{best}", str(best)) for argument in arguments]
    status, output = run_main(monkeypatch, capfd, tmp_path / "run", *arguments)
    assert status == 1 and "Traceback" not in output and message in output[output.rindex("error: ") :]
    assert not list(tmp_path.rglob("*.onnx"))


def test_missing_package_is_named_before_anything_is_read(tmp_path, best, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, output = run_main(monkeypatch, capfd, tmp_path / "run", "mode=export", f"checkpoint={best}")
    line = "error: mode=export needs packages that cannot be imported: pip install onnx (import of onnx halted; "
    assert status == 1 and line in output and "Traceback" not in output


def test_more_weights_than_a_file_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.onnx_files.MOST_BYTES", 20_000)
    with pytest.raises(ValueError, match="unet.onnx needs 0.0 GB; an ONNX file holds 0.0 GB: take a smaller model"):
        export("unet", make_network("unet"), tmp_path, Framing(32, "crop"))


def test_file_that_is_off_is_refused(tmp_path):
    network = make_network("unet")
    with torch.no_grad():
        network.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="unet.onnx gives values in onnxruntime that are off PyTorch's by nan"):
        export("unet", network, tmp_path, Framing(32, "crop"))
