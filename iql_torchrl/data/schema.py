"""The layout of a table of transitions: its keys, shapes, dtypes, specs and episodes.

Rows follow TorchRL's "next" layout. Keys are tuples inside this package: ``("observation",)``
or ``("observation", name)`` for Dict observations, ``("action",)``, ``("next", "reward")``, ...
A row's reward and flags are those of the step that left ``observation`` through ``action``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    TensorSpec,
    Unbounded,
)

from iql_torchrl.descriptions import describe_space

Key: TypeAlias = tuple[str, ...]

REWARD: Key = ("next", "reward")
TERMINATED: Key = ("next", "terminated")
TRUNCATED: Key = ("next", "truncated")
DONE: Key = ("next", "done")
EPISODE: Key = ("collector", "traj_ids")
ACTION: Key = ("action",)
MASK: Key = ("action_mask",)
NEXT_MASK: Key = ("next", "action_mask")
LOG_PROB: Key = ("action_log_prob",)


class DatasetError(ValueError):
    """The data cannot be used; the message names the place and what to do."""


class MissingPackageError(DatasetError, ImportError):
    """An optional package is missing, which the data need; the message says how to install it."""


class DatasetWarning(UserWarning):
    """The data can be used, but something in it may be wrong and should be checked."""


class Field(NamedTuple):
    """Shape of one row and the dtype in which it is stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Layout: TypeAlias = dict[Key, Field]


def leaf_spaces(space: gym.Space[Any], prefix: Key = ("observation",)) -> dict[Key, gym.Space[Any]]:
    """The leaves of an observation space by key; a plain space is its own only leaf."""
    if not isinstance(space, spaces.Dict):
        return {prefix: space}
    leaves: dict[Key, gym.Space[Any]] = {}
    for name, child in space.spaces.items():
        leaves.update(leaf_spaces(child, (*prefix, name)))
    return leaves


def field_of_space(space: gym.Space[Any], dtype: torch.dtype, key: Key) -> Field:
    """How values of a space are stored: floats as ``dtype``, categories as int64.

    A Box of integers keeps its own dtype (images stay uint8). Categories are stored without
    the space's ``start``, counted from 0 (:func:`category_starts`). Raises ``DatasetError`` for a space
    without a tensor form.
    """
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return Field(tuple(space.shape or ()), torch.int64)
    if not isinstance(space, spaces.Box):
        raise DatasetError(
            f"{dotted(key)}: a {type(space).__name__} space has no tensor form; expected Box, "
            "Discrete, MultiDiscrete, MultiBinary, or a Dict of them."
        )
    floats = np.issubdtype(space.dtype, np.floating)
    stored = dtype if floats else torch.from_numpy(np.empty(0, space.dtype)).dtype
    return Field(space.shape, stored)


def category_starts(
    observation_space: gym.Space[Any], action_space: gym.Space[Any]
) -> dict[Key, NDArray[np.int64]]:
    """The ``start`` of every leaf whose categories do not start at 0, by key, on both sides of a row.

    A table's categories are the source's values without it.
    """
    starts: dict[Key, NDArray[np.int64]] = {}
    for key, space in {**leaf_spaces(observation_space), ACTION: action_space}.items():
        if np.any(start := np.asarray(getattr(space, "start", 0), np.int64)):
            starts[key] = start
    return starts | {("next", *key): start for key, start in starts.items() if key != ACTION}


def spec_of_space(space: gym.Space[Any], dtype: torch.dtype, key: Key) -> TensorSpec:
    """A leaf's TorchRL spec: categorical, Bounded, or Unbounded where any bound is infinite.

    TorchRL cannot sample a spec with one infinite bound, so the spec of such a space lacks its
    finite bounds too.
    """
    shape, stored = field_of_space(space, dtype, key)
    if isinstance(space, spaces.Discrete):
        return Categorical(int(space.n), shape=torch.Size(shape), dtype=stored)
    if isinstance(space, spaces.MultiDiscrete):
        counts = torch.as_tensor(space.nvec)
        return MultiCategorical(counts, shape=torch.Size(shape), remove_singleton=False)
    if isinstance(space, spaces.MultiBinary):
        return Bounded(0, 1, shape=torch.Size(shape), dtype=stored)
    assert isinstance(space, spaces.Box)
    if not space.is_bounded():
        return Unbounded(shape=torch.Size(shape), dtype=stored)
    low, high = (torch.as_tensor(bound).to(stored) for bound in (space.low, space.high))
    return Bounded(low, high, shape=torch.Size(shape), dtype=stored)


def observation_spec_of(space: gym.Space[Any], dtype: torch.dtype) -> Composite:
    """``Composite(observation=...)``, nested below ``observation`` for a Dict space."""
    spec = Composite()
    for key, leaf in leaf_spaces(space).items():
        spec[key] = spec_of_space(leaf, dtype, key)
    return spec


def transition_layout(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    *,
    dtype: torch.dtype = torch.float32,
    masked: bool = False,
    log_prob: bool = False,
) -> Layout:
    """Every key of the table with its row shape and dtype.

    ``masked`` adds ``action_mask`` and ``("next", "action_mask")`` (Discrete actions only),
    ``log_prob`` the behaviour policy's log-probability of the logged action.
    """
    layout: Layout = {}
    for key, space in leaf_spaces(observation_space).items():
        layout[key] = field_of_space(space, dtype, key)
    layout[ACTION] = field_of_space(action_space, dtype, ACTION)
    layout.update({("next", *k): f for k, f in layout.items() if k[0] == "observation"})
    layout[REWARD] = Field((1,), dtype)
    layout.update({k: Field((1,), torch.bool) for k in (TERMINATED, TRUNCATED, DONE)})
    layout[EPISODE] = Field((), torch.int64)
    if masked:
        if not isinstance(action_space, spaces.Discrete):
            raise DatasetError(
                f"action_mask: the actions are {describe_space(action_space)}; a mask needs Discrete "
                "actions."
            )
        layout[MASK] = layout[NEXT_MASK] = Field((int(action_space.n),), torch.bool)
    if log_prob:
        layout[LOG_PROB] = Field((), dtype)
    return layout


@dataclass
class EpisodeIndex:
    """Which rows belong to which episode; rows of an episode are consecutive.

    ``lengths``: rows of each episode, all at least 1.
    """

    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @property
    def rows(self) -> int:
        return int(self.offsets[-1])

    def ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """The episode of each row in ``[start, stop)``."""
        first, last = np.searchsorted(self.offsets, [start, stop - 1], side="right") - 1
        edges = np.clip(self.offsets[first : last + 2], start, stop)
        return np.repeat(np.arange(first, last + 1, dtype=np.int64), np.diff(edges))

    def last_rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rows in ``[start, stop)`` that end their episode."""
        ends = self.offsets[1:] - 1
        low, high = np.searchsorted(ends, [start, stop])
        return ends[low:high]


def dotted(key: Key) -> str:
    return ".".join(key)
