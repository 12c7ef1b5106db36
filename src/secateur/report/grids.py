"""The tables of a report as values, in the paper's columns; shown as HTML, Markdown and LaTeX elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from statistics import fmean
from typing import Literal

from secateur.report.published import PAPER, Published, find_published
from secateur.report.results import Result
from secateur.report.summary import Block, Estimate, Measure, Setting, data_name
from secateur.report.table import clock, quantity

Kind = Literal["dense", "pruned", "paper", "missing"]
ABSENT = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
OURS = "ours"
_NOTE_ERRORS = (
    "± is the standard error over seeds (population deviation / sqrt(seeds)) of means over unseen domains; "
    "where it is absent there is one seed, and no telling chance from merit."
)
_NOTE_RATIOS = (
    "ΔAcc: test accuracy minus that of the dense model fine-tuned the same way, in percentage points. MACs ratio: "
    "dense over remaining, counted (the paper's “speed-up”). Latency ratio: dense over remaining, measured."
)
_NOTE_PAPER = (
    f"Rows of the source “paper” are published figures of {PAPER}; the end says what is known to be wrong with them."
)


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number to sort by (None: sorted last); `bar` in [0, 1] is drawn behind the text."""

    text: str
    value: float | None = None
    bar: float | None = None


@dataclass(frozen=True)
class Column:
    """A column with the name of the group that it stands in, if it does, and whether it holds numbers."""

    label: str
    group: str = ""
    is_number: bool = True

    @property
    def full(self) -> str:
        """The label with its group."""
        return f"{self.group}: {self.label}" if self.group else self.label


@dataclass(frozen=True)
class Row:
    """Cells, the places of the runs they come from, and the values that rows are filtered by."""

    cells: tuple[Cell, ...]
    kind: Kind
    runs: tuple[int, ...] = ()
    facets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A table."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def params(result: Result) -> float | None:
    """Returns the parameters that remain."""
    return result.params


def macs(result: Result) -> float | None:
    """Returns the multiply-accumulates per image that remain."""
    return result.macs


def val_acc(result: Result) -> float | None:
    """Returns the accuracy on held-out images of the domains that were trained on, in percent."""
    return result.val_acc


def test_acc(result: Result) -> float | None:
    """Returns the accuracy on the test images, in percent."""
    return result.test_acc


def delta_acc(result: Result) -> float | None:
    """Returns the change in test accuracy against the dense model, in percentage points."""
    return result.delta_acc


def finetune_seconds(result: Result) -> float | None:
    """Returns how long fine-tuning took."""
    return result.finetune_seconds


def _count(setting: Setting, measure: Measure) -> Cell:
    estimate = setting.estimate(measure)
    return Cell(ABSENT) if estimate is None else Cell(quantity(round(estimate.mean)), estimate.mean)


def number(estimate: Estimate | None, form: str = ".2f", absent: str = ABSENT) -> Cell:
    """Returns a mean with its standard error, if there is one."""
    if estimate is None:
        return Cell(absent)
    sign = form.removeprefix("+")
    error = "" if estimate.error is None else f" ± {estimate.error:{sign}}"
    return Cell(f"{estimate.mean:{form}}{error}".replace("-", "\N{MINUS SIGN}"), estimate.mean)


def _duration(setting: Setting) -> Cell:
    estimate = setting.estimate(finetune_seconds)
    return Cell(ABSENT) if estimate is None else Cell(clock(estimate.mean), estimate.mean)


def percent(ratio: float) -> str:
    """Returns a fraction in percent."""
    return f"{100 * ratio:g} %"


def facets(setting: Setting, block: Block, source: str = OURS) -> dict[str, str]:
    """Returns what the rows and points of a setting are filtered by."""
    ratio = percent(setting.ratio) if setting.ratio else "dense"
    return {
        "model": setting.model,
        "method": setting.method,
        "ratio": ratio,
        "data": data_name(block.data),
        "source": source,
    }


def kind_of(setting: Setting, is_dense: bool) -> Kind:
    """Returns how the row of a setting is to be shown."""
    if setting.estimate(test_acc) is None:
        return "missing"
    return "dense" if is_dense else "pruned"


def table_one(blocks: Sequence[Block]) -> Grid:
    """Returns the dense models in the columns of the paper's Table I: a group of columns for each data set."""
    columns = [Column("Model", is_number=False), Column("Source", is_number=False), Column("Params"), Column("MACs")]
    for block in blocks:
        columns += [Column(c, block.title) for c in ("Valid acc. %", "Test acc. %", "FT time HH:MM:SS")]
    rows = []
    for model in dict.fromkeys(model for block in blocks for model in block.models):
        rows.append(_dense_row(model, blocks))
        known = [find_published(model, block.data, 0.0, None) for block in blocks]
        if any(known):
            rows.append(_published_dense_row(model, known))
    has_paper = any(row.kind == "paper" for row in rows)
    tests = [
        f"Test accuracy on {block.title}: {domains}."
        for block in blocks
        for domains in dict.fromkeys(block.describe_domains(m) for m in block.models)
    ]
    notes = (*dict.fromkeys(tests), _NOTE_ERRORS, *([_NOTE_PAPER] if has_paper else []))
    return Grid("Dense models (the columns of Table I)", tuple(columns), tuple(rows), notes)


