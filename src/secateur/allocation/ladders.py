"""Ladders: in which order the channels of a group, or of linked groups, may go, one step at a time.

A step removes channels that only make sense together: the least useful dimension of every head of a block, one head
and as many embedding channels as it is wide where the code ties the two sizes. Any number of steps from the bottom of a
ladder leaves a network that runs, so allocation only has to choose how far to climb each one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from secateur.allocation.links import is_composite, sort_links
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
    """Returns the ladders of all groups that take part, and a note for each group that was asked and cannot.

    Channels with an infinite score never go.
    """
    ladders: list[Ladder] = []
    notes: list[str] = []
    done = np.zeros(network.num_channels + 1, np.bool_)
    uniform, composite, refused = sort_links(network)
    for link in refused:
        channels = np.concatenate([np.concatenate([n.channels, n.owners]) for n in link.nodes])
        done[channels] = True
        groups = np.unique(choice.group_of[channels[channels >= 0]])
        if choice.takes_part[groups].any():
            notes.append(
                _note(network, groups, "several sizes in the model's code tie them together in different ways")
            )
    uniform_of = np.full(network.num_channels + 1, -1, np.int64)
    for number, link in enumerate(uniform):
        for node in link.nodes:
            uniform_of[node.channels] = number
    uniform_of[-1] = -1
    for link in composite:
        channels = np.concatenate([np.concatenate([n.channels, n.owners]) for n in link.nodes])
        within = [uniform[i] for i in np.unique(uniform_of[channels]).tolist() if i >= 0]
        ladder, note = _composite_ladder(network, link, within, scores, choice)
        done[channels] = True
        for node in (n for other in within for n in other.nodes):
            done[node.channels] = True
        done[-1] = False
        ladders += [ladder] if ladder else []
        notes += [note] if note else []
    for link in uniform:
        channels = np.concatenate([n.channels for n in link.nodes])
        if done[channels].any():
            continue
        done[channels] = True
        ladder, note = _uniform_ladder(network, link, scores, choice)
        ladders += [ladder] if ladder else []
        notes += [note] if note else []
    done[-1] = False
    for number, group in enumerate(network.groups):
        free = group.channels[~done[group.channels]]
        if choice.takes_part[number] and free.size:
            ladders.append(_free_ladder(number, group, free, scores, int(choice.floor[number])))
    return ladders, list(dict.fromkeys(notes))


def _free_ladder(number: int, group: Group, channels: Ints, scores: np.ndarray, floor: int) -> Ladder:
    order = np.argsort(scores[channels], kind="stable")
    steps = channels[order][:, None]
    limit = max(0, channels.size - max(floor, _never(channels, scores)))
    return Ladder((number,), steps, scores[steps[:, 0]], 1, channels.size, 1, limit)


def _by_score(rows: Ints, scores: np.ndarray) -> Ints:
    """Returns each row of channels in ascending order of score."""
    return np.take_along_axis(rows, np.argsort(scores[rows], axis=1, kind="stable"), axis=1)


def _never(rows: Ints, scores: np.ndarray) -> int:
    """Returns the largest number of channels in a row that may never go."""
    return int(np.isinf(scores[rows]).sum(axis=-1).max(initial=0))


def _uniform_ladder(
    network: Network, link: Link, scores: np.ndarray, choice: Choice
) -> tuple[Ladder | None, str | None]:
    """A ladder whose step takes the least useful remaining channel of every fibre."""
    channels = np.concatenate([n.channels for n in link.nodes])
    groups = np.unique(choice.group_of[channels])
    taking = choice.takes_part[groups]
    if not taking.any():
        return None, None
    if not taking.all():
        return None, _note(network, groups, "they keep equal widths, and not all of them take part")
    if _overlap(channels) or len({n.channels.size for n in link.nodes}) > 1:
        return None, _note(network, groups, "they keep equal sizes, but share channels or hold some several times")
    rows = np.stack([n.channels for n in link.nodes])
    steps = _by_score(rows, scores).T
    floor = int(choice.floor[groups].max())
    limit = max(0, rows.shape[1] - max(floor, _never(rows, scores)))
    return Ladder(
        tuple(groups.tolist()), steps, scores[steps].mean(axis=1), rows.shape[0], rows.shape[1], 1, limit
    ), None


def _overlap(rows: Ints) -> bool:
    return bool((np.diff(np.sort(rows, axis=None)) == 0).any())


def _note(network: Network, groups: Ints, why: str) -> str:
    names = [network.groups[i].name for i in groups.tolist()]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} stay as they are: {why}"


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows of channels in order of removal; a channel of each row takes `width` places of an axis made of heads."""

    rows: Ints
    width: int
    floor: int


