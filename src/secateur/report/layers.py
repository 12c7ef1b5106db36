"""A network as a person reads it: layers in the order in which the model defines them, alike blocks folded into one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from secateur.graph.network import STAYS, Axis, Frozen, Network, link_text, merged

_LONGEST_UNIT = 4
"""How many blocks in a row may repeat together: Swin alternates between two, some hybrids between three or four."""


@dataclass(frozen=True)
class Note:
    """Why some axes stay: the reason, found at one line of code; `axes` are those axes."""

    reason: str
    line: str
    axes: tuple[Frozen, ...]

    def __str__(self) -> str:
        modules = list(dict.fromkeys(axis.where.removesuffix(f"({self.line})").strip() for axis in self.axes))
        shown = [name + times for name, times in merged([m for m in modules if m])]
        more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
        where = ", ".join(shown[:4]) + more + (f" ({self.line})" if self.line else "")
        return f"{self.reason}: {where}" if where else self.reason


@dataclass(frozen=True)
class Part:
    """Indices of an axis of one kind: of a group (its position in `Network.groups`), or staying for a note.

    `note` counts from 1; 0 where the indices may go. Where they stay, `group` is -1.
    """

    group: int
    count: int
    note: int = 0


@dataclass(frozen=True)
class Side:
    """An axis as shown: its parts in order of appearance, and the groups of heads that its indices lie in."""

    axis: int
    size: int
    parts: tuple[Part, ...]
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A weight with all that is shown in one line with it: its bias, a norm over the same channels, scales …

    `names` are paths inside `block`; `axes` all axes of the tensors (positions in `Network.axes`). `takes` and `makes`
    are the two sides of the weight, `holds` the axes of tensors that no matmul or convolution multiplies with.
    `stays` are the sizes of other dimensions that stay (kernels, positions), with the number of the note.
    """

    names: tuple[str, ...]
    block: str
    axes: tuple[int, ...]
    takes: tuple[Side, ...]
    makes: tuple[Side, ...]
    holds: tuple[Side, ...]
    stays: tuple[tuple[tuple[int, ...], int], ...]

    @property
    def name(self) -> str:
        """What the line is called; names with one parent share it: `attn.{q_bias · v_bias}`."""
        pieces = []
        for parent, names in groupby(self.names, lambda name: name.rpartition(".")[0]):
            own = [name.removeprefix(f"{parent}.") for name in names]
            text = " · ".join(own)
            pieces.append(f"{parent}.{{{text}}}" if parent and len(own) > 1 else f"{parent}.{text}".lstrip("."))
        return " · ".join(pieces)


@dataclass(frozen=True)
class Section:
    """Layers of one block, standing for `times` alike ones; `title` names them all (empty: layers outside blocks)."""

    title: str
    times: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Layout:
    """What is shown of a network.

    `stands_for` maps each group (position in `Network.groups`) to the one that is shown in its place, which is itself
    outside folded blocks. `ties` are sets of groups that must keep equal widths, with the links in words.
    """

    sections: tuple[Section, ...]
    notes: tuple[Note, ...]
    stands_for: tuple[int, ...]
    ties: tuple[tuple[frozenset[int], str], ...]


def lay_out(network: Network) -> Layout:
    """Returns the layers of a network in sections, blocks that are alike folded into the first of them."""
    notes = find_notes(network.frozen)
    sections = _sections(_layers(network, notes))
    folded, stands_for = _Folding(network, sections).fold()
    return Layout(tuple(folded), notes, tuple(stands_for), tuple(_ties(network, stands_for)))


def find_notes(frozen: Iterable[Frozen]) -> tuple[Note, ...]:
    """Returns the axes that stay, together where one reason was found at one line of code."""
    together: dict[tuple[str, str], list[Frozen]] = {}
    for axis in frozen:
        line = re.search(r"\(([^()]*:\d+)\)$", axis.where)
        together.setdefault((axis.reason, line[1] if line else ""), []).append(axis)
    return tuple(Note(reason, line, tuple(axes)) for (reason, line), axes in together.items())


def groups_of(network: Network) -> np.ndarray:
    """Returns per channel the position of its group in `Network.groups`; the last entry, for what stays, is -1."""
    positions = np.full(network.num_channels + 1, STAYS, np.int64)
    for i, group in enumerate(network.groups):
        positions[group.channels] = i
    return positions


