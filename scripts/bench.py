"""Times analysis and a complete prune beside Torch-Pruning 1.6.1, in the same process, interleaved, on one core.

Analysis: `secateur.trace` against `DependencyGraph.build_dependency`. Complete prune: trace, L2 scores, allocation of
half of all channels of each group, cut and the check that follows it, against `BasePruner` with L2 importance, half of
all channels and half of the heads of each block, and one step. Both get the same random model; every figure is the
median over interleaved rounds.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torch_pruning as tp
from torch import nn

import secateur

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224")


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    return {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}


def secateur_trace(model: nn.Module, x: torch.Tensor) -> None:
    secateur.trace(model, x)


def secateur_prune(model: nn.Module, x: torch.Tensor) -> None:
    secateur.prune_(model, x, criterion="l2", ratio=0.5, scope="local")


def peer_trace(model: nn.Module, x: torch.Tensor) -> None:
    tp.DependencyGraph().build_dependency(model, example_inputs=x)


def peer_prune(model: nn.Module, x: torch.Tensor) -> None:
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.get_classifier()],
        num_heads=_heads(model),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
    )
    pruner.step()


def _seconds(run: Callable[[nn.Module, torch.Tensor], None], model: nn.Module, x: torch.Tensor) -> float:
    model = copy.deepcopy(model)
    gc.collect()
    start = time.perf_counter()
    run(model, x)
    return time.perf_counter() - start


def measure(name: str, rounds: int) -> list[str]:
    """Returns one table row for each task: ours, the peer's, and the ratio, medians over interleaved rounds."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 224, 224)
    tasks = {"analysis": (secateur_trace, peer_trace), "complete prune": (secateur_prune, peer_prune)}
    rows = []
    for task, pair in tasks.items():
        _seconds(pair[0], model, x)  # warm-up: imports and caches
        times = [[_seconds(run, model, x) for run in pair] for _ in range(rounds)]
        ours, theirs = (statistics.median(t[i] for t in times) for i in range(2))
        ratio = statistics.median(t[1] / t[0] for t in times)
        rows.append(f"| {name} | {task} | {ours:.2f} | {theirs:.2f} | {ratio:.1f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"One core of {platform.machine()}, torch {torch.__version__}, Torch-Pruning {version('torch-pruning')}, "
        f"medians of {args.rounds} interleaved rounds.",
        "",
        "| model | task | secateur (s) | Torch-Pruning (s) | ratio |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in args.models:
        for row in measure(name, args.rounds):
            print(row, flush=True)
            lines.append(row)
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
