"""Weighted per-decision importance sampling: by hand, by a loop, and against exact values."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from small_agents import box_agent, small_columns
from small_mdp import (
    DISCOUNT,
    actor,
    plain_returns,
    random_mdp,
    random_policies,
    steps_log,
    uniform,
)

from iql_torchrl import load_dataset
from iql_torchrl.selection import importance_sampling
from iql_torchrl.selection.episodes import Episodes
from iql_torchrl.selection.estimators import padded, per_decision

LOGGED = "action_log_prob"
MDP = random_mdp()


def two_steps(truncated=False):
    """Three episodes under b = 1/2: actions 11, 01 and 1, the last cut or ended after one step."""
    return steps_log(
        5, observation=np.array([0, 1, 0, 1, 0]), next_observation=np.array([1, 0, 1, 0, 1]),
        action=np.array([1, 1, 0, 1, 1]), reward=np.array([1, 2, 0, 4, 3]),
        terminated=np.array([False, True, False, True, not truncated]),
        truncated=np.array([False, False, False, False, truncated]),
        action_log_prob=np.full(5, math.log(0.5)),
    )  # fmt: skip


def evaluated(policies, dataset, discount=0.5, behaviour=LOGGED, **options):
    if not isinstance(policies, dict):
        policies = {"p": actor(np.array(policies))}
    return importance_sampling(policies, dataset, behaviour=behaviour, discount=discount, **options)


LIKELY = [[0.2, 0.8], [0.2, 0.8]]
NEVER = [[1.0, 0.0], [1.0, 0.0]]


def by_loop(policy, dataset, discount):
    """The definition with products and sums of Python numbers; an ended episode counts on."""
    rows = dataset.transitions
    state, action = rows["observation"].tolist(), rows["action"].tolist()
    logged = rows[LOGGED].tolist()
    reward = rows["next", "reward"].squeeze(-1).tolist()
    ended = rows["next", "terminated"].squeeze(-1).tolist()
    value, final = 0.0, []
    for step in range(dataset.episode_lengths.max()):
        above = below = 0.0
        row = 0
        for length in dataset.episode_lengths:
            weight = math.prod(
                policy[state[row + k], action[row + k]] / math.exp(logged[row + k])
                for k in range(min(step + 1, length))
            )
            if step < length:
                above += weight * reward[row + step]
            if step < length or ended[row + length - 1]:
                below += weight
            if step == dataset.episode_lengths.max() - 1:
                final.append(weight)
            row += length
        value += discount**step * above / below
    return value, sum(final) ** 2 / sum(weight**2 for weight in final)


def test_two_steps_by_hand():
    result = evaluated(LIKELY, two_steps())
    # weights 1.6, 0.4, 1.6 at the first step; 2.56, 0.64, 1.6 at the second
    assert result.values[0] == pytest.approx(6.4 / 3.6 + 0.5 * 7.68 / 4.8, rel=1e-6)
    assert result.effective_sample_size[0] == pytest.approx(4.8**2 / 9.5232, rel=1e-6)
    cut = evaluated(LIKELY, two_steps(truncated=True))
    assert cut.values[0] == pytest.approx(6.4 / 3.6 + 0.5 * 7.68 / 3.2, rel=1e-6)
    assert result.episodes == 3


@pytest.mark.parametrize("horizon", [4, 1000])
def test_against_a_loop(horizon):
    dataset = MDP.dataset(uniform(), episodes=60, horizon=horizon, reward=(3.0, -1.0))
    raw = MDP.dataset(uniform(), episodes=60, horizon=horizon)
    policies = random_policies(3)
    result = evaluated({str(n): actor(p) for n, p in enumerate(policies)}, dataset, DISCOUNT)
    for number, policy in enumerate(policies):
        value, size = by_loop(policy, raw, DISCOUNT)
        assert result.values[number] == pytest.approx(value, rel=1e-4)
        assert result.effective_sample_size[number] == pytest.approx(size, rel=1e-4)


def test_the_logs_own_policy_has_the_logs_own_return():
    behaviour = random_policies(1)[0]
    dataset = MDP.dataset(behaviour, episodes=800)
    returns = plain_returns(dataset)
    for source in (LOGGED, actor(behaviour)):
        result = evaluated(behaviour, dataset, DISCOUNT, source)
        assert result.values[0] == pytest.approx(returns.mean(), rel=1e-5)
        assert result.effective_sample_size[0] == pytest.approx(800, rel=1e-5)
        spread = 1.96 * returns.std() / 800**0.5
        assert result.high[0] - result.low[0] == pytest.approx(2 * spread, rel=0.12)


def test_it_is_consistent():
    policy = 0.7 * uniform() + 0.3 * random_policies(1)[0]
    dataset = MDP.dataset(uniform(), episodes=4000, seed=7)
    result = evaluated(policy, dataset, DISCOUNT)
    exact = MDP.start @ MDP.values(policy)
    assert result.low[0] < exact < result.high[0]
    assert result.values[0] == pytest.approx(exact, abs=0.1)


def test_long_episodes_neither_overflow_nor_vanish():
    ratio = np.concatenate([np.full(400, 10.0), np.full(400, 9.99)])
    dataset = steps_log(
        800, action=np.arange(800) % 2, reward=1, terminated=np.arange(800) % 400 == 399
    )
    episodes = Episodes(dataset, 1.0)
    for sign in (1, -1):
        scores = per_decision(episodes, sign * ratio, np.zeros(800))
        assert scores.mean() == pytest.approx(400)
    # 2,000 steps under log-probabilities that are too low by 0.5 each: weights of exp(1000)
    rows = 2000
    dataset = steps_log(
        2 * rows, action=np.arange(2 * rows) % 2, reward=np.random.default_rng(0).random(2 * rows),
        terminated=np.arange(2 * rows) % rows == rows - 1,
        action_log_prob=np.full(2 * rows, math.log(0.5) - 0.5, np.float32),
    )  # fmt: skip
    result = evaluated([[0.5, 0.5]], dataset, 0.99)
    assert np.isfinite([result.values[0], result.low[0], result.high[0]]).all()
    peaked = evaluated([[1.0, 1e-30]] * 2, two_steps(), 1.0)
    assert np.isfinite(peaked.values[0])
    assert 1 <= peaked.effective_sample_size[0] < 3


def test_a_policy_that_never_acts_like_the_log_may_have_any_logged_return():
    result = evaluated(NEVER, two_steps())
    assert np.isnan(result.values[0])
    assert result.effective_sample_size[0] == 0
    # returns: 1 + 0.5 * 2, 0 + 0.5 * 4 and 3; returns-to-go 2, 4
    assert (result.low[0], result.high[0]) == (2, 4)
    given = evaluated(NEVER, two_steps(), return_limits=(-5, 9))
    assert (given.low[0], given.high[0]) == (-5, 9)


def test_bounds_of_a_policy_far_from_the_log_hold_the_truth():
    """Short episodes of which few look like the policy's: wide, and right as often as they say."""
    policy = random_policies(1)[0]
    exact, wide, missed = MDP.start @ MDP.values(policy), [], 0
    for seed in range(40):
        dataset = MDP.dataset(uniform(), episodes=30, seed=200 + seed)
        result = evaluated(policy, dataset, DISCOUNT, return_limits=(-15, 15))
        missed += not result.low[0] <= exact <= result.high[0]
        wide.append(result.high[0] - result.low[0])
    assert missed <= 5  # at a rate of 0.05 more than 5 have a probability of 0.014
    assert np.median(wide) > 5


