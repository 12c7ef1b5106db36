"""Trace: run a model on labels, and find what may be removed together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.errors import TraceError
from secateur.graph.copies import collector_paused, copied, skeleton, to_meta
from secateur.graph.groups import build, outline
from secateur.graph.network import Network, Outline
from secateur.graph.tracer import run
from secateur.graph.values import Values, stand_in

__all__ = ["Network", "trace"]


@collector_paused()
def trace(model: nn.Module, example_inputs: Any, *, strict: bool = False) -> Network:
    """Returns what may be removed from `model`, what goes with it, and what everything costs.

    `example_inputs` is a tensor, a tuple of positional or a dict of keyword arguments; only shapes and types matter.
    The model runs once, in eval mode, as a copy without weights on the meta device; it is itself neither run nor
    changed. A model that cannot run so, because its way depends on values, runs as a copy with its weights on the
    example inputs instead, and a note says so.

    Raises TraceError when the model cannot be copied or fails on these inputs (its own error is inside), and, with
    `strict`, when it uses an operator without a rule (otherwise what such an operator touches is frozen and reported).
    """
    inputs = to_meta(example_inputs)
    try:
        network = build(model, run(skeleton(model), inputs), inputs)
    except TraceError as error:
        network = _trace_on_values(model, example_inputs, inputs, error)
    if strict and network.unknown_operators:
        listed = "; ".join(f"aten.{name} in {where}" for name, where in network.unknown_operators)
        raise TraceError(f"no rule for {listed}: register one with secateur.graph.rules.rule, or trace without strict")
    return network


def _trace_on_values(model: nn.Module, example_inputs: Any, inputs: Any, error: TraceError) -> Network:
    """Returns the network of a model that does not run without values; raises `error` where there are none."""
    if any(p.is_meta for p in model.parameters()):
        raise error
    values = Values(stand_in(example_inputs))
    with torch.random.fork_rng():
        record = run(copied(model), inputs, values)
    record.notes.append(f"it was run on a copy with its weights, for it cannot run without values: {error}")
    return replace(build(model, record, inputs), values=values.repeated())


def retrace(model: nn.Module, before: Network) -> Outline:
    """Returns the outline of a throw-away cut `model`, run in the same way as the trace that gave `before`."""
    values = before.values and before.values.repeated()
    return outline(model, run(model, before.inputs, values), before.inputs)
