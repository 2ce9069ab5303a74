"""Settings: typed dataclasses from sections of the config, keys of functions, and errors as one line."""

import functools
import logging
import re
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import pytest
import tiny
import torch
from omegaconf import OmegaConf

import infer_sam2
import track
import train_sam2
import train_siamfc
import train_unet
from utils import settings
from utils.settings import ALL_OTHERS, FINITE, SAME_SECTION, Rule, above, at_least, between, of_length, one_of

# ---------------------------------------------------------------------------------------------------------------------
# types and keys


@dataclass(frozen=True)
class Knobs:
    steps: int
    lr: float
    name: str
    is_quick: bool
    parts: list
    counts: list[int]
    size: int | None
    note: str | None = None


KNOBS = {"steps": 3, "lr": 0.5, "name": "a", "is_quick": False, "parts": [{"b": 2}], "counts": [1, 2], "size": None}


def test_settings_are_the_values_of_their_section():
    assert settings.read_settings(Knobs, KNOBS, "train") == Knobs(**KNOBS)
    for more in ({"lr": 1}, {"size": 7}, {"note": "x"}, {"parts": []}, {"counts": []}):  # a whole number is a number
        assert settings.read_settings(Knobs, KNOBS | more, "") == Knobs(**KNOBS | more)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"steps": "abc"}, "train.steps is 'abc'; must be a whole number"),
        ({"steps": 2.0}, "train.steps is 2.0; must be a whole number"),
        ({"steps": True}, "train.steps is True; must be a whole number"),  # for Python it is one
        ({"steps": None}, "train.steps is None; must be a whole number"),
        ({"lr": "1e-5"}, "train.lr is '1e-5'; must be a number"),
        ({"lr": False}, "train.lr is False; must be a number"),
        ({"name": 3}, "train.name is 3; must be text"),
        ({"is_quick": "maybe"}, "train.is_quick is 'maybe'; must be true or false"),
        ({"is_quick": 1}, "train.is_quick is 1; must be true or false"),
        ({"parts": "a"}, "train.parts is 'a'; must be a list"),
        ({"counts": 1}, "train.counts is 1; must be a list, each a whole number"),
        ({"counts": [1, 2.5]}, "train.counts is [1, 2.5]; must be a list, each a whole number"),
        ({"size": "big"}, "train.size is 'big'; must be a whole number or null"),
        ({"note": 5}, "train.note is 5; must be text or null"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_section(change, line):
    with pytest.raises(ValueError) as error:
        settings.read_settings(Knobs, KNOBS | change, "train")
    assert str(error.value) == line


def test_unknown_and_missing_keys_are_named_with_their_section():
    with pytest.raises(ValueError, match="^unknown key train.stepz; must be among train.steps, train.lr, "):
        settings.read_settings(Knobs, KNOBS | {"stepz": 3}, "train")
    with pytest.raises(ValueError, match="^unknown key stepz; must be among steps, lr, "):
        settings.read_settings(Knobs, KNOBS | {"stepz": 3}, "")
    with pytest.raises(ValueError, match="^the config lacks train.lr; must be a number$"):
        settings.read_settings(Knobs, {key: value for key, value in KNOBS.items() if key != "lr"}, "train")
    with pytest.raises(ValueError, match="^train is 3; must be a section of keys and values$"):
        settings.read_settings(Knobs, 3, "train")


# ---------------------------------------------------------------------------------------------------------------------
# ranges, sections in sections


SCRIPTS = [
    (train_sam2, "train"), (infer_sam2, "infer"), (train_unet, "train"), (train_siamfc, "train"), (track, "track"),
]  # fmt: skip
BELOW_1 = Rule(lambda number: 0 <= number < 1, "0 or more and below 1")


@dataclass(frozen=True)
class Ranges:
    steps: Annotated[int, at_least(0)] = 0
    share: Annotated[float, between(0, 1)] = 0.5
    momentum: Annotated[float, BELOW_1] = 0.9
    lr: Annotated[float, above(0)] = 1e-3
    clip_norm: Annotated[float | None, above(0)] = None
    fps: Annotated[float, above(0), FINITE] = 25
    betas: Annotated[list[float], of_length(2, "two numbers")] = (0.9, 0.999)
    fit: Annotated[str, one_of("resize", "crop")] = "crop"
    name: Annotated[str, one_of("adamw", "adam", "sgd")] = "sgd"


@pytest.mark.parametrize(
    "change, line",
    [
        ({"steps": -1}, "train.steps is -1; must be 0 or more"),
        ({"steps": 0.5}, "train.steps is 0.5; must be a whole number"),
        ({"steps": True}, "train.steps is True; must be a whole number"),
        ({"share": 1.01}, "train.share is 1.01; must be between 0 and 1"),
        ({"share": float("nan")}, "train.share is nan; must be between 0 and 1"),
        ({"momentum": 1}, "train.momentum is 1; must be 0 or more and below 1"),
        ({"lr": 0}, "train.lr is 0; must be above 0"),
        ({"lr": "0"}, "train.lr is '0'; must be a number"),
        ({"clip_norm": 0.0}, "train.clip_norm is 0.0; must be null, or above 0"),
        ({"clip_norm": "x"}, "train.clip_norm is 'x'; must be a number or null"),
        ({"fit": "pad"}, "train.fit is pad; must be resize or crop"),
        ({"name": "rmsprop"}, "train.name is rmsprop; must be one of adamw, adam, sgd"),
        ({"fps": float("inf")}, "train.fps is inf; must be finite"),
        ({"fps": -1.0}, "train.fps is -1.0; must be above 0"),
        ({"betas": [0.9]}, "train.betas is [0.9]; must be two numbers"),
        ({"betas": ["a", "b"]}, "train.betas is ['a', 'b']; must be a list, each a number"),
    ],
)
def test_a_value_out_of_its_range_is_named_with_its_section(change, line):
    with pytest.raises(ValueError) as error:
        settings.read_settings(Ranges, change, "train")
    assert str(error.value) == line


def test_values_at_the_ends_of_their_ranges_are_taken():
    changes = [{"share": 0}, {"share": 1}, {"momentum": 0}, {"clip_norm": 1e-9}, {"clip_norm": None}, {"steps": 0}]
    for change in (*changes, {"clip_norm": float("inf")}, {"fit": "resize"}, {"betas": [1, 2]}):
        assert settings.read_settings(Ranges, change) == Ranges(**change)


@dataclass(frozen=True)
class Crop:
    scale: float
    size: Annotated[int, at_least(1)] = 8


@dataclass(frozen=True)
class Data:
    crop: Annotated[Crop, SAME_SECTION]
    reader: Annotated[dict, ALL_OTHERS]
    hflip: bool = True


@dataclass(frozen=True)
class Config:
    seed: int
    data: Data
    train: Ranges = field(default_factory=Ranges)
    cache: str = "off"


def test_sections_become_dataclasses_and_a_reader_gets_the_keys_left_over():
    section = {"seed": 1, "data": {"root": "x", "scale": 0.5, "split": [1]}, "train": {"steps": 3}}
    assert settings.read_settings(Config, section) == Config(
        1, Data(Crop(0.5), {"root": "x", "split": [1]}), Ranges(steps=3)
    )


@pytest.mark.parametrize(
    "change, line",
    [
        ({"train": {"stepz": 3}}, "^unknown key train.stepz; must be among train.steps, train.share, "),
        ({"train": 3}, "^train is 3; must be a section of keys and values$"),
        ({"train": {"lr": -1}}, "^train.lr is -1; must be above 0$"),
        ({"trian": {"steps": 3}}, "^unknown key trian; must be among seed, data, train, cache$"),
        ({"data": {"root": "x"}}, "^the config lacks data.scale; must be a number$"),
        ({"data": {"scale": 1.0, "size": 0}}, "^data.size is 0; must be 1 or more$"),
        ({"data": {"scale": 1.0, "hflip": 1}}, "^data.hflip is 1; must be true or false$"),
        ({"seed": None}, "^seed is None; must be a whole number$"),
    ],
)
def test_a_mistake_in_a_section_of_a_section_is_named(change, line):
    with pytest.raises(ValueError, match=line):
        settings.read_settings(Config, {"seed": 1, "data": {"scale": 0.5}} | change)


def test_a_section_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="^the config lacks data; must be keys and values$"):
        settings.read_settings(Config, {"seed": 1})


