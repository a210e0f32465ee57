"""Networks that can be members of a population, and those that cannot."""

from __future__ import annotations

import pytest
import torch
from conftest import ACT, OBS, NormedCritic, make_batch, make_networks
from small_populations import assert_close
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_population_loss import make_losses, moving
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from iql_torchrl import IQLLoss, networks, policies
from iql_torchrl.update.lifted import Lift, stack_losses

MEMBERS = 3


def test_weights_are_drawn_member_by_member():
    with pytest.raises(NotImplementedError, match="before they are stacked"):
        stack_losses(make_losses()).reset_parameters_recursive()


def with_networks(actor=None, critic=None, value=None, **options) -> IQLLoss:
    others = make_networks()
    parts = [a or b for a, b in zip((actor, critic, value), others, strict=True)]
    return IQLLoss(parts[0], [parts[1]], parts[2], num_qvalue_nets=1, **options)


def state_value(*layers: nn.Module) -> ValueOperator:
    return ValueOperator(nn.Sequential(*layers), in_keys=["observation"])


def several_modules() -> TensorDictSequential:
    first = TensorDictModule(nn.Linear(OBS, 4), ["observation"], ["hidden"])
    return TensorDictSequential(first, ValueOperator(nn.Linear(4, 1), in_keys=["hidden"]))


class Scaled(nn.Module):
    """A layer of the user's, with a parameter that torch's layers do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(OBS))

    def forward(self, observation):
        return (self.scale * observation).sin().sum(-1, keepdim=True)


ACCEPTED = {
    "PReLU": lambda: state_value(nn.Linear(OBS, 4), nn.PReLU(), nn.Linear(4, 1)),
    "layer of the user's": lambda: state_value(Scaled()),
    "residual": lambda: state_value(networks.ResidualMLP(OBS, 1, hidden=(4, 4))),
    "several modules": several_modules,
}


@pytest.mark.parametrize("shape", [(9,), (MEMBERS, 9)], ids=["shared", "own"])
@pytest.mark.parametrize("case", ACCEPTED)
def test_any_layers_are_evaluated_member_by_member(case, shape):
    losses = [moving(with_networks(value=ACCEPTED[case]()).double()) for _ in range(MEMBERS)]
    population = moving(stack_losses(losses))
    batch = make_batch(*shape, dtype=torch.float64)
    each = [batch] * MEMBERS if len(shape) == 1 else batch.unbind(0)
    result = Lift(population, MEMBERS)(batch)
    expected = torch.stack([loss(b.clone()) for loss, b in zip(losses, each, strict=True)])
    assert_close(dict(result.items()), dict(expected.items()), 1e-12)
    result["loss_value"].sum().backward()
    expected["loss_value"].sum().backward()
    for name, parameter in population.named_parameters():
        if name.startswith("value"):
            alone = torch.stack([dict(loss.named_parameters())[name].grad for loss in losses])
            assert_close({name: parameter.grad}, {name: alone}, 1e-12)


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


def normed() -> IQLLoss:
    return with_networks(critic=ValueOperator(NormedCritic(), in_keys=["observation", "action"]))


REFUSED = {
    "trunk": (shared_trunk, "value_network shares its parameter .*use an encoder_network"),
    "batch norm": (normed, "qvalue_network has a BatchNorm1d at .*statistics of batches"),
    "hook": (hooked, "value_network has a StateValue at 'module', which has hooks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stacked_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        stack_losses([make()])
