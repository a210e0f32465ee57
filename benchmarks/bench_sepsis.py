"""Exact survival of discrete IQL from 20,000 logged stays, compared with IQL on the dataset's counts.

    python benchmarks/bench_sepsis.py

Trains with the settings of ``examples/iql_sepsis.py`` from several seeds, and prints how its
temperature was chosen: with the counts of the half of the stays that was not used for training.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from iql_torchrl import IQLConfig, OfflineDataset
from iql_torchrl.data.builtin.icu_sepsis import SepsisTables
from iql_torchrl.report import text_table
from study import make_parser, run, sepsis

import numpy as np
from tensordict import TensorDictBase

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from iql_sepsis import CONFIG, POINTS

TEMPERATURES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)


class Tabular(NamedTuple):
    """Values ``(S, A)`` (0 where the dataset has no such step), ``(S,)``, and the policy ``(S, A)``."""

    qvalue: np.ndarray
    value: np.ndarray
    policy: np.ndarray


def tabular_iql(rows: TensorDictBase, admissible: np.ndarray, config: IQLConfig) -> Tabular:
    """IQL's equations solved on the counts of the dataset.

    ``Q(s, a)`` is the mean of ``r + discount V(s')`` over the logged steps with that state and
    action, ``V(s)`` the expectile of ``Q(s, .)`` over the state's steps, the policy the dataset's
    frequencies times ``min(exp(temperature (Q - V)), max_weight)``, normalised. A state that the
    dataset never visits gets the uniform choice among ``admissible`` ``(S, A)``.
    """
    state, action = rows["observation"].numpy(), rows["action"].numpy()
    reward, ended = (rows["next", key].squeeze(-1).numpy() for key in ("reward", "terminated"))
    following = rows["next", "observation"].numpy()
    pair = state * admissible.shape[1] + action
    count = np.bincount(pair, minlength=admissible.size).reshape(admissible.shape)
    value, change = np.zeros(len(admissible)), np.inf
    while np.abs(change).max() >= 1e-9:
        target = reward + config.discount * ~ended * value[following]
        total = np.bincount(pair, target, admissible.size).reshape(admissible.shape)
        qvalue = total / np.maximum(count, 1)
        change = expectile(qvalue, count, config.expectile) - value
        value = value + change
    advantage = np.where(count > 0, qvalue - value[:, None], 0.0)
    # Limit the exponent too: the exponential could overflow.
    exponent = np.minimum(config.temperature * advantage, np.log(config.max_weight))
    policy = np.where(count.any(axis=1, keepdims=True), count * np.exp(exponent), admissible)
    return Tabular(qvalue, value, policy / policy.sum(axis=1, keepdims=True))


def expectile(values: np.ndarray, count: np.ndarray, level: float) -> np.ndarray:
    """Per row the ``level``-expectile of ``values`` counted ``count`` times; 0 for no counts."""
    result = np.full(len(values), -np.inf)
    while True:
        weight = count * np.where(values > result[:, None], level, 1 - level)
        better = (weight * values).sum(axis=1) / np.maximum(weight.sum(axis=1), 1e-300)
        if np.abs(better - result).max() < 1e-12:
            return better
        result = better


def priced(policy: np.ndarray, dataset: OfflineDataset, admissible: np.ndarray) -> float:
    """Survival of ``policy`` if the dynamics are the frequencies in ``dataset``.

    Treatments that ``dataset`` does not contain in a state are left out and the rest is renormalised;
    where none remains, the dataset's frequencies are used.
    """
    rows = dataset.transitions
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
    starts = np.r_[0, np.cumsum(dataset.episode_lengths)[:-1]]
    return float(value[state[starts]].mean())


def choose(dataset: OfflineDataset, tables: SepsisTables) -> list[dict[str, float]]:
    """Per temperature: survival of IQL on one half, estimated from the other half, and exactly."""
    first, second = dataset.split(0.5, seed=0)
    rows = []
    for temperature in TEMPERATURES:
        config = replace(CONFIG, temperature=temperature)
        policy = tabular_iql(first.transitions, tables.admissible, config).policy
        estimate = priced(policy, second, tables.admissible)
        exact = tables.value(policy)
        rows.append({"temperature": temperature, "other_half": estimate, "exact": exact})
    return rows


def main() -> None:
    o = make_parser(__doc__, "sepsis", seeds=5, updates=CONFIG.updates, points=20).parse_args()
    task = sepsis({"IQL": {}})
    dataset = task.data
    tables = SepsisTables(dataset.make_env())
    counts = tabular_iql(dataset.transitions, tables.admissible, CONFIG)
    taken = tuple(dataset.transitions[key].numpy() for key in ("observation", "action"))
    advantages = (counts.qvalue - counts.value[:, None])[taken]
    exact = {
        "random": tables.value(),
        "clinicians": tables.value(tables.clinician),
        "tabular": tables.value(counts.policy),
        "optimum": tables.optimal_value(),
    }
    more = {
        "exact": exact,
        "advantage_deviation": float(advantages.std()),  # over the dataset, in points of survival
        "temperatures": choose(dataset, tables),
    }
    run(o, {"ICU-Sepsis": lambda o: task}, batches="own", packages=["icu-sepsis"], **more)
    rows = [[f"{value:.4g}" for value in row.values()] for row in more["temperatures"]]
    print(text_table([list(more["temperatures"][0]), *rows]))
    print(text_table([["", "survival"], *([name, f"{exact[name]:.4f}"] for name in exact)]))


if __name__ == "__main__":
    main()
