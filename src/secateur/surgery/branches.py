"""Depth: residual branches x + f(x) are dropped, so that x is left, and whole blocks with them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateur.criteria import Batches, Loss, Scores, cross_entropy, undisturbed
from secateur.criteria.batches import Batch, blamed_on, read_batch, require_finite_loss
from secateur.errors import InputError, PlanError, TraceError, unknown_name
from secateur.graph import trace
from secateur.graph.copies import copied, skeleton
from secateur.graph.groups import fingerprint
from secateur.graph.network import Network, Residual, StandIn
from secateur.graph.residuals import around, is_inside


class Absent(nn.Module):
    """Stands where a module of a dropped branch was: takes whatever that took, computes nothing, has no parameters.

    Gives on the first tensor among its arguments (`pass`), zeros like it (`zeros`), or a single zero with `rank`
    dimensions (`zero`), as the first of a tuple of `length` with nothing behind it if `length` is not 0. Without a
    tensor among its arguments it returns None: whatever that went to is absent as well.
    """

    def __init__(self, kind: Literal["pass", "zeros", "zero"], length: int = 0, rank: int = 0) -> None:
        super().__init__()
        self.kind = kind
        self.length = length
        self.rank = rank

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            return None
        if self.kind == "zeros":
            x = torch.zeros_like(x)
        elif self.kind == "zero":
            x = x.new_zeros((1,) * self.rank)
        return (x, *(None,) * (self.length - 1)) if self.length else x

    def extra_repr(self) -> str:
        return f"{self.kind!r}"


def drop_branches(network: Network, model: nn.Module, names: Sequence[str]) -> Network:
    """Returns the network of `model` without the residual branches `names`; plans made for it drop them.

    Names are those of `network.residuals`, and may hold wildcards. The model is not changed: a skeleton of it is traced
    afresh without the branches, so that channels, ties and costs are exactly those of what will be left. Scores made
    for `network` do not fit the new one. Branches that `network` is without already stay dropped.

    Raises PlanError for unknown names (naming the nearest), branches that cannot be dropped, with the reason, and a
    model that does not run without them or is another one than `network` was traced on.
    """
    origin = network.origin or network
    if fingerprint(model) != origin.fingerprint:
        raise PlanError(f"the network was traced on another architecture than this {type(model).__name__}")
    chosen = _chosen(network, names)
    dropped = tuple(r.name for r in origin.residuals if r.name in {*network.dropped, *chosen})
    if dropped == network.dropped:
        return network
    without = stand_ins(origin, dropped)
    bones = skeleton(model) if origin.values is None else copied(model)
    put_in(bones, without)
    told = ", ".join(dropped)
    try:
        left = trace(bones, origin.inputs if origin.values is None else origin.values.inputs)
    except TraceError as error:
        raise PlanError(f"without {told}, {error}") from error
    if left.output_shapes != origin.output_shapes:
        raise PlanError(f"without {told}, the outputs have shapes {left.output_shapes}, not {origin.output_shapes}")
    expected = _macs_without(origin, dropped)
    if abs(left.macs - expected) > len(dropped):  # each is rounded to whole multiply-accumulates per example
        raise PlanError(f"without {told}, the model computes otherwise: {left.macs:,} MACs, not {expected:,}")
    gone = {s.module for s in without}
    return replace(
        left,
        residuals=tuple(r for r in origin.residuals if r.name not in dropped and not is_inside(r.where, gone)),
        blocks=origin.blocks,
        fingerprint=origin.fingerprint,
        caches=origin.caches,
        notes=origin.notes,
        dropped=dropped,
        origin=origin,
    )


def _macs_without(network: Network, dropped: Sequence[str]) -> int:
    """Returns what the costs of single branches say that is left; a branch inside of another goes with it."""
    gone = [r for r in network.residuals if r.name in dropped]
    modules = {s.module for r in gone for s in r.stand_ins}
    outer = (r for r in gone if not is_inside(r.where, modules))
    return network.macs - sum(r.macs for r in outer)


def _chosen(network: Network, names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise InputError(f"branches are given as a sequence of names, not as the string {names!r}")
    known = {r.name: r for r in network.residuals}
    chosen: list[str] = []
    for name in names:
        found = [r for r in known.values() if fnmatch.fnmatchcase(r.name, name)]
        if not found:
            raise PlanError(str(unknown_name("branch", name, known)))
        for residual in found:
            if residual.reason:
                raise PlanError(f"the branch {residual.name!r} cannot be dropped: {residual.reason}")
        chosen += [r.name for r in found]
    return chosen


def stand_ins(network: Network, names: Sequence[str]) -> tuple[StandIn, ...]:
    """Returns what takes the place of which modules when branches are dropped; nothing inside of what goes as a whole.

    A block of which every branch goes gives on what it is given.
    """
    origin = network.origin or network
    whole = [StandIn(b.module, "pass", b.length) for b in origin.blocks if set(names).issuperset(b.branches)]
    parts = [s for r in origin.residuals if r.name in names for s in r.stand_ins]
    found = {s.module: s for s in (*whole, *parts)}  # a block that is part of another branch is no more than that
    return tuple(s for m, s in found.items() if not any(p in found for p in around(m)))


def put_in(model: nn.Module, without: Sequence[StandIn]) -> None:
    """Puts stand-ins in the places of modules, wherever these are registered."""
    if not without:
        return
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    for stand_in in without:
        absent = Absent(stand_in.kind, stand_in.length, stand_in.rank)
        old = model.get_submodule(stand_in.module)
        absent.training = old.training
        for path in places[id(old)]:
            holder, _, name = path.rpartition(".")
            model.get_submodule(holder)._modules[name] = absent


def forget(optimizer: torch.optim.Optimizer, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Takes out of an optimizer those of `parameters` that `model` does not have any more, with their state."""
    left = {id(p) for p in model.parameters()}
    gone = {id(p) for p in parameters} - left
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    for parameter in parameters:
        if id(parameter) in gone:
            optimizer.state.pop(parameter, None)


