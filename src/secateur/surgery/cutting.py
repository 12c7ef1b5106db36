"""The cut: all new tensors are made and checked first, and only then put into the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.allocation.plan import AttributeChange, AxisCut, Plan, Rescale, restore_inputs
from secateur.errors import CutError, PlanError, TraceError
from secateur.graph import Network, retrace, trace
from secateur.graph.copies import collector_paused, copied, skeleton
from secateur.graph.groups import caches, fingerprint
from secateur.graph.labels import named_tensors
from secateur.surgery.branches import drop_branches, forget, put_in, stand_ins
from secateur.surgery.check import check
from secateur.surgery.compensation import Compensation, compensate_

REPORTED_SIZES: Mapping[type[nn.Module], tuple[tuple[str, str, int], ...]] = {
    nn.Linear: (("out_features", "weight", 0), ("in_features", "weight", 1)),
    nn.Embedding: (("num_embeddings", "weight", 0), ("embedding_dim", "weight", 1)),
    nn.LayerNorm: (),
    nn.GroupNorm: (("num_channels", "weight", 0),),
    nn.modules.batchnorm._BatchNorm: (("num_features", "running_mean", 0),),
}
"""Attributes of torch's own modules that only report a size of one of their tensors: attribute, tensor, dimension."""


def cut(model: nn.Module, plan: Plan, *, compensate: Iterable[Any] | None = None) -> nn.Module:
    """Returns a copy of `model` without what `plan` removes; see `cut_`."""
    pruned = copy.deepcopy(model)
    cut_(pruned, plan, compensate=compensate)
    return pruned


def cut_(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    compensate: Iterable[Any] | None = None,
) -> Compensation | None:
    """Removes from `model`, in place, what `plan` says: parameters, buffers, gradients, and sizes kept in attributes.

    Parameters stay the same objects, so an optimizer keeps its references; its state is cut along when it is given, and
    it forgets the parameters of branches that are dropped. In the places of their modules stand `Absent` ones.
    Before anything changes, a cut copy is traced (on `meta`, wherever the model runs there) and compared with the plan
    (see `check`).

    With `compensate`, batches of unlabelled samples, the layers that are left are refitted in closed form to what they
    gave before the cut, and what was refitted is returned (see `compensate_`). The state of an optimizer is cut as
    without.

    Raises PlanError when the plan was made for another architecture, CutError when the check fails, InputError for
    batches that cannot be used; then the model and the optimizer are as they were.
    """
    tensors = named_tensors(model)
    _validate(model, tensors, plan)
    before = plan.network
    if before is None or before.caches != caches(model):
        before = drop_branches(trace(model, restore_inputs(plan.inputs)), model, plan.branches)
    shapes = {n: torch.Size(s) for n, s in _new_shapes(tensors, plan).items()}
    _check_copy(model, shapes, plan, before)
    keep = _kept(plan, {n: t.device for n, t in tensors.items()})
    scales = _scales(plan)
    compensation, refitted = None, {}
    if compensate is not None:
        compensation, refitted = _compensated(model, replace(plan, network=before), compensate)
    changes = [
        (
            t,
            refitted[name] if name in refitted else _cut_tensor(t.detach(), keep.get(name, []), scales.get(name, [])),
            _cut_grad(t, name, keep),
        )
        for name, t in tensors.items()
        if name in shapes or name in refitted
    ]
    states = _cut_states(optimizer, tensors, keep) if optimizer is not None else []
    for tensor, data, grad in changes:
        tensor.grad = None
        _replace_data(tensor, data)
        tensor.grad = grad
    for state, key, value in states:
        state[key] = value
    parameters = list(model.parameters())
    put_in(model, stand_ins(before, plan.branches))
    if optimizer is not None:
        forget(optimizer, model, parameters)
    _apply_attributes(model, plan.attributes)
    _drop_caches(model)
    return compensation


def _compensated(model: nn.Module, plan: Plan, batches: Iterable[Any]) -> tuple[Compensation, dict[str, torch.Tensor]]:
    """Cuts and compensates a copy; returns what was done, and the tensors that have other values by it."""
    assert plan.network is not None
    pruned = _cut_copy(model, plan)
    put_in(pruned, stand_ins(plan.network, plan.branches))
    _apply_attributes(pruned, plan.attributes)
    _drop_caches(pruned)
    compensation = compensate_(pruned, model, plan, batches)
    tensors = named_tensors(pruned)
    return compensation, {name: tensors[name].detach() for name in compensation.changed}


