"""What is shown and kept of a run: records, tables, figures, and descriptions of networks and plans."""

from secateur.files import write_text, write_whole
from secateur.report.describe import describe, describe_plan
from secateur.report.figure import save_figure
from secateur.report.results import Result, append_result, read_results
from secateur.report.table import COLUMNS, markdown, table

__all__ = [
    "COLUMNS",
    "Result",
    "append_result",
    "describe",
    "describe_plan",
    "markdown",
    "read_results",
    "save_figure",
    "table",
    "write_text",
    "write_whole",
]
