"""Plausible mistakes with public names: each ended in an error of torch's or in a wrong answer."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ACT, OBS, make_networks
from gymnasium import spaces
from small_agents import box_agent, config, discrete_agent, log
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical
from torchrl.objectives.utils import ValueEstimators

from iql_torchrl import (
    PRESETS,
    DiscreteIQLLoss,
    IQLLoss,
    IQLPopulation,
    captured,
    compiled,
    evaluate,
    functional,
    load_dataset,
    make_agent,
    networks,
    policies,
)

SPEC = Bounded(-1, 1, (2,))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"expectile": "0.7"}, TypeError, "expectile is '0.7'; expected a number"),
        ({"temperature": None}, TypeError, "temperature is None; expected a number"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf; .* finite"),
        ({"max_weight": True}, TypeError, "max_weight is True; expected a number"),
        ({"num_qvalue_nets": 2.5}, TypeError, "num_qvalue_nets is 2.5; it must be a whole number"),
        ({"num_qvalue_nets": True}, TypeError, "num_qvalue_nets is True"),
        (
            {"reduction": "none", "scalar_output_mode": "drop"},
            ValueError,
            "is 'drop'; choose 'exclude'",
        ),
    ],
)
def test_knobs_of_the_loss(options, error, text):
    with pytest.raises(error, match=text):
        IQLLoss(*make_networks(), **options)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("wrong", [None, nn.Linear(OBS, 1)], ids=["none", "plain"])
def test_networks_of_the_loss(place, wrong):
    parts = list(make_networks())
    parts[place] = wrong
    name = ("actor_network", "qvalue_network", "value_network")[place]
    with pytest.raises((TypeError, ValueError), match=f"{name} is {type(wrong).__name__}|is None"):
        IQLLoss(*parts)


def test_a_policy_without_a_distribution():
    actor = TensorDictModule(nn.Linear(OBS, ACT), in_keys=["observation"], out_keys=["action"])
    _, critic, value = make_networks()
    with pytest.raises(TypeError, match=r"no distribution.*actor_objective='mse'"):
        IQLLoss(actor, critic, value)
    assert IQLLoss(actor, critic, value, actor_objective="mse").actor_objective == "mse"


def test_methods_of_the_loss():
    loss = IQLLoss(*make_networks())
    with pytest.raises(ValueError, match=r"^foo is not an accepted .*; choose from value, ac"):
        loss.set_keys(foo="bar")
    with pytest.raises(TypeError, match=r"value_type is 'td0'; .*ValueEstimators\.TD0"):
        loss.make_value_estimator("td0")
    for gamma in (2.0, -0.1, float("nan"), "0.9"):
        with pytest.raises(ValueError, match=r"gamma is .*\[0, 1\]"):
            loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
    actor = policies.categorical(OBS, Categorical(4), hidden=(8,))
    critic = TensorDictModule(nn.Linear(OBS, 4), ["observation"], ["state_action_value"])
    for space in (4, spaces.Discrete(4)):
        with pytest.raises(TypeError, match=r"action_space is .*'categorical' or 'one-hot'"):
            DiscreteIQLLoss(actor, critic, make_networks()[2], action_space=space)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"in_features": 0}, ValueError, "in_features is 0; expected a whole number >= 1"),
        ({"in_features": 3.0}, ValueError, "in_features is 3.0"),
        ({"in_features": "3"}, ValueError, "in_features is '3'"),
        ({"hidden": 64}, ValueError, r"hidden is 64; expected a sequence of widths: \(64,\)"),
        ({"hidden": (8, 0)}, ValueError, r"hidden\[1\] is 0"),
        ({"dropout": -0.1}, ValueError, r"dropout is -0.1; it must lie in \[0, 1\)"),
        ({"dropout": 1}, ValueError, "dropout is 1;"),
        ({"activation": "relu"}, TypeError, "activation is 'relu'; .*without parentheses"),
        ({"activation": nn.ReLU()}, TypeError, r"activation is ReLU\(\)"),
        ({"initialisation": "xavier"}, ValueError, "'xavier'; choose one of 'orthogonal', 'torch'"),
        ({"initialisation": nn.Linear}, ValueError, "initialisation is .*; choose one of"),
        ({"preprocess": nn.Identity}, TypeError, "preprocess is .*an object, not a class"),
    ],
)
def test_parts_of_a_policy(options, error, text):
    with pytest.raises(error, match=text):
        policies.gaussian(**{"in_features": 3, "action_spec": SPEC, **options})


def test_keys_of_a_policy():
    for build in (policies.gaussian, policies.flow):
        assert build(3, SPEC, in_keys="state").in_keys == ["state"]  # not 's', 't', 'a', ...


def test_networks():
    with pytest.raises(ValueError, match="std has the entry -1; standard deviations are >= 0"):
        networks.Standardise(torch.zeros(2), torch.tensor([1.0, -1.0]))
    for number in (0, 2.5):
        with pytest.raises(ValueError, match=f"num_classes is {number}; expected a whole number"):
            networks.OneHot(number)
    for kind in (networks.StateValue, networks.Critic, networks.DiscreteCritic):
        sizes = (3,) if kind is networks.StateValue else (3, 2)
        with pytest.raises(TypeError, match="preprocess is"):
            kind(*sizes, preprocess=nn.Identity)


def test_equations():
    column, row = torch.ones(3, 1), torch.ones(3)
    with pytest.raises(ValueError, match=r"reward has shape \(3, 1\), next_value \(3,\)"):
        functional.td_target(column, row, row, gamma=0.9)
    with pytest.raises(ValueError, match=r"terminated \(3, 1\)"):
        functional.td_target(row, row, column, gamma=0.9)
    words = r"mask has shape \(3,\) but the values have shape \(3, 1\)"
    for call in (functional.weighted_mean, functional.effective_sample_size):
        with pytest.raises(ValueError, match=words):
            call(column, mask=row.bool())
    with pytest.raises(ValueError, match=r"mask is torch.float32; .*mask.bool\(\)"):
        functional.reduce(row, reduction="sum", mask=row)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 1\)"):
        functional.reduce(row, reduction="mean", weight=column)
    for level in (-0.1, 2.0, float("nan")):
        for loss in (functional.expectile_loss, functional.quantile_loss):
            with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
                loss(row, **{loss.__name__.removesuffix("_loss"): level})
    for ceiling in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"max_weight is .*must be > 0"):
            functional.exponential_weight(row, temperature=1.0, max_weight=ceiling)
    with pytest.raises(ValueError, match=r"action has torch.float32 indices.*action.long\(\)"):
        functional.pick_action(torch.ones(3, 4), torch.tensor([0.0, 1.5, 2.0]))


def test_arguments_of_make_agent_and_population():
    dataset = load_dataset(log())
    for wrong in ("quick", {"seed": 0}, dataset):
        with pytest.raises(TypeError, match=f"config is {type(wrong).__name__}; .*PRESETS"):
            make_agent(wrong, dataset)
    for wrong in ("data.hdf5", None, dataset.transitions):
        text = f"dataset is {type(wrong).__name__}; expected what load_dataset"
        with pytest.raises(TypeError, match=text):
            make_agent(config(), wrong)
        with pytest.raises(TypeError, match=text):
            IQLPopulation([config()], wrong)
    with pytest.raises(TypeError, match=r"configs\[1\] is str; expected an IQLConfig"):
        IQLPopulation([config(), "quick"], dataset)
    with pytest.raises(TypeError, match="configs is OfflineDataset; expected a sequence"):
        IQLPopulation(dataset, [config()])
    with pytest.raises(ValueError, match="device is 'mtia', which this machine cannot use"):
        make_agent(replace(PRESETS["quick"], device="mtia"), dataset)


def test_arguments_of_act():
    agent = box_agent()
    one = np.zeros(3, np.float32)
    for wrong in ((one, {}), [[0.0, 0.0], [0.0]]):
        words = f"observation is a {type(wrong).__name__} that NumPy cannot convert"
        with pytest.raises(ValueError, match=words):
            agent.act(wrong)
    tensor = torch.zeros(3, requires_grad=True)
    np.testing.assert_array_equal(agent.act(tensor), agent.act(one))
    for seed in ("a", 1.5, -1, 2**70, True):
        with pytest.raises(ValueError, match=f"seed is {seed!r}; expected a whole number"):
            agent.act(one, seed=seed, deterministic=False)
    masked = discrete_agent(masked=True)
    for mask in ([0, 1, 2, 3], [0, np.nan, 1, 0]):  # indices of actions, say
        with pytest.raises(ValueError, match=r"booleans \(0 or 1\), found \[0, "):
            masked.act(one, action_mask=np.array(mask))
    with pytest.raises(ValueError, match=r"booleans \(0 or 1\), found <U1"):
        masked.act(one, action_mask=np.array(list("abcd")))


def test_a_state_of_another_agent():
    agent = box_agent()
    state = agent.state_dict()
    for wrong, text in (
        (None, "state is NoneType"),
        ({}, "actor_network_params.* is missing"),
        (discrete_agent().state_dict(), r"log_std is missing"),
        (box_agent(hidden=(4,)).state_dict(), r"is of shape \(4, 3\), here of shape \(8, 3\)"),
        ({**state, "other": torch.zeros(1)}, "other is of shape .*, here missing"),
    ):
        with pytest.raises(ValueError, match=text) as caught:
            agent.load_state_dict(wrong)
        assert len(str(caught.value)) < 400
    agent.load_state_dict(state)


def test_an_environment_with_other_observations():
    policy = box_agent().policy  # which reads three numbers
    words = r"failed on observations of Box of shape \(4,\).*made for"
    with pytest.raises(RuntimeError, match=words):
        evaluate(policy, lambda: gymnasium.make("CartPole-v1"), episodes=1, seed=0)


def test_what_is_compiled_or_captured():
    agent = box_agent()
    for wrong in (agent, agent.loss, None):
        with pytest.raises(TypeError, match=f"step is {type(wrong).__name__}; expected an IQLStep"):
            compiled(wrong)
    buffer = load_dataset(log()).replay_buffer(8, seed=0)
    with pytest.raises(TypeError, match=r"updates is 2.5; expected a whole number"):
        captured(agent.step, buffer, updates=2.5)
