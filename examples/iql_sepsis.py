"""Treatment of sepsis from clinicians' decisions: discrete IQL, with survival computed exactly.

The dataset (``icu-sepsis/clinician-v0``): 20,000 stays of about 9 steps, 716 patient states, 25
treatments of which about 3 are admissible in a state, reward 1 for survival at the end and 0 else.
The simulator's dynamics are known, so a policy's probability of survival is a linear solve, without
sampling; training never sees them.

How the reward scaling and the temperature were chosen. One treatment changes survival little: over the
dataset, advantages have a standard deviation of 0.016. The paper's temperature of 3 would give such a
treatment the weight exp(3 * 0.016) = 1.05, which is cloning. Rewards times 100 make values
percentage points of survival, of a size that Adam's usual learning rates suit, advantages 1.6 points.
The temperature, 2 per point, comes from the dataset alone: solve IQL's equations on the counts of half
of the stays, and estimate the policy's survival from the counts of the other half. That estimate is
0.783 at temperature 0, 0.810 at 0.5, 0.816 at 1, 0.817 at 2 and 0.818 beyond;
benchmarks/bench_sepsis.py prints it.
"""

import sys
from dataclasses import replace
from pathlib import Path

from iql_torchrl import Agent, IQLConfig, OfflineDataset, OfflineTrainer, load_dataset, make_agent
from iql_torchrl.config import cli
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.data.builtin.icu_sepsis import NAME, SepsisTables
from iql_torchrl.data.builtin.recipes import import_for_recipe
from iql_torchrl.report import text_table
from iql_torchrl.trainers.command_line import new_folder

import numpy as np
import torch
import tyro
from tensordict import TensorDict

POINTS = 100.0  # of survival probability
CONFIG = IQLConfig(
    updates=2_500,
    # States have very unequal frequencies: large batches reduce the noise of the rare ones.
    batch_size=2048,
    # Stays are short and always terminate, so almost no discount is needed.
    discount=0.999,
    expectile=0.7,
    temperature=2.0,
    # One layer on one-hot states is a table with shared features.
    hidden=(64,),
    # Values start at 0 and must rise to 80 points: higher learning rates, faster targets than usual.
    actor_lr=1e-2,
    critic_lr=1e-2,
    value_lr=1e-2,
    polyak=0.05,
    schedule="cosine",
)


def probabilities(agent: Agent, admissible: np.ndarray) -> np.ndarray:
    """The policy as a table ``(S, A)``."""
    states = torch.arange(len(admissible))
    columns = {"observation": states, "action_mask": torch.from_numpy(admissible)}
    batch = TensorDict(columns, batch_size=[len(states)], device=agent.config.device)
    with torch.no_grad():
        table = agent.policy.get_dist(batch).probs.double().cpu().numpy()
    return table / table.sum(axis=1, keepdims=True)


def train(config: IQLConfig, dataset: OfflineDataset, tables: SepsisTables, folder: Path) -> float:
    """The exact survival of a new agent after its training; at twenty points of it in ``folder``."""
    agent = make_agent(config, dataset)

    def survival() -> dict[str, float]:
        return {"survival": tables.value(probabilities(agent, tables.admissible))}

    OfflineTrainer(
        agent=agent,
        dataset=dataset,
        replay_buffer=dataset.device_sampler(config.batch_size, seed=config.seed),
        evaluation=survival,
        monitor="survival",
        eval_interval=max(1, config.updates // 20),
        folder=folder,
    ).train()
    return survival()["survival"]


@cli.errors_in_one_line()
def main(updates: int = CONFIG.updates, seed: int = 0) -> None:
    """Train, and compare the exact survival with the clinicians' and the best possible.

    Args:
        updates: number of gradient updates.
        seed: seed of the initial weights and of the batches.
    """
    config = replace(CONFIG, updates=updates, seed=seed)
    import_for_recipe("icu_sepsis", NAME)  # registers the environment
    dataset = load_dataset(ensure_dataset(NAME), reward=(POINTS, 0.0))
    dataset.print_notes()
    tables = SepsisTables(dataset.make_env())
    folder = new_folder(Path("runs"), "sepsis", sys.argv)
    levels = {
        "random treatments": tables.value(),
        "clinicians": tables.value(tables.clinician),
        "IQL": train(config, dataset, tables, folder),
        "optimum": tables.optimal_value(),
    }
    print("\nexact probability of survival")
    print(text_table([[name, f"{level:.4f}"] for name, level in levels.items()]))
    print(f"\nWritten to {folder}/")


if __name__ == "__main__":
    tyro.cli(main)
