"""``compiled``: the plain step's parameters and states, without compiling again."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_batch, make_networks
from test_step import make_loss, snapshot
from torch import optim
from torch.optim.lr_scheduler import LambdaLR
from torchrl.objectives import HardUpdate, SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, compilation, compiled


def pair(dtype, make_optimizer, make_updater, schedule, **options):
    """A plain and a compiled step of the same weights."""
    torch._dynamo.reset()
    loss = make_loss().to(dtype)
    steps = []
    for each in (loss, copy.deepcopy(loss)):
        optimizer = make_optimizer(each.parameters())
        scheduler = LambdaLR(optimizer, lambda n: 0.9**n) if schedule else None
        updater = make_updater(each)
        steps.append(IQLStep(each, optimizer, updater, lr_scheduler=scheduler, **options))
    return steps[0], compiled(steps[1])


def soft(loss):
    return SoftUpdate(loss, tau=0.1)


def hard(loss):
    return HardUpdate(loss, value_network_update_interval=3)


def train(plain, fast, updates, dtype):
    for number in range(updates):
        torch.manual_seed(number)
        batch = make_batch(dtype=dtype)
        # the optimizer's state is made in the first update: from the second on, nothing is new
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            metrics = plain(batch.clone()), fast(batch.clone())
    return metrics


CASES = {
    "one graph": (lambda p: optim.Adam(p, lr=1e-3), soft, True, {"max_grad_norm": 0.5}),
    "hard target": (
        lambda p: optim.AdamW(p, lr=1e-3, weight_decay=0.1),
        hard,
        False,
        {"order": "simultaneous"},
    ),
    "other optimizer": (lambda p: optim.SGD(p, lr=1e-3, momentum=0.9), soft, True, {}),
}


@pytest.mark.parametrize(
    "case",
    ["one graph", "hard target", pytest.param("other optimizer", marks=pytest.mark.slow)],
)
def test_the_plain_steps_bits_but_for_rounding(case):
    make_optimizer, make_updater, schedule, options = CASES[case]
    plain, fast = pair(torch.float64, make_optimizer, make_updater, schedule, **options)
    a, b = train(plain, fast, 12, torch.float64)
    mine, theirs = snapshot(plain.loss), snapshot(fast.loss)
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-10, atol=1e-12, msg=name)
    for name in a.keys():  # noqa: SIM118
        torch.testing.assert_close(b[name], a[name], rtol=1e-9, atol=1e-11, msg=name)
    states = [step.optimizer.state_dict() for step in (plain, fast)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, one in states[0]["state"].items():
        other = states[1]["state"][number]
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-9, atol=1e-12)
    if case == "one graph":  # loaded state is used, and a plain step goes on from a compiled one's
        fast.load_state_dict(copy.deepcopy(plain.state_dict()))
        fast.loss.load_state_dict(plain.loss.state_dict())
        train(plain, fast, 3, torch.float64)
        for name, value in snapshot(plain.loss).items():
            torch.testing.assert_close(snapshot(fast.loss)[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_a_thousand_updates_in_single_precision(order):
    plain, fast = pair(torch.float32, lambda p: optim.Adam(p, lr=1e-3), soft, False, order=order)
    train(plain, fast, 1000, torch.float32)
    mine, theirs = snapshot(plain.loss), snapshot(fast.loss)
    for name, value in mine.items():
        scale = value.abs().max()
        assert (theirs[name] - value).abs().max() <= 1e-4 * scale, name


def test_a_frozen_network_rests():
    torch._dynamo.reset()
    actor, critic, value = make_networks()
    loss = IQLLoss(actor, [critic, make_networks()[1]], value)
    loss.value_network_params.requires_grad_(False)
    before = snapshot(loss)
    trainable = [p for p in loss.parameters() if p.requires_grad]
    fast = compiled(IQLStep(loss, optim.Adam(trainable), SoftUpdate(loss, tau=0.1)))
    fast(make_batch())
    after = snapshot(loss)
    moved = {name.split("_")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"actor", "qvalue", "target"}


@pytest.mark.slow
def test_where_gradients_cannot_be_traced_the_losses_are_compiled(monkeypatch):
    monkeypatch.setattr(compilation, "_traces_gradients", lambda: False)
    make_optimizer, make_updater, schedule, options = CASES["one graph"]
    plain, fast = pair(torch.float64, make_optimizer, make_updater, schedule, **options)
    train(plain, fast, 4, torch.float64)
    for name, value in snapshot(plain.loss).items():
        torch.testing.assert_close(snapshot(fast.loss)[name], value, rtol=1e-10, atol=1e-12)
