"""Statistics of what layers read and give: sums and Gram matrices over all positions of all calibration samples.

Layers are linear and convolution weights, however the model calls them (see `activations.watching`). Several uses of
one weight on equal rows add up; uses of different rows (`nn.MultiheadAttention` calls a third at a time) stay apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from secateur.criteria.activations import Moments, Use, watching
from secateur.criteria.batches import blamed_on, read_batches
from secateur.criteria.calibration import Calibration
from secateur.criteria.gradients import Problem, undisturbed
from secateur.errors import InputError

SAMPLES_PER_PASS = 16
"""Samples in one forward pass."""

T = TypeVar("T")


@dataclass(eq=False)
class Sums:
    """Sums of values and of their squares over positions, in float64; `count` is the number of positions."""

    total: Tensor
    squares: Tensor
    count: int = 0

    @property
    def mean(self) -> Tensor:
        """The mean over positions."""
        return self.total / self.count

    @property
    def energy(self) -> Tensor:
        """The mean square over positions."""
        return self.squares / self.count

    @property
    def variance(self) -> Tensor:
        """The variance over positions, divided by their number."""
        return (self.energy - self.mean.square()).clamp(min=0)

    def add(self, rows: Tensor) -> None:
        """Adds rows [groups, positions, d]."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.count += rows.shape[1]
        self.total += rows.sum(1, dtype=torch.float64).view_as(self.total)
        self.squares += rows.square().sum(1, dtype=torch.float64).view_as(self.squares)


@dataclass(frozen=True, eq=False)
class Activity:
    """What the rows `rows` of a weight read and give.

    `inputs` are [groups, inputs of a group, kernel positions] (one group and one position for linear layers);
    `outputs` [rows], with the bias.
    """

    rows: slice
    inputs: Sums
    outputs: Sums


@dataclass(frozen=True, eq=False)
class Reads:
    """Moments of what the rows `rows` of a weight read: columns are inputs x kernel positions. And has it a bias?"""

    rows: slice
    has_bias: bool
    moments: Moments


@dataclass(frozen=True, eq=False)
class ByWeight(Generic[T]):
    """What was learned of each weight, an entry for each range of rows in use; and from how many samples."""

    values: dict[str, tuple[T, ...]]
    num_samples: int


def layer_inputs(calibration: Calibration) -> ByWeight[Activity]:
    """Returns sums of what each layer among `calibration.tensors` reads and gives: forward passes only.

    Raises InputError for batches that cannot be used, and for layers that read or give NaN.
    """
    found: dict[tuple[str, int, int], Activity] = {}

    def on_use(use: Use) -> Tensor:
        output = use.run()
        activity = found.setdefault((use.name, use.rows.start, use.rows.stop), _no_activity(use))
        for rows in use.parts_of_inputs():
            activity.inputs.add(rows)
        activity.outputs.add(use.outputs(output))
        return output

    num_samples = _run(calibration, on_use, calibration.tensors)
    for (name, *_), activity in found.items():
        _require_finite(name, activity.inputs.squares)
        _require_finite(name, activity.outputs.squares)
    return ByWeight(_by_name(found), num_samples)


def layer_grams(calibration: Calibration) -> ByWeight[Reads]:
    """Returns the moments, Gram matrices included, of what each weight among `calibration.consumers` reads.

    Takes 8 bytes x (columns of the weight)² for each of them. Raises InputError as `layer_inputs` does, and if a
    weight reads fewer rows than its Gram matrix needs to be of full rank.
    """
    found: dict[tuple[str, int, int], Reads] = {}

    def on_use(use: Use) -> Tensor:
        place = (use.name, use.rows.start, use.rows.stop)
        if place not in found:
            weight: Tensor = use.arguments["weight"]
            moments = Moments.zeros(use.groups, weight[0].numel(), weight.device)
            found[place] = Reads(use.rows, use.arguments.get("bias") is not None, moments)
        for rows in use.parts_of_inputs():
            found[place].moments.add(rows)
        return use.run()

    num_samples = _run(calibration, on_use, calibration.consumers)
    for (name, *_), reads in found.items():
        _require_finite(name, reads.moments.gram)
    _require_samples(found, num_samples)
    return ByWeight(_by_name(found), num_samples)


def _run(calibration: Calibration, on_use: Callable[[Use], Tensor], names: Collection[str]) -> int:
    """Runs the model on all batches, calling `on_use` for the tensors named; returns the number of samples."""
    problem = Problem(calibration)
    watched = {name: tensor for name, tensor in problem.tensors.items() if name in names and tensor.dim() > 1}
    num_samples = 0
    with undisturbed(calibration.model):
        for batch in read_batches(calibration.batches, problem.device):
            for part in batch.parts(SAMPLES_PER_PASS):
                with blamed_on(part), watching(watched, on_use):
                    problem.output(problem.tensors, part)
            num_samples += batch.size
    return num_samples


def _by_name(found: Mapping[tuple[str, int, int], T]) -> dict[str, tuple[T, ...]]:
    names = dict.fromkeys(name for name, *_ in found)
    return {name: tuple(value for (other, *_), value in found.items() if other == name) for name in names}


def _no_activity(use: Use) -> Activity:
    weight: Tensor = use.arguments["weight"]
    inputs = _no_sums(use.groups, weight.shape[1], math.prod(weight.shape[2:]), device=weight.device)
    return Activity(use.rows, inputs, _no_sums(weight.shape[0], device=weight.device))


def _no_sums(*shape: int, device: torch.device) -> Sums:
    total, squares = torch.zeros(2, *shape, dtype=torch.float64, device=device)
    return Sums(total, squares)


def _require_finite(name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"the layer of {name!r} reads or gives NaN or infinite values on the calibration batches")


def _require_samples(found: Mapping[tuple[str, int, int], Reads], num_samples: int) -> None:
    """Raises InputError if a Gram matrix is made of fewer rows than it has columns, naming the one that lacks most."""
    needed, said = num_samples, ""
    for (name, *_), reads in found.items():
        columns = reads.moments.total.shape[1]
        each = reads.moments.count / num_samples
        samples = math.ceil((columns + reads.has_bias) / each)
        if samples > needed:
            needed, said = samples, f"{name!r} reads {columns} values at {each:g} positions of a sample"
    if said:
        raise InputError(
            f"too few calibration samples: {said}, so its Gram matrix needs at least {needed} samples; "
            f"{num_samples} were given"
        )
