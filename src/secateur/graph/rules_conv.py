"""The rule of convolutions: full, grouped, depthwise and transposed, in any number of dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from secateur.graph.contraction import contract, insert, mark_roles, squeeze, upright, weight_scale, with_bias
from secateur.graph.labels import Ints, Labels, Shape, varying
from secateur.graph.relations import Operand
from secateur.graph.rules import Call, labels_of, rule
from secateur.graph.sizes import RawExtent

KERNEL = "kernel position of a convolution"


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> Labels:
    """x [B, I, s…], weight [O, I/groups, k…] (transposed: [I, O/groups, k…]); index space [B, O, I/groups, s…].

    The dimensions s are those of the output, or of the input of a transposed convolution: each pairs with each k.
    """
    x, weight, out = call["input"], call["weight"], call.output
    transposed = bool(call["transposed"]) or "transpose" in call.name
    for array in labels_of(weight).arrays:
        if any(n > 1 for n in array.shape[2:]):
            call.relations.freeze(array, KERNEL)
    mark_roles(call, labels_of(weight), {0: "in", 1: "out"} if transposed else {0: "out", 1: "in"})
    single = x.ndim == weight.ndim - 1  # no batch
    arrays = tuple(a[None] if single else a for a in labels_of(x).arrays)
    sizes = tuple((x if transposed else out).shape)
    space = _Convolved(_without_slides(call, arrays), (1, *sizes) if single else sizes, transposed)
    result = _full(call, space) if (call["groups"] or 1) == 1 else _grouped(call, space)
    result = tuple(a[0] for a in result) if single else result
    axis = 0 if single else 1
    return Labels(
        with_bias(call, result, tuple(out.shape), axis),
        weight_scale(call, 1 if transposed else 0, out.ndim, axis) if (call["groups"] or 1) == 1 else None,
        all(labels_of(t).is_parameter for t in (x, weight)),
    )


@dataclass(frozen=True)
class _Convolved:
    """The components [B, I, s…] of what a convolution reads, the sizes of the space that it runs over, and its kind."""

    arrays: tuple[Ints, ...]
    sizes: Shape
    transposed: bool

    def weight(self, call: Call) -> tuple[list[Ints], list[Ints]]:
        """Returns the label arrays, flat, of the output and of the input side of the weight."""
        sides = [[a.ravel() for a in call.labels("weight").arrays if varying(a) == {dim}] for dim in (0, 1)]
        return (sides[1], sides[0]) if self.transposed else (sides[0], sides[1])


def _without_slides(call: Call, arrays: tuple[Ints, ...]) -> tuple[Ints, ...]:
    """Returns the components that a convolution leaves in place: none along a dimension in which its kernel moves."""
    kernel = call["weight"].shape[2:]

    def setting(name: str, i: int) -> int:
        given = call[name] or (1 if name == "stride" else 0)
        return int(given if isinstance(given, int) else given[i if len(given) > 1 else 0])

    padded = isinstance(call["padding"], str)
    still = [
        n == 1 and not padded and setting("stride", i) == 1 and not setting("padding", i) for i, n in enumerate(kernel)
    ]
    kept = []
    for array in arrays:
        if any(array.shape[i + 2] > 1 and not stays for i, stays in enumerate(still)):
            call.relations.freeze(array, "runs along a dimension of a convolution")
        else:
            kept.append(array)
    return tuple(kept)


def _full(call: Call, space: _Convolved) -> tuple[Ints, ...]:
    """A convolution in which every output channel reads every input channel."""
    x = insert(Operand(space.arrays, (space.sizes[0], call["input"].shape[-len(space.sizes) + 1], *space.sizes[2:])), 1)
    rank = len(x.shape)
    sides = space.weight(call)
    weight = [upright(a, rank, axis) for axis, side in zip((1, 2), sides, strict=True) for a in side]
    outputs, inputs = call["weight"].shape[:2][:: -1 if space.transposed else 1]
    operand = Operand(tuple(weight), (1, int(outputs), int(inputs), *[1] * (rank - 3)))
    shape = (x.shape[0], *operand.shape[1:3], *x.shape[3:])
    return squeeze(contract(call, [x, operand], shape, [2], math.prod(call["weight"].shape[2:])), 2)


def _grouped(call: Call, space: _Convolved) -> tuple[Ints, ...]:
    """A grouped convolution: each group of outputs reads its own group of inputs."""
    relations, groups, rank = call.relations, int(call["groups"]), len(space.sizes)
    outputs, inputs = space.weight(call)
    main, minor = (inputs, outputs) if space.transposed else (outputs, inputs)
    channels = int(call["input"].shape[1 - rank])
    kernel = math.prod(call["weight"].shape[2:])
    if channels == groups == call["weight"].shape[0] * (call["weight"].shape[1] if space.transposed else 1):
        sizes = (space.sizes[0], channels, *space.sizes[2:])
        copied = tuple((1, size) for axis, size in call.labels("weight").copied if axis == 0)
        mine = 1 if copied else channels
        operand = Operand(tuple(upright(a, rank) for a in main), (1, mine, *[1] * (rank - 2)), copied)
        for array in (a for a in space.arrays if a.shape[1] > 1):
            relations.require(call.expression(groups), relations.extent(array, 1))
        joined = relations.join([Operand(space.arrays, sizes), operand])
        relations.cost(joined, sizes, kernel)
        return joined
    along = [a for a in space.arrays if a.shape[1] > 1]
    if len(along) != 1 or varying(along[0]) != {1} or not main:
        for array in (*along, *outputs, *inputs):
            relations.freeze(array, "grouped convolution over channels that are not labelled")
        relations.cost((), (space.sizes[0], *call["weight"].shape[:2], *space.sizes[2:]), kernel)
        outputs = [np.tile(a, groups) for a in outputs] if space.transposed else outputs
        return (*(a for a in space.arrays if a.shape[1] == 1), *(upright(a, rank) for a in outputs))
    out = _groups_of(call, along[0].reshape(groups, -1), main[0].reshape(groups, -1), minor, space.transposed)
    beside = tuple(a for a in space.arrays if a.shape[1] == 1)
    parts = [upright(main[0], rank + 1), *(upright(a, rank + 1, 2) for a in minor)]
    parts += [np.expand_dims(a, 2) for a in beside]
    relations.cost(parts, (space.sizes[0], main[0].size, int(call["weight"].shape[1]), *space.sizes[2:]), kernel)
    return (*beside, upright(out, rank))


def _groups_of(call: Call, x: Ints, main: Ints, minor: list[Ints], transposed: bool) -> Ints:
    """Relates inputs `x` and the first dimension of the weight, both groups x channels; returns the output labels.

    Where a group has one input or one output, whole groups go. Elsewhere each group loses equally many of its own
    channels on the side of the weight's first dimension, and all lose the same ones on the side that they share.
    """
    relations = call.relations
    if transposed:
        relations.tie(x, main)
    per_group = int(call["weight"].shape[1])
    if min(main.shape[1], per_group) == 1:
        relations.bundle(x if transposed else np.concatenate([x, main], axis=1))
        relations.keep_two(x[:, :1].T)
        relations.require(call.expression(len(x)), RawExtent(x[:, :1].reshape(1, -1), "count"))
        for array in minor:
            relations.freeze(array, "whole groups of a convolution go, and all groups share it")
        return np.repeat(x[:, 0], per_group) if transposed else main.ravel()
    relations.add_fibres(main)
    for side in (x, main, *(a[None] for a in minor)):  # with a single one, whole groups would go
        relations.keep_two(side)
    if transposed:
        return np.tile(minor[0], len(x))
    relations.bundle(np.concatenate([x, minor[0][None]]).T if minor else x.T)
    return main.ravel()
