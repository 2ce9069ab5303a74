"""utils/samples/: generated scenes, glassware and pets, and how they lie on disk."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import skimage.data
from options import read_option
from torchvision.datasets import OxfordIIITPet

from utils.dataset_check import check_items
from utils.instances.readers import object_ids, read_item, split_items
from utils.samples import glassware as glassware_sample
from utils.samples import moving_shapes, scenes, write
from utils.samples import pets as pets_sample
from utils.samples.glassware import draw_glassware
from utils.samples.moving_shapes import draw_moving_shapes
from utils.samples.pets import draw_pet
from utils.samples.scenes import draw_scene, read_photographs
from utils.samples.write import write_samples
from utils.segmentation import readers as semantic_data
from utils.segmentation.check import check_item


def data_config(name: str, root) -> dict:
    config = read_option("sam2", "data", name)
    assert config.pop("generate") == name
    assert config["root"] == f"data/generated_{name}"  # below the repository, never below DATA_ROOT
    return config | {"root": str(root)}


DRAWN = {  # what a generator and a number draw, and the shapes and types of it
    "scene": (
        lambda rng, index: draw_scene(rng, 128, read_photographs()),
        [((128, 128, 3), np.uint8), ((128, 128), np.int32)],
    ),
    "glassware": (
        lambda rng, index: draw_glassware(rng, 120, 160),
        [((120, 160, 3), np.uint8), ((120, 160), np.uint8), ((120, 160), np.uint8)],
    ),
    "pet": (
        lambda rng, index: draw_pet(rng, index % 2 == 0, 96, 120),
        [((96, 120, 3), np.uint8), ((96, 120), np.uint8)],
    ),
    "moving shapes": (
        lambda rng, index: draw_moving_shapes(rng, 14, 160, 200),
        [((14, 160, 200, 3), np.uint8), ((14, 4), np.float64), ((14,), np.int64)],
    ),
    "wild moving shapes": (
        lambda rng, index: draw_moving_shapes(rng, 4, 160, 200, moving_shapes.WILD),
        [((4, 160, 200, 3), np.uint8), ((4, 4), np.float64), ((4,), np.int64)],
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_is_a_function_of_its_generator(name):
    draw, expected = DRAWN[name]
    pictures = set()
    for index in range(4):
        first, again = ([np.asarray(part) for part in draw(np.random.default_rng([5, index]), index)] for _ in range(2))
        assert [(part.shape, part.dtype) for part in first] == expected
        assert all(map(np.array_equal, first, again))
        pictures.add(first[0].tobytes())
    assert len(pictures) == 4


# ---------------------------------------------------------------------------------------------------------------------
# scenes


def scene(index: int) -> tuple[np.ndarray, np.ndarray]:
    return draw_scene(np.random.default_rng([5, index]), 128, read_photographs())


def test_textures_come_from_the_photographs_of_scikit_image():
    photographs = read_photographs()
    assert len(photographs) == 12
    assert all(photograph.shape[2] == 3 and photograph.dtype == np.uint8 for photograph in photographs)
    assert np.array_equal(photographs[0], skimage.data.astronaut())
    without = [draw_scene(np.random.default_rng([5, index]), 128, [])[0] for index in range(4)]
    assert not all(np.array_equal(scene(index)[0], image_rgb) for index, image_rgb in enumerate(without))


def test_without_scikit_image_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(scenes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        read_photographs.__wrapped__()


def test_scenes_have_objects_of_many_sizes_and_numbers():
    counts, areas = [], []
    for index in range(60):
        objects = object_ids(scene(index)[1][None])
        counts.append(len(objects))
        areas += [area / 128**2 for _, _, area in objects]
    assert min(counts) >= 1 and np.median(counts) < 30 < max(counts)
    assert np.quantile(areas, 0.05) < 0.004 and np.quantile(areas, 0.98) > 0.05


def test_ids_are_what_is_painted_last(monkeypatch):
    """Follow the painting: a stroke changes the picture inside its mask alone, and the last one owns the pixel."""
    strokes, paint = [], scenes.paint_shape

    def follow(rng, image, mask, color, edge, photographs):
        before = image.copy()
        paint(rng, image, mask, color, edge, photographs)
        assert np.array_equal(image[~mask], before[~mask])
        assert (image[mask] != before[mask]).any(1).mean() > 0.5
        strokes.append(mask.copy())

    monkeypatch.setattr(scenes, "paint_shape", follow)
    num_scenes = 0
    for index in range(30):
        strokes.clear()
        _, ids = scene(index)
        if not strokes:  # a crowd
            continue
        expected = np.zeros_like(ids)
        for mask in strokes:  # a region in pieces is as many instances
            num_labels, pieces = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
            whole = num_labels == 2 or not filled_by(strokes, mask)
            expected[mask] = expected.max() + 1 if whole else expected.max() + pieces[mask]
        pairs = np.unique(np.stack([ids.ravel(), expected.ravel()]), axis=1)
        assert len(set(pairs[0])) == len(set(pairs[1])) == pairs.shape[1]  # one id to each, and none shared
        assert np.array_equal(ids == 0, expected == 0)
        num_scenes += 1
    assert num_scenes >= 10


def filled_by(strokes, mask) -> bool:
    """Tell whether a stroke is one of the regions that divide the whole frame, which are painted first."""
    covered = np.zeros_like(mask)
    for number, stroke in enumerate(strokes):
        if (covered & stroke).any():
            return False
        covered |= stroke
        if covered.all():
            return any(stroke is mask for stroke in strokes[: number + 1])
    return False


def test_crowds_differ_from_their_ground():
    for index in range(12):
        image, ids = scenes._draw_crowd(np.random.default_rng(index), 128)
        objects = object_ids(ids[None])
        assert objects and ids.max() <= 120
        differences = []
        for _, object_id, _ in objects:
            mask = ids == object_id
            ring = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool) & (ids == 0)
            if ring.any():
                differences.append(np.abs(np.median(image[mask], 0) - np.median(image[ring], 0)).max())
        assert np.mean(np.array(differences) > 5) > 0.8, index


def test_most_instances_are_one_piece():
    """An id belongs to one object: what lies in front may divide it, but rarely into crumbs."""
    whole = []
    for index in range(40):
        _, ids = scene(index)
        for _, object_id, area in object_ids(ids[None]):
            _, _, statistics, _ = cv2.connectedComponentsWithStats((ids == object_id).astype(np.uint8), connectivity=8)
            whole.append(statistics[1:, cv2.CC_STAT_AREA].max() / area)
    assert np.mean(np.array(whole) > 0.9) > 0.85 and min(whole) > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# glassware


def test_glassware_has_nested_vessels_and_materials():
    num_vessels = num_materials = 0
    for index in range(12):
        _, vessel_ids, material_ids = draw_glassware(np.random.default_rng([7, index]), 120, 160)
        vessels, materials = set(np.unique(vessel_ids)) - {0}, set(np.unique(material_ids)) - {0}
        assert not vessels & materials and all(object_id > 15 for object_id in vessels | materials)
        for material in materials:  # inside one vessel, whose id is there too
            around = np.unique(vessel_ids[material_ids == material])
            assert len(around) == 1 and around[0] > 0
        num_vessels, num_materials = num_vessels + len(vessels), num_materials + len(materials)
    assert num_vessels >= 15 and num_materials >= 10


@pytest.fixture(scope="module")
def glassware(tmp_path_factory):
    """The sample, written once: its folder."""
    folder = tmp_path_factory.mktemp("generated") / "glassware"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glassware_sample, "NUM_GLASSWARE", {"Train": 6, "Test": 2})
        glassware_sample.write_glassware(folder)
    return folder


def test_glassware_lies_in_the_layout_of_labpics(glassware):
    names = {path.relative_to(glassware).as_posix() for path in glassware.rglob("*") if path.is_file()}
    stems = [f"Train/{{}}/Glass_{index:03d}" for index in range(6)] + ["Test/{}/Glass_000", "Test/{}/Glass_001"]
    parts = (("Image", "jpg"), ("Instance", "png"))
    assert names == {f"Simple/{stem.format(part)}.{suffix}" for stem in stems for part, suffix in parts}
    sizes = set()
    for index in range(6):
        image = cv2.imread(str(glassware / f"Simple/Train/Image/Glass_{index:03d}.jpg"), cv2.IMREAD_UNCHANGED)
        ids_bgr = cv2.imread(str(glassware / f"Simple/Train/Instance/Glass_{index:03d}.png"), cv2.IMREAD_UNCHANGED)
        assert ids_bgr.shape == image.shape and ids_bgr.dtype == np.uint8 and ids_bgr.shape[2] == 3
        materials, unused, vessels = np.moveaxis(ids_bgr, 2, 0)
        assert not unused.any()
        assert all(not ((channel > 0) & (channel <= 15)).any() for channel in (vessels, materials))
        assert (vessels[materials > 0] > 0).all()
        sizes.add(image.shape[:2])
        if index == 2:
            assert (vessels > 0).all()  # no background
        elif index == 3:
            assert not ids_bgr.any()  # nothing annotated
        else:
            assert vessels.any() and (vessels == 0).any()
    assert len(sizes) == 3


def test_glassware_is_read_by_the_default_config(glassware):
    train_items, val_items = split_items(**data_config("glassware", glassware))
    assert (len(train_items), len(val_items)) == (6, 2)
    counts = [len(object_ids(read_item(item)[1])) for item in train_items]
    assert counts[3] == 0 and min(counts[:3] + counts[4:]) >= 1 and sum(counts) >= 10
    assert (read_item(train_items[2])[1] > 0).all()


def test_the_picture_shows_what_the_annotation_says(glassware):
    """Pictures and annotations are of one scene: colours change more across the outlines of objects than elsewhere."""
    ratios = []
    for index in (0, 1, 4, 5):
        image = cv2.imread(str(glassware / f"Simple/Train/Image/Glass_{index:03d}.jpg")).astype(np.float32)
        ids = cv2.imread(str(glassware / f"Simple/Train/Instance/Glass_{index:03d}.png")).astype(np.int32)
        merged = ids[..., 2] * 256 + ids[..., 0]
        change = np.abs(np.diff(image, axis=1)).max(2)
        outline = cv2.dilate((np.diff(merged, axis=1) != 0).astype(np.uint8), np.ones((1, 3), np.uint8)) > 0
        ratios.append(change[outline].mean() / change[~outline].mean())
    assert np.median(ratios) > 1.3


# ---------------------------------------------------------------------------------------------------------------------
# on disk: once, whole or not at all


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "REPOSITORY", tmp_path)
    monkeypatch.setattr(glassware_sample, "NUM_GLASSWARE", {"Train": 4, "Test": 1})
    return tmp_path


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind, num_files", [("glassware", 10), ("pets", 2 * 3 + 3)])
def test_samples_are_written_once_the_same_everywhere(kind, num_files, repository, monkeypatch, capsys):
    monkeypatch.setattr(pets_sample, "NUM_PETS", {"trainval": 2, "test": 1})
    monkeypatch.chdir("/")  # not where the user stands
    folder = write_samples(kind, "data/mine")
    assert folder == repository / "data" / "mine"
    assert f"writing generated {kind} to {folder}" in capsys.readouterr().out
    written = contents(folder)
    assert len(written) == num_files and contents(write_samples(kind, "data/again")) == written
    changed = folder / next(iter(written))
    changed.write_bytes(b"changed by the user")
    capsys.readouterr()
    assert write_samples(kind, "data/mine") == folder and capsys.readouterr().out == ""
    assert changed.read_bytes() == b"changed by the user"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["again", "mine"]


def test_a_killed_write_leaves_no_dataset_and_the_next_is_whole(repository, monkeypatch):
    write_image, num_written = glassware_sample.write_image, []

    def fail_at_the_fifth(path, image_rgb):
        num_written.append(path)
        if len(num_written) == 5:
            raise KeyboardInterrupt
        write_image(path, image_rgb)

    monkeypatch.setattr(glassware_sample, "write_image", fail_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        write_samples("glassware", "data/mine")
    assert not (repository / "data" / "mine").exists()
    monkeypatch.setattr(glassware_sample, "write_image", write_image)
    for leftover in (repository / "data").iterdir():  # what the killed run drew is not taken over
        (leftover / "stale.txt").write_text("stale")
    folder = write_samples("glassware", "data/mine")
    assert len(contents(folder)) == 10 and "stale.txt" not in contents(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_scenes_are_written_as_pictures_and_label_maps(repository, monkeypatch):
    monkeypatch.setattr(scenes, "NUM_SCENES", 5)
    monkeypatch.setattr(scenes, "SCENE_SIZE", 64)
    monkeypatch.setattr(scenes, "ProcessPoolExecutor", ThreadPoolExecutor)  # processes would not see these sizes
    folder = write_samples("scenes", "data/scenes")
    train_items, val_items = split_items(**data_config("scenes", folder) | {"val_fraction": 0.4})
    items = sorted(train_items + val_items, key=lambda item: item.name)
    assert [item.name for item in items] == [f"{index:05d}" for index in range(5)] and len(val_items) == 2
    for index, item in enumerate(items):
        image_rgb, layers = read_item(item)
        expected_rgb, expected_ids = draw_scene(np.random.default_rng([0, index]), 64, read_photographs())
        assert np.array_equal(layers[0], expected_ids)
        assert np.abs(image_rgb.astype(int) - expected_rgb).mean() < 12  # JPEG
    pickle.dumps(scenes._write_scene)  # what processes are handed


def test_an_unknown_kind_is_refused(repository):
    kinds = "glassware, pets, moving_shapes, many_moving_shapes, wild_moving_shapes, scenes"
    message = f"data.generate is 'cups'; must be one of {kinds}"
    with pytest.raises(ValueError, match=message):
        write_samples("cups", "data/cups")
    assert list(repository.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# pets


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated") / "oxford-iiit-pet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pets_sample, "NUM_PETS", {"trainval": 10, "test": 5})
        pets_sample.write_pets(folder)
    return folder


def test_the_border_separates_pet_and_background():
    shares = np.zeros(4)
    for index in range(40):
        _, trimap = draw_pet(np.random.default_rng([6, index]), index % 2 == 0, 128, 160)
        for near, far in ((1, 2), (2, 1)):
            grown = cv2.dilate((trimap == near).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            assert not (grown & (trimap == far)).any()
        assert (trimap == 1).mean() > 0.03
        shares += np.bincount(trimap.ravel(), minlength=4) / trimap.size / 40
    assert 0.2 < shares[1] < 0.45 and 0.4 < shares[2] < 0.7 and 0.08 < shares[3] < 0.2  # real: 0.27, 0.61, 0.12


def test_the_picture_shows_the_pet_where_the_trimap_says():
    """Fur is brown, grey, black or white; the background green, blue or pink."""
    fur, background = [], []
    for index in range(30):
        image_rgb, trimap = draw_pet(np.random.default_rng([7, index]), index % 2 == 0, 128, 160)
        hue, saturation, _ = cv2.split(cv2.cvtColor(cv2.blur(image_rgb, (3, 3)), cv2.COLOR_RGB2HSV))  # hue 0..180
        is_colored = (hue > 40) & (hue < 165) & (saturation > 45)
        fur.append(is_colored[trimap == 1].mean())
        background.append(is_colored[trimap == 2].mean())
    assert np.median(fur) < 0.1 and np.median(background) > 0.9
    assert np.mean(np.array(background) > np.array(fur)) > 0.9


def test_pets_lie_in_the_layout_of_oxford_pet(pets):
    """torchvision's reader is the judge; it reads the classes, too."""
    annotations = pets / "annotations"
    for split, num_pictures in (("trainval", 10), ("test", 5)):
        theirs = OxfordIIITPet(pets.parent, split, ["category", "segmentation"])
        assert len(theirs) == num_pictures and theirs.classes == ["Drawn Cat", "Drawn Dog"]
        for path, (image, (category, trimap)) in zip(theirs._images, theirs, strict=True):
            assert image.size == trimap.size and set(np.unique(trimap)) <= {1, 2, 3}
            assert category == int("dog" in path.name) and path.name[0].isupper() == (category == 0)  # cats: capitals
    lines = (annotations / "list.txt").read_text().splitlines()
    assert lines[0].startswith("#") and len([line for line in lines if not line.startswith("#")]) == 15
    assert len(list((pets / "images").iterdir())) == len(list((annotations / "trimaps").iterdir())) == 15


