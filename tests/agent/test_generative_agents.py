"""Agents with flows, the best of several actions, and DDPG+BC: acting, loading, evaluation, export."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from only_torch import run_with_only_torch
from small_agents import HIGH, LOW, MEAN, SCALE, box_agent, config, discrete_agent, log
from torch import nn

from iql_torchrl import (
    PRESETS,
    Agent,
    BackgroundEvaluation,
    IQLConfig,
    OfflineTrainer,
    evaluate,
    load_dataset,
    make_agent,
)
from iql_torchrl.policies import BestOf, FlowPolicy

BEST = {"policy": "flow", "num_samples": 5, "flow_steps": 4}
KINDS = {
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


def observations(rows: int = 9):
    return (np.random.default_rng(1).normal(size=(rows, 3)) * SCALE + MEAN).astype(np.float32)


def trained(**options):
    agent = box_agent(**options)
    buffer = load_dataset(log()).replay_buffer(16, seed=0)
    for _ in range(3):
        agent.step(buffer.sample())
    return agent


@pytest.mark.parametrize("kind", KINDS)
def test_agents_train_and_act_inside_the_bounds(kind):
    agent = trained(**KINDS[kind])
    assert isinstance(agent.policy, BestOf) is ("num_samples" in KINDS[kind])
    assert isinstance(agent.actor, FlowPolicy) is (KINDS[kind].get("policy") == "flow")
    drawn = [agent.act(observations(), deterministic=False, seed=s) for s in (4, 4, 5)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    if kind != "ddpg_bc":
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


class Line(gymnasium.Env):
    """Three numbers; the reward is the first action's closeness to the first number."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(
        LOW.astype(np.float32), HIGH.astype(np.float32), dtype=np.float32
    )

    def draw(self):
        return (MEAN + SCALE * self.np_random.normal(size=3)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.draw()
        self.left = 5
        return self.state, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.left -= 1
        reward = -abs(float(action[0] - self.state[0]))
        self.state = self.draw()
        return self.state, reward, False, self.left == 0, {}


@pytest.mark.parametrize(
    "kind",
    [
        "best of flow",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("flow", "best of mixture")),
    ],
)
def test_evaluation_checkpoints_and_loading(kind, tmp_path):
    dataset = load_dataset(log())
    space = gymnasium.spaces.Box(LOW.astype(np.float32), HIGH.astype(np.float32), dtype=np.float32)
    dataset = replace(dataset, action_space=space)
    agent = make_agent(config(updates=6, **KINDS[kind]), dataset)
    score = partial(evaluate, agent.policy, Line, episodes=3, seed=0)
    before = score().returns
    OfflineTrainer(agent=agent, dataset=dataset, evaluation=score, folder=tmp_path / "run").train()
    after = score().returns
    assert (before != after).any()  # the policy is the trained one
    np.testing.assert_array_equal(after, score().returns)
    loaded = Agent.load(tmp_path / "run")
    newest = Agent.load(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    np.testing.assert_array_equal(newest.act(observations()), agent.act(observations()))
    assert loaded.config == agent.config
    sampled = evaluate(newest.policy, Line, episodes=3, seed=0, deterministic=False).returns
    again = evaluate(agent.policy, Line, episodes=3, seed=0, deterministic=False).returns
    np.testing.assert_array_equal(sampled, again)
    with BackgroundEvaluation(agent.policy, Line, episodes=3, seed=0) as background:
        background.submit(1)
        (_, result), *_ = background.results(wait=True)
    np.testing.assert_allclose(result.returns, after, rtol=1e-5)


COMPARE = """
for name, (states, expected) in torch.load("cases.pt", weights_only=True).items():
    policy = torch.export.load(f"{name}.pt2").module()
    for rows in (1, len(expected)):
        result = policy(states[:rows])
        assert (result - expected[:rows]).abs().max() <= 1e-5, (name, result, expected)
    print("ran", name)
"""


@pytest.mark.slow
def test_plain_torch_runs_an_export_with_critics_and_noise(tmp_path):
    cases = {}
    for name in ("flow", "best of flow", "best of mixture", "ifql, small"):
        agent = trained(**KINDS[name])
        agent.export(tmp_path / f"{name}.pt2")
        states = torch.from_numpy(observations())
        cases[name] = (states, torch.as_tensor(agent.act(observations())))
    torch.save(cases, tmp_path / "cases.pt")
    assert run_with_only_torch(COMPARE, tmp_path).splitlines() == [f"ran {name}" for name in cases]


def test_an_older_checkpoint_lacks_the_new_settings():
    old = IQLConfig().to_dict()
    settings = ("actor_objective", "bc_weight", "flow_steps", "num_samples", "activation")
    for name in (*settings, "initialisation"):
        del old[name]
    assert IQLConfig.from_dict(IQLConfig().to_dict() | old) == IQLConfig()
