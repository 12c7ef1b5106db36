"""Measures how many images per second the training step of fine-tuning takes, dense and pruned, on one device.

Whole steps of `finetune_`'s own `Learner` are timed: forward, backward, clipping and AdamW, on images that lie in the
device's memory, so no loader is in the way (`scripts/loader_rates.py` measures that). After a warm-up, in which
`torch.compile` compiles, the median over rounds of steps counts. Pruned models lose half of all channels by L2,
isomorphic scope, from random weights: speed does not depend on them.

A training image costs 3 forward passes (one forward, two for gradients), 2 operations per multiply-accumulate:
6 · MACs operations. Their rate is given as it is, as a share of what one large matrix product in the same precision
reaches on the device in the same minute, and as a share of the maker's peak for dense matrix products, where known.

    python scripts/finetune_throughput.py                      # on a GPU: ViT-B, DeiT-B, BEiT-B at 224 pixels in bf16
    python scripts/finetune_throughput.py --tiny --compile off # on a CPU, to try it; the figures mean nothing
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import secateur
from secateur.data import Split, TensorImages
from secateur.training import FinetuneConfig, MachineConfig
from secateur.training.learning import Learner
from secateur.training.placement import Placement, repeatable

MODELS = {
    "ViT-B": "vit_base_patch16_224",
    "DeiT-B": "deit_base_distilled_patch16_224",
    "BEiT-B": "beit_base_patch16_224",
}
TINY = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
PEAKS = {"H200": 989.0, "H100 80GB HBM3": 989.0, "A100": 312.0, "L40S": 362.0}
"""TFLOP/s of dense bf16 matrix products by the makers' data sheets; the first name within that of the device counts."""
CLASSES = 7


@dataclass(frozen=True)
class Rate:
    """What one model reached: images and operations per second."""

    model: str
    variant: str
    compiled: bool
    macs: int
    images_per_second: float

    @property
    def tflops(self) -> float:
        """10^12 operations per second."""
        return 6 * self.macs * self.images_per_second / 1e12


def models(tiny: bool) -> Iterator[tuple[str, str, nn.Module, int]]:
    """Yields name, variant, model and MACs per image of each dense and each pruned model."""
    for name, architecture in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=CLASSES, **(TINY if tiny else {}))
        size = 32 if tiny else 224
        inputs = torch.zeros(1, 3, size, size)
        network = secateur.trace(model, inputs)
        yield name, "dense", model, network.macs
        plan = secateur.prune_(model, inputs, criterion="l2", ratio=0.5, scope="isomorphic")
        yield name, "pruned", model, plan.macs


def seconds_per_step(model: nn.Module, args: argparse.Namespace, compiled: bool) -> float:
    """Returns the median time of a training step of `args.batch_size` images."""
    size = 32 if args.tiny else 224
    device = torch.device(args.device)
    count = args.batch_size
    labels = torch.arange(count) % CLASSES
    ids = [f"all/{int(c)}/{i}" for i, c in enumerate(labels)]
    images = TensorImages(torch.randn(count, 3, size, size), labels, ids, ["all"] * count, size=size)
    split = Split(images, images, images, tuple("abcdefg"), ("all",), None, "synthetic")
    machine = MachineConfig(compile=compiled, channels_last=args.channels_last, deterministic=args.deterministic)
    config = FinetuneConfig(epochs=10_000, batch_size=count, lr=1e-5, precision=args.precision, machine=machine)
    accelerator = Accelerator(device_placement=False, mixed_precision="no")
    placement = Placement(model.to(device), accelerator, machine, args.precision)
    learner = Learner(placement, split, config)
    placement.trained.train()
    batch = [images.images.to(device), labels.to(device), torch.arange(count)]
    number = 0

    def steps(wanted: int) -> float:
        nonlocal number
        synchronise(device)
        start = time.perf_counter()
        for _ in range(wanted):
            number += 1
            learner.step([batch], [count], number, (False, False))
        synchronise(device)
        return (time.perf_counter() - start) / wanted

    with repeatable(device, args.deterministic):
        steps(args.warmup)
        found = statistics.median(steps(args.steps) for _ in range(args.rounds))
    placement.finish(None)
    return found


def matmul_tflops(device: torch.device, precision: str, side: int) -> float:
    """Returns the rate of one large matrix product, in 10^12 operations per second."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))

    def product() -> Tensor:
        return a @ b

    times: list[float] = []
    for _ in range(20):
        synchronise(device)
        start = time.perf_counter()
        product()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times[5:]) / 1e12


def synchronise(device: torch.device) -> None:
    """Waits until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rates: list[Rate], args: argparse.Namespace, reached: float) -> str:
    """Returns the rates as Markdown."""
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((value for part, value in PEAKS.items() if part in name), None) if args.precision == "bf16" else None
    lines = [
        f"{name}, {args.precision}, batches of {args.batch_size}, torch {torch.__version__}; a matrix product reaches "
        f"{reached:.3g} TFLOP/s" + (f", the data sheet says {peak:g}" if peak else ""),
        "",
        "| model | variant | torch.compile | GMACs | images/s | TFLOP/s | of the matrix product | of the peak |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for rate in rates:
        share = f"{rate.tflops / peak:.0%}" if peak else "unknown"
        lines.append(
            f"| {rate.model} | {rate.variant} | {'on' if rate.compiled else 'off'} | {rate.macs / 1e9:.3g} "
            f"| {rate.images_per_second:.4g} | {rate.tflops:.3g} | {rate.tflops / reached:.0%} | {share} |"
        )
    return "\n".join(lines) + "\n"


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Keeps torch to one thread, so that a trial run does not disturb others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table, and writes it to a file if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps, to try the script out")
    parser.add_argument("--compile", choices=("off", "on", "both"), default="both")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="as finetune_ does it by default")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="file to write the table to")
    args = parser.parse_args(arguments)
    if args.tiny:
        args.batch_size, args.warmup, args.steps, args.rounds = 4, 1, 1, 2
    elif not args.device.startswith("cuda"):
        parser.error("no CUDA device is at hand; try the script out with --tiny")
    with one_thread(args.tiny):
        reached = matmul_tflops(torch.device(args.device), args.precision, 256 if args.tiny else 8192)
        rates: list[Rate] = []
        for name, variant, model, macs in models(args.tiny):
            for compiled in {"off": (False,), "on": (True,), "both": (False, True)}[args.compile]:
                seconds = seconds_per_step(model, args, compiled)
                rates.append(Rate(name, variant, compiled, macs, args.batch_size / seconds))
            model.cpu()
    text = table(rates, args, reached)
    print(text)
    if args.write is not None:
        args.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
