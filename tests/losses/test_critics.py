"""How one critic becomes K, and what their targets are tied to."""

from __future__ import annotations

import pytest
import torch
from conftest import ACT, OBS, NormedCritic, make_batch, make_networks
from hypothesis import given, settings
from hypothesis import strategies as st
from small_losses import discrete_networks, make_step
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives import HardUpdate, SoftUpdate

from iql_torchrl import DiscreteIQLLoss, IQLLoss, networks
from iql_torchrl.losses.critics import draw_critics


@given(st.integers(2, 30), st.integers(2, 30), st.floats(0.1, 5.0))
@settings(max_examples=30, deadline=None)
def test_orthogonal_stays_orthogonal_at_the_same_gain(rows, columns, gain):
    weight = nn.init.orthogonal_(torch.empty(rows, columns), gain)
    draws = draw_critics(nn.Parameter(weight), 3)
    assert torch.equal(draws[0], weight)
    for draw in draws[1:]:
        short = draw if rows <= columns else draw.T
        expected = gain**2 * torch.eye(len(short))
        torch.testing.assert_close(short @ short.T, expected, atol=1e-3 * gain**2, rtol=1e-3)
        assert not torch.allclose(draw, weight, atol=1e-3)


@pytest.mark.parametrize("init", [nn.init.kaiming_uniform_, nn.init.xavier_normal_])
def test_other_weights_keep_mean_scale_and_range(init):
    weight = init(torch.empty(200, 100))
    draws = draw_critics(nn.Parameter(weight), 4)
    for draw in draws[1:]:
        assert draw.std().item() == pytest.approx(weight.std().item(), rel=0.03)
        assert draw.mean().item() == pytest.approx(weight.mean().item(), abs=0.05)
        assert draw.abs().max() <= weight.abs().max()
        correlation = torch.corrcoef(torch.stack([draw.flatten(), weight.flatten()]))[0, 1]
        assert correlation.abs() < 0.03


def test_constant_and_frozen_tensors_are_copied():
    frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    for tensor in (nn.Parameter(torch.zeros(7)), nn.Parameter(torch.ones(3, 3)), frozen):
        assert (draw_critics(tensor, 3) == tensor).all()


def test_a_frozen_critic_layer_stays_frozen():
    actor, critic, value = make_networks()
    critic.module.mlp[0].requires_grad_(False)
    loss = IQLLoss(actor, critic, value)
    leaf = loss.qvalue_network_params["module", "mlp", "0", "weight"]
    assert not leaf.requires_grad
    assert torch.equal(leaf[1], leaf[0])


def test_a_list_and_a_factory_keep_every_initialisation():
    actor, critics, value = make_networks(critics=3)
    made = []

    def factory():
        made.append(make_networks()[1])
        return made[-1]

    for given_as, modules in ((critics, critics), (factory, made)):
        loss = IQLLoss(actor, given_as, value, num_qvalue_nets=3)
        for k, module in enumerate(modules):
            weight = module.module.mlp[0].weight
            for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
                assert torch.equal(params["module", "mlp", "0", "weight"][k], weight)


def test_the_critics_argument_is_checked():
    actor, critic, value = make_networks()
    with pytest.raises(ValueError, match="lists 3 critics and num_qvalue_nets is 2"):
        IQLLoss(actor, [critic] * 3, value)
    wide = ValueOperator(networks.Critic(OBS, ACT, hidden=(5,)), in_keys=["observation", "action"])
    with pytest.raises(
        ValueError, match=r"'module.mlp.0.weight' has shape \(5, .* in critic 1 and"
    ):
        IQLLoss(actor, [critic, wide], value)
    with pytest.raises(TypeError, match="qvalue_network is str"):
        IQLLoss(actor, "critic", value)
    lazy = ValueOperator(nn.LazyLinear(1), in_keys=["observation"])
    with pytest.raises(ValueError, match="not initialised yet"):
        IQLLoss(actor, lazy, value)
    assert IQLLoss(actor, [critic], value, num_qvalue_nets=1)(make_batch())["loss_qvalue"] > 0


