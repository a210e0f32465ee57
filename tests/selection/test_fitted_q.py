"""Fitted Q evaluation with networks: against linear solves of the log's counts, and by loops."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from one_device import Copies
from small_agents import box_agent, discrete_agent
from small_agents import log as small_log
from small_mdp import (
    ACTIONS,
    DISCOUNT,
    STATES,
    actor,
    counted_value,
    first_states,
    greedy_policy,
    plain_returns,
    random_mdp,
    random_policies,
    uniform,
)
from tensordict.nn import TensorDictModule
from torch import nn

from iql_torchrl import load_dataset
from iql_torchrl.selection import fitted_q, fitted_q_evaluation, visits
from iql_torchrl.selection.candidates import resolve_members
from iql_torchrl.selection.coverage import Coverage
from iql_torchrl.selection.episodes import open_ended, return_range
from iql_torchrl.selection.regression import Regression, Steps, chooser, stacked_critics
from iql_torchrl.selection.visits import VisitWeights, network_scores

FAST = {"hidden": (), "lr": 0.1, "updates": 600, "batch_size": 512, "polyak": 0.1}
NETWORK = {"model": "network", "discount": DISCOUNT}
# of a mean: what the choice of batches still moves; 3,000 updates of 1,024 rows leave 0.007
NEAR = 0.05
BRIEF = {"hidden": (8,), "updates": 30, "batch_size": 16}
WORLD = random_mdp()
POLICIES = random_policies(4)


def members(policies=POLICIES):
    return {f"p{number}": actor(policy) for number, policy in enumerate(policies)}


def evaluated(who, train, held_out, **options):
    return fitted_q_evaluation(who, train, held_out, **{**NETWORK, **FAST, **options})


@pytest.fixture(scope="module")
def parts():
    return WORLD.log(uniform(), episodes=1200).split(0.6, 0)


@pytest.fixture(scope="module")
def fitted(parts):
    return evaluated(members(), *parts)


def test_values_are_those_of_the_counted_mdp(parts, fitted):
    starts = first_states(parts[1])
    for number, policy in enumerate(POLICIES):
        value = counted_value(parts[0], policy)[starts]
        np.testing.assert_allclose(fitted.initial_values[number], value, atol=2.5 * NEAR)
        assert fitted.initial_values[number].mean() == pytest.approx(value.mean(), abs=NEAR)


def test_networks_with_hidden_layers_give_the_same_values(parts):
    estimate = evaluated(members(), *parts, hidden=(32,), lr=5e-3)
    for number, policy in enumerate(POLICIES):
        value = counted_value(parts[0], policy)[first_states(parts[1])].mean()
        assert estimate.initial_values[number].mean() == pytest.approx(value, abs=2 * NEAR)


def test_corrected_values_are_those_of_the_table(parts, fitted):
    table = fitted_q_evaluation(members(), *parts, discount=DISCOUNT)
    np.testing.assert_allclose(fitted.values, table.values, atol=NEAR)
    one, other = fitted.episodes, table.episodes
    for number in range(len(POLICIES)):
        assert np.corrcoef(one.scores[number], other.scores[number])[0, 1] > 0.97
    np.testing.assert_allclose(one.log_scores, other.log_scores, atol=1e-5)
    np.testing.assert_allclose(one.surprise, other.surprise, rtol=0.2)
    np.testing.assert_array_equal(one.scores, one.scores_high)
    assert not one.unsupported.any()
    assert one.return_range == pytest.approx(other.return_range)
    assert one.unlogged_ends == 0
    width = np.diff(fitted.intervals())
    np.testing.assert_allclose(width, np.diff(table.intervals()), rtol=0.1)


def test_values_approach_the_truth_and_rank_it_right(fitted):
    exact = np.array([WORLD.start @ WORLD.values(policy) for policy in POLICIES])
    assert np.array_equal(np.argsort(fitted.values), np.argsort(exact))
    low, high = fitted.intervals().T
    assert ((low < exact) & (exact < high)).all()
    assert ((low < fitted.values) & (fitted.values < high)).all()


def by_hand(log, held_out, policies, qvalues, discount=DISCOUNT):
    """The parts of an evaluation whose critics say ``qvalues`` ``(P, S, A)``; the log's say 0."""
    who = resolve_members(members(policies))
    data = Regression(log, who, torch.device("cpu"), discount, chooser(log, None, 1, 0))
    weight = np.concatenate([qvalues, np.zeros((1, STATES, ACTIONS))]) / data.unit
    layers = [(torch.as_tensor(weight).float(), torch.zeros(len(weight), 1, ACTIONS))]
    coverage, limits = Coverage(log, held_out), return_range(discount, log, held_out)
    steps = tuple(
        Steps(data, part, 2**20, torch.zeros(len(part), dtype=torch.bool), limits)
        for part in (log, held_out)
    )
    return SimpleNamespace(
        data=data, layers=layers, train=log, held_out=held_out, steps=steps, coverage=coverage,
        limits=limits,
    )  # fmt: skip


