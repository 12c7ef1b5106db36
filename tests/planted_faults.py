"""One fault at a time, planted into rules and engine: what is made wrong, and the network that meets it."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from secateur.graph.labels import Labels, align_blocks, labels_of, regroup, tensors_in, varying
from secateur.graph.relations import Operand, Relations
from secateur.graph.rules import RULES, Call, Rule, elementwise
from secateur.graph.sizes import Expression, FromAttribute, Power, Quotient, RawExtent

Result = Labels | tuple[Labels, ...] | None
Alter = Callable[[Any], Any]


@dataclass(frozen=True)
class Fault:
    """What is wrong, on which network it shows, and what is asked to be removed there.

    `place` is an operator, whose rule is made wrong, or a function of the engine as `module:name` inside `secateur`;
    `alter` makes the wrong one of the right one.
    """

    place: str
    alter: Alter
    subject: str
    request: Mapping[str, Any] = field(default_factory=dict)


def plant(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts the fault in; returns a list that grows with every use of it."""
    used: list[str] = []

    def counted(right: Any) -> Any:
        wrong = fault.alter(right)

        def call(*args: Any, **kwargs: Any) -> Any:
            used.append(fault.place)
            return wrong(*args, **kwargs)

        return call

    if ":" in fault.place:
        holder, _, name = fault.place.replace(":", ".").rpartition(".")
        owner = pkgutil.resolve_name(f"secateur.{holder}")
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
        return used
    right = RULES.get(fault.place, elementwise)
    for name in [n for n, r in RULES.items() if r is right] or [fault.place]:
        monkeypatch.setitem(RULES, name, counted(right))
    return used


# how a rule is made wrong


def says_nothing(*_: object, **__: object) -> None:
    """A relation that is forgotten."""


def states(**methods: Callable[..., Any]) -> Alter:
    """Returns what makes a rule state its relations through `methods` instead of through those of `Relations`."""

    def alter(right: Rule) -> Rule:
        def wrong(call: Call) -> Result:
            with patch.multiple(call.relations, **methods):
                return right(call)

        return wrong

    return alter


def forgets(*methods: str) -> Alter:
    """Returns what makes a rule forget some of the relations that it should state."""
    return states(**dict.fromkeys(methods, says_nothing))


def unrelated(operands: list[Operand]) -> tuple[np.ndarray, ...]:
    """A join that relates nothing: of components along the same dimensions the first stands for all."""
    found: list[np.ndarray] = []
    for array in (a for o in operands for a in o.arrays if varying(a)):
        if not any(varying(array) & varying(other) for other in found):
            found.append(array)
    return tuple(found)


UNTIED = states(join=unrelated)


def always(result: object) -> Alter:
    """Returns what makes a function return `result`, whatever it is given."""
    return lambda _: lambda *_, **__: result


def instead(wrong: Callable[..., Any]) -> Alter:
    """Returns what puts another function in place of the right one."""
    return lambda _: wrong


def after(change: Callable[[Labels], Labels]) -> Alter:
    """Returns what makes a rule yield changed labels."""

    def alter(right: Rule) -> Rule:
        def wrong(call: Call) -> Result:
            result = right(call)
            return tuple(map(change, result)) if isinstance(result, tuple) else result and change(result)

        return wrong

    return alter


def given(**arguments: Any) -> Alter:
    """Returns what makes a rule read other arguments than those of the call."""
    return lambda right: lambda call: right(replace(call, arguments={**call.arguments, **arguments}))


def shift(labels: Labels) -> Labels:
    """Labels one position further along the last dimension in which they vary."""
    return labels.map(lambda a: np.roll(a, 1, max(varying(a), default=0)))


def reverse(labels: Labels) -> Labels:
    """Labels from the last to the first along the last dimension in which they vary."""
    return labels.map(lambda a: np.flip(a, max(varying(a), default=0)))


SHIFTED, REVERSED = after(shift), after(reverse)
CONSTANT = always(Labels())


def swapped_operands(right: Rule) -> Rule:
    """A concatenation in the wrong order."""
    return lambda call: right(replace(call, arguments={**call.arguments, "tensors": call["tensors"][::-1]}))


def plain_view(call: Call) -> Labels:
    """A view that moves labels rightly and says nothing about fibres, order or sizes."""
    old, new = call.shape("self"), tuple(call.output.shape)
    return call.labels("self").map(lambda a: regroup(a, old, new, align_blocks(old, new)))


def as_it_was(call: Call) -> Labels:
    """A change of layout that leaves labels where they stood."""
    return call.labels("self").map(lambda a: a)


def behind(call: Call) -> Labels:
    """An unsqueeze that puts the new dimension last."""
    return call.labels("self").map(lambda a: a[..., None])


