"""What goes into a classifier and what comes out of it: batches of images, and logits in whatever wrapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from secateur.data.protocol import LabelledImages, Split
from secateur.errors import DataError, InputError

Batch = tuple[Tensor, Tensor]
"""Images (float32, B x 3 x H x W) and labels (int64, B)."""


def logits_of(output: object) -> Tensor:
    """Returns the logits (B x classes) in a model's output.

    The output may be the logits themselves, a tuple or list of logits of equal shape, which are averaged (the class and
    distillation heads of DeiT, as at inference in arXiv 2012.12877), or a mapping with the entry `logits`, as Hugging
    Face models give. Raises `InputError` for anything else.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    if isinstance(output, tuple | list) and output and all(isinstance(o, Tensor) for o in output):
        if len({o.shape for o in output}) == 1:
            return torch.stack(tuple(output)).mean(dim=0)
        shapes = ", ".join(str(tuple(o.shape)) for o in output)
        raise InputError(f"the model gives several tensors of different shapes ({shapes}); expected logits only")
    raise InputError(
        f"cannot find logits in the model's output of type {type(output).__name__}; expected a tensor, a tuple of "
        "tensors of one shape, or an object with the entry 'logits'"
    )


def calibration_batches(split: Split, *, batches: int = 10, batch_size: int = 64, seed: int = 0) -> list[Batch]:
    """Returns up to `batches` batches of random training images without augmentation, for criteria that need data.

    They come from the train part of the source domains, never from validation images or the unseen domain. No image
    is drawn twice, so a small train part gives fewer batches; a last one smaller than `batch_size` is left out unless
    it is the only one. Raises `InputError` for counts below one.
    """
    if batches < 1 or batch_size < 1:
        raise InputError(f"batches and batch_size must be at least 1, found {batches} and {batch_size}")
    images = split.train.plain()
    check_labels(images, split.num_classes)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: batches * batch_size]
    chunks = [c for c in order.split(batch_size) if len(c) == min(batch_size, len(order))]
    drawn: list[Batch] = []
    for chunk in chunks:
        pairs = [images[int(i)] for i in chunk]
        batch = torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
        if not torch.isfinite(batch[0]).all():
            raise DataError("the training images hold values that are not finite")
        drawn.append(batch)
    return drawn


def calibration_by_domain(
    split: Split, *, batches: int = 10, batch_size: int = 64, seed: int = 0
) -> dict[str, list[Batch]]:
    """Returns `calibration_batches` for each source domain: `batches` (rounded up to as many for each) among them all.

    Raises `InputError` for counts below one.
    """
    images = split.train.plain()
    each = -(-batches // len(split.domains))
    found: dict[str, list[Batch]] = {}
    for domain in split.domains:
        own = images.take([i for i, its in enumerate(images.domains) if its == domain])
        found[domain] = calibration_batches(replace(split, train=own), batches=each, batch_size=batch_size, seed=seed)
    return found


def check_filled(dataset: Dataset[tuple[Tensor, int]]) -> None:
    """Raises `DataError` if the data set holds nothing."""
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise DataError("the data set is empty; expected at least one image")


def check_labels(dataset: LabelledImages, num_classes: int) -> None:
    """Raises `DataError` if the data set is empty or a label lies outside 0 … `num_classes` - 1."""
    check_filled(dataset)
    check_range(dataset.labels, num_classes)


def check_range(labels: Tensor, num_classes: int) -> None:
    """Raises `DataError` if a label lies outside 0 … `num_classes` - 1."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"labels must lie in 0 … {num_classes - 1}, found {low} … {high}")


def check_logits(logits: Tensor, num_classes: int) -> None:
    """Raises `InputError` unless the logits have one column per class."""
    if logits.ndim != 2 or logits.shape[1] != num_classes:
        shape = " x ".join(map(str, logits.shape))
        raise InputError(
            f"the model gives logits of {shape}, but there are {num_classes} classes; give the model a head of "
            f"{num_classes} outputs, e.g. model.reset_classifier({num_classes}) for a timm model"
        )


@contextmanager
def extra_needed() -> Iterator[None]:
    """Turns a failing import of what only the extra `train` installs into an `InputError` that says so."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"training and evaluation need the extra: pip install 'secateur[train]' ({error})") from error


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the model's first parameter or buffer, the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def mode_kept(model: nn.Module) -> Iterator[None]:
    """Puts every module of the model back into the train or eval mode that it is in now, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
