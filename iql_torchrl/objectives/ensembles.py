"""From one module, a list or a factory to K critics, and the bookkeeping their targets need.

TorchRL's ``LossModule.convert_to_functional`` does the conversion. This module corrects two of its
results for critics: weights that it draws again uniformly, and shared trunks and buffers that its
target critics do not follow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import Tensor, nn

from iql_torchrl.host import children_of, plain_entries

Critics: TypeAlias = TensorDictModule | Sequence[TensorDictModule] | Callable[[], TensorDictModule]


def list_critics(critics: Critics, num_critics: int) -> TensorDictModule | list[TensorDictModule]:
    """The module alone, or a list of exactly ``num_critics`` modules (a factory is called K times).

    Raises ``ValueError`` when a list has another length, ``TypeError`` on anything else, and
    ``ValueError`` when a single module that must become K critics has uninitialised (lazy) weights.
    """
    if isinstance(critics, nn.Module):
        if num_critics > 1:
            _refuse_lazy(critics)
        return critics
    if callable(critics):
        critics = [critics() for _ in range(num_critics)]
    if not isinstance(critics, Sequence) or not all(isinstance(c, nn.Module) for c in critics):
        raise TypeError(
            f"qvalue_network is {type(critics).__name__}; expected a TensorDictModule, a list of "
            "them, or a function without arguments that returns one."
        )
    if len(critics) != num_critics:
        raise ValueError(
            f"qvalue_network lists {len(critics)} critics and num_qvalue_nets is {num_critics}; "
            f"pass num_qvalue_nets={len(critics)}."
        )
    return critics[0] if num_critics == 1 else list(critics)


def _refuse_lazy(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"qvalue_network's parameter {name!r} is not initialised yet (a lazy layer); run "
                "one batch through the network before building the loss."
            )


def draw_critics(tensor: Tensor, num_critics: int) -> Tensor:
    """``num_critics`` initialisations stacked, shape ``(K, *tensor.shape)``.

    Critic 0 keeps ``tensor``. The others are independent draws at the same scale:

    - a frozen tensor (``requires_grad=False``) or one whose entries are all equal (zero biases,
      unit norm scales) is copied;
    - for a matrix or kernel whose rows or columns are orthogonal with one common norm, another
      orthogonal matrix with that norm is drawn (Saxe et al. 2014);
    - any other tensor is drawn entry by entry, with replacement, from its own entries.
    """
    source = tensor.detach()
    if not tensor.requires_grad or bool((source == source.flatten()[:1]).all()):
        draws = [source] * (num_critics - 1)
    elif (gain := _orthogonal_gain(source)) is not None:
        draws = [
            nn.init.orthogonal_(torch.empty_like(source), gain) for _ in range(num_critics - 1)
        ]
    else:
        flat = source.flatten()
        index = torch.randint(flat.numel(), (num_critics - 1, flat.numel()), device=flat.device)
        draws = list(flat[index].unflatten(-1, source.shape).unbind(0))
    return torch.stack([source, *draws])


def _orthogonal_gain(weight: Tensor) -> float | None:
    """Common norm of the orthogonal rows (or columns, if fewer) of a matrix, else ``None``."""
    if weight.ndim < 2:
        return None
    matrix = weight.flatten(1).double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    if matrix.shape[0] < 2:  # a single row does not show how it was drawn
        return None
    gram = matrix @ matrix.T
    square = gram.diagonal().mean()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    tolerance = 1e-3 * square
    if not bool(((gram - square * identity).abs() <= tolerance).all()):
        return None
    return float(square.sqrt())


def initialise_critics(live: TensorDictParams, target: TensorDictParams, module: nn.Module) -> None:
    """Write :func:`draw_critics` of ``module``'s parameters into ``live`` and ``target`` in place."""
    num_critics = live.shape[0]
    with torch.no_grad():
        for key, parameter in TensorDict.from_module(module).items(True, True):
            leaf = live.get(key)
            if leaf.requires_grad:  # neither a buffer nor a trunk that another network owns
                draws = draw_critics(parameter, num_critics)
                leaf.data.copy_(draws)
                target.get(key).data.copy_(draws)
                leaf.requires_grad_(parameter.requires_grad)


def unlocked(params: TensorDictBase) -> TensorDictBase:
    """A shallow copy of ``params`` as a plain TensorDict whose entries can be replaced."""
    if isinstance(params, TensorDictParams):
        params = plain_entries(params)
    return params.copy()


class TrunkEntry(NamedTuple):
    """Entry ``key`` of ``network``'s parameters is entry ``owner_key`` of ``owner``'s."""

    network: str
    key: NestedKey
    owner: str
    owner_key: NestedKey


