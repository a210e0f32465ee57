"""One conditioned flow, many policies: exact values over the guidance weight w, without retraining.

A random MDP of six states. An action is a number in [-1, 1], of which only the third it lies in has an
effect, so the exact value of every policy follows from its probabilities of the three thirds in each
state. The behaviour policy takes each third at random. A flow learns from the data, then
only w changes: 0 imitates the dataset, 1 its actions of positive advantage, more extrapolates.
"""

from dataclasses import replace
from pathlib import Path

from iql_torchrl import IQLConfig, OfflineTrainer, evaluation, load_dataset, make_agent, policies
from iql_torchrl.config import cli
from iql_torchrl.losses import LossCritics
from iql_torchrl.report import text_table

import numpy as np
import torch
import tyro
from gymnasium.spaces import Box
from matplotlib.figure import Figure

STATES, THIRDS, DISCOUNT, ENDING = 6, 3, 0.9, 0.1
ROWS, DRAWS = 20_000, 4_000
WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
CONFIG = IQLConfig(
    policy="flow",
    actor_objective="conditioned_flow",
    condition_dropout=0.2,
    flow_steps=20,
    expectile=0.5,  # V is the value of the behaviour policy, so that advantages are those over it
    discount=DISCOUNT,
    hidden=(64, 64),
    reward="raw",
    standardise=False,
    actor_lr=1e-3,
    critic_lr=1e-3,
    value_lr=1e-3,
)


class MDP:
    """``following`` ``(S, 3, S)``, ``reward`` ``(S, 3)``; every step ends with probability 0.1."""

    def __init__(self, seed):
        draw = np.random.default_rng(seed)
        self.following = draw.dirichlet(np.full(STATES, 0.3), (STATES, THIRDS))
        self.reward = draw.uniform(-1, 1, (STATES, THIRDS))
        self.logged = draw.dirichlet(np.full(THIRDS, 2.0), STATES)

    def state_values(self, policy):
        """Exact V ``(S,)`` of probabilities ``(S, 3)``."""
        going = DISCOUNT * (1 - ENDING) * (policy[:, :, None] * self.following).sum(1)
        return np.linalg.solve(np.eye(STATES) - going, (policy * self.reward).sum(1))

    def action_values(self, policy):
        return self.reward + DISCOUNT * (1 - ENDING) * self.following @ self.state_values(policy)

    def value(self, policy):
        """Exact value from a uniformly drawn first state."""
        return self.state_values(policy).mean()

    def positive(self):
        """The behaviour policy given that the exact advantage over itself is positive."""
        better = self.action_values(self.logged) > self.state_values(self.logged)[:, None]
        return self.logged * better / (self.logged * better).sum(1, keepdims=True)

    def best(self):
        policy = self.logged
        for _ in range(STATES * THIRDS):  # policy iteration
            policy = np.eye(THIRDS)[self.action_values(policy).argmax(1)]
        return policy

    def dataset(self, seed):
        draw = np.random.default_rng(seed)
        state = draw.integers(STATES, size=ROWS)
        third = (draw.random((ROWS, 1)) > self.logged[state].cumsum(1)[:, :-1]).sum(1)
        after = draw.random((ROWS, 1)) > self.following[state, third].cumsum(1)[:, :-1]
        action = (third - 1) * 2 / 3 + 0.1 * draw.normal(size=ROWS).clip(-2, 2)
        columns = {
            "observation": np.eye(STATES, dtype=np.float32)[state],
            "action": action[:, None].astype(np.float32),
            "reward": self.reward[state, third].astype(np.float32),
            "next_observation": np.eye(STATES, dtype=np.float32)[after.sum(1)],
            "terminated": (ended := draw.random(ROWS) < ENDING),
            "truncated": ~ended,  # the states of a dataset of single steps are drawn
        }
        return load_dataset(columns, action_space=Box(-1.0, 1.0, (1,), np.float32))


def probabilities(agent):
    """Of the three thirds in each state, ``(S, 3)``, from many drawn actions."""
    states = np.repeat(np.eye(STATES, dtype=np.float32), DRAWS, 0)
    action = agent.act(states, deterministic=False, seed=0).reshape(STATES, DRAWS)
    third = np.digitize(action, [-1 / 3, 1 / 3])
    return (third[:, :, None] == np.arange(THIRDS)).mean(1)


def draw_picture(path, values, gaps, references):
    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(WEIGHTS, values, "o-", color="#0072B2", label="conditioned flow")
    for (name, value), style in zip(references.items(), (":", "--", "-"), strict=True):
        left.axhline(value, color="#555555", linestyle=style, label=name)
    left.set(xlabel="guidance w", ylabel="exact value")
    left.legend(loc="center right", bbox_to_anchor=(1, 0.35))
    right.plot(WEIGHTS, gaps, "o-", color="#D55E00")
    right.set(xlabel="guidance w", ylabel="value gap by the critics")
    figure.savefig(path, dpi=90)


@cli.errors_in_one_line()
def main(updates: int = 4_000, seed: int = 0, picture: Path = Path("guidance.png")) -> None:
    """Train one conditioned flow, then print and draw its exact value over w.

    Args:
        updates: number of gradient updates.
        seed: seed of the MDP, the dataset, the initial weights and the batches.
        picture: the file that the picture is written to.
    """
    torch.set_num_threads(1)  # the networks are small: a second thread costs more than it gives
    mdp = MDP(seed)
    dataset = mdp.dataset(seed + 1)
    torch.manual_seed(seed)  # of the flow's noise
    dataset.print_notes()
    agent = make_agent(replace(CONFIG, updates=updates, seed=seed), dataset)
    OfflineTrainer(agent=agent, dataset=dataset, progress_bar=False).train()
    values, gaps = [], []
    for w in WEIGHTS:
        agent.actor.guidance = w
        values.append(mdp.value(probabilities(agent)))
        gap = evaluation.value_gap(
            policies.guided(agent.policy, w),
            dataset.transitions,
            critics=LossCritics(agent.loss),
            rows=2_000,
            deterministic=False,
        )
        gaps.append(gap.mean)
    references = {"the behaviour policy": mdp.value(mdp.logged)}
    references["it, given a positive advantage"] = mdp.value(mdp.positive())
    references["best possible"] = mdp.value(mdp.best())
    table = [["w", "exact value", "value gap"]]
    table += [
        [f"{w:g}", f"{value:.3f}", f"{gap:.3f}"]
        for w, value, gap in zip(WEIGHTS, values, gaps, strict=True)
    ]
    print(text_table(table) + "\n")
    print(text_table([[name, f"{value:.3f}"] for name, value in references.items()]))
    draw_picture(picture, values, gaps, references)
    print(f"\nThe picture is {picture}.")


if __name__ == "__main__":
    tyro.cli(main)
