"""Estimators of one-step and longer episodes: by hand, against obp's formulas, and for coverage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_mdp import DISCOUNT, actor, policy_of, random_mdp, steps_log, uniform

from iql_torchrl.selection import fitted_q_evaluation, rank_policies
from iql_torchrl.selection.episodes import Episodes
from iql_torchrl.selection.estimators import (
    LoggedLogProb,
    ModelValues,
    candidate_scores,
    direct_method,
    doubly_robust,
    episode_weights,
    largest_weight,
    per_decision,
    propensities_are_wrong,
    step_weights,
)

WORLD = random_mdp()


def bandit(rows=400, arms=4, seed=0, rate=0.2):
    """One-step episodes of a bandit without contexts, with the columns of obp's formulas."""
    draw = np.random.default_rng(seed)
    behaviour = draw.dirichlet(np.ones(arms))
    action = draw.choice(arms, size=rows, p=behaviour)
    reward = (draw.random(rows) < rate * (1 + action) / arms).astype(float)
    dataset = steps_log(
        rows, {"action_space": spaces.Discrete(arms)}, action=action, reward=reward,
        action_log_prob=np.log(behaviour[action]),
    )  # fmt: skip
    policy = draw.dirichlet(np.ones(arms))
    q = draw.random(arms)
    value, none = np.full(rows, policy @ q), np.full(rows, np.nan)
    model = ModelValues(value, q[action], reward - q[action], none)
    logged = np.log(policy)[action], np.log(behaviour)[action]
    return (
        Episodes(dataset, 1.0),
        logged,
        model,
        policy[action] / behaviour[action],
        reward,
        q[action],
    )


def test_one_step_estimators_are_those_of_obp():
    """``SelfNormalizedInverseProbabilityWeighting``, ``DirectMethod`` and ``DoublyRobust``."""
    episodes, logged, model, ratio, reward, q = bandit()
    snipw = (ratio * reward / ratio.mean()).mean()
    assert per_decision(episodes, *logged).mean() == pytest.approx(snipw, rel=1e-9)
    np.testing.assert_allclose(direct_method(episodes, *logged, model), model.initial)
    rounds = model.initial + ratio * (reward - q)
    np.testing.assert_allclose(doubly_robust(episodes, *logged, model), rounds, rtol=1e-6)


def test_scores_of_self_normalised_importance_sampling_show_its_error():
    """The variance of a ratio of means, by the delta method."""
    episodes, logged, _, ratio, reward, _ = bandit()
    scores = per_decision(episodes, *logged)
    value = scores.mean()
    delta = (ratio * (reward - value)).std() / ratio.mean()
    assert scores.std() == pytest.approx(delta, rel=1e-6)


def two_episodes():
    """Steps with rewards 1, 2 | 3; ratios 2, 0.5 | 4; the second episode is truncated."""
    dataset = steps_log(
        3, action=np.array([0, 1, 1]), reward=np.array([1.0, 2.0, 3.0]),
        terminated=np.array([False, True, False]), truncated=np.array([False, False, True]),
    )  # fmt: skip
    return Episodes(dataset, 0.5), np.log([2.0, 0.5, 4.0]), np.zeros(3)


def test_weights_and_doubly_robust_scores_of_sequences_by_hand():
    episodes, policy, behaviour = two_episodes()
    np.testing.assert_allclose(step_weights(episodes, policy, behaviour), [2, 0.5, 4])
    np.testing.assert_allclose(episode_weights(episodes, policy, behaviour), [1, 4])
    model = ModelValues(
        np.array([10.0, 20.0]), np.zeros(3), np.array([0.1, 0.2, 0.3]), np.array([1.0, 2, 3])
    )
    scores = doubly_robust(episodes, policy, behaviour, model)
    np.testing.assert_allclose(scores, [10 + 0.2 + 0.1, 20 + 1.2])
    scores = doubly_robust(episodes, policy, None, model)  # the model's own weights
    np.testing.assert_allclose(scores, [10 + 0.1 + 0.4, 20 + 0.9])
    zero = np.array([-np.inf, 0.0, 0.0])  # an action that the policy never takes
    np.testing.assert_allclose(step_weights(episodes, zero, behaviour), [0, 0, 1])


