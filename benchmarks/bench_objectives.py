"""Objectives of V with their weights of samples, and pessimism over critics, on three datasets.

    python benchmarks/bench_objectives.py --task pendulum
    python benchmarks/bench_objectives.py --task pointmaze
    python benchmarks/bench_objectives.py --task sepsis

Five seeds of every variant, all with the same batches. Scores: the return (pendulum), the share of
episodes that reach the goal (pointmaze), the exact probability of survival (sepsis).
Writes benchmarks/results/objectives_TASK.json; with --keep, variants that this file has with equal
settings are not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace

from iql_torchrl import Agent
from study import (
    Row,
    Settings,
    Task,
    make_parser,
    pendulum,
    play,
    pointmaze,
    returns_task,
    run,
    sepsis,
)

ALPHAS = (1.0, 5.0)


def of_alphas(objective: str, weight: str) -> dict[str, Settings]:
    """A variant for each alpha; "exponential" with itself has EQL's weight, exp(A / alpha)."""
    variants = {}
    for alpha in ALPHAS:
        own = {"value_objective": objective, "alpha": alpha, "advantage_weight": weight}
        if objective == weight == "exponential":
            own["temperature"] = 1 / alpha
        variants[f"{objective}, {weight}, alpha {alpha:g}"] = own
    return variants


VARIANTS: Mapping[str, Settings] = {
    "cloning": {"temperature": 0.0},
    **{f"expectile {level:g}": {"expectile": level} for level in (0.7, 0.9)},
    **{
        f"expectile 0.9, temperature {value:g}": {"expectile": 0.9, "temperature": value}
        for value in (0.2, 1.0)
    },
    **{
        f"expectile {level:g}, positive": {"expectile": level, "advantage_weight": "positive"}
        for level in (0.7, 0.9)
    },
    **of_alphas("sparse", "positive"),
    **of_alphas("sparse", "sparse"),
    **of_alphas("exponential", "positive"),
    **of_alphas("exponential", "exponential"),
    **of_alphas("gumbel", "auto"),
    "4 critics, minimum": {"num_critics": 4},
    "4 critics, pessimism 0.5": {"num_critics": 4, "pessimism": 0.5},
    "4 critics, pessimism 1": {"num_critics": 4, "pessimism": 1.0},
}


def pendulum_task(o: argparse.Namespace) -> Task:
    data, config = pendulum()
    # values settle in fewer updates
    config = replace(config, discount=0.95, polyak=0.02, updates=2500)
    return returns_task(data, config, VARIANTS, o.episodes)


def pointmaze_task(o: argparse.Namespace) -> Task:
    data, config = pointmaze()

    def scores(agent: Agent) -> list[Row]:
        return [{"reached": float((play(agent.policy, data, o.episodes).returns > 0).mean())}]

    config = replace(config, updates=2500, hidden=(64, 64))
    return Task(data=data, config=config, variants=VARIANTS, scores=scores)


def sepsis_task(o: argparse.Namespace) -> Task:
    task = sepsis(VARIANTS)
    return replace(task, config=replace(task.config, updates=1000, batch_size=512))


TASKS = {"pendulum": pendulum_task, "pointmaze": pointmaze_task, "sepsis": sepsis_task}


def main() -> None:
    parser = make_parser(__doc__, "objectives", seeds=5, updates=None, episodes=20)
    parser.add_argument("--task", choices=TASKS, required=True)
    o = parser.parse_args()
    o.result, o.tasks = f"{o.result}_{o.task}", [o.task]
    run(o, TASKS)


if __name__ == "__main__":
    main()
