"""``benchmarks/make_ogbench.py``: columns, seeds, and continuing after an interruption."""

import json

import gymnasium
import make_ogbench
import numpy as np
import pytest
from extras import needs

from iql_torchrl import load_dataset

needs("ogbench")
CUBE = "cube-single-play-local"
MAZE = "pointmaze-medium-navigate-local"
ROWS = 41


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OGBENCH_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(make_ogbench, "ROWS", ROWS)
    return tmp_path


def columns(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize(
    "name",
    [
        name if "cube" in name or "3x3" in name else pytest.param(name, marks=pytest.mark.slow)
        for name in make_ogbench.RECIPES
    ],
)
def test_two_episodes_have_ogbenchs_columns_load_and_replay(folder, name):
    source = make_ogbench.make_ogbench(name, episodes=2)
    assert source == f"ogbench/{name[: -len('-local')]}-singletask-local"
    assert [path.name for path in folder.iterdir()] == [f"{name}.npz"]
    rows = columns(folder, name)
    assert rows["terminals"].nonzero()[0].tolist() == [ROWS - 1, 2 * ROWS - 1]
    assert {rows[key].dtype for key in ("observations", "actions", "qpos")} == {np.dtype("f4")}
    assert ("button_states" in rows) == ("scene" in name or "puzzle" in name)
    made = json.loads(str(rows["made_with"]))
    assert (made["seed"], made["episodes"], made["name"]) == (0, 2, name)
    dataset = load_dataset(source)
    assert dataset.episode_lengths.tolist() == [ROWS - 1, ROWS - 1]
    assert dataset.observation_space.shape == rows["observations"].shape[1:]
    assert float(dataset.transitions["action"].std()) > 0.1
    make_ogbench.ensure_ogbench(name)
    with pytest.raises(ValueError, match="already exists"):
        make_ogbench.make_ogbench(name)
    if name != CUBE:
        return
    # from each recorded state the recorded action leads near the next one (rows are float32, and
    # the solver's warm start is not recorded)
    recipe = make_ogbench.RECIPES[CUBE]
    options = {"max_episode_steps": ROWS, "disable_env_checker": True, **recipe.options}
    with gymnasium.make(recipe.environment, terminate_at_goal=False, **options) as env:
        env.reset(seed=0)
        for row in range(0, ROWS - 1, 8):
            env.unwrapped.set_state(*(rows[key][row].astype(float) for key in ("qpos", "qvel")))
            observation, *_ = env.step(rows["actions"][row])
            following = rows["observations"][row + 1, :6]
            np.testing.assert_allclose(observation[:6], following, atol=0.02)
        # an episode depends on the seed and its number only
        before = np.random.get_state()[1].copy()
        alone, other = recipe.episode(env, 0, 1), recipe.episode(env, 1, 1)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    for key in alone:
        np.testing.assert_array_equal(rows[key][ROWS:], alone[key])
    assert not np.array_equal(alone["qpos"], other["qpos"])


def test_an_interrupted_call_continues_with_the_same_versions_only(folder, monkeypatch, capsys):
    made, recipe = [], make_ogbench.RECIPES[MAZE]

    def interrupted(env, seed, number):
        if number == 2 and 2 not in made:
            made.append(number)
            raise KeyboardInterrupt
        made.append(number)
        return recipe.episode(env, seed, number)

    make_ogbench.main([MAZE, "--episodes", "3", "--seed", "3"])
    assert capsys.readouterr() == ("ogbench/pointmaze-medium-navigate-singletask-local\n", "")
    whole = columns(folder, MAZE)
    assert json.loads(str(whole["made_with"]))["seed"] == 3
    (folder / f"{MAZE}.npz").unlink()
    monkeypatch.setattr(make_ogbench, "RECIPES", {MAZE: recipe._replace(episode=interrupted)})
    with pytest.raises(KeyboardInterrupt):
        make_ogbench.make_ogbench(MAZE, episodes=3, seed=3)
    (parts,) = (path for path in folder.iterdir() if path.is_dir())
    assert sorted(path.name for path in parts.iterdir()) == [
        "episode-00000.npz", "episode-00001.npz",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(make_ogbench, "version", lambda package: "1.0")
        make_ogbench.make_ogbench(MAZE, episodes=1, seed=3)
    (folder / f"{MAZE}.npz").unlink()
    make_ogbench.make_ogbench(MAZE, episodes=3, seed=3)
    assert made == [0, 1, 2, 0, 2], "another version begins again"
    again = columns(folder, MAZE)
    assert again.keys() == whole.keys()
    for key in whole:
        np.testing.assert_array_equal(again[key], whole[key])


def test_what_is_no_corridor():
    maze = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
    corridors = [
        cell for cell in map(tuple, np.argwhere(maze == 0)) if make_ogbench._is_corridor(maze, cell)
    ]
    assert corridors == [(1, 2)]  # a dead end and a corner are none


@pytest.mark.parametrize(
    ("y", "z", "visible"),
    [(0.0, 0.02, True), (0.3, 0.02, False), (-0.31, 0.02, False), (-0.31, 0.07, True)],
)
def test_where_a_scenes_cube_is_visible(y, z, visible):
    states = np.zeros((3, 25))
    states[1, 15:17] = y, z
    assert make_ogbench._cube_is_visible(states) is visible
