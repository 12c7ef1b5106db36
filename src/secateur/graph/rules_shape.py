"""Rules of the operators that move elements without computing: executed on the label arrays themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from secateur.graph.labels import CONSTANT, Ints, Labels, Shape, align_blocks, align_right, regroup, slices, varying
from secateur.graph.relations import FIXED_SIZE, Operand, Relations
from secateur.graph.rules import Call, labels_of, rule
from secateur.graph.sizes import Expression, Product, Quotient, RawExtent, Sum

FIXED_POSITION = "a fixed position along it is read"
MOST_FUSED = 1 << 16
"""Two labelled dimensions that a view merges are followed up to this many indices, and frozen above."""


@rule("clone", "contiguous", "alias", "detach", "to", "_to_copy", "type_as", "lift_fresh", "view_as_real", "pin_memory")
def same_labels(call: Call) -> Labels:
    return call.labels("self").map(lambda a: a)


@rule("dropout", "feature_dropout", "alpha_dropout", "native_dropout")
def dropout(call: Call) -> Labels:
    return call.labels(call.subject).map(lambda a: a)


@rule("permute")
def permute(call: Call) -> Labels:
    return call.labels("self").map(lambda a: a.transpose(call["dims"]))


@rule("transpose")
def transpose(call: Call) -> Labels:
    return call.labels("self").map(lambda a: a.swapaxes(call["dim0"], call["dim1"]))


@rule("t", "numpy_T")
def t(call: Call) -> Labels:
    return call.labels("self").map(lambda a: a.T)


@rule("unsqueeze")
def unsqueeze(call: Call) -> Labels:
    axis = call["dim"] % (call["self"].ndim + 1)
    return call.labels("self").map(lambda a: np.expand_dims(a, axis))


@rule("expand", "broadcast_to")
def expand(call: Call) -> Labels:
    rank = call.output.ndim
    return replace(call.labels("self").map(lambda a: align_right(a, rank)), copied=_copied(call, call["size"]))


def _copied(call: Call, sizes: Sequence[int]) -> tuple[tuple[int, Expression | None], ...]:
    """Returns the dimensions that only copy one index, as often as torch or a size of the model says."""
    before = (1,) * (call.output.ndim - call["self"].ndim) + call.shape("self")
    return tuple(
        (axis, expression)
        for axis, expression in enumerate(call.expressions(list(sizes)))
        if before[axis] == 1 < call.output.shape[axis] and not isinstance(expression, int)
    )


@rule("squeeze", "view", "reshape", "_unsafe_view", "_reshape_alias", "unflatten", "flatten", "view_as", "reshape_as")
def view(call: Call) -> Labels:
    """Any change of shape that keeps the order of the elements."""
    old, new = call.shape("self"), tuple(call.output.shape)
    labels = call.labels("self")
    if not labels.arrays:
        return Labels(is_parameter=labels.is_parameter, factor=labels.factor)
    specs = _view_specs(call, new)
    old, labels = _refine(old, new, labels)
    blocks = align_blocks(old, new)
    labels = _fuse_merged(call.relations, labels, blocks)
    done: dict[int, Ints] = {}
    for array in labels.arrays:
        after = done[id(array)] = regroup(array, old, new, blocks)
        for left, right in blocks:
            if any(array.shape[i] > 1 for i in left):
                _constrain_block(call.relations, (array, left), (after, right), specs)
    return labels.map(lambda a: done[id(a)] if id(a) in done else regroup(a, old, new, blocks))


def _refine(old: Shape, new: Shape, labels: Labels) -> tuple[Shape, Labels]:
    """Returns shape and labels with dimensions split where those of `new` end, if only that keeps components apart.

    A view of (tokens, batch x heads, width) as (tokens x batch, heads x width) mixes no components: the batch leaves.
    """
    ends = sorted({int(np.prod(shape[:i])) for shape in (old, new) for i in range(len(shape) + 1)})
    apart = all(sum(bool(varying(a) & set(before)) for a in labels.arrays) < 2 for before, _ in align_blocks(old, new))
    if apart or any(b % a for a, b in pairwise(ends)):
        return old, labels
    fine = tuple(b // a for a, b in pairwise(ends))
    blocks = align_blocks(old, fine)
    split = labels.map(lambda a: regroup(a, old, fine, blocks))
    for before, after in zip(labels.arrays, split.arrays, strict=True):
        if len(varying(after)) > len(varying(before)):
            return old, labels
    return fine, split


def _fuse_merged(relations: Relations, labels: Labels, blocks: list[tuple[range, range]]) -> Labels:
    """Returns labels in which no two components run along dimensions that one block merges."""
    arrays = list(labels.arrays)
    for before, after in blocks:
        together = [a for a in arrays if varying(a) & set(before)]
        if len(together) < 2 or len(before) < 2 or len(after) == len(before):
            continue
        outer, inner = sorted(together, key=lambda a: min(varying(a)))[:2]
        arrays = [a for a in arrays if a is not outer and a is not inner]
        if len(together) > 2 or varying(outer) & varying(inner) or outer.size * inner.size > MOST_FUSED:
            for array in together:
                relations.freeze(array, "several labelled dimensions are merged")
        else:
            arrays.append(relations.fuse(outer, inner))
    return replace(labels, arrays=tuple(arrays))


def _view_specs(call: Call, new: Shape) -> list[Expression | None]:
    """Returns what the caller gave as size of each new dimension; None where torch works it out itself."""
    if call.name == "unflatten":
        specs: list[Expression | None] = [None] * len(new)
        axis = call.axis()
        values: list[int] = list(call["sizes"])
        specs[axis : axis + len(values)] = call.expressions(values)
        return specs
    given = call["size"] if call["size"] is not None else call["shape"]
    return [None] * len(new) if given is None else call.expressions(given)


def _constrain_block(
    relations: Relations,
    source: tuple[Ints, range],
    target: tuple[Ints, range],
    specs: list[Expression | None],
) -> None:
    """Relations that come from merging and splitting dimensions along which the label varies."""
    array, left = source
    after, right = target
    if len([i for i in left if array.shape[i] > 1]) > 1:
        _keep_order(relations, after, right)
    split = [i for i in right if after.shape[i] > 1]
    if len(split) > 1:
        relations.add_fibres(slices(after, [i for i in range(after.ndim) if i != split[-1]]))
    for axis in split:
        if not _require_quotient(relations, after, axis, specs):
            relations.require(specs[axis], relations.extent(after, axis))


def _require_quotient(relations: Relations, array: Ints, axis: int, specs: list[Expression | None]) -> bool:
    """A size n // h beside one of h is right exactly when h x width goes on to equal n: requires that, if it is so."""
    spec = specs[axis]
    if not isinstance(spec, Quotient):
        return False
    used, copies = [axis], 1
    for factor in _factors(spec.right):
        # the divisor may equal another size by chance: the dimension just before comes first, then labelled ones
        beside = [(i, specs[i]) for i in sorted(range(len(specs)), key=lambda i: (i != axis - 1, array.shape[i] == 1))]
        found = next(((i, s) for i, s in beside if i not in used and factor in (s, *_factors(s))), None)
        if found is None:
            return False
        used.append(found[0])
        copies *= math.prod(f for f in _factors(found[1]) if isinstance(f, int) and f != factor)
    relations.quotients.append((spec, relations.extent(array, axis)))
    for row in slices(array, [i for i in range(array.ndim) if i not in used]):
        relations.require(spec.left, RawExtent(row[None], "count", copies))
    return True


