"""IQLStep: the two orders, optimisers, schedules, clipping, and the checks on its parts."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_batch, make_networks
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR
from torchrl.objectives import HardUpdate, SoftUpdate, group_optimizers

from iql_torchrl import IQLLoss, IQLStep
from iql_torchrl.losses import AdvantageWeighted


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
            assert_same(results[kind], results["one"])


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"order": "random"}, ValueError, "order is 'random'"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm is -1"),
        ({"precision": "float16"}, ValueError, "precision is 'float16'"),
        (
            {"optimizer": lambda loss: [optim.Adam(loss.parameters())]},
            TypeError,
            "group_optimizers",
        ),
        ({"optimizer": lambda loss: optim.LBFGS(loss.parameters())}, TypeError, "LBFGS"),
        (
            {"optimizer": lambda loss: optim.Adam(params(loss, "actor") + params(loss, "qvalue"))},
            ValueError,
            r"lacks 6 .* 'value_network_params",
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


def test_a_step_is_not_copied():
    with pytest.raises(TypeError, match="train nothing"):
        copy.deepcopy(make_step())


# -- networks that change after the first update ------------------------------------


def make_step(**options):
    torch.manual_seed(0)
    loss = make_loss()
    return IQLStep(
        loss, optim.Adam(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.1), **options
    )


def change_activation(loss):
    loss.value_network.module.mlp[1] = nn.Tanh()


def change_slope(loss):
    loss.value_network.module.mlp[1].negative_slope = 0.5


def double(module, inputs, output):
    return 2 * output


def add_hook(loss):
    loss.value_network.module.register_forward_hook(double)


def patch_forward(loss):
    forward = loss.value_network.module.forward
    loss.value_network.module.forward = lambda observation: 2 * forward(observation)


CHANGES = (change_activation, change_slope, add_hook, patch_forward)


@pytest.mark.parametrize("change", CHANGES)
def test_an_eager_update_follows(change):
    """As a step that is built after the change."""
    late, early = make_step(), make_step()
    for step in (late, early):
        if change is change_slope:
            step.loss.value_network.module.mlp[1] = nn.LeakyReLU(0.01)
    torch.manual_seed(1)
    batches = [make_batch() for _ in range(3)]
    late(batches[0])
    early(batches[0])
    change(early.loss)
    change(late.loss)
    for batch in batches[1:]:
        actual, expected = late(batch), early(batch)
        assert torch.equal(actual["loss_value"], expected["loss_value"])
    unchanged = make_step()
    unchanged(batches[0])
    assert not torch.equal(unchanged(batches[1])["loss_value"], expected["loss_value"])


@pytest.mark.parametrize("own", [True, False])
def test_a_weight_function_is_not_clipped(own):
    weight = (lambda advantage: torch.full_like(advantage, 5.0)) if own else "exponential"
    objective = AdvantageWeighted(max_weight=1e-3, weight=weight)
    loss = IQLLoss(*make_networks(), actor_objective=objective, diagnostics=True)
    SoftUpdate(loss, tau=0.1)
    assert float(loss(make_batch())["clip_fraction"]) == (0.0 if own else 1.0)
