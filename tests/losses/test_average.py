"""``average_actor``: the averaged policy by hand, in every form of the update, saved and moved."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import small_agents
import torch
from conftest import ACT, OBS, make_batch
from small_agents import box_agent, config, discrete_agent, observations, small_columns
from small_losses import Forms, make_loss, make_step
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import HardUpdate, SoftUpdate

from iql_torchrl import Agent, OfflineTrainer, load_dataset, make_agent
from iql_torchrl.losses.networks import AVERAGE
from iql_torchrl.policies import BestOf
from iql_torchrl.trainers import run_folder

DECAY = 0.75


def averaged_loss(*policy, decay=DECAY, **options):
    loss = make_loss(*policy, hidden=(8,), activation=nn.ReLU, **options)
    loss.average_actor(decay)
    return loss


def weights(loss, average: bool):
    return [t.detach().clone() for t in loss.average_pairs()[int(average)]]


class Averages:
    """The same average from the weights after each update, as numbers."""

    def __init__(self, loss):
        self.loss, self.expected = loss, weights(loss, average=False)

    def follow(self):
        online = weights(self.loss, average=False)
        self.expected = [
            DECAY * a + (1 - DECAY) * w for a, w in zip(self.expected, online, strict=True)
        ]

    def check(self):
        pairs = zip(weights(self.loss, True), self.expected, weights(self.loss, False), strict=True)
        for average, expected, online in pairs:
            torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)
            assert not torch.equal(average, online)


def test_three_numbers_by_hand():
    actor = TensorDictModule(nn.Linear(OBS, ACT, bias=False), ["observation"], ["action"])
    loss = averaged_loss(actor, actor_objective="mse", decay=0.5)
    step = make_step(loss, lr=0.05)
    (online,), (average,) = loss.average_pairs()
    average.zero_()
    for number, expected in ((1.0, 0.5), (2.0, 1.25), (3.0, 2.125)):
        online.data.fill_(number)
        step.move_targets()
        assert set(average.flatten().tolist()) == {expected}
    action = loss.averaged_actor(make_batch(1, dtype=torch.float64).fill_("observation", 1.0))
    assert action["action"].flatten().tolist() == [2.125 * OBS] * ACT


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_eager(order, updater):
    loss = averaged_loss()
    step, averages = make_step(loss, updater, lr=0.05, order=order), Averages(loss)
    for _ in range(3):
        step(make_batch(dtype=torch.float64))
        averages.follow()
    averages.check()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_compiled_and_captured(updates):
    compare_forms(updates)


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    compare_forms(3)


def compare_forms(updates):
    forms = Forms(averaged_loss(), make_batch(50, dtype=torch.float64), updates=updates, lr=0.05)
    averages = [Averages(loss) for loss in forms.losses]
    for _ in range(3 // updates):
        forms.run(follow=lambda: [each.follow() for each in averages[:2]])
        averages[2].follow()
    for each in averages if updates == 1 else averages[:2]:
        each.check()
    forms.assert_equal(rtol=1e-9, atol=1e-10)


def trained(**options):
    options = {"actor_ema": DECAY, "actor_lr": 0.1, "hidden": (8, 8)} | options
    return small_agents.trained(**options)


def by_copying(agent):
    """An agent without averages whose weights are this one's averages."""
    plain = without_average(agent)
    parameters = dict(plain.loss.named_parameters())
    names = {id(p): name for name, p in agent.loss.named_parameters()}
    for parameter, average in zip(*agent.loss.average_pairs(), strict=True):
        parameters[names[id(parameter)]].data.copy_(average)
    return plain


def like(agent, **options):
    return box_agent(**agent.config.to_dict() | {"hidden": agent.config.hidden} | options)


def without_average(agent):
    """One that acts with the online weights."""
    other = like(agent, actor_ema=0.0)
    other.load_state_dict({k: v for k, v in agent.state_dict().items() if AVERAGE not in k})
    return other


@pytest.mark.parametrize(
    "options", [{}, {"policy": "flow", "num_samples": 4}, {"policy": "mixture"}], ids=str
)
def test_an_agent_acts_with_the_average(options):
    agent = trained(**options)
    plain = by_copying(agent)
    assert isinstance(agent.policy, BestOf) is ("num_samples" in options)
    actions = agent.act(observations())
    np.testing.assert_array_equal(actions, plain.act(observations()))
    assert (actions != without_average(agent).act(observations())).any()
    # a copy, and a policy that is sent to another process
    for policy in (copy.deepcopy(agent.policy), pickle.loads(pickle.dumps(agent.policy))):
        other = replace(agent, policy=policy)
        np.testing.assert_array_equal(actions, other.act(observations()))
    # the same bits after loading, into an agent whose average was another
    fresh = like(agent, seed=5)
    fresh.load_state_dict(agent.state_dict())
    np.testing.assert_array_equal(actions, fresh.act(observations()))


def test_discrete():
    agent = discrete_agent(actor_ema=DECAY)
    assert agent.act(observations()).shape == (9,)


def test_copies_moves_and_resets_stay_together():
    loss = averaged_loss()
    make_step(loss, lr=0.05)(make_batch(dtype=torch.float64))
    for each in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.float()):
        averages = each.average_pairs()[1]
        for average in averages:
            average.data.add_(1.0)
        held = {p.data_ptr() for p in each.averaged_actor.parameters()}
        assert held == {t.data_ptr() for t in averages}
        assert {p.dtype for p in each.averaged_actor.parameters()} == {averages[0].dtype}
    loss.reset_parameters_recursive()
    for online, average in zip(*loss.average_pairs(), strict=True):
        assert torch.equal(online, average)


def test_a_resumed_run_has_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "draw", lambda *args, **kwargs: None)  # it takes a second
    data = load_dataset(small_columns())

    def run(folder, updates):
        agent = make_agent(config(actor_ema=0.9, updates=6, schedule="constant"), data)
        return OfflineTrainer(
            agent=agent, dataset=data, folder=folder, total_updates=updates, progress_bar=False
        )

    whole = run(tmp_path / "a", 6)
    whole.train()
    run(tmp_path / "b", 3).train()
    second = run(tmp_path / "b", 6).resume()
    second.train()
    states = [t.agent.state_dict() for t in (whole, second)]
    assert any(AVERAGE in key for key in states[0])
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key
    loaded = Agent.load(tmp_path / "b")
    np.testing.assert_array_equal(loaded.act(observations()), whole.agent.act(observations()))


def test_without_it_nothing_changes():
    loss = averaged_loss(decay=0.0)
    assert loss.averaged_actor is None
    assert not any(AVERAGE in key for key in loss.state_dict())
    assert loss.average_pairs() == ([], [])
    with pytest.raises(ValueError, match=r"actor_ema is 1.0; it must lie in \[0, 1\)"):
        loss.average_actor(1.0)


def test_an_average_that_is_switched_off_is_gone():
    loss = make_loss()
    without = set(loss.state_dict())
    loss.average_actor(0.9)
    loss.average_actor(0)
    assert loss.averaged_actor is None
    assert set(loss.state_dict()) == without
    make_step(loss)(make_batch(5, dtype=torch.float64))


def test_an_average_that_the_step_does_not_know_is_refused():
    loss = make_loss()
    step = make_step(loss)
    loss.average_actor(0.9)
    with pytest.raises(RuntimeError, match="called after this step was built"):
        step(make_batch(5, dtype=torch.float64))
    make_step(loss)(make_batch(5, dtype=torch.float64))