def test_pets_are_read_by_the_default_config(pets):
    config = read_option("unet", "data", "pets_sample")
    assert config.pop("generate") == "pets" and config["root"] == "data/generated_pets"
    splits = semantic_data.split_items(**config | {"root": str(pets)})
    assert [len(split) for split in splits] == [8, 2, 5]
    report = check_items(sum(splits, []), check_item)
    assert report.counts["num_usable"] == 15 and not any(item.remarks for item in report.items)
    for item in splits[2]:
        image, class_map = semantic_data.read_item(item)
        is_cat, index = "cat" in item.name, int(item.name.split("_")[-1]) - 10
        drawn_rgb, trimap = draw_pet(np.random.default_rng([2, index]), is_cat, *image.shape[:2])
        assert np.array_equal(class_map, trimap - 1)
        assert np.abs(image.astype(int) - drawn_rgb).mean() < 12  # JPEG


# ---------------------------------------------------------------------------------------------------------------------
# moving shapes


def test_the_box_goes_where_the_shape_goes():
    """The first frame's patch is found again near the later boxes, better than anywhere else nearby."""
    is_near = []
    for index in range(6):
        frames, boxes_xywh, cover = draw_moving_shapes(np.random.default_rng([6, index]), 14, 160, 200)
        assert (boxes_xywh[:, :2] >= 0).all() and (boxes_xywh[:, :2] + boxes_xywh[:, 2:] <= [200, 160]).all()
        assert boxes_xywh[:, 2:].min() > 16 and cover.min() >= 0 and cover.max() == 8
        x, y, w, h = boxes_xywh[0].astype(int)
        patch = frames[0][y : y + h, x : x + w]
        for t in (3, 6):
            if cover[t] < 8:
                continue
            x, y = (boxes_xywh[t, :2] + (boxes_xywh[t, 2:] - boxes_xywh[0, 2:]) / 2).round().astype(int)
            left, top = max(x - 25, 0), max(y - 25, 0)
            window = frames[t][top : y + h + 25, left : x + w + 25]
            match = cv2.matchTemplate(window, patch, cv2.TM_CCOEFF_NORMED)
            best_y, best_x = np.unravel_index(match.argmax(), match.shape)
            is_near.append(np.hypot(left + best_x - x, top + best_y - y) < 4)
    assert len(is_near) >= 8 and np.mean(is_near) > 0.85


