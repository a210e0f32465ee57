"""Which settings let one policy reach every cell of a maze from every other, learned from random steps.

    python benchmarks/bench_goal_maze.py

The maze, its dataset of 300 walks of 60 steps and the exact distances are those of
``tests/goal_maze.py`` (33 cells, 1,056 pairs, the largest distance is 13). ``all`` has every change of
``CHANGES``; the other variants leave out one of them, or all. A seed is that of the dataset and of the
run. The score is the share of pairs that the policy connects within twice the largest distance.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from iql_torchrl import Agent, IQLConfig
from iql_torchrl.data import GoalOrigins
from study import Row, Task, make_parser, play, run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from goal_maze import LARGE, Maze, walks

CONFIG = IQLConfig(
    batch_size=256, hidden=(64, 64), critic_lr=3e-3, value_lr=3e-3, actor_lr=3e-3, discount=0.9,
    expectile=0.95, temperature=20.0, polyak=0.05, reward="raw", updates=6_000,
)  # fmt: skip
POLICY_GOALS, VALUE_GOALS = "the policy's goals half at random", "the values' goals 0.1, 0.3, 0.6"
#: by name, settings of the config
CHANGES: dict[str, dict[str, Any]] = {
    POLICY_GOALS: {},
    VALUE_GOALS: {},
    "discount 0.95": {"discount": 0.95},
    "two layers of 128": {"hidden": (128, 128)},
    "cosine for all rates": {"schedule": "cosine"},
}
VARIANTS = {
    "none": (),
    "all": tuple(CHANGES),
    **{f"all but {name}": tuple(n for n in CHANGES if n != name) for name in CHANGES},
}


def task_of(variant: str, seed: int, o: argparse.Namespace) -> Task:
    changes = VARIANTS[variant]
    settings = {key: value for name in changes for key, value in CHANGES[name].items()}
    goals: dict[str, Any] = {"discount": settings.get("discount", CONFIG.discount)}
    if VALUE_GOALS in changes:
        goals |= {"current": 0.1, "future": 0.3, "random": 0.6}
    if POLICY_GOALS in changes:
        goals["actor"] = GoalOrigins(0.0, 0.5, 0.5, discount=None)
    data = walks(LARGE, episodes=300, steps=60, seed=seed).relabelled(**goals)
    steps = Maze(LARGE).distances()
    cells = range(len(steps))
    pairs = [{"start": s, "goal": g} for s in cells for g in cells if s != g]
    how = {"num_envs": 64, "max_steps": 2 * int(steps.max()), "goals": pairs}

    def scores(agent: Agent) -> list[Row]:
        played = play(agent.policy, data, len(pairs), **how)
        return [{"reached": float(played.goal_success_rates.mean())}]

    variants = {variant: {**settings, "seed": seed}}
    return Task(data=data, config=CONFIG, variants=variants, scores=scores)


def main() -> None:
    parser = make_parser(__doc__, "goal_maze", updates=CONFIG.updates)
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23], dest="each_seed")
    parser.set_defaults(seeds=1)  # of each task
    o = parser.parse_args()
    tasks = {
        f"{variant}, seed {seed}": partial(task_of, variant, seed)
        for variant in VARIANTS
        for seed in o.each_seed
    }
    run(o, tasks, keys=("variant",))


if __name__ == "__main__":
    main()
