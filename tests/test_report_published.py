"""The published figures: that they were copied right, shown by what must hold among them, and what we say is wrong."""

from __future__ import annotations

from decimal import Decimal

import pytest

from secateur.report.published import KNOWN_WRONG, find_published, published

VIT, BEIT, DEIT = "vit_base_patch16_224", "beit_base_patch16_224", "deit_base_distilled_patch16_224"
DENSE = {row.model: row for row in published() if row.table == "I" and row.data == "pacs"}
PRUNED = [row for row in published() if row.table != "I"]
CLAIMS = " ".join(claim + " " + reason for claim, reason in KNOWN_WRONG)


def test_the_tables_are_complete() -> None:
    assert len(published()) == 6 + 45
    cells = {(row.table, row.model, row.ratio, row.criterion) for row in PRUNED}
    tables = {"II": VIT, "III": BEIT, "IV": DEIT}
    criteria = ("hessian", "taylor", "random", "l1", "l2")
    assert cells == {(t, m, r, c) for t, m in tables.items() for r in (0.5, 0.75, 0.95) for c in criteria}


@pytest.mark.parametrize("row", PRUNED, ids=lambda row: f"{row.table}-{row.criterion}-{row.ratio}")
def test_delta_and_speed_up_follow_from_the_other_cells(row) -> None:
    dense = DENSE[row.model]
    # Each of the three is rounded to a hundredth.
    assert abs(row.delta_acc - (row.test_acc - dense.test_acc)) <= Decimal("0.015")
    # To the rounding of both counts and of the ratio itself, which has one decimal or two.
    half, digit = Decimal("0.005"), Decimal(10) ** row.speed_up.as_tuple().exponent
    low, high = (dense.macs_g - half) / (row.macs_g + half), (dense.macs_g + half) / (row.macs_g - half)
    assert low - digit / 2 <= row.speed_up <= high + digit / 2


def test_pacs_accuracies_are_those_of_pooled_hold_outs() -> None:
    rows = [row for row in published() if row.data == "pacs"]
    assert len(rows) == 48 and "All 48 test accuracies" in CLAIMS
    for figure, count in [(r.test_acc, 987) for r in rows] + [(r.val_acc, 1725) for r in rows]:
        accuracy = float(figure)
        nearest = 100 * round(accuracy * count / 100) / count
        assert nearest == pytest.approx(accuracy, abs=0.0076)


def test_no_domain_of_pacs_fits_its_accuracies() -> None:
    rows = [row for row in published() if row.data == "pacs"]
    for count in (1670, 2048, 2344, 3929):
        found = [float(row.test_acc) for row in rows]
        fits = [abs(100 * round(acc * count / 100) / count - acc) <= 0.0076 for acc in found]
        assert not all(fits)


def test_office_home_is_tested_on_the_whole_of_clipart() -> None:
    rows = [row for row in published() if row.data == "officehome"]
    assert [round(r.test_acc * 4365 / 100) for r in rows] == [2230, 2403, 2241]
    for row, right in zip(rows, (2230, 2403, 2241), strict=True):
        assert 100 * right / 4365 == pytest.approx(float(row.test_acc), abs=0.0006)


def test_beit_lost_hidden_units_of_its_mlps_and_nothing_else() -> None:
    # 12 blocks of 3072 hidden units, each with 768 weights in, 768 out and a bias.
    hidden = 12 * 3072 * (2 * 768 + 1) / 1e6
    assert f"ratio x {hidden:.2f} M" in CLAIMS
    for row in (row for row in PRUNED if row.model == BEIT):
        assert float(row.params_m) == pytest.approx(86.53 - row.ratio * hidden, abs=0.01 * 86.53)


def test_random_beats_hessian_at_95_percent() -> None:
    cells = {(row.model, row.criterion): row.test_acc for row in PRUNED if row.ratio == 0.95}
    for model in (VIT, DEIT):
        assert cells[model, "random"] > cells[model, "hessian"]
        assert f"{cells[model, 'random']} against {cells[model, 'hessian']} %" in CLAIMS


def test_sizes_named_in_the_note_are_those_of_the_tables() -> None:
    left = {(r.model, r.criterion): 100 * r.params_m / DENSE[r.model].params_m for r in PRUNED if r.ratio == 0.5}
    assert round(left[VIT, "random"]) == 24 and round(left[VIT, "hessian"]) == 40
    assert {round(left[BEIT, c]) for c in ("hessian", "taylor", "random", "l1")} == {67}


@pytest.mark.parametrize(
    ("model", "data", "ratio", "criterion", "test_acc"),
    [
        ("vit_base_patch16_224", "PACS", 0.0, None, 94.33),
        ("hf:google/vit-base-patch16-224", "pacs", 0.5, "hessian", 91.39),
        ("google/vit-base-patch16-224", "/data/PACS", 0.5, "hessian", 91.39),
        ("beit_base_patch16_224.in22k_ft_in22k_in1k", "pacs", 0.95, "l2", 80.14),
        ("deit_base_distilled_patch16_224", "Office-Home", 0.0, None, 51.340),
        ("deit_base_distilled_patch16_224", "/data/office_home", 0.0, None, 51.340),
        ("deit_base_distilled_patch16_224", "office_home", 0.5, "l1", None),
        ("vit_base_patch16_224", "pacs", 0.6, "l1", None),
        ("vit_base_patch16_224", "pacs", 0.5, "fisher", None),
        ("vit_base_patch16_224", "vlcs", 0.0, None, None),
        ("vit_small_patch16_224", "pacs", 0.0, None, None),
        ("vit_digits", "digits-dg", 0.5, "l1", None),
    ],
)
def test_published_rows_are_found_for_their_setting_alone(
    model: str, data: str, ratio: float, criterion: str | None, test_acc: float | None
) -> None:
    row = find_published(model, data, ratio, criterion)
    assert (float(row.test_acc) if row else None) == test_acc
