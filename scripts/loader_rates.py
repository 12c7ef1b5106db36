"""Measures how many images a second loaders deliver beside what fine-tuning a ViT consumes here, at 224 x 224.

The images are JPEG files of the size of those of PACS (227 x 227), made here. Loaders run alone, from a new epoch to
its end: with images decoded anew or once (`DataConfig(cache=True)`), with DomainBed's augmentation (random crop, flip,
colour jitter, grey) or without. A training step is forward, backward and AdamW in float32.

All take turns, and figures are medians over rounds. Rates are in wall time, on as many worker processes, or threads, as
there are cores. What one image costs is in CPU time on one thread, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from secateur.data import DataConfig, LabelledImages, load_split, loader_options

CORES = len(os.sched_getaffinity(0))
MODELS = {"vit_tiny_patch16_224": 16, "vit_base_patch16_224": 8}
"""The models, and how many images a step takes."""
LEAST = 2.0
"""How many times what the fastest model consumes the loader with cached images must deliver."""


def write_images(root: Path, count: int) -> None:
    """Writes two domains of so many JPEG images with as much detail as photographs have."""
    rng = np.random.default_rng(0)
    for domain in ("one", "two"):
        (root / domain / "thing").mkdir(parents=True)
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((227, 227))
            fine = np.asarray(coarse) + rng.normal(0, 12, (227, 227, 3))
            image = Image.fromarray(fine.clip(0, 255).astype(np.uint8))
            image.save(root / domain / "thing" / f"{number:04d}.jpg", quality=90)


def loaders(root: Path) -> dict[str, LabelledImages]:
    """Returns the data sets to be loaded, by what is done for each image."""
    found: dict[str, LabelledImages] = {}
    for cache in (False, True):
        split = load_split(root, DataConfig(unseen="two", val_fraction=0.02, cache=cache))
        kind = "cached" if cache else "decoded anew"
        found[f"loader: {kind}, augmented"] = split.train
        found[f"loader: {kind}, plain"] = split.train.plain()
    return found


def epoch(batches: DataLoader[Any]) -> float:
    """Returns images per second of one epoch."""
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
    return count / (time.perf_counter() - start)


def training(name: str, size: int) -> Callable[[], None]:
    """Returns a function that takes one step with `size` images."""
    model = timm.create_model(name, num_classes=7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = torch.randn(size, 3, 224, 224), torch.arange(size) % 7

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cpu_milliseconds(work: Callable[[], None], count: int) -> float:
    """Returns the CPU time per image of work on `count` of them, on one thread."""
    torch.set_num_threads(1)
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    torch.set_num_threads(CORES)
    return 1000 * seconds / count


def decode(images: LabelledImages, count: int) -> Callable[[], None]:
    """Returns a function that prepares `count` images."""

    def work() -> None:
        for index in range(count):
            images[index]

    return work


def measured(data: dict[str, LabelledImages], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Returns images per second, and CPU milliseconds per image, of loaders and training steps."""
    batches = {name: DataLoader(images, 32, **loader_options(CORES)) for name, images in data.items()}
    steps = {name: training(name, size) for name, size in MODELS.items()}
    work = {name: (decode(images, 64), 64) for name, images in data.items()}
    work |= {name: (step, MODELS[name]) for name, step in steps.items()}
    rates: dict[str, list[float]] = {name: [] for name in work}
    costs: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, (function, count) in work.items():
            if name in batches:
                rate = epoch(batches[name])
            else:
                start = time.perf_counter()
                function()
                rate = count / (time.perf_counter() - start)
            cost = cpu_milliseconds(function, count)
            if number:  # The first round starts workers and fills caches.
                rates[name].append(rate)
                costs[name].append(cost)
    medians = ({name: statistics.median(values) for name, values in found.items()} for found in (rates, costs))
    return next(medians), next(medians)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=512, help="images of one epoch")
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    args = parser.parse_args()
    torch.set_num_threads(CORES)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.images)
        data = loaders(Path(folder))
        rates, costs = measured(data, args.rounds)
    lines = [
        f"| {CORES} cores, 224 x 224 | images/s | x ViT-Tiny | x ViT-B | CPU ms per image | x ViT-Tiny | x ViT-B |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in rates:
        faster = " | ".join(f"{rates[name] / rates[model]:.1f}" for model in MODELS)
        cheaper = " | ".join(f"{costs[model] / costs[name]:.1f}" for model in MODELS)
        lines.append(f"| {name} | {rates[name]:.1f} | {faster} | {costs[name]:.2f} | {cheaper} |")
    print("\n".join(lines))
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")
    loader, model = rates["loader: cached, augmented"], max(rates[name] for name in MODELS)
    print(f"the loader delivers {loader / model:.1f} times what the fastest model consumes; required: {LEAST}")
    return 0 if loader >= LEAST * model else 1


if __name__ == "__main__":
    raise SystemExit(main())
