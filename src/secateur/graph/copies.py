"""Throw-away copies of models, and example inputs in the forms that a trace needs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secateur.errors import TraceError
from secateur.graph.labels import named_tensors, tensors_in


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
            if type(value) in (dict, OrderedDict, set) and not value:
                memo[id(value)] = type(value)()  # a dozen empty tables of hooks in each module, slow to copy
            elif not isinstance(value, (int, float, str)):
                for tensor in tensors_in(value):
                    if id(tensor) not in memo:
                        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise TraceError(f"the model ({type(model).__name__}) cannot be copied: {error}") from error


def copied(model: nn.Module) -> nn.Module:
    """Returns a deep copy of `model`, weights included, in eval mode; raises TraceError when it cannot be copied."""
    try:
        return copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:
        raise TraceError(f"the model ({type(model).__name__}) cannot be copied: {error}") from error


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
