"""The scripts on a pretended GPU (tests/pretended_device.py): no mixed devices, no float64 on mps, and few waits."""

import copy
import functools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_segmentation
import tiny_tracking
import tiny_training
import torch
from pretended_device import PretendedDevice, copy_to_cpu

import infer_sam2
import track
import train_unet
from utils import loop
from utils.images import write_image

# How often the CPU waits for the device, at most: in a training step, from a batch to the next; in the evaluation at
# step 0, of one picture or a sequence of three frames; in one picture, or three frames, of the others, without loading
# the model. To lower a number: pytest tests/test_pretended_device.py -rP prints what is counted now.
WAITS = {
    ("train_sam2", "step"): 2,
    ("train_sam2", "evaluation"): 9,
    ("train_unet", "step"): 2,
    ("train_unet", "evaluation"): 10,
    ("train_siamfc", "step"): 2,
    ("train_siamfc", "evaluation"): 7,
    ("infer_sam2", "automatic"): 18,
    ("infer_sam2", "prompts"): 9,
    ("infer_sam2", "region"): 9,
    ("train_unet", "predict"): 5,
    ("track", "track"): 7,
}
EVALUATE = {"train_sam2": "evaluate", "train_unet": "evaluate", "train_siamfc": "evaluate_tracking"}
ALL_MASKS = (
    "points_per_side=3", "crop_n_layers=0", "pred_iou_thresh=-1", "stability_score_thresh=-1", "box_nms_thresh=1",
)  # fmt: skip
FP16_WAITS = 1  # more in a step: the scaler asks whether a gradient overflowed


def make(*shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# the pretended device itself can fail


def test_operands_on_two_devices_raise():
    with PretendedDevice("cuda"):
        here, on_cpu = make(3).to("cuda"), make(3)
        assert here.device == torch.device("cuda:0") and here.is_cuda
        here += 1.0
        here *= torch.tensor(2.0)  # a number on the CPU may be an operand
        for mix in (
            lambda: here + on_cpu,
            lambda: on_cpu.add_(here),
            lambda: on_cpu[here.argsort()],
            lambda: torch.where(here > 0, here, on_cpu),
            lambda: torch.nn.functional.conv1d(here[None, None], on_cpu[None, None]),
            lambda: here.index_put_((torch.zeros(3, dtype=torch.long),), on_cpu),
        ):
            with pytest.raises(RuntimeError, match=r"tensors on cuda:0 and on cpu.* at tests/test_pretended_device.py"):
                mix()


def test_float64_on_mps_raises():
    with PretendedDevice("mps"):
        here = make(3).to("mps")
        for use in (
            here.double,
            lambda: torch.zeros(3, dtype=torch.float64, device="mps"),
            lambda: make(3).double().to("mps"),
        ):
            with pytest.raises(TypeError, match="mps has no float64"):
                use()
    with PretendedDevice("cuda"):
        assert make(3).to("cuda").double().dtype == torch.float64


def test_each_wait_is_counted_at_its_place():
    with PretendedDevice("cuda") as device:
        here, is_large = make(4).to("cuda", non_blocking=True), make(4).to("cuda", non_blocking=True) > 0.5
        here = (here @ here + here.sum()).clamp(min=0) * here
        assert not device.waits and sum(device.kernels.values()) > 5
        for number, (why, use) in enumerate(
            {
                "item": lambda: here[0].item(),
                "item ": lambda: bool(here[0] > 0),
                "tolist": here.tolist,
                "nonzero": is_large.nonzero,
                "index by bool": lambda: here[is_large],
                "index from the CPU": lambda: here[torch.tensor([0, 1])],
                "copy to the CPU": here.cpu,
                "copy to the device": lambda: make(3).to("cuda"),
                "copy_": lambda: make(4).copy_(here),
                "bincount": lambda: is_large.long().bincount(minlength=2),
                "synchronize": torch.cuda.synchronize,
            }.items()
        ):
            use()
            assert device.waits.total() == number + 1, why
            assert list(device.waits)[-1].startswith(f"{why.strip()} tests/test_pretended_device.py:")


def test_autocast_casts_as_on_cuda():
    with PretendedDevice("cuda"), torch.autocast("cuda", torch.bfloat16):
        here, weight = make(1, 2, 4).to("cuda"), make(4, 4).to("cuda")
        product = here @ weight
        assert product.dtype == torch.bfloat16
        for operator in (torch.exp, torch.sum, torch.cumsum, torch.softmax, torch.norm, torch.nn.functional.layer_norm):
            arguments = {torch.cumsum: (1,), torch.softmax: (1,), torch.nn.functional.layer_norm: ((4,),)}
            assert operator(product, *arguments.get(operator, ())).dtype == torch.float32, operator
        loss = torch.nn.functional.cross_entropy(product, torch.zeros(1, 4, dtype=torch.long, device="cuda"))
        assert loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # the CPU's own lists differ
        assert torch.softmax(make(2, 2) @ make(2, 2), 1).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_attention_is_made_of_plain_operators_also_where_torch_sees_a_gpu(kind):
    """Which would compute it by a kernel of its own, past the pretended device or without a form for the CPU."""

    def list_kernels():
        return [
            getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
            for name in ("flash", "mem_efficient", "cudnn", "math")
        ]

    before, here = list_kernels(), make(1, 2, 8, 4)
    with PretendedDevice(kind) as device:
        assert list_kernels() == [False, False, False, True]
        attended = torch.nn.functional.scaled_dot_product_attention(*[here.to(kind)] * 3)
        assert sum(device.kernels.values()) > 3
    assert list_kernels() == before
    torch.testing.assert_close(attended.data_on_cpu, (here @ here.mT / 2).softmax(-1) @ here)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_gradients_and_updates_are_those_of_the_cpu(kind):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    )
    images = make(2, 3, 4, 4)

    def train(model, images):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(2):
            features = model(images)
            loss = (features.softmax(1)[:, 0] * features.exp().mean() + model[0].weight.square().sum()).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    pretended = copy.deepcopy(plain)
    train(plain, images)
    with PretendedDevice(kind):
        pretended = pretended.to(kind)
        train(pretended, images.to(kind))
        assert all(
            isinstance(parameter, torch.nn.Parameter) and parameter.device.type == kind
            for parameter in pretended.parameters()
        )
        state = copy.deepcopy(pretended).cpu().state_dict()
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(state[name], expected)


