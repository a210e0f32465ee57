"""The sepsis and maze examples: their mathematics by hand, and runs with tiny settings."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from example_scripts import load, run, table
from tensordict import TensorDict

from iql_torchrl import IQLConfig, load_dataset
from iql_torchrl.data.builtin import make_dataset

SEPSIS, MAZE = "icu-sepsis/clinician-v0", "pointmaze/umaze-v0"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        yield folder


# ---- tabular IQL ---------------------------------------------------------------------------


def steps(*rows):
    """``(state, action, reward, next state, terminated)`` as a table."""
    state, action, reward, following, ended = (torch.tensor(c) for c in zip(*rows, strict=True))
    return TensorDict(
        {
            "observation": state,
            "action": action,
            "next": {
                "observation": following,
                "reward": reward.float().unsqueeze(-1),
                "terminated": ended.unsqueeze(-1),
            },
        },
        batch_size=[len(rows)],
    )


LOG = steps(
    # State 1, treatment 0: 4 or 0, so Q = 2; treatment 1: Q = 0.
    (1, 0, 4, 2, True), (1, 0, 0, 2, True), (1, 1, 0, 2, True), (1, 1, 0, 2, True),
    # State 0, treatment 0 leads to state 1; treatment 1 ends with 1, thrice.
    (0, 0, 0, 1, False), (0, 1, 1, 2, True), (0, 1, 1, 2, True), (0, 1, 1, 2, True),
)  # fmt: skip
ADMISSIBLE = np.array([[True, True], [True, True], [True, False]])
CONFIG = IQLConfig(expectile=0.75, discount=0.5, temperature=2.0)


def test_tabular_iql_by_hand():
    result = load("iql_sepsis").tabular_iql(LOG, ADMISSIBLE, CONFIG)
    # V(1): 0.75 * 2 (2 - V) = 0.25 * 2 (V - 0), so 1.5; then Q(0, 0) = 0.5 * 1.5.
    # V(0): 0.75 * 3 (1 - V) = 0.25 * 1 (V - 0.75), so 0.975.
    np.testing.assert_allclose(result.value, [0.975, 1.5, 0.0], atol=1e-9)
    np.testing.assert_allclose(result.qvalue, [[0.75, 1.0], [2.0, 0.0], [0.0, 0.0]], atol=1e-9)
    first = [math.exp(2 * (0.75 - 0.975)), 3 * math.exp(2 * (1 - 0.975))]
    second = [math.exp(2 * 0.5), math.exp(2 * -1.5)]
    expected = [np.divide(w, sum(w)) for w in (first, second)]
    np.testing.assert_allclose(result.policy, [*expected, [1.0, 0.0]], atol=1e-9)


def test_tabular_iql_at_its_extremes():
    tabular_iql = load("iql_sepsis").tabular_iql
    cloned = tabular_iql(LOG, ADMISSIBLE, replace(CONFIG, temperature=0.0))
    np.testing.assert_allclose(cloned.policy, [[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    capped = tabular_iql(LOG, ADMISSIBLE, replace(CONFIG, max_weight=1.0))
    worse = math.exp(-3.0)
    np.testing.assert_allclose(capped.policy[1], np.divide([1.0, worse], 1 + worse))
    mean = tabular_iql(LOG, ADMISSIBLE, replace(CONFIG, expectile=0.5))
    # V(1) = 1 and Q(0, 0) = 0.5, one step in four.
    np.testing.assert_allclose(mean.value, [(0.5 + 3.0) / 4, 1.0, 0.0], atol=1e-9)
    greedy = tabular_iql(LOG, ADMISSIBLE, replace(CONFIG, temperature=1e6))
    assert np.isfinite(greedy.policy).all()
    assert greedy.policy[1, 0] == 1.0


# ---- sepsis --------------------------------------------------------------------------------


def test_sepsis_example(root, tmp_path, capsys):
    pytest.importorskip("icu_sepsis")
    make_dataset(SEPSIS, episodes=30, progress=False)
    assert run("iql_sepsis", "--updates", 2, "--output", tmp_path) == 0
    out = capsys.readouterr().out
    for row in ("random treatments +0.7801", "clinicians +0.7820", "optimum +0.8751"):
        assert re.search(row, out)
    history = table(tmp_path / "sepsis-seed0" / "metrics.csv")
    assert [row["update"] for row in history] == ["0", "1", "2"]
    assert all(0.5 < float(row["survival"]) < 0.8751 for row in history)
    assert (tmp_path / "sepsis-seed0" / "survival.png").stat().st_size > 5_000
    assert run("iql_sepsis", "--temperature", -1) == 2
    assert "temperature is -1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "module"), [("iql_sepsis", "icu_sepsis"), ("iql_pointmaze", "gymnasium_robotics")]
)
def test_a_missing_package_is_one_sentence(monkeypatch, capsys, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(name) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert 'pip install "iql_torchrl[datasets]"' in printed


# ---- the maze ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maze_log(root):
    pytest.importorskip("gymnasium_robotics")
    return load_dataset(make_dataset(MAZE, episodes=25, progress=False))


def test_the_fixed_goal_rewards_and_drops(maze_log, capsys):
    data, fared = load("iql_pointmaze").fixed_goal(maze_log, "umaze")
    rows, start, goal = data.transitions, torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, -1.0])
    before, after = (r["observation"][:, :2] for r in (rows, rows["next"]))
    norm = torch.linalg.vector_norm
    there = norm(after - goal, dim=1) <= 0.45
    assert torch.equal(rows["next", "reward"].squeeze(-1), there.float() - 1.0)
    assert torch.equal(rows["next", "terminated"].squeeze(-1), there)
    assert there.any()
    assert (norm(before - goal, dim=1) > 0.45).all()
    # Within an episode each row continues the one before; none passes both start and goal.
    episode = rows["collector", "traj_ids"]
    same = episode[1:] == episode[:-1]
    assert torch.equal(after[:-1][same], before[1:][same])
    near = [set(episode[norm(after - at, dim=1) <= 1.0].tolist()) for at in (start, goal)]
    assert near[0]
    assert near[1]
    assert not near[0] & near[1]
    assert re.fullmatch(r"dropped [1-9]\d* of \d+ drives.*\n", capsys.readouterr().out)
    assert 0 < fared["reached"] < 1
    assert 0 < fared["steps"] < 300


def test_the_fixed_goal_environment(maze_log):
    data, _ = load("iql_pointmaze").fixed_goal(maze_log, "umaze")
    env, starts = data.make_env(), []
    for seed in (0, 1):
        observation, _ = env.reset(seed=seed)
        assert observation.shape == (4,)
        assert env.unwrapped.goal.tolist() == [-1.0, -1.0]
        starts.append(observation[:2])
    assert np.abs(np.array(starts) - [-1.0, 1.0]).max() <= 0.25 + 1e-6
    assert not np.array_equal(*starts)
    env.step(np.zeros(2, np.float32))
    assert [len(path) for path in env.paths] == [1, 2]
    env.unwrapped.point_env.set_state(np.array([-1.0, -1.0]), np.zeros(2))
    *_, reward, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
    assert (reward, terminated, truncated) == (1.0, True, False)
    env.close()


@pytest.mark.parametrize("task", ["fixed", "random"])
def test_maze_example(maze_log, tmp_path, capsys, task):
    arguments = ["--updates", 2, "--episodes", 2, "--task", task, "--output", tmp_path]
    assert run("iql_pointmaze", *arguments) == 0
    out = capsys.readouterr().out
    assert "cloning" in out
    assert "IQL" in out
    folder = tmp_path / f"pointmaze-umaze-{task}-seed0"
    assert [row["method"] for row in table(folder / "metrics.csv")] == ["log", "cloning", "IQL"]
    assert (folder / "paths.png").exists() is (task == "fixed")
