"""A study: models by criteria by ratios, each pruned once, fine-tuned on source domains, tested on an unseen one.

The protocol of arXiv 2504.04196, section III, under one config. Every pruned model is compared with its dense model,
fine-tuned the same way from the same weights; calibration sees training images of the source domains only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from secateur.allocation.allocate import Scope
from secateur.criteria import find_criterion
from secateur.data import DataConfig, load_split
from secateur.errors import InputError, SecateurError, unknown_name
from secateur.experiments.base_models import BASE_MODELS, check_shipped
from secateur.experiments.config import CalibrationConfig, PruneConfig, RunConfig
from secateur.experiments.running import Given, Place, Scored, carry_out, prepare, score_all, unstarted
from secateur.report import Result, append_result, markdown, save_figure, write_text
from secateur.report.provenance import config_hash, plain
from secateur.training import FinetuneConfig, FinetuneProgress

RESULTS, TABLE, FIGURE, CONFIG = "results.jsonl", "table.md", "accuracy.png", "config.json"


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

    def dense(self, model: str, seed: int) -> RunConfig:
        """Returns the configuration of a dense run."""
        return RunConfig(
            model=model,
            data=self.data,
            seed=seed,
            split=self.split,
            finetune=replace(self.finetune, seed=seed),
            latency_batch=self.latency_batch,
        )

    def pruned(self, dense: RunConfig) -> tuple[RunConfig, ...]:
        """Returns the configurations of the runs to be compared with a dense one."""
        calibration = CalibrationConfig(batches=self.calibration_batches, batch_size=self.calibration_batch_size)
        fixed = {"scope": self.scope, "ratios": self.family_ratios, "keep": self.keep, "calibration": calibration}
        prunes = [PruneConfig(criterion=c, ratio=ratio, **fixed) for c in self.criteria for ratio in self.ratios]
        return tuple(replace(dense, prune=prune) for prune in prunes)


def run_study(config: StudyConfig, progress: FinetuneProgress | None = None) -> tuple[Result, ...]:
    """Runs every model, seed, criterion and ratio of `config` and returns the results in that order.

    Each run is appended to `results.jsonl` in `config.out` as soon as it ends, a failed one with its error; the table
    and the figure are written at the end. The other runs go on after a run failed with one of the package's own errors;
    anything else is recorded and ends the study.

    Raises:
        SecateurError: Runs failed; the results of all others are in the folder.
    """
    unseen = load_split(config.data, config.split).unseen
    for name in config.models:
        check_shipped(name, unseen)
    write_text(config.out / CONFIG, json.dumps(plain(config), indent=1) + "\n")
    results: list[Result] = []
    for name in config.models:
        for seed in config.seeds:
            results += _run_model(config, config.dense(name, seed), progress)
    write_text(config.out / TABLE, markdown(results))
    if any(result.delta_acc is not None for result in results if not result.is_dense):
        save_figure(results, config.out / FIGURE)
    if failed := [result for result in results if result.status == "failed"]:
        raise SecateurError(
            f"{len(failed)} of {len(results)} runs failed, the first ({_label(failed[0])}) with: {failed[0].error}; "
            f"everything else is in {config.out}"
        )
    return tuple(results)


def _run_model(config: StudyConfig, dense: RunConfig, progress: FinetuneProgress | None) -> list[Result]:
    """Runs the dense baseline and all pruned variants of one model under one seed."""
    place = Place(config.data)
    prepared = prepare(dense, place)
    known: dict[str, Scored] = {}

    def carried_out(run: RunConfig) -> Result:
        if run.prune and run.score_key not in known:
            known.update(score_all([run], prepared, place))
        watch = progress.run(_label(unstarted(run))) if progress else None
        given = Given(prepared, known[run.score_key] if run.prune else None)
        return carry_out(run, given, place, watch)[0]

    results = [_recorded(config, dense, carried_out)]

    def compared(run: RunConfig) -> Result:
        return replace(carried_out(run), dense_test_acc=results[0].test_acc)

    results += [_recorded(config, run, compared) for run in config.pruned(dense)]
    return results


def _recorded(config: StudyConfig, run: RunConfig, carry_out: Callable[[RunConfig], Result]) -> Result:
    """Returns the run carried out, after appending it to the file, whatever becomes of it."""
    common = {"scope": config.scope, "config_hash": config_hash(replace(config, out=Path("unused")))}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    blank = replace(unstarted(run), status="failed", created=created, **common)
    try:
        result = replace(carry_out(run), **common)
    except SecateurError as error:
        result = replace(blank, error=str(error))
    except BaseException as error:
        append_result(config.out / RESULTS, replace(blank, error=f"{type(error).__name__}: {error}"))
        raise
    append_result(config.out / RESULTS, result)
    return result


def _label(run: Result) -> str:
    return f"{run.model}, dense" if run.criterion is None else f"{run.model}, {run.criterion} {run.ratio:.0%}"
