"""Candidates of a ranking: policies with a name, and what they do in logged states."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, distributions
from tensordict.utils import unravel_key
from torch import Tensor
from torch.nn.functional import one_hot
from torchrl.modules import Delta

from iql_torchrl import functional as F
from iql_torchrl.data import OfflineDataset
from iql_torchrl.evaluation.acting import as_in_evaluation, check_policy, policy_device
from iql_torchrl.losses import UNWEIGHTED
from iql_torchrl.networks import chunk_of, history_of

ROWS_AT_ONCE = 16_384
DELTAS = (Delta, distributions.Delta)


@dataclass(frozen=True)
class Candidate:
    """A policy that is compared with others.

    ``temperature``: of its config; NaN without one, or where the objective does not read it.
    ``episodes``: digests of the episodes that it was trained on; None where unknown.
    """

    name: str
    policy: TensorDictModuleBase
    temperature: float = math.nan
    episodes: NDArray[np.int64] | None = None


def resolve_candidates(candidates: Mapping[str, Any]) -> tuple[Candidate, ...]:
    """The candidates of ``{name: Agent or actor}``, in its order; ``ValueError`` if there is none."""
    if not isinstance(candidates, Mapping) or not candidates:
        raise ValueError(
            f"candidates is {candidates!r}; expected at least one in a dict of name to Agent or actor."
        )
    return tuple(resolve_candidate(name, policy) for name, policy in candidates.items())


def resolve_candidate(name: str, policy: Any) -> Candidate:
    """A TensorDict module that writes ``action``, or the ``policy`` of an ``Agent``.

    Raises ``TypeError`` for other objects, ``ValueError`` for a policy with a history or with chunks.
    """
    actor = policy if isinstance(policy, torch.nn.Module) else getattr(policy, "policy", policy)
    try:
        check_policy(actor)
    except (TypeError, ValueError) as error:
        raise type(error)(f"candidate {name!r}: {error}") from error
    does = ""
    if (history := history_of(actor)) is not None:
        does = f"reads the last {history.length} observations"
    elif (chunk := chunk_of(actor)) is not None:
        does = f"proposes {chunk.length} actions at once"
    if does:
        raise ValueError(
            f"candidate {name!r} {does}, and offline estimates are for policies that choose each "
            "action by one observation. Rank such policies in an environment."
        )
    config = getattr(policy, "config", None)
    unused = getattr(config, "actor_objective", None) in UNWEIGHTED
    temperature = math.nan if unused else float(getattr(config, "temperature", math.nan))
    episodes = getattr(getattr(policy, "task", None), "episodes", None)
    return Candidate(str(name), actor, temperature, episodes)


def states(rows: TensorDictBase, *, following: bool = False) -> TensorDictBase:
    """The inputs of a policy in ``rows`` ``(N,)``: observations, and masks where the data have them.

    ``following``: those after the step, where a mask that forbids every action becomes all true.
    """
    table = rows["next"] if following else rows
    table = table.select("observation", "action_mask", strict=False).copy()
    if following and "action_mask" in table:
        mask = table["action_mask"]
        table["action_mask"] = mask | ~mask.any(-1, keepdim=True)
    return table


def log_probabilities(
    candidate: Candidate, table: TensorDictBase, num_actions: int, *, deterministic: bool = False
) -> Tensor:
    """log pi(a|s) of every action at ``table``'s states ``(N,)``: float64 ``(N, num_actions)``.

    Normalised over the actions that ``action_mask`` allows, whether or not the policy reads it.
    ``deterministic``, or a policy without a distribution: 0 for its action and -inf for the others.

    Raises ``ValueError`` when the policy reads what the data lack, chooses among another number
    of actions, or gives probability 0 to every allowed action.
    """

    def compute(chunk: TensorDictBase) -> Tensor:
        logits = _logits(candidate, chunk, deterministic)
        if logits is None:
            action = candidate.policy(chunk)["action"]
            if action.ndim == 1 or action.shape[-1] == 1:
                action = one_hot(action.reshape(len(chunk)).long(), num_actions)
            logits = one_hot(action.long().argmax(-1), action.shape[-1]).float().log()
        if logits.shape != (len(chunk), num_actions):
            raise ValueError(
                f"candidate {candidate.name!r} gives logits of shape {tuple(logits.shape)} for "
                f"{len(chunk)} states; expected one for each of the {num_actions} actions."
            )
        logits = logits.double()
        if (mask := chunk.get("action_mask", None)) is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        if deterministic:
            logits = one_hot(logits.argmax(-1), num_actions).double().log()
        return logits.log_softmax(-1)

    result = _in_chunks(candidate, table, compute)
    if bool((undefined := result.isnan().any(-1)).any()):
        raise ValueError(
            f"candidate {candidate.name!r} gives probability 0 to every allowed action, or NaN, in "
            f"{int(undefined.sum())} states; look at its parameters and at action_mask."
        )
    return result


def actions(
    candidate: Candidate, table: TensorDictBase, *, samples: int = 0, seed: int = 0
) -> Tensor:
    """Continuous actions at ``table``'s states ``(N,)``: float32 ``(N, max(samples, 1), A)``.

    ``samples=0``: the deterministic action; else that many draws from ``seed``. Raises
    ``ValueError`` when the policy reads what the data lack, or an action is not finite.
    """

    def compute(chunk: TensorDictBase) -> Tensor:
        drawn = [candidate.policy(chunk.copy())["action"] for _ in range(max(samples, 1))]
        return torch.stack(drawn, 1).float()

    result = _in_chunks(candidate, table, compute, deterministic=samples == 0, seed=seed)
    if result.ndim != 3 or not bool(result.isfinite().all()):
        raise ValueError(
            f"candidate {candidate.name!r} acts with shape {tuple(result.shape)} (states, draws, ...) "
            "or not with finite numbers; expected finite vectors: look at its parameters."
        )
    return result


def has_density(candidate: Candidate, dataset: OfflineDataset) -> bool:
    """Whether the candidate's continuous actions have a density, as :func:`logged_log_prob` needs."""

    def compute(chunk: TensorDictBase) -> Tensor:
        distribution = _distribution(candidate, chunk)
        return torch.tensor([distribution is not None and not isinstance(distribution, DELTAS)])

    return bool(_in_chunks(candidate, states(dataset.transitions[:1]), compute))


