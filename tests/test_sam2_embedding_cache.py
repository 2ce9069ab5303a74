"""utils/sam2/embedding_cache.py, and train_sam2.py and infer_sam2.py with a cache: the same results."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_training as tiny
import torch
import yaml
from forked import child_environment, run_python
from tiny import changed_config, compose_config, crash_at_step

import infer_sam2
import train_sam2
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.images import read_image, write_image
from utils.sam2 import embedding_cache, mask_generation
from utils.sam2 import model as models
from utils.sam2.embedding_cache import (
    FOOTER_BYTES,
    HEADER_BYTES,
    count_entry_bytes,
    describe_recipe,
    embed,
    entry_key,
    fill_cache,
    is_whole,
    join_pictures,
    plan_cache,
    read_entry,
    restore_maps,
    write_entry,
)
from utils.sam2.model import FrozenMaps, build_sam2, encode, encode_frozen, preprocess, project_high_res

CPU = torch.device("cpu")
BUNDLED_TRUNK = models.ConvTrunk  # that the weights in checkpoints/ fit
NUM_ENTRIES = 8  # of the tiny dataset: 4 training pictures in both flips; the validation pictures are copies of them


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="module")
def filled(root, tmp_path_factory):
    """A folder that a run of one step has filled (fp16), to be copied."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.make_runs_quick(monkeypatch)
        tiny.script_evaluation(monkeypatch)
        tiny.train_in(folder / "run", tiny_config(root, f"cache={folder / 'cache'}", "train.steps=1"))
    return folder / "cache"


