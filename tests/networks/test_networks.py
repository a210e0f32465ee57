"""Networks by hand: shapes, initialisation, standardisation; encoders of observations in NumPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import IQLLoss as TorchRLLoss

from iql_torchrl import networks, policies


def are_orthogonal(net: nn.Module) -> bool:
    """Whether all linear layers have orthogonal weights with gain sqrt(2) and biases of 0."""
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        weight = layer.weight if layer.out_features <= layer.in_features else layer.weight.T
        expected = 2 * torch.eye(len(weight))
        torch.testing.assert_close(weight @ weight.T, expected, atol=1e-5, rtol=0)
        assert (layer.bias == 0).all()
    return len(layers) > 2


def test_standardise_by_hand_and_constant_columns():
    # a number, a constant column, and wavelengths in metres
    layer = networks.Standardise(torch.tensor([1.0, 5.0, 550e-9]), torch.tensor([2.0, 0.0, 150e-9]))
    out = layer(torch.tensor([[3.0, 5.0, 700e-9], [1.0, 6.0, 400e-9]]))
    torch.testing.assert_close(out, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]))
    assert networks.Standardise(np.array([1.0]), np.array([2.0])).mean.dtype == torch.float32
    assert {name for name, _ in layer.named_buffers()} == {"mean", "std"}
    with pytest.raises(ValueError, match="shape"):
        networks.Standardise(torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        networks.Standardise(torch.tensor([float("nan")]), torch.ones(1))


def test_layers_and_orthogonal_initialisation():
    options = {"layer_norm": True, "dropout": 0.1, "activation": nn.Tanh}
    before = [nn.Linear, nn.LayerNorm, nn.Tanh, nn.Dropout]
    after = [nn.Linear, nn.Tanh, nn.LayerNorm, nn.Dropout]
    for expected, more in ((before, {}), (after, {"norm_after_activation": True})):
        mlp = networks.MLP(6, 2, hidden=(8, 4), **options, **more)
        pairs = zip(mlp, [*expected, *expected, nn.Linear], strict=True)
        assert all(isinstance(layer, kind) for layer, kind in pairs)
        assert are_orthogonal(mlp)


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
    with pytest.raises(ValueError, match="num_actions is 1"):
        networks.DiscreteCritic(3, 1)


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
    assert torch.equal(out, torch.eye(4)[index])
    value = networks.StateValue(4, preprocess=networks.OneHot(4), hidden=(8,))
    assert value(index).shape == (*shape, 1)
    torch.testing.assert_close(value(index), value.mlp(out))
    torch.testing.assert_close(value(index.float()), value.mlp(out))


def test_stacked_layers_read_categories_as_columns():
    """``(K, out, in)`` weights; the gradient of a column is the sum over its rows."""
    layer = networks.perceptrons.Linear(3, 2)
    weight = torch.arange(12.0).view(2, 2, 3).requires_grad_()
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(torch.ones(2, 2))
    out = layer(torch.tensor([2, 0, 2]))
    by_hand = [[[3.0, 6.0], [1.0, 4.0], [3.0, 6.0]], [[9.0, 12.0], [7.0, 10.0], [9.0, 12.0]]]
    assert out.tolist() == by_hand
    out.sum().backward()
    assert layer.weight.grad.tolist() == [[[1.0, 0.0, 2.0]] * 2] * 2


@pytest.mark.parametrize("sizes", [(5, 40), (40, 6), (40, 1), (40, 40)])
@pytest.mark.parametrize("stacked", [False, True])
def test_layers_as_sums_equal_products(sizes, stacked, monkeypatch):
    """As a program for a GPU computes layers of few outputs; gradients, and of one row, too."""
    inputs, outputs = sizes
    x = torch.randn(7, inputs, dtype=torch.float64, requires_grad=True)
    leading = (3,) if stacked else ()
    weight = torch.randn(*leading, outputs, inputs, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(*leading, outputs, dtype=torch.float64, requires_grad=True)
    expected = networks.perceptrons.affine(x, weight, bias)
    gradients = torch.autograd.grad(expected.square().sum(), (x, weight, bias))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(networks.perceptrons, "launches_kernels", lambda device: True)
    out = networks.perceptrons.affine(x, weight, bias)
    assert ("Sum" in str(out.grad_fn.next_functions)) == (
        outputs == 6 or (outputs == 1 and not stacked)
    )
    torch.testing.assert_close(out, expected)
    again = torch.autograd.grad(out.square().sum(), (x, weight, bias))
    torch.testing.assert_close(again, gradients)
    if not stacked:
        row = networks.perceptrons.affine(x[0], weight, bias)
        torch.testing.assert_close(row, expected[0])


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
    assert are_orthogonal(net)
    for hidden in ((8, 4), ()):
        with pytest.raises(
            ValueError, match=rf"hidden is {re.escape(str(hidden))}; residual blocks"
        ):
            networks.ResidualMLP(5, 3, hidden=hidden)
    # the words of the setting would name the policy
    with pytest.raises(ValueError, match=r"dropout is 1; it must lie in \[0, 1\)\.$"):
        networks.ResidualMLP(5, 3, dropout=1)
    with pytest.raises(TypeError, match="layer_norm"):
        networks.StateValue(5, residual=True, layer_norm=False)


def test_flatten_keeps_the_order_and_categories_become_ones_and_zeros():
    flat = networks.Flatten((2, 3))(torch.arange(24).reshape(2, 2, 2, 3))
    assert flat.shape == (2, 2, 6)
    assert flat.dtype == torch.float32
    np.testing.assert_array_equal(flat[1, 0].numpy(), np.arange(12, 18))
    assert networks.Flatten(())(torch.tensor([3.0, 4.0])).tolist() == [[3.0], [4.0]]
    out = networks.OneHots((2, 3))(torch.tensor([[1, 0], [0, 2]]))
    assert out.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    square = networks.OneHots((2, 2, 2, 2), (2, 2))(torch.tensor([[[0, 1], [1, 0]]]))
    assert square.tolist() == [[1, 0, 0, 1, 0, 1, 1, 0]]


@pytest.mark.parametrize("kind", ["small", "residual"])
@pytest.mark.parametrize("shape", [(9, 12, 3), (40, 36, 1), (4, 84, 84)])
def test_images_of_bytes_and_of_fractions_give_the_same(kind, shape):
    encoder = networks.ImageEncoder(shape, 6, kind=kind)
    images = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    out = encoder(images)
    assert out.shape == (2, 3, 6)
    assert bool((out.abs() < 1).all())
    torch.testing.assert_close(out, encoder(images / 255))
    torch.testing.assert_close(out[1, 2], encoder(images[1, 2]), rtol=0, atol=1e-5)


def test_layouts_agree():
    last = networks.ImageEncoder((10, 12, 3), 5)
    first = networks.ImageEncoder((3, 10, 12), 5)
    first.load_state_dict(last.state_dict())
    images = torch.randint(0, 256, (4, 10, 12, 3), dtype=torch.uint8)
    torch.testing.assert_close(last(images), first(images.permute(0, 3, 1, 2)))
    assert (last.channels, first.channels) == ("last", "first")


@pytest.mark.parametrize("kind", ["small", "residual"])
@pytest.mark.parametrize("shape", [(4, 10, 12, 3), (4, 10, 12, 1), (2, 3, 10, 12), (1, 10, 12, 3)])
def test_the_images_of_a_stack_become_channels(shape, kind):
    encoder, seen = networks.ImageEncoder(shape, 5, kind=kind), []
    encoder.convolutions.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stacks = np.random.default_rng(0).integers(0, 256, (2, 6, *shape), dtype=np.uint8)
    out = encoder(torch.from_numpy(stacks))
    assert out.shape == (2, 6, 5)
    last = shape[-1] < 10  # the channels
    folded = [
        [image[..., c] if last else image[c] for image in stack for c in range(min(shape[1:]))]
        for stack in stacks.reshape(-1, *shape)
    ]
    np.testing.assert_allclose(seen[0].detach().numpy(), np.array(folded) / 255, rtol=1e-6)
    offset = torch.rand(2, 6, 2)
    moved = encoder.shifted(torch.from_numpy(stacks), offset, 2)
    alone = networks.ImageEncoder(shape[1:], 5)
    for number in range(shape[0]):
        expected = alone.shifted(torch.from_numpy(stacks[:, :, number]), offset, 2)
        assert torch.equal(moved[:, :, number], expected)


@settings(deadline=None, max_examples=40)
@given(
    pixels=st.integers(1, 5),
    offset=st.tuples(*[st.floats(0, 1, exclude_max=True, width=32)] * 2),
    first=st.booleans(),
)
def test_the_shift_is_a_window_of_the_padded_image(pixels, offset, first):
    shape = (2, 9, 11) if first else (9, 11, 2)
    encoder = networks.ImageEncoder(shape, 4)
    image = torch.randint(0, 256, (1, *shape), dtype=torch.uint8)
    moved = encoder.shifted(image, torch.tensor([offset]), pixels)
    outer = ((0, 0), (pixels, pixels), (pixels, pixels))
    sides = outer if first else (*outer[1:], (0, 0))
    padded = np.pad(image[0].numpy(), sides, mode="edge")
    down, right = (int(np.float32(x) * np.float32(2 * pixels + 1)) for x in offset)
    rows, columns = slice(down, down + 9), slice(right, right + 11)
    window = padded[:, rows, columns] if first else padded[rows, columns]
    np.testing.assert_array_equal(moved[0].numpy(), window)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (84, 84)}, r"shape is \(84, 84\); expected that of one image"),
        ({"shape": (4, 20, 3)}, "at least 8 x 8"),
        ({"shape": (20, 20, 3), "kind": "large"}, "kind is 'large'; choose one of 'small'"),
        ({"shape": (20, 20, 3), "features": 0}, "features is 0; expected an integer"),
    ],
)
def test_what_makes_no_encoder_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.ImageEncoder(**arguments)
    encoder = networks.ImageEncoder((20, 24, 3))
    with pytest.raises(ValueError, match=r"\(5, 24, 20, 3\); expected .* \(20, 24, 3\)"):
        encoder(torch.zeros(5, 24, 20, 3))


def test_networks_of_this_package_work_in_torchrls_losses():
    """TorchRL evaluates critics by ``vmap`` of a module without parameters of its own."""
    spec = Bounded(-torch.ones(2), torch.ones(2), (2,))
    loss = TorchRLLoss(
        policies.gaussian(3, spec, hidden=(8,)),
        ValueOperator(networks.Critic(3, 2, hidden=(8,)), in_keys=["observation", "action"]),
        ValueOperator(networks.StateValue(3, hidden=(8,)), in_keys=["observation"]),
        num_qvalue_nets=2,
    )
    following = {"observation": torch.randn(5, 3), "reward": torch.randn(5, 1)}
    following |= {key: torch.zeros(5, 1, dtype=torch.bool) for key in ("done", "terminated")}
    batch = {"observation": torch.randn(5, 3), "action": torch.rand(5, 2), "next": following}
    assert loss(TensorDict(batch, [5]))["loss_qvalue"] > 0
