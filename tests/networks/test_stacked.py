"""Perceptrons of many runs: outputs and gradients of each run's own module."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrl.modules import MLP as TorchRLMLP

from iql_torchrl import networks
from iql_torchrl.networks.evaluation import DERIVATIVES, Perceptron

RUNS, CRITICS, ROWS, OBS = 3, 2, 6, 4
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
    "written-out gradient": lambda: networks.MLP(OBS, 3, hidden=(5, 3)),
    "categories": lambda: networks.MLP(OBS, 3, hidden=(5,), activation=nn.GELU),
    "categories, written-out gradient": lambda: networks.MLP(OBS, 3, hidden=(5, 3)),
}


def jittered(module: nn.Module) -> nn.Module:
    """Norm scales and biases apart from their initial ones and zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double()


@pytest.mark.parametrize("runs", [1, CRITICS, RUNS])  # as many as critics: no wrong dimension
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("critics", [None, CRITICS], ids=["one", "critics"])
@pytest.mark.parametrize("kind", PERCEPTRONS)
def test_each_run_is_its_own_module(kind, critics, own, runs):
    leading = (runs,) if critics is None else (runs, critics)
    modules = [jittered(PERCEPTRONS[kind]()) for _ in range(runs * (critics or 1))]
    listed = [[p for layer in m for p in layer.parameters(recurse=False)] for m in modules]
    leaves = [torch.stack(x).detach().unflatten(0, leading) for x in zip(*listed, strict=True)]
    for leaf in leaves:
        leaf.requires_grad_()
    x = torch.randn(*((runs,) if own else ()), ROWS, OBS, dtype=torch.float64)
    picks, derivative = "categories" in kind, DERIVATIVES[nn.ReLU] if "written" in kind else None
    index = x.argmax(-1)
    x = nn.functional.one_hot(index, OBS).double() if picks else x
    before, given = x.clone(), index if picks else x
    options = {"per_run": True, "picks": picks, "derivative": derivative}
    out = Perceptron(modules[0], leaves, **options)(given)
    each = x if own else x.expand(runs, ROWS, OBS)
    expected = torch.stack([m(each[i // (critics or 1)]) for i, m in enumerate(modules)])
    expected = expected.view(*leading, *expected.shape[1:])
    torch.testing.assert_close(out, expected, **EXACT)
    assert torch.equal(x, before)
    weight = torch.randn_like(out)
    (weight * out).sum().backward()
    (weight * expected).sum().backward()
    for leaf, alone in zip(leaves, zip(*listed, strict=True), strict=True):
        apart = torch.stack([p.grad for p in alone]).view_as(leaf)
        torch.testing.assert_close(leaf.grad, apart, **EXACT)
