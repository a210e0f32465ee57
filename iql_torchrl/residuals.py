"""One-step errors of fitted critics on a log: how large they are, and on which side they lie."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl.data import OfflineDataset
from iql_torchrl.members import horizon, powers, states
from iql_torchrl.regression import Layers, Regression, Steps

__all__ = ["optimism", "td_error"]

FloatArray = NDArray[np.float64]

ERROR_ROWS, OPTIMISM_ROWS = 20_000, 100_000
TABLE_BYTES = 2**31


def td_error(data: Regression, layers: Layers, log: OfflineDataset) -> FloatArray:
    """Mean square over at most ERROR_ROWS evenly spaced steps, ``(P,)``, raw units squared."""
    total = torch.zeros(len(data.members), dtype=torch.float64)
    rows = _spaced(log, ERROR_ROWS)
    for part in rows.split(4096):
        total += _errors(data, layers, log, part).square().sum(-1)
    return (total / len(rows)).numpy() * data.unit**2


def optimism(
    data: Regression, layers: Layers, log: OfflineDataset
) -> tuple[FloatArray, FloatArray]:
    """How much too high the members' values look on a log the critics have not seen, and its error.

    ``-H sum_i w_i d_i / sum_i w_i`` with ``d = r + discount * E Q(s', .) - Q(s, a)``, steps weighted
    by ``w = discount**t pi(a|s)``, H the mean of ``sum_t discount**t`` over episodes: a value is off
    by what its critic is off at each step along the way. Whatever the weights, it is 0 for the true
    Q. For continuous actions a Gaussian kernel of the log's spread stands for ``pi(a|s)``. Both
    ``(P,)``, raw units; the error is a standard error. NaN where no logged action has weight.
    """
    sums = torch.zeros(5, len(data.members), dtype=torch.float64)
    decay = torch.from_numpy(powers(log, data.discount))
    rows = _spaced(log, OPTIMISM_ROWS)
    for part in rows.split(4096):
        error = _errors(data, layers, log, part)
        weight = _likeness(data, log, part) * decay[part]
        square = weight.square()
        terms = (weight, weight * error, square, square * error, square * error.square())
        sums += torch.stack([term.sum(-1) for term in terms])
    total, weighted, square, crossed, errors = sums
    mean = weighted / total
    variance = (errors - 2 * mean * crossed + mean.square() * square).clamp(min=0) / total.square()
    scale = horizon(log, data.discount) * data.unit
    return (-mean * scale).numpy(), (variance.sqrt() * scale).numpy()


def _errors(data: Regression, layers: Layers, log: OfflineDataset, rows: Tensor) -> Tensor:
    """Target less value, the live critics on both sides: float64 ``(P, rows)``."""
    steps = Steps(data, log, rows, TABLE_BYTES)
    every = torch.arange(len(rows), device=data.device)
    return (steps.target(layers, every) - steps.value(layers, every)).double().cpu()


def _likeness(data: Regression, log: OfflineDataset, rows: Tensor) -> Tensor:
    """How much each member would do what was logged, ``(P, rows)`` in [0, 1]."""
    table = log.transitions[rows]
    chosen = torch.stack([data.choose(member, states(table)) for member in data.members])
    action = table["action"]
    if data.discrete:
        index = action.reshape(1, -1, 1).expand(len(chosen), -1, 1)
        return chosen.gather(-1, index).squeeze(-1).double().cpu()
    chosen, action = (data.scale(x.to(data.device)) for x in (chosen, action.float()))
    distance = (chosen - action.unsqueeze(1)).square().mean(-1)
    return (-distance / 2).exp().mean(-1).double().cpu()


def _spaced(log: OfflineDataset, most: int) -> Tensor:
    return torch.linspace(0, len(log) - 1, min(len(log), most), dtype=torch.float64).round().long()
