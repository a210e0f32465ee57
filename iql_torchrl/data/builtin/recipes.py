"""Datasets of controllers in Gymnasium's environments: how one is made; a pendulum and two mazes."""

from __future__ import annotations

import contextlib
import io
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from numpy.typing import NDArray
from tqdm import tqdm

from iql_torchrl.data.readers.arrays import package

Act: TypeAlias = Callable[[Any, Mapping[str, Any]], Any]
"""``act(observation, info) -> action`` of one episode."""
Controller: TypeAlias = tuple[
    Callable[[np.random.Generator, int], Act], Callable[[Any, Any], dict[str, Any]] | None
]
"""What gives the ``Act`` of an episode, from a generator and the episode's number; what gives
further columns of an episode, if any, from its observations and actions."""
Cell: TypeAlias = tuple[int, int]

MAX_TORQUE = 2.0
UPRIGHT_ENERGY = 5.0
BALANCE_COSINE = 0.9
# The share of segments in which the controller acts, per episode; 0 is a random episode.
COMPETENCES = (0.0, 0.25, 0.5, 0.75)
MEAN_SEGMENT = 10

MAZE_NOISE = 0.5
# Half a cell is 0.5: near enough to its centre to turn a corner without touching the wall.
REACHED = 0.1
MAZE_STEPS = 150_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one built-in dataset is made.

    Attributes:
        description: what the dataset contains and how it was made; stored with it.
        algorithm: how the actions were chosen, in a few words.
        episodes: how many episodes the standard dataset has.
        environment, options: the id, and further arguments of the environment.
        disable_env_checker: of the environment's spec.
        package, requirements: what registers the environment; pip requirements to rebuild it.
        reference_scores: mean returns ``(random, expert)`` over the seeds 1,000,000 to 1,000,099.
        controller: gives the ``Controller`` of an environment.
    """

    description: str
    algorithm: str
    episodes: int
    environment: str
    options: Mapping[str, Any] = field(default_factory=dict)
    disable_env_checker: bool = True
    package: str
    requirements: tuple[str, ...]
    reference_scores: tuple[float, float]
    controller: Callable[[Any], Controller]


def record(
    name: str, recipe: Recipe, episodes: int, seed: int, progress: bool
) -> tuple[list[EpisodeBuffer], EnvSpec]:
    """The episodes and their environment; the same arguments give the same episodes."""
    import_for_recipe(recipe.package, name)
    registered = gymnasium.spec(recipe.environment)
    options = {**registered.kwargs, **recipe.options}
    spec = replace(registered, kwargs=options, disable_env_checker=recipe.disable_env_checker)
    buffers = []
    with gymnasium.make(spec) as env:
        act_of, infos_of = recipe.controller(env)
        hidden = None if progress else True  # None hides the bar where there is no terminal
        for number in tqdm(range(episodes), desc=name, unit="episode", disable=hidden):
            generator = np.random.default_rng([seed, number])
            reset_seed = int(generator.integers(2**31))
            lists = play(env, act_of(generator, number), *env.reset(seed=reset_seed))
            del lists["infos"]
            columns = {key: _stacked(values) for key, values in lists.items()}
            infos = infos_of and infos_of(columns["observations"], columns["actions"])
            buffers.append(EpisodeBuffer(seed=reset_seed, **columns, infos=infos))
    return buffers, spec


def play(env: Any, act: Act, observation: Any, info: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The columns of the episode that ``env.reset`` began: T + 1 observations, T of all others."""
    columns: dict[str, list[Any]] = {"observations": [observation]}
    over = False
    while not over:
        action = act(observation, info)
        observation, reward, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        step = {
            "observations": observation, "actions": action, "rewards": float(reward),
            "terminations": bool(terminated), "truncations": bool(truncated), "infos": info,
        }  # fmt: skip
        for key, value in step.items():
            columns.setdefault(key, []).append(value)
    return columns


def _stacked(values: list[Any]) -> Any:
    if not isinstance(values[0], Mapping):
        return np.stack(values)
    return {key: np.stack([each[key] for each in values]) for key in values[0]}


def import_for_recipe(module: str, dataset: str) -> None:
    """Import an optional package of the datasets. ``ImportError`` says how to install it."""
    # gym, which icu_sepsis imports, prints a notice
    with contextlib.redirect_stderr(io.StringIO()):
        package(module, f"making {dataset!r}", "datasets")


def swing_up_torque(observation: NDArray[Any]) -> NDArray[np.float32]:
    """The noise-free controller of the pendulum: energy shaping below, PD balance near the top.

    ``observation`` is Pendulum-v1's ``(cos, sin, angular velocity in rad/s)``. Returns N m, ``(1,)``.
    """
    cosine, sine, velocity = (float(value) for value in observation)
    if cosine > BALANCE_COSINE:
        torque = -(12.0 * math.atan2(sine, cosine) + 3.0 * velocity)
    else:
        # Rod of mass 1 and length 1, with g = 10: kinetic energy w^2 / 6, potential energy 5 cos.
        missing = UPRIGHT_ENERGY - (velocity**2 / 6.0 + 5.0 * cosine)
        torque = 5.0 * missing * (1.0 if velocity >= 0 else -1.0)
    return np.clip([torque], -MAX_TORQUE, MAX_TORQUE).astype(np.float32)


