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
from secateur.report.table import quantity


@dataclass(frozen=True)
class _Row:
    """A group as shown: fibres x width before and, under a plan, after."""

    name: str
    family: str
    before: tuple[int, int]
    after: tuple[int, int] | None = None


def describe(network: Network) -> RenderableType:
    """Returns what is prunable in `network`: cost, families with their groups and widths, and what stays and why."""
    rows = [_Row(g.name, g.family, (int(g.channels.shape[0]), int(g.channels.shape[1]))) for g in network.groups]
    head = (
        f"{network.params:,} parameters ({quantity(network.params)}), "
        f"{network.macs:,} multiply-accumulates per example ({quantity(network.macs)})\n"
        f"{len(rows)} groups in {len(network.families)} families, {len(network.residuals)} residual branches"
    )
    unknown = [
        f"[yellow]no rule for {escape(operator)}[/yellow]: all that it touches is left alone; {escape(where)}"
        for operator, where in network.unknown_operators
    ]
    return Stack(head, _groups(rows), *_left_alone(network.frozen), *unknown)


def describe_plan(plan: Plan) -> RenderableType:
    """Returns what `plan` does: cost before and after, families with their groups and widths, and notes."""
    cost = _grid("", "dense", "remaining", "left", "dense/left", left=1)
    for name, dense, left in (
        ("parameters", plan.dense_params, plan.params),
        ("multiply-accumulates per example", plan.dense_macs, plan.macs),
    ):
        cost.add_row(name, f"{dense:,}", f"{left:,}", f"{left / max(1, dense):.1%}", f"{dense / max(1, left):.2f}")
    notes = [f"[yellow]note:[/yellow] {escape(note)}" for note in plan.notes]
    return Stack(cost, _groups([_Row(g.name, g.family, g.before, g.after) for g in plan.groups]), *notes)


def _grid(*columns: str, left: int) -> Table:
    """Returns an empty table whose first `left` columns hold text, the others numbers."""
    grid = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i < left else "right", overflow="fold")
    return grid


def _groups(rows: Sequence[_Row]) -> Table:
    """Returns one row for all groups of a family whose names differ only in numbers: one per block, as a rule."""
    together: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        together.setdefault((row.family, re.sub(r"\d+", "*", row.name)), []).append(row)
    is_plan = any(row.after for row in rows)
    columns = ("family", "groups", *(("width", "kept") if is_plan else ("width",)), "channels")
    grid = _grid(*columns, *(("kept", "left") if is_plan else ()), left=4 if is_plan else 3)
    for (family, _), members in sorted(together.items(), key=lambda item: item[0][0]):
        before = sum(_count(row.before) for row in members)
        cells = [family, _pattern([row.name for row in members]), _runs([row.before for row in members])]
        if is_plan:
            after = sum(_count(row.after or row.before) for row in members)
            kept = _runs([row.after or row.before for row in members])
            cells += [kept, f"{before:,}", f"{after:,}", f"{after / before:.1%}"]
        else:
            cells += [f"{before:,}"]
        grid.add_row(*map(escape, cells))
    return grid


def _count(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _runs(shapes: Sequence[tuple[int, int]]) -> str:
    """Returns widths in order, equal neighbours together: `3072 (12x)`; fibres as `3 x 64`."""
    parts = []
    for shape, run in groupby(shapes):
        times = len(list(run))
        text = str(shape[1]) if shape[0] == 1 else f"{shape[0]} x {shape[1]}"
        parts.append(text if times == 1 else f"{text} ({times}x)")
    return ", ".join(parts)


def _pattern(names: Sequence[str]) -> str:
    """Returns what the names have in common, with `*` for the numbers in which they differ."""
    pieces = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(piece[0] if len(set(piece)) == 1 else "*" for piece in pieces)


def _left_alone(frozen: Sequence[Frozen]) -> Iterable[RenderableType]:
    """Yields the axes that stay, in one row those that stay for one reason found at one line of code."""
    together: dict[tuple[str, str], list[Frozen]] = {}
    for axis in frozen:
        together.setdefault((axis.reason, axis.where.rpartition("(")[2]), []).append(axis)
    if not together:
        return
    grid = _grid("left alone", "why", "where", "indices", left=3)
    for (reason, _), axes in together.items():
        more = f" and {len(axes) - 1} more" if len(axes) > 1 else ""
        first = f"{axes[0].tensor}[dim {axes[0].dim}]{more}"
        grid.add_row(*map(escape, (first, reason, axes[0].where, f"{sum(axis.count for axis in axes):,}")))
    yield grid
