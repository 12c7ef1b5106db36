"""The table and the figure of all measurements."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from accuracy.records import Record, Setting

Value = Callable[[Record], float | None]
COLUMNS: dict[str, Value] = {
    "seen, one shot": lambda r: r.val,
    "unseen, one shot": lambda r: r.test,
    "seen, fine-tuned": lambda r: r.tuned_val,
    "unseen, fine-tuned": lambda r: r.tuned_test,
}


def mean_and_error(records: Sequence[Record], value: Value) -> tuple[float, float] | None:
    """Returns the mean over seeds of the mean over unseen domains, and its standard error; None where one is missing.

    The error is the population standard deviation over the square root of the number of seeds.
    """
    by_seed: dict[int, list[float]] = defaultdict(list)
    for record in records:
        found = value(record)
        if found is None:
            return None
        by_seed[record.unit.seed].append(found)
    means = [statistics.fmean(values) for values in by_seed.values()]
    return (statistics.fmean(means), statistics.pstdev(means) / len(means) ** 0.5) if means else None


def grouped(records: Sequence[Record]) -> dict[tuple[str, float], dict[Setting, list[Record]]]:
    """Returns the records by model and budget, and there by setting."""
    found: dict[tuple[str, float], dict[Setting, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found[record.unit.model, record.budget][record.setting].append(record)
    return {key: dict(found[key]) for key in sorted(found, key=lambda k: (k[0], -k[1]))}


def best_setting(rows: dict[Setting, list[Record]], chosen: Callable[[Setting], bool]) -> Setting | None:
    """Returns the setting of the best accuracy on the *source* domains after one shot: never chosen by the unseen.

    Settings are compared under the first seed, which has all of them, if they were measured with every unseen domain.
    """
    first = min(r.unit.seed for records in rows.values() for r in records)
    rows = {s: [r for r in records if r.unit.seed == first] for s, records in rows.items()}
    domains = {r.unit.unseen for records in rows.values() for r in records}
    complete = {s: r for s, r in rows.items() if chosen(s) and {one.unit.unseen for one in r} == domains}
    scored = {s: mean_and_error(r, COLUMNS["seen, one shot"]) for s, r in complete.items()}
    known = {s: value[0] for s, value in scored.items() if value is not None}
    return max(known, key=lambda s: known[s]) if known else None


def is_dense(setting: Setting) -> bool:
    return setting.library == "dense"


def is_ours(setting: Setting) -> bool:
    return setting.library == "secateur" and setting.compensation != "mean"


def is_peers(setting: Setting) -> bool:
    return setting.library == "torch-pruning"


def is_vbp(setting: Setting) -> bool:
    return setting.compensation == "mean"


CONTENDERS: dict[str, Callable[[Setting], bool]] = {
    "secateur, best": is_ours,
    "secateur without compensation, best": lambda s: is_ours(s) and s.compensation == "none",
    "variance with mean shift, best": is_vbp,
    "Torch-Pruning, best": is_peers,
}


def summary(records: Sequence[Record]) -> list[str]:
    """Returns a table in Markdown: the best setting of each contender for each model and budget."""
    names = ["model", "MACs allowed", "contender", "criterion, scope, what attention loses", *COLUMNS]
    lines = [
        "",
        "## The best of each",
        "",
        "| " + " | ".join(names) + " |",
        "|---|--:|---|---|" + "--:|" * len(COLUMNS),
    ]
    for (model, budget), rows in grouped(records).items():
        contenders = {"dense": is_dense} if budget == 1 else CONTENDERS
        for label, chosen in contenders.items():
            setting = best_setting(rows, chosen)
            cells = [f"| {model} | {budget:.0%} | {label}"]
            cells += ["never within the budget" if setting is None else str(setting)]
            cells += [_text(rows[setting], value) if setting else "" for value in COLUMNS.values()]
            lines.append(" | ".join(cells) + " |")
    return lines


def table(records: Sequence[Record]) -> list[str]:
    """Returns the tables in Markdown, one for each model and budget, by one-shot accuracy on the seen domains."""
    lines: list[str] = []
    for (model, budget), rows in grouped(records).items():
        if budget == 1.0:
            lines += ["", f"## {model}, dense", "", *_head()]
        else:
            lines += ["", f"## {model}, {budget:.0%} of the MACs", "", *_head()]
        order = {s: mean_and_error(r, COLUMNS["seen, one shot"]) or (-1.0, 0.0) for s, r in rows.items()}
        for setting in sorted(rows, key=lambda s: -order[s][0]):
            lines.append(_row(setting, rows[setting]))
    return lines


def _head() -> list[str]:
    names = ["library", "criterion, scope, what attention loses", "MACs kept", *COLUMNS, "runs"]
    return ["| " + " | ".join(names) + " |", "|---|---|" + "--:|" * (len(names) - 2)]


def _row(setting: Setting, records: Sequence[Record]) -> str:
    done = [r for r in records if r.macs is not None]
    if len(done) < len(records):
        why = next(r.error for r in records if r.error)
        return f"| {setting.library} | {setting} | - | " + " | ".join([why, "", "", "", str(len(records))]) + " |"
    texts = [_text(records, value) for value in COLUMNS.values()]
    macs = statistics.fmean(r.macs or 0.0 for r in records)
    return f"| {setting.library} | {setting} | {macs:.1%} | " + " | ".join(texts) + f" | {len(records)} |"


def _text(records: Sequence[Record], value: Value) -> str:
    """Returns a mean, with its error where there are several seeds."""
    found = mean_and_error(records, value)
    several = len({r.unit.seed for r in records}) > 1
    return "-" if found is None else f"{found[0]:.1f} ± {found[1]:.1f}" if several else f"{found[0]:.1f}"


def figure(records: Sequence[Record], path: Path) -> None:
    """Draws accuracy on the unseen domains against MACs: the best setting of each contender, one panel per model."""
    groups = grouped(records)
    models = sorted({model for model, _ in groups})
    tuned = any(r.tuned_test is not None for r in records)
    names = ("unseen, one shot", "unseen, fine-tuned")[: 1 + tuned]
    size = (5 * len(models), 3.5 * len(names))
    fig, axes = pyplot.subplots(len(names), len(models), figsize=size, squeeze=False, sharey=True)
    for column, model in enumerate(models):
        for row, name in enumerate(names):
            panel = axes[row][column]
            for label, chosen in CONTENDERS.items():
                points = []
                for (its, budget), rows in groups.items():
                    setting = best_setting(rows, chosen) if its == model and budget < 1 else None
                    value = mean_and_error(rows[setting], COLUMNS[name]) if setting else None
                    if value is not None:
                        points.append((100 * budget, *value))
                if points:
                    panel.errorbar(*zip(*points, strict=True), marker="o", capsize=3, label=label)
            dense = groups.get((model, 1.0))
            value = mean_and_error(next(iter(dense.values())), COLUMNS[name]) if dense else None
            if value is not None:
                panel.axhline(value[0], color="black", linewidth=1, linestyle=":", label="dense")
            panel.set_title(f"{model}: {name}")
            panel.set_xlabel("MACs kept (%)")
            panel.grid(alpha=0.3)
        axes[0][column].legend(fontsize=8)
    for row in axes:
        row[0].set_ylabel("accuracy (%)")
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    pyplot.close(fig)
