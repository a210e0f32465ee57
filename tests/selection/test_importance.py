"""Weighted per-decision importance sampling: by hand, by a loop, and against exact values."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from iql_torchrl.importance import behaviour_log_prob, importance_sampling, pdwis
from iql_torchrl.members import returns_to_go
from scipy import stats
from small_agents import box_agent
from small_agents import log as small_log
from small_mdp import ACTIONS, DISCOUNT, STATES, actor, random_mdp, random_policies, uniform

from iql_torchrl import load_dataset

LOGGED = "action_log_prob"
MDP = random_mdp()


def two_steps(truncated=False):
    """Three episodes under b = 1/2: actions 11, 01 and 1, the last cut or ended after one step."""
    return load_dataset(
        {
            "observation": np.array([0, 1, 0, 1, 0]),
            "action": np.array([1, 1, 0, 1, 1]),
            "reward": np.array([1, 2, 0, 4, 3], np.float32),
            "next_observation": np.array([1, 0, 1, 0, 1]),
            "terminated": np.array([False, True, False, True, not truncated]),
            "truncated": np.array([False, False, False, False, truncated]),
            "action_log_prob": np.full(5, math.log(0.5)),
        }
    )


def by_loop(policy, log, discount):
    """The definition with products and sums of Python numbers; an ended episode counts on."""
    rows = log.transitions
    state, action = rows["observation"].tolist(), rows["action"].tolist()
    logged = rows[LOGGED].tolist()
    reward = rows["next", "reward"].squeeze(-1).tolist()
    ended = rows["next", "terminated"].squeeze(-1).tolist()
    value, final = 0.0, []
    for step in range(log.episode_lengths.max()):
        above = below = 0.0
        row = 0
        for length in log.episode_lengths:
            weight = math.prod(
                policy[state[row + k], action[row + k]] / math.exp(logged[row + k])
                for k in range(min(step + 1, length))
            )
            if step < length:
                above += weight * reward[row + step]
            if step < length or ended[row + length - 1]:
                below += weight
            if step == log.episode_lengths.max() - 1:
                final.append(weight)
            row += length
        value += discount**step * above / below
    return value, sum(final) ** 2 / sum(weight**2 for weight in final)


def test_two_steps_by_hand():
    policy = actor(np.array([[0.2, 0.8], [0.2, 0.8]]))
    found = importance_sampling({"p": policy}, two_steps(), behaviour=LOGGED, discount=0.5)
    # weights 1.6, 0.4, 1.6 at the first step; 2.56, 0.64, 1.6 at the second
    assert found.values[0] == pytest.approx(6.4 / 3.6 + 0.5 * 7.68 / 4.8, rel=1e-6)
    assert found.effective_sample_size[0] == pytest.approx(4.8**2 / 9.5232, rel=1e-6)
    cut = importance_sampling({"p": policy}, two_steps(True), behaviour=LOGGED, discount=0.5)
    assert cut.values[0] == pytest.approx(6.4 / 3.6 + 0.5 * 7.68 / 3.2, rel=1e-6)
    assert found.episodes == 3


@pytest.mark.parametrize("horizon", [4, 1000])
def test_against_a_loop(horizon):
    log = MDP.log(uniform(), episodes=60, horizon=horizon, reward=(3.0, -1.0))
    raw = MDP.log(uniform(), episodes=60, horizon=horizon)
    policies = random_policies(3)
    found = importance_sampling(
        {str(n): actor(p) for n, p in enumerate(policies)}, log, behaviour=LOGGED, discount=DISCOUNT
    )
    for number, policy in enumerate(policies):
        value, size = by_loop(policy, raw, DISCOUNT)
        assert found.values[number] == pytest.approx(value, rel=1e-4)
        assert found.effective_sample_size[number] == pytest.approx(size, rel=1e-4)


def test_the_logs_own_policy_has_the_logs_own_return():
    behaviour = random_policies(1)[0]
    log = MDP.log(behaviour, episodes=200)
    returns = returns_to_go(log, DISCOUNT)[np.r_[0, np.cumsum(log.episode_lengths)[:-1]]]
    for source in (LOGGED, actor(behaviour)):
        found = importance_sampling(
            {"b": actor(behaviour)}, log, behaviour=source, discount=DISCOUNT
        )
        assert found.values[0] == pytest.approx(returns.mean(), rel=1e-5)
        assert found.effective_sample_size[0] == pytest.approx(200, rel=1e-5)
        spread = 1.96 * returns.std() / 200**0.5
        assert found.high[0] - found.low[0] == pytest.approx(2 * spread, rel=0.1)


def test_it_is_consistent():
    policy = 0.7 * uniform() + 0.3 * random_policies(1)[0]
    log = MDP.log(uniform(), episodes=4000, seed=7)
    found = importance_sampling({"p": actor(policy)}, log, behaviour=LOGGED, discount=DISCOUNT)
    exact = MDP.start @ MDP.values(policy)
    assert found.low[0] < exact < found.high[0]
    assert found.values[0] == pytest.approx(exact, abs=0.1)


def test_long_episodes_neither_overflow_nor_vanish():
    ratios = np.array([[10.0] * 400, [9.99] * 400])
    rewards, alive = np.ones((2, 400)), np.ones((2, 400))
    assert pdwis(ratios, rewards, alive, 1.0) == pytest.approx(400)
    assert pdwis(-ratios, rewards, alive, 1.0) == pytest.approx(400)
    log = MDP.log(uniform(), episodes=50)
    peaked = np.full((STATES, ACTIONS), 1e-30)
    peaked[:, 0] = 1
    found = importance_sampling({"p": actor(peaked)}, log, behaviour=LOGGED, discount=1.0)
    assert np.isfinite(found.values[0])
    assert 1 <= found.effective_sample_size[0] < 50


def test_a_policy_that_never_acts_like_the_log_has_no_estimate():
    policy = actor(np.array([[1.0, 0.0], [1.0, 0.0]]))
    found = importance_sampling({"p": policy}, two_steps(), behaviour=LOGGED, discount=0.5)
    assert np.isnan([found.values[0], found.low[0], found.high[0]]).all()
    assert found.effective_sample_size[0] == 0


def test_deterministic_takes_the_most_probable_action():
    policy, mode = np.array([[0.2, 0.8], [0.2, 0.8]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    one = importance_sampling(
        {"p": actor(policy)}, two_steps(), behaviour=LOGGED, discount=0.5, deterministic=True
    )
    other = importance_sampling({"p": actor(mode)}, two_steps(), behaviour=LOGGED, discount=0.5)
    # of episodes 11, 01 and 1 the second drops out; weights 2 and 2, then 4 and 2
    assert one.values[0] == pytest.approx((1 + 3) / 2 + 0.5 * (4 * 2 + 2 * 0) / 6)
    assert one.values[0] == other.values[0]
    assert one.effective_sample_size[0] == pytest.approx(6**2 / (4**2 + 2**2))


def test_continuous_densities():
    agents = {"one": box_agent(seed=1), "two": box_agent(seed=2)}
    log = load_dataset(small_log())
    with torch.no_grad():
        gaussian = [
            agent.actor.get_dist(log.transitions.clone()).base_dist for agent in agents.values()
        ]
    action = log.transitions["action"].numpy()
    density = [stats.norm(g.loc.numpy(), g.scale.numpy()).logpdf(action).sum(-1) for g in gaussian]
    found = importance_sampling(agents, log, behaviour=agents["one"], discount=0.9)
    ratio = (density[1] - density[0]).reshape(4, 10)
    reward = log.transitions["next", "reward"].double().numpy().reshape(4, 10)
    weight = np.exp(ratio.cumsum(1))
    wanted = (0.9 ** np.arange(10) * (weight * reward).sum(0) / weight.sum(0)).sum()
    assert found.values[1] == pytest.approx(wanted, rel=1e-3)
    assert found.effective_sample_size[0] == pytest.approx(4)
    whole = weight[:, -1]
    assert found.effective_sample_size[1] == pytest.approx(
        whole.sum() ** 2 / (whole**2).sum(), rel=1e-3
    )


def test_a_key_of_the_data_may_be_nested_and_have_a_last_dimension():
    log = two_steps()
    rows = log.transitions.clone()
    rows["behaviour", "log_prob"] = rows[LOGGED].unsqueeze(-1)
    found = behaviour_log_prob(("behaviour", "log_prob"), replace(log, transitions=rows))
    assert torch.equal(found, rows[LOGGED].double())


def test_what_cannot_be_is_refused():
    log = two_steps()
    policy = {"p": actor(np.array([[0.2, 0.8], [0.2, 0.8]]))}

    def run(behaviour, rows=None, who=policy, data=log):
        data = data if rows is None else replace(data, transitions=rows)
        importance_sampling(who, data, behaviour=behaviour, discount=0.5)

    with pytest.raises(ValueError, match=r"no 'behaviour_log_prob'; they hold .*action_log_prob"):
        run("behaviour_log_prob")
    rows = log.transitions.clone()
    rows["wide"] = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="wanted one number for each of the 5 steps"):
        run("wide", rows)
    for bad in (math.nan, -math.inf, 0.5):
        rows[LOGGED][3] = bad
        with pytest.raises(ValueError, match="logged action in row 3"):
            run(LOGGED, rows)
    with pytest.raises(ValueError, match="behaviour model gives log-probability -inf"):
        run(actor(np.array([[1.0, 0.0], [1.0, 0.0]])))
    with pytest.raises(TypeError, match="member 'behaviour'"):
        run(3)
    exact = box_agent(policy="deterministic")
    with pytest.raises(ValueError, match="'exact' has no density"):
        run(box_agent(), who={"exact": exact}, data=load_dataset(small_log()))
