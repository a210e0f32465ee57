"""Sampling from a table of transitions: TorchRL's replay buffer, and a sampler on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    TensorStorage,
)

from iql_torchrl.data.schema import Key

__all__ = [
    "DeviceSampler",
    "MemberSampler",
    "device_of",
    "generator_on",
    "nested_entry",
    "replay_buffer",
]

Part = tuple[Key, torch.Size, int]  # key, shape of one row, its number of elements


def check_batch_size(batch_size: Any) -> None:
    """Raises ``ValueError`` unless it is a whole number, at least 1."""
    whole = isinstance(batch_size, int | np.integer) and not isinstance(batch_size, bool)
    if not whole or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; expected a whole number, at least 1.")


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
    check_batch_size(batch_size)
    rows = transitions.batch_size[0]
    where = device_of(transitions) if device is None else torch.device(device)
    generator = None if seed is None else generator_on(where, seed)
    if capacity is not None:
        if capacity < rows:
            raise ValueError(f"capacity: expected at least the {rows} transitions, got {capacity}")
        storage = LazyTensorStorage(capacity, device=where)
        buffer = TensorDictReplayBuffer(
            storage=storage, batch_size=batch_size, generator=generator, **kwargs
        )
        buffer.extend(transitions.clone())
        return buffer
    table = transitions if device is None else transitions.to(where)
    return TensorDictReplayBuffer(
        storage=TensorStorage(table, device=where),
        writer=ImmutableDatasetWriter(),
        batch_size=batch_size,
        generator=generator,
        **kwargs,
    )


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


def nested_entry(nested: dict[str, Any], key: Key, values: Tensor) -> None:
    """Put ``values`` into nested dicts under ``key``."""
    for name in key[:-1]:
        nested = nested.setdefault(name, {})
    nested[key[-1]] = values


class DeviceSampler:
    """Uniform batches, with replacement, from transitions that are stored on one device.

    Indices are drawn and rows gathered on ``device``; nothing waits for the host. Fields of one
    dtype lie in one matrix, so a batch is one gather per dtype and its fields are views of it.

    Args:
        transitions: batch ``(N,)``; copied, so later changes to it are not seen.
        batch_size: rows per ``sample()``.
        device: None keeps the transitions' own (CPU if it has none).
        seed: of ``generator``, which is on ``device``; None seeds it from the system.
        exclude: keys left behind, by default the episode numbers, which no loss reads.
        generator: on ``device``, in place of one made from ``seed``.
    """

    def __init__(
        self,
        transitions: TensorDictBase,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        seed: int | None = None,
        exclude: tuple[Key, ...] = (("collector", "traj_ids"),),
        generator: torch.Generator | None = None,
    ) -> None:
        check_batch_size(batch_size)
        self.device = device_of(transitions) if device is None else torch.device(device)
        self.batch_size = batch_size
        self.rows = int(transitions.batch_size[0])
        self.generator = generator_on(self.device, seed) if generator is None else generator
        fields: dict[torch.dtype, list[tuple[Key, Tensor]]] = {}
        for name in transitions.keys(include_nested=True, leaves_only=True):
            key = (name,) if isinstance(name, str) else tuple(name)
            if key not in exclude:
                values = transitions.get(key)
                fields.setdefault(values.dtype, []).append((key, values))
        self._parts: list[list[Part]] = [
            [(key, values.shape[1:], values[0].numel()) for key, values in group]
            for group in fields.values()
        ]
        self.tables = [
            torch.empty((self.rows, sum(w for *_, w in parts)), dtype=dtype, device=self.device)
            for dtype, parts in zip(fields, self._parts, strict=True)
        ]
        self.write(transitions, 0)

    def write(self, transitions: TensorDictBase, start: int) -> None:
        """Copy ``transitions`` ``(M,)`` over the rows ``start`` to ``start + M``."""
        count = int(transitions.batch_size[0])
        for table, parts in zip(self.tables, self._parts, strict=False):
            rows = table[start : start + count]
            columns = torch.split(rows, [width for *_, width in parts], dim=1)
            for (key, _, _), column in zip(parts, columns, strict=True):
                column.copy_(transitions.get(key).reshape(count, -1))

    def __len__(self) -> int:
        return self.rows

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the sampling; the transitions are not part of it."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"].cpu())

    def indices(self, batch_size: int | None = None) -> Tensor:
        """Row numbers of a batch, int64 ``(batch_size,)`` on the device."""
        size = self.batch_size if batch_size is None else batch_size
        return torch.randint(self.rows, (size,), generator=self.generator, device=self.device)

    def gather(self, indices: Tensor) -> TensorDict:
        """The rows numbered by ``indices`` ``(B,)``."""
        return TensorDict(self.entries(indices), batch_size=[len(indices)], device=self.device)

    def entries(self, indices: Tensor) -> dict[str, Any]:
        """The entries of the rows numbered by ``indices`` ``(B,)``, as nested dicts."""
        nested: dict[str, Any] = {}
        for table, parts in self._groups():
            rows = table.index_select(0, indices)
            columns = torch.split(rows, [width for _, _, width in parts], dim=1)
            for (key, shape, _), values in zip(parts, columns, strict=True):
                nested_entry(nested, key, values.reshape(len(indices), *shape))
        return nested

    def _groups(self) -> list[tuple[Tensor, list[Part]]]:
        """Tables of packed fields with these fields; a subclass may have further tables."""
        return list(zip(self.tables, self._parts, strict=False))

    def column(self, key: Key) -> Tensor | None:
        """All rows of one entry, ``(N, ...)``, as a view; None where there is none."""
        name = (key,) if isinstance(key, str) else tuple(key)
        for table, parts in self._groups():
            columns = torch.split(table, [width for _, _, width in parts], dim=1)
            for (part, shape, _), values in zip(parts, columns, strict=True):
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
        if members < 1:
            raise ValueError(f"members: expected at least 1, got {members}")
        super().__init__(transitions, batch_size * members, **kwargs)
        self.members, self.part = members, range(members) if part is None else part

    def gather(self, indices: Tensor) -> TensorDict:
        own = indices.view(self.members, -1)[self.part.start : self.part.stop]
        rows: TensorDict = super().gather(own.reshape(-1)).view(len(self.part), -1)
        return rows
