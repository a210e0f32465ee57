"""Tables and pictures of runs."""

from iql_torchrl.report.comparison import compare, draw, group_runs, main, series, table

__all__ = ["compare", "draw", "group_runs", "main", "series", "table"]
