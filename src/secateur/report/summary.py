"""Runs that belong together: which are repetitions of one setting, and their means over unseen domains and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath
from statistics import fmean, pstdev
from typing import Any

from secateur.report.results import Result

DENSE = "dense"
Measure = Callable[[Result], float | None]
_Key = tuple[str, str, bool]


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds with its standard error, population deviation / sqrt(count); None for one seed."""

    mean: float
    error: float | None
    count: int


@dataclass(frozen=True)
class Run:
    """A result with its place in the report, and the name of what was done: criterion, and what else sets it apart."""

    index: int
    result: Result
    method: str


@dataclass(frozen=True)
class Setting:
    """All runs of one model, method and ratio in a block: one per unseen domain and seed, failed ones included.

    `domains` are the unseen domains that the model was to be tested on (None: there is none).
    """

    model: str
    method: str
    ratio: float
    runs: tuple[Run, ...]
    domains: tuple[str | None, ...]

    @property
    def criterion(self) -> str | None:
        """The criterion; None for the dense baseline, and for a setting that was never run."""
        return self.runs[0].result.criterion if self.runs else None

    @property
    def indices(self) -> tuple[int, ...]:
        """The places of the runs in the report."""
        return tuple(run.index for run in self.runs)

    def estimate(self, measure: Measure, domains: Sequence[str | None] | None = None) -> Estimate | None:
        """Returns the mean of a quantity, averaged first over `domains` (default: all) within each seed.

        A seed that lacks a domain does not count; None if none is left.
        """
        wanted = self.domains if domains is None else domains
        seeds: dict[int, dict[str | None, float]] = {}
        for run in self.runs:
            value = measure(run.result)
            if run.result.status == "ok" and value is not None:
                seeds.setdefault(run.result.seed, {})[run.result.unseen] = value
        means = [fmean(seed[d] for d in wanted) for seed in seeds.values() if all(d in seed for d in wanted)]
        if not means:
            return None
        error = pstdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
        return Estimate(fmean(means), error, len(means))

    @property
    def state(self) -> str:
        """Why there is no mean: not run, failed, or which share of the domains is there. Empty if there is one."""
        if self.estimate(lambda r: r.test_acc) is not None:
            return ""
        if not self.runs:
            return "not run"
        done = {run.result.unseen for run in self.runs if run.result.test_acc is not None}
        if done:
            return f"{len(done)} of {len(self.domains)} domains"
        return "failed" if any(run.result.status == "failed" for run in self.runs) else "no accuracy"


