"""The empirical model of a log with few states, and values of policies in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import scipy.stats

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.episodes import (
    FloatArray,
    IntArray,
    first_rows,
    raw_rewards,
    terminations,
)

__all__ = ["TableModel", "TableSolution"]


class TableModel:
    """Mean rewards and transition frequencies per state and action of a log, and its starts."""

    def __init__(self, log: OfflineDataset, before: IntArray, after: IntArray, size: int) -> None:
        action = log.transitions["action"].reshape(-1).cpu().numpy()
        self.states, self.num_actions = size, int(log.action_space.n)  # type: ignore[attr-defined]
        pairs = size * self.num_actions
        pair = before * self.num_actions + action
        count = np.bincount(pair, minlength=pairs).astype(np.float64)
        self.count = count.reshape(size, self.num_actions)
        self.episodes = len(log.episode_lengths)
        each = np.maximum(count, 1)
        self.reward = np.bincount(pair, raw_rewards(log), pairs) / each
        going = ~terminations(log)
        self.following = scipy.sparse.csr_matrix(
            (1 / each[pair[going]], (pair[going], after[going])), shape=(pairs, size)
        )
        self.start = np.bincount(before[first_rows(log)], minlength=size) / self.episodes

    def solve(
        self, policy: FloatArray, discount: float, stop: FloatArray, stop_value: FloatArray
    ) -> TableSolution:
        """Values of ``policy`` ``(S, A)``, whose rows sum to ``1 - stop``.

        With probability ``stop`` ``(S,)`` the episode stops in a state with the return
        ``stop_value``.
        """
        size, pairs = self.following.shape[1], self.following.shape[0]
        row = np.repeat(np.arange(size), self.num_actions)
        choose = scipy.sparse.csr_matrix(
            (policy.reshape(-1), (row, np.arange(pairs))), shape=(size, pairs)
        )
        steps = scipy.sparse.identity(size) - discount * (choose @ self.following)
        factors = scipy.sparse.linalg.splu(steps.tocsc())
        value = factors.solve(choose @ self.reward + stop * stop_value)
        action_value = self.reward + discount * (self.following @ value)
        return TableSolution(factors, value, action_value.reshape(size, -1))


@dataclass(frozen=True)
class TableSolution:
    factors: scipy.sparse.linalg.SuperLU
    value: FloatArray  # (S,)
    action_value: FloatArray  # (S, A)

    def visits(self, start: FloatArray) -> FloatArray:
        """Discounted visits of each state per episode; ``start`` ``(S,)``: first-state distribution."""
        result: FloatArray = self.factors.solve(start, trans="T")
        return result
