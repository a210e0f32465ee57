"""Checks of the values of transitions, chunk by chunk; and what looks wrong about all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iql_torchrl.data.codec import leaf_spaces
from iql_torchrl.data.readers.arrays import Columns
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.schema import (
    ACTION,
    MASK,
    NEXT_MASK,
    REWARD,
    TERMINATED,
    DatasetError,
    EpisodeIndex,
    Field,
    Key,
    dotted,
)
from iql_torchrl.descriptions import bounds_in_words, describe_space
from iql_torchrl.tolerance import EQUAL, outside_bounds

#: How many leading rows and columns are looked at for changes that rounding removes.
SAMPLE, COLUMNS = 1024, 128
#: Changes of fewer units in the last place are removed, or far from what they were.
UNITS = 8
#: At most so many rewards, each so many times larger than all others, dominate what is learned.
HANDFUL, DOMINATES = 10, 1e5


@dataclass
class ChunkChecker:
    """Checks consecutive chunks of transitions, and converts their values.

    With ``clip_actions`` continuous actions are clipped and counted, otherwise they are an error.
    NaN in a next observation of a terminated transition, which is never used, becomes its observation.
    """

    source: Source
    index: EpisodeIndex
    clip_actions: bool
    clipped: int = 0
    unused: int = 0
    samples: dict[Key, list[NDArray[Any]]] = field(default_factory=dict)
    #: the largest magnitudes of rewards, ascending
    largest: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def begin(self, columns: Columns, rows: NDArray[np.int64], start: int) -> None:
        """The next chunk has these rows of columns; its first transition is number ``start``."""
        self.columns, self.rows, self.start = columns, rows, start

    def convert(self, key: Key, values: NDArray[Any], expected: Field) -> NDArray[Any]:
        """The values in a form that can be assigned to ``expected``; raises where none can.

        Integers become floats where the space was made from the data, or the source is text, and no
        number changes; floats become categories where all are integers and a space was declared.
        """
        kind, shape, name = values.dtype.kind, values.shape[1:], self.source.name
        group = key[1] if key[0] == "next" else key[0]
        casts = self.columns.text or group in self.source.guessed
        if expected.dtype == torch.bool:
            fits = kind == "b" or (kind in "iuf" and bool(((values == 0) | (values == 1)).all()))
        elif expected.dtype.is_floating_point:  # rewards may be stored as integers
            fits = kind in ("fiu" if key == REWARD or casts else "f")
            if fits and kind in "iu" and key != REWARD:
                self._refuse_rounded(key, values, expected.dtype)
        else:
            fits = kind in "iub"
            if (
                kind == "f"
                and group not in self.source.guessed
                and (values == np.rint(values)).all()
            ):
                fits, values = bool(np.abs(values).max(initial=0) < 2**53), values.astype(np.int64)
        if not fits:
            raise DatasetError(
                f"{name}: {dotted(key)} has {values.dtype} values, expected "
                f"{expected.dtype}{' (0 or 1)' if expected.dtype == torch.bool else ''}; convert "
                "it, or pass the env it came from: integers and floats are never cast into each "
                "other."
            )
        if shape != expected.shape and {shape, expected.shape} != {(), (1,)}:
            remedy = "pass the env the data came from"
            if shape[1:] == tuple(expected.shape):
                remedy = (
                    "join the steps of a vector environment with numpy.concatenate, and number its "
                    "environments in a column env_index"
                )
            raise DatasetError(
                f"{name}: {dotted(key)} has rows of shape {shape}, expected {expected.shape}; {remedy}."
            )
        if (
            expected.dtype == torch.float32
            and values.dtype.itemsize > 4
            and key[0] == "observation"
        ):
            self._keep_sample(key, values)
        return values.reshape(len(values), *expected.shape)

    def _refuse_rounded(self, key: Key, values: NDArray[Any], dtype: torch.dtype) -> None:
        rounded = values.astype(str(dtype).removeprefix("torch."))
        lost = rounded.astype(np.float64) != values.astype(np.float64)
        if lost.any():
            raise DatasetError(
                f"{self.source.name}: {dotted(key)} has the integer {values[lost][0]}, which {dtype} "
                "would round; subtract a constant, such as the start from times, pass "
                "dtype=torch.float64, or observation_space= if these are categories."
            )

    def _keep_sample(self, key: Key, values: NDArray[Any]) -> None:
        """The leading rows of values that float32 rounds."""
        kept = self.samples.setdefault(key, [])
        if (left := SAMPLE - sum(map(len, kept))) > 0:
            kept.append(values.reshape(len(values), -1)[:left, :COLUMNS].astype(np.float64))

    def count_rewards(self, rewards: NDArray[np.float64]) -> None:
        """Remember the largest rewards."""
        self.largest = np.sort(np.append(self.largest, np.abs(rewards)))[-HANDFUL - 1 :]

    def check(self, chunk: Mapping[Key, Tensor], raw: Mapping[Key, NDArray[Any]]) -> None:
        """Check converted values, of which ``raw`` are the source's; raises naming the first wrong "
        "one."""
        # NumPy is faster here than torch: chunks are short, and starting torch's threads takes time.
        rows = {key: values.numpy() for key, values in chunk.items()}
        self._replace_unused(rows)
        for key, values in rows.items():
            # If the sum is finite, every term is; a sum that overflows needs the slower test.
            with np.errstate(all="ignore"):
                finite = values.dtype.kind != "f" or np.isfinite(values.sum())
            if not finite and (wrong := ~np.isfinite(values)).any():
                self._refuse_infinite(key, wrong, values.dtype, raw.get(key))
        for key, space in leaf_spaces(self.source.observation_space).items():
            for side in (key, ("next", *key)):
                self._categories(side, rows[side], space)
        self._categories(ACTION, rows[ACTION], self.source.action_space)
        if isinstance(self.source.action_space, gym.spaces.Box):
            self._bounds(rows[ACTION], self.source.action_space, raw[ACTION].dtype)
        if MASK in rows:
            self._masks(rows)

    def _replace_unused(self, rows: Mapping[Key, NDArray[Any]]) -> None:
        terminated = np.flatnonzero(rows[TERMINATED][:, 0])
        for key, values in rows.items():
            if (
                key[:2] != ("next", "observation")
                or values.dtype.kind != "f"
                or not len(terminated)
            ):
                continue
            after = values[terminated].reshape(len(terminated), -1)
            missing = terminated[np.isnan(after).any(axis=1)]
            values[missing] = rows[key[1:]][missing]
            self.unused += len(missing)

    def _refuse_infinite(
        self, key: Key, wrong: NDArray[np.bool_], kind: Any, raw: NDArray[Any] | None
    ) -> None:
        if raw is not None and raw.size == wrong.size:
            beyond = wrong & np.isfinite(raw.astype(np.float64).reshape(wrong.shape))
            if beyond.any():
                value = raw.reshape(wrong.shape)[beyond][0]
                self._refuse(
                    key, beyond, f"has the value {value:g}, beyond the range of {kind},",
                    "scale the column, or pass dtype=torch.float64.",
                )  # fmt: skip
        self._refuse(
            key, wrong, "is NaN or infinite", "expected finite numbers: repair those rows."
        )

    def _refuse(self, key: Key, wrong: Any, problem: str, expected: str) -> None:
        """Raises ``DatasetError`` naming the first row of the source in ``wrong``, if there is one."""
        if not wrong.any():
            return
        found = np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))
        number = self.start + int(found[0])
        episode = int(self.index.ids(number, number + 1)[0])
        row = self.columns.source_row(self.rows[found[0]])
        raise DatasetError(
            f"{self.columns.name}: {dotted(key)} {problem} in {len(found)} of the {len(wrong)} "
            f"transitions checked together, first at row {row} of {self.columns.rows} (episode "
            f"{episode}, step {number - int(self.index.offsets[episode])}); {expected}"
        )

    def _categories(self, key: Key, values: NDArray[Any], space: gym.Space[Any]) -> None:
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
            key, (values < 0) | (values >= count), "is out of range",
            f"expected {'start <= value < start + n' if shifted else '0 <= value < n'} of "
            f"{describe_space(space)}: give the environment the data came from, or repair those rows.",
        )  # fmt: skip

    def _bounds(self, values: NDArray[Any], space: gym.spaces.Box, stored: Any) -> None:
        low, high = space.low.astype(values.dtype), space.high.astype(values.dtype)
        if not (values < low).any() and not (values > high).any():
            return
        wrong = outside_bounds(values, low, high, stored)
        if self.clip_actions:
            self.clipped += int(wrong.reshape(len(wrong), -1).any(1).sum())
        elif wrong.any():
            largest = float(np.abs(values[wrong]).max())
            self._refuse(
                ACTION, wrong, f"is outside its bounds (up to |{largest:.6g}|)",
                f"expected {bounds_in_words(space.low, space.high)}: pass clip_actions=True, or the "
                "env with the right bounds.",
            )  # fmt: skip
        np.clip(values, low, high, out=values)

    def _masks(self, rows: Mapping[Key, NDArray[Any]]) -> None:
        mask, following = rows[MASK], rows[NEXT_MASK]
        no_action, expected = "allows no action", "expected at least one allowed."
        self._refuse(MASK, ~mask.any(axis=1), no_action, expected)
        self._refuse(
            MASK, ~np.take_along_axis(mask, rows[ACTION][:, None], 1),
            "forbids the logged action",
            "expected the mask of the same row's state: check for a shift by one.",
        )  # fmt: skip
        # After a termination no action is taken; environments then often forbid all.
        unusable = ~following.any(axis=1) & ~rows[TERMINATED][:, 0]
        self._refuse(NEXT_MASK, unusable, no_action, expected)

    def notes(self) -> Iterator[str]:
        if self.unused:
            yield (
                f"next_observation is NaN in {self.unused} rows that terminate, where it is never "
                "used; the observation is stored there."
            )

    def warnings(self) -> Iterator[str]:
        """What was repaired, or looks wrong, one sentence each."""
        paths = self.source.parts[0][0].paths
        for key, kept in self.samples.items():
            names = paths.get(dotted(key), "").split(", ")
            yield from _lost_by_rounding(dotted(key), np.concatenate(kept), names)
        space = self.source.action_space
        if self.clipped and isinstance(space, gym.spaces.Box):
            bounds = bounds_in_words(space.low, space.high)
            yield f"{self.clipped} rows had actions outside {bounds}; clipped."
        yield from self._dominating_rewards()

    def _dominating_rewards(self) -> Iterator[str]:
        for count, (high, low) in enumerate(pairwise(self.largest[::-1]), start=1):
            if 0 < low * DOMINATES < high:
                yield (
                    f"{count} of {self.index.rows} rewards are of magnitude {high:.3g} and more, the "
                    f"others at most {low:.3g}: they dominate the sum of squares, so that values are "
                    "learned of them alone. Repair those rows if they are errors, or scale or clip "
                    "the rewards."
                )
                return


