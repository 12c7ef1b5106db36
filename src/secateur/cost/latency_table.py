"""Latency predicted before anything is cut, from times of layers and of a few cut models on the user's own device.

A forward pass is taken to last

    seconds(mask) = a T + b + c V + d P,    a, b, c, d >= 0

where T is the sum of the times of all linear layers and convolutions, each measured by itself at a grid of widths and
interpolated at those that survive; V is how many numbers these layers read and write, for all that comes between them
(norms, activations, sums); P is the MACs of all other products, such as those of attention. The four numbers are fitted
to measured latencies of the model and of copies of which something was cut.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.allocation import Budget, Plan, allocate
from secateur.allocation.plan import describe_inputs
from secateur.cost.latency import sample_latency
from secateur.cost.layers import Grid, Timer, Use, time_layer, uses_of
from secateur.cost.store import Store
from secateur.criteria import Scores
from secateur.errors import InputError
from secateur.graph.network import Axis, Bools, Network
from secateur.surgery import cut

Floats = NDArray[np.float64]
ROUNDS = 10
"""How often a cut copy and the whole model take turns."""
TOGETHER, ALONE = (0.3, 0.5, 0.8), 0.5
"""How much of its channels a copy has lost: all kinds together, and each kind alone."""


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Predicts how many seconds a forward pass takes after a cut, for the inputs and the device of `measure`.

    `probes` are pairs of seconds, measured and predicted: of the whole model first, then of cut copies of it.
    """

    network: Network
    features: Features
    coefficients: tuple[float, ...]
    probes: tuple[tuple[float, float], ...]

    @classmethod
    def measure(
        cls,
        network: Network,
        model: nn.Module,
        inputs: Any,
        *,
        file: Path | None = None,
        timer: Timer = sample_latency,
    ) -> LatencyTable:
        """Returns the table of `model`, measured on the device that it is on and as it is now: dtype, threads, batch.

        Args:
            network: the trace of `model`, on inputs of the same shapes but for the batch.
            inputs: what a pass is measured on, as for `measure_latency`; predictions are for the whole batch.
            file: where times are kept, as JSON. What it holds for this device, number of threads and version of torch
                is not measured again, be it layers of another model; what is new is added to it.
            timer: what measures; like `sample_latency`.

        It takes about a minute for a model of 20 GMACs on a CPU; the quieter the machine, the better the predictions.
        The model is left as it was.

        Raises:
            InputError: `inputs` have other shapes than were traced, or `file` holds something else.
        """
        described, traced = describe_inputs(inputs), describe_inputs(network.inputs)
        if _shapes(described) != _shapes(traced):
            raise InputError(f"the network was traced on {traced}, latency is asked on {described}; trace it on these")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        store = Store(file, device)

        def grid_of(use: Use, rows: bool, columns: bool) -> Grid:
            return store.layer(
                f"{use.shape} {rows} {columns}",
                lambda: time_layer(use.shape, device, timer, rows=rows, columns=columns),
            )

        features = Features(network, uses_of(model, inputs), _batch(described), grid_of)
        known = f"{network.fingerprint} {described}"
        probes = np.array(store.model(known, lambda: _probe(network, model, inputs, features, timer)))
        store.save()
        coefficients = _fit(probes[:, 1:], probes[:, 0])
        pairs = zip(probes[:, 0].tolist(), (probes[:, 1:] @ coefficients).tolist(), strict=True)
        return cls(network, features, tuple(coefficients.tolist()), tuple(pairs))

    def seconds(self, mask: Bools) -> float:
        """Returns the predicted seconds of a pass under a mask from `Network.mask`."""
        return float(np.dot(self.features(mask), self.coefficients))

    def predict(self, plan: Plan) -> float:
        """Returns the predicted seconds of a pass after `plan`. Raises InputError for a plan of another network."""
        if plan.fingerprint != self.network.fingerprint or plan.removed is None:
            raise InputError("latency is predicted for plans that `allocate` returns for the network of the table")
        return self.seconds(self.network.mask(plan.removed))

    def within(self, *, fraction: float | None = None, seconds: float | None = None) -> Budget:
        """Returns the budget for `allocate(latency=...)`: a fraction (in (0, 1]) of the dense latency, or seconds.

        Raises InputError unless one of the two is given, and in range.
        """
        if (fraction is None) == (seconds is None):
            raise InputError("give either fraction= (of the dense latency) or seconds=")
        if fraction is not None and not 0 < fraction <= 1:
            raise InputError(f"fraction is {fraction!r}; what may remain of the dense latency lies in (0, 1]")
        if seconds is not None and not 0 < seconds < float("inf"):
            raise InputError(f"seconds is {seconds!r}; expected a positive number")
        limit = self.seconds(self.network.mask()) * fraction if fraction is not None else seconds
        return Budget(float(limit or 0), self.seconds, "seconds")

    def __str__(self) -> str:
        (dense, _), *cuts = self.probes
        errors = ", ".join(f"{predicted / measured - 1:+.1%}" for measured, predicted in cuts)
        return f"latency {dense * 1e3:.3g} ms whole; of {len(cuts)} cut copies predicted with errors of {errors}"


