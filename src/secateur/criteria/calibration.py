"""Calibration: the batches that criteria look at, and what was learned from them, each statistic at most once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from secateur.criteria.footprints import Footprints, checked_tensors
from secateur.errors import InputError
from secateur.graph.network import Network

Loss = Callable[[Any, Tensor], Tensor]
"""Maps the model's own output (see `logits_of`) and the labels to a scalar, the mean over the samples of a batch."""

Batches = Iterable[tuple[Any, Tensor]]


class Measured(Protocol):
    """What a statistic returns: anything that tells how many samples went in."""

    @property
    def num_samples(self) -> int: ...


@dataclass(frozen=True)
class Statistic:
    """One tensor per differentiated tensor, of its shape, in float32 or wider; and how many samples went in."""

    values: dict[str, Tensor]
    num_samples: int


M = TypeVar("M", bound=Measured)


class Source(Protocol):
    """Where a criterion gets its statistics from: one `Calibration`, or those of several domains together."""

    @property
    def num_samples(self) -> int: ...

    def statistic(self, kind: Callable[[Calibration], M]) -> M: ...


@dataclass(eq=False)
class Calibration:
    """A model, what is asked about it, and the samples to learn it from. Made by `calibrate`.

    `tensors` are those to differentiate, `consumers` the names of those whose inputs Gram matrices are made of; `loss`
    None is `cross_entropy`. Batches that can be read several times (a list, a data loader) are read once for each
    statistic; those of an iterator are kept in memory when the first statistic reads it.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    batches: Batches
    loss: Loss | None = None
    consumers: Collection[str] = ()
    _known: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False)
    _versions: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._versions = {name: _version(tensor) for name, tensor in self.tensors.items()}

    @property
    def num_samples(self) -> int:
        """How many samples went into the statistics that were computed so far."""
        return max((measured.num_samples for measured in self._known.values()), default=0)

    def statistic(self, kind: Callable[[Calibration], M]) -> M:
        """Returns `kind(self)`, computed the first time that it is asked for.

        Raises InputError if the weights were changed in place since this calibration was made, and as `kind` does.
        """
        for name, tensor in self.tensors.items():
            if _version(tensor) != self._versions[name]:
                raise InputError(f"{name!r} was changed after the model was calibrated; call calibrate again")
        if kind not in self._known:
            if isinstance(self.batches, Iterator):
                self.batches = list(self.batches)
            self._known[kind] = kind(self)
        return self._known[kind]


def calibrate(network: Network, model: nn.Module, batches: Batches, *, loss: Loss | None = None) -> Calibration:
    """Returns batches as `score` takes them, with a memory: each statistic of them is computed at most once.

    Gradients, squared gradients and layer inputs are computed when a criterion first needs them, and serve every
    criterion that is scored with this calibration afterwards:

        calibration = calibrate(network, model, loader)
        scores = {name: score(network, model, name, calibration) for name in ("taylor", "taylor_signed", "hessian")}

    Arguments are those of `score`. A list or a data loader is read once for each statistic (so a loader that shuffles
    shows other samples to each); an iterator is read once and its batches are kept in memory.

    Raises:
        InputError: the tensors of `model` do not have the sizes that `network` was traced with, or hold no values.
            Batches that cannot be used are refused when they are read, by `score`.
    """
    return calibration_of(Footprints(network, checked_tensors(network, model)), model, batches, loss)


def calibration_of(footprints: Footprints, model: nn.Module, batches: Batches, loss: Loss | None) -> Calibration:
    """Returns the calibration for what `footprints` has; Gram matrices are for weights whose inputs may go."""
    consumers = {place.name for place in footprints.places if place.role == "in" and place.takers.size}
    return Calibration(model, footprints.tensors, batches, loss, consumers)


def _version(tensor: Tensor) -> int:
    """Returns a number that grows with every change in place; 0 for tensors that do not count them."""
    return 0 if tensor.is_inference() else tensor._version
