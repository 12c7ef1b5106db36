"""Bases inside attention heads: which are free, and in which one a head loses least when it gets narrower.

The queries and keys of a head meet only in their product, and its values only in the projection behind the attention:
whatever is done to the one by an invertible map can be undone in the other. So a head that keeps r of its dimensions
need not keep r of those that it had. Whether this holds in a given model (a norm of the queries, a rotary embedding,
a cosine would spoil it) is tried out on a few samples instead of guessed from the names of modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from secateur.criteria.activations import Moments, Use, watching
from secateur.graph import Network
from secateur.graph.copies import output_tensors
from secateur.graph.labels import Ints, named_tensors
from secateur.surgery.lockstep import Inputs, runs_of
from secateur.surgery.survey import Survey, key_of


@dataclass(frozen=True, eq=False)
class Place:
    """Where the dimensions of heads lie along a dimension of a linear weight: positions [heads, width]."""

    tensor: str
    dim: int
    positions: Ints

    def rows_in(self, use: Use) -> Tensor | None:
        """Returns where the dimensions lie in the output of a use, or None where they do not."""
        if self.dim or self.tensor != use.name:
            return None
        if int(self.positions.min()) < use.rows.start or int(self.positions.max()) >= use.rows.stop:
            return None
        return torch.from_numpy(self.positions - use.rows.start).to(use.arguments["input"].device)

    def columns_in(self, use: Use) -> Tensor | None:
        """Returns where the dimensions lie in the input of a use, or None where they do not."""
        if not self.dim or self.tensor != use.name:
            return None
        return torch.from_numpy(self.positions).to(use.arguments["input"].device)


@dataclass(eq=False)
class Pair:
    """A group of head dimensions and the two places that meet: queries and keys, or values and the projection.

    `free` says that maps of the one can be undone in the other; `shiftable`, which of the two sides (0 or 1) may be
    shifted by a constant without effect: the keys, since a softmax over them does not see it.
    """

    name: str
    first: Place
    second: Place
    free: bool = False
    shiftable: frozenset[int] = field(default_factory=frozenset)

    @property
    def is_qk(self) -> bool:
        """Whether these are queries and keys, rows both."""
        return self.second.dim == 0

    def widths_left(self, stays: Mapping[tuple[str, int], np.ndarray]) -> list[int]:
        """Returns for each head how many dimensions are left, 0 for heads that lose none or all of them.

        `stays` tells by (tensor, dimension) which indices a plan leaves.
        """
        width = self.first.positions.shape[1]
        mask = stays.get((self.first.tensor, self.first.dim))
        left = [] if mask is None else mask[self.first.positions].sum(axis=1).tolist()
        return [n if n < width else 0 for n in left]


@dataclass(frozen=True, eq=False)
class Mix:
    """Indices along a dimension of a dense weight that are replaced: those at `kept` by `matrix` times `sources`."""

    tensor: str
    dim: int
    kept: Ints
    sources: Ints
    matrix: Tensor


def pairs_of(network: Network, found: Survey) -> list[Pair]:
    """Returns the groups of head dimensions that lie in exactly two places of linear weights that may be changed."""
    changeable = {key.name for key in found.consumers if not found.why_not(key)}
    pairs = []
    for group in network.groups:
        if group.kind != "head_dims":
            continue
        places: list[Place] = []
        for number, count in dict.fromkeys(group.members):
            axis = network.axes[number]
            if axis.role not in ("out", "in"):
                continue
            order = np.argsort(axis.channels, kind="stable")
            where = np.searchsorted(axis.channels[order], group.channels)
            places += [Place(axis.tensor, axis.dim, order[where + i]) for i in range(count)]
        places.sort(key=lambda place: place.dim)
        if [p.dim for p in places] in ([0, 0], [0, 1]) and all(p.tensor in changeable for p in places):
            first, second = places
            pairs.append(Pair(group.name, first, second))
    return pairs


@dataclass(eq=False)
class _Change:
    """What is done to a pair in a trial: maps [heads, width, width] of its two sides or, without, a shift of one."""

    pair: Pair
    maps: tuple[Tensor, Tensor] | None = None
    side: int = 0
    begun: bool = False
    failed: bool = False

    def outputs(self, use: Use, output: Tensor) -> Tensor:
        """Returns the output of a use with its rows changed."""
        for side, place in enumerate((self.pair.first, self.pair.second)):
            index = place.rows_in(use)
            if index is None or (self.maps is None and side != self.side):
                continue
            self.begun = True
            old = output[..., index]
            if self.maps is None:
                ramp = torch.linspace(-1, 1, index.shape[1], device=old.device, dtype=old.dtype)
                new = old + ramp * (old.std() + old.abs().mean())
            else:
                new = _mapped(old, self.maps[side])
            output = output.index_copy(-1, index.flatten(), new.flatten(-2))
        return output

    def inputs(self, use: Use, x: Tensor) -> Tensor:
        """Returns what a use should read under the change, for what it reads without."""
        index = self.pair.second.columns_in(use)
        if index is None or self.maps is None or not self.begun:
            return x
        return x.index_copy(-1, index.flatten(), _mapped(x[..., index], self.maps[1]).flatten(-2))


def _mapped(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("...hd,hed->...he", x, matrix.to(x))


@dataclass(eq=False)
class _Trial:
    """A pass in which pairs are changed; every layer must read there what it should."""

    changes: list[_Change]

    def compare(self, own: Use, use: Use | None) -> None:
        """Compares what a layer reads with what it reads in the model as it is."""
        expected: Tensor = own.arguments["input"]
        for change in self.changes:
            expected = change.inputs(own, expected)
        same = use is not None and key_of(use) == key_of(own)
        self.compare_all([expected], [use.arguments["input"]] if use is not None and same else [])

    def compare_all(self, expected: list[Tensor], found: list[Tensor]) -> None:
        """Blames all that has been changed so far unless the tensors agree."""
        if len(expected) != len(found) or not all(map(_agree, expected, found)):
            for change in self.changes:
                change.failed |= change.begun

    def outputs(self, use: Use, output: Tensor) -> Tensor:
        """Returns the output of a use with all changes."""
        for change in self.changes:
            output = change.outputs(use, output)
        return output


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in half of their digits."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point() or not a.numel():
        return True
    return float((a - b).abs().max()) <= torch.finfo(a.dtype).eps ** 0.5 * float(a.abs().max())


def try_out(model: nn.Module, inputs: Inputs, pairs: Sequence[Pair]) -> None:
    """Finds out which pairs are free, and which of their sides may be shifted.

    The model runs over `inputs` as it is and, beside that, with pairs changed. Every layer must then read what it reads
    in the model as it is (mapped, in front of a projection); where one does not, all pairs changed up to there are
    blamed. What goes on behind a layer is always the model's own output, so that no difference is carried along.
    """
    if not pairs:
        return
    generator = torch.Generator().manual_seed(0)
    qk = [p for p in pairs if p.is_qk]
    trials = [
        _Trial([_Change(p, _maps(p, generator)) for p in qk]),
        _Trial([_Change(p, _maps(p, generator)) for p in pairs if not p.is_qk]),
        *(_Trial([_Change(p, side=side) for p in qk]) for side in (0, 1)),
    ]
    with runs_of(model, [inputs] * (1 + len(trials))) as (own, *others):
        use, changed = own.advance(), [run.advance() for run in others]
        while use is not None:
            output = use.run()
            for trial, other in zip(trials, changed, strict=True):
                trial.compare(use, other)
            outputs = [trial.outputs(use, output) for trial in trials]
            use, changed = own.advance(output), [r.advance(o) for r, o in zip(others, outputs, strict=True)]
        for trial, run in zip(trials, others, strict=True):
            trial.compare_all(output_tensors(own.result), output_tensors(run.result))
    for change in (*trials[0].changes, *trials[1].changes):
        change.pair.free = change.begun and not change.failed
    for change in (*trials[2].changes, *trials[3].changes):
        if change.begun and not change.failed:
            change.pair.shiftable |= {change.side}


def _maps(pair: Pair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns well conditioned maps [heads, width, width] of both sides that leave their product; no rotations."""
    heads, width = pair.first.positions.shape
    draw = torch.randn(heads, width, width, generator=generator, dtype=torch.float64)
    there = torch.linalg.qr(draw)[0] * torch.linspace(0.5, 2.0, width, dtype=torch.float64)
    return there, torch.linalg.inv(there).mT if pair.is_qk else there


