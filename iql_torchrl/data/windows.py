"""Windows of the last observations of each transition: rows, a sampler, and a TorchRL buffer."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import ImmutableDatasetWriter, Storage, TensorDictReplayBuffer

from iql_torchrl.data.readers.episodes import differs
from iql_torchrl.data.replay import (
    DeviceSampler,
    device_of,
    generator_on,
    leaf_keys,
    nested_entry,
)
from iql_torchrl.data.schema import DatasetError, Key
from iql_torchrl.networks import HISTORY_MASK, History, stack_frames

JUMPS = ("error", "restart")
#: Bytes of observations that are compared at once.
COMPARED_BYTES = 32 * 2**20
#: Of these torch has no ``index_put`` on a CPU.
WIDE_UNSIGNED = torch.uint16, torch.uint32, torch.uint64


class Windows:
    """The transitions of a dataset with the last ``length`` observations in place of one.

    ``windows[rows]`` is a TensorDict with the entries of the plain rows, except for:

    - ``observation`` and ``("next", "observation")``, every leaf: ``(B, length, *shape)``, oldest
      first. The last entry is the row's own observation, or next observation. At the start of an
      episode the first observation is repeated before it.
    - ``"history_mask"`` and ``("next", "history_mask")``: bool ``(B, length)``, True at real steps.

    With ``stack=True`` a window's frames are one observation (``networks.stack_frames``) and there are
    no masks; with ``length=1`` as well, the entries are those of plain rows.

    Every frame is stored once. Nothing is copied: the observations are those of ``transitions``; only
    the next observations at the ends of episodes are extra. Elsewhere they are the following row's
    observation, from which they may differ by a norm of 1e-6 and by rounding, as in ``load_dataset``.
    Where nothing else refers to the transitions any more, memory is half that of plain rows. Windows
    and next windows overlap in memory: do not change them in place.

    Args:
        transitions: as ``OfflineDataset.transitions``, in memory or memory-mapped.
        lengths: rows of each episode, ``(E,)``.
        length: number of observations, the current one included.
        stack: see above.
        jumps: what to do where the next observation of a row inside an episode is not the following
            row's observation: ``"error"``, or ``"restart"``, which begins a new history after it.
        name: of the data, for messages.

    Attributes:
        history: length and form of the windows: what a policy trained on them needs.
        frames: by key the observations, ``(N, *shape)``.
        own: by key the next observations that are no following row's observation, ``(S, *shape)``:
            one for each episode, and one for each jump.
        first: int64 ``(N,)``, the first row that a window of this row may hold.
        own_place: int64 ``(N,)``, the place in ``own`` of a row's next observation, or -1 where the
            following row has it.
        rest: the other entries of the transitions.

    Raises ``ValueError`` on a length that is not whole and >= 1, and ``DatasetError`` on jumps and on
    windows that are longer than every episode.
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        lengths: NDArray[Any],
        length: int,
        *,
        stack: bool = False,
        jumps: str = "error",
        name: str = "dataset",
    ) -> None:
        self.history = History(length, stack)
        if jumps not in JUMPS:
            raise ValueError(f"jumps is {jumps!r}; choose one of {', '.join(JUMPS)}.")
        keys = [key for key in leaf_keys(transitions) if key[0] == "observation"]
        self.frames = {key: plain(transitions.get(key)) for key in keys}
        following = {key: plain(transitions.get(("next", *key))) for key in keys}
        ends = torch.zeros(len(transitions), dtype=torch.bool)
        ends[torch.as_tensor(lengths).cumsum(0) - 1] = True
        jumped = _jumps(self.frames, following, ends)
        if jumps == "error" and bool(jumped.any()):
            row = int(jumped.to(torch.uint8).argmax())
            raise DatasetError(
                f"{name}: in {int(jumped.sum())} rows inside episodes, first row {row}, the next "
                "observation is not the observation of the following row, so their windows have no "
                "single history. Correct the ends of the episodes, or pass jumps='restart' to begin "
                "a new history after each of these rows."
            )
        ends |= jumped
        places = torch.arange(len(ends))
        starts = torch.cat([torch.ones(1, dtype=torch.bool), ends[:-1]])
        first = torch.where(starts, places, 0).cummax(0).values
        longest = int((places - first).max()) + 1
        if length > longest:
            raise DatasetError(
                f"{name}: windows of {length} steps are longer than every episode, of which "
                f"the longest has {longest}{' between jumps' if bool(jumped.any()) else ''}; choose "
                f"a length of at most {longest}."
            )
        where = ends.nonzero().squeeze(1)
        self.own = {key: values[where] for key, values in following.items()}
        device = device_of(transitions)
        self.first = first.to(device)
        self.own_place = torch.where(ends, ends.cumsum(0) - 1, -1).to(device)
        self.rest = transitions.exclude("observation", ("next", "observation"))

    def __len__(self) -> int:
        return int(self.rest.batch_size[0])

    def __getitem__(self, rows: Any) -> TensorDict:
        """The transitions numbered by ``rows``: whole numbers ``(B,)``, a slice or a mask ``(N,)``.

        A mask is bool, with an entry for each row; ``IndexError`` otherwise.
        """
        if not isinstance(rows, Tensor) or rows.dtype == torch.bool:
            rows = torch.arange(len(self), device=self.first.device)[rows]
        rows = rows.to(self.first)  # its device and dtype
        batch = self.rest[rows]
        for key, values in self.entries(rows).items():
            batch.set(key, values)
        return batch

    def entries(self, rows: Tensor) -> dict[Key, Tensor]:
        """Observations, next observations and masks of the rows numbered ``(B,)``, by key."""
        both = self._frames(rows, 1 - self.history.length, 1)  # windows of a row overlap
        now = {key: values[:, :-1] for key, values in both.items()}
        return self._sides(now, {key: values[:, 1:] for key, values in both.items()})

    def _frames(self, rows: Tensor, start: int, stop: int) -> dict[Key, Tensor]:
        """The frames of the steps ``start`` to ``stop`` from ``rows``: ``(B, steps, *shape)`` by key.

        Step 0 is a row's observation and step 1, the largest, its next one. Before the start of its
        episode the first is repeated. The mask, True at real steps, is one more key.
        """
        place = rows.unsqueeze(1) + torch.arange(start, stop + 1, device=rows.device)
        first = self.first.index_select(0, rows).unsqueeze(1)
        found: dict[Key, Tensor] = {(HISTORY_MASK,): place >= first}
        place = torch.maximum(place, first).clamp(max=len(self.first) - 1)
        own_place = self.own_place.index_select(0, rows)
        for key, frames in self.frames.items():
            found[key] = frames.index_select(0, place.flatten()).unflatten(0, place.shape)
            if stop == 1:
                _replace_last(found[key], self.own[key], own_place)
        return found

    def _sides(self, now: dict[Key, Tensor], after: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """Frames as entries of a batch, those of ``after`` below ``"next"``."""
        entries = now | {("next", *key): values for key, values in after.items()}
        if not self.history.stack:
            return entries
        del entries[HISTORY_MASK,], entries["next", HISTORY_MASK]
        return {key: stack_frames(values, values.ndim - 2) for key, values in entries.items()}

    def to(self, device: torch.device | str) -> Windows:
        """The same on ``device``; without a copy where it is there."""
        moved = copy(self)
        for name, part in self._stored().items():
            if isinstance(part, dict):
                setattr(moved, name, {key: values.to(device) for key, values in part.items()})
            else:
                setattr(moved, name, part.to(device))
        return moved

    def table(self) -> TensorDict:
        """All that is stored, for digests: the plain rows, the frames and their places."""
        stored = self._stored()
        for name, part in stored.items():
            if isinstance(part, dict):
                stored[name] = {".".join(key): values for key, values in part.items()}
        return TensorDict(stored, batch_size=[])

    def _stored(self) -> dict[str, Any]:
        """The attributes that are data: tensors, TensorDicts, and dicts of tensors by key."""
        kinds = Tensor, TensorDictBase, dict
        return {name: part for name, part in vars(self).items() if isinstance(part, kinds)}

    def device_sampler(
        self, batch_size: int, device: torch.device | str | None = None, seed: int | None = None
    ) -> WindowSampler:
        """A ``DeviceSampler`` of the windows. On the same device it shares the frames."""
        return WindowSampler(self, batch_size, device=device, seed=seed)

    def replay_buffer(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> TensorDictReplayBuffer:
        """A TorchRL buffer that makes windows of the rows it draws; nothing can be written to it.

        Draws the same rows as ``data.replay_buffer`` with the same ``seed``. ``kwargs`` go to
        ``TensorDictReplayBuffer``.
        """
        storage = WindowStorage(self if device is None else self.to(device))
        return TensorDictReplayBuffer(
            storage=storage,
            writer=ImmutableDatasetWriter(),
            batch_size=batch_size,
            generator=None if seed is None else generator_on(storage.device, seed),
            collate_fn=_unchanged,
            **kwargs,
        )


class WindowSampler(DeviceSampler):
    """A ``DeviceSampler`` whose observations are windows; made by ``windows.device_sampler``."""

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        where = windows.first.device if device is None else torch.device(device)
        super().__init__(windows.rest, batch_size, device=where, seed=seed)
        self.windows = copy(windows)
        self.windows.rest = windows.rest.select()  # its entries are in ``tables``
        self.windows = self.windows.to(where)
        self.tables += self.windows.table().values(True, True)

    def entries(self, indices: Tensor) -> dict[str, Any]:
        nested = super().entries(indices)
        for key, values in self.windows.entries(indices).items():
            nested_entry(nested, key, values)
        return nested

    def column(self, key: Key) -> Tensor | None:
        """As for a ``DeviceSampler``; of an observation the frames ``(N, *shape)``.

        Of a next observation those that are no row's observation.
        """
        name = (key,) if isinstance(key, str) else tuple(key)
        if name in self.windows.frames:
            return self.windows.frames[name]
        if name[0] == "next" and name[1:] in self.windows.own:
            return self.windows.own[name[1:]]
        return super().column(key)


class WindowStorage(Storage):
    """A storage of TorchRL that cannot be written to and makes windows of the rows it is asked for."""

    def __init__(self, windows: Windows) -> None:
        super().__init__(max_size=len(windows))
        self.windows = windows
        self.device = windows.first.device

    def get(self, index: Any) -> TensorDict:
        return self.windows[index]

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        raise RuntimeError(
            "windows cannot be written to; collect online data in a buffer of its own."
        )

    def __len__(self) -> int:
        return len(self.windows)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data is fixed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _unchanged(batch: Sequence[Any]) -> Sequence[Any]:
    return batch


def plain(values: Tensor) -> Tensor:
    """The same memory as an ordinary tensor, which a compiled program can read."""
    return values.as_subclass(Tensor) if type(values) is not Tensor else values


def _jumps(frames: dict[Key, Tensor], following: dict[Key, Tensor], ends: Tensor) -> Tensor:
    """Bool ``(N,)``: rows that are no ``ends`` and whose next observation is not the next row's.

    The rule is that of the readers, ``differs``; it is slow, and is asked where bits are not equal.
    """
    jumped, steps = torch.zeros_like(ends), len(ends) - 1
    row_bytes = sum(values[0].nbytes for values in frames.values())
    size = max(1, COMPARED_BYTES // max(row_bytes, 1))
    for start in range(0, steps, size):
        stop = min(start + size, steps)
        asked = torch.zeros(stop - start, dtype=torch.bool)
        for key, values in frames.items():
            unequal = following[key][start:stop] != values[start + 1 : stop + 1]
            asked |= unequal.reshape(stop - start, -1).any(1).cpu()
        rows = start + (asked & ~ends[start:stop]).nonzero().squeeze(1)
        if len(rows):
            later = {key: values[rows + 1].cpu().numpy() for key, values in frames.items()}
            after = {key: values[rows].cpu().numpy() for key, values in following.items()}
            jumped[rows] = torch.from_numpy(differs(later, after, len(rows), ahead=0))
    return jumped


def _replace_last(window: Tensor, own: Tensor, own_place: Tensor) -> None:
    """Put ``own[own_place]`` into the last step of ``window`` ``(B, T, *shape)`` where not -1."""
    on_host = window.device.type == "cpu" and window.dtype not in WIDE_UNSIGNED
    if torch.compiler.is_compiling() or not on_host:
        last = own.index_select(0, own_place.clamp(min=0))
        ends = (own_place >= 0).view(-1, *(1,) * (own.ndim - 1))
        window[:, -1] = torch.where(ends, last, window[:, -1])
    else:  # few rows are ends; elsewhere finding them would wait for the device or break the graph
        (ends,) = (own_place >= 0).nonzero(as_tuple=True)
        window[ends, -1] = own.index_select(0, own_place[ends])
