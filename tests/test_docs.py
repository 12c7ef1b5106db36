"""What the README shows, runs; what the documents point to, exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

import secateur

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5).eval()
    x = torch.randn(2, 3, 224, 224)
    network = secateur.trace(model, x)
    names = {
        "torch": torch,
        "secateur": secateur,
        "model": model,
        "example_inputs": x,
        "batches": [(x, torch.tensor([0, 1]))],
        "optimizer": torch.optim.AdamW(model.parameters()),
        "network": network,
        "scores": secateur.score(network, model, "l1"),
    }
    exec(BLOCKS[number], names)
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