def exact_q(policy):
    ahead = WORLD.transition @ WORLD.values(policy)
    return WORLD.reward + DISCOUNT * (1 - WORLD.ending) * ahead


def visits_over_log(log, policy):
    """Discounted visits of ``(s, a)`` in the log's model, over the log's own: by iteration."""
    rows = log.transitions
    state, action = rows["observation"].numpy(), rows["action"].numpy()
    count, chain = np.zeros((STATES, ACTIONS)), np.zeros((STATES, ACTIONS, STATES))
    np.add.at(count, (state, action), 1)
    going = ~rows["next", "terminated"].squeeze(-1).numpy()
    np.add.at(chain, (state, action, rows["next", "observation"].numpy()), going)
    episodes = len(log.episode_lengths)
    here = np.bincount(first_states(log), minlength=STATES) / episodes
    visits = np.zeros(STATES)
    for _ in range(300):
        visits += here
        here = DISCOUNT * np.einsum("s,sa,sat->t", here, policy, chain / count[:, :, None])
    return visits[:, None] * policy * episodes / count


def test_visit_weights_of_categories_are_those_of_a_table(parts):
    log = parts[0]
    made = by_hand(log, parts[1], POLICIES, np.zeros((4, STATES, ACTIONS)))
    weights = VisitWeights(made.data, made.layers, log, made.steps[0])
    each = weights(made.steps[0], torch.arange(len(log))).numpy()
    rows = log.transitions
    pair = rows["observation"].numpy(), rows["action"].numpy()
    for number, policy in enumerate(POLICIES):
        expected = visits_over_log(log, policy)[pair]
        np.testing.assert_allclose(each[number], expected, atol=0.02 * expected.max())
        assert each[number].sum() == pytest.approx(expected.sum(), rel=0.01)
    assert not each[-1].any()  # no episode was truncated, so nothing follows an end


@pytest.fixture(scope="module")
def exact(parts):
    return by_hand(*parts, POLICIES, np.stack([exact_q(policy) for policy in POLICIES]))


def test_held_out_steps_correct_critics_that_are_too_high(exact):
    """A constant added to every Q moves the first states' values by itself, the scores hardly."""
    plain = network_scores(**vars(exact))
    weight, bias = exact.layers[0]
    raised = [(weight, bias + 3.0 / exact.data.unit)]
    moved = network_scores(**{**vars(exact), "layers": raised})
    np.testing.assert_allclose(moved.initial_values, plain.initial_values + 3.0, atol=1e-4)
    change = moved.scores.mean(1) - plain.scores.mean(1)
    np.testing.assert_allclose(change, 0, atol=0.35)
    values = [WORLD.start @ WORLD.values(policy) for policy in POLICIES]
    np.testing.assert_allclose(plain.scores.mean(1), values, atol=0.15)


