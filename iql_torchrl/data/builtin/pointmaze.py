"""``pointmaze/umaze-v0`` and ``pointmaze/medium-v0``: a point that reaches many goals in a maze.

The logging controller follows the one that made D4RL's maze2d data (Fu et al. 2020,
arXiv:2004.07219): shortest path over the maze's cells, and between cells a force
``10 (waypoint - position) - velocity`` with Gaussian noise of deviation 0.5.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.builtin.recipe import (
    EpisodeRecord,
    Recipe,
    Recording,
    import_for_recipe,
    mean_return,
    progress_bar,
)

__all__ = ["POINTMAZE_MEDIUM", "POINTMAZE_UMAZE", "MazeController"]

Cell: TypeAlias = tuple[int, int]

POSITION_GAIN = 10.0
VELOCITY_GAIN = -1.0
NOISE = 0.5
# Half a cell is 0.5: near enough to its centre to turn a corner without touching the wall.
REACHED = 0.1
STEPS = 150_000


class MazeController:
    """Moves the point to its desired goal; one instance per episode.

    Args:
        maze: the environment's ``unwrapped.maze``.
        noise: deviation of the Gaussian noise on the force, before clipping to [-1, 1].
        generator: of the noise.
    """

    def __init__(self, maze: Any, *, noise: float, generator: np.random.Generator) -> None:
        self._maze, self._noise, self._generator = maze, noise, generator
        self._towards: dict[Cell, dict[Cell, Cell]] = {}
        self._waypoint: Cell | None = None

    def __call__(self, observation: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The force ``(2,)`` in [-1, 1] for a PointMaze observation."""
        position, velocity = observation["observation"][:2], observation["observation"][2:]
        error = self._target(position, observation["desired_goal"]) - position
        force = POSITION_GAIN * error + VELOCITY_GAIN * velocity
        force = force + self._noise * self._generator.standard_normal(2)
        clipped: NDArray[np.float32] = np.clip(force, -1.0, 1.0).astype(np.float32)
        return clipped

    def _target(self, position: NDArray[Any], goal: NDArray[Any]) -> NDArray[Any]:
        here, end = self._cell(position), self._cell(goal)
        if here == end:
            self._waypoint = None
            return goal
        if self._waypoint == here:
            # Turning before the centre would press the point against the inner corner.
            centre = self._centre(here)
            if np.linalg.norm(position - centre) > REACHED:
                return centre
        self._waypoint = self._next_cell(here, end)
        return self._centre(self._waypoint)

    def _cell(self, position: NDArray[Any]) -> Cell:
        row, column = self._maze.cell_xy_to_rowcol(position)
        return int(row), int(column)

    def _centre(self, cell: Cell) -> NDArray[Any]:
        centre: NDArray[Any] = self._maze.cell_rowcol_to_xy(cell)
        return centre

    def _next_cell(self, here: Cell, end: Cell) -> Cell:
        if end not in self._towards:
            self._towards[end] = self._shortest_paths(end)
        # A goal's noise and the point's radius keep both inside open cells.
        return self._towards[end][here]

    def _shortest_paths(self, end: Cell) -> dict[Cell, Cell]:
        """For each open cell the next one on a shortest path to ``end`` (breadth first)."""
        following, queue = {end: end}, deque([end])
        while queue:
            row, column = queue.popleft()
            for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1)):
                cell = row + down, column + right
                if cell not in following and self._maze.maze_map[cell[0]][cell[1]] != 1:
                    following[cell] = (row, column)
                    queue.append(cell)
        return following


def record(name: str, environment: str, episodes: int, seed: int, progress: bool) -> Recording:
    """Log ``episodes`` episodes of ``environment``; see the recipes' descriptions."""
    import_for_recipe("gymnasium_robotics", name)
    env = gymnasium.make(
        environment, continuing_task=True, reset_target=True, disable_env_checker=True
    )
    assert env.spec is not None
    maze = env.unwrapped.maze  # type: ignore[attr-defined]
    try:
        buffers = [
            _episode(env, seed, number).buffer()
            for number in progress_bar(episodes, name, progress)
        ]
        references = (
            mean_return(env, _random_force),
            mean_return(env, lambda generator: MazeController(maze, noise=0, generator=generator)),
        )
    finally:
        env.close()
    return Recording(
        episodes=buffers,
        env_spec=env.spec,
        reference_scores=references,
        algorithm="way-point PD controller with Gaussian noise of deviation 0.5",
        requirements=("gymnasium-robotics>=1.3", "mujoco"),
    )


def _random_force(generator: np.random.Generator) -> Any:
    return lambda _: generator.uniform(-1.0, 1.0, size=2).astype(np.float32)


def _episode(env: Any, seed: int, number: int) -> EpisodeRecord:
    generator = np.random.default_rng([seed, number])
    reset_seed = int(generator.integers(2**31))
    observation, _ = env.reset(seed=reset_seed)
    controller = MazeController(env.unwrapped.maze, noise=NOISE, generator=generator)
    episode, over = EpisodeRecord(reset_seed, observation), False
    while not over:
        action = controller(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        over = episode.add(action, observation, reward, terminated, truncated)
    return episode


def _recipe(name: str, environment: str, episode_steps: int) -> Recipe:
    return Recipe(
        description=(
            f"{environment} as a continuing task with sparse reward: 1 at each step within 0.45 "
            f"of the target, which is then drawn again (the observation that earns the reward "
            f"still shows the reached target, the next one the new); {episode_steps}-step "
            f"episodes that end by truncation only. The log follows D4RL's maze2d controller: "
            f"shortest path over the maze's cells, force 10 (waypoint - position) - velocity "
            f"plus Gaussian noise of deviation 0.5, clipped to [-1, 1]. Observations are a Dict "
            f"(observation: position and velocity, achieved_goal, desired_goal). "
            f"Reference scores are mean returns over 100 episodes of the uniform random policy "
            f"and of the controller without noise."
        ),
        episodes=STEPS // episode_steps,
        record=partial(record, name, environment),
    )


POINTMAZE_UMAZE = _recipe("pointmaze/umaze-v0", "PointMaze_UMaze-v3", 300)
POINTMAZE_MEDIUM = _recipe("pointmaze/medium-v0", "PointMaze_Medium-v3", 600)
