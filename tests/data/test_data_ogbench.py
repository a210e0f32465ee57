"""OGBench's single-task data: against its own loader, and numbers written by hand."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from iql_torchrl import DatasetError, IQLConfig, evaluate, load_dataset, make_agent
from iql_torchrl.data.readers.ogbench import parse_name

ogbench = pytest.importorskip("ogbench")

CUBE = "ogbench/cube-single-play-singletask-task2-v0"
IDS = (
    CUBE,
    "ogbench/scene-play-singletask-task3-v0",
    "ogbench/puzzle-3x3-play-singletask-task1-v0",
    "ogbench/puzzle-4x4-play-singletask-task3-v0",
    "ogbench/pointmaze-medium-navigate-singletask-task1-v0",
)
GOAL = np.array([0.50, 0.0, 0.02])  # of the cube in task 2, in metres: ``CubeEnv.set_tasks``


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OGBENCH_DATASETS_PATH", str(tmp_path))
    return tmp_path


def env_of(source: str) -> Any:
    env = ogbench.make_env_and_datasets(source.removeprefix("ogbench/"), env_only=True)
    env.reset(seed=0)
    return env


def raw_rows(observation: int, action: int, trajectories: int = 2, steps: int = 3) -> dict:
    """OGBench's raw columns: ``steps`` transitions and one last observation a trajectory."""
    rows = trajectories * (steps + 1)
    generator = np.random.default_rng(0)
    return {
        "observations": generator.normal(size=(rows, observation)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (rows, action)).astype(np.float32),
        "terminals": np.arange(rows) % (steps + 1) == steps,
        "qpos": np.zeros((rows, 40), np.float32),
        "qvel": np.zeros((rows, 40), np.float32),
    }


def write(folder: Path, source: str, rows: dict) -> Path:
    path = folder / f"{parse_name(source)[1]}.npz"
    np.savez(path, **rows)
    return path


def flag(dataset: Any, name: str) -> list[int]:
    return dataset.transitions["next", name].flatten().nonzero().flatten().tolist()


def cube_rows() -> dict:
    """The cube is at the goal in row 1, in its last step (row 6) and in both last rows."""
    rows = raw_rows(28, 5)
    rows["qpos"][[1, 3, 6, 7], 14:17] = GOAL
    rows["qpos"][1, 15] += 0.039  # within 4 cm
    rows["qpos"][2, 14:17] = GOAL + np.array([0, 0.041, 0])  # outside
    return rows


def test_rewards_masks_and_successors_by_hand(folder):
    write(folder, CUBE, rows := cube_rows())
    dataset = load_dataset(CUBE)
    table = dataset.transitions
    assert table["next", "reward"].flatten().tolist() == [-1, 0, -1, -1, -1, 0]
    assert flag(dataset, "terminated") == [1, 5]
    assert flag(dataset, "truncated") == [2]
    assert dataset.episode_lengths.tolist() == [3, 3]
    assert dataset.episode_returns.tolist() == [-2, -2]
    kept = [0, 1, 2, 4, 5, 6]
    np.testing.assert_array_equal(table["observation"], rows["observations"][kept])
    np.testing.assert_array_equal(
        table["next", "observation"], rows["observations"][[k + 1 for k in kept]]
    )
    np.testing.assert_array_equal(table["action"], rows["actions"][kept])
    options = {"memmap": folder / "table"}
    assert load_dataset(CUBE, **options).episode_returns.tolist() == [-2, -2]
    rows["qpos"][:] = 0
    write(folder, CUBE, rows)  # a changed file is read again
    assert load_dataset(CUBE, **options).episode_returns.tolist() == [-3, -3]


def partly_done(source: str, rows: dict) -> None:
    """States with some parts of the task done in some rows, and all of them in row 1."""
    env = env_of(source).unwrapped
    count = len(rows["terminals"])
    generator = np.random.default_rng(1)
    if "maze" in source:
        distances = generator.uniform(0, 4, count)
        distances[1] = 0
        rows["qpos"][:, :2] = env.cur_goal_xy + distances[:, None] * [0, 1]
        return
    if "cube" in source or "scene" in source:
        shift = generator.choice([0.0, 0.03, 0.05], (count, 1)) * [1, 0, 0]
        shift[1] = 0
        rows["qpos"][:, 14:17] = env._data.mocap_pos[0] + shift
    if "cube" not in source:
        target = env._target_button_states
        wrong = generator.random((count, len(target))) < 0.5
        wrong[1] = False
        rows["button_states"] = np.where(wrong, 1 - target, target).astype(np.int64)
    if "scene" in source:
        rows["qpos"][:, 23] = env._target_drawer_pos + 0.1 * (np.arange(count) % 3 == 2)
        rows["qpos"][:, 24] = env._target_window_pos


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")
@pytest.mark.parametrize(
    "source", [IDS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in IDS[1:])]
)
def test_transitions_are_those_of_ogbenchs_own_loader(folder, source):
    env = env_of(source)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    rows = raw_rows(*sizes, trajectories=3, steps=9)
    partly_done(source, rows)
    path = write(folder, source, rows)
    shutil.copy(path, path.with_name(f"{path.stem}-val.npz"))  # which OGBench's loader reads too
    expected, _ = ogbench.make_env_and_datasets(
        source.removeprefix("ogbench/"), dataset_path=str(path), dataset_only=True, cur_env=env
    )
    dataset = load_dataset(source)
    table = dataset.transitions
    for key, column in (
        ("observation", "observations"),
        ("action", "actions"),
        (("next", "observation"), "next_observations"),
    ):
        np.testing.assert_array_equal(table[key], expected[column])
    np.testing.assert_array_equal(table["next", "reward"].flatten(), expected["rewards"])
    np.testing.assert_array_equal(~table["next", "terminated"].flatten(), expected["masks"])
    assert 0 < expected["masks"].sum() < len(expected["masks"])
    assert dataset.episode_lengths.tolist() == [9, 9, 9]
    assert flag(dataset, "done")[-1] == 26