def test_td_errors_against_a_loop(parts, fitted):
    for log, errors in zip(parts, (fitted.td_error_training, fitted.td_error), strict=True):
        rows = log.transitions
        columns = [rows["observation"], rows["action"], rows["next", "observation"]]
        columns += [rows["next", "reward"], rows["next", "terminated"]]
        steps = list(zip(*(column.reshape(-1).tolist() for column in columns), strict=True))
        for number, policy in enumerate(POLICIES):
            value = counted_value(parts[0], policy)
            # Q of the counted MDP: means of what followed in the log that was fitted on
            total, count = np.zeros((STATES, ACTIONS)), np.zeros((STATES, ACTIONS))
            own = parts[0].transitions
            pair = own["observation"].numpy(), own["action"].numpy()
            ahead = value[own["next", "observation"].numpy()]
            going = ~own["next", "terminated"].squeeze(-1).numpy()
            reward = own["next", "reward"].squeeze(-1).numpy()
            np.add.at(total, pair, reward + DISCOUNT * going * ahead)
            np.add.at(count, pair, 1)
            q = total / count
            squares = [
                (r + DISCOUNT * (not ended) * value[s2] - q[s, a]) ** 2
                for s, a, s2, r, ended in steps
            ]
            assert errors[number] == pytest.approx(np.mean(squares), rel=0.05)


def test_convergence_is_counted(parts, fitted):
    assert fitted.backups == pytest.approx(60)
    assert fitted.passes == pytest.approx(600 * 512 / len(parts[0]))


def test_truncated_returns_are_continued_with_the_value_of_the_log():
    behaviour = 0.5 * greedy_policy(WORLD) + 0.5 * uniform()
    train, held_out = WORLD.log(behaviour, episodes=2000, horizon=3, seed=9).split(0.5, 0)
    network = evaluated({"p": actor(uniform())}, train, held_out)
    table = fitted_q_evaluation({"p": actor(uniform())}, train, held_out, discount=DISCOUNT)
    exact = WORLD.start @ WORLD.values(behaviour)
    log_value = network.episodes.log_scores.mean()
    assert log_value == pytest.approx(table.episodes.log_scores.mean(), abs=NEAR)
    assert log_value == pytest.approx(exact, abs=0.3)
    assert abs(plain_returns(held_out).mean() - exact) > 0.5
    assert network.values[0] == pytest.approx(table.values[0], abs=NEAR)


def test_held_out_steps_correct_what_follows_a_truncation():
    """The fit believes in two more per step, so open ends would be worth far too much."""
    train, held_out = WORLD.log(uniform(), episodes=2000, horizon=3, seed=10).split(0.5, 0)
    rows = train.transitions.clone()
    rows["next", "reward"] = rows["next", "reward"] + 2.0
    wrong = replace(train, transitions=rows)
    scores = evaluated({"p": actor(uniform())}, wrong, held_out).episodes
    exact = WORLD.start @ WORLD.values(uniform())
    assert scores.log_scores.mean() == pytest.approx(exact, abs=0.4)
    raised = counted_value(wrong, uniform()) - counted_value(train, uniform())
    left = (DISCOUNT**held_out.episode_lengths * open_ended(held_out)).mean()
    assert left * raised.min() > 2  # what it would be too high by


def test_a_truncated_episode_is_continued_and_a_terminated_one_is_not():
    log = WORLD.log(uniform(), episodes=1000, horizon=2)
    shut = log.transitions.clone()
    shut["next", "terminated"] = log.transitions["next", "done"].clone()
    closed = replace(log, transitions=shut)
    starts = first_states(log)
    for data in (log, closed):
        estimate = evaluated(members(), data, data)
        for number, policy in enumerate(POLICIES):
            value = counted_value(data, policy)[starts].mean()
            assert estimate.initial_values[number].mean() == pytest.approx(value, abs=NEAR)


def cut_log(seed, episodes=200):
    """One step from about 0: action 0 ends with +1, action 1 is cut at 9, where nothing is known."""
    draw = np.random.default_rng(seed)
    action = draw.permutation(np.arange(episodes) % 2)
    observation = draw.normal(size=(episodes, 1)).astype(np.float32)
    return load_dataset(
        {
            "observation": observation,
            "action": action,
            "reward": np.where(action == 0, 1.0, 2.0).astype(np.float32),
            "next_observation": np.where(action[:, None] == 1, 9.0, observation).astype(np.float32),
            "terminated": action == 0,
            "truncated": action == 1,
        }
    )


class _Always(nn.Module):
    def __init__(self, action):
        super().__init__()
        self.action = action

    def forward(self, observation):
        return torch.full((len(observation),), self.action)


