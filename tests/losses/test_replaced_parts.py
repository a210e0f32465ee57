"""First layers, encoders, replaced objectives and options that a reading of the code found wrong."""

from __future__ import annotations

import pytest
import torch
from conftest import ACT, OBS, make_batch
from small_losses import SPEC, make_step
from small_losses import make_loss as make_double_loss
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ValueOperator

from iql_torchrl import IQLLoss, losses, networks, policies
from iql_torchrl.update.compiled import _compile_options, correct_programs

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
BOTH = ["observation", "action"]


def make_loss(**options):
    return make_double_loss(**options).float()


def encoded_loss(gradient):
    encoder = TensorDictModule(nn.Linear(OBS, 4), in_keys=["observation"], out_keys=["features"])
    return IQLLoss(
        policies.deterministic(4, SPEC, in_keys=["features"], hidden=(8,)),
        lambda: ValueOperator(networks.Critic(4, ACT, hidden=(8,)), in_keys=["features", "action"]),
        ValueOperator(networks.StateValue(4, hidden=(8,)), in_keys=["features"]),
        encoder_network=losses.SharedEncoder(encoder, gradient),
        actor_objective=losses.DDPGBC(),
    )


@pytest.mark.parametrize("gradient", ["critics", "all"])
def test_critics_of_the_policys_action_train_the_encoder_only_where_asked(gradient):
    loss = encoded_loss(gradient)
    loss.actor_loss(make_batch(6))[0].backward()
    (weight, _) = (p for n, p in loss.named_parameters() if n.startswith("encoder"))
    assert (weight.grad is not None and bool(weight.grad.any())) is (gradient == "all")


@pytest.mark.parametrize(
    "preprocess",
    [lambda: networks.MLP(OBS, 5), lambda: nn.BatchNorm1d(OBS, affine=False)],
    ids=["parameters", "statistics"],
)
def test_first_layers_that_cannot_be_stacked(preprocess):
    """Critics then equal two modules, and a loaded state changes no value."""
    first = preprocess()
    features = 5 if isinstance(first, networks.MLP) else OBS
    critics = [
        ValueOperator(
            networks.Critic(features, ACT, preprocess=preprocess(), hidden=(8,)), in_keys=BOTH
        )
        for _ in range(2)
    ]
    value = ValueOperator(networks.StateValue(OBS, hidden=(8,)), in_keys=["observation"])
    loss = IQLLoss(policies.gaussian(OBS, SPEC, hidden=(8,)), critics, value)
    batch = make_batch(6)
    expected = [critic(batch.copy())["state_action_value"].squeeze(-1) for critic in critics]
    assert loss.eval().qvalues(loss.prepare_batch(batch)).shape == (2, 6)
    if isinstance(first, networks.MLP):
        torch.testing.assert_close(loss.qvalues(loss.prepare_batch(batch)), torch.stack(expected))
    before = loss.qvalues(loss.prepare_batch(batch))
    loss.load_state_dict(loss.state_dict())
    torch.testing.assert_close(loss.qvalues(loss.prepare_batch(batch)), before)


def test_v_behind_a_first_layer_that_flattens():
    """One call for both states has as many dimensions as the batch."""
    value = networks.StateValue(OBS, preprocess=nn.Flatten(), hidden=(8,))
    loss = IQLLoss(
        policies.gaussian(OBS, SPEC, hidden=(8,)),
        lambda: ValueOperator(networks.Critic(OBS, ACT, hidden=(8,)), in_keys=BOTH),
        ValueOperator(value, in_keys=["observation"]),
    )
    make_step(loss)(make_batch(6))
    one, other = loss.state_and_next_value(loss.prepare_batch(make_batch(6)))
    assert one.shape == other.shape == (6,)


def test_an_objective_is_checked_and_named_when_it_is_replaced():
    loss = make_loss()
    loss.actor_objective = losses.DDPGBC()
    assert loss.out_keys == ["loss_actor", "loss_qvalue", "loss_value"]
    assert set(loss(make_batch(5)).keys()) == set(loss.out_keys)
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
    loss, batch = make_loss(actor_objective=LogProbability()), make_batch(5)
    assert "entropy" not in loss(batch)
    assert not batch["_log_prob"].requires_grad
    loss.actor_loss(batch)
    assert not batch["_log_prob"].requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"value_objective": losses.Expectile(0.8), "expectile": 0.9},
        {"actor_objective": losses.AdvantageWeighted(), "temperature": 10.0},
        {"actor_objective": losses.DDPGBC(), "max_weight": 5.0},
        {"value_objective": losses.Gumbel(), "expectile": 0.9},
    ],
)
def test_a_hyperparameter_that_nothing_reads_is_refused(options):
    name = list(options)[-1]
    with pytest.raises(ValueError, match=rf"{name} is .*does not read"):
        make_loss(**options)


def test_an_average_that_is_switched_off_is_gone():
    loss = make_loss()
    without = set(loss.state_dict())
    loss.average_actor(0.9)
    loss.average_actor(0)
    assert loss.averaged_actor is None
    assert set(loss.state_dict()) == without
    make_step(loss)(make_batch(5))


@pytest.mark.parametrize("options", [{"mode": None}, {"mode": "default"}, {"backend": "inductor"}])
def test_options_of_compile_keep_what_programs_need(options):
    given = _compile_options(make_step(make_loss()), options)
    assert "mode" not in given
    assert given["options"].keys() >= correct_programs(torch.device("cpu")).keys()
    assert "guard_filter_fn" in given["options"]


def test_a_single_observation_in_a_program_for_a_gpu(monkeypatch):
    """A layer of few outputs and one row without a batch; NumPy has the value."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(networks.perceptrons, "launches_kernels", lambda device: True)
    row, weight, bias = torch.randn(4), torch.randn(6, 4), torch.randn(6)
    expected = weight.numpy() @ row.numpy() + bias.numpy()
    out = networks.perceptrons.affine(row, weight, bias)
    torch.testing.assert_close(out, torch.from_numpy(expected))


def test_hyperparameters_are_not_cast_with_the_networks():
    loss = make_loss(expectile=0.7).bfloat16()
    assert next(loss.parameters()).dtype == torch.bfloat16
    assert loss.value_objective.expectile.dtype == torch.float64
    assert float(loss.value_objective.expectile) == 0.7


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("expectile", 1.5), ("max_weight", 0)]
)
def test_an_assigned_hyperparameter_out_of_range_is_refused(name, value):
    loss = make_loss()
    before = float(getattr(loss, name))
    with pytest.raises(ValueError, match=name):
        setattr(loss, name, value)
    assert float(getattr(loss, name)) == before
