"""Implicit Q-Learning: the algorithm, as a TorchRL loss module."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from tensordict.utils import unravel_key
from torch import Tensor

from iql_torchrl import functional as F
from iql_torchrl.config import IQLConfig, check_choice
from iql_torchrl.losses.actor_objectives import (
    ACTOR_OBJECTIVES,
    ActorObjective,
    as_actor_objective,
)
from iql_torchrl.losses.batch import (
    IMAGE_SHIFT,
    LAST_LAYERS,
    NEXT_IMAGE_SHIFT,
    Batch,
    Draw,
    check_chunks,
    check_same_shape,
    read_batch,
)
from iql_torchrl.losses.critics import Critics
from iql_torchrl.losses.encoder import SharedEncoder
from iql_torchrl.losses.networks import NetworkLoss
from iql_torchrl.losses.objective import Objective
from iql_torchrl.losses.value_objectives import VALUE_OBJECTIVES, ValueObjective, as_value_objective

# One loss or several by name, and metadata: tensors by name that other parts read.
LossAndMetadata = tuple[Tensor, dict[str, Tensor]]
LossesAndMetadata = tuple[dict[str, Tensor], dict[str, Tensor]]
LOSSES = ("loss_actor", "loss_qvalue", "loss_value")
DIAGNOSTICS = (
    "advantage_mean",
    "weight_mean",
    "clip_fraction",
    "effective_sample_size",
    "qvalue_mean",
    "value_mean",
    "td_error_mean",
)


class IQLLoss(NetworkLoss):
    r"""Implicit Q-Learning for critics of state and action (Kostrikov et al. 2021).

    Learns from transitions ``(s, a, r, s')`` of a dataset; no action outside it is evaluated. With
    target critics ``Q'`` and ``A = min_k Q'_k(s, a) - V(s)``:

    - ``loss_value``: ``|expectile - 1(A < 0)| A**2``, so V becomes an upper expectile of Q over
      dataset actions (eq. 5);
    - ``loss_qvalue``: ``sum_k d(Q_k(s, a), r + gamma V(s'))``, nothing past termination (eq. 6);
    - ``loss_actor``: ``-min(exp(temperature A), max_weight) log pi(a|s)`` (eq. 7).

    Drop-in for ``torchrl.objectives.IQLLoss`` of TorchRL 0.14, with the paper's defaults.

    Args:
        actor_network: policy with ``get_dist`` (any TensorDictModule for other objectives).
        qvalue_network: Q(s, a), one output. A module alone is critic 0 with its weights kept and
            the others are drawn at its scale; a list, or a function called once per critic,
            keeps every initialisation.
        value_network: V(s), one output. May read other keys than the actor.

    Keyword Args:
        num_qvalue_nets: number of critics K >= 1.
        loss_function: distance of the critics: ``"l2"`` (the paper's), ``"l1"``, ``"smooth_l1"``.
        temperature: inverse temperature beta >= 0 of the default ``actor_objective``. 0 is behaviour
            cloning; larger is greedier.
        expectile: in (0, 1], of the default ``value_objective``. 0.5 gives the value of the behaviour
            policy; towards 1, that of its best actions.
        max_weight: a sample's weight is clipped to it, > 0.
        value_objective: what V learns: an object such as ``losses.Expectile(0.9)``, ``Quantile``,
            ``SarsaExpectile``, ``Sparse``, ``Exponential``, ``Gumbel``, or one of your own; its name in
            ``IQLConfig``, which reads ``expectile``; or a function ``(target_qvalue (*B,), value (*B,))
            -> per-sample loss (*B,)``.
        actor_objective: how the policy is extracted: an object such as
            ``losses.DDPGBC(bc_weight=0.3)``, ``AdvantageWeighted``, ``WeightedSquaredError``,
            ``FlowMatching``, ``ConditionedFlow``, or one of your own; its name (``"log_prob"``,
            ``"mse"``, ``"flow"``, ``"conditioned_flow"``, ``"ddpg_bc"``), which reads ``temperature``
            and ``max_weight``; or a function ``(actor, batch) -> per-sample loss (*B,)``, which is
            weighted.
        encoder_network: a TensorDictModule that the others share, or a
            :class:`~iql_torchrl.losses.SharedEncoder`, which has its settings.
        diagnostics: add means that show how training goes (``advantage_mean``, ``weight_mean``,
            ``clip_fraction``, ``effective_sample_size``, ``qvalue_mean``, ``value_mean``,
            ``td_error_mean``, and those of the ``actor_objective``).
        separate_losses: parameters shared with the actor learn from the actor's loss alone.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.
        deactivate_vmap: evaluate the critics in a loop.
        scalar_output_mode: with ``reduction="none"``, ``"exclude"`` or ``"non_tensor"`` scalars.
        priority_key, gamma: refused as in TorchRL; use ``set_keys`` and ``make_value_estimator``.

    Hyperparameters are tensors of the objectives: ``loss.temperature = 5.0`` (also ``expectile`` and
    ``max_weight``) and ``loss.actor_objective.bc_weight = 0.1`` write into them, so that compiled and
    captured steps need no new compilation. ``loss.average_actor(0.999)`` keeps an average of the
    policy's weights.

    Batches of action chunks (``dataset.chunks(h)``): ``action`` ``(*B, h * A)``, ``("next", "reward")``
    and ``"chunk_mask"`` ``(*B, h)``. With k the number of actions that the mask marks, the target of
    the critics is ``sum_i gamma**i r_i + gamma**k V(s_k)``, and the policy's error is that of these
    actions. Li, Zhou, Levine 2025, "Reinforcement Learning with Action Chunking" (arXiv:2507.07969).

    Raises:
        ValueError: a value out of range or an unknown name (the message shows it), or an encoder that
            does not fit the other networks or keeps statistics of batches (BatchNorm).
        TypeError: ``gamma`` given, a non-numeric value, a network that is not a TensorDictModule
            (``qvalue_network``: nor a list or function of such), or a policy that the
            ``actor_objective`` cannot train.
    """

    value_objective: ValueObjective
    actor_objective: ActorObjective

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
        value_objective: ValueObjective | str | Callable[..., Any] = "expectile",
        actor_objective: ActorObjective | str | Callable[..., Any] = "log_prob",
        encoder_network: TensorDictModule | SharedEncoder | None = None,
        diagnostics: bool = False,
        separate_losses: bool = False,
        reduction: str | None = None,
        deactivate_vmap: bool = False,
        scalar_output_mode: str | None = None,
        priority_key: str | None = None,
        gamma: float | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(f"{type(self).__name__} has no argument {_advice(next(iter(unknown)))}")
        _check_arguments(num_qvalue_nets, value_network, reduction, scalar_output_mode, gamma)
        check_choice("loss_function", loss_function, tuple(F.REGRESSION_LOSSES))
        # all three are checked, also those that the chosen objectives do not read
        Objective(expectile=expectile, temperature=temperature, max_weight=max_weight)
        learn_value = as_value_objective(value_objective, {"expectile": expectile})
        learn_actor = as_actor_objective(
            actor_objective,
            {"temperature": temperature, "max_weight": max_weight},
            weight=learn_value.advantage_weight,
        )
        learn_actor.check_actor(actor_network)
        super().__init__(
            actor_network,
            qvalue_network,
            value_network,
            encoder_network,
            num_qvalue_nets=num_qvalue_nets,
            separate_losses=separate_losses,
            deactivate_vmap=deactivate_vmap,
            priority_key=priority_key,
        )
        self.value_objective, self.actor_objective = learn_value, learn_actor
        self.loss_function, self.diagnostics = loss_function, diagnostics
        self.reduction = reduction or "mean"
        self.scalar_output_mode = scalar_output_mode
        if self.reduction == "none" and scalar_output_mode is None:
            self.scalar_output_mode = "exclude"
            _warn_of_left_out_scalars(type(self).__name__)
        self._out_keys: list[str] | None = None

    @property
    def out_keys(self) -> list[str]:
        """Names of losses and scalars that a call returns."""
        if self._out_keys is not None:  # selected by select_out_keys
            return self._out_keys
        excluded = self.reduction == "none" and self.scalar_output_mode == "exclude"
        return [*LOSSES, *(() if excluded else self.scalar_names)]

    @out_keys.setter
    def out_keys(self, keys: list[str] | None) -> None:
        self._out_keys = keys

    # -- the algorithm -------------------------------------------------------------------------------

    def target_qvalue(self, batch: Batch) -> Tensor:
        """``min_k Q'_k(s, a)`` of the target critics, ``(*B,)``, or as ``pessimism`` says."""
        with torch.no_grad():
            return self.value_objective.target_of(self.qvalues(batch, "target"))

    def advantage(self, batch: Batch) -> Tensor:
        """``min_k Q'_k(s, a) - V(s)``, ``(*B,)``, without gradient."""
        with torch.no_grad():
            return self.target_qvalue(batch) - self.state_value(batch)

    def value_term(
        self, batch: Batch, target_qvalue: Tensor, td_target: Tensor | None = None
    ) -> LossAndMetadata:
        """Loss of V given what it regresses on, and its metadata (eq. 5)."""
        value = self.state_value(batch)
        check_same_shape(LAST_LAYERS, state_value=value, target_qvalue=target_qvalue)
        target = target_qvalue
        if self.value_objective.reads_td_target:
            target = self.td_target(batch) if td_target is None else td_target
        loss = self.value_objective(target, value, batch).to(value.dtype)
        return self._reduce(loss, batch), {"value": value.detach()}

    def actor_term(self, batch: Batch, advantage: Tensor) -> LossAndMetadata:
        """Loss of the policy given the advantages ``(*B,)``, and its metadata (eq. 7).

        Where the batch has other entries for the policy (goals of its own, ``data.GoalSampler``), these
        are read, also for the advantages.
        """
        actor_batch = batch.for_actor
        if actor_batch is not batch:
            batch, advantage = actor_batch, self.advantage(actor_batch)
        loss, metadata = self.actor_objective(self, batch, advantage)
        loss = loss.to(advantage.dtype)  # hyperparameters widen that of a batch without dimensions
        return self._reduce(loss, batch), {"advantage": advantage} | metadata

    def qvalue_term(self, batch: Batch, td_target: Tensor) -> LossAndMetadata:
        """Sum over critics of their distance to ``td_target``, and its metadata (eq. 6).

        ``metadata["td_error"]`` is the squared error of every critic, ``(K, *B)``, 0 where masked.
        """
        qvalue = self.qvalues(batch)
        check_same_shape(LAST_LAYERS, qvalue=qvalue[0], td_target=td_target)
        target = td_target.expand_as(qvalue)
        loss = F.regression_loss(qvalue, target, loss_function=self.loss_function).sum(0)
        td_error = (qvalue.detach() - target).square()
        mask = batch.mask_like(td_target)
        if mask is not None:
            td_error = td_error.masked_fill(~mask, 0.0)
        return self._reduce(loss, batch), {"td_error": td_error, "qvalue": qvalue.detach()}

    def terms(self, batch: Batch) -> LossesAndMetadata:
        """All three losses, and their joined metadata, with the networks as they are now."""
        target_qvalue = self.target_qvalue(batch)
        td_target = self.td_target(batch)
        loss_value, metadata = self.value_term(batch, target_qvalue, td_target)
        advantage = target_qvalue - metadata["value"]
        loss_actor, actor_metadata = self.actor_term(batch, advantage)
        loss_qvalue, qvalue_metadata = self.qvalue_term(batch, td_target)
        losses = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, "loss_value": loss_value}
        return losses, metadata | actor_metadata | qvalue_metadata

    def value_phase(self, batch: Batch) -> LossesAndMetadata:
        """V's loss, the first of the sequential update; ``"target_qvalue"`` is in the metadata."""
        target_qvalue = self.target_qvalue(batch)
        loss_value, metadata = self.value_term(batch, target_qvalue)
        return {"loss_value": loss_value}, metadata | {"target_qvalue": target_qvalue}

    def policy_phase(self, batch: Batch, target_qvalue: Tensor) -> LossesAndMetadata:
        """The losses of policy and critics, with V as it is after its step."""
        with torch.no_grad():
            value, next_value = self.state_and_next_value(batch)
            advantage = target_qvalue - value
        loss_actor, metadata = self.actor_term(batch, advantage)
        loss_qvalue, qvalue_metadata = self.qvalue_term(batch, self.td_target(batch, next_value))
        losses = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue}
        return losses, metadata | qvalue_metadata

    def _reduce(self, loss: Tensor, batch: Batch) -> Tensor:
        """Reduce per-sample losses; a mask or weight of a step applies to all that it holds."""
        mask, weight = batch.mask_like(loss), batch.weight_like(loss)
        return F.reduce(loss, reduction=self.reduction, mask=mask, weight=weight)

    # -- what is read from a batch, and what is returned ----------------------------------------------

    def prepare_batch(
        self, tensordict: TensorDictBase, draws: Mapping[str, Tensor] | None = None
    ) -> Batch:
        """The batch as the update reads it: :func:`read_batch`, and :meth:`random_inputs`.

        Random tensors that neither ``tensordict`` nor ``draws`` has are drawn here, from torch's
        default generator: so an update reads its batch outside of the compiled program.
        """
        batch = self.read_batch(tensordict)
        inputs = self.random_inputs(batch.data.batch_size)
        return batch.with_draws(inputs, self.parameters(), draws)

    def read_batch(self, tensordict: TensorDictBase) -> Batch:
        """The batch without random tensors."""
        weigh = self.use_prioritized_weights in (True, "auto")
        done = unravel_key(("next", self.tensor_keys.done))
        optional = self.optional_keys | {done}
        batch = read_batch(
            tensordict,
            required=[key for key in self.in_keys if key not in optional],
            mask_keys=self._loss_mask_keys(),
            weight_key=self.tensor_keys.priority_weight if weigh else None,
            done_key=done,
        )
        check_chunks(batch.data, self.tensor_keys.action, self.tensor_keys.reward)
        return batch

    def random_inputs(self, batch_size: torch.Size) -> Mapping[str, Draw]:
        """Random tensors that the losses of a batch need, by the key of the batch that replaces them.

        Those of the ``actor_objective``, and for an encoder with ``random_shift`` ``"image_shift"`` and
        ``"next_image_shift"`` ``(*B, 2)``, uniform on [0, 1).
        """
        needed = dict(self.actor_objective.random_inputs(self.actor_network, batch_size))
        if self.encoder is not None and self.encoder.random_shift:
            shift = Draw(tuple(batch_size), (2,))
            needed |= {IMAGE_SHIFT: shift, NEXT_IMAGE_SHIFT: shift}
        return needed

    @property
    def scalar_names(self) -> list[str]:
        """Names of the scalars that an update computes besides its losses."""
        objective = self.actor_objective
        names = ["entropy"] if objective.has_entropy else []
        if self.diagnostics:
            names += [*DIAGNOSTICS, *(name for _, name in objective.diagnostics)]
        return names

    def summary(self, batch: Batch, metadata: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of an update besides its losses.

        ``priority`` and ``log_prob`` per sample; scalars ``entropy`` and those of ``DIAGNOSTICS``.
        """
        summary = {"priority": metadata["td_error"].amax(0)}
        if "log_prob" in metadata:
            summary["log_prob"] = metadata["log_prob"].detach()
        if self.actor_objective.has_entropy:
            summary["entropy"] = batch.mean(-summary["log_prob"])
        if not self.diagnostics:
            return summary
        advantage = metadata["advantage"]
        weight = metadata.get("weight", torch.ones_like(advantage))
        clipped = metadata.get("clipped", torch.zeros_like(advantage))
        size = F.effective_sample_size(weight, mask=batch.mask_like(weight))
        for key, name in self.actor_objective.diagnostics:
            summary[name] = batch.mean(metadata[key])
        return summary | {
            "advantage_mean": batch.mean(advantage),
            "weight_mean": batch.mean(weight),
            "clip_fraction": batch.mean(clipped.to(weight.dtype)),
            "effective_sample_size": size,
            "qvalue_mean": batch.mean(metadata["qvalue"].mean(0)),
            "value_mean": batch.mean(metadata["value"]),
            "td_error_mean": batch.mean(metadata["td_error"].mean(0)),
        }

    def outputs(
        self, tensordict: TensorDictBase, losses: dict[str, Tensor], summary: dict[str, Tensor]
    ) -> TensorDictBase:
        """A new TensorDict of losses and scalars; priority and log-probability go into the input."""
        scalars = {k: v for k, v in summary.items() if k not in ("priority", "log_prob")}
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

    # -- TorchRL's interface -------------------------------------------------------------------------

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The three losses of a batch, each reaching its own network and no other.

        Reads :attr:`in_keys`; returns ``loss_actor``, ``loss_qvalue``, ``loss_value``,
        ``entropy`` (TorchRL's name for minus the mean log-probability of the dataset actions), and
        with ``diagnostics=True`` the keys of ``DIAGNOSTICS`` and those of the ``actor_objective``.
        Writes the priority (largest squared TD error of the critics) and the log-probability into
        ``tensordict``.
        """
        batch = self.prepare_batch(tensordict)
        losses, metadata = self.terms(batch)
        out = self.outputs(tensordict, losses, self.summary(batch, metadata))
        names = [
            f"{prefix}{name}_params" for name in self.network_names for prefix in ("", "target_")
        ]
        self._clear_weakrefs(tensordict, out, *(name for name in names if name in self._modules))
        return out

    def value_loss(self, tensordict: TensorDictBase) -> LossAndMetadata:
        """:meth:`value_term` of a batch, everything it needs evaluated here."""
        batch = self.prepare_batch(tensordict)
        return self.value_term(batch, self.target_qvalue(batch))

    def actor_loss(self, tensordict: TensorDictBase) -> LossAndMetadata:
        """:meth:`actor_term` of a batch with ``A = min_k Q'_k(s, a) - V(s)``.

        Writes the log-probability of the dataset actions into ``tensordict``, as TorchRL does.
        """
        batch = self.prepare_batch(tensordict)
        loss, metadata = self.actor_term(batch, self.advantage(batch))
        if "log_prob" in metadata:
            tensordict.set(self.tensor_keys.log_prob, metadata["log_prob"].detach())
        return loss, metadata

    def qvalue_loss(self, tensordict: TensorDictBase) -> LossAndMetadata:
        """:meth:`qvalue_term` of a batch with the targets of :meth:`td_target`."""
        batch = self.prepare_batch(tensordict)
        return self.qvalue_term(batch, self.td_target(batch))

    @staticmethod
    def loss_value_diff(diff: Tensor, expectile: float = 0.8) -> Tensor:
        """TorchRL's name for :func:`iql_torchrl.functional.expectile_loss`."""
        return F.expectile_loss(diff, expectile=expectile)

    # -- hyperparameters -----------------------------------------------------------------------------

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """The hyperparameters of both objectives, by ``objective.name``."""
        return {
            f"{kind}.{name}": value
            for kind in ("value_objective", "actor_objective")
            for name, value in getattr(self, kind).hyperparameters.items()
        }

    def load_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Write ``values``, of names as :attr:`hyperparameters` has them; others are ignored."""
        with torch.no_grad():
            for name, value in self.hyperparameters.items():
                if name in values:
                    value.copy_(torch.as_tensor(values[name]))

    @property
    def description(self) -> dict[str, Any]:
        """What identifies this loss in a checkpoint: its choices, and hyperparameters at first."""
        names = {
            kind: name for name, kind in (*VALUE_OBJECTIVES.items(), *ACTOR_OBJECTIVES.items())
        }
        found = {name: getattr(self, name) for name in ("loss_function", "reduction", "actor_ema")}
        for argument in ("value_objective", "actor_objective"):
            objective = getattr(self, argument)
            found[argument] = names.get(type(objective), type(objective).__name__)
            for name, value in objective.description.items():
                found[name if name not in found else f"{argument}.{name}"] = value
        if self.encoder is not None:
            found["encoder_gradient"] = self.encoder.gradient
            found["random_shift"] = self.encoder.random_shift
        return found

    def __getattr__(self, name: str) -> Any:
        if name in ("temperature", "expectile", "max_weight"):
            return getattr(self._objective_with(name), name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("temperature", "expectile", "max_weight"):
            setattr(self._objective_with(name), name, value)
        elif isinstance(value, Objective):  # hyperparameters are where the networks are
            if isinstance(value, ActorObjective):
                self.check_actor_objective(value)
            super().__setattr__(name, value.to(next(self.parameters()).device))
        elif name in ("value_objective", "actor_objective"):
            raise TypeError(
                f"{name} is {value!r}; assign an object, such as losses.Expectile(0.9) or "
                "losses.AdvantageWeighted(temperature=3.0). Names and functions belong to IQLLoss(...)."
            )
        else:
            super().__setattr__(name, value)

    def check_actor_objective(self, objective: ActorObjective) -> None:
        """Raise ``TypeError`` or ``ValueError`` where the objective cannot train this policy."""
        objective.check_actor(self.actor_network)

    def _objective_with(self, name: str) -> Objective:
        objective: Objective = self.value_objective if name == "expectile" else self.actor_objective
        if name not in objective.hyperparameters:
            raise AttributeError(
                f"{type(objective).__name__} has no {name}; its hyperparameters are "
                f"{', '.join(objective.hyperparameters) or 'none'}."
            )
        return objective


# Where to give what IQLLoss has no argument for, by the names that it has elsewhere.
ARGUMENTS_ELSEWHERE = {
    "tau": "the expectile is expectile=, and the averaging rate of the target critics belongs to "
    "SoftUpdate(loss, tau=...)",
    "iql_tau": "the expectile is expectile=",
    "beta": "the inverse temperature is temperature=",
    "polyak": "the averaging rate of the target critics belongs to SoftUpdate(loss, eps=1 - polyak)",
    "discount": "call loss.make_value_estimator(gamma=...)",
    "actor_ema": "call loss.average_actor(decay) before the step is built",
    "num_critics": "the number of critics is num_qvalue_nets=",
}


def _advice(name: str) -> str:
    """The argument ``name`` that the loss lacks, and where it belongs."""
    parts = (*VALUE_OBJECTIVES.values(), *ACTOR_OBJECTIVES.values(), SharedEncoder)
    kinds = [kind.__name__ for kind in parts if name in inspect.signature(kind).parameters]
    own = f"give it to losses.{kinds[0]}({name}=...)" if kinds else None
    close = difflib.get_close_matches(name, inspect.signature(IQLLoss).parameters, 1)
    meant = f"did you mean {close[0]}?" if close else "see help(IQLLoss) for its arguments"
    return f"{name!r}; {ARGUMENTS_ELSEWHERE.get(name) or own or meant}."


def _check_arguments(
    num_qvalue_nets: object,
    value_network: object,
    reduction: str | None,
    scalar_output_mode: str | None,
    gamma: object,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` on arguments that no loss accepts."""
    if gamma is not None:
        raise TypeError(
            f"gamma is {gamma!r}; the discount belongs to the value estimator: call "
            f"loss.make_value_estimator(gamma={gamma!r}) after building the loss."
        )
    if isinstance(num_qvalue_nets, bool) or not isinstance(num_qvalue_nets, int):
        raise TypeError(f"num_qvalue_nets is {num_qvalue_nets!r}; it must be an integer >= 1.")
    if num_qvalue_nets < 1:
        raise ValueError(f"num_qvalue_nets is {num_qvalue_nets}; at least one critic is needed.")
    if value_network is None:
        raise ValueError(
            "value_network is None: IQL needs a state-value network V(s), for the targets of "
            "the critics and for the policy's advantages. Pass a module that writes "
            "'state_value'."
        )
    check_choice("reduction", reduction or "mean", ("mean", "sum", "none"))
    if scalar_output_mode not in (None, "exclude", "non_tensor"):
        raise ValueError(
            f"scalar_output_mode is {scalar_output_mode!r}; choose 'exclude', 'non_tensor' or None."
        )


def _warn_of_left_out_scalars(loss: str) -> None:
    warnings.warn(
        f"{loss} with reduction='none' returns losses of the batch's shape, beside which a scalar "
        "(entropy, diagnostics) has no place: they are left out. Pass scalar_output_mode='exclude' to "
        "say so, or 'non_tensor' to keep them as non-tensor data.",
        UserWarning,
        stacklevel=4,
    )
