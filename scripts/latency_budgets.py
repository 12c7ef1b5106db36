"""How well latency budgets are met: plans made to a fraction of the dense latency, cut, and measured beside the dense.

Writes a Markdown table to --write. Everything runs on the machine at hand, which should be quiet.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import tyro

import secateur
from secateur.cost.latency import measure_latency

MODELS = ("vit_tiny_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224", "resnet50", "convnext_tiny")
NARROWER: dict[str, dict[str, float | None]] = {"vit": {"head_dims": None}, "deit": {"head_dims": None}}


@dataclass(frozen=True)
class Main:
    """Measures the table of each model, plans to each fraction of its latency, cuts, and measures."""

    models: tuple[str, ...] = MODELS
    fractions: tuple[float, ...] = (0.75, 0.5, 0.3)
    batch: int = 4
    threads: int = 1
    rounds: int = 15
    write: Path | None = None

    def __call__(self) -> None:
        torch.set_num_threads(self.threads)
        lines = [
            "| model | dense (ms) | asked | predicted | measured | measured / asked | table (s) |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        errors = []
        for name in self.models:
            for line, error in self._model(name):
                lines.append(line)
                errors.append(error)
                print(line, flush=True)
        near = sum(abs(e) <= 0.1 for e in errors)
        text = (
            f"Batches of {self.batch}, {self.threads} thread(s) of {_processor()}, torch {torch.__version__}. "
            f"{near} of {len(errors)} plans are within 10 % of the latency asked for; median error "
            f"{statistics.median(map(abs, errors)):.1%}, largest {max(map(abs, errors)):.1%}.\n"
        )
        print(text)
        if self.write is not None:
            head = "# Latency budgets, asked for and measured\n\nWritten by `make latency`.\n"
            self.write.write_text("\n".join([head, *lines, "", text]))

    def _model(self, name: str) -> list[tuple[str, float]]:
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        inputs = torch.randn(self.batch, 3, 224, 224)
        network = secateur.trace(model, inputs[:1])
        scores = secateur.score(network, model, "l2")
        start = time.perf_counter()
        table = secateur.LatencyTable.measure(network, model, inputs)
        seconds = time.perf_counter() - start
        ratios = NARROWER.get(name.split("_")[0], {})
        rows = []
        for fraction in self.fractions:
            budget = table.within(fraction=fraction)
            plan = secateur.allocate(network, scores, latency=budget, scope="isomorphic", ratios=ratios, round_to=8)
            pruned = copy.deepcopy(model)
            secateur.cut_(pruned, plan)
            found = measure_latency({"dense": model, "pruned": pruned}, inputs, rounds=self.rounds)
            share = found["pruned"] / found["dense"]
            predicted = table.predict(plan) / table.seconds(network.mask())
            cells = f"{fraction:.0%} | {predicted:.1%} | {share:.1%} | {share / fraction:.2f} | {seconds:.0f}"
            rows.append((f"| {name} | {1e3 * found['dense']:.1f} | {cells} |", share / fraction - 1))
        return rows


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


if __name__ == "__main__":
    tyro.cli(Main)()
