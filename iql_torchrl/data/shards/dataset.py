"""``ShardedDataset``: a log whose rows are in shards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict

from iql_torchrl.data.build import TABLE
from iql_torchrl.data.built_folder import RECORD, load_rows, with_rewards
from iql_torchrl.data.dataset import DatasetSummary, OfflineDataset
from iql_torchrl.data.scaling import RewardMap
from iql_torchrl.data.schema import MASK, DatasetError, Key, Layout
from iql_torchrl.data.shards.files import ShardFiles
from iql_torchrl.data.shards.index import Shard, check_shard
from iql_torchrl.data.shards.replay import ShardedReplay

__all__ = ["ShardedDataset"]


@dataclass(frozen=True, kw_only=True, repr=False)
class ShardedDataset(DatasetSummary):
    """A log in shards, of which only the index is read until rows are sampled.

    ``make_agent``, ``OfflineTrainer`` and ``agent.push_to_hub`` take it as they take an
    ``OfflineDataset``. What needs all rows at once (``split``, ``windows``, populations, estimates
    without an environment) refuses it.

    Attributes:
        shards: folder, rows and digest of each shard.
        files: where they are.
        layout: shape of a row and dtype of each entry.
        ranges: smallest and largest number of each entry over all rows; of raw rewards.
        stored_map: the reward map of the stored rewards; ``reward_map`` is that of the batches.
        episode_sketch: see ``sketch``.
    """

    shards: tuple[Shard, ...]
    files: ShardFiles
    layout: Layout
    ranges: dict[Key, tuple[float, float]]
    stored_map: RewardMap
    episode_sketch: NDArray[np.int64]
    _verified: set[int] = field(default_factory=set, init=False, compare=False)

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def masked(self) -> bool:
        return MASK in self.layout

    def range_of(self, key: Key) -> tuple[float, float]:
        return self.ranges[key]

    def sketch(self) -> NDArray[np.int64]:
        return self.episode_sketch

    def fingerprint(self) -> dict[str, str]:
        """The digest of each shard, from the index; a shard is compared when it is first loaded."""
        return {shard.folder: shard.digest for shard in self.shards}

    @property
    def transitions(self) -> NoReturn:
        """Always raises ``DatasetError``: the rows are never all in one table."""
        raise DatasetError(self._in_shards("this"))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or not hasattr(OfflineDataset, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise AttributeError(self._in_shards(name))

    def _in_shards(self, what: str) -> str:
        return (
            f"{self.name}: is a log in {len(self.shards)} shards, and {what} needs all rows in one "
            "table; use replay_buffer(batch_size) for batches, or load_dataset of the log itself or "
            "of one shard's folder where that fits into memory."
        )

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[TensorDict]:
        """Inside, the memory-mapped transitions ``(rows,)`` of one shard, with mapped rewards.

        The first time, all its bytes are compared with their checksums. Raises ``DatasetError`` on a
        shard that is missing, truncated or of other content, or cannot be reached.
        """
        shard = self.shards[number]

        def check(folder: Path) -> None:
            check_shard(folder, shard, contents=number not in self._verified)

        with self.files.folder(shard.folder, lambda: self._files(shard), shard.digest, check) as at:
            self._verified.add(number)
            table = load_rows(at / TABLE)
            yield with_rewards(table, self.stored_map, self.reward_map)

    def _files(self, shard: Shard) -> list[str]:
        """The files of a shard at an address, by their paths in its folder."""
        try:
            saved = json.loads(self.files.read(f"{shard.folder}/{RECORD}"))
            return [RECORD, *saved["checksums"]]
        except FileNotFoundError:
            raise DatasetError(
                f"{self.files.location}/{shard.folder}: this shard is missing; upload the folder again."
            ) from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise DatasetError(
                f"{self.files.location}/{shard.folder}: {RECORD} cannot be read ({error}); upload the "
                "folder again."
            ) from error

    def replay_buffer(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        seed: int | None = None,
        *,
        loaded: int | None = None,
        replace_every: int = 1000,
    ) -> ShardedReplay:
        """Batches from ``loaded`` shards at a time; see ``ShardedReplay``."""
        return ShardedReplay(
            self, batch_size, device=device, seed=seed, loaded=loaded, replace_every=replace_every
        )
