"""Folders of runs are read as they were left, and those of another version or broken ones are refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from report_runs import make_run, make_study, write_run
from secateur.errors import DataError
from secateur.report import Result, read_results, write_results
from secateur.report.results import num_under_way

CONFIG: dict[str, Any] = {
    "format": 1,
    "model": "vit",
    "seed": 4,
    "data": "digits-dg",
    "split": {"split": "leave_one_out", "unseen": "clip"},
    "prune": {"criterion": "l1", "ratio": 0.5, "scope": "local"},
}


def line(status: str, **more: Any) -> dict[str, Any]:
    return {"time": "2026-01-01T00:00:00+00:00", "status": status, "attempt": 1, **more}


def test_all_fields_survive_a_file_of_results(tmp_path: Path) -> None:
    runs = make_study()
    write_results(tmp_path / "results.jsonl", runs)
    assert list(read_results(tmp_path)) == runs


def test_a_record_without_the_later_fields_still_loads() -> None:
    later = {"run", "config", "command", "domain_acc", "selection", "widths", "curve", "prune_seconds"}
    record = make_run("l1", 0.5).to_record()
    old = Result.from_record({k: v for k, v in record.items() if k not in later | {"train_images_per_second"}})
    assert (old.run, old.config, old.command, old.domain_acc, old.widths, old.curve) == ("", {}, "", {}, (), ())
    assert old.prune_seconds is None and old.test_acc == 67.0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"domain_acc": {"clip": "high"}}, r"domain_acc\['clip'\] should be float"),
        ({"curve": [{"epoch": 1, "loss": float("nan")}]}, r"curve\[0\]\['loss'\] should be finite"),
        ({"widths": {"name": "mlp"}}, "widths should be Sequence"),
        ({"widths": ["mlp"]}, r"widths\[0\] should be Mapping"),
        ({"config": []}, "config should be Mapping"),
        ({"versions": {"torch": 2}}, r"versions\['torch'\] should be str"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_with_their_place(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        Result.from_record(make_run("l1", 0.5).to_record() | change)


def test_the_last_line_of_a_record_counts(tmp_path: Path) -> None:
    run = make_run("l1", 0.5)
    done = line("done", result=run.to_record())
    write_run(tmp_path, "a", CONFIG, line("running"), line("failed", error="no"), line("running"), done)
    write_run(tmp_path, "b", CONFIG, line("running"))
    write_run(tmp_path, "c", CONFIG, done, line("running"))
    assert read_results(tmp_path) == (run,)
    assert read_results(tmp_path / "a") == (run,)
    assert num_under_way(tmp_path) == 2
    with pytest.raises(DataError, match=r"none of the 1 runs in .* has ended"):
        read_results(tmp_path / "b")


def test_a_line_cut_short_by_a_crash_is_as_good_as_not_written(tmp_path: Path) -> None:
    run = make_run("l1", 0.5)
    folder = write_run(tmp_path, "a", CONFIG, line("running"))
    whole = json.dumps(line("done", result=run.to_record()))
    with (folder / "record.jsonl").open("a") as file:
        file.write(whole[:-20])
    assert num_under_way(tmp_path) == 1
    with (folder / "record.jsonl").open("a") as file:
        file.write(whole[-20:] + "\n")
    assert read_results(tmp_path) == (run,)


def test_a_failed_run_is_told_by_its_result_or_else_by_its_configuration(tmp_path: Path) -> None:
    told = dataclasses.replace(make_run("l1", 0.5), status="failed", error="disk full", test_acc=None)
    write_run(tmp_path, "a", CONFIG, line("failed", error="disk full", result=told.to_record()))
    write_run(tmp_path, "b", CONFIG, line("failed", error="worker lost"))
    first, second = sorted(read_results(tmp_path), key=lambda r: r.error or "")
    assert first == told
    assert (second.status, second.error, second.run, second.config) == ("failed", "worker lost", "b", CONFIG)
    assert (second.model, second.criterion, second.ratio, second.scope) == ("vit", "l1", 0.5, "local")
    assert (second.data, second.unseen, second.seed) == ("digits-dg", "clip", 4)


def test_runs_come_in_the_order_of_what_was_run_whatever_their_folders_are_called(tmp_path: Path) -> None:
    runs = make_study()
    for i, run in enumerate(runs):
        write_run(tmp_path, f"{(i * 7) % len(runs):02}", CONFIG, line("done", result=run.to_record()))
    order = [(r.criterion or "", r.ratio, str(r.unseen), r.seed) for r in read_results(tmp_path)]
    assert len(order) == len(runs) and order == sorted(order)


@pytest.mark.parametrize(
    ("config", "record", "complaint"),
    [
        ({"format": 2}, "", "config.json is of format 2, this version reads format 1"),
        ([], "", "config.json is of format None"),
        (CONFIG, "{}\n", r"record\.jsonl, line 1: status should be one of running, done, failed, found None"),
        (CONFIG, '{"status": "perhaps"}\n', "found 'perhaps'"),
        (CONFIG, '{"status": "done"}\n', "line 1: expected an object with the fields of a run"),
        (CONFIG, '{"status": \n', "line 1: broken or cut short"),
        (CONFIG, '{"status": "done", "result": {"model": "x"}}\n', "line 1: the run lacks"),
    ],
)
def test_another_version_and_broken_records_are_refused(
    tmp_path: Path, config: Any, record: str, complaint: str
) -> None:
    folder = write_run(tmp_path, "a", config)
    (folder / "record.jsonl").write_text(record or json.dumps(line("running")) + "\n")
    with pytest.raises(DataError, match=complaint):
        read_results(tmp_path)


def test_a_run_without_its_configuration_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", CONFIG, line("running"))
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_results(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json is missing"):
        read_results(tmp_path)
