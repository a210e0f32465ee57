"""What a table of transitions must look like, and the checks that hold it to that.

Rows follow TorchRL's "next" layout. Keys are tuples inside this package: ``("observation",)``
or ``("observation", name)`` for Dict observations, ``("action",)``, ``("next", "reward")``, ...
A row's reward and flags are those of the step that left ``observation`` through ``action``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    TensorSpec,
    Unbounded,
)

from iql_torchrl.descriptions import bounds_in_words, describe_space

__all__ = [
    "BlockChecker",
    "DatasetError",
    "DatasetWarning",
    "EpisodeIndex",
    "Field",
    "Key",
    "Layout",
    "field_of_space",
    "leaf_spaces",
    "observation_spec_of",
    "spec_of_space",
    "transition_layout",
]

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


class DatasetWarning(UserWarning):
    """The data can be used, but something in it deserves a look."""


class Field(NamedTuple):
    """Shape of one row and the dtype it is kept in."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Layout: TypeAlias = dict[Key, Field]


def leaf_spaces(space: gym.Space[Any], prefix: Key = ("observation",)) -> dict[Key, gym.Space[Any]]:
    """The leaves of an observation space by key; a plain space is its own only leaf."""
    if not isinstance(space, gym.spaces.Dict):
        return {prefix: space}
    leaves: dict[Key, gym.Space[Any]] = {}
    for name, child in space.spaces.items():
        leaves.update(leaf_spaces(child, (*prefix, name)))
    return leaves


def field_of_space(space: gym.Space[Any], dtype: torch.dtype, key: Key) -> Field:
    """How a space's values are kept: floats as ``dtype``, categories as int64, never mixed.

    Box of integers keeps its own dtype (images stay uint8). Raises ``DatasetError`` for a space
    that has no tensor form, and for a Discrete space that does not start at 0.
    """
    if isinstance(space, gym.spaces.Discrete):
        if space.start != 0:
            raise DatasetError(
                f"{_dotted(key)}: {space} starts at {space.start}; categories must start at 0: "
                "subtract the start from the data and from the environment's space."
            )
        return Field((), torch.int64)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return Field(tuple(space.shape), torch.int64)
    if isinstance(space, gym.spaces.MultiBinary):
        return Field(tuple(space.shape), torch.int64)
    if isinstance(space, gym.spaces.Box):
        kind = np.dtype(space.dtype)
        if kind.kind == "f":
            return Field(tuple(space.shape), dtype)
        return Field(tuple(space.shape), torch.from_numpy(np.empty(0, kind)).dtype)
    raise DatasetError(
        f"{_dotted(key)}: a {type(space).__name__} space has no tensor form; expected Box, Discrete, "
        "MultiDiscrete, MultiBinary, or a Dict of them."
    )


