"""Policies in offline evaluation: the actions of a member in logged states.

A member is an ``Agent`` or any TensorDict module that writes ``action``, with a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.modules import Delta

from iql_torchrl.evaluation.acting import as_in_evaluation, check_policy, policy_device
from iql_torchrl.networks import history_of
from iql_torchrl.selection.episodes import states

__all__ = [
    "Member",
    "actions",
    "has_density",
    "log_densities",
    "log_probabilities",
    "resolve_member",
    "resolve_members",
]

ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Member:
    """A policy that is compared with others.

    ``temperature`` is from its config and ``episodes`` from its task (digests of episodes that it
    was trained on); both are None for an actor without an agent.
    """

    name: str
    policy: TensorDictModuleBase
    temperature: float | None = None
    episodes: NDArray[np.int64] | None = None


def resolve_members(members: Mapping[str, Any]) -> tuple[Member, ...]:
    """The members of ``{name: Agent or actor}``, in its order.

    Raises ``ValueError`` for an empty mapping, ``TypeError`` for an object that is not a TensorDict
    module and has none as its ``policy``. ``ValueError`` for a policy with a history.
    """
    if not isinstance(members, Mapping) or not members:
        raise ValueError(
            f"members is {members!r}; expected at least one in a dict of name to Agent or actor."
        )
    return tuple(resolve_member(name, policy) for name, policy in members.items())


def resolve_member(name: str, policy: Any) -> Member:
    """``policy`` itself or, for an ``Agent``, its ``policy``; raises as :func:`resolve_members`."""
    actor = policy if isinstance(policy, torch.nn.Module) else getattr(policy, "policy", policy)
    try:
        check_policy(actor)
    except (TypeError, ValueError) as error:
        raise type(error)(f"member {name!r}: {error}") from error
    if (history := history_of(actor)) is not None:
        raise ValueError(
            f"member {name!r} reads the last {history.length} observations, and estimates from logs "
            "here are for policies that read one. Rank such policies in an environment."
        )
    temperature = getattr(getattr(policy, "config", None), "temperature", None)
    episodes = getattr(getattr(policy, "task", None), "episodes", None)
    return Member(str(name), actor, None if temperature is None else float(temperature), episodes)


def log_probabilities(
    member: Member, table: TensorDictBase, num_actions: int, *, deterministic: bool = False
) -> Tensor:
    """log pi(a|s) of every action at ``table``'s states ``(N,)``: float64 ``(N, num_actions)``.

    From the distribution's logits, normalised in float64 over the actions that ``action_mask``
    allows, whether or not the policy reads it. ``deterministic``, or a policy without a
    distribution: 0 for its action and -inf for the others.

    Raises ``ValueError`` when the policy reads what the data lack, chooses among another number
    of actions, or gives probability 0 to every allowed action.
    """

    def compute(chunk: TensorDictBase) -> Tensor:
        mask = chunk.get("action_mask", None)
        logits = _logits(member, chunk, num_actions).double()
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        if deterministic:
            chosen = torch.nn.functional.one_hot(logits.argmax(-1), num_actions)
            logits = torch.zeros_like(logits).masked_fill(chosen == 0, -torch.inf)
        return logits.log_softmax(-1)

    result = _in_chunks(member, table, compute)
    if bool((undefined := result.isnan().any(-1)).any()):
        raise ValueError(
            f"member {member.name!r} gives probability 0 to every allowed action, or NaN, in "
            f"{int(undefined.sum())} states; look at its parameters and at action_mask."
        )
    return result


def _logits(member: Member, chunk: TensorDictBase, num_actions: int) -> Tensor:
    distribution = _distribution(member, chunk)
    logits: Tensor | None = getattr(distribution, "logits", None)
    if logits is None:
        action = member.policy(chunk)["action"]
        if action.ndim == 1 or action.shape[-1] == 1:
            index = action.reshape(len(chunk)).long()
            action = torch.nn.functional.one_hot(index, num_actions)
        chosen = torch.nn.functional.one_hot(action.long().argmax(-1), action.shape[-1])
        logits = torch.zeros(action.shape, device=action.device)
        logits = logits.masked_fill(chosen == 0, -torch.inf)
    if logits.shape != (len(chunk), num_actions):
        raise ValueError(
            f"member {member.name!r} gives logits of shape {tuple(logits.shape)} for {len(chunk)} "
            f"states; expected one for each of the {num_actions} actions."
        )
    return logits


def actions(member: Member, table: TensorDictBase, *, samples: int = 0, seed: int = 0) -> Tensor:
    """Continuous actions at ``table``'s states ``(N,)``: float32 ``(N, max(samples, 1), A)``.

    ``samples=0``: the deterministic action; else that many draws from ``seed``. Raises
    ``ValueError`` when the policy reads what the data lack, or an action is not finite.
    """

    def compute(chunk: TensorDictBase) -> Tensor:
        drawn = [member.policy(chunk.copy())["action"] for _ in range(max(samples, 1))]
        return torch.stack(drawn, 1).float()

    result = _in_chunks(member, table, compute, deterministic=samples == 0, seed=seed)
    if result.ndim != 3 or not bool(result.isfinite().all()):
        raise ValueError(
            f"member {member.name!r} acts with shape {tuple(result.shape)} (states, draws, ...) "
            "or not with finite numbers; expected finite vectors: look at its parameters."
        )
    return result


def has_density(member: Member, rows: TensorDictBase) -> bool:
    """Whether :func:`log_densities` gives numbers for the member's continuous actions."""

    def compute(chunk: TensorDictBase) -> Tensor:
        distribution = _distribution(member, chunk)
        return torch.tensor(distribution is not None and not isinstance(distribution, Delta))[None]

    return bool(_in_chunks(member, states(rows[:1]), compute))


