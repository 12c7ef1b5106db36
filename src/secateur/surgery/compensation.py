"""Compensation: after a cut, each layer is refitted in closed form to what it gave in the dense model.

The dense and the cut model run side by side over the same unlabelled samples. When both have reached the same linear
layer or convolution, its weight W' and bias b' in the cut model become the solution of the ridge regression

    min |Y - X W'^T - b'|^2 / rows + pull * s * |W' - W|^2

with X what the layer reads in the cut model, whose earlier layers are refitted already (so errors do not pile up), Y
what it gives in the dense model in the rows that stay, W its weight after the cut, and s the mean of the diagonal of
the second moment of X. The pull is chosen for each layer by samples held out. Both models run once, and there is one
solve for each layer.

Where heads lose dimensions, Y is first brought into the basis in which they lose least (see `bases`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocation.plan import Plan, restore_inputs
from secateur.criteria.activations import Use
from secateur.errors import CutError, InputError, PlanError
from secateur.graph import trace
from secateur.graph.copies import twin
from secateur.graph.groups import fingerprint
from secateur.graph.labels import named_tensors
from secateur.surgery.bases import Mix, Pair, best_bases, pairs_of, try_out
from secateur.surgery.branches import drop_branches
from secateur.surgery.lockstep import Inputs, PausedRun, read_inputs, runs_of, taking_turns
from secateur.surgery.regression import Regression
from secateur.surgery.survey import Key, Survey, key_of, survey

HELD_OUT = 4
"""One in so many samples chooses the pull of a layer."""

PATCH_BYTES = 2**28
"""How much memory the patches that convolutions read may take at a time."""


@dataclass(frozen=True)
class Refit:
    """A refitted layer, and the share of its dense outputs' variance that it missed `before` and misses `after`."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Compensation:
    """Which layers were refitted, in the order in which they run, and what was left alone and why.

    `changed` names the tensors that have other values now.
    """

    layers: tuple[Refit, ...]
    notes: tuple[str, ...]
    changed: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers refitted: error in the variance of their dense outputs, before -> after"]
        lines += [f"  {layer.name}: {layer.before:.1%} -> {layer.after:.1%}" for layer in self.layers]
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])


def compensate_(pruned: nn.Module, dense: nn.Module, plan: Plan, batches: Iterable[Any]) -> Compensation:
    """Refits the layers of `pruned`, in place, and returns which; `pruned` is `dense` after the cut of `plan`.

    Every batch is the model's inputs (a tensor, a tuple of arguments or a dict of keyword arguments, one row per
    sample), or a pair (inputs, labels), of which the labels are not used. All batches are under way at the same time,
    each at the same layer, so a batch bounds the memory for what one layer computes, and all of them together that for
    what is alive between two layers (twice: in both models). A few hundred images are enough; with less the weights
    are pulled more to what they were.

    Refitted are the weights, and biases where there are any, of linear layers and convolutions that are used once in a
    pass and read by nothing else. Norms, tables, transposed convolutions and products with other parameters stay as
    they were cut. Both models run in eval mode, on copies of their modules; modes, gradients, buffers and the random
    state stay what they are.

    Raises InputError for batches that cannot be used, PlanError when the plan does not belong to the two models,
    CutError when they do not run through the same layers. `pruned` is then as it was.
    """
    tensors = _matched(pruned, dense, plan)
    device = _device(dense)
    inputs = read_inputs(batches, device)
    with torch.no_grad(), taking_turns(device):
        few = inputs[0].map(lambda t: t[:2] if t.ndim else t)
        with few.blamed():
            found = survey(twin(dense), few)
        work = _Work(plan, found, tensors, named_tensors(dense))
        work.prepare(dense, inputs, few)
        try:
            with runs_of(dense, inputs) as models, runs_of(pruned, inputs) as copies:
                _run_in_step(work, models, copies)
        except BaseException:
            for name, old in work.backup.items():
                tensors[name].data.copy_(old)
            raise
    return Compensation(tuple(work.layers), tuple(work.notes), tuple(work.backup))