def spec_of_space(space: gym.Space[Any], dtype: torch.dtype, key: Key) -> TensorSpec:
    """A leaf's TorchRL spec: categorical, Bounded, or Unbounded where any bound is infinite.

    TorchRL cannot sample a spec with one infinite bound, so the finite bounds of such a space are
    not in its spec; only the space itself has them.
    """
    kept = field_of_space(space, dtype, key)
    if isinstance(space, gym.spaces.Discrete):
        return Categorical(int(space.n), shape=torch.Size(()), dtype=torch.int64)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return MultiCategorical(
            torch.as_tensor(space.nvec), shape=torch.Size(kept.shape), remove_singleton=False
        )
    if isinstance(space, gym.spaces.MultiBinary):
        return Bounded(0, 1, shape=torch.Size(kept.shape), dtype=torch.int64)
    assert isinstance(space, gym.spaces.Box)
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        return Unbounded(shape=torch.Size(kept.shape), dtype=kept.dtype)
    low, high = (torch.as_tensor(b).to(kept.dtype) for b in (space.low, space.high))
    return Bounded(low, high, shape=torch.Size(kept.shape), dtype=kept.dtype)


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

    ``masked`` adds ``action_mask`` and its successor (Discrete actions only), ``log_prob`` the
    behaviour policy's log-probability of the logged action.
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
        if not isinstance(action_space, gym.spaces.Discrete):
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
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, stop - 1, side="right")) - 1
        edges = np.clip(self.offsets[first : last + 2], start, stop)
        return np.repeat(np.arange(first, last + 1, dtype=np.int64), np.diff(edges))

    def last_rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rows in ``[start, stop)`` that end their episode."""
        ends = self.offsets[1:] - 1
        low, high = np.searchsorted(ends, [start, stop])
        return ends[low:high]


def _dotted(key: Key) -> str:
    return ".".join(key)


@dataclass
class BlockChecker:
    """Holds consecutive blocks of transitions to the schema, and repairs the two harmless faults.

    ``check`` reads a block's tensors once. It raises ``DatasetError`` for NaN or infinite
    numbers, actions or categories out of range, masks that forbid the logged action, and
    episodes that continue after their end. It repairs in place, and counts: a step marked both
    terminated and truncated (termination wins), and an episode whose last step has neither mark
    (it was cut there: truncated). With ``clip_actions`` continuous actions are clipped instead
    of refused, and counted. ``goes_on``: rows may terminate before their episode's last row.
    """

    name: str
    index: EpisodeIndex
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    clip_actions: bool = False
    goes_on: bool = False
    both_marks: int = 0
    no_mark: int = 0
    clipped: int = 0
    terminated_ends: int = 0
    last_terminated: bool = False

    def check(self, block: Mapping[Key, Tensor], start: int) -> None:
        # NumPy: these passes are short, and torch's threads cost more than they save.
        rows = {key: values.numpy() for key, values in block.items()}
        for key, values in rows.items():
            if values.dtype.kind == "f":
                self._finite(key, values, start)
        for key, space in leaf_spaces(self.observation_space).items():
            for side in (key, ("next", *key)):
                self._categories(side, rows[side], space, start)
        self._actions(rows[ACTION], start)
        self._flags(rows, start)
        if MASK in rows:
            self._masks(rows, start)

    def _fail(
        self, key: Key, bad: NDArray[np.bool_], start: int, problem: str, expected: str
    ) -> NoReturn:
        rows = np.flatnonzero(bad.reshape(len(bad), -1).any(1))
        row = start + int(rows[0])
        episode = int(self.index.ids(row, row + 1)[0])
        raise DatasetError(
            f"{self.name}: {_dotted(key)} {problem} in {len(rows)} of the {len(bad)} rows looked at "
            f"together, first at row {row} (episode {episode}, step "
            f"{row - int(self.index.offsets[episode])}) of {self.index.rows}; {expected}"
        )

    def _finite(self, key: Key, values: NDArray[Any], start: int) -> None:
        # A finite sum proves every term finite; a sum that overflows is settled by the slow look.
        with np.errstate(all="ignore"):
            if np.isfinite(values.sum()):
                return
        if (bad := ~np.isfinite(values)).any():
            self._fail(
                key, bad, start, "is NaN or infinite", "expected finite numbers: repair those rows."
            )

    def _categories(
        self, key: Key, values: NDArray[Any], space: gym.Space[Any], start: int
    ) -> None:
        if isinstance(space, gym.spaces.Discrete):
            count: Any = int(space.n)
        elif isinstance(space, gym.spaces.MultiDiscrete):
            count = np.asarray(space.nvec)
        elif isinstance(space, gym.spaces.MultiBinary):
            count = 2
        else:
            return
        bad = (values < 0) | (values >= count)
        if bad.any():
            self._fail(
                key, bad, start, "is out of range", f"expected 0 <= value < n of "
                f"{describe_space(space)}: give the environment the data came from, or repair those "
                "rows.",
            )  # fmt: skip

    def _actions(self, values: NDArray[Any], start: int) -> None:
        space = self.action_space
        if not isinstance(space, gym.spaces.Box):
            self._categories(ACTION, values, space, start)
            return
        low, high = space.low.astype(values.dtype), space.high.astype(values.dtype)
        # Rounding of a stored bound is no offence, also where the other bound is infinite.
        slack: Any = 0
        if values.dtype.kind == "f":
            with np.errstate(all="ignore"):
                width = high - low
            slack = 1e-6 * np.where(np.isfinite(width), width, 1.0)
        bad = (values < low - slack) | (values > high + slack)
        if not bad.any():
            return
        if self.clip_actions:
            self.clipped += int(bad.reshape(len(bad), -1).any(1).sum())
            np.clip(values, low, high, out=values)
            return
        largest = float(np.abs(values[bad]).max())
        self._fail(
            ACTION, bad, start, f"is outside its bounds (up to |{largest:.6g}|)",
            f"expected {_bounds(space)}: pass clip_actions=True, or the env with the right bounds.",
        )  # fmt: skip

    def _flags(self, rows: Mapping[Key, NDArray[Any]], start: int) -> None:
        terminated, truncated = rows[TERMINATED], rows[TRUNCATED]
        if (both := terminated & truncated).any():
            self.both_marks += int(both.sum())
            truncated &= ~terminated
        done = terminated | truncated
        is_last = np.zeros_like(done)
        is_last[self.index.last_rows(start, start + len(done)) - start] = True
        if (early := (truncated if self.goes_on else done) & ~is_last).any():
            self._fail(
                DONE, early, start, "is set before the episode's last row",
                "expected marks at ends only: split the episode there, or clear the mark.",
            )  # fmt: skip
        if (cut := is_last & ~done).any():
            self.no_mark += int(cut.sum())
            truncated |= cut
        rows[DONE][...] = terminated | truncated
        self.terminated_ends += int((terminated & is_last).sum())
        self.last_terminated = bool(terminated[-1].any())

    def _fixed_length(self) -> int | None:
        """The length of all episodes where each terminates; the file may cut the last one short.

        None for fewer than 3 terminations and for episodes of fewer than 5 steps, whose equal
        length proves little, and where rows terminate inside episodes.
        """
        lengths = self.index.lengths
        ended = lengths if self.last_terminated else lengths[:-1]
        if self.goes_on or len(ended) < 3 or self.terminated_ends < len(ended):
            return None
        steps = int(ended[0])
        same = bool((ended == steps).all()) and int(lengths[-1]) <= steps
        return steps if same and steps >= 5 else None

    def _masks(self, rows: Mapping[Key, NDArray[Any]], start: int) -> None:
        mask, following = rows[MASK], rows[NEXT_MASK]
        empty = np.asarray(np.logical_not(mask.any(axis=1)))
        if empty.any():
            self._fail(MASK, empty, start, "allows no action", "expected at least one allowed.")
        forbidden = np.logical_not(np.take_along_axis(mask, rows[ACTION][:, None], 1))
        if forbidden.any():
            self._fail(
                MASK, forbidden, start, "forbids the logged action",
                "expected the mask of the same row's state: check for a shift by one.",
            )  # fmt: skip
        # After a termination no action is taken; environments then often forbid all.
        unusable = ~following.any(axis=1) & ~rows[TERMINATED][:, 0]
        if unusable.any():
            self._fail(
                NEXT_MASK, unusable, start, "allows no action", "expected at least one allowed."
            )

    def findings(self, ends_known: bool, termination: str | None = None) -> Iterator[str]:
        """What was repaired, or looks wrong, one sentence each.

        ``ends_known``: the source had truncation marks. ``termination``: the column of a table
        that marks terminations.
        """
        if (steps := self._fixed_length()) is not None:
            where, remedy = "", "store those ends as truncations"
            if termination is not None:
                where = f" ({termination!r})"
                remedy = f"pass columns={{'terminated': None, 'truncated': {termination!r}}}"
            yield (
                f"all {self.terminated_ends} terminations{where} come at step {steps} of their "
                "episode and no other step ends one: that looks like a time limit, past which "
                f"values must be bootstrapped. If it is one, {remedy}; if each episode truly "
                "terminates after that many steps, ignore this warning."
            )
        if self.both_marks:
            yield (
                f"{self.both_marks} steps were marked both terminated and truncated; kept as "
                "terminated (never bootstrapped)."
            )
        if self.no_mark and ends_known:
            yield (
                f"{self.no_mark} episodes end without a mark; their last step was marked truncated "
                "(bootstrapped)."
            )
        if self.clipped:
            yield f"{self.clipped} rows had actions outside {_bounds(self.action_space)}; clipped."


def _bounds(space: gym.Space[Any]) -> str:
    if not isinstance(space, gym.spaces.Box):
        return describe_space(space)
    return bounds_in_words(space.low, space.high)
