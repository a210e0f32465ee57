"""``load_shards``: open a folder of shards, or an address of one."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iql_torchrl.data.built_folder import EPISODES, asked_map, damaged
from iql_torchrl.data.load_options import known_scores
from iql_torchrl.data.readers.environments import EnvLike, env_maker, recorded_env_maker
from iql_torchrl.data.readers.source import joined_env_maker
from iql_torchrl.data.scaling import public_statistics
from iql_torchrl.data.schema import REWARD, DatasetWarning, Field
from iql_torchrl.data.shards.dataset import ShardedDataset
from iql_torchrl.data.shards.files import ShardFiles
from iql_torchrl.data.shards.index import read_index, shards_of
from iql_torchrl.data.table_record import described, joined_leaves, read_measured

__all__ = ["load_shards"]


def load_shards(
    location: str | Path,
    *,
    env: EnvLike | None = None,
    reward: str | tuple[float, float] = "raw",
    reference_scores: tuple[float, float] | str | None = None,
    cache: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ShardedDataset:
    """Open what ``build_shards`` wrote; only the index and the episodes' returns are read.

    Args:
        location: the folder, or an address that ``fsspec`` opens: ``s3://bucket/log``,
            ``gs://bucket/log``, ``https://...``, ``file:///...``.
        env: as for ``load_dataset``; by default what the log records.
        reward: as for ``load_dataset``, with the episode returns of the whole log; applied where the
            shards were built with raw rewards.
        reference_scores: as for ``load_dataset``.
        cache: of an address, a folder in which copies of shards stay, so that later passes and runs
            do not copy them again. By default a copy is deleted when its rows are in memory.
        storage_options: of an address, for its file system.

    Warns with ``DatasetWarning`` as ``load_dataset`` does.

    Raises ``DatasetError``: no index; an index of another version, or damaged; an address that cannot
    be reached; another reward map than that of the build.
    """
    files = ShardFiles(
        str(location).rstrip("/") or "/",
        None if cache is None else Path(cache),
        dict(storage_options or {}),
    )
    saved = read_index(files)
    try:
        with np.load(io.BytesIO(files.read(EPISODES))) as episodes:
            measured = read_measured(saved, episodes["returns"], episodes["lengths"])
        description, joined = described(saved), joined_leaves(saved)
        entries = {tuple(entry["key"]): entry for entry in saved["entries"]}
        layout = {
            key: Field(tuple(entry["shape"]), getattr(torch, entry["dtype"]))
            for key, entry in entries.items()
        }
        ranges = {key: (entry["range"][0], entry["range"][1]) for key, entry in entries.items()}
        sketch = np.array(saved["sketch"], np.int64)
    except FileNotFoundError:
        raise damaged(files.location, f"{EPISODES} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError) as error:
        raise damaged(files.location, f"{type(error).__name__}: {error}") from error
    for text in measured.warnings:
        warnings.warn(text, DatasetWarning, stacklevel=2)
    maker = env_maker(env) if env is not None else None
    if maker is None and description.env_spec is not None:
        maker = recorded_env_maker(description.env_spec)
    if maker is not None and joined:
        maker = joined_env_maker(maker, joined)
    return ShardedDataset(
        observation_space=description.observation_space,
        action_space=description.action_space,
        statistics=public_statistics(measured.statistics),
        episode_returns=measured.episode_returns,
        episode_lengths=measured.episode_lengths,
        reward_map=asked_map(reward, measured, files.location),
        reference_scores=known_scores(reference_scores) or description.reference_scores,
        notes=measured.notes,
        name=description.name,
        dtype=layout[REWARD].dtype,
        env=maker,
        shards=shards_of(saved),
        files=files,
        layout=layout,
        ranges=ranges,
        stored_map=measured.map,
        episode_sketch=sketch,
    )
