"""One run as a record, and the files that hold such records."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from secateur.errors import DataError
from secateur.files import write_text
from secateur.report.provenance import plain

Status = Literal["ok", "failed"]
_T = TypeVar("_T")
RESULTS, CONFIG, RECORD = "results.jsonl", "config.json", "record.jsonl"
"""Names of files: runs, one a line; in the folder of one run, its configuration and what became of it, line by line."""
RUN_FORMAT = 1
"""The version of the layout of a run folder, as its `config.json` names it."""
_DERIVED = ("delta_acc", "macs_ratio", "latency_ratio")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model, pruned one way (or not at all) and fine-tuned, with what that cost and what it gained.

    `criterion` is None for the dense baseline. Accuracies are in percent: `val_acc` on held-out images of the domains
    that were trained on, `test_acc` on the domain that never was (on pooled domains under an i.i.d. protocol).
    `macs` are multiply-accumulates per image; `latency` and `dense_latency` are seconds per batch, timed in turns.
    A failed run says why in `error`, and has None for what it did not reach.

    `without` is the source domain that a fold of cross-validation left out of training as well: both accuracies are
    then on that domain, and the run is for choosing among settings, not to be reported.

    `run` is the hash of the complete configuration `config`, and `command` reproduces the run. `domain_acc` has the
    accuracy in percent per domain: of the sources on their validation part, of the unseen one on all of it.
    `selection` says how the epoch was chosen. `widths` has an entry per group of channels: name, kind, family, and
    `before` and `after` as [fibres, width]. `curve` has one per epoch: epoch, loss, train_acc, val_acc (percent), lr.
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
    run: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    domain_acc: Mapping[str, float] = field(default_factory=dict)
    selection: str = ""
    widths: Sequence[Mapping[str, Any]] = ()
    curve: Sequence[Mapping[str, float]] = ()
    prune_seconds: float | None = None
    train_images_per_second: float | None = None
    without: str | None = None

    @property
    def is_dense(self) -> bool:
        """Whether this is the baseline that nothing was removed from."""
        return self.criterion is None

    @property
    def left_out(self) -> str:
        """The unseen domain and, in a fold of cross-validation, the other one that was not trained on, in words."""
        fold = f", without {self.without}" if self.without else ""
        return f"unseen {self.unseen}{fold}" if self.unseen else ""

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
        record = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return record | {name: getattr(self, name) for name in _DERIVED}

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
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in given.items()}
        return cls(**values)


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
    "Mapping[str, float]": (dict,),
    "Mapping[str, Any]": (dict,),
    "Sequence[Mapping[str, Any]]": (list,),
    "Sequence[Mapping[str, float]]": (list,),
}


def _check_type(name: str, value: Any, annotation: str) -> None:
    allowed = tuple(t for part in annotation.split(" | ") for t in _TYPES[part])
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise DataError(f"{name} should be {annotation}, found {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{name} should be finite, found {value!r}")
    if annotation == "Status" and value not in get_args(Status):
        raise DataError(f"status should be one of {', '.join(get_args(Status))}, found {value!r}")
    if isinstance(value, list):
        for i, entry in enumerate(value):
            _check_type(f"{name}[{i}]", entry, annotation.removeprefix("Sequence[").removesuffix("]"))
    elif isinstance(value, dict) and annotation != "Mapping[str, Any]":
        for key, entry in value.items():
            _check_type(f"{name}[{key!r}]", entry, annotation.removeprefix("Mapping[str, ").removesuffix("]"))


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Writes runs to one file, a line of JSON each.

    Raises:
        DataError: A number is NaN or infinite; nothing is written.
    """
    lines: list[str] = []
    for result in results:
        try:
            lines.append(json.dumps(result.to_record(), allow_nan=False, ensure_ascii=False) + "\n")
        except ValueError as error:
            raise DataError(f"the run of {result.model} holds a number that is not finite: {error}") from error
    write_text(path, "".join(lines))


