"""From a source to a checked table of transitions, in memory or in memory-mapped files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from iql_torchrl.data.checks import BlockChecker, check_dtypes
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.scaling import (
    ObservationStatistics,
    RewardMap,
    StatisticsAccumulator,
    reward_map,
)
from iql_torchrl.data.schema import (
    EPISODE,
    REWARD,
    DatasetError,
    EpisodeIndex,
    Key,
    Layout,
    category_starts,
    dotted,
    leaf_spaces,
    transition_layout,
)
from iql_torchrl.data.spaces import is_image

__all__ = ["Description", "DiskTables", "build", "file_name", "fill", "layout_of", "row_bytes"]

BLOCK = 65_536
#: Bytes of one block while writing to disk: the bound on memory.
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Description:
    """Everything about a checked log except its rows.

    ``reward_map``: of the stored rewards. ``joined``: the leaves that were joined into the
    observation. ``warnings``: the sentences of ``notes`` that the caller issues as ``DatasetWarning``.
    The others are those of ``DatasetSummary`` and ``Source``.
    """

    name: str
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    env_spec: EnvSpec | None
    reference_scores: tuple[float, float] | None
    joined: tuple[str, ...]
    episode_returns: NDArray[np.float64]
    episode_lengths: NDArray[np.int64]
    statistics: dict[str | Key, ObservationStatistics]
    reward_map: RewardMap
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


class MemoryTable:
    """The complete table in memory; blocks are views of it."""

    def __init__(self, layout: Layout, rows: int) -> None:
        self.layout, self.rows, self.block_rows = layout, rows, BLOCK
        self.table = {k: torch.empty((rows, *f.shape), dtype=f.dtype) for k, f in layout.items()}

    def block(self, start: int, size: int) -> dict[Key, Tensor]:
        """Where the rows ``start`` to ``start + size`` are written, by key."""
        return {key: values[start : start + size] for key, values in self.table.items()}

    def commit(self, block: Mapping[Key, Tensor], start: int) -> None:
        """Keep the rows of a block, which starts at row ``start``."""

    def map_rewards(self, change: RewardMap) -> None:
        """Map the rewards of all rows, after the last block."""
        for part in self.table[REWARD].split(BLOCK):
            part.copy_(change.forward(part.double()))

    def transitions(self) -> TensorDict:
        table = TensorDict({}, batch_size=[self.rows])
        for key, values in self.table.items():
            table.set(key, values)
        return table


class DiskTables:
    """Tables of consecutive rows in files; one block at a time is in memory.

    Args:
        layout: of the rows.
        edges: ``(T + 1,)``, table n has the rows ``edges[n]`` to ``edges[n + 1]``.
        folders: of the T tables; a file for each entry, see ``file_name``.

    Attributes:
        ranges: smallest and largest number of each entry, over all rows.
    """

    def __init__(self, layout: Layout, edges: NDArray[np.int64], folders: list[Path]) -> None:
        self.layout, self.edges, self.folders = layout, edges, folders
        self.rows = int(edges[-1])
        self.block_rows = max(1, min(self.rows, BLOCK_BYTES // max(row_bytes(layout), 1)))
        self.ranges = {key: (float("inf"), float("-inf")) for key in layout}
        self._scratch = MemoryTable(layout, self.block_rows)
        for path in (folder / file_name(key) for folder in folders for key in layout):
            path.parent.mkdir(parents=True, exist_ok=True)

    def block(self, start: int, size: int) -> dict[Key, Tensor]:
        return self._scratch.block(0, size)

    def commit(self, block: Mapping[Key, Tensor], start: int) -> None:
        stop = start + len(block[REWARD])
        for key, values in block.items():
            if values.numel():
                low, high = (float(value) for value in values.aminmax())
                self.ranges[key] = min(low, self.ranges[key][0]), max(high, self.ranges[key][1])
        first, last = np.searchsorted(self.edges, [start, stop - 1], side="right") - 1
        for number in range(first, last + 1):
            begin, end = max(start, self.edges[number]), min(stop, self.edges[number + 1])
            for key, values in block.items():
                # not through a mapping, whose pages would count as memory of the process
                with open(self.folders[number] / file_name(key), "ab") as file:
                    file.write(values[begin - start : end - start].numpy().data)

    def map_rewards(self, change: RewardMap) -> None:
        dtype = self._scratch.table[REWARD].numpy().dtype
        for folder in self.folders:
            rewards = np.memmap(folder / file_name(REWARD), dtype, "r+")
            for start in range(0, len(rewards), BLOCK):
                part = rewards[start : start + BLOCK]
                part[:] = change.forward(part.astype(np.float64))


Table: TypeAlias = MemoryTable | DiskTables


def file_name(key: Key) -> str:
    """Of the file of an entry, in the folder of a table."""
    return "/".join(key) + ".memmap"


def row_bytes(layout: Layout) -> int:
    return sum(int(np.prod(f.shape)) * f.dtype.itemsize for f in layout.values())


def layout_of(source: Source, dtype: torch.dtype) -> Layout:
    """The layout of the table that is built of ``source``."""
    return transition_layout(
        source.observation_space, source.action_space,
        dtype=dtype, masked=source.masked, log_prob=source.log_prob,
    )  # fmt: skip


def build(source: Source, *, dtype: torch.dtype, **options: Any) -> tuple[TensorDict, Description]:
    """The table of ``source`` in memory; ``options`` are those of :func:`fill`."""
    table = MemoryTable(layout_of(source, dtype), source.rows)
    description = fill(source, table, **options)
    return table.transitions(), description


def fill(
    source: Source,
    table: Table,
    *,
    reward: str | tuple[float, float],
    clip_actions: bool,
    joined: tuple[str, ...],
    progress: bool | None,
) -> Description:
    """Reads ``source`` once into ``table``, checks every row, measures, and maps the rewards.

    ``progress``: None shows a bar on terminals only. Raises ``DatasetError`` at the first row that
    is wrong.
    """
    index = EpisodeIndex(source.episode_lengths)
    checker = BlockChecker(source, index, clip_actions)
    measured = _Measured(source, table.layout, index)
    with tqdm(
        total=index.rows, desc=source.name, unit="row", unit_scale=True, leave=False,
        disable=None if progress is None else not progress,
    ) as bar:  # fmt: skip
        _read(source, table, checker, measured, bar)
    try:
        change = reward_map(reward, measured.returns)
    except ValueError as error:
        raise DatasetError(f"{source.name}: {error}") from None
    if change != RewardMap():
        table.map_rewards(change)
    statistics = {key: acc.result() for key, acc in measured.statistics.items()}
    warnings = tuple(
        text if text.startswith(source.name) else f"{source.name}: {text}"
        for text in (*source.warnings, *checker.warnings())
    )
    own = ("name", "observation_space", "action_space", "env_spec", "reference_scores")
    return Description(
        **{name: getattr(source, name) for name in own}, joined=joined,
        episode_returns=measured.returns, episode_lengths=source.episode_lengths,
        statistics={key[0] if len(key) == 1 else key: each for key, each in statistics.items()},
        reward_map=change, warnings=warnings,
        notes=(*source.notes, *warnings, *_notes(source.name, measured, statistics)),
    )  # fmt: skip


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

    def add_rewards(self, rewards: NDArray[Any], start: int) -> None:
        """Sums the file's own numbers, before they are rounded to the table's dtype."""
        values = np.asarray(rewards, np.float64)
        ids = self.index.ids(start, start + len(values))
        sums = np.bincount(ids - ids[0], weights=values)
        self.returns[ids[0] : ids[0] + len(sums)] += sums
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))


def _read(
    source: Source, table: Table, checker: BlockChecker, measured: _Measured, bar: Any
) -> None:
    start, filled, total = 0, 0, table.rows
    starts = category_starts(source.observation_space, source.action_space)
    block = table.block(0, min(table.block_rows, total))
    for piece in source.pieces():
        check_dtypes(source.name, piece, table.layout)
        size, done = len(piece[REWARD]), 0
        if start + filled + size > total:
            raise DatasetError(
                f"{source.name}: more rows than the {total} announced; it changed while being read."
            )
        with np.errstate(invalid="ignore"):
            measured.add_rewards(piece[REWARD], start + filled)
        while done < size:
            room = len(block[REWARD])
            take = min(size - done, room - filled)
            for key, values in piece.items():
                target, part = block[key][filled : filled + take], values[done : done + take]
                if part.dtype.kind in "iuf" and target.dtype == torch.bool:
                    part = part != 0
                if key in starts:
                    shape = (len(part), *starts[key].shape)
                    part = part.astype(np.int64).reshape(shape) - starts[key]
                target.copy_(_tensor(part).reshape(target.shape))
            filled, done = filled + take, done + take
            if filled == room:
                ids = checker.index.ids(start, start + filled)
                block[EPISODE].copy_(torch.from_numpy(ids))
                checker.check(block, start)
                for key, accumulator in measured.statistics.items():
                    accumulator.update(block[key])
                table.commit(block, start)
                bar.update(filled)
                start, filled = start + filled, 0
                if start < total:
                    block = table.block(start, min(table.block_rows, total - start))
    if start < total:
        raise DatasetError(
            f"{source.name}: {start + filled} rows where {total} were announced; it is incomplete."
        )


def _tensor(values: NDArray[Any]) -> Tensor:
    if values.dtype.byteorder == ">" or not values.flags.writeable or min(values.strides) < 0:
        values = np.array(values, dtype=values.dtype.newbyteorder("="))
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        values = values.astype(np.float64)
    if values.dtype.kind == "u" and values.dtype.itemsize > 1:
        values = values.astype(np.int64)
    return torch.from_numpy(values)


def _notes(
    name: str, measured: _Measured, statistics: Mapping[Key, ObservationStatistics]
) -> list[str]:
    """What is unusual, but correct in many environments: notes without a warning."""
    texts = []
    if measured.low == measured.high and measured.index.rows > 1:
        texts.append(
            f"{name}: every reward is {measured.low:g}; episodes differ in their lengths only."
        )
    for key, s in statistics.items():
        if s.constant and s.count > 1:
            columns = ", ".join(map(str, s.constant[:8])) + ("..." if len(s.constant) > 8 else "")
            texts.append(
                f"{name}: {dotted(key)} never changes in {len(s.constant)} of "
                f"{s.mean.numel()} columns ({columns}); their std is taken as 1."
            )
    return texts
