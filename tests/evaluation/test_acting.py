"""Agent.act: from an observation of the environment to an action for env.step."""

import numpy as np
import pytest
import torch
from small_agents import (
    HIGH,
    LOW,
    MEAN,
    box_agent,
    by_hand,
    config,
    discrete_agent,
    masks,
    observations,
    small_columns,
)

from iql_torchrl import evaluate, load_dataset, make_agent


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_observation_gives_one_action_and_a_batch_a_batch(dtype):
    agent = box_agent(dtype)
    seen = observations(5)
    expected = (HIGH + LOW) / 2 + (HIGH - LOW) / 2 * np.tanh(by_hand(agent, seen))
    batch = agent.act(seen.astype(np.float64))
    assert batch.dtype == dtype
    np.testing.assert_allclose(batch, expected, atol=2e-6)
    for observation, action in zip(seen, expected, strict=True):
        single = agent.act(observation)
        assert agent.task.action_space.contains(single)
        np.testing.assert_allclose(single, action, atol=2e-6)
    np.testing.assert_allclose(agent.act(list(seen[0])), expected[0], atol=2e-6)


def test_an_episode_by_hand_is_evaluates():
    table = small_columns(
        action=np.random.default_rng(0).uniform(-2, 2, (40, 1)).astype(np.float32)
    )
    data = load_dataset(table, env="Pendulum-v1")
    agent = make_agent(config(), data)
    env, total, over = data.make_env(), 0.0, False
    observation, _ = env.reset(seed=4)
    while not over:
        observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
        total, over = total + float(reward), terminated or truncated
    expected = evaluate(agent.policy, data.make_env, episodes=1, seed=4).returns[0]
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_discrete_actions_count_from_the_spaces_start():
    agent, seen = discrete_agent(start=7), observations(20)
    expected = by_hand(agent, seen).argmax(1) + 7
    assert len(set(expected)) > 1
    batch = agent.act(seen)
    assert batch.dtype == np.int64
    assert batch.tolist() == expected.tolist()
    single = agent.act(seen[0])
    assert agent.task.action_space.contains(single)
    assert np.shape(single) == ()
    assert single == expected[0]
    agent.task.action_space.dtype = np.dtype(np.int32)
    assert agent.act(seen).dtype == agent.act(seen[0]).dtype == np.int32


def test_a_mask_forbids():
    agent, seen, allowed = discrete_agent(masked=True, start=1), observations(20), masks(20)
    logits = by_hand(agent, seen)
    expected = np.where(allowed, logits, -np.inf).argmax(1) + 1
    assert (expected != logits.argmax(1) + 1).any()
    assert agent.act(seen, action_mask=allowed).tolist() == expected.tolist()
    assert agent.act(seen[3], action_mask=allowed[3].astype(np.int8)) == expected[3]
    sampled = agent.act(seen, action_mask=allowed, deterministic=False, seed=0)
    assert allowed[np.arange(20), sampled - 1].all()


def test_dict_observations():
    generator = np.random.default_rng(0)
    parts = {k: generator.normal(size=(40, n)).astype(np.float32) for k, n in (("b", 2), ("a", 1))}
    agent = make_agent(config(), load_dataset(small_columns(observation=parts)))
    flat = make_agent(
        config(), load_dataset(small_columns(observation=parts), concatenate=["a", "b"])
    )
    flat.load_state_dict(agent.state_dict())
    joined = np.concatenate([parts["a"], parts["b"]], 1)
    np.testing.assert_allclose(agent.act(parts), flat.act(joined), atol=1e-6)
    one = {name: values[3] for name, values in parts.items()}
    np.testing.assert_allclose(agent.act(one), flat.act(joined[3]), atol=1e-6)
    for wrong, result in (
        ({"a": one["a"]}, r"\['a', 'b'\], found \['a'\]"),
        (joined[3], "found a ndarray"),
        ({"a": parts["a"], "b": one["b"]}, r"different numbers.*\['a'\]: 40"),
        ({"a": parts["a"], "b": parts["b"][:7]}, "different numbers"),
    ):
        with pytest.raises(ValueError, match=result):
            agent.act(wrong)


def test_categories_in_observations():
    table = small_columns(observation=np.arange(40) % 5)
    agent = make_agent(config(), load_dataset(table))
    assert agent.act(3).shape == (2,)
    np.testing.assert_allclose(agent.act(np.arange(5))[3], agent.act(np.int64(3)), atol=1e-6)
    for wrong in (5, -1):
        with pytest.raises(ValueError, match=rf"holds {wrong}; expected .* Discrete\(5\)"):
            agent.act(wrong)
    with pytest.raises(ValueError, match="holds float64; expected int64"):
        agent.act(2.0)


def test_what_does_not_fit_is_refused():
    agent = box_agent()
    for wrong, result in (
        (np.zeros(4), r"shape \(4,\); expected \(3,\) for one observation, or \('B', 3\)"),
        (np.zeros((2, 2, 3)), r"shape \(2, 2, 3\)"),
        (np.float32(0), r"shape \(\)"),
        (np.zeros((0, 3)), "batch of size 0"),
        (np.array([0, np.nan, 0]), "observation holds nan"),
        (np.array(["a", "b", "c"]), "holds <U1; expected float32"),
        ({"observation": np.zeros(3)}, "holds object|shape"),
    ):
        with pytest.raises(ValueError, match=result):
            agent.act(wrong)
    with pytest.raises(ValueError, match="action_mask was given"):
        agent.act(np.zeros(3), action_mask=np.ones(2))
    masked = discrete_agent(masked=True)
    for mask, result in (
        (None, r"pass action_mask= with shape \(4,\)"),
        (np.ones((1, 4)), r"shape \(1, 4\); expected \(4,\)"),
        (np.ones(3), "4 booleans"),
        (np.zeros(4), "at least one"),
    ):
        with pytest.raises(ValueError, match=result):
            masked.act(np.zeros(3), action_mask=mask)
    with pytest.raises(ValueError, match=r"shape \(3, 4\); expected \(2, 4\)"):
        masked.act(np.zeros((2, 3)), action_mask=np.ones((3, 4)))
    with torch.no_grad():
        agent.actor.get_parameter("module.0.module.mlp.2.bias").fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        agent.act(np.zeros(3))


def test_random_numbers_modes_and_gradients():
    agent = box_agent(dropout=0.5)
    observation = MEAN.copy()
    agent.actor.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = agent.act(observation)
    np.testing.assert_array_equal(agent.act(observation), first)  # dropout is off
    seeded = agent.act(observation, deterministic=False, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = agent.act(observation, deterministic=False)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    np.testing.assert_array_equal(agent.act(observation, deterministic=False), drawn)
    np.testing.assert_array_equal(agent.act(observation, deterministic=False, seed=5), seeded)
    assert not np.array_equal(seeded, drawn)
    assert not np.array_equal(seeded, first)
    assert all(module.training for module in agent.actor.modules())
    assert all(p.requires_grad for p in agent.actor.parameters())
