"""Losses of action chunks: targets by hand, exact values of an MDP, padding, and refusals."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_networks
from small_agents import config, same_weights, small_columns
from small_losses import Forms, NormalActor
from torch import nn, optim
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate, ValueEstimators

from iql_torchrl import IQLConfig, IQLLoss, IQLStep, load_dataset, make_agent, networks, policies

GAMMA = 0.9


class Table(nn.Module):
    """Values by state and, of a critic, by a sequence of actions of -1, 0 (padding) or 1."""

    def __init__(self, states: int, size: int = 0):
        super().__init__()
        self.size, self.values = size, nn.Parameter(torch.zeros(states * 3**size))

    def forward(self, state, actions=None):
        index = state.long()
        for number in range(self.size):
            index = index * 3 + actions[..., number].long() + 1
        return self.values[index].unsqueeze(-1)


def tabular_loss(states, size, **options):
    spec = Bounded(-torch.ones(size), torch.ones(size), (size,))
    first = networks.OneHot(states)
    actor = policies.gaussian(states, spec, hidden=(4,), preprocess=first)
    critic = ValueOperator(Table(states, size), in_keys=["observation", "action"])
    value = ValueOperator(Table(states), in_keys=["observation"])
    loss = IQLLoss(actor, [critic], value, num_qvalue_nets=1, **options)
    return loss.make_value_estimator(gamma=GAMMA)


def test_targets_of_chunks_that_meet_ends_by_hand():
    """Rewards 1, 2, 3 and a termination | 4, 5 and a truncation; V is 10 everywhere."""
    rows = {
        "observation": np.array([0, 1, 2, 0, 1]),
        "next_observation": np.array([1, 2, 3, 1, 3]),
        "action": np.full((5, 1), 0.5, np.float32),
        "reward": np.array([1, 2, 3, 4, 5], np.float32),
        "terminated": np.arange(5) == 2,
        "truncated": np.arange(5) == 4,
    }
    two = [1 + 0.9 * 2 + 0.81 * 10, 2 + 0.9 * 3, 3, 4 + 0.9 * 5 + 0.81 * 10, 5 + 0.9 * 10]
    three = [1 + 0.9 * 2 + 0.81 * 3, *two[1:]]  # the last two made fewer actions
    one = [1 + 0.9 * 10, 2 + 0.9 * 10, 3, 4 + 0.9 * 10, 5 + 0.9 * 10]
    for size, expected in enumerate((one, two, three), 1):
        loss = tabular_loss(4, size)
        loss.value_network_params.get(("module", "values")).data.fill_(10)
        batch = loss.prepare_batch(load_dataset(rows).chunks(size)[:])
        torch.testing.assert_close(loss.td_target(batch), torch.tensor(expected))


STATES = 4
FOLLOWING = np.array([[1, 2], [3, 0], [0, 3], [2, 1]])  # by state and action -1, 1
REWARD = np.array([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.1], [0.9, -0.2]])
ENDING = np.array([[0, 0], [1, 0], [0, 0], [0, 0]], bool)


def every_sequence(length: int):
    """A dataset of all sequences of actions from all states; what does not terminate is truncated."""
    names = ("observation", "action", "reward", "next_observation", "terminated", "truncated")
    rows = []
    for start in range(STATES):
        for number in range(2**length):
            state = start
            for step in range(length):
                action = number >> step & 1
                following, ended = FOLLOWING[state, action], ENDING[state, action]
                cut = step == length - 1 and not ended
                reward = np.float32(REWARD[state, action])
                rows.append((state, [2.0 * action - 1], reward, following, ended, cut))
                if ended:
                    break
                state = following
    columns = {
        n: np.array(values) for n, values in zip(names, zip(*rows, strict=True), strict=True)
    }
    columns["action"] = columns["action"].astype(np.float32)
    return load_dataset(columns, action_space=gym.spaces.Box(-1, 1, (1,)))


def exact_values(size: int):
    """V of the uniform policy by a linear solve, and ``Q(s, a_1 ... a_h)`` of every sequence."""
    chain = np.zeros((STATES, STATES))
    for state in range(STATES):
        for action in range(2):
            chain[state, FOLLOWING[state, action]] += 0.5 * (not ENDING[state, action])
    value = np.linalg.solve(np.eye(STATES) - GAMMA * chain, REWARD.mean(1))
    sequences = {}
    for start in range(STATES):
        for number in range(2**size):
            state, total, factor = start, 0.0, 1.0
            actions = [number >> step & 1 for step in range(size)]
            for action in actions:
                total += factor * REWARD[state, action]
                factor *= GAMMA * (not ENDING[state, action])
                state = FOLLOWING[state, action]
            sequences[(start, *actions)] = total + factor * value[state]
    return value, sequences


SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in (1, 3)]


@pytest.mark.parametrize("size", [*SLOW, 2])
def test_values_of_chunks_equal_those_of_the_behaviour_policy(size):
    loss = tabular_loss(STATES, size, expectile=0.5)
    optimizer = optim.Adam(loss.parameters(), lr=0.1)
    schedule = optim.lr_scheduler.MultiStepLR(optimizer, [250, 350])
    step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.5), lr_scheduler=schedule)
    batch = every_sequence(4).chunks(size)[:] if size > 1 else every_sequence(4).transitions
    for _ in range(420):
        step(batch.clone())
    value, sequences = exact_values(size)
    scale = max(map(abs, sequences.values()))
    learned = loss.value_network_params.get(("module", "values")).detach().numpy()
    np.testing.assert_allclose(learned, value, atol=0.01 * scale)
    critic = loss.qvalue_network.module
    for (state, *actions), exact in sequences.items():
        given = 2.0 * torch.tensor([actions]) - 1
        assert abs(critic(torch.tensor([state]), given).item() - exact) < 0.01 * scale


def agent_and_batch(size=3, rows=16, **options):
    dataset = load_dataset(small_columns())
    agent = make_agent(config(action_chunk=size, **options), dataset)
    return agent, dataset.chunks(size)[:rows]


OBJECTIVES = {
    "gaussian": {},
    "tanh_normal": {"policy": "tanh_normal"},
    "mixture": {"policy": "mixture"},
    "deterministic": {"policy": "deterministic"},
    "ddpg_bc": {"actor_objective": "ddpg_bc"},
    "ddpg_bc, deterministic": {"actor_objective": "ddpg_bc", "policy": "deterministic"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_reaches_no_loss_of_the_policy(name):
    agent, batch = agent_and_batch(**OBJECTIVES[name])
    padding = ~batch["chunk_mask"].repeat_interleave(2, 1)
    assert padding.any()
    other = batch.clone()
    other["action"] = batch["action"].masked_fill(padding, 0.7)
    errors, gradients = [], []
    advantage = torch.linspace(-1, 1, len(batch))
    for each in (batch, other):
        loss, _ = agent.loss.actor_term(agent.loss.prepare_batch(each), advantage)
        agent.optimizer.zero_grad()
        loss.backward()
        errors.append(loss.detach())
        gradients.append([p.grad.clone() for p in agent.optimizer.param_groups[0]["params"]])
    assert torch.equal(*errors)
    assert all(map(torch.equal, *gradients))
    other["action"] = batch["action"] + 0.1
    changed, _ = agent.loss.actor_term(agent.loss.prepare_batch(other), advantage)
    assert not torch.equal(changed, errors[0])


def test_the_log_probability_is_that_of_the_valid_actions():
    """Of the Gaussian by hand; of the others that of a chunk without padding."""
    agent, batch = agent_and_batch()
    dist = agent.actor.get_dist(batch)
    mean, std = dist.base_dist.loc.detach().numpy(), dist.base_dist.scale.detach().numpy()
    error = (batch["action"].numpy() - mean) / std
    each = -0.5 * error**2 - np.log(std) - 0.5 * math.log(2 * math.pi)
    valid = np.repeat(batch["chunk_mask"].numpy(), 2, 1)
    found = agent.loss.log_prob(agent.loss.prepare_batch(batch)).detach().numpy()
    np.testing.assert_allclose(found, (each * valid).sum(1), rtol=1e-5)
    for policy in ("gaussian", "tanh_normal", "mixture"):
        agent, batch = agent_and_batch(policy=policy)
        dist, everything = agent.actor.get_dist(batch), torch.ones(16, 6, dtype=torch.bool)
        expected = dist.log_prob(batch["action"])
        torch.testing.assert_close(dist.masked_log_prob(batch["action"], everything), expected)


def test_a_flow_learns_no_velocity_of_padding():
    """Its error is the mean over all entries of a chunk, with zeros at padding."""
    agent, batch = agent_and_batch(policy="flow", temperature=0.0)
    batch["flow_noise"], batch["flow_time"] = torch.randn(16, 6), torch.rand(16)
    read = agent.loss.prepare_batch(batch)
    valid = batch["chunk_mask"].repeat_interleave(2, 1)
    target = agent.actor.normalise(batch["action"]) - batch["flow_noise"]
    point = batch["flow_noise"] + batch["flow_time"].unsqueeze(1) * target
    velocity = agent.actor.velocity(batch["observation"], point, batch["flow_time"])
    expected = ((velocity - target).square() * valid).sum(1) / 6
    error, _ = agent.loss.actor_objective.error(agent.loss, read)
    torch.testing.assert_close(error, expected)


def test_chunks_of_one_action_train_the_same_weights():
    dataset = load_dataset(small_columns(), dtype=torch.float64)
    agents = [make_agent(config(**options), dataset) for options in ({}, {"action_chunk": 1})]
    for agent, source in zip(agents, (dataset, dataset.chunks(1)), strict=True):
        buffer = source.replay_buffer(16, seed=0)
        for _ in range(5):
            agent.step(buffer.sample())
    parameters = (list(agent.loss.parameters()) for agent in agents)
    torch.testing.assert_close(*parameters, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", ["gaussian", "flow"])
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_every_network_is_trained(policy, order):
    agent, batch = agent_and_batch(policy=policy, order=order, num_samples=2, max_grad_norm=1.0)
    before = {k: v.clone() for k, v in agent.loss.named_parameters()}
    metrics = agent.step(batch)
    assert all(bool(value.isfinite()) for value in metrics.values())
    for name, parameter in agent.loss.named_parameters():
        assert not torch.equal(before[name], parameter), name
    chosen = agent.policy(batch.select("observation"))["action"]
    assert chosen.shape == (16, 6)
    assert bool((chosen.abs() <= 1).all())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["gaussian", "flow"])
def test_compiled_and_captured_updates_equal_the_eager_ones(policy):
    """A captured flow draws its noise from the generator of the rows, so it is left out."""
    torch._dynamo.reset()
    dataset = load_dataset(small_columns(), dtype=torch.float64)
    options = {"action_chunk": 3, "policy": policy, "history": 2, "history_encoder": "stack"}
    source = dataset.chunks(3, history=2, stack=True)

    def drawn(rows):
        rows["flow_noise"] = torch.randn(16, 6, dtype=torch.float64)
        return rows.set("flow_time", torch.rand(16, dtype=torch.float64))

    loss = make_agent(config(**options), dataset).loss
    traced = ("compiled", "captured") if policy == "gaussian" else ("compiled",)
    forms = Forms(loss, lambda: source.device_sampler(16, seed=1), traced, updates=2)
    for _ in range(2):
        forms.run(change=drawn)
    forms.assert_equal(rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_rewards_of_padding_change_no_update(order):
    agents = [agent_and_batch(order=order)[0] for _ in range(2)]
    _, batch = agent_and_batch()
    padding = ~batch["chunk_mask"]
    assert padding.any()
    other = batch.clone()
    other["next", "reward"] = batch["next", "reward"] + 100.0 * padding
    targets, metrics = [], []
    for agent, each in zip(agents, (batch, other), strict=True):
        targets.append(agent.loss.td_target(agent.loss.prepare_batch(each.clone())))
        metrics.append(agent.step(each.clone()))
    assert torch.equal(*targets)
    for name, value in metrics[0].items():
        assert torch.equal(value, metrics[1][name]), name
    assert same_weights(*agents)


def test_wrong_batches_and_combinations_are_refused():
    agent, batch = agent_and_batch()
    plain = load_dataset(small_columns())
    with pytest.raises(RuntimeError, match="shapes"):
        agent.step(plain.replay_buffer(8).sample())
    with pytest.raises(RuntimeError, match="shapes"):
        agent.step(plain.chunks(2)[:16])
    single = make_agent(config(), plain)
    with pytest.raises((ValueError, RuntimeError)):
        single.step(batch)
    with pytest.raises(ValueError, match=r"'chunk_mask' has shape \(16, 3\).* masks and rewards"):
        agent.step(batch.clone().set(("next", "reward"), torch.zeros(16, 1)))
    agent.loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9, lmbda=0.9)
    with pytest.raises(NotImplementedError, match=r"chunks of actions and the value estimator is"):
        agent.loss.qvalue_loss(batch)
    discrete = load_dataset(small_columns(action=np.arange(40) % 4))
    with pytest.raises(ValueError, match=r"action_chunk is 2 .*chunks are of continuous actions"):
        make_agent(config(action_chunk=2), discrete)
    with pytest.raises(ValueError, match=r"replan_every is 4 and action_chunk is 3"):
        IQLConfig(action_chunk=3, replan_every=4)


def test_a_distribution_that_cannot_leave_out_padding_is_named():
    _, batch = agent_and_batch()
    loss = IQLLoss(*make_networks(3, 6, policy=NormalActor(3, 6)))
    with pytest.raises(TypeError, match=r"Independent, which cannot leave out .* masked_log_prob"):
        loss.actor_loss(batch)
