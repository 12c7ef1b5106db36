"""How the originals of the benchmarks are laid out: from the files of a download to domain, class and name."""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateur.data.folder import is_image
from secateur.data.raw import RawFiles

DUPLICATES_LIST = "domain_net_duplicates.txt"

Aliases = Mapping[str, tuple[str, ...]]
"""The name of each domain, and the other names that its folder has in some downloads."""


@dataclass(frozen=True)
class Item:
    """One image to be: its id (`domain/class/name`), the file that it is in, and its row if that holds many."""

    id: str
    member: str
    row: int | None = None


@dataclass
class Listing:
    """The images of a download; `bad` are complaints about single files, `removed` counts listed duplicates."""

    items: list[Item] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    removed: int = 0


Reader = Callable[[RawFiles, Aliases], Listing]


# --- one folder per domain, in it one per class -----------------------------------------------------------------


def domain_class(raw: RawFiles, aliases: Aliases) -> Listing:
    """Returns the images in `…/domain/class/file`, wherever in the download these folders are."""
    listing = Listing()
    for domain, prefix in located(raw, aliases).items():
        for path, parts in _below(raw, prefix):
            if len(parts) == 2 and is_image(path):
                listing.items.append(Item(f"{domain}/{parts[0]}/{parts[1]}", path))
            elif len(parts) >= 2 or is_image(path):
                expected = "an image" if len(parts) == 2 else "domain/class/image"
                listing.bad.append(f"{path}: expected {expected}")
    return listing


VLCS_CLASSES = ("bird", "car", "chair", "dog", "person")
_VLCS_PARTS = ("train", "crossval", "test", "full")


def vlcs(raw: RawFiles, aliases: Aliases) -> Listing:
    """Returns the images of VLCS in either of its layouts.

    One is `VLCS/Caltech101/bird/file`; the other `VLCS/CALTECH/train/0/file`, where `train`, `crossval` and `test`
    make up the domain (`full`, the same again, counts only where they are missing) and classes are numbers. Names in
    the latter are those of the part and the file, since parts may use one name twice.
    """
    listing = Listing()
    plain = domain_class(raw, {name: aliases[name] for name in aliases})
    numbered = {domain: prefix for domain, prefix in located(raw, aliases).items() if _has_parts(raw, prefix)}
    listing.items = [item for item in plain.items if item.id.split("/", 1)[0] not in numbered]
    listing.bad = [bad for bad in plain.bad if not any(bad.startswith(f"{prefix}/") for prefix in numbered.values())]
    for domain, prefix in numbered.items():
        found = _below(raw, prefix)
        there = {parts[0] for _, parts in found} & set(_VLCS_PARTS)
        taken = there - {"full"} or there
        for path, parts in found:
            if parts[0] not in taken:
                continue
            known = len(parts) == 3 and parts[1].isdigit() and int(parts[1]) < len(VLCS_CLASSES)
            if known and is_image(path):
                listing.items.append(Item(f"{domain}/{VLCS_CLASSES[int(parts[1])]}/{parts[0]}-{parts[2]}", path))
            else:
                listing.bad.append(f"{path}: expected domain/part/class/image with class 0 … {len(VLCS_CLASSES) - 1}")
    return listing


def _has_parts(raw: RawFiles, prefix: str) -> bool:
    return any(parts[0] in _VLCS_PARTS and len(parts) == 3 for _, parts in _below(raw, prefix))


def domainnet(raw: RawFiles, aliases: Aliases) -> Listing:
    """Returns the images of DomainNet without those on its list of duplicates.

    The lists `clipart_train.txt`, `clipart_test.txt` and so on, where present, name files that have to be there; they
    split no domain for domain generalisation.
    """
    listing = domain_class(raw, aliases)
    there = {item.id for item in listing.items}
    for domain in aliases:
        for part in ("train", "test"):
            for path in raw.named(f"{domain}_{part}.txt"):
                named = (line.rsplit(" ", 1)[0].strip() for line in raw.read(path).decode().splitlines())
                listing.bad += [
                    f"{name}: listed in {path}, but missing" for name in named if name and name not in there
                ]
    lists = raw.named(DUPLICATES_LIST)
    if not lists:
        listing.bad.append(
            f"{DUPLICATES_LIST}: missing; put the list of 9,431 duplicates that DomainBed published into the source"
        )
    for path in lists:
        twice = {line.strip() for line in raw.read(path).decode().splitlines()}
        kept = [item for item in listing.items if item.id not in twice]
        listing.removed += len(listing.items) - len(kept)
        listing.items = kept
    return listing


