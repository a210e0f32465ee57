"""The networks of a loss evaluated, and each quantity of an update that is computed from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.objectives.value import TD0Estimator

from iql_torchrl import functional as F
from iql_torchrl.losses.batch import (
    Batch,
    check_chunks,
    check_same_shape,
    output_of,
    per_sample,
    read_batch,
)
from iql_torchrl.losses.checks import FLOWS
from iql_torchrl.losses.draws import (
    FLOW_DROP,
    FLOW_NOISE,
    FLOW_TIME,
    IMAGE_SHIFT,
    NEXT_IMAGE_SHIFT,
    Draw,
)
from iql_torchrl.losses.parameters import (
    DETACHED_CRITICS,
    ENCODER,
    LIVE_CRITICS,
    TARGET_CRITICS,
    NetworkLoss,
    unlocked,
)
from iql_torchrl.networks import CHUNK_MASK
from iql_torchrl.networks.evaluation import Direct, Networks, Watched, distribution_of
from iql_torchrl.networks.recognition import (
    critics_over,
    is_head_and_distribution,
    network_over,
    writes,
)
from iql_torchrl.policies import FlowPolicy
from iql_torchrl.private_apis import children_of


class EvaluatedLoss(NetworkLoss):
    """Evaluates its networks, and from them each quantity of an update, once; abstract.

    Networks are evaluated as in TorchRL's losses, with parameters put into them
    (:meth:`general_networks`); in updates by ``networks.evaluation``, where their structure allows it
    (:meth:`direct_networks`). In a population every evaluation is direct.
    """

    among: tuple[int, int] | None = None  # (first, count) of runs, in a part of a population

    @property
    def networks(self) -> Networks:
        """What evaluates the networks now."""
        if self.members is not None and self.direct is None:
            self.direct = self.direct_networks()
        return self.direct or self.general_networks()

    @contextmanager
    def evaluated_directly(self) -> Iterator[None]:
        """Evaluate known networks without TensorDict and vmap inside the context, as an update does.

        What was recognised in the networks is kept until the loss is moved, cast, loaded, reset or
        given other keys, or an attribute, a part or the hooks of a network change.
        """
        kept = self.kept_networks
        if kept is None or kept.watched is None or kept.watched.changed():
            self.kept_networks = self.direct_networks()
        before, self.direct = self.direct, self.kept_networks
        try:
            yield
        finally:
            self.direct = before

    def direct_networks(self) -> Networks:
        """Known networks evaluated without TensorDict and vmap; others in the general way."""
        networks = self.general_networks()
        trunks = {network for network, _ in self._mirrors}
        keys, params, per_run = self.tensor_keys, children_of(self), self.members is not None
        if "value_network" not in trunks and writes(self.value_network, keys.value):
            network, of_value = self.value_network, self.value_network_params.get("module")
            value = network_over(network.module, network.in_keys, of_value, per_run=per_run)
            networks = networks._replace(value=value)
        actor: Any = self.actor_network
        if is_head_and_distribution(actor):
            of_head = self.actor_network_params.get(("module", "0", "module"))
            head = network_over(actor[0].module, actor[0].in_keys, of_head, per_run=per_run)
            distribution = partial(distribution_of, actor, head)
            networks = networks._replace(head=head, distribution=distribution)
        elif type(actor) is FlowPolicy:
            of_head = self.actor_network_params.get("head")
            head = network_over(actor.head, (), of_head, per_run=per_run)
            networks = networks._replace(head=head)
        if "qvalue_network" not in trunks and writes(self.qvalue_network, keys.state_action_value):
            critics: dict[str, Any] = {
                name: critics_over(
                    self.qvalue_network,
                    params[TARGET_CRITICS if name == TARGET_CRITICS else LIVE_CRITICS],
                    self.num_qvalue_nets,
                    per_run=per_run,
                    detached=name == DETACHED_CRITICS,
                )
                for name in networks.critics
            }
            if None not in critics.values():
                networks = networks._replace(critics=critics)
        return networks._replace(watched=Watched([getattr(self, n) for n in self.network_names]))

    def general_networks(self) -> Networks:
        """Networks evaluated with parameters put into them, and critics by vmap."""
        _ = self.vmap_randomness  # kept by TorchRL from now on: a guard would notice that later
        names = (LIVE_CRITICS, TARGET_CRITICS, DETACHED_CRITICS)
        critics = {name: partial(self._critics_by_vmap, name) for name in names}
        return Networks(self._value_in_module, critics, self._distribution_in_module)

    def _make_vmap(self) -> None:
        """TorchRL calls this when the randomness changes, which each evaluation reads."""

    def _live(self, name: str) -> TensorDictBase:
        """Parameters of the network ``name`` for a forward pass: mirrors replaced by their owners."""
        params: TensorDictBase = getattr(self, f"{name}_params")
        owners = {key: owner for (network, key), owner in self._mirrors.items() if network == name}
        params = unlocked(params) if owners else params
        for key, owner in owners.items():
            leaf = self._tensor(owner).expand(params.get(key).shape)
            params.set(key, leaf.detach() if self._detach_trunk else leaf)
        return params

    def _value_in_module(self, data: TensorDictBase) -> Tensor:
        """V on the entries of ``data``, ``(*B, 1)``."""
        network = self.value_network
        inputs = data.select(*network.in_keys, strict=False)
        with self._live("value_network").to_module(network, preserve_module_state=False):
            return output_of(network(inputs), self.tensor_keys.value, "value_network")

    def _critics_by_vmap(self, name: str, data: TensorDictBase) -> Tensor:
        """K critics with the parameters ``name``, ``(K, *B, n)``: live, target or detached ones.

        A gradient of the detached ones reaches the inputs and no parameter.
        """
        network, key = self.qvalue_network, self.tensor_keys.state_action_value
        is_target = name == TARGET_CRITICS
        params = children_of(self)[name] if is_target else self._live("qvalue_network")
        if name != LIVE_CRITICS:  # a forward pass in training mode may write to buffers: to copies
            params = unlocked(params)
            for each in self._tied_buffers:
                params.set(each, params.get(each).clone())
        if name == DETACHED_CRITICS:
            params = params.detach()

        def evaluate(inputs: TensorDictBase, params: TensorDictBase) -> TensorDictBase:
            with params.to_module(network, preserve_module_state=False):
                return network(inputs)

        inputs = data.select(*network.in_keys, strict=False)
        if self.num_qvalue_nets == 1:
            return output_of(evaluate(inputs, params), key, "qvalue_network").unsqueeze(0)
        if torch.compiler.is_compiling():  # vmap would lock it again, which warns in a graph
            params = unlocked(params)
        if self.deactivate_vmap:
            each_written = [evaluate(inputs.copy(), critic) for critic in params.unbind(0)]
            return output_of(torch.stack(each_written), key, "qvalue_network")
        mapped = torch.vmap(evaluate, (None, 0), randomness=self.vmap_randomness)
        return output_of(mapped(inputs, params), key, "qvalue_network")

    def inputs(self, batch: Batch, critics: str | None = None) -> TensorDictBase:
        """What networks read: the batch's entries, with the encoder's features where there is one.

        ``critics``: the parameters of the critics that read them; None for the policy and V. Target
        critics get features of the target encoder. A gradient reaches the encoder through the live
        critics, and with ``encoder_gradient="all"`` through the policy and V.
        """
        if self.encoder_network is None:
            return batch.observed
        target = critics == TARGET_CRITICS
        features = self._features(batch, target)
        learns = critics == LIVE_CRITICS or (critics is None and self.encoder_gradient == "all")
        return batch.observed.copy().update(features if target or learns else features.detach())

    def _features(self, batch: Batch, target: bool) -> TensorDictBase:
        """What the encoder or its target writes for the batch, which keeps it."""
        encoder: Any = self.encoder_network
        gradient = torch.is_grad_enabled() and not target
        features, has_gradient = batch.features.get(target, (None, False))
        if features is not None and (has_gradient or not gradient):
            return features
        data = batch.observed.select(*encoder.in_keys, strict=False)
        if self.random_shift:
            images = [data.get(key) for key in encoder.in_keys]
            moved = encoder.module.shifted(images, batch.draws[IMAGE_SHIFT], self.random_shift)
            for key, observation in zip(encoder.in_keys, moved, strict=True):
                data.set(key, observation)
        params = children_of(self).get(f"{'target_' * target}{ENCODER}_params")
        # TorchRL keeps no parameters of an encoder without any, such as OneHots
        module = nullcontext()
        if params is not None:
            module = params.to_module(encoder, preserve_module_state=False)
        with torch.set_grad_enabled(gradient), module:
            features = encoder(data).select(*encoder.out_keys)
        batch.features[target] = features, gradient
        return features

    @contextmanager
    def policy(self) -> Iterator[Any]:
        """The actor with its parameters in it, inside the context."""
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            yield self.actor_network

    def _distribution_in_module(self, data: TensorDictBase) -> Any:
        """The policy's distribution on the entries of ``data``."""
        with self.policy() as actor:
            return actor.get_dist(data.select(*actor.in_keys, strict=False))

    # -- what is read from a batch -----------------------------------------------------------------

    def read(self, tensordict: TensorDictBase, draws: Mapping[str, Tensor] | None = None) -> Batch:
        """The batch as the update reads it: :func:`read_batch`, and :meth:`random_inputs`.

        Random tensors that neither ``tensordict`` nor ``draws`` has are drawn here, from torch's
        default generator: so an update reads its batch outside of the compiled program. P runs of a
        population read ``(P, B)``, or one ``(B,)`` for all.
        """
        weigh = self.use_prioritized_weights in (True, "auto")
        done = unravel_key(("next", self.tensor_keys.done))
        batch = read_batch(
            tensordict,
            required=[key for key in self.in_keys if key not in self.optional_keys | {done}],
            mask_keys=self._loss_mask_keys(),
            weight_key=self.tensor_keys.priority_weight if weigh else None,
            done_key=done,
        )
        if self.action_chunk > 1:
            keys = self.tensor_keys
            check_chunks(batch.data, self.action_chunk, keys.action, keys.reward)
        if self.members is not None:
            batch = batch.of_runs(self.members)
        given = draws or {}
        drawn = {}
        for key, draw in self.random_inputs(batch.data.batch_size).items():
            own = batch.observed.get(key, None)
            if own is not None:
                drawn[key] = draw.fit(own, batch.observed.batch_size, key, self._like)
            else:
                drawn[key] = given[key] if key in given else draw.fill(draw.empty(self._like))
        return replace(batch, draws=drawn)

    @property
    def _like(self) -> Tensor:
        # not self.parameters(), which torch 2.11 cannot trace, nor next(iter(...)), as torch 2.15
        like, *_ = self.actor_network_params.values(True, True)
        return like

    def random_inputs(self, batch_size: torch.Size) -> Mapping[str, Draw]:
        """Random tensors that the losses of a batch need, by the key of the batch that replaces them.

        For ``actor_objective="flow"``: ``"flow_noise"`` ``(*B, A)``, standard normal, and
        ``"flow_time"`` ``(*B,)``, uniform on [0, 1); in a population ``(P, B, A)`` and ``(P, B)``. For
        ``"conditioned_flow"`` also ``"flow_drop"``, of the form of ``"flow_time"``. With
        ``random_shift``: ``"image_shift"`` and ``"next_image_shift"`` ``(*B, 2)``, uniform on [0, 1).
        Else none.
        """
        needed: dict[str, Draw] = {}
        shape = tuple(batch_size)
        if self.members is not None and len(shape) == 1:
            shape = (self.members, *shape)
        if self.actor_objective in FLOWS:
            size = (self.actor_network.action_features,)
            needed[FLOW_NOISE] = Draw(shape, size, normal=True, among=self.among)
            needed[FLOW_TIME] = Draw(shape, among=self.among)
        if self.actor_objective == "conditioned_flow":
            needed[FLOW_DROP] = Draw(shape, among=self.among)
        if self.random_shift:
            shift = Draw(shape, (2,), among=self.among)
            needed |= {IMAGE_SHIFT: shift, NEXT_IMAGE_SHIFT: shift}
        return needed

    # -- each quantity of an update, evaluated once --------------------------------------------------

    def target_qvalue(self, batch: Batch) -> Tensor:
        """``Q(s, a)`` of the target critics, shape ``(*B,)``, without gradient.

        Their minimum, or ``mean - pessimism * std``.
        """
        with torch.no_grad():
            values = self.action_values(batch, TARGET_CRITICS)
            return F.pessimistic_value(values, pessimism=self.pessimism)

    def action_values(self, batch: Batch, name: str) -> Tensor:
        """``Q_k(s, a)`` of the logged action from K critics with parameters ``name``, ``(K, *B)``."""
        outputs = self.networks.critics[name](self.inputs(batch, name))
        key = self.tensor_keys.state_action_value
        return per_sample(self.pick(outputs, batch), batch.data.batch_size, key, leading=1)

    def pick(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Of the critics' outputs that of the logged action."""
        return outputs

    def state_value(self, batch: Batch) -> Tensor:
        """``V(s)``, shape ``(*B,)``, with gradient."""
        return self._as_values(self.networks.value(self.inputs(batch)), batch)

    def state_values(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """``V(s)`` and, where one evaluation gives both, ``V(s')``; without gradient."""
        with torch.no_grad():
            value = self.networks.value
            if not getattr(value, "by_row", False) or not self._bootstraps_once():
                return self.state_value(batch), None
            assert isinstance(value, Direct)
            here, there = value.twice(self.inputs(batch), self.inputs(batch.next))
            return self._as_values(here, batch), self._as_values(there, batch)

    def _as_values(self, output: Tensor, batch: Batch) -> Tensor:
        return per_sample(output, batch.data.batch_size, self.tensor_keys.value)

    def _bootstraps_once(self) -> bool:
        """Whether targets take ``V(s')`` of the batch and nothing else from V."""
        estimator = self.value_estimator
        return type(estimator) is TD0Estimator and not estimator.average_rewards

    def td_target(self, batch: Batch, next_value: Tensor | None = None) -> Tensor:
        """Regression target of the critics, shape ``(*B,)``, without gradient.

        ``r + gamma V(s')``, bootstrapped past truncation and not past termination; with
        ``steps_to_next_obs`` in the batch (n-step rewards) the discount is ``gamma**n``. With
        ``action_chunk`` it is ``sum_i gamma**i r_i + gamma**k V(s_k)``, of the k actions made.
        ``next_value``, ``V(s')``, is evaluated where it is not given.
        """
        estimator = self.value_estimator
        with torch.no_grad():
            if not self._bootstraps_once():
                if self.action_chunk > 1:
                    raise NotImplementedError(
                        f"action_chunk is {self.action_chunk} and the value estimator is a "
                        f"{type(estimator).__name__}; targets of chunks are made by TD(0) alone, "
                        "without average rewards: call loss.make_value_estimator(gamma=...)."
                    )
                data = self.inputs(batch).copy().set("next", self.inputs(batch.next))
                target = estimator.value_estimate(
                    data, target_params=self.target_value_network_params
                )
                return per_sample(target, batch.data.batch_size, "value_target")
            keys = estimator.tensor_keys
            shape = batch.data.batch_size
            reward, terminated = (
                per_sample(batch.data.get(("next", key)), shape, key)
                for key in (keys.reward, keys.terminated)
            )
            gamma = self._discount(batch)
            steps = batch.data.get(keys.steps_to_next_obs, None)
            if self.action_chunk > 1:
                reward, gamma = self._over_chunk(batch, reward, gamma)
            elif steps is not None:
                gamma = gamma ** per_sample(steps, shape, keys.steps_to_next_obs)
            if next_value is None:
                next_value = self.state_value(batch.next)
            check_same_shape(
                "Where V gives a value for each agent, a team's reward and 'terminated' are stored for "
                "each agent too: entry.expand(*B, agents). Else check V's last layer.",
                reward=reward,
                terminated=terminated,
                next_state_value=next_value,
            )
            return F.td_target(reward, next_value, terminated, gamma=gamma)

    def _discount(self, batch: Batch) -> Tensor:
        """The discount: one number, one per sample, or of P runs ``(P, 1)``."""
        if self.members is not None:
            return self.discount
        gamma: Tensor = self.value_estimator.gamma
        return per_sample(gamma, batch.data.batch_size, "gamma") if gamma.ndim else gamma

    def _over_chunk(self, batch: Batch, reward: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Of the k actions that were made ``sum_i gamma**i r_i`` and ``gamma**k``, both ``(*B,)``."""
        powers = gamma.unsqueeze(-1) ** torch.arange(self.action_chunk, device=reward.device)
        return (reward * powers).sum(-1), gamma ** batch.data.get(CHUNK_MASK).sum(-1)

    def made_actions(self, batch: Batch) -> Tensor | None:
        """Bool ``(*B, h * A)``: entries of a chunk that belong to actions of the log; None: all do."""
        if self.action_chunk == 1:
            return None
        mask: Tensor = batch.data.get(CHUNK_MASK)
        size = batch.data.get(self.tensor_keys.action).shape[-1] // self.action_chunk
        return mask.unsqueeze(-1).expand(*mask.shape, size).flatten(-2)

    def _reduce(self, loss: Tensor, batch: Batch) -> Tensor:
        """Reduce per-sample losses; a mask or weight of a step applies to all that it holds."""
        return F.reduce(
            loss,
            reduction=self.reduction,
            mask=batch.mask_like(loss),
            weight=batch.weight_like(loss),
            dim=self._samples(loss),
        )

    def divisors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What means over a batch are divided by, ``()`` or ``(P,)`` for P runs, in float64.

        The first is that of losses, the sum of the valid steps' weights; the second that of scalars,
        the number of valid steps.
        """
        steps = torch.ones(batch.data.batch_size, dtype=torch.float64, device=self._like.device)
        weights = steps if batch.weight is None else steps * batch.weight
        if batch.mask is not None:  # a weight of padding may be nan
            steps, weights = (each.masked_fill(~batch.mask, 0.0) for each in (steps, weights))
        dims = self._samples(steps)
        return weights.sum(dims), steps.sum(dims)

    def _samples(self, value: Tensor) -> tuple[int, ...] | None:
        """Dimensions of per-sample ``value`` that the mean of one run goes over; None for all."""
        return None if self.members is None else tuple(range(1, value.ndim))

    def _mean(self, value: Tensor, batch: Batch) -> Tensor:
        return F.weighted_mean(value, mask=batch.mask_like(value), dim=self._samples(value))

    def mean_of_run(self, value: Tensor, batch: Batch) -> Tensor:
        """Mean of per-sample ``value`` over the valid steps of each run, to divide it by."""
        mean = self._mean(value, batch)
        if batch.mean_of_all is not None:
            mean = batch.mean_of_all(mean)
        return mean.view(*mean.shape, *(1,) * (value.ndim - mean.ndim)) if mean.ndim else mean

    def largest_of_run(self, value: Tensor, batch: Batch) -> Tensor:
        """The largest of per-sample ``value`` over the valid steps of each run, without gradient."""
        value, mask = value.detach(), batch.mask_like(value)
        if mask is not None:  # padding may be a copy of another run's step
            value = value.masked_fill(~mask, -torch.inf)
        largest = value.amax(self._samples(value) or (), keepdim=True)
        return largest if batch.largest_of_all is None else batch.largest_of_all(largest)