def _factors(expression: Expression | None) -> list[Expression]:
    """Returns what an expression is a product of."""
    if isinstance(expression, Product):
        return [*_factors(expression.left), *_factors(expression.right)]
    return [] if expression is None else [expression]


def _keep_order(relations: Relations, after: Ints, right: range) -> None:
    """Survivors keep their order in a merged dimension only where fibres lie in one piece; else columns go together."""
    rows = slices(after, [i for i in range(after.ndim) if i not in right])
    if (relations.fibre_of(rows) < 0).any():
        relations.freeze(after, "dimensions without a common layout are merged")
        return
    for row in rows:
        ids = relations.fibre_of(row)
        count = np.unique(ids).size
        if relations.in_whole_fibres(row[None]):
            continue
        if ids.size % count:
            relations.freeze(row, "dimensions without a common layout are merged")
        else:
            relations.bundle(row[np.argsort(ids, kind="stable")].reshape(count, -1).T)


@rule("select")
def select(call: Call) -> Labels:
    axis = call.axis()
    return _pick(call, axis).map(lambda a: _take(a, call["index"], axis))


@rule("slice", "narrow")
def slice_(call: Call) -> Labels:
    """A part of a dimension, from a size to a size; with a step, one of several that take turns."""
    axis = call.axis()
    labels = call.labels("self")
    size = call.shape("self")[axis]
    if tuple(call.output.shape) == call.shape("self") and (call["step"] or 1) == 1:
        return labels.map(lambda a: a)
    if call.name == "narrow":
        bounds = [call["start"], call["start"] + call["length"]]
        given = [call.expression(call["start"]), _plus(call.expression(call["start"]), call.expression(call["length"]))]
    else:
        bounds = [call["start"] or 0, size if call["end"] is None else call["end"]]
        given = [call.expression(n) for n in bounds]
    step = int(call["step"] or 1)
    taken = slice(*slice(int(bounds[0]), int(bounds[1]), step).indices(size))
    for array in labels.arrays:
        if array.shape[axis] == 1:
            continue
        if step > 1:
            _take_turns(call, array, axis, step)
        for bound, expression in zip(bounds, given, strict=True):
            inside = slice(bound, None) if bound < 0 else slice(None, bound)
            if 0 < abs(bound) < size:
                _require_part(call, array, axis, inside, _negated(expression) if bound < 0 else expression)
    index = (*[slice(None)] * axis, taken)
    return labels.map(lambda a: a[index] if a.shape[axis] > 1 else a)


