"""Storage of a table while it is built: in memory, or in memory-mapped files on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from iql_torchrl.data.scaling import (
    RewardMap,
)
from iql_torchrl.data.schema import (
    REWARD,
    Key,
    Layout,
)

__all__ = ["DiskTable", "MemoryTable", "TableFiller", "block_rows", "empty_block", "row_bytes"]

BLOCK = 65_536
#: Bytes of one block while writing to disk: the bound on memory.
BLOCK_BYTES = 64 * 2**20


class TableFiller(Protocol):
    """Where the rows of a table go: a block is filled, then committed; blocks are consecutive."""

    layout: Layout
    rows: int
    block_rows: int

    def block(self, start: int, size: int) -> dict[Key, Tensor]:
        """Where rows ``start`` to ``start + size`` are written, by key."""

    def commit(self, block: Mapping[Key, Tensor], start: int) -> None:
        """Keep the rows of a block, which starts at row ``start``."""

    def map_rewards(self, change: RewardMap) -> None:
        """Map the rewards of all rows, after the last block."""


class MemoryTable:
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


class DiskTable:
    """The table as memory-mapped files; one block at a time is in memory.

    Files are written without mapping them, so their pages do not count as memory of the process.
    """

    def __init__(self, layout: Layout, rows: int, folder: Path) -> None:
        self.layout, self.rows, self.folder = layout, rows, folder
        self.block_rows = block_rows(layout, rows)
        table = TensorDict({}, batch_size=[rows])
        table.memmap_(folder)
        self.paths = {}
        for key, f in layout.items():
            memmap = table.make_memmap(key, torch.Size((rows, *f.shape)), dtype=f.dtype)
            self.paths[key] = Path(str(memmap.filename))
        self.scratch: dict[Key, Tensor] = {}

    def block(self, start: int, size: int) -> dict[Key, Tensor]:
        self.scratch = self.scratch or empty_block(self.layout, self.block_rows)
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
        dtype = torch.empty(0, dtype=self.layout[REWARD].dtype).numpy().dtype
        with open(self.paths[REWARD], "r+b") as file:
            for start in range(0, self.rows, BLOCK):
                file.seek(start * dtype.itemsize)
                values = np.fromfile(file, dtype, min(BLOCK, self.rows - start))
                file.seek(start * dtype.itemsize)
                file.write(change.forward(values.astype(np.float64)).astype(dtype).data)

    def finish(self) -> TensorDict:
        self.scratch = {}
        return TensorDict.load_memmap(self.folder)


def block_rows(layout: Layout, rows: int) -> int:
    """Rows of one block while writing ``rows`` rows to disk."""
    return int(max(1, min(rows, BLOCK_BYTES // max(row_bytes(layout), 1))))


def empty_block(layout: Layout, rows: int) -> dict[Key, Tensor]:
    return {key: torch.empty((rows, *f.shape), dtype=f.dtype) for key, f in layout.items()}


def row_bytes(layout: Layout) -> int:
    return sum(int(np.prod(f.shape)) * f.dtype.itemsize for f in layout.values())