def best_bases(
    model: nn.Module, batches: Sequence[Inputs], pairs: Sequence[Pair], stays: Mapping[tuple[str, int], np.ndarray]
) -> list[Mix]:
    """Returns, for every head of free pairs that loses dimensions, what its remaining ones should become.

    `model` is a copy in eval mode; `stays` tells by (tensor, dimension) what a plan leaves. With rows for tokens, the
    logits Q K^T of a head (keys less their mean, where a softmax does not see it) have the singular values of
    S_q^(1/2) S_k^(1/2), S the second moments; what its values contribute, V P^T with P the columns of the projection,
    has those of S_v^(1/2) P^T. The best approximation of the rank that is left keeps the largest (Eckart and Young).
    """
    narrower = [p for p in pairs if p.free and any(p.widths_left(stays))]
    if not narrower:
        return []
    moments = _moments(model, batches, narrower)
    weights = named_tensors(model)
    found = []
    for pair in narrower:
        one, other = moments[pair.name]
        seconds = [
            m.covariance if side in pair.shiftable else m.gram / max(1, m.count) for side, m in enumerate((one, other))
        ]
        for head, width in enumerate(pair.widths_left(stays)):
            if not width:
                continue
            a, b = pair.first.positions[head], pair.second.positions[head]
            if pair.is_qk:
                left, right = low_rank(seconds[0][head], seconds[1][head], width)
            else:
                columns = weights[pair.second.tensor].detach()[:, torch.from_numpy(b)].double()
                columns = columns[stays.get((pair.second.tensor, 0), slice(None))]
                left, _ = low_rank(seconds[1][head], columns.mT @ columns, width)
                right = torch.linalg.pinv(left).mT
            for place, positions, matrix in ((pair.first, a, left), (pair.second, b, right)):
                kept = positions[stays[place.tensor, place.dim][positions]]
                found.append(Mix(place.tensor, place.dim, kept, positions, matrix))
    return found


