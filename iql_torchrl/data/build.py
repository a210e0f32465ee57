"""From columns and episodes to checked transitions, in memory or in files, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from iql_torchrl.data.checks import ChunkChecker, fixed_horizon
from iql_torchrl.data.codec import category_starts, leaf_spaces
from iql_torchrl.data.dataset import Description
from iql_torchrl.data.readers.arrays import Columns
from iql_torchrl.data.readers.episodes import Episodes
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.scaling import RewardMap, StatisticsAccumulator, reward_map
from iql_torchrl.data.schema import (
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
from iql_torchrl.data.spaces import is_image

#: At most so many transitions, and about so many bytes, are read, checked and written together.
CHUNK, CHUNK_BYTES = 65_536, 16 * 2**20


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
    layout, index = source.layout(options.dtype), EpisodeIndex(source.episode_lengths)
    size = max(1, min(CHUNK, CHUNK_BYTES // max(row_bytes(layout), 1), index.rows))
    room = index.rows if files is None else size
    table = {key: torch.empty((room, *f.shape), dtype=f.dtype) for key, f in layout.items()}
    checker = ChunkChecker(source, index, options.clip_actions)
    measured = _Measured(source, layout, index)
    with tqdm(
        total=index.rows, desc=source.name, unit="row", unit_scale=True, leave=False,
        disable=None if options.progress is None else not options.progress,
    ) as bar:  # fmt: skip
        start = 0
        for columns, episodes in source.parts:
            for first in range(0, len(episodes.rows), size):
                part = slice(first, min(first + size, len(episodes.rows)))
                count, place = part.stop - first, start if files is None else 0
                chunk = {key: values[place : place + count] for key, values in table.items()}
                raw = _raw_values(columns, episodes, part, layout, options.reward_offset)
                checker.begin(columns, episodes.rows[part], start)
                _convert(chunk, raw, source, layout, checker)
                chunk[EPISODE].copy_(torch.from_numpy(index.ids(start, start + count)))
                checker.check(chunk, raw)
                measured.add(chunk, raw[REWARD], start, checker)
                if files is not None:
                    files.append(chunk, start)
                start += count
                bar.update(count)
    return _described(source, options, table, files, checker, measured)


def _raw_values(
    columns: Columns, episodes: Episodes, part: slice, layout: Layout, reward_offset: int
) -> dict[Key, NDArray[Any]]:
    """The source's values of some transitions, by the keys of ``layout``.

    Without a known next observation, it is the observation itself, and every action is allowed.
    """
    rows, after = episodes.rows[part], episodes.after[part]
    start, stop = int(rows[0]), int(rows[-1]) + 1
    contiguous = len(rows) == stop - start
    here: Any = slice(0, len(rows)) if contiguous else rows - start
    raw: dict[Key, NDArray[Any]] = {
        TERMINATED: episodes.terminated[part], TRUNCATED: episodes.truncated[part],
    }  # fmt: skip
    for key in layout:
        place, following = "/".join(key), ("next", *key)
        if key in raw or key in (DONE, EPISODE):
            continue
        if place not in columns.columns:
            if key[0] == "next":
                continue  # made from the other side
            raise _lacks(columns, layout)
        values = np.asarray(columns.columns[place][start : stop + 1])  # once for both sides
        raw[key] = values[after - start if key == REWARD and reward_offset else here]
        if following in layout and "/".join(following) not in columns.columns:
            raw[following] = values[after - start]
            if key == MASK:
                raw[following][after == rows] = 1
    if any(key not in raw for key in layout if key not in (DONE, EPISODE)):
        raise _lacks(columns, layout)
    extra = {("observation", *key[1:]) for key in columns.leaves("observation")} - layout.keys()
    if extra:
        raise _lacks(columns, layout)
    raw[REWARD] = raw[REWARD].reshape(-1)
    return raw


def _lacks(columns: Columns, layout: Layout) -> DatasetError:
    found = [place.replace("/", ".") for place in columns.columns if "observation" in place]
    expected = [dotted(key) for key in layout if "observation" in key]
    return DatasetError(
        f"{columns.name}: the data has the leaves {', '.join(found)}; its spaces have "
        f"{', '.join(expected)}; expected the same: pass the env the data came from."
    )


def _convert(
    chunk: Mapping[Key, Tensor], raw: Mapping[Key, NDArray[Any]], source: Source, layout: Layout,
    checker: ChunkChecker,
) -> None:  # fmt: skip
    """Write the source's values into the chunk, in the dtypes of ``layout``."""
    starts = category_starts(source.observation_space, source.action_space)
    for key, values in raw.items():
        part = checker.convert(key, values, layout[key])
        if key in starts:
            part = part.astype(np.int64) - starts[key]
        with np.errstate(over="ignore", invalid="ignore"):  # the check refuses infinite numbers
            chunk[key].numpy()[...] = part
    if NEXT_MASK in chunk and NEXT_MASK not in raw:
        chunk[NEXT_MASK].fill_(True)
    chunk[DONE].copy_(chunk[TERMINATED] | chunk[TRUNCATED])