@pytest.fixture
def cache_dir(filled, tmp_path):
    """A filled folder of one's own."""
    return Path(shutil.copytree(filled, tmp_path / "cache"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """All models are narrow, as entries of one do not fit the other, but for the bundled one."""
    tiny.make_runs_quick(monkeypatch)


@pytest.fixture
def num_encoded(monkeypatch):
    """Grows by one entry for each picture that goes through the image encoder, with or without a cache."""
    calls = []
    for name in ("encode_frozen", "encode"):
        real = getattr(models, name)
        monkeypatch.setattr(models, name, lambda *args, real=real: calls.extend(args[1]) or real(*args))
    return calls


def tiny_config(root, *overrides):
    return tiny.configure(root, "prompts=point", *overrides)


def build_tiny(name="sam2_nano", image_size=64):
    torch.manual_seed(0)
    config = tiny.compose_config(f"model={name}", f"model.image_size={image_size}", "model.checkpoint=none")["model"]
    return build_sam2(**config, device="cpu")


def list_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plan_tiny(model, folder, root, stored="fp16", is_projected=False, flips=(False, True)):
    pictures = [(item.image_path, flip) for item in tiny.list_training_items(tiny_config(root)) for flip in flips]
    return plan_cache(model, str(folder), stored, "fp32", is_projected, pictures, None)


# ---------------------------------------------------------------------------------------------------------------------
# entries


@pytest.mark.parametrize("is_projected", [False, True])
def test_entries_do_not_depend_on_the_decoder(is_projected, root, tmp_path):
    """A run with fast_decoder=true must leave nothing behind that another run would not have written."""
    files = []
    for fast in (False, True):
        model = build_tiny()
        model.fast_decoder = fast
        plan = plan_tiny(model, tmp_path / str(fast), root, "fp32", is_projected)
        fill_cache(model, plan)
        files.append(list_files(tmp_path / str(fast)))
    assert files[0] == files[1] and len(files[0]) > 4


@pytest.mark.parametrize("name", ["sam2_nano", "sam2.1_hiera_tiny"])
@pytest.mark.parametrize("is_projected", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_entry_brings_back_what_was_encoded(name, is_projected, precision, root, tmp_path):
    """In fp32 bit for bit, in fp16 to half its last digit; the order of memory and the types are the encoder's."""
    model = build_tiny(name)
    for stored in ("fp32", "fp16"):
        pictures = [(root / "images" / f"{number}.png", flip) for number in ("001", "002") for flip in (False, True)]
        plan = plan_cache(model, str(tmp_path / stored), stored, precision, is_projected, pictures, None)
        assert plan.missing == pictures
        fill_cache(model, plan)
        parts = []
        for image_path, flip in pictures:
            entry_path = plan.entries[image_path, flip]
            assert entry_path.stat().st_size == count_entry_bytes(model, is_projected, stored)
            image_rgb = read_image(image_path)[:, ::-1] if flip else read_image(image_path)
            with torch.no_grad(), embedding_cache.autocast(CPU, precision):
                expected = encode(model, preprocess(image_rgb, 64)[None])
                maps = encode_frozen(model, preprocess(image_rgb, 64)[None])
                maps = project_high_res(model, maps) if is_projected else maps
                restored = restore_maps(read_entry(entry_path), CPU)
                embedded = embed(model, read_entry(entry_path))
            parts.append(read_entry(entry_path))
            assert restored.is_projected == is_projected
            pairs = [*zip(restored[:3], maps[:3], strict=True)]
            pairs += [(embedded.image_embeddings, expected.image_embeddings)]
            pairs += [*zip(embedded.high_res_features, expected.high_res_features, strict=True)]
            for ours, other in pairs:
                assert ours.dtype == other.dtype and ours.shape == other.shape and ours.stride() == other.stride()
                if stored == "fp32":
                    assert torch.equal(ours, other)
                limit = 2e-2 if precision == "bf16" else 4e-3
                torch.testing.assert_close(ours, other, atol=limit, rtol=limit)
        joined = join_pictures(parts)
        for level in range(3):
            assert torch.equal(joined[level], torch.cat([part[level] for part in parts]))
            last = parts[0][level].is_contiguous(memory_format=torch.channels_last)
            assert joined[level].is_contiguous(memory_format=torch.channels_last) == last


def test_size_is_the_issues():
    """About 20 MiB with the trunk's maps, 8 MiB after conv_s0 and conv_s1, for tiny and small at 1024 px in fp16."""
    for name in ("sam2.1_hiera_tiny", "sam2.1_hiera_small"):
        model = build_tiny(name)
        model.image_size = 1024
        assert round(count_entry_bytes(model, False, "fp16") / 2**20, 1) == 20.0
        assert round(count_entry_bytes(model, True, "fp16") / 2**20, 1) == 8.0
        assert round(count_entry_bytes(model, False, "fp32") / 2**20, 1) == 40.0


def test_entries_are_mapped_not_read(root, tmp_path):
    """Tensors of a picture lie in the file's mapping; writing to them never reaches the file."""
    model = build_tiny()
    plan = plan_tiny(model, tmp_path / "cache", root)
    fill_cache(model, plan)
    entry_path = next(iter(plan.entries.values()))
    before, stored = entry_path.read_bytes(), read_entry(entry_path)
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(entry_path.name):
            regions.append([int(side, 16) for side in line.split()[0].split("-")])
    assert len(regions) == 1
    assert all(regions[0][0] <= values.data_ptr() < regions[0][1] for values in stored[:3])
    stored[0].zero_()
    assert entry_path.read_bytes() == before
    del stored
    assert entry_path.name not in Path("/proc/self/maps").read_text()  # and nothing stays


def test_key_depends_on_all_that_the_content_depends_on(root):
    model, other_weights, other_size = (build_tiny() for _ in range(3))
    other_weights.image_encoder.trunk.stem[1].bias.data[0] += 1
    other_size.image_size = 96
    recipes = [describe_recipe(each, False, "fp16", "fp32") for each in (model, other_weights, other_size)]
    for changed in ((True, "fp16", "fp32"), (False, "fp32", "fp32"), (False, "fp16", "bf16")):
        recipes.append(describe_recipe(model, *changed))
    keys = {entry_key(recipe, "picture", False) for recipe in recipes}
    keys |= {entry_key(recipes[0], "picture", True), entry_key(recipes[0], "other", False)}
    assert len(keys) == len(recipes) + 2 and all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)


def test_hash_is_of_the_weights_that_were_used():
    model = build_tiny()
    hashes = [embedding_cache.hash_weights(model, is_projected) for is_projected in (False, True)]
    with torch.no_grad():
        model.no_mem_embed.add_(1)
        model.sam_mask_decoder.iou_token.weight.add_(1)
    assert [embedding_cache.hash_weights(model, is_projected) for is_projected in (False, True)] == hashes
    with torch.no_grad():
        model.sam_mask_decoder.conv_s1.bias[3] += 1e-3
    assert embedding_cache.hash_weights(model, False) == hashes[0]
    assert embedding_cache.hash_weights(model, True) != hashes[1]
    for name, values in list(model.image_encoder.named_parameters())[::9]:
        before = embedding_cache.hash_weights(model, False)
        values.data.view(-1)[-1] += 1e-3
        assert embedding_cache.hash_weights(model, False) != before, name
    other = build_tiny()
    other.load_state_dict(model.state_dict())
    model = model.to(memory_format=torch.channels_last)
    assert embedding_cache.hash_weights(model, False) == embedding_cache.hash_weights(other, False)


DAMAGES = {  # content and that of another entry -> content
    "truncated": lambda content, other: content[: len(content) // 2],
    "cut_by_one_byte": lambda content, other: content[:-1],
    "zeroed_tail": lambda content, other: content[:-5000] + bytes(5000),
    "zeroed_before_the_footer": lambda content, other: (
        content[: -FOOTER_BYTES - 4096] + bytes(4096) + content[-FOOTER_BYTES:]
    ),
    "one_bit": lambda content, other: (
        content[:HEADER_BYTES] + bytes([content[HEADER_BYTES] ^ 1]) + content[HEADER_BYTES + 1 :]
    ),
    "header": lambda content, other: content.replace(b"[1, 16", b"[1, 61", 1),
    "too_long": lambda content, other: content + b"0",
    "empty": lambda content, other: b"",
    "of_another_name": lambda content, other: other,
    "all_zeros": lambda content, other: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_torn_entry_is_found_and_made_again(damage, root, cache_dir, num_encoded, capsys):
    model = build_run_model(root)
    before = list_files(cache_dir)
    assert len(before) == NUM_ENTRIES
    *_, other_path, path = sorted(cache_dir.glob("*/*.emb"))
    path.write_bytes(DAMAGES[damage](path.read_bytes(), other_path.read_bytes()))
    assert path.read_bytes() != before[path.relative_to(cache_dir).as_posix()] and not is_whole(path)
    plan = plan_tiny(model, cache_dir, root)
    assert [plan.entries[picture] for picture in plan.missing] == [path]
    assert "7 pictures in" in (output := capsys.readouterr().out) and "1 damaged entries are made again" in output
    fill_cache(model, plan)
    assert len(num_encoded) == 1 and list_files(cache_dir) == before


def build_run_model(root):
    """The model of a run of `tiny_config`."""
    config = tiny_config(root)
    train_sam2.run.seed_everything(config["seed"])
    return build_sam2(**config["model"], device="cpu")


def test_entry_that_goes_away_during_a_run_is_named(root, cache_dir):
    path = sorted(cache_dir.glob("*/*.emb"))[0]
    for damage in (lambda: path.write_bytes(path.read_bytes()[:9000]), path.unlink):
        damage()
        with pytest.raises(ValueError, match=f"cache entry {path} was removed or damaged during the run .*; start"):
            read_entry(path)


@pytest.mark.parametrize(
    "value, message", [(7e4, "gives 70000 for .*001.png, which fp16 cannot hold"), (np.nan, "nan")]
)
def test_overflow_is_an_error_that_names_the_picture(value, message, tmp_path):
    maps = [torch.zeros(1, 2, side, side) for side in (16, 8, 4)]
    maps[1][0, 1, 2, 3] = -value
    path = tmp_path / "ab" / f"{'ab' * 32}.emb"
    with pytest.raises(ValueError, match=message):
        write_entry(path, FrozenMaps(*maps, False), "fp16", Path("some/001.png"))
    assert not path.exists()
    if value == 7e4:
        with pytest.raises(ValueError, match="use cache_precision=fp32"):
            write_entry(path, FrozenMaps(*maps, False), "fp16", Path("some/001.png"))
        write_entry(path, FrozenMaps(*maps, False), "fp32", Path("some/001.png"))
        assert read_entry(path)[1][0, 1, 2, 3] == -value


def test_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding_cache.os, "fsync", fail)
    path = tmp_path / "ab" / f"{'ab' * 32}.emb"
    maps = FrozenMaps(*(torch.zeros(1, 2, side, side) for side in (16, 8, 4)), False)
    with pytest.raises(ValueError, match="cannot be written .No space left on device.; use another folder"):
        write_entry(path, maps, "fp16", Path("some/001.png"))
    assert list(path.parent.iterdir()) == []


def test_what_killed_runs_left_is_removed_and_what_is_being_written_stays(root, cache_dir):
    old, young = (next(cache_dir.glob("*")) / name for name in ("old.emb.1.tmp", "young.emb.2.tmp"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    plan_tiny(build_run_model(root), cache_dir, root)
    assert not old.exists() and young.exists()


FILLER = """
import multiprocessing, sys
from pathlib import Path
import pytest
from test_sam2_embedding_cache import build_run_model, plan_tiny, tiny
from utils.sam2.embedding_cache import fill_cache

def fill(both):
    tiny.make_runs_quick(pytest.MonkeyPatch())
    model = build_run_model(Path(sys.argv[1]))
    plan = plan_tiny(model, sys.argv[2], Path(sys.argv[1]))
    print("missing", len(plan.missing), flush=True)
    both.wait(60)  # both have listed the empty folder before either writes
    fill_cache(model, plan)

context = multiprocessing.get_context("fork")
both = context.Barrier(2)
processes = [context.Process(target=fill, args=(both,)) for _ in range(2)]
[process.start() for process in processes]
[process.join(100) for process in processes]
sys.exit([process.exitcode for process in processes] != [0, 0])
"""


def test_two_processes_fill_one_folder_at_once(root, tmp_path, filled):
    done = run_python("-c", FILLER, root, tmp_path / "cache", cwd=tmp_path, environment=child_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines().count(f"missing {NUM_ENTRIES}") == 2
    assert list_files(tmp_path / "cache") == list_files(filled)  # whole, nothing else, and bit for bit


# ---------------------------------------------------------------------------------------------------------------------
# train_sam2.py


def run_losses(root, run_dir, *overrides):
    """The losses and gradient norms of a run's steps, and the values of its evaluations."""
    last = tiny.train_in(run_dir, tiny.configure(root, *overrides))
    rows = tiny.without_timing(last["metrics"])
    training = [[row["train/loss"], row["train/grad_norm"]] for row in rows if "train/loss" in row]
    return np.array(training), [row for row in rows if "val/iou_box" in row], last


@pytest.mark.parametrize("trainable", ["[prompt_encoder,mask_decoder]", "[prompt_encoder]"])
def test_losses_are_those_without_a_cache(trainable, root, tmp_path, quick, num_encoded):
    """Over several steps, with boxes, clicks, masks fed back and mirrored pictures: 5e-3 in fp16, 1e-6 in fp32."""
    overrides = ("train.steps=5", "train.eval_every=5", f"train.trainable={trainable}", "train.eval_clicks=[1,2]")
    expected, expected_values, _ = run_losses(root, tmp_path / "off", *overrides)
    assert len(expected) == 5 and len(num_encoded) == 5 * 2 + 2 * 4
    for stored, limit in (("fp32", 1e-6), ("fp16", 5e-3)):
        num_encoded.clear()
        cache = (f"cache={tmp_path / 'cache'}", f"cache_precision={stored}")
        losses, values, _ = run_losses(root, tmp_path / stored, *overrides, *cache)
        assert len(num_encoded) == NUM_ENTRIES
        np.testing.assert_allclose(losses[:, 0], expected[:, 0], rtol=limit, atol=0)
        assert (losses != expected).any() or stored == "fp32"  # fp16 rounds: it is no default
        for value, other in zip(values, expected_values, strict=True):
            assert value == pytest.approx(other, abs=1e-6 if stored == "fp32" else 0.05)
    assert len(list((tmp_path / "cache").glob("*/*.emb"))) == 2 * NUM_ENTRIES


def test_samples_of_both_ways_differ_in_the_picture_alone(root, cache_dir, monkeypatch):
    config = tiny_config(root, "prompts=mixed")
    plan = plan_tiny(build_run_model(root), cache_dir, root)
    items = tiny.list_training_items(config)
    plain, cached = tiny.make_dataset(config, items), tiny.make_dataset(config, items)
    cached.entries = plan.entries
    expected = [plain[index] for index in range(12)]
    monkeypatch.setattr(train_sam2, "read_image", lambda path: pytest.fail("a picture was read"))
    monkeypatch.setattr(models, "preprocess", lambda *args: pytest.fail("a picture was prepared"))
    for index, sample in enumerate(expected):
        from_entry = cached[index]
        assert sample.pop("picture").shape == (1, 3, 64, 64)
        assert from_entry.pop("picture").stride_4.shape == (1, 16, 16, 16)
        assert not tiny.differences(sample, from_entry)


def test_second_run_another_loss_and_a_sweep_encode_nothing(root, cache_dir, tmp_path, quick, num_encoded, capfd):
    before = list_files(cache_dir)
    for number, change in enumerate(("train.steps=1", "loss=balanced", "optim.lr=1e-3")):
        tiny.train_in(tmp_path / str(number), tiny_config(root, f"cache={cache_dir}", "train.steps=1", change))
        assert f"cache: {NUM_ENTRIES} pictures in {cache_dir}, 0 to encode (0.0 MiB" in capfd.readouterr().out
    assert num_encoded == [] and list_files(cache_dir) == before


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (("train.steps=0", "train.eval_images=2"), 2),  # the validation pictures alone
        (("train.steps=1", "data.hflip=false"), NUM_ENTRIES // 2),  # no mirrored entries
    ],
)
def test_what_a_run_has_no_use_for_is_not_encoded(overrides, expected, root, tmp_path, quick, num_encoded):
    tiny.train_in(tmp_path / "run", tiny_config(root, f"cache={tmp_path / 'cache'}", *overrides))
    assert len(num_encoded) == expected


def test_other_weights_pictures_or_sizes_are_encoded_anew(root, cache_dir, tmp_path, quick, num_encoded, monkeypatch):
    """And never taken for those that are there."""
    tiny.script_evaluation(monkeypatch)
    data = Path(shutil.copytree(root, tmp_path / "data"))

    def count_new(name, *overrides):
        num_encoded.clear()
        tiny.train_in(tmp_path / name, tiny_config(data, f"cache={cache_dir}", "train.steps=1", *overrides))
        return len(num_encoded)

    assert count_new("same") == 0  # the pictures' place does not matter
    image_rgb = read_image(data / "images" / "001.png")
    image_rgb[0, 0] ^= 1
    write_image(data / "images" / "001.png", image_rgb)  # same name, other bytes
    assert count_new("bytes") == 2  # mirrored or not; its copy 101.png is still there
    assert count_new("bytes_again") == 0
    assert count_new("size", "model.image_size=96") == NUM_ENTRIES + 1
    assert count_new("weights", "seed=1") == NUM_ENTRIES + 1
    assert count_new("precision", "precision=bf16") == NUM_ENTRIES + 1
    assert count_new("projected", "train.trainable=[prompt_encoder]") == NUM_ENTRIES + 1
    assert count_new("fp32", "cache_precision=fp32") == NUM_ENTRIES + 1


def test_resumed_run_equals_the_uninterrupted_one(root, cache_dir, tmp_path, quick, monkeypatch, capfd, num_encoded):
    steps = ("train.steps=3", "train.eval_every=2", "train.save_every=1", f"cache={cache_dir}", "prompts=mixed")
    config = tiny_config(root, *steps)
    whole = tiny.train_in(tmp_path / "whole", config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash_at_step(patch, 1)
        tiny.train_in(tmp_path / "killed", config)
    status, _ = tiny.run_main(
        monkeypatch, capfd, tmp_path / "resumed", f"resume={tmp_path / 'killed'}", f"cache={tmp_path / 'moved'}",
        "num_workers=1",
    )  # fmt: skip
    assert status == 0 and len(num_encoded) == NUM_ENTRIES  # in a new folder, from the weights in last.pt
    resumed = tiny.read_last(tmp_path / "resumed")
    assert list_files(tmp_path / "moved") == list_files(cache_dir)
    for state in (whole, resumed):
        state["metrics"] = tiny.without_timing(state["metrics"])
        for key in ("resume", "cache", "num_workers"):
            state["config"].pop(key)
    assert not tiny.differences(whole, resumed)


def test_run_from_before_the_cache_resumes_without(root, tmp_path, quick, monkeypatch, capfd):
    tiny.script_evaluation(monkeypatch)
    config = tiny_config(root, "train.steps=1")
    tiny.train_in(tmp_path / "old", config)
    state = load_checkpoint(tmp_path / "old" / "last.pt")
    del state["config"]["cache"], state["config"]["cache_precision"], state["config"]["fast_decoder"]
    save_checkpoint(tmp_path / "old" / "last.pt", state)
    status, output = tiny.run_main(monkeypatch, capfd, tmp_path / "new", f"resume={tmp_path / 'old'}", "train.steps=2")
    assert status == 0 and "cache:" not in output
    assert load_checkpoint(tmp_path / "new" / "last.pt")["config"]["cache"] == "off"


def test_channels_last_and_workers_read_the_same_entries(root, cache_dir, tmp_path, quick, num_encoded, monkeypatch):
    tiny.script_evaluation(monkeypatch)
    base = ("train.steps=2", f"cache={cache_dir}")
    expected, _, _ = run_losses(root, tmp_path / "plain", *base)
    for name in ("train.channels_last=true", "num_workers=2"):
        losses, _, _ = run_losses(root, tmp_path / name, *base, name)
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert num_encoded == []


# ---------------------------------------------------------------------------------------------------------------------
# when there can be no cache


OBSTACLES = {
    "train.trainable=[neck]": "train.trainable has parts of the image encoder (image_encoder.neck.",
    "train.trainable=[mask_decoder,{trunk_last_n:1}]": "train.trainable has parts of the image encoder (image_encoder.",
    "data.color_jitter=0.1": "data.color_jitter is 0.1, so no picture is seen twice as it was",
}


@pytest.mark.parametrize("override", OBSTACLES)
def test_encoder_that_trains_and_color_jitter_refuse(override, root, tmp_path, quick, monkeypatch, capfd):
    tiny.script_evaluation(monkeypatch)
    monkeypatch.setattr(embedding_cache, "REPOSITORY", tmp_path)
    config = tiny_config(root, f"cache={tmp_path / 'cache'}", "train.steps=1", override)
    with pytest.raises(ValueError) as error:
        tiny.train_in(tmp_path / "refused", config)
    assert f"cache is {tmp_path / 'cache'}, but {OBSTACLES[override]}" in str(error.value)
    assert str(error.value).endswith("; change that, or use cache=off")
    tiny.train_in(tmp_path / "auto", config | {"cache": "auto"})
    assert f"cache=auto: no cache, because {OBSTACLES[override]}" in capfd.readouterr().out
    assert not (tmp_path / "cache").exists() and not (tmp_path / "data").exists()


def test_free_disk_is_checked_before_anything_is_written(root, tmp_path, quick, monkeypatch, capfd, num_encoded):
    tiny.script_evaluation(monkeypatch)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(embedding_cache, "REPOSITORY", tmp_path)
    num_bytes = NUM_ENTRIES * count_entry_bytes(build_tiny(), False, "fp16")
    free = {}
    monkeypatch.setattr(embedding_cache.shutil, "disk_usage", lambda folder: type("Usage", (), free))
    free["free"] = num_bytes - 1
    config = tiny_config(root, f"cache={tmp_path / 'cache'}", "train.steps=1")
    with pytest.raises(ValueError, match=r"cache is .*, but its 8 new entries take 0.1 MiB and .* has 0.1 MiB free"):
        tiny.train_in(tmp_path / "refused", config)
    assert num_encoded == [] and list_files(tmp_path / "cache") == {}

    free["free"] = 2 * num_bytes - 1  # of which auto takes half
    tiny.train_in(tmp_path / "too_much", config | {"cache": "auto"})
    assert "cache=auto: no cache, because its 8 new entries take" in capfd.readouterr().out
    assert list_files(tmp_path / "data") == {}
    free["free"] = 2 * num_bytes
    tiny.train_in(tmp_path / "half", config | {"cache": "auto"})
    assert "cache: 0 pictures in" in (output := capfd.readouterr().out) and "8 to encode (0.1 MiB; " in output
    assert sum(map(len, list_files(tmp_path / "data" / "embedding_cache").values())) == num_bytes
    free["free"] = 0  # nothing more to write
    tiny.train_in(tmp_path / "second", config | {"cache": "auto"})
    assert "cache: 8 pictures in" in capfd.readouterr().out


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["cache=true"], "cache is True; must be auto, off, or a folder"),
        (["cache=''"], "cache is ; must be auto, off, or a folder"),
        (["cache=3"], "cache is 3; must be text or true or false"),
        (["cache=null"], "cache is None; must be text or true or false"),
        (["cache_precision=bf16"], "cache_precision is bf16; must be fp16 or fp32"),
    ],
)
def test_values_that_make_no_sense_are_named_before_any_data_is_read(overrides, message, tmp_path):
    config = tiny.configure(tmp_path / "no_such_folder", *overrides)
    with pytest.raises(ValueError) as error:
        train_sam2.train(config, tmp_path / "run", None)
    assert str(error.value) == message


def test_off_without_quotes_in_a_preset_is_off(root, tmp_path, quick, monkeypatch, num_encoded):
    tiny.script_evaluation(monkeypatch)
    config = changed_config(tiny_config(root, "train.steps=1"), yaml.safe_load("cache: off"))
    assert config["cache"] is False
    tiny.train_in(tmp_path / "run", config)
    assert len(num_encoded) == 2


def test_folder_that_cannot_be_is_named(root, tmp_path, quick):
    (tmp_path / "file").write_text("")
    for place in ("file", "not_mounted/cache"):
        with pytest.raises(ValueError, match=f"cache is {tmp_path / place}, but the folder .* cannot be made"):
            tiny.train_in(tmp_path / "run", tiny_config(root, f"cache={tmp_path / place}"))
        shutil.rmtree(tmp_path / "run")


def test_folder_that_may_not_be_written_is_read_alone(root, tmp_path, monkeypatch, capsys):
    model, picture = build_tiny(), (next(root.rglob("*.png")), False)
    arguments = model, tmp_path / "cache", "fp16", "fp32", True
    fill_cache(model, plan_cache(*arguments, [picture], None))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a folder of another user's
    assert not plan_cache(*arguments, [picture], None).missing
    write_image(tmp_path / "new.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match="in which 1 entries are missing, may not be written; change that, or use"):
        plan_cache(*arguments, [picture, (tmp_path / "new.png", False)], None)


# ---------------------------------------------------------------------------------------------------------------------
# infer_sam2.py


def infer(run_dir, *overrides):
    run_dir.mkdir()
    config = compose_config("infer_sam2", "device=cpu", "precision=fp32", "model=sam2_nano", *overrides)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(models, "ConvTrunk", BUNDLED_TRUNK)
        failures = infer_sam2.infer(config, run_dir)
    return {path.stem: json.loads(path.read_text()) for path in run_dir.glob("0*.json")}, failures


def test_inference_encodes_each_picture_once(root, tmp_path, num_encoded, capfd):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in ("001", "002"):
        shutil.copy(root / "images" / f"{number}.png", folder)
    shutil.copy(folder / "001.png", folder / "003.png")  # the same picture again
    (folder / "000.png").write_bytes(b"no picture")
    common = (f"input={folder}", "mode=prompts", "points=[[20,20,1]]")
    expected, _ = infer(tmp_path / "off", *common)
    num_encoded.clear()
    cache = (f"cache={tmp_path / 'cache'}", "cache_precision=fp32")
    first, failures = infer(tmp_path / "first", *common, *cache)
    assert len(failures) == 1 and "000.png" in failures[0]
    assert len(list((tmp_path / "cache").glob("*/*.emb"))) == 2 and num_encoded
    assert "to encode (" in capfd.readouterr().out
    num_encoded.clear()
    second, failures = infer(tmp_path / "second", *common, *cache)
    assert num_encoded == [] and len(failures) == 1
    other, _ = infer(tmp_path / "other", f"input={folder}", "mode=prompts", "boxes=[[5,5,40,40]]", *cache)
    assert num_encoded == [] and other != second
    assert first == second == expected and sorted(expected) == ["001", "002", "003"]


def test_inference_with_fp16_is_the_same_in_the_first_run_and_later(root, tmp_path):
    common = (f"input={root / 'images' / '002.png'}", "mode=prompts", "points=[[20,20,1]]", f"cache={tmp_path / 'c'}")
    assert infer(tmp_path / "first", *common) == infer(tmp_path / "second", *common)


def test_automatic_mode_has_no_cache(root, tmp_path, capfd, monkeypatch):
    def go_on(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(mask_generation, "generate_masks", go_on)
    common = (f"input={root / 'images' / '002.png'}",)
    with pytest.raises(ValueError, match="cache is .*, but mode=automatic encodes crops of pictures, too"):
        infer(tmp_path / "folder", *common, f"cache={tmp_path / 'cache'}")
    with pytest.raises(KeyboardInterrupt):
        infer(tmp_path / "auto", *common, "cache=auto")
    assert "cache=auto: no cache, because mode=automatic" in capfd.readouterr().out
