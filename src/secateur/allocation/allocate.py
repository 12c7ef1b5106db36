"""How much goes from where: scores, a ratio and a scope become a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from secateur.allocation.ladders import Choice, Ladder, build_ladders
from secateur.allocation.plan import Plan, make_plan
from secateur.criteria import Scores
from secateur.errors import InputError, PlanError, unknown_name
from secateur.graph.network import Group, Network

Scope = Literal["global", "local", "isomorphic"]
DEFAULT_FLOOR = 0.05
"""Every fibre keeps this fraction of its width, so that no group is emptied or left whole by accident."""


def allocate(
    network: Network,
    scores: Scores,
    *,
    ratio: float = 0.5,
    scope: Scope = "global",
    ratios: Mapping[str, float] | None = None,
    keep: Sequence[str] = (),
    min_channels: int | None = None,
    round_to: int = 1,
) -> Plan:
    """Returns the plan that removes the fraction `ratio` (in [0, 1)) of the channels of each scope, least scores first.

    `scope`: "local" gives every group its own threshold; "global" ranks all groups together, except that heads are
    ranked among heads; "isomorphic" ranks inside each family. Scores are divided by the mean of their group first
    (unless the criterion says otherwise), so that layers of different scale compete on shares (arXiv 2504.04196,
    section III).

    `ratios` sets the ratio of a kind, family or group by name, ranked in a scope of its own; 0 leaves it alone. By
    default attention loses heads and keeps its head dimensions: `ratios={"heads": 0, "head_dims": 0.5}` is the other
    way, `ratios={"head_dims": 0.5}` both. `keep` lists kinds, families or names (with wildcards) to leave alone.
    `min_channels` is the least that stays of each fibre (default: 5 % of its width, and one head); what this saves is
    taken elsewhere in the scope. `round_to` makes kept widths multiples (heads are not rounded).

    Raises InputError for values out of range or unknown names, PlanError when the requests contradict each other.
    """
    _check(ratio, ratios or {}, min_channels, round_to)
    if scope not in get_args(Scope):
        raise unknown_name("scope", scope, get_args(Scope))
    scores.validate(network)
    wanted, named = _ratios(network, ratio, ratios or {}, keep)
    group_of = np.full(network.num_channels + 1, -1, np.int64)
    for number, group in enumerate(network.groups):
        group_of[group.channels] = number
    floor = np.array([_floor(g, min_channels) for g in network.groups], np.int64)
    normalised = _normalise(network, scores)
    normalised[_protected(network, normalised)] = np.inf
    ladders, notes = build_ladders(network, normalised, Choice(wanted > 0, floor, group_of))
    scopes: dict[object, list[Ladder]] = {}
    for i, ladder in enumerate(ladders):
        leader = _leader(network, ladder, wanted, named)
        scopes.setdefault(_scope_key(network, scope, leader, named, i), []).append(ladder)
    removed = [np.zeros(0, np.int64)]
    for members in scopes.values():
        rate = float(wanted[_leader(network, members[0], wanted, named)])
        for ladder, count in zip(members, _climb(members, rate), strict=True):
            head = network.groups[ladder.groups[0]].kind == "heads"
            count = count if head else _round(ladder, count, round_to)
            removed.append(ladder.steps[:count].ravel())
    request = {
        "criterion": scores.criterion,
        "ratio": ratio,
        "scope": scope,
        "ratios": dict(ratios or {}),
        "keep": list(keep),
        "min_channels": min_channels,
        "round_to": round_to,
    }
    return make_plan(network, np.unique(np.concatenate(removed)), request, tuple(notes))


def _check(ratio: float, ratios: Mapping[str, float], min_channels: int | None, round_to: int) -> None:
    for name, value in {"ratio": ratio, **{f"ratios[{k!r}]": v for k, v in ratios.items()}}.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
            raise InputError(f"{name} is {value!r}; it is the fraction of channels to remove and must lie in [0, 1)")
    if min_channels is not None and (not isinstance(min_channels, int) or min_channels < 1):
        raise InputError(f"min_channels is {min_channels!r}; at least 1 channel must stay")
    if not isinstance(round_to, int) or round_to < 1:
        raise InputError(f"round_to is {round_to!r}; it must be a positive integer")


def _ratios(
    network: Network, ratio: float, ratios: Mapping[str, float], keep: Sequence[str]
) -> tuple[np.ndarray, dict[int, str]]:
    """Returns the ratio of each group, and under which name it was set if it was set by name."""
    numbers = {id(g): i for i, g in enumerate(network.groups)}
    wanted = np.array([0.0 if g.kind == "head_dims" else ratio for g in network.groups])
    named: dict[int, str] = {}
    found = {pattern: network.select(pattern) for pattern in ratios}
    for pattern in sorted(found, key=lambda p: -len(found[p])):
        for group in found[pattern]:
            wanted[numbers[id(group)]] = ratios[pattern]
            named[numbers[id(group)]] = pattern
    for pattern in keep:
        for group in network.select(pattern):
            wanted[numbers[id(group)]] = 0.0
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
    return (group.kind == "heads", named.get(leader))


def _climb(ladders: Sequence[Ladder], ratio: float) -> list[int]:
    """Returns how many steps of each ladder to take so that the fraction `ratio` of their channels goes.

    All steps are ranked together; where scores are equal, all ladders are climbed equally far. The order does not
    depend on the ratio and each ladder is climbed from its bottom, so a larger ratio never keeps more of anything.
    """
    total = sum(k.width * k.weight // k.per_step for k in ladders)
    target = total - int(total * (1 - ratio) + 1e-9)
    scores = np.concatenate([k.scores[: k.limit] for k in ladders])
    owner = np.concatenate([np.full(k.limit, i) for i, k in enumerate(ladders)])
    weights = np.concatenate([np.full(k.limit, k.weight) for k in ladders])
    height = np.concatenate([np.arange(1, k.limit + 1) * k.per_step / k.width for k in ladders])
    order = np.lexsort((np.arange(scores.size), height, scores))
    taken = order[np.cumsum(weights[order]) <= target]
    return np.bincount(owner[taken].astype(np.int64), minlength=len(ladders)).tolist()


def _round(ladder: Ladder, count: int, round_to: int) -> int:
    """Returns the number of steps, raised (at the floor: lowered) until the kept width is a multiple of `round_to`."""
    if count == 0 or round_to == 1:
        return count
    for candidate in (*range(count, ladder.limit + 1), *range(count - 1, -1, -1)):
        if (ladder.width - candidate * ladder.per_step) % round_to == 0:
            return candidate
    return 0
