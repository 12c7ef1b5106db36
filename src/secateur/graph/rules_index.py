"""Rules of the operators that read and write by position: windows, patches, tables, gathering and scattering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from secateur.graph.labels import Ints, Labels, align_right, tensors_in, varying
from secateur.graph.relations import Operand
from secateur.graph.rules import Call, labels_of, operand_of, rule
from secateur.graph.rules_shape import FIXED_POSITION

BY_TABLE = "read or written by a table of positions"


@rule("unfold")
def windows(call: Call) -> Labels:
    """Sliding windows along one dimension: the positions in a window become a new, last dimension."""
    axis = call.axis("dimension")
    for array in call.labels("self").arrays:
        if array.shape[axis] > 1:
            call.relations.hold(array, axis, FIXED_POSITION)
    passing = tuple(a[..., None] for a in call.labels("self").arrays if a.shape[axis] == 1)
    return Labels(passing, None, call.labels("self").is_parameter)


@rule("im2col", "col2im")
def patches(call: Call) -> Labels:
    """[B, C, H, W] to [B, C x kernel, L] and back: each channel stands once for each position of the kernel."""
    kernel = int(np.prod([int(n) for n in call["kernel_size"]]))
    spatial = 2 if call.name == "im2col" else 1
    labels = call.labels("self")
    axis = labels.arrays[0].ndim - 1 - spatial if labels.arrays else 0
    kept: list[Ints] = []
    for array in labels.arrays:
        if any(array.shape[i] > 1 for i in range(axis + 1, array.ndim)):
            call.relations.freeze(array, FIXED_POSITION)
            continue
        if call.name == "im2col":
            moved = np.repeat(array, kernel, axis) if array.shape[axis] > 1 else array
        elif array.shape[axis] > 1:
            rows = np.moveaxis(array, axis, -1).reshape(-1, kernel)
            call.relations.bundle(rows)
            moved = array.take(range(0, array.shape[axis], kernel), axis)
        else:
            moved = array
        kept.append(moved.reshape(*moved.shape[: axis + 1], *[1] * (call.output.ndim - axis - 1)))
    return Labels(tuple(kept))


def _tables(indices: Sequence[torch.Tensor | None]) -> dict[int, torch.Tensor]:
    """Returns the table for each dimension that has one; a mask takes the place of as many dimensions as it has."""
    where: dict[int, torch.Tensor] = {}
    axis = 0
    for table in indices:
        covered = table.ndim if table is not None and table.dtype == torch.bool else 1
        where |= {axis + i: table for i in range(covered) if table is not None}
        axis += covered
    return where


def _indexed(call: Call) -> tuple[str, dict[int, torch.Tensor], int]:
    """Returns the name of what is read, the table for each dimension read by one, and how many dimensions they give."""
    if call.name == "embedding":
        return "weight", {0: call["indices"]}, call["indices"].ndim
    if call.name == "index_select":
        return "self", {call.axis(): call["index"]}, 1
    where = _tables(call["indices"])
    return "self", where, call.output.ndim - (call["self"].ndim - len(where))


@rule("index", "index_select", "embedding")
def index(call: Call) -> Labels:
    """Reading by a tensor of positions: the positions have a meaning, what lies along other dimensions passes."""
    name, where, added = _indexed(call)
    labels = call.labels(name)
    for axis in where:
        for array in labels.arrays:
            if array.shape[axis] > 1:
                call.relations.hold(array, axis, BY_TABLE)
    contiguous = max(where) - min(where) + 1 == len(where)
    at = min(where) if contiguous else 0

    def move(a: Ints) -> Ints:
        kept = [n for i, n in enumerate(a.shape) if i not in where]
        return a.reshape(kept[:at] + [1] * added + kept[at:])

    passing = [a for a in labels.arrays if not varying(a) & set(where)]
    scale = None if labels.scale is None else [a for a in labels.scale if not varying(a) & set(where)]
    return Labels(tuple(map(move, passing)), None if scale is None else tuple(map(move, scale)), labels.is_parameter)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(call: Call) -> Labels:
    """Writing by tensors of positions: along the dimensions behind them, what is written meets what was there."""
    return _written(call, set(_tables(call["indices"])), call["values"])


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "masked_scatter")
def scatter(call: Call) -> Labels:
    """Writing by a tensor of positions along one dimension."""
    if call.name == "masked_scatter":
        return _written(call, set(range(call["self"].ndim)), call["source"])
    source = next((call[n] for n in ("src", "source", "value") if call[n] is not None), None)
    return _written(call, {call.axis()}, source)


def _written(call: Call, axes: set[int], source: object) -> Labels:
    """Returns the labels of `self` after `source` has been written at positions along `axes`."""
    x, rank = call["self"], call["self"].ndim
    for array in call.labels("self").arrays:
        for axis in varying(array) & axes:
            call.relations.hold(array, axis, BY_TABLE)
    behind = [i for i in range(rank) if i > max(axes, default=-1)]
    operands = [Operand(call.labels("self").arrays, tuple(x.shape))]
    if isinstance(source, torch.Tensor) and source.ndim:
        same = source.ndim == rank
        free = [i for i in range(rank) if i not in axes] if same else behind
        missing = rank - source.ndim
        kept = []
        for array in labels_of(source).arrays:
            if all(i + missing in free for i in varying(array)):
                kept.append(align_right(array, rank) if missing >= 0 else array.reshape(array.shape[-missing:]))
            else:
                call.relations.freeze(array, BY_TABLE)
        sizes = tuple(source.shape)[max(0, -missing) :]
        shape = (1,) * max(0, missing) + sizes
        operands.append(Operand(tuple(kept), tuple(n if i in free else 1 for i, n in enumerate(shape))))
    return Labels(call.relations.join(operands))


@rule("gather")
def gather(call: Call) -> Labels:
    """Reading positions along one dimension, other ones for each index along the others."""
    axis, rank = call.axis(), call["self"].ndim
    kept = []
    for array in call.labels("self").arrays:
        if array.shape[axis] > 1:
            call.relations.hold(array, axis, BY_TABLE)
        elif any(n > 1 and call["index"].shape[i] != n for i, n in enumerate(array.shape)):
            call.relations.freeze(array, BY_TABLE)
        else:
            kept.append(array)
    here = {i for a in kept for i in varying(a)}
    read = Operand(tuple(kept), tuple(n if i in here else 1 for i, n in enumerate(call["index"].shape)))
    return Labels(call.relations.join([read, operand_of(call["index"], rank)]))


@rule("roi_align", "roi_pool")
def regions(call: Call) -> Labels:
    """Features [B, C, H, W] read at K regions: [K, C, h, w]."""
    kept = []
    for array in call.labels("input").arrays:
        if varying(array) == {1}:
            kept.append(array)
        else:
            call.relations.freeze(array, FIXED_POSITION)
    return Labels(tuple(kept))


@rule("nms", "nonzero", "bincount", "searchsorted", "bucketize", "one_hot")
def numbers(call: Call) -> Labels:
    """Positions or counts: which indices there are matters."""
    for tensor in tensors_in(list(call.arguments.values())):
        for array in labels_of(tensor).arrays:
            call.relations.freeze(array, BY_TABLE)
    return Labels()


@rule("_embedding_bag_forward_only", "_embedding_bag")
def embedding_bag(call: Call) -> tuple[Labels, ...]:
    """Rows of a table, summed or averaged in bags."""
    kept = []
    for array in call.labels("weight").arrays:
        if varying(array) == {1}:
            kept.append(array)
        else:
            call.relations.hold(array, 0, BY_TABLE)
    return (Labels(tuple(kept)), *(Labels() for _ in call.output[1:]))
