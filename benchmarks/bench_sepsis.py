"""Exact survival of discrete IQL from 20,000 logged stays, compared with IQL on the log's counts.

    python benchmarks/bench_sepsis.py

Trains ``examples/iql_sepsis.py`` from several seeds, and prints how its temperature was chosen:
with the counts of the half of the stays that was not used for training.
Writes benchmarks/results/sepsis.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from iql_torchrl import OfflineDataset, load_dataset
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.data.builtin.icu_sepsis import ENVIRONMENT, NAME, SepsisTables
from record import RESULTS, save

import gymnasium
import icu_sepsis  # noqa: F401  (registers the environment)
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_sepsis import CONFIG, POINTS, tabular_iql, train

TEMPERATURES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)


def priced(policy: np.ndarray, log: OfflineDataset, admissible: np.ndarray) -> float:
    """Survival of ``policy`` if the dynamics are the frequencies in ``log``.

    Treatments that ``log`` does not contain in a state are left out and the rest is renormalised;
    where none remains, the log's own frequencies are used.
    """
    rows = log.transitions
    state, action = rows["observation"].numpy(), rows["action"].numpy()
    count = np.zeros(admissible.shape)
    np.add.at(count, (state, action), 1)
    chosen = np.where(count > 0, policy, 0.0)
    chosen = np.where(chosen.any(axis=1, keepdims=True), chosen, count)
    chosen /= np.maximum(chosen.sum(axis=1, keepdims=True), 1e-300)
    following = rows["next", "observation"].numpy()
    ended = rows["next", "terminated"].squeeze(-1).numpy()
    reward = rows["next", "reward"].squeeze(-1).numpy() / POINTS
    share = (chosen / np.maximum(count, 1))[state, action]
    value = np.zeros(len(admissible))
    while True:
        better = np.bincount(state, share * (reward + ~ended * value[following]), len(value))
        if np.abs(better - value).max() < 1e-9:
            break
        value = better
    starts = np.r_[0, np.cumsum(log.episode_lengths)[:-1]]
    return float(value[state[starts]].mean())


def choose(log: OfflineDataset, tables: SepsisTables) -> list[dict[str, float]]:
    """Per temperature: survival estimated from the training half, from the other half, and exactly."""
    first, second = log.split(0.5, seed=0)
    rows = []
    for temperature in TEMPERATURES:
        config = replace(CONFIG, temperature=temperature)
        half, full = (
            tabular_iql(part.transitions, tables.admissible, config).policy for part in (first, log)
        )
        row = {"temperature": temperature}
        row["priced_by_own_half"] = priced(half, first, tables.admissible)
        row["priced_by_other_half"] = priced(half, second, tables.admissible)
        row |= {"half_exact": tables.value(half), "whole_exact": tables.value(full)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=CONFIG.updates)
    options = parser.parse_args()
    torch.set_num_threads(1)
    log = load_dataset(ensure_dataset(NAME), reward=(POINTS, 0.0))
    tables = SepsisTables(gymnasium.make(ENVIRONMENT, disable_env_checker=True))
    counts = tabular_iql(log.transitions, tables.admissible, CONFIG)
    taken = tuple(log.transitions[key].numpy() for key in ("observation", "action"))
    advantages = (counts.qvalue - counts.value[:, None])[taken]
    exact = {
        "random": tables.value(),
        "clinicians": tables.value(tables.clinician),
        "tabular": tables.value(counts.policy),
        "optimum": tables.optimal_value(),
    }
    print(f"{'temperature':>11} {'own half':>9} {'other half':>11} {'exact':>7} {'all stays':>10}")
    temperatures = choose(log, tables)
    for row in temperatures:
        print("{:11.1f} {:9.4f} {:11.4f} {:7.4f} {:10.4f}".format(*row.values()))
    print("".join(f"\n{name:12} {level:.4f}" for name, level in exact.items()), flush=True)
    runs = []
    for seed in range(options.seeds):
        began = time.perf_counter()
        history = train(replace(CONFIG, seed=seed, updates=options.updates), log, tables)
        curve = [[row["update"], row["survival"]] for row in history]
        seconds = time.perf_counter() - began
        runs.append({"seed": seed, "survival": curve[-1][1], "seconds": seconds, "curve": curve})
        print(f"seed {seed}       {curve[-1][1]:.4f}  ({seconds:.0f} s)", flush=True)
    final = np.array([run["survival"] for run in runs])
    print(f"network      {final.mean():.4f}, lowest {final.min():.4f}; less tabular: "
          f"{final.mean() - exact['tabular']:+.4f}, {final.min() - exact['tabular']:+.4f}")  # fmt: skip
    result = {
        "config": asdict(replace(CONFIG, updates=options.updates)),
        "reward_map": [POINTS, 0.0],
        "stays": len(log.episode_returns),
        "steps": len(log),
        "exact": exact,
        "advantage_deviation": float(advantages.std()),  # over the log, in points of survival
        "temperatures": temperatures,
        "runs": runs,
    }
    save(RESULTS / "sepsis.json", result, packages=("icu-sepsis",))


if __name__ == "__main__":
    main()
