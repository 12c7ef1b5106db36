"""The zoo's report for people: totals, one row for each architecture, and what stays in which of them, and why."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from secateur.files import write_text
from zoo.examine import STEPS, Record

INTRODUCTION = """\
# The zoo

Written by `make zoo`; [zoo.jsonl](zoo.jsonl) holds the same for machines. Weights are random, nothing is downloaded,
and not one line of Secateur is about any of these models.

- **analysed**: seconds to trace, one core.
- **prunable**: fraction of parameters and of multiply-accumulates (MACs) that some cut can remove.
- **left**: parameters and MACs after `prune_(ratio=0.5, scope="local")`. Predicted and counted figures are equal in
  every row that passed (MACs are counted by `torch.utils.flop_counter`; not for models marked *values*, whose way
  depends on values).
- **passed**: the cut model was traced again and compared, ran in eval mode with outputs of the old shapes, and took a
  step of training (forward, backward, optimizer).
- **stays**: the main reason why parameters cannot be removed, where 2 % or more cannot; the indices that make a
  model's outputs always stay.
"""


def write_report(path: Path, records: Sequence[Record]) -> None:
    """Writes the report."""
    deep = [r for r in records if r.deep]
    timm = [r for r in records if r.library == "timm"]
    parts = [INTRODUCTION, _totals(records, deep, timm)]
    for library in ("timm", "transformers", "torchvision"):
        rows = [r for r in deep if r.library == library]
        parts.append(f"## {library}: {len(rows)} architectures cut by half\n\n{_table(rows)}")
    parts.append(f"## All {len(timm)} architectures of timm, analysed without weights\n\n{_families(timm)}")
    parts.append(f"## What stays, and why\n\n{_reasons(deep)}")
    write_text(path, "\n".join(parts))


def _totals(records: Sequence[Record], deep: Sequence[Record], timm: Sequence[Record]) -> str:
    failed = [r for r in records if r.error]
    total = sum(r.params for r in records)
    unruled = sum(r.without_rule * r.params for r in records)
    seconds = [r.seconds for r in timm if not r.error]
    passed = Counter(r.library for r in deep if r.passed == STEPS and not r.error)
    of = Counter(r.library for r in deep)
    lines = [f"- passed everything: {', '.join(f'{name} {passed[name]} of {n}' for name, n in sorted(of.items()))}"]
    lines.append(f"- families of timm: {len({r.family for r in deep if r.library == 'timm' and not r.error})}")
    if seconds:
        lines.append(
            f"- architectures of timm analysed: {len(seconds)} of {len(timm)}; "
            f"median {statistics.median(seconds):.2f} s, slowest {max(seconds):.1f} s"
        )
    for name, used in (("MACs", [r.macs_used for r in deep]), ("parameters", [r.params_used for r in deep])):
        shares = [u for u in used if u is not None]
        near = sum(u >= 0.995 for u in shares)
        lines.append(
            f"- a budget of half the {name}: 99.5 % or more of it used on {near} of {len(deep)} architectures, "
            f"at least {min(shares, default=0):.1%}, never exceeded; out of reach on {len(used) - len(shares)}"
        )
    lines.append(f"- parameters that stay for want of an operator rule: {unruled / max(1, total):.3%}")
    lines += [f"- **failed**: {r.library} {r.name}: {r.error}" for r in failed]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Record]) -> str:
    head = "| family | architecture | analysed (s) | prunable params / MACs | left params / MACs | passed | stays |"
    lines = [head, "|---|---|--:|--:|--:|---|---|"]
    for r in sorted(rows, key=lambda r: (r.family, r.name)):
        left = f"{r.params_left / max(1, r.params):.2f} / {r.macs_left / max(1, r.macs):.2f}"
        values = "" if r.macs_counted is not None or r.error else ", *values*"
        passed = f"all{values}" if r.passed == STEPS and not r.error else f"**{', '.join(r.passed) or 'nothing'}**"
        reason = _short(r.frozen[0][0]) if r.frozen and r.prunable_params < 0.98 else ""
        lines.append(
            f"| {r.family} | {r.name} | {r.seconds:.2f} | {r.prunable_params:.3f} / {r.prunable_macs:.3f} | {left} "
            f"| {passed} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def _families(timm: Sequence[Record]) -> str:
    lines = [
        "| family | architectures | params (M) | analysed (s), median / most | prunable params, least / median |",
        "|---|--:|--:|--:|--:|",
    ]
    by_family: dict[str, list[Record]] = defaultdict(list)
    for r in timm:
        by_family[r.family].append(r)
    for family, rows in sorted(by_family.items()):
        params = [r.params / 1e6 for r in rows]
        seconds = [r.seconds for r in rows]
        prunable = [r.prunable_params for r in rows]
        lines.append(
            f"| {family} | {len(rows)} | {min(params):.1f} to {max(params):.1f} "
            f"| {statistics.median(seconds):.2f} / {max(seconds):.2f} "
            f"| {min(prunable):.3f} / {statistics.median(prunable):.3f} |"
        )
    return "\n".join(lines) + "\n"


def _reasons(deep: Sequence[Record]) -> str:
    counts: Counter[str] = Counter()
    models: dict[str, list[str]] = defaultdict(list)
    for r in deep:
        for reason, count in r.frozen:
            text = reason.partition(";")[0]
            counts[text] += count
            if r.name not in models[text]:
                models[text].append(r.name)
    lines = ["| reason | parameters (M) | models | for example |", "|---|--:|--:|---|"]
    for text, count in counts.most_common(30):
        names = models[text]
        lines.append(f"| {text} | {count / 1e6:.2f} | {len(names)} | {', '.join(names[:3])} |")
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    text, _, where = reason.partition("; ")
    return f"{text} ({where})" if where else text
