"""Losses of the policy by name, other than weighted regression on the logged actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, distributions
from torchrl.modules import Delta

from iql_torchrl import functional as F
from iql_torchrl.host import DETACHED_CRITICS, TARGET_CRITICS
from iql_torchrl.networks import join_observations
from iql_torchrl.objectives.batch import Batch, agree, per_sample
from iql_torchrl.objectives.draws import FLOW_NOISE, FLOW_TIME, Draw
from iql_torchrl.objectives.encoding import observed_keys

__all__ = [
    "POLICY_VALUE_GAP",
    "Q_REDUCTIONS",
    "Q_SOURCES",
    "check_actor",
    "cloning_error",
    "ddpg_bc",
    "flow_inputs",
    "flow_matching",
    "policy_action",
    "policy_value_gap",
]

ActorObjective = str | Callable[[TensorDictModule, TensorDictBase], Tensor]
POLICY_VALUE_GAP = "policy_value_gap"  # the diagnostic that ddpg_bc has and other objectives do not

Q_REDUCTIONS = ("min", "mean")
Q_SOURCES = {"live": DETACHED_CRITICS, "target": TARGET_CRITICS}
SMALLEST_SCALE = 1e-6


def ddpg_bc(loss: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """``-Q(s, pi(s)) / mean|Q| + bc_weight * cloning error``, and ``min_k Q_k(s, pi(s))``, ``(*B,)``.

    See ``actor_objective="ddpg_bc"`` of :class:`~iql_torchrl.IQLLoss`. The mean goes over the valid
    steps of a run; it, the critics' parameters and the second result get no gradient.
    """
    action, dist = loss.policy_output(batch)
    values = _values_of(loss, batch, action)
    q = values.amin(0) if loss.q_reduction == "min" else values.mean(0)
    scale = loss.mean_of_run(q.detach().abs(), batch) + SMALLEST_SCALE
    error = cloning_error(loss, batch, action, dist)
    agree(value_of_policy=q, cloning_error=error)
    return loss.bc_weight * error - q / scale, values.detach().amin(0)


def policy_value_gap(loss: Any, batch: Batch, policy_value: Tensor, qvalue: Tensor) -> Tensor:
    """``min_k Q_k(s, pi(s)) - min_k Q_k(s, a)`` with the logged action a, per sample ``(*B,)``.

    ``policy_value`` is the first term, from the critics that ``loss.q_source`` names; ``qvalue``
    ``(K, *B)`` the live critics' values of the logged action.
    """
    logged = qvalue.amin(0) if loss.q_source == "live" else loss.target_qvalue(batch)
    return policy_value - logged


def _values_of(loss: Any, batch: Batch, action: Tensor) -> Tensor:
    """``Q_k`` of the policy's actions ``(*B, A)``: ``(K, *B)``."""
    wide = loss.each_run(batch)
    read = observed_keys(loss, loss.qvalue_network.in_keys)
    data: TensorDictBase = wide.data.select(*read, strict=False)
    data = data.copy().set(loss.tensor_keys.action, action)
    chosen = replace(wide, data=data)
    values: Tensor = loss.action_values(chosen, Q_SOURCES[loss.q_source])
    return values


def cloning_error(
    loss: Any, batch: Batch, action: Tensor, dist: distributions.Distribution | None
) -> Tensor:
    """Minus log-probability of the logged action; without density, the squared error, ``(*B,)``."""
    if dist is None or isinstance(dist, Delta):
        return (action - loss.logged(batch)).square().sum(-1)
    shape = action.shape[:-1]
    log_prob = dist.log_prob(loss.logged(batch))
    return -per_sample(log_prob, shape, "log_prob")


def flow_inputs(actor: Any, shape: tuple[int, ...]) -> dict[str, Draw]:
    """What :func:`flow_matching` draws for samples of shape ``shape``."""
    return {
        FLOW_NOISE: Draw(
            (*shape, actor.action_features), normal=True, entries=actor.action_features
        ),
        FLOW_TIME: Draw(shape, normal=False),
    }


def flow_matching(loss: Any, batch: Batch) -> Tensor:
    """Mean over action dimensions of ``(v(s, x_t, t) - (a - noise))**2``, per sample ``(*B,)``.

    ``x_t = (1 - t) * noise + t * a``, with the logged action a in the policy's units, standard normal
    noise and uniform t from ``batch.draws``: :func:`iql_torchrl.functional.flow_path`.
    """
    inputs, keys = loss.inputs(batch), loss.actor_network.in_keys
    observation = join_observations([inputs.get(key) for key in keys])
    time = batch.draws[FLOW_TIME]
    with loss.evaluator.policy(loss) as actor:
        action = actor.normalise(loss.logged(batch))
        point, target = F.flow_path(batch.draws[FLOW_NOISE], action, time=time)
        velocity = actor.velocity(observation, point, time)
    return (velocity.to(target.dtype) - target).square().mean(-1)


def policy_action(dist: distributions.Distribution) -> Tensor:
    """The action of a distribution without its randomness: its deterministic sample, else its mean."""
    action: Tensor | None = getattr(dist, "deterministic_sample", None)
    return dist.mean if action is None else torch.as_tensor(action)


def check_actor(actor: Any, objective: ActorObjective) -> None:
    """Raise ``TypeError`` where the policy cannot be trained with the objective."""
    if (objective == "flow") is not hasattr(actor, "velocity"):
        _refuse_flow(actor, objective)
    if objective == "log_prob" and not hasattr(actor, "get_dist"):
        raise TypeError(
            f"actor_network is {type(actor).__name__}, which has no distribution "
            "(get_dist); expected a TorchRL ProbabilisticActor, or actor_objective='mse' for a "
            "policy that gives the action itself."
        )


def _refuse_flow(actor: Any, objective: ActorObjective) -> None:
    """Raise ``TypeError`` where the objective "flow" and a flow policy do not come together.

    A function as the objective may do with a flow policy what it wants.
    """
    if callable(objective):
        return
    if objective == "flow":
        raise TypeError(
            f"actor_network is {type(actor).__name__}, which has no velocity; actor_objective='flow' "
            "needs policies.flow(...)."
        )
    raise TypeError(
        f"actor_objective is {objective!r} and actor_network is a {type(actor).__name__}, which has "
        "no density; train it with actor_objective='flow'."
    )
