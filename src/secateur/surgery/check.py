"""The check after every cut: trace the cut model afresh, and compare it with what the plan says it should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from secateur.allocation.plan import Plan
from secateur.errors import CutError
from secateur.graph.network import Axis, Ints, Network

Pair = tuple[str, int, Ints, Ints]
UNSEEN = -2


def check(before: Network, after: Network, plan: Plan) -> None:
    """Raises CutError unless `after`, traced on the cut model, is `before` restricted to the plan's survivors.

    Compared are the shapes of all outputs, parameters and MACs with the predicted ones, and on every axis which indices
    belong to one channel and to one head. A wrong rule for an operator shows as two indices that were tied and are not
    any more, or the other way round.
    """
    if before.output_shapes != after.output_shapes:
        raise CutError(f"the cut model's outputs have shapes {after.output_shapes}, not {before.output_shapes}")
    if after.remainders > before.remainders:
        raise CutError("in the cut model, a size is no multiple any more of another that the model divides it by")
    if (after.params, after.macs) != (plan.params, plan.macs):
        raise CutError(
            f"the cut model has {after.params:,} parameters and {after.macs:,} MACs; "
            f"the plan says {plan.params:,} and {plan.macs:,}"
        )
    removed = {(c.tensor, c.dim): np.asarray(c.removed, np.int64) for c in plan.cuts}
    mask = _survivors(before, plan)
    alone = _alone(before, mask)
    new_axes = {(a.tensor, a.dim): a for a in after.axes}
    pairs: list[Pair] = []
    for axis in before.axes:
        new = new_axes.get((axis.tensor, axis.dim))
        keep = np.ones(axis.channels.size, np.bool_)
        keep[removed.get((axis.tensor, axis.dim), np.zeros(0, np.int64))] = False
        if new is None and keep.sum() == 1:
            continue  # a dimension of size 1 has no labels
        if new is None or new.channels.size != keep.sum():
            raise CutError(f"{axis.tensor}[dim {axis.dim}] should have {keep.sum()} indices after the cut")
        pairs += _pairs(axis, new, keep, alone)
    _compare(pairs)


def _survivors(network: Network, plan: Plan) -> np.ndarray:
    if plan.removed is not None and plan.network is network:
        return network.mask(plan.removed)
    mask = network.mask()
    sizes = {(c.tensor, c.dim): c for c in plan.cuts}
    for axis in network.axes:
        cut = sizes.get((axis.tensor, axis.dim))
        if cut is not None:
            gone = np.zeros(axis.channels.size, np.bool_)
            gone[list(cut.removed)] = True
            dead = np.setdiff1d(axis.channels[gone], axis.channels[~gone])
            mask[dead[dead >= 0]] = False
            heads = np.setdiff1d(axis.owners[gone], axis.owners[~gone])
            mask[heads[heads >= 0]] = False
    return mask


def _pairs(axis: Axis, new: Axis, keep: np.ndarray, alone: np.ndarray) -> Iterator[Pair]:
    """Yields old and new component numbers of the surviving indices, and of the heads that they lie in."""
    # where one index of a fibre is left, it and its head cannot be told apart any more
    single = alone[axis.channels[keep]]
    for side, unseen in enumerate((single, single | alone[axis.owners[keep]])):
        yield axis.tensor, axis.dim, axis.components[side][keep][~unseen], new.components[side][~unseen]


def _alone(network: Network, mask: np.ndarray) -> np.ndarray:
    """Returns which channels are the last ones of their fibre: such a dimension has size 1, and so no labels."""
    alone = np.zeros(network.num_channels + 1, np.bool_)
    for group in network.groups:
        alive = mask[group.channels]
        for row in group.channels[(alive.sum(axis=1) == 1)]:
            alone[row] = True
        if alive.any(axis=1).sum() == 1:
            alone[group.channels] |= alive.sum(axis=1, keepdims=True) == 1
    return alone


def _compare(pairs: Sequence[Pair]) -> None:
    """Old and new components must map one to one over all axes."""
    forward = np.full(1 + max((int(old.max(initial=0)) for _, _, old, _ in pairs), default=0) + 1, UNSEEN, np.int64)
    backward = np.full(1 + max((int(new.max(initial=0)) for _, _, _, new in pairs), default=0) + 1, UNSEEN, np.int64)
    for tensor, dim, old, new in pairs:
        unset = forward[old] == UNSEEN
        forward[old[unset]] = new[unset]
        unset = backward[new] == UNSEEN
        backward[new[unset]] = old[unset]
        wrong = (forward[old] != new) | (backward[new] != old)
        if wrong.any():
            index = int(np.flatnonzero(wrong)[0])
            raise CutError(
                f"after the cut, {int(wrong.sum())} indices of {tensor}[dim {dim}] (the first is survivor {index}) are "
                "tied to others than before: a rule for an operator on its way is wrong; the model was left as it was"
            )
