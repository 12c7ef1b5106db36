"""The report says what the runs say: means and errors, fronts, answers, and every text as it was written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from report_runs import CRITERIA, DOMAINS, RATIOS, SEEDS, make_run, make_study
from secateur.cli import main
from secateur.errors import DataError
from secateur.report import Result, save_report, write_results
from secateur.report.answer import answer, findings
from secateur.report.charts import Chart, Point, Series, draw
from secateur.report.choice import choice_table
from secateur.report.grids import Grid, domain_tables, table_one, tables_two_to_four, unseen_table, width_tables
from secateur.report.latex import latex, latex_text, markdown_grids
from secateur.report.page import render
from secateur.report.panels import curve_figures, front, pareto_figure, ratio_figure
from secateur.report.summary import Block, blocks, distinct

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; & {{ 7*7 }} $x_1\\%"


class Page(HTMLParser):
    """A page taken apart: how often each tag occurs, what it says, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def only(runs: list[Result]) -> Block:
    (block,) = blocks(runs)
    return block


def cells(grid: Grid) -> list[dict[str, str]]:
    return [{c.full: cell.text for c, cell in zip(grid.columns, row.cells, strict=True)} for row in grid.rows]


def row_of(grid: Grid, **wanted: str) -> dict[str, str]:
    (row,) = [row for row in cells(grid) if all(row[k.replace("_", " ")] == v for k, v in wanted.items())]
    return row


# --- means, errors, and what is missing ---------------------------------------------------------------------------


def test_means_are_over_domains_within_each_seed_and_errors_over_seeds() -> None:
    runs = make_study()
    generator = np.random.default_rng(0)
    runs = [
        replace(run, test_acc=float(acc)) for run, acc in zip(runs, generator.uniform(20, 90, len(runs)), strict=True)
    ]
    for setting in only(runs).settings("vit"):
        mine = [r for r in runs if (r.criterion or "dense", r.ratio) == (setting.method, setting.ratio)]
        table = np.array(
            [[next(r.test_acc for r in mine if (r.unseen, r.seed) == (d, s)) for d in DOMAINS] for s in SEEDS]
        )
        found = setting.estimate(lambda r: r.test_acc)
        assert found is not None and found.error is not None and found.count == len(SEEDS)
        assert found.mean == pytest.approx(table.mean())
        assert found.error == pytest.approx(table.mean(axis=1).std(ddof=0) / np.sqrt(len(SEEDS)))


def test_a_seed_without_one_of_the_domains_does_not_count() -> None:
    runs = [r for r in make_study() if not (r.criterion == "l1" and r.ratio == 0.5 and r.unseen == "photo" and r.seed)]
    setting = next(s for s in only(runs).settings("vit") if (s.method, s.ratio) == ("l1", 0.5))
    found = setting.estimate(lambda r: r.test_acc)
    assert found is not None and (found.mean, found.error, found.count) == (69.0, None, 1)
    assert setting.estimate(lambda r: r.test_acc, ("clip",)).count == 3  # type: ignore[union-attr]


def test_one_seed_has_no_error_bar_anywhere() -> None:
    page = render(make_study(seeds=(0,)))
    figures = page.split('<section id="figures">')[1].split("</section>")[0]
    assert 'class="error"' not in figures and 'class="point' in figures
    for grid in (unseen_table(only(make_study(seeds=(0,)))), *tables_two_to_four(only(make_study(seeds=(0,))))):
        assert not any("±" in cell.text for row in grid.rows for cell in row.cells)
    assert 'class="error"' in render(make_study())


def test_what_was_not_run_or_failed_is_shown_as_such() -> None:
    runs = [r for r in make_study() if (r.criterion, r.ratio) != ("l1", 0.75)]
    runs = [r for r in runs if (r.criterion, r.ratio, r.unseen) != ("hessian", 0.75, "photo")]
    runs = [
        replace(r, status="failed", error="no", test_acc=None) if (r.criterion, r.ratio) == ("l1", 0.5) else r
        for r in runs
    ]
    runs += [make_run("l1", 0.75, "clip", 0, model="deit")]
    (vit, deit) = tables_two_to_four(only(runs))
    test = "Test acc. %"
    assert row_of(vit, Ratio="75 %", Group_score="l1")[test] == "not run"
    assert row_of(vit, Ratio="75 %", Group_score="hessian")[test] == "1 of 2 domains"
    assert row_of(vit, Ratio="50 %", Group_score="l1")[test] == "failed"
    assert row_of(deit, Ratio="", Group_score="dense")[test] == "not run"
    assert len(vit.rows) == len(deit.rows) == 1 + len(CRITERIA) * len(RATIOS)


