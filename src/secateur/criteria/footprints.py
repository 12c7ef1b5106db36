"""Where each channel lives: the scored axes that it occupies, for the whole network at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.graph.network import STAYS, Axis, Ints, Network, Role

SCORED_ROLES = ("out", "in", "norm")
"""What counts for a channel: its part of weights, on either side, and of norm scales; not biases or embeddings."""

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Place:
    """A scored axis: a dimension of a tensor, and who takes what of it: channel `takers[n]` takes index `indices[n]`.

    An index inside a head is taken twice, by its channel and by the head.
    """

    name: str
    axis: Axis
    indices: Ints
    takers: Ints

    @property
    def role(self) -> Role:
        """Whether this is the input or the output side of a weight (`in`, `out`), or the scale of a norm (`norm`)."""
        return self.axis.role


class Footprints:
    """The scored axes of a network, each (tensor, dim) once, and what each channel occupies of them.

    `tensors` are the tensors with a scored axis, by the first name that the model has for each (tied tensors have
    several); `dims` are their scored dimensions; `places` has one entry for each of these, in the same order.
    """

    def __init__(self, network: Network, tensors: dict[str, Tensor]) -> None:
        first_name: dict[int, str] = {}
        for name, tensor in tensors.items():
            first_name.setdefault(id(tensor), name)
        scored: dict[str, dict[int, Axis]] = {}
        for axis in network.axes:
            if axis.role in SCORED_ROLES:
                scored.setdefault(first_name[id(tensors[axis.tensor])], {})[axis.dim] = axis
        self.tensors = {name: tensors[name] for name in scored}
        self.dims = {name: tuple(axes) for name, axes in scored.items()}
        self.places = tuple(_place(name, axis) for name, axes in scored.items() for axis in axes.values())
        self._num_channels = network.num_channels

    def mean(self, sums: Sequence[NDArray[np.float64] | None]) -> NDArray[np.float64]:
        """Returns one value per channel, float64: the mean over its axes of what its indices have there together.

        `sums` has one array for each of `places`, with one value per index, or None where an axis does not count. An
        index inside a head counts for its channel and for the head. A channel without an axis that counts gets 0.
        Raises InputError for arrays of another shape.
        """
        shares = []
        for place, values in zip(self.places, sums, strict=True):
            if values is not None and values.shape != place.axis.channels.shape:
                raise InputError(
                    f"{place.name!r} has {place.axis.channels.size} indices along dimension {place.axis.dim}, but a "
                    f"criterion gives values of shape {values.shape}"
                )
            shares.append(None if values is None else values[place.indices])
        return self.mean_of_shares(shares)

    def mean_of_shares(self, shares: Sequence[NDArray[np.float64] | None]) -> NDArray[np.float64]:
        """Returns the same as `mean`, from one value for each pair of index and taker: aligned with `Place.takers`."""
        counted = [(place, values) for place, values in zip(self.places, shares, strict=True) if values is not None]
        num_axes = np.zeros(self._num_channels, dtype=np.int64)
        for place, _ in counted:
            # Fancy assignment writes each channel once, however many indices it takes here: one axis counts as one.
            num_axes[place.takers] += 1
        takers = np.concatenate([_NONE, *(place.takers for place, _ in counted)])
        values = np.concatenate([np.empty(0), *(values for _, values in counted)])
        return np.bincount(takers, weights=values, minlength=self._num_channels) / np.maximum(num_axes, 1)


def _place(name: str, axis: Axis) -> Place:
    by_channel = np.flatnonzero(axis.channels != STAYS)
    by_owner = np.flatnonzero((axis.owners != STAYS) & (axis.owners != axis.channels))
    takers = np.concatenate([axis.channels[by_channel], axis.owners[by_owner]])
    return Place(name, axis, np.concatenate([by_channel, by_owner]), takers)


def normalized(network: Network, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns values per channel divided by the mean of their group, where that is above zero."""
    result = np.array(values, dtype=np.float64)
    for group in network.groups:
        mean = result[group.channels].mean()
        if mean > 0:
            result[group.channels] /= mean
    return result


def checked_tensors(network: Network, model: nn.Module) -> dict[str, Tensor]:
    """Returns the model's parameters and buffers by all of their names.

    Raises InputError if they are not those that `network` was traced with, or hold no values (meta device).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = dict(chain(parameters.items(), model.named_buffers(remove_duplicate=False)))
    for axis in network.axes:
        if axis.tensor not in tensors:
            raise InputError(f"the model has no tensor {axis.tensor!r}; trace this model, or score the one traced")
        shape = tensors[axis.tensor].shape
        if axis.dim >= len(shape) or shape[axis.dim] != len(axis.channels):
            sizes = {other.dim: len(other.channels) for other in network.axes if other.tensor == axis.tensor}
            traced = ", ".join(str(sizes.get(dim, "?")) for dim in range(max(len(shape), max(sizes) + 1)))
            raise InputError(
                f"tensor {axis.tensor!r} has shape {tuple(shape)} in the model but ({traced}) in the network; "
                "trace the model again if it was changed"
            )
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise InputError(f"parameter {name!r} is on the meta device and has no values; load the weights first")
    return tensors


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError if a parameter among `tensors` holds NaN or infinite values."""
    for name, parameter in tensors.items():
        if not isinstance(parameter, nn.Parameter):
            continue
        # One pass over the memory settles it, unless a sum of finite values overflows.
        if not bool(torch.isfinite(parameter.detach().sum())) and not bool(torch.isfinite(parameter.detach()).all()):
            raise InputError(f"parameter {name!r} of shape {tuple(parameter.shape)} holds NaN or infinite values")