def _drop_caches(model: nn.Module) -> None:
    """Makes a model forget what it keeps between runs in eval mode (a table of position biases, say).

    Such models forget it when they are put into training mode, for their weights are about to change: so they are now.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def _validate(model: nn.Module, tensors: Mapping[str, torch.Tensor], plan: Plan) -> None:
    for change in plan.cuts:
        tensor = tensors.get(change.tensor)
        if tensor is None:
            raise PlanError(
                f"the plan is for another architecture: {type(model).__name__} has no tensor {change.tensor!r}"
            )
        if tensor.ndim <= change.dim or tensor.shape[change.dim] != change.size:
            raise PlanError(
                f"the plan is for another architecture: it expects {change.size} indices along dimension {change.dim} "
                f"of {change.tensor!r}, which has shape {tuple(tensor.shape)}; was the model cut already?"
            )
        if change.removed and not 0 <= min(change.removed) <= max(change.removed) < change.size:
            raise PlanError(
                f"the plan removes indices beyond the {change.size} along dimension {change.dim} of {change.tensor!r}"
            )
    if fingerprint(model) != plan.fingerprint:
        raise PlanError(
            f"the plan is for another architecture than this {type(model).__name__}: "
            "some tensors that it does not cut differ in name or shape"
        )


def _new_shapes(tensors: Mapping[str, torch.Tensor], plan: Plan) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for change in plan.cuts:
        shape = shapes.setdefault(change.tensor, list(tensors[change.tensor].shape))
        shape[change.dim] = change.size - len(change.removed)
    for change in plan.rescales:
        shapes.setdefault(change.tensor, list(tensors[change.tensor].shape))
    return shapes


@collector_paused()
def _check_copy(model: nn.Module, shapes: dict[str, torch.Size], plan: Plan, before: Network) -> None:
    """Cuts a copy, on `meta` wherever the model runs there, and compares its trace with the plan."""
    bones = skeleton(model, shapes) if before.values is None else _cut_copy(model, plan)
    put_in(bones, stand_ins(before, plan.branches))
    try:
        _apply_attributes(bones, plan.attributes)
    except (AttributeError, LookupError, TypeError) as error:
        raise PlanError(
            f"the plan sets an attribute that this {type(model).__name__} does not have: {error}"
        ) from error
    try:
        after = retrace(bones, before)
    except TraceError as error:
        raise CutError(f"the cut model does not run: {error}; the model was left as it was") from error
    check(before, after, plan)


def _cut_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """Returns a copy of the model with its tensors cut."""
    bones = copied(model)
    tensors = named_tensors(bones)
    keep, scales = _kept(plan, {n: t.device for n, t in tensors.items()}), _scales(plan)
    for name, tensor in tensors.items():
        tensor.data = _cut_tensor(tensor.detach(), keep.get(name, []), scales.get(name, []))
    return bones


def _kept(plan: Plan, devices: Mapping[str, torch.device]) -> dict[str, list[tuple[AxisCut, torch.Tensor]]]:
    """Returns per tensor its cuts, with the indices that stay."""
    kept: dict[str, list[tuple[AxisCut, torch.Tensor]]] = {}
    for change in plan.cuts:
        stays = np.ones(change.size, np.bool_)
        stays[change.indices] = False
        indices = torch.from_numpy(np.flatnonzero(stays)).to(devices[change.tensor])
        kept.setdefault(change.tensor, []).append((change, indices))
    return kept


def _scales(plan: Plan) -> dict[str, list[Rescale]]:
    found: dict[str, list[Rescale]] = {}
    for change in plan.rescales:
        found.setdefault(change.tensor, []).append(change)
    return found


def _select(tensor: torch.Tensor, cuts: list[tuple[AxisCut, torch.Tensor]]) -> torch.Tensor:
    """Returns what is left of a tensor; a few rows at a time on a CPU: they stay in its cache between the steps."""
    sides = sorted(((c.dim, indices) for c, indices in cuts), key=lambda side: side[0])
    if len(sides) < 2 or sides[0][0] != 0 or tensor.is_cuda:
        for dim, indices in sides:
            tensor = tensor.index_select(dim, indices)
        return tensor
    (_, rows), *others, (last, ends) = sides
    sizes = {dim: indices.numel() for dim, indices in sides}
    left = tensor.new_empty([sizes.get(dim, n) for dim, n in enumerate(tensor.shape)])
    step = max(1, _BLOCK * tensor.shape[0] // tensor.numel())
    for part, target in zip(rows.split(step), left.split(step), strict=True):
        block = tensor.index_select(0, part)
        for dim, indices in others:
            block = block.index_select(dim, indices)
        torch.index_select(block, last, ends, out=target)
    return left


_BLOCK = 2**18


def _cut_tensor(
    tensor: torch.Tensor, cuts: list[tuple[AxisCut, torch.Tensor]], scales: Sequence[Rescale]
) -> torch.Tensor:
    if scales:
        tensor = tensor.clone()
        for r in scales:
            index = torch.tensor(r.indices, device=tensor.device)
            tensor.index_copy_(r.dim, index, tensor.index_select(r.dim, index) * r.factor)
    return _select(tensor, cuts)


def _cut_grad(
    tensor: torch.Tensor, name: str, keep: Mapping[str, list[tuple[AxisCut, torch.Tensor]]]
) -> torch.Tensor | None:
    return None if tensor.grad is None else _select(tensor.grad, keep.get(name, []))


def _replace_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Puts `data`, of another shape, into `tensor`.

    While a graph of an earlier pass is alive (a loss that a training loop still holds), autograd keeps what it needs to
    add to the parameter's gradient, old shape included; it only forgets that when the type changes in between.
    """
    other = torch.float16 if tensor.dtype == torch.float32 else torch.float32
    if tensor.requires_grad:
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def _cut_states(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    keep: Mapping[str, list[tuple[AxisCut, torch.Tensor]]],
) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """Returns (state, key, new value) for each tensor of the optimizer's state that follows the shape of its parameter.

    A dimension in which the state has size 1 (a factored second moment, say) stays. Raises PlanError for state of any
    other shape: it cannot be cut, and the optimizer would fail later.
    """
    changes = []
    for name in keep:
        parameter = tensors[name]
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or value.numel() <= 1:
                continue
            alike = [n == m for n, m in zip(value.shape, parameter.shape, strict=False)]
            if value.ndim != parameter.ndim or not all(a or n == 1 for a, n in zip(alike, value.shape, strict=True)):
                raise PlanError(
                    f"{name!r} has shape {tuple(parameter.shape)}, and the state {key!r} that "
                    f"{type(optimizer).__name__} keeps for it {tuple(value.shape)}: it cannot be cut along; cut the "
                    "model without the optimizer, and start a new one"
                )
            changes.append((state, key, _select(value, [(c, i) for c, i in keep[name] if alike[c.dim]])))
    return changes


