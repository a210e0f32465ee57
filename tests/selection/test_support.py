"""Shares of extrapolation against counts and a tree, distances to the clone by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from iql_torchrl.members import resolve_member
from iql_torchrl.support import Support, clone_distance
from scipy.spatial import cKDTree
from small_agents import log as small_log
from small_mdp import ACTIONS, STATES, actor, random_mdp, random_policies, uniform
from tensordict.nn import TensorDictModule
from torch import nn

from iql_torchrl import load_dataset

POLICY = random_policies(1)[0]


def test_extrapolation_counts_the_log():
    train, held_out = random_mdp().log(uniform(), episodes=500).split(0.6, 0)
    few = np.zeros((STATES, ACTIONS))
    rows = train.transitions
    np.add.at(few, (rows["observation"].numpy(), rows["action"].numpy()), 1)
    least = int(np.median(few))
    member = resolve_member("p", actor(POLICY))
    found = Support(train, held_out, min_count=least).share(member)
    state = held_out.transitions["observation"].numpy()
    wanted = (POLICY[state] * (few < least)[state]).sum(1).mean()
    assert found == pytest.approx(wanted, rel=1e-5)
    action = held_out.transitions["action"].numpy()
    usual = (few < least)[state, action].mean()
    assert Support(train, held_out, min_count=least).usual == pytest.approx(usual)
    assert Support(train, held_out, min_count=0).share(member) == 0


def test_extrapolation_by_the_clone_without_categories():
    draw = np.random.default_rng(0)
    observation = draw.normal(size=(40, 3)).astype(np.float32)
    log = load_dataset(small_log(observation=observation, action=np.arange(40) % 4))
    clone, other = (resolve_member(n, _Fixed.actor(p)) for n, p in (
        ("clone", [0.5, 0.49, 0.01, 0.0]), ("other", [0.1, 0.2, 0.3, 0.4])
    ))  # fmt: skip
    support = Support(log, log, clone=clone, min_probability=0.02)
    assert support.share(other) == pytest.approx(0.7)
    assert support.share(clone) == pytest.approx(0.01)
    assert support.usual == 0.5  # actions 2 and 3, to which the clone gives next to nothing
    assert math.isnan(Support(log, log).share(other))
    assert clone_distance(other, clone, log) == math.inf
    wanted = 0.5 * math.log(0.5 / 0.1) + 0.49 * math.log(0.49 / 0.2) + 0.01 * math.log(0.01 / 0.3)
    assert clone_distance(clone, other, log) == pytest.approx(wanted, rel=1e-4)


class _Fixed(nn.Module):
    """The same probabilities in every state."""

    def __init__(self, probabilities):
        super().__init__()
        self.register_buffer("logits", torch.tensor(probabilities).log())

    def forward(self, observation):
        return self.logits.expand(len(observation), -1)

    @classmethod
    def actor(cls, probabilities):
        made = actor(np.ones((1, len(probabilities))))
        made.module[0].module = cls(probabilities)
        return made


def test_extrapolation_of_continuous_actions_against_a_tree():
    draw = np.random.default_rng(0)
    rows = 300
    observation = draw.normal(size=(rows, 2)).astype(np.float32)
    action = (0.3 * np.tanh(observation) + 0.05 * draw.normal(size=(rows, 2))).astype(np.float32)
    train, held_out = load_dataset(
        small_log(rows, observation=observation, action=action)
    ).split(0.5, 0)  # fmt: skip
    near, far = (
        TensorDictModule(_Scaled(gain), in_keys=["observation"], out_keys=["action"])
        for gain in (0.3, -0.9)
    )
    support = Support(train, held_out, neighbours=5)
    found = [support.share(resolve_member("m", policy)) for policy in (near, far)]
    std = train.statistics["observation"].std.numpy()
    spread = train.transitions["action"].numpy().std(0)
    tree = cKDTree(train.transitions["observation"].numpy() / std)
    _, nearest = tree.query(held_out.transitions["observation"].numpy() / std, k=5)
    logged = train.transitions["action"].numpy()[nearest] / spread

    def gap(chosen):
        return np.linalg.norm(logged - (chosen / spread)[:, None], axis=-1).min(1)

    typical = np.quantile(gap(held_out.transitions["action"].numpy()), 0.95)
    state = held_out.transitions["observation"].numpy()
    wanted = [(gap(gain * np.tanh(state)) > typical).mean() for gain in (0.3, -0.9)]
    assert found == pytest.approx(wanted, abs=1 / 150)
    assert support.usual == pytest.approx(0.05, abs=1 / 150)
    assert found[0] < 0.05
    assert found[1] > 0.5
    gaps = (1.2 * np.tanh(state)) ** 2
    members = [resolve_member("m", policy) for policy in (near, far)]
    assert clone_distance(*members, held_out) == pytest.approx(gaps.sum(1).mean(), rel=1e-4)


class _Scaled(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, observation):
        return self.gain * observation.tanh()
