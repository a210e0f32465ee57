"""Which settings let one policy reach every cell of a maze from every other, learned from random steps.

    python benchmarks/bench_goal_maze.py

The maze, its log of 300 walks of 60 steps and the exact distances are those of ``tests/goal_maze.py``
(33 cells, 1,056 pairs, the largest distance is 13). ``all`` has every change of ``CHANGES``; the other
lines leave out one of them, or all. Seed s is that of the dataset and of the run. Writes
benchmarks/results/goal_maze.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from iql_torchrl import IQLConfig, OfflineTrainer, evaluate, make_agent
from iql_torchrl.data import GoalOrigins
from iql_torchrl.report import text_table
from record import in_processes, place, save

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
LINES = {
    "none": (),
    "all": tuple(CHANGES),
    **{f"all but {name}": tuple(n for n in CHANGES if n != name) for name in CHANGES},
}


def run(line: str, seed: int, updates: int) -> dict[str, Any]:
    """The share of pairs that the policy connects within twice the largest distance."""
    made = LINES[line]
    settings = {key: value for name in made for key, value in CHANGES[name].items()}
    config = replace(CONFIG, seed=seed, updates=updates, **settings)
    goals: dict[str, Any] = {"discount": config.discount}
    if VALUE_GOALS in made:
        goals |= {"current": 0.1, "future": 0.3, "random": 0.6}
    if POLICY_GOALS in made:
        goals["actor"] = GoalOrigins(0.0, 0.5, 0.5, discount=None)
    data = walks(LARGE, episodes=300, steps=60, seed=seed).relabelled(**goals)
    agent = make_agent(config, data)
    OfflineTrainer(agent=agent, dataset=data, progress_bar=False).train()
    steps = Maze(LARGE).distances()
    pairs = [
        {"start": s, "goal": g} for s in range(len(steps)) for g in range(len(steps)) if s != g
    ]
    limit = 2 * int(steps.max())
    how = {"episodes": len(pairs), "num_envs": 64, "seed": 0, "max_steps": limit}
    played = evaluate(agent.policy, data.make_env, goals=pairs, **how)
    reached = float(played.goal_success_rates.mean())
    print(f"{line}, seed {seed}: {reached:.1%}", flush=True)
    return {"line": line, "seed": seed, "reached": reached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23])
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--updates", type=int, default=CONFIG.updates)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    o = parser.parse_args()
    jobs = [(line, seed, o.updates) for line in o.lines for seed in o.seeds]
    runs = in_processes(run, jobs, o.workers)
    save(place("goal_maze"), {"updates": o.updates, "runs": runs})
    rows = [["", *(f"seed {seed}" for seed in o.seeds)]]
    for line in o.lines:
        rows.append([line, *(f"{r['reached']:.1%}" for r in runs if r["line"] == line)])
    print(f"\n{text_table(rows)}")


if __name__ == "__main__":
    main()
