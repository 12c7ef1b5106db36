"""Everything in one call: trace, score, allocate, cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.allocation import Plan, allocate
from secateur.criteria import Combination, Criterion, Loss, score
from secateur.criteria.scores import Given
from secateur.graph import trace
from secateur.surgery.cutting import cut_


def prune_(
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: str | Criterion = "l2",
    batches: Given | Mapping[str, Given] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    combine: str | Combination | None = None,
    compensate: Iterable[Any] | None = None,
    **allocation: Any,
) -> Plan:
    """Prunes `model` in place and returns the plan that was carried out.

    `example_inputs` as for `trace`; `criterion`, `batches`, `loss`, `seed` and `combine` as for `score`; everything
    else (`ratio` or a budget, `scope`, `ratios`, `keep`, `min_channels`, `round_to`) as for `allocate`, with the same
    defaults. `compensate`: unlabelled batches to refit the remaining layers by (see `compensate_`); what was left alone
    stands in the notes of the plan.

    Raises what those functions raise; the model is then as it was.
    """
    network = trace(model, example_inputs)
    scores = score(network, model, criterion, batches, loss=loss, seed=seed, combine=combine)
    plan = allocate(network, scores, **allocation)
    compensation = cut_(model, plan, compensate=compensate)
    return plan if compensation is None else replace(plan, notes=(*plan.notes, *compensation.notes))