def _dense_row(model: str, blocks: Sequence[Block]) -> Row:
    # The first dense setting is that of the paper's table; variants of fine-tuning are in the model's own table.
    found = [block.settings(model)[0] if model in block.models else None for block in blocks]
    first = next(setting for setting in found if setting is not None)
    cells = [Cell(model), Cell(OURS), _count(first, params), _count(first, macs)]
    for setting in found:
        if setting is None:
            cells += [Cell("not run"), Cell("not run"), Cell(ABSENT)]
        else:
            absent = setting.state or ABSENT
            cells += [number(setting.estimate(val_acc), absent=absent)]
            cells += [number(setting.estimate(test_acc), absent=absent), _duration(setting)]
    runs = tuple(i for setting in found if setting for i in setting.indices)
    return Row(tuple(cells), "dense", runs, {"model": model, "method": "dense", "ratio": "dense", "source": OURS})


def _published_dense_row(model: str, known: Sequence[Published | None]) -> Row:
    first = next(row for row in known if row is not None)
    cells = [Cell(first.model), Cell("paper"), *_published_size(first)]
    for row in known:
        cells += [Cell(ABSENT)] * 3 if row is None else [*_published_accuracy(row), _published_time(row)]
    return Row(tuple(cells), "paper", (), {"model": model, "method": "dense", "ratio": "dense", "source": "paper"})


def _published_size(row: Published) -> list[Cell]:
    return [Cell(f"{row.params_m} M", 1e6 * float(row.params_m)), Cell(f"{row.macs_g} G", 1e9 * float(row.macs_g))]


def _published_accuracy(row: Published) -> list[Cell]:
    return [quoted(row.val_acc), quoted(row.test_acc)]


def quoted(figure: Decimal | None) -> Cell:
    """Returns a published figure with the digits that it was published with."""
    if figure is None:
        return Cell(ABSENT)
    return Cell(str(figure).replace("-", "\N{MINUS SIGN}"), float(figure))


def _published_time(row: Published) -> Cell:
    hours, minutes, seconds = map(int, row.finetune_time.split(":"))
    return Cell(row.finetune_time, 3600 * hours + 60 * minutes + seconds)


def tables_two_to_four(block: Block) -> tuple[Grid, ...]:
    """Returns a table per model in the columns of the paper's Tables II to IV, with what we measure besides."""
    return tuple(_model_table(block, model) for model in block.models)


def _model_table(block: Block, model: str) -> Grid:
    labels = ("Params left", "MACs left", "Valid acc. %", "Test acc. %", "ΔAcc points", "MACs ratio")
    columns = (
        *(Column("Ratio"), Column("Group score", is_number=False), Column("Source", is_number=False)),
        *(Column(label) for label in labels),
        *(Column("Latency ratio"), Column("FT time HH:MM:SS"), Column("Seeds")),
    )
    rows, known = [], None
    for setting in block.settings(model):
        rows.append(_setting_row(setting, block))
        row = find_published(model, block.data, setting.ratio, setting.criterion) if setting.runs else None
        if row is not None:
            known = row
            rows.append(_published_row(row, setting, block))
    notes = [f"Test: {block.describe_domains(model)}.", _NOTE_RATIOS, _NOTE_ERRORS]
    notes += [f"Epochs: {block.selection}."] if block.selection else []
    if known:
        notes += [f"{_NOTE_PAPER} Its test images: {known.protocol}."]
    title = f"{model} on {block.title} (the columns of Tables II to IV)"
    return Grid(title, columns, tuple(rows), tuple(notes))


def _setting_row(setting: Setting, block: Block) -> Row:
    is_dense = setting.ratio == 0
    absent = setting.state or ABSENT
    test = setting.estimate(test_acc)
    delta = Cell(ABSENT) if is_dense else number(setting.estimate(delta_acc), "+.2f")
    cells = (
        *(Cell("" if is_dense else percent(setting.ratio), setting.ratio), Cell(setting.method), Cell(OURS)),
        *(_count(setting, params), _count(setting, macs)),
        *(number(setting.estimate(val_acc), absent=absent), number(test, absent=absent), delta),
        number(setting.estimate(lambda r: r.macs_ratio)),
        number(setting.estimate(lambda r: r.latency_ratio)),
        *(_duration(setting), Cell(str(test.count), test.count) if test else Cell("0", 0)),
    )
    return Row(cells, kind_of(setting, is_dense), setting.indices, facets(setting, block))