def _disturbed(generator: np.random.Generator, number: int) -> Act:
    # Levels alternate, so that any number of episodes has nearly equal numbers of each.
    competence = COMPETENCES[number % len(COMPETENCES)]
    left, disturbance = 0, None

    def act(observation: Any, _: Any) -> NDArray[np.float32]:
        nonlocal left, disturbance
        if left == 0:
            left = int(generator.geometric(1.0 / MEAN_SEGMENT))
            disturbance = None
            if generator.random() >= competence:
                torque = generator.uniform(-MAX_TORQUE, MAX_TORQUE, size=1)
                disturbance = torque.astype(np.float32)
        left -= 1
        return swing_up_torque(observation) if disturbance is None else disturbance

    return act


PENDULUM_MIXED = Recipe(
    description=(
        "Pendulum-v1 swing-up, 200-step episodes that end by truncation only. Each episode is "
        "cut into segments of geometrically distributed length (mean 10 steps); a segment is "
        "driven by an energy-shaping swing-up controller with PD balance, or applies one constant "
        "uniform random torque in [-2, 2] N m. The controller's share of segments is 0, 0.25, 0.5 or "
        "0.75 in turn from episode to episode. Reference scores are mean returns over 100 "
        "episodes of the uniform random policy and of the undisturbed controller."
    ),
    algorithm="energy-shaping swing-up with PD balance, disturbed by random constant torques",
    episodes=300,
    environment="Pendulum-v1",
    disable_env_checker=False,
    package="gymnasium",
    requirements=("gymnasium>=1.0",),
    reference_scores=(-1238.7105755962557, -156.96959423258005),
    controller=lambda _: (_disturbed, None),
)


def maze_controller(maze: Any, noise: float, generator: np.random.Generator) -> Act:
    """Moves the point to its desired goal, with a noisy force ``(2,)`` in [-1, 1].

    Follows D4RL's maze2d controller (Fu et al. 2020, arXiv:2004.07219).
    """
    waypoint: Cell | None = None
    next_cells = cache(partial(_shortest_paths, maze.maze_map))

    def target(position: NDArray[Any], goal: NDArray[Any]) -> Any:
        nonlocal waypoint
        here, end = (tuple(maze.cell_xy_to_rowcol(place)) for place in (position, goal))
        if here == end:
            waypoint = None
            return goal
        # Turning before the centre would press the point against the inner corner.
        centre = maze.cell_rowcol_to_xy(here)
        if waypoint != here or np.linalg.norm(position - centre) <= REACHED:
            # A goal's noise and the point's radius keep both inside open cells.
            waypoint = next_cells(end)[here]
        return maze.cell_rowcol_to_xy(waypoint)

    def act(observation: Any, _: Any) -> NDArray[np.float32]:
        position, velocity = np.split(observation["observation"], 2)
        error = target(position, observation["desired_goal"]) - position
        force = 10.0 * error - velocity + noise * generator.standard_normal(2)
        return np.clip(force, -1.0, 1.0).astype(np.float32)

    return act


def _shortest_paths(maze_map: Any, end: Cell) -> dict[Cell, Cell]:
    """For each open cell the next one on a shortest path to ``end`` (breadth first)."""
    following, queue = {end: end}, deque([end])
    while queue:
        row, column = queue.popleft()
        for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            cell = row + down, column + right
            if cell not in following and maze_map[cell[0]][cell[1]] != 1:
                following[cell] = (row, column)
                queue.append(cell)
    return following


def _noisy(env: Any) -> Controller:
    return lambda g, _: maze_controller(env.unwrapped.maze, MAZE_NOISE, g), None


def _pointmaze(environment: str, episode_steps: int, scores: tuple[float, float]) -> Recipe:
    return Recipe(
        description=(
            f"{environment} as a continuing task with sparse reward: 1 at each step within 0.45 "
            f"of the target, which is then drawn again (the observation that earns the reward "
            f"still shows the reached target, the next one the new); {episode_steps}-step "
            f"episodes that end by truncation only. The behaviour policy is D4RL's maze2d controller: "
            f"shortest path over the maze's cells, force 10 (waypoint - position) - velocity "
            f"plus Gaussian noise of deviation 0.5, clipped to [-1, 1]. Observations are a Dict "
            f"(observation: position and velocity, achieved_goal, desired_goal). "
            f"Reference scores are mean returns over 100 episodes of the uniform random policy "
            f"and of the controller without noise."
        ),
        algorithm="way-point PD controller with Gaussian noise of deviation 0.5",
        episodes=MAZE_STEPS // episode_steps,
        environment=environment,
        options={"continuing_task": True, "reset_target": True},
        package="gymnasium_robotics",
        requirements=("gymnasium-robotics>=1.3", "mujoco"),
        reference_scores=scores,
        controller=_noisy,
    )


POINTMAZE_UMAZE = _pointmaze("PointMaze_UMaze-v3", 300, (0.23, 3.69))
POINTMAZE_MEDIUM = _pointmaze("PointMaze_Medium-v3", 600, (0.2, 3.77))