def always(action):
    return TensorDictModule(_Always(action), in_keys=["observation"], out_keys=["action"])


def test_a_truncated_end_that_no_state_describes():
    train, held_out = cut_log(0), cut_log(1)
    estimate = evaluated({"0": always(0), "1": always(1)}, train, held_out)
    scores = estimate.episodes
    # A truncated episode of one step that paid 2 goes on like that: 2 / (1 - 0.9) = 20.
    assert scores.return_range == pytest.approx((1, 20), rel=1e-5)
    assert scores.unlogged_ends == pytest.approx(0.5 * DISCOUNT)
    np.testing.assert_allclose(estimate.values, [1, 2 + DISCOUNT * 1], atol=NEAR)
    np.testing.assert_allclose(scores.scores_high.mean(1), [1, 2 + DISCOUNT * 20], atol=0.5)
    assert scores.log_scores.mean() == pytest.approx((1 + 2 + DISCOUNT * 1) / 2, abs=1e-5)
    assert scores.log_scores_high.mean() == pytest.approx((1 + 2 + DISCOUNT * 20) / 2, abs=1e-5)


def cut_chain(episodes=300):
    """Steps 0 -> 1 -> 2 that pay 1 and 2; cut in 2, which is never described, or already in 1."""
    steps = []
    for episode in range(episodes):
        early = episode % 3 == 0
        steps.append((0, episode % 2, 1.0, 1, early))
        if not early:
            steps.append((1, episode % 2, 2.0, 2, True))
    names = ("observation", "action", "reward", "next_observation", "truncated")
    table = dict(zip(names, map(np.array, zip(*steps, strict=True)), strict=True))
    table["reward"] = table["reward"].astype(np.float32)
    table["terminated"] = np.zeros(len(steps), bool)
    return load_dataset(table, observation_space=spaces.Discrete(3))


def test_where_nothing_is_known_there_is_the_least_or_the_greatest_return():
    """Also behind a state in which other episodes went on."""
    log, who = cut_chain(), {"p": actor(np.full((3, 2), 0.5))}
    network = evaluated(who, log, log).episodes
    table = fitted_q_evaluation(who, log, log, discount=DISCOUNT).episodes
    low, high = table.return_range
    assert network.return_range == pytest.approx((low, high))
    known, unknown = 1 + DISCOUNT * 2, DISCOUNT**2
    assert table.log_scores_high.mean() == pytest.approx(known + unknown * high)
    assert table.scores.mean() == pytest.approx(known + unknown * low)
    assert network.log_scores_high.mean() == pytest.approx(known + unknown * high, abs=NEAR)
    assert network.log_scores.mean() == pytest.approx(known + unknown * low, abs=NEAR)
    assert network.scores.mean() == pytest.approx(known + unknown * low, abs=NEAR)
    assert network.scores_high.mean() == pytest.approx(known + unknown * high, abs=NEAR)


def test_values_do_not_depend_on_the_reward_map(parts):
    raw = evaluated(members(), *parts, updates=100)
    log = WORLD.log(uniform(), episodes=1200, reward=(-250.0, 3.0))
    mapped = evaluated(members(), *log.split(0.6, 0), updates=100)
    np.testing.assert_allclose(mapped.initial_values, raw.initial_values, atol=1e-3)
    np.testing.assert_allclose(mapped.episodes.scores, raw.episodes.scores, atol=1e-2)
    np.testing.assert_allclose(mapped.td_error, raw.td_error, rtol=1e-3)


@pytest.mark.parametrize("hidden", [(), (16, 16)])
def test_members_together_equal_members_alone(parts, hidden):
    options = {"hidden": hidden, "updates": 40, "lr": 1e-2}
    together = evaluated(members(POLICIES[:2]), *parts, **options)
    for number, (name, policy) in enumerate(members(POLICIES[:2]).items()):
        alone = evaluated({name: policy}, *parts, **options)
        assert alone.names == (name,)
        np.testing.assert_allclose(
            alone.initial_values[0], together.initial_values[number], atol=1e-5
        )
        assert alone.values[0] == pytest.approx(together.values[number], abs=1e-3)
        assert alone.td_error[0] == pytest.approx(together.td_error[number], abs=1e-5)


