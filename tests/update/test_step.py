"""IQLStep: the two orders, optimisers, schedules, clipping, and the checks on its parts."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_batch, make_networks
from torch import optim
from torch.optim.lr_scheduler import LambdaLR
from torchrl.objectives import HardUpdate, SoftUpdate, group_optimizers

from iql_torchrl import IQLLoss, IQLStep


def make_loss(**options) -> IQLLoss:
    actor, critic, value = make_networks()
    return IQLLoss(actor, [critic, make_networks()[1]], value, **options)


def params(loss, name):
    return [p for n, p in loss.named_parameters() if n.startswith(f"{name}_network_params")]


def snapshot(loss):
    state = loss.state_dict()
    return {
        n: p.detach().clone()
        for n, p in state.items()
        if "network_params" in n and torch.is_tensor(p)
    }


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=name, **tolerance)


def test_sequential_order_is_v_then_actor_and_critics_then_target():
    """Written out by hand in plain torch, as a user of the loss alone would."""
    loss = make_loss()
    other = copy.deepcopy(loss)
    step = IQLStep(loss, optim.Adam(loss.parameters(), lr=1e-2), SoftUpdate(loss, tau=0.1))
    updater = SoftUpdate(other, tau=0.1)
    optimizers = {
        name: optim.Adam(params(other, name), lr=1e-2) for name in ("value", "actor", "qvalue")
    }
    for i in range(4):
        torch.manual_seed(i)
        batch = make_batch()
        metrics = step(batch.clone())
        by_hand = {}
        for name in ("value", "actor", "qvalue"):  # each reads what the ones before have made
            by_hand[name], _ = getattr(other, f"{name}_loss")(batch.clone())
            optimizers[name].zero_grad()
            by_hand[name].backward()
            optimizers[name].step()
            torch.testing.assert_close(metrics[f"loss_{name}"], by_hand[name].detach())
        updater.step()
    assert_same(snapshot(loss), snapshot(other), rtol=1e-5, atol=1e-6)


def test_simultaneous_order_is_one_backward_of_the_sum():
    loss = make_loss()
    other = copy.deepcopy(loss)
    step = IQLStep(
        loss, optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.1), order="simultaneous"
    )
    updater, optimizer = SoftUpdate(other, tau=0.1), optim.Adam(other.parameters())
    for i in range(4):
        torch.manual_seed(i)
        batch = make_batch()
        metrics = step(batch.clone())
        out = other(batch.clone())
        optimizer.zero_grad()
        (out["loss_actor"] + out["loss_qvalue"] + out["loss_value"]).backward()
        optimizer.step()
        updater.step()
        torch.testing.assert_close(metrics["loss_actor"], out["loss_actor"].detach())
    assert_same(snapshot(loss), snapshot(other))


def test_the_orders_differ():
    results = []
    for order in ("sequential", "simultaneous"):
        torch.manual_seed(0)
        loss = make_loss()
        step = IQLStep(
            loss, optim.SGD(loss.parameters(), lr=0.1), SoftUpdate(loss, tau=0.1), order=order
        )
        step(make_batch())
        results.append(snapshot(loss))
    value = "value_network_params.module.mlp.0.weight"
    actor = "actor_network_params.module.0.module.mlp.0.weight"
    torch.testing.assert_close(results[0][value], results[1][value])
    assert not torch.allclose(results[0][actor], results[1][actor])


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
@pytest.mark.parametrize("kind", ["one", "groups", "joined", "sgd_momentum", "adamw"])
def test_any_optimizer_gives_the_update_of_its_own_kind(order, kind):
    loss = make_loss()
    names = ("actor", "qvalue", "value")
    groups = [{"params": params(loss, name), "lr": 1e-3} for name in names]
    optimizer = {
        "one": lambda: optim.Adam(loss.parameters(), lr=1e-3),
        "groups": lambda: optim.Adam(groups),
        "joined": lambda: group_optimizers(*(optim.Adam(g["params"], lr=1e-3) for g in groups)),
        "sgd_momentum": lambda: optim.SGD(loss.parameters(), lr=1e-2, momentum=0.9),
        "adamw": lambda: optim.AdamW(loss.parameters(), lr=1e-3, weight_decay=0.1),
    }[kind]()
    before = snapshot(loss)
    step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.01), order=order)
    for _ in range(3):
        metrics = step(make_batch())
    assert not any(m.requires_grad for m in metrics.values())
    moved = {n for n, value in snapshot(loss).items() if not torch.equal(value, before[n])}
    weights = {n for n in before if n.endswith("weight")}
    assert weights <= moved
    if kind in ("one", "groups", "joined"):
        steps = {state["step"].item() for state in optimizer.state.values()}
        assert steps == {3.0}, "each parameter takes one optimiser step an update"


def test_three_ways_to_write_adam_agree():
    results = []
    for kind in ("one", "groups", "joined"):
        torch.manual_seed(3)
        loss = make_loss()
        groups = [params(loss, name) for name in ("actor", "qvalue", "value")]
        optimizer = {
            "one": lambda loss=loss: optim.Adam(loss.parameters()),
            "groups": lambda groups=groups: optim.Adam([{"params": g} for g in groups]),
            "joined": lambda groups=groups: group_optimizers(*(optim.Adam(g) for g in groups)),
        }[kind]()
        step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.01))
        for _ in range(3):
            step(make_batch())
        results.append(snapshot(loss))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_schedulers_step_once_an_update_and_by_group():
    loss = make_loss()
    optimizer = optim.Adam(
        [{"params": params(loss, n)} for n in ("actor", "qvalue", "value")], 1e-3
    )
    halving = LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: 1.0, lambda t: 1.0])
    step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.01), lr_scheduler=halving)
    for _ in range(3):
        step(make_batch())
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3 / 8, 1e-3, 1e-3]


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_clipping_bounds_each_networks_gradient_apart(order):
    loss = make_loss()
    before = snapshot(loss)
    step = IQLStep(
        loss,
        optim.SGD(loss.parameters(), lr=1.0),
        SoftUpdate(loss, tau=0.01),
        order=order,
        max_grad_norm=1e-3,
    )
    batch = make_batch()
    batch["next", "reward"] *= 1000
    step(batch)
    after = snapshot(loss)
    for name in ("actor", "qvalue", "value"):
        moved = [
            (after[n] - before[n]).flatten() for n in before if n.startswith(f"{name}_network")
        ]
        assert torch.cat(moved).norm() == pytest.approx(1e-3, rel=2e-2)


def test_hard_update_copies_at_its_interval():
    loss = make_loss()
    step = IQLStep(
        loss,
        optim.SGD(loss.parameters(), lr=0.1),
        HardUpdate(loss, value_network_update_interval=2),
    )
    key = ("module", "mlp", "0", "weight")
    target = loss.target_qvalue_network_params[key]
    first = target.clone()
    step(make_batch())
    step(make_batch())
    assert torch.equal(target, first)
    step(make_batch())
    assert torch.equal(target, loss.qvalue_network_params[key])


def test_priority_reaches_the_batch():
    loss = make_loss()
    step = IQLStep(loss, optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.01))
    batch = make_batch()
    step(batch)
    assert batch["td_error"].shape == (32,)
    assert batch["_log_prob"].shape == (32,)


def test_bad_parts_are_refused():
    loss, other = make_loss(), make_loss()
    adam, updater = optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.1)
    with pytest.raises(ValueError, match="order is 'random'"):
        IQLStep(loss, adam, updater, order="random")
    with pytest.raises(ValueError, match="max_grad_norm is -1"):
        IQLStep(loss, adam, updater, max_grad_norm=-1)
    with pytest.raises(TypeError, match="group_optimizers"):
        IQLStep(loss, [adam], updater)
    with pytest.raises(TypeError, match="SoftUpdate"):
        IQLStep(loss, adam, 0.005)
    with pytest.raises(ValueError, match="another loss"):
        IQLStep(loss, adam, SoftUpdate(other, tau=0.1))
    with pytest.raises(ValueError, match=r"lacks 6 .* 'value_network_params"):
        IQLStep(loss, optim.Adam(params(loss, "actor") + params(loss, "qvalue")), updater)
    none = make_loss(reduction="none", scalar_output_mode="exclude")
    with pytest.raises(ValueError, match="needs scalars"):
        IQLStep(none, optim.Adam(none.parameters()), SoftUpdate(none, tau=0.1))


def test_a_frozen_network_rests():
    loss = make_loss()
    loss.value_network_params.requires_grad_(False)
    before = snapshot(loss)
    trainable = [p for p in loss.parameters() if p.requires_grad]
    step = IQLStep(loss, optim.Adam(trainable), SoftUpdate(loss, tau=0.1))
    step(make_batch())
    for name, value in snapshot(loss).items():
        if name.startswith("value_network"):
            assert torch.equal(value, before[name])
    assert not torch.equal(
        snapshot(loss)["actor_network_params.module.0.module.mlp.0.weight"],
        before["actor_network_params.module.0.module.mlp.0.weight"],
    )


def test_what_cannot_step_is_refused_when_built():
    loss = make_loss()
    adam, updater = optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.1)
    with pytest.raises(TypeError, match="LBFGS"):
        IQLStep(loss, optim.LBFGS(loss.parameters()), updater)
    with pytest.raises(TypeError, match="ReduceLROnPlateau"):
        IQLStep(loss, adam, updater, lr_scheduler=optim.lr_scheduler.ReduceLROnPlateau(adam))
    with pytest.raises(TypeError, match="train nothing"):
        copy.deepcopy(IQLStep(loss, adam, updater))
