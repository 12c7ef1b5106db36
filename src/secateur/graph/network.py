"""What a trace yields: channels, groups, families, and the cost of a network as polynomials in what survives."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
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
        return mask[self.channels] & mask[self.owners]


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
        return mask[self.channels] & mask[self.owners]


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
    extents: tuple[Indices, ...]
    divisor: int = 1

    def __call__(self, mask: Bools) -> int:
        """Returns the cost under a mask from `Network.mask`."""
        sizes = [int(np.count_nonzero(e.alive(mask))) for e in self.extents]
        total = 0
        for coefficient, factors in self.terms:
            for i in factors:
                coefficient *= sizes[i]
            total += coefficient
        return total // self.divisor


@dataclass(frozen=True)
class Residual:
    """A residual sum x + f(x): the module in which the sum stands, and the modules that compute its branch f."""

    where: str
    branch: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Network:
    """What may be removed from a model, what goes with it, and what it costs. Made by `secateur.trace`.

    Channels are numbered from 0; `axes` says which indices of which tensors each of them occupies. `params_cost` and
    `macs_cost` give parameters, and multiply-accumulates per example at the traced input size (every matmul,
    convolution and attention product; norms, activations and biases are not counted), under any mask of survivors.
    `fingerprint` identifies the architecture: names and shapes of all its tensors.
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
    output_shapes: tuple[tuple[int, ...], ...] = ()
    unknown_operators: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    inputs: Any = field(repr=False, default=None)

    @property
    def params(self) -> int:
        """The number of parameters of the model."""
        return self.params_cost(self.mask())

    @property
    def macs(self) -> int:
        """Multiply-accumulates per example of the model at the traced input size."""
        return self.macs_cost(self.mask())

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
        """Returns in words what goes with the indices along dimension `dim` of `tensor`, and what stays and why."""
        axis = self.axis(tensor, dim)
        lines = [f"{tensor}[dim {dim}]: {axis.channels.size} indices, {axis.role}"]
        for group in self.groups:
            mine = np.isin(axis.channels, group.channels) | np.isin(axis.owners, group.channels)
            if mine.any():
                lines.append(f"  {int(mine.sum())} indices in {group}; one of its {group.size} channels takes")
                lines += [f"    {n} of {self.axes[i].tensor}[dim {self.axes[i].dim}]" for i, n in group.members]
        lines += [f"  {f}" for f in self.frozen if f.tensor == tensor and f.dim == dim]
        lines += [
            f"  sets {a}"
            for a in self.attributes
            if np.isin(a.extent.places.channels, axis.channels[axis.channels >= 0]).any()
        ]
        return "\n".join(lines)

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
