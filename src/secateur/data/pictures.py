"""Images that are decoded when asked for, or once and kept in memory; and how they become what a model takes."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.data.protocol import DataConfig, LabelledImages
from secateur.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224


class Pictures(LabelledImages):
    """Images that come from a decoder; `picture` is the only thing that kinds of them differ in.

    Images are resized straight to `config.image_size` squared (default 224), normalised with ImageNet's mean and
    standard deviation unless configured. Those of an augmented data set are varied the way DomainBed does it: a random
    crop of 70 to 100 % of the area, a flip, colour jitter of 0.3, grey once in ten.
    """

    def __init__(self, ids: Sequence[str], labels: Tensor, config: DataConfig, *, augmented: bool = False) -> None:
        """Takes ids of the form `domain/class/name` and their labels (int64, N)."""
        self.ids = tuple(ids)
        self.labels = labels
        self.domains = tuple(i.split("/", 1)[0] for i in self.ids)
        self.config = config
        self.augmented = augmented
        self._transform = _augmenting(config) if augmented else _resizing(config)

    @abstractmethod
    def picture(self, index: int) -> Image:
        """Returns one decoded image in RGB; raises `DataError` if it cannot be decoded."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns the image and its label; raises `DataError` if the image cannot be decoded."""
        return self._transform(self.picture(index)), int(self.labels[index])


class RowPictures(Pictures):
    """Images that lie in the rows of something that all parts of a data set share."""

    def __init__(
        self,
        source: Any,
        rows: Tensor,
        ids: Sequence[str],
        labels: Tensor,
        config: DataConfig,
        *,
        augmented: bool = False,
    ) -> None:
        """Takes what holds all images, the rows of this part in it (int64, N), and ids and labels (N each)."""
        super().__init__(ids, labels, config, augmented=augmented)
        self.source = source
        self.rows = rows

    def take(self, indices: Sequence[int] | NDArray[np.int64], *, augmented: bool = False) -> Self:
        index = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        ids, labels = [self.ids[i] for i in index], self.labels[index]
        return type(self)(self.source, self.rows[index], ids, labels, self.config, augmented=augmented)


class CachedPictures(RowPictures):
    """Images held decoded, uint8 N x S x S x 3; its parts share the memory.

    Evaluation images are the same, bit for bit, as those that are decoded anew. Training images differ a little: they
    are cropped from the resized image, not from the original.
    """

    def picture(self, index: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.source[self.rows[index]].numpy())


def cached(images: Pictures) -> CachedPictures:
    """Returns `images` with all of them decoded and resized once, by one thread per core, 3 x S x S bytes each.

    Worker processes that are forked share this memory; each process of a run on several GPUs has its own.

    Raises `InputError` if the machine has less memory than that, `DataError` for an image that cannot be decoded.
    """
    from torchvision.transforms import v2

    size = images.config.image_size or IMAGE_SIZE
    needed, there = 3 * size * size * len(images), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"cache: {len(images)} images of {size} x {size} need {needed / 1e9:.1f} GB, but this machine has "
            f"{there / 1e9:.1f} GB; leave the cache off, or make image_size smaller"
        )
    pixels = torch.empty((len(images), size, size, 3), dtype=torch.uint8)
    resize = v2.Resize((size, size), antialias=True)

    def fill(index: int) -> None:
        pixels[index] = torch.from_numpy(np.array(resize(images.picture(index))))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(fill, range(len(images))):
            pass
    return CachedPictures(pixels, torch.arange(len(images)), images.ids, images.labels, images.config)


def loader_options(workers: int, *, pin_memory: bool = False) -> dict[str, Any]:
    """Returns arguments for torch's `DataLoader` that keep a model fed by `workers` processes (0: the caller's own).

    Workers live through all epochs and prepare four batches each; `pin_memory` speeds up the copy to a GPU.
    """
    ahead = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    return {"num_workers": workers, "pin_memory": pin_memory, **ahead}


def _resizing(config: DataConfig) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    size = config.image_size or IMAGE_SIZE
    return v2.Compose([v2.Resize((size, size), antialias=True), *_normalising(config)])


def _augmenting(config: DataConfig) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(config.image_size or IMAGE_SIZE, scale=(0.7, 1.0), antialias=True)
    jitter = v2.ColorJitter(0.3, 0.3, 0.3, 0.3)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.1), *_normalising(config)])


def _normalising(config: DataConfig) -> list[Callable[..., Tensor]]:
    from torchvision.transforms import v2

    mean, std = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
