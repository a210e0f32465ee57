"""``estimate_ranks.py`` by hand, and a small run of ``bench_ranks.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_ranks
import estimate_ranks


def row(width, batch, ms, numbers=250_000, sums=3):
    return {"width": width, "batch": batch, "alone ms": ms, "sums": sums, "numbers": numbers}


def test_the_estimate_equals_one_made_by_hand():
    # width 64: 1 ms + 0.001 ms a row; width 1024: 3 ms + 1 ms a row
    rows = [
        row(64, 1000, 2.0),
        row(64, 2000, 3.0),
        row(1024, 1000, 1003.0),
        row(1024, 2000, 2003.0),
    ]
    processor = estimate_ranks.RATE * estimate_ranks.REACHED / 100  # a GPU is 100 times faster
    links = [estimate_ranks.Link(2, 10e-6, 1e9), estimate_ranks.Link(4, 20e-6, 1e12)]
    narrow, _, wide, _ = estimate_ranks.estimate(rows, processor, links)
    # the host's 1 ms is longer than 1000 rows of 0.00001 ms; two GPUs send 1 MB at 1 GB/s: 1.03 ms
    assert narrow["one GPU ms"] == pytest.approx(1.0)
    assert narrow["2 GPUs"] == pytest.approx(1 / (0.005 + 0.03 + 1.0))
    assert narrow["4 GPUs"] == pytest.approx(1.0)  # 0.0025 + 0.06 + 0.0015 ms: the host's time
    assert narrow["device needs batch"] == pytest.approx(100_000)
    # 2 ms / 100 + 1000 ms / 100 = 10.02 ms
    assert wide["one GPU ms"] == pytest.approx(10.02)
    assert wide["2 GPUs"] == pytest.approx(10.02 / (0.02 + 5 + 0.03 + 1.0))
    assert wide["4 GPUs"] == pytest.approx(10.02 / (0.02 + 2.5 + 0.06 + 0.0015))
    assert wide["device needs batch"] == pytest.approx(98)
    alone = estimate_ranks.estimate(rows, processor, links, with_host=False)[0]
    assert alone["one GPU ms"] == pytest.approx(0.01)
    assert alone["4 GPUs"] == pytest.approx(0.01 / (0.0025 + 0.06 + 0.0015))


def test_one_batch_is_not_enough_for_an_estimate():
    with pytest.raises(
        ValueError, match="width 64 was measured at 1 batch; the estimate needs two"
    ):
        estimate_ranks.estimate([row(64, 256, 1.0)], 1e11)


@pytest.mark.slow
def test_a_small_run_measures_and_prints_both_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_ranks, "RESULT", tmp_path / "ranks.json")
    bench_ranks.main(["--widths", "8", "--batches", "16", "32", "--updates", "2"])
    record = json.loads((tmp_path / "ranks.json").read_text())
    for measured in record["rows"]:
        # sequential: V; actor and critics; metrics
        assert measured["sums"] == 3
        assert measured["two ranks ms"] > measured["exchanges ms"] > 0
    printed = capsys.readouterr().out
    assert printed.count("| width | batch |") == 3
    assert "An estimate for GPUs, which were not measured:" in printed
