"""What criteria know about the loss: gradients, and squared gradients per sample, over calibration batches.

Both statistics run the model in evaluation mode on detached stand-ins for its tensors, so that its modes, gradients,
`requires_grad` flags, buffers and the random state are afterwards what they were before. A batch is a pair
`(inputs, labels)`; inputs are a tensor, a tuple (positional arguments) or a dict (keyword arguments) whose tensors have
one row per sample. Tensors without dimensions, and everything that is not a tensor, are shared by all samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.criteria.batches import (
    Batch,
    blamed_on,
    first_line,
    has_rows,
    read_batches,
    require_finite_loss,
    require_labels,
)
from secateur.criteria.calibration import Calibration, Statistic
from secateur.errors import InputError, SecateurError

MEMORY_BUDGET = 2**30
"""Bytes that per-sample gradients and the activations behind them may take on a CPU; on CUDA a quarter of what is
free, if that is more."""

MAX_SAMPLES_ON_CPU = 16
"""Samples per pass on a CPU. More of them push the per-sample gradients out of the cache: 16 were twice as fast as 64
on a small ViT."""


def gradient_sum(calibration: Calibration) -> Statistic:
    """Returns the gradient of the mean loss of each batch, summed over the batches: one backward pass per batch.

    Tensors that the loss does not depend on get zeros. Raises InputError for batches that cannot be used (empty, NaN,
    labels out of range, a model or loss that fails on them), naming the batch.
    """
    with undisturbed(calibration.model):
        problem = Problem(calibration)
        totals = _zeros_like(calibration.tensors)
        num_samples = 0
        for batch in problem.batches():
            for name, gradient in problem.gradients(batch).items():
                totals[name].add_(gradient)
            num_samples += batch.size
    return Statistic(totals, num_samples)


def mean_squared_gradient(calibration: Calibration) -> Statistic:
    """Returns the mean over all samples of the squared gradient of one sample's loss: the diagonal empirical Fisher.

    Exact, and the same however the samples are split into batches. Many samples share one backward pass: the forward
    is vectorised (`torch.func.vmap`) over one stand-in per sample for each tensor, and each stand-in's gradient is
    squared, added up and dropped as soon as the backward pass has produced it. So memory holds the activations of a
    chunk and its largest gradient, never samples x parameters. Chunks of one sample run without vectorisation.

    Raises InputError as `gradient_sum` does, and for models that `vmap` cannot run (for example, if they read a value
    with `.item()`): these can be given batches of one sample.
    """
    with undisturbed(calibration.model), _vectorisable():
        problem = Problem(calibration)
        totals = _zeros_like(calibration.tensors)
        num_samples = chunk = 0
        for batch in problem.batches():
            if batch.size > 1:
                chunk = chunk or _chunk_size(problem, batch)
            for part in batch.parts(chunk or 1):
                if part.size == 1:
                    for name, gradient in problem.gradients(part).items():
                        totals[name].add_(gradient.to(totals[name].dtype).square())
                else:
                    _add_squared_gradients(problem, part, totals)
            num_samples += batch.size
    return Statistic({name: total.div_(num_samples) for name, total in totals.items()}, num_samples)


def logits_of(output: Any) -> Tensor:
    """Returns the logits in a model's output: the tensor itself, its `logits`, or the mean of a tuple of tensors.

    The tuple is what distilled models give while training: one tensor per head. Raises InputError for anything else.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, tuple | list) and output and all(isinstance(part, Tensor) for part in output):
        if len({part.shape for part in output}) == 1:
            return torch.stack(list(output)).mean(0)
        found = "tensors of shapes " + ", ".join(str(tuple(part.shape)) for part in output)
    else:
        found = type(output).__name__
    raise InputError(
        f"no logits in the model's output: expected a tensor, an object with .logits, or several tensors of one "
        f"shape, found {found}; pass loss=, a function of that output and the labels"
    )


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the logits in `output`; labels are classes [n] or probabilities [n, K]."""
    logits = logits_of(output)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels.to(logits.dtype) if labels.is_floating_point() else labels.long())


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode with gradients enabled; afterwards modes and torch's random state are back."""
    modes = [(module, module.training) for module in model.modules()]
    tensors = chain(model.parameters(), model.buffers())
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


