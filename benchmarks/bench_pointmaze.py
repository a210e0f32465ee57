"""IQL, behaviour cloning and the dataset in two mazes, over several training seeds.

    python benchmarks/bench_pointmaze.py

Runs ``examples/iql_pointmaze.py``: one distant goal, to be reached by joining parts of drives (share
of episodes that reach it, and their steps), and the dataset's task of random observed targets
(targets reached per episode; with fewer updates, because it is learned sooner).
Writes benchmarks/results/pointmaze.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from iql_torchrl import IQLConfig, load_dataset
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.report import text_table
from record import place, save

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_pointmaze import FIXED, MAZES, fixed_goal, learn

# The log is good at this task, and advantages are fractions of a target instead of steps.
RANDOM = replace(FIXED, discount=0.99, expectile=0.7, temperature=10.0, reward="raw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3)
    add("--updates", type=int, default=FIXED.updates, help="with one far goal")
    add("--random-updates", type=int, default=4_000, help="with random targets")
    add("--episodes", type=int, default=20, help="of each evaluation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    configs = {
        "fixed": replace(FIXED, updates=options.updates),
        "random": replace(RANDOM, updates=options.random_updates),
    }
    runs = []
    for task, config in configs.items():
        for seed in range(options.seeds):
            for maze in MAZES:
                rows = compare(maze, task, replace(config, seed=seed), options.episodes)
                runs += [{"task": task, "maze": maze, "seed": seed} | row for row in rows]
    content = {
        "configs": {task: asdict(config) for task, config in configs.items()},
        "summary": summarise(runs),
        "runs": [{k: v if isinstance(v, str) else float(v) for k, v in r.items()} for r in runs],
    }
    save(place("pointmaze"), content, packages=["gymnasium-robotics"])


def compare(maze: str, task: str, config: IQLConfig, episodes: int) -> list[dict[str, Any]]:
    """The results of the dataset, of cloning and of IQL."""
    source = ensure_dataset(f"pointmaze/{maze}-v0")
    if task == "fixed":
        data, of_log = fixed_goal(load_dataset(source), maze)
    else:
        data = load_dataset(source, concatenate=["observation", "desired_goal"])
        of_log = {"return": data.episode_returns.mean()}
    rows = [{"method": "log", **of_log}]
    for method, played in learn(data, config, episodes).items():
        reached = played.returns > 0
        steps = played.lengths[reached].mean() if reached.any() else np.nan
        results = {"return": played.returns.mean(), "reached": reached.mean(), "steps": steps}
        rows.append({"method": method} | {name: results[name] for name in of_log})
    return rows


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds and the lowest and highest seed; printed as a table."""
    results, table = [], [["", "mean", "seeds"]]
    for task, maze, method in dict.fromkeys((r["task"], r["maze"], r["method"]) for r in runs):
        line = {"task": task, "maze": maze, "method": method}
        of_method = [r for r in runs if line.items() <= r.items()]
        for measure in ("reached", "steps") if task == "fixed" else ("return",):
            known = [r[measure] for r in of_method if np.isfinite(r[measure])] or [np.nan]
            line |= {measure: float(np.mean(known))}
            line |= {f"{measure}_range": [float(min(known)), float(max(known))]}
            seeds = f"{min(known):.2f} to {max(known):.2f}"
            table.append([f"{task} {maze} {method}: {measure}", f"{line[measure]:.2f}", seeds])
        results.append(line)
    print(text_table(table))
    return results


if __name__ == "__main__":
    main()
