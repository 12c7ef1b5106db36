"""Scores from several domains: how to make one value per channel of what each domain says.

`secateur.score` takes batches by domain, `{"photo": batches, "art": batches}`, and one of these ways:

| `combine` | a channel's value |
|---|---|
| `mean` | Σ_d s_d / D |
| `worst` | min_d s_d: a channel stays only if it matters in every domain, so what serves one domain alone goes first |
| `mean_minus_spread` | mean_d s_d - λ · std_d s_d, with λ = 1: of two channels equally useful, the steadier one stays |
| `sign_agreement` | the criterion on gradients g = Σ_d g_d, set to zero where the signs of g_d do not agree |

s_d is the score by domain d, divided by the mean of its group in that domain, so that no domain counts for more because
its gradients are larger (criteria whose values mean the same in every group are taken as they are). D is the number of
domains, std divides by D. Signs of an element agree if |Σ_d sign(g_d)| >= τ · D, with τ = 1 (all of them); this is the
AND-mask of Parascandolo et al., ICLR 2021, on the gradients that a criterion reads, and is for criteria that read
`gradient_sum`. Other λ and τ: `combine=functools.partial(mean_minus_spread, weight=2)`, `combine=SignAgreement(0.5)`.
Any function from [domains, channels] to [channels] will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.criteria.calibration import Calibration, M, Statistic
from secateur.criteria.criterion import Criterion, Subject
from secateur.criteria.footprints import normalized
from secateur.criteria.gradients import gradient_sum
from secateur.errors import InputError, unknown_name

Values = NDArray[np.float64]


def mean(scores: Values) -> Values:
    """Returns the mean over domains: [domains, channels] to [channels]."""
    return scores.mean(axis=0)


def worst(scores: Values) -> Values:
    """Returns the least over domains: [domains, channels] to [channels]."""
    return scores.min(axis=0)


def mean_minus_spread(scores: Values, *, weight: float = 1.0) -> Values:
    """Returns the mean over domains less `weight` times the standard deviation: [domains, channels] to [channels]."""
    return scores.mean(axis=0) - weight * scores.std(axis=0)


@dataclass(frozen=True)
class SignAgreement:
    """Gradients count where |Σ_d sign(g_d)| >= threshold x (number of domains); `threshold` in (0, 1], 1 for all.

    Raises InputError for another threshold.
    """

    threshold: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise InputError(f"the threshold of SignAgreement must lie in (0, 1], found {self.threshold}")


Combination = Callable[[Values], Values] | SignAgreement

COMBINATIONS: Mapping[str, Combination] = {
    "mean": mean,
    "worst": worst,
    "mean_minus_spread": mean_minus_spread,
    "sign_agreement": SignAgreement(),
}
"""The ways to combine domains, by name."""


def find_combination(combine: str | Combination) -> Combination:
    """Returns the combination of that name, or the one given. Raises InputError, with the nearest names."""
    if not isinstance(combine, str):
        return combine
    if combine not in COMBINATIONS:
        raise unknown_name("combination of domains", combine, COMBINATIONS)
    return COMBINATIONS[combine]


def combined(
    criterion: Criterion, subject: Subject, domains: Mapping[str, Calibration], combine: Combination
) -> tuple[Values, bool]:
    """Returns one value per channel from all domains, and whether allocation is still to normalise them."""
    if isinstance(combine, SignAgreement):
        agreeing = replace(subject, calibration=_Agreeing(domains, combine.threshold))
        return criterion.values(agreeing), criterion.normalize
    scores = []
    for name, calibration in domains.items():
        with _blamed_on(name):
            values = criterion.values(replace(subject, calibration=calibration))
        scores.append(normalized(subject.network, values) if criterion.normalize else values)
    return combine(np.stack(scores)), False


@dataclass(frozen=True, eq=False)
class _Agreeing:
    """The gradients of several domains as one statistic, without those on which the domains do not agree."""

    domains: Mapping[str, Calibration]
    threshold: float

    @property
    def num_samples(self) -> int:
        return sum(calibration.num_samples for calibration in self.domains.values())

    def statistic(self, kind: Callable[[Calibration], M]) -> M:
        if kind is not gradient_sum:
            raise InputError(
                f"sign_agreement compares gradients, and this criterion asks for {getattr(kind, '__name__', kind)}; "
                "use a criterion of gradients (taylor, taylor_signed), or combine by mean, worst or mean_minus_spread"
            )
        gradients: list[Statistic] = []
        for domain, calibration in self.domains.items():
            with _blamed_on(domain):
                gradients.append(calibration.statistic(gradient_sum))
        needed = self.threshold * len(gradients)
        agreed = {}
        for name in gradients[0].values:
            stacked = torch.stack([of_domain.values[name] for of_domain in gradients])
            agree = stacked.sign().sum(0).abs() >= needed - 1e-6
            agreed[name] = torch.where(agree, stacked.sum(0), 0.0)
        if not any(bool(values.any()) for values in agreed.values()):
            raise InputError(f"no gradient has one sign in {self.threshold:.0%} of the domains; lower the threshold")
        return cast(M, Statistic(agreed, self.num_samples))


@contextmanager
def _blamed_on(domain: str) -> Iterator[None]:
    """Re-raises an InputError with the name of the domain."""
    try:
        yield
    except InputError as error:
        raise InputError(f"domain {domain!r}: {error}") from error
