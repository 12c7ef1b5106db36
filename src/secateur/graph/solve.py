"""From the relations of a trace to channels: connected components, heads, and what must stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from secateur.graph.labels import CONSTANT, Ints
from secateur.graph.network import STAYS, Indices
from secateur.graph.relations import Freeze, Relations
from secateur.graph.requirements import settle
from secateur.graph.sizes import RawExtent

LINKED = "keeps the size of something that stays: "


@dataclass(eq=False)
class Solution:
    """Per label: its component (`channel`, before numbering), the component of the head that it lies in, or -1.

    `reason` maps a frozen component to the first reason for it. `links` are sets of places of equal size.
    """

    channel: Ints
    owner: Ints
    reason: dict[int, tuple[str, str]]
    links: list[list[Ints]]

    def places(self, labels: Ints, number: Ints) -> Indices:
        """Returns labels as places, with components numbered by `number` (-1 for those that stay)."""
        owner = self.owner[labels]
        owners = np.where(owner < 0, STAYS, number[owner])
        # an index inside a head has two ways to go; a frozen channel may still go with its head
        return Indices(number[self.channel[labels]], owners)


def _components(n: int, edges: list[tuple[Ints, Ints]]) -> Ints:
    if not edges:
        return np.arange(n, dtype=np.int64)
    a = np.concatenate([e[0] for e in edges])
    b = np.concatenate([e[1] for e in edges])
    graph = coo_matrix((np.ones(a.size, np.bool_), (a, b)), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def solve(relations: Relations, active: Ints) -> Solution:
    """Solves the recorded relations once. `active` are labels of weights that some operator multiplied with.

    A channel without any of them is computed with by nothing, so it stays.
    """
    n = relations.num_labels
    same, constants = _without_constants(relations)
    atoms = _components(n, same)
    settle(relations, atoms)
    together = [*same, *relations.together]
    channel, owner = _heads(n, atoms, together, relations.owners)
    reason: dict[int, tuple[str, str]] = {}
    frozen = np.zeros(int(channel.max()) + 1, np.bool_)
    for freeze in [*relations.freezes, *constants]:
        labels = freeze.labels[freeze.labels != CONSTANT]
        hit = channel[labels]
        if not freeze.channel_only:
            hit = np.concatenate([hit, owner[labels][owner[labels] >= 0]])
        _freeze(frozen, reason, hit, freeze.reason, freeze.where)
    _freeze(frozen, reason, channel[[CONSTANT]], "constant", "")
    for rows, why, where in relations.pins:
        owners = owner[rows]
        alone = (owners == owners[:, :1]).all(axis=1) & (owners[:, 0] >= 0)
        _freeze(frozen, reason, owners[alone, 0], why, where)
    for extent in _row_extents(relations):
        owners = owner[extent.labels]
        if (owners < 0).any():
            _freeze(frozen, reason, owners[owners >= 0], "its heads lie beside something that cannot go", "")
    idle = np.ones_like(frozen)
    idle[channel[active]] = False
    idle[owner[active][owner[active] >= 0]] = False
    _freeze(frozen, reason, np.flatnonzero(idle & ~frozen), "no layer computes with it", "")
    links = _links(relations, channel, owner)
    _settle(frozen, reason, links, channel, owner)
    return Solution(channel, owner, reason, links)


def _row_extents(relations: Relations) -> Iterator[RawExtent]:
    extents = [*(e for _, e in relations.attributes), *(e for pair in relations.equal for e in pair)]
    return (e for e in extents if e.kind == "rows")


def _without_constants(relations: Relations) -> tuple[list[tuple[Ints, Ints]], list[Freeze]]:
    """Returns the edges without those to the constant label, and those as freezes: constants must not join channels."""
    edges: list[tuple[Ints, Ints]] = []
    constants: list[Freeze] = []
    for a, b in relations.same:
        bad = (a == CONSTANT) | (b == CONSTANT)
        if bad.any():
            constants.append(Freeze(np.concatenate([a[bad], b[bad]]), "meets a constant", "", False))
            a, b = a[~bad], b[~bad]
        edges.append((a, b))
    return edges, constants


def _heads(n: int, atoms: Ints, edges: list[tuple[Ints, Ints]], owners: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Returns per label its component and the component of its head (-1: none).

    Two parents of one label become one channel. A parent that is tied to what lies inside it takes it all along.
    """
    edges = list(edges)
    children = [np.repeat(p, r.shape[1]) for p, r in owners]
    parents = np.concatenate(children) if owners else np.zeros(0, np.int64)
    inside = atoms[np.concatenate([r.ravel() for _, r in owners])] if owners else np.zeros(0, np.int64)
    while True:
        channel = _components(n, edges)
        owner_of_atom = np.full(int(atoms.max()) + 1, -1, np.int64)
        owner_of_atom[inside] = parents
        first = owner_of_atom[inside]
        conflict = channel[first] != channel[parents]
        owner = owner_of_atom[atoms]
        has = np.flatnonzero(owner >= 0)
        inner = has[channel[owner[has]] == channel[has]]
        if not conflict.any() and not inner.size:
            break
        swallowed = np.isin(channel[owner[has]], channel[inner])
        loose = has[swallowed & (channel[owner[has]] != channel[has])]
        if not conflict.any() and not loose.size:
            # everything inside went along with the head: it is one channel, and no head any more
            gone = np.isin(channel[parents], channel[inner])
            parents, inside = parents[~gone], inside[~gone]
            continue
        edges.append((first[conflict], parents[conflict]))
        edges.append((owner[loose], loose))
    result = np.where(owner >= 0, channel[np.maximum(owner, 0)], -1)
    return channel, result


