"""utils/listing.py: folders, files by name, pairs, list files, seeded splits."""

import re

import pytest

from utils import listing


def write_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


# ---------------------------------------------------------------------------------------------------------------------
# folders, long lists, files by name


def test_dataset_folder_is_there_or_named(tmp_path):
    assert listing.dataset_folder(str(tmp_path)) == listing.dataset_folder(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    for name in ("gone", "file"):
        with pytest.raises(FileNotFoundError, match=f"data.root .*{name} is not a folder .*DATA_ROOT"):
            listing.dataset_folder(tmp_path / name)


def test_long_lists_are_cut_and_say_so():
    assert listing.first_few(["a", "b"], 2) == listing.first_few(["a", "b"], None) == ["a", "b"]
    assert listing.first_few(list("abcd"), 2) == ["a", "b", "... and 2 more"]


def test_hidden_and_other_files_are_passed_over(tmp_path):
    write_files(
        tmp_path, "a.jpeg", "b.JPG", "c.v2.PNG", ".hidden.jpg", "Thumbs.db", "notes.txt", "sub/a.tif", "sub/.d.png"
    )
    write_files(tmp_path, ".ipynb_checkpoints/a.jpg")
    (tmp_path / "older.jpg").mkdir()
    flat = {"a": "a.jpeg", "b": "b.JPG", "c.v2": "c.v2.PNG"}
    assert listing.files_by_name(tmp_path) == {name: tmp_path / file for name, file in flat.items()}
    deep = listing.files_by_name(tmp_path, with_subfolders=True)
    assert deep == {name: tmp_path / file for name, file in {**flat, "sub/a": "sub/a.tif"}.items()}
    assert [path.name for path in listing.list_folders(tmp_path)] == ["older.jpg", "sub"]
    for function in (listing.files_by_name, listing.list_folders):
        with pytest.raises(FileNotFoundError, match=r"no folder \S*gone; see data/README.md"):
            function(tmp_path / "gone")


def test_two_files_of_one_name_are_refused(tmp_path):
    write_files(tmp_path, "000.jpg", "000.png")
    with pytest.raises(ValueError, match=r"000\.jpg and .*000\.png have the same name but for the suffix"):
        listing.files_by_name(tmp_path)
    assert list(listing.files_by_name(tmp_path, suffixes=(".png",))) == ["000"]


def test_pairs_that_lack_a_file_are_named_with_the_place_where_it_was_looked_for(tmp_path):
    write_files(tmp_path, "images/s/a.jpg", "images/s/b.jpg", "masks/s/a_m.tif", "masks/s/c_m.png")
    pairs = listing.pair_files(tmp_path / "images", tmp_path / "masks", ("", ""), ("", "_m"), with_subfolders=True)
    assert [pair.name for pair in pairs] == ["s/a", "s/b", "s/c"]
    assert pairs[0].annotation_path == tmp_path / "masks/s/a_m.tif"
    message = (
        f"2 of 3 pairs lack a file; image {tmp_path}/images/s/b.jpg has no mask {tmp_path}/masks/s/b_m.png and mask "
    )
    message += f"{tmp_path}/masks/s/c_m.png has no image {tmp_path}/images/s/c.jpg; complete or remove the pair"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        listing.stop_at_missing([pair[1:] for pair in pairs], "stop", "mask")
    listing.stop_at_missing([pair[1:] for pair in pairs], "skip", "mask")
    with pytest.raises(ValueError, match="data.on_bad is 'ignore'; must be stop or skip"):
        listing.stop_at_missing([], "ignore")


# ---------------------------------------------------------------------------------------------------------------------
# seeded splits


def test_a_split_is_that_of_every_earlier_run():
    """Recorded when two functions drew these, one of them for two parts."""
    names = {f"{number:03d}" for number in range(10)}
    assert listing.draw_split(names, 0.3, 0) == ({"000", "004", "007"}, set())
    assert listing.draw_split(names, 0.2, 1, 0.2) == ({"001", "007"}, {"002", "005"})


def test_validation_is_drawn_by_a_seeded_order_that_new_names_do_not_change():
    names = {f"video_{number}" for number in range(20)}
    drawn = listing.draw_split(names, 0.25, 0)[0]
    assert len(drawn) == 5 and drawn < names and drawn != listing.draw_split(names, 0.25, 1)[0]
    more = listing.draw_split(names | {"video_20"}, 0.25, 0)[0]
    assert len(more & drawn) >= 4  # the new name may take the place of one


@pytest.mark.parametrize(
    "num_names, val_fraction, test_fraction, expected",
    [(3, 0.1, 0.1, [1, 1, 1]), (30, 0.1667, 0.0, [25, 5, 0]), (5, 0.5, 0.5, [0, 2, 3]), (4, 0.0, 0.0, [4, 0, 0]),
     (4, 1.0, 0.0, [0, 4, 0]), (6, 0.0, 1.0, [0, 0, 6]), (10, 0.8, 0.1, [1, 8, 1]), (3, 0.01, 0, [2, 1, 0]),
     (3, 0.99, 0, [1, 2, 0]), (20, 0.001, 0, [19, 1, 0]), (1, 1, 0, [0, 1, 0]), (0, 0.5, 0.1, [0, 0, 0])],
)  # fmt: skip
def test_fractions(num_names, val_fraction, test_fraction, expected):
    """Each part that has a share gets a name."""
    names = {f"{number:03d}" for number in range(num_names)}
    val_names, test_names = listing.draw_split(names, val_fraction, 0, test_fraction)
    assert val_names | test_names <= names and not val_names & test_names
    assert [len(names - val_names - test_names), len(val_names), len(test_names)] == expected


@pytest.mark.parametrize(
    "fractions, message",
    [
        ((2, 0.0), "data.val_fraction is 2; must be in 0..1"),
        ((0.0, -1), "data.test_fraction is -1; must be in 0..1"),
        ((0.6, 0.6), "add up to over 1"),
        ((0.5, 0.0), "there is only alone to split; add a second one"),
        ((0.1, 0.1), "there are only 1 pictures to split"),
    ],
)
def test_fractions_that_make_no_sense(fractions, message):
    with pytest.raises(ValueError, match=message):
        listing.draw_split({"alone"}, fractions[0], 0, fractions[1])


# ---------------------------------------------------------------------------------------------------------------------
# files and lists as others make them


def test_a_list_entry_with_a_space_is_never_another_picture(tmp_path):
    """It was cut at its first space: "img 1.jpg" was the picture img."""
    names = {"img", "img 2", "a/b c", "7"}
    for line, name in {
        "img 2.jpg": "img 2", "img 2 1 1 1": "img", "img 1 -1": "img", "x/a/b c.png": "a/b c",
        "img.jpg img_mask/1.png": "img", "7 0.5": "7", "a\\b c.png": "a/b c",
    }.items():  # fmt: skip
        (tmp_path / "list.txt").write_text(f"# names\n{line}\n")
        assert listing.read_list(tmp_path / "list.txt", names) == [name], line
    for line in ("img 1.jpg", "img copy", "img (1).png"):
        (tmp_path / "list.txt").write_text(line)
        with pytest.raises(ValueError, match="list.txt names .*, which the dataset lacks"):
            listing.read_list(tmp_path / "list.txt", names)


def test_a_list_entry_is_never_a_picture_of_another_folder(tmp_path):
    names = {"dogs/001.jpg", "train2017/7.jpg", "x/8.jpg", "y/8.jpg"}
    for line, name in {
        "dogs/001.jpg": "dogs/001.jpg", "001.jpg": "dogs/001.jpg", "001": "dogs/001.jpg", "./7.jpg": "train2017/7.jpg",
        "/data/coco/train2017/7.jpg": "train2017/7.jpg", "y/8": "y/8.jpg",
    }.items():  # fmt: skip
        (tmp_path / "list.txt").write_text(line)
        assert listing.read_list(tmp_path / "list.txt", names) == [name], line
    for line in ("cats/001.jpg", "val2017/7.jpg", "8.jpg", "/dogs/002.jpg"):
        (tmp_path / "list.txt").write_text(line)
        with pytest.raises(ValueError, match="which the dataset lacks"):
            listing.read_list(tmp_path / "list.txt", names)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_lists_are_read_in_the_encodings_of_windows(encoding, tmp_path):
    text = "\ufeffcafé\nb\n" if encoding == "utf-16-le" else "café\nb\n"
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    assert listing.read_lines(tmp_path / "list.txt") == ["café", "b"]


def test_a_list_in_another_encoding_is_named_with_its_line(tmp_path):
    (tmp_path / "list.txt").write_bytes("a\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list\.txt is not text in UTF-8 \(line 2: .*save it as UTF-8"):
        listing.read_lines(tmp_path / "list.txt")


def test_the_two_ways_to_write_an_accent_meet(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "images" / "cafe\u0301.jpg").write_bytes(b"x")  # as macOS writes it
    (tmp_path / "labels" / "caf\u00e9.png").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("cafe\u0301\n", encoding="utf-8")
    (pair,) = listing.pair_files(tmp_path / "images", tmp_path / "labels")
    assert pair.image_path.exists() and pair.annotation_path.exists()
    assert listing.read_list(tmp_path / "list.txt", {pair.name}) == [pair.name] == ["caf\u00e9"]


def test_dead_links_are_listed_and_links_to_folders_followed_once(tmp_path):
    """They were passed over, and the dataset was smaller than it is."""
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (root / "a", elsewhere):
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(b"x")
    (root / "gone.png").symlink_to(tmp_path / "annex" / "key.png")
    (root / "gone").symlink_to(tmp_path / "annex")
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "circle").symlink_to(root)
    assert [folder.name for folder in listing.list_folders(root)] == ["a", "b", "gone"]
    assert list(listing.files_by_name(root, with_subfolders=True)) == ["a/x", "b/x", "gone"]
    assert list(listing.files_by_name(root)) == ["gone"]
    assert listing.find_missing([(root / "gone.png", root / "absent.png")]) == (
        [(root / "gone.png", root / "absent.png")], [],
    )  # fmt: skip
