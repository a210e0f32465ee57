"""Losses that cannot be stacked."""

from __future__ import annotations

import pytest
import torch
from conftest import ACT, OBS, NormedCritic, make_networks
from tensordict.nn import TensorDictSequential
from test_population_loss import make_losses
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from iql_torchrl import IQLLoss, networks, policies
from iql_torchrl.update.lifted import stack_losses


def test_weights_are_drawn_run_by_run():
    with pytest.raises(NotImplementedError, match="run by run"):
        stack_losses(make_losses()).reset_parameters_recursive()


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
    return with_networks(actor, critic, value, separate_losses=True)


def hooked() -> IQLLoss:
    loss = with_networks()
    loss.value_network.module.register_forward_hook(lambda *_: None)
    return loss


def reading(module: nn.Module) -> ValueOperator:
    return ValueOperator(module, in_keys=["observation", "action"])


REFUSED = {
    "trunk": (lambda: shared_trunk(), "value_network cannot be stacked"),
    "batch norm": (lambda: with_networks(critic=reading(NormedCritic())), "a BatchNorm1d"),
    "own layer": (
        lambda: with_networks(value=state_value(nn.Linear(OBS, 1), nn.PReLU())),
        "a PReLU|a Linear",
    ),
    "residual": (
        lambda: with_networks(value=state_value(networks.ResidualMLP(OBS, 1, hidden=(4, 4)))),
        "a Linear, which cannot be stacked",
    ),
    "hook": (hooked, "value_network holds 'module'"),
    "several modules": (
        lambda: with_networks(value=TensorDictSequential(make_networks()[2])),
        "value_network cannot be stacked",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stacked_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        stack_losses([make()])
