"""D4RL's maze2d tasks and their datasets, made again with the current MuJoCo.

    python benchmarks/d4rl_maze2d.py umaze maze2d-umaze.npz
    python benchmarks/d4rl_maze2d.py umaze --check

D4RL (Fu et al. 2020, arXiv:2004.07219; github.com/Farama-Foundation/D4RL) needs an old gym and
mujoco-py. Simulation, controller and recording follow ``d4rl/pointmaze`` and ``scripts/generation``
there, with what one would not expect:

- The point's coordinates are those of the cells minus 0.2: the point is in the centre of cell (1, 1)
  at (0.8, 0.8), while starts and goals are drawn around (1, 1).
- The controller's way-points lie up to 0.2 beside a cell's coordinates. One controller drives on
  from target to target. When it has reached one (within 0.1), the recording repeats
  the observation once, because the script does not take over the new one.
- A reward belongs to the observation before the step: 1 within 0.5 of the task's goal.
- With ``--reached timeouts`` (default) reached targets are timeouts, whose steps
  ``d4rl.qlearning_dataset`` leaves out, and nothing is terminal, as in the published file (D4RL's
  issues 85 and 176). The script of today writes terminals, and no timeouts: ``--reached terminals``.
- ``--noisy`` adds noise to the actions. The reader leaves out 12,459 steps of the published umaze
  (D4RL's issue 65), 12,403 here with the noise and 13,599 without, so it was probably used.

``--check`` plays random actions and the controller, whose mean returns D4RL publishes as the scores
0 and 100.
"""

from __future__ import annotations

import argparse
from collections import deque
from pathlib import Path
from typing import Any

from iql_torchrl.data import REFERENCE_RETURNS
from iql_torchrl.files import atomic_write

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

#: For each task the cells (# wall, O open, G goal), the steps of an episode and of D4RL's dataset.
MAZES = {
    "umaze": (("#####", "#GOO#", "###O#", "#OOO#", "#####"), 300, 1_000_000),
    "medium": (
        (
            "########", "#OO##OO#", "#OO#OOO#", "##OOO###", "#OO#OOO#", "#O#OO#O#", "#OOO#OG#",
            "########",
        ), 600, 2_000_000,
    ),
    "large": (
        (
            "############", "#OOOO#OOOOO#", "#O##O#O#O#O#", "#OOOOOO#OOO#", "#O####O###O#",
            "#OO#O#OOOOO#", "##O#O#O#O###", "#OO#OOO#OGO#", "############",
        ), 800, 4_000_000,
    ),
}  # fmt: skip
Rows = dict[str, NDArray[Any]]
GOAL_RADIUS = 0.5
START_NOISE = 0.1
REACHED = 0.1
NOISE = 0.5  # --noisy
MODEL = """
<mujoco>
  <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
  <default>
    <joint damping="1"/>
    <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1" contype="2" conaffinity="1"/>
  </default>
  <worldbody>
    <body pos="1.2 1.2 0">
      <geom type="sphere" size="0.1" contype="1"/>
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
    </body>
    {walls}
  </worldbody>
  <actuator>
    <motor joint="x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
    <motor joint="y" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
  </actuator>
</mujoco>
"""


class Maze2d(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """``maze2d-NAME-v1``: position and velocity are seen, the goal is not; truncated at the limit."""

    def __init__(self, name: str) -> None:
        rows, self.limit, _ = MAZES[name]
        self.cells = np.array([list(row) for row in rows])
        walls = "".join(
            f'<geom type="box" pos="{row + 1} {column + 1} 0" size="0.5 0.5 0.2"/>'
            for row, column in np.argwhere(self.cells == "#")
        )
        self.model = mujoco.MjModel.from_xml_string(MODEL.format(walls=walls))
        self.data = mujoco.MjData(self.model)
        self.goal = np.argwhere(self.cells == "G")[0].astype(float)
        self.open = np.concatenate([np.argwhere(self.cells == kind) for kind in "OG"])
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.near_a_cell(self.np_random)
        self.data.qvel[:] = 0.1 * self.np_random.standard_normal(2)
        mujoco.mj_forward(self.model, self.data)
        self.steps = 0
        return self.state().astype(np.float32), {}

    def near_a_cell(self, generator: np.random.Generator) -> NDArray[np.float64]:
        cell = self.open[generator.integers(len(self.open))]
        result: NDArray[np.float64] = cell + generator.uniform(-START_NOISE, START_NOISE, 2)
        return result

    def state(self) -> NDArray[np.float64]:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def simulate(self, action: Any) -> None:
        self.data.qvel[:] = self.data.qvel.clip(-5.0, 5.0)
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data)
        self.steps += 1

    def step(self, action: Any) -> Any:
        self.simulate(action)
        reward = float(np.linalg.norm(self.data.qpos - self.goal) <= GOAL_RADIUS)
        return self.state().astype(np.float32), reward, False, self.steps >= self.limit, {}


