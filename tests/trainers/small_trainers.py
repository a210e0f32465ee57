"""Small steps and trainers: the same initial weights and the same batches, each time."""

import torch
from conftest import make_batch, make_networks
from torch import optim
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, OfflineTrainer
from iql_torchrl.data import replay_buffer


def make_step(obs=5, act=3, *, hidden=(16, 16), critics=2, target=True, **options) -> IQLStep:
    torch.manual_seed(0)
    actor, critic, value = make_networks(obs, act, hidden=hidden)
    others = [make_networks(obs, act, hidden=hidden)[1] for _ in range(critics - 1)]
    loss = IQLLoss(actor, [critic, *others], value, num_qvalue_nets=critics)
    updater = SoftUpdate(loss, tau=0.1)
    adam = optim.Adam(loss.parameters(), lr=1e-3)
    step = IQLStep(loss, adam, updater if target else None, **options)
    step.spare_updater = updater
    return step


def table(rows=100, obs=5, act=3):
    torch.manual_seed(9)
    return make_batch(rows, obs=obs, act=act)


def make_trainer(step=None, total=20, *, obs=5, act=3, **options) -> OfflineTrainer:
    options = {"log_interval": 5, "progress_bar": False} | options
    if options.get("replay_buffer") is None:
        options["replay_buffer"] = replay_buffer(table(obs=obs, act=act), 16, seed=0)
    return OfflineTrainer(step=step or make_step(obs, act), total_updates=total, **options)


def same_weights(a, b) -> bool:
    """Whether the losses of two steps or trainers have the same bits."""
    actual, expected = (getattr(x, "loss", None) or x.loss_module for x in (a, b))
    actual, expected = actual.state_dict(), expected.state_dict()
    return all(torch.equal(actual[n], expected[n]) for n in actual if torch.is_tensor(actual[n]))


def weight(step) -> float:
    return float(next(step.loss.parameters()).detach().sum())


class Numbers:
    """A TorchRL logger that remembers."""

    def __init__(self):
        self.seen = []

    def log_scalar(self, name, value, step=None):
        self.seen.append((name, float(value), step))

    def of(self, name):
        return [(value, step) for n, value, step in self.seen if n == name]
