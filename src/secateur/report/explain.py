"""A network in words, layer by layer: what each takes and makes, what goes with a channel, what stays and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from secateur.graph.network import STAYS, Network, merged
from secateur.report.describe import overview, unknown_operators
from secateur.report.layers import Layout, Side, lay_out

_MOST_PLACES = 12
"""Places of a channel that are listed for a group; `Network.explain` lists all."""


def explain(network: Network) -> RenderableType:
    """Returns all that `describe` does not say: layers, what goes with a channel of each group, and what stays.

    Blocks that are alike are told once. A number in brackets refers to the reasons at the end.
    """
    layout = lay_out(network)
    return Stack(
        *overview(network),
        _layers(network, layout),
        "What goes with one channel of each group",
        *(Padding(escape(line), (0, 0, 0, indent), expand=False) for indent, line in _groups(network, layout)),
        *_list("Residual branches: what goes when one is dropped", list(_branches(network))),
        *_list("What must keep equal widths", [text for _, text in layout.ties]),
        *_list("What stays, and why", [f"[{i}] {note}" for i, note in enumerate(layout.notes, 1)]),
        *unknown_operators(network),
    )


def _layers(network: Network, layout: Layout) -> RenderableType:
    grid = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("layer", "takes", "makes or holds", "stays"):
        grid.add_column(column, overflow="fold")
    for section in layout.sections:
        times = f" ({section.times} alike)" if section.times > 1 else ""
        if section.title:
            grid.add_row(f"[bold]{escape(section.title)}[/bold]{times}")
        for layer in section.layers:
            stays = ", ".join(f"{' x '.join(map(str, sizes))} [{note}]" for sizes, note in layer.stays)
            name = f"  {layer.name}" if section.title else layer.name + times
            made = _sides(network, layer.makes or layer.holds)
            grid.add_row(*map(escape, (name, _sides(network, layer.takes), made, stays)))
    return grid


def _sides(network: Network, sides: Sequence[Side]) -> str:
    """Returns axes as `2304: 1536 head_dims.qk, 768 head_dims.v in heads`."""
    texts = []
    for side in sides:
        counts: dict[str, int] = {}
        for part in side.parts:
            kind = f"[{part.note}]" if part.group == STAYS else network.groups[part.group].family
            counts[kind] = counts.get(kind, 0) + part.count
        inside = f" in {' and '.join(network.groups[g].family for g in side.heads)}" if side.heads else ""
        if len(counts) == 1:
            texts.append(f"{side.size} {next(iter(counts))}{inside}")
        else:
            texts.append(f"{side.size}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()) + inside)
    return "; ".join(texts)


def _groups(network: Network, layout: Layout) -> Iterator[tuple[int, str]]:
    """Yields lines with their indents: each group that is shown, how many are alike, and where its channels lie."""
    alike: dict[int, list[str]] = {}
    for number, shown in enumerate(layout.stands_for):
        alike.setdefault(shown, []).append(network.groups[number].name)
    for number, names in alike.items():
        group = network.groups[number]
        others = ", ".join(name + times for name, times in merged(names))
        yield 1, f"{group}" + (f"; alike are {others}" if len(names) > 1 else "")
        places = network.goes_with(group)
        for place in places[:_MOST_PLACES]:
            yield 3, place
        if len(places) > _MOST_PLACES:
            yield 3, f"and {len(places) - _MOST_PLACES} more"


def _branches(network: Network) -> Iterator[str]:
    """Yields what residual branches cost, and why they stay if they do; those that are alike share a line."""
    alike: dict[str, list[str]] = {}
    for residual in network.residuals:
        alike.setdefault(str(residual).removeprefix(residual.name), []).append(residual.name)
    for text, names in alike.items():
        yield from (f"{name}{times}{text}" for name, times in merged(names))


def _list(title: str, lines: Sequence[str]) -> Iterator[RenderableType]:
    if lines:
        yield f"\n{title}"
        yield from (Padding(escape(line), (0, 0, 0, 1), expand=False) for line in lines)
