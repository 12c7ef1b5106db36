"""The mathematics of one training step, for one process or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.optim import AdamW

from secateur.data.protocol import Split
from secateur.errors import InputError
from secateur.training.augmentation import AugmentConfig, batch_mixing
from secateur.training.averaging import find_averaging
from secateur.training.batches import check_logits, logits_of
from secateur.training.config import FinetuneConfig
from secateur.training.distillation import Distillation
from secateur.training.evaluation import blame
from secateur.training.loading import FILLER
from secateur.training.objectives import ERM, MixupDomains, Step, classifier_inputs, find_objective
from secateur.training.parameter_groups import parameter_groups
from secateur.training.placement import Placement
from secateur.training.precision import autocast
from secateur.training.presentation import domain_numbers

Batch = Sequence[Tensor]
"""Images [B, 3, H, W], labels [B] and indices [B]."""


@dataclass(frozen=True)
class Sums:
    """What a step did, over all its images in all processes: Σ loss, right answers, images; and who asked for what."""

    loss: float
    right: float
    images: float
    stop: bool
    save: bool


class Learner:
    """Takes the steps of a recipe: w ← AdamW(w, clip(∇ L(f_w(x), y)))."""

    def __init__(
        self, placement: Placement, split: Split, config: FinetuneConfig, teacher: nn.Module | None = None
    ) -> None:
        """Takes the model where it is trained, and the teacher if there is one."""
        self.steps_per_epoch = -(-len(split.train) // config.batch_size)
        self.placement, self.config, self.num_classes = placement, config, split.num_classes
        self.device = placement.device
        options = {"label_smoothing": config.label_smoothing, **config.objective.options}
        self.objective = find_objective(config.objective.name, num_classes=split.num_classes, **options)
        # The others pool the batches of all processes by themselves.
        self.is_local = isinstance(self.objective, ERM | MixupDomains)
        self.averaging = find_averaging(config.averaging.name, **config.averaging.options)
        self.mixing = batch_mixing(config.augment or AugmentConfig(), split.num_classes, config.label_smoothing)
        self.domains = domain_numbers(split.train)
        groups = parameter_groups(placement.plain, config.lr, config.weight_decay, config.layer_decay)
        self.optimizer = AdamW(groups, lr=config.lr, betas=config.betas)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.distillation: Distillation | None = None
        if config.distillation is not None and teacher is not None:
            how = config.distillation
            teacher = teacher.to(self.device)
            self.distillation = Distillation(teacher, how.alpha, how.temperature, how.mode, hard=how.hard)
        self.features: Callable[[], Tensor] | None = None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Keeps hooks and switches on the model that the objective and the distillation need."""
        with ExitStack() as stack:
            if self.objective.needs_features:
                self.features = stack.enter_context(classifier_inputs(self.placement.plain, self.num_classes))
            if self.distillation is not None:
                stack.enter_context(self.distillation.prepared(self.placement.plain))
            yield

    def step(self, parts: Sequence[Batch], sizes: Sequence[int], number: int, asked: tuple[bool, bool]) -> Sums:
        """Takes step `number` (from 1) on this process's share of a batch, in parts of `sizes` images over all.

        `asked` says whether this process wants to stop, and to save. Raises `InputError` if the loss is not finite
        anywhere, before the update.
        """
        sums = torch.zeros(3, device=self.device)
        for part, size in zip(parts, sizes, strict=True):
            with self.placement.synced(last=part is parts[-1]):
                loss, right = self.loss(part, size)
                self.scaler.scale(loss * size / sum(sizes)).backward()
            sums += torch.stack([loss.detach() * size / self.placement.world, *right])
        total = self.summed(sums, asked)
        if not math.isfinite(total.loss):
            raise self.stopped(parts[-1][0], number)
        self.update(number)
        return total

    def loss(self, part: Batch, size: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns the loss on a part, right answers and images in this process.

        Gradients are averaged over processes afterwards, so losses that are means over images weigh by their number:
        with n of `size` images in this one of W processes, L = W n / `size` · mean.
        """
        images, labels, indices = (t.to(self.device, non_blocking=True) for t in part)
        real, domains = indices != FILLER, self.domains[part[2].clamp(min=0)].to(self.device)
        targets = labels
        if self.mixing is not None:
            images, targets = self.mixing(images, labels)
        images, targets = self.objective.mix(images, targets, domains)
        if self.config.machine.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.config.precision):
            outputs = self.placement.trained(images)
        logits = (self.distillation.student_logits(outputs) if self.distillation else logits_of(outputs)).float()
        check_logits(logits, self.num_classes)
        count = real.sum()
        share = self.placement.world * count / size
        features = self.features() if self.features else None
        if self.is_local:
            loss = share * self.objective(Step(logits, targets, domains, features))
        else:
            seen = None if features is None else features[real]
            loss = self.objective(Step(logits[real], targets[real], domains[real], seen))
        if self.distillation is not None:
            with autocast(self.device, self.config.precision):
                taught = self.distillation.loss(images, outputs, loss.new_zeros(()))
            loss = (1 - self.distillation.alpha) * loss + share * taught
        hits = (logits.argmax(dim=1) == (targets.argmax(dim=1) if targets.ndim > 1 else targets))[real].sum()
        return loss, (hits, count)

    def update(self, number: int) -> None:
        """Takes the step of the optimizer, at the learning rate of step `number`."""
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.placement.plain.parameters(), self.config.clip_grad)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.lr_factor(number)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.averaging.update(self.placement.plain, number)

    def lr_factor(self, number: int) -> float:
        """Returns the learning rate of step `number` as a multiple of its peak; the schedule has no other state."""
        return self.config.lr_factor((number - 1) / self.steps_per_epoch)

    def summed(self, sums: Tensor, asked: tuple[bool, bool]) -> Sums:
        """Returns the sums over all processes, and whether any of them asks to stop or to save."""
        told = torch.cat([sums, sums.new_tensor([float(a) for a in asked])])
        if self.placement.world > 1:
            distributed.all_reduce(told)
        loss, right, images, stop, save = told.tolist()
        return Sums(loss, right, images, stop > 0, save > 0)

    def agreed(self, asked: bool) -> bool:
        """Returns whether any process asks."""
        return self.summed(torch.zeros(3, device=self.device), (asked, False)).stop

    def stopped(self, images: Tensor, number: int) -> InputError:
        """Returns the error for a loss that is not finite."""
        why = blame(self.placement.plain, images)
        return InputError(
            f"the loss is not finite at step {number}, before its update: {why}; "
            f"check the data and the weights, or lower lr (now {self.config.lr:g})"
        )
