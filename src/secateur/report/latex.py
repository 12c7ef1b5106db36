"""Tables of a report as Markdown and as LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from secateur.report.grids import Grid
from secateur.report.published import KNOWN_WRONG

# What LaTeX would take for a command, and the signs that our tables use.
_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "Δ": r"$\Delta$",
    "\N{EN DASH}": "--",
    "\N{MINUS SIGN}": "$-$",
    "“": "``",
    "”": "''",
}


_WRONG = "What is known to be wrong with the published figures:"


def _has_paper(grids: Sequence[Grid]) -> bool:
    return any(row.kind == "paper" for grid in grids for row in grid.rows)


def latex_text(text: str) -> str:
    """Returns `text` so that LaTeX prints it as it stands."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def latex(grids: Sequence[Grid]) -> str:
    """Returns tables to paste into a LaTeX document that loads booktabs; rows of the paper are in italics."""
    parts = ["% Needs \\usepackage{booktabs}. Each table is as wide as its content; \\resizebox narrows it."]
    for grid in grids:
        kinds = "".join("r" if column.is_number else "l" for column in grid.columns)
        parts += ["\\begin{table}", "\\centering", f"\\caption{{{latex_text(grid.title)}}}"]
        parts += [f"\\begin{{tabular}}{{{kinds}}}", "\\toprule"]
        if any(column.group for column in grid.columns):
            spans = [(name, len(list(run))) for name, run in groupby(column.group for column in grid.columns)]
            parts.append(_latex_row([f"\\multicolumn{{{n}}}{{c}}{{{latex_text(name)}}}" for name, n in spans]))
        parts += [_latex_row([latex_text(column.label) for column in grid.columns]), "\\midrule"]
        for row in grid.rows:
            cells = [latex_text(cell.text) for cell in row.cells]
            parts.append(_latex_row([f"\\textit{{{cell}}}" if row.kind == "paper" else cell for cell in cells]))
        parts += ["\\bottomrule", "\\end{tabular}"]
        parts += [f"\\par\\footnotesize {latex_text(note)}" for note in grid.notes]
        parts += ["\\end{table}", ""]
    if _has_paper(grids):
        items = [f"\\item \\textbf{{{latex_text(claim)}}} {latex_text(reason)}" for claim, reason in KNOWN_WRONG]
        parts += [latex_text(_WRONG), "\\begin{itemize}", *items, "\\end{itemize}", ""]
    return "\n".join(parts)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def markdown_text(text: str) -> str:
    """Returns `text` so that Markdown shows it as it stands, on one line of a table."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def markdown_grids(grids: Sequence[Grid]) -> str:
    """Returns tables as Markdown; rows of the paper's figures are in italics."""
    lines: list[str] = []
    for grid in grids:
        lines += [f"### {markdown_text(grid.title)}", ""]
        lines.append(_markdown_row([markdown_text(column.full) for column in grid.columns]))
        lines.append(_markdown_row(["--:" if column.is_number else ":--" for column in grid.columns]))
        for row in grid.rows:
            cells = [markdown_text(cell.text) for cell in row.cells]
            lines.append(_markdown_row([f"*{c}*" if c and row.kind == "paper" else c for c in cells]))
        lines += ["", *(f"{markdown_text(note)}\n" for note in grid.notes)]
    if _has_paper(grids):
        lines += [f"### {_WRONG}", ""]
        lines += [f"- **{markdown_text(claim)}** {markdown_text(reason)}" for claim, reason in KNOWN_WRONG] + [""]
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
