"""Measures one base model on one unseen domain under one seed: every setting at every budget."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from accuracy import peer
from accuracy.records import Record, Setting, Unit
from secateur.criteria import calibrate
from secateur.criteria.activations import Moments, Use, watching
from secateur.data import DataConfig, Split, load_split
from secateur.errors import PlanError
from secateur.experiments.base_models import base_model
from secateur.training import FinetuneConfig, calibration_batches, calibration_by_domain, evaluate, finetune_

BUDGETS = (0.5, 0.3, 0.15)
"""Fractions of the dense model's MACs that may remain."""

RATIOS: dict[str, dict[str, float | None]] = {"heads": {}, "dims": {"heads": 0.0, "head_dims": None}}
"""What attention loses."""

SHORT = FinetuneConfig(epochs=5, warmup_epochs=0.5)
"""The fine-tuning that every pruned model gets."""


@dataclass(frozen=True, eq=False)
class Bench:
    """What all measurements of one unit share."""

    unit: Unit

    @cached_property
    def split(self) -> Split:
        return load_split("digits-dg", DataConfig(unseen=self.unit.unseen))

    @cached_property
    def base(self) -> nn.Module:
        return base_model(self.unit.model, self.unit.unseen)

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """640 training images of the source domains."""
        return calibration_batches(self.split, seed=self.unit.seed)

    @cached_property
    def network(self) -> secateur.Network:
        return secateur.trace(self.base, self.batches[0][0][:1])

    @cached_property
    def calibration(self) -> Any:
        return calibrate(self.network, self.base, self.batches)

    @cached_property
    def by_domain(self) -> dict[str, Any]:
        batches = calibration_by_domain(self.split, seed=self.unit.seed)
        return {domain: calibrate(self.network, self.base, own) for domain, own in batches.items()}

    @cached_property
    def scores(self) -> dict[str, secateur.Scores]:
        return {}

    @cached_property
    def peers(self) -> dict[str, tuple[nn.Module, Any]]:
        return {}

    def accuracy(self, model: nn.Module) -> tuple[float, float]:
        """Returns accuracy on the source domains' validation part and on the unseen domain."""
        val, test = (evaluate(model, part, num_classes=10) for part in (self.split.val, self.split.test))
        return val, test


def measure(bench: Bench, settings: Sequence[Setting], budgets: Sequence[float], *, tune: bool) -> Iterator[Record]:
    """Yields a record for each setting and budget; with `tune`, the short fine-tuning follows."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for setting in settings:
        for budget in budgets:
            start = time.perf_counter()
            blank = Record(bench.unit, setting, budget)
            model, error = _pruned(bench, setting, budget)
            if model is None:
                yield replace(blank, error=error)
                continue
            left = secateur.trace(model, bench.batches[0][0][:1])
            val, test = bench.accuracy(model)
            record = replace(
                blank,
                macs=left.macs / bench.network.macs,
                params=left.params / bench.network.params,
                val=val,
                test=test,
            )
            if tune:
                finetune_(model, bench.split, replace(SHORT, seed=bench.unit.seed))
                val, test = bench.accuracy(model)
                record = replace(record, tuned_val=val, tuned_test=test)
            yield replace(record, seconds=time.perf_counter() - start)


Task = tuple[Unit, list[tuple[Setting, float]], bool]
"""A unit, some of what to measure of it, and whether to fine-tune."""


def work(task: Task) -> list[Record]:
    """Makes some of the measurements of one unit."""
    unit, wanted, tune = task
    bench = Bench(unit)
    records: list[Record] = []
    for setting, budget in wanted:
        if setting.library == "dense":
            records.append(dense(bench, tune=tune))
        else:
            records += measure(bench, [setting], [budget], tune=tune)
    return records


def dense(bench: Bench, *, tune: bool) -> Record:
    """Returns the record of the dense model."""
    model = copy.deepcopy(bench.base)
    val, test = bench.accuracy(model)
    record = Record(bench.unit, Setting("dense", "dense", ""), 1.0, 1.0, 1.0, val, test)
    if tune:
        finetune_(model, bench.split, replace(SHORT, seed=bench.unit.seed))
        val, test = bench.accuracy(model)
        record = replace(record, tuned_val=val, tuned_test=test)
    return record


def _pruned(bench: Bench, setting: Setting, budget: float) -> tuple[nn.Module | None, str]:
    """Returns the pruned model, or None and why there is none."""
    if setting.library == "torch-pruning":
        macs = int(budget * bench.network.macs)
        if setting.criterion not in bench.peers:
            bench.peers[setting.criterion] = peer.scored(bench.base, setting.criterion, bench.batches)
        prepared, image = bench.peers[setting.criterion], bench.batches[0][0][:1]
        found = peer.at_budget(prepared, setting, macs, image, bench.unit.seed)
        return (None, "no ratio gives a model within the budget that runs") if found is None else (found[0], "")
    if setting.criterion not in bench.scores:
        name, _, combine = setting.criterion.partition(" ")
        samples = bench.by_domain if combine else bench.calibration
        bench.scores[setting.criterion] = secateur.score(
            bench.network, bench.base, name, samples, seed=bench.unit.seed, combine=combine or None
        )
    scores = bench.scores[setting.criterion]
    try:
        plan = secateur.allocate(
            bench.network, scores, macs=budget, scope=setting.scope, ratios=RATIOS[setting.attention]
        )
    except PlanError as error:
        return None, str(error)
    model = copy.deepcopy(bench.base)
    secateur.cut_(model, plan, compensate=bench.batches if setting.compensation == "full" else None)
    if setting.compensation == "mean":
        shift_means_(model, bench.base, plan, bench.batches)
    return model, ""


def shift_means_(
    model: nn.Module, base: nn.Module, plan: secateur.Plan, batches: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Adds to the biases of a cut model what removed inputs gave on average: variance-based pruning's compensation."""
    layers = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and m.bias is not None}
    moments: dict[str, Moments] = {}

    def add(use: Use) -> Tensor:
        rows = use.inputs()
        moments.setdefault(use.name, Moments.zeros(1, rows.shape[-1], rows.device)).add(rows)
        return use.run()

    with watching({f"{n}.weight": m.weight for n, m in layers.items()}, add):
        for images, _ in batches:
            base(images)
    gone = {(c.tensor, c.dim): torch.from_numpy(c.indices) for c in plan.cuts}
    for name, layer in layers.items():
        columns = gone.get((f"{name}.weight", 1))
        if columns is None:
            continue
        mean = moments[f"{name}.weight"].mean[0]
        shift = layer.weight.detach().double()[:, columns] @ mean[columns]
        rows = torch.ones(shift.numel(), dtype=torch.bool)
        if (f"{name}.weight", 0) in gone:
            rows[gone[f"{name}.weight", 0]] = False
        bias = model.get_submodule(name).bias
        with torch.no_grad():
            bias += shift[rows].to(bias.dtype)
