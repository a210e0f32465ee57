"""PopulationLoss: losses that are no population, each named by what differs."""

from __future__ import annotations

import pytest
import torch
from conftest import ACT, OBS, NormedCritic, make_batch, make_networks
from tensordict.nn import TensorDictSequential
from test_population_loss import make_loss, make_losses, moving
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import ValueEstimators

from iql_torchrl import IQLLoss, networks, policies
from iql_torchrl.population.loss import PopulationLoss


def test_weights_are_drawn_run_by_run():
    with pytest.raises(NotImplementedError, match="run by run"):
        PopulationLoss(make_losses()).reset_parameters_recursive()


def with_networks(actor=None, critic=None, value=None, **options) -> IQLLoss:
    others = make_networks()
    parts = [a or b for a, b in zip((actor, critic, value), others, strict=True)]
    return IQLLoss(parts[0], [parts[1]], parts[2], num_qvalue_nets=1, **options)


def state_value(*layers: nn.Module) -> ValueOperator:
    return ValueOperator(nn.Sequential(*layers), in_keys=["observation"])


def shared_trunk() -> IQLLoss:
    trunk = nn.Linear(OBS, 8)
    critic = ValueOperator(
        networks.Critic(OBS, ACT, hidden=(16,)), in_keys=["observation", "action"]
    )
    value = state_value(trunk, nn.ReLU(), nn.Linear(8, 1))
    spec = Bounded(-torch.ones(ACT), torch.ones(ACT), (ACT,))
    actor = policies.gaussian(8, spec, preprocess=nn.Sequential(trunk, nn.ReLU()))
    return with_networks(actor, critic, value)


def lambda_returns() -> IQLLoss:
    return with_networks().make_value_estimator(ValueEstimators.TDLambda, gamma=0.9)


class _Mine(IQLLoss):
    pass


def derived_loss() -> IQLLoss:
    return _Mine(*make_networks())


def frozen() -> IQLLoss:
    loss = with_networks()
    loss.value_network_params.requires_grad_(False)
    return loss


def other_keys() -> IQLLoss:
    loss = with_networks()
    loss.set_keys(reward="r")
    return loss


def spec(low: float = -1.0) -> Bounded:
    return Bounded(torch.full((ACT,), low), torch.ones(ACT), (ACT,))


def head_of_two() -> IQLLoss:
    options = {"hidden": (16, 16), "in_keys": ["observation"]}
    return with_networks(policies.gaussian(OBS, spec(), state_dependent_std=True, **options))


def squashed() -> IQLLoss:
    return with_networks(policies.tanh_normal(OBS, spec(), hidden=(16, 16)))


def tanh_value() -> IQLLoss:
    layers = nn.Linear(OBS, 4), nn.Tanh(), nn.Linear(4, 1)
    return with_networks(value=state_value(*layers))


def relu_value(end: bool = False) -> IQLLoss:
    layers = nn.Linear(OBS, 4), nn.ReLU(), nn.Linear(4, 1), *([nn.Tanh()] if end else [])
    return with_networks(value=state_value(*layers))


REFUSED = {
    "empty": (list, ValueError, "losses is empty"),
    "subclass": (lambda: [derived_loss()], TypeError, r"losses\[0\] is a _Mine; expected IQLLoss"),
    "population": (
        lambda: [with_networks(), PopulationLoss([with_networks()])],
        TypeError,
        r"losses\[1\] is a PopulationLoss",
    ),
    "width": (
        lambda: [with_networks(), with_networks(*make_networks(hidden=(16, 8)))],
        ValueError,
        r"actor_network's .*'mlp', '2', 'weight'.* has shape \(8, 16\) in losses\[1\] and \(16, 16\)",
    ),
    "critics": (
        lambda: [make_loss(critics=2), make_loss(critics=3)],
        ValueError,
        r"num_qvalue_nets is 3 in losses\[1\] and 2 in the first",
    ),
    "objective": (
        lambda: [with_networks(), with_networks(value_objective="quantile")],
        ValueError,
        "value_objective is 'quantile'",
    ),
    "own objective": (
        lambda: [with_networks(actor_objective=lambda actor, batch: batch["reward"])],
        ValueError,
        "actor_objective is a function",
    ),
    "own value objective": (
        lambda: [with_networks(value_objective=lambda target_qvalue, value: target_qvalue - value)],
        ValueError,
        "value_objective is a function, which sees one run; use 'expectile'",
    ),
    "own weight": (
        lambda: [with_networks(advantage_weight=torch.sigmoid)],
        ValueError,
        "advantage_weight is a function, which sees one run; use 'exponential'",
    ),
    "activation": (
        lambda: [relu_value(), tanh_value()],
        ValueError,
        r"a module of value_network is \('module.1', 'Tanh",
    ),
    "one layer more": (
        lambda: [relu_value(), relu_value(end=True)],
        ValueError,
        r"is \('module.3', 'Tanh.* in losses\[1\] and None in the first",
    ),
    "distribution": (lambda: [head_of_two(), squashed()], ValueError, "_SquashedHead"),
    "frozen": (
        lambda: [with_networks(), frozen()],
        ValueError,
        r"value_network's .* is 'frozen parameter' in losses\[1\] and 'trained' in the first",
    ),
    "keys": (lambda: [with_networks(), other_keys()], ValueError, "tensor_keys is .*reward='r'"),
    "trunk": (lambda: [shared_trunk()], ValueError, r"losses\[0\]'s networks share parameters"),
    "estimator": (lambda: [lambda_returns()], ValueError, r"does not use TD\(0\)"),
    "batch norm": (
        lambda: [with_networks(critic=ValueOperator(NormedCritic(), ["observation", "action"]))],
        ValueError,
        "qvalue_network holds .*cannot be stacked",
    ),
    "several modules": (
        lambda: [with_networks(value=TensorDictSequential(make_networks()[2]))],
        ValueError,
        "value_network must be one plain module",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_population_is_refused(case):
    make, error, message = REFUSED[case]
    losses = make()
    with pytest.raises(error, match=message):
        PopulationLoss(losses)


def test_bounds_that_differ_are_refused_when_first_evaluated():
    losses = [with_networks(policies.gaussian(OBS, spec(low), hidden=(8,))) for low in (-1, -2)]
    with pytest.raises(ValueError, match=r"actor_network's .*centre differs between the runs"):
        moving(PopulationLoss(losses))(make_batch())


def test_a_loaded_state_with_other_statistics_is_refused():
    population = moving(PopulationLoss([with_networks(), with_networks()]))
    population(make_batch())
    state = population.state_dict()
    key = "actor_network_params.module.0.module.centre"
    state[key] = torch.arange(2.0).unsqueeze(1).expand_as(state[key])
    population.load_state_dict(state)
    with pytest.raises(ValueError, match=r"actor_network's .*centre differs between the runs"):
        population(make_batch())
