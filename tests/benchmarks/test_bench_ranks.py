"""A small run of ``bench_ranks.py``."""

from __future__ import annotations

import json

import bench_ranks
import pytest


@pytest.mark.slow
def test_a_small_run_measures_and_prints_a_table(tmp_path, capsys):
    sizes = ["--widths", "8", "--batches", "16", "32", "--updates", "2"]
    bench_ranks.main([*sizes, f"--output={tmp_path}"])
    record = json.loads((tmp_path / "ranks.json").read_text())
    for measured in record["rows"]:
        # sequential: V; actor and critics; metrics
        assert measured["sums"] == 3
        assert measured["two ranks ms"] > measured["exchanges ms"] > 0
    assert "gathering ms" in capsys.readouterr().out
