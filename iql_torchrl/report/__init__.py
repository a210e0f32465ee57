"""Tables and pictures of runs."""

from iql_torchrl.report.comparison import compare, draw, group_runs, main, series, table
from iql_torchrl.report.runs import read_csv, write_csv

__all__ = ["compare", "draw", "group_runs", "main", "read_csv", "series", "table", "write_csv"]
