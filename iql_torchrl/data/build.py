"""From columns and episodes to checked transitions, in memory or in files, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from iql_torchrl.data.checks import ChunkChecker, time_limit_findings
from iql_torchrl.data.dataset import Description
from iql_torchrl.data.readers.arrays import Columns
from iql_torchrl.data.readers.boundaries import Episodes
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.source import Source
from iql_torchrl.data.scaling import NAMED_MAPS, reward_map
from iql_torchrl.data.schema import MASK, REWARD, TERMINATED, TRUNCATED, Key, Layout

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
    layout, total = source.layout, int(source.episode_lengths.sum())
    size = max(1, min(CHUNK, CHUNK_BYTES // max(row_bytes(layout), 1), total))
    room = total if files is None else size
    table = {key: torch.empty((room, *f.shape), dtype=f.dtype) for key, f in layout.items()}
    checker = ChunkChecker(source, layout, options.clip_actions)
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
    known: dict[str, Any] = {
        each.name: getattr(source, each.name, None) for each in fields(Description)
    }
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
