"""Reach any place of a maze, learned from a log without rewards in which a point wandered about.

Each batch gets goals that the log reached: the place where a row is, a later one of its episode, or
any other of the log. V(s, g) then counts the steps from s to g, and one policy drives to every goal,
also to goals that no episode reached from there. The picture shows V for one goal, and paths to it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from iql_torchrl import PRESETS, OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.report import text_table

import gymnasium
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from tensordict import TensorDict

PLAN = ("#########", "#...#...#", "#.#.#.#.#", "#.#...#.#", "#.#####.#", "#...#...#", "#########")
SPEED, NEAR = 0.25, 0.4  # of a cell: a step's length, and the radius of a goal
GOALS = ((1.5, 1.5), (7.5, 1.5), (3.5, 5.5), (5.5, 5.5), (5.5, 3.5))  # (x, y) in cells
START = (1.5, 5.5)
CONFIG = replace(
    PRESETS["quick"],
    updates=6_000,
    hidden=(128, 128),
    discount=0.98,
    expectile=0.9,
    polyak=0.02,
    actor_objective="ddpg_bc",
    bc_weight=0.1,
    reward="raw",
)


class PointMaze(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point that moves by ``SPEED`` times the action, and along a wall where it meets one."""

    def __init__(self) -> None:
        size = np.array([len(PLAN[0]), len(PLAN)], np.float32)
        self.observation_space = gymnasium.spaces.Box(np.zeros(2, np.float32), size)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = np.array((options or {}).get("start", START), np.float32)
        return self.place.copy(), {}

    def step(self, action: np.ndarray) -> Any:
        for axis in (0, 1):
            moved = self.place.copy()
            moved[axis] += SPEED * np.clip(action[axis], -1, 1)
            if PLAN[int(moved[1])][int(moved[0])] == ".":
                self.place = moved
        return self.place.copy(), 0.0, False, False, {}


def wander(episodes: int, steps: int, seed: int):
    """A log of random directions, each held for some steps, from random places."""
    rng, maze = np.random.default_rng(seed), PointMaze()
    rows: dict[str, list[Any]] = {"observation": [], "action": [], "next_observation": []}
    places = [
        (x + 0.5, y + 0.5) for y, row in enumerate(PLAN) for x, c in enumerate(row) if c == "."
    ]
    for _ in range(episodes):
        place, _ = maze.reset(options={"start": places[rng.integers(len(places))]})
        for step in range(steps):
            if step % 8 == 0:
                angle = rng.uniform(0, 2 * np.pi)
            noise = rng.normal(0, 0.2, 2)
            action = np.clip(np.array([np.cos(angle), np.sin(angle)]) + noise, -1, 1)
            following = maze.step(action)[0]
            for column, value in zip(rows.values(), (place, action, following), strict=True):
                column.append(value)
            place = following
    columns = {name: np.array(values, np.float32) for name, values in rows.items()}
    columns["terminated"] = np.zeros(episodes * steps, bool)
    columns["truncated"] = np.arange(episodes * steps) % steps == steps - 1
    spaces = {"observation_space": maze.observation_space, "action_space": maze.action_space}
    return load_dataset(columns, columns={"reward": None}, env=PointMaze, **spaces)


def values(agent, goal):
    """V(s, goal) on a grid of places, walls masked."""
    xs, ys = (np.arange(0.05, n, 0.1, np.float32) for n in (len(PLAN[0]), len(PLAN)))
    x, y = np.meshgrid(xs, ys)
    places = torch.from_numpy(np.stack([x.ravel(), y.ravel()], 1))
    goals = torch.tensor(goal).expand_as(places)
    states = TensorDict({"observation": {"observation": places, "goal": goals}}, len(places))
    loss = agent.loss
    with torch.no_grad(), loss.value_network_params.to_module(loss.value_network):
        value = loss.value_network(states)["state_value"].numpy().reshape(x.shape)
    wall = np.array([[PLAN[int(b)][int(a)] == "#" for a in xs] for b in ys])
    return np.ma.masked_array(value, wall)


def drive(agent, env, start, goal, steps):
    """The places of one episode, ``(T, 2)``."""
    observation, _ = env.reset(options={"start": start, "goal": goal})
    path = [observation["observation"]]
    for _ in range(steps):
        observation, _, terminated, _, _ = env.step(agent.act(observation))
        path.append(observation["observation"])
        if terminated:
            break
    return np.array(path)


def draw(agent, env, goal, path):
    """V for ``goal`` over the maze, and a path to it from each of the other goals' places."""
    figure = Figure(figsize=(7.6, 5.2), layout="constrained")
    axes = figure.subplots()
    value, size = values(agent, goal), (0, len(PLAN[0]), len(PLAN), 0)
    shown = axes.imshow(value, extent=size, cmap="viridis")
    figure.colorbar(shown, label="V(s, goal)")
    for start in (START, *GOALS):
        if start != goal:
            axes.plot(*drive(agent, env, start, goal, 150).T, color="white", lw=1.5)
            axes.plot(*start, "o", color="white")
    axes.plot(*goal, "*", color="red", markersize=16)
    axes.set(xticks=[], yticks=[], title="V for one goal (star), and the policy's paths to it")
    figure.savefig(path, dpi=100)


@cli.errors_in_one_line()
def main(
    updates: int = CONFIG.updates,
    episodes: int = 50,
    seed: int = 0,
    picture: Path = Path("goals.png"),
) -> None:
    """Train on wandering in a maze, evaluate five goals, and draw V and paths.

    Args:
        updates: number of gradient updates.
        episodes: episodes of the evaluation, all together.
        seed: of the log, the initial weights and the batches.
        picture: file that is written.
    """
    config = replace(CONFIG, updates=updates, seed=seed)
    data = wander(200, 200, seed).relabelled(reached=NEAR, discount=config.discount)
    agent = make_agent(config, data)
    OfflineTrainer(agent=agent, dataset=data).train()
    goals = [{"goal": goal} for goal in GOALS]
    result = evaluate(
        agent.policy, data.make_env, episodes=episodes, seed=0, goals=goals, max_steps=150
    )
    draw(agent, data.make_env(), GOALS[1], picture)
    table = [["goal", "reached", "steps"]]
    for number, (goal, rate) in enumerate(zip(GOALS, result.goal_success_rates, strict=True)):
        steps = result.lengths[result.goals == number].mean()
        table.append([str(goal), f"{rate:.0%}", f"{steps:.0f}"])
    print(f"\n{text_table(table)}\n{picture}")


if __name__ == "__main__":
    tyro.cli(main)
