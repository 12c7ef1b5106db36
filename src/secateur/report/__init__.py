"""What is shown and kept of a run: records, tables, figures, and descriptions of networks and plans."""

from secateur.report.describe import describe, describe_plan
from secateur.report.drawing import check_drawing, save_drawing
from secateur.report.explain import explain
from secateur.report.figure import save_figure
from secateur.report.page import save_report
from secateur.report.results import Result, read_results, write_results
from secateur.report.table import COLUMNS, markdown, table

__all__ = [
    "COLUMNS",
    "Result",
    "check_drawing",
    "describe",
    "describe_plan",
    "explain",
    "markdown",
    "read_results",
    "save_drawing",
    "save_figure",
    "save_report",
    "table",
    "write_results",
]
