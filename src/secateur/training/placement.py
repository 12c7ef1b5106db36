"""Where a model is trained: in one process, in replicas (DDP), or sharded over all processes (FSDP)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from secateur.training.batches import device_of
from secateur.training.config import MachineConfig, Precision
from secateur.training.parameter_groups import repeated_blocks

if TYPE_CHECKING:
    from accelerate import Accelerator

State = dict[str, Tensor]


class Placement:
    """A model made ready for training: `plain` has the weights, `forward` computes in eval mode, `trained` in training.

    One process trains the model itself, on the device that it is on. Several have replicas, or shards, on the devices
    that Accelerate gives them. States go in and out whole, so a run may be resumed by another number of processes.
    """

    def __init__(
        self, model: nn.Module, accelerator: Accelerator, machine: MachineConfig, precision: Precision
    ) -> None:
        """Takes the model as its owner has it; leave by `finish`."""
        from accelerate import DistributedType

        self.model, self.accelerator = model, accelerator
        self.world = accelerator.num_processes
        asked = machine.shard or accelerator.distributed_type == DistributedType.FSDP
        self.is_sharded = asked and self.world > 1
        if self.is_sharded:
            self.plain = sharded(model, accelerator.device, precision)
        else:
            self.plain = model.to(accelerator.device) if self.world > 1 else model
        if machine.channels_last:
            self.plain.to(memory_format=torch.channels_last)
        self.forward: Any = _compiled(self.plain) if machine.compile else self.plain
        self.trained: Any = self.forward
        if self.world > 1 and not self.is_sharded:
            self.trained = accelerator.prepare_model(self.forward, device_placement=False)
        self.device = accelerator.device if self.world > 1 else device_of(model)

    def synced(self, last: bool) -> AbstractContextManager[object]:
        """Returns what a forward and backward pass stands in; gradients are exchanged with the last part of a step."""
        if self.is_sharded:
            fully: Any = self.plain
            fully.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return self.trained.no_sync()
        return nullcontext()

    def state(self) -> State:
        """Returns the model's whole state by name; all processes must call it.

        That of a sharded model is in the main process's memory, not on its device, and empty in all others.
        """
        return self._whole(self.plain.state_dict().items())

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts a whole state into the model."""
        own = self.plain.state_dict()
        self.plain.load_state_dict({name: like(own[name], value) for name, value in state.items()})

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """Returns the optimizer's whole state as `parameter|key`, where `state` does; all processes must call it."""
        names = {id(p): name for name, p in self.plain.named_parameters()}
        return self._whole(
            (f"{names[id(p)]}|{key}", value)
            for group in optimizer.param_groups
            for p in group["params"]
            for key, value in optimizer.state[p].items()
        )

    def _whole(self, named: Iterable[tuple[str, Tensor]]) -> State:
        found: State = {}
        for name, value in named:
            full: Any = getattr(value, "full_tensor", None)
            gathered: Tensor = value if full is None else full()
            if not self.is_sharded:
                found[name] = gathered.detach()
            elif self.accelerator.is_main_process:
                found[name] = gathered.detach().cpu()
        return found

    def load_optimizer(self, optimizer: Optimizer, state: Mapping[str, Tensor]) -> None:
        """Puts a whole state into the optimizer."""
        held: dict[str, dict[str, Tensor]] = {}
        for joined, value in state.items():
            name, _, key = joined.rpartition("|")
            held.setdefault(name, {})[key] = value
        names = {id(p): name for name, p in self.plain.named_parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        by_position = {
            i: {key: like(p, value) for key, value in held[names[id(p)]].items()}
            for i, p in enumerate(parameters)
            if names[id(p)] in held
        }
        optimizer.load_state_dict({**optimizer.state_dict(), "state": by_position})

    def finish(self, state: Mapping[str, Tensor] | None) -> None:
        """Leaves the owner's model as it was, with the weights in `state` (the main process's) unless it is None."""
        if not self.is_sharded:
            self.plain.to(memory_format=torch.contiguous_format)
        if state is not None:
            self.model.load_state_dict(state, strict=bool(state))
            if self.is_sharded:
                broadcast_(self.model, self.device)
        self.accelerator.free_memory()


def _compiled(model: nn.Module) -> Any:
    """Returns what `torch.compile` makes of the model, each shape on its own, so that order does not matter.

    What was compiled before in this process is forgotten: torch keeps a few variants only for each line of code, which
    a study of models of many widths exceeds, and would take the code of a model without hooks for one with.
    """
    torch.compiler.reset()
    return torch.compile(model, dynamic=False)


def sharded(model: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """Returns a copy of the model whose repeated blocks, and the rest, are spread over all processes by `fully_shard`.

    Weights are those of the main process. In bf16 they are gathered as such, and gradients summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    replica = copy.deepcopy(model)
    broadcast_(replica, device)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": low if precision == "bf16" else MixedPrecisionPolicy()}
    for block in repeated_blocks(replica).values():
        fully_shard(block, **options)
    fully_shard(replica, **options)
    return replica.to(device)


def broadcast_(model: nn.Module, device: torch.device) -> None:
    """Gives the model the main process's weights, by way of `device`, which the processes can talk through."""
    for value in model.state_dict().values():
        moved = value.detach().to(device)
        distributed.broadcast(moved, 0)
        value.detach().copy_(moved)


def like(target: Tensor, value: Tensor) -> Tensor:
    """Returns a whole tensor as `target` is: on its device and in its memory format, or sharded like it.

    What has another shape (the optimizer's count of steps) stays as it is.
    """
    if value.shape != target.shape:
        return value
    placements: Any = getattr(target, "placements", None)
    if placements is None:
        return torch.empty_like(target.detach(), dtype=value.dtype).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = getattr(target, "device_mesh")  # noqa: B009
    return distribute_tensor(value.to(target.device), mesh, placements)


@contextmanager
def repeatable(device: torch.device, wanted: bool) -> Iterator[None]:
    """Makes a GPU use algorithms that repeat themselves bit for bit, where there are any; other devices do anyway."""
    if device.type != "cuda" or not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    flags = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
