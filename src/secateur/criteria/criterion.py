"""What a criterion is, and the registry that finds them by name.

Most criteria give every element of a weight a saliency; `secateur.score` adds these up over all that goes with a
channel. One more such criterion is a formula, and the statistic of the loss that the formula needs, if any:

    >>> from secateur.criteria import ByChannel, Saliency, gradient_sum, layer_inputs, register
    >>> cubic = Saliency("cubic", "Σ|w|³", lambda weight: weight.abs() ** 3)
    >>> slope = Saliency("slope", "Σ|g|", lambda weight, gradient: gradient.abs(), statistic=gradient_sum)

Every other criterion is a function from a `Subject` to one value per channel. This one asks how much of what a layer
reads is constant; channels that no layer reads have 0:

    >>> def constant_part(subject):
    ...     def on(place):
    ...         reads = layers.get(place.name, ()) if place.role == "in" else ()
    ...         return sum(read.inputs.mean.square().sum((0, 2)).cpu().numpy() for read in reads) if reads else None
    ...     layers = subject.statistic(layer_inputs).values
    ...     return subject.footprints.mean([on(place) for place in subject.footprints.places])
    >>> constant = ByChannel("constant", "(mean input)²", constant_part, needs_batches=True)

Give any of them to `secateur.score` as it is, or call `register(cubic)` to have it found by its name everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.criteria.calibration import Calibration, M, Source, Statistic
from secateur.criteria.footprints import Footprints, check_finite
from secateur.errors import InputError, unknown_name
from secateur.graph.network import Network

BLOCK = 2**18
"""Elements of a weight whose saliency is computed at a time on a CPU."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What a criterion looks at: a network, which channel takes what of its tensors, statistics, and a seed.

    `footprints.tensors` are the scored tensors by name; `footprints.places` tells for each of their scored axes which
    channel takes which index; `footprints.mean` makes values per channel of values per index.
    """

    network: Network
    footprints: Footprints
    calibration: Source | None = None
    seed: int = 0

    def statistic(self, kind: Callable[[Calibration], M]) -> M:
        """Returns a statistic of the calibration batches, such as `gradient_sum` or `layer_inputs`.

        Raises InputError if there are no batches, or none that can be used.
        """
        if self.calibration is None:
            raise InputError(f"{_name_of(kind)} needs calibration batches: the criterion must have needs_batches=True")
        return self.calibration.statistic(kind)


@dataclass(frozen=True)
class Saliency:
    """A criterion that gives each element of a weight a value; a channel has the mean over its axes of their sums.

    `formula(weight)`, or `formula(weight, statistic)` if there is a statistic, returns the saliency of every element:
    same shape, float32 or wider, not NaN, larger for what matters more. The formula must treat elements alike and by
    themselves, because the library, not the criterion, knows which of them belong to one channel.
    """

    name: str
    about: str
    formula: Callable[..., Tensor]
    statistic: Callable[[Calibration], Statistic] | None = None
    normalize: ClassVar[bool] = True

    @property
    def needs_batches(self) -> bool:
        """Whether the criterion looks at samples."""
        return self.statistic is not None

    def values(self, subject: Subject) -> NDArray[np.float64]:
        """Returns one value per channel."""
        statistic = self._known(subject)
        sums: list[NDArray[np.float64]] = []
        for name, tensor in subject.footprints.tensors.items():
            dims = subject.footprints.dims[name]
            for local in self._slice_sums(name, tensor.detach(), statistic.get(name), dims):
                if not bool(torch.isfinite(local).all()):
                    check_finite({name: tensor})
                    raise InputError(f"criterion {self.name!r} gives NaN or infinite values on {name!r}")
                sums.append(local.cpu().numpy())
        return subject.footprints.mean(sums)

    def shows_all(self) -> bool:
        """Whether NaN and infinite elements of a weight give a saliency like that: then its sums tell of them."""
        if self.statistic is not None:
            return False
        saliency = self.formula(torch.tensor([torch.nan, torch.inf, -torch.inf]))
        return not bool(torch.isfinite(saliency).any())

    def _known(self, subject: Subject) -> dict[str, Tensor]:
        """Returns the statistic by tensor (nothing if there is none). Raises InputError if it is no use."""
        if self.statistic is None or not subject.footprints.tensors:
            return {}
        known = subject.statistic(self.statistic).values
        for name, values in known.items():
            if not bool(torch.isfinite(values).all()):
                raise InputError(f"criterion {self.name!r}: gradients of {name!r} are NaN or infinite")
        if not any(bool(values.any()) for values in known.values()):
            raise InputError(f"criterion {self.name!r}: all gradients are zero; does the loss depend on the weights?")
        return known

    def _slice_sums(self, name: str, tensor: Tensor, statistic: Tensor | None, dims: tuple[int, ...]) -> list[Tensor]:
        """Returns for each of `dims` the saliency summed over all other dimensions, float64.

        On a CPU the saliency is made a few rows at a time, so that it stays in the cache and needs no fresh memory.
        """
        totals = [torch.zeros(tensor.shape[dim], dtype=torch.float64, device=tensor.device) for dim in dims]
        rows = tensor.shape[0] if tensor.is_cuda else max(1, BLOCK * tensor.shape[0] // max(1, tensor.numel()))
        for start in range(0, tensor.shape[0], rows):
            part = tensor[start : start + rows]
            known = () if statistic is None else (statistic[start : start + rows],)
            saliency = self.formula(part.to(torch.promote_types(part.dtype, torch.float32)), *known)
            if saliency.shape != part.shape:
                raise InputError(
                    f"criterion {self.name!r} gives {tuple(saliency.shape)} values for {tuple(part.shape)} elements "
                    f"of {name!r}; its formula must return one for each"
                )
            for dim, total in zip(dims, totals, strict=True):
                # rows first: adding up whole rows is several times faster than gathering from each
                local, kept = (saliency, 0) if dim == 0 else (saliency.sum(0), dim - 1)
                others = [other for other in range(local.dim()) if other != kept]
                local = local.sum(others) if others else local
                (total[start : start + rows] if dim == 0 else total).add_(local)
        return totals


@dataclass(frozen=True)
class ByChannel:
    """A criterion that gives each channel a value: `values(subject)`, [num_channels], larger for what matters more.

    `normalize`: whether allocation divides the values by the mean of their group; False if they mean the same in every
    group. `needs_batches`: whether `values` asks the subject for statistics.
    """

    name: str
    about: str
    values: Callable[[Subject], NDArray[np.float64]]
    normalize: bool = True
    needs_batches: bool = False


Criterion = Saliency | ByChannel

CRITERIA: dict[str, Criterion] = {}
"""All criteria by name. Change it with `register` only."""


def register(criterion: Criterion) -> Criterion:
    """Adds a criterion to the registry and returns it. Raises InputError if its name is taken."""
    if criterion.name in CRITERIA:
        raise InputError(f"a criterion named {criterion.name!r} is registered already; choose another name")
    CRITERIA[criterion.name] = criterion
    return criterion


def find_criterion(name: str) -> Criterion:
    """Returns the criterion of that name. Raises InputError, with the nearest names, if there is none."""
    if name not in CRITERIA:
        raise unknown_name("criterion", name, CRITERIA)
    return CRITERIA[name]


def _name_of(kind: Callable[..., object]) -> str:
    return getattr(kind, "__name__", type(kind).__name__)
