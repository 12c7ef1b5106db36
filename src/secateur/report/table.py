"""The table of a study, for the terminal and as Markdown: one section per model, its dense baseline first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from secateur.report.results import Result

COLUMNS = (
    "Ratio",
    "Criterion",
    "Params\nleft",
    "MACs\nleft",
    "Valid\nacc. %",
    "Test\nacc. %",
    "ΔAcc\npoints",
    "MACs\nratio\ncounted",
    "Latency\nratio\nmeasured",
    "FT time\nHH:MM:SS",
)
_UNSEEN = "Valid: held-out images of the domains trained on. Test: all images of the unseen domain."
_POOLED = "Valid and test: held-out images of the same pooled domains (i.i.d.); this is not domain generalisation."
_BOTH = (
    "ΔAcc: test accuracy minus that of the dense model fine-tuned the same way. "
    "Ratios: dense over remaining, multiply-accumulates counted, latency timed on this machine."
)
_ABSENT = "-"


@dataclass(frozen=True)
class Section:
    """The rows of one model under one protocol: what is compared with one dense baseline."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    failures: tuple[str, ...]


def quantity(count: int) -> str:
    """Returns a count with three significant digits and k, M or G."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            value = count / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {letter}"
    return str(count)


def clock(seconds: float) -> str:
    """Returns a duration as HH:MM:SS."""
    whole = round(seconds)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"


def sections(results: Sequence[Result]) -> tuple[Section, ...]:
    """Returns the rows of every model, protocol, unseen domain, seed and scope; by rising ratio within each.

    The dense baseline has no scope: it stands in the section of each.
    """
    parts: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        key = (result.model, result.data, result.protocol, result.unseen, result.without, result.seed)
        parts.setdefault(key, []).append(result)
    found = []
    for part in parts.values():
        scopes = dict.fromkeys(result.scope for result in part if not result.is_dense) or {part[0].scope: None}
        found += [_section([r for r in part if r.is_dense or r.scope == scope], scope) for scope in scopes]
    return tuple(found)


def _section(part: list[Result], scope: str) -> Section:
    first = part[0]
    ordered = sorted(part, key=lambda result: (not result.is_dense, result.ratio))
    unseen = f", {first.left_out}" if first.unseen else ""
    ranked = f"{scope} scope, " if scope else ""
    title = f"{first.model} on {first.data}, {first.protocol}{unseen}; {ranked}seed {first.seed}"
    failures = tuple(f"{_name(r)} at {r.ratio:.0%} failed: {r.error}" for r in ordered if r.status == "failed")
    return Section(title, tuple(_row(result) for result in ordered), failures)


def _name(result: Result) -> str:
    return "dense" if result.criterion is None else result.criterion


def _row(result: Result) -> tuple[str, ...]:
    def cell(value: float | None, form: str) -> str:
        return _ABSENT if value is None else format(value, form)

    return (
        _ABSENT if result.is_dense else f"{result.ratio * 100:g} %",
        _name(result),
        _ABSENT if result.params is None else quantity(result.params),
        _ABSENT if result.macs is None else quantity(result.macs),
        "failed" if result.status == "failed" else cell(result.val_acc, ".2f"),
        "failed" if result.status == "failed" else cell(result.test_acc, ".2f"),
        _ABSENT if result.is_dense else cell(result.delta_acc, "+.2f"),
        cell(result.macs_ratio, ".2f"),
        cell(result.latency_ratio, ".2f"),
        _ABSENT if result.finetune_seconds is None else clock(result.finetune_seconds),
    )


def _notes(results: Sequence[Result]) -> list[str]:
    unseen = [_UNSEEN] if any(r.unseen for r in results) else []
    pooled = [_POOLED] if any(not r.unseen for r in results) else []
    return unseen + pooled + [_BOTH]


def table(results: Sequence[Result]) -> RenderableType:
    """Returns the table of a study for a rich console."""
    parts: list[RenderableType] = []
    for section in sections(results):
        grid = Table(title=escape(section.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0)
        for i, column in enumerate(COLUMNS):
            grid.add_column(column, justify="left" if i == 1 else "right", vertical="bottom", no_wrap=True)
        previous = section.rows[0][0]
        for row in section.rows:
            if row[0] != previous:
                grid.add_section()
                previous = row[0]
            grid.add_row(*map(escape, row), style="bold" if row[1] == "dense" else "")
        parts += [grid, *(f"[red]{escape(failure)}[/red]" for failure in section.failures), ""]
    return Group(*parts, *(f"[dim]{note}[/dim]" for note in _notes(results)))


def markdown(results: Sequence[Result]) -> str:
    """Returns the table of a study as Markdown."""
    lines: list[str] = []
    for section in sections(results):
        lines += [f"### {section.title}", "", _line([column.replace("\n", " ") for column in COLUMNS])]
        lines += [_line([":--" if i == 1 else "--:" for i in range(len(COLUMNS))])]
        lines += [_line(row) for row in section.rows]
        lines += ["", *(f"- {failure}" for failure in section.failures)]
        lines += [""] if section.failures else []
    return "\n".join(lines + [f"{note}\n" for note in _notes(results)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
