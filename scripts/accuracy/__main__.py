"""Accuracy after pruning on digits-dg: all settings of secateur beside Torch-Pruning, at equal MACs.

Every base model is trained once (its weights are shipped), calibrated once for each seed, and pruned by every setting:
criterion x scope x fewer or narrower heads, with and without compensation; Torch-Pruning 1.6.1 driven as its examples
do (see `scripts/accuracy/peer.py`); and variance with a shift of means (VBP). Then the best settings of each, chosen by
accuracy on the *source* domains alone, get the same short fine-tuning. Measurements go to `OUT/accuracy.jsonl`; those
that stand there already are not made again. Table and figure are made of the file.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path

from accuracy import peer
from accuracy.measure import BUDGETS, Task, work
from accuracy.records import Record, Setting, Unit, append, read
from accuracy.report import CONTENDERS, best_setting, figure, grouped, summary, table
from secateur.criteria import find_criterion

CRITERIA = ("l1", "l2", "lamp", "fpgm", "taylor", "taylor_signed", "hessian", "activation", "variance", "obs", "random")
BY_DOMAIN = (
    *(f"taylor {way}" for way in ("mean", "worst", "mean_minus_spread", "sign_agreement")),
    *(f"hessian {way}" for way in ("mean", "worst", "mean_minus_spread")),
)
"""Criteria whose scores of the source domains are combined in this way; with narrower heads, ranked globally."""
LIBRARIES = ["secateur", "torch-pruning"]
SCOPES = ("local", "global", "isomorphic", "cost")


Wanted = tuple[Setting, float]
"""A setting and a budget, as a fraction of the dense model's MACs."""


def missing(
    records: Sequence[Record], unit: Unit, wanted: Sequence[Wanted], *, tune: bool, first: bool
) -> Iterator[Task]:
    """Yields what is still to be measured of a unit, a criterion at a time; what depends on no seed under the first."""
    done = {r.key for r in records if not tune or r.tuned_test is not None or r.error}
    parts: dict[tuple[str, str], list[Wanted]] = {}
    for setting, budget in [(Setting("dense", "dense", ""), 1.0), *wanted]:
        if (unit, setting, budget) not in done and (tune or first or setting.is_drawn):
            parts.setdefault((setting.library, setting.criterion), []).append((setting, budget))
    for part in parts.values():
        yield unit, part, tune


def one_shot(criteria: Sequence[str], scopes: Sequence[str], attentions: Sequence[str]) -> list[Wanted]:
    """Returns all settings with these criteria and scopes, as far as each library has them, at all budgets."""
    settings: list[Setting] = []
    for a, s in itertools.product(attentions, scopes):
        own = [c for c in criteria if not _is_global(c, s, a)]
        settings += [Setting("secateur", c, s, k, a) for c in own for k in ("none", "full")]
        settings += [Setting("secateur", c, s, "mean", a) for c in own if c == "variance"]
        if s in peer.SCOPES:
            settings += [Setting("torch-pruning", c, s, attention=a) for c in peer.CRITERIA if c in criteria]
    settings += [
        Setting("secateur", c, "global", k, "dims")
        for c in BY_DOMAIN
        for k in ("none", "full")
        if c.split()[0] in criteria and "global" in scopes and "dims" in attentions
    ]
    return list(itertools.product(settings, BUDGETS))


def _is_global(criterion: str, scope: str, attention: str) -> bool:
    """Whether scope cost is scope global: so for normalised scores, ranked together anyway where no heads take part."""
    return scope == "cost" and attention == "dims" and find_criterion(criterion).normalize


def to_tune(records: Sequence[Record], model: str) -> list[Wanted]:
    """Returns the settings of a model that are fine-tuned: at each budget the best of each contender."""
    found: list[Wanted] = []
    for (its, budget), rows in grouped(records).items():
        if its == model and budget < 1:
            best = [best_setting(rows, chosen) for chosen in CONTENDERS.values()]
            found += [(s, budget) for s in dict.fromkeys(best) if s is not None]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_digits", "beit_digits"])
    parser.add_argument("--domains", nargs="+", default=["plain", "sketch", "texture", "thick"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=CRITERIA)
    parser.add_argument("--scopes", nargs="+", default=list(SCOPES), choices=SCOPES)
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=LIBRARIES)
    parser.add_argument("--attention", nargs="+", default=["heads", "dims"], choices=["heads", "dims"])
    parser.add_argument("--only", nargs="*", default=["oneshot", "tune"], help="oneshot, tune, or nothing: just draw")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "docs")
    args = parser.parse_args()
    if unknown := set(args.only) - {"oneshot", "tune"}:
        parser.error(f"--only takes oneshot and tune, not {', '.join(unknown)}")
    path = args.out / "accuracy.jsonl"
    units = [Unit(m, d, s) for s in args.seeds for d in args.domains for m in args.models]
    for stage in args.only:
        known = read(path)
        every = [w for w in one_shot(args.criteria, args.scopes, args.attention) if w[0].library in args.libraries]
        wanted = {m: every if stage == "oneshot" else to_tune(known, m) for m in args.models}
        tasks = [
            task
            for u in units
            for task in missing(known, u, wanted[u.model], tune=stage == "tune", first=u.seed == args.seeds[0])
        ]
        with get_context("spawn").Pool(args.workers, maxtasksperchild=20) as pool:
            for number, records in enumerate(pool.imap_unordered(work, tasks), 1):
                append(path, records)
                print(f"{stage}: {number} of {len(tasks)}, {records[0].unit}, {records[0].setting}", flush=True)
    records = read(path)
    (args.out / "accuracy-table.md").write_text(
        "\n".join([f"# {__doc__}".rstrip(), *summary(records), *table(records)]) + "\n"
    )
    figure(records, args.out / "accuracy.png")


if __name__ == "__main__":
    main()