@dataclass(eq=False)
class _Draft:
    """A layer being put together: `path` of the module (of the tensor, where a module has several weights).

    `names` are its own and those of what was joined to it later, `before` of what stands before it.
    """

    path: str
    is_weight: bool
    tensors: dict[str, list[int]] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def _layers(network: Network, notes: Sequence[Note]) -> list[Layer]:
    drafts = _drafts(network.axes)
    block_of = _blocks([draft.path for draft in drafts if draft.is_weight])
    for draft in drafts:
        draft.names = _names(draft, block_of(draft.path))
    note_of: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for number, note in enumerate(notes, 1):
        for axis in note.axes:
            note_of.setdefault((axis.tensor, axis.dim), []).append((axis.count, number))
    group_of = groups_of(network)

    def side(i: int) -> Side:
        axis = network.axes[i]
        parts = []
        for group, count in _in_order(group_of[axis.channels]):
            stay = note_of.get((axis.tensor, axis.dim), ()) if group == STAYS else ()
            parts += [Part(STAYS, n, number) for n, number in stay] or [Part(group, count)]
        heads = tuple(g for g, _ in _in_order(group_of[axis.owners]) if g != STAYS)
        return Side(i, axis.channels.size, tuple(parts), heads)

    return [_layer(draft, block_of(draft.path), network.axes, side) for draft in _merge(drafts, network.axes, block_of)]


def _layer(draft: _Draft, block: str, axes: Sequence[Axis], side: Callable[[int], Side]) -> Layer:
    mine = tuple(i for positions in draft.tensors.values() for i in positions)
    sides = {role: tuple(side(i) for i in mine if axes[i].role == role) for role in ("in", "out")}
    holds: tuple[Side, ...] = ()
    if not any(sides.values()):
        held = [side(i) for i in mine]
        holds = tuple({s.parts: s for s in held if any(p.group != STAYS for p in s.parts) or s.heads}.values())
    told = {part.note for shown in (*sides.values(), holds) for s in shown for part in s.parts}
    stays: list[tuple[tuple[int, ...], int]] = []
    for positions in draft.tensors.values():
        sizes: dict[int, list[int]] = {}
        for i in positions:
            if axes[i].role not in ("in", "out"):
                for part in side(i).parts:
                    if part.note and part.note not in told:
                        sizes.setdefault(part.note, []).append(part.count)
        stays += [(tuple(counts), note) for note, counts in sizes.items()]
    names = (*draft.before, *draft.names)
    return Layer(names, block, mine, sides["in"], sides["out"], holds, tuple(dict.fromkeys(stays)))


def _drafts(axes: Sequence[Axis]) -> list[_Draft]:
    """Returns one draft per weight, and one per module without any, in order of definition."""
    tensors: dict[str, list[int]] = {}
    for i, axis in enumerate(axes):
        tensors.setdefault(axis.tensor, []).append(i)
    weights: dict[str, list[str]] = {}
    for name, positions in tensors.items():
        if any(axes[i].role in ("in", "out") for i in positions):
            weights.setdefault(name.rpartition(".")[0], []).append(name)
    drafts: dict[str, _Draft] = {}
    for name, positions in tensors.items():
        module = name.rpartition(".")[0]
        here = weights.get(module, [])
        key = name if len(here) > 1 and name in here else f"{here[0] if len(here) > 1 else module}"
        drafts.setdefault(key, _Draft(key, bool(here))).tensors[name] = positions
    ordered: list[_Draft] = []
    for draft in drafts.values():
        # Buffers are listed after all parameters; what has no weight belongs before the modules inside its own.
        inside = (i for i, other in enumerate(ordered) if other.path.startswith(f"{draft.path}."))
        ordered.insert(len(ordered) if draft.is_weight else next(inside, len(ordered)), draft)
    return ordered


def _names(draft: _Draft, block: str) -> list[str]:
    """Returns what a draft is called inside its block: the module, or tensors that have no module of their own."""
    if draft.is_weight or f"{draft.path}.weight" in draft.tensors:
        names = [draft.path]
    else:
        names = list(draft.tensors)
    return [name.removeprefix(f"{block}.") if block else name for name in names]


