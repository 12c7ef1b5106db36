"""What the rules of contractions share: index spaces, the roles of weights, biases, and what scales an output.

Every contraction is one pattern: lay the operands out in a common index space, join their components there, record the
cost of that space, and reduce the contracted dimensions away.
"""

from __future__ import annotations

import numpy as np

from secateur.graph.labels import Ints, Labels, Shape, varying
from secateur.graph.network import Role
from secateur.graph.relations import Operand
from secateur.graph.rules import Call, labels_of


def contract(call: Call, operands: list[Operand], shape: Shape, gone: list[int], times: int = 1) -> tuple[Ints, ...]:
    """Returns the components, still of the rank of `shape`, after the dimensions `gone` have been summed over.

    Each point of the index space costs `times` multiply-accumulates.
    """
    joined = call.relations.join(operands)
    call.relations.cost(joined, shape, times)
    return call.relations.reduce(joined, gone)


def insert(operand: Operand, axis: int) -> Operand:
    """Returns the operand with a dimension of size 1 at `axis`."""
    shape = list(operand.shape)
    shape.insert(axis, 1)
    copied = tuple((i + (i >= axis), size) for i, size in operand.copied)
    return Operand(tuple(np.expand_dims(a, axis) for a in operand.arrays), tuple(shape), copied)


def squeeze(arrays: tuple[Ints, ...], axis: int) -> tuple[Ints, ...]:
    """Returns components without a dimension of size 1."""
    return tuple(a.squeeze(axis) for a in arrays)


def mark_roles(call: Call, weight: Labels, roles: dict[int, Role]) -> None:
    """Notes the role of each dimension of a weight, if the operand is one."""
    if weight.is_parameter:
        for array in weight.arrays:
            for axis in varying(array):
                if axis in roles and len(varying(array)) == 1:
                    call.mark_role(array, roles[axis])


def with_bias(call: Call, arrays: tuple[Ints, ...], shape: Shape, axis: int) -> tuple[Ints, ...]:
    """Returns the components after a bias has been added along dimension `axis` of a tensor of `shape`."""
    bias = call["bias"]
    if bias is None:
        return arrays
    here = [bias.numel() if i == axis else 1 for i in range(len(shape))]
    operand = Operand(tuple(a.reshape(here) for a in labels_of(bias).arrays), tuple(here))
    return call.relations.join([Operand(arrays, shape), operand])


def weight_scale(call: Call, weight_axis: int, rank: int, axis: int) -> tuple[Ints, ...] | None:
    """Returns the label arrays of weight and bias rows, as components of the output, for `Labels.scale`."""
    parts = [(call.labels("weight"), weight_axis)]
    if call["bias"] is not None:
        parts.append((call.labels("bias"), 0))
    found: list[Ints] = []
    for labels, source_axis in parts:
        rows = [a for a in labels.scale or () if varying(a) == {source_axis}]
        if not rows:
            return None
        found += [a.reshape([-1 if i == axis else 1 for i in range(rank)]) for a in rows]
    return tuple(found)


def upright(array: Ints, rank: int, axis: int = 1) -> Ints:
    """Returns flat labels as a component along one dimension of `rank`."""
    return array.reshape([-1 if i == axis else 1 for i in range(rank)])
