"""The folders that runs leave behind: one per run, named by the hash of its configuration, with a record of its life.

    RUNS/<hash>/config.json         the complete configuration, with the version of the format
    RUNS/<hash>/record.jsonl        append-only, the last line counts: time, status (running, done or failed), attempt …
    RUNS/<hash>/model.safetensors   the weights of a dense baseline that others learn from
    RUNS/.scores/<key>              scores, so that a sweep that goes on need not calibrate again

Only the driver of a sweep writes here, and only one driver at a time (`sole_driver`).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from secateur.criteria import Scores
from secateur.errors import DataError, InputError
from secateur.experiments.config import RunConfig
from secateur.experiments.running import Scored, Weights
from secateur.files import write_text, write_whole
from secateur.report import Result
from secateur.report.results import CONFIG, RECORD, read_config, run_folders

Status = Literal["new", "running", "done", "failed"]
LOCK, OWNER, SCORES = ".lock", ".driver.json", ".scores"
MODEL = "model.safetensors"


# --- one run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunState:
    """What the record of a run says: its last status, the attempts made, and the result or error that it ended with.

    "running" is what the last line says; where no driver is at work, the run was cut short.
    """

    status: Status = "new"
    attempts: int = 0
    error: str = ""
    result: Result | None = None


def read_state(folder: Path) -> RunState:
    """Returns what became of the run in a folder; a last line that was cut short is as good as not written.

    Raises:
        DataError: A line is broken, or does not say what a line of a record says; the message names it.
    """
    file = folder / RECORD
    if not file.is_file():
        return RunState()
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    lines = [_parsed(file, number, line) for number, line in enumerate(whole.split(b"\n"), start=1) if line.strip()]
    if not lines:
        return RunState()
    last = lines[-1]
    result = Result.from_record(last["result"]) if last.get("result") is not None else None
    attempts = max(int(line["attempt"]) for line in lines)
    return RunState(last["status"], attempts, str(last.get("error") or ""), result)


def _parsed(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{file}, line {number} is broken ({error}); remove the folder to run that again") from error
    match found:
        case {"status": "running" | "failed", "attempt": int()}:
            return found
        case {"status": "done", "attempt": int(), "result": dict()}:
            return found
    raise DataError(f"{file}, line {number} is not a line of a record: expected status and attempt")


def append_line(folder: Path, status: Status, attempt: int, **said: Any) -> None:
    """Appends a line to the record of a run and waits until it is on the disk.

    A line goes out in one write. What a writer that died has left of its last line is taken away first, so nothing
    that was ever complete is touched. The caller must be the sole driver.
    """
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "status": status, "attempt": attempt, **said}
    file = folder / RECORD
    is_new = not file.exists()
    with file.open("ab+") as record:
        record.seek(0)
        whole = record.read().rfind(b"\n") + 1
        record.truncate(whole)
        record.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
        record.flush()
        os.fsync(record.fileno())
    if is_new:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Waits until the names of new files in a folder are on the disk, where the system knows of such a thing."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_folder(out: Path, config: RunConfig) -> Path:
    """Returns the folder of a run, after writing its configuration unless it is there.

    Raises:
        DataError: The folder holds another configuration, or one of another version.
    """
    folder = out / config.hash
    if not (folder / CONFIG).exists():
        write_text(folder / CONFIG, json.dumps(config.to_json(), indent=1) + "\n")
        _sync_folder(folder)
    elif read_config(folder / CONFIG) != config.to_json():
        raise DataError(f"{folder / CONFIG} holds another configuration than its name says; remove the folder")
    return folder


def read_states(out: Path) -> dict[str, RunState]:
    """Returns the state of every run in a folder of runs, by hash.

    Raises:
        DataError: The configuration of a run is of another version or broken, or a record is.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a folder for the runs")
    states = {}
    for folder in run_folders(out):
        read_config(folder / CONFIG)
        states[folder.name] = read_state(folder)
    return states


# --- all runs ---------------------------------------------------------------------------------------------------


@contextmanager
def sole_driver(out: Path) -> Iterator[str]:
    """Holds the lock on a folder of runs; yields who held it last if they died with it, "" otherwise.

    The lock is the operating system's, so that it goes when its holder dies, however that happens.

    Raises:
        InputError: Another driver is at work on this folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(out / LOCK, timeout=0), out / OWNER
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another sweep is writing to {out} ({_told(owner) or 'it did not say who'}): wait until it ends, stop it, "
            "or name another folder"
        ) from error
    try:
        died = _told(owner)
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat("T", "seconds")}
        write_text(owner, json.dumps(about) + "\n")
        yield died
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _told(owner: Path) -> str:
    """Returns who wrote the file of the driver, "" if there is none (or none that can be read)."""
    try:
        about = json.loads(owner.read_bytes())
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def keep_weights(folder: Path, weights: Weights) -> None:
    """Writes the weights of a run that others learn from."""
    content = save({name: np.ascontiguousarray(value) for name, value in weights.items()})
    write_whole(folder / MODEL, lambda file: file.write(content))


def kept_weights(folder: Path) -> Weights | None:
    """Returns the weights that `keep_weights` wrote, None if there are none, or none that can be read."""
    try:
        return load_file(folder / MODEL)
    except (OSError, SafetensorError):
        return None


def keep_scores(out: Path, key: str, scored: Scored) -> None:
    """Writes scores for a sweep that goes on later."""
    if scored.scores is None:
        return
    scores = scored.scores
    about = {
        "criterion": scores.criterion,
        "normalize": scores.normalize,
        "num_samples": scores.num_samples,
        "seconds": scored.seconds,
    }
    content = save({"values": scores.values}, metadata={"about": json.dumps(about)})
    write_whole(out / SCORES / key, lambda file: file.write(content))


def kept_scores(out: Path, keys: Mapping[str, object]) -> dict[str, Scored]:
    """Returns those of the scores that were written before; what cannot be read is made again by the caller."""
    found: dict[str, Scored] = {}
    for key in keys:
        try:
            with safe_open(out / SCORES / key, framework="numpy") as file:
                about = json.loads((file.metadata() or {})["about"])
                values = file.get_tensor("values")
        except (OSError, SafetensorError, KeyError, ValueError):
            continue
        scores = Scores(values, about["criterion"], about["normalize"], about["num_samples"])
        found[key] = Scored(scores, about["seconds"])
    return found
