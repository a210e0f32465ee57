"""True values of bench_selection.py's members: exact on ICU-Sepsis, else means of episodes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iql_torchrl import Agent, OfflineDataset, evaluate
from iql_torchrl.data.builtin.icu_sepsis import NAME, SepsisTables

import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_sepsis import probabilities

EVALUATION_SEED = 10_000  # every member has the same initial states
LEFT = 0.01  # weight of the discounted rewards after the last step
Levels = dict[str, float]
Truths = dict[str, tuple[Levels, float | None]]


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
