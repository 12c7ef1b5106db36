"""Choosing among methods: what one would choose without the unseen domain, and what one would if one had it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from secateur.report.grids import Cell, Column, Grid, Row, number, percent, val_acc
from secateur.report.grids import test_acc as accuracy
from secateur.report.summary import Block, Estimate, Measure, Run, Setting

VALIDATION = "chosen by training-domain validation"
ORACLE = "chosen by the unseen domain itself (oracle)"
_NOTES = (
    "For every unseen domain and seed the method with the best accuracy on held-out images of the domains that were "
    "trained on is chosen (DomainBed's training-domain validation), and what it gets on the unseen domain is averaged; "
    "of equals the first in the order of the tables above.",
    "The oracle chooses by the test images that it is then measured on: an upper bound, not to be compared with "
    "anything that was chosen on the source domains.",
)


def choice_table(block: Block) -> Grid | None:
    """Returns what choosing among the methods gets on the unseen domains; None where there is no choice to be made."""
    if not block.is_generalisation or block.is_oracle:
        return None
    found = (_row(block, model, ratio) for model in block.models for ratio in _ratios(block, model))
    rows = tuple(row for row in found if row is not None)
    columns = (
        *(Column("Model", is_number=False), Column("Ratio")),
        *(Column("how often", VALIDATION, is_number=False), Column("Test acc. %", VALIDATION)),
        *(Column("how often", ORACLE, is_number=False), Column("Test acc. %", ORACLE)),
        Column("Lost points"),
    )
    return Grid(f"Choosing among the criteria, {block.title}", columns, rows, _NOTES) if rows else None


def _ratios(block: Block, model: str) -> list[float]:
    return sorted({setting.ratio for setting in block.settings(model) if setting.ratio})


def _row(block: Block, model: str, ratio: float) -> Row | None:
    """Returns the row of a model at a ratio, None if fewer than two methods have accuracies there."""
    settings = [s for s in block.settings(model) if s.ratio == ratio]
    if sum(setting.estimate(accuracy) is not None for setting in settings) < 2:
        return None
    honest, oracle = (_chosen(settings, measure) for measure in (val_acc, accuracy))
    gets, could = honest.estimate(accuracy), oracle.estimate(accuracy)
    if gets is None or could is None:
        return None
    cells = (
        *(Cell(model), Cell(percent(ratio), ratio), Cell(_counted(honest.runs)), number(gets)),
        *(Cell(_counted(oracle.runs)), number(could), number(Estimate(could.mean - gets.mean, None, 1))),
    )
    return Row(cells, "pruned", honest.indices, {"model": model, "ratio": percent(ratio)})


def _chosen(settings: Sequence[Setting], measure: Measure) -> Setting:
    """Returns, of the runs with each unseen domain and seed, the one that is best by a measure."""
    best: dict[tuple[str | None, int], tuple[float, Run]] = {}
    for run in (run for setting in settings for run in setting.runs):
        value, place = measure(run.result), (run.result.unseen, run.result.seed)
        if run.result.status == "ok" and value is not None and (place not in best or value > best[place][0]):
            best[place] = value, run
    first = settings[0]
    return Setting(first.model, "", first.ratio, tuple(run for _, run in best.values()), first.domains)


def _counted(runs: Sequence[Run]) -> str:
    return ", ".join(f"{method} {times}" for method, times in Counter(run.method for run in runs).most_common())
