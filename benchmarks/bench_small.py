"""Settings for small noisy datasets: returns of IQL, of behaviour cloning and of the behaviour policy.

    python benchmarks/bench_small.py
    python benchmarks/bench_small.py --task pendulum --only "small, temperature" --result small_pendulum

Glucose (``glucose.py``): 4 patients, 10 days each, 3,840 transitions; other patients in each of
five datasets. Pendulum: 2,000 transitions of ``pendulum/mixed-v0``, other episodes in each. Every
variant is one change of the preset ``small``, or the paper's settings. All policies act
deterministically on 100 new days of the same patients, or on 20 episodes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import glucose
from iql_torchrl import PRESETS
from study import Settings, Task, make_parser, pendulum, returns_task, run

import numpy as np

POINTS = (500, 1000, 2000, 5000, 10_000)  # updates after which runs are evaluated
DATASETS = 5


def at(name: str, temperatures: tuple[float, ...], **settings: object) -> dict[str, Settings]:
    """A variant for each temperature; 0 is behaviour cloning."""
    return {
        f"{name}, temperature {value:g}": {**settings, "temperature": value}
        for value in temperatures
    }


VARIANTS: Mapping[str, Settings] = {
    **at("small", (0.0, 0.3, 0.5, 1.0, 3.0)),
    **at("expectile 0.5", (1.0,), expectile=0.5),
    **at("expectile 0.9", (1.0,), expectile=0.9),
    **at("long", (0.0, 1.0, 3.0), updates=10_000),
    **at("dropout 0.1", (0.0, 1.0), dropout=0.1),
    **at("deterministic", (0.0, 1.0), policy="deterministic"),
    **at("tanh_normal", (0.0, 1.0), policy="tanh_normal"),
    **at("weight decay 0.1", (0.0, 1.0), optimizer="adamw", weight_decay=0.1),
    **at("positive", (1.0,), advantage_weight="positive"),
    **at(
        "paper", (0.0, 3.0), updates=10_000, hidden=(256, 256), actor_lr=3e-4, critic_lr=3e-4,
        value_lr=3e-4,
    ),
}  # fmt: skip


def glucose_task(seed: int, o: argparse.Namespace) -> Task:
    """``references``: the return of the controller's doses."""
    patients, who = glucose.Patients(4, seed), np.repeat(np.arange(4), 25)

    def value(controller: glucose.Controller) -> float:
        rewards = glucose.days(patients, who, controller, 10_000 + seed)["reward"]
        return float(rewards.sum(1).mean())

    return Task(
        data=glucose.dataset(patients, seed, reward="return_range"),
        config=PRESETS["small"],
        variants=VARIANTS,
        scores=lambda agent: [{"return": value(lambda seen, draw: np.asarray(agent.act(seen)))}],
        references={"behaviour policy": {"return": value(glucose.controller)}},
    )


def pendulum_task(seed: int, o: argparse.Namespace) -> Task:
    """Ten episodes of 200 steps; the reference is the return of the whole dataset."""
    whole, _ = pendulum()
    part, _ = whole.split(10 / len(whole.episode_returns), seed)
    return replace(returns_task(whole, PRESETS["small"], VARIANTS, 20, num_envs=20), data=part)


TASKS = {"glucose": glucose_task, "pendulum": pendulum_task}


def main() -> None:
    parser = make_parser(__doc__, "small", seeds=2)
    parser.add_argument("--task", choices=TASKS, default="glucose")
    parser.add_argument("--datasets", type=int, default=DATASETS)
    o = parser.parse_args()
    tasks = {f"{o.task} {n}": partial(TASKS[o.task], n) for n in range(o.datasets)}
    run(o, tasks, keys=("task", "variant", "updates"), points=POINTS)


if __name__ == "__main__":
    main()
