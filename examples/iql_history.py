"""Learn from a dataset without velocities: Pendulum, of which only the angle is seen.

One observation does not say in which direction the pendulum swings, so no policy that reads one can
swing it up reliably. Compared, over several seeds: a policy that reads one observation, one that reads
the last four joined into a vector, and, as a reference, one that sees the velocity.
"""

from dataclasses import replace

from iql_torchrl import PRESETS, OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.report import text_table

import numpy as np
import tyro
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformObservation


def without_velocity(dataset):
    """The same dataset with the first two columns of the observations: cosine and sine of the angle."""
    rows = dataset.transitions.clone()
    for side in (("observation",), ("next", "observation")):
        rows[side] = rows[side][:, :2].contiguous()
    space = Box(-1.0, 1.0, (2,), np.float32)
    return load_dataset(
        rows, env=lambda: TransformObservation(dataset.make_env(), lambda seen: seen[:2], space)
    )


@cli.errors_in_one_line()
def main(updates: int = 5_000, seeds: int = 3, episodes: int = 50) -> None:
    """Train each policy from each seed, evaluate it, and print a table.

    Args:
        updates: number of gradient updates of each policy.
        seeds: number of seeds, >= 1.
        episodes: episodes of each evaluation.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; expected at least 1.")
    full = load_dataset(ensure_dataset("pendulum/mixed-v0"), reward="return_range")
    full.print_notes()
    angles = without_velocity(full)
    one = replace(PRESETS["quick"], updates=updates)
    four = replace(one, history=4, history_encoder="stack")
    table = [["policy reads", "mean return", "worst seed", "best seed"]]
    table.append(["(the dataset)", f"{full.episode_returns.mean():.0f}", "", ""])
    for name, config, dataset in (
        ("angle", one, angles),
        ("last 4 angles", four, angles),
        ("angle and velocity", one, full),
    ):
        returns = []
        for seed in range(seeds):
            agent = make_agent(replace(config, seed=seed), dataset)
            OfflineTrainer(agent=agent, dataset=dataset, progress_bar=False).train()
            played = evaluate(agent.policy, dataset.make_env, episodes=episodes, seed=10_000)
            returns.append(played.returns.mean())
            print(f"  {name}, seed {seed}: {returns[-1]:.0f}", flush=True)
        table.append([name, *(f"{f(returns):.0f}" for f in (np.mean, min, max))])
    print("\n" + text_table(table))


if __name__ == "__main__":
    tyro.cli(main)
