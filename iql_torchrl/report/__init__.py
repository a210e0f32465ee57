"""Tables and pictures of runs."""

from iql_torchrl.report.comparison import compare, main, table
from iql_torchrl.report.figures import draw
from iql_torchrl.report.runs import group_runs, series
from iql_torchrl.report.tables import read_csv, results_table, text_table, write_csv, write_rows

__all__ = [
    "compare",
    "draw",
    "group_runs",
    "main",
    "read_csv",
    "results_table",
    "series",
    "table",
    "text_table",
    "write_csv",
    "write_rows",
]
