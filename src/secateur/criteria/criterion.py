"""The criteria, and the registry that finds them by name.

Most criteria give every element of a weight a saliency; `secateur.score` adds these up over all that goes with a
channel. One more such criterion is a formula, and the statistic of the loss that the formula needs, if any:

    >>> from secateur.criteria import Saliency, gradient_sum, register
    >>> cubic = Saliency("cubic", "Σ|w|³", lambda weight: weight.abs() ** 3)
    >>> slope = Saliency("slope", "Σ|g|", lambda weight, gradient: gradient.abs(), statistic=gradient_sum)

Give it to `secateur.score` as it is, or call `register(cubic)` to have it found by its name everywhere.
A criterion that does not look at the weights at all is a `Draw`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.criteria.gradients import Calibration, Statistic, gradient_sum, mean_squared_gradient
from secateur.errors import InputError, unknown_name


@dataclass(frozen=True)
class Saliency:
    """A criterion that gives each element of a weight a value.

    `formula(weight)`, or `formula(weight, statistic)` if there is a statistic, returns the saliency of every element:
    same shape, float32 or wider, not NaN, larger for what matters more. The formula must treat elements alike and by
    themselves, because the library, not the criterion, knows which of them belong to one channel.
    """

    name: str
    about: str
    formula: Callable[..., Tensor]
    statistic: Callable[[Calibration], Statistic] | None = None
    normalize: ClassVar[bool] = True


@dataclass(frozen=True)
class Draw:
    """A criterion that gives each channel a value without looking at weights: `draw(generator, num_channels)`.

    Its values mean the same in every group, so they are not normalised between groups.
    """

    name: str
    about: str
    draw: Callable[[np.random.Generator, int], NDArray[np.float64]]
    normalize: ClassVar[bool] = False


Criterion = Saliency | Draw

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


register(Saliency("l1", "Σ|w|", torch.abs))

register(Saliency("l2", "Σw², without the square root", torch.square))

# First-order Taylor expansion of the change in loss (Molchanov et al., 2019), of all batches together: gradients
# that cancel between batches do not count.
register(
    Saliency(
        "taylor",
        "Σ|w·g|, g the gradient of the mean loss summed over the batches",
        lambda weight, gradient: (weight * gradient).abs(),
        statistic=gradient_sum,
    )
)

# Optimal brain damage (LeCun et al., 1990) with the diagonal of the empirical Fisher matrix in place of the Hessian's,
# and without the factor 1/2. The mean runs over samples; squaring the gradient of a batch would be another quantity.
register(
    Saliency(
        "hessian",
        "Σw²h, h the mean over samples of the squared gradient of one sample's loss",
        lambda weight, curvature: weight.square() * curvature,
        statistic=mean_squared_gradient,
    )
)

register(Draw("random", "uniform in [0, 1), one draw per channel", lambda generator, count: generator.random(count)))
