"""Estimated and true gains of five policies, from many and from few episodes: choosing.png.

    python docs/pictures/choosing.py

The machine of the page ``choosing.md``: the observation is its wear, 0 to 4; an action runs it
(reward 1, or -6 where it fails, which wear makes more probable) or repairs it (-1). The true values
are exact. It takes a few seconds.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete
from matplotlib.figure import Figure
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from iql_torchrl import IQLConfig, IQLPopulation, OfflineDataset, load_dataset, rank_policies

FAILURE = np.array([0.0, 0.02, 0.08, 0.25, 0.5])  # probability of a failure, by wear
REPAIR = 0.2  # of the policy that makes the dataset
DISCOUNT = 0.95
TEMPERATURES = (0.0, 1.0, 3.0, 10.0)
CONFIG = IQLConfig(
    updates=400, hidden=(32,), discount=DISCOUNT, reward="raw", polyak=0.05,
    actor_lr=1e-2, critic_lr=1e-2, value_lr=1e-2,
)  # fmt: skip
COLOURS = {True: "#009E73", False: "0.45"}


def make_dataset(episodes: int, seed: int) -> OfflineDataset:
    draw, rows = np.random.default_rng(seed), []
    for episode in range(episodes):
        wear = int(draw.integers(5))
        for step in range(20):
            action, after, reward = int(draw.random() < REPAIR), wear, 1.0
            if action:
                after, reward = 0, -1.0
            elif draw.random() < FAILURE[wear]:
                after, reward = 0, -6.0
            elif draw.random() < 0.5:
                after = min(wear + 1, 4)
            rows.append((episode, wear, action, reward, after, step == 19))
            wear = after
    names = ("episode", "observation", "action", "reward", "next_observation", "truncated")
    columns = dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))
    return load_dataset(
        {**columns, "terminated": np.zeros(len(rows), bool)},
        observation_space=Discrete(5), action_space=Discrete(2),
    )  # fmt: skip


def true_value(repair: np.ndarray) -> float:
    """Exact discounted value of the policy that repairs with these probabilities, by wear."""
    fails, change = (1 - repair) * FAILURE, np.zeros((5, 5))
    wears = 0.5 * (1 - repair) * (1 - FAILURE)
    for wear in range(5):
        change[wear, 0] += repair[wear] + fails[wear]
        change[wear, min(wear + 1, 4)] += wears[wear]
        change[wear, wear] += wears[wear]
    reward = -repair - 6 * fails + 2 * wears
    return float(np.linalg.solve(np.eye(5) - DISCOUNT * change, reward).mean())


class NeverRepair(nn.Module):
    def forward(self, wear: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, -torch.inf]).expand(*wear.shape, 2)


def trained_candidates(train: OfflineDataset) -> dict[str, Any]:
    configs = [replace(CONFIG, temperature=temperature) for temperature in TEMPERATURES]
    population = IQLPopulation(configs, train)
    for _ in population.train(every=CONFIG.updates):
        pass
    result = {f"temperature {t:g}": population.member(n) for n, t in enumerate(TEMPERATURES)}
    result["never repair"] = ProbabilisticActor(
        TensorDictModule(NeverRepair(), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"], spec=train.action_spec, distribution_class=Categorical,
    )  # fmt: skip
    return result


def repair_probabilities(policy: Any) -> np.ndarray:
    states = TensorDict({"observation": torch.arange(5)}, [5])
    with torch.no_grad():
        return getattr(policy, "policy", policy).get_dist(states).probs[:, 1].double().numpy()


def main() -> None:
    torch.set_num_threads(1)
    behaviour = true_value(np.full(5, REPAIR))
    figure = Figure(figsize=(7.6, 3.3), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    candidates = trained_candidates(make_dataset(300, 1))
    truth = {
        name: true_value(repair_probabilities(m)) - behaviour for name, m in candidates.items()
    }
    names = list(candidates)[::-1]
    for axes, episodes in zip(panels, (300, 25), strict=True):
        parts = make_dataset(2 * episodes, 0).split(0.5, seed=0)
        ranking = rank_policies(candidates, *parts, discount=DISCOUNT)
        print(ranking, "\n")
        for row in ranking.rows:
            place = names.index(row["candidate"])
            colour = COLOURS[row["candidate"] == ranking.recommended]
            axes.plot(
                [row["gain_low"], row["gain_high"]], [place] * 2, color=colour, lw=5, alpha=0.5
            )
            axes.plot(row["gain"], place, "o", color=colour, ms=8)
            axes.plot(truth[row["candidate"]], place, "x", color="#D55E00", ms=6, mew=1.8)
        axes.axvline(0, color="0.2", lw=1)
        axes.set_title(
            f"{episodes} held-out episodes\nrecommended: {ranking.recommended or 'none'}",
            fontsize=10,
        )
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("gain over the dataset")
    panels[1].plot(
        [], [], "o-", color="0.45", lw=5, alpha=0.6, label="estimate, 95 % for all at once"
    )
    panels[1].plot([], [], "x", color="#D55E00", ms=6, mew=1.8, label="true gain")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)
    print(
        {name: round(gain, 2) for name, gain in truth.items()},
        "behaviour policy",
        round(behaviour, 2),
    )


if __name__ == "__main__":
    main()