def low_rank(first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A and B [rank, d] so that x^T A^T B y is as near to x^T y as can be, x and y of these second moments."""
    (root, inverse), (other_root, other_inverse) = _roots(first), _roots(second)
    u, s, vt = torch.linalg.svd(root @ other_root)
    scale = s[:rank].sqrt().unsqueeze(1)
    return scale * u.mT[:rank] @ inverse, scale * vt[:rank] @ other_inverse


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the square root of a second moment, and the pseudo-inverse of that."""
    values, vectors = torch.linalg.eigh(moment)
    seen = values > 1e-12 * values.amax()
    roots = torch.where(seen, values, 0.0).sqrt()
    inverse = torch.where(seen, 1 / roots, 0.0)
    return (vectors * roots) @ vectors.mT, (vectors * inverse) @ vectors.mT


def _moments(model: nn.Module, batches: Sequence[Inputs], pairs: Sequence[Pair]) -> dict[str, tuple[Moments, Moments]]:
    """Returns moments by head of both sides of each pair: of outputs for rows, of inputs for columns."""
    tensors = named_tensors(model)
    found: dict[str, tuple[Moments, Moments]] = {}
    for pair in pairs:
        heads, width = pair.first.positions.shape
        device = tensors[pair.first.tensor].device
        found[pair.name] = (Moments.zeros(heads, width, device), Moments.zeros(heads, width, device))

    def look(use: Use) -> Tensor:
        output = use.run()
        for pair in pairs:
            for place, moments in zip((pair.first, pair.second), found[pair.name], strict=True):
                for index, tensor in (
                    (place.rows_in(use), output),
                    (place.columns_in(use), use.arguments["input"]),
                ):
                    if index is not None:
                        moments.add(tensor.flatten(0, -2)[:, index].transpose(0, 1))
        return output

    with watching(tensors, look):
        for inputs in batches:
            model(*inputs.args, **inputs.kwargs)
    return found
