"""Scores: one number per channel, added up over everything that goes with the channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.criteria.criterion import Criterion, Draw, Saliency, find_criterion
from secateur.criteria.footprints import Footprints, check_finite, checked_tensors
from secateur.criteria.gradients import Batches, Calibration, Loss, Statistic
from secateur.errors import InputError
from secateur.graph.network import Network

BLOCK = 2**18
"""Elements of a weight whose saliency is computed at a time on a CPU."""


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each channel matters: `values` (float64, [num_channels], read-only), larger means keep.

    Values of different groups are not yet comparable; if `normalize`, allocation divides them by their group's mean.
    `num_samples` is how many calibration samples went in, 0 if the criterion looks at none.
    """

    values: NDArray[np.float64]
    criterion: str
    normalize: bool = True
    num_samples: int = 0

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    def __str__(self) -> str:
        source = f"{self.num_samples:,} samples" if self.num_samples else "no calibration samples"
        spread = "none"
        if self.values.size:
            low, middle, high = np.quantile(self.values, (0.0, 0.5, 1.0))
            spread = f"least {low:.4g}, median {middle:.4g}, most {high:.4g}"
        return f"Scores by {self.criterion} of {self.values.size:,} channels from {source}: {spread}"

    def validate(self, network: Network) -> None:
        """Raises InputError if there is not one finite value for each channel of `network`, naming a group."""
        if self.values.shape != (network.num_channels,):
            raise InputError(
                f"scores by {self.criterion!r} have shape {self.values.shape}, but the network has "
                f"{network.num_channels} channels; were they computed for another network?"
            )
        bad = ~np.isfinite(self.values)
        if bad.any():
            group = next((group for group in network.groups if bad[group.channels].any()), None)
            where = "no group" if group is None else f"group {group.name!r}"
            count = int(bad.sum() if group is None else bad[group.channels].sum())
            raise InputError(f"scores by {self.criterion!r} are NaN or infinite for {count} channels, in {where}")


def score(
    network: Network,
    model: nn.Module,
    criterion: str | Criterion,
    batches: Batches | None = None,
    *,
    loss: Loss | None = None,
    seed: int = 0,
) -> Scores:
    """Returns one score per channel of `network`: the mean over its scored axes of the saliency that goes with it.

    A channel's scored axes are the sides of weights and the norm scales that it occupies; biases and embeddings do not
    count. The saliency of all indices that the channel takes along an axis is added up (the three rows of a fused qkv
    weight make one number), then over the axes, and divided by the number of axes. A head takes all that lies inside
    it. A channel without a scored axis has 0.

    Args:
        criterion: a name in `secateur.criteria.CRITERIA` or a criterion. `taylor` and `hessian` need batches.
        batches: pairs (inputs, labels); inputs are a tensor, a tuple or a dict of tensors with one row per sample.
            They are moved to the model's device. Not read if the criterion needs none.
        loss: maps the model's output and the labels to a scalar, the mean over samples; by default the cross-entropy
            of `logits_of(output)`.
        seed: of the draw of `random`.

    The model is left as it was: modes, gradients, `requires_grad`, buffers, torch's random state.

    Raises:
        InputError: unknown criterion, no usable batches, NaN in weights, inputs, loss or scores, labels out of range,
            or a model whose tensors do not have the sizes that `network` was traced with.
    """
    chosen = find_criterion(criterion) if isinstance(criterion, str) else criterion
    tensors = checked_tensors(network, model)
    footprints = Footprints(network, tensors)
    shown = isinstance(chosen, Saliency) and _shows_all(chosen)
    check_finite({n: t for n, t in tensors.items() if not (shown and n in footprints.tensors)})
    if isinstance(chosen, Draw):
        values, num_samples = chosen.draw(np.random.default_rng(seed), network.num_channels), 0
    else:
        statistic = _statistic(chosen, model, footprints, batches, loss)
        sums = _axis_sums(chosen, footprints, statistic)
        values, num_samples = footprints.mean(sums), statistic.num_samples
    scores = Scores(values, chosen.name, chosen.normalize, num_samples)
    scores.validate(network)
    return scores


def _shows_all(criterion: Saliency) -> bool:
    """Whether NaN and infinite elements of a weight give a saliency like that, so that its sums need one pass only."""
    if criterion.statistic is not None:
        return False
    saliency = criterion.formula(torch.tensor([torch.nan, torch.inf, -torch.inf]))
    return not bool(torch.isfinite(saliency).any())


def _statistic(
    criterion: Saliency, model: nn.Module, footprints: Footprints, batches: Batches | None, loss: Loss | None
) -> Statistic:
    """Returns the statistic that the criterion needs (an empty one if none). Raises InputError if it is no use."""
    if criterion.statistic is None or not footprints.tensors:
        return Statistic({}, 0)
    if batches is None:
        raise InputError(
            f"criterion {criterion.name!r} needs calibration batches: pass batches=, pairs (inputs, labels)"
        )
    statistic = criterion.statistic(Calibration(model, footprints.tensors, batches, loss))
    for name, values in statistic.values.items():
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"criterion {criterion.name!r}: gradients of {name!r} are NaN or infinite")
    if not any(bool(values.any()) for values in statistic.values.values()):
        raise InputError(f"criterion {criterion.name!r}: all gradients are zero; does the loss depend on the weights?")
    return statistic


def _axis_sums(criterion: Saliency, footprints: Footprints, statistic: Statistic) -> list[NDArray[np.float64]]:
    """Returns for every scored axis the saliency of each index: the sum over the slice that goes with the index."""
    sums: list[NDArray[np.float64]] = []
    for name, tensor in footprints.tensors.items():
        for local in _slice_sums(criterion, name, tensor.detach(), statistic.values.get(name), footprints.dims[name]):
            if not bool(torch.isfinite(local).all()):
                check_finite({name: tensor})
                raise InputError(f"criterion {criterion.name!r} gives NaN or infinite values on {name!r}")
            sums.append(local.cpu().numpy())
    return sums


def _slice_sums(
    criterion: Saliency, name: str, tensor: Tensor, statistic: Tensor | None, dims: tuple[int, ...]
) -> list[Tensor]:
    """Returns for each of `dims` the saliency summed over all other dimensions, float64.

    On a CPU the saliency is made a few rows at a time, so that it stays in the cache and needs no fresh memory.
    """
    totals = [torch.zeros(tensor.shape[dim], dtype=torch.float64, device=tensor.device) for dim in dims]
    rows = tensor.shape[0] if tensor.is_cuda else max(1, BLOCK * tensor.shape[0] // max(1, tensor.numel()))
    for start in range(0, tensor.shape[0], rows):
        part = tensor[start : start + rows]
        known = () if statistic is None else (statistic[start : start + rows],)
        saliency = criterion.formula(part.to(torch.promote_types(part.dtype, torch.float32)), *known)
        if saliency.shape != part.shape:
            raise InputError(
                f"criterion {criterion.name!r} gives {tuple(saliency.shape)} values for {tuple(part.shape)} elements "
                f"of {name!r}; its formula must return one for each"
            )
        for dim, total in zip(dims, totals, strict=True):
            # rows first: adding up whole rows is several times faster than gathering from each
            local, kept = (saliency, 0) if dim == 0 else (saliency.sum(0), dim - 1)
            others = [other for other in range(local.dim()) if other != kept]
            local = local.sum(others) if others else local
            (total[start : start + rows] if dim == 0 else total).add_(local)
    return totals
