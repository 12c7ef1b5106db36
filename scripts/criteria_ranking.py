"""Ranks the criteria on digits-dg after fine-tuning: unseen domains, several seeds, one pruning ratio.

Each (unseen domain, scope) is one study with its own dense baseline; a seed draws calibration images, random scores and
the order of fine-tuning. Writes docs/criteria-ranking-table.md and, beside it, every run as JSON lines. Standard errors
are over the means of seeds (population standard deviation over the square root of the number of seeds).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from secateur.allocation.allocate import Scope
from secateur.data import DataConfig
from secateur.experiments.study import StudyConfig, run_study
from secateur.report import Result, append_result


def mean_and_error(by_seed: dict[int, list[float]]) -> tuple[float, float]:
    """Returns the mean over seeds of the mean over domains, and its standard error."""
    means = [statistics.fmean(values) for values in by_seed.values()]
    return statistics.fmean(means), statistics.pstdev(means) / len(means) ** 0.5


def rows(results: list[Result], domains: list[str]) -> list[str]:
    """Returns the table: criteria by mean accuracy on unseen domains, best first."""
    by_name: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_name[result.criterion or "dense"].append(result)
    ranked = []
    for name, runs in by_name.items():
        test: dict[int, list[float]] = defaultdict(list)
        seen: dict[int, list[float]] = defaultdict(list)
        for run in runs:
            test[run.seed].append(float(run.test_acc or 0))
            seen[run.seed].append(float(run.val_acc or 0))
        accuracy, error = mean_and_error(test)
        each = [statistics.fmean(float(r.test_acc or 0) for r in runs if r.unseen == d) for d in domains]
        macs = statistics.fmean(float(r.macs or 0) / float(r.dense_macs or 1) for r in runs)
        cells = [name, f"{accuracy:.2f} ± {error:.2f}", *(f"{a:.1f}" for a in each)]
        cells += [f"{mean_and_error(seen)[0]:.2f}", f"{macs:.1%}"]
        ranked.append((name != "dense", -accuracy, "| " + " | ".join(cells) + " |"))
    return [row for *_, row in sorted(ranked)]


def study(domain: str, scope: Scope, ratio: float, seeds: list[int]) -> tuple[Result, ...]:
    """Returns the runs of one study in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        config = StudyConfig(
            out=Path(folder) / "runs",
            criteria=("l1", "l2", "taylor", "hessian", "random"),
            ratios=(ratio,),
            scope=scope,
            split=DataConfig(unseen=domain),
            seeds=tuple(seeds),
        )
        return run_study(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", nargs="+", default=["thick"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--scopes", nargs="+", default=["global", "isomorphic"])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    header = ["criterion", "unseen domain, mean ± s.e.", *args.domains, "seen domains", "MACs kept"]
    lines = [
        f"ViT on digits-dg, {args.ratio:.0%} of channels removed, fine-tuned by the short default recipe. Test",
        f"accuracy in percent on all of the unseen domain ({', '.join(args.domains)});",
        f"seeds {', '.join(map(str, args.seeds))}. Made by `make ranking`.",
    ]
    results: list[Result] = []
    for scope in args.scopes:
        found = [run for domain in args.domains for run in study(domain, scope, args.ratio, args.seeds)]
        table = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *rows(found, args.domains)]
        print("\n".join([f"scope {scope}", *table]), flush=True)
        lines += ["", f"**Scope `{scope}`**", "", *table]
        results += found
    args.out.mkdir(parents=True, exist_ok=True)
    records = args.out / "criteria-ranking.jsonl"
    records.unlink(missing_ok=True)
    for result in results:
        append_result(records, result)
    (args.out / "criteria-ranking-table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
