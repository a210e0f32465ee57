"""OGBench's single-task data: against its own loader, and numbers written by hand."""

import pickle
import shutil

import gymnasium
import numpy as np
import pytest
from extras import needs
from small_logs import counted, first, marked, refused, save

from iql_torchrl import IQLConfig, evaluate, load_dataset, make_agent

ogbench = needs("ogbench")

CUBE = "ogbench/cube-single-play-singletask-task2-v0"
MAZE = "ogbench/pointmaze-medium-navigate-singletask-task1-v0"  # which is made in milliseconds
IDS = (
    "ogbench/scene-play-singletask-task3-v0",
    "ogbench/puzzle-3x3-play-singletask-task1-v0",
    "ogbench/puzzle-4x4-play-singletask-task3-v0",
)
GOAL = np.array([0.50, 0.0, 0.02])  # of the cube in task 2, in metres: ``CubeEnv.set_tasks``
MAZE_GOAL = np.array([20.0, 20.0])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OGBENCH_DATASETS_PATH", str(tmp_path))
    return tmp_path


def raw_rows(observation, action, trajectories=2, steps=3):
    """OGBench's raw columns: ``steps`` transitions and one last observation a trajectory."""
    end = counted(*[steps + 1] * trajectories)["truncated"]
    generator = np.random.default_rng(0)
    return {
        "observations": generator.normal(size=(len(end), observation)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (len(end), action)).astype(np.float32),
        "terminals": end,
        "qpos": np.zeros((len(end), 40), np.float32),
        "qvel": np.zeros((len(end), 40), np.float32),
    }


def write(folder, source, rows):
    name = source.removeprefix("ogbench/")
    return save(folder / f"{name.split('-singletask')[0]}-v0.npz", rows)


def maze_rows():
    """The point is at the goal in row 1, in its last step (row 6) and in both last rows."""
    rows = raw_rows(2, 2)
    rows["qpos"][[1, 3, 6, 7], :2] = MAZE_GOAL
    return rows


def cube_rows():
    rows = raw_rows(28, 5)
    rows["qpos"][[1, 3, 6, 7], 14:17] = GOAL
    rows["qpos"][1, 15] += 0.039  # within 4 cm
    rows["qpos"][2, 14:17] = GOAL + np.array([0, 0.041, 0])  # outside
    return rows


@pytest.mark.parametrize(("source", "make"), [(MAZE, maze_rows), (CUBE, cube_rows)])
def test_rewards_masks_and_successors_by_hand(folder, source, make):
    write(folder, source, rows := make())
    options = {"memmap": folder / "table"}
    dataset = load_dataset(source, **options)
    assert first(dataset, ("next", "reward")) == [-1, 0, -1, -1, -1, 0]
    assert marked(dataset) == ([1, 5], [2])
    assert dataset.episode_lengths.tolist() == [3, 3]
    assert dataset.episode_returns.tolist() == [-2, -2]
    kept, table = np.array([0, 1, 2, 4, 5, 6]), dataset.transitions
    np.testing.assert_array_equal(table["observation"], rows["observations"][kept])
    np.testing.assert_array_equal(table["next", "observation"], rows["observations"][kept + 1])
    np.testing.assert_array_equal(table["action"], rows["actions"][kept])
    reused = load_dataset(source, **options)
    assert reused.episode_returns.tolist() == [-2, -2]
    assert reused.env.args == dataset.env.args  # its specification
    if source == MAZE:
        rows["qpos"][:] = 0
        write(folder, source, rows)  # a changed file is read again
        assert load_dataset(source, **options).episode_returns.tolist() == [-3, -3]


def partly_done(env, source, rows):
    """States with some parts of the task done in some rows, and all of them in row 1."""
    env, count = env.unwrapped, len(rows["terminals"])
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
    "source", [MAZE, *(pytest.param(name, marks=pytest.mark.slow) for name in (CUBE, *IDS))]
)
def test_transitions_are_those_of_ogbenchs_own_loader(folder, source):
    """And the environment is the task, whose rewards and successes are those of the data."""
    name = source.removeprefix("ogbench/")
    env = ogbench.make_env_and_datasets(name, env_only=True)
    env.reset(seed=0)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    rows = raw_rows(*sizes, trajectories=3, steps=9)
    partly_done(env, source, rows)
    path = write(folder, source, rows)
    shutil.copy(path, path.with_name(f"{path.stem}-val.npz"))  # which OGBench's loader reads too
    expected, _ = ogbench.make_env_and_datasets(
        name, dataset_path=str(path), dataset_only=True, cur_env=env
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
    assert table["next", "done"].flatten().nonzero()[-1].tolist() == [26]
    if source != CUBE:
        return
    env = dataset.make_env()
    assert env.spec.id == "cube-single-singletask-task2-v0"
    assert env.spec.max_episode_steps == 200
    assert env.action_space is env.action_space
    env.reset(seed=0)
    np.testing.assert_allclose(env.unwrapped._data.mocap_pos, [GOAL])
    *_, info = env.step(np.zeros(5))
    assert not info["success"]
    env.unwrapped._data.joint("object_joint_0").qpos[:3] = GOAL
    env.step(np.zeros(5))  # computes the success that the next step reports
    _, reward, terminated, _, info = env.step(np.zeros(5))
    assert (reward, terminated, bool(info["success"])) == (0, True, True)
    env.close()


def test_evaluations_report_success_and_other_processes_make_the_environment(folder):
    write(folder, MAZE, maze_rows())
    dataset = load_dataset(MAZE)
    policy = make_agent(IQLConfig(hidden=(8,)), dataset).policy
    result = evaluate(policy, dataset.make_env, episodes=2, num_envs=2, seed=0, max_steps=3)
    assert result.successes.tolist() == [False, False]
    assert result.returns.tolist() == [-3, -3]
    assert result.summary()["success_rate"] == 0
    env = pickle.loads(pickle.dumps(dataset.make_env))()
    again = gymnasium.make(env.spec)
    assert again.spec.id == env.spec.id
    assert again.spec.additional_wrappers == env.spec.additional_wrappers
    states = []
    for each in (env, again):
        np.random.seed(3)  # which this environment draws from
        states.append(each.reset(seed=3)[0])
    np.testing.assert_array_equal(*states)


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
        (
            CUBE,
            'ogbench.download_datasets(["cube-single-play-v0"], "{folder}")|OGBENCH_DATASETS_PATH|'
            "python benchmarks/make_ogbench.py cube-single-play-local",
        ),
        (CUBE.replace("v0", "local"), "Make it, in a clone|make_ogbench.py cube-single-play-local"),
        # without the number of a task
        ("ogbench/scene-play-singletask-v0", "there is no file {folder}/scene-play-v0.npz"),
    ],
)
def test_what_is_missing_says_what_to_do(folder, source, words):
    refused(words.replace("{folder}", str(folder)), source)


def test_files_that_are_not_ogbenchs(folder, monkeypatch):
    rows = maze_rows()
    for name in ("qpos", "terminals"):
        path = write(folder, MAZE, {k: v for k, v in rows.items() if k != name})
        refused(f"has no '{name}' among actions, observations", MAZE)
    write(folder, MAZE, rows | {"qpos": rows["qpos"][:, :0]})
    refused("the rewards of |cannot be computed|check that the file belongs", MAZE)
    path.write_bytes(path.read_bytes()[:100])
    refused("not a complete npz archive", MAZE)
    monkeypatch.setitem(__import__("sys").modules, "ogbench", None)
    refused('needs the package ogbench|pip install "iql_torchrl[ogbench]"', MAZE)
