"""Fitted Q evaluation against linear solves of a tabular MDP, and of the log's own counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from iql_torchrl.fqe import fitted_q_evaluation
from iql_torchrl.members import resolve_members, returns_to_go
from small_agents import box_agent, discrete_agent
from small_agents import log as small_log
from small_mdp import ACTIONS, DISCOUNT, STATES, actor, random_mdp, random_policies, uniform
from tensordict.nn import TensorDictModule
from torch import nn

from iql_torchrl import load_dataset

FAST = {"hidden": (), "lr": 0.1, "updates": 1000, "batch_size": 512, "polyak": 0.1}
# of a mean: what the choice of batches still moves; 3,000 updates of 1,024 rows leave 0.007
NEAR = 0.04
BRIEF = {"hidden": (8,), "updates": 30, "batch_size": 16}
MDP = random_mdp()
POLICIES = random_policies(4)


def members(policies=POLICIES):
    return {f"p{number}": actor(policy) for number, policy in enumerate(policies)}


def counted_value(log, policy):
    """V by a linear solve of the MDP whose dynamics are the log's frequencies."""
    rows = log.transitions
    state, action = rows["observation"].numpy(), rows["action"].numpy()
    following = rows["next", "observation"].numpy()
    going = ~rows["next", "terminated"].squeeze(-1).numpy()
    chain = np.zeros((STATES, ACTIONS, STATES))
    reward, count = np.zeros((STATES, ACTIONS)), np.zeros((STATES, ACTIONS))
    np.add.at(count, (state, action), 1)
    np.add.at(chain, (state, action, following), going)
    np.add.at(reward, (state, action), rows["next", "reward"].squeeze(-1).numpy())
    known = np.maximum(count, 1)
    matrix = (policy[:, :, None] * chain / known[:, :, None]).sum(1)
    return np.linalg.solve(np.eye(STATES) - DISCOUNT * matrix, (policy * reward / known).sum(1))


def first_states(log):
    return log.transitions["observation"].numpy()[np.r_[0, np.cumsum(log.episode_lengths)[:-1]]]


@pytest.fixture(scope="module")
def parts():
    return MDP.log(uniform(), episodes=1500).split(0.6, 0)


@pytest.mark.parametrize(
    "more", [{}, {"target_every": 10}, {"hidden": (32,), "lr": 5e-3}],
    ids=["table", "periodic", "network"],
)  # fmt: skip
def test_values_are_those_of_the_counted_mdp(parts, more):
    train, held_out = parts
    found = fitted_q_evaluation(members(), train, held_out, discount=DISCOUNT, **(FAST | more))
    starts = first_states(held_out)
    for number, policy in enumerate(POLICIES):
        wanted = counted_value(train, policy)[starts]
        np.testing.assert_allclose(found.initial_values[number], wanted, atol=2 * NEAR)
        assert found.values[number] == pytest.approx(wanted.mean(), abs=NEAR)


def test_values_approach_the_truth_and_rank_it_right():
    train, held_out = MDP.log(uniform(), episodes=3000, seed=3).split(0.8, 0)
    found = fitted_q_evaluation(members(), train, held_out, discount=DISCOUNT, **FAST)
    exact = np.array([MDP.values(policy)[first_states(held_out)].mean() for policy in POLICIES])
    np.testing.assert_allclose(found.values, exact, atol=0.12)
    assert np.array_equal(np.argsort(found.values), np.argsort(exact))
    low, high = found.intervals().T
    assert ((low < found.values) & (found.values < high)).all()
    assert found.td_error == pytest.approx(found.td_error_training, rel=0.2)


def test_a_truncated_episode_bootstraps_and_a_terminated_one_does_not():
    log = MDP.log(uniform(), episodes=1500, horizon=2)
    rows = log.transitions
    assert rows["next", "truncated"].sum() > 500
    found = fitted_q_evaluation(members(), log, log, discount=DISCOUNT, **FAST)
    shut = rows.clone()
    shut["next", "terminated"] = rows["next", "done"].clone()
    closed = replace(log, transitions=shut)
    ended = fitted_q_evaluation(members(), closed, closed, discount=DISCOUNT, **FAST)
    starts = first_states(log)
    for number, policy in enumerate(POLICIES):
        wanted = counted_value(log, policy)[starts].mean()
        assert found.values[number] == pytest.approx(wanted, abs=NEAR)
        without = counted_value(closed, policy)[starts].mean()
        assert ended.values[number] == pytest.approx(without, abs=NEAR)
    assert np.abs(found.values - ended.values).max() > 0.2
    ends = np.cumsum(log.episode_lengths) - 1
    cut = rows["next", "truncated"].squeeze(-1).numpy()[ends]
    last = rows["next", "observation"].numpy()[ends]
    wanted = DISCOUNT**log.episode_lengths * counted_value(log, POLICIES[0])[last] * cut
    np.testing.assert_allclose(found.end_values[0], wanted, atol=2 * NEAR)
    assert not ended.end_values.any()