def test_fields_that_were_added_later_are_filled_in_and_nothing_else():
    stored = {"seed": 1, "data": {"scale": 0.5, "root": "x"}, "train": {"steps": 3}}
    filled = settings.fill_defaults(Config, stored)
    assert filled["cache"] == "off" and filled["data"] == {"scale": 0.5, "root": "x", "size": 8, "hflip": True}
    assert filled["train"] == Ranges(steps=3).__dict__ and filled["seed"] == 1
    assert stored == {"seed": 1, "data": {"scale": 0.5, "root": "x"}, "train": {"steps": 3}}
    assert settings.fill_defaults(Config, filled) == filled


def test_a_key_that_the_mode_has_no_use_for_is_refused():
    modes_of_key = {"input": ("track",), "results": ("benchmark", "evaluate")}
    for given, mode in (([], "track"), (["input"], "track"), (["results"], "benchmark"), (["results"], "evaluate")):
        settings.check_modes(given, modes_of_key, mode)
    with pytest.raises(ValueError) as error:
        settings.check_modes(["input", "results"], modes_of_key, "track")
    line = "results= is given but mode is track, which does not use it: leave it out, or take mode="
    assert str(error.value) == line + "benchmark or mode=evaluate"


# ---------------------------------------------------------------------------------------------------------------------
# keys of functions


def test_keys_that_a_function_does_not_take_or_lacks_are_named():
    def split(root, val_fraction, seed=0):
        pass

    bound = functools.partial(split, "folder")
    settings.check_keys(bound, {"val_fraction": 0.1}, "data")
    settings.check_keys(bound, {"val_fraction": 0.1, "seed": 3}, "data")
    with pytest.raises(ValueError, match="^unknown key data.sed; must be among data.val_fraction, data.seed$"):
        settings.check_keys(bound, {"val_fraction": 0.1, "sed": 3}, "data")
    with pytest.raises(ValueError, match="^the config lacks data.val_fraction$"):
        settings.check_keys(bound, {"seed": 3}, "data")
    settings.check_keys(lambda first, **others: None, {"first": 1, "anything": 2}, "data")


