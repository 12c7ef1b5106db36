"""One run as a record, and the append-only file of records that a study leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from secateur.errors import DataError

Status = Literal["ok", "failed"]
_DERIVED = ("delta_acc", "macs_ratio", "latency_ratio")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model, pruned one way (or not at all) and fine-tuned, with what that cost and what it gained.

    `criterion` is None for the dense baseline. Accuracies are in percent: `val_acc` on held-out images of the domains
    that were trained on, `test_acc` on the domain that never was (on pooled domains under an i.i.d. protocol).
    `macs` are multiply-accumulates per image; `latency` and `dense_latency` are seconds per batch, timed in turns.
    A failed run says why in `error`, and has None for what it did not reach.
    """

    model: str
    criterion: str | None
    ratio: float
    scope: str
    seed: int
    data: str
    unseen: str | None
    protocol: str
    status: Status = "ok"
    error: str | None = None
    params: int | None = None
    macs: int | None = None
    dense_params: int | None = None
    dense_macs: int | None = None
    val_acc: float | None = None
    test_acc: float | None = None
    dense_test_acc: float | None = None
    latency: float | None = None
    dense_latency: float | None = None
    finetune_seconds: float | None = None
    config_hash: str = ""
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ""
    created: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether this is the baseline that nothing was removed from."""
        return self.criterion is None

    @property
    def delta_acc(self) -> float | None:
        """Test accuracy minus that of the dense model fine-tuned the same way, in percentage points."""
        return None if self.test_acc is None or self.dense_test_acc is None else self.test_acc - self.dense_test_acc

    @property
    def macs_ratio(self) -> float | None:
        """Dense over remaining multiply-accumulates: counted, not timed."""
        return _over(self.dense_macs, self.macs)

    @property
    def latency_ratio(self) -> float | None:
        """Dense over remaining seconds per batch: timed on `hardware`, not counted."""
        return _over(self.dense_latency, self.latency)

    def to_record(self) -> dict[str, Any]:
        """Returns the run as plain JSON values, with the derived quantities written out for other readers."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return record | {"versions": dict(self.versions)} | {name: getattr(self, name) for name in _DERIVED}

    @classmethod
    def from_record(cls, record: Any) -> Self:
        """Returns the run that `to_record` wrote.

        Raises:
            DataError: A field is missing or unknown, or has a value of the wrong type.
        """
        if not isinstance(record, dict):
            raise DataError(f"expected an object with the fields of a run, found {type(record).__name__}")
        given = {name: value for name, value in record.items() if name not in _DERIVED}
        fields = {f.name: f for f in dataclasses.fields(cls)}
        required = {name for name, f in fields.items() if _is_required(f)}
        if missing := sorted(required - given.keys()):
            raise DataError(f"the run lacks {', '.join(missing)}")
        if unknown := sorted(given.keys() - fields.keys()):
            raise DataError(f"the run has unknown fields {', '.join(unknown)}")
        for name, value in given.items():
            _check_type(name, value, str(fields[name].type))
        return cls(**given)


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _over(dense: float | None, remaining: float | None) -> float | None:
    return None if dense is None or not remaining else dense / remaining


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "None": (type(None),),
    "Status": (str,),
    "Mapping[str, str]": (dict,),
}


def _check_type(name: str, value: Any, annotation: str) -> None:
    allowed = tuple(t for part in annotation.split(" | ") for t in _TYPES[part])
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise DataError(f"{name} should be {annotation}, found {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{name} should be finite, found {value!r}")
    if annotation == "Status" and value not in get_args(Status):
        raise DataError(f"status should be one of {', '.join(get_args(Status))}, found {value!r}")


def append_result(path: Path, result: Result) -> None:
    """Appends one run as one line and waits until it is on the disk.

    The line goes out in a single write on a file opened for appending, so that several processes may share the file
    and a crash leaves at most one broken line at its end.

    Raises:
        DataError: A number is NaN or infinite, or the file already ends in a broken line.
    """
    try:
        text = json.dumps(result.to_record(), allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise DataError(f"the run of {result.model} holds a number that is not finite: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                raise DataError(f"{path} ends in a line that was not written to its end; remove that line first")
        file.write(text.encode("utf-8") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_results(path: Path) -> tuple[Result, ...]:
    """Returns all runs in a file (or in `results.jsonl` in a folder), in the order in which they ended.

    Raises:
        DataError: There is no such file, it is empty, or a line is broken; the message names the line.
    """
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"no results at {file}: expected a results.jsonl or the folder that holds one")
    try:
        lines = file.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not a text file of results: {error}") from error
    results = tuple(_parse(file, number, line) for number, line in enumerate(lines, start=1) if line.strip())
    if not results:
        raise DataError(f"{file} holds no run")
    return results


def _parse(file: Path, number: int, line: str) -> Result:
    try:
        return Result.from_record(json.loads(line))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {number}: broken or cut short ({error}); remove the line to go on") from error
    except DataError as error:
        raise DataError(f"{file}, line {number}: {error}") from error


def successes(results: Iterable[Result]) -> tuple[Result, ...]:
    """Returns the runs that reached their end."""
    return tuple(result for result in results if result.status == "ok")
