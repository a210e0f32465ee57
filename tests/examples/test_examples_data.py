"""The sepsis and maze examples: the maze's relabelled log by hand, and runs with tiny settings."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_scripts import load, run, table
from extras import needs

from iql_torchrl import load_dataset
from iql_torchrl.data.builtin import make_dataset

SEPSIS, MAZE = "icu-sepsis/clinician-v0", "pointmaze/umaze-v0"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        yield folder


def test_sepsis_example(root, empty_folder, monkeypatch, capsys):
    needs("icu_sepsis")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    make_dataset(SEPSIS, episodes=30, progress=False)
    assert run("iql_sepsis", "--updates", 2) == 0
    out = capsys.readouterr().out
    for row in ("random treatments +0.7801", "clinicians +0.7820", "optimum +0.8751"):
        assert re.search(row, out)
    history = table("runs/sepsis/metrics.csv")
    assert [row["update"] for row in history if row["survival"]] == ["0", "1", "2"]
    assert all(0.5 < float(row["survival"]) < 0.8751 for row in history)
    assert Path("runs/sepsis/curves.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("name", "module"), [("iql_sepsis", "icu_sepsis"), ("iql_pointmaze", "gymnasium_robotics")]
)
def test_a_missing_package_is_one_sentence(monkeypatch, capsys, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(name) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert 'pip install "iql_torchrl[datasets]"' in printed


@pytest.fixture(scope="module")
def maze_log(root):
    needs("gymnasium_robotics")
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
    env.unwrapped.point_env.set_state(np.array([-1.0, -1.0]), np.zeros(2))
    *_, reward, terminated, truncated, _ = env.step(np.zeros(2, np.float32))
    assert (reward, terminated, truncated) == (1.0, True, False)
    env.close()


def test_maze_example(maze_log, capsys):
    assert run("iql_pointmaze", "--updates", 2, "--episodes", 2) == 0
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["dataset", "cloning", "IQL"]
    assert all(re.search(r" \d+%  ", row) for row in rows)
