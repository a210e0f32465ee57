"""Objectives of V by name, the weights that go with them, and pessimism over critics."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_batch
from scipy import special
from small_losses import Forms, assert_same_updates, discrete_networks, make_loss, perturb_targets
from small_populations import BASE, dataset
from torch import nn

from iql_torchrl import DiscreteIQLLoss, IQLConfig, make_agent
from iql_torchrl.losses import (
    VALUE_OBJECTIVES,
    AdvantageWeighted,
    Expectile,
    Gumbel,
    LossCritics,
    Sparse,
)

NAMED = ("sparse", "exponential", "gumbel")
ALPHA = 0.4


def numpy_of(loss, batch):
    """Loss and weights in NumPy, from the papers' formulas and the critics' and V's outputs."""
    read = loss.prepare_batch(batch.clone())
    with torch.no_grad():
        q = loss.qvalues(read, "target").numpy()
        v = loss.state_value(read).numpy()
    objective = loss.value_objective
    alpha, rho = float(objective.alpha), objective.hyperparameters.get("pessimism")
    std = np.sqrt(((q - q.mean(0)) ** 2).mean(0))
    q = q.min(0) if rho is None else q.mean(0) - float(rho) * std
    error = q - v
    if isinstance(objective, Sparse):
        # arXiv:2303.15810: max(1 + (q - v) / (2 alpha), 0)**2 + v / alpha, less q / alpha and 1
        half = np.maximum(1 + error / (2 * alpha), 0)
        return half**2 + (v - q) / alpha - 1, error
    z = np.minimum(error / alpha, 7 if type(objective) is Gumbel else 5)
    return (np.exp(z) - z - 1) * np.exp(-max(z.max(), -1)), error


def three_critics(**options):
    loss = make_loss(hidden=(16, 16), activation=nn.ReLU, critics=3, **options)
    perturb_targets(loss)
    return loss


@pytest.mark.parametrize("pessimism", [None, 0.7])
@pytest.mark.parametrize("objective", NAMED)
def test_losses_and_weights_are_those_of_numpy(objective, pessimism):
    chosen = VALUE_OBJECTIVES[objective](0.1, pessimism=pessimism)
    loss = three_critics(value_objective=chosen, max_weight=0.3, diagnostics=True)
    batch = make_batch(64, dtype=torch.float64)
    expected, advantage = numpy_of(loss, batch)
    assert (advantage / 0.1).max() > 3  # not only the smallest exponents
    out = loss(batch.clone())
    assert out["loss_value"].item() == pytest.approx(expected.mean(), rel=1e-9)
    weight = np.minimum(np.maximum(advantage, 0), 0.3)
    if objective == "gumbel":
        weight = np.minimum(np.exp(3 * advantage), 0.3)
    assert out["weight_mean"].item() == pytest.approx(weight.mean(), rel=1e-9)
    assert 0 < out["clip_fraction"] < 1
    loss.actor_objective = AdvantageWeighted(max_weight=0.3, weight="sparse", alpha=0.1)
    weight = np.clip(1 + advantage / 0.2, 0, 0.3)
    assert loss(batch.clone())["weight_mean"].item() == pytest.approx(weight.mean(), rel=1e-9)
    assert out["advantage_mean"].item() == pytest.approx(advantage.mean(), rel=1e-9)


@pytest.mark.parametrize("objective", NAMED)
def test_masked_and_weighted_steps(objective):
    """Padding holds nan and the loss is the weighted mean over the others, also their maximum."""
    loss = make_loss(value_objective=VALUE_OBJECTIVES[objective](ALPHA))
    batch = make_batch(32, dtype=torch.float64)
    keep = torch.arange(32) % 3 > 0
    weight = torch.rand(32, dtype=torch.float64)
    expected, _ = numpy_of(loss, batch[keep])
    batch["priority_weight"], batch["collector", "mask"] = weight, keep
    batch["observation"][~keep] = torch.nan
    mean = np.average(expected, weights=weight[keep].numpy())
    assert loss(batch)["loss_value"].item() == pytest.approx(mean, rel=1e-9)


