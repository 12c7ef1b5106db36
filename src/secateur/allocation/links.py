"""Which links between sizes can be kept at once, when several of them concern the same channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.graph.network import Indices, Ints, Link, Network


def is_composite(node: Indices) -> bool:
    """Whether a node is an axis made of whole heads."""
    return bool((node.owners != node.owners[0]).any())


def sort_links(network: Network) -> tuple[list[Link], list[Link], list[Link]]:
    """Returns links between fibres, links in which some axis is made of whole heads, and links that conflict.

    Links that share channels conflict, except where one implies the other, or where one is about the heads, or the
    dimensions inside the heads, of the other.
    """
    composite = [any(is_composite(n) for n in k.nodes) for k in network.links]
    overlaps = _overlaps(network.links)
    implied: set[int] = set()
    bad: set[int] = set()
    for a, b in sorted(overlaps):
        links = network.links[a], network.links[b]
        if composite[a] and composite[b]:
            bad |= {a, b}
        elif composite[a] or composite[b]:
            whole, part = links if composite[a] else links[::-1]
            if not _is_inside(whole, part):
                bad |= {a, b}
        elif _implies(links[0], links[1]):
            implied.add(b)
        elif _implies(links[1], links[0]):
            implied.add(a)
        else:
            bad |= {a, b}
    met: dict[int, set[int]] = {}
    for a, b in overlaps:
        met.setdefault(a, set()).add(b)
        met.setdefault(b, set()).add(a)
    pending = list(bad)
    while pending:  # what is tied to something that must stay, stays as well
        more = met[pending.pop()] - bad
        bad |= more
        pending += more
    kept = [i for i in range(len(network.links)) if i not in bad and i not in implied]
    return (
        [network.links[i] for i in kept if not composite[i] and _may_change(network.links[i])],
        [network.links[i] for i in kept if composite[i]],
        [network.links[i] for i in sorted(bad)],
    )


def _may_change(link: Link) -> bool:
    """False for a link between dimensions that all stay: only whole heads around them may go."""
    return any((n.channels >= 0).any() for n in link.nodes)


def _overlaps(links: Sequence[Link]) -> set[tuple[int, int]]:
    """Returns the pairs of links that are about the same channels."""
    members = [np.zeros(0, np.int64), *(_members(link) for link in links)]
    number = np.repeat(np.arange(-1, len(links)), [m.size for m in members])
    channels = np.concatenate(members)
    order = np.argsort(channels, kind="stable")
    channels, number = channels[order], number[order]
    found: set[tuple[int, int]] = set()
    for apart in range(1, len(links)):  # those that share a channel stand side by side, in order
        shared = np.flatnonzero(channels[apart:] == channels[:-apart])
        if not shared.size:
            break
        pairs = np.unique(number[shared] * len(links) + number[shared + apart])
        found.update(divmod(p, len(links)) for p in pairs.tolist())
    return found


def _members(link: Link) -> Ints:
    """Returns all channels that a link is about, its heads included, each once."""
    parts = [n.channels for n in link.nodes] + [n.owners for n in link.nodes if is_composite(n)]
    channels = np.sort(np.concatenate(parts))
    return channels[(channels >= 0) & (np.diff(channels, prepend=-1) != 0)]


def _is_inside(whole: Link, part: Link) -> bool:
    """True when `part` is about dimensions inside heads of `whole`, or about heads that all go at one rate there."""
    made = [n for n in whole.nodes if is_composite(n)]
    outside = np.concatenate([np.zeros(0, np.int64), *(n.channels for n in whole.nodes if not is_composite(n))])
    heads = np.unique(np.concatenate([n.owners for n in made]))
    taken = np.concatenate([n.channels for n in part.nodes])
    if not np.isin(taken, np.concatenate([outside, heads])).any():
        return True
    widths = {np.unique(n.owners).tobytes(): n.channels.size // np.unique(n.owners).size for n in made}
    found = [widths.get(np.unique(n.channels).tobytes()) for n in part.nodes]
    return None not in found and len(set(found)) == 1


def _implies(fine: Link, coarse: Link) -> bool:
    """True when each node of `coarse` is a union of equally many nodes of `fine`."""
    number: dict[int, int] = {}
    for i, node in enumerate(fine.nodes):
        for channel in node.channels.tolist():
            if number.setdefault(channel, i) != i:
                return False
    counts = set()
    for node in coarse.nodes:
        parts = {number.get(c, -1) for c in node.channels.tolist()}
        if -1 in parts or sum(fine.nodes[i].channels.size for i in parts) != node.channels.size:
            return False
        counts.add(len(parts))
    return len(counts) == 1
