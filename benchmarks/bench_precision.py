"""The effect of bfloat16 products on learning: returns on Pendulum, several seeds each.

    python benchmarks/bench_precision.py

Each precision trains one population with one run for each seed, on the same batches, and evaluates
the policy of each run from the same initial states. Writes benchmarks/results/precision.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_learning import machine
from iql_torchrl import IQLConfig, IQLPopulation, load_dataset
from iql_torchrl.data.builtin import ensure_dataset

RESULT = Path(__file__).parent / "results" / "precision.json"
RATES = {"actor_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3}


def measure(base: IQLConfig, dataset: Any, seeds: int, episodes: int) -> dict[str, Any]:
    population = IQLPopulation([replace(base, seed=seed) for seed in range(seeds)], dataset)
    began = time.perf_counter()
    for _ in population.train(every=1000):
        pass
    seconds = time.perf_counter() - began
    results = population.evaluate(dataset.make_env, episodes=episodes, seed=0)
    means = [float(evaluation.returns.mean()) for evaluation in results]
    error = statistics.stdev(means) / len(means) ** 0.5
    return {"returns": means, "mean": statistics.mean(means), "se": error, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=5)
    add("--updates", type=int, default=5000)
    add("--episodes", type=int, default=100)
    add("--device", default="cpu")
    options = parser.parse_args()
    dataset = load_dataset(ensure_dataset("pendulum/mixed-v0"), reward="return_range")
    base = IQLConfig(
        updates=options.updates,
        hidden=(64, 64),
        discount=0.97,
        device=options.device,
        compile=True,
        **RATES,
    )
    results = {
        name: measure(replace(base, precision=name), dataset, options.seeds, options.episodes)
        for name in ("float32", "bfloat16")
    }
    for name, row in results.items():
        print(f"{name:9} mean return {row['mean']:8.1f}  std. error over seeds {row['se']:5.1f}")
    record = {"command": "python " + " ".join(sys.argv), "machine": machine(), "results": results}
    temporary = RESULT.with_name(f".{RESULT.name}")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, RESULT)


if __name__ == "__main__":
    main()
