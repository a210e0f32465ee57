"""From columns and episodes to transitions, chunk by chunk: converted, checked, measured, written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from iql_torchrl.data.codec import CATEGORIES, leaf_spaces
from iql_torchrl.data.dataset import Description
from iql_torchrl.data.readers.arrays import Columns
from iql_torchrl.data.readers.boundaries import Episodes
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.scaling import NAMED_MAPS, StatisticsAccumulator, reward_map
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
    Field,
    Key,
    Layout,
    dotted,
)
from iql_torchrl.data.spaces import is_image
from iql_torchrl.descriptions import bounds_in_words, describe_space
from iql_torchrl.tolerance import EQUAL, outside_bounds

#: At most so many transitions, and about so many bytes, are read, checked and written together.
CHUNK, CHUNK_BYTES = 65_536, 16 * 2**20
#: How many leading rows and columns are looked at for changes that rounding removes.
SAMPLE, COLUMNS = 1024, 128
#: Changes of fewer units in the last place are removed, or far from what they were.
UNITS = 8
#: At most so many rewards, each so many times larger than all others, dominate what is learned.
HANDFUL, DOMINATES = 10, 1e5


class DiskTables:
    """Transitions in files, written one chunk after the other.

    Table n, in ``folders[n]``, has the transitions ``edges[n]`` to ``edges[n + 1]``, and a file for
    each entry. ``ranges``: the smallest and largest number of each entry over all transitions.
    """

    def __init__(self, layout: Layout, edges: NDArray[np.int64], folders: list[Path]) -> None:
        self.edges, self.folders = edges, folders
        self.ranges = {key: (float("inf"), float("-inf")) for key in layout}
        for path in (folder / file_name(key) for folder in folders for key in layout):
            path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, chunk: Mapping[Key, Tensor], start: int) -> None:
        """Write the next transitions, which begin with number ``start``."""
        stop = start + len(chunk[REWARD])
        first, last = np.searchsorted(self.edges, [start, stop - 1], side="right") - 1
        for key, values in chunk.items():
            if values.numel():
                rows = values.numpy()  # torch has no minimum of wide unsigned integers
                low, high = float(rows.min()), float(rows.max())
                self.ranges[key] = min(low, self.ranges[key][0]), max(high, self.ranges[key][1])
            for number in range(first, last + 1):
                begin, end = max(start, self.edges[number]), min(stop, self.edges[number + 1])
                # not through a mapping, whose pages would count as memory of the process
                with open(self.folders[number] / file_name(key), "ab") as file:
                    file.write(values[begin - start : end - start].numpy().data)

    def rewards(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Those of each table, mapped to its file."""
        for folder, rows in zip(self.folders, np.diff(self.edges).tolist(), strict=True):
            path = str(folder / file_name(REWARD))
            yield torch.from_file(path, shared=True, size=rows, dtype=dtype)


def file_name(key: Key) -> str:
    """The file of an entry, in the folder of a table."""
    return "/".join(key) + ".memmap"


def row_bytes(layout: Layout) -> int:
    return sum(int(np.prod(f.shape)) * f.dtype.itemsize for f in layout.values())