def _apply_attributes(model: nn.Module, changes: tuple[AttributeChange, ...]) -> None:
    """Sets the sizes that the model's code reads, and those that torch's modules report."""
    for change in changes:
        holder: Any = model.get_submodule(change.module)
        steps = list(change.path)
        index = steps.pop() if isinstance(steps[-1], int) else None
        for step in steps[:-1]:
            holder = getattr(holder, str(step))
        key = str(steps[-1])
        if index is None:
            vars(holder)[key] = change.value
        else:
            old = vars(holder)[key]
            vars(holder)[key] = type(old)(change.value if i == index else v for i, v in enumerate(old))
    for module in model.modules():
        for attribute, size in _reported(module):
            if getattr(module, attribute, None) is not None:
                vars(module)[attribute] = size


def _reported(module: nn.Module) -> Iterator[tuple[str, int]]:
    if isinstance(module, nn.modules.conv._ConvNd):
        out_dim, in_dim = (1, 0) if module.transposed else (0, 1)
        sizes = {out_dim: module.weight.shape[out_dim], in_dim: module.weight.shape[in_dim]}
        grouped = 0 if module.transposed else in_dim
        yield "out_channels", sizes[out_dim] * (module.groups if module.transposed else 1)
        yield "in_channels", sizes[in_dim] * (1 if grouped == 0 else module.groups)
        return
    for kind, entries in REPORTED_SIZES.items():
        if isinstance(module, kind):
            for attribute, name, dim in entries:
                tensor = getattr(module, name, None)
                if tensor is not None:
                    yield attribute, int(tensor.shape[dim])
