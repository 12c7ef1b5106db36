"""Everything in one call: trace, score, allocate, cut; at once, or in steps with training in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.allocation import DEFAULT_RATIO, Budget, Plan, allocate, make_plan
from secateur.criteria import Combination, Criterion, Loss, Scores, score
from secateur.criteria.footprints import normalized
from secateur.criteria.scores import Given
from secateur.errors import CutError, InputError
from secateur.graph import Network, trace
from secateur.graph.network import Ints
from secateur.surgery.branches import drop_branches
from secateur.surgery.cutting import cut_


def prune_(
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: str | Criterion = "l2",
    batches: Given | Mapping[str, Given] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    combine: str | Combination | None = None,
    branches: Sequence[str] = (),
    compensate: Iterable[Any] | None = None,
    **allocation: Any,
) -> Plan:
    """Prunes `model` in place at once and returns the plan that was carried out; arguments as of `prune_steps_`.

    Raises what `trace`, `score`, `allocate` and `cut_` raise; the model is then as it was.
    """
    how: dict[str, Any] = {"criterion": criterion, "loss": loss, "seed": seed, "combine": combine}
    what = {"branches": branches, "compensate": compensate, **allocation}
    *_, plan = prune_steps_(model, example_inputs, 1, batches=batches, **how, **what)
    return plan


def prune_steps_(
    model: nn.Module,
    example_inputs: Any,
    steps: int,
    *,
    criterion: str | Criterion = "l2",
    batches: Given | Mapping[str, Given] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    combine: str | Combination | None = None,
    branches: Sequence[str] = (),
    compensate: Iterable[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **allocation: Any,
) -> Iterator[Plan]:
    """Prunes `model` in place in `steps` equal steps, each scored anew, and yields after each what has gone so far.

        for plan in prune_steps_(model, x, 5, criterion="taylor", batches=batches, macs=0.3, optimizer=optimizer):
            train(model, optimizer)

    Step t of T removes `ratio` · t/T of the channels of the dense model (so do `ratios`), or leaves a budget that has
    come t/T of the way. What has gone stays gone. Every plan yielded says what is missing of the dense model, and the
    last one is what `save` needs.

    `example_inputs` as for `trace`; `criterion`, `batches`, `loss`, `seed` and `combine` as for `score`; everything
    else (`ratio` or a budget, `scope`, `ratios`, `keep`, `min_channels`, `round_to`) as for `allocate`, with the same
    defaults. `branches`: residual branches to drop in the first step (see `drop_branches`). `compensate`: unlabelled
    batches to refit the remaining layers by, each time to the model before that step (see `compensate_`). What is read
    in every step must be readable again: lists or loaders, no used up iterators. The state of `optimizer` is cut along.

    Raises what those functions raise; the model is then as the step before left it. A budget out of reach is told
    before the first step.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(f"steps is {steps!r}; it must be a whole number of at least 1")
    network = current = drop_branches(trace(model, example_inputs), model, branches)
    plan = make_plan(network, np.zeros(0, np.int64), {}, ())
    for step in range(1, steps + 1):
        if step > 1:
            current = trace(model, example_inputs)
        scores = score(current, model, criterion, batches, loss=loss, seed=seed, combine=combine)
        places = _Places(network, current, plan)
        if step == 1 < steps:
            allocate(network, scores, **allocation)
        wanted = allocate(network, places.scores(scores), **_request(network, step / steps, allocation))
        told = {} if steps == 1 else {"step": step, "steps": steps}
        removed = np.union1d(places.gone, _removed(wanted))
        after = make_plan(network, removed, {**wanted.request, **told}, wanted.notes)
        part = after if step == 1 else places.rest(after)
        compensation = cut_(model, part, optimizer, compensate=compensate)
        plan = after if compensation is None else replace(after, notes=(*after.notes, *compensation.notes))
        yield plan


def _removed(plan: Plan) -> Ints:
    assert plan.removed is not None
    return plan.removed


