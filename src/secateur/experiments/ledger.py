"""What a sweep has to do and how far it is: where runs go, which share a start, and everything that happens to them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from secateur.errors import InputError
from secateur.experiments.config import RunConfig
from secateur.experiments.display import SweepProgress
from secateur.experiments.running import Outcome, Place, Scored, Weights, failed
from secateur.experiments.runs import (
    RunState,
    append_line,
    keep_scores,
    keep_weights,
    kept_weights,
    make_folder,
)
from secateur.report import Result
from secateur.report.results import CONFIG
from secateur.training import LogConfig

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