def test_what_follows_a_truncation_may_be_the_least_or_the_greatest_return():
    closed, cut = two_steps(), two_steps(truncated=True)
    half = [[0.5, 0.5], [0.5, 0.5]]
    for limits in ((-10.0, 10.0), (0.0, 30.0)):
        one, other = (evaluated(half, dataset, return_limits=limits) for dataset in (closed, cut))
        assert (other.low[0] < one.low[0] - 1e-6) == (limits[0] < 0)
        assert other.high[0] > one.high[0]


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_wrong_propensities_give_the_whole_range_and_never_crossed_bounds(factor):
    """Weights of mean above 1 once gave a lower bound above the upper one."""
    dataset = MDP.dataset(uniform(), episodes=50)
    rows = dataset.transitions.clone()
    rows[LOGGED] = rows[LOGGED] - factor
    result = evaluated(
        uniform(), replace(dataset, transitions=rows), DISCOUNT, return_limits=(-9, 8)
    )
    assert result.wrong[0]
    assert result.mean_weight[0] > 1.5
    assert (result.low[0], result.high[0]) == (-9, 8)
    right = evaluated(uniform(), dataset, DISCOUNT, return_limits=(-9, 8))
    assert not right.wrong[0]
    assert right.mean_weight[0] == pytest.approx(1, abs=1e-5)
    assert -9 < right.low[0] < plain_returns(dataset).mean() < right.high[0] < 8


def test_an_episode_with_rows_after_a_termination_ends_at_the_termination():
    """Episodes of 4, 2 and 1 steps; the first terminates at its second step, the second is cut."""
    dataset = steps_log(
        7, action=np.arange(7) % 2, reward=np.arange(1, 8),
        terminated=np.array([0, 0, 0, 1, 0, 0, 1], bool),
        truncated=np.array([0, 0, 0, 0, 0, 1, 0], bool),
    )  # fmt: skip
    rows = dataset.transitions.clone()
    rows["next", "terminated"][1] = True
    episodes = Episodes(replace(dataset, transitions=rows), 0.9)
    ratios, rewards, inside = padded(np.arange(0.1, 0.8, 0.1), episodes)
    np.testing.assert_allclose(ratios, [[0.1, 0.2, 0, 0], [0.5, 0.6, 0, 0], [0.7, 0, 0, 0]])
    np.testing.assert_allclose(rewards, [[1, 2, 0, 0], [5, 6, 0, 0], [7, 0, 0, 0]])
    assert inside.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    # after a termination an episode counts on with reward 0, after a truncation it does not
    weight = np.exp([[0.1, 0.3, 0.3, 0.3], [0.5, 1.1, 0, 0], [0.7, 0.7, 0.7, 0.7]])
    counts = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    expected = 0.9 ** np.arange(4) * (weight * counts * rewards).sum(0) / (weight * counts).sum(0)
    scores = per_decision(episodes, np.arange(0.1, 0.8, 0.1), np.zeros(7))
    assert scores.mean() == pytest.approx(expected.sum())


