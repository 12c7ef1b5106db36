"""The registry of operator rules, and what a rule is given.

A rule is one short function: it takes a `Call` and returns the labels of the output (a tuple of them for several
outputs). It sees shapes and labels, never values, and says what it knows through `call.relations`. Operators tagged
pointwise by torch need no rule, operators that torch can decompose are decomposed, and whatever an operator without a
rule touches is frozen and reported by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.graph.labels import Ints, Labels, Shape, align_right, labels_of, tensors_in
from secateur.graph.network import Role
from secateur.graph.relations import Operand, Relations
from secateur.graph.sizes import Expression, expression_of


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by the names of its schema, its output, and the integers of the call.

    `integers` are those that the Python caller passed, in order, with their expressions where they have one. A `nested`
    call was made by torch while it decomposed another operator: sizes that the caller did not pass are torch's own,
    worked out from the shapes at hand.
    """

    name: str
    arguments: dict[str, Any]
    output: Any
    relations: Relations
    integers: tuple[int, ...]
    mark_role: Callable[[Ints, Role], None]
    nested: bool

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def shape(self, name: str) -> Shape:
        """Returns the shape of a tensor argument."""
        return tuple(self.arguments[name].shape)

    @property
    def subject(self) -> str:
        """The name of what the operator works on: `self`, or `input` where the schema calls it so."""
        return "self" if "self" in self.arguments else "input"

    def labels(self, name: str) -> Labels:
        """Returns the labels of a tensor argument; none if the caller left it out."""
        return labels_of(self.arguments[name])

    def axis(self, name: str = "dim", of: str = "self") -> int:
        """Returns a dimension argument as a non-negative number."""
        return int(self.arguments[name] or 0) % max(1, self.arguments[of].ndim)

    def expressions(self, values: Sequence[int]) -> list[Expression | None]:
        """Returns, for a run of integers that the operator received, the expressions that the caller passed for them.

        None stands for a size that torch works out itself.
        """
        found = self._given(values)
        if found is None:
            return [None if self.nested or v == -1 else int(v) for v in values]
        return [None if v == -1 else v for v in found]

    def expression(self, value: int) -> Expression | None:
        """Returns what the caller passed for one integer, for which -1 is a number like any other."""
        found = self._given([value])
        return found[0] if found else None if self.nested else int(value)

    def _given(self, values: Sequence[int]) -> list[Expression] | None:
        wanted, given = list(values), self.integers
        for start in range(len(given) - len(wanted) + 1):
            if list(map(int, given[start : start + len(wanted)])) == wanted:
                return [expression_of(v, self.relations) for v in given[start : start + len(wanted)]]
        return None


MOST_SCALED = 16
"""A sum of more weights than that (a residual stream) is not followed as something that weights can scale."""
Rule = Callable[[Call], Labels | tuple[Labels, ...] | None]
"""Returns the labels of the output or outputs; None where the operator should be decomposed instead."""
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of the aten operators `names`; refuses a second registration."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"operator {name!r} has a rule already: {RULES[name].__name__}")
            RULES[name] = function
        return function

    return register


def operand_of(tensor: torch.Tensor, rank: int) -> Operand:
    """Returns a tensor's components and sizes aligned to the right of `rank` dimensions."""
    labels, missing = labels_of(tensor), rank - tensor.ndim
    copied = tuple((axis + missing, size) for axis, size in labels.copied)
    alone = {axis for axis, _ in copied}
    shape = tuple(1 if i in alone else n for i, n in enumerate((*(1,) * missing, *tensor.shape)))
    return Operand(tuple(align_right(a, rank) for a in labels.arrays), shape, copied)


def elementwise(call: Call) -> Labels:
    """Operands meet element by element, with broadcasting."""
    rank = call.output.ndim if isinstance(call.output, torch.Tensor) else max(t.ndim for t in tensors_in(call.output))
    tensors = list(tensors_in(call.arguments))
    arrays = call.relations.join([operand_of(t, rank) for t in tensors]) if tensors else ()
    found = [labels_of(t) for t in tensors]
    scale, factor = _scaling(call.name, found, rank)
    return Labels(arrays, scale, all(t.is_parameter for t in found), factor=factor)


def _scaling(name: str, operands: list[Labels], rank: int) -> tuple[tuple[Ints, ...] | None, Ints | None]:
    """Returns the labels whose scaling scales the output (see `Labels.scale`): sums need those of all operands."""
    if name in ("add", "sub") and len(operands) == 2:
        scales = [t.scale for t in operands if t.scale is not None]
        if len(scales) < 2 or sum(map(len, scales)) > MOST_SCALED:
            return None, None
        return tuple(align_right(a, rank) for s in scales for a in s), None
    if name in ("mul", "div", "neg", "clone", "contiguous"):
        scaled = [t for t in operands if t.arrays or t.scaling]
        if len(scaled) == 1:
            scale = scaled[0].scale
            return (None if scale is None else tuple(align_right(a, rank) for a in scale)), scaled[0].factor
    return None, None
