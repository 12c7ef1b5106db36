"""Fine-tuning of an image classifier on source domains, selected by source validation."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from secateur.data.protocol import Split
from secateur.errors import CheckpointError, InputError
from secateur.training.batches import check_labels, device_of, extra_needed, mode_kept
from secateur.training.checkpoint import CheckpointConfig, CheckpointFolder, Saved, run_key
from secateur.training.config import FinetuneConfig
from secateur.training.evaluation import Validation, plain_batches, validate
from secateur.training.interruption import Interrupted, StopFlag, sigterm_noted
from secateur.training.learning import Learner
from secateur.training.loading import GlobalBatches, batches_of, processes
from secateur.training.placement import Placement, repeatable
from secateur.training.presentation import presented
from secateur.training.progress import Tick, Watcher
from secateur.training.randomness import own_randomness, random_states, restore_random_
from secateur.training.records import EpochRecord, FinetuneRecord
from secateur.training.tracking import LogConfig, Tracking, tracked

if TYPE_CHECKING:
    from accelerate import Accelerator


def finetune_(
    model: nn.Module,
    split: Split,
    config: FinetuneConfig | None = None,
    *,
    progress: Watcher | None = None,
    checkpoint: CheckpointConfig | Path | None = None,
    log: LogConfig | Path | None = None,
    teacher: nn.Module | None = None,
) -> FinetuneRecord:
    """Trains `model` in place on the source domains of `split` and returns the record of the run.

    The weights of the epoch with the best accuracy on source validation images are put back at the end; of equally
    good epochs the latest counts, as its learning rate was lowest. Under `ema` it is the averaged weights that are
    validated and put back; under `swad` the average itself is what the model ends with. The test part is not looked at.
    The model is trained where it is, and its train or eval mode is restored. Equal seeds give equal weights on equal
    machines; torch's, numpy's and Python's global random states are left as they were.

    Under `accelerate launch` or `torchrun` every process calls this with the same model, and trains it on the device
    that Accelerate gives it, on global batches that do not depend on the number of processes. Statistics of BatchNorm
    and random numbers within the model (dropout), mixup and cutmix are each process's own.

    `checkpoint` names a folder (see `CheckpointConfig`) from which the run goes on if it has been there before, and
    ends with the weights that it would have had without the interruption, bit for bit on the same machine and number
    of processes. With it, SIGTERM saves and raises `Interrupted`, which ends the process with code 143. `log` is a
    folder for TensorBoard, or more (see `LogConfig`). `teacher` is the model that `config.distillation` learns from.

    Raises `CheckpointError` when no sound checkpoint is left, when they belong to another run, or one cannot be
    written; `DataError` for labels out of range, `InputError` for a head of the wrong width, and `InputError` naming
    the step as soon as the loss is not finite: the model then has the weights from before that step.
    """
    config = config or FinetuneConfig()
    check_labels(split.train, split.num_classes)
    check_labels(split.val, split.num_classes)
    if (config.distillation is None) != (teacher is None):
        raise InputError("distillation needs both config.distillation and a teacher, or neither")
    split = presented(split, config.augment)
    keep = CheckpointConfig(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    folder = None if keep is None else CheckpointFolder(keep, run_key(model, split, config))
    log = LogConfig(log) if isinstance(log, Path) else log
    accelerator = _accelerator(log)
    with ExitStack() as stack:
        stack.enter_context(mode_kept(model))
        stack.enter_context(_attributes_kept(model))
        device = accelerator.device if accelerator.num_processes > 1 else device_of(model)
        stack.enter_context(own_randomness(config.seed, accelerator.process_index, device))
        stack.enter_context(repeatable(device, config.machine.deterministic))
        placement = Placement(model, accelerator, config.machine, config.precision)
        learner = Learner(placement, split, config, teacher)
        stack.enter_context(learner.prepared())
        stop = stack.enter_context(sigterm_noted(folder is not None))
        tracking = stack.enter_context(tracked(accelerator, log))
        run = _Run(learner, split, progress, folder, stop, tracking)
        weights: dict[str, Tensor] | None = None
        try:
            record, weights = run.finish()
        finally:
            placement.finish(weights)
    return record


def _accelerator(log: LogConfig | None) -> Accelerator:
    """Returns what knows of the other processes, those of this launch, and of trackers."""
    with extra_needed():
        from accelerate import Accelerator, DistributedDataParallelKwargs

    # Without being told, Accelerate forms no group of processes on machines that have nothing but CPUs.
    only_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    # The model stays where its owner put it, so Accelerate places nothing. Looking for unused parameters lets heads
    # without a loss be, and keeps DDP's buckets as they are, so that a resumed run adds up in the same order.
    return Accelerator(
        cpu=only_cpus,
        device_placement=False,
        mixed_precision="no",
        log_with=list(log.trackers) if log else None,
        project_dir=log.folder if log else None,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


@dataclass
class _Position:
    """Where a run is: `step` steps of `epoch` are done; and what it has recorded so far."""

    epoch: int = 1
    step: int = 0
    loss: float = 0.0
    right: float = 0.0
    images: float = 0.0
    epochs: list[EpochRecord] = field(default_factory=list)
    best: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0


class _Run:
    """One fine-tuning run: the learner with everything that stands around it."""

    def __init__(
        self,
        learner: Learner,
        split: Split,
        progress: Watcher | None,
        folder: CheckpointFolder | None,
        stop: StopFlag,
        tracking: Tracking,
    ) -> None:
        self.learner, self.placement, self.config = learner, learner.placement, learner.config
        self.split, self.progress, self.folder, self.stop, self.tracking = split, progress, folder, stop, tracking
        self.accelerator = self.placement.accelerator
        config, device = self.config, self.placement.device
        self.sampler = GlobalBatches(
            len(split.train), config.batch_size, accumulate=config.accumulate, seed=config.seed
        )
        self.steps = self.sampler.steps
        self.batches = batches_of(split.train, self.sampler, workers=config.workers, device=device)
        self.val = plain_batches(split.val, 256, workers=config.workers, device=device)
        self.at = _Position()
        self.weights: dict[str, Tensor] = {}
        self.notes: tuple[str, ...] = ()
        self.began = self.saved_at = time.perf_counter()
        self.before = 0.0

    @property
    def done(self) -> int:
        """The number of steps done."""
        return (self.at.epoch - 1) * self.steps + self.at.step

    def finish(self) -> tuple[FinetuneRecord, dict[str, Tensor]]:
        """Trains all epochs (those that a checkpoint has not seen) and returns the record and the chosen weights."""
        self.resume()
        self.tracking.start(self.config, self.done)
        while self.at.epoch <= self.config.epochs:
            self.epoch()
        weights, accuracy = self.weights, self.at.epochs[self.at.best - 1].val_accuracy
        selection = "best epoch by accuracy on source validation"
        if self.config.averaging.name == "ema":
            selection += ", weights averaged (EMA)"
        elif self.config.averaging.name == "swad":
            weights, accuracy = self.averaged()
            selection = "weights averaged (SWAD) over the valley of the loss on source validation"
        record = FinetuneRecord(
            config=self.config,
            epochs=tuple(self.at.epochs),
            best_epoch=self.at.best,
            seconds=self.seconds(),
            val_accuracy=accuracy,
            selection=selection,
            images_per_second=len(self.split.train) * self.config.epochs / self.at.train_seconds,
            notes=self.notes,
        )
        return record, weights

    def epoch(self) -> None:
        """Goes once through the training images, or through what is left of them, then validates and saves."""
        at = self.at
        self.placement.trained.train()
        self.sampler.epoch, self.sampler.start = at.epoch, at.step
        batches = iter(self.batches)
        clock = time.perf_counter()
        while at.step < self.steps:
            sizes = self.sampler.sizes(at.step)
            parts = [next(batches) for _ in sizes]
            number = self.done + 1
            sums = self.learner.step(parts, sizes, number, (self.stop.is_set, self.is_due(number)))
            at.step, at.loss, at.right, at.images = (
                at.step + 1,
                at.loss + sums.loss,
                at.right + sums.right,
                at.images + sums.images,
            )
            self.tracking.step(number, {"loss": sums.loss / sums.images, "lr": self.lr(number)})
            if at.step < self.steps:
                self.tell(None)
                if sums.stop or sums.save:
                    at.train_seconds += time.perf_counter() - clock
                    self.save()
                    clock = time.perf_counter()
                if sums.stop:
                    raise self.interrupted()
        at.train_seconds += time.perf_counter() - clock
        self.close_epoch()

    def close_epoch(self) -> None:
        """Validates, notes the epoch, keeps its weights if they are the best, and saves."""
        at = self.at
        number = self.done
        with self.averaged_by_ema():
            val = self.validated(number)
            if at.best == 0 or val.accuracy >= at.epochs[at.best - 1].val_accuracy:
                at.best, self.weights = at.epoch, {k: v.clone() for k, v in self.placement.state().items()}
        mean, accuracy = at.loss / at.images, 100.0 * at.right / at.images
        at.epochs.append(EpochRecord(at.epoch, mean, accuracy, val.accuracy, self.lr(number)))
        self.tell(val.accuracy)
        logged = {"train_accuracy": accuracy, "val_accuracy": val.accuracy, "val_loss": val.loss, "epoch": at.epoch}
        self.tracking.epoch(number, logged)
        at.epoch, at.step, at.loss, at.right, at.images = at.epoch + 1, 0, 0.0, 0.0, 0.0
        self.save(best=at.best == at.epoch - 1)
        if self.learner.agreed(self.stop.is_set) and at.epoch <= self.config.epochs:
            raise self.interrupted()

    def validated(self, number: int) -> Validation:
        """Returns the validation of the weights that the model has, after telling it to the averaging."""
        forward = self.placement.forward
        val = validate(forward, self.val, self.split.num_classes, self.config.precision)
        self.learner.averaging.validated(self.placement.plain, val.loss, number)
        return val

    @contextmanager
    def averaged_by_ema(self) -> Iterator[None]:
        """Has the averaged weights in the model for a while, where they are what is validated."""
        if self.config.averaging.name != "ema":
            yield
            return
        own = {k: v.clone() for k, v in self.placement.state().items()}
        self.learner.averaging.apply_(self.placement.plain)
        try:
            yield
        finally:
            self.placement.load(own)

    def averaged(self) -> tuple[dict[str, Tensor], float]:
        """Returns the averaged weights, with statistics of BatchNorm measured anew, and their accuracy."""
        model, split, config = self.placement.plain, self.split, self.config
        self.learner.averaging.apply_(model)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            # All images in every process, so that all measure the same.
            sampler = GlobalBatches(len(split.train), config.batch_size)
            sampler.rank, sampler.world = 0, 1
            plain = batches_of(split.train.plain(), sampler, workers=config.workers, device=self.placement.device)
            update_bn(plain, model, self.placement.device)
        accuracy = validate(model, self.val, split.num_classes, config.precision).accuracy
        return {k: v.clone() for k, v in self.placement.state().items()}, accuracy

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def is_due(self, number: int) -> bool:
        """Returns whether to save after step `number`, as the main process sees it."""
        if self.folder is None or not self.accelerator.is_main_process:
            return False
        keep = self.folder.config
        by_steps = keep.every_steps is not None and number % keep.every_steps == 0
        waited = (time.perf_counter() - self.saved_at) / 60
        return by_steps or (keep.every_minutes is not None and waited >= keep.every_minutes)

    def save(self, *, best: bool = False) -> None:
        """Writes all that the next step depends on, and before it the best weights if they are new."""
        if self.folder is None:
            return
        from accelerate.utils import broadcast_object_list, gather_object

        learner, at = self.learner, self.at
        at.seconds = self.seconds()
        groups = {
            "model": self.placement.state(),
            "optimizer": self.placement.optimizer_state(learner.optimizer),
            "averaging": learner.averaging.state_dict(),
            "objective": learner.objective.state_dict(),
        }
        told: dict[str, Any] = {
            **asdict(at),
            "scaler": learner.scaler.state_dict(),
            "random": gather_object([random_states(self.placement.device)]),
        }
        failure: list[CheckpointError | None] = [None]
        if self.accelerator.is_main_process:
            try:
                if best:
                    self.folder.write_best(at.best, self.weights)
                self.folder.write(self.done, groups, told)
            except CheckpointError as error:
                failure = [error]
        broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]
        self.saved_at = time.perf_counter()

    def resume(self) -> None:
        """Puts everything back to where the run of the newest sound checkpoint was, if there is one."""
        if self.folder is None:
            return
        from accelerate.utils import broadcast_object_list

        saved: Saved | None = None
        found: list[Any] = [None, (), None]
        if self.accelerator.is_main_process:
            try:
                saved, notes = self.folder.newest()
                found = [saved and saved.path, notes, None]
            except CheckpointError as error:
                found = [None, (), error]
        path, self.notes, error = broadcast_object_list(found)
        if error is not None:
            raise error
        for note in self.notes if self.accelerator.is_main_process else ():
            Console(stderr=True).print(f"secateur: {note}", highlight=False, markup=False, soft_wrap=True)
        if path is not None:
            self.restore(saved or self.folder.read(path))

    def restore(self, saved: Saved) -> None:
        """Puts everything back to where it was when `saved` was written."""
        told, learner = dict(saved.progress), self.learner
        scaler, generators = told.pop("scaler"), told.pop("random")
        self.placement.load(saved.groups["model"])
        self.placement.load_optimizer(learner.optimizer, saved.groups.get("optimizer", {}))
        learner.averaging.load_state_dict(saved.groups.get("averaging", {}))
        learner.objective.load_state_dict(saved.groups.get("objective", {}))
        learner.scaler.load_state_dict(scaler)
        self.at = _Position(**{**told, "epochs": [EpochRecord(**e) for e in told["epochs"]]})
        self.weights, self.before = saved.best or {}, self.at.seconds
        rank, world = processes()
        if len(generators) == world:
            restore_random_(generators[rank], self.placement.device)
        else:
            self.notes += (
                f"resumed by {world} processes from a checkpoint of {len(generators)}: random numbers within the model "
                "are others than without the interruption",
            )

    # --- telling --------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Returns the time that the run has taken, over all interruptions."""
        return self.before + time.perf_counter() - self.began

    def lr(self, number: int) -> float:
        """Returns the learning rate of step `number` where it is highest."""
        return self.config.lr * self.learner.lr_factor(number)

    def tell(self, val: float | None) -> None:
        """Shows mean loss and accuracy of the epoch so far to the watcher."""
        if self.progress is not None and self.accelerator.is_main_process:
            at, epochs = self.at, self.config.epochs
            mean, accuracy = at.loss / at.images, 100.0 * at.right / at.images
            self.progress(Tick(self.done, self.steps * epochs, at.epoch, epochs, mean, accuracy, val))

    def interrupted(self) -> Interrupted:
        """Returns what ends the run after SIGTERM, after saying so."""
        assert self.folder is not None
        message = (
            f"stopped by SIGTERM after step {self.done} of {self.steps * self.config.epochs}; saved to "
            f"{self.folder.config.folder}: start the same run again to go on from there"
        )
        if self.accelerator.is_main_process:
            Console(stderr=True).print(f"secateur: {message}", highlight=False, markup=False, soft_wrap=True)
        return Interrupted(message)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Removes the attributes that Accelerate leaves on a model it has prepared."""
    before = set(vars(model))
    try:
        yield
    finally:
        for name in set(vars(model)) - before:
            delattr(model, name)
