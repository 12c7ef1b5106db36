"""One architecture for each family of timm, where looking at every one would take too long."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import timm
import torch

from secateur.files import write_text

KEPT = Path(__file__).with_name("timm_smallest.json")


def num_params(name: str) -> int:
    """Returns the number of parameters of a timm architecture, without making any."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


@cache
def smallest_members() -> dict[str, str]:
    """Returns the architecture with the fewest parameters of each of timm's families.

    They are kept beside this file; where timm has another version than they were found with, all are built again.
    """
    kept = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}
    if kept.get("timm") != timm.__version__:
        found = {f: min(timm.list_models(module=f), key=num_params) for f in timm.list_modules()}
        kept = {"timm": timm.__version__, "smallest": found}
        write_text(KEPT, json.dumps(kept, indent=1) + "\n")
    return kept["smallest"]


def smallest_member(family: str) -> str:
    """Returns the architecture of a timm family that has the fewest parameters."""
    return smallest_members()[family]
