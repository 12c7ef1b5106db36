"""Ladders: in which order the channels of a group, or of linked groups, may go, one step at a time.

A step removes channels that only make sense together: the least useful dimension of every head of a block, one head
and as many embedding channels as it is wide where the code ties the two sizes. Any number of steps from the bottom of a
ladder leaves a network that runs, so allocation only has to choose how far to climb each one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from secateur.graph.network import Group, Indices, Ints, Link, Network


@dataclass(frozen=True, eq=False)
class Ladder:
    """Steps (n x m channels, in order of removal), their scores (ascending), and how many may be climbed.

    `groups` are the positions in `Network.groups` of what a step takes from; `weight` is the number of channels of the
    leading group that one step counts for; `width` is what one fibre of it holds.
    """

    groups: tuple[int, ...]
    steps: Ints
    scores: np.ndarray
    weight: int
    width: int
    per_step: int
    limit: int


@dataclass(frozen=True, eq=False)
class Choice:
    """What allocation wants of each group: whether it takes part, and the least to keep in a fibre."""

    takes_part: np.ndarray
    floor: Ints
    group_of: Ints


def build_ladders(network: Network, scores: np.ndarray, choice: Choice) -> tuple[list[Ladder], list[str]]:
    """Returns the ladders of all groups that take part, and a note for each group that was asked and cannot."""
    ladders: list[Ladder] = []
    notes: list[str] = []
    done = np.zeros(network.num_channels + 1, np.bool_)
    uniform, composite = _sort_links(network)
    for link in composite:
        ladder, note = _composite_ladder(network, link, uniform, scores, choice)
        for node in link.nodes:
            done[node.channels] = True
            done[node.owners] = True
        for other in uniform:
            if any(done[n.channels].any() for n in other.nodes):
                for node in other.nodes:
                    done[node.channels] = True
        done[-1] = False
        ladders += [ladder] if ladder else []
        notes += [note] if note else []
    for link in uniform:
        channels = np.concatenate([n.channels for n in link.nodes])
        if done[channels].any():
            continue
        done[channels] = True
        rows = np.stack([n.channels for n in link.nodes])
        ladder, note = _uniform_ladder(network, rows, scores, choice)
        ladders += [ladder] if ladder else []
        notes += [note] if note else []
    for number, group in enumerate(network.groups):
        free = group.channels[~done[group.channels]]
        if choice.takes_part[number] and free.size:
            ladders.append(_free_ladder(number, group, free, scores, int(choice.floor[number])))
    return ladders, notes


def _sort_links(network: Network) -> tuple[list[Link], list[Link]]:
    """Returns links between fibres, and links in which some axis is made of whole heads."""
    composite = [k for k in network.links if any(np.unique(n.owners).size > 1 for n in k.nodes)]
    uniform = [k for k in network.links if not any(k is c for c in composite)]
    return uniform, composite


def _free_ladder(number: int, group: Group, channels: Ints, scores: np.ndarray, floor: int) -> Ladder:
    order = np.argsort(scores[channels], kind="stable")
    steps = channels[order][:, None]
    limit = max(0, channels.size - floor)
    return Ladder((number,), steps, scores[steps[:, 0]], 1, channels.size, 1, limit)


def _by_score(rows: Ints, scores: np.ndarray) -> Ints:
    """Returns each row of channels in ascending order of score."""
    return np.take_along_axis(rows, np.argsort(scores[rows], axis=1, kind="stable"), axis=1)


def _uniform_ladder(
    network: Network, rows: Ints, scores: np.ndarray, choice: Choice
) -> tuple[Ladder | None, str | None]:
    """A ladder whose step takes the least useful remaining channel of every fibre (rows: fibres x width)."""
    groups = np.unique(choice.group_of[rows])
    taking = choice.takes_part[groups]
    if not taking.any():
        return None, None
    if not taking.all() or _overlap(rows):
        return None, _note(network, groups, "they keep equal widths, and not all of them take part")
    steps = _by_score(rows, scores).T
    floor = int(choice.floor[groups].max())
    limit = max(0, rows.shape[1] - floor)
    return Ladder(
        tuple(groups.tolist()), steps, scores[steps].mean(axis=1), rows.shape[0], rows.shape[1], 1, limit
    ), None


def _overlap(rows: Ints) -> bool:
    return np.unique(rows).size != rows.size


def _note(network: Network, groups: Ints, why: str) -> str:
    names = [network.groups[i].name for i in groups.tolist()]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} stay as they are: {why}"


def _composite_ladder(
    network: Network, link: Link, uniform: list[Link], scores: np.ndarray, choice: Choice
) -> tuple[Ladder | None, str | None]:
    """A ladder for axes that must stay equal, some of which are heads x width: a step takes whole heads of each, or
    (where heads do not take part) a dimension of every head, and as many channels of the plain axes."""
    plain = [n.channels for n in link.nodes if np.unique(n.owners).size == 1]
    made_of_heads = [n for n in link.nodes if np.unique(n.owners).size > 1]
    lead = np.unique(np.concatenate([choice.group_of[c] for c in plain])) if plain else np.zeros(0, np.int64)
    head_sets = list({h.tobytes(): h for h in (np.unique(n.owners) for n in made_of_heads)}.values())
    head_groups = np.unique(choice.group_of[np.concatenate(head_sets)])
    dims = np.unique(np.concatenate([choice.group_of[n.channels] for n in made_of_heads]))
    everything = np.concatenate([lead, head_groups, dims])
    if not choice.takes_part[everything[everything >= 0]].any():
        return None, None
    if (lead < 0).any() or not choice.takes_part[lead].all() or any(_overlap(c[None]) for c in plain):
        return None, _note(
            network,
            head_groups[head_groups >= 0],
            f"the model's code ties heads x width to the width of {_names(network, lead)}, which does not take part",
        )
    by_heads = (head_groups >= 0).all() and choice.takes_part[head_groups].all()
    by_dims = (dims >= 0).all() and choice.takes_part[dims].all()
    if by_heads:
        parts = [(np.sort(h), _width(made_of_heads, h)) for h in head_sets]
        blocks = [(_by_score(h[None], scores), width) for h, width in parts]
        floors = [math.ceil(float(choice.floor[choice.group_of[h[0]]])) * width for h, width in parts]
    elif by_dims:
        fibres = [np.stack([n.channels for n in k.nodes]) for k in _fibre_links(uniform, made_of_heads)]
        counts = [np.unique(n.owners).size for n in made_of_heads]
        heads = counts[0]
        if len(set(counts)) > 1:
            return None, _note(network, dims, "their heads differ in number, and one size ties them")
        blocks = [(_by_score(f, scores), heads) for f in fibres]
        floors = [int(choice.floor[choice.group_of[f].max()]) * heads for f in fibres]
    else:
        return None, _note(
            network,
            lead,
            "the model's code ties their width to heads x width of "
            f"{_names(network, np.concatenate([head_groups, dims]))}, neither of which can change",
        )
    unit = math.lcm(*(width for _, width in blocks))
    size = link.nodes[0].channels.size
    floor = max(int(choice.floor[lead].max()) if lead.size else 1, *floors)
    limit = max(0, (size - floor) // unit)
    columns = [_by_score(c[None], scores)[0][: limit * unit].reshape(limit, unit) for c in plain]
    for ordered, width in blocks:
        rows, per_step = ordered.shape[0], unit // width
        taken = ordered[:, : limit * per_step].reshape(rows, limit, per_step)
        columns.append(taken.swapaxes(0, 1).reshape(limit, rows * per_step))
    steps = np.concatenate(columns, axis=1)
    groups = tuple(np.unique(np.concatenate([lead, head_groups if by_heads else dims])).tolist())
    both = by_heads and by_dims
    note = (
        _note(network, dims, "heads go instead: the model's code ties heads x width to another width") if both else None
    )
    step_scores = np.maximum.accumulate(scores[steps].mean(axis=1)) if limit else np.zeros(0)
    return Ladder(groups, steps, step_scores, unit, size, unit, limit), note


def _names(network: Network, groups: Ints) -> str:
    return (
        ", ".join(sorted({network.groups[i].family for i in groups.tolist() if i >= 0}))
        or "something that cannot change"
    )


def _width(nodes: list[Indices], heads: Ints) -> int:
    """Returns how many places one of these heads holds in an axis that is made of them."""
    node = next(n for n in nodes if n.owners.size and np.isin(n.owners[0], heads))
    return node.channels.size // np.unique(node.owners).size


def _fibre_links(uniform: list[Link], nodes: list[Indices]) -> list[Link]:
    """Returns the links between the fibres that lie inside `nodes`."""
    channels = np.concatenate([n.channels for n in nodes])
    return [k for k in uniform if any(np.isin(n.channels, channels).any() for n in k.nodes)]