def branch_scores(network: Network, scores: Scores) -> dict[str, float]:
    """Returns for each branch that can be dropped the mean score of the channels that lie inside it alone.

    With the criterion `taylor` this is the order by which arXiv 2407.04616 takes blocks out of ConvNeXt. Scores are
    compared as they are: those of a criterion whose size depends on the width of a layer rank branches of one kind. A
    branch without channels of its own (in a residual stream of its own width, say) has none.
    """
    scores.validate(network)
    result: dict[str, float] = {}
    for residual in _removable(network):
        modules = {s.module for s in residual.stand_ins}
        inside = np.zeros(network.num_channels + 1, np.bool_)
        outside = np.zeros(network.num_channels + 1, np.bool_)
        for axis in network.axes:
            here = inside if is_inside(axis.tensor, modules) else outside
            here[axis.channels] = here[axis.owners] = True
        own = (inside & ~outside)[: network.num_channels]
        if own.any():
            result[residual.name] = float(scores.values[own].mean())
    return result


def block_benefit(
    network: Network, model: nn.Module, batches: Batches, *, loss: Loss | None = None
) -> dict[str, float]:
    """Returns for each branch that can be dropped how much the loss grows when it alone is skipped.

    The loss (by default the cross-entropy of the logits) is the mean over all samples of `batches`, pairs (inputs,
    labels) that are moved to the model's device. The model runs in evaluation mode, without gradients, once for each
    branch and batch and once more for each batch, and is left as it was. A benefit below 0 means that the loss is less
    without the branch.

    Raises InputError for batches that cannot be used, naming the batch.
    """
    removable = _removable(network)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    criterion = loss or cross_entropy
    totals = np.zeros(1 + len(removable))
    num_samples = 0
    with undisturbed(model), torch.no_grad():
        for index, item in enumerate(batches):
            batch = read_batch(index, item).map(lambda tensor: tensor.to(device))
            num_samples += batch.size
            totals[0] += batch.size * _loss(model, criterion, batch)
            for i, residual in enumerate(removable, 1):
                with skipped(model, residual):
                    totals[i] += batch.size * _loss(model, criterion, batch)
    if not num_samples:
        raise InputError("the calibration batches are empty; an iterator that was used before has nothing left")
    gains = (totals[1:] - totals[0]) / num_samples
    return {r.name: float(g) for r, g in zip(removable, gains, strict=True)}


def _removable(network: Network) -> list[Residual]:
    return [r for r in network.residuals if not r.reason]


def _loss(model: nn.Module, criterion: Callable[[Any, Tensor], Tensor], batch: Batch) -> float:
    with blamed_on(batch):
        value = criterion(model(*batch.args, **batch.kwargs), batch.labels)
        require_finite_loss(value, batch)
        return float(value)


@contextmanager
def skipped(model: nn.Module, residual: Residual) -> Iterator[None]:
    """Runs a model as if f(x) of one residual sum x + f(x) were zero; nothing of the model is changed."""

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    makers = [model.get_submodule(s.module) for s in residual.stand_ins if s.kind != "pass"]
    handles = [m.register_forward_hook(nothing) for m in makers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
