"""Checkpoints of an earlier commit, 51375af, are read, and give what they gave there: in all five scripts.

older_checkpoints/<script>.json describe a best.pt and a last.pt that this commit's trainers wrote in the middle of a
tiny run (before step 4 of 5 in train_unet.py, 4 of 4 in train_sam2.py, 3 of 3 in train_siamfc.py; with the overrides
that their configs show): all values but those of tensors, of which they keep types and shapes. A seed fills these, as
`rebuild` says. "results" are what the commands below then wrote with that commit on such files and the same pictures,
in one thread and with MKL_CBWR=AUTO,STRICT (conftest.py): numbers, and hashes of weights and files; "recorded on" says
on which torch and processor. The weights of sam2_resume were recorded anew when the rounds' gradients came to be added
up in the order of the rounds.
"""

import json
import math
from pathlib import Path

import pytest
import tiny
import tiny_segmentation
import tiny_tracking
import tiny_training
import torch
from recorded import check_numbers, collect_results, skip_on_another_machine

import infer_sam2
import track
import train_sam2
import train_siamfc
import train_unet

OLDER = Path(__file__).resolve().parent / "older_checkpoints"
AUTOMATIC = (
    "points_per_side=4", "crop_n_layers=0", "pred_iou_thresh=-10", "stability_score_thresh=0", "box_nms_thresh=0.95",
)  # fmt: skip
# name: (trainer that wrote the files, script that reads them, arguments)
COMMANDS = {
    "unet_predict": (
        "train_unet",
        train_unet,
        "mode=predict checkpoint=RUN/best.pt input=DATA/images/005.png probabilities=true",
    ),
    "unet_evaluate": ("train_unet", train_unet, "mode=evaluate checkpoint=RUN/best.pt"),
    "unet_resume": ("train_unet", train_unet, "resume=RUN"),
    "sam2_evaluate": ("train_sam2", train_sam2, "TINY train.steps=0 fast_decoder=false model.checkpoint=RUN/best.pt"),
    "sam2_resume": ("train_sam2", train_sam2, "resume=RUN"),
    "infer_prompts": (
        "train_sam2",
        infer_sam2,
        "mode=prompts input=DATA/images/101.png checkpoint=RUN/best.pt fast_decoder=false "
        "boxes=[[5,5,20,40],[30,10,60,40]]",
    ),
    "infer_automatic": (
        "train_sam2",
        infer_sam2,
        "input=DATA/images/101.png checkpoint=RUN/best.pt fast_decoder=false "
        + " ".join(f"automatic.{key}" for key in AUTOMATIC),
    ),
    "siamfc_resume": ("train_siamfc", train_siamfc, "resume=RUN"),
    "track": ("train_siamfc", track, "checkpoint=RUN/best.pt input=DATA/val/val_001"),
    "track_last": ("train_siamfc", track, "checkpoint=RUN/last.pt input=DATA/val/val_001 tracker.mode=parity"),
}


def rebuild(entry, generator: torch.Generator, name: str = ""):
    """Turn a file's description into what it held, with made-up tensors: the same on every machine, and harmless.

    Args:
        entry: plain values as they are; "tensor float32 4 3" stands for a tensor (4, 3), {"int keys": {"0": ...}} for a
            dict with int keys, {"tuple": [...]} for a tuple.
        generator: of the tensors' values, uniform and thus exact: of weights by their fan-in, of norms around 1, of
            variances and second moments above 0, of scalars (counted updates) 2.
        name: its place in the file, such as model.conv.weight.
    """
    if isinstance(entry, dict):
        if entry.keys() == {"tuple"}:
            return tuple(rebuild(value, generator, name) for value in entry["tuple"])
        if entry.keys() == {"int keys"}:
            return {int(key): rebuild(value, generator, f"{name}.{key}") for key, value in entry["int keys"].items()}
        return {key: rebuild(value, generator, f"{name}.{key}") for key, value in entry.items()}
    if isinstance(entry, list):
        return [rebuild(value, generator, name) for value in entry]
    if not isinstance(entry, str) or not entry.startswith("tensor "):
        return entry
    _, dtype, *shape = entry.split()
    dtype, shape = getattr(torch, dtype), [int(side) for side in shape]
    if name == ".torch_rng":
        return generator.get_state()
    if not shape:
        return torch.tensor(2, dtype=dtype)
    uniform = torch.rand(shape, generator=generator, dtype=dtype)
    if name.endswith(("running_var", "exp_avg_sq")):
        return (0.5 + uniform) * (1e-6 if name.endswith("sq") else 1)
    if name.endswith(("exp_avg", "momentum_buffer")):
        return (uniform - 0.5) * 1e-3
    if len(shape) == 1:  # of a norm, or a bias or running mean
        return name.endswith("weight") + 0.2 * (uniform - 0.5)
    return (uniform - 0.5) * (24 / math.prod(shape[1:])) ** 0.5


def write_checkpoints(script: str, root: Path, run_dir: Path) -> None:
    """Write best.pt and last.pt as the script of 51375af wrote them after training on the dataset in root."""
    run_dir.mkdir()
    description = json.loads((OLDER / f"{script}.json").read_text().replace("/elsewhere/data", root.as_posix()))
    for name, seed in (("best", 25), ("last", 31)):  # such that the U-Net predicts each class somewhere
        state = rebuild(description[name], torch.Generator().manual_seed(seed))
        torch.save(state, run_dir / f"{name}.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{trainer: (folder of the dataset, folder with best.pt and last.pt)}."""
    folders = {}
    for script, write_dataset in (
        ("train_unet", tiny_segmentation.write_dataset),
        ("train_sam2", tiny_training.write_dataset),
        ("train_siamfc", tiny_tracking.write_got10k),
    ):
        root = write_dataset(tmp_path_factory.mktemp(script) / "data")
        write_checkpoints(script, root, root.parent / "run")
        folders[script] = root, root.parent / "run"
    return folders


@pytest.mark.parametrize("name", COMMANDS)
def test_older_checkpoints_give_their_results(name, files, tmp_path, one_thread, monkeypatch, capfd):
    tiny.draw_the_loss_alone(monkeypatch)
    trainer, script, arguments = COMMANDS[name]
    root, run_dir = files[trainer]
    arguments = arguments.replace("RUN", run_dir.as_posix()).replace("DATA", root.as_posix())
    tiny_overrides = tiny_training.tiny_overrides(root) if "TINY" in arguments else ["device=cpu", "num_workers=0"]
    status, message = tiny.run_script(
        script, tmp_path / "new", *tiny_overrides, *arguments.replace("TINY ", "").split()
    )
    assert status == 0, message
    reads_removed_keys = name.startswith("unet") or name == "siamfc_resume"  # infer and track read no training knob
    assert capfd.readouterr().out.count("left out, as they are no more: ") == reads_removed_keys
    numbers, hashes = collect_results(tmp_path / "new")
    description = json.loads((OLDER / f"{trainer}.json").read_text())
    recorded = description["results"][name]
    check_numbers(recorded["numbers"], numbers, name)
    skip_on_another_machine(description["recorded on"])
    assert hashes == recorded["hashes"]


def test_descriptions_are_small():
    assert all(path.stat().st_size < 100_000 for path in OLDER.iterdir())
