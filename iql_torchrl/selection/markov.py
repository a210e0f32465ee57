"""A test of the Markov property of a log with few states."""

from __future__ import annotations

import numpy as np

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.episodes import (
    LOG_PROB,
    FloatArray,
    episode_numbers,
    first_rows,
    raw_rewards,
    terminations,
)
from iql_torchrl.selection.finite_states import FiniteStates
from iql_torchrl.selection.table_model import TableModel

__all__ = ["history_statistics"]


def history_statistics(
    model: TableModel,
    held_out: OfflineDataset,
    finite: FiniteStates,
    fresh: FloatArray,
    discount: float,
    unknown_value: float,
) -> dict[str, float]:
    """How strongly held-out outcomes depend on more than state and action, as t statistics.

    The outcome of a step is ``r + discount V(s')``, V the value of the log's own policy. What is
    left of it after subtracting the mean of its state and action is uncorrelated with anything
    earlier if the states have the Markov property (Shi, Wan, Song, Lu, Leng 2020, "Does the Markov
    decision process fit the data", arXiv:2002.01751). Earlier things are tried, each also
    less its mean: the number of the step, what was left at the step before, the sum of the numbers
    of the actions before, the number of the episode, and where it is known the probability with
    which the action was chosen, which differs within a state only if the log's policy acted on
    something else. Episodes are the independent units. Each action has a statistic, because
    dependences of two actions may cancel; the greatest counts.
    """
    visited = model.count.sum(1)
    frequency = model.count / np.maximum(visited[:, None], 1)
    unknown = np.asarray(visited == 0, np.float64)
    value = model.solve(frequency, discount, unknown, np.full(len(visited), unknown_value)).value
    pair = finite.held_out * model.num_actions
    pair = pair + held_out.transitions["action"].reshape(-1).cpu().numpy()
    count = np.maximum(fresh.reshape(-1), 1)

    def less_mean(values: FloatArray) -> FloatArray:
        return np.asarray(values - (np.bincount(pair, values, len(count)) / count)[pair])

    outcome = raw_rewards(held_out)
    outcome += discount * ~terminations(held_out) * value[finite.held_out_next]
    left, number = less_mean(outcome), episode_numbers(held_out)
    first = first_rows(held_out)
    before = np.concatenate([[0.0], left[:-1]])
    before[first] = 0.0
    action = held_out.transitions["action"].reshape(-1).cpu().numpy()
    so_far = np.concatenate([[0], np.cumsum(action)])[:-1]
    earlier = {
        "the number of the step": np.arange(len(left)) - first[number],
        "the step before": before,
        "the actions before": so_far - so_far[first][number],
        "the number of the episode": number,
    }
    if LOG_PROB in held_out.transitions:
        logged = held_out.transitions[LOG_PROB].reshape(-1).double().cpu().numpy()
        earlier["the logged probability of the action"] = np.exp(np.minimum(logged, 0))
    result = {}
    place, size = number * model.num_actions + action, len(first) * model.num_actions
    for name, values in earlier.items():
        products = left * less_mean(np.asarray(values, np.float64))
        summed = np.bincount(place, products, size).reshape(len(first), -1)
        norm = np.sqrt(np.square(summed).sum(0))
        statistics = summed.sum(0) / np.maximum(norm, 1e-9 * max(np.abs(outcome).max(), 1e-300))
        result[name] = float(statistics[np.abs(statistics).argmax()])
    return result
