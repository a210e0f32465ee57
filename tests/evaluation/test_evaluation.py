"""Rollouts: which episodes count, what reaches the policy and the environment, what is said."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.envs.utils import exploration_type
from torchrl.modules import MaskedCategorical, NormalParamExtractor, ProbabilisticActor, TanhNormal

from iql_torchrl.evaluation.policy_input import action_mask
from iql_torchrl.evaluation.rollout import evaluate
from iql_torchrl.evaluation.statistics import bootstrap_interval, wilson_interval


class Seeded(gymnasium.Env):
    """Ends after ``1 + seed % 7`` steps; each step pays the first action plus its number."""

    opened = []  # noqa: RUF012

    def __init__(self, action_space=None, info=None, observe=None, space=None):
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (2,))
        self.observation_space = space or spaces.Box(-10.0, 10.0, (3,), dtype=np.float64)
        self.info, self.observe = info or {}, observe
        self.closed, self.actions, self.seeds = False, [], []
        Seeded.opened.append(self)

    def _observe(self):
        if self.observe is not None:
            return self.observe(self)
        return np.array([self.seed, self.count, 1.0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.count = seed, 0
        self.seeds.append(seed)
        return self._observe(), dict(self.info)

    def step(self, action):
        self.actions.append(action)
        self.count += 1
        reward = float(np.asarray(action).reshape(-1)[0]) + self.count
        return self._observe(), reward, self.count > self.seed % 7, False, dict(self.info)

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def _forget_environments():
    Seeded.opened = []


def constant(value):
    value = torch.as_tensor(value)
    return TensorDictModule(
        lambda seen: value.expand(len(seen), *value.shape), ["observation"], ["action"]
    )


HALF = (0.5, -0.25)


def expected(seed, episodes, action=0.5):
    lengths = np.array([1 + (seed + e) % 7 for e in range(episodes)])
    return lengths, lengths * action + lengths * (lengths + 1) / 2


@pytest.mark.parametrize("num_envs", [1, 3, 8, 50])
def test_every_episode_counts_once_whatever_the_number_of_environments(num_envs):
    result = evaluate(constant(HALF), Seeded, episodes=20, num_envs=num_envs, seed=11)
    lengths, returns = expected(11, 20)
    np.testing.assert_array_equal(result.lengths, lengths)
    np.testing.assert_array_equal(result.returns, returns)
    assert result.returns.dtype == np.float64
    assert len(Seeded.opened) == min(num_envs, 20)
    seeds = sorted(seed for env in Seeded.opened for seed in env.seeds)
    assert seeds == list(range(11, 31)), "exactly the expected episodes are started"
    assert all(env.closed for env in Seeded.opened)


def test_rewards_may_be_arrays_of_one_number():
    """As of environments that compute with actions ``(1,)``; NumPy 2.4 has no ``float`` of these."""

    class InArrays(Seeded):
        def step(self, action):
            observation, reward, *others = super().step(action)
            return observation, np.array([reward]), *others

    result = evaluate(constant(HALF), InArrays, episodes=4, num_envs=2, seed=11)
    np.testing.assert_array_equal(result.returns, expected(11, 4)[1])


def spy(function, in_keys=("observation",)):
    """A policy of ``function``, and the list of what it reads."""
    seen = []

    def read(*inputs):
        seen.append(inputs if len(inputs) > 1 else inputs[0])
        return function(*inputs)

    return TensorDictModule(read, in_keys=list(in_keys), out_keys=["action"]), seen


def test_policy_gets_float32_and_environment_its_own_dtype():
    policy, seen = spy(lambda x: torch.zeros(len(x), 2, dtype=torch.float64))
    evaluate(policy, Seeded, episodes=3, num_envs=2, seed=5)
    assert {tensor.dtype for tensor in seen} == {torch.float32}
    assert seen[0].tolist() == [[5.0, 0.0, 1.0], [6.0, 0.0, 1.0]]
    taken = {action.dtype for env in Seeded.opened for action in env.actions}
    assert taken == {np.dtype(np.float32)}


def test_a_compiled_policy_is_accepted():
    policy = torch.compile(constant(HALF), backend="eager")
    result = evaluate(policy, Seeded, episodes=4, num_envs=2, seed=0)
    np.testing.assert_array_equal(result.returns, expected(0, 4)[1])


def test_a_time_limit_and_max_steps_end_an_episode_and_count_it():
    class Endless(Seeded):
        def step(self, action):
            observation, reward, _, _, info = super().step(action)
            return observation, reward, False, False, info

    make = lambda: gymnasium.wrappers.TimeLimit(Endless(), max_episode_steps=6)  # noqa: E731
    arguments = {"episodes": 5, "num_envs": 2, "seed": 3}
    result = evaluate(constant(HALF), make, **arguments)
    assert result.lengths.tolist() == [6] * 5
    assert result.returns.tolist() == [6 * 0.5 + 21.0] * 5
    assert evaluate(constant(HALF), make, **arguments, max_steps=4).lengths.tolist() == [4] * 5
    result = evaluate(constant(HALF), Seeded, episodes=7, num_envs=3, seed=0, max_steps=4)
    assert result.lengths.tolist() == [1, 2, 3, 4, 4, 4, 4]


# ---- what the policy reads -----------------------------------------------------------------


def dict_env():
    def observe(env):
        return {"observation": np.array([env.seed, env.count]), "desired_goal": np.array([0.25])}

    sizes = {"observation": 2, "desired_goal": 1}
    boxes = {name: spaces.Box(-10, 10, (size,), np.float64) for name, size in sizes.items()}
    return Seeded(space=spaces.Dict(boxes), observe=observe)


@pytest.mark.parametrize(
    "keys",
    [[("observation", "observation"), ("observation", "desired_goal")],
     ["observation", "desired_goal"]],
)  # fmt: skip
def test_dict_observations_nested_or_at_the_top_level(keys):
    policy, seen = spy(lambda observation, goal: goal.expand(-1, 2), keys)
    result = evaluate(policy, dict_env, episodes=4, num_envs=2, seed=3)
    np.testing.assert_array_equal(result.returns, expected(3, 4, action=0.25)[1])
    assert seen[0][0].tolist() == [[3.0, 0.0], [4.0, 0.0]]


@pytest.mark.parametrize(
    ("space", "value", "expected", "dtype"),
    [
        (spaces.Discrete(5, start=2), 4, 2, torch.int64),
        (spaces.MultiDiscrete([3, 4]), np.array([2, 1]), [2, 1], torch.int64),
        (spaces.MultiBinary(2), np.array([1, 0], np.int8), [1, 0], torch.int64),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([7, 255], np.uint8), [7, 255], torch.uint8),
    ],
)
def test_observations_keep_the_dtypes_of_the_training_data(space, value, expected, dtype):
    policy, seen = spy(lambda observation: torch.zeros(len(observation), 2))
    make = lambda: Seeded(space=space, observe=lambda env: value)  # noqa: E731
    evaluate(policy, make, episodes=1, seed=0)
    assert seen[0].dtype == dtype
    assert seen[0].tolist() == [expected]


@pytest.mark.parametrize(
    ("keys", "make", "message"),
    [
        (["state"], Seeded, "which the environment does not give"),
        ([("observation", "goal")], dict_env, "which the environment does not give"),
        (["desired_goal", "x"], dict_env, "which the environment does not give"),
        (["observation"], dict_env, r"gives a Dict of \['desired_goal', 'observation'\]"),
    ],
)
def test_a_key_that_the_environment_lacks_is_named(keys, make, message):
    policy, _ = spy(lambda *_: torch.zeros(1, 2), keys)
    with pytest.raises(ValueError, match=message):
        evaluate(policy, make, episodes=1, seed=0)
    assert all(env.closed for env in Seeded.opened)


def masked_policy():
    logits = TensorDictModule(
        lambda observation: torch.arange(4.0).expand(observation.shape[0], 4),
        in_keys=["observation"],
        out_keys=["logits"],
    )
    return ProbabilisticActor(
        logits,
        in_keys={"logits": "logits", "mask": "action_mask"},
        distribution_class=MaskedCategorical,
    )


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"action_mask": np.array([1, 0, 1, 0], dtype=np.int8)}, None),
        ({"admissible_actions": [0, 2]}, None),
        ({"admissible_actions": [0, 4]}, r"holds 4; expected actions of Discrete\(4\)"),
        ({}, "info holds only"),
        ({"action_mask": [0, 0, 0, 0]}, "at least one of them true"),
        ({"action_mask": [1, 1]}, "4 booleans"),
    ],
)
def test_action_mask_comes_from_info(info, message):
    make = lambda: Seeded(spaces.Discrete(4), info=info)  # noqa: E731
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        evaluate(masked_policy(), make, episodes=3, num_envs=2, seed=1)
    assert {action for env in Seeded.opened for action in env.actions} == {2} - {message and 2}


def test_admissible_actions_count_from_the_start_of_the_space():
    space = spaces.Discrete(3, start=-1)
    mask = action_mask({"admissible_actions": [-1, 1]}, space)
    assert mask.tolist() == [True, False, True]
    with pytest.raises(ValueError, match="holds 2; expected actions of"):
        action_mask({"admissible_actions": [2]}, space)


# ---- what the environment gets -------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [2, [2], [0, 0, 1, 0], [False, False, True, False], [0.1, 0.2, 0.9, -1.0]]
)
def test_discrete_actions_as_indices_or_one_value_each(value):
    make = lambda: Seeded(spaces.Discrete(4, start=10))  # noqa: E731
    result = evaluate(constant(value), make, episodes=1, seed=0)
    assert Seeded.opened[0].actions == [12]
    assert result.returns.tolist() == [13.0]


def test_a_hair_outside_the_bounds_is_clipped_and_infinite_bounds_accept_any_finite_action():
    evaluate(constant((1.0 + 5e-7, -1.0)), Seeded, episodes=1, seed=0)
    assert Seeded.opened[0].actions[0].tolist() == [1.0, -1.0]
    make = lambda: Seeded(spaces.Box(-np.inf, np.inf, (1,)))  # noqa: E731
    assert evaluate(constant([1e6]), make, episodes=1, seed=0).returns.tolist() == [1e6 + 1]


BOX, FOUR = spaces.Box(-1.0, 1.0, (2,)), spaces.Discrete(4)


@pytest.mark.parametrize(
    ("space", "value", "message"),
    [
        (BOX, (1.01, 0.0), "outside the bounds"),
        (BOX, (math.nan, 0.0), "not finite"),
        (BOX, (math.inf, 0.0), "not finite"),
        (BOX, (0.0, 0.0, 0.0), "must have shape"),
        (FOUR, 4, r"is not in 0\.\.3"),
        (FOUR, -1, r"is not in 0\.\.3"),
        (FOUR, 1.5, "must be integer indices"),
        (FOUR, [0, 1], "must be integer indices"),
        (FOUR, [math.nan, 0.0, 0.0, 0.0], "is NaN; look for NaN"),
    ],
)
def test_impossible_actions_are_refused_and_environments_closed(space, value, message):
    with pytest.raises(ValueError, match=f"policy output 'action'.*{message}"):
        evaluate(constant(value), lambda: Seeded(space), episodes=4, num_envs=2, seed=0)
    assert [env.closed for env in Seeded.opened] == [True, True]


# ---- what the caller keeps -----------------------------------------------------------------


def stochastic_actor():
    network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
    )


def test_sampling_is_reproducible_and_does_not_change_the_callers_generator():
    actor = stochastic_actor()
    arguments = {"episodes": 5, "num_envs": 2, "deterministic": False}
    before = torch.get_rng_state()
    first = evaluate(actor, Seeded, seed=3, **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    np.testing.assert_array_equal(evaluate(actor, Seeded, seed=3, **arguments).returns,
                                  first.returns)  # fmt: skip
    greedy = evaluate(actor, Seeded, episodes=5, num_envs=2, seed=3)
    again = evaluate(actor, Seeded, episodes=5, num_envs=5, seed=3)
    assert not np.allclose(greedy.returns, first.returns)
    np.testing.assert_allclose(greedy.returns, again.returns, rtol=1e-5)


def test_sampled_discrete_actions_have_the_policys_frequencies():
    def counts(deterministic, make):
        opened = len(Seeded.opened)
        logits = TensorDictModule(
            lambda observation: torch.tensor([0.1, 0.7, 0.2]).log().expand(len(observation), 3),
            in_keys=["observation"],
            out_keys=["logits"],
        )
        actor = ProbabilisticActor(logits, in_keys=["logits"], distribution_class=Categorical)
        evaluate(actor, make, episodes=350, num_envs=5, seed=0, deterministic=deterministic)
        taken = [action for env in Seeded.opened[opened:] for action in env.actions]
        assert len(taken) == 4 * 350  # lengths 1 to 7, 50 times each
        return np.bincount(taken, minlength=3) / len(taken)

    make = lambda: Seeded(spaces.Discrete(3))  # noqa: E731
    np.testing.assert_allclose(counts(False, make), [0.1, 0.7, 0.2], atol=0.05)
    assert counts(True, make).tolist() == [0.0, 1.0, 0.0]


def test_runs_in_eval_mode_without_gradients_and_restores_each_submodule():
    modes = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Dropout()

        def forward(self, observation):
            modes.append((self.first.training, self.second.training, torch.is_grad_enabled()))
            return self.second(self.first(observation)).tanh()

    spy = Spy()
    policy = TensorDictModule(spy, in_keys=["observation"], out_keys=["action"])
    spy.second.eval()
    evaluate(policy, Seeded, episodes=1, seed=0)
    assert set(modes) == {(False, False, False)}
    assert (policy.training, spy.first.training, spy.second.training) == (True, True, False)
    assert torch.is_grad_enabled()


def test_environments_are_closed_and_modes_restored_when_a_step_fails():
    class Broken(Seeded):
        def step(self, action):
            raise RuntimeError("the simulator fell over")

    policy, kind = constant(HALF), exploration_type()
    with pytest.raises(RuntimeError, match="fell over"):
        evaluate(policy, Broken, episodes=3, num_envs=2, seed=0)
    assert [env.closed for env in Seeded.opened] == [True, True]
    assert policy.training
    assert torch.is_grad_enabled()
    assert exploration_type() == kind


# ---- what is said --------------------------------------------------------------------------


def test_summary_has_the_textbook_numbers():
    result = evaluate(constant(HALF), Seeded, episodes=14, seed=0, reference_scores=(2.0, 12.0))
    summary, returns = result.summary(), expected(0, 14)[1]
    assert summary["episodes"] == 14
    assert summary["return_mean"] == pytest.approx(returns.mean())
    assert summary["return_standard_error"] == pytest.approx(returns.std(ddof=1) / math.sqrt(14))
    assert (summary["return_min"], summary["return_max"]) == (returns.min(), returns.max())
    assert summary["return_low"] < summary["return_mean"] < summary["return_high"]
    assert summary["length_mean"] == 4.0
    assert summary["score_mean"] == pytest.approx(100 * (returns.mean() - 2) / 10)
    assert summary["score_standard_error"] == pytest.approx(10 * summary["return_standard_error"])
    for end in ("low", "high"):  # a score is an affine map of a return
        assert summary[f"score_{end}"] == pytest.approx(10 * (summary[f"return_{end}"] - 2))
    assert "success_rate" not in summary
    assert "success_low" not in summary
    assert "score_low" not in evaluate(constant(HALF), Seeded, episodes=2, seed=0).summary()
    assert summary == result.summary()


@pytest.mark.parametrize("count", [2, 7, 300, 400_000])
def test_bootstrap_is_that_of_a_plain_loop(count, monkeypatch):
    monkeypatch.setattr(
        "iql_torchrl.evaluation.statistics.RESAMPLES", resamples := 2000 if count < 1000 else 7
    )
    values, generator = np.random.default_rng(1).normal(size=count), np.random.default_rng(5)
    means = [values[generator.integers(count, size=count)].mean() for _ in range(resamples)]
    expected = np.percentile(means, [2.5, 97.5])
    np.testing.assert_allclose(bootstrap_interval(values, seed=5), expected, rtol=1e-12)


def test_wilson_interval_of_known_rates():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=5e-5)
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    for trials in (1, 3, 50):
        for successes in range(trials + 1):
            low, high = wilson_interval(successes, trials)
            # The ends are rates q at which the observed rate is z standard errors away.
            for q in (low, high):
                distance = trials * (successes / trials - q) ** 2
                assert distance == pytest.approx(z * z * q * (1 - q), abs=1e-12)
            assert 0 <= low <= successes / trials <= high <= 1


def test_what_has_no_interval():
    for value in (math.nan, math.inf):
        assert np.isnan(bootstrap_interval(np.array([1.0, value, 2.0]), seed=0)).all()
    summary = evaluate(constant(HALF), Seeded, episodes=1, seed=0).summary()
    assert all(math.isnan(summary[f"return_{k}"]) for k in ("standard_error", "low", "high"))


@pytest.mark.parametrize("key", ["success", "is_success"])
def test_success_at_any_step_counts(key):
    class Reaching(Seeded):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, {**info, key: self.count == 3}

    result = evaluate(constant(HALF), Reaching, episodes=7, seed=0)
    assert result.successes.tolist() == [False, False, True, True, True, True, True]
    summary = result.summary()
    assert summary["success_rate"] == pytest.approx(5 / 7)
    assert (summary["success_low"], summary["success_high"]) == wilson_interval(5, 7)
    assert evaluate(constant(HALF), Seeded, episodes=2, seed=0).successes is None


@pytest.mark.parametrize(
    "scores",
    [(1.0, 3.0), [1.0, 3.0], SimpleNamespace(random=1, expert=3),
     SimpleNamespace(ref_min_score=1.0, ref_max_score=3.0)],
)  # fmt: skip
def test_reference_scores_in_each_form(scores):
    result = evaluate(constant(HALF), Seeded, episodes=2, seed=0, reference_scores=scores)
    np.testing.assert_allclose(result.scores, 50.0 * (result.returns - 1.0))
    task = evaluate(constant(HALF), Seeded, episodes=2, seed=0, reference_scores="kitchen")  # 0, 4
    np.testing.assert_allclose(task.scores, 25.0 * task.returns)
    assert evaluate(constant(HALF), Seeded, episodes=1, seed=0).scores is None


@pytest.mark.parametrize("scores", [(3.0, 1.0), (1.0, 1.0), (0.0, math.nan), (1.0,), object()])
def test_useless_reference_scores_are_refused(scores):
    with pytest.raises(ValueError, match="reference_scores must be"):
        evaluate(constant(HALF), Seeded, episodes=1, seed=0, reference_scores=scores)
    assert Seeded.opened == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("episodes", 0), ("episodes", 1.0), ("num_envs", 0), ("seed", -1), ("max_steps", 0),
     ("episodes", True)],
)  # fmt: skip
def test_numbers_out_of_range_are_named(name, value):
    arguments = {"episodes": 1, "seed": 0, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}; expected an integer"):
        evaluate(constant(HALF), Seeded, **arguments)


SHARED = Seeded()


@pytest.mark.parametrize(
    ("policy", "make", "error", "message"),
    [
        (nn.Linear(3, 2), Seeded, TypeError, "policy must be a TensorDict module.*found Linear"),
        (TensorDictModule(nn.Identity(), ["observation"], ["value"]), Seeded, ValueError,
         "must write 'action'"),
        (constant(HALF), "Pendulum-v1", TypeError, "make_env must be callable"),
        (constant(HALF), dict, TypeError, "must return a gymnasium.Env, found dict"),
        (constant(HALF), lambda: SHARED, ValueError, "same environment twice"),
        (constant(HALF), lambda: Seeded(spaces.MultiBinary(2)), ValueError,
         "action space must be Box, Discrete or MultiDiscrete"),
    ],
)  # fmt: skip
def test_wrong_kinds_of_argument_are_named(policy, make, error, message):
    with pytest.raises(error, match=message):
        evaluate(policy, make, episodes=2, seed=0)


@pytest.mark.gpu
def test_policy_on_cuda_changes_neither_generator():
    actor = stochastic_actor().cuda()
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    results = [evaluate(actor, Seeded, episodes=4, seed=0, deterministic=False) for _ in range(2)]
    np.testing.assert_array_equal(results[0].returns, results[1].returns)
    after = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
