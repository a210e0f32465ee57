"""The competitors of bench_step.py in torch, and the sizes, data and networks that benchmarks share.

A competitor is a function ``(rows, sizes, device) -> (update, updates_per_call)``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from iql_torchrl import (
    IQLConfig,
    IQLLoss,
    IQLStep,
    OfflineDataset,
    captured,
    compiled,
    load_dataset,
    networks,
    policies,
)
from iql_torchrl.data import DeviceSampler, replay_buffer
from record import random_columns

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
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


def random_rows(
    rows: int,
    observe: Callable[[Generator], Tensor],
    act: Callable[[Generator], Tensor],
    *,
    ended: float = 0.02,
) -> TensorDict:
    """Random transitions, the part ``ended`` terminal; the functions draw ``rows`` entries."""
    draw = torch.Generator().manual_seed(0)
    terminated = torch.rand(rows, 1, generator=draw) < ended
    following = {
        "observation": observe(draw),
        "reward": torch.randn(rows, 1, generator=draw),
        "terminated": terminated,
        "done": terminated.clone(),
    }
    columns = {"observation": observe(draw), "action": act(draw), "next": following}
    return TensorDict(columns, batch_size=[rows])


def transitions(sizes: Sizes, device: str = "cpu") -> TensorDict:
    """Random rows of vectors with actions in [-1, 1]."""
    return random_rows(
        sizes.rows,
        lambda draw: torch.randn(sizes.rows, sizes.observation, generator=draw),
        lambda draw: 2 * torch.rand(sizes.rows, sizes.action, generator=draw) - 1,
    ).to(device)


def dataset_of(sizes: Sizes) -> OfflineDataset:
    """Random steps; every episode is cut off after 1000, each observation follows the last."""
    box = partial(spaces.Box, dtype=np.float32)
    return load_dataset(
        random_columns(sizes.rows, sizes.observation, sizes.action, episode=1000),
        observation_space=box(-np.inf, np.inf, (sizes.observation,)),
        action_space=box(-1, 1, (sizes.action,)),
        progress=False,
    )


def config_of(sizes: Sizes, device: str, **more: Any) -> IQLConfig:
    hidden = (sizes.width, sizes.width)
    return IQLConfig(
        hidden=hidden, batch_size=sizes.batch, num_critics=sizes.critics, device=device, **more
    )


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
    loss = torchrl_loss(*parts(sizes, device), critics=sizes.critics)
    return trained_as_torchrl_does(loss, rows, sizes, device, compile)


def torchrl_loss(*modules: nn.Module, critics: int = 2) -> LossModule:
    return TorchRLLoss(
        *modules, num_qvalue_nets=critics, loss_function="l2", temperature=3.0, expectile=0.7
    )


def trained_as_torchrl_does(
    loss: LossModule,
    rows: TensorDict,
    sizes: Sizes,
    device: str,
    compile: bool = False,
    *,
    lr: float = 3e-4,
    tau: float = 0.005,
) -> Made:
    loss = loss.to(device)
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


def step_of(
    loss: LossModule,
    *,
    lr: float = 3e-4,
    tau: float = 0.005,
    capturable: bool = False,
    schedule: int = 0,
    **how: Any,
) -> IQLStep:
    """The update of ``loss`` with fused Adam, whose rate falls to 0 over ``schedule`` updates.

    ``how``: further arguments of ``IQLStep``.
    """
    adam = torch.optim.Adam(loss.parameters(), lr=lr, fused=True, capturable=capturable)
    falling = [CosineAnnealingLR(adam, schedule)] if schedule else []
    return IQLStep(loss, adam, SoftUpdate(loss, tau=tau), lr_scheduler=falling, **how)


def make_step(sizes: Sizes, device: str, order: str, *, capturable: bool = False) -> IQLStep:
    loss = IQLLoss(*parts(sizes, device), num_qvalue_nets=sizes.critics).to(device)
    return step_of(loss, order=order, capturable=capturable)


def in_form(
    step: IQLStep,
    form: str,
    rows: TensorDict,
    sizes: Sizes,
    device: str,
    updates: int = 8,
) -> Made:
    """``step`` eager, compiled or captured, with its sampling; ``updates`` of a captured call."""
    if form == "eager":
        buffer = replay_buffer(rows, sizes.batch, seed=0, device=device)
        return lambda: step(buffer.sample()), 1
    sampler = DeviceSampler(rows, sizes.batch, device=device, seed=0)
    if form == "captured":
        return captured(step, sampler, updates=updates), updates
    fast = compiled(step)
    return lambda: fast(sampler.sample()), 1


def ours(
    rows: TensorDict, sizes: Sizes, device: str, order: str, form: str, updates: int = 8
) -> Made:
    """``updates``: how many a call of the captured form performs."""
    in_graph = device.startswith("cuda") and form == "captured"
    step = make_step(sizes, device, order, capturable=in_graph)
    return in_form(step, form, rows, sizes, device, updates)
