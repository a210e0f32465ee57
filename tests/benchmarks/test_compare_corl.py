"""``compare_corl.py``: CORL's weights by the names of the loss, and what the comparison changes."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_agents import box_agent
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import compare_corl


def perceptron(*sizes):
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


@pytest.fixture
def trainer():
    """Networks with the attributes of CORL's ``ImplicitQLearning``: 3 observations, 2 actions."""

    def holder(**networks):
        module = nn.Module()
        for name, network in networks.items():
            part = nn.Module()
            part.net = network
            setattr(module, name, part)
        return module

    torch.manual_seed(0)
    actor = nn.Module()
    actor.net, actor.log_std = nn.Module(), nn.Parameter(torch.zeros(2))
    actor.net.net = perceptron(3, 8, 8, 2)
    critics = [holder(q1=perceptron(5, 8, 8, 1), q2=perceptron(5, 8, 8, 1)) for _ in range(2)]
    value = holder(v=perceptron(3, 8, 8, 1))
    return SimpleNamespace(actor=actor, vf=value, qf=critics[0], q_target=critics[1])


def test_every_weight_has_the_name_and_shape_of_the_loss(trainer):
    agent = box_agent(hidden=(8, 8))
    own, given = agent.loss.state_dict(), compare_corl.weights_of(trainer)
    learned = {name for name, _ in agent.loss.named_parameters()}
    targets = {name for name in own if name.startswith("target_") and "mlp" in name}
    assert set(given) == learned | targets
    assert all(own[name].shape == value.shape for name, value in given.items())
    second = trainer.qf.q2.net[2].weight
    assert torch.equal(given["qvalue_network_params.module.mlp.2.weight"][1], second)


def test_the_largest_difference_of_each_network(trainer):
    given = compare_corl.weights_of(trainer)
    name = "value_network_params.module.mlp.4.bias"
    changed = {**given, name: given[name] - 0.25}
    assert compare_corl.largest_differences(changed, trainer) == {
        "actor_network": 0.0,
        "value_network": 0.25,
        "qvalue_network": 0.0,
        "target_qvalue_network": 0.0,
    }


def test_a_disturbed_copy_differs_in_v_alone(trainer):
    for network in vars(trainer).values():
        network.double()
    other = compare_corl.disturbed(trainer)
    found = compare_corl.largest_differences(compare_corl.weights_of(other), trainer)
    assert 0 < found.pop("value_network") <= compare_corl.DISTURBANCE * 1.001
    assert set(found.values()) == {0.0}


def test_the_epsilon_of_the_critics_alone_is_doubled():
    agent = box_agent(hidden=(8, 8))
    compare_corl.double_eps(agent)
    names = {id(p): name for name, p in agent.loss.named_parameters()}
    eps = {
        names[id(group["params"][0])].partition("_")[0]: group["eps"]
        for group in agent.optimizer.param_groups
    }
    assert eps == {"actor": 1e-8, "qvalue": 2e-8, "value": 1e-8}
