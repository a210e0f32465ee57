"""A reward 50 steps away: critics and policies of one action, and of chunks of five.

A point in a square looks for a place in one corner; only reaching it gives a reward. The dataset has
walks without an aim, which keep a direction for some steps. A critic of one action learns the value of
states one step further away in each round of bootstrapping, one of five actions five steps. Prints and
draws how often each policy arrives, while it learns.
"""

from dataclasses import replace
from pathlib import Path

from iql_torchrl import IQLConfig, OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.report import text_table

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box

SPEED, RADIUS, LIMIT = 0.04, 0.15, 100
REWARD = 10.0  # on this scale values differ by more than the noise of Adam's steps
GOAL = np.array([0.8, 0.8], np.float32)
CONFIG = IQLConfig(
    policy="flow",
    flow_steps=5,
    temperature=0.0,  # behaviour cloning; the critics choose the best of several of its actions
    num_samples=32,
    expectile=0.9,
    polyak=0.02,
    batch_size=128,
    hidden=(64, 64),
    schedule="constant",
    actor_lr=1e-3,
    critic_lr=1e-3,
    value_lr=1e-3,
)


def moved(place, action):
    """Where a step leads from ``place``, and whether the point has arrived there."""
    place = np.clip(place + SPEED * action, -1, 1).astype(np.float32)
    return place, np.linalg.norm(place - GOAL, axis=-1) < RADIUS


class Square(gymnasium.Env):
    """The point starts in the corner opposite to the goal; an episode has at most ``LIMIT`` steps."""

    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, -0.6, 2).astype(np.float32)
        self.steps = 0
        return self.place, {}

    def step(self, action):
        self.place, arrived = moved(self.place, action)
        self.steps += 1
        success = {"success": bool(arrived)}
        return self.place, float(arrived), bool(arrived), self.steps >= LIMIT, success


def make_dataset(seed, episodes=400):
    """Walks from random places; each keeps a direction for 5 to 15 steps."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(episodes):
        place, left = generator.uniform(-1, 1, 2).astype(np.float32), 0
        for step in range(LIMIT):
            if left == 0:
                angle, left = generator.uniform(0, 2 * np.pi), generator.integers(5, 16)
                direction = np.array([np.cos(angle), np.sin(angle)])
            left -= 1
            action = (direction + 0.1 * generator.normal(size=2)).clip(-1, 1).astype(np.float32)
            following, arrived = moved(place, action)
            ends = bool(arrived), step == LIMIT - 1 and not arrived
            rows.append((place, action, np.float32(arrived), following, *ends))
            if arrived:
                break
            place = following
    names = ("observation", "action", "reward", "next_observation", "terminated", "truncated")
    columns = {n: np.array(x) for n, x in zip(names, zip(*rows, strict=True), strict=True)}
    spaces = {"observation_space": Square.observation_space, "action_space": Square.action_space}
    return load_dataset(columns, env=Square, reward=(REWARD, 0.0), **spaces)


def learn(dataset, config, every, episodes):
    """Percentages of episodes that arrive, before the first update and after every ``every``."""
    arrived = []
    torch.manual_seed(config.seed)  # of the flow's noise
    agent = make_agent(config, dataset)

    def evaluation():
        result = evaluate(agent.policy, Square, episodes=episodes, num_envs=episodes, seed=1_000)
        arrived.append(100 * result.successes.mean())
        return result

    OfflineTrainer(
        agent=agent, dataset=dataset, evaluation=evaluation, eval_interval=every, progress_bar=False
    ).train()
    return arrived


def draw(path, curves, every):
    """One line for each run, one colour for each length of a chunk."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for (size, runs), colour in zip(curves.items(), ("tab:gray", "tab:blue"), strict=True):
        updates = every * np.arange(len(runs[0]))
        for run in runs:
            axes.plot(updates, run, color=colour, alpha=0.35, linewidth=1)
        axes.plot(updates, np.mean(runs, 0), color=colour, linewidth=2, label=f"h = {size}")
    axes.set(xlabel="updates", ylabel="episodes that arrive (%)", ylim=(-3, 103))
    axes.legend(title="actions of a chunk", loc="upper left", frameon=False)
    figure.savefig(path, dpi=100)


@cli.errors_in_one_line()
def main(
    updates: int = 5_000, seeds: int = 3, episodes: int = 30, output: Path = Path("runs/chunks")
) -> None:
    """Train with chunks of one and of five actions, print a table, and write a picture.

    Args:
        updates: number of gradient updates of each policy, a multiple of 10.
        seeds: number of seeds, >= 1.
        episodes: episodes of each evaluation.
        output: folder of the picture chunks.png.
    """
    if updates % 10 or seeds < 1:
        raise ValueError(
            f"updates is {updates}, seeds {seeds}; expected a multiple of 10, and >= 1."
        )
    torch.set_num_threads(1)  # the networks are small: a second thread costs more than it gives
    dataset, every = make_dataset(0), updates // 10
    dataset.print_notes()
    curves = {}
    for size in (1, 5):
        config = replace(CONFIG, updates=updates, action_chunk=size)
        curves[size] = []
        for seed in range(seeds):
            curves[size].append(learn(dataset, replace(config, seed=seed), every, episodes))
            print(f"h = {size}, seed {seed}: {curves[size][-1][-1]:.0f} % arrive", flush=True)
    table = [["updates", *(f"h = {size}" for size in curves)]]
    for number in range(11):
        shares = (np.mean([run[number] for run in runs]) for runs in curves.values())
        table.append([f"{every * number:,}", *(f"{share:.0f} %" for share in shares)])
    print("\n" + text_table(table))
    output.mkdir(parents=True, exist_ok=True)
    draw(output / "chunks.png", curves, every)


if __name__ == "__main__":
    tyro.cli(main)
