"""IQL, behaviour cloning and the log in two mazes, over several training seeds.

    python benchmarks/bench_pointmaze.py

Runs ``examples/iql_pointmaze.py``: one distant goal, to be reached by joining parts of drives (share
of episodes that reach it, and their steps), and the log's own task of random observed targets
(targets reached per episode; with fewer updates, because it is learned sooner).
Writes benchmarks/results/pointmaze.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from record import RESULTS, save

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_pointmaze import FIXED, MAZES, RANDOM, compare


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
                began = time.perf_counter()
                rows, *_ = compare(maze, task, replace(config, seed=seed), options.episodes)
                identity = {"task": task, "maze": maze, "seed": seed}
                runs += [identity | row for row in rows]
                seconds = time.perf_counter() - began
                shown = "; ".join(
                    " ".join(f"{v:.2f}" if isinstance(v, float) else v for v in row.values())
                    for row in rows
                )
                print(f"{task} {maze} seed {seed}: {shown} ({seconds:.0f} s)", flush=True)
    content = {
        "configs": {task: asdict(config) for task, config in configs.items()},
        "episodes": options.episodes,
        "summary": summarise(runs),
        "runs": [{k: v if isinstance(v, str) else float(v) for k, v in r.items()} for r in runs],
    }
    save(RESULTS / "pointmaze.json", content, packages=["gymnasium-robotics"])


def summarise(runs: list[dict]) -> list[dict]:
    """Means over seeds and the lowest and highest seed; printed as a table."""
    results = []
    for task, measures in {"fixed": ("reached", "steps"), "random": ("return",)}.items():
        for maze in MAZES:
            for method in ("log", "cloning", "IQL"):
                line = {"task": task, "maze": maze, "method": method}
                for measure in measures:
                    values = [
                        run[measure]
                        for run in runs
                        if (run["task"], run["maze"], run["method"]) == (task, maze, method)
                    ]
                    known = [value for value in values if np.isfinite(value)] or [np.nan]
                    line[measure] = float(np.mean(known))
                    line[f"{measure}_range"] = [float(min(known)), float(max(known))]
                    text = f"{measure} {line[measure]:.2f} ({min(known):.2f} to {max(known):.2f})"
                    print(f"{task:8} {maze:8} {method:8} {text}")
                results.append(line)
    return results


if __name__ == "__main__":
    main()
