"""Implicit Q-Learning as TorchRL loss modules: :class:`IQLLoss` and :class:`DiscreteIQLLoss`."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictParams,
    dispatch,
)
from tensordict.utils import unravel_key
from torch import Tensor, distributions, nn
from torchrl.data.tensor_specs import TensorSpec
from torchrl.data.utils import _find_action_space
from torchrl.modules import MaskedOneHotCategorical, OneHotCategorical
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import (
    _GAMMA_LMBDA_DEPREC_ERROR,
    ValueEstimators,
    _vmap_func,
    dispatch_value_estimator,
)
from torchrl.objectives.value import TD0Estimator, ValueEstimatorBase

from iql_torchrl import functional as F
from iql_torchrl.critics import (
    Critics,
    SharedLeaves,
    initialise_critics,
    list_critics,
    unlocked,
)
from iql_torchrl.reading import Batch, per_sample, read_batch

__all__ = ["DiscreteIQLLoss", "IQLLoss", "ImplicitQLoss"]

ONE_HOT_DISTRIBUTIONS = (
    OneHotCategorical,
    MaskedOneHotCategorical,
    distributions.OneHotCategorical,
)
ActorObjective = str | Callable[[TensorDictModule, TensorDictBase], Tensor]
VALUE_OBJECTIVES = ("expectile", "quantile", "sarsa_expectile")
ACTOR_OBJECTIVES = ("log_prob", "mse")
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


class ImplicitQLoss(LossModule):
    """What :class:`IQLLoss` and :class:`DiscreteIQLLoss` share; abstract."""

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

    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: Critics,
        value_network: TensorDictModule,
        *,
        num_qvalue_nets: int = 2,
        loss_function: str = "l2",
        temperature: float = 3.0,
        expectile: float = 0.7,
        max_weight: float = 100.0,
        value_objective: str = "expectile",
        actor_objective: ActorObjective = "log_prob",
        diagnostics: bool = False,
        separate_losses: bool = False,
        reduction: str | None = None,
        deactivate_vmap: bool = False,
        scalar_output_mode: str | None = None,
        priority_key: str | None = None,
        gamma: float | None = None,
    ) -> None:
        self._in_keys: list[NestedKey] | None = None
        super().__init__()
        self._set_deprecated_ctor_keys(priority=priority_key)
        if gamma is not None:
            raise TypeError(_GAMMA_LMBDA_DEPREC_ERROR)
        _check_ranges(expectile, temperature, max_weight, num_qvalue_nets)
        _check_choice("loss_function", loss_function, tuple(F.REGRESSION_LOSSES))
        _check_choice("value_objective", value_objective, VALUE_OBJECTIVES)
        if not callable(actor_objective):
            _check_choice("actor_objective", actor_objective, ACTOR_OBJECTIVES)
        _check_choice("reduction", reduction or "mean", ("mean", "sum", "none"))
        if value_network is None:
            raise ValueError(
                "value_network is None: IQL needs a state-value network V(s), for the targets of "
                "the critics and for the policy's advantages. Pass a module that writes "
                "'state_value'."
            )
        self.num_qvalue_nets = num_qvalue_nets
        self.loss_function = loss_function
        self.temperature = temperature
        self.expectile = expectile
        self.max_weight = max_weight
        self.value_objective = value_objective
        self.actor_objective = actor_objective
        self.diagnostics = diagnostics
        self.delay_qvalue = True
        self.deactivate_vmap = deactivate_vmap
        self.reduction = reduction or "mean"
        self.scalar_output_mode = _scalar_mode(self, scalar_output_mode)
        self._convert(actor_network, qvalue_network, value_network, separate_losses)
        self._make_vmap()
        entropy = ("entropy",) if actor_objective == "log_prob" else ()
        self._out_keys = [*LOSSES, *entropy, *(DIAGNOSTICS if diagnostics else ())]
        self._out_keys_apparent = self._out_keys

    # -- networks ------------------------------------------------------------------------------

    def _convert(
        self,
        actor: nn.Module,
        critics: Critics,
        value: nn.Module,
        separate_losses: bool,
    ) -> None:
        listed = list_critics(critics, self.num_qvalue_nets)
        modules = listed if isinstance(listed, list) else [listed]
        shared = SharedLeaves()
        if separate_losses:
            owners: dict[str, nn.Module] = {"actor_network": actor}
            shared.find_trunk("value_network", [value], owners)
            owners["value_network"] = value
            shared.find_trunk("qvalue_network", modules, owners)
        self.convert_to_functional(actor, "actor_network")
        self.convert_to_functional(
            value,
            "value_network",
            compare_against=list(actor.parameters()) if separate_losses else None,
        )
        self.convert_to_functional(
            listed,
            "qvalue_network",
            None if self.num_qvalue_nets == 1 else self.num_qvalue_nets,
            create_target_params=True,
            compare_against=(
                [*actor.parameters(), *value.parameters()] if separate_losses else None
            ),
        )
        if self.num_qvalue_nets > 1 and not isinstance(listed, list):
            initialise_critics(
                self.qvalue_network_params, self._modules["target_qvalue_network_params"], listed
            )
        shared.install(self)
        shared.find_buffers("qvalue_network", self.qvalue_network_params)
        shared.tie(self)
        self._shared = shared
        if self.num_qvalue_nets == 1:
            self.register_load_state_dict_pre_hook(_squeeze_lone_critic)

    def _make_vmap(self) -> None:
        self._vmap_qvalue_network = _vmap_func(
            self.qvalue_network,
            (None, 0),
            randomness=self.vmap_randomness,
            pseudo_vmap=self.deactivate_vmap,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> ImplicitQLoss:
        super()._apply(fn, *args, **kwargs)
        self._shared.tie(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_vmap_qvalue_network"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._shared.tie(self)
        self._make_vmap()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, **kwargs: Any
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters to optimise, each once: mirrors of a shared trunk are left out."""
        mirrors = self._shared.mirrors(self) if "_shared" in self.__dict__ else set()
        for name, parameter in super().named_parameters(prefix, recurse, **kwargs):
            if id(parameter) not in mirrors:
                yield name, parameter

    # -- keys ----------------------------------------------------------------------------------

    def _set_in_keys(self) -> None:
        keys = self.tensor_keys
        names = [
            keys.action,
            *(("next", key) for key in (keys.reward, keys.done, keys.terminated)),
            *self.actor_network.in_keys,
            *self.qvalue_network.in_keys,
            *self.value_network.in_keys,
            *(("next", key) for key in self.value_network.in_keys),
        ]
        self._in_keys = list(dict.fromkeys(unravel_key(name) for name in names))

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys that :meth:`forward` reads; ``("next", ...)`` ones only for V."""
        if self._in_keys is None:
            self._set_in_keys()
        assert self._in_keys is not None
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    def make_value_estimator(
        self, value_type: ValueEstimators | ValueEstimatorBase | None = None, **hyperparams: Any
    ) -> ImplicitQLoss:
        """Choose how the critics' targets are made: TD(0) (default), TD(1), TD(lambda), or your own.

        ``loss.make_value_estimator(gamma=0.97)`` sets the discount (TorchRL's default is 0.99).
        Raises ``NotImplementedError`` on an estimator that needs an on-policy log.
        """
        value_type = value_type or self.default_value_estimator
        if isinstance(value_type, ValueEstimatorBase | type):
            return super().make_value_estimator(value_type, **hyperparams)
        keys = self.tensor_keys
        dispatch_value_estimator(
            self,
            value_type,
            supported=self.SUPPORTED_VALUE_ESTIMATORS,
            tensor_keys={
                "value_target": "value_target",
                "value": keys.value,
                "reward": keys.reward,
                "done": keys.done,
                "terminated": keys.terminated,
            },
            **hyperparams,
        )
        return self

    # -- quantities, each evaluated once an update ----------------------------------------------

    def read(self, tensordict: TensorDictBase) -> Batch:
        """The batch as the update reads it: see :func:`iql_torchrl.reading.read_batch`."""
        weigh = self.use_prioritized_weights in (True, "auto")
        done = unravel_key(("next", self.tensor_keys.done))
        return read_batch(
            tensordict,
            required=[key for key in self.in_keys if key != done],
            mask_keys=self._loss_mask_keys(),
            weight_key=self.tensor_keys.priority_weight if weigh else None,
            done_key=done,
        )

    def target_qvalue(self, batch: Batch) -> Tensor:
        """Minimum over the target critics of ``Q(s, a)``, shape ``(*B,)``, without gradient."""
        params = self._modules["target_qvalue_network_params"]
        with torch.no_grad():
            params = self._shared.with_spare_buffers("qvalue_network", params)
            return self.action_values(batch, params).amin(0)

    def qvalue(self, batch: Batch) -> Tensor:
        """``Q_k(s, a)`` of every critic, shape ``(K, *B)``, with gradient."""
        params = self._shared.without_gradient("qvalue_network", self.qvalue_network_params)
        return self.action_values(batch, params)

    def state_value(self, batch: Batch) -> Tensor:
        """``V(s)``, shape ``(*B,)``, with gradient."""
        key = self.tensor_keys.value
        params = self._shared.without_gradient("value_network", self.value_network_params)
        inputs = batch.data.select(*self.value_network.in_keys)
        with params.to_module(self.value_network, preserve_module_state=False):
            value = self.value_network(inputs).get(key)
        return per_sample(value, inputs.batch_size, key)

    def td_target(self, batch: Batch) -> Tensor:
        """Regression target of the critics, shape ``(*B,)``, without gradient.

        ``r + gamma V(s')``, bootstrapped past truncation and not past termination; with
        ``steps_to_next_obs`` in the batch (n-step rewards) the discount is ``gamma**n``.
        """
        estimator = self.value_estimator
        keys, data = self.tensor_keys, batch.data
        shape = data.batch_size
        with torch.no_grad():
            if type(estimator) is not TD0Estimator or estimator.average_rewards:
                target = estimator.value_estimate(
                    data.copy(), target_params=self.target_value_network_params
                )
                return per_sample(target, shape, "value_target")
            reward, terminated = (
                per_sample(data.get(("next", key)), shape, ("next", key))
                for key in (keys.reward, keys.terminated)
            )
            gamma = estimator.gamma.to(reward.device)
            steps = data.get("steps_to_next_obs", None)
            if steps is not None:
                gamma = gamma ** per_sample(steps, shape, "steps_to_next_obs")
            return F.td_target(reward, self.state_value(batch.next), terminated, gamma=gamma)

    def critic_outputs(self, batch: Batch, params: TensorDictBase) -> Tensor:
        """Raw outputs of K critics with stacked ``params``, shape ``(K, *B, n)``."""
        inputs = batch.data.select(*self.qvalue_network.in_keys)
        key = self.tensor_keys.state_action_value
        if self.num_qvalue_nets > 1:
            if torch.compiler.is_compiling():  # vmap would lock anew, which warns in a graph
                params = unlocked(params)
            return self._vmap_qvalue_network(inputs, params).get(key)
        with params.to_module(self.qvalue_network, preserve_module_state=False):
            return self.qvalue_network(inputs).get(key).unsqueeze(0)

    @abstractmethod
    def action_values(self, batch: Batch, params: TensorDictBase) -> Tensor:
        """``Q_k(s, a)`` of the logged action from K critics with stacked ``params``, ``(K, *B)``."""

    def logged_action(self, batch: Batch, dist: distributions.Distribution) -> Tensor:
        """The logged action in the form that ``dist.log_prob`` takes."""
        return batch.data.get(self.tensor_keys.action)

    # -- one term per network --------------------------------------------------------------------

    def value_term(
        self, batch: Batch, target_qvalue: Tensor, td_target: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of V given the quantities it regresses on, and its metadata (eq. 5).

        ``"expectile"``: asymmetric squared error of ``min_k Q_k(s, a) - V(s)``. ``"quantile"``:
        pinball loss of the same. ``"sarsa_expectile"``: asymmetric squared error of
        ``r + gamma V(s') - V(s)``, which asks no critic.
        """
        value = self.state_value(batch)
        if self.value_objective == "sarsa_expectile":
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
        loss, weighted the same way.
        """
        weight = F.exponential_weight(
            advantage, temperature=self.temperature, max_weight=self.max_weight
        )
        metadata = {"advantage": advantage, "weight": weight}
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            error = self._actor_error(batch)
        if self.actor_objective == "log_prob":
            metadata["log_prob"] = -error.detach()
        return self._reduce(weight * error, batch), metadata

    def _actor_error(self, batch: Batch) -> Tensor:
        data = batch.data
        if callable(self.actor_objective):
            error = self.actor_objective(self.actor_network, data.copy())
            return per_sample(error, data.batch_size, "actor_objective's result")
        inputs = data.select(*self.actor_network.in_keys)
        if self.actor_objective == "mse":
            error = self.actor_network(inputs).get(self.tensor_keys.action)
            return (error - data.get(self.tensor_keys.action)).square().sum(-1)
        dist = self.actor_network.get_dist(inputs)
        log_prob = dist.log_prob(self.logged_action(batch, dist))
        return -per_sample(log_prob, data.batch_size, "log_prob")

    def qvalue_term(self, batch: Batch, td_target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over critics of their distance to ``td_target``, and its metadata (eq. 6).

        ``metadata["td_error"]`` is the squared error of every critic, ``(K, *B)``, 0 where masked.
        """
        qvalue = self.qvalue(batch)
        target = td_target.expand_as(qvalue)
        loss = F.regression_loss(qvalue, target, loss_function=self.loss_function).sum(0)
        td_error = (qvalue.detach() - target).square()
        if batch.mask is not None:
            td_error = td_error.masked_fill(~batch.mask, 0.0)
        return self._reduce(loss, batch), {"td_error": td_error, "qvalue": qvalue.detach()}

    def terms(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All three losses from at most five network evaluations, and their joined metadata."""
        target_qvalue = self.target_qvalue(batch)
        td_target = self.td_target(batch)
        loss_value, about_value = self.value_term(batch, target_qvalue, td_target)
        loss_actor, about_actor = self.actor_term(batch, target_qvalue - about_value["value"])
        loss_qvalue, about_qvalue = self.qvalue_term(batch, td_target)
        losses = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, "loss_value": loss_value}
        return losses, about_value | about_actor | about_qvalue

    def _reduce(self, loss: Tensor, batch: Batch) -> Tensor:
        return F.reduce(loss, reduction=self.reduction, mask=batch.mask, weight=batch.weight)

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
        with ``diagnostics=True`` the keys of ``DIAGNOSTICS``. Writes the priority (largest
        squared TD error of the critics) and the log-probability into ``tensordict``.
        """
        batch = self.read(tensordict)
        losses, metadata = self.terms(batch)
        out = self.outputs(tensordict, batch, losses, metadata)
        self._clear_weakrefs(
            tensordict,
            out,
            *(f"{network}_network_params" for network in ("actor", "qvalue", "value")),
            "target_qvalue_network_params",
        )
        return out

    def outputs(
        self,
        tensordict: TensorDictBase,
        batch: Batch,
        losses: dict[str, Tensor],
        metadata: dict[str, Tensor],
    ) -> TensorDictBase:
        """Write what ``tensordict`` is owed, and gather losses and scalars into a new TensorDict."""
        tensordict.set(self.tensor_keys.priority, metadata["td_error"].amax(0))
        scalars = {}
        if "log_prob" in metadata:
            tensordict.set(self.tensor_keys.log_prob, metadata["log_prob"])
            scalars["entropy"] = F.weighted_mean(-metadata["log_prob"], mask=batch.mask)
        if self.diagnostics:
            scalars |= self._diagnose(metadata, batch.mask)
        if self.reduction != "none":
            return TensorDict(losses | scalars)
        out = TensorDict(losses, batch_size=tensordict.batch_size)
        if self.scalar_output_mode == "non_tensor":
            for key, scalar in scalars.items():
                out.set_non_tensor(key, scalar)
        return out

    def _diagnose(self, metadata: dict[str, Tensor], mask: Tensor | None) -> dict[str, Tensor]:
        weight = metadata["weight"]
        at_ceiling = (weight >= self.max_weight).to(weight.dtype)

        def mean(value: Tensor) -> Tensor:
            return F.weighted_mean(value, mask=mask)

        return {
            "advantage_mean": mean(metadata["advantage"]),
            "weight_mean": mean(weight),
            "weight_at_ceiling": mean(at_ceiling),
            "effective_sample_size": F.effective_sample_size(weight, mask=mask),
            "qvalue_mean": mean(metadata["qvalue"].mean(0)),
            "value_mean": mean(metadata["value"]),
            "td_error_mean": mean(metadata["td_error"].mean(0)),
        }


class IQLLoss(ImplicitQLoss):
    r"""Implicit Q-Learning for critics of state and action (Kostrikov et al. 2021).

    Learns from logged steps ``(s, a, r, s')`` alone; no action outside the log is ever valued.
    With target critics ``Q'`` and ``A = min_k Q'_k(s, a) - V(s)``:

    - ``loss_value``: ``|expectile - 1(A < 0)| A**2``, so V becomes an upper expectile of Q over
      the log's actions (eq. 5);
    - ``loss_qvalue``: ``sum_k d(Q_k(s, a), r + gamma V(s'))``, nothing past termination (eq. 6);
    - ``loss_actor``: ``-min(exp(temperature A), max_weight) log pi(a|s)`` (eq. 7).

    Drop-in for ``torchrl.objectives.IQLLoss`` of TorchRL 0.14, with the paper's defaults.

    Args:
        actor_network: policy with ``get_dist`` (any TensorDictModule for other objectives).
        qvalue_network: Q(s, a), one output. A module alone is critic 0 with its weights kept and
            the others are drawn at its scale (:func:`iql_torchrl.critics.draw_critics`); a list,
            or a function called once per critic, keeps every initialisation.
        value_network: V(s), one output. May read other keys than the actor.

    Keyword Args:
        num_qvalue_nets: number of critics K >= 1.
        loss_function: distance of the critics: ``"l2"`` (the paper's), ``"l1"``, ``"smooth_l1"``.
        temperature: inverse temperature beta >= 0. 0 is behaviour cloning; larger is greedier.
        expectile: tau in (0, 1]. 0.5 values the log's policy; towards 1, its best actions.
        max_weight: ceiling of a sample's weight, > 0.
        value_objective: ``"expectile"``, ``"quantile"`` or ``"sarsa_expectile"``
            (:meth:`value_term`).
        actor_objective: ``"log_prob"``, ``"mse"`` for deterministic actors, or a callable
            ``(actor, batch) -> per-sample loss (*B,)``.
        diagnostics: add the means that tell whether training is healthy (``DIAGNOSTICS``).
        separate_losses: parameters shared with the actor learn from the actor's loss alone.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.
        deactivate_vmap: evaluate the critics in a loop.
        scalar_output_mode: with ``reduction="none"``, ``"exclude"`` or ``"non_tensor"`` scalars.
        priority_key, gamma: refused as in TorchRL; use ``set_keys`` and ``make_value_estimator``.

    Raises:
        ValueError: a value out of range or an unknown name (the message shows it).
        TypeError: ``gamma`` given, or ``qvalue_network`` is no module, list or function.
    """

    def action_values(self, batch: Batch, params: TensorDictBase) -> Tensor:
        outputs = self.critic_outputs(batch, params)
        return per_sample(outputs, batch.data.batch_size, self.tensor_keys.state_action_value)

    @staticmethod
    def loss_value_diff(diff: Tensor, expectile: float = 0.8) -> Tensor:
        """TorchRL's name for :func:`iql_torchrl.functional.expectile_loss`."""
        return F.expectile_loss(diff, expectile=expectile)


class DiscreteIQLLoss(ImplicitQLoss):
    """IQL when the critic returns one value per action: ``(*B, N)``, N >= 2.

    The logged action is an index, ``(*B,)`` or ``(*B, 1)``, or one-hot ``(*B, N)``, whatever the
    policy's distribution takes. All else is :class:`IQLLoss`'s.

    Keyword Args:
        action_space: ``"categorical"``, ``"one-hot"`` or a TorchRL spec; documents the data, which
            is recognised by shape in any case. Other spaces are refused with ``ValueError``.
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: Critics,
        value_network: TensorDictModule,
        *,
        action_space: str | TensorSpec | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("actor_objective") == "mse":
            raise ValueError("actor_objective='mse' needs continuous actions; these are discrete.")
        super().__init__(actor_network, qvalue_network, value_network, **kwargs)
        self.action_space = _find_action_space(action_space or "categorical")
        if self.action_space not in ("categorical", "one_hot"):
            raise ValueError(
                f"action_space is {action_space!r}; choose 'categorical' or 'one-hot': one action "
                "out of N per step."
            )

    def action_values(self, batch: Batch, params: TensorDictBase) -> Tensor:
        outputs = self.critic_outputs(batch, params)
        picked = F.pick_action(outputs, self._action(batch))
        return per_sample(picked, batch.data.batch_size, self.tensor_keys.state_action_value)

    def _action(self, batch: Batch) -> Tensor:
        """The logged action with an unambiguous last dimension, ``(*B, 1)`` or ``(*B, N)``."""
        action = batch.data.get(self.tensor_keys.action)
        return action.unsqueeze(-1) if action.shape == batch.data.batch_size else action

    def logged_action(self, batch: Batch, dist: distributions.Distribution) -> Tensor:
        action = self._action(batch)
        is_one_hot = action.shape[-1] > 1
        wants_one_hot = isinstance(dist, ONE_HOT_DISTRIBUTIONS)
        if is_one_hot and not wants_one_hot:
            return action.long().argmax(-1)
        if wants_one_hot and not is_one_hot:
            return nn.functional.one_hot(action.squeeze(-1).long(), dist.param_shape[-1])  # type: ignore[attr-defined]
        return action if is_one_hot else action.squeeze(-1)


def _check_ranges(
    expectile: float, temperature: float, max_weight: float, num_qvalue_nets: int
) -> None:
    if not 0 < expectile <= 1:
        raise ValueError(
            f"expectile is {expectile}; it must lie in (0, 1]: 0.5 values the log's policy, 0.7 to "
            "0.9 its better actions."
        )
    if not temperature >= 0:
        raise ValueError(
            f"temperature is {temperature}; it must be >= 0: 0 is behaviour cloning, and a negative "
            "one would prefer the log's worst actions."
        )
    if not max_weight > 0:
        raise ValueError(f"max_weight is {max_weight}; it must be > 0 (the paper's is 100).")
    if num_qvalue_nets < 1:
        raise ValueError(f"num_qvalue_nets is {num_qvalue_nets}; IQL needs at least one critic.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def _scalar_mode(loss: ImplicitQLoss, mode: str | None) -> str | None:
    if loss.reduction != "none" or mode is not None:
        return mode
    warnings.warn(
        f"{type(loss).__name__} with reduction='none' returns losses of the batch's shape, beside "
        "which a scalar (entropy, diagnostics) has no place: they are left out. Pass "
        "scalar_output_mode='exclude' to say so, or 'non_tensor' to keep them as non-tensor data.",
        UserWarning,
        stacklevel=4,
    )
    return "exclude"


def _squeeze_lone_critic(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Accept checkpoints of older TorchRL losses, where a single critic had a leading dimension."""
    for key, current in module.state_dict().items():
        stored = state_dict.get(prefix + key)
        is_critic = key.removeprefix("target_").startswith("qvalue_network_params.")
        if is_critic and stored is not None and stored.shape == (1, *current.shape):
            state_dict[prefix + key] = stored.squeeze(0)
