"""What a trace records: how labels relate. Nothing is solved here; `solve` does that once, at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import TraceError
from secateur.graph.labels import CONSTANT, Ints, Shape, slices, varying
from secateur.graph.sizes import (
    Expression,
    FromAttribute,
    Other,
    Product,
    Quotient,
    RawExtent,
)


@dataclass(frozen=True, eq=False)
class Freeze:
    """Labels that stay. With `channel_only`, a head that covers them may still go as a whole."""

    labels: Ints
    reason: str
    where: str
    channel_only: bool


@dataclass(frozen=True, eq=False)
class Operand:
    """Components that take part in an operation, aligned to its index space, and the operand's sizes there."""

    arrays: tuple[Ints, ...]
    shape: Shape


class Relations:
    """The growing record of one trace. Every method takes label arrays and appends to a list; none decides anything."""

    def __init__(self, where: Callable[[], str]) -> None:
        self.where = where
        self.num_labels = 1
        self.same: list[tuple[Ints, Ints]] = []
        self.together: list[tuple[Ints, Ints]] = []
        self.owners: list[tuple[Ints, Ints]] = []
        self.freezes: list[Freeze] = []
        self.pins: list[tuple[Ints, str, str]] = []
        self.fibres: list[Ints] = []
        self.equal: list[tuple[RawExtent, RawExtent]] = []
        self.attributes: list[tuple[FromAttribute, RawExtent]] = []
        self.costs: list[tuple[int, tuple[Ints, ...]]] = []
        self.quotients: list[tuple[Quotient, RawExtent]] = []
        self.numbers: list[tuple[Expression, str]] = []
        self.powers: list[tuple[Expression, float, tuple[Ints, ...]]] = []
        self.scale_fixes: list[tuple[tuple[Ints, ...], RawExtent, float]] = []
        self._fibre_of = np.full(1, -1, np.int64)
        self._fibre_size: list[int] = []

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

    def add_fibres(self, rows: Ints) -> None:
        """The rows (R x W) become fibres: each keeps the same number of labels, and loses its own least useful ones."""
        ids = np.arange(len(self._fibre_size), len(self._fibre_size) + len(rows), dtype=np.int64)
        self._fibre_size += [rows.shape[1]] * len(rows)
        self._fibre_of[rows] = ids[:, None]
        self._fibre_of[CONSTANT] = -1
        self.fibres.append(rows)

    def fibre_of(self, labels: Ints) -> Ints:
        """Returns the number of the fibre of each label, -1 where it is in none."""
        return self._fibre_of[labels]

    def is_width_axis(self, array: Ints, axis: int) -> bool:
        """True when the labels along `axis` (others fixed) belong to one fibre: its members may differ between rows."""
        ids = self.fibre_of(array)
        return bool((ids >= 0).all() and (ids == ids.take([0], axis)).all())

    def own(self, parents: Ints, rows: Ints) -> None:
        """parents[i] is found wherever the labels rows[i] (n x m) are.

        If the row consists of whole fibres, parents[i] covers it: it goes exactly when the whole row goes. Otherwise
        all of the row goes with it.
        """
        ids = self.fibre_of(rows)
        if (ids >= 0).all():
            keys, counts = np.unique(np.arange(len(rows))[:, None] * len(self._fibre_size) + ids, return_counts=True)
            sizes = np.asarray(self._fibre_size)[keys % len(self._fibre_size)]
            if (counts == sizes).all():
                self.owners.append((parents, rows))
                return
        self.bundle(np.concatenate([parents[:, None], rows], axis=1))

    def coarsen(self, array: Ints, axes: frozenset[int]) -> Ints:
        """Returns the component left of a joint `array` when `axes`, some of its dimensions, are reduced away."""
        kept = sorted(varying(array) - axes)
        rows, index = np.unique(slices(array, kept), axis=0, return_inverse=True)
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
        return tuple(kept)

    def join(self, operands: Sequence[Operand]) -> tuple[Ints, ...]:
        """Returns the components over the common index space of `operands` that meet element by element (broadcast).

        Where components share dimensions they are related, and the finer one stands for both. A labelled dimension
        that meets one without labels, but not of size 1, meets constants: it is frozen, and no longer followed.
        """
        constant: set[int] = set()
        for axis in range(len(operands[0].shape)):
            labelled = [any(a.shape[axis] > 1 for a in o.arrays) for o in operands]
            bare = any(o.shape[axis] > 1 and not has for o, has in zip(operands, labelled, strict=True))
            if bare and any(labelled):
                for array in (a for o in operands for a in o.arrays if a.shape[axis] > 1):
                    self.freeze(array, "meets a dimension of fixed size: an input, positions, or a constant")
                    constant.add(id(array))
        result: list[Ints] = []
        for array in (a for o in operands for a in o.arrays):
            axes = varying(array)
            absorbed = not axes or id(array) in constant
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
                    self.freeze(array, "two components overlap in part")
                    self.freeze(other, "two components overlap in part")
                    absorbed = True
            if not absorbed:
                result.append(array)
        return tuple(result)

    def cost(self, arrays: Sequence[Ints], shape: Shape) -> None:
        """Records the multiply-accumulates of an operation over an index space of `shape` with joined components."""
        coefficient = 1
        covered = frozenset[int]().union(*(varying(a) for a in arrays))
        for axis, n in enumerate(shape):
            if axis not in covered:
                coefficient *= int(n)
        self.costs.append((coefficient, tuple(a.ravel() for a in arrays if varying(a))))

    def extent(self, array: Ints, axis: int) -> RawExtent:
        """Returns the size along `axis` of a component that varies there."""
        if varying(array) == {axis}:
            return RawExtent(array.reshape(1, -1), "count")
        others = [i for i in range(array.ndim) if i != axis]
        if self.is_width_axis(array, axis):
            return RawExtent(slices(array, others), "width")
        return RawExtent(slices(array, [axis]), "rows")

    def bind(self, expression: Expression | None, extent: RawExtent) -> bool:
        """Notes that `expression` must give the size `extent` after a cut; False when nothing can make it so.

        None stands for a size that torch works out itself.
        """
        if expression is None:
            return True
        if isinstance(expression, FromAttribute):
            self.attributes.append((expression, extent))
            return True
        if isinstance(expression, RawExtent):
            if expression != extent:
                self.equal.append((expression, extent))
            return True
        if isinstance(expression, Product) and isinstance(expression.left, int):
            if extent.kind != "width":
                return self.bind(
                    expression.right, RawExtent(extent.labels, extent.kind, extent.divisor * expression.left)
                )
            return False
        if isinstance(expression, Product):
            return all(
                isinstance(e, int | RawExtent)
                or (isinstance(e, FromAttribute) and any(a == e for a, _ in self.attributes))
                for e in (expression.left, expression.right)
            )
        assert isinstance(expression, int | Quotient | Other)
        return False

    def compare(self, left: Expression, right: Expression) -> None:
        """Notes that the model compared two equal sizes: an attribute checked against a size must go on to match it."""
        if isinstance(left, RawExtent) and isinstance(right, RawExtent | FromAttribute):
            self.bind(right, left)
        elif isinstance(right, RawExtent) and isinstance(left, FromAttribute):
            self.bind(left, right)

    def number(self, expression: Expression) -> None:
        """Notes that the model computed with a size as a number: it must keep its value, or the function changes."""
        self.numbers.append((expression, self.where()))

    def power(self, expression: Expression, exponent: float, weights: tuple[Ints, ...]) -> None:
        """Notes that a tensor made by `weights` (see `Labels.scale`) was multiplied by a size to some power."""
        self.powers.append((expression, exponent, weights))

    def _extents(self, expression: Expression) -> list[RawExtent]:
        known = [e for other, e in [*self.attributes, *self.quotients] if other == expression]
        return [*known, expression] if isinstance(expression, RawExtent) else known

    def keep_numbers(self) -> None:
        """Ends a trace: freezes what decides a size that the model computed with, or notes what makes up for it."""
        why = "its size enters the computation as a number"
        for expression, where in self.numbers:
            for extent in self._extents(expression):
                if extent.kind == "rows":
                    self.pins.append((extent.labels, why, where))
                else:
                    self.freezes.append(Freeze(extent.labels.ravel(), why, where, extent.kind == "width"))
        for expression, exponent, weights in self.powers:
            for extent in self._extents(expression)[:1]:
                self.scale_fixes.append((weights, extent, -exponent))
