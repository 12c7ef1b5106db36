"""Sweeps: what is on record, who may write it, what is made once, and what survives the death of anyone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from rich.console import Console

import secateur
from secateur.cli import main
from secateur.data.protocol import DOMAINBED
from secateur.errors import DataError, InputError, SecateurError
from secateur.experiments import running
from secateur.experiments.config import RunConfig
from secateur.experiments.display import SweepProgress
from secateur.experiments.grid import expand
from secateur.experiments.ledger import Ledger, SweepConfig
from secateur.experiments.running import Outcome, unstarted
from secateur.experiments.runs import append_line, make_folder, read_state, read_states, sole_driver
from secateur.experiments.sweep import require_success, run_sweep
from secateur.report import Result, read_results
from secateur.report.choice import choice_table
from secateur.report.summary import blocks

DOMAINS, CLASSES = ("dark", "dim", "light"), 10


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times models less thoroughly."""
    monkeypatch.setattr(running, "LATENCY_ROUNDS", 3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of 180 pictures: a class is the place of a spot, a domain its brightness."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for d, domain in enumerate(DOMAINS):
        for c in range(CLASSES):
            folder = root / domain / str(c)
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[4 * (c // 3) : 4 * (c // 3) + 6, 9 * (c % 3) : 9 * (c % 3) + 6] = 120 + 60 * d
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def content(pictures: Path, **changes: Any) -> dict[str, Any]:
    """Returns a grid of three short runs."""
    small = {
        "models": "vit_digits",
        "weights": "random",
        "criteria": "taylor",
        "scopes": "isomorphic",
        "ratios": [0.5, 0.75],
        "datasets": str(pictures),
        "unseen": "light",
        "split": {"image_size": 32, "augment": False},
        "calibration": {"batches": 2, "batch_size": 16},
        "finetune": {"epochs": 2, "warmup_epochs": 0.5, "batch_size": 32},
    }
    return small | changes


def grid(pictures: Path, **changes: Any) -> tuple[RunConfig, ...]:
    """Returns the runs of `content`."""
    return expand(content(pictures, **changes), "grid.yaml")


def sweep(runs: Sequence[RunConfig], out: Path, **options: Any) -> tuple[Result, ...]:
    """Carries out runs in this process, quietly; none may fail."""
    results = run_sweep(runs, SweepConfig(out=out, workers=0, **options), Console(quiet=True))
    require_success(results, out)
    return results


def accuracies(results: Sequence[Result]) -> list[tuple[float | None, ...]]:
    """Returns what runs must agree in if they are the same, to the last digit."""
    return [(r.val_acc, r.test_acc, r.dense_test_acc, *(e["loss"] for e in r.curve)) for r in results]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Returns the record of a run."""
    return [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]


# --- in this process --------------------------------------------------------------------------------------------


def test_a_sweep_leaves_a_folder_for_each_run_and_does_nothing_twice(pictures: Path, tmp_path: Path) -> None:
    runs = grid(pictures)
    results = sweep(runs, tmp_path / "runs")
    assert [(r.criterion, r.ratio, r.status) for r in results] == [
        (None, 0.0, "ok"),
        ("taylor", 0.5, "ok"),
        ("taylor", 0.75, "ok"),
    ]
    for run, result in zip(runs, results, strict=True):
        folder = tmp_path / "runs" / run.hash
        assert json.loads((folder / "config.json").read_text()) == run.to_json() == result.config
        assert [line["status"] for line in lines(folder)] == ["running", "done"]
        assert {path.name for path in folder.iterdir()} == {"config.json", "record.jsonl"}, "no checkpoint is left"
        assert result.run == run.hash
        assert result.dense_test_acc == results[0].test_acc
        assert set(result.domain_acc) == set(DOMAINS)
        assert result.domain_acc["light"] == result.test_acc
        assert [epoch["epoch"] for epoch in result.curve] == [1, 2]
    assert results[2].params == sum_of_params(runs[2])
    assert all((width["after"] <= width["before"]) for width in results[2].widths)
    assert {r.run for r in read_results(tmp_path / "runs")} == {run.hash for run in runs}
    before = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("record.jsonl")}
    assert sweep(runs, tmp_path / "runs") == results
    assert {p: p.read_bytes() for p in (tmp_path / "runs").rglob("record.jsonl")} == before


def sum_of_params(run: RunConfig) -> int:
    """Returns the parameters that are left after a run's cut, counted on the model, which is pruned here again."""
    place = running.Place(run.data)
    prepared = running.prepare(run, place)
    scores = running.score_all([run], prepared, place)[run.score_key].scores
    model = running.base_model(run.model, "light", weights=False)
    network = secateur.trace(model, running._images(running.load_split(run.data, run.split), 1))
    assert run.prune is not None
    assert scores is not None
    plan = secateur.allocate(network, scores, ratio=run.prune.ratio, scope=run.prune.scope)
    return sum(p.numel() for p in secateur.cut(model, plan).parameters())


def test_baselines_and_scores_are_made_once(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    def counted(name: str) -> None:
        real: Callable[..., Any] = getattr(running, name)

        def call(*args: Any, **options: Any) -> Any:
            seen[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(running, name, call)

    for name in ("calibrate", "score", "finetune_"):
        counted(name)
    first = sweep(grid(pictures, criteria=["taylor", "taylor_signed"], ratios=0.5), tmp_path)
    assert seen == {"calibrate": 1, "score": 2, "finetune_": 3}
    seen.clear()
    more = sweep(grid(pictures, criteria=["taylor", "taylor_signed"], ratios=[0.5, 0.75]), tmp_path)
    assert seen == {"finetune_": 2}, "a grid that grew calibrates nothing again"
    assert accuracies(first) == accuracies([more[0], more[1], more[3]])
    for kept in (tmp_path / ".scores").iterdir():
        kept.write_bytes(b"broken")
    seen.clear()
    sweep(grid(pictures, criteria=["taylor", "taylor_signed"], ratios=[0.5, 0.75, 0.9]), tmp_path)
    assert seen == {"calibrate": 1, "score": 2, "finetune_": 2}


def test_folds_of_cross_validation_choose_a_criterion_for_the_unseen_domain(pictures: Path, tmp_path: Path) -> None:
    split = {"image_size": 32, "augment": False, "split": "domainbed"}
    short = {"epochs": 1, "warmup_epochs": 0.5, "batch_size": 32}
    axes = {"criteria": ["l1", "random"], "ratios": 0.5, "without": ["dark", "dim", "light"]}
    runs = grid(pictures, split=split, finetune=short, **axes)
    assert [run.split.without for run in runs] == [None] * 3 + ["dark"] * 3 + ["dim"] * 3
    results = sweep(runs, tmp_path / "runs")
    assert {(r.unseen, r.protocol) for r in results} == {("light", DOMAINBED)}
    assert [r.without for r in results] == [run.split.without for run in runs]
    for fold in results[3:]:
        assert set(fold.domain_acc) == {fold.without}
        baseline = next(r for r in results if r.is_dense and r.without == fold.without)
        assert fold.dense_test_acc == baseline.test_acc
    (block,) = blocks(read_results(tmp_path / "runs"))
    assert len(block.runs) == 3 and len(block.folds) == 6
    table = choice_table(block)
    assert table is not None and any("cross-validation" in column.full for column in table.columns)


def test_a_failed_run_ends_no_other_and_is_run_again_only_when_asked(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(network: secateur.Network, scores: secateur.Scores, **request: Any) -> secateur.Plan:
        if request["ratio"] == 0.5:
            raise ZeroDivisionError("by nought\nand more")
        return secateur.allocate(network, scores, **request)

    runs = grid(pictures)
    monkeypatch.setattr(running, "allocate", allocate)
    with pytest.raises(SecateurError, match=r"1 of 3 runs failed, the first \(vit_digits, taylor 0.5 .*by nought;"):
        sweep(runs, tmp_path)
    folder = tmp_path / runs[1].hash
    last = lines(folder)[-1]
    assert (last["status"], last["attempt"], last["error"]) == ("failed", 1, "ZeroDivisionError: by nought")
    assert "in allocate" in last["traceback"]
    assert Counter(r.status for r in read_results(tmp_path)) == {"ok": 2, "failed": 1}
    monkeypatch.undo()
    with pytest.raises(SecateurError, match="1 of 3"):
        sweep(runs, tmp_path)
    assert len(lines(folder)) == 2
    assert [r.status for r in sweep(runs, tmp_path, retry_failed=True)] == ["ok", "ok", "ok"]
    assert [(line["status"], line["attempt"]) for line in lines(folder)[2:]] == [("running", 2), ("done", 2)]


def test_what_all_runs_need_fails_them_all_with_the_reason(pictures: Path, tmp_path: Path) -> None:
    runs = grid(pictures, models="resnet18", split={"image_size": 32}, probe_epochs=0, weights="pretrained")
    broken = [replace(run, model="vit_digits", weights="pretrained") for run in runs]
    with pytest.raises(SecateurError, match=r"3 of 3 runs failed.*no weights of vit_digits are shipped"):
        sweep(broken, tmp_path)
    with pytest.raises(InputError, match="unknown domain 'lihgt'; did you mean 'light'"):
        sweep(grid(pictures, unseen="lihgt"), tmp_path / "none")
    assert not (tmp_path / "none").exists(), "nothing is begun with data that cannot be used"


def test_a_model_of_a_library_gets_a_head_for_the_data_that_is_trained_first(pictures: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    runs = grid(
        pictures,
        models="vit_tiny_patch16_224",
        ratios=0.5,
        probe_epochs=1,
        finetune={"epochs": 1, "warmup_epochs": 0.5},
    )
    place = running.Place(runs[0].data)
    probed = running.prepare(runs[0], place)
    raw = running.prepare(replace(runs[0], probe_epochs=0), place)
    assert probed.state is not None
    assert raw.state is not None
    differ = {name for name in raw.state if not np.array_equal(raw.state[name], probed.state[name])}
    assert differ == {"head.weight", "head.bias"}
    assert probed.split.image_size == 32
    dense, pruned = sweep(runs, tmp_path)
    reference = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=CLASSES)
    assert dense.params == sum(p.numel() for p in reference.parameters()) > (pruned.params or 0)


def test_runs_that_are_distilled_learn_from_their_dense_baseline(pictures: Path, tmp_path: Path) -> None:
    recipe = {"epochs": 2, "warmup_epochs": 0.5, "batch_size": 32}
    taught = grid(pictures, ratios=0.5, finetune={**recipe, "distillation": {"alpha": 0.9}})
    dense, pruned = sweep(taught, tmp_path / "taught")
    alone = sweep(grid(pictures, ratios=0.5, finetune=recipe), tmp_path / "alone")
    assert taught[0] == grid(pictures, ratios=0.5, finetune=recipe)[0], "the baseline has no teacher"
    assert accuracies([dense]) == accuracies(alone[:1])
    assert accuracies([pruned]) != accuracies(alone[1:])
    weights = tmp_path / "taught" / taught[0].hash / "model.safetensors"
    weights.unlink()
    more = grid(pictures, ratios=[0.5, 0.75], finetune={**recipe, "distillation": {"alpha": 0.9}})
    assert [r.status for r in sweep(more, tmp_path / "taught")] == ["ok"] * 3
    assert weights.exists(), "a baseline that left no weights is run again when one is to learn from it"
    assert [line["status"] for line in lines(weights.parent)] == ["running", "done"] * 2


def test_a_pruned_run_that_ends_before_its_baseline_is_compared_afterwards(pictures: Path, tmp_path: Path) -> None:
    dense, pruned, _ = grid(pictures)
    ledger = Ledger(SweepConfig(out=tmp_path), {}, SweepProgress(2, Console(quiet=True)))
    ledger.ended(pruned, Outcome(replace(unstarted(pruned), test_acc=40.0)))
    assert read_state(tmp_path / pruned.hash).result is not None
    ledger.ended(dense, Outcome(replace(unstarted(dense), test_acc=70.0, dense_test_acc=70.0)))
    state = read_state(tmp_path / pruned.hash)
    assert state.result is not None
    assert state.result.delta_acc == -30.0
    assert [line["status"] for line in lines(tmp_path / pruned.hash)] == ["running", "done", "done"]


def test_a_run_that_keeps_losing_its_worker_is_given_up(pictures: Path, tmp_path: Path) -> None:
    run = grid(pictures)[0]
    ledger = Ledger(SweepConfig(out=tmp_path, lost_limit=1), {}, SweepProgress(1, Console(quiet=True)))
    ledger.started(run, "somewhere")
    assert ledger.lost(run, "the machine is gone")
    ledger.started(run, "elsewhere")
    assert not ledger.lost(run, "this one too")
    state = read_state(tmp_path / run.hash)
    assert (state.status, state.attempts) == ("failed", 2)
    assert "lost its worker 2 times, the last time: this one too" in state.error


# --- records and locks ------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_as_good_as_not_written(pictures: Path, tmp_path: Path) -> None:
    run = grid(pictures)[0]
    folder = make_folder(tmp_path, run)
    append_line(folder, "running", 1)
    whole = (folder / "record.jsonl").read_bytes()
    append_line(folder, "done", 1, result=unstarted(run).to_record())
    line = (folder / "record.jsonl").read_bytes()[len(whole) :]
    for length in (1, len(line) // 2, len(line) - 1):
        (folder / "record.jsonl").write_bytes(whole + line[:length])
        assert read_state(folder).status == "running"
    append_line(folder, "running", 2)
    assert [(each["status"], each["attempt"]) for each in lines(folder)] == [("running", 1), ("running", 2)]
    assert (folder / "record.jsonl").read_bytes().startswith(whole), "what was complete stays"
    (folder / "record.jsonl").write_bytes(whole[:-5])
    assert read_state(folder).status == "new"


def test_broken_records_and_other_versions_are_refused_by_name(pictures: Path, tmp_path: Path) -> None:
    run = grid(pictures)[0]
    folder = make_folder(tmp_path, run)
    append_line(folder, "running", 1)
    (folder / "record.jsonl").write_text('{"status": \n{"status": "running", "attempt": 1}\n')
    with pytest.raises(DataError, match=r"record.jsonl, line 1 is broken"):
        read_states(tmp_path)
    (folder / "record.jsonl").write_text('{"status": "sleeping", "attempt": 1}\n')
    with pytest.raises(DataError, match=r"line 1 is not a line of a record"):
        read_states(tmp_path)
    (folder / "record.jsonl").write_text("")
    (folder / "config.json").write_text(json.dumps(run.to_json() | {"format": 2}))
    for attempt in (lambda: make_folder(tmp_path, run), lambda: sweep([run], tmp_path)):
        with pytest.raises(DataError, match=r"config.json is of format 2, this version .* format 1.* name another"):
            attempt()
    (folder / "config.json").write_text(json.dumps(run.to_json() | {"seed": 5}))
    with pytest.raises(DataError, match="another configuration than its name says"):
        make_folder(tmp_path, run)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        sweep([run], tmp_path / "file")


def test_a_second_driver_is_turned_away_and_a_dead_one_is_told_of(pictures: Path, tmp_path: Path) -> None:
    hold = f"""
import pathlib, time
from secateur.experiments.runs import sole_driver
with sole_driver(pathlib.Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"another sweep is writing to .*process {holder.pid} on .*name another"):
            sweep(grid(pictures), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".driver.json"}
        holder.kill()
    with sole_driver(tmp_path) as died:
        assert f"process {holder.pid} on" in died
    with sole_driver(tmp_path) as died:
        assert died == ""


# --- the command line, and Ray ----------------------------------------------------------------------------------


def written(pictures: Path, path: Path, **changes: Any) -> Path:
    """Writes a grid and returns its file."""
    path.write_text(yaml.safe_dump(content(pictures, **changes)))
    return path


def test_the_command_lists_runs_refuses_bad_grids_and_repeats_a_run_from_its_folder(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = written(pictures, tmp_path / "g.yaml"), tmp_path / "runs"
    assert main(["sweep", str(file), "--out", str(out), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "3 runs, 1 of them dense baselines; 0 done" in shown
    assert all(run.hash in shown for run in grid(pictures))
    assert not out.exists()
    dense = out / grid(pictures)[0].hash / "config.json"
    assert main(["sweep", str(file), "--out", str(out), "--workers", "0"]) == 0
    assert "[3/3] vit_digits, taylor 0.75" in capsys.readouterr().out
    assert main(["sweep", str(dense), "--out", str(tmp_path / "again"), "--workers", "0"]) == 0
    (again,) = read_results(tmp_path / "again")
    (first,) = [result for result in read_results(out) if result.is_dense]
    assert accuracies([again]) == accuracies([first])
    assert first.command == f"secateur sweep {dense} --out NEW"
    capsys.readouterr()
    bad = written(pictures, tmp_path / "bad.yaml", ratio=0.5)
    assert main(["sweep", str(bad), "--out", str(out)]) == 2
    assert "bad.yaml: unknown axis or option 'ratio'; did you mean 'ratios'" in capsys.readouterr().err
    assert main(["sweep", str(file), "--out", str(out), "--workers", "0", "--address", "auto"]) == 2
    assert "drop one" in capsys.readouterr().err


def waited_for(what: Callable[[], Any], driver: subprocess.Popen[str], seconds: float = 120.0) -> Any:
    """Returns what `what` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        assert driver.poll() is None, f"the driver ended early: {driver.communicate()[0]}"
        time.sleep(0.02)
    raise AssertionError(f"nothing happened in {seconds} s")


def under_way(out: Path, run: RunConfig, attempt: int) -> int | None:
    """Returns the process that carries out an attempt of a run, as soon as that has written a checkpoint."""
    folder = out / run.hash
    if not any(folder.glob("checkpoints/step-*.safetensors")):
        return None
    last = lines(folder)[-1]
    begun = (last["status"], last["attempt"]) == ("running", attempt)
    return int(last["where"].rsplit(" ", 1)[1]) if begun else None


@pytest.mark.slow
def test_killing_a_worker_and_then_the_driver_loses_nothing(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    changes = {"ratios": 0.5, "finetune": {"epochs": 40, "warmup_epochs": 0.5, "batch_size": 32}}
    file, out, runs = written(pictures, tmp_path / "g.yaml", **changes), tmp_path / "runs", grid(pictures, **changes)
    call = "import sys; from secateur.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", call, "sweep", str(file), "--out", str(out), "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_DISABLE_DOCKER_CPU_WARNING": "1"}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    with subprocess.Popen(command, **options) as driver:
        worker = waited_for(lambda: under_way(out, runs[0], 1), driver)
        os.kill(worker, signal.SIGKILL)
        again = psutil.Process(waited_for(lambda: under_way(out, runs[0], 2), driver))
        assert again.pid != worker
        driver.kill()
    psutil.wait_procs([again], timeout=60)
    assert not again.is_running(), "workers go with the driver"
    assert read_state(out / runs[0].hash).status == "running"
    (newest, *_) = sorted((out / runs[0].hash).glob("checkpoints/step-*.safetensors"), reverse=True)
    assert 0 < int(newest.stem.removeprefix("step-")) < 40 * 3, "it was cut short in the middle"
    shown = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    resumed = run_sweep(runs, SweepConfig(out=out, workers=0), shown)
    assert f"process {driver.pid} on" in shown.export_text()
    statuses = [(line["status"], line["attempt"]) for line in lines(out / runs[0].hash)]
    assert statuses == [("running", 1), ("running", 2), ("running", 3), ("done", 3)]
    assert accuracies(resumed) == accuracies(sweep(runs, tmp_path / "undisturbed"))
