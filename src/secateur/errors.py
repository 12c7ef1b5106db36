"""The package's own exceptions: everything that a caller may want to catch derives from `SecateurError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Base of every error raised on purpose by this package; the command line prints it and exits with 2."""


class InputError(SecateurError, ValueError):
    """An argument cannot be used as given: unknown name, value out of range, wrong shape, NaN."""


class TraceError(SecateurError):
    """The model could not be analysed; the model's own error is its `__cause__`."""


class PlanError(SecateurError):
    """A plan does not fit the model, or a request contradicts what the model's structure allows."""


class CutError(SecateurError):
    """The cut model failed its check; the model was left exactly as it had been."""


class DataError(SecateurError):
    """A data set is missing, incomplete, or holds something that cannot be read."""


class CheckpointError(SecateurError):
    """A saved model is corrupt, incomplete, or was not written by this package."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Returns the error for a name that is not among the `known` ones, with the nearest of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    listed = f" Known: {', '.join(names)}." if len(names) <= 24 else ""
    return InputError(f"unknown {kind} {name!r}{hint}{listed}")
