"""Integers that remember where they came from, so that the trace learns what decides the size of each axis.

While a model is traced, the integer attributes of its modules and of their configs, and the sizes read from labelled
tensors, are `Size` objects: ordinary integers for every user of theirs, which carry an expression through arithmetic.
When one arrives as a shape argument, the expression tells which attribute must be changed after a cut.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from secateur.graph.labels import Ints

TORCH = torch.__file__.rsplit("/", 1)[0] + "/"


@dataclass(frozen=True)
class FromAttribute:
    """The integer attribute, of this `value`, found by following `path` from the module at path `module`."""

    module: str
    path: tuple[str | int, ...]
    value: int


@dataclass(frozen=True, eq=False)
class RawExtent:
    """A size read from labels (R x W): survivors per row (`width`), rows not empty (`rows`), all survivors (`count`).

    The size is that number divided by `divisor` (a batch, where a dimension holds batch x heads).
    """

    labels: Ints
    kind: Literal["width", "rows", "count"]
    divisor: int = 1

    def __eq__(self, other: object) -> bool:
        """Equal when both read the same labels in the same way."""
        if not isinstance(other, RawExtent):
            return NotImplemented
        alike = self.kind == other.kind and self.divisor == other.divisor
        return alike and np.array_equal(self.labels, other.labels)

    def __hash__(self) -> int:
        return hash((self.kind, self.divisor, self.labels.shape))

    @property
    def traced_size(self) -> int:
        """The size in the trace, where nothing is removed."""
        rows, width = self.labels.shape
        return {"width": width, "rows": rows, "count": rows * width}[self.kind] // self.divisor


@dataclass(frozen=True)
class Product:
    """left x right."""

    left: Expression
    right: Expression


@dataclass(frozen=True)
class Quotient:
    """left // right."""

    left: Expression
    right: Expression


@dataclass(frozen=True)
class Sum:
    """left + sign x right."""

    left: Expression
    right: Expression
    sign: Literal[1, -1]


Expression = FromAttribute | RawExtent | Product | Quotient | Sum | int
Leaf = FromAttribute | RawExtent


def leaves_of(expression: Expression) -> Iterator[Leaf]:
    """Yields the attributes and extents that an expression is computed from."""
    pending = [expression]
    while pending:
        current = pending.pop()
        if isinstance(current, FromAttribute | RawExtent):
            yield current
        elif not isinstance(current, int):
            pending += [current.right, current.left]


class Observer(Protocol):
    """What wants to know what the model does with sizes."""

    def compare(self, left: Expression, right: Expression, *, equal: bool) -> None:
        """Two sizes were found equal, or different."""

    def number(self, expression: Expression) -> None:
        """A size went into arithmetic as a number: the function depends on its value."""

    def remainder(self, expression: Expression, value: int) -> None:
        """A size was divided by another, and this was left."""


