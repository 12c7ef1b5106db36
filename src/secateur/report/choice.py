"""Choosing among methods: what one would choose without the unseen domain, and what one would if one had it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from secateur.report.grids import Cell, Column, Grid, Row, number, percent
from secateur.report.grids import test_acc as accuracy
from secateur.report.summary import Block, Run, Setting

VALIDATION = "chosen by training-domain validation"
CROSS_VALIDATION = "chosen by leave-one-domain-out cross-validation"
ORACLE = "chosen by the unseen domain itself (oracle)"
_NOTE = (
    "For every unseen domain and seed one method is chosen, and what it gets on the unseen domain is averaged; of "
    "equals the first in the order of the tables above. Training-domain validation: the best accuracy on held-out "
    "images of the domains that were trained on. "
)
_NOTE_FOLDS = (
    "Leave-one-domain-out cross-validation: the best mean accuracy of the folds, each trained without the unseen "
    "domain and one more, on that other one. "
)
_NOTE_ORACLE = (
    "The oracle chooses by the test images that it is then measured on: an upper bound, not to be compared with "
    "anything that was chosen on the source domains."
)

Judge = Callable[[Run], float | None]


@dataclass(frozen=True)
class _Folds:
    """The mean accuracy of the folds of cross-validation that go with a run."""

    block: Block

    def __call__(self, run: Run) -> float | None:
        """Returns the mean, None unless there is a fold without each of the domains that any method was judged by."""
        wanted = {fold.result.without for fold in self.block.folds if _place(fold) == _place(run)}
        found = {
            fold.result.without: fold.result.val_acc
            for fold in self.block.folds
            if (*_place(fold), fold.method) == (*_place(run), run.method) and fold.result.val_acc is not None
        }
        return fmean(found.values()) if found and found.keys() == wanted else None


def _place(run: Run) -> tuple[object, ...]:
    return run.result.model, run.result.ratio, run.result.unseen, run.result.seed


def choice_table(block: Block) -> Grid | None:
    """Returns what choosing among the methods gets on the unseen domains; None where there is no choice to be made."""
    if not block.is_generalisation or block.is_oracle:
        return None
    judges: dict[str, Judge] = {VALIDATION: lambda run: run.result.val_acc}
    if block.folds:
        judges[CROSS_VALIDATION] = _Folds(block)
    judges[ORACLE] = lambda run: run.result.test_acc
    found = (_row(block, model, ratio, judges) for model in block.models for ratio in _ratios(block, model))
    rows = tuple(row for row in found if row is not None)
    columns = [Column("Model", is_number=False), Column("Ratio")]
    for judge in judges:
        columns += [Column("how often", judge, is_number=False), Column("Test acc. %", judge)]
    note = _NOTE + (_NOTE_FOLDS if block.folds else "") + _NOTE_ORACLE
    return Grid(f"Choosing among the criteria, {block.title}", tuple(columns), rows, (note,)) if rows else None


def _ratios(block: Block, model: str) -> list[float]:
    return sorted({setting.ratio for setting in block.settings(model) if setting.ratio})


def _row(block: Block, model: str, ratio: float, judges: dict[str, Judge]) -> Row | None:
    """Returns the row of a model at a ratio, None if fewer than two methods have accuracies there."""
    settings = [s for s in block.settings(model) if s.ratio == ratio]
    if sum(setting.estimate(accuracy) is not None for setting in settings) < 2:
        return None
    cells, chosen = [Cell(model), Cell(percent(ratio), ratio)], [_chosen(settings, j) for j in judges.values()]
    for setting in chosen:
        cells += [Cell(_counted(setting.runs)), number(setting.estimate(accuracy))]
    indices = tuple(dict.fromkeys(i for setting in chosen for i in setting.indices))
    return Row(tuple(cells), "pruned", indices, {"model": model, "ratio": percent(ratio)})


def _chosen(settings: Sequence[Setting], judge: Judge) -> Setting:
    """Returns, of the runs with each unseen domain and seed, the one that is best by a judge."""
    best: dict[tuple[str | None, int], tuple[float, Run]] = {}
    for run in (run for setting in settings for run in setting.runs if run.result.status == "ok"):
        value, place = judge(run), (run.result.unseen, run.result.seed)
        if value is not None and (place not in best or value > best[place][0]):
            best[place] = value, run
    first = settings[0]
    return Setting(first.model, "", first.ratio, tuple(run for _, run in best.values()), first.domains)


def _counted(runs: Sequence[Run]) -> str:
    return ", ".join(f"{method} {times}" for method, times in Counter(run.method for run in runs).most_common())
