"""A sweep: every run of a grid carried out once, here or on Ray, with all that happens to it on record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from secateur.data import DATASETS, load_split
from secateur.data.hub import PREFIX
from secateur.errors import SecateurError
from secateur.experiments.config import RunConfig
from secateur.experiments.display import SweepProgress
from secateur.experiments.ledger import Group, Ledger, SweepConfig, at
from secateur.experiments.running import Given, Outcome, Place, attempt, failed, prepare, score_all
from secateur.experiments.runs import (
    RunState,
    kept_scores,
    kept_weights,
    read_states,
    sole_driver,
)
from secateur.report import Result
from secateur.report.results import CONFIG
from secateur.training import Tick


def run_sweep(runs: Sequence[RunConfig], config: SweepConfig, console: Console) -> tuple[Result, ...]:
    """Carries out those of `runs` that are not done yet and returns the results of all, in the given order.

    Each has a folder in `config.out` (see `secateur.experiments.runs`). A sweep that was cut short goes on where it
    was: finished runs are skipped, and those under way take up their last checkpoints. Runs go on when others fail;
    see `require_success`.

    Raises:
        InputError: Another sweep is writing to the folder, Ray is missing, or a data set is not there.
        DataError: A run in the folder is of another version, or its record is broken.
    """
    read_states(config.out)  # Before a lock is put into a folder that this version cannot go on with.
    where = data_places(runs, elsewhere=config.address is not None)
    with sole_driver(config.out) as died:
        states = read_states(config.out)
        todo = pending(runs, states, config)
        with SweepProgress(len(todo), console) as progress:
            _announce(progress, runs, todo, died)
            ledger = Ledger(config, states, progress)
            ledger.compare(run for run in runs if run.hash in states)
            groups = grouped(todo, config.out)
            if config.workers == 0:
                in_process(groups, ledger, where)
            elif groups:
                from secateur.experiments.cluster import on_ray

                on_ray(groups, ledger, where)
    return tuple(ledger.results[run.hash] for run in runs)


def require_success(results: Sequence[Result], out: Path) -> None:
    """Raises SecateurError if runs failed: how many, and the first with its error; `out` is where all are on record."""
    if lost := [result for result in results if result.status == "failed"]:
        first = RunConfig.from_json(lost[0].config, str(out / lost[0].run / CONFIG))
        raise SecateurError(
            f"{len(lost)} of {len(results)} runs failed, the first ({first.label}) with: {lost[0].error}; everything "
            f"is on record in {out}"
        )


def _announce(progress: SweepProgress, runs: Sequence[RunConfig], todo: Sequence[RunConfig], died: str) -> None:
    if died:
        progress.say(f"the last sweep here ({died}) was cut short; going on where it was")
    if len(todo) < len(runs):
        progress.say(f"{len(runs) - len(todo)} of {len(runs)} runs ended before; {len(todo)} to do")


def pending(runs: Iterable[RunConfig], states: Mapping[str, RunState], config: SweepConfig) -> list[RunConfig]:
    """Returns the runs to carry out: not those that are done, and those that failed only if that is asked for.

    A dense run that is done but has left no weights is carried out again if others are still to learn from it.
    """
    over = {"done"} if config.retry_failed else {"done", "failed"}
    todo = [run for run in runs if states.get(run.hash, RunState()).status not in over]
    wanted = {run.dense.hash for run in todo if run.has_teacher}
    lacking = {name for name in wanted if kept_weights(config.out / name) is None}
    names = {run.hash for run in todo}
    return [
        run
        for run in runs
        if run.hash in names or (run.hash in lacking and states.get(run.hash, RunState()).status == "done")
    ]


def grouped(runs: Iterable[RunConfig], out: Path) -> list[Group]:
    """Returns runs by the weights that they start from, with the scores that were kept."""
    by_base: dict[str, list[RunConfig]] = {}
    for run in runs:
        by_base.setdefault(run.base_key, []).append(run)
    groups = []
    for members in by_base.values():
        keys = {run.score_key: None for run in members if run.prune}
        groups.append(Group(tuple(sorted(members, key=lambda run: run.prune is not None)), kept_scores(out, keys)))
    return groups


def data_places(runs: Iterable[RunConfig], *, elsewhere: bool) -> dict[str, str]:
    """Returns where the data sets of `runs` are: names as they are, folders as absolute paths.

    Opens each, unless the runs are carried out `elsewhere`, on machines that may have data which this one lacks.

    Raises what `load_split` raises.
    """
    where: dict[str, str] = {}
    opened = set()
    for run in runs:
        named = run.data in DATASETS or run.data.startswith(PREFIX)
        where[run.data] = run.data if named else str(Path(run.data).absolute())
        if not elsewhere and (run.data, run.split) not in opened:
            opened.add((run.data, run.split))
            load_split(where[run.data], run.split)
    return where


def in_process(groups: Iterable[Group], ledger: Ledger, where: Mapping[str, str]) -> None:
    """Carries out all runs one after the other in this process."""
    config = ledger.config
    torch.set_num_threads(config.cpus_per_run)
    device = "cuda" if torch.cuda.is_available() and config.gpus_per_run != 0 else "cpu"
    for group in groups:
        place = Place(where[group.runs[0].data], device)
        try:
            prepared = prepare(group.runs[0], place)
            found = score_all(group.unscored, prepared, place) if group.unscored else {}
        except SecateurError as error:
            for run in group.runs:
                ledger.ended(run, Outcome(failed(run, error)))
            continue
        ledger.scored(found)
        known = {**group.known, **found}
        for run in group.runs:
            ledger.started(run, "this process")
            given = Given(prepared, known[run.score_key] if run.prune else None, ledger.teacher(run))
            here = at(place, config.out / run.hash, config.trackers)
            outcome = attempt(run, given, here, _watch(ledger, run), is_teacher=run.hash == group.teacher)
            ledger.ended(run, outcome)


def _watch(ledger: Ledger, run: RunConfig) -> Callable[[Tick], None]:
    return lambda tick: ledger.moved(run, tick.step, tick.steps, f"epoch {tick.epoch}/{tick.epochs}")
