"""How often a recommendation from data alone is worse than the dataset, on problems with exact values.

    python benchmarks/bench_trust.py

Twenty families of small problems (``trust_families.py``), twenty seeds each. A seed draws a dataset to
fit on and a held-out dataset; ``rank_policies`` gets both, the candidates and the true probabilities of
the logged actions. Counted per family: harmful recommendations (true value below the behaviour
policy's), right ones (at least half of the best candidate's gain), no recommendation, how often the
bounds of all gains are correct, and regret. ``--networks`` fits networks instead of tables. Writes
benchmarks/results/trust.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from iql_torchrl import fitted_q_evaluation, rank_policies
from iql_torchrl.evaluation.statistics import wilson_interval
from record import place, save
from trust_families import FAMILIES, Problem

import numpy as np
import torch

CLOSE = 1e-9


def trial(problem: Problem, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One ranking, compared with the true values."""
    fit, held_out = problem.dataset(2 * seed), problem.dataset(2 * seed + 1)
    actors, how = problem.actors(), {"discount": problem.discount, "seed": seed}
    fitted = None
    if options.networks:
        fitted = fitted_q_evaluation(
            actors, fit, held_out, model="network", hidden=(64, 64), updates=options.updates,
            batch_size=256, **how,
        )  # fmt: skip
    ranking = rank_policies(actors, fit, held_out, fitted_q=fitted, **how)
    behaviour = problem.value(problem.behaviour)
    truth = {name: problem.value(table) for name, table in problem.candidates.items()}
    best = max(behaviour, *truth.values())
    value = behaviour if ranking.recommended is None else truth[ranking.recommended]
    covered = [
        row["gain_low"] <= truth[row["candidate"]] - behaviour + CLOSE
        and truth[row["candidate"]] - behaviour <= row["gain_high"] + CLOSE
        for row in ranking.rows
        if "extrapolation" not in row["caveats"]
    ]
    return {
        "recommended": ranking.recommended,
        "harmful": value < behaviour - CLOSE,
        "right": ranking.recommended is not None and value - behaviour >= (best - behaviour) / 2,
        "covered": all(covered),
        "regret": best - value,
        "possible": best - behaviour,
    }


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    count = len(trials)
    harmful, right = (sum(t[key] for t in trials) for key in ("harmful", "right"))
    return {
        "trials": count,
        "harmful": harmful,
        "harmful_interval": wilson_interval(harmful, count),
        "right": right,
        "right_interval": wilson_interval(right, count),
        "none": sum(t["recommended"] is None for t in trials),
        "covered": sum(t["covered"] for t in trials),
        "regret": float(np.mean([t["regret"] for t in trials])),
        "possible_gain": float(np.mean([t["possible"] for t in trials])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--networks", action="store_true", help="fit networks instead of tables")
    parser.add_argument("--updates", type=int, default=2000, help="of the networks")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    output = options.output or place("trust", "networks" if options.networks else "")
    titles = ("harmful", "right", "none", "covered", "regret", "possible_gain")
    results, began = {}, time.perf_counter()
    print(f"{'family':24}" + "".join(f"{title:>14}" for title in titles))
    for family in options.families:
        trials = [trial(FAMILIES[family](s), s, options) for s in range(options.seeds)]
        result = results[family] = summary(trials) | {"easy": FAMILIES[family](0).easy}
        numbers = "".join(f"{result[title]:14.3g}" for title in titles)
        print(f"{family:24}{numbers}" + "  easy" * result["easy"], flush=True)
    save(output, {"seconds": time.perf_counter() - began, "families": results})


if __name__ == "__main__":
    main()
