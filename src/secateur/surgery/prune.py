"""Everything in one call: trace, score, allocate, cut."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.allocation import Plan, allocate
from secateur.criteria import Batches, Criterion, Loss, score
from secateur.graph import trace
from secateur.surgery.cutting import cut_


def prune_(
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: str | Criterion = "l2",
    batches: Batches | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    **allocation: Any,
) -> Plan:
    """Prunes `model` in place and returns the plan that was carried out.

    `example_inputs` as for `trace`; `criterion`, `batches`, `loss` and `seed` as for `score`; everything else (`ratio`,
    `scope`, `ratios`, `keep`, `min_channels`, `round_to`) as for `allocate`, with the same defaults.

    Raises what those functions raise; the model is then as it was.
    """
    network = trace(model, example_inputs)
    scores = score(network, model, criterion, batches, loss=loss, seed=seed)
    plan = allocate(network, scores, **allocation)
    cut_(model, plan)
    return plan
