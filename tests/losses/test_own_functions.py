"""``value_objective`` and ``advantage_weight`` as functions of the user's, in every form."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_batch, make_networks
from torch import optim
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, captured, compiled
from iql_torchrl.data import DeviceSampler
from iql_torchrl.update import captured as captured_module

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")


def huber(target_qvalue, value):
    return torch.nn.functional.smooth_l1_loss(value, target_qvalue, reduction="none")


def as_expectile(target_qvalue, value):
    error = target_qvalue - value
    return (0.7 - (error < 0).to(error)).abs() * error**2


def linear(advantage):
    return torch.relu(1 + advantage)


def as_exponential(advantage):
    return (3.0 * advantage).exp().clamp(max=100.0)


def make_loss(**options) -> IQLLoss:
    torch.manual_seed(0)
    return IQLLoss(*make_networks(hidden=(8,)), **options).double()


def make_step(loss) -> IQLStep:
    optimizer = optim.Adam(loss.parameters(), lr=1e-2)
    return IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.1), max_grad_norm=1.0)


def test_losses_by_hand():
    loss = make_loss(value_objective=huber, advantage_weight=linear)
    batch = make_batch(16, dtype=torch.float64)
    read = loss.read(batch)
    with torch.no_grad():
        target, value = loss.target_qvalue(read), loss.state_value(read)
        log_prob = loss.actor_network.get_dist(batch.copy()).log_prob(batch["action"])
    error = (target - value).abs()
    of_value = torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()
    of_actor = -((1 + target - value).clamp(min=0) * log_prob).mean()
    out = loss(batch)
    torch.testing.assert_close(out["loss_value"].detach(), of_value)
    torch.testing.assert_close(out["loss_actor"].detach(), of_actor)


def test_the_named_choices_written_as_functions_give_the_same_update():
    losses = make_loss(), make_loss(value_objective=as_expectile, advantage_weight=as_exponential)
    steps = [make_step(loss) for loss in losses]
    for number in range(5):
        torch.manual_seed(number)
        batch = make_batch(dtype=torch.float64)
        metrics = [step(batch.clone()) for step in steps]
        for name, value in metrics[0].items():
            torch.testing.assert_close(metrics[1][name], value, rtol=1e-9, atol=1e-12)


class Rows:
    """A plain step and another form of it, with the same weights, rows and seed."""

    def __init__(self):
        torch._dynamo.reset()
        loss = make_loss(value_objective=huber, advantage_weight=linear, diagnostics=True)
        self.plain, self.other = make_step(loss), make_step(copy.deepcopy(loss))
        torch.manual_seed(1)
        data = make_batch(64, dtype=torch.float64)
        self.samplers = [DeviceSampler(data, 16, seed=0) for _ in range(2)]

    def assert_equal(self):
        mine, theirs = (step.loss.state_dict() for step in (self.plain, self.other))
        for name, value in mine.items():
            if torch.is_tensor(value):
                torch.testing.assert_close(theirs[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_a_compiled_step_calls_them_and_notices_others():
    rows = Rows()
    fast = compiled(rows.other, backend="eager")
    for function in (linear, as_exponential, "exponential"):
        for step in (rows.plain, rows.other):
            step.loss.advantage_weight = function
        for step, sampler in zip((rows.plain, fast), rows.samplers, strict=True):
            for _ in range(2):
                step(sampler.sample())
        rows.assert_equal()


@pytest.mark.slow  # captured updates of other settings are compared in test_capture.py
def test_a_captured_step_calls_them_and_notices_others(monkeypatch):
    # what was traced, without Inductor's seconds
    monkeypatch.setattr(captured_module, "compile_program", lambda graph, inputs, options: graph)
    rows = Rows()
    call = captured(rows.other, rows.samplers[1], updates=3)
    for objective, weight in ((huber, linear), (as_expectile, linear), (huber, "exponential")):
        for step in (rows.plain, rows.other):
            step.loss.value_objective, step.loss.advantage_weight = objective, weight
        call()
        for _ in range(3):
            rows.plain(rows.samplers[0].sample())
        rows.assert_equal()


def test_the_policys_weight_trains_no_other_network():
    scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    loss = make_loss(advantage_weight=lambda advantage: (scale * advantage).exp())
    loss(make_batch(dtype=torch.float64))["loss_actor"].backward()
    assert scale.grad is None
    assert any(p.grad is not None for p in loss.actor_network_params.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"value_objective": lambda q, v: (q - v).mean()},
            r"\"value_objective's result\" has shape",
        ),
        ({"advantage_weight": lambda a: a.sum()}, r"\"advantage_weight's result\" has shape"),
        ({"advantage_weight": lambda a: a[:3]}, r"\"advantage_weight's result\" has shape \(3,\)"),
    ],
)
def test_results_of_another_shape_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(**options)(make_batch(dtype=torch.float64))


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="advantage_weight is 'linear'; choose one of 'exponential'"
    ):
        make_loss(advantage_weight="linear")
    with pytest.raises(ValueError, match="value_objective is 'huber'; choose one of 'expectile'"):
        make_loss(value_objective="huber")
