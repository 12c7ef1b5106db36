"""The recipe of a fine-tuning run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from secateur.errors import InputError, unknown_name
from secateur.training.augmentation import AugmentConfig
from secateur.training.averaging import find_averaging
from secateur.training.distillation import Mode
from secateur.training.objectives import find_objective

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised: erm, coral, groupdro or mixup_domains, with the options of `find_objective`."""

    name: str = "erm"
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `InputError` for an unknown name or option, and for values out of range."""
        find_objective(self.name, num_classes=2, **self.options)


@dataclass(frozen=True)
class AveragingConfig:
    """How weights are averaged along the run: none, ema or swad, with the options of `find_averaging`."""

    name: str = "none"
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `InputError` for an unknown name or option, and for values out of range."""
        find_averaging(self.name, **self.options)


@dataclass(frozen=True)
class DistillationConfig:
    """How much a student learns from its teacher and how; see `Distillation`."""

    alpha: float = 0.5
    temperature: float = 1.0
    mode: Mode = "logits"
    hard: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` for values out of range."""
        if not 0.0 <= self.alpha <= 1.0:
            raise InputError(f"alpha must be in [0, 1], found {self.alpha}")
        if not 0.0 < self.temperature < math.inf:
            raise InputError(f"temperature must be positive, found {self.temperature}")
        if self.mode not in ("logits", "token"):
            raise unknown_name("mode of distillation", str(self.mode), ("logits", "token"))


@dataclass(frozen=True)
class MachineConfig:
    """How the machine carries a recipe out, which changes results by no more than rounding.

    `compile` trains what `torch.compile` makes of the model, `channels_last` keeps images and convolutions in that
    memory format. `shard` spreads weights, gradients and the state of the optimizer over all processes (FSDP), for
    models that do not fit one device; with a single process nothing is sharded. `deterministic` makes a GPU repeat a
    run bit for bit, which a resumed run needs to end like an undisturbed one; it costs some speed. CPUs always do.
    """

    compile: bool = False
    channels_last: bool = False
    shard: bool = False
    deterministic: bool = True


@dataclass(frozen=True)
class FinetuneConfig:
    """AdamW with linear warm-up, then a cosine to zero; the defaults are a short recipe for small models and data.

    `batch_size` is the number of images in one step of the optimizer, whatever the number of processes; each of them
    takes an equal share, in `accumulate` parts one after another. `lr` is the peak learning rate; with `layer_decay`
    below 1 it shrinks towards the input by that factor per layer. Warm-up starts at `warmup_decay` times `lr` and takes
    `warmup_epochs` (fractions allowed). `weight_decay` spares biases, norms and all other one-dimensional parameters.
    `label_smoothing` in 0..1; `clip_grad` is the largest norm of the gradient, None for no limit. `seed` orders the
    images and drives dropout and augmentation. `workers` are processes that read images, for each training process.
    `precision` is that of forward passes under autocast; weights stay as they are, and fp16 scales the loss.

    `augment` replaces the data set's own way to vary training images (None: as the data set does it), and mixes them.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 2.0
    warmup_decay: float = 0.033
    label_smoothing: float = 0.1
    clip_grad: float | None = 1.0
    seed: int = 0
    workers: int = 0
    precision: Precision = "fp32"
    accumulate: int = 1
    layer_decay: float = 1.0
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    augment: AugmentConfig | None = None
    distillation: DistillationConfig | None = None
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        """Raises `InputError` naming the first value that no run could use."""
        limits: tuple[tuple[str, bool, str], ...] = (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", 0.0 < self.lr < math.inf, "positive"),
            ("weight_decay", 0.0 <= self.weight_decay < math.inf, "0 or more"),
            ("betas", all(0.0 <= beta < 1.0 for beta in self.betas), "in [0, 1)"),
            ("warmup_epochs", 0.0 <= self.warmup_epochs <= self.epochs, f"between 0 and epochs ({self.epochs})"),
            ("warmup_decay", 0.0 < self.warmup_decay <= 1.0, "in (0, 1]"),
            ("label_smoothing", 0.0 <= self.label_smoothing < 1.0, "in [0, 1)"),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0.0, "positive or None"),
            ("seed", self.seed >= 0, "0 or more"),
            ("workers", self.workers >= 0, "0 or more"),
            ("accumulate", 1 <= self.accumulate <= self.batch_size, f"between 1 and batch_size ({self.batch_size})"),
            ("layer_decay", 0.0 < self.layer_decay <= 1.0, "in (0, 1]"),
        )
        for name, holds, expected in limits:
            if not holds:
                raise InputError(f"{name} must be {expected}, found {getattr(self, name)!r}")
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", str(self.precision), PRECISIONS)
        if self.machine.shard and self.averaging.name != "none":
            raise InputError(f"weights that are sharded cannot be averaged ({self.averaging.name}); drop one of both")
        if self.machine.shard and self.precision == "fp16":
            raise InputError("a sharded model cannot be trained in fp16; use bf16 or fp32")

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> Self:
        """Returns the recipe `default`, `paper` or `short`, with `changes` to single fields.

        Raises `InputError` for an unknown name.
        """
        recipes: dict[str, Callable[..., Self]] = {"default": cls, "paper": cls.paper, "short": cls.short}
        if name not in recipes:
            raise unknown_name("recipe", name, recipes)
        return recipes[name](**changes)

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Returns the recipe of arXiv 2504.04196, with `changes` to single fields.

        Published: AdamW, learning rate 1.5e-4, weight decay 0.3, momentum 0.9 (AdamW's first beta), 300 epochs,
        cosine annealing, linear warm-up with decay 0.033. Not published: the batch size, the length of the warm-up,
        label smoothing and the limit on gradients; they are as in torchvision's reference recipe for ViT-B/16, which
        has the published values in common (30 epochs of warm-up, 0.11, 1.0), with a batch of 256 for one machine.
        """
        published = cls(
            epochs=300,
            batch_size=256,
            lr=1.5e-4,
            weight_decay=0.3,
            betas=(0.9, 0.999),
            warmup_epochs=30.0,
            warmup_decay=0.033,
            label_smoothing=0.11,
            clip_grad=1.0,
        )
        return replace(published, **changes)

    @classmethod
    def short(cls, **changes: Any) -> Self:
        """Returns a recipe of 30 epochs for pretrained models that were cut, with `changes` to single fields.

        A rate between the default's and the paper's; mixup in every other batch; and an exponential moving average of
        the weights, which evens out the noise of few epochs. For models as small as those of digits-dg take `lr=1e-3`.
        """
        strong = cls(
            epochs=30,
            batch_size=64,
            lr=5e-4,
            weight_decay=0.05,
            warmup_epochs=2.0,
            label_smoothing=0.1,
            averaging=AveragingConfig("ema", {"decay": 0.999}),
            augment=AugmentConfig(mixup=0.2, mix_probability=0.5),
        )
        return replace(strong, **changes)

    def lr_factor(self, epoch: float) -> float:
        """Returns the learning rate after `epoch` epochs (fractions allowed) as a multiple of `lr`."""
        if epoch < self.warmup_epochs:
            return self.warmup_decay + (1.0 - self.warmup_decay) * epoch / self.warmup_epochs
        rest = self.epochs - self.warmup_epochs
        done = min(1.0, (epoch - self.warmup_epochs) / rest) if rest else 1.0
        return 0.5 * (1.0 + math.cos(math.pi * done))
