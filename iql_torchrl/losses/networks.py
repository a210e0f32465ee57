"""The networks of a TorchRL loss: an actor, K critics with targets, V and an encoder."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams
from tensordict.utils import unravel_key
from torch import Tensor, distributions, nn
from torchrl.modules import GRUModule, LSTMModule
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import TD0Estimator, ValueEstimatorBase

from iql_torchrl import functional as F
from iql_torchrl.losses.batch import (
    Batch,
    check_action,
    check_same_shape,
    output_of,
    per_sample,
)
from iql_torchrl.losses.critics import Critics, initialise_critics, list_critics
from iql_torchrl.losses.encoder import SharedEncoder
from iql_torchrl.losses.objective import checked_number
from iql_torchrl.losses.parameters import Entry, FunctionalNetwork, SharedParameters
from iql_torchrl.networks import CHUNK_MASK
from iql_torchrl.networks.perceptrons import can_be_ensemble

# Attributes of a loss; their parameters are ``<name>_params`` and ``target_<name>_params``.
NETWORKS = ("actor_network", "qvalue_network", "value_network")
ENCODER = "encoder_network"
CRITICS, TARGET_CRITICS = "qvalue_network_params", "target_qvalue_network_params"  # TorchRL's names
AVERAGE = "average_actor_network_params"  # not target_..., which TorchRL's updaters would move


class NetworkLoss(LossModule):
    """Holds and evaluates actor, critics, V and encoder; abstract.

    Parameters are where TorchRL's losses have them: ``<name>_params``, those of K critics stacked,
    ``(K, ...)``, and ``target_<name>_params``. Buffers (statistics of normalisation layers) of target
    critics are those of the critics. A network is evaluated by calling it while it holds the tensors
    that are asked for (:class:`~iql_torchrl.losses.parameters.FunctionalNetwork`).
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
    encoder_network_params: TensorDictParams
    target_encoder_network_params: TensorDictParams

    diagnostics: bool
    optional_keys: set[NestedKey]
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
        priority_key: str | None,
    ) -> None:
        super().__init__()
        self._set_deprecated_ctor_keys(priority=priority_key)
        # in the instance too, where a compiled program notices another value
        for name in ("_loss_mask_key", "deterministic_sampling_mode", "use_prioritized_weights"):
            setattr(self, name, getattr(self, name))
        self.actor_ema, self.averaged_actor = 0.0, None
        self.encoder = SharedEncoder.of(encoder_network)
        self.encoder_network = None
        self.num_qvalue_nets = num_qvalue_nets
        self.delay_qvalue = True
        self.deactivate_vmap = deactivate_vmap
        self.separate_losses = separate_losses
        self.shared = SharedParameters({}, separate_losses, self._entry)
        self._tied_buffers: list[NestedKey] = []  # of the critics and their targets
        self._convert(actor_network, qvalue_network, value_network)
        self.optional_keys = _recurrent_keys(*(getattr(self, name) for name in NETWORKS))
        self._name_inputs()
        self.register_load_state_dict_pre_hook(NetworkLoss._before_load)
        self.register_load_state_dict_post_hook(NetworkLoss._after_load)

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
        owners = SharedParameters.find(actor, value, modules, separate=separate)
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
        self.shared = SharedParameters(owners, separate, self._entry)
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
                elif (name, key) in self.shared.owners:
                    params.set(key, nn.Parameter(leaf.detach()))
                elif not isinstance(leaf, nn.Parameter):
                    warnings.warn(
                        f"the listed critics share {key!r} of {name} with each other and with no "
                        "other network; each now trains a copy of its own.",
                        UserWarning,
                        stacklevel=6,
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

    @property
    def average(self) -> Any:
        """The average of the policy's parameters, by their names; None without."""
        return self._modules.get(AVERAGE)

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
        if name not in self.shared.networks():
            return tensors
        return self.shared.replace(name, self.functional_networks[name].keys, tensors)

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
            if not several and name not in self.shared.networks():
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
        self.shared.tie()
        for key in self._tied_buffers:
            target: Any = self._modules[TARGET_CRITICS].get(key)
            target.data = self.qvalue_network_params.get(key).data
        if self.averaged_actor is not None:
            held = self.actor_network_params.data.copy()
            for key, average in self._modules[AVERAGE].items(True, True):
                held.set(key, nn.Parameter(average.data, requires_grad=False))
            held.to_module(self.averaged_actor)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> NetworkLoss:
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
        held = ("functional_networks", "tensors", "shared")
        state = {k: v for k, v in self.__dict__.items() if k not in held}
        return state | {"_owners": self.shared.owners}

    def __setstate__(self, state: dict[str, Any]) -> None:
        owners = state.pop("_owners")
        super().__setstate__(state)
        self.shared = SharedParameters(owners, self.separate_losses, self._entry)
        self.sync_modules()

    def reset_parameters_recursive(self) -> None:
        """Initialise every network again, targets too, as TorchRL's losses do."""
        self.shared.untie()
        super().reset_parameters_recursive()
        online, averages = self.average_pairs()
        for parameter, average in zip(online, averages, strict=True):
            average.data.copy_(parameter.data)
        self.sync_modules()

    def _before_load(self, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        self.shared.untie()
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
        mirrors = {id(mirror) for mirror in self.shared.mirrors()}
        for name, parameter in super().named_parameters(prefix, recurse, **kwargs):
            if id(parameter) not in mirrors:
                yield name, parameter

    # -- networks evaluated on a batch ----------------------------------------------------------------

    def inputs(self, batch: Batch, source: str = "") -> TensorDictBase:
        """What networks read: the batch's entries, and the encoder's features if it has one.

        ``source``: ``"online"`` or ``"target"`` for critics; empty for the policy and V. Target critics
        get features of the target encoder. A gradient reaches the encoder through the critics, and with
        ``gradient="all"`` of the encoder through the policy and V.
        """
        if self.encoder is None:
            return batch.data
        target = source == "target"
        features = self._features(batch, target)
        learns = source == "online" or (not source and self.encoder.gradient == "all")
        return batch.data.copy().update(features if target or learns else features.detach())

    def _features(self, batch: Batch, target: bool) -> TensorDictBase:
        """What the encoder or its target writes for the batch, which keeps it."""
        encoder: Any = self.encoder
        gradient = torch.is_grad_enabled() and not target
        features, has_gradient = batch.features.get(target, (None, False))
        if features is not None and (has_gradient or not gradient):
            return features
        data = encoder.read(batch)
        with torch.set_grad_enabled(gradient):
            if ENCODER in self.functional_networks:
                tensors = self.tensors[f"{'target_' * target}{ENCODER}_params"]
                with self.functional_networks[ENCODER].holding(tensors) as network:
                    written = network(data)
            else:
                written = encoder.network(data)
        features = written.select(*encoder.network.out_keys)
        batch.features[target] = features, gradient
        return features

    def actor(self) -> Any:
        """A context that gives the policy with its parameters."""
        return self.functional_networks["actor_network"].holding(
            self.online_tensors("actor_network")
        )

    def distribution(self, batch: Batch) -> Any:
        """The policy's distribution in the states of the batch."""
        with self.actor() as actor:
            return actor.get_dist(self.inputs(batch).select(*actor.in_keys, strict=False))

    def policy_action(self, batch: Batch) -> Tensor:
        """The action that the policy writes, ``(*B, A)``."""
        with self.actor() as actor:
            inputs = self.inputs(batch).select(*actor.in_keys, strict=False)
            action: Tensor = actor(inputs).get(self.tensor_keys.action)
            return action

    def policy_output(self, batch: Batch) -> tuple[Tensor, distributions.Distribution | None]:
        """The policy's action without randomness, ``(*B, A)``, and its distribution if it has one."""
        if not hasattr(self.actor_network, "get_dist"):
            return self.policy_action(batch), None
        dist = self.distribution(batch)
        action = getattr(dist, "deterministic_sample", None)
        return dist.mean if action is None else torch.as_tensor(action), dist

    def log_prob(self, batch: Batch, dist: distributions.Distribution | None = None) -> Tensor:
        """Log-probability of the dataset action, ``(*B,)``; of a chunk that of its valid actions."""
        dist = self.distribution(batch) if dist is None else dist
        action, valid = self.dataset_action(batch, dist), self.valid_action_mask(batch)
        if valid is None:
            log_prob = dist.log_prob(action)
        elif hasattr(dist, "masked_log_prob"):
            log_prob = dist.masked_log_prob(action, valid)
        else:
            raise TypeError(
                f"the policy's distribution is a {type(dist).__name__}, which cannot leave out the "
                "padding of a chunk; it needs a method masked_log_prob(action, mask), as those of "
                "iql_torchrl.policies have. Or give actor_objective= a function."
            )
        return per_sample(log_prob, batch.data.batch_size, "log_prob")

    def dataset_action(self, batch: Batch, dist: distributions.Distribution) -> Tensor:
        """The dataset action in the form that ``dist.log_prob`` takes."""
        action, shape = batch.data.get(self.tensor_keys.action), dist.batch_shape + dist.event_shape
        # A class of the user's may leave its shapes empty; a Categorical does not.
        if len(shape) >= action.ndim or isinstance(dist, distributions.Categorical):
            check_action(self.tensor_keys.action, action, shape)
        return action

    def state_value(self, batch: Batch) -> Tensor:
        """``V(s)``, shape ``(*B,)``, with gradient."""
        return self._value_of(self.inputs(batch).select(*self.value_network.in_keys, strict=False))

    def _value_of(self, inputs: TensorDictBase) -> Tensor:
        key = self.tensor_keys.value
        tensors = self.online_tensors("value_network")
        with self.functional_networks["value_network"].holding(tensors) as network:
            output = output_of(network(inputs), key, "value_network")
        return per_sample(output, inputs.batch_size, key)

    def state_and_next_value(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """``V(s)`` and ``V(s')``, ``(*B,)``; None for ``V(s')`` unless targets are TD(0)'s.

        A fully connected network of this package is called once, on the transitions of both.
        """
        if not self.bootstraps_once():
            return self.state_value(batch), None
        size = batch.data.batch_size
        if not size or not self.joins_states:
            return self.state_value(batch), self.state_value(batch.next)
        here, there = self.inputs(batch), self.inputs(batch.next)
        both = TensorDict({}, batch_size=(2 * size[0], *size[1:]))
        for key in self.value_network.in_keys:
            both.set(key, torch.cat([here.get(key), there.get(key)]))
        value, next_value = self._value_of(both).split(size[0])
        return value, next_value

    def qvalues(self, batch: Batch, source: str = "online", action: Tensor | None = None) -> Tensor:
        """``Q_k(s, a)`` of K critics, ``(K, *B)``.

        ``source``: ``"online"`` critics, with gradient, or ``"target"`` critics, without. ``action``
        ``(*B, A)`` takes the place of the dataset action; the critics' parameters then get no gradient.
        """
        by_policy = action is not None  # whose loss trains an encoder only with gradient="all"
        data = self.inputs(batch, "" if by_policy and source == "online" else source)
        if by_policy:
            data = data.copy().set(self.tensor_keys.action, action)
        tensors = self.online_tensors("qvalue_network")
        if source == "target":
            tensors = self.tensors[TARGET_CRITICS]
        if source == "target" or by_policy:
            # a forward pass in training mode may write to buffers: to copies
            pairs = zip(tensors, self.functional_networks["qvalue_network"].is_buffer, strict=True)
            tensors = [x.clone() if is_buffer else x.detach() for x, is_buffer in pairs]
        outputs = self._critics(data, tensors)
        key = self.tensor_keys.state_action_value
        return per_sample(self.pick(outputs, batch), batch.data.batch_size, key, leading=1)

    def _critics(self, data: TensorDictBase, tensors: list[Any]) -> Tensor:
        """What K critics write, ``(K, *B, n)``, with these tensors, which are stacked for K > 1."""
        functional = self.functional_networks["qvalue_network"]
        key = self.tensor_keys.state_action_value
        inputs = data.select(*self.qvalue_network.in_keys, strict=False)

        def evaluate(inputs: TensorDictBase, tensors: list[Any]) -> Tensor:
            with functional.holding(tensors) as network:
                return output_of(network(inputs), key, "qvalue_network")

        if self.num_qvalue_nets == 1:
            return evaluate(inputs, tensors).unsqueeze(0)
        if self.deactivate_vmap:
            each = (evaluate(inputs.copy(), list(one)) for one in zip(*tensors, strict=True))
            return torch.stack(list(each))
        if self.is_ensemble:
            pairs = zip(tensors, functional.is_buffer, strict=True)
            shared = [x[0] if is_buffer else x for x, is_buffer in pairs]
            # the output has another dimension first
            return evaluate(TensorDict(dict(inputs.items()), batch_size=[]), shared)
        return torch.vmap(evaluate, (None, 0), randomness=self.vmap_randomness)(inputs, tensors)

    def pick(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The critics' outputs of the dataset action."""
        return outputs

    def valid_action_mask(self, batch: Batch) -> Tensor | None:
        """Bool ``(*B, h * A)``: entries of a chunk that belong to actions of the episode; None: all."""
        mask: Tensor | None = batch.data.get(CHUNK_MASK, None)
        if mask is None:
            return None
        size = batch.data.get(self.tensor_keys.action).shape[-1] // mask.shape[-1]
        return mask.unsqueeze(-1).expand(*mask.shape, size).flatten(-2)

    # -- targets of the critics -----------------------------------------------------------------------

    def bootstraps_once(self) -> bool:
        """Return whether targets take ``V(s')`` of the batch and nothing else from V."""
        estimator = self.value_estimator
        return type(estimator) is TD0Estimator and not estimator.average_rewards

    def td_target(self, batch: Batch, next_value: Tensor | None = None) -> Tensor:
        """Regression target of the critics, shape ``(*B,)``, without gradient.

        ``r + gamma V(s')``, bootstrapped past truncation and not past termination; with
        ``steps_to_next_obs`` in the batch (n-step rewards) the discount is ``gamma**n``. With a
        ``chunk_mask`` it is ``sum_i gamma**i r_i + gamma**k V(s_k)`` of the k valid actions.
        ``next_value``: V(s') where it is known.
        """
        estimator = self.value_estimator
        with torch.no_grad():
            if not self.bootstraps_once():
                return self._estimated_target(batch)
            keys = estimator.tensor_keys
            shape = batch.data.batch_size
            mask = batch.data.get(CHUNK_MASK, None)
            reward, terminated = (
                batch.data.get(("next", k)) for k in (keys.reward, keys.terminated)
            )
            reward = per_sample(reward, shape if mask is None else mask.shape, keys.reward)
            terminated = per_sample(terminated, shape, keys.terminated)
            gamma: Tensor = estimator.gamma
            gamma = per_sample(gamma, shape, "gamma") if gamma.ndim else gamma
            steps = batch.data.get(keys.steps_to_next_obs, None)
            if mask is not None:
                powers = gamma.unsqueeze(-1) ** torch.arange(mask.shape[-1], device=mask.device)
                reward = (reward.masked_fill(~mask, 0.0) * powers).sum(-1)
                gamma = gamma ** mask.sum(-1)
            elif steps is not None:
                gamma = gamma ** per_sample(steps, shape, keys.steps_to_next_obs)
            next_value = self.state_value(batch.next) if next_value is None else next_value
            check_same_shape(
                "Where V gives a value for each agent, a team's reward and 'terminated' are stored for "
                "each agent too: entry.expand(*B, agents). Else check V's last layer.",
                reward=reward,
                terminated=terminated,
                next_state_value=next_value,
            )
            return F.td_target(reward, next_value, terminated, gamma=gamma)

    def _estimated_target(self, batch: Batch) -> Tensor:
        """The target of an estimator that reads more of V than ``V(s')``."""
        estimator = self.value_estimator
        if batch.data.get(CHUNK_MASK, None) is not None:
            raise NotImplementedError(
                f"the batch has chunks of actions and the value estimator is a "
                f"{type(estimator).__name__}; targets of chunks are made by TD(0) alone, "
                "without average rewards: call loss.make_value_estimator(gamma=...)."
            )
        data = self.inputs(batch).copy().set("next", self.inputs(batch.next))
        target = estimator.value_estimate(data, target_params=self.target_value_network_params)
        return per_sample(target, batch.data.batch_size, "value_target")

    # -- values and keys ---------------------------------------------------------------------------

    def make_value_estimator(
        self, value_type: ValueEstimators | ValueEstimatorBase | None = None, **hyperparams: Any
    ) -> NetworkLoss:
        """Choose how the critics' targets are made: TD(0) (default), TD(1), TD(lambda), or your own.

        ``loss.make_value_estimator(gamma=0.97)`` sets the discount (TorchRL's default is 0.99). Its
        numbers become tensors on the device of the loss's parameters, unless ``device`` is given,
        and move with ``loss.to(device)``.
        Raises ``NotImplementedError`` on an estimator that needs on-policy data, ``TypeError`` on
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

    def _name_inputs(self) -> None:
        """Keys that :meth:`forward` reads; ``("next", ...)`` ones only for V."""
        keys = self.tensor_keys
        of_value = self.observed_keys(self.value_network.in_keys)
        self.in_keys = list(
            dict.fromkeys(
                [
                    keys.action,
                    *(("next", key) for key in (keys.reward, keys.done, keys.terminated)),
                    *self.observed_keys(self.actor_network.in_keys),
                    *self.observed_keys(self.qvalue_network.in_keys),
                    *of_value,
                    *(("next", key) for key in of_value),
                ]
            )
        )


def _recurrent_keys(*networks: nn.Module) -> set[NestedKey]:
    """Keys that recurrent modules start from when a batch holds them and do without otherwise."""
    cells = [m for net in networks for m in net.modules() if isinstance(m, LSTMModule | GRUModule)]
    states = {unravel_key(key) for cell in cells for key in cell.in_keys[1:] if key != "is_init"}
    return states | {unravel_key(("next", key)) for key in states}
