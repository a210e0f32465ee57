"""Updates of each objective, compiled and captured, equal the eager ones; in bfloat16 they are near."""

from __future__ import annotations

import pytest
import torch
from conftest import make_batch
from small_losses import (
    check_bfloat16,
    check_forms,
    ddpg_loss,
    flow_loss,
    make_loss,
    perturb_targets,
    with_draws,
)
from torch import nn

from iql_torchrl import policies
from iql_torchrl.losses import VALUE_OBJECTIVES

ORDERS = ("sequential", "simultaneous")
OTHER = {"activation": nn.GELU, "policy": policies.mixture}
DDPG = {
    "ddpg_bc": {},
    "ddpg_bc, one critic": {"num_qvalue_nets": 1},
    "ddpg_bc, targets, mean": {"q_source": "target", "q_reduction": "mean"},
    "ddpg_bc, other networks": OTHER,
    "ddpg_bc, deterministic": {"policy": policies.deterministic},
}
CASES = [*DDPG, "flow", "conditioned flow", "sparse", "exponential", "gumbel"]
DEFAULT = [(name, "simultaneous") for name in ("ddpg_bc, targets, mean", "conditioned flow")]


def loss_and_data(case: str, rows: int = 50):
    if case in DDPG:
        return ddpg_loss(**DDPG[case], diagnostics=True), make_batch(rows, dtype=torch.float64)
    if "flow" in case:
        condition = "positive" if case == "conditioned flow" else None
        return flow_loss(condition, diagnostics=True), with_draws(rows)
    objective = VALUE_OBJECTIVES[case](0.4, pessimism=0.5)
    loss = make_loss(value_objective=objective, critics=3, diagnostics=True)
    perturb_targets(loss)
    return loss, make_batch(rows, dtype=torch.float64)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("case", "order"),
    [
        pytest.param(c, o, marks=() if (c, o) in DEFAULT else pytest.mark.slow)
        for c in CASES
        for o in ORDERS
    ],
)
def test_compiled_and_captured_equal_eager(case, order):
    metrics = check_forms(*loss_and_data(case), order)
    if case in DDPG:
        assert float(metrics["weight_mean"]) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiled_by_inductor(case):
    check_forms(*loss_and_data(case))


@pytest.mark.parametrize("case", ["ddpg_bc", "flow", "conditioned flow"])
def test_bfloat16(case):
    check_bfloat16(*loss_and_data(case, 64))