def build(
    source: Source, options: ReadOptions, files: DiskTables | None = None
) -> tuple[TensorDict, Description]:
    """Read ``source`` once, check every transition, measure, and scale the rewards.

    The table has all transitions. With ``files`` they are written there, and the table has one chunk.
    Raises ``DatasetError`` at the first transition that is wrong.
    """
    layout, total = source.layout, int(source.episode_lengths.sum())
    size = max(1, min(CHUNK, CHUNK_BYTES // max(row_bytes(layout), 1), total))
    room = total if files is None else size
    table = {key: torch.empty((room, *f.shape), dtype=f.dtype) for key, f in layout.items()}
    checker = ChunkChecker(source, options.clip_actions)
    with tqdm(
        total=total, desc=source.name, unit="row", unit_scale=True, leave=False,
        disable=None if options.progress is None else not options.progress,
    ) as bar:  # fmt: skip
        for columns, episodes in source.parts:
            for first in range(0, len(episodes.rows), size):
                part = slice(first, min(first + size, len(episodes.rows)))
                start, count = checker.filled, part.stop - first
                place = start if files is None else 0
                chunk = {key: values[place : place + count] for key, values in table.items()}
                raw = _raw_values(columns, episodes, part, layout, options.reward_offset)
                checker.fill(chunk, raw, columns, episodes.rows[part])
                if files is not None:
                    files.append(chunk, start)
                bar.update(count)
    change = reward_map(options.reward, checker.returns, source.name)
    if change != NAMED_MAPS["raw"]:
        for rewards in [table[REWARD]] if files is None else files.rewards(options.dtype):
            for some in rewards.split(CHUNK):
                some.copy_(change.forward(some.double()))
    limit = options.env_max_episode_steps
    if limit is None and source.env_spec is not None:
        limit = source.env_spec.max_episode_steps
    both = zip(checker.findings(), time_limit_findings(source, limit), strict=True)
    found, noted = ([f"{source.name}: {text}" for text in chain(*texts)] for texts in both)
    known: dict[str, Any] = {each.name: getattr(source, each.name) for each in fields(Description)}
    description = Description(**known | {
        "episode_returns": checker.returns,
        "statistics": {
            key[0] if len(key) == 1 else key: each.result()
            for key, each in checker.statistics.items()
        },
        "reward_map": change,
        "dtype": options.dtype,
        "warnings": (*source.warnings, *found),
        "notes": (*source.notes, *source.warnings, *found, *noted),
    })  # fmt: skip
    return TensorDict({}, batch_size=[room]).update(table), description


def _raw_values(
    columns: Columns, episodes: Episodes, part: slice, layout: Layout, reward_offset: int
) -> dict[Key, NDArray[Any]]:
    """The source's values of some transitions, by the keys of ``layout``.

    Without a known next observation, it is the observation itself, and every action is allowed.
    """
    rows, after = episodes.rows[part], episodes.after[part]
    start, stop = int(rows[0]), int(rows[-1]) + 1
    here: Any = slice(0, len(rows)) if len(rows) == stop - start else rows - start
    raw: dict[Key, NDArray[Any]] = {
        TERMINATED: episodes.terminated[part], TRUNCATED: episodes.truncated[part],
    }  # fmt: skip
    for key in layout:
        place, following = "/".join(key), ("next", *key)
        if key in raw or place not in columns.columns:  # made from the other side
            continue
        values = np.asarray(columns.columns[place][start : stop + 1])  # once for both sides
        raw[key] = values[after - start if key == REWARD and reward_offset else here]
        if following in layout and "/".join(following) not in columns.columns:
            raw[following] = values[after - start]
            if key == MASK:
                raw[following][after == rows] = 1
    raw[REWARD] = raw[REWARD].reshape(-1)
    return raw


class ChunkChecker:
    """Converts, checks and measures consecutive chunks of the transitions of ``source``.

    With ``clip_actions`` continuous actions are clipped and counted, otherwise they are an error.
    NaN in a next observation of a terminated transition, which is never used, becomes its observation.

    ``returns``: float64 ``(E,)``, of raw rewards, complete when all chunks are filled. ``statistics``:
    by key, of observations that are numbers.
    """

    def __init__(self, source: Source, clip_actions: bool) -> None:
        self.source, self.clip_actions = source, clip_actions
        lengths, leaves = source.episode_lengths, leaf_spaces(source.observation_space)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.returns = np.zeros(len(lengths))
        self.statistics = {
            key: StatisticsAccumulator(source.layout[key].shape)
            for key, space in leaves.items()
            if not (isinstance(space, spaces.Discrete | spaces.MultiDiscrete) or is_image(space))
        }
        #: The space of each leaf with categories, and of actions, by key.
        self.spaces = {ACTION: source.action_space}
        for key, space in leaves.items():
            if isinstance(space, CATEGORIES):
                self.spaces |= {key: space, ("next", *key): space}
        self.clipped = self.unused = self.filled = 0
        #: Leading rows of observations and actions that float32 rounds.
        self.samples: dict[Key, list[NDArray[Any]]] = {}
        self.rewards = StatisticsAccumulator((1,))  # raw
        self.largest = np.empty(0)  # the largest magnitudes of rewards, ascending

    def fill(
        self, chunk: Mapping[Key, Tensor], raw: Mapping[Key, NDArray[Any]], columns: Columns,
        rows: NDArray[np.int64],
    ) -> None:  # fmt: skip
        """Fill the next chunk with ``raw``, the source's values, which are those of ``rows``.

        Raises ``DatasetError`` naming the first wrong row.
        """
        self.columns, self.rows = columns, rows
        for key, values in raw.items():
            converted = self._converted(key, values, self.source.layout[key])
            if np.any(start := getattr(self.spaces.get(key), "start", 0)):
                converted = converted.astype(np.int64) - start
            with np.errstate(over="ignore", invalid="ignore"):  # infinite numbers are refused below
                chunk[key].numpy()[...] = converted
        chunk[DONE].copy_(chunk[TERMINATED] | chunk[TRUNCATED])
        numbers = np.arange(self.filled, self.filled + len(rows))
        episodes = np.searchsorted(self.offsets, numbers, side="right") - 1
        chunk[EPISODE].numpy()[...] = episodes
        self._check({key: values.numpy() for key, values in chunk.items()}, raw)
        self.filled += len(rows)
        rewards = raw[REWARD].astype(np.float64)  # before they are rounded to the table's dtype
        sums = np.bincount(episodes - episodes[0], weights=rewards)
        self.returns[episodes[0] : episodes[-1] + 1] += sums
        self.rewards.update(torch.from_numpy(rewards))
        self.largest = np.sort(np.append(self.largest, np.abs(rewards)))[-HANDFUL - 1 :]
        for key, accumulator in self.statistics.items():
            accumulator.update(chunk[key])

    def _converted(self, key: Key, values: NDArray[Any], expected: Field) -> NDArray[Any]:
        """The values in a form that can be assigned to ``expected``; raises where none can.

        Integers become floats where the space was made from the data, or the source is text, and no
        number changes; floats become categories where all are integers and a space was declared.
        """
        kind, shape, name = values.dtype.kind, values.shape[1:], self.source.name
        guessed = (key[1] if key[0] == "next" else key[0]) in self.source.guessed
        if expected.dtype == torch.bool:
            fits = kind == "b" or (kind in "iuf" and bool(((values == 0) | (values == 1)).all()))
        elif expected.dtype.is_floating_point:  # rewards may be stored as integers
            fits = kind in ("fiu" if key == REWARD or self.columns.text or guessed else "f")
            if fits and kind in "iu" and key != REWARD:
                self._refuse_rounded(key, values, expected.dtype)
        else:
            fits = kind in "iub"
            if kind == "f" and not guessed and (values == np.rint(values)).all():
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
            and values.itemsize > 4
            and key[0] in ("observation", "action")
        ):
            kept = self.samples.setdefault(key, [])
            if (left := SAMPLE - sum(map(len, kept))) > 0:
                kept.append(values.reshape(len(values), -1)[:left, :COLUMNS].astype(np.float64))
        return values.reshape(len(values), *expected.shape)

    def _refuse_rounded(self, key: Key, values: NDArray[Any], dtype: torch.dtype) -> None:
        with np.errstate(invalid="ignore"):  # a number beyond the integers is another one then
            rounded = values.astype(str(dtype).removeprefix("torch.")).astype(values.dtype)
        lost = rounded != values
        if lost.any():
            wider = ", pass dtype=torch.float64" * (dtype != torch.float64)
            raise DatasetError(
                f"{self.source.name}: {dotted(key)} has the integer {values[lost][0]}, which {dtype} "
                f"would round; subtract a constant, such as the start from times{wider}, or pass "
                "observation_space= if these are categories."
            )

    def _check(self, rows: Mapping[Key, NDArray[Any]], raw: Mapping[Key, NDArray[Any]]) -> None:
        """Check converted values; ``raw``: the source's. Raise naming the first wrong one."""
        # NumPy is faster here than torch: chunks are short, and starting torch's threads takes time.
        for key, values in rows.items():
            # If the sum is finite, every term is; a sum that overflows needs the slower test.
            with np.errstate(all="ignore"):
                finite = values.dtype.kind != "f" or np.isfinite(values.sum())
            if not finite and not np.isfinite(values).all():
                self._check_infinite(key, rows, raw.get(key))
        for key, space in self.spaces.items():
            low, high = np.array(0), np.array(1)  # of a MultiBinary
            if isinstance(space, spaces.Box):
                low, high = (bound.astype(rows[key].dtype) for bound in (space.low, space.high))
            elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
                high = np.asarray(space.n if isinstance(space, spaces.Discrete) else space.nvec) - 1
            if (rows[key] < low).any() or (rows[key] > high).any():
                self._check_outside(key, rows[key], low, high, raw[key].dtype)
        if MASK not in rows:
            return
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

    def _check_infinite(
        self, key: Key, rows: Mapping[Key, NDArray[Any]], raw: NDArray[Any] | None
    ) -> None:
        values = rows[key]
        if key[:2] == ("next", "observation"):
            missing = np.isnan(values).reshape(len(values), -1).any(axis=1)
            missing &= rows[TERMINATED][:, 0]
            values[missing] = rows[key[1:]][missing]
            self.unused += int(missing.sum())
        wrong = ~np.isfinite(values)
        if raw is not None and raw.size == wrong.size:
            beyond = wrong & np.isfinite(raw.astype(np.float64).reshape(wrong.shape))
            if beyond.any():
                value = raw.reshape(wrong.shape)[beyond][0]
                self._refuse(
                    key, beyond, f"has the value {value:g}, beyond the range of {values.dtype},",
                    "scale the column, or pass dtype=torch.float64.",
                )  # fmt: skip
        repair = "expected finite numbers: repair those rows"
        if key[:2] == ("next", "observation"):
            repair += (
                ", or pass columns={'next_observation': None}, which drops last truncated rows"
            )
        self._refuse(key, wrong, "is NaN or infinite", f"{repair}.")

    def _check_outside(
        self, key: Key, values: NDArray[Any], low: Any, high: Any, stored: Any
    ) -> None:
        """Actions may be outside their bounds by rounding; with ``clip_actions`` by more."""
        space = self.spaces[key]
        if not isinstance(space, spaces.Box):
            shifted = np.any(getattr(space, "start", 0))
            self._refuse(
                key, (values < low) | (values > high), "is out of range",
                f"expected {'start <= value < start + n' if shifted else '0 <= value < n'} of "
                f"{describe_space(space)}: give the environment the data came from, or repair those "
                "rows.",
            )  # fmt: skip
        wrong = outside_bounds(values, low, high, stored)
        if self.clip_actions:
            self.clipped += int(wrong.reshape(len(wrong), -1).any(1).sum())
        elif wrong.any():
            self._refuse(
                key, wrong, f"is outside its bounds (up to |{np.abs(values[wrong]).max():.6g}|)",
                f"expected {bounds_in_words(low, high)}: pass clip_actions=True, or the env with the "
                "right bounds.",
            )  # fmt: skip
        np.clip(values, low, high, out=values)

    def _refuse(self, key: Key, wrong: Any, problem: str, expected: str) -> None:
        """Raise ``DatasetError`` naming the first row of the source in ``wrong``, if there is one."""
        if not wrong.any():
            return
        found = np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))
        number, row = self.filled + int(found[0]), self.columns.source_row(self.rows[found[0]])
        episode = int(np.searchsorted(self.offsets, number, side="right")) - 1
        raise DatasetError(
            f"{self.columns.name}: {dotted(key)} {problem} in {len(found)} of the {len(wrong)} "
            f"transitions checked together, first at row {row} of "
            f"{self.columns.rows} (episode {episode}, step {number - self.offsets[episode]}); "
            f"{expected}"
        )

    def findings(self) -> tuple[list[str], list[str]]:
        """Warnings on what looks wrong or was repaired; notes on what is unusual, but often correct."""
        warnings, notes, count = list[str](), list[str](), self.filled
        for key, kept in self.samples.items():
            names = self.source.parts[0][0].paths.get(dotted(key), "").split(", ")
            warnings += _lost_by_rounding(dotted(key), np.concatenate(kept), names)
        if self.clipped and isinstance(space := self.source.action_space, spaces.Box):
            bounds = bounds_in_words(space.low, space.high)
            warnings.append(f"{self.clipped} rows had actions outside {bounds}; clipped.")
        pairs = enumerate(pairwise(self.largest[::-1]), start=1)
        for few, high, low in [(n, h, k) for n, (h, k) in pairs if 0 < k * DOMINATES < h][:1]:
            warnings.append(
                f"{few} of {count} rewards are of magnitude {high:.3g} and more, the "
                f"others at most {low:.3g}: they dominate the sum of squares, so that values are "
                "learned of them alone. Repair those rows if they are errors, or scale or clip "
                "the rewards."
            )
        if self.unused:
            notes.append(
                f"next_observation is NaN in {self.unused} rows that terminate, where it is never "
                "used; the observation is stored there."
            )
        if count > 1 and self.rewards.low == self.rewards.high:
            reward = float(self.rewards.low[0])
            notes.append(f"every reward is {reward:g}; episodes differ in their lengths only.")
        for key, each in self.statistics.items():
            constant = np.flatnonzero(each.low == each.high).tolist()
            if constant and count > 1:
                more = "..." if len(constant) > 8 else ""
                notes.append(
                    f"{dotted(key)} never changes in {len(constant)} of {len(each.low)} columns "
                    f"({', '.join(map(str, constant[:8]))}{more}); their std is taken as 1."
                )
        return warnings, notes


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


