"""Agents that read several observations: from the config to training, acting and export."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agent.test_spaces import Mixed, config, dataset_of, slow, stacked, trained
from tensordict import TensorDict

from iql_torchrl import IQLPopulation, OfflineTrainer, evaluate, make_agent
from iql_torchrl.agent import Agent
from iql_torchrl.evaluation import Acting
from iql_torchrl.selection import fitted_q_evaluation


@pytest.mark.parametrize(
    ("kind", "encoder"),
    [
        ({}, "lstm"),
        ({"discrete": True}, "stack"),
        slow({}, "transformer"),
        slow({"camera": True}, "stack"),
        slow({"camera": True}, "transformer"),
    ],
)
def test_from_a_config_to_an_exported_program(kind, encoder, tmp_path):
    dataset = dataset_of(**kind)
    agent = make_agent(config(history=3, history_encoder=encoder, history_features=8), dataset)
    moved = trained(agent, dataset, tmp_path / "run")
    learns = encoder != "stack" or "camera" in kind
    assert any(name.startswith("encoder_network") for name in moved) is learns
    result = evaluate(agent.policy, dataset.make_env, episodes=3, seed=0, num_envs=2)
    assert len(result.returns) == 3
    env, again = Mixed(**kind), Agent.load(tmp_path / "run")
    acting = Acting(agent.policy, env.observation_space, env.action_space)
    seen = [env.reset(seed=4)[0]]
    for _ in range(5):
        action = acting.act(seen[-1])
        seen.append(env.step(action)[0])
    last = seen[2:5]  # those behind the last action
    window = stack_of(last)
    np.testing.assert_array_equal(agent.act(window), action)
    np.testing.assert_array_equal(again.act(window), action)
    with pytest.raises(ValueError, match="is a single one and the policy reads the last 3;"):
        agent.act(seen[-1])
    program = torch.export.load(agent.export(tmp_path / "policy.pt2")).module()
    leaves = TensorDict(stacked(last, env.observation_space), batch_size=[3]).unsqueeze(0)
    keys = [key[1:] for key in agent.policy.in_keys if key != "history_mask"]
    given = [leaves[key] for key in keys]
    mask = torch.ones(1, 3, dtype=torch.bool)
    np.testing.assert_allclose(program(*given, mask)[0].numpy(), action, atol=1e-5)


def stack_of(observations):
    if isinstance(observations[0], dict):
        return {k: stack_of([o[k] for o in observations]) for k in observations[0]}
    return np.stack(observations)


def test_what_reads_single_observations_refuses_a_history():
    dataset = dataset_of()
    settings = config(history=3)
    with pytest.raises(ValueError, match=r"history is 3; the runs of a population read single"):
        IQLPopulation([settings], dataset)
    agent = make_agent(settings, dataset)
    with pytest.raises(ValueError, match=r"member 'a' reads the last 3 observations"):
        fitted_q_evaluation({"a": agent}, *dataset.split(0.5, 0), discount=0.9)
    with pytest.raises(KeyError, match=r"'history_mask' is not in the batch.*dataset\.windows\("):
        agent.step(dataset.transitions[:4])
    with pytest.raises(TypeError, match=r"found Agent; pass its \.policy"):
        evaluate(agent, dataset.make_env, episodes=1, seed=0)
    with pytest.raises(ValueError, match="windows of 30 steps are longer than every episode"):
        OfflineTrainer(agent=make_agent(config(history=30), dataset), dataset=dataset)
