"""Criteria that look at what layers read: how much of a layer's output hangs on an input.

Only the input sides of linear and convolution weights count, as far as the calibration samples reach them. Dimensions
of queries and keys have no such side, since no weight reads them: they meet in a product, so each has what it puts
there, the product of what it has in the query and in the key (before any norm of these), added up over the heads that
share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.criteria.activations import Moments
from secateur.criteria.criterion import ByChannel, Subject, register
from secateur.criteria.footprints import Place
from secateur.criteria.inputs import Sums, layer_grams, layer_inputs
from secateur.errors import InputError

DAMPING = 0.01
"""What is added to the diagonal of a layer's input covariance, as a fraction of its mean."""

Values = NDArray[np.float64]


def _activation(subject: Subject) -> Values:
    """Returns Σ_i |W_ij| · ‖x_j‖₂ over the outputs i of each layer that reads input j.

    The score of Wanda (Sun et al., ICLR 2024), added up over what goes with a channel. ‖x_j‖₂ runs over all positions
    of a sample, its squares averaged over samples; every kernel position of a convolution is an input of its own. A
    query-key dimension has rms(q) · rms(k), the size of what it adds to the attention scores.
    """

    def on(place: Place) -> Values | None:
        known = subject.statistic(layer_inputs)
        found = [
            (_grouped(subject, place, a.rows, a.inputs.total.shape[0]).abs().sum(1), a.inputs.squares)
            for a in known.values.get(place.name, ())
        ]
        sums = [(size * (squares / known.num_samples).sqrt()).sum((0, 2)) for size, squares in found]
        return torch.stack(sums).sum(0).cpu().numpy()[place.indices] if sums else None

    return _over_inputs(subject, on, lambda outputs: outputs.energy.sqrt())


register(ByChannel("activation", "Σ|w|·‖x‖, x the input that w multiplies", _activation, needs_batches=True))


def _variance(subject: Subject) -> Values:
    """Returns the variance of what a layer reads from a channel, over all positions of all samples.

    Variance-based pruning (Berisha et al., ICCV 2025): what hardly varies can be replaced by its mean, in the bias of
    the layer that reads it. The mean over kernel positions for convolutions, which see the same values shifted. A
    query-key dimension has var(q) · var(k).
    """

    def on(place: Place) -> Values | None:
        known = subject.statistic(layer_inputs).values.get(place.name, ())
        sums = [activity.inputs.variance.mean(2).sum(0) for activity in known]
        return torch.stack(sums).mean(0).cpu().numpy()[place.indices] if sums else None

    return _over_inputs(subject, on, lambda outputs: outputs.variance)


register(ByChannel("variance", "the variance of what layers read from the channel", _variance, needs_batches=True))


def _obs(subject: Subject) -> Values:
    """Returns what removing a channel adds to the squared error of the layers that read it, once these are refitted.

    Optimal brain surgeon (Hassibi and Stork, 1992) on each layer's own output. With C the covariance of what it reads
    (the mean of x xᵀ where the layer has no bias to take up a mean), B the columns that go, H = C + λI, and S the
    inverse of [H⁻¹]_BB, the change of row w_i that removes B and costs least is Δ_i = -H⁻¹_:B S w_iB, and the value

        Σ_i  Δ_iᵀ C Δ_i  /  Σ_i  w_iᵀ C w_i   =   Σ_i (w_iBᵀ S w_iB - λ ‖Δ_i‖²)  /  Σ_i  w_iᵀ C w_i ,

    the squared output error as a fraction of the output's own variance. As λ goes to 0, the numerator becomes the
    familiar w²_ij / [C⁻¹]_jj; it is `DAMPING` times the mean of C's diagonal here, so that C may be singular. B is a
    column, all kernel positions of a convolution's channel, or all dimensions of a head. A query-key dimension has the
    mean of q² times that of k², its part of the squared attention scores.
    """

    def on(place: Place) -> Values | None:
        known = subject.statistic(layer_grams).values.get(place.name, ())
        if not known:
            return None
        shares, energy = np.zeros(place.takers.size), 0.0
        for reads in known:
            weight = _grouped(subject, place, reads.rows, reads.moments.total.shape[0])
            covariance = second_moment(reads.moments, centred=reads.has_bias)
            flat = weight.flatten(2)
            energy += float((flat @ covariance * flat).sum())
            for pairs, columns in _blocks(place, math.prod(weight.shape[3:])):
                block = torch.from_numpy(columns).to(flat.device)
                errors = removal_errors(flat, covariance, block).cpu().numpy()
                shares[pairs] += (errors / pairs.shape[1])[:, None]
        return shares / energy if energy > 0 else np.zeros(shares.size)

    return _over_inputs(subject, on, lambda outputs: outputs.energy)


register(
    ByChannel("obs", "the layers' output error after the best refit without the channel", _obs, needs_batches=True)
)


