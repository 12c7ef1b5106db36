"""What the zoo says of one architecture: analyse it, cut it by half, check it, run it, train it one step."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur
from secateur.errors import PlanError
from secateur.graph.copies import as_arguments, output_tensors
from secateur.graph.groups import batch_size
from secateur.graph.network import STAYS, Network
from zoo.catalogue import Entry

NO_RULE = "no rule for the operator"
MOST_REASONS = 8
STEPS = ("analysed", "cut and checked", "evaluated", "trained a step")


@dataclass
class Record:
    """One architecture of the report.

    `seconds` is the time to analyse, `total_seconds` that of everything; a `deep` record is of a model that was cut as
    well. `prunable_params` and `prunable_macs` are fractions that could go; `without_rule` is the fraction of
    parameters that stay for want of an operator rule. `frozen` are the reasons (with module and line) for which
    parameters stay, and how many. `passed` are the steps that went well, in the order of `STEPS`; the MACs of the cut
    model are `macs_left` as predicted and `macs_counted` as torch counts them (None for a model whose way depends on
    values: it takes another one each time). Of a budget of half the MACs or parameters, plans use up `macs_used` and
    `params_used`; None where half is out of reach.
    """

    name: str
    library: str
    family: str
    deep: bool
    seconds: float = 0.0
    total_seconds: float = 0.0
    params: int = 0
    macs: int = 0
    prunable_params: float = 0.0
    prunable_macs: float = 0.0
    without_rule: float = 0.0
    frozen: tuple[tuple[str, int], ...] = ()
    unknown_operators: tuple[tuple[str, str], ...] = ()
    groups: int = 0
    families: int = 0
    params_left: int = 0
    macs_left: int = 0
    params_counted: int = 0
    macs_counted: int | None = None
    macs_used: float | None = None
    params_used: float | None = None
    passed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""


def examine(entry: Entry) -> Record:
    """Returns what there is to say of `entry`: of a deep one everything, else the analysis alone, without weights."""
    record = Record(entry.name, entry.library, entry.family, entry.deep)
    start = time.perf_counter()
    try:
        torch.manual_seed(0)
        model = entry.build().eval() if entry.deep else _without_weights(entry)
        inputs = entry.inputs(model)
        network = _analyse(record, model, inputs)
        if entry.deep:
            _cut(record, model, network, inputs)
            _train(record, model, entry)
    except Exception as error:  # noqa: BLE001  (the report names every failure, whatever it is)
        where = traceback.extract_tb(error.__traceback__)[-1]
        record.error = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    record.total_seconds = round(time.perf_counter() - start, 2)
    return record


def _without_weights(entry: Entry) -> nn.Module:
    with torch.device("meta"):
        return entry.build().eval()


def _analyse(record: Record, model: nn.Module, inputs: Any) -> Network:
    start = time.perf_counter()
    network = secateur.trace(model, inputs)
    record.seconds = round(time.perf_counter() - start, 3)
    record.params, record.macs = network.params, network.macs
    nothing = np.zeros(network.num_channels + 1, np.bool_)
    nothing[STAYS] = True
    record.prunable_params = 1 - network.params_cost(nothing) / max(1, network.params)
    record.prunable_macs = 1 - network.macs_cost(nothing) / max(1, network.macs)
    record.unknown_operators, record.notes = network.unknown_operators, network.notes
    record.groups, record.families = len(network.groups), len(network.families)
    stuck = _stuck(model, network)
    reasons: Counter[str] = Counter()
    for name, count in stuck.items():
        for reason in {f"{f.reason}; {f.where}".rstrip("; ") for f in network.frozen if f.tensor == name}:
            reasons[reason] += count
    record.frozen = tuple(reasons.most_common(MOST_REASONS))
    unruled = {f.tensor for f in network.frozen if NO_RULE in f.reason}
    record.without_rule = sum(n for name, n in stuck.items() if name in unruled) / max(1, network.params)
    record.passed = STEPS[:1]
    return network


def _stuck(model: nn.Module, network: Network) -> dict[str, int]:
    """Returns for each parameter how many of its entries no cut can remove."""
    stays: dict[str, float] = {name: p.numel() for name, p in model.named_parameters()}
    for axis in network.axes:
        if axis.tensor in stays:
            stays[axis.tensor] *= float(((axis.channels == STAYS) & (axis.owners == STAYS)).mean())
    return {name: round(count) for name, count in stays.items() if round(count)}


def _cut(record: Record, model: nn.Module, network: Network, inputs: Any) -> None:
    scores = secateur.score(network, model, "l1")
    record.macs_used, record.params_used = _budgets(network, scores)
    plan = secateur.allocate(network, scores, ratio=0.5, scope="local")
    record.params_left, record.macs_left = plan.params, plan.macs
    record.notes += plan.notes
    shapes = [t.shape for t in _outputs(model, inputs)] if network.values is None else None
    secateur.cut_(model, plan)
    record.passed = STEPS[:2]
    record.params_counted = sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)  # the counter would follow parameters that a module takes as arguments
    counter = FlopCounterMode(display=False)
    one_dnn = torch.backends.mkldnn.set_flags(False)  # the counter does not see into its recurrent layers
    with counter:
        after = _outputs(model, inputs)
    torch.backends.mkldnn.set_flags(one_dnn[0])
    for parameter in trained:
        parameter.requires_grad_(True)
    if shapes is not None:
        record.macs_counted = counter.get_total_flops() // 2 // batch_size(inputs)
        if [t.shape for t in after] != shapes:
            raise RuntimeError("the outputs of the cut model have other shapes")
    if record.params_counted != record.params_left or record.macs_counted not in (None, record.macs_left):
        raise RuntimeError(
            f"predicted {record.params_left:,} parameters and {record.macs_left:,} MACs, "
            f"counted {record.params_counted:,} and {record.macs_counted:,}"
        )
    record.passed = STEPS[:3]


def _budgets(network: Network, scores: secateur.Scores) -> tuple[float | None, float | None]:
    """Returns how much of half the MACs and of half the parameters plans with such budgets leave."""
    macs = params = None
    with suppress(PlanError):
        macs = round(2 * secateur.allocate(network, scores, macs=0.5).macs / network.macs, 5)
    with suppress(PlanError):
        params = round(2 * secateur.allocate(network, scores, params=0.5).params / network.params, 5)
    return macs, params


def _outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    args, kwargs = as_arguments(inputs)
    fast = torch.backends.mha.get_fastpath_enabled()  # the counter has no formula for torch's fused encoder layer
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return output_tensors(model(*args, **kwargs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _train(record: Record, model: nn.Module, entry: Entry) -> None:
    args, kwargs = as_arguments((entry.training_inputs or entry.inputs)(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    outputs = [t for t in output_tensors(model.train()(*args, **kwargs)) if t.requires_grad]
    torch.stack([(t - 1).square().mean() for t in outputs]).sum().backward()
    if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()):
        raise RuntimeError("no parameter of the cut model got a gradient")
    optimizer.step()
    record.passed = STEPS
