"""What a compensation must know before it changes a weight: how often it is used, and who else reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.criteria.activations import Use, watching
from secateur.graph.labels import named_tensors, tensors_in
from secateur.surgery.lockstep import Inputs


class Key(NamedTuple):
    """A consumer: a parameter, and the rows of it that one call takes."""

    name: str
    first: int
    last: int


def key_of(use: Use) -> Key:
    """Returns which consumer a use is of."""
    return Key(use.name, use.rows.start, use.rows.stop)


@dataclass(eq=False)
class Seen:
    """What one pass shows of a consumer: how often it is used, and the tensors that its bias is made of, in order."""

    uses: int = 0
    bias: tuple[str, ...] = ()


@dataclass(eq=False)
class Survey:
    """All consumers of a model, and the parameters that anything else reads, with the operator that does."""

    consumers: dict[Key, Seen] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict)

    def why_not(self, key: Key) -> str:
        """Returns why the weight of a consumer may not be changed; empty where it may."""
        if key.name in self.readers:
            return f"aten.{self.readers[key.name]} reads it as well"
        meeting = [k for k in self.consumers if k.name == key.name and k.first < key.last and key.first < k.last]
        if len(meeting) > 1 or self.consumers[key].uses > 1:
            return "it is used several times in one pass"
        return ""

    def serves_alone(self, bias: str) -> bool:
        """Whether a bias serves one consumer only, and nothing else."""
        served = [k for k, seen in self.consumers.items() for name in seen.bias if name == bias]
        weights = {k.name for k in served}
        return bias not in self.readers and len(weights) == 1 and not any(map(self.why_not, served))


def survey(model: nn.Module, inputs: Inputs) -> Survey:
    """Returns what one pass of `model` (a copy in eval mode) over `inputs` shows."""
    found = Survey()
    tensors = named_tensors(model)
    mode = _Readers(tensors, found)

    def note(use: Use) -> Tensor:
        seen = found.consumers.setdefault(key_of(use), Seen())
        seen.uses += 1
        bias = use.arguments.get("bias")
        seen.bias = () if bias is None else mode.parts_of(bias, use, tensors[use.name].shape[0])
        mode.inside = True
        try:
            return use.run()
        finally:
            mode.inside = False

    with mode, watching(tensors, note):
        model(*inputs.args, **inputs.kwargs)
    return found


class _Readers(TorchDispatchMode):
    """Sees which operators read a parameter, other than those that take a view of it or join biases."""

    def __init__(self, tensors: Mapping[str, Tensor], found: Survey) -> None:
        super().__init__()
        self.inside = False
        self._names = {t.untyped_storage().data_ptr(): name for name, t in tensors.items() if t.numel()}
        self._tensors = tensors
        self._found = found
        # Joined tensors are kept alive, so that no other takes their place in memory.
        self._joined: dict[int, tuple[Tensor, tuple[str, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        read = [] if self.inside else tensors_in((args, kwargs or {}))
        names = [self._names.get(t.untyped_storage().data_ptr(), "") for t in read]
        if func is torch.ops.aten.cat.default and all(map(self._is_whole, names, read)):
            self._joined[output.untyped_storage().data_ptr()] = (output, tuple(names))
        elif not func.is_view:
            for name in filter(None, names):
                self._found.readers[name] = func._schema.name.removeprefix("aten::")
        return output

    def _is_whole(self, name: str, tensor: Tensor) -> bool:
        return bool(name) and tensor.ndim == 1 and tensor.shape == self._tensors[name].shape

    def parts_of(self, bias: Tensor, use: Use, size: int) -> tuple[str, ...]:
        """Returns what a bias is made of: a parameter (the rows of the weight of `size` rows), or several joined.

        Empty where it is computed in some other way.
        """
        place = bias.untyped_storage().data_ptr()
        if place in self._joined:
            joined, names = self._joined[place]
            return names if joined.shape == bias.shape else ()
        name = self._names.get(place, "")
        if not name or self._tensors[name].shape != (size,):
            return ()
        return (name,) if bias.storage_offset() - self._tensors[name].storage_offset() == use.rows.start else ()
