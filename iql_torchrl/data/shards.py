"""Datasets that are larger than one memory: written as shards, opened anywhere, sampled in parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from torch.types import Device

from iql_torchrl.config import check_whole
from iql_torchrl.data.dataset import DatasetSummary, OfflineDataset
from iql_torchrl.data.load import SourceLike, dataset_fields
from iql_torchrl.data.readers.environments import EnvLike
from iql_torchrl.data.readers.options import ReadOptions
from iql_torchrl.data.readers.source import open_source
from iql_torchrl.data.replay import DeviceSampler
from iql_torchrl.data.saved import (
    Location,
    SavedDataset,
    Shard,
    is_saved,
    read_record,
    write_dataset,
)
from iql_torchrl.data.schema import MASK, REWARD, DatasetError, Key
from iql_torchrl.descriptions import one_line
from iql_torchrl.files import folder_lock, make_folder

#: How many shards are loaded by default, at most.
LOADED = 4


def build_shards(
    source: SourceLike,
    folder: str | Path,
    shards: int,
    *,
    env: EnvLike | None = None,
    **options: Any,
) -> ShardedDataset:
    """Read ``source`` once, in bounded memory, and write it as ``shards`` shards and one record.

    Every shard has whole episodes in the source's order, and a number of transitions that differs from
    the mean by at most the longest episode. Statistics, the reward scaling and the notes are those of
    the whole dataset. Memory: chunks of 64 MiB, and 16 bytes for each episode.

    ``folder`` must not exist; it is complete or absent. ``load_shards(folder)`` opens it, here and on
    any machine or store to which it is copied. ``options`` are those of ``load_dataset``, without
    ``memmap`` and ``reference_scores``.

    Raises ``DatasetError`` as ``load_dataset`` does; on ``shards`` below 1 or above the number of
    episodes; and if ``folder`` has files or does not fit on the disk.
    """
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise DatasetError(f"shards: expected an integer, at least 1, got {shards!r}.")
    if is_saved(source):
        raise DatasetError(
            f"{source}: is a built dataset already; build shards from the source of that dataset."
        )
    read, folder = ReadOptions(env=env, **options).described(), Path(folder)
    make_folder("folder", folder, above=True, error=DatasetError)
    folder = folder.resolve()  # a link stays one
    opened = open_source(source, read)
    edges = episodes_of_shards(opened.episode_lengths, shards, opened.name)
    with folder_lock(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DatasetError(
                f"{folder}: exists already; choose another path, or delete it first."
            )
        change = write_dataset(opened, folder, edges, read).description.reward_map
    return load_shards(folder, env=env, reward=(change.scale, change.shift))


def episodes_of_shards(lengths: NDArray[np.int64], shards: int, name: str) -> NDArray[np.int64]:
    """Edges ``(shards + 1,)``: shard n has the episodes ``edges[n]`` to ``edges[n + 1]``.

    An edge is the end of an episode that is nearest to an equal part of the transitions; every shard
    has an episode at least.
    """
    if shards > len(lengths):
        raise DatasetError(
            f"{name}: {len(lengths)} episodes do not fill {shards} shards of whole episodes; choose "
            f"at most {len(lengths)} shards."
        )
    ends, numbers = np.concatenate([[0], np.cumsum(lengths)]), np.arange(shards + 1)
    nearest = [np.abs(ends - share).argmin() for share in ends[-1] * numbers / shards]
    episodes_before = np.maximum.accumulate(nearest - numbers)  # besides one for each shard
    return numbers + np.minimum(episodes_before, len(lengths) - shards)


def load_shards(
    location: str | Path,
    *,
    env: EnvLike | None = None,
    reward: str | tuple[float, float] = "raw",
    reference_scores: tuple[float, float] | str | None = None,
    cache: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ShardedDataset:
    """Open what ``build_shards`` wrote; only the record and the episodes' returns are read.

    Args:
        location: the folder, or an address that ``fsspec`` opens: ``s3://bucket/dataset``,
            ``gs://bucket/dataset``, ``https://...``, ``file:///...``.
        env, reward, reference_scores: as for ``load_dataset``; rewards can be scaled if the shards
            were built with raw rewards.
        cache: of an address, a folder in which copies of shards stay, so that later passes and runs
            do not copy them again. By default a copy is deleted when its transitions are in memory.
        storage_options: of an address, for its file system.

    Warns with ``DatasetWarning`` as ``load_dataset`` does.

    Raises ``DatasetError``: no record; a record of another version, or damaged; an address that cannot
    be reached; another reward scaling than that of the build.
    """
    name = str(location).rstrip("/") or "/"
    place = Location(name, None if cache is None else Path(cache), dict(storage_options or {}))
    saved = read_record(place)
    described = replace(saved.description, reward_map=saved.reward_map(reward))
    fields = dataset_fields(described, env, reference_scores)
    return ShardedDataset(**fields, saved=saved)


@dataclass(frozen=True, kw_only=True, repr=False)
class ShardedDataset(DatasetSummary):
    """A dataset in shards, of which only the record is read until batches are sampled.

    ``make_agent``, ``OfflineTrainer`` and ``agent.push_to_hub`` take it as they take an
    ``OfflineDataset``. What needs all transitions at once (``split``, ``windows``, populations,
    estimates without an environment) refuses it.

    ``saved``: the record, its location, and the layout and ranges of the stored transitions.
    """

    saved: SavedDataset
    _verified: set[int] = field(default_factory=set, init=False, compare=False)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Folder, number of transitions and digest of each shard."""
        return self.saved.shards

    @property
    def masked(self) -> bool:
        return MASK in self.saved.layout

    def range_of(self, key: Key) -> tuple[float, float]:
        low, high = self.saved.ranges[key]
        if key == REWARD:  # written down before any scaling
            low, high = sorted(map(self.reward_map.forward, (low, high)))
        return low, high

    def sketch(self) -> NDArray[np.int64]:
        return self.saved.sketch

    def fingerprint(self) -> dict[str, str]:
        """The digest of each shard, from the record; a shard is compared when it is first loaded."""
        return {shard.folder: shard.digest for shard in self.shards}

    @property
    def transitions(self) -> NoReturn:
        """Always raises ``DatasetError``, because the transitions are never all in memory."""
        raise DatasetError(self._in_shards("this"))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or not hasattr(OfflineDataset, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise AttributeError(self._in_shards(name))

    def _in_shards(self, what: str) -> str:
        return (
            f"{self.name}: is a dataset in {len(self.shards)} shards, and {what} needs all transitions "
            "at once; use replay_buffer(batch_size) for batches, or load_dataset of its source if that "
            "fits into memory, or of a part of it (limit=)."
        )

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[TensorDict]:
        """Yield the memory-mapped transitions of one shard, with scaled rewards.

        The first time, all its bytes are compared with their digests. Raises ``DatasetError`` on a
        shard that is missing, truncated or of other content, or cannot be reached.
        """
        unseen = number not in self._verified
        with self.saved.shard(number, self.reward_map, contents=unseen) as transitions:
            self._verified.add(number)
            yield transitions

    def replay_buffer(
        self, batch_size: int, device: Device = None, seed: int | None = None, **loading: Any
    ) -> ShardedReplay:
        """Batches of some shards at a time; ``loading``: the settings of ``ShardedReplay``."""
        return ShardedReplay(self, batch_size, device=device, seed=seed, **loading)


class Rotation:
    """``loaded`` of ``shards`` shards at a time, the oldest replaced by the next of a random order.

    The order consists of passes: permutations of all shards, drawn from ``seed`` and the number of the
    pass (``turn``). No shard is loaded while it is loaded already: one that the previous pass loaded
    last comes no earlier in the next pass than its replacement is due. Other than that, each position
    of a pass is drawn uniformly from the shards that are left. ``loaded`` has the shard at each place,
    ``oldest`` the place whose shard is replaced next, ``position`` how many of ``order`` were loaded.
    """

    def __init__(self, shards: int, loaded: int, seed: int) -> None:
        self.shards, self.seed, self.turn, self.oldest = shards, seed, -1, 0
        self.loaded: list[int] = []
        self.position = shards
        self._begin_pass_if_due()
        self.loaded, self.position = self.order[:loaded], loaded
        self._begin_pass_if_due()

    @property
    def coming(self) -> int:
        """The shard that is loaded next."""
        return self.order[self.position]

    def advance(self) -> int:
        """Replace the oldest shard by ``coming``; the place at which it is."""
        place = self.oldest
        self.loaded[place] = self.coming
        self.oldest = (place + 1) % len(self.loaded)
        self.position += 1
        self._begin_pass_if_due()
        return place

    def _begin_pass_if_due(self) -> None:
        """Draw a permutation in which a loaded shard comes no earlier than its replacement."""
        if self.position < self.shards:
            return
        self.turn, self.position, self.order = self.turn + 1, 0, []
        generator = np.random.default_rng([self.seed, self.turn])
        by_age = [*self.loaded[self.oldest :], *self.loaded[: self.oldest]]
        left = [shard for shard in range(self.shards) if shard not in by_age]
        for position in range(self.shards):
            left += by_age[position : position + 1]
            self.order.append(left.pop(int(generator.integers(len(left)))))


class ShardedReplay(DeviceSampler):
    """Batches that are drawn uniformly, with replacement, from the transitions of the loaded shards.

    After every ``replace_every`` batches the shard that was loaded first is replaced by the next of a
    random order (:class:`Rotation`), in which each pass has every shard once; a thread reads that shard
    meanwhile. Every shard stays for ``replace_every * loaded`` batches, so in many passes all
    transitions are drawn equally often if the shards have equally many. More loaded shards and more
    frequent replacement are closer to uniform batches of the whole dataset.

    Memory: ``loaded + 1`` times the largest shard, and once more while a shard is compared and copied.
    On several ranks build it with the same arguments and the same seed on each: the ranks then draw the
    same batches, of which each takes its part.

    Args:
        batch_size, device: as for ``DeviceSampler``.
        seed: of the batches' generator and of the order of the shards; None takes one from the system.
        loaded: how many shards are loaded at a time; by default 4, or all if there are fewer. With
            all shards loaded nothing is replaced.
        replace_every: batches between two replacements.

    ``len`` counts the transitions of the loaded shards. After ``load_state_dict`` the batches continue
    bit for bit.

    Raises ``ValueError`` on ``loaded`` above the number of shards, and on numbers below 1;
    ``DatasetError`` on a shard that is missing, damaged or cannot be reached, here or at the batch
    that needs it.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        batch_size: int,
        *,
        device: Device = None,
        seed: int | None = None,
        loaded: int | None = None,
        replace_every: int = 1000,
    ) -> None:
        count = len(dataset.shards)
        self.dataset, self.replace_every = dataset, replace_every
        self.loaded = min(LOADED, count) if loaded is None else loaded
        check_whole(loaded=self.loaded, replace_every=replace_every)
        if self.loaded > count:
            raise ValueError(
                f"loaded is {self.loaded} and {dataset.name} has {count} shards; choose at most "
                f"{count}, or build it with more shards."
            )
        # of each place, and one more where shards are replaced: the next one is written there meanwhile
        self._slots = list(range(self.loaded + (self.loaded < count)))
        self._capacity = max(shard.rows for shard in dataset.shards)
        rows = len(self._slots) * self._capacity
        zeros = {  # as views of one number
            key: torch.zeros((), dtype=entry.dtype).expand(rows, *entry.shape)
            for key, entry in dataset.saved.layout.items()
        }
        blank = TensorDict({}, batch_size=[rows]).update(zeros)
        super().__init__(blank, batch_size, device=device, seed=seed)  # None: the CPU
        self.rotation = Rotation(count, self.loaded, self.generator.initial_seed() % 2**64)
        self._since = 0  # batches since the last replacement
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._coming: Future[None] | None = None
        self._load_all()

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """A new batch ``(batch_size,)``, on ``device``."""
        if self._since == self.replace_every:
            self._replace()
        self._since += 1
        return super().sample(batch_size)

    def draw(self, out: Tensor) -> Tensor:
        """The places of a batch's transitions among those of the loaded shards."""
        super().draw(out)
        return out.add_(self._shift[torch.bucketize(out, self._ends, right=True)])

    def loaded_shards(self) -> list[int]:
        """The numbers of the shards that the next batch is drawn from, unless one is replaced."""
        return list(self.rotation.loaded)

    # -- loading ---------------------------------------------------------------------------------

    def _load_all(self) -> None:
        for place, number in enumerate(self.rotation.loaded):
            self._load(number, self._slots[place])
        self._use_loaded()

    def _load(self, number: int, slot: int) -> None:
        with self.dataset.shard(number) as transitions:
            self.write(transitions, slot * self._capacity)

    def _use_loaded(self) -> None:
        """Draw from the loaded shards, and let the thread write the next one into the other slot."""
        loaded = self.rotation.loaded
        counts = torch.tensor([self.dataset.shards[number].rows for number in loaded])
        ends, begins = counts.cumsum(0), torch.tensor(self._slots[: self.loaded]) * self._capacity
        self.rows = int(ends[-1])
        self._ends = ends.to(self.device)
        self._shift = (begins - (ends - counts)).to(self.device)
        if len(self._slots) > self.loaded:
            self._coming = self._thread.submit(self._load, self.rotation.coming, self._slots[-1])

    def _replace(self) -> None:
        """Draw from the next shard too; one that could not be read is read again, at every batch."""
        if self._coming is not None:
            if self._coming.exception() is not None:
                number = self.rotation.coming
                try:
                    self._load(number, self._slots[-1])
                except Exception as error:
                    raise DatasetError(
                        f"{self.dataset.saved.location.name}: shard {number} could not be read, nor a "
                        f"second time ({type(error).__name__}: {one_line(error)}). The next batch "
                        "tries again; nothing of the loaded shards is lost."
                    ) from error
            place, slots = self.rotation.advance(), self._slots
            slots[place], slots[-1] = slots[-1], slots[place]
            self._use_loaded()
        self._since = 0

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "rotation": deepcopy(vars(self.rotation)), "since": self._since, "loaded": self.loaded,
            "replace_every": self.replace_every,
        }  # fmt: skip

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if ``state`` is of another number of shards or of other settings."""
        compared = [
            ("shards", state["rotation"]["shards"], self.rotation.shards),
            ("loaded", state["loaded"], self.loaded),
            ("replace_every", state["replace_every"], self.replace_every),
        ]
        for name, saved, present in compared:
            if saved != present:
                raise ValueError(
                    f"the state is of a replay with {name} = {saved}, and this one has {present}; "
                    "build it with the same, so that the batches continue as they would have."
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved. Raises ``ValueError`` as ``check_state`` does."""
        self.check_state(state)
        if self._coming is not None:
            self._coming.exception()  # wait; its shard is not used
        super().load_state_dict(state)
        vars(self.rotation).update(deepcopy(state["rotation"]))
        self._since = int(state["since"])
        self._load_all()
