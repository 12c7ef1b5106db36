"""From plain values, as YAML and JSON hold them, to configurations: every key known, every value of its type."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from secateur.errors import InputError, unknown_name

T = TypeVar("T")


def build(kind: type[T], value: Any, where: str) -> T:
    """Returns the dataclass `kind` with the fields that the mapping `value` gives; fields left out have their default.

    Values are taken as the fields' annotations say: nested dataclasses from mappings, tuples from lists, a float also
    from an integer or from text such as `1e-4` (which YAML takes for text). `where` (a file and a key) begins every
    error.

    Raises:
        InputError: An unknown or missing key, a value of the wrong type, or one that the dataclass itself refuses.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected keys of {kind.__name__} with their values, found {value!r}")
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # pyright: ignore[reportArgumentType]
    for key in value:
        if key not in fields:
            raise InputError(f"{where}: {unknown_name('key', str(key), fields)}")
    missing = [name for name, f in fields.items() if _is_required(f) and name not in value]
    if missing:
        raise InputError(f"{where}: {', '.join(missing)} must be given")
    hints = get_type_hints(kind)
    given = {key: convert(hints[key], entry, f"{where}.{key}") for key, entry in value.items()}
    try:
        return kind(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def convert(hint: Any, value: Any, where: str) -> Any:
    """Returns `value` as the annotation `hint` asks for it; raises InputError beginning with `where` if it cannot."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_that_fits(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where}: {unknown_name('value', str(value), map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value, where)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = arguments if Ellipsis not in arguments else (arguments[0],) * len(value)
        if len(kinds) == len(value):
            return tuple(convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin in (Mapping, dict) and isinstance(value, Mapping):
        return {str(k): convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    return _plain(hint, value, where)


def _first_that_fits(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Returns `value` as the first of several annotations that takes it, the exact type before all others."""
    problems = []
    for kind in sorted(kinds, key=lambda kind: kind is not type(value)):
        try:
            return convert(kind, value, where)
        except InputError as error:
            problems.append(error)
    # The most telling complaint is that of a kind with parts of its own: it says which part is wrong.
    raise max(problems, key=lambda error: len(str(error)))


def _plain(hint: Any, value: Any, where: str) -> Any:
    """Returns a number, a text, a truth value or None if it is what the annotation asks for."""
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise InputError(f"{where}: expected {expected.replace('NoneType', 'nothing')}, found {value!r}")