def test_training_reaches_the_soft_maximum_of_the_dataset_actions():
    """One state, actions of known values: V ends where the paper says."""
    q = torch.linspace(-1, 2, 256, dtype=torch.float64)
    half = q.numpy() / ALPHA
    exact = ALPHA * (special.logsumexp(half) - math.log(256))
    for objective in ("exponential", "gumbel"):
        loss = make_loss(value_objective=VALUE_OBJECTIVES[objective](ALPHA))
        batch = make_batch(256, dtype=torch.float64)
        batch["observation"][:] = 0.5
        optimizer = torch.optim.Adam(loss.value_network_params.parameters(), lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            read = loss.prepare_batch(batch)
            loss.value_term(read, q)[0].backward()
            optimizer.step()
        assert loss.state_value(read)[0].item() == pytest.approx(exact, abs=1e-3)


def test_discrete_critics():
    objective = VALUE_OBJECTIVES["exponential"](ALPHA, pessimism=1.0)
    loss = DiscreteIQLLoss(*discrete_networks(), value_objective=objective).double()
    perturb_targets(loss)
    batch = make_batch(16, dtype=torch.float64)
    batch["action"] = torch.randint(4, (16, 1))
    expected, _ = numpy_of(loss, batch)
    assert loss(batch)["loss_value"].item() == pytest.approx(expected.mean(), rel=1e-9)


def test_two_critics_with_pessimism_one_are_their_minimum():
    assert_same_updates(make_loss(), make_loss(value_objective=Expectile(pessimism=1.0)))


def test_critics_of_a_loss_follow_its_pessimism():
    loss = three_critics(value_objective=Expectile(pessimism=0.5))
    batch = make_batch(8, dtype=torch.float64)
    critics = LossCritics(loss)
    with torch.no_grad():
        values = loss.qvalues(loss.prepare_batch(batch))
    expected = values.mean(0) - 0.5 * values.std(0, correction=0)
    for each in (critics, copy.deepcopy(critics), pickle.loads(pickle.dumps(critics))):
        written = each(batch.select("observation", "action"))["state_action_value"]
        torch.testing.assert_close(written.squeeze(-1), expected)
    loss.value_objective = Expectile()
    written = critics(batch.select("observation", "action"))["state_action_value"]
    torch.testing.assert_close(written.squeeze(-1), values.amin(0))


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_traced_updates_notice_other_settings():
    loss = three_critics(value_objective=Gumbel(ALPHA))
    forms = Forms(loss, make_batch(64, dtype=torch.float64))
    for change in (
        lambda each: setattr(each.value_objective, "alpha", 2.0),
        lambda each: setattr(each, "value_objective", Gumbel(ALPHA, pessimism=0.3)),
        lambda each: setattr(each.value_objective, "pessimism", 1.3),
        lambda each: setattr(each.actor_objective, "weight", "sparse"),
        lambda each: setattr(each, "value_objective", Sparse(ALPHA)),
    ):
        for each in forms.losses:
            change(each)
            each.double()
        forms.run()
        forms.assert_equal(rtol=1e-9, atol=1e-11)


def test_settings_pass_from_the_config_to_the_loss():
    config = replace(BASE, value_objective="sparse", alpha=2.0, pessimism=0.5)
    loss = make_agent(config, dataset()).loss
    assert type(loss.value_objective) is Sparse
    assert loss.value_objective.hyperparameters == {"alpha": 2.0, "pessimism": 0.5}
    assert loss.actor_objective.weight == "positive"
    assert IQLConfig.from_dict(config.to_dict()) == config


def test_cloning_by_the_temperature_needs_weights_that_read_it():
    IQLConfig(temperature=0.0, value_objective="gumbel")
    with pytest.raises(ValueError, match=r"temperature is 0, .* the weights are 'positive'"):
        IQLConfig(temperature=0.0, value_objective="sparse")
    IQLConfig(temperature=0.0, value_objective="sparse", advantage_weight="exponential")
