"""How well the ranking from logs alone knows which policy keeps most patients alive.

    python benchmarks/bench_selection.py
    python benchmarks/bench_selection.py --temperatures 0 0.5 2 --expectiles 0.7 --seeds 1 \\
        --updates 100 --fit-updates 500 --stays 4000 --output /tmp/selection.json

Trains behaviour cloning and IQL of several temperatures, expectiles and seeds on half of the
sepsis log, prices them by fitted Q evaluation and by weighted per-decision importance sampling on
the other half, and compares with each policy's exact survival. Fitted Q evaluation runs twice: on
episodes the members never saw, and on the members' own. Writes
benchmarks/results/selection_sepsis.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import gymnasium
import icu_sepsis  # noqa: F401  (registers the environment)
import numpy as np
import torch
from bench_learning import RESULTS, machine

from iql_torchrl import Agent, IQLConfig, OfflineDataset, load_dataset, make_agent
from iql_torchrl.correlation import kendall, spearman
from iql_torchrl.data.builtin import ensure_dataset
from iql_torchrl.data.builtin_icu_sepsis import ENVIRONMENT, NAME, SepsisTables
from iql_torchrl.fqe import fitted_q_evaluation
from iql_torchrl.ranking import Ranking
from iql_torchrl.records import whole_file
from iql_torchrl.selection import rank_members

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_sepsis import CONFIG, POINTS, probabilities

DISCOUNT = 1.0  # every stay ends: a value is the probability of survival


def train(options: argparse.Namespace, log: OfflineDataset) -> dict[str, Agent]:
    """The members by name; expectiles make no difference to behaviour cloning."""
    members = {}
    for temperature in options.temperatures:
        for expectile in options.expectiles if temperature else [CONFIG.expectile]:
            for seed in range(options.seeds):
                name = f"IQL {temperature:g} {expectile:g}" if temperature else "cloning"
                config = replace(
                    CONFIG,
                    seed=seed,
                    temperature=temperature,
                    expectile=expectile,
                    updates=options.updates,
                    batch_size=options.batch_size,
                )
                members[f"{name} #{seed}"] = trained(config, log)
    return members


def trained(config: IQLConfig, log: OfflineDataset) -> Agent:
    agent = make_agent(config, log)
    batches = log.device_sampler(config.batch_size, seed=config.seed)
    for _ in range(config.updates):
        agent.step(batches.sample())
    return agent


def quality(ranking: Ranking, exact: dict[str, float], clinicians: float) -> dict[str, object]:
    """Errors, rank correlations and regret of both estimators, and of what is recommended."""
    names = [row["member"] for row in ranking.rows]
    truth = np.array([exact[name] for name in names])
    shipped = clinicians if ranking.recommended is None else exact[ranking.recommended]
    result: dict[str, object] = {
        "recommended": ranking.recommended,
        "recommended_survival": shipped,
        "regret": float(truth.max() - shipped),
        "gain_over_clinicians": shipped - clinicians,
        "warnings": len(ranking.warnings),
    }
    for estimator in ("value", "importance_value"):
        found = np.array([row[estimator] for row in ranking.rows])
        result[estimator] = {
            "mean_absolute_error": float(np.abs(found - truth).mean()),
            "bias": float((found - truth).mean()),
            "spearman": spearman(found, truth),
            "kendall": kendall(found, truth),
            "regret_of_best": float(truth.max() - truth[np.nanargmax(found)]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0, 4.0])
    add("--expectiles", type=float, nargs="+", default=[0.5, 0.8])
    add("--seeds", type=int, default=2)
    add("--updates", type=int, default=2_000, help="of each member")
    add("--batch-size", type=int, default=1024, help="of each member")
    add("--fit-updates", type=int, default=5_000, help="of fitted Q evaluation")
    add("--hidden", type=int, nargs="*", default=[], help="widths of its critics; none: a table")
    add("--lr", type=float, default=1e-2, help="of its critics")
    add("--stays", type=int, help="use so many of the log's 20,000")
    add("--output", type=Path, default=RESULTS / "selection_sepsis.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    log = load_dataset(ensure_dataset(NAME), reward=(POINTS, 0.0), progress=False)
    if options.stays:
        log = log.split(options.stays / len(log.episode_lengths), seed=1)[0]
    tables = SepsisTables(gymnasium.make(ENVIRONMENT, disable_env_checker=True))
    clinicians, optimum = tables.value(tables.clinician), tables.optimal_value()
    own, fresh = log.split(0.5, seed=0)
    fit, held_out = fresh.split(0.5, seed=0)
    began = time.perf_counter()
    members = train(options, own)
    seconds = {"training": time.perf_counter() - began}
    exact = {
        name: tables.value(probabilities(agent, tables.admissible))
        for name, agent in members.items()
    }
    results, rankings = {}, {}
    for name, episodes in (("fresh", fit), ("own", own)):
        began = time.perf_counter()
        fitted = fitted_q_evaluation(
            members,
            episodes,
            held_out,
            discount=DISCOUNT,
            updates=options.fit_updates,
            batch_size=1024,
            hidden=options.hidden,
            lr=options.lr,
            polyak=0.05,
        )
        seconds[f"fitting on {name} episodes"] = time.perf_counter() - began
        began = time.perf_counter()
        ranking = rank_members(members, episodes, held_out, discount=DISCOUNT, fitted_q=fitted)
        seconds[f"ranking with {name} episodes"] = time.perf_counter() - began
        results[name], rankings[name] = quality(ranking, exact, clinicians), ranking
        print(f"\nFitted on {name} episodes\n\n{ranking}\n")
    print(f"{'member':14} {'exact':>7} {'fresh':>7} {'own':>7} {'importance':>11}")
    fits = {name: {row["member"]: row for row in r.rows} for name, r in rankings.items()}
    for name in sorted(exact, key=exact.__getitem__, reverse=True):
        row, other = fits["fresh"][name], fits["own"][name]
        print(f"{name:14} {exact[name]:7.4f} {row['value']:7.4f} {other['value']:7.4f} "
              f"{row['importance_value']:11.4f}")  # fmt: skip
    for name, result in results.items():
        print(f"\nfitted on {name} episodes: {json.dumps(result)}")
    print(f"\nclinicians {clinicians:.4f}, optimum {optimum:.4f}, seconds {seconds}")
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine() | {"icu-sepsis": version("icu-sepsis"), "numpy": np.__version__},
        "config": asdict(replace(CONFIG, updates=options.updates, batch_size=options.batch_size)),
        "stays": {"own": len(own.episode_lengths), "fresh": len(fit.episode_lengths),
                  "held_out": len(held_out.episode_lengths)},
        "clinicians": clinicians,
        "optimum": optimum,
        "exact": exact,
        "mean_of_members": float(np.mean(list(exact.values()))),
        "results": results,
        "rankings": {name: ranking.to_dict() for name, ranking in rankings.items()},
        "seconds": seconds,
    }  # fmt: skip
    options.output.parent.mkdir(exist_ok=True)
    with whole_file(options.output) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