def test_deterministic_takes_the_most_probable_action():
    one = evaluated(LIKELY, two_steps(), deterministic=True)
    other = evaluated([[0.0, 1.0], [0.0, 1.0]], two_steps())
    # of episodes 11, 01 and 1 the second drops out; weights 2 and 2, then 4 and 2
    assert one.values[0] == pytest.approx((1 + 3) / 2 + 0.5 * (4 * 2 + 2 * 0) / 6)
    assert one.values[0] == other.values[0]
    assert one.effective_sample_size[0] == pytest.approx(6**2 / (4**2 + 2**2))


def test_continuous_densities():
    agents = {"one": box_agent(seed=1), "two": box_agent(seed=2)}
    dataset = load_dataset(small_columns())
    rows = dataset.transitions
    with torch.no_grad():
        gaussian = [a.actor.get_dist(rows.clone()).base_dist for a in agents.values()]
    action = dataset.transitions["action"].numpy()
    density = [stats.norm(g.loc.numpy(), g.scale.numpy()).logpdf(action).sum(-1) for g in gaussian]
    result = importance_sampling(agents, dataset, behaviour=agents["one"], discount=0.9)
    ratio = (density[1] - density[0]).reshape(4, 10)
    reward = dataset.transitions["next", "reward"].double().numpy().reshape(4, 10)
    weight = np.exp(ratio.cumsum(1))
    expected = (0.9 ** np.arange(10) * (weight * reward).sum(0) / weight.sum(0)).sum()
    assert result.values[1] == pytest.approx(expected, rel=1e-3)
    assert result.effective_sample_size[0] == pytest.approx(4)
    size = weight[:, -1].sum() ** 2 / (weight[:, -1] ** 2).sum()
    assert result.effective_sample_size[1] == pytest.approx(size, rel=1e-3)


def test_a_key_of_the_data_may_be_nested_and_have_a_last_dimension():
    dataset = two_steps()
    rows = dataset.transitions.clone()
    rows["behaviour", "log_prob"] = rows[LOGGED].unsqueeze(-1)
    nested = replace(dataset, transitions=rows)
    result = evaluated(LIKELY, nested, behaviour=("behaviour", "log_prob"))
    assert result.values[0] == evaluated(LIKELY, dataset).values[0]


def test_what_cannot_be_is_refused():
    dataset = two_steps()

    def run(behaviour, rows=None, who=LIKELY, data=dataset):
        data = data if rows is None else replace(data, transitions=rows)
        evaluated(who, data, behaviour=behaviour)

    with pytest.raises(ValueError, match=r"no 'behaviour_log_prob'; they have .*action_log_prob"):
        run("behaviour_log_prob")
    rows = dataset.transitions.clone()
    rows["wide"] = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="expected one number for each of the 5 steps"):
        run("wide", rows)
    for bad in (math.nan, -math.inf, 0.5):
        rows[LOGGED][3] = bad
        with pytest.raises(ValueError, match="logged action in row 3"):
            run(LOGGED, rows)
    with pytest.raises(ValueError, match="behaviour model gives log-probability -inf"):
        run(actor(np.array(NEVER)))
    with pytest.raises(TypeError, match="candidate 'behaviour'"):
        run(3)
    broken, data = box_agent(), load_dataset(small_columns())
    with torch.no_grad():
        next(broken.actor.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"'a' gives logged actions log-densities .* that are NaN"):
        run(box_agent(), who={"a": broken}, data=data)
    exact = box_agent(policy="deterministic")
    with pytest.raises(ValueError, match="'exact', a ProbabilisticActor, has no density"):
        run(box_agent(), who={"exact": exact}, data=data)


def test_undiscounted_values_need_terminations_or_limits():
    cut = two_steps(truncated=True)
    with pytest.raises(
        ValueError, match="discount is 1 and 1 of 3 episodes of dataset end without"
    ):
        evaluated(LIKELY, cut, 1.0)
    result = evaluated(LIKELY, cut, 1.0, return_limits=(0.0, 5.0))
    assert 0 <= result.low[0] <= result.values[0] <= result.high[0] <= 5
    assert evaluated(LIKELY, two_steps(), 1.0).values[0] > 0
