"""Continuous actions: fitted Q evaluation and importance sampling estimate the same policies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from test_rank import _few_draws, row_of  # noqa: F401 (a fixture that is used by itself)
from torch import nn
from torchrl.modules import Delta, IndependentNormal, ProbabilisticActor

from iql_torchrl import load_dataset
from iql_torchrl.selection import fitted_q_evaluation, rank, rank_members


class Normals(nn.Module):
    """The same normal distribution of the action in every state."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, observation):
        return tuple(torch.full((*observation.shape[:-1], 1), x) for x in (self.mean, self.std))


def normal_actor(mean: float, std: float, distribution=IndependentNormal):
    keys = ["loc", "scale"] if distribution is IndependentNormal else ["param"]
    net = Normals(mean, std)
    module = net if len(keys) == 2 else nn.Sequential(net, First())
    return ProbabilisticActor(
        TensorDictModule(module, ["observation"], keys), in_keys=keys, distribution_class=distribution,
    )  # fmt: skip


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


@pytest.fixture(scope="module")
def one_step_logs():
    """Episodes of one step with reward -a**2, and actions from N(0, 1) with their log-probability."""
    generator = np.random.default_rng(0)
    action = generator.normal(size=(1200, 1)).astype(np.float32)
    log_prob = -0.5 * action[:, 0] ** 2 - 0.5 * np.log(2 * np.pi)
    observation = generator.normal(size=(1200, 1)).astype(np.float32)
    return load_dataset(
        {
            "observation": observation, "next_observation": observation, "action": action,
            "reward": -(action[:, 0] ** 2), "action_log_prob": log_prob.astype(np.float32),
            "terminated": np.ones(1200, bool), "truncated": np.zeros(1200, bool),
        },
        reward="raw",
    ).split(0.5, 0)  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Fitted Q evaluation in a second; which policies it was asked for."""
    asked = []

    def evaluate(*args, deterministic, **options):
        asked.append(deterministic)
        options |= {"updates": 600, "hidden": (32,), "model": "network"}
        return fitted_q_evaluation(*args, deterministic=deterministic, **options)

    monkeypatch.setattr(rank, "fitted_q_evaluation", evaluate)
    return asked


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_estimators_evaluate_the_same_continuous_policies(one_step_logs, quick):
    """E[-a**2] of N(m, s) is -(m**2 + s**2); of the deterministic action -m**2."""
    members = {"wide": normal_actor(0.0, 0.8), "right": normal_actor(0.5, 0.5)}
    exact = {"wide": -0.64, "right": -0.5}
    result = rank_members(members, *one_step_logs, discount=0.9)
    assert quick == [False]
    for name, value in exact.items():
        row = row_of(result, name)
        assert row["value"] == pytest.approx(value, abs=0.12)
        assert row["importance_value"] == pytest.approx(value, abs=0.12)
        assert "contradiction" not in row["doubts"]
    assert any("as the members draw them" in text for text in result.warnings)

    alone = rank_members(members, *one_step_logs, discount=0.9, deterministic=True)
    assert quick == [False, True]
    assert row_of(alone, "wide")["value"] == pytest.approx(0, abs=0.12)
    assert row_of(alone, "right")["value"] == pytest.approx(-0.25, abs=0.12)
    assert math.isnan(alone.rows[0]["importance_value"])
    assert any(
        "deterministic continuous actions, which have no density" in t for t in alone.warnings
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_a_density_there_is_no_importance_sampling(one_step_logs, quick):
    members = {"wide": normal_actor(0.0, 0.8), "fixed": normal_actor(0.5, 0.5, Delta)}
    result = rank_members(members, *one_step_logs, discount=0.9)
    assert quick == [True]
    assert row_of(result, "fixed")["value"] == pytest.approx(-0.25, abs=0.12)
    assert math.isnan(result.rows[0]["importance_value"])
    assert any("because fixed has no density of actions" in text for text in result.warnings)
