"""Which attribute must be set to what: the sizes that a model's code reads, solved against what survives.

Every size that arrives as a shape argument is required to equal an extent of the cut model. Requirements are settled
once, after the trace: an attribute that alone decides an extent follows it; sizes of two things are linked; a sum in
which one attribute is open decides that one. Whatever no attribute can meet is frozen, and so is everything else that
its expression reads.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from secateur.graph.labels import Ints
from secateur.graph.relations import Freeze, Relations, Requirement
from secateur.graph.sizes import (
    Expression,
    FromAttribute,
    Product,
    Quotient,
    RawExtent,
    Sum,
    leaves_of,
)

AS_NUMBER = "its size enters the computation as a number"


class _Settling:
    """The state of settling the requirements of one trace; `atoms` tells which labels are the same channel."""

    def __init__(self, relations: Relations, atoms: Ints) -> None:
        self.relations = relations
        self.atoms = atoms
        self.known: dict[FromAttribute, list[RawExtent]] = {}

    def place(self, expression: Expression, extent: RawExtent, *, last: bool) -> bool:
        """Settles one requirement if that is possible yet; attributes that nothing decides are constants at `last`."""
        if isinstance(expression, FromAttribute):
            self.relations.attributes.append((expression, extent))
            self.known.setdefault(expression, []).append(extent)
            return True
        if isinstance(expression, RawExtent):
            if expression != extent:
                self.relations.equal.append((expression, extent))
            return True
        if isinstance(expression, Product):
            return self._product(expression, extent, last=last)
        if isinstance(expression, Quotient):
            return self._quotient(expression, extent, last=last)
        return isinstance(expression, Sum) and self._sum(expression, extent)

    def _product(self, product: Product, extent: RawExtent, *, last: bool) -> bool:
        left, right = product.left, product.right
        decided = [self._is_decided(e) for e in (left, right)]
        if all(decided):
            return True
        if last and any(decided):
            left, right = (_value(right), left) if decided[0] else (_value(left), right)
        if not isinstance(left, int) or extent.kind == "width":
            return False
        return self.place(right, RawExtent(extent.labels, extent.kind, extent.divisor * left), last=last)

    def _is_decided(self, expression: Expression) -> bool:
        return isinstance(expression, RawExtent) or expression in self.known

    def _quotient(self, quotient: Quotient, extent: RawExtent, *, last: bool) -> bool:
        """n // c as one, or several, of c equal parts of something of size n."""
        parts = quotient.right if isinstance(quotient.right, int) else _value(quotient.right) if last else 0
        if parts < 1 or self._is_decided(quotient.right):
            return False
        if extent.kind == "width" and len(extent.labels) == parts and not self._is_decided(quotient.left):
            return self.place(quotient.left, RawExtent(extent.labels.reshape(1, -1), "count"), last=last)
        return any(self._is_part(whole, parts, extent) for whole in self.extents(quotient.left))

    def _is_part(self, whole: RawExtent, parts: int, extent: RawExtent) -> bool:
        """Makes the `parts` of each row of `whole` equal, if `extent` is so many (its divisor) of them in a row."""
        size = whole.labels.shape[1] // parts
        several = extent.divisor if extent.kind == "count" else 1
        fits = whole.kind == extent.kind and whole.divisor == 1 and whole.labels.shape[1] == size * parts
        if not fits or extent.labels.shape != (len(whole.labels), size * several):
            return False
        starts = range(0, size * (parts - several + 1), size)
        mine = self.atoms[extent.labels]
        if not any(np.array_equal(self.atoms[whole.labels[:, i : i + size * several]], mine) for i in starts):
            return False
        self.relations.add_fibres(whole.labels.reshape(-1, size))
        return True

    def _sum(self, total: Sum, extent: RawExtent) -> bool:
        """A sum over sizes of which at most one attribute is open: that one makes up what the others leave."""
        if extent.kind != "count" or extent.divisor != 1:
            return False
        terms: Counter[Expression] = Counter()
        constant = _collect(total, 1, terms)
        rest = Counter(self.atoms[extent.labels.ravel()].tolist())
        of_atom = dict(zip(self.atoms[extent.labels.ravel()].tolist(), extent.labels.ravel().tolist(), strict=True))
        unknown: list[Expression] = []
        for term, factor in terms.items():
            known = [e for e in self.extents(term) if e.kind == "count" and e.divisor == 1]
            if not known:
                unknown.append(term)
                continue
            labels = known[0].labels.ravel()
            of_atom.update(zip(self.atoms[labels].tolist(), labels.tolist(), strict=True))
            for atom, times in Counter(self.atoms[labels].tolist()).items():
                rest[atom] -= factor * times
        left = {atom: times for atom, times in rest.items() if times}
        if constant or len(unknown) > 1:
            return False
        if not unknown:
            return not left
        attribute, factor = unknown[0], terms[unknown[0]]
        shares = [times // factor for times in left.values()]
        if (
            not isinstance(attribute, FromAttribute)
            or any(t % factor for t in left.values())
            or min(shares, default=0) < 1
        ):
            return False
        labels = np.repeat(np.array([of_atom[atom] for atom in left], np.int64), shares)
        return labels.size == attribute.value and self.place(attribute, RawExtent(labels[None], "count"), last=False)

    def extents(self, expression: Expression) -> list[RawExtent]:
        """Returns what an expression is known to be the size of."""
        if isinstance(expression, RawExtent):
            return [expression]
        known = [e for other, e in self.relations.quotients if other == expression]
        return [*self.known.get(expression, []), *known] if isinstance(expression, FromAttribute) else known

    def hold(self, extent: RawExtent, reason: str, where: str) -> None:
        """The size `extent` may not change."""
        if extent.kind == "rows":
            self.relations.pins.append((extent.labels, reason, where))
        else:
            freeze = Freeze(extent.labels.ravel(), reason, where, extent.kind == "width")
            self.relations.freezes.append(freeze)

    def follow(self, leader: FromAttribute, other: FromAttribute) -> None:
        """Makes an attribute that decides nothing, but is compared with one that does, keep its proportion to it."""
        times = leader.value // other.value if other.value > 0 else 0
        if other in self.known or leader not in self.known:
            return
        if times and leader.value == times * other.value:
            extent = self.known[leader][0]
            self.place(other, RawExtent(extent.labels, extent.kind, extent.divisor * times), last=False)
        else:
            self.relations.numbers.append((leader, ""))

    def refuse(self, requirement: Requirement) -> None:
        """Freezes what a requirement that nothing can meet is about, and all that its expression reads."""
        self.hold(requirement.extent, requirement.reason, requirement.where)
        for leaf in leaves_of(requirement.expression):
            for extent in self.extents(leaf):
                self.hold(extent, requirement.reason, requirement.where)


def settle(relations: Relations, atoms: Ints) -> None:
    """Ends a trace: turns its requirements into attributes to set, links and freezes.

    `atoms` numbers labels so that those of one channel in one place have one number.
    """
    settling = _Settling(relations, atoms)
    pending = relations.requirements
    # simple ones first: they say what the attributes in the others are
    for kinds, last in (((FromAttribute, RawExtent), False), ((Product, Quotient, Sum), False), ((object,), True)):
        progress = True
        while progress:
            waiting = [
                r
                for r in pending
                if not isinstance(r.expression, kinds) or not settling.place(r.expression, r.extent, last=last)
            ]
            progress = len(waiting) < len(pending)
            pending = waiting
    for requirement in pending:
        settling.refuse(requirement)
    for left, right in relations.compared:
        settling.follow(left, right)
        settling.follow(right, left)
    for expression, where in relations.numbers:
        for extent in settling.extents(expression) or [e for x in leaves_of(expression) for e in settling.extents(x)]:
            settling.hold(extent, AS_NUMBER, where)
    for expression in relations.divided:  # a size that shrinks to 1 could not be seen any more
        for extent in (e for leaf in leaves_of(expression) for e in settling.extents(leaf) if e.kind != "rows"):
            relations.keep_two(extent.labels)
    for expression, exponent, weights in relations.powers:
        for extent in settling.extents(expression)[:1]:
            relations.scale_fixes.append((weights, extent, -exponent))
    _drop_shared_fixes(relations, settling)


def _drop_shared_fixes(relations: Relations, settling: _Settling) -> None:
    """Freezes the sizes that weights cannot make up for, because what they make is used elsewhere as well."""
    uses = np.zeros(relations.num_labels, np.int64)
    matters = np.zeros(relations.num_labels, np.bool_)
    for weights, *_ in relations.scale_fixes:
        for array in weights:
            matters[array] = True
    for array in relations.ends:
        uses[np.unique(array[matters[array]])] += 1
    kept = []
    for fix in relations.scale_fixes:
        weights, extent, _ = fix
        if all((uses[a] <= 1).all() for a in weights):
            kept.append(fix)
        else:
            settling.hold(extent, "it sets the temperature of an attention, and its weights serve for more", "")
    relations.scale_fixes[:] = kept


def _value(expression: Expression) -> int:
    """Returns the number that an expression stood for in the trace."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, FromAttribute):
        return expression.value
    if isinstance(expression, RawExtent):
        n, m = expression.labels.shape
        return {"width": m, "rows": n, "count": n * m}[expression.kind] // expression.divisor
    left, right = _value(expression.left), _value(expression.right)
    if isinstance(expression, Sum):
        return left + expression.sign * right
    return left * right if isinstance(expression, Product) else left // right


def _collect(expression: Expression, factor: int, terms: Counter[Expression]) -> int:
    """Adds what a sum is made of to `terms` with its factors, and returns its constant part."""
    if isinstance(expression, Sum):
        constant = _collect(expression.left, factor, terms)
        return constant + _collect(expression.right, factor * expression.sign, terms)
    if isinstance(expression, Product) and isinstance(expression.left, int):
        return _collect(expression.right, factor * expression.left, terms)
    if isinstance(expression, int):
        return factor * expression
    terms[expression] += factor
    return 0
