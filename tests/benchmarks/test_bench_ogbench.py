"""``benchmarks/bench_ogbench.py``: its comparison by hand, and a small run of every path."""

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

from iql_torchrl import PRESETS, OfflineDataset


def rows(task, method, *seeds):
    """Two evaluations of each seed, of which the last counts."""
    return [
        {"task": task, "variant": method, "seed": seed, "updates": updates, "success": success}
        for seed, rate in enumerate(seeds)
        for updates, success in ((5, 100.0), (10, rate))
    ]


def test_tasks_that_all_methods_have_are_compared():
    cube = [*rows("cube-single", "cloning", 10.0, 20.0, 60.0)]
    cube += rows("cube-single", "IQL", 80.0, 90.0, 100.0)
    published = {"task": "cube-single", "variant": "IQL, published", "success": 85}
    compared = bench_ogbench.compare([published, *cube, *rows("scene", "IQL", 40.0, 60.0)])
    assert "on 1 task," in compared
    assert "probability that a run of IQL is better:" in compared
    assert re.search(r"^cloning +3 .* 1\.000 \[1\.000, 1\.000\]$", compared, re.MULTILINE)
    assert bench_ogbench.compare(cube) == compared
    assert bench_ogbench.compare([published]) == ""


def test_every_task_can_be_made_and_sizes_are_the_published_ones():
    needs("mujoco")
    options = bench_ogbench._options([])
    for task in bench_ogbench.SINGLE_TASKS.values():
        assert f"{task.rows}-local" in make_ogbench.RECIPES
    config = bench_ogbench.configure(options, {})
    assert (config.updates, config.hidden) == (1_000_000, (512, 512, 512, 512))
    assert bench_ogbench.differences(options)[1:] == list(bench_ogbench.ALWAYS_DIFFERENT)


def test_methods_differ_from_the_published_agents_in_nothing_that_a_config_can_say():
    base = bench_ogbench.configure(bench_ogbench._options([]), {"temperature": 1.0})
    of = {m: replace(base, **settings) for m, settings in bench_ogbench.METHODS.items()}
    assert of["cloning"].temperature == 0
    assert of["IQL"] == replace(PRESETS["ogbench"], temperature=1.0)
    assert of["IFQL"] == PRESETS["ifql"]
    assert replace(of["IFQL, chunks of 5"], action_chunk=1) == of["IFQL"]
    assert set(bench_ogbench.IFQL) == {"temperature", "policy", "num_samples"}
    for config in of.values():
        assert (config.activation, config.norm_after_activation) == ("gelu", True)


def test_settings_of_goals_are_those_of_the_published_agent():
    options = bench_ogbench._options(["--tasks", "goals", "--layers", "3"])
    config = bench_ogbench.configure(options, bench_ogbench.GOAL_SETTINGS)
    assert (config.updates, config.hidden, config.batch_size) == (1_000_000, (512,) * 3, 1024)
    assert (config.expectile, config.discount) == (0.9, 0.99)
    assert (config.actor_objective, config.bc_weight) == ("ddpg_bc", 0.0015)  # alpha / 2
    assert (config.critic_lr, config.value_lr, config.actor_lr) == (3e-4, 3e-4, 3e-4)
    assert (config.layer_norm, config.activation, config.polyak) == (True, "gelu", 0.005)


def test_a_comparison_with_chunks_has_the_same_batches_for_all_methods():
    assert bench_ogbench._options([]).methods == ["cloning", "IQL", "IQL+DDPG+BC", "IFQL"]
    options = bench_ogbench._options
    assert bench_ogbench.batches_of(options(["--methods", "IQL", "IFQL"])) == "own"
    assert bench_ogbench.batches_of(options(["--tasks", "goals"])) == "shared"
    compared = options(["--methods", "IFQL", "IFQL, chunks of 5", "--draw", "v0"])
    assert bench_ogbench.batches_of(compared) == "shared"
    differences = bench_ogbench.differences(compared)
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
    references = ["the dataset", "IQL, published", "IFQL, published"]
    variants = [*references, *bench_ogbench.METHODS]
    assert list(dict.fromkeys(row["variant"] for row in record["rows"])) == variants
    for method in bench_ogbench.METHODS:
        of_method = [r for r in record["rows"] if r["variant"] == method]
        points = [(r["seed"], r["updates"]) for r in of_method]
        assert sorted(points) == [(0, 2), (0, 4), (1, 2), (1, 4)]
    assert "updates: 4, not 1,000,000" in record["differences"]
    out = capsys.readouterr().out
    assert "cube-single, IQL, published" in out
    assert "Interquartile" in out or "interquartile mean" in out


@pytest.mark.slow
def test_a_small_run_of_goals(tmp_path, monkeypatch, capsys):
    needs("ogbench")
    monkeypatch.setenv("OGBENCH_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(make_ogbench, "ROWS", 21)
    numbers = {"seeds": 2, "updates": 4, "points": 2, "width": 8, "layers": 1, "batch-size": 8,
               "episodes": 1, "made-episodes": 2}  # fmt: skip
    options = ["--tasks", "goals", "--result", "trial", f"--output={tmp_path}"]
    options += [f"--{name}={number}" for name, number in numbers.items()]
    bench_ogbench.main(options)
    found = json.loads((tmp_path / "trial.json").read_text())["rows"]
    assert [row["goal"] for row in found] == [1, 2, 3, 4, 5, "all"] * 4
    assert [row["updates"] for row in found] == [2] * 12 + [4] * 12
    assert "goal-conditioned IQL, 5" in capsys.readouterr().out
