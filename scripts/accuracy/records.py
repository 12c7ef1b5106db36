"""What one measurement is, and the file that keeps all of them: a measurement that stands there is not made again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """How a model is pruned: by which library, criterion and scope, with which compensation.

    `criterion` may name the way in which domains are combined, as in `taylor worst`. `compensation` is `none`, `mean`
    (biases take up the mean of what went: VBP's) or `full`; attention loses whole `heads` or `dims` of all heads.
    """

    library: str
    criterion: str
    scope: str
    compensation: str = "none"
    attention: str = "heads"

    @property
    def is_drawn(self) -> bool:
        """Whether anything in it depends on the seed: calibration images, or random scores."""
        return self.compensation != "none" or self.criterion not in ("dense", "l1", "l2", "lamp", "fpgm")

    def __str__(self) -> str:
        if self.library == "dense":
            return ""
        after = {"none": "", "mean": ", mean shift", "full": ", compensated"}[self.compensation]
        return f"{self.criterion}, {self.scope}, {self.attention}{after}"


@dataclass(frozen=True)
class Unit:
    """What is measured together: a base model, the domain that it has not seen, and a seed."""

    model: str
    unseen: str
    seed: int


@dataclass(frozen=True)
class Record:
    """Accuracies in percent on the source domains' validation part and on the unseen domain.

    `budget` is the fraction of MACs that may remain, `macs` and `params` the fractions that do. `tuned_*` are after the
    short fine-tuning, None before it. `error` says why a library did not get there.
    """

    unit: Unit
    setting: Setting
    budget: float
    macs: float | None = None
    params: float | None = None
    val: float | None = None
    test: float | None = None
    tuned_val: float | None = None
    tuned_test: float | None = None
    seconds: float | None = None
    error: str = ""

    @property
    def key(self) -> tuple[Unit, Setting, float]:
        return self.unit, self.setting, self.budget


def read(path: Path) -> list[Record]:
    """Returns all measurements of a file, the last one of each key."""
    found: dict[object, Record] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        record = Record(**{**row, "unit": Unit(**row["unit"]), "setting": Setting(**row["setting"])})
        found[record.key] = record
    return list(found.values())


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds measurements to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(r)) + "\n" for r in records)
