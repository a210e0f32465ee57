"""Glucose of simulated patients with insulin-dependent diabetes, and a dataset of their controller.

Insulin and carbohydrates pass two compartments each, as in Hovorka et al. 2004; the action of insulin
has a delay of its own. Parameters differ between patients, who eat three unannounced meals a day. The
reward is the risk index of Kovatchev et al. 1997 divided by -10: 0 at 112 mg/dl. Not a medical model.
"""

from __future__ import annotations

from collections.abc import Callable

from iql_torchrl import OfflineDataset, load_dataset

import numpy as np
from gymnasium import spaces

STEPS, MINUTES, PARTS = 96, 15, 5  # a day of steps; PARTS Euler steps in each
MAX_DOSE = 2.0  # units in a step
Controller = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # observations to doses (D, 1)


class Patients:
    """Parameters ``(P,)`` of P patients: typical ones times ``exp(0.2 N)``."""

    def __init__(self, count: int, seed: int) -> None:
        vary = np.exp(0.2 * np.random.default_rng(seed).standard_normal((4, count)))
        self.sensitivity, self.untreated = 0.225 * vary[0], 120 + 150 * vary[1]
        self.delay, self.meal = 40.0 * vary[2], 65.0 * vary[3]
        self.basal = MINUTES * 0.003 * (self.untreated - 120) / 120 / self.sensitivity


def days(patients: Patients, who: np.ndarray, controller: Controller, seed: int) -> dict:
    """One day for each entry of ``who``: observations ``(D, 97, 6)``, doses and rewards ``(D, 96)``.

    Observation: measured glucose (error 8 mg/dl) and its last change, active insulin, the prescribed
    basal dose, sine and cosine of the time.
    """
    draw, count = np.random.default_rng(seed), len(who)
    sensitivity, untreated = patients.sensitivity[who], patients.untreated[who]
    delay, basal = patients.delay[who], patients.basal[who]
    hours = np.array([7.5, 12.5, 19.0]) + draw.normal(0, 0.75, (count, 3))
    meals = np.zeros((count, STEPS))
    for number, share in enumerate((0.8, 1.0, 1.2)):
        size = share * patients.meal[who] * np.exp(0.3 * draw.standard_normal(count))
        meals[np.arange(count), (hours[:, number] * 4).astype(int).clip(0, STEPS - 1)] += size
    glucose = draw.uniform(90, 180, count)
    skin, blood = basal * 55 / MINUTES, basal * 55 / MINUTES
    action, stomach, gut = sensitivity * basal / MINUTES, np.zeros(count), np.zeros(count)
    seen, before, doses, rewards = [], glucose, [], []
    for step in range(STEPS + 1):
        measured = glucose + draw.normal(0, 8, count)
        clock = np.full(count, 2 * np.pi * step / STEPS)
        seen.append(np.stack([measured, measured - before, skin + blood, basal,
                              np.sin(clock), np.cos(clock)], -1).astype(np.float32))  # fmt: skip
        before = measured
        if step == STEPS:
            break
        doses.append(np.clip(controller(seen[-1], draw)[:, 0], 0, MAX_DOSE))
        skin, stomach = skin + doses[-1], stomach + meals[:, step]
        for _ in range(PARTS):
            unit = MINUTES / PARTS
            glucose = glucose + unit * (
                0.003 * (untreated - glucose) - action * glucose + 3.5 * gut / 40
            )
            action = action + unit * (sensitivity * blood / 55 - action) / delay
            skin, blood = skin - unit * skin / 55, blood + unit * (skin - blood) / 55
            stomach, gut = stomach - unit * stomach / 40, gut + unit * (stomach - gut) / 40
        glucose = glucose.clip(20, 600)
        rewards.append(-((1.509 * (np.log(glucose) ** 1.084 - 5.381)) ** 2))
    return {"observation": np.stack(seen, 1), "action": np.stack(doses, 1),
            "reward": np.stack(rewards, 1)}  # fmt: skip


def controller(observation: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Proportional and differential control with active insulin, times ``exp(0.5 N)``."""
    glucose, change, active, basal = observation[:, :4].T
    surplus = active - 110 / MINUTES * basal
    dose = basal + 0.004 * (glucose - 120) + 0.015 * change - 0.05 * surplus
    return (dose.clip(0.02) * np.exp(0.5 * draw.standard_normal(len(dose))))[:, None]


def dataset(
    patients: Patients, seed: int, num_days: int = 10, reward: str = "raw"
) -> OfflineDataset:
    """``num_days`` days of every patient under :func:`controller`, each an episode of 96 steps."""
    made = days(patients, np.repeat(np.arange(len(patients.basal)), num_days), controller, seed)
    observation, ends = made["observation"], np.zeros(made["reward"].shape, bool)
    ends[:, -1] = True
    rows = {"observation": observation[:, :-1], "next_observation": observation[:, 1:],
            "action": made["action"][..., None].astype(np.float32), "reward": made["reward"],
            "terminated": np.zeros_like(ends), "truncated": ends}  # fmt: skip
    return load_dataset(
        {name: values.reshape(-1, *values.shape[2:]) for name, values in rows.items()},
        action_space=spaces.Box(0.0, MAX_DOSE, (1,), np.float32), reward=reward, progress=False,
    )  # fmt: skip
