"""A sweep: every run of a grid carried out once, here or on Ray, with all that happens to it on record."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from secateur.data import DATASETS, load_split
from secateur.data.hub import PREFIX
from secateur.errors import InputError, SecateurError
from secateur.experiments.config import RunConfig
from secateur.experiments.display import SweepProgress
from secateur.experiments.running import Given, Outcome, Place, Scored, Weights, attempt, failed, prepare, score_all
from secateur.experiments.runs import (
    RunState,
    append_line,
    keep_scores,
    keep_weights,
    kept_scores,
    kept_weights,
    make_folder,
    read_states,
    sole_driver,
)
from secateur.report import Result
from secateur.report.results import CONFIG
from secateur.training import LogConfig, Tick

CHECKPOINTS, LOGS = "checkpoints", "logs"
"""Where a run keeps what it needs to go on, and its curves, in its folder (or, on another machine, a temporary one)."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Where runs go, and what each of them may use.

    `workers` is how many runs go on at a time: 0 runs them one by one in this process, without Ray; None is as many as
    there is room for. `address` is that of a Ray cluster; without it, workers are processes of this machine. Each run
    has `cpus_per_run` cores, which is also its number of threads, and `gpus_per_run` GPUs (a fraction shares one; None
    is one where there are any). Curves go to `trackers`. A run that loses its worker is started again up to
    `lost_limit` times; one that failed is left as it is unless `retry_failed`.
    """

    out: Path
    workers: int | None = None
    address: str | None = None
    cpus_per_run: int = 1
    gpus_per_run: float | None = None
    lost_limit: int = 3
    retry_failed: bool = False
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises InputError for numbers out of range and for a cluster that would not be used."""
        if self.workers is not None and self.workers < 0:
            raise InputError(f"workers must be 0 or more, found {self.workers}")
        if self.cpus_per_run < 1:
            raise InputError(f"cpus_per_run must be at least 1, found {self.cpus_per_run}")
        if self.gpus_per_run is not None and self.gpus_per_run < 0:
            raise InputError(f"gpus_per_run must be 0 or more, found {self.gpus_per_run}")
        if self.lost_limit < 0:
            raise InputError(f"lost_limit must be 0 or more, found {self.lost_limit}")
        if self.address is not None and self.workers == 0:
            raise InputError("workers=0 runs in this process, so an address of a cluster would not be used; drop one")
        if self.trackers:
            LogConfig(self.out, self.trackers)


@dataclass(frozen=True)
class Group:
    """Runs that start from the same weights, the dense one first, and those of their scores that are known."""

    runs: tuple[RunConfig, ...]
    known: Mapping[str, Scored] = field(default_factory=dict)

    @property
    def teacher(self) -> str:
        """The hash of the dense run that others of the group learn from, "" if none does."""
        return next((run.dense.hash for run in self.runs if run.has_teacher), "")

    @property
    def unscored(self) -> tuple[RunConfig, ...]:
        """The runs whose scores are not known yet."""
        return tuple(run for run in self.runs if run.prune and run.score_key not in self.known)


