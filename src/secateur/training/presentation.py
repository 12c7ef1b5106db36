"""The images of a split as a recipe's augmentation wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.data.pictures import IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD, Pictures
from secateur.data.protocol import LabelledImages, Split
from secateur.errors import InputError
from secateur.training.augmentation import AugmentConfig, eval_transform, train_transform


def presented(split: Split, augment: AugmentConfig | None) -> Split:
    """Returns the split with its images changed for training, and resized for evaluation, as `augment` says.

    Training images that the split does not augment stay plain. None leaves everything as the data set has it, and so
    does a configuration that only mixes batches, for data sets whose images are not pictures that can be transformed.

    Raises `InputError` if such a data set is to be transformed.
    """
    if augment is None:
        return split
    parts = {"train": split.train, "val": split.val, "test": split.test}
    if all(isinstance(part, Pictures) for part in parts.values()):
        return replace(split, **{name: _Presented(part, augment) for name, part in parts.items()})
    only_mixing = AugmentConfig(
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        mix_probability=augment.mix_probability,
        cutmix_share=augment.cutmix_share,
    )
    if augment != only_mixing:
        raise InputError(
            f"the images of {split.data or 'this data set'} come as tensors, which cannot be augmented anew; give an "
            "augment that only mixes batches (mixup, cutmix), or none"
        )
    return split


class _Presented(LabelledImages):
    """Pictures under the transforms of an augmentation."""

    def __init__(self, images: LabelledImages, augment: AugmentConfig) -> None:
        assert isinstance(images, Pictures)
        self.images, self.augment = images, augment
        self.labels, self.ids, self.domains, self.augmented = (
            images.labels,
            images.ids,
            images.domains,
            images.augmented,
        )
        config = images.config
        size, mean = config.image_size or IMAGE_SIZE, config.mean or IMAGENET_MEAN
        make = train_transform if self.augmented else eval_transform
        self.transform = make(augment, size, mean, config.std or IMAGENET_STD)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images.picture(index)), int(self.labels[index])

    def take(self, indices: Sequence[int] | NDArray[np.int64], *, augmented: bool = False) -> Self:
        return type(self)(self.images.take(indices, augmented=augmented), self.augment)


def domain_numbers(images: LabelledImages) -> Tensor:
    """Returns the number of each image's domain, int64, counted from 0 in the order of their names."""
    return torch.from_numpy(np.unique(np.array(images.domains), return_inverse=True)[1])
