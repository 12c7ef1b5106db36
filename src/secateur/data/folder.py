"""Images in folders `root/domain/class/*.jpg`: the layout of PACS, VLCS, Office-Home, TerraIncognita and DomainNet.

A folder that `secateur data prepare` wrote has a manifest, which it is compared with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.data.manifest import JOURNAL, MANIFEST, Manifest
from secateur.data.pictures import Pictures, cached
from secateur.data.protocol import Collection, DataConfig, Split, split_collection
from secateur.errors import DataError, unknown_name

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_LISTED = 50
"""How many problems an error spells out; the rest it counts."""


def domain_folder(root: str | Path, config: DataConfig) -> Split:
    """Returns the images under `root/domain/class/` split as `config` asks.

    Domains and classes are the sorted names of the folders; for the images see `Pictures`.

    Raises `DataError` naming every problem at once: no such folder, fewer than two domains, empty domains and classes,
    classes missing in a domain, files that are no images, a folder that differs from its manifest, and, if
    `config.verify`, images that cannot be decoded or have another checksum. Raises `InputError` for an unknown unseen
    domain.
    """
    return split_collection(collect_folder(root, config), config)


def collect_folder(root: str | Path, config: DataConfig) -> Collection:
    """Returns all images under `root/domain/class/`; raises as `domain_folder` does."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no data set at {root}: expected a folder holding one folder per domain")
    manifest = Manifest.read(root) if (root / MANIFEST).exists() else None
    if manifest is None and (root / JOURNAL).exists():
        raise DataError(f"the preparation of {root} was not finished; run the same `secateur data prepare` again")
    files, problems = _listing(root)
    if config.unseen is not None and config.unseen not in files:
        unknown = unknown_name("domain", config.unseen, files)
        if not problems:
            raise unknown
        problems.append(str(unknown))
    paths = [p for classes in files.values() for images in classes.values() for p in images]
    ids = [p.relative_to(root).as_posix() for p in paths]
    if manifest is not None:
        problems += [f"in the manifest, but missing: {i}" for i in sorted(manifest.images.keys() - set(ids))]
        problems += [f"not in the manifest: {i}" for i in sorted(set(ids) - manifest.images.keys())]
    if config.verify:
        problems += complaints(lambda path: check_file(path, root, manifest), paths)
    if problems:
        raise problem_error(f"the data set at {root}", problems)
    classes = tuple(sorted({name for domain in files.values() for name in domain}))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([numbers[p.parent.name] for p in paths], dtype=torch.int64)
    images = FolderImages(root, ids, labels, config)
    return Collection(
        name=manifest.benchmark if manifest else root.resolve().name,
        images=cached(images) if config.cache else images,
        classes=classes,
        official=manifest is not None and manifest.official,
        hashes=tuple(manifest.images[i].sha256 for i in ids) if manifest else None,
    )


class FolderImages(Pictures):
    """Image files under one root, decoded when asked for; the id of an image is its path below the root."""

    def __init__(
        self, root: Path, ids: Sequence[str], labels: Tensor, config: DataConfig, *, augmented: bool = False
    ) -> None:
        """Takes ids of the form `domain/class/file` and their labels (int64, N)."""
        super().__init__(ids, labels, config, augmented=augmented)
        self.root = root

    def picture(self, index: int) -> Image:
        path = self.root / self.ids[index]
        try:
            return _decoded(path)
        except undecodable() as error:
            raise DataError(f"cannot read image {path}: {error}") from error

    def take(self, indices: Sequence[int] | NDArray[np.int64], *, augmented: bool = False) -> Self:
        index = np.asarray(indices, dtype=np.int64)
        ids = [self.ids[i] for i in index]
        return type(self)(self.root, ids, self.labels[torch.from_numpy(index)], self.config, augmented=augmented)


# --- reading and checking ---------------------------------------------------------------------------------------


def is_clutter(name: str) -> bool:
    """Whether a file or folder is what operating systems leave behind: hidden files, caches of thumbnails."""
    return name.startswith(".") or name.lower() in _CLUTTER


def is_image(name: str) -> bool:
    """Whether a file is an image by the end of its name."""
    return Path(name).suffix.lower() in SUFFIXES


def _listing(root: Path) -> tuple[dict[str, dict[str, list[Path]]], list[str]]:
    """Returns the image files by domain and class, sorted by name, and what is wrong with the layout."""
    files: dict[str, dict[str, list[Path]]] = {}
    problems: list[str] = []
    for domain in _folders(root):
        classes: dict[str, list[Path]] = {}
        for folder in _folders(domain):
            classes[folder.name] = []
            for path in sorted(folder.iterdir()):
                if is_clutter(path.name):
                    continue
                if path.is_file() and is_image(path.name):
                    classes[folder.name].append(path)
                else:
                    problems.append(f"not an image file: {path}")
        files[domain.name] = classes
    if len(files) < 2:
        found = ", ".join(files) or "none"
        problems.append(f"at least two domains (folders of class folders) are needed, found {found}")
    held = {domain: {name for name, images in classes.items() if images} for domain, classes in files.items()}
    problems += empty_problems(held)
    known = {name for names in held.values() for name in names}
    empty = sorted({c for classes in files.values() for c in classes} - known)
    if known and empty:
        problems.append(f"classes without an image in any domain: {', '.join(empty)}")
    return files, problems


def empty_problems(held: dict[str, set[str]]) -> list[str]:
    """Returns complaints about domains without images, and about classes that only some domains have images of.

    `held` are the classes that each domain holds images of.
    """
    known = {name for names in held.values() for name in names}
    problems: list[str] = []
    for domain, names in held.items():
        if not names:
            problems.append(f"domain {domain!r} holds no images")
        elif missing := sorted(known - names):
            problems.append(f"domain {domain!r} lacks images of {len(missing)} classes: {', '.join(missing)}")
    return problems


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not is_clutter(p.name))


def complaints(check: Callable[[Path], str | None], paths: Sequence[Path]) -> list[str]:
    """Returns what `check` has to say about the files, asked by one thread per core."""
    with ThreadPoolExecutor() as pool:
        return [found for found in pool.map(check, paths) if found]


def check_file(path: Path, root: Path, manifest: Manifest | None) -> str | None:
    """Returns a complaint if a file cannot be decoded from beginning to end or is not what the manifest says."""
    try:
        _decoded(path)
    except undecodable() as error:
        return f"cannot read image {path}: {error}"
    if manifest is not None and (known := manifest.images.get(path.relative_to(root).as_posix())):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != known.sha256:
            return f"{path} was changed: its SHA-256 is {found}, in the manifest {known.sha256}"
    return None


def _decoded(path: Path) -> Image:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def undecodable() -> tuple[type[Exception], ...]:
    """Returns what Pillow raises on files that are truncated, forged or no images at all."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def problem_error(what: str, problems: Sequence[str], hint: str = "") -> DataError:
    """Returns one error that names the problems, the first fifty of them word for word."""
    listed = "".join(f"\n  - {problem}" for problem in problems[:_LISTED])
    more = f"\n  … and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return DataError(f"{len(problems)} problem(s) with {what}{hint}:{listed}{more}")
