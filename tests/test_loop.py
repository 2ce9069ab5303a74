"""utils/loop.py: a run saved and restored, kills between two files, skipped steps, running means, batches in order."""

import math
import time
from types import SimpleNamespace

import pytest
import torch

from utils import loop as loops
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.loop import (
    LoopState,
    SpeedWindow,
    check_finite,
    clip_gradients,
    load_batches,
    resume_run,
    running_means,
    to_device,
)
from utils.run import seed_dropout
from utils.sam2.embedding_cache import restore_maps
from utils.sam2.model import FrozenMaps

CPU = torch.device("cpu")


def make_run(seed=0):
    """A small network with dropout, its optimizer, a scaler that is off."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=False)


def update(model, optimizer, loop, select_by="val/iou", value=None):
    seed_dropout(0, loop.step, 0)
    loss = model(torch.ones(2, 3)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loop.step += 1
    running_means(loop.running, {"train/loss": loss.item()})
    if value is not None:
        return loop.take({"val/iou": value}, select_by)


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    monkeypatch.setattr(loops, "git_state", lambda: {"commit": None, "dirty": None})


def test_a_restored_run_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    run, loop = make_run(), LoopState()
    for _ in range(3):
        update(*run[:2], loop)
    loop.take({"val/iou": 0.5}, "val/iou")
    loop.rows.append({"step": 3, "val/iou": 0.5})
    loops.save_run(tmp_path, loop, *run, {"script": "x", "config": {"seed": 0}}, {}, is_best=True)
    for _ in range(2):
        update(*run[:2], loop)

    other = make_run(seed=7)
    (tmp_path / "new").mkdir()
    again = resume_run(tmp_path / "last.pt", tmp_path / "new", *other)
    assert (again.step, again.evaluated_step, again.rows) == (3, 3, [{"step": 3, "val/iou": 0.5}])
    for _ in range(2):
        update(*other[:2], again)
    assert again == loop  # the same losses: weights, moments and dropout went on
    for ours, theirs in zip(run[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_last_pt_is_plain_and_best_pt_has_no_optimizer(tmp_path):
    run, loop = make_run(), LoopState()
    update(*run[:2], loop, value=0.5)
    description = {"script": "x", "config": {"seed": 0}, "class_weights": [1.0, 2.0]}
    loops.save_run(tmp_path, loop, *run, description, {"train": ["a"]}, is_best=True)
    best, last = load_checkpoint(tmp_path / "best.pt"), load_checkpoint(tmp_path / "last.pt")
    assert best.keys() == {"format", "script", "config", "class_weights", "model", "git", "metrics"}
    assert best["metrics"] == {"step": 1, "val/iou": 0.5} and best["class_weights"] == [1.0, 2.0]
    assert last.keys() - best.keys() == {"optimizer", "scaler", "loop", "splits", "best_keys"}


@pytest.mark.parametrize("was_on, is_on", [(False, True), (True, False), (True, True)])
def test_a_run_goes_on_where_precision_auto_is_another(was_on, is_on, tmp_path):
    """One in bf16 has no scale to give to one in fp16: PyTorch raised a RuntimeError."""
    *run, _ = make_run()
    loop, scaler = LoopState(), torch.amp.GradScaler("cpu", init_scale=8.0, enabled=was_on)
    update(*run, loop, value=0.5)
    loops.save_run(tmp_path, loop, *run, scaler, {}, {}, is_best=True)
    (tmp_path / "new").mkdir()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=is_on)
    resume_run(tmp_path / "last.pt", tmp_path / "new", *run, scaler)
    assert scaler.get_scale() == (1.0 if not is_on else 8.0 if was_on else 4.0)


@pytest.mark.parametrize("is_killed_between", [False, True])
def test_best_pt_follows_last_pt(tmp_path, is_killed_between, monkeypatch):
    run, loop = make_run(), LoopState()
    update(*run[:2], loop, value=0.5)
    loops.save_run(tmp_path, loop, *run, {"script": "x"}, {}, is_best=True)
    is_best = update(*run[:2], loop, value=0.9)
    assert is_best
    if is_killed_between:

        def save(path, state):
            if path.name == "best.pt":
                raise KeyboardInterrupt
            save_checkpoint(path, state)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loops, "save_checkpoint", save)
            loops.save_run(tmp_path, loop, *run, {"script": "x"}, {}, is_best=True)
        assert load_checkpoint(tmp_path / "best.pt")["metrics"]["val/iou"] == 0.5
    else:
        loops.save_run(tmp_path, loop, *run, {"script": "x"}, {}, is_best=True)
    (tmp_path / "new").mkdir()
    resume_run(tmp_path / "last.pt", tmp_path / "new", *make_run(seed=1))
    best = load_checkpoint(tmp_path / "new" / "best.pt")
    assert best["metrics"] == {"step": 2, "val/iou": 0.9} and best["script"] == "x"
    assert all(torch.equal(best["model"][name], values) for name, values in run[0].state_dict().items())


def test_a_worse_evaluation_leaves_the_best_as_it_is(tmp_path):
    run, loop = make_run(), LoopState()
    assert update(*run[:2], loop, value=0.5) and loop.bad_evals == 0
    loops.save_run(tmp_path, loop, *run, {}, {}, is_best=True)
    weights = load_checkpoint(tmp_path / "best.pt")["model"]
    for number, value in enumerate([0.5, 0.4], start=1):  # as good is not better
        assert not update(*run[:2], loop, value=value) and loop.bad_evals == number
    loops.save_run(tmp_path, loop, *run, {}, {}, is_best=False)
    assert loop.start_metrics == loop.best == {"step": 1, "val/iou": 0.5} and loop.evaluated_step == 3
    (tmp_path / "new").mkdir()
    resume_run(tmp_path / "last.pt", tmp_path / "new", *make_run(seed=1))
    best = load_checkpoint(tmp_path / "new" / "best.pt")["model"]
    assert all(torch.equal(best[name], weights[name]) for name in weights)


def test_running_means_are_those_of_the_closed_form():
    values, running = [3.0, 1.0, 4.0, 1.5], {}
    for count in range(1, 5):
        mean = running_means(running, {"train/loss": values[count - 1], "train/iou": 1.0})
        weights = [0.99 ** (count - 1 - k) for k in range(count)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert mean == pytest.approx({"train/loss": expected, "train/iou": 1.0})


def test_a_loss_that_is_not_finite_stops_and_names_step_and_files():
    assert check_finite(0.5, 3, "pictures a.png") == 0.5
    for loss in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match=rf"loss is {loss} at step 3, pictures a.png, b.png"):
            check_finite(loss, 3, "pictures a.png, b.png")


class HalfScaler:
    """A scaler that is on and changes nothing: what the count of skipped steps depends on."""

    def __init__(self, is_on):
        self.is_on = is_on

    def unscale_(self, optimizer):
        pass

    def is_enabled(self):
        return self.is_on


def clip(gradient, scaler, loop, clip_norm=1.0):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor(gradient)
    norm = clip_gradients([parameter], clip_norm, None, scaler, loop, "pairs a, b")
    return norm, parameter.grad.tolist()


def test_gradients_are_clipped_and_their_norm_returned():
    loop = LoopState()
    assert clip([3.0, 4.0], HalfScaler(False), loop) == (5.0, pytest.approx([0.6, 0.8], rel=1e-5))
    assert clip([3.0, 4.0], HalfScaler(False), loop, clip_norm=None) == (5.0, [3.0, 4.0])
    assert loop == LoopState()


def test_overflows_are_counted_and_too_many_in_a_row_stop():
    loop, scaler = LoopState(), HalfScaler(True)
    for _ in range(3):
        clip([math.inf, 0.0], scaler, loop)
    assert (loop.num_skipped, loop.skipped_in_a_row) == (3, 3)
    clip([1.0, 0.0], scaler, loop)
    assert (loop.num_skipped, loop.skipped_in_a_row) == (3, 0)
    with pytest.raises(FloatingPointError, match="50 steps in a row, the last is step 0: nothing is learned; use prec"):
        for _ in range(50):
            clip([math.inf, 0.0], scaler, loop)
    with pytest.raises(FloatingPointError, match="gradient norm is inf at step 0, pairs a, b"):
        clip([math.inf, 0.0], HalfScaler(False), LoopState())


@pytest.mark.parametrize("name", ["cpu", "mps", "cuda"])
def test_batches_overlap_the_program_on_cuda_alone(name, monkeypatch):
    """On mps a batch that has been freed could be read."""
    overlaps = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: overlaps.append(non_blocking) or self)
    batch = {"images": torch.zeros(2), "names": ["a", "b"]}
    assert to_device(batch, torch.device(name)) == batch and overlaps == [name == "cuda"]
    pictures = FrozenMaps(*torch.zeros(3, 1), is_projected=True, dtypes=[CPU] * 3)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *args, non_blocking=None: overlaps.append(non_blocking) or self
    )
    restore_maps(pictures, torch.device(name))
    assert overlaps[1::2] == [name == "cuda"] * 3  # each goes to the device, then to its type


class Indices(torch.utils.data.Dataset):
    def __getitem__(self, sample_index):
        return sample_index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_continue_at_a_sample_and_end_at_another(num_workers):
    state = torch.get_rng_state()
    batches = load_batches(Indices(), list, 6, 14, 4, num_workers, CPU)
    assert list(batches) == [[6, 7, 8, 9], [10, 11, 12, 13]]
    assert torch.equal(torch.get_rng_state(), state)  # torch's stream was not drawn from


def test_speed_leaves_evaluations_out_and_counts_the_wait_for_data():
    def slow():
        time.sleep(0.1)
        yield {}

    window = SpeedWindow(step=10)
    window.next_batch(slow())
    with window.paused():
        time.sleep(0.5)
    steps_per_s, wait_share = window.read(step=12)
    assert 2 / 0.4 < steps_per_s < 2 / 0.1 and 0.3 < wait_share <= 1
    assert window.first_step == 12 and window.waited_s == 0


def test_equal_scores_are_told_apart_by_their_loss():
    """With one class in validation the first perfect score stayed best.pt for ever."""
    loop, is_best = LoopState(), []
    for score, loss in ((0.5, 0.1), (1.0, 0.9), (1.0, 0.3), (1.0, 0.4), (1.0, 0.3)):
        is_best.append(loop.take({"val/mean_iou": score, "val/loss": loss}, "val/mean_iou"))
    assert is_best == [True, True, True, False, False] and loop.bad_evals == 2
    assert LoopState(best={"val/ao": 1.0}).take({"val/ao": 1.0}, "val/ao") is False  # nothing to tell them apart by


# ---------------------------------------------------------------------------------------------------------------------
# a dataset that changed before a run is resumed


def samples_of(splits):
    return {split: [SimpleNamespace(name=name) for name in names] for split, names in splits.items()}


def test_new_samples_change_no_split_of_a_resumed_run(capsys):
    """They moved a training picture into the test set, and best and last were compared on 3 and 6 pictures."""
    stored = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
    now = samples_of({"train": ["new", "b", "c"], "val": ["d", "newer"], "test": ["a"], "other": ["x"]})
    names = loops.split_names(loops.keep_splits(stored, now))
    assert names == {"train": ["a", "b"], "val": ["c"], "test": ["d"], "other": ["x"]}
    assert (
        capsys.readouterr().out
        == "resumed with the samples that the run had; left out 2 others, new or unusable then: new, newer\n"
    )
    assert loops.keep_splits({}, now) == now  # an older file


def test_samples_that_are_gone_stop_a_resumed_run():
    with pytest.raises(ValueError, match="^2 of the 3 samples of the run to resume are not in .*: train b, val c; put"):
        loops.keep_splits({"train": ["a", "b"], "val": ["c"]}, samples_of({"train": ["a"], "val": ["e"]}))
