"""The recipe of a fine-tuning run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from secateur.errors import InputError, unknown_name

Precision = Literal["no", "bf16"]


@dataclass(frozen=True)
class FinetuneConfig:
    """AdamW with linear warm-up, then a cosine to zero; the defaults are a short recipe for small models and data.

    `lr` is the peak learning rate. Warm-up starts at `warmup_decay` times `lr` and takes `warmup_epochs` (fractions
    allowed). `weight_decay` spares biases, norms and all other one-dimensional parameters. `label_smoothing` in 0..1;
    `clip_grad` is the largest norm of the gradient, None for no limit. `seed` orders the images and drives dropout and
    augmentation. `workers` are processes that read images, `precision` is `bf16` for autocast to bfloat16.
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
    precision: Precision = "no"

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
        )
        for name, holds, expected in limits:
            if not holds:
                raise InputError(f"{name} must be {expected}, found {getattr(self, name)!r}")
        if self.precision not in ("no", "bf16"):
            raise unknown_name("precision", str(self.precision), ("no", "bf16"))

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

    def lr_factor(self, epoch: float) -> float:
        """Returns the learning rate after `epoch` epochs (fractions allowed) as a multiple of `lr`."""
        if epoch < self.warmup_epochs:
            return self.warmup_decay + (1.0 - self.warmup_decay) * epoch / self.warmup_epochs
        rest = self.epochs - self.warmup_epochs
        done = min(1.0, (epoch - self.warmup_epochs) / rest) if rest else 1.0
        return 0.5 * (1.0 + math.cos(math.pi * done))
