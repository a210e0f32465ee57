"""Networks: shapes, initialisation, standardisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from iql_torchrl import networks


def test_standardise_by_hand_and_constant_columns():
    layer = networks.Standardise(torch.tensor([1.0, 5.0, 1e4]), torch.tensor([2.0, 0.0, 1e-4]))
    out = layer(torch.tensor([[3.0, 5.0, 1e4 + 1], [1.0, 6.0, 1e4]]))
    torch.testing.assert_close(out, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    assert {name for name, _ in layer.named_buffers()} == {"mean", "std"}


def test_standardise_refuses_bad_statistics():
    with pytest.raises(ValueError, match="shape"):
        networks.Standardise(torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        networks.Standardise(torch.tensor([float("nan")]), torch.ones(1))


def test_mlp_layers_and_orthogonal_initialisation():
    mlp = networks.MLP(6, 2, hidden=(8, 4), layer_norm=True, dropout=0.1, activation=nn.Tanh)
    kinds = [type(layer).__name__ for layer in mlp]
    block = ["Linear", "LayerNorm", "Tanh", "Dropout"]
    assert kinds == [*block, *block, "Linear"]
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            weight = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            torch.testing.assert_close(
                weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-5, rtol=0
            )
            assert (layer.bias == 0).all()


def test_initialisation_of_torch_draws_what_linear_layers_draw():
    torch.manual_seed(0)
    mlp = networks.MLP(6, 2, hidden=(400, 400), initialisation="torch")
    layers = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    torch.manual_seed(0)
    for layer, sizes in zip(layers, [(6, 400), (400, 400), (400, 2)], strict=True):
        expected = nn.Linear(*sizes)
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)
    # uniform on +-b with b = 1 / sqrt(400) = 0.05: mean square b**2 / 3; orthogonal rows have
    # 2 / 400 = 0.005 instead
    assert layers[1].weight.abs().max() <= 0.05
    assert layers[1].weight.square().mean().item() == pytest.approx(0.05**2 / 3, rel=0.02)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4)])
def test_shapes(shape):
    observation, goal, action = (torch.randn(*shape, n) for n in (5, 2, 3))
    assert networks.StateValue(7, hidden=(8,))(observation, goal).shape == (*shape, 1)
    assert networks.Critic(7, 3, hidden=(8,))(observation, goal, action).shape == (*shape, 1)
    assert networks.DiscreteCritic(5, 4, hidden=(8,))(observation).shape == (*shape, 4)


def test_preprocess_sees_observations_alone():
    statistics = networks.Standardise(torch.full((5,), 3.0), torch.full((5,), 2.0))
    critic = networks.Critic(5, 3, preprocess=statistics, hidden=(8,))
    observation, action = torch.randn(4, 5), torch.randn(4, 3)
    expected = critic.mlp(torch.cat([(observation - 3) / 2, action], -1))
    torch.testing.assert_close(critic(observation, action), expected)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (2, 3)])
def test_one_hot_keeps_the_batch_shape(shape):
    index = torch.randint(4, shape)
    out = networks.OneHot(4)(index)
    assert out.shape == (*shape, 4)
    assert torch.equal(out.argmax(-1), index)
    assert (out.sum(-1) == 1).all()
    value = networks.StateValue(4, preprocess=networks.OneHot(4), hidden=(8,))
    assert value(index).shape == (*shape, 1)


def test_a_choice_needs_two_actions():
    with pytest.raises(ValueError, match="num_actions is 1"):
        networks.DiscreteCritic(3, 1)


def test_layer_norm_before_or_after_the_activation():
    def kinds(**options):
        mlp = networks.MLP(3, 1, hidden=(8, 8), layer_norm=True, activation=nn.GELU, **options)
        return [type(layer) for layer in mlp]

    hidden = [nn.Linear, nn.LayerNorm, nn.GELU]
    assert kinds() == [*hidden, *hidden, nn.Linear]
    after = [nn.Linear, nn.GELU, nn.LayerNorm]
    assert kinds(norm_after_activation=True) == [*after, *after, nn.Linear]


def test_named_activations():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    tanh = torch.tanh
    by_hand = {
        "relu": x.clamp(min=0),
        "tanh": tanh(x),
        "gelu": 0.5 * x * (1 + tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "mish": x * tanh(torch.log1p(x.exp())),
    }
    assert set(by_hand) == set(networks.ACTIVATIONS)
    for name, expected in by_hand.items():
        torch.testing.assert_close(networks.ACTIVATIONS[name]()(x), expected)


def test_residual_blocks_by_hand():
    net = networks.ResidualMLP(1, 1, hidden=(2,), activation=nn.ReLU, dropout=0.5).eval()
    dropout, norm, wide, activation, narrow = net.blocks[0]
    assert (dropout.p, type(activation)) == (0.5, nn.ReLU)
    with torch.no_grad():
        net.first.weight.copy_(torch.tensor([[1.0], [-3.0]]))
        net.first.bias.copy_(torch.tensor([1.0, 2.0]))
        norm.weight.copy_(torch.tensor([2.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.5, 0.0]))
        wide.weight.zero_()
        wide.weight[0] = torch.tensor([1.0, 0.0])
        wide.weight[7] = torch.tensor([0.0, 1.0])
        wide.bias.fill_(-1.0)
        narrow.weight.zero_()
        narrow.weight[0, 0], narrow.weight[1, 7] = 2.0, 5.0
        narrow.bias.copy_(torch.tensor([0.0, -9.0]))
        net.last[1].weight.copy_(torch.tensor([[1.0, 10.0]]))
        net.last[1].bias.fill_(0.25)
    # x = 2: first (3, -4); mean -0.5, deviation 3.5: normalised (1, -1), scaled (2.5, -1);
    # wide 1.5 and -2 at the two units that are read, after ReLU 1.5 and 0; narrow (3, -9);
    # sum (6, -13); after ReLU (6, 0); out 6 + 0.25
    x = torch.tensor([[2.0]])
    torch.testing.assert_close(net(x), torch.tensor([[6.25]]), rtol=1e-5, atol=1e-5)


def test_residual_blocks_shapes_dropout_and_initialisation():
    net = networks.ResidualMLP(5, 3, hidden=(8, 8, 8), dropout=0.3, activation=nn.Mish)
    assert [type(m).__name__ for m in net.blocks[1]] == [
        "Dropout", "LayerNorm", "Linear", "Mish", "Linear",
    ]  # fmt: skip
    assert len(net.blocks) == 3
    x = torch.randn(4, 6, 5)
    assert net(x).shape == (4, 6, 3)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
            product = weight @ weight.T
            torch.testing.assert_close(product, 2 * torch.eye(len(weight)), atol=1e-5, rtol=0)
            assert (layer.bias == 0).all()


def test_residual_blocks_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match=r"hidden is \(8, 4\); residual blocks add"):
        networks.ResidualMLP(5, 3, hidden=(8, 4))
    with pytest.raises(ValueError, match=r"hidden is \(\); residual blocks add"):
        networks.ResidualMLP(5, 3, hidden=())
    with pytest.raises(ValueError, match="dropout is 1"):
        networks.ResidualMLP(5, 3, dropout=1)
    with pytest.raises(TypeError, match="layer_norm"):
        networks.StateValue(5, residual=True, layer_norm=False)
