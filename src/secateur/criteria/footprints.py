"""Where each channel lives: the scored axes that it occupies, for the whole network at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import InputError
from secateur.graph.network import STAYS, Axis, Network

SCORED_ROLES = ("out", "in", "norm")
"""What counts for a channel: its part of weights, on either side, and of norm scales; not biases or embeddings."""

_NONE = np.empty(0, dtype=np.int64)


class Footprints:
    """The scored axes of a network, each (tensor, dim) once, and what each channel occupies of them.

    `tensors` are the tensors with a scored axis, by the first name that the model has for each (tied tensors have
    several); `dims` are their scored dimensions.
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
        axes = [axis for of_tensor in scored.values() for axis in of_tensor.values()]
        indices, takers = [_NONE], [_NONE]
        self._num_axes = np.zeros(network.num_channels, dtype=np.int64)
        start = 0
        for axis in axes:
            by_channel = np.flatnonzero(axis.channels != STAYS)
            by_owner = np.flatnonzero((axis.owners != STAYS) & (axis.owners != axis.channels))
            takers += [axis.channels[by_channel], axis.owners[by_owner]]
            indices += [start + by_channel, start + by_owner]
            start += axis.channels.size
            # Fancy assignment writes each channel once, however many indices it takes here: one axis counts as one.
            self._num_axes[np.concatenate(takers[-2:])] += 1
        self._indices, self._takers = np.concatenate(indices), np.concatenate(takers)

    def mean(self, sums: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Returns one value per channel, float64: the mean over its axes of what its indices have there together.

        `sums` has one array per scored axis with one value per index, in the order of `dims`. An index inside a head
        counts for its channel and for the head. A channel without a scored axis gets 0.
        """
        values = np.concatenate([np.empty(0), *sums])[self._indices]
        totals = np.bincount(self._takers, weights=values, minlength=self._num_axes.size)
        return totals / np.maximum(self._num_axes, 1)


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
