"""Compares time and peak memory of analysis and of a complete prune with Torch-Pruning 1.6.1; one core, Linux.

Analysis: `secateur.trace` against `DependencyGraph.build_dependency`. Complete prune: trace, L2 scores, allocation of
half of all channels of each group, cut and the check that follows it, against one step of `BasePruner` with L2
importance, half of all channels and half of every attention. Both get the same random model and one image.

Times are medians over rounds in which both take turns, each on a fresh copy of the model. Memory is the high-water mark
of a process of its own above what it held just before: libraries imported, model built, nothing run yet. That process
also tells how many parameters are left, and that the pruned model still runs; where it does not, its error is printed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning as tp
from timm.models.swin_transformer import PatchMerging
from torch import nn

import secateur

MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "swin_base_patch4_window7_224",
    "convnext_base",
    "resnet50",
    "densenet121",
)


def width(layer: nn.Linear | nn.Conv2d) -> int:
    """Returns the number of output channels of a layer."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


class PatchMergingPruner(tp.BasePruningFunc):
    """Tells Torch-Pruning, as its own Swin example does, that a patch merge holds each input channel four times."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        tp.prune_linear_out_channels(layer.reduction, idxs)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        of_each_patch = [patch * layer.dim + i for patch in range(4) for i in idxs]
        tp.prune_layernorm_out_channels(layer.norm, of_each_patch)
        tp.prune_linear_in_channels(layer.reduction, of_each_patch)
        layer.dim -= len(idxs)
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return layer.reduction.out_features

    def get_in_channels(self, layer: Any) -> int:
        return layer.dim


def prune_by_peer(model: Any, x: torch.Tensor, ignored: Sequence[nn.Parameter] = (), **options: Any) -> None:
    """Prunes half of everything with Torch-Pruning as its example for timm models does.

    The number of heads comes from modules that have `qkv` (or `qkv_proj`) and `num_heads`, whose attributes are set
    afterwards. The classifier is ignored (where there is none, the last layer), and so are the parameters `ignored`.
    `options` go to `BasePruner`.
    """
    kinds = (nn.Linear, nn.Conv2d)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, kinds)]
    classifiers = [m for m in layers if width(m) == model.num_classes] or layers[-1:]
    multiheaded: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "num_heads", None), int)]
    fused = [(m, getattr(m, "qkv", getattr(m, "qkv_proj", None))) for m in multiheaded]
    attentions = {m: qkv for m, qkv in fused if isinstance(qkv, kinds)}
    num_heads: dict[nn.Module, int] = {qkv: m.num_heads for m, qkv in attentions.items()}
    pruner = tp.pruner.BasePruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=classifiers + list(ignored),
        num_heads=num_heads,
        # The default values are dictionaries that all pruners share: they would keep earlier models alive.
        in_channel_groups={},
        out_channel_groups={},
        **options,
    )
    pruner.step()
    for m, qkv in attentions.items():
        m.num_heads = num_heads[qkv]
        m.head_dim = width(qkv) // (3 * m.num_heads)
        m.attn_dim = m.num_heads * m.head_dim


def secateur_trace(model: nn.Module, x: torch.Tensor) -> None:
    secateur.trace(model, x)


def secateur_prune(model: nn.Module, x: torch.Tensor) -> None:
    secateur.prune_(model, x, criterion="l2", ratio=0.5, scope="local")


def special_pruners(model: nn.Module) -> dict[Any, tp.BasePruningFunc]:
    """Returns what a user of Torch-Pruning has to write for this model."""
    return {PatchMerging: PatchMergingPruner()} if any(isinstance(m, PatchMerging) for m in model.modules()) else {}


def peer_trace(model: nn.Module, x: torch.Tensor) -> None:
    tp.DependencyGraph().build_dependency(model, example_inputs=x, customized_pruners=special_pruners(model))


def peer_prune(model: nn.Module, x: torch.Tensor) -> None:
    special = special_pruners(model)
    if special:
        # Half of the dimensions of each head: it cannot take a head out of the table of position biases.
        tables = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
        roots = [nn.Conv2d, nn.Linear, *special]
        prune_by_peer(model, x, tables, customized_pruners=special, root_module_types=roots)
    else:
        prune_by_peer(model, x, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.5)


Step = Callable[[nn.Module, torch.Tensor], None]
TASKS: dict[str, tuple[Step, Step]] = {
    "analysis": (secateur_trace, peer_trace),
    "complete prune": (secateur_prune, peer_prune),
}


@dataclass(frozen=True)
class Alone:
    """One step in a process of its own: peak memory above what was held, fraction of parameters left, or the error."""

    mib: float = 0.0
    left: float = 1.0
    error: str = ""


def build(name: str) -> tuple[Any, torch.Tensor]:
    """Returns a random model and one random image for it."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name).eval()
    return model, torch.randn(1, *model.pretrained_cfg["input_size"])


