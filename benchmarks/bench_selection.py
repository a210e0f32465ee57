"""How well a ranking from logs alone identifies the best policy.

    python benchmarks/bench_selection.py
    python benchmarks/bench_selection.py --dataset pendulum/mixed-v0
    python benchmarks/bench_selection.py --dataset halfcheetah_medium.npz --env HalfCheetah-v5 \\
        --preset locomotion --updates 3000 --fit-updates 2000 --seeds 1 --episodes 5

Trains behaviour cloning and IQL of several temperatures, expectiles and seeds as one population on
half of a log, estimates their values by fitted Q evaluation (and, where the log has the probabilities
of its actions, by weighted per-decision importance sampling) on the other half, and compares with the
true values: exact survival on ICU-Sepsis, discounted returns in the environment elsewhere. Fitted Q
evaluation runs twice: on episodes that no member was trained on, and on those of the training. Writes
benchmarks/results/selection_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from iql_torchrl import (
    PRESETS,
    Agent,
    IQLConfig,
    IQLPopulation,
    OfflineDataset,
    evaluate,
    load_dataset,
)
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.data.builtin.icu_sepsis import NAME, SepsisTables
from iql_torchrl.evaluation.statistics import rank_correlations
from iql_torchrl.selection import Ranking, fitted_q_evaluation, rank_members
from record import RESULTS, save

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_sepsis import CONFIG, POINTS, probabilities

EVALUATION_SEED = 10_000  # every member has the same initial states
LEFT = 0.01  # weight of the discounted rewards after the last step
Levels = dict[str, float]
Truths = dict[str, tuple[Levels, float | None]]


def defaults(options: argparse.Namespace) -> None:
    """Fill in what the command line does not give: ``config``, ``discount``, ``reward``, ``fit``.

    On ICU-Sepsis every stay ends, so the undiscounted value is the probability of survival, and
    states are few, so the equations of a table are solved exactly.
    """
    sepsis = options.dataset == NAME
    config = CONFIG if sepsis else PRESETS[options.preset]
    options.config = replace(
        config,
        updates=options.updates or (2_000 if sepsis else 3_000),
        batch_size=options.batch_size or (1024 if sepsis else config.batch_size),
    )
    options.discount = 1.0 if sepsis else config.discount
    options.reward = (POINTS, 0.0) if sepsis else config.reward
    usual = (0.0, 0.5, 1.0, 2.0, 4.0) if sepsis else (0.0, 1.0, 3.0, 10.0)
    options.temperatures = options.temperatures or usual
    networks = {"updates": 5_000, "batch_size": 512, "hidden": (128, 128), "lr": 1e-3}
    chosen = {"updates": options.fit_updates, "hidden": options.hidden, "lr": options.lr}
    options.fit = {} if sepsis else networks
    options.fit |= {name: value for name, value in chosen.items() if value is not None}


def configs_of(options: argparse.Namespace) -> dict[str, IQLConfig]:
    """The members by name; expectiles make no difference to behaviour cloning."""
    policies = {}
    for temperature in options.temperatures:
        for expectile in options.expectiles if temperature else [0.7]:
            for seed in range(options.seeds):
                name = f"IQL {temperature:g} {expectile:g}" if temperature else "cloning"
                policies[f"{name} #{seed}"] = replace(
                    options.config, seed=seed, temperature=temperature, expectile=expectile
                )
    return policies


def train(
    configs: dict[str, IQLConfig], log: OfflineDataset, options: argparse.Namespace
) -> dict[str, Agent]:
    runs = [replace(config, compile=options.captured) for config in configs.values()]
    population = IQLPopulation(runs, log, batches=options.batches)
    for event in population.train(every=max(1, runs[0].updates // 10)):
        print(f"\rupdate {event.updates:,}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {name: population.member(number) for number, name in enumerate(configs)}


class Counted(gymnasium.Wrapper):  # type: ignore[type-arg]
    """Appends to ``results`` each episode's return up to its own limit, and its discounted return."""

    def __init__(self, env: Any, discount: float, limit: int, results: list[Any]) -> None:
        super().__init__(env)
        self.discount, self.limit, self.results = discount, limit, results

    def reset(self, **options: Any) -> Any:
        self.steps, self.total, self.value = 0, 0.0, 0.0
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        result = super().step(action)
        self.total += float(result[1]) * (self.steps < self.limit)
        self.value += float(result[1]) * self.discount**self.steps
        self.steps += 1
        if result[2] or result[3]:
            self.results.append((self.total, self.value))
        return result


