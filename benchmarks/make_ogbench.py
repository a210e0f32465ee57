"""OGBench's data made on this machine with the scripted controllers of the package ``ogbench``.

    python benchmarks/make_ogbench.py cube-single-play-local --episodes 100

The protocol is that of OGBench's data (Park, Frans, Eysenbach, Levine 2025, appendix on datasets;
``data_gen_scripts`` of github.com/seohongpark/ogbench, commit 1d41409): manipulation of kind "play"
follows plans of the package's own oracles with smooth noise, and takes a new random task whenever
one is done; mazes of kind "navigate" follow the shortest path to random goals with Gaussian noise
of deviation 0.5. No trained weights are needed.

The rows are another random draw than the published ones, from other versions of the simulator, so
that their names end in ``-local``. The files have OGBench's columns and are in the folder
``OGBENCH_DATASETS_PATH`` (else ``~/.ogbench/data``); ``load_dataset`` reads them by the name that is
printed, with ``-singletask-taskN`` in place of ``-singletask`` for another task. An episode of 1,000
steps takes three to five seconds of one core (a maze: milliseconds); an interrupted call that is
repeated continues.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from iql_torchrl.data.builtin.recipes import Act, play
from iql_torchrl.data.readers.arrays import package
from iql_torchrl.data.readers.ogbench import PREFIX, ogbench_folder
from iql_torchrl.files import atomic_write, folder_lock

import gymnasium
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

Arrays: TypeAlias = dict[str, NDArray[Any]]
Cell: TypeAlias = tuple[int, int]

EPISODES = 1000  # of the published data for training
ROWS = 1001  # of an episode; the last one only has the observation after 1,000 steps
#: A plan's noise: its scale, and the deviation of the Gaussian that smooths it, in steps.
PLAN_NOISE, PLAN_SMOOTHING = 0.1, 0.5
MAZE_NOISE = 0.5
STACKING = 0.5  # probability that a scene's cube is to be stacked, where there are several
CUBE = slice(14, 17)  # position of a scene's cube in qpos, in metres
#: The states that an ``info`` has, and their dtypes in a file.
STATES = {"qpos": np.float32, "qvel": np.float32, "button_states": np.int64}


class OGBenchRecipe(NamedTuple):
    """How one dataset of OGBench is made again, in ``environment`` with further ``options``.

    ``episode(env, seed, number)`` gives the columns of one episode.
    """

    environment: str
    description: str
    episode: Callable[[Any, int, int], Arrays]
    options: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    names = "".join(f"\n{name}: {recipe.description}" for name, recipe in RECIPES.items())
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=f"{__doc__}{names}"
    )
    parser.add_argument("name", choices=sorted(RECIPES), metavar="NAME")
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    print(make_ogbench(options.name, episodes=options.episodes, seed=options.seed))


def ensure_ogbench(name: str, *, episodes: int = EPISODES) -> None:
    """Make the rows ``name`` with seed 0, unless their file exists."""
    if not ogbench_path(name).exists():
        make_ogbench(name, episodes=episodes)


def ogbench_path(name: str) -> Path:
    """The file of the rows ``name``, a key of ``RECIPES``."""
    return ogbench_folder() / f"{name}.npz"


def make_ogbench(
    name: str, *, episodes: int = EPISODES, seed: int = 0, progress: bool = True
) -> str:
    """Make the rows ``name`` (a key of ``RECIPES``), write their file; the id for ``load_dataset``.

    Each episode is written to a folder next to the file, completely or not at all. An interrupted
    call that is repeated with the same versions of the packages and of the simulator continues there;
    the result is the same. The folder is removed at the end. ``progress``: show a bar on standard
    error, if that is a terminal.

    Raises ``ValueError`` where the file exists, ``ImportError`` without the package ``ogbench``.
    """
    recipe, path = RECIPES[name], ogbench_path(name)
    if episodes < 1 or seed < 0:
        raise ValueError(f"expected episodes >= 1 and seed >= 0, got {episodes} and {seed}")
    if path.exists():
        raise ValueError(f"{path} already exists; delete it first")
    package("ogbench", f"making {name!r}", "ogbench")
    versions = {each: version(each) for each in ("ogbench", "mujoco", "numpy")}
    made_with = "-".join(f"{each}{number}" for each, number in versions.items())
    parts = path.with_name(f".making-{path.stem}-seed{seed}-{made_with}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(parts):
        if path.exists():
            raise ValueError(f"{path} was made by another process meanwhile")
        parts.mkdir(exist_ok=True)
        files = [parts / f"episode-{number:05d}.npz" for number in range(episodes)]
        with gymnasium.make(
            recipe.environment, terminate_at_goal=False, max_episode_steps=ROWS,
            disable_env_checker=True, **recipe.options,
        ) as env:  # fmt: skip
            for number in tqdm(
                range(episodes), desc=name, unit="episode", disable=None if progress else True
            ):
                if not files[number].exists():
                    _write(files[number], recipe.episode(env, seed, number))
        columns = {
            key: np.concatenate([np.load(file)[key] for file in files]) for key in np.load(files[0])
        }
        made = {"name": name, "seed": seed, "episodes": episodes, **versions}
        _write(path, {**columns, "made_with": np.array(json.dumps(made))})
        shutil.rmtree(parts)
    return f"{PREFIX}{name.removesuffix('-local')}-singletask-local"


def _write(path: Path, arrays: Arrays) -> None:
    # np.savez adds a suffix to a file name, but not to an open file.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def plan_episode(env: Any, seed: int, number: int) -> Arrays:
    """One episode of random tasks of the arm, each done by following a plan; row t is before action t.

    A scene's episode in which the cube leaves the area that the camera sees is drawn again.
    """
    for attempt in count():
        with _seeded([seed, number, attempt]) as reset_seed:
            controllers = _controllers(env)
            observation, info = env.reset(seed=reset_seed)
            act = _follow_plans(env.unwrapped, controllers, observation, info)
            rows = _columns(play(env, act, observation, info))
        if "scene" not in env.spec.id or _cube_is_visible(rows["qpos"]):
            break
    return rows


def _follow_plans(arm: Any, controllers: dict[str, Any], observation: Any, info: Any) -> Act:
    stacking = 0.0 if "single" in arm.spec.id else STACKING
    controller = controllers[info["privileged/target_task"]]
    controller.reset(observation, info)

    def act(observation: Any, info: Any) -> NDArray[Any]:
        nonlocal controller
        if controller.done:
            observed, details = arm.set_new_target(p_stack=stacking)
            controller = controllers[details["privileged/target_task"]]
            controller.reset(observed, details)
        return np.clip(controller.select_action(observation, info), -1.0, 1.0)

    return act


def _controllers(env: Any) -> dict[str, Any]:
    """OGBench's plan-following controller of each kind of task of ``env``."""
    kinds = {"cube": ("cube",), "puzzle": ("button",)}.get(
        env.spec.id.partition("-")[0], ("cube", "button", "drawer", "window")
    )
    options: dict[str, Any] = {"noise": PLAN_NOISE, "noise_smoothing": PLAN_SMOOTHING}
    if kinds == ("button",):
        options["gripper_always_closed"] = True
    made = {}
    for kind in kinds:
        module = import_module(f"ogbench.manipspace.oracles.plan.{kind}_plan")
        made[kind] = getattr(module, f"{kind.capitalize()}PlanOracle")(env=env, **options)
    return made


