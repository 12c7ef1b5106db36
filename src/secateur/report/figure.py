"""The figure of a study: change in test accuracy against pruning ratio, a curve per criterion, a panel per model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from secateur.errors import DataError
from secateur.files import write_whole
from secateur.report.results import Result, successes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours told apart by people with any of the common colour blindnesses (the palette of Okabe and Ito), each with a
# marker of its own for print in grey.
_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#999999", "X"),
)
_PROPORTIONAL = "proportional (drop = ratio)"


def save_figure(results: Sequence[Result], path: Path) -> None:
    """Writes the figure as PNG: ΔAcc in percentage points against the ratio of channels removed in percent.

    Points are means over seeds and unseen domains, with the population standard deviation as bars where there are
    several. The black line is the naive expectation that accuracy falls by as many points as per cent are removed.

    Raises:
        DataError: No pruned run with a dense baseline reached its end.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    points = _points(results)
    if not points:
        raise DataError("nothing to draw: no pruned run with a dense baseline reached its end")
    models = list(dict.fromkeys(model for model, _ in points))
    criteria = list(dict.fromkeys(criterion for _, criterion in points))
    figure = Figure(
        figsize=(1.1 + 3.9 * len(models), 4.7), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        curves = {criterion: points[model, criterion] for criterion in criteria if (model, criterion) in points}
        _draw(panel, curves, {criterion: _STYLES[i % len(_STYLES)] for i, criterion in enumerate(criteria)})
        panel.set_title(model, fontweight="bold")
    panels[0].set_ylabel("ΔAcc on the test set (percentage points)")
    lines = {line.get_label(): line for panel in panels for line in panel.get_legend_handles_labels()[0]}
    columns = len(lines) if len(models) > 1 else math.ceil(len(lines) / 2)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(_title(results), fontsize=10)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def _points(results: Sequence[Result]) -> dict[tuple[str, str], dict[float, list[float]]]:
    points: dict[tuple[str, str], dict[float, list[float]]] = {}
    for result in successes(results):
        if result.criterion is not None and result.delta_acc is not None:
            curve = points.setdefault((result.model, result.criterion), {})
            curve.setdefault(100 * result.ratio, []).append(result.delta_acc)
    return points


def _title(results: Sequence[Result]) -> str:
    data = ", ".join(dict.fromkeys(result.data for result in results))
    unseen = ", ".join(dict.fromkeys(result.unseen for result in results if result.unseen))
    protocol = ", ".join(dict.fromkeys(result.protocol for result in results))
    return f"{data}: {f'test on the unseen domain {unseen}' if unseen else protocol}, after fine-tuning"


def _draw(panel: Axes, curves: dict[str, dict[float, list[float]]], styles: dict[str, tuple[str, str]]) -> None:
    ratios = sorted({ratio for curve in curves.values() for ratio in curve})
    span = [0.0, max(ratios)] if len(ratios) == 1 else [ratios[0], ratios[-1]]
    panel.plot(span, [-x for x in span], color="black", linewidth=1.4, label=_PROPORTIONAL, zorder=2)
    panel.axhline(0, color="0.6", linewidth=0.8, linestyle=":", zorder=1)
    for criterion, curve in curves.items():
        color, marker = styles[criterion]
        xs = sorted(curve)
        means, bars = [fmean(curve[x]) for x in xs], [pstdev(curve[x]) for x in xs]
        panel.plot(xs, means, color=color, marker=marker, markersize=6, linewidth=1.8, label=criterion, zorder=3)
        if any(bars):
            panel.errorbar(xs, means, yerr=bars, fmt="none", ecolor=color, elinewidth=1, capsize=3, zorder=3)
    panel.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    panel.set_xlabel("pruning ratio (% of channels removed)")
    panel.grid(axis="y", color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.06, y=0.06)
