"""A study: models by criteria by ratios, each pruned once, fine-tuned on source domains, tested on an unseen one.

The protocol of arXiv 2504.04196, section III, under one config. Every pruned model is compared with its dense model,
fine-tuned the same way from the same weights; calibration sees training images of the source domains only.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.allocation import allocate
from secateur.allocation.allocate import Scope
from secateur.cost.latency import measure_latency
from secateur.criteria import Scores, find_criterion, score
from secateur.data import DataConfig, Split, load_split
from secateur.errors import InputError, SecateurError, unknown_name
from secateur.experiments.base_models import BASE_MODELS, base_model
from secateur.graph import Network, trace
from secateur.report import Result, append_result, markdown, save_figure, write_text
from secateur.report.provenance import commit, config_hash, hardware, plain, versions
from secateur.surgery import cut
from secateur.training import FinetuneConfig, FinetuneProgress, calibration_batches, evaluate, finetune_

RESULTS, TABLE, FIGURE, CONFIG = "results.jsonl", "table.md", "accuracy.png", "config.json"
LATENCY_ROUNDS = 50
"""Passes of each model whose median is its latency; the more, the less a busy machine shows."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is compared, on which data, and where the results go.

    `models` are built-in base models, `criteria` names known to `secateur.score`, `ratios` fractions of channels to
    remove; `family_ratios` and `keep` go to `allocate` and hold at every ratio. Each of `seeds` draws calibration
    images, scores of `random`, and the order of fine-tuning; the split has its own seed in `split`. Latency is timed
    on `latency_batch` images. `out` is a folder that does not exist yet, or is empty.
    """

    out: Path
    models: tuple[str, ...] = ("vit_digits",)
    criteria: tuple[str, ...] = ("l1", "l2", "taylor", "hessian", "random")
    ratios: tuple[float, ...] = (0.5, 0.75, 0.95)
    scope: Scope = "global"
    family_ratios: Mapping[str, float] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    data: str = "digits-dg"
    split: DataConfig = field(default_factory=DataConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    seeds: tuple[int, ...] = (0,)
    calibration_batches: int = 10
    calibration_batch_size: int = 64
    latency_batch: int = 32

    def __post_init__(self) -> None:
        """Raises InputError for what would otherwise fail late: unknown names, ratios out of range, a folder in use."""
        for name in ("models", "criteria", "ratios", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} must hold at least one value and none twice, found {values}")
        for model in self.models:
            if model not in BASE_MODELS:
                raise unknown_name("base model", model, BASE_MODELS)
        for criterion in self.criteria:
            find_criterion(criterion)
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise InputError(f"a ratio is the fraction of channels to remove, between 0 and 1; found {ratio}")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise InputError(f"{self.out} is in use already; name a folder that does not exist, or remove it first")

    @property
    def num_runs(self) -> int:
        """The number of fine-tuning runs, the dense ones included."""
        return len(self.models) * len(self.seeds) * (1 + len(self.criteria) * len(self.ratios))


@dataclass(frozen=True)
class _Setting:
    """What all runs of one model and seed share."""

    config: StudyConfig
    name: str
    seed: int
    split: Split
    base: nn.Module
    network: Network
    progress: FinetuneProgress | None


def run_study(config: StudyConfig, progress: FinetuneProgress | None = None) -> tuple[Result, ...]:
    """Runs every model, seed, criterion and ratio of `config` and returns the results in that order.

    Each run is appended to `results.jsonl` in `config.out` as soon as it ends, a failed one with its error; the table
    and the figure are written at the end. The other runs go on after a run failed with one of the package's own errors;
    anything else is recorded and ends the study.

    Raises:
        SecateurError: Runs failed; the results of all others are in the folder.
    """
    split = load_split(config.data, config.split)
    bases = {name: base_model(name, split.unseen) for name in config.models}
    write_text(config.out / CONFIG, json.dumps(plain(config), indent=1) + "\n")
    results: list[Result] = []
    for name, base in bases.items():
        network = trace(base, _images(split, 1))
        for seed in config.seeds:
            results += _run_model(_Setting(config, name, seed, split, base, network, progress))
    write_text(config.out / TABLE, markdown(results))
    if any(result.delta_acc is not None for result in results if not result.is_dense):
        save_figure(results, config.out / FIGURE)
    if failed := [result for result in results if result.status == "failed"]:
        raise SecateurError(
            f"{len(failed)} of {len(results)} runs failed, the first ({_label(failed[0])}) with: {failed[0].error}; "
            f"everything else is in {config.out}"
        )
    return tuple(results)


def _run_model(setting: _Setting) -> list[Result]:
    """Runs the dense baseline and all pruned variants of one model under one seed."""
    dense = _recorded(setting, _blank(setting, None, 0.0), lambda run: _dense(setting, run))
    results = [dense]
    known: dict[str, Scores] = {}

    def pruned(run: Result) -> Result:
        criterion = str(run.criterion)
        if criterion not in known:
            known[criterion] = _scores(setting, criterion)
        return replace(_pruned(setting, run, known[criterion]), dense_test_acc=dense.test_acc)

    for criterion in setting.config.criteria:
        for ratio in setting.config.ratios:
            results.append(_recorded(setting, _blank(setting, criterion, ratio), pruned))
    return results


def _recorded(setting: _Setting, run: Result, carry_out: Callable[[Result], Result]) -> Result:
    """Returns the run carried out, after appending it to the file, whatever becomes of it."""
    file = setting.config.out / RESULTS
    try:
        result = carry_out(run)
    except SecateurError as error:
        result = replace(run, status="failed", error=str(error))
    except BaseException as error:
        append_result(file, replace(run, status="failed", error=f"{type(error).__name__}: {error}"))
        raise
    result = replace(result, created=datetime.now(UTC).isoformat(timespec="seconds"))
    append_result(file, result)
    return result


def _blank(setting: _Setting, criterion: str | None, ratio: float) -> Result:
    """Returns a run that has not been carried out yet: all that is known of it beforehand."""
    config, split = setting.config, setting.split
    return Result(
        model=setting.name,
        criterion=criterion,
        ratio=ratio,
        scope=config.scope,
        seed=setting.seed,
        data=config.data,
        unseen=split.unseen,
        protocol=split.protocol,
        dense_params=setting.network.params,
        dense_macs=setting.network.macs,
        config_hash=config_hash(replace(config, out=Path("unused"))),
        commit=commit(),
        versions=versions(),
        hardware=hardware(),
    )


def _label(run: Result) -> str:
    return f"{run.model}, dense" if run.criterion is None else f"{run.model}, {run.criterion} {run.ratio:.0%}"


def _images(split: Split, count: int) -> Tensor:
    return torch.stack([split.val[i][0] for i in range(min(count, len(split.val)))])


def _scores(setting: _Setting, criterion: str) -> Scores:
    config = setting.config
    batches = calibration_batches(
        setting.split, batches=config.calibration_batches, batch_size=config.calibration_batch_size, seed=setting.seed
    )
    return score(setting.network, setting.base, criterion, batches, seed=setting.seed)


def _dense(setting: _Setting, run: Result) -> Result:
    model = copy.deepcopy(setting.base)
    tuned = _finetuned(setting, run, model)
    images = _images(setting.split, setting.config.latency_batch)
    seconds = measure_latency({"dense": model}, images, rounds=LATENCY_ROUNDS)["dense"]
    return replace(
        tuned,
        params=setting.network.params,
        macs=setting.network.macs,
        dense_test_acc=tuned.test_acc,
        latency=seconds,
        dense_latency=seconds,
    )


def _pruned(setting: _Setting, run: Result, scores: Scores) -> Result:
    config = setting.config
    ratios = dict(config.family_ratios)
    plan = allocate(setting.network, scores, ratio=run.ratio, scope=config.scope, ratios=ratios, keep=config.keep)
    model = cut(setting.base, plan)
    tuned = _finetuned(setting, run, model)
    images = _images(setting.split, config.latency_batch)
    seconds = measure_latency({"dense": setting.base, "pruned": model}, images, rounds=LATENCY_ROUNDS)
    return replace(tuned, params=plan.params, macs=plan.macs, latency=seconds["pruned"], dense_latency=seconds["dense"])


def _finetuned(setting: _Setting, run: Result, model: nn.Module) -> Result:
    """Returns the run with accuracies and the time taken, after fine-tuning `model` in place."""
    split = setting.split
    watcher = setting.progress.run(_label(run)) if setting.progress else None
    record = finetune_(model, split, replace(setting.config.finetune, seed=setting.seed), progress=watcher)
    return replace(
        run,
        val_acc=evaluate(model, split.val, num_classes=split.num_classes),
        test_acc=evaluate(model, split.test, num_classes=split.num_classes),
        finetune_seconds=record.seconds,
    )