def _cube_is_visible(states: NDArray[Any]) -> bool:
    """Whether the cube is left of y = 0.29 m, and right of -0.3 m unless it lies in the drawer."""
    y, z = states[:, CUBE][:, 1], states[:, CUBE][:, 2]
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return bool((y < 0.29).all() and ((y > -0.3) | in_drawer).all())


def maze_episode(env: Any, seed: int, number: int) -> Arrays:
    """One episode of a point that goes to one random goal after another.

    Goals are random open cells that are no corridors. Action: the direction to the next cell of a
    shortest path, a vector of length 1, plus noise, clipped to [-1, 1].
    """
    maze = env.unwrapped
    cells = [(int(i), int(j)) for i, j in np.argwhere(maze.maze_map == 0)]
    goals = [cell for cell in cells if not _is_corridor(maze.maze_map, cell)]

    def act(_: Any, info: Mapping[str, Any]) -> NDArray[Any]:
        if info.get("success"):
            maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(_any_of(goals))))
        position = maze.get_xy()
        towards = maze.get_oracle_subgoal(position, maze.cur_goal_xy)[0] - position
        direction = towards / (np.linalg.norm(towards) + 1e-6)
        return np.clip(direction + np.random.normal(0, MAZE_NOISE, 2), -1.0, 1.0)

    with _seeded([seed, number]) as reset_seed:
        env.action_space.seed(reset_seed)  # a reset makes random steps before it sets the state
        task = {"init_ij": _any_of(cells), "goal_ij": _any_of(goals)}
        observation, _ = env.reset(seed=reset_seed, options={"task_info": task})
        return _columns(play(env, act, observation, {}))


