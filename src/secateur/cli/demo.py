"""`secateur demo`: a small sweep with the models and data that come with the package, and its report."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from secateur.allocation.allocate import Scope
from secateur.experiments.grid import expand
from secateur.experiments.ledger import SweepConfig
from secateur.experiments.sweep import require_success, run_sweep
from secateur.report import save_report, table
from secateur.training import FinetuneConfig


@dataclass(frozen=True)
class Demo:
    """Prune, fine-tune and compare small models on digits-dg: five criteria, three ratios, one unseen domain."""

    full: bool = False
    """ViT, DeiT and BEiT instead of ViT only."""
    out: Path | None = None
    """Folder for the runs and their report; what is done there already is skipped. Default: runs/ and the time."""
    unseen: str = "thick"
    """Domain to test on and never train on."""
    seed: int = 0
    """Draws calibration images, the scores of random, and the order of fine-tuning."""
    criteria: tuple[str, ...] = ("l1", "l2", "taylor", "hessian", "random")
    """Criteria to compare."""
    ratios: tuple[float, ...] = (0.5, 0.75, 0.95)
    """Fractions of channels to remove."""
    scope: Scope = "isomorphic"
    """Rank channels within each family; "global" is the paper's way, under which the embedding of so small a model
    goes first of all and takes everything with it at 75 %."""
    epochs: int | None = None
    """Epochs of fine-tuning; default: what suits digits-dg."""

    def __call__(self, console: Console) -> None:
        """Carries out the runs one by one, and ends with the table and the paths of what was written."""
        out = self.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        runs = expand(self._grid(), "demo")
        start = perf_counter()
        results = run_sweep(runs, SweepConfig(out=out, workers=0, retry_failed=True), console)
        console.print(table(results), highlight=False)
        written = ", ".join(map(str, save_report(results, out / "report")))
        console.print(f"{perf_counter() - start:.0f} s; wrote {written}", highlight=False, markup=False, soft_wrap=True)
        require_success(results, out)

    def _grid(self) -> dict[str, Any]:
        finetune: dict[str, Any] = {}
        if self.epochs is not None:
            warmup = min(FinetuneConfig().warmup_epochs, self.epochs / 5)
            finetune = {"epochs": self.epochs, "warmup_epochs": warmup}
        return {
            "models": ["vit_digits", "deit_digits", "beit_digits"] if self.full else ["vit_digits"],
            "criteria": list(self.criteria),
            "ratios": list(self.ratios),
            "scopes": self.scope,
            "datasets": "digits-dg",
            "unseen": self.unseen,
            "seeds": self.seed,
            "finetune": finetune,
        }
