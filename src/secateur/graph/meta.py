"""Operators on `meta` tensors, each worked out once for tensors of the same sizes.

Torch's kernels for `meta` are written in Python, and a network repeats the same blocks: most outputs of a trace can be
made from the memory of an earlier one. Those of a few operators, which nearly every layer runs and whose kernels take
longest, are made without them where the sizes of the arguments are the usual ones.
"""

from __future__ import annotations

from typing import Any

import torch

from secateur.graph.labels import tensors_in

_Output = tuple[torch.Size, tuple[int, ...], torch.dtype]


class MetaKernels:
    """Runs operators; of one that was run before on tensors of the same sizes, the outputs are made from memory."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[_Output]] = {}
        self._fresh: dict[Any, bool] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns the output of `func`, an operator, on `meta` tensors."""
        if func not in self._fresh:
            self._fresh[func] = _makes_fresh_tensors(func)
        described = _describe(func, args, kwargs) if self._fresh[func] else None
        if described is None:
            return func(*args, **kwargs)
        key, storages = described
        made = self._known.get(key)
        if made is None:
            shape = None if kwargs else _usual_shape(func._schema.name, args)
            if shape is None:
                output = func(*args, **kwargs)
            else:
                output = torch.empty(shape, dtype=tensors_in(args)[0].dtype, device="meta")
            outputs = output if isinstance(output, tuple) else (output,)
            if all(_is_fresh(o, storages) for o in outputs):
                self._known[key] = [(o.shape, o.stride(), o.dtype) for o in outputs]
            return output
        tensors = tuple(torch.empty_strided(n, s, dtype=d, device="meta") for n, s, d in made)
        return tensors if len(func._schema.returns) > 1 else tensors[0]


def _makes_fresh_tensors(func: Any) -> bool:
    """Whether an operator returns tensors that, as far as its schema tells, are none of its arguments."""
    returns = func._schema.returns
    aliases = any(a.alias_info for a in (*func._schema.arguments, *returns))
    return bool(returns) and not aliases and all(str(r.type) == "Tensor" for r in returns)


def _is_fresh(output: torch.Tensor, storages: set[int]) -> bool:
    """Whether an output is a plain tensor of its own: dropout in eval mode returns what it was given."""
    plain = type(output) is torch.Tensor and output.is_meta and int(output.storage_offset()) == 0
    return plain and output.untyped_storage()._cdata not in storages


def _describe(func: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], set[int]] | None:
    """Returns what the sizes of the output depend on, and the storages of the arguments; None if that is not known."""
    key: list[Any] = [func]
    storages: set[int] = set()
    pending = [*args, *kwargs.keys(), *kwargs.values()]
    pending.reverse()
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            if not value.is_meta:
                return None
            storages.add(value.untyped_storage()._cdata)
            key += (value.shape, value.stride(), value.dtype)
        elif isinstance(value, (tuple, list)):
            key.append(len(value))
            pending += reversed(value)
        elif value is None or isinstance(value, _PLAIN):
            key += (type(value), value)
        else:
            return None
    return tuple(key), storages


_PLAIN = (int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


_CHANNELS = {"aten::batch_norm": 1, "aten::layer_norm": -1, "aten::gelu": -1}
"""Operators whose output is like their first argument, and its dimension along which their other tensors run."""


def _usual_shape(name: str, args: Any) -> tuple[int, ...] | None:
    """Returns the shape of the output, contiguous and of the type of all arguments, where these are the usual ones.

    None in every other case: torch's own kernel makes the output then, or says what is wrong.
    """
    if name not in _USUAL:
        return None
    first, *others = tensors = tensors_in(args)
    sizes = tuple(first.shape)
    if len(sizes) < 2 or not all(t.is_contiguous() and t.dtype == first.dtype for t in tensors):
        return None
    if name == "aten::linear":
        outputs = others[0].shape[0]
        fits = others[0].shape == (outputs, sizes[-1]) and all(bias.shape == (outputs,) for bias in others[1:])
        return (*sizes[:-1], outputs) if fits else None
    if name == "aten::cat":
        dim = args[1] % len(sizes) if len(args) > 1 else 0
        fits = all(
            t.ndim == len(sizes) and t.shape[:dim] + t.shape[dim + 1 :] == sizes[:dim] + sizes[dim + 1 :]
            for t in others
        )
        return (*sizes[:dim], sum(t.shape[dim] for t in tensors), *sizes[dim + 1 :]) if fits else None
    channels = sizes[_CHANNELS[name]]
    fits = all(t.shape == (channels,) for t in others) and (name != "aten::layer_norm" or args[1] == [channels])
    return sizes if fits else None


_USUAL = {*_CHANNELS, "aten::linear", "aten::cat"}
