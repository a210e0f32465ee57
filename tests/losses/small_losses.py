"""Small losses of continuous and discrete actions, and their updates in every form."""

from __future__ import annotations

import copy

import torch
from conftest import ACT, OBS, make_batch, make_networks
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn, optim
from torch.utils._pytree import tree_flatten
from torchrl.data import Bounded, Categorical
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, captured, compiled, networks, policies
from iql_torchrl.data import DeviceSampler
from iql_torchrl.losses import DDPGBC, ConditionedFlow

LOSSES = ("loss_actor", "loss_qvalue", "loss_value")
SPEC = Bounded(-torch.ones(ACT), torch.ones(ACT), (ACT,))
LOW, HIGH = torch.tensor([-2.0, 0.0, -1.0]), torch.tensor([2.0, 0.5, 5.0])
BOX = Bounded(LOW, HIGH, (ACT,))


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


class ScaledSquare(nn.Module):
    """A value objective with a parameter."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor, self.scale = factor, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, target, value):
        return self.factor * self.scale * (target - value).square()


def make_loss(
    policy=policies.gaussian, hidden=(8, 8), activation=nn.Tanh, critics=0, **options
) -> IQLLoss:
    parts = make_networks(hidden=hidden, policy=policy, activation=activation, critics=critics)
    options = {"num_qvalue_nets": critics or 2} | options
    return IQLLoss(*parts, **options).double()


def ddpg_loss(q_source="online", q_reduction="min", **options) -> IQLLoss:
    objective = DDPGBC(0.7, q_reduction, q_source)
    loss = make_loss(**{"actor_objective": objective} | options)
    perturb_targets(loss, by=0.3)
    return loss


def flow_loss(condition=None, condition_dropout=0.1, **options) -> IQLLoss:
    """A loss of a flow, which ``condition`` conditions on the advantage."""
    conditioned = condition is not None
    policy = policies.flow(OBS, BOX, hidden=(8, 8), activation=nn.Tanh, conditioned=conditioned)
    objective = ConditionedFlow(condition_dropout, condition) if conditioned else "flow"
    loss = make_loss(policy, **{"actor_objective": objective} | options)
    SoftUpdate(loss, tau=0.1)
    return loss


def with_draws(*shape) -> TensorDict:
    """A batch that holds the random numbers of a flow's loss."""
    data = make_batch(*shape, dtype=torch.float64)
    data["flow_noise"] = torch.randn(*data.shape, ACT, dtype=torch.float64)
    data["flow_drop"] = torch.rand(*data.shape, dtype=torch.float64)
    return data.set("flow_time", torch.rand(*data.shape, 1, dtype=torch.float64))


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
    found, right = ({name: each[name] for name in LOSSES} for each in (out, expected))
    torch.testing.assert_close(found, right, **tolerances)


def assert_same_state(*losses, rtol=1e-8, atol=1e-9, after="") -> None:
    first, *others = (
        {k: v for k, v in x.state_dict().items() if torch.is_tensor(v)} for x in losses
    )
    for other in others:
        torch.testing.assert_close(
            other, first, rtol=rtol, atol=atol, msg=lambda text: f"after {after}: {text}"
        )


def assert_same_optimizers(optimizer, other, **tolerances) -> None:
    mine, theirs = optimizer.state_dict(), other.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(theirs["state"], mine["state"], **tolerances)


def assert_same_metrics(found, expected, **tolerances) -> None:
    torch.testing.assert_close(dict(found.items()), dict(expected.items()), **tolerances)


def assert_same_leaves(first, second) -> None:
    """Equal structures of containers, and in them equal tensors and other values."""
    (leaves, structure), (others, other_structure) = map(tree_flatten, (first, second))
    assert structure == other_structure
    for one, other in zip(leaves, others, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_same_updates(loss, other, updates=3, **options) -> None:
    """From the weights of ``loss``, whose state-dict layout ``other`` has."""
    other.load_state_dict(loss.state_dict())
    steps = [make_step(each, **options) for each in (loss, other)]
    for _ in range(updates):
        batch = make_batch(dtype=torch.float64)
        metrics, others = (step(batch.clone()) for step in steps)
        assert_same_metrics(others, metrics, rtol=1e-9, atol=1e-12)


class Forms:
    """One loss that is updated plainly, compiled and captured, on the same rows.

    ``table`` holds them, or is a function that makes a sampler of them; ``make`` makes steps.
    """

    def __init__(
        self, loss, table, traced=("compiled", "captured"), updates=3, make=make_step, **options
    ):
        make_sampler = table if callable(table) else lambda: DeviceSampler(table, 8, seed=3)
        self.sampler, other = make_sampler(), make_sampler()
        self.steps = [make(copy.deepcopy(loss), **options) for _ in ("plain", *traced)]
        self.losses = [step.loss for step in self.steps]
        self.plain, *steps = self.steps
        steps = dict(zip(traced, steps, strict=True))
        self.updates = updates
        self.fast = compiled(steps["compiled"]) if "compiled" in traced else None
        whole = steps.get("captured")
        self.call = captured(whole, other, updates=updates) if whole else None

    def run(self, follow=lambda: None, change=lambda rows: rows) -> dict[str, torch.Tensor]:
        """``updates`` updates of each form, of rows after ``change``; the plain form's last metrics."""
        means, told = self.call and self.call(), []
        for _ in range(self.updates):
            rows = change(self.sampler.sample())
            told.append(self.plain(rows.clone()))
            if self.fast:
                assert_same_metrics(self.fast(rows.clone()), told[-1], rtol=1e-8, atol=1e-9)
            follow()
        if means is not None:
            assert_same_metrics(means, torch.stack(told).mean(0), rtol=1e-8, atol=1e-10)
        return told[-1]

    def assert_equal(self, **tolerances) -> None:
        assert_same_state(*self.losses, **tolerances)


def check_forms(loss, table, order="sequential") -> dict[str, torch.Tensor]:
    """Two captured calls and as many updates of the other forms, the second round untraced."""
    torch._dynamo.reset()
    forms = Forms(loss, table, order=order)
    forms.run()
    with torch._dynamo.config.patch(error_on_recompile=True):
        metrics = forms.run()
    forms.assert_equal()
    return metrics


def check_bfloat16(loss, data) -> None:
    """An update in bfloat16 computes the policy's loss in float32, near that of float32."""
    data = data.apply(lambda x: x.float() if x.is_floating_point() else x)
    losses = []
    for precision in ("float32", "bfloat16"):
        step = make_step(copy.deepcopy(loss).float(), precision=precision)
        losses.append(step(data.clone())["loss_actor"])
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)
    assert not torch.equal(*losses)
