"""From a source to a checked table of transitions, in memory or memory-mapped on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from iql_torchrl.data.block_checker import BlockChecker
from iql_torchrl.data.readers.source import Piece, Source
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
    leaf_spaces,
    transition_layout,
)
from iql_torchrl.data.spaces import is_image
from iql_torchrl.data.table_storage import DiskTable, MemoryTable, TableFiller, row_bytes

__all__ = ["Built", "Measured", "build", "fill", "layout_of", "table_bytes"]

TABLE = "transitions"
_NUMPY = {
    torch.float32: "f", torch.float64: "f", torch.float16: "f", torch.bool: "b",
    torch.int64: "iu", torch.int32: "iu", torch.int16: "iu", torch.int8: "iu", torch.uint8: "iu",
}  # fmt: skip


@dataclass(kw_only=True)
class Measured:
    """What was measured while a table was read.

    ``warnings``: the sentences of ``notes`` that the caller issues as ``DatasetWarning``.
    """

    episode_returns: NDArray[np.float64]
    episode_lengths: NDArray[np.int64]
    statistics: dict[Key, ObservationStatistics]
    map: RewardMap
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Built(Measured):
    """A checked table with what was measured while it was read; rewards are mapped."""

    transitions: TensorDict


def table_bytes(source: Source, dtype: torch.dtype) -> int:
    """Bytes of the table that ``build`` makes of ``source``."""
    return source.rows * row_bytes(layout_of(source, dtype))


def layout_of(source: Source, dtype: torch.dtype) -> Layout:
    """The layout of the table that ``build`` makes of ``source``."""
    return transition_layout(
        source.observation_space, source.action_space,
        dtype=dtype, masked=source.masked, log_prob=source.log_prob,
    )  # fmt: skip


def build(
    source: Source,
    reward: str | tuple[float, float],
    *,
    dtype: torch.dtype,
    clip_actions: bool,
    progress: bool | None,
    folder: Path | None = None,
) -> Built:
    """Reads ``source`` once, checks every row, measures, and maps the rewards.

    ``folder``: where to put a memory-mapped table; None keeps it in memory. ``progress``: None
    shows a bar on terminals only. Raises ``DatasetError`` at the first row that is wrong.
    """
    layout, rows = layout_of(source, dtype), source.rows
    table = MemoryTable(layout, rows) if folder is None else DiskTable(layout, rows, folder)
    measured = fill(source, reward, table, clip_actions=clip_actions, progress=progress)
    return Built(transitions=table.finish(), **vars(measured))


def fill(
    source: Source,
    reward: str | tuple[float, float],
    table: TableFiller,
    *,
    clip_actions: bool,
    progress: bool | None,
) -> Measured:
    """What ``build`` does, for rows that go to ``table``."""
    index = EpisodeIndex(source.episode_lengths)
    checker = BlockChecker(
        source.name, index, source.observation_space, source.action_space, clip_actions,
        source.terminates_inside,
    )  # fmt: skip
    running = _Running(source, table.layout, index)
    with tqdm(
        total=index.rows, desc=source.name, unit="row", unit_scale=True, leave=False,
        disable=None if progress is None else not progress,
    ) as bar:  # fmt: skip
        _read(source, table, checker, running, bar)
    try:
        change = reward_map(reward, running.returns)
    except ValueError as error:
        raise DatasetError(f"{source.name}: {error}") from None
    table.map_rewards(change)
    statistics = {key: acc.result() for key, acc in running.statistics.items()}
    warnings = _warnings(source, checker)
    notes = (*source.notes, *warnings, *_notes(source, running, statistics))
    return Measured(
        episode_returns=running.returns, episode_lengths=source.episode_lengths,
        statistics=statistics, map=change, notes=notes, warnings=tuple(warnings),
    )  # fmt: skip


class _Running:
    def __init__(self, source: Source, layout: Layout, index: EpisodeIndex) -> None:
        self.index = index
        self.returns = np.zeros(len(index.lengths), np.float64)
        self.low, self.high = np.inf, -np.inf
        without = {
            key
            for key, space in leaf_spaces(source.observation_space).items()
            if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) or is_image(space)
        }
        self.statistics = {
            key: StatisticsAccumulator(f.shape)
            for key, f in layout.items()
            if key[0] == "observation" and key not in without
        }

    def add_rewards(self, rewards: NDArray[Any], start: int) -> None:
        """Sums the file's own numbers, before they are rounded to the table's dtype."""
        values = np.asarray(rewards, np.float64)
        ids = self.index.ids(start, start + len(values))
        sums = np.bincount(ids - ids[0], weights=values)
        self.returns[ids[0] : ids[0] + len(sums)] += sums
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))

    def add_block(self, block: Mapping[Key, Tensor]) -> None:
        for key, accumulator in self.statistics.items():
            accumulator.update(block[key])


def _read(
    source: Source,
    sink: TableFiller,
    checker: BlockChecker,
    measured: _Running,
    bar: Any,
) -> None:
    start, filled, total = 0, 0, sink.rows
    starts = category_starts(source.observation_space, source.action_space)
    block = sink.block(0, min(sink.block_rows, total))
    for piece in source.pieces():
        _check_dtypes(source, piece, sink.layout)
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
                target = block[key][filled : filled + take]
                part = values[done : done + take]
                if part.dtype.kind in "iuf" and target.dtype == torch.bool:
                    part = part != 0
                if key in starts:
                    part = (
                        part.astype(np.int64).reshape(len(part), *starts[key].shape) - starts[key]
                    )
                target.copy_(_tensor(part).reshape(target.shape))
            filled, done = filled + take, done + take
            if filled == room:
                ids = checker.index.ids(start, start + filled)
                block[EPISODE].copy_(torch.from_numpy(ids))
                checker.check(block, start)
                measured.add_block(block)
                sink.commit(block, start)
                bar.update(filled)
                start, filled = start + filled, 0
                if start < total:
                    block = sink.block(start, min(sink.block_rows, total - start))
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


def _check_dtypes(source: Source, piece: Piece, layout: Layout) -> None:
    """Raises where integers would become floats, or floats integers or marks, and on bad shapes."""
    for key, values in piece.items():
        expected = layout[key]
        kind, allowed = values.dtype.kind, _NUMPY[expected.dtype]
        fits = kind in allowed or (kind == "b" and allowed == "iu")
        if key == REWARD and kind in "iu":  # Rewards may be stored as integers.
            fits = True
        if expected.dtype == torch.bool and kind in "iuf":
            fits = bool(((values == 0) | (values == 1)).all())
        name = ".".join(key)
        if not fits:
            raise DatasetError(
                f"{source.name}: {name} has {values.dtype} values, expected {expected.dtype}"
                f"{' (0 or 1)' if expected.dtype == torch.bool else ''}; convert it, or pass the env "
                "it came from: integers and floats are never cast into each other."
            )
        if values[0].size != int(np.prod(expected.shape)):
            raise DatasetError(
                f"{source.name}: {name} has rows of shape {values.shape[1:]}, expected "
                f"{expected.shape}; pass the env the data came from."
            )


def _warnings(source: Source, checker: BlockChecker) -> list[str]:
    """What looks wrong or was repaired: one sentence for each ``DatasetWarning``."""
    texts = [*source.warnings, *checker.warnings(source.ends_known, source.termination)]
    return [text if text.startswith(source.name) else f"{source.name}: {text}" for text in texts]


def _notes(
    source: Source, measured: _Running, statistics: dict[Key, ObservationStatistics]
) -> list[str]:
    """What is unusual, but correct in many environments: notes without a warning."""
    texts = []
    if measured.low == measured.high and measured.index.rows > 1:
        texts.append(
            f"{source.name}: every reward is {measured.low:g}; episodes differ in their lengths only."
        )
    for key, s in statistics.items():
        if s.constant and s.count > 1:
            columns = ", ".join(map(str, s.constant[:8])) + ("..." if len(s.constant) > 8 else "")
            texts.append(
                f"{source.name}: {'.'.join(key)} never changes in {len(s.constant)} of "
                f"{s.mean.numel()} columns ({columns}); their std is taken as 1."
            )
    return texts
