"""Data sets of the Hugging Face library `datasets` with a column that names the domain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.data.folder import undecodable
from secateur.data.pictures import RowPictures, cached
from secateur.data.protocol import Collection, DataConfig
from secateur.errors import DataError, InputError, unknown_name

if TYPE_CHECKING:
    from PIL.Image import Image

PREFIX = "hf:"
_SAVED = ("dataset_info.json", "dataset_dict.json")


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the library `datasets`."""
    return any((path / name).is_file() for name in _SAVED)


def collect_hub(name: str, config: DataConfig) -> Collection:
    """Returns all images of the data set `hf:NAME` on the hub (or in the local cache), or saved in a folder.

    The domain is what `config.domain_column` holds: text, or a class label. The image is the only column of images, the
    label the column `label`, or the only other class label. Parts of the data set (train, test …) are put together,
    since the domain is what splits it. Ids are `domain/class/number`, counted through all rows.

    Raises `InputError` for columns that are missing or ambiguous, `DataError` if the data set cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("Hugging Face data sets need the library: pip install 'secateur[hub]'") from error
    try:
        opened: Any = (
            datasets.load_dataset(name.removeprefix(PREFIX))
            if name.startswith(PREFIX)
            else datasets.load_from_disk(name)
        )
    except Exception as error:
        # The library lets through whatever its file formats, the network and the hub raise.
        raise DataError(f"cannot open the data set {name}: {type(error).__name__}: {error}") from error
    if isinstance(opened, dict):
        opened = datasets.concatenate_datasets([opened[part] for part in sorted(opened)])
    image, label = _columns(name, opened.features, config.domain_column)
    domains, labels = (_texts(opened, column) for column in (config.domain_column, label))
    for what, texts in (("domain", domains), ("label", labels)):
        if odd := sorted({text for text in texts if not text or "/" in text}):
            raise DataError(f"{name}: the {what} of some images is {odd[0]!r}; expected a name without a slash")
    classes = tuple(sorted(set(labels)))
    if config.unseen is not None and config.unseen not in domains:
        raise unknown_name("domain", config.unseen, set(domains))
    number = {text: i for i, text in enumerate(classes)}
    numbers = torch.tensor([number[text] for text in labels], dtype=torch.int64)
    ids = [f"{d}/{c}/{i:08d}" for i, (d, c) in enumerate(zip(domains, labels, strict=True))]
    images = HubImages(opened.select_columns([image]), torch.arange(len(ids)), ids, numbers, config)
    return Collection(name, cached(images) if config.cache else images, classes)


class HubImages(RowPictures):
    """Images of a Hugging Face data set with one column, decoded when asked for."""

    def picture(self, index: int) -> Image:
        try:
            (image,) = self.source[int(self.rows[index])].values()
            return image.convert("RGB")
        except undecodable() as error:
            raise DataError(f"cannot read image {self.ids[index]}: {error}") from error


def _columns(name: str, features: Any, domain: str) -> tuple[str, str]:
    """Returns the columns of images and of labels."""
    import datasets

    if domain not in features:
        listed = ", ".join(features)
        raise InputError(f"{name} has no column {domain!r} for the domain; set domain_column to one of {listed}")
    images = [c for c, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [c for c, feature in features.items() if isinstance(feature, datasets.ClassLabel) and c != domain]
    if "label" in features and domain != "label":
        labels = ["label"]
    for what, found in (("images", images), ("labels", labels)):
        if len(found) != 1:
            raise InputError(f"{name} must have one column of {what}, found {', '.join(found) or 'none'}")
    return images[0], labels[0]


def _texts(dataset: Any, column: str) -> list[str]:
    """Returns a column as text: the names of class labels, or its values."""
    feature, values = dataset.features[column], dataset[column]
    name = feature.int2str if hasattr(feature, "int2str") else str
    return ["" if value is None else name(value) for value in values]
