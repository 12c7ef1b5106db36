"""Labels: the integers that travel with every tensor of a traced model, and the array algebra on them.

Each index along each dimension of each parameter has a label. A tensor carries *components*: integer arrays of its own
rank that have size 1 along every dimension in which the label does not vary. A linear weight has two, `[out, 1]` and
`[1, in]`; its output has one, `[1, 1, out]`; a query tensor split into heads has one joint component `[1, H, 1, D]`.
Removing a label removes every entry of the tensor whose position holds that label in one of the components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Ints = NDArray[np.int64]
Shape = tuple[int, ...]

CONSTANT = 0
"""The label of everything that may never be removed."""

_SLOT = "_secateur_labels"


@dataclass(frozen=True)
class Labels:
    """The components of one tensor.

    `scale` are label arrays with this meaning: multiplying the parameters' entries at these labels by a number
    multiplies the tensor by it (None where no such labels exist). `factor` are labels of which the same is true, but
    which have no place in the tensor any more: a product of queries and keys scales with the queries. `is_parameter` is
    True while the tensor is computed from parameters alone. `node` is the number of the operation that made the tensor
    (-1 for parameters and inputs). `copied` are dimensions along which one index is copied, with the size that the
    model asks for (None where torch works it out): such a dimension is as long as whatever it meets.
    """

    arrays: tuple[Ints, ...] = ()
    scale: tuple[Ints, ...] | None = None
    is_parameter: bool = False
    node: int = -1
    factor: Ints | None = None
    copied: tuple[tuple[int, Any], ...] = ()

    @property
    def scaling(self) -> tuple[Ints, ...]:
        """All labels that scale the tensor; empty where there are none."""
        return self.scale or (() if self.factor is None else (self.factor,))

    def map(self, transform: Callable[[Ints], Ints]) -> Labels:
        """Returns the labels after a pure shape operation `transform` on arrays of the tensor's rank."""
        scale = None if self.scale is None else tuple(transform(a) for a in self.scale)
        return Labels(tuple(transform(a) for a in self.arrays), scale, self.is_parameter, factor=self.factor)


NOTHING = Labels()


def leaves(value: object) -> list[object]:
    """Returns everything in nested call arguments that is not a container, in order; of a slice, its two ends."""
    found: list[object] = []
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, (tuple, list)):
            pending += reversed(current)
        elif isinstance(current, dict):
            pending += reversed(current.values())
        elif isinstance(current, slice):
            pending += (current.stop, current.start)
        else:
            found.append(current)
    return found


def tensors_in(value: object) -> list[torch.Tensor]:
    """Returns all tensors in nested arguments."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns all parameters and buffers of `model`, each once, under the first of its names."""
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for found, table in ((parameters, module._parameters), (buffers, module._buffers)):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{name}" if path else name] = tensor
    return {**parameters, **buffers}


def labels_of(tensor: object) -> Labels:
    """Returns the labels attached to a tensor; none for anything that has not been labelled."""
    return getattr(tensor, _SLOT, NOTHING)


def attach(tensor: torch.Tensor, labels: Labels) -> None:
    """Makes `tensor` carry `labels`."""
    setattr(tensor, _SLOT, labels)


def detach(tensor: torch.Tensor) -> None:
    """Takes the labels off `tensor`."""
    if hasattr(tensor, _SLOT):
        delattr(tensor, _SLOT)


def varying(array: Ints) -> frozenset[int]:
    """Returns the dimensions along which a component's label varies."""
    return frozenset([i for i, n in enumerate(array.shape) if n > 1])


def align_right(array: Ints, rank: int) -> Ints:
    """Returns `array` with leading dimensions of size 1 added up to `rank`, as broadcasting does."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def compress(array: Ints) -> Ints:
    """Returns `array` with size 1 along each dimension in which it is constant."""
    for axis, n in enumerate(array.shape):
        if n > 1:
            first = array.take([0], axis)
            if (array == first).all():
                array = first
    return array


def slices(array: Ints, axes: Sequence[int]) -> Ints:
    """Returns a 2-D view: one row for each position along `axes`, holding all labels found there."""
    rest = [i for i in range(array.ndim) if i not in axes]
    moved = array.transpose(*axes, *rest)
    rows = int(np.prod([array.shape[i] for i in axes], dtype=np.int64))
    return moved.reshape(rows, -1)


def align_blocks(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """Returns the smallest contiguous runs of dimensions of `old` and `new` that hold equally many elements."""
    blocks: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        blocks.append((range(i0, i), range(j0, j)))
    return blocks


def regroup(array: Ints, old: Shape, new: Shape, blocks: list[tuple[range, range]]) -> Ints:
    """Returns a component of a tensor of shape `old` after a view as `new` (blocks: see `align_blocks`).

    Only the blocks in which the label varies are expanded, reshaped and compressed again.
    """
    if all(n == 1 for n in array.shape):
        return array.reshape((1,) * len(new))
    full: list[int] = []
    target: list[int] = []
    whole = True
    for before, after in blocks:
        if any(array.shape[i] > 1 for i in before):
            whole = whole and len(before) == len(after) == 1
            full += [old[i] for i in before]
            target += [new[i] for i in after]
        else:
            full += [1] * len(before)
            target += [1] * len(after)
    if whole:  # dimensions that keep their size, or change places with ones that are alike
        return array.reshape(target)
    return compress(np.broadcast_to(array, full).reshape(target))
