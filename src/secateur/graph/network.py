"""What a trace yields: channels, groups, families, and the cost of a network as polynomials in what survives."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from secateur.errors import InputError, unknown_name

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
STAYS = -1
"""The channel (or owner) number of an index that is not removable in that way."""

Role = Literal["out", "in", "norm", "other"]
KINDS = ("embedding", "heads", "head_dims", "mlp", "conv")
"""What a group of channels can be: the residual stream, attention heads, dimensions inside heads (query/key and value),
hidden neurons of linear layers, filters of convolutions."""


@dataclass(frozen=True, eq=False)
class Indices:
    """Places that survive while their channel does and, inside a head, while that head (`owners`) does too."""

    channels: Ints
    owners: Ints

    def alive(self, mask: Bools) -> Bools:
        """Returns which places survive under a mask from `Network.mask`."""
        return mask.take(self.channels) & mask.take(self.owners)


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of one parameter or buffer: the channel of each index, and the head that the index lies in.

    `role` says what the axis does: `out` and `in` are the two sides of a matmul or convolution weight, `norm` is the
    scale of a normalisation layer, `other` is everything else (biases, position embeddings, running statistics …).
    An index goes when its channel goes or the channel `owners` of its head does; -1 where there is none. `components`
    (index, head) tells which indices belong together whether or not they may go: what a re-trace is compared by.
    """

    tensor: str
    dim: int
    channels: Ints
    role: Role
    owners: Ints
    components: Ints

    def alive(self, mask: Bools) -> Bools:
        """Returns which indices survive under a mask from `Network.mask`."""
        return mask.take(self.channels) & mask.take(self.owners)


@dataclass(frozen=True)
class Frozen:
    """Indices along an axis that stay, and why: the reason, and the module and source line behind it."""

    tensor: str
    dim: int
    count: int
    reason: str
    where: str

    def __str__(self) -> str:
        return f"{self.tensor}[dim {self.dim}]: {self.count} indices stay: {self.reason}; {self.where}"


@dataclass(frozen=True, eq=False)
class Group:
    """Channels with one footprint, as an array of fibres x width: the heads of a block, the neurons of an MLP …

    `members` lists each axis that a channel of the group occupies (its position in `Network.axes`) with the number of
    indices that one channel takes there. A head occupies all that lies inside it.
    """

    name: str
    kind: str
    family: str
    channels: Ints
    members: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """The number of channels."""
        return int(self.channels.size)

    def __str__(self) -> str:
        fibres, width = self.channels.shape
        return f"{self.name} ({self.family}): {f'{fibres} x {width}' if fibres > 1 else width}"


@dataclass(frozen=True, eq=False)
class Link:
    """Sets of places that must keep equally many members: the fibres of one tensor, or axes that one size decides.

    A fibre inside a head that goes as a whole is exempt. `nodes` differ from each other.
    """

    nodes: tuple[Indices, ...]


@dataclass(frozen=True, eq=False)
class Extent:
    """A size that depends on what survives among places (R x W).

    `width`: survivors in a row (all rows that are not empty keep equally many); `rows`: rows that are not empty;
    `count`: all survivors; each divided by `divisor`.
    """

    places: Indices
    kind: Literal["width", "rows", "count"]
    divisor: int = 1

    def size(self, mask: Bools) -> int:
        """Returns the size under a mask from `Network.mask`."""
        kept = self.places.alive(mask)
        if self.kind == "width":
            return int(kept.sum(axis=1).max()) // self.divisor
        return int(kept.any(axis=1).sum() if self.kind == "rows" else kept.sum()) // self.divisor


@dataclass(frozen=True, eq=False)
class Attribute:
    """An integer attribute of a module, or of an object that it holds, that decides the size of an axis.

    `path` are the steps from the module at path `module`: attribute names and indices into tuples.
    """

    module: str
    path: tuple[str | int, ...]
    extent: Extent

    def __str__(self) -> str:
        steps = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in self.path)
        return f"{self.module}{steps}".lstrip(".")


