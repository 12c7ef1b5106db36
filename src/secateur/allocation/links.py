"""Which links between sizes can be kept at once, when several of them concern the same channels."""

from __future__ import annotations

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
    members = [_members(link) for link in network.links]
    first = np.full(network.num_channels + 1, -1, np.int64)
    overlaps: set[tuple[int, int]] = set()
    by_channel: dict[int, list[int]] = {}
    for i, channels in enumerate(members):
        taken = first[channels]
        shared = channels[taken >= 0]
        for channel in shared.tolist():
            by_channel.setdefault(channel, [int(first[channel])]).append(i)
        first[channels[taken < 0]] = i
    for several in by_channel.values():
        overlaps.update((a, b) for n, a in enumerate(several) for b in several[n + 1 :])
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
    while True:  # what is tied to something that must stay, stays as well
        more = {n for pair in overlaps for n in pair if set(pair) & bad} - bad
        if not more:
            break
        bad |= more
    kept = [i for i in range(len(network.links)) if i not in bad and i not in implied]
    return (
        [network.links[i] for i in kept if not composite[i]],
        [network.links[i] for i in kept if composite[i]],
        [network.links[i] for i in sorted(bad)],
    )


def _members(link: Link) -> Ints:
    """Returns all channels that a link is about, its heads included."""
    parts = [n.channels for n in link.nodes] + [np.unique(n.owners) for n in link.nodes if is_composite(n)]
    channels = np.unique(np.concatenate(parts))
    return channels[channels >= 0]


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
