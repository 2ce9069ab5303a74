"""Several processes that train together, as `torchrun` starts them: who they are, what they exchange, how they end.

Each holds the whole model. A step's samples are divided among them, and their gradients are averaged once, after the
last backward: not by DistributedDataParallel, which has to wrap a forward with its one backward, where SAM 2 goes back
part by part. What follows from (seed, step, sample_index) does not know how many they are.
Rank 0 prints, writes the run's folder and checks the data; what it hands out, all have. In one process, every function
here does what is left to do for one, which is nothing or little.
"""

import atexit
import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

JOINING = timedelta(minutes=10)  # until all processes have come
WAITING = timedelta(days=7)  # for others that check data or encode pictures; a lost one is noticed at once
BUCKET_VALUES = 2**23  # values of gradients that are sent together, 32 MiB in fp32
SILENT_RUN = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]  # of all ranks but the first
LATER_S = 1.0  # s that a process without anything to report lives on, so that the one that has can print it
VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}  # torchrun sets all, some clusters a few

devices: list[str] = []  # each rank's, such as "box1 cuda:0", where there are several


class OtherEndedError(Exception):
    """Another process of the run has ended, so that this one cannot go on."""


# ---------------------------------------------------------------------------------------------------------------------
# who is who


def launched_count() -> int:
    """Read how many processes `torchrun` started on all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if VARIABLES <= os.environ.keys() else 1


def local_count() -> int:
    """Read how many of them run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched_count() > 1 else 1


def count() -> int:
    """Return how many processes train together; 1 before `join` and after `leave`."""
    return dist.get_world_size() if _has_joined() else 1


def rank() -> int:
    """Return which of them this one is, from 0."""
    return dist.get_rank() if _has_joined() else 0


def _has_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Tell whether this process writes the run's files."""
    return rank() == 0


def prepare(arguments: list[str]) -> list[str]:
    """Make a process of several ready for Hydra: all but the first print nothing and make no folder.

    Args:
        arguments: the command line, without the script.
    Returns:
        the command line for this process.
    """
    if launched_count() == 1:
        return arguments
    if os.environ["RANK"] == "0":
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(line_buffering=True)  # torchrun may end it without its flushing a file or a pipe
        return arguments
    atexit.register(time.sleep, LATER_S)
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # progress bars too: it is no terminal
    places = [number for number, argument in enumerate(arguments) if "=" in argument and not argument.startswith("-")]
    stop = places[-1] + 1 if places else len(arguments)  # argparse takes key=value arguments in one row alone
    return [*arguments[:stop], *SILENT_RUN, *arguments[stop:]]


def join(config: dict, mode: str = "train") -> None:
    """Join the processes of the run, if there are several.

    Args:
        config: a trainer's; its device and its check are read.
        mode: train_unet.py's.
    Raises:
        ValueError: for a check or a mode that is for one process, for a device that not each process can have, and
            where they cannot reach each other.
    """
    if launched_count() == 1:
        return
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=JOINING)
    except RuntimeError as error:
        raise ValueError(
            f"the {launched_count()} processes cannot reach each other ({_first_line(error)}): see the "
            "machines' names and addresses, and GLOO_SOCKET_IFNAME"
        ) from error
    older = not hasattr(dist, "set_timeout")
    (dist.distributed_c10d._set_pg_timeout if older else dist.set_timeout)(WAITING)
    if mode != "train" or config["check"]:
        asked = f"mode={mode}" if mode != "train" else f"check={str(config['check']).lower()}"
        raise ValueError(f"{asked} is for one process: start it with python instead of torchrun")
    device_name = config["device"]
    if device_name not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device is {device_name}; must be auto, cpu or cuda where {count()} processes train: each takes its own"
        )
    name = own_device(device_name)
    if name.startswith("cuda") and local_count() > torch.cuda.device_count():
        raise ValueError(
            f"{local_count()} processes train on this machine, which has {torch.cuda.device_count()} CUDA device(s): "
            "start one for each"
        )
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    devices[:] = _gather(f"{socket.gethostname()} {name}")
    print(f"{count()} processes: {', '.join(devices)}")


def own_device(name: str) -> str:
    """Turn the setting `device` into that of this process: where several train, each has a CUDA device of its own."""
    if count() == 1:
        return name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and torch.cuda.is_available() else name


def leave() -> bool:
    """Leave the others after the training, and tell whether this process is the one that finishes the run."""
    is_finisher = is_first()
    if _has_joined():
        with _together():
            dist.barrier()  # none is missed by the others while they still train
            dist.destroy_process_group()
    return is_finisher


# ---------------------------------------------------------------------------------------------------------------------
# what they exchange


