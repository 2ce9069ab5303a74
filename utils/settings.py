"""Settings: from YAML, whose values can be anything, to typed dataclasses; what a user reads where one is wrong."""

import contextlib
import dataclasses
import inspect
import io
import logging
import os
import re
import shlex
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import MissingMandatoryValue

from utils import ranks

TYPE_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list",
    dict: "keys and values", type(None): "null",
}  # fmt: skip
PATH_KEYS = re.compile(  # keys of the command line whose values are paths, or words: taken as they are
    r"\+{0,2}(input|checkpoint|resume|region|mask|text|prompts_file|cache|data_root|(model|sam2)\.checkpoint|labels"
    r"|objects|boxes|box|picture_attributes"
    r"|benchmark\.(detections|groups|edges\.root)"
    r"|(general_)?data\.(\w+\.)*(root|labels|index|groundtruth|annotations|data_yaml"
    r"|\w+_(dir|list|folder|images|annotations|sequences))|hydra\.(run|sweep)\.dir)"
)
# The folder itself, where it is empty; text= has a word of its own.
MAY_BE_EMPTY = re.compile(r"data\..*_(dir|list|folder|images|annotations)=$|^text=$")
FLAGS_WITHOUT_RUN = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--help", "-h", "--version")
OUT_OF_MEMORY = re.compile(
    "(?i)out of memory|can't allocate|not enough memory|insufficient memory|_ALLOC_FAILED|size calculation overflow"
)
# Marks of a field whose keys stand in the same section as its neighbours', and of one that takes all keys left over.
SAME_SECTION, ALL_OTHERS = "same section", "all others"


class Rule(NamedTuple):
    """What a value must be beside its type, where it is not null: `steps: Annotated[int, at_least(0)]`."""

    holds: Callable[[object], bool]
    words: str  # what must be, such as "0 or more"


FINITE = Rule(lambda number: abs(number) < float("inf"), "finite")


def at_least(least: float) -> Rule:
    """Make the rule that a number is `least` or more."""
    return Rule(lambda value: value >= least, f"{least} or more")


def above(limit: float) -> Rule:
    """Make the rule that a number is more than `limit`; infinity is, nan is not."""
    return Rule(lambda value: value > limit, f"above {limit}")


def between(least: float, most: float) -> Rule:
    """Make the rule that a number is one of least..most, both included."""
    return Rule(lambda value: least <= value <= most, f"between {least} and {most}")


def one_of(*choices) -> Rule:
    """Make the rule that a value is one of a few."""
    words = [str(choice) for choice in choices]
    return Rule(lambda value: value in choices, " or ".join(words) if len(words) < 3 else "one of " + ", ".join(words))


def some_of(*choices: str) -> Rule:
    """Make the rule that a list holds nothing but some of a few."""
    return Rule(lambda values: set(values) <= set(choices), f"a list of some of {', '.join(choices)}")


def of_length(count: int, words: str) -> Rule:
    """Make the rule that a list has so many entries, which `words` say, such as "two numbers"."""
    return Rule(lambda value: len(value) == count, words)


@dataclasses.dataclass(frozen=True)
class CommonSettings:
    """The keys of configs/shared/common.yaml, which explains each; utils/run.py turns them into what they stand for."""

    seed: Annotated[int, Rule(lambda seed: 0 <= seed < 2**32, "a whole number from 0 to 2**32 - 1")]
    device: str
    precision: str
    num_workers: int | str
    resume: str | None
    data_root: str


