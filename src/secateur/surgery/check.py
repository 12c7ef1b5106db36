"""The check after every cut: trace the cut model afresh, and compare it with what the plan says it should be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.allocation.plan import Plan
from secateur.errors import CutError
from secateur.graph.network import Axis, Ints, Network, Outline

Survivors = tuple[Axis, Ints, Ints]
"""An axis before the cut, the components of its indices after it, and the indices that survive on it."""
NONE = np.zeros(0, np.int64)


def check(before: Network, after: Outline, plan: Plan) -> None:
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
    removed = {(c.tensor, c.dim): c.indices for c in plan.cuts}
    survivors: list[Survivors] = []
    for axis in before.axes:
        new = after.components.get((axis.tensor, axis.dim))
        keep = np.ones(axis.channels.size, np.bool_)
        keep[removed.get((axis.tensor, axis.dim), NONE)] = False
        left = np.flatnonzero(keep)
        if new is None and left.size == 1:
            continue  # a dimension of size 1 has no labels
        if new is None or new.shape[1] != left.size:
            raise CutError(f"{axis.tensor}[dim {axis.dim}] should have {left.size} indices after the cut")
        survivors.append((axis, new, left))
    if survivors:
        _compare(survivors, _alone(before, _survivors(before, plan)))


def _survivors(network: Network, plan: Plan) -> np.ndarray:
    if plan.removed is not None and plan.network is network:
        return network.mask(plan.removed)
    mask = network.mask()
    sizes = {(c.tensor, c.dim): c for c in plan.cuts}
    for axis in network.axes:
        cut = sizes.get((axis.tensor, axis.dim))
        if cut is not None:
            gone = np.zeros(axis.channels.size, np.bool_)
            gone[cut.indices] = True
            dead = np.setdiff1d(axis.channels[gone], axis.channels[~gone])
            mask[dead[dead >= 0]] = False
            heads = np.setdiff1d(axis.owners[gone], axis.owners[~gone])
            mask[heads[heads >= 0]] = False
    return mask


def _alone(network: Network, mask: np.ndarray) -> np.ndarray:
    """Returns which channels are the last ones of their fibre: such a dimension has size 1, and so no labels."""
    alone = np.zeros(network.num_channels + 1, np.bool_)
    for group in network.groups:
        alone[group.channels[mask[group.channels].sum(axis=1) == 1]] = True
    return alone


def _compare(survivors: Sequence[Survivors], alone: np.ndarray) -> None:
    """Old and new components, of indices and of the heads that they lie in, must map one to one over all axes."""
    sizes = [left.size for *_, left in survivors]
    new = np.concatenate([n for _, n, _ in survivors], axis=1)
    old = np.concatenate([a.components[:, left] for a, _, left in survivors], axis=1)
    # where one index of a fibre is left, it and its head cannot be told apart any more
    single = alone[np.concatenate([a.channels[left] for a, _, left in survivors])]
    headed = alone[np.concatenate([a.owners[left] for a, _, left in survivors])]
    seen = ~np.stack([single, single | headed])
    old, new = old[seen], new[seen]
    forward = np.empty(int(old.max(initial=0)) + 2, np.int64)
    backward = np.empty(int(new.max(initial=0)) + 2, np.int64)
    forward[old[::-1]], backward[new[::-1]] = new[::-1], old[::-1]
    wrong = (forward[old] != new) | (backward[new] != old)
    if wrong.any():
        side, index = (n[wrong] for n in np.nonzero(seen))
        number = np.repeat(np.arange(len(survivors)), sizes)[index]
        here = (number == number[0]) & (side == side[0])
        axis = survivors[number[0]][0]
        raise CutError(
            f"after the cut, {int(here.sum())} indices of {axis.tensor}[dim {axis.dim}] (the first is survivor "
            f"{index[0] - sum(sizes[: number[0]])}) are tied to others than before: a rule for an operator on its way "
            "is wrong; the model was left as it was"
        )
