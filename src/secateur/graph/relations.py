"""What a trace records: how labels relate. Nothing is solved here; `solve` does that once, at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import TraceError
from secateur.graph.labels import CONSTANT, Ints, Shape, slices, varying
from secateur.graph.sizes import Expression, FromAttribute, Quotient, RawExtent

CONSTANTS = "meets a dimension of fixed size: an input, positions, or a constant"
FIXED_SIZE = "its size comes from a constant or an expression that cannot be followed"


@dataclass(frozen=True, eq=False)
class Freeze:
    """Labels that stay. With `channel_only`, a head that covers them may still go as a whole."""

    labels: Ints
    reason: str
    where: str
    channel_only: bool


@dataclass(frozen=True, eq=False)
class Requirement:
    """A size in the model's code that must equal an extent of the cut model, where the code uses it, and what for."""

    expression: Expression
    extent: RawExtent
    where: str
    reason: str


@dataclass(frozen=True, eq=False)
class Operand:
    """Components that take part in an operation, aligned to its index space, and the operand's sizes there.

    `copied` are dimensions of size 1 that the model's code made as long as a size says (see `Labels.copied`).
    """

    arrays: tuple[Ints, ...]
    shape: Shape
    copied: tuple[tuple[int, Expression | None], ...] = ()


class Relations:
    """The growing record of one trace. Every method takes label arrays and appends to a list; none decides anything."""

    def __init__(self, where: Callable[[], str]) -> None:
        self.where = where
        self.num_labels = 1
        self.remainders = 0
        self.same: list[tuple[Ints, Ints]] = []
        self.together: list[tuple[Ints, Ints]] = []
        self.owners: list[tuple[Ints, Ints]] = []
        self.freezes: list[Freeze] = []
        self.pins: list[tuple[Ints, str, str]] = []
        self.fibres: list[Ints] = []
        self.pairs: list[Ints] = []
        self.requirements: list[Requirement] = []
        self.equal: list[tuple[RawExtent, RawExtent]] = []
        self.attributes: list[tuple[FromAttribute, RawExtent]] = []
        self.costs: list[tuple[int, tuple[RawExtent, ...]]] = []
        self.quotients: list[tuple[Quotient, RawExtent]] = []
        self.compared: list[tuple[FromAttribute, FromAttribute]] = []
        self.numbers: list[tuple[Expression, str]] = []
        self.powers: list[tuple[Expression, float, tuple[Ints, ...]]] = []
        self.scale_fixes: list[tuple[tuple[Ints, ...], RawExtent, float]] = []
        self.divided: list[Expression] = []
        self.ends: list[Ints] = []
        self._fibre_of = np.full(1, -1, np.int64)
        self._fibre_size = np.zeros(64, np.int64)
        self._num_fibres = 0

    def new_labels(self, n: int) -> Ints:
        """Returns `n` fresh labels."""
        start = self.num_labels
        self.num_labels += n
        if self.num_labels > self._fibre_of.size:
            grown = np.full(max(self.num_labels, 2 * self._fibre_of.size), -1, np.int64)
            grown[: self._fibre_of.size] = self._fibre_of
            self._fibre_of = grown
        return np.arange(start, self.num_labels, dtype=np.int64)

    def tie(self, a: Ints, b: Ints) -> None:
        """a[i] and b[i] are the same channel in the same place: removed together, covered by the same head."""
        if a.shape != b.shape and a.size != b.size:
            raise TraceError(f"a rule ties {a.size} labels to {b.size}, in {self.where()}")
        if a is not b:
            self.same.append((a.ravel(), b.ravel()))

    def bundle(self, rows: Ints) -> None:
        """All labels in one row of `rows` (n x m) go together, though not because they sit in the same place."""
        if rows.shape[1] > 1:
            self.together.append((np.repeat(rows[:, 0], rows.shape[1] - 1), rows[:, 1:].ravel()))

    def freeze(self, labels: Ints, reason: str, *, channel_only: bool = False) -> None:
        """`labels` may not be removed."""
        if (labels != CONSTANT).any():
            self.freezes.append(Freeze(labels.ravel(), reason, self.where(), channel_only))

    def pin(self, rows: Ints, reason: str) -> None:
        """No row of `rows` (n x m) may be emptied by the removal of one head."""
        self.pins.append((rows, reason, self.where()))

    def hold(self, array: Ints, axis: int, reason: str) -> None:
        """Positions along `axis` have a meaning of their own: no index there may vanish and shift the others."""
        if varying(array) == {axis} or (self.fibre_of(array) < 0).any():
            self.freeze(array, reason)
        elif self.is_width_axis(array, axis):
            self.freeze(array, reason, channel_only=True)
        else:
            self.pin(slices(array, [axis]), reason)

    def keep_two(self, rows: Ints) -> None:
        """At least two must survive in each row of labels: with a single one the operation would be another."""
        self.pairs += list(rows) if rows.shape[1] > 1 else []

    def add_fibres(self, rows: Ints) -> None:
        """The rows (R x W) become fibres: each keeps the same number of labels, and loses its own least useful ones."""
        start, self._num_fibres = self._num_fibres, self._num_fibres + len(rows)
        if self._num_fibres > self._fibre_size.size:
            self._fibre_size = np.resize(self._fibre_size, max(self._num_fibres, 2 * self._fibre_size.size))
        self._fibre_size[start : self._num_fibres] = rows.shape[1]
        ids = np.arange(start, self._num_fibres, dtype=np.int64)
        self._fibre_of[rows] = ids[:, None]
        self._fibre_of[CONSTANT] = -1
        self.fibres.append(rows)

    def fibre_of(self, labels: Ints) -> Ints:
        """Returns the number of the fibre of each label, -1 where it is in none."""
        return self._fibre_of[labels]

    def in_whole_fibres(self, rows: Ints) -> bool:
        """True when each row of labels (R x W) is made of whole fibres, each in one piece (once or several times)."""
        ids = self._fibre_of[rows]
        if (ids < 0).any():
            return False
        new = np.ones(ids.shape, np.bool_)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = np.flatnonzero(new)
        lengths = np.diff(starts, append=ids.size)
        return bool((lengths % self._fibre_size[ids.ravel()[starts]] == 0).all())

    def is_width_axis(self, array: Ints, axis: int) -> bool:
        """True when the labels along `axis` (others fixed) are whole fibres: other members may survive in each row."""
        rows = slices(array, [i for i in range(array.ndim) if i != axis])
        ids = self._fibre_of[rows]
        if (ids == ids[:, :1]).all():
            return bool((ids >= 0).all())
        return self.in_whole_fibres(rows) and bool((self._fibre_size[ids] > 1).all())

    def own(self, parents: Ints, rows: Ints) -> None:
        """parents[i] is found wherever the labels rows[i] (n x m) are.

        If the row consists of whole fibres, parents[i] covers it: it goes exactly when the whole row goes. Otherwise
        all of the row goes with it.
        """
        ids = self.fibre_of(rows)
        if (ids >= 0).all():
            if (ids == ids[:, :1]).all() and (self._fibre_size[ids[:, 0]] == rows.shape[1]).all():
                self.owners.append((parents, rows))
                return
            keys, counts = np.unique(np.arange(len(rows))[:, None] * self._num_fibres + ids, return_counts=True)
            sizes = self._fibre_size[keys % self._num_fibres]
            if (counts == sizes).all():
                self.owners.append((parents, rows))
                return
        self.bundle(np.concatenate([parents[:, None], rows], axis=1))

    def coarsen(self, array: Ints, axes: frozenset[int]) -> Ints:
        """Returns the component left of a joint `array` when `axes`, some of its dimensions, are reduced away."""
        kept = sorted(varying(array) - axes)
        rows = slices(array, kept)
        _, first, index = np.unique(rows[:, 0], return_index=True, return_inverse=True)
        if first.size < len(rows):  # rows that begin alike need not be alike
            rows, index = np.unique(rows, axis=0, return_inverse=True)
        else:
            rows = rows[first]
        parents = self.new_labels(len(rows))
        self.own(parents, rows)
        return parents[index.ravel()].reshape([n if i in kept else 1 for i, n in enumerate(array.shape)])

    def fuse(self, outer: Ints, inner: Ints) -> Ints:
        """Returns one joint component for two that vary along different dimensions, the inner ones being fibres.

        Needed where a view merges the two dimensions: an index of the result goes when either of the two does.
        """
        shape = np.broadcast_shapes(outer.shape, inner.shape)
        joint = self.new_labels(int(np.prod(shape))).reshape(shape)
        rows = slices(joint, sorted(varying(outer)))
        self.add_fibres(rows)
        self.own(outer.ravel(), rows)
        self.own(inner.ravel(), slices(joint, sorted(varying(inner))))
        return joint

    def reduce(self, arrays: Iterable[Ints], axes: Iterable[int]) -> tuple[Ints, ...]:
        """Returns the components (same rank) of a tensor that has been summed, averaged … over `axes`."""
        gone = frozenset(axes)
        kept: list[Ints] = []
        for array in arrays:
            hit = varying(array) & gone
            if not hit:
                kept.append(array)
            elif hit != varying(array):
                kept.append(self.coarsen(array, hit))
        return self._relate(kept)

    def join(self, operands: Sequence[Operand]) -> tuple[Ints, ...]:
        """Returns the components over the common index space of `operands` that meet element by element (broadcast).

        Where components share dimensions they are related, and the finer one stands for both. A labelled dimension
        that meets one without labels, but not of size 1, meets constants: it is frozen, and no longer followed.
        """
        bare = [self._bare(operands, axis) for axis in range(len(operands[0].shape))]
        constant: set[int] = set()
        for array in (a for o in operands for a in o.arrays):
            met = [axis for axis in varying(array) if bare[axis]]
            if met and len(met) == len(varying(array)):
                self.freeze(array, CONSTANTS)
                constant.add(id(array))
            else:
                for axis in met:
                    self.hold(array, axis, CONSTANTS)
        for axis, expression in (c for o in operands for c in o.copied):
            for array in (a for o in operands for a in o.arrays if a.shape[axis] > 1 and id(a) not in constant):
                self.require(expression, self.extent(array, axis))
        return self._relate(a for o in operands for a in o.arrays if id(a) not in constant)

    @staticmethod
    def _bare(operands: Sequence[Operand], axis: int) -> bool:
        """True when an operand has several indices along `axis` but no labels for them."""
        return any(o.shape[axis] > 1 and not any(a.shape[axis] > 1 for a in o.arrays) for o in operands)

    def _relate(self, arrays: Iterable[Ints]) -> tuple[Ints, ...]:
        """Relates the components of one index space where they share dimensions; the finer one stands for both."""
        result: list[Ints] = []
        for array in arrays:
            axes = varying(array)
            absorbed = not axes
            for other in [r for r in result if varying(r) & axes]:
                theirs = varying(other)
                if theirs == axes:
                    self.tie(other, array)
                    absorbed = True
                elif axes < theirs:
                    self.own(array.ravel(), slices(other, sorted(axes)))
                    absorbed = True
                elif axes > theirs:
                    self.own(other.ravel(), slices(array, sorted(theirs)))
                    result = [r for r in result if r is not other]
                else:
                    self._share(other, array)
            if not absorbed:
                result.append(array)
        return tuple(result)

    def _share(self, a: Ints, b: Ints) -> None:
        """`a` and `b` run along common dimensions and each along others too: there, they lie in the same heads."""
        common = sorted(varying(a) & varying(b))
        parents = self.new_labels(int(np.prod([a.shape[i] for i in common])))
        self.own(parents, slices(a, common))
        self.own(parents, slices(b, common))

    def cost(self, arrays: Sequence[Ints], shape: Shape, times: int = 1) -> None:
        """Records `times` multiply-accumulates at each point of an index space of `shape` with joined components."""
        coefficient = times
        covered = frozenset[int]().union(*(varying(a) for a in arrays))
        for axis, n in enumerate(shape):
            if axis not in covered:
                coefficient *= int(n)
        factors: list[RawExtent] = []
        seen: frozenset[int] = frozenset()
        for array in arrays:
            here = varying(array)
            if here & seen:
                factors.append(RawExtent(slices(array, sorted(here & seen)), "width"))
            elif here:
                factors.append(RawExtent(array.reshape(1, -1), "count"))
            seen |= here
        self.costs.append((coefficient, tuple(factors)))

    def extent(self, array: Ints, axis: int) -> RawExtent:
        """Returns the size along `axis` of a component that varies there."""
        if varying(array) == {axis}:
            return RawExtent(array.reshape(1, -1), "count")
        others = [i for i in range(array.ndim) if i != axis]
        if self.is_width_axis(array, axis):
            return RawExtent(slices(array, others), "width")
        return RawExtent(slices(array, [axis]), "rows")

    def require(self, expression: Expression | None, extent: RawExtent, reason: str = FIXED_SIZE) -> None:
        """`expression` must give the size `extent` after a cut (see `requirements.settle`); if it cannot, it stays.

        None stands for a size that torch works out itself.
        """
        if expression is not None:
            self.requirements.append(Requirement(expression, extent, self.where(), reason))

    def compare(self, left: Expression, right: Expression, *, equal: bool) -> None:
        """Notes that the model compared two sizes: attributes must go on to be equal, or different."""
        if isinstance(left, FromAttribute) and isinstance(right, FromAttribute):
            self.compared.append((left, right))
        elif not equal:
            return
        elif isinstance(left, RawExtent) and isinstance(right, RawExtent | FromAttribute):
            self.require(right, left)
        elif isinstance(right, RawExtent) and isinstance(left, FromAttribute):
            self.require(left, right)

    def number(self, expression: Expression) -> None:
        """Notes that the model computed with a size as a number: it must keep its value, or the function changes."""
        self.numbers.append((expression, self.where()))

    def remainder(self, expression: Expression, value: int) -> None:
        """Notes what was left of a size that was divided: models decide by that, so one with a rest stays."""
        if value:
            self.remainders += 1
            self.number(expression)
        else:
            self.divided.append(expression)

    def power(self, expression: Expression, exponent: float, weights: tuple[Ints, ...]) -> None:
        """Notes that a tensor made by `weights` (see `Labels.scale`) was multiplied by a size to some power."""
        self.powers.append((expression, exponent, weights))
