"""Plausible mistakes with public names: each ended in an error of torch's or in a wrong answer.

Spaces, specs and arrays in messages: exact, and short, however large they are.
"""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ACT, OBS, make_networks
from gymnasium import spaces
from small_agents import box_agent, config, discrete_agent, small_columns
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.objectives.utils import ValueEstimators

from iql_torchrl import (
    PRESETS,
    DatasetError,
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
from iql_torchrl.agent.export import export_policy
from iql_torchrl.agent.task import Task
from iql_torchrl.descriptions import describe_space, describe_values, faulty_bounds
from iql_torchrl.evaluation.acting import act, environment_actions
from iql_torchrl.evaluation.policy_input import action_mask, policy_input
from iql_torchrl.losses import WeightedSquaredError

SPEC = Bounded(-1, 1, (2,))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_networks_of_the_loss(place):
    name = ("actor_network", "qvalue_network", "value_network")[place]
    for wrong in (None, nn.Linear(OBS, 1)):
        parts = [*make_networks()]
        parts[place] = wrong
        words = f"{name} is {type(wrong).__name__}|is None"
        with pytest.raises((TypeError, ValueError), match=words):
            IQLLoss(*parts)
    actor = TensorDictModule(nn.Linear(OBS, ACT), in_keys=["observation"], out_keys=["action"])
    parts = (actor, *make_networks()[1:])
    with pytest.raises(TypeError, match=r"no distribution.*actor_objective='mse'"):
        IQLLoss(*parts)
    objective = IQLLoss(*parts, actor_objective="mse").actor_objective
    assert type(objective) is WeightedSquaredError


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
        ({"in_features": 0}, ValueError, "in_features is 0; expected an integer >= 1"),
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


def test_networks():
    for build in (policies.gaussian, policies.flow):
        assert build(3, SPEC, in_keys="state").in_keys == ["state"]  # not 's', 't', 'a', ...
    with pytest.raises(ValueError, match="std has the entry -1; standard deviations are >= 0"):
        networks.Standardise(torch.zeros(2), torch.tensor([1.0, -1.0]))
    for number in (0, 2.5):
        with pytest.raises(ValueError, match=f"num_classes is {number}; expected an integer"):
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
    for clip in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"max_weight is .*must be > 0"):
            functional.exponential_weight(row, temperature=1.0, max_weight=clip)
    with pytest.raises(ValueError, match=r"action has torch.float32 indices.*action.long\(\)"):
        functional.pick_action(torch.ones(3, 4), torch.tensor([0.0, 1.5, 2.0]))


def test_arguments_of_make_agent_and_population():
    dataset = load_dataset(small_columns())
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
        with pytest.raises(ValueError, match=f"seed is {seed!r}; expected an integer"):
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


def test_an_agent_in_the_wrong_place():
    agent = box_agent()  # which reads three numbers
    words = r"failed on observations of Box of shape \(4,\).*made for"
    with pytest.raises(RuntimeError, match=words):
        evaluate(agent.policy, lambda: gymnasium.make("CartPole-v1"), episodes=1, seed=0)
    for wrong in (agent, agent.loss, None):
        with pytest.raises(TypeError, match=f"step is {type(wrong).__name__}; expected an IQLStep"):
            compiled(wrong)
    buffer = load_dataset(small_columns()).replay_buffer(8, seed=0)
    with pytest.raises(TypeError, match=r"updates is 2.5; expected an integer"):
        captured(agent.step, buffer, updates=2.5)


# -- spaces, specs and arrays in messages

LONGEST = 700  # characters of any message here
WIDE = spaces.Box(-np.inf, np.arange(376.0), (376,), np.float64)
WIDE_OR_3 = spaces.Box(-np.inf, np.inf, (3,))
WIDE_CHOICE = spaces.MultiDiscrete(np.arange(2, 302))
MANY = spaces.Dict({f"k{i:02}": WIDE for i in range(50)})
HALF = Bounded(-1, 1, (2,), dtype=torch.bfloat16)


def box(low, high):
    return spaces.Box(np.float32(low), np.float32(high))


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (spaces.Box(-1, 1, (300,)), "Box of shape (300,), float32, [-1, 1]"),
        (box([-1, 0], [1, np.inf]), "Box of shape (2,), float32, low [-1, 0], high [1, inf]"),
        (WIDE, "Box of shape (376,), float64, low -inf, high 0 to 375"),
        (spaces.Box(0, 255, (84, 84), np.uint8), "Box of shape (84, 84), uint8, [0, 255]"),
        (spaces.Box(-1, 1, (0,)), "Box of shape (0,), float32, low [], high []"),
        (spaces.Discrete(4), "Discrete(4)"),
        (spaces.Discrete(4, start=2), "Discrete(4, start=2)"),
        (spaces.MultiDiscrete([3, 2]), "MultiDiscrete([3 2])"),
        (WIDE_CHOICE, "MultiDiscrete of shape (300,), 2 to 301 categories each"),
        (spaces.MultiBinary(9), "MultiBinary(9)"),
        (spaces.Dict({"goal": WIDE, "at": WIDE}), "Dict of 'at', 'goal'"),
        (MANY, "Dict of 'k00', 'k01', 'k02', 'k03', 'k04', 'k05', ... (50 in all)"),
        (spaces.Tuple([WIDE, WIDE]), "Tuple of 2 spaces"),
        (spaces.Text(4), "Text"),
        (Bounded(-1, 1, (2, 2)), "BoundedContinuous of shape (2, 2), float32, [-1, 1]"),
        (HALF, "BoundedContinuous of shape (2,), bfloat16, [-1, 1]"),
        (Categorical(3), "Categorical of shape (), int64"),
        (Composite(a=Unbounded((376,))), "Composite of 'a'"),
    ],
)
def test_spaces_and_specs(space, text):
    assert describe_space(space) == text


