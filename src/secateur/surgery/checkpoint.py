"""Saved models: weights as safetensors, the plan and the recipe of the architecture as JSON. Loading runs no code."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from secateur.allocation.plan import Plan
from secateur.errors import CheckpointError, InputError, PlanError
from secateur.graph.groups import fingerprint
from secateur.surgery.cutting import cut_
from secateur.surgery.sources import ModelSource, build_model, source_of

WEIGHTS, PLAN, MANIFEST = "model.safetensors", "plan.json", "secateur.json"
FORMAT = 1


def save(model: nn.Module, plan: Plan, directory: str | Path, *, source: ModelSource | None = None) -> None:
    """Writes a model that `plan` has cut to `directory`, so that `load` builds it again in a fresh process.

    `source` says how the original architecture is built; it is read off timm and transformers models when not given. The
    directory appears whole or not at all; it must not exist, or be empty.

    Raises InputError for a directory in use, CheckpointError when `source` builds another architecture than the plan's
    or the model has not been cut by this plan.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not empty; choose another directory, or remove it first")
    source = source or source_of(model)
    original = build_model(source, "random")
    if fingerprint(original) != plan.fingerprint:
        raise CheckpointError(
            f"{source.kind} model {source.name} with options {dict(source.options)} is not the architecture that the plan "
            "was made for; pass source=ModelSource(kind, name, options) with the arguments that built the original"
        )
    _expect_cut(model, plan)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_model(model, str(staging / WEIGHTS))
        (staging / PLAN).write_text(plan.to_json())
        manifest = {
            "format": FORMAT,
            "source": source.to_dict(),
            "sha256": {name: _digest(staging / name) for name in (WEIGHTS, PLAN)},
        }
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if target.exists():
            target.rmdir()
        staging.chmod(0o755)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def load(directory: str | Path) -> nn.Module:
    """Returns the model that `save` wrote to `directory`, in eval mode on the CPU.

    The original architecture is built, the plan replayed (with the check that follows every cut), and the weights put in.

    Raises CheckpointError when something is missing, corrupt, or was not written by `save`.
    """
    path = Path(directory)
    manifest = _read_manifest(path)
    source = ModelSource.from_dict(manifest["source"])
    try:
        plan = Plan.from_json((path / PLAN).read_text())
        model = build_model(source, "random")
        cut_(model, plan)
    except PlanError as error:
        raise CheckpointError(f"{path} does not fit the installed {source.kind}'s {source.name}: {error}") from error
    try:
        _match_types(model, load_file(path / WEIGHTS))
        load_model(model, path / WEIGHTS)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS} does not hold the weights of this model: {error}") from error
    return model.eval()


def _expect_cut(model: nn.Module, plan: Plan) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for change in plan.cuts:
        size = change.size - len(change.removed)
        tensor = tensors.get(change.tensor)
        if tensor is None or tensor.shape[change.dim] != size:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"the model was not cut by this plan: {change.tensor!r} is {found}, and should have {size} indices along "
                f"dimension {change.dim}; call cut_(model, plan) first"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is not a model saved by secateur: it has no {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        digests, version = dict(manifest["sha256"]), manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is corrupt: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version!r}; this version reads {FORMAT}")
    for name in (WEIGHTS, PLAN):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is incomplete: {name} is missing")
        if _digest(path / name) != digests.get(name):
            raise CheckpointError(f"{path / name} is corrupt or was changed: its checksum is not the recorded one")
    return manifest


def _match_types(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Gives the model's tensors the types that were saved: a model saved in half precision loads in half precision."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in saved and saved[name].dtype != tensor.dtype:
            tensor.data = tensor.data.to(saved[name].dtype)
