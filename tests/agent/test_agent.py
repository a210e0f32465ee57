"""make_agent: parts that fit the data, on one device, from one seed."""

from __future__ import annotations

import copy
import json
import pickle
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import gymnasium
import numpy as np
import pytest
import torch
from small_agents import box_agent, config, log, observations, same_weights, saved, trained
from torch.optim.lr_scheduler import LRScheduler

from iql_torchrl import DiscreteIQLLoss, evaluate, load_dataset, make_agent
from iql_torchrl.agent.build import Agent
from iql_torchrl.evaluation.acting import private_random_numbers
from iql_torchrl.files import CheckpointError, write_components


def dataset(**columns):
    return load_dataset(log(60, **columns), reward="raw")


def test_standardisation_is_the_first_layer_of_every_network():
    data = dataset()
    agent = make_agent(config(), data)
    mean = data.statistics["observation"].mean
    buffers = dict(agent.loss.named_buffers())
    stored = [b for n, b in buffers.items() if n.endswith("preprocess.mean")]
    assert stored
    assert all(torch.equal(b, mean.expand_as(b)) for b in stored)
    leaves = agent.loss.actor_network_params.values(True, True)  # the policy's are the same ones
    assert {b.data_ptr() for b in agent.policy.buffers()} <= {leaf.data_ptr() for leaf in leaves}
    plain = make_agent(config(standardise=False), data)
    assert not [n for n, _ in plain.loss.named_buffers() if "preprocess" in n]


@pytest.mark.parametrize("policy", ["gaussian", "flow"])
def test_initial_weights_of_torch_in_every_network(policy):
    settings = config(policy=policy, hidden=(64, 64), initialisation="torch")
    loss = make_agent(settings, dataset()).loss
    named = [(name, p) for name, p in loss.named_parameters() if "target" not in name]
    weights = [p for name, p in named if name.endswith("weight")]
    matrices = [matrix for p in weights for matrix in (p if p.ndim == 3 else [p])]
    assert len(matrices) == 3 * (1 + 2 + 1)  # layers of the policy, both critics and V
    for matrix in matrices:
        bound = matrix.shape[1] ** -0.5  # of nn.Linear, by its number of inputs
        assert 0.9 * bound < matrix.abs().max() <= bound
    biases = [p for name, p in loss.named_parameters() if name.endswith("bias")]
    assert all((p != 0).any() for p in biases)
    first, second = loss.qvalue_network_params["module", "mlp", "2", "weight"]
    assert not torch.equal(first, second)


def test_the_seed_decides_and_the_callers_random_state_does_not_change():
    torch.manual_seed(5)
    state, data = torch.get_rng_state(), dataset()
    first, second, other = (make_agent(config(seed=seed), data) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(first, second)
    key = "actor_network_params.module.0.module.mlp.0.weight"
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    with pytest.raises(TypeError, match="train nothing"):  # a copy would
        copy.deepcopy(first)


@pytest.mark.gpu
def test_policy_and_loss_are_on_the_configured_device():
    data = dataset()
    agent = make_agent(config(device="cuda"), data)
    held = [*agent.policy.parameters(), *agent.policy.buffers(), *agent.loss.parameters()]
    assert {tensor.device.type for tensor in held} == {"cuda"}
    agent.step(data.replay_buffer(16, device="cuda", seed=0).sample())


def test_learning_rates_and_schedules():
    rates = {"actor_lr": 1e-3, "critic_lr": 2e-3, "value_lr": 3e-3}
    agent = make_agent(config(**rates), dataset())
    assert isinstance(agent.scheduler, LRScheduler)
    pickle.dumps(agent.scheduler.state_dict())
    assert rates_of(agent, 5)[::5].tolist() == [[1e-3, 2e-3, 3e-3]]
    np.testing.assert_allclose(rates_of(agent, 1), [[0.5e-3, 2e-3, 3e-3]])
    agent = make_agent(config(schedule="cosine", schedule_steps=2, value_lr=2e-3), dataset())
    # cos(0), cos(pi / 2) and, past the end, cos(pi): halves of (1 + cos) are 1, 1/2 and 0
    factor = np.array([1] * 5 + [0.5] * 5 + [0] * 6)
    expected = factor[:, None] * [3e-4, 3e-4, 2e-3]
    np.testing.assert_allclose(rates_of(agent, 16), expected, atol=1e-18)
    third = make_agent(replace(agent.config, updates=7, schedule_steps=3), dataset())
    rates = [third.scheduler.lr_lambdas[0](u) for u in range(8)]
    steps = np.array([0, 0, 0, 1, 1, 2, 2, 3])  # floor(3 u / 7)
    np.testing.assert_allclose(rates, (1 + np.cos(np.pi * steps / 3)) / 2)


def rates_of(agent, updates):
    """Learning rates before each of so many updates."""
    rates = []
    for _ in range(updates):
        rates.append([group["lr"] for group in agent.optimizer.param_groups])
        agent.step(dataset().replay_buffer(16, seed=0).sample())
    return np.array(rates)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "mixture", "num_critics": 1, "max_grad_norm": 2.0},
        {"hidden": (8, 4), "standardise": False, "optimizer": "adamw", "weight_decay": 1e-3},
        {"standardise": False, "weights": torch.float64},
    ],
)
def test_an_agent_comes_back_from_its_file(tmp_path, options):
    agent = trained(**options)
    path = saved(agent, tmp_path / "checkpoint-000000003.torchrl")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    outcome = Agent.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert outcome.config == agent.config
    settings = agent.description()["config"]
    assert json.loads(json.dumps(settings)) == settings
    assert outcome.task.action_space == agent.task.action_space
    assert same_weights(outcome, agent)
    fresh = box_agent(**options)
    assert not same_weights(fresh, agent)  # three updates did move the weights
    dtype = options.get("weights", torch.float32)
    assert {p.dtype for p in outcome.loss.parameters()} == {dtype}
    assert outcome.act(np.zeros(3)).dtype == agent.task.action_space.dtype
    np.testing.assert_array_equal(outcome.act(observations()), agent.act(observations()))
    fresh.load_state_dict(agent.state_dict())
    assert same_weights(fresh, agent)
    outcome.step(load_dataset(log(), dtype=dtype).replay_buffer(16, seed=0).sample())
    assert not same_weights(outcome, agent)


