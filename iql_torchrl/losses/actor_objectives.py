"""How the policy is extracted from Q and V: one small module for each objective.

A new objective is a class with a ``forward``: see :class:`ActorObjective`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.modules import Delta

from iql_torchrl import functional as F
from iql_torchrl.config import IQLConfig, check_choice, config_settings
from iql_torchrl.losses.batch import (
    FLOW_DROP,
    FLOW_NOISE,
    FLOW_TIME,
    LAST_LAYERS,
    Batch,
    Draw,
    check_action,
    check_same_shape,
    per_sample,
)
from iql_torchrl.losses.objective import Objective, as_objective
from iql_torchrl.networks import join_observations

if TYPE_CHECKING:
    from iql_torchrl.losses.networks import NetworkLoss

OfAdvantage = str | Callable[[Tensor], Tensor]
Result = tuple[Tensor, dict[str, Tensor]]
SMALLEST_SCALE = 1e-6
SOURCES = ("online", "target")


class ActorObjective(Objective):
    """The loss of the policy at each sample; abstract.

    ``forward(networks, batch, advantage)`` returns the loss of each sample, ``(*B,)``, and metadata:
    tensors by name that other parts read. ``networks`` is the loss, which evaluates its networks:
    ``log_prob(batch)``, ``policy_output(batch)``, ``qvalues(batch)``, ``actor(batch)``. ``advantage``
    ``(*B,)`` has no gradient. Metadata of these names is used: ``"weight"`` ``(*B,)`` (mean and
    effective sample size are diagnostics) and ``"log_prob"`` ``(*B,)`` (written into the batch; with
    ``has_entropy`` its negated mean is ``"entropy"``).

    Class attributes that a subclass may set: ``diagnostics``, names of metadata ``(*B,)`` whose means
    are outputs of a loss with ``diagnostics=True``, and the names of these outputs; ``has_entropy``,
    True where ``forward`` always returns ``"log_prob"``, so that ``"entropy"`` is an output;
    ``needs_continuous_actions``, False where discrete actions can be trained too.
    """

    diagnostics: tuple[tuple[str, str], ...] = ()  # names of metadata and of the outputs
    has_entropy = False
    needs_continuous_actions = True

    def check_actor(self, actor: Any) -> None:
        """Raise ``TypeError`` where this objective cannot train the policy ``actor``."""
        if hasattr(actor, "velocity"):
            fitting = "conditioned_flow" if getattr(actor, "conditioned", False) else "flow"
            raise TypeError(
                f"actor_objective is {type(self).__name__} and actor_network is a "
                f"{type(actor).__name__}, which has no density; train it with "
                f"actor_objective={fitting!r}."
            )

    def random_inputs(self, actor: Any, batch_size: Sequence[int]) -> Mapping[str, Draw]:
        """Random tensors that ``forward`` reads from ``batch.draws``, by name; none by default."""
        return {}

    @abstractmethod
    def forward(self, networks: NetworkLoss, batch: Batch, advantage: Tensor) -> Result:
        """Return the loss of each sample, ``(*B,)``, and metadata."""


class WeightedRegression(ActorObjective):
    """Regression of the policy on dataset actions, weighted by their advantage A; abstract.

    Args:
        temperature: inverse temperature beta >= 0 of ``"exponential"``. 0 is behaviour cloning;
            larger is greedier.
        max_weight: a weight is clipped to it, > 0.
        weight: ``"exponential"``, ``min(exp(temperature A), max_weight)`` (eq. 7); ``"positive"``,
            ``min(max(A, 0), max_weight)``; ``"sparse"``, ``min(max(1 + A / (2 alpha), 0),
            max_weight)``; or a function ``(advantage (*B,)) -> weight (*B,)`` of yours, which leaves
            the numbers unused.
        alpha: of ``"sparse"``, > 0, in units of the values.

    A subclass defines :meth:`error`.
    """

    temperature: Tensor
    max_weight: Tensor
    alpha: Tensor

    def __init__(
        self,
        temperature: float = IQLConfig.temperature,
        max_weight: float = IQLConfig.max_weight,
        weight: OfAdvantage = "exponential",
        alpha: float = IQLConfig.alpha,
    ) -> None:
        super().__init__(temperature=temperature, max_weight=max_weight, alpha=alpha)
        if not callable(weight):
            check_choice(
                "weight", weight, config_settings(IQLConfig)["advantage_weight"].choices[1:]
            )
        self.weight = weight

    @abstractmethod
    def error(self, networks: NetworkLoss, batch: Batch) -> Result:
        """Return the policy's error at each dataset action, ``(*B,)``, and metadata."""

    def weight_of(self, advantage: Tensor) -> Tensor:
        """Weights ``(*B,)`` of samples with these advantages, without gradient."""
        if not isinstance(self.weight, str):
            return of_advantage(self.weight, advantage, "weight")
        if self.weight == "positive":
            return F.positive_weight(advantage, max_weight=self.max_weight)
        if self.weight == "sparse":
            return F.sparse_weight(advantage, alpha=self.alpha, max_weight=self.max_weight)
        return F.exponential_weight(
            advantage, temperature=self.temperature, max_weight=self.max_weight
        )

    def forward(self, networks: NetworkLoss, batch: Batch, advantage: Tensor) -> Result:
        weight = self.weight_of(advantage)
        error, metadata = self.error(networks, batch)
        check_same_shape(
            "Sum a log-probability over the dimensions of the action "
            "(torch.distributions.Independent(distribution, 1)).",
            policy_error=error,
            advantage=advantage,
        )
        clipped = weight >= self.max_weight
        if not isinstance(self.weight, str):
            clipped = torch.zeros_like(clipped)  # a function of yours has no clip
        return weight * error, metadata | {"weight": weight, "clipped": clipped}


