"""The data sets that are known by name, and the one function that opens any of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from secateur.data.digits import digits_dg
from secateur.data.folder import domain_folder
from secateur.data.protocol import DataConfig, Split
from secateur.errors import DataError, unknown_name

DATASETS: dict[str, Callable[[DataConfig], Split]] = {"digits-dg": digits_dg}
"""Data sets that come with the package, by name."""


def load_split(name_or_path: str | Path, config: DataConfig | None = None) -> Split:
    """Returns a data set by its name in `DATASETS`, or the folder `root/domain/class/*.jpg` at a path, as one `Split`.

    A name goes before a folder of the same name: write `./digits-dg` for the folder. Raises `InputError` for an
    unknown name, `DataError` for a path at which there is no folder, and what the data set itself raises.
    """
    config = config or DataConfig()
    name = str(name_or_path)
    if name in DATASETS and not isinstance(name_or_path, Path):
        return DATASETS[name](config)
    if Path(name).is_dir():
        return domain_folder(name, config)
    if isinstance(name_or_path, Path) or os.sep in name:
        raise DataError(f"no data set at {name}: expected a folder holding one folder per domain")
    raise unknown_name("data set (and no folder)", name, DATASETS)
