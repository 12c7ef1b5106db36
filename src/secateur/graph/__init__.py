"""Trace: run a model on labels, and find what may be removed together."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.errors import TraceError
from secateur.graph.groups import build
from secateur.graph.network import Network
from secateur.graph.tracer import run, skeleton, to_meta

__all__ = ["Network", "trace"]


def trace(model: nn.Module, example_inputs: Any, *, strict: bool = False) -> Network:
    """Returns what may be removed from `model`, what goes with it, and what everything costs.

    `example_inputs` is a tensor, a tuple of positional or a dict of keyword arguments; only shapes and types matter.
    The model runs once, in eval mode, as a copy without weights on the meta device; it is itself neither run nor
    changed.

    Raises TraceError when the model cannot be copied or fails on these inputs (its own error is inside), and, with
    `strict`, when it uses an operator without a rule (otherwise what such an operator touches is frozen and reported).
    """
    inputs = to_meta(example_inputs)
    network = build(model, run(skeleton(model), inputs), inputs)
    if strict and network.unknown_operators:
        listed = "; ".join(f"aten.{name} in {where}" for name, where in network.unknown_operators)
        raise TraceError(f"no rule for {listed}: register one with secateur.graph.rules.rule, or trace without strict")
    return network