class Ledger:
    """What happened to the runs of a sweep: put on record at once, and shown."""

    def __init__(self, config: SweepConfig, states: Mapping[str, RunState], progress: SweepProgress) -> None:
        """Takes the states of all runs in the folder."""
        self.config, self.progress = config, progress
        self.attempts = {run: state.attempts for run, state in states.items()}
        ended = {run: state for run, state in states.items() if state.status != "running"}
        self.results = {run: state.result for run, state in ended.items() if state.result}
        self._under_way: set[str] = set()
        self._losses: dict[str, int] = {}
        self._waiting: dict[str, list[RunConfig]] = {}

    def started(self, run: RunConfig, where: str) -> None:
        """Records that a run has begun, and where."""
        self.attempts[run.hash] = self.attempts.get(run.hash, 0) + 1
        self._under_way.add(run.hash)
        append_line(make_folder(self.config.out, run), "running", self.attempts[run.hash], where=where)
        self.progress.started(run)

    def moved(self, run: RunConfig, step: int, steps: int, state: str) -> None:
        """Shows how far a run is."""
        self.progress.moved(run, step, steps, state)

    def scored(self, found: Mapping[str, Scored]) -> None:
        """Keeps scores for a sweep that goes on later."""
        for key, scored in found.items():
            keep_scores(self.config.out, key, scored)

    def lost(self, run: RunConfig, why: str) -> bool:
        """Takes note that the worker of a run is gone; returns whether to start it again, else records it as failed."""
        losses = self._losses[run.hash] = self._losses.get(run.hash, 0) + 1
        if losses <= self.config.lost_limit:
            self._under_way.discard(run.hash)
            self.progress.lost(run, why)
            return True
        self.ended(run, Outcome(failed(run, f"lost its worker {losses} times, the last time: {why}")))
        return False

    def ended(self, run: RunConfig, outcome: Outcome) -> None:
        """Records how a run ended; a pruned one beside its dense baseline, as soon as both are known."""
        if run.hash not in self._under_way:
            self.started(run, "")
        self._under_way.discard(run.hash)
        folder = make_folder(self.config.out, run)
        if outcome.weights is not None:
            keep_weights(folder, outcome.weights)
        result = replace(outcome.result, command=f"secateur sweep {folder / CONFIG} --out NEW")
        if result.status == "failed":
            self.results[run.hash] = result
            said = {"error": result.error, "traceback": outcome.traceback, "result": result.to_record()}
            append_line(folder, "failed", self.attempts[run.hash], **said)
        else:
            self._done(run, self._beside_dense(run, result))
            remove(folder / CHECKPOINTS)
        self.progress.ended(run, result)
        if run.prune is None:
            self.compare(self._waiting.pop(run.hash, ()))

    def teacher(self, run: RunConfig) -> Weights | None:
        """Returns the weights that a run learns from, None if it learns from none or they are not there."""
        return kept_weights(self.config.out / run.dense.hash) if run.has_teacher else None

    def compare(self, runs: Iterable[RunConfig]) -> None:
        """Puts the accuracy of the dense baseline beside that of pruned runs that ended before it did."""
        for run in runs:
            result = self.results.get(run.hash)
            if run.prune is None or result is None or result.status == "failed" or result.dense_test_acc is not None:
                continue
            compared = self._beside_dense(run, result)
            if compared.dense_test_acc is not None:
                self._done(run, compared)

    def _done(self, run: RunConfig, result: Result) -> None:
        self.results[run.hash] = result
        folder = make_folder(self.config.out, run)
        append_line(folder, "done", self.attempts[run.hash], result=result.to_record())

    def _beside_dense(self, run: RunConfig, result: Result) -> Result:
        if run.prune is None:
            return result
        dense = self.results.get(run.dense.hash)
        if dense is None or dense.test_acc is None:
            self._waiting.setdefault(run.dense.hash, []).append(run)
            return result
        return replace(result, dense_test_acc=dense.test_acc)


def run_sweep(runs: Sequence[RunConfig], config: SweepConfig, console: Console) -> tuple[Result, ...]:
    """Carries out those of `runs` that are not done yet and returns the results of all, in the given order.

    Each has a folder in `config.out` (see `secateur.experiments.runs`). A sweep that was cut short goes on where it
    was: finished runs are skipped, and those under way take up their last checkpoints. Runs go on when others fail.

    Raises:
        InputError: Another sweep is writing to the folder, Ray is missing, or a data set is not there.
        DataError: A run in the folder is of another version, or its record is broken.
        SecateurError: Runs failed; all others are done, and everything is on record.
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
    results = tuple(ledger.results[run.hash] for run in runs)
    if lost := [result for result in results if result.status == "failed"]:
        first = next(run for run in runs if run.hash == lost[0].run)
        raise SecateurError(
            f"{len(lost)} of {len(runs)} runs failed, the first ({first.label}) with: {lost[0].error}; everything is "
            f"on record in {config.out}, and --retry-failed runs them again"
        )
    return results


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
    return lambda tick: ledger.moved(run, tick.step, tick.steps, str(tick))


def at(place: Place, folder: Path, trackers: tuple[str, ...]) -> Place:
    """Returns a place with checkpoints and logs in a folder."""
    log = LogConfig(folder / LOGS, trackers) if trackers else None
    return replace(place, checkpoint=folder / CHECKPOINTS, log=log)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
