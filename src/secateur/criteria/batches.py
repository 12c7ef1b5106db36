"""Calibration batches: reading them, checking them, and saying which of them a model fails on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.errors import InputError, SecateurError


@dataclass(frozen=True)
class Batch:
    """Samples as arguments for the model; `index` is the batch's position, for errors."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor

    @property
    def size(self) -> int:
        return self.labels.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Applies `change` to every tensor that has one row per sample."""
        args = tuple(change(value) if has_rows(value) else value for value in self.args)
        kwargs = {key: change(value) if has_rows(value) else value for key, value in self.kwargs.items()}
        return Batch(self.index, args, kwargs, change(self.labels))

    def parts(self, size: int) -> Iterator[Batch]:
        """Cuts the batch into pieces of at most `size` samples."""
        for start in range(0, self.size, size):
            yield self.map(lambda tensor, rows=slice(start, start + size): tensor[rows])


def read_batch(index: int, item: Any) -> Batch:
    """Returns the item of a loader as a batch. Raises InputError if it is none, is empty, or holds NaN."""
    if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[1], Tensor) and item[1].dim() > 0):
        raise InputError(
            f"batch {index}: expected a pair (inputs, labels) with a tensor of labels, found {_described(item)}; "
            "batches is an iterable of such pairs, a single one goes in a list: [(inputs, labels)]"
        )
    inputs, labels = item
    args = tuple(inputs) if isinstance(inputs, tuple | list) else () if isinstance(inputs, Mapping) else (inputs,)
    batch = Batch(index, args, dict(inputs) if isinstance(inputs, Mapping) else {}, labels)
    if batch.size == 0:
        raise InputError(f"batch {index} is empty: its labels have shape {tuple(labels.shape)}")
    named = {**{f"input {i}": value for i, value in enumerate(args)}, **batch.kwargs, "labels": labels}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            continue
        if value.dim() > 0 and value.shape[0] != batch.size:
            raise InputError(f"batch {index}: {name} has shape {tuple(value.shape)}, but there are {batch.size} labels")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"batch {index}: {name} of shape {tuple(value.shape)} holds NaN or infinite values")
    return batch


def read_batches(source: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """Yields the items of a loader as batches on `device`. Raises InputError if there is none or one is no use."""
    try:
        items = iter(source)
    except TypeError as error:
        raise InputError(
            f"batches must be an iterable of pairs (inputs, labels), found {_described(source)}"
        ) from error
    batch = None
    for index, item in enumerate(items):
        batch = read_batch(index, item).map(lambda tensor: tensor.to(device))
        yield batch
    if batch is None:
        raise InputError("the calibration batches are empty; an iterator that was used before has nothing left")


def require_labels(batch: Batch, shape: tuple[int, ...]) -> None:
    """Raises InputError if labels do not fit logits of this shape (of one sample) under cross-entropy."""
    if len(shape) < 2:
        raise InputError(f"cross-entropy needs logits of shape [samples, classes, …], found {shape}; pass loss=")
    labels, expected = batch.labels, (batch.size, *shape[2:])
    if labels.is_floating_point():
        expected = (batch.size, *shape[1:])
    if tuple(labels.shape) != expected:
        raise InputError(
            f"batch {batch.index}: labels of type {labels.dtype} must have shape {expected} to go with logits of "
            f"shape {(batch.size, *shape[1:])}, found {tuple(labels.shape)}"
        )
    if not labels.is_floating_point():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= shape[1]:
            wrong = low if low < 0 else high
            raise InputError(f"batch {batch.index}: label {wrong} is out of range; the model has {shape[1]} classes")


def require_finite_loss(loss: Tensor, batch: Batch) -> None:
    if not bool(torch.isfinite(loss).all()):
        raise InputError(f"batch {batch.index}: the loss is NaN or infinite")


@contextmanager
def blamed_on(batch: Batch) -> Iterator[None]:
    """Re-raises what the model or the loss raises as an InputError that names the batch."""
    try:
        yield
    except (SecateurError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AssertionError, AttributeError) as error:
        shapes = ", ".join(_described(value) for value in (*batch.args, *batch.kwargs.values()))
        raise InputError(
            f"batch {batch.index}: the model or the loss failed on its samples ({shapes}): {first_line(error)}"
        ) from error


def has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