@pytest.mark.parametrize("updater", [SoftUpdate, HardUpdate])
def test_batch_norm_trains_and_its_statistics_count_each_batch_once(updater):
    loss = IQLLoss(*make_networks(critic=NormedCritic()))
    step = make_step(loss, updater)
    for _ in range(3):
        step(make_batch())
    count = loss.qvalue_network_params["module", "norm", "num_batches_tracked"]
    assert count.tolist() == [3, 3]
    key = ("module", "norm", "running_mean")
    assert loss.qvalue_network_params[key].any()
    assert torch.equal(loss.target_qvalue_network_params[key], loss.qvalue_network_params[key])


class Scaled(networks.Critic):
    """A parameter beside ``mlp``; its ``forward`` is the package's."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, -1.0]))

    def layers(self, features):
        return super().layers(features * self.scale[:1])


class Shifted(networks.Critic):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.shift = nn.Parameter(torch.tensor(0.7))

    def forward(self, observation, action):
        return super().forward(observation, action)[..., :1] + self.shift


class Centred(networks.Critic):
    """No parameter of its own, and a mean over the batch."""

    def forward(self, observation, action):
        values = super().forward(observation, action)
        return values - values.mean()


def weight_normed(*sizes, **options):
    """Its weights are computed before each call; they are no parameters."""
    critic = networks.Critic(*sizes, **options)
    for module in critic.modules():
        if isinstance(module, nn.Linear):
            nn.utils.parametrizations.weight_norm(module)
    return critic


def weight_normed_by_hooks(*sizes, **options):
    critic = networks.Critic(*sizes, **options)
    for module in critic.modules():
        if isinstance(module, nn.Linear):
            nn.utils.weight_norm(module)
    return critic


def hooked(*sizes, **options):
    critic = networks.Critic(*sizes, **options)
    critic.mlp[0].register_forward_hook(lambda module, inputs, out: 2 * out)
    return critic


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*weight_norm")  # torch's
@pytest.mark.parametrize(
    "kind",
    [Scaled, Shifted, Centred, weight_normed, weight_normed_by_hooks, hooked, networks.Critic],
)
def test_a_critic_of_yours_is_evaluated_as_in_a_loop(kind):
    """A batch of as many rows as critics: stacked parameters would broadcast against it."""
    results = []
    for in_a_loop in (False, True):
        torch.manual_seed(0)
        actor, _, value = make_networks()
        critics = [
            ValueOperator(kind(OBS, ACT, hidden=(8,)), in_keys=["observation", "action"])
            for _ in range(2)
        ]
        loss = IQLLoss(actor, critics, value, deactivate_vmap=in_a_loop)
        assert loss.is_ensemble is (kind in (hooked, networks.Critic))
        torch.manual_seed(1)
        results.append(loss(make_batch(2)))
    for name in ("loss_actor", "loss_qvalue", "loss_value"):
        torch.testing.assert_close(results[0][name], results[1][name])


class Dueling(networks.DiscreteCritic):
    """V(s) plus centred advantages (Wang et al. 2016)."""

    def __init__(self, inputs, actions, **options):
        super().__init__(inputs, actions, **options)
        self.value = nn.Linear(inputs, 1)

    def forward(self, observation):
        advantages = super().forward(observation)
        return self.value(observation) + advantages - advantages.mean(-1, keepdim=True)


def test_a_critic_with_a_head_of_its_own():
    actor, _, value = discrete_networks()
    results = []
    for in_a_loop in (False, True):
        torch.manual_seed(0)
        critics = [
            TensorDictModule(Dueling(OBS, 4), ["observation"], ["state_action_value"])
            for _ in range(3)
        ]
        loss = DiscreteIQLLoss(
            actor, critics, value, num_qvalue_nets=3, deactivate_vmap=in_a_loop,
            action_space="categorical",
        )  # fmt: skip
        batch = make_batch(6).set("action", torch.arange(6) % 4)
        results.append(loss(batch)["loss_qvalue"])
    torch.testing.assert_close(*results)
