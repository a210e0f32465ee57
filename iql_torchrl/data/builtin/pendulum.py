"""``pendulum/mixed-v0``: a swing-up log of mixed quality, made in seconds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iql_torchrl.data.builtin.recipe import Act, Recipe

__all__ = ["PENDULUM_MIXED", "swing_up_torque"]

MAX_TORQUE = 2.0
UPRIGHT_ENERGY = 5.0
BALANCE_COSINE = 0.9
# The share of segments in which the controller acts, per episode; 0 is a random episode.
COMPETENCES = (0.0, 0.25, 0.5, 0.75)
MEAN_SEGMENT = 10


def swing_up_torque(observation: NDArray[Any]) -> NDArray[np.float32]:
    """The noise-free controller: energy shaping below, PD balance near the top.

    ``observation`` is Pendulum-v1's ``(cos, sin, angular velocity in rad/s)``, the angle being
    0 when upright. Returns a torque ``(1,)`` in N m within [-2, 2].
    """
    cosine, sine, velocity = (float(value) for value in observation)
    if cosine > BALANCE_COSINE:
        torque = -(12.0 * math.atan2(sine, cosine) + 3.0 * velocity)
    else:
        # Rod of mass 1 and length 1, with g = 10: kinetic energy w^2 / 6, potential energy 5 cos.
        missing = UPRIGHT_ENERGY - (velocity**2 / 6.0 + 5.0 * cosine)
        torque = 5.0 * missing * (1.0 if velocity >= 0 else -1.0)
    return np.clip([torque], -MAX_TORQUE, MAX_TORQUE).astype(np.float32)


def _disturbed(generator: np.random.Generator, number: int) -> Act:
    # Levels alternate, so that any number of episodes has nearly equal numbers of each.
    competence = COMPETENCES[number % len(COMPETENCES)]
    left, disturbance = 0, None

    def act(observation: Any, _: Any) -> NDArray[np.float32]:
        nonlocal left, disturbance
        if left == 0:
            left = int(generator.geometric(1.0 / MEAN_SEGMENT))
            disturbance = None
            if generator.random() >= competence:
                torque = generator.uniform(-MAX_TORQUE, MAX_TORQUE, size=1)
                disturbance = torque.astype(np.float32)
        left -= 1
        return swing_up_torque(observation) if disturbance is None else disturbance

    return act


PENDULUM_MIXED = Recipe(
    description=(
        "Pendulum-v1 swing-up, 200-step episodes that end by truncation only. Each episode is "
        "cut into segments of geometrically distributed length (mean 10 steps); a segment is "
        "driven by an energy-shaping swing-up controller with PD balance, or applies one constant "
        "uniform random torque in [-2, 2] N m. The controller's share of segments is 0, 0.25, 0.5 or "
        "0.75 in turn from episode to episode. Reference scores are mean returns over 100 "
        "episodes of the uniform random policy and of the undisturbed controller."
    ),
    algorithm="energy-shaping swing-up with PD balance, disturbed by random constant torques",
    episodes=300,
    environment="Pendulum-v1",
    disable_env_checker=False,
    package="gymnasium",
    requirements=("gymnasium>=1.0",),
    reference_scores=(-1238.7105755962557, -156.96959423258005),
    controller=lambda _: _disturbed,
)
