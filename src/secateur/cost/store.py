"""Where measured times are kept from one run to the next."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from secateur.cost.layers import Grid
from secateur.errors import InputError
from secateur.files import write_text

FORMAT = 1
"""Version of the layout of a file of measured times."""


class Store:
    """Times of layers and of models on one device, as read from `file` (JSON, if it exists) and added to.

    Without a file, what is asked for is always measured. Raises InputError if `file` holds something else.
    """

    def __init__(self, file: Path | None, device: torch.device) -> None:
        self._file = file
        self._machine = machine(device)
        self._content = self._read()
        self._changed = False

    def layer(self, key: str, measure: Callable[[], Grid]) -> Grid:
        """Returns the times of a layer, measured if need be."""
        kept = self._kept("layers")
        if key not in kept:
            kept[key] = asdict(measure())
            self._changed = True
        grid = kept[key]
        rows, columns = (tuple(p) for p in grid["penalties"])
        seconds = tuple(map(tuple, grid["seconds"]))
        return Grid(tuple(grid["rows"]), tuple(grid["columns"]), seconds, (rows, columns))

    def model(self, key: str, measure: Callable[[], list[list[float]]]) -> list[list[float]]:
        """Returns the times of a model, measured if need be."""
        kept = self._kept("models")
        if key not in kept:
            kept[key] = measure()
            self._changed = True
        return kept[key]

    def save(self) -> None:
        """Writes the file, whole or not at all, if something new was measured."""
        if self._file is not None and self._changed:
            write_text(self._file, json.dumps(self._content, indent=1))

    def _kept(self, kind: str) -> dict[str, Any]:
        return self._content["machines"].setdefault(self._machine, {"layers": {}, "models": {}})[kind]

    def _read(self) -> dict[str, Any]:
        if self._file is None or not self._file.exists():
            return {"format": FORMAT, "machines": {}}
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            if content["format"] == FORMAT and isinstance(content["machines"], dict):
                return content
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"{self._file} does not hold measured times ({error}); name another file") from error
        raise InputError(
            f"{self._file} has format {content['format']!r} of measured times, this version knows {FORMAT}"
        )


def machine(device: torch.device) -> str:
    """Returns what times depend on besides the model: device, threads, version of torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}"
    name = f"{platform.node()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} {name}; {torch.get_num_threads()} threads; torch {torch.__version__}"
