"""``polyak`` of a config reaches the targets; an export is compared on every action."""

from __future__ import annotations

import pytest
import torch
from small_agents import box_agent, log

from iql_torchrl import load_dataset
from iql_torchrl.agent import export
from iql_torchrl.losses.parameters import TARGET_CRITICS
from iql_torchrl.private_apis import children_of


def test_targets_move_by_the_configs_share():
    agent = box_agent(polyak=0.25)
    target = children_of(agent.loss)[TARGET_CRITICS].data.clone()
    agent.step(load_dataset(log()).replay_buffer(16, seed=0).sample())
    live, moved = agent.loss.qvalue_network_params, children_of(agent.loss)[TARGET_CRITICS]
    for key, before in target.items(True, True):
        expected = 0.75 * before + 0.25 * live.get(key).data
        torch.testing.assert_close(moved.get(key).data, expected)


def test_one_action_that_differs_refuses_an_export():
    action = torch.zeros(3, 2)
    other = action.clone()
    other[2, 1] = 0.5
    export._compare(lambda x: x, [[action]], [action], 1e-6, "the program")
    with pytest.raises(RuntimeError, match=r"the program acts differently, by 0.5 in a batch of 3"):
        export._compare(lambda x: x, [[other]], [action], 1e-6, "the program")
