"""Runs as Ray tasks: on the cores and GPUs of this machine, or on a cluster that is there already.

The driver alone keeps records. What runs share goes through Ray's object store, and what happens comes back through a
mailbox on the driver's machine, so that workers need no file system in common with it. Ray itself never starts a run
again: a run that lost its worker is told from one that failed here, and both are on record.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import InputError
from secateur.experiments.config import RunConfig
from secateur.experiments.ledger import CHECKPOINTS, Group, Ledger, SweepConfig, at, remove
from secateur.experiments.running import (
    Given,
    Outcome,
    Place,
    Prepared,
    Scored,
    Weights,
    attempt,
    failed,
    prepare,
    score_all,
)
from secateur.experiments.runs import make_folder
from secateur.report.results import CONFIG
from secateur.training import Tick

POLL = 0.5
"""Seconds between looks at the mailbox."""


def on_ray(groups: Sequence[Group], ledger: Ledger, where: Mapping[str, str]) -> None:
    """Carries out all runs on Ray and returns when all of them ended.

    Raises InputError if Ray is not installed, cannot be reached, or will never have what a run needs.
    """
    with _connected(ledger.config) as ray:
        _Driver(ray, groups, ledger, where).work()


@contextmanager
def _connected(config: SweepConfig) -> Iterator[Any]:
    """Starts Ray on this machine, or connects to a cluster, for a while."""
    try:
        import ray
    except ImportError as error:
        raise InputError(f"sweeps need the extra: pip install 'secateur[sweep]', or --workers 0 ({error})") from error
    options: dict[str, Any] = {"address": config.address or "local", "log_to_driver": False, "logging_level": "ERROR"}
    if config.address is None:
        cores = os.cpu_count() or 1
        # Told by number, so that more workers than cores may be asked for.
        options["num_cpus"] = max(1, cores // config.cpus_per_run if config.workers is None else config.workers)
        options["num_cpus"] *= config.cpus_per_run
        options["include_dashboard"] = False
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise InputError(f"Ray cannot be started or reached at {options['address']}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


# --- on the workers ---------------------------------------------------------------------------------------------


class Mailbox:
    """What workers have to tell, until the driver looks."""

    def __init__(self) -> None:
        """Starts empty."""
        self._messages: list[tuple[Any, ...]] = []

    def put(self, *message: Any) -> None:
        """Leaves a message."""
        self._messages.append(message)

    def take(self) -> list[tuple[Any, ...]]:
        """Returns all messages since the last time."""
        messages, self._messages = self._messages, []
        return messages


@dataclass(frozen=True)
class Job:
    """What a worker is told about a run: its configuration, where data and the driver's folder are, what it may use."""

    run: RunConfig
    data: str
    out: Path
    threads: int
    trackers: tuple[str, ...]
    is_teacher: bool


def _place(data: str, threads: int) -> Place:
    torch.set_num_threads(threads)
    import ray

    return Place(data, "cuda" if ray.get_gpu_ids() else "cpu")


def prepare_task(job: Job) -> Prepared:
    """Returns `prepare` of a run, on a worker."""
    return prepare(job.run, _place(job.data, job.threads))


def score_task(job: Job, group: Group, prepared: Prepared) -> dict[str, Scored]:
    """Returns the scores that a group lacks, on a worker."""
    return score_all(group.unscored, prepared, _place(job.data, job.threads))


def run_task(
    job: Job, mailbox: Any, prepared: Prepared, scored: Mapping[str, Scored], teacher: Weights | None
) -> Outcome:
    """Returns `attempt` of a run, on a worker, and says how far it is.

    The checkpoint is in the run's own folder if that can be seen from here, else in a temporary one of this machine.
    """
    run, own = job.run, job.out / job.run.hash
    mailbox.put.remote("started", run.hash, f"{socket.gethostname()}, process {os.getpid()}")
    shared = (own / CONFIG).is_file()
    scratch = own if shared else Path(tempfile.gettempdir()) / "secateur-sweep" / run.hash
    scratch.mkdir(parents=True, exist_ok=True)
    place = at(_place(job.data, job.threads), scratch, job.trackers)
    last = 0.0

    def watch(tick: Tick) -> None:
        nonlocal last
        if tick.val_accuracy is not None or time.monotonic() - last > 1.0:
            last = time.monotonic()
            mailbox.put.remote("moved", run.hash, tick.step, tick.steps, f"epoch {tick.epoch}/{tick.epochs}")

    given = Given(prepared, scored.get(run.score_key) if run.prune else None, teacher)
    outcome = attempt(run, given, place, watch, is_teacher=job.is_teacher)
    if not shared and outcome.result.status == "ok":
        remove(scratch / CHECKPOINTS)
    return outcome


# --- on the driver ----------------------------------------------------------------------------------------------


