"""How much goes from where: scores, a ratio and a scope become a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from secateur.allocation.budget import Budget, Climb, rank
from secateur.allocation.ladders import Choice, Ladder, build_ladders
from secateur.allocation.plan import Plan, make_plan
from secateur.criteria import Scores
from secateur.errors import InputError, PlanError, unknown_name
from secateur.graph.network import Group, Ints, Network

Scope = Literal["global", "local", "isomorphic", "cost"]
DEFAULT_RATIO = 0.5
DEFAULT_FLOOR = 0.05
"""Every fibre keeps this fraction of its width, so that no group is emptied or left whole by accident."""


def allocate(
    network: Network,
    scores: Scores,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: Budget | None = None,
    scope: Scope = "global",
    ratios: Mapping[str, float | None] | None = None,
    keep: Sequence[str] = (),
    min_channels: int | None = None,
    round_to: int = 1,
) -> Plan:
    """Returns the plan that removes the channels of least score, as many as one of four numbers says.

    `ratio` (in [0, 1), default 0.5) is the fraction of the channels of each scope to remove. `macs`, `params` and
    `latency` are what may remain: MACs per example or parameters, a float in (0, 1] for a fraction of the dense network
    or an int for a number; for time see `secateur.cost.LatencyTable.within`. All scopes then lose the least common
    ratio that meets the budget, and the best of what went is put back until no more fits.

    `scope`: "local" gives every group its own threshold; "global" ranks all groups together, except that heads are
    ranked among heads; "isomorphic" ranks inside each family. Scores are divided by the mean of their group first
    (unless the criterion says otherwise), so that layers of different scale compete on shares (arXiv 2504.04196,
    section III). "cost", under a budget, ranks everything together, heads too; scores that are comparable as they are
    (`Scores.normalize` False) by score per cost: the sum over what goes, over what that saves of the budget.

    `ratios` sets the ratio of a kind, family or group by name, ranked in a scope of its own; 0 leaves it alone, None
    gives it the common ratio in the common scope. By default attention loses heads and keeps its head dimensions:
    `ratios={"heads": 0, "head_dims": None}` is the other way, `ratios={"head_dims": None}` both. `keep` lists kinds,
    families or names (with wildcards) to leave alone. `min_channels` is the least that stays of each fibre (default:
    5 % of its width, and one head); what this saves is taken elsewhere in the scope. `round_to` makes kept widths
    multiples (heads are not rounded).

    Raises InputError for values out of range, unknown names, or more than one of the four; PlanError when the requests
    contradict each other, or a budget is less than what must stay costs.
    """
    targets = {"ratio": ratio, "macs": macs, "params": params, "latency": latency}
    asked = {k: v for k, v in targets.items() if v is not None} or {"ratio": DEFAULT_RATIO}
    limits = {"ratios": dict(ratios or {}), "keep": list(keep), "min_channels": min_channels, "round_to": round_to}
    _check(asked, limits["ratios"], min_channels, round_to)
    budget = _budget(network, macs, params, latency)
    if scope not in get_args(Scope):
        raise unknown_name("scope", scope, get_args(Scope))
    if scope == "cost" and budget is None:
        raise InputError("scope 'cost' weighs scores against a budget; give macs, params or latency")
    scores.validate(network)
    common = asked.get("ratio", DEFAULT_RATIO)
    wanted, named = _ratios(network, common, limits["ratios"], keep)
    ladders, notes = _ladders(network, scores, wanted > 0, min_channels)
    if budget is not None and scope == "cost" and not scores.normalize:
        ladders = [_per_cost(network, k, budget) for k in ladders]
    climb = _climb(network, ladders, scope, wanted, named, round_to)
    counts = climb.counts(common) if budget is None else climb.within(budget)
    said = {"latency": latency.limit} if latency is not None else asked
    request = {"criterion": scores.criterion, **said, "scope": scope, **limits}
    return make_plan(network, climb.removed(counts), request, tuple(notes))


def _check(
    asked: Mapping[str, Any], ratios: Mapping[str, float | None], min_channels: int | None, round_to: int
) -> None:
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are given; one of them says how much may remain")
    rates = {k: v for k, v in asked.items() if k == "ratio"} | {
        f"ratios[{k!r}]": v for k, v in ratios.items() if v is not None
    }
    for name, value in rates.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise InputError(f"{name} is {value!r}; it is the fraction of channels to remove and must lie in [0, 1)")
    if min_channels is not None and (not isinstance(min_channels, int) or min_channels < 1):
        raise InputError(f"min_channels is {min_channels!r}; at least 1 channel must stay")
    if not isinstance(round_to, int) or round_to < 1:
        raise InputError(f"round_to is {round_to!r}; it must be a positive integer")


def _budget(network: Network, macs: float | None, params: float | None, latency: Budget | None) -> Budget | None:
    """Returns the budget that was asked for, if any; raises InputError for values out of range."""
    if latency is not None and not isinstance(latency, Budget):
        raise InputError(f"latency is {latency!r}; expected what `within` of a measured LatencyTable returns")
    costs = {
        "macs": (macs, network.macs_cost, network.dense_macs, "MACs"),
        "params": (params, network.params_cost, network.dense_params, "parameters"),
    }
    for name, (value, cost, dense, unit) in costs.items():
        if value is None:
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return Budget(value, cost, unit)
        if not isinstance(value, float) or not 0 < value <= 1:
            raise InputError(f"{name} is {value!r}; give a float in (0, 1], a fraction, or a whole number of {unit}")
        return Budget(value * dense, cost, unit)
    return latency


def _ladders(
    network: Network, scores: Scores, takes_part: np.ndarray, min_channels: int | None
) -> tuple[list[Ladder], list[str]]:
    group_of = np.full(network.num_channels + 1, -1, np.int64)
    for number, group in enumerate(network.groups):
        group_of[group.channels] = number
    floor = np.array([_floor(g, min_channels) for g in network.groups], np.int64)
    normalised = _normalise(network, scores)
    normalised[_protected(network, normalised)] = np.inf
    return build_ladders(network, normalised, Choice(takes_part, floor, group_of))


def _ratios(
    network: Network, ratio: float, ratios: Mapping[str, float | None], keep: Sequence[str]
) -> tuple[np.ndarray, dict[int, str]]:
    """Returns the ratio of each group, and under which name it was set if it was given one of its own by name.

    Raises PlanError if all that a name sets the ratio of is kept.
    """
    numbers = {id(g): i for i, g in enumerate(network.groups)}
    wanted = np.array([0.0 if g.kind == "head_dims" else ratio for g in network.groups])
    named: dict[int, str] = {}
    found = {pattern: network.select(pattern) for pattern in ratios}
    for pattern in sorted(found, key=lambda p: -len(found[p])):
        for group in found[pattern]:
            number, rate = numbers[id(group)], ratios[pattern]
            wanted[number] = ratio if rate is None else rate
            named.pop(number, None)
            if rate is not None:
                named[number] = pattern
    kept = {numbers[id(group)]: pattern for pattern in keep for group in network.select(pattern)}
    for name, rate in ratios.items():
        mine = [i for i, by in named.items() if by == name]
        if rate and mine and all(i in kept for i in mine):
            by = " and ".join(dict.fromkeys(repr(kept[i]) for i in mine))
            raise PlanError(f"ratios[{name!r}] = {rate:g} contradicts keep={by}, which leaves all of it alone")
    wanted[list(kept)] = 0.0
    return wanted, named


def _floor(group: Group, min_channels: int | None) -> int:
    width = group.channels.shape[1]
    default = 1 if group.kind == "heads" else int(np.ceil(DEFAULT_FLOOR * width))
    return min(width, max(1, default if min_channels is None else min_channels))


def _protected(network: Network, scores: np.ndarray) -> np.ndarray:
    """Returns which channels may not go since they are the best of a set of which two (or one head) must stay."""
    protected = np.zeros(network.num_channels + 1, np.bool_)
    for places in network.pairs:
        inside = (places.owners >= 0).all() and np.unique(places.owners).size > 1
        candidates = np.unique(places.owners if inside else places.channels)
        least = 1 if inside else 2 - int((places.channels < 0).sum())
        candidates = candidates[candidates >= 0]
        if least > 0:
            protected[candidates[np.argsort(-scores[candidates], kind="stable")][:least]] = True
    return protected


def _normalise(network: Network, scores: Scores) -> np.ndarray:
    """Returns scores divided by the mean of their group, with a last entry for what stays."""
    values = np.append(scores.values, np.inf)
    if scores.normalize:
        for group in network.groups:
            mean = values[group.channels].mean()
            if mean > 0:
                values[group.channels] /= mean
    return values


def _leader(network: Network, ladder: Ladder, wanted: np.ndarray, named: dict[int, str]) -> int:
    """Returns the group whose ratio decides for a ladder; raises PlanError if its groups were given different ones."""
    plain = [g for g in ladder.groups if network.groups[g].kind not in ("heads", "head_dims")] or list(ladder.groups)
    set_by_name = {float(wanted[g]): g for g in ladder.groups if g in named}
    if len(set_by_name) > 1:
        told = " and ".join(f"{named[g]!r} ({ratio:g})" for ratio, g in set_by_name.items())
        raise PlanError(f"one size in the model's code ties {told} together, so they cannot have different ratios")
    return next(iter(set_by_name.values()), plain[0])


def _scope_key(network: Network, scope: Scope, leader: int, named: dict[int, str], number: int) -> object:
    group = network.groups[leader]
    if scope == "local":
        return number
    if scope == "isomorphic":
        return (group.family, named.get(leader))
    return (scope == "global" and group.kind == "heads", named.get(leader))


def _climb(
    network: Network, ladders: list[Ladder], scope: Scope, wanted: np.ndarray, named: dict[int, str], round_to: int
) -> Climb:
    """Returns the ladders with the ranking of each scope and with the widths at which they may be left."""
    leaders = [_leader(network, k, wanted, named) for k in ladders]
    scopes: dict[object, list[int]] = {}
    for i, leader in enumerate(leaders):
        scopes.setdefault(_scope_key(network, scope, leader, named, i), []).append(i)
    rankings = []
    for members in scopes.values():
        leader = leaders[members[0]]
        rankings.append(rank(ladders, members, float(wanted[leader]) if leader in named else None))
    multiples = [1 if network.groups[k.groups[0]].kind == "heads" else round_to for k in ladders]
    allowed = [_allowed(k, multiple) for k, multiple in zip(ladders, multiples, strict=True)]
    return Climb(network, ladders, allowed, rankings)


def _allowed(ladder: Ladder, round_to: int) -> Ints:
    """Returns at how many steps a ladder may be left: none, or such that the kept width is a multiple."""
    counts = np.arange(ladder.limit + 1)
    return counts[((ladder.width - counts * ladder.per_step) % round_to == 0) | (counts == 0)]


def _per_cost(network: Network, ladder: Ladder, budget: Budget) -> Ladder:
    """Returns the ladder with, as the score of a step, the scores of its channels over what it saves of the budget.

    What it saves is the mean over the steps of this ladder, with all else in place. Steps that save nothing go last.
    """
    without = network.mask(ladder.steps[: ladder.limit].ravel())
    saved = (budget.cost(network.mask()) - budget.cost(without)) / max(1, ladder.limit)
    total = ladder.scores * ladder.steps.shape[1]
    return replace(ladder, scores=total / saved if saved > 0 else np.full(total.shape, np.inf))
