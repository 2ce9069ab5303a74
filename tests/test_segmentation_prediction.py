"""Pictures of any size, in tiles: against one forward of the whole picture, Pillow and naive loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.segmentation import prediction
from utils.segmentation.prediction import Predictor, TileSettings, predict_tiled
from utils.segmentation.unet import UNet, UNetPaper
from utils.segmentation.views import Framing

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paper_net():
    torch.manual_seed(0)
    return UNetPaper(1, 2, base_channels=3).eval()


def predict_whole(model, image):
    """Mirror the picture's borders with numpy and predict it with one forward, as the paper's figure 2 has it."""
    _, height, width = image.shape
    after = [math.ceil((size + 184 - 60) / 16) * 16 + 60 - size - 92 for size in (height, width)]
    padded = np.pad(image.numpy(), ((0, 0), (92, after[0]), (92, after[1])), mode="reflect")
    return model(torch.from_numpy(padded)[None])[0, :, :height, :width]


@torch.no_grad()
@pytest.mark.parametrize("hw, tile_hw", [((100, 131), (204, 236)), ((37, 260), (220, 220)), ((150, 20), (284, 204))])
def test_tiles_of_the_unpadded_network_are_seamless(hw, tile_hw, paper_net):
    image = torch.from_numpy(np.random.default_rng(1).random((1, *hw), np.float32))
    whole = predict_whole(paper_net, image)
    tiled = predict_tiled(paper_net, image, 92, tile_hw, 0)
    assert tiled.shape == (2, *hw)
    assert (tiled - whole).abs().max() < 1e-5 < whole.std() / 100
    at_once = predict_tiled(paper_net, image, 92, (1004, 1004), 0)
    assert (at_once - whole).abs().max() < 1e-5


@torch.no_grad()
def test_padded_network_sees_a_picture_that_fits_at_once():
    torch.manual_seed(0)
    model = UNet(3, 4, 4, 2, "bilinear").eval()
    image = torch.rand(3, 45, 70)
    assert torch.equal(predict_tiled(model, image, 0, (45, 70), 16), model(image[None])[0])


@torch.no_grad()
@pytest.mark.parametrize(
    "hw, tile, overlap", [((45, 150), (40, 64), 16), ((33, 33), (32, 32), 31), ((90, 7), (20, 5), 0)]
)
def test_blended_tiles_are_exact_where_a_network_looks_at_no_neighbours(hw, tile, overlap):
    """The weights of all tiles add up to 1 on every pixel, at the borders too."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 2, 1)
    image = torch.rand(3, *hw)
    logits = predict_tiled(model, image, 0, tile, overlap)
    torch.testing.assert_close(logits, model(image[None])[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_blended_tiles_are_near_the_whole_picture():
    """Far from tiles' edges equal, and nowhere a seam: blending is closer than tiles without overlap."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Conv2d(1, 1, 3, padding=1) for _ in range(4)])
    image = torch.rand(1, 60, 200)
    whole = model(image[None])[0]
    inside = np.s_[:, :, 8:-8]  # at the picture's own border the tiles see it mirrored, and the whole picture zeros
    blended = (predict_tiled(model, image, 0, (64, 64), 24) - whole).abs()[inside]
    abrupt = (predict_tiled(model, image, 0, (64, 64), 0) - whole).abs()[inside]
    assert blended.max() < 0.3 * abrupt.max() and abrupt.max() > 1e-3
    assert (blended < 1e-6).float().mean() > 0.3


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of Linux")
def test_the_limit_of_a_container_bounds_what_is_free(monkeypatch):
    monkeypatch.setattr(prediction, "read_free_memory", lambda device: 64 * 2**30)
    assert 32 * 2**30 < prediction.free_memory(CPU) < 64 * 2**30


def test_tiles_follow_from_network_and_size_and_memory_says_how_many_go_at_once(monkeypatch):
    """Tiles were as large as free memory allowed: of 12 MP, 4,600 pixels differed between 1 and 16 GB."""
    auto, sides, at_once = TileSettings("auto", 64), [], []
    model = UNet(3, 3, 8, 3, "transposed")
    for gigabytes in (0.01, 1, 16, 1000):
        monkeypatch.setattr(prediction, "free_memory", lambda device, size=gigabytes: int(size * 1e9))
        tile_hw = prediction.choose_tile(auto, model, Framing(128, "crop"), 0, 3)
        sides.append(tile_hw)
        at_once.append(prediction.count_tiles_at_once(model, Framing(128, "crop"), 3, tile_hw, CPU))
    assert len(set(sides)) == 1 and at_once[0] == at_once[1] == 1 < at_once[2] < at_once[3]
    (wide,) = {prediction.choose_tile(auto, UNet(3, 3, 32, 3, "transposed"), Framing(128, "crop"), 0, 3)}
    assert 256 <= wide[0] < sides[0][0] <= 4096
    assert prediction.choose_tile(auto, model, Framing([5000, 128], "resize"), 0, 3)[0] == 5000  # as in training
    paper = prediction.choose_tile(auto, UNetPaper(1, 2, 2), Framing(188, "crop"), 92, 1)
    assert (paper[0] - 60) % 16 == 0
    assert prediction.choose_tile(TileSettings([100, 200], 64), model, Framing(128, "crop"), 0, 3) == (100, 200)
    assert (
        prediction.choose_tile(TileSettings("auto", 5000), model, Framing(128, "crop"), 0, 3)[0] > 5000
    )  # they advance


@torch.no_grad()
@pytest.mark.parametrize("at_once", [2, 3, 100])
def test_tiles_at_once_change_nothing(at_once, paper_net):
    torch.manual_seed(0)
    model, image = UNet(3, 4, 4, 2, "bilinear").eval(), torch.rand(3, 75, 130)
    one_by_one = predict_tiled(model, image, 0, (40, 64), 16)
    together = predict_tiled(model, image, 0, (40, 64), 16, at_once)
    assert (together - one_by_one).abs().max() < 1e-5 and torch.equal(together.argmax(0), one_by_one.argmax(0))
    image = torch.rand(1, 60, 90)
    paper = [predict_tiled(paper_net, image, 92, (204, 204), 0, count) for count in (1, at_once)]
    assert (paper[0] - paper[1]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("hw", [(4, 4), (1, 3), (4, 60), (20, 4)])
def test_smallest_pictures_of_the_unpadded_network(hw, paper_net):
    """ "range() arg 3 must not be zero": 188 px in are 4 px out, less than tiles advance by."""
    image = torch.rand(1, *hw)
    torch.testing.assert_close(predict_tiled(paper_net, image, 92, (204, 204), 0), predict_whole(paper_net, image))


@torch.no_grad()
def test_resized_prediction_comes_back_at_the_files_size():
    """Against Pillow's resizing of the picture and a naive bilinear enlargement of the logits."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 2, 1)
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    logits = Predictor(model, Framing([20, 30], "resize"), 0, (99, 99), 0, CPU, "fp32").predict(image)
    small = np.array(Image.fromarray(image).resize((30, 20), Image.Resampling.BILINEAR)).astype(np.float32) / 255
    small_logits = model(torch.from_numpy(small).permute(2, 0, 1)[None])[0].numpy()
    assert logits.shape == (2, 60, 90)
    for y, x in ((0, 0), (59, 89), (30, 41), (17, 88)):
        sy, sx = np.clip((y + 0.5) / 3 - 0.5, 0, 19), np.clip((x + 0.5) / 3 - 0.5, 0, 29)
        y0, x0 = int(sy), int(sx)
        y1, x1, fy, fx = min(y0 + 1, 19), min(x0 + 1, 29), sy - y0, sx - x0
        top = (1 - fx) * small_logits[:, y0, x0] + fx * small_logits[:, y0, x1]
        bottom = (1 - fx) * small_logits[:, y1, x0] + fx * small_logits[:, y1, x1]
        assert np.abs(logits[:, y, x].numpy() - ((1 - fy) * top + fy * bottom)).max() < 0.01


@torch.no_grad()
def test_dark_picture_is_not_brightened():
    """Scaled by its type, not by its largest value: a picture of ones is nearly black."""
    model = torch.nn.Conv2d(1, 2, 1)
    for value in (1, 200):
        image = np.full((8, 8, 1), value, np.uint8)
        logits = Predictor(model, Framing(8, "crop"), 0, (8, 8), 0, CPU, "fp32").predict(image)
        expected = model(torch.full((1, 1, 8, 8), value / 255))[0]
        torch.testing.assert_close(logits, expected)