def from_first(make: Callable):
    """Call a function in the first process alone, and return in all what it returned there (plain types, pickled)."""
    if count() == 1:
        return make()
    made = [make() if is_first() else None]
    with _together():
        dist.broadcast_object_list(made, src=0)
    return made[0]


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        with _together():
            dist.barrier()


def after_first(make: Callable):
    """Call a function in the first process, then in all others: what it downloads or writes is there by then."""
    if not is_first():
        wait()
    made = make()
    if is_first():
        wait()
    return made


def own_size(key: str, size: int) -> int:
    """Compute the share of a batch that each process has.

    Raises:
        ValueError: where they cannot share it equally, with the key.
    """
    if size % count():
        raise ValueError(f"{key} is {size}, which {count()} processes cannot share: give a multiple of {count()}")
    return size // count()


def share(items: Sequence) -> list[tuple[int, object]]:
    """Take this process's share of items, each with its number: every `count()`th, from `rank()`."""
    return list(enumerate(items))[rank() :: count()]


def gather(own: list) -> list:
    """Join what each process made of its `share`, in the order of the items: plain types or tensors on the CPU."""
    shares = _gather(own)
    return [shares[number % count()][number // count()] for number in range(sum(map(len, shares)))]


def _gather(value) -> list:
    if count() == 1:
        return [value]
    values = [None] * count()
    with _together():
        dist.all_gather_object(values, value)
    return values


def mean(values: torch.Tensor) -> torch.Tensor:
    """Average values over the processes, in place: the same to the bit in all of them."""
    if count() > 1:
        with _together():
            dist.all_reduce(values)
        values /= count()
    return values


def add(counts: torch.Tensor) -> torch.Tensor:
    """Add whole numbers of all processes, in place."""
    if count() > 1:
        with _together():
            dist.all_reduce(counts)
    return counts


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average the gradients of all processes, the same to the bit in all of them.

    A parameter without gradient in some of them counts as 0 there; one without in all stays without, so that the
    optimizer leaves it alone, as in one process.
    """
    if count() == 1:
        return
    parameters = list(parameters)
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    with _together():
        dist.all_reduce(used)
    used = [parameter for parameter, number in zip(parameters, used.tolist(), strict=True) if number]
    bucket, num_values = [], 0
    for position, parameter in enumerate(used):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        num_values += parameter.grad.numel()
        if num_values >= BUCKET_VALUES or position == len(used) - 1:
            flat = mean(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            for gradient, averaged in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                gradient.copy_(averaged.view(gradient.shape))
            bucket, num_values = [], 0


def synchronize_norms(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Let batch norm normalise what all processes see, on CUDA; elsewhere each normalises its share, and says so."""
    has_norms = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if count() == 1 or not has_norms:
        return model
    if device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    print(f"batch norm: each of the {count()} processes normalises its own share here; rank 0's statistics are kept")
    return model


def send_buffers(model: torch.nn.Module) -> None:
    """Give all processes the first one's running statistics."""
    if count() > 1:
        with _together():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


# ---------------------------------------------------------------------------------------------------------------------
# how they end


@contextlib.contextmanager
def _together():
    """Turn what PyTorch raises where another process is gone into OtherEndedError."""
    try:
        yield
    except RuntimeError as error:
        if "memory" in str(error) or str(error).startswith("DataLoader worker"):  # this process's own
            raise
        raise OtherEndedError(f"error: another process of the run has ended ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def end_at_error(error: BaseException, message: str | None) -> None:
    """End this process, one of several, with status 1 (Ctrl-C: 130): the first one with something to report prints it.

    It ends at once, not waiting for the others, so that torchrun sees it and ends them. That another one has ended is
    reported only where that one has not said why, and torchrun has not ended this one within LATER_S.

    Args:
        message: what to print; None: the traceback of `error`, which nobody foresaw.
    """
    if isinstance(error, OtherEndedError):
        message = str(error)
        time.sleep(LATER_S)
    if isinstance(error, KeyboardInterrupt):
        reports = os.environ["RANK"] == "0"
        if not reports:
            time.sleep(4 * LATER_S)  # the first may wait for what its device computes
    else:
        reports = _is_first_report()
    if reports:
        text = f"{message}\n" if message is not None else "".join(traceback.format_exception(error))
        sys.__stderr__.write(text)
        sys.__stderr__.flush()
    else:
        time.sleep(LATER_S)
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _is_first_report() -> bool:
    """Tell whether no other process of the run has reported an error; before they have joined, the first one may."""
    if not _has_joined():
        return os.environ["RANK"] == "0"
    store = dist.distributed_c10d._get_default_store()
    try:
        return store.add("reports", 1) == 1
    except RuntimeError:  # the process that holds the store has ended, and said why
        return False