def test_tables_hold_the_figures_of_the_runs_in_the_papers_columns() -> None:
    (grid,) = tables_two_to_four(only(make_study()))
    # 80 + 4/2 (mean of domains) + 1 (mean of seeds) - 20 * 0.5 - 3; seeds 0, 1, 2 deviate by sqrt(2/3), over sqrt(3).
    assert row_of(grid, Ratio="50 %", Group_score="l1") == {
        "Ratio": "50 %",
        "Group score": "l1",
        "Source": "ours",
        "Params left": "1.00 M",
        "MACs left": "30.0 M",
        "Valid acc. %": "90.00 ± 0.00",
        "Test acc. %": "70.00 ± 0.47",
        "ΔAcc points": "\N{MINUS SIGN}13.00 ± 0.00",
        "MACs ratio": "2.00 ± 0.00",
        "Latency ratio": "1.33 ± 0.00",
        "FT time HH:MM:SS": "00:01:40",
        "Seeds": "3",
    }
    one = cells(table_one(blocks(make_study())))[0]
    group = "digits-dg, leave-one-domain-out"
    assert one[f"{group}: Test acc. %"] == "83.00 ± 0.47" and one["Params"] == "2.00 M"


def test_accuracies_per_domain_are_those_of_the_runs() -> None:
    block = only(make_study())
    row = row_of(unseen_table(block), Ratio="75 %", Group_score="hessian")
    group = "unseen domain, test acc. %"
    assert [row[f"{group}: {name}"] for name in (*DOMAINS, "mean")] == ["66.00 ± 0.47", "70.00 ± 0.47", "68.00 ± 0.47"]
    clip, photo = domain_tables(block)
    assert row_of(clip, Ratio="75 %", Group_score="hessian")["clip (unseen)"] == "66.00 ± 0.47"
    assert row_of(clip, Ratio="75 %", Group_score="hessian")["photo"] == "91.00 ± 0.00"
    assert row_of(photo, Ratio="75 %", Group_score="hessian")["clip"] == "90.00 ± 0.00"


def test_widths_before_and_after_are_those_of_the_runs() -> None:
    (grid,) = width_tables(only(make_study()))
    mlp, value = cells(grid)
    assert (mlp["before"], mlp["50 %: l1"]) == ("192", "97")
    assert (value["before"], value["75 %: hessian"]) == ("6 × 16", "24")  # noqa: RUF001
    assert grid.rows[1].cells[-1].bar == pytest.approx(0.25)


def test_published_rows_stand_beside_the_same_setting_alone() -> None:
    ours = [
        make_run(c, r, None, model="hf:google/vit-base-patch16-224", data="/data/PACS")
        for c, r in [(None, 0.0), ("hessian", 0.5), ("hessian", 0.6)]
    ]
    (grid,) = tables_two_to_four(only(ours))
    paper = [row for row in cells(grid) if row["Source"] == "paper"]
    assert [(row["Ratio"], row["Test acc. %"], row["MACs ratio"]) for row in paper] == [
        ("", "94.33", "–"),  # noqa: RUF001
        ("50 %", "91.39", "2.5"),
    ]
    assert any("pooled domains on all evidence" in note for note in grid.notes)
    text = Page(render(ours)).text
    assert "Published figures stand beside ours" in text and "PACS is not domain generalisation." in text
    text = Page(render(make_study())).text
    assert "None of these runs has" in text and "PACS is not domain generalisation." in text


# --- telling runs apart -------------------------------------------------------------------------------------------


