"""A TorchRL loss that holds an actor, K critics with targets, V and an encoder."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from iql_torchrl.losses.checks import check_encoder
from iql_torchrl.losses.critics import Critics, initialise_critics, list_critics
from iql_torchrl.networks import CHUNK_MASK
from iql_torchrl.networks.evaluation import Networks
from iql_torchrl.private_apis import children_of, plain_entries

# Attributes of a loss; their parameters are ``<name>_params`` and ``target_<name>_params``.
NETWORKS = ("actor_network", "qvalue_network", "value_network")
ENCODER = "encoder_network"
# What a TorchRL loss calls the parameters of its critics; the last are this package's: the live
# ones, of which an evaluation differentiates the inputs alone.
LIVE_CRITICS, TARGET_CRITICS = "qvalue_network_params", "target_qvalue_network_params"
DETACHED_CRITICS = "detached_qvalue_network_params"
AVERAGE = "average_actor_network_params"  # not target_..., which TorchRL's updaters would move


Entry = tuple[str, NestedKey]  # of a network: its name, and the key in its parameters


class NetworkLoss(LossModule):
    """Holds actor, critics, V and encoder as TorchRL's losses do; abstract.

    A trunk used by the actor and by the critics has one owner. Critics hold a mirror of it: a
    parameter with the owner's storage that belongs to no optimiser, but that TorchRL's updaters
    follow, as they follow any source that requires a gradient; so the targets average the trunk. In a
    forward pass the critics read the owner itself, detached with ``separate_losses=True`` (the
    owner's loss alone trains it). Buffers (statistics of normalisation layers) of target critics are
    tied to the live ones.

    With ``members`` parameters are those of P runs, ``(P, ...)`` (``population.stack_losses``).
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that :meth:`set_keys` can rename; those of TorchRL's IQLLoss and ``priority_weight``."""

        value: NestedKey = "state_value"
        action: NestedKey = "action"
        log_prob: NestedKey = "_log_prob"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS = (
        ValueEstimators.TD0,
        ValueEstimators.TD1,
        ValueEstimators.TDLambda,
    )

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
    encoder_gradient: str
    encoder_network_params: TensorDictParams
    target_encoder_network_params: TensorDictParams

    members: int | None = None  # number of runs of a population
    discount: Tensor  # of each run, in a population
    optional_keys: set[NestedKey]
    direct: Networks | None = None  # inside evaluated_directly, and in a population
    kept_networks: Networks | None = None

    def __init__(
        self,
        actor_network: nn.Module,
        qvalue_network: Critics,
        value_network: TensorDictModule,
        encoder_network: TensorDictModule | None,
        *,
        num_qvalue_nets: int,
        separate_losses: bool,
        deactivate_vmap: bool,
        priority_key: str | None,
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        self._set_deprecated_ctor_keys(priority=priority_key)
        # in the instance too, where a compiled program notices another value
        for name in ("_loss_mask_key", "deterministic_sampling_mode", "use_prioritized_weights"):
            setattr(self, name, getattr(self, name))
        self._actor_ema, self.random_shift = settings.pop("actor_ema"), settings["random_shift"]
        self.averaged_actor: Any = None
        self.encoder_network = encoder_network
        self.num_qvalue_nets = num_qvalue_nets
        self.delay_qvalue = True
        self.deactivate_vmap = deactivate_vmap
        self._detach_trunk = separate_losses
        self._mirrors: dict[Entry, Entry] = {}  # and their owners
        self._tied_buffers: list[NestedKey] = []  # of the critics and their targets
        self._convert(actor_network, qvalue_network, value_network)
        for name, value in settings.items():  # parameters of a user's function follow the networks'
            setattr(self, name, value)
        self._name_inputs()
        self.register_load_state_dict_pre_hook(NetworkLoss._before_load)
        self.register_load_state_dict_post_hook(NetworkLoss._after_load)

    @property
    def actor_ema(self) -> float:
        """Decay of the policy's averaged weights; chosen when the loss is built."""
        return self._actor_ema

    @property
    def network_names(self) -> tuple[str, ...]:
        """:data:`NETWORKS`, and the encoder's name where the loss has one."""
        return NETWORKS if self.encoder_network is None else (*NETWORKS, ENCODER)

    # -- from the user's networks to parameters and targets ------------------------------------------

    def _convert(self, actor: nn.Module, critics: Critics, value: nn.Module) -> None:
        """Register the networks' parameters and the critics' targets, as TorchRL does."""
        separate, count = self._detach_trunk, self.num_qvalue_nets
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
        encoder = self.encoder_network
        check_encoder(encoder, networks, self.random_shift)
        if encoder is not None:
            del self.encoder_network
            self.convert_to_functional(encoder, ENCODER, create_target_params=True)
        mirrors: dict[Entry, Entry] = {}
        owners = {"actor_network": actor, "value_network": value}
        if separate:
            mirrors |= _shared_entries("value_network", [value], {"actor_network": actor})
        if separate or len(modules) > 1:
            mirrors |= _shared_entries("qvalue_network", modules, owners)
        of_actor = list(actor.parameters())
        self.convert_to_functional(actor, "actor_network")
        if self.actor_ema:
            self._add_average()
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
            initialise_critics(
                self.qvalue_network_params, children_of(self)[TARGET_CRITICS], listed
            )
        self._mirrors = mirrors
        self._install_mirrors("value_network", [value])
        self._install_mirrors("qvalue_network", modules)
        self._tie()
        self.optional_keys = _recurrent_keys(actor, value, *modules)

    def _install_mirrors(self, name: str, modules: Sequence[nn.Module]) -> None:
        """Put mirrors in place, give critics' entries storage of their own, and tie targets."""
        buffers = {tuple(key.split(".")) for m in modules for key, _ in m.named_buffers()}
        params: TensorDictParams = getattr(self, f"{name}_params")
        with params.unlock_():
            for key, leaf in list(params.items(True, True)):
                if (key if isinstance(key, tuple) else (key,)) in buffers:
                    leaf.data = leaf.data.contiguous()
                    if name == "qvalue_network":
                        self._tied_buffers.append(key)
                elif (name, key) in self._mirrors:
                    params.set(key, nn.Parameter(leaf.detach()))
                elif not isinstance(leaf, nn.Parameter):
                    warnings.warn(
                        f"the listed critics share {key!r} of {name} with each other and with no "
                        "other network; each now trains a copy of its own.",
                        UserWarning,
                        stacklevel=7,
                    )
                    params.set(key, nn.Parameter(leaf.detach().clone()))

    def _add_average(self) -> None:
        """Add a copy of the actor's parameters, and ``averaged_actor``, which acts with it.

        Parameters are averaged; buffers are the live ones. The average starts at the weights as they
        are. The copy is part of the loss's state, and not of its parameters.
        """
        params = self.actor_network_params
        trained = [key for key, leaf in params.items(True, True) if isinstance(leaf, nn.Parameter)]
        average = params.data.select(*trained).clone()
        setattr(self, AVERAGE, TensorDictParams(average, no_convert=True))
        actor = copy.deepcopy(self.actor_network).requires_grad_(False)
        self.__dict__["averaged_actor"] = actor  # no submodule, as the networks

    def average_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The actor's parameters, and in the same order their averages; empty without averages."""
        return self._pairs({"actor_network_params": AVERAGE})

    def target_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Live parameters, and in the same order those of the targets that average them.

        Buffers are left out: those of the target critics are the live ones.
        """
        return self._pairs({f"{n}_params": f"target_{n}_params" for n in self.network_names})

    def _pairs(self, followers: Mapping[str, str]) -> tuple[list[Tensor], list[Tensor]]:
        tables = children_of(self)
        pairs = [
            (leaf, tables[follower].get(key))
            for name, follower in followers.items()
            if follower in tables
            for key, leaf in getattr(self, name).items(True, True)
            if isinstance(leaf, nn.Parameter)
        ]
        return [live for live, _ in pairs], [target for _, target in pairs]

    # -- tensors that are one: shared trunks, targets' buffers, averages, the user's own networks -----

    def _tie(self) -> None:
        """Let tensors that are one share their storage again, after a copy, a cast or a load."""
        for entry, owner in self._mirrors.items():
            mirror = self._tensor(entry)
            mirror.data = self._tensor(owner).data.expand(mirror.shape)
        for key in self._tied_buffers:
            target = children_of(self)[TARGET_CRITICS].get(key)
            target.data = self.qvalue_network_params.get(key).data
        if self.averaged_actor is not None:
            held = self.actor_network_params.data.copy()
            for key, average in children_of(self)[AVERAGE].items(True, True):
                held.set(key, nn.Parameter(average.data, requires_grad=False))
            held.to_module(self.averaged_actor)

    def _tensor(self, entry: Entry) -> Any:
        name, key = entry
        return getattr(self, f"{name}_params").get(key)

    def put_into_networks(self) -> None:
        """Let the user's own networks hold the tensors of this loss, which may be others now.

        Of P runs the networks hold the parameters of all, and the buffers, which are the same for
        all, of the first.
        """
        mirroring = {network for network, _ in self._mirrors}
        for name in self.network_names:
            params = children_of(self).get(f"{name}_params")
            several = name == "qvalue_network" and (self.num_qvalue_nets > 1 or self.members)
            if several or name in mirroring or params is None:
                continue
            if params.batch_dims:
                own = {
                    key: leaf if isinstance(leaf, nn.Parameter) else leaf.data[0]
                    for key, leaf in params.items(True, True)
                }
                params = TensorDict(own)
            params.to_module(getattr(self, name))
        self._tie()
        self.direct = self.kept_networks = None  # which hold tensors

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> NetworkLoss:
        super()._apply(fn, *args, **kwargs)
        averaged = [] if self.averaged_actor is None else [self.averaged_actor]
        for network in (*(getattr(self, name) for name in self.network_names), *averaged):
            network._apply(fn)  # tensors and dtypes that are neither parameters nor buffers
            for module in network.modules():
                keywords = getattr(module, "distribution_kwargs", None)
                if isinstance(keywords, dict):
                    moved = {k: fn(v) for k, v in keywords.items() if isinstance(v, Tensor)}
                    keywords.update(moved)
        self.put_into_networks()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("direct", "kept_networks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.put_into_networks()

    def reset_parameters_recursive(self) -> None:
        """Initialise every network again, targets too, as TorchRL's losses do."""
        if self.members is not None:
            raise NotImplementedError(
                "a population's weights are drawn run by run: reset the losses it is made from, and "
                "build it again."
            )
        self._untie()
        super().reset_parameters_recursive()
        live, averages = self.average_pairs()
        for parameter, average in zip(live, averages, strict=True):
            average.data.copy_(parameter.data)
        self.put_into_networks()

    def _untie(self) -> None:
        """Give mirrors storage of their own, so that every entry can be written to."""
        for mirror in map(self._tensor, self._mirrors):
            mirror.data = mirror.data.clone(memory_format=torch.contiguous_format)

    def _before_load(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        self._untie()
        if self.num_qvalue_nets > 1:
            return
        for key, current in self.state_dict().items():  # older TorchRL losses stacked one critic
            stored = state_dict.get(prefix + key)
            is_critic = key.removeprefix("target_").startswith(f"{LIVE_CRITICS}.")
            if is_critic and stored is not None and stored.shape == (1, *current.shape):
                state_dict[prefix + key] = stored.squeeze(0)

    def _after_load(self, _: Any) -> None:
        self.put_into_networks()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, **kwargs: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters to optimise, each once: mirrors of a shared trunk are left out."""
        mirrors = {id(self._tensor(entry)) for entry in self._mirrors}
        for name, parameter in super().named_parameters(prefix, recurse, **kwargs):
            if id(parameter) not in mirrors:
                yield name, parameter

    # -- values and keys ---------------------------------------------------------------------------

    def make_value_estimator(
        self, value_type: ValueEstimators | ValueEstimatorBase | None = None, **hyperparams: Any
    ) -> NetworkLoss:
        """Choose how the critics' targets are made: TD(0) (default), TD(1), TD(lambda), or your own.

        ``loss.make_value_estimator(gamma=0.97)`` sets the discount (TorchRL's default is 0.99). Its
        numbers become tensors on the device of the loss's parameters, unless ``device`` is given,
        and move with ``loss.to(device)``.
        Raises ``NotImplementedError`` on an estimator that needs an on-policy log, ``TypeError`` on
        another kind of ``value_type``, ``ValueError`` on a number ``gamma`` outside [0, 1].
        """
        gamma = hyperparams.get("gamma")
        if isinstance(gamma, str) or (isinstance(gamma, Real) and not 0 <= float(gamma) <= 1):
            raise ValueError(f"gamma is {gamma!r}; a discount per step lies in [0, 1].")
        value_type = value_type or self.default_value_estimator
        if isinstance(value_type, ValueEstimatorBase | type):
            return super().make_value_estimator(value_type, **hyperparams)
        if not isinstance(value_type, ValueEstimators):
            raise TypeError(
                f"value_type is {value_type!r}; pass one of torchrl.objectives.ValueEstimators, "
                "such as ValueEstimators.TD0, or a value estimator."
            )
        if hyperparams.get("device") is None:
            hyperparams["device"] = next(self.parameters()).device
        keys = self.tensor_keys
        names = ("value", "reward", "done", "terminated")
        dispatch_value_estimator(
            self,
            value_type,
            supported=self.SUPPORTED_VALUE_ESTIMATORS,
            tensor_keys={"value_target": "value_target"} | {n: getattr(keys, n) for n in names},
            **hyperparams,
        )
        return self

    def observed_keys(self, keys: Sequence[NestedKey]) -> list[NestedKey]:
        """The entries of a batch behind ``keys``, which networks read: for features what gives them."""
        if self.encoder_network is None:
            return list(keys)
        written = {unravel_key(key) for key in self.encoder_network.out_keys}
        rest = [key for key in keys if unravel_key(key) not in written]
        return rest if len(rest) == len(keys) else [*rest, *self.encoder_network.in_keys]

    def set_keys(self, **kwargs: Any) -> None:
        """Rename entries of the batch, as TorchRL's losses do; ``ValueError`` on an unknown name."""
        known = [field.name for field in fields(self._AcceptedKeys)]
        if unknown := [name for name in kwargs if name not in known]:
            raise ValueError(
                f"{unknown[0]} is not an accepted tensordict key of {type(self).__name__}; choose "
                f"from {', '.join(known)}."
            )
        super().set_keys(**kwargs)
        self._name_inputs()
        self.direct = self.kept_networks = None  # which depend on keys

    def _name_inputs(self) -> None:
        """Keys that :meth:`forward` reads; ``("next", ...)`` ones only for V."""
        keys = self.tensor_keys
        of_value = self.observed_keys(self.value_network.in_keys)
        self.in_keys = list(
            dict.fromkeys(
                [
                    keys.action,
                    *(("next", key) for key in (keys.reward, keys.done, keys.terminated)),
                    *((CHUNK_MASK,) if self.action_chunk > 1 else ()),
                    *self.observed_keys(self.actor_network.in_keys),
                    *self.observed_keys(self.qvalue_network.in_keys),
                    *of_value,
                    *(("next", key) for key in of_value),
                ]
            )
        )


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


def unlocked(params: TensorDictBase) -> TensorDictBase:
    """A shallow copy of ``params`` as a plain TensorDict whose entries can be replaced."""
    if isinstance(params, TensorDictParams):
        params = plain_entries(params)
    return params.copy()


def _recurrent_keys(*networks: nn.Module) -> set[NestedKey]:
    """Keys that recurrent modules start from when a batch holds them and do without otherwise."""
    cells = [m for net in networks for m in net.modules() if isinstance(m, LSTMModule | GRUModule)]
    states = {unravel_key(key) for cell in cells for key in cell.in_keys[1:] if key != "is_init"}
    return states | {unravel_key(("next", key)) for key in states}
