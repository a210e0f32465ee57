"""The learning rates of coming updates, by hand."""

from __future__ import annotations

import torch
from conftest import make_networks
from torch import optim
from torch.optim.lr_scheduler import LambdaLR

from iql_torchrl import IQLLoss, IQLStep
from iql_torchrl.update.schedules import coming_rates


def test_rates_of_several_updates_by_hand():
    loss = IQLLoss(*make_networks())
    groups = [{"params": list(loss.actor_network_params.parameters()), "lr": torch.tensor(0.5)}]
    groups.append({"params": [p for n, p in loss.named_parameters() if n[0] != "a"], "lr": 0.25})
    optimizer = optim.Adam(groups)
    schedule = LambdaLR(optimizer, [lambda n: 0.5**n, lambda n: 1.0])
    step = IQLStep(loss, optimizer, None, lr_scheduler=schedule)
    assert coming_rates(step, 2).tolist() == [[0.5, 0.25], [0.25, 0.25], [0.125, 0.25]]