class Size(int):
    """An integer with the `expression` that it was computed from."""

    expression: Expression
    observer: Observer

    def __new__(cls, value: int, expression: Expression, observer: Observer) -> Size:
        size = super().__new__(cls, value)
        size.expression = expression
        size.observer = observer
        return size

    def _with(self, value: int, expression: Expression) -> Size:
        return Size(value, expression, self.observer)

    def _compared(self) -> int:
        """Returns the number for a comparison; torch's own checks of its arguments decide nothing."""
        return int(self) if sys._getframe(2).f_code.co_filename.startswith(TORCH) else self._plain()

    def _plain(self) -> int:
        """Returns the number for arithmetic that is not followed: the size must then keep its value."""
        self.observer.number(self.expression)
        return int(self)

    def __mul__(self, other: Any) -> Any:
        if type(other) not in (int, Size):
            return self._plain() * other
        return self._with(int(self) * int(other), product(self.expression, expression_of(other)))

    def __rmul__(self, other: Any) -> Any:
        if type(other) is not int:
            return other * self._plain()
        return self._with(other * int(self), product(other, self.expression))

    def __floordiv__(self, other: Any) -> Any:
        if type(other) not in (int, Size):
            return self._plain() // other
        return self._with(int(self) // int(other), Quotient(self.expression, expression_of(other)))

    def __rfloordiv__(self, other: Any) -> Any:
        if type(other) is not int:
            return other // self._plain()
        return self._with(other // int(self), Quotient(other, self.expression))

    def __add__(self, other: Any) -> Any:
        if type(other) not in (int, Size):
            return self._plain() + other
        return self._with(int(self) + int(other), Sum(self.expression, expression_of(other), 1))

    def __radd__(self, other: Any) -> Any:
        if type(other) is not int:
            return other + self._plain()
        return self._with(other + int(self), Sum(other, self.expression, 1))

    def __sub__(self, other: Any) -> Any:
        if type(other) not in (int, Size):
            return self._plain() - other
        return self._with(int(self) - int(other), Sum(self.expression, expression_of(other), -1))

    def __rsub__(self, other: Any) -> Any:
        if type(other) is not int:
            return other - self._plain()
        return self._with(other - int(self), Sum(other, self.expression, -1))

    def __eq__(self, other: object) -> bool:
        equal = int(self) == (int(other) if isinstance(other, Size) else other)
        if isinstance(other, Size):
            self.observer.compare(self.expression, other.expression, equal=equal)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __lt__(self, other: Any) -> bool:
        return self._compared() < other

    def __le__(self, other: Any) -> bool:
        return self._compared() <= other

    def __gt__(self, other: Any) -> bool:
        return self._compared() > other

    def __ge__(self, other: Any) -> bool:
        return self._compared() >= other

    def __mod__(self, other: Any) -> Any:
        remainder = int(self) % int(other)
        self.observer.remainder(self.expression, remainder)
        return remainder

    def __rmod__(self, other: Any) -> Any:
        return other % self._plain()

    def __divmod__(self, other: Any) -> Any:
        return divmod(self._plain(), other)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        if modulo is None and isinstance(other, float):
            return Power(int(self) ** other, self, other)
        return pow(self._plain(), other, modulo)

    def __truediv__(self, other: Any) -> Any:
        return Power(float.__add__(0.0, int(self)), self, 1.0) / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / Power(float.__add__(0.0, int(self)), self, 1.0)

    def __float__(self) -> float:
        return float(self._plain())

    def __deepcopy__(self, memo: dict[int, Any]) -> Size:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


class Power(float):
    """A multiple of a size to some power, as in `head_dim ** -0.5`.

    Where it scales a tensor, weights can make up for its change.
    """

    base: Size
    exponent: float

    def __new__(cls, value: float, base: Size, exponent: float) -> Power:
        power = super().__new__(cls, value)
        power.base = base
        power.exponent = exponent
        return power

    def plain(self) -> float:
        """Returns the number for arithmetic that is not followed: the size must then keep its value."""
        self.base.observer.number(self.base.expression)
        return self._value()

    def _value(self) -> float:
        return float.__add__(self, 0.0)

    def _times(self, value: float, exponent: float) -> Power:
        return Power(value, self.base, exponent)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return NotImplemented
        return self._times(self._value() * other, self.exponent) if _is_number(other) else self.plain() * other

    def __rmul__(self, other: Any) -> Any:
        return self._times(other * self._value(), self.exponent) if _is_number(other) else other * self.plain()

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return NotImplemented
        return self._times(self._value() / other, self.exponent) if _is_number(other) else self.plain() / other

    def __rtruediv__(self, other: Any) -> Any:
        return self._times(other / self._value(), -self.exponent) if _is_number(other) else other / self.plain()

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return (
            self._times(self._value() ** other, self.exponent * other) if _is_number(other) else self.plain() ** other
        )

    def __neg__(self) -> Power:
        return self._times(-self._value(), self.exponent)

    def __add__(self, other: Any) -> Any:
        return self.plain() + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self.plain() - other

    def __rsub__(self, other: Any) -> Any:
        return other - self.plain()

    def __lt__(self, other: Any) -> bool:
        return self.plain() < other

    def __le__(self, other: Any) -> bool:
        return self.plain() <= other

    def __gt__(self, other: Any) -> bool:
        return self.plain() > other

    def __ge__(self, other: Any) -> bool:
        return self.plain() >= other

    def __float__(self) -> float:
        return self.plain()

    def __int__(self) -> int:
        return int(self.plain())

    __trunc__ = __int__

    def __floor__(self) -> int:
        return math.floor(self.plain())

    def __ceil__(self) -> int:
        return math.ceil(self.plain())

    def __round__(self, digits: Any = None) -> Any:
        return round(self.plain(), digits)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def as_float(value: Any) -> float:
    """Returns what `float` does, but follows a size."""
    return value / 1 if isinstance(value, Size) else value if isinstance(value, Power) else float(value)


@contextmanager
def followed_roots() -> Iterator[None]:
    """Lets `math.sqrt` follow sizes, as in `scores / math.sqrt(head_dim)`; other arguments get the usual result."""
    usual = math.sqrt

    def root(value: Any, /) -> float:
        return value**0.5 if isinstance(value, Size | Power) else usual(value)

    math.sqrt = root
    try:
        yield
    finally:
        math.sqrt = usual


def product(left: Expression, right: Expression) -> Expression:
    """Returns left x right with a plain integer, if there is one, on the left and dropped when it is 1."""
    if isinstance(right, int):
        left, right = right, left
    return right if left == 1 else Product(left, right)


def expression_of(value: int, observer: Observer | None = None) -> Expression:
    """Returns the expression of a `Size`, or the plain integer itself.

    With an `observer`, a size that another one watches (a library kept it from an earlier trace) is a plain integer.
    """
    if isinstance(value, Size) and (observer is None or value.observer is observer):
        return value.expression
    return int(value)


def _holders(model: nn.Module) -> Iterator[tuple[str, tuple[str | int, ...], dict[str, Any]]]:
    """Yields module path, path of the holder inside the module, and the attribute dictionary of each holder once.

    A holder is a module, or a plain object with attributes that a module keeps (a Hugging Face config, say).
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        yield name, (), vars(module)
        for key, value in list(vars(module).items()):
            if type(value) in _WITHOUT_ATTRIBUTES or not hasattr(value, "__dict__"):
                continue
            plain = not isinstance(value, (nn.Module, torch.Tensor, type)) and not callable(value)
            if plain and id(value) not in seen:
                seen.add(id(value))
                yield name, (key,), vars(value)


_WITHOUT_ATTRIBUTES = frozenset((int, float, str, bool, type(None), tuple, list, set, dict, OrderedDict))


def install(model: nn.Module, observer: Observer) -> None:
    """Replaces the integer attributes of `model` (a throw-away copy), also those in tuples and lists, by `Size`s."""
    for name, holder, attributes in _holders(model):
        for key, value in list(attributes.items()):
            if not isinstance(key, str) or key[:1] == "_":
                continue
            path = (*holder, key)
            if type(value) is int:
                attributes[key] = Size(value, FromAttribute(name, path, value), observer)
            elif type(value) in (tuple, list, torch.Size) and value and all(type(v) is int for v in value):
                sizes = [Size(v, FromAttribute(name, (*path, i), v), observer) for i, v in enumerate(value)]
                attributes[key] = type(value)(sizes)
