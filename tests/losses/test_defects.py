"""Arguments and updates that failed silently or without a useful message."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_networks
from small_losses import LOSSES, ScaledSquare, assert_losses, make_loss, make_step
from torch import nn, optim
from torchrl.objectives import SoftUpdate

import iql_torchrl
from iql_torchrl import DiscreteIQLLoss, IQLConfig, IQLLoss, IQLStep, compiled, losses
from iql_torchrl.config import number_dtype

SETTINGS = ("temperature", "expectile", "max_weight", "num_qvalue_nets", "loss_function")


@pytest.mark.parametrize("max_grad_norm", [None, 0.25])
def test_the_parameters_of_an_objective_are_clipped_to_the_norm(max_grad_norm):
    """SGD with a rate of 1 moves each part by its gradient: of the objective 0.25 where clipped."""
    loss = make_loss(value_objective=ScaledSquare(100.0))
    optimizer = optim.SGD(loss.parameters(), lr=1.0)
    batch, updater = make_batch(dtype=torch.float64), SoftUpdate(loss, tau=0.1)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    step = IQLStep(loss, optimizer, updater, order="simultaneous", max_grad_norm=max_grad_norm)
    gradient = float(step(batch)["loss_value"])  # of a scale of 1: the loss itself
    assert gradient > 1
    moved = {}
    for name, p in loss.named_parameters():
        part = name.partition(".")[0]
        moved[part] = moved.get(part, 0.0) + float((p.detach() - before[name]).square().sum())
    expected = gradient if max_grad_norm is None else max_grad_norm
    assert moved["value_objective"] ** 0.5 == pytest.approx(expected, rel=1e-5)
    if max_grad_norm is not None:
        assert all(total**0.5 <= 0.25 * (1 + 1e-6) for total in moved.values())
        assert moved["value_network_params"] ** 0.5 == pytest.approx(0.25, rel=1e-5)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_parameters_unfrozen_later_that_the_optimizer_lacks_are_named(form):
    loss = make_loss()
    loss.value_network_params.requires_grad_(False)
    trained = [p for p in loss.parameters() if p.requires_grad]
    step = IQLStep(loss, optim.Adam(trained, lr=1e-2), SoftUpdate(loss, tau=0.1))
    update = compiled(step) if form == "compiled" else step
    batch = make_batch(dtype=torch.float64)
    for _ in range(2):
        update(batch.clone())
    loss.value_network_params.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lacks 6 of the loss's .* 'value_network_params\."):
        update(batch.clone())
    before = [p.detach().clone() for p in loss.value_network_params.parameters()]
    optimizer = step.optimizer
    optimizer.add_param_group({"params": list(loss.value_network_params.parameters())})
    update(batch.clone())
    for parameter, old in zip(loss.value_network_params.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)


def test_a_frozen_network_rests_and_is_trained_when_it_is_free():
    loss = make_loss()
    loss.value_network_params.requires_grad_(False)
    step, batch = make_step(loss, max_grad_norm=1.0), make_batch(dtype=torch.float64)
    parameters = list(loss.value_network_params.parameters())
    before, actor = ([p.detach().clone() for p in each] for each in (parameters, loss.parameters()))
    step(batch.clone())
    assert all(map(torch.equal, parameters, before))
    assert not torch.equal(next(loss.actor_network_params.parameters()), actor[0])
    loss.value_network_params.requires_grad_(True)
    step(batch.clone())
    assert not any(map(torch.equal, parameters, before))


@pytest.mark.parametrize(
    "make",
    [
        *(lambda f, name=name: make_loss(**{name: f}) for name in SETTINGS),
        lambda f: make_loss().average_actor(f),
        lambda f: setattr(make_loss(), "temperature", f),
        lambda f: make_step(make_loss(), max_grad_norm=f),
        losses.Sparse,
        losses.DDPGBC,
        losses.ConditionedFlow,
        lambda f: losses.DDPGBC(q_source=f),
        lambda f: losses.Expectile(pessimism=f),
        lambda f: losses.AdvantageWeighted(max_weight=f),
        lambda f: losses.Gumbel(clip=f),
        lambda f: losses.SharedEncoder(nn.Identity(), random_shift=f),
    ],
)
def test_a_function_is_not_a_number(make):
    with pytest.raises((TypeError, ValueError), match=r" is <function"):
        make(lambda advantage: advantage)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("expectile", 1.5), ("max_weight", 0)]
)
def test_an_assigned_hyperparameter_out_of_range_is_refused(name, value):
    loss = make_loss()
    before = float(getattr(loss, name))
    with pytest.raises(ValueError, match=name):
        setattr(loss, name, value)
    assert float(getattr(loss, name)) == before


def test_an_objective_is_checked_and_named_when_it_is_replaced():
    loss = make_loss()
    loss.actor_objective = losses.DDPGBC()
    assert loss.out_keys == ["loss_actor", "loss_qvalue", "loss_value"]
    assert set(loss(make_batch(5, dtype=torch.float64)).keys()) == set(loss.out_keys)
    with pytest.raises(TypeError, match=r"FlowMatching"):
        loss.actor_objective = losses.FlowMatching()
    with pytest.raises(TypeError, match=r"pass an object, DDPGBC\(\)"):
        make_loss(actor_objective=losses.DDPGBC)
    with pytest.raises(TypeError, match="expected a ValueObjective"):
        make_loss(value_objective=losses.DDPGBC())


class LogProbability(losses.ActorObjective):
    """Returns a log-probability with a gradient, and announces no entropy."""

    def forward(self, networks, batch, advantage):
        log_prob = networks.log_prob(batch)
        return -log_prob, {"log_prob": log_prob}


def test_log_probabilities_of_an_objective_of_yours_are_detached():
    loss, batch = make_loss(actor_objective=LogProbability()), make_batch(5, dtype=torch.float64)
    assert "entropy" not in loss(batch)
    assert not batch["_log_prob"].requires_grad
    loss.actor_loss(batch)
    assert not batch["_log_prob"].requires_grad


def test_numbers_of_mps_are_float32():
    """It has no float64, so no tensor of the losses and of the update names that dtype alone."""
    assert number_dtype(torch.device("mps")) == torch.float32
    assert number_dtype(torch.device("cpu")) == number_dtype(torch.device("cuda")) == torch.float64
    root, named = Path(iql_torchrl.__file__).parent, []
    for folder in ("losses", "update"):
        for path in sorted((root / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr in ("float64", "double"):
                    named.append(path.name)
    assert named == ["objective.py"]  # on the CPU, until the loss is moved


def test_hyperparameters_move_in_the_dtype_of_their_device(monkeypatch):
    """They are not cast with the networks."""
    loss = IQLLoss(*make_networks(), temperature=0.1, expectile=0.7)
    assert {value.dtype for value in loss.hyperparameters.values()} == {torch.float64}
    loss.to(torch.bfloat16)
    assert next(loss.parameters()).dtype == torch.bfloat16
    assert (loss.temperature, loss.value_objective.expectile) == (0.1, 0.7)
    assert loss.value_objective.expectile.dtype == torch.float64
    monkeypatch.setattr(losses.objective, "number_dtype", lambda device: torch.float32)
    loss.to("cpu")
    assert {value.dtype for value in loss.hyperparameters.values()} == {torch.float32}
    assert float(loss.temperature) == pytest.approx(0.1, rel=1e-7)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gamma", "discount"),
        ("lr", "actor_lr, critic_lr and value_lr"),
        ("beta", "temperature"),
        ("hidden_sizes", "hidden"),
        ("tau", "expectile .* or polyak"),
        ("temprature", "temperature"),
        ("batchsize", "batch_size"),
    ],
)
def test_a_config_says_which_setting_was_meant(name, meant):
    with pytest.raises(
        TypeError, match=rf"^IQLConfig has no setting '{name}'; did you mean {meant}"
    ):
        IQLConfig(**{name: 1})


def test_a_config_lists_its_settings_where_none_is_close():
    with pytest.raises(TypeError, match=r"no setting 'xyz'; the settings are seed, updates, "):
        IQLConfig(xyz=1)


@pytest.mark.parametrize("kind", [IQLLoss, DiscreteIQLLoss])
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("tau", r"the expectile is expectile=, and the averaging rate .* SoftUpdate\(loss, tau"),
        ("beta", "temperature="),
        ("bc_weight", r"give it to losses\.DDPGBC\(bc_weight=\.\.\.\)"),
        ("random_shift", r"give it to losses\.SharedEncoder\(random_shift=\.\.\.\)"),
        ("temprature", "did you mean temperature"),
        ("xyz", r"see help\(IQLLoss\)"),
    ],
)
def test_a_loss_says_where_an_argument_belongs(kind, name, advice):
    with pytest.raises(TypeError, match=rf"^{kind.__name__} has no argument '{name}'; .*{advice}"):
        kind(*make_networks(), **{name: 0.1})


def test_what_public_methods_take_is_on_the_page_of_the_api():
    page = Path(iql_torchrl.__file__).parents[1] / "docs" / "api.md"
    assert "\n   losses.Batch\n" in page.read_text(encoding="utf-8")
    loss = IQLLoss(*make_networks())
    batch = loss.prepare_batch(make_batch())
    assert isinstance(batch, losses.Batch)
    assert loss.td_target(batch).shape == (32,)


def test_done_flags_of_numbers_beside_a_mask():
    loss, batch = make_loss(), make_batch(6, dtype=torch.float64)
    batch["collector", "mask"] = torch.tensor([True, True, False, True, False, True])
    batch["next", "done"] = batch["next", "terminated"].clone()
    expected = loss(batch.clone())
    for dtype in (torch.float32, torch.uint8):
        given = batch.clone()
        given["next", "done"] = given["next", "done"].to(dtype)
        assert_losses(loss(given), {name: expected[name] for name in LOSSES})


@pytest.mark.parametrize("wrong", ["mse", lambda actor, batch: 0.0])
def test_an_objective_is_assigned_as_an_object(wrong):
    loss = make_loss()
    with pytest.raises(TypeError, match=r"actor_objective is .*; assign an object, such as"):
        loss.actor_objective = wrong
