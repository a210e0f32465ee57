"""Tables and pictures of runs."""

from iql_torchrl.report.comparison import compare, main, table
from iql_torchrl.report.figures import draw
from iql_torchrl.report.groups import group_runs, series
from iql_torchrl.report.runs import read_csv, write_csv

__all__ = ["compare", "draw", "group_runs", "main", "read_csv", "series", "table", "write_csv"]
