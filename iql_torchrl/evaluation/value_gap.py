"""Difference of the values of a policy's actions and of the logged actions of the same states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from iql_torchrl.config.settings import check_whole
from iql_torchrl.evaluation.acting import as_in_evaluation, check_policy, policy_device
from iql_torchrl.evaluation.statistics import standard_error


@dataclass(frozen=True)
class ValueGap:
    """Action values of the same logged states, ``(rows,)``: of the policy's and the logged actions.

    In units of the scaled reward. ``mean`` is that of ``chosen - logged``.
    """

    chosen: NDArray[np.float64]
    logged: NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float((self.chosen - self.logged).mean())

    @property
    def standard_error(self) -> float:
        """Over the rows, which are taken as independent; NaN for one row."""
        return standard_error(self.chosen - self.logged)


def value_gap(
    policy: TensorDictModuleBase,
    transitions: TensorDictBase,
    *,
    critics: TensorDictModuleBase | Sequence[TensorDictModuleBase] | None = None,
    rows: int = 256,
    seed: int = 0,
    deterministic: bool = True,
    value_key: NestedKey = "state_action_value",
) -> ValueGap:
    """``min_k Q_k(s, pi(s))`` and ``min_k Q_k(s, a)`` of logged pairs (s, a), and their difference.

    A policy that takes the best of N actions by the critics, or is trained to maximise them, also
    finds actions whose value the critics overestimate. This number shows it without an environment:
    it grows with N, and a gap that is large compared with the values' own range says that the policy
    acts where the critics were never corrected by data. It cannot say which part of the gap is real.

    It takes much longer than an update: a flow with S Euler steps evaluates its network N * S times
    per row. ``OfflineTrainer`` calls it at every evaluation for agents with ``num_samples > 1``
    and writes ``chosen_value_gap``. For ``actor_objective="ddpg_bc"`` the same number is a diagnostic
    of the loss, ``policy_value_gap``.

    Args:
        policy: a TensorDict module that writes ``action``.
        transitions: the dataset, ``(rows,)``: ``OfflineDataset.transitions``.
        critics: TensorDict modules that read ``action`` and write ``value_key``, ``(*B, 1)``; by
            default those of a ``policies.best_of``. For a loss: ``losses.LossCritics(loss)``.
        rows: how many transitions are used, drawn without replacement from ``seed``; at most all.
        deterministic: as in :func:`evaluate`; if False, actions are drawn from ``seed``.

    The caller's random generators do not change.

    Raises ``ValueError`` on ``rows < 1``, no critics, critics that do not read ``action``, or an entry
    that the dataset lacks; ``TypeError`` on a policy of another kind.
    """
    check_policy(policy)
    check_whole(rows=rows)
    networks = _critics(policy, critics)
    if transitions.get("action", None) is None:
        raise ValueError(
            f"the transitions have no 'action'; they have {sorted(map(str, transitions.keys()))}."
        )
    device = policy_device(policy)
    order = torch.randperm(len(transitions), generator=torch.Generator().manual_seed(seed))[:rows]
    keys = [*policy.in_keys, *(key for critic in networks for key in critic.in_keys), "action"]
    # strict=False: entries that the policy may do without
    drawn = transitions.select(*keys, strict=False)[order.to(transitions.device or "cpu")]
    data, both = drawn.to(device), nn.ModuleList([policy, *networks])
    with as_in_evaluation(both, device, deterministic=deterministic, seed=seed):
        logged = _values(networks, data, value_key)
        action = policy(data.exclude("action")).get("action")
        chosen = _values(networks, data.copy().set("action", action), value_key)
    return ValueGap(*(values.double().cpu().numpy() for values in (chosen, logged)))


def _critics(policy: Any, given: Any) -> list[Any]:
    critics = getattr(policy, "critics", None) if given is None else given
    if critics is None:
        raise ValueError(
            f"critics is None and the policy is a {type(policy).__name__}, which has none; pass "
            "critics=losses.LossCritics(loss)."
        )
    listed = list(critics) if isinstance(critics, Sequence | nn.ModuleList) else [critics]
    faulty = [c for c in listed if "action" not in getattr(c, "in_keys", ())]
    if not listed or faulty:
        raise ValueError(
            f"critics are {[type(c).__name__ for c in listed]}; expected at least one, and each must "
            "read 'action': for continuous actions, ValueOperator(networks.Critic(...), "
            "in_keys=['observation', 'action']) or losses.LossCritics(loss)."
        )
    return listed


def _values(critics: list[Any], data: TensorDictBase, key: NestedKey) -> Tensor:
    """Smallest value over the critics, ``(rows,)``."""
    written = [critic(data.select(*critic.in_keys, strict=False)).get(key) for critic in critics]
    return torch.stack(written).amin(0).squeeze(-1)
