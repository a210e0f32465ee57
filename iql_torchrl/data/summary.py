"""What is known of a dataset beside its rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torchrl.data import Composite, TensorSpec

from iql_torchrl.data.scaling import ObservationStatistics, RewardMap, normalised_score
from iql_torchrl.data.schema import (
    ACTION,
    DatasetError,
    Key,
    observation_spec_of,
    spec_of_space,
)
from iql_torchrl.descriptions import describe_space

__all__ = ["DatasetSummary"]


@dataclass(frozen=True, kw_only=True, repr=False)
class DatasetSummary(ABC):
    """A dataset's spaces, statistics, episodes, reward map and environment, without its rows.

    ``OfflineDataset`` has all rows in one table, ``ShardedDataset`` in many.

    Attributes:
        observation_space, action_space: Gymnasium's spaces; the specs are TorchRL's form of them.
        statistics: per observation key (``"observation"``, or a tuple for nested ones) its
            ``ObservationStatistics``; categories and images have none.
        episode_returns: raw rewards summed over the kept rows of each episode, float64 ``(E,)``.
        episode_lengths: kept rows of each episode, int64 ``(E,)``.
        reward_map: the affine map that was applied to the rewards; apply it to online rewards too.
        reference_scores: raw returns (random, expert), or None.
        notes: what was dropped, guessed or repaired, one sentence each.
    """

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    statistics: dict[str | Key, ObservationStatistics]
    episode_returns: NDArray[np.float64]
    episode_lengths: NDArray[np.int64]
    reward_map: RewardMap
    reference_scores: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    name: str = "dataset"
    dtype: torch.dtype = torch.float32
    env: Callable[[], gym.Env[Any, Any]] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    def __repr__(self) -> str:
        returns, change = self.episode_returns, self.reward_map
        rewards = f", rewards mapped by {change}" if change != RewardMap() else ""
        notes = f"\n  notes: {len(self.notes)}, see print_notes()" if self.notes else ""
        return (
            f"{type(self).__name__} {self.name!r}: {len(self):,} transitions in {len(returns):,} "
            f"episodes\n"
            f"  observation: {describe_space(self.observation_space)}\n"
            f"  action: {describe_space(self.action_space)}\n"
            f"  raw return: mean {returns.mean():.6g}, {returns.min():.6g} to {returns.max():.6g}"
            f"{rewards}{notes}"
        )

    @property
    @abstractmethod
    def masked(self) -> bool:
        """Whether each observation has a bool ``action_mask`` ``(n,)``."""

    @abstractmethod
    def range_of(self, key: Key) -> tuple[float, float]:
        """The smallest and the largest number of an entry of all rows."""

    @abstractmethod
    def sketch(self) -> NDArray[np.int64]:
        """Digests of some of the episodes: ``digests.sketch_of``."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Digests that are equal only if all rows are equal bit for bit, by name."""

    def print_notes(self, file: TextIO | None = None) -> None:
        """One line ``note: ...`` for each of ``notes``, on standard output or ``file``."""
        for note in self.notes:
            print(f"note: {note}", file=file)

    @property
    def observation_spec(self) -> Composite:
        """``Composite`` with the key ``observation``, nested below it for Dict spaces."""
        return observation_spec_of(self.observation_space, self.dtype)

    @property
    def action_spec(self) -> TensorSpec:
        """Bounded for Box, Categorical for Discrete, MultiCategorical for MultiDiscrete."""
        return spec_of_space(self.action_space, self.dtype, ACTION)

    def normalised_score(self, returns: ArrayLike) -> NDArray[np.float64]:
        """Raw returns on the scale from 0 (random) to 100 (expert).

        Raises ``DatasetError`` without ``reference_scores``.
        """
        if self.reference_scores is None:
            raise DatasetError(
                f"{self.name}: no reference scores are known; pass reference_scores=(random, "
                "expert) to load_dataset."
            )
        return normalised_score(returns, self.reference_scores)

    @property
    def make_env(self) -> Callable[[], gym.Env[Any, Any]]:
        """The function that makes a fresh environment, from ``env=`` or the dataset's record.

        It contains none of the data, so it can be sent to another process. Where
        ``load_dataset(concatenate=...)`` joined leaves, its observations are joined in the same way.

        Calling it raises ``DatasetError`` saying what to install, or that none is recorded.
        """
        if self.env is not None:
            return self.env
        message = f"{self.name}: the data records no environment; pass env= to load_dataset."

        def missing() -> gym.Env[Any, Any]:
            raise DatasetError(message)

        return missing
