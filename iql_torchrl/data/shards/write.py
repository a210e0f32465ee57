"""``build_shards``: from a source to a folder of shards, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from iql_torchrl.data.build import TABLE, Built, Measured, fill, layout_of, table_bytes
from iql_torchrl.data.built_folder import EPISODES, file_digest, is_built, write_record
from iql_torchrl.data.cache import fingerprint, staged_folder
from iql_torchrl.data.episode_digests import episode_digests, sketch_of
from iql_torchrl.data.load import SourceLike, open_source
from iql_torchrl.data.load_options import check_options, check_spaces
from iql_torchrl.data.locks import folder_lock
from iql_torchrl.data.readers.environments import EnvLike, env_maker
from iql_torchrl.data.readers.source import ReadOptions, Source
from iql_torchrl.data.scaling import RewardMap
from iql_torchrl.data.schema import DatasetError, Key, Layout
from iql_torchrl.data.shards.dataset import ShardedDataset
from iql_torchrl.data.shards.index import FORMAT, INDEX, digest_of
from iql_torchrl.data.shards.load import load_shards
from iql_torchrl.data.source_identity import env_identity, read_settings, source_files
from iql_torchrl.data.table_record import record
from iql_torchrl.data.table_storage import DiskTable, block_rows, empty_block

__all__ = ["build_shards", "episodes_of_shards"]


def build_shards(
    source: SourceLike,
    folder: str | Path,
    shards: int,
    *,
    env: EnvLike | None = None,
    reward: str | tuple[float, float] = "raw",
    columns: Mapping[str, str | None] | None = None,
    reward_offset: int = 0,
    concatenate: Sequence[str] | None = None,
    limit: int | None = None,
    dtype: torch.dtype = torch.float32,
    clip_actions: bool = False,
    max_episode_steps: int | None = None,
    observation_space: gym.Space[Any] | None = None,
    action_space: gym.Space[Any] | None = None,
    download: bool = True,
    progress: bool | None = None,
) -> ShardedDataset:
    """Read ``source`` once, in bounded memory, and write it as ``shards`` tables and one index.

    Every shard has whole episodes in the source's order, and a number of rows that differs from
    rows / ``shards`` by at most the longest episode. The checks of all rows, the statistics, the
    reward map and the notes are those of the whole log, by the code of ``load_dataset``, so they
    are equal to its. Memory: blocks of 64 MiB, and 16 bytes for each episode.

    ``folder`` must not exist; it is complete or absent. ``load_shards(folder)`` opens it, here and on
    any machine or store to which it is copied. The other arguments are those of ``load_dataset``.

    Raises ``DatasetError`` as ``load_dataset`` does; on ``shards`` below 1 or above the number of
    episodes; and where ``folder`` has files or does not fit on the disk.
    """
    check_options(dtype, reward, columns, limit, max_episode_steps)
    check_spaces(observation_space, action_space)
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise DatasetError(f"shards: expected a whole number, at least 1, got {shards!r}.")
    if is_built(source):
        raise DatasetError(
            f"{source}: is a built table already; build shards from the source that it was built from."
        )
    options = ReadOptions(
        columns=dict(columns or {}), reward_offset=reward_offset,
        max_episode_steps=max_episode_steps, dtype=dtype, download=download,
        observation_space=observation_space, action_space=action_space,
    )  # fmt: skip
    maker = None if env is None else env_maker(env)
    table = open_source(source, options, maker, concatenate, limit)
    settings = {
        "reward": reward, "dtype": dtype, "clip_actions": clip_actions,
        "concatenate": concatenate, "limit": limit, "env": env_identity(env),
        **read_settings(source, options),
    }  # fmt: skip
    expected = fingerprint(source_files(source, options), settings)
    edges = episodes_of_shards(table.episode_lengths, shards, table.name)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DatasetError(
                f"{folder}: exists already; choose another path, or delete it first."
            )
        with staged_folder(folder, table_bytes(table, dtype), "folder") as staging:
            target = ShardTables(layout_of(table, dtype), table.episode_lengths, edges, staging)
            measured = fill(table, reward, target, clip_actions=clip_actions, progress=progress)
            _write_index(staging, target, measured, table, expected)
    return load_shards(folder, env=env, reward=(measured.map.scale, measured.map.shift))


def episodes_of_shards(lengths: NDArray[np.int64], shards: int, name: str) -> NDArray[np.int64]:
    """Edges ``(shards + 1,)``: shard n has the episodes ``edges[n]`` to ``edges[n + 1]``.

    An edge is at the end of an episode that is nearest to an equal part of the rows; every shard has
    an episode at least.
    """
    if shards > len(lengths):
        raise DatasetError(
            f"{name}: {len(lengths)} episodes do not fill {shards} shards of whole episodes; choose "
            f"at most {len(lengths)} shards."
        )
    ends = np.concatenate([[0], np.cumsum(lengths)])
    edges = [0]
    for number in range(1, shards):
        equal_share = ends[-1] * number / shards
        nearest = int(np.abs(ends - equal_share).argmin())
        edges.append(min(max(nearest, edges[-1] + 1), len(lengths) - (shards - number)))
    return np.array([*edges, len(lengths)], np.int64)


class ShardTables:
    """The tables of all shards; a block of rows is divided over those that it belongs to.

    ``ranges``: smallest and largest number of each entry, over all rows.
    """

    def __init__(
        self, layout: Layout, lengths: NDArray[np.int64], edges: NDArray[np.int64], folder: Path
    ) -> None:
        self.layout, self.edges = layout, edges
        self.first = np.concatenate([[0], np.cumsum(lengths)])[edges]  # rows, also the end
        self.rows = int(self.first[-1])
        self.block_rows = block_rows(layout, self.rows)
        self.folders = [folder / f"shard-{n:05d}" for n in range(len(edges) - 1)]
        sizes = np.diff(self.first)
        self.tables = [
            DiskTable(layout, int(rows), shard / TABLE)
            for rows, shard in zip(sizes, self.folders, strict=True)
        ]
        self.ranges = {key: (float("inf"), float("-inf")) for key in layout}
        self._scratch = empty_block(layout, self.block_rows)

    def block(self, start: int, size: int) -> dict[Key, Tensor]:
        return {key: values[:size] for key, values in self._scratch.items()}

    def commit(self, block: Mapping[Key, Tensor], start: int) -> None:
        for key, values in ((k, v) for k, v in block.items() if v.numel()):
            low, high = (float(value) for value in values.aminmax())
            self.ranges[key] = min(low, self.ranges[key][0]), max(high, self.ranges[key][1])
        stop = start + len(next(iter(block.values())))
        shard = int(np.searchsorted(self.first, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.first[shard + 1]))
            part = {key: values[: end - start] for key, values in block.items()}
            self.tables[shard].commit(part, start - int(self.first[shard]))
            block = {key: values[end - start :] for key, values in block.items()}
            start, shard = end, shard + 1

    def map_rewards(self, change: RewardMap) -> None:
        for table in self.tables:
            table.map_rewards(change)
        self._scratch = {}


def _write_index(
    folder: Path, target: ShardTables, measured: Measured, source: Source, expected: Any
) -> None:
    shards, sketches = [], []
    for number, shard in enumerate(target.folders):
        own = slice(target.edges[number], target.edges[number + 1])
        part = Built(
            transitions=TensorDict.load_memmap(shard / TABLE),
            **vars(measured)
            | {
                "episode_returns": measured.episode_returns[own],
                "episode_lengths": measured.episode_lengths[own],
            },
        )
        saved = write_record(shard, part, source, expected)
        sketches.append(sketch_of(episode_digests(part)))
        shards.append({
            "folder": shard.name, "rows": len(part.transitions),
            "episodes": len(part.episode_lengths), "digest": digest_of(saved["checksums"]),
        })  # fmt: skip
    np.savez(folder / EPISODES, returns=measured.episode_returns, lengths=measured.episode_lengths)
    entries = [
        {
            "key": list(key), "shape": list(field.shape),
            "dtype": str(field.dtype).removeprefix("torch."), "range": list(target.ranges[key]),
        }
        for key, field in target.layout.items()
    ]  # fmt: skip
    index = {
        "format": FORMAT, "rows": target.rows, "shards": shards, "entries": entries,
        "episodes": file_digest(folder / EPISODES),
        "sketch": sketch_of(np.concatenate(sketches)).tolist(),
        **record(measured, source, expected),
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index))