def _plus(left: Expression | None, right: Expression | None) -> Expression | None:
    return None if left is None or right is None else Sum(left, right, 1)


def _negated(expression: Expression | None) -> Expression | None:
    """Returns minus an expression: slices count some bounds from the end."""
    if isinstance(expression, int):
        return -expression
    return expression.right if isinstance(expression, Product) and expression.left == -1 else expression


def _require_part(
    call: Call, array: Ints, axis: int, inside: slice, expression: Expression | None, reason: str = FIXED_POSITION
) -> None:
    """The code takes a part of a dimension to have the size `expression`: so many must survive in it."""
    part = array[(*[slice(None)] * axis, inside)]
    relations = call.relations
    if part.shape[axis] == 1:  # it is followed no further, for dimensions of size 1 have no labels
        relations.hold(array, axis, reason)
    elif varying(array) == {axis}:
        relations.keep_two(part.reshape(1, -1))
        relations.require(expression, RawExtent(part.reshape(1, -1), "count"), reason)
    elif relations.is_width_axis(array, axis):
        rows = slices(array, [i for i in range(array.ndim) if i != axis])
        inner, outer = rows[:, inside], np.delete(rows, np.arange(rows.shape[1])[inside], axis=1)
        for piece in (inner, outer):
            if piece.size:
                relations.add_fibres(piece)
        relations.require(expression, RawExtent(inner, "width"), reason)
    else:
        relations.hold(array, axis, FIXED_POSITION)


def _take_turns(call: Call, array: Ints, axis: int, step: int) -> None:
    """Each index keeps its turn if the `step` indices of one round go together."""
    size = array.shape[axis]
    if size % step:
        call.relations.hold(array, axis, FIXED_POSITION)
    else:
        call.relations.bundle(np.moveaxis(array, axis, -1).reshape(-1, step))


def _take(array: Ints, index: int, axis: int) -> Ints:
    """Returns what lies at one position of a dimension, which disappears."""
    return np.asarray(array.take(index if array.shape[axis] > 1 else 0, axis))


def _pick(call: Call, axis: int) -> Labels:
    """Returns the labels of `self` after noting that fixed positions along `axis` are read."""
    labels = call.labels("self")
    for array in labels.arrays:
        if array.shape[axis] > 1:
            call.relations.hold(array, axis, FIXED_POSITION)
    return labels


@rule("unbind")
def unbind(call: Call) -> tuple[Labels, ...]:
    axis = call.axis()
    labels = _pick(call, axis)
    return tuple(labels.map(lambda a, i=i: _take(a, i, axis)) for i in range(call.shape("self")[axis]))


