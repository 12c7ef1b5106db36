"""The plan: everything that a cut will do, as a value that can be printed, compared, saved and replayed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from secateur.errors import PlanError
from secateur.graph.network import Frozen, Ints, Network

FORMAT = 1
"""Version of the JSON layout of a plan."""


@dataclass(frozen=True)
class AxisCut:
    """Indices to remove along one dimension of a tensor, out of `size`."""

    tensor: str
    dim: int
    size: int
    removed: tuple[int, ...]

    @cached_property
    def indices(self) -> Ints:
        """What is removed, as an array."""
        return np.array(self.removed, np.int64)


@dataclass(frozen=True)
class AttributeChange:
    """An integer attribute (`path` from the module at `module`) and the value that it gets."""

    module: str
    path: tuple[str | int, ...]
    value: int


@dataclass(frozen=True)
class Rescale:
    """Entries (before the cut) along one dimension of a tensor to multiply by `factor`: they keep a temperature."""

    tensor: str
    dim: int
    indices: tuple[int, ...]
    factor: float


@dataclass(frozen=True)
class GroupChange:
    """What happens to a group: fibres x width before and after."""

    name: str
    kind: str
    family: str
    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def kept(self) -> float:
        """The fraction of channels kept."""
        return self.after[0] * self.after[1] / (self.before[0] * self.before[1])


@dataclass(frozen=True)
class Plan:
    """What goes from where, the cost before and after, and what is left alone and why.

    `params` and `macs` are what remains (MACs per example at the traced input size), `dense_params` and `dense_macs`
    what there was. `branches` are the residual branches dropped. `request` is what was asked. `inputs` describes the
    example inputs for the check after the cut. A plan is plain JSON (`to_json`, `from_json`); `network` rides along
    until then, so that it need not be traced again.
    """

    fingerprint: str
    request: dict[str, Any]
    params: int
    macs: int
    dense_params: int
    dense_macs: int
    groups: tuple[GroupChange, ...]
    cuts: tuple[AxisCut, ...]
    attributes: tuple[AttributeChange, ...]
    rescales: tuple[Rescale, ...]
    frozen: tuple[Frozen, ...]
    notes: tuple[str, ...]
    inputs: Any
    branches: tuple[str, ...] = ()
    network: Network | None = field(default=None, repr=False, compare=False)
    removed: Ints | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> str:
        """Returns the plan as JSON; indices are written as ranges."""
        content = {
            k: getattr(self, k) for k in ("fingerprint", "request", "params", "macs", "dense_params", "dense_macs")
        }
        content["format"] = FORMAT
        content["groups"] = [asdict(g) for g in self.groups]
        content["cuts"] = [
            {"tensor": c.tensor, "dim": c.dim, "size": c.size, "removed": _ranges(c.indices)} for c in self.cuts
        ]
        content["attributes"] = [asdict(a) for a in self.attributes]
        content["rescales"] = [{**asdict(r), "indices": _ranges(np.array(r.indices, np.int64))} for r in self.rescales]
        content["frozen"] = [asdict(f) for f in self.frozen]
        content["notes"] = list(self.notes)
        content["inputs"] = self.inputs
        content["branches"] = list(self.branches)
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Returns the plan that `to_json` wrote; raises PlanError when the text is not one."""
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise PlanError(f"the plan has format {content['format']!r}; this version reads {FORMAT}")
            return cls(
                **{k: content[k] for k in ("fingerprint", "request", "params", "macs", "dense_params", "dense_macs")},
                groups=tuple(
                    GroupChange(**{**g, "before": tuple(g["before"]), "after": tuple(g["after"])})
                    for g in content["groups"]
                ),
                cuts=tuple(AxisCut(**{**c, "removed": _indices(c["removed"])}) for c in content["cuts"]),
                attributes=tuple(AttributeChange(**{**a, "path": tuple(a["path"])}) for a in content["attributes"]),
                rescales=tuple(Rescale(**{**r, "indices": _indices(r["indices"])}) for r in content["rescales"]),
                frozen=tuple(Frozen(**f) for f in content["frozen"]),
                notes=tuple(content["notes"]),
                inputs=content["inputs"],
                branches=tuple(content.get("branches", ())),
            )
        except PlanError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not a plan: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        families: dict[str, list[GroupChange]] = {}
        for group in self.groups:
            families.setdefault(group.family, []).append(group)
        lines = [
            f"parameters {self.dense_params:,} -> {self.params:,} ({self.params / max(1, self.dense_params):.1%}), "
            f"MACs {self.dense_macs:,} -> {self.macs:,} ({self.macs / max(1, self.dense_macs):.1%})"
        ]
        for name, groups in families.items():
            before = sum(g.before[0] * g.before[1] for g in groups)
            after = sum(g.after[0] * g.after[1] for g in groups)
            lines.append(f"  {name}: {before:,} -> {after:,} channels in {len(groups)} groups")
        if self.branches:
            lines.append(f"  branches dropped: {', '.join(self.branches)}")
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])


