"""Values and scores in the empirical model of a log: against linear solves, loops and the truth."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from gymnasium import spaces
from scipy import stats
from small_agents import small_columns
from small_mdp import (
    ACTIONS,
    DISCOUNT,
    STATES,
    actor,
    candidates,
    first_states,
    greedy_policy,
    plain_returns,
    random_mdp,
    random_policies,
    steps_log,
    uniform,
)

from iql_torchrl import load_dataset
from iql_torchrl.selection import fitted_q_evaluation
from iql_torchrl.selection.tabular import finite_states

WORLD, EYE = random_mdp(), np.eye(STATES, dtype=np.float32)
POLICIES = random_policies(4)
SPACE = {"observation_space": spaces.Discrete(STATES), "action_space": spaces.Discrete(ACTIONS)}


CANDIDATES = candidates(POLICIES)


def evaluated(who, train, held_out, **options):
    options = {"behaviour": False, "discount": DISCOUNT} | options
    return fitted_q_evaluation(who, train, held_out, model="table", **options)


@pytest.fixture(scope="module")
def parts():
    return WORLD.dataset(uniform(), episodes=1000).split(0.6, 0)


@pytest.fixture(scope="module")
def small_parts():
    """Rare pairs of state and action, and truncated episodes, whose last states may be new."""
    behaviour = random_policies(1, seed=8)[0] * 0.97 + 0.01
    return WORLD.dataset(behaviour, episodes=40, horizon=6, seed=4, **SPACE).split(0.5, 0)


def episodes_of(dataset):
    """Lists of ``(state, action, reward, following, terminated)``."""
    rows = dataset.transitions
    columns = [rows["observation"], rows["action"], rows["next", "reward"].double()]
    columns += [rows["next", "observation"], rows["next", "terminated"]]
    steps = list(zip(*(column.reshape(-1).tolist() for column in columns), strict=True))
    ends = np.cumsum(dataset.episode_lengths).tolist()
    return [steps[b:e] for b, e in zip([0, *ends[:-1]], ends, strict=True)]


def by_loop(policy, train, held_out, min_count, limit):
    """Initial values, scores, weights, Q and discounted visits of one policy, by iteration."""
    count, total, moves = Counter(), Counter(), defaultdict(Counter)
    for s, a, r, s2, ended in (step for episode in episodes_of(train) for step in episode):
        count[s, a] += 1
        total[s, a] += r
        moves[s, a][None if ended else s2] += 1
    fresh = Counter(step[:2] for episode in episodes_of(held_out) for step in episode)
    pairs = [pair for pair in count if count[pair] >= min_count and fresh[pair]]
    episodes = len(train.episode_lengths)
    value, q = [0.0] * STATES, {}
    for _ in range(400):
        for pair in count:
            ahead = sum(n * value[s] for s, n in moves[pair].items() if s is not None)
            q[pair] = (total[pair] + DISCOUNT * ahead) / count[pair]
        for s in range(STATES):
            known = [(policy[s, a], q[s, a]) for a in range(ACTIONS) if (s, a) in pairs]
            value[s] = sum(p * v for p, v in known) + (1 - sum(p for p, _ in known)) * limit
    here, visits = Counter(), Counter()
    for episode in episodes_of(train):
        here[episode[0][0]] += 1 / episodes
    for _ in range(400):
        after = Counter()
        for s, mass in here.items():
            visits[s] += mass
            for a in range(ACTIONS):
                for s2, n in moves[s, a].items() if (s, a) in pairs else ():
                    if s2 is not None:
                        after[s2] += DISCOUNT * mass * policy[s, a] * n / count[s, a]
        here = after
    number = len(held_out.episode_lengths)
    weight = {(s, a): visits[s] * policy[s, a] * number / fresh[s, a] for s, a in pairs}
    initial, scores = [], []
    for episode in episodes_of(held_out):
        initial.append(value[episode[0][0]])
        errors = [
            weight.get((s, a), 0.0) * (r + DISCOUNT * (not ended) * value[s2] - q.get((s, a), 0.0))
            for s, a, r, s2, ended in episode
        ]
        scores.append(initial[-1] + sum(errors))
    return np.array(initial), np.array(scores), weight, q, visits


@pytest.mark.parametrize("min_count", [1, 2, 6])
def test_scores_against_a_loop(small_parts, min_count):
    estimate = evaluated(CANDIDATES, *small_parts, min_count=min_count)
    scores = estimate.episodes
    low, high = scores.return_range
    assert low < high
    for number, policy in enumerate(POLICIES):
        initial, expected, weight, _, visits = by_loop(policy, *small_parts, min_count, low)
        np.testing.assert_allclose(scores.initial_values[number], initial, atol=1e-6)
        np.testing.assert_allclose(scores.scores[number], expected, atol=1e-5)
        assert estimate.values[number] == pytest.approx(expected.mean(), abs=1e-5)
        largest = max(weight.values()) * (high - low)
        np.testing.assert_allclose(scores.max_score_deviation[number], largest, rtol=1e-5)
        _, expected, weight, _, _ = by_loop(policy, *small_parts, min_count, high)
        np.testing.assert_allclose(scores.scores_high[number], expected, atol=1e-5)
        left = [1 - sum(policy[s, a] for a in range(ACTIONS) if (s, a) in weight) for s in visits]
        outside = sum(mass * miss for mass, miss in zip(visits.values(), left, strict=True))
        assert scores.unsupported[number] == pytest.approx(outside, abs=1e-6)
        held_out = episodes_of(small_parts[1])
        whole = [sum(weight.get(step[:2], 0.0) for step in episode) for episode in held_out]
        effective = sum(whole) ** 2 / sum(w**2 for w in whole)
        assert scores.effective_episodes[number] == pytest.approx(effective, rel=1e-4)
    assert np.ptp(scores.unsupported) > 0.001


def test_intervals_contain_the_truth_as_often_as_their_confidence():
    """Forty logs of forty episodes each, with a candidate that is unlike the log."""
    policy = 0.5 * greedy_policy(WORLD) + 0.5 * uniform()
    exact, missed = WORLD.start @ WORLD.values(policy), 0
    for seed in range(40):
        parts = WORLD.dataset(uniform(), episodes=80, seed=100 + seed, **SPACE).split(0.5, 0)
        low, high = evaluated({"p": actor(policy)}, *parts).intervals()[0]
        missed += not low <= exact <= high
    assert missed <= 5  # at a rate of 0.05 more than 5 have a probability of 0.014


def test_a_right_model_is_kept_where_visits_are_wrong():
    """The held-out episodes come from another policy: no weight fits, but no step errs."""
    train = WORLD.dataset(uniform(), episodes=2500, seed=6)
    held_out = WORLD.dataset(0.9 * POLICIES[1] + 0.1 / 3, episodes=1000, seed=7)
    estimate = evaluated(CANDIDATES, train, held_out)
    exact = np.array([WORLD.values(policy)[first_states(held_out)].mean() for policy in POLICIES])
    np.testing.assert_allclose(estimate.values, exact, atol=0.2)


def test_actions_that_the_log_lacks_lead_to_the_least_return():
    never = uniform()
    never[1] = [0.5, 0.5, 0.0]
    with np.errstate(divide="ignore"):
        train, held_out = WORLD.dataset(never, episodes=600).split(0.5, 0)
    estimate = evaluated({"uses it": actor(np.eye(ACTIONS)[[0, 2, 0, 0, 0]])}, train, held_out)
    scores, starts = estimate.episodes, first_states(held_out)
    low, high = scores.return_range
    np.testing.assert_allclose(scores.initial_values[0, starts == 1], low)
    rows = held_out.transitions["observation"].numpy()
    begins = np.r_[0, np.cumsum(held_out.episode_lengths)[:-1]]
    lone = (starts == 1) & ~np.logical_or.reduceat(rows != 1, begins)
    assert lone.any()  # nothing corrects episodes that never leave the state
    np.testing.assert_allclose(scores.scores[0, lone], low)
    np.testing.assert_allclose(scores.scores_high[0, lone], high)
    assert scores.worst_unsupported[0] == pytest.approx(1.0)
    assert 0.2 < scores.unsupported[0] < 1
    assert scores.behaviour_unsupported == 0
    low, high = estimate.intervals()[0]
    assert high - low > 1


def test_a_state_visited_once_in_a_hundred_episodes_counts_as_worst():
    """State 1 follows in a given number of 400 episodes; its action 1 was never logged."""

    def dataset(times):
        steps = [
            step
            for episode in range(400)
            for step in [(0, episode % 2, episode % 2, 1), (1, 0, 0.0, 0)][: 1 + (episode < times)]
        ]
        columns = dict(zip(names, map(np.array, zip(*steps, strict=True)), strict=True))
        ends = np.append(columns["observation"][1:] == 0, True)
        two = {"observation_space": spaces.Discrete(2), "action_space": spaces.Discrete(2)}
        return steps_log(len(steps), two, terminated=ends, **columns)

    names = ("observation", "action", "reward", "next_observation")
    reckless = actor(np.array([[0.5, 0.5], [0.2, 0.8]]))
    for times in (0, 1, 4, 40):
        scores = evaluated({"p": reckless}, dataset(times), dataset(4), min_count=1).episodes
        # the upper 95 % bound of the number of visits, given the discounted number seen
        most = stats.chi2.ppf(0.95, 2 * (DISCOUNT * times + 1)) / 2
        assert (most >= 4) == (times >= 1)
        assert scores.worst_unsupported[0] == pytest.approx(0.8 if times >= 1 else 0.0)
        assert scores.unsupported[0] == pytest.approx(DISCOUNT * times / 400 * 0.8)
        assert scores.behaviour_unsupported == 0


def test_what_the_log_itself_rarely_does_counts_less():
    """One state: actions 0, 1 and 2 were taken 15, 4 and 1 times; two times at least are enough."""
    action = np.array([0] * 15 + [1] * 4 + [2])
    dataset = steps_log(20, action=action, reward=action)
    half = actor(np.array([[0.5, 0.2, 0.3]]))
    scores = evaluated(
        {"half": half, "clone": actor(np.array([[0.75, 0.2, 0.05]]))}, dataset, dataset
    )
    scores = scores.episodes
    np.testing.assert_allclose(scores.unsupported, [0.3, 0.05], atol=1e-6)
    assert scores.behaviour_unsupported == pytest.approx(0.05)
    np.testing.assert_allclose(scores.worst_unsupported, [0.25, 0.0], atol=1e-6)
    np.testing.assert_allclose(scores.initial_values[:, 0], [0.2 + 0.3 * 0, 0.2], atol=1e-6)
    np.testing.assert_allclose(scores.scores_high.mean(1), [0.2 + 0.3 * 2, 0.3], atol=1e-6)


def test_undiscounted_values():
    train, held_out = WORLD.dataset(uniform(), episodes=600).split(0.5, 0)
    estimate = evaluated(CANDIDATES, train, held_out, discount=1.0)
    for number, policy in enumerate(POLICIES):
        going = (policy * (1 - WORLD.ending))[:, :, None] * WORLD.transition
        value = np.linalg.solve(np.eye(STATES) - going.sum(1), (policy * WORLD.reward).sum(1))
        assert estimate.values[number] == pytest.approx(WORLD.start @ value, abs=1.0)
    returns = plain_returns(held_out, 1.0)
    np.testing.assert_allclose(estimate.episodes.behaviour_scores, returns, atol=1e-5)


def test_a_mask_is_part_of_the_state():
    """One observation, two masks: what is allowed tells how much can be earned."""
    rows = np.arange(80)
    allowed = np.array([[True, True], [True, False]])[rows % 2]
    action = np.where(allowed[:, 1], rows // 2 % 2, 0)
    dataset = steps_log(
        80, action=action, reward=np.where(allowed[:, 1], 3.0 + action, 1.0),
        action_mask=allowed, next_action_mask=np.ones((80, 2), bool),
    )  # fmt: skip
    who = {"0": actor(np.array([[1.0, 0.0]])), "1": actor(np.array([[1e-6, 1.0]]))}
    estimate = evaluated(who, dataset, dataset)
    np.testing.assert_allclose(estimate.initial_values[0], [3.0, 1.0] * 40)
    np.testing.assert_allclose(estimate.initial_values[1], [4.0, 1.0] * 40, atol=1e-4)


def test_few_distinct_vectors_are_a_table_too(parts):
    rows = [part.transitions for part in parts]
    vectors = [
        steps_log(
            len(row), action=row["action"].numpy(), observation=EYE[row["observation"]],
            next_observation=EYE[row["next", "observation"]],
            reward=row["next", "reward"].squeeze(-1).numpy(),
            terminated=row["next", "terminated"].squeeze(-1).numpy(),
        )
        for row in rows
    ]  # fmt: skip
    who = candidates(POLICIES)
    for policy in who.values():
        lookup = policy.module[0].module
        lookup.register_forward_pre_hook(lambda _, inputs: (inputs[0].argmax(-1),))
    one = fitted_q_evaluation(who, *vectors, discount=DISCOUNT)
    other = fitted_q_evaluation(CANDIDATES, *parts, discount=DISCOUNT, behaviour=False)
    assert one.backups == np.inf  # chosen without asking
    names = ("scores", "initial_values", "behaviour_scores", "max_score_deviation", "unsupported")
    for name in names:
        result, expected = (getattr(each.episodes, name) for each in (one, other))
        np.testing.assert_allclose(result, expected, atol=1e-6)


def test_an_action_that_is_not_held_out_is_unsupported():
    """Without held-out steps of a pair, errors of its fit cannot be corrected."""
    without = uniform()
    without[1] = [0.5, 0.5, 0.0]
    train = WORLD.dataset(uniform(), episodes=300, seed=1)
    with np.errstate(divide="ignore"):
        held_out = WORLD.dataset(without, episodes=300, seed=2)
    scores = evaluated({"uses it": actor(np.eye(ACTIONS)[[0, 2, 0, 0, 0]])}, train, held_out)
    scores = scores.episodes
    first = first_states(held_out) == 1
    np.testing.assert_allclose(scores.initial_values[0, first], scores.return_range[0])
    assert scores.unsupported[0] > 0.2
    assert 0 < scores.behaviour_unsupported < 0.4


def test_correcting_episodes_are_those_that_look_like_the_member(parts):
    one = evaluated({"log": actor(uniform()), "other": actor(POLICIES[0])}, *parts).episodes
    episodes = len(parts[1].episode_lengths)
    assert one.effective_episodes[1] < one.effective_episodes[0] < episodes


def clock(seed, depends="nothing", episodes=300):
    """Three steps in one state, of random rewards on which something earlier may have an effect."""
    draw = np.random.default_rng(seed)
    rows = 3 * episodes
    step, episode = np.arange(rows) % 3, np.arange(rows) // 3
    noise = draw.normal(size=rows)
    before = np.where(step > 0, np.roll(noise, 1), 0.0)
    effects = {
        "nothing": 0.0,
        "the number of the step": 0.5 * (step - 1),
        "the step before": 0.5 * before,
        "the number of the episode": episode / episodes - 0.5,
    }
    return steps_log(
        rows, action=draw.integers(2, size=rows), reward=noise + effects[depends],
        terminated=step == 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "depends", ["nothing", "the number of the step", "the step before", "the number of the episode"]
)
def test_outcomes_that_depend_on_more_than_the_observation_are_noticed(depends):
    who = {"p": actor(np.array([[0.5, 0.5]]))}
    strengths = [
        evaluated(who, clock(2 * seed, depends), clock(2 * seed + 1, depends)).episodes.history
        for seed in range(3)
    ]
    for history in strengths:
        assert set(history) == {
            "the number of the step", "the step before", "the actions before",
            "the number of the episode",
        }  # fmt: skip
        for name, statistic in history.items():
            if name == depends:
                assert statistic > 4.5
            elif depends == "nothing":
                assert abs(statistic) < 4


def test_outcomes_of_a_markov_chain_depend_on_nothing_else():
    statistics = []
    for seed in range(10):
        parts = WORLD.dataset(uniform(), episodes=300, seed=50 + seed).split(0.5, 0)
        statistics.append([*evaluated(CANDIDATES, *parts).episodes.history.values()])
    assert np.abs(statistics).max() < 4
    assert np.abs(np.mean(statistics, 0)).max() < 1
    assert np.std(statistics) == pytest.approx(1, abs=0.4)


def test_what_counts_as_few_states(parts):
    result = finite_states(*parts)
    assert result.representatives["observation"].tolist() == [0, 1, 2, 3, 4]
    rows = parts[1].transitions
    np.testing.assert_array_equal(result.held_out, rows["observation"].numpy())
    np.testing.assert_array_equal(result.held_out_next, rows["next", "observation"].numpy())
    continuous = load_dataset(small_columns())
    assert finite_states(continuous, continuous) is None
    distinct = load_dataset(small_columns(rows=2400, action=np.arange(2400) % 2))
    assert finite_states(distinct, distinct) is None
    draw = np.random.default_rng(0)

    def few(observation):
        table = small_columns(400, observation=observation, action=np.arange(400) % 2)
        return finite_states(*[load_dataset(table)] * 2)

    several = draw.integers(20, size=(400, 1)).astype(np.float32)  # 20 rows of each pair
    assert len(few(several).representatives) == 20
    several = draw.integers(200, size=(400, 1)).astype(np.float32)  # 2 rows
    assert few(several) is None
    assert few(draw.integers(20, size=400)) is not None  # categories
    assert few(draw.integers(200, size=400)) is None