def read_settings(cls: type, section: dict, name: str = ""):
    """Build a settings dataclass from a section of the config: exactly its keys, values of its types and ranges.

    Args:
        cls: a dataclass. Its annotations are int, float (whole numbers too), bool, str, dict, list, list[X], X | None,
            other dataclasses, or one | None, for the sections below, and Annotated[one of these, a Rule, SAME_SECTION
            or ALL_OTHERS]. A field with a default may be absent from the section: a checkpoint can be older than it.
        section: {key: value}, plain types.
        name: the section's name in messages, such as "train"; "" for the whole config.
    Returns:
        cls(**section).
    Raises:
        ValueError: for an unknown key, a missing one, a value of another type or out of its range: section.key, its
            value, and what it must be.
    """
    prefix = f"{name}." if name else ""
    if not isinstance(section, dict):
        raise ValueError(f"{name} is {section!r}; must be a section of keys and values")
    kinds = typing.get_type_hints(cls, include_extras=True)
    known, others = known_keys(cls), None
    values, left = {}, dict(section)
    if unknown := [key for key in section if key not in known]:
        if ALL_OTHERS not in [mark for kind in kinds.values() for mark in _marks(kind)]:
            listed = ", ".join(prefix + key for key in known)
            raise ValueError(f"unknown key {prefix}{unknown[0]}; must be among {listed}")
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        plain_kind = typing.get_args(kind)[0] if _marks(kind) else kind
        if SAME_SECTION in _marks(kind):
            own = {key: left.pop(key) for key in known_keys(plain_kind) if key in left}
            values[field.name] = read_settings(plain_kind, own, name)
        elif ALL_OTHERS in _marks(kind):
            others = field.name
        elif field.name in left:
            value = left.pop(field.name)
            sections = [
                member for member in (plain_kind, *typing.get_args(plain_kind)) if dataclasses.is_dataclass(member)
            ]
            if sections and (value is not None or sections == [plain_kind]):
                value = read_settings(sections[0], value, prefix + field.name)
            else:
                check_value(value, kind, prefix + field.name)
            values[field.name] = value
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"the config lacks {prefix}{field.name}; must be {_describe_type(plain_kind)}")
    return cls(**values, **({others: left} if others else {}))


def fill_defaults(cls: type, section: dict) -> dict:
    """Add the keys that a stored config lacks because they are younger, with the defaults that mean "as before".

    Args:
        cls: as for `read_settings`.
        section: as that of a checkpoint; it stays as it is.
    """
    kinds = typing.get_type_hints(cls, include_extras=True)
    filled = dict(section)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        if field.name not in filled and field.default_factory is not dataclasses.MISSING:
            filled[field.name] = {}  # a younger section
        if SAME_SECTION in _marks(kind):
            filled = fill_defaults(typing.get_args(kind)[0], filled)
        elif dataclasses.is_dataclass(kind) and isinstance(filled.get(field.name), dict):
            filled[field.name] = fill_defaults(kind, filled[field.name])
        elif field.name not in filled and field.default is not dataclasses.MISSING:
            filled[field.name] = field.default
    return filled


def known_keys(cls: type) -> list[str]:
    """List the keys that a section of this dataclass may have, less those that a field takes as ALL_OTHERS."""
    keys = []
    for key, kind in typing.get_type_hints(cls, include_extras=True).items():
        if SAME_SECTION in _marks(kind):
            keys += known_keys(typing.get_args(kind)[0])
        elif ALL_OTHERS not in _marks(kind):
            keys.append(key)
    return keys


def check_keys(function, keys: dict, name: str, others: tuple[str, ...] = ()) -> None:
    """Raise a ValueError for keyword arguments that a function does not take, lacks, or takes as another type.

    Args:
        function: a function or class; bind what is no key of the config with `functools.partial` before.
        keys: {key: value}, to be passed as function(**keys).
        name: the section's name in messages, such as "data", which names them as section.key.
        others: keys of the section that another function takes; they are named among those that may be.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD] + [*others]
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for key in keys:
        if key not in known and not takes_all:
            raise ValueError(f"unknown key {name}.{key}; must be among {', '.join(f'{name}.{each}' for each in known)}")
    for parameter in parameters:
        if parameter.name in keys:
            check_value(keys[parameter.name], parameter.annotation, f"{name}.{parameter.name}")
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            raise ValueError(f"the config lacks {name}.{parameter.name}")


def check_terms(terms: dict, known: Collection[str]) -> None:
    """Raise a ValueError for weights of a loss's terms that make no sense.

    Args:
        terms: `loss.terms`, {name: weight}.
        known: names of the terms that there are.
    Raises:
        ValueError: for an unknown term, a weight that is no number or below 0, or none above 0.
    """
    for term, weight in terms.items():
        if term not in known:
            raise ValueError(f"unknown term loss.terms.{term}; must be among {', '.join(known)}")
        check_value(weight, Annotated[float, at_least(0), FINITE], f"loss.terms.{term}")
    if not any(terms.values()):
        raise ValueError(f"loss.terms is 0 in all its terms; must be above 0 in one of {', '.join(known)}")


def describe_terms(terms: dict) -> str:
    """Write the terms of a loss that count, such as "20 focal + 1 dice"."""
    return " + ".join(f"{weight:g} {term}" for term, weight in terms.items() if weight > 0)


def check_value(value, kind: type, name: str) -> None:
    """Raise a ValueError, naming the key, its value and what it must be, for a value of another type or out of range.

    Args:
        kind: an annotation, as those of `read_settings`. True and False are no whole numbers, though Python says so.
        name: the dotted key, such as "train.steps".
    """
    rules = [mark for mark in _marks(kind) if isinstance(mark, Rule)]
    plain_kind = typing.get_args(kind)[0] if _marks(kind) else kind
    if not _is_of_type(value, plain_kind):
        raise ValueError(f"{name} is {value!r}; must be {_describe_type(plain_kind)}")
    for rule in rules:
        if value is not None and not rule.holds(value):
            is_optional = _is_of_type(None, plain_kind)
            raise ValueError(f"{name} is {value}; must be {'null, or ' if is_optional else ''}{rule.words}")


def is_number(value) -> bool:
    """Tell whether a value is a finite number; true and false are none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # an int may have any number of digits


