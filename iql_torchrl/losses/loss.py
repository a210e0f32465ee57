"""Implicit Q-Learning as a TorchRL loss module: its settings and its three losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor, distributions
from torchrl.modules import Delta

from iql_torchrl import functional as F
from iql_torchrl.config import IQLConfig, Knob, check_choice, loss_knobs
from iql_torchrl.config.iql_config import OWN_WEIGHTS
from iql_torchrl.losses.batch import LAST_LAYERS, Batch, check_action, check_same_shape, per_sample
from iql_torchrl.losses.checks import FLOWS, check_actor, check_form
from iql_torchrl.losses.critics import Critics
from iql_torchrl.losses.draws import FLOW_DROP, FLOW_NOISE, FLOW_TIME
from iql_torchrl.losses.evaluation import EvaluatedLoss
from iql_torchrl.losses.parameters import DETACHED_CRITICS, LIVE_CRITICS, TARGET_CRITICS
from iql_torchrl.networks import join_observations

ValueObjective = str | Callable[[Tensor, Tensor], Tensor]
ActorObjective = str | Callable[[TensorDictModule, TensorDictBase], Tensor]
OfAdvantage = str | Callable[[Tensor], Tensor]
ACTOR_OBJECTIVES = ("log_prob", "mse", "ddpg_bc", *FLOWS)
UNWEIGHTED = ("ddpg_bc", "conditioned_flow")  # the weight of every sample is 1
Q_SOURCES = {"live": DETACHED_CRITICS, "target": TARGET_CRITICS}
SMALLEST_SCALE = 1e-6
# The authors' ceilings of (Q - V) / alpha: EQL's and XQL's code.
CEILINGS = {"exponential": 5.0, "gumbel": 7.0}
POLICY_VALUE_GAP = "policy_value_gap"  # the diagnostic that ddpg_bc has and other objectives do not
CONDITION_MEAN = "condition_mean"  # and the one of conditioned_flow
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


class ImplicitQLoss(EvaluatedLoss):
    """What :class:`IQLLoss` and :class:`DiscreteIQLLoss` share; abstract.

    ``knobs`` describes the arguments that are settings of a run: each is checked by its description
    and kept in the attribute of the same name, which is read at every evaluation.
    """

    knobs: ClassVar[Mapping[str, Knob]] = loss_knobs(IQLConfig)

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
        alpha: float = IQLConfig.alpha,
        pessimism: float | None = IQLConfig.pessimism,
        actor_objective: ActorObjective = "log_prob",
        advantage_weight: OfAdvantage = IQLConfig.advantage_weight,
        advantage_condition: OfAdvantage = "positive",
        condition_dropout: float = IQLConfig.condition_dropout,
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
        settings = {name: value for name, value in locals().items() if name in self.knobs}
        for name, value in settings.items():
            if not callable(value):
                self.knobs[name].check_in_loss(value)
        choices = {
            "actor_objective": (actor_objective, ACTOR_OBJECTIVES),
            "advantage_condition": (advantage_condition, ("positive",)),
            "q_reduction": (q_reduction, ("min", "mean")),
            "q_source": (q_source, tuple(Q_SOURCES)),
        }
        for name, (choice, names) in choices.items():
            if not callable(choice):
                check_choice(name, choice, names)
            settings[name] = choice
        check_actor(actor_network, actor_objective)
        check_form(num_qvalue_nets, value_network, reduction, scalar_output_mode, gamma)
        super().__init__(
            actor_network,
            qvalue_network,
            value_network,
            encoder_network,
            num_qvalue_nets=num_qvalue_nets,
            separate_losses=separate_losses,
            deactivate_vmap=deactivate_vmap,
            priority_key=priority_key,
            settings=settings,
        )
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
            names += [CONDITION_MEAN] if self.actor_objective == "conditioned_flow" else []
        return names

    # -- one term per network --------------------------------------------------------------------

    def value_term(
        self, batch: Batch, target_qvalue: Tensor, td_target: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of V given the quantities it regresses on, and its metadata (eq. 5).

        ``"expectile"``: asymmetric squared error of ``min_k Q_k(s, a) - V(s)``. ``"quantile"``:
        pinball loss of the same. ``"sarsa_expectile"``: asymmetric squared error of
        ``r + gamma V(s') - V(s)``, for which the loss does not use the critics. ``"sparse"``,
        ``"exponential"`` and ``"gumbel"``: :func:`~iql_torchrl.functional.sparse_loss` and, with the
        ceilings 5 and 7, :func:`~iql_torchrl.functional.gumbel_loss` of the first error. A callable
        ``(min_k Q_k(s, a), V(s)) -> loss`` gives its own per-sample loss, all of shape ``(*B,)``.
        With ``pessimism`` the target is ``mean - pessimism * std`` in place of the minimum.
        """
        value = self.state_value(batch)
        check_same_shape(LAST_LAYERS, state_value=value, target_qvalue=target_qvalue)
        if callable(self.value_objective):
            loss = self.value_objective(target_qvalue, value)
            loss = per_sample(loss, batch.data.batch_size, "value_objective's result")
        elif self.value_objective == "sarsa_expectile":
            target = self.td_target(batch) if td_target is None else td_target
            loss = F.expectile_loss(target - value, expectile=self.expectile)
        elif self.value_objective == "quantile":
            loss = F.quantile_loss(target_qvalue - value, quantile=self.expectile)
        elif self.value_objective == "sparse":
            loss = F.sparse_loss(target_qvalue - value, alpha=self.alpha)
        elif self.value_objective in CEILINGS:
            error, ceiling = target_qvalue - value, CEILINGS[self.value_objective]
            largest = self.largest_of_run(error, batch)
            loss = F.gumbel_loss(error, alpha=self.alpha, ceiling=ceiling, largest=largest)
        else:
            loss = F.expectile_loss(target_qvalue - value, expectile=self.expectile)
        return self._reduce(loss, batch), {"value": value.detach()}

    def actor_term(self, batch: Batch, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the policy given the advantages ``(*B,)``, and its metadata (eq. 7).

        ``-w log pi(a|s)`` with ``w`` of :meth:`weight_of`; ``"mse"`` takes
        ``w |pi(s) - a|**2`` summed over action dimensions; a callable gives its own per-sample
        loss, weighted the same way. A callable ``advantage_weight`` gives ``w`` from ``A``.
        ``"flow"`` takes ``w`` times the error of the velocity; ``"conditioned_flow"`` and
        ``"ddpg_bc"`` have no weights (all are 1): they are described at :class:`IQLLoss`. Where the
        batch has other entries for the policy (goals of its own, ``data.GoalSampler``), these are
        read, also for the advantages.
        """
        if (own := batch.for_actor) is not batch:
            batch, advantage = own, self.advantage(own)
        weight = self.weight_of(advantage, batch)
        metadata = {"advantage": advantage, "weight": weight}
        if self.actor_objective == "ddpg_bc":
            error, metadata["policy_value"] = self._ddpg_bc(batch)
            return self._reduce(error, batch), metadata
        if self.actor_objective == "conditioned_flow":
            metadata["condition"] = self.condition_of(advantage, batch)
        error = self._actor_error(batch, metadata.get("condition"))
        check_same_shape(
            "Sum a log-probability over the dimensions of the action "
            "(torch.distributions.Independent(distribution, 1)).",
            policy_error=error,
            advantage=advantage,
        )
        if self.actor_objective == "log_prob":
            metadata["log_prob"] = -error.detach()
        return self._reduce(weight * error, batch), metadata

    def advantage(self, batch: Batch) -> Tensor:
        """``min_k Q_k(s, a) - V(s)`` with the target critics, ``(*B,)``, without gradient."""
        with torch.no_grad():
            return self.target_qvalue(batch) - self.state_value(batch)

    def weight_of(self, advantage: Tensor, batch: Batch) -> Tensor:
        """Weights ``(*B,)`` of the samples in the policy's loss, without gradient."""
        if self.actor_objective in UNWEIGHTED:
            return torch.ones_like(advantage)
        if callable(self.advantage_weight):
            return self._own_function("advantage_weight", advantage)
        kind = self.advantage_weight
        if kind == "auto" and not callable(self.value_objective):
            kind = OWN_WEIGHTS.get(self.value_objective, "exponential")
        if kind == "positive":
            return F.positive_weight(advantage, max_weight=self.max_weight)
        if kind == "sparse":
            return F.sparse_weight(advantage, alpha=self.alpha, max_weight=self.max_weight)
        return F.exponential_weight(
            advantage, temperature=self.temperature, max_weight=self.max_weight
        )

    def condition_of(self, advantage: Tensor, batch: Batch) -> Tensor:
        """The condition that a flow gets for the samples' advantages, ``(*B,)``, without gradient."""
        if callable(self.advantage_condition):
            return self._own_function("advantage_condition", advantage)
        return (advantage > 0).to(advantage.dtype)

    def _own_function(self, name: str, advantage: Tensor) -> Tensor:
        """What the user's function ``name`` gives for the advantages ``(*B,)``, without gradient."""
        result = getattr(self, name)(advantage)
        return per_sample(result, advantage.shape, f"{name}'s result").detach().to(advantage.dtype)

    def qvalue_term(self, batch: Batch, td_target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over critics of their distance to ``td_target``, and its metadata (eq. 6).

        ``metadata["td_error"]`` is the squared error of every critic, ``(K, *B)``, 0 where masked.
        """
        qvalue = self.action_values(batch, LIVE_CRITICS)
        check_same_shape(LAST_LAYERS, qvalue=qvalue[0], td_target=td_target)
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

    def _actor_error(self, batch: Batch, condition: Tensor | None = None) -> Tensor:
        """Per-sample error of the policy on the logged actions, ``(*B,)``, to be weighted."""
        if self.actor_objective in FLOWS:
            return self._flow_matching(batch, condition)
        if callable(self.actor_objective):
            with self.policy() as actor:
                error = self.actor_objective(actor, self.inputs(batch).copy())
            return per_sample(error, batch.data.batch_size, "actor_objective's result")
        if self.actor_objective == "mse":
            action, logged = self._policy_action(batch), batch.data.get(self.tensor_keys.action)
            check_action(self.tensor_keys.action, logged, action.shape)
            error = _where(self.made_actions(batch), (action - logged).square())
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
        action, shape = batch.data.get(self.tensor_keys.action), dist.batch_shape + dist.event_shape
        # A class of the user's may leave its shapes empty; a Categorical does not.
        if len(shape) >= action.ndim or isinstance(dist, distributions.Categorical):
            check_action(self.tensor_keys.action, action, shape)
        return action

    def _policy_action(self, batch: Batch) -> Tensor:
        """The action that the policy writes, ``(*B, A)``."""
        if self.members is not None:
            return self.policy_output(batch)[0]
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

    def _flow_matching(self, batch: Batch, condition: Tensor | None) -> Tensor:
        """Mean over action dimensions of ``(v(s, x_t, t) - (a - noise))**2``, per sample ``(*B,)``.

        ``x_t = (1 - t) * noise + t * a``, with the logged action a in the policy's units, standard
        normal noise and uniform t from ``batch.draws``: :func:`iql_torchrl.functional.flow_path`.
        With a ``condition`` the velocity has its input c too, unknown where ``"flow_drop"`` is below
        ``condition_dropout``.
        """
        known_condition: tuple[Tensor, ...] = ()
        if condition is not None:
            known = batch.draws[FLOW_DROP] >= self.condition_dropout
            known_condition = (F.condition_input(condition, known),)
        inputs, time = self.inputs(batch), batch.draws[FLOW_TIME]
        logged = batch.data.get(self.tensor_keys.action)
        head = self.networks.head
        with self.policy() if head is None else nullcontext(self.actor_network) as actor:
            observation = join_observations([inputs.get(key) for key in actor.in_keys])
            point, target = F.flow_path(batch.draws[FLOW_NOISE], actor.normalise(logged), time=time)
            velocity = (actor.velocity if head is None else head.run)(
                observation, point, time, *known_condition
            )
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
        check_action(self.tensor_keys.action, logged, action.shape)
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
        check_same_shape(LAST_LAYERS, value_of_policy=q, cloning_error=error)
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
        loss, metadata = self.actor_term(batch, self.advantage(batch))
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
        ``policy_value_gap``, for ``"conditioned_flow"`` ``condition_mean``). Writes the priority
        (largest squared TD error of the critics) and the log-probability into ``tensordict``.
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
        limited = self.actor_objective not in UNWEIGHTED and not callable(self.advantage_weight)
        at_ceiling = (weight >= self.max_weight) & limited  # others have no ceiling
        gap = {}
        if "policy_value" in metadata:
            live = self.q_source == "live"
            with torch.no_grad():
                logged = metadata["qvalue"] if live else self.action_values(batch, TARGET_CRITICS)
            difference = metadata["policy_value"] - logged.amin(0)
            gap = {POLICY_VALUE_GAP: self._mean(difference, batch)}
        if "condition" in metadata:
            gap = {CONDITION_MEAN: self._mean(metadata["condition"], batch)}
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
