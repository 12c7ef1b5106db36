"""The label engine on small networks, one for each hard case."""

from __future__ import annotations

import copy

import pytest
import torch
from models import random_scores, reference
from nets import NETS, build

import secateur


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETS)
def test_cut_equals_absence(name: str, seed: int) -> None:
    model, inputs = build(name)
    network = secateur.trace(model, inputs)
    ratios = {"head_dims": 0.4} if any(g.kind == "head_dims" for g in network.groups) else None
    plan = secateur.allocate(network, random_scores(network, seed), ratio=0.4, ratios=ratios)
    pruned = secateur.cut(model, plan)
    expected = reference(copy.deepcopy(model), {(c.tensor, c.dim): list(c.removed) for c in plan.cuts})
    with torch.no_grad():
        a, b = pruned(*inputs), expected(*inputs)
    assert (a - b).abs().max() < 1e-9 * b.abs().max()
    assert sum(p.numel() for p in pruned.parameters()) == plan.params
