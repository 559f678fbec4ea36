"""Configs at the door of the library: arguments before the fields, sections after.

A config file is a function of one string that returns a `ConfigDict`. Below this module
no code sees a `ConfigDict`: each section becomes a frozen dataclass, strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import difflib
import json
import types
import typing
from typing import Any, TypeVar

import ml_collections

T = TypeVar("T")


def parse(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Parses "name=value,name=value", each value typed by its default.

    Example:
        a = config.parse(arg, lm="vicuna-7b", views=4)

    Raises:
        ValueError: unknown name, missing "=", or a value of another type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, equals, text = part.partition("=")
        if not equals or name not in defaults:
            raise ValueError(
                f"config argument {part!r}: use name=value with a name of "
                f"{', '.join(defaults) or 'none (this config takes no arguments)'}"
                f"{_meant(name, defaults)}."
            )
        values[name] = _typed(name, text, defaults[name])
    return ml_collections.ConfigDict(values)


def _typed(name: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"config argument {name}={text!r}: use true or false.")
        return text.lower() in ("true", "1")
    try:
        return type(default)(text)
    except ValueError as error:
        kind = type(default).__name__
        raise ValueError(f"config argument {name}={text!r} is not {kind}.") from error


def from_config(cls: type[T], section: Mapping[str, Any], where: str) -> T:
    """Builds a frozen dataclass from a section; nested dataclasses and tuples too.

    Args:
        where: name of the section, for messages.

    Raises:
        ValueError: a key that the class does not have, a missing one, or a wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in section:
        if key not in fields:
            raise ValueError(
                f"config.{where}.{key} does not exist{_meant(key, fields)}; "
                f"{where} has {', '.join(fields)}."
            )
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(section))
    if missing:
        raise ValueError(f"config.{where} lacks {', '.join(missing)}: set it.")
    hints = typing.get_type_hints(cls)
    values = {
        key: _cast(hints[key], value, f"{where}.{key}")
        for key, value in section.items()
    }
    return cls(**values)


def _cast(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type says, or an error that names the place."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        plain = [arg for arg in args if arg is not type(None)]
        return _cast(plain[0], value, where) if len(plain) == 1 else value
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(
                f"config.{where}={value!r}: use one of "
                f"{', '.join(repr(arg) for arg in args)}."
            )
        return value
    if dataclasses.is_dataclass(hint):
        return from_config(hint, value, where)
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ValueError(f"config.{where}={value!r}: use a tuple.")
        inner = args[0] if args else Any
        return tuple(_cast(inner, v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, ml_collections.ConfigDict):
        return value.to_dict()
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ValueError(
            f"config.{where}={value!r} is {type(value).__name__}; it must be "
            f"{hint.__name__}."
        )
    return value


def completed(
    cls: type, section: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """The section with every field that it leaves to its default, nested ones too.

    The command line changes fields that are there, and no others.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, (hint, may_be_none) = field.name, _plain(hints[field.name])
        value = section.get(name)
        if dataclasses.is_dataclass(hint):
            if value is not None or not may_be_none:
                part = ml_collections.ConfigDict() if value is None else value
                section[name] = completed(hint, part)
        elif value is None and may_be_none:
            section[name] = ml_collections.config_dict.placeholder(hint)
        elif name not in section and field.default is not dataclasses.MISSING:
            section[name] = field.default
        elif name not in section and field.default_factory is not dataclasses.MISSING:
            section[name] = field.default_factory()
    return section


def _plain(hint: Any) -> tuple[Any, bool]:
    """The type of an annotation without None, and whether None was there."""
    args = typing.get_args(hint)
    if type(None) not in args:
        return hint, False
    return next(arg for arg in args if arg is not type(None)), True


def _meant(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def to_json(config: ml_collections.ConfigDict) -> str:
    """The resolved config as text that `from_json` reads back."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ml_collections.ConfigDict:
    """Reads what `to_json` wrote; lists come back as tuples, as configs write them."""

    def frozen(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: frozen(item) for key, item in value.items()}
        if isinstance(value, list):
            return tuple(frozen(item) for item in value)
        return value

    return ml_collections.ConfigDict(frozen(json.loads(text)))
