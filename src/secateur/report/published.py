"""Tables I to IV of arXiv 2504.04196, the settings of ours that they stand beside, and what is wrong with them."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from pathlib import PurePath

PAPER = "arXiv 2504.04196"
POOLED = "pooled domains on all evidence, not domain generalisation"
PROTOCOLS: Mapping[str, str] = {"pacs": POOLED, "officehome": "unseen domain Clipart"}
"""What the paper's test images are, by data set."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of the paper's tables, in its own units: millions of parameters, G of MACs, percent, percentage points.

    Numbers have the digits that were published. `ratio` is the fraction of channels that was removed; `criterion`,
    `delta_acc` and `speed_up` are None for the dense models of Table I. `speed_up` is dense over remaining MACs,
    whatever the word says. `finetune_time` is HH:MM:SS.
    """

    table: str
    model: str
    data: str
    ratio: float
    criterion: str | None
    params_m: Decimal
    macs_g: Decimal
    val_acc: Decimal
    test_acc: Decimal
    delta_acc: Decimal | None
    speed_up: Decimal | None
    finetune_time: str

    @property
    def protocol(self) -> str:
        """What the test images were."""
        return PROTOCOLS[self.data]


@cache
def published() -> tuple[Published, ...]:
    """Returns all rows of Tables I to IV, in the paper's order."""
    text = (files("secateur.report") / "published.csv").read_text("utf-8")
    return tuple(_row(record) for record in csv.DictReader(text.splitlines()))


def _row(record: Mapping[str, str]) -> Published:
    return Published(
        table=record["table"],
        model=record["model"],
        data=record["data"],
        ratio=float(record["ratio"]),
        criterion=record["criterion"] or None,
        params_m=Decimal(record["params_m"]),
        macs_g=Decimal(record["macs_g"]),
        val_acc=Decimal(record["val_acc"]),
        test_acc=Decimal(record["test_acc"]),
        delta_acc=Decimal(record["delta_acc"]) if record["delta_acc"] else None,
        speed_up=Decimal(record["speed_up"]) if record["speed_up"] else None,
        finetune_time=record["finetune_time"],
    )


def find_published(model: str, data: str, ratio: float, criterion: str | None) -> Published | None:
    """Returns the paper's row for a setting, or None where it has none.

    Names are compared as libraries write them: `hf:google/vit-base-patch16-224` and `vit_base_patch16_224.augreg` are
    one model, `Office-Home` and `/data/office_home` one data set.
    """
    name = re.split(r"[/:]", model)[-1].split(".")[0].replace("-", "_").lower()
    folder = re.sub(r"[^a-z0-9]", "", PurePath(data).name.lower())
    setting = (name, folder, round(ratio, 6), criterion)
    rows = (row for row in published() if (row.model, row.data, row.ratio, row.criterion) == setting)
    return next(rows, None)


KNOWN_WRONG: tuple[tuple[str, str], ...] = (
    (
        "PACS is not domain generalisation.",
        "The test domain is never named. All 48 test accuracies are multiples of 1/987 and all 48 validation "
        "accuracies of 1/1725; no domain of PACS has such a size, but a random hold-out of all four together fits, "
        "down to the share of the largest class that a collapsed model is left with (17.33 %). Office-Home is: its "
        "accuracies are multiples of 1/4365, the whole of Clipart.",
    ),
    (
        "“Speed-up” is not a timing.",
        "In all 45 rows it is dense MACs over remaining MACs, to rounding. Here the two stand under two names: the "
        "ratio of MACs counted, and the ratio of latencies measured.",
    ),
    (
        "“Pruned” parameters and MACs are those that remain.",
        "The text describes some of them as removed.",
    ),
    (
        "On BEiT only the hidden units of the MLPs were pruned.",
        "What remains is 86.53 M - ratio x 56.66 M parameters under every criterion, to one percent of the model, "
        "so heads and embedding were never touched. The count of MACs leaves out how BEiT computes queries, keys "
        "and values: 12.67 G is 17.56 G in truth, the 1.79-fold at 50 % is 1.46-fold, and neither the lowest cost "
        "nor the robustness at 95 % is BEiT's merit.",
    ),
    (
        "Rows of one ratio are not of one size.",
        "The ratio counts channels over the whole network. At 50 %, Random leaves 24 % of the parameters of ViT, "
        "Hessian 40 %, and every criterion 67 % of BEiT.",
    ),
    (
        "The embedding collapses.",
        "Its scores are means over some 75 layers and so lie close together: a global threshold above them takes "
        "nearly all at once. From parameters and MACs together, ViT is left with about 590 of 768 embedding "
        "channels at 50 % (Hessian), 160 at 75 % (Taylor) and 4 at 95 % (Taylor). ViT under L1 is the exception at "
        "75 and 95 %, with about 763: the library used refuses to empty a group and then leaves it whole. Its "
        "stable 73 to 76 % is that accident.",
    ),
    (
        "The floor of 0.73 to 0.74 G MACs at 95 % is an artefact of the counter.",
        "It charges attention's output projection for a width that is gone; the true cost is about 0.38 G.",
    ),
    (
        "Random beats Hessian at 95 % on ViT and on DeiT.",
        "62.01 against 50.15 %, and 64.13 against 54.41 %: the text says that Hessian leads.",
    ),
    (
        "Hessian scores may rest on one image.",
        "The library whose example the recipe matches number by number keeps the gradient of the last sample only, "
        "instead of the mean over all.",
    ),
    (
        "There is one run of everything.",
        "No seeds, so no telling small differences from chance; neither batch size nor hardware is given, so "
        "fine-tuning times cannot be compared with others.",
    ),
    (
        "Slips between text and tables.",
        "6.64 G for 6.94 G MACs (ViT, Hessian, 50 %); the 78.22 % ascribed to L2 is Random's.",
    ),
)
"""What the published figures cannot mean, in a few words and in full; found by arithmetic on the published cells."""