def first_operand_alone(call: Call) -> Labels:
    """An elementwise operation that does not tie its operands."""
    rank = call.output.ndim
    labelled = [t for t in tensors_in(call.arguments) if labels_of(t).arrays]
    labels = labels_of(labelled[0])
    return Labels(tuple(a.reshape((1,) * (rank - a.ndim) + a.shape) for a in labels.arrays))


def value_alone(call: Call) -> Labels:
    """An attention that takes its output for its values: queries and keys do not meet, and there are no heads."""
    return Labels(call.labels("value").arrays)


def tiled(call: Call) -> Labels:
    """repeat_interleave taken for repeat."""
    axis, times = call["dim"], call["repeats"]
    return call.labels("self").map(
        lambda a: np.tile(a, [times if i == axis and a.shape[i] > 1 else 1 for i in range(a.ndim)])
    )


def interleaved(call: Call) -> Labels:
    """repeat taken for repeat_interleave."""
    times = list(call["repeats"])
    return call.labels("self").map(lambda a: np.repeat(a, times[-1], -1) if a.shape[-1] > 1 else a)


def any_number(call: Call) -> Labels:
    """A row of numbers taken for one that may have any length."""
    n = call.output.numel()
    labels = call.relations.new_labels(n)
    call.relations.require(call.expression(n), RawExtent(labels[None], "count"))
    return Labels((labels,))


def drops(arrays: Any, axes: Any) -> tuple[np.ndarray, ...]:
    """A reduction that forgets what is left of a joint dimension."""
    return tuple(a for a in arrays if not varying(a) & set(axes))


# how a function of the engine is made wrong

NOTHING = always(None)
TRUE = always(True)


def keeps_argument(right: Any) -> Any:
    """A step that hands on what it was given."""
    return lambda *args, **_: args[-1]


def without_kernel(right: Any) -> Any:
    """A cost that forgets how often each point of its space is computed."""
    return lambda self, arrays, shape, times=1: right(self, arrays, shape)


def squared(right: Any) -> Any:
    """A root that is taken for the size itself."""
    return lambda self, expression, exponent, weights: right(self, expression, 2 * exponent, weights)


def same_sign(right: Any) -> Any:
    """A reciprocal that keeps its exponent."""
    return lambda self, other: Power(other / float.__add__(self, 0.0), self.base, self.exponent)


def sole_sort(right: Any) -> Any:
    """A link of heads that looks at the first of several sorts alone."""

    def wrong(self: Any, extent: RawExtent) -> Any:
        labels = extent.labels[:, :1] if extent.kind == "rows" else extent.labels
        return right(self, RawExtent(labels, extent.kind, extent.divisor))

    return wrong


def only_outer(self: Relations, outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """A merged dimension in which an index does not go with what lies along the inner one."""
    shape = np.broadcast_shapes(outer.shape, inner.shape)
    joint = self.new_labels(int(np.prod(shape))).reshape(shape)
    rows = joint.reshape(outer.size, -1)
    self.add_fibres(rows)
    self.own(outer.ravel(), rows)
    return joint


def all_uniform(right: Any) -> Any:
    """Links of which none conflicts with another."""

    def wrong(network: Any) -> Any:
        uniform, composite, refused = right(network)
        return uniform + refused, composite, []

    return wrong


def nobody_is_protected(right: Any) -> Any:
    """An allocation that ignores of what two must stay."""
    return lambda network, scores: np.zeros_like(right(network, scores))


def first_run_again(right: Any) -> Any:
    """Decisions by values taken anew in the trace of the cut model."""
    return lambda self: replace(self, decisions=[], next=None)


def quotients_hold(right: Any) -> Any:
    """A view in which n // h beside h is right whatever n becomes."""
    return lambda relations, array, axis, specs: (
        isinstance(specs[axis], Quotient) or right(relations, array, axis, specs)
    )


def sides_swapped(right: Any) -> Any:
    """The two sides of a convolution's weight, one for the other."""
    return lambda self, call: right(self, call)[::-1]


def copies_are_free(right: Any) -> Any:
    """An expansion to a constant size that is taken for one to whatever size it meets."""

    def wrong(call: Call, sizes: Any) -> tuple[tuple[int, Expression | None], ...]:
        before = (1,) * (call.output.ndim - call["self"].ndim) + call.shape("self")
        return tuple((i, None) for i, n in enumerate(before) if n == 1 < call.output.shape[i])

    return wrong


def attributes_alone(right: Any) -> Any:
    """Settling in which sizes of two things are not linked."""

    def wrong(self: Any, expression: Expression, extent: RawExtent, *, last: bool) -> bool:
        return isinstance(expression, RawExtent) or right(self, expression, extent, last=last)

    return wrong


def no_attributes(right: Any) -> Any:
    """Settling in which attributes are not set."""

    def wrong(self: Any, expression: Expression, extent: RawExtent, *, last: bool) -> bool:
        return isinstance(expression, FromAttribute) or right(self, expression, extent, last=last)

    return wrong
