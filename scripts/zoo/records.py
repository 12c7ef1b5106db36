"""The machine-readable twin of the zoo's report: one line of JSON for each architecture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from secateur.files import write_text
from zoo.examine import Record


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes records, sorted by library, family and name."""
    ordered = sorted(records, key=lambda r: (r.library, r.family, r.name))
    write_text(path, "".join(json.dumps(asdict(r)) + "\n" for r in ordered))


def read_records(path: Path) -> list[Record]:
    """Returns the records of a file."""
    lines = path.read_text("utf-8").splitlines()
    return [Record(**{k: _as_tuple(v) for k, v in json.loads(line).items()}) for line in lines]


def _as_tuple(value: object) -> object:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
