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
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.allocation.plan import Plan
from secateur.errors import CheckpointError, CutError, InputError, PlanError, TraceError
from secateur.graph.groups import fingerprint
from secateur.graph.labels import named_tensors
from secateur.surgery.cutting import cut_
from secateur.surgery.sources import ModelSource, build_model, source_of

WEIGHTS, PLAN, MANIFEST = "model.safetensors", "plan.json", "secateur.json"
FORMAT = 1


def save(model: nn.Module, plan: Plan, directory: str | Path, *, source: ModelSource | None = None) -> None:
    """Writes a model that `plan` has cut to `directory`, so that `load` builds it again in a fresh process.

    `source` says how the original architecture is built; it is read off timm and transformers models when not given.
    The directory appears whole or not at all; it must not exist, or be empty.

    Raises InputError for a directory in use, CheckpointError when `source` builds another architecture than the plan's
    or the model has not been cut by this plan.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not empty; choose another directory, or remove it first")
    source = source or source_of(model)
    original = _build(source)
    if fingerprint(original) != plan.fingerprint:
        raise CheckpointError(
            f"{source.kind} model {source.name} with options {dict(source.options)} is not the architecture that the "
            "plan was made for; pass source=ModelSource(kind, name, options) with the arguments that built the original"
        )
    _expect_cut(model, plan)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error}") from error
    try:
        save_file(_contents(model), staging / WEIGHTS)
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
        (staging / WEIGHTS).chmod(0o644)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def load(directory: str | Path) -> nn.Module:
    """Returns the model that `save` wrote to `directory`, in eval mode on the CPU.

    The original architecture is built, the plan replayed (with the check after every cut), and the weights put in.

    Raises CheckpointError when something is missing, corrupt, or was not written by `save`.
    """
    path = Path(directory)
    manifest = _read_manifest(path)
    source = ModelSource.from_dict(manifest.get("source"))
    try:
        plan = Plan.from_json((path / PLAN).read_text())
        model = _build(source)
        cut_(model, plan)
    except (PlanError, CutError, TraceError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} does not fit the installed {source.kind}'s {source.name}: {error}") from error
    try:
        saved = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS} does not hold the weights of this model: {error}") from error
    tensors = named_tensors(model)
    wrong = sorted(
        {n for n, t in tensors.items() if n not in saved or saved[n].shape != t.shape} | (saved.keys() - tensors.keys())
    )
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{path / WEIGHTS} does not hold the weights of this model: {', '.join(wrong[:3])}{more} are missing, of "
            "another shape, or not part of the model"
        )
    for name, tensor in tensors.items():
        tensor.data = saved[name]
    return model.eval()


def _build(source: ModelSource) -> nn.Module:
    """Returns the original architecture; torch's random state stays as it was."""
    with torch.random.fork_rng(devices=()):
        return build_model(source, "random")


def _contents(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns all tensors of the model, shared ones once. Buffers that are not part of a state dict are among them: the
    model may compute with them, and needs them in its own type."""
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in named_tensors(model).items()}


def _expect_cut(model: nn.Module, plan: Plan) -> None:
    tensors = named_tensors(model)
    for change in plan.cuts:
        size = change.size - len(change.removed)
        tensor = tensors.get(change.tensor)
        if tensor is None or tensor.shape[change.dim] != size:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"the model was not cut by this plan: {change.tensor!r} is {found}, and should have {size} indices "
                f"along dimension {change.dim}; call cut_(model, plan) first"
            )
    params = sum(p.numel() for p in model.parameters())
    if plan.branches and params != plan.params:
        raise CheckpointError(
            f"the model was not cut by this plan: it has {params:,} parameters, and should have {plan.params:,} "
            f"without {', '.join(plan.branches)}; call cut_(model, plan) first"
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