def test_the_environment_is_the_task_and_evaluations_report_success(folder):
    write(folder, CUBE, cube_rows())
    dataset = load_dataset(CUBE, memmap=folder / "table")
    assert (
        load_dataset(CUBE, memmap=folder / "table").make_env().spec.id == dataset.make_env().spec.id
    )
    env = dataset.make_env()
    assert env.spec.id == "cube-single-singletask-task2-v0"
    assert env.spec.max_episode_steps == 200
    env.reset(seed=0)
    np.testing.assert_allclose(env.unwrapped._data.mocap_pos, [GOAL])
    assert env.action_space is env.action_space
    env.close()
    policy = make_agent(IQLConfig(hidden=(8,)), dataset).policy
    result = evaluate(policy, dataset.make_env, episodes=2, num_envs=2, seed=0, max_steps=3)
    assert result.successes.tolist() == [False, False]
    assert result.returns.tolist() == [-3, -3]
    assert result.summary()["success_rate"] == 0


def test_a_cube_that_is_moved_to_its_goal_is_a_success(folder):
    """The data's reward and mask of a state are those that the environment gives for it."""
    write(folder, CUBE, cube_rows())
    env = load_dataset(CUBE).make_env()
    env.reset(seed=0)
    *_, info = env.step(np.zeros(5))
    assert not info["success"]
    env.unwrapped._data.joint("object_joint_0").qpos[:3] = GOAL
    env.step(np.zeros(5))  # computes the success that the next step reports
    _, reward, terminated, _, info = env.step(np.zeros(5))
    assert (reward, terminated, bool(info["success"])) == (0, True, True)
    env.close()


def test_the_environment_can_be_made_in_another_process_and_from_its_spec(folder):
    write(folder, CUBE, cube_rows())
    env = pickle.loads(pickle.dumps(load_dataset(CUBE).make_env))()
    again = gymnasium.make(env.spec)
    assert again.spec.id == env.spec.id
    assert again.spec.additional_wrappers == env.spec.additional_wrappers
    np.testing.assert_array_equal(again.reset(seed=3)[0], env.reset(seed=3)[0])
    env.close()
    again.close()


# ---- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "ogbench/cube-single-play-v0",
            "load_dataset('ogbench/cube-single-play-singletask-task1-v0')",
        ),
        ("ogbench/cube-single-play-local", "cube-single-play-singletask-task1-local'), or another"),
        ("ogbench/cube", "expected ogbench/ENVIRONMENT-KIND-singletask-taskN-v0"),
        ("ogbench/cube-ninefold-play-singletask-task1-v0", "no environment 'cube-ninefold-single"),
        (CUBE, 'ogbench.download_datasets(["cube-single-play-v0"], "{folder}")'),
        (CUBE, "python -m iql_torchrl.data make ogbench/cube-single-play-local"),
        (CUBE, "OGBENCH_DATASETS_PATH"),
        (CUBE.replace("v0", "local"), "Make it: python -m iql_torchrl.data make ogbench/cube"),
    ],
)
def test_what_is_missing_says_what_to_do(folder, source, words):
    with pytest.raises(DatasetError) as error:
        load_dataset(source)
    assert words.format(folder=folder) in str(error.value)


def test_raw_rows_say_that_a_task_is_to_be_named(folder):
    path = write(folder, CUBE, cube_rows())
    with pytest.raises(
        DatasetError, match=r"one single task \(OGBench: load_dataset\('ogbench/ENV"
    ):
        load_dataset(path)


def test_files_that_are_not_ogbenchs(folder):
    rows = cube_rows()
    path = write(folder, CUBE, {k: v for k, v in rows.items() if k != "qpos"})
    with pytest.raises(DatasetError, match="has no 'qpos' among actions, observations"):
        load_dataset(CUBE)
    write(folder, CUBE, {k: v for k, v in rows.items() if k != "terminals"})
    with pytest.raises(DatasetError, match="has no 'terminals' among"):
        load_dataset(CUBE)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match="not a complete npz archive"):
        load_dataset(CUBE)


def test_names():
    assert parse_name("ogbench/puzzle-4x4-play-singletask-task3-local") == (
        "puzzle-4x4-singletask-task3-v0",
        "puzzle-4x4-play-local",
    )
    assert parse_name("ogbench/scene-play-singletask-v0")[0] == "scene-singletask-v0"