@dataclass(frozen=True, eq=False)
class ScaleFix:
    """Entries to multiply by (new width / old width) ** exponent so that an attention keeps its temperature.

    `entries` are (axis number in `Network.axes`, indices along it); the weights there make the query.
    """

    entries: tuple[tuple[int, Ints], ...]
    extent: Extent
    exponent: float


@dataclass(frozen=True, eq=False)
class Cost:
    """A polynomial: the sum of coefficient x product of the sizes of some extents, over `divisor`."""

    terms: tuple[tuple[int, tuple[int, ...]], ...]
    extents: tuple[Extent, ...]
    divisor: int = 1

    def __call__(self, mask: Bools) -> int:
        """Returns the cost under a mask from `Network.mask`."""
        sizes = [e.size(mask) for e in self.extents]
        total = 0
        for coefficient, factors in self.terms:
            for i in factors:
                coefficient *= sizes[i]
            total += coefficient
        return total // self.divisor


@dataclass(frozen=True)
class StandIn:
    """What takes the place of a module in a dropped branch, and returns a tuple of `length` if that is not 0.

    `pass` gives on the first tensor that it gets; `zeros` gives zeros like it, `zero` a single one with `rank`
    dimensions, which spreads over whatever it is added to.
    """

    module: str
    kind: Literal["pass", "zeros", "zero"]
    length: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Residual:
    """A residual sum x + f(x): the module in which the sum stands, and the modules that compute its branch f.

    `name` is what a plan calls the branch. `params` and `macs` are what goes when it is dropped (MACs per example; a
    parameter that the block itself holds goes only with its last branch). `reason` says why the branch cannot be
    dropped, and is empty if it can; `stand_ins` take the places of its modules then.
    """

    where: str
    branch: tuple[str, ...]
    name: str
    stand_ins: tuple[StandIn, ...]
    params: int
    macs: int
    reason: str = ""

    def __str__(self) -> str:
        why = f"; it stays: {self.reason}" if self.reason else ""
        return f"{self.name}: {self.params:,} parameters, {self.macs:,} MACs{why}"


@dataclass(frozen=True)
class Block:
    """A module that returns what it is given when all of `branches` are dropped: nothing else is left of it then.

    It returns a tuple of `length`, which can only be 1, if that is not 0.
    """

    module: str
    branches: tuple[str, ...]
    length: int = 0


@dataclass(frozen=True, eq=False)
class Outline:
    """What a cut model is compared by: sizes, costs, and which indices of its tensors belong together.

    `components` has for (tensor, dimension) the component of each index and that of its head, or -1 (2 x n);
    `remainders` counts the sizes of which something was left when the model divided them.
    """

    components: Mapping[tuple[str, int], Ints]
    params: int
    macs: int
    output_shapes: tuple[tuple[int, ...], ...]
    remainders: int


