"""Views of a picture and its class map: against Pillow and naive loops; both are varied alike."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_segmentation import draw_pair

from utils.run import sample_rng
from utils.segmentation import views
from utils.segmentation.views import Augmentation, Framing, training_view

PLAIN = Augmentation(scale=[1.0, 1.0], hflip=False, vflip=False, rotation=0.0, color_jitter=0.0, elastic_px=0.0)


def test_mirrored_index_equals_numpys_reflection():
    for size in (1, 2, 3, 7):
        pixels = np.arange(size)
        for before, after in ((0, 0), (1, 2), (9, 4), (23, 31)):
            expected = np.pad(pixels, (before, after), mode="reflect")
            assert (views.mirrored_index(-before, before + size + after, size) == expected).all()


def test_view_without_augmentation_is_the_picture_itself():
    image, class_map = draw_pair(np.random.default_rng(3), 40, 56)
    for fit in ("resize", "crop"):
        view, target = training_view(image, class_map, Framing([40, 56], fit), PLAIN, 0, sample_rng(0, 0))
        assert (view.permute(1, 2, 0).numpy() == image).all() and (target.numpy() == class_map).all()
        assert view.dtype == target.dtype == torch.uint8


def test_resizing_antialiases_the_picture_and_takes_the_nearest_class():
    """Against Pillow, whose resizing antialiases, and a naive loop over pixel centres."""
    rng = np.random.default_rng(0)
    image, class_map = rng.integers(0, 256, (90, 131, 3)).astype(np.uint8), rng.integers(0, 9, (90, 131)).astype("u1")
    view, target = training_view(image, class_map, Framing([32, 40], "resize"), PLAIN, 0, sample_rng(0, 0))
    expected = np.array(Image.fromarray(image).resize((40, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(view.permute(1, 2, 0).numpy() - expected).max() <= 1
    for y in range(32):
        for x in range(40):
            assert target[y, x] == class_map[int((y + 0.5) * 90 / 32), int((x + 0.5) * 131 / 40)]


AUGMENTED = {
    "hflip": {"hflip": True},
    "vflip": {"vflip": True},
    "scale": {"scale": [0.5, 1.6]},
    "rotation": {"rotation": 180.0},
    "elastic": {"elastic_px": 6.0},
    "all": {"hflip": True, "vflip": True, "scale": [0.6, 1.5], "rotation": 40.0, "elastic_px": 4.0},
}


@pytest.mark.parametrize("margin", [0, 92])
@pytest.mark.parametrize("fit", ["resize", "crop"])
@pytest.mark.parametrize("name", AUGMENTED)
def test_picture_and_classes_are_varied_alike(name, fit, margin):
    """On a picture whose grey value tells the class, seen through every augmentation; no class is mixed or lost."""
    yy, xx = np.mgrid[:64, :80]
    class_map = ((xx // 20) + 4 * (yy // 32)).astype(np.uint8)  # 8 blocks, each its own class
    image = (class_map * 30)[..., None]
    augmentation = replace(PLAIN, **AUGMENTED[name])
    framing = Framing(252 if margin else [48, 64], fit)
    shares, seen = [], set()
    for sample_index in range(6):
        view, target = training_view(image, class_map, framing, augmentation, margin, sample_rng(0, sample_index))
        height, width = framing.input_hw
        assert view.shape == (1, height, width) and target.shape == (height - 2 * margin, width - 2 * margin)
        inside = view[0, margin : height - margin, margin : width - margin].float() / 30
        shares.append(((inside - target).abs() < 0.17).float().mean().item())  # at blocks' borders greys are mixed
        seen |= set(target.unique().tolist())
        assert target.max() <= 7  # neither mixed classes nor what lies outside the picture
    assert min(shares) > 0.75 and np.mean(shares) > 0.85, shares
    assert seen == set(range(8))


def test_views_differ_as_augmentation_says():
    image, class_map = draw_pair(np.random.default_rng(3), 40, 56)
    framing = Framing([40, 56], "resize")
    flips = set()
    for sample_index in range(12):
        rng = sample_rng(0, sample_index)
        view, target = training_view(image, class_map, framing, replace(PLAIN, hflip=True), 0, rng)
        is_plain, is_flipped = (target.numpy() == class_map).all(), (target.numpy() == class_map[:, ::-1]).all()
        assert is_plain or is_flipped
        flips.add(bool(is_flipped))
    assert flips == {False, True}
    view, target = training_view(image, class_map, framing, replace(PLAIN, color_jitter=0.3), 0, sample_rng(0, 1))
    assert (view.permute(1, 2, 0).numpy() != image).mean() > 0.5 and (target.numpy() == class_map).all()


@pytest.mark.parametrize("fit, hw", [("crop", (90, 110)), ("crop", (20, 110)), ("resize", (90, 110))])
def test_rare_crops_lay_windows_over_each_class_equally_often(fit, hw):
    """Also where the window is larger than the picture along one side, and where most of the picture is ignored."""
    image, class_map = np.zeros((*hw, 3), np.uint8), np.full(hw, 255, np.uint8)
    class_map[: hw[0] // 2] = 0
    class_map[hw[0] - 1, hw[1] - 1] = 1  # one pixel, in the corner
    augmentation = replace(PLAIN, scale=[0.3, 0.3] if fit == "resize" else [1.0, 1.0])
    shares = {}
    for rare_crops in (0.0, 0.5, 1.0):
        held = []
        for sample_index in range(200):
            rng = sample_rng(0, sample_index)
            framing = Framing([32, 32], fit)
            _, target = training_view(image, class_map, framing, replace(augmentation, rare_crops=rare_crops), 0, rng)
            held.append((target == 1).any().item())
        shares[rare_crops] = np.mean(held)
    assert shares[0.0] < 0.06 and 0.15 < shares[0.5] < 0.35 and 0.4 < shares[1.0] < 0.65, shares
    nothing = np.full(hw, 255, np.uint8)
    rng = sample_rng(0, 0)
    _, target = training_view(image, nothing, Framing([32, 32], fit), replace(PLAIN, rare_crops=1.0), 0, rng)
    assert (target == 255).all()


def test_rotation_turns_by_the_angle_drawn():
    """A bright dot on a dark ground: where it lands is where a rotation about the centre takes it."""
    image = np.zeros((65, 65, 1), np.uint8)
    image[32 - 1 : 32 + 2, 52 - 1 : 52 + 2] = 255  # 20 px right of the centre
    framing, augmentation, angles = Framing(65, "crop"), replace(PLAIN, rotation=90.0), []
    for sample_index in range(20):
        view, _ = training_view(image, image[..., 0], framing, augmentation, 0, sample_rng(0, sample_index))
        yy, xx = np.mgrid[-32:33, -32:33]
        view = torch.where(torch.from_numpy(np.hypot(yy, xx) < 26), view, 0)  # beyond, there may be its mirror image
        weights = view[0].double() / view.sum()
        y = (weights.sum(1) * torch.arange(65)).sum().item() - 32
        x = (weights.sum(0) * torch.arange(65)).sum().item() - 32
        assert math.hypot(x, y) == pytest.approx(20, abs=0.5)
        angles.append(math.degrees(math.atan2(y, x)))
    assert min(angles) < -40 and max(angles) > 40 and max(map(abs, angles)) < 91


def test_elastic_displacement_is_the_papers(monkeypatch):
    """3 x 3 vectors of standard deviation 10 px, met exactly at the nodes, smooth and bicubic between them."""
    vectors = np.random.default_rng(0).standard_normal((2, 3, 3)) * 10
    field = views.elastic_displacement(vectors, (41, 61)).numpy()
    assert np.abs(field[:, ::20, ::30] - vectors).max() < 1e-4
    assert np.abs(np.diff(field, axis=2)).max() < 4  # no jumps
    linear = (field[:, 0, 0] + field[:, 0, 30]) / 2
    assert np.abs(field[:, 0, 15] - linear).max() > 0.1
    # what a sample gets: the displacement drawn for many samples has the standard deviation asked for
    image = np.zeros((64, 64, 1), np.uint8)
    drawn = []
    real = views.elastic_displacement
    monkeypatch.setattr(views, "elastic_displacement", lambda vectors, hw: drawn.append(vectors) or real(vectors, hw))
    augmentation = replace(PLAIN, elastic_px=10.0)
    for sample_index in range(100):
        training_view(image, image[..., 0], Framing(16, "crop"), augmentation, 0, sample_rng(0, sample_index))
    assert np.std(drawn) == pytest.approx(10, rel=0.05) and np.shape(drawn) == (100, 2, 3, 3)
