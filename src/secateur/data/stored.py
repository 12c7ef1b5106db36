"""Splits as files."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.data.protocol import Collection, DataConfig, Split
from secateur.errors import DataError
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
