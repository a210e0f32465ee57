"""What V becomes with each objective of V, beside the exact values, on a dataset of a small world.

An observation is a number x in [0, 1]; the dataset chose one of five actions, each equally often; every
episode has one step, so Q(x, a) is the reward. The exact V at x then is the minimiser of the mean loss
over the five rewards, which SciPy finds without gradients. Draws objectives.png in the current folder.
"""

from dataclasses import replace

from iql_torchrl import IQLConfig, IQLPopulation, functional, load_dataset
from iql_torchrl.config import cli

import gymnasium
import matplotlib
import numpy as np
import torch
import tyro
from scipy.optimize import minimize_scalar
from tensordict import TensorDict

matplotlib.use("agg")
import matplotlib.pyplot as plt

ROWS, SHOWN = 20_000, np.linspace(0, 1, 41)
CONFIG = IQLConfig(
    batch_size=512, hidden=(64, 64), reward="raw", schedule="cosine", actor_lr=1e-3, critic_lr=3e-3,
    value_lr=3e-3, standardise=False, polyak=0.05,
)  # fmt: skip
#: objective: its levels (of ``expectile`` or ``alpha``), and its loss of errors at a level
OBJECTIVES = {
    "expectile": ((0.5, 0.7, 0.95), lambda e, level: functional.expectile_loss(e, expectile=level)),
    "sparse": ((0.02, 0.1, 0.3), lambda e, level: functional.sparse_loss(e, alpha=level)),
    # the factor that keeps exp small is left out: it would change with the prediction
    "exponential": ((0.2, 0.5, 2.0), lambda e, level: (e / level).exp() - e / level - 1),
}


class World(gymnasium.Env):
    """Only the spaces are needed."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(5)


def rewards(x):
    """Of the five actions at ``x`` ``(N,)``: ``(N, 5)``. Which action is best depends on x."""
    return np.cos(2 * np.pi * (x[:, None] - np.arange(5) / 5)) + 0.5 * x[:, None]


def make_dataset(seed):
    generator = np.random.default_rng(seed)
    x, action = generator.random(ROWS), generator.integers(0, 5, ROWS)
    columns = {
        "observation": x[:, None].astype(np.float32),
        "action": action,
        "reward": rewards(x)[np.arange(ROWS), action].astype(np.float32),
        "next_observation": x[:, None].astype(np.float32),
        "terminated": np.ones(ROWS, bool),
        "truncated": np.zeros(ROWS, bool),
    }
    return load_dataset(columns, env=World)


def exact_values(loss, level):
    """The minimiser of the mean loss at each x of ``SHOWN``."""
    each = torch.from_numpy(rewards(SHOWN))
    return np.array(
        [
            minimize_scalar(
                lambda v, q=q: float(loss(q - v, level).mean()),
                bounds=(float(q.min()), float(q.max())),
                method="bounded",
            ).x
            for q in each
        ]
    )


def learned_values(population, number):
    """V of one run at ``SHOWN``."""
    loss = population.member(number).loss
    batch = TensorDict({"observation": torch.from_numpy(SHOWN[:, None]).float()}, [len(SHOWN)])
    with torch.no_grad(), loss.value_network_params.to_module(loss.value_network):
        return loss.value_network(batch)["state_value"].squeeze(-1).numpy()


@cli.errors_in_one_line()
def main(updates: int = 2_000, seed: int = 0) -> None:
    """Train one population for each objective, and print and draw its values.

    Args:
        updates: number of gradient updates.
        seed: of the dataset, the initial weights and the batches.
    """
    dataset = make_dataset(seed)
    dataset.print_notes()
    best, mean = rewards(SHOWN).max(1), rewards(SHOWN).mean(1)
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, (name, (levels, loss)) in zip(panels, OBJECTIVES.items(), strict=True):
        setting = "expectile" if name == "expectile" else "alpha"
        config = replace(CONFIG, value_objective=name, updates=updates, seed=seed)
        population = IQLPopulation(
            [replace(config, **{setting: level}) for level in levels], dataset
        )
        population.train_now()
        axis.plot(SHOWN, best, ":", color="0.4", label="best action")
        axis.plot(SHOWN, mean, "--", color="0.4", label="mean over actions")
        for number, (level, colour) in enumerate(zip(levels, plt.cm.tab10.colors, strict=False)):
            exact, learned = exact_values(loss, level), learned_values(population, number)
            error = np.abs(learned - exact)
            print(
                f"{name}, {setting} {level}: V off by {error.mean():.3f}, at most {error.max():.3f}"
            )
            axis.plot(SHOWN, exact, color=colour, label=f"{setting} {level:g}")
            axis.plot(SHOWN[::4], learned[::4], "o", color=colour, markersize=4)
        axis.set(title=name, xlabel="x", ylim=(-0.1, 2.2))
        axis.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("V: exact (line), learned (points)")
    figure.savefig("objectives.png", dpi=88)
    print("Written: objectives.png")


if __name__ == "__main__":
    tyro.cli(main)
