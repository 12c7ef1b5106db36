"""What every test runs under: one thread, fixed seeds, no network."""

from __future__ import annotations

import os

# Read by huggingface_hub when it is imported, hence before everything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# Torch's fused encoder layer reads weights behind its modules' backs; the oracles replace modules.
torch.backends.mha.set_fastpath_enabled(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or in company."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
