"""Windows of the last observations of each transition: a sampler, and a TorchRL buffer."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.types import Device
from torchrl.data import ImmutableDatasetWriter, Storage, TensorDictReplayBuffer

from iql_torchrl.data.readers.contradictions import differs
from iql_torchrl.data.replay import DeviceSampler, device_of, generator_on, leaf_keys
from iql_torchrl.data.schema import DatasetError, Key, dotted
from iql_torchrl.networks import HISTORY_MASK, History, stack_frames

JUMPS = ("error", "restart")
#: Attributes of ``Windows`` by their names in the digests of checkpoints, if these differ.
NAMES_OF_DIGESTS = {"final": "own", "final_place": "own_place"}
#: Dtypes for which torch lacks ``index_put`` on a CPU.
WIDE_UNSIGNED = torch.uint16, torch.uint32, torch.uint64


class Windows:
    """The transitions of a dataset with the last ``length`` observations in place of one.

    ``windows[numbers]`` is a TensorDict with the entries of those transitions, except for:

    - ``observation`` and ``("next", "observation")``, every leaf: ``(B, length, *shape)``, oldest
      first. The last step is the transition's observation, or next observation. At the start of an
      episode the first observation is repeated before it.
    - ``"history_mask"`` and ``("next", "history_mask")``: bool ``(B, length)``, True at real steps.

    With ``stack=True`` a window's frames are one observation (``networks.stack_frames``) without masks.

    Every frame is stored once: the observations of ``transitions``, without a copy, and the last next
    observation of each episode. Inside an episode a next observation is read from the next transition,
    from whose observation it may differ by rounding (``tolerance.EQUAL``). Windows and next windows
    overlap in memory: do not change them in place.

    Args:
        transitions: as ``OfflineDataset.transitions``, in memory or memory-mapped.
        lengths: transitions of each episode, ``(E,)``.
        length: number of observations, the current one included.
        jumps: what to do at a discontinuity, where a next observation inside an episode is not the
            observation of the following transition: ``"error"``, or ``"restart"`` the history.

    Attributes:
        history: length and form of the windows: what a policy trained on them needs.
        frames: by key the observations, ``(N, *shape)``.
        final: by key the next observations that no following transition has, ``(S, *shape)``: one for
            each episode, and one for each discontinuity.
        first: int64 ``(N,)``, the first transition whose observation a window of this one may have.
        final_place: int64 ``(N,)``, the place in ``final`` of a transition's next observation, or -1 if
            the following transition has it.
        rest: the other entries of the transitions.

    Raises ``ValueError`` on a length that is not an integer >= 1, and ``DatasetError`` on
    discontinuities and on windows that are longer than every episode.
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
        here, after = (
            {k: v.cpu().numpy() for k, v in part.items()} for part in (self.frames, following)
        )
        broken = torch.zeros_like(ends)
        broken[:-1] = torch.from_numpy(differs(here, after, len(ends))) & ~ends[:-1]
        if jumps == "error" and bool(broken.any()):
            raise DatasetError(
                f"{name}: in {int(broken.sum())} transitions inside episodes, first transition "
                f"{int(broken.to(torch.uint8).argmax())}, the next observation is not the observation "
                "of the following transition, so their windows have no single history. Correct the "
                "episode boundaries, or pass jumps='restart' to begin a new history after each of them."
            )
        ends |= broken
        places = torch.arange(len(ends))
        starts = torch.cat([torch.ones(1, dtype=torch.bool), ends[:-1]])
        first = torch.where(starts, places, 0).cummax(0).values
        longest = int((places - first).max()) + 1
        if length > longest:
            between = " between discontinuities" if bool(broken.any()) else ""
            raise DatasetError(
                f"{name}: windows of {length} steps are longer than every episode, of which "
                f"the longest has {longest}{between}; choose a length of at most {longest}."
            )
        where = ends.nonzero().squeeze(1)
        self.final = {key: values[where] for key, values in following.items()}
        device = device_of(transitions)
        self.first = first.to(device)
        self.final_place = torch.where(ends, ends.cumsum(0) - 1, -1).to(device)
        self.rest = transitions.exclude("observation", ("next", "observation"))

    def __len__(self) -> int:
        return int(self.rest.batch_size[0])

    def __getitem__(self, numbers: Any) -> TensorDict:
        """The transitions with these numbers: integers ``(B,)``, a slice, or a bool mask ``(N,)``."""
        if not isinstance(numbers, Tensor) or numbers.dtype == torch.bool:
            numbers = torch.arange(len(self), device=self.first.device)[numbers]
        numbers = numbers.to(self.first)  # its device and dtype
        batch: TensorDict = self.rest[numbers]
        for key, values in self.entries(numbers).items():
            batch.set(key, values)
        return batch

    def entries(self, numbers: Tensor) -> dict[Key, Tensor]:
        """Observations, next observations and masks of the transitions ``numbers`` ``(B,)``, by key."""
        both = self._frames(numbers, 1 - self.history.length, 1)  # the two windows overlap
        now = {key: values[:, :-1] for key, values in both.items()}
        return self._sides(now, {key: values[:, 1:] for key, values in both.items()})

    def _frames(self, numbers: Tensor, start: int, stop: int) -> dict[Key, Tensor]:
        """The frames of the steps ``start`` to ``stop``, ``(B, steps, *shape)`` by key.

        Step 0 is the observation of a transition and step 1, the largest, its next observation. Before
        the start of its episode the first is repeated. The mask, True at real steps, is one more key.
        """
        place = numbers.unsqueeze(1) + torch.arange(start, stop + 1, device=numbers.device)
        first = self.first.index_select(0, numbers).unsqueeze(1)
        found: dict[Key, Tensor] = {(HISTORY_MASK,): place >= first}
        place = torch.maximum(place, first).clamp(max=len(self.first) - 1)
        final_place = self.final_place.index_select(0, numbers)
        for key, frames in self.frames.items():
            found[key] = frames.index_select(0, place.flatten()).unflatten(0, place.shape)
            if stop == 1:
                _replace_last(found[key], self.final[key], final_place)
        return found

    def _sides(self, now: dict[Key, Tensor], after: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """Frames as entries of a batch, those of ``after`` below ``"next"``."""
        entries = now | {("next", *key): values for key, values in after.items()}
        if not self.history.stack:
            return entries
        del entries[HISTORY_MASK,], entries["next", HISTORY_MASK]
        return {key: stack_frames(values, values.ndim - 2) for key, values in entries.items()}

    def to(self, device: Device) -> Windows:
        """The same windows on ``device``; without a copy of what is there."""
        moved = copy(self)
        for name, part in vars(self).items():
            if isinstance(part, dict):
                setattr(moved, name, {key: values.to(device) for key, values in part.items()})
            elif isinstance(part, Tensor | TensorDictBase):
                setattr(moved, name, part.to(device))
        return moved

    def table(self) -> TensorDict:
        """Everything that is stored, for digests: frames, their places, and the other entries."""
        stored: dict[str, Any] = {}
        for name, part in vars(self).items():
            if isinstance(part, dict):
                part = {dotted(key): values for key, values in part.items()}
            if isinstance(part, dict | Tensor | TensorDictBase):
                stored[NAMES_OF_DIGESTS.get(name, name)] = part
        return TensorDict(stored, batch_size=[])

    def device_sampler(
        self, batch_size: int, device: Device = None, seed: int | None = None
    ) -> WindowSampler:
        """A ``DeviceSampler`` of the windows. On the same device it shares the frames."""
        return WindowSampler(self, batch_size, device=device, seed=seed)

    def replay_buffer(
        self, batch_size: int, device: Device = None, seed: int | None = None, **kwargs: Any
    ) -> TensorDictReplayBuffer:
        """A TorchRL buffer of windows, to which nothing can be written.

        Draws the same transitions as ``data.replay_buffer`` with the same ``seed``. ``kwargs`` go to
        ``TensorDictReplayBuffer``.
        """
        storage = WindowStorage(self if device is None else self.to(device))
        return TensorDictReplayBuffer(
            storage=storage,
            writer=ImmutableDatasetWriter(),
            batch_size=batch_size,
            generator=None if seed is None else generator_on(storage.device, seed),
            collate_fn=nn.Identity(),
            **kwargs,
        )


class WindowSampler(DeviceSampler):
    """A ``DeviceSampler`` whose observations are windows; made by ``windows.device_sampler``."""

    def __init__(
        self, windows: Windows, batch_size: int, *, device: Device = None, seed: int | None = None
    ) -> None:
        where = windows.first.device if device is None else torch.device(device)
        super().__init__(windows.rest, batch_size, device=where, seed=seed)
        self.windows = copy(windows)
        self.windows.rest = windows.rest.select()  # its entries are in ``tables``
        self.windows = self.windows.to(where)
        self.tables += self.windows.table().values(True, True)

    def entries(self, indices: Tensor) -> dict[Key, Tensor]:
        return super().entries(indices) | self.windows.entries(indices)

    def column(self, key: Key) -> Tensor | None:
        """As for a ``DeviceSampler``; of an observation the frames ``(N, *shape)``.

        Of a next observation only those that are not an observation too: ``Windows.final``.
        """
        name = (key,) if isinstance(key, str) else tuple(key)
        if name in self.windows.frames:
            return self.windows.frames[name]
        if name[0] == "next" and name[1:] in self.windows.final:
            return self.windows.final[name[1:]]
        return super().column(key)


class WindowStorage(Storage):
    """A read-only storage of TorchRL that makes windows of the transitions that are asked for."""

    def __init__(self, windows: Windows) -> None:
        super().__init__(max_size=len(windows))
        self.windows = windows
        self.device = windows.first.device

    def get(self, index: Any) -> TensorDict:
        return self.windows[index]

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        raise RuntimeError("windows cannot be written to; collect online data in another buffer.")

    def __len__(self) -> int:
        return len(self.windows)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data is fixed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def plain(values: Tensor) -> Tensor:
    """The same memory as an ordinary tensor, which a compiled program can read."""
    return values.as_subclass(Tensor) if type(values) is not Tensor else values


def _replace_last(window: Tensor, final: Tensor, place: Tensor) -> None:
    """Put ``final[place]`` into the last step of ``window`` ``(B, T, *shape)`` unless it is -1."""
    on_host = window.device.type == "cpu" and window.dtype not in WIDE_UNSIGNED
    if torch.compiler.is_compiling() or not on_host:
        last = final.index_select(0, place.clamp(min=0))
        ends = (place >= 0).view(-1, *(1,) * (final.ndim - 1))
        window[:, -1] = torch.where(ends, last, window[:, -1])
    else:  # few are ends; elsewhere finding them would wait for the device or break the graph
        (ends,) = (place >= 0).nonzero(as_tuple=True)
        window[ends, -1] = final.index_select(0, place[ends])