def time_limit_findings(source: Source, limit: int | None) -> tuple[list[str], list[str]]:
    """Warnings and notes where the episodes contradict the environment's time limit, or hide one.

    Episodes may be longer than the limit. All may terminate at one step: a warning where this is the
    limit, a note where none is known.
    """
    length, warnings = source.episode_lengths, []
    longest = int(length.max())
    if limit is not None and longest > limit:
        warnings.append(
            f"episodes have up to {longest} steps, but the environment ends them after {limit}: "
            "returns of evaluations are of shorter episodes. Pass env= with the limit that the data "
            f"were recorded with: env=lambda: gymnasium.make(..., max_episode_steps={longest})."
        )
    terminated = np.concatenate([episodes.terminated for _, episodes in source.parts])
    end = terminated[length.cumsum() - 1]
    # The file may cut the last episode short. Short episodes often have equal lengths.
    complete, steps = length if end[-1] else length[:-1], int(length[0])
    if len(complete) < 3 or not end[: len(complete)].all() or not 5 <= steps == longest:
        return warnings, []
    if (complete != steps).any() or limit not in (None, steps):
        return warnings, []
    paths, column, remedy = source.parts[0][0].paths, "", "store those ends as truncations"
    if name := paths.get("terminated", paths.get("trajectory_end")):
        column = f" ({name!r})"
        remedy = f"pass columns={{'terminated': None, 'truncated': {name!r}}}"
    text = (
        f"all {int(end.sum())} terminations{column} come at step {steps} of their episode and no other "
        "step ends one"
    )
    if limit is None:
        note = f"{text}. If that is a time limit, at which values must be bootstrapped, {remedy}."
        return warnings, [note]
    return [
        f"{text}: that is the environment's time limit, at which values must be bootstrapped: "
        f"{remedy}. If each episode really terminates after that many steps, ignore this warning."
    ], []
