"""The layers that take the time of a model: which ones a forward pass uses, and the time of each at many widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.cost.latency import call, evaluating

Floats = NDArray[np.float64]

FRACTIONS = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1)
"""The fractions of its widths at which a layer is timed."""
ALIGNED = 16
"""Kernels are fastest at multiples of this; half of it and anything else may cost more."""
OFFSETS = {8: 8, 1: 3}
"""How far below a multiple of 16 a width of each less aligned class is timed."""
ROUNDS = 10
"""How often a layer is timed. The fastest pass counts: whatever else the machine does can only add to it."""


class Timer(Protocol):
    """Measures models on the same inputs, in seconds per pass, round by round, as `sample_latency` does."""

    def __call__(self, models: Mapping[str, nn.Module], inputs: Any, *, rounds: int) -> dict[str, list[float]]: ...


@dataclass(frozen=True)
class Shape:
    """What a layer does, as far as its time goes: `positions` is the shape of its input without the channels.

    `rows` and `columns` are those of its weight, `options` the arguments of a convolution (kernel, stride, padding,
    dilation), none for a linear layer.
    """

    operator: str
    positions: tuple[int, ...]
    rows: int
    columns: int
    groups: int
    options: tuple[Any, ...]
    dtype: str

    @property
    def is_depthwise(self) -> bool:
        """Whether each group reads a single channel, so that there are fewer groups when channels go."""
        return self.groups > 1 and self.columns == 1

    @property
    def unit(self) -> int:
        """What the number of rows is a multiple of."""
        return self.rows // self.groups if self.is_depthwise else self.groups

    def build(self, rows: int, columns: int, device: torch.device) -> tuple[nn.Module, Tensor]:
        """Returns a layer with so many rows and columns, and an input for it."""
        dtype = getattr(torch, self.dtype)
        if self.operator == "linear":
            x = torch.randn(*self.positions, columns, device=device).to(dtype)
            return nn.Linear(columns, rows, device=device, dtype=dtype), x
        groups = rows * self.groups // self.rows if self.is_depthwise else self.groups
        make = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}[self.operator]
        kernel, stride, padding, dilation = self.options
        layer = make(columns * groups, rows, kernel, stride, padding, dilation, groups, device=device, dtype=dtype)
        batch, *space = self.positions
        return layer, torch.randn(batch, columns * groups, *space, device=device).to(dtype)


@dataclass(frozen=True)
class Use:
    """One use of the parameter `weight`: the layer's shape, its MACs, and how many numbers it reads and writes."""

    weight: str
    shape: Shape
    macs: int
    reads: int
    writes: int


@dataclass(frozen=True)
class Grid:
    """Seconds of a layer at some numbers of rows and columns (both ascending), never less for more of either.

    `penalties` are the factors for rows, and for columns, whose number is an odd multiple of 8, and no multiple of 8.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    penalties: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 1.0), (1.0, 1.0))

    def at(self, rows: Floats, columns: Floats) -> Floats:
        """Returns the seconds of layers of so many rows and columns each, bilinear between what was measured."""
        along = np.stack([np.interp(rows, self.rows, times) for times in np.array(self.seconds).T])
        place = np.interp(columns, self.columns, np.arange(len(self.columns)))
        low = np.floor(place).astype(np.int64)
        high = np.minimum(low + 1, len(self.columns) - 1)
        each = np.arange(rows.size)
        result = along[low, each] * (1 - place + low) + along[high, each] * (place - low)
        for size, (half, ragged) in zip((rows, columns), self.penalties, strict=True):
            result = result * np.where(size % ALIGNED == 0, 1.0, np.where(size % (ALIGNED // 2) == 0, half, ragged))
        return result


def uses_of(model: nn.Module, inputs: Any) -> list[Use]:
    """Returns the uses of linear layers and convolutions, in order, in one forward pass in eval mode.

    Weights that are computed, or of which a part is used, are not seen.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    seen = _Seen(names)
    with evaluating(model), torch.inference_mode(), seen:
        call(model, inputs)
    return seen.uses


