"""``pointmaze/umaze-v0`` and ``pointmaze/medium-v0``: a point that reaches many goals in a maze.

The logging controller follows the one that made D4RL's maze2d data (Fu et al. 2020,
arXiv:2004.07219): shortest path over the maze's cells, and between cells a force
``10 (waypoint - position) - velocity`` with Gaussian noise of deviation 0.5.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.builtin.recipe import Act, Recipe

__all__ = ["POINTMAZE_MEDIUM", "POINTMAZE_UMAZE"]

Cell: TypeAlias = tuple[int, int]

POSITION_GAIN = 10.0
VELOCITY_GAIN = -1.0
NOISE = 0.5
# Half a cell is 0.5: near enough to its centre to turn a corner without touching the wall.
REACHED = 0.1
STEPS = 150_000


class MazeController:
    """Moves the point to its desired goal, with a force ``(2,)`` in [-1, 1]; one for each episode.

    ``maze``: the environment's ``unwrapped.maze``. ``noise``: deviation of the Gaussian noise on the
    force, before clipping, which ``generator`` draws.
    """

    def __init__(self, maze: Any, noise: float, generator: np.random.Generator) -> None:
        self._maze, self._noise, self._generator = maze, noise, generator
        self._next_cells = cache(self._shortest_paths)
        self._waypoint: Cell | None = None

    def __call__(self, observation: dict[str, NDArray[Any]], _: Any) -> NDArray[np.float32]:
        position, velocity = observation["observation"][:2], observation["observation"][2:]
        error = self._target(position, observation["desired_goal"]) - position
        force = POSITION_GAIN * error + VELOCITY_GAIN * velocity
        force = force + self._noise * self._generator.standard_normal(2)
        return np.clip(force, -1.0, 1.0).astype(np.float32)

    def _target(self, position: NDArray[Any], goal: NDArray[Any]) -> Any:
        here, end = (tuple(self._maze.cell_xy_to_rowcol(place)) for place in (position, goal))
        if here == end:
            self._waypoint = None
            return goal
        # Turning before the centre would press the point against the inner corner.
        centre = self._maze.cell_rowcol_to_xy(here)
        if self._waypoint != here or np.linalg.norm(position - centre) <= REACHED:
            # A goal's noise and the point's radius keep both inside open cells.
            self._waypoint = self._next_cells(end)[here]
        return self._maze.cell_rowcol_to_xy(self._waypoint)

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


def _noisy(env: Any) -> Callable[[np.random.Generator, int], Act]:
    return lambda generator, _: MazeController(env.unwrapped.maze, NOISE, generator)


def _recipe(environment: str, episode_steps: int, scores: tuple[float, float]) -> Recipe:
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
        algorithm="way-point PD controller with Gaussian noise of deviation 0.5",
        episodes=STEPS // episode_steps,
        environment=environment,
        options={"continuing_task": True, "reset_target": True},
        package="gymnasium_robotics",
        requirements=("gymnasium-robotics>=1.3", "mujoco"),
        reference_scores=scores,
        controller=_noisy,
    )


POINTMAZE_UMAZE = _recipe("PointMaze_UMaze-v3", 300, (0.23, 3.69))
POINTMAZE_MEDIUM = _recipe("PointMaze_Medium-v3", 600, (0.2, 3.77))
