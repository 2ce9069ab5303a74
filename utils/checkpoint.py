"""Save checkpoints atomically, load them safely, and resume from them."""

import copy
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import torch
from omegaconf import OmegaConf

from utils.settings import fill_defaults, is_out_of_memory

# What files of earlier commits have: keys that are no more, with the value that means what is done today; weights of a
# loss that stand beside its other keys; the fields of a loop.
ANY_VALUE = "any value"  # these keys had no effect but with optim.schedule=step
REMOVED_KEYS = {
    "optim.nesterov": False, "optim.step_every": ANY_VALUE, "optim.step_factor": ANY_VALUE, "pairs.per_visit": 1,
}  # fmt: skip
LOSS_TERMS = ("focal", "dice", "cross_entropy", "soft_iou", "log_iou", "tversky")
LOOSE_LOOP_FIELDS = ("step", "evaluated_step", "bad_evals", "num_skipped", "skipped_in_a_row", "start_metrics", "best")
# What other programs wrap weights in: entries of the file, and prefixes of DistributedDataParallel, torch.compile, ...
WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "net", "weights")
PREFIXES = ("module.", "_orig_mod.", "sam2_model.", "model.", "sam2.")
PLAIN_TYPES = (int, float, str, bool, type(None))  # exact types: numpy's float64 is a float, but not a plain one


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint whole or not at all: a run killed while saving leaves the previous file as it was.

    Args:
        path: the file; its folder must exist. `<path>.tmp` beside it is used on the way.
        state: nested dict (keys str or int), list and tuple of tensors, int, float, str, bool and None.
    Raises:
        ValueError: for a tensor with nan or infinity, naming it; nothing is written.
        TypeError: for another type, naming where it sits; nothing is written.
        OSError: where the disk is full or refuses.
    """
    path = Path(path)
    _check_plain(state, "")
    partial = path.with_name(path.name + ".tmp")  # one left by a killed run is overwritten
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on disk before the name points at them
    except BaseException as error:  # a full disk or Ctrl-C: leave no half file behind
        partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # which PyTorch hides
            raise OSError(error.__context__.errno, error.__context__.strerror, str(partial)) from error
        raise
    os.replace(partial, path)


def load_checkpoint(path: Path, map_location: str | torch.device = "cpu") -> dict:
    """Read a checkpoint without running any code that it may carry (weights_only).

    Args:
        map_location: the device to put tensors on.
    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a folder, or a file that is damaged, no checkpoint, or holds more than plain types and tensors.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist; give the path of a .pt file")
    if path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder; give the file in it, such as {path / 'best.pt'}")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"checkpoint {path} cannot be read: damaged, not a PyTorch checkpoint, or holds more than tensors and "
            f"plain types; give another file, or copy it again"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} holds a {type(state).__name__}; must be a dict")
    return upgrade_checkpoint(state)


def find_weights(state: dict, path: str | Path) -> dict[str, torch.Tensor]:
    """Find the weights in a file of this toolkit or of others, which differ in wrappers alone: each is named.

    Args:
        state: from `load_checkpoint`: weights alone, or below "model", "state_dict", ..., with or without a prefix that
            wrapped networks give to all their names, such as "module.".
        path: of its file, for messages.
    Raises:
        ValueError: where there are none, or where one is nan or infinite, which is named.
    """
    wrapper = next((name for name in WRAPPERS if isinstance(state.get(name), dict)), None)
    weights = state if wrapper is None else state[wrapper]
    weights = {name: values for name, values in weights.items() if isinstance(values, torch.Tensor)}
    if not weights:
        raise ValueError(f"checkpoint {path} holds no weights; its entries are {', '.join(map(str, list(state)[:8]))}")
    taken_off = [] if wrapper in (None, "model") else [f"the entry {wrapper}"]
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in weights)), None):
        weights = {name[len(prefix) :]: values for name, values in weights.items()}
        taken_off.append(f"the prefix {prefix}")
    if taken_off:
        print(f"checkpoint {path}: weights without {' and '.join(taken_off)}")
    for name, values in weights.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"checkpoint {path} has nan or infinity in {name}: its training diverged; give another")
    return weights


