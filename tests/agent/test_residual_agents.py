"""Agents with residual blocks: every form of the update, acting, export, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_agents import box_agent, config, discrete_agent, log

from iql_torchrl import IQLPopulation, captured, compiled, load_dataset, make_agent
from iql_torchrl.data import DeviceSampler
from iql_torchrl.networks import MLP, ResidualMLP

CASES = {
    "policy": {"residual": "policy", "layer_norm": True},
    "all": {"residual": "all"},
    "flow": {"residual": "policy", "policy": "flow", "num_samples": 3, "flow_steps": 2},
}


def bodies(agent):
    networks = agent.loss.actor_network, agent.loss.qvalue_network, agent.loss.value_network
    kinds = [
        [type(m) for m in network.modules() if isinstance(m, MLP | ResidualMLP)]
        for network in networks
    ]
    assert all(len(kind) == 1 for kind in kinds)
    return [kind[0] for kind in kinds]


def test_which_networks_have_blocks():
    assert bodies(box_agent()) == [MLP, MLP, MLP]
    assert bodies(box_agent(residual="policy")) == [ResidualMLP, MLP, MLP]
    assert bodies(box_agent(residual="all")) == [ResidualMLP] * 3
    assert bodies(discrete_agent(residual="all")) == [ResidualMLP] * 3
    agent = box_agent(residual="all", hidden=(4, 4, 4), dropout=0.2, activation="mish")
    body = next(m for m in agent.actor.modules() if isinstance(m, ResidualMLP))
    assert [type(m).__name__ for m in body.blocks[2]] == [
        "Dropout", "LayerNorm", "Linear", "Mish", "Linear",
    ]  # fmt: skip
    critic = next(m for m in agent.loss.qvalue_network.modules() if isinstance(m, ResidualMLP))
    assert "Dropout" not in [type(m).__name__ for m in critic.modules()]


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", CASES)
def test_every_form_of_the_update_and_export(name, tmp_path):
    torch._dynamo.reset()
    dataset = load_dataset(log(), dtype=torch.float64)
    agents = [make_agent(config(**CASES[name], schedule="constant"), dataset) for _ in range(3)]
    if name == "flow":  # captured updates would draw noise from their own generator
        for key, shape in (("flow_noise", (2,)), ("flow_time", ())):
            dataset.transitions[key] = torch.rand(40, *shape, dtype=torch.float64)
    sampler, other = (DeviceSampler(dataset.transitions, 8, seed=3) for _ in range(2))
    fast = compiled(agents[1].step)
    captured(agents[2].step, other, updates=2)()
    before = agents[0].act(observations())
    for _ in range(2):
        rows = sampler.sample()
        agents[0].step(rows.clone())
        fast(rows.clone())
    for agent in agents[1:]:
        for key, value in agents[0].state_dict().items():
            torch.testing.assert_close(agent.state_dict()[key], value, rtol=1e-8, atol=1e-9)
    actions = agents[0].act(observations())
    assert (actions != before).any()
    program = torch.export.load(agents[0].export(tmp_path / "policy.pt2")).module()
    exported = program(torch.from_numpy(observations())).numpy()
    np.testing.assert_allclose(exported, actions, rtol=1e-6, atol=1e-6)


def observations(rows: int = 9):
    return np.random.default_rng(1).normal(size=(rows, 3))


def test_refusals():
    with pytest.raises(ValueError, match=r"residual is 'policy' and hidden is \(8, 4\)"):
        config(residual="policy", hidden=(8, 4))
    with pytest.raises(ValueError, match="residual is 'all' and layer_norm is True"):
        config(residual="all", layer_norm=True)
    settings = [config(residual="policy"), config(residual="policy", seed=1)]
    with pytest.raises(
        ValueError, match=r"a Linear, which cannot be stacked; .*without residual blocks"
    ):
        IQLPopulation(settings, load_dataset(log()))
