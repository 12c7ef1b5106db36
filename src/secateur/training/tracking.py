"""Curves of a run for TensorBoard, Weights & Biases or MLflow, by Accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import InputError, unknown_name
from secateur.training.config import FinetuneConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Trackers, and what must be installed for them."""


@dataclass(frozen=True)
class LogConfig:
    """Where curves go: `folder`, to whom: `trackers` (tensorboard, wandb, mlflow), and under which `project`.

    TensorBoard's files lie in `folder/project`. Loss and learning rate are logged every `every_steps` steps, accuracies
    (percent) after every epoch.
    """

    folder: Path
    trackers: tuple[str, ...] = ("tensorboard",)
    project: str = "secateur"
    every_steps: int = 10

    def __post_init__(self) -> None:
        """Raises `InputError` for a tracker that is unknown, or not installed."""
        from importlib.util import find_spec

        if self.every_steps < 1:
            raise InputError(f"every_steps must be at least 1, found {self.every_steps}")
        for name in self.trackers:
            if name not in PACKAGES:
                raise unknown_name("tracker", name, PACKAGES)
            if find_spec(PACKAGES[name]) is None:
                raise InputError(f"the tracker {name} is not installed: pip install {PACKAGES[name]}")


class Tracking:
    """The trackers of one run; without any, all calls do nothing."""

    def __init__(self, accelerator: Accelerator, log: LogConfig | None) -> None:
        self.accelerator, self.log = accelerator, log

    def start(self, config: FinetuneConfig, step: int) -> None:
        """Opens the trackers; what a run interrupted after `step` had logged beyond it is dropped where possible."""
        if self.log is None:
            return
        purge = {"tensorboard": {"purge_step": step + 1}} if step else {}
        self.accelerator.init_trackers(self.log.project, init_kwargs=purge)
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            # Accelerate would make a run of its own of TensorBoard's hyper-parameters, in a folder named by the time.
            if tracker.name == "tensorboard":
                tracker.writer.add_text("config", f"```json\n{json.dumps(asdict(config), indent=1, default=str)}\n```")
            else:
                tracker.store_init_configuration(dict(_flat(asdict(config))))

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """Logs values of one step, if it is one of those that are logged."""
        if self.log is not None and number % self.log.every_steps == 0:
            self.accelerator.log(dict(values), step=number)

    def epoch(self, number: int, values: Mapping[str, float]) -> None:
        """Logs values of the epoch that ended with step `number`."""
        if self.log is not None:
            self.accelerator.log(dict(values), step=number)

    def finish(self) -> None:
        """Closes the trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []


@contextmanager
def tracked(accelerator: Accelerator, log: LogConfig | None) -> Iterator[Tracking]:
    """Gives the trackers that `log` asks for, and closes them whatever happens."""
    tracking = Tracking(accelerator, log)
    try:
        yield tracking
    finally:
        tracking.finish()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """Yields nested values by dotted names, as numbers or text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, int | float) else str(value)
