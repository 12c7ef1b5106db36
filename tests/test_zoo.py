"""A sample of the zoo, another one every day: over time all of it."""

from __future__ import annotations

import datetime
import os
import random
from pathlib import Path

import pytest
import torch

from zoo.everything import all_entries, find
from zoo.examine import STEPS, examine
from zoo.records import read_records

RECORDS = read_records(Path(__file__).resolve().parents[1] / "docs" / "zoo.jsonl")
SEED = int(os.environ.get("ZOO_SEED", datetime.datetime.now(datetime.UTC).date().toordinal()))
CUT_SECONDS, ANALYSED = 25.0, 12
"""What the sample of models that are cut may take, as recorded, and the number of models that are only analysed."""


def _sample() -> list[tuple[str, str]]:
    """Returns library and name of models drawn with `SEED`: those to cut within the time, and those to analyse."""
    order = random.Random(SEED).sample(RECORDS, len(RECORDS))
    chosen, seconds = [], 0.0
    for record in (r for r in order if r.deep):
        if seconds + record.total_seconds <= CUT_SECONDS:
            seconds += record.total_seconds
            chosen.append((record.library, record.name))
    return chosen + [(r.library, r.name) for r in order if not r.deep][:ANALYSED]


@pytest.mark.parametrize(("library", "name"), _sample(), ids=lambda value: f"{value}")
def test_sample_of_the_zoo(library: str, name: str) -> None:
    torch.set_num_threads(1)
    entry = find(library, name)
    record = examine(entry)
    assert record.error == "", f"ZOO_SEED={SEED}"
    assert record.passed == (STEPS if entry.deep else STEPS[:1])
    if entry.deep:
        assert record.params_left < record.params
        assert record.macs_counted in (None, record.macs_left)
        assert all(used is None or 0.995 <= used <= 1 for used in (record.macs_used, record.params_used))


def test_every_architecture_has_a_record() -> None:
    known = {(r.library, r.name) for r in RECORDS}
    missing = [(e.library, e.name) for e in all_entries() if (e.library, e.name) not in known]
    assert not missing, "run make zoo"


def test_records_show_what_is_promised() -> None:
    deep = [r for r in RECORDS if r.deep]
    assert len({r.family for r in deep if r.library == "timm"}) == 98
    assert len([r for r in deep if r.library == "transformers"]) >= 40
    assert [r.name for r in RECORDS if r.error] == []
    used = [u for r in deep for u in (r.macs_used, r.params_used) if u is not None]
    assert len(used) > 1.9 * len(deep) and 0.995 <= min(used) <= max(used) <= 1
    stuck = sum(r.without_rule * r.params for r in RECORDS)
    assert stuck < 0.03 * sum(r.params for r in RECORDS)
