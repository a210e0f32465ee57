"""The simulated patients: doses lower glucose later, meals raise it, and the dataset has its days."""

from __future__ import annotations

import glucose
import numpy as np

PATIENTS = glucose.Patients(4, 0)


def constant(factor):
    """``factor`` times each patient's basal dose."""
    return lambda seen, draw: factor * seen[:, 3:4]


def test_the_basal_dose_keeps_fasting_glucose_and_more_or_less_do_not():
    patients = glucose.Patients(4, 0)
    patients.meal = np.zeros(4)
    level = {}
    for factor in (0.5, 1.0, 2.0):
        made = glucose.days(patients, np.arange(4), constant(factor), 1)
        level[factor] = made["observation"][:, -20:, 0].mean(1)
    np.testing.assert_allclose(level[1.0], 120, atol=6)
    assert (level[0.5] > level[1.0] + 10).all()
    assert (level[1.0] > level[2.0] + 10).all()


def test_meals_raise_glucose_and_cost_reward():
    with_meals, patients = (glucose.Patients(4, 0) for _ in range(2))
    patients.meal = np.zeros(4)
    rewards = [
        glucose.days(p, np.arange(4), constant(1.0), 1)["reward"].sum(1)
        for p in (with_meals, patients)
    ]
    assert (rewards[0] < rewards[1] - 5).all()
    assert (rewards[1] < 0).all()


def test_a_dose_acts_after_its_step():
    def pulse(step_of_dose):
        count = iter(range(200))
        return lambda seen, draw: seen[:, 3:4] + 2.0 * (next(count) == step_of_dose)

    plain = glucose.days(PATIENTS, np.arange(4), pulse(-1), 1)["observation"][:, :, 0]
    dosed = glucose.days(PATIENTS, np.arange(4), pulse(40), 1)["observation"][:, :, 0]
    effect = dosed - plain
    np.testing.assert_allclose(effect[:, :41], 0, atol=1e-3)
    assert (np.abs(effect[:, 41]) < 3).all()
    assert (effect[:, 41:].argmin(1) >= 4).all()  # an hour later or more
    assert (effect.min(1) < -5).all()


def test_the_dataset_has_ten_days_of_each_patient():
    dataset = glucose.dataset(PATIENTS, 0)
    assert len(dataset) == 4 * 10 * glucose.STEPS == 3840
    assert len(dataset.episode_returns) == 40
    assert not dataset.transitions["next", "terminated"].any()
    action = dataset.transitions["action"]
    assert action.min() >= 0
    assert action.max() <= glucose.MAX_DOSE
    again = glucose.dataset(PATIENTS, 0)
    assert (again.transitions["action"] == action).all()
