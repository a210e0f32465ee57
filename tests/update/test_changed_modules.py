"""Attributes, parts and hooks of networks that change after the first update; many compilations."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batch, make_networks
from torch import nn, optim
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep
from iql_torchrl.update import compiled as compiled_module
from iql_torchrl.update.compiled import counted


def make_step(**mlp):
    torch.manual_seed(0)
    loss = IQLLoss(*make_networks())
    return IQLStep(loss, optim.Adam(loss.parameters(), lr=1e-3), SoftUpdate(loss, tau=0.1))


def change_activation(loss):
    loss.value_network.module.mlp[1] = nn.Tanh()


def change_slope(loss):
    loss.value_network.module.mlp[1].negative_slope = 0.5


def double(module, inputs, output):
    return 2 * output


def add_hook(loss):
    loss.value_network.module.register_forward_hook(double)


@pytest.mark.parametrize("change", [change_activation, change_slope, add_hook])
def test_an_eager_update_follows(change):
    """As a step that is built after the change."""
    late, early = make_step(), make_step()
    for step in (late, early):
        if change is change_slope:
            step.loss.value_network.module.mlp[1] = nn.LeakyReLU(0.01)
    early.loss.forget_networks()
    torch.manual_seed(1)
    batches = [make_batch() for _ in range(3)]
    late(batches[0])
    early(batches[0])
    early.loss.forget_networks()
    change(early.loss)
    change(late.loss)
    for batch in batches[1:]:
        actual, expected = late(batch), early(batch)
        assert torch.equal(actual["loss_value"], expected["loss_value"])
    unchanged = make_step()
    unchanged(batches[0])
    assert not torch.equal(unchanged(batches[1])["loss_value"], expected["loss_value"])


def test_an_unchanged_network_keeps_its_evaluator():
    step = make_step()
    step(make_batch())
    kept = step.loss.kept_networks
    step.loss.eval()
    step(make_batch())
    assert step.loss.kept_networks is kept


def test_the_tenth_compilation_is_logged(monkeypatch):
    said = []
    monkeypatch.setattr(compiled_module.torchrl_logger, "warning", said.append)
    keep = counted(lambda guards: [True for _ in guards])
    for _ in range(9):
        assert keep(["guard"]) == [True]
    assert said == []
    keep([])
    assert "compiled for the 10th time" in said[0]
    assert "TORCH_LOGS=recompiles" in said[0]


def test_a_step_says_where_its_parameters_are():
    step = make_step()
    assert step.device.type == "cpu"
    step.optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.empty(1, device="meta"))
    assert step.device.type == "meta"


@pytest.mark.parametrize("own", [True, False])
def test_only_the_exponential_weight_has_a_ceiling(own):
    options = {"advantage_weight": lambda advantage: torch.full_like(advantage, 5.0)} if own else {}
    loss = IQLLoss(*make_networks(), max_weight=1e-3, diagnostics=True, **options)
    SoftUpdate(loss, tau=0.1)
    assert float(loss(make_batch())["weight_at_ceiling"]) == (0.0 if own else 1.0)
