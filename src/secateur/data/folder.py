"""Images in folders `root/domain/class/*.jpg`: the layout of PACS, VLCS, Office-Home, TerraIncognita and DomainNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.data.protocol import DataConfig, LabelledImages, Split, split_domains
from secateur.errors import DataError, unknown_name

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_CLUTTER = frozenset({"thumbs.db", "desktop.ini"})
_LISTED = 50
"""How many problems an error spells out; the rest it counts."""


def domain_folder(root: str | Path, config: DataConfig) -> Split:
    """Returns the images under `root/domain/class/` split as `config` asks.

    Domains and classes are the sorted names of the folders. Images are decoded when they are asked for and resized
    straight to `config.image_size` squared (default 224), normalised with ImageNet's mean and standard deviation
    unless configured. Train images are augmented if `config.augment` the way DomainBed does it: a random crop of 70 to
    100 % of the area, a flip, colour jitter of 0.3, grey once in ten.

    Raises `DataError` naming every problem at once: no such folder, fewer than two domains, empty domains and classes,
    classes missing in a domain, files that are no images, and, if `config.verify`, images that cannot be decoded.
    Raises `InputError` for an unknown unseen domain.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no data set at {root}: expected a folder holding one folder per domain")
    files, problems = _listing(root)
    if config.unseen is not None and config.unseen not in files:
        unknown = unknown_name("domain", config.unseen, files)
        if not problems:
            raise unknown
        problems.append(str(unknown))
    paths = [p for classes in files.values() for images in classes.values() for p in images]
    if config.verify:
        problems += _unreadable(paths)
    if problems:
        raise _error(root, problems)
    classes = tuple(sorted({name for domain in files.values() for name in domain}))
    labels = torch.tensor([classes.index(p.parent.name) for p in paths], dtype=torch.int64)
    everything = FolderImages(root, [p.relative_to(root).as_posix() for p in paths], labels, config)
    return split_domains(everything, classes, config)


class FolderImages(LabelledImages):
    """Image files under one root, decoded when asked for; the id of an image is its path below the root."""

    def __init__(
        self, root: Path, ids: Sequence[str], labels: Tensor, config: DataConfig, *, augmented: bool = False
    ) -> None:
        """Takes ids of the form `domain/class/file` and their labels (int64, N)."""
        self.root = root
        self.ids = tuple(ids)
        self.labels = labels
        self.domains = tuple(i.split("/", 1)[0] for i in self.ids)
        self.config = config
        self.augmented = augmented
        self._transform = _augmenting(config) if augmented else _resizing(config)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns the image and its label; raises `DataError` if the file cannot be decoded."""
        path = self.root / self.ids[index]
        try:
            image = _decoded(path)
        except _undecodable() as error:
            raise DataError(f"cannot read image {path}: {error}") from error
        return self._transform(image), int(self.labels[index])

    def take(self, indices: Sequence[int] | NDArray[np.int64], *, augmented: bool = False) -> Self:
        index = np.asarray(indices, dtype=np.int64)
        ids = [self.ids[i] for i in index]
        return type(self)(self.root, ids, self.labels[torch.from_numpy(index)], self.config, augmented=augmented)


# --- transforms -------------------------------------------------------------------------------------------------


def _resizing(config: DataConfig) -> Callable[[Image], Tensor]:
    from torchvision.transforms import v2

    size = config.image_size or IMAGE_SIZE
    return v2.Compose([v2.Resize((size, size), antialias=True), *_normalising(config)])


def _augmenting(config: DataConfig) -> Callable[[Image], Tensor]:
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(config.image_size or IMAGE_SIZE, scale=(0.7, 1.0), antialias=True)
    jitter = v2.ColorJitter(0.3, 0.3, 0.3, 0.3)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.1), *_normalising(config)])


def _normalising(config: DataConfig) -> list[Callable[..., Tensor]]:
    from torchvision.transforms import v2

    mean, std = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


# --- reading and checking ---------------------------------------------------------------------------------------


def _listing(root: Path) -> tuple[dict[str, dict[str, list[Path]]], list[str]]:
    """Returns the image files by domain and class, sorted by name, and what is wrong with the layout."""
    files: dict[str, dict[str, list[Path]]] = {}
    problems: list[str] = []
    for domain in _folders(root):
        classes: dict[str, list[Path]] = {}
        for folder in _folders(domain):
            classes[folder.name] = []
            for path in sorted(folder.iterdir()):
                if path.name.startswith(".") or path.name.lower() in _CLUTTER:
                    continue
                if path.is_file() and path.suffix.lower() in SUFFIXES:
                    classes[folder.name].append(path)
                else:
                    problems.append(f"not an image file: {path}")
        files[domain.name] = classes
    if len(files) < 2:
        found = ", ".join(files) or "none"
        problems.append(f"at least two domains (folders of class folders) are needed, found {found}")
    known = {name for classes in files.values() for name, images in classes.items() if images}
    for name, classes in files.items():
        held = {c for c, images in classes.items() if images}
        if not held:
            problems.append(f"domain {name!r} holds no images")
        elif missing := sorted(known - held):
            problems.append(f"domain {name!r} lacks images of {len(missing)} classes: {', '.join(missing)}")
    empty = sorted({c for classes in files.values() for c in classes} - known)
    if known and empty:
        problems.append(f"classes without an image in any domain: {', '.join(empty)}")
    return files, problems


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _unreadable(paths: Sequence[Path]) -> list[str]:
    """Returns a complaint for every file that cannot be decoded from beginning to end."""

    def complaint(path: Path) -> str | None:
        try:
            _decoded(path)
        except _undecodable() as error:
            return f"cannot read image {path}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        return [found for found in pool.map(complaint, paths) if found]


def _decoded(path: Path) -> Image:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _undecodable() -> tuple[type[Exception], ...]:
    """Returns what Pillow raises on files that are truncated, forged or no images at all."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def _error(root: Path, problems: list[str]) -> DataError:
    listed = "".join(f"\n  - {problem}" for problem in problems[:_LISTED])
    more = f"\n  … and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return DataError(f"{len(problems)} problem(s) with the data set at {root}:{listed}{more}")
