"""From a source to a checked table of transitions, in memory or in files."""

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

from iql_torchrl.data.checks import BlockChecker
from iql_torchrl.data.codec import category_starts, leaf_spaces
from iql_torchrl.data.dataset import Description
from iql_torchrl.data.readers.source import ReadOptions, Source
from iql_torchrl.data.scaling import RewardMap, StatisticsAccumulator, reward_map
from iql_torchrl.data.schema import (
    EPISODE,
    REWARD,
    DatasetError,
    EpisodeIndex,
    Key,
    Layout,
    dotted,
)
from iql_torchrl.data.spaces import is_image

BLOCK = 65_536
#: Bytes of one block while writing to disk: the bound on memory.
BLOCK_BYTES = 64 * 2**20


class DiskTables:
    """Tables of consecutive rows in files; one block at a time is in memory.

    Table n, in ``folders[n]``, has the rows ``edges[n]`` to ``edges[n + 1]``, and a file for each
    entry. ``ranges``: the smallest and largest number of each entry over all rows.
    """

    def __init__(self, layout: Layout, edges: NDArray[np.int64], folders: list[Path]) -> None:
        self.edges, self.folders = edges, folders
        self.block_rows = max(1, min(int(edges[-1]), BLOCK_BYTES // max(row_bytes(layout), 1)))
        self.ranges = {key: (float("inf"), float("-inf")) for key in layout}
        for path in (folder / file_name(key) for folder in folders for key in layout):
            path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, block: Mapping[Key, Tensor], start: int) -> None:
        """Write the next rows, which begin with row ``start``."""
        stop = start + len(block[REWARD])
        first, last = np.searchsorted(self.edges, [start, stop - 1], side="right") - 1
        for key, values in block.items():
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
    """Of the file of an entry, in the folder of a table."""
    return "/".join(key) + ".memmap"


def row_bytes(layout: Layout) -> int:
    return sum(int(np.prod(f.shape)) * f.dtype.itemsize for f in layout.values())


def build(
    source: Source, options: ReadOptions, files: DiskTables | None = None
) -> tuple[TensorDict, Description]:
    """Reads ``source`` once, checks every row, measures, and maps the rewards.

    The table has all rows. With ``files`` they are written there, and the table has one block of them.
    Raises ``DatasetError`` at the first row that is wrong.
    """
    layout, index = source.layout(options.dtype), EpisodeIndex(source.episode_lengths)
    size = index.rows if files is None else files.block_rows
    table = {key: torch.empty((size, *f.shape), dtype=f.dtype) for key, f in layout.items()}
    checker = BlockChecker(source, index, options.clip_actions)
    measured = _Measured(source, layout, index)
    with tqdm(
        total=index.rows, desc=source.name, unit="row", unit_scale=True, leave=False,
        disable=None if options.progress is None else not options.progress,
    ) as bar:  # fmt: skip
        block_rows = BLOCK if files is None else size
        for block, start in _blocks(source, layout, table, block_rows, measured, checker):
            block[EPISODE].copy_(torch.from_numpy(index.ids(start, start + len(block[REWARD]))))
            checker.check(block, start)
            for key, accumulator in measured.statistics.items():
                accumulator.update(block[key])
            if files is not None:
                files.append(block, start)
            bar.update(len(block[REWARD]))
    try:
        change = reward_map(options.reward, measured.returns)
    except ValueError as error:
        raise DatasetError(f"{source.name}: {error}") from None
    if change != RewardMap():
        for rewards in [table[REWARD]] if files is None else files.rewards(options.dtype):
            for part in rewards.split(BLOCK):
                part.copy_(change.forward(part.double()))
    warnings = tuple(
        text if text.startswith(source.name) else f"{source.name}: {text}"
        for text in (*source.warnings, *checker.warnings())
    )
    own = ("name", "observation_space", "action_space", "env_spec", "adaptation", "reference_scores",
           "episode_lengths")  # fmt: skip
    description = Description(
        **{name: getattr(source, name) for name in own},
        episode_returns=measured.returns,
        statistics={
            key[0] if len(key) == 1 else key: each.result()
            for key, each in measured.statistics.items()
        },
        reward_map=change,
        dtype=options.dtype,
        warnings=warnings,
        notes=(*source.notes, *warnings, *measured.notes(source.name)),
    )
    return TensorDict({}, batch_size=[size]).update(table), description


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
        with np.errstate(invalid="ignore"):
            sums = np.bincount(ids - ids[0], weights=values)
            self.returns[ids[0] : ids[0] + len(sums)] += sums
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

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


def _blocks(
    source: Source,
    layout: Layout,
    table: dict[Key, Tensor],
    block_rows: int,
    measured: _Measured,
    checker: BlockChecker,
) -> Iterator[tuple[dict[Key, Tensor], int]]:
    """The source's rows in consecutive blocks, each with its first row: views of ``table``.

    A table of fewer rows than the source is written again from its start.
    """
    row, total, room = 0, source.rows, len(table[REWARD])
    starts = category_starts(source.observation_space, source.action_space)
    for piece in source.pieces():
        checker.check_piece(piece, layout)
        size, done = len(piece[REWARD]), 0
        if row + size > total:
            raise DatasetError(
                f"{source.name}: more rows than the {total} announced; it changed while being read."
            )
        measured.add_rewards(piece[REWARD], row)
        while done < size:
            begin = row - row % block_rows  # of the block
            end = min(begin + block_rows, total)
            take = min(size - done, end - row)
            for key, values in piece.items():
                part, target = values[done : done + take], table[key][row % room :][:take]
                if key in starts:
                    shape = (len(part), *starts[key].shape)
                    part = part.astype(np.int64).reshape(shape) - starts[key]
                with np.errstate(over="ignore"):  # the check refuses infinite numbers
                    target.numpy()[...] = part.reshape(target.shape)
            row, done = row + take, done + take
            if row == end:
                block = {key: rows[begin % room :][: end - begin] for key, rows in table.items()}
                yield block, begin
    if row < total:
        raise DatasetError(
            f"{source.name}: {row} rows where {total} were announced; it is incomplete."
        )
