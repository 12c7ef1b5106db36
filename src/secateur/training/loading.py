"""Batches for one or many processes: the same global batches whatever their number, from any step of any epoch on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from secateur.data.pictures import loader_options

FILLER = -1
"""The index that items have which only keep a process busy that has no image of a batch: they count for nothing."""

Key = tuple[int, int, bool]
"""Which image, the seed of its augmentation, and whether it is a filler."""


def processes() -> tuple[int, int]:
    """Returns the rank of this process and the number of all that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class GlobalBatches(Sampler[list[Key]]):
    """The share of one process in each global batch; all depends on the seed, the epoch and the step alone.

    An epoch has `steps` steps of `batch_size` images (the last may have fewer), in `accumulate` parts each; of every
    part this process gets each `world`-th image. Set `epoch` (from 1) and `start`, the number of steps to leave out,
    before iterating. With a seed images are shuffled anew each epoch, without they come in their own order.
    """

    def __init__(self, count: int, batch_size: int, *, accumulate: int = 1, seed: int | None = None) -> None:
        """Takes the number of images in the data set."""
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.part = -(-batch_size // accumulate)
        self.rank, self.world = processes()
        self.epoch, self.start = 1, 0

    @property
    def steps(self) -> int:
        """The number of steps in an epoch."""
        return -(-self.count // self.batch_size)

    def sizes(self, step: int) -> list[int]:
        """Returns the number of images in each part of a step (counted from 0), over all processes."""
        images = min(self.batch_size, self.count - step * self.batch_size)
        return [min(self.part, images - begin) for begin in range(0, images, self.part)]

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(0 if self.seed is None else self.seed * 1_000_003 + self.epoch)
        order = torch.arange(self.count) if self.seed is None else torch.randperm(self.count, generator=generator)
        draws = torch.randint(2**31, (self.count,), generator=generator)
        for step in range(self.start, self.steps):
            whole = order[step * self.batch_size : (step + 1) * self.batch_size]
            for part in whole.split(self.part):
                own = part[self.rank :: self.world]
                yield [(int(i), int(draws[i]), False) for i in own] or [(int(part[0]), 0, True)]

    def __len__(self) -> int:
        return sum(len(self.sizes(step)) for step in range(self.start, self.steps))


class _Items(Dataset[tuple[Tensor, int, int]]):
    """Images with their labels and indices, `FILLER` for fillers.

    Where a data set augments, the draws of each image come from a seed of its own; so they are the same in whichever
    process, and after whatever interruption, an image is read.
    """

    def __init__(self, dataset: Dataset[tuple[Tensor, int]]) -> None:
        self.dataset = dataset
        self.augmented = bool(getattr(dataset, "augmented", False))

    def __getitem__(self, index: Any) -> tuple[Tensor, int, int]:
        number, draw, filler = index
        if not self.augmented:
            image, label = self.dataset[number]
            return image, int(label), FILLER if filler else number
        # torch.manual_seed would reseed the GPU as well, whose state belongs to the training step.
        generator = torch.default_generator
        before = generator.get_state()
        try:
            generator.manual_seed(draw)
            image, label = self.dataset[number]
        finally:
            generator.set_state(before)
        return image, int(label), FILLER if filler else number


def batches_of(
    dataset: Dataset[tuple[Tensor, int]], sampler: GlobalBatches, *, workers: int, device: torch.device
) -> DataLoader[Any]:
    """Returns batches of images [B, 3, H, W], labels [B] and indices [B] as `sampler` says.

    They are read by `workers` processes, 0 for this one. Torch's global generators are neither read nor moved.
    """
    return DataLoader(
        _Items(dataset),
        batch_sampler=sampler,
        generator=torch.Generator(),
        worker_init_fn=_outlive_sigterm if workers else None,
        **loader_options(workers, pin_memory=device.type == "cuda"),
    )


def _outlive_sigterm(worker: int) -> None:
    """Leaves SIGTERM, which schedulers send to every process of a job, to the training process, which saves first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
