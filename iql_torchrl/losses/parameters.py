"""The parameters of a loss, where TorchRL's losses have them, and those that networks share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictParams
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from iql_torchrl.losses.critics import Critics, initialise_critics, list_critics
from iql_torchrl.losses.encoder import SharedEncoder
from iql_torchrl.losses.objective import checked_number
from iql_torchrl.networks.perceptrons import can_be_ensemble

# Attributes of a loss; their parameters are ``<name>_params`` and ``target_<name>_params``.
NETWORKS = ("actor_network", "qvalue_network", "value_network")
ENCODER = "encoder_network"
CRITICS, TARGET_CRITICS = "qvalue_network_params", "target_qvalue_network_params"  # TorchRL's names
AVERAGE = "average_actor_network_params"  # not target_..., which TorchRL's updaters would move

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


class ParameterLoss(LossModule):
    """Holds the parameters of actor, critics, V and encoder; abstract.

    They are where TorchRL's losses have them: ``<name>_params``, those of K critics stacked,
    ``(K, ...)``, and ``target_<name>_params``. Buffers (statistics of normalisation layers) of target
    critics are those of the critics.

    A parameter that several networks share, as TorchRL's ``separate_losses`` needs it, has one owner,
    and mirrors in the other networks. A mirror is a parameter with the owner's storage that belongs to
    no optimizer, but that TorchRL's updaters follow, as they follow any source that requires a
    gradient: so the targets average it. A forward pass reads the owner itself, with
    ``separate_losses=True`` without gradient. A layer that all networks are to read is better an
    ``encoder_network``.
    """

    # TorchRL warns where an attribute that it makes has no annotation.
    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams
    encoder_network: TensorDictModule | None
    encoder_network_params: TensorDictParams
    target_encoder_network_params: TensorDictParams

    functional_networks: dict[str, FunctionalNetwork]  # by network
    tensors: dict[str, list[Tensor]]  # by attribute, in the order of the keys of its network

    def __init__(
        self,
        actor_network: nn.Module,
        qvalue_network: Critics,
        value_network: TensorDictModule,
        encoder_network: TensorDictModule | SharedEncoder | None,
        *,
        num_qvalue_nets: int,
        separate_losses: bool,
        deactivate_vmap: bool,
    ) -> None:
        super().__init__()
        self.actor_ema, self.averaged_actor = 0.0, None
        self.encoder = SharedEncoder.of(encoder_network)
        self.encoder_network = None
        self.num_qvalue_nets = num_qvalue_nets
        self.delay_qvalue = True
        self.deactivate_vmap = deactivate_vmap
        self.separate_losses = separate_losses
        self.owners: dict[Entry, Entry] = {}  # of each mirror
        self._tied_buffers: list[NestedKey] = []  # of the critics and their targets
        self._convert(actor_network, qvalue_network, value_network)
        self.register_load_state_dict_pre_hook(ParameterLoss._before_load)
        self.register_load_state_dict_post_hook(ParameterLoss._after_load)

    @property
    def network_names(self) -> tuple[str, ...]:
        """:data:`NETWORKS`, and the encoder's name where the loss has one."""
        return NETWORKS if self.encoder_network is None else (*NETWORKS, ENCODER)

    @property
    def parts_with_parameters(self) -> tuple[str, ...]:
        """Names that parameters begin with, one for each network and objective."""
        names = tuple(f"{name}_params" for name in self.network_names)
        return (*names, "value_objective", "actor_objective")

    # -- from your networks to parameters and targets ------------------------------------------------

    def _convert(self, actor: nn.Module, critics: Critics, value: nn.Module) -> None:
        """Register the networks' parameters and the critics' targets, as TorchRL does."""
        count, separate = self.num_qvalue_nets, self.separate_losses
        listed = list_critics(critics, count)
        modules = listed if isinstance(listed, list) else [listed]
        networks = {"actor_network": [actor], "qvalue_network": modules, "value_network": [value]}
        for name, each in networks.items():
            for module in each:
                if not isinstance(module, nn.Module) or not hasattr(module, "in_keys"):
                    raise TypeError(
                        f"{name} is {type(module).__name__}; it must be a TensorDictModule: wrap a "
                        "plain network as TensorDictModule(network, in_keys=[...], out_keys=[...])."
                    )
        if self.encoder is not None:
            self.encoder.check(networks)
            del self.encoder_network
            self.convert_to_functional(self.encoder.network, ENCODER, create_target_params=True)
        owners = find_owners(actor, value, modules, separate=separate)
        of_actor = list(actor.parameters())
        self.convert_to_functional(actor, "actor_network")
        self.convert_to_functional(
            value, "value_network", compare_against=of_actor if separate else None
        )
        self.convert_to_functional(
            listed,
            "qvalue_network",
            None if count == 1 else count,
            create_target_params=True,
            compare_against=[*of_actor, *value.parameters()] if separate else None,
        )
        if count > 1 and not isinstance(listed, list):
            initialise_critics(self.qvalue_network_params, self._modules[TARGET_CRITICS], listed)
        self.owners = owners
        self._install_mirrors("value_network", [value])
        self._install_mirrors("qvalue_network", modules)
        self.sync_modules()

    def _install_mirrors(self, name: str, modules: Sequence[nn.Module]) -> None:
        """Put mirrors in place, and give critics' entries storage of their own."""
        buffers = {tuple(key.split(".")) for m in modules for key, _ in m.named_buffers()}
        params: TensorDictParams = getattr(self, f"{name}_params")
        with params.unlock_():
            for key, leaf in list(params.items(True, True)):
                if (key if isinstance(key, tuple) else (key,)) in buffers:
                    leaf.data = leaf.data.contiguous()
                    if name == "qvalue_network":
                        self._tied_buffers.append(key)
                elif (name, key) in self.owners:
                    params.set(key, nn.Parameter(leaf.detach()))
                elif not isinstance(leaf, nn.Parameter):
                    warnings.warn(
                        f"the listed critics share {key!r} of {name} with each other and with no "
                        "other network; each now trains a copy of its own.",
                        UserWarning,
                        stacklevel=7,
                    )
                    params.set(key, nn.Parameter(leaf.detach().clone()))

    def average_actor(self, decay: float) -> None:
        """Keep an average of the policy's parameters; ``averaged_actor`` acts with it.

        ``IQLStep`` sets ``average = decay average + (1 - decay) parameters`` after every update,
        starting at the parameters as they are now. ``decay`` in [0, 1); 0: no average. Call it before
        the step is built. Buffers are the policy's own. The average is part of the loss's state, and
        not of its parameters.
        """
        checked_number("actor_ema", decay)
        self.actor_ema = float(decay)
        if not decay:
            self._modules.pop(AVERAGE, None)
            self.averaged_actor = None
            return
        params = self.actor_network_params
        trained = [key for key, leaf in params.items(True, True) if isinstance(leaf, nn.Parameter)]
        average = params.data.select(*trained).clone()
        setattr(self, AVERAGE, TensorDictParams(average, no_convert=True))
        actor = copy.deepcopy(self.actor_network).requires_grad_(False)
        self.__dict__["averaged_actor"] = actor  # not a submodule, as the networks
        self.sync_modules()

    def average_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The actor's parameters, and in the same order their averages; empty without averages."""
        return self._pairs("average")

    def target_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Online parameters, and in the same order those of the targets that average them.

        Buffers are left out: those of the target critics are the critics'.
        """
        return self._pairs("target")

    def _pairs(self, prefix: str) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [
            (leaf, self._modules[f"{prefix}_{name}_params"].get(key))
            for name in self.network_names
            if f"{prefix}_{name}_params" in self._modules
            for key, leaf in getattr(self, f"{name}_params").items(True, True)
            if isinstance(leaf, nn.Parameter)
        ]
        return [online for online, _ in pairs], [follower for _, follower in pairs]

    # -- tensors that are one: shared parameters, targets' buffers, averages, your networks ------------

    def online_tensors(self, name: str) -> list[Any]:
        """Tensors of the online network ``name``, those of owners in place of mirrors."""
        tensors = self.tensors[f"{name}_params"]
        if not self._has_mirrors(name):
            return tensors
        tensors = list(tensors)
        for place, key in enumerate(self.functional_networks[name].keys):
            if (owner := self.owners.get((name, key))) is not None:
                tensor = self._entry(owner).expand(tensors[place].shape)
                tensors[place] = tensor.detach() if self.separate_losses else tensor
        return tensors

    def _has_mirrors(self, name: str) -> bool:
        return any(network == name for network, _ in self.owners)

    def _entry(self, entry: Entry) -> Any:
        name, key = entry
        return getattr(self, f"{name}_params").get(key)

    def sync_modules(self) -> None:
        """Let your own networks hold the tensors of this loss, which may be others now."""
        self.functional_networks, self.tensors = {}, {}
        for name in self.network_names:
            params = self._modules.get(f"{name}_params")
            if params is None:  # an encoder without parameters and buffers
                continue
            functional = self.functional_networks[name] = FunctionalNetwork(
                getattr(self, name), params
            )
            for attribute in (f"{name}_params", f"target_{name}_params"):
                if attribute in self._modules:
                    leaves: Any = self._modules[attribute]
                    self.tensors[attribute] = [leaves.get(key) for key in functional.keys]
            several = name == "qvalue_network" and self.num_qvalue_nets > 1
            if not several and not self._has_mirrors(name):
                functional.swap(self.tensors[f"{name}_params"])
        self.is_ensemble = self._critics_are_ensemble()
        self.joins_states = can_be_ensemble(getattr(self.value_network, "module", None))
        self._tie()

    def _critics_are_ensemble(self) -> bool:
        """Return whether one call of the critic's module with stacked parameters is K critics."""
        module = getattr(self.qvalue_network, "module", None)
        if self.num_qvalue_nets == 1 or not can_be_ensemble(module):
            return False
        functional = self.functional_networks["qvalue_network"]
        leaves = zip(functional.is_buffer, self.tensors[CRITICS], strict=True)
        return all(bool((x == x[:1]).all()) for is_buffer, x in leaves if is_buffer)

    def _tie(self) -> None:
        """Let tensors that are one share their storage again, after a copy, a cast or a load."""
        for entry, owner in self.owners.items():
            mirror = self._entry(entry)
            mirror.data = self._entry(owner).data.expand(mirror.shape)
        for key in self._tied_buffers:
            target: Any = self._modules[TARGET_CRITICS].get(key)
            target.data = self.qvalue_network_params.get(key).data
        if self.averaged_actor is not None:
            held = self.actor_network_params.data.copy()
            for key, average in self._modules[AVERAGE].items(True, True):
                held.set(key, nn.Parameter(average.data, requires_grad=False))
            held.to_module(self.averaged_actor)

    def _untie(self) -> None:
        """Give mirrors storage of their own, so that every entry can be written to."""
        for mirror in map(self._entry, self.owners):
            mirror.data = mirror.data.clone(memory_format=torch.contiguous_format)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> ParameterLoss:
        super()._apply(fn, *args, **kwargs)
        averaged: list[Any] = [] if self.averaged_actor is None else [self.averaged_actor]
        for network in (*(getattr(self, name) for name in self.network_names), *averaged):
            network._apply(fn)  # tensors and dtypes that are neither parameters nor buffers
            for module in network.modules():
                keywords = getattr(module, "distribution_kwargs", None)
                if isinstance(keywords, dict):
                    moved = {k: fn(v) for k, v in keywords.items() if isinstance(v, Tensor)}
                    keywords.update(moved)
        self.sync_modules()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v for k, v in self.__dict__.items() if k not in ("functional_networks", "tensors")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.sync_modules()

    def reset_parameters_recursive(self) -> None:
        """Initialise every network again, targets too, as TorchRL's losses do."""
        self._untie()
        super().reset_parameters_recursive()
        online, averages = self.average_pairs()
        for parameter, average in zip(online, averages, strict=True):
            average.data.copy_(parameter.data)
        self.sync_modules()

    def _before_load(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        self._untie()
        if self.num_qvalue_nets > 1:
            return
        for key, current in self.state_dict().items():  # older TorchRL losses stacked one critic
            stored = state_dict.get(prefix + key)
            is_critic = key.removeprefix("target_").startswith(f"{CRITICS}.")
            if is_critic and stored is not None and stored.shape == (1, *current.shape):
                state_dict[prefix + key] = stored.squeeze(0)

    def _after_load(self, _: Any) -> None:
        self.sync_modules()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, **kwargs: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters to optimise, each once: mirrors of a shared trunk are left out."""
        mirrors = {id(self._entry(entry)) for entry in self.owners}
        for name, parameter in super().named_parameters(prefix, recurse, **kwargs):
            if id(parameter) not in mirrors:
                yield name, parameter


def find_owners(
    actor: nn.Module, value: nn.Module, critics: Sequence[nn.Module], *, separate: bool
) -> dict[Entry, Entry]:
    """The owner of each mirror in these networks; the actor owns first, then V.

    Without ``separate`` parameters of V are its own, and those of a single critic too.
    """
    owners: dict[Entry, Entry] = {}
    if separate:
        owners |= _shared_entries("value_network", [value], {"actor_network": actor})
    if separate or len(critics) > 1:
        networks = {"actor_network": actor, "value_network": value}
        owners |= _shared_entries("qvalue_network", critics, networks)
    return owners


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
