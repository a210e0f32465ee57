"""Shared trunks in every form: trained once, averaged by the targets, saved and loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ACT, OBS, make_batch
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
LOSSES = ("loss_actor", "loss_qvalue", "loss_value")


class Actor(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(4, ACT)
        self.in_keys = ["observation"]

    def get_dist(self, td):
        loc = self.head(self.trunk(td["observation"]))
        return torch.distributions.Independent(torch.distributions.Normal(loc, 1.0), 1)


class Critic(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(4 + ACT, 1)

    def forward(self, observation, action):
        return self.head(torch.cat([self.trunk(observation), action], -1))


class Value(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(4, 1)

    def forward(self, observation):
        return self.head(self.trunk(observation))


def build(form: str, separate: bool, shared_with: str = "all", num_critics: int = 2):
    trunk = nn.Linear(OBS, 4)
    fresh = nn.Linear(OBS, 4)
    actor = Actor(trunk if shared_with in ("all", "actor") else fresh)
    value_trunk = trunk if shared_with in ("all", "value") else nn.Linear(OBS, 4)
    value = ValueOperator(Value(value_trunk), in_keys=["observation"])

    def critic():
        return ValueOperator(Critic(trunk), in_keys=["observation", "action"])

    critics = {
        "single": critic,
        "list": lambda: [critic() for _ in range(num_critics)],
        "factory": lambda: critic,
    }[form]()
    loss = IQLLoss(actor, critics, value, separate_losses=separate, num_qvalue_nets=num_critics)
    return trunk, loss


def update(loss, count: int = 3) -> None:
    updater = SoftUpdate(loss, tau=0.5)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
    for _ in range(count):
        out = loss(make_batch())
        optimizer.zero_grad()
        sum(out[name] for name in LOSSES).backward()
        optimizer.step()
        updater.step()


FORMS = [
    (form, separate, shared)
    for form in ("single", "list", "factory")
    for separate in (True, False)
    for shared in ("all", "actor", "value")
]
KEY = ("module", "trunk", "weight")


@pytest.mark.parametrize(("form", "separate", "shared"), FORMS)
@pytest.mark.parametrize("num_critics", [1, 2])
def test_target_trunk_averages_the_live_one(form, separate, shared, num_critics):
    trunk, loss = build(form, separate, shared, num_critics)
    live, target = loss.qvalue_network_params, loss.target_qvalue_network_params
    assert target[KEY].data_ptr() != trunk.weight.data_ptr()
    if shares(form, separate, num_critics):
        torch.testing.assert_close(live[KEY].detach(), trunk.weight.expand_as(live[KEY]).detach())
    updater = SoftUpdate(loss, tau=0.5)
    before = target[KEY].clone()
    with torch.no_grad():
        trunk.weight.add_(1.0)
        if not shares(form, separate, num_critics):
            live[KEY].add_(1.0)
    updater.step()
    torch.testing.assert_close(target[KEY], before + 0.5)


def shares(form: str, separate: bool, num_critics: int) -> bool:
    """A module alone that becomes several critics without separate_losses is copied, as in TorchRL."""
    return separate or form != "single" or num_critics == 1


@pytest.mark.parametrize(("form", "separate", "shared"), FORMS)
def test_who_trains_the_trunk(form, separate, shared):
    trunk, loss = build(form, separate, shared)
    owner = "loss_actor" if shared in ("all", "actor") else "loss_value"
    for name in LOSSES:
        loss.zero_grad(set_to_none=True)
        loss(make_batch())[name].backward()
        reached = trunk.weight.grad is not None and bool(trunk.weight.grad.any())
        if name == owner:
            assert reached
        elif separate:
            assert not reached, name
        elif name == "loss_qvalue":
            assert reached is shares(form, separate, 2)


@pytest.mark.parametrize(("form", "separate", "shared"), FORMS)
@pytest.mark.parametrize("num_critics", [1, 2])
def test_state_dicts_reload(form, separate, shared, num_critics):
    _, loss = build(form, separate, shared, num_critics)
    update(loss)
    stored = {k: v.clone() for k, v in loss.state_dict().items() if torch.is_tensor(v)}
    _, other = build(form, separate, shared, num_critics)
    SoftUpdate(other, tau=0.5)
    other.value_estimator  # noqa: B018  (its discount is in the stored state)
    other.load_state_dict(stored | {k: v for k, v in loss.state_dict().items() if k not in stored})
    batch = make_batch()
    for name in LOSSES:
        torch.testing.assert_close(other(batch.clone())[name], loss(batch.clone())[name])
    update(other, 1)  # and it still trains: mirrors are tied again
    mirror = other.qvalue_network_params[KEY]
    if shares(form, separate, num_critics):
        owner = "actor" if shared in ("all", "actor") else "value"
        key = ("trunk", "weight") if owner == "actor" else KEY
        weight = getattr(other, f"{owner}_network_params")[key]
        torch.testing.assert_close(mirror.detach(), weight.detach().expand_as(mirror))


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("how", ["deepcopy", "double"])
def test_a_list_keeps_sharing_after_copies_and_casts(separate, how):
    _, loss = build("list", separate)
    loss = copy.deepcopy(loss) if how == "deepcopy" else loss.double().float()
    update(loss)
    mirror = loss.qvalue_network_params[KEY].detach()
    owner = loss.actor_network_params["trunk", "weight"].detach()
    torch.testing.assert_close(mirror, owner.expand_as(mirror))
    assert not torch.equal(loss.target_qvalue_network_params[KEY], mirror)


def test_reset_parameters_redraws_a_shared_trunk():
    from test_rival_faults import shared_trunk

    trunk, actor, qvalue, value = shared_trunk()
    loss = IQLLoss(actor, qvalue, value, separate_losses=True)
    with torch.no_grad():
        trunk.module.weight.add_(1000.0)
    loss.reset_parameters_recursive()
    assert loss.qvalue_network_params["module", "0", "module", "weight"].abs().max() < 10


def test_a_trunk_only_the_critics_share_is_unshared_with_a_warning():
    trunk = nn.Linear(OBS, 4)
    critics = [ValueOperator(Critic(trunk), in_keys=["observation", "action"]) for _ in range(2)]
    value = ValueOperator(Value(nn.Linear(OBS, 4)), in_keys=["observation"])
    with pytest.warns(UserWarning, match="trains a copy of its own"):
        loss = IQLLoss(Actor(nn.Linear(OBS, 4)), critics, value)
    leaf = loss.qvalue_network_params[KEY]
    assert any(p is leaf for p in loss.parameters())
    before = leaf.detach().clone()
    update(loss)
    assert not torch.equal(leaf, before)
