"""What a fine-tuning run did."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.training.config import FinetuneConfig


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: mean training loss, accuracies in percent, and the peak group's learning rate in its last step."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_accuracy: float
    lr: float


@dataclass(frozen=True)
class FinetuneRecord:
    """What a run did; epochs count from 1, accuracies are in percent, `seconds` is wall time with validation.

    `val_accuracy` is that of the weights which the model now has, and `selection` says how these were chosen.
    `images_per_second` counts training alone, over all processes. `notes` tell of what happened on the way, such as a
    damaged checkpoint.
    """

    config: FinetuneConfig
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    seconds: float
    val_accuracy: float
    selection: str
    images_per_second: float
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> EpochRecord:
        """The epoch with the best validation, whose weights the model now has, unless SWAD chose others."""
        return self.epochs[self.best_epoch - 1]

    @property
    def last(self) -> EpochRecord:
        """The last epoch."""
        return self.epochs[-1]

    def __str__(self) -> str:
        best = f"best epoch {self.best_epoch}: val {self.best.val_accuracy:.1f} %"
        return f"{len(self.epochs)} epochs in {self.seconds:.1f} s, {best}, last: val {self.last.val_accuracy:.1f} %"