def test_runs_that_differ_in_something_else_are_not_taken_for_repetitions() -> None:
    short = [replace(r, config={**r.config, "epochs": 3}) for r in make_study(seeds=(0,))]
    long = [replace(r, config={**r.config, "epochs": 30}, run=r.run + "x") for r in make_study(seeds=(0,))]
    settings = only(short + long).settings("vit")
    assert {s.method for s in settings if s.ratio} == {f"{c}, epochs {e}" for c in CRITERIA for e in (3, 30)}
    assert [s.method for s in settings if not s.ratio] == ["dense, epochs 3", "dense, epochs 30"]
    scopes = make_study() + [replace(r, scope="local", run=r.run + "x") for r in make_study() if r.criterion]
    methods = {s.method for s in only(scopes).settings("vit")}
    assert methods == {"dense"} | {f"{c}, {scope}" for c in CRITERIA for scope in ("global", "local")}


def test_the_last_of_runs_that_were_repeated_counts() -> None:
    first, second = make_run("l1", 0.5), make_run("l1", 0.5, test_acc=12.0)
    other = make_run("l1", 0.75)
    assert distinct([first, other, second]) == (other, second)
    assert "1 were run again or given twice" in Page(render([first, other, second])).text


def test_protocols_and_selections_are_never_mixed() -> None:
    pooled = [make_run(c, r, None) for c, r in [(None, 0.0), ("l1", 0.5)]]
    oracle = [replace(r, selection="oracle", run=r.run + "o") for r in make_study()]
    found = blocks([*make_study(), *pooled, *oracle])
    assert len(found) == 3
    assert [(b.is_generalisation, b.is_oracle) for b in found] == [(True, False), (False, False), (True, True)]


def test_a_run_that_failed_early_stands_with_the_others_of_its_data() -> None:
    early = replace(
        make_run("l1", 0.95),
        status="failed",
        error="no",
        protocol="leave_one_out",
        selection="",
        unseen=None,
        test_acc=None,
    )
    block = only([*make_study(), early])
    assert block.domains == DOMAINS and block.is_generalisation
    assert "l1 at 95 %" in Page(render([*make_study(), early])).text


# --- the answer ---------------------------------------------------------------------------------------------------


def test_the_answer_names_the_best_and_how_sure_it_is() -> None:
    block = only(make_study())
    found = {f.ratio: (f.best.method, f.rival.method if f.rival else None, f.lead) for f in findings(block)}
    # The distance is 3 points, the two errors are sqrt(2/9) each: 3 > 2 * sqrt(4/9).
    assert found == dict.fromkeys(RATIOS, ("hessian", "l1", "more than two standard errors"))
    said = " ".join(answer(block).sentences)
    assert "With 50 % of the channels removed, hessian on vit keeps the most: 73.0 ± 0.5 % test accuracy" in said
    assert "(mean of 2 unseen domains), 10.0 points less than its dense model (88 % of its accuracy)" in said
    assert "50 % of the parameters and 50 % of the MACs left" in said
    one = only(make_study(seeds=(0,)))
    assert all(f.lead == "one seed, cannot be told from chance" for f in findings(one))


def test_pooled_domains_and_oracles_are_no_answer() -> None:
    pooled = [make_run(c, r, None) for c, r in [(None, 0.0), ("l1", 0.5)]]
    assert "cannot answer the question" in answer(only(pooled)).sentences[0]
    assert "not domain generalisation" in Page(render(pooled)).text
    oracle = [replace(run, selection="oracle (test domain)") for run in make_study()]
    assert "an upper bound" in answer(only(oracle)).sentences[0]
    assert "cannot answer" not in Page(render(make_study())).text


def test_runs_of_dense_models_alone_or_failed_alone_make_a_report() -> None:
    assert "there is no answer yet" in Page(render([make_run(None)])).text
    failed = replace(make_run("l1", 0.5), status="failed", error="out of memory", test_acc=None, curve=(), widths=())
    assert "out of memory" in Page(render([failed])).text
    with pytest.raises(DataError, match="nothing to report"):
        render([])


# --- figures ------------------------------------------------------------------------------------------------------

PRICES = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=30)


@given(PRICES)
def test_the_front_is_what_nothing_else_beats(points: list[tuple[int, int]]) -> None:
    def beaten(p: tuple[int, int]) -> bool:
        return any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)

    assert front([(float(a), float(b)) for a, b in points]) == sorted({p for p in points if not beaten(p)})