def _ranges(values: Ints) -> str:
    """Returns sorted indices as text: (0, 1, 2, 5) becomes "0-2,5"."""
    if not values.size:
        return ""
    breaks = np.flatnonzero(np.diff(values) != 1)
    starts = values[np.concatenate([[0], breaks + 1])]
    ends = values[np.concatenate([breaks, [values.size - 1]])]
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in zip(starts.tolist(), ends.tolist(), strict=True))


def _indices(text: str) -> tuple[int, ...]:
    result: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        result.extend(range(int(first), int(last or first) + 1))
    return tuple(result)


def describe_inputs(value: Any) -> Any:
    """Returns example inputs as JSON: tensors by shape and type, everything else as it is.

    Raises PlanError for what JSON cannot hold.
    """
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [describe_inputs(v) for v in value]}
    if isinstance(value, list):
        return [describe_inputs(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {str(k): describe_inputs(v) for k, v in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PlanError(
        f"example inputs of type {type(value).__name__} cannot be written into a plan; pass tensors and plain values"
    )


def restore_inputs(value: Any) -> Any:
    """Returns example inputs, with tensors on `meta`, from what `describe_inputs` gave."""
    if isinstance(value, list):
        return [restore_inputs(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.empty(value["tensor"], dtype=getattr(torch, value["dtype"]), device="meta")
    if "tuple" in value:
        return tuple(restore_inputs(v) for v in value["tuple"])
    return {k: restore_inputs(v) for k, v in value["dict"].items()}


def make_plan(network: Network, removed: Ints, request: dict[str, Any], notes: tuple[str, ...]) -> Plan:
    """Returns the plan that removes the channels `removed` (and all that lies inside removed heads) of `network`."""
    mask = network.mask(removed)
    cuts = []
    for axis in network.axes:
        alive = axis.alive(mask)
        if not alive.all():
            cuts.append(AxisCut(axis.tensor, axis.dim, alive.size, tuple(np.flatnonzero(~alive).tolist())))
    groups = []
    owner = np.full(network.num_channels + 1, -1, np.int64)
    for axis in network.axes:
        inside = axis.owners >= 0
        owner[axis.channels[inside]] = axis.owners[inside]
    for group in network.groups:
        alive = mask[group.channels] & mask[owner[group.channels]]
        after = (int(alive.any(axis=1).sum()), int(alive.sum(axis=1).max()))
        before = (int(group.channels.shape[0]), int(group.channels.shape[1]))
        groups.append(GroupChange(group.name, group.kind, group.family, before, after))
    dense = network.mask()
    rescales = []
    for fix in network.scale_fixes:
        factor = (fix.extent.size(mask) / fix.extent.size(dense)) ** fix.exponent
        if factor != 1.0:
            for number, indices in fix.entries:
                axis = network.axes[number]
                rescales.append(Rescale(axis.tensor, axis.dim, tuple(indices.tolist()), factor))
    return Plan(
        fingerprint=network.fingerprint,
        request=request,
        params=network.params_cost(mask),
        macs=network.macs_cost(mask),
        dense_params=network.dense_params,
        dense_macs=network.dense_macs,
        groups=tuple(groups),
        cuts=tuple(cuts),
        attributes=_attribute_changes(network, mask),
        rescales=tuple(rescales),
        frozen=network.frozen,
        notes=notes,
        inputs=describe_inputs(network.inputs),
        branches=network.dropped,
        network=network,
        removed=removed,
    )


def _attribute_changes(network: Network, mask: np.ndarray) -> tuple[AttributeChange, ...]:
    dense = network.mask()
    changes: dict[tuple[str, tuple[str | int, ...]], tuple[int, bool]] = {}
    for attribute in network.attributes:
        key = (attribute.module, attribute.path)
        value = attribute.extent.size(mask)
        changed = value != attribute.extent.size(dense)
        if key in changes and changes[key][0] != value:
            raise PlanError(
                f"{attribute} would have to be both {changes[key][0]} and {value}: two axes of unequal size read it"
            )
        changes[key] = (value, changed)
    return tuple(AttributeChange(m, p, v) for (m, p), (v, changed) in changes.items() if changed)
