"""utils/sample_data.py: generated scenes and glassware, and how they lie on disk."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import yaml

from utils import sample_data
from utils.instance_data import object_ids, read_item, split_items
from utils.sample_data import REPOSITORY, draw_glassware, draw_scene, read_photographs, write_samples


def data_config(name: str, root) -> dict:
    config = yaml.safe_load((REPOSITORY / "configs" / "data" / f"{name}.yaml").read_text())
    assert config.pop("generate") == name
    assert config["root"] == f"data/generated_{name}"  # below the repository, never below DATA_ROOT
    return config | {"root": str(root)}


# ---------------------------------------------------------------------------------------------------------------------
# scenes


def scene(index: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    return draw_scene(np.random.default_rng([5, index]), size, read_photographs())


def test_a_scene_is_a_function_of_its_generator():
    for index in range(6):
        image_rgb, ids = scene(index)
        again_rgb, again_ids = scene(index)
        assert np.array_equal(image_rgb, again_rgb) and np.array_equal(ids, again_ids)
        assert image_rgb.shape == (128, 128, 3) and image_rgb.dtype == np.uint8
        assert ids.shape == (128, 128) and ids.dtype == np.int32 and ids.min() >= 0
    assert len({scene(index)[0].tobytes() for index in range(6)}) == 6
    assert scene(0, 96)[0].shape == (96, 96, 3)


def test_scenes_have_objects_of_many_sizes_and_numbers():
    counts, areas = [], []
    for index in range(60):
        found = object_ids(scene(index)[1][None])
        counts.append(len(found))
        areas += [area / 128**2 for _, _, area in found]
    assert min(counts) >= 1 and np.median(counts) < 30 < max(counts)
    assert np.quantile(areas, 0.05) < 0.004 and np.quantile(areas, 0.98) > 0.05


def test_ids_are_what_is_painted_last(monkeypatch):
    """Follow the painting: a stroke changes the picture inside its mask alone, and the last one owns the pixel."""
    strokes, paint = [], sample_data._paint

    def follow(rng, image, mask, color, edge, photographs):
        before = image.copy()
        paint(rng, image, mask, color, edge, photographs)
        assert np.array_equal(image[~mask], before[~mask])
        assert (image[mask] != before[mask]).any(1).mean() > 0.5
        strokes.append(mask.copy())

    monkeypatch.setattr(sample_data, "_paint", follow)
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


def test_crowds_differ_from_their_ground(monkeypatch):
    monkeypatch.setattr(sample_data, "_finish_picture", lambda rng, image: image)
    for index in range(12):
        image, ids = sample_data._draw_crowd(np.random.default_rng(index), 128)
        found = object_ids(ids[None])
        assert found and ids.max() <= 120
        differences = []
        for _, object_id, _ in found:
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
    num_vessels, num_materials = 0, 0
    for index in range(12):
        rng = np.random.default_rng([7, index])
        image_rgb, vessel_ids, material_ids = draw_glassware(rng, 120, 160)
        again = draw_glassware(np.random.default_rng([7, index]), 120, 160)
        assert all(map(np.array_equal, again, (image_rgb, vessel_ids, material_ids)))
        assert image_rgb.shape == (120, 160, 3) and image_rgb.dtype == np.uint8
        assert (
            vessel_ids.shape == material_ids.shape == (120, 160) and vessel_ids.dtype == material_ids.dtype == np.uint8
        )
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
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("repository")
        patch.setattr(sample_data, "REPOSITORY", root)
        patch.setattr(sample_data, "NUM_GLASSWARE", {"Train": 6, "Test": 2})
        return write_samples("glassware", "data/generated_glassware")


def test_glassware_lies_in_the_layout_of_labpics(glassware):
    names = {path.relative_to(glassware).as_posix() for path in glassware.rglob("*") if path.is_file()}
    expected = set()
    for split, count in (("Train", 6), ("Test", 2)):
        for index in range(count):
            expected.add(f"Simple/{split}/Image/Glass_{index:03d}.jpg")
            expected.add(f"Simple/{split}/Instance/Glass_{index:03d}.png")
    assert names == expected
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
    monkeypatch.setattr(sample_data, "REPOSITORY", tmp_path)
    monkeypatch.setattr(sample_data, "NUM_GLASSWARE", {"Train": 4, "Test": 1})
    return tmp_path


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_samples_are_written_once_the_same_everywhere(repository, glassware, monkeypatch, capsys):
    monkeypatch.chdir("/")  # not where the user stands
    folder = write_samples("glassware", "data/mine")
    assert folder == repository / "data" / "mine" and str(folder) in capsys.readouterr().out
    written, elsewhere = contents(folder), contents(glassware)
    assert len(written) == 10 and all(elsewhere[name] == data for name, data in written.items())
    (folder / "Simple" / "Train" / "Image" / "Glass_000.jpg").write_bytes(b"changed by the user")
    assert write_samples("glassware", "data/mine") == folder
    assert capsys.readouterr().out == ""
    assert (folder / "Simple" / "Train" / "Image" / "Glass_000.jpg").read_bytes() == b"changed by the user"
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_a_killed_write_leaves_no_dataset_and_the_next_is_whole(repository, monkeypatch):
    write_image, num_written = sample_data.write_image, []

    def fail_at_the_fifth(path, image_rgb):
        num_written.append(path)
        if len(num_written) == 5:
            raise KeyboardInterrupt
        write_image(path, image_rgb)

    monkeypatch.setattr(sample_data, "write_image", fail_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        write_samples("glassware", "data/mine")
    assert not (repository / "data" / "mine").exists()
    monkeypatch.setattr(sample_data, "write_image", write_image)
    for leftover in (repository / "data").iterdir():  # what the killed run drew is not taken over
        (leftover / "stale.txt").write_text("stale")
    folder = write_samples("glassware", "data/mine")
    assert len(contents(folder)) == 10 and "stale.txt" not in contents(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_scenes_are_written_as_pictures_and_label_maps(repository, monkeypatch):
    monkeypatch.setattr(sample_data, "NUM_SCENES", 5)
    monkeypatch.setattr(sample_data, "SCENE_SIZE", 64)
    monkeypatch.setattr(sample_data, "ProcessPoolExecutor", ThreadPoolExecutor)  # processes would not see these sizes
    folder = write_samples("scenes", "data/scenes")
    train_items, val_items = split_items(**data_config("scenes", folder) | {"val_fraction": 0.4})
    items = sorted(train_items + val_items, key=lambda item: item.name)
    assert [item.name for item in items] == [f"{index:05d}" for index in range(5)] and len(val_items) == 2
    for index, item in enumerate(items):
        image_rgb, layers = read_item(item)
        expected_rgb, expected_ids = draw_scene(np.random.default_rng([0, index]), 64, read_photographs())
        assert np.array_equal(layers[0], expected_ids)
        assert np.abs(image_rgb.astype(int) - expected_rgb).mean() < 12  # JPEG
    pickle.dumps(sample_data._write_scene)  # what processes are handed


def test_an_unknown_kind_is_refused(repository):
    with pytest.raises(ValueError, match="data.generate is 'cups'; must be one of glassware, scenes"):
        write_samples("cups", "data/cups")
    assert list(repository.iterdir()) == []
