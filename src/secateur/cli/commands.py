"""The commands, one dataclass each: its fields are the arguments, its call does the work."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

import secateur
from secateur.allocation import Budget, Preset, find_preset
from secateur.allocation.allocate import Scope
from secateur.cost import LatencyTable
from secateur.criteria import Criterion, find_criterion
from secateur.errors import InputError
from secateur.experiments.config import ATTENTION, Attention
from secateur.experiments.models import Opened, is_saved, open_model
from secateur.graph import Network
from secateur.report import (
    check_drawing,
    describe,
    describe_plan,
    explain,
    save_drawing,
)

ModelName = Annotated[
    Positional[str],
    arg(
        metavar="MODEL",
        help="timm name; hf:NAME or a name with a slash (Hugging Face); torchvision:NAME; or a saved directory",
    ),
]


@dataclass(frozen=True)
class Trace:
    """Show what can be pruned in a model: families, groups, cost, and what is left alone and why."""

    model: ModelName
    random_weights: bool = False
    """Do not look for pretrained weights."""
    img_size: int | None = None
    """Pixels per side of the example image; default: what the model was published with."""
    explain: bool = False
    """Also tell every layer, what goes with each group and all that stays, and draw it (to MODEL.svg)."""
    drawing: Path | None = None
    """Draw the network to this file, as SVG or PNG by its suffix."""
    explain_axis: Annotated[tuple[str, int] | None, arg(metavar="TENSOR DIM")] = None
    """Tell what goes with one dimension of one tensor instead, as in: --explain-axis blocks.3.attn.qkv.weight 0"""

    def __call__(self, console: Console) -> None:
        """Prints the description, and draws the network if that was asked for."""
        drawing = self.drawing or (Path(f"{_file_name(self.model)}.svg") if self.explain else None)
        if drawing is not None:
            check_drawing(drawing)
        opened = open_model(
            self.model, random_weights=self.random_weights, img_size=_positive("img-size", self.img_size)
        )
        start = perf_counter()
        network = secateur.trace(opened.model, opened.inputs)
        seconds = perf_counter() - start
        axis = None if self.explain_axis is None else network.explain(*self.explain_axis)
        console.print(f"[bold]{escape(self.model)}[/bold], analysed in {seconds:.2f} s", highlight=False)
        if axis is not None:
            console.print(axis, highlight=False, markup=False, soft_wrap=True)
        elif self.explain:
            console.print(explain(network), highlight=False)
        else:
            console.print(describe(network), highlight=False)
        if drawing is not None:
            save_drawing(network, drawing, self.model)
            console.print(f"drawn to {drawing}", highlight=False, markup=False, soft_wrap=True)


WITHOUT_IMAGES, WITH_ONE_DOMAIN, WITH_SEVERAL = ("lamp", None), ("hessian", None), ("taylor", "worst")
"""The criterion of `secateur prune` and how it combines domains of images: the best of docs/accuracy-table.md."""


@dataclass(frozen=True)
class Prune:
    """Prune a model, show what goes from where, and save the smaller model."""

    model: ModelName
    out: Path
    """Folder for the pruned model; it must not exist, or be empty."""
    criterion: str | None = None
    """What to remove first: l1, l2, lamp, fpgm, random; with --data taylor, hessian, activation, variance, obs …
    Default: lamp; with --data hessian or, if the images are of several domains, taylor combined as worst."""
    ratio: float | None = None
    """Fraction of channels to remove, in [0, 1); default 0.5, unless a budget is given."""
    macs: int | float | None = None
    """MACs per example that may remain: a fraction such as 0.5, or a whole number."""
    params: int | float | None = None
    """Parameters that may remain: a fraction such as 0.5, or a whole number."""
    latency: float | None = None
    """Fraction of the time for the example image that may remain, by times measured on this machine."""
    latency_table: Path | None = None
    """File that keeps the measured times, so that they are measured once."""
    scope: Scope = "global"
    """Rank channels over the whole network, within each group, within each family, or by score per cost."""
    ratios: Mapping[str, float] = field(default_factory=dict)
    """Other ratios for kinds, families or groups, as in: --ratios heads 0 head_dims 0.5"""
    attention: Attention | None = None
    """What attention loses: heads, dimensions of all heads, or both; default: dims with compensation, heads without."""
    preset: str | None = None
    """A setting of Isomorphic Pruning, such as deit-4.2g: chooses criterion, scope, ratios and branches, and the ratio
    unless a budget is given."""
    steps: int = 1
    """Remove it in so many equal steps, each scored (and refitted) anew."""
    branches: tuple[str, ...] = ()
    """Residual branches to drop whole, by name or pattern; secateur trace MODEL --explain lists them."""
    drop: int = 0
    """Drop so many residual branches, those of least benefit on --data, or of least score without data."""
    keep: tuple[str, ...] = ()
    """Kinds, families or groups to leave alone."""
    min_channels: int | None = None
    """The least that stays of every group; default: 5 % of its width, and one head."""
    round_to: int = 1
    """Make kept widths multiples of this."""
    random_weights: bool = False
    """Start from random weights instead of pretrained ones."""
    data: str | None = None
    """Calibration images, for criteria that need them and for compensation: digits-dg, or root/domain/class/*.jpg."""
    combine: str | None = None
    """Score the domains of the data apart and combine: mean, worst, mean_minus_spread or sign_agreement. Default: only
    if no criterion is named."""
    compensate: bool = True
    """Refit the remaining layers to the dense model's outputs on the calibration images, where there are any."""
    unseen: str | None = None
    """Domain of the data that must not be looked at."""
    calibration_batches: int = 10
    """Batches of calibration images."""
    batch_size: int = 64
    """Images per batch of calibration."""
    img_size: int | None = None
    """Pixels per side of the example image; default: what the model was published with."""
    num_classes: int | None = None
    """Give the model a fresh head with this many classes."""
    seed: int = 0
    """Chooses random weights, calibration images, and the scores of random."""

    def __call__(self, console: Console) -> None:
        """Prunes, prints the plan, and saves."""
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise InputError(f"{self.out} exists and is not empty; choose another folder, or remove it first")
        if is_saved(self.model):
            raise InputError(f"{self.model} holds a pruned model; prune the original at a higher ratio instead")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise InputError(f"ratio is {self.ratio}; it is the fraction of channels to remove and must lie in [0, 1)")
        preset = self._preset()
        criterion, combine = self._method(preset)
        if self.combine is not None and self.data is None:
            raise InputError("--combine is about the domains of calibration images: pass --data")
        if self.combine is not None and not criterion.needs_batches:
            raise InputError(f"criterion {criterion.name} looks at no images, so there is nothing to --combine")
        if criterion.needs_batches and self.data is None:
            raise InputError(f"criterion {criterion.name} needs images: pass --data digits-dg or a folder of domains")
        torch.manual_seed(self.seed)
        opened = open_model(
            self.model,
            random_weights=self.random_weights,
            img_size=_positive("img-size", self.img_size),
            num_classes=_positive("num-classes", self.num_classes),
        )
        network = secateur.trace(opened.model, opened.inputs)
        needed = self.data is not None and (self.compensate or criterion.needs_batches or self.drop)
        batches = self._batches(opened, by_domain=combine is not None) if needed else {}
        criterion, combine = self._method(preset, len(batches))
        samples = [batch for own in batches.values() for batch in own]
        plans = secateur.prune_steps_(
            opened.model,
            opened.inputs,
            self.steps,
            criterion=criterion,
            batches=(samples if combine is None else batches) if criterion.needs_batches else None,
            combine=combine,
            branches=self._branches(network, opened, criterion, samples, preset),
            compensate=samples if samples and self.compensate else None,
            seed=self.seed,
            latency=self._latency(opened, network),
            keep=self.keep,
            min_channels=self.min_channels,
            **self._request(network, "dims" if samples and self.compensate else "heads", preset),
        )
        *_, plan = plans
        secateur.save(opened.model, plan, self.out, source=opened.source)
        console.print(describe_plan(plan), highlight=False)
        console.print(f"saved to {self.out}", highlight=False, markup=False, soft_wrap=True)

    def _method(self, preset: Preset | None, domains: int = 2) -> tuple[Criterion, str | None]:
        """Returns the criterion and how it combines the domains of the images, of which there are so many."""
        if preset is not None:
            return find_criterion(preset.criterion), self.combine
        if self.criterion is not None:
            return find_criterion(self.criterion), self.combine
        several = domains > 1 or self.combine is not None
        name, combine = WITHOUT_IMAGES if self.data is None else WITH_SEVERAL if several else WITH_ONE_DOMAIN
        return find_criterion(name), self.combine or combine

    def _preset(self) -> Preset | None:
        """Returns the preset that was asked for; what it chooses may not be chosen as well."""
        if self.preset is None:
            return None
        mine = {f.name: f.default for f in fields(self) if f.name in ("criterion", "scope", "attention", "branches")}
        chosen = [name for name, default in mine.items() if getattr(self, name) != default]
        chosen += [n for n in ("ratio", "ratios", "drop") if getattr(self, n)] + ["round-to"] * (self.round_to != 1)
        if chosen:
            raise InputError(f"--preset {self.preset} chooses {', '.join(chosen)}: leave out either it or them")
        return find_preset(self.preset)

    def _request(self, network: Network, attention: Attention, preset: Preset | None) -> dict[str, Any]:
        """Returns how much goes from where; `attention` is what attention loses unless it was said."""
        budget = {"macs": self.macs, "params": self.params}
        if preset is not None:
            free = any(v is not None for v in (*budget.values(), self.latency))
            return preset.request | budget | ({"ratio": None} if free else {})
        kinds = {group.kind for group in network.groups}
        chosen = ATTENTION[self.attention or attention]
        ratios = {kind: ratio for kind, ratio in chosen.items() if kind in kinds} | dict(self.ratios)
        return {"ratio": self.ratio, "scope": self.scope, "ratios": ratios, "round_to": self.round_to, **budget}

    def _branches(
        self, network: Network, opened: Opened, criterion: Criterion, samples: list[Any], preset: Preset | None
    ) -> tuple[str, ...]:
        """Returns the branches to drop: those named, and the least useful ones."""
        pattern, count = (preset.branches, preset.num_dropped) if preset else ("*", self.drop)
        if not count:
            return self.branches
        if samples and preset is None:
            value = secateur.block_benefit(network, opened.model, samples)
        else:
            scores = secateur.score(network, opened.model, criterion, samples or None, seed=self.seed)
            value = secateur.branch_scores(network, scores)
        named = {name for p in self.branches for name in fnmatch.filter(value, p)}
        others = sorted((n for n in fnmatch.filter(value, pattern) if n not in named), key=lambda n: value[n])
        if not 0 < count <= len(others):
            raise InputError(f"{count} residual branches cannot be dropped: {self.model} has {len(others)} that can go")
        return (*self.branches, *others[:count])

    def _latency(self, opened: Opened, network: Network) -> Budget | None:
        """Returns the latency budget, after measuring the table unless its file holds it."""
        if self.latency is None:
            return None
        table = LatencyTable.measure(network, opened.model, opened.inputs, file=self.latency_table)
        return table.within(fraction=self.latency)

    def _batches(self, opened: Opened, *, by_domain: bool) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Returns calibration images as the model takes them, `by_domain` or all under one key.

        The model's classes must be those of the data.
        """
        from secateur.data import DataConfig, load_split
        from secateur.training import calibration_batches, calibration_by_domain, logits_of

        config = DataConfig(
            unseen=self.unseen, seed=self.seed, image_size=opened.inputs.shape[-1], mean=opened.mean, std=opened.std
        )
        split = load_split(str(self.data), config)
        how: dict[str, Any] = {
            "batches": self.calibration_batches,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
        with torch.inference_mode():
            num_classes = logits_of(opened.model(opened.inputs)).shape[-1]
        if num_classes != split.num_classes:
            raise InputError(
                f"{self.model} tells {num_classes} classes apart, {self.data} has {split.num_classes}: pass a model "
                f"trained on these data, or --num-classes {split.num_classes} for a fresh head"
            )
        if by_domain:
            return calibration_by_domain(split, **how)
        return {"all": calibration_batches(split, **how)}


def _file_name(model: str) -> str:
    """Returns the name of a model, or of the directory that it is saved in, as part of a file name."""
    name = Path(model).resolve().name if is_saved(model) else model
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise InputError(f"{name} is {value}; it must be at least 1")
    return value
