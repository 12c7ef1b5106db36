"""One run from its configuration to its result: open, probe, score; then prune, fine-tune, test and time.

What runs share (the weights that all start from, and the scores) is made once by `prepare`; `carry_out` does the rest.
Neither reads nor writes anything but the data, pretrained weights, and the checkpoint of its own run, so that both can
be called in this process or in any other, on any machine that has the data.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.allocation import Plan, allocate
from secateur.cost.latency import measure_latency
from secateur.criteria import Scores, calibrate, find_criterion, score
from secateur.data import DataConfig, LabelledImages, Split, load_split
from secateur.data.protocol import PROTOCOLS
from secateur.errors import InputError, SecateurError
from secateur.experiments.base_models import BASE_MODELS, base_model
from secateur.experiments.config import ATTENTION, CalibrationConfig, PruneConfig, RunConfig
from secateur.experiments.models import open_model
from secateur.graph import Network, trace
from secateur.report import Result
from secateur.report.provenance import commit, hardware, versions
from secateur.surgery import ModelSource, build_model, cut
from secateur.training import FinetuneConfig, FinetuneRecord, LogConfig, calibration_batches, evaluate, finetune_
from secateur.training.batches import Batch
from secateur.training.progress import Watcher

LATENCY_ROUNDS = 50
"""Passes of each model whose median is its latency; the more, the less a busy machine shows."""


@dataclass(frozen=True)
class Place:
    """Where a run is carried out: the data there (a name or a folder), the device, folders for checkpoints and logs."""

    data: str
    device: str = "cpu"
    checkpoint: Path | None = None
    log: LogConfig | None = None


@dataclass(frozen=True)
class Scored:
    """Scores by one criterion with the seconds that they took, or the error that there are none for."""

    scores: Scores | None
    seconds: float = 0.0
    error: str = ""


Weights = Mapping[str, NDArray[Any]]
"""The tensors of a model by name, as numpy arrays, which travel between processes without being copied."""


@dataclass(frozen=True)
class Prepared:
    """What runs start from: how to build the model, its weights, and the split with nothing left to choose.

    `source` and `state` are None for a base model, whose weights come with the package.
    """

    split: DataConfig
    source: ModelSource | None = None
    state: Weights | None = None


@dataclass(frozen=True)
class Given:
    """What a run is given by others: what it starts from, its scores, and the weights of its teacher."""

    prepared: Prepared
    scored: Scored | None = None
    teacher: Weights | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its result, the traceback of its error, and the weights of a dense model that is to teach."""

    result: Result
    traceback: str = ""
    weights: Weights | None = None


@dataclass(frozen=True)
class _Start:
    """A model before anything is done to it, with the data it is for and its network."""

    model: nn.Module
    split: Split
    network: Network


# --- what runs share --------------------------------------------------------------------------------------------


def prepare(config: RunConfig, place: Place) -> Prepared:
    """Returns what all runs with the `base_key` of `config` start from.

    Of a model with a new head, the head is trained alone for `probe_epochs` on the source domains.

    Raises what `load_split`, `open_model` and `finetune_` raise.
    """
    if config.model in BASE_MODELS:
        return Prepared(config.split)
    classes = load_split(place.data, config.split).num_classes
    with _seeded(config.seed):
        opened = open_model(
            config.model,
            random_weights=config.weights == "random",
            img_size=config.split.image_size,
            num_classes=classes,
        )
    mean, std = config.split.mean or opened.mean, config.split.std or opened.std
    resolved = replace(config.split, image_size=opened.inputs.shape[-1], mean=mean, std=std)
    if opened.source is None:
        raise InputError(f"{config.model} holds a pruned model; name the original instead")
    if config.probe_epochs:
        _probe_(opened.model.to(place.device), load_split(place.data, resolved), config)
    return Prepared(resolved, opened.source, _weights(opened.model))


def score_all(runs: Sequence[RunConfig], prepared: Prepared, place: Place) -> dict[str, Scored]:
    """Returns the scores that pruned `runs` of one base need, by `score_key`; each calibration pass is made once.

    A criterion that fails with one of the package's own errors leaves the others as they are.
    """
    wanted = {run.score_key: run for run in runs if run.prune}
    start = _start(next(iter(wanted.values())), prepared, place)
    calibrations: dict[CalibrationConfig, Any] = {}
    found: dict[str, Scored] = {}
    for key, run in wanted.items():
        assert run.prune is not None
        how, began = run.prune.calibration, perf_counter()
        try:
            criterion = find_criterion(run.prune.criterion)
            if criterion.needs_batches and how not in calibrations:
                calibrations[how] = calibrate(start.network, start.model, _batches(run, run.prune, start.split))
            given = calibrations[how] if criterion.needs_batches else None
            scores = score(start.network, start.model, criterion, given, seed=run.seed)
        except SecateurError as error:
            found[key] = Scored(None, error=str(error))
        else:
            found[key] = Scored(scores, perf_counter() - began)
    return found


