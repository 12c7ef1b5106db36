"""Models whose way depends on values: they run on real tensors, and every such decision is kept.

A model that cannot run on `meta` (it reads a value, or makes a tensor whose size depends on values) is traced on a copy
with its weights. What it decides by (scalars read, indices of what was selected) is recorded; the trace of the cut
model repeats the same decisions, so that both take the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.errors import TraceError
from secateur.graph.copies import map_tensors

BY_NAME = ("nms", "_local_scalar_dense", "equal", "is_nonzero")
DECIDING_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass
class Values:
    """Real example inputs of a model, and the decisions of its first run in order: (operator, result)."""

    inputs: Any
    decisions: list[tuple[str, Any]] = field(default_factory=list)
    next: int | None = None
    """The decision to repeat next; None while they are recorded."""

    def decide(self, name: str, run: Callable[[], Any]) -> Any:
        """Returns the result of a deciding operator: that of `run`, or the recorded one.

        Raises TraceError when the model takes another way than the one that was recorded.
        """
        if self.next is None:
            result = run()
            self.decisions.append((name, _kept(result)))
            return result
        if self.next >= len(self.decisions) or self.decisions[self.next][0] != name:
            expected = self.decisions[self.next][0] if self.next < len(self.decisions) else "nothing more"
            raise TraceError(f"the model takes another way than before: it decides by {name}, not by {expected}")
        result = self.decisions[self.next][1]
        self.next += 1
        return _kept(result)

    def repeated(self) -> Values:
        """Returns the values for a run that repeats the decisions."""
        return Values(self.inputs, self.decisions, 0)


def is_deciding(func: Any) -> bool:
    """Whether the result of an operator (its size, or a Python number) depends on values."""
    if any(tag in func.tags for tag in DECIDING_TAGS):
        return True
    return func._schema.name.split("::")[-1] in BY_NAME


def positions(values: Values, tables: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Returns the tables of an indexing operation with positions, by which it decides, in the place of masks."""
    result: list[torch.Tensor | None] = []
    for table in tables:
        if table is None or table.dtype != torch.bool:
            result.append(table)
        else:
            result += values.decide("nonzero", lambda mask=table: torch.nonzero(mask)).unbind(1)
    return result


def _kept(result: Any) -> Any:
    """Returns a result that later operations cannot change."""
    if isinstance(result, torch.Tensor):
        return result.detach().clone()
    return type(result)(map(_kept, result)) if isinstance(result, (tuple, list)) else result


def stand_in(inputs: Any) -> Any:
    """Returns nested inputs with random numbers (always the same) for tensors without values."""
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor
        if tensor.is_floating_point():
            return torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    return map_tensors(inputs, fill)