def is_numbers(value, count: int) -> bool:
    """Tell whether a value is a list of `count` finite numbers, such as a box or a point."""
    return isinstance(value, list) and len(value) == count and all(map(is_number, value))


def check_modes(given: list[str], modes: dict[str, tuple[str, ...]], mode: str) -> None:
    """Raise a ValueError for a key that is given in a mode that does not use it, naming the modes that do.

    Args:
        given: the keys that are given.
        modes: {key: the modes that use it}.
    """
    for key in given:
        if mode not in modes[key]:
            raise ValueError(
                f"{key}= is given but mode is {mode}, which does not use it: leave it out, or take mode="
                + " or mode=".join(modes[key])
            )


def _marks(kind) -> tuple:
    return kind.__metadata__ if typing.get_origin(kind) is Annotated else ()


def _is_of_type(value, kind: type) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is_of_type(value, member) for member in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of_type(item, typing.get_args(kind)[0]) for item in value)
    if kind not in TYPE_WORDS:  # a parameter that is no key of the config, such as a device, or has no annotation
        return True
    return type(value) in (int, float) if kind is float else type(value) is kind


def _describe_type(kind: type) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_describe_type(member) for member in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list, each {_describe_type(typing.get_args(kind)[0])}"
    return TYPE_WORDS[dict if dataclasses.is_dataclass(kind) else kind]


# ---------------------------------------------------------------------------------------------------------------------
# what a user reads where something is wrong


