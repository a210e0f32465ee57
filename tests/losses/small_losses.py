"""Small losses of continuous and discrete actions, and their updates in every form."""

from __future__ import annotations

import copy

import torch
from conftest import ACT, OBS, make_networks
from tensordict.nn import TensorDictModule
from torch import nn, optim
from torchrl.data import Bounded, Categorical
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, captured, compiled, networks, policies
from iql_torchrl.data import DeviceSampler

LOSSES = ("loss_actor", "loss_qvalue", "loss_value")
SPEC = Bounded(-torch.ones(ACT), torch.ones(ACT), (ACT,))


class Head(nn.Module):
    """A linear layer over what it reads; the first input may pass through a trunk before."""

    def __init__(self, inputs, outputs=1, trunk=None):
        super().__init__()
        self.trunk, self.linear = trunk or nn.Identity(), nn.Linear(inputs, outputs)

    def forward(self, observation, *others):
        return self.linear(torch.cat([self.trunk(observation), *others], -1))


class NormalActor(Head):
    """A policy that is not a TensorDictModule."""

    in_keys = ("observation",)

    def get_dist(self, td):
        normal = torch.distributions.Normal(self(td["observation"]), 1.0)
        return torch.distributions.Independent(normal, 1)


def make_loss(policy=policies.gaussian, hidden=(8, 8), activation=nn.Tanh, **options) -> IQLLoss:
    parts = make_networks(hidden=hidden, policy=policy, activation=activation)
    return IQLLoss(*parts, **options).double()


def perturb_targets(loss, by: float = 0.1) -> None:
    """Move targets off the online critics, so that confusing the two cannot go unseen."""
    for key, live in loss.qvalue_network_params.items(True, True):
        if isinstance(live, nn.Parameter):  # buffers of the targets are the online critics'
            loss.target_qvalue_network_params.get(key).data.add_(by * torch.randn_like(live))


def discrete_networks(num_actions=4, spec=None, mask_key=None, **network):
    network, spec = {"hidden": (8,)} | network, spec or Categorical(num_actions)
    actor = policies.categorical(OBS, spec, mask_key=mask_key, **network)
    critic = networks.DiscreteCritic(OBS, num_actions, **network)
    critic = TensorDictModule(critic, in_keys=["observation"], out_keys=["state_action_value"])
    return actor, critic, make_networks(**network)[2]


def make_step(loss, updater=SoftUpdate, lr=1e-2, eps=1e-8, **options) -> IQLStep:
    interval = {"tau": 0.1} if updater is SoftUpdate else {"value_network_update_interval": 2}
    optimizer = optim.Adam(loss.parameters(), lr=lr, eps=eps)
    return IQLStep(loss, optimizer, updater(loss, **interval), **options)


def assert_losses(out, expected, **tolerances) -> None:
    for name in LOSSES:
        torch.testing.assert_close(out[name], expected[name], **tolerances)


def assert_same_state(*losses, rtol=1e-8, atol=1e-9, after="") -> None:
    first, *others = (
        {k: v for k, v in x.state_dict().items() if torch.is_tensor(v)} for x in losses
    )
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            torch.testing.assert_close(
                other[name], value, rtol=rtol, atol=atol, msg=f"{after} {name}"
            )


class Forms:
    """One loss that is updated plainly, compiled and captured, on the same rows of ``table``."""

    def __init__(self, loss, table, traced=("compiled", "captured"), updates=3, **options):
        torch._dynamo.reset()
        self.updates, self.calls = updates, []
        self.plain, fast, whole = (make_step(copy.deepcopy(loss), **options) for _ in range(3))
        self.sampler, other = (DeviceSampler(table, 8, seed=3) for _ in range(2))
        self.fast = compiled(fast) if "compiled" in traced else None
        self.call = captured(whole, other, updates=updates) if "captured" in traced else None
        used = [self.plain, *[fast] * bool(self.fast), *[whole] * bool(self.call)]
        self.losses = [step.loss for step in used]

    def run(self, follow=lambda: None) -> dict[str, torch.Tensor]:
        """``updates`` updates of each form; the plain form's last metrics."""
        if self.call:
            self.call()
        for _ in range(self.updates):
            rows = self.sampler.sample()
            metrics = self.plain(rows.clone())
            if self.fast:
                theirs = self.fast(rows.clone())
                for name, value in metrics.items():
                    torch.testing.assert_close(theirs[name], value, rtol=1e-8, atol=1e-9, msg=name)
            follow()
        return metrics

    def assert_equal(self, **tolerances) -> None:
        assert_same_state(*self.losses, **tolerances)


def check_forms(loss, table, order="sequential") -> dict[str, torch.Tensor]:
    """Two captured calls and as many updates of the other forms, the second round untraced."""
    forms = Forms(loss, table, order=order)
    forms.run()
    with torch._dynamo.config.patch(error_on_recompile=True):
        metrics = forms.run()
    forms.assert_equal()
    return metrics


def check_bfloat16(loss, data) -> None:
    """An update in bfloat16 computes the policy's loss in float32, near that of float32."""
    losses = []
    for precision in ("float32", "bfloat16"):
        step = make_step(copy.deepcopy(loss), precision=precision)
        losses.append(step(data.clone())["loss_actor"])
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)
    assert not torch.equal(*losses)
