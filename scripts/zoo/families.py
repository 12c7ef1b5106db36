"""One architecture for each family of timm, where looking at every one would take too long."""

from __future__ import annotations

from functools import cache

import timm
import torch


def num_params(name: str) -> int:
    """Returns the number of parameters of a timm architecture, without making any."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


@cache
def smallest_member(family: str) -> str:
    """Returns the architecture of a timm family that has the fewest parameters; builds all of them without weights."""
    return min(timm.list_models(module=family), key=num_params)
