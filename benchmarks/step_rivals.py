"""The competitors of bench_step.py in torch, and the sizes, data and networks that all of them use.

A competitor is a function ``(rows, sizes, device) -> (update, updates_per_call)``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, reduce

from iql_torchrl import IQLLoss, IQLStep, captured, compiled, networks, policies
from iql_torchrl.data import DeviceSampler, replay_buffer

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import IQLLoss as TorchRLLoss
from torchrl.objectives import LossModule, SoftUpdate

ORDERS, FORMS = ("sequential", "simultaneous"), ("eager", "compiled", "captured")
Update = Callable[[], object]
Made = tuple[Update, int]  # and the updates of a call


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """HalfCheetah's sizes and the paper's networks. ``dtype`` is that of the matrix products;
    parameters, optimizer and losses stay in float32."""

    width: int = 256
    batch: int = 256
    critics: int = 2
    rows: int = 100_000
    observation: int = 17
    action: int = 6
    dtype: str = "float32"
    matmul_precision: str = "highest"

    def autocast(self, device: str) -> AbstractContextManager[object]:
        # a weight cast once would outlive its own update, so nothing is cached
        return torch.autocast(
            device.split(":")[0],
            torch.bfloat16,
            enabled=self.dtype == "bfloat16",
            cache_enabled=False,
        )


Rival = Callable[[TensorDict, Sizes, str], Made]


def transitions(sizes: Sizes, device: str = "cpu") -> TensorDict:
    """Random rows, one in fifty terminal."""
    rows, generator = sizes.rows, torch.Generator().manual_seed(0)
    terminated = torch.rand(rows, 1, generator=generator) < 0.02
    return TensorDict(
        {
            "observation": torch.randn(rows, sizes.observation, generator=generator),
            "action": torch.rand(rows, sizes.action, generator=generator) * 2 - 1,
            "next": {
                "observation": torch.randn(rows, sizes.observation, generator=generator),
                "reward": torch.randn(rows, 1, generator=generator),
                "terminated": terminated,
                "done": terminated.clone(),
            },
        },
        batch_size=[rows],
    ).to(device)


def parts(sizes: Sizes, device: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The paper's actor, one critic, V."""
    observation, action, hidden = sizes.observation, sizes.action, (sizes.width, sizes.width)
    spec = Bounded(-torch.ones(action), torch.ones(action), (action,))
    actor = policies.gaussian(observation, spec, hidden=hidden)
    net = networks.Critic(observation, action, hidden=hidden)
    critic = ValueOperator(net, in_keys=["observation", "action"])
    value = ValueOperator(networks.StateValue(observation, hidden=hidden), in_keys=["observation"])
    return actor.to(device), critic.to(device), value.to(device)


def torchrl_loop(rows: TensorDict, sizes: Sizes, device: str, compile: bool = False) -> Made:
    """TorchRL's loss, its buffer, one backward pass, Adam, SoftUpdate."""
    loss = TorchRLLoss(
        *parts(sizes, device),
        num_qvalue_nets=sizes.critics,
        loss_function="l2",
        temperature=3.0,
        expectile=0.7,
    ).to(device)
    return trained_as_torchrl_does(loss, rows, sizes, device, compile, lr=3e-4, tau=0.005)


def trained_as_torchrl_does(
    loss: LossModule,
    rows: TensorDict,
    sizes: Sizes,
    device: str,
    compile: bool,
    *,
    lr: float,
    tau: float,
) -> Made:
    optimizer, updater = torch.optim.Adam(loss.parameters(), lr=lr), SoftUpdate(loss, tau=tau)
    buffer = replay_buffer(rows, sizes.batch, seed=0, device=device)
    forward = torch.compile(loss) if compile else loss

    def update() -> None:
        losses = forward(buffer.sample())
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()

    return update, 1


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