def _blocks(paths: Sequence[str]) -> Callable[[str], str]:
    """Returns the function from a module to the block that it lies in: the innermost one of several alike in name.

    A block holds at least two weights. Numbers alone (`blocks.3`) tell blocks from others better than names that end
    in a number (`denselayer3`), which are also given to parts of a block.
    """
    weights: Counter[str] = Counter(ancestor for path in paths for ancestor in _ancestors(path)[:-1])
    large = [path for path, count in weights.items() if count > 1]
    alike = Counter(_without_numbers(path) for path in large)
    blocks = {path for path in large if re.search(r"\d", path.rpartition(".")[2])}
    blocks = {path for path in blocks if alike[_without_numbers(path)] > 1}

    def block_of(path: str) -> str:
        around = [a for a in _ancestors(path) if a in blocks]
        numbered = [a for a in around if a.rpartition(".")[2].isdigit()]
        return (numbered or around or [""])[-1]

    return block_of


def _ancestors(path: str) -> list[str]:
    """Returns the modules around a module, outermost first, and itself."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _without_numbers(path: str) -> tuple[str, str]:
    parent, _, last = path.rpartition(".")
    return parent, re.sub(r"\d+", "*", last)


def _merge(drafts: Sequence[_Draft], axes: Sequence[Axis], block_of: Callable[[str], str]) -> list[_Draft]:
    """Returns the drafts with norms and scales joined to the weight of their block that they have the channels of."""
    kept: list[_Draft] = []
    waiting: list[_Draft] = []
    for draft in drafts:
        if not draft.is_weight:
            last = next((d for d in reversed(kept) if d.is_weight), None)
            is_beside = last is not None and last.path.rpartition(".")[0] == draft.path.rpartition(".")[0]
            if last is not None and is_beside and _fits(draft, last, ("out",), axes, block_of):
                _join(last, draft, after=True)
            else:
                waiting.append(draft)
                kept.append(draft)
            continue
        for other in waiting:
            last = next((d for d in reversed(kept[: kept.index(other)]) if d.is_weight), None)
            if _fits(other, draft, ("in", "out"), axes, block_of):
                kept.remove(other)
                _join(draft, other, after=False)
            elif last is not None and _fits(other, last, ("out",), axes, block_of):
                kept.remove(other)
                _join(last, other, after=True)
        waiting.clear()
        kept.append(draft)
    return kept


def _fits(
    loose: _Draft, weight: _Draft, roles: tuple[str, ...], axes: Sequence[Axis], block_of: Callable[[str], str]
) -> bool:
    """Whether all that may go of `loose` (or else all of it) is what a side of `weight` is, in the same block."""
    if block_of(loose.path) != block_of(weight.path):
        return False
    sides = [axes[i] for positions in weight.tensors.values() for i in positions if axes[i].role in roles]
    held = [axes[i] for positions in loose.tensors.values() for i in positions]
    held = [a for a in held if (a.channels != STAYS).any() or (a.owners != STAYS).any()] or held
    return all(any(np.array_equal(a.components, s.components) for s in sides) for a in held)


def _join(weight: _Draft, loose: _Draft, after: bool) -> None:
    weight.tensors |= loose.tensors
    (weight.names if after else weight.before).extend(loose.names)


def _in_order(values: np.ndarray) -> list[tuple[int, int]]:
    """Returns distinct values with their counts, in order of first appearance."""
    found, first, counts = np.unique(values, return_index=True, return_counts=True)
    order = np.argsort(first)
    return list(zip(found[order].tolist(), counts[order].tolist(), strict=True))


def _sections(layers: Sequence[Layer]) -> list[Section]:
    """Returns layers of one block that follow each other as one section, others each as one of their own."""
    sections: list[Section] = []
    for layer in layers:
        if layer.block and sections and sections[-1].title == layer.block:
            sections[-1] = replace(sections[-1], layers=(*sections[-1].layers, layer))
        else:
            sections.append(Section(layer.block, 1, (layer,)))
    return sections


class _Folding:
    """Finds sections that repeat: alike layer by layer, their groups the same ones or placed alike around them."""

    def __init__(self, network: Network, sections: Sequence[Section]) -> None:
        """Collects what sections are compared by: their own look, and where each group lies."""
        self._network = network
        self._sections = sections
        group_of = groups_of(network)
        self._looks: list[object] = []
        self._groups: list[list[int]] = []
        self._footprints: dict[int, list[tuple[int, int]]] = {}
        for number, section in enumerate(sections):
            look, groups = self._look(section, group_of)
            self._looks.append(look)
            self._groups.append(groups)
            for place, group in enumerate(groups):
                self._footprints.setdefault(group, []).append((number, place))

    def fold(self) -> tuple[list[Section], list[int]]:
        """Returns the sections with repeats left out, and for each group the one shown in its place."""
        folded: list[Section] = []
        repeats: list[range] = []
        start = 0
        while start < len(self._sections):
            unit, times = self._repeats(start)
            for i in range(start, start + unit):
                repeats.append(range(i, i + unit * times, unit))
                folded.append(_as_one([self._sections[j] for j in repeats[-1]]))
            start += unit * times
        stands_for = list(range(len(self._network.groups)))
        # A group that a layer hands on to the next of its kind lies in shown and in hidden sections: it is shown.
        shown = {group for alike in repeats for group in self._groups[alike[0]]}
        for alike in repeats:
            for j in alike[1:]:
                for group, hidden in zip(self._groups[alike[0]], self._groups[j], strict=True):
                    if hidden not in shown and stands_for[hidden] == hidden:
                        stands_for[hidden] = group
        return folded, stands_for

    def _repeats(self, start: int) -> tuple[int, int]:
        """Returns how many sections from `start` on repeat together, and how many times they stand there."""
        for unit in range(1, _LONGEST_UNIT + 1):
            times = 1
            while all(self._alike(start + i, start + times * unit + i) for i in range(unit)):
                times += 1
            if times > 1 and (self._sections[start].title or times > 2):
                return unit, times
        return 1, 1

    def _alike(self, i: int, j: int) -> bool:
        if j >= len(self._sections) or self._looks[i] != self._looks[j]:
            return False
        pairs = zip(self._groups[i], self._groups[j], strict=True)
        return all(g == h or self._is_shifted(g, h, j - i) for g, h in pairs)

    def _is_shifted(self, group: int, other: int, by: int) -> bool:
        first, second = self._footprints[group], self._footprints[other]
        return len(first) == len(second) and all((n + by, p) == q for (n, p), q in zip(first, second, strict=True))

    def _look(self, section: Section, group_of: np.ndarray) -> tuple[object, list[int]]:
        """Returns what sections that are alike have in common, and the groups at each of their axes."""
        look: list[object] = [re.sub(r"\d+", "*", section.title)]
        groups: list[int] = []
        for layer in section.layers:
            look.append((layer.names if section.title else re.sub(r"\d+", "*", layer.name), layer.stays))
            look += [tuple((p.count, p.note) for p in s.parts) for s in (*layer.takes, *layer.makes, *layer.holds)]
            for i in layer.axes:
                axis = self._network.axes[i]
                here = [g for n in (axis.channels, axis.owners) for g, _ in _in_order(group_of[n]) if g != STAYS]
                shapes = [(self._network.groups[g].family, self._network.groups[g].channels.shape) for g in here]
                look.append((axis.dim, axis.role, axis.channels.size, tuple(shapes)))
                groups += here
        return look, groups


def _as_one(alike: Sequence[Section]) -> Section:
    """Returns the section that stands for all; without a title if there is little that it would stand over."""
    first = alike[0]
    title = merged([section.title or section.layers[0].name for section in alike])[0][0]
    if not first.title:
        return Section("", len(alike), first.layers if len(alike) == 1 else (replace(first.layers[0], names=(title,)),))
    if len(alike) == 1 and len(first.layers) < 3:
        full = [replace(y, names=tuple(f"{first.title}.{name}" for name in y.names)) for y in first.layers]
        return Section("", 1, tuple(full))
    return Section(title, len(alike), first.layers)


def _ties(network: Network, stands_for: Sequence[int]) -> Iterator[tuple[frozenset[int], str]]:
    """Yields the groups, as shown, whose widths links keep equal, and the first such link in words.

    Links of one pattern, as every block has one between the dimensions of its heads, are told together.
    """
    group_of = groups_of(network)
    alike: dict[str, list[tuple[set[int], str]]] = {}
    for link in network.links:
        groups = {int(g) for node in link.nodes for g in np.unique(group_of[node.channels]) if g != STAYS}
        if len(groups) > 1:
            text = link_text(network, link)
            alike.setdefault(re.sub(r"\d+", "*", text), []).append(({stands_for[g] for g in groups}, text))
    for links in alike.values():
        more = f"; likewise {len(links) - 1} more, each by itself" if len(links) > 1 else ""
        yield frozenset().union(*(groups for groups, _ in links)), links[0][1] + more
