"""Random networks, random plans: whatever runs, runs after the cut, and computes and costs what it should.

A hundred networks by default, the same ones each time; `make fuzz` looks at thousands of others.
"""

from __future__ import annotations

import copy
import os
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur
from models import random_scores, reference
from nets import Attention
from random_networks import networks
from secateur.graph.copies import output_tensors
from secateur.graph.labels import leaves

FUZZ = int(os.environ.get("FUZZ", "0"))
"""How many networks to draw afresh; 0 for the hundred of every day."""


@st.composite
def requests(draw: st.DrawFn, network: secateur.Network, least: int) -> dict[str, Any]:
    """Draws arguments of `allocate` for a network, none of whose fibres should keep fewer than `least` channels."""
    names = sorted({n for g in network.groups for n in (g.name, g.family, g.kind)})
    some = st.sampled_from(names) if names else st.nothing()
    kinds = sorted({g.kind for g in network.groups})
    return {
        "ratio": draw(st.sampled_from([0.1, 0.3, 0.5, 0.8, 0.95])),
        "scope": draw(st.sampled_from(["global", "local", "isomorphic"])),
        "ratios": draw(st.dictionaries(st.sampled_from(kinds), st.sampled_from([0.0, 0.4, 0.7]))) if kinds else None,
        "keep": draw(st.lists(some, max_size=1)) if names else (),
        "min_channels": draw(st.sampled_from([2, 3] if least > 1 else [None, None, 1, 2, 3])),
        "round_to": draw(st.sampled_from([1, 1, 2, 4])),
    }


def _sums_by_einsum(model: nn.Module) -> bool:
    return any(isinstance(m, Attention) and m.style == "einsum" for m in model.modules())


def _values(output: object) -> torch.Tensor:
    return torch.cat([t.flatten() for t in output_tensors(output)])


def _macs(model: nn.Module, x: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2 / x.shape[0]


def _check_equals_absence(model: nn.Module, pruned: nn.Module, plan: secateur.Plan, x: torch.Tensor) -> None:
    expected = reference(copy.deepcopy(model), {(c.tensor, c.dim): list(c.removed) for c in plan.cuts})
    with torch.no_grad():
        a, b = _values(pruned(x)), _values(expected(x))
    assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def _check_costs(model: nn.Module, pruned: nn.Module, plan: secateur.Plan, x: torch.Tensor) -> None:
    assert sum(p.numel() for p in model.parameters()) == plan.dense_params
    assert sum(p.numel() for p in pruned.parameters()) == plan.params
    assert _macs(model, x) == plan.dense_macs
    assert _macs(pruned, x) == plan.macs


def _check_trains(pruned: nn.Module, x: torch.Tensor) -> None:
    _values(copy.deepcopy(pruned).train()(x)).sum().backward()


def _integers(model: nn.Module) -> list[tuple[str, str, str]]:
    """Returns the attributes that a cut may set, as text."""
    held = [(name, key, value) for name, module in model.named_modules() for key, value in vars(module).items()]
    return [(name, key, repr(value)) for name, key, value in held if {type(v) for v in leaves(value)} == {int}]


def _check_failure_changes_nothing(model: nn.Module, plan: secateur.Plan) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = _integers(model)
    refuse = mock.patch("secateur.surgery.cutting.check", side_effect=secateur.CutError("no"))
    with refuse, pytest.raises(secateur.CutError):
        secateur.cut_(model, plan)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert attributes == _integers(model)


@settings(
    max_examples=FUZZ or 100,
    deadline=None,
    derandomize=not FUZZ,
    print_blob=bool(FUZZ),
    suppress_health_check=list(HealthCheck),
)
@given(drawn=networks(), seed=st.integers(0, 9), data=st.data())
def test_random_network_after_a_random_cut(
    drawn: tuple[nn.Module, tuple[int, ...]], seed: int, data: st.DataObject
) -> None:
    model, shape = drawn
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    network = secateur.trace(model, x)
    request = data.draw(requests(network, 2 if _sums_by_einsum(model) else 1), label="request")
    try:
        plan = secateur.allocate(network, random_scores(network, seed), **request)
    except secateur.PlanError:
        return  # the request contradicts itself, and it was said so
    again = secateur.trace(copy.deepcopy(model), x)
    assert secateur.allocate(again, random_scores(again, seed), **request).to_json() == plan.to_json()
    pruned = secateur.cut(model, plan)
    _check_equals_absence(model, pruned, plan, x)
    _check_costs(model, pruned, plan, x)
    _check_trains(pruned, x)
    if seed == 0:
        _check_failure_changes_nothing(model, plan)
