"""What the zoo report says of one architecture: analyse it, cut it by half, check it, train it one step."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur
from secateur.graph.labels import tensors_in
from secateur.graph.network import Network, STAYS
from zoo.catalogue import Entry

NO_RULE = "no rule for the operator"


@dataclass
class Record:
    name: str
    library: str
    family: str
    seconds: float = 0.0
    params: int = 0
    macs: int = 0
    prunable_params: float = 0.0
    prunable_macs: float = 0.0
    without_rule: float = 0.0
    frozen: dict[str, int] = field(default_factory=dict)
    unknown: tuple = ()
    groups: dict[str, int] = field(default_factory=dict)
    params_left: int = 0
    macs_left: int = 0
    macs_counted: int = 0
    passed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""


def analyse(entry: Entry, record: Record, model: nn.Module, inputs: Any) -> Network:
    start = time.perf_counter()
    network = secateur.trace(model, inputs)
    record.seconds = time.perf_counter() - start
    record.params, record.macs = network.params, network.macs
    nothing = np.zeros(network.num_channels + 1, bool)
    nothing[STAYS] = True
    record.prunable_params = 1 - network.params_cost(nothing) / max(1, network.params)
    record.prunable_macs = 1 - network.macs_cost(nothing) / max(1, network.macs)
    record.unknown = network.unknown_operators
    record.notes = network.notes
    record.groups = dict(Counter(g.family for g in network.groups))
    shapes = {n: p.shape for n, p in model.named_parameters()}
    free: dict[str, list] = {}
    for a in network.axes:
        if a.tensor in shapes:
            f = ((a.channels >= 0) | (a.owners >= 0)).mean()
            free.setdefault(a.tensor, []).append(f)
    reasons: Counter = Counter()
    bad = 0
    why: dict[str, set] = {}
    for f in network.frozen:
        why.setdefault(f.tensor, set()).add((f.reason, f.where))
    for n, s in shapes.items():
        stuck = s.numel() * float(np.prod([1 - f for f in free.get(n, [])]))
        if stuck > 0:
            for r in why.get(n, {("size 1", "")}):
                reasons[" @ ".join(r)] += int(stuck)
            if any(NO_RULE in r for r, _ in why.get(n, ())):
                bad += stuck
    record.frozen = dict(reasons.most_common(12))
    record.without_rule = bad / max(1, record.params)
    return network


def outputs_of(value: Any) -> list[torch.Tensor]:
    from secateur.graph.tracer import output_tensors

    return [t for t in output_tensors(value) if t.is_floating_point()]


def examine(entry: Entry, deep: bool = True) -> Record:
    record = Record(entry.name, entry.library, entry.family)
    try:
        torch.manual_seed(0)
        if deep:
            model = entry.build().eval()
        else:
            with torch.device("meta"):
                model = entry.build().eval()
        inputs = entry.inputs(model)
        network = analyse(entry, record, model, inputs)
        if not deep:
            return record
        passed = []
        plan = secateur.allocate(network, secateur.score(network, model, "l1"), ratio=0.5, scope="local")
        record.params_left, record.macs_left = plan.params, plan.macs
        record.notes += plan.notes
        secateur.cut_(model, plan)
        passed.append("check")
        args, kwargs = secateur.graph.tracer.as_arguments(inputs)
        counter = FlopCounterMode(display=False)
        torch.backends.mkldnn.set_flags(False)
        torch.backends.mha.set_fastpath_enabled(False)
        wanted = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        with torch.no_grad(), counter:
            model(*args, **kwargs)
        for p in wanted:
            p.requires_grad_(True)
        record.macs_counted = counter.get_total_flops() // 2 // secateur.graph.groups.batch_size(inputs)
        passed.append("eval")
        model.train()
        given = (entry.training_inputs or entry.inputs)(model)
        targs, tkwargs = secateur.graph.tracer.as_arguments(given)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        sum(t.square().mean() for t in outputs_of(model(*targs, **tkwargs)) if t.requires_grad).backward()
        optimizer.step()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads
        passed.append("train")
        if record.macs_counted != record.macs_left:
            record.error = f"macs {record.macs_left} counted {record.macs_counted}"
        if record.params_left == record.params:
            record.error = "unpruned"
    except Exception as error:
        import traceback

        tb = traceback.extract_tb(error.__traceback__)[-1]
        record.error = f"{type(error).__name__}: {error} [{tb.filename.split('/')[-1]}:{tb.lineno}]"[:600]
    record.passed = tuple(passed) if deep and "passed" in dir() else ()
    return record
