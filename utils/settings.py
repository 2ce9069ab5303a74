"""Settings: from YAML, whose values can be anything, to typed dataclasses; what a user reads where one is wrong."""

import dataclasses
import inspect
import types
import typing

TYPE_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", type(None): "null",
}  # fmt: skip


def read_settings(cls: type, section: dict, name: str):
    """Build a settings dataclass from a section of the config, with exactly its keys and values of its types.

    Args:
        cls: a dataclass; its annotations are int, float (whole numbers too), bool, str, list, list[X] and X | None.
        section: {key: value}, plain types.
        name: the section's name in messages, such as "train"; "" for keys at the top of the config.
    Returns:
        cls(**section).
    Raises:
        ValueError: for an unknown key, a missing one, or a value of another type, naming it as section.key.
    """
    prefix = f"{name}." if name else ""
    if not isinstance(section, dict):
        raise ValueError(f"{name} is {section!r}; must be a section of keys and values")
    kinds = {field.name: kind for field, kind in _annotated_fields(cls)}
    for key in section:
        if key not in kinds:
            raise ValueError(f"unknown key {prefix}{key}; must be among {', '.join(prefix + known for known in kinds)}")
    for field, kind in _annotated_fields(cls):
        if field.name in section:
            check_type(section[field.name], kind, prefix + field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"the config lacks {prefix}{field.name}; must be {_describe_type(kind)}")
    return cls(**section)


def check_keys(function, keys: dict, name: str, others: tuple[str, ...] = ()) -> None:
    """Raise a ValueError for keyword arguments that a function does not take, or lacks, naming them as section.key.

    Args:
        function: a function or class; bind what is no key of the config with `functools.partial` before.
        keys: {key: value}, to be passed as function(**keys).
        name: the section's name in messages, such as "data".
        others: keys of the section that another function takes; they are named among those that may be.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD] + list(others)
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    for key in keys:
        if key not in known and not takes_all:
            raise ValueError(f"unknown key {name}.{key}; must be among {', '.join(f'{name}.{one}' for one in known)}")
    for one in parameters:
        if one.default is one.empty and one.kind is not one.VAR_KEYWORD and one.name not in keys:
            raise ValueError(f"the config lacks {name}.{one.name}")


def check_type(value, kind: type, name: str) -> None:
    """Raise a ValueError, naming the key, its value and what it must be, for a value that is not of a type.

    Args:
        kind: an annotation, as those of `read_settings`. True and False are no whole numbers, though Python says so.
        name: the dotted key, such as "train.steps".
    """
    if not _is_of_type(value, kind):
        raise ValueError(f"{name} is {value!r}; must be {_describe_type(kind)}")


def _annotated_fields(cls: type) -> list[tuple[dataclasses.Field, type]]:
    kinds = typing.get_type_hints(cls)
    return [(field, kinds[field.name]) for field in dataclasses.fields(cls)]


def _is_of_type(value, kind: type) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is_of_type(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of_type(item, typing.get_args(kind)[0]) for item in value)
    return type(value) in (int, float) if kind is float else type(value) is kind


def _describe_type(kind: type) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_describe_type(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"a list, each {_describe_type(typing.get_args(kind)[0])}"
    return TYPE_WORDS[kind]


def describe_error(error: Exception) -> str:
    """Turn an error into what a user reads; one from a data-loading process comes with its whole traceback."""
    message = str(error).strip()
    return message.splitlines()[-1] if message.startswith("Caught ") else message
