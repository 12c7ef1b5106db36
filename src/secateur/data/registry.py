"""The data sets that are known by name, and the one function that opens any of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from secateur.data.digits import collect_digits
from secateur.data.folder import collect_folder
from secateur.data.hub import PREFIX, collect_hub, is_saved_dataset
from secateur.data.protocol import Collection, DataConfig, Split, split_collection
from secateur.data.stored import read_split
from secateur.errors import DataError, InputError, unknown_name

DATASETS: dict[str, Callable[[DataConfig], Collection]] = {"digits-dg": collect_digits}
"""Data sets that come with the package, by name."""


def collect(name_or_path: str | Path, config: DataConfig) -> Collection:
    """Returns all images of a data set before they are split; see `load_split` for names and errors."""
    name = str(name_or_path)
    if name in DATASETS and not isinstance(name_or_path, Path):
        return DATASETS[name](config)
    if name.startswith(PREFIX) or is_saved_dataset(Path(name)):
        return collect_hub(name, config)
    if Path(name).is_dir():
        return collect_folder(name, config)
    if isinstance(name_or_path, Path) or os.sep in name:
        raise DataError(f"no data set at {name}: expected a folder holding one folder per domain")
    raise unknown_name("data set (and no folder)", name, DATASETS)


def load_split(
    name_or_path: str | Path, config: DataConfig | None = None, *, stored: str | Path | None = None
) -> Split:
    """Returns a data set as one `Split`.

    It is named by its name in `DATASETS`, by a folder `root/domain/class/*.jpg` (prepared or not), by `hf:NAME` on the
    Hugging Face hub, or by a folder that `datasets` saved. A name goes before a folder of the same name: write
    `./digits-dg` for the folder. `stored` is a file that `save_split` wrote: its parts are taken then, and `config`
    only says how images are presented.

    Raises `InputError` for an unknown name, `DataError` for a path at which there is no folder, and what the data set
    itself raises.
    """
    config = config or DataConfig()
    if stored is not None:
        return read_split(Path(stored), collect(name_or_path, config), config)
    return split_collection(collect(name_or_path, config), config)


def cross_validation(name_or_path: str | Path, config: DataConfig) -> dict[str, Split]:
    """Returns, for each source domain v, the split of a run trained without v and without `config.unseen`.

    This is DomainBed's leave-one-domain-out cross-validation: hyper-parameters are scored by the mean over v of the
    accuracy on v, and the run to report is the one trained without `unseen` alone (`load_split`). `val` is the 80 % of
    v that DomainBed looks at, `test` the 20 % that it holds out; nothing of `unseen` is in any of them. Labelled
    `CROSS_VALIDATION`.

    Raises `InputError` unless `config.split` is `domainbed`, or with fewer than two source domains.
    """
    if config.split != "domainbed" or config.unseen is None:
        raise InputError("cross-validation over domains is DomainBed's: it needs split='domainbed' and unseen")
    collection = collect(name_or_path, config)
    domains = split_collection(collection, config).domains
    return {domain: split_collection(collection, replace(config, without=domain)) for domain in domains}
