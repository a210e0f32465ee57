"""``benchmarks/bench_ogbench.py``: its table by hand, and a small run of every path."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import bench_ogbench
import make_ogbench
import pytest
import torch
from extras import needs
from gymnasium.wrappers import TimeLimit
from scipy import stats

from iql_torchrl import PRESETS, OfflineDataset


def finished(task, method, *seeds):
    return {"task": task, "method": method, "log": 7.0, "rows": 1_000_000,
            "curve": [{"updates": 5, "success": [100.0] * len(seeds)},
                      {"updates": 10, "success": list(seeds)}]}  # fmt: skip


def test_the_published_figures_stand_next_to_those_measured():
    runs = [
        finished("cube-single", "cloning", 10.0, 20.0, 60.0),
        finished("cube-single", "IQL", 80.0, 90.0, 100.0),
        finished("scene", "IQL", 40.0, 60.0),
    ]
    lines = bench_ogbench.summarise(runs)
    low, high = stats.t.interval(0.95, 2, loc=30, scale=stats.sem([10, 20, 60]))
    assert low < 0
    assert lines[0]["interval"] == pytest.approx([0, high])
    assert (lines[0]["success"], lines[0]["published"]) == (30, None)
    assert (lines[1]["success"], lines[1]["published"]) == (90, 85)
    assert (lines[2]["interval"], lines[2]["published"]) == ([0, 100], 32)
    text = bench_ogbench.table(lines)
    assert re.search("cube-single task 2, the dataset +7", text)
    assert "scene task 3, IQL" in text
    # the tasks that both methods have: cube-single alone
    compared = bench_ogbench.compare(lines[:2])
    assert "on 1 task," in compared
    assert "probability that a run of IQL is better:" in compared
    assert re.search(r"^cloning +3 .* 1\.000 \[1\.000, 1\.000\]$", compared, re.MULTILINE)
    assert bench_ogbench.compare(lines) == compared


def test_every_task_can_be_made_and_every_method_is_a_config():
    needs("mujoco")
    options = bench_ogbench._options([])
    for task in bench_ogbench.TASKS.values():
        assert task.made() in make_ogbench.RECIPES
        for method in bench_ogbench.METHODS:
            config = bench_ogbench.configure(options, task, method)
            assert (config.updates, config.hidden) == (1_000_000, (512, 512, 512, 512))
    config = bench_ogbench.configure(options, bench_ogbench.TASKS["scene"], "cloning")
    assert config.temperature == 0
    assert bench_ogbench.differences(options, [finished("scene", "IQL", 1.0)])[1:] == list(
        bench_ogbench.ALWAYS_DIFFERENT
    )


def test_methods_differ_from_the_published_agents_in_nothing_that_a_config_can_say():
    options, task = bench_ogbench._options([]), bench_ogbench.TASKS["cube-single"]
    of = {
        method: bench_ogbench.configure(options, task, method) for method in bench_ogbench.METHODS
    }
    assert of["IQL"] == replace(PRESETS["ogbench"], temperature=1.0)
    assert of["IFQL"] == PRESETS["ifql"]
    assert replace(of["IFQL, chunks of 5"], action_chunk=1) == of["IFQL"]
    assert bench_ogbench.RANDOM == ("IFQL", "IFQL, chunks of 5")
    assert set(bench_ogbench.IFQL) == {"temperature", "policy", "num_samples"}
    for config in of.values():
        assert (config.activation, config.norm_after_activation) == ("gelu", True)


def test_a_comparison_with_chunks_has_the_same_batches_for_all_methods():
    assert bench_ogbench._options([]).methods == ["cloning", "IQL", "IQL+DDPG+BC", "IFQL"]
    assert bench_ogbench.batches_of(["IQL", "IFQL"]) == "own"
    compared = ["IFQL", "IFQL, chunks of 5"]
    assert bench_ogbench.batches_of(compared) == "shared"
    options = bench_ogbench._options(["--methods", *compared, "--draw", "v0"])
    differences = bench_ogbench.differences(options, [finished("scene", "IFQL", 1.0)])
    assert differences[0].startswith("all seeds of a method have the same batches")


def test_bc_weight_of_a_deterministic_policy_is_half_of_the_published_alpha():
    settings = bench_ogbench.METHODS["IQL+DDPG+BC"]
    assert settings["policy"] == "deterministic"
    mean, action = torch.tensor([0.3, -0.2]), torch.tensor([[0.9, 0.4], [-1.0, 0.0]])
    published = -torch.distributions.Normal(mean, 1.0).log_prob(action).sum(-1)  # alpha = 1
    ours = settings["bc_weight"] * (mean - action).square().sum(-1)
    torch.testing.assert_close(ours[0] - ours[1], published[0] - published[1])


@pytest.fixture
def short_episodes(monkeypatch):
    """Episodes of evaluation end after three steps."""
    make_env = OfflineDataset.make_env.fget
    made = property(lambda dataset: lambda: TimeLimit(make_env(dataset)(), 3))
    monkeypatch.setattr(OfflineDataset, "make_env", made)


@pytest.mark.slow
def test_a_small_run(tmp_path, monkeypatch, capsys, short_episodes):
    needs("ogbench")
    monkeypatch.setenv("OGBENCH_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(make_ogbench, "ROWS", 21)
    numbers = {"seeds": 2, "updates": 4, "points": 2, "width": 8, "layers": 1, "episodes": 1,
               "envs": 1, "made-episodes": 2}  # fmt: skip
    options = ["--tasks", "cube-single", "--methods", *bench_ogbench.METHODS]
    options += ["--result", "trial", f"--output={tmp_path}"]
    options += [f"--{name}={number}" for name, number in numbers.items()]
    bench_ogbench.main(options)
    record = json.loads((tmp_path / "trial.json").read_text())
    methods = ["cloning", "IQL", "IQL+DDPG+BC", "IFQL", "IFQL, chunks of 5"]
    assert [r["method"] for r in record["runs"]] == list(bench_ogbench.METHODS) == methods
    assert record["settings"]["batches"] == "shared"
    for each in record["runs"]:
        assert each["rows"] == 40
        assert [(p["updates"], len(p["success"])) for p in each["curve"]] == [(2, 2), (4, 2)]
    assert [r["config"]["temperature"] for r in record["runs"]] == [0, 1, 1, 0, 0]
    assert [line["published"] for line in record["summary"]] == [None, 85, None, 73, None]
    assert "updates: 4, not 1,000,000" in record["differences"]
    out = capsys.readouterr().out
    assert "cube-single, cloning, 4 updates" in out
    assert "Interquartile" in out or "interquartile mean" in out
