"""One dataset, seven policies: an obstacle is passed on both sides, and its middle is a hit.

An action is a point in the plane through which one goes from the left to the right. Each observation
is a wind in [-1, 1], which makes one of the sides better. The dataset passes above and below equally
often in every wind. A policy with one mode that imitates it goes through the middle, where the
obstacle is. Each policy is scored exactly, as it draws its actions and without randomness.
"""

from dataclasses import replace

from iql_torchrl import IQLConfig, OfflineTrainer, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.report import text_table

import numpy as np
import torch
import tyro
from gymnasium.spaces import Box

START, GOAL, RADIUS = np.array([-1.5, 0.0]), np.array([1.5, 0.0]), 0.4
HIT = -2.0  # the return of a hit
ROWS = 20_000
STATES = 2_000  # winds in which a policy is scored
CONFIG = IQLConfig(
    hidden=(64, 64),
    reward="raw",
    temperature=5.0,
    expectile=0.9,
    actor_lr=1e-3,
    critic_lr=1e-3,
    value_lr=1e-3,
)
FLOW = replace(CONFIG, policy="flow")
METHODS = {
    "cloning": replace(CONFIG, temperature=0.0),
    "IQL": CONFIG,
    "IQL, mixture": replace(CONFIG, policy="mixture"),
    "DDPG+BC": replace(CONFIG, actor_objective="ddpg_bc", bc_weight=0.1),
    "flow, IQL": FLOW,
    "flow": replace(FLOW, temperature=0.0),
    "flow, best of 32": replace(FLOW, temperature=0.0, num_samples=32),
}


def hits(point):
    """Whether the way from start to goal through ``point`` ``(N, 2)`` crosses the obstacle."""
    return np.minimum(distance(START, point), distance(point, GOAL)) < RADIUS


def distance(one, other):
    """Distance of the origin from the segments between two points."""
    along = other - one
    nearest = np.clip(-(one * along).sum(-1) / (along**2).sum(-1), 0, 1)
    return np.linalg.norm(one + nearest[..., None] * along, axis=-1)


def returns(wind, point):
    """4 less the length of the way, plus wind / 2 above and minus wind / 2 below; ``HIT`` on a hit."""
    length = np.linalg.norm(point - START, axis=-1) + np.linalg.norm(GOAL - point, axis=-1)
    return np.where(hits(point), HIT, 4 - length + 0.5 * wind * np.sign(point[:, 1]))


def cells(wind, point):
    """The mean return and the share of hits, for the table."""
    return [f"{returns(wind, point).mean():.2f}", f"{hits(point).mean():.1%}"]


def make_dataset(seed):
    """Ways around the obstacle, above and below with equal probability; some touch it."""
    generator = np.random.default_rng(seed)
    wind = generator.uniform(-1, 1, ROWS)
    side = generator.choice([-1.0, 1.0], ROWS)
    noise = generator.normal(size=(ROWS, 2))
    point = np.stack([0.3 * noise[:, 0], side * (0.7 + 0.12 * noise[:, 1])], -1).clip(-1, 1)
    columns = {
        "observation": wind[:, None].astype(np.float32),
        "action": point.astype(np.float32),
        "reward": returns(wind, point).astype(np.float32),
        "next_observation": wind[:, None].astype(np.float32),
        "terminated": np.ones(ROWS, bool),
        "truncated": np.zeros(ROWS, bool),
    }
    return load_dataset(columns, action_space=Box(-1.0, 1.0, (2,), np.float32))


@cli.errors_in_one_line()
def main(updates: int = 1_500, seed: int = 0) -> None:
    """Make the dataset, train all policies, and print how they score.

    Args:
        updates: number of gradient updates of each policy.
        seed: seed of the dataset, the initial weights and the batches.
    """
    torch.set_num_threads(1)  # the networks are small: a second thread costs more than it gives
    dataset = make_dataset(seed)
    dataset.print_notes()
    table = [["", "as it draws", "", "without randomness", ""]]
    table += [["policy", "return", "hits", "return", "hits"]]
    logged, winds = (dataset.transitions[key].double().numpy() for key in ("action", "observation"))
    table.append(["dataset", *cells(winds[:, 0], logged), "", ""])
    wind = np.random.default_rng(seed + 1).uniform(-1, 1, STATES)
    states = wind[:, None].astype(np.float32)
    for method, config in METHODS.items():
        print(f"Training, {updates:,} updates: {method}", flush=True)
        torch.manual_seed(seed)  # of the flow's noise
        agent = make_agent(replace(config, updates=updates, seed=seed), dataset)
        OfflineTrainer(agent=agent, dataset=dataset, progress_bar=False).train()
        drawn, fixed = (agent.act(states, deterministic=each) for each in (False, True))
        table.append([method, *cells(wind, drawn), *cells(wind, fixed)])
    upwind = np.where(wind < 0, -1.0, 1.0)
    best = np.stack([0 * wind, 0.4151 * upwind], -1)  # a tangent of the obstacle
    table.append(["best possible", *cells(wind, best), "", ""])
    print("\n" + text_table(table))


if __name__ == "__main__":
    tyro.cli(main)
