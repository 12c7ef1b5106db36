"""`secateur report`: finished runs as a table, and as files to read, print and paste."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from secateur.errors import InputError
from secateur.report import read_results, save_report, table
from secateur.report.results import num_under_way


@dataclass(frozen=True)
class Report:
    """Show finished runs: as a table here, as one HTML file with --out."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUNS")]
    """Folders of runs, as `secateur sweep` and `secateur demo` write them, or files of results."""
    out: Path | None = None
    """Folder to write report.html, tables (Markdown, LaTeX) and accuracy.png to."""

    def __call__(self, console: Console) -> None:
        """Prints the table of all runs together, and writes the report if that was asked for."""
        if not self.runs:
            raise InputError("name at least one folder of results")
        results = [result for path in self.runs for result in read_results(path)]
        console.print(table(results), highlight=False)
        if self.out is not None:
            written = save_report(results, self.out, under_way=sum(map(num_under_way, self.runs)))
            console.print(f"wrote {', '.join(map(str, written))}", highlight=False, markup=False, soft_wrap=True)