def test_choices_computed_for_each_batch_give_the_same_result(parts):
    kept = evaluated(members(), *parts, updates=30)
    computed = evaluated(members(), *parts, updates=30, table_bytes=0)
    np.testing.assert_array_equal(kept.initial_values, computed.initial_values)
    np.testing.assert_array_equal(kept.episodes.scores, computed.episodes.scores)


def test_masks_exclude_actions_also_for_policies_that_do_not_read_them():
    masks = np.random.default_rng(5).random((STATES, ACTIONS)) < 0.6
    masks[np.arange(STATES), np.arange(STATES) % ACTIONS] = True
    behaviour = masks / masks.sum(1, keepdims=True)
    train, held_out = WORLD.log(behaviour, episodes=1000, masks=masks).split(0.6, 0)
    estimate = evaluated(members(), train, held_out)
    for number, policy in enumerate(POLICIES):
        allowed = policy * masks / (policy * masks).sum(1, keepdims=True)
        value = counted_value(train, allowed)[first_states(held_out)].mean()
        assert estimate.initial_values[number].mean() == pytest.approx(value, abs=NEAR)


def test_the_deterministic_policy_is_the_most_probable_action(parts):
    modes = [np.eye(ACTIONS)[policy.argmax(1)] for policy in POLICIES]
    one = evaluated(members(), *parts, updates=30, deterministic=True)
    other = evaluated(members(modes), *parts, updates=30)
    np.testing.assert_array_equal(one.initial_values, other.initial_values)


class _Line(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, observation):
        return self.gain * observation


GAINS = (1.0, 0.0, -1.0)


def line(gain):
    return TensorDictModule(_Line(gain), in_keys=["observation"], out_keys=["action"])


def line_log(episodes=400, seed=0, spread=0.0):
    """One state in [-1, 1], one action, reward -(a - x)**2, next state drawn anew, three steps.

    ``spread``: of actions around the state; 0: uniform in [-1, 1].
    """
    draw = np.random.default_rng(seed)
    rows = 3 * episodes
    state = draw.uniform(-1, 1, (rows, 1)).astype(np.float32)
    action = draw.uniform(-1, 1, (rows, 1)).astype(np.float32)
    if spread:
        action = (state + spread * draw.normal(size=(rows, 1))).clip(-1, 1).astype(np.float32)
    return load_dataset(
        {
            "observation": state,
            "action": action,
            "reward": -((action - state) ** 2)[:, 0],
            "next_observation": np.roll(state, -1, 0),
            "terminated": np.arange(rows) % 3 == 2,
            "truncated": np.zeros(rows, bool),
        }
    )


def test_continuous_actions():
    """No state says which step it is, so V solves v = -E[(a - x)**2] + 0.5 * (2 / 3) * v."""
    train, held_out = line_log(1200).split(0.7, 0)
    policies = {f"gain {gain}": line(gain) for gain in GAINS}
    estimate = fitted_q_evaluation(
        policies, train, held_out, discount=0.5, hidden=(64,), lr=1e-2, updates=500, polyak=0.1
    )
    values = [-((1 - gain) ** 2) / 3 / (1 - 0.5 * 2 / 3) for gain in GAINS]
    np.testing.assert_allclose(estimate.initial_values.mean(1), values, atol=0.12)
    np.testing.assert_allclose(estimate.values, values, atol=0.2)
    low, high = estimate.intervals().T
    # 0 itself was never logged, only returns as near as 1e-5
    assert ((low < values) & (values < high + 1e-4)).all()
    np.testing.assert_allclose(
        estimate.episodes.log_scores, plain_returns(held_out, 0.5), atol=1e-5
    )
    assert (estimate.episodes.unsupported < 0.1).all()


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (None, False), (False, False)])
def test_progress_is_shown_where_it_is_asked_for(progress, shown, capsys):
    train, held_out = line_log(400, spread=0.1).split(0.5, 0)
    members = {"near": line(1.0)}
    fitted_q_evaluation(members, train, held_out, discount=0.5, progress=progress, **BRIEF)
    assert ("fitted Q evaluation" in capsys.readouterr().err) is shown


