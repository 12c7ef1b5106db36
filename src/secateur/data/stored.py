"""Splits as files, and the splits inside a split that cross-validation over domains needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from secateur.data.protocol import CROSS_VALIDATION, Collection, DataConfig, Split, split_collection
from secateur.errors import DataError, InputError
from secateur.files import write_text

_FORMAT = 1
_FIELDS = ("data", "checksum", "protocol", "selection", "unseen", "seed", "classes", "domains", "duplicates")


def save_split(split: Split, path: str | Path) -> None:
    """Writes a split as JSON: the id (path) of every image by part, the labels, and the checksum of the data set.

    The checksum is that of the manifest of a prepared data set (ids and contents), else that of the ids.
    """
    parts = {**split.ids, **({"oracle": split.oracle.ids} if split.oracle is not None else {})}
    content = {"format": _FORMAT, **{name: getattr(split, name) for name in _FIELDS}, "parts": parts}
    write_text(Path(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_split(path: Path, collection: Collection, config: DataConfig) -> Split:
    """Returns the split that `save_split` wrote, of images in `collection`, augmented if `config.augment`.

    Raises `DataError` if the file is corrupt, of another version, or of other data than `collection`, or if its parts
    overlap or hold images of the unseen domain that they must not.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != _FORMAT:
            raise DataError(f"{path} has format {content['format']}, this version of secateur reads {_FORMAT}")
        fields = {name: content[name] for name in _FIELDS}
        parts: dict[str, list[str]] = content["parts"]
        listed = [i for part in ("train", "val", "test") for i in parts[part]] + parts.get("oracle", [])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is missing, corrupt or no split of secateur: {type(error).__name__}: {error}"
        ) from error
    if fields["checksum"] != collection.checksum:
        raise DataError(
            f"{path} splits {fields['data']} with checksum {fields['checksum'][:12]}…, but {collection.name} here has "
            f"{collection.checksum[:12]}…: other images; split it anew"
        )
    if len(set(listed)) != len(listed):
        raise DataError(f"{path} is corrupt: an image is in more than one part")
    rows = {key: row for row, key in enumerate(collection.images.ids)}
    if unknown := [i for i in listed if i not in rows]:
        raise DataError(f"{path} is corrupt: {unknown[0]} is no image of {collection.name}")
    images = {
        name: collection.images.take([rows[i] for i in ids], augmented=config.augment and name == "train")
        for name, ids in parts.items()
    }
    for name in ("classes", "domains"):
        fields[name] = tuple(fields[name])
    fields["duplicates"] = tuple(map(tuple, fields["duplicates"]))
    return Split(**images, **fields)


def inner_splits(collection: Collection, config: DataConfig) -> dict[str, Split]:
    """Returns the splits of leave-one-domain-out cross-validation; see `cross_validation`."""
    if config.split != "domainbed" or config.unseen is None:
        raise InputError("cross-validation over domains is DomainBed's: it needs split='domainbed' and unseen")
    whole = split_collection(collection, config)
    if len(whole.domains) < 2:
        raise InputError(f"cross-validation needs two source domains or more, found {', '.join(whole.domains)}")
    return {domain: _without(whole, domain, config) for domain in whole.domains}


def _without(whole: Split, domain: str, config: DataConfig) -> Split:
    """Returns a split with the training images of all sources but `domain`, validated on that one."""
    inside = np.array([its == domain for its in whole.train.domains])
    outside = np.array([its == domain for its in whole.val.domains])
    return replace(
        whole,
        train=whole.train.take(np.flatnonzero(~inside), augmented=config.augment),
        val=whole.train.take(np.flatnonzero(inside)),
        test=whole.val.take(np.flatnonzero(outside)),
        domains=_others(whole.domains, domain),
        unseen=None,
        protocol=f"{whole.protocol}; inside the sources, without {domain} and {whole.unseen}",
        selection=CROSS_VALIDATION,
        oracle=None,
        duplicates=(),
    )


def _others(domains: Sequence[str], domain: str) -> tuple[str, ...]:
    return tuple(its for its in domains if its != domain)
