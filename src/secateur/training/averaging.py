"""Averages of the weights along a run: an exponential moving one (EMA), and SWAD's, dense and aware of overfitting.

All are told of every step and every validation, and hand out their weights at the end:

    averaging = find_averaging("swad")
    for step, batch in enumerate(batches, start=1):
        ...                                            # one step of the optimizer
        averaging.update(model, step)
        if step % interval == 0:
            averaging.validated(model, val_loss, step)
    averaging.apply_(model)

The model is to be the plain one, not what DistributedDataParallel or `torch.compile` wrap around it.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from secateur.errors import InputError
from secateur.training.batches import extra_needed
from secateur.training.choices import chosen

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

_average_in_ = get_swa_multi_avg_fn()
_LOW = (torch.bfloat16, torch.float16)
"""Types too coarse to hold an average, which is kept in float32 instead."""


class Averaging(ABC):
    """An average of a model's weights along a run."""

    @abstractmethod
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after an optimizer step; steps count from 1 and none is left out."""

    @abstractmethod
    def validated(self, model: nn.Module, val_loss: float, step: int) -> None:
        """Takes in the mean loss on source validation images of the weights after `step`."""

    @abstractmethod
    def apply_(self, model: nn.Module) -> None:
        """Puts the average into the model, in place; a model that was never updated from stays as it is."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Returns all that the average depends on besides what it is still to be told, as tensors by flat names."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state_dict` returned; tensors go to the model's device when the model is next seen."""


class NoAveraging(Averaging):
    """The weights of the last step."""

    def update(self, model: nn.Module, step: int) -> None:
        """Does nothing."""

    def validated(self, model: nn.Module, val_loss: float, step: int) -> None:
        """Does nothing."""

    def apply_(self, model: nn.Module) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Does nothing."""


class EMA(Averaging):
    """Exponential moving average by timm's `ModelEmaV3`: w̄ ← d w̄ + (1 - d) w after each step, w̄ = w after the first.

    With `warmup` d is min(decay, 1 - step^(-2/3)), so that a short run does not end near the weights that it began
    with; without, d is `decay` from the second step on. Floating-point buffers are averaged with the weights, so
    statistics of BatchNorm need nothing further.
    """

    def __init__(self, *, decay: float = 0.9998, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise InputError(f"decay must be in [0, 1), found {decay}")
        self.decay, self.warmup = decay, warmup
        self._average: ModelEmaV3 | None = None
        self._loaded: dict[str, Tensor] = {}

    def update(self, model: nn.Module, step: int) -> None:
        self._of(model).update(model, step)

    def validated(self, model: nn.Module, val_loss: float, step: int) -> None:
        """Does nothing."""

    def apply_(self, model: nn.Module) -> None:
        if self._average is not None or self._loaded:
            model.load_state_dict(self._of(model).module.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._loaded) if self._average is None else dict(self._average.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._average, self._loaded = None, dict(state)

    def _of(self, model: nn.Module) -> ModelEmaV3:
        """Returns the average, made from the model when it is first seen."""
        if self._average is None:
            with extra_needed():
                from timm.utils import ModelEmaV3

            low = any(p.dtype in _LOW for p in model.parameters())
            precise: dict[str, Any] = {"dtype": torch.float32} if low else {}
            self._average = ModelEmaV3(model, decay=self.decay, use_warmup=self.warmup, **precise)
            if self._loaded:
                self._average.module.load_state_dict(self._loaded)
                self._loaded = {}
        return self._average


@dataclass
class _Mean:
    """The mean of a model's parameters over `count` steps; parameters in half precision are held in float32."""

    tensors: list[Tensor]
    count: int = 0

    @classmethod
    def empty(cls, parameters: list[Tensor]) -> Self:
        return cls([torch.zeros_like(p, dtype=torch.float32 if p.dtype in _LOW else p.dtype) for p in parameters])

    def add_(self, parameters: list[Tensor]) -> None:
        """Takes in the weights of one more step."""
        same = [p.to(t.dtype) for p, t in zip(parameters, self.tensors, strict=True)]
        if self.count == 0:
            torch._foreach_copy_(self.tensors, same)
        else:
            _average_in_(self.tensors, same, self.count)
        self.count += 1

    def merge_(self, other: _Mean) -> None:
        """Takes in the steps of another mean."""
        self.count += other.count
        torch._foreach_lerp_(self.tensors, other.tensors, other.count / self.count)

    def merged(self, other: _Mean | None) -> _Mean:
        """Returns the mean over the steps of both."""
        result = _Mean([t.clone() for t in self.tensors], self.count)
        if other is not None:
            result.merge_(other)
        return result


@dataclass
class _Validation:
    """A validation: after which step, the loss, and the mean of the weights since the one before."""

    step: int
    loss: float
    mean: _Mean


class SWAD(Averaging):
    """Stochastic weight averaging densely, from the start to the end of a valley of the validation loss.

    Algorithm 1 of arXiv 2102.08604 (Cha et al., NeurIPS 2021), with validations as its points in time. After the k-th,
    with loss L_k, and with N_s, N_e, r for `start_patience`, `end_patience`, `tolerance`:

    - until a start is found, it is s = k - N_s + 1 if L_s is the least of the last N_s losses; the threshold is then r
      times their mean;
    - afterwards the end is e = k - N_e if all of the last N_e losses are above the threshold; without such, it is the
      last validation.

    The average is over every step after validation s - 1 up to validation e (the segment that leads up to s is taken
    in, as in the authors' code). The paper takes 3, 6 and 1.3 (1.2 on VLCS). Where no start is found, the loss still
    fell at the end, and the average is over the last segment, again as in the authors' code.

    Parameters are averaged, buffers are not: statistics of BatchNorm are still those of the last step, so for a model
    that has them call `torch.optim.swa_utils.update_bn(training_batches, model)` after `apply_`. (The paper keeps
    BatchNorm frozen.) At most `start_patience` + 2 copies of the parameters are held, on the model's device.
    """

    def __init__(self, *, start_patience: int = 3, end_patience: int = 6, tolerance: float = 1.3) -> None:
        """Raises `InputError` unless 1 <= start_patience <= end_patience and tolerance is finite and at least 1."""
        if not 1 <= start_patience <= end_patience:
            raise InputError(
                f"start_patience must be at least 1 and end_patience no less, found {start_patience} and {end_patience}"
            )
        if not 1.0 <= tolerance < math.inf:
            raise InputError(f"tolerance must be at least 1 and finite, found {tolerance}")
        self.start_patience, self.end_patience, self.tolerance = start_patience, end_patience, tolerance
        self.threshold = math.nan
        self.start_step, self.end_step = 0, 0
        self._running: _Mean | None = None
        self._recent: list[_Validation] = []
        self._inside: _Mean | None = None
        self._inside_step = 0
        self._above: _Mean | None = None
        self._num_above = 0
        self._device: torch.device | None = None

    @property
    def ended(self) -> bool:
        """Whether the end of the valley is found: nothing after it changes the average, so training may stop.

        `start_step` and `end_step` are the steps of validations s and e, 0 as long as they are not known.
        """
        return self.end_step > 0

    def update(self, model: nn.Module, step: int) -> None:
        if self.ended:
            return
        parameters = [p.detach() for p in model.parameters()]
        self._place(parameters)
        if self._running is None:
            self._running = _Mean.empty(parameters)
        self._running.add_(parameters)

    def validated(self, model: nn.Module, val_loss: float, step: int) -> None:
        """Takes in a validation; raises `InputError` for a loss that is not finite, or if no step went before it."""
        if not math.isfinite(val_loss):
            raise InputError(f"the validation loss after step {step} is {val_loss}; SWAD needs finite ones")
        if self.ended:
            return
        if self._running is None:
            raise InputError(f"no update came before the validation after step {step}; call update after every step")
        latest, self._running = _Validation(step, val_loss, self._running), None
        if self._inside is not None:
            self._take(latest)
            return
        self._recent = [*self._recent, latest][-self.start_patience :]
        losses = [validation.loss for validation in self._recent]
        if len(losses) == self.start_patience and losses[0] == min(losses):
            self.threshold = self.tolerance * sum(losses) / len(losses)
            first, *rest = self._recent
            self._recent = []
            self.start_step, self._inside_step, self._inside = first.step, first.step, first.mean
            for validation in rest:
                self._take(validation)

    def _take(self, validation: _Validation) -> None:
        """Puts a segment after the start into the average, or aside while the loss is above the threshold."""
        assert self._inside is not None
        if validation.loss > self.threshold:
            self._num_above += 1
            self._above = validation.mean if self._above is None else self._above.merged(validation.mean)
            if self._num_above == self.end_patience:
                self.end_step, self._above = self._inside_step, None
            return
        if self._above is not None:
            self._inside.merge_(self._above)
        self._inside.merge_(validation.mean)
        self._inside_step, self._above, self._num_above = validation.step, None, 0

    def apply_(self, model: nn.Module) -> None:
        if self._inside is not None:
            mean = self._inside.merged(self._above)
        else:
            mean = self._recent[-1].mean if self._recent else self._running
        if mean is not None:
            for parameter, value in zip(model.parameters(), mean.tensors, strict=True):
                parameter.detach().copy_(value)

    # --- resuming -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        numbers = [self.threshold, self.start_step, self.end_step, self._inside_step, self._num_above]
        state = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        for i, v in enumerate(self._recent):
            state[f"recent{i}/at"] = torch.tensor([v.step, v.loss], dtype=torch.float64)
        for name, mean in self._means().items():
            state[f"{name}/count"] = torch.tensor(mean.count)
            state |= {f"{name}/{i}": tensor for i, tensor in enumerate(mean.tensors)}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        def mean(name: str) -> _Mean | None:
            if f"{name}/count" not in state:
                return None
            size = sum(re.fullmatch(rf"{name}/\d+", key) is not None for key in state)
            return _Mean([state[f"{name}/{i}"].clone() for i in range(size)], int(state[f"{name}/count"]))

        self.threshold, *whole = state["numbers"].tolist()
        self.start_step, self.end_step, self._inside_step, self._num_above = map(int, whole)
        self._running, self._inside, self._above = mean("running"), mean("inside"), mean("above")
        self._recent = []
        while (found := mean(f"recent{len(self._recent)}")) is not None:
            step, loss = state[f"recent{len(self._recent)}/at"].tolist()
            self._recent.append(_Validation(int(step), loss, found))
        self._device = None

    def _means(self) -> dict[str, _Mean]:
        """Returns all means that are held, by name."""
        named = {"running": self._running, "inside": self._inside, "above": self._above}
        recent = {f"recent{i}": v.mean for i, v in enumerate(self._recent)}
        return recent | {name: mean for name, mean in named.items() if mean is not None}

    def _place(self, parameters: list[Tensor]) -> None:
        """Moves what was loaded to the model's device; raises `InputError` if it is of a model of other shapes."""
        if not parameters or self._device == parameters[0].device:
            return
        shapes = [p.shape for p in parameters]
        for mean in self._means().values():
            if [t.shape for t in mean.tensors] != shapes:
                raise InputError("the loaded state of SWAD belongs to a model with parameters of other shapes")
            mean.tensors = [t.to(p.device) for t, p in zip(mean.tensors, parameters, strict=True)]
        self._device = parameters[0].device


AVERAGINGS: dict[str, type[Averaging]] = {"none": NoAveraging, "ema": EMA, "swad": SWAD}
"""Ways of averaging weights by name."""


def find_averaging(name: str, **options: Any) -> Averaging:
    """Returns a fresh average by name: none, ema (`decay`, `warmup`) or swad (`start_patience`, `end_patience`,
    `tolerance`).

    Raises `InputError` for an unknown name or option, and for values out of range.
    """
    return chosen("averaging", name, AVERAGINGS, options)
