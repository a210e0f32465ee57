"""Sampling of transitions: TorchRL's replay buffer, and a sampler on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.types import Device
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    TensorStorage,
)

from iql_torchrl.config import check_whole
from iql_torchrl.data.schema import EPISODE, Key, nested

Part = tuple[Key, torch.Size]  # key, and shape of one transition


def replay_buffer(
    transitions: TensorDictBase,
    batch_size: int,
    *,
    device: Device = None,
    seed: int | None = None,
    capacity: int | None = None,
    **kwargs: Any,
) -> TensorDictReplayBuffer:
    """A TorchRL buffer over ``transitions`` ``(N,)``, uniform with replacement by default.

    ``device``: of the storage; None leaves the transitions on their device, without a copy.
    ``seed``: of the buffer's generator, which is on the storage's device, where TorchRL draws indices;
    None draws from torch's global generator. ``capacity=None``: nothing can be written to the buffer;
    an integer, at least N, makes a copy with room for online data. ``kwargs`` go to
    ``TensorDictReplayBuffer`` (``sampler``, ``transform``, ``prefetch``, ``pin_memory``, ...).
    """
    check_whole(batch_size=batch_size)
    where = device_of(transitions) if device is None else torch.device(device)
    generator = None if seed is None else generator_on(where, seed)
    made: dict[str, Any]
    if capacity is None:
        stored = transitions if device is None else transitions.to(where)
        made = {"storage": TensorStorage(stored, device=where), "writer": ImmutableDatasetWriter()}
    elif capacity < (count := len(transitions)):
        raise ValueError(f"capacity: expected at least the {count} transitions, got {capacity}")
    else:
        made = {"storage": LazyTensorStorage(capacity, device=where)}
    buffer = TensorDictReplayBuffer(batch_size=batch_size, generator=generator, **made, **kwargs)
    if capacity is not None:
        buffer.extend(transitions.clone())
    return buffer


def device_of(transitions: TensorDictBase) -> torch.device:
    """The device of the transitions; a TensorDict without a device may hold tensors of any."""
    if transitions.device is not None:
        return transitions.device
    leaves = transitions.values(include_nested=True, leaves_only=True)
    return next((leaf.device for leaf in leaves), torch.device("cpu"))


def generator_on(device: torch.device, seed: int | None) -> torch.Generator:
    """A generator on ``device``, which torch needs to draw there; None seeds it from the system."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def leaf_keys(transitions: TensorDictBase) -> list[Key]:
    names = transitions.keys(include_nested=True, leaves_only=True)
    return [(name,) if isinstance(name, str) else tuple(name) for name in names]


class DeviceSampler:
    """Uniform batches, with replacement, from transitions that are stored on one device.

    Indices are drawn and transitions gathered on ``device``; nothing waits for the host. Entries of one
    dtype are in one matrix, so a batch is one gather per dtype and its entries are views of it. The
    episode numbers, which no loss reads, are left out.

    Args:
        transitions: batch ``(N,)``; copied.
        batch_size: transitions per ``sample()``.
        device: None keeps that of the transitions (the CPU if they have none).
        seed: of ``generator``, which is on ``device``; None seeds it from the system.
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        batch_size: int,
        *,
        device: Device = None,
        seed: int | None = None,
    ) -> None:
        check_whole(batch_size=batch_size)
        self.device = device_of(transitions) if device is None else torch.device(device)
        self.batch_size = batch_size
        self.rows = int(transitions.batch_size[0])
        self.generator = generator_on(self.device, seed)
        fields: dict[torch.dtype, list[Part]] = {}
        for key in leaf_keys(transitions):
            if key != EPISODE:
                values = transitions.get(key)
                fields.setdefault(values.dtype, []).append((key, values.shape[1:]))
        self._parts = list(fields.values())
        self._widths = [[shape.numel() for _, shape in parts] for parts in self._parts]
        self.tables = [
            torch.empty((self.rows, sum(widths)), dtype=dtype, device=self.device)
            for dtype, widths in zip(fields, self._widths, strict=True)
        ]
        self.write(transitions, 0)

    def write(self, transitions: TensorDictBase, start: int) -> None:
        """Copy ``transitions`` ``(M,)`` to the places ``start`` to ``start + M``."""
        count = int(transitions.batch_size[0])
        for (key, _), column in self._columns([t[start : start + count] for t in self.tables]):
            column.copy_(transitions.get(key).reshape(count, -1))

    def _columns(self, tables: list[Tensor]) -> list[tuple[Part, Tensor]]:
        """The entries of packed transitions ``(B, width)``, one tensor per table, as views of them."""
        return [
            (part, column)
            # a subclass may have further tables
            for table, parts, widths in zip(tables, self._parts, self._widths, strict=False)
            for part, column in zip(parts, torch.split(table, widths, dim=1), strict=True)
        ]

    def __len__(self) -> int:
        return self.rows

    def state_dict(self) -> dict[str, Any]:
        """The state of the sampling; the transitions are not part of it."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())

    def index_shape(self, batch_size: int) -> tuple[int, ...]:
        """Shape of ``indices(batch_size)``."""
        return (batch_size,)

    def draw(self, out: Tensor) -> Tensor:
        """Fill ``out``, of that shape, with the indices of a new batch; return it."""
        return out.random_(self.rows, generator=self.generator)

    def indices(self, batch_size: int | None = None) -> Tensor:
        """Numbers of a batch's transitions, int64 ``(batch_size,)`` on the device."""
        shape = self.index_shape(self.batch_size if batch_size is None else batch_size)
        return self.draw(torch.empty(shape, dtype=torch.int64, device=self.device))

    def gather(self, indices: Tensor) -> TensorDict:
        """The transitions numbered by ``indices``, in a batch of its last dimension."""
        entries = nested(self.entries(indices))  # from which a TensorDict is made fastest
        return TensorDict(entries, batch_size=indices.shape[-1:], device=self.device)

    def entries(self, indices: Tensor) -> dict[Key, Tensor]:
        """The entries of the transitions numbered by ``indices`` ``(B,)``, by key."""
        packed = self.tables[: len(self._parts)]
        columns = self._columns([table.index_select(0, indices) for table in packed])
        return {key: values.reshape(len(indices), *shape) for (key, shape), values in columns}

    def column(self, key: Key) -> Tensor | None:
        """One entry of all transitions, ``(N, ...)``, as a view; None if they lack it."""
        name = (key,) if isinstance(key, str) else tuple(key)
        for (part, shape), values in self._columns(self.tables):
            if part == name:
                return values.unflatten(1, shape) if shape else values.squeeze(1)
        return None

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """A new batch ``(batch_size,)``."""
        return self.gather(self.indices(batch_size))


class MemberSampler(DeviceSampler):
    """Independent batches for the members of a population: ``(members, batch_size)``.

    One stream of indices serves all; a member's batches are not those that it would draw alone.
    ``part``: the members whose batches are gathered, by default all; indices are drawn for all
    ``members``.
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        batch_size: int,
        *,
        members: int,
        part: range | None = None,
        **kwargs: Any,
    ) -> None:
        check_whole(members=members)
        super().__init__(transitions, batch_size * members, **kwargs)
        self.members, self.part = members, range(members) if part is None else part

    def gather(self, indices: Tensor) -> TensorDict:
        chosen = indices.view(self.members, -1)[self.part.start : self.part.stop]
        batch: TensorDict = super().gather(chosen.reshape(-1)).view(chosen.shape)
        return batch
