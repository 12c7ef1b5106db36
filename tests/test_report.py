"""Records round-trip and refuse what is broken; tables and figures show what was recorded."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
from pathlib import Path

import pytest
from rich.console import Console

from secateur.errors import DataError
from secateur.files import write_text
from secateur.report import COLUMNS, Result, markdown, read_results, save_figure, table, write_results
from secateur.report.provenance import config_hash, hardware, versions
from secateur.report.results import successes
from secateur.report.table import clock, quantity


def dense(model: str = "vit", seed: int = 0) -> Result:
    return Result(
        model=model,
        criterion=None,
        ratio=0.0,
        scope="global",
        seed=seed,
        data="digits-dg",
        unseen="sketch",
        protocol="leave-one-domain-out",
        params=1_234_567,
        macs=45_678_901,
        dense_params=1_234_567,
        dense_macs=45_678_901,
        val_acc=93.0,
        test_acc=80.0,
        dense_test_acc=80.0,
        latency=0.05,
        dense_latency=0.05,
        finetune_seconds=3_723.4,
        config_hash="0123456789ab",
        versions=versions(),
        hardware=hardware(),
    )


def pruned(criterion: str, ratio: float, test_acc: float, model: str = "vit", seed: int = 0) -> Result:
    return dataclasses.replace(
        dense(model, seed),
        criterion=criterion,
        ratio=ratio,
        params=400_000,
        macs=9_135_780,
        test_acc=test_acc,
        latency=0.02,
    )


def study(models: tuple[str, ...] = ("vit",)) -> list[Result]:
    runs = []
    for model in models:
        runs.append(dense(model))
        runs += [pruned(c, r, 80 - 30 * r - 2 * i, model) for i, c in enumerate(("l1", "random")) for r in (0.5, 0.95)]
    return runs


def text(results: list[Result], width: int = 80) -> str:
    shown = io.StringIO()
    Console(width=width, file=shown).print(table(results))
    return shown.getvalue()


def test_results_read_back_as_written_in_order(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "results.jsonl"
    runs = [
        *study(),
        dataclasses.replace(dense(), status="failed", error="it broke | here", val_acc=None, test_acc=None),
    ]
    write_results(file, runs)
    assert list(read_results(file)) == runs
    assert read_results(file.parent) == read_results(file)
    assert list(successes(runs)) == runs[:-1]


def test_derived_quantities_follow_their_definitions_and_are_written_out(tmp_path: Path) -> None:
    run = pruned("l1", 0.5, 72.5)
    assert run.delta_acc == pytest.approx(-7.5)
    assert run.macs_ratio == pytest.approx(45_678_901 / 9_135_780)
    assert run.latency_ratio == pytest.approx(2.5)
    write_results(tmp_path / "results.jsonl", [run])
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert record["delta_acc"] == run.delta_acc
    assert {"torch", "python", "secateur"} - record["versions"].keys() <= {"secateur"}


def test_a_line_cut_short_is_named_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    write_results(file, [dense()])
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"results\.jsonl, line 2: broken or cut short"):
        read_results(file)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ratio": "half"}, "ratio should be float, found 'half'"),
        ({"seed": True}, "seed should be int"),
        ({"test_acc": float("nan")}, "test_acc should be finite"),
        ({"status": "perhaps"}, "status should be one of ok, failed"),
        ({"surprise": 1}, "unknown fields surprise"),
        ({"model": None}, "model should be str"),
    ],
)
def test_a_line_with_foreign_values_is_refused(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(dense().to_record() | change) + "\n")
    with pytest.raises(DataError, match=f"line 1: .*{complaint}"):
        read_results(file)


def test_missing_fields_foreign_files_and_empty_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    with pytest.raises(DataError, match="no results at"):
        read_results(file)
    file.write_text("")
    with pytest.raises(DataError, match="holds no run"):
        read_results(file)
    file.write_text('{"model": "vit"}\n')
    with pytest.raises(DataError, match="lacks criterion, data, protocol"):
        read_results(file)
    file.write_text("[1, 2]\n")
    with pytest.raises(DataError, match="expected an object"):
        read_results(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a text file"):
        read_results(file)


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    with pytest.raises(DataError, match="not finite"):
        write_results(file, [dense(), dataclasses.replace(dense(), val_acc=float("inf"))])
    assert not file.exists()


def test_table_has_the_columns_and_the_dense_row_first() -> None:
    runs = study()
    shown = text(runs[1:] + runs[:1])
    words = " ".join(shown.split())
    for column in COLUMNS:
        assert all(part in words for part in column.split())
    rows = [line.split() for line in shown.splitlines() if line.endswith("01:02:03 ")]
    assert rows[0] == ["-", "dense", "1.23", "M", "45.7", "M", "93.00", "80.00", "-", "1.00", "1.00", "01:02:03"]
    assert rows[1][:10] == ["50", "%", "l1", "400", "k", "9.14", "M", "93.00", "65.00", "-15.00"]
    assert rows[1][10:] == ["5.00", "2.50", "01:02:03"]
    assert [row[2] for row in rows[1:]] == ["l1", "random", "l1", "random"]
    assert max(map(len, shown.splitlines())) <= 80


def test_every_model_has_a_section_of_its_own() -> None:
    shown = text(study(("vit", "beit")))
    assert shown.index("vit on digits-dg") < shown.index("beit on digits-dg")
    assert shown.count(" dense   ") == 2


def test_the_dense_baseline_stands_in_the_section_of_every_scope() -> None:
    runs = [dataclasses.replace(dense(), scope="")]
    runs += [dataclasses.replace(pruned("l1", 0.5, 70.0), scope=scope) for scope in ("global", "local")]
    shown = text(runs)
    assert shown.count(" dense   ") == 2 and shown.count(" l1 ") == 2
    assert "; global scope, seed 0" in " ".join(shown.split()) and "; local scope, seed 0" in " ".join(shown.split())
    assert "unseen sketch; seed 0" in text(runs[:1], 120)


def test_table_says_that_pooled_domains_are_no_domain_generalisation() -> None:
    pooled = [dataclasses.replace(run, unseen=None, protocol="pooled") for run in study()]
    assert "not domain generalisation" in " ".join(text(pooled).split())
    assert "not domain generalisation" not in " ".join(text(study()).split())


def test_failed_runs_are_shown_with_their_error_and_markup_is_literal() -> None:
    failed = dataclasses.replace(pruned("l1", 0.5, 0.0), status="failed", error="[bold]oops[/]", test_acc=None)
    runs = [*study(), failed]
    assert "l1 at 50% failed: [bold]oops[/]" in text(runs)
    assert "- l1 at 50% failed: [bold]oops[/]" in markdown(runs)


def test_markdown_rows_have_as_many_cells_as_there_are_columns() -> None:
    rows = [line for line in markdown(study(("vit", "deit"))).splitlines() if line.startswith("|")]
    assert len(rows) == 2 * (2 + 5)
    assert {row.count("|") for row in rows} == {len(COLUMNS) + 1}


def test_counts_and_durations_read_well() -> None:
    assert [quantity(n) for n in (999, 1_000, 85_800_000, 17_563_000_000)] == ["999", "1.00 k", "85.8 M", "17.6 G"]
    assert [clock(s) for s in (0.4, 59.6, 7_269)] == ["00:00:00", "00:01:00", "02:01:09"]


@pytest.mark.parametrize("models", [("vit",), ("vit", "deit", "beit")])
def test_figure_is_a_png_with_a_panel_per_model(tmp_path: Path, models: tuple[str, ...]) -> None:
    runs = [*study(models), *(pruned("l1", r, 40.0, seed=1) for r in (0.5, 0.95))]
    save_figure(runs, tmp_path / "figure.png")
    data = (tmp_path / "figure.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert abs(width - 150 * (1.1 + 3.9 * len(models))) <= 1
    assert height == 705
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_a_figure_without_points_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to draw"):
        save_figure([dense()], tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "table.md", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "table.md", "new \ud800")
    assert (tmp_path / "table.md").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]


def test_config_hash_depends_on_every_field_and_on_nothing_else() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        names: tuple[str, ...] = ("a", "b")
        rates: frozenset[float] = frozenset((0.1, 0.2, 0.3))
        inner: dict[str, int] = dataclasses.field(default_factory=lambda: {"x": 1, "y": 2})

    assert config_hash(Config()) == config_hash(Config(inner={"y": 2, "x": 1}))
    assert config_hash(Config()) != config_hash(Config(inner={"y": 2, "x": 3}))
    assert config_hash(Config()) != config_hash(Config(names=("b", "a")))
