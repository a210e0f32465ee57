"""IQLStep: the two orders, optimisers, schedules, clipping, and the checks on its parts."""

from __future__ import annotations

import copy

import pytest
import small_losses
import torch
from conftest import make_batch, make_networks
from torch import optim
from torch.optim.lr_scheduler import LambdaLR
from torchrl.objectives import HardUpdate, SoftUpdate, group_optimizers

from iql_torchrl import IQLLoss, IQLStep
from iql_torchrl.losses import AdvantageWeighted


def params(loss, name):
    return [p for n, p in loss.named_parameters() if n.startswith(f"{name}_network_params")]


def snapshot(loss):
    state = {n: p for n, p in loss.state_dict().items() if "network_params" in n}
    return {n: p.detach().clone() for n, p in state.items() if torch.is_tensor(p)}


def make_loss(**options) -> IQLLoss:
    return IQLLoss(*make_networks(critics=2), **options)


def make_step(**options) -> IQLStep:
    torch.manual_seed(0)
    return small_losses.make_step(make_loss(), lr=1e-3, **options)


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
    torch.testing.assert_close(snapshot(loss), snapshot(other), rtol=1e-5, atol=1e-6)


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
    torch.testing.assert_close(snapshot(loss), snapshot(other))


def by_network(loss):
    return [{"params": params(loss, name), "lr": 1e-3} for name in ("actor", "qvalue", "value")]


OPTIMIZERS = {
    "one": lambda loss: optim.Adam(loss.parameters(), lr=1e-3),
    "groups": lambda loss: optim.Adam(by_network(loss)),
    "joined": lambda loss: group_optimizers(*(optim.Adam([g]) for g in by_network(loss))),
    "sgd_momentum": lambda loss: optim.SGD(loss.parameters(), lr=1e-2, momentum=0.9),
    "adamw": lambda loss: optim.AdamW(loss.parameters(), lr=1e-3, weight_decay=0.1),
}


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_any_optimizer_gives_the_update_of_its_own_kind(order):
    results = {}
    for kind, make in OPTIMIZERS.items():
        torch.manual_seed(3)
        loss = make_loss()
        optimizer, before = make(loss), snapshot(loss)
        step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.01), order=order)
        for _ in range(3):
            metrics = step(make_batch())
        assert not any(m.requires_grad for m in metrics.values())
        results[kind] = snapshot(loss)
        assert not any(torch.equal(results[kind][n], before[n]) for n in before if "weight" in n)
        if kind in ("one", "groups", "joined"):
            steps = {state["step"].item() for state in optimizer.state.values()}
            assert steps == {3.0}, "each parameter takes one optimiser step an update"
            torch.testing.assert_close(results[kind], results["one"])


def test_schedulers_step_once_an_update_and_by_group():
    loss = make_loss()
    optimizer = optim.Adam(by_network(loss))
    halving = LambdaLR(optimizer, [lambda t: 0.5**t, lambda t: 1.0, lambda t: 1.0])
    step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.01), lr_scheduler=halving)
    for _ in range(3):
        step(make_batch())
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3 / 8, 1e-3, 1e-3]


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_clipping_bounds_each_networks_gradient_apart(order):
    loss = make_loss()
    before = snapshot(loss)
    sgd, updater = optim.SGD(loss.parameters(), lr=1.0), SoftUpdate(loss, tau=0.01)
    step = IQLStep(loss, sgd, updater, order=order, max_grad_norm=1e-3)
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
    step = small_losses.make_step(loss, HardUpdate)
    key = ("module", "mlp", "0", "weight")
    target = loss.target_qvalue_network_params[key]
    first = target.clone()
    step(make_batch())
    step(make_batch())
    assert torch.equal(target, first)
    step(make_batch())
    assert torch.equal(target, loss.qvalue_network_params[key])


def test_priority_reaches_the_batch():
    batch = make_batch()
    make_step()(batch)
    assert batch["td_error"].shape == (32,)
    assert batch["_log_prob"].shape == (32,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"order": "random"}, ValueError, "order is 'random'"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm is -1"),
        ({"precision": "float16"}, ValueError, "precision is 'float16'"),
        ({"optimizer": lambda loss: [optim.Adam(by_network(loss))]}, TypeError, "group_optimizers"),
        ({"optimizer": lambda loss: optim.LBFGS(loss.parameters())}, TypeError, "LBFGS"),
        (
            {"optimizer": lambda loss: optim.Adam(by_network(loss)[:2])},
            ValueError,
            r"lacks 6 of the loss's .* 'value_network_params\.",
        ),
        ({"updater": lambda loss: 0.005}, TypeError, "SoftUpdate"),
        ({"updater": lambda loss: SoftUpdate(make_loss(), tau=0.1)}, ValueError, "another loss"),
        ({"reduction": "none", "scalar_output_mode": "exclude"}, ValueError, "needs scalars"),
        (
            {"lr_scheduler": lambda adam: optim.lr_scheduler.ReduceLROnPlateau(adam)},
            TypeError,
            "ReduceLROnPlateau",
        ),
    ],
)
def test_what_cannot_step_is_refused(change, error, message):
    of_loss = {k: v for k, v in change.items() if k in ("reduction", "scalar_output_mode")}
    options = {k: v for k, v in change.items() if k in ("order", "max_grad_norm", "precision")}
    loss = make_loss(**of_loss)
    optimizer = change.get("optimizer", lambda loss: optim.Adam(loss.parameters()))(loss)
    updater = change.get("updater", lambda loss: SoftUpdate(loss, tau=0.1))(loss)
    if "lr_scheduler" in change:
        options["lr_scheduler"] = change["lr_scheduler"](optimizer)
    with pytest.raises(error, match=message):
        IQLStep(loss, optimizer, updater, **options)


def test_a_step_is_not_copied():
    with pytest.raises(TypeError, match="train nothing"):
        copy.deepcopy(make_step())


@pytest.mark.parametrize("own", [True, False])
def test_a_weight_function_is_not_clipped(own):
    weight = (lambda advantage: torch.full_like(advantage, 5.0)) if own else "exponential"
    objective = AdvantageWeighted(max_weight=1e-3, weight=weight)
    loss = IQLLoss(*make_networks(), actor_objective=objective, diagnostics=True)
    assert float(loss(make_batch())["clip_fraction"]) == (0.0 if own else 1.0)
