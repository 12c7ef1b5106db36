"""What every data set hands over: labelled images with ids, and the split of its domains into train, val and test."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from secateur.errors import DataError, InputError, unknown_name

SplitName = Literal["leave_one_out", "domainbed", "iid_pooled", "paper", "official", "within_train"]
LEAVE_ONE_OUT = "leave-one-domain-out"
DOMAINBED = "leave-one-domain-out, DomainBed's hold-outs"
IID_POOLED = "i.i.d. hold-out of pooled domains (not domain generalisation)"
PROTOCOLS = {"leave_one_out": LEAVE_ONE_OUT, "domainbed": DOMAINBED, "iid_pooled": IID_POOLED}
"""What splits are called beside an accuracy, as far as that does not depend on the data."""
PAPER = ", as in arXiv 2504.04196"
OFFICIAL = "official test part (not domain generalisation)"
WITHIN_TRAIN = "80/10/10 % of the official training part (not domain generalisation)"

TRAINING_DOMAIN = "training-domain validation"
CROSS_VALIDATION = "leave-one-domain-out cross-validation"
ORACLE = "oracle: looks at the unseen domain"
"""How a checkpoint or a hyper-parameter was chosen: the labels to print beside any accuracy."""


@dataclass(frozen=True)
class DataConfig:
    """How a data set is split and presented.

    `split`:

    - `leave_one_out` trains and validates on all domains but `unseen` and tests on all of `unseen`; the hold-out is
      stratified by domain and class;
    - `domainbed` is DomainBed's (arXiv 2007.01434): every domain is shuffled and cut into 20 and 80 % image for image
      as DomainBed does it for the trial `seed`, trained on the 80 % of the sources, validated on their 20 %, tested on
      the 80 % of `unseen`; its 20 % are the part `oracle`;
    - `iid_pooled` pools the domains and holds out 17 % for validation and 10 % for testing, which measures no domain
      generalisation;
    - `paper` is what arXiv 2504.04196 did, as far as its figures tell: Office-Home with Clipart unseen, PACS pooled
      with 1,725 images for validation and 987 for testing; only for these two, prepared;
    - `official`, for sets with an official test part (CIFAR-10, Tiny ImageNet): tested on that, validated on a
      hold-out of the training part; `within_train` uses the training part alone, 80/10/10 %, stratified by class.

    `without` makes a fold of leave-one-domain-out cross-validation inside `domainbed`: that source domain is left out
    of training too, and the run is validated on what DomainBed looks at of it and tested on what DomainBed holds out.

    `val_fraction` is the share held out in `leave_one_out` and `domainbed` (None: 0.2) and in `official` (None: 0.1).
    `seed` chooses the hold-out. `image_size` in pixels, `mean` and `std` per channel (of values in 0..1): None is the
    data set's own. `augment` says whether training images are augmented; `verify` decodes every image file before use,
    and compares it with its checksum where there is a manifest. `cache` keeps all images decoded in memory, resized
    once (3 x `image_size` squared bytes each). `domain_column` names the domain in a Hugging Face data set.
    """

    unseen: str | None = None
    split: SplitName = "leave_one_out"
    seed: int = 0
    val_fraction: float | None = None
    image_size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    augment: bool = True
    verify: bool = False
    cache: bool = False
    domain_column: str = "domain"
    without: str | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` for values that no data set could use."""
        if self.split not in get_args(SplitName):
            raise unknown_name("split", str(self.split), get_args(SplitName))
        if self.split in ("iid_pooled", "official", "within_train") and self.unseen is not None:
            raise InputError(
                f"split {self.split!r} has no unseen domain, but unseen={self.unseen!r} was given; drop one"
            )
        if self.without is not None and (self.split != "domainbed" or self.unseen is None):
            raise InputError("cross-validation over domains is DomainBed's: it needs split='domainbed' and unseen")
        if self.without is not None and self.without == self.unseen:
            raise InputError(f"{self.unseen!r} is the unseen domain; without must name one that is trained on")
        if self.seed < 0:
            raise InputError(f"seed must not be negative, found {self.seed}")
        if self.val_fraction is not None and not 0.0 < self.val_fraction < 1.0:
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
class Collection:
    """All images of a data set before it is split; `official` says that its domains are official parts (train, test).

    `hashes` are the SHA-256 of the image files, in the order of `images`, where they are known (from a manifest).
    `default_unseen` is the domain to leave out if none is named.
    """

    name: str
    images: LabelledImages
    classes: tuple[str, ...]
    default_unseen: str | None = None
    official: bool = False
    hashes: tuple[str, ...] | None = None

    @property
    def checksum(self) -> str:
        """The SHA-256 of the ids, sorted, each with the hash of its file where that is known."""
        return content_checksum(dict(zip(self.images.ids, self.hashes or [""] * len(self.images), strict=True)))