def test_continuous_actions_far_from_the_log_are_unsupported():
    train, held_out = line_log(400, spread=0.1).split(0.5, 0)
    scores = fitted_q_evaluation(
        {"near": line(1.0), "far": line(-1.0)}, train, held_out, discount=0.5, **BRIEF
    ).episodes
    assert scores.unsupported[0] < 0.05
    assert scores.unsupported[1] > 0.6
    assert scores.worst_unsupported[1] == pytest.approx(1.0)
    assert scores.log_unsupported == pytest.approx(0.01)


def test_continuous_samples_and_means():
    dataset = load_dataset(small_log(rows=80))
    agents = {"one": box_agent(), "two": box_agent(seed=1)}
    sampled = [
        fitted_q_evaluation(
            agents, dataset, dataset, discount=0.9, deterministic=False, **BRIEF, **m
        )
        for m in ({}, {}, {"action_samples": 1})
    ]
    np.testing.assert_array_equal(sampled[0].initial_values, sampled[1].initial_values)
    assert np.abs(sampled[0].initial_values - sampled[2].initial_values).max() > 0
    assert sampled[0].episodes.scores.shape == (2, 8)
    assert np.isfinite(sampled[0].td_error).all()


def test_the_caller_s_random_state_does_not_change():
    dataset = load_dataset(small_log(rows=80))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    agent = box_agent()
    agent.actor.train()
    fitted_q_evaluation({"a": agent}, dataset, dataset, discount=0.9, deterministic=False, **BRIEF)
    assert torch.equal(torch.rand(2), expected)
    assert agent.actor.training


def test_dict_observations_with_a_category():
    draw = np.random.default_rng(0)
    observation = {
        "where": draw.normal(size=(40, 2)).astype(np.float32),
        "ward": draw.integers(3, size=40),
    }
    dataset = load_dataset(small_log(observation=observation))
    policy = TensorDictModule(
        nn.Linear(2, 2), in_keys=[("observation", "where")], out_keys=["action"]
    )
    estimate = fitted_q_evaluation({"a": policy}, dataset, dataset, discount=0.9, **BRIEF)
    assert np.isfinite(estimate.episodes.scores).all()


def test_critics_begin_as_the_mean_of_the_log(parts):
    data = by_hand(*parts, POLICIES, np.zeros((4, STATES, ACTIONS))).data
    layers = stacked_critics(data, (8,), 0)
    with torch.no_grad():
        value = data.taken(
            layers, data.features(parts[0].transitions), parts[0].transitions["action"]
        )
    returns = []
    row, rewards = 0, parts[0].transitions["next", "reward"].squeeze(-1).tolist()
    for length in parts[0].episode_lengths:
        ahead = 0.0
        for reward in reversed(rewards[row : row + length]):
            ahead = reward + DISCOUNT * ahead
            returns.append(ahead)
        row += length
    np.testing.assert_allclose(value * data.unit, np.mean(returns), atol=1e-4)
    assert data.unit == pytest.approx(np.std(returns))


def test_agents_are_members_with_their_temperature_and_episodes():
    agent = discrete_agent(temperature=0.0)
    (member,) = resolve_members({"clone": agent})
    assert (member.name, member.policy, member.temperature) == ("clone", agent.actor, 0.0)
    np.testing.assert_array_equal(member.episodes, agent.task.episodes)
    bare = resolve_members({"bare": agent.actor})[0]
    assert (bare.temperature, bare.episodes) == (None, None)


