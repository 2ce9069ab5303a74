"""Checkpoints given to the wrong script, and files of other programs: one line each, or their weights are taken.

Tried beside those of the bug reports: Lightning's and mmsegmentation's files, an optimizer's state alone, a tensor, a
list, a TorchScript archive, a config that is text, a text file and an empty one named .pt, a cut zip.
"""

import copy
import math

import pytest
import tiny
import tiny_tracking
import torch
from trainers import make_trainer

import infer_sam2
import track
import train_sam2
import train_siamfc
import train_unet
from utils.tracking.siamfc import SiamFC, load_siamfc

TRAINERS = {"train_sam2": train_sam2, "train_unet": train_unet, "train_siamfc": train_siamfc}
READERS = {  # script and arguments that read a file
    "infer": (infer_sam2, "checkpoint={file}", "input={root}/images/001.png"),
    "start of train_sam2": (
        train_sam2, "model=sam2_nano", "model.checkpoint={file}", "data=label_map", "data.root={root}",
    ),
    "predict": (train_unet, "mode=predict", "checkpoint={file}", "input={root}/images/001.png"),
    "evaluate": (train_unet, "mode=evaluate", "checkpoint={file}", "data.root={root}"),
    "summary": (train_unet, "mode=summary", "checkpoint={file}"),
    "track": (track, "checkpoint={file}", "input={root}/images", "box=[2,3,20,20]"),
    "start of train_siamfc": (train_siamfc, "model.checkpoint={file}", "data=got10k", "data.root={videos}"),
    "resume of train_sam2": (train_sam2, "resume={file}"),
    "resume of train_unet": (train_unet, "resume={file}"),
    "resume of train_siamfc": (train_siamfc, "resume={file}"),
}  # fmt: skip
OWN = {"train_sam2": ("infer", "start of train_sam2"), "train_unet": ("predict", "evaluate", "summary"),
       "train_siamfc": ("track", "start of train_siamfc")}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    tiny.make_runs_quick(train_sam2, monkeypatch)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_trainer("train_sam2", folder / "pictures")
    tiny_tracking.write_got10k(folder / "videos", num_val=1, num_frames=3)
    return {"root": folder / "pictures", "videos": folder / "videos"}


def read_with(reader: str, file, places, run_dir) -> tuple[int, str]:
    script, *arguments = READERS[reader]
    arguments = [argument.format(file=file, **places) for argument in arguments]
    return tiny.run_script(script, run_dir, "device=cpu", "num_workers=0", *arguments)


@pytest.mark.parametrize("writer", TRAINERS)
def test_a_file_of_another_script_is_named(writer, places, tmp_path, capfd):
    """KeyError: 'backbone', 'optimizer', ..."""
    config = tiny.compose_config(writer)
    state = {"format": 1, "script": writer, "config": config, "model": torch.nn.Conv2d(3, 2, 3).state_dict()}
    torch.save(state | {"metrics": {}, "git": {}}, tmp_path / "file.pt")
    for number, reader in enumerate(READERS):
        if reader in OWN[writer]:
            continue
        status, message = read_with(reader, tmp_path / "file.pt", places, tmp_path / str(number))
        assert status == 1 and message.startswith("error: ") and "\n" not in message, reader
        script = READERS[reader][0].__name__
        if reader == f"resume of {writer}":
            assert "which has no optimizer; give the last.pt of a run of" in message, reader
        else:
            expected = {"infer_sam2": "train_sam2", "track": "train_siamfc"}.get(script, script)
            assert f"was not written by {expected}.py" in message and writer in message, reader
    assert "Traceback" not in "".join(capfd.readouterr())


def foreign_files():
    weights = {"conv.weight": torch.ones(2, 3, 3, 3), "conv.bias": torch.zeros(2)}
    return {
        "weights alone": weights,
        "Lightning": {"state_dict": weights, "hyper_parameters": {"lr": 0.1}, "pytorch-lightning_version": "2.4"},
        "mmsegmentation": {"meta": {"classes": ["a"]}, "state_dict": weights},
        "a config of another kind": {"model": weights, "config": {"lr": 0.1}},
        "a config that is text": {"model": weights, "config": "lr: 0.1"},
        "an optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1).state_dict(),
        "a tensor": torch.ones(3),
        "a list": [1, 2],
        "empty": {},
        "weights that are none": {"model": None},
    }


@pytest.mark.parametrize("kind", foreign_files())
def test_a_file_of_another_program_is_one_line_in_every_script(kind, places, tmp_path, capfd):
    torch.save(foreign_files()[kind], tmp_path / "file.pt")
    for number, reader in enumerate(READERS):
        status, message = read_with(reader, tmp_path / "file.pt", places, tmp_path / str(number))
        assert status == 1 and message.startswith("error: ") and "file.pt" in message, reader
        assert "\n" not in message, reader
    assert "Traceback" not in "".join(capfd.readouterr())


def test_what_is_no_checkpoint_is_one_line_in_every_script(places, tmp_path, capfd):
    files = {"text.pt": b"not a checkpoint", "empty.pt": b"", "zip.pt": b"PK\3\4" + bytes(99)}
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for number, name in enumerate([*files, "script.pt"]):
        for reader in READERS:
            status, message = read_with(reader, tmp_path / name, places, tmp_path / f"{number}{reader}")
            assert status == 1 and message.startswith("error: ") and name in message, (reader, name)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "wrapper, prefix", [(None, ""), ("state_dict", "module."), ("model", "_orig_mod."), ("net", "model.")]
)
def test_siamfc_weights_are_taken_out_of_wrappers(wrapper, prefix, tmp_path, capsys):
    weights = SiamFC(score_bias=True).state_dict()
    wrapped = {prefix + name: values for name, values in weights.items()}
    torch.save({wrapper: wrapped} if wrapper else wrapped, tmp_path / "file.pt")
    loaded = load_siamfc(tmp_path / "file.pt").state_dict()
    assert not tiny.differences(dict(weights), dict(loaded))
    assert ("without" in capsys.readouterr().out) == (wrapper not in (None, "model") or prefix != "")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_spoilt_weights_are_refused_where_they_are_read(value, places, tmp_path, capfd):
    """0 masks, or a box in the frame's corner, were what followed."""
    weights = SiamFC(score_bias=False).state_dict()
    spoilt = copy.deepcopy(weights)
    spoilt["backbone.conv3.0.weight"][0, 0, 0, 0] = value
    torch.save({"model": spoilt}, tmp_path / "file.pt")
    for number, reader in enumerate(("track", "start of train_siamfc", "infer")):
        status, message = read_with(reader, tmp_path / "file.pt", places, tmp_path / str(number))
        assert status == 1 and "file.pt has nan or infinity in backbone.conv3.0.weight" in message, reader
