"""Milliseconds of one IQL update: TorchRL's loss in its usual loop, a plain torch script, ourselves.

    python benchmarks/bench_step.py

Sampling is included. Blocks of updates of every competitor alternate, and medians over rounds are
compared. ``floor`` is the matrix arithmetic of one update alone, as the products that its networks
need, in the same run. ``plain torch`` is the algorithm as a short script would write it: one module
per network, lists of parameters, Adam. Writes benchmarks/results/step_DEVICE.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from bench_learning import machine
from bench_trainer import ACTION, BATCH, OBSERVATION, table
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator
from torchrl.objectives import IQLLoss as TorchRLLoss
from torchrl.objectives import SoftUpdate

from iql_torchrl import IQLLoss, IQLStep, compiled, networks, policies
from iql_torchrl.data import DeviceSampler, replay_buffer

RESULTS = Path(__file__).parent / "results"
Update = Callable[[], object]


def parts(width: int, device: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    spec = Bounded(-torch.ones(ACTION), torch.ones(ACTION), (ACTION,))
    hidden = (width, width)
    actor = policies.gaussian(OBSERVATION, spec, hidden=hidden)
    net = networks.Critic(OBSERVATION, ACTION, hidden=hidden)
    critic = ValueOperator(net, in_keys=["observation", "action"])
    value = ValueOperator(networks.StateValue(OBSERVATION, hidden=hidden), in_keys=["observation"])
    return actor.to(device), critic.to(device), value.to(device)


def torchrl_loop(rows: TensorDict, width: int, device: str) -> Update:
    """TorchRL 0.14.1's loss, its buffer, one backward pass, Adam, SoftUpdate."""
    actor, critic, value = parts(width, device)
    loss = TorchRLLoss(actor, critic, value, loss_function="l2", temperature=3.0, expectile=0.7)
    loss.to(device)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
    updater, buffer = SoftUpdate(loss, tau=0.005), replay_buffer(rows, BATCH, seed=0, device=device)

    def update() -> None:
        losses = loss(buffer.sample())
        (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_value"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()

    return update


def ours(rows: TensorDict, width: int, device: str, order: str, form: str) -> Update:
    actor, critic, value = parts(width, device)
    loss = IQLLoss(actor, critic, value).to(device)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4, fused=True)
    step = IQLStep(loss, optimizer, SoftUpdate(loss, tau=0.005), order=order)
    if form == "compiled":
        fast, sampler = compiled(step), DeviceSampler(rows, BATCH, device=device, seed=0)
        return lambda: fast(sampler.sample())
    buffer = replay_buffer(rows, BATCH, seed=0, device=device)
    return lambda: step(buffer.sample())


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


def plain_torch(rows: TensorDict, width: int, device: str) -> Update:
    """V, then actor and critics with the new V, then the targets, in modules and lists."""
    actor, value = mlp(OBSERVATION, width, ACTION).to(device), mlp(OBSERVATION, width, 1).to(device)
    log_std = nn.Parameter(torch.zeros(ACTION, device=device))
    critics = [mlp(OBSERVATION + ACTION, width, 1).to(device) for _ in range(2)]
    targets = copy.deepcopy(critics)
    optimizers = [
        torch.optim.Adam(p, lr=3e-4)
        for p in (
            value.parameters(),
            [*actor.parameters(), log_std],
            [p for critic in critics for p in critic.parameters()],
        )
    ]
    observation, action = rows["observation"].to(device), rows["action"].to(device)
    following, reward = rows["next", "observation"].to(device), rows["next", "reward"].to(device)
    going_on = (~rows["next", "terminated"]).float().to(device)

    def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update() -> None:
        index = torch.randint(len(observation), (BATCH,), device=device)
        s, a, s2 = observation[index], action[index], following[index]
        sa = torch.cat([s, a], 1)
        with torch.no_grad():
            target = torch.minimum(*(net(sa) for net in targets))
        error = target - value(s)
        descend(((0.7 - (error < 0).float()).abs() * error**2).mean(), optimizers[0])
        with torch.no_grad():
            weight = (3.0 * (target - value(s))).exp().clamp(max=100.0).squeeze(1)
            goal = reward[index] + 0.99 * going_on[index] * value(s2)
        policy = torch.distributions.Normal(actor(s).tanh(), log_std.clamp(-5, 2).exp())
        descend(-(weight * policy.log_prob(a).sum(1)).mean(), optimizers[1])
        descend(sum(((net(sa) - goal) ** 2).mean() for net in critics), optimizers[2])
        with torch.no_grad():
            for live, slow in zip(critics, targets, strict=True):
                for p, q in zip(live.parameters(), slow.parameters(), strict=True):
                    q.lerp_(p, 0.005)

    return update


