"""Linear regression of a layer's outputs on its inputs, pulled to a given weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PULLS = (10.0, 1.0, 1e-1, 1e-2, 1e-3)
"""The pulls that are always tried; smaller ones follow for as long as they help."""

LEAST_PULL = 1e-12

JUDGES = 128
"""How many outputs, evenly spread, choose the pull of a layer that has more."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Means of inputs x [groups, d] and targets y [groups, m], and moments about them per row, in float64.

    `xx` [groups, d, d] and `yx` [groups, m, d] are covariances, `yy` [groups, m] variances.
    """

    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor

    def targets(self, which: Tensor) -> Statistics:
        """Returns the moments with the targets `which` (a mask over m, or indices) alone."""
        return replace(self, y=self.y[:, which], yx=self.yx[:, which], yy=self.yy[:, which])

    def about(self, offset: Tensor) -> Statistics:
        """Returns the moments about zero for inputs and about `offset` [groups, m] for targets."""
        dy = self.y - offset
        xx = self.xx + self.x.unsqueeze(2) * self.x.unsqueeze(1)
        yx = self.yx + dy.unsqueeze(2) * self.x.unsqueeze(1)
        return Statistics(torch.zeros_like(self.x), offset, xx, yx, self.yy + dy.square())

    def error(self, weight: Tensor, offset: Tensor) -> Tensor:
        """Returns the mean of |y - x weight^T - offset|^2, summed over all outputs."""
        own = self.about(offset)
        return own.yy.sum() - 2 * (weight * own.yx).sum() + (weight * (weight @ own.xx)).sum()


class Regression:
    """Sums over rows of inputs x [groups, rows, d] and targets y [groups, rows, m], and the weights that fit them.

    Sums are kept in float64, of rows from which the mean of the first ones has been subtracted, so that large means
    cost no digits; and in two parts, since the pull to the given weight is chosen by rows that were held out.
    """

    def __init__(self) -> None:
        self.counts = [0, 0]
        self._sums: list[Tensor] = []
        self._shifts: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, *, held_out: bool) -> None:
        """Adds rows of inputs [groups, rows, d] and of targets [groups, rows, m]."""
        x, y = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))
        if not self._sums:
            (groups, _, d), m = x.shape, y.shape[-1]
            self._shifts = [x.mean(1, keepdim=True), y.mean(1, keepdim=True)]
            wide: Any = {"dtype": torch.float64, "device": x.device}
            self._sums = [torch.zeros(2, groups, *s, **wide) for s in ((d,), (m,), (d, d), (m, d), (m,))]
        x, y = x - self._shifts[0], y - self._shifts[1]
        part = int(held_out)
        self.counts[part] += x.shape[1]
        sums = (x.sum(1, dtype=torch.float64), y.sum(1, dtype=torch.float64), x.mT @ x, y.mT @ x, y.square().sum(1))
        for total, new in zip(self._sums, sums, strict=True):
            total[part] += new

    def statistics(self, *parts: int) -> Statistics:
        """Returns the statistics of part 0 (rows to fit), 1 (rows held out) or both."""
        count = sum(self.counts[i] for i in parts)
        x, y, xx, yx, yy = (s[list(parts)].sum(0) / count for s in self._sums)
        return Statistics(
            x + self._shifts[0].squeeze(1),
            y + self._shifts[1].squeeze(1),
            xx - x.unsqueeze(2) * x.unsqueeze(1),
            yx - y.unsqueeze(2) * x.unsqueeze(1),
            yy - y.square(),
        )

    def fit(self, weight: Tensor, offset: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weight W' [groups, m, d] and the offset b' [groups, m], in float64, that fit best.

        They minimise |y - x W'^T - b'|^2 / rows + pull * s * |W' - weight|^2, with s the mean of the diagonal of the
        moments of x, and the pull that does best on the rows held out. For the outputs `free` (a mask over m) the
        offset is fitted too, which centres the moments; for the others it stays as it is.
        """
        weight, offset = weight.double().clone(), offset.double().clone()
        fitted, held, both = self.statistics(0), self.statistics(1), self.statistics(0, 1)
        for value in free.unique().tolist():
            which = free == value
            start, bias = weight[:, which], None if value else offset[:, which]
            pull = _best_pull(fitted.targets(which), held.targets(which), start, bias)
            found = None
            while found is None:  # ever larger pulls, until rounding no longer makes the moments indefinite
                found = _solve(both.targets(which), start, bias, pull)
                pull *= 10
            weight[:, which], offset[:, which] = found
        return weight, offset


def _best_pull(fitted: Statistics, held: Statistics, weight: Tensor, offset: Tensor | None) -> float:
    """Returns the pull whose solution on some rows has the least error on others."""
    judges = torch.linspace(0, weight.shape[1] - 1, min(JUDGES, weight.shape[1]), device=weight.device).long()
    fitted, held, weight = fitted.targets(judges), held.targets(judges), weight[:, judges]
    offset = None if offset is None else offset[:, judges]
    best, least = PULLS[0], float("inf")
    pull = PULLS[0]
    while pull >= LEAST_PULL:
        found = _solve(fitted, weight, offset, pull)
        error = float("inf") if found is None else float(held.error(*found))
        if pull < PULLS[-1] and not error < 0.99 * least:
            break
        if error < least:
            best, least = pull, error
        pull /= 10
    return best


def _solve(moments: Statistics, weight: Tensor, offset: Tensor | None, pull: float) -> tuple[Tensor, Tensor] | None:
    """Returns weight and offset for one pull, or None where rounding has made the moments indefinite."""
    own = moments if offset is None else moments.about(offset)
    diagonal = own.xx.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(1, keepdim=True)
    # Inputs that never vary leave nothing to regress on: any pull will do, and keeps the weight.
    pulls = torch.where(scale > 0, pull * scale, 1.0).expand_as(diagonal)
    factor, failed = torch.linalg.cholesky_ex(own.xx + torch.diag_embed(pulls))
    if bool(failed.any()):
        return None
    new = weight + torch.cholesky_solve((own.yx - weight @ own.xx).mT, factor).mT
    return new, own.y - (new @ own.x.unsqueeze(2)).squeeze(2)
