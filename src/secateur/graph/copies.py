"""Throw-away copies of models, and example inputs in the forms that a trace needs."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from secateur.errors import TraceError
from secateur.graph.labels import named_tensors, tensors_in


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses the search for garbage in cycles: a trace makes many small objects that live until it ends."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def skeleton(model: nn.Module, shapes: dict[str, torch.Size] | None = None) -> nn.Module:
    """Returns a deep copy of `model` in eval mode whose tensors are on `meta`, with other `shapes` where given by name.

    Raises TraceError when the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    shapes = shapes or {}
    for name, tensor in named_tensors(model).items():
        empty = torch.empty(shapes.get(name, tensor.shape), dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in _ATOMS or (type(value) in _TABLES and not value):
                continue
            for tensor in tensors_in(value):
                if id(tensor) not in memo:
                    memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    return _deep_copy(model, memo)


def _deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Returns what `copy.deepcopy(model, memo)` does, in eval mode, for most modules without its detours."""
    try:
        plain = [m for m in model.modules() if _has_usual_copy(type(m))]
        memo |= {id(m): type(m).__new__(type(m)) for m in plain}
        for module in plain:
            memo[id(module)].__setstate__(_copied_state(module, memo))
        return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise TraceError(f"the model ({type(model).__name__}) cannot be copied: {error}") from error


_ATOMS = frozenset((int, float, str, bool, type(None)))
_TABLES = frozenset((dict, OrderedDict, set))


@cache
def _has_usual_copy(kind: type[nn.Module]) -> bool:
    """Whether `copy.deepcopy` copies a module of this class attribute by attribute: that can be done faster."""
    ways = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
    usual = all(getattr(kind, way, None) is getattr(nn.Module, way, None) for way in ways)
    return usual and not any("__slots__" in vars(c) for c in kind.__mro__)


def _copied_state(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    """Returns deep copies of a module's attributes; most are numbers, and tables of hooks without any."""
    state = module.__getstate__()
    for key, value in state.items():
        kind = type(value)
        if kind in _TABLES and not value:
            state[key] = memo.setdefault(id(value), kind())
        elif kind not in _ATOMS:
            state[key] = copy.deepcopy(value, memo)
    return state


def copied(model: nn.Module) -> nn.Module:
    """Returns a deep copy of `model`, weights included, in eval mode; raises TraceError when it cannot be copied."""
    return _deep_copy(model, {}).requires_grad_(False)


def twin(model: nn.Module) -> nn.Module:
    """Returns a copy of the modules in eval mode with the same parameters; buffers are copied.

    Raises TraceError when the model cannot be copied.
    """
    return _deep_copy(model, {id(p): p for p in model.parameters()})


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns nested inputs (tuples, lists, dicts) with `change` done to each tensor."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, change) for v in value)
    return {k: map_tensors(v, change) for k, v in value.items()} if isinstance(value, dict) else value


def as_type(value: Any, dtype: torch.dtype | None) -> Any:
    """Returns nested inputs with floating tensors as `dtype` if it is given."""
    return map_tensors(value, lambda t: t.to(dtype) if dtype is not None and t.is_floating_point() else t)


def to_meta(value: Any) -> Any:
    """Returns nested example inputs with all tensors on `meta`."""
    return map_tensors(value, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns positional and keyword arguments for example inputs given as a tensor, a tuple or a dict."""
    if isinstance(inputs, dict):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def output_tensors(output: Any) -> list[torch.Tensor]:
    """Returns all tensors in a model's output: tensor, tuple, list, dict (a Hugging Face output is one) or object."""
    if isinstance(output, (torch.Tensor, tuple, list, dict)):
        return list(tensors_in(output))
    return list(tensors_in(vars(output))) if hasattr(output, "__dict__") else []