class Features:
    """Maps a mask to what the time of a pass is made of: (T, 1, V, P), V and P as fractions of the whole model's."""

    def __init__(
        self, network: Network, uses: Sequence[Use], batch: int, grid_of: Callable[[Use, bool, bool], Grid]
    ) -> None:
        axes = {(a.tensor, a.dim): a for a in network.axes}
        self._macs_cost, self._axes = network.macs_cost, list[Axis]()
        known: dict[tuple[bytes, bytes], int] = {}
        self._sizes = np.array([(u.shape.rows, u.shape.columns) for u in uses], np.float64).reshape(-1, 2)
        self._sides = np.full(self._sizes.shape, -1, np.int64)
        for i, use in enumerate(uses):
            for dim in (0, 1):
                axis = axes.get((use.weight, dim))
                if axis is not None and ((axis.channels >= 0).any() or (axis.owners >= 0).any()):
                    key = axis.channels.tobytes(), axis.owners.tobytes()
                    self._sides[i, dim] = known.setdefault(key, len(self._axes))
                    self._axes += [axis] if len(known) > len(self._axes) else []
        together: dict[Grid, list[int]] = {}
        for i, (use, varies) in enumerate(zip(uses, (self._sides >= 0).tolist(), strict=True)):
            together.setdefault(grid_of(use, *varies), []).append(i)
        self._grids = [(grid, np.array(numbers)) for grid, numbers in together.items()]
        self._macs = np.array([u.macs / batch for u in uses], np.float64)
        self._reads = np.array([(u.reads, u.writes) for u in uses], np.float64).reshape(-1, 2)
        self._depthwise = np.array([u.shape.is_depthwise for u in uses], np.bool_)
        self._whole = np.ones(2)
        self._whole = np.maximum(self(network.mask())[2:], 1e-12)

    def __call__(self, mask: Bools) -> Floats:
        """Returns the features under a mask from `Network.mask`."""
        counts = np.array([a.alive(mask).sum() for a in self._axes] + [0])
        left = np.where(self._sides >= 0, counts[self._sides], self._sizes)
        rows, columns = (left / self._sizes).T
        layers = sum(float(grid.at(*left[numbers].T).sum()) for grid, numbers in self._grids)
        reads = self._reads[:, 0] @ np.where(self._depthwise, rows, columns)
        others = max(0.0, self._macs_cost(mask) - float(self._macs @ (rows * columns)))
        return np.array([layers, 1, *(np.array([reads + self._reads[:, 1] @ rows, others]) / self._whole)])


def _probe(network: Network, model: nn.Module, inputs: Any, features: Features, timer: Timer) -> list[list[float]]:
    """Returns measured seconds and features: of the model itself, and of copies that have lost something.

    Each copy takes turns with the whole model and counts as a fraction of it, so that a slow spell falls on both.
    """
    whole, found = [], []
    for plan in _probe_plans(network):
        times = timer({"whole": model, "cut": cut(model, plan)}, inputs, rounds=ROUNDS)
        whole += times["whole"]
        ratio = statistics.median(c / w for c, w in zip(times["cut"], times["whole"], strict=True))
        found.append([ratio, *features(network.mask(plan.removed)).tolist()])
    dense = statistics.median(whole or timer({"whole": model}, inputs, rounds=ROUNDS)["whole"])
    return [[dense, *features(network.mask()).tolist()], *([ratio * dense, *values] for ratio, *values in found)]


def _probe_plans(network: Network) -> Iterator[Plan]:
    """Yields plans that take from all kinds of channels together, and from each kind alone."""
    scores = Scores(np.zeros(network.num_channels), "none")
    kinds = list(dict.fromkeys(g.kind for g in network.groups))
    requests: list[dict[str, Any]] = [{"ratios": dict.fromkeys(kinds, rate)} for rate in TOGETHER]
    for kind in kinds:
        requests.append({"ratios": {kind: ALONE}, "keep": [k for k in kinds if k != kind]})
    for request in requests if len(kinds) > 1 else requests[: len(TOGETHER)]:
        plan = allocate(network, scores, scope="local", **request)
        if plan.cuts:
            yield plan


def _fit(values: Floats, seconds: Floats) -> Floats:
    """Returns the coefficients, none negative, of least squared relative error, scaled to be exact for the first row.

    With four of them the best is found among the ordinary least-squares solutions on all subsets.
    """
    relative = values / seconds[:, None]
    best, least = np.zeros(values.shape[1]), np.inf
    for size in range(1, values.shape[1] + 1):
        for subset in itertools.combinations(range(values.shape[1]), size):
            solution = np.zeros(values.shape[1])
            solution[list(subset)] = np.linalg.lstsq(relative[:, subset], np.ones(len(seconds)), rcond=None)[0]
            error = float(np.square(relative @ solution - 1).sum())
            if solution.min() >= 0 and error < least and values[0] @ solution > 0:
                best, least = solution, error
    return best * (seconds[0] / (values[0] @ best))


def _shapes(described: Any) -> Any:
    """Returns described inputs without the first size of each tensor, the batch."""
    if isinstance(described, dict):
        return {k: v[1:] if k == "tensor" else _shapes(v) for k, v in described.items()}
    return [_shapes(v) for v in described] if isinstance(described, list) else described


def _batch(described: Any) -> int:
    """Returns the first size of the first tensor among described inputs, or 1."""
    if isinstance(described, dict) and "tensor" in described:
        return int((described["tensor"] or [1])[0])
    inside = described.values() if isinstance(described, dict) else described if isinstance(described, list) else ()
    return next((_batch(v) for v in inside), 1)
