"""Stacked networks: outputs and gradients of each run's own module, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from iql_torchrl.networks.stacked import StackedNetwork, perceptron_keys
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import MLP as TorchRLMLP
from torchrl.modules import ValueOperator

from iql_torchrl import networks, policies
from iql_torchrl.networks.evaluation import Category

RUNS, CRITICS, ROWS, OBS, ACT = 3, 2, 6, 4, 2
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def sequential(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(OBS, 5), *between, nn.Linear(5, 1))


def one_activation_twice() -> nn.Sequential:
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(OBS, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 1), act)


PERCEPTRONS = {
    "mlp": lambda: networks.MLP(OBS, 1, hidden=(5, 3)),
    "layer norm": lambda: networks.MLP(OBS, 1, hidden=(5,), layer_norm=True),
    "linear": lambda: nn.Sequential(nn.Linear(OBS, 1, bias=False)),
    "no biases": lambda: nn.Sequential(
        nn.Linear(OBS, 5, bias=False), nn.LayerNorm(5, bias=False), nn.GELU(), nn.Linear(5, 1)
    ),
    "plain norm": lambda: sequential(nn.LayerNorm(5, elementwise_affine=False), nn.SiLU()),
    "norm first": lambda: nn.Sequential(nn.LayerNorm(OBS), nn.Linear(OBS, 5), nn.ELU()),
    "plain norm first": lambda: nn.Sequential(
        nn.LayerNorm(OBS, elementwise_affine=False), nn.Linear(OBS, 5), nn.Mish()
    ),
    "activation first": lambda: nn.Sequential(nn.Softplus(), nn.Linear(OBS, 5), nn.LeakyReLU(0.3)),
    "one activation twice": one_activation_twice,
    "torchrl": lambda: TorchRLMLP(OBS, 1, num_cells=[5, 5], activation_class=nn.ReLU),
    "standardised": lambda: nn.Sequential(
        networks.Standardise(torch.arange(4.0), torch.full((4,), 2.0)), sequential(nn.Sigmoid())
    ),
    "state value": lambda: networks.StateValue(OBS, hidden=(5,), preprocess=sequential_features()),
}


def sequential_features() -> nn.Sequential:
    return nn.Sequential(nn.Linear(OBS, OBS), nn.ReLU())


def jittered(module: nn.Module) -> nn.Module:
    """Norm scales and biases apart from their initial ones and zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double()


