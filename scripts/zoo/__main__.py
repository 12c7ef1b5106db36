"""Writes docs/zoo.md and docs/zoo.jsonl: what can be pruned in every architecture of three libraries, and what not.

One architecture of each timm family, and all of transformers' and torchvision's in the catalogue, are analysed, cut by
half, checked, run and trained one step; every other architecture that timm names is analysed without weights.
"""

from __future__ import annotations

import multiprocessing
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.everything import all_entries, examine_named
from zoo.records import read_records, write_records
from zoo.report import write_report

DOCS = Path(__file__).resolve().parents[2] / "docs"


@dataclass(frozen=True)
class Zoo:
    """Examine the zoo and write the report."""

    only: str = ""
    """Examine only what this regular expression finds in `library:family:name`; others keep their records."""
    workers: int = 2
    """Processes, of one thread each."""
    out: Path = DOCS / "zoo.md"
    """The report; the records go into a file beside it that ends in .jsonl."""

    def __call__(self) -> None:
        """Examines, keeps the records as they come, and writes the report."""
        store = self.out.with_suffix(".jsonl")
        known = {(r.library, r.name): r for r in read_records(store)} if self.only and store.exists() else {}
        wanted = [e for e in all_entries() if re.search(self.only, f"{e.library}:{e.family}:{e.name}")]
        names = [(entry.library, entry.name) for entry in wanted]
        with multiprocessing.get_context("spawn").Pool(self.workers, maxtasksperchild=50) as pool:
            for count, record in enumerate(pool.imap_unordered(examine_named, names), 1):
                known[record.library, record.name] = record
                if record.error or count % 25 == 0:
                    print(f"{count}/{len(wanted)} {record.library} {record.name} {record.error}", flush=True)
                if count % 50 == 0 or count == len(wanted):
                    write_records(store, known.values())
        write_report(self.out, list(known.values()))


if __name__ == "__main__":
    tyro.cli(Zoo)()