class AdvantageWeighted(WeightedRegression):
    """``-w log pi(a|s)``: the paper's objective (eq. 7)."""

    has_entropy = True
    needs_continuous_actions = False

    def check_actor(self, actor: Any) -> None:
        super().check_actor(actor)
        if not hasattr(actor, "get_dist"):
            raise TypeError(
                f"actor_network is {type(actor).__name__}, which has no distribution (get_dist); "
                "expected a TorchRL ProbabilisticActor, or actor_objective='mse' for a policy that "
                "gives the action itself."
            )

    def error(self, networks: NetworkLoss, batch: Batch) -> Result:
        log_prob = networks.log_prob(batch)
        return -log_prob, {"log_prob": log_prob.detach()}


class WeightedSquaredError(WeightedRegression):
    """``w |pi(s) - a|**2``, summed over action dimensions: for deterministic policies."""

    def error(self, networks: NetworkLoss, batch: Batch) -> Result:
        action = networks.policy_action(batch)
        logged = batch.data.get(networks.tensor_keys.action)
        check_action(networks.tensor_keys.action, logged, action.shape)
        error = where_valid(networks.valid_action_mask(batch), (action - logged).square())
        return (error if error.ndim == batch.data.ndim else error.sum(-1)), {}


class WeightedFunction(WeightedRegression):
    """``w`` times a function ``(actor, batch) -> error (*B,)`` of yours."""

    needs_continuous_actions = False

    def __init__(
        self,
        function: Callable[[TensorDictModule, TensorDictBase], Tensor],
        temperature: float = IQLConfig.temperature,
        max_weight: float = IQLConfig.max_weight,
        weight: OfAdvantage = "exponential",
        alpha: float = IQLConfig.alpha,
    ) -> None:
        super().__init__(temperature, max_weight, weight, alpha)
        self.function = function

    def check_actor(self, actor: Any) -> None:
        """Accept every policy."""

    def error(self, networks: NetworkLoss, batch: Batch) -> Result:
        with networks.actor() as actor:
            error = self.function(actor, networks.inputs(batch).copy())
        return per_sample(error, batch.data.batch_size, "actor_objective's result"), {}


class FlowMatching(WeightedRegression):
    """Conditional flow matching of ``policies.flow``, weighted.

    ``w`` times the mean over action dimensions of ``(v(s, x_t, t) - (a - noise))**2`` with ``x_t = (1 -
    t) noise + t a`` (Lipman et al. 2023, arXiv:2210.02747). Noise ``(*B, A)`` and time ``(*B,)`` are
    drawn when the batch is read, or are its entries ``"flow_noise"`` and ``"flow_time"``.
    ``temperature=0`` is behaviour cloning; with ``policies.best_of`` that is IFQL (Park, Li, Levine
    2025, arXiv:2502.02538).
    """

    def check_actor(self, actor: Any) -> None:
        check_flow(self, actor, conditioned=False)

    def random_inputs(self, actor: Any, batch_size: Sequence[int]) -> Mapping[str, Draw]:
        return flow_draws(actor, batch_size)

    def error(self, networks: NetworkLoss, batch: Batch) -> Result:
        return flow_error(networks, batch), {}