def log_densities(member: Member, rows: TensorDictBase) -> Tensor:
    """log pi(a|s) of the logged continuous actions, float64 ``(N,)``.

    Raises ``ValueError`` for a policy without a density (a deterministic one, a flow, the best of
    several actions), or when one is NaN.
    """

    def compute(chunk: TensorDictBase) -> Tensor:
        distribution = _distribution(member, chunk)
        if distribution is None or isinstance(distribution, Delta):
            raise ValueError(
                f"member {member.name!r}, a {type(member.policy).__name__}, has no density: importance "
                "sampling needs the log-probability of logged actions, which policies.gaussian, "
                "tanh_normal and mixture have. Fitted Q evaluation needs none."
            )
        density: Tensor = distribution.log_prob(chunk["action"]).double()
        return density

    table = states(rows).copy()
    table["action"] = rows["action"]
    result = _in_chunks(member, table, compute)
    if result.ndim != 1 or bool((result.isnan() | (result == torch.inf)).any()):
        raise ValueError(
            f"member {member.name!r} gives logged actions log-densities of shape "
            f"{tuple(result.shape)} that are NaN or infinite; expected one finite number a step."
        )
    return result


def _distribution(member: Member, chunk: TensorDictBase) -> Any:
    get_dist = getattr(member.policy, "get_dist", None)
    return None if get_dist is None else get_dist(chunk.copy())


def _in_chunks(
    member: Member,
    table: TensorDictBase,
    compute: Callable[[TensorDictBase], Tensor],
    *,
    deterministic: bool = True,
    seed: int = 0,
) -> Tensor:
    keys = {unravel_key(key) for key in table.keys(include_nested=True)}
    missing = [key for key in member.policy.in_keys if unravel_key(key) not in keys]
    if missing:
        raise ValueError(
            f"member {member.name!r} reads {missing}, which the log lacks; it has "
            f"{sorted(map(str, keys))}. Load the data in the form that the member was trained on."
        )
    device = policy_device(member.policy, None)
    with as_in_evaluation(member.policy, device, deterministic=deterministic, seed=seed):
        chunks = [compute(chunk.to(device)).cpu() for chunk in table.split(ROWS_AT_ONCE)]
    return torch.cat(chunks)
