"""Agents with every policy, the best of several actions, and DDPG+BC."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_agents import HIGH, LOW, box_agent, discrete_agent, log, observations, trained
from torch import nn

from iql_torchrl import PRESETS, load_dataset, make_agent
from iql_torchrl.policies import BestOf, FlowPolicy

BEST = {"policy": "flow", "num_samples": 5, "flow_steps": 4}
KINDS = {
    "auto": {},
    "mixture": {"policy": "mixture"},
    "tanh_normal": {"policy": "tanh_normal"},
    "deterministic": {"policy": "deterministic"},
    "flow": {"policy": "flow"},
    "best of flow": BEST,
    "best of mixture": {"policy": "mixture", "num_samples": 3},
    "best of tanh_normal": {"policy": "tanh_normal", "num_samples": 3, "num_critics": 1},
    "ddpg_bc": {"actor_objective": "ddpg_bc", "bc_weight": 0.1},
    "ifql, small": {
        **BEST,
        "temperature": 0.0,
        "activation": "gelu",
        "layer_norm": True,
        "norm_after_activation": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_agents_train_and_act_inside_the_bounds(kind):
    agent = trained(**KINDS[kind])
    assert isinstance(agent.policy, BestOf) is ("num_samples" in KINDS[kind])
    assert isinstance(agent.actor, FlowPolicy) is (KINDS[kind].get("policy") == "flow")
    drawn = [agent.act(observations(), deterministic=False, seed=s) for s in (4, 4, 5)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    if kind not in ("ddpg_bc", "deterministic"):
        assert (drawn[0] != drawn[2]).any()
    still = agent.act(observations())
    np.testing.assert_array_equal(still, agent.act(observations()))
    for actions in (*drawn, still):
        assert actions.shape == (9, 2)
        assert ((actions >= LOW) & (actions <= HIGH)).all()


def test_the_best_action_by_hand():
    agent = trained(**BEST)
    x = torch.from_numpy(observations(1))
    noise = agent.policy.fixed_noise
    candidates = []
    for row in noise:  # the Euler steps of the flow, written out
        head, a = agent.actor.head, row
        features = head.preprocess(x)[0]
        for k in range(4):
            time = torch.tensor([k / 4])
            a = a + head.mlp(torch.cat([features, a, time])) / 4
        candidates.append(head.centre + head.half_range * a.clamp(-1, 1))
    candidates = torch.stack(candidates).detach()
    values = []
    for params in agent.loss.qvalue_network_params.unbind(0):
        with params.to_module(agent.loss.qvalue_network, preserve_module_state=False):
            values.append(agent.loss.qvalue_network.module(x.expand(5, 3), candidates))
    best = int(torch.stack(values).amin(0).argmax())
    np.testing.assert_allclose(
        agent.act(observations(1))[0], candidates[best], rtol=1e-5, atol=1e-6
    )


def test_settings_reach_the_networks():
    agent = box_agent(**KINDS["ifql, small"])
    critic = agent.loss.qvalue_network.module.mlp
    assert [type(layer) for layer in critic] == [nn.Linear, nn.GELU, nn.LayerNorm, nn.Linear]
    assert [type(layer) for layer in agent.actor.head.mlp] == [nn.Linear, nn.GELU, nn.Linear]
    assert (agent.actor.num_steps, agent.policy.num_samples) == (4, 5)
    assert (agent.loss.actor_objective, agent.loss.temperature) == ("flow", 0.0)
    loss = box_agent(**KINDS["ddpg_bc"]).loss
    assert (loss.actor_objective, loss.bc_weight) == ("ddpg_bc", 0.1)
    assert isinstance(box_agent(activation="mish").actor.module[0].module.mlp[1], nn.Mish)


@pytest.mark.parametrize("name", ["ogbench", "ifql"])
def test_presets_build(name):
    agent = make_agent(replace(PRESETS[name], hidden=(8,) * 4, batch_size=16), load_dataset(log()))
    metrics = agent.step(load_dataset(log()).replay_buffer(16, seed=0).sample())
    assert all(bool(value.isfinite()) for value in metrics.values())
    assert agent.act(observations()).shape == (9, 2)


def test_discrete_actions_refuse_candidates():
    with pytest.raises(ValueError, match="num_samples is 4 and the actions are Discrete"):
        discrete_agent(num_samples=4)
    with pytest.raises(ValueError, match="policy is 'flow' and the actions are Discrete"):
        discrete_agent(policy="flow")
    with pytest.raises(ValueError, match="'ddpg_bc' needs continuous actions"):
        discrete_agent(actor_objective="ddpg_bc")