def logged_log_prob(
    candidate: Candidate, dataset: OfflineDataset, *, deterministic: bool = False
) -> Tensor:
    """log pi(a|s) of the logged actions, float64 ``(N,)``; continuous policies always sample.

    Raises ``ValueError`` as :func:`log_probabilities`, for continuous policies without a density (a
    deterministic one, a flow, the best of several actions), or where the density is NaN.
    """
    table, action = states(dataset.transitions), dataset.transitions["action"]
    if isinstance(dataset.action_space, spaces.Discrete):
        count = int(dataset.action_space.n)
        every = log_probabilities(candidate, table, count, deterministic=deterministic)
        return F.pick_action(every, action, leading=0)
    if not has_density(candidate, dataset):
        raise ValueError(
            f"candidate {candidate.name!r}, a {type(candidate.policy).__name__}, has no density: "
            "importance sampling needs the log-probability of logged actions, which policies.gaussian, "
            "tanh_normal and mixture have. Fitted Q evaluation needs none."
        )

    def compute(chunk: TensorDictBase) -> Tensor:
        return _distribution(candidate, chunk).log_prob(chunk["action"]).double()

    table["action"] = action
    result = _in_chunks(candidate, table, compute)
    if result.ndim != 1 or bool((result.isnan() | (result == torch.inf)).any()):
        raise ValueError(
            f"candidate {candidate.name!r} gives logged actions log-densities of shape "
            f"{tuple(result.shape)} that are NaN or infinite; expected one finite number a step."
        )
    return result


def bc_distance(candidate: Candidate, baseline: Candidate, dataset: OfflineDataset) -> float:
    """Distance of ``candidate`` from the BC ``baseline`` at the dataset's states; 0 for the baseline.

    Discrete actions: mean ``KL(pi || baseline)`` in nats, infinite where the baseline gives
    probability 0 to an action of the policy. Continuous: mean squared Euclidean distance of the
    deterministic actions.
    """
    table = states(dataset.transitions)
    if not isinstance(dataset.action_space, spaces.Discrete):
        gap = actions(candidate, table) - actions(baseline, table)
        return float(gap.double().square().sum(-1).mean())
    count = int(dataset.action_space.n)
    policy, bc = (log_probabilities(each, table, count) for each in (candidate, baseline))
    terms = torch.where(policy > -torch.inf, policy.exp() * (policy - bc), 0.0)
    return float(terms.sum(-1).mean().clamp(min=0.0))


def _logits(candidate: Candidate, chunk: TensorDictBase, deterministic: bool) -> Tensor | None:
    """Of the policy's distribution; None of a policy without one, and where its action is taken."""
    distribution = _distribution(candidate, chunk)
    if (logits := getattr(distribution, "logits", None)) is not None:
        return torch.as_tensor(logits)
    if (probs := getattr(distribution, "probs", None)) is not None:
        return torch.log(probs)
    if distribution is None or deterministic or isinstance(distribution, DELTAS):
        return None
    raise ValueError(
        f"candidate {candidate.name!r} has the distribution {type(distribution).__name__}, which has "
        "neither logits nor probs, so the probabilities of its actions cannot be read; give it one of "
        "these, (*B, num_actions), or pass deterministic=True to evaluate its most probable action."
    )


def _distribution(candidate: Candidate, chunk: TensorDictBase) -> Any:
    get_dist = getattr(candidate.policy, "get_dist", None)
    return None if get_dist is None else get_dist(chunk.copy())


def _in_chunks(
    candidate: Candidate,
    table: TensorDictBase,
    compute: Callable[[TensorDictBase], Tensor],
    *,
    deterministic: bool = True,
    seed: int = 0,
) -> Tensor:
    keys = {unravel_key(key) for key in table.keys(include_nested=True)}
    missing = [key for key in candidate.policy.in_keys if unravel_key(key) not in keys]
    if missing:
        raise ValueError(
            f"candidate {candidate.name!r} reads {missing}, which the dataset lacks; it has "
            f"{sorted(map(str, keys))}. Load the data in the form that the candidate was trained on."
        )
    device = policy_device(candidate.policy, None)
    with as_in_evaluation(candidate.policy, device, deterministic=deterministic, seed=seed):
        chunks = [compute(chunk.to(device)).cpu() for chunk in table.split(ROWS_AT_ONCE)]
    return torch.cat(chunks)