def test_values_and_faulty_bounds():
    assert describe_values(np.arange(3) / 3) == "[0, 0.333333, 0.666667]"
    assert describe_values(np.zeros((20, 15))) == "[0, 0, 0, 0, 0, 0, ... (300 in all)]"
    assert describe_values(np.array([True, False])) == "[True, False]"
    assert faulty_bounds([-1, 0], [1, 2]) == ""
    assert faulty_bounds([-1, -np.inf, 0, 3, -np.inf, 3], [1, 1, np.inf, 3, np.inf, 2]) == (
        "dimension 1: no finite lower bound; dimension 2: no finite upper bound; "
        "dimension 4: no finite bounds; dimension 5: low 3 above high 2"
    )
    assert faulty_bounds([-9.0, 0], [0.5, 0.5], largest=9) == "dimension 0: no finite lower bound"
    every = faulty_bounds(np.full(300, -np.inf), np.ones(300))
    assert every == "dimensions 0, 1, 2, 3, 4, 5, ... (300 in all): no finite lower bound"


ACTIONS = "the actions are {}; make_agent supports"
SUPPORTED = ACTIONS, "Discrete, and Box of floats of shape (A,)", "'Your own modules'"
BOUNDS = "finite bounds, low <= high", "{}", "dataclasses.replace(dataset, action_space="


@pytest.mark.parametrize(
    ("space", "words"),
    [
        *((spaces.Box(-1, 1, shape), SUPPORTED) for shape in ((2, 2), (), (0,))),
        (spaces.Box(0, 3, (2,), np.int64), SUPPORTED),
        (spaces.MultiBinary(3), SUPPORTED),
        (spaces.MultiDiscrete([3, 3]), SUPPORTED),
        (spaces.Tuple([spaces.Discrete(2)]), SUPPORTED),
        (box([-1, -1], [1, np.inf]), (*BOUNDS, "dimension 1: no finite upper bound.")),
        (box([-np.inf, -1], [1, 1]), (*BOUNDS, "dimension 0: no finite lower bound.")),
        (spaces.Box(-np.inf, np.inf, (2,)), (*BOUNDS, "dimensions 0, 1: no finite bounds.")),
        (
            box(np.full(376, -np.inf), np.arange(376)),
            (*BOUNDS, "(376 in all): no finite lower bound."),
        ),
    ],
)
def test_actions_that_make_agent_cannot_choose(space, words):
    dataset = replace(load_dataset(small_columns()), action_space=space)
    for policy in ("auto", "deterministic"):
        with pytest.raises(ValueError, match=r"^the actions are|finite bounds, low <") as caught:
            make_agent(config(policy=policy), dataset)
        message = str(caught.value)
        assert all(text.format(describe_space(space)) in message for text in words)
        assert len(message) < LONGEST


def test_half_bounded_actions_in_a_log():
    half = box([-1, 0], [1, np.inf])
    action = np.tile(np.float32([0, 1e6]), (40, 1))
    dataset = load_dataset(
        small_columns(action=action), observation_space=WIDE_OR_3, action_space=half
    )
    assert dataset.action_space == half
    agent = make_agent(config(), replace(dataset, action_space=box([-1, -1], [1, 2])))
    assert agent.act(np.zeros(3, np.float32)).shape == (2,)
    action[3] = [1 + 1e-6, -5e-7]  # rounding, whether or not the other bound is finite
    load_dataset(small_columns(action=action), observation_space=WIDE_OR_3, action_space=half)
    action[7, 1] = -0.5
    with pytest.raises(DatasetError, match=r"first at row 7.*low \[-1, 0\], high \[1, inf\]"):
        load_dataset(small_columns(action=action), observation_space=WIDE_OR_3, action_space=half)


def test_messages_about_large_spaces_are_short(tmp_path):
    """Each call below printed the arrays of the bounds or of the action."""
    wide = spaces.Box(-np.arange(1.0, 301), np.arange(1.0, 301), dtype=np.float64)
    net = nn.Linear(300, 300)
    actor = TensorDictModule(net, in_keys=["observation"], out_keys=["action"])
    other = TensorDictModule(net, in_keys=["state"], out_keys=["action"])
    far = torch.zeros(1, 300)
    far[0, 41] = 99.0
    moments = [(0, 0)]
    calls = (
        lambda: act(actor, np.zeros(7), wide, wide),
        lambda: act(other, np.zeros(300), wide, wide),
        lambda: act(actor, np.full(300, "a"), wide, wide),
        lambda: act(actor, np.full(300, np.nan), wide, wide),
        lambda: act(actor, np.zeros(300), wide, spaces.Box(-1, 1, (7,))),
        lambda: act(actor, np.zeros(300), wide, spaces.MultiDiscrete(np.full(300, 2))),
        lambda: environment_actions(far, wide, moments),
        lambda: environment_actions(far * torch.nan, wide, moments),
        lambda: environment_actions(far[:, :7], wide, moments),
        lambda: action_mask({"action_mask": np.ones(3)}, wide),
        lambda: policy_input(np.zeros((1, 3)), [1], spaces.Tuple([wide]), flat=False),
        lambda: export_policy(actor, Task(wide, spaces.Tuple([wide])), tmp_path / "p.pt2"),
        lambda: export_policy(actor, Task(wide, spaces.Box(-1, 1, (7,))), tmp_path / "p.pt2"),
        lambda: policies.gaussian(3, Bounded(-torch.ones(2, 300), torch.ones(2, 300), (2, 300))),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"\w") as caught:
            call()
        assert len(str(caught.value)) < LONGEST
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"in dimension 41, at step 0 .* high 1 to 300"):
        environment_actions(far, wide, moments)
