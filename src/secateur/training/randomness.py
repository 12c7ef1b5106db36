"""The random state of a run: its own while it lasts, and part of its checkpoints."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Generators = dict[str, Any]
"""The states of all generators of a process, as JSON can hold them."""


@contextmanager
def own_randomness(seed: int, rank: int, device: torch.device) -> Iterator[None]:
    """Seeds all global generators, for each process on its own, and puts their states back afterwards."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        first, second = np.random.SeedSequence([seed, rank]).generate_state(2).tolist()
        torch.manual_seed(first if rank else seed)
        random.seed(second)
        np.random.seed(second)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def random_states(device: torch.device) -> Generators:
    """Returns the states of torch's generators for the CPU and for `device`, of Python's and of numpy's."""
    legacy: Any = np.random.get_state(legacy=False)
    legacy["state"]["key"] = legacy["state"]["key"].tolist()
    states: Generators = {"torch": _text(torch.get_rng_state()), "python": random.getstate(), "numpy": legacy}
    if device.type == "cuda":
        states["cuda"] = _text(torch.cuda.get_rng_state(device))
    return states


def restore_random_(states: Generators, device: torch.device) -> None:
    """Puts back what `random_states` returned, before or after JSON."""
    torch.set_rng_state(_tensor(states["torch"]))
    version, values, gauss = states["python"]
    random.setstate((version, tuple(values), gauss))
    inner = {**states["numpy"]["state"], "key": np.array(states["numpy"]["state"]["key"], dtype=np.uint32)}
    np.random.set_state({**states["numpy"], "state": inner})
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_tensor(states["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