def check_script(state: dict, path: str | Path, script: str) -> None:
    """Raise a ValueError for a file that another script wrote, or none of this toolkit.

    Args:
        state: from `load_checkpoint`.
        path: of its file, for messages.
        script: such as "train_unet".
    """
    has_config = isinstance(state.get("config"), dict) and (
        {"script", "format"} & set(state) or "train" in state["config"]
    )
    if not has_config or "model" not in state:
        raise ValueError(f"checkpoint {path} was not written by {script}.py: it has no config; give one of its files")
    if state.get("script", script) != script:
        raise ValueError(f"checkpoint {path} was not written by {script}.py, but by {state['script']}.py")


def load_run(resume_path: Path, script: str) -> dict:
    """Read the last.pt of a run to continue.

    Raises:
        ValueError: for a file that another script wrote, or that holds no state of a training.
    """
    state = load_checkpoint(resume_path)
    check_script(state, resume_path, script)
    if missing := [name for name in ("optimizer", "scaler", "loop") if name not in state]:
        raise ValueError(
            f"resume is {resume_path}, which has no {missing[0]}; give the last.pt of a run of {script}.py"
        )
    return state


def upgrade_checkpoint(state: dict) -> dict:
    """Bring a file that an earlier commit's trainer wrote into today's form; any other stays as it is.

    Flat weights of a loss become `loss.terms`; the loose fields of a loop become `loop`, see LoopState of
    utils/loop.py. Which keys its config has is for `stored_config`.
    """
    config = state.get("config")
    if not isinstance(config, dict) or "train" not in config:  # an official file, or weights alone
        return state
    if "loss" in config and "terms" not in config["loss"]:
        terms = {name: weight for name, weight in config["loss"].items() if name in LOSS_TERMS}
        others = {name: value for name, value in config["loss"].items() if name not in LOSS_TERMS}
        config = config | {"loss": {"terms": terms} | others}
    state = {"script": "train_sam2"} | state | {"config": config}  # train_sam2's files did not say so
    if "optimizer" in state and "loop" not in state:
        running = {name if name == "updates" else f"train/{name}": mean for name, mean in state["running"].items()}
        loop = {name: state[name] for name in LOOSE_LOOP_FIELDS}
        best_keys = [key for key in ("format", "script", "config", "class_weights", "model", "git") if key in state]
        state |= {"loop": loop | {"running": running, "rows": state["metrics"]}, "best_keys": best_keys}
    return state


def stored_config(cls: type, state: dict, path: str | Path, is_resumed: bool) -> dict:
    """Read the config of a checkpoint in today's form.

    Keys that are no more are left out, with a printed line; younger ones get the default that means "as before".

    Args:
        cls: the script's Config.
        state: from `load_checkpoint`.
        path: of its file, for messages.
        is_resumed: whether its training goes on, for which those keys matter; its network can be used in any case.
    Raises:
        ValueError: for a run to be resumed that has a key, or a schedule, that is no more, and needs it.
    """
    config, stored_values, left_out = copy.deepcopy(state["config"]), _flatten(state["config"]), []
    if stored_values.get("optim.schedule") == "step":
        if is_resumed:
            raise ValueError(f"optim.schedule is step in {path}, which is no schedule any more; start a new run")
        config["optim"]["schedule"] = "constant"
        left_out.append("optim.schedule=step")
    for key, default in REMOVED_KEYS.items():
        if key in stored_values:
            section, name = key.split(".")
            value = config[section].pop(name)
            if is_resumed and default not in (ANY_VALUE, value):
                raise ValueError(
                    f"{key} is {value} in {path}, and no key any more; only a run where it is {default} goes on"
                )
            left_out.append(f"{key}={value}")
    if left_out:
        print(f"{path} is an earlier commit's; left out, as they are no more: {', '.join(left_out)}")
    return fill_defaults(cls, config)


