"""Forward passes in half precision."""

from __future__ import annotations

import torch

from secateur.training.config import Precision

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Returns what a forward pass stands in; fp32 leaves everything as it is."""
    return torch.autocast(device.type, _TYPES.get(precision, torch.bfloat16), enabled=precision in _TYPES)
