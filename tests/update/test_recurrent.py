"""Recurrent layers of torch in compiled and captured steps."""

from __future__ import annotations

import pytest
from conftest import ACT, OBS, make_batch, make_networks
from tensordict.nn import TensorDictModule
from torch import nn, optim
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, captured, compiled
from iql_torchrl.data import DeviceSampler


class LastState(nn.Module):
    """The action that an LSTM gives after one step."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(OBS, ACT, batch_first=True)

    def forward(self, observation):
        return self.cell(observation.unsqueeze(-2))[0].squeeze(-2)


def test_a_recurrent_layer_of_torch_is_refused_by_name_and_trains_eagerly():
    _, critic, value = make_networks()
    actor = TensorDictModule(LastState(), in_keys=["observation"], out_keys=["action"])
    loss = IQLLoss(actor, critic, value, actor_objective="mse")
    step = IQLStep(loss, optim.Adam(loss.parameters()), SoftUpdate(loss, tau=0.1))
    before = actor.module.cell.weight_ih_l0.clone()
    step(make_batch(8))
    assert not before.equal(actor.module.cell.weight_ih_l0)
    message = r"actor_network has a torch\.nn\.LSTM at 'module\.cell'.*networks\.LSTMEncoder"
    with pytest.raises(TypeError, match=message):
        compiled(step)
    with pytest.raises(TypeError, match=message):
        captured(step, DeviceSampler(make_batch(16), 8, device="cpu", seed=0))
