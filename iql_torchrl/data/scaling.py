"""Reward maps, observation statistics and reference returns.

Nothing here changes observations: the first layer of each network standardises them, with the
numbers of ``ObservationStatistics``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from iql_torchrl.data.schema import DatasetError

Number = TypeVar("Number", float, Tensor, NDArray[np.float64])


@dataclass(frozen=True)
class RewardMap:
    """The affine map ``r' = scale * r + shift`` and its inverse; ``scale`` is never 0."""

    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and np.isfinite(self.shift)) or self.scale == 0:
            raise DatasetError(
                f"a reward scaling needs a finite non-zero scale and a finite shift, got scale="
                f"{self.scale}, shift={self.shift}"
            )

    def forward(self, reward: Number) -> Number:
        """Raw to mapped, elementwise."""
        return reward * self.scale + self.shift

    def inverse(self, reward: Number) -> Number:
        """Mapped to raw, elementwise."""
        return (reward - self.shift) / self.scale

    __call__ = forward


#: The reward scalings that a name describes, whatever the data are.
NAMED_MAPS = {"raw": RewardMap(), "minus_one": RewardMap(shift=-1.0)}


def reward_map(
    reward: str | Sequence[float], episode_returns: NDArray[np.float64], name: str = ""
) -> RewardMap:
    """The map that a name or a pair ``(scale, shift)`` describes.

    ``"raw"``: identity. ``"return_range"``: scale 1000 / (largest - smallest episode return), the
    IQL paper's for locomotion. ``"minus_one"``: shift -1, the paper's for AntMaze.
    ``(scale, shift)``: as given. Raises ``DatasetError`` for anything else, and for
    ``"return_range"`` where all episodes return the same; it begins with the ``name`` of the data.
    """
    name = name and f"{name}: "
    if isinstance(reward, str) and reward in NAMED_MAPS:
        return NAMED_MAPS[reward]
    if reward == "return_range":
        spread = float(np.ptp(episode_returns))
        if not spread > 0:
            raise DatasetError(
                f"{name}reward='return_range' needs episodes of different return, but all "
                f"{len(episode_returns)} return {float(episode_returns[0]):g}; pass (scale, shift)"
            )
        return RewardMap(1000.0 / spread)
    if not _pair(reward):
        raise DatasetError(
            f"{name}reward: expected 'raw', 'return_range', 'minus_one' or (scale, shift), two finite "
            f"numbers, got {reward!r}"
        )
    return RewardMap(float(reward[0]), float(reward[1]))


def _pair(values: Any) -> bool:
    """True for two finite numbers."""
    try:
        first, second = values
        return math.isfinite(first) and math.isfinite(second)
    except (TypeError, ValueError):
        return False


@dataclass(frozen=True)
class ObservationStatistics:
    """Mean and standard deviation of one observation key over all rows, shape of one row.

    float64 for rows of float64, else float32; accumulated in float64; the deviation is that of the
    rows (divided by N). ``constant``: flat indices of columns that never change; their ``std`` is 1, to
    avoid a division by zero. ``count``: rows.
    """

    mean: Tensor
    std: Tensor
    constant: tuple[int, ...]
    count: int

    @classmethod
    def of(cls, rows: Tensor) -> ObservationStatistics:
        """Those of rows ``(N, *shape)``, N at least 1."""
        total = StatisticsAccumulator(tuple(rows.shape[1:]))
        total.update(rows)
        return total.result()

    def map(self, rearrange: Callable[[Tensor], Tensor]) -> ObservationStatistics:
        """The statistics of observations whose columns ``rearrange`` selects or repeats."""
        still = torch.zeros(self.mean.numel(), dtype=torch.bool)
        still[list(self.constant)] = True
        mean, std, still = map(rearrange, (self.mean, self.std, still.view_as(self.mean)))
        constant = tuple(still.flatten().nonzero().flatten().tolist())
        return ObservationStatistics(mean, std, constant, self.count)

    def to(self, dtype: torch.dtype) -> ObservationStatistics:
        """The same numbers in another dtype of floats."""
        return replace(self, mean=self.mean.to(dtype), std=self.std.to(dtype))


