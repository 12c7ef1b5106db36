"""Augmentation by timm's own transforms and Mixup, with every random number drawn from torch's global generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from secateur.errors import InputError, unknown_name
from secateur.training.batches import extra_needed

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = tuple[float, float, float]
Transform = Callable[["Image | Tensor"], Tensor]
"""From an image (PIL, or uint8 3 x H x W) to float32 3 x size x size, normalised."""


@dataclass(frozen=True)
class AugmentConfig:
    """How images are changed for training, and resized for evaluation; the defaults are DomainBed's (arXiv 2007.01434).

    For each image: `crop_scale` is the range of the area of the random crop; `hflip` and `grayscale` are probabilities;
    `color_jitter` the strength for brightness, contrast, saturation and hue, in 0 … 0.5. `rand_magnitude`, 0 … 10,
    turns RandAugment on (arXiv 1909.13719; timm's `rand-m…-mstd0.5-inc1`, as in DeiT), and colour jitter off.
    `random_erasing` is the probability of noise in a rectangle (arXiv 1708.04896).

    For each batch: `mixup` (arXiv 1710.09412) and `cutmix` (arXiv 1905.04899) are the alphas of their Beta
    distributions, 0 for neither; one batch in `mix_probability` is mixed, and where both are on, by cutmix with
    `cutmix_share`.

    For evaluation: `eval_crop` None resizes straight to the size, as DomainBed does; 0.875 makes the shorter edge 256
    and crops the middle 224, in proportion for other sizes.
    """

    crop_scale: tuple[float, float] = (0.7, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.3
    grayscale: float = 0.1
    rand_magnitude: int | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    cutmix_share: float = 0.5
    eval_crop: float | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        """Raises `InputError` naming the first value out of range."""
        low, high = self.crop_scale
        limits: tuple[tuple[str, bool, str], ...] = (
            ("crop_scale", 0.0 < low <= high <= 1.0, "two fractions in (0, 1], the smaller first"),
            ("color_jitter", 0.0 <= self.color_jitter <= 0.5, "in [0, 0.5]"),
            ("rand_magnitude", self.rand_magnitude is None or 0 <= self.rand_magnitude <= 10, "in 0 … 10, or None"),
            ("mixup", self.mixup >= 0.0, "0 or more"),
            ("cutmix", self.cutmix >= 0.0, "0 or more"),
            ("eval_crop", self.eval_crop is None or 0.0 < self.eval_crop <= 1.0, "in (0, 1], or None"),
        )
        for name, holds, expected in limits:
            if not holds:
                raise InputError(f"{name} must be {expected}, found {getattr(self, name)!r}")
        for name in ("hflip", "grayscale", "random_erasing", "mix_probability", "cutmix_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} is a probability, in [0, 1], found {getattr(self, name)!r}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise unknown_name("interpolation", str(self.interpolation), ("bilinear", "bicubic"))

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Returns what goes with the recipe of arXiv 2504.04196, with `changes` to single fields.

        The paper does not say how it augments. These are the values of torchvision's reference recipe for ViT-B/16,
        with which the paper's published values agree: RandAugment of magnitude 9, mixup 0.2, cutmix 1.0, crops from
        8 % of the area on, and for evaluation the middle 224 of 256.
        """
        published = cls(crop_scale=(0.08, 1.0), grayscale=0.0, rand_magnitude=9, mixup=0.2, cutmix=1.0, eval_crop=0.875)
        return replace(published, **changes)


def train_transform(config: AugmentConfig, size: int, mean: Colour, std: Colour) -> Transform:
    """Returns the random transform of single images for training.

    `size` in pixels; `mean` and `std` per channel of values in 0 … 1. Raises `InputError` for a size below 1, or if
    timm is not installed.
    """
    magnitude = config.rand_magnitude
    jitter = config.color_jitter if magnitude is None else 0.0
    return _Transform(
        _timm(
            config,
            size,
            mean,
            std,
            is_training=True,
            scale=config.crop_scale,
            hflip=config.hflip,
            color_jitter=(jitter,) * 4 if jitter else None,
            grayscale_prob=config.grayscale,
            auto_augment=None if magnitude is None else f"rand-m{magnitude}-mstd0.5-inc1",
            re_prob=config.random_erasing,
            re_mode="pixel",
        ),
        is_random=True,
    )


def eval_transform(config: AugmentConfig, size: int, mean: Colour, std: Colour) -> Transform:
    """Returns the transform of single images for evaluation, which does the same every time; see `train_transform`."""
    crop = {"crop_pct": config.eval_crop, "crop_mode": "center"}
    whole = {"crop_pct": 1.0, "crop_mode": "squash"}
    return _Transform(
        _timm(config, size, mean, std, is_training=False, **(whole if config.eval_crop is None else crop)),
        is_random=False,
    )


def _timm(config: AugmentConfig, size: int, mean: Colour, std: Colour, **options: Any) -> Callable[[Any], Tensor]:
    """Returns timm's own transform."""
    if size < 1:
        raise InputError(f"size must be at least 1 pixel, found {size}")
    with extra_needed():
        from timm.data import create_transform
        from timm.data.auto_augment import RandAugment
    made: Any = create_transform(size, interpolation=config.interpolation, mean=mean, std=std, **options)
    for stage in made.transforms:
        for operation in stage.ops if isinstance(stage, RandAugment) else ():
            if operation.name == "PosterizeIncreasing":
                # At 10 timm would keep no bit of the colours, which Pillow 13 refuses.
                operation.magnitude_max = 9.99
    return made


class _Transform:
    """A transform of timm's that takes tensors too, and, if random, draws from torch's global generator alone."""

    def __init__(self, inner: Callable[[Any], Tensor], *, is_random: bool) -> None:
        self.inner, self.is_random = inner, is_random

    def __call__(self, image: Image | Tensor) -> Tensor:
        from torchvision.transforms.functional import to_pil_image

        pil = to_pil_image(image) if isinstance(image, Tensor) else image
        if not self.is_random:
            return self.inner(pil)
        with _seeded_from_torch():
            return self.inner(pil)

    def __repr__(self) -> str:
        return repr(self.inner)


class BatchMixing:
    """Mixes the images of a batch by timm's Mixup: the first with the last and so on, all in the same proportion."""

    def __init__(self, config: AugmentConfig, num_classes: int, label_smoothing: float) -> None:
        with extra_needed():
            from timm.data.mixup import Mixup

        self.mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            prob=config.mix_probability,
            switch_prob=config.cutmix_share,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns new images [B, 3, H, W] and targets [B, C] for labels [B]; in a batch of odd size the last stays."""
        from timm.data.mixup import mixup_target

        even = len(images) - len(images) % 2
        mixed, targets = images.clone(), mixup_target(labels, self.mixup.num_classes, 1.0, self.mixup.label_smoothing)
        if even:
            with _seeded_from_torch():
                # Views: timm writes the images in place.
                _, targets[:even] = self.mixup(mixed[:even], labels[:even])
        return mixed, targets


def batch_mixing(config: AugmentConfig, num_classes: int, label_smoothing: float = 0.0) -> BatchMixing | None:
    """Returns what mixes batches as `config` asks, or None if it asks for neither mixup nor cutmix.

    `label_smoothing` is the share of each label spread evenly over all classes; the targets come out smoothed, and no
    objective smooths them once more. Raises `InputError` for values out of range, or if timm is not installed.
    """
    if num_classes < 1:
        raise InputError(f"num_classes must be at least 1, found {num_classes}")
    if not 0.0 <= label_smoothing < 1.0:
        raise InputError(f"label_smoothing must be in [0, 1), found {label_smoothing}")
    if config.mixup == config.cutmix == 0.0 or config.mix_probability == 0.0:
        return None
    return BatchMixing(config, num_classes, label_smoothing)


@contextmanager
def _seeded_from_torch() -> Iterator[None]:
    """Seeds the generators of Python and numpy, which timm draws from, by torch's, and puts them back afterwards."""
    seed = int(torch.randint(2**31, ()))
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