def test_wild_shapes_are_harder_to_follow():
    """They move farther, change more in size and light, and are no longer found where their first patch fits best."""
    steps_px, growth, light, is_near = {}, {}, {}, {}
    for motion in (moving_shapes.GENTLE, moving_shapes.WILD):
        for index in range(5):
            frames, boxes_xywh, _ = draw_moving_shapes(np.random.default_rng([7, index]), 12, 160, 200, motion)
            centers, sides = boxes_xywh[:, :2] + boxes_xywh[:, 2:] / 2, np.sqrt(boxes_xywh[:, 2:].prod(1))
            steps_px.setdefault(motion, []).append(np.hypot(*np.diff(centers, axis=0).T).max())
            growth.setdefault(motion, []).append(sides.max() / sides.min())
            light.setdefault(motion, []).append(np.std([frame.mean() for frame in frames]))
            x, y, w, h = boxes_xywh[0].astype(int)
            match = cv2.matchTemplate(frames[-1], frames[0][y : y + h, x : x + w], cv2.TM_CCOEFF_NORMED)
            best_y, best_x = np.unravel_index(match.argmax(), match.shape)
            is_near.setdefault(motion, []).append(np.hypot(*(centers[-1] - [best_x + w / 2, best_y + h / 2])) < 10)
    for measured, factor in ((steps_px, 1.3), (growth, 1.05), (light, 1.5)):
        gentle, wild = (np.mean(measured[motion]) for motion in (moving_shapes.GENTLE, moving_shapes.WILD))
        assert wild > factor * gentle, (gentle, wild)
    assert sum(is_near[moving_shapes.WILD]) < sum(is_near[moving_shapes.GENTLE])


def test_cover_is_what_is_seen_of_the_shape(monkeypatch):
    """Draw shapes that stand still, all on one spot: one in front hides the target, or none does."""
    still = np.array([[0.5, 0, 60], [0, 0.5, 40]])
    monkeypatch.setattr(moving_shapes, "_draw_places", lambda rng, num_frames, *size: [still] * num_frames)
    square = np.array([[40.0, 40], [119, 40], [119, 119], [40, 119]])
    monkeypatch.setattr(moving_shapes, "_sprite_outline", lambda rng: square)
    covers = set()
    for index in range(12):
        _, boxes_xywh, cover = draw_moving_shapes(np.random.default_rng(index), 2, 160, 200)
        assert np.abs(boxes_xywh - [80, 60, 40, 40]).max() <= 1
        covers |= set(cover.tolist())
    assert covers == {0, 8}