@dataclass(frozen=True, eq=False)
class Network:
    """What may be removed from a model, what goes with it, and what it costs. Made by `secateur.trace`.

    Channels are numbered from 0; `axes` says which indices of which tensors each of them occupies. `params_cost` and
    `macs_cost` give parameters, and multiply-accumulates per example at the traced input size (every matmul,
    convolution and attention product; norms, activations and biases are not counted), under any mask of survivors.
    `fingerprint` identifies the architecture: names and shapes of its parameters and persistent buffers; `caches` tells
    whether other buffers have been made anew since. `values` are the inputs and the
    decisions of a model that cannot run without values (see `graph/values.py`), else None. `remainders` counts how
    often the model found one size not to be a multiple of another. Of each of `pairs`, sets of places, two must survive
    (where they are made of heads, one head) for the operations to be those that were traced. `blocks` are modules that
    do nothing without their residual branches. `dropped` are the branches that this network is without, `origin` the
    network that still has them.
    """

    num_channels: int
    axes: tuple[Axis, ...]
    groups: tuple[Group, ...]
    links: tuple[Link, ...]
    frozen: tuple[Frozen, ...]
    attributes: tuple[Attribute, ...]
    scale_fixes: tuple[ScaleFix, ...]
    residuals: tuple[Residual, ...]
    params_cost: Cost
    macs_cost: Cost
    fingerprint: str
    caches: str = ""
    output_shapes: tuple[tuple[int, ...], ...] = ()
    unknown_operators: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    inputs: Any = field(repr=False, default=None)
    values: Any = field(repr=False, default=None)
    remainders: int = 0
    pairs: tuple[Indices, ...] = ()
    blocks: tuple[Block, ...] = ()
    dropped: tuple[str, ...] = ()
    origin: Network | None = field(repr=False, default=None)

    @cached_property
    def params(self) -> int:
        """The number of parameters of the model."""
        return self.params_cost(self.mask())

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates per example of the model at the traced input size."""
        return self.macs_cost(self.mask())

    @property
    def dense_params(self) -> int:
        """The number of parameters of the model with all its branches."""
        return (self.origin or self).params

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates per example of the model with all its branches."""
        return (self.origin or self).macs

    @property
    def families(self) -> dict[str, tuple[Group, ...]]:
        """The groups by family, in order of appearance."""
        found: dict[str, list[Group]] = {}
        for group in self.groups:
            found.setdefault(group.family, []).append(group)
        return {name: tuple(groups) for name, groups in found.items()}

    def mask(self, removed: Ints | None = None) -> Bools:
        """Returns which channels survive (num_channels + 1; the last entry, for places that stay, is always True)."""
        mask = np.ones(self.num_channels + 1, np.bool_)
        if removed is not None:
            mask[removed] = False
        return mask

    def axis(self, tensor: str, dim: int) -> Axis:
        """Returns the axis of a tensor; raises InputError, with the nearest names, where there is none."""
        for axis in self.axes:
            if axis.tensor == tensor and axis.dim == dim:
                return axis
        names = {a.tensor for a in self.axes}
        if tensor not in names:
            raise unknown_name("tensor", tensor, names)
        raise InputError(f"{tensor} has no dimension {dim} of size above 1")

    def explain(self, tensor: str, dim: int) -> str:
        """Returns in words what goes with the indices along dimension `dim` of `tensor`, and what stays and why.

        For every group that lies on the axis: what one of its channels takes everywhere else, which widths must stay
        equal to its own, which attributes are set and which weights rescaled after a cut. Names that differ only in
        numbers share a line.

        Raises:
            InputError: There is no such axis; the message names the nearest tensors, or the dimensions that there are.
        """
        known = {a.dim: a.channels.size for a in self.axes if a.tensor == tensor}
        if known and dim not in known:
            sizes = " and ".join(f"{d} ({size} indices)" for d, size in known.items())
            raise InputError(f"{tensor} has no dimension {dim} of size above 1; it has {sizes}")
        axis = self.axis(tensor, dim)
        here = np.zeros(self.num_channels + 1, np.bool_)
        here[axis.channels] = here[axis.owners] = True
        here[STAYS] = False

        def meets(places: Indices) -> bool:
            return bool(here[places.channels].any() or here[places.owners].any())

        lines = [f"{tensor}[dim {dim}]: {axis.channels.size} indices, {axis.role}"]
        for group in self.groups:
            mine = np.isin(axis.channels, group.channels) | np.isin(axis.owners, group.channels)
            if mine.any():
                lines.append(f"  {int(mine.sum())} indices in {group}; one of its {group.size} channels takes")
                lines += [f"    {place}" for place in self.goes_with(group)]
        lines += [f"  keep equal widths: {link_text(self, link)}" for link in self.links if any(map(meets, link.nodes))]
        lines += [
            f"  {f.count} indices stay: {f.reason}{f'; {f.where}' if f.where else ''}"
            for f in self.frozen
            if (f.tensor, f.dim) == (tensor, dim)
        ]
        sizes = {str(a): a.extent.size(self.mask()) for a in self.attributes if meets(a.extent.places)}
        for size in dict.fromkeys(sizes.values()):
            for name, times in merged([name for name, its in sizes.items() if its == size]):
                lines.append(f"  sets {name}, {size} now{times}")
        fixed = [(i, e.size) for fix in self.scale_fixes if meets(fix.extent.places) for i, e in fix.entries]
        lines += self._listed("  rescales {n} indices of {names} so that attention keeps its temperature", fixed)
        return "\n".join(lines)

    def goes_with(self, group: Group) -> list[str]:
        """Returns where one channel of a group lies, axes of alike names together: `1 of blocks.0-3.norm.weight …`."""
        return self._listed("{n} of {names}", group.members)

    def _listed(self, line: str, members: Iterable[tuple[int, int]]) -> list[str]:
        """Returns `line` filled in for members given as (axis number, count), alike ones together."""
        together: dict[tuple[int, int], list[str]] = {}
        for i, n in dict.fromkeys(members):
            together.setdefault((n, self.axes[i].dim), []).append(self.axes[i].tensor)
        return [
            line.format(n=n, names=f"{name}[dim {dim}]{times}")
            for (n, dim), tensors in together.items()
            for name, times in merged(tensors)
        ]

    def select(self, pattern: str) -> tuple[Group, ...]:
        """Returns the groups whose kind, family or name is `pattern` (a name may hold wildcards).

        Raises InputError, with the nearest names, when there is none.
        """
        found = tuple(g for g in self.groups if pattern in (g.kind, g.family) or fnmatch.fnmatchcase(g.name, pattern))
        if not found:
            raise unknown_name(
                "group or family", pattern, {g.family for g in self.groups} | {g.kind for g in self.groups}
            )
        return found

    def __str__(self) -> str:
        lines = [
            f"{self.params:,} parameters, {self.macs:,} MACs per example, {self.num_channels:,} removable channels"
        ]
        for name, groups in self.families.items():
            lines.append(f"  {name}: {len(groups)} groups, {sum(g.size for g in groups):,} channels")
        lines.append(f"  left alone: {len(self.frozen)} axes")
        lines += [f"  no rule for the operator aten.{name}; {where}" for name, where in self.unknown_operators]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def link_text(network: Network, link: Link) -> str:
    """Returns which places a link keeps equally many of: `3 x 64 of blocks.0.attn:dims.qk = 3 x 64 of …`."""
    group_of = np.full(network.num_channels + 1, STAYS, np.int64)
    for i, group in enumerate(network.groups):
        group_of[group.channels] = i
    nodes: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for node in link.nodes:
        places = np.where(node.channels >= 0, group_of[node.channels], group_of[node.owners])
        nodes[node.channels.size, tuple(np.unique(places).tolist())] += 1
    together: dict[str, list[str]] = {}
    for (size, groups), times in nodes.items():
        names = " and ".join("what stays" if i < 0 else network.groups[i].name for i in groups)
        together.setdefault(f"{times} x {size}" if times > 1 else str(size), []).append(names)
    return " = ".join(f"{count} of {name}{times}" for count, names in together.items() for name, times in merged(names))


def merged(names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns names in order, those that differ only in numbers as one with how many: `blocks.0-11.norm`, ` (12x)`."""
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(re.sub(r"(?<![^.])\d+(?![^.:])", "*", name), []).append(name)
    return [(alike[0], "") if len(alike) == 1 else (_range(alike), f" ({len(alike)}x)") for alike in together.values()]


def _range(names: Sequence[str]) -> str:
    """Returns names of one pattern as one, numbers as `0-11` where every combination occurs, otherwise as `*`."""
    columns = [list(dict.fromkeys(column)) for column in zip(*(n.split(".") for n in names), strict=True)]
    complete = np.prod([len(c) for c in columns]) == len(names)
    return ".".join(c[0] if len(c) == 1 else _runs(c) if complete else "*" for c in columns)


def _runs(numbers: Sequence[str]) -> str:
    """Returns numbers as text: `0-3` for neighbours, `0,2,4` otherwise, `0,2,..,18` where there are many."""
    values = [int(n) for n in numbers]
    if values == list(range(values[0], values[0] + len(values))) and len(values) > 2:
        return f"{values[0]}-{values[-1]}"
    return ",".join(numbers if len(numbers) < 7 else [*numbers[:2], "..", numbers[-1]])
