"""Accuracy of a classifier on a data set."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from secateur.errors import InputError
from secateur.training.batches import check_logits, check_range, device_of, extra_needed, loader, logits_of, mode_kept


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
    the device it is on, and is left in the mode it was in. Raises `DataError` for an empty data set, labels out of
    range and images that are not finite, `InputError` for a head of the wrong width or outputs that are not finite.
    """
    with extra_needed():
        from torchmetrics.classification import MulticlassAccuracy

    device = device_of(model)
    accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False).to(device)
    with mode_kept(model), torch.inference_mode():
        model.eval()
        for number, (images, labels) in enumerate(loader(dataset, batch_size, workers=workers)):
            check_range(labels, num_classes)
            logits = logits_of(model(images.to(device)))
            check_logits(logits, num_classes)
            if not torch.isfinite(logits).all():
                raise InputError(f"the model's output is not finite in batch {number}; {blame(model, images)}")
            accuracy.update(logits, labels.to(device))
        # The metric divides in float32; the rounding takes away the error of that.
        return round(100.0 * float(accuracy.compute()), 4)


def blame(model: nn.Module, images: Tensor) -> str:
    """Returns where a value that is not finite comes from: the images, the model's weights, or neither."""
    if not torch.isfinite(images).all():
        return "the images hold values that are not finite"
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        return f"the weights hold values that are not finite: {broken[0]}{more}"
    return "images and weights are finite, so the numbers overflow on the way"
