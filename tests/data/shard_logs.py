"""Small logs that are written as shards; a row's observation begins with its number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict

from iql_torchrl.data import ShardedDataset, build_shards

LENGTHS = [7, 3, 12, 5, 5, 9, 2, 8, 6, 11]
SPACES = {
    "observation_space": gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "action_space": gym.spaces.Box(-1, 1, (2,), np.float32),
}


def arrays(lengths: Sequence[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Episodes of these lengths; the last row of each is truncated."""
    rng, rows = np.random.default_rng(seed), sum(lengths)
    ends = np.zeros(rows, bool)
    ends[np.cumsum(lengths) - 1] = True
    observation = rng.normal(5.0, 2.0, (rows + 1, 3)).astype(np.float32)
    observation[:, 0] = np.arange(rows + 1)
    following = observation[1:].copy()
    following[ends] = rng.normal(5.0, 2.0, (len(lengths), 3))  # seen by no row
    return {
        "observation": observation[:-1],
        "next_observation": following,
        "action": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "reward": rng.normal(size=rows).astype(np.float32),
        "terminated": np.zeros(rows, bool),
        "truncated": ends,
    }


def written(
    folder: Path, lengths: Sequence[int], shards: int, seed: int = 0, **options
) -> ShardedDataset:
    """``shards`` in ``folder / "shards"`` of a log that is deleted afterwards."""
    source = folder / "log.npz"
    np.savez(source, **arrays(lengths, seed))
    log = build_shards(source, folder / "shards", shards, **{**SPACES, **options})
    source.unlink()
    return log


def rows_of_all(log: ShardedDataset) -> TensorDict:
    """The rows of all shards, in memory."""
    parts = []
    for number in range(len(log.shards)):
        with log.shard(number) as rows:
            parts.append(rows.clone())
    return torch.cat(parts)


def flip(path: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