def read_results(path: Path) -> tuple[Result, ...]:
    """Returns all runs that ended, well or not: of a file, or of a folder of any kind that holds runs.

    `path` is a file of runs (one per line, as `write_results` leaves it), a folder holding `results.jsonl`, the folder
    of one run, or a folder of such folders (in alphabetical order of what was run). Runs under way are left out.

    Raises:
        DataError: There is nothing of the kind, no run has ended, or a file is broken; the message names it.
    """
    if folders := run_folders(path):
        results = tuple(sorted((r for folder in folders if (r := read_run(folder)) is not None), key=_reading_order))
        if not results:
            raise DataError(f"none of the {len(folders)} runs in {path} has ended yet")
        return results
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"no results at {path}: expected a {RESULTS} or the folder that holds one, the folder of a run "
            f"({CONFIG} and {RECORD}), or a folder of such folders"
        )
    results = tuple(_parsed(file, number, line, Result.from_record) for number, line in _lines(file))
    if not results:
        raise DataError(f"{file} holds no run")
    return results


def _reading_order(run: Result) -> tuple[object, ...]:
    return (run.data, run.model, run.criterion or "", run.scope, run.ratio, run.unseen or "", run.seed, run.run)


def run_folders(path: Path) -> tuple[Path, ...]:
    """Returns the folders of single runs at `path`: itself, or those that lie in it, by name."""
    if (path / RECORD).is_file():
        return (path,)
    return tuple(sorted(record.parent for record in path.glob(f"*/{RECORD}"))) if path.is_dir() else ()


def num_under_way(path: Path) -> int:
    """Returns how many of the runs in a folder have begun and not ended, or were cut short."""
    return sum(read_run(folder) is None for folder in run_folders(path))


def read_run(folder: Path) -> Result | None:
    """Returns what became of the run in a folder, by the last line of its record, or None while it is under way.

    A last line that was cut short (the writer died in it) is as good as not written.

    Raises:
        DataError: A file is missing, broken, or of another version of the layout; the message names it.
    """
    config = read_config(folder / CONFIG)
    file = folder / RECORD
    lines = _lines(file)
    if lines and not file.read_bytes().endswith(b"\n"):
        lines.pop()
    if not lines:
        return None
    return _parsed(file, *lines[-1], lambda line: _outcome(line, config, folder.name))


def _outcome(line: Any, config: Mapping[str, Any], run: str) -> Result | None:
    """Returns the run that the last line of a record tells of, None if it says that the run is under way."""
    status = line.get("status") if isinstance(line, dict) else None
    if status == "running":
        return None
    if status == "done" or (status == "failed" and line.get("result") is not None):
        result = Result.from_record(line.get("result"))
    elif status == "failed":
        # A worker that was lost left nothing but what it had been asked to do.
        result = Result.from_record(_asked(config) | {"status": "failed", "error": str(line.get("error"))})
    else:
        raise DataError(f"status should be one of running, done, failed, found {status!r}")
    return dataclasses.replace(result, run=result.run or run, config=result.config or config)


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a configuration tells of its run in the fields of a result; "unknown" where it does not."""
    prune, split = config.get("prune") or {}, config.get("split") or {}
    return {
        "model": config.get("model", "unknown"),
        "criterion": prune.get("criterion"),
        "ratio": prune.get("ratio") or 0.0,
        "scope": prune.get("scope", ""),
        "seed": config.get("seed", 0),
        "data": config.get("data", "unknown"),
        "unseen": split.get("unseen"),
        "without": split.get("without"),
        "protocol": split.get("split", "unknown"),
    }


def read_config(file: Path) -> dict[str, Any]:
    """Returns what a `config.json` holds; raises DataError if it is missing, no JSON, or of another version."""
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing; remove its folder to run that again") from error
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); remove its folder to run that again") from error
    check_format(config, str(file))
    return config


def check_format(config: Any, where: str) -> None:
    """Raises DataError unless `config` is the configuration of a run in the format of this version."""
    found = config.get("format") if isinstance(config, dict) else None
    if found != RUN_FORMAT:
        raise DataError(
            f"{where} is of format {found!r}, this version reads format {RUN_FORMAT}: go on with the version that "
            "wrote it, or name another folder"
        )


def _lines(file: Path) -> list[tuple[int, str]]:
    """Returns the lines of a file that are not empty, with their numbers."""
    try:
        lines = file.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not a text file of results: {error}") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _parsed(file: Path, number: int, line: str, parse: Callable[[Any], _T]) -> _T:
    try:
        return parse(json.loads(line))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {number}: broken or cut short ({error}); remove the line to go on") from error
    except DataError as error:
        raise DataError(f"{file}, line {number}: {error}") from error


def successes(results: Iterable[Result]) -> tuple[Result, ...]:
    """Returns the runs that reached their end."""
    return tuple(result for result in results if result.status == "ok")
