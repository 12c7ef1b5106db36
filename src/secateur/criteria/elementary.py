"""Criteria that look at weights and gradients, and those that are made of other criteria."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.criteria.criterion import ByChannel, Criterion, Saliency, Subject, find_criterion, register
from secateur.criteria.footprints import Place, normalized
from secateur.criteria.gradients import gradient_sum, mean_squared_gradient
from secateur.errors import InputError
from secateur.graph.network import STAYS, Ints

register(Saliency("l1", "Σ|w|", torch.abs))

_L2 = Saliency("l2", "Σw², without the square root", torch.square)
register(_L2)

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


def _random(subject: Subject) -> NDArray[np.float64]:
    return np.random.default_rng(subject.seed).random(subject.network.num_channels)


register(ByChannel("random", "uniform in [0, 1), one draw per channel", _random, normalize=False))

_SIGNED = Saliency("taylor_signed", "", lambda weight, gradient: weight * gradient, statistic=gradient_sum)


def _taylor_signed(subject: Subject) -> NDArray[np.float64]:
    """Returns |Σw·g| over all that goes with a channel, divided by the number of its axes.

    The first-order change in loss when the whole channel goes (Molchanov et al., 2019, equation 8 for a set of
    parameters, here as an absolute value instead of a square, which ranks the same): elements that pull in opposite
    directions cancel before the absolute value, where `taylor` takes that of each.
    """
    return np.abs(_SIGNED.values(subject))


register(
    ByChannel(
        "taylor_signed",
        "|Σw·g|, added up over the whole channel before the absolute value",
        _taylor_signed,
        needs_batches=True,
    )
)


def _lamp(subject: Subject) -> NDArray[np.float64]:
    """Returns s / Σ s', the sum over the channels of the group whose s' is not smaller; s is the score by `l2`.

    Layer-adaptive magnitude (Lee et al., ICLR 2021, equation 5), for channels in place of single weights. The largest
    of each group has 1, so that no group is ever emptied, and values compare between groups as they are. Of equal
    channels, the one of lower number goes first.
    """
    values = _L2.values(subject)
    for group in subject.network.groups:
        channels = np.sort(group.channels, axis=None)
        order = channels[np.argsort(values[channels], kind="stable")]
        rest = np.cumsum(values[order][::-1])[::-1]
        values[order] = np.divide(values[order], rest, out=np.zeros(rest.size), where=rest > 0)
    return values


register(ByChannel("lamp", "Σw² as a share of what is left of its group when smaller ones have gone", _lamp, False))


def _fpgm(subject: Subject) -> NDArray[np.float64]:
    """Returns Σ ‖w_k - w_j‖₂, the sum over the other channels j of the group, of the rows w that make channel k.

    Filter pruning via geometric median (He et al., CVPR 2019, equation 6): what lies near the others can be replaced
    by them. Only output sides of weights count; rows are compared with those of the same group in the same weight.
    """
    group_of = np.full(subject.network.num_channels + 1, STAYS, np.int64)
    for number, group in enumerate(subject.network.groups):
        group_of[group.channels] = number
    group_of[-1] = STAYS
    places = subject.footprints.places
    return subject.footprints.mean([_distances(subject, p, group_of) if p.role == "out" else None for p in places])


def _distances(subject: Subject, place: Place, group_of: Ints) -> NDArray[np.float64]:
    """Returns for each index of an axis the sum of distances to the others of its group on that axis."""
    rows = subject.footprints.tensors[place.name].detach().movedim(place.axis.dim, 0).flatten(1).double()
    channels, owners = place.axis.channels, place.axis.owners
    groups = np.where(channels != STAYS, group_of[channels], group_of[owners])
    sums = np.zeros(groups.size)
    for group in np.unique(groups[groups != STAYS]):
        members = np.flatnonzero(groups == group)
        some = rows[torch.from_numpy(members).to(rows.device)]
        sums[members] = torch.cdist(some, some).sum(1).cpu().numpy()
    return sums


register(ByChannel("fpgm", "Σ‖w - w'‖, w' the same of all others in the group", _fpgm))


def rank_mean(criteria: Sequence[str | Criterion]) -> ByChannel:
    """Returns the criterion whose value is the mean of a channel's ranks by several criteria, in (0, 1].

    Ranks run over the whole network, after division by the mean of each group as in allocation; equal values share
    their mean rank, and the largest is 1. So of a single criterion it keeps the order, within groups and between them.

        secateur.score(network, model, rank_mean(["l2", "taylor"]), batches)

    Raises InputError if there is no criterion, or an unknown one.
    """
    parts = [find_criterion(c) if isinstance(c, str) else c for c in criteria]
    if not parts:
        raise InputError("rank_mean needs at least one criterion")

    def values(subject: Subject) -> NDArray[np.float64]:
        found = [(part, part.values(subject)) for part in parts]
        ranked = [_ranks(normalized(subject.network, v) if part.normalize else v) for part, v in found]
        return np.mean(ranked, axis=0)

    names = ", ".join(part.name for part in parts)
    needs_batches = any(part.needs_batches for part in parts)
    return ByChannel(f"rank_mean({names})", f"mean rank by {names}", values, False, needs_batches)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the rank of each value divided by their number; equal ones have their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2) / max(values.size, 1))[inverse]