def stack(modules, leading):
    """Parameters ``(*leading, ...)`` of modules listed in that order."""
    tables = [TensorDict.from_module(ValueOperator(m, in_keys=["x"])).data for m in modules]
    stacked = torch.stack(tables).contiguous()
    stacked = stacked if len(leading) == 1 else stacked.view(leading)
    return stacked.apply(lambda leaf: leaf.requires_grad_())


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("critics", [None, CRITICS], ids=["one", "critics"])
@pytest.mark.parametrize("kind", PERCEPTRONS)
def test_each_run_is_its_own_module(kind, critics, own):
    leading = (RUNS,) if critics is None else (RUNS, critics)
    modules = [jittered(PERCEPTRONS[kind]()) for _ in range(RUNS * (critics or 1))]
    params = stack(modules, leading)
    network = ValueOperator(modules[0], in_keys=["x"])
    stacked = StackedNetwork("value_network", network, params)
    x = torch.randn(*((RUNS,) if own else ()), ROWS, OBS, dtype=torch.float64)
    kept = x.clone()
    found = stacked(TensorDict(x=x))
    each = x if own else x.expand(RUNS, ROWS, OBS)
    expected = torch.stack([m(each[i // (critics or 1)]) for i, m in enumerate(modules)])
    expected = expected.view(*leading, *expected.shape[1:])
    torch.testing.assert_close(found, expected, **EXACT)
    assert torch.equal(x, kept)
    weight = torch.randn_like(found)
    (weight * found).sum().backward()
    (weight * expected).sum().backward()
    gradients = stack([grads(m) for m in modules], leading)
    for key in perceptron_keys("value_network", network):
        torch.testing.assert_close(params.get(key).grad, gradients.get(key).detach(), **EXACT)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("critics", [None, CRITICS], ids=["one", "critics"])
@pytest.mark.parametrize("norm", [False, True])
def test_categories_of_each_run(norm, critics, own):
    leading = (RUNS,) if critics is None else (RUNS, critics)
    make = partial(networks.DiscreteCritic, 6, 3, hidden=(5,), layer_norm=norm)
    modules = [jittered(make()) for _ in range(RUNS * (critics or 1))]
    params = stack(modules, leading)
    network = ValueOperator(make(preprocess=networks.OneHot(6)), in_keys=["x"])
    stacked = StackedNetwork("qvalue_network", network, params)
    assert type(stacked.module.module.preprocess) is Category
    index = torch.randint(6, ((RUNS,) if own else ()) + (ROWS,))
    found = stacked(TensorDict(x=index))
    x = nn.functional.one_hot(index, 6).double()
    each = x if own else x.expand(RUNS, ROWS, 6)
    expected = torch.stack([m(each[i // (critics or 1)]) for i, m in enumerate(modules)])
    expected = expected.view(*leading, *expected.shape[1:])
    torch.testing.assert_close(found, expected, **EXACT)
    weight = torch.randn_like(found)
    (weight * found).sum().backward()
    (weight * expected).sum().backward()
    gradients = stack([grads(m) for m in modules], leading)
    for key in perceptron_keys("qvalue_network", network):
        torch.testing.assert_close(params.get(key).grad, gradients.get(key).detach(), **EXACT)


def test_a_norm_before_the_first_layer_keeps_the_one_hot_form():
    network = networks.StateValue(6, preprocess=networks.OneHot(6), hidden=())
    network.mlp = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 1))
    stacked = StackedNetwork(
        "value_network", ValueOperator(network, in_keys=["x"]), stack([network.mlp], (1,))
    )
    assert type(stacked.module.module.preprocess) is networks.OneHot


def grads(module: nn.Module) -> nn.Module:
    """The module with its gradients in the place of its parameters."""
    for parameter in module.parameters():
        parameter.data = parameter.grad
    return module


@pytest.mark.parametrize("runs", [1, CRITICS])
def test_a_norm_before_the_first_layer_meets_each_runs_own_batch(runs):
    """As many runs as critics: a dimension in the wrong place would broadcast in silence."""
    modules = [jittered(PERCEPTRONS["norm first"]()) for _ in range(runs * CRITICS)]
    params = stack(modules, (runs, CRITICS))
    stacked = StackedNetwork("q", ValueOperator(modules[0], in_keys=["x"]), params)
    x = torch.randn(runs, ROWS, OBS, dtype=torch.float64)
    found = stacked(TensorDict(x=x))
    for i in range(runs):
        for k in range(CRITICS):
            torch.testing.assert_close(found[i, k], modules[i * CRITICS + k](x[i]), **EXACT)


def test_modes_are_the_originals():
    module = networks.MLP(OBS, 1, hidden=(64,), dropout=0.5)
    network = ValueOperator(module, in_keys=["x"])
    stacked = StackedNetwork("v", network, stack([module] * RUNS, (RUNS,)))
    x = TensorDict(x=torch.ones(ROWS, OBS))
    first, second = stacked(x), stacked(x)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    network.eval()
    stacked.follow_modes()
    assert torch.equal(stacked(x), stacked(x))
    torch.testing.assert_close(stacked(x), module(x["x"]).expand(RUNS, ROWS, 1))
    network.train()
    stacked.follow_modes()
    assert not torch.equal(stacked(x), stacked(x))


def actor(**options):
    spec = Bounded(-torch.ones(ACT), torch.ones(ACT), (ACT,))
    return policies.gaussian(OBS, spec, hidden=(5,), **options)


def test_a_policy_may_learn_its_features():
    assert len(perceptron_keys("actor_network", actor(preprocess=sequential_features()))) == 6


def value(module):
    return TensorDictModule(module, in_keys=["observation"], out_keys=["state_value"])


@pytest.mark.parametrize(
    ("network", "culprit"),
    [
        (value(sequential(nn.PReLU())), "'module.1', a PReLU"),
        (value(sequential(nn.BatchNorm1d(5))), "a BatchNorm1d"),
        (value(sequential(nn.Softmax(dim=1))), "a Softmax"),
        (value(nn.Linear(OBS, 1)), "'module', a Linear"),
        (value(nn.Sequential(nn.Sequential(nn.Linear(4, 5)), nn.Linear(5, 1))), "a Linear"),
        (value(sequential(nn.LayerNorm((2, 5)))), "a LayerNorm"),
        (value(nn.GRU(OBS, 1)), "a GRU"),
        (actor(preprocess=nn.Softmax(dim=1)), "'module.0.module.preprocess', a Softmax"),
        (actor(activation=nn.PReLU), "a PReLU"),
        (value(networks.Critic(OBS, ACT, preprocess=sequential_features())), "has parameters"),
    ],
)
def test_what_cannot_be_stacked_is_named(network, culprit):
    with pytest.raises(ValueError, match=rf"value_network.*{culprit}"):
        perceptron_keys("value_network", network)


def test_hooks_and_own_classes_are_refused():
    class Mine(nn.Linear):
        pass

    with pytest.raises(ValueError, match="a Mine, which cannot be stacked"):
        perceptron_keys("v", value(nn.Sequential(Mine(OBS, 1))))
    hooked = sequential(nn.ReLU())
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'module', a Sequential"):
        perceptron_keys("v", value(hooked))


def test_statistics_that_differ_are_refused():
    def module(mean: float):
        first = networks.Standardise(torch.full((OBS,), mean), torch.ones(OBS))
        return nn.Sequential(first, sequential(nn.ReLU()))

    modules = [module(0.0), module(0.0), module(1.0)]
    params = stack(modules, (RUNS,))
    with pytest.raises(ValueError, match=r"v's module\.0\.mean differs between the runs"):
        StackedNetwork("v", ValueOperator(modules[0], in_keys=["x"]), params)