def _matched(pruned: nn.Module, dense: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Returns the tensors of the cut model; raises PlanError unless it is the dense one after the plan's cut."""
    if fingerprint(dense) != plan.fingerprint:
        raise PlanError(f"the plan is for another architecture than this {type(dense).__name__}; was it cut already?")
    tensors = named_tensors(pruned)
    shapes = {name: list(tensor.shape) for name, tensor in named_tensors(dense).items()}
    for change in plan.cuts:
        shapes[change.tensor][change.dim] = change.size - len(change.removed)
    for name, tensor in tensors.items():
        if list(tensor.shape) != shapes.get(name):
            raise PlanError(
                f"pruned is not the dense model after this plan: {name!r} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(shapes[name]) if name in shapes else 'no such tensor'}; cut a copy of the dense model first"
            )
    return tensors


def _device(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if any(d.type == "meta" for d in devices):
        raise InputError("the model is on meta, without values: compensation needs its weights; load them first")
    if any(d.type == "mps" for d in devices):
        raise InputError("the model is on mps, which cannot solve in float64; compensate it on the CPU")
    if len(devices) > 1:
        raise InputError(f"the model is spread over {len(devices)} devices; compensation needs it on one")
    return devices.pop() if devices else torch.device("cpu")


def _run_in_step(work: _Work, models: list[PausedRun], copies: list[PausedRun]) -> None:
    """Runs both models over all batches, from layer to layer, and refits each layer on the way."""
    dense = [work.next_use(run) for run in models]
    cut = [run.advance() for run in copies]
    while any(use is not None for use in (*dense, *cut)):
        layer = work.layer(dense, cut)
        regression = Regression()
        for i, (own, other) in enumerate(zip(dense, cut, strict=True)):
            assert own is not None and other is not None
            output = own.run()
            if layer is not None:
                layer.add(regression, own, output, other, _held_out(i, len(models)))
            # The dense model goes on at once, so that its outputs need not be kept.
            dense[i] = own = None
            dense[i] = work.next_use(models[i], output)
        if layer is not None and layer.changed:
            work.refit(layer, regression, [use for use in cut if use is not None])
        for i, run in enumerate(copies):
            use, cut[i] = cut[i], None
            assert use is not None
            output = use.run()
            use = None
            cut[i] = run.advance(output)


def _held_out(batch: int, batches: int) -> float:
    """Returns the share of a batch that is held out: whole batches where there are enough of them."""
    return 1 / HELD_OUT if batches < HELD_OUT else float(batch % HELD_OUT == HELD_OUT - 1)


@dataclass(eq=False)
class _Layer:
    """A consumer in both models: which rows of the dense output remain, and what they are multiplied by."""

    key: Key
    rows: Tensor
    factor: Tensor
    mixes: list[Mix]
    changed: bool = False

    def targets(self, dense: Tensor) -> Tensor:
        """Returns what the rows that stay should give [..., rows], from what all rows gave [..., all rows]."""
        result = dense[..., self.rows]
        for mixes in _alike(self.mixes):
            sources, kept = (np.stack([getattr(m, name) for m in mixes]) for name in ("sources", "kept"))
            matrix = torch.stack([m.matrix for m in mixes]).to(dense)
            read = dense[..., torch.from_numpy(sources - self.key.first).to(dense.device)]
            places = torch.searchsorted(self.rows, torch.from_numpy(kept - self.key.first).to(dense.device))
            result[..., places.flatten()] = torch.einsum("...hw,hrw->...hr", read, matrix).flatten(-2)
        return result * self.factor.to(dense)

    def add(self, regression: Regression, own: Use, output: Tensor, other: Use, held_out: float) -> None:
        """Adds what the layer reads in the cut model, and what it should give, to its regression."""
        before, after = own.arguments["input"], other.arguments["input"]
        self.changed |= before.shape != after.shape or not torch.equal(before, after)
        y = self.targets(own.outputs(output).transpose(0, 1).flatten(1))
        y = y.unflatten(1, (other.groups, -1)).transpose(0, 1)
        end = y.shape[1] - math.ceil(held_out * y.shape[1])
        done = 0
        for x in _patches(other):
            rows = slice(done, done + x.shape[1])
            kept = min(max(end - done, 0), x.shape[1])
            for part, is_held in ((slice(0, kept), False), (slice(kept, None), True)):
                if x[:, part].shape[1]:
                    regression.add(x[:, part], y[:, rows][:, part], held_out=is_held)
            done += x.shape[1]


def _alike(mixes: Iterable[Mix]) -> Iterable[list[Mix]]:
    """Returns mixes of matrices of one shape together."""
    found: dict[torch.Size, list[Mix]] = {}
    for mix in mixes:
        found.setdefault(mix.matrix.shape, []).append(mix)
    return found.values()


def _patches(use: Use) -> Iterator[Tensor]:
    """Yields what a layer reads as rows [groups, rows, columns], for convolutions a few samples at a time."""
    x: Tensor = use.arguments["input"]
    each = x[:1].nbytes * use.arguments["weight"].shape[2:].numel()
    for part in x.split(max(1, PATCH_BYTES // each)) if use.dims else (x,):
        yield replace(use, arguments={**use.arguments, "input": part}).inputs()


@dataclass(eq=False)
class _Work:
    """What a compensation knows, and what it has done so far; `backup` has the tensors that it has changed."""

    plan: Plan
    survey: Survey
    tensors: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    pairs: list[Pair] = field(default_factory=list)
    mixes: list[Mix] = field(default_factory=list)
    backup: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Refit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def prepare(self, model: nn.Module, inputs: list[Inputs], few: Inputs) -> None:
        """Finds out in which bases heads lose least, and which rows are keys."""
        network = self.plan.network
        if network is None:
            network = drop_branches(trace(model, restore_inputs(self.plan.inputs)), model, self.plan.branches)
        fixed = {name for name in self.tensors if self._why_fixed(name)}
        pairs = pairs_of(network, self.survey)
        self.pairs = [p for p in pairs if fixed.isdisjoint((p.first.tensor, p.second.tensor))]
        try_out(model, few, self.pairs)
        stays = {(c.tensor, c.dim): self._stays(c.tensor, c.dim) for c in self.plan.cuts}
        for pair in self.pairs:
            if not pair.is_qk and self._offset_is_fitted(pair.second.tensor):
                pair.shiftable = frozenset({1})
            if not pair.free and any(pair.widths_left(stays)):
                self._note(f"{pair.name} keep their basis: maps of the one side cannot be undone in the other")
        self.mixes = best_bases(twin(model), inputs, self.pairs, stays)

    def next_use(self, run: PausedRun, output: Tensor | None = None) -> Use | None:
        """Lets the dense model run to the next layer that the cut one has; others went with dropped branches."""
        use = run.advance(output)
        while use is not None and use.name not in self.tensors:
            use = run.advance(use.run())
        return use

    def layer(self, dense: list[Use | None], cut: list[Use | None]) -> _Layer | None:
        """Returns the consumer that all passes have reached, or None if it has to be left alone."""
        own = dense[0]
        names = {None if use is None else (use.name, use.dims) for use in (*dense, *cut)}
        if own is None or len(names) > 1:
            raise CutError(
                f"the dense and the cut model do not run through the same layers: they have reached {names}; "
                "their layers cannot be compared, cut without compensation"
            )
        key = key_of(own)
        weight = self.dense[key.name]
        why = self._why_not(key, own)
        if why:
            self._note(f"{key.name} was not refitted: {why}")
            return None
        rows = torch.from_numpy(np.flatnonzero(self._stays(key.name, 0)[key.first : key.last])).to(weight.device)
        factor = torch.ones(weight.shape[0], dtype=torch.float64)
        for change in self.plan.rescales:
            if change.tensor == key.name:
                factor[list(change.indices)] *= change.factor
        factor = factor[key.first : key.last].to(weight.device)[rows]
        mixes = [m for m in self.mixes if (m.tensor, m.dim) == (key.name, 0) and key.first <= int(m.kept[0]) < key.last]
        return _Layer(key, rows, factor, mixes, changed=bool(mixes))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _why_not(self, key: Key, use: Use) -> str:
        if use.dims and use.arguments["input"].ndim != use.dims + 2:
            return "it reads one sample without a batch dimension"
        return self._why_fixed(key.name) or self.survey.why_not(key)

    def _why_fixed(self, name: str) -> str:
        """Returns why a tensor may not be changed, however it is used; empty where it may."""
        if not isinstance(self.tensors[name], nn.Parameter):
            return "it is a buffer"
        if any(change.tensor == name and change.dim for change in self.plan.rescales):
            return "its columns carry a temperature"
        return ""

    def _stays(self, name: str, dim: int) -> np.ndarray:
        """Returns which indices along a dimension of a dense tensor the plan leaves."""
        stays = np.ones(self.dense[name].shape[dim], np.bool_)
        for change in self.plan.cuts:
            if (change.tensor, change.dim) == (name, dim):
                stays[change.indices] = False
        return stays

    def refit(self, layer: _Layer, regression: Regression, uses: list[Use]) -> None:
        """Puts the solution for a layer into its weight and bias, and into the uses that wait for it."""
        name = layer.key.name
        if not all(regression.counts):
            raise InputError(
                f"{name} reads {sum(regression.counts)} rows in all calibration batches; one row in {HELD_OUT} is held "
                f"out, and some must be left to fit: give at least {HELD_OUT} samples, better a few hundred"
            )
        use = uses[0]
        weight: Tensor = use.arguments["weight"].detach()
        bias: Tensor | None = use.arguments.get("bias")
        groups = (use.groups, -1)
        offset = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
        start = (self._mixed(layer) if self._is_mixed(layer) else weight).flatten(1).unflatten(0, groups)
        fitted = self._fitted_offsets(layer, use)
        old = start.double(), offset.unflatten(0, groups).double()
        new = regression.fit(*old, fitted.unflatten(0, groups)[0])
        values, shift = new[0].flatten(0, 1).view(weight.shape).to(weight.dtype), new[1].flatten().to(weight.dtype)
        if not bool(torch.isfinite(values).all() and torch.isfinite(shift).all()):
            raise InputError(f"no finite {name} of type {weight.dtype} fits: do the models give NaN on these samples?")
        self._put(name, use.rows, values)
        self._put_offsets(layer, use, shift, uses)
        both = regression.statistics(0, 1)
        total = max(float(both.yy.sum()), torch.finfo(torch.float64).tiny)
        before, after = (max(0.0, float(both.error(*solution))) / total for solution in (old, new))
        self.layers.append(Refit(name, before, after))

    def _is_mixed(self, layer: _Layer) -> bool:
        return any(m.tensor == layer.key.name for m in self.mixes)

    def _mixed(self, layer: _Layer) -> Tensor:
        """Returns the dense weight of a linear layer, cut, in the new bases of its rows and columns."""
        weight = self.dense[layer.key.name].detach()[layer.key.first : layer.key.last]
        columns = torch.from_numpy(np.flatnonzero(self._stays(layer.key.name, 1))).to(weight.device)
        result = weight[:, columns]
        for mix in self.mixes:
            if (mix.tensor, mix.dim) == (layer.key.name, 1):
                sources, kept = (torch.from_numpy(i).to(weight.device) for i in (mix.sources, mix.kept))
                result[:, torch.searchsorted(columns, kept)] = weight[:, sources] @ mix.matrix.mT.to(weight)
        return layer.targets(result.mT).mT

    def _biases(self, key: Key) -> Iterator[tuple[str, slice, bool]]:
        """Yields the tensors that the bias of a consumer is made of: name, rows in the bias, and may it be changed?"""
        start = 0
        names = self.survey.consumers[key].bias
        for name in names:
            tensor = self.tensors[name]
            rows = int(self._stays(key.name, 0)[key.first : key.last].sum()) if len(names) == 1 else tensor.shape[0]
            changeable = isinstance(tensor, nn.Parameter) and self.survey.serves_alone(name)
            yield name, slice(start, start + rows), changeable
            start += rows

    def _offset_is_fitted(self, name: str) -> bool:
        return all(
            any(changeable for *_, changeable in self._biases(key)) for key in self.survey.consumers if key.name == name
        )

    def _fitted_offsets(self, layer: _Layer, use: Use) -> Tensor:
        """Returns for which rows the offset is fitted: those with a bias of their own, and keys, where none matters."""
        fitted = torch.zeros(layer.rows.numel(), dtype=torch.bool, device=layer.rows.device)
        for _, rows, changeable in self._biases(layer.key):
            fitted[rows] = changeable
        for pair in self.pairs:
            for side in pair.shiftable if pair.is_qk else ():
                place = (pair.first, pair.second)[side]
                if place.tensor == layer.key.name:
                    keys = torch.from_numpy(place.positions.ravel() - layer.key.first).to(fitted.device)
                    fitted |= torch.isin(layer.rows, keys)
        return fitted

    def _put_offsets(self, layer: _Layer, use: Use, shift: Tensor, uses: list[Use]) -> None:
        parts = list(self._biases(layer.key))
        for name, rows, changeable in parts:
            if changeable:
                self._put(name, use.rows if len(parts) == 1 else slice(None), shift[rows])
        if len(parts) > 1:  # the tensor that they were joined to is made already
            for other in uses:
                other.arguments["bias"] = torch.cat([self.tensors[name].detach() for name, *_ in parts])

    def _put(self, name: str, rows: slice, value: Tensor) -> None:
        tensor = self.tensors[name]
        if name not in self.backup:
            self.backup[name] = tensor.detach().clone()
        tensor.data[rows] = value.to(tensor.dtype)
