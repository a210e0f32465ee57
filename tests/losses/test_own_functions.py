"""User-defined functions as objectives and weights, in every form."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batch
from small_losses import Forms, assert_same_metrics, assert_same_updates, make_loss

from iql_torchrl.losses import AdvantageWeighted, ValueFunction


def huber(target_qvalue, value):
    return torch.nn.functional.smooth_l1_loss(value, target_qvalue, reduction="none")


def as_expectile(target_qvalue, value):
    error = target_qvalue - value
    return (0.7 - (error < 0).to(error)).abs() * error**2


def linear(advantage):
    return torch.relu(1 + advantage)


def as_exponential(advantage):
    return (3.0 * advantage).exp().clamp(max=100.0)


def own_loss(value_objective="expectile", weight="exponential", **options):
    objective = AdvantageWeighted(weight=weight)
    return make_loss(value_objective=value_objective, actor_objective=objective, **options)


def test_losses_by_hand():
    loss = own_loss(huber, linear)
    batch = make_batch(16, dtype=torch.float64)
    read = loss.prepare_batch(batch)
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
    by_function = own_loss(as_expectile, as_exponential)
    assert_same_updates(make_loss(), by_function, 5, max_grad_norm=1.0)


# captured updates of other settings are compared in test_capture.py
@pytest.mark.parametrize("form", ["compiled", pytest.param("captured", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("uncompiled")
def test_traced_steps_call_them_and_notice_others(form):
    loss = own_loss(huber, linear, diagnostics=True)
    forms = Forms(loss, make_batch(64, dtype=torch.float64), [form], max_grad_norm=1.0)
    for objective, weight in (
        (huber, linear),
        (as_expectile, as_exponential),
        (huber, "exponential"),
    ):
        for each in forms.losses:
            each.value_objective = ValueFunction(objective)
            each.actor_objective.weight = weight
        forms.run()
        forms.assert_equal(rtol=1e-9, atol=1e-11)


def test_the_policys_weight_trains_no_other_network():
    scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    loss = own_loss(weight=lambda advantage: (scale * advantage).exp())
    loss(make_batch(dtype=torch.float64))["loss_actor"].backward()
    assert scale.grad is None
    assert any(p.grad is not None for p in loss.actor_network_params.parameters())


def test_weights_of_zero_and_one_may_be_bools():
    """The binary weight of critic-regularised regression: learn where the advantage is positive."""
    losses = [
        own_loss(weight=weight, diagnostics=True)
        for weight in (lambda a: a > 0, lambda a: (a > 0).to(a), lambda a: (a > 0).long())
    ]
    batch = make_batch(dtype=torch.float64)
    for loss in losses:
        loss.load_state_dict(losses[0].state_dict())
    outs = [loss(batch.clone()) for loss in losses]
    assert 0 < float(outs[0]["weight_mean"]) < 1
    for out in outs[1:]:
        assert_same_metrics(out, outs[0])


@pytest.mark.parametrize(
    ("name", "function", "shape"),
    [
        ("value_objective", lambda q, v: (q - v).mean(), ""),
        ("weight", lambda a: a.sum(), ""),
        ("weight", lambda a: a[:3], r" \(3,\)"),
    ],
)
def test_results_of_another_shape_are_refused(name, function, shape):
    with pytest.raises(ValueError, match=rf"\"{name}'s result\" has shape{shape}"):
        own_loss(**{name: function})(make_batch(dtype=torch.float64))


@pytest.mark.parametrize("name", ["value_objective", "weight", "actor_objective"])
def test_results_that_are_no_tensors_are_refused(name):
    """Such as the None of a function without ``return``."""
    words = rf"\"{name}'s result\" is None; expected a tensor of shape \(32,\)"
    make = own_loss if name == "weight" else make_loss
    with pytest.raises(TypeError, match=words):
        make(**{name: lambda *_: None})(make_batch(dtype=torch.float64))