def content_checksum(hashes: dict[str, str]) -> str:
    """Returns the SHA-256 over ids and the hashes of their files, whatever their order."""
    digest = hashlib.sha256()
    for key in sorted(hashes):
        digest.update(f"{key}\0{hashes[key]}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """Train, validation and test images, and what was done to tell them apart.

    `domains` are the sources, which train and val come from; `unseen` is the domain that test consists of, or None
    where there is none. `protocol` and `selection` are the labels to print beside any accuracy measured on this split.

    `oracle` is a part of the unseen domain that is neither trained nor tested on, for selection by an oracle only
    (label `ORACLE`); DomainBed's oracle compares the last checkpoints of runs on it, never epochs of one run. Nothing
    in this package reads it unasked. `duplicates` lists images with the same content that lie in different parts.
    `data`, `checksum` and `seed` say what was split.

    Raises `DataError` if an image of the unseen domain is in train or val.
    """

    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    unseen: str | None
    protocol: str
    selection: str = TRAINING_DOMAIN
    oracle: LabelledImages | None = None
    duplicates: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    data: str = ""
    checksum: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        """Holds every split, however it was made, to what domain generalisation means."""
        for name, part in (("train", self.train), ("val", self.val)):
            if self.unseen is not None and self.unseen in part.domains:
                found = part.ids[part.domains.index(self.unseen)]
                raise DataError(f"the {name} part holds {found}, an image of the unseen domain {self.unseen!r}")

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
        twice = f"; {len(self.duplicates)} images are in more than one part" if self.duplicates else ""
        sources = f"sources {', '.join(self.domains)}{unseen}"
        return f"{counts} of {self.num_classes} classes; {self.protocol}; {self.selection}; {sources}{twice}"


Indices = NDArray[np.int64]


def split_collection(collection: Collection, config: DataConfig) -> Split:
    """Returns a collection split as `config` asks.

    Raises `InputError` if the unseen domain is not named or not known, or the collection is not of the kind that the
    split is for, `DataError` if a part would be empty.
    """
    if config.split == "paper":
        return _as_in_the_paper(collection, config)
    if collection.official != (config.split in ("official", "within_train")):
        has, fitting = ("official parts", "official") if collection.official else ("domains", "leave_one_out")
        raise InputError(f"{collection.name} has {has}: split {config.split!r} is not for it, {fitting!r} is")
    images = collection.images
    if config.split == "official":
        return _parts(collection, config, _official(images, config), None, OFFICIAL)
    if config.split == "within_train":
        return _parts(collection, config, _within_train(images, config.seed), None, WITHIN_TRAIN)
    if config.split == "iid_pooled":
        return _parts(collection, config, _pooled(images, config.seed, (0.17, 0.10)), None, IID_POOLED)
    unseen = _unseen(collection, config)
    if config.split == "domainbed":
        whole = _parts(collection, config, _domainbed(images, unseen, config), unseen, DOMAINBED)
        return whole if config.without is None else _fold(whole, config.without, config)
    return _parts(collection, config, _left_out(images, unseen, config), unseen, LEAVE_ONE_OUT)


def _as_in_the_paper(collection: Collection, config: DataConfig) -> Split:
    """Returns the split of arXiv 2504.04196 for PACS or Office-Home."""
    images, seed, unseen = collection.images, config.seed, {"pacs": None, "office_home": "Clipart"}
    if collection.name not in unseen:
        raise InputError(
            "split 'paper' is for pacs and office_home as `secateur data prepare` writes them, not for "
            f"{collection.name}; choose another split"
        )
    left_out = unseen[collection.name]
    if config.unseen not in (None, left_out):
        raise InputError(
            f"split 'paper' leaves out {left_out or 'no domain'} of {collection.name}, but unseen={config.unseen!r} "
            "was given; drop one"
        )
    if left_out is None:
        return _parts(collection, config, _pooled(images, seed, (1725 / 9991, 987 / 9991)), None, IID_POOLED + PAPER)
    return _parts(collection, config, _left_out(images, left_out, config), left_out, LEAVE_ONE_OUT + PAPER)


def _parts(
    collection: Collection, config: DataConfig, parts: dict[str, Indices], unseen: str | None, protocol: str
) -> Split:
    """Returns the split with the images of `collection` at the indices in `parts`."""
    for name, part in parts.items():
        if part.size == 0:
            total = len(collection.images)
            raise DataError(f"the {name} part would be empty: {total} images are too few for {protocol}")
    images = collection.images
    sources = tuple(sorted({images.domains[i] for i in parts["train"]} | {images.domains[i] for i in parts["val"]}))
    return Split(
        train=images.take(parts["train"], augmented=config.augment),
        val=images.take(parts["val"]),
        test=images.take(parts["test"]),
        classes=collection.classes,
        domains=sources,
        unseen=unseen,
        protocol=protocol,
        oracle=images.take(parts["oracle"]) if "oracle" in parts else None,
        duplicates=_shared(collection, parts),
        data=collection.name,
        checksum=collection.checksum,
        seed=config.seed,
    )


def _fold(whole: Split, domain: str, config: DataConfig) -> Split:
    """Returns a split with the training images of all sources but `domain`, validated on that one."""
    if domain not in whole.domains:
        raise unknown_name("source domain", domain, whole.domains)
    if len(whole.domains) < 2:
        raise InputError(f"cross-validation needs two source domains or more, found {domain}")
    inside = np.array([its == domain for its in whole.train.domains])
    outside = np.array([its == domain for its in whole.val.domains])
    return replace(
        whole,
        train=whole.train.take(np.flatnonzero(~inside), augmented=config.augment),
        val=whole.train.take(np.flatnonzero(inside)),
        test=whole.val.take(np.flatnonzero(outside)),
        domains=tuple(its for its in whole.domains if its != domain),
        unseen=None,
        protocol=f"{whole.protocol}; inside the sources, without {domain} and {whole.unseen}",
        selection=CROSS_VALIDATION,
        oracle=None,
        duplicates=(),
    )


def _unseen(collection: Collection, config: DataConfig) -> str:
    domains = sorted(set(collection.images.domains))
    unseen = config.unseen or collection.default_unseen
    if unseen is None:
        raise InputError(f"name the domain to leave out: unseen must be one of {', '.join(domains)}")
    if unseen not in domains:
        raise unknown_name("domain", unseen, domains)
    return unseen


def _cells(images: LabelledImages) -> NDArray[np.str_]:
    """Returns the cell, domain and class, of every image."""
    return np.array([f"{d}/{c:06d}" for d, c in zip(images.domains, images.labels.tolist(), strict=True)])


def _left_out(images: LabelledImages, unseen: str, config: DataConfig) -> dict[str, Indices]:
    is_unseen = np.array([d == unseen for d in images.domains])
    train, val = hold_out(np.flatnonzero(~is_unseen), _cells(images), config.val_fraction or 0.2, config.seed)
    return {"train": train, "val": val, "test": np.flatnonzero(is_unseen)}


def _pooled(images: LabelledImages, seed: int, shares: tuple[float, float]) -> dict[str, Indices]:
    """Returns train, val and test stratified by domain and class; `shares` are those of val and test in all images."""
    cells = _cells(images)
    rest, test = hold_out(np.arange(len(images)), cells, shares[1], seed)
    train, val = hold_out(rest, cells, shares[0] / (1.0 - shares[1]), seed)
    return {"train": train, "val": val, "test": test}


def _official(images: LabelledImages, config: DataConfig) -> dict[str, Indices]:
    is_train = np.array([d == "train" for d in images.domains])
    train, val = hold_out(np.flatnonzero(is_train), _cells(images), config.val_fraction or 0.1, config.seed)
    return {"train": train, "val": val, "test": np.flatnonzero(~is_train)}


def _within_train(images: LabelledImages, seed: int) -> dict[str, Indices]:
    cells = _cells(images)
    given = np.flatnonzero([d == "train" for d in images.domains])
    rest, test = hold_out(given, cells, 0.1, seed)
    train, val = hold_out(rest, cells, 0.1 / 0.9, seed)
    return {"train": train, "val": val, "test": test}


def _domainbed(images: LabelledImages, unseen: str, config: DataConfig) -> dict[str, Indices]:
    """Returns DomainBed's parts, image for image the same for folders with the same file names.

    Domains are numbered and images ordered by name. The permutation of domain d in trial t comes from numpy's legacy
    generator seeded with MD5("(t, d)") mod 2^31; its first int(n * 0.2) images are the hold-out.
    """
    share = config.val_fraction or 0.2
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": [], "oracle": []}
    for number, domain in enumerate(sorted(set(images.domains))):
        order = [i for i, its in enumerate(images.domains) if its == domain]
        seed = int(hashlib.md5(str((config.seed, number)).encode()).hexdigest(), 16) % 2**31
        keys = list(range(len(order)))
        np.random.RandomState(seed).shuffle(keys)
        held = int(len(order) * share)
        inside, outside = ("test", "oracle") if domain == unseen else ("train", "val")
        parts[outside] += [order[k] for k in keys[:held]]
        parts[inside] += [order[k] for k in keys[held:]]
    return {name: np.sort(np.array(part, dtype=np.int64)) for name, part in parts.items()}


def _shared(collection: Collection, parts: dict[str, Indices]) -> tuple[tuple[str, ...], ...]:
    """Returns the ids of images with equal content that lie in different parts, as far as hashes are known."""
    if collection.hashes is None:
        return ()
    found: dict[str, list[tuple[str, str]]] = {}
    for name, part in parts.items():
        for i in part:
            found.setdefault(collection.hashes[i], []).append((name, collection.images.ids[i]))
    groups = (group for group in found.values() if len({name for name, _ in group}) > 1)
    return tuple(sorted(tuple(sorted(i for _, i in group)) for group in groups))


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