def floor(width: int, device: str) -> Update:
    """Products of one update: forward everywhere, and both backward ones of the four that learn.

    Forward: V at s and s', actor, two critics, two targets (V at s once more in sequential order is
    left out). No gradient with respect to the data is needed in first layers.
    """
    sizes = [(OBSERVATION, 1)] * 2 + [(OBSERVATION, ACTION)] + [(OBSERVATION + ACTION, 1)] * 4
    learning = [(OBSERVATION, 1), (OBSERVATION, ACTION)] + [(OBSERVATION + ACTION, 1)] * 2
    products = []
    for inputs, outputs in sizes:
        layers = [(inputs, width), (width, width), (width, outputs)]
        products += [((BATCH, a), (a, b)) for a, b in layers]
    for inputs, outputs in learning:
        layers = [(inputs, width), (width, width), (width, outputs)]
        products += [((a, BATCH), (BATCH, b)) for a, b in layers]
        products += [((BATCH, b), (b, a)) for a, b in layers[1:]]
    pairs = [
        (
            torch.randn(a, device=device),
            torch.randn(b, device=device),
            torch.empty(a[0], b[1], device=device),
        )
        for a, b in products
    ]

    def update() -> None:
        for a, b, out in pairs:
            torch.mm(a, b, out=out)

    return update


def measure(
    updates: dict[str, Update], block: int, rounds: int, device: str
) -> dict[str, list[float]]:
    """Milliseconds per update of each block."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for update in updates.values():
        for _ in range(10):
            update()
    found: dict[str, list[float]] = {name: [] for name in updates}
    names = list(updates)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            wait()
            began = time.perf_counter()
            for _ in range(block):
                updates[name]()
            wait()
            found[name].append(1e3 * (time.perf_counter() - began) / block)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--width", type=int, default=256)
    add("--block", type=int, default=50, help="updates per block")
    add("--rounds", type=int, default=15)
    add("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows, width, device = table(), options.width, options.device
    warnings.filterwarnings("ignore", category=FutureWarning)  # tensordict under torch.compile
    updates = {
        "TorchRL, eager": torchrl_loop(rows, width, device),
        "plain torch, eager": plain_torch(rows, width, device),
    }
    for order in ("sequential", "simultaneous"):
        for form in ("eager", "compiled"):
            updates[f"{order}, {form}"] = ours(rows, width, device, order, form)
    updates["floor"] = floor(width, device)
    found = measure(updates, options.block, options.rounds, device)
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"{'':26} {'ms':>8} {'of TorchRL':>11} {'of floor':>9}")
    for name, value in medians.items():
        of_torchrl, of_floor = value / medians["TorchRL, eager"], value / medians["floor"]
        print(f"{name:26} {value:8.3f} {of_torchrl:11.2f} {of_floor:9.2f}")
    record = {
        "command": "python " + " ".join(sys.argv),
        "machine": machine() | {"threads": torch.get_num_threads(), "device": device},
        "sizes": {"observation": OBSERVATION, "action": ACTION, "batch": BATCH, "width": width},
        "median_ms": medians,
        "ms": found,
    }
    path = RESULTS / f"step_{device.split(':')[0]}_{width}.json"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
