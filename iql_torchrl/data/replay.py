"""Sampling from a table of transitions: TorchRL's replay buffer, and a sampler on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    TensorStorage,
)

from iql_torchrl.config import check_whole
from iql_torchrl.data.schema import EPISODE, Key

Part = tuple[Key, torch.Size]  # key, and shape of one row


def replay_buffer(
    transitions: TensorDictBase,
    batch_size: int,
    *,
    device: torch.device | str | None = None,
    seed: int | None = None,
    capacity: int | None = None,
    **kwargs: Any,
) -> TensorDictReplayBuffer:
    """A TorchRL buffer over ``transitions`` ``(N,)``, uniform with replacement by default.

    ``device``: of the storage; None leaves the table on its device, without a copy.
    ``seed``: of its own generator, which is on the storage's device, where TorchRL draws indices;
    None draws from torch's global one. ``capacity=None``: the buffer
    holds the dataset and nothing can be written to it; a number at least N makes a copy with room
    for online data. ``kwargs`` go to ``TensorDictReplayBuffer`` (``sampler``, ``transform``,
    ``prefetch``, ``pin_memory``, ...).
    """
    check_whole(batch_size=batch_size)
    rows = transitions.batch_size[0]
    where = device_of(transitions) if device is None else torch.device(device)
    generator = None if seed is None else generator_on(where, seed)
    if capacity is None:
        table = transitions if device is None else transitions.to(where)
        return TensorDictReplayBuffer(
            storage=TensorStorage(table, device=where), writer=ImmutableDatasetWriter(),
            batch_size=batch_size, generator=generator, **kwargs,
        )  # fmt: skip
    if capacity < rows:
        raise ValueError(f"capacity: expected at least the {rows} transitions, got {capacity}")
    storage = LazyTensorStorage(capacity, device=where)
    buffer = TensorDictReplayBuffer(
        storage=storage, batch_size=batch_size, generator=generator, **kwargs
    )
    buffer.extend(transitions.clone())
    return buffer


def device_of(transitions: TensorDictBase) -> torch.device:
    """The device of the rows; a TensorDict that names none may hold tensors of any."""
    if transitions.device is not None:
        return transitions.device
    leaves = transitions.values(include_nested=True, leaves_only=True)
    return next((leaf.device for leaf in leaves), torch.device("cpu"))


def generator_on(device: torch.device, seed: int | None) -> torch.Generator:
    """A generator on ``device``; torch draws there from no other."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def leaf_keys(transitions: TensorDictBase) -> list[Key]:
    names = transitions.keys(include_nested=True, leaves_only=True)
    return [(name,) if isinstance(name, str) else tuple(name) for name in names]


def nested_entry(nested: dict[str, Any], key: Key, values: Tensor) -> None:
    """Put ``values`` into nested dicts under ``key``."""
    for name in key[:-1]:
        nested = nested.setdefault(name, {})
    nested[key[-1]] = values


class DeviceSampler:
    """Uniform batches, with replacement, from transitions that are stored on one device.

    Indices are drawn and rows gathered on ``device``; nothing waits for the host. Fields of one
    dtype lie in one matrix, so a batch is one gather per dtype and its fields are views of it. The
    episode numbers, which no loss reads, are left behind.

    Args:
        transitions: batch ``(N,)``; copied, so later changes to it are not seen.
        batch_size: rows per ``sample()``.
        device: None keeps the transitions' own (CPU if it has none).
        seed: of ``generator``, which is on ``device``; None seeds it from the system.
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
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
        """Copy ``transitions`` ``(M,)`` over the rows ``start`` to ``start + M``."""
        count = int(transitions.batch_size[0])
        for (key, _), column in self._columns([t[start : start + count] for t in self.tables]):
            column.copy_(transitions.get(key).reshape(count, -1))

    def _columns(self, tables: list[Tensor]) -> list[tuple[Part, Tensor]]:
        """The fields of packed rows ``(B, width)``, one tensor for each table, as views of them."""
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
        """The shape of ``indices(batch_size)``."""
        return (batch_size,)

    def draw(self, out: Tensor) -> Tensor:
        """``out``, of that shape, with the indices of a new batch."""
        return out.random_(self.rows, generator=self.generator)

    def indices(self, batch_size: int | None = None) -> Tensor:
        """Row numbers of a batch, int64 ``(batch_size,)`` on the device."""
        shape = self.index_shape(self.batch_size if batch_size is None else batch_size)
        return self.draw(torch.empty(shape, dtype=torch.int64, device=self.device))

    def gather(self, indices: Tensor) -> TensorDict:
        """The rows numbered by ``indices`` ``(B,)``."""
        return TensorDict(self.entries(indices), batch_size=[len(indices)], device=self.device)

    def entries(self, indices: Tensor) -> dict[str, Any]:
        """The entries of the rows numbered by ``indices`` ``(B,)``, as nested dicts."""
        nested: dict[str, Any] = {}
        packed = self.tables[: len(self._parts)]
        for (key, shape), values in self._columns([t.index_select(0, indices) for t in packed]):
            nested_entry(nested, key, values.reshape(len(indices), *shape))
        return nested

    def column(self, key: Key) -> Tensor | None:
        """All rows of one entry, ``(N, ...)``, as a view; None where there is none."""
        name = (key,) if isinstance(key, str) else tuple(key)
        for (part, shape), values in self._columns(self.tables):
            if part == name:
                return values.unflatten(1, shape) if shape else values.squeeze(1)
        return None

    def sample(self, batch_size: int | None = None) -> TensorDict:
        """A fresh batch ``(batch_size,)``."""
        return self.gather(self.indices(batch_size))


class MemberSampler(DeviceSampler):
    """A batch of its own for every run of a population: ``(members, batch_size)``.

    One stream of indices serves all; a run's batches are not those it would draw alone. ``part``: the
    runs whose batches are gathered, by default all; indices are drawn for all ``members``.
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
        own = indices.view(self.members, -1)[self.part.start : self.part.stop]
        rows: TensorDict = super().gather(own.reshape(-1)).view(len(self.part), -1)
        return rows
