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

    The outcome of a step is ``r + discount V(s')``, V the value of the log's own policy. Its
    residual is the outcome minus the mean of its state and action. If the states have the Markov
    property, residuals are uncorrelated with everything earlier (Shi, Wan, Song, Lu, Leng 2020,
    "Does the Markov decision process fit the data", arXiv:2002.01751). Tested, each also minus its
    mean: the number of the step, the residual of the step before, the sum of the numbers of earlier
    actions, the number of the episode, and if it is known the probability with which the action was
    chosen, which differs within a state only if the log's policy used more than the state. Episodes
    are the independent units. Each action has its own statistic, because opposite dependences of
    two actions would cancel; the one with the largest magnitude is returned.
    """
    visited = model.count.sum(1)
    frequency = model.count / np.maximum(visited[:, None], 1)
    unknown = np.asarray(visited == 0, np.float64)
    value = model.solve(frequency, discount, unknown, np.full(len(visited), unknown_value)).value
    pair = finite.held_out * model.num_actions
    pair = pair + held_out.transitions["action"].reshape(-1).cpu().numpy()
    count = np.maximum(fresh.reshape(-1), 1)

    def minus_mean(values: FloatArray) -> FloatArray:
        return np.asarray(values - (np.bincount(pair, values, len(count)) / count)[pair])

    outcome = raw_rewards(held_out)
    outcome += discount * ~terminations(held_out) * value[finite.held_out_next]
    residual, number = minus_mean(outcome), episode_numbers(held_out)
    first = first_rows(held_out)
    before = np.concatenate([[0.0], residual[:-1]])
    before[first] = 0.0
    action = held_out.transitions["action"].reshape(-1).cpu().numpy()
    so_far = np.concatenate([[0], np.cumsum(action)])[:-1]
    earlier = {
        "the number of the step": np.arange(len(residual)) - first[number],
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
        products = residual * minus_mean(np.asarray(values, np.float64))
        summed = np.bincount(place, products, size).reshape(len(first), -1)
        norm = np.sqrt(np.square(summed).sum(0))
        statistics = summed.sum(0) / np.maximum(norm, 1e-9 * max(np.abs(outcome).max(), 1e-300))
        result[name] = float(statistics[np.abs(statistics).argmax()])
    return result
