"""From a source to a checked table of transitions, in memory or memory-mapped on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

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
    BlockChecker,
    DatasetError,
    EpisodeIndex,
    Key,
    Layout,
    leaf_spaces,
    transition_layout,
)

__all__ = ["Built", "build", "table_bytes"]

BLOCK = 65_536
#: Bytes of one block while writing to disk: the bound on memory.
BLOCK_BYTES = 64 * 2**20
TABLE = "transitions"
_NUMPY = {
    torch.float32: "f", torch.float64: "f", torch.float16: "f", torch.bool: "b",
    torch.int64: "iu", torch.int32: "iu", torch.int16: "iu", torch.int8: "iu", torch.uint8: "iu",
}  # fmt: skip


@dataclass
class Built:
    """A checked table with what was measured on the way; rewards are mapped.

    ``warnings``: the sentences of ``notes`` that the caller issues as ``DatasetWarning``.
    """

    transitions: TensorDict
    episode_returns: NDArray[np.float64]
    episode_lengths: NDArray[np.int64]
    statistics: dict[Key, ObservationStatistics]
    map: RewardMap
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class _Memory:
    """The complete table in memory; blocks are views of it."""

    def __init__(self, layout: Layout, rows: int) -> None:
        self.layout, self.rows, self.block_rows = layout, rows, BLOCK
        self.table = {k: torch.empty((rows, *f.shape), dtype=f.dtype) for k, f in layout.items()}

    def block(self, start: int, size: int) -> dict[Key, Tensor]:
        return {key: values[start : start + size] for key, values in self.table.items()}

    def commit(self, block: Mapping[Key, Tensor], start: int) -> None:
        pass

    def map_rewards(self, change: RewardMap) -> None:
        if change != RewardMap():
            rewards = self.table[REWARD]
            for start in range(0, self.rows, BLOCK):
                part = rewards[start : start + BLOCK]
                part.copy_(change.forward(part.double()))

    def finish(self) -> TensorDict:
        table = TensorDict({}, batch_size=[self.rows])
        for key, values in self.table.items():
            table.set(key, values)
        return table


class _Disk:
    """The table as memory-mapped files; one block at a time is in memory.

    Files are written, not mapped, so the process never counts their pages as its own.
    """

    def __init__(self, layout: Layout, rows: int, folder: Path) -> None:
        self.layout, self.rows, self.folder = layout, rows, folder
        self.block_rows = int(max(1, min(rows, BLOCK_BYTES // max(_row_bytes(layout), 1))))
        table = TensorDict({}, batch_size=[rows])
        table.memmap_(folder)
        self.paths = {}
        for key, f in layout.items():
            made = table.make_memmap(key, torch.Size((rows, *f.shape)), dtype=f.dtype)
            self.paths[key] = Path(str(made.filename))
        self.scratch = {
            k: torch.empty((self.block_rows, *f.shape), dtype=f.dtype) for k, f in layout.items()
        }

    def block(self, start: int, size: int) -> dict[Key, Tensor]:
        return {key: values[:size] for key, values in self.scratch.items()}

    def commit(self, block: Mapping[Key, Tensor], start: int) -> None:
        for key, values in block.items():
            with open(self.paths[key], "r+b") as file:
                file.seek(start * (values.nbytes // len(values)))
                # Not tofile, whose error on a full disk has no error number.
                file.write(values.numpy().data)

    def map_rewards(self, change: RewardMap) -> None:
        if change == RewardMap():
            return
        kept = self.scratch[REWARD].numpy().dtype
        with open(self.paths[REWARD], "r+b") as file:
            for start in range(0, self.rows, BLOCK):
                file.seek(start * kept.itemsize)
                values = np.fromfile(file, kept, min(BLOCK, self.rows - start))
                file.seek(start * kept.itemsize)
                file.write(change.forward(values.astype(np.float64)).astype(kept).data)

    def finish(self) -> TensorDict:
        self.scratch = {}
        return TensorDict.load_memmap(self.folder)


def table_bytes(source: Source, dtype: torch.dtype) -> int:
    """Bytes of the table that ``build`` makes of ``source``."""
    return source.rows * _row_bytes(_layout(source, dtype))


def _row_bytes(layout: Layout) -> int:
    return sum(int(np.prod(f.shape)) * f.dtype.itemsize for f in layout.values())


def _layout(source: Source, dtype: torch.dtype) -> Layout:
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
    layout = _layout(source, dtype)
    index = EpisodeIndex(source.episode_lengths)
    sink = _Memory(layout, index.rows) if folder is None else _Disk(layout, index.rows, folder)
    checker = BlockChecker(
        source.name, index, source.observation_space, source.action_space, clip_actions,
        source.goes_on,
    )  # fmt: skip
    measured = _Measured(source, layout, index)
    with tqdm(
        total=index.rows, desc=source.name, unit="row", unit_scale=True, leave=False,
        disable=None if progress is None else not progress,
    ) as bar:  # fmt: skip
        _fill(source, sink, checker, measured, bar)
    try:
        change = reward_map(reward, measured.returns)
    except ValueError as error:
        raise DatasetError(f"{source.name}: {error}") from None
    sink.map_rewards(change)
    statistics = {key: acc.result() for key, acc in measured.statistics.items()}
    doubts = _doubts(source, checker)
    notes = (*source.notes, *doubts, *_remarks(source, measured, statistics))
    return Built(
        sink.finish(), measured.returns, source.episode_lengths, statistics, change,
        notes, tuple(doubts),
    )  # fmt: skip


class _Measured:
    def __init__(self, source: Source, layout: Layout, index: EpisodeIndex) -> None:
        self.index = index
        self.returns = np.zeros(len(index.lengths), np.float64)
        self.low, self.high = np.inf, -np.inf
        categories = {
            key
            for key, space in leaf_spaces(source.observation_space).items()
            if type(space).__name__ in ("Discrete", "MultiDiscrete")
        }
        self.statistics = {
            key: StatisticsAccumulator(f.shape)
            for key, f in layout.items()
            if key[0] == "observation" and key not in categories
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


def _fill(
    source: Source,
    sink: _Memory | _Disk,
    checker: BlockChecker,
    measured: _Measured,
    bar: Any,
) -> None:
    start, filled, total = 0, 0, sink.rows
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
        if key == REWARD and kind in "iu":  # Whole rewards are numbers all the same.
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


def _doubts(source: Source, checker: BlockChecker) -> list[str]:
    """What looks wrong or was repaired: one sentence for each ``DatasetWarning``."""
    texts = [*source.warnings, *checker.findings(source.ends_known, source.termination)]
    return [text if text.startswith(source.name) else f"{source.name}: {text}" for text in texts]


def _remarks(
    source: Source, measured: _Measured, statistics: dict[Key, ObservationStatistics]
) -> list[str]:
    """What is unusual but ordinary in many environments: notes only."""
    texts = []
    if measured.low == measured.high and measured.index.rows > 1:
        texts.append(
            f"{source.name}: every reward is {measured.low:g}; only the lengths of episodes can tell "
            "good from bad."
        )
    for key, s in statistics.items():
        if s.constant and s.count > 1:
            columns = ", ".join(map(str, s.constant[:8])) + ("..." if len(s.constant) > 8 else "")
            texts.append(
                f"{source.name}: {'.'.join(key)} never changes in {len(s.constant)} of "
                f"{s.mean.numel()} columns ({columns}); their std is taken as 1."
            )
    return texts