@pytest.mark.parametrize("make", [box_agent, discrete_agent])
@pytest.mark.parametrize("table_bytes", [2**20, 0], ids=["choices kept", "choices asked for"])
def test_training_on_a_device_waits_for_nothing(make, table_bytes, monkeypatch):
    """On ``meta`` in place of a GPU; row numbers are copied there once for many updates."""
    monkeypatch.setattr(fitted_q, "DRAWN_TOGETHER", 4)
    more = {} if make is box_agent else {"action": np.arange(40) % 4}
    log = load_dataset(small_log(**more))
    if more:
        log = replace(log, action_space=spaces.Discrete(4))
    who = resolve_members({"one": make()})
    data = Regression(log, who, torch.device("meta"), DISCOUNT, chooser(log, None, 1, 0))
    steps = Steps(data, log, table_bytes, torch.zeros(len(log), dtype=torch.bool), (0.0, 1.0))
    counts = {}
    for updates in (1, 4, 5):
        with Copies() as mode:
            layers = fitted_q._trained(data, steps, updates, 4, (4,), 1e-3, 0.05, 0, False)
        counts[updates] = mode.count
    if table_bytes:
        assert counts[4] == counts[1]
        assert counts[5] == counts[1] + 1
    with Copies():
        VisitWeights(data, layers, log, steps)


def test_what_cannot_be_is_refused(parts):
    train, held_out = parts

    def run(who=None, one=train, other=held_out, discount=DISCOUNT, **options):
        fitted_q_evaluation(
            members() if who is None else who, one, other, discount=discount,
            **({"model": "network"} | FAST | options),
        )  # fmt: skip

    with pytest.raises(ValueError, match="at least one"):
        run({})
    with pytest.raises(TypeError, match="member 'x': policy must be a TensorDict module"):
        run({"x": 3})
    with pytest.raises(ValueError, match=r"discount is 1.5"):
        run(discount=1.5)
    with pytest.raises(ValueError, match="action_space of train"):
        run(other=replace(held_out, action_space=spaces.Discrete(4)))
    for name, value in (
        ("updates", 0), ("batch_size", True), ("action_samples", 0), ("min_count", 0), ("lr", 0.0)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is"):
            run(**{name: value})
    with pytest.raises(ValueError, match=r"hidden\[1\] is 0"):
        run(hidden=(4, 0))
    with pytest.raises(ValueError, match="device is 'cuda:99', which cannot be used here"):
        run(device="cuda:99")
    cut = WORLD.log(uniform(), episodes=9, horizon=2)
    with pytest.raises(ValueError, match=r"discount is 1 and [1-9] of 9 episodes of held_out end"):
        run(other=cut, discount=1.0)
    with pytest.raises(ValueError, match="of train end without termination"):
        run(one=cut, discount=1)
    with pytest.raises(ValueError, match="polyak is 0"):
        run(polyak=0.0)
    with pytest.raises(ValueError, match="model is 'tree'; choose one of auto, table, network"):
        run(model="tree")
    with pytest.raises(ValueError, match=r"continuous actions or too many distinct states; choose"):
        run({"a": line(1.0)}, line_log(20), line_log(20, 1), model="table")
    with pytest.raises(ValueError, match=r"reads \['elsewhere'\], which the log lacks"):
        run({"x": TensorDictModule(nn.Identity(), in_keys=["elsewhere"], out_keys=["action"])})
    with pytest.raises(ValueError, match="each of the 3 actions"):
        run({"x": actor(np.full((STATES, 4), 0.25))})
    with pytest.raises(ValueError, match="probability 0 to every allowed action"):
        run({"x": actor(np.full((STATES, ACTIONS), np.nan))})
    for model in ("network", "auto"):
        pictures = np.random.default_rng(0).integers(9, size=(40, 9, 9, 3), dtype=np.uint8)
        dataset = load_dataset(small_log(observation=pictures))
        plain = TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["action"])
        with pytest.raises(ValueError, match="reads numbers and categories, no images"):
            run({"x": plain}, dataset, dataset, model=model)


def test_printing_an_evaluation_shows_no_arrays(parts):
    """One line, however many episodes there are."""
    result = fitted_q_evaluation({"only": actor(uniform())}, *parts, discount=0.9)
    text = repr(result)
    assert len(text) < 400
    assert "EpisodeScores(1 members, " in text


def test_the_logs_own_unsupported_share_is_that_of_coverage(parts, monkeypatch):
    """One constant says which share of logged actions counts as usual."""
    monkeypatch.setattr(visits, "USUAL", 0.9)
    result = evaluated({"only": actor(uniform())}, *parts, **BRIEF)
    assert result.episodes.log_unsupported == pytest.approx(0.1)
