"""The report of a study: one HTML file that needs nothing else, with its tables as Markdown and LaTeX beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from secateur.errors import DataError, InputError
from secateur.files import write_text
from secateur.report import answer, grids, panels, published
from secateur.report.choice import choice_table
from secateur.report.figure import save_figure
from secateur.report.grids import ABSENT, Cell, Column, Grid, Row, percent
from secateur.report.latex import latex, markdown_grids
from secateur.report.results import RESULTS, Result, write_results
from secateur.report.summary import Block, Run, blocks, data_name, distinct, flat
from secateur.report.table import clock, markdown, quantity

_CONTENTS = (
    ("answer", "The answer"),
    ("tables", "Tables"),
    ("figures", "Figures"),
    ("domains", "Per domain"),
    ("widths", "Widths"),
    ("curves", "Training curves"),
    ("runs", "All runs"),
    ("failures", "Failures"),
    ("paper", "Published figures"),
    ("origin", "Origin"),
)
HTML, TABLES_MARKDOWN, TABLES_LATEX, TABLE, FIGURE = (
    "report.html",
    "tables.md",
    "tables.tex",
    "table.md",
    "accuracy.png",
)


@dataclass(frozen=True)
class _Failure:
    index: int
    title: str
    error: str


def save_report(results: Sequence[Result], out: Path, *, under_way: int = 0) -> tuple[Path, ...]:
    """Writes the report of `results` into the folder `out` and returns the files: HTML, tables, and figure if any.

    `report.html` opens without a network. `tables.md` and `tables.tex` hold the same tables of means, `table.md` every
    run on its own, `results.jsonl` all that is known of each; `accuracy.png` is there if any pruned run with a dense
    baseline reached its end. `under_way` is the number of runs that have not ended, for the report to tell.

    Raises:
        DataError: There is no run.
        InputError: jinja2 or matplotlib are not installed.
    """
    page = render(results, under_way=under_way)
    runs = distinct(results)
    found = _ordered(blocks(runs))
    shown = tables(found)
    texts = {HTML: page, TABLES_MARKDOWN: markdown_grids(shown), TABLES_LATEX: latex(shown), TABLE: markdown(runs)}
    for name, text in texts.items():
        write_text(out / name, text)
    write_results(out / RESULTS, results)
    written = [out / name for name in (*texts, RESULTS)]
    if any(panels.ratio_figure(block) for block in found):
        save_figure(runs, out / FIGURE)
        written.append(out / FIGURE)
    return tuple(written)


def tables(found: Sequence[Block]) -> tuple[Grid, ...]:
    """Returns the tables of means: the answer, Tables I to IV, accuracies per unseen domain, and choosing by them."""
    answers = [answer.answer(block).grid for block in found]
    models = [grid for block in found for grid in grids.tables_two_to_four(block)]
    return (*(grid for grid in answers if grid), grids.table_one(found), *models, *_unseen_tables(found))


def _unseen_tables(found: Sequence[Block]) -> list[Grid]:
    """Returns the accuracies per unseen domain, and what choosing among the methods gets there."""
    tables = [grids.unseen_table(block) for block in found if block.is_generalisation]
    return tables + [grid for block in found if (grid := choice_table(block)) is not None]


def render(results: Sequence[Result], *, under_way: int = 0) -> str:
    """Returns the HTML of the report.

    Raises:
        DataError: There is no run.
        InputError: jinja2 or matplotlib are not installed.
    """
    if all(result.without for result in results):
        raise DataError("nothing to report: there is no run, other than folds of cross-validation")
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"reports need {error.name}: pip install 'secateur[report]'") from error
    templates = files("secateur.report") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (templates / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html")
    assets = {name: (templates / f"report.{suffix}").read_text("utf-8") for name, suffix in _ASSETS.items()}
    return page.render(**_content(results, under_way), **assets)


_ASSETS = {"style": "css", "script": "js"}


def _content(results: Sequence[Result], under_way: int) -> dict[str, Any]:
    """Returns everything that the page shows."""
    runs = distinct(results)
    found = _ordered(blocks(runs))
    everything = sorted((run for b in found for run in (*b.runs, *b.folds)), key=lambda run: run.index)
    answers = [answer.answer(block) for block in found]
    sources = [grids.OURS] + (["paper"] if any("paper" in _sources(g) for g in tables(found)) else [])
    drawn = [figure for b in found for figure in (panels.ratio_figure(b), panels.pareto_figure(b)) if figure]
    return {
        "title": f"Pruned models on {', '.join(dict.fromkeys(data_name(run.data) for run in runs))}",
        "counts": _counts(runs, len(results) - len(runs), under_way),
        "contents": _CONTENTS,
        "answers": [
            {**vars(one), "doubtful": b.is_oracle or not b.is_generalisation}
            for b, one in zip(found, answers, strict=True)
        ],
        "filters": _filters(everything, sources),
        "tables": (grids.table_one(found), *(grid for block in found for grid in grids.tables_two_to_four(block))),
        "figures": drawn,
        "unseen_tables": _unseen_tables(found),
        "domain_tables": [grid for block in found for grid in grids.domain_tables(block)],
        "width_tables": [grid for block in found for grid in grids.width_tables(block)],
        "curves": [figure for block in found for figure in panels.curve_figures(block)],
        "all_runs": _all_runs(everything),
        "failures": [
            _Failure(run.index, _title(run), run.result.error or "no error was recorded")
            for run in everything
            if run.result.status == "failed"
        ],
        "paper": published.PAPER,
        "paper_note": _paper_note(found),
        "known_wrong": published.KNOWN_WRONG,
        "paper_grid": _paper_grid(),
        "origin": _origin(runs),
        "details": _details(everything),
        "spans": lambda grid: [(name, len(list(run))) for name, run in groupby(c.group for c in grid.columns)],
    }


def _ordered(found: Sequence[Block]) -> tuple[Block, ...]:
    """Returns blocks that answer the question before those that do not."""
    return tuple(sorted(found, key=lambda block: (not block.is_generalisation, block.is_oracle)))


def _sources(grid: Grid) -> set[str]:
    return {row.facets.get("source", "") for row in grid.rows}


def _counts(runs: Sequence[Result], repeated: int, under_way: int) -> str:
    failed = sum(run.status == "failed" for run in runs)
    parts = [f"{len(runs) - failed} runs reached their end", f"{failed} failed"]
    parts += [f"{under_way} are still under way or were cut short"] if under_way else []
    parts += [f"{repeated} were run again or given twice, so that only the last of each counts"] if repeated else []
    dates = sorted(run.created for run in runs if run.created)
    when = f" The last of them ended at {dates[-1]}." if dates else ""
    return f"{', '.join(parts)}.{when}"


def _filters(runs: Sequence[Run], sources: Sequence[str]) -> dict[str, list[str]]:
    """Returns the values to choose from, those with a single one left out."""
    ratios = sorted({run.result.ratio for run in runs})
    values = {
        "model": list(dict.fromkeys(run.result.model for run in runs)),
        "method": list(dict.fromkeys(run.method for run in runs)),
        "ratio": [percent(ratio) if ratio else "dense" for ratio in ratios],
        "data": list(dict.fromkeys(data_name(run.result.data) for run in runs)),
        "source": list(sources),
    }
    return {name: choices for name, choices in values.items() if len(choices) > 1}


def _title(run: Run) -> str:
    result = run.result
    amount = f" at {percent(result.ratio)}" if not result.is_dense else ""
    unseen = f", {result.left_out}" if result.unseen else ""
    return f"{result.model}, {run.method}{amount}, {data_name(result.data)}{unseen}, seed {result.seed}"


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _all_runs(runs: Sequence[Run]) -> Grid:
    """Returns every run on its own."""
    words, numbers = (
        ("Model", "Group score"),
        ("Valid acc. %", "Test acc. %", "ΔAcc points", "Params left", "MACs left"),
    )
    more = ("ms per batch", "Pruning s", "FT time HH:MM:SS", "Train images/s")
    columns = (
        *(Column(name, is_number=False) for name in words),
        *(Column("Ratio"), Column("Data", is_number=False), Column("Unseen", is_number=False), Column("Seed")),
        *(Column(name) for name in (*numbers, *more)),
        *(Column("State", is_number=False), Column("Run", is_number=False)),
    )
    return Grid("Every run", columns, tuple(map(_run_row, runs)))


def _run_row(run: Run) -> Row:
    r = run.result

    def cell(value: float | None, form: str, scale: float = 1.0) -> Cell:
        text = ABSENT if value is None else format(scale * value, form).replace("-", "\N{MINUS SIGN}")
        return Cell(text, None if value is None else scale * value)

    cells = (
        *(Cell(r.model), Cell(run.method), Cell("" if r.is_dense else percent(r.ratio), r.ratio)),
        *(Cell(data_name(r.data)), Cell(r.left_out.removeprefix("unseen ") or "pooled (i.i.d.)")),
        Cell(str(r.seed), r.seed),
        *(cell(r.val_acc, ".2f"), cell(r.test_acc, ".2f"), cell(None if r.is_dense else r.delta_acc, "+.2f")),
        Cell(ABSENT) if r.params is None else Cell(quantity(r.params), r.params),
        Cell(ABSENT) if r.macs is None else Cell(quantity(r.macs), r.macs),
        *(cell(r.latency, ".3g", 1000.0), cell(r.prune_seconds, ".2f")),
        Cell(ABSENT) if r.finetune_seconds is None else Cell(clock(r.finetune_seconds), r.finetune_seconds),
        *(cell(r.train_images_per_second, ".4g"), Cell(r.status), Cell(r.run or r.config_hash)),
    )
    facets = {
        "model": r.model,
        "method": run.method,
        "ratio": "dense" if r.is_dense else percent(r.ratio),
        "data": data_name(r.data),
        "source": grids.OURS,
    }
    return Row(cells, "missing" if r.status == "failed" else "dense" if r.is_dense else "pruned", (run.index,), facets)


def _paper_note(found: Sequence[Block]) -> str:
    beside = any("paper" in _sources(grid) for grid in tables(found))
    said = (
        "Published figures stand beside ours where model, data, ratio and criterion are the same; that does not make "
        "the protocol the same, and recipe, batch size and hardware of the paper are not all known."
        if beside
        else "None of these runs has a model, data, ratio and criterion of the paper, so its figures stand alone."
    )
    return f"{said} Most of what follows can be checked by arithmetic on the published cells."


def _paper_grid() -> Grid:
    """Returns all published rows."""
    words = ("Table", "Model", "Data")
    labels = ("Params left (M)", "MACs left (G)", "Valid acc. %", "Test acc. %", "ΔAcc points", "“Speed-up”", "FT time")
    columns = (
        *(Column(name, is_number=False) for name in words),
        *(Column("Ratio"), Column("Group score", is_number=False), *map(Column, labels)),
    )
    rows = []
    for row in published.published():
        figures = (row.params_m, row.macs_g, row.val_acc, row.test_acc, row.delta_acc, row.speed_up)
        cells = (
            *(Cell(row.table), Cell(row.model), Cell({"pacs": "PACS", "officehome": "Office-Home"}[row.data])),
            *(Cell(percent(row.ratio) if row.ratio else "", row.ratio), Cell(row.criterion or "dense")),
            *(*map(grids.quoted, figures), Cell(row.finetune_time)),
        )
        rows.append(Row(cells, "paper"))
    notes = ("PACS: test is pooled domains on all evidence. Office-Home: test is Clipart.",)
    return Grid(f"Tables I to IV of {published.PAPER}", columns, tuple(rows), notes)


def _origin(runs: Sequence[Result]) -> list[tuple[str, str]]:
    """Returns what the runs were made with: hardware, commit, versions."""

    def together(values: Sequence[str]) -> str:
        return "; ".join(dict.fromkeys(value for value in values if value)) or "not recorded"

    packages = sorted({name for run in runs for name in run.versions})
    facts = [("Hardware", [run.hardware for run in runs]), ("Commit", [run.commit or "" for run in runs])]
    facts += [
        ("Choice of the epoch", [run.selection.partition(":")[0] for run in runs]),
        ("Protocol", [run.protocol for run in runs]),
    ]
    facts += [(package, [run.versions.get(package, "") for run in runs]) for package in packages]
    return [(name, together(values)) for name, values in facts]


def _details(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns what the page shows of a run on demand: what all configurations share, and each run's own part."""
    configs: list[Mapping[str, str]] = [{k: _said(v) for k, v in flat(run.result.config)} for run in runs]
    shared = {k: v for k, v in configs[0].items() if len(runs) > 1 and all(c.get(k) == v for c in configs)}
    entries = []
    for run, config in zip(runs, configs, strict=True):
        own = {k: v for k, v in config.items() if k not in shared}
        entries.append({"title": _title(run), "facts": _facts(run), "command": run.result.command, "config": own})
    return {"common": shared, "runs": entries}


def _facts(run: Run) -> list[tuple[str, str]]:
    row = _run_row(run)
    labels = [column.label for column in _all_runs(()).columns]
    facts = [(label, cell.text) for label, cell in zip(labels, row.cells, strict=True) if cell.text not in ("", ABSENT)]
    facts = [fact for fact in facts if fact[0] not in ("Model", "Group score", "Ratio", "Data", "Unseen", "Seed")]
    accs = ", ".join(f"{domain} {acc:.1f}" for domain, acc in sorted(run.result.domain_acc.items()))
    more = (("Per domain", accs), ("Epoch", run.result.selection), ("Error", run.result.error or ""))
    return facts + [fact for fact in more if fact[1]]