@rule("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(call: Call) -> tuple[Labels, ...]:
    """Consecutive pieces. Equal ones stay equal; each piece of a given size must go on to have it."""
    axis = call.axis()
    labels = call.labels("self")
    sizes = [int(piece.shape[axis]) for piece in call.output]
    edges = np.cumsum([0, *sizes])
    for array in labels.arrays:
        if array.shape[axis] > 1:
            _constrain_split(call, array, axis, sizes)
    pieces = []
    for i in range(len(sizes)):
        index = [slice(None)] * call["self"].ndim
        index[axis] = slice(int(edges[i]), int(edges[i + 1]))
        pieces.append(labels.map(lambda a, index=tuple(index): a[index] if a.shape[axis] > 1 else a))
    return tuple(pieces)


def _constrain_split(call: Call, array: Ints, axis: int, sizes: list[int]) -> None:
    relations = call.relations
    along = varying(array) == {axis} or relations.is_width_axis(array, axis)
    given = call["split_sizes"] if call["split_sizes"] is not None else call["split_size"]
    if along and len(set(sizes)) == 1 and sizes[0] > 1:
        rows = slices(array, [i for i in range(array.ndim) if i != axis]).reshape(-1, sizes[0])
        relations.add_fibres(rows)
        for expression in call.expressions([given] if isinstance(given, int) else given or ()):
            relations.require(expression, RawExtent(rows, "width"))
    elif along and isinstance(given, (tuple, list)):
        edges = np.cumsum([0, *sizes]).tolist()
        for expression, start, stop in zip(call.expressions(given), edges[:-1], edges[1:], strict=True):
            _require_part(call, array, axis, slice(start, stop), expression, FIXED_SIZE)
    else:
        relations.hold(array, axis, FIXED_SIZE)


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Labels:
    """Operands one behind another along one dimension; along the others they meet."""
    tensors = [t for t in call["tensors"] if t.numel() or t.ndim == call.output.ndim]
    rank = call.output.ndim
    axis = call["dim"] % rank if call["dim"] else 0
    all_labels = [labels_of(t) for t in tensors]
    rest: list[Operand] = []
    along: list[Ints] = []
    for tensor, labels in zip(tensors, all_labels, strict=True):
        shape = tuple(1 if i == axis else n for i, n in enumerate(tensor.shape))
        here = [a for a in labels.arrays if a.shape[axis] > 1]
        rest.append(Operand(tuple(a for a in labels.arrays if a.shape[axis] == 1), shape))
        for extra in here[1:]:
            call.relations.freeze(extra, "concatenated along one of several labelled dimensions")
        constant = np.full([tensor.shape[axis] if i == axis else 1 for i in range(rank)], CONSTANT, np.int64)
        along.append(here[0] if here else constant)
    arrays = call.relations.join(rest)
    if any(a.size > a.shape[axis] or (a != CONSTANT).any() for a in along):
        arrays = (*arrays, _concatenate(along, axis))
    return Labels(arrays, _scale_of_parts(all_labels, axis), all(lab.is_parameter for lab in all_labels))


def _scale_of_parts(parts: list[Labels], axis: int) -> tuple[Ints, ...] | None:
    """Returns what scales a concatenation (see `Labels.scale`): every part must scale with something."""
    scales = [lab.scale for lab in parts if lab.scale is not None]
    if len(scales) < len(parts):
        return None
    if len({len(s) for s in scales}) == 1 and all(a.shape[axis] > 1 for s in scales for a in s):
        return tuple(_concatenate(list(parallel), axis) for parallel in zip(*scales, strict=True))
    different: dict[int, Ints] = {id(a): a for s in scales for a in s}
    return tuple(different.values()) if all(a.shape[axis] == 1 for a in different.values()) else None


def _concatenate(arrays: list[Ints], axis: int) -> Ints:
    common = np.max([a.shape for a in arrays], axis=0)
    full = [[a.shape[axis] if i == axis else int(n) for i, n in enumerate(common)] for a in arrays]
    return np.concatenate([np.broadcast_to(a, s) for a, s in zip(arrays, full, strict=True)], axis)


@rule("stack")
def stack(call: Call) -> Labels:
    """Position j of each operand comes to stand beside position j of the others: their widths stay equal."""
    axis = call["dim"] % call.output.ndim if call["dim"] else 0
    all_labels = [labels_of(t) for t in call["tensors"]]
    count = {len(lab.arrays) for lab in all_labels}
    if count == {0}:
        return Labels()
    shapes = {tuple(a.shape for a in lab.arrays) for lab in all_labels}
    if len(shapes) != 1:
        for lab in all_labels:
            for array in lab.arrays:
                call.relations.freeze(array, "stacked beside tensors that are labelled otherwise")
        return Labels()
    stacked = []
    for parts in zip(*(lab.arrays for lab in all_labels), strict=True):
        array = np.stack(parts, axis)
        if (array == array.take([0], axis)).all():
            array = array.take([0], axis)
        elif varying(parts[0]):
            width = max(varying(parts[0]))
            call.relations.add_fibres(
                np.concatenate([slices(p, [i for i in range(p.ndim) if i != width]) for p in parts])
            )
        if array.shape[axis] > 1 and varying(array) != {axis}:
            call.relations.pin(slices(array, [axis]), FIXED_SIZE)
        stacked.append(array)
    return Labels(tuple(stacked))


@rule("repeat", "tile")
def repeat(call: Call) -> Labels:
    """The whole tensor several times: each label stands several times."""
    times = call["repeats"] if call["repeats"] is not None else call["dims"]
    rank = call.output.ndim
    times = [1] * (rank - len(times)) + list(times)

    def tile(a: Ints) -> Ints:
        a = align_right(a, rank)
        return np.tile(a, [n if a.shape[i] > 1 else 1 for i, n in enumerate(times)])

    return replace(call.labels("self").map(tile), copied=_copied(call, times))


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Labels:
    """Each index several times in a row."""
    axis, times = call["dim"], call["repeats"]
    labels = call.labels("self")
    if axis is None or not isinstance(times, int):
        for array in labels.arrays:
            call.relations.freeze(array, "repeated by a tensor of counts")
        return Labels()
    axis %= call["self"].ndim
    return labels.map(lambda a: np.repeat(a, times, axis) if a.shape[axis] > 1 else a)


@rule("flip", "roll")
def reorder(call: Call) -> Labels:
    labels = call.labels("self")
    for axis in call["dims"] or range(call["self"].ndim):
        for array in labels.arrays:
            if array.shape[axis] > 1:
                call.relations.hold(array, axis % array.ndim, FIXED_POSITION)
    return labels.map(lambda a: a)


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Labels:
    """Constants around the tensor: they stay."""
    rank = call.output.ndim
    amounts = {rank - 1 - i // 2: (call["pad"][i], call["pad"][i + 1]) for i in range(0, len(call["pad"]), 2)}
    labels = call.labels("self")
    for axis, (left, right) in amounts.items():
        for array in labels.arrays:
            if array.shape[axis] > 1 and (min(left, right) < 0 or call["mode"] not in (None, "constant")):
                call.relations.freeze(array, "padded by its own elements, or cropped")

    def widen(a: Ints) -> Ints:
        width = [amounts.get(i, (0, 0)) if a.shape[i] > 1 else (0, 0) for i in range(rank)]
        if min(min(w) for w in width) < 0:
            cropped = [slice(max(0, -lo), n - max(0, -hi)) for n, (lo, hi) in zip(a.shape, width, strict=True)]
            a = a[tuple(cropped)]
        return np.pad(a, [(max(0, lo), max(0, hi)) for lo, hi in width], constant_values=CONSTANT)

    return Labels(tuple(widen(a) for a in labels.arrays), None, labels.is_parameter)


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(call: Call) -> Labels:
    """Channels move to or from positions, or change places: those that must keep step go together."""
    axis = call["self"].ndim - 3 if "pixel" in call.name else 1
    factor = int(call["upscale_factor"] or call["downscale_factor"] or 1) ** 2

    def move(a: Ints) -> Ints:
        if a.shape[axis] == 1:
            return a
        if call.name == "pixel_unshuffle":
            return np.repeat(a, factor, axis)
        if call.name == "pixel_shuffle":
            return a.take(range(0, a.shape[axis], factor), axis)
        rows = a.reshape(*a.shape[:axis], int(call["groups"]), -1, *a.shape[axis + 1 :])
        return rows.swapaxes(axis, axis + 1).reshape(a.shape)

    for array in call.labels("self").arrays:
        if varying(array) != {axis}:
            call.relations.freeze(array, "shuffled together with another labelled dimension")
        elif call.name == "pixel_shuffle":
            call.relations.bundle(array.reshape(-1, factor))
        elif "channel" in call.name:
            call.relations.bundle(array.reshape(int(call["groups"]), -1).T)
    labels = call.labels("self")
    return Labels(tuple(move(a) for a in labels.arrays if varying(a) == {axis}), None, labels.is_parameter)
