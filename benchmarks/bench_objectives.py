"""Objectives of V, the weights of samples that go with them, and pessimism over critics, on three logs.

    python benchmarks/bench_objectives.py --task pendulum
    python benchmarks/bench_objectives.py --task pointmaze
    python benchmarks/bench_objectives.py --task sepsis

Every line of the table is trained from five seeds, all with the same batches; lines that differ only in
a number are one population. Means over seeds with Student's 95 % interval: of the return (pendulum),
of the share of episodes that reach the goal (pointmaze), of the exact probability of survival (sepsis).
Writes benchmarks/results/objectives_TASK.json; lines that this file has with equal settings are
not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from iql_torchrl import IQLConfig, IQLPopulation, OfflineDataset, evaluate, load_dataset
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.data.builtin.icu_sepsis import NAME, SepsisTables
from iql_torchrl.evaluation.statistics import mean_interval
from iql_torchrl.report import text_table
from record import place, save

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench_policies

import iql_sepsis

SEED = 10_000  # of the evaluations


class Task(NamedTuple):
    """A dataset, settings, the levels of alpha, and the score of an agent."""

    data: OfflineDataset
    config: IQLConfig
    alphas: tuple[float, ...]
    score: Callable[[Any], float]


def pendulum(episodes: int) -> Task:
    data, config = bench_policies.pendulum()
    config = replace(config, discount=0.95, polyak=0.02)  # values settle in fewer updates

    def score(agent: Any) -> float:
        played = evaluate(agent.policy, data.make_env, episodes=episodes, seed=SEED)
        return float(played.returns.mean())

    return Task(data, replace(config, updates=2500), (1.0, 5.0), score)


def pointmaze(episodes: int) -> Task:
    data, config = bench_policies.pointmaze()

    def score(agent: Any) -> float:
        played = evaluate(agent.policy, data.make_env, episodes=episodes, seed=SEED)
        return float((played.returns > 0).mean())

    return Task(data, replace(config, updates=2500, hidden=(64, 64)), (1.0, 5.0), score)


def sepsis(episodes: int) -> Task:
    data = load_dataset(ensure_dataset(NAME), reward=(iql_sepsis.POINTS, 0.0))
    tables = SepsisTables(data.make_env())
    config = replace(iql_sepsis.CONFIG, updates=1000, batch_size=512)

    def score(agent: Any) -> float:
        return tables.value(iql_sepsis.probabilities(agent, tables.admissible))

    return Task(data, config, (1.0, 5.0), score)


TASKS = {"pendulum": pendulum, "pointmaze": pointmaze, "sepsis": sepsis}


def lines(task: Task) -> list[dict[str, IQLConfig]]:
    """Populations: the configs of their lines, by name."""
    usual, several = task.config, replace(task.config, num_critics=4)

    def objective(name: str, weight: str) -> dict[str, IQLConfig]:
        """One line for each alpha; "exponential" with itself has EQL's weight, exp(A / alpha)."""
        configs = {}
        for alpha in task.alphas:
            own = {"value_objective": name, "alpha": alpha, "advantage_weight": weight}
            if name == "exponential" and weight == "exponential":
                own["temperature"] = 1 / alpha
            configs[f"{name}, {weight}, alpha {alpha:g}"] = replace(usual, **own)
        return configs

    return [
        {
            "cloning": replace(usual, temperature=0.0),
            **{f"expectile {level:g}": replace(usual, expectile=level) for level in (0.7, 0.9)},
        },
        {
            f"expectile 0.9, temperature {value:g}": replace(
                usual, expectile=0.9, temperature=value
            )
            for value in (0.2, 1.0)
        },
        {
            f"expectile {level:g}, positive": replace(
                usual, expectile=level, advantage_weight="positive"
            )
            for level in (0.7, 0.9)
        },
        objective("sparse", "positive"),
        objective("sparse", "sparse"),
        objective("exponential", "positive"),
        objective("exponential", "exponential"),
        objective("gumbel", "auto"),
        *(
            {f"4 critics, {name}": replace(several, pessimism=rho)}
            for name, rho in (("minimum", None), ("pessimism 0.5", 0.5), ("pessimism 1", 1.0))
        ),
    ]


def run(task: Task, configs: dict[str, IQLConfig], seeds: int) -> dict[str, list[float]]:
    """The score of each seed of each line, trained as one population."""
    runs = [replace(config, seed=seed) for config in configs.values() for seed in range(seeds)]
    population = IQLPopulation(runs, task.data)
    population.train_now()
    scores = [task.score(population.member(number)) for number in range(len(runs))]
    return {name: scores[i * seeds : (i + 1) * seeds] for i, name in enumerate(configs)}


def table(scores: dict[str, list[float]]) -> str:
    rows = [["", "mean", "95 % interval"]]
    for name, each in scores.items():
        mean, low, high = (float(x) for x in mean_interval(np.array(each)))
        rows.append([name, f"{mean:.4g}", f"{low:.4g} to {high:.4g}"])
    return text_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--task", choices=TASKS, required=True)
    add("--updates", type=int, help="gradient updates of each run (the task's)")
    add("--seeds", type=int, default=5)
    add("--episodes", type=int, default=20, help="episodes of each evaluation")
    o = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    task = TASKS[o.task](o.episodes)
    if o.updates is not None:
        task = task._replace(config=replace(task.config, updates=o.updates))
    path, settings = place("objectives", o.task), task.config.to_dict()
    saved = json.loads(path.read_text()) if path.exists() else {}
    usable = saved.get("config") == settings
    before: dict[str, list[float]] = saved["scores"] if usable else {}
    spent = saved["processor_seconds"] if usable else 0.0
    scores: dict[str, list[float]] = {}
    for configs in lines(task):
        known = configs.keys() <= before.keys()
        scores |= {n: before[n] for n in configs} if known else run(task, configs, o.seeds)
        print(f"{list(scores)[-1]}: {time.process_time() - start:.0f} s", flush=True)
    result = {
        "config": settings,
        "log": float(task.data.episode_returns.mean()),
        "processor_seconds": spent + time.process_time() - start,
        "scores": scores,
    }
    save(path, result)
    print(f"\n{table(scores)}")


if __name__ == "__main__":
    main()