class Problem:
    """The loss as a function of the tensors to differentiate, with all others held fixed, buffers as copies."""

    def __init__(self, calibration: Calibration) -> None:
        model = calibration.model
        self.model = model
        self.source = calibration.batches
        self.default_loss = calibration.loss is None
        self.criterion = calibration.loss or cross_entropy
        self.tensors = {name: tensor.detach() for name, tensor in calibration.tensors.items()}
        fixed = {name: parameter.detach() for name, parameter in model.named_parameters()}
        fixed |= {name: buffer.detach().clone() for name, buffer in model.named_buffers()}  # a forward may write them
        self.fixed = {name: tensor for name, tensor in fixed.items() if name not in self.tensors}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    def output(self, tensors: Mapping[str, Tensor], batch: Batch) -> Any:
        return functional_call(self.model, {**self.fixed, **tensors}, batch.args, batch.kwargs)

    def loss(self, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Returns the loss of a batch, a scalar."""
        loss = self.criterion(self.output(tensors, batch), batch.labels)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"the loss must be a scalar tensor, found {found}; reduce it to its mean over the samples")
        return loss

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the gradient of the batch's loss by tensor: one plain backward pass."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        with blamed_on(batch):
            loss = self.loss(leaves, batch)
            require_finite_loss(loss, batch)
            if not loss.requires_grad:
                return {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    def batches(self) -> Iterator[Batch]:
        """Yields every batch, checked and on the model's device; its labels too if the loss is the default one."""
        shape: tuple[int, ...] = ()
        for batch in read_batches(self.source, self.device):
            if self.default_loss:
                if not shape:
                    with blamed_on(batch), torch.no_grad():
                        one = next(batch.parts(1))
                        shape = tuple(logits_of(self.output(self.tensors, one)).shape)
                require_labels(batch, shape)
            yield batch


def _add_squared_gradients(problem: Problem, batch: Batch, totals: dict[str, Tensor]) -> None:
    """Adds each sample's squared gradient to `totals`: one vectorised forward and one backward for all samples."""

    def sample_loss(tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], label: Tensor) -> Tensor:
        # vmap hides the sample dimension, so what has rows is asked of `batch`: a row may well have no dimension left.
        args = tuple(new[None] if has_rows(old) else new for old, new in zip(batch.args, args, strict=True))
        kwargs = {key: new[None] if has_rows(batch.kwargs[key]) else new for key, new in kwargs.items()}
        return problem.loss(tensors, Batch(batch.index, args, kwargs, label[None]))

    leaves = {name: _stand_ins(tensor, batch.size, totals[name]) for name, tensor in problem.tensors.items()}
    in_dims = (0, tuple(map(_in_dim, batch.args)), {key: _in_dim(value) for key, value in batch.kwargs.items()}, 0)
    try:
        losses = vmap(sample_loss, in_dims, randomness="different")(leaves, batch.args, batch.kwargs, batch.labels)
        require_finite_loss(losses, batch)
        if losses.requires_grad:
            torch.autograd.backward(losses.sum(), inputs=list(leaves.values()))
    except (SecateurError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AssertionError, AttributeError) as error:
        problem.gradients(next(batch.parts(1)))  # raises if it is the batch that cannot be used
        raise InputError(
            f"the model cannot be run for many samples at once under torch.func.vmap, as this criterion needs: "
            f"{first_line(error)}; give it batches of one sample, which take one plain backward pass each"
        ) from error


@contextmanager
def _vectorisable() -> Iterator[None]:
    """Keeps attention to operations that can be vectorised and differentiated, which its fused kernels cannot be.

    Also silences torch's note that some operator runs sample by sample for want of a vectorised form: it is as exact.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _stand_ins(tensor: Tensor, count: int, total: Tensor) -> Tensor:
    """Returns a view with one stand-in per sample, whose squared gradient is added to `total` once it is there."""
    leaf = tensor.detach().expand(count, *tensor.shape).requires_grad_()

    def add(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            total.add_(gradient.to(total.dtype).square().sum(0))

    leaf.register_post_accumulate_grad_hook(add)
    return leaf


def _chunk_size(problem: Problem, batch: Batch) -> int:
    """Returns how many samples fit the memory budget, from what one sample's forward keeps for its backward."""
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(problem.tensors.values(), problem.fixed.values())}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = {name: tensor.detach().requires_grad_() for name, tensor in problem.tensors.items()}
    with blamed_on(batch), saved_tensors_hooks(count, lambda tensor: tensor):
        loss = problem.loss(leaves, next(batch.parts(1)))
    largest = max(tensor.nbytes for tensor in problem.tensors.values())
    each = sum(kept.values()) + 2 * largest  # the stand-ins' gradients are held twice: as they are, and squared
    if loss.device.type == "cuda":
        return max(1, max(MEMORY_BUDGET, torch.cuda.mem_get_info(loss.device)[0] // 4) // each)
    return max(1, min(MAX_SAMPLES_ON_CPU, MEMORY_BUDGET // each))


def _in_dim(value: Any) -> int | None:
    return 0 if has_rows(value) else None


def _zeros_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns zeros to add up in: float32 at least, since squares of half-precision gradients underflow."""
    return {
        name: torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32), requires_grad=False)
        for name, tensor in tensors.items()
    }