class _Driver:
    """The loop that hands out runs, no more at a time than there is room for and a few to come."""

    def __init__(self, ray: Any, groups: Sequence[Group], ledger: Ledger, where: Mapping[str, str]) -> None:
        self.ray, self.ledger, self.config, self.where = ray, ledger, ledger.config, where
        gpus = self.config.gpus_per_run
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        self.needs = {"num_cpus": self.config.cpus_per_run, "num_gpus": gpus}
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self.mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        shared = {**self.needs, "max_retries": self.config.lost_limit}
        self.prepare, self.score = (ray.remote(task).options(**shared) for task in (prepare_task, score_task))
        self.run = ray.remote(run_task).options(**self.needs, max_retries=0)
        self.todo = deque((number, run) for number, group in enumerate(groups) for run in group.runs)
        self.groups = groups
        self.left = [len(group.runs) for group in groups]
        self.shared: dict[int, tuple[Any, Any, Any]] = {}
        self.teachers: dict[int, Any] = {}
        self.runs: dict[Any, tuple[int, RunConfig]] = {}
        self.scores: set[Any] = set()
        self.by_hash = {run.hash: run for group in groups for run in group.runs}

    def work(self) -> None:
        """Returns when every run has ended."""
        self.check_room()
        while self.todo or self.runs:
            while len(self.runs) < self.room() and (ready := self.next_ready()) is not None:
                self.todo.remove(ready)
                self.submit(*ready)
            ready, _ = self.ray.wait([*self.runs, *self.scores], num_returns=1, timeout=POLL)
            self.read_mailbox()
            for ref in ready:
                self.keep_scores(ref) if ref in self.scores else self.collect(ref)

    def next_ready(self) -> tuple[int, RunConfig] | None:
        """Returns the next run whose teacher, if it has one, is not on the way."""
        if not self.todo or not self.todo[0][1].has_teacher:
            return self.todo[0] if self.todo else None
        coming = {run.hash for _, run in (*self.todo, *self.runs.values())}
        return next((job for job in self.todo if not (job[1].has_teacher and job[1].dense.hash in coming)), None)

    def check_room(self) -> None:
        """Raises InputError if a run asks for more than any machine has."""
        for node in self.ray.nodes():
            has = node["Resources"]
            if node["Alive"] and all(
                has.get(kind, 0) >= self.needs[key] for kind, key in (("CPU", "num_cpus"), ("GPU", "num_gpus"))
            ):
                return
        cpus, gpus = self.needs["num_cpus"], self.needs["num_gpus"]
        raise InputError(f"no machine has the {cpus} CPUs and {gpus:g} GPUs that a run is to have; ask for less")

    def room(self) -> int:
        """Returns how many runs may be handed out: those that go on at a time and, unless limited, as many to come."""
        if self.config.workers is not None and self.config.address is not None:
            return self.config.workers
        has = self.ray.cluster_resources()
        at_a_time = has.get("CPU", 0) / self.needs["num_cpus"]
        if self.needs["num_gpus"]:
            at_a_time = min(at_a_time, has.get("GPU", 0) / self.needs["num_gpus"])
        return 2 * max(1, int(at_a_time))

    def submit(self, number: int, run: RunConfig) -> None:
        """Hands out a run, and before the first of a group what they share."""
        config = self.config
        # Before the run begins, so that a worker on this machine sees its folder.
        make_folder(config.out, run)
        group, out = self.groups[number], config.out.absolute()
        is_teacher = run.hash == group.teacher
        job = Job(run, self.where[run.data], out, config.cpus_per_run, config.trackers, is_teacher)
        if number not in self.shared:
            prepared, known = self.prepare.remote(job), self.ray.put(dict(group.known))
            found = known
            if group.unscored:
                found = self.score.remote(job, group, prepared)
                self.scores.add(found)
            self.shared[number] = prepared, known, found
        prepared, known, found = self.shared[number]
        scored = known if run.prune is None or run.score_key in group.known else found
        if run.has_teacher and number not in self.teachers:
            self.teachers[number] = self.ray.put(self.ledger.teacher(run))
        teacher = self.teachers.get(number) if run.has_teacher else None
        self.runs[self.run.remote(job, self.mailbox, prepared, scored, teacher)] = number, run

    def collect(self, ref: Any) -> None:
        """Takes in how a run ended, or hands it out again if its worker was lost."""
        number, run = self.runs.pop(ref)
        errors = self.ray.exceptions
        try:
            self.ledger.ended(run, self.ray.get(ref))
        except errors.RayTaskError as error:
            # Raised by what runs share: `attempt` itself lets nothing through.
            cause = error.cause if isinstance(error.cause, Exception) else error
            self.ledger.ended(run, Outcome(failed(run, cause), str(error)))
        except errors.RayError as error:
            if isinstance(error, errors.ObjectLostError):
                self.shared.pop(number, None)
            if self.ledger.lost(run, _reason(error)):
                self.todo.appendleft((number, run))
                return
        self.left[number] -= 1
        if not self.left[number]:
            # Nothing of the group is needed any more, so its place in the object store is given back.
            self.shared.pop(number, None)
            self.teachers.pop(number, None)

    def keep_scores(self, ref: Any) -> None:
        """Hands scores to the ledger; the runs that need them tell if there are none."""
        self.scores.discard(ref)
        with suppress(self.ray.exceptions.RayError):
            self.ledger.scored(self.ray.get(ref))

    def read_mailbox(self) -> None:
        """Tells the ledger what workers said of runs that have not ended."""
        under_way = {run.hash for _, run in self.runs.values()}
        with suppress(self.ray.exceptions.RayError):
            for kind, name, *rest in self.ray.get(self.mailbox.take.remote(), timeout=60):
                if name in under_way:
                    (self.ledger.started if kind == "started" else self.ledger.moved)(self.by_hash[name], *rest)


def _reason(error: Exception) -> str:
    """Returns in a line what became of a worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"the worker was lost ({type(error).__name__}: {lines[0] if lines else 'no reason given'})"