def _is_corridor(maze_map: NDArray[Any], cell: Cell) -> bool:
    """Whether exactly two opposite neighbours are open."""
    i, j = cell
    vertical = (int(maze_map[i - 1, j]), int(maze_map[i + 1, j]))
    horizontal = (int(maze_map[i, j - 1]), int(maze_map[i, j + 1]))
    return (vertical, horizontal) in (((0, 0), (1, 1)), ((1, 1), (0, 0)))


def _any_of(cells: list[Cell]) -> Cell:
    return cells[np.random.randint(len(cells))]


def _columns(episode: dict[str, list[Any]]) -> Arrays:
    """The columns of a file; row t has the state before action t."""
    infos = episode["infos"]
    states = [name for name in STATES if f"prev_{name}" in infos[0]]
    return {
        "observations": np.array(episode["observations"][:-1], np.float32),
        "actions": np.array(episode["actions"], np.float32),
        "terminals": np.logical_or(episode["terminations"], episode["truncations"]),
        **{s: np.array([info[f"prev_{s}"] for info in infos], STATES[s]) for s in states},
    }


@contextmanager
def _seeded(entropy: list[int]) -> Iterator[int]:
    """A seed for ``env.reset``; inside, NumPy's global generator, which OGBench uses, is seeded.

    Its former state returns at the end.
    """
    reset_seed, global_seed = np.random.SeedSequence(entropy).generate_state(2)
    before = np.random.get_state()
    np.random.seed(global_seed)
    try:
        yield int(reset_seed >> 1)
    finally:
        np.random.set_state(before)


def _of_arm(environment: str, objects: str) -> OGBenchRecipe:
    what = (
        f"{environment}, a robot arm moves {objects} to random targets, one after the other, by "
        "OGBench's plan-following controllers with smooth noise (kind 'play')"
    )
    return OGBenchRecipe(environment, what, plan_episode, {"mode": "data_collection"})


def _of_maze(environment: str) -> OGBenchRecipe:
    what = (
        f"{environment}, a point follows shortest paths to random goals, one after the other, with "
        "Gaussian noise of deviation 0.5 (kind 'navigate')"
    )
    return OGBenchRecipe(environment, what, maze_episode, {})


#: Name of the rows to recipe.
RECIPES: Mapping[str, OGBenchRecipe] = {
    "cube-single-play-local": _of_arm("cube-single-v0", "a cube"),
    "scene-play-local": _of_arm("scene-v0", "a cube, two buttons, a drawer and a window"),
    "puzzle-3x3-play-local": _of_arm("puzzle-3x3-v0", "the 9 buttons of a puzzle"),
    "puzzle-4x4-play-local": _of_arm("puzzle-4x4-v0", "the 16 buttons of a puzzle"),
    "pointmaze-medium-navigate-local": _of_maze("pointmaze-medium-v0"),
    "pointmaze-large-navigate-local": _of_maze("pointmaze-large-v0"),
}


if __name__ == "__main__":
    main()
