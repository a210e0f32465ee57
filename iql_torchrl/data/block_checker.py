"""Checks of the rows of a table of transitions, block by block, and repair of wrong end marks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl.data.schema import (
    ACTION,
    DONE,
    MASK,
    NEXT_MASK,
    TERMINATED,
    TRUNCATED,
    DatasetError,
    EpisodeIndex,
    Key,
    dotted,
    leaf_spaces,
)
from iql_torchrl.descriptions import bounds_in_words, describe_space

__all__ = ["BlockChecker"]


@dataclass
class BlockChecker:
    """Checks consecutive blocks of transitions, and repairs two faults of the end marks.

    ``check`` reads a block's tensors once. It raises ``DatasetError`` for NaN or infinite
    numbers, actions or categories out of range, masks that forbid the logged action, and
    episodes that continue after their end. It repairs in place, and counts: a step marked both
    terminated and truncated (it becomes terminated), and an episode whose last step has neither
    mark (it was cut there: truncated). With ``clip_actions`` continuous actions are clipped and
    counted, otherwise they are an error. ``terminates_inside``: rows may terminate before their
    episode's last row.
    """

    name: str
    index: EpisodeIndex
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    clip_actions: bool = False
    terminates_inside: bool = False
    both_marks: int = 0
    no_mark: int = 0
    clipped: int = 0
    terminated_ends: int = 0
    last_terminated: bool = False

    def check(self, block: Mapping[Key, Tensor], start: int) -> None:
        # NumPy is faster here than torch: blocks are short, and starting torch's threads takes time.
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
        self, key: Key, wrong: NDArray[np.bool_], start: int, problem: str, expected: str
    ) -> NoReturn:
        rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))
        row = start + int(rows[0])
        episode = int(self.index.ids(row, row + 1)[0])
        raise DatasetError(
            f"{self.name}: {dotted(key)} {problem} in {len(rows)} of the {len(wrong)} rows looked at "
            f"together, first at row {row} (episode {episode}, step "
            f"{row - int(self.index.offsets[episode])}) of {self.index.rows}; {expected}"
        )

    def _finite(self, key: Key, values: NDArray[Any], start: int) -> None:
        # If the sum is finite, every term is; a sum that overflows needs the slower test below.
        with np.errstate(all="ignore"):
            if np.isfinite(values.sum()):
                return
        if (wrong := ~np.isfinite(values)).any():
            self._fail(
                key,
                wrong,
                start,
                "is NaN or infinite",
                "expected finite numbers: repair those rows.",
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
        wrong = (values < 0) | (values >= count)
        if wrong.any():
            self._fail(
                key, wrong, start, "is out of range", f"expected {_range_of(space)} of "
                f"{describe_space(space)}: give the environment the data came from, or repair those "
                "rows.",
            )  # fmt: skip

    def _actions(self, values: NDArray[Any], start: int) -> None:
        space = self.action_space
        if not isinstance(space, gym.spaces.Box):
            self._categories(ACTION, values, space, start)
            return
        low, high = space.low.astype(values.dtype), space.high.astype(values.dtype)
        # Values may exceed a bound by rounding, also where the other bound is infinite.
        slack: Any = 0
        if values.dtype.kind == "f":
            with np.errstate(all="ignore"):
                width = high - low
            slack = 1e-6 * np.where(np.isfinite(width), width, 1.0)
        wrong = (values < low - slack) | (values > high + slack)
        if not wrong.any():
            return
        if self.clip_actions:
            self.clipped += int(wrong.reshape(len(wrong), -1).any(1).sum())
            np.clip(values, low, high, out=values)
            return
        largest = float(np.abs(values[wrong]).max())
        self._fail(
            ACTION, wrong, start, f"is outside its bounds (up to |{largest:.6g}|)",
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
        if (early := (truncated if self.terminates_inside else done) & ~is_last).any():
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
        """The common length of episodes that all terminate; the file may cut the last one short.

        None for fewer than 3 terminations, for episodes of fewer than 5 steps, which often have
        equal lengths, and where rows terminate inside episodes.
        """
        lengths = self.index.lengths
        ended = lengths if self.last_terminated else lengths[:-1]
        if self.terminates_inside or len(ended) < 3 or self.terminated_ends < len(ended):
            return None
        steps = int(ended[0])
        equal = bool((ended == steps).all()) and int(lengths[-1]) <= steps
        return steps if equal and steps >= 5 else None

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

    def warnings(self, ends_known: bool, termination: str | None = None) -> Iterator[str]:
        """What was repaired, or looks wrong, one sentence each.

        ``ends_known``: the source had truncation marks. ``termination``: the column of a table
        that marks terminations.
        """
        if (steps := self._fixed_length()) is not None:
            column, remedy = "", "store those ends as truncations"
            if termination is not None:
                column = f" ({termination!r})"
                remedy = f"pass columns={{'terminated': None, 'truncated': {termination!r}}}"
            yield (
                f"all {self.terminated_ends} terminations{column} come at step {steps} of their "
                "episode and no other step ends one: that looks like a time limit, at which "
                f"values must be bootstrapped. If it is one, {remedy}; if each episode really "
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


def _range_of(space: gym.Space[Any]) -> str:
    if np.any(getattr(space, "start", 0)):
        return "start <= value < start + n"
    return "0 <= value < n"


def _bounds(space: gym.Space[Any]) -> str:
    if not isinstance(space, gym.spaces.Box):
        return describe_space(space)
    return bounds_in_words(space.low, space.high)
