"""The networks of a TorchRL loss evaluated on a batch, and the targets of its critics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor, distributions, nn
from torchrl.modules import GRUModule, LSTMModule
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
from iql_torchrl.losses.parameters import ENCODER, NETWORKS, TARGET_CRITICS, ParameterLoss
from iql_torchrl.networks import CHUNK_MASK


class NetworkLoss(ParameterLoss):
    """Evaluates actor, critics, V and encoder on a batch; abstract.

    A network is evaluated by calling it while it holds the tensors that are asked for
    (:class:`~iql_torchrl.losses.parameters.FunctionalNetwork`).
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

    diagnostics: bool
    optional_keys: set[NestedKey]

    def __init__(self, *networks: Any, priority_key: str | None, **options: Any) -> None:
        super().__init__(*networks, **options)
        self._set_deprecated_ctor_keys(priority=priority_key)
        # in the instance too, where a compiled program notices another value
        for name in ("_loss_mask_key", "deterministic_sampling_mode", "use_prioritized_weights"):
            setattr(self, name, getattr(self, name))
        self.optional_keys = _recurrent_keys(*(getattr(self, name) for name in NETWORKS))
        self._name_inputs()

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
        functional, key = (
            self.functional_networks["qvalue_network"],
            self.tensor_keys.state_action_value,
        )
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
