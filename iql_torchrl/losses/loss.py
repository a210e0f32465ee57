"""Implicit Q-Learning as a TorchRL loss module: the quantities of an update, and its three losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from tensordict.utils import unravel_key
from torch import Tensor, distributions
from torchrl.modules import Delta
from torchrl.objectives.value import TD0Estimator

from iql_torchrl import functional as F
from iql_torchrl.config import IQLConfig, Knob, check_choice, loss_knobs
from iql_torchrl.losses.batch import Batch, agree, check_chunks, per_sample, read_batch
from iql_torchrl.losses.checks import check_actor, check_form
from iql_torchrl.losses.critics import Critics
from iql_torchrl.losses.draws import FLOW_NOISE, FLOW_TIME, IMAGE_SHIFT, NEXT_IMAGE_SHIFT, Draw
from iql_torchrl.losses.parameters import (
    DETACHED_CRITICS,
    LIVE_CRITICS,
    TARGET_CRITICS,
    NetworkLoss,
)
from iql_torchrl.networks import CHUNK_MASK, join_observations
from iql_torchrl.networks.evaluation import Direct, Networks

ValueObjective = str | Callable[[Tensor, Tensor], Tensor]
ActorObjective = str | Callable[[TensorDictModule, TensorDictBase], Tensor]
AdvantageWeight = str | Callable[[Tensor], Tensor]
ACTOR_OBJECTIVES = ("log_prob", "mse", "ddpg_bc", "flow")
Q_SOURCES = {"live": DETACHED_CRITICS, "target": TARGET_CRITICS}
SMALLEST_SCALE = 1e-6
POLICY_VALUE_GAP = "policy_value_gap"  # the diagnostic that ddpg_bc has and other objectives do not
LOSSES = ("loss_actor", "loss_qvalue", "loss_value")
DIAGNOSTICS = (
    "advantage_mean",
    "weight_mean",
    "weight_at_ceiling",
    "effective_sample_size",
    "qvalue_mean",
    "value_mean",
    "td_error_mean",
)


class ImplicitQLoss(NetworkLoss):
    """What :class:`IQLLoss` and :class:`DiscreteIQLLoss` share; abstract.

    ``knobs`` describes the arguments that are settings of a run: each is checked by its description
    and kept in the attribute of the same name, which is read at every evaluation.
    """

    knobs: ClassVar[Mapping[str, Knob]] = loss_knobs(IQLConfig)
    among: tuple[int, int] | None = None  # (first, count) of runs, in a part of a population

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: Critics,
        value_network: TensorDictModule,
        *,
        num_qvalue_nets: int = 2,
        loss_function: str = IQLConfig.loss_function,
        temperature: float = IQLConfig.temperature,
        expectile: float = IQLConfig.expectile,
        max_weight: float = IQLConfig.max_weight,
        bc_weight: float = IQLConfig.bc_weight,
        actor_ema: float = IQLConfig.actor_ema,
        value_objective: ValueObjective = IQLConfig.value_objective,
        actor_objective: ActorObjective = "log_prob",
        advantage_weight: AdvantageWeight = "exponential",
        q_reduction: str = "min",
        q_source: str = "live",
        diagnostics: bool = False,
        encoder_network: TensorDictModule | None = None,
        encoder_gradient: str = IQLConfig.encoder_gradient,
        random_shift: int = IQLConfig.random_shift,
        action_chunk: int = IQLConfig.action_chunk,
        separate_losses: bool = False,
        reduction: str | None = None,
        deactivate_vmap: bool = False,
        scalar_output_mode: str | None = None,
        priority_key: str | None = None,
        gamma: float | None = None,
    ) -> None:
        settings = {
            "loss_function": loss_function,
            "temperature": temperature,
            "expectile": expectile,
            "max_weight": max_weight,
            "bc_weight": bc_weight,
            "actor_ema": actor_ema,
            "encoder_gradient": encoder_gradient,
            "random_shift": random_shift,
            "action_chunk": action_chunk,
            "value_objective": value_objective,
        }
        for name, value in settings.items():
            if not callable(value):
                self.knobs[name].check_in_loss(value)
        choices = {
            "actor_objective": (actor_objective, ACTOR_OBJECTIVES),
            "advantage_weight": (advantage_weight, ("exponential",)),
            "q_reduction": (q_reduction, ("min", "mean")),
            "q_source": (q_source, tuple(Q_SOURCES)),
        }
        for name, (choice, names) in choices.items():
            if not callable(choice):
                check_choice(name, choice, names)
        check_actor(actor_network, actor_objective)
        check_form(num_qvalue_nets, value_network, reduction, scalar_output_mode, gamma)
        super().__init__(
            actor_network,
            qvalue_network,
            value_network,
            num_qvalue_nets=num_qvalue_nets,
            separate_losses=separate_losses,
            deactivate_vmap=deactivate_vmap,
            priority_key=priority_key,
            actor_ema=actor_ema,
            encoder_network=encoder_network,
            random_shift=random_shift,
            action_chunk=action_chunk,
        )
        for name in settings.keys() - {"actor_ema", "random_shift", "action_chunk"}:
            setattr(self, name, settings[name])
        for name, (choice, _) in choices.items():
            setattr(self, name, choice)
        self.reduction = reduction or "mean"
        self.scalar_output_mode = scalar_output_mode
        self._diagnostics = diagnostics
        if self.reduction == "none" and scalar_output_mode is None:
            self.scalar_output_mode = "exclude"
            warnings.warn(
                f"{type(self).__name__} with reduction='none' returns losses of the batch's shape, "
                "beside which a scalar (entropy, diagnostics) has no place: they are left out. Pass "
                "scalar_output_mode='exclude' to say so, or 'non_tensor' to keep them as non-tensor "
                "data.",
                UserWarning,
                stacklevel=3,
            )
        excluded = self.reduction == "none" and self.scalar_output_mode == "exclude"
        self.out_keys = [*LOSSES, *(() if excluded else self.scalar_names)]

    @property
    def diagnostics(self) -> bool:
        """Whether the outputs hold ``DIAGNOSTICS``; chosen when the loss is built."""
        return self._diagnostics

    @property
    def scalar_names(self) -> list[str]:
        """Names of the scalars that an update computes besides its losses."""
        names = ["entropy"] if self.actor_objective == "log_prob" else []
        if self.diagnostics:
            names += DIAGNOSTICS
            names += [POLICY_VALUE_GAP] if self.actor_objective == "ddpg_bc" else []
        return names

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
        ``"flow_time"`` ``(*B,)``, uniform on [0, 1); in a population ``(P, B, A)`` and ``(P, B)``. With
        ``random_shift``: ``"image_shift"`` and ``"next_image_shift"`` ``(*B, 2)``, uniform on [0, 1).
        Else none.
        """
        shape, needed = tuple(batch_size), {}
        if self.members is not None and len(shape) == 1:
            shape = (self.members, *shape)
        if self.actor_objective == "flow":
            size = self.actor_network.action_features
            needed[FLOW_NOISE] = Draw((*shape, size), True, size, self.among)
            needed[FLOW_TIME] = Draw(shape, False, None, self.among)
        if self.random_shift:
            shift = Draw((*shape, 2), False, 2, self.among)
            needed |= {IMAGE_SHIFT: shift, NEXT_IMAGE_SHIFT: shift}
        return needed

    def inputs(self, batch: Batch, critics: str | None = None) -> TensorDictBase:
        """What networks read: the batch's entries, with the encoder's features where there is one.

        ``critics``: the parameters of the critics that read them; None for the policy and V.
        """
        if self.encoder_network is None:
            return batch.observed
        return self.with_features(batch, critics)

    @property
    def networks(self) -> Networks:
        """What evaluates the networks now."""
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

    # -- each quantity of an update, evaluated once --------------------------------------------------

    def target_qvalue(self, batch: Batch) -> Tensor:
        """Minimum over the target critics of ``Q(s, a)``, shape ``(*B,)``, without gradient."""
        with torch.no_grad():
            return self.action_values(batch, TARGET_CRITICS).amin(0)

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
            agree(reward=reward, terminated=terminated, next_state_value=next_value)
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
        if batch.mask is not None:
            steps = steps.masked_fill(~batch.mask, 0.0)
        weights = steps if batch.weight is None else steps * batch.weight
        dim = self._samples(steps)
        dims = tuple(range(steps.ndim)) if dim is None else tuple(dim)
        return weights.sum(dims), steps.sum(dims)

    def _samples(self, value: Tensor) -> Sequence[int] | None:
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

    # -- one term per network --------------------------------------------------------------------

    def value_term(
        self, batch: Batch, target_qvalue: Tensor, td_target: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of V given the quantities it regresses on, and its metadata (eq. 5).

        ``"expectile"``: asymmetric squared error of ``min_k Q_k(s, a) - V(s)``. ``"quantile"``:
        pinball loss of the same. ``"sarsa_expectile"``: asymmetric squared error of
        ``r + gamma V(s') - V(s)``, for which the loss does not use the critics. A callable
        ``(min_k Q_k(s, a), V(s)) -> loss`` gives its own per-sample loss, all of shape ``(*B,)``.
        """
        value = self.state_value(batch)
        agree(state_value=value, target_qvalue=target_qvalue)
        if callable(self.value_objective):
            loss = self.value_objective(target_qvalue, value)
            loss = per_sample(loss, batch.data.batch_size, "value_objective's result")
        elif self.value_objective == "sarsa_expectile":
            target = self.td_target(batch) if td_target is None else td_target
            loss = F.expectile_loss(target - value, expectile=self.expectile)
        elif self.value_objective == "quantile":
            loss = F.quantile_loss(target_qvalue - value, quantile=self.expectile)
        else:
            loss = F.expectile_loss(target_qvalue - value, expectile=self.expectile)
        return self._reduce(loss, batch), {"value": value.detach()}

    def actor_term(self, batch: Batch, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the policy given the advantages ``(*B,)``, and its metadata (eq. 7).

        ``-w log pi(a|s)`` with ``w = min(exp(temperature * A), max_weight)``; ``"mse"`` takes
        ``w |pi(s) - a|**2`` summed over action dimensions; a callable gives its own per-sample
        loss, weighted the same way. A callable ``advantage_weight`` gives ``w`` from ``A``.
        ``"flow"`` takes ``w`` times the error of the velocity, and ``"ddpg_bc"`` has no weights
        (all are 1): both are described at :class:`IQLLoss`.
        """
        if self.actor_objective == "ddpg_bc":
            error, value = self._ddpg_bc(batch)
            metadata = {"advantage": advantage, "weight": torch.ones_like(advantage)}
            return self._reduce(error, batch), metadata | {"policy_value": value}
        weight = self.weight_of(advantage, batch)
        metadata = {"advantage": advantage, "weight": weight}
        error = self._actor_error(batch)
        agree(policy_error=error, advantage=advantage)
        if self.actor_objective == "log_prob":
            metadata["log_prob"] = -error.detach()
        return self._reduce(weight * error, batch), metadata

    def weight_of(self, advantage: Tensor, batch: Batch) -> Tensor:
        """Weights ``(*B,)`` of the samples in the policy's loss, without gradient."""
        if callable(self.advantage_weight):
            weight = self.advantage_weight(advantage).detach()
            return per_sample(weight, batch.data.batch_size, "advantage_weight's result")
        return F.exponential_weight(
            advantage, temperature=self.temperature, max_weight=self.max_weight
        )

    def qvalue_term(self, batch: Batch, td_target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over critics of their distance to ``td_target``, and its metadata (eq. 6).

        ``metadata["td_error"]`` is the squared error of every critic, ``(K, *B)``, 0 where masked.
        """
        qvalue = self.action_values(batch, LIVE_CRITICS)
        agree(qvalue=qvalue[0], td_target=td_target)
        target = td_target.expand_as(qvalue)
        loss = F.regression_loss(qvalue, target, loss_function=self.loss_function).sum(0)
        td_error = (qvalue.detach() - target).square()
        mask = batch.mask_like(td_target)
        if mask is not None:
            td_error = td_error.masked_fill(~mask, 0.0)
        return self._reduce(loss, batch), {"td_error": td_error, "qvalue": qvalue.detach()}

    def terms(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All three losses from at most five network evaluations, and their joined metadata."""
        target_qvalue = self.target_qvalue(batch)
        td_target = self.td_target(batch)
        loss_value, of_value = self.value_term(batch, target_qvalue, td_target)
        loss_actor, of_actor = self.actor_term(batch, target_qvalue - of_value["value"])
        loss_qvalue, of_qvalue = self.qvalue_term(batch, td_target)
        losses = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, "loss_value": loss_value}
        return losses, of_value | of_actor | of_qvalue

    # -- errors of the policy by the name of their objective ------------------------------------------

    def _actor_error(self, batch: Batch) -> Tensor:
        """Per-sample error of the policy on the logged actions, ``(*B,)``, to be weighted."""
        if self.actor_objective == "flow":
            return self._flow_matching(batch)
        if callable(self.actor_objective):
            with self.policy() as actor:
                error = self.actor_objective(actor, self.inputs(batch).copy())
            return per_sample(error, batch.data.batch_size, "actor_objective's result")
        if self.actor_objective == "mse":
            error = (self._policy_action(batch) - batch.data.get(self.tensor_keys.action)).square()
            error = _where(self.made_actions(batch), error)
            return error if error.ndim == batch.data.ndim else error.sum(-1)
        dist = self.networks.distribution(self.inputs(batch))
        return -self._log_prob(batch, dist)

    def _log_prob(self, batch: Batch, dist: distributions.Distribution) -> Tensor:
        """Log-probability of the logged action, ``(*B,)``; of a chunk that of the actions made."""
        action, made = self.logged_action(batch, dist), self.made_actions(batch)
        if made is None:
            log_prob = dist.log_prob(action)
        elif hasattr(dist, "masked_log_prob"):
            log_prob = dist.masked_log_prob(action, made)
        else:
            raise TypeError(
                f"the policy's distribution is a {type(dist).__name__}, which cannot leave out the "
                "padding of a chunk; it needs a method masked_log_prob(action, mask), as those of "
                "iql_torchrl.policies have. Or give actor_objective= a function."
            )
        return per_sample(log_prob, batch.data.batch_size, "log_prob")

    def logged_action(self, batch: Batch, dist: distributions.Distribution) -> Tensor:
        """The logged action in the form that ``dist.log_prob`` takes."""
        return batch.data.get(self.tensor_keys.action)

    def _policy_action(self, batch: Batch) -> Tensor:
        """The action that the policy writes, ``(*B, A)``."""
        if self.members is not None:
            chosen: Tensor = self.networks.distribution(self.inputs(batch)).deterministic_sample
            return chosen
        with self.policy() as actor:
            inputs = self.inputs(batch).select(*actor.in_keys, strict=False)
            return actor(inputs).get(self.tensor_keys.action)

    def policy_output(self, batch: Batch) -> tuple[Tensor, distributions.Distribution | None]:
        """The policy's action without randomness, ``(*B, A)``, and its distribution if it has one."""
        if not hasattr(self.actor_network, "get_dist"):
            return self._policy_action(batch), None
        dist = self.networks.distribution(self.inputs(batch))
        action = getattr(dist, "deterministic_sample", None)
        return dist.mean if action is None else torch.as_tensor(action), dist

    def _flow_matching(self, batch: Batch) -> Tensor:
        """Mean over action dimensions of ``(v(s, x_t, t) - (a - noise))**2``, per sample ``(*B,)``.

        ``x_t = (1 - t) * noise + t * a``, with the logged action a in the policy's units, standard
        normal noise and uniform t from ``batch.draws``: :func:`iql_torchrl.functional.flow_path`.
        """
        inputs, time = self.inputs(batch), batch.draws[FLOW_TIME]
        logged = batch.data.get(self.tensor_keys.action)
        head = self.networks.head
        with self.policy() if head is None else nullcontext(self.actor_network) as actor:
            observation = join_observations([inputs.get(key) for key in actor.in_keys])
            point, target = F.flow_path(batch.draws[FLOW_NOISE], actor.normalise(logged), time=time)
            velocity = (actor.velocity if head is None else head.run)(observation, point, time)
        error = (velocity.to(target.dtype) - target).square()
        return _where(self.made_actions(batch), error).mean(-1)

    def _ddpg_bc(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``-Q(s, pi(s)) / mean|Q| + bc_weight * cloning error``, ``min_k Q_k(s, pi(s))``, ``(*B,)``.

        The mean goes over the valid steps of a run; it, the critics' parameters and the second result
        get no gradient. The cloning error is minus the log-probability of the logged action; without
        density, the squared error.
        """
        action, dist = self.policy_output(batch)
        logged = batch.data.get(self.tensor_keys.action)
        read = self.observed_keys(self.qvalue_network.in_keys)
        data: TensorDictBase = batch.data.select(*read, strict=False)
        chosen = replace(
            batch,
            data=data.copy().set(self.tensor_keys.action, action),
            shared=None,
            features=batch.features if batch.shared is None else {},
        )
        values = self.action_values(chosen, Q_SOURCES[self.q_source])
        q = values.amin(0) if self.q_reduction == "min" else values.mean(0)
        scale = self.mean_of_run(q.detach().abs(), batch) + SMALLEST_SCALE
        if dist is None or isinstance(dist, Delta):
            error = _where(self.made_actions(batch), (action - logged).square()).sum(-1)
        else:
            error = -self._log_prob(batch, dist)
        agree(value_of_policy=q, cloning_error=error)
        return self.bc_weight * error - q / scale, values.detach().amin(0)

    # -- TorchRL's interface -----------------------------------------------------------------------

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`value_term` of a batch, everything it needs evaluated here."""
        batch = self.read(tensordict)
        return self.value_term(batch, self.target_qvalue(batch))

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`actor_term` of a batch with ``A = min_k Q_k(s, a) - V(s)``.

        Writes the log-probability of the logged actions into ``tensordict``, as TorchRL does (not for
        a population, whose runs may share the batch).
        """
        batch = self.read(tensordict)
        with torch.no_grad():
            advantage = self.target_qvalue(batch) - self.state_value(batch)
        loss, metadata = self.actor_term(batch, advantage)
        if "log_prob" in metadata and self.members is None:
            tensordict.set(self.tensor_keys.log_prob, metadata["log_prob"])
        return loss, metadata

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`qvalue_term` of a batch with the targets of :meth:`td_target`."""
        batch = self.read(tensordict)
        return self.qvalue_term(batch, self.td_target(batch))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The three losses of a batch, each reaching its own network and no other.

        Reads :attr:`in_keys`; returns ``loss_actor``, ``loss_qvalue``, ``loss_value``,
        ``entropy`` (TorchRL's name for minus the mean log-probability of the logged actions), and
        with ``diagnostics=True`` the keys of ``DIAGNOSTICS`` (for ``"ddpg_bc"`` also
        ``policy_value_gap``). Writes the priority (largest
        squared TD error of the critics) and the log-probability into ``tensordict``.
        """
        batch = self.read(tensordict)
        losses, metadata = self.terms(batch)
        out = self.outputs(tensordict, losses, self.summary(batch, metadata))
        self._clear_weakrefs(
            tensordict,
            out,
            *(f"{network}_network_params" for network in ("actor", "qvalue", "value")),
            TARGET_CRITICS,
        )
        return out

    def summary(self, batch: Batch, metadata: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of an update besides its losses.

        ``priority`` and ``log_prob`` per sample; scalars ``entropy`` and those of ``DIAGNOSTICS``.
        """
        summary = {"priority": metadata["td_error"].amax(0)}
        if "log_prob" in metadata:
            summary["log_prob"] = metadata["log_prob"]
            summary["entropy"] = self._mean(-metadata["log_prob"], batch)
        return summary | self._diagnose(metadata, batch) if self.diagnostics else summary

    def outputs(
        self, tensordict: TensorDictBase, losses: dict[str, Tensor], summary: dict[str, Tensor]
    ) -> TensorDictBase:
        """A new TensorDict of losses and scalars; priority and log-probability go into the input.

        Of P runs each is ``(P,)``, and the input, which many runs read, is not written to.
        """
        scalars = {k: v for k, v in summary.items() if k not in ("priority", "log_prob")}
        if self.members is not None:
            return TensorDict(losses | scalars, batch_size=[self.members])
        tensordict.set(self.tensor_keys.priority, summary["priority"])
        if "log_prob" in summary:
            tensordict.set(self.tensor_keys.log_prob, summary["log_prob"])
        if self.reduction != "none":
            return TensorDict(losses | scalars)
        out = TensorDict(losses, batch_size=tensordict.batch_size)
        if self.scalar_output_mode == "non_tensor":
            for key, scalar in scalars.items():
                out.set_non_tensor(key, scalar)
        return out

    def _diagnose(self, metadata: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        weight = metadata["weight"]
        mask, dim = batch.mask_like(weight), self._samples(weight)
        limited = self.actor_objective != "ddpg_bc" and not callable(self.advantage_weight)
        at_ceiling = (weight >= self.max_weight) & limited  # others have no ceiling
        gap = {}
        if "policy_value" in metadata:
            live = self.q_source == "live"
            logged = metadata["qvalue"].amin(0) if live else self.target_qvalue(batch)
            gap = {POLICY_VALUE_GAP: self._mean(metadata["policy_value"] - logged, batch)}
        return gap | {
            "advantage_mean": self._mean(metadata["advantage"], batch),
            "weight_mean": self._mean(weight, batch),
            "weight_at_ceiling": self._mean(at_ceiling.to(weight.dtype), batch),
            "effective_sample_size": F.effective_sample_size(weight, mask=mask, dim=dim),
            "qvalue_mean": self._mean(metadata["qvalue"].mean(0), batch),
            "value_mean": self._mean(metadata["value"], batch),
            "td_error_mean": self._mean(metadata["td_error"].mean(0), batch),
        }


def _where(mask: Tensor | None, error: Tensor) -> Tensor:
    """``error`` with zeros where ``mask`` is false."""
    return error if mask is None else error.where(mask, 0)
