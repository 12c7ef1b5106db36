"""What every data set hands over: labelled images with ids, and the split of its domains into train, val and test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from secateur.errors import DataError, InputError, unknown_name

SplitName = Literal["leave_one_out", "iid_pooled"]
LEAVE_ONE_OUT = "leave-one-domain-out"
IID_POOLED = "i.i.d. hold-out of pooled domains (not domain generalisation)"


@dataclass(frozen=True)
class DataConfig:
    """How a data set is split and presented.

    `split`: `leave_one_out` trains and validates on all domains but `unseen` and tests on all of `unseen`;
    `iid_pooled` pools the domains and holds out 17 % for validation and 10 % for testing, which measures no domain
    generalisation. `val_fraction` is the share of the source domains held out in `leave_one_out`. `seed` chooses the
    hold-out. `image_size` in pixels, `mean` and `std` per channel (of values in 0..1): None is the data set's own.
    `augment` says whether training images are augmented; `verify` decodes every image file before use.
    """

    unseen: str | None = None
    split: SplitName = "leave_one_out"
    seed: int = 0
    val_fraction: float = 0.2
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    augment: bool = True
    verify: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` for values that no data set could use."""
        if self.split not in ("leave_one_out", "iid_pooled"):
            raise unknown_name("split", str(self.split), ("leave_one_out", "iid_pooled"))
        if self.split == "iid_pooled" and self.unseen is not None:
            raise InputError(f"split 'iid_pooled' has no unseen domain, but unseen={self.unseen!r} was given; drop one")
        if self.seed < 0:
            raise InputError(f"seed must not be negative, found {self.seed}")
        if not 0.0 < self.val_fraction < 1.0:
            raise InputError(f"val_fraction must lie between 0 and 1, found {self.val_fraction}")
        if self.image_size is not None and self.image_size < 1:
            raise InputError(f"image_size must be at least 1 pixel, found {self.image_size}")
        if self.std is not None and min(self.std) <= 0:
            raise InputError(f"std must be positive in every channel, found {self.std}")


class LabelledImages(Dataset[tuple[Tensor, int]], ABC):
    """Images with their labels (int64, N), ids and domains; an item is (float32 3 x H x W, normalised; int label).

    An id has the form `domain/class/name` and is unique within its data set. `augmented` says whether items are drawn
    with random augmentation, for which torch's global generator is used.
    """

    labels: Tensor
    ids: tuple[str, ...]
    domains: tuple[str, ...]
    augmented: bool

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns the image (3 x H x W) and its label."""

    @abstractmethod
    def take(self, indices: Sequence[int] | NDArray[np.int64], *, augmented: bool = False) -> Self:
        """Returns the images at `indices` as a data set of its own, sharing storage where it can."""

    def plain(self) -> Self:
        """Returns the same images without augmentation."""
        return self.take(range(len(self))) if self.augmented else self


class TensorImages(LabelledImages):
    """Images held in memory, already normalised; augmentation is a random shift by up to 2 pixels.

    Digits must neither be flipped nor cropped much: a 6 is no 9, so shifting is all that is safe.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        ids: Sequence[str],
        domains: Sequence[str],
        *,
        size: int,
        augmented: bool = False,
    ) -> None:
        """Takes images N x 3 x H x W and labels, ids and domains (N each); items are resized to `size` squared."""
        self.images = images
        self.labels = labels
        self.ids = tuple(ids)
        self.domains = tuple(domains)
        self.size = size
        self.augmented = augmented

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.augmented:
            image = _shifted(image)
        if image.shape[-1] != self.size:
            image = functional.interpolate(image[None], self.size, mode="bilinear", antialias=True)[0]
        return image, int(self.labels[index])

    def take(self, indices: Sequence[int] | NDArray[np.int64], *, augmented: bool = False) -> Self:
        index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        ids, domains = [self.ids[i] for i in index], [self.domains[i] for i in index]
        return type(self)(self.images[index], self.labels[index], ids, domains, size=self.size, augmented=augmented)


def _shifted(image: Tensor, reach: int = 2) -> Tensor:
    """Returns the image moved by up to `reach` pixels each way, its border repeated."""
    top, left = torch.randint(0, 2 * reach + 1, (2,)).tolist()
    padded = functional.pad(image[None], (reach,) * 4, mode="replicate")[0]
    return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


@dataclass(frozen=True)
class Split:
    """Train, validation and test images, and what was done to tell them apart.

    `domains` are the sources, which train and val come from; `unseen` is the domain that test consists of, or None
    where there is none. `protocol` is the label to print beside any accuracy measured on this split.
    """

    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    unseen: str | None
    protocol: str

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def ids(self) -> dict[str, tuple[str, ...]]:
        """The ids of the images in `train`, `val` and `test`."""
        return {"train": self.train.ids, "val": self.val.ids, "test": self.test.ids}

    def __str__(self) -> str:
        unseen = f", unseen {self.unseen}" if self.unseen else ""
        counts = f"{len(self.train)} train, {len(self.val)} val, {len(self.test)} test images"
        return f"{counts} of {self.num_classes} classes; {self.protocol}; sources {', '.join(self.domains)}{unseen}"


def split_domains(
    everything: LabelledImages, classes: tuple[str, ...], config: DataConfig, *, default_unseen: str | None = None
) -> Split:
    """Returns `everything` split as `config` asks, stratified by domain and class.

    Raises `InputError` if the unseen domain is not named or not known, `DataError` if a part would be empty.
    """
    domains = tuple(sorted(set(everything.domains)))
    cells = np.array([f"{d}/{c:06d}" for d, c in zip(everything.domains, everything.labels.tolist(), strict=True)])
    if config.split == "iid_pooled":
        rest, test = hold_out(np.arange(len(cells)), cells, 0.10, config.seed)
        train, val = hold_out(rest, cells, 0.17 / 0.90, config.seed)
        unseen, sources, protocol = None, domains, IID_POOLED
    else:
        unseen = config.unseen or default_unseen
        if unseen is None:
            raise InputError(f"name the domain to leave out: unseen must be one of {', '.join(domains)}")
        if unseen not in domains:
            raise unknown_name("domain", unseen, domains)
        is_unseen = np.array([d == unseen for d in everything.domains])
        test = np.flatnonzero(is_unseen)
        train, val = hold_out(np.flatnonzero(~is_unseen), cells, config.val_fraction, config.seed)
        sources, protocol = tuple(d for d in domains if d != unseen), LEAVE_ONE_OUT
    for name, part in (("train", train), ("val", val), ("test", test)):
        if part.size == 0:
            raise DataError(f"the {name} part would be empty: {len(cells)} images are too few for {protocol}")
    return Split(
        train=everything.take(train, augmented=config.augment),
        val=everything.take(val),
        test=everything.take(test),
        classes=classes,
        domains=sources,
        unseen=unseen,
        protocol=protocol,
    )


def hold_out(
    indices: NDArray[np.int64], cells: NDArray[np.str_], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns `indices` as two sorted parts, the second holding `fraction` of every cell to within one image.

    `cells` names the cell (domain and class) of every image. All cells are shuffled inside, laid end to end, and the
    images taken at even spacing, so that the total is exact and small cells are not rounded away.
    """
    shuffled = np.random.default_rng([seed, len(indices)]).permutation(indices)
    ordered = shuffled[np.argsort(cells[shuffled], kind="stable")]
    marks = np.floor(np.arange(len(ordered) + 1) * fraction + 0.5)
    held = np.diff(marks) > 0
    return np.sort(ordered[~held]), np.sort(ordered[held])
