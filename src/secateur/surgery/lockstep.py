"""Forward passes that stop at every layer: how several models, or several batches, are run side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria.activations import Use, watching
from secateur.errors import InputError, SecateurError
from secateur.graph.copies import as_arguments, twin
from secateur.graph.labels import named_tensors


@dataclass(frozen=True)
class Inputs:
    """Arguments for the model; `index` is the position of their batch, for errors."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the arguments, by a name for errors."""
        named = {**{f"input {i}": value for i, value in enumerate(self.args)}, **self.kwargs}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Applies `change` to every tensor."""
        args = tuple(change(v) if isinstance(v, Tensor) else v for v in self.args)
        kwargs = {k: change(v) if isinstance(v, Tensor) else v for k, v in self.kwargs.items()}
        return Inputs(self.index, args, kwargs)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Re-raises what a model raises on these inputs as an InputError that names the batch."""
        try:
            yield
        except (SecateurError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AssertionError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"{self}: the model failed on it: {said}") from error

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} of shape {tuple(t.shape)}" for name, t in self.tensors.items())
        return f"calibration batch {self.index} ({shapes})"


def read_inputs(batches: Iterable[Any], device: torch.device) -> list[Inputs]:
    """Returns the inputs of all batches on `device`; see `compensate_` for what a batch may be.

    Raises InputError when there is none, or one that is empty or holds values that are not finite.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise InputError(
            f"compensate is a {type(batches).__name__}; expected an iterable of batches, each of them inputs or a "
            "pair (inputs, labels); a single one goes in a list: [inputs]"
        )
    found = []
    for index, item in enumerate(batches):
        is_pair = isinstance(item, (tuple, list)) and len(item) == 2
        inputs = Inputs(index, *as_arguments(item[0] if is_pair else item))
        if not inputs.tensors:
            raise InputError(f"calibration batch {index} holds no tensor: it is a {type(item).__name__}")
        for name, tensor in inputs.tensors.items():
            if not tensor.numel():
                raise InputError(f"calibration batch {index}: {name} is empty, its shape is {tuple(tensor.shape)}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"calibration batch {index}: {name} of shape {tuple(tensor.shape)} holds NaN or infinite values"
                )
        found.append(inputs.map(lambda tensor: tensor.to(device)))
    if not found:
        raise InputError("the calibration batches are empty; an iterator that was used before has nothing left")
    return found


class PausedRun:
    """A forward pass in a thread of its own that stops at every use of a consumer (see `watching`).

    `advance` lets it run to its next use and returns that; the caller works while the pass waits, and hands the output
    of the use to the next `advance`. Only one of the two ever runs. `result` is what the model returned in the end. The
    pass sees a copy of the model's modules, so that whatever these keep in attributes stays its own; parameters are
    shared.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.inputs = inputs
        self._model = twin(model)
        self._tensors = named_tensors(self._model)
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._use: Use | None = None
        self._output: Tensor | None = None
        self._error: BaseException | None = None
        self.result: Any = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self, output: Tensor | None = None) -> Use | None:
        """Returns the next use, or None at the end of the pass.

        Raises InputError, naming the batch, when the model fails on it.
        """
        self._output, self._use = output, None
        del output
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            with self.inputs.blamed():
                raise self._error
        return self._use

    def close(self) -> None:
        """Ends the pass wherever it is."""
        self._closing = True
        self._go.release()
        self._thread.join()
        self._use = self._output = None

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._closing:
                with watching(self._tensors, self._pause):
                    self.result = self._model(*self.inputs.args, **self.inputs.kwargs)
        except _Closed:
            pass
        except BaseException as error:  # noqa: BLE001  handed over to the caller of `advance`
            self._error = error
        self._use = None
        self._paused.release()

    def _pause(self, use: Use) -> Tensor:
        self._use = use
        del use
        self._paused.release()
        self._go.acquire()
        if self._closing or self._output is None:
            raise _Closed
        output, self._output = self._output, None
        return output


class _Closed(BaseException):
    """Ends a pass that is not needed any more; not an Exception, so that no model catches it."""


@contextmanager
def runs_of(model: nn.Module, batches: Iterable[Inputs]) -> Iterator[list[PausedRun]]:
    """Gives a paused run of the model for each batch, and ends them all."""
    runs: list[PausedRun] = []
    try:
        for inputs in batches:
            runs.append(PausedRun(model, inputs))
        yield runs
    finally:
        for run in runs:
            run.close()


@contextmanager
def taking_turns(device: torch.device) -> Iterator[None]:
    """Keeps what all threads have in common (random state, the switch for fused layers) as it is."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
