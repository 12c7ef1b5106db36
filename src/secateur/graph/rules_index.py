"""Rules of the operators that read and write by position: windows, patches, tables, gathering and scattering."""

from __future__ import annotations

import numpy as np

from secateur.graph.labels import Ints, Labels, varying
from secateur.graph.rules import Call, rule
from secateur.graph.rules_shape import FIXED_POSITION


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


@rule("index", "index_select", "embedding")
def index(call: Call) -> Labels:
    """Reading by a tensor of positions: the positions have a meaning, what lies along other dimensions passes."""
    name = "weight" if call.name == "embedding" else "self"
    source = call[name]
    if call.name == "embedding":
        where = {0: call["indices"]}
    elif call.name == "index_select":
        where = {call.axis(): call["index"]}
    else:
        where = {i: t for i, t in enumerate(call["indices"]) if t is not None}
    labels = call.labels(name)
    for axis in where:
        for array in labels.arrays:
            if array.shape[axis] > 1:
                call.relations.hold(array, axis, "read by a table of positions")
    added = call.output.ndim - (source.ndim - len(where))
    contiguous = max(where) - min(where) + 1 == len(where)
    at = min(where) if contiguous else 0

    def move(a: Ints) -> Ints:
        kept = [n for i, n in enumerate(a.shape) if i not in where]
        return a.reshape(kept[:at] + [1] * added + kept[at:])

    passing = [a for a in labels.arrays if not varying(a) & set(where)]
    scale = None if labels.scale is None else [a for a in labels.scale if not varying(a) & set(where)]
    return Labels(tuple(map(move, passing)), None if scale is None else tuple(map(move, scale)), labels.is_parameter)