def read_command_line(task: str) -> None:
    """Let Hydra take the paths of the command line as they are: `input=IMG (2).jpg` fails in its grammar otherwise.

    Values of keys that are a path (PATH_KEYS) are quoted for Hydra in `sys.argv`, unless they are quoted already, are
    null, or are a list; under --multirun Hydra's grammar holds, in which `input=a,b` are two runs.
    `general_data=coco` becomes what `name_group` says.

    Args:
        task: the script's folder in configs/: sam2, unet or tracking.
    Raises:
        SystemExit: with one line, for a value that Hydra cannot read, for a file of configs/ that has moved, for a
            folder of data whose layout is not said, and for a run folder that cannot be made, or has a run in it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from now on `one_line_errors` answers Ctrl-C
    # a file's name need not be text in UTF-8, nor the terminal's encoding UTF-8
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    is_multirun = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv[1:]))
    if is_multirun:  # a launcher's jobs import what this script does, wherever the user stands
        places = [str(Path(__file__).resolve().parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    sys.argv[1:] = ranks.prepare(sys.argv[1:])
    if ranks.launched_count() > 1 and is_multirun:
        sys.exit(
            "error: --multirun is for one process; under torchrun start each run by itself, or let Hydra start them: "
            "hydra/launcher=submitit_slurm, see README.md"
        )
    if ranks.launched_count() > 1 and not Path(sys.argv[0]).stem.startswith("train_"):
        sys.exit(f"error: {Path(sys.argv[0]).name} runs in one process: start it with python instead of torchrun")
    arguments = sys.argv[1:] if is_multirun else [quote_path(argument) for argument in sys.argv[1:]]
    for argument in arguments:
        if "=" in argument and not argument.startswith("-"):
            try:
                OverridesParser.create().parse_override(argument)
            except HydraException:
                key, value = argument.split("=", 1)
                entries, quoted = [value], "{}"
                if re.fullmatch(r"\[[^][{}]*\]", value):  # a list stays one
                    entries, quoted = [entry.strip(" '\"") for entry in value[1:-1].split(",")], "[{}]"
                entries = [QuotedString(entry, Quote.single).with_quotes() for entry in entries]
                quoted = shlex.quote(f"{key}={quoted.format(','.join(entries))}")
                sys.exit(f"error: Hydra cannot read {argument}; quote the value, for the shell and for Hydra: {quoted}")
            if argument.endswith("=") and PATH_KEYS.fullmatch(argument[:-1]) and not MAY_BE_EMPTY.search(argument):
                sys.exit(
                    f"error: {argument} has no value, such as that of a variable which is not set; give one, or null"
                )
    arguments = [name_group(argument) for argument in arguments]
    stop_at_moved_files(task, arguments)
    stop_at_root_alone(task, arguments)
    given = next((a.split("=", 1)[1].strip("'") for a in arguments if a.startswith("hydra.run.dir=")), None)
    folder = "outputs" if given is None else given
    existing = next(path for path in [Path(folder), *Path(folder).absolute().parents] if path.exists())
    has_run = not any(argument.partition("=")[0] in FLAGS_WITHOUT_RUN for argument in arguments)
    if has_run and not (existing.is_dir() and os.access(existing, os.W_OK)):
        sys.exit(
            f"error: {existing} is not a folder that may be written; give hydra.run.dir=<a folder for the results>"
        )
    # before Hydra and a check write over what is there
    if has_run and given and (record := Path(given, "run.json")).exists():
        sys.exit(f"error: {record} exists; a run needs a folder of its own: leave out or change hydra.run.dir")
    sys.argv[1:] = arguments


def name_group(argument: str) -> str:
    """Write general_data=coco as Hydra has it, which puts a second file of data/ beside the first."""
    return re.sub("^general_data=(?!null$)", "data@general_data=", argument)


def quote_path(argument: str) -> str:
    """Quote the value of key=value for Hydra where the key is a path; all else stays as it is."""
    key, _, value = argument.partition("=")
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    is_list = value.startswith("[") and value.endswith("]")
    is_switch = key == "cache" and value.lower() in ("true", "false")
    if not PATH_KEYS.fullmatch(key) or value in ("", "null") or is_quoted or is_list or is_switch:
        return argument
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def show_command(start: str, **paths: str | Path) -> str:
    """Write a command to paste into a shell: show_command("train_unet.py mode=predict", input="IMG (2).jpg").

    The script is where the running one is, seen from where the user stands.
    """
    script, *rest = start.split()
    beside = Path(sys.argv[0]).parent / script
    words = [str(beside) if beside.is_file() else script, *rest]
    for key, path in paths.items():
        is_taken_as_it_is = quote_path(f"{key}={path}") != f"{key}={path}"
        words.append(f"{key}={path if is_taken_as_it_is else QuotedString(str(path), Quote.single).with_quotes()}")
    return f"python {shlex.join(words)}"


def stop_at_moved_files(task: str, arguments: list[str]) -> None:
    """Exit with one line where an argument, such as data=cells, names a file that lies where files lay before.

    Args:
        task: the script's folder in configs/: sam2, unet or tracking.
        arguments: the command line, without the script.
    """
    configs = Path(__file__).resolve().parent.parent / "configs"
    asked = [argument.partition("=") for argument in arguments]
    asked_files = {(group, name) for group, _, names in asked for name in names.split(",")}
    for path in sorted(configs.glob("*/*.yaml")):
        group, name = path.parent.name, path.stem
        if (group, name) in asked_files and not (configs / task / group / path.name).is_file():
            lies = f"{group}={name}: configs/{group}/{path.name} is read no more"
            sys.exit(f"error: {lies}; move it to configs/{task}/{group}/")


def stop_at_root_alone(task: str, arguments: list[str]) -> None:
    """Exit with one line where data.root is given but not what lies there: the default data would be generated there.

    Args:
        task, arguments: as those of `stop_at_moved_files`.
    """
    script, given = Path(sys.argv[0]).stem, dict(argument.lstrip("+").partition("=")[::2] for argument in arguments)
    layout_keys = {"data", "data.generate", "experiment", "resume", *["checkpoint"] * (script == "train_unet")}
    if "data.root" in given and not given.keys() & layout_keys and script != "infer_sam2":  # which has no default
        configs = Path(__file__).resolve().parent.parent / "configs"
        places = "**/data/*.yaml" if script == "train_siamfc" else "data/*.yaml"  # track.py takes none of training/
        names = sorted(path.stem for path in (configs / task).glob(places))
        sys.exit(
            f"error: data.root={given['data.root']} is given without data=, whose default is a generated dataset; say "
            f"which layout yours has: data={'|'.join(names)}"
        )


@contextlib.contextmanager
def one_line_errors(script: str, less_memory: str):
    """End the program with one line and status 1 at an error that input, files or values can cause, 130 at Ctrl-C.

    A sweep (--multirun) goes on with its other runs, and Hydra reports the error once more at its end.

    Args:
        script: its name, such as "train_unet".
        less_memory: two settings that need less memory, such as "a smaller train.batch_size or data.image_size".
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        message = describe_end(error, script, less_memory)
        if ranks.launched_count() > 1:
            ranks.end_at_error(error, message)
        if message is None:
            raise
        logging.getLogger(script).debug("where it was raised", exc_info=True)  # shown by hydra.verbose=true
        if not isinstance(error, KeyboardInterrupt):
            if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
                print(message, file=sys.stderr)
                raise  # the other runs of the sweep go on, as they would not after sys.exit
            sys.exit(message)
        print(message, file=sys.stderr)
        sys.exit(130)