def second_moment(moments: Moments, *, centred: bool) -> Tensor:
    """Returns the covariance [groups, d, d] of inputs if `centred`, else their mean outer product."""
    return moments.covariance if centred else moments.gram / moments.count


def removal_errors(weight: Tensor, covariance: Tensor, blocks: Tensor) -> Tensor:
    """Returns for each block of columns the squared error [n] of losing it when the other columns are refitted.

    `weight` is [groups, rows, d], `covariance` [groups, d, d], `blocks` [n, size] column numbers, all groups alike.
    The error is the mean over positions, added up over rows and groups; 0 where nothing is ever read.
    """
    damping = DAMPING * covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damping = torch.where(damping > 0, damping, 1.0)
    identity = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    inverse = torch.linalg.inv(covariance + damping * identity)
    squared = inverse @ inverse
    gone = weight[:, :, blocks].permute(0, 2, 3, 1)  # [groups, n, size, rows]
    inner, outer = (matrix[:, blocks[:, :, None], blocks[:, None, :]] for matrix in (inverse, squared))
    moved = gone / inner if blocks.shape[1] == 1 else torch.linalg.solve(inner, gone)
    errors = (gone * moved).sum((2, 3)) - damping[:, :, 0] * (moved * (outer @ moved)).sum((2, 3))
    return errors.clamp(min=0).sum(0)


def _blocks(place: Place, kernel: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yields what channels take of an axis, those that take equally many indices together.

    Positions in `place.takers` [n, indices of a channel], and columns of the weight [n, indices x kernel positions].
    """
    order = np.argsort(place.takers, kind="stable")
    _, starts, counts = np.unique(place.takers[order], return_index=True, return_counts=True)
    for count in np.unique(counts):
        pairs = order[starts[counts == count][:, None] + np.arange(count)]
        columns = place.indices[pairs][:, :, None] * kernel + np.arange(kernel)
        yield pairs, columns.reshape(len(pairs), -1)


def _grouped(subject: Subject, place: Place, rows: slice, groups: int) -> Tensor:
    """Returns rows of a weight in float64: [groups, rows of a group, inputs of a group, kernel positions]."""
    weight = subject.footprints.tensors[place.name].detach()[rows].double()
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _over_inputs(subject: Subject, on: Callable[[Place], Values | None], amount: Callable[[Sums], Tensor]) -> Values:
    """Returns the mean over the layers that read a channel of `on(place)`: one value per pair of index and taker.

    Channels that no layer reads have the product of `amount` of their rows. Raises InputError for channels of which
    only layers read that are not linear or convolutional, or that the samples do not reach.
    """
    places = subject.footprints.places
    shares = [
        on(place) if place.role == "in" and place.axis.dim == 1 and place.takers.size else None for place in places
    ]
    values = subject.footprints.mean_of_shares(shares)
    read, counted = np.zeros((2, values.size), np.bool_)
    for place, share in zip(places, shares, strict=True):
        if place.role == "in":
            read[place.takers] = True
            counted[place.takers] |= share is not None
    for place in places:
        if place.role == "in" and not counted[place.takers].all():
            raise InputError(
                f"what {place.name!r} reads cannot be seen: on the calibration batches, the model does not call a "
                "linear layer or convolution with it; use a criterion that looks at weights or gradients"
            )
    if not read.all() and places:
        values[~read] = _products(subject, amount)[~read]
    return values


def _products(subject: Subject, amount: Callable[[Sums], Tensor]) -> Values:
    """Returns for each channel the product of `amount` of its query row and its key row, added up over heads.

    It is the squared geometric mean over the rows of a channel in each head, since nothing tells which of them make
    queries; the same for one row of each. Channels without rows have 0.
    """
    num_channels = subject.network.num_channels
    takers, logs = [np.zeros(0, np.int64)], [np.zeros(0)]
    for place in subject.footprints.places:
        makes = place.role == "out" and place.axis.dim == 0
        known = subject.statistic(layer_inputs).values.get(place.name, ()) if makes else ()
        amounts = np.full(place.axis.channels.size, np.nan)
        for activity in known:
            amounts[activity.rows] = amount(activity.outputs).cpu().numpy()
        seen = ~np.isnan(amounts[place.indices])
        owners = place.axis.owners[place.indices[seen]] + 1
        takers.append(place.takers[seen] * (num_channels + 1) + owners)
        with np.errstate(divide="ignore"):
            logs.append(np.log(amounts[place.indices[seen]]))
    pairs, inverse = np.unique(np.concatenate(takers), return_inverse=True)
    sums = np.bincount(inverse, weights=np.concatenate(logs), minlength=pairs.size)
    products = np.exp(2 * sums / np.bincount(inverse, minlength=pairs.size))
    return np.bincount(pairs // (num_channels + 1), weights=products, minlength=num_channels).astype(np.float64)
