"""Perceptrons: values and gradients by hand and against the modules they stand for."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import MLP as TorchRLMLP

from iql_torchrl import networks
from iql_torchrl.networks.evaluation import DERIVATIVES, Perceptron
from iql_torchrl.networks.recognition import network_over, one_activation

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def perceptron(layers: int, activation=nn.ReLU, inputs: int = 4, outputs: int = 2):
    hidden = (6,) * (layers - 1)
    return networks.MLP(inputs, outputs, hidden=hidden, activation=activation).double()


def over(*modules, **options):
    """The Perceptron over the parameters of one module, or over those of several, ``(K, ...)``."""
    listed = [[p for layer in m for p in layer.parameters()] for m in modules]
    stacked = [torch.stack(leaf).detach().requires_grad_() for leaf in zip(*listed, strict=True)]
    leaves = stacked if options.pop("stacked", True) else listed[0]
    kind = type(modules[0][1]) if len(modules[0]) > 1 else nn.ReLU
    return Perceptron(modules[0], leaves, derivative=DERIVATIVES[kind], **options)


def made(count, *args, **options):
    """Perceptrons, and the Perceptron over them: of one where ``count`` is None, else stacked."""
    sources = [perceptron(*args, **options) for _ in range(count or 1)]
    return sources, over(*sources, stacked=count is not None)


def both(dense, x):
    """Outputs with the written-out gradient, and by operations."""
    return dense(x), dense.operations(x, dense.leaves)


def gradients(out, expected):
    """Of a sum that weighs every output differently."""
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((weight * out).sum(), expected)


def by_hand(activation, sizes, values, x):
    """Output and gradients, with respect to ``x`` and every leaf, of a network with one unit inside."""
    source = nn.Sequential(nn.Linear(sizes, 1), activation(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        for leaf, value in zip(source.parameters(), values, strict=True):
            leaf.copy_(torch.tensor(value))
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    out = over(source, stacked=False)(x)
    gradients = torch.autograd.grad(out.sum(), [x, *source.parameters()])
    return out.tolist(), [gradient.tolist() for gradient in gradients]


def test_by_hand():
    """``relu(x @ [[1], [-2]] + 3) * -1 + 0.5`` and its derivatives."""
    x = [[1.0, 1.0], [0.0, 2.0]]  # before ReLU: 2 and -1
    out, gradients = by_hand(nn.ReLU, 2, ([[1.0, -2.0]], 3.0, -1.0, 0.5), x)
    assert out == [[-1.5], [0.5]]
    assert gradients == [[[-1.0, 2.0], [0.0, 0.0]], [[-1.0, -1.0]], [-1.0], [[2.0]], [2.0]]


def test_tanh_by_hand():
    out, gradients = by_hand(nn.Tanh, 1, (2.0, 0.0, 3.0, 1.0), [[0.25]])
    assert out[0][0] == pytest.approx(1 + 3 * math.tanh(0.5), rel=1e-14)
    assert gradients[0][0][0] == pytest.approx(6 * (1 - math.tanh(0.5) ** 2), rel=1e-14)


def assert_gradients(out, leaves, expected, sources, x=()):
    """Gradients of inputs ``x`` and of ``leaves`` are those of the modules apart."""
    apart = [p for source in sources for p in source.parameters()]
    ours, theirs = gradients(out, [*x, *leaves]), gradients(expected, [*x, *apart])
    for a, b in zip(ours[: len(x)], theirs, strict=False):
        torch.testing.assert_close(a, b, **EXACT)
    for place, gradient in enumerate(ours[len(x) :]):
        expected = torch.stack(theirs[len(x) + place :: len(leaves)])
        torch.testing.assert_close(gradient.view_as(expected), expected, **EXACT)


def check(outs, dense, sources, rows, x=()):
    """Each of ``outs`` is what the modules apart compute from ``rows``, and so are its gradients."""
    for out in outs:
        stacked = dense.leaves[-1].ndim == 2
        expected = torch.stack([m(rows) for m in sources]) if stacked else sources[0](rows)
        torch.testing.assert_close(out, expected, **EXACT)
        assert_gradients(out, dense.leaves, expected, sources, x)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("count", [None, 1, 2, 5])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_values_and_gradients(outputs, activation, count, layers):
    sources, dense = made(count, layers, activation, outputs=outputs)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    check(both(dense, x), dense, sources, x, [x])


@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 3, 5), (2, 0)])
def test_any_batch_dimensions(count, shape):
    sources, dense = made(count, 3)
    x = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    check([dense(x)], dense, sources, x, [x])


@pytest.mark.parametrize("count", [None, 1, 3])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("shape", [(9,), (0,), (1,), (2, 5)])
def test_categories_are_their_one_hot_form(count, layers, shape):
    sources, dense = made(count, layers, inputs=6)
    index = torch.randint(6, shape)  # categories return, and some do not come
    with pytest.raises(TypeError, match=r"got torch.int64; .*networks\.OneHot"):
        dense(index)
    dense.picks = True
    one_hot = nn.functional.one_hot(index, 6).double()
    outs = both(dense, index) if len(shape) == 1 else [dense(index)]
    check(outs, dense, sources, one_hot)


def test_unknown_categories_are_refused():
    _, dense = made(None, 1, inputs=3)
    dense.picks = True
    for index in (3, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            dense(torch.tensor([0, index]))


@pytest.mark.parametrize("count", [None, 2])
def test_numerical_derivatives(count):
    _, dense = made(count, 3, nn.Tanh)

    def evaluate(x, *leaves):
        dense.leaves = leaves
        return dense(x)

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(evaluate, (x, *dense.leaves))


def layer(*sizes, **options):
    return nn.Linear(*(sizes or (4, 4)), **options)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


LEFT_ALONE = {
    "layer norm": lambda: networks.MLP(4, 2, layer_norm=True),
    "dropout": lambda: networks.MLP(4, 2, dropout=0.1),
    "other activation": lambda: networks.MLP(4, 2, activation=nn.GELU),
    "mixed activations": lambda: nn.Sequential(layer(), nn.ReLU(), layer(), nn.Tanh(), layer()),
    "no bias": lambda: nn.Sequential(layer(), nn.ReLU(), layer(bias=False)),
    "activation last": lambda: nn.Sequential(layer(), nn.ReLU()),
    "activation first": lambda: nn.Sequential(nn.ReLU(), layer()),
    "linear only": lambda: nn.Sequential(layer(), layer()),
    "nothing": nn.Sequential,
    "subclass of Linear": lambda: nn.Sequential(Halved(4, 4), nn.ReLU(), layer()),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(layer()), nn.ReLU(), layer()
    ),
    "subclass of Sequential": lambda: type("Mine", (nn.Sequential,), {})(layer()),
    "one of its layers": layer,
    "torchrl, other shape out": lambda: TorchRLMLP(4, (2, 3), num_cells=[4]),
    "torchrl, norm": lambda: TorchRLMLP(
        4, 2, num_cells=[4], norm_class=nn.LayerNorm, norm_kwargs={"normalized_shape": 4}
    ),
    "torchrl, last bias alone": lambda: TorchRLMLP(
        4, 2, num_cells=[4], single_bias_last_layer=True
    ),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_what_is_not_recognised_is_left_alone(what):
    assert one_activation(LEFT_ALONE[what]()) is None


def test_layers_that_appear_twice():
    """A shared activation is no obstacle; a tied layer is computed as often as it appears."""
    act, tied = nn.ReLU(), layer().double()
    sources = [
        nn.Sequential(layer(), act, layer(), act, layer()).double(),
        nn.Sequential(tied, nn.ReLU(), layer(), nn.ReLU(), tied).double(),
    ]
    for source in sources:
        assert one_activation(source) is DERIVATIVES[nn.ReLU]
        x = torch.randn(7, 4, dtype=torch.float64)
        out, leaves = over(source, stacked=False)(x), list(source.parameters())
        torch.testing.assert_close(out, source(x), **EXACT)
        for a, b in zip(gradients(out, leaves), gradients(source(x), leaves), strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_networks_of_categories_pick():
    def direct(network):
        return network_over(network, ["x"], TensorDict.from_module(network), per_run=False)

    one_hot = networks.OneHot(6)
    for kind in (networks.StateValue, partial(networks.DiscreteCritic, num_actions=3)):
        network = kind(6, preprocess=one_hot, hidden=(4,))
        assert direct(network).body.picks
        index = torch.randint(6, (3, 5))
        for x in (index, index.double()):
            torch.testing.assert_close(direct(network).run(x), network(x))
    for left in (
        networks.StateValue(6, preprocess=one_hot, hidden=(4,), layer_norm=True),
        networks.Critic(6, 2, preprocess=one_hot, hidden=(4,)),
        networks.StateValue(6, preprocess=nn.Sequential(one_hot, nn.Linear(6, 6))),
    ):
        assert direct(left).body is None or not direct(left).body.picks
