"""The tensors of a loss's networks: networks called with other tensors, and shared parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictParams
from torch import nn

Entry = tuple[str, NestedKey]  # a network's name, and the key in its parameters


class FunctionalNetwork:
    """A network that can be called with other tensors than its own.

    ``keys`` are those of ``params``, in their order; ``is_buffer`` says which of them are buffers.
    """

    def __init__(self, network: nn.Module, params: TensorDictParams) -> None:
        self.network = network
        self.keys: list[NestedKey] = list(params.keys(True, True))
        self.is_buffer: list[bool] = []
        self._places: list[tuple[dict[str, Any], str]] = []
        for key in self.keys:
            *path, name = key if isinstance(key, tuple) else (key,)
            module = network.get_submodule(".".join(path))
            is_buffer = name in module._buffers
            self.is_buffer.append(is_buffer)
            self._places.append((module._buffers if is_buffer else module._parameters, name))

    def swap(self, tensors: Sequence[Any]) -> list[Any]:
        """Put ``tensors`` into the network; return those that it held."""
        before = [table[name] for table, name in self._places]
        for (table, name), tensor in zip(self._places, tensors, strict=True):
            table[name] = tensor
        return before

    @contextmanager
    def holding(self, tensors: Sequence[Any]) -> Iterator[Any]:
        """A context in which the network has ``tensors``."""
        before = self.swap(tensors)
        try:
            yield self.network
        finally:
            self.swap(before)


class SharedParameters:
    """The shared parameters of a loss: each has one owner, and mirrors in the other networks.

    A mirror is a parameter with the owner's storage that belongs to no optimizer, but that TorchRL's
    updaters follow, as they follow any source that requires a gradient: so the targets average it. A
    forward pass reads the owner itself, with ``detach`` (``separate_losses=True``) without gradient.

    A layer that all networks are to read is better an ``encoder_network``.

    Args:
        owners: the owner of each mirror.
        detach: whether the owner's loss alone trains a shared parameter.
        tensor: gives the tensor of an entry.
    """

    def __init__(
        self, owners: Mapping[Entry, Entry], detach: bool, tensor: Callable[[Entry], Any]
    ) -> None:
        self.owners, self._detach, self._tensor = owners, detach, tensor

    @staticmethod
    def find(
        actor: nn.Module, value: nn.Module, critics: Sequence[nn.Module], *, separate: bool
    ) -> dict[Entry, Entry]:
        """Mirrors and their owners in these networks; the actor owns first, then V."""
        owners: dict[Entry, Entry] = {}
        if separate:
            owners |= _shared_entries("value_network", [value], {"actor_network": actor})
        if separate or len(critics) > 1:
            networks = {"actor_network": actor, "value_network": value}
            owners |= _shared_entries("qvalue_network", critics, networks)
        return owners

    def networks(self) -> set[str]:
        """Names of the networks that hold mirrors."""
        return {name for name, _ in self.owners}

    def replace(self, name: str, keys: Sequence[NestedKey], tensors: list[Any]) -> list[Any]:
        """``tensors`` of the network ``name``, mirrors replaced by what their owners hold."""
        held = list(tensors)
        for place, key in enumerate(keys):
            owner = self.owners.get((name, key))
            if owner is not None:
                tensor = self._tensor(owner).expand(held[place].shape)
                held[place] = tensor.detach() if self._detach else tensor
        return held

    def mirrors(self) -> list[Any]:
        """The parameters that mirror another one."""
        return [self._tensor(entry) for entry in self.owners]

    def tie(self) -> None:
        """Let mirrors have their owners' storage, after a copy, a cast or a load."""
        for entry, owner in self.owners.items():
            mirror = self._tensor(entry)
            mirror.data = self._tensor(owner).data.expand(mirror.shape)

    def untie(self) -> None:
        """Give mirrors storage of their own, so that every entry can be written to."""
        for mirror in self.mirrors():
            mirror.data = mirror.data.clone(memory_format=torch.contiguous_format)


def _shared_entries(
    name: str, modules: Sequence[nn.Module], owners: Mapping[str, nn.Module]
) -> dict[Entry, Entry]:
    """Entries that every one of ``modules`` shares with an owner, and that owner's; the first wins."""
    owned: dict[int, Entry] = {}
    for owner, module in owners.items():
        for key, parameter in TensorDict.from_module(module).items(True, True):
            owned.setdefault(id(parameter), (owner, key))
    first, *others = (dict(TensorDict.from_module(module).items(True, True)) for module in modules)
    return {
        (name, key): owned[id(parameter)]
        for key, parameter in first.items()
        if isinstance(parameter, nn.Parameter)
        and id(parameter) in owned
        and all(table.get(key) is parameter for table in others)
    }
