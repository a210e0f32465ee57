"""Fitted Q evaluation by a table and by networks: against linear solves, the truth, and by loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from one_device import Copies
from small_agents import box_agent, discrete_agent, small_columns
from small_mdp import (
    ACTIONS,
    DISCOUNT,
    STATES,
    actor,
    candidates,
    counted_value,
    first_states,
    greedy_policy,
    plain_returns,
    policy_of,
    random_mdp,
    random_policies,
    steps_log,
    uniform,
)
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor

from iql_torchrl import load_dataset
from iql_torchrl.selection import critics as critics_file
from iql_torchrl.selection import fitted_q_evaluation
from iql_torchrl.selection.candidates import log_probabilities, resolve_candidates
from iql_torchrl.selection.coverage import Coverage
from iql_torchrl.selection.critics import Critics, Steps
from iql_torchrl.selection.episodes import Episodes

FAST = {"hidden": (), "lr": 0.1, "updates": 600, "batch_size": 512, "polyak": 0.1}
# of a mean: what the choice of batches still moves; 3,000 updates of 1,024 rows leave 0.007
NEAR = 0.05
OFF = {"table": 1e-5, "network": NEAR}
BRIEF = {"hidden": (8,), "updates": 30, "batch_size": 16}
WORLD = random_mdp()
POLICIES = random_policies(4)
EXACT = np.array([WORLD.start @ WORLD.values(policy) for policy in POLICIES])
BOTH = pytest.mark.parametrize("model", ["table", "network"])


def evaluated(who, train, held_out, model="network", **options):
    options = {"discount": DISCOUNT, "behaviour": False, **FAST, **options}
    return fitted_q_evaluation(who, train, held_out, model=model, **options)


@pytest.fixture(scope="module")
def parts():
    return WORLD.dataset(uniform(), episodes=1200).split(0.6, 0)


@pytest.fixture(scope="module")
def few():
    """Enough to compare two evaluations of the same log."""
    return WORLD.dataset(uniform(), episodes=200).split(0.6, 0)


@pytest.fixture(scope="module")
def fitted(parts):
    return {model: evaluated(candidates(POLICIES), *parts, model) for model in OFF}


@BOTH
def test_values_are_those_of_the_counted_mdp(parts, fitted, model):
    starts = first_states(parts[1])
    for number, policy in enumerate(POLICIES):
        value = counted_value(parts[0], policy)[starts]
        initial = fitted[model].initial_values[number]
        np.testing.assert_allclose(initial, value, atol=2.5 * NEAR if model == "network" else 1e-5)
        assert initial.mean() == pytest.approx(value.mean(), abs=OFF[model])
    episodes = fitted[model].episodes
    np.testing.assert_allclose(episodes.unsupported, 0, atol=1e-12)
    np.testing.assert_allclose(episodes.scores_high, episodes.scores, atol=1e-9)
    np.testing.assert_allclose(episodes.behaviour_scores, plain_returns(parts[1]), atol=1e-5)
    np.testing.assert_allclose(episodes.behaviour_scores, episodes.behaviour_scores_high, atol=1e-9)
    assert episodes.uncovered_ends == 0


def test_networks_with_hidden_layers_give_the_same_values(parts):
    estimate = evaluated(candidates(POLICIES), *parts, hidden=(32,), lr=5e-3)
    for number, policy in enumerate(POLICIES):
        value = counted_value(parts[0], policy)[first_states(parts[1])].mean()
        assert estimate.initial_values[number].mean() == pytest.approx(value, abs=2 * NEAR)


def test_corrected_values_are_those_of_the_table(parts, fitted):
    network, table = fitted["network"], fitted["table"]
    assert network.backups == pytest.approx(60)
    assert network.passes == pytest.approx(600 * 512 / len(parts[0]))
    assert (table.backups, table.passes) == (np.inf, np.inf)
    assert np.isnan([table.td_error, table.td_error_training]).all()
    np.testing.assert_allclose(network.values, table.values, atol=NEAR)
    one, other = network.episodes, table.episodes
    for number in range(len(POLICIES)):
        assert np.corrcoef(one.scores[number], other.scores[number])[0, 1] > 0.97
    np.testing.assert_allclose(one.max_score_deviation, other.max_score_deviation, rtol=0.2)
    assert one.return_range == pytest.approx(other.return_range)
    width = np.diff(network.intervals())
    np.testing.assert_allclose(width, np.diff(table.intervals()), rtol=0.1)


@BOTH
def test_values_approach_the_truth_and_rank_it_right(model):
    estimate = evaluated(
        candidates(POLICIES), *WORLD.dataset(uniform(), 2000, seed=3).split(0.5, 0), model
    )
    np.testing.assert_allclose(estimate.values, EXACT, atol=0.15)
    assert np.array_equal(np.argsort(estimate.values), np.argsort(EXACT))
    low, high = estimate.intervals().T
    assert ((low < EXACT) & (high > EXACT)).all()
    assert ((low < estimate.values) & (estimate.values < high)).all()
    narrow = np.diff(estimate.intervals(confidence=0.5))
    assert (narrow[:, 0] < 0.5 * (high - low)).all()


def test_truncated_returns_are_continued_with_the_value_of_the_log():
    behaviour = 0.5 * greedy_policy(WORLD) + 0.5 * uniform()
    train, held_out = WORLD.dataset(behaviour, episodes=3000, horizon=3, seed=9).split(0.5, 0)
    table, network = (evaluated({"p": actor(uniform())}, train, held_out, m) for m in OFF)
    scores, exact = table.episodes, WORLD.start @ WORLD.values(behaviour)
    error = scores.behaviour_scores.std() / len(held_out.episode_lengths) ** 0.5
    assert abs(scores.behaviour_scores.mean() - exact) < 3 * error < 0.3
    assert abs(plain_returns(held_out).mean() - exact) > max(8 * error, 0.5)
    count = np.zeros((STATES, ACTIONS))
    pair = tuple(train.transitions[key].numpy() for key in ("observation", "action"))
    np.add.at(count, pair, 1)
    value = counted_value(train, count / count.sum(1, keepdims=True))
    rows, ends = held_out.transitions, np.cumsum(held_out.episode_lengths) - 1
    cut = ~rows["next", "terminated"].squeeze(-1).numpy()[ends]
    last = rows["next", "observation"].numpy()[ends]
    continued = plain_returns(held_out) + DISCOUNT**held_out.episode_lengths * cut * value[last]
    assert scores.behaviour_scores.mean() == pytest.approx(continued.mean(), abs=0.15)
    # held-out steps correct the value
    assert np.abs(scores.behaviour_scores - continued).max() > 0.1
    behaviour_value = network.episodes.behaviour_scores.mean()
    assert behaviour_value == pytest.approx(scores.behaviour_scores.mean(), abs=NEAR)
    assert behaviour_value == pytest.approx(exact, abs=0.3)
    assert network.values[0] == pytest.approx(table.values[0], abs=NEAR)


def with_rewards(dataset, change):
    """``log`` as if each step had paid ``change`` of its action more."""
    rows = dataset.transitions.clone()
    more = torch.as_tensor(change(rows["action"].numpy()), dtype=torch.float32)
    rows["next", "reward"] = rows["next", "reward"] + more.reshape(-1, 1)
    return replace(dataset, transitions=rows)


@BOTH
def test_held_out_steps_correct_what_the_fit_believes(model):
    """The fit believes in two more per step, so values and open ends would be worth far too much."""
    train, held_out = WORLD.dataset(uniform(), episodes=3000, horizon=3, seed=10).split(0.5, 0)
    wrong = with_rewards(train, lambda a: 2.0 * (a == 1) if model == "table" else 2.0 + 0 * a)
    estimate = evaluated({"p": actor(uniform())}, wrong, held_out, model)
    exact, off = WORLD.start @ WORLD.values(uniform()), 0.25 if model == "table" else 0.4
    assert estimate.episodes.behaviour_scores.mean() == pytest.approx(exact, abs=off)
    assert estimate.values[0] == pytest.approx(exact, abs=off)
    raised = counted_value(wrong, uniform()) - counted_value(train, uniform())
    weight = Episodes(held_out, DISCOUNT).truncation_weight.mean()
    assert raised.min() * weight > (model == "network") * 2
    assert raised.min() > 1  # what the wrong rewards would add to each open end
    assert estimate.initial_values.mean() > exact + 1


@BOTH
def test_a_truncated_episode_is_continued_and_a_terminated_one_is_not(model):
    dataset = WORLD.dataset(uniform(), episodes=1000, horizon=2)
    shut = dataset.transitions.clone()
    shut["next", "terminated"] = dataset.transitions["next", "done"].clone()
    for data in (dataset, replace(dataset, transitions=shut)):
        estimate = evaluated(candidates(POLICIES), data, data, model)
        for number, policy in enumerate(POLICIES):
            value = counted_value(data, policy)[first_states(dataset)].mean()
            assert estimate.initial_values[number].mean() == pytest.approx(value, abs=OFF[model])


def cut_log(model, seed, episodes=200):
    """One step: action 0 ends with +1, action 1 is cut where nothing is known, with +2."""
    draw = np.random.default_rng(seed)
    action = draw.permutation(np.arange(episodes) % 2)
    observation, two = np.zeros(episodes, int), spaces.Discrete(2)
    following, options = action, {"observation_space": two, "action_space": two}
    if model == "network":
        observation = draw.normal(size=(episodes, 1)).astype(np.float32)
        following, options = np.where(action[:, None] == 1, np.float32(9), observation), {}
    return steps_log(
        episodes, options, observation=observation, action=action, reward=1 + action,
        next_observation=following, terminated=action == 0, truncated=action == 1,
    )  # fmt: skip


@BOTH
def test_a_truncated_end_that_no_state_describes(model):
    who = {str(a): policy_of(lambda x, a=a: torch.full((len(x),), a)) for a in (0, 1)}
    estimate = evaluated(who, cut_log(model, 0), cut_log(model, 1), model)
    scores, off = estimate.episodes, OFF[model]
    # A truncated episode of one step that paid 2 goes on like that: 2 / (1 - 0.9) = 20.
    assert scores.return_range == pytest.approx((1, 20), rel=1e-5)
    assert scores.uncovered_ends == pytest.approx(0.5 * DISCOUNT)
    np.testing.assert_allclose(estimate.values, [1, 2 + DISCOUNT * 1], atol=off)
    np.testing.assert_allclose(scores.scores_high.mean(1), [1, 2 + DISCOUNT * 20], atol=10 * off)
    assert scores.behaviour_scores.mean() == pytest.approx((1 + 2 + DISCOUNT * 1) / 2, abs=1e-5)
    high = (1 + 2 + DISCOUNT * 20) / 2
    assert scores.behaviour_scores_high.mean() == pytest.approx(high, abs=1e-5)
    assert model == "network" or scores.unsupported[1] == pytest.approx(DISCOUNT)


@BOTH
def test_values_do_not_depend_on_the_reward_map(few, model):
    raw = evaluated(candidates(POLICIES), *few, model, updates=100)
    dataset = WORLD.dataset(uniform(), episodes=200, reward=(-250.0, 3.0))
    mapped = evaluated(candidates(POLICIES), *dataset.split(0.6, 0), model, updates=100)
    small, large = (1e-4, 1e-4) if model == "table" else (1e-3, 1e-2)
    np.testing.assert_allclose(mapped.initial_values, raw.initial_values, atol=small)
    np.testing.assert_allclose(mapped.td_error, raw.td_error, rtol=1e-3)
    for name in ("scores", "behaviour_scores", "max_score_deviation", "return_range"):
        one, other = (getattr(result.episodes, name) for result in (raw, mapped))
        np.testing.assert_allclose(other, one, atol=large)


@pytest.mark.parametrize(
    ("model", "hidden"), [("table", ()), ("network", ()), ("network", (16, 16))]
)
def test_members_together_equal_members_alone(few, model, hidden):
    options = {"hidden": hidden, "updates": 40, "lr": 1e-2}
    together = evaluated(candidates(POLICIES[:2]), *few, model, **options)
    off = 0 if model == "table" else 1e-5
    for number, (name, policy) in enumerate(candidates(POLICIES[:2]).items()):
        alone = evaluated({name: policy}, *few, model, **options)
        assert alone.names == (name,)
        initial = together.initial_values[number]
        np.testing.assert_allclose(alone.initial_values[0], initial, atol=off)
        assert alone.values[0] == pytest.approx(together.values[number], abs=100 * off)
        np.testing.assert_allclose(alone.td_error[0], together.td_error[number], atol=off)


def test_choices_computed_for_each_batch_give_the_same_result(few):
    kept = evaluated(candidates(POLICIES), *few, updates=30)
    computed = evaluated(candidates(POLICIES), *few, updates=30, table_bytes=0)
    np.testing.assert_array_equal(kept.initial_values, computed.initial_values)
    np.testing.assert_array_equal(kept.episodes.scores, computed.episodes.scores)


@BOTH
def test_masks_exclude_actions_also_for_policies_that_do_not_read_them(model):
    masks = np.random.default_rng(5).random((STATES, ACTIONS)) < 0.6
    masks[np.arange(STATES), np.arange(STATES) % ACTIONS] = True
    behaviour = masks / masks.sum(1, keepdims=True)
    train, held_out = WORLD.dataset(behaviour, episodes=1000, masks=masks).split(0.6, 0)
    estimate = evaluated(candidates(POLICIES), train, held_out, model)
    for number, policy in enumerate(POLICIES):
        allowed = policy * masks / (policy * masks).sum(1, keepdims=True)
        value = counted_value(train, allowed)[first_states(held_out)].mean()
        assert estimate.initial_values[number].mean() == pytest.approx(value, abs=OFF[model])
    if model == "table":
        np.testing.assert_allclose(estimate.episodes.unsupported, 0, atol=1e-12)


@BOTH
def test_the_deterministic_policy_is_the_most_probable_action(few, model):
    """Also one that has no distribution."""
    modes = [np.eye(ACTIONS)[policy.argmax(1)] for policy in POLICIES]
    tables = [torch.as_tensor(policy.argmax(1)) for policy in POLICIES]
    plain = {f"p{i}": policy_of(lambda x, t=t: t[x]) for i, t in enumerate(tables)}
    one = evaluated(candidates(POLICIES), *few, model, updates=30, deterministic=True)
    for who in (candidates(modes), plain):
        other = evaluated(who, *few, model, updates=30)
        np.testing.assert_array_equal(one.initial_values, other.initial_values)
        np.testing.assert_array_equal(one.episodes.scores, other.episodes.scores)
    sampled = evaluated(candidates(POLICIES), *few, model, updates=30)
    assert np.abs(one.initial_values - sampled.initial_values).mean(1).min() > 0.01


def test_td_errors_against_q_of_the_counted_mdp(parts, fitted):
    """Q: means of what followed in the log that was fitted on."""
    errors = fitted["network"].td_error_training, fitted["network"].td_error
    for number, policy in enumerate(POLICIES):
        value, q = counted_value(parts[0], policy), None
        for dataset, error in zip(parts, errors, strict=True):
            rows = dataset.transitions
            pair = tuple(rows[key].numpy() for key in ("observation", "action"))
            going = ~rows["next", "terminated"].squeeze(-1).numpy()
            ahead = going * value[rows["next", "observation"].numpy()]
            outcome = rows["next", "reward"].squeeze(-1).numpy() + DISCOUNT * ahead
            if q is None:
                total, count = np.zeros((STATES, ACTIONS)), np.zeros((STATES, ACTIONS))
                np.add.at(total, pair, outcome)
                np.add.at(count, pair, 1)
                q = total / count
            mean = np.mean((outcome - q[pair]) ** 2)
            assert error[number] == pytest.approx(mean, rel=0.05)


def test_critics_begin_as_the_mean_of_the_log(few):
    begun = evaluated(candidates(POLICIES), *few, hidden=(8,), updates=1, lr=1e-9)
    mean = Episodes(few[0], DISCOUNT).returns_to_go.mean()
    np.testing.assert_allclose(begun.initial_values, mean, atol=1e-4)


def line(gain):
    return policy_of(lambda observation: gain * observation)


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
    return steps_log(
        rows, observation=state, action=action, reward=-((action - state) ** 2)[:, 0],
        next_observation=np.roll(state, -1, 0), terminated=np.arange(rows) % 3 == 2,
    )  # fmt: skip


def test_continuous_actions():
    """No state says which step it is, so V solves v = -E[(a - x)**2] + 0.5 * (2 / 3) * v."""
    train, held_out = line_log(1200).split(0.7, 0)
    gains = (1.0, 0.0, -1.0)
    policies = {f"gain {gain}": line(gain) for gain in gains}
    estimate = fitted_q_evaluation(
        policies, train, held_out, discount=0.5, hidden=(64,), lr=1e-2, updates=500, polyak=0.1
    )
    values = [-((1 - gain) ** 2) / 3 / (1 - 0.5 * 2 / 3) for gain in gains]
    np.testing.assert_allclose(estimate.initial_values.mean(1), values, atol=0.12)
    np.testing.assert_allclose(estimate.values, values, atol=0.2)
    low, high = estimate.intervals().T
    # 0 itself was never logged, only returns as near as 1e-5
    assert ((low < values) & (values < high + 1e-4)).all()
    returns = plain_returns(held_out, 0.5)
    np.testing.assert_allclose(estimate.episodes.behaviour_scores, returns, atol=1e-5)
    assert (estimate.episodes.unsupported < 0.1).all()


def test_continuous_actions_far_from_the_log_are_unsupported():
    train, held_out = line_log(400, spread=0.1).split(0.5, 0)
    who = {"near": line(1.0), "far": line(-1.0)}
    scores = fitted_q_evaluation(who, train, held_out, discount=0.5, **BRIEF).episodes
    assert scores.unsupported[0] < 0.05
    assert scores.unsupported[1] > 0.6
    assert scores.worst_unsupported[1] == pytest.approx(1.0)
    assert scores.behaviour_unsupported == pytest.approx(0.01)


def test_with_many_actions_visits_are_linear_in_features_and_probabilities(
    parts, fitted, monkeypatch
):
    """Instead of in their products, of which there would be too many; a short fit is corrected."""
    monkeypatch.setattr(critics_file, "MAX_FEATURES", 1)
    estimate, values = evaluated(candidates(POLICIES), *parts, updates=60), fitted["table"].values
    gaps = [np.abs(v - values) for v in (estimate.values, estimate.initial_values.mean(1))]
    assert gaps[0].mean() < 0.5 * gaps[1].mean()


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (None, False), (False, False)])
def test_progress_is_shown_where_it_is_asked_for(progress, shown, capsys):
    train, held_out = line_log(400, spread=0.1).split(0.5, 0)
    who = {"near": line(1.0)}
    fitted_q_evaluation(who, train, held_out, discount=0.5, progress=progress, **BRIEF)
    assert ("fitted Q evaluation" in capsys.readouterr().err) is shown


def test_continuous_samples_leave_the_caller_s_random_state_as_it_is():
    dataset = load_dataset(small_columns(rows=80))
    agents = {"one": box_agent(), "two": box_agent(seed=1)}
    agents["one"].actor.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    how = {"discount": 0.9, "deterministic": False, **BRIEF}
    options = ({}, {}, {"action_samples": 1})
    sampled = [fitted_q_evaluation(agents, dataset, dataset, **how, **each) for each in options]
    assert torch.equal(torch.rand(2), expected)
    assert agents["one"].actor.training
    np.testing.assert_array_equal(sampled[0].initial_values, sampled[1].initial_values)
    assert np.abs(sampled[0].initial_values - sampled[2].initial_values).max() > 0
    assert sampled[0].episodes.scores.shape == (2, 8)
    assert np.isfinite(sampled[0].td_error).all()


def test_first_states_have_draws_of_their_own_however_many_there_are(monkeypatch):
    """Each part of them had the draws of the first part."""
    monkeypatch.setattr(critics_file, "ROWS_AT_ONCE", 4)
    step = (np.arange(80) % 10).astype(np.float32)  # all episodes of 10 steps look alike
    dataset = load_dataset(small_columns(80, observation=step[:, None] * np.ones(3, np.float32)))
    how = {"discount": 0.9, "deterministic": False, **BRIEF}
    (values,) = fitted_q_evaluation({"one": box_agent()}, dataset, dataset, **how).initial_values
    assert len(np.unique(values.round(9))) == 8


def test_dict_observations_with_a_category():
    draw = np.random.default_rng(0)
    where, ward = draw.normal(size=(40, 2)).astype(np.float32), draw.integers(3, size=40)
    dataset = load_dataset(small_columns(observation={"where": where, "ward": ward}))
    policy = TensorDictModule(nn.Linear(2, 2), [("observation", "where")], ["action"])
    estimate = fitted_q_evaluation({"a": policy}, dataset, dataset, discount=0.9, **BRIEF)
    assert np.isfinite(estimate.episodes.scores).all()


@pytest.mark.parametrize("make", [box_agent, discrete_agent])
def test_training_on_a_device_waits_for_nothing(make, monkeypatch):
    """On ``meta`` in place of a GPU; row numbers are copied there once for many updates."""
    monkeypatch.setattr(critics_file, "DRAWN_TOGETHER", 4)
    more = {} if make is box_agent else {"action": np.arange(40) % 4}
    dataset = load_dataset(small_columns(**more))
    if more:
        dataset = replace(dataset, action_space=spaces.Discrete(4))
    who, episodes = resolve_candidates({"one": make()}), Episodes(dataset, DISCOUNT)
    critics = Critics(who, episodes, torch.device("meta"), (0.0, 1.0))
    steps, counts = Steps(critics, episodes, Coverage(dataset, dataset)), {}
    for updates in (1, 4, 5):
        with Copies() as mode:
            critics.fit(steps, (4,), updates, 4, 1e-3, 0.05, False)
        counts[updates] = mode.count
    assert counts[4] == counts[1]
    assert counts[5] == counts[1] + 1
    with Copies():
        for policy in (0, 1):
            steps.visits(policy)


CUT = WORLD.dataset(uniform(), episodes=9, horizon=2)
ELSEWHERE = TensorDictModule(nn.Identity(), in_keys=["elsewhere"], out_keys=["action"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"candidates": {}}, "at least one"),
        ({"candidates": {"x": 3}}, "candidate 'x': policy must be a TensorDict module"),
        ({"discount": 1.5}, r"discount is 1.5"),
        ({"updates": 0}, "updates is"),
        ({"batch_size": True}, "batch_size is"),
        ({"action_samples": 0}, "action_samples is"),
        ({"min_count": 0}, "min_count is"),
        ({"lr": 0.0}, "lr is"),
        ({"polyak": 0.0}, "polyak is 0"),
        ({"hidden": (4, 0)}, r"hidden\[1\] is 0"),
        ({"device": "gpu"}, "device is 'gpu', which this machine cannot use"),
        ({"device": "cuda:99"}, "device is 'cuda:99', which this machine cannot use"),
        (
            {"held_out": CUT, "discount": 1.0},
            "discount is 1 and [1-9] of 9 episodes of held_out end",
        ),
        ({"train": CUT, "discount": 1}, "of train end without termination"),
        ({"model": "tree"}, "model is 'tree'; choose one of 'auto', 'table', 'network'"),
        ({"candidates": {"x": ELSEWHERE}}, r"reads \['elsewhere'\], which the dataset lacks"),
        ({"candidates": {"x": actor(np.full((STATES, 4), 0.25))}}, "each of the 3 actions"),
        (
            {"candidates": {"x": actor(np.full((STATES, ACTIONS), np.nan))}},
            "to every allowed action",
        ),
    ],
)
def test_what_cannot_be_is_refused(parts, changed, message):
    given = {"train": parts[0], "held_out": parts[1], "candidates": candidates(POLICIES), **FAST}
    kind = TypeError if "TensorDict module" in message else ValueError
    with pytest.raises(kind, match=message):
        fitted_q_evaluation(**given | {"model": "network", "discount": DISCOUNT} | changed)


def test_logs_that_do_not_fit_are_refused(parts):
    other = replace(parts[1], action_space=spaces.Discrete(4))
    with pytest.raises(ValueError, match="action_space of train"):
        evaluated(candidates(POLICIES), parts[0], other)
    with pytest.raises(ValueError, match=r"'a' acts with shape \(20, 1, 1\).* finite vectors"):
        evaluated({"a": line(float("nan"))}, line_log(20), line_log(20, 1))
    square = replace(line_log(20), action_space=spaces.Box(-1, 1, (1, 1)))
    with pytest.raises(ValueError, match=r"expected Discrete, or a Box of shape \(A,\)"):
        evaluated({"a": line(1.0)}, square, square)
    with pytest.raises(ValueError, match=r"continuous actions or too many distinct states; choose"):
        evaluated({"a": line(1.0)}, line_log(20), line_log(20, 1), "table")
    pictures = np.random.default_rng(0).integers(9, size=(40, 9, 9, 3), dtype=np.uint8)
    dataset = load_dataset(small_columns(observation=pictures))
    for model in ("network", "auto"):
        with pytest.raises(ValueError, match="reads numbers and categories, no images"):
            evaluated({"x": line(1.0)}, dataset, dataset, model)


def test_printing_an_evaluation_shows_no_arrays(few):
    """One line, however many episodes there are."""
    text = repr(evaluated({"only": actor(uniform())}, *few, "table"))
    assert len(text) < 400
    assert "EpisodeScores(1 candidates, " in text


class OfProbabilities(torch.distributions.Distribution):
    """Has ``probs`` and no ``logits``; ``of`` names what it has."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, probs, name="probs"):
        super().__init__(probs.shape[:-1], validate_args=False)
        setattr(self, name, probs)
        self.weights = probs

    @property
    def deterministic_sample(self):
        return self.weights.argmax(-1)


@pytest.mark.parametrize("deterministic", [False, True])
def test_probabilities_are_read_of_a_distribution_without_logits(parts, deterministic):
    policy = POLICIES[1]
    of_table = actor(policy)
    states = parts[0].transitions[:50]

    def candidate(name):
        module = TensorDictModule(
            policy_of(lambda states: torch.as_tensor(policy)[states]).module,
            in_keys=["observation"],
            out_keys=["probs"],
        )
        made = ProbabilisticActor(
            module, in_keys=["probs"], distribution_class=OfProbabilities,
            distribution_kwargs={"name": name},
        )  # fmt: skip
        return resolve_candidates({"own": made})[0]

    expected = log_probabilities(
        resolve_candidates({"table": of_table})[0], states, ACTIONS, deterministic=deterministic
    )
    given = log_probabilities(candidate("probs"), states, ACTIONS, deterministic=deterministic)
    torch.testing.assert_close(given, expected)
    if deterministic:
        torch.testing.assert_close(
            log_probabilities(candidate("weight"), states, ACTIONS, deterministic=True), expected
        )
    else:
        with pytest.raises(
            ValueError, match="'own' has the distribution OfProbabilities, which has ne"
        ):
            log_probabilities(candidate("weight"), states, ACTIONS)
