"""Accuracy of a classifier on a data set."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from secateur.errors import InputError
from secateur.training.batches import (
    check_filled,
    check_logits,
    check_range,
    device_of,
    extra_needed,
    logits_of,
    mode_kept,
)
from secateur.training.config import Precision
from secateur.training.loading import FILLER, GlobalBatches, batches_of
from secateur.training.precision import autocast


@dataclass(frozen=True)
class Validation:
    """Top-1 accuracy in percent and mean cross-entropy in nats; all images count alike."""

    accuracy: float
    loss: float


def evaluate(
    model: nn.Module,
    dataset: Dataset[tuple[Tensor, int]],
    *,
    num_classes: int,
    batch_size: int = 256,
    workers: int = 0,
) -> float:
    """Returns the top-1 accuracy in percent: all images count alike, whatever their class.

    `dataset` yields images (float, 3 x H x W) with integer labels below `num_classes`. The model runs in eval mode on
    the device it is on, and is left in the mode it was in. Where several processes train together, each takes a share
    of the images, and all get the same answer; so all must call it.

    Raises `DataError` for an empty data set, labels out of range and images that are not finite, `InputError` for a
    head of the wrong width or outputs that are not finite.
    """
    batches = plain_batches(dataset, batch_size, workers=workers, device=device_of(model))
    return validate(model, batches, num_classes).accuracy


def plain_batches(
    dataset: Dataset[tuple[Tensor, int]], batch_size: int, *, workers: int, device: torch.device
) -> DataLoader[Any]:
    """Returns this process's share of a data set in its own order; raises `DataError` if it is empty."""
    check_filled(dataset)
    assert isinstance(dataset, Sized)
    return batches_of(dataset, GlobalBatches(len(dataset), batch_size), workers=workers, device=device)


def validate(model: nn.Module, batches: DataLoader[Any], num_classes: int, precision: Precision = "fp32") -> Validation:
    """Returns accuracy and loss of `model` on `plain_batches`; see `evaluate`."""
    with extra_needed():
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

    device = device_of(model)
    accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False).to(device)
    loss = MeanMetric().to(device)
    with mode_kept(model), torch.no_grad():
        model.eval()
        for number, (images, labels, indices) in enumerate(batches):
            check_range(labels, num_classes)
            with autocast(device, precision):
                logits = logits_of(model(images.to(device, non_blocking=True))).float()
            check_logits(logits, num_classes)
            if not torch.isfinite(logits).all():
                raise InputError(f"the model's output is not finite in batch {number}; {blame(model, images)}")
            real = (indices != FILLER).to(device)
            logits, labels = logits[real], labels.to(device)[real]
            if len(labels):
                accuracy.update(logits, labels)
                loss.update(cross_entropy(logits, labels), len(labels))
    # The metric divides in float32; the rounding takes away the error of that.
    return Validation(round(100.0 * float(accuracy.compute()), 4), float(loss.compute()))


def blame(model: nn.Module, images: Tensor) -> str:
    """Returns where a value that is not finite comes from: the images, the model's weights, or neither."""
    if not torch.isfinite(images).all():
        return "the images hold values that are not finite"
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        return f"the weights hold values that are not finite: {broken[0]}{more}"
    return "images and weights are finite, so the numbers overflow on the way"
