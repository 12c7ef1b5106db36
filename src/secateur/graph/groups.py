"""From solved channels to the `Network`: axes, groups and their names, families, costs, residual branches."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from secateur.graph.labels import Ints
from secateur.graph.network import (
    STAYS,
    Attribute,
    Axis,
    Cost,
    Extent,
    Frozen,
    Group,
    Indices,
    Link,
    Network,
    Outline,
    Role,
    ScaleFix,
)
from secateur.graph.residuals import residuals
from secateur.graph.sizes import RawExtent
from secateur.graph.solve import Solution, components, numbered, solve
from secateur.graph.tracer import OUTPUT, Trace


def fingerprint(model: nn.Module) -> str:
    """Returns a hash of the names and shapes of all parameters and persistent buffers of `model`."""
    return _hash_of_shapes(model.state_dict(keep_vars=True))


def caches(model: nn.Module) -> str:
    """Returns a hash of the names and shapes of all buffers, some of which a model makes anew as it runs."""
    return _hash_of_shapes(dict(model.named_buffers()))


def _hash_of_shapes(tensors: Mapping[str, object]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
    return digest.hexdigest()[:16]


def build(model: nn.Module, trace: Trace, inputs: object) -> Network:
    """Returns the network that a trace of `model` on `inputs` (on meta) describes."""
    relations = trace.relations
    roles: list[Role] = [trace.roles.get(int(labels[0]), "other") for _, _, labels in trace.axes]
    active = [labels for (_, _, labels), role in zip(trace.axes, roles, strict=True) if role in ("in", "out")]
    solution = solve(relations, np.concatenate(active) if active else np.zeros(0, np.int64))
    index = _Index(trace, solution)
    number = _number(solution, index)
    axes = _axes(trace, roles, index, number)
    frozen = _frozen(axes, index, solution)
    shapes = {name: tuple(t.shape) for name, t in model.named_parameters()}
    summed = _summed(trace, solution, number)
    links = _links(solution, number)
    branches, blocks = residuals(model, trace, batch_size(inputs))
    return Network(
        num_channels=int(number.max()) + 1,
        axes=axes,
        groups=_groups(model, axes, links, int(number.max()) + 1, summed),
        links=links,
        frozen=frozen,
        attributes=_attributes(model, (trace, solution, number), axes, frozen),
        scale_fixes=_scale_fixes(trace, solution, number),
        residuals=branches,
        params_cost=_params_cost(shapes, axes),
        macs_cost=_macs_cost(relations.costs, solution, number, batch_size(inputs)),
        fingerprint=fingerprint(model),
        caches=caches(model),
        output_shapes=trace.output_shapes,
        unknown_operators=tuple(trace.unknown.items()),
        notes=tuple(trace.notes),
        inputs=inputs,
        remainders=relations.remainders,
        pairs=_pairs(trace, solution, number),
        blocks=blocks,
    )


def outline(model: nn.Module, trace: Trace, inputs: object) -> Outline:
    """Returns what a trace of a cut `model` is compared by: much less than a `Network`."""
    relations = trace.relations
    joined = components(relations)
    macs = sum(c * math.prod(raw.traced_size for raw in raws) for c, raws in relations.costs)
    return Outline(
        components={(tensor, dim): joined[:, labels] for tensor, dim, labels in trace.axes},
        params=sum(p.numel() for p in model.parameters()),
        macs=macs // batch_size(inputs),
        output_shapes=trace.output_shapes,
        remainders=relations.remainders,
    )


class _Index:
    """All indices along all axes of a trace, one axis behind another: the component and the head of each."""

    def __init__(self, trace: Trace, solution: Solution) -> None:
        labels = np.concatenate([np.zeros(0, np.int64), *(labels for _, _, labels in trace.axes)])
        self.sizes = np.array([labels.size for _, _, labels in trace.axes], np.int64)
        self.components = np.stack([solution.channel[labels], solution.owner[labels]])

    def split(self, values: Ints) -> list[Ints]:
        """Returns values along the last dimension, one per index, as one part (a view) for each axis."""
        return np.split(values, np.cumsum(self.sizes)[:-1], axis=-1) if self.sizes.size else []


def _number(solution: Solution, index: _Index) -> Ints:
    """Returns per component the number of its channel, in order of first label; -1 for those that stay."""
    number = np.full(solution.frozen.why.size, STAYS, np.int64)
    components = index.components.ravel()
    components = components[components >= 0]
    position = np.empty(number.size, np.int64)
    position[components[::-1]] = np.arange(components.size)[::-1]  # the last one written is the first one there
    free = components[position[components] == np.arange(components.size)]
    free = free[~solution.frozen.has(free)]
    number[free] = np.arange(free.size)
    return number


def _axes(trace: Trace, roles: Sequence[Role], index: _Index, number: Ints) -> tuple[Axis, ...]:
    channels, owners = index.components
    places = numbered(channels, owners, number)
    parts = (index.split(values) for values in (places.channels, places.owners, index.components))
    return tuple(
        Axis(tensor, dim, channels, role, owners, components)
        for (tensor, dim, _), role, channels, owners, components in zip(trace.axes, roles, *parts, strict=True)
    )


def _extent(raw: RawExtent, solution: Solution, number: Ints) -> Extent:
    if raw.kind == "rows":  # of heads of several sorts side by side, linked to stay equally many, one sort is counted
        owners = solution.owner[raw.labels]
        alike = (owners == owners[:, :1]).all(axis=0)
        return Extent(solution.places(raw.labels[:, alike], number), raw.kind, raw.divisor)
    return Extent(solution.places(raw.labels, number), raw.kind, raw.divisor)


def _is_fixed(raw: RawExtent, solution: Solution, number: Ints) -> bool:
    places = solution.places(raw.labels, number)
    return bool((places.channels == STAYS).all() and (places.owners == STAYS).all())


PUBLISHED_WIDTHS = ("num_features", "head_hidden_size", "embed_dim", "in_features")
"""Attributes by which a model, or the head around its classifier, tells the width of what the classifier reads."""


def _attributes(
    model: nn.Module, solved: tuple[Trace, Solution, Ints], axes: Sequence[Axis], frozen: Sequence[Frozen]
) -> tuple[Attribute, ...]:
    """Returns the attributes that decide sizes, and those that only publish the width that a classifier reads.

    The latter are not read while the model runs, but a new classifier is built by them.
    """
    trace, solution, number = solved
    found = [
        Attribute(a.module, a.path, _extent(e, solution, number))
        for a, e in trace.relations.attributes
        if not _is_fixed(e, solution, number)
    ]
    known = {(a.module, a.path) for a, _ in trace.relations.attributes}
    outputs = {f.tensor for f in frozen if f.dim == 0 and f.reason == OUTPUT}
    for axis in axes:
        if axis.tensor in outputs and axis.dim == 1 and axis.role == "in" and (axis.channels >= 0).any():
            extent = Extent(Indices(axis.channels[None], axis.owners[None]), "count")
            parts = axis.tensor.split(".")[:-2]
            for holder in (".".join(parts[:n]) for n in range(len(parts) + 1)):
                for name in PUBLISHED_WIDTHS:
                    value = vars(model.get_submodule(holder)).get(name)
                    if value == axis.channels.size and (holder, (name,)) not in known:
                        known.add((holder, (name,)))
                        found.append(Attribute(holder, (name,), extent))
    return tuple(found)


def _links(solution: Solution, number: Ints) -> tuple[Link, ...]:
    """Returns the links of which something may go."""
    found = solution.links
    places = numbered(found.channels, found.owners, number)
    inner = found.starts[1:-1]
    nodes = [Indices(*n) for n in zip(np.split(places.channels, inner), np.split(places.owners, inner), strict=True)]
    free = (places.channels >= 0) | (places.owners >= 0)
    bounds = found.links.tolist()
    moves = [free[a:b].any() for a, b in pairwise(found.starts[found.links].tolist())]
    return tuple(Link(tuple(nodes[a:b])) for (a, b), m in zip(pairwise(bounds), moves, strict=True) if m)


def _places(axes: Sequence[Axis]) -> tuple[Ints, Ints]:
    """Returns channels and owners of all indices, one axis behind another."""
    none = np.zeros(0, np.int64)
    return np.concatenate([none, *(a.channels for a in axes)]), np.concatenate([none, *(a.owners for a in axes)])


def _frozen(axes: Sequence[Axis], index: _Index, solution: Solution) -> tuple[Frozen, ...]:
    """Returns what stays along each axis, by reason: first what stays in any case, then what may go with its head."""
    channels, owners = _places(axes)
    stays = np.flatnonzero(channels == STAYS)
    axis = np.repeat(np.arange(len(axes)), index.sizes)[stays]
    reasons = solution.frozen.reasons
    case = (axis * 2 + (owners[stays] != STAYS)) * len(reasons) + solution.frozen.why[index.components[0, stays]]
    runs = np.flatnonzero(np.diff(case, prepend=-1))
    lengths = np.diff(runs, append=case.size)
    cases, first, inverse = np.unique(case[runs], return_index=True, return_inverse=True)
    counts = np.bincount(inverse, weights=lengths).astype(np.int64)
    result = []
    for i in np.lexsort((first, cases // max(1, len(reasons)))).tolist():
        place, reason = divmod(int(cases[i]), len(reasons))
        why, where = reasons[reason]
        hint = " (they may go with their head)" if place % 2 else ""
        here = axes[place // 2]
        result.append(Frozen(here.tensor, here.dim, int(counts[i]), why + hint, where))
    return tuple(result)


def _pairs(trace: Trace, solution: Solution, number: Ints) -> tuple[Indices, ...]:
    pairs = (solution.places(labels, number) for labels in trace.relations.pairs)
    return tuple(p for p in pairs if (p.channels >= 0).any() or (p.owners >= 0).any())


def _summed(trace: Trace, solution: Solution, number: Ints) -> np.ndarray:
    """Returns which channels run through a sum of two activations: the residual streams."""
    summed = np.zeros(int(number.max()) + 2, np.bool_)
    for total in trace.sums:
        for array in total.arrays:
            summed[number[solution.channel[array.ravel()]]] = True
    summed[STAYS] = False
    return summed


def _scale_fixes(trace: Trace, solution: Solution, number: Ints) -> tuple[ScaleFix, ...]:
    starts = np.array([labels[0] for _, _, labels in trace.axes])
    fixes = []
    for arrays, raw, exponent in trace.relations.scale_fixes:
        if _is_fixed(raw, solution, number):
            continue
        entries = []
        for array in arrays:
            labels = np.unique(array)
            where = np.searchsorted(starts, labels, side="right") - 1
            for i in np.unique(where).tolist():
                entries.append((i, labels[where == i] - starts[i]))
        fixes.append(ScaleFix(tuple(entries), _extent(raw, solution, number), exponent))
    return tuple(fixes)


def _params_cost(shapes: dict[str, tuple[int, ...]], axes: Sequence[Axis]) -> Cost:
    variable: dict[str, list[Axis]] = {}
    for axis in axes:
        if axis.tensor in shapes and ((axis.channels >= 0).any() or (axis.owners >= 0).any()):
            variable.setdefault(axis.tensor, []).append(axis)
    terms = []
    for name, shape in shapes.items():
        here = variable.get(name, [])
        dims = {a.dim for a in here}
        constant = int(np.prod([n for d, n in enumerate(shape) if d not in dims], dtype=np.int64))
        terms.append((constant, [Extent(Indices(a.channels[None], a.owners[None]), "count") for a in here]))
    return _cost(terms)


def _macs_cost(
    costs: Sequence[tuple[int, tuple[RawExtent, ...]]], solution: Solution, number: Ints, batch: int
) -> Cost:
    terms = []
    for coefficient, raws in costs:
        factors = []
        for raw in raws:
            extent = _extent(raw, solution, number)
            if (extent.places.channels == STAYS).all() and (extent.places.owners == STAYS).all():
                coefficient *= raw.traced_size
            else:
                factors.append(extent)
        terms.append((coefficient, factors))
    return _cost(terms, batch)


def _cost(terms: Sequence[tuple[int, Sequence[Extent]]], divisor: int = 1) -> Cost:
    """Returns the polynomial with equal extents stored once."""
    known: dict[tuple[str, bytes, bytes], int] = {}
    extents: list[Extent] = []
    result: Counter[tuple[int, ...]] = Counter()
    for coefficient, factors in terms:
        numbers = []
        for extent in factors:
            key = extent.kind, extent.places.channels.tobytes(), extent.places.owners.tobytes()
            if key not in known:
                known[key] = len(extents)
                extents.append(extent)
            numbers.append(known[key])
        result[tuple(sorted(numbers))] += coefficient
    return Cost(tuple((c, f) for f, c in result.items()), tuple(extents), divisor)


def _groups(
    model: nn.Module, axes: Sequence[Axis], links: Sequence[Link], num_channels: int, summed: np.ndarray
) -> tuple[Group, ...]:
    """Returns the channels sorted into groups of one footprint, and the groups into families."""
    groups = []
    fibre = _fibres(links, num_channels)
    heads = np.zeros(num_channels + 1, np.bool_)
    inside = np.zeros(num_channels + 1, np.bool_)
    for axis in axes:
        heads[axis.owners] = True
        inside[axis.channels[axis.owners >= 0]] = True
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    ndim = {name: p.ndim for name, p in model.named_parameters()}
    parts = [_part(axis, types) for axis in axes]
    for channels, members in _by_footprint(axes, num_channels):
        here = [axes[i] for i, _ in members]
        kind = _kind(channels[0], heads, inside, summed, here, ndim)
        label = kind
        if kind == "head_dims":
            # a value dimension is also read by the projection behind it; query and key dimensions meet only each other
            label = "head_dims.v" if any(a.role == "in" for a in here) else "head_dims.qk"
        signature = (label, frozenset(Counter((parts[i], n) for i, n in members).items()))
        groups.append((_name(label, here, model), kind, label, signature, _arrange(channels, fibre), members))
    return _with_families(groups)


def _by_footprint(axes: Sequence[Axis], num_channels: int) -> Iterator[tuple[Ints, tuple[tuple[int, int], ...]]]:
    """Yields the channels of each footprint, in order of the first, and the members of the group that they make."""
    sizes = [a.channels.size for a in axes]
    channels, owners = _places(axes)
    inside = np.flatnonzero((owners >= 0) & (owners != channels))
    number = np.repeat(np.arange(len(axes)), sizes)[inside]
    random = np.random.default_rng(0).integers(1, 2**63, size=(2, len(axes)), dtype=np.uint64)
    footprint = np.zeros(num_channels + 1, np.uint64)
    np.add.at(footprint, channels, np.repeat(random[0], sizes))
    np.add.at(footprint, owners[inside], random[1][number])
    _, first, inverse = np.unique(footprint[:num_channels], return_index=True, return_inverse=True)
    order = np.argsort(first)
    group = np.argsort(order)[inverse]
    by_group = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1]) if group.size else []
    of_first = np.full(num_channels + 1, -1, np.int64)
    of_first[first[order]] = np.arange(order.size)
    mine = np.flatnonzero(of_first[channels] >= 0)
    place = np.concatenate([np.searchsorted(np.cumsum(sizes), mine, side="right"), number])
    taken = np.concatenate([of_first[channels[mine]], of_first[owners[inside]]])
    places, counts = np.unique((taken * len(axes) + place)[taken >= 0], return_counts=True)
    members = [(p % len(axes), n) for p, n in zip(places.tolist(), counts.tolist(), strict=True)]
    bounds = np.searchsorted(places, np.arange(order.size + 1) * len(axes)).tolist()
    return ((c, tuple(members[a:b])) for c, (a, b) in zip(by_group, pairwise(bounds), strict=True) if a < b)


def _with_families(groups: list[tuple]) -> tuple[Group, ...]:
    signatures: dict[str, dict[object, int]] = {}
    for _, _, label, signature, *_ in groups:
        known = signatures.setdefault(label, {})
        known.setdefault(signature, len(known) + 1)
    result = []
    taken: Counter[str] = Counter()
    for name, kind, label, signature, channels, members in groups:
        taken[name] += 1
        name = name if taken[name] == 1 else f"{name}#{taken[name]}"
        several = len(signatures[label]) > 1
        family = f"{label}.{signatures[label][signature]}" if several else label
        result.append(Group(name, kind, family, channels, members))
    return tuple(result)


def _kind(
    channel: int, heads: np.ndarray, inside: np.ndarray, summed: np.ndarray, axes: Sequence[Axis], ndim: dict[str, int]
) -> str:
    if heads[channel]:
        return "heads"
    if inside[channel]:
        return "head_dims"
    makes_tokens = any(a.role == "out" and ndim.get(a.tensor) == 2 for a in axes)
    if not makes_tokens:
        return "conv"
    return "embedding" if summed[channel] else "mlp"


def _name(label: str, axes: Sequence[Axis], model: nn.Module) -> str:
    """Returns the path of the first module that makes the channels, or of the block around heads and their width."""
    maker = next((a for a in axes if a.role == "out"), axes[0])
    module = maker.tensor.rsplit(".", 1)[0] if "." in maker.tensor else ""
    if label.startswith("head"):
        alone = not any(True for _ in model.get_submodule(module).children())
        parent = module.rpartition(".")[0] if alone and "." in module else module
        return f"{parent or maker.tensor}:{label.removeprefix('head_')}"
    return module or maker.tensor


def _part(axis: Axis, types: dict[str, str]) -> tuple[str, str, int]:
    """Returns what an axis is in a layer of its kind: type of module, name of tensor, dimension."""
    module, _, leaf = axis.tensor.rpartition(".")
    return types.get(module, ""), leaf, axis.dim


def _fibres(links: Sequence[Link], num_channels: int) -> Ints:
    """Returns per channel the number of the fibre inside one head (or of one tensor) that it lies in, -1 if none."""
    fibre = np.full(num_channels + 1, -1, np.int64)
    number = 0
    for link in links:
        for node in link.nodes:
            if node.channels.min() >= 0 and (node.owners == node.owners[0]).all():
                fibre[node.channels] = number
                number += 1
    return fibre


def _arrange(channels: Ints, fibre: Ints) -> Ints:
    """Returns channels as fibres x width; one row if they do not fall into equal fibres."""
    ids = fibre[channels]
    numbers, counts = np.unique(ids, return_counts=True)
    if numbers.size > 1 and numbers[0] >= 0 and (counts == counts[0]).all():
        return channels[np.argsort(ids, kind="stable")].reshape(numbers.size, -1)
    return channels.reshape(1, -1)


def batch_size(inputs: object) -> int:
    """Returns the size of the first dimension of the first tensor among the example inputs."""
    if isinstance(inputs, torch.Tensor):
        return int(inputs.shape[0]) if inputs.ndim else 1
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else ()
    return next((batch_size(v) for v in values if isinstance(v, (torch.Tensor, dict, tuple, list))), 1)
