"""How well a ranking from datasets alone identifies the best policy.

    python benchmarks/bench_selection.py
    python benchmarks/bench_selection.py --dataset pendulum/mixed-v0
    python benchmarks/bench_selection.py --dataset halfcheetah_medium.npz --env HalfCheetah-v5 \\
        --preset locomotion --updates 3000 --fit-updates 2000 --seeds 1 --episodes 5

Trains behaviour cloning and IQL of several temperatures, expectiles and seeds as one population on
half of a dataset, estimates their values by fitted Q evaluation (and, where it has the probabilities
of its actions, by weighted per-decision importance sampling) on the other half, and compares with the
true values: exact survival on ICU-Sepsis, discounted returns in the environment elsewhere. Fitted Q
evaluation runs twice: on episodes that no member was trained on, and on those of the training. Writes
benchmarks/results/selection_NAME.json.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from iql_torchrl import PRESETS, Agent, IQLConfig, OfflineDataset, evaluate, load_dataset
from iql_torchrl.data.builtin import ensure_source
from iql_torchrl.data.builtin.icu_sepsis import NAME, SepsisTables
from iql_torchrl.evaluation.statistics import rank_correlations, standard_error
from iql_torchrl.selection import Ranking, fitted_q_evaluation, rank_policies
from record import place, save
from study import EVALUATION_SEED, learn

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_sepsis import CONFIG, POINTS, probabilities

LEFT = 0.01  # weight of the discounted rewards after the last step
Levels = dict[str, float]


def configs_of(options: argparse.Namespace, config: IQLConfig) -> dict[str, IQLConfig]:
    """The members by name; expectiles make no difference to behaviour cloning."""
    policies = {}
    for temperature in options.temperatures:
        for expectile in options.expectiles if temperature else [0.7]:
            name = f"IQL {temperature:g} {expectile:g}" if temperature else "cloning"
            for seed in range(options.seeds):
                settings = {"seed": seed, "temperature": temperature, "expectile": expectile}
                policies[f"{name} #{seed}"] = replace(config, **settings)
    return policies


def train(configs: dict[str, IQLConfig], dataset: OfflineDataset) -> dict[str, Agent]:
    runs = [replace(config, compile=True) for config in configs.values()]
    agents = (agent for _, agent in learn(dataset, runs, [runs[0].updates]))
    return dict(zip(configs, agents, strict=True))


class Discounted(gymnasium.Wrapper):  # type: ignore[type-arg]
    """Rewards times ``discount ** t`` in step t of an episode."""

    def __init__(self, env: Any, discount: float) -> None:
        super().__init__(env)
        self.discount = discount

    def reset(self, **options: Any) -> Any:
        self.weight = 1.0
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        weight, self.weight = self.weight, self.weight * self.discount
        return observation, weight * float(reward), *rest


def played(
    agent: Agent, make_env: Callable[[], Any], discount: float, episodes: int
) -> tuple[float, float]:
    """Mean discounted return of ``agent``, and its standard error.

    Episodes continue after their time limit, until the weight of later rewards is below ``LEFT``.
    """

    def make() -> Any:
        env = make_env()
        horizon = math.ceil(math.log(LEFT) / math.log(discount))
        horizon = max(env.spec.max_episode_steps, horizon)
        return Discounted(gymnasium.wrappers.TimeLimit(env.unwrapped, horizon), discount)

    returns = evaluate(agent.policy, make, episodes=episodes, seed=EVALUATION_SEED).returns
    return float(returns.mean()), standard_error(returns)


def truths(
    members: dict[str, Agent], dataset: OfflineDataset, discount: float, episodes: int
) -> tuple[Levels, float | None, dict[str, Any]]:
    """Each member's true value, the behaviour policy's (None: by the ranking), and more to record."""
    if dataset.name == NAME:
        tables = SepsisTables(dataset.make_env())
        exact = {n: tables.value(probabilities(a, tables.admissible)) for n, a in members.items()}
        return exact, tables.value(tables.clinician), {"optimum": tables.optimal_value()}
    results = {n: played(a, dataset.make_env, discount, episodes) for n, a in members.items()}
    errors = {name: error for name, (_, error) in results.items()}
    more = {"standard_errors": errors, "episodes": episodes}
    return {name: value for name, (value, _) in results.items()}, None, more


def quality(ranking: Ranking, truth: Levels, behaviour: float) -> dict[str, Any]:
    """Errors, rank correlations and regret of both estimators, and of what is recommended.

    ``truth``: true value of each member; ``behaviour``: that of the behaviour policy.
    """
    names = [row["candidate"] for row in ranking.rows]
    true = np.array([truth[name] for name in names])
    shipped = behaviour if ranking.recommended is None else truth[ranking.recommended]
    result: dict[str, Any] = {
        "recommended": ranking.recommended,
        "truth_of_recommended": shipped,
        "best": names[int(true.argmax())],
        "truth_of_best": float(true.max()),
        "truth_of_behaviour": behaviour,
    }
    for estimator in ("value", "importance_value"):
        estimates = np.array([row[estimator] for row in ranking.rows])
        if np.isfinite(estimates).all():
            spearman, kendall = rank_correlations(estimates, true)
            result[estimator] = {
                "mean_absolute_error": float(np.abs(estimates - true).mean()),
                "bias": float((estimates - true).mean()),
                "spearman": spearman,
                "kendall": kendall,
                "regret_of_best": float(true.max() - true[estimates.argmax()]),
            }
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dataset", default=NAME, help="Minari id or file")
    add("--env", help="Gymnasium id, for files without one")
    add("--preset", default="quick", choices=list(PRESETS), help="of datasets other than sepsis")
    add("--temperatures", type=float, nargs="+")
    add("--expectiles", type=float, nargs="+", default=(0.5, 0.8))
    add("--seeds", type=int, default=2)
    add("--updates", type=int, help="of each member")
    add("--fit-updates", type=int, default=5_000, help="of fitted Q evaluation by networks")
    add("--episodes", type=int, default=50, help="played by each member")
    add("--limit", type=int, help="use so many of the episodes")
    add("--output", type=Path, help="benchmarks/results/selection_NAME.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if options.dataset == NAME:
        # Every stay ends, so the undiscounted value is the probability of survival, and states are
        # few, so the equations of a table are solved exactly.
        config, discount, reward, fit = replace(CONFIG, batch_size=1024), 1.0, (POINTS, 0.0), {}
        name, updates, temperatures = "sepsis", 2_000, (0.0, 0.5, 1.0, 2.0, 4.0)
    else:
        config = PRESETS[options.preset]
        discount, reward, temperatures = config.discount, config.reward, (0.0, 1.0, 3.0, 10.0)
        fit = {"batch_size": 512, "hidden": (128, 128), "lr": 1e-3, "updates": options.fit_updates}
        name = Path(options.dataset).stem if options.env else options.dataset
        name, updates = re.split("[^a-z0-9]", name)[0], 3_000
    options.temperatures = options.temperatures or temperatures
    configs = configs_of(options, replace(config, updates=options.updates or updates))
    source, how = ensure_source(options.dataset), {"discount": discount}
    dataset = load_dataset(source, env=options.env, reward=reward, progress=False)
    if options.limit:
        dataset = dataset.split(options.limit / len(dataset.episode_lengths), seed=1)[0]
    own, fresh = dataset.split(0.5, seed=0)
    fit_on, held_out = fresh.split(0.5, seed=0)
    members = train(configs, own)
    truth, level, more = truths(members, dataset, discount, options.episodes)
    results: dict[str, Any] = {}
    rankings: dict[str, Any] = {}
    for label, episodes in (("fresh", fit_on), ("own", own)):
        compared = (members, episodes, held_out)
        fitted = fitted_q_evaluation(*compared, **how, **fit)
        ranking = rank_policies(*compared, **how, fitted_q=fitted)
        rankings[label] = ranking.to_dict()
        behaviour = ranking.behaviour_value if level is None else level
        results[label] = quality(ranking, truth, behaviour)
        print(f"\nFitted on {label} episodes\n\n{ranking}\n\n{results[label]}\n", flush=True)
    print(f"true values: {truth}")
    parts = {"own": own, "fresh": fit_on, "held_out": held_out}
    record = {
        "config": asdict(next(iter(configs.values()))),
        "fitted_q": fit | how,
        "episodes": {name: len(part.episode_lengths) for name, part in parts.items()},
        "truth": more | {"values": truth},
        "results": results,
        "rankings": rankings,
    }
    save(options.output or place("selection", name), record, ("numpy", "icu-sepsis"))


if __name__ == "__main__":
    main()
