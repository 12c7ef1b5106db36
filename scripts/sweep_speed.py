"""Times a grid with one worker and with two, each from nothing, and prints the ratio.

    python scripts/sweep_speed.py                       # 16 runs of the digits ViT: five minutes on two quiet cores
    python scripts/sweep_speed.py --epochs 5 --criteria l1

Both times are those of the whole command, so starting Ray and its workers counts. What the machine allows is measured
beside it: one run in a process of its own, and two such processes side by side; two cores that share caches, memory and
clock are not twice as fast as one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro
import yaml


def start(content: dict[str, Any], out: Path, workers: int) -> subprocess.Popen[bytes]:
    """Starts a sweep and returns its process."""
    grid = out.with_suffix(".yaml")
    grid.write_text(yaml.safe_dump(content))
    code = "import sys; from secateur.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "sweep", str(grid), "--out", str(out), "--workers", str(workers)]
    )


def seconds(*sweeps: tuple[dict[str, Any], Path, int]) -> float:
    """Returns the wall time of sweeps side by side."""
    began = time.perf_counter()
    processes = [start(*sweep) for sweep in sweeps]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a sweep failed")
    return time.perf_counter() - began


def main(
    criteria: tuple[str, ...] = ("l1", "l2", "taylor", "hessian", "random"),
    ratios: tuple[float, ...] = (0.5, 0.75, 0.95),
    epochs: int = 20,
) -> None:
    """Times the grid of a ViT on digits-dg, the domain thick unseen."""
    dense: dict[str, Any] = {
        "models": "vit_digits",
        "datasets": "digits-dg",
        "unseen": "thick",
        "finetune": {"epochs": epochs, "warmup_epochs": epochs / 10},
    }
    grid = dense | {"criteria": list(criteria), "scopes": "isomorphic", "ratios": list(ratios)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one, two = (seconds((grid, folder / f"grid{workers}", workers)) for workers in (1, 2))
        alone = seconds((dense, folder / "alone", 0))
        pair = seconds((dense, folder / "left", 0), (dense, folder / "right", 0))
    print(f"one worker {one:.0f} s, two workers {two:.0f} s: {two / one:.2f} of one worker's time")
    print(f"a process alone {alone:.0f} s, two side by side {pair:.0f} s: {pair / (2 * alone):.2f} is what is possible")


if __name__ == "__main__":
    tyro.cli(main)
