"""Episodes of a log in offline evaluation: first and last rows, returns, discounts, truncations."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict import TensorDictBase

from iql_torchrl.data import OfflineDataset
from iql_torchrl.descriptions import describe_space

__all__ = [
    "LOG_PROB",
    "check_logs",
    "episode_numbers",
    "first_rows",
    "horizon",
    "last_rows",
    "open_ended",
    "powers",
    "raw_rewards",
    "return_range",
    "returns_to_go",
    "states",
    "terminations",
]

FloatArray = NDArray[np.float64]
LOG_PROB = "action_log_prob"
IntArray = NDArray[np.int64]


def check_logs(train: OfflineDataset, held_out: OfflineDataset, discount: float) -> None:
    """Raise ``ValueError`` unless both are logs of one task and ``discount`` is in [0, 1]."""
    if isinstance(discount, bool) or not 0 <= discount <= 1:
        raise ValueError(f"discount is {discount!r}; it must lie in [0, 1].")
    for name in ("observation_space", "action_space"):
        one, other = getattr(train, name), getattr(held_out, name)
        if one != other:
            raise ValueError(
                f"{name} of train is {describe_space(one)} and of held_out {describe_space(other)}; "
                "expected two parts of one log: "
                "dataset.split(fraction, seed) gives them."
            )
    space = train.action_space
    if not isinstance(space, spaces.Discrete) and not (
        isinstance(space, spaces.Box) and len(space.shape) == 1
    ):
        raise ValueError(
            f"the actions are {describe_space(space)}; expected Discrete, or a Box of shape (A,)."
        )


def states(rows: TensorDictBase, *, following: bool = False) -> TensorDictBase:
    """The inputs of a policy in ``rows`` ``(N,)``: observations, and masks where the data have them.

    ``following``: those after the step. Masks that forbid every action, as they may after a
    termination, become all true, because no action is taken there.
    """
    table = rows["next"] if following else rows
    table = table.select("observation", "action_mask", strict=False).copy()
    if following and "action_mask" in table:
        mask = table["action_mask"]
        table["action_mask"] = mask | ~mask.any(-1, keepdim=True)
    return table


def first_rows(log: OfflineDataset) -> IntArray:
    """The row that begins each episode, ``(E,)``."""
    starts: IntArray = np.concatenate([[0], np.cumsum(log.episode_lengths)[:-1]]).astype(np.int64)
    return starts


def last_rows(log: OfflineDataset) -> IntArray:
    """The row that ends each episode, ``(E,)``."""
    return np.asarray(np.cumsum(log.episode_lengths) - 1, np.int64)


def episode_numbers(log: OfflineDataset) -> IntArray:
    """The number of the episode of each row, counted from 0 in the log's order, ``(N,)``."""
    return np.repeat(np.arange(len(log.episode_lengths)), log.episode_lengths)


def powers(log: OfflineDataset, discount: float) -> FloatArray:
    """``discount**t`` of every row, t counted from its episode's beginning, ``(N,)``."""
    step = np.arange(len(log)) - np.repeat(first_rows(log), log.episode_lengths)
    return np.asarray(float(discount) ** step, np.float64)


def horizon(log: OfflineDataset, discount: float) -> float:
    """How many steps a value adds up: the mean of ``sum_t discount**t`` over the episodes."""
    return float(powers(log, discount).sum()) / len(log.episode_lengths)


def terminations(log: OfflineDataset) -> NDArray[np.bool_]:
    """Which steps terminated, ``(N,)``; in some logs the episode continues afterwards."""
    return np.asarray(log.transitions["next", "terminated"].reshape(-1).cpu().numpy(), np.bool_)


def open_ended(log: OfflineDataset) -> NDArray[np.bool_]:
    """Which episodes never terminate, ``(E,)``."""
    return np.asarray(~np.logical_or.reduceat(terminations(log), first_rows(log)), np.bool_)


def raw_rewards(log: OfflineDataset) -> FloatArray:
    """Rewards before the dataset's ``reward_map``, float64 ``(N,)``; the map can be undone."""
    mapped = log.transitions["next", "reward"].reshape(-1).double().cpu().numpy()
    return np.asarray(log.reward_map.inverse(mapped), np.float64)


def returns_to_go(log: OfflineDataset, discount: float) -> FloatArray:
    """``sum_k discount**k r_{t+k}`` of raw rewards to the next termination, ``(N,)``.

    Without one, to the episode's last logged step; rewards after a truncation are not estimated.
    """
    result, starts, lengths = raw_rewards(log), first_rows(log), log.episode_lengths
    going = discount * ~terminations(log)
    for step in range(int(lengths.max()) - 2, -1, -1):
        rows = starts[lengths > step + 1] + step
        result[rows] += going[rows] * result[rows + 1]
    return result


def return_range(discount: float, *logs: OfflineDataset) -> tuple[float, float]:
    """Smallest and largest return from any logged state.

    The minimum and maximum over returns-to-go of episodes that terminated, and over the returns of
    truncated episodes. The latter are divided by ``1 - discount**T``, as if they were repeated
    without end.
    """
    lows, highs = [], []
    for log in logs:
        returns, cut = returns_to_go(log, discount), open_ended(log)
        left = float(discount) ** log.episode_lengths * cut
        whole = returns[first_rows(log)] / np.maximum(1 - left, 1e-12)
        closed = returns[np.repeat(~cut, log.episode_lengths)]
        every = np.concatenate([whole, closed])
        lows.append(every.min())
        highs.append(every.max())
    return float(min(lows)), float(max(highs))
