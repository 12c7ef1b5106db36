"""Where a result comes from: versions of software, hardware, and the hash of a configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("secateur", "torch", "timm", "transformers", "torchvision", "accelerate", "numpy", "scikit-learn")


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of every installed package that can change a number."""
    found = {package: _version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | {name: v for name, v in found.items() if v is not None}


def hardware() -> str:
    """Returns the processor, its number of threads in use, and the accelerator if there is one."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), processor)
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {torch.get_num_threads()} threads{accelerator}"


@cache
def commit() -> str | None:
    """Returns the commit of the checkout this package runs from, or None outside of one.

    Asked of the folder of the package itself, and only believed if that folder's files are under version control:
    an installed copy may lie inside somebody else's repository.
    """
    here = Path(__file__).resolve()
    known = ["git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name]
    head = ["git", "-C", str(here.parent), "rev-parse", "HEAD"]
    try:
        subprocess.run(known, capture_output=True, check=True, timeout=10)
        return subprocess.run(head, capture_output=True, check=True, timeout=10, text=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def plain(value: Any) -> Any:
    """Returns `value` (dataclasses, paths, tuples, mappings …) made of what JSON knows, with keys in order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def config_hash(config: Any) -> str:
    """Returns 12 hexadecimal digits that change whenever any field of a configuration changes."""
    text = json.dumps(plain(config), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]
