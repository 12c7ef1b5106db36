"""A fine-tuning run on disk: a safetensors file after each epoch, whole or not at all, from which a run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.data.protocol import Split
from secateur.errors import CheckpointError
from secateur.files import write_whole
from secateur.training.config import FinetuneConfig


def run_key(model: nn.Module, split: Split, config: FinetuneConfig) -> str:
    """Returns what runs must have in common for one to go on with the other: recipe, images, shapes of weights."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    content = [asdict(config), list(split.train.ids), list(split.val.ids), shapes]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write(path: Path, key: str, tensors: Mapping[str, Mapping[str, Tensor]], progress: Mapping[str, Any]) -> None:
    """Writes named groups of tensors and JSON-able `progress`; an older file is replaced in one step."""
    flat = {
        f"{group}/{k}": v.detach().cpu().contiguous().clone() for group, vs in tensors.items() for k, v in vs.items()
    }
    content = save(flat, metadata={"key": key, "progress": json.dumps(progress)})
    write_whole(path, lambda file: file.write(content))


def read(path: Path, key: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Returns the groups of tensors and the progress that `write` wrote.

    Raises CheckpointError when the file is corrupt, is something else, or belongs to a run of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            flat = {name: file.get_tensor(name) for name in names}
        progress = json.loads(metadata["progress"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is corrupt or not a checkpoint of a run: {error}; remove it to start anew"
        ) from error
    if metadata.get("key") != key:
        raise CheckpointError(
            f"{path} belongs to a run with another recipe, other images or another model; name another file, or "
            "remove it"
        )
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = value
    return groups, progress


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer's state by position of the parameter and name."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{key}": value for i, values in state.items() for key, value in values.items()}


def restore_optimizer_(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        position, _, key = name.partition("/")
        state.setdefault(int(position), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def random_states(generator: torch.Generator) -> dict[str, Tensor]:
    """Returns the states of the generators that a run draws from: torch's own, and that of the order of images."""
    states = {"torch": torch.get_rng_state(), "order": generator.get_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_(generator: torch.Generator, states: Mapping[str, Tensor]) -> None:
    """Puts back what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    generator.set_state(states["order"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
