"""Implicit Q-Learning as a TorchRL loss module: what all critics have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor, distributions

from iql_torchrl import functional as F
from iql_torchrl.config import IQLConfig, Knob, check_choice, loss_knobs
from iql_torchrl.host import TARGET_CRITICS
from iql_torchrl.objectives.base import OfflineLoss
from iql_torchrl.objectives.batch import Batch, agree, per_sample
from iql_torchrl.objectives.draws import Draw, with_draws
from iql_torchrl.objectives.encoding import shift_draws
from iql_torchrl.objectives.ensembles import Critics
from iql_torchrl.objectives.policy_objectives import (
    POLICY_VALUE_GAP,
    Q_REDUCTIONS,
    Q_SOURCES,
    ActorObjective,
    check_actor,
    ddpg_bc,
    flow_inputs,
    flow_matching,
    policy_action,
    policy_value_gap,
)

__all__ = [
    "ACTOR_OBJECTIVES",
    "CONTINUOUS_OBJECTIVES",
    "DIAGNOSTICS",
    "LOSSES",
    "OPTIONS",
    "ImplicitQLoss",
]

ValueObjective = str | Callable[[Tensor, Tensor], Tensor]
AdvantageWeight = str | Callable[[Tensor], Tensor]
ADVANTAGE_WEIGHTS = ("exponential",)
CONTINUOUS_OBJECTIVES = ("mse", "ddpg_bc", "flow")
ACTOR_OBJECTIVES = ("log_prob", *CONTINUOUS_OBJECTIVES)
LOSSES = ("loss_actor", "loss_qvalue", "loss_value")
# Attributes that decide, with the knobs, what a loss computes and returns.
OPTIONS = (
    "actor_objective",
    "advantage_weight",
    "deactivate_vmap",
    "delay_qvalue",
    "deterministic_sampling_mode",
    "diagnostics",
    "loss_mask_key",
    "num_qvalue_nets",
    "q_reduction",
    "q_source",
    "reduction",
    "scalar_output_mode",
    "use_prioritized_weights",
)
DIAGNOSTICS = (
    "advantage_mean",
    "weight_mean",
    "weight_at_ceiling",
    "effective_sample_size",
    "qvalue_mean",
    "value_mean",
    "td_error_mean",
)


class ImplicitQLoss(OfflineLoss):
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
        actor_objective: ActorObjective = "log_prob",
        advantage_weight: AdvantageWeight = "exponential",
        q_reduction: str = "min",
        q_source: str = "live",
        diagnostics: bool = False,
        encoder_network: TensorDictModule | None = None,
        encoder_gradient: str = IQLConfig.encoder_gradient,
        random_shift: int = IQLConfig.random_shift,
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
        }
        if not callable(value_objective):
            settings["value_objective"] = value_objective
        for name, value in settings.items():
            self.knobs[name].check_in_loss(value)
        for name, choice, names in (
            ("actor_objective", actor_objective, ACTOR_OBJECTIVES),
            ("advantage_weight", advantage_weight, ADVANTAGE_WEIGHTS),
            ("q_reduction", q_reduction, Q_REDUCTIONS),
            ("q_source", q_source, tuple(Q_SOURCES)),
        ):
            if not callable(choice):
                check_choice(name, choice, names)
        check_actor(actor_network, actor_objective)
        super().__init__(
            actor_network,
            qvalue_network,
            value_network,
            num_qvalue_nets=num_qvalue_nets,
            separate_losses=separate_losses,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            scalar_output_mode=scalar_output_mode,
            priority_key=priority_key,
            gamma=gamma,
            actor_ema=actor_ema,
            encoder_network=encoder_network,
            random_shift=random_shift,
        )
        self.encoder_gradient = encoder_gradient
        self.loss_function = loss_function
        self.temperature = temperature
        self.expectile = expectile
        self.max_weight = max_weight
        self.bc_weight = bc_weight
        self.value_objective = value_objective
        self.actor_objective = actor_objective
        self.advantage_weight = advantage_weight
        self.q_reduction = q_reduction
        self.q_source = q_source
        self._diagnostics = diagnostics
        excluded = self.reduction == "none" and self.scalar_output_mode == "exclude"
        self.out_keys = [*LOSSES, *(() if excluded else self.scalar_names)]

    def logged_action(self, batch: Batch, dist: distributions.Distribution) -> Tensor:
        """The logged action in the form that ``dist.log_prob`` takes."""
        return batch.data.get(self.tensor_keys.action)

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

    def read(self, tensordict: TensorDictBase, draws: Mapping[str, Tensor] | None = None) -> Batch:
        """The batch as the update reads it, with the random tensors of :meth:`random_inputs`.

        Those that neither ``tensordict`` nor ``draws`` has are drawn here, from torch's default
        generator: so an update reads its batch outside of the compiled program.
        """
        return with_draws(self, super().read(tensordict), draws)

    def random_inputs(self, batch_size: torch.Size) -> Mapping[str, Draw]:
        """Random tensors that the losses of a batch need, by the key of the batch that replaces them.

        For ``actor_objective="flow"``: ``"flow_noise"`` ``(*B, A)``, standard normal, and
        ``"flow_time"`` ``(*B,)``, uniform on [0, 1); in a population ``(P, B, A)`` and ``(P, B)``. With
        ``random_shift``: ``"image_shift"`` and ``"next_image_shift"`` ``(*B, 2)``, uniform on [0, 1).
        Else none.
        """
        shape = self.sample_shape(batch_size)
        flow = self.actor_objective == "flow"
        needed = flow_inputs(self.actor_network, shape) if flow else {}
        return needed | shift_draws(self, shape)

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
            loss = self._per_sample(
                self.value_objective(target_qvalue, value), batch, "value_objective"
            )
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
        ``"flow"`` takes ``w`` times the error of the velocity, :func:`policy_objectives.flow_matching`.
        ``"ddpg_bc"`` has no weights (all are 1): :func:`policy_objectives.ddpg_bc`.
        """
        if self.actor_objective == "ddpg_bc":
            error, value = ddpg_bc(self, batch)
            metadata = {"advantage": advantage, "weight": torch.ones_like(advantage)}
            return self._reduce(error, batch), metadata | {"policy_value": value}
        weight = self.weight_of(advantage, batch)
        metadata = {"advantage": advantage, "weight": weight}
        flow = self.actor_objective == "flow"
        error = flow_matching(self, batch) if flow else self._actor_error(batch)
        agree(policy_error=error, advantage=advantage)
        if self.actor_objective == "log_prob":
            metadata["log_prob"] = -error.detach()
        return self._reduce(weight * error, batch), metadata

    def weight_of(self, advantage: Tensor, batch: Batch) -> Tensor:
        """Weights ``(*B,)`` of the samples in the policy's loss, without gradient."""
        if callable(self.advantage_weight):
            weight = self.advantage_weight(advantage).detach()
            return self._per_sample(weight, batch, "advantage_weight")
        return F.exponential_weight(
            advantage, temperature=self.temperature, max_weight=self.max_weight
        )

    @staticmethod
    def _per_sample(result: Tensor, batch: Batch, name: str) -> Tensor:
        """The result of a function that the user gave as ``name``; ``ValueError`` on its shape."""
        return per_sample(result, batch.data.batch_size, f"{name}'s result")

    def _actor_error(self, batch: Batch) -> Tensor:
        data = self.inputs(batch)
        if callable(self.actor_objective):
            with self.evaluator.policy(self) as actor:
                error = self.actor_objective(actor, data.copy())
            return self._per_sample(error, batch, "actor_objective")
        inputs = data.select(*self.actor_network.in_keys, strict=False)
        with self.evaluator.policy(self) as actor:
            if self.actor_objective == "mse":
                error = actor(inputs).get(self.tensor_keys.action)
                error = (error - data.get(self.tensor_keys.action)).square()
                return error if error.ndim == data.ndim else error.sum(-1)
            dist = actor.get_dist(inputs)
        log_prob = dist.log_prob(self.logged_action(batch, dist))
        return -per_sample(log_prob, data.batch_size, "log_prob")

    def policy_output(self, batch: Batch) -> tuple[Tensor, distributions.Distribution | None]:
        """The policy's action without randomness, ``(*B, A)``, and its distribution if it has one."""
        inputs = self.inputs(batch).select(*self.actor_network.in_keys, strict=False)
        with self.evaluator.policy(self) as actor:
            if hasattr(self.actor_network, "get_dist"):
                dist = actor.get_dist(inputs)
                return policy_action(dist), dist
            return actor(inputs).get(self.tensor_keys.action), None

    def logged(self, batch: Batch) -> Tensor:
        """The logged actions in the shape of the policy's, ``(*B, A)``."""
        action: Tensor = batch.data.get(self.tensor_keys.action)
        return action

    def qvalue_term(self, batch: Batch, td_target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over critics of their distance to ``td_target``, and its metadata (eq. 6).

        ``metadata["td_error"]`` is the squared error of every critic, ``(K, *B)``, 0 where masked.
        """
        qvalue = self.qvalue(batch)
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

    # -- TorchRL's interface -----------------------------------------------------------------------

    def value_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`value_term` of a batch, everything it needs evaluated here."""
        batch = self.read(tensordict)
        return self.value_term(batch, self.target_qvalue(batch))

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`actor_term` of a batch with ``A = min_k Q_k(s, a) - V(s)``.

        Writes the log-probability of the logged actions into ``tensordict``, as TorchRL does.
        """
        batch = self.read(tensordict)
        with torch.no_grad():
            advantage = self.target_qvalue(batch) - self.state_value(batch)
        loss, metadata = self.actor_term(batch, advantage)
        if "log_prob" in metadata:
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
        """A new TensorDict of losses and scalars; priority and log-probability go into the input."""
        scalars = dict(summary)
        tensordict.set(self.tensor_keys.priority, scalars.pop("priority"))
        if "log_prob" in scalars:
            tensordict.set(self.tensor_keys.log_prob, scalars.pop("log_prob"))
        if self.reduction != "none":
            return TensorDict(losses | scalars)
        out = TensorDict(losses, batch_size=tensordict.batch_size)
        if self.scalar_output_mode == "non_tensor":
            for key, scalar in scalars.items():
                out.set_non_tensor(key, scalar)
        return out

    def _mean(self, value: Tensor, batch: Batch) -> Tensor:
        return F.weighted_mean(value, mask=batch.mask_like(value), dim=self._samples(value))

    def mean_of_run(self, value: Tensor, batch: Batch) -> Tensor:
        """Mean of per-sample ``value`` over the valid steps of each run, to divide it by."""
        mean = self._mean(value, batch)
        if batch.mean_of_all is not None:
            mean = batch.mean_of_all(mean)
        return mean.view(*mean.shape, *(1,) * (value.ndim - mean.ndim)) if mean.ndim else mean

    def _diagnose(self, metadata: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        weight = metadata["weight"]
        mask, dim = batch.mask_like(weight), self._samples(weight)
        limited = self.actor_objective != "ddpg_bc" and not callable(self.advantage_weight)
        at_ceiling = (weight >= self.max_weight).to(
            weight.dtype
        ) * limited  # others have no ceiling
        gap = {}
        if "policy_value" in metadata:
            each = policy_value_gap(self, batch, metadata["policy_value"], metadata["qvalue"])
            gap = {POLICY_VALUE_GAP: self._mean(each, batch)}
        return gap | {
            "advantage_mean": self._mean(metadata["advantage"], batch),
            "weight_mean": self._mean(weight, batch),
            "weight_at_ceiling": self._mean(at_ceiling, batch),
            "effective_sample_size": F.effective_sample_size(weight, mask=mask, dim=dim),
            "qvalue_mean": self._mean(metadata["qvalue"].mean(0), batch),
            "value_mean": self._mean(metadata["value"], batch),
            "td_error_mean": self._mean(metadata["td_error"].mean(0), batch),
        }