def played(members: dict[str, Agent], make_env: Callable[[], Any], discount: float,
           episodes: int) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Per member: mean discounted return, its standard error, and mean return.

    Episodes continue after their time limit, until the weight of later rewards is below ``LEFT``.
    """
    truth = {}
    for name, agent in members.items():
        results: list[tuple[float, float]] = []

        def make(results: list[Any] = results) -> Any:
            env = make_env()
            limit = env.spec.max_episode_steps
            horizon = max(limit, math.ceil(math.log(LEFT) / math.log(discount)))
            longer = gymnasium.wrappers.TimeLimit(env.unwrapped, horizon)
            return Counted(longer, discount, limit, results)

        evaluate(agent.policy, make, episodes=episodes, seed=EVALUATION_SEED)
        returns, values = np.array(results).T
        error = float(values.std(ddof=1) / math.sqrt(episodes)) if episodes > 1 else None
        truth[name] = {"value": values.mean(), "standard_error": error, "return": returns.mean()}
    return truth


def truths(
    members: dict[str, Agent], log: OfflineDataset, discount: float, episodes: int
) -> tuple[Truths, dict[str, Any]]:
    """Per kind of truth, each member's and the log's own (None: by the ranking), and a record."""
    if log.name == NAME:
        tables = SepsisTables(log.make_env())
        exact = {n: tables.value(probabilities(a, tables.admissible)) for n, a in members.items()}
        clinicians = tables.value(tables.clinician)
        more = {"clinicians": clinicians, "optimum": tables.optimal_value(), "exact": exact}
        return {"survival": (exact, clinicians)}, more
    results = played(members, log.make_env, discount, episodes)
    values, returns = (
        {n: float(row[key]) for n, row in results.items()} for key in ("value", "return")
    )
    more = {"played": results, "episodes": episodes}
    return {"value": (values, None), "return": (returns, float(log.episode_returns.mean()))}, more


def quality(ranking: Ranking, truth: Levels, log: float, *, returns: bool) -> dict[str, Any]:
    """Errors, rank correlations and regret of both estimators, and of what is recommended.

    ``truth``: true value of each member; ``log``: that of the policy that made the log. Errors are
    not computed for undiscounted returns (``returns``), which have another scale than values.
    """
    names = [row["member"] for row in ranking.rows]
    true = np.array([truth[name] for name in names])
    shipped = log if ranking.recommended is None else truth[ranking.recommended]
    result: dict[str, Any] = {
        "recommended": ranking.recommended,
        "truth_of_recommended": shipped,
        "best": names[int(true.argmax())],
        "truth_of_best": float(true.max()),
        "regret": float(true.max() - shipped),
        "gain_over_the_log": shipped - log,
        "warnings": len(ranking.warnings),
    }
    for estimator in ("value", "importance_value"):
        estimates = np.array([row[estimator] for row in ranking.rows])
        if np.isfinite(estimates).all():
            error = {
                "mean_absolute_error": float(np.abs(estimates - true).mean()),
                "bias": float((estimates - true).mean()),
            }
            spearman, kendall = rank_correlations(estimates, true)
            result[estimator] = ({} if returns else error) | {
                "spearman": spearman,
                "kendall": kendall,
                "regret_of_best": float(true.max() - true[estimates.argmax()]),
            }
    return result


def show(rankings: dict[str, Ranking], truths: Truths) -> None:
    print(f"{'member':18}" + "".join(f"{k:>11}" for k in (*truths, *rankings, "import.")))
    fits = [{row["member"]: row for row in ranking.rows} for ranking in rankings.values()]
    first = next(iter(truths.values()))[0]
    for name in sorted(first, key=first.__getitem__, reverse=True):
        numbers = [level[name] for level, _ in truths.values()]
        numbers += [fit[name]["value"] for fit in fits] + [fits[0][name]["importance_value"]]
        print(f"{name:18}" + "".join(f"{number:11.4g}" for number in numbers))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dataset", default=NAME, help="Minari id or file")
    add("--env", help="Gymnasium id, for files without one")
    add("--preset", default="quick", choices=list(PRESETS), help="of logs other than sepsis")
    add("--temperatures", type=float, nargs="+")
    add("--expectiles", type=float, nargs="+", default=(0.5, 0.8))
    add("--seeds", type=int, default=2)
    add("--updates", type=int, help="of each member")
    add("--batch-size", type=int, help="of each member")
    add("--batches", choices=("shared", "own"), default="shared", help="of the members")
    add("--captured", action=argparse.BooleanOptionalAction, default=True)
    add("--fit-updates", type=int, help="of fitted Q evaluation")
    add("--hidden", type=int, nargs="*", help="widths of its critics; none: a table")
    add("--lr", type=float, help="of its critics")
    add("--episodes", type=int, default=50, help="played by each member")
    add("--limit", type=int, help="use so many of the log's episodes")
    add("--output", type=Path, help="benchmarks/results/selection_NAME.json")
    options = parser.parse_args()
    if options.output is None:
        name = re.split("[^a-z0-9]", Path(options.dataset).stem if options.env else options.dataset)
        options.output = (
            RESULTS / f"selection_{'sepsis' if options.dataset == NAME else name[0]}.json"
        )
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    defaults(options)
    configs, how = configs_of(options), {"discount": options.discount}
    source = ensure_source(options.dataset)
    log = load_dataset(source, env=options.env, reward=options.reward, progress=False)
    if options.limit:
        log = log.split(options.limit / len(log.episode_lengths), seed=1)[0]
    own, fresh = log.split(0.5, seed=0)
    fit, held_out = fresh.split(0.5, seed=0)
    clock = [("", time.perf_counter())]  # (what ended, when)

    def ended(name: str) -> None:
        clock.append((name, time.perf_counter()))

    members = train(configs, own, options)
    ended("training")
    truths_by_kind, more = truths(members, log, options.discount, options.episodes)
    ended("truth")
    results: dict[str, Any] = {}
    rankings: dict[str, Ranking] = {}
    for name, episodes in (("fresh", fit), ("own", own)):
        logs = (members, episodes, held_out)
        fitted = fitted_q_evaluation(*logs, **how, **options.fit)
        ended(f"fitting on {name} episodes")
        ranking = rankings[name] = rank_members(*logs, **how, fitted_q=fitted)
        ended(f"ranking with {name} episodes")
        results[name] = {}
        for kind, (truth, level) in truths_by_kind.items():
            log_level = ranking.log_value if level is None else level
            results[name][kind] = quality(ranking, truth, log_level, returns=kind == "return")
        print(f"\nFitted on {name} episodes\n\n{ranking}\n", flush=True)
    seconds = {name: now - before for (_, before), (name, now) in pairwise(clock)}
    show(rankings, truths_by_kind)
    for name, result in results.items():
        print(f"\nfitted on {name} episodes: {json.dumps(result)}")
    print(
        f"\nclinicians {more.get('clinicians')}, optimum {more.get('optimum')}; seconds {seconds}"
    )
    record = {
        "threads": torch.get_num_threads(),
        "config": asdict(next(iter(configs.values()))),
        "batches": options.batches,
        "fitted_q": options.fit | how,
        "episodes": {"own": len(own.episode_lengths), "fresh": len(fit.episode_lengths),
                     "held_out": len(held_out.episode_lengths)},
        "truth": more,
        "mean_of_members": {
            kind: float(np.mean(list(truth.values()))) for kind, (truth, _) in truths_by_kind.items()
        },
        "results": results,
        "rankings": {name: ranking.to_dict() for name, ranking in rankings.items()},
        "seconds": seconds,
    }  # fmt: skip
    save(options.output, record, ("numpy", "icu-sepsis") if options.dataset == NAME else ("numpy",))


if __name__ == "__main__":
    main()