def test_torch_is_as_before_afterwards():
    names = ("tensor", "as_tensor", "cuda.is_available", "cuda.synchronize", "autograd.backward", "Tensor.to")
    names += ("backends.mps.is_available", "__future__._overwrite_module_params_on_conversion")

    def look_up() -> list:
        return [functools.reduce(getattr, name.split("."), torch) for name in names]

    before = look_up()
    with pytest.raises(ZeroDivisionError), PretendedDevice("cuda"):
        assert not any(now is then for now, then in zip(look_up(), before, strict=True))
        make(2).to("cuda").add_(1 // 0)
    assert all(now is then for now, then in zip(look_up(), before, strict=True))
    assert type(make(2) + 1) is torch.Tensor and PretendedDevice.current is None


# ---------------------------------------------------------------------------------------------------------------------
# the scripts on it


def check_waits(script: str, part: str, waits: Counter, more: int = 0) -> None:
    """Hold that the CPU does not wait more often than it did; name the places where it waits."""
    places = "".join(f"\n  {number} x {place}" for place, number in sorted(waits.items()))
    print(f"{script}, {part}: {waits.total()} waits{places}")
    assert waits.total() <= WAITS[script, part] + more, f"{script}, {part}: the CPU waits {waits.total()} times{places}"


def test_more_waits_than_there_were_fail_and_are_named(monkeypatch):
    monkeypatch.setitem(WAITS, ("track", "track"), 1)
    with PretendedDevice("cuda") as device:
        here = make(2).to("cuda", non_blocking=True)
        here[0].item()
        check_waits("track", "track", device.waits)
        here[1].item()
    with pytest.raises(
        AssertionError, match=r"waits 2 times\n +1 x item tests/test_pretended_device.py:\d+\n +1 x item"
    ):
        check_waits("track", "track", device.waits)


def note_calls(device: PretendedDevice, patches: pytest.MonkeyPatch, owner, name: str) -> list[Counter]:
    """Note the waits so far before and after each call of a function, in a list that grows."""
    real, noted = getattr(owner, name), []

    def call(*args, **kwargs):
        noted.append(Counter(device.waits))
        result = real(*args, **kwargs)
        noted.append(Counter(device.waits))
        return result

    patches.setattr(owner, name, call)
    return noted


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out what takes most of the time of a tiny run; torch.save writes the data of pretended tensors."""
    for tiny_script in (tiny_training, tiny_segmentation, tiny_tracking):
        tiny_script.make_runs_quick(monkeypatch)
    real_save = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda path, state: real_save(path, copy_to_cpu(state)))
    monkeypatch.setattr(track, "load_model", lambda checkpoint, seed: tiny_tracking.small_model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tests of this file find what others wrote: <trainer>_data, <trainer>_<precision>, photo.png."""
    folder = tmp_path_factory.mktemp("pretended")
    image_rgb, ids = tiny_training.draw_picture(np.random.default_rng(0), 48, 64)
    write_image(folder / "photo.png", image_rgb)
    write_image(folder / "region.png", (ids == 1).astype(np.uint8))
    (folder / "frames").mkdir()
    frames, boxes = tiny_tracking.draw_video(np.random.default_rng(0), 3)
    for number, frame in enumerate(frames):
        write_image(folder / "frames" / f"{number}.png", frame)
    np.savetxt(folder / "groundtruth.txt", boxes, delimiter=",")
    return folder


@pytest.fixture(scope="module")
def trained_unet(tmp_path_factory):
    """best.pt of train_unet.py after no step on the CPU, and a picture."""
    root = tiny_segmentation.write_dataset(tmp_path_factory.mktemp("unet") / "data")
    config = tiny_segmentation.compose_config(*tiny_segmentation.tiny_overrides(root), "train.steps=0")
    tiny_segmentation.train_in(root.parent / "run", config)
    return root.parent / "run" / "best.pt", root / "images" / "000.png"


def configure(trainer, *overrides: str) -> dict:
    """The config of a tiny run that evaluates one picture, or one sequence."""
    return trainer.configure(*overrides, *["train.eval_images=1"] * (trainer.name != "train_siamfc"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_and_evaluation(trainer, precision, tmp_path, monkeypatch):
    config = configure(trainer, "device=cuda", f"precision={precision}", "train.steps=2", "train.eval_every=2")
    if precision == "fp16":  # evaluated as in bf16
        trainer.tiny.script_evaluation(monkeypatch)
    with PretendedDevice("cuda") as device:
        batches = note_calls(device, monkeypatch, loop.SpeedWindow, "next_batch")
        evaluations = note_calls(device, monkeypatch, trainer.script, EVALUATE[trainer.name])
        trainer.tiny.train_in(tmp_path / "run", config)
    check_waits(trainer.name, "step", batches[2] - batches[1], FP16_WAITS if precision == "fp16" else 0)
    if precision == "bf16":
        check_waits(trainer.name, "evaluation", evaluations[1] - evaluations[0])


def test_training_and_evaluation_on_mps(trainer, tmp_path):
    with PretendedDevice("mps"):
        trainer.tiny.train_in(tmp_path / "run", configure(trainer, "device=mps", "train.steps=1"))


def run_and_count(script, device: str, run_dir: Path, *arguments: str) -> Counter:
    """Run a command on the pretended device: the waits from the model's being ready to the end."""
    with PretendedDevice(device) as pretended, pytest.MonkeyPatch.context() as patches:
        starts = note_calls(pretended, patches, script, "start_run")
        status, message = tiny.run_script(script, run_dir, f"device={device}", *arguments)
    assert status == 0, message
    return pretended.waits - starts[1]


ON = [("cuda", "bf16"), ("cuda", "fp16"), ("mps", "fp32")]


@pytest.mark.parametrize(("device", "precision"), ON)
@pytest.mark.parametrize("mode", ["automatic", "prompts", "region"])
def test_infer_sam2(folder, tmp_path, device, precision, mode):
    torch.manual_seed(0)
    arguments = ["model=sam2_nano", "model.checkpoint=none", "image_size=64", f"input={folder / 'photo.png'}"]
    arguments += [f"precision={precision}", f"mode={mode}"]
    arguments += {
        "automatic": [f"automatic.{key}" for key in ALL_MASKS],
        "prompts": ["boxes=[[5,5,20,30],[10,10,40,40]]"],
        "region": [f"region={folder / 'region.png'}", "num_points=3"],
    }[mode]
    check_waits("infer_sam2", mode, run_and_count(infer_sam2, device, tmp_path, *arguments))


@pytest.mark.parametrize(("device", "precision"), ON)
def test_predict_of_train_unet(trained_unet, tmp_path, device, precision):
    best_path, picture = trained_unet
    arguments = ["mode=predict", f"checkpoint={best_path}", f"input={picture}", f"precision={precision}"]
    check_waits("train_unet", "predict", run_and_count(train_unet, device, tmp_path, *arguments))


@pytest.mark.parametrize(("device", "precision"), ON)
def test_track(folder, tmp_path, device, precision):
    arguments = [f"input={folder / 'frames'}", "overlay=false", f"precision={precision}"]
    check_waits("track", "track", run_and_count(track, device, tmp_path, *arguments))