class StatisticsAccumulator:
    """Merges chunks into ``ObservationStatistics`` (Chan et al. 1979), in float64.

    >>> acc = StatisticsAccumulator((1,)); acc.update(torch.tensor([[1.0], [3.0]]))
    >>> acc.result().mean, acc.result().std
    (tensor([2.]), tensor([1.]))
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = math.prod(shape)
        self.shape, self.count = shape, 0
        self.dtype: type[np.floating[Any]] = np.float32
        self.mean, self.squares = np.zeros(size), np.zeros(size)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)

    def update(self, values: Tensor) -> None:
        """Adds rows ``(B, *shape)``, at least one."""
        self.dtype = np.float64 if values.dtype == torch.float64 else np.float32
        rows = values.detach().cpu().numpy().reshape(len(values), -1).astype(np.float64)
        self.low = np.minimum(self.low, rows.min(axis=0))
        self.high = np.maximum(self.high, rows.max(axis=0))
        mean = rows.mean(axis=0)
        rows -= mean
        total = self.count + len(rows)
        gap = mean - self.mean
        self.squares += np.einsum("ij,ij->j", rows, rows)
        self.squares += gap**2 * (self.count * len(rows) / total)
        self.mean += gap * (len(rows) / total)
        self.count = total

    def result(self) -> ObservationStatistics:
        still = self.low == self.high
        std = np.sqrt(self.squares / max(self.count, 1)).astype(self.dtype)
        # Below the smallest normal number a deviation may count as 0 where it is divided by.
        std[still | (std < np.finfo(self.dtype).tiny)] = 1.0
        mean = np.where(still, self.low, self.mean).astype(self.dtype)
        return ObservationStatistics(
            mean=torch.from_numpy(mean).reshape(self.shape),
            std=torch.from_numpy(std).reshape(self.shape),
            constant=tuple(np.flatnonzero(still).tolist()),
            count=self.count,
        )


#: Mean return of a random policy and of an expert for D4RL's tasks, raw rewards (Fu et al. 2020,
#: arXiv:2004.07219; numbers of ``d4rl/infos.py``). In AntMaze the goal gives reward 1.
REFERENCE_RETURNS: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "maze2d-open": (0.01, 20.66),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
    "kitchen": (0.0, 4.0),
}

#: Attributes with the returns of a random policy and of an expert; the last two are Minari's.
REFERENCE_NAMES = (
    ("random", "expert"),
    ("minimum", "maximum"),
    ("ref_min_score", "ref_max_score"),
)


def normalised_score(
    returns: ArrayLike, reference_scores: tuple[float, float]
) -> NDArray[np.float64]:
    """``100 * (return - random) / (expert - random)``, elementwise: D4RL's scale from 0 to 100.

    ``returns``: raw episode returns. ``reference_scores``: (random, expert).
    """
    low, high = reference_scores
    if not (np.isfinite(low) and np.isfinite(high) and high != low):
        raise ValueError(f"reference_scores: expected two different returns, got {(low, high)}")
    return 100.0 * (np.asarray(returns, dtype=np.float64) - low) / (high - low)


def known_scores(scores: Any) -> tuple[float, float] | None:
    """``(random, expert)`` from that pair, a task of ``REFERENCE_RETURNS``, or an object with both.

    The object has them under one of ``REFERENCE_NAMES``. Raises ``DatasetError`` for anything else.
    """
    if scores is None:
        return None
    if isinstance(scores, str):
        if scores not in REFERENCE_RETURNS:
            raise DatasetError(
                f"reference_scores: {scores!r} is not among {', '.join(REFERENCE_RETURNS)}."
            )
        return REFERENCE_RETURNS[scores]
    pair = scores
    for names in REFERENCE_NAMES:
        if all(hasattr(scores, name) for name in names):
            pair = [getattr(scores, name) for name in names]
    if not _pair(pair) or not pair[0] < pair[1]:
        raise DatasetError(
            "reference_scores must be two finite returns (random, expert), the second greater, the "
            "name of a task, or an object with two such attributes "
            f"({' or '.join(map(' and '.join, REFERENCE_NAMES))}); got {scores!r}."
        )
    return float(pair[0]), float(pair[1])
