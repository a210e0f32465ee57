"""A grid maze whose states are cells, a log of random walks in it, and exact distances."""

from __future__ import annotations

from collections import deque
from functools import partial

import gymnasium as gym
import numpy as np

from iql_torchrl import load_dataset

MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1))
SMALL = ("...", ".#.", "#..")
LARGE = (
    ".......", ".#####.", ".#...#.", ".#.#.#.", ".#.#...", "...###.", ".#.....",
)  # fmt: skip


class Maze(gym.Env):
    """``step``: to a neighbouring cell, or nowhere at a wall. Observes the number of the open cell."""

    def __init__(self, plan):
        self.cells = [(r, c) for r, row in enumerate(plan) for c, x in enumerate(row) if x == "."]
        self.number = {cell: n for n, cell in enumerate(self.cells)}
        self.observation_space = gym.spaces.Discrete(len(self.cells))
        self.action_space = gym.spaces.Discrete(4)

    def after(self, state, action):
        (row, column), (down, right) = self.cells[state], MOVES[action]
        return self.number.get((row + down, column + right), state)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(len(self.cells)))
        self.state = (options or {}).get("start", self.state)
        return self.state, {}

    def step(self, action):
        self.state = self.after(self.state, int(action))
        return self.state, 0.0, False, False, {}

    def distances(self):
        """Steps from each cell to each other, by breadth-first search, ``(cells, cells)``."""
        count = len(self.cells)
        steps = np.full((count, count), -1)
        for goal in range(count):
            steps[goal, goal], queue = 0, deque([goal])
            while queue:
                cell = queue.popleft()
                for before in range(count):
                    if steps[before, goal] < 0 and cell in [
                        self.after(before, a) for a in range(4)
                    ]:
                        steps[before, goal] = steps[cell, goal] + 1
                        queue.append(before)
        return steps


def walks(plan, episodes, steps, seed=0):
    """A log of uniformly random actions, without rewards."""
    maze, rng = Maze(plan), np.random.default_rng(seed)
    rows = {"observation": [], "action": [], "next_observation": []}
    for _ in range(episodes):
        state = int(rng.integers(len(maze.cells)))
        for _ in range(steps):
            action = int(rng.integers(4))
            following = maze.after(state, action)
            for values, value in zip(rows.values(), (state, action, following), strict=True):
                values.append(value)
            state = following
    arrays = {key: np.array(values) for key, values in rows.items()}
    arrays["terminated"] = np.zeros(len(arrays["action"]), bool)
    arrays["truncated"] = np.arange(len(arrays["action"])) % steps == steps - 1
    spaces = {"observation_space": maze.observation_space, "action_space": maze.action_space}
    columns = {"reward": None}
    return load_dataset(arrays, columns=columns, env=partial(Maze, plan), **spaces)
