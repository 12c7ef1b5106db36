"""`secateur sweep`: the runs of a grid, on as many workers as there are."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from secateur.experiments.grid import Grid, load_grid
from secateur.experiments.ledger import SweepConfig
from secateur.experiments.runs import RunState, read_states
from secateur.experiments.sweep import require_success, run_sweep


@dataclass(frozen=True)
class Sweep:
    """Run a grid of models, criteria, ratios, data sets, unseen domains and seeds; go on where it was cut short."""

    grid: Annotated[
        Positional[str],
        arg(metavar="GRID", help="a YAML file, a shipped grid (paper, digits), or the config.json of one run"),
    ]
    out: Path
    """Folder of the runs, one folder each; what is done there already is skipped."""
    workers: int | None = None
    """Runs at a time; 0 runs them one by one in this process, without Ray. Default: as many as there is room for."""
    address: str | None = None
    """Address of a Ray cluster ("auto" finds one on this machine); default: start Ray here."""
    cpus_per_run: int = 1
    """Cores, and threads, of each run."""
    gpus_per_run: float | None = None
    """GPUs of each run; a fraction lets several runs share one. Default: 1 where there are any."""
    lost_limit: int = 3
    """How often a run is started again when its worker is lost."""
    retry_failed: bool = False
    """Run those again that failed before."""
    trackers: tuple[str, ...] | None = None
    """Where curves go: tensorboard, wandb, mlflow. Default: tensorboard, if it is installed."""
    dry_run: bool = False
    """List the runs and stop."""

    def __call__(self, console: Console) -> None:
        """Lists or carries out the runs."""
        config = SweepConfig(
            out=self.out,
            workers=self.workers,
            address=self.address,
            cpus_per_run=self.cpus_per_run,
            gpus_per_run=self.gpus_per_run,
            lost_limit=self.lost_limit,
            retry_failed=self.retry_failed,
            trackers=_default_trackers() if self.trackers is None else self.trackers,
        )
        grid = load_grid(self.grid)
        if self.dry_run:
            _list(grid, read_states(self.out), console)
            return
        start = perf_counter()
        results = run_sweep(grid.runs, config, console)
        took = f"{len(results)} runs in {self.out} after {perf_counter() - start:.0f} s"
        line = f"{took}; see: secateur report {self.out}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        require_success(results, self.out)


def _default_trackers() -> tuple[str, ...]:
    return ("tensorboard",) if find_spec("tensorboard") else ()


def _list(grid: Grid, states: dict[str, RunState], console: Console) -> None:
    """Prints every run of the grid with its state, and how many there are."""
    for run in grid.runs:
        status = states.get(run.hash, RunState()).status
        told = "cut short" if status == "running" else status
        console.print(f"{run.hash}  {told:9}  {run.label}", highlight=False, markup=False, soft_wrap=True)
    dense = sum(run.prune is None for run in grid.runs)
    done = sum(states.get(run.hash, RunState()).status == "done" for run in grid.runs)
    line = f"{len(grid.runs)} runs, {dense} of them dense baselines; {done} done"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
