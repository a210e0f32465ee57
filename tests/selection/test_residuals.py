"""One-step errors of critics: against loops, against exact values, and where they must speak up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from iql_torchrl.fqe import fitted_q_evaluation
from iql_torchrl.members import resolve_members
from iql_torchrl.regression import Regression, chooser, stacked_critics
from iql_torchrl.residuals import optimism, td_error
from small_agents import box_agent
from small_agents import log as small_log
from small_mdp import ACTIONS, DISCOUNT, STATES, actor, random_mdp, random_policies, uniform
from test_fqe import FAST, counted_value

from iql_torchrl import load_dataset

MDP = random_mdp()
POLICIES = random_policies(3)


@pytest.fixture(scope="module")
def log():
    return MDP.log(uniform(), episodes=2000, horizon=12)


def regression(log, members, discount=DISCOUNT):
    choose = chooser(log, None, 1, 0)
    return Regression(log, resolve_members(members), torch.device("cpu"), discount, choose)


def tables(data, qvalues):
    """Critics that say ``qvalues`` ``(P, S, A)``."""
    weight = torch.as_tensor(np.stack(qvalues) / data.unit).float()
    return [(weight, torch.zeros(len(weight), 1, weight.shape[-1]))]


def exact(policy, extra=0.0):
    """Q of the policy where every step pays ``extra`` more."""
    reward = MDP.reward + extra
    world = type(MDP)(MDP.transition, reward, MDP.ending, MDP.start)
    return reward + DISCOUNT * (1 - MDP.ending) * (MDP.transition @ world.values(policy))


def in_a_loop(log, policy, qvalue):
    """Mean squared error, optimism and its error by the formula, step by step."""
    rows = log.transitions
    state, following = rows["observation"].numpy(), rows["next", "observation"].numpy()
    action, reward = rows["action"].numpy(), rows["next", "reward"].squeeze(-1).numpy()
    going = ~rows["next", "terminated"].squeeze(-1).numpy()
    errors, weights, horizons, row = [], [], [], 0
    for length in log.episode_lengths:
        horizons.append(sum(DISCOUNT**t for t in range(length)))
        for t in range(length):
            s, a, s2 = state[row], action[row], following[row]
            ahead = (policy[s2] * qvalue[s2]).sum() * going[row]
            errors.append(reward[row] + DISCOUNT * ahead - qvalue[s, a])
            weights.append(DISCOUNT**t * policy[s, a])
            row += 1
    errors, weights = np.array(errors), np.array(weights)
    mean = (weights * errors).sum() / weights.sum()
    spread = np.sqrt((weights**2 * (errors - mean) ** 2).sum()) / weights.sum()
    return (errors**2).mean(), -mean * np.mean(horizons), spread * np.mean(horizons)


def test_against_a_loop(log):
    draw = np.random.default_rng(5)
    qvalues = draw.normal(size=(3, STATES, ACTIONS))
    data = regression(log, {str(i): actor(p) for i, p in enumerate(POLICIES)})
    layers = tables(data, qvalues)
    wanted = np.array([in_a_loop(log, *pair) for pair in zip(POLICIES, qvalues, strict=True)]).T
    np.testing.assert_allclose(td_error(data, layers, log), wanted[0], rtol=1e-5)
    found, error = optimism(data, layers, log)
    np.testing.assert_allclose(found, wanted[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(error, wanted[2], rtol=1e-4)


def test_a_value_too_high_by_something_at_every_step(log):
    """Episodes end alike whatever is done, so what is added to each step is found whole."""
    extras = (0.0, 0.3, -0.2)
    data = regression(log, {str(i): actor(p) for i, p in enumerate(POLICIES)})
    qvalues = [exact(p, extra) for p, extra in zip(POLICIES, extras, strict=True)]
    found, error = optimism(data, tables(data, qvalues), log)
    steps = np.mean((1 - DISCOUNT**log.episode_lengths) / (1 - DISCOUNT))
    assert (np.abs(found - np.array(extras) * steps) < 3.5 * error).all()
    assert (error < 0.2).all()


def greedy(log):
    """What is best by the log's counts: its luck included."""
    policy = uniform()
    rows = log.transitions
    state, action = rows["observation"].numpy(), rows["action"].numpy()
    for _ in range(20):
        ahead = counted_value(log, policy)[rows["next", "observation"].numpy()]
        target = (
            rows["next", "reward"].squeeze(-1).numpy()
            + DISCOUNT * ahead * ~rows["next", "terminated"].squeeze(-1).numpy()
        )
        count, total = np.zeros((2, STATES, ACTIONS))
        np.add.at(count, (state, action), 1)
        np.add.at(total, (state, action), target)
        best = np.where(count > 0, total / np.maximum(count, 1), -np.inf).argmax(1)
        policy = np.eye(ACTIONS)[best] * 0.94 + 0.02
    return policy


