"""Load a dataset, build an agent, train it, and evaluate its policy."""

import sys
from functools import partial
from pathlib import Path

from iql_torchrl import IQLConfig, OfflineTrainer, evaluate, load_dataset, make_agent
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.trainers.command_line import new_folder


def main(updates: int = 5000, episodes: int = 20) -> float:
    dataset = load_dataset(ensure_dataset("pendulum/mixed-v0"), reward="return_range")
    dataset.print_notes()

    rates = {"actor_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3}
    agent = make_agent(IQLConfig(updates=updates, hidden=(64, 64), **rates), dataset)

    evaluation = partial(evaluate, agent.policy, dataset.make_env, episodes=episodes, seed=0)
    folder = new_folder(Path("runs"), "train", sys.argv)
    OfflineTrainer(agent=agent, dataset=dataset, evaluation=evaluation, folder=folder).train()

    result = evaluation().summary()
    print(f"the dataset: mean return {dataset.episode_returns.mean():.1f}. Written to {folder}/")
    print(f"IQL: {result['return_mean']:.1f}, standard error {result['return_standard_error']:.1f}")
    return result["return_mean"]


if __name__ == "__main__":
    main()