def test_values_for_a_function_are_checked_by_its_annotations():
    def build(images, depth: Annotated[int, at_least(1)], up: str, parts: list[str] | None = None, device=None):
        pass

    bound = functools.partial(build, "images")
    settings.check_keys(bound, {"depth": 2, "up": "bilinear", "parts": None, "device": object()}, "model")
    for change, line in (
        ({"depth": 0}, "model.depth is 0; must be 1 or more"),
        ({"depth": "2"}, "model.depth is '2'; must be a whole number"),
        ({"up": 3}, "model.up is 3; must be text"),
        ({"parts": [1]}, r"model.parts is \[1\]; must be a list, each text or null"),
    ):
        with pytest.raises(ValueError, match=f"^{line}$"):
            settings.check_keys(bound, {"depth": 2, "up": "bilinear"} | change, "model")


# ---------------------------------------------------------------------------------------------------------------------
# errors


def test_an_error_of_a_data_loading_process_is_described_by_its_last_line():
    caught = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
    assert settings.describe_error(ValueError(caught + "ValueError: a.jpg is empty\n")) == "ValueError: a.jpg is empty"
    assert settings.describe_error(ValueError("differs:\n  train.steps")) == "differs:\n  train.steps"
    with pytest.raises(UnicodeEncodeError) as caught:  # a file's name of bytes in Latin-1
        "001\ncaf\udce9\n002".encode()
    line = r"the name 'caf\udce9' is not text in UTF-8; rename the file"
    assert settings.describe_error(caught.value) == line


@pytest.mark.parametrize(
    "error",
    [
        ValueError("train.steps is -1; must be 0 or more"), FileNotFoundError("no folder x"), FloatingPointError("nan"),
        OSError(28, "No space left on device", "last.pt.tmp"), PermissionError(13, "Permission denied", "samples"),
        ConnectionError("https://x cannot be reached"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_ends_in_one_line(error, caplog):
    with caplog.at_level(logging.DEBUG), pytest.raises(SystemExit) as stop, settings.one_line_errors("track", "less"):
        raise error
    assert stop.value.code == f"error: {error}" and "\n" not in stop.value.code
    assert [record.name for record in caplog.records] == ["track"] and caplog.records[0].exc_info[1] is error


CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.57 GiB of which 12.75 MiB is "
    "free. Including non-PyTorch memory, this process has 14.55 GiB memory in use. Of the allocated memory ..."
)


def fill_memory():
    torch.empty(10**15)


def fill_memory_of_numpy():
    np.empty(10**15)


def fill_device():
    raise torch.OutOfMemoryError(CUDA_MESSAGE)


@pytest.mark.parametrize("script, work", SCRIPTS)
@pytest.mark.parametrize(
    "fill, amounts",
    [
        (fill_memory, r"DefaultCPUAllocator: .* allocate 4000000000000000 bytes\..*; this machine has [\d.]+ GiB"),
        (fill_memory_of_numpy, r"Unable to allocate 7.11 PiB .*; this machine has [\d.]+ GiB"),
        (fill_device, r".* 2.00 GiB. GPU 0 has a total capacity of 14.57 GiB of which 12.75 MiB is free"),
    ],
)
def test_out_of_memory_is_one_line_in_every_script(fill, amounts, script, work, tmp_path, monkeypatch, capfd):
    """What was done, how much there is, and two settings, which are there."""
    monkeypatch.setattr(script, work, lambda *args: fill())
    arguments = ["input=photo.png"] if work == "infer" else []
    status, message = tiny.run_script(script, tmp_path / "run", *arguments)
    assert status == 1 and "Traceback" not in "".join(capfd.readouterr())
    found = re.fullmatch(rf"error: out of memory in main: {amounts}; try a smaller (\S+?),? or (\S+)", message)
    assert found, message
    config = OmegaConf.create(tiny.compose_config(script.__name__, *arguments))
    for key in found.groups():
        section, _, name = key.partition("=")[0].rpartition(".")
        assert name in (OmegaConf.select(config, section) if section else config), key


def test_mistakes_of_ours_keep_their_traceback():
    with pytest.raises(KeyError), settings.one_line_errors("track", "less"):
        raise KeyError("channels")


@pytest.mark.parametrize("script, work", SCRIPTS)
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "x.png.tmp"), PermissionError(13, "Permission denied", "samples")]
)
def test_a_full_disk_or_a_refused_folder_is_one_line_in_every_script(error, script, work, tmp_path, monkeypatch, capfd):
    def fail(*args):
        raise error

    monkeypatch.setattr(script, work, fail)
    arguments = ["input=photo.png"] if work == "infer" else []
    assert tiny.run_script(script, tmp_path / "run", *arguments) == (1, f"error: {error}")
    assert "Traceback" not in "".join(capfd.readouterr())
