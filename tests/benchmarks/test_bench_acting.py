"""``benchmarks/bench_acting.py``: its ratios by hand, and a small run."""

from __future__ import annotations

import json

import bench_acting
import measuring


def test_ratios_are_those_of_neighbouring_blocks():
    results = {
        "Gaussian": {"ms": [1.0, 10.0, 4.0]},
        "flow": {"ms": [3.0, 20.0, 24.0]},
        "DDPG+BC": {"failed": "why"},
    }
    measuring.summarise(results, "Gaussian")
    assert results["flow"]["median_ms"] == 20.0
    assert results["flow"]["of Gaussian"] == [3.0, 2.0, 6.0]
    assert results["Gaussian"]["of Gaussian"] == [1.0, 1.0, 1.0]
    assert results["DDPG+BC"] == {"failed": "why"}


def test_a_small_run(tmp_path, capsys):
    sizes = {"width": 8, "rows": 40, "update-batch": 4, "rounds": 2, "block": 0.005}
    options = [f"--output={tmp_path}", *(f"--{name}={n}" for name, n in sizes.items())]
    bench_acting.main([*options, "--batches", "1", "3", "--samples", "1", "2", "--forms", "eager"])
    record = json.loads((tmp_path / "acting_cpu.json").read_text())
    assert list(record["acting"]) == ["1", "3"]
    kinds = ["Gaussian", "DDPG+BC", "flow"]
    for results in record["acting"].values():
        assert list(results) == [*kinds, "flow, best of 1", "flow, best of 2"]
        assert all(len(entry["ms"]) == 2 for entry in results.values())
    assert list(record["updates"]) == ["eager"]
    assert list(record["updates"]["eager"]) == kinds
    # ten Euler steps and two critics take longer than one pass of the policy
    assert record["acting"]["1"]["flow, best of 2"]["of Gaussian"][0] > 1
    assert "updates, eager, batch 4" in capsys.readouterr().out
