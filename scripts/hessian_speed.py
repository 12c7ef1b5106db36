"""Times Hessian scores beside Torch-Pruning 1.6.1, and compares squared gradients with a loop over samples; one core.

Torch-Pruning's documented way (its examples, the docstring of `GroupHessianImportance`) is a forward pass for a batch,
then for each sample's loss one backward pass with `retain_graph=True` and `accumulate_grad`. A backward pass for one
loss goes through the graph of the whole batch, so its cost grows with the batch; batches of 1 are the best it can do.
Only that accumulation is timed, against all of `secateur.score(network, model, "hessian", batches)`.

Both get the same random model and images and take turns; times are medians over rounds, in CPU seconds of the process
with one thread, which neighbours on the machine do not change much. The squared gradients that the scores are made of
are compared with those of one plain backward pass per sample: rank correlation (Spearman) by tensor, and the largest
difference as a fraction of the tensor's largest value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import secateur
from secateur.criteria import calibrate, mean_squared_gradient

LEAST_CORRELATION = 0.98


def by_peer(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> None:
    """Accumulates squared gradients as Torch-Pruning's examples do."""
    importance = tp.importance.GroupHessianImportance()
    importance.zero_grad()
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        for loss in F.cross_entropy(model(x), y, reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)


def squared_gradients(model: nn.Module, names: list[str], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Returns the mean over samples of squared gradients, from one backward pass for each."""
    tensors = dict(model.named_parameters())
    totals = {name: torch.zeros_like(tensors[name]) for name in names}
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        found = torch.autograd.grad(F.cross_entropy(model(x), y), [tensors[name] for name in names])
        for total, gradient in zip(totals.values(), found, strict=True):
            total += gradient.square()
    return {name: total / len(images) for name, total in totals.items()}


def spearman(a: Tensor, b: Tensor) -> float:
    """Returns the rank correlation of all elements; equal ones are ranked in order."""
    ranks = [np.argsort(np.argsort(t.flatten().numpy(), kind="stable"), kind="stable") for t in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1]) if a.numel() > 1 else 1.0


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[64, 1], help="64 is what its examples use")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    images, labels = torch.randn(args.images, 3, 224, 224), torch.randint(0, 1000, (args.images,))
    network = secateur.trace(model, images[:1])
    batches = [(images, labels)]

    exact = calibrate(network, model, batches).statistic(mean_squared_gradient).values
    slow = squared_gradients(model, list(exact), images, labels)
    correlations = {name: spearman(exact[name], slow[name]) for name in exact}
    differences = {name: float((exact[name] - slow[name]).abs().max() / slow[name].max()) for name in exact}
    worst = min(correlations, key=lambda name: correlations[name])
    print(f"{args.model}, {args.images} images, torch {torch.__version__}, one thread")
    print(f"rank correlation by tensor: least {correlations[worst]:.6f} ({worst}), of {len(exact)} tensors")
    print(f"largest difference: {max(differences.values()):.1e} of the tensor's largest squared gradient")

    contestants: dict[str, Callable[[], object]] = {
        "secateur.score": lambda: secateur.score(network, model, "hessian", batches)
    }
    for size in args.peer_batches:
        contestants[f"Torch-Pruning, batches of {size}"] = lambda size=size: by_peer(model, images, labels, size)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, work in contestants.items():
            seconds[name].append(cpu_seconds(work))
    ours = statistics.median(seconds["secateur.score"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:32} {median:8.2f} s   {median / ours:6.2f} x   (rounds: {', '.join(f'{t:.1f}' for t in times)})")
    return int(correlations[worst] < LEAST_CORRELATION)


if __name__ == "__main__":
    raise SystemExit(main())
