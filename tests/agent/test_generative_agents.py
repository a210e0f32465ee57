"""Agents with every policy, the best of several actions, DDPG+BC, and residual blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_agents import HIGH, LOW, box_agent, config, discrete_agent, log, observations, trained

from iql_torchrl import (
    PRESETS,
    DiscreteIQLLoss,
    IQLPopulation,
    captured,
    compiled,
    load_dataset,
    make_agent,
)
from iql_torchrl.data import DeviceSampler
from iql_torchrl.networks import MLP, ResidualMLP
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
    **{
        f"preset {name}": {**PRESETS[name].to_dict(), "hidden": (8,), "batch_size": 16}
        for name in ("ogbench", "ifql")
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_agents_train_and_act_inside_the_bounds(kind):
    agent = trained(**KINDS[kind])
    assert isinstance(agent.policy, BestOf) is (agent.config.num_samples > 1)
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


def bodies(agent):
    """The layers' module of the actor, the critics and V."""
    loss = agent.loss
    for network in (loss.actor_network, loss.qvalue_network, loss.value_network):
        (body,) = (m for m in network.modules() if isinstance(m, MLP | ResidualMLP))
        yield body


def layers(module):
    return [type(layer).__name__ for layer in module]


def test_settings_reach_the_networks():
    agent = box_agent(**KINDS["preset ifql"])
    actor, critic, _ = bodies(agent)
    assert layers(critic) == ["Linear", "GELU", "LayerNorm", "Linear"]
    assert layers(actor) == ["Linear", "GELU", "Linear"]
    assert (agent.actor.num_steps, agent.policy.num_samples) == (10, 32)
    assert (agent.loss.actor_objective, agent.loss.temperature) == ("flow", 0.0)
    loss = box_agent(**KINDS["ddpg_bc"]).loss
    assert (loss.actor_objective, loss.bc_weight) == ("ddpg_bc", 0.1)
    agent = box_agent(residual="all", hidden=(4, 4, 4), dropout=0.2, activation="mish")
    actor, critic, _ = bodies(agent)
    assert layers(actor.blocks[2]) == ["Dropout", "LayerNorm", "Linear", "Mish", "Linear"]
    assert "Dropout" not in layers(critic.modules())


def test_which_networks_have_blocks():
    discrete = discrete_agent(residual="all")
    assert isinstance(discrete.loss, DiscreteIQLLoss)
    for agent, kinds in (
        (box_agent(), ["MLP"] * 3),
        (box_agent(residual="policy"), ["ResidualMLP", "MLP", "MLP"]),
        (box_agent(residual="all"), ["ResidualMLP"] * 3),
        (discrete, ["ResidualMLP"] * 3),
    ):
        assert layers(bodies(agent)) == kinds


UNEQUAL = {"residual": "policy", "hidden": (8, 4)}
RUNS = [config(residual="policy", seed=seed) for seed in (0, 1)]
RESIDUAL = {
    "policy": {"residual": "policy", "layer_norm": True},
    "all": {"residual": "all"},
    "flow": {"residual": "policy", "policy": "flow", "num_samples": 3, "flow_steps": 2},
}


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", RESIDUAL)
def test_every_form_of_the_update_and_export(name, tmp_path):
    torch._dynamo.reset()
    dataset = load_dataset(log(), dtype=torch.float64)
    agents = [make_agent(config(**RESIDUAL[name], schedule="constant"), dataset) for _ in range(3)]
    if name == "flow":  # captured updates would draw noise from their own generator
        for key, shape in (("flow_noise", (2,)), ("flow_time", ())):
            dataset.transitions[key] = torch.rand(40, *shape, dtype=torch.float64)
    sampler, other = (DeviceSampler(dataset.transitions, 8, seed=3) for _ in range(2))
    fast = compiled(agents[1].step)
    captured(agents[2].step, other, updates=2)()
    seen = observations().astype(np.float64)
    before = agents[0].act(seen)
    for _ in range(2):
        rows = sampler.sample()
        agents[0].step(rows.clone())
        fast(rows.clone())
    for agent in agents[1:]:
        for key, value in agents[0].state_dict().items():
            torch.testing.assert_close(agent.state_dict()[key], value, rtol=1e-8, atol=1e-9)
    actions = agents[0].act(seen)
    assert (actions != before).any()
    program = torch.export.load(agents[0].export(tmp_path / "policy.pt2")).module()
    exported = program(torch.from_numpy(seen)).numpy()
    np.testing.assert_allclose(exported, actions, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: discrete_agent(num_samples=4), "num_samples is 4 and the actions are Discrete"),
        (lambda: discrete_agent(policy="flow"), "policy is 'flow' and the actions are Discrete"),
        (lambda: discrete_agent(policy="gaussian"), "policy is 'gaussian'"),
        (lambda: discrete_agent(actor_objective="ddpg_bc"), "'ddpg_bc' needs continuous actions"),
        (lambda: box_agent(policy="categorical"), "policy is 'categorical'"),
        (lambda: config(**UNEQUAL), r"residual is 'policy' and hidden is \(8, 4\)"),
        (
            lambda: config(residual="all", layer_norm=True),
            "residual is 'all' and layer_norm is True",
        ),
        (
            lambda: IQLPopulation(RUNS, load_dataset(log())),
            r"a Linear, which cannot be stacked; .*without residual blocks",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