def _start(config: RunConfig, prepared: Prepared, place: Place) -> _Start:
    """Returns a fresh model with the weights that the run starts from, on its device."""
    split = load_split(place.data, prepared.split)
    if prepared.source is None:
        model = base_model(config.model, split.unseen, weights=config.weights == "pretrained")
    else:
        model = build_model(prepared.source, "random")
        _load_(model, prepared.state or {})
    network = trace(model, _images(split, 1))
    return _Start(model.to(place.device), split, network)


def _weights(model: nn.Module) -> Weights:
    return {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}


def _load_(model: nn.Module, weights: Weights) -> None:
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})


def _batches(config: RunConfig, prune: PruneConfig, split: Split) -> list[Batch]:
    how = prune.calibration
    return calibration_batches(split, batches=how.batches, batch_size=how.batch_size, seed=config.seed)


def _probe_(model: nn.Module, split: Split, config: RunConfig) -> None:
    """Trains the head of a model and nothing else."""
    head = {id(p) for module in _heads(model, split.num_classes) for p in module.parameters()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    recipe = FinetuneConfig(
        epochs=config.probe_epochs, warmup_epochs=0.0, seed=config.seed, workers=config.finetune.workers
    )
    for parameter in wanted:
        parameter.requires_grad = id(parameter) in head
    try:
        finetune_(model, split, recipe)
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad = before


def _heads(model: nn.Module, num_classes: int) -> list[nn.Module]:
    """Returns the classifiers of a model: those that timm names, or else its linear layers with an output per class."""
    if callable(named := getattr(model, "get_classifier", None)):
        found: Any = named()
        return list(found) if isinstance(found, tuple | list) else [found]
    heads: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    if not heads:
        raise InputError(f"{type(model).__name__} has no linear layer of {num_classes} outputs; set probe_epochs to 0")
    return heads


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


# --- one run ----------------------------------------------------------------------------------------------------


def carry_out(config: RunConfig, given: Given, place: Place, watch: Watcher | None = None) -> tuple[Result, nn.Module]:
    """Returns the result of a run, pruned by the scores given or dense, and fine-tuned; and the model it ended with.

    `dense_test_acc` is that of another run, so it is left open, but for the dense run itself.

    Raises what allocation, the cut and fine-tuning raise, and InputError if scores failed or a teacher is lacking.
    """
    start = _start(config, given.prepared, place)
    run = replace(unstarted(config), dense_params=start.network.params, dense_macs=start.network.macs)
    if config.split.without is None:
        run = replace(run, unseen=start.split.unseen, protocol=start.split.protocol)
    if config.has_teacher and given.teacher is None:
        raise InputError(f"{config.label} learns from its dense baseline, which has left no weights")
    teacher = None
    if given.teacher is not None:
        teacher = copy.deepcopy(start.model)
        _load_(teacher, given.teacher)

    def tuned(model: nn.Module) -> Result:
        record = finetune_(
            model,
            start.split,
            config.finetune,
            progress=watch,
            checkpoint=place.checkpoint,
            log=place.log,
            teacher=teacher,
        )
        return _tested(config, run, model, start.split, record)

    if config.prune is None:
        result, model = _dense(config, start, tuned, place), start.model
    else:
        if given.scored is None or given.scored.scores is None:
            raise InputError(given.scored.error if given.scored else f"{config.label} was given no scores")
        result, model = _pruned(config, start, given.scored, tuned, place)
    return replace(result, created=datetime.now(UTC).isoformat(timespec="seconds")), model


def attempt(
    config: RunConfig, given: Given, place: Place, watch: Watcher | None = None, *, is_teacher: bool = False
) -> Outcome:
    """Returns how `carry_out` ended, well or not; with the weights of the model if it is to be a teacher."""
    try:
        result, model = carry_out(config, given, place, watch)
    # Whatever happens to a run must not end the others.
    except Exception as error:  # noqa: BLE001
        return Outcome(failed(config, error), traceback.format_exc())
    return Outcome(result, weights=_weights(model) if is_teacher else None)


def failed(config: RunConfig, error: BaseException | str) -> Result:
    """Returns a run that failed, with its error."""
    own = isinstance(error, SecateurError | str)
    told = str(error) if own else f"{type(error).__name__}: {error}".split("\n", 1)[0]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(unstarted(config), status="failed", error=told, created=now)


def unstarted(config: RunConfig) -> Result:
    """Returns a run that has not been carried out yet: all that its configuration tells of it."""
    prune = config.prune
    return Result(
        model=config.model,
        criterion=prune.criterion if prune else None,
        ratio=0.0 if prune is None else _ratio(prune, None),
        scope=prune.scope if prune else "",
        seed=config.seed,
        data=config.data,
        unseen=config.split.unseen,
        without=config.split.without,
        protocol=PROTOCOLS.get(config.split.split, config.split.split),
        config_hash=config.hash,
        run=config.hash,
        config=config.to_json(),
        commit=commit(),
        versions=versions(),
        hardware=hardware(),
    )


def _ratio(prune: PruneConfig, dense_macs: int | None) -> float:
    """Returns the fraction to remove: of the channels or, under a budget, of the MACs (0 if that is not known yet)."""
    if prune.ratio is not None or prune.macs is None:
        return prune.ratio or 0.0
    left = prune.macs if isinstance(prune.macs, float) else prune.macs / dense_macs if dense_macs else 1.0
    return round(1.0 - left, 6)


Tune = Callable[[nn.Module], Result]
"""Fine-tunes a model in place, tests it, and returns the run with what came of that."""


def _dense(config: RunConfig, start: _Start, tuned: Tune, place: Place) -> Result:
    run = tuned(start.model)
    images = _images(start.split, config.latency_batch).to(place.device)
    seconds = measure_latency({"dense": start.model}, images, rounds=LATENCY_ROUNDS)["dense"]
    return replace(
        run,
        params=start.network.params,
        macs=start.network.macs,
        dense_test_acc=run.test_acc,
        latency=seconds,
        dense_latency=seconds,
    )


def _pruned(config: RunConfig, start: _Start, scored: Scored, tuned: Tune, place: Place) -> tuple[Result, nn.Module]:
    prune = config.prune
    assert prune is not None
    assert scored.scores is not None
    began = perf_counter()
    plan = _plan(prune, start.network, scored.scores)
    batches = _batches(config, prune, start.split) if prune.compensate else None
    model = cut(start.model, plan, compensate=batches)
    seconds = scored.seconds + perf_counter() - began
    run = tuned(model)
    images = _images(start.split, config.latency_batch).to(place.device)
    times = measure_latency({"dense": start.model, "pruned": model}, images, rounds=LATENCY_ROUNDS)
    result = replace(
        run,
        ratio=_ratio(prune, plan.dense_macs),
        params=plan.params,
        macs=plan.macs,
        latency=times["pruned"],
        dense_latency=times["dense"],
        prune_seconds=seconds,
        widths=_widths(plan),
    )
    return result, model


def _plan(prune: PruneConfig, network: Network, scores: Scores) -> Plan:
    kinds = {group.kind for group in network.groups}
    attention = {kind: ratio for kind, ratio in ATTENTION[prune.attention].items() if kind in kinds}
    return allocate(
        network,
        scores,
        ratio=prune.ratio,
        macs=prune.macs,
        scope=prune.scope,
        ratios=attention | dict(prune.ratios),
        keep=prune.keep,
        min_channels=prune.min_channels,
        round_to=prune.round_to,
    )


def _widths(plan: Plan) -> tuple[dict[str, Any], ...]:
    """Returns what became of each group, as plain values."""
    return tuple(
        {"name": g.name, "kind": g.kind, "family": g.family, "before": list(g.before), "after": list(g.after)}
        for g in plan.groups
    )


def _tested(config: RunConfig, run: Result, model: nn.Module, split: Split, record: FinetuneRecord) -> Result:
    """Returns the run with accuracies, the course of training and the time that it took."""

    def accuracy(images: LabelledImages) -> float:
        return evaluate(model, images, num_classes=split.num_classes, workers=config.finetune.workers)

    test = accuracy(split.test)
    domains = {domain: accuracy(_of_domain(split.val, domain)) for domain in sorted(set(split.val.domains))}
    return replace(
        run,
        val_acc=accuracy(split.val),
        test_acc=test,
        domain_acc=domains | ({split.unseen: test} if split.unseen else {}),
        finetune_seconds=record.seconds,
        train_images_per_second=record.images_per_second,
        selection=record.selection,
        curve=_curve(record),
    )


def _curve(record: FinetuneRecord) -> tuple[dict[str, float], ...]:
    return tuple(
        {"epoch": e.epoch, "loss": e.train_loss, "train_acc": e.train_accuracy, "val_acc": e.val_accuracy, "lr": e.lr}
        for e in record.epochs
    )


def _of_domain(images: LabelledImages, domain: str) -> LabelledImages:
    return images.take(np.flatnonzero([its == domain for its in images.domains]))


def _images(split: Split, count: int) -> Tensor:
    return torch.stack([split.val[i][0] for i in range(min(count, len(split.val)))])
