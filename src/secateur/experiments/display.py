"""What a sweep shows while it runs: one live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from secateur.experiments.config import RunConfig
from secateur.report import Result
from secateur.training.progress import Bars


class SweepProgress(Bars):
    """A bar for all runs with the time that is left, and one for each run under way.

        with SweepProgress(total=320, console=console) as progress:
            progress.started(run)
            progress.moved(run, 20, 340, "epoch 2/20")
            progress.ended(run, result)

    Where there is no terminal, a line is printed whenever a run ends or is lost.
    """

    def __init__(self, total: int, console: Console) -> None:
        """Takes the number of runs to come and the console to write to."""
        super().__init__(
            console,
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            expand=True,
        )
        self.total = total
        self._done = self._failed = 0
        self._all = self._bars.add_task("all runs", total=total, state=f"0/{total}")
        self._bar_of: dict[str, TaskID] = {}

    def started(self, run: RunConfig) -> None:
        """Shows a run as under way."""
        if run.hash not in self._bar_of:
            self._bar_of[run.hash] = self._bars.add_task(escape(run.label), total=None, state="")

    def moved(self, run: RunConfig, step: int, steps: int, state: str) -> None:
        """Shows how far a run is."""
        if run.hash in self._bar_of:
            self._bars.update(self._bar_of[run.hash], completed=step, total=steps, state=escape(state))

    def lost(self, run: RunConfig, why: str) -> None:
        """Shows that a run lost its worker and will be started again."""
        self._remove(run)
        self.say(f"{run.label}: {why}; trying again")

    def ended(self, run: RunConfig, result: Result) -> None:
        """Counts a run as over."""
        self._remove(run)
        self._done += 1
        self._failed += result.status == "failed"
        state = f"{self._done}/{self.total}" + (f", {self._failed} failed" if self._failed else "")
        self._bars.update(self._all, completed=self._done, state=state)
        if result.status == "failed":
            self.say(f"[{self._done}/{self.total}] {run.label}: failed: {result.error}")
        elif not self.console.is_terminal:
            took = "" if result.finetune_seconds is None else f", fine-tuned in {result.finetune_seconds:.0f} s"
            self.say(f"[{self._done}/{self.total}] {run.label}: test {result.test_acc:.1f} %{took}")

    def say(self, line: str) -> None:
        """Prints a line, above the bars if there are any."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _remove(self, run: RunConfig) -> None:
        if (bar := self._bar_of.pop(run.hash, None)) is not None:
            self._bars.remove_task(bar)
