"""Which operations of a trace ran inside which call of which module, and what went in and came out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from secateur.graph.labels import labels_of

NO_STRUCTURE = -1
"""The `length` of an output that is neither a tensor nor a tuple of tensors."""


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: the operations from number `start` up to `stop` ran inside it.

    `given` and `result` are the operations that made the first tensor among its arguments and its output (-1: none, an
    input of the model or a parameter). `length` is 0 where the output is a tensor; n where it is a tuple of n, the
    first a tensor, the others tensors or None; otherwise `NO_STRUCTURE`. `rank` is that of the output, and
    `keeps_shape` tells whether both tensors have the same shape.
    """

    path: str
    start: int
    stop: int
    given: int
    result: int
    length: int
    rank: int
    keeps_shape: bool


@contextmanager
def module_calls(model: nn.Module, path: list[str], operations: Sized, calls: list[ModuleCall]) -> Iterator[None]:
    """Keeps in `path` the modules that are running, and adds to `calls` each call of one when it ends.

    `operations` grows as operations run.
    """
    opened: list[tuple[int, int, torch.Size | None]] = []

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path.append(name)
        first = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        opened.append((len(operations), labels_of(first).node, _shape(first)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        start, given, shape = opened.pop()
        tensor, length = _first_output(output)
        made, result = _shape(tensor), labels_of(tensor).node
        rank = 0 if made is None else len(made)
        calls.append(ModuleCall(path.pop(), start, len(operations), given, result, length, rank, made == shape))

    # the model is a throw-away copy: its tables of hooks can be written without the handles that removal needs
    for name, module in model.named_modules():
        before = cast(OrderedDict[int, Any], module._forward_pre_hooks)
        before[_HOOK] = lambda module, args, kwargs, name=name: enter(name, args, kwargs)
        before.move_to_end(_HOOK, last=False)
        module._forward_pre_hooks_with_kwargs[_HOOK] = True
        module._forward_hooks[_HOOK] = leave
    try:
        yield
    finally:
        for module in model.modules():
            del module._forward_pre_hooks[_HOOK], module._forward_pre_hooks_with_kwargs[_HOOK]
            del module._forward_hooks[_HOOK]


_HOOK = -1


def _shape(tensor: torch.Tensor | None) -> torch.Size | None:
    if tensor is None:
        return None
    with torch._C.DisableTorchFunction():  # the numbers alone: nothing asks for them on behalf of the model
        return tensor.shape


def _first_output(output: Any) -> tuple[torch.Tensor | None, int]:
    if isinstance(output, torch.Tensor):
        return output, 0
    if type(output) is tuple and output and isinstance(output[0], torch.Tensor):
        plain = all(v is None or isinstance(v, torch.Tensor) for v in output)
        return output[0], len(output) if plain else NO_STRUCTURE
    return None, NO_STRUCTURE
