"""Parts of a recipe that are chosen by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from secateur.errors import InputError, unknown_name

Part = TypeVar("Part")


def chosen(kind: str, name: str, known: Mapping[str, type[Part]], options: Mapping[str, Any]) -> Part:
    """Returns `known[name]` made with `options`.

    Raises `InputError` for a name that is not known, for an option that it does not have, and for one that is missing.
    """
    if name not in known:
        raise unknown_name(kind, name, known)
    parameters = inspect.signature(known[name]).parameters
    for option in options:
        if option not in parameters:
            raise unknown_name(f"option of the {kind} {name}", option, parameters)
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise InputError(f"the {kind} {name} needs {' and '.join(missing)}")
    return known[name](**options)