def test_values_do_not_depend_on_the_reward_map(parts):
    train, held_out = parts
    brief = FAST | {"updates": 200}
    raw = fitted_q_evaluation(members(), train, held_out, discount=DISCOUNT, **brief)
    log = MDP.log(uniform(), episodes=1500, reward=(-250.0, 3.0))
    mapped = fitted_q_evaluation(members(), *log.split(0.6, 0), discount=DISCOUNT, **brief)
    np.testing.assert_allclose(mapped.initial_values, raw.initial_values, atol=1e-3)
    np.testing.assert_allclose(mapped.td_error, raw.td_error, rtol=1e-3)


@pytest.mark.parametrize("hidden", [(), (16, 16)])
def test_members_together_equal_members_alone(parts, hidden):
    options = {**FAST, "hidden": hidden, "updates": 200, "lr": 1e-2}
    together = fitted_q_evaluation(members(), *parts, discount=DISCOUNT, **options)
    for number, (name, policy) in enumerate(members().items()):
        alone = fitted_q_evaluation({name: policy}, *parts, discount=DISCOUNT, **options)
        assert alone.names == (name,)
        np.testing.assert_allclose(
            alone.initial_values[0], together.initial_values[number], atol=1e-5
        )
        assert alone.td_error[0] == pytest.approx(together.td_error[number], abs=1e-5)


def test_choices_asked_for_at_each_batch_give_the_same(parts):
    kept = fitted_q_evaluation(members(), *parts, discount=DISCOUNT, **{**FAST, "updates": 60})
    asked = fitted_q_evaluation(
        members(), *parts, discount=DISCOUNT, **{**FAST, "updates": 60}, table_bytes=0
    )
    np.testing.assert_array_equal(kept.initial_values, asked.initial_values)


def test_masks_close_actions_also_to_policies_that_do_not_read_them():
    masks = np.random.default_rng(5).random((STATES, ACTIONS)) < 0.6
    masks[np.arange(STATES), np.arange(STATES) % ACTIONS] = True
    behaviour = masks / masks.sum(1, keepdims=True)
    train, held_out = MDP.log(behaviour, episodes=1500, masks=masks).split(0.6, 0)
    found = fitted_q_evaluation(members(), train, held_out, discount=DISCOUNT, **FAST)
    for number, policy in enumerate(POLICIES):
        allowed = policy * masks / (policy * masks).sum(1, keepdims=True)
        wanted = counted_value(train, allowed)[first_states(held_out)].mean()
        assert found.values[number] == pytest.approx(wanted, abs=NEAR)


def test_the_deterministic_policy_is_the_most_probable_action(parts):
    modes = [np.eye(ACTIONS)[policy.argmax(1)] for policy in POLICIES]
    options = {**FAST, "updates": 100}
    one = fitted_q_evaluation(members(), *parts, discount=DISCOUNT, deterministic=True, **options)
    other = fitted_q_evaluation(members(modes), *parts, discount=DISCOUNT, **options)
    np.testing.assert_array_equal(one.initial_values, other.initial_values)


