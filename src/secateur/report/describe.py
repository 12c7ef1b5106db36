"""A network, or what a plan does to it, in tables: families, groups with their widths, cost, and what stays and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from secateur.allocation import Plan
from secateur.graph.network import Frozen, Network
from secateur.report.layers import find_notes
from secateur.report.table import quantity


@dataclass(frozen=True)
class _Row:
    """A group as shown: fibres x width before and, under a plan, after it."""

    name: str
    family: str
    before: tuple[int, int]
    after: tuple[int, int] = (0, 0)


def describe(network: Network) -> RenderableType:
    """Returns what is prunable in `network`: cost, families with their groups and widths, and what stays and why."""
    return Stack(*overview(network), *_left_alone(network.frozen), *unknown_operators(network))


def overview(network: Network) -> list[RenderableType]:
    """Returns the cost of a network, and its families with their groups and widths."""
    rows = [_Row(g.name, g.family, (int(g.channels.shape[0]), int(g.channels.shape[1]))) for g in network.groups]
    head = (
        f"{network.params:,} parameters ({quantity(network.params)}), "
        f"{network.macs:,} MACs per example ({quantity(network.macs)})\n"
        f"{len(rows)} groups in {len(network.families)} families, {len(network.residuals)} residual branches"
    )
    grid = _grid("family", "groups", "channels", "width of each", numbers=(2,))
    for family, members in _together(rows):
        channels = sum(_count(row.before) for row in members)
        cells = (family, _pattern([row.name for row in members]), f"{channels:,}", _runs([r.before for r in members]))
        grid.add_row(*map(escape, cells))
    return [head, grid]


def unknown_operators(network: Network) -> list[RenderableType]:
    """Returns a line for each operator that there is no rule for."""
    return [
        f"[yellow]no rule for {escape(operator)}[/yellow]: all that it touches is left alone; {escape(where)}"
        for operator, where in network.unknown_operators
    ]


def describe_plan(plan: Plan) -> RenderableType:
    """Returns what `plan` does: cost and channels before and after, the widths of all groups, and notes."""
    rows = [_Row(g.name, g.family, g.before, g.after) for g in plan.groups]
    summary = _grid("", "dense", "remaining", "left", "dense/left", numbers=(1, 2, 3, 4))

    def line(name: str, dense: int, left: int) -> None:
        cells = (name, f"{dense:,}", f"{left:,}", f"{left / max(1, dense):.1%}", f"{dense / max(1, left):.2f}")
        summary.add_row(*map(escape, cells))

    line("parameters", plan.dense_params, plan.params)
    line("MACs per example", plan.dense_macs, plan.macs)
    summary.add_section()
    for family in sorted({row.family for row in rows}):
        mine = [row for row in rows if row.family == family]
        line(f"channels of {family}", sum(_count(r.before) for r in mine), sum(_count(r.after) for r in mine))
    widths = _grid("groups", "width", "kept")
    for _, members in _together(rows):
        cells = (
            _pattern([r.name for r in members]),
            _runs([r.before for r in members]),
            _runs([r.after for r in members]),
        )
        widths.add_row(*map(escape, cells))
    dropped = [f"residual branches dropped: {escape(', '.join(plan.branches))}"] if plan.branches else []
    return Stack(summary, widths, *dropped, *(f"[yellow]note:[/yellow] {escape(note)}" for note in plan.notes))


def _grid(*columns: str, numbers: Sequence[int] = ()) -> Table:
    """Returns an empty table; the columns at the positions `numbers` hold numbers, the last one may take many lines."""
    grid = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, column in enumerate(columns):
        justify = "right" if i in numbers else "left"
        grid.add_column(column, justify=justify, overflow="fold", no_wrap=i < len(columns) - 1)
    return grid


def _together(rows: Sequence[_Row]) -> list[tuple[str, list[_Row]]]:
    """Returns the groups of each family whose names differ only in numbers: one per block, as a rule."""
    together: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        together.setdefault((row.family, re.sub(r"\d+", "*", row.name)), []).append(row)
    return sorted(((family, members) for (family, _), members in together.items()), key=lambda item: item[0])


def _count(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _runs(shapes: Sequence[tuple[int, int]]) -> str:
    """Returns widths in order, equal neighbours together: `3072 (12x)`; fibres as `3x64`."""
    parts = []
    for shape, run in groupby(shapes):
        times = len(list(run))
        text = str(shape[1]) if shape[0] == 1 else f"{shape[0]}x{shape[1]}"
        parts.append(text if times == 1 else f"{text} ({times}x)")
    return ", ".join(parts)


def _pattern(names: Sequence[str]) -> str:
    """Returns what the names have in common, with `*` for the numbers in which they differ."""
    pieces = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(piece[0] if len(set(piece)) == 1 else "*" for piece in pieces)


def _left_alone(frozen: Sequence[Frozen]) -> Iterable[RenderableType]:
    """Yields the axes that stay, in one row those that stay for one reason found at one line of code."""
    notes = find_notes(frozen)
    if not notes:
        return
    grid = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    grid.add_column("left alone (number of indices)", overflow="fold", ratio=2)
    grid.add_column("why, and where", overflow="fold", ratio=3)
    for note in notes:
        first, *others = note.axes
        more = f" and {len(others)} more" if others else ""
        axes = f"{first.tensor}[dim {first.dim}]{more} ({sum(axis.count for axis in note.axes):,})"
        grid.add_row(escape(axes), escape(f"{note.reason}: {first.where}"))
    yield grid
