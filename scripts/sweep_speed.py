"""Times a grid with one worker and with two, each from nothing, and prints the ratio.

    python scripts/sweep_speed.py                       # 16 runs of the digits ViT: five minutes on two quiet cores
    python scripts/sweep_speed.py --epochs 5 --criteria l1

Both times are those of the whole command, so starting Ray and its workers counts.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro
import yaml


def seconds(grid: Path, out: Path, workers: int) -> float:
    """Returns the wall time of a sweep."""
    command = [sys.executable, "-c", "import sys; from secateur.cli import main; sys.exit(main())", "sweep", str(grid)]
    start = time.perf_counter()
    subprocess.run([*command, "--out", str(out), "--workers", str(workers)], check=True)
    return time.perf_counter() - start


def main(
    criteria: tuple[str, ...] = ("l1", "l2", "taylor", "hessian", "random"),
    ratios: tuple[float, ...] = (0.5, 0.75, 0.95),
    epochs: int = 20,
) -> None:
    """Times the grid of a ViT on digits-dg, the domain thick unseen."""
    content = {
        "models": "vit_digits",
        "criteria": list(criteria),
        "scopes": "isomorphic",
        "ratios": list(ratios),
        "datasets": "digits-dg",
        "unseen": "thick",
        "finetune": {"epochs": epochs, "warmup_epochs": epochs / 10},
    }
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.yaml"
        grid.write_text(yaml.safe_dump(content))
        one, two = (seconds(grid, Path(folder) / str(workers), workers) for workers in (1, 2))
    print(f"one worker {one:.0f} s, two workers {two:.0f} s: {two / one:.2f} of one worker's time")


if __name__ == "__main__":
    tyro.cli(main)