def use_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch_pruning")


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def resident_mib(field: str) -> float:
    """Returns `VmRSS` (memory that this process holds now) or `VmHWM` (the most that it held) in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def run_alone(name: str, task: str, library: int) -> Alone:
    """Runs one step in this fresh process."""
    use_one_core()
    model, x = build(name)
    params = num_params(model)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is held now
    before = resident_mib("VmRSS")
    try:
        TASKS[task][library](model, x)
        mib = resident_mib("VmHWM") - before
        with torch.no_grad():
            shape = tuple(model(x).shape)
        if shape != (1, model.num_classes):
            return Alone(error=f"output of shape {shape}")
        return Alone(mib, num_params(model) / params)
    except Exception as error:  # noqa: BLE001  (whatever goes wrong goes into the table)
        return Alone(error=f"{type(error).__name__}: {error}".splitlines()[0])


def seconds(step: Step, model: nn.Module, x: torch.Tensor) -> float:
    model = copy.deepcopy(model)
    gc.collect()
    start = time.perf_counter()
    step(model, x)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Comparison:
    """One task on one model, ours first: each in a process of its own, and median seconds if both worked there."""

    model: str
    task: str
    alone: tuple[Alone, Alone]
    seconds: tuple[float, float] | None

    @property
    def faster(self) -> float:
        return self.seconds[1] / self.seconds[0] if self.seconds else math.nan

    @property
    def smaller(self) -> float:
        return self.alone[1].mib / self.alone[0].mib

    def row(self) -> str:
        ours, theirs = self.alone
        if self.seconds is None:
            errors = [ours.error and f"secateur: {ours.error}", theirs.error and f"TP: {theirs.error}"]
            cells = ["; ".join(filter(None, errors)), *[""] * 7]
        else:
            cells = [f"{self.seconds[0]:.2f}", f"{self.seconds[1]:.2f}", f"{self.faster:.1f}"]
            cells += [f"{ours.mib:.0f}", f"{theirs.mib:.0f}", f"{self.smaller:.1f}"]
            cells += ["", ""] if self.task == "analysis" else [f"{ours.left:.1%}", f"{theirs.left:.1%}"]
        return f"| {' | '.join([self.model, self.task, *cells])} |"


def compare(name: str, task: str, rounds: int) -> Comparison:
    """Returns time and memory of both libraries for one task on one model."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        ours, theirs = (fresh.submit(run_alone, name, task, library).result() for library in (0, 1))
    if ours.error or theirs.error:
        return Comparison(name, task, (ours, theirs), None)
    model, x = build(name)
    for step in TASKS[task]:
        seconds(step, model, x)  # warm-up: imports and caches
    times = [[seconds(step, model, x) for step in TASKS[task]] for _ in range(rounds)]
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return Comparison(name, task, (ours, theirs), (first, second))


def means(found: Sequence[Comparison], task: str) -> str:
    """Returns the row of geometric means over the models on which both libraries work."""
    both = [c for c in found if c.task == task and c.seconds]
    if not both:
        return f"| **neither on any model** | {task} | | | | | | | | |"
    faster = statistics.geometric_mean(c.faster for c in both)
    smaller = statistics.geometric_mean(c.smaller for c in both)
    return f"| **geometric mean of {len(both)}** | {task} | | | **{faster:.1f}** | | | **{smaller:.1f}** | | |"


def rows(models: Sequence[str], rounds: int) -> Iterator[str]:
    """Yields the lines of the table as they are measured."""
    yield (
        "| model | task | secateur (s) | TP (s) | times faster | secateur (MiB) | TP (MiB) | times less "
        "| parameters left, secateur | TP |"
    )
    yield "|---|---|" + "--:|" * 8
    found = []
    for name in models:
        for task in TASKS:
            found.append(compare(name, task, rounds))
            yield found[-1].row()
    yield from (means(found, task) for task in TASKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    args = parser.parse_args()
    use_one_core()
    lines = [
        f"One core of {platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, Torch-Pruning (TP) "
        f"{version('torch-pruning')}. Times are medians of {args.rounds} interleaved rounds; memory is the peak above "
        "what the process held before. Made by `make bench`.",
        "",
    ]
    print("\n".join(lines))
    for row in rows(args.models, args.rounds):
        print(row, flush=True)
        lines.append(row)
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
