"""What TorchRL 0.14.1's IQL losses get wrong; every test here fails on its classes.

Each test runs on both: ours must pass, TorchRL's must fail (a strict expected failure on the
version that was measured, so that the list stays honest).
"""

from __future__ import annotations

import pytest
import torch
import torchrl
from conftest import ACT, OBS, NormedCritic, make_batch, make_networks
from small_losses import LOSSES, Head, assert_losses, discrete_networks
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential
from tensordict.nn import TensorDictModule as Mod
from tensordict.nn import TensorDictSequential as Seq
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives import DiscreteIQLLoss as TorchRLDiscreteIQLLoss
from torchrl.objectives import IQLLoss as TorchRLIQLLoss
from torchrl.objectives import SoftUpdate

import iql_torchrl
from iql_torchrl import networks

RIVAL_FAILS = pytest.mark.xfail(
    strict=torchrl.__version__ == "0.14.1", reason="TorchRL 0.14.1 gets this wrong"
)
CONTINUOUS = [
    pytest.param(iql_torchrl.IQLLoss, id="ours"),
    pytest.param(TorchRLIQLLoss, id="torchrl", marks=RIVAL_FAILS),
]
DISCRETE = [
    pytest.param(iql_torchrl.DiscreteIQLLoss, id="ours"),
    pytest.param(TorchRLDiscreteIQLLoss, id="torchrl", marks=RIVAL_FAILS),
]


def gradients(loss, batch):
    loss.zero_grad(set_to_none=True)
    out = loss(batch)
    sum(out[name] for name in LOSSES).backward()
    return out, {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}


