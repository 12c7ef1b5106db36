"""Prints the lines of each folder of the package and fails when a budget is exceeded.

Budgets: the core (graph, allocation, surgery) 2,500 lines, a file 500, a function 60, a signature 8 parameters.
Lines are physical lines: comments, docstrings and blank lines count. A parameter list counts every named parameter
except `self` and `cls`. What may be over, and why, stands in `ALLOWED`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "secateur"
CORE = ("graph", "allocation", "surgery")
CORE_LINES, FILE_LINES, FUNCTION_LINES, PARAMETERS = 2500, 500, 60, 8

ALLOWED: dict[str, str] = {}
"""What is over budget (as printed: `core`, `graph/rules.py` or `graph/rules.py:function`) and the reason for it."""


def num_lines(path: Path) -> int:
    """Returns the number of physical lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the number of named parameters of a function, `self` and `cls` apart."""
    arguments = function.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


def over_in_file(path: Path) -> Iterator[tuple[str, str]]:
    """Yields name and complaint for everything in one file that is over its budget."""
    name = path.relative_to(PACKAGE).as_posix()
    if (lines := num_lines(path)) > FILE_LINES:
        yield name, f"{lines} lines, budget {FILE_LINES}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > FUNCTION_LINES:
            yield f"{name}:{node.name}", f"{lines} lines, budget {FUNCTION_LINES}"
        if (count := num_parameters(node)) > PARAMETERS:
            yield f"{name}:{node.name}", f"{count} parameters, budget {PARAMETERS}"


def main() -> int:
    """Prints the counts; returns 1 when something is over budget without a reason in `ALLOWED`."""
    files = sorted(PACKAGE.rglob("*.py"))
    totals: dict[str, int] = {}
    for path in files:
        inside = path.relative_to(PACKAGE).parts
        folder = inside[0] if len(inside) > 1 else "."
        totals[folder] = totals.get(folder, 0) + num_lines(path)
    core = sum(totals.get(folder, 0) for folder in CORE)
    for folder, lines in sorted(totals.items()):
        print(f"{folder:12} {lines:6}")
    print(f"{'all':12} {sum(totals.values()):6}")
    print(f"{'core':12} {core:6}  ({', '.join(CORE)}; budget {CORE_LINES})")

    over = [("core", f"{core} lines, budget {CORE_LINES}")] if core > CORE_LINES else []
    over += [found for path in files for found in over_in_file(path)]
    for name, complaint in over:
        print(f"over budget: {name}: {complaint}" + (f" (allowed: {ALLOWED[name]})" if name in ALLOWED else ""))
    return int(any(name not in ALLOWED for name, _ in over))


if __name__ == "__main__":
    sys.exit(main())