def test_the_best_of_a_run_is_loaded_and_else_the_newest(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    agents = [make_agent(config(seed=seed), dataset()) for seed in (1, 2)]
    for agent, name in zip(agents, ("000000010", "000000100"), strict=True):
        saved(agent, tmp_path / "checkpoints" / f"checkpoint-{name}.torchrl")
    assert same_weights(Agent.load(tmp_path), agents[1])
    saved(agents[0], tmp_path / "best.torchrl")
    assert same_weights(Agent.load(str(tmp_path)), agents[0])


def test_the_error_names_what_cannot_be_loaded(tmp_path):
    agent, path = box_agent(), tmp_path / "a.torchrl"
    description = agent.description()
    for missing in ("there is no such folder", tmp_path), ("no such file", path):
        with pytest.raises(CheckpointError, match=missing[0]):
            Agent.load(missing[1])
    write_components(path, {"loss_module": agent.state_dict()})
    with pytest.raises(CheckpointError, match=r"parts made by hand.*through the trainer"):
        Agent.load(path)
    for part, name, value, message in (
        ("config", "colour", 1, f"{path}.*unknown: colour.*version"),
        ("task", "colour", 1, rf"{path}.*with \['colour'\].*version"),
        ("config", "expectile", 3.0, "expectile is 3"),
        ("config", "hidden", [4], "weights do not fit"),
    ):
        saved(agent, path, {**description, part: {**description[part], name: value}})
        with pytest.raises(CheckpointError, match=message):
            Agent.load(path)
    settings = description["config"]
    older = {k: v for k, v in settings.items() if k != "schedule_steps"}
    for readable in (older, settings | {"device": "cuda:99"}):  # which is not here
        saved(agent, path, {**description, "config": readable})
        assert Agent.load(path).config == agent.config
        assert same_weights(Agent.load(path, device="cpu"), agent)


def test_an_agent_on_the_cpu_touches_no_gpu(monkeypatch):
    forked, fork, gpu = [], torch.random.fork_rng, Mock(side_effect=AssertionError("a GPU"))

    def recorded(devices=None, **more):
        forked.append(devices)
        return fork(devices=devices, **more)

    monkeypatch.setattr(torch.random, "fork_rng", recorded)
    for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, gpu)
    box_agent()
    assert forked
    assert all(devices == [] for devices in forked)


def test_generators_of_the_devices_that_are_used_are_kept(monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices: calls.append(devices) or nullcontext()
    )
    monkeypatch.setattr(torch.cuda, "device", lambda each: calls.append(each) or nullcontext())
    monkeypatch.setattr(torch.cuda, "manual_seed", calls.append)
    state = torch.get_rng_state()
    with private_random_numbers(7, torch.device("cpu"), "cuda:1"):
        assert torch.initial_seed() == 7
    torch.set_rng_state(state)
    assert calls == [[torch.device("cuda:1")], torch.device("cuda:1"), 7]


def test_returns_of_a_discrete_agent_by_hand():
    data = dataset(action=np.arange(60) % 4, observation=np.arange(60) % 5)
    agent = make_agent(config(), data)
    assert isinstance(agent.loss, DiscreteIQLLoss)
    agent.step(data.replay_buffer(16, seed=0).sample())

    class FiveStates(gymnasium.Env):
        observation_space = gymnasium.spaces.Discrete(5)
        action_space = gymnasium.spaces.Discrete(4)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.left = 2 + (seed or 0) % 3
            return 1, {}

        def step(self, action):
            self.left -= 1
            return 2, 1.0, self.left == 0, False, {}

    result = evaluate(agent.policy, FiveStates, episodes=3, num_envs=2, seed=0)
    assert result.returns.tolist() == [2.0, 3.0, 4.0]
    assert evaluate(agent.policy, FiveStates, episodes=1, seed=0).returns.tolist() == [2.0]