def _lost_by_rounding(key: str, rows: NDArray[np.float64], names: list[str]) -> Iterator[str]:
    """A sentence on columns of ``(rows, columns)`` whose changes from row to row float32 removes.

    ``names``: of the columns, where there are as many. Changes of a part in 1e12 may be of the rounding
    of float64 and do not count, nor do those up to ``tolerance.EQUAL``: simulators have such
    changes in bodies at rest.
    """
    varying = np.flatnonzero(np.ptp(rows, axis=0) > 1e-12 * np.abs(rows).max(axis=0))
    if not varying.size:
        return
    values = rows[1:, varying]
    changes, units = np.abs(values - rows[:-1, varying]), np.spacing(np.abs(values).astype("f4"))
    changes[changes == 0] = np.nan
    change, unit = np.nanmedian(changes, axis=0), np.median(units, axis=0)
    if not len(lost := np.flatnonzero((change > EQUAL) & (change < UNITS * unit))):
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


def fixed_horizon(source: Source, limit: int | None) -> tuple[str, str]:
    """A warning, or a note, where all episodes terminate at one step: it may be a time limit.

    A warning where the environment has this limit, a note where none is known; else both are empty.
    """
    length, terminated = source.episode_lengths, [e.terminated for _, e in source.parts]
    end = np.concatenate(terminated)[length.cumsum() - 1]
    # The file may cut the last episode short. Short episodes often have equal lengths.
    complete = length if end[-1] else length[:-1]
    if len(complete) < 3 or not end[: len(complete)].all() or complete[0] < 5:
        return "", ""
    if (complete != complete[0]).any() or length[-1] > complete[0]:
        return "", ""
    steps = int(complete[0])
    paths = source.parts[0][0].paths
    column, remedy = "", "store those ends as truncations"
    if name := paths.get("terminated", paths.get("trajectory_end")):
        column = f" ({name!r})"
        remedy = f"pass columns={{'terminated': None, 'truncated': {name!r}}}"
    text = (
        f"all {int(end.sum())} terminations{column} come at step {steps} of their episode and no other "
        "step ends one"
    )
    warning = (
        f"{text}: that is the environment's time limit, at which values must be bootstrapped: "
        f"{remedy}. If each episode really terminates after that many steps, ignore this warning."
    )
    note = f"{text}. If that is a time limit, at which values must be bootstrapped, {remedy}."
    return warning if limit == steps else "", note if limit is None else ""
