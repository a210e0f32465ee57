"""The table of results, against numbers computed by hand."""

from __future__ import annotations

import re

import numpy as np

from iql_torchrl import Evaluation, load_dataset
from iql_torchrl.report import results_table, write_rows


def make_log():
    """Two episodes of returns 1 and 5."""
    rng = np.random.default_rng(0)
    columns = {
        "observation": rng.normal(size=(4, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, size=(4, 1)).astype(np.float32),
        "reward": np.array([1.0, 0.0, 2.0, 3.0]),
        "terminated": np.array([False, True, False, True]),
        "truncated": np.zeros(4, bool),
    }
    return load_dataset(columns, env="Pendulum-v1", progress=False)


def test_means_standard_errors_and_counts():
    results = {
        "IQL": Evaluation(np.array([2.0, 4.0, 6.0, 8.0]), np.full(4, 2)),
        "once": Evaluation(np.array([7.0]), np.array([2])),
    }
    head, *lines = results_table(make_log(), results).splitlines()
    assert re.split(" {2,}", head)[-3:] == ["mean return", "std. error", "episodes"]
    # log: deviation sqrt(8), over sqrt(2); IQL: deviation sqrt(20 / 3), over 2
    assert lines[0].split() == ["the", "log", "3.0", "2.0", "2"]
    assert lines[1].split() == ["IQL", "5.0", "1.3", "4"]
    assert lines[2].split() == ["once", "7.0", "-", "1"]


def test_rows_are_a_table_whose_unknown_cells_are_empty(tmp_path):
    path = tmp_path / "new" / "table.csv"
    write_rows(path, [{"name": "a", "value": np.nan}, {"name": "b", "more": None, "value": 0.1}])
    assert path.read_bytes() == b"name,value,more\na,,\nb,0.1,\n"