def _composite_ladder(
    network: Network, link: Link, uniform: list[Link], scores: np.ndarray, choice: Choice
) -> tuple[Ladder | None, str | None]:
    """A ladder for axes that must stay equal, some of which are heads x width: a step takes whole heads of each, or
    (where heads do not take part) a dimension of every head, and as many channels of the plain axes."""
    plain = [n.channels for n in link.nodes if not is_composite(n)]
    made_of_heads = [n for n in link.nodes if is_composite(n)]
    lead = np.unique(np.concatenate([np.zeros(0, np.int64), *(choice.group_of[c] for c in plain)]))
    heads = np.unique(np.concatenate([choice.group_of[n.owners] for n in made_of_heads]))
    dims = np.unique(np.concatenate([choice.group_of[n.channels] for n in made_of_heads]))
    by_heads, by_dims = _all_take_part(heads, choice), _all_take_part(dims, choice)
    everything = np.concatenate([lead, heads, dims])
    if not choice.takes_part[everything[everything >= 0]].any():
        return None, None
    if not _all_take_part(lead, choice) or any(_overlap(c) for c in plain):
        why = f"the model's code ties heads x width to the width of {_names(network, lead)}, which does not take part"
        return None, _note(network, heads[heads >= 0], why)
    if not by_heads and not by_dims:
        others = _names(network, np.concatenate([heads, dims]))
        why = f"the model's code ties their width to heads x width of {others}, neither of which can change"
        return None, _note(network, lead, why)
    if by_heads:
        blocks = _blocks_of_heads(made_of_heads, scores, choice)
    elif len({np.unique(n.owners).size for n in made_of_heads}) == 1:
        blocks = _blocks_of_dims(uniform, made_of_heads, scores, choice)
    else:
        return None, _note(network, dims, "their heads differ in number, and one size ties them")
    floor = max(1, *choice.floor[lead].tolist(), *(b.floor for b in blocks), *(_never(c, scores) for c in plain))
    groups = np.unique(np.concatenate([lead, heads if by_heads else dims]))
    why = "heads go instead: the model's code ties heads x width to another width"
    note = _note(network, dims, why) if by_heads and by_dims else None
    return _braid(groups, plain, blocks, floor, scores), note


def _all_take_part(groups: Ints, choice: Choice) -> bool:
    return bool((groups >= 0).all() and choice.takes_part[groups].all())


def _blocks_of_heads(nodes: list[Indices], scores: np.ndarray, choice: Choice) -> list[_Block]:
    """Returns a block for each set of heads: a step takes the least useful of them."""
    blocks: dict[bytes, _Block] = {}
    for node in nodes:
        heads = np.unique(node.owners)
        width = node.channels.size // heads.size
        floor = max(int(choice.floor[choice.group_of[heads[0]]]), _never(heads, scores)) * width
        blocks.setdefault(heads.tobytes(), _Block(_by_score(heads[None], scores), width, floor))
    return list(blocks.values())


def _blocks_of_dims(uniform: list[Link], nodes: list[Indices], scores: np.ndarray, choice: Choice) -> list[_Block]:
    """Returns a block for each set of fibres inside `nodes`: a step takes the least useful dimension of every head."""
    heads = np.unique(nodes[0].owners).size
    inside = np.concatenate([n.channels for n in nodes])
    blocks = []
    for link in uniform:
        if any(np.isin(n.channels, inside).any() for n in link.nodes):
            fibres = np.stack([n.channels for n in link.nodes])
            floor = max(int(choice.floor[choice.group_of[fibres].max()]), _never(fibres, scores)) * heads
            blocks.append(_Block(_by_score(fibres, scores), heads, floor))
    return blocks


def _braid(groups: Ints, plain: list[Ints], blocks: list[_Block], floor: int, scores: np.ndarray) -> Ladder:
    """Returns the ladder whose step takes equally many places from each plain axis and from each block."""
    unit = math.lcm(*(b.width for b in blocks))
    size = blocks[0].rows.shape[1] * blocks[0].width
    limit = max(0, (size - floor) // unit)
    columns = [_by_score(c[None], scores)[0][: limit * unit].reshape(limit, unit) for c in plain]
    for block in blocks:
        count, per_step = block.rows.shape[0], unit // block.width
        taken = block.rows[:, : limit * per_step].reshape(count, limit, per_step)
        columns.append(taken.swapaxes(0, 1).reshape(limit, count * per_step))
    steps = np.concatenate(columns, axis=1)
    return Ladder(tuple(groups.tolist()), steps, scores[steps].mean(axis=1), unit, size, unit, limit)


def _names(network: Network, groups: Ints) -> str:
    families = sorted({network.groups[i].family for i in groups.tolist() if i >= 0})
    return ", ".join(families) or "something that cannot change"
