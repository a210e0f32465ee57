"""A table that holds every observation once, and the places of each row's window in it."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torch import Tensor

from iql_torchrl.data.replay import device_of
from iql_torchrl.data.schema import DatasetError, Key
from iql_torchrl.networks import HISTORY_MASK, History, stack_frames

__all__ = ["JUMPS", "FrameTable"]

JUMPS = ("error", "restart")
#: Bytes of observations that are compared at once.
COMPARED_BYTES = 32 * 2**20


class FrameTable:
    """Observations of N transitions, each frame once, and the places of every row's window.

    Args:
        transitions: batch ``(N,)``; rows of an episode are consecutive. The observations are not
            copied: changes to them are seen here, and ``("next", "observation")`` is released with
            the transitions.
        lengths: rows of each episode, ``(E,)``.
        history: length of the windows, and whether their frames are stacked.
        jumps: ``"error"`` or ``"restart"``, see :class:`Windows`.
        name: of the data, for messages.

    Attributes:
        frames: by key the observations, ``(N, *shape)``.
        own: by key the next observations that are no following row's observation, ``(S, *shape)``:
            one for each episode, and one for each jump.
        first: int64 ``(N,)``, the first row that a window of this row may hold.
        own_place: int64 ``(N,)``, the place in ``own`` of a row's next observation, or -1 where the
            following row has it.
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        lengths: NDArray[Any],
        history: History,
        *,
        jumps: str = "error",
        name: str = "dataset",
    ) -> None:
        if jumps not in JUMPS:
            raise ValueError(f"jumps is {jumps!r}; choose one of {', '.join(JUMPS)}.")
        keys = _observation_keys(transitions)
        self.history = history
        self.frames = {key: _plain(transitions.get(key)) for key in keys}
        following = {key: transitions.get(("next", *key)) for key in keys}
        ends = torch.zeros(len(transitions), dtype=torch.bool)
        ends[torch.as_tensor(lengths).cumsum(0) - 1] = True
        jumped = ~(_continues(self.frames, following) | ends)
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
        self.first = torch.where(starts, places, 0).cummax(0).values
        self.own_place = torch.where(ends, ends.cumsum(0) - 1, -1)
        where = ends.nonzero().squeeze(1)
        self.own = {key: _plain(values[where]) for key, values in following.items()}
        longest = int((places - self.first).max()) + 1
        if history.length > longest:
            raise DatasetError(
                f"{name}: windows of {history.length} steps are longer than every episode, of which "
                f"the longest has {longest}{' between jumps' if bool(jumped.any()) else ''}; choose "
                f"a length of at most {longest}."
            )
        device = device_of(transitions)
        self.first, self.own_place = self.first.to(device), self.own_place.to(device)

    def to(self, device: torch.device) -> FrameTable:
        """The same table on ``device``, without a copy of what is there already."""
        moved = copy(self)
        moved.frames = {key: values.to(device) for key, values in self.frames.items()}
        moved.own = {key: values.to(device) for key, values in self.own.items()}
        moved.first, moved.own_place = self.first.to(device), self.own_place.to(device)
        return moved

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.frames.values(), *self.own.values(), self.first, self.own_place]

    def entries(self, rows: Tensor) -> dict[Key, Tensor]:
        """Observations, next observations and masks of the rows numbered ``(B,)``, by key."""
        length, stack = self.history.length, self.history.stack
        steps = torch.arange(1 - length, 2, device=rows.device)  # the window, and the next frame
        place = rows.unsqueeze(1) + steps
        first = self.first.index_select(0, rows).unsqueeze(1)
        entries: dict[Key, Tensor] = {}
        if not stack:
            real = place >= first
            entries[(HISTORY_MASK,)] = real[:, :-1]
            entries["next", HISTORY_MASK] = real[:, 1:]
        place = torch.maximum(place, first).clamp(max=len(self.first) - 1)
        own = self.own_place.index_select(0, rows)
        for key, frames in self.frames.items():
            window = self._gather(frames, self.own[key], place, own)
            dims = frames.ndim - 1
            for target, part in ((key, window[:, :-1]), (("next", *key), window[:, 1:])):
                entries[target] = stack_frames(part, dims) if stack else part
        return entries

    def _gather(self, frames: Tensor, own: Tensor, place: Tensor, own_place: Tensor) -> Tensor:
        """``(B, length + 1, *shape)``: both windows of a row have all frames but one in common."""
        shape = frames.shape[1:]
        window = frames.index_select(0, place.reshape(-1)).view(*place.shape, *shape)
        if torch.compiler.is_compiling() or window.device.type != "cpu":
            last = own.index_select(0, own_place.clamp(min=0))
            ends = (own_place >= 0).view(-1, *(1,) * len(shape))
            window[:, -1] = torch.where(ends, last, window[:, -1])
        else:  # few rows are ends; elsewhere finding them would wait for the device or break the graph
            (ends,) = (own_place >= 0).nonzero(as_tuple=True)
            window[ends, -1] = own.index_select(0, own_place[ends])
        return window


def _observation_keys(transitions: TensorDictBase) -> list[Key]:
    names = transitions.keys(include_nested=True, leaves_only=True)
    keys = [(name,) if isinstance(name, str) else tuple(name) for name in names]
    return [key for key in keys if key[0] == "observation"]


def _plain(values: Tensor) -> Tensor:
    """The same memory as an ordinary tensor, which a compiled program can read."""
    return values.as_subclass(Tensor) if type(values) is not Tensor else values


def _continues(frames: dict[Key, Tensor], following: dict[Key, Tensor]) -> Tensor:
    """Bool ``(N,)``: whether a row's next observations are the following row's observations."""
    (rows,) = {len(values) for values in frames.values()}
    same = torch.ones(rows, dtype=torch.bool)
    same[-1] = False
    for key, values in frames.items():
        size = max(1, COMPARED_BYTES // max(values[0].nbytes, 1))
        for start in range(0, rows - 1, size):
            stop = min(start + size, rows - 1)
            equal = following[key][start:stop] == values[start + 1 : stop + 1]
            same[start:stop] &= equal.reshape(stop - start, -1).all(1).cpu()
    return same
