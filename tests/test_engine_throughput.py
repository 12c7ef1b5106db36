"""The script that measures throughput runs on a CPU too, and counts as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import finetune_throughput


def test_throughput_of_dense_and_pruned_models_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune_throughput.main(["--tiny", "--device", "cpu", "--compile", "off", "--write", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[:3] for row in rows] == [
        [model, variant, "off"] for model in ("ViT-B", "DeiT-B", "BEiT-B") for variant in ("dense", "pruned")
    ]
    macs = [float(row[3]) for row in rows]
    assert all(pruned < dense for dense, pruned in zip(macs[::2], macs[1::2], strict=True))
    reached = float(re.search(r"reaches ([\d.e+-]+) TFLOP/s", text).group(1))  # pyright: ignore[reportOptionalMemberAccess]
    for row in rows:
        tflops = 6 * float(row[3]) * 1e9 * float(row[4]) / 1e12
        assert float(row[5]) == pytest.approx(tflops, rel=0.02)
        assert float(row[6].rstrip("%")) / 100 == pytest.approx(tflops / reached, rel=0.05, abs=0.006)


def test_full_size_is_refused_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune_throughput.main(["--device", "cpu"])
    assert "--tiny" in capsys.readouterr().err
