"""``icu-sepsis/clinician-v0``: clinicians' treatment of sepsis, from the ICU-Sepsis model.

Choudhary, Gupta, Thomas 2024, "ICU-Sepsis: a benchmark MDP built from real medical data"
(arXiv:2406.05646), package ``icu-sepsis``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.builtin.recipes import Controller, Recipe

NAME = "icu-sepsis/clinician-v0"
ENVIRONMENT = "Sepsis/ICU-Sepsis-v2"
LIVE = slice(0, -3)  # the last three states end the episode
TIE = 1e-10


class SepsisTables:
    """The package's model: S = 716 states of which the last 3 are terminal, A = 25 treatments.

    ``admissible``: ``(S, A)``, treatments seen often enough in the hospital data. ``clinician``: ``(S,
    A)``, probabilities of the clinicians' estimated policy, restricted to admissible treatments and
    renormalised (uniform over them where nothing remains). The package's table gives
    inadmissible treatments a share, 12 % of the steps.
    """

    def __init__(self, env: Any) -> None:
        model = env.unwrapped
        dynamics = model.dynamics
        self._transition = dynamics["tx_mat"]
        self._reward = np.einsum("ijk,ijk->ij", self._transition, dynamics["r_mat"])
        self._start = dynamics["d_0"]
        self.admissible = np.zeros(self._reward.shape, dtype=np.bool_)
        for state, treatments in enumerate(dynamics["admissible_actions"]):
            self.admissible[state, treatments] = True
        weights = np.where(self.admissible, model.expert_policy, 0.0)
        weights[weights.sum(axis=1) == 0] = 1.0
        self.clinician = self._normalised(weights)

    def _normalised(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = np.where(self.admissible, weights, 0.0)
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def value(self, policy: NDArray[np.float64] | None = None) -> float:
        """Exact expected undiscounted return (probability of survival) of ``(S, A)`` policy
        probabilities; by default of the uniform choice among admissible treatments."""
        if policy is None:
            policy = self._normalised(np.ones_like(self._reward))
        return float(self._start[LIVE] @ self._state_values(policy))

    def optimal_value(self) -> float:
        """Expected undiscounted return of the best admissible policy, by policy iteration."""
        transition, reward = self._transition[LIVE][:, :, LIVE], self._reward[LIVE]
        policy = self._normalised(np.ones_like(self._reward))
        while True:
            values = self._state_values(policy)
            action_values = np.where(self.admissible[LIVE], reward + transition @ values, -np.inf)
            # On ties the old choice stays: switching between equal treatments might never end.
            better = np.flatnonzero(action_values.max(axis=1) > values + TIE)
            if len(better) == 0:
                return float(self._start[LIVE] @ values)
            policy[better] = np.eye(policy.shape[1])[action_values[better].argmax(axis=1)]

    def _state_values(self, policy: NDArray[np.float64]) -> NDArray[np.float64]:
        chosen = policy[LIVE]
        chain = np.matmul(chosen[:, None, :], self._transition[LIVE])[:, 0, LIVE]
        reward = (chosen * self._reward[LIVE]).sum(axis=1)
        return np.linalg.solve(np.eye(len(chain)) - chain, reward)


def _clinician(env: Any) -> Controller:
    tables = SepsisTables(env)
    policy, count = tables.clinician, tables.clinician.shape[1]

    def infos(states: Any, treatments: Any) -> dict[str, Any]:
        log_prob = np.log(policy[states[:-1], treatments])
        return {"action_mask": tables.admissible[states], "action_log_prob": log_prob}

    return lambda generator, _: lambda state, _: generator.choice(count, p=policy[state]), infos


ICU_SEPSIS_CLINICIAN = Recipe(
    description=(
        "ICU-Sepsis-v2: 716 patient states, 25 treatments, reward 1 for survival and 0 for "
        "death at the end of an episode of about 9 steps. Treatments are drawn from the "
        "clinicians' estimated policy in the package icu-sepsis, restricted to each state's "
        "admissible treatments and renormalised. infos/action_mask has the admissible "
        "treatments of each state (T + 1 rows, the last for the final state), "
        "infos/action_log_prob the behaviour policy's log-probability of each action (T rows). "
        "Reference scores are exact: the uniform choice among admissible treatments, and the "
        "best admissible policy."
    ),
    algorithm="clinicians' estimated policy restricted to admissible treatments",
    episodes=20_000,
    environment=ENVIRONMENT,
    # Gymnasium's checker warns that the package returns the same lists in successive infos.
    disable_env_checker=True,
    package="icu_sepsis",
    requirements=("icu-sepsis>=2.0.1",),
    reference_scores=(0.7800709046121399, 0.8751416996099325),  # SepsisTables gives both
    controller=_clinician,
)