def test_critics_that_saw_what_the_policy_was_fitted_to_are_found_out():
    own = MDP.log(uniform(), episodes=25, seed=11)
    fresh, held_out = (MDP.log(uniform(), episodes=3000, seed=seed) for seed in (12, 13))
    policy = greedy(own)
    truth = MDP.start @ MDP.values(policy)
    seen, unseen = (
        fitted_q_evaluation({"greedy": actor(policy)}, part, held_out, discount=DISCOUNT, **FAST)
        for part in (own, fresh)
    )
    assert seen.values[0] - truth > 0.3
    assert seen.optimism[0] > 4 * seen.optimism_error[0]
    assert seen.optimism[0] == pytest.approx(seen.values[0] - truth, rel=0.5)
    assert abs(unseen.values[0] - truth) < 0.15
    assert abs(unseen.optimism[0]) < 0.3


def test_actions_never_logged_leave_it_unknown(log):
    keep = log.transitions["action"] < 2
    never = np.eye(ACTIONS)[np.full(STATES, 2)]
    rows = log.transitions.clone()
    rows["action"] = torch.where(keep, rows["action"], torch.zeros_like(rows["action"]))
    other = type(log)(**{**vars(log), "transitions": rows})
    data = regression(other, {"never": actor(never)})
    found, error = optimism(data, tables(data, [exact(uniform())]), other)
    assert np.isnan(found).all()
    assert np.isnan(error).all()


def test_continuous_actions_are_weighed_by_a_kernel():
    dataset = load_dataset(small_log(rows=40))
    agent = box_agent()
    data = regression(dataset, {"a": agent}, discount=0.8)
    layers = stacked_critics(data, (8,), 0)
    with torch.no_grad():
        layers[-1][0].normal_(generator=torch.Generator().manual_seed(0))
        found, error = optimism(data, layers, dataset)
        rows = dataset.transitions
        feature = [data.features(rows, following=f) for f in (False, True)]
        acts = [
            agent.policy(table.select("observation"))["action"] for table in (rows, rows["next"])
        ]
        value = data.taken(layers, feature[0], rows["action"].float())[0] * data.unit
        ahead = data.expected(layers, feature[1], acts[1][None, :, None])[0] * data.unit
    reward = dataset.reward_map.inverse(rows["next", "reward"].squeeze(-1).double())
    going = ~rows["next", "terminated"].squeeze(-1)
    residual = (reward + 0.8 * ahead * going - value).numpy()
    deviation = rows["action"].numpy().std(0)
    distance = (((rows["action"] - acts[0]).numpy() / deviation) ** 2).mean(-1)
    step = np.concatenate([np.arange(length) for length in dataset.episode_lengths])
    weight = np.exp(-distance / 2) * 0.8**step
    horizon = (0.8**step).sum() / len(dataset.episode_lengths)
    mean = (weight * residual).sum() / weight.sum()
    spread = np.sqrt((weight**2 * (residual - mean) ** 2).sum()) / weight.sum()
    np.testing.assert_allclose(found, [-mean * horizon], rtol=1e-4)
    np.testing.assert_allclose(error, [spread * horizon], rtol=1e-4)