class ConditionedFlow(ActorObjective):
    """:class:`FlowMatching` of ``v(s, x_t, t, c)`` without weights: c says how good the action is.

    Frans, Park, Abbeel, Levine 2025, "Diffusion Guidance Is a Controllable Policy Improvement Operator"
    (arXiv:2505.23458), whose code drops a tenth of the conditions.

    Args:
        condition: the flow's input for a sample's advantage: ``"positive"``, 1 where A > 0, else 0;
            or a function ``(advantage (*B,)) -> (*B,)``, which should give 1 to the actions that the
            policy is to prefer.
        condition_dropout: probability in (0, 1) that a sample's condition is unknown: where a uniform
            number, the batch's entry ``"flow_drop"`` ``(*B,)`` if it has one, is below it.
    """

    diagnostics = (("condition", "condition_mean"),)
    condition_dropout: Tensor

    def __init__(
        self,
        condition_dropout: float = IQLConfig.condition_dropout,
        condition: OfAdvantage = "positive",
    ) -> None:
        super().__init__(condition_dropout=condition_dropout)
        if not callable(condition):
            check_choice("condition", condition, ("positive",))
        self.condition = condition

    def check_actor(self, actor: Any) -> None:
        check_flow(self, actor, conditioned=True)

    def random_inputs(self, actor: Any, batch_size: Sequence[int]) -> Mapping[str, Draw]:
        return {**flow_draws(actor, batch_size), FLOW_DROP: Draw(tuple(batch_size))}

    def condition_of(self, advantage: Tensor) -> Tensor:
        """The condition of samples with these advantages, ``(*B,)``, without gradient."""
        if not isinstance(self.condition, str):
            return of_advantage(self.condition, advantage, "condition")
        return (advantage > 0).to(advantage.dtype)

    def forward(self, networks: NetworkLoss, batch: Batch, advantage: Tensor) -> Result:
        condition = self.condition_of(advantage)
        known = batch.draws[FLOW_DROP] >= self.condition_dropout
        error = flow_error(networks, batch, F.condition_input(condition, known))
        return error, {"condition": condition}


class DDPGBC(ActorObjective):
    """``-Q(s, pi(s)) / mean|Q(s, pi(s))| + bc_weight`` times the cloning error (DDPG+BC).

    The cloning error is minus the log-probability of the dataset action, or ``|pi(s) - a|**2`` (a sum)
    where the policy has no density. ``pi(s)`` is the deterministic action, which OGBench's code uses
    for policies with a constant scale: no random numbers. No gradient reaches the critics. Fujimoto
    and Gu 2021 (arXiv:2106.06860), eq. 3 to 5; extraction after IQL: Park, Frans, Levine, Kumar 2024
    (arXiv:2406.09329).

    It is known to exploit errors of the critics at actions outside of the dataset; on small datasets
    weighted regression can be better. A learned scale lets the log-probability outweigh Q as it
    shrinks: compare several ``bc_weight``.

    Args:
        bc_weight: weight of the cloning error, >= 0.
        q_reduction: ``"min"`` or ``"mean"`` over the critics.
        q_source: ``"online"`` or ``"target"`` critics.

    Its diagnostic ``policy_value_gap`` is the mean of ``min_k Q_k(s, pi(s)) - min_k Q_k(s, a)`` of the
    critics of ``q_source``. It grows where the policy exploits errors of the critics.
    """

    diagnostics = (("policy_value_gap", "policy_value_gap"),)
    bc_weight: Tensor

    def __init__(
        self,
        bc_weight: float = IQLConfig.bc_weight,
        q_reduction: str = "min",
        q_source: str = "online",
    ) -> None:
        super().__init__(bc_weight=bc_weight)
        check_choice("q_reduction", q_reduction, ("min", "mean"))
        check_choice("q_source", q_source, SOURCES)
        self.q_reduction, self.q_source = q_reduction, q_source

    def forward(self, networks: NetworkLoss, batch: Batch, advantage: Tensor) -> Result:
        action, dist = networks.policy_output(batch)
        logged = batch.data.get(networks.tensor_keys.action)
        check_action(networks.tensor_keys.action, logged, action.shape)
        qvalues = networks.qvalues(batch, self.q_source, action=action)
        q = qvalues.amin(0) if self.q_reduction == "min" else qvalues.mean(0)
        scale = batch.mean(q.detach().abs()) + SMALLEST_SCALE
        if dist is None or isinstance(dist, Delta):
            error = (action - logged).square()
            error = where_valid(networks.valid_action_mask(batch), error).sum(-1)
        else:
            error = -networks.log_prob(batch, dist)
        check_same_shape(LAST_LAYERS, value_of_policy=q, cloning_error=error)
        metadata = {}
        if networks.diagnostics:
            with torch.no_grad():
                of_dataset = networks.qvalues(batch, self.q_source).amin(0)
            metadata["policy_value_gap"] = qvalues.detach().amin(0) - of_dataset
        return self.bc_weight * error - q / scale, metadata


