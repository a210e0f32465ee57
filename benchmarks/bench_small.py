"""Settings for small noisy datasets: returns of IQL, of behaviour cloning and of the behaviour policy.

    python benchmarks/bench_small.py
    python benchmarks/bench_small.py --task pendulum

Glucose (``glucose.py``): 4 patients, 10 days each, 3,840 transitions; other patients in each of
five datasets. Pendulum: 2,000 transitions of ``pendulum/mixed-v0``, other episodes in each. Every line
is one change of the paper's settings or of a small network. All policies act deterministically on
100 new days of the same patients, or on 20 episodes; returns are means over the seeds. Runs of one
group are a population with shared batches, so cloning (temperature 0) differs in its weights alone.
Writes benchmarks/results/small.json (small_pendulum.json) after each
dataset; other groups of an earlier run stay.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import glucose
from iql_torchrl import PRESETS, IQLConfig, IQLPopulation, OfflineDataset, evaluate, load_dataset
from iql_torchrl.data.builtin import ensure_dataset
from record import place, save

import numpy as np
import torch

Evaluate = Callable[[Any], float]  # an agent to its mean return
PAPER = IQLConfig(updates=10_000, reward="return_range", schedule="constant")
SMALL = PRESETS["small"]
PAIR = ((0.0, 0.7), (1.0, 0.7))
# group: its settings, numbers of updates, seeds, and the temperatures and expectiles of its runs
GROUPS: dict[str, tuple[IQLConfig, tuple[int, ...], int, tuple[tuple[float, float], ...]]] = {
    "small": (
        SMALL, (500, 1000, 2000), 2,
        (*((t, 0.7) for t in (0.0, 0.3, 0.5, 1.0, 3.0)), (1.0, 0.5), (1.0, 0.9)),
    ),
    "long": (SMALL, (5000, 10_000), 1, ((0.0, 0.7), (1.0, 0.7), (3.0, 0.7))),
    "preset": (SMALL, (2000,), 2, ((0.0, 0.7), (1.0, 0.7), (3.0, 0.7))),
    "dropout 0.1": (replace(SMALL, dropout=0.1), (2000,), 2, PAIR),
    "deterministic": (replace(SMALL, policy="deterministic"), (2000,), 2, PAIR),
    "tanh_normal": (replace(SMALL, policy="tanh_normal"), (2000,), 2, PAIR),
    "weight decay 0.1": (replace(SMALL, optimizer="adamw", weight_decay=0.1), (2000,), 2, PAIR),
    "positive": (replace(SMALL, advantage_weight="positive"), (2000,), 2, ((1.0, 0.7),)),
    "paper": (PAPER, (2000, 5000, 10_000), 1, ((0.0, 0.7), (3.0, 0.7))),
}  # fmt: skip


def glucose_task(seed: int) -> tuple[OfflineDataset, Evaluate, float]:
    """A dataset, the return of an agent's doses, and that of the controller's."""
    patients, who = glucose.Patients(4, seed), np.repeat(np.arange(4), 25)
    dataset = glucose.dataset(patients, seed, reward="return_range")

    def of(controller: glucose.Controller) -> float:
        rewards = glucose.days(patients, who, controller, 10_000 + seed)["reward"]
        return float(rewards.sum(1).mean())

    return (
        dataset,
        lambda agent: of(lambda seen, draw: np.asarray(agent.act(seen))),
        of(glucose.controller),
    )


def pendulum_task(seed: int) -> tuple[OfflineDataset, Evaluate, float]:
    """Ten episodes of 200 steps; the behaviour policy's return is that of the whole dataset."""
    whole = load_dataset(ensure_dataset("pendulum/mixed-v0"), reward="return_range")
    part, _ = whole.split(10 / len(whole.episode_returns), seed)
    run = partial(evaluate, make_env=whole.make_env, episodes=20, seed=10_000, num_envs=20)
    return (
        part,
        lambda agent: float(np.mean(run(agent.policy).returns)),
        float(np.mean(whole.episode_returns)),
    )


def returns(dataset: OfflineDataset, evaluated: Evaluate, group: str) -> dict[str, float]:
    """Mean return over seeds of each setting of a group after each number of updates."""
    config, updates, seeds, settings = GROUPS[group]
    configs = [
        replace(config, seed=seed, temperature=temperature, expectile=expectile)
        for temperature, expectile in settings
        for seed in range(seeds)
    ]
    population, result = IQLPopulation(configs, dataset), {}
    for end in updates:
        population.train_now(end - population.updates)
        each = [evaluated(population.member(number)) for number in range(len(configs))]
        for (temperature, expectile), value in zip(
            settings, np.reshape(each, (-1, seeds)).mean(1).tolist(), strict=True
        ):
            result[f"{group}, {end}, temperature {temperature:g}, {expectile:g}"] = value
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=("glucose", "pendulum"), default="glucose")
    parser.add_argument("--datasets", type=int, default=5)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = glucose_task if options.task == "glucose" else pendulum_task
    output = place("small", "" if options.task == "glucose" else options.task)
    results = json.loads(output.read_text())["returns"] if output.is_file() else {}
    for group in options.groups:
        began = time.perf_counter()
        for number in range(options.datasets):
            dataset, evaluated, behaviour = task(number)
            found = {"behaviour policy": behaviour} | returns(dataset, evaluated, group)
            for name, value in found.items():
                results.setdefault(name, {})[str(number)] = value
            save(output, {"returns": results})
            seconds = time.perf_counter() - began
            print(f"{group}, dataset {number} ({seconds:.0f} s)", flush=True)
        for name, values in results.items():
            if name.startswith((group, "behaviour")):
                print(f"{name:44}" + " ".join(f"{v:8.1f}" for v in values.values()), flush=True)


if __name__ == "__main__":
    main()
