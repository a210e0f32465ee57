"""``ShardedReplay``: batches from a few shards at a time, which are replaced while training."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor

from iql_torchrl.data.replay import DeviceSampler, generator_on
from iql_torchrl.data.schema import DatasetError
from iql_torchrl.data.shards.rotation import Rotation
from iql_torchrl.descriptions import one_line

if TYPE_CHECKING:
    from iql_torchrl.data.shards.dataset import ShardedDataset

__all__ = ["LOADED", "ShardedReplay"]

#: How many shards are loaded by default; all of them where there are fewer.
LOADED = 4


class ShardedReplay:
    """Batches of rows that are drawn uniformly, with replacement, from the loaded shards.

    A loaded shard is drawn from in proportion to its rows. After every ``replace_every`` batches the
    shard that was loaded first is replaced by the next of a random order (:class:`Rotation`), in which
    each pass has every shard once; a thread reads that shard meanwhile. So a batch has rows of
    ``loaded`` shards only. Every shard stays for ``replace_every * loaded`` batches, so over many
    passes all rows are drawn equally often where the shards have equally many rows. More loaded
    shards and more frequent replacement are closer to uniform batches of the whole log.

    Memory: ``loaded + 1`` times the largest shard, and once more while a shard is compared and copied.

    On several ranks build it with the same arguments and the same seed on each: the ranks then draw the
    same batches, of which each takes its part, and each rank reads all shards.

    Args:
        dataset: what ``load_shards`` returned.
        batch_size: rows per ``sample()``.
        device: of the loaded rows and of the batches; by default the CPU.
        seed: of the rows' generator and of the order of the shards; None takes one from the system.
        loaded: how many shards are loaded at a time; by default 4, or all where there are fewer. With
            all shards loaded nothing is replaced.
        replace_every: batches between two replacements.

    The state has the positions in the order and the generator, and no rows: after
    ``load_state_dict`` the batches continue bit for bit.

    Raises ``ValueError`` on ``loaded`` above the number of shards, and on numbers below 1;
    ``DatasetError`` on a shard that is missing, damaged or cannot be reached, here or at the batch
    that needs it.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        seed: int | None = None,
        loaded: int | None = None,
        replace_every: int = 1000,
    ) -> None:
        count = len(dataset.shards)
        self.dataset, self.batch_size = dataset, batch_size
        self.loaded = min(LOADED, count) if loaded is None else loaded
        self.replace_every = replace_every
        for name in ("batch_size", "loaded", "replace_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number, at least 1.")
        if self.loaded > count:
            raise ValueError(
                f"loaded is {self.loaded} and {dataset.name} has {count} shards; choose at most "
                f"{count}, or build it with more shards."
            )
        self.device = torch.device("cpu" if device is None else device)
        self.generator = generator_on(self.device, seed)
        self.rotation = Rotation(count, self.loaded, self.generator.initial_seed() % 2**64)
        self._since = 0  # batches since the last replacement
        # one slot more than are drawn from: the next shard is written there meanwhile
        self._capacity = max(shard.rows for shard in dataset.shards)
        slots = self.loaded + (self.loaded < count)
        self._rows = DeviceSampler(
            _blank(dataset, slots * self._capacity), batch_size, device=self.device
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._coming: Future[None] | None = None
        self._load_all()

    def __len__(self) -> int:
        """Rows of the loaded shards."""
        return self._total

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """A fresh batch ``(batch_size,)``, on ``device``."""
        if self._since == self.replace_every:
            self._replace()
        self._since += 1
        size = self.batch_size if batch_size is None else batch_size
        drawn = torch.randint(self._total, (size,), generator=self.generator, device=self.device)
        place = torch.bucketize(drawn, self._ends, right=True)
        return self._rows.gather(drawn + self._shift[place])

    def loaded_shards(self) -> list[int]:
        """The numbers of the shards that the next batch is drawn from, unless one is replaced."""
        return list(self.rotation.loaded)

    # -- loading ---------------------------------------------------------------------------------

    def _load_all(self) -> None:
        self._slots = list(range(self.loaded))  # of each place
        for slot, number in zip(self._slots, self.rotation.loaded, strict=True):
            self._load(number, slot)
        self._count()
        self._begin_coming()

    def _load(self, number: int, slot: int) -> None:
        with self.dataset.shard(number) as rows:
            expected = self.dataset.shards[number].rows
            if len(rows) != expected:
                raise DatasetError(
                    f"{self.dataset.files.location}: shard {number} has {len(rows)} rows, and the "
                    f"index says {expected}; build it again."
                )
            self._rows.write(rows, slot * self._capacity)

    def _begin_coming(self) -> None:
        """Let the thread write the next shard into the slot that is not drawn from."""
        if self.loaded < len(self.dataset.shards):
            (self._free,) = set(range(self.loaded + 1)) - set(self._slots)
            self._coming = self._thread.submit(self._load, self.rotation.coming, self._free)

    def _replace(self) -> None:
        if self._coming is not None:
            self._wait(self._coming)
            self._slots[self.rotation.advance()] = self._free
            self._count()
            self._begin_coming()
        self._since = 0

    def _wait(self, coming: Future[None]) -> None:
        """Wait for the next shard; one that could not be read is read again, at every batch."""
        try:
            coming.result()
        except Exception:
            number = self.rotation.coming
            try:
                self._load(number, self._free)
            except Exception as error:
                raise DatasetError(
                    f"{self.dataset.files.location}: shard {number} could not be read, nor a second "
                    f"time ({type(error).__name__}: {one_line(error)}). The next batch tries again; "
                    "nothing of the loaded shards is lost."
                ) from error

    def _count(self) -> None:
        """From numbers of rows of the loaded shards together to rows of the table."""
        counts = [self.dataset.shards[number].rows for number in self.rotation.loaded]
        ends = list(accumulate(counts))
        self._total = ends[-1]
        shifts = [
            slot * self._capacity - (end - rows)
            for slot, end, rows in zip(self._slots, ends, counts, strict=True)
        ]
        self._ends: Tensor = torch.tensor(ends, device=self.device)
        self._shift: Tensor = torch.tensor(shifts, device=self.device)

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "generator": self.generator.get_state(),
            "rotation": self.rotation.state_dict(),
            "since": self._since,
            "loaded": self.loaded,
            "replace_every": self.replace_every,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` where ``state`` is of another number of shards or other settings."""
        here = {
            "shards": len(self.dataset.shards), "loaded": self.loaded,
            "replace_every": self.replace_every,
        }  # fmt: skip
        there = {"shards": state["rotation"]["shards"]} | {
            name: state[name] for name in ("loaded", "replace_every")
        }
        for name, value in here.items():
            if there[name] != value:
                raise ValueError(
                    f"the state is of a replay with {name} = {there[name]}, and this one has {value}; "
                    "build it with the same, so that the batches continue as they would have."
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was saved. Raises ``ValueError`` as ``check_state`` does."""
        self.check_state(state)
        if self._coming is not None:
            self._coming.exception()  # wait; its rows are not used
        self.generator.set_state(state["generator"].cpu())
        self.rotation.load_state_dict(state["rotation"])
        self._since = int(state["since"])
        self._load_all()


def _blank(dataset: ShardedDataset, rows: int) -> TensorDict:
    """Zeros in the layout of the log, as views of one row."""
    table = TensorDict({}, batch_size=[rows])
    for key, entry in dataset.layout.items():
        table.set(key, torch.zeros((), dtype=entry.dtype).expand(rows, *entry.shape))
    return table
