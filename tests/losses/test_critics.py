"""How one critic becomes K, and what their targets are tied to."""

from __future__ import annotations

import pytest
import torch
from conftest import ACT, OBS, NormedCritic, make_batch, make_networks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives import HardUpdate, SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, networks
from iql_torchrl.losses.critics import draw_critics

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor)


@given(st.integers(2, 30), st.integers(2, 30), st.floats(0.1, 5.0))
@settings(max_examples=30, deadline=None)
def test_orthogonal_stays_orthogonal_at_the_same_gain(rows, columns, gain):
    weight = nn.init.orthogonal_(torch.empty(rows, columns), gain)
    draws = draw_critics(parameter(weight), 3)
    assert torch.equal(draws[0], weight)
    for draw in draws[1:]:
        short = draw if rows <= columns else draw.T
        expected = gain**2 * torch.eye(len(short))
        torch.testing.assert_close(short @ short.T, expected, atol=1e-3 * gain**2, rtol=1e-3)
        assert not torch.allclose(draw, weight, atol=1e-3)


@pytest.mark.parametrize("init", [nn.init.kaiming_uniform_, nn.init.xavier_normal_])
def test_other_weights_keep_mean_scale_and_range(init):
    weight = init(torch.empty(200, 100))
    draws = draw_critics(parameter(weight), 4)
    for draw in draws[1:]:
        assert draw.std().item() == pytest.approx(weight.std().item(), rel=0.03)
        assert draw.mean().item() == pytest.approx(weight.mean().item(), abs=0.05)
        assert draw.abs().max() <= weight.abs().max()
        correlation = torch.corrcoef(torch.stack([draw.flatten(), weight.flatten()]))[0, 1]
        assert correlation.abs() < 0.03


def test_constant_and_frozen_tensors_are_copied():
    for tensor in (parameter(torch.zeros(7)), parameter(torch.ones(3, 3))):
        assert (draw_critics(tensor, 3) == tensor).all()
    frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    assert (draw_critics(frozen, 3) == frozen).all()


def test_a_frozen_critic_layer_stays_frozen():
    actor, critic, value = make_networks()
    critic.module.mlp[0].requires_grad_(False)
    loss = IQLLoss(actor, critic, value)
    leaf = loss.qvalue_network_params["module", "mlp", "0", "weight"]
    assert not leaf.requires_grad
    assert torch.equal(leaf[1], leaf[0])


def make_critic():
    return ValueOperator(networks.Critic(OBS, ACT, hidden=(8,)), in_keys=["observation", "action"])


def test_a_list_and_a_factory_keep_every_initialisation():
    actor, _, value = make_networks()
    critics = [make_critic() for _ in range(3)]
    loss = IQLLoss(actor, critics, value, num_qvalue_nets=3)
    made = []

    def factory():
        made.append(make_critic())
        return made[-1]

    from_factory = IQLLoss(actor, factory, value, num_qvalue_nets=3)
    for each, modules in ((loss, critics), (from_factory, made)):
        for k, module in enumerate(modules):
            weight = module.module.mlp[0].weight
            for params in (each.qvalue_network_params, each.target_qvalue_network_params):
                assert torch.equal(params["module", "mlp", "0", "weight"][k], weight)


def test_the_critics_argument_is_checked():
    actor, critic, value = make_networks()
    with pytest.raises(ValueError, match="lists 3 critics and num_qvalue_nets is 2"):
        IQLLoss(actor, [make_critic() for _ in range(3)], value)
    with pytest.raises(TypeError, match="qvalue_network is str"):
        IQLLoss(actor, "critic", value)
    lazy = ValueOperator(nn.LazyLinear(1), in_keys=["observation"])
    with pytest.raises(ValueError, match="not initialised yet"):
        IQLLoss(actor, lazy, value)
    assert IQLLoss(actor, [critic], value, num_qvalue_nets=1)(make_batch())["loss_qvalue"] > 0


@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_batch_norm_trains_and_its_statistics_count_each_batch_once(updater):
    actor, _, value = make_networks()
    critic = ValueOperator(NormedCritic(), in_keys=["observation", "action"])
    loss = IQLLoss(actor, critic, value)
    target_updater = SoftUpdate(loss, tau=0.1) if updater is SoftUpdate else HardUpdate(loss)
    step = IQLStep(loss, torch.optim.Adam(loss.parameters()), target_updater)
    for _ in range(3):
        step(make_batch())
    count = ("module", "norm", "num_batches_tracked")
    assert loss.qvalue_network_params[count].tolist() == [3, 3]
    mean = ("module", "norm", "running_mean")
    live = loss.qvalue_network_params[mean]
    assert live.any()
    assert torch.equal(loss.target_qvalue_network_params[mean], live)


def test_shared_trunk_is_trained_by_the_actor_alone_and_listed_once():
    from test_rival_faults import shared_trunk

    trunk, actor, qvalue, value = shared_trunk()
    loss = IQLLoss(actor, qvalue, value, separate_losses=True)
    names = [name for name, _ in loss.named_parameters()]
    assert sum("weight" in name for name in names) == 4  # trunk, and one head each
    SoftUpdate(loss, tau=0.5)
    for name in ("loss_qvalue", "loss_value"):
        loss.zero_grad(set_to_none=True)
        loss(make_batch())[name].backward()
        assert trunk.module.weight.grad is None
    loss(make_batch())["loss_actor"].backward()
    assert trunk.module.weight.grad.any()


def test_shared_trunk_in_a_list_of_critics():
    from test_rival_faults import shared_trunk

    trunk, actor, first, value = shared_trunk()
    _, _, second, _ = shared_trunk()
    second.module[0] = trunk
    loss = IQLLoss(actor, [first, second], value, separate_losses=True)
    updater = SoftUpdate(loss, tau=0.5)
    target = loss.target_qvalue_network_params["module", "0", "module", "weight"]
    before = target.clone()
    with torch.no_grad():
        trunk.module.weight.add_(1.0)
    updater.step()
    torch.testing.assert_close(target, before + 0.5)
