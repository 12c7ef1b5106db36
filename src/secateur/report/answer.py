"""The study's question answered in words: which criterion, at which ratio, on which model, keeps what."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.report.grids import ABSENT, Cell, Column, Grid, Row, delta_acc, facets, macs, number, params, percent
from secateur.report.grids import test_acc as accuracy
from secateur.report.summary import Block, Estimate, Setting


@dataclass(frozen=True)
class Finding:
    """What keeps most on one model at one ratio.

    `rival` is the next best; `lead` says whether the distance between the two is more than chance, as far as seeds can
    tell. `missing` counts the methods without an accuracy.
    """

    model: str
    ratio: float
    best: Setting
    rival: Setting | None
    lead: str
    missing: int


@dataclass(frozen=True)
class Answer:
    """The answer for one block: sentences, and the table that they summarise."""

    title: str
    sentences: tuple[str, ...]
    grid: Grid | None


def findings(block: Block) -> tuple[Finding, ...]:
    """Returns the best method of every model at every ratio, by mean accuracy on the test images."""
    found = []
    for model in block.models:
        settings = [setting for setting in block.settings(model) if setting.ratio]
        for ratio in sorted({setting.ratio for setting in settings}):
            rated = [(s, e) for s in settings if s.ratio == ratio and (e := s.estimate(accuracy)) is not None]
            if not rated:
                continue
            rated.sort(key=lambda pair: -pair[1].mean)
            rival = rated[1] if len(rated) > 1 else None
            lead = _lead(rated[0][1], rival[1]) if rival else "nothing to compare with"
            missing = sum(s.ratio == ratio for s in settings) - len(rated)
            found.append(Finding(model, ratio, rated[0][0], rival[0] if rival else None, lead, missing))
    return tuple(found)


def _lead(best: Estimate, rival: Estimate) -> str:
    if best.mean == rival.mean:
        return "a tie"
    if best.error is None or rival.error is None:
        return "one seed, cannot be told from chance"
    noise = math.hypot(best.error, rival.error)
    return "more than two standard errors" if best.mean - rival.mean > 2 * noise else "within two standard errors"


def answer(block: Block) -> Answer:
    """Returns the answer for one block; under pooled domains or an oracle it says that this is not the question."""
    found = findings(block)
    warnings = []
    if not block.is_generalisation:
        warnings.append(
            "This split cannot answer the question: its test images come from the domains that were trained on "
            "(i.i.d.). What follows is not domain generalisation."
        )
    if block.is_oracle:
        warnings.append(
            "The epoch was chosen by looking at the unseen domain (oracle): an upper bound, not to be compared with "
            "figures that were chosen on the source domains."
        )
    if not found:
        return Answer(block.title, (*warnings, "No pruned run reached its end, so there is no answer yet."), None)
    sentences = [*warnings, *(_best_at(ratio, found, block) for ratio in sorted({f.ratio for f in found}))]
    sentences += _winners(found)
    if len({block.describe_domains(model) for model in block.models}) > 1:
        sentences.append("Models were not tested on the same unseen domains: compare criteria, not models.")
    sentences += _sizes(block)
    return Answer(block.title, tuple(sentences), _grid(found, block))


def _mean(setting: Setting) -> Estimate:
    estimate = setting.estimate(accuracy)
    assert estimate is not None, "findings are made of settings that have an accuracy"
    return estimate


def _best_at(ratio: float, found: Sequence[Finding], block: Block) -> str:
    """Returns a sentence about the model and criterion that keep most at a ratio."""
    top = max((f for f in found if f.ratio == ratio), key=lambda f: _mean(f.best).mean)
    tested = block.describe_domains(top.model)
    text = f"With {percent(ratio)} of the channels removed, {top.best.method} on {top.model} keeps the most: "
    text += f"{number(_mean(top.best), '.1f').text} % test accuracy ({tested})"
    delta, kept = top.best.estimate(delta_acc), _kept(top.best)
    if delta is None or kept is None:
        text += ", with no dense baseline to compare with"
    else:
        points = f"{abs(delta.mean):.1f} points {'less' if delta.mean < 0 else 'more'} than its dense model"
        text += f", {points} ({100 * kept:.0f} % of its accuracy)"
    left = _left(top.best)
    text += f", with {left[0]} of the parameters and {left[1]} of the MACs left." if all(left) else "."
    if top.rival is not None:
        text += f" Next on this model is {top.rival.method} with {number(_mean(top.rival), '.1f').text} % ({top.lead})."
    if top.missing:
        text += f" Not compared, for want of an accuracy: {top.missing} of the criteria."
    return text


def _kept(setting: Setting) -> float | None:
    """Returns which share of the dense model's accuracy is left."""
    after, delta = setting.estimate(accuracy), setting.estimate(delta_acc)
    if after is None or delta is None or after.mean == delta.mean:
        return None
    return after.mean / (after.mean - delta.mean)