def test_doubly_robust_is_unbiased_whatever_the_model_says():
    policy = 0.7 * uniform() + 0.3 * np.eye(3)[[0, 1, 2, 0, 1]]
    dataset = WORLD.dataset(uniform(), episodes=6000, seed=3)
    episodes, rows = Episodes(dataset, DISCOUNT), dataset.transitions
    state, action, after = (
        rows[key].reshape(-1).numpy() for key in ("observation", "action", ("next", "observation"))
    )
    q = np.random.default_rng(0).normal(size=(5, 3))
    v = (policy * q).sum(1)
    error = episodes.reward + DISCOUNT * ~episodes.terminated * v[after] - q[state, action]
    model = ModelValues(v[state][episodes.first], q[state, action], error, np.zeros(len(error)))
    logged = np.log(policy)[state, action], np.log(uniform())[state, action]
    scores = doubly_robust(episodes, *logged, model)
    exact = WORLD.start @ WORLD.values(policy)
    assert abs(scores.mean() - exact) < 4 * scores.std() / len(scores) ** 0.5 < 0.5
    assert abs(direct_method(episodes, *logged, model).mean() - exact) > 0.4


def test_mass_that_the_weights_lack_may_be_in_one_more_episode():
    seen = np.r_[np.full(99, 0.5), 0.6]
    assert largest_weight(seen, seen) == pytest.approx(100 * (1 - seen.mean() - 0.002), rel=1e-3)
    fair = np.r_[np.zeros(80), np.full(20, 4.8)]  # 0.96, within two standard errors of 1
    assert largest_weight(fair, fair) == 4.8
    assert largest_weight(np.zeros(10), np.zeros(10)) == 10
    assert not propensities_are_wrong(fair)
    assert propensities_are_wrong(fair + 1.5)


def test_one_more_episode_can_lose_no_more_than_its_largest_value():
    """Rewards of 0 or 1: below the mean by the largest Q, above it by one minus the smallest."""
    episodes, logged, model, ratio, _, q = bandit()
    result = candidate_scores(episodes, LoggedLogProb(*logged), (model, model), (0.0, 1.0), 7.0)
    assert result.deviation == pytest.approx((ratio.max() * q.max(), ratio.max() * (1 - q.min())))
    model = model._replace(weight=np.ones(len(q)))
    unknown = LoggedLogProb(logged[0], None)
    result = candidate_scores(episodes, unknown, (model, model), (0.0, 1.0), 7.0)
    assert result.deviation == (7.0, 7.0)


ARMS, FAST = 10, {"hidden": (8,), "updates": 60, "batch_size": 64}


def first_arm(gain, dataset):
    """Logits: ``gain`` times the context's first number for the first arm, 0 for the others."""
    rest = ARMS - 1

    def logits(context):
        return torch.cat([gain * context[:, :1], torch.zeros(len(context), rest)], -1)

    return policy_of(logits, dataset.action_spec)


def contextual(rows=4000, seed=0):
    """Uniform actions; arm 0 pays where the first number of the context is above 0."""
    draw = np.random.default_rng(seed)
    context = draw.normal(size=(rows, 2)).astype(np.float32)
    action = draw.integers(ARMS, size=rows)
    chance = np.where((action == 0) & (context[:, 0] > 0), 0.6, 0.05)
    return steps_log(
        rows, {"action_space": spaces.Discrete(ARMS)}, observation=context, action=action,
        next_observation=context, action_prob=1 / ARMS, reward=draw.random(rows) < chance,
    )  # fmt: skip