@dataclass(frozen=True)
class Block:
    """What may be compared: runs on one data set under one protocol.

    `is_oracle` says whether the epoch was chosen by looking at the unseen domain; such runs make a block of their own.
    `folds` are runs of cross-validation, which serve to choose among settings and are not reported themselves.
    """

    data: str
    protocol: str
    is_oracle: bool
    runs: tuple[Run, ...]
    folds: tuple[Run, ...] = ()

    @property
    def title(self) -> str:
        """Data and protocol."""
        oracle = ["oracle selection"] if self.is_oracle else []
        return ", ".join([data_name(self.data), self.protocol, *oracle])

    @property
    def is_generalisation(self) -> bool:
        """Whether the test images are of a domain that was not trained on."""
        ended = [run for run in self.runs if run.result.status == "ok"]
        return all(run.result.unseen for run in ended or self.runs)

    @property
    def selection(self) -> str:
        """How epochs were chosen, as far as the runs tell; which epoch it was (after a colon) is each run's own."""
        told = [run.result.selection.partition(":")[0] for run in self.runs]
        return "; ".join(dict.fromkeys(filter(None, told)))

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Models in the order in which they appear."""
        return tuple(dict.fromkeys(run.result.model for run in self.runs))

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """All unseen domains, sorted."""
        return tuple(sorted({run.result.unseen for run in self.runs if run.result.unseen}))

    def settings(self, model: str) -> tuple[Setting, ...]:
        """Returns the dense baselines of a model, then every method at every ratio of the block, also those not run."""
        mine = [run for run in self.runs if run.result.model == model]
        domains = self._tested(model)
        parts: dict[tuple[str, float], list[Run]] = {}
        for run in mine:
            parts.setdefault((run.method, run.result.ratio), []).append(run)
        pruned = [run for run in self.runs if not run.result.is_dense]
        ratios = sorted({run.result.ratio for run in pruned})
        methods = dict.fromkeys(run.method for run in pruned)
        keys = list(dict.fromkeys((run.method, run.result.ratio) for run in mine if run.result.is_dense))
        keys = (keys or [(DENSE, 0.0)]) + [(method, ratio) for ratio in ratios for method in methods]
        return tuple(Setting(model, m, ratio, tuple(parts.get((m, ratio), ())), domains) for m, ratio in keys)

    def describe_domains(self, model: str) -> str:
        """Returns what the accuracies of a model are of, in words."""
        domains = self._tested(model)
        if not self.is_generalisation:
            return "pooled domains (i.i.d.), not domain generalisation"
        return f"unseen domain {domains[0]}" if len(domains) == 1 else f"mean of {len(domains)} unseen domains"

    def _tested(self, model: str) -> tuple[str | None, ...]:
        """Returns the unseen domains of a model, (None,) where there are none; a failed run may not know its own."""
        unseen = {run.result.unseen for run in self.runs if run.result.model == model}
        return tuple(sorted(filter(None, unseen))) or (None,)


def data_name(data: str) -> str:
    """Returns the name of a data set, of a folder its last part."""
    return PurePath(data).name or data


def distinct(results: Sequence[Result]) -> tuple[Result, ...]:
    """Returns the runs without those that were run again or given twice: the last one of each counts.

    Folds of cross-validation that go with no run are left out as well.
    """
    last: dict[Any, Result] = {}
    for result in results:
        key = result.run or (*_place(result), result.config_hash)
        last.pop(key, None)
        last[key] = result
    reported = {(run.data, run.protocol) for run in last.values() if run.without is None}
    return tuple(run for run in last.values() if (run.data, run.protocol) in reported)


def blocks(results: Sequence[Result]) -> tuple[Block, ...]:
    """Returns what may be compared with one another; runs are numbered by their place in `results`."""
    runs = [Run(i, *pair) for i, pair in enumerate(zip(results, _methods(results), strict=True))]
    parts: dict[_Key, list[Run]] = {}
    for run in runs:
        if run.result.without is None:
            key = (run.result.data, run.result.protocol, _is_oracle(run.result))
            parts.setdefault(key, []).append(run)
    folds: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.result.without is not None:
            folds.setdefault((run.result.data, run.result.protocol), []).append(run)
    found = _adopted({key: Block(*key, tuple(its)) for key, its in parts.items()})
    return tuple(replace(block, folds=tuple(folds.get((block.data, block.protocol), ()))) for block in found)


def _is_oracle(result: Result) -> bool:
    return "oracle" in result.selection.lower()


def _adopted(found: Mapping[_Key, Block]) -> tuple[Block, ...]:
    """Returns the blocks, those in which every run failed put with others of their data.

    A run that fails early knows neither the name of its protocol nor how an epoch is chosen.
    """
    ended = [key for key, block in found.items() if any(run.result.status == "ok" for run in block.runs)]
    kept = {key: list(block.runs) for key, block in found.items()}
    for key in found.keys() - ended:
        homes = [home for home in ended if home[0] == key[0]]
        homes.sort(key=lambda home: found[home].is_generalisation != found[key].is_generalisation)
        if homes:
            kept[homes[0]] += kept.pop(key)
    return tuple(Block(*key, tuple(sorted(runs, key=lambda run: run.index))) for key, runs in kept.items())


def _place(result: Result) -> tuple[Any, ...]:
    """Returns what the report tells runs apart by."""
    return (
        *(result.data, result.protocol, _is_oracle(result), result.unseen, result.without),
        *(result.model, result.criterion, result.scope, result.ratio, result.seed),
    )


def _methods(results: Sequence[Result]) -> list[str]:
    """Returns a name for what was done in each run.

    Mostly the criterion alone; with its scope where there are several; and wherever two runs would otherwise pass for
    repetitions of one setting under one seed, with what tells their configurations apart.
    """
    together: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    leaves = [dict(flat(r.config)) or {"config": r.config_hash} for r in results]
    for result, leaf in zip(results, leaves, strict=True):
        together.setdefault(_place(result), []).append(leaf)
    varying: dict[str, None] = {}
    for same in together.values():
        names = dict.fromkeys(name for leaf in same for name in leaf)
        varying |= dict.fromkeys(name for name in names if any(leaf.get(name) != same[0].get(name) for leaf in same))
    scopes: dict[str, set[str]] = {}
    for result in results:
        if not result.is_dense:
            scopes.setdefault(result.data, set()).add(result.scope)
    methods = []
    for result, leaf in zip(results, leaves, strict=True):
        parts = [result.criterion or DENSE]
        parts += [result.scope] if not result.is_dense and len(scopes[result.data]) > 1 else []
        methods.append(", ".join(parts + [f"{name} {leaf[name]}" for name in varying if name in leaf]))
    return methods


def flat(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of a configuration with their dotted names, lists as one value."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, config