class PlainIQL:
    """The algorithm as a short script writes it: modules, lists, an Adam for each network."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        observation, action, width = sizes.observation, sizes.action, sizes.width
        self.actor = mlp(observation, width, action).to(device)
        self.value = mlp(observation, width, 1).to(device)
        self.log_std = nn.Parameter(torch.zeros(action, device=device))
        self.critics = [
            mlp(observation + action, width, 1).to(device) for _ in range(sizes.critics)
        ]
        self.targets = copy.deepcopy(self.critics)
        self.value_adam, self.actor_adam, self.critic_adam = (
            torch.optim.Adam(parameters, lr=3e-4)
            for parameters in (
                [*self.value.parameters()],
                [*self.actor.parameters(), self.log_std],
                [p for critic in self.critics for p in critic.parameters()],
            )
        )

    def value_loss(self, s: Tensor, sa: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = reduce(torch.minimum, [net(sa) for net in self.targets])
        error = target - self.value(s)
        return ((0.7 - (error < 0).float()).abs() * error**2).mean(), target

    def actor_loss(self, s: Tensor, a: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            weight = (3.0 * (target - self.value(s))).exp().clamp(max=100.0).squeeze(1)
        scale = self.log_std.clamp(-5, 2).exp()
        policy = torch.distributions.Normal(self.actor(s).tanh(), scale, validate_args=False)
        return -(weight * policy.log_prob(a).sum(1)).mean()

    def critic_loss(self, sa: Tensor, r: Tensor, s2: Tensor, going_on: Tensor) -> Tensor:
        with torch.no_grad():
            goal = r + 0.99 * going_on * self.value(s2)
        return sum(((net(sa) - goal) ** 2).mean() for net in self.critics)

    def move_targets(self) -> None:
        with torch.no_grad():
            for live, slow in zip(self.critics, self.targets, strict=True):
                for p, q in zip(live.parameters(), slow.parameters(), strict=True):
                    q.lerp_(p, 0.005)


def plain_torch(rows: TensorDict, sizes: Sizes, device: str, compile: bool = False) -> Made:
    """V, then actor and critics with the new V, then the targets; compiled: losses and targets."""
    agent, rows = PlainIQL(sizes, device), rows.to(device)
    observation, action = rows["observation"], rows["action"]
    following, reward = rows["next", "observation"], rows["next", "reward"]
    going_on = (~rows["next", "terminated"]).float()
    names = ("value_loss", "actor_loss", "critic_loss", "move_targets")
    wrap = torch.compile if compile else lambda function: function
    value_loss, actor_loss, critic_loss, move_targets = (wrap(getattr(agent, n)) for n in names)

    def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update() -> None:
        index = torch.randint(len(observation), (sizes.batch,), device=device)
        s, a = observation[index], action[index]
        sa = torch.cat([s, a], 1)
        loss, target = value_loss(s, sa)
        descend(loss, agent.value_adam)
        descend(actor_loss(s, a, target), agent.actor_adam)
        loss = critic_loss(sa, reward[index], following[index], going_on[index])
        descend(loss, agent.critic_adam)
        move_targets()

    return update, 1


@lru_cache(maxsize=1)
def packed(sizes: Sizes, device: str) -> DeviceSampler:
    return DeviceSampler(transitions(sizes, device), sizes.batch, device=device, seed=0)


def device_sampler(sizes: Sizes, device: str) -> DeviceSampler:
    """Its own generator over rows that every sampler of a point shares."""
    sampler = copy.copy(packed(sizes, device))
    sampler.generator = torch.Generator(device=sampler.device).manual_seed(0)
    return sampler


def make_step(sizes: Sizes, device: str, order: str, **adam: bool) -> IQLStep:
    loss = IQLLoss(*parts(sizes, device), num_qvalue_nets=sizes.critics).to(device)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4, fused=True, **adam)
    return IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.005), order=order)


def in_form(
    step: IQLStep,
    form: str,
    rows: TensorDict,
    sizes: Sizes,
    device: str,
    updates: int = 8,
    sampler: DeviceSampler | None = None,
) -> Made:
    """``step`` eager, compiled or captured, with its sampling; ``updates`` of a captured call."""
    if form == "eager":
        buffer = replay_buffer(rows, sizes.batch, seed=0, device=device)
        return lambda: step(buffer.sample()), 1
    sampler = sampler or DeviceSampler(rows, sizes.batch, device=device, seed=0)
    if form == "captured":
        return captured(step, sampler, updates=updates), updates
    fast = compiled(step)
    return lambda: fast(sampler.sample()), 1


def ours(
    rows: TensorDict, sizes: Sizes, device: str, order: str, form: str, updates: int = 8
) -> Made:
    """``updates``: how many a call of the captured form performs."""
    in_graph = {"capturable": True} if device.startswith("cuda") and form == "captured" else {}
    step = make_step(sizes, device, order, **in_graph)
    sampler = None if form == "eager" else device_sampler(sizes, device)
    return in_form(step, form, rows, sizes, device, updates, sampler)
