"""From the relations of a trace to channels: connected components, heads, and what must stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from secateur.graph.labels import CONSTANT, Ints
from secateur.graph.network import STAYS, Bools, Indices
from secateur.graph.relations import Freeze, Relations
from secateur.graph.requirements import settle
from secateur.graph.sizes import RawExtent

LINKED = "keeps the size of something that stays: "


class Stuck:
    """Which components stay, and the first reason for each: `why` numbers `reasons`, (reason, where); -1 if free."""

    def __init__(self, num_components: int) -> None:
        self.why = np.full(num_components, -1, np.int64)
        self.reasons: list[tuple[str, str]] = []
        self._numbers: dict[tuple[str, str], int] = {}

    def add(self, components: Ints, why: str, where: str) -> Ints:
        """Freezes components; returns those that were free until now."""
        new = components[self.why[components] < 0]
        if new.size:
            number = self._numbers.setdefault((why, where), len(self.reasons))
            if number == len(self.reasons):
                self.reasons.append((why, where))
            self.why[new] = number
        return new

    def has(self, components: Ints) -> Bools:
        """Returns which of `components` are frozen."""
        return self.why[components] >= 0


@dataclass(frozen=True, eq=False)
class Links:
    """Nodes, which are sets of places, sorted by the link that keeps them equal in size.

    Node i has the entries from `starts[i]` to `starts[i + 1]` of `channels` and `owners` (components, before
    numbering), link j the nodes from `links[j]` to `links[j + 1]`.
    """

    channels: Ints
    owners: Ints
    starts: Ints
    links: Ints


@dataclass(eq=False)
class Solution:
    """Per label: its component (`channel`, before numbering), the component of the head that it lies in, or -1."""

    channel: Ints
    owner: Ints
    frozen: Stuck
    links: Links

    def places(self, labels: Ints, number: Ints) -> Indices:
        """Returns labels as places, with components numbered by `number` (-1 for those that stay)."""
        return numbered(self.channel[labels], self.owner[labels], number)


def numbered(channels: Ints, owners: Ints, number: Ints) -> Indices:
    """Returns components and those of their heads as places, numbered by `number`."""
    # an index inside a head has two ways to go; a frozen channel may still go with its head
    return Indices(number[channels], np.where(owners < 0, STAYS, number[owners]))


def _components(n: int, a: Ints, b: Ints) -> Ints:
    """Returns the connected component of each of `n` nodes under the edges a[i] - b[i], in order of first node.

    Each root takes the least root that it has an edge to as parent, until no edge is left between two trees. A root
    without a lesser neighbour is the parent of one that has: at least half of the roots vanish in each round.
    """
    parent = np.arange(n)
    while a.size:
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        deep = np.flatnonzero(parent[parent] != parent)
        while deep.size:
            parent[deep] = parent[parent[deep]]
            deep = deep[parent[parent[deep]] != parent[deep]]
        a, b = parent[a], parent[b]
        apart = a != b
        a, b = a[apart], b[apart]
    return (np.cumsum(parent == np.arange(n)) - 1)[parent]


def _joined(arrays: Sequence[Ints]) -> Ints:
    """Returns arrays as one, flat."""
    return np.concatenate([np.zeros(0, np.int64), *(a.ravel() for a in arrays)])


def _spans(starts: Ints, sizes: Ints) -> Ints:
    """Returns all numbers of several spans, each given by its start and its size, one span behind another."""
    behind = np.cumsum(sizes)
    return np.repeat(starts - behind + sizes, sizes) + np.arange(int(sizes.sum()))


def solve(relations: Relations, active: Ints) -> Solution:
    """Solves the recorded relations once. `active` are labels of weights that some operator multiplied with.

    A channel without any of them is computed with by nothing, so it stays.
    """
    atoms, constants = _atoms(relations)
    settle(relations, atoms)
    channel, owner = _heads(atoms, relations)
    frozen = Stuck(int(channel.max()) + 1)
    for freeze in [*relations.freezes, *constants]:
        labels = freeze.labels[freeze.labels != CONSTANT]
        hit = channel[labels]
        if not freeze.channel_only:
            hit = np.concatenate([hit, owner[labels][owner[labels] >= 0]])
        frozen.add(hit, freeze.reason, freeze.where)
    frozen.add(channel[[CONSTANT]], "constant", "")
    for rows, why, where in relations.pins:
        owners = owner[rows]
        alone = (owners == owners[:, :1]).all(axis=1) & (owners[:, 0] >= 0)
        frozen.add(owners[alone, 0], why, where)
    for extents in _rows_of_one_size(relations):
        owners = _joined([owner[extent.labels] for extent in extents])
        if (owners < 0).any():
            frozen.add(owners[owners >= 0], "its heads keep step with something that cannot go", "")
    idle = np.ones(frozen.why.size, np.bool_)
    idle[channel[active]] = False
    idle[owner[active][owner[active] >= 0]] = False
    frozen.add(np.flatnonzero(idle), "no layer computes with it", "")
    links = _links(relations, channel, owner)
    _settle(frozen, links)
    return Solution(channel, owner, frozen, links)


def components(relations: Relations) -> Ints:
    """Returns per label its component, and the component of the head that it lies in, or -1 (2 x labels)."""
    return np.stack(_heads(_atoms(relations)[0], relations))


def _atoms(relations: Relations) -> tuple[Ints, list[Freeze]]:
    """Returns per label the number of what is tied to it, and what is tied to a constant."""
    same, constants = _without_constants(relations)
    a, b = (_joined([edge[side] for edge in same]) for side in (0, 1))
    return _components(relations.num_labels, a, b), constants


def _rows_of_one_size(relations: Relations) -> Iterator[list[RawExtent]]:
    """Yields the extents that are counted in rows and that one attribute, or one another, keep equal."""
    by_attribute: dict[object, list[RawExtent]] = {}
    for attribute, extent in relations.attributes:
        by_attribute.setdefault(attribute, []).append(extent)
    for extents in [*by_attribute.values(), *map(list, relations.equal)]:
        yield [e for e in extents if e.kind == "rows"]


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


def _heads(atoms: Ints, relations: Relations) -> tuple[Ints, Ints]:
    """Returns per label its component and the component of its head (-1: none).

    Two parents of one label become one channel. A parent that is tied to what lies inside it takes it all along.
    """
    a, b = (atoms[_joined([edge[side] for edge in relations.together])] for side in (0, 1))
    parents = atoms[_joined([np.repeat(p, r.shape[1]) for p, r in relations.owners])]
    inside = atoms[_joined([r for _, r in relations.owners])]
    while True:
        channel = _components(int(atoms.max()) + 1, a, b)
        owner = np.full(channel.size, -1, np.int64)
        owner[inside] = parents
        first = owner[inside]
        conflict = channel[first] != channel[parents]
        has = np.flatnonzero(owner >= 0)
        heads = channel[owner[has]]
        swallows = np.zeros(channel.size, np.bool_)
        swallows[heads[heads == channel[has]]] = True
        if not conflict.any() and not swallows.any():
            break
        loose = has[swallows[heads] & (heads != channel[has])]
        if not conflict.any() and not loose.size:
            # everything inside went along with the head: it is one channel, and no head any more
            remains = ~swallows[channel[parents]]
            parents, inside = parents[remains], inside[remains]
            continue
        a = np.concatenate([a, first[conflict], owner[loose]])
        b = np.concatenate([b, parents[conflict], loose])
    return channel[atoms], np.where(owner >= 0, channel[owner], -1)[atoms]


class _Sets:
    """Rows of places, as codes that sort like (component, head); what is united must keep equal sizes."""

    def __init__(self, channel: Ints, owner: Ints) -> None:
        self._owner = owner
        self._base = int(channel.max()) + 2
        self._code = channel * self._base + owner + 1
        self._rows: list[Ints] = []
        self._unions: list[Ints] = []
        self._num_rows = 0

    def unite(self, numbers: list[Ints]) -> None:
        """Makes rows, by their numbers, keep equally many members."""
        if numbers:
            self._unions.append(np.concatenate(numbers))

    def of(self, labels: Ints) -> Ints:
        """Adds rows of labels (R x W), and returns their numbers."""
        return self._add(self._code[labels])

    def _add(self, codes: Ints) -> Ints:
        self._rows.append(codes)
        self._num_rows += len(codes)
        return np.arange(self._num_rows - len(codes), self._num_rows)

    def of_extent(self, extent: RawExtent) -> list[Ints]:
        """Adds what must keep its size for `extent` to keep its own, and returns the numbers of the rows."""
        if extent.kind == "width":
            return [self.of(extent.labels)]
        if extent.kind == "count":
            return [self.of(extent.labels.reshape(1, -1)[:, : extent.labels.size // extent.divisor])]
        # rows may hold heads of several sorts, side by side: equally many of each sort survive
        owners = self._owner[extent.labels]
        sorts = owners[:, :1] if (owners == owners[:, :1]).all() else np.unique(owners, axis=1)
        return [self._add(np.unique(heads)[None] * self._base) for heads in sorts.T if (heads >= 0).all()]

    def links(self) -> Links:
        """Returns the nodes, each different row once, by the links that the unions make of them."""
        sizes = _joined([np.full(len(r), r.shape[1]) for r in self._rows])
        codes = _joined(self._rows)
        starts = np.cumsum(sizes) - sizes
        # equal rows have equal sums of hashes; others do not, but for one chance in 2^64, which the re-trace would tell
        sums = np.add.reduceat(_hashed(codes), starts) if sizes.size else np.zeros(0, np.uint64)
        _, first, node = np.unique(sums + _hashed(sizes), return_index=True, return_inverse=True)
        order = np.argsort(first)
        node, first = np.argsort(order)[node], first[order]
        unions = [node[u] for u in self._unions]
        classes = _components(
            first.size, _joined([np.repeat(u[:1], u.size - 1) for u in unions]), _joined([u[1:] for u in unions])
        )
        kept = np.flatnonzero(np.bincount(classes)[classes] > 1)
        kept = kept[np.argsort(classes[kept], kind="stable")]
        first, classes = first[kept], classes[kept]
        codes = codes[_spans(starts[first], sizes[first])]
        codes = codes[np.lexsort((codes, np.repeat(np.arange(first.size), sizes[first])))]
        ends = np.flatnonzero(np.diff(classes, append=-1)) + 1
        return Links(
            codes // self._base,
            codes % self._base - 1,
            np.concatenate([[0], np.cumsum(sizes[first])]),
            np.concatenate([[0], ends]),
        )


def _hashed(values: Ints) -> NDArray[np.uint64]:
    """Returns well-mixed 64-bit hashes (the finalizer of MurmurHash3)."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed ^= mixed >> np.uint64(33)
        mixed *= np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(33))