def find_resume(path: Path) -> Path:
    """Find the last.pt to resume from.

    Args:
        path: a run folder, or its last.pt.
    Raises:
        FileNotFoundError: where neither is there.
        ValueError: for a best.pt, which holds the weights but not the optimizer.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "last.pt").exists():
            raise FileNotFoundError(f"resume is {path}; it has no last.pt: no run folder, or stopped before it saved")
        return path / "last.pt"
    if not path.exists():
        raise FileNotFoundError(f"resume is {path}, which does not exist; give a run folder or its last.pt")
    if path.name == "best.pt":
        raise ValueError(f"resume is {path}; only last.pt can be resumed from: best.pt has no optimizer state")
    return path


def config_to_resume(
    cls: type,
    script: str,
    current: dict,
    overrides: list[str],
    allowed: tuple[str, ...],
    settle: Callable[[dict], dict] = copy.copy,
) -> tuple[dict, Path | None]:
    """Take the config of the run that `resume` names, with what the command line may change of it.

    Args:
        cls: the script's Config.
        script: such as "train_unet", which must have written it.
        current: composed from this command line; without `resume` it comes back as it is.
        overrides: the command line's own, such as ["resume=...", "train.steps=400"].
        allowed: dotted keys that may differ, see `check_same_config`.
        settle: puts values in the place of "auto" in both configs, where a run stores them.
    Returns:
        the config, and the last.pt to continue from, or None.
    Raises:
        FileNotFoundError, ValueError: as `find_resume`, `load_run`, `stored_config` and `check_same_config`.
    """
    if current["resume"] is None:
        return current, None
    resume_path = find_resume(current["resume"])
    stored = stored_config(cls, load_run(resume_path, script), resume_path, is_resumed=True)
    return resumed_config(settle(stored), settle(current), overrides, allowed), resume_path


def check_same_config(stored: dict, current: dict, allowed: tuple[str, ...] = ()) -> None:
    """Stop a resume whose config is not that of the run it continues.

    Args:
        stored: config from the checkpoint.
        current: config of this command.
        allowed: dotted keys that may differ, such as ("train.steps", "data.parts.*.root"); a key covers all below it.
    Raises:
        ValueError: listing each other difference with both values.
    """
    stored_values, current_values = _flatten(stored), _flatten(current)
    differences = []
    for key in sorted(stored_values | current_values):
        if any(fnmatch(key, name) or key.startswith(name + ".") for name in allowed):
            continue
        before, now = stored_values.get(key, "(absent)"), current_values.get(key, "(absent)")
        if before != now or isinstance(before, bool) != isinstance(now, bool):  # True == 1 in Python
            differences.append(f"  {key}: stored {before}, now {now}")
    if differences:
        raise ValueError(
            "the config differs from that of the run to resume; set these back, or start a new run:\n"
            + "\n".join(differences)
            + f"\n(may differ: {', '.join(allowed) or 'nothing'})"
        )


def resumed_config(stored: dict, current: dict, overrides: list[str], allowed: tuple[str, ...]) -> dict:
    """Take a stored config, with what the command line may change of it.

    Args:
        stored: from last.pt.
        current: composed from this command line.
        overrides: the command line's own, such as ["resume=...", "train.steps=400"].
        allowed: dotted keys that may differ.
    Raises:
        ValueError: listing the differences that may not be.
    """
    given = [override.split("=")[0].lstrip("+~").split("@")[-1] for override in overrides]
    wanted = OmegaConf.create(current if "experiment" in given else stored)
    for key in given:
        if key != "experiment":
            OmegaConf.update(wanted, key, OmegaConf.select(OmegaConf.create(current), key), force_add=True)
    wanted = OmegaConf.to_container(wanted)
    check_same_config(stored, wanted, allowed)
    return wanted


def _check_plain(value, name: str) -> None:
    """Raise unless value is made of tensors and plain types; name is its place, as model.trunk.weight."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"checkpoint entry {name or '(top)'} has the key {key!r}; keys must be str or int")
            _check_plain(item, f"{name}.{key}" if name else str(key))
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{name}[{i}]")
    elif type(value) in (torch.Tensor, torch.nn.Parameter):
        if not torch.isfinite(value).all():
            raise ValueError(f"checkpoint tensor {name} has nan or infinite values; nothing was saved")
    elif type(value) not in PLAIN_TYPES:
        raise TypeError(
            f"checkpoint entry {name or '(top)'} is a {type(value).__module__}.{type(value).__qualname__}; must be a "
            f"tensor, dict, list, tuple, int, float, str, bool or None"
        )


def _flatten(config: dict, prefix: str = "") -> dict:
    """Flatten nested dicts to {dotted key: value}; an empty dict stays a value."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