class _Plain(nn.Module):
    """A discrete policy that writes an action and has no distribution."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", torch.as_tensor(table.argmax(1)))

    def forward(self, observation):
        return self.table[observation]


def test_a_policy_without_a_distribution_is_its_action(parts):
    modes = [np.eye(ACTIONS)[policy.argmax(1)] for policy in POLICIES[:1]]
    plain = TensorDictModule(_Plain(POLICIES[0]), in_keys=["observation"], out_keys=["action"])
    options = {**FAST, "updates": 100}
    one = fitted_q_evaluation({"a": plain}, *parts, discount=DISCOUNT, **options)
    other = fitted_q_evaluation(members(modes), *parts, discount=DISCOUNT, **options)
    np.testing.assert_array_equal(one.initial_values, other.initial_values)


class _Line(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, observation):
        return self.gain * observation


def line_log(episodes=400, seed=0):
    """One state in [-1, 1], one action, reward -(a - x)**2, next state drawn anew, three steps."""
    draw = np.random.default_rng(seed)
    rows = 3 * episodes
    state = draw.uniform(-1, 1, (rows, 1)).astype(np.float32)
    action = draw.uniform(-1, 1, (rows, 1)).astype(np.float32)
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
    train, held_out = line_log(1500).split(0.8, 0)
    policies = {
        f"gain {gain}": TensorDictModule(_Line(gain), in_keys=["observation"], out_keys=["action"])
        for gain in (1.0, 0.0, -1.0)
    }
    found = fitted_q_evaluation(
        policies, train, held_out, discount=0.5, hidden=(64,), lr=1e-2, updates=700, polyak=0.1
    )
    # no state says which step it is, so Q solves v = -E[(a - x)**2] + 0.5 * (2 / 3) * v
    wanted = [-((1 - gain) ** 2) / 3 / (1 - 0.5 * 2 / 3) for gain in (1.0, 0.0, -1.0)]
    np.testing.assert_allclose(found.values, wanted, atol=0.1)


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
    assert sampled[0].initial_values.shape == (2, 8)
    assert np.isfinite(sampled[0].td_error).all()


def test_the_caller_s_random_numbers_are_left_alone():
    dataset = load_dataset(small_log(rows=80))
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    agent = box_agent()
    agent.actor.train()
    fitted_q_evaluation({"a": agent}, dataset, dataset, discount=0.9, deterministic=False, **BRIEF)
    assert torch.equal(torch.rand(2), wanted)
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
    found = fitted_q_evaluation({"a": policy}, dataset, dataset, discount=0.9, **BRIEF)
    assert np.isfinite(found.initial_values).all()


def test_returns_to_go_against_a_loop(parts):
    log = parts[1]
    reward = log.transitions["next", "reward"].squeeze(-1).numpy().astype(float)
    found, row = returns_to_go(log, DISCOUNT), 0
    for length in log.episode_lengths:
        for step in range(length):
            ahead = reward[row + step : row + length]
            wanted = (DISCOUNT ** np.arange(len(ahead)) * ahead).sum()
            assert found[row + step] == pytest.approx(wanted)
        row += length


def test_agents_are_members_with_their_temperature():
    agent = discrete_agent(temperature=0.0)
    (member,) = resolve_members({"clone": agent})
    assert (member.name, member.policy, member.temperature) == ("clone", agent.actor, 0.0)
    assert resolve_members({"bare": agent.actor})[0].temperature is None


def test_what_cannot_be_is_refused(parts):
    train, held_out = parts

    def run(who=None, one=train, other=held_out, discount=DISCOUNT, **options):
        fitted_q_evaluation(
            members() if who is None else who, one, other, discount=discount, **(FAST | options)
        )

    with pytest.raises(ValueError, match="at least one"):
        run({})
    with pytest.raises(TypeError, match="member 'x': policy must be a TensorDict module"):
        run({"x": 3})
    with pytest.raises(ValueError, match=r"discount is 1.5"):
        run(discount=1.5)
    with pytest.raises(ValueError, match="action_space of train"):
        run(other=replace(held_out, action_space=spaces.Discrete(4)))
    for name, value in (("updates", 0), ("batch_size", True), ("target_every", 0), ("lr", 0.0)):
        with pytest.raises(ValueError, match=f"{name} is"):
            run(**{name: value})
    with pytest.raises(ValueError, match=r"hidden\[1\] is 0"):
        run(hidden=(4, 0))
    with pytest.raises(ValueError, match="device is 'cuda:99', which cannot be used here"):
        run(device="cuda:99")
    cut = MDP.log(uniform(), episodes=9, horizon=2)
    with pytest.raises(ValueError, match=r"discount is 1 and [1-9] of 9 episodes of held_out end"):
        run(other=cut, discount=1.0)
    with pytest.raises(ValueError, match="of train end without termination"):
        run(one=cut, discount=1)
    with pytest.raises(ValueError, match="polyak is 0"):
        run(polyak=0.0)
    with pytest.raises(ValueError, match=r"reads \['elsewhere'\], which the log lacks"):
        run({"x": TensorDictModule(nn.Identity(), in_keys=["elsewhere"], out_keys=["action"])})
    with pytest.raises(ValueError, match="each of the 3 actions"):
        run({"x": actor(np.full((STATES, 4), 0.25))})
    with pytest.raises(ValueError, match="no allowed action any probability"):
        run({"x": actor(np.full((STATES, ACTIONS), np.nan))})
    pictures = np.random.default_rng(0).integers(9, size=(40, 4, 4), dtype=np.uint8)
    dataset = load_dataset(small_log(observation=pictures))
    plain = TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["action"])
    with pytest.raises(ValueError, match="wants vectors of numbers"):
        run({"x": plain}, dataset, dataset)