class SharedLeaves:
    """Entries of a network's parameters that belong to another network of the same loss.

    A trunk used by the actor and by the critics has one owner. Critics hold a mirror of it: a
    parameter with the owner's storage that belongs to no optimiser, but that TorchRL's updaters
    follow, as they follow any source that requires a gradient; so the targets average the trunk.
    In a forward pass the critics read the owner itself, detached with ``separate_losses=True``
    (the owner's loss alone trains it).

    Buffers (statistics of normalisation layers) of target critics are tied to the live ones.
    ``tie`` restores shared storage after a copy, a cast or a load.
    """

    def __init__(self, detach: bool) -> None:
        self.detach = detach
        self.trunk: list[TrunkEntry] = []
        self.buffers: list[tuple[str, NestedKey]] = []

    def find_trunk(
        self, name: str, modules: Sequence[nn.Module], owners: dict[str, nn.Module]
    ) -> None:
        """Record the entries that every one of ``modules`` shares with an owner, first owner wins."""
        owned: dict[int, tuple[str, NestedKey]] = {}
        for owner, module in owners.items():
            for key, parameter in TensorDict.from_module(module).items(True, True):
                owned.setdefault(id(parameter), (owner, key))
        tables = [dict(TensorDict.from_module(module).items(True, True)) for module in modules]
        for key, parameter in tables[0].items():
            same = all(table.get(key) is parameter for table in tables)
            if isinstance(parameter, nn.Parameter) and same and id(parameter) in owned:
                self.trunk.append(TrunkEntry(name, key, *owned[id(parameter)]))

    def install(self, loss: nn.Module, name: str, modules: Sequence[nn.Module]) -> None:
        """Put mirrors in place, give critics' entries storage of their own, and tie targets."""
        buffers = {tuple(key.split(".")) for m in modules for key, _ in m.named_buffers()}
        params: TensorDictParams = getattr(loss, f"{name}_params")
        mirrored = {key for network, key, _, _ in self.trunk if network == name}
        with params.unlock_():
            for key, leaf in list(params.items(True, True)):
                if (key if isinstance(key, tuple) else (key,)) in buffers:
                    leaf.data = leaf.data.contiguous()
                    self.buffers.append((name, key))
                elif key in mirrored:
                    params.set(key, nn.Parameter(leaf.detach()))
                elif not isinstance(leaf, nn.Parameter):
                    _warn_unshared(name, key)
                    params.set(key, nn.Parameter(leaf.detach().clone()))
        self.tie(loss)

    def tie(self, loss: nn.Module) -> None:
        """Let every mirror use its owner's storage, and target buffers the live ones'."""
        for name, key, owner, owner_key in self.trunk:
            mirror = getattr(loss, f"{name}_params").get(key)
            mirror.data = getattr(loss, f"{owner}_params").get(owner_key).data.expand(mirror.shape)
        for name, key in self.buffers:
            target: TensorDictParams | None = children_of(loss).get(f"target_{name}_params")
            if target is not None:
                target.get(key).data = getattr(loss, f"{name}_params").get(key).data

    def untie(self, loss: nn.Module) -> None:
        """Give mirrors storage of their own, so that every entry can be written to."""
        for name, key, _, _ in self.trunk:
            mirror = getattr(loss, f"{name}_params").get(key)
            mirror.data = mirror.data.clone(memory_format=torch.contiguous_format)

    def mirrors(self, loss: nn.Module) -> set[int]:
        """Identities of the mirrors, which belong in no optimiser."""
        return {id(getattr(loss, f"{name}_params").get(key)) for name, key, _, _ in self.trunk}

    def live(self, loss: nn.Module, name: str) -> TensorDictBase:
        """Parameters of the network ``name`` for a forward pass: mirrors replaced by their owners."""
        params: TensorDictBase = getattr(loss, f"{name}_params")
        entries = [entry for entry in self.trunk if entry.network == name]
        if not entries:
            return params
        params = unlocked(params)
        for entry in entries:
            leaf = getattr(loss, f"{entry.owner}_params").get(entry.owner_key)
            leaf = leaf.expand(params.get(entry.key).shape)
            params.set(entry.key, leaf.detach() if self.detach else leaf)
        return params

    def with_spare_buffers(self, name: str, params: TensorDictBase) -> TensorDictBase:
        """Target ``params`` whose buffers are copies: a forward pass in training mode may write."""
        keys = [key for network, key in self.buffers if network == name]
        if not keys:
            return params
        params = unlocked(params)
        for key in keys:
            params.set(key, params.get(key).clone())
        return params


def _warn_unshared(name: str, key: NestedKey) -> None:
    warnings.warn(
        f"the listed critics share {key!r} of {name} with each other and with no other network; "
        "each now trains a copy of its own.",
        UserWarning,
        stacklevel=7,
    )
