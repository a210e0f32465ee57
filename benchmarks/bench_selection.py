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
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iql_torchrl import (
    PRESETS,
    Agent,
    IQLConfig,
    IQLPopulation,
    OfflineDataset,
    load_dataset,
)
from iql_torchrl.data.builtin import BUILTIN, ensure_dataset
from iql_torchrl.data.builtin.icu_sepsis import NAME
from iql_torchrl.evaluation.statistics import rank_correlations
from iql_torchrl.files import whole_file
from iql_torchrl.selection import Ranking, fitted_q_evaluation, rank_members
from record import RESULTS, machine
from selection_truth import Levels, Truths, truths

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_sepsis import CONFIG, POINTS


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings of one kind of dataset for options that the command line does not give."""

    config: IQLConfig
    discount: float
    reward: Any
    temperatures: tuple[float, ...]
    expectiles: tuple[float, ...]
    fit: dict[str, Any]


def case_of(options: argparse.Namespace) -> Case:
    if options.dataset == NAME:
        # every stay ends, so the undiscounted value is the probability of survival
        return Case(
            config=replace(CONFIG, updates=2_000, batch_size=1024),
            discount=1.0,
            reward=(POINTS, 0.0),
            temperatures=(0.0, 0.5, 1.0, 2.0, 4.0),
            expectiles=(0.5, 0.8),
            fit={},  # few states: the equations of a table are solved exactly
        )
    config = replace(PRESETS[options.preset], updates=3_000)
    return Case(
        config=config,
        discount=config.discount,
        reward=config.reward,
        temperatures=(0.0, 1.0, 3.0, 10.0),
        expectiles=(0.5, 0.8),
        fit={"updates": 5_000, "batch_size": 512, "hidden": (128, 128), "lr": 1e-3},
    )


def configs_of(options: argparse.Namespace, case: Case) -> dict[str, IQLConfig]:
    """The members by name; expectiles make no difference to behaviour cloning."""
    chosen = {"updates": options.updates, "batch_size": options.batch_size}
    base = replace(case.config, **{name: value for name, value in chosen.items() if value})
    policies = {}
    for temperature in options.temperatures or case.temperatures:
        for expectile in (options.expectiles or case.expectiles) if temperature else [0.7]:
            for seed in range(options.seeds):
                name = f"IQL {temperature:g} {expectile:g}" if temperature else "cloning"
                policies[f"{name} #{seed}"] = replace(
                    base, seed=seed, temperature=temperature, expectile=expectile
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


def clocked(seconds: Levels, name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    seconds[name] = time.perf_counter() - began
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dataset", default=NAME, help="Minari id or file")
    add("--env", help="Gymnasium id, for files without one")
    add("--preset", default="quick", choices=list(PRESETS), help="of logs other than sepsis")
    add("--temperatures", type=float, nargs="+")
    add("--expectiles", type=float, nargs="+")
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
    case = case_of(options)
    configs = configs_of(options, case)
    chosen = {"updates": options.fit_updates, "hidden": options.hidden, "lr": options.lr}
    fit_options = case.fit | {name: value for name, value in chosen.items() if value is not None}
    source = ensure_dataset(options.dataset) if options.dataset in BUILTIN else options.dataset
    log = load_dataset(source, env=options.env, reward=case.reward, progress=False)
    if options.limit:
        log = log.split(options.limit / len(log.episode_lengths), seed=1)[0]
    own, fresh = log.split(0.5, seed=0)
    fit, held_out = fresh.split(0.5, seed=0)
    seconds: Levels = {}
    members = clocked(seconds, "training", lambda: train(configs, own, options))
    truths_by_kind, more = clocked(
        seconds, "truth", lambda: truths(members, log, case.discount, options.episodes)
    )
    results: dict[str, Any] = {}
    rankings: dict[str, Ranking] = {}
    for name, episodes in (("fresh", fit), ("own", own)):
        logs = (members, episodes, held_out)
        fit_members = partial(fitted_q_evaluation, *logs, discount=case.discount, **fit_options)
        fitted = clocked(seconds, f"fitting on {name} episodes", fit_members)
        rank = partial(rank_members, *logs, discount=case.discount, fitted_q=fitted)
        ranking = clocked(seconds, f"ranking with {name} episodes", rank)
        rankings[name] = ranking
        results[name] = {
            kind: quality(
                ranking,
                truth,
                ranking.log_value if level is None else level,
                returns=kind == "return",
            )
            for kind, (truth, level) in truths_by_kind.items()
        }
        print(f"\nFitted on {name} episodes\n\n{ranking}\n", flush=True)
    show(rankings, truths_by_kind)
    for name, result in results.items():
        print(f"\nfitted on {name} episodes: {json.dumps(result)}")
    levels = {key: more[key] for key in ("clinicians", "optimum") if key in more}
    print(f"\n{levels or ''} seconds {seconds}")
    versions = {"numpy": np.__version__, "threads": torch.get_num_threads()}
    versions |= {"icu-sepsis": version("icu-sepsis")} if options.dataset == NAME else {}
    record = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine() | versions,
        "config": asdict(next(iter(configs.values()))),
        "batches": options.batches,
        "fitted_q": fit_options | {"discount": case.discount},
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
    options.output.parent.mkdir(exist_ok=True)
    with whole_file(options.output) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
