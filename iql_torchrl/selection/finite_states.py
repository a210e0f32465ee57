"""Recognition of logs with few distinct states and discrete actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDictBase

from iql_torchrl.data import OfflineDataset
from iql_torchrl.selection.episodes import (
    FloatArray,
    IntArray,
    states,
)

__all__ = ["FiniteStates", "finite_states"]

MAX_STATES, MAX_CATEGORIES = 5_000, 20_000
VISITS_PER_STATE = 10
PROBED_ROWS = 2_000


@dataclass(frozen=True)
class FiniteStates:
    """The S distinct states of two logs, and the state of each row.

    Attributes:
        representatives: one row of each state with the policies' inputs, batch ``(S,)``.
        train, train_next, held_out, held_out_next: state of each row before and after its step.
        num_actions: of the discrete action space.
    """

    representatives: TensorDictBase
    train: IntArray
    train_next: IntArray
    held_out: IntArray
    held_out_next: IntArray
    num_actions: int


def finite_states(train: OfflineDataset, held_out: OfflineDataset) -> FiniteStates | None:
    """The states of the logs if they are few and actions are discrete; otherwise None.

    Few means at most 5,000, each with 10 rows on average, or at most 20,000 categories. States
    differ if any observation key or the action mask differs.
    """
    if not isinstance(train.action_space, spaces.Discrete):
        return None
    tables = [
        states(log.transitions, following=following)
        for log in (train, held_out)
        for following in (False, True)
    ]
    category = isinstance(train.observation_space, spaces.Discrete)
    rows = len(train) + len(held_out)
    if not category:
        probed = _columns(tables[0][torch.linspace(0, len(train) - 1, PROBED_ROWS).long()])
        if len(np.unique(probed, axis=0)) > max(PROBED_ROWS // 2, 2):
            return None
    every, index = np.unique(
        np.concatenate([_columns(table) for table in tables]), axis=0, return_inverse=True
    )
    most = MAX_CATEGORIES if category else MAX_STATES
    if len(every) > most or (not category and len(every) > rows / VISITS_PER_STATE):
        return None
    joined = torch.cat(tables)
    index = index.reshape(-1)
    first = np.full(len(every), -1)
    first[index[::-1]] = np.arange(len(index))[::-1]
    before, after, held_out_before, held_out_after = np.split(
        index, np.cumsum([len(table) for table in tables])[:-1]
    )
    representatives = joined[torch.from_numpy(first)]
    actions = int(train.action_space.n)
    return FiniteStates(representatives, before, after, held_out_before, held_out_after, actions)


def _columns(table: TensorDictBase) -> FloatArray:
    """Every leaf as numbers, ``(N, D)``."""
    leaves = [
        table.get(key) for key in sorted(table.keys(include_nested=True, leaves_only=True), key=str)
    ]
    flat = [leaf.reshape(len(table), -1).double().cpu().numpy() for leaf in leaves]
    return np.concatenate(flat, axis=1)