def points_of(svg: str) -> list[tuple[float, float]]:
    marks = [e for e in Xml.fromstring(svg).iter("path") if e.get("class") == "mark"]
    places = [re.fullmatch(r"translate\(([\d.]+),([\d.]+)\)", e.get("transform", "")) for e in marks]
    return [(float(p[1]), float(p[2])) for p in places if p]


def ticks_of(svg: str, axis: str) -> dict[float, float]:
    """Where the ticks of an axis stand, by their labels."""
    kind, place = ("tick", "x") if axis == "x" else ("tick end", "y")
    texts = [e for e in Xml.fromstring(svg).iter("text") if e.get("class") == kind]
    sizes = {"k": 1e3, "M": 1e6}
    found = {}
    for e in texts:
        figure, _, unit = (e.text or "").replace("\N{MINUS SIGN}", "-").partition(" ")
        found[float(figure) * sizes.get(unit, 1)] = float(e.get(place, "nan"))
    return found


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_points_stand_where_the_ticks_say(scale: Any) -> None:
    xs, ys = (2e3, 5e4, 3e6), (-12.0, 3.5, 40.0)
    series = Series("a", 0, tuple(Point(x, y, "") for x, y in zip(xs, ys, strict=True)))
    svg = draw(Chart(title="t", x_label="x", y_label="y", series=(series,), x_scale=scale))
    (x_ticks, y_ticks), places = (ticks_of(svg, "x"), ticks_of(svg, "y")), points_of(svg)
    warp = np.log10 if scale == "log" else np.asarray
    x_line = np.polyfit(warp(list(x_ticks)), list(x_ticks.values()), 1)
    y_line = np.polyfit(list(y_ticks), [y - 4 for y in y_ticks.values()], 1)
    assert len(x_ticks) >= 3 and len(y_ticks) >= 3
    for (x, y), a, b in zip(places, xs, ys, strict=True):
        assert x == pytest.approx(np.polyval(x_line, warp(a)), abs=0.3)
        assert y == pytest.approx(np.polyval(y_line, b), abs=0.3)


def test_figures_have_a_point_for_every_setting_and_lead_to_its_runs() -> None:
    runs = make_study() + make_study("deit", seeds=(0,))
    block = only(runs)
    ratio, pareto = ratio_figure(block), pareto_figure(block)
    assert ratio is not None and pareto is not None
    assert [len(points_of(svg)) for svg in ratio.charts] == [4, 4]
    assert [len(points_of(svg)) for svg in pareto.charts] == [2 * (1 + 4)] * 3
    for svg in ratio.charts + pareto.charts:
        for group in (e for e in Xml.fromstring(svg).iter("g") if "point" in (e.get("class") or "")):
            behind = [runs[int(i)] for i in (group.get("data-runs") or "").split()]
            assert len(behind) == (6 if behind[0].model == "vit" else 2)
            assert {(r.model, r.criterion or "dense") for r in behind} == {
                (group.get("data-model"), group.get("data-method"))
            }
    (vit, deit) = curve_figures(block)
    lines = [len([e for e in Xml.fromstring(svg).iter("polyline") if e.get("class") == "line"]) for svg in vit.charts]
    assert lines == [6, 12, 12] * 2 and len(deit.charts) == 6


def test_the_proportional_line_falls_by_as_much_as_is_removed() -> None:
    figure = ratio_figure(only(make_study()))
    assert figure is not None
    svg = figure.charts[0]
    (line,) = [e for e in Xml.fromstring(svg).iter("polyline") if e.get("class") == "guide"]
    ends = [tuple(map(float, place.split(","))) for place in (line.get("points") or "").split()]
    y_ticks, x_ticks = ticks_of(svg, "y"), ticks_of(svg, "x")
    y_line = np.polyfit([y - 4 for y in y_ticks.values()], list(y_ticks), 1)
    assert [x for x, _ in ends] == [x_ticks[50], x_ticks[75]]
    assert [np.polyval(y_line, y) for _, y in ends] == pytest.approx([-50, -75], abs=0.2)


