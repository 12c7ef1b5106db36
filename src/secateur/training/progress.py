"""Progress of fine-tuning, as values for anyone to show, and as bars on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Tick:
    """Where a run stands after one training step.

    `step` and `epoch` count from 1; `loss` and `accuracy` (percent) are means over the epoch so far on augmented
    training images; `val_accuracy` (percent) is given with the last step of each epoch.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    val_accuracy: float | None = None

    def __str__(self) -> str:
        val = "" if self.val_accuracy is None else f"  val {self.val_accuracy:5.1f} %"
        return f"epoch {self.epoch}/{self.epochs}  loss {self.loss:.3f}  train {self.accuracy:5.1f} %{val}"


Watcher = Callable[[Tick], None]
"""What `finetune_` calls after every step."""


class Bars:
    """Bars on a terminal while the context lasts, nothing elsewhere."""

    def __init__(self, console: Console, *columns: ProgressColumn, expand: bool = False) -> None:
        """Takes the console to write to, and what each bar shows."""
        self.console = console
        live = console.is_terminal
        self._bars = Progress(*columns, console=console, transient=True, expand=expand, disable=not live)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


class FinetuneProgress(Bars):
    """Bars with running loss and accuracy for one or many runs; plain lines where there is no terminal.

        with FinetuneProgress(runs=2) as progress:
            finetune_(model, split, config, progress=progress.run("ViT-B, dense"))

    On a terminal the bar of the present run stands above the bar of all runs. Elsewhere a line is printed per epoch.
    """

    def __init__(self, runs: int = 1, *, console: Console | None = None) -> None:
        """Takes the number of runs that will be announced by `run`, and the console to write to (default: stderr)."""
        columns = (BarColumn(bar_width=24), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
        super().__init__(console or Console(stderr=True), TextColumn("{task.description}"), *columns)
        self.runs = runs
        self._shown: list[TaskID] = []
        self._started = 0

    def run(self, label: str) -> Watcher:
        """Returns the watcher of the next run, to be handed to `finetune_`; the run before counts as over."""
        while self._shown:
            self._bars.remove_task(self._shown.pop())
        self._started += 1
        count = f"[{self._started}/{self.runs}] " if self.runs > 1 else ""
        task = self._bars.add_task(escape(label), total=None, state="")
        self._shown.append(task)
        if self.runs > 1:
            done = self._started - 1
            state = f"{done}/{self.runs}"
            self._shown.append(self._bars.add_task("all runs", total=self.runs, completed=done, state=state))

        def watch(tick: Tick) -> None:
            last = tick.step == tick.steps
            self._bars.update(task, total=tick.steps, completed=tick.step, state=str(tick), refresh=last)
            if not self.console.is_terminal and tick.val_accuracy is not None:
                self.console.print(f"{count}{label}: {tick}", highlight=False, markup=False, soft_wrap=True)

        return watch