class _Seen(TorchFunctionMode):
    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self.uses: list[Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _OPERATORS:
            given: dict[str, Any] = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
            if id(given["weight"]) in self._names:
                self.uses.append(_use(_OPERATORS[func], given, output, self._names[id(given["weight"])]))
        return output


_OPERATORS: dict[Any, str] = {F.linear: "linear", F.conv1d: "conv1d", F.conv2d: "conv2d", F.conv3d: "conv3d"}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def _use(operator: str, given: Mapping[str, Any], output: Tensor, name: str) -> Use:
    x, weight = given["input"], given["weight"]
    rows, columns, *kernel = weight.shape
    options: tuple[Any, ...] = ()
    positions = tuple(x.shape[:-1])
    if operator != "linear":
        x = x if x.ndim == weight.ndim else x[None]
        positions = (x.shape[0], *x.shape[2:])
        defaults = {"stride": 1, "padding": 0, "dilation": 1}
        settings = (given.get(k, v) for k, v in defaults.items())
        options = (tuple(kernel), *(v if isinstance(v, int | str) else tuple(v) for v in settings))
    groups = int(given.get("groups", 1))
    shape = Shape(operator, positions, rows, columns, groups, options, str(weight.dtype).removeprefix("torch."))
    return Use(name, shape, output.numel() * columns * math.prod(kernel), x.numel(), output.numel())


def time_layer(shape: Shape, device: torch.device, timer: Timer, *, rows: bool, columns: bool) -> Grid:
    """Returns the seconds of a layer on a grid of those of its widths that may change.

    A layer that noise made slower than one with more rows or columns has the time of that one.
    """

    def seconds(height: int, width: int) -> float:
        layer, x = shape.build(height, width, device)
        return min(timer({"layer": layer}, x, rounds=ROUNDS)["layer"])

    heights = _widths(shape.rows, shape.unit) if rows else [shape.rows]
    widths = _widths(shape.columns, 1) if columns else [shape.columns]
    heights, found = _down_to_zero(heights, np.array([[seconds(h, w) for w in widths] for h in heights]))
    widths, across = _down_to_zero(widths, found.T)
    for axis in (0, 1):
        across = np.flip(np.minimum.accumulate(np.flip(across, axis), axis), axis)
    smooth = Grid(tuple(heights), tuple(widths), tuple(map(tuple, across.T.tolist())))

    def penalties(size: int, varies: bool, at: Callable[[int], tuple[int, int]]) -> tuple[float, float]:
        """Returns the median factor of each less aligned class, with the other width as it is."""
        regular = varies and size >= 4 * ALIGNED and size % ALIGNED == 0  # else no width was timed as an aligned one
        result = [1.0, 1.0]
        for i, offset in enumerate(OFFSETS.values()):
            places = [at(w - offset) for w in _widths(size, 1) if w - offset >= ALIGNED] if regular else []
            factors = [seconds(*p) / float(smooth.at(*np.array(p, np.float64)[:, None])[0]) for p in places]
            result[i] = max(1.0, float(np.median(factors))) if factors else 1.0
        return result[0], result[1]

    by_rows = penalties(shape.rows, rows and shape.unit == 1, lambda w: (w, shape.columns))
    by_columns = penalties(shape.columns, columns, lambda w: (shape.rows, w))
    return replace(smooth, penalties=(by_rows, by_columns))


def _down_to_zero(sizes: list[int], seconds: Floats) -> tuple[list[int], Floats]:
    """Returns sizes and their seconds (a row for each) with a size of 0 before them, on the line through the first two.

    It is there for widths below the least that was timed.
    """
    if len(sizes) < 2:
        return sizes, seconds
    slope = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
    return [0, *sizes], np.concatenate([np.maximum(0, seconds[0] - slope * sizes[0])[None], seconds])


def _widths(size: int, unit: int) -> list[int]:
    """Returns the widths at which to time, multiples of the unit, and of 16 where there are enough."""
    unit = math.lcm(unit, ALIGNED) if size >= 4 * math.lcm(unit, ALIGNED) else unit
    return sorted({*(min(size, max(unit, round(f * size / unit) * unit)) for f in FRACTIONS), size})
