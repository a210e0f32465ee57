"""Reach every cell of a maze, learned from random steps without rewards.

Each batch gets goals that the dataset reached: the cell of a transition, a later one of its episode, or
any other of the dataset. V(s, g) then counts the steps from s to g, discounted, and one policy goes to
every goal. The picture shows V for one goal, and the policy's paths to it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from iql_torchrl import IQLConfig, OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.data import GoalOrigins
from iql_torchrl.report import text_table

import gymnasium
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from tensordict import TensorDict

PLAN = (".....", ".###.", "...#.", ".#.#.", ".#...")
CELLS = [(x, y) for y, row in enumerate(PLAN) for x, cell in enumerate(row) if cell == "."]
MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1))
GOAL, STARTS = (4, 2), ((0, 4), (2, 4), (2, 0))  # of the picture
CONFIG = IQLConfig(
    updates=2_000,
    batch_size=128,
    hidden=(128, 128),
    discount=0.95,
    expectile=0.95,
    temperature=50.0,
    actor_lr=3e-3,
    critic_lr=5e-3,
    value_lr=5e-3,
    polyak=0.1,
    reward="raw",
)


# Walks are short and random, so that goals of their future are near: values and policy need others too.
VALUE_GOALS = {"current": 0.1, "future": 0.3, "random": 0.6}
POLICY_GOALS = GoalOrigins(current=0.0, future=0.5, random=0.5, discount=None)


class Maze(gymnasium.Env[int, int]):
    """A step leads to a neighbouring cell, or nowhere at a wall. Observes the number of the cell."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Discrete(len(CELLS))
        self.action_space = gymnasium.spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        random = int(self.np_random.integers(len(CELLS)))
        self.cell = (options or {}).get("start", random)
        return self.cell, {}

    def step(self, action: int) -> Any:
        (x, y), (right, down) = CELLS[self.cell], MOVES[action]
        if (x + right, y + down) in CELLS:
            self.cell = CELLS.index((x + right, y + down))
        return self.cell, 0.0, False, False, {}


def wander(episodes: int, steps: int, seed: int):
    """A dataset of random actions, without rewards."""
    rng, maze = np.random.default_rng(seed), Maze()
    rows: dict[str, list[int]] = {"observation": [], "action": [], "next_observation": []}
    for episode in range(episodes):
        cell, _ = maze.reset(seed=1000 * seed + episode)
        for _ in range(steps):
            action = int(rng.integers(4))
            following = maze.step(action)[0]
            for column, value in zip(rows.values(), (cell, action, following), strict=True):
                column.append(value)
            cell = following
    columns = {name: np.array(values) for name, values in rows.items()}
    columns["terminated"] = np.zeros(episodes * steps, bool)
    columns["truncated"] = np.arange(episodes * steps) % steps == steps - 1
    spaces = {"observation_space": maze.observation_space, "action_space": maze.action_space}
    return load_dataset(columns, columns={"reward": None}, env=Maze, **spaces)


def values(agent, goal):
    """V(s, goal) of every cell s."""
    cells = torch.arange(len(CELLS))
    observed = {"observation": cells, "goal": torch.full_like(cells, goal)}
    states = TensorDict({"observation": observed}, len(cells))
    loss = agent.loss
    batch = loss.encoder_network(states)
    with torch.no_grad(), loss.value_network_params.to_module(loss.value_network):
        return loss.value_network(batch)["state_value"].squeeze(1).numpy()


def draw(agent, env, path):
    """V for ``GOAL`` over the maze, and a path to it from each of ``STARTS``."""
    goal = CELLS.index(GOAL)
    picture = np.full((len(PLAN), len(PLAN[0])), np.nan)
    for (x, y), value in zip(CELLS, values(agent, goal), strict=True):
        picture[y, x] = value
    figure = Figure(figsize=(7, 5.4), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(picture, cmap="viridis"), label="V(s, goal)")
    for number, start in enumerate(STARTS):
        observation, _ = env.reset(options={"start": CELLS.index(start), "goal": goal})
        cells, over = [start], False
        while not over and len(cells) < 30:
            observation, _, over, _, _ = env.step(agent.act(observation))
            cells.append(CELLS[observation["observation"]])
        shifted = np.array(cells) + 0.12 * (number - 1)  # so that paths lie beside each other
        axes.plot(*shifted.T, color="white", lw=2, marker="o", markevery=[0])
    axes.plot(*GOAL, "*", color="red", markersize=18)
    axes.set(xticks=[], yticks=[], title="V for one goal (star), and the policy's paths to it")
    figure.savefig(path, dpi=100)


@cli.errors_in_one_line()
def main(updates: int = CONFIG.updates, seed: int = 0, picture: Path = Path("goals.png")) -> None:
    """Train on random steps in a maze, evaluate every goal from every cell, and draw V and paths.

    Args:
        updates: number of gradient updates.
        seed: of the dataset, the initial weights and the batches.
        picture: file that is written.
    """
    config = replace(CONFIG, updates=updates, seed=seed)
    dataset = wander(60, 40, seed)
    data = dataset.relabelled(**VALUE_GOALS, discount=config.discount, actor=POLICY_GOALS)
    data.dataset.print_notes()
    agent = make_agent(config, data)
    OfflineTrainer(agent=agent, dataset=data).train()
    count = len(CELLS)
    goals = [{"goal": g, "start": s} for g in range(count) for s in range(count) if s != g]
    result = evaluate(
        agent.policy, data.make_env, episodes=len(goals), seed=0, goals=goals, max_steps=30
    )
    draw(agent, data.make_env(), picture)
    rates = result.goal_success_rates.reshape(count, -1).mean(1)  # over starts
    table = [["goal", "reached"]]
    table += [[str(cell), f"{rate:.0%}"] for cell, rate in zip(CELLS, rates, strict=True)]
    print(f"\n{text_table([*table, ['all', f'{rates.mean():.1%}']])}\n{picture}")


if __name__ == "__main__":
    tyro.cli(main)
