"""Shared trunks in every form: trained once, averaged by the targets, saved and loaded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import ACT, OBS, make_batch
from small_losses import LOSSES, Head, NormalActor, assert_losses
from test_rival_faults import shared_trunk
from torch import nn
from torchrl.modules import ValueOperator
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss


def critic_over(trunk):
    return ValueOperator(Head(4 + ACT, trunk=trunk), in_keys=["observation", "action"])


def value_over(trunk):
    return ValueOperator(Head(4, trunk=trunk), in_keys=["observation"])


def build(form: str, separate: bool, shared_with: str = "all", num_critics: int = 2):
    trunk = nn.Linear(OBS, 4)
    actor, value = (
        trunk if shared_with in ("all", other) else nn.Linear(OBS, 4)
        for other in ("actor", "value")
    )
    critics = {
        "single": lambda: critic_over(trunk),
        "list": lambda: [critic_over(trunk) for _ in range(num_critics)],
        "factory": lambda: lambda: critic_over(trunk),
    }[form]()
    options = {"separate_losses": separate, "num_qvalue_nets": num_critics}
    return trunk, IQLLoss(NormalActor(4, ACT, actor), critics, value_over(value), **options)


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


def shares(form: str, separate: bool, num_critics: int) -> bool:
    """A module alone that becomes several critics without separate_losses is copied, as in TorchRL."""
    return separate or form != "single" or num_critics == 1


def assert_mirrors(loss, owner: str = "actor") -> None:
    """The critics' trunk is the owner's."""
    key = KEY[1:] if owner == "actor" else KEY
    weight = getattr(loss, f"{owner}_network_params")[key]
    mirror = loss.qvalue_network_params[KEY]
    torch.testing.assert_close(mirror.detach(), weight.detach().expand_as(mirror))


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


@pytest.mark.parametrize(("form", "separate", "shared"), FORMS)
def test_who_trains_the_trunk(form, separate, shared):
    trunk, loss = build(form, separate, shared)
    listed = sum("trunk.weight" in name for name, _ in loss.named_parameters())
    # the trunk once, another that one network has alone, and the copy of critics that do not share
    assert listed == 1 + (shared != "all") + (not shares(form, separate, 2))
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
    assert_losses(other(batch.clone()), loss(batch.clone()))
    update(other, 1)  # and it still trains: mirrors are tied again
    if shares(form, separate, num_critics):
        assert_mirrors(other, "actor" if shared in ("all", "actor") else "value")


@pytest.mark.parametrize(("form", "separate"), [("list", True), ("list", False), ("single", True)])
@pytest.mark.parametrize(
    "made",
    [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss)), lambda x: x.double().float()],
    ids=["deepcopy", "pickle", "double"],
)
def test_trunks_stay_shared_after_copies_and_casts(form, separate, made):
    _, loss = build(form, separate)
    batch = make_batch()
    expected, loss = loss(batch.clone()), made(loss)
    assert_losses(loss(batch.clone()), expected)
    update(loss)
    assert_mirrors(loss)
    target, mirror = loss.target_qvalue_network_params[KEY], loss.qvalue_network_params[KEY]
    owner = loss.actor_network_params[KEY[1:]]
    assert not torch.equal(target, mirror)
    assert mirror.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()
    assert all(p is not mirror for p in loss.parameters())


def test_reset_parameters_redraws_a_shared_trunk():
    trunk, actor, qvalue, value = shared_trunk()
    loss = IQLLoss(actor, qvalue, value, separate_losses=True)
    with torch.no_grad():
        trunk.module.weight.add_(1000.0)
    loss.reset_parameters_recursive()
    assert loss.qvalue_network_params["module", "0", "module", "weight"].abs().max() < 10


def test_a_trunk_only_the_critics_share_is_unshared_with_a_warning():
    trunk = nn.Linear(OBS, 4)
    value = value_over(nn.Linear(OBS, 4))
    with pytest.warns(UserWarning, match="trains a copy of its own"):
        loss = IQLLoss(NormalActor(OBS, ACT), [critic_over(trunk), critic_over(trunk)], value)
    leaf = loss.qvalue_network_params[KEY]
    assert any(p is leaf for p in loss.parameters())
    before = leaf.detach().clone()
    update(loss)
    assert not torch.equal(leaf, before)
