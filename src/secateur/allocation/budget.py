"""Budgets: how far to climb all ladders so that what remains costs no more than was asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from secateur.allocation.ladders import Ladder
from secateur.errors import PlanError
from secateur.graph.network import Bools, Ints, Network

HALVINGS = 40
"""How often the interval of ratios is halved: to 1e-12, less than one channel of any network."""
UNUSED = 0.005
"""The part of a budget that may stay unused without looking for a better way."""


@dataclass(frozen=True, eq=False)
class Budget:
    """What may remain: at most `limit` by `cost`, which maps a mask from `Network.mask` to a number of `unit`.

    Where fewer survivors may cost more (latency at awkward widths), the budget holds but is used up less well.
    """

    limit: float
    cost: Callable[[Bools], float]
    unit: str


@dataclass(frozen=True, eq=False)
class Ranking:
    """The steps of the ladders (by number) of one scope in the order in which they go, whatever the ratio.

    `owner` says of each step whose it is, `gone` how many channels have gone with it, out of `total`. `ratio` is what
    was set for the scope by name; None: the ratio that is common to all scopes.
    """

    members: tuple[int, ...]
    owner: Ints
    gone: Ints
    total: int
    ratio: float | None

    def counts(self, ratio: float) -> Ints:
        """Returns how many steps of each member to take so that the fraction `ratio` of all channels goes.

        Each ladder is climbed from its bottom, so a larger ratio never keeps more of anything.
        """
        target = self.total - int(self.total * (1 - (ratio if self.ratio is None else self.ratio)) + 1e-9)
        taken = np.searchsorted(self.gone, target, side="right")
        return np.bincount(self.owner[:taken], minlength=len(self.members))


def rank(ladders: Sequence[Ladder], members: Sequence[int], ratio: float | None) -> Ranking:
    """Returns the ranking of some ladders: by score; where scores are equal, all are climbed equally far."""
    mine = [ladders[i] for i in members]
    scores = np.concatenate([k.scores[: k.limit] for k in mine])
    owner = np.concatenate([np.full(k.limit, i) for i, k in enumerate(mine)]).astype(np.int64)
    weights = np.concatenate([np.full(k.limit, k.weight) for k in mine]).astype(np.int64)
    height = np.concatenate([np.arange(1, k.limit + 1) * k.per_step / k.width for k in mine])
    order = np.lexsort((np.arange(scores.size), height, scores))
    total = sum(k.width * k.weight // k.per_step for k in mine)
    return Ranking(tuple(members), owner[order], np.cumsum(weights[order]), total, ratio)


@dataclass(frozen=True, eq=False)
class Climb:
    """All ladders: their rankings, and `allowed`, the numbers of steps (ascending) at which each may be left."""

    network: Network
    ladders: Sequence[Ladder]
    allowed: Sequence[Ints]
    rankings: Sequence[Ranking]

    def counts(self, ratio: float) -> Ints:
        """Returns how many steps of each ladder to take at a common ratio: the next allowed number, or the last."""
        counts = np.zeros(len(self.ladders), np.int64)
        for ranking in self.rankings:
            counts[list(ranking.members)] = ranking.counts(ratio)
        for i, allowed in enumerate(self.allowed):
            counts[i] = allowed[min(int(np.searchsorted(allowed, counts[i])), allowed.size - 1)]
        return counts

    def removed(self, counts: Ints) -> Ints:
        """Returns the channels that go when each ladder is climbed that far."""
        steps = (k.steps[:n].ravel() for k, n in zip(self.ladders, counts.tolist(), strict=True))
        return np.unique(np.concatenate([np.zeros(0, np.int64), *steps]))

    def within(self, budget: Budget) -> Ints:
        """Returns how many steps of each ladder to take so that the rest meets the budget and uses it up.

        The least common ratio that meets it is found by bisection. Then steps are put back while they fit, best
        scores first: those that a ratio below it would not have taken, then any. Where one step is so large that much
        stays unused even so, its ladder is left below that step, and others are climbed in its place.

        Raises PlanError if the budget is out of reach.
        """
        low, high = 0.0, 1.0  # the budget is not met at the one, and met at the other
        everything, least = self.counts(low), self.counts(high)
        if self._cost(everything, budget) <= budget.limit:
            return everything
        if self._cost(least, budget) > budget.limit:
            raise self._out_of_reach(self._cost(least, budget), budget)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if self._cost(self.counts(middle), budget) <= budget.limit:
                high = middle
            else:
                low = middle
        before, after = self.counts(low), self.counts(high)
        counts = self._put_back(self._put_back(after, before, budget), everything, budget)
        if self._cost(counts, budget) >= (1 - UNUSED) * budget.limit:
            return counts
        allowed = [
            a if same else before[[i]] for i, (a, same) in enumerate(zip(self.allowed, before == after, strict=True))
        ]
        others = replace(self, allowed=allowed)
        if self._cost(others.counts(1.0), budget) > budget.limit:
            return counts
        return max(counts, others.within(budget), key=lambda c: self._cost(c, budget))

    def _out_of_reach(self, least: float, budget: Budget) -> PlanError:
        dense = budget.cost(self.network.mask())
        share = math.ceil(least / dense * 1e4) / 1e4
        return PlanError(
            f"a budget of {budget.limit:,.10g} {budget.unit} ({budget.limit / dense:.4g} of the dense network) is out "
            f"of reach: what must stay costs {least:,.10g} {budget.unit} ({share:.4g}); ask for no less than that, or "
            f"loosen keep, ratios, min_channels or round_to"
        )

    def _cost(self, counts: Ints, budget: Budget) -> float:
        return budget.cost(self.network.mask(self.removed(counts)))

    def _put_back(self, counts: Ints, least: Ints, budget: Budget) -> Ints:
        """Returns `counts`, lowered towards `least` step by step, best scores first, while the rest meets the budget.

        A ladder whose next step does not fit is done with: what is put back elsewhere makes no step cheaper.
        """
        counts = counts.copy()
        mask = self.network.mask(self.removed(counts))
        queue = self._steps_back(counts, least)
        while queue.size:

            def fits(many: int, queue: Ints = queue, mask: Bools = mask) -> bool:
                return many <= len(queue) and budget.cost(self._restored(queue[:many], counts, mask)) <= budget.limit

            fitting, stride = 0, 1
            while fits(fitting + stride):
                fitting, stride = fitting + stride, 2 * stride
            while stride := stride // 2:
                fitting += stride * fits(fitting + stride)
            mask = self._restored(queue[:fitting], counts, mask)
            counts[queue[:fitting, 0]] = queue[:fitting, 1]  # of a ladder that stands there often, the last counts
            queue = queue[fitting:]
            queue = queue[queue[:, 0] != queue[0, 0]] if queue.size else queue
        return counts

    def _steps_back(self, counts: Ints, least: Ints) -> Ints:
        """Returns (ladder, number of steps that are then left) for all that can be put back, best scores first."""
        found = [np.zeros((0, 2), np.int64)]
        scores, heights = [np.zeros(0)], [np.zeros(0)]
        for i, (ladder, allowed) in enumerate(zip(self.ladders, self.allowed, strict=True)):
            left = allowed[(allowed >= least[i]) & (allowed < counts[i])]
            found.append(np.stack([np.full_like(left, i), left], axis=1))
            scores.append(ladder.scores[left])
            heights.append(left * ladder.per_step / ladder.width)
        return np.concatenate(found)[np.lexsort((-np.concatenate(heights), -np.concatenate(scores)))]

    def _restored(self, steps: Ints, counts: Ints, mask: Bools) -> Bools:
        """Returns the mask after steps were put back."""
        mask = mask.copy()
        for ladder, count in dict(steps.tolist()).items():
            mask[self.ladders[ladder].steps[count : counts[ladder]]] = True
        return mask
