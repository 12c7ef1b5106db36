"""Fine-tuning of an image classifier on source domains, selected by source validation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from secateur.data.protocol import Split
from secateur.errors import InputError
from secateur.training.batches import check_labels, check_logits, device_of, extra_needed, loader, logits_of, mode_kept
from secateur.training.checkpoint import (
    optimizer_tensors,
    random_states,
    read,
    restore_optimizer_,
    restore_random_,
    run_key,
    write,
)
from secateur.training.config import FinetuneConfig
from secateur.training.evaluation import blame, evaluate
from secateur.training.progress import Tick, Watcher


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: mean training loss, accuracies in percent, and the learning rate of its last step."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_accuracy: float
    lr: float


@dataclass(frozen=True)
class FinetuneRecord:
    """What a run did; epochs count from 1, accuracies are in percent, `seconds` is wall time with validation."""

    config: FinetuneConfig
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    seconds: float

    @property
    def best(self) -> EpochRecord:
        """The epoch whose weights the model now has."""
        return self.epochs[self.best_epoch - 1]

    @property
    def last(self) -> EpochRecord:
        """The last epoch."""
        return self.epochs[-1]

    def __str__(self) -> str:
        best = f"best epoch {self.best_epoch}: val {self.best.val_accuracy:.1f} %"
        return f"{len(self.epochs)} epochs in {self.seconds:.1f} s, {best}, last: val {self.last.val_accuracy:.1f} %"


def finetune_(
    model: nn.Module,
    split: Split,
    config: FinetuneConfig | None = None,
    *,
    progress: Watcher | None = None,
    checkpoint: Path | None = None,
) -> FinetuneRecord:
    """Trains `model` in place on the source domains of `split` and returns the record of the run.

    The weights of the epoch with the best accuracy on source validation images are put back at the end; of equally
    good epochs the latest counts, as its learning rate was lowest. The test part is not looked at. The model is
    trained where it is (under `accelerate launch` with several processes, on the device of each process), and its
    train or eval mode is restored. Equal seeds give equal weights on equal machines; torch's global random state is
    left as it was.

    `checkpoint` names a file that is written after every epoch. If it is there at the start, the run goes on from it
    and ends with the weights that it would have had without the interruption, bit for bit on the same machine.

    Raises `CheckpointError` when that file is corrupt or belongs to a run of another kind, `DataError` for labels out
    of range, `InputError` for a head of the wrong width, and `InputError` naming the step as soon as the loss is not
    finite: the model then has the weights from before that step.
    """
    config = config or FinetuneConfig()
    check_labels(split.train, split.num_classes)
    check_labels(split.val, split.num_classes)
    with mode_kept(model), _own_randomness(config.seed, device_of(model)):
        return _Run(model, split, config, progress).finish(checkpoint)


class _Run:
    """One fine-tuning run: the model with everything that stands around it."""

    def __init__(self, model: nn.Module, split: Split, config: FinetuneConfig, progress: Watcher | None) -> None:
        with extra_needed():
            from accelerate import Accelerator
            from torchmetrics import MeanMetric
            from torchmetrics.classification import MulticlassAccuracy

        self.model, self.split, self.config, self.progress = model, split, config, progress
        # The model stays where its owner put it, so nothing is placed by Accelerate itself.
        self.accelerator = Accelerator(device_placement=False, mixed_precision="no")
        if self.accelerator.num_processes > 1:
            model.to(self.accelerator.device)
        self.device = device_of(model)
        batches = loader(split.train, config.batch_size, shuffle_seed=config.seed, workers=config.workers)
        optimizer = AdamW(decay_groups(model, config.weight_decay), lr=config.lr, betas=config.betas)
        assert isinstance(batches.generator, torch.Generator)
        self.generator, self.plain_optimizer = batches.generator, optimizer
        with _attributes_kept(model):
            self.wrapped, self.optimizer, self.batches = self.accelerator.prepare(model, optimizer, batches)
        self.steps = len(self.batches)
        self.schedule = LambdaLR(optimizer, lambda step: config.lr_factor(step / self.steps))
        self.loss = MeanMetric().to(self.device)
        self.accuracy = MulticlassAccuracy(split.num_classes, average="micro", validate_args=False).to(self.device)

    def finish(self, checkpoint: Path | None) -> FinetuneRecord:
        """Trains all epochs (those that a checkpoint has not seen), puts the best weights back, returns the record."""
        start = time.perf_counter()
        epochs: list[EpochRecord] = []
        best, weights, before = 0, {}, 0.0
        if checkpoint is not None and checkpoint.exists():
            epochs, best, weights, before = self.resume(checkpoint)
        for epoch in range(len(epochs) + 1, self.config.epochs + 1):
            epochs.append(self.epoch(epoch))
            if best == 0 or epochs[-1].val_accuracy >= epochs[best - 1].val_accuracy:
                best, weights = epoch, {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            if checkpoint is not None and self.accelerator.is_main_process:
                self.keep(checkpoint, epochs, best, weights, before + time.perf_counter() - start)
        self.model.load_state_dict(weights)
        self.accelerator.free_memory()
        return FinetuneRecord(self.config, tuple(epochs), best, before + time.perf_counter() - start)

    def keep(
        self, path: Path, epochs: list[EpochRecord], best: int, weights: dict[str, Tensor], seconds: float
    ) -> None:
        """Writes all that the next epoch depends on."""
        tensors = {
            "model": self.model.state_dict(),
            "best": weights,
            "optimizer": optimizer_tensors(self.plain_optimizer),
            "random": random_states(self.generator),
        }
        progress = {"epochs": [asdict(e) for e in epochs], "best": best, "seconds": seconds}
        write(path, run_key(self.model, self.split, self.config), tensors, progress)

    def resume(self, path: Path) -> tuple[list[EpochRecord], int, dict[str, Tensor], float]:
        """Puts everything back to where the run that wrote `path` was, and returns what it had recorded."""
        tensors, progress = read(path, run_key(self.model, self.split, self.config))
        epochs = [EpochRecord(**e) for e in progress["epochs"]]
        self.model.load_state_dict(tensors["model"])
        restore_optimizer_(self.plain_optimizer, tensors["optimizer"])
        self.schedule.last_epoch = len(epochs) * self.steps
        for group, base in zip(self.plain_optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = float(base) * self.config.lr_factor(self.schedule.last_epoch / self.steps)
        restore_random_(self.generator, tensors["random"])
        return epochs, progress["best"], tensors["best"], progress["seconds"]

    def epoch(self, epoch: int) -> EpochRecord:
        """Goes once through the training images, then validates."""
        self.model.train()
        self.loss.reset()
        self.accuracy.reset()
        lr = 0.0
        for step, (images, labels) in enumerate(self.batches, start=1):
            images, labels = images.to(self.device), labels.to(self.device)
            lr = self.optimizer.param_groups[0]["lr"]
            number = (epoch - 1) * self.steps + step
            loss, logits = self.step(images, labels, number)
            self.loss.update(loss, len(labels))
            self.accuracy.update(logits, labels)
            if step < self.steps:
                self.tell(number, epoch, None)
        val = evaluate(self.model, self.split.val, num_classes=self.split.num_classes, workers=self.config.workers)
        mean, accuracy = self.tell(epoch * self.steps, epoch, val)
        return EpochRecord(epoch, mean, accuracy, val, lr)

    def step(self, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Takes one step of w ← AdamW(w, clip(∇ CE_ε(f_w(x), y))); returns the loss and the logits, detached."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = logits_of(self.wrapped(images)).float()
        check_logits(logits, self.split.num_classes)
        loss = cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        if not math.isfinite(loss.item()):
            raise self.stopped(images, number)
        self.accelerator.backward(loss)
        if self.config.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach(), logits.detach()

    def tell(self, number: int, epoch: int, val: float | None) -> tuple[float, float]:
        """Returns mean loss and accuracy (percent) of the epoch so far, after showing them to the watcher."""
        if self.progress is None and val is None:
            return math.nan, math.nan
        mean, accuracy = float(self.loss.compute()), 100.0 * float(self.accuracy.compute())
        if self.progress is not None and self.accelerator.is_main_process:
            steps = self.steps * self.config.epochs
            self.progress(Tick(number, steps, epoch, self.config.epochs, mean, accuracy, val))
        return mean, accuracy

    def stopped(self, images: Tensor, number: int) -> InputError:
        """Returns the error for a loss that is not finite."""
        why = blame(self.model, images)
        return InputError(
            f"the loss is not finite at step {number}, before its update: {why}; "
            f"check the data and the weights, or lower lr (now {self.config.lr:g})"
        )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Returns the trainable parameters in two groups: matrices and the like decay, one-dimensional ones do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise InputError("the model has no trainable parameters; set requires_grad on those to be fine-tuned")
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch for dropout and augmentation, and restores its random state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Removes the attributes that Accelerate leaves on a model it has prepared."""
    before = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - before:
            delattr(model, name)