def test_latencies_of_another_machine_are_left_out_and_counted() -> None:
    runs = [replace(r, hardware="another") if r.criterion == "l1" and r.unseen == "clip" else r for r in make_study()]
    figure = pareto_figure(only(runs))
    assert figure is not None
    assert [len(points_of(svg)) for svg in figure.charts] == [5, 5, 3]
    assert "Latencies of 6 runs that were timed on other machines are left out." in figure.notes


# --- one file, every text as it was written -----------------------------------------------------------------------


def test_no_text_of_a_run_becomes_markup() -> None:
    nasty = [
        replace(
            run,
            model=NASTY,
            data=NASTY,
            unseen=NASTY if run.unseen == "clip" else "photo",
            command=NASTY,
            selection=NASTY,
            config={NASTY: NASTY, "seed": run.seed},
            widths=tuple({**w, "name": NASTY, "family": NASTY} for w in run.widths),
        )
        for run in make_study()
    ]
    nasty.append(
        replace(nasty[-1], criterion="l1", ratio=0.95, status="failed", error=NASTY, run="other", test_acc=None)
    )
    plain, page = Page(render(make_study())), Page(render(nasty))
    kinds = {tag for tag, _ in plain.tags}
    assert {tag for tag, _ in page.tags} - kinds <= {"article", "pre"} and "img" not in kinds
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "".join(NASTY.split()) in "".join(page.text.split())
    data = json.loads(page.scripts[0])
    assert data["common"][NASTY] == NASTY and data["runs"][0]["command"] == NASTY


def test_the_page_needs_nothing_but_itself() -> None:
    text = render(make_study())
    page = Page(text)
    outside = ("src", "srcset", "href", "action", "data", "poster", "xlink:href")
    links = [(tag, value) for tag, attributes in page.tags for name, value in attributes.items() if name in outside]
    assert {value for tag, value in links if tag != "a"} == {"data:,"}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {(value or "").lstrip("#") for tag, value in links if tag == "a"} <= set(ids)
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text


def test_the_page_holds_configuration_and_command_of_every_run() -> None:
    runs = make_study()
    data = json.loads(Page(render(runs)).scripts[0])
    assert len(data["runs"]) == len(runs)
    for run, entry in zip(runs, data["runs"], strict=True):
        assert entry["command"] == run.command
        config = {**data["common"], **entry["config"]}
        assert (config["model"], config["seed"], config["split.unseen"]) == ("vit", str(run.seed), run.unseen)


def test_latex_and_markdown_show_text_as_it_was_written() -> None:
    assert latex_text("a_b & 50 % #1 {x} $y^2~\\ <|>") == (
        r"a\_b \& 50 \% \#1 \{x\} \$y\textasciicircum{}2\textasciitilde{}\textbackslash{} "
        r"\textless{}\textbar{}\textgreater{}"
    )
    runs = [replace(run, model="a|b_c*<i>") for run in make_study()]
    grids = tables_two_to_four(only(runs)) + (table_one(blocks(runs)),)
    text = latex(grids)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    bodies = [part.split(r"\end{tabular}")[0] for part in text.split(r"\begin{tabular}")[1:]]
    for grid, body in zip(grids, bodies, strict=True):
        rows = [line for line in body.splitlines() if line.endswith(r"\\") and r"\multicolumn" not in line]
        assert len(rows) == 1 + len(grid.rows)
        assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(grid.columns)}
    markdown = markdown_grids(grids)
    assert r"a\|b\_c\*\<i\>" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == sum(2 + len(grid.rows) for grid in grids)
    assert {len(re.split(r"(?<!\\)\|", row)) - 2 for row in rows} == {len(grid.columns) for grid in grids}