# -- what several objectives compute --------------------------------------------------------------


def of_advantage(function: Callable[[Tensor], Tensor], advantage: Tensor, name: str) -> Tensor:
    """What a function of the user's gives for advantages ``(*B,)``, without gradient."""
    result = per_sample(function(advantage), advantage.shape, f"{name}'s result")
    return result.detach().to(advantage.dtype)


def where_valid(mask: Tensor | None, error: Tensor) -> Tensor:
    """``error`` with zeros where ``mask`` is false."""
    return error if mask is None else error.where(mask, 0)


def flow_draws(actor: Any, batch_size: Sequence[int]) -> dict[str, Draw]:
    """The noise and the times of a batch."""
    noise = Draw(tuple(batch_size), (actor.action_features,), normal=True)
    return {FLOW_NOISE: noise, FLOW_TIME: Draw(tuple(batch_size))}


def flow_error(networks: NetworkLoss, batch: Batch, *condition: Tensor) -> Tensor:
    """Mean over action dimensions of ``(v(s, x_t, t) - (a - noise))**2``, per sample ``(*B,)``.

    ``x_t`` is :func:`iql_torchrl.functional.flow_path`, with a in the policy's units.
    """
    inputs, time = networks.inputs(batch), batch.draws[FLOW_TIME]
    logged = batch.data.get(networks.tensor_keys.action)
    with networks.actor() as actor:
        observation = join_observations([inputs.get(key) for key in actor.in_keys])
        point, target = F.flow_path(batch.draws[FLOW_NOISE], actor.normalise(logged), time=time)
        velocity = actor.velocity(observation, point, time, *condition)
    error = (velocity.to(target.dtype) - target).square()
    return where_valid(networks.valid_action_mask(batch), error).mean(-1)


def check_flow(objective: ActorObjective, actor: Any, *, conditioned: bool) -> None:
    """Raise ``TypeError`` unless ``actor`` is a flow policy with or without a condition, as asked."""
    name, kind = type(actor).__name__, type(objective).__name__
    if not hasattr(actor, "velocity"):
        raise TypeError(
            f"actor_network is {name}, which has no velocity; actor_objective={kind} needs "
            "policies.flow(...)."
        )
    if getattr(actor, "conditioned", False) is not conditioned:
        raise TypeError(
            f"actor_objective is {kind} and actor_network is a {name} with "
            f"conditioned={not conditioned}; this objective needs policies.flow(..., "
            f"conditioned={conditioned})."
        )


#: By their names in ``IQLConfig.actor_objective``.
ACTOR_OBJECTIVES: Mapping[str, type[ActorObjective]] = MappingProxyType(
    {
        "log_prob": AdvantageWeighted,
        "mse": WeightedSquaredError,
        "ddpg_bc": DDPGBC,
        "flow": FlowMatching,
        "conditioned_flow": ConditionedFlow,
    }
)
#: An object, a name or a function as an objective: ``(given, hyperparameters, **choices)``.
as_actor_objective = partial(
    as_objective, "actor_objective", ActorObjective, ACTOR_OBJECTIVES, WeightedFunction
)
#: Names of the objectives that do not weight samples by their advantage.
UNWEIGHTED = tuple(
    name for name, kind in ACTOR_OBJECTIVES.items() if not issubclass(kind, WeightedRegression)
)