@pytest.fixture(scope="module")
def logged_bandit():
    dataset = contextual(seed=1)
    gains = {"uniform": 0.0, "good": 8.0, "bad": -8.0}
    candidates = {name: first_arm(gain, dataset) for name, gain in gains.items()}
    return candidates, dataset.split(0.5, 0)


def test_a_ranking_of_logged_bandit_feedback_rests_on_its_propensities(logged_bandit):
    """Ten arms, contexts that matter, critics that have hardly learned anything."""
    candidates, parts = logged_bandit
    fitted = fitted_q_evaluation(candidates, *parts, discount=1.0, **FAST)
    assert fitted.episodes.exact.all()
    ranking = rank_policies(candidates, *parts, discount=1.0, fitted_q=fitted)
    rows = {row["candidate"]: row for row in ranking.rows}
    assert rows["uniform"]["value"] == pytest.approx(ranking.behaviour_value, abs=0.002)
    assert ranking.recommended == "good"
    # the logistic probability of arm 0 with logits 8 x_0 against nine zeros, by quadrature
    x, weight = np.polynomial.hermite_e.hermegauss(80)
    for name, gain in (("good", 8.0), ("bad", -8.0)):
        first = 1 / (1 + 9 * np.exp(-np.clip(gain * x, -50, 50)))
        exact = (weight * (0.05 + first * 0.55 * (x > 0))).sum() / weight.sum()
        row = rows[name]
        assert row["value_low"] < exact < row["value_high"]
        assert row["value_low"] >= 0
        assert row["extrapolation"] < 0.01
        assert row["worst_extrapolation"] < 0.1
        assert not set(row["caveats"]) & {"td_error", "range", "contradiction", "extrapolation"}
    assert not any("converged" in warning for warning in ranking.warnings)


def test_without_propensities_the_same_data_rest_on_the_model(logged_bandit):
    candidates, parts = logged_bandit
    fitted = fitted_q_evaluation(candidates, *parts, discount=1.0, behaviour=False, **FAST)
    assert not fitted.episodes.exact.any()
    known = fitted_q_evaluation(candidates, *parts, discount=1.0, **FAST)
    assert (np.abs(fitted.values - known.values) > 1e-4).all()
    np.testing.assert_allclose(fitted.initial_values, known.initial_values)


def test_actions_of_probability_zero_stay_unsupported(logged_bandit):
    """Half of the contexts never saw arm 0: there the mean of ratios is far below 1."""
    candidates, parts = logged_bandit
    part = []
    for dataset in parts:
        rows = dataset.transitions
        kept = (rows["action"].reshape(-1) != 0) | (rows["observation"][:, 0] < 0)
        rows = rows[kept]
        context = rows["observation"].numpy()
        part.append(steps_log(
            len(rows), {"action_space": spaces.Discrete(ARMS)}, observation=context,
            next_observation=context, action=rows["action"].numpy(),
            reward=rows["next", "reward"].reshape(-1).numpy(),
            action_prob=np.where(context[:, 0] < 0, 1 / ARMS, 1 / (ARMS - 1)),
        ))  # fmt: skip
    fitted = fitted_q_evaluation(candidates, *part, discount=1.0, **FAST)
    shares = dict(zip(fitted.names, fitted.episodes.unsupported, strict=True))
    assert shares["good"] > 0.15
    assert fitted.episodes.worst_unsupported[fitted.names.index("good")] > 0.5
    ranking = rank_policies(candidates, *part, discount=1.0, fitted_q=fitted)
    assert ranking.recommended is None


def test_long_episodes_with_few_effective_ones_rest_on_the_models_weights():
    dataset = WORLD.dataset(uniform(), episodes=600, seed=5).split(0.5, 0)
    near, far = 0.97 * uniform() + 0.03 * np.eye(3)[[0] * 5], np.eye(3)[[0] * 5]
    who = {"near": actor(near), "far": actor(far)}
    fitted = fitted_q_evaluation(who, *dataset, discount=DISCOUNT, model="table")
    assert fitted.episodes.exact.tolist() == [True, False]