def test_the_command_writes_the_report_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "runs" / "results.jsonl", make_study())
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    names = {"report.html", "tables.md", "tables.tex", "table.md", "results.jsonl", "accuracy.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    printed = capsys.readouterr().out
    assert "leave-one-domain-out" in printed and all(name in printed for name in names)


def test_a_report_without_a_curve_to_draw_has_no_figure(tmp_path: Path) -> None:
    written = save_report([make_run(None)], tmp_path, under_way=2)
    assert [path.name for path in written] == ["report.html", "tables.md", "tables.tex", "table.md", "results.jsonl"]
    assert "2 are still under way or were cut short" in (tmp_path / "report.html").read_text()


def test_a_method_is_chosen_without_the_unseen_domain_and_beside_it_by_an_oracle() -> None:
    # l1 is 3 points behind everywhere, but looks better on the sources under seed 1.
    runs = [replace(r, val_acc=99.0) if r.criterion == "l1" and r.seed == 1 else r for r in make_study()]
    (block,) = blocks(runs)
    grid = choice_table(block)
    assert grid is not None
    assert [row.cells[1].text for row in grid.rows] == ["50 %", "75 %"]
    half = grid.rows[0]
    honest, oracle = [72 + s - 3 * (s == 1) for s in SEEDS], [72 + s for s in SEEDS]
    assert half.cells[2].text == "hessian 4, l1 2" and half.cells[4].text == "hessian 6"
    assert half.cells[3].value == pytest.approx(np.mean(honest))
    assert half.cells[3].text.endswith(f"± {np.std(honest) / np.sqrt(3):.2f}")
    assert half.cells[5].value == pytest.approx(np.mean(oracle))
    chosen = {(runs[i].criterion, runs[i].seed) for i in half.runs}
    assert chosen == {("hessian", 0), ("hessian", 1), ("l1", 1), ("hessian", 2)}
    assert any("oracle" in column.full for column in grid.columns)


def test_nothing_is_chosen_where_there_is_no_choice_or_no_unseen_domain() -> None:
    alone = [run for run in make_study() if run.criterion != "l1"]
    pooled = [make_run(c, r, None, s) for s in SEEDS for c, r in ((None, 0.0), ("l1", 0.5), ("hessian", 0.5))]
    oracle = [replace(run, selection="oracle: looks at the unseen domain") for run in make_study()]
    for runs in (alone, pooled, oracle):
        assert [choice_table(block) for block in blocks(runs)] == [None]


def with_folds() -> list[Result]:
    """Three domains and one seed: l1 is better on the sources, hessian in every fold, and on the unseen domains."""
    runs = []
    for unseen in (domains := ("clip", "photo", "real")):
        for criterion in CRITERIA:
            val = 96.0 if criterion == "l1" else 95.0
            runs.append(make_run(criterion, 0.5, unseen, val_acc=val, protocol="domainbed"))
            for without in domains:
                if without != unseen:
                    own = {"val_acc": 70.0 + (criterion != "l1"), "protocol": "domainbed", "without": without}
                    run = f"{criterion}-{unseen}-{without}"
                    runs.append(make_run(criterion, 0.5, unseen, run=run, test_acc=1.0, **own))
    return runs


def test_folds_of_cross_validation_choose_and_are_not_reported_themselves() -> None:
    runs = with_folds()
    (block,) = blocks(distinct(runs))
    assert len(block.runs) == 6 and len(block.folds) == 12
    assert {run.method for run in (*block.runs, *block.folds)} == set(CRITERIA)
    grid = choice_table(block)
    assert grid is not None
    (row,) = grid.rows
    assert [cell.text for cell in row.cells[2::2]] == ["l1 3", "hessian 3", "hessian 3"]
    assert [cell.value for cell in row.cells[3::2]] == pytest.approx([68 + 1 / 3, 71 + 1 / 3, 71 + 1 / 3])
    means = {s.method: s.estimate(lambda r: r.test_acc) for s in block.settings("vit") if s.ratio}
    assert {name: mean.mean for name, mean in means.items() if mean} == pytest.approx(
        {"hessian": 71 + 1 / 3, "l1": 68 + 1 / 3}
    )
    text = Page(render(runs)).text
    assert "clip, without photo" in text and "leave-one-domain-out cross-validation" in text


def test_a_method_that_lacks_a_fold_is_not_chosen_by_cross_validation() -> None:
    runs = [r for r in with_folds() if (r.criterion, r.unseen, r.without) != ("hessian", "clip", "photo")]
    (block,) = blocks(distinct(runs))
    grid = choice_table(block)
    assert grid is not None and grid.rows[0].cells[4].text == "hessian 2, l1 1"
    folds = [run for run in runs if run.without]
    assert distinct(folds) == ()
    with pytest.raises(DataError, match="other than folds"):
        render(folds)
