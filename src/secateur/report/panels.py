"""The figures of a report: change in accuracy against ratio, Pareto fronts, training curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur.report.charts import Chart, Point, Series, draw, key, marker_of, tick_label
from secateur.report.grids import delta_acc, facets, number, percent
from secateur.report.grids import test_acc as accuracy
from secateur.report.results import Result
from secateur.report.summary import DENSE, Block, Run, Setting, data_name

PROPORTIONAL = "proportional (drop = ratio)"
_FRONT = "Pareto front"
_LONGEST_CURVE = 80
"""Epochs of a curve that are drawn; of longer ones, evenly spaced epochs and the last."""


@dataclass(frozen=True)
class Figure:
    """Charts that belong together, drawn, with their legend and what must be said about them."""

    title: str
    charts: tuple[str, ...]
    legend: str
    notes: tuple[str, ...] = ()


def _styles(block: Block) -> dict[str, int]:
    """Returns the colour of every method; the dense baseline is not among them."""
    methods = dict.fromkeys(run.method for run in block.runs if not run.result.is_dense)
    return {method: i for i, method in enumerate(methods)}


def _name(setting: Setting) -> str:
    return f"{setting.model}, {setting.method}" + (f" at {percent(setting.ratio)}" if setting.ratio else "")


def ratio_figure(block: Block) -> Figure | None:
    """Returns Figure 2 of the paper: change in test accuracy against ratio, by model (panel) and criterion (curve)."""
    styles = _styles(block)
    charts = []
    for model in block.models:
        curves: dict[str, list[Point]] = {}
        for setting in block.settings(model):
            delta = setting.estimate(delta_acc) if setting.ratio else None
            if delta is not None:
                words = f"{_name(setting)}: ΔAcc {number(delta, '+.2f').text} points, {_seeds(delta.count)}"
                point = Point(
                    100 * setting.ratio, delta.mean, words, setting.indices, delta.error, facets(setting, block)
                )
                curves.setdefault(setting.method, []).append(point)
        if curves:
            ratios = sorted({point.x for points in curves.values() for point in points})
            ends = (0.0, ratios[0]) if len(ratios) == 1 else (ratios[0], ratios[-1])
            charts.append(
                Chart(
                    title=model,
                    x_label="channels removed (%)",
                    y_label="ΔAcc, test (points)",
                    series=tuple(Series(m, styles[m], tuple(points)) for m, points in curves.items()),
                    x_ticks=tuple(ratios),
                    guide=tuple((x, -x) for x in ends),
                    zero=True,
                )
            )
    if not charts:
        return None
    notes = ["Bars are standard errors over seeds; a setting with one seed has none."]
    tested = {model: block.describe_domains(model) for model in block.models}
    same = len(set(tested.values())) == 1
    notes += [f"Test accuracy: {tested[block.models[0]]}."] if same else [f"{m}: {d}." for m, d in tested.items()]
    legend = key([(method, style, marker_of(style)) for method, style in styles.items()], PROPORTIONAL)
    title = f"Change in accuracy against ratio, {block.title}"
    return Figure(title, tuple(map(draw, charts)), legend, tuple(notes))


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"mean over {count} seeds"


def pareto_figure(block: Block) -> Figure | None:
    """Returns accuracy against parameters, MACs and latency, all models together, each with its Pareto front."""
    machine = _commonest([run.result.hardware for run in block.runs if run.result.latency is not None])
    axes: tuple[tuple[str, str, Callable[[Result], float | None]], ...] = (
        ("parameters", "parameters left", lambda r: r.params),
        ("MACs", "MACs per image left", lambda r: r.macs),
        ("latency", "seconds per batch, measured", lambda r: r.latency if r.hardware == machine else None),
    )
    charts = [chart for axis in axes if (chart := _pareto(block, *axis)) is not None]
    if not charts:
        return None
    styles = _styles(block)
    legend = key([(method, style, 0) for method, style in styles.items()] + [(DENSE, len(styles), 0)], _FRONT)
    if len(block.models) > 1:
        legend += key([(model, 7, marker) for marker, model in enumerate(block.models)]).replace(" s7", " plain")
    notes = ["The front joins what nothing else beats in both accuracy and cost, over all models and criteria."]
    elsewhere = sum(run.result.latency is not None and run.result.hardware != machine for run in block.runs)
    if machine is not None:
        notes.append(f"Latency on: {machine or 'hardware that was not recorded'}.")
    if elsewhere:
        notes.append(f"Latencies of {elsewhere} runs that were timed on other machines are left out.")
    tested = {model: block.describe_domains(model) for model in block.models}
    if len(set(tested.values())) > 1:
        listed = "; ".join(f"{model}: {domains}" for model, domains in tested.items())
        notes.append(
            f"The models were not tested on the same domains, so their accuracies differ in meaning ({listed})."
        )
    return Figure(f"Accuracy against cost, {block.title}", tuple(map(draw, charts)), legend, tuple(notes))


def _commonest(names: Sequence[str]) -> str | None:
    return Counter(names).most_common(1)[0][0] if names else None


def _pareto(block: Block, name: str, label: str, cost: Callable[[Result], float | None]) -> Chart | None:
    styles = _styles(block)
    series = []
    for marker, model in enumerate(block.models):
        for setting in block.settings(model):
            price, acc = setting.estimate(cost), setting.estimate(accuracy)
            if price is not None and acc is not None and price.mean > 0:
                words = (
                    f"{_name(setting)}: {number(acc).text} % with {tick_label(price.mean)} {label}, {_seeds(acc.count)}"
                )
                point = Point(price.mean, acc.mean, words, setting.indices, acc.error, facets(setting, block))
                style = styles.get(setting.method, len(styles))
                series.append(Series(setting.method, style, (point,), is_line=False, marker=marker))
    if not series:
        return None
    best = front([(point.x, point.y) for one in series for point in one.points])
    return Chart(
        title=f"accuracy against {name}",
        x_label=label,
        y_label="test accuracy (%)",
        series=tuple(series),
        x_scale="log",
        guide=tuple(best),
    )


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the (cost, value) pairs for which no other is at most as dear and at least as good, by rising cost."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


def curve_figures(block: Block) -> tuple[Figure, ...]:
    """Returns validation accuracy and training loss against epochs: a figure per model, a curve per run."""
    return tuple(figure for model in block.models if (figure := _curves(block, model)) is not None)


def _curves(block: Block, model: str) -> Figure | None:
    runs = [run for run in block.runs if run.result.model == model and run.result.curve]
    if not runs:
        return None
    styles = _styles(block)
    charts = []
    for field, label in (("val_acc", "validation accuracy (%)"), ("loss", "training loss")):
        for ratio in sorted({run.result.ratio for run in runs}):
            mine = [run for run in runs if run.result.ratio == ratio]
            lines = [_curve(run, field, styles.get(run.method, len(styles)), block) for run in mine]
            lines = [line for line in lines if line.points]
            if lines:
                title = percent(ratio) + " removed" if ratio else DENSE
                charts.append(Chart(title=title, x_label="epoch", y_label=label, series=tuple(lines)))
    if not charts:
        return None
    legend = key([(method, style, 7) for method, style in styles.items()] + [(DENSE, len(styles), 7)])
    note = "One curve per run (each unseen domain and seed). Validation images are of the domains trained on."
    return Figure(f"Training curves, {model} on {block.title}", tuple(map(draw, charts)), legend, (note,))


def _curve(run: Run, field: str, style: int, block: Block) -> Series:
    values = [(entry["epoch"], entry[field]) for entry in run.result.curve if field in entry and "epoch" in entry]
    step = -(-len(values) // _LONGEST_CURVE) or 1
    values = values[::-step][::-1]
    result = run.result
    amount = f" at {percent(result.ratio)}" if result.ratio else ""
    unseen = f", unseen {result.unseen}" if result.unseen else ""
    shown = {
        "model": result.model,
        "method": run.method,
        "ratio": percent(result.ratio) if result.ratio else DENSE,
        "data": data_name(block.data),
    }
    points = []
    for epoch, value in values:
        words = (
            f"{result.model}, {run.method}{amount}{unseen}, seed {result.seed}: {field} {value:.4g} at epoch {epoch:g}"
        )
        points.append(Point(epoch, value, words, (run.index,), facets=shown))
    return Series(run.method, style, tuple(points), is_path=True)
