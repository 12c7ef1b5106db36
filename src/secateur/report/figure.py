"""The figure of a study: change in test accuracy against pruning ratio, a curve per criterion, a panel per model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import DataError
from secateur.files import write_whole
from secateur.report.results import Result
from secateur.report.summary import Block, Estimate, blocks, data_name, distinct

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
Curves = dict[str, list[tuple[float, Estimate]]]
_PROPORTIONAL = "proportional (drop = ratio)"


def save_figure(results: Sequence[Result], path: Path) -> None:
    """Writes the figure as PNG: ΔAcc in percentage points against the ratio of channels removed in percent.

    Points are means over unseen domains and seeds, with the standard error over seeds as bars where there are several.
    The black line is the naive expectation that accuracy falls by as many points as per cent are removed.

    Raises:
        DataError: No pruned run with a dense baseline reached its end.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = _curves(blocks(distinct(results)))
    if not shown:
        raise DataError("nothing to draw: no pruned run with a dense baseline reached its end")
    criteria = list(dict.fromkeys(criterion for curves in shown.values() for criterion in curves))
    styles = {criterion: _STYLES[i % len(_STYLES)] for i, criterion in enumerate(criteria)}
    figure = Figure(
        figsize=(1.1 + 3.9 * len(shown), 4.7), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (title, curves) in zip(panels, shown.items(), strict=True):
        _draw(panel, curves, styles)
        panel.set_title(title, fontweight="bold", fontsize=8 if "\n" in title else None)
    panels[0].set_ylabel("ΔAcc on the test set (percentage points)")
    lines = {line.get_label(): line for panel in panels for line in panel.get_legend_handles_labels()[0]}
    columns = len(lines) if len(shown) > 1 else math.ceil(len(lines) / 2)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(_title(results), fontsize=10)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def _curves(found: Sequence[Block]) -> dict[str, Curves]:
    """Returns the curves of every panel: by criterion, the ratios in percent with the mean ΔAcc."""
    panels: dict[str, Curves] = {}
    for block in found:
        for model in block.models:
            title = model if len(found) == 1 else "\n".join([model, *textwrap.wrap(block.title, 44)])
            for setting in block.settings(model):
                delta = setting.estimate(lambda run: run.delta_acc) if setting.ratio else None
                if delta is not None:
                    curve = panels.setdefault(title, {}).setdefault(setting.method, [])
                    curve.append((100 * setting.ratio, delta))
    return panels


def _title(results: Sequence[Result]) -> str:
    data = ", ".join(dict.fromkeys(data_name(result.data) for result in results))
    unseen = list(dict.fromkeys(result.unseen for result in results if result.unseen))
    protocol = ", ".join(dict.fromkeys(result.protocol for result in results))
    domains = f"mean of {len(unseen)} unseen domains" if len(unseen) > 1 else f"the unseen domain {''.join(unseen)}"
    return f"{data}: {f'test on {domains}' if unseen else protocol}, after fine-tuning"


def _draw(panel: Axes, curves: Curves, styles: dict[str, tuple[str, str]]) -> None:
    ratios = sorted({ratio for curve in curves.values() for ratio, _ in curve})
    span = [0.0, max(ratios)] if len(ratios) == 1 else [ratios[0], ratios[-1]]
    panel.plot(span, [-x for x in span], color="black", linewidth=1.4, label=_PROPORTIONAL, zorder=2)
    panel.axhline(0, color="0.6", linewidth=0.8, linestyle=":", zorder=1)
    for criterion, curve in curves.items():
        color, marker = styles[criterion]
        xs, means = [ratio for ratio, _ in curve], [delta.mean for _, delta in curve]
        panel.plot(xs, means, color=color, marker=marker, markersize=6, linewidth=1.8, label=criterion, zorder=3)
        for ratio, delta in curve:
            if delta.error is not None:
                panel.errorbar(
                    ratio, delta.mean, delta.error, fmt="none", ecolor=color, elinewidth=1, capsize=3, zorder=3
                )
    panel.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    panel.set_xlabel("pruning ratio (% of channels removed)")
    panel.grid(axis="y", color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.06, y=0.06)
