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

from iql_torchrl.data.frame_table import FrameTable
from iql_torchrl.data.replay import DeviceSampler, generator_on, nested_entry
from iql_torchrl.data.schema import Key
from iql_torchrl.networks import History

__all__ = ["WindowSampler", "WindowStorage", "Windows"]


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
    the next observations at the ends of episodes are extra. Where nothing else refers to the
    transitions any more, memory is half that of plain rows. Windows and next windows overlap in
    memory: do not change them in place.

    Args:
        transitions: as ``OfflineDataset.transitions``, in memory or memory-mapped.
        lengths: rows of each episode, ``(E,)``.
        length: number of observations, the current one included.
        stack: see above.
        jumps: what to do where the next observation of a row inside an episode is not the following
            row's observation: ``"error"``, or ``"restart"``, which begins a new history after it.
        name: of the data, for messages.

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
        history = History(length, stack)
        self.frame_table = FrameTable(transitions, lengths, history, jumps=jumps, name=name)
        self.rest = without_observations(transitions)

    @property
    def history(self) -> History:
        """Length and form of the windows: what a policy trained on them needs."""
        return self.frame_table.history

    def __len__(self) -> int:
        return int(self.rest.batch_size[0])

    def __getitem__(self, rows: Any) -> TensorDict:
        """The transitions numbered by ``rows``: int64 ``(B,)``, a slice, a list or a mask.

        A mask is bool, with an entry for each row.

        Raises ``IndexError`` on a mask of another length.
        """
        device = self.frame_table.first.device
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)), device=device)
        rows = torch.as_tensor(rows, device=device)
        if rows.dtype == torch.bool:
            if rows.shape != (len(self),):
                raise IndexError(
                    f"the mask has shape {tuple(rows.shape)}; expected one entry for each of the "
                    f"{len(self)} rows."
                )
            rows = rows.nonzero().squeeze(-1)
        rows = rows.long()
        batch = self.rest[rows]
        for key, values in self.frame_table.entries(rows).items():
            batch.set(key, values)
        return batch

    def to(self, device: torch.device | str) -> Windows:
        """The same windows on ``device``; without a copy where they are there."""
        moved = copy(self)
        moved.frame_table = self.frame_table.to(torch.device(device))
        moved.rest = self.rest.to(device)
        return moved

    def table(self) -> TensorDict:
        """All that is stored, for digests: the plain rows, the frames and their places."""
        table = self.frame_table
        stored = {"first": table.first, "own_place": table.own_place, "rest": self.rest}
        for name, part in (("frames", table.frames), ("own", table.own)):
            stored[name] = {".".join(key): values for key, values in part.items()}
        return TensorDict(stored, batch_size=[])

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
        moved = self if device is None else self.to(device)
        storage = WindowStorage(moved)
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
        **kwargs: Any,
    ) -> None:
        where = windows.frame_table.first.device if device is None else torch.device(device)
        super().__init__(windows.rest, batch_size, device=where, **kwargs)
        self.frame_table = windows.frame_table.to(where)
        self.tables = [*self.tables, *self.frame_table.tensors]

    def entries(self, indices: Tensor) -> dict[str, Any]:
        nested = super().entries(indices)
        for key, values in self.frame_table.entries(indices).items():
            nested_entry(nested, key, values)
        return nested

    def column(self, key: Key) -> Tensor | None:
        """As for a ``DeviceSampler``; of an observation the frames ``(N, *shape)``.

        Of a next observation those that are no row's observation.
        """
        name = (key,) if isinstance(key, str) else tuple(key)
        if name in self.frame_table.frames:
            return self.frame_table.frames[name]
        if name[0] == "next" and name[1:] in self.frame_table.own:
            return self.frame_table.own[name[1:]]
        return super().column(key)


class WindowStorage(Storage):
    """A storage of TorchRL that cannot be written to and makes windows of the rows it is asked for."""

    def __init__(self, windows: Windows) -> None:
        super().__init__(max_size=len(windows))
        self.windows = windows
        self.device = windows.frame_table.first.device

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


def without_observations(transitions: TensorDictBase) -> TensorDict:
    """The other entries, not copied; on the device where they are."""
    rest = TensorDict({}, batch_size=transitions.batch_size, device=transitions.device)
    for name in transitions.keys(include_nested=True, leaves_only=True):
        key = (name,) if isinstance(name, str) else tuple(name)
        if "observation" not in (key[0], key[:2][-1] if key[0] == "next" else ""):
            rest.set(key, transitions.get(key))
    return rest


def _unchanged(batch: Sequence[Any]) -> Sequence[Any]:
    return batch
