"""``benchmarks/d4rl_maze2d.py``: the simulation, the controller and the rows of the dataset."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from extras import needs

FORWARD = np.array([1.0, 0.0], np.float32)


@pytest.fixture(scope="module")
def maze2d():
    needs("mujoco")
    return importlib.import_module("d4rl_maze2d")


def placed(maze2d, position, velocity=(0.0, 0.0)):
    env = maze2d.Maze2d("umaze")
    env.reset(seed=0)
    env.data.qpos[:], env.data.qvel[:] = position, velocity
    return env


def test_a_step_is_that_of_the_equations_of_motion(maze2d):
    env = placed(maze2d, (3.0, 2.0), (0.0, 9.0))
    observation, reward, terminated, truncated, _ = env.step(FORWARD)
    mass = 4 / 3 * np.pi * 0.1**3 * 1000
    # Euler's step of 0.01 s, implicit in the damping of 1; velocities above 5 are clipped before it
    velocity = (mass * np.array([0.0, 5.0]) + 0.01 * np.array([100.0, 0.0])) / (mass + 0.01)
    expected = np.concatenate([np.array([3.0, 2.0]) + 0.01 * velocity, velocity])
    np.testing.assert_allclose(observation, expected, rtol=1e-5)
    assert (reward, terminated, truncated) == (0.0, False, False)


def test_the_walls_are_where_those_of_d4rl_are(maze2d):
    # wall of column 0: from 0.5 to 1.5 in the world; radius 0.1; coordinate = world - 1.2
    env = placed(maze2d, (1.0, 1.0))
    for _ in range(100):
        observation, *_ = env.step(np.array([0.0, -1.0], np.float32))
    assert observation[1] == pytest.approx(0.4, abs=0.03)


def test_reward_within_half_a_cell_of_the_goal_and_a_limit_of_300_steps(maze2d):
    env = placed(maze2d, (1.0, 1.49))
    rewards = [env.step(np.zeros(2, np.float32))[1]]
    env.data.qpos[:] = (1.0, 1.51)
    steps = [env.step(np.zeros(2, np.float32)) for _ in range(299)]
    assert rewards + [step[1] for step in steps] == [1.0] + [0.0] * 299
    assert [step[3] for step in steps] == [False] * 298 + [True]


def test_the_controller_takes_the_only_way(maze2d):
    env = placed(maze2d, (3.0, 1.0))
    controller = maze2d.Controller(env.cells, np.random.default_rng(0))
    controller.plan(np.array([3.0, 1.0]), np.array([1.0, 1.0]))
    way = np.array(controller.way)
    cells = np.array([(3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)])
    assert ((cells - way >= 0) & (cells - way <= 0.2)).all()
    assert way[-1].tolist() == [1.0, 1.0]
    done = False
    for _ in range(300):
        force, done = controller.act(env.state(), np.array([1.04, 0.96]))
        if done:
            break
        env.simulate(force)
    assert done
    assert np.linalg.norm(env.data.qpos - 1.0) < 0.1


def test_the_rows_are_those_between_two_targets(maze2d, tmp_path):
    path = tmp_path / "log.npz"
    maze2d.main(["umaze", str(path), "--steps", "2000"])
    with np.load(path) as table:
        rows = dict(table)
    ends = rows["truncated"]
    assert not rows["terminated"].any()
    # the observation at a target is repeated, and its row is left out, so all others join
    np.testing.assert_array_equal(rows["next_observation"][:-1], rows["observation"][1:])
    distance = np.linalg.norm(rows["observation"][:, :2] - 1.0, axis=1)
    np.testing.assert_array_equal(rows["reward"], distance <= 0.5)
    assert np.abs(rows["action"]).max() <= 1.0
    # the controller ends within 0.1 of a cell's coordinates
    reached = rows["next_observation"][ends][:-1, :2]
    assert (np.linalg.norm(reached - reached.round(), axis=1) < 0.1).all()
    assert len(reached) >= 10