def _request(network: Network, part: float, allocation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what to ask of `allocate` when `part` of the way has been gone; `allocation` is the end of it."""
    if part == 1:
        return dict(allocation)
    request = dict(allocation)
    if all(request.get(name) is None for name in ("ratio", "macs", "params", "latency")):
        request["ratio"] = DEFAULT_RATIO
    if request.get("ratio") is not None:
        request["ratio"] *= part
    request["ratios"] = {k: v if v is None else v * part for k, v in (request.get("ratios") or {}).items()}
    for name, dense in (("macs", network.dense_macs), ("params", network.dense_params)):
        limit = request.get(name)
        if limit is not None:
            whole = dense if isinstance(limit, int) else 1.0
            request[name] = type(limit)(whole - (whole - limit) * part)
    limit = request.get("latency")
    if isinstance(limit, Budget):
        whole = limit.cost(network.mask())
        request["latency"] = replace(limit, limit=whole - (whole - limit.limit) * part)
    return request


class _Places:
    """Which channel of the dense network is which of `current`, the network of what `plan` has left of it."""

    def __init__(self, dense: Network, current: Network, plan: Plan) -> None:
        self.current = current
        self.plan = plan
        self.dense = dense
        self.gone = _removed(plan)
        mask = dense.mask(self.gone)
        axes = {(a.tensor, a.dim): a for a in dense.axes}
        pairs = [np.zeros((2, 0), np.int64)]
        for new in current.axes:
            old = axes[new.tensor, new.dim]
            alive = old.alive(mask)
            pairs += [np.stack([old.channels[alive], new.channels]), np.stack([old.owners[alive], new.owners])]
        found = np.unique(np.concatenate(pairs, axis=1), axis=1)
        found = found[:, found[0] >= 0]
        # A channel is known again if it is one channel there too: sizes of one may have tied or freed others since.
        once = np.bincount(found[0], minlength=dense.num_channels)[found[0]] == 1
        again = np.bincount(found[1][found[1] >= 0], minlength=current.num_channels)
        once &= (found[1] >= 0) & (again[found[1]] == 1)
        self.now = np.full(dense.num_channels, -1)
        self.now[found[0][once]] = found[1][once]

    def scores(self, scores: Scores) -> Scores:
        """Returns scores of `current` as scores of the dense network: what has gone is least, what is fixed now most.

        Dimensions of heads that have gone get the mean of their group, so that they favour none of the others.
        """
        if not self.gone.size:
            return scores
        values = normalized(self.current, scores.values) if scores.normalize else scores.values
        # With a value so low, the mean of a group is below zero, and its values are not normalised again.
        bound = 1 + np.abs(values).sum()
        known = self.now >= 0
        result = np.where(known, values[self.now], bound)
        inside = self._inside()
        for group in self.dense.groups:
            own = group.channels[known[group.channels]]
            result[group.channels[inside[group.channels]]] = result[own].mean() if own.size else 0.0
        result[self.gone] = -bound
        return replace(scores, values=result)

    def _inside(self) -> np.ndarray:
        """Returns which channels lie in heads that have gone."""
        mask = self.dense.mask(self.gone)
        inside = np.zeros(self.dense.num_channels + 1, np.bool_)
        for axis in self.dense.axes:
            inside[axis.channels[~mask[axis.owners]]] = True
        return inside[:-1]

    def rest(self, after: Plan) -> Plan:
        """Returns the plan for `current` that leads to `after`; raises CutError if there is none."""
        new = self.now[np.setdiff1d(_removed(after), self.gone)]
        lost = self._inside()[np.setdiff1d(_removed(after), self.gone)]
        part = make_plan(self.current, np.unique(new[~lost & (new >= 0)]), after.request, after.notes)
        expected = {(c.tensor, c.dim): c.removed for c in after.cuts}
        before = {(c.tensor, c.dim): c for c in self.plan.cuts}
        for change in part.cuts:
            first = before.get((change.tensor, change.dim))
            removed = set(first.removed if first else ())
            left = np.setdiff1d(np.arange(change.size + len(removed)), sorted(removed))
            both = tuple(sorted(removed | set(left[change.indices].tolist())))
            if expected.get((change.tensor, change.dim)) != both:
                raise self._other(change.tensor, change.dim)
        touched = {(c.tensor, c.dim) for c in part.cuts}
        for place, removed in expected.items():
            if place not in touched and removed != (before[place].removed if place in before else ()):
                raise self._other(*place)
        return part

    def _other(self, tensor: str, dim: int) -> CutError:
        return CutError(
            f"{tensor}[dim {dim}]: what goes together there is no longer what it was in the dense model, since other "
            "sizes have become one; keep more channels (min_channels=2), or prune in one step"
        )
