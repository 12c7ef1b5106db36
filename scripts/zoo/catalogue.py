"""The architectures of the zoo: what they are called, how they are built with random weights, and what they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn


@dataclass(frozen=True)
class Entry:
    """One architecture: `library` it comes from, its `family` there, how to `build` it, and example `inputs` of two.

    A `deep` one is cut, run and trained as well, others are only analysed. `training_inputs` are for a model that takes
    other inputs in training mode than in evaluation, such as targets.
    """

    name: str
    library: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Any]
    training_inputs: Callable[[nn.Module], Any] | None = None
    deep: bool = True


def timm_inputs(model: nn.Module) -> torch.Tensor:
    """Returns two random images of the size that a timm model was published with."""
    return torch.randn(2, *model.pretrained_cfg["input_size"])  # type: ignore[index]


def timm_entry(name: str, family: str, *, deep: bool) -> Entry:
    """Returns the entry of one timm architecture."""
    return Entry(name, "timm", family, lambda: timm.create_model(name), timm_inputs, None, deep)
