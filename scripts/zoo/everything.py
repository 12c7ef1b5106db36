"""All entries of the zoo."""

from __future__ import annotations

from collections.abc import Iterator

import timm
import torch

from zoo.catalogue import Entry, timm_entry
from zoo.examine import Record, examine
from zoo.families import smallest_members
from zoo.torchvision_models import torchvision_architectures
from zoo.transformers_models import transformers_architectures


def all_entries() -> Iterator[Entry]:
    """Yields every architecture; of timm's, the smallest of each family is a deep one."""
    smallest = smallest_members()
    for family in timm.list_modules():
        for name in timm.list_models(module=family):
            yield timm_entry(name, family, deep=name == smallest[family])
    yield from transformers_architectures()
    yield from torchvision_architectures()


def find(library: str, name: str) -> Entry:
    """Returns the entry of that name."""
    return next(e for e in all_entries() if (e.library, e.name) == (library, name))


def examine_named(library_and_name: tuple[str, str]) -> Record:
    """Returns the record of one architecture, measured on one thread."""
    torch.set_num_threads(1)
    return examine(find(*library_and_name))