class _Measured:
    """Returns of episodes, the range of rewards, and statistics of observations that are numbers."""

    def __init__(self, source: Source, layout: Layout, index: EpisodeIndex) -> None:
        self.index = index
        self.returns = np.zeros(len(index.lengths), np.float64)
        self.low, self.high = np.inf, -np.inf
        self.statistics = {
            key: StatisticsAccumulator(layout[key].shape)
            for key, space in leaf_spaces(source.observation_space).items()
            if not (isinstance(space, spaces.Discrete | spaces.MultiDiscrete) or is_image(space))
        }

    def add(
        self, chunk: Mapping[Key, Tensor], rewards: NDArray[Any], start: int, checker: ChunkChecker
    ) -> None:
        """Sums the source's numbers, before they are rounded to the table's dtype."""
        values = np.asarray(rewards, np.float64)
        ids = self.index.ids(start, start + len(values))
        sums = np.bincount(ids - ids[0], weights=values)
        self.returns[ids[0] : ids[0] + len(sums)] += sums
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        checker.count_rewards(values)
        for key, accumulator in self.statistics.items():
            accumulator.update(chunk[key])

    def notes(self, name: str) -> Iterator[str]:
        """What is unusual, but correct in many environments."""
        if self.low == self.high and self.index.rows > 1:
            yield f"{name}: every reward is {self.low:g}; episodes differ in their lengths only."
        for key, accumulator in self.statistics.items():
            s = accumulator.result()
            if s.constant and s.count > 1:
                more = "..." if len(s.constant) > 8 else ""
                yield (
                    f"{name}: {dotted(key)} never changes in {len(s.constant)} of {s.mean.numel()} "
                    f"columns ({', '.join(map(str, s.constant[:8]))}{more}); their std is taken as 1."
                )


def _described(
    source: Source, options: ReadOptions, table: dict[Key, Tensor], files: DiskTables | None,
    checker: ChunkChecker, measured: _Measured,
) -> tuple[TensorDict, Description]:  # fmt: skip
    """The table with scaled rewards, and the description of all transitions."""
    change = reward_map(options.reward, measured.returns, source.name)
    if change != RewardMap():
        for rewards in [table[REWARD]] if files is None else files.rewards(options.dtype):
            for part in rewards.split(CHUNK):
                part.copy_(change.forward(part.double()))
    limit = options.env_max_episode_steps
    if limit is None and source.env_spec is not None:
        limit = source.env_spec.max_episode_steps
    doubt, note = fixed_horizon(source, limit)
    found = [f"{source.name}: {text}" for text in (*checker.warnings(), doubt) if text]
    warnings = (*source.warnings, *found)
    checked = [f"{source.name}: {text}" for text in (*checker.notes(), note) if text]
    size = len(table[REWARD])
    description = Description(
        name=source.name,
        observation_space=source.observation_space,
        action_space=source.action_space,
        env_spec=source.env_spec,
        reference_scores=source.reference_scores,
        episode_lengths=source.episode_lengths,
        adaptation=source.adaptation,
        episode_returns=measured.returns,
        statistics={
            key[0] if len(key) == 1 else key: each.result()
            for key, each in measured.statistics.items()
        },
        reward_map=change,
        dtype=options.dtype,
        warnings=warnings,
        notes=(*source.notes, *warnings, *checked, *measured.notes(source.name)),
    )
    return TensorDict({}, batch_size=[size]).update(table), description