def _links(relations: Relations, channel: Ints, owner: Ints) -> Links:
    """Returns the sets of places that must keep equally many members."""
    sets = _Sets(channel, owner)
    for rows in relations.fibres:
        sets.unite([sets.of(rows)])
    for left, right in relations.equal:
        sets.unite([*sets.of_extent(left), *sets.of_extent(right)])
    by_attribute: dict[object, list[Ints]] = {}
    for attribute, extent in relations.attributes:
        key = (attribute, extent.divisor if extent.kind != "count" else 1)
        by_attribute.setdefault(key, []).extend(sets.of_extent(extent))
    for numbers in by_attribute.values():
        sets.unite(numbers)
    return sets.links()


def _settle(frozen: Stuck, links: Links) -> None:
    """Freezes whatever must keep as many members as something that cannot change, and so on from there.

    Links take turns in order, each as soon as one of its nodes is rigid: that decides which reason comes first.
    """
    num_nodes = links.starts.size - 1
    if not num_nodes:
        return
    node = np.repeat(np.arange(num_nodes), np.diff(links.starts))
    link = np.repeat(np.arange(links.links.size - 1), np.diff(links.links))
    heads = [f.reduceat(links.owners, links.starts[:-1]) for f in (np.minimum, np.maximum)]
    # a fibre that lies inside one head may go with it; a whole axis made of heads may not
    composite = heads[0] != heads[1]
    whole = composite[node] & (links.owners >= 0)
    stuck = np.stack([np.zeros(num_nodes, np.bool_), ~composite])
    sides = (links.channels, np.where(whole, links.owners, -1))
    for side, components in enumerate(sides):
        stuck[side, node[(components >= 0) & frozen.has(components)]] = True
    entries = [np.argsort(components, kind="stable") for components in sides]
    ordered = [components[order] for components, order in zip(sides, entries, strict=True)]
    queue = [(0, j) for j in np.unique(link[stuck.all(axis=0)]).tolist()]
    done = np.zeros(links.links.size - 1, np.bool_)
    while queue:
        turn, j = heappop(queue)
        if done[j]:
            continue
        done[j] = True
        here = slice(*links.starts[links.links[j : j + 2]])
        rigid = links.links[j] + int(np.argmax(stuck[:, slice(*links.links[j : j + 2])].all(axis=0)))
        cause = links.channels[slice(*links.starts[rigid : rigid + 2])]
        why, where = frozen.reasons[frozen.why[cause[frozen.has(cause)][0]]]
        hit = np.concatenate([links.channels[here], links.owners[here][whole[here]]])
        new = np.unique(frozen.add(hit, _linked(why), where))
        for side, (order, components) in enumerate(zip(entries, ordered, strict=True)):
            left, right = (np.searchsorted(components, new, s) for s in ("left", "right"))
            touched = node[order[_spans(left, right - left)]]
            stuck[side, touched] = True
            for k in np.unique(link[touched[stuck[:, touched].all(axis=0)]]).tolist():
                heappush(queue, (turn if k > j else turn + 1, k))


def _linked(why: str) -> str:
    return why if why.startswith(LINKED) else f"{LINKED}{why}"
