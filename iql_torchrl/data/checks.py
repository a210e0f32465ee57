"""Checks of the rows of a table of transitions, block by block, and repair of wrong end marks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl.data.codec import leaf_spaces
from iql_torchrl.data.readers.motion import COLUMNS, TOLERANCE
from iql_torchrl.data.readers.source import Piece, Source
from iql_torchrl.data.schema import (
    ACTION,
    DONE,
    EPISODE,
    MASK,
    NEXT_MASK,
    REWARD,
    TERMINATED,
    TRUNCATED,
    DatasetError,
    EpisodeIndex,
    Key,
    Layout,
    dotted,
)
from iql_torchrl.descriptions import bounds_in_words, describe_space

#: How many leading rows are looked at for changes that rounding removes.
SAMPLE = 1024
#: Changes of fewer units in the last place are removed, or far from what they were.
UNITS = 8


@dataclass
class BlockChecker:
    """Checks pieces and consecutive blocks of transitions; repairs two faults of the end marks.

    It repairs in place, and counts: a step marked both terminated and truncated (it becomes
    terminated), and an episode whose last step has neither mark (it was cut there: truncated). With
    ``clip_actions`` continuous actions are clipped and counted, otherwise they are an error.
    """

    source: Source
    index: EpisodeIndex
    clip_actions: bool
    both_marks: int = 0
    no_mark: int = 0
    clipped: int = 0
    terminated_ends: int = 0
    last_terminated: bool = False
    samples: dict[Key, list[NDArray[Any]]] = field(default_factory=dict)

    def check_piece(self, piece: Piece, layout: Layout) -> None:
        """Raises where the source has other entries, kinds of numbers or row shapes than its table."""
        expected_keys = [key for key in layout if key not in (DONE, EPISODE)]
        if piece.keys() != set(expected_keys):
            raise DatasetError(
                f"{self.source.name}: the data has the leaves {', '.join(map(dotted, piece))}; its "
                f"spaces have {', '.join(map(dotted, expected_keys))}; expected the same: pass the env "
                "the data came from."
            )
        for key, values in piece.items():
            expected, kind, shape = layout[key], values.dtype.kind, values.shape[1:]
            if expected.dtype == torch.bool:
                fits = kind == "b" or (
                    kind in "iuf" and bool(((values == 0) | (values == 1)).all())
                )
            elif expected.dtype.is_floating_point:  # rewards may be stored as integers
                fits = kind in ("fiu" if key == REWARD else "f")
            else:
                fits = kind in "iub"
            if not fits:
                raise DatasetError(
                    f"{self.source.name}: {dotted(key)} has {values.dtype} values, expected "
                    f"{expected.dtype}{' (0 or 1)' if expected.dtype == torch.bool else ''}; convert "
                    "it, or pass the env it came from: integers and floats are never cast into each "
                    "other."
                )
            if shape != expected.shape and {shape, expected.shape} != {(), (1,)}:
                raise DatasetError(
                    f"{self.source.name}: {dotted(key)} has rows of shape {shape}, expected "
                    f"{expected.shape}; pass the env the data came from."
                )
            rounded = expected.dtype == torch.float32 and values.dtype.itemsize > 4
            if rounded and key[0] == "observation":
                self._keep_sample(key, values)

    def _keep_sample(self, key: Key, values: NDArray[Any]) -> None:
        """The leading rows of values that float32 rounds."""
        kept = self.samples.setdefault(key, [])
        if (left := SAMPLE - sum(map(len, kept))) > 0:
            rows = values.reshape(len(values), -1)[:left, :COLUMNS]
            kept.append(rows.astype(np.float64))

    def check(self, block: Mapping[Key, Tensor], start: int) -> None:
        """Check the rows from ``start`` on; raises ``DatasetError`` naming the first wrong one."""
        # NumPy is faster here than torch: blocks are short, and starting torch's threads takes time.
        rows = {key: values.numpy() for key, values in block.items()}
        for key, values in rows.items():
            # If the sum is finite, every term is; a sum that overflows needs the slower test.
            with np.errstate(all="ignore"):
                finite = values.dtype.kind != "f" or np.isfinite(values.sum())
            if not finite:
                self._refuse(
                    key, ~np.isfinite(values), start, "is NaN or infinite",
                    "expected finite numbers: repair those rows.",
                )  # fmt: skip
        for key, space in leaf_spaces(self.source.observation_space).items():
            for side in (key, ("next", *key)):
                self._categories(side, rows[side], space, start)
        self._categories(ACTION, rows[ACTION], self.source.action_space, start)
        if isinstance(self.source.action_space, gym.spaces.Box):
            self._bounds(rows[ACTION], self.source.action_space, start)
        self._flags(rows, start)
        if MASK in rows:
            self._masks(rows, start)

    def _refuse(self, key: Key, wrong: Any, start: int, problem: str, expected: str) -> None:
        """Raises ``DatasetError`` naming the first row of ``wrong``, if there is one."""
        if not wrong.any():
            return
        rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))
        row = start + int(rows[0])
        episode = int(self.index.ids(row, row + 1)[0])
        raise DatasetError(
            f"{self.source.name}: {dotted(key)} {problem} in {len(rows)} of the {len(wrong)} rows "
            f"looked at together, first at row {row} (episode {episode}, step "
            f"{row - int(self.index.offsets[episode])}) of {self.index.rows}; {expected}"
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
        shifted = np.any(getattr(space, "start", 0))
        self._refuse(
            key, (values < 0) | (values >= count), start, "is out of range",
            f"expected {'start <= value < start + n' if shifted else '0 <= value < n'} of "
            f"{describe_space(space)}: give the environment the data came from, or repair those rows.",
        )  # fmt: skip

    def _bounds(self, values: NDArray[Any], space: gym.spaces.Box, start: int) -> None:
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
        self._refuse(
            ACTION, wrong, start,
            f"is outside its bounds (up to |{float(np.abs(values[wrong]).max()):.6g}|)",
            f"expected {bounds_in_words(space.low, space.high)}: pass clip_actions=True, or the env "
            "with the right bounds.",
        )  # fmt: skip

    def _flags(self, rows: Mapping[Key, NDArray[Any]], start: int) -> None:
        terminated, truncated = rows[TERMINATED], rows[TRUNCATED]
        both = terminated & truncated
        self.both_marks += int(both.sum())
        truncated &= ~both
        done = terminated | truncated
        is_last = np.zeros_like(done)
        is_last[self.index.last_rows(start, start + len(done)) - start] = True
        self._refuse(
            DONE, (truncated if self.source.terminates_inside else done) & ~is_last, start,
            "is set before the episode's last row",
            "expected marks at ends only: split the episode there, or clear the mark.",
        )  # fmt: skip
        cut = is_last & ~done
        self.no_mark += int(cut.sum())
        truncated |= cut
        rows[DONE][...] = terminated | truncated
        self.terminated_ends += int((terminated & is_last).sum())
        self.last_terminated = bool(terminated[-1].any())

    def _masks(self, rows: Mapping[Key, NDArray[Any]], start: int) -> None:
        mask, following = rows[MASK], rows[NEXT_MASK]
        no_action, expected = "allows no action", "expected at least one allowed."
        self._refuse(MASK, ~mask.any(axis=1), start, no_action, expected)
        self._refuse(
            MASK, ~np.take_along_axis(mask, rows[ACTION][:, None], 1), start,
            "forbids the logged action",
            "expected the mask of the same row's state: check for a shift by one.",
        )  # fmt: skip
        # After a termination no action is taken; environments then often forbid all.
        unusable = ~following.any(axis=1) & ~rows[TERMINATED][:, 0]
        self._refuse(NEXT_MASK, unusable, start, no_action, expected)

    def warnings(self) -> Iterator[str]:
        """What was repaired, or looks wrong, one sentence each."""
        # The file may cut the last episode short. Short episodes often have equal lengths.
        lengths = self.index.lengths
        ended = lengths if self.last_terminated else lengths[:-1]
        few = not 3 <= len(ended) <= self.terminated_ends
        if not (few or self.source.terminates_inside or ended[0] < 5) and (
            (ended == ended[0]).all() and lengths[-1] <= ended[0]
        ):
            column, remedy = "", "store those ends as truncations"
            paths = self.source.paths
            if name := paths.get("terminated", paths.get("trajectory_end")):
                column = f" ({name!r})"
                remedy = f"pass columns={{'terminated': None, 'truncated': {name!r}}}"
            yield (
                f"all {self.terminated_ends} terminations{column} come at step {ended[0]} of their "
                "episode and no other step ends one: that looks like a time limit, at which "
                f"values must be bootstrapped. If it is one, {remedy}; if each episode really "
                "terminates after that many steps, ignore this warning."
            )
        if self.both_marks:
            yield (
                f"{self.both_marks} steps were marked both terminated and truncated; kept as "
                "terminated (never bootstrapped)."
            )
        if self.no_mark and self.source.ends_known:
            yield (
                f"{self.no_mark} episodes end without a mark; their last step was marked truncated "
                "(bootstrapped)."
            )
        for key, kept in self.samples.items():
            names = self.source.paths.get(dotted(key), "").split(", ")
            yield from _lost_by_rounding(dotted(key), np.concatenate(kept), names)
        space = self.source.action_space
        if self.clipped and isinstance(space, gym.spaces.Box):
            bounds = bounds_in_words(space.low, space.high)
            yield f"{self.clipped} rows had actions outside {bounds}; clipped."


def _lost_by_rounding(key: str, rows: NDArray[np.float64], names: list[str]) -> Iterator[str]:
    """A sentence on columns of ``(rows, columns)`` whose changes from row to row float32 removes.

    ``names``: of the columns, where there are as many. Changes of a part in 1e12 may be of the rounding
    of float64 and do not count, nor do those up to ``motion.TOLERANCE``: simulators have such
    changes in bodies at rest.
    """
    varying = np.flatnonzero(np.ptp(rows, axis=0) > 1e-12 * np.abs(rows).max(axis=0))
    if not varying.size:
        return
    values = rows[1:, varying]
    changes, units = np.abs(values - rows[:-1, varying]), np.spacing(np.abs(values).astype("f4"))
    changes[changes == 0] = np.nan
    change, unit = np.nanmedian(changes, axis=0), np.median(units, axis=0)
    if not len(lost := np.flatnonzero((change > TOLERANCE) & (change < UNITS * unit))):
        return
    first, columns = lost[0], varying[lost].tolist()
    which = [repr(names[c]) if len(names) == rows.shape[1] else str(c) for c in columns]
    yield (
        f"{key}: column {', '.join(which[:8])} changes by about {change[first]:.3g} from row to row, "
        f"but float32 numbers of its size ({np.abs(values[:, first]).max():.6g}) are "
        f"{unit[first]:.3g} apart: different values become equal, or their differences wrong. Subtract "
        "a constant from the column, such as the start from times; if the changes are only noise, "
        "ignore this warning."
    )
