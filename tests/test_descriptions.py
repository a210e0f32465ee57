"""Spaces, specs and arrays in messages: exact, and short whatever their size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_agents import config, log
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from iql_torchrl import DatasetError, load_dataset, make_agent, policies
from iql_torchrl.agent.export import export_policy
from iql_torchrl.agent.task import Task
from iql_torchrl.descriptions import describe_space, describe_values, faulty_bounds
from iql_torchrl.evaluation.act import act
from iql_torchrl.evaluation.environment_actions import environment_actions
from iql_torchrl.evaluation.gym_interface import action_mask, policy_input

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
    assert faulty_bounds([-1, -np.inf, 0, 3, -np.inf], [1, 1, np.inf, 3, np.inf]) == (
        "dimension 1: no finite lower bound; dimension 2: no finite upper bound; "
        "dimension 3: no range, from 3 to 3; dimension 4: no finite bounds"
    )
    assert faulty_bounds([-9.0, 0], [0.5, 0.5], largest=9) == "dimension 0: no finite lower bound"
    every = faulty_bounds(np.full(300, -np.inf), np.ones(300))
    assert every == "dimensions 0, 1, 2, 3, 4, 5, ... (300 in all): no finite lower bound"


UNSUPPORTED = (
    *(spaces.Box(-1, 1, shape) for shape in ((2, 2), (), (0,))), spaces.Box(0, 3, (2,), np.int64),
    spaces.MultiBinary(3), spaces.MultiDiscrete([3, 3]), spaces.Tuple([spaces.Discrete(2)]),
)  # fmt: skip


@pytest.mark.parametrize("space", UNSUPPORTED, ids=describe_space)
@pytest.mark.parametrize("policy", ["auto", "deterministic"])
def test_actions_that_make_agent_cannot_choose(space, policy):
    dataset = replace(load_dataset(log()), action_space=space)
    with pytest.raises(ValueError, match="the actions are") as caught:
        make_agent(config(policy=policy), dataset)
    message = str(caught.value)
    assert message.startswith(f"the actions are {describe_space(space)}; make_agent supports")
    assert "Discrete, and Box of floats of shape (A,)" in message
    assert "'Your own modules'" in message
    assert len(message) < LONGEST


@pytest.mark.parametrize(
    ("space", "fault"),
    [
        (box([-1, -1], [1, np.inf]), "dimension 1: no finite upper bound."),
        (box([-np.inf, -1], [1, 1]), "dimension 0: no finite lower bound."),
        (spaces.Box(-np.inf, np.inf, (2,)), "dimensions 0, 1: no finite bounds."),
        (box([-1, 0.5], [1, 0.5]), "dimension 1: no range, from 0.5 to 0.5."),
        (box(np.full(376, -np.inf), np.arange(376)), "... (376 in all): no finite lower bound."),
    ],
)
def test_actions_without_finite_bounds(space, fault):
    dataset = replace(load_dataset(log()), action_space=space)
    with pytest.raises(ValueError, match="finite bounds, low < high") as caught:
        make_agent(config(), dataset)
    message = str(caught.value)
    assert describe_space(space) in message
    assert fault in message
    assert "dataclasses.replace(dataset, action_space=" in message
    assert len(message) < LONGEST
    agent = make_agent(config(), replace(dataset, action_space=box([-1, -1], [1, 2])))
    assert agent.act(np.zeros(3, np.float32)).shape == (2,)


def test_half_bounded_actions_in_a_log():
    half = box([-1, 0], [1, np.inf])
    action = np.tile(np.float32([0, 1e6]), (40, 1))
    dataset = load_dataset(log(action=action), observation_space=WIDE_OR_3, action_space=half)
    assert dataset.action_space == half
    action[3] = [1 + 1e-6, -5e-7]  # rounding, whether or not the other bound is finite
    load_dataset(log(action=action), observation_space=WIDE_OR_3, action_space=half)
    action[7, 1] = -0.5
    with pytest.raises(DatasetError, match=r"first at row 7.*low \[-1, 0\], high \[1, inf\]"):
        load_dataset(log(action=action), observation_space=WIDE_OR_3, action_space=half)


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
        lambda: policy_input([np.zeros(3)], spaces.Tuple([wide]), flat=False),
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
