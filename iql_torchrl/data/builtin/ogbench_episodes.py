"""Episodes of OGBench's scripted controllers: an arm that moves objects, a point in a maze.

The protocol is that of OGBench's data (Park, Frans, Eysenbach, Levine 2025, appendix on datasets;
``data_gen_scripts`` of github.com/seohongpark/ogbench, commit 1d41409): manipulation of kind "play"
follows plans of the package's own oracles with smooth noise, and takes a new random task whenever
one is done; mazes of kind "navigate" follow the shortest path to random goals with Gaussian noise
of deviation 0.5. No trained weights are needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrays", "maze_episode", "plan_episode"]

Arrays: TypeAlias = dict[str, NDArray[Any]]
Cell: TypeAlias = tuple[int, int]

#: A plan's noise: its scale, and the deviation of the Gaussian that smooths it, in steps.
PLAN_NOISE, PLAN_SMOOTHING = 0.1, 0.5
MAZE_NOISE = 0.5
STACKING = 0.5  # probability that a scene's cube is to be stacked, where there are several
#: The columns of a file and their dtypes.
DTYPES = {
    "observations": np.float32,
    "actions": np.float32,
    "terminals": np.bool_,
    "qpos": np.float32,
    "qvel": np.float32,
    "button_states": np.int64,
}
CUBE = slice(14, 17)  # position of a scene's cube in qpos, in metres


def plan_episode(env: Any, seed: int, number: int) -> Arrays:
    """One episode of random tasks of the arm, each done by following a plan.

    ``env``: made with ``mode="data_collection"``. Row t has the state before action t. The same
    ``seed`` and ``number`` give the same rows. A scene's episode in which the cube leaves the area
    that the camera sees is drawn again, as in OGBench.
    """
    attempt = 0
    while True:
        rows = _plan_attempt(env, [seed, number, attempt])
        if "scene" not in env.spec.id or _cube_is_visible(rows["qpos"]):
            return rows
        attempt += 1


def _plan_attempt(env: Any, entropy: list[int]) -> Arrays:
    stacking = 0.0 if "single" in env.spec.id else STACKING
    rows: dict[str, list[Any]] = defaultdict(list)
    with _seeded(entropy) as reset_seed:
        controllers = _controllers(env)
        observation, info = env.reset(seed=reset_seed)
        controller = controllers[info["privileged/target_task"]]
        controller.reset(observation, info)
        over = False
        while not over:
            action = np.clip(controller.select_action(observation, info), -1.0, 1.0)
            following, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
            if controller.done:
                observed, details = env.unwrapped.set_new_target(p_stack=stacking)
                controller = controllers[details["privileged/target_task"]]
                controller.reset(observed, details)
            _add(rows, observation, action, over, info)
            observation = following
    return _arrays(rows)


def _controllers(env: Any) -> dict[str, Any]:
    """OGBench's plan-following controller of each kind of task of ``env``."""
    kinds = {"cube": ("cube",), "puzzle": ("button",)}.get(
        env.spec.id.partition("-")[0], ("cube", "button", "drawer", "window")
    )
    made = {}
    for kind in kinds:
        module = import_module(f"ogbench.manipspace.oracles.plan.{kind}_plan")
        options: dict[str, Any] = {"noise": PLAN_NOISE, "noise_smoothing": PLAN_SMOOTHING}
        if kinds == ("button",):
            options["gripper_always_closed"] = True
        made[kind] = getattr(module, f"{kind.capitalize()}PlanOracle")(env=env, **options)
    return made


def _cube_is_visible(states: NDArray[Any]) -> bool:
    """Whether the cube is left of y = 0.29 m, and right of -0.3 m unless it lies in the drawer."""
    y, z = states[:, CUBE][:, 1], states[:, CUBE][:, 2]
    in_drawer = (z >= 0.06) & (z <= 0.08)
    return bool((y < 0.29).all() and ((y > -0.3) | in_drawer).all())


def maze_episode(env: Any, seed: int, number: int) -> Arrays:
    """One episode of a point that goes to one random goal after another.

    The start is a random open cell and goals are random open cells that are no corridors. Action:
    the direction to the next cell of a shortest path (``get_oracle_subgoal``), a vector of length 1,
    plus noise, clipped to [-1, 1]. The same ``seed`` and ``number`` give the same rows.
    """
    maze = env.unwrapped
    cells = [(int(i), int(j)) for i, j in np.argwhere(maze.maze_map == 0)]
    goals = [cell for cell in cells if not _is_corridor(maze.maze_map, cell)]
    rows: dict[str, list[Any]] = defaultdict(list)
    with _seeded([seed, number]) as reset_seed:
        env.action_space.seed(reset_seed)  # a reset makes random steps before it sets the state
        task = {"init_ij": _any_of(cells), "goal_ij": _any_of(goals)}
        observation, _ = env.reset(seed=reset_seed, options={"task_info": task})
        over = False
        while not over:
            position = maze.get_xy()
            towards = maze.get_oracle_subgoal(position, maze.cur_goal_xy)[0] - position
            direction = towards / (np.linalg.norm(towards) + 1e-6)
            action = np.clip(direction + np.random.normal(0, MAZE_NOISE, 2), -1.0, 1.0)
            following, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
            if info["success"]:
                maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(_any_of(goals))))
            _add(rows, observation, action, over, info)
            observation = following
    return _arrays(rows)


def _is_corridor(maze_map: NDArray[Any], cell: Cell) -> bool:
    """Whether exactly two opposite neighbours are open."""
    i, j = cell
    vertical = (int(maze_map[i - 1, j]), int(maze_map[i + 1, j]))
    horizontal = (int(maze_map[i, j - 1]), int(maze_map[i, j + 1]))
    return (vertical, horizontal) in (((0, 0), (1, 1)), ((1, 1), (0, 0)))


def _any_of(cells: list[Cell]) -> Cell:
    return cells[np.random.randint(len(cells))]


def _add(
    rows: dict[str, list[Any]], observation: Any, action: Any, over: bool, info: Mapping[str, Any]
) -> None:
    states = {name: info[f"prev_{name}"] for name in ("qpos", "qvel", "button_states")
              if f"prev_{name}" in info}  # fmt: skip
    row = {"observations": observation, "actions": action, "terminals": over, **states}
    for name, value in row.items():
        rows[name].append(value)


def _arrays(rows: Mapping[str, list[Any]]) -> Arrays:
    return {name: np.array(values, DTYPES[name]) for name, values in rows.items()}


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
