"""Runs for the tests of reports: every number follows from what was run, so that tests can say what must be shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.report import Result

DOMAINS = ("clip", "photo")
CRITERIA = ("hessian", "l1")
RATIOS = (0.5, 0.75)
SEEDS = (0, 1, 2)


def make_run(
    criterion: str | None,
    ratio: float = 0.0,
    unseen: str | None = "clip",
    seed: int = 0,
    model: str = "vit",
    **changes: Any,
) -> Result:
    """A run whose test accuracy is 80 (dense) or 80 - 20 ratio (- 3 for l1), + 4 on photo, + seed."""
    dense_acc = 80.0 + 4 * (unseen == "photo") + seed
    is_dense = criterion is None
    left = 1 - ratio
    run = Result(
        model=model,
        criterion=criterion,
        ratio=ratio,
        scope="" if is_dense else "global",
        seed=seed,
        data="digits-dg",
        unseen=unseen,
        protocol="leave-one-domain-out" if unseen else "pooled",
        params=round(2_000_000 * left),
        macs=round(60_000_000 * left),
        dense_params=2_000_000,
        dense_macs=60_000_000,
        val_acc=95.0 - 10 * ratio,
        test_acc=dense_acc - 20 * ratio - 3 * (criterion == "l1"),
        dense_test_acc=dense_acc,
        latency=0.04 * (1 - ratio / 2),
        dense_latency=0.04,
        finetune_seconds=100.0,
        hardware="one core",
        run=f"{model}-{criterion}-{ratio}-{unseen}-{seed}",
        config={"model": model, "seed": seed, "split": {"unseen": unseen}, "prune": criterion and {"ratio": ratio}},
        command=f"secateur sweep --only {model}-{criterion}-{ratio}-{unseen}-{seed}",
        domain_acc={d: 90.0 + i for i, d in enumerate(DOMAINS)} | ({unseen: dense_acc - 20 * ratio} if unseen else {}),
        selection="training-domain validation",
        widths=()
        if is_dense
        else (
            {"name": "blocks.0.mlp", "kind": "mlp", "family": "mlp", "before": [1, 192], "after": [1, 96 + seed]},
            {"name": "blocks.0.v", "kind": "dims", "family": "dims.v", "before": [6, 16], "after": [6, 4]},
        ),
        curve=tuple({"epoch": e, "loss": 2.0 / e, "train_acc": 50.0 + e, "val_acc": 40.0 + e} for e in (1, 2, 3)),
    )
    return replace(run, **changes)


def make_study(model: str = "vit", seeds: tuple[int, ...] = SEEDS) -> list[Result]:
    """Two criteria at two ratios and their dense baseline, on two unseen domains, over `seeds`."""
    return [
        make_run(criterion, ratio, unseen, seed, model)
        for unseen in DOMAINS
        for seed in seeds
        for criterion, ratio in [(None, 0.0)] + [(c, r) for c in CRITERIA for r in RATIOS]
    ]


def write_run(runs: Path, name: str, config: Mapping[str, Any], *lines: Mapping[str, Any]) -> Path:
    """Writes the folder of a run as a sweep leaves it behind, with these lines as its record."""
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
