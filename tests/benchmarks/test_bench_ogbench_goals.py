"""``benchmarks/bench_ogbench_goals.py``: its summary by hand, and a small run."""

from __future__ import annotations

import json

import bench_ogbench_goals
import make_ogbench
import pytest
from extras import needs
from scipy import stats


def test_the_summary_has_means_of_goals_and_seeds_of_the_last_evaluation():
    first = {"updates": 1, "success": [[100.0, 100.0], [100.0, 100.0], [100.0, 100.0]]}
    last = {"updates": 2, "success": [[100.0, 0.0], [60.0, 20.0], [80.0, 40.0]]}
    summary = bench_ogbench_goals.summarise([first, last])
    assert summary["goals"] == [80, 20]
    assert summary["seeds"] == [50, 40, 60]
    interval = stats.t.interval(0.95, 2, loc=50, scale=stats.sem([50, 40, 60]))
    assert (summary["success"], summary["interval"]) == (50, pytest.approx(list(interval)))
    assert "task 2" in bench_ogbench_goals.table(summary)


def test_settings_are_those_of_the_published_agent():
    config = bench_ogbench_goals.configure(bench_ogbench_goals._options([]))
    assert (config.updates, config.hidden, config.batch_size) == (1_000_000, (512,) * 3, 1024)
    assert (config.expectile, config.discount) == (0.9, 0.99)
    assert (config.actor_objective, config.bc_weight) == ("ddpg_bc", 0.0015)  # alpha / 2
    assert (config.critic_lr, config.value_lr, config.actor_lr) == (3e-4, 3e-4, 3e-4)
    assert (config.layer_norm, config.activation, config.polyak) == (True, "gelu", 0.005)
    assert f"{bench_ogbench_goals.ROWS}-local" in make_ogbench.RECIPES


@pytest.mark.slow
def test_a_small_run(tmp_path, monkeypatch, capsys):
    needs("ogbench")
    monkeypatch.setenv("OGBENCH_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(make_ogbench, "ROWS", 21)
    numbers = {"seeds": 2, "updates": 4, "points": 2, "width": 8, "layers": 1, "batch-size": 8,
               "episodes": 1, "made-episodes": 2}  # fmt: skip
    options = ["--result", "trial", f"--output={tmp_path}"]
    options += [f"--{name}={number}" for name, number in numbers.items()]
    bench_ogbench_goals.main(options)
    record = json.loads((tmp_path / "trial.json").read_text())
    assert record["rows"] == 40
    assert [point["updates"] for point in record["curve"]] == [2, 4]
    for point in record["curve"]:
        assert [len(goals) for goals in point["success"]] == [5, 5]
    assert "task 5" in capsys.readouterr().out