def _freeze(frozen: np.ndarray, reason: dict[int, tuple[str, str]], hit: Ints, why: str, where: str) -> None:
    for component in np.unique(hit[~frozen[hit]]).tolist():
        reason.setdefault(component, (why, where))
    frozen[hit] = True


def _links(relations: Relations, channel: Ints, owner: Ints) -> list[list[Ints]]:
    """Returns the sets of nodes (arrays of (component, head) pairs) that must keep equally many members."""
    keys: dict[bytes, int] = {}
    nodes: list[Ints] = []
    unions: list[tuple[int, int]] = []

    def add_pairs(pairs: Ints) -> int:
        key = pairs.tobytes()
        if key not in keys:
            keys[key] = len(nodes)
            nodes.append(pairs)
        return keys[key]

    def add(labels: Ints) -> int:
        pairs = np.stack([channel[labels], owner[labels]], axis=1)
        return add_pairs(pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))])

    def unite(numbers: list[int]) -> None:
        unions.extend((numbers[0], other) for other in numbers[1:])

    def of(extent: RawExtent) -> list[int]:
        if extent.kind == "width":
            return [add(row) for row in extent.labels]
        if extent.kind == "count":
            flat = extent.labels.ravel()
            return [add(flat[: flat.size // extent.divisor])]
        # rows may hold heads of several sorts, side by side: equally many of each sort survive
        return [
            add_pairs(np.stack([np.unique(heads), np.full(np.unique(heads).size, -1)], axis=1))
            for heads in np.unique(owner[extent.labels], axis=1).T
            if (heads >= 0).all()
        ]

    for rows in relations.fibres:
        unite([add(row) for row in rows])
    for left, right in relations.equal:
        unite([*of(left), *of(right)])
    by_attribute: dict[object, list[int]] = {}
    for attribute, extent in relations.attributes:
        by_attribute.setdefault((attribute, extent.divisor if extent.kind != "count" else 1), []).extend(of(extent))
    for numbers in by_attribute.values():
        if numbers:
            unite(numbers)
    if not nodes:
        return []
    edges = [(np.array([a]), np.array([b])) for a, b in unions]
    classes = _components(len(nodes), edges)
    found: dict[int, list[Ints]] = {}
    for node, number in zip(nodes, classes.tolist(), strict=True):
        found.setdefault(number, []).append(node)
    return [c for c in found.values() if len(c) > 1]


def _settle(
    frozen: np.ndarray, reason: dict[int, tuple[str, str]], links: list[list[Ints]], channel: Ints, owner: Ints
) -> None:
    """Freezes, until nothing changes, whatever must keep as many members as something that cannot change."""
    changed = True
    while changed:
        changed = False
        for nodes in links:
            rigid = [node for node in nodes if _is_rigid(node, frozen)]
            if not rigid:
                continue
            cause = next(reason[c] for c in rigid[0][:, 0].tolist() if c in reason)
            for node in nodes:
                channels = node[:, 0]
                heads = np.unique(node[:, 1])
                # a fibre that lies inside one head may go with it; a whole axis made of heads may not
                hit = channels if heads.size == 1 else np.concatenate([channels, heads[heads >= 0]])
                if not frozen[hit].all():
                    changed = True
                    _freeze(frozen, reason, hit, _linked(cause[0]), cause[1])


def _linked(why: str) -> str:
    return why if why.startswith(LINKED) else f"{LINKED}{why}"


def _is_rigid(node: Ints, frozen: np.ndarray) -> bool:
    heads = np.unique(node[:, 1])
    channels_fixed = frozen[node[:, 0]].any()
    if heads.size == 1:
        return bool(channels_fixed)
    return bool(channels_fixed and frozen[heads[heads >= 0]].any())
