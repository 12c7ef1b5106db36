"""What goes into each layer of a running model: layer inputs as rows, and their moments.

A *consumer* is a weight that mixes channels: of a linear layer, or of a convolution. `watching` sees every use of one,
also where the model calls `F.linear` on a parameter itself (BEiT does) or on some of its rows
(`nn.MultiheadAttention`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PART = 2**26
"""Values that what a convolution reads is laid out in at a time; at stride 1."""


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a consumer: the call, its arguments by name, and which rows of the parameter it takes.

    `arguments` has `input`, `weight`, `bias`, and for convolutions `stride`, `padding`, `dilation`, `groups`.
    """

    name: str
    rows: slice
    func: Any
    arguments: dict[str, Any]

    @property
    def dims(self) -> int:
        """Over how many dimensions a convolution runs; 0 for a linear layer."""
        return _MIXING[self.func._schema.name]

    def run(self) -> Tensor:
        """Returns the output of the call, with `arguments` as they are now."""
        return self.func(**self.arguments)

    @property
    def groups(self) -> int:
        """Into how many groups a convolution divides its channels; 1 for a linear layer."""
        return int(self.arguments.get("groups", 1))

    def inputs(self) -> Tensor:
        """Returns what each output position reads, as rows: [groups, positions, columns of the weight]."""
        x: Tensor = self.arguments["input"]
        if not self.dims:
            return x.reshape(1, -1, x.shape[-1])
        patches = _patches(x if x.dim() > self.dims + 1 else x[None], self.arguments, self.dims)
        return patches.reshape(patches.shape[0], self.groups, -1, patches.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)

    def parts_of_inputs(self) -> Iterator[Tensor]:
        """Yields `inputs` in parts of about `PART` values: a convolution reads each value once per kernel position."""
        x: Tensor = self.arguments["input"]
        if not self.dims or x.dim() == self.dims + 1:
            yield self.inputs()
            return
        each = x[0].numel() * math.prod(self.arguments["weight"].shape[2:])
        for part in x.split(max(1, PART // max(1, each))):
            yield replace(self, arguments={**self.arguments, "input": part}).inputs()

    def outputs(self, output: Tensor) -> Tensor:
        """Returns the output of the call as rows, in the order of `inputs`: [groups, positions, rows of the weight]."""
        if not self.dims:
            return output.reshape(1, -1, output.shape[-1])
        flat = (output if output.dim() > self.dims + 1 else output[None]).flatten(2)
        return flat.reshape(flat.shape[0], self.groups, -1, flat.shape[-1]).permute(1, 0, 3, 2).flatten(1, 2)


@contextmanager
def watching(tensors: Mapping[str, Tensor], on_use: Callable[[Use], Tensor]) -> Iterator[None]:
    """Calls `on_use(use)` for every use of `tensors`, parameters by name; what that returns is the call's output.

    Everything runs without gradients.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would run a whole layer as one operator
    try:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), _Watch(tensors, on_use):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Watch(TorchDispatchMode):
    """Sees operators before torch decomposes them."""

    def __init__(self, tensors: Mapping[str, Tensor], on_use: Callable[[Use], Tensor]) -> None:
        super().__init__()
        self._parameters = {t.untyped_storage().data_ptr(): (name, t) for name, t in tensors.items()}
        self._on_use = on_use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _MIXING:
            names = (a.name for a in func._schema.arguments)
            arguments = dict(zip(names, args, strict=False)) | kwargs
            found = self._find(arguments["weight"])
            if found is not None:
                return self._on_use(Use(*found, func, arguments))
        return func(*args, **kwargs)

    def _find(self, weight: Tensor) -> tuple[str, slice] | None:
        """Returns the name of the parameter that a weight is, or some of whose rows it is, and which rows."""
        name, parameter = self._parameters.get(weight.untyped_storage().data_ptr(), ("", None))
        if parameter is None or weight.shape[1:] != parameter.shape[1:] or weight.stride() != parameter.stride():
            return None
        first, rest = divmod(int(weight.storage_offset() - parameter.storage_offset()), max(1, parameter.stride(0)))
        return None if rest else (name, slice(first, first + weight.shape[0]))


_MIXING = {"aten::linear": 0, "aten::conv1d": 1, "aten::conv2d": 2, "aten::conv3d": 3}
"""The operators that mix channels by a weight, and over how many dimensions they convolve."""


def _patches(x: Tensor, arguments: dict[str, Any], dims: int) -> Tensor:
    """Returns what a convolution reads at each output position: [batch, channels x kernel, positions]."""
    kernel = arguments["weight"].shape[2:]
    stride, dilation = (_each(arguments.get(k, 1), dims) for k in ("stride", "dilation"))
    padding = arguments.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, dims)]
    x = F.pad(x, [n for side in reversed(sides) for n in side])
    for dim, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    # [batch, channels, positions …, kernel …] -> channels and kernel together, positions last
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return x.permute(order).flatten(2 + dims).flatten(1, 1 + dims)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


@dataclass(eq=False)
class Moments:
    """Sums over rows of inputs: how many, their sum [groups, d] and their Gram matrix [groups, d, d], in float64."""

    count: int
    total: Tensor
    gram: Tensor

    @classmethod
    def zeros(cls, groups: int, width: int, device: torch.device) -> Moments:
        """Returns the moments of no rows."""
        options: Any = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(groups, width, **options), torch.zeros(groups, width, width, **options))

    def add(self, rows: Tensor) -> None:
        """Adds rows [groups, positions, d]."""
        self.count += rows.shape[1]
        self.total += rows.sum(1, dtype=torch.float64)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.gram += rows.mT @ rows

    @property
    def mean(self) -> Tensor:
        """The mean [groups, d]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The covariance [groups, d, d], divided by the number of rows."""
        return self.gram / self.count - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)