def describe_end(error: BaseException, script: str, less_memory: str) -> str | None:
    """Say in one line why the program ends; None for an error that nothing which a user gives should cause."""
    if isinstance(error, KeyboardInterrupt):
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        shown_dir = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
        if (run_dir / "last.pt").is_file():
            command = show_command(f"{script}.py", resume=shown_dir)
            if ranks.launched_count() > 1:
                command = command.replace("python", "torchrun ...", 1)
            return f"interrupted; {shown_dir}/last.pt is saved, go on with: {command}"
        if (run_dir / "pictures").is_dir():  # of infer_sam2.py mode=benchmark
            return f"interrupted; go on with: {show_command(f'{script}.py', resume=shown_dir)}"
        return f"interrupted; what was finished is in {shown_dir}"
    if isinstance(error, MissingMandatoryValue):
        return f"error: {error.full_key} is not given; add {error.full_key}=<value>, see the file of configs/ it is in"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return f"error: {describe_error(error)}"
    return f"error: {describe_out_of_memory(error, script)}; try {less_memory}" if is_out_of_memory(error) else None


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out, the device's or the machine's: PyTorch, OpenCV and Python each say so their way."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def describe_out_of_memory(error: Exception, script: str) -> str:
    """Say in which functions of a script memory ran out, at which step of a training, and how much there is."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = [frame for frame in frames if Path(frame.f_code.co_filename).stem == script]
    place = " > ".join(frame.f_code.co_name for frame in frames if frame.f_code.co_name.isidentifier())
    steps = [f", step {frame.f_locals['loop'].step}" for frame in frames if "loop" in frame.f_locals]
    message = re.sub(r"\[enforce fail.*?\. ", "", " ".join(describe_error(error).split()))
    message = ". ".join(message.split(". ")[:3]).rstrip(".")  # what follows is about PyTorch's allocator
    if not re.search("CUDA|HIP|MPS", message) and hasattr(os, "sysconf"):
        gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        message += f"; this machine has {gigabytes:.1f} GiB"
    return f"out of memory in {place}{''.join(steps)}: {message}"


def describe_error(error: Exception) -> str:
    """Turn an error into what a user reads; one from a data-loading process comes with its whole traceback."""
    if getattr(error, "reason", "") == "surrogates not allowed":  # in a file's name that is not UTF-8 on disk
        start = error.object.rfind("\n", 0, error.start) + 1
        return f"the name {error.object[start:].split(chr(10))[0]!a} is not text in UTF-8; rename the file"
    message = str(error).strip()
    return message.splitlines()[-1] if message.startswith("Caught ") else message
