"""A fine-tuning run on disk: a folder of checkpoints, each whole or absent; the newest that is sound is resumed.

`step-….safetensors` holds all that the step after it depends on, `best-….safetensors` the best weights by an epoch.
No pickle: tensors are safetensors, the rest is JSON in their headers, all of it under a SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from secateur.data.protocol import Split
from secateur.errors import CheckpointError, InputError
from secateur.files import write_whole
from secateur.training.config import FinetuneConfig

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go and how many stay.

    One is written after every epoch and, within epochs, after every `every_steps` steps and `every_minutes` minutes if
    given. The last `keep` stay, and with each of them the best weights that it knows; with `keep=1` there is none to
    fall back to if the newest is damaged. Under several machines the folder is to be one that all of them see.
    """

    folder: Path
    every_steps: int | None = None
    every_minutes: float | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        """Raises `InputError` for values out of range."""
        if self.every_steps is not None and self.every_steps < 1:
            raise InputError(f"every_steps must be at least 1, found {self.every_steps}")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise InputError(f"every_minutes must be positive, found {self.every_minutes}")
        if self.keep < 1:
            raise InputError(f"keep must be at least 1, found {self.keep}")


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: named groups of tensors, what is told in JSON, and the best weights by then if any."""

    path: Path
    groups: dict[str, dict[str, Tensor]]
    progress: dict[str, Any]
    best: dict[str, Tensor] | None


class CheckpointFolder:
    """The checkpoints of one run. Only the main process writes."""

    def __init__(self, config: CheckpointConfig, key: str) -> None:
        """Takes the `run_key` of the run; raises `CheckpointError` if the folder is a file."""
        if config.folder.is_file():
            raise CheckpointError(f"{config.folder} is a file; name a folder for the checkpoints of a run")
        self.config, self.key = config, key

    def steps(self) -> list[Path]:
        """Returns the checkpoints, the newest first."""
        return sorted(self.config.folder.glob("step-*.safetensors"), reverse=True)

    def write(self, step: int, groups: Groups, progress: Mapping[str, Any]) -> None:
        """Writes the checkpoint after `step`, then drops those that need not stay.

        `progress` is JSON-able; its entry `best` is the best epoch, whose weights have been written, or 0. Raises
        `CheckpointError` if it cannot be written: all that was there is still there.
        """
        flat = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        self._write(f"step-{step:09d}.safetensors", flat, progress)
        kept, old = self.steps()[: self.config.keep], self.steps()[self.config.keep :]
        best = {f"best-{_best(path):05d}.safetensors" for path in kept}
        for path in old + [p for p in self.config.folder.glob("best-*.safetensors") if p.name not in best]:
            path.unlink(missing_ok=True)

    def write_best(self, epoch: int, weights: Mapping[str, Tensor]) -> None:
        """Writes the best weights so far, those after `epoch`; the checkpoint that knows them is written next."""
        self._write(f"best-{epoch:05d}.safetensors", weights, {"best": epoch})

    def newest(self) -> tuple[Saved | None, tuple[str, ...]]:
        """Returns the newest sound checkpoint, if there is any, and a note on each damaged one that was set aside.

        Raises `CheckpointError` if it belongs to another run, or if none of those that are there is sound.
        """
        for leftover in [*self.config.folder.glob(".step-*"), *self.config.folder.glob(".best-*")]:
            leftover.unlink(missing_ok=True)
        notes: list[str] = []
        for path in self.steps():
            try:
                return self.read(path), tuple(notes)
            except _DamagedError as error:
                aside = path.with_suffix(".damaged")
                notes.append(
                    f"{path.name} is damaged ({error}); set aside as {aside.name}, went on from the one before"
                )
                path.replace(aside)
        if notes:
            raise CheckpointError(
                f"no sound checkpoint is left in {self.config.folder}: {notes[0]}; remove the folder to start anew"
            )
        return None, ()

    def read(self, path: Path) -> Saved:
        """Returns what the checkpoint at `path` holds, after checking all of it."""
        flat, progress, key = _read(path)
        if key != self.key:
            raise CheckpointError(
                f"{path} belongs to a run with another recipe, other images or another model; name another folder, or "
                "remove it"
            )
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in flat.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = value
        best = None
        if progress["best"]:
            best = _read(path.with_name(f"best-{progress['best']:05d}.safetensors"))[0]
        return Saved(path, groups, progress, best)

    def _write(self, name: str, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        flat = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        told = json.dumps(progress)
        content = save(flat, {"key": self.key, "progress": told, "sha256": _digest(self.key, told, flat)})
        path = self.config.folder / name
        try:
            write_whole(path, lambda file: file.write(content))
        except OSError as error:
            last = next((f"the last one is {p.name}" for p in self.steps()), "there is none before it")
            raise CheckpointError(
                f"cannot write the checkpoint {path}: {error.strerror or error}; {last}. Make room, then start the "
                "same run again to go on from there"
            ) from error


class _DamagedError(Exception):
    """A file is not what was written."""


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Returns tensors, progress and key in a file; raises `_DamagedError` unless it is exactly what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        key, told, digest = metadata["key"], metadata["progress"], metadata["sha256"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _DamagedError(f"{type(error).__name__}: {error}") from error
    if _digest(key, told, flat) != digest:
        raise _DamagedError("its checksum does not match")
    return flat, json.loads(told), key


def _best(path: Path) -> int:
    """Returns the best epoch that a checkpoint knows."""
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["progress"])["best"])


def _digest(key: str, told: str, flat: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of all that a file tells."""
    digest = hashlib.sha256(f"{key}\n{told}".encode())
    for name in sorted(flat):
        value = flat[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_key(model: nn.Module, split: Split, config: FinetuneConfig) -> str:
    """Returns what runs must have in common for one to go on with the other: recipe, images, shapes of weights.

    The number of workers and of processes, and whether weights are sharded over these, may differ.
    """
    recipe = asdict(config)
    del recipe["workers"], recipe["machine"]["shard"]
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    content = [recipe, list(split.train.ids), list(split.val.ids), shapes]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
