"""The house has one way through it: a folder imports only from those before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

PACKAGE = Path(secateur.__file__).parent
ORDER = (
    "errors",
    "files",
    "graph",
    "criteria",
    "allocation",
    "surgery",
    "cost",
    "data",
    "training",
    "report",
    "experiments",
    "cli",
)


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        found |= {n.split(".")[1] for n in names if n and n.startswith("secateur.")}
    return found


@pytest.mark.parametrize("folder", ORDER[2:])
def test_a_folder_imports_only_from_those_before_it(folder: str) -> None:
    allowed = set(ORDER[: ORDER.index(folder) + 1])
    for path in (PACKAGE / folder).rglob("*.py"):
        assert _imports(path) <= allowed, path


def test_every_folder_has_its_place() -> None:
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == set(ORDER) - {
        "errors",
        "files",
    }


def test_import_loads_none_of_the_extras() -> None:
    extras = ["timm", "transformers", "torchvision", "accelerate", "torchmetrics", "sklearn", "matplotlib", "ray"]
    code = f"import sys, secateur; print([m for m in {extras!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_documented() -> None:
    for name in secateur.__all__:
        assert getattr(secateur, name).__doc__, name
