"""Measured latency of several models on the same input, taken so that their ratios can be trusted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.errors import InputError

Inputs = Tensor | tuple[object, ...] | Mapping[str, object]


def measure_latency(
    models: Mapping[str, nn.Module], inputs: Inputs, *, rounds: int = 20, warmup: int = 3, repeats: int = 1
) -> dict[str, float]:
    """Returns the median latency of each model in seconds per forward pass on `inputs`, a whole batch at a time.

    Arguments and errors are those of `sample_latency`.
    """
    times = sample_latency(models, inputs, rounds=rounds, warmup=warmup, repeats=repeats)
    return {name: statistics.median(found) for name, found in times.items()}


def sample_latency(
    models: Mapping[str, nn.Module], inputs: Inputs, *, rounds: int = 20, warmup: int = 3, repeats: int = 1
) -> dict[str, list[float]]:
    """Returns the latency of each model in each round, in seconds per forward pass on `inputs`.

    The models take turns: in each of `rounds` rounds every model runs `repeats` times, in an order that rotates from
    round to round, so that a slow spell of the machine falls on all of them alike. `warmup` passes of each model come
    before and do not count. Passes run in inference mode and eval mode, with the number of threads that torch is set
    to; on a GPU the clock waits for it to finish. `inputs` (a tensor, a tuple of positional or a mapping of named
    arguments) must be on the models' device. Nothing about the models is changed.

    Raises `InputError` for no models, counts below one, or models on more than one device.
    """
    if not models:
        raise InputError("no models to measure; expected at least one")
    if rounds < 1 or repeats < 1 or warmup < 0:
        raise InputError(f"rounds and repeats must be at least 1, warmup 0, found {rounds}, {repeats}, {warmup}")
    devices = {tensor.device for model in models.values() for tensor in model.parameters()}
    if len(devices) > 1:
        raise InputError(f"models on different devices cannot be compared: {', '.join(sorted(map(str, devices)))}")
    device = devices.pop() if devices else torch.device("cpu")
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    with evaluating(*models.values()), torch.inference_mode():
        for name in names:
            for _ in range(warmup):
                call(models[name], inputs)
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(_seconds(models[name], inputs, repeats, device))
    return times


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts models into eval mode for a while."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _seconds(model: nn.Module, inputs: object, repeats: int, device: torch.device) -> float:
    """Returns the mean time of one forward pass over `repeats` passes in a row."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call(model, inputs)
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call(model: nn.Module, inputs: object) -> None:
    """Runs a model on a tensor, a tuple of positional or a mapping of named arguments."""
    if isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, tuple):
        model(*inputs)
    else:
        model(inputs)