def _published_row(row: Published, setting: Setting, block: Block) -> Row:
    cells = (
        *(Cell(percent(row.ratio) if row.ratio else "", row.ratio), Cell(setting.method), Cell("paper")),
        *(*_published_size(row), *_published_accuracy(row), quoted(row.delta_acc), quoted(row.speed_up)),
        *(Cell(ABSENT), _published_time(row), Cell("1", 1)),
    )
    return Row(cells, "paper", (), facets(setting, block, "paper"))


def unseen_table(block: Block) -> Grid:
    """Returns the accuracy on each unseen domain, and their mean, of every model, method and ratio."""
    columns = (
        *(Column("Model", is_number=False), Column("Ratio"), Column("Group score", is_number=False)),
        *(Column(domain, "unseen domain, test acc. %") for domain in block.domains),
        Column("mean", "unseen domain, test acc. %"),
    )
    rows = []
    for model in block.models:
        for setting in block.settings(model):
            is_dense = setting.ratio == 0
            cells = [
                Cell(model),
                Cell("" if is_dense else percent(setting.ratio), setting.ratio),
                Cell(setting.method),
                *(number(setting.estimate(test_acc, (domain,))) for domain in block.domains),
                number(setting.estimate(test_acc), absent=setting.state or ABSENT),
            ]
            rows.append(Row(tuple(cells), kind_of(setting, is_dense), setting.indices, facets(setting, block)))
    return Grid(f"Accuracy per unseen domain, {block.title}", columns, tuple(rows), (_NOTE_ERRORS,))


def domain_tables(block: Block) -> tuple[Grid, ...]:
    """Returns, for each unseen domain, the accuracies on all domains of the data, where the runs recorded them."""
    return tuple(grid for unseen in (block.domains or (None,)) if (grid := _domain_table(block, unseen)) is not None)


def _domain_table(block: Block, unseen: str | None) -> Grid | None:
    runs = [run for run in block.runs if run.result.unseen == unseen]
    domains = sorted({domain for run in runs for domain in run.result.domain_acc})
    if not domains:
        return None
    columns = [Column("Model", is_number=False), Column("Ratio"), Column("Group score", is_number=False)]
    columns += [Column(f"{domain} (unseen)" if domain == unseen else domain) for domain in domains]
    rows = []
    for model in block.models:
        for setting in block.settings(model):
            is_dense = setting.ratio == 0
            cells = [Cell(model), Cell("" if is_dense else percent(setting.ratio), setting.ratio), Cell(setting.method)]
            cells += [number(setting.estimate(_on(domain), (unseen,))) for domain in domains]
            mine = tuple(run.index for run in setting.runs if run.result.unseen == unseen)
            rows.append(Row(tuple(cells), kind_of(setting, is_dense), mine, facets(setting, block)))
    title = f"Accuracy on every domain, unseen {unseen}" if unseen else "Accuracy on every domain (all were trained on)"
    notes = (
        "Accuracy in percent: of sources on their validation part, of the unseen domain on all of it.",
        _NOTE_ERRORS,
    )
    return Grid(f"{title}, {block.title}", tuple(columns), tuple(rows), notes if unseen else notes[1:])


def _on(domain: str) -> Measure:
    return lambda result: result.domain_acc.get(domain)


def width_tables(block: Block) -> tuple[Grid, ...]:
    """Returns a table per model with the width of every group before, and after each method at each ratio."""
    return tuple(grid for model in block.models if (grid := _width_table(block, model)) is not None)


def _width_table(block: Block, model: str) -> Grid | None:
    settings = [s for s in block.settings(model) if s.ratio and any(run.result.widths for run in s.runs)]
    if not settings:
        return None
    groups: dict[str, tuple[str, tuple[int, int]]] = {}
    after: dict[tuple[int, str], list[int]] = {}
    for place, setting in enumerate(settings):
        for width in (width for run in setting.runs for width in run.result.widths):
            fibres, each = width["before"]
            groups.setdefault(width["name"], (width["family"], (fibres, each)))
            after.setdefault((place, width["name"]), []).append(width["after"][0] * width["after"][1])
    columns = [Column("Group", is_number=False), Column("Family", is_number=False), Column("before")]
    columns += [Column(setting.method, percent(setting.ratio)) for setting in settings]
    rows = []
    for name, (family, (fibres, each)) in groups.items():
        shape = str(each) if fibres == 1 else f"{fibres} {TIMES} {each}"
        cells = [Cell(name), Cell(family), Cell(shape, fibres * each)]
        for place in range(len(settings)):
            cells.append(_width_cell(after.get((place, name), []), fibres * each))
        rows.append(Row(tuple(cells), "pruned", (), {"model": model}))
    notes = (
        f"Channels left (fibres {TIMES} width), mean over unseen domains and seeds; the bar is the share that is left.",
    )
    return Grid(f"Widths before and after, {model} on {block.title}", tuple(columns), tuple(rows), notes)


def _width_cell(counts: Sequence[int], before: int) -> Cell:
    if not counts:
        return Cell(ABSENT)
    mean = fmean(counts)
    return Cell(f"{mean:.0f}", mean, mean / before if before else 0.0)