class Controller:
    """D4RL's way-point controller: force 10 (way-point - position) - velocity, clipped to [-1, 1]."""

    def __init__(self, cells: NDArray[Any], generator: np.random.Generator) -> None:
        self.cells, self.generator = cells, generator
        self.target = np.zeros(2)
        self.way: list[NDArray[np.float64]] = []
        self.before = np.zeros(2)

    def act(self, state: NDArray[np.float64], target: NDArray[np.float64]) -> tuple[Any, bool]:
        """The force, and whether the target's cell is reached."""
        position, velocity = state[:2], state[2:]
        if (self.target != target.round()).any():
            self.plan(position.round(), target.round())
        slow = bool(np.linalg.norm(self.before - position) < REACHED)
        done = slow and bool(np.linalg.norm(position - self.target) < REACHED)
        aim = self.target if done else self.way[0]
        force = (10.0 * (aim - position) - velocity).clip(-1.0, 1.0)
        if slow and not done and np.linalg.norm(position - aim) < REACHED:
            self.way.pop(0)
        self.before = position
        return force, done

    def plan(self, start: NDArray[np.float64], target: NDArray[np.float64]) -> None:
        """A shortest way; of equal ones that which tries the columns, and then the rows, first."""
        distance = {tuple(target): 0}
        queue = deque(distance)
        moves = ((0, -1), (0, 1), (-1, 0), (1, 0))
        while queue:
            cell = queue.popleft()
            for move in moves:
                beside = (cell[0] + move[0], cell[1] + move[1])
                if beside not in distance and self.cells[int(beside[0]), int(beside[1])] != "#":
                    distance[beside] = distance[cell] + 1
                    queue.append(beside)
        here, self.way = tuple(start), []
        while here != tuple(target):
            options = [(here[0] + move[0], here[1] + move[1]) for move in moves]
            here = next(c for c in options if distance.get(c) == distance[here] - 1)
            if here != tuple(target):
                self.way.append(np.array(here) - 0.2 * self.generator.uniform(size=2))
        self.way.append(target)
        self.before, self.target = start, target


def make(
    name: str, steps: int, seed: int = 0, reached: str = "timeouts", noisy: bool = False
) -> Rows:
    """The rows of D4RL's dataset, as ``d4rl.qlearning_dataset`` reads them.

    ``reached``: the column of the file that marks reached targets, ``"timeouts"`` or ``"terminals"``.
    ``noisy``: Gaussian noise of deviation 0.5 is added to the controller's actions.
    """
    generator, noise = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    env = Maze2d(name)
    env.reset(seed=seed)
    controller = Controller(env.cells, generator)
    target, state, since = env.near_a_cell(generator), env.state(), 0
    states, actions = np.empty((steps, 4), np.float32), np.empty((steps, 2), np.float32)
    ends, counts = np.empty(steps, bool), np.empty(steps, int)
    for step in range(steps):
        action, done = controller.act(state, target)
        if noisy:
            action = (action + NOISE * noise.normal(size=2)).clip(-1.0, 1.0)
        done = done or since >= env.limit
        states[step], actions[step], ends[step], counts[step] = state, action, done, since
        env.simulate(action)
        if done:
            target, since = env.near_a_cell(generator), 0
        else:
            state, since = env.state(), since + 1
    rewards = np.linalg.norm(states[:, :2] - env.goal, axis=1) <= GOAL_RADIUS
    # Without timeouts the reader leaves out the last step that an episode may have.
    left_out = ends if reached == "timeouts" else counts == env.limit - 1
    kept = np.flatnonzero(~left_out[:-1])
    terminated = ends[kept] & (reached == "terminals")
    last = left_out[kept + 1] & ~terminated
    last[-1] = not terminated[-1]
    return {
        "observation": states[kept],
        "action": actions[kept],
        "reward": rewards[kept].astype(np.float32),
        "next_observation": states[kept + 1],
        "terminated": terminated,
        "truncated": last,
    }


def write(name: str, path: Path, steps: int, **variant: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **make(name, steps, **variant))  # type: ignore[arg-type]


def check(name: str, episodes: int) -> dict[str, tuple[float, float]]:
    """Mean return and its standard error, of random actions and of one controller for all episodes."""
    env, generator = Maze2d(name), np.random.default_rng(0)
    env.action_space.seed(0)
    controller = Controller(env.cells, generator)
    policies = {
        "random actions": env.action_space.sample,
        "controller": lambda: controller.act(env.state(), env.goal)[0],
    }
    results = {}
    for label, act in policies.items():
        returns = np.zeros(episodes)
        for episode in range(episodes):
            env.reset(seed=episode)
            returns[episode] = sum(env.step(act())[1] for _ in range(env.limit))
        results[label] = (float(returns.mean()), float(returns.std() / np.sqrt(episodes)))
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("maze", choices=MAZES)
    add("path", type=Path, nargs="?", help="the file to write, .npz")
    add("--steps", type=int, help="of the recording; by default those of D4RL's dataset")
    add("--reached", choices=("timeouts", "terminals"), default="timeouts", help="the column of the "
        "published file that marks reached targets")  # fmt: skip
    add(
        "--noisy", action="store_true", help="noise on the actions, as that option of D4RL's script"
    )
    add("--check", action="store_true", help="compare the reference returns with D4RL's")
    add("--episodes", type=int, default=1000, help="of --check")
    o = parser.parse_args(arguments)
    if o.path is not None:
        write(o.maze, o.path, o.steps or MAZES[o.maze][2], reached=o.reached, noisy=o.noisy)
    if o.check:
        published = REFERENCE_RETURNS[f"maze2d-{o.maze}"]
        for (label, (mean, error)), other in zip(
            check(o.maze, o.episodes).items(), published, strict=True
        ):
            print(f"{o.maze}, {label}: {mean:.2f} (standard error {error:.2f}); D4RL: {other}")


if __name__ == "__main__":
    main()