def shared_trunk(features: int = 4):
    trunk = Mod(nn.Linear(OBS, features), in_keys=["observation"], out_keys=["hidden"])
    actor = ProbabilisticTensorDictSequential(
        trunk,
        Mod(nn.Linear(features, ACT), in_keys=["hidden"], out_keys=["loc"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc"],
            out_keys=["action"],
            distribution_class=lambda loc: torch.distributions.Independent(
                torch.distributions.Normal(loc, 1.0), 1
            ),
        ),
    )
    value = Seq(trunk, Mod(nn.Linear(features, 1), in_keys=["hidden"], out_keys=["state_value"]))
    head = Mod(Head(features + ACT), in_keys=["hidden", "action"], out_keys=["state_action_value"])
    return trunk, actor, Seq(trunk, head), value


@pytest.mark.parametrize("cls", CONTINUOUS)
@pytest.mark.parametrize("num_critics", [1, 2])
def test_target_trunk_follows_a_shared_live_trunk(cls, num_critics):
    trunk, actor, qvalue, value = shared_trunk()
    loss = cls(actor, qvalue, value, separate_losses=True, num_qvalue_nets=num_critics)
    updater = SoftUpdate(loss, tau=0.5)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    target = loss.target_qvalue_network_params["module", "0", "module", "weight"]
    expected = before = target.clone()
    for _ in range(5):
        gradients(loss, make_batch())
        optimizer.step()
        updater.step()
        expected = 0.5 * expected + 0.5 * trunk.module.weight.detach()
    assert not torch.equal(before, target)
    torch.testing.assert_close(target, expected.expand_as(target))


@pytest.mark.parametrize("cls", CONTINUOUS)
def test_masked_steps_change_no_loss_and_no_gradient(cls):
    loss = cls(*make_networks())
    batch = make_batch(16, 5)
    batch["collector", "mask"] = (torch.arange(5) < 3).expand(16, 5).unsqueeze(-1)
    first, grads = gradients(loss, batch.clone())
    batch["next", "reward"][:, 3:] = 1000.0
    batch["observation"][:, 3:] = -500.0
    spoiled = batch.clone()
    second, spoiled_grads = gradients(loss, spoiled)
    assert_losses(first, second)
    torch.testing.assert_close(grads, spoiled_grads)
    assert (spoiled["td_error"][:, 3:] == 0).all()
    # and the masked mean is the mean over the steps that remain
    short, _ = gradients(loss, batch[:, :3].exclude("collector"))
    assert_losses(first, short)


@pytest.mark.parametrize("cls", CONTINUOUS)
@pytest.mark.parametrize("reader", ["value", "critics"])
def test_another_network_reads_a_key_the_actor_does_not(cls, reader):
    actor, critic, value = make_networks()
    keys = ["observation", "goal"]
    if reader == "value":
        value = ValueOperator(networks.StateValue(OBS + 2, hidden=(8,)), in_keys=keys)
    else:
        critic = ValueOperator(networks.Critic(OBS + 2, ACT, hidden=(8,)), [*keys, "action"])
    loss = cls(actor, critic, value)
    batch = make_batch()
    batch["goal"] = torch.randn(32, 2)
    if reader == "critics":
        assert loss(batch)["loss_qvalue"].isfinite()
        return
    assert ("next", "goal") in loss.in_keys
    loss.make_value_estimator(gamma=0.9)
    losses = []
    for _ in range(2):
        batch["next", "goal"] = torch.randn(32, 2)
        losses.append(loss(batch.clone())["loss_qvalue"])
    assert not torch.equal(*losses)


@pytest.mark.parametrize("cls", CONTINUOUS)
def test_a_lone_critic_keeps_its_initialisation(cls):
    actor, critic, value = make_networks()
    weights = {n: p.detach().clone() for n, p in critic.named_parameters()}
    loss = cls(actor, critic, value)
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        for name, weight in weights.items():
            assert torch.equal(params[tuple(name.split("."))][0], weight)
    second = loss.qvalue_network_params["module", "mlp", "2", "weight"][1].detach()
    assert not torch.equal(second, weights["module.mlp.2.weight"])
    torch.testing.assert_close(second @ second.T, 2 * torch.eye(16), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cls", CONTINUOUS)
def test_importance_weights_of_a_prioritised_buffer(cls):
    loss = cls(*make_networks())
    batch = make_batch(8)
    # a weight of two is the sample twice, a weight of zero is none
    batch["priority_weight"] = torch.tensor([2.0, 1, 1, 1, 0, 0, 1, 1])
    weighted = loss(batch.clone())
    index = torch.tensor([0, 0, 1, 2, 3, 6, 7])
    repeated = loss(batch.exclude("priority_weight")[index])
    assert_losses(weighted, repeated)


@pytest.mark.parametrize("cls", CONTINUOUS)
def test_buffers_of_target_critics_follow(cls):
    loss = cls(*make_networks(critic=NormedCritic()))
    updater = SoftUpdate(loss, tau=0.5)
    live = loss.qvalue_network_params["module", "norm", "running_mean"]
    for _ in range(20):
        live.fill_(3.0)
        updater.step()
    target = loss.target_qvalue_network_params["module", "norm", "running_mean"]
    torch.testing.assert_close(target, live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", CONTINUOUS)
def test_n_step_rewards_are_discounted_by_gamma_to_the_n(cls):
    loss = cls(*make_networks(), loss_function="l2")
    loss.make_value_estimator(gamma=0.5)
    batch = make_batch(8)
    batch["steps_to_next_obs"] = torch.full((8, 1), 3)
    three_steps = loss(batch.clone())["loss_qvalue"]
    loss.make_value_estimator(gamma=0.125)
    one_step = loss(batch.exclude("steps_to_next_obs"))["loss_qvalue"]
    torch.testing.assert_close(three_steps, one_step)


@pytest.mark.parametrize("cls", CONTINUOUS)
def test_value_network_none_is_refused_clearly(cls):
    actor, critic, _ = make_networks()
    with pytest.raises(ValueError, match="value_network is None"):
        cls(actor, critic, None)


@pytest.mark.parametrize("cls", CONTINUOUS)
def test_defaults_are_the_papers(cls):
    loss = cls(*make_networks())
    assert (loss.expectile, loss.temperature, loss.loss_function) == (0.7, 3.0, "l2")


@pytest.mark.parametrize("cls", CONTINUOUS)
def test_at_most_five_network_evaluations(cls):
    calls = []

    def counted(module, *_):
        calls.append(type(module).__name__)

    actor, critic, value = make_networks()
    for module in (actor.module[0].module, critic.module, value.module):
        module.register_forward_hook(counted)
    loss = cls(actor, critic, value)
    loss(make_batch())
    assert len(calls) <= 5, calls


def discrete_batch(action: torch.Tensor) -> TensorDict:
    torch.manual_seed(1)
    batch = make_batch(len(action))
    batch["action"] = action
    return batch


@pytest.mark.parametrize("cls", DISCRETE)
def test_discrete_actions_of_every_form_give_the_same_losses(cls):
    loss = cls(*discrete_networks(), action_space="categorical")
    index = torch.randint(4, (16,))
    forms = [index, index[:, None], nn.functional.one_hot(index, 4)]
    outs = [loss(discrete_batch(form)) for form in forms]
    for out in outs[1:]:
        assert_losses(outs[0], out)


@pytest.mark.parametrize("cls", DISCRETE)
def test_discrete_loss_refuses_a_critic_with_one_output(cls):
    actor, _, value = discrete_networks()
    critic = ValueOperator(networks.StateValue(OBS), in_keys=["observation"])
    critic.out_keys = critic.module.out_keys = ["state_action_value"]
    loss = cls(actor, critic, value, action_space="categorical")
    with pytest.raises(ValueError, match="at least two"):
        loss(discrete_batch(torch.zeros(16, dtype=torch.long)))