# --- TerraIncognita: camera traps with annotation files -----------------------------------------------------------

TERRA_CLASSES = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")
_CCT20 = "_annotations.json"


def terra(raw: RawFiles, aliases: Aliases) -> Listing:
    """Returns the images of TerraIncognita, from its annotation files or already laid out as domains and classes.

    Annotation files are JSON in the manner of COCO: `images` with a location (number or text), `categories`, and one
    annotation for each box. Those of the ECCV 2018 benchmark (`…_annotations.json`) go before others. An image with
    boxes of two classes is an image of both, as DomainBed has it; boxes of one class count once. Whole images are
    taken, not crops; other locations and classes are passed over.
    """
    arranged = domain_class(raw, aliases)
    if arranged.items:
        return arranged
    listing = Listing()
    paths = [path for path in raw.members if path.endswith(".json")]
    paths = [path for path in paths if path.endswith(_CCT20)] or paths
    files = {PurePosixPath(path).name: path for path in raw.members if is_image(path)}
    locations = {domain.removeprefix("location_"): domain for domain in aliases}
    wanted: dict[tuple[str, str, str], str] = {}
    for path in paths:
        try:
            wanted.update(dict.fromkeys(_annotated(json.loads(raw.read(path)), locations), path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            listing.bad.append(f"{path}: not annotations in the manner of COCO ({type(error).__name__}: {error})")
    for (domain, label, name), path in sorted(wanted.items()):
        if name in files:
            listing.items.append(Item(f"{domain}/{label}/{name}", files[name]))
        else:
            listing.bad.append(f"{name}: annotated in {path}, but missing")
    return listing


def _annotated(content: Any, locations: Mapping[str, str]) -> set[tuple[str, str, str]]:
    """Returns domain, class and file name of all that one annotation file says of the known locations."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    places = {image["id"]: image for image in content["images"] if str(image["location"]) in locations}
    found: set[tuple[str, str, str]] = set()
    for annotation in content["annotations"]:
        image, label = places.get(annotation["image_id"]), names[annotation["category_id"]]
        if image is not None and label in TERRA_CLASSES:
            found.add((locations[str(image["location"])], label, PurePosixPath(image["file_name"]).name))
    return found


# --- CIFAR-10: images as rows of pickled arrays -------------------------------------------------------------------

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_BATCHES = {**{f"data_batch_{i}": "train" for i in range(1, 6)}, "test_batch": "test"}


def cifar10(raw: RawFiles, aliases: Aliases) -> Listing:
    """Returns the images of CIFAR-10 in its version for Python; names are those of the batch and the row."""
    listing = Listing()
    for name, part in _CIFAR_BATCHES.items():
        paths = raw.named(name)
        if not paths:
            listing.bad.append(f"{name}: missing")
            continue
        try:
            _, labels = cifar_batch(raw.read(paths[0]))
        except ValueError as error:
            listing.bad.append(f"{paths[0]}: {error}")
            continue
        for row, label in enumerate(labels):
            listing.items.append(Item(f"{part}/{CIFAR_CLASSES[label]}/{name}-{row:05d}.png", paths[0], row))
    return listing


def cifar_batch(content: bytes) -> tuple[NDArray[np.uint8], list[int]]:
    """Returns images (N x 32 x 32 x 3) and labels in the bytes of one of CIFAR-10's batches.

    They are pickles, which could run any code: only what makes up numpy arrays is let in. Raises `ValueError` for
    anything else.
    """
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), [int(label) for label in batch[b"labels"]]
    except Exception as error:
        # An unpickler fed with arbitrary bytes fails in arbitrary ways.
        raise ValueError(f"not a batch of CIFAR-10 ({type(error).__name__}: {error})") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
        raise ValueError(f"expected {len(labels)} x 3072 bytes of pixels, found {pixels.dtype} {pixels.shape}")
    if labels and not 0 <= min(labels) <= max(labels) < len(CIFAR_CLASSES):
        raise ValueError(f"labels must lie in 0 … 9, found {min(labels)} … {max(labels)}")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of plain values and numpy arrays, and nothing that could run code."""

    _MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")

    def find_class(self, module: str, name: str) -> Any:
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module in self._MODULES and name == "_reconstruct":
            return np.empty(0, np.uint8).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place in a batch of images")


# --- Tiny ImageNet ------------------------------------------------------------------------------------------------


def tiny_imagenet(raw: RawFiles, aliases: Aliases) -> Listing:
    """Returns the labelled images of Tiny ImageNet: `train/CLASS/images/file`, and `val/images/file` by its list.

    The images of `test` have no labels and are passed over.
    """
    listing = Listing()
    located_parts = located(raw, aliases)
    for path, parts in _below(raw, located_parts["train"]) if "train" in located_parts else []:
        if len(parts) == 3 and parts[1] == "images" and is_image(path):
            listing.items.append(Item(f"train/{parts[0]}/{parts[2]}", path))
        elif len(parts) != 2 or parts[1] != f"{parts[0]}_boxes.txt":
            listing.bad.append(f"{path}: expected train/CLASS/images/image")
    if "val" not in located_parts:
        return listing
    prefix = located_parts["val"]
    notes = f"{prefix}/val_annotations.txt"
    if notes not in raw.members:
        listing.bad.append(f"{notes}: missing; it says which class each image in val/images is of")
        return listing
    labels = dict(line.split("\t")[:2] for line in raw.read(notes).decode().splitlines() if "\t" in line)
    for name, label in labels.items():
        path = f"{prefix}/images/{name}"
        if path in raw.members:
            listing.items.append(Item(f"val/{label}/{name}", path))
        else:
            listing.bad.append(f"{path}: listed in {notes}, but missing")
    unlabelled = {path for path, parts in _below(raw, prefix) if parts[0] == "images" and parts[-1] not in labels}
    listing.bad += [f"{path}: not listed in {notes}" for path in sorted(unlabelled)]
    return listing


# --- finding folders ----------------------------------------------------------------------------------------------


def located(raw: RawFiles, aliases: Aliases) -> dict[str, str]:
    """Returns the path of the folder of each domain that the download holds.

    Folders that lie side by side are preferred; names are compared without regard to case, spaces and signs. A folder
    that only holds one of the same name, as unpacking programs like to make, stands for that one.
    """
    known = {_plain(name): domain for domain, names in aliases.items() for name in (domain, *names)}
    children: dict[str, Counter[str]] = defaultdict(Counter)
    for path in raw.members:
        folders = ("", *(parent.as_posix() for parent in reversed(PurePosixPath(path).parents[:-1])))
        for parent, child in pairwise(folders):
            children[parent][child] += 1
    sets: dict[str, dict[str, str]] = {}
    for parent, found in children.items():
        domains = {known[key]: child for child in found if (key := _plain(child.rsplit("/", 1)[-1])) in known}
        if domains:
            sets[parent] = domains
    best: dict[str, str] = {}
    for parent in sorted(sets, key=lambda p: (-len(sets[p]), p.count("/") + bool(p), p)):
        for domain, path in sets[parent].items():
            best.setdefault(domain, path)
    return {domain: _innermost(children, path) for domain, path in sorted(best.items())}


def _innermost(children: Mapping[str, Counter[str]], path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    while (inside := children.get(path)) and list(inside) == [f"{path}/{name}"]:
        path = f"{path}/{name}"
    return path


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _below(raw: RawFiles, prefix: str) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the files below a folder, each with the parts of its path from there."""
    start = f"{prefix}/"
    return [(path, tuple(path[len(start) :].split("/"))) for path in raw.members if path.startswith(start)]