def _left(setting: Setting) -> tuple[str, str]:
    sizes = []
    for left, dense in ((params, lambda r: r.dense_params), (macs, lambda r: r.dense_macs)):
        now, before = setting.estimate(left), setting.estimate(dense)
        share = 100 * now.mean / before.mean if now and before and before.mean else None
        sizes.append("" if share is None else f"{share:.{0 if share >= 10 else 1}f} %")
    return sizes[0], sizes[1]


def _winners(found: Sequence[Finding]) -> list[str]:
    """Returns who comes first how often, and in how many cases that is more than chance."""
    compared = [finding for finding in found if finding.rival is not None]
    if len(compared) < 2:
        return []
    firsts = Counter(finding.best.method for finding in compared).most_common()
    listed = ", ".join(f"{method} {times}" for method, times in firsts)
    clear = sum(finding.lead.startswith("more") for finding in compared)
    return [
        f"Over all {len(compared)} pairs of model and ratio, first places go to: {listed}. "
        f"The lead is more than two standard errors over seeds in {clear or 'none'} of them."
    ]


def _sizes(block: Block) -> list[str]:
    """Returns a warning that one ratio means many sizes, with the widest range of remaining parameters."""
    ranges = []
    for model in block.models:
        shares: dict[float, list[float]] = {}
        for setting in block.settings(model):
            now, before = setting.estimate(params), setting.estimate(lambda r: r.dense_params)
            if setting.ratio and now and before and before.mean:
                shares.setdefault(setting.ratio, []).append(100 * now.mean / before.mean)
        ranges += [(max(s) - min(s), min(s), max(s), model, ratio) for ratio, s in shares.items() if len(s) > 1]
    if not ranges:
        return []
    spread, least, most, model, ratio = max(ranges)
    if spread < 1:
        return []
    return [
        f"Equal ratios are not equal sizes: at {percent(ratio)}, {model} is left with {least:.0f} to {most:.0f} % "
        "of its parameters, depending on the criterion. The Pareto fronts compare by size."
    ]


def _grid(found: Sequence[Finding], block: Block) -> Grid:
    labels = ("Test acc. %", "ΔAcc points", "Kept of dense %", "Params left %", "MACs left %")
    columns = (
        *(Column("Model", is_number=False), Column("Ratio"), Column("Best", is_number=False)),
        *(Column(label) for label in labels),
        *(Column("Next", is_number=False), Column("Its test acc. %"), Column("The lead", is_number=False)),
    )
    rows = []
    for finding in found:
        best, kept = finding.best, _kept(finding.best)
        cells = [Cell(finding.model), Cell(percent(finding.ratio), finding.ratio), Cell(best.method)]
        cells += [number(_mean(best)), number(best.estimate(delta_acc), "+.2f")]
        cells += [Cell(ABSENT) if kept is None else Cell(f"{100 * kept:.1f}", kept)]
        for text in _left(best):
            cells += [Cell(text.removesuffix(" %"), float(text.removesuffix(" %"))) if text else Cell(ABSENT)]
        rival = finding.rival
        cells += [Cell(rival.method if rival else ABSENT), number(_mean(rival)) if rival else Cell(ABSENT)]
        rows.append(Row((*cells, Cell(finding.lead)), "pruned", best.indices, facets(best, block)))
    looks = ", so by looking at the unseen domain; see “Choosing among the criteria”" if block.is_generalisation else ""
    lead = "Lead: distance to the next in standard errors over seeds of the two together."
    note = f"Best by mean test accuracy{looks}. {lead}"
    return Grid(f"What keeps most, {block.title}", columns, tuple(rows), (note,))
